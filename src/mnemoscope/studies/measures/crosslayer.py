"""Who switched the memories of one prediction on, from layer to layer (Yu et al. 2023, 4.4 and D; A49, A58-A64).

An inner product here is a vector's share of a neuron's coefficient (`switching`, B.5), taken with the coefficient's
sign: positive where the vector makes the neuron more of what it is. For an active ReLU neuron that is the paper's, in
units of the coefficient. Sums over "the top" are over the ten most helpful and ten most unhelpful neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.stream import Stream
from mnemoscope.prediction.switching import Switches, chain, layer_queries, neuron_shares, switches

ASKED = 20  # queries of a layer that an upper layer names (A61)
CALLED = 5  # neurons that an earlier layer calls (A62)
FIRST = 100  # neurons of the whole model that are counted by layer (A63)

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class RankedNeurons:
    """The neurons of one layer by what they contribute.

    increase  nats; exact for the top, else an estimate inside of a certified interval
    signs         +1 helpful, -1 unhelpful, 0 inactive or undecided
    helpful       the most helpful first; `unhelpful` likewise
    """

    increase: Float[Tensor, " neuron"]
    signs: Int[Tensor, " neuron"]
    helpful: Int[Tensor, " helpful"]
    unhelpful: Int[Tensor, " unhelpful"]

    @property
    def top(self) -> Int[Tensor, " chosen"]:
        """The helpful, then the unhelpful ones."""
        return torch.cat([self.helpful, self.unhelpful])


def middle_layer(layers: int) -> int:
    """The layer whose queries are drawn one by one: 13 of the paper's 16, and as far up in any other (A49)."""
    return min(13 * layers // 16, layers - 1)


@dataclass(frozen=True, eq=False)
class Pull:
    """What one layer's top neurons ask for: a query's inner product with it is Eq. 25 with |C| (A58)."""

    helpful: Float[Tensor, " width"]
    unhelpful: Float[Tensor, " width"]

    @property
    def net(self) -> Float[Tensor, " width"]:
        """Helpful less unhelpful: Eq. 25 with C."""
        return self.helpful - self.unhelpful


def crosslayer(
    stream: Stream, position: int, ranked: Sequence[RankedNeurons]
) -> tuple[Columns, Columns, list[Columns]]:
    """Columns of `cross_queries` and `cross_layers` (docs/format.md), and for the top of each layer those of
    `contribution_neurons` that say how they work as queries."""
    points = stream.points(position)
    queries = torch.cat([points[:1], points.diff(dim=0)])[:-1]
    pulls, called = [], []
    asked = {}
    for layer, order in enumerate(ranked):
        switched = switches(stream, layer, position)
        seen = layer_queries(stream, layer, position)
        inner = switched.share.of(seen) * switched.coefficient.sign()
        called.append(_called(inner, order, layer))
        sides = (order.helpful, order.unhelpful)
        pulls.append(Pull(*(_pull(switched, order, side) for side in sides)))
        if layer == middle_layer(len(ranked)):
            asked = {name: _padded(column, len(queries)) for name, column in _sums(inner, order).items()}
    upper = {"upper_helpful": torch.zeros(len(queries)), "upper_unhelpful": torch.zeros(len(queries))}
    for layer, pull in enumerate(pulls):
        below = queries[: len(layer_queries(stream, layer, position))]
        upper["upper_helpful"][: len(below)] += below @ pull.helpful
        upper["upper_unhelpful"][: len(below)] += below @ pull.unhelpful
    rows = {"query": torch.arange(len(queries)), **asked, **upper}
    layers, neurons = _layers(stream, position, ranked, pulls)
    layers |= {name: torch.tensor([counts[name] for counts in called]) for name in called[0]}
    return {n: c.numpy() for n, c in rows.items()}, {n: c.numpy() for n, c in layers.items()}, neurons


def _pull(switched: Switches, neurons: RankedNeurons, chosen: Tensor) -> Float[Tensor, " width"]:
    weight = neurons.increase[chosen].abs().float() * switched.coefficient[chosen].sign()
    return weight @ switched.share.key[chosen]


def _sums(inner: Float[Tensor, "query neuron"], neurons: RankedNeurons) -> dict[str, Tensor]:
    """Eq. 24 over all helpful, all unhelpful and their top; and Eq. 25, which weights with |C| (A49, A59)."""
    size = neurons.increase.abs().float()
    columns = {"any": inner.sum(-1)}
    for name, every, top in (
        ("helpful", neurons.signs > 0, neurons.helpful),
        ("unhelpful", neurons.signs < 0, neurons.unhelpful),
    ):
        columns[name] = inner[:, every].sum(-1)
        columns[f"{name}_weighted"] = inner[:, every] @ size[every]
        columns[f"{name}_top"] = inner[:, top].sum(-1)
        columns[f"{name}_top_weighted"] = inner[:, top] @ size[top]
    return columns


def _padded(column: Tensor, size: int) -> Tensor:
    """NaN for vectors that the layer does not read."""
    return torch.cat([column, torch.full((size - len(column),), torch.nan)])


def _called(inner: Float[Tensor, "query neuron"], neurons: RankedNeurons, layer: int) -> dict[str, int]:
    """How many neurons are among the five that some earlier feed-forward layer moves most, weighted with C (A62)."""
    score = (inner[2 : 2 * layer + 1 : 2] * neurons.increase.float()).abs()
    called = score.topk(min(CALLED, score.shape[-1])).indices.unique()
    return {"called": len(called), "called_top": int(torch.isin(called, neurons.top).sum())}


def _layers(
    stream: Stream, position: int, ranked: Sequence[RankedNeurons], pulls: Sequence[Pull]
) -> tuple[dict[str, Tensor], list[Columns]]:
    """What neurons do as queries: for which upper layers they matter, and how much in all (A61, A63, A64)."""
    own = torch.stack([neurons.increase.float() for neurons in ranked])
    chosen = torch.zeros_like(own)
    for layer, neurons in enumerate(ranked):
        chosen[layer, neurons.top] = own[layer, neurons.top]
    # A query's own value is no query; the chain passes on what it earns above.
    chained = chain(stream, position, chosen).total - chosen
    named, summed = [], []
    for layer in range(len(ranked)):
        keys = torch.stack([pull.net for pull in pulls[layer + 1 :]] or [torch.zeros_like(pulls[0].net)])
        shares = neuron_shares(stream, layer, position, keys)
        summed.append(shares.sum(-1))
        most = shares.abs().topk(min(ASKED, len(shares)), dim=0).indices
        mask = torch.zeros(len(shares), dtype=torch.bool)
        mask[most.flatten()] = layer + 1 < len(ranked)
        named.append(mask)
    query, asked = torch.stack(summed), torch.stack(named)
    first = {"values": _first(own), "queries": _first(query), "chains": _first(chained)}
    counts = {f"{name}_first": mask.sum(-1) for name, mask in first.items()}
    counts["both_first"] = (first["queries"] & first["chains"]).sum(-1)
    for side in ("helpful", "unhelpful"):
        tops = [getattr(neurons, side) for neurons in ranked]
        counts[side] = torch.tensor([len(top) for top in tops])
        counts[f"{side}_asked"] = torch.stack([asked[layer, top].sum() for layer, top in enumerate(tops)])
        counts[f"{side}_first"] = torch.stack(
            [first["queries"][layer, top].sum() for layer, top in enumerate(tops)]
        )
    counts["asked"] = asked.sum(-1)
    for name, score in (("value", own), ("query", query), ("chain", chained)):
        size = score.abs().double().sum(-1)
        counts[f"{name}_mass"] = size / size.sum().clamp_min(1e-300)
    scores = {"query": query, "chain": chained, "asked": asked}
    top = [
        {name: score[layer, neurons.top].numpy() for name, score in scores.items()}
        for layer, neurons in enumerate(ranked)
    ]
    return {"layer": torch.arange(len(ranked)), **counts}, top


def _first(score: Float[Tensor, "layer neuron"]) -> Tensor:
    """bool[layer, neuron]: among the hundred largest by size of the whole model, those that are 0 left out."""
    flat = score.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(FIRST, len(flat))).indices] = True
    return (mask & (flat > 0)).view_as(score)
