"""How well each pattern is shared by the triggers of each unit, for thousands of units at once.

A *set* is the triggers of one unit, real or drawn: `slots i64[set, slot]`, points of a space, at most 64, -1 where
there is none. Which of them have a pattern is an integer of 64 bits, so that what two patterns cover together or in
common is one operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.special import gammaln

from mnemoscope.patterns.space import MOST, Space

_LOG_FACTORIAL = gammaln(np.arange(MOST + 2) + 1.0)


def log_binomial_tail(hits: np.ndarray, trials: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """f64[...]: log P(X >= hits), X ~ Binomial(trials, rate), exact in the far tail; trials at most `MOST`.

    The first term in logarithms times one plus the sum of the ratios of those that follow.
    """
    k, n = (np.asarray(values, np.int64) for values in (hits, trials))
    rate = np.clip(
        np.asarray(rate, np.float64), 1e-15, 1 - 1e-4
    )  # beyond, odds overflow and nothing is evidence
    first = _LOG_FACTORIAL[n] - _LOG_FACTORIAL[k] - _LOG_FACTORIAL[n - k]
    first = first + k * np.log(rate) + (n - k) * np.log1p(-rate)
    ratios = 1 + _ratios(
        *(np.broadcast_to(column, first.shape).ravel() for column in (k, n, rate / (1 - rate)))
    )
    return np.minimum(first + np.log(ratios).reshape(first.shape), 0.0)


def _ratios(k: np.ndarray, n: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """f64[case]: the terms above `k` over the first, summed until they no longer matter, in each case for itself."""
    total, term = np.zeros(len(k)), np.ones(len(k))
    left = np.arange(len(k))
    for step in range(int((n - k).max(initial=0))):
        term = term * (np.maximum(n - k - step, 0) / (k + 1 + step)) * odds
        total[left] += term
        going = term > 1e-12 * (1 + total[left])
        term[~going] = 0.0  # whatever goes on beside it
        if 2 * going.sum() < len(going):
            left, term, k, n, odds = (column[going] for column in (left, term, k, n, odds))
        if not len(left):
            break
    return total


def poisson_binomial_tail(hits: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """f64[case]: P(sum of independent coins >= hits).

    rates   f64[case, trial] chance of each coin; 0 for one that is not thrown
    """
    cases, trials = rates.shape
    chances = np.zeros((cases, trials + 1))
    chances[:, 0] = 1
    for trial in range(trials):
        p = rates[:, trial, None]
        chances[:, 1:] = chances[:, 1:] * (1 - p) + chances[:, :-1] * p
        chances[:, 0] *= 1 - p[:, 0]
    above = np.concatenate([np.cumsum(chances[:, ::-1], 1)[:, ::-1], np.zeros((cases, 1))], 1)
    return np.minimum(above[np.arange(cases), np.minimum(hits, trials + 1)], 1.0)


SUPPORT = 3  # triggers that share it, at least (Geva et al. 2021)
BLOCK = (
    16_384  # pairs at a time: the rates of a pattern are neighbours, and still at hand for the next trigger
)


@dataclass(frozen=True)
class SharedPatterns:
    """(set, pattern) pairs, sorted by set.

    set i64, column i64, bits u64 (which slots have it), base f64 (chance of a trigger's stratum to have it,
    mean over the triggers), log_p f64 (natural logarithm of the tail)
    """

    set: np.ndarray
    column: np.ndarray
    bits: np.ndarray
    base: np.ndarray
    log_p: np.ndarray

    def take(self, which: np.ndarray) -> SharedPatterns:
        """Keep some of the pairs."""
        return SharedPatterns(
            self.set[which], self.column[which], self.bits[which], self.base[which], self.log_p[which]
        )


def shared(space: Space, slots: np.ndarray, least_likely: float = -1.0) -> SharedPatterns:
    """All patterns that at least `SUPPORT` triggers of a set share, and more likely than not by no chance:
    with a log tail of at most `least_likely`."""
    sets, width = slots.shape
    assert width <= MOST, width
    filled = slots >= 0
    flags = (np.uint64(1) << np.arange(width, dtype=np.uint64))[None, :].repeat(sets, 0)
    starts = np.concatenate([[0], np.cumsum(filled.sum(1))])
    chosen = csr_array((flags[filled], slots[filled], starts), shape=(sets, len(space.rows)))
    product = csr_array(chosen @ space.marks)
    hits = np.bitwise_count(product.data)
    enough = hits >= SUPPORT
    owner = np.repeat(np.arange(sets), np.diff(product.indptr))[enough]
    column, bits = product.indices[enough].astype(np.int64), product.data[enough]
    trials = filled.sum(1)[owner]
    base = base_of(space, slots, owner, column)
    log_p = log_binomial_tail(hits[enough], trials, base)
    pairs = SharedPatterns(owner, column, bits, base, log_p)
    return pairs.take(np.flatnonzero(log_p <= least_likely))


def base_of(space: Space, slots: np.ndarray, owner: np.ndarray, column: np.ndarray) -> np.ndarray:
    """f64[pair]: mean over the triggers of the rate of their stratum."""
    filled = slots >= 0
    strata = int(space.stratum.max(initial=0)) + 1
    stratum = np.where(filled, space.stratum[slots], -1)
    if strata == 1:
        return np.asarray(space.rates[0, column], np.float64)
    total = np.zeros(len(owner))
    for start in range(0, len(owner), BLOCK):
        block = slice(start, start + BLOCK)
        strata_of = stratum[owner[block]]
        for rates in np.where(strata_of >= 0, space.rates[strata_of, column[block, None]], 0).T:
            total[block] += rates
    return total / filled.sum(1)[owner]


@dataclass(frozen=True)
class Top:
    """The best few patterns of each set, best first: [set, place], column -1 where there is none."""

    column: np.ndarray
    bits: np.ndarray
    base: np.ndarray
    log_p: np.ndarray

    def pick(self, sets: np.ndarray, rank: np.ndarray | int = 0) -> SharedPatterns:
        """One pattern of each of some sets."""
        where = (sets, rank)
        return SharedPatterns(sets, self.column[where], self.bits[where], self.base[where], self.log_p[where])


def best(pairs: SharedPatterns, sets: int, count: int, aspect: np.ndarray | None = None) -> Top:
    """The `count` best of each set.

    aspect   i64[column]: of patterns of one aspect that the very same triggers have, only the best is kept
    """
    order = np.lexsort((pairs.column, pairs.log_p, pairs.set))
    if aspect is not None:
        looks = aspect[pairs.column]
        by_bits = np.lexsort((pairs.column, pairs.log_p, looks, pairs.bits, pairs.set))
        ordered = pairs.take(by_bits)
        new = np.ones(len(by_bits), bool)
        new[1:] = (ordered.set[1:] != ordered.set[:-1]) | (ordered.bits[1:] != ordered.bits[:-1])
        new[1:] |= np.diff(looks[by_bits]) != 0
        keep = np.zeros(len(by_bits), bool)
        keep[by_bits[new]] = True
        order = order[keep[order]]
    ordered = pairs.take(order)
    first = np.searchsorted(ordered.set, np.arange(sets))
    rank = np.arange(len(order)) - first[ordered.set]
    kept = np.flatnonzero(rank < count)
    where = (ordered.set[kept], rank[kept])
    top = Top(
        np.full((sets, count), -1),
        np.zeros((sets, count), np.uint64),
        np.ones((sets, count)),
        np.zeros((sets, count)),
    )
    for name in ("column", "bits", "base", "log_p"):
        getattr(top, name)[where] = getattr(ordered, name)[kept]
    return top
