"""What every accumulator is fed with, one layer of one batch, and what an accumulator is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mnemoscope.mine import kernel
from mnemoscope.mine.places import CountedPlaces
from mnemoscope.records import Cells, ContextBatch

_ROWS, _BLOCK = 128, 128  # rows, and neurons, that a thread takes at a time
PARTS = 8  # of experts, of which each thread takes one at a time


@dataclass(frozen=True)
class Extremes:
    """The largest (or the most negative) coefficient of each context.

    value     f32[context neuron]  infinite when no position of the context counts; of experts f32[group context neuron]
    position  i32, likewise        the first that has it; -1 when none counts. Of an expert, its row
    gate, up  [row, neuron]        pre-activations; a row is a position, or a context; None if not gated
    """

    value: np.ndarray
    position: np.ndarray
    gate: np.ndarray | None
    up: np.ndarray | None


@dataclass(frozen=True)
class Contenders:
    """Those of the largest (or the most negative) coefficients of contexts that may enter a list, one after another.

    neuron, context, position, row  i64[hit]     among the neurons of the reading, and in the batch, or of an expert
    value                           f32[hit]
    signs                           u8[hit]      of gate and up, as in `triggers.Triggers`
    furthest                        f32[neuron]  of all contexts, hits or not
    """

    neuron: np.ndarray
    context: np.ndarray
    position: np.ndarray
    row: np.ndarray
    value: np.ndarray
    signs: np.ndarray
    furthest: np.ndarray


@dataclass(frozen=True)
class LayerReading:
    """What one layer of one batch amounts to: one group of neurons, or one for each expert, group by group.

    pivot     f32[neuron]      of which the power sums are taken
    sums      f64[4 neuron]    first to fourth powers of (coefficient - pivot) over the counted positions
    positive  i64[neuron]      counted positions with a coefficient above 0
    values    [row, neuron]    coefficients: float32, or the 16 bits of bfloat16; of as many neurons as a group has
    chosen    i64[selected]    rows of `values` that go into histograms and samples
    counted   i64[group]       positions that count
    cuts      i64[group + 1]   where the rows of each group begin in `chosen`
    first     the first of these neurons in its layer
    weights   f32[row]         of the router; empty where there is none
    binned    u8[selected neuron]  the bins of the chosen rows, where they are known already
    """

    layer: int
    batch: ContextBatch
    places: CountedPlaces
    pivot: np.ndarray
    largest: Extremes | Contenders
    smallest: Extremes | Contenders
    sums: np.ndarray
    positive: np.ndarray
    values: np.ndarray
    chosen: np.ndarray
    counted: np.ndarray
    cuts: np.ndarray
    first: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    binned: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Neurons of a group."""
        return self.values.shape[1]

    def within(self, cells: Cells) -> slice:
        """Where these neurons are among all that are numbered through."""
        start = cells.of(self.layer).start + self.first
        return slice(start, start + len(self.counted) * self.width)

    def by_group(self, array: np.ndarray, cells: Cells) -> np.ndarray:
        """[group neuron ...]: of an array [cell ...] what belongs to these neurons; shares its memory."""
        here = array[self.within(cells)]
        return here.reshape(len(self.counted), self.width, *here.shape[1:])

    def share_out(self, work: Callable[[int, int, int, int], None]) -> None:
        """Call ``work(first group, last group, first neuron, last neuron)`` for blocks of neurons that cover all."""
        groups, width = len(self.counted), self.width
        if groups == 1:
            share_out(lambda start: work(0, 1, start, min(start + _BLOCK, width)), range(0, width, _BLOCK))
        else:
            step = -(-groups // PARTS)
            share_out(lambda group: work(group, min(group + step, groups), 0, width), range(0, groups, step))

    def furthest(self, polarity: int) -> np.ndarray:
        """f32[neuron]: the largest of all contexts (polarity 1), or the most negative."""
        extremes = self.largest if polarity > 0 else self.smallest
        if isinstance(extremes, Contenders):
            return extremes.furthest
        by_context = extremes.value.reshape(len(self.counted), -1, self.width)
        return (by_context.max(1) if polarity > 0 else by_context.min(1)).ravel()

    @cached_property
    def bins(self) -> np.ndarray:
        """u8[selected neuron]: the histogram bins of the chosen rows."""
        if self.binned is not None:
            return self.binned
        bins = np.empty((len(self.chosen), self.values.shape[1]), np.uint8)

        def rows(first: int) -> None:
            kernel.assign_bins(self.values, self.chosen, first, min(first + _ROWS, len(bins)), bins)

        share_out(rows, range(0, len(bins), _ROWS))
        return bins


def bits_or_floats(x: Tensor) -> np.ndarray:
    """[row, neuron] as float32 or the bits of bfloat16; shares memory where it can."""
    x = x.detach().flatten(0, 1).contiguous().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.float().numpy()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence the process in the key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mnemoscope")


def share_out(work: Callable[[int], None], pieces: Iterable[int]) -> None:
    """Do independent pieces of work with as many threads as torch uses."""
    pieces, threads = list(pieces), torch.get_num_threads()
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
    else:
        list(_pool(os.getpid(), threads).map(work, pieces))


# -- What an accumulator is. Its state is a few plain arrays; these save, load and compare it ------------------


@runtime_checkable
class Accumulator(Protocol):
    """Something that readings are poured into, layer by layer; merging gives the same bits in any order."""

    def update(self, reading: LayerReading) -> None:
        """Take in one layer of one batch."""

    def merge(self, other: Any) -> None:
        """Take in what another of the same class has taken in; the other is unchanged."""

    def state(self) -> dict[str, np.ndarray]:
        """All there is to know, as arrays by name; shared, not copied."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this state; KeyError or ValueError when it is not of this accumulator's shape."""

    def result(self, layer: int) -> pa.Table:
        """The rows of one layer."""


@runtime_checkable
class HasFields(Protocol):
    """A class that lists the arrays that are its state."""

    FIELDS: ClassVar[tuple[str, ...]]


def fields_of(accumulator: HasFields) -> dict[str, np.ndarray]:
    """The arrays that an accumulator declares."""
    return {name: getattr(accumulator, name) for name in accumulator.FIELDS}


def set_fields(accumulator: HasFields, state: Mapping[str, np.ndarray]) -> None:
    """Take over the arrays that an accumulator declares; shapes and dtypes must be those it has.

    What it had is let go of before what it gets is read, so that there are not both in memory."""
    for name in accumulator.FIELDS:
        shape, dtype = getattr(accumulator, name).shape, getattr(accumulator, name).dtype
        setattr(accumulator, name, None)
        saved = state[name]
        if (shape, dtype) != (saved.shape, saved.dtype):
            raise ValueError(f"{name} is {saved.dtype}{saved.shape}, not {dtype}{shape}")
        setattr(accumulator, name, np.ascontiguousarray(saved))


class Fields:
    """An accumulator whose state is the arrays that it declares, and nothing else."""

    FIELDS: ClassVar[tuple[str, ...]]

    def state(self) -> dict[str, np.ndarray]:
        """The declared arrays; shared, not copied."""
        return fields_of(self)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this state."""
        set_fields(self, state)
