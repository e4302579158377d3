"""Intervals at 95 %: Wilson's, by resampling, and what so many witnesses leave open where all of them agree.

Documents are resampled with replacement, because tokens of one document are not independent.

A bootstrap never draws what was not seen: of 0 hits in 8 items every resample has 0, and its interval would be as
certain of eight items as of eight thousand. There an end of the interval is what so many witnesses can exclude
(Clopper and Pearson 1934): `unanimous`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
# Of the normal distribution at 1 - TAIL, as scipy.stats gives it, which takes half a second to import.
_QUANTILE = 1.959963984540054


class Interval(NamedTuple):
    """f64[...] each: an estimate and the interval around it; NaN where it is not defined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, value: np.ndarray, drawn: np.ndarray) -> Interval:
        """A figure with the percentiles of its resamples f64[sample, ...], those that are defined."""
        if not len(drawn):
            drawn = np.full((1, *np.shape(value)), np.nan)
        lost = np.isnan(drawn).all(0) | np.isnan(value)
        low, high = np.nanquantile(np.where(lost, 0.0, drawn), (TAIL, 1 - TAIL), axis=0)
        return cls(value, np.where(lost, np.nan, low), np.where(lost, np.nan, high))


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
LEAST = 20  # groups, or there is no interval


def jackknife(values: np.ndarray) -> Estimate:
    """From f64[1 + group]: the figure over all documents, then without each group; no interval below `LEAST` groups.

    The delete-a-group jackknife with quantiles of Student's t (Kott 2001), for what is not smooth, such as a count of
    figures above a bar: documents drawn with replacement would add noise to each figure, and so move the count.
    """
    value, without = float(values[0]), values[1:]
    count = len(without)
    if count < LEAST:
        return Estimate(value, None, None)
    from scipy.special import stdtrit

    error = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    reach = float(stdtrit(count - 1, 1 - TAIL)) * error
    return Estimate(value, value - reach, value + reach)


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
    low = np.where(found.value == 1, np.minimum(found.low, least), found.low)
    high = np.where(found.value == 0, np.maximum(found.high, 1 - least), found.high)
    return Interval(found.value, low, high)


# -- By resampling --------------------------------------------------------------------------------------------------

TIMES = 1000
_BLOCK = 64  # resamples at once


def by_document(
    values: np.ndarray,
    documents: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int = TIMES,
    seed: int = 0,
) -> Interval:
    """A statistic of sums over examples, with the 2.5th and 97.5th percentile over resampled documents.

    values     f64[example, ...]   what is summed; no NaN
    documents  i64[example]        whose example it is
    statistic  f64[sample, ...] sums -> f64[sample, ...], each sample on its own
    """
    sums = per_document(values, documents)
    flat = sums.reshape(len(sums), int(np.prod(sums.shape[1:])))
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, n if len(sums) else 0, _BLOCK):
        weights = draws(generator, len(sums), min(_BLOCK, n - start))
        drawn.append(statistic((weights @ flat).reshape(len(weights), *sums.shape[1:])))
    value = statistic(sums.sum(0, keepdims=True))[0]
    return Interval.of(value, np.concatenate([value[None][:0], *drawn]))


def draws(generator: np.random.Generator, count: int, times: int = 1) -> np.ndarray:
    """i64[time, count]: how often each of so many is drawn, with replacement, as many as there are."""
    return generator.multinomial(count, np.full(count, 1 / max(count, 1)), times)


def mean_by_document(values: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of values f64[example, ...], NaN left out, resampled by document."""
    known = ~np.isnan(values)
    both = np.stack([np.where(known, values, 0.0), known], axis=1)
    return by_document(both, documents, lambda sums: ratio(sums[:, 0], sums[:, 1]), n, seed)


def share_by_document(hits: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of shares (or hits) f64[example, ...] in [0, 1], NaN left out, resampled by document."""
    known = ~np.isnan(hits)
    _assert_shares(hits[known])
    witnesses = (per_document(known.astype(float), documents) > 0).sum(0)
    return of_share(mean_by_document(hits, documents, n, seed), witnesses)


def share_by_group(
    hits: np.ndarray, groups: np.ndarray, count: int, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """As `mean_by_group`, of shares (or hits) in [0, 1]."""
    _assert_shares(hits)
    _, place = _numbered(documents)
    witnesses = np.bincount(np.unique(place * count + groups) % count, minlength=count)
    return of_share(mean_by_group(hits, groups, count, documents, n, seed), witnesses)


def share_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """How many of `below` f64[example, ...] are `above`, summed over examples; resampled by document."""
    assert ((above >= 0) & (above <= below + 1e-6)).all()
    found = ratio_of_sums(above, below, documents, n, seed)
    return of_share(found, (per_document(below, documents) > 0).sum(0))


def ratio_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """The sum of `above` over the sum of `below` f64[example, ...], resampled by document."""
    both = np.stack([above, below], axis=1)
    return by_document(both, documents, lambda sums: ratio(sums[:, 0], sums[:, 1]), n, seed)


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
    return by_document(both, ids, lambda some: ratio(some[..., 0], some[..., 1]), n, seed)


def _numbered(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `np.unique` with the inverse, without sorting millions of ids that lie close together."""
    if len(documents) == 0 or np.ptp(documents) > 4 * len(documents):
        return np.unique(documents, return_inverse=True)
    place = documents - documents.min()
    seen = np.bincount(place) > 0
    return np.flatnonzero(seen) + documents.min(), (np.cumsum(seen) - 1)[place]


def quantile_by_document(
    values: np.ndarray, documents: np.ndarray, levels: tuple[float, ...], n: int = 200, seed: int = 0
) -> Interval:
    """Quantiles f64[level, column] of values f64[example, column], resampled by document; the lower one of two."""
    _, place = np.unique(documents, return_inverse=True)
    count = int(place.max()) + 1
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, 0)
    generator = np.random.default_rng(seed)

    def of(weights: np.ndarray) -> np.ndarray:
        mass = np.cumsum(weights[place][order], axis=0)
        picks = [(mass < level * mass[-1]).sum(0).clip(max=len(values) - 1) for level in levels]
        return np.stack([np.take_along_axis(ranked, pick[None], 0)[0] for pick in picks])

    drawn = [of(draws(generator, count)[0]) for _ in range(n)]
    return Interval.of(of(np.ones(count)), np.stack(drawn))


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
