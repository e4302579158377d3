"""Elementwise functions end in the same bits whatever number of threads computes them.

torch gives each thread a run of the elements. Inside it, as many are computed at once as fit a register, and what is
left over at its end one by one, by another routine for exponentials, which may end in another last bit. So a bit would
show where threads had been cut, and with it how many there were. Cuts at whole registers and whole rows leave every
element to the routine that a single thread would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ALONE = (
    16_384  # elements that one thread computes, however many there are: torch's GELU shares out from here on
)
_SHARED = 32_768  # elements for each thread with which all have work: at::internal::GRAIN_SIZE
_REGISTERS = 64  # elements: whole registers, and whole pairs of them, of every processor and dtype


class Threads(TorchFunctionMode):
    """While this is entered, functions that would show where threads are cut are cut where it does not show."""

    FUNCTIONS = frozenset(
        {
            functional.silu,
            functional.gelu,
            functional.sigmoid,
            functional.softplus,
            functional.mish,
            functional.elu,
            functional.selu,
            functional.celu,
            torch.sigmoid,
            torch.exp2,
            torch.pow,
            torch.rsqrt,
            Tensor.sigmoid,
            Tensor.exp2,
            Tensor.pow,
            Tensor.__pow__,
            Tensor.rsqrt,
        }
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most functions are others, and this is asked at every call.
        if func not in self.FUNCTIONS or not args or not _is_cut(args[0]) or kwargs.get("inplace"):
            return func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        return _in_pieces(args[0], lambda piece: func(piece, *args[1:], **kwargs))


def _is_cut(x: Any) -> bool:
    """Whether more than one thread would compute something, on a processor."""
    if not isinstance(x, Tensor) or x.requires_grad or x.device.type != "cpu":
        return False
    return x.numel() > _ALONE and torch.get_num_threads() > 1


def _in_pieces(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    order = sorted(range(x.ndim), key=x.stride, reverse=True)  # as torch walks through them
    dense = x.permute(order)
    if dense.stride(-1) != 1:
        return function(x)  # one by one, wherever threads are cut
    pieces = list(_pieces(dense, torch.get_num_threads()))
    if len(pieces) == 1:
        return function(x)
    computed = torch.cat([function(piece).flatten() for piece in pieces]).view(dense.shape)
    return computed.permute(*(order.index(dimension) for dimension in range(x.ndim)))


def _pieces(x: Tensor, threads: int) -> Iterator[Tensor]:
    """Pieces in order, of which threads compute whole rows: of a matrix, or of a register's length where all is one."""
    if x.is_contiguous():
        flat = x.flatten()
        whole = len(flat) // _REGISTERS
        for start, stop in _cuts(whole, _REGISTERS, threads):
            last = stop == whole and len(flat) - start * _REGISTERS <= _ALONE
            yield flat[start * _REGISTERS : None if last else stop * _REGISTERS]
            if last:
                return
        if len(flat) % _REGISTERS:
            yield flat[whole * _REGISTERS :]
    elif x.ndim > 2 and not _is_matrix(x):
        for inner in x:
            yield from _pieces(inner, threads)
    else:
        rows = x.flatten(0, -2)
        for start, stop in _cuts(len(rows), rows.shape[1], threads):
            piece = rows[start:stop]
            yield from _pieces(piece[0], threads) if len(piece) == 1 else (piece,)


def _cuts(rows: int, width: int, threads: int) -> Iterator[tuple[int, int]]:
    """From which to which row each piece goes: equally many for each thread, then as many as one thread takes."""
    head = rows // threads * threads
    if head * width <= (threads - 1) * _SHARED:  # fewer threads would share it
        head = 0
    if head:
        yield 0, head
    step = max(1, _ALONE // width)
    for start in range(head, rows, step):
        yield start, min(start + step, rows)


def _is_matrix(x: Tensor) -> bool:
    """Whether all but the last dimension can be walked through as one."""
    return all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
