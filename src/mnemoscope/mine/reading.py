"""One layer of one batch, read once: what every accumulator is fed with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.errors import ActivationError
from mnemoscope.mine import kernel
from mnemoscope.mine.places import HISTOGRAM_EVERY, CountedPlaces
from mnemoscope.model.capture import LayerRows
from mnemoscope.records import Cells, ContextBatch

_ROWS, _BLOCK = 128, 128  # rows, and neurons, that a thread takes at a time
_PARTS = 8  # of experts, of which each thread takes one at a time


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
    """

    layer: int
    batch: ContextBatch
    places: CountedPlaces
    pivot: np.ndarray
    largest: Extremes
    smallest: Extremes
    sums: np.ndarray
    positive: np.ndarray
    values: np.ndarray
    chosen: np.ndarray
    counted: np.ndarray
    cuts: np.ndarray
    first: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

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
            step = -(-groups // _PARTS)
            share_out(lambda group: work(group, min(group + step, groups), 0, width), range(0, groups, step))

    @cached_property
    def bins(self) -> np.ndarray:
        """u8[selected neuron]: the histogram bins of the chosen rows."""
        bins = np.empty((len(self.chosen), self.values.shape[1]), np.uint8)

        def rows(first: int) -> None:
            kernel.assign_bins(self.values, self.chosen, first, min(first + _ROWS, len(bins)), bins)

        share_out(rows, range(0, len(bins), _ROWS))
        return bins


Coefficients = Float[Tensor, "context token neuron"]


def scan(
    layer: int,
    coefficients: Coefficients,
    batch: ContextBatch,
    gate: Coefficients | None = None,
    up: Coefficients | None = None,
    *,
    places: CountedPlaces | None = None,
    pivot: np.ndarray | None = None,
) -> LayerReading:
    """Reduce a layer's coefficients, reading each once: compiled on the CPU, with `scan_torch` elsewhere.

    coefficients  fp32 or bf16 (read as they are), or another float dtype (converted to fp32 first)
    pivot         f32[neuron], from which power sums are taken; default: the first counted coefficient

    Raises ActivationError when a counted coefficient is NaN or infinite.
    """
    assert coefficients.shape[:2] == batch.tokens.shape, (coefficients.shape, batch.tokens.shape)
    assert (gate is None) == (up is None)
    places = places or CountedPlaces.of(batch, HISTOGRAM_EVERY)
    if coefficients.device.type != "cpu":
        return scan_torch(layer, coefficients, batch, gate, up, places=places, pivot=pivot)
    values = bits_or_floats(coefficients)
    (n_contexts, n_tokens), neurons = batch.tokens.shape, coefficients.shape[2]
    pivot = _first(coefficients, places) if pivot is None else pivot
    maximum, minimum = np.empty((2, n_contexts, neurons), np.float32)
    maximum_at, minimum_at = np.empty((2, n_contexts, neurons), np.int32)
    sums = np.empty((len(places.parts), 4, neurons))
    positive = np.empty((len(places.parts), neurons), np.int64)

    def reduce_range(index: int) -> None:
        kernel.reduce_contexts(
            values, places.rows, places.offsets, n_tokens, *places.parts[index], pivot,
            maximum, maximum_at, minimum, minimum_at, sums[index], positive[index],
        )  # fmt: skip

    share_out(reduce_range, range(len(places.parts)))
    gates = (None, None) if gate is None or up is None else (bits_or_floats(gate), bits_or_floats(up))
    reading = LayerReading(
        layer, batch, places, pivot,
        Extremes(maximum, maximum_at, *gates), Extremes(minimum, minimum_at, *gates),
        _added_in_order(sums), positive.sum(0), values, places.chosen, *_one_group(places),
    )  # fmt: skip
    _check_finite(reading)
    return reading


def scan_routed(
    rows: LayerRows, batch: ContextBatch, places: CountedPlaces, pivot: np.ndarray | None = None
) -> LayerReading:
    """`scan` of experts: each of the tokens that were routed to it, as if the batch had no others.

    places  of the whole batch
    pivot   as in `scan`, or NaN in experts of which none is known
    """
    contexts, n_tokens = batch.tokens.shape
    every = np.arange(batch.tokens.size) if rows.rows is None else rows.rows.cpu().numpy()
    groups, group = len(rows.starts) - 1, np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
    here = np.flatnonzero(batch.counted.ravel()[every])
    # Rows are in the order of groups, and in each of the batch.
    beginnings = np.arange(groups)[:, None] * batch.tokens.size + places.starts
    counted = every[here]
    offsets = np.searchsorted(group[here] * batch.tokens.size + counted, beginnings)
    values = bits_or_floats(rows.coefficients[None])
    shape = (groups, values.shape[1])
    pivot = _first_of_groups(pivot, values, here, offsets)
    maximum, minimum = np.empty((2, groups, contexts, shape[1]), np.float32)
    maximum_at, minimum_at = np.empty((2, groups, contexts, shape[1]), np.int32)
    sums, positive = np.empty((groups, 4, shape[1])), np.empty(shape, np.int64)
    step = -(-groups // _PARTS)
    share_out(
        lambda start: kernel.reduce_groups(
            values, here, offsets, start, min(start + step, groups), pivot.reshape(shape),
            maximum, maximum_at, minimum, minimum_at, sums, positive,
        ),
        range(0, groups, step),
    )  # fmt: skip
    branches = (None, None) if rows.up is None else (_few_of(rows.gate), _few_of(rows.up))
    number = places.number[every]
    selected = np.flatnonzero(number >= 0)
    inside = number[selected]
    routed = replace(
        places, rows=counted, offsets=offsets, chosen=places.chosen[inside], hashes=places.hashes[inside],
        positions=every.astype(np.int32) % np.int32(n_tokens),
    )  # fmt: skip
    reading = LayerReading(
        rows.layer, batch, routed, pivot,
        Extremes(maximum, maximum_at, *branches), Extremes(minimum, minimum_at, *branches),
        sums.swapaxes(0, 1).reshape(4, -1), positive.ravel(), values, selected,
        offsets[:, -1] - offsets[:, 0], np.searchsorted(selected, rows.starts), rows.first, _weights(rows),
    )  # fmt: skip
    _check_finite(reading, counted_rows=here)
    return reading


def scan_torch(
    layer: int,
    coefficients: Coefficients,
    batch: ContextBatch,
    gate: Coefficients | None = None,
    up: Coefficients | None = None,
    *,
    places: CountedPlaces | None = None,
    pivot: np.ndarray | None = None,
) -> LayerReading:
    """`scan` in plain torch, for any device; equal to it but for the order in which power sums are added."""
    places = places or CountedPlaces.of(batch, HISTOGRAM_EVERY)
    pivot = _first(coefficients, places) if pivot is None else pivot
    device = coefficients.device
    counted = torch.from_numpy(batch.counted).to(device)[..., None]
    x = coefficients.detach().float()
    none = ~counted.any(1)

    def extremes(filler: float, reduce: Callable[..., Tensor]) -> Extremes:
        filled = torch.where(counted, x, filler)
        value = reduce(filled, 1)
        first = ((filled == value[:, None]) & counted).to(torch.uint8).argmax(1)
        signs = [
            None if branch is None else bits_or_floats(branch.gather(1, first[:, None]))
            for branch in (gate, up)
        ]
        position = torch.where(none, -1, first).to(torch.int32)
        return Extremes(value.cpu().numpy(), position.cpu().numpy(), *signs)

    d = torch.where(counted, x.double() - torch.from_numpy(pivot).to(device).double(), 0.0)
    sums = torch.stack([(d**power).sum((0, 1)) for power in range(1, 5)])
    chosen = x.flatten(0, 1)[torch.from_numpy(places.chosen).to(device)]
    reading = LayerReading(
        layer, batch, places, pivot,
        extremes(-np.inf, torch.amax), extremes(np.inf, torch.amin),
        sums.cpu().numpy(), ((x > 0) & counted).sum((0, 1)).cpu().numpy(),
        chosen.cpu().numpy(), np.arange(len(places.chosen)), *_one_group(places),
    )  # fmt: skip
    _check_finite(reading, x)
    return reading


def bits_or_floats(x: Tensor) -> np.ndarray:
    """[row, neuron] as float32 or the bits of bfloat16; shares memory where it can."""
    x = x.detach().flatten(0, 1).contiguous().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.float().numpy()


def _few_of(x: Tensor) -> np.ndarray:
    """`bits_or_floats` of what few numbers will be read of: not copied where that can be."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return bits_or_floats(x[None])
    return x.detach().numpy()


def _weights(rows: LayerRows) -> np.ndarray:
    """f32[row]: the router's weights."""
    if isinstance(rows.weight, float):
        return np.full(len(rows.coefficients), rows.weight, np.float32)
    return rows.weight.detach().cpu().numpy()


def _one_group(places: CountedPlaces) -> tuple[np.ndarray, np.ndarray]:
    """`counted` and `cuts` where all neurons run on all positions."""
    return np.array([len(places.rows)]), np.array([0, len(places.chosen)])


def _first(coefficients: Tensor, places: CountedPlaces) -> np.ndarray:
    """f32[neuron]: the first counted coefficient, 0 when none counts."""
    if not len(places.rows):
        return np.zeros(coefficients.shape[2], np.float32)
    context, position = divmod(int(places.rows[0]), coefficients.shape[1])
    return coefficients[context, position].detach().float().cpu().numpy().copy()


def _first_of_groups(
    known: np.ndarray | None, values: np.ndarray, rows: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """f32[neuron]: what is known, and else the first counted coefficient of the group, 0 when none counts."""
    pivot = np.full(len(offsets) * values.shape[1], np.nan, np.float32) if known is None else known
    by_group = pivot.reshape(len(offsets), -1)
    missing = np.flatnonzero(np.isnan(by_group[:, 0]))
    by_group[missing] = 0.0
    counted = missing[offsets[missing, -1] > offsets[missing, 0]]
    by_group[counted] = _as_floats(values[rows[offsets[counted, 0]]])
    return pivot


def _as_floats(x: np.ndarray) -> np.ndarray:
    """What `bits_or_floats` gave, as fp32."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def _added_in_order(parts: np.ndarray) -> np.ndarray:
    total = np.zeros(parts.shape[1:])
    for partial_sums in parts:
        total += partial_sums
    return total


def _check_finite(
    reading: LayerReading, values: Tensor | None = None, counted_rows: np.ndarray | None = None
) -> None:
    """No read is spent on this: a power sum of finite fp32 numbers is finite, and of others never.

    counted_rows  of the values; by default they are those of the batch
    """
    if np.isfinite(reading.sums[3]).all():
        return
    rows = reading.places.rows
    x = reading.values if values is None else values.flatten(0, 1).cpu().numpy()
    counted = _as_floats(x[rows if counted_rows is None else counted_rows])
    row, neuron = np.argwhere(~np.isfinite(counted))[0]
    group = int(np.searchsorted(reading.counted.cumsum(), row, side="right"))
    context, position = divmod(int(rows[row]), reading.batch.tokens.shape[1])
    name = f"L{reading.layer}N{reading.first + group * reading.width + neuron}"
    raise ActivationError(
        f"reading activations: {name} is {counted[row, neuron]} at position {position} of "
        f"context {reading.batch.contexts[context]}; finite numbers are needed: load the model with dtype fp32, "
        "or check its weights"
    )


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
