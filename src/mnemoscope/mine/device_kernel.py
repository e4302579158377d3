"""The loops of `kernel.reduce_contexts` and `kernel.assign_bins` as one Triton kernel, which reads coefficients once.

A program takes a block of neurons through the segments of one part. Importing this needs Triton; with
``TRITON_INTERPRET=1`` in the environment before that, the kernel runs on a CPU, line by line.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemoscope.mine.kernel import FIRST_SIZE, SIDE

_STEPS, _NEURONS = 16, 64  # rows and neurons that a program reads at once: 128 bytes of each row, in bf16


def reduce(values: Tensor, where: dict[str, Tensor], selected: int, pivots: Tensor) -> Any:
    """Extremes, sums as pairs [part 4 2 neuron], positive counts, bins and kept: see `device.reduce_plainly`.

    where     `device.Segments` by name, i32 on the device
    selected  how many of their rows are
    """
    neurons, parts, segments = values.shape[1], len(where["parts"]), len(where["begins"])
    extremes = [
        values.new_empty(segments, neurons, dtype=dtype) for dtype in (torch.float32, torch.int32) * 2
    ]
    sums = values.new_empty(parts, 4, 2, neurons, dtype=torch.float32)
    positive = values.new_empty(parts, neurons, dtype=torch.int32)
    bins = values.new_empty(selected, neurons, dtype=torch.uint8)
    kept = values.new_empty(selected, neurons)
    if parts and neurons:
        _reduce[parts, triton.cdiv(neurons, _NEURONS)](
            values, *(where[name] for name in ("rows", "begins", "ends", "parts", "numbers")), pivots,
            *extremes, sums, positive, bins, kept, neurons,
            STEPS=_STEPS, NEURONS=_NEURONS, SIDE=SIDE, FIRST_SIZE=FIRST_SIZE, enable_fp_fusion=False,
        )  # fmt: skip
    return tuple(extremes), sums, positive, bins, kept


@triton.jit
def _added(high, low, more):  # type: ignore[no-untyped-def]
    """Knuth's two-sum: what is rounded off is added up apart."""
    total = high + more
    share = total - high
    return total, low + ((high - (total - share)) + (more - share))


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    values, rows, begins, ends, parts, numbers, pivots,
    largest, largest_at, smallest, smallest_at, sums, positive, bins, kept, neurons,
    STEPS: tl.constexpr, NEURONS: tl.constexpr, SIDE: tl.constexpr, FIRST_SIZE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One part, and one block of neurons; arguments as of `device.Segments` and `device.Reduced`."""
    index = tl.program_id(0)
    column = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    exists = column < neurons
    first, last, group = (
        tl.load(parts + 3 * index),
        tl.load(parts + 3 * index + 1),
        tl.load(parts + 3 * index + 2),
    )
    pivot = tl.load(pivots + group.to(tl.int64) * neurons + column, mask=exists, other=0.0)
    high1, low1 = tl.zeros([NEURONS], tl.float32), tl.zeros([NEURONS], tl.float32)
    high2, low2 = tl.zeros([NEURONS], tl.float32), tl.zeros([NEURONS], tl.float32)
    high3, low3 = tl.zeros([NEURONS], tl.float32), tl.zeros([NEURONS], tl.float32)
    high4, low4 = tl.zeros([NEURONS], tl.float32), tl.zeros([NEURONS], tl.float32)
    above = tl.zeros([NEURONS], tl.int32)
    # Places are counted in 64 bits: of many contexts and units there are more than 2 ** 31.
    extreme = first.to(tl.int64) * neurons + column
    for segment in range(first, last):
        most, most_at = tl.full([NEURONS], -float("inf"), tl.float32), tl.full([NEURONS], -1, tl.int32)
        least, least_at = tl.full([NEURONS], float("inf"), tl.float32), tl.full([NEURONS], -1, tl.int32)
        end = tl.load(ends + segment)
        for start in range(tl.load(begins + segment), end, STEPS):
            step = start + tl.arange(0, STEPS)
            row = tl.load(rows + step, mask=step < end, other=0)
            number = tl.load(numbers + step, mask=step < end, other=-1)
            counts = (step < end)[:, None] & exists[None, :]
            place = row[:, None].to(tl.int64) * neurons + column[None, :]
            given = tl.load(values + place, mask=counts, other=0.0)
            x = given.to(tl.float32)
            # Strictly beyond what came before, so that the first row stays; rows ascend, so the first is the least.
            peak = tl.max(tl.where(counts, x, -float("inf")), axis=0)
            peak_at = tl.min(tl.where(counts & (x == peak[None, :]), row[:, None], 0x7FFFFFFF), axis=0)
            most_at = tl.where(peak > most, peak_at, most_at)
            most = tl.where(peak > most, peak, most)
            dip = tl.min(tl.where(counts, x, float("inf")), axis=0)
            dip_at = tl.min(tl.where(counts & (x == dip[None, :]), row[:, None], 0x7FFFFFFF), axis=0)
            least_at = tl.where(dip < least, dip_at, least_at)
            least = tl.where(dip < least, dip, least)
            d = tl.where(counts, x - pivot[None, :], 0.0)
            q = d * d
            high1, low1 = _added(high1, low1, tl.sum(d, axis=0))
            high2, low2 = _added(high2, low2, tl.sum(q, axis=0))
            high3, low3 = _added(high3, low3, tl.sum(q * d, axis=0))
            high4, low4 = _added(high4, low4, tl.sum(q * q, axis=0))
            above += tl.sum((counts & (x > 0)).to(tl.int32), axis=0)
            chosen = counts & (number >= 0)[:, None]
            bits = x.to(tl.int32, bitcast=True)
            size = tl.minimum(tl.maximum(((bits & 0x7FFFFFFF) >> 21) - FIRST_SIZE, 0), SIDE)
            target = number[:, None].to(tl.int64) * neurons + column[None, :]
            tl.store(bins + target, tl.where(bits < 0, SIDE - size, SIDE + size).to(tl.uint8), mask=chosen)
            tl.store(kept + target, given, mask=chosen)
        tl.store(largest + extreme, most, mask=exists)
        tl.store(largest_at + extreme, most_at, mask=exists)
        tl.store(smallest + extreme, least, mask=exists)
        tl.store(smallest_at + extreme, least_at, mask=exists)
        extreme += neurons
    begin = index.to(tl.int64) * neurons
    pairs = sums + 8 * begin + column
    tl.store(pairs, high1, mask=exists)
    tl.store(pairs + neurons, low1, mask=exists)
    tl.store(pairs + 2 * neurons, high2, mask=exists)
    tl.store(pairs + 3 * neurons, low2, mask=exists)
    tl.store(pairs + 4 * neurons, high3, mask=exists)
    tl.store(pairs + 5 * neurons, low3, mask=exists)
    tl.store(pairs + 6 * neurons, high4, mask=exists)
    tl.store(pairs + 7 * neurons, low4, mask=exists)
    tl.store(positive + begin + column, above, mask=exists)
