"""Compiled loops over rows of logits, each row read while it is in the cache; told slowly in the tests. On an
accelerator torch does the same where they are.

torch takes ten times as long for both: its `argmax` carries the place along, and a comparison is summed as booleans.
Every row is by itself, so that results depend on no other row and on no number of threads. NaN is not looked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.mine.device import elsewhere
from mnemoscope.mine.kernel import _compiled
from mnemoscope.mine.reading import share_out

_LANES = 64  # running maxima side by side, which the compiler can vectorise
_NEGLIGIBLE = -80.0  # nats below the largest
_LOGITS = 131_072  # that a thread does at once, in whole rows
_CHUNK = 512  # logits among which one is looked for at once


def first_largest(scores: Float[Tensor, "row token"]) -> Int[Tensor, " row"]:
    """Where each row is largest; the first of equals."""
    if elsewhere(scores):
        return scores.argmax(-1)
    best = np.empty(len(scores), np.int64)
    _shared_out(_first_largest, scores.cpu().numpy(), best)
    return torch.from_numpy(best).to(scores.device)


def ranks(scores: Float[Tensor, "row token"], tokens: Int[Tensor, "row chosen"]) -> Int[Tensor, "row chosen"]:
    """How many tokens of its row score higher than each chosen one."""
    if elsewhere(scores):
        least = scores.gather(-1, tokens).unbind(-1)
        return torch.stack([(scores > each[:, None]).sum(-1) for each in least], -1)
    above = np.empty(tuple(tokens.shape), np.int64)
    _shared_out(_ranks, scores.cpu().numpy(), tokens.cpu().contiguous().numpy(), above)
    return torch.from_numpy(above).to(scores.device)


def log_sums(scores: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """log sum exp of each row; fp64."""
    most = scores.gather(-1, first_largest(scores)[:, None])
    # No denormals, which are slow: what is left out is below 2e-35 of a token.
    weights = (scores - most).clamp_(min=_NEGLIGIBLE).exp_()
    return most[:, 0].double() + _sums(weights).log()


def moments(scores: Float[Tensor, "row token"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Mean and population standard deviation of each row; fp64."""
    mean = _sums(scores) / scores.shape[1]
    squares = _sums((scores - mean[:, None].float()).square_()) / scores.shape[1]
    return mean, squares.sqrt()


def central_powers(
    scores: Float[Tensor, "row token"], mean: Float[Tensor, " row"]
) -> Float[Tensor, "row power"]:
    """Sums of the second, third and fourth powers of (score - mean) of each row, of differences in fp32; fp64."""
    if elsewhere(scores):
        d = scores - mean[:, None]
        powers = (d * d, d * d * d, (d * d).square())
        return torch.stack([power.sum(-1, dtype=torch.float64) for power in powers], -1)
    sums = np.empty((len(scores), 3))
    _shared_out(_powers, scores.cpu().numpy(), mean.cpu().numpy(), sums)
    return torch.from_numpy(sums).to(scores.device)


def _sums(values: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """Sums of fp32 in fp64, always in the same order."""
    if elsewhere(values):
        return values.sum(-1, dtype=torch.float64)
    total = np.empty(len(values))
    _shared_out(_add, values.cpu().numpy(), total)
    return torch.from_numpy(total).to(values.device)


def _shared_out(work: Callable[..., None], *arrays: np.ndarray) -> None:
    """Do the work for some rows of all arrays at a time, with as many threads as torch uses."""
    rows = max(1, min(len(arrays[0]), _LOGITS // max(1, arrays[0].shape[1])))
    share_out(
        lambda start: work(*(array[start : start + rows] for array in arrays)), range(0, len(arrays[0]), rows)
    )


@_compiled
def _first_largest(scores, best):  # type: ignore[no-untyped-def]
    lanes = np.empty(_LANES, np.float32)
    size = scores.shape[1]
    whole = size - size % _LANES
    for i in range(len(scores)):
        row = scores[i]
        lanes[:] = -np.inf
        for start in range(0, whole, _LANES):
            part = row[start : start + _LANES]
            for j in range(_LANES):
                lanes[j] = part[j] if part[j] > lanes[j] else lanes[j]
        most = np.float32(-np.inf)
        for j in range(_LANES):
            most = max(most, lanes[j])
        for j in range(whole, size):
            most = max(most, row[j])
        start = 0
        while not _holds(row[start : start + _CHUNK], most):
            start += _CHUNK
        while row[start] != most:
            start += 1
        best[i] = start


@_compiled
def _holds(part, wanted):  # type: ignore[no-untyped-def]
    found = np.int32(0)
    for j in range(len(part)):
        found += np.int32(part[j] == wanted)
    return found > 0


@_compiled
def _ranks(scores, tokens, above):  # type: ignore[no-untyped-def]
    for i in range(len(scores)):
        row = scores[i]
        for k in range(tokens.shape[1]):
            least, count = row[tokens[i, k]], np.int32(0)
            for j in range(len(row)):
                count += np.int32(row[j] > least)
            above[i, k] = count


@_compiled
def _add(values, total):  # type: ignore[no-untyped-def]
    lanes = np.empty(_LANES)
    size = values.shape[1]
    whole = size - size % _LANES
    for i in range(len(values)):
        row = values[i]
        lanes[:] = 0.0
        for start in range(0, whole, _LANES):
            part = row[start : start + _LANES]
            for j in range(_LANES):
                lanes[j] += np.float64(part[j])
        sum_ = 0.0
        for j in range(_LANES):
            sum_ += lanes[j]
        for j in range(whole, size):
            sum_ += np.float64(row[j])
        total[i] = sum_


@_compiled
def _powers(scores, mean, sums):  # type: ignore[no-untyped-def]
    lanes = np.empty((3, _LANES))
    size = scores.shape[1]
    whole = size - size % _LANES
    for i in range(len(scores)):
        row, middle = scores[i], mean[i]
        lanes[:] = 0.0
        for start in range(0, whole, _LANES):
            piece = row[start : start + _LANES]
            for j in range(_LANES):
                difference = np.float64(piece[j] - middle)
                square = difference * difference
                lanes[0, j] += square
                lanes[1, j] += square * difference
                lanes[2, j] += square * square
        for power in range(3):
            sum_ = 0.0
            for j in range(_LANES):
                sum_ += lanes[power, j]
            sums[i, power] = sum_
        for j in range(whole, size):
            difference = np.float64(row[j] - middle)
            square = difference * difference
            sums[i, 0] += square
            sums[i, 1] += square * difference
            sums[i, 2] += square * square
