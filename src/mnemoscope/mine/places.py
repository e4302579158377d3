"""Which positions of a batch count, and which of them go into histograms and samples.

The choice is a hash of ids and nothing else, so it is the same however contexts are batched, sharded or
shared out.

A bin around zero holds |x| < 2^-12. From there, each octave up to 2^12 is cut into four equally wide bins
for each sign, and the outermost bins hold what is larger still. Samples have coarser bins, two octaves
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mnemoscope.mine.kernel import BINS, COARSE_BINS, COARSE_OCTAVES, OCTAVES, SUB_BINS, ZERO_EXPONENT
from mnemoscope.records import ContextBatch
from mnemoscope.text.sampling import splitmix64

HISTOGRAM_EVERY = 8  # one context in so many is counted into histograms and samples
HISTOGRAM_SHARE = 1 / HISTOGRAM_EVERY

_PARTS = 8  # of a batch, reduced apart by as many threads as there are, so that sums never depend on these
_POSITION_BITS = np.uint64(21)


def unmix(x: np.ndarray) -> np.ndarray:
    """The inverse of `splitmix64`."""
    z = x ^ (x >> np.uint64(31)) ^ (x >> np.uint64(62))
    with np.errstate(over="ignore"):
        z = z * np.uint64(pow(0x94D049BB133111EB, -1, 2**64))
        z = (z ^ (z >> np.uint64(27)) ^ (z >> np.uint64(54))) * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 2**64))
    return z ^ (z >> np.uint64(30)) ^ (z >> np.uint64(60))


def selected(contexts: np.ndarray, every: int = HISTOGRAM_EVERY) -> np.ndarray:
    """Whether each context (i64 id) goes into histograms and samples: one of each `every` consecutive ids.

    Every context is as likely as any other, and which are taken depends on nothing but their ids.
    """
    group, member = np.divmod(contexts, every)
    return (splitmix64(group) % np.uint64(every)).astype(np.int64) == member


@dataclass(frozen=True, eq=False)
class CountedPlaces:
    """Where the counted positions of a batch are; the same for all layers.

    rows       i64[counted]          context * tokens + position, ascending
    offsets    i64[context + 1]      where each context begins in `rows`
    parts      contexts, cut into at most _PARTS ranges of about as many rows each
    following  i32[context token]    next token, -1 at the end of a context
    chosen     i64[selected]         those of `rows` whose context is `selected`
    hashes     u64[selected]         of their context and position
    starts     i64[context + 1]      the row at which each context begins, counted or not
    number     i32[context * token]  for each row where it is in `chosen`, or -1
    positions  i32[row]              of the rows of experts, which are some of the batch's; empty: of all
    """

    rows: np.ndarray
    offsets: np.ndarray
    parts: list[tuple[int, int]]
    following: np.ndarray
    chosen: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray
    number: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, batch: ContextBatch, every: int) -> CountedPlaces:
        """The places that count in a batch; one context in `every` goes into histograms and samples."""
        n_contexts, n_tokens = batch.tokens.shape
        assert not batch.counted[:, 0].any(), "position 0 must not count"
        assert ((batch.contexts >= 0) & (batch.contexts < 2**32)).all(), "context ids fill 32 bits"
        assert n_tokens <= 2**21, "positions fill 21 bits"
        rows = np.flatnonzero(batch.counted)
        offsets = np.concatenate([[0], np.cumsum(batch.counted.sum(1))]).astype(np.int64)
        cuts = np.searchsorted(offsets, np.linspace(0, len(rows), _PARTS + 1)[1:-1])
        bounds = np.unique([0, *cuts.tolist(), n_contexts]).tolist()
        following = np.full((n_contexts, n_tokens), -1, np.int32)
        inside = np.arange(1, n_tokens)[None, :] < batch.lengths[:, None]
        following[:, :-1] = np.where(inside, batch.tokens[:, 1:], -1)
        chosen = np.flatnonzero(batch.counted & selected(batch.contexts, every)[:, None])
        context, position = np.divmod(chosen, n_tokens)
        hashes = splitmix64(
            (batch.contexts[context].astype(np.uint64) << _POSITION_BITS) | position.astype(np.uint64)
        )
        number = np.full(batch.tokens.size, -1, np.int32)
        number[chosen] = np.arange(len(chosen))
        starts, positions = np.arange(n_contexts + 1) * n_tokens, np.zeros(0, np.int32)
        return cls(
            rows, offsets, list(pairwise(bounds)), following, chosen, hashes, starts, number, positions
        )


def address_of(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Context i64 and position i32 from `CountedPlaces.hashes`: a bijection can be undone."""
    address = unmix(hashes)
    position = address & ((np.uint64(1) << _POSITION_BITS) - np.uint64(1))
    return (address >> _POSITION_BITS).astype(np.int64), position.astype(np.int32)


# -- The fixed bins of histograms and samples: signed, log-spaced, read off a float's bits ---------------------

_MAGNITUDES = np.concatenate(
    [
        2.0**octave * (1 + np.arange(SUB_BINS) / SUB_BINS)
        for octave in range(ZERO_EXPONENT, ZERO_EXPONENT + OCTAVES)
    ]
)
HISTOGRAM_EDGES = np.concatenate([[-np.inf], -_MAGNITUDES[:0:-1], [-_MAGNITUDES[0]], _MAGNITUDES, [np.inf]])
"""f64[bin + 1], ascending. A bin holds its edge nearer to zero and not the other; the bin around zero holds
neither. The outermost bins have no outer edge."""


def bin_of(x: np.ndarray) -> np.ndarray:
    """The histogram bin (i64) of each finite number: the definition that the kernel follows."""
    size = np.searchsorted(_MAGNITUDES, np.abs(x), side="right")
    return np.where(x < 0, BINS // 2 - size, BINS // 2 + size)


def coarse_bin_of(x: np.ndarray) -> np.ndarray:
    """The bin (i64) of `Samples` for each finite number: ascending; the bin around zero is its own."""
    size = np.searchsorted(_MAGNITUDES[:: COARSE_OCTAVES * SUB_BINS], np.abs(x), side="right")
    return np.where(x < 0, COARSE_BINS // 2 - size, COARSE_BINS // 2 + size)
