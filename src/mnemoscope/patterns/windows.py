"""Words within a window, as intervals: each occurrence of a word covers the rows after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.patterns.columns import Groups, columns, spans
from mnemoscope.patterns.text import Text


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
    part = np.cumsum(~same)  # a running maximum inside each part: parts are kept apart by an offset
    reach = np.maximum.accumulate(stop + part * len(text)) - part * len(text) if len(order) else stop
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
    words = list(dict.fromkeys(word for some in lists for word in some))
    return (word_masks(text, words, window).astype(np.int32) @ _members(words, lists)) > 0


def at_least(text: Text, lists: Sequence[Sequence[str]], counts: Sequence[int]) -> csc_array:
    """A mask for each list of words: at least so many different ones so far."""
    words = list(dict.fromkeys(word for some in lists for word in some))
    found = csc_array(word_masks(text, words, None).astype(np.int32) @ _members(words, lists))
    enough = found.data >= np.repeat(np.asarray(counts), np.diff(found.indptr))
    found.data = enough.astype(np.int32)
    found.eliminate_zeros()
    found.sort_indices()
    return found.astype(bool)


def _members(words: Sequence[str], lists: Sequence[Sequence[str]]) -> csc_array:
    place = {word: number for number, word in enumerate(words)}
    rows = np.array([place[word] for some in lists for word in some], np.int64)
    starts = np.concatenate([[0], np.cumsum([len(some) for some in lists])])
    return csc_array((np.ones(len(rows), np.int32), rows, starts), shape=(len(words), len(lists)))
