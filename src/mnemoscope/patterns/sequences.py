"""Patterns of tokens in order: how a prefix ends, what stood there before, what comes next."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.patterns.columns import Groups, columns, hashed, joined, previous, spans
from mnemoscope.patterns.pattern import Pattern
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import chain

# Which of the last tokens are looked at, oldest first; 0 is the last. Gaps are any token.
PLAIN = ((0,), (1, 0), (2, 1, 0), (3, 2, 1, 0), (4, 3, 2, 1, 0))
GAPPED = ((2, 0), (3, 1, 0), (3, 2, 0))
_NOTHING = np.iinfo(np.int64).max  # a token that no text has


def _hash(values: Sequence[int], offsets: Sequence[int]) -> np.uint64:
    hashes = np.full(1, len(offsets) + 64 * offsets[0], np.uint64)
    for value in values:
        hashes = chain(hashes, np.array([value], np.int64))
    return np.uint64(hashes[0])


def _values(text: Text, head: str) -> np.ndarray:
    return text.tokens if head == "tokens" else text.words.tokens.fold[text.words.tokens.places]


def spelling(text: Text) -> Callable[[int], str | int]:
    """How a token id is written in a spec: as its text where that names it, else as its number."""

    def write(token: int) -> str | int:
        shown = text.vocabulary.pieces([token])[0]
        return shown if shown and text.vocabulary.ids(shown)[:1] == [token] else token

    return write


def written(value: object) -> str:
    """JSON as it stands in specs."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def mine(text: Text, head: str, usable: np.ndarray, least: int) -> tuple[list[str], csc_array, list[int]]:
    """All endings that stand at usable rows of at least `least` documents, with how many tokens each names."""
    specs: list[str] = []
    parts, costs = [], []
    values = _values(text, head)
    names = _spelled(text, head)
    for offsets in PLAIN + GAPPED:
        hashes, reaches = hashed(values, text.position, offsets)
        groups = Groups(hashes, reaches & usable)
        kept = np.flatnonzero(groups.spread(text.document) >= least)
        parts.append(groups.take(kept))
        costs += [len(offsets)] * len(kept)
        rows = groups.rows[groups.starts[kept]]
        gap = itertools.repeat("null")
        each = [names(values[rows - b].tolist()) if b in offsets else gap for b in range(offsets[0], -1, -1)]
        specs += [f"{head}:[{','.join(ending)}]" for ending in zip(*each, strict=False)]
    return specs, joined(parts, len(text)), costs


def _spelled(text: Text, head: str) -> Callable[[list[int]], list[str]]:
    """How values are written in a spec, each worked out once."""
    known: dict[int, str] = {}
    write = spelling(text) if head == "tokens" else text.words.tokens.folded.__getitem__

    def names(values: list[int]) -> list[str]:
        for value in set(values) - known.keys():
            known[value] = written(write(value))
        return [known[value] for value in values]

    return names


def masks(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    """Masks of patterns of one of the families `tokens` and `folded`."""
    head = patterns[0].family
    values = _values(text, head)
    id_of = token_number(text) if head == "tokens" else _fold_number(text)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    wanted: list[np.uint64] = []
    for number, pattern in enumerate(patterns):
        tokens = pattern.arguments
        offsets = tuple(len(tokens) - 1 - i for i, token in enumerate(tokens) if token is not None)
        by_shape.setdefault(offsets, []).append(number)
        wanted.append(_hash([id_of(token) for token in tokens if token is not None], offsets))
    blocks = []
    for offsets, numbers in by_shape.items():
        hashes, reaches = hashed(values, text.position, offsets)
        groups = Groups(hashes, reaches)
        blocks.append(groups.take(groups.find(np.array([wanted[number] for number in numbers], np.uint64))))
    order = np.argsort(np.concatenate([np.array(numbers) for numbers in by_shape.values()]))
    return joined(blocks, len(text))[:, order]


def token_number(text: Text) -> Callable[[str | int], int]:
    """The id of a token written as in a spec; one that the vocabulary lacks is a `QueryError`."""
    return lambda token: token if isinstance(token, int) else text.vocabulary.find(token)[0]


def _fold_number(text: Text) -> Callable[[str], int]:
    known = {name: number for number, name in enumerate(text.words.tokens.folded)}
    return lambda folded: known.get(folded, _NOTHING)


def following(text: Text) -> tuple[np.ndarray, np.ndarray]:
    """i64[prefix]: the token after each row, and after the last earlier row with the same last token; -1 if none."""
    after = np.full(len(text), -1, np.int64)
    after[:-1] = np.where(text.position[1:] > 0, text.tokens[1:], -1)
    earlier = previous(text, (0,))
    return after, np.where(earlier >= 0, after[earlier], -1)


def mine_codes(
    text: Text, codes: np.ndarray, usable: np.ndarray, least: int, write: Callable[[int], str]
) -> tuple[list[str], csc_array]:
    """One pattern for each code (-1 is none) that stands at usable rows of at least `least` documents."""
    groups = Groups(codes, usable & (codes >= 0))
    kept = np.flatnonzero(groups.spread(text.document) >= least)
    return [write(int(code)) for code in groups.codes[kept]], groups.take(kept)


def masks_codes(text: Text, codes: np.ndarray, wanted: Sequence[int]) -> csc_array:
    """The masks of some codes; -1 is one that does not occur."""
    if not len(wanted):
        return columns(np.zeros(1, np.int64), np.zeros(0), len(text))
    groups = Groups(codes, codes >= 0)
    numbers = np.asarray(wanted, np.int64)
    return groups.take(np.where(numbers >= 0, groups.find(numbers), -1))


# -- Words within a window, as intervals: each occurrence of a word covers the rows after it -------------------


def intervals(text: Text, codes: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """i64[prefix], i64[prefix]: first row and size of what an occurrence covers that ends at each row.

    codes   the word (or class) of each row, -1 none. Intervals of one code never overlap. A word that goes on
            in the next token counts at its own row alone: "river" of "rivers" was never a word.
    """
    rows = np.arange(len(text))
    last = text.end if window is None else np.minimum(rows + window, text.end)
    last = np.where(text.words.ends, last, rows + 1)
    valid = np.flatnonzero(codes >= 0)
    order = valid[np.argsort(codes[valid], kind="stable")]
    begin, stop = order.copy(), last[order]
    # An occurrence begins where the reach of the earlier ones of its code and context ends, if that is later.
    key = codes[order].astype(np.int64)
    same = np.zeros(len(order), bool)
    same[1:] = (key[1:] == key[:-1]) & (text.first[order][1:] == text.first[order][:-1])
    run = np.cumsum(~same)  # a running maximum inside each part: parts are kept apart by an offset
    reach = np.maximum.accumulate(stop + run * len(text)) - run * len(text) if len(order) else stop
    begin[1:] = np.where(same[1:], np.maximum(begin[1:], reach[:-1]), begin[1:])
    first, size = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
    first[order], size[order] = begin, np.maximum(stop - begin, 0)
    return first, size


def covered(
    text: Text, codes: np.ndarray, window: int | None, groups: Groups, chosen: np.ndarray
) -> csc_array:
    """bool[prefix, code]: the rows within the window after the words of each chosen group (-1: none)."""
    first, size = intervals(text, codes, window)
    known = chosen >= 0
    begin = np.where(known, groups.starts[chosen], 0)
    count = np.where(known, groups.starts[chosen + 1] - begin, 0)
    rows = groups.rows[spans(begin, count)]
    ends = np.concatenate([[0], np.cumsum(size[rows])])
    starts = ends[np.concatenate([[0], np.cumsum(count)])]
    return columns(starts, spans(first[rows], size[rows]), len(text))


def sizes(text: Text, codes: np.ndarray, window: int | None, groups: Groups) -> np.ndarray:
    """i64[group]: how many rows each group covers, found without laying them out."""
    _, size = intervals(text, codes, window)
    return (
        np.add.reduceat(size[groups.rows], groups.starts[:-1]) if len(groups.rows) else np.zeros(0, np.int64)
    )


def word_masks(text: Text, words: Sequence[str], window: int | None) -> csc_array:
    """A mask for each word (case-folded) with one window."""
    known = {word: number for number, word in enumerate(text.words.folded)}
    codes = text.words.word.astype(np.int64)
    groups = Groups(codes, np.ones(len(text), bool))
    chosen = groups.find(np.array([known.get(word, -1) for word in words], np.int64))
    return covered(text, codes, window, groups, chosen)


def any_of(text: Text, lists: Sequence[Sequence[str]], window: int | None) -> csc_array:
    """A mask for each list of words: any of them within the window."""
    words = list(dict.fromkeys(word for listed in lists for word in listed))
    return (word_masks(text, words, window).astype(np.int32) @ _members(words, lists)) > 0


def at_least(text: Text, lists: Sequence[Sequence[str]], counts: Sequence[int]) -> csc_array:
    """A mask for each list of words: at least so many different ones so far."""
    words = list(dict.fromkeys(word for listed in lists for word in listed))
    counted = csc_array(word_masks(text, words, None).astype(np.int32) @ _members(words, lists))
    enough = counted.data >= np.repeat(np.asarray(counts), np.diff(counted.indptr))
    counted.data = enough.astype(np.int32)
    counted.eliminate_zeros()
    counted.sort_indices()
    return counted.astype(bool)


def _members(words: Sequence[str], lists: Sequence[Sequence[str]]) -> csc_array:
    row_of = {word: number for number, word in enumerate(words)}
    rows = np.array([row_of[word] for listed in lists for word in listed], np.int64)
    starts = np.concatenate([[0], np.cumsum([len(listed) for listed in lists])])
    return csc_array((np.ones(len(rows), np.int32), rows, starts), shape=(len(words), len(lists)))
