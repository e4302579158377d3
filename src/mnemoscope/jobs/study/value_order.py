"""Where a token stands in every value of a layer, without reading the layer's values again for each token (A44).

A value's logits are sorted once and looked at in a few places (*marks*): ranks near both ends, then further and further
apart. The logit of any token falls between two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope import files
from mnemoscope.accumulate.reading import share_out
from mnemoscope.anatomy import Layer
from mnemoscope.jobs.values import written
from mnemoscope.lens import Lens

EVERY = 64  # ranks from either end that are all marked
_STEP = 1.1  # of ranks beyond: they are known to within a tenth
_TILE = 64  # values read at once
_NOTHING = 1e-6  # by how much the same logit may differ between two sums in fp32, relative to the largest


def marked(vocabulary: int) -> np.ndarray:
    """i64[mark], ascending: ranks that are marked, as many from below as from above."""
    if vocabulary <= EVERY:
        return np.arange(vocabulary)
    near = [*range(EVERY)]
    while near[-1] * _STEP < vocabulary / 2:
        near.append(int(np.ceil(near[-1] * _STEP)))
    near.append(vocabulary // 2)
    return np.unique([*near, *(vocabulary - 1 - rank for rank in near)])


@dataclass(frozen=True, eq=False)
class Order:
    """The values of one layer, each of unit length under the lens and without its biases.

    marks  logits at the ranks `marked`, descending
    """

    lens: Lens
    marks: Float[Tensor, "neuron mark"]
    ranks: Int[Tensor, " mark"]

    @classmethod
    def of(cls, lens: Lens, part: Layer, file: Path) -> Order:
        """Read once and kept in the file."""
        places = marked(lens.unembedding.shape[0])
        if not file.exists():
            with files.replacing(file, "reading values: writing") as partial, partial.open("wb") as stream:
                np.save(stream, _sorted(lens, part, places))
        return cls(lens, torch.from_numpy(np.load(file)), torch.from_numpy(places))

    def rank(
        self, vectors: Float[Tensor, "neuron width"], negative: Tensor, token: int
    ) -> Float[Tensor, " neuron"]:
        """How many tokens score higher than this one under what each neuron writes; between marks, about so many.

        vectors   what every neuron of the layer writes; nothing gives no rank (infinity)
        negative  bool[neuron]: with a coefficient below 0, that is its value upside down
        """
        unit = _unit(self.lens, vectors)
        score = unit @ self.lens.unembedding[token]
        marks = torch.where(negative[:, None], -self.marks.flip(-1), self.marks)
        slack = _NOTHING * self.marks.abs().amax(-1)
        above = (marks > (score + slack)[:, None]).sum(-1).clamp(max=len(self.ranks) - 1)
        right, left = self.ranks[above].float(), self.ranks[(above - 1).clamp_min(0)].float()
        high, low = (marks.gather(-1, place[:, None])[:, 0] for place in ((above - 1).clamp_min(0), above))
        part = ((high - score) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        between = torch.where(right - left <= 1, right, left + part * (right - left))
        return torch.where(unit.abs().amax(-1) > 0, between, torch.inf)


def _sorted(lens: Lens, part: Layer, places: np.ndarray) -> np.ndarray:
    """f32[neuron, mark]"""
    found = []
    for tile in _unit(lens, written(part)).split(_TILE):
        scores = (tile @ lens.unembedding.T).cpu().numpy()
        share_out(lambda row: scores[row].sort(), range(len(scores)))  # noqa: B023
        found.append(scores[:, scores.shape[1] - 1 - places])
    return np.concatenate(found)


def _unit(lens: Lens, vectors: Tensor) -> Tensor:
    """As the unembedding reads them, up to the lens's scale: ranks need no more."""
    if lens.name != "raw" and lens.norm is not None:
        vectors = lens.norm.linear(vectors, vectors.new_ones(1))
    sign = -1.0 if lens.multiplier < 0 else 1.0
    return vectors * (sign / vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30))
