"""Units of a layer that are not its neurons: what they read, what they detect, how, and what they write where.

A sparse autoencoder, a transcoder or a set of directions is one mechanism: a point of the model that is read, a matrix
of keys, an activation function, a matrix of values, and the points that these are added to. For neurons all five come
from the model (`parts.Layer`); where a layer has `LayerUnits`, its keys, values and activation are theirs.

With x what passes the point that is read, normalised if the units ask for that,

    coefficients m = activation((x - centre) keysᵀ + key_bias)
    written        scale (m values + bias) + shift + x skip

where scale and shift undo the normalisation of each token (1 and 0 without). What is written stands for what passes
the point that is written; the difference is the *error*, which is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from mnemoscope.model.parts import Anatomy, Factor, Layer

_BLOCK = 512  # units whose writing is added up at once: no number of threads then shows in the last bits


class UnitPoint(NamedTuple):
    """A place in a block where units may read or write.

    watched  its name for `watch.watch`; `traced` the field of a `LayerTrace`
    stage    of what is written there, after 2 x layer; see `Stream.carried`
    """

    watched: str
    traced: str
    stage: int


POINTS = {
    "residual_in": UnitPoint("lin", "lin", 0),
    "residual_mid": UnitPoint("ffn_norm_input", "lres", 1),
    "residual_out": UnitPoint("lout", "lout", 2),
    "attention_output": UnitPoint("attention_output", "attention_output", 0),
    "ffn_input": UnitPoint("ffn_input", "ffn_input", 1),
    "ffn_norm": UnitPoint("ffn_norm_input", "lres", 1),
    "ffn_output": UnitPoint("ffn_output", "ffn_output", 1),
}
"""What passes each: outputs are taken behind a post-norm, ``ffn_input`` is behind the norm with its weights and
``ffn_norm`` without them. TransformerLens calls them hook_resid_pre, hook_resid_mid, hook_resid_post, hook_attn_out,
mlp.hook_in, ln2.hook_normalized and hook_mlp_out."""

ORDER = (
    "residual_in", "attention_output", "residual_mid", "ffn_norm", "ffn_input", "ffn_output", "residual_out"
)  # fmt: skip
RESIDUAL = ("residual_in", "residual_mid", "residual_out")
WRITABLE = (*RESIDUAL, "attention_output", "ffn_output")


def passing(layer: Layer, point: str, seen: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """What passes a point of a layer, in fp32, from what was seen there."""
    x, norm = seen.float(), None
    if point == "ffn_norm":
        assert layer.ffn_norm is not None, "units that read behind a norm were refused where there is none"
        norm = replace(layer.ffn_norm, weight=None, bias=None)
    elif point in ("attention_output", "ffn_output"):
        norm = layer.post_attention_norm if point == "attention_output" else layer.post_ffn_norm
    return x if norm is None else norm(x)


@dataclass(frozen=True, eq=False)
class Activation:
    """What becomes of pre-activations: those that do not exceed a threshold, or are not among the k largest, give 0.

    threshold  of each unit: 0 for ReLU, none for the identity; JumpReLU and gated units have one of their own
    k          how many units of a token are active at most (TopK); None for any number
    signed     the k largest by magnitude are kept, with their sign (AbsTopK)
    """

    name: str
    threshold: Float[Tensor, " unit"] | None = None
    k: int | None = None
    signed: bool = False

    def __call__(self, pre: Float[Tensor, "*rows unit"]) -> Float[Tensor, "*rows unit"]:
        """The coefficients of all units of a layer."""
        if self.k is None:
            return self.alone(pre)
        order = (pre.abs() if self.signed else pre).topk(min(self.k, pre.shape[-1]), dim=-1).indices
        kept = torch.zeros_like(pre).scatter_(-1, order, pre.gather(-1, order))
        return self.alone(kept)

    def alone(self, pre: Float[Tensor, "*rows unit"]) -> Float[Tensor, "*rows unit"]:
        """What units would be if no others competed with them."""
        if self.threshold is None:
            return pre
        return torch.where(pre > self.threshold, pre, torch.zeros_like(pre))

    def beside(
        self, pre: Float[Tensor, "*rows other"], coefficients: Float[Tensor, "*rows unit"]
    ) -> Float[Tensor, "*rows other"]:
        """What other units would be that compete with all units of a layer, whose coefficients are given."""
        if self.k is None:
            return self.alone(pre)
        held = coefficients.abs() if self.signed else coefficients
        weakest = torch.where(held > 0, held, torch.inf).amin(-1, keepdim=True)
        strength = pre.abs() if self.signed else pre
        return self.alone(torch.where(strength > weakest, pre, torch.zeros_like(pre)))

    def of(self, units: Tensor) -> Activation:
        """The same of some of the units."""
        return replace(self, threshold=None if self.threshold is None else self.threshold[units])


@dataclass(frozen=True, eq=False)
class Write:
    """What the units of a layer write at one point of a layer, their own or one above it."""

    layer: int
    values: Float[Tensor, "unit width"]
    factor: Factor = 1.0  # what the model multiplies all with that is written there


class Reading(NamedTuple):
    """What units read of some tokens, ready for the keys, and what undoes the normalisation of each token."""

    inputs: Float[Tensor, "*rows width"]
    scale: Float[Tensor, "*rows 1"] | None = None
    shift: Float[Tensor, "*rows 1"] | None = None


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """The units of one layer; all weights in fp32.

    reads, writes  names of `POINTS`
    write          what they write, by layer; only a cross-layer transcoder writes in more layers than its own
    bias           what is written at the layer's own point whatever is active
    centre         what is taken from what is read
    skip           what is read, times this, is written as well
    norm           ``none``, ``layer_norm`` or ``constant_norm_rescale``: of each token that is read
    undone         whether what is written is normalised back
    names          what each unit is called, if it is called anything
    """

    reads: str
    writes: str
    keys: Float[Tensor, "unit width"]
    key_bias: Float[Tensor, " unit"]
    act: Activation
    write: tuple[Write, ...]
    bias: Float[Tensor, " width"]
    centre: Float[Tensor, " width"] | None = None
    skip: Float[Tensor, "width out"] | None = None
    norm: str = "none"
    undone: bool = True
    names: tuple[str, ...] = ()

    def _statistics(
        self, x: Float[Tensor, "*rows width"]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is taken from each token, what undoes the division of the rest, and what that is divided by."""
        if self.norm == "layer_norm":  # as SAELens has it: the deviation of a sample
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True)
            return shift, scale, scale + 1e-5
        if self.norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return None, scale, scale
        return None, None, None

    def read(self, x: Float[Tensor, "*rows width"]) -> Reading:
        """What passed the point that is read, in fp32, as the keys see it."""
        shift, scale, divisor = self._statistics(x)
        x = x if shift is None else x - shift
        x = x if divisor is None else x / divisor
        x = x if self.centre is None else x - self.centre
        return Reading(x, *((scale, shift) if self.undone else ()))

    def frozen(
        self, x: Float[Tensor, " width"], chosen: Int[Tensor, " chosen"]
    ) -> tuple[Float[Tensor, "chosen width"], Float[Tensor, " chosen"]]:
        """Keys and biases of some units of what passes the point itself, with the statistics of a token held."""
        keys, bias = self.keys[chosen], self.key_bias[chosen]
        bias = bias if self.centre is None else bias - keys @ self.centre
        shift, _, divisor = self._statistics(x)
        keys = keys if shift is None else keys - keys.mean(-1, keepdim=True)
        return (keys if divisor is None else keys / divisor), bias

    def pre(self, reading: Reading) -> Float[Tensor, "*rows unit"]:
        """Pre-activations."""
        return nn.functional.linear(reading.inputs, self.keys, self.key_bias)

    def fixed(self, x: Float[Tensor, "*rows width"], reading: Reading) -> Float[Tensor, "*rows out"]:
        """What is written at the layer's own point by no unit: bias, skip and what undoes the normalisation."""
        written = self.bias.expand(*x.shape[:-1], -1)
        written = written if reading.scale is None else written * reading.scale
        written = written if reading.shift is None else written + reading.shift
        return written if self.skip is None else written + x @ self.skip

    def values(self) -> Float[Tensor, "unit width"]:
        """What each unit adds to the stream for a coefficient of 1, in all layers that it writes in."""
        return torch.stack([write.factor * write.values for write in self.write]).sum(0)

    def to(self, device: torch.device) -> LayerUnits:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: each.to(device) for name, each in vars(self).items() if isinstance(each, Tensor)
        }
        threshold = None if self.act.threshold is None else self.act.threshold.to(device)
        writes = tuple(replace(write, values=write.values.to(device)) for write in self.write)
        return replace(self, **moved, act=replace(self.act, threshold=threshold), write=writes)


def multiplied(
    coefficients: Float[Tensor, "*rows unit"], values: Float[Tensor, "unit width"]
) -> Float[Tensor, "*rows width"]:
    """The sum of coefficients times values, added up block by block (see `nulls._product`)."""
    total = coefficients[..., :_BLOCK] @ values[:_BLOCK]
    for start in range(_BLOCK, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        total += coefficients[..., block] @ values[block]
    return total


class Rebuilding:
    """What units make of one pass, layer by layer: their coefficients, and what all of them together say is written."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._layers = anatomy.layers
        self._written: dict[int, Tensor] = {}
        self.fixed: dict[int, Tensor] = {}  # of each layer that was read, what no unit of it wrote
        self.active: dict[int, Tensor] = {}  # of each layer that was read, how many units of each token

    def read(self, layer: int, seen: Float[Tensor, "*rows width"]) -> tuple[Reading, Tensor]:
        """What the units of a layer read, and their coefficients, from what was seen at the point they read."""
        block = self._layers[layer]
        units = block.units
        assert units is not None, "a layer without units is not asked for them"
        x = passing(block, units.reads, seen)
        reading = units.read(x)
        coefficients = units.act(units.pre(reading))
        self.active[layer] = (coefficients != 0).sum(-1)
        amounts = coefficients if reading.scale is None else coefficients * reading.scale
        for write in units.write:
            self._add(write.layer, multiplied(amounts, write.values))
        self.fixed[layer] = units.fixed(x, reading)
        self._add(layer, self.fixed[layer])
        return reading, coefficients

    def _add(self, layer: int, written: Tensor) -> None:
        self._written[layer] = self._written[layer] + written if layer in self._written else written

    def rebuilt(self, layer: int) -> Float[Tensor, "*rows width"] | None:
        """`written`, or None at a layer that no units write in."""
        return self._written.pop(layer, None)

    def written(self, layer: int) -> Float[Tensor, "*rows width"]:
        """What units say is written at a layer, once they have been read there and below."""
        return self._written.pop(layer)


def points_of(anatomy: Anatomy) -> dict[int, tuple[str, ...]]:
    """Of each layer that units read or write in, the points, as `watch` calls them."""
    points: dict[int, list[str]] = {}
    for layer, units in _units_of(anatomy):
        points.setdefault(layer, []).append(POINTS[units.reads].watched)
        for write in units.write:
            points.setdefault(write.layer, []).append(POINTS[units.writes].watched)
    return {layer: tuple(dict.fromkeys(names)) for layer, names in sorted(points.items())}


def _units_of(anatomy: Anatomy) -> Iterable[tuple[int, LayerUnits]]:
    return ((index, layer.units) for index, layer in enumerate(anatomy.layers) if layer.units is not None)
