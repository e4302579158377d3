"""Compiled loops over coefficients; each is told slowly in the tests, and this package is the only caller.

All take coefficients as a matrix ``[row, neuron]``, a row being one position of one context of a batch:
float32, or bfloat16 as its 16 bits. They release the GIL, so that a few threads can each take a part of the
work; the parts are fixed by the data, never by the number of threads, and so are the results.

Three things make `reduce_contexts` fast. Whole rows are read in order, because strips of rows defeat the
prefetcher (2 to 4 times slower). Four rows are taken at a time, so that the running values travel between
registers and cache a quarter as often. These running values lie in few flat arrays at fixed distances,
because the compiler gives up on vectorising a loop when it would have to ask of too many pairs of arrays
whether they overlap.

No `fastmath`: it would let the compiler assume that NaN and infinity do not occur, and finding them is part
of the work. Nor is contraction to fused multiply-add allowed: it saves nothing that can be measured, and
without it every processor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

ZERO_EXPONENT = -12  # magnitudes below 2 ** -12 share the zero bin
OCTAVES = 24  # from 2 ** -12 to 2 ** 12
SUB_BINS = 4  # in an octave, equally wide
BINS = 2 * OCTAVES * SUB_BINS + 1
COARSE_OCTAVES = 2  # in a coarse bin
COARSE_BINS = 2 * OCTAVES // COARSE_OCTAVES + 1
SPREADER = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it loses nothing
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)

STRIP = 1536  # neurons whose running values are kept at once
_STRIDE = STRIP + 16  # not a power of two, which would map all running values to the same cache lines

SIDE = OCTAVES * SUB_BINS  # bins of one sign
# Exponent and top mantissa bits of a magnitude, less these, are its bin from the middle: 1 for 2 ** ZERO_EXPONENT.
FIRST_SIZE = (127 + ZERO_EXPONENT) * SUB_BINS - 1
_PER_COARSE = COARSE_OCTAVES * SUB_BINS
# The coarse bin of each bin: pairs of octaves counted outwards from the bin around zero.
_OUTWARDS = -(-np.arange(SIDE + 1) // _PER_COARSE)
COARSE = (COARSE_BINS // 2 + np.concatenate([-_OUTWARDS[:0:-1], _OUTWARDS])).astype(np.uint8)
_TILE = 128  # rows whose bins fit the first-level cache while one neuron after another is done


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile on first call and keep the result on disk; where that cannot be, compile in every process."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to cache in
        return njit(nogil=True)(function)


def widen(x: Any) -> Any:
    """A coefficient as float32."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen, inline="always")
def _widen(x):  # type: ignore[no-untyped-def]  # numba wants the very signature of the lambdas
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@_compiled
def _load(values, row, start, width, place, floats):  # type: ignore[no-untyped-def]
    # Slices, because an index that the compiler cannot see to be positive may wrap around, and is not vectorised.
    source, target = values[row][start : start + width], floats[place : place + width]
    for j in range(width):
        target[j] = widen(source[j])


@_compiled
def _extremes_of_four(floats, whole, width, t0, t1, t2, t3):  # type: ignore[no-untyped-def]
    """Running maximum, minimum, their positions, positive counts; strict comparison keeps the first of equals."""
    for j in range(width):
        x0, x1 = floats[2 * _STRIDE + j], floats[3 * _STRIDE + j]
        x2, x3 = floats[4 * _STRIDE + j], floats[5 * _STRIDE + j]
        best, at = floats[j], whole[j]
        at = t0 if x0 > best else at
        best = x0 if x0 > best else best
        at = t1 if x1 > best else at
        best = x1 if x1 > best else best
        at = t2 if x2 > best else at
        best = x2 if x2 > best else best
        at = t3 if x3 > best else at
        best = x3 if x3 > best else best
        floats[j], whole[j] = best, at
        best, at = floats[_STRIDE + j], whole[_STRIDE + j]
        at = t0 if x0 < best else at
        best = x0 if x0 < best else best
        at = t1 if x1 < best else at
        best = x1 if x1 < best else best
        at = t2 if x2 < best else at
        best = x2 if x2 < best else best
        at = t3 if x3 < best else at
        best = x3 if x3 < best else best
        floats[_STRIDE + j], whole[_STRIDE + j] = best, at
        whole[2 * _STRIDE + j] += np.int32(x0 > 0) + np.int32(x1 > 0) + np.int32(x2 > 0) + np.int32(x3 > 0)


@_compiled
def _powers_of_four(floats, sums, width):  # type: ignore[no-untyped-def]
    for j in range(width):
        pivot = np.float64(floats[6 * _STRIDE + j])
        x0, x1 = np.float64(floats[2 * _STRIDE + j]) - pivot, np.float64(floats[3 * _STRIDE + j]) - pivot
        x2, x3 = np.float64(floats[4 * _STRIDE + j]) - pivot, np.float64(floats[5 * _STRIDE + j]) - pivot
        q0, q1, q2, q3 = x0 * x0, x1 * x1, x2 * x2, x3 * x3
        sums[j] += (x0 + x1) + (x2 + x3)
        sums[_STRIDE + j] += (q0 + q1) + (q2 + q3)
        sums[2 * _STRIDE + j] += (q0 * x0 + q1 * x1) + (q2 * x2 + q3 * x3)
        sums[3 * _STRIDE + j] += (q0 * q0 + q1 * q1) + (q2 * q2 + q3 * q3)


@_compiled
def _take_one(floats, whole, sums, width, t):  # type: ignore[no-untyped-def]
    """What the two functions above do, for the rows that are left over."""
    for j in range(width):
        x = floats[2 * _STRIDE + j]
        whole[j] = t if x > floats[j] else whole[j]
        floats[j] = x if x > floats[j] else floats[j]
        whole[_STRIDE + j] = t if x < floats[_STRIDE + j] else whole[_STRIDE + j]
        floats[_STRIDE + j] = x if x < floats[_STRIDE + j] else floats[_STRIDE + j]
        whole[2 * _STRIDE + j] += np.int32(x > 0)
        y = np.float64(x) - np.float64(floats[6 * _STRIDE + j])
        q = y * y
        sums[j] += y
        sums[_STRIDE + j] += q
        sums[2 * _STRIDE + j] += q * y
        sums[3 * _STRIDE + j] += q * q


@_compiled
def reduce_contexts(  # type: ignore[no-untyped-def]
    values,
    rows,
    offsets,
    tokens,
    first,
    last,
    pivot,
    maximum,
    maximum_at,
    minimum,
    minimum_at,
    sums,
    positive,
):
    """Reduce contexts ``first <= c < last``: each to its extremes, all to power sums and positive counts.

    values      [row, neuron]       coefficients
    rows        i64[counted]        rows that count, context by context
    offsets     i64[context + 1]    where each context begins in `rows`
    tokens      int                 positions in a context: row = context * tokens + position
    pivot       f32[neuron]         power sums are of (coefficient - pivot)
    maximum     f32[context neuron] out; -inf when no position counts; `minimum` likewise with inf
    maximum_at  i32[context neuron] out: the first position that has it, -1 when no position counts
    sums        f64[4 neuron]       out: sums of the first to fourth power
    positive    i64[neuron]         out: coefficients above 0
    """
    floats = np.empty(7 * _STRIDE, np.float32)  # maximum, minimum, four rows, pivot
    whole = np.empty(3 * _STRIDE, np.int32)  # where the maximum is, where the minimum is, positive
    powers = np.empty(4 * _STRIDE)
    neurons = values.shape[1]
    for start in range(0, neurons, STRIP):
        width = min(STRIP, neurons - start)
        stop = start + width
        whole[2 * _STRIDE : 2 * _STRIDE + width] = 0
        for power in range(4):
            powers[power * _STRIDE : power * _STRIDE + width] = 0.0
        floats[6 * _STRIDE : 6 * _STRIDE + width] = pivot[start:stop]
        for c in range(first, last):
            # Of few neurons: the rest of the strip would take longer to fill than their rows to read.
            floats[:width], floats[_STRIDE : _STRIDE + width] = -np.inf, np.inf
            whole[:width], whole[_STRIDE : _STRIDE + width] = -1, -1
            i, end, zero = offsets[c], offsets[c + 1], c * tokens
            while i + 4 <= end:
                for k in range(4):
                    _load(values, rows[i + k], start, width, (2 + k) * _STRIDE, floats)
                t0, t1 = np.int32(rows[i] - zero), np.int32(rows[i + 1] - zero)
                t2, t3 = np.int32(rows[i + 2] - zero), np.int32(rows[i + 3] - zero)
                _extremes_of_four(floats, whole, width, t0, t1, t2, t3)
                _powers_of_four(floats, powers, width)
                i += 4
            while i < end:
                _load(values, rows[i], start, width, 2 * _STRIDE, floats)
                _take_one(floats, whole, powers, width, np.int32(rows[i] - zero))
                i += 1
            maximum[c, start:stop], minimum[c, start:stop] = floats[:width], floats[_STRIDE : _STRIDE + width]
            maximum_at[c, start:stop], minimum_at[c, start:stop] = (
                whole[:width],
                whole[_STRIDE : _STRIDE + width],
            )
        positive[start:stop] = whole[2 * _STRIDE : 2 * _STRIDE + width]
        for power in range(4):
            sums[power, start:stop] = powers[power * _STRIDE : power * _STRIDE + width]


@_compiled
def assign_bins(values, rows, first, last, bins):  # type: ignore[no-untyped-def]
    """The histogram bin of each coefficient of rows ``first <= i < last``.

    values  [row, neuron]
    rows    i64[selected]
    bins    u8[selected neuron]  out
    """
    neurons = values.shape[1]
    # Constants of 32 bits, lest the whole loop be done in 64.
    mask, shift, first_size = np.int32(0x7FFFFFFF), np.int32(21), np.int32(FIRST_SIZE)
    none, side = np.int32(0), np.int32(SIDE)
    for i in range(first, last):
        source, target = values[rows[i]], bins[i]
        for j in range(neurons):
            bits = np.float32(widen(source[j])).view(np.int32)
            size = np.int32(((bits & mask) >> shift) - first_size)
            size = none if size < none else side if size > side else size
            target[j] = np.uint8(side - size if bits < none else side + size)


@_compiled
def count(bins, start, stop, counts):  # type: ignore[no-untyped-def]
    """Add the bins u8[selected neuron] of neurons ``start <= n < stop`` to counts i32[neuron bin]."""
    for first in range(0, len(bins), _TILE):
        tile = bins[first : first + _TILE, start:stop]
        for j in range(stop - start):
            histogram = counts[start + j]
            for i in range(len(tile)):
                histogram[tile[i, j]] += 1


@_compiled
def sample(values, rows, bins, hashes, following, start, stop, salt, key, coefficient, next_token):  # type: ignore[no-untyped-def]
    """Keep in each coarse bin the position with the least key, for neurons ``start <= n < stop``.

    values       [row, neuron]
    rows         i64[selected]
    bins         u8[selected neuron]  of `assign_bins`
    hashes       u64[selected]        of the context and position of each of these rows
    following    i32[selected]        next token, -1 at the end of a context
    salt         u64[neuron]          a key is (hash xor salt) * SPREADER
    key, coefficient, next_token  u64, f32, i32 [neuron bin]  in, out; key is EMPTY where there is none
    """
    for first in range(0, len(rows), _TILE):
        tile, mixed = bins[first : first + _TILE, start:stop], hashes[first : first + _TILE]
        for j in range(stop - start):
            least, neuron_salt = key[start + j], salt[start + j]
            for i in range(len(tile)):
                coarse = COARSE[tile[i, j]]
                candidate = (mixed[i] ^ neuron_salt) * SPREADER
                if candidate < least[coarse]:
                    least[coarse] = candidate
                    coefficient[start + j, coarse] = widen(values[rows[first + i], start + j])
                    next_token[start + j, coarse] = following[first + i]


@_compiled
def _insert(key, what, word, payload):  # type: ignore[no-untyped-def]
    i = len(key) - 1
    while i > 0 and key[i - 1] < word:
        key[i], what[i] = key[i - 1], what[i - 1]
        i -= 1
    key[i], what[i] = word, payload


@_compiled
def _insert_weighted(key, what, weight, word, payload, carried):  # type: ignore[no-untyped-def]
    i = len(key) - 1
    while i > 0 and key[i - 1] < word:
        key[i], what[i], weight[i] = key[i - 1], what[i - 1], weight[i - 1]
        i -= 1
    key[i], what[i], weight[i] = word, payload, carried


@_compiled
def _sign(x):  # type: ignore[no-untyped-def]
    """0, 1, 2 for negative, zero, positive; without a branch, which would have to wait for x to come from memory."""
    return np.uint64(np.uint64(x >= 0) + np.uint64(x > 0))


@_compiled
def rank(  # type: ignore[no-untyped-def]
    polarity, extreme, at, contexts, following, gate, up, gated, positions, weights,
    start, stop, threshold, key, what, weight,
):  # fmt: skip
    """Enter the extremes of a batch into the sorted lists of neurons ``start <= n < stop``.

    polarity   f32, 1 or -1
    extreme    f32[context neuron]  largest, or most negative
    at         i32[context neuron]  its position, or its row
    contexts   i64[context]         below 2 ** 32
    following  i32[context token]   next token, -1 at the end of a context
    gate, up   [row, neuron]        pre-activations, unread unless `gated`
    positions  i32[row]             of the rows of experts, which `at` and `gate` are in; empty: of all
    weights    f32[row]             of the router, of the rows of experts; empty: none
    threshold  f32[neuron]          in, out: |coefficients| below do not enter, nor does 0
    key, what  u64[neuron rank]     in, out: descending; see `triggers.Triggers`
    weight     f32[neuron rank]     in, out: of the router; or f32[neuron 0]
    """
    entering, payloads = np.empty(stop - start, np.int64), np.empty(stop - start, np.uint64)
    weighted = weight.shape[1] > 0
    carried = np.full(stop - start if weighted else 0, np.nan, np.float32)
    for c in range(len(contexts)):
        hits = 0
        for j in range(start, stop):
            x = extreme[c, j] * polarity
            entering[hits] = j
            hits += (x > 0) & (x >= threshold[j])
        # All places are looked up before anything is entered, so that the processor can wait for many at a time.
        for i in range(hits):
            j = entering[i]
            position = at[c, j]
            row = c * following.shape[1] + position
            if len(positions):
                row, position = position, positions[position]
            signs = np.uint64(15)
            if gated:
                signs = (_sign(widen(gate[row, j])) << np.uint64(2)) | _sign(widen(up[row, j]))
            token = np.uint64(following[c, position] + 1)
            payloads[i] = (np.uint64(position) << np.uint64(36)) | (token << np.uint64(4)) | signs
            if weighted and len(weights):
                carried[i] = weights[row]
        low = np.uint64(0xFFFFFFFF) - np.uint64(contexts[c])
        for i in range(hits):
            j = entering[i]
            # Positive floats are in the order of their bits.
            bits = np.float32(extreme[c, j] * polarity).view(np.uint32)
            word = (np.uint64(bits) << np.uint64(32)) | low
            if word > key[j, -1]:
                if weighted:
                    _insert_weighted(key[j], what[j], weight[j], word, payloads[i], carried[i])
                else:
                    _insert(key[j], what[j], word, payloads[i])
                threshold[j] = np.uint32(key[j, -1] >> np.uint64(32)).view(np.float32)


@_compiled
def enter(neuron, word, payload, carried, threshold, key, what, weight):  # type: ignore[no-untyped-def]
    """Enter into the sorted lists what was found elsewhere: of each hit its neuron, its key and what belongs to it.

    carried  f32[hit]  the router's weights, or nothing
    Lists as of `rank`.
    """
    for i in range(len(neuron)):
        j = neuron[i]
        if word[i] > key[j, -1]:
            if weight.shape[1] > 0:
                _insert_weighted(key[j], what[j], weight[j], word[i], payload[i], carried[i])
            else:
                _insert(key[j], what[j], word[i], payload[i])
            threshold[j] = np.uint32(key[j, -1] >> np.uint64(32)).view(np.float32)


@_compiled
def merge_ranked(key, what, weight, other_key, other_what, other_weight, start, stop):  # type: ignore[no-untyped-def]
    """Merge the second sorted lists into the first, for neurons ``start <= n < stop``; arguments as of `rank`."""
    places, weighted = key.shape[1], weight.shape[1] > 0
    keys, whats, weights = (
        np.empty(places, np.uint64),
        np.empty(places, np.uint64),
        np.empty(places, np.float32),
    )
    for j in range(start, stop):
        if other_key[j, 0] <= key[j, places - 1]:
            continue
        first, second = 0, 0
        for i in range(places):
            if key[j, first] >= other_key[j, second]:
                keys[i], whats[i] = key[j, first], what[j, first]
                if weighted:
                    weights[i] = weight[j, first]
                first += 1
            else:
                keys[i], whats[i] = other_key[j, second], other_what[j, second]
                if weighted:
                    weights[i] = other_weight[j, second]
                second += 1
        key[j], what[j] = keys, whats
        if weighted:
            weight[j] = weights


# -- Groups of neurons that run on rows of their own: the experts of a layer, or all its neurons on all rows ---------

_BLOCK = 128  # neurons whose lists fit the second-level cache while one context after another is entered


@_compiled
def reduce_groups(  # type: ignore[no-untyped-def]
    values, rows, offsets, first, last, pivot, maximum, maximum_at, minimum, minimum_at, sums, positive
):
    """`reduce_contexts` of the groups ``first <= g < last``, each on rows of its own; all arguments by group.

    rows     i64[counted]         of all groups, ascending
    offsets  i64[group context]   where each context of each group begins in `rows`; one more than there are contexts
    """
    for g in range(first, last):
        # Rows of contexts lie one after another, so that a place is the row itself.
        reduce_contexts(
            values, rows, offsets[g], 0, 0, maximum.shape[1], pivot[g],
            maximum[g], maximum_at[g], minimum[g], minimum_at[g], sums[g], positive[g],
        )  # fmt: skip


@_compiled
def rank_groups(  # type: ignore[no-untyped-def]
    largest, smallest, highest, lowest, contexts, following, gated, positions, weights,
    first, last, start, stop,
):  # fmt: skip
    """`rank` in the groups ``first <= g < last``: of each block of neurons the largest and then the smallest, while
    what is looked up for them is near.

    largest, smallest  extreme and at by group, gate, up
    highest, lowest    threshold, key, what and weight by group: the lists that they enter
    """
    for g in range(first, last):
        for block in range(start, stop, _BLOCK):
            end = min(block + _BLOCK, stop)
            for polarity, (extreme, at, gate, up), (threshold, key, what, weight) in (
                (np.float32(1), largest, highest), (np.float32(-1), smallest, lowest)
            ):  # fmt: skip
                rank(
                    polarity, extreme[g], at[g], contexts, following, gate, up, gated, positions, weights,
                    block, end, threshold[g], key[g], what[g], weight[g],
                )  # fmt: skip


@_compiled
def count_groups(bins, cuts, first, last, start, stop, counts):  # type: ignore[no-untyped-def]
    """`count` in the groups ``first <= g < last``, whose rows begin at cuts i64[group + 1]; counts by group."""
    for g in range(first, last):
        count(bins[cuts[g] : cuts[g + 1]], start, stop, counts[g])


@_compiled
def sample_groups(  # type: ignore[no-untyped-def]
    values, rows, bins, cuts, hashes, following, first, last, start, stop, salt, key, coefficient, next_token
):
    """`sample` in the groups ``first <= g < last``, whose rows begin at cuts i64[group + 1]; the last four by group."""
    for g in range(first, last):
        here = slice(cuts[g], cuts[g + 1])
        sample(
            values, rows[here], bins[here], hashes[here], following[here], start, stop,
            salt[g], key[g], coefficient[g], next_token[g],
        )  # fmt: skip
