"""A forward pass as a sum of parts where units that are not neurons are read: what they write, and what is nobody's.

Units stand for what passes the point that they write, and their error for what of it they leave. Of a layer's FFN or
attention they take the place of its neurons or heads; an FFN without units is one part. Units of the residual stream
take the place of all that was written up to there: where several layers have such units, those of the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.parts import Anatomy
from mnemoscope.model.units import POINTS, RESIDUAL, Rebuilding, passing

if TYPE_CHECKING:
    from mnemoscope.model.stream import Stream
    from mnemoscope.model.watch import LayerTrace

Beside = tuple[str, int | None, Tensor]
"""A part that is neither of heads nor of units: its name, the point of the stream that it is added to, and its vector.
The point is None where it is added to nothing."""


def with_units(anatomy: Anatomy, layers: Sequence[LayerTrace]) -> tuple[LayerTrace, ...]:
    """What blocks did, with the units of each layer in the place of its neurons."""
    rebuilding, read = Rebuilding(anatomy), []
    for index, (block, traced) in enumerate(zip(anatomy.layers, layers, strict=True)):
        nothing, units = traced.lin.new_zeros(len(traced.lin), 0), block.units
        coefficients, pre, scale = nothing, nothing, None
        if units is not None:
            reading, coefficients = rebuilding.read(index, getattr(traced, POINTS[units.reads].traced))
            pre, scale = units.pre(reading), reading.scale
        read.append(
            replace(
                traced, coefficients=coefficients, gate=pre, up=None, scores=None, weights=None, unit_scale=scale,
                rebuilt=rebuilding.rebuilt(index), unit_bias=rebuilding.fixed.get(index),
            )
        )  # fmt: skip
    return tuple(read)


def writes(anatomy: Anatomy) -> str:
    """The point that all units write; they are of one kind."""
    return next(layer.units.writes for layer in anatomy.layers if layer.units is not None)


def last_layer(anatomy: Anatomy) -> int:
    """The last layer with units."""
    return max(index for index, layer in enumerate(anatomy.layers) if layer.units is not None)


def replaced(anatomy: Anatomy) -> int:
    """The point of the stream that units stand for, with all that was written before it; -1 where they do not."""
    if not anatomy.of_units or (point := writes(anatomy)) not in RESIDUAL:
        return -1
    return 2 * last_layer(anatomy) + POINTS[point].stage


def heads_are_replaced(anatomy: Anatomy, layer: int) -> bool:
    """Whether units stand for the heads of a layer, or for all of the stream that these are in."""
    if not anatomy.of_units:
        return False
    block = anatomy.layers[layer]
    return 2 * layer < replaced(anatomy) or (
        block.units is not None and block.units.writes == "attention_output"
    )


def base(anatomy: Anatomy, layer: int) -> int | None:
    """The point of the stream that the neurons or units of a layer are added to; None for nothing."""
    units = anatomy.layers[layer].units
    if units is None:
        return 2 * layer + 1
    return None if units.writes in RESIDUAL else 2 * layer + POINTS[units.writes].stage


def unit_amounts(
    stream: Stream, layer: int, position: int, chosen: Int[Tensor, " unit"] | slice = slice(None)
) -> Float[Tensor, " unit"]:
    """What the value of each unit was multiplied with."""
    traced = stream.layers[layer]
    amounts = traced.coefficients[position][chosen]
    return amounts if traced.unit_scale is None else amounts * traced.unit_scale[position]


def unit_parts(
    stream: Stream,
    layer: int,
    position: int,
    chosen: Int[Tensor, " unit"] | slice,
    updates: range | None = None,
) -> Float[Tensor, "unit out"]:
    """What each unit of a layer writes, in all updates of the stream that it writes in, or in some."""
    units, amounts = stream.anatomy.layers[layer].units, unit_amounts(stream, layer, position, chosen)
    total = stream.final.new_zeros(len(amounts), stream.final.shape[-1], dtype=torch.float32)
    for write in () if units is None else units.write:
        stage = 2 * write.layer + POINTS[writes(stream.anatomy)].stage
        if stage >= replaced(stream.anatomy) and (updates is None or stage in updates):
            written = amounts[:, None] * write.factor * write.values[chosen]
            total = total + stream.carried(written, stage, position)
    return total


def updates_read(anatomy: Anatomy, layer: int) -> range:
    """The updates of the stream that the units of a layer read: 2 x layer that of an attention, one more of an FFN.

    Units that read what attention or FFN write read that alone; others all that was written before, and the embedding.
    """
    units = anatomy.layers[layer].units
    assert units is not None, "a layer without units reads nothing"
    step = 2 * layer + POINTS[units.reads].stage
    if units.reads in ("attention_output", "ffn_output"):
        return range(step, step + 1)
    return range(step - (units.reads == "ffn_input" and anatomy.parallel))


def rebuilt_at(stream: Stream, step: int) -> bool:
    """Whether units stand for an update of the stream."""
    layer, half = divmod(step, 2)
    point = ("attention_output", "ffn_output")[half]
    return writes(stream.anatomy) == point and stream.layers[layer].rebuilt is not None


def beside_units(stream: Stream, layer: int, position: int) -> list[Beside]:
    """What a layer adds that no head and no unit wrote: with biases, FFNs without units, and errors."""
    traced, point, start = stream.layers[layer], writes(stream.anatomy), replaced(stream.anatomy)
    parts: list[Beside] = []
    stage = 2 * layer + POINTS[point].stage
    if traced.rebuilt is not None and point in RESIDUAL and stage == start:
        rows = _unit_rows(stream, layer, position)
        parts += [(name, None, stream.carried(vector, stage, position)) for name, vector in rows]
    for step in (2 * layer, 2 * layer + 1):
        if step >= start:
            parts += beside_update(stream, step, position, rebuilt_at(stream, step))
    return parts


def beside_update(stream: Stream, step: int, position: int, rebuilt: bool) -> list[Beside]:
    """What an update of the stream adds that no head and no unit wrote.

    rebuilt  units stand for it: their bias and error, with what a norm of the stream adds there
    """
    layer, half = divmod(step, 2)
    block, traced = stream.anatomy.layers[layer], stream.layers[layer]
    if not rebuilt and half:
        return [("ffn", step, stream.ffn_whole(layer, position))]
    if not rebuilt:
        return [(block.beside_heads, step, stream.attention_bias(layer, position))]
    factor = block.ffn_multiplier if half else block.attention_multiplier
    (bias, fixed), (error, left) = _unit_rows(stream, layer, position)
    parts: list[Beside] = [
        (bias, step, stream.with_norm(fixed * factor, step, position)),
        (error, step, stream.carried(left * factor, step, position)),
    ]
    if half and traced.extra_output is not None:
        extra = traced.extra_output[position].float() * block.ffn_multiplier
        parts.append((block.beside_neurons, step, stream.carried(extra, step, position)))
    return parts


def _unit_rows(stream: Stream, layer: int, position: int) -> list[tuple[str, Tensor]]:
    """What the units of a layer write whatever is active, and what they leave, where they write it."""
    block, traced, point = stream.anatomy.layers[layer], stream.layers[layer], writes(stream.anatomy)
    assert traced.rebuilt is not None, "nothing is rebuilt where nothing is written"
    seen = passing(block, point, getattr(traced, POINTS[point].traced)[position])
    bias = torch.zeros_like(seen) if traced.unit_bias is None else traced.unit_bias[position]
    return [("unit bias", bias), ("unit error", seen - traced.rebuilt[position])]
