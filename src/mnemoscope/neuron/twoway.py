"""The two-way test: does active mean the pattern, and does the pattern mean active? (A72, A74)

Arrays say what a unit and a pattern do together; the last axis of a histogram is its bins, any axes before it are
units. A *score* is the coefficient times the polarity of the unit, so that active is always "at or above".

    Curve(present, absent)         precision, recall, F1, IoU at every threshold; average precision, information
    pearson(...)                   from exact sums, not from bins
    resampled(...)                 intervals: documents are what is drawn again
    verdicts(...)                  which of the two directions hold, and whether more than chance holds

Headline figures are F1, average precision, Pearson and IoU: figures that a constant answer or a random pattern
cannot win (NeuronEval, 2025). Precision, P(pattern | active), and recall,
P(active | pattern), are shown beside F1 as the two sides of the claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mnemoscope.intervals import Interval, draws, of_share, ratio

IFF, ACTIVE_PATTERN, PATTERN_ACTIVE = "iff", "active -> pattern", "pattern -> active"
NEITHER, NONE = "neither", "no pattern above the null"
VERDICTS = (IFF, ACTIVE_PATTERN, PATTERN_ACTIVE, NEITHER, NONE)

RESAMPLES = 1_000
LEAST_DOCUMENTS = 5  # in which a unit must be active: an interval over fewer documents says nothing
MARGIN = 0.01  # of F1 beyond chance: candidates closer than that are as good, and the plainest of them is the claim
NULL_LEVEL = 0.99  # the quantile of the null's F1 that the lower end of a unit's F1 has to exceed


@dataclass(frozen=True)
class Rule:
    """What a verdict requires.

    least  of precision, and of recall, at the lower end of its interval: then that direction holds
    q      false discovery rate at which a pattern counts as confirmed on held-out triggers
    fdr    rate of false discoveries among neurons that beat decoys of their own, in a run that has these
    """

    least: float = 0.5
    q: float = 0.05
    fdr: float = 0.1


def oriented(counts: np.ndarray, polarity: int) -> np.ndarray:
    """[..., bin]: a histogram of the coefficient as one of the score, ascending in it."""
    return counts if polarity > 0 else counts[..., ::-1]


def folded(counts: np.ndarray) -> np.ndarray:
    """[..., (bins + 1) / 2]: a histogram of the coefficient as one of its magnitude (both signs are active)."""
    middle = counts.shape[-1] // 2
    sides = counts[..., middle:].copy()
    sides[..., 1:] += counts[..., :middle][..., ::-1]
    return sides


@dataclass(frozen=True)
class Curve:
    """Counts of a score where the pattern is present and where it is absent, and what follows at every threshold.

    present, absent  i64[..., bin]  ascending in the score; a place of the curve calls a token active whose score
                                    lies in that bin or in a higher one
    """

    present: np.ndarray
    absent: np.ndarray

    @cached_property
    def both(self) -> np.ndarray:
        """[..., bin]: tokens that are active and show the pattern."""
        return _above(self.present)

    @cached_property
    def active(self) -> np.ndarray:
        """[..., bin]: tokens that are active."""
        return self.both + _above(self.absent)

    @cached_property
    def shown(self) -> np.ndarray:
        """[..., 1]: tokens that show the pattern."""
        return self.present.sum(-1, keepdims=True)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[...]: how many tokens there are."""
        return self.present.sum(-1) + self.absent.sum(-1)

    @property
    def precision(self) -> np.ndarray:
        """[..., bin]: P(pattern given active); NaN where nothing is active."""
        return ratio(self.both, self.active)

    @property
    def recall(self) -> np.ndarray:
        """[..., bin]: P(active given pattern); NaN where the pattern never is."""
        return ratio(self.both, self.shown)

    @property
    def f1(self) -> np.ndarray:
        """[..., bin]: harmonic mean of the two; NaN where neither ever is."""
        return ratio(2 * self.both, self.active + self.shown)

    @property
    def beyond_chance(self) -> np.ndarray:
        """[..., bin]: (F1 - c) / (1 - c), c the F1 of independent sets as large; 0 where undefined.

        F1 alone prefers what is common: half of the tokens against half of the tokens have .5 without any relation.
        """
        chance = random_f1(self.active, self.shown, self.tokens[..., None])
        return np.nan_to_num(ratio(np.nan_to_num(self.f1) - chance, np.maximum(1 - chance, 0)))

    @property
    def iou(self) -> np.ndarray:
        """[..., bin]: both over either; 0 where neither ever is."""
        return np.nan_to_num(ratio(self.both, self.active + self.shown - self.both))

    @property
    def average_precision(self) -> np.ndarray:
        """[...]: area under precision against recall, in steps: sum of (recall gained) x precision over thresholds
        from the highest down. Scores within a bin count as equal. NaN where the pattern never is.
        """
        gained = ratio(self.present, self.shown)
        never = (self.shown == 0)[..., 0]
        return np.where(never, np.nan, (np.nan_to_num(gained) * np.nan_to_num(self.precision)).sum(-1))

    @property
    def information(self) -> np.ndarray:
        """[...]: mutual information of the bin and the pattern, in nats."""
        joint = np.stack([self.present, self.absent], -2).astype(float)
        total = np.maximum(joint.sum((-2, -1), keepdims=True), 1)
        expected = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(joint > 0, joint / total * np.log(joint / expected), 0.0)
        return np.maximum(terms.sum((-2, -1)), 0.0)


def _above(counts: np.ndarray) -> np.ndarray:
    """[..., bin]: counts in this bin and all higher ones."""
    return np.flip(np.cumsum(np.flip(counts, -1), -1, dtype=np.int64), -1)


def pearson(
    tokens: np.ndarray, total: np.ndarray, squares: np.ndarray, present: np.ndarray, among: np.ndarray
) -> np.ndarray:
    """[...]: correlation of the coefficient with presence (point-biserial); NaN where either does not vary.

    tokens   how many; `present` of them show the pattern
    total    sum of the coefficient, `squares` of its square, `among` of it where the pattern is present
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, share = total / tokens, present / tokens
        variance = squares / tokens - mean**2
        # What is left of a variance after cancellation is no variance.
        varies = (variance > 1e-12 * squares / tokens) & (share > 0) & (share < 1)
        correlation = (among / tokens - mean * share) / np.sqrt(variance * share * (1 - share))
    return np.where(varies, np.clip(correlation, -1, 1), np.nan)


def choose(
    curve: Curve, documents: np.ndarray, least: int = LEAST_DOCUMENTS
) -> tuple[np.ndarray, np.ndarray]:
    """The best threshold by F1 beyond chance: its bin i64[...] and that figure; bin -1 and 0 where none is allowed.

    curve      of the positive scores, bin 0 holding all others, which are never active
    documents  [..., bin]: documents in which the unit is active at each threshold; `least` are required
    """
    allowed = documents >= least
    allowed[..., 0] = False
    beyond = np.where(allowed, np.maximum(curve.beyond_chance, 0.0), -1.0)
    best = beyond.shape[-1] - 1 - np.argmax(np.flip(beyond, -1), -1)  # of equals the highest
    value = np.take_along_axis(beyond, best[..., None], -1)[..., 0]
    return np.where(value < 0, -1, best), np.maximum(value, 0.0)


def plainest(values: np.ndarray, complexity: np.ndarray) -> int:
    """Which of a unit's candidates is its claim: of those whose F1 beyond chance is within `MARGIN` of the largest the
    one with the fewest parts, then the best, then the first."""
    near = np.flatnonzero(values >= values.max() - MARGIN)
    return int(near[np.lexsort((near, -values[near], complexity[near]))[0]])


def document_weights(documents: int, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """f32[resample, document]: how often each document is drawn, with replacement, as many as there are."""
    generator = np.random.default_rng([seed, documents])
    return draws(generator, documents, count).astype(np.float32)


def resampled(
    active: np.ndarray, both: np.ndarray, present: np.ndarray, weights: np.ndarray
) -> dict[str, Interval]:
    """Intervals of `precision`, `recall` and `f1` by drawing documents again (tokens of one document are no
    independent witnesses).

    active, both, present  [claim, document]: tokens
    weights                `document_weights`

    A resample in which a figure is undefined counts as 0. Where a figure is 1, or 0, in all documents, it is so in all
    resamples: that end of the interval is then what so many documents can exclude (Clopper and Pearson 1934).
    """
    # Exact in float32 as long as no sum exceeds 2 ** 24.
    largest = max(
        (float(counts.sum(1, dtype=np.float64).max(initial=0)) for counts in (active, present)), default=0
    )
    kind = np.float32 if largest * float(weights.max(initial=1)) < 2**24 else np.float64
    counted = (active, both, present)
    drawn = _pairs(*(counts.astype(kind) @ weights.T.astype(kind) for counts in counted))
    whole = _pairs(*(counts.sum(1, dtype=np.int64) for counts in counted))
    seen, shown = active > 0, present > 0
    witnesses = {"precision": seen, "recall": shown, "f1": seen | shown}
    intervals = {name: Interval(ratio(*whole[name]), *_ends(*drawn[name])) for name in whole}
    return {name: of_share(intervals[name], witnesses[name].sum(1)) for name in whole}


def _pairs(
    active: np.ndarray, both: np.ndarray, present: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of each figure."""
    return {"precision": (both, active), "recall": (both, present), "f1": (2 * both, active + present)}


def _ends(numerator: np.ndarray, denominator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5th and 97.5th percentile of a figure [claim, resample]."""
    values = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    last = values.shape[1] - 1
    low, high = round(0.025 * last), round(0.975 * last)
    values.partition((low, high), axis=1)
    return values[:, low].astype(np.float64), values[:, high].astype(np.float64)


def random_f1(active: np.ndarray, present: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """F1 with the expected overlap of two independent sets of these sizes."""
    return np.nan_to_num(ratio(2 * active * (present / np.maximum(tokens, 1)), active + present))


def constant_f1(active: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """F1 of a pattern that is always there."""
    return np.nan_to_num(ratio(2 * active, active + tokens))


def verdicts(
    precision_low: np.ndarray,
    recall_low: np.ndarray,
    f1_low: np.ndarray,
    null: np.ndarray | float,
    q: np.ndarray | float,
    rule: Rule = Rule(),
) -> np.ndarray:
    """str[...]: one of `VERDICTS` (A74).

    No pattern above the null, unless F1 exceeds `null` (the `NULL_LEVEL` quantile of half of the layer's
    pseudo-neurons; with decoys 0 for a unit that beats them, and 1 for others) by the lower end of its interval, and
    the pattern was confirmed on held-out triggers (q). Then a direction holds if at least
    `rule.least` of it does, by the lower end of its interval. Where there are no intervals, give the figures.
    """
    believed = (np.nan_to_num(f1_low) > null) & (np.asarray(q) <= rule.q)
    precise, complete = (np.nan_to_num(side) >= rule.least for side in (precision_low, recall_low))
    return np.select(
        [~believed, precise & complete, precise, complete],
        [NONE, IFF, ACTIVE_PATTERN, PATTERN_ACTIVE],
        NEITHER,
    )
