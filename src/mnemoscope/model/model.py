"""A loaded model with its parts; what is known of it is looked at again where it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.arguments import DTYPES
from mnemoscope.errors import ModelChanged, ModelNotSupported, RunMismatch
from mnemoscope.model.accepted import unwrapped
from mnemoscope.model.check import check_traced, examine
from mnemoscope.model.fairseq import AdaptiveInput
from mnemoscope.model.packed import packings
from mnemoscope.model.parts import Anatomy
from mnemoscope.model.running import plainly
from mnemoscope.model.spread import home
from mnemoscope.model.state import Fingerprint, Mode, fingerprint, structure, weights
from mnemoscope.model.stream import Stream, trace
from mnemoscope.model.unit_set import UnitSet, attached
from mnemoscope.records import AdapterEntry, Cells, ModelEntry
from mnemoscope.text.tokenizer import check_rows, serialised

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

_NOTHING = Fingerprint((), ())
NAMES = {full: name for name, full in DTYPES.items()} | {name: name for name in DTYPES}

_NOT_FOLLOWED = "whose neurons run on the tokens routed to them, which this does not follow as yet"


@dataclass(eq=False)
class Model:
    """A language model, a decoder or an encoder, whose parts are known and have been shown to add up to its logits.

    The modules stay the caller's: they may be trained, hooked or switched to training mode at any time. `running`
    puts them into evaluation mode for as long as they are used, and `refresh` finds the parts again when something
    has changed.

    self_check  the largest error of the rebuilt logits as a share of their range (fp32)
    unused      what of the checkpoint was not loaded, a line for each kind
    path        where a local model lies, absolute
    adapter     what was merged into it, and is named in its id
    alone       of an encoder-decoder only the encoder is looked at (`encoder`)
    units       units that are read instead of the neurons; the parts (``anatomy``) are then those with them in place
    devices     all alike, on each of which one process of a build runs, the first being its own; none: on its own
    """

    hf: PreTrainedModel
    tokenizer: Any
    anatomy: Anatomy
    id: str
    revision: str | None = None
    self_check: float = field(default=0.0)
    unused: tuple[str, ...] = ()
    path: str | None = None
    adapter: AdapterEntry | None = None
    alone: bool = False
    units: UnitSet | None = None
    devices: tuple[torch.device, ...] = ()
    _seen: Fingerprint | None = field(default=None, init=False, repr=False)
    _mode: Mode = field(default_factory=Mode, init=False, repr=False)

    def __post_init__(self) -> None:
        self._seen = fingerprint(self.hf)
        if self.units is not None:
            self.anatomy = attached(self.anatomy, self.units.layers, f"{self.units.id} for {self.id}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a worker's has modules of its own, which are seen when they are first used.
        self.__dict__ |= state | {"_seen": None}

    @property
    def device(self) -> torch.device:
        """The device that holds the weights; of a model that is spread, the one where parts are added up."""
        return home(self.hf)

    @property
    def dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``: that of the weights, and of the coefficients of neurons."""
        return NAMES[str(self.anatomy.dtype).removeprefix("torch.")]

    @property
    def cells(self) -> Cells:
        """The units of all layers, numbered through."""
        return Cells(self.anatomy.sizes, self.anatomy.experts)

    @property
    def upcast(self) -> bool:
        """Whether some weights are in half precision or packed, so that an exact pass has to widen them."""
        half = (torch.bfloat16, torch.float16)
        return bool(packings(self.hf)) or any(weight.dtype in half for weight in self.hf.parameters())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode for the time of the block, with parts that are those of the weights as they are.

        Nothing may change while the outermost such block lasts: `ModelChanged`, at the next block inside (cheap
        enough for every batch) or at its end.
        """
        outermost = not self._mode.active
        if outermost:
            self.refresh()
        elif structure(self.hf) != self.seen.structure:
            raise self._changed("running it")
        with plainly(), self._mode.evaluating(self.hf):
            yield
        if outermost and fingerprint(self.hf) != self.seen:
            raise self._changed("running it")

    @property
    def seen(self) -> Fingerprint:
        """The fingerprint of the model when its parts were found."""
        if self._seen is None:
            self._seen = fingerprint(self.hf)
        return self._seen

    def _changed(self, doing: str) -> ModelChanged:
        return ModelChanged(
            f"{doing}: the weights, settings, hooks or attention of {self.id} were changed meanwhile, so what was read "
            "is of no one model and nothing was kept; run this again, and change the model before or after"
        )

    def refresh(self) -> None:
        """Find the parts, the self-check and the hash again if the model is no longer what was looked at.

        `ModelNotSupported` when its parts no longer add up, or when it became what `load_model` would refuse (float64,
        an adapter that is not merged).
        """
        now = fingerprint(self.hf)
        if self._seen is not None and now != self._seen:
            unwrapped(self.hf)
            whole, self.self_check = examine(self.hf)
            self.anatomy = whole.stacks[0] if self.alone else whole
            if self.units is not None:
                self.anatomy = attached(self.anatomy, self.units.layers, f"{self.units.id} for {self.id}")
            self.__dict__.pop("_hash", None)
        self._seen = now

    def move(self, device: torch.device) -> bool:
        """Put the weights on a device, and prove there that the parts add up; whether they were on another one.

        What was made of the parts before stays where it is, and must be made again.
        """
        if (self.device.type, self.device.index or 0) == (device.type, device.index or 0):
            return False
        self.hf.to(device)
        self._seen = _NOTHING
        self.refresh()
        return True

    @property
    def encoder(self) -> Model:
        """The encoder of an encoder-decoder by itself, of the same weights; itself where there is no decoder."""
        if not self.anatomy.stacks:
            return self
        unread = "its decoder and its head (not read: the encoder alone is looked at)"
        return replace(self, anatomy=self.anatomy.stacks[0], unused=(*self.unused, unread), alone=True)

    def as_in(self, run: Run) -> Model:
        """The model as a run was built from it: of an encoder-decoder both stacks, or the encoder alone."""
        return self.encoder if run.manifest.model.bidirectional else self

    @property
    def decoder_start(self) -> int:
        """The token with which the decoder of an encoder-decoder begins; ModelNotSupported if nothing says it."""
        configs = (getattr(self.hf, "generation_config", None), self.hf.config, self.hf.get_decoder().config)
        for name, config in product(("decoder_start_token_id", "bos_token_id"), configs):
            if isinstance(token := getattr(config, name, None), int):
                return token
        raise ModelNotSupported(
            f"reading with the decoder of {self.id}: neither its config nor its generation config says with which "
            "token it begins (decoder_start_token_id); set it in one of them"
        )

    def traced(
        self,
        tokens: Int[Tensor, "sequence token"],
        source: Int[Tensor, "sequence source"] | None = None,
    ) -> Stream:
        """One sequence (tokens of shape [1, token]) taken apart, from the logits of the model as it is run.

        source  what the encoder of an encoder-decoder reads, whose decoder then reads the tokens
        `ModelNotSupported` when its attention is another on these tokens than on those of the check on load.
        """
        hf = self.hf.get_encoder() if self.alone else self.hf
        stream = trace(hf, self.anatomy, tokens, source, upcast=self.upcast)
        check_traced(stream)
        return stream

    def check_one_text(self, doing: str) -> None:
        """ModelNotSupported for an encoder-decoder; `doing` begins its line."""
        if self.anatomy.stacks:
            raise ModelNotSupported(
                f"{doing} {self.id}: it is an encoder-decoder, and this asks about one text and the token that "
                "follows; decoders are accepted"
            )

    def check_dense(self, doing: str, last: int | None = None, why: str = _NOT_FOLLOWED) -> None:
        """ModelNotSupported where a layer (of those up to `last`) is a mixture of experts; `doing` begins its line."""
        layers = self.anatomy.layers if last is None else self.anatomy.layers[: last + 1]
        if not self.anatomy.of_units and any(layer.experts for layer in layers):
            raise ModelNotSupported(
                f"{doing} {self.id}: it is a mixture of experts, {why}; dense models are accepted"
            )

    def check_doubles(self, doing: str) -> None:
        """ModelNotSupported on a device without fp64, in which contributions are added up; `doing` begins its line."""
        if self.device.type == "mps":
            raise ModelNotSupported(
                f"{doing} {self.id}: contributions are added up in fp64, which mps does not have; give {{device}}",
                device="cpu",
            )

    def check_causal(self, doing: str) -> None:
        """ModelNotSupported for an encoder, also with a decoder, or where the residual stream is normalised; `doing`
        begins its line.
        """
        self.check_one_text(doing)
        if self.anatomy.bidirectional:
            raise ModelNotSupported(
                f"{doing} {self.id}: it is an encoder, whose positions see all of the text, and this asks about "
                "prefixes and the token that follows; decoders are accepted"
            )
        if not self.anatomy.adds_up_as_read:
            raise ModelNotSupported(
                f"{doing} {self.id}: its residual stream is normalised on the way to the logits, which this does not "
                "follow as yet; decoders that normalise only what each part reads are accepted"
            )

    @property
    def weights_sha256(self) -> str:
        """Hash of all weights, rounded to bf16 so that it does not depend on the dtype they were loaded in."""
        if not self._mode.active:
            self.refresh()
        return self._hash

    @cached_property
    def _hash(self) -> str:
        return hash_of(self.hf)

    def check_weights(self, sha256: str, doing: str) -> None:
        """`ModelChanged` if something changed since, or the weights, hashed as a whole, are not those of a hash."""
        if fingerprint(self.hf) != self.seen or hash_of(self.hf) != sha256:
            # The change may be too small for a fingerprint: all is found again at the next look.
            self._seen = _NOTHING
            raise self._changed(doing)

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's own serialisation, or of its vocabulary when it has none."""
        return hashlib.sha256(serialised(self.tokenizer).encode()).hexdigest()

    def check_built(self, run: Run, doing: str) -> None:
        """RunMismatch, in a line that begins with ``doing``, when a run was built from other weights than these."""
        stored = run.manifest.model
        if self.weights_sha256 != stored.weights_sha256:
            raise RunMismatch(
                f"{doing} {run.path}: it was built from {stored.id}, and the weights of {self.id} are others; "
                "give the model it was built from ({model})",
                model=...,
            )
        held, given = stored.units, self.units
        if (None if held is None else held.sha256) != (None if given is None else given.sha256):
            raise RunMismatch(
                f"{doing} {run.path}: it holds {'neurons' if held is None else held.id}, and "
                f"{'neurons' if given is None else given.id} were given, or their weights are others; give the units "
                "it was built from ({units}), and none for neurons",
                units=...,
            )

    def check_tokenizer(self) -> None:
        """ModelError when the tokenizer has tokens that the embedding lacks; they may have been added after loading."""
        check_rows(self.tokenizer, embedding_rows(self.hf), self.id)

    def entry(self) -> ModelEntry:
        """The entry of this model in a manifest."""
        parts = self.anatomy
        return ModelEntry(
            id=self.id,
            path=self.path,
            revision=self.revision,
            family=parts.family,
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            layers=parts.n_layers,
            neurons=list(parts.sizes) if self.cells.alike is None else self.cells.alike,
            width=parts.width,
            vocabulary=parts.vocabulary,
            gated=parts.gated,
            activation=parts.activation,
            context_length=parts.context_length,
            self_check=self.self_check,
            unused=list(self.unused),
            experts=list(parts.experts),
            bidirectional=parts.bidirectional,
            encoder_layers=parts.stacks[0].n_layers if parts.stacks else 0,
            units=None if self.units is None else self.units.entry(),
            readout="input embedding" if parts.headless else "head",
            adapter=self.adapter,
            packed=packings(self.hf),
        )


def embedding_rows(hf: PreTrainedModel) -> int:
    """Tokens that have a row in the embedding."""
    table = hf.get_input_embeddings()
    # Of an adaptive embedding the weight is a product.
    return table.num_embeddings if isinstance(table, AdaptiveInput) else len(table.weight)


def hash_of(hf: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and bf16 bytes of all that a checkpoint holds, packed weights multiplied out."""
    digest = hashlib.sha256()
    for name, tensor in weights(hf):
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16).view(torch.uint16)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AMX or AVX512_BF16; ARM with BF16)."""
    return any(_has(feature) for feature in ("amx_tile", "avx512_bf16", "arm_bf16"))


def tiles() -> bool:
    """Whether there is hardware that multiplies tiles of bf16: AMX or CUDA."""
    return torch.cuda.is_available() or _has("amx_tile")


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())
