"""Which half of the documents a document belongs to: one to discover on, one to test on.

The half depends on the id of the document and nothing else, so that it is the same for every question asked of a
run, whatever was asked before (testing on examples used for discovery certifies anything).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemoscope.errors import PatternError

LEAST = 8  # documents in each half


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


def halves(documents: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the documents to discover on and of those to test on, ascending; `PatternError` if either half
    has fewer than `LEAST`."""
    ids = np.unique(documents)
    test = half(ids, seed)
    if min(test.sum(), (~test).sum()) < LEAST:
        raise PatternError(
            f"splitting {len(ids)} documents into one half to discover on ({(~test).sum()}) and one to test on "
            f"({test.sum()}): each needs at least {LEAST}; build the run on more documents"
        )
    return ids[~test], ids[test]
