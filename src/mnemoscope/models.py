"""Load a causal language model from anywhere local, find its parts, and check that they add up to its logits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from mnemoscope import devices, files, samples
from mnemoscope.anatomy import Anatomy
from mnemoscope.arguments import DTYPES, check_loading
from mnemoscope.decompose import examine
from mnemoscope.errors import ModelError, ModelNotSupported, RunMismatch
from mnemoscope.records import ModelEntry
from mnemoscope.tokenizer import accepted, check_rows, serialised

if TYPE_CHECKING:
    from mnemoscope.store import Run

# Without this, MKL's products end in other bits when another number of threads computes them, and a run would show
# how many workers it had. It is read at the first product, so a choice that was made before stands.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_NAMES = {full: name for name, full in DTYPES.items()} | {name: name for name in DTYPES}


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model whose parts are known and have been shown to add up to its logits.

    self_check is the largest error of the rebuilt logits as a share of their range (fp32).
    """

    hf: PreTrainedModel
    tokenizer: Any
    anatomy: Anatomy
    id: str
    revision: str | None = None
    self_check: float = field(default=0.0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return _NAMES[str(next(self.hf.parameters()).dtype).removeprefix("torch.")]

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of all weights, rounded to bf16 so that it does not depend on the dtype they were loaded in."""
        digest = hashlib.sha256()
        state = self.hf.state_dict()
        for name in sorted(state):
            tensor = state[name]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.bfloat16).view(torch.uint16)
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's own serialisation, or of its vocabulary when it has none."""
        return hashlib.sha256(serialised(self.tokenizer).encode()).hexdigest()

    def check_built(self, run: Run, doing: str) -> None:
        """RunMismatch, in a line that begins with ``doing``, when a run was built from other weights than these."""
        stored = run.manifest.model
        if self.weights_sha256 != stored.weights_sha256:
            raise RunMismatch(
                f"{doing} {run.path}: it was built from {stored.id}, and the weights of {self.id} are others; "
                "give the model it was built from"
            )

    def check_tokenizer(self) -> None:
        """ModelError when the tokenizer has tokens that the embedding lacks; they may have been added after loading."""
        check_rows(self.tokenizer, _rows(self.hf), self.id)

    def entry(self) -> ModelEntry:
        """What a manifest says of this model."""
        parts = self.anatomy
        return ModelEntry(
            id=self.id,
            revision=self.revision,
            family=parts.family,
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            layers=parts.n_layers,
            neurons=parts.n_neurons,
            width=parts.width,
            vocabulary=parts.vocabulary,
            gated=parts.gated,
            activation=parts.activation,
            context_length=parts.context_length,
            self_check=self.self_check,
        )


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Load a model and prove that its parts add up to its logits.

    source    Hugging Face id, local folder, .gguf file, ``sample:smollm2-135m``, or a loaded PreTrainedModel
    tokenizer needed beside a PreTrainedModel that does not say where it came from; one of transformers or
              `tokenizers`, or the folder or id of one
    dtype     ``auto`` (bf16 where the processor multiplies it natively, else fp32), ``fp32``, ``bf16``, ``fp16``
    device    ``auto`` (a CUDA device when there is one), or a torch device

    Raises ModelError when it cannot be found or read or its tokenizer is another model's, ModelNotSupported when its
    parts do not add up.
    """
    check_loading(dtype, device)
    say = progress or (lambda _: None)
    target = devices.device(device)
    if isinstance(source, PreTrainedModel):
        hf, name = source.eval(), str(source.config._name_or_path or type(source).__name__)
        if tokenizer is None:
            tokenizer = _tokenizer(name, name, revision, trust_remote_code)
    else:
        name = str(source)
        where = _resolve(name, say)
        say("loading weights")
        hf = _weights(where, name, _dtype(dtype, target), revision, trust_remote_code)
        hf = hf.to(target).eval()
        if tokenizer is None:
            tokenizer = _tokenizer(where, name, revision, trust_remote_code)
    if isinstance(tokenizer, str | Path):
        tokenizer = _tokenizer(str(tokenizer), str(tokenizer), None, trust_remote_code)
    tokenizer = accepted(tokenizer)
    check_rows(tokenizer, _rows(hf), name)
    say("checking that the parts add up to the logits")
    anatomy, error = examine(hf)
    commit = getattr(hf.config, "_commit_hash", None)
    return Model(hf, tokenizer, anatomy, name, commit or revision, error)


def _rows(hf: PreTrainedModel) -> int:
    """Tokens that have a row in the embedding."""
    return len(hf.get_input_embeddings().weight)


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AMX or AVX512_BF16; ARM with BF16)."""
    return any(_has(feature) for feature in ("amx_tile", "avx512_bf16", "arm_bf16"))


def tiles() -> bool:
    """Whether there is hardware that multiplies tiles of bf16: AMX or CUDA."""
    return torch.cuda.is_available() or _has("amx_tile")


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else native_bf16()
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, DTYPES[_NAMES[name]])


def _resolve(name: str, say: Callable[[str], None]) -> str:
    """The folder or Hugging Face id to load from."""
    if name.startswith("sample:"):
        return str(samples.model_folder(name.removeprefix("sample:"), progress=say))
    path = files.expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"loading a model: there is no file {name}; give the path of a .gguf file")
        return str(samples.gguf_folder(path, progress=say))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"loading a model: the folder {name} has no config.json; give a folder written by save_pretrained"
            )
        return str(path)
    if name.startswith((".", "/", "~")) or path.exists():
        raise ModelError(
            f"loading a model: {name} is not a model folder or a .gguf file; give one of these, "
            "a Hugging Face id, or sample:smollm2-135m"
        )
    return name


def _weights(
    where: str, name: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(where, **options)
        if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
            raise ModelNotSupported(
                f"loading the model {name}: {config.model_type} is not a causal language model (an encoder, an "
                "encoder-decoder or something else); give a decoder that predicts the next token"
            )
        # Weights that are pickles are never read.
        hf, found = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(_unreadable(where, name, error)) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"loading the model {name}: its weights lack {len(missing)} tensors (the first is {missing[0]}), which "
            "would be random; give a complete checkpoint of a causal language model"
        )
    return hf


def _unreadable(where: str, name: str, error: Exception) -> str:
    text = str(error)
    reason = (text.strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in text:
        advice = "it carries code of its own; if you trust it, pass --trust-remote-code"
    elif Path(where).is_dir():
        advice = "the folder must hold config.json, weights as .safetensors, and a tokenizer"
    else:
        advice = (
            "it is neither in the local cache nor reachable; check the id and the network, "
            "or give a local folder, a .gguf file or sample:smollm2-135m"
        )
    return f"loading the model {name}: {reason.rstrip('.')}; {advice}"


def _tokenizer(where: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"loading the tokenizer of {name}: {reason.rstrip('.')}; it must lie beside the weights "
            "(tokenizer.json), or be passed as tokenizer="
        ) from error
