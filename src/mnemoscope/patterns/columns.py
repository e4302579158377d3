"""Sets of rows as columns of a sparse matrix, and rows that end alike: nothing but one code for each row is sorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csc_array, hstack

from mnemoscope.text.sampling import chain

if TYPE_CHECKING:
    from mnemoscope.run.text import Text


def columns(starts: np.ndarray, rows: np.ndarray, height: int) -> csc_array:
    """bool[row, column] whose column `i` is `rows[starts[i] : starts[i + 1]]` (ascending, none twice)."""
    rows = np.asarray(rows, np.int32)
    return csc_array((np.ones(len(rows), bool), rows, starts), shape=(height, len(starts) - 1))


def from_flags(flags: Sequence[np.ndarray], height: int) -> csc_array:
    """One column for each bool[row]."""
    rows_by_flag = [np.flatnonzero(flag) for flag in flags]
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows in rows_by_flag])]).astype(np.int64)
    return columns(starts, np.concatenate([*rows_by_flag, np.zeros(0, np.int64)]), height)


def joined(parts: Sequence[csc_array], height: int) -> csc_array:
    """Columns side by side."""
    parts = [block for block in parts if block.shape[1]]
    return hstack(parts, format="csc") if parts else columns(np.zeros(1, np.int64), np.zeros(0), height)


class Groups:
    """Rows by their code: which rows share one, and in how many documents."""

    def __init__(self, codes: np.ndarray, valid: np.ndarray) -> None:
        rows = np.flatnonzero(valid)
        self.height = len(codes)
        self.rows = rows[np.argsort(codes[rows], kind="stable")]
        ordered = codes[self.rows]
        new = np.ones(len(rows), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        self.starts = np.append(np.flatnonzero(new), len(rows))
        self.codes = ordered[self.starts[:-1]]

    def spread(self, documents: np.ndarray) -> np.ndarray:
        """i64[group]: different documents."""
        if not len(self.rows):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.by_document(documents)[1].astype(np.int64), self.starts[:-1])

    def by_document(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64[row], the rows with those of a document as neighbours in each group, and bool[row], where a document
        begins in a group. Near-duplicates are one document, and lie apart in the text."""
        rows = self.rows
        if (np.diff(documents) < 0).any():
            group = np.repeat(np.arange(len(self.codes)), np.diff(self.starts))
            rows = rows[np.lexsort((documents[rows], group))]
        ordered = documents[rows]
        new = np.ones(len(ordered), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        new[self.starts[:-1]] = True
        return rows, new

    def take(self, groups: np.ndarray) -> csc_array:
        """A column for each group; -1 is an empty one."""
        known = groups >= 0
        first = np.where(known, self.starts[groups], 0)
        size = np.where(known, self.starts[groups + 1] - first, 0)
        return columns(np.concatenate([[0], np.cumsum(size)]), self.rows[spans(first, size)], self.height)

    def find(self, codes: np.ndarray) -> np.ndarray:
        """i64[code]: its group, or -1."""
        if not len(self.codes):
            return np.full(len(codes), -1)
        group = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[group] == codes, group, -1)


def spans(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """i64[sum of sizes]: first[0], first[0] + 1, ..., one run after another."""
    if not len(first):
        return np.zeros(0, np.int64)
    before = np.cumsum(size) - size
    return np.arange(int(size.sum())) + np.repeat(first - before, size)


def hashed(values: np.ndarray, position: np.ndarray, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """u64[prefix], bool[prefix]: hash of the values at these offsets, and whether the context reaches so far."""
    hashes = np.full(len(values), len(offsets) + 64 * offsets[0], np.uint64)
    for offset in offsets:
        shifted = np.zeros(len(values), np.int64)
        shifted[offset:] = values[: len(values) - offset]
        hashes = chain(hashes, shifted)
    return hashes, position >= offsets[0]


def previous(text: Text, offsets: Sequence[int]) -> np.ndarray:
    """i64[prefix]: the last earlier row of the context that ends with the same tokens, or -1."""
    hashes, reaches = hashed(text.tokens, text.position, offsets)
    order = np.lexsort((np.arange(len(text)), hashes, text.first))
    same = (hashes[order][1:] == hashes[order][:-1]) & (text.first[order][1:] == text.first[order][:-1])
    out = np.full(len(text), -1, np.int64)
    out[order[1:][same]] = order[:-1][same]
    return np.where(reaches & (out - text.first >= offsets[0]), out, -1)
