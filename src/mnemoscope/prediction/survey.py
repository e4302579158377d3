"""Certified intervals of the increase of every part, exact where a part is among the extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.prediction.bases import ResidualBases, norms
from mnemoscope.prediction.bounds import PartialVocabulary
from mnemoscope.prediction.search import Parts, contested

# Tokens evaluated before everything is. All parts see the first: a search may begin with fewer, because nobody asks it
# for signs, and for those of other targets, too.
_STAGES = (384, 4096)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Where each part's increase certainly lies; nats, fp64; both ends are the value where that is exact.

    likely  the exact value, where it is known, and else an estimate inside of the interval: sums of it come within a
            few hundredths of the exact ones, where sums of middles are off by up to a half (docs/log.md, 2026-11-25)
    """

    low: Float[Tensor, " part"]
    high: Float[Tensor, " part"]
    likely: Float[Tensor, " part"]

    @property
    def signs(self) -> Int[Tensor, " part"]:
        """+1 helpful, -1 unhelpful (A47); 0 where the part is nothing, or the interval holds both signs."""
        return (self.low > 0).int() - (self.high < 0).int()

    def moved(self, by: Float[Tensor, " part"]) -> Intervals:
        """For another token whose logit each part moves by so much more than the target's.

        ``C(v) = delta_w - log sum_j p_j exp(delta_j)``, and only the first term knows the target.
        """
        return Intervals(self.low + by, self.high + by, self.likely + by)


class IntervalSurvey:
    """A survey of parts that are added to residuals; its tokens are chosen once for all of them.

    Every part is evaluated on the most probable tokens; those whose sign is open then, and those that may be among the
    k largest or smallest of their group, on more; the latter on all. So the extremes are exact, as `search` finds them.
    """

    def __init__(self, bases: ResidualBases, k: int) -> None:
        size = bases.lens.unembedding.shape[0]
        self._bases, self._k = bases, k
        # Bounds hold for logits that are linear in a direction: a soft cap leaves nothing but evaluation.
        capped = bases.lens.softcap is not None
        self._stages = (
            [] if capped else [PartialVocabulary.of(bases, min(count, size // 2)) for count in _STAGES]
        )

    def __call__(
        self, groups: Sequence[Parts], quotients: Sequence[Float[Tensor, " part"]] | None = None
    ) -> list[Intervals]:
        """Intervals of all parts of each group.

        quotients  `Geometry.quotient` of the directions of each group's parts, where it is known
        """
        known_quotients: Sequence[Tensor | None] = quotients or [None] * len(groups)
        bounds = [
            self._bounded(group, quotient) for group, quotient in zip(groups, known_quotients, strict=True)
        ]
        rows = [
            (contested(ends[:, None, :2], self._k) & (ends[:, 0] < ends[:, 1])).nonzero()[:, 0]
            for ends in bounds
        ]
        # All groups together: few rows at a time would read the unembedding once for each group.
        pairs = list(zip(groups, rows, strict=True))
        vectors = torch.cat([group.vectors(index) for group, index in pairs])
        base = torch.cat([torch.full_like(index, group.base) for group, index in pairs])
        values = self._bases.increases(vectors, base).split([len(index) for index in rows])
        for ends, index, exact in zip(bounds, rows, values, strict=True):
            ends[index] = exact[:, None]
        return [Intervals(*ends.unbind(-1)) for ends in bounds]

    def _bounded(self, group: Parts, quotient: Tensor | None) -> Float[Tensor, "part 3"]:
        """Both ends and the estimate, from some of the tokens."""
        vectors = group.vectors(None)
        ends = torch.zeros(len(vectors), 3, dtype=torch.float64)
        ends[norms(vectors) > 0] = torch.tensor([-torch.inf, torch.inf, 0.0], dtype=torch.float64)
        for vocabulary in self._stages:
            rows = (contested(ends[:, None, :2], self._k) | (ends[:, 0] * ends[:, 1] < 0)).nonzero()[:, 0]
            if len(rows):
                chosen = vectors if len(rows) == len(vectors) else vectors[rows]
                known_quotient = None if quotient is None else quotient[rows]
                bounds = vocabulary.surveyed(chosen, torch.full_like(rows, group.base), known_quotient)
                low = torch.maximum(ends[rows, 0], bounds[:, 0])
                high = torch.minimum(ends[rows, 1], bounds[:, 1])
                likely = torch.minimum(torch.maximum(bounds[:, 2], low), high)
                ends[rows] = torch.stack([low, high, likely], -1)
        return ends
