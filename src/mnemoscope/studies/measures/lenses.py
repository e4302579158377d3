"""A lens as one linear map and what follows it, so that the sum of two vectors is read from the readings of each.

Under every lens the logits of v are ``cap(s(v) A v + c)``: A is the centred, weighted unembedding, s the statistic of
the final norm and c what its biases add. A is the costly half, and ``A (r + y) = A r + A y``.
"""

from __future__ import annotations

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
        """Of the lens."""
        return self.lens.name

    def linear(self, vectors: Float[Tensor, "row width"]) -> Float[Tensor, "row vocabulary"]:
        """A v: additive."""
        norm = None if self.lens.name == "raw" else self.lens.norm
        if norm is not None:
            vectors = norm.linear(vectors, vectors.new_ones(1))
        table = self.lens.unembedding
        scores = vectors.new_empty(len(vectors), len(table))
        for start in range(0, len(table), _TOKENS):
            part = slice(start, start + _TOKENS)
            torch.mm(vectors, table[part].T, out=scores[:, part])
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
        found = []
        with torch.inference_mode():
            for part in model.anatomy.layers:
                tokens = [self._both(tile) for tile in value_vectors(part).split(_TILE)]
                found.append(torch.cat(tokens))
        return torch.stack(found).to(torch.int32)

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
