"""Which documents of a text are read: a sample when there are more than can be, or the half that a question is for.

Documents stand in an order (subjects, years, authors), so that the first ones are no sample of the whole; and one that
is long must not keep the others out. They are drawn by a hash, and share a budget.

The half to discover on or to test on depends on the id of a document and nothing else, so that it is the same for every
question asked of a run, whatever was asked before (testing on examples used for discovery certifies anything). Where
documents are nearly copies of each other, that is the id of the first of them (`patterns.duplicates`).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

LEAST = 16  # documents that a budget is meant to reach: none of them takes more, while others could have it


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


class DrawnDocuments(NamedTuple):
    """Documents in a drawn order: their places in the text, and whether that is all of them."""

    places: list[int]
    complete: bool


def draw(documents: Iterable[_HasText], characters: int) -> DrawnDocuments:
    """The documents of the smallest hashes of place and text, until they hold so many characters.

    A document counts as `characters` / LEAST at most, so that there are as many of long ones. Memory grows with what
    is drawn and not with the text.
    """
    heap: list[tuple[int, int, int]] = []  # (hash, place, characters), the largest hash on top
    most, total, complete = max(1, characters // LEAST), 0, True
    for place, document in enumerate(documents):
        size = min(len(document.text), most)
        heapq.heappush(heap, (-_hash(place, document.text), place, size))
        total += size
        while total - heap[0][2] >= characters:
            total -= heapq.heappop(heap)[2]
            complete = False
    return DrawnDocuments([place for _, place, _ in sorted(heap, reverse=True)], complete)


def _hash(place: int, text: str) -> int:
    key = place.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=key).digest())


def share(contexts: Sequence[np.ndarray], budget: int, least: int = LEAST) -> np.ndarray:
    """i64[document]: how many contexts of each document to read, from its first.

    contexts  i64[context] for each document, in the order in which they are drawn: tokens of its contexts
    budget    tokens, which only the first context of the first document may exceed

    A document that does not fit is passed over, and those after it are not. Of long ones a part is read, up to
    1 / `least` of the budget; what is left then goes to them in turn. No context that would still fit is left out.
    """
    taken, left = np.zeros(len(contexts), np.int64), budget
    for place, lengths in enumerate(contexts):
        count = within(lengths, budget // least)
        tokens = int(lengths[:count].sum())
        if tokens <= left:
            taken[place], left = count, left - tokens
    for place, lengths in enumerate(contexts):
        if not left:
            break
        more = int(np.searchsorted(np.cumsum(lengths[taken[place] :]), left, "right"))
        left -= int(lengths[taken[place] : taken[place] + more].sum())
        taken[place] += more
    if not taken.any():
        taken[:1] = [min(1, len(lengths)) for lengths in contexts[:1]]
    return taken


def wished(contexts: Sequence[np.ndarray], budget: int, least: int = LEAST) -> int:
    """Tokens that documents give before any of them gives more than its part: see `share`."""
    return sum(int(lengths[: within(lengths, budget // least)].sum()) for lengths in contexts)


def within(lengths: np.ndarray, tokens: int) -> int:
    """How many contexts of a document are within so many tokens; at least one, if it has any."""
    return max(int(np.searchsorted(np.cumsum(lengths), tokens, "right")), min(1, len(lengths)))


# -- Halves, and the hash of integers that they are drawn by ----------------------------------------------------


def half(documents: np.ndarray, seed: int = 0) -> np.ndarray:
    """bool[...]: True where a document belongs to the test half; a fair coin for each document id."""
    return (mixed(documents, seed) >> np.uint64(63)).astype(bool)


def splitmix64(values: Any) -> np.ndarray:
    """u64[...]: a bijection of 64-bit integers that leaves no visible order (SplitMix64; Steele et al. 2014)."""
    bits = np.asarray(values).astype(np.uint64)
    with np.errstate(over="ignore"):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def mixed(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """u64[...]: integers scattered over 64 bits, one to one, another way for each seed."""
    with np.errstate(over="ignore"):
        bits = np.asarray(values).astype(np.int64).view(np.uint64)
        return splitmix64(bits + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * seed + 1))


def chain(hashes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """u64[...]: the hash of a sequence made longer by one value."""
    with np.errstate(over="ignore"):
        return mixed(
            (hashes * np.uint64(0x100000001B3) + np.asarray(values).astype(np.uint64)).view(np.int64)
        )
