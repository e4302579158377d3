"""Conjunctions and disjunctions by beam search, each further part at the price of naming it.

A compound is chosen only when its tail is smaller than that of its best part by more than the number of patterns
in the language, once for each further part: what it would cost to say which one (minimum description length). The same
search runs on the drawn sets, so that the family-wise p-value knows about it.

Beam search asks three triggers of every part, and takes the part with the smallest tail, which may be a wider one
(*called* within 16 tokens for *called*: where the triggers stand the narrower is the commoner of the two). A unit that
answers to four words shows the rarest of them once or twice among 25 triggers. Here the words that end triggers are
taken one by one, and so the plain word and the union of words are candidates too; the whole distribution of the
discovery half decides between them and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnemoscope.patterns.columns import Groups
from mnemoscope.patterns.pattern import ALL, ANY, PARTS, SINGLE
from mnemoscope.patterns.score import SUPPORT, Top, base_of, log_binomial_tail
from mnemoscope.patterns.space import Space

SAMPLE = 4000  # points of the rarer part, at most, among which the others are counted


@dataclass(frozen=True)
class BestPatterns:
    """One pattern for each set.

    how i8 (SINGLE, ALL, ANY), columns i64[set, 4] (-1 where there is none), bits u64, base f64, log_p f64,
    score f64: log_p plus the price of further parts; 0 where nothing is shared
    """

    how: np.ndarray
    columns: np.ndarray
    bits: np.ndarray
    base: np.ndarray
    log_p: np.ndarray
    score: np.ndarray

    def take(self, which: np.ndarray) -> BestPatterns:
        """The choices of some sets."""
        return BestPatterns(**{name: getattr(self, name)[which] for name in self.__dataclass_fields__})

    def put(self, where: np.ndarray, other: BestPatterns) -> None:
        """Replace the choices of some sets."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[where] = getattr(other, name)


def singles(top: Top) -> BestPatterns:
    """The best pattern of each set."""
    sets = len(top.column)
    columns = np.full((sets, PARTS[ANY]), -1)
    columns[:, 0] = top.column[:, 0]
    return BestPatterns(
        np.zeros(sets, np.int8),
        columns,
        top.bits[:, 0].copy(),
        top.base[:, 0].copy(),
        top.log_p[:, 0].copy(),
        top.log_p[:, 0].copy(),
    )


def disjoin(choice: BestPatterns, top: Top, trials: np.ndarray, price: float) -> None:
    """Disjunctions: add to the best of each set the part that helps most, while it is worth its price.

    The rate of a disjunction is bounded by the sum of the rates of its parts, so that its tail is never too
    small. Where a start from the second or third best ends better, that one is taken.
    """
    rows = np.arange(len(top.column))
    for begin in range(min(3, top.column.shape[1])):
        grown = _start(top, begin)
        for size in range(1, PARTS[ANY]):
            bits = grown.bits[:, None] | top.bits
            base = np.minimum(grown.base[:, None] + top.base, 1)
            log_p = log_binomial_tail(np.bitwise_count(bits), trials[:, None], base)
            more = np.bitwise_count(bits).astype(int) - np.bitwise_count(grown.bits)[:, None]
            whole = (grown.columns >= 0).sum(1) == size  # those that did not grow in the last round are done
            score = np.where((more >= SUPPORT) & (top.column >= 0) & whole[:, None], log_p + size * price, 0)
            best = score.argmin(1)
            sets = np.flatnonzero(score[rows, best] < grown.score)
            if not len(sets):
                break
            chosen = (sets, best[sets])
            grown.how[sets], grown.columns[sets, size] = ANY, top.column[chosen]
            grown.bits[sets], grown.base[sets] = bits[chosen], base[chosen]
            grown.log_p[sets], grown.score[sets] = log_p[chosen], score[chosen]
        better = np.flatnonzero((grown.how == ANY) & (grown.score < choice.score))
        choice.put(better, grown.take(better))


def _start(top: Top, begin: int) -> BestPatterns:
    return singles(Top(top.column[:, begin:], top.bits[:, begin:], top.base[:, begin:], top.log_p[:, begin:]))


def conjoin(
    choice: BestPatterns, top: Top, space: Space, slots: np.ndarray, trials: np.ndarray, price: float
) -> None:
    """Conjunctions: of two of the best patterns of a set, then of a third with them."""
    a, b = np.triu_indices(top.column.shape[1], 1)
    both = top.bits[:, a] & top.bits[:, b]
    hits = np.bitwise_count(both)
    # If they were independent, would it be worth it? Most pairs would not, and need no counting.
    hoped = log_binomial_tail(hits, trials[:, None], top.base[:, a] * top.base[:, b])
    bar = np.minimum(choice.score, top.log_p[:, 0])[:, None]
    likely = (hits >= SUPPORT) & (top.column[:, b] >= 0) & (hoped + price < bar)
    sets, pair = np.nonzero(likely)
    columns = np.stack([top.column[sets, a[pair]], top.column[sets, b[pair]]], 1)
    _better(choice, space, slots, trials, price, sets, columns, both[sets, pair])
    third = np.flatnonzero(choice.how == ALL)
    bits = choice.bits[third, None] & top.bits[third]
    hits = np.bitwise_count(bits)
    hoped = log_binomial_tail(hits, trials[third, None], choice.base[third, None] * top.base[third])
    inside = (top.column[third, :, None] == choice.columns[third, None, :]).any(2)
    likely = (
        (hits >= SUPPORT)
        & (top.column[third] >= 0)
        & ~inside
        & (hoped + 2 * price < choice.score[third, None])
    )
    case, other = np.nonzero(likely)
    sets = third[case]
    columns = np.concatenate([choice.columns[sets, :2], top.column[sets, other][:, None]], 1)
    _better(choice, space, slots, trials, price, sets, columns, bits[case, other])


def _better(
    choice: BestPatterns,
    space: Space,
    slots: np.ndarray,
    trials: np.ndarray,
    price: float,
    sets: np.ndarray,
    columns: np.ndarray,
    bits: np.ndarray,
) -> None:
    """Put the conjunctions i64[case, part] of some sets in place of what they had, where they are better."""
    if not len(sets):
        return
    base = joint_base(space, slots[sets], columns)
    log_p = log_binomial_tail(np.bitwise_count(bits), trials[sets], base)
    score = log_p + (columns.shape[1] - 1) * price
    order = np.lexsort((score, sets))
    first = order[np.concatenate([[True], sets[order][1:] != sets[order][:-1]])]
    first = first[score[first] < choice.score[sets[first]]]
    padded = np.full((len(first), PARTS[ANY]), -1)
    padded[:, : columns.shape[1]] = columns[first]
    how = np.full(len(first), ALL, np.int8)
    better = BestPatterns(how, padded, bits[first], base[first], log_p[first], score[first])
    choice.put(sets[first], better)


def joint_base(space: Space, slots: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """f64[case]: mean over the triggers of the share of their stratum that has all of `columns i64[case, part]`.

    Counted exactly for each different conjunction (among `SAMPLE` points of its rarest part).
    """
    columns = np.sort(columns, 1)
    unique, number_of = np.unique(columns, axis=0, return_inverse=True)
    rarity = np.diff(space.columns.indptr)
    strata = int(space.stratum.max(initial=0)) + 1
    sizes = np.maximum(np.bincount(space.stratum, minlength=strata), 1)
    out = np.zeros(len(columns))
    number_of = number_of.ravel()
    cases = Groups(number_of, np.ones(len(number_of), bool))
    for number, parts in enumerate(unique):
        rare = parts[rarity[parts].argmin()]
        points = space.columns.indices[space.columns.indptr[rare] : space.columns.indptr[rare + 1]]
        share = min(1.0, SAMPLE / max(len(points), 1))
        if share < 1:
            points = points[np.linspace(0, len(points) - 1, SAMPLE).astype(np.int64)]
        for column in parts:
            if column != rare:
                points = points[_member(space, points, column)]
        rates = np.bincount(space.stratum[points], minlength=strata) / share / sizes
        which = cases.rows[cases.starts[number] : cases.starts[number + 1]]
        filled = slots[which] >= 0
        values = np.where(filled, rates[space.stratum[slots[which]]], 0)
        out[which] = values.sum(1) / np.maximum(filled.sum(1), 1)
        if share < 1:  # a sample may have missed a stratum altogether
            out[which] = np.maximum(out[which], (len(points) / share + 1) / (len(space.rows) + 1))
    return np.minimum(out, 1.0)


def _member(space: Space, points: np.ndarray, column: int) -> np.ndarray:
    """bool[point]: which of some points (ascending) have a pattern."""
    rows = space.columns.indices[space.columns.indptr[column] : space.columns.indptr[column + 1]]
    nearest = np.minimum(np.searchsorted(rows, points), len(rows) - 1)
    return np.asarray(rows[nearest] == points)


def stacked(choices: list[BestPatterns]) -> BestPatterns:
    """The choices of several chunks of sets, one after another."""
    if not choices:
        empty = np.zeros((0, 1))
        return singles(Top(empty.astype(np.int64), empty.astype(np.uint64), empty, empty))
    names = choices[0].__dataclass_fields__
    return BestPatterns(
        **{name: np.concatenate([getattr(choice, name) for choice in choices]) for name in names}
    )


# -- Several words, each of which some triggers end with: what a unit with several meanings may answer to ------

TWICE = 2  # triggers that end with a word of a union, at least
RARE = np.log(0.01)  # the tail of each word of a union, at most


def word_unions(space: Space, slots: np.ndarray, price: float) -> list[tuple[np.ndarray, BestPatterns]]:
    """Which sets i64[case], and their candidates: the word that most surprisingly many triggers end with; the union of
    the (at most four) words that `TWICE` triggers end with and hardly by chance; and that without the least surprising.

    What is surprising is asked of the text as a whole: in its own stratum a common word is one of few. The p-values of
    the candidates take chance at the strata, as all do.

    slots  i64[set, slot]
    price  of each further part, in nats
    """
    owner, column, bits = _last_words(space, slots)
    trials = (slots >= 0).sum(1)
    hits = np.bitwise_count(bits)
    tail = log_binomial_tail(hits, trials[owner], space.rate[column])
    order = np.lexsort((column, tail, owner))
    order = order[(hits[order] >= TWICE) & (tail[order] <= RARE)]
    owner, column, bits = owner[order], column[order], bits[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    owner, column, bits, rank = (values[rank < PARTS[ANY]] for values in (owner, column, bits, rank))
    base = base_of(space, slots, owner, column)
    numbers = np.bincount(owner, minlength=len(slots))
    sizes = (np.minimum(numbers, 1), np.where(numbers > 1, numbers, 0), np.where(numbers > 2, numbers - 1, 0))
    candidates = []
    for size in sizes:
        sets, inside = np.flatnonzero(size), rank < size[owner]
        columns = np.full((len(slots), PARTS[ANY]), -1)
        columns[owner[inside], rank[inside]] = column[inside]
        union = np.zeros(len(slots), np.uint64)
        np.bitwise_or.at(union, owner[inside], bits[inside])
        chance = np.minimum(np.bincount(owner[inside], base[inside], len(slots)), 1)
        log_p = log_binomial_tail(np.bitwise_count(union), trials, chance)
        score = np.minimum(log_p + np.maximum(size - 1, 0) * price, 0)
        how = np.where(size > 1, ANY, SINGLE).astype(np.int8)
        whole = BestPatterns(how, columns, union, chance, log_p, score)
        candidates.append((sets, whole.take(sets)))
    return candidates


def _last_words(space: Space, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Set, column and bits of each pair of a set and a word that some of its triggers end with."""
    sets, slot = np.nonzero(slots >= 0)
    column = space.last_word[slots[sets, slot]]
    known = column >= 0
    sets, slot, column = sets[known], slot[known], column[known]
    pair, pair_of = np.unique(np.stack([sets, column], 1), axis=0, return_inverse=True)
    bits = np.zeros(len(pair), np.uint64)
    np.bitwise_or.at(bits, pair_of.ravel(), np.uint64(1) << slot.astype(np.uint64))
    return pair[:, 0], pair[:, 1], bits
