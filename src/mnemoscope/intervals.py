"""Intervals at 95 %: Wilson's, by resampling, and what so many witnesses leave open where all of them agree.

Documents are resampled with replacement, because tokens of one document are not independent. How the resamples become
an interval depends on how many documents have something to say: below `LEAST` there is none, up to `SMALL` it is
corrected for bias, skewness and the number of documents (`bca`), beyond it is their percentiles.

A bootstrap never draws what was not seen: of 0 hits in 8 items every resample has 0, and its interval would be as
certain of eight items as of eight thousand. There an end of the interval is what so many witnesses can exclude
(Clopper and Pearson 1934): `unanimous`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
# Of the normal distribution at 1 - TAIL, as scipy.stats gives it, which takes half a second to import.
_QUANTILE = 1.959963984540054


class _Ends(NamedTuple):
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Interval(_Ends):
    """f64[...] each of three: an estimate, `value`, and the interval around it, `low` and `high`; NaN where undefined.

    n  i64[...]: the units that were resampled and have something to say; None where it was not counted
    """

    n: np.ndarray | None = None

    @classmethod
    def of(cls, value: np.ndarray, drawn: np.ndarray) -> Interval:
        """A figure with the percentiles of its resamples f64[sample, ...], those that are defined."""
        if not len(drawn):
            drawn = np.full((1, *np.shape(value)), np.nan)
        lost = np.isnan(drawn).all(0) | np.isnan(value)
        low, high = np.nanquantile(np.where(lost, 0.0, drawn), (TAIL, 1 - TAIL), axis=0)
        return cls(value, np.where(lost, np.nan, low), np.where(lost, np.nan, high))

    def among(self, units: np.ndarray | int) -> Interval:
        """The same with how many units it rests on, and without an interval below `LEAST` of them."""
        n = np.broadcast_to(np.asarray(units, np.int64), np.shape(self.value))
        return Interval(self.value, *(np.where(n < LEAST, np.nan, end) for end in (self.low, self.high)))._of(
            n
        )

    def at(self, place: int | slice | tuple[int, ...]) -> Interval:
        """One of its figures, or some."""
        return Interval(*(end[place] for end in self))._of(None if self.n is None else self.n[place])

    def _of(self, n: np.ndarray | None) -> Interval:
        self.n = n
        return self


@dataclass(frozen=True)
class Estimate:
    """An interval of one figure in plain values; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: np.ndarray, witnesses: int | None = None) -> Estimate:
        """From f64[1 + sample]: the figure itself first, then the figure of each resampling; NaN is undefined.

        witnesses  of a share in [0, 1], as in `of_share`
        """
        interval = Interval.of(values[0], values[1:])
        ends = interval if witnesses is None else of_share(interval, witnesses)
        return cls(*(None if np.isnan(interval.low) else float(end) for end in ends))


GROUPS = 40  # of documents, which a jackknife leaves out one after another
LEAST = 20  # units or groups of them, or there is no interval
SMALL = 100  # units up to which percentiles of resamples are corrected


def jackknife(values: np.ndarray) -> Estimate:
    """From f64[1 + group]: the figure over all documents, then without each group; no interval below `LEAST` groups.

    The delete-a-group jackknife with quantiles of Student's t (Kott 2001), for what is not smooth, such as a count of
    figures above a bar: documents drawn with replacement would add noise to each figure, and so move the count.
    """
    interval = jackknifed(values)
    ends = (None if np.isnan(end) else float(end) for end in (interval.low, interval.high))
    return Estimate(float(interval.value), *ends)


def jackknifed(values: np.ndarray, documents: int | None = None) -> Interval:
    """The same of many figures f64[1 + group, ...]; n is the number of documents, or of groups."""
    value, error = values[0], _jackknife_error(values)
    reach = _student(len(values) - 1) * error
    interval = Interval(value, value - reach, value + reach).among(len(values) - 1)
    return interval if documents is None else interval.among(documents)


def jackknifed_chance(values: np.ndarray) -> np.ndarray:
    """f64[...]: two-sided p of differences f64[1 + group, ...], by Student's t; 1 below `LEAST` groups."""
    from scipy.special import stdtr

    error, count = _jackknife_error(values), len(values) - 1
    steps = np.divide(np.abs(values[0]), error, out=np.full(np.shape(values[0]), np.inf), where=error > 0)
    p = 2 * stdtr(max(count, 2) - 1.0, -steps)
    return np.where(np.isnan(values[0]) | (values[0] == 0) | (count < LEAST), 1.0, p)


def chance(interval: Interval) -> np.ndarray:
    """f64[...]: two-sided p of a difference, from its interval taken as Student's.

    Altman and Bland 2011 (BMJ 343: d2304). 1 where there is no interval, or nothing was counted.
    """
    from scipy.special import stdtr

    units = np.zeros(np.shape(interval.value)) if interval.n is None else interval.n
    reach = np.asarray(interval.high - interval.low) / 2
    error = np.divide(
        reach, _student(np.maximum(units, 2)), out=np.zeros(np.shape(reach)), where=units >= LEAST
    )
    steps = np.divide(np.abs(interval.value), error, out=np.zeros(np.shape(reach)), where=error > 0)
    return np.where(error > 0, 2 * stdtr(np.maximum(units, 2) - 1.0, -steps), 1.0)


def holm(p: np.ndarray) -> np.ndarray:
    """f64[test]: p of one family, corrected so that none is wrong with the chance that p says (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(steps, 1.0)
    return out


def _jackknife_error(values: np.ndarray) -> np.ndarray:
    without = values[1:]
    count = max(len(without), 1)
    spread = (without - without.sum(0) / count) ** 2
    return np.asarray(np.sqrt((count - 1) / count * spread.sum(0)))


def groups_of(documents: np.ndarray, count: int = GROUPS) -> np.ndarray:
    """i64[...]: which of so many groups each document is in, as even as can be; fewer groups for fewer documents."""
    ids, place = _numbered(documents)
    return np.random.default_rng(0).permutation(len(ids))[place] % max(min(count, len(ids)), 1)


def _student(count: np.ndarray | int) -> np.ndarray:
    """f64[...]: the quantile of Student's t at the upper end, of so many units."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(np.maximum(count, 2) - 1.0, 1 - TAIL))


def wilson(hits: np.ndarray, total: np.ndarray) -> Interval:
    """A share with Wilson's score interval (1927); NaN where the total is 0."""
    hits, total = np.asarray(hits, float), np.asarray(total, float)
    z = _QUANTILE
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(total > 0, hits / total, np.nan)
        middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
        half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return Interval(share, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1))


def unanimous(witnesses: np.ndarray | int) -> np.ndarray:
    """f64[...]: the least share that so many independent witnesses, hits all of them, do not exclude."""
    return np.asarray(TAIL ** (1 / np.maximum(witnesses, 1)))


def of_share(found: Interval, witnesses: np.ndarray | int) -> Interval:
    """The interval of a share in [0, 1] by resampling, with exact ends where all or none of its witnesses are hits."""
    least = unanimous(witnesses)
    low = np.where(found.value == 1, np.minimum(found.low, least), np.maximum(found.low, 0))
    high = np.where(found.value == 0, np.maximum(found.high, 1 - least), np.minimum(found.high, 1))
    return Interval(found.value, low, high)._of(found.n)


# -- By resampling --------------------------------------------------------------------------------------------------

TIMES = 1000
_BLOCK = 64  # resamples at once
_KEPT = 1 << 24  # of how many units in all resamples the draws are kept: 32 MB


def by_document(
    values: np.ndarray,
    documents: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int = TIMES,
    seed: int = 0,
    *,
    witnesses: np.ndarray | int | None = None,
    corrected: bool = True,
) -> Interval:
    """A statistic of sums over examples, with its interval over resampled documents.

    values     f64[example, ...]   what is summed; no NaN
    documents  i64[example]        whose example it is
    statistic  f64[sample, ...] sums -> f64[sample, ...], each sample on its own
    witnesses  i64[...]: how many documents each figure rests on, if not on all. Below `LEAST` there is no interval,
               up to `SMALL` it is `bca`, from twice as many resamples, beyond that the 2.5th to 97.5th percentile
    corrected  False for percentiles even then: of what moves in steps, such as the layer of a peak
    """
    sums = per_document(values, documents)
    value = statistic(sums.sum(0, keepdims=True))[0]
    known = np.broadcast_to(np.asarray(len(sums) if witnesses is None else witnesses), value.shape)
    small = corrected & (known >= LEAST) & (known <= SMALL)
    drawn = resampled(sums, statistic, 2 * n if small.any() else n, seed)
    interval = Interval.of(value, drawn)
    if small.any():
        exact = bca(value, drawn, statistic(sums.sum(0) - sums), known)
        low, high = (np.where(small, *ends) for ends in zip(exact[1:], interval[1:], strict=True))
        interval = Interval(value, low, high)
    return interval.among(known)


def resampled(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int = TIMES, seed: int = 0
) -> np.ndarray:
    """f64[sample, ...]: a statistic of sums of documents f64[document, ...], drawn with replacement so many times."""
    flat = sums.reshape(len(sums), int(np.prod(sums.shape[1:])))
    drawn = [statistic(np.zeros((1, *sums.shape[1:])))[:0]]
    for weights in _blocks(len(sums), n if len(sums) else 0, seed):
        drawn.append(statistic((weights @ flat).reshape(len(weights), *sums.shape[1:])))
    return np.concatenate(drawn)


def _blocks(count: int, times: int, seed: int) -> Iterator[np.ndarray]:
    """f64[time, count]: the draws of a seed, some at once; those of few units are kept for the next figure of them."""
    if 0 < count * times <= _KEPT:
        kept = _draws_of(count, times, seed)
        yield from (kept[start : start + _BLOCK].astype(float) for start in range(0, times, _BLOCK))
        return
    generator = np.random.default_rng(seed)
    for start in range(0, times, _BLOCK):
        yield draws(generator, count, min(_BLOCK, times - start)).astype(float)


@lru_cache(maxsize=3)
def _draws_of(count: int, times: int, seed: int) -> np.ndarray:
    return draws(np.random.default_rng(seed), count, times).astype(np.uint16)


def bca(value: np.ndarray, drawn: np.ndarray, without: np.ndarray, units: np.ndarray | int) -> Interval:
    """Percentiles of resamples, corrected for bias and skewness and for how few units there are.

    value    f64[...]          the figure
    drawn    f64[sample, ...]  and of each resample; NaN where it is not defined
    without  f64[unit, ...]    and without each of the units
    units    i64[...]          how many units have something to say

    Bias-corrected and accelerated (Efron 1987), the acceleration being the skewness of what each unit adds, without
    the bias of few; expanded as Student's interval is wider than the normal one (Hesterberg 2015), because resamples
    of n units vary too little by (n - 1) / n and do not know that their spread is estimated.
    """
    from scipy.special import ndtr, ndtri

    units = np.maximum(np.asarray(units, float), 3)
    known = ~np.isnan(drawn)
    size = np.maximum(known.sum(0), 1)
    slack = 1e-12 * np.abs(value)
    less = ((drawn < value - slack) & known).sum(0) + ((np.abs(drawn - value) <= slack) & known).sum(0) / 2
    bias = ndtri(np.clip(less / size, 0.5 / size, 1 - 0.5 / size))
    defined = ~np.isnan(without)
    mean = ratio(np.where(defined, without, 0.0).sum(0), defined.sum(0))
    added = np.where(defined, mean - without, 0.0)
    cubes, spread = (added**3).sum(0), (added**2).sum(0) ** 1.5
    unbiased = np.sqrt(units * (units - 1)) / (units - 2)
    skewness = unbiased * np.divide(cubes, 6 * spread, out=np.zeros_like(spread), where=spread > 0)
    reach = np.sqrt(units / (units - 1)) * _student(units)
    ranked = np.sort(drawn, axis=0)  # what is not defined comes last
    ends = []
    for step in (bias - reach, bias + reach):
        level = ndtr(bias + step / np.maximum(1 - skewness * step, 0.05))
        place = np.clip(
            level * (size + 1) - 1, 0, size - 1
        )  # of so many and the figure itself (Davison, Hinkley 1997)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, size - 1)
        left, right = (np.take_along_axis(ranked, at[None], 0)[0] for at in (below, above))
        ends.append(left + (place - below) * (right - left))
    return Interval(value, *(np.where(known.any(0) & ~np.isnan(value), end, np.nan) for end in ends))


def draws(generator: np.random.Generator, count: int, times: int = 1) -> np.ndarray:
    """i64[time, count]: how often each of so many is drawn, with replacement, as many as there are."""
    return generator.multinomial(count, np.full(count, 1 / max(count, 1)), times)


def mean_by_document(values: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of values f64[example, ...], NaN left out, resampled by document."""
    known = ~np.isnan(values)
    both = np.stack([np.where(known, values, 0.0), known], axis=1)
    return by_document(both, documents, _quotient, n, seed, witnesses=_witnesses(known, documents))


def share_by_document(hits: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of shares (or hits) f64[example, ...] in [0, 1], NaN left out, resampled by document."""
    known = ~np.isnan(hits)
    _assert_shares(hits[known])
    return of_share(mean_by_document(hits, documents, n, seed), _witnesses(known, documents))


def share_by_group(
    hits: np.ndarray, groups: np.ndarray, count: int, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """As `mean_by_group`, of shares (or hits) in [0, 1]."""
    _assert_shares(hits)
    interval = mean_by_group(hits, groups, count, documents, n, seed)
    assert interval.n is not None
    return of_share(interval, interval.n)


def share_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """How many of `below` f64[example, ...] are `above`, summed over examples; resampled by document."""
    assert ((above >= 0) & (above <= below + 1e-6)).all()
    return of_share(ratio_of_sums(above, below, documents, n, seed), _witnesses(below > 0, documents))


def ratio_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """The sum of `above` over the sum of `below` f64[example, ...], resampled by document."""
    both = np.stack([above, below], axis=1)
    return by_document(both, documents, _quotient, n, seed, witnesses=_witnesses(below != 0, documents))


def _quotient(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[:, 0], sums[:, 1])


def _witnesses(known: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """i64[...]: documents that have an example that is known."""
    return np.asarray((per_document(known.astype(float), documents) > 0).sum(0))


def _assert_shares(values: np.ndarray) -> None:
    assert ((values >= 0) & (values <= 1 + 1e-6)).all(), (values.min(), values.max())


def mean_by_group(
    values: np.ndarray,
    groups: np.ndarray,
    count: int,
    documents: np.ndarray,
    n: int = TIMES,
    seed: int = 0,
) -> Interval:
    """Means f64[group] of values f64[example], each example in one of `count` groups, resampled by document."""
    ids, place = _numbered(documents)
    cell, size = place * count + groups, len(ids) * count
    sums = np.stack([np.bincount(cell, values, size), np.bincount(cell, minlength=size)], axis=-1)
    both = sums.reshape(len(ids), count, 2)
    witnesses = (both[..., 1] > 0).sum(0)
    return by_document(
        both, ids, lambda some: ratio(some[..., 0], some[..., 1]), n, seed, witnesses=witnesses
    )


def _numbered(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `np.unique` with the inverse, without sorting millions of ids that lie close together."""
    if len(documents) == 0 or np.ptp(documents) > 4 * len(documents):
        return np.unique(documents, return_inverse=True)
    place = documents - documents.min()
    seen = np.bincount(place) > 0
    return np.flatnonzero(seen) + documents.min(), (np.cumsum(seen) - 1)[place]


def quantile_by_document(
    values: np.ndarray,
    documents: np.ndarray,
    levels: tuple[float, ...],
    n: int = 200,
    seed: int = 0,
    of: Callable[[np.ndarray], np.ndarray] = lambda quantiles: quantiles,
) -> Interval:
    """Quantiles f64[level, column] of values f64[example, column], resampled by document; the lower one of two.

    of  a figure made of them, such as the difference of two medians
    """
    _, place = np.unique(documents, return_inverse=True)
    count = int(place.max()) + 1
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, 0)
    generator = np.random.default_rng(seed)

    def figure(weights: np.ndarray) -> np.ndarray:
        mass = np.cumsum(weights[place][order], axis=0)
        picks = [(mass < level * mass[-1]).sum(0).clip(max=len(values) - 1) for level in levels]
        return of(np.stack([np.take_along_axis(ranked, pick[None], 0)[0] for pick in picks]))

    drawn = [figure(draws(generator, count)[0]) for _ in range(n)]
    return Interval.of(figure(np.ones(count)), np.stack(drawn)).among(count)


# -- Many figures at once -------------------------------------------------------------------------------------------

RATE = 0.05  # of false ones among the places of a family that are named


def chance_of_zero(
    values: np.ndarray, documents: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> np.ndarray:
    """f64[...]: two-sided p of a difference: twice the share of resamples of documents on the other side of 0.

    As in `by_document`. 1 where fewer than `LEAST` documents, or nothing, is known.
    """
    sums = per_document(values, documents)
    value = statistic(sums.sum(0, keepdims=True))[0]
    if len(sums) < LEAST:
        return np.ones(value.shape)
    drawn = resampled(sums, statistic, 4 * TIMES, seed)
    known = np.maximum((~np.isnan(drawn)).sum(0), 1)
    beyond = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
    return np.where(np.isnan(value), 1.0, np.minimum(1.0, 2 * (1 + beyond) / (1 + known)))


def discoveries(p: np.ndarray, rate: float = RATE) -> np.ndarray:
    """bool[...]: which figures of one family differ, at most this share of them falsely (Benjamini, Hochberg 1995)."""
    flat = np.asarray(p, float).reshape(-1)
    if not flat.size:
        return np.zeros(np.shape(p), bool)
    order = np.argsort(flat, kind="stable")
    kept = np.flatnonzero(flat[order] <= rate * np.arange(1, len(flat) + 1) / len(flat))
    out = np.zeros(len(flat), bool)
    out[order[: kept[-1] + 1 if len(kept) else 0]] = True
    return out.reshape(np.shape(p))


def per_document(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """f64[document, ...]: sums over the examples of each document, ascending by id."""
    ids, place = np.unique(documents, return_inverse=True)
    sums = np.zeros((len(ids), *values.shape[1:]))
    np.add.at(sums, place, values)
    return sums


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)
