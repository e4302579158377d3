"""Coefficients on an accelerator, reduced there: one Triton kernel where there is Triton, plain torch elsewhere.

What leaves the device is small: sums of a few parts, the bins of the selected rows and their coefficients, and of the
extremes of each context those that may enter a neuron's list. Nothing is computed in fp64, which is slow on most
devices and absent from some. Sums are pairs of fp32 numbers (Knuth's two-sum), added in an order that the batch fixes,
so that the same device gives the same bits whatever the number of workers; they agree with the CPU's to about a part in
a million of the sum of absolute powers. What fp32 cannot hold, fourth powers of differences beyond 4e9, comes out as
infinite, and is for the caller to read otherwise; those of differences below 1e-9 are lost.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from mnemoscope.mine.kernel import FIRST_SIZE, SIDE


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows of a matrix that are reduced together: a context, or what of it was routed to one expert.

    rows     i64[counted]     rows that count, ascending in each segment
    begins   i64[segment]     where each begins in `rows`
    ends     i64[segment]     and where it ends; of an empty one, where it begins
    parts    i64[part 3]      neighbouring segments whose sums are added up: the first, the one after the last,
                              and their group
    numbers  i64[counted]     of each row its place among the selected ones, or -1
    """

    rows: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    parts: np.ndarray
    numbers: np.ndarray


@lru_cache(maxsize=2)  # all layers of a batch have the same
def _on(device: torch.device, segments: Segments) -> dict[str, Tensor]:
    """Segments on a device, by name, as i32."""
    return {
        each.name: torch.from_numpy(getattr(segments, each.name).astype(np.int32)).to(device)
        for each in fields(segments)
    }


@dataclass(frozen=True, eq=False)
class Reduced:
    """What segments amount to.

    largest, smallest        f32[segment neuron]  on the device; infinite in an empty segment
    largest_at, smallest_at  i32[segment neuron]  on the device: the first row with it, -1 in an empty segment
    sums      f64[part 4 neuron]     first to fourth powers of (coefficient - pivot)
    positive  i64[part neuron]       coefficients above 0
    bins      u8[selected neuron]    as of `kernel.assign_bins`
    kept      [selected neuron]      coefficients of the selected rows, in their dtype
    """

    largest: Tensor
    largest_at: Tensor
    smallest: Tensor
    smallest_at: Tensor
    sums: np.ndarray
    positive: np.ndarray
    bins: np.ndarray
    kept: Tensor


Four = tuple[Tensor, Tensor, Tensor, Tensor]
Parts = tuple[Four, Tensor, Tensor, Tensor, Tensor]  # as `_fetched` takes them


def reduce(values: Tensor, segments: Segments, pivot: np.ndarray) -> Reduced:
    """Read coefficients [row, neuron], fp32 or bf16 and contiguous, once.

    pivot  f32[group neuron]
    """
    pivots = torch.from_numpy(np.ascontiguousarray(pivot)).to(values.device)
    by_kernel = has_triton(values.device.type) and _failure(values.device) is None
    return _fetched(*(_reduce_by_kernel if by_kernel else reduce_plainly)(values, segments, pivots))


def _reduce_by_kernel(values: Tensor, segments: Segments, pivots: Tensor) -> Parts:
    """`reduce_plainly` in one read."""
    from mnemoscope.mine import device_kernel

    where, selected = _on(values.device, segments), int((segments.numbers >= 0).sum())
    with torch.cuda.device_of(values):  # Triton starts it on the device that is set, wherever tensors are
        reduced: Parts = device_kernel.reduce(values, where, selected, pivots)
    return reduced


def elsewhere(x: Tensor) -> bool:
    """Whether a tensor is on an accelerator."""
    return x.device.type != "cpu"


@cache
def has_triton(kind: str) -> bool:
    """Whether the kernel can run on a kind of device."""
    return kind == "cuda" and find_spec("triton") is not None


@cache
def _failure(place: torch.device) -> str | None:
    """Why the kernel cannot be used on a device where Triton is: what comes of a small matrix with ties, fp32 and bf16,
    is not what plain torch makes of it, or nothing does. None where it can.

    What is compiled for a device is right there or not, and only the device says so.
    """
    drawn = np.random.default_rng(0)
    rows, chosen = np.sort(drawn.permutation(70)[:60]), drawn.random(60) < 0.3
    segments = Segments(
        rows,
        begins=np.array([0, 19, 19, 20]),
        ends=np.array([19, 19, 20, 60]),  # longer than a program reads at once, empty, of one row
        parts=np.array([(0, 2, 0), (2, 4, 1)]),
        numbers=np.where(chosen, chosen.cumsum() - 1, -1),
    )
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.from_numpy(drawn.standard_normal((70, 90)).round(1)).to(dtype).to(place)
            pivots = torch.from_numpy(drawn.standard_normal((2, 90))).float().to(place)
            kernels, plain = (
                _fetched(*way(x, segments, pivots)) for way in (_reduce_by_kernel, reduce_plainly)
            )
            if not _alike(kernels, plain):
                return "it gives other numbers there"
    except Exception as error:  # of Triton, of its compilers, of a driver
        said = " ".join(str(error).split())[:200]
        return f"it fails there ({type(error).__name__}{f': {said}' if said else ''})"
    return None


def _alike(first: Reduced, second: Reduced) -> bool:
    """To the bit, but for sums."""
    tensors = ("largest", "largest_at", "smallest", "smallest_at", "kept")
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("positive", "bins"))
        and np.allclose(first.sums, second.sums, rtol=1e-5, atol=1e-4)
    )


def shortfall(place: torch.device) -> str | None:
    """Why plain torch reduces what is on an accelerator, and what to do, in a line; None where the kernel does it."""
    if place.type == "cpu":
        return None
    if place.type != "cuda":
        why = f"there is no kernel for {place.type}"
    elif not has_triton(place.type):
        why = "Triton is not installed; pip install 'mnemoscope[device]'"
    elif (failed := _failure(place)) is not None:
        why = f"of the kernel {failed}"
    else:
        return None
    return f"coefficients on {place} are reduced in plain torch, which reads them several times: {why}"


def _fetched(extremes: Four, sums: Tensor, positive: Tensor, bins: Tensor, kept: Tensor) -> Reduced:
    """Pairs [part 4 2 neuron] become fp64 on the CPU, where that costs nothing."""
    pairs = sums.cpu().numpy().astype(np.float64)
    return Reduced(
        *extremes, pairs[:, :, 0] + pairs[:, :, 1], positive.cpu().numpy().astype(np.int64), bins.cpu().numpy(),
        kept.cpu(),
    )  # fmt: skip


def reduce_plainly(values: Tensor, segments: Segments, pivots: Tensor) -> Parts:
    """`device_kernel.reduce` in plain torch."""
    where, neurons = _on(values.device, segments), values.shape[1]
    rows, begins, ends = (where[name].long() for name in ("rows", "begins", "ends"))
    longest = max(1, int((segments.ends - segments.begins).max(initial=1)))
    step = torch.arange(longest, device=values.device)
    inside = (step < (ends - begins)[:, None])[..., None]
    rows = torch.cat([rows, rows.new_zeros(1)])  # to be read where nothing counts
    row = rows[(begins[:, None] + step).clamp_(max=len(rows) - 1)]
    x = values[row].float() if len(values) else values.new_zeros(*row.shape, neurons).float()

    def extreme(filler: float, largest: bool) -> tuple[Tensor, Tensor]:
        filled = torch.where(inside, x, filler)
        value = filled.amax(1) if largest else filled.amin(1)
        first = ((filled == value[:, None]) & inside).to(torch.uint8).argmax(1)
        return value, torch.where(inside.any(1), row.gather(1, first), -1).int()

    sums = x.new_zeros(len(segments.parts), 4, 2, neurons)
    positive = torch.zeros(len(segments.parts), neurons, dtype=torch.int32, device=x.device)
    for index, (first, last, group) in enumerate(segments.parts.tolist()):
        here = slice(first, last)
        d = torch.where(inside[here], x[here] - pivots[group], 0.0).flatten(0, 1)
        power = d
        for exponent in range(4):
            sums[index, exponent] = torch.stack(_summed(power))
            power = power * d
        positive[index] = ((x[here] > 0) & inside[here]).sum((0, 1))
    chosen = rows[:-1][where["numbers"] >= 0]
    kept = values[chosen]
    extremes = (*extreme(-np.inf, True), *extreme(np.inf, False))
    return extremes, sums, positive, _bins(kept), kept


def _summed(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the first dimension, as a pair: halves are added until there is one, and what is rounded off too."""
    high, low = (x, torch.zeros_like(x)) if len(x) else (x.new_zeros(1, *x.shape[1:]),) * 2
    while len(high) > 1:
        half = len(high) // 2
        a, b, odd = high[:half], high[half : 2 * half], slice(2 * half, None)
        total = a + b
        share = total - a
        error = (a - (total - share)) + (b - share)
        low = torch.cat([low[:half] + low[half : 2 * half] + error, low[odd]])
        high = torch.cat([total, high[odd]])
    return high[0], low[0]


def _bins(kept: Tensor) -> Tensor:
    bits = kept.float().contiguous().view(torch.int32)
    size = (((bits & 0x7FFFFFFF) >> 21) - FIRST_SIZE).clamp_(0, SIDE)
    return torch.where(bits < 0, SIDE - size, SIDE + size).to(torch.uint8)


def contenders(
    extreme: Tensor,
    at: Tensor,
    polarity: int,
    floor: np.ndarray,
    branches: tuple[Tensor, Tensor] | None,
) -> tuple[np.ndarray, ...]:
    """What of the extremes [segment neuron] is beyond 0 and not below a floor f32[group neuron], in one transfer.

    branches  gates and ups [row, neuron], of which the signs are looked up where something is found
    Returns segment, neuron and row i64[hit], signs u8[hit] of gate and up (0, 1, 2 for negative, zero, positive, the
    former times 4; 15 of a plain layer), values f32[hit], and f32[group neuron], the furthest of all segments.
    """
    groups, neurons = floor.shape
    strength = (extreme * polarity).view(groups, -1, neurons)
    floors = torch.from_numpy(np.ascontiguousarray(floor)).to(extreme.device)[:, None]
    segment, neuron = ((strength > 0) & (strength >= floors)).flatten(0, 1).nonzero(as_tuple=True)
    row, value = at[segment, neuron].long(), extreme[segment, neuron]
    signs = torch.full_like(row, 15)
    if branches is not None:
        gate, up = (branch[row, neuron] for branch in branches)
        signs = 4 * _sign(gate) + _sign(up)
    numbers = torch.stack([segment, neuron, row, signs, value.contiguous().view(torch.int32).long()])
    furthest = strength.amax(1) * polarity
    segment, neuron, row, signs, bits = numbers.cpu().numpy()
    values = bits.astype(np.int32).view(np.float32)
    return segment, neuron, row, signs.astype(np.uint8), values, furthest.cpu().numpy()


def _sign(x: Tensor) -> Tensor:
    return (x >= 0).long() + (x > 0).long()
