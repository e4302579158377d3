"""What is known of the contribution of every part: certified intervals, exact where a part is among the extremes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.contributions.bases import Bases, norms
from mnemoscope.contributions.bounds import Seen, kinds_of
from mnemoscope.contributions.search import STAGES, contested


@dataclass(frozen=True, eq=False)
class Intervals:
    """In which each part's contribution certainly lies; nats, fp64; both ends are the value where it is exact."""

    low: Float[Tensor, " part"]
    high: Float[Tensor, " part"]

    @property
    def middle(self) -> Float[Tensor, " part"]:
        """The exact value, where it is known, and else what is off by half of the interval at most."""
        return (self.low + self.high) / 2

    @property
    def signs(self) -> Int[Tensor, " part"]:
        """+1 helpful, -1 unhelpful (A47); 0 where the part is nothing, or the interval holds both signs."""
        return (self.low > 0).int() - (self.high < 0).int()

    def moved(self, by: Float[Tensor, " part"]) -> Intervals:
        """For another token whose logit each part moves by so much more than the target's.

        ``C(v) = delta_w - log sum_j p_j exp(delta_j)``, and only the first term knows the target.
        """
        return Intervals(self.low + by, self.high + by)


class Survey:
    """Ready to survey parts that are added to residuals: tokens are chosen once for all of them.

    Every part is evaluated on the most probable tokens; those whose sign is open then, and those that may be among the
    k largest or smallest of their group, on more; the latter on all. So the extremes are exact, as `search` finds them.
    """

    def __init__(self, bases: Bases, k: int) -> None:
        size = bases.lens.unembedding.shape[0]
        self._bases, self._k = bases, k
        # Bounds hold for logits that are linear in a direction: a soft cap leaves nothing but evaluation.
        capped = bases.lens.softcap is not None
        self._stages = [] if capped else [Seen.of(bases, min(count, size // 2)) for count in STAGES]

    def __call__(self, vectors: Float[Tensor, "part width"], base: int) -> Intervals:
        """Of all parts of one group, added to a row of the bases."""
        ends = torch.zeros(len(vectors), 2, dtype=torch.float64)
        ends[norms(vectors) > 0] = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
        for stage in self._stages:
            still = (contested(ends[:, None], self._k) | (ends[:, 0] * ends[:, 1] < 0)).nonzero()[:, 0]
            if len(still):
                some = stage.intervals(vectors[still], torch.full_like(still, base), kinds_of(None))[:, 0]
                ends[still, 0] = torch.maximum(ends[still, 0], some[:, 0])
                ends[still, 1] = torch.minimum(ends[still, 1], some[:, 1])
        rows = (contested(ends[:, None], self._k) & (ends[:, 0] < ends[:, 1])).nonzero()[:, 0]
        if len(rows):
            ends[rows] = self._bases.contributions(vectors[rows], torch.full_like(rows, base))[:, None]
        return Intervals(ends[:, 0], ends[:, 1])
