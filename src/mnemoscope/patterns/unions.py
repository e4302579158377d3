"""Several words, each of which some triggers end with: what a unit with several meanings may answer to.

Beam search asks three triggers of every part, and takes the part with the smallest tail, which may be a wider one
(*called* within 16 tokens for *called*: where the triggers stand the narrower is the commoner of the two). A unit that
answers to four words shows the rarest of them once or twice among 25 triggers. Here the words that end triggers are
taken one by one, and so the plain word and the union of words are candidates too; the whole distribution of the
discovery half decides between them and the rest.
"""

from __future__ import annotations

import numpy as np

from mnemoscope.patterns.combine import ANY, PARTS, SINGLE, Choice
from mnemoscope.patterns.score import base_of
from mnemoscope.patterns.space import Space
from mnemoscope.patterns.tails import log_binomial_tail

TWICE = 2  # triggers that end with a word of a union, at least
RARE = np.log(0.01)  # the tail of each word of a union, at most


def word_unions(space: Space, slots: np.ndarray, price: float) -> list[tuple[np.ndarray, Choice]]:
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
    owner, column, bits, rank = (part[rank < PARTS[ANY]] for part in (owner, column, bits, rank))
    base = base_of(space, slots, owner, column)
    numbers = np.bincount(owner, minlength=len(slots))
    sizes = (np.minimum(numbers, 1), np.where(numbers > 1, numbers, 0), np.where(numbers > 2, numbers - 1, 0))
    found = []
    for size in sizes:
        here, mine = np.flatnonzero(size), rank < size[owner]
        columns = np.full((len(slots), PARTS[ANY]), -1)
        columns[owner[mine], rank[mine]] = column[mine]
        union = np.zeros(len(slots), np.uint64)
        np.bitwise_or.at(union, owner[mine], bits[mine])
        chance = np.minimum(np.bincount(owner[mine], base[mine], len(slots)), 1)
        log_p = log_binomial_tail(np.bitwise_count(union), trials, chance)
        score = np.minimum(log_p + np.maximum(size - 1, 0) * price, 0)
        how = np.where(size > 1, ANY, SINGLE).astype(np.int8)
        whole = Choice(how, columns, union, chance, log_p, score)
        found.append((here, whole.take(here)))
    return found


def _last_words(space: Space, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Set, column and bits of each pair of a set and a word that some of its triggers end with."""
    sets, slot = np.nonzero(slots >= 0)
    column = space.last_word[slots[sets, slot]]
    known = column >= 0
    sets, slot, column = sets[known], slot[known], column[known]
    pair, place = np.unique(np.stack([sets, column], 1), axis=0, return_inverse=True)
    bits = np.zeros(len(pair), np.uint64)
    np.bitwise_or.at(bits, place.ravel(), np.uint64(1) << slot.astype(np.uint64))
    return pair[:, 0], pair[:, 1], bits
