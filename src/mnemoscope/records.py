"""The nouns that cross modules: the address of a neuron, a batch of contexts, a run's manifest.

Axis legend, used in every shape annotation of the project:

    context    sequences in a batch
    token      positions in a sequence, 0-based, padding included
    neuron     memory cells of one layer
    layer      blocks of the model
    width      the residual stream (d_model)
    vocabulary tokens of the tokenizer (rows of the unembedding)
    head       attention heads (query heads)
    source     positions that are attended to
    rank       places in a top-k list, 0-based
    bin        histogram bins

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from mnemoscope.errors import QueryError

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 2  # of a run: what its tables and their columns are called and mean

NEURON = "neuron"  # the kind of unit that is none of `NULLS`
NULLS = {  # the kinds of pseudo-neurons, as readers are told of them
    "random": "random directions",
    "rotated": "rotated axes",
    "shuffled": "neurons of a model with shuffled weights",
    "chimera": "chimeras (the gate of one neuron, the up of another)",
    "covariance": "directions drawn within the covariance of the keys",
}
UNIT_POINTS = {  # where units that are not neurons read and write, as readers are told of them
    "residual_in": "the residual stream before layer {}",
    "residual_mid": "the residual stream before the FFN of layer {}",
    "residual_out": "the residual stream after layer {}",
    "attention_output": "what the attention of layer {} writes",
    "ffn_input": "what the FFN of layer {} reads",
    "ffn_norm": "the residual stream before the FFN of layer {}, normalised",
    "ffn_output": "what the FFN of layer {} writes",
}
UNIT_KINDS = {"sae": "sparse autoencoder", "transcoder": "transcoder", "directions": "directions"}
MAIN, NEXT, POSITION, WHOLE = "main", "next", "position", "whole"  # families of tests, never in one p-value

_NUMBER = r"(\d{1,18})"  # 64 bits hold it
_IN_EXPERT = re.compile(rf"\s*[Ll]{_NUMBER}[Ee]{_NUMBER}[Nn]{_NUMBER}\s*")
_ADDRESS = re.compile(rf"\s*[Ll]?{_NUMBER}\s*[./_Nn]\s*[Nn]?{_NUMBER}\s*")
# TransformerLens names the activations of a layer, and an index picks one: hook_post.366, hook_post[:, :, 366].
_HOOKED = re.compile(
    rf"\s*blocks\.{_NUMBER}\.mlp\.hook_(?:pre|pre_linear|post)(?:\.|\[(?:[:.\s]+,)*\s*){_NUMBER}\s*\]?\s*"
)


class NeuronId(NamedTuple):
    """One memory cell, addressed by layer and neuron (both 0-based); prints as ``L13N366``."""

    layer: int
    neuron: int

    def __str__(self) -> str:
        return f"L{self.layer}N{self.neuron}"

    @classmethod
    def parse(cls, text: str) -> NeuronId:
        """Read ``L13N366``, ``13.366``, ``13/366``, ``13_366``, ``L13.N366``, or the name that TransformerLens has for
        it, ``blocks.13.mlp.hook_post.366``; else `QueryError`."""
        match = _ADDRESS.fullmatch(text) or _HOOKED.fullmatch(text)
        if match is None:
            raise QueryError(
                f"reading a neuron's address: {text!r} is not an address; write L13N366 "
                "(or 13.366, 13/366, 13_366, blocks.13.mlp.hook_post.366; in a mixture of experts L13E5N366)"
            )
        return cls(int(match[1]), int(match[2]))


def check_address(text: str) -> None:
    """QueryError for what is no address of a neuron in any model."""
    if not _IN_EXPERT.fullmatch(text):
        NeuronId.parse(text)


class ExpertNeuronId(NeuronId):
    """A neuron in a layer of experts: its number there as of any, and printed as ``L13E5N366``."""

    _experts: tuple[int, int]

    @classmethod
    def of(cls, layer: int, neuron: int, experts: tuple[int, int]) -> ExpertNeuronId:
        """The address of a neuron where there are so many experts of so many neurons."""
        address = cls(layer, neuron)
        address._experts = experts
        return address

    @property
    def expert(self) -> int:
        """The expert, 0-based; the shared one, if there is any, comes after the last."""
        count, width = self._experts
        return min(self.neuron // width, count)

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}N{self.neuron - self.expert * self._experts[1]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of, (self.layer, self.neuron, self._experts)


@dataclass(frozen=True)
class Cells:
    """The units of layers that may differ in width, numbered through: those of layer 0 first.

    sizes    units of each layer; 0 where it has none
    experts  of each layer how many are routed to, and the neurons of one; (0, 0) where it has none. () if all have none
    """

    sizes: tuple[int, ...]
    experts: tuple[tuple[int, int], ...] = ()

    @cached_property
    def offsets(self) -> np.ndarray:
        """i64[layer + 1]: the number of each layer's first unit, and how many there are in all."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have units."""
        return tuple(layer for layer, size in enumerate(self.sizes) if size)

    @property
    def alike(self) -> int | None:
        """Units of every layer; None where layers differ."""
        return self.sizes[0] if len(set(self.sizes)) == 1 else None

    def of(self, layer: int) -> slice:
        """The numbers of one layer's units."""
        return slice(int(self.offsets[layer]), int(self.offsets[layer + 1]))

    def cell(self, layer: Any, neuron: Any) -> Any:
        """The number of a unit, or i64 numbers of many (arrays or columns of equal length)."""
        return self.offsets[np.asarray(layer, np.int64)] + np.asarray(neuron, np.int64)

    def layer(self, cell: Any) -> np.ndarray:
        """i64: the layer of each number."""
        if self.alike:
            return np.asarray(cell, np.int64) // self.alike
        return np.searchsorted(self.offsets, cell, side="right") - 1

    def place(self, cell: Any) -> tuple[np.ndarray, np.ndarray]:
        """i64 layers and neurons of numbers: `cell` undone."""
        layer = self.layer(cell)
        return layer, np.asarray(cell, np.int64) - self.offsets[layer]

    def each(self) -> np.ndarray:
        """i64[cell]: the layer of every unit."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def among(self, cell: Any) -> np.ndarray:
        """i64: ascending, the same number for neurons that run on the same tokens: a layer's, or an expert's."""
        if not self.experts:
            return self.layer(cell)
        routed = [(width,) * count for count, width in self.experts]
        sizes = [size for of_layer, all_of in zip(routed, self.sizes, strict=True)
                 for size in (*of_layer, all_of - sum(of_layer))]  # fmt: skip
        return np.searchsorted(np.cumsum(sizes), cell, side="right")

    @property
    def together(self) -> str:
        """What such neurons are called."""
        return "expert" if self.experts else "layer"

    def column(self) -> pl.Expr:
        """`cell` of the rows of a table by (layer, neuron).

        Joins and groups over millions of rows are several times faster on one integer than on two columns.
        """
        import polars as pl

        layer, size = pl.col("layer").cast(pl.Int64), self.alike
        first = (
            layer * size
            if size is not None
            else layer.replace_strict(
                list(range(len(self.sizes))), self.offsets[:-1].tolist(), return_dtype=pl.Int64
            )
        )
        return (first + pl.col("neuron")).alias("cell")

    def side(self) -> pl.Expr:
        """`side` of the rows of a table by (layer, neuron, polarity): twice the cell, and one more for polarity -1."""
        import polars as pl

        return (self.column() * 2 + (pl.col("polarity") < 0)).alias("side")

    def has(self, layer: int, neuron: int) -> bool:
        """Whether there is such a unit."""
        return 0 <= layer < len(self.sizes) and 0 <= neuron < self.sizes[layer]

    def id(self, layer: int, neuron: int) -> NeuronId:
        """The address of a unit, which prints with its expert where there are any."""
        experts = self.experts[layer] if 0 <= layer < len(self.experts) else (0, 0)
        return ExpertNeuronId.of(layer, neuron, experts) if experts[0] else NeuronId(layer, neuron)

    def parse(self, text: str) -> NeuronId:
        """Read an address as `NeuronId.parse` does, or ``L13E5N366``: neuron 366 of expert 5.

        QueryError where there is no such expert, or none at all; whether there is such a layer is for `has` to say.
        """
        match = _IN_EXPERT.fullmatch(text)
        if match is None:
            return self.id(*NeuronId.parse(text))
        layer, expert, neuron = (int(number) for number in match.groups())
        count, width = self.experts[layer] if layer < len(self.experts) else (0, 0)
        if not count:
            where = f"layer {layer} has no experts" if layer < len(self.sizes) else self.range_of(layer)
            raise QueryError(
                f"looking up {text.strip()}: {where}; give layer and neuron, as L{layer}N{neuron}"
            )
        shared = self.sizes[layer] - count * width
        inside = width if expert < count else shared if expert == count else 0
        if neuron >= inside:
            last = count if shared else count - 1
            has = f"neurons 0 to {inside - 1}" if inside else f"experts 0 to {last}"
            place = f"expert {expert} of layer {layer}" if inside else f"layer {layer}"
            raise QueryError(f"looking up {text.strip()}: out of range; {place} has {has}")
        return self.id(layer, expert * width + neuron)

    @property
    def spelled(self) -> str:
        """How many units a layer has, in words."""
        low, high = min(self.sizes), max(self.sizes)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    def range_of(self, layer: int) -> str:
        """Which addresses there are, in words, for somebody who asked for one that is not."""
        layers = f"layers 0 to {len(self.sizes) - 1}"
        if self.alike is not None:
            return f"{layers} and neurons 0 to {self.alike - 1}"
        if not 0 <= layer < len(self.sizes):
            return layers
        size = self.sizes[layer]
        return f"neurons 0 to {size - 1} in layer {layer}" if size else f"no neurons in layer {layer}"


@dataclass(frozen=True)
class ContextBatch:
    """Right-padded contexts that go through the model as one unit.

    contexts  i64[context]         id of each context in the run
    tokens    i32[context, token]  right-padded with the last token of each context (`padded`)
    lengths   i32[context]         true lengths, at least 1
    counted   bool[context, token] positions that count: not padding, not position 0, not a special token
    targets   of an encoder-decoder, what its decoder reads beside each context, which its encoder reads
    """

    contexts: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    counted: np.ndarray
    targets: ContextBatch | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.lengths.sum()) + (0 if self.targets is None else self.targets.n_tokens)


def padded(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """i32[context, token] and i32[context] lengths: each sequence, filled up with its own last token.

    Not with a token of the vocabulary's choosing, whose embedding may hold anything: a causal model does not look
    ahead, but a product with NaN is NaN however small the weight.
    """
    lengths = np.array([len(one) for one in sequences], np.int32)
    tokens = np.empty((len(sequences), int(lengths.max())), np.int32)
    for row, one in enumerate(sequences):
        tokens[row, : len(one)], tokens[row, len(one) :] = one, one[-1]
    return tokens, lengths


def other_format(found: int, read: int, remedy: str) -> str:
    """Why what has the format `found` cannot be read, and what to do: the remedy is for an older one than `read`."""
    age, advice = ("an older", remedy) if found < read else ("a newer", "upgrade mnemoscope")
    return f"it was written by {age} version of mnemoscope (format {found}; this one reads {read}); {advice}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableEntry(_Strict):
    """What the manifest knows of one table."""

    rows: int
    bytes: int
    sha256: str


class AdapterEntry(_Strict):
    """Which adapter was merged into a model."""

    id: str  # as it was given
    path: str | None = None  # of a local folder, absolute
    revision: str | None = None  # commit of one from Hugging Face
    kind: str  # LORA, IA3 ...
    sha256: str  # of its weights
    base: str  # the id of the model that it was merged into


class UnitsEntry(_Strict):
    """Which units a run holds that are not neurons; the table `units` says of each layer what they are."""

    id: str
    kind: str  # sae, transcoder or directions
    path: str | None = None  # of a local folder or file, absolute
    revision: str | None = None
    sha256: str  # over all weights, and where they belong
    names: dict[str, list[str]] = {}  # of each layer (by its number) what its units are called, if anything


class ModelEntry(_Strict):
    """Which model a run was built from."""

    id: str
    path: str | None = None  # of a local folder or file, absolute; None for other models
    revision: str | None = None
    family: str
    weights_sha256: str
    tokenizer_sha256: str
    layers: int
    neurons: int | list[int]  # of each layer; one number where layers are alike
    width: int
    vocabulary: int
    gated: bool
    activation: str
    context_length: int
    self_check: float  # largest error of the rebuilt logits, as a share of their range
    unused: list[str] = []  # what of the checkpoint was not loaded, a line for each kind
    bidirectional: bool = False  # an encoder: each position has read the whole context
    encoder_layers: int = 0  # of an encoder-decoder: the first layers, which are the encoder's; else 0
    readout: str = (
        "head"  # what values are read through: its head, or the input embedding of a model without one
    )

    units: UnitsEntry | None = None  # units that are not the neurons of its FFN

    experts: list[tuple[int, int]] = []  # of each layer: how many, and neurons of one; empty in a dense model
    adapter: AdapterEntry | None = None  # merged into it, and named in `id`
    packed: list[str] = []  # classes of linear modules that hold their weights packed

    @property
    def base(self) -> str:
        """The id of the model itself, without an adapter."""
        return self.id if self.adapter is None else self.adapter.base

    @property
    def sizes(self) -> tuple[int, ...]:
        """Neurons of each layer."""
        return (self.neurons,) * self.layers if isinstance(self.neurons, int) else tuple(self.neurons)

    def in_encoder(self, layer: int) -> bool:
        """Whether the positions of a layer have read the whole context."""
        return self.bidirectional or layer < self.encoder_layers

    def stack(self, layer: int) -> str | None:
        """Of an encoder-decoder the stack that a layer is in: encoder or decoder."""
        return None if not self.encoder_layers else "encoder" if layer < self.encoder_layers else "decoder"

    @cached_property
    def cells(self) -> Cells:
        """The neurons numbered through."""
        return Cells(self.sizes, tuple(self.experts))


class CorpusEntry(_Strict):
    """Which text a run was built from."""

    id: str
    sha256: str  # over the token ids of all contexts, in order
    source: dict[str, Any]  # files with their hashes, or a data set with its fingerprint
    segment: str
    limit: int | None
    documents: int
    contexts: int
    duplicates: int  # contexts left out because their tokens had been seen
    tokens: int  # in the contexts
    counted: int  # tokens that count (see `excluded`)
    target: str | None = None  # column of what decoders read: contexts alternate, source and target
    spelling: str = (
        ""  # in what the text of the tokens differs from the text that was read; empty if in nothing
    )


class Manifest(_Strict):
    """Everything needed to reproduce a run, and to check that its files are whole."""

    schema_version: int
    created: str
    mnemoscope: str
    model: ModelEntry
    corpus: CorpusEntry
    options: dict[str, Any]
    excluded: list[str]
    environment: dict[str, str]
    tables: dict[str, TableEntry]


@dataclass(frozen=True)
class Kept:
    """One thing in the cache folder: its kind (`text.cache.KINDS`), what it is, its size in bytes, where it lies."""

    kind: str
    what: str
    bytes: int
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"path": str(self.path)}


class Progress(NamedTuple):
    """How far a stage of a job has come; jobs hand it to a callback, edges draw it. `total` is 0 while unknown, `note`
    something to say once, and `after` about how many seconds the stages take that follow, as far as it is known."""

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""
    after: float = 0.0
