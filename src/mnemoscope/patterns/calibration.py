"""The null distribution of the best score: one Monte-Carlo run shared by all units (Westfall and Young 1993).

A drawn set has the strata of a real one, and in each stratum points drawn evenly, one for each document: what the
triggers of a unit would be if it knew nothing but position and frequency. How small the smallest of a hundred thousand
tails gets depends on those strata and on the number of triggers, so units alike in both share a null.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnemoscope.patterns.columns import Groups
from mnemoscope.patterns.space import Space
from mnemoscope.patterns.topics import k_means

SETS = 25  # units that are worth a null of their own, at least
GROUPS = 24
OF_EXPERT = (
    4  # the same of the units of an expert: with hundreds of experts, drawing takes longer than searching
)
TAIL = 0.05  # share of the draws that the tail beyond them is extrapolated from


@dataclass(frozen=True)
class DrawnNull:
    """Groups of alike units with the scores of their drawn sets.

    group    i64[unit]         the group of each unit
    scores   f64[group, draw]  best log tails of drawn sets, ascending
    """

    group: np.ndarray
    scores: np.ndarray

    def p(self, scores: np.ndarray, units: np.ndarray) -> np.ndarray:
        """f64[case]: chance that a drawn set of the unit's group has a best score as small.

        Counted among the draws, itself among them; below the lowest `TAIL` of them from an exponential fitted to
        that tail, whose rate is at most 1 (a tail probability cannot shrink faster than its tests).
        """
        out = np.ones(len(scores))
        for group in range(len(self.scores)):
            here = np.flatnonzero(self.group[units] == group)
            out[here] = self._p(scores[here], self.scores[group])
        return out

    @staticmethod
    def _p(scores: np.ndarray, null: np.ndarray) -> np.ndarray:
        counted = (1 + np.searchsorted(null, scores, "right")) / (len(null) + 1)
        few = max(int(TAIL * len(null)), 1)
        bound = null[min(few, len(null) - 1)]
        excess = float(np.mean(bound - null[:few]))
        rate = min(1.0, 1 / excess) if excess > 0 else 1.0
        fitted = (1 + few) / (len(null) + 1) * np.exp(np.minimum(rate * (scores - bound), 0))
        return np.where(scores >= 0, 1.0, np.where(scores < bound, np.maximum(fitted, 1e-300), counted))

    def quantile(self, level: float) -> np.ndarray:
        """f64[group]: the p-value of a single test below which a share `level` of the drawn sets has one."""
        return np.exp(np.quantile(self.scores, level, axis=1, method="inverted_cdf"))

    def effective_tests(self, level: float = 0.05) -> np.ndarray:
        """f64[group]: independent tests that would give that quantile (Sidak)."""
        with np.errstate(divide="ignore"):  # where hardly a drawn set shares anything, the quantile is 1
            return np.log1p(-level) / np.log1p(-self.quantile(level))


def grouped(space: Space, slots: np.ndarray, seed: int = 0, most: int = GROUPS) -> np.ndarray:
    """i64[set]: sets with like strata and like numbers of triggers, in at most so many groups."""
    count = int(np.clip(len(slots) // SETS, 1, most))
    if count == 1:
        return np.zeros(len(slots), np.int64)
    profiles = _profiles(space, slots)
    sample = np.random.default_rng(seed).permutation(len(slots))[:8000]
    centres, _ = k_means(profiles[sample], count, seed)
    squares = (centres**2).sum(1)
    nearest = (squares - 2 * profiles @ centres.T.astype(np.float32)).argmin(1)
    return np.unique(nearest, return_inverse=True)[1]


def _profiles(space: Space, slots: np.ndarray) -> np.ndarray:
    """f32[set, feature]: square roots of the shares of positions and of frequencies, how much the triggers crowd
    in few strata, and the octave of their number: what the smallest tail depends on."""
    filled = slots >= 0
    numbers = np.maximum(filled.sum(1), 1)[:, None]
    sets = np.nonzero(filled)[0]
    stratum = space.stratum[slots[filled]]
    parts = [np.sqrt(_counts(sets, bins[stratum], len(slots)) / numbers) for bins in space.margins.T]
    crowd = (_counts(sets, stratum, len(slots)) ** 2).sum(1, keepdims=True) / numbers**2
    return np.concatenate([*parts, 2 * np.sqrt(crowd), np.log2(numbers)], 1).astype(np.float32)


def _counts(sets: np.ndarray, values: np.ndarray, height: int) -> np.ndarray:
    width = int(values.max(initial=0)) + 1
    return np.bincount(sets * width + values, minlength=height * width).reshape(height, width)


def draw(
    space: Space, slots: np.ndarray, random: np.random.Generator, *, one_per_document: bool = True
) -> np.ndarray:
    """i64[set, slot]: points drawn evenly from the stratum of each trigger of `slots`, in different documents.

    A slot for which twenty draws find no new document (a stratum of a few documents) stays empty.
    """
    points = np.flatnonzero(space.drawn)
    strata = Groups(space.stratum[points], np.ones(len(points), bool))
    group_of = strata.find(np.arange(int(space.stratum.max(initial=0)) + 1))
    missing = (slots >= 0) & (group_of[space.stratum[slots]] >= 0)
    out = np.full(slots.shape, -1)
    for _ in range(20):
        sets, slot = np.nonzero(missing)
        if not len(sets):
            break
        group = group_of[space.stratum[slots[sets, slot]]]
        first, size = strata.starts[group], np.diff(strata.starts)[group]
        out[sets, slot] = points[strata.rows[first + (random.random(len(sets)) * size).astype(np.int64)]]
        missing = repeated(space, out) if one_per_document else np.zeros_like(missing)
    out[missing] = -1
    return out


def repeated(space: Space, slots: np.ndarray) -> np.ndarray:
    """bool[set, slot]: whether an earlier slot of the set is of the same document."""
    document = np.where(slots >= 0, space.document[slots], -1 - np.arange(slots.shape[1]))
    order = np.argsort(document, 1, kind="stable")
    ordered = np.take_along_axis(document, order, 1)
    again = np.zeros(slots.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.zeros(slots.shape, bool)
    np.put_along_axis(out, order, again, 1)
    return out
