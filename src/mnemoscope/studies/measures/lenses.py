"""What the last token of a prefix goes through (`points`), and its reading in vocabulary space (`Reader`).

A lens is one linear map and what follows it, so that the sum of two vectors is read from the readings of each.

Under every lens the logits of v are ``cap(s(v) A v + c)``: A is the centred, weighted unembedding, s the statistic of
the final norm and c what its biases add. A is the costly half, and ``A (r + y) = A r + A y``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope import files
from mnemoscope.mine.values import value_vectors
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Norm
from mnemoscope.model.watch import hooked, watch
from mnemoscope.records import ContextBatch
from mnemoscope.run.reading import Run

_TILE = 64  # values read at once: their logits stay near the cache
_TOKENS = 1024  # of the unembedding at once: a third faster than all in one product


class Reader:
    """Reads points of the stream (r, o), and parts of it (y, values), in vocabulary space.

    Under raw and frozen the biases of the final norm and the unembedding belong to points and not to parts, which are
    then additive; under own every reading has them (docs/methods.md, G3).
    """

    def __init__(self, model: Model, lens: str) -> None:
        self.lens = Lens.of(model.anatomy, lens)
        offset = self.lens.offset
        self.offset: Float[Tensor, " vocabulary"] | None = offset if bool(offset.any()) else None

    @property
    def name(self) -> str:
        """The name of the lens."""
        return self.lens.name

    def linear(self, vectors: Float[Tensor, "row width"]) -> Float[Tensor, "row vocabulary"]:
        """A v: additive."""
        norm = None if self.lens.name == "raw" else self.lens.norm
        if norm is not None:
            vectors = norm.linear(vectors, vectors.new_ones(1))
        table = self.lens.unembedding
        scores = vectors.new_empty(len(vectors), len(table))
        for start in range(0, len(table), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            torch.mm(vectors, table[tokens].T, out=scores[:, tokens])
        return scores if self.lens.multiplier == 1.0 else scores.mul_(self.lens.multiplier)

    def scale(
        self, vectors: Float[Tensor, "row width"], final: Float[Tensor, "row width"]
    ) -> Float[Tensor, "row 1"]:
        """s(v): of the vectors themselves under own, of the final residuals under frozen, 1 under raw."""
        if self.lens.name == "raw":
            return vectors.new_ones(len(vectors), 1)
        return self.lens.scale(vectors if self.lens.name == "own" else final)

    def point(
        self, linear: Float[Tensor, "row vocabulary"], scale: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Logits of points of the stream."""
        scores = linear * scale
        return self.lens.cap(scores if self.offset is None else scores.add_(self.offset))

    def part(
        self, linear: Float[Tensor, "row vocabulary"], scale: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Logits of parts of it."""
        return self.point(linear, scale) if self.lens.name == "own" else linear * scale

    def tops(self, model: Model) -> Int[Tensor, "layer neuron side"]:
        """The token that each value promotes most, alone, with a positive (side 0) and a negative coefficient.

        The size of the coefficient is no matter: the own lens removes it, and raw and frozen are linear.
        """
        layers = []
        with torch.inference_mode():
            for layer in model.anatomy.layers:
                tokens = [self._both(tile) for tile in value_vectors(layer).split(_TILE)]
                layers.append(torch.cat(tokens))
        return torch.stack(layers).to(torch.int32)

    def _both(self, vectors: Float[Tensor, "row width"]) -> Int[Tensor, "row side"]:
        linear, scale = self.linear(vectors), self.scale(vectors, vectors)
        if self.offset is None:
            return torch.stack([linear.argmax(-1), linear.argmin(-1)], -1)
        return torch.stack([self.part(side, scale).argmax(-1) for side in (linear, -linear)], -1)


def value_tops(
    run: Run | None, model: Model, reader: Reader, folder: Path
) -> Int[Tensor, "layer neuron side"]:
    """`Reader.tops`, from a run that has them, and otherwise kept in the folder."""
    if run is not None and reader.name == "own" and reader.offset is None:
        rows = run.table("values").filter(pl.col("rank") == 0).select("token").collect()
        shape = (model.anatomy.n_layers, model.anatomy.n_neurons, 2)
        return torch.from_numpy(rows["token"].to_numpy().copy().reshape(shape)).to(model.device)
    file = folder / f"tops-{reader.name}.npy"
    if not file.exists():
        with files.replacing(file, "reading values: writing") as partial, partial.open("wb") as stream:
            np.save(stream, reader.tops(model).cpu().numpy())
    return torch.from_numpy(np.load(file)).to(model.device)


# -- What the last token of each prefix goes through: residuals, feed-forward outputs, coefficients of every layer ---

_POINTS = ("lin", "attention_output", "coefficients", "ffn_output")


@dataclass(frozen=True, eq=False)
class Points:
    """The last position of some prefixes, in fp32.

    residual      r: the stream that the feed-forward output is added to (Lres; in parallel blocks Lin + attention, G5)
    ffn           y: what is added, with biases, post-norm and multiplier (A17, A20)
    coefficients  m: the input of the down projection
    """

    residual: Float[Tensor, "context layer width"]
    ffn: Float[Tensor, "context layer width"]
    coefficients: Float[Tensor, "context layer neuron"]

    @property
    def output(self) -> Float[Tensor, "context layer width"]:
        """o = r + y (Lout)."""
        return self.residual + self.ffn

    @classmethod
    def joined(cls, parts: list[Points], order: np.ndarray) -> Points:
        """Several as one, its rows in this order."""
        index = torch.from_numpy(order.astype(np.int64)).to(parts[0].ffn.device)
        names = ("residual", "ffn", "coefficients")
        return cls(*(torch.cat([getattr(part, name) for part in parts])[index] for name in names))


def points(model: Model, batch: ContextBatch) -> Points:
    """One forward pass over right-padded prefixes, looked at where each ends."""
    parts, shape = model.anatomy, batch.tokens.shape
    rows = torch.arange(len(batch.lengths), device=model.device)
    ends = torch.from_numpy(batch.lengths.astype(np.int64) - 1).to(model.device)
    seen: dict[str, list[Float[Tensor, "context width"]]] = {point: [] for point in _POINTS}

    def keep(point: str, x: Tensor) -> None:
        # OPT flattens contexts and tokens into one axis; indexing copies, and Falcon adds to its FFN's output in place.
        seen[point].append(x.detach().reshape(*shape, -1)[rows, ends].float())

    def added(outputs: list[Tensor], norms: list[Norm | None]) -> list[Float[Tensor, "context width"]]:
        """What a projection wrote in each layer, as it is added to the stream."""
        normed = (x if norm is None else norm(x) for x, norm in zip(outputs, norms, strict=True))
        return [x * parts.residual_multiplier for x in normed]

    tokens = torch.from_numpy(batch.tokens).to(model.device, torch.int64)
    handles = [handle for layer in parts.layers for handle in watch(layer, _POINTS, keep)]
    with model.running(), hooked(handles), torch.inference_mode():
        parts.body(input_ids=tokens, use_cache=False)
        attended = added(seen["attention_output"], [layer.post_attention_norm for layer in parts.layers])
        residual = [stream + update for stream, update in zip(seen["lin"], attended, strict=True)]
        ffn = added(seen["ffn_output"], [layer.post_ffn_norm for layer in parts.layers])
        return Points(*(torch.stack(by_layer, 1) for by_layer in (residual, ffn, seen["coefficients"])))
