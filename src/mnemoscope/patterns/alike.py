"""Patterns that are the same on a text: one class, shown with all its names.

Equal masks are found by a hash of each column, masks with a Jaccard index above a bound by MinHash (Broder 1997) and
then compared exactly. The simplest member stands for its class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.patterns.columns import Groups
from mnemoscope.patterns.split import mixed

JACCARD = 0.95
HASHES, BAND = 12, 3  # of two masks at .95, one in 2,000 shares none of the bands


def representatives(
    found: csc_array, costs: Sequence[int] | np.ndarray, jaccard: float = JACCARD
) -> np.ndarray:
    """i64[column]: the column that stands for each one, itself if it stands for itself; empty ones alone.

    costs   the cheapest column of a class stands for it; of equals the first
    """
    sizes = np.diff(found.indptr)
    order = np.lexsort((np.arange(len(sizes)), np.asarray(costs)))
    out = _equal(found, sizes, order)
    if jaccard < 1:
        kept = np.flatnonzero((out == np.arange(len(out))) & (sizes > 0))
        nearly = _near(found, sizes, kept, np.argsort(order), jaccard)
        out = nearly[out]
    return out


def _equal(found: csc_array, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Columns with the same rows, by the sum of their rows' hashes modulo 2^64."""
    out = np.arange(len(sizes))
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return out
    with np.errstate(over="ignore"):
        sums = np.add.reduceat(mixed(np.arange(found.shape[0]), 7)[found.indices], found.indptr[filled])
        codes = np.zeros(len(sizes), np.uint64)
        codes[filled] = mixed(sums.view(np.int64)) ^ sizes[filled].astype(np.uint64)
    place = np.argsort(order)
    by_cost = Groups(codes[order], sizes[order] > 0)
    for_group = order[by_cost.rows[by_cost.starts[:-1]]]
    out[order[by_cost.rows]] = np.repeat(for_group, np.diff(by_cost.starts))
    assert (place[out] <= place).all()
    return out


def _near(
    found: csc_array, sizes: np.ndarray, kept: np.ndarray, place: np.ndarray, jaccard: float
) -> np.ndarray:
    out = np.arange(len(sizes))
    pairs = _candidates(found, kept)
    near = sizes[pairs]
    likely = near.min(1) > jaccard * near.max(1)
    pairs = pairs[likely]
    first = np.where(place[pairs[:, 0]] < place[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    second = pairs.sum(1) - first
    for a, b in sorted(
        zip(first.tolist(), second.tolist(), strict=True), key=lambda p: (place[p[0]], place[p[1]])
    ):
        if out[a] == a and out[b] == b and _overlap(found, a, b) > jaccard:
            out[b] = a
    return out


def _candidates(found: csc_array, kept: np.ndarray) -> np.ndarray:
    """i64[pair, 2]: columns that share a band of their signatures, each with the first that has it and the next."""
    starts = found.indptr[kept]
    signatures = np.empty((HASHES, len(kept)), np.uint64)
    for number in range(HASHES):
        scattered = mixed(np.arange(found.shape[0]), 100 + number)
        signatures[number] = np.minimum.reduceat(scattered[found.indices], starts) if len(kept) else 0
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(0, HASHES, BAND):
        keys = signatures[band]
        for row in signatures[band + 1 : band + BAND]:
            keys = mixed((keys ^ (row >> np.uint64(1))).view(np.int64))
        groups = Groups(keys, np.ones(len(keys), bool))
        members = kept[groups.rows]
        place = np.repeat(np.arange(len(groups.codes)), np.diff(groups.starts))
        leader = members[groups.starts[place]]
        pairs.append(np.stack([leader, members], 1)[leader != members])
        same = place[1:] == place[:-1]
        pairs.append(np.stack([members[:-1], members[1:]], 1)[same])
    return np.unique(np.concatenate(pairs), axis=0)


def _overlap(found: csc_array, a: int, b: int) -> float:
    """The Jaccard index of two columns."""
    one, two = (found.indices[found.indptr[c] : found.indptr[c + 1]] for c in (a, b))
    both = len(np.intersect1d(one, two, assume_unique=True))
    return both / max(len(one) + len(two) - both, 1)
