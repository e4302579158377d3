"""One layer of one batch, read once: by compiled loops on the CPU, and on an accelerator where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.errors import ActivationError
from mnemoscope.mine import device, kernel
from mnemoscope.mine.places import HISTOGRAM_EVERY, CountedPlaces
from mnemoscope.mine.reading import PARTS, Contenders, Extremes, LayerReading, bits_or_floats, share_out
from mnemoscope.model.capture import LayerRows
from mnemoscope.records import ContextBatch

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
    floor: np.ndarray | None = None,
) -> LayerReading:
    """Reduce a layer's coefficients, reading each once: compiled on the CPU, and on an accelerator there.

    coefficients  fp32 or bf16 (read as they are), or another float dtype (converted to fp32 first)
    pivot         f32[neuron], from which power sums are taken; default: the first counted coefficient
    floor         f32[polarity neuron], below which nothing enters a list: a device tells of nothing else

    Raises ActivationError when a counted coefficient is NaN or infinite.
    """
    assert coefficients.shape[:2] == batch.tokens.shape, (coefficients.shape, batch.tokens.shape)
    assert (gate is None) == (up is None)
    places = places or CountedPlaces.of(batch, HISTOGRAM_EVERY)
    pivot = _first(coefficients, places) if pivot is None else pivot
    if device.elsewhere(coefficients):
        branches = None if gate is None or up is None else (gate, up)
        reading = _on_device(layer, coefficients, batch, branches, places, pivot, floor)
        if reading is not None:
            return reading
    values = bits_or_floats(coefficients)
    (n_contexts, n_tokens), neurons = batch.tokens.shape, coefficients.shape[2]
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


def _on_device(
    layer: int,
    coefficients: Coefficients,
    batch: ContextBatch,
    branches: tuple[Coefficients, Coefficients] | None,
    places: CountedPlaces,
    pivot: np.ndarray,
    floor: np.ndarray | None,
) -> LayerReading | None:
    """`scan` where the coefficients are; None where their powers are not finite."""
    reduced = device.reduce(_rows(coefficients), _segments(places), pivot[None])
    if not np.isfinite(reduced.sums).all():
        return None
    contenders = _contenders(reduced, floor, (1, len(pivot)), branches)
    largest, smallest = (
        Contenders(
            neuron, context, row - context * batch.tokens.shape[1], row, value, signs, furthest.ravel()
        )
        for context, neuron, row, signs, value, furthest in contenders
    )
    return LayerReading(
        layer, batch, places, pivot, largest, smallest, _added_in_order(reduced.sums), reduced.positive.sum(0),
        bits_or_floats(reduced.kept[None]), np.arange(len(places.chosen)), *_one_group(places),
        binned=reduced.bins,
    )  # fmt: skip


@lru_cache(maxsize=2)  # all layers of a batch have the same
def _segments(places: CountedPlaces) -> device.Segments:
    """One for each context."""
    parts = np.array([(first, last, 0) for first, last in places.parts])
    numbers = places.number[places.rows]
    return device.Segments(places.rows, places.offsets[:-1], places.offsets[1:], parts, numbers)


def _contenders(
    reduced: device.Reduced,
    floor: np.ndarray | None,
    shape: tuple[int, int],
    branches: tuple[Tensor, Tensor] | None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """`device.contenders` of the largest, and of the most negative; branches are flattened to rows."""
    flat = None if branches is None else (branches[0].flatten(0, -2), branches[1].flatten(0, -2))
    floors = np.zeros((2, *shape), np.float32) if floor is None else floor.reshape(2, *shape)
    yield device.contenders(reduced.largest, reduced.largest_at, 1, floors[0], flat)
    yield device.contenders(reduced.smallest, reduced.smallest_at, -1, floors[1], flat)


def _rows(coefficients: Tensor) -> Float[Tensor, "row neuron"]:
    """As fp32 or bf16, one row after another."""
    x = coefficients.detach().flatten(0, -2)
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def scan_routed(
    rows: LayerRows,
    batch: ContextBatch,
    places: CountedPlaces,
    pivot: np.ndarray | None = None,
    floor: np.ndarray | None = None,
) -> LayerReading:
    """`scan` of experts: each of the tokens that were routed to it, as if the batch had no others.

    places  of the whole batch
    pivot   as in `scan`, or NaN in experts of which none is known
    """
    every = np.arange(batch.tokens.size) if rows.rows is None else rows.rows.cpu().numpy()
    groups, group = len(rows.starts) - 1, np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
    here = np.flatnonzero(batch.counted.ravel()[every])
    # Rows are in the order of groups, and in each of the batch.
    beginnings = np.arange(groups)[:, None] * batch.tokens.size + places.starts
    counted = every[here]
    offsets = np.searchsorted(group[here] * batch.tokens.size + counted, beginnings)
    pivot = _first_of_groups(pivot, rows.coefficients, here, offsets)
    number = places.number[every]
    selected = np.flatnonzero(number >= 0)
    inside = number[selected]
    routed = replace(
        places, rows=counted, offsets=offsets, chosen=places.chosen[inside], hashes=places.hashes[inside],
        positions=every.astype(np.int32) % np.int32(batch.tokens.shape[1]),
    )  # fmt: skip
    reduce = _groups_on_device if device.elsewhere(rows.coefficients) else _groups
    reduced = reduce(rows, here, offsets, selected, pivot, floor, routed)
    if reduced is None:  # what a device cannot hold
        reduced = _groups(rows, here, offsets, selected, pivot, floor, routed)
    largest, smallest, sums, positive, values, chosen, bins = reduced
    reading = LayerReading(
        rows.layer, batch, routed, pivot, largest, smallest, sums.swapaxes(0, 1).reshape(4, -1), positive.ravel(),
        values, chosen, offsets[:, -1] - offsets[:, 0], np.searchsorted(selected, rows.starts), rows.first,
        _weights(rows), bins,
    )  # fmt: skip
    _check_finite(reading, counted_rows=here)
    return reading


Groups = tuple[
    Extremes | Contenders,
    Extremes | Contenders,
    np.ndarray,  # sums f64[group 4 neuron]
    np.ndarray,  # positive i64[group neuron]
    np.ndarray,  # values
    np.ndarray,  # chosen
    np.ndarray | None,  # bins
]


def _groups(
    rows: LayerRows,
    here: np.ndarray,
    offsets: np.ndarray,
    selected: np.ndarray,
    pivot: np.ndarray,
    floor: np.ndarray | None,
    places: CountedPlaces,
) -> Groups:
    """What experts amount to, by compiled loops.

    here      rows that count
    offsets   i64[group context + 1]  where each context of each group begins among these
    selected  rows that go into histograms and samples
    """
    values = bits_or_floats(rows.coefficients[None])
    groups, contexts, neurons = len(offsets), offsets.shape[1] - 1, values.shape[1]
    maximum, minimum = np.empty((2, groups, contexts, neurons), np.float32)
    maximum_at, minimum_at = np.empty((2, groups, contexts, neurons), np.int32)
    sums, positive = np.empty((groups, 4, neurons)), np.empty((groups, neurons), np.int64)
    step = -(-groups // PARTS)
    share_out(
        lambda start: kernel.reduce_groups(
            values, here, offsets, start, min(start + step, groups), pivot.reshape(groups, neurons),
            maximum, maximum_at, minimum, minimum_at, sums, positive,
        ),
        range(0, groups, step),
    )  # fmt: skip
    branches = (None, None) if rows.up is None else (_few_of(rows.gate), _few_of(rows.up))
    largest, smallest = Extremes(maximum, maximum_at, *branches), Extremes(minimum, minimum_at, *branches)
    return largest, smallest, sums, positive, values, selected, None


def _groups_on_device(
    rows: LayerRows,
    here: np.ndarray,
    offsets: np.ndarray,
    selected: np.ndarray,
    pivot: np.ndarray,
    floor: np.ndarray | None,
    places: CountedPlaces,
) -> Groups | None:
    """`_groups` where the coefficients are; None where their powers are not finite."""
    groups, contexts, neurons = len(offsets), offsets.shape[1] - 1, rows.coefficients.shape[1]
    first = np.arange(groups) * contexts
    numbers = np.full(len(places.positions), -1)
    numbers[selected] = np.arange(len(selected))
    segments = device.Segments(
        here, offsets[:, :-1].ravel(), offsets[:, 1:].ravel(),
        np.stack([first, first + contexts, np.arange(groups)], 1), numbers[here],
    )  # fmt: skip
    reduced = device.reduce(_rows(rows.coefficients), segments, pivot.reshape(groups, neurons))
    if not np.isfinite(reduced.sums).all():
        return None
    contenders = _contenders(
        reduced, floor, (groups, neurons), None if rows.up is None else (rows.gate, rows.up)
    )
    largest, smallest = (
        Contenders(
            segment // contexts * neurons + neuron, segment % contexts, places.positions[row].astype(np.int64),
            row, value, signs, furthest.ravel(),
        )
        for segment, neuron, row, signs, value, furthest in contenders
    )  # fmt: skip
    chosen = np.arange(len(selected))
    values = bits_or_floats(reduced.kept[None])
    return largest, smallest, reduced.sums, reduced.positive, values, chosen, reduced.bins


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
    known: np.ndarray | None, values: Tensor, rows: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """f32[neuron]: what is known, and else the first counted coefficient of the group, 0 when none counts."""
    pivot = np.full(len(offsets) * values.shape[1], np.nan, np.float32) if known is None else known
    by_group = pivot.reshape(len(offsets), -1)
    missing = np.flatnonzero(np.isnan(by_group[:, 0]))
    by_group[missing] = 0.0
    counted = missing[offsets[missing, -1] > offsets[missing, 0]]
    first = torch.from_numpy(rows[offsets[counted, 0]]).to(values.device)
    by_group[counted] = values.detach()[first].float().cpu().numpy()
    return pivot


def _as_floats(x: np.ndarray) -> np.ndarray:
    """What `bits_or_floats` gave, as fp32."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def _added_in_order(parts: np.ndarray) -> np.ndarray:
    total = np.zeros(parts.shape[1:])
    for partial_sums in parts:
        total += partial_sums
    return total


def _check_finite(reading: LayerReading, counted_rows: np.ndarray | None = None) -> None:
    """No read is spent on this: a power sum of finite fp32 numbers is finite, and of others never.

    counted_rows  of the values; by default they are those of the batch
    """
    if np.isfinite(reading.sums[3]).all():
        return
    rows = reading.places.rows
    counted = _as_floats(reading.values[rows if counted_rows is None else counted_rows])
    row, neuron = np.argwhere(~np.isfinite(counted))[0]
    group = int(np.searchsorted(reading.counted.cumsum(), row, side="right"))
    context, position = divmod(int(rows[row]), reading.batch.tokens.shape[1])
    name = f"L{reading.layer}N{reading.first + group * reading.width + neuron}"
    raise ActivationError(
        f"reading activations: {name} is {counted[row, neuron]} at position {position} of "
        f"context {reading.batch.contexts[context]}; finite numbers are needed: load the model with dtype fp32, "
        "or check its weights"
    )
