"""Coefficients and attention sub-values are shared among the vectors that came before: who switched a memory on.

A neuron reads ``g = norm(x) . k + b`` with ``norm(x) = w * (x - [mean]) * s + c``. With the statistic ``s`` frozen at
what it was, ``g = x . K + B`` for the norm-folded key ``K = s [centre] (w * k)`` and ``B = c . k + b`` (Yu et al. 2023,
Eq. 22-23, A42; "variance" there is the standard deviation, and ours includes it in K, so that inner products are in
units of the pre-activation). As x is the sum of everything written before, so is g.

The activation is ``act(g) = g r(g)`` (SiLU: r is the sigmoid, GELU: the normal CDF, ReLU: a step). With r frozen a
plain coefficient is linear in x, and a gated one, ``m = act(g) u``, is a product of two linear terms; its Shapley value
is

    m_q = (act(g) u_q + r(g) g_q u) / 2,   adding up to m over all q and the bias         (B.5)

so that in either case ``m_q = q . key + bias``: one vector per neuron (`Switches.key`).

In a mixture of experts m = F(g, u) by the experts' own code, which may clamp, or add to u. Its factors are m / g, and
(m - F(g, 0)) / u with F(g, 0) in the bias, both frozen; where F(g, u) is ``act(g) u`` they are those above. Shares are
of the coefficient; what a neuron brings to those above it is its coefficient times the router's weight. The router is
read as it was: that a vector changes which experts run, or by how much, is not among the shares.

Units that are not neurons pass g on, or not: r is 1 or 0, and what competes with them (TopK) is held as it was. What
they read may be normalised once more by themselves, with statistics that are held too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.parts import Layer, Norm, is_one
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import unit_amounts
from mnemoscope.model.units import POINTS, LayerUnits, passing
from mnemoscope.records import Cells

_TINY = 1e-4  # a pre-activation closer to 0 than this takes r(g) from here


@dataclass(frozen=True, eq=False)
class Linear:
    """Something linear in the residual: ``q . key`` for each vector q written before, and a bias; fp32."""

    key: Float[Tensor, "neuron width"]
    bias: Float[Tensor, " neuron"]

    def of(self, queries: Float[Tensor, "query width"]) -> Float[Tensor, "query neuron"]:
        """The share of each query in each neuron."""
        return queries.float() @ self.key.T


@dataclass(frozen=True, eq=False)
class Switches:
    """Neurons of one layer at one position, ready to be shared among what came before.

    share  the coefficient by B.5: all queries and the bias add up to it
    gate   all credit to the gate branch, `up` all to the other (None if plain): each adds up to it as well
    inner  the pre-activation of the gate (the only one, if plain): inner products with the norm-folded key
    """

    layer: int
    neurons: Int[Tensor, " neuron"]
    coefficient: Float[Tensor, " neuron"]
    share: Linear
    gate: Linear
    up: Linear | None
    inner: Linear


def switches(
    stream: Stream, layer: int, position: int, neurons: Int[Tensor, " neuron"] | None = None
) -> Switches:
    """The linear form of some neurons (all by default) of a layer at a position."""
    block, traced = stream.anatomy.layers[layer], stream.layers[layer]
    if neurons is None:
        neurons = torch.arange(stream.anatomy.sizes[layer])
    if block.units is not None:
        return _of_units(stream, layer, position, neurons, block.units)
    residual = (traced.lin if stream.anatomy.parallel else traced.lres)[position].float()
    scores = None if traced.scores is None else block.spread(traced.scores[position])[neurons]
    inner = folded(block.ffn_norm, residual, block.keys()[neurons], _rows_of(block.key_bias(), neurons))
    inner = inner if scores is None else _scaled(inner, scores)
    g = traced.gate[position][neurons].float()
    u = None if traced.up is None else traced.up[position][neurons].float()
    coefficient = traced.coefficients[position][neurons].float()
    factors = _dense(block, g, u) if block.experts is None else _routed(block, neurons, g, u)
    if block.inner_norm is not None:
        every_up = None if traced.up is None else traced.up[position].float()
        normed = block.normed(traced.gate[position].float(), every_up, neurons)
        factors = _Factors(factors.gate * normed, factors.up * normed)
    if u is None:
        share = _scaled(inner, factors.gate)
        return Switches(layer, neurons, coefficient, share, share, None, inner)
    ups = block.ups()
    assert ups is not None, f"layer {layer} has an up projection in its trace and none in its anatomy"
    second = folded(block.ffn_norm, residual, ups[neurons], _rows_of(block.up_bias(), neurons))
    second = second if scores is None else _scaled(second, scores)
    gate = _scaled(inner, factors.gate)
    up = _scaled(second, factors.up)
    if factors.fixed is not None:
        up = Linear(up.key, up.bias + factors.fixed)
    share = Linear((gate.key + up.key) / 2, (gate.bias + up.bias) / 2)
    return Switches(layer, neurons, coefficient, share, gate, up, inner)


def _of_units(
    stream: Stream, layer: int, position: int, chosen: Int[Tensor, " unit"], units: LayerUnits
) -> Switches:
    """The linear form of units that are not neurons, which pass a pre-activation on or not: r is 1 or 0."""
    block, traced = stream.anatomy.layers[layer], stream.layers[layer]
    seen = getattr(traced, POINTS[units.reads].traced)[position].float()
    residual = (traced.lin if stream.anatomy.parallel else traced.lres)[position].float()
    keys, bias = units.frozen(passing(block, units.reads, seen), chosen)
    # What is read may be an update before its multiplier, or behind the norm of the FFN.
    multipliers = {"attention_output": block.attention_multiplier, "ffn_output": block.ffn_multiplier}
    norm = block.ffn_norm if units.reads in ("ffn_norm", "ffn_input") else None
    if norm is not None and units.reads == "ffn_norm":
        norm = replace(norm, weight=None, bias=None)
    inner = folded(norm, residual, keys / multipliers.get(units.reads, 1.0), bias)
    coefficient = traced.coefficients[position][chosen].float()
    share = _scaled(inner, (coefficient != 0).float())
    return Switches(layer, chosen, coefficient, share, share, None, inner)


def folded(
    norm: Norm | None,
    residual: Float[Tensor, " width"],
    rows: Float[Tensor, "neuron width"],
    bias: Float[Tensor, " neuron"] | None,
) -> Linear:
    """The norm-folded keys K and biases B of A42, with the norm's statistic frozen at a residual."""
    rows = rows.detach().float()
    constant = torch.zeros(len(rows)) if bias is None else bias.float()
    if norm is None:
        return Linear(rows, constant)
    if norm.bias is not None:
        constant = constant + rows @ norm.bias.float()
    return Linear(adjoint(norm, norm.scale(residual), rows), constant)


def adjoint(
    norm: Norm, scale: Float[Tensor, " 1"], rows: Float[Tensor, "row width"]
) -> Float[Tensor, "row width"]:
    """The rows that give for v what ``rows`` give for ``norm.linear(v, scale)``."""
    rows = rows if norm.weight is None else rows * norm.weight.float()
    if norm.kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    return rows * scale if is_one(norm.unit) else rows * scale / norm.unit


def _scaled(linear: Linear, factor: Float[Tensor, " neuron"]) -> Linear:
    return Linear(linear.key * factor[:, None], linear.bias * factor)


def _rows_of(bias: Tensor | None, neurons: Tensor) -> Tensor | None:
    return None if bias is None else bias[neurons]


@dataclass(frozen=True, eq=False)
class _Factors:
    """What the pre-activations of neurons are multiplied with, and what is added to the up's product."""

    gate: Float[Tensor, " neuron"]
    up: Float[Tensor, " neuron"]
    fixed: Float[Tensor, " neuron"] | None = None


@torch.no_grad()
def _dense(block: Layer, g: Tensor, u: Tensor | None) -> _Factors:
    """act(g) / g, times u if there is one, and act(g)."""
    away = _away(g)
    rate = block.act(away) / away
    return _Factors(rate if u is None else rate * u, block.act(g))


@torch.no_grad()
def _routed(block: Layer, neurons: Tensor, g: Tensor, u: Tensor | None) -> _Factors:
    """F(g, u) / g, (F(g, u) - F(g, 0)) / u and F(g, 0) of neurons in a mixture."""
    away = _away(g)
    gate = block.coefficients(neurons, away, u) / away
    if u is None:
        return _Factors(gate, gate)
    without, second = block.coefficients(neurons, g, torch.zeros_like(u)), _away(u)
    return _Factors(gate, (block.coefficients(neurons, g, second) - without) / second, without)


def _away(x: Tensor) -> Tensor:
    """Pre-activations, none of them 0."""
    return torch.where(x.abs() < _TINY, torch.full_like(x, _TINY).copysign(x), x)


def neuron_shares(
    stream: Stream, layer: int, position: int, keys: Float[Tensor, "key width"]
) -> Float[Tensor, "neuron key"]:
    """The shares that each neuron of a layer brings to some keys above it, without making the vectors it writes."""
    block, traced = stream.anatomy.layers[layer], stream.layers[layer]
    norm, keys = block.post_ffn_norm, keys * block.ffn_multiplier
    if norm is not None:
        keys = adjoint(norm, norm.scale(traced.ffn_output[position].float()), keys)
    read = block.values().float() @ keys.T
    return read * traced.amounts(block, position)[:, None]


def unit_shares(
    stream: Stream, layer: int, position: int, key: Float[Tensor, " width"], updates: range
) -> Float[Tensor, " unit"]:
    """The shares that each unit of a layer that is no neuron brings to a key, by what it writes in some updates."""
    units = stream.anatomy.layers[layer].units
    assert units is not None, "a layer without units brings nothing"
    stage = POINTS[units.writes].stage
    written = (
        write.values @ (key * write.factor) for write in units.write if 2 * write.layer + stage in updates
    )
    return sum(written, key.new_zeros(len(units.keys))) * unit_amounts(stream, layer, position)


def layer_queries(stream: Stream, layer: int, position: int) -> Float[Tensor, "query width"]:
    """Lin0, ATTN0, FFN0, ATTN1, ... as the FFN of ``layer`` sees them: Eq. 21; biases are inside (A49).

    2 layer + 2 vectors; 2 layer + 1 in parallel blocks, whose FFN does not read the attention beside it (G5).
    """
    points = stream.points(position)[: 2 * layer + (1 if stream.anatomy.parallel else 2)]
    return torch.cat([points[:1], points.diff(dim=0)])


@dataclass(frozen=True, eq=False)
class Chain:
    """The recursive score of every neuron, and what any other vector earns by switching neurons on (A63).

    total  C(a) + sum_b share(a -> b) total(b), b running over the neurons above a
    pull   row l: what a vector is multiplied with that is seen by the FFNs of layers l and above; row L is zero
    """

    total: Float[Tensor, " cell"]
    pull: Float[Tensor, "layer_plus_one width"]


def chain(stream: Stream, position: int, increases: Float[Tensor, " cell"]) -> Chain:
    """Method 2 of Yu et al. 2023, D.3, from the top layer down, for any increases C (0 leaves a neuron out).

    ``share(a -> b)`` is a's share of b's coefficient as a fraction of it. As shares are linear, the sum over b is one
    inner product of what a writes with ``sum_b key_b total(b) / m_b``.
    """
    layers, width, cells = stream.anatomy.n_layers, stream.anatomy.width, Cells(stream.anatomy.sizes)
    total = increases.float().clone()
    pull = torch.zeros(layers + 1, width)
    for layer in reversed(range(layers)):
        here = cells.of(layer)
        total[here] += neuron_shares(stream, layer, position, pull[layer + 1][None])[:, 0]
        chosen = increases[here].nonzero()[:, 0]
        pull[layer] = pull[layer + 1]
        if len(chosen):
            switched = switches(stream, layer, position, chosen)
            weight = total[here][chosen] / switched.coefficient
            pull[layer] = pull[layer] + torch.nan_to_num(weight, posinf=0.0, neginf=0.0) @ switched.share.key
    return Chain(total, pull)


@dataclass(frozen=True)
class Origin:
    """The fall of an attention sub-value's score when one vector is taken out of its source (A53, A54).

    recomputed  weights and values computed again without it (method 1); fixed  the weights kept (method 2)
    """

    point: str  # Lin0, ATTN0, FFN0, ...
    recomputed: float
    fixed: float


def origins(
    stream: Stream,
    layer: int,
    position: int,
    source: int,
    score: Callable[[Float[Tensor, " width"]], float],
) -> Sequence[Origin]:
    """The origins of the score of the sub-value that ``layer`` takes from ``source`` (all heads).

    The norm is computed again on what is left of the source's residual. A post-norm keeps its statistic (G4).
    """
    traced, block = stream.layers[layer], stream.anatomy.layers[layer]
    heads = block.heads().float().flatten(0, 1)
    points = stream.points(source)[: 2 * layer + 1]
    norm, output = block.post_attention_norm, traced.attention_output[position].float()

    def written(alpha: Tensor, value: Tensor) -> float:
        weighted = alpha[:, position, source, None].float() * value[:, source].float()
        weighted = traced.weighted(position, weighted[:, None])  # the gate of the position is held
        vector = weighted.flatten() @ heads
        vector = vector if norm is None else norm.linear(vector, norm.scale(output))
        return score(vector * block.attention_multiplier)

    whole = written(traced.alpha, traced.value)
    vectors = torch.cat([points[:1], points.diff(dim=0)])
    changed = traced.lin.float().repeat(len(vectors), 1, 1)
    changed[:, source] -= vectors
    losses = []
    for index, (alpha, value) in enumerate(stream.attend(layer, changed)):
        name = "Lin0" if index == 0 else f"{('FFN', 'ATTN')[index % 2]}{(index - 1) // 2}"
        losses.append(Origin(name, whole - written(alpha, value), whole - written(traced.alpha, value)))
    return losses
