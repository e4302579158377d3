"""Who switched the memories of one prediction on, from layer to layer (Yu et al. 2023, 4.4 and D; A49, A58-A64).

An inner product here is a vector's share of a neuron's coefficient (`switching`, B.5), taken with the coefficient's
sign: positive where the vector makes the neuron more of what it is. For an active ReLU neuron that is the paper's, in
units of the coefficient. Sums over "the top" are over the ten most helpful and ten most unhelpful neurons of a layer.

Listed neurons are those that write most, and whatever writes much is moved by much and moves much. So the null of each
of them is other neurons that write as strongly (|m||v|): the next stronger and the next weaker of the layer, in such
shares that both together do; for a list, of those that are on no list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemoscope.model.stream import Stream
from mnemoscope.prediction.switching import Switches, chain, layer_queries, neuron_shares, switches

ASKED = 20  # queries of a layer that an upper layer names (A61)
CALLED = 5  # neurons that an earlier layer calls (A62)
LIKE = 4  # neighbours in strength among which inner products are dealt out anew
FIRST = 100  # neurons of the whole model that are counted by layer (A63)

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class RankedNeurons:
    """The neurons of one layer by what they contribute.

    increase  nats; evaluated for the top, else an estimate inside of a certified interval
    certain   +1 certainly helpful, -1 certainly unhelpful, 0 inactive or undecided
    helpful   the most helpful first; `unhelpful` likewise
    strength  |m||v|, of what each writes
    """

    increase: Float[Tensor, " neuron"]
    certain: Int[Tensor, " neuron"]
    helpful: Int[Tensor, " helpful"]
    unhelpful: Int[Tensor, " unhelpful"]
    strength: Float[Tensor, " neuron"]

    @property
    def signs(self) -> Int[Tensor, " neuron"]:
        """+1 helpful, -1 unhelpful, 0 inactive: of the undecided, too, by their estimates."""
        return self.increase.sign().int()

    @property
    def unlisted(self) -> Bool[Tensor, " neuron"]:
        """Active and not among the top."""
        mask = self.strength > 0
        mask[self.top] = False
        return mask

    def matched(
        self, chosen: Int[Tensor, " chosen"], among: Bool[Tensor, " neuron"]
    ) -> tuple[Int[Tensor, "chosen two"], Float[Tensor, "chosen two"]]:
        """For each chosen neuron the next stronger and the next weaker of others, and how much each of them counts.

        Both together write as strongly as it does. Where one of them is missing it is compared with itself, so that
        what is left between a figure and its null is between neurons that do have an equal.
        """
        others = among.nonzero()[:, 0]
        others = others[torch.argsort(self.strength[others], stable=True)]
        place = torch.full_like(among, -1, dtype=torch.long)
        place[others] = torch.arange(len(others))
        own, strength = place[chosen], self.strength[chosen].contiguous()
        above = torch.searchsorted(self.strength[others].contiguous(), strength)
        weaker = torch.where(own >= 0, own, above) - 1
        stronger = torch.where(own >= 0, own + 1, above)
        paired = (weaker >= 0) & (stronger < len(others))
        both = chosen[:, None].repeat(1, 2)
        both[paired] = others[torch.stack([stronger, weaker], -1)[paired]]
        gap = self.strength[both[:, 0]] - self.strength[both[:, 1]]
        share = ((strength - self.strength[both[:, 1]]) / gap.clamp_min(1e-30)).clamp(0, 1)
        share = torch.where(gap > 0, share, 0.5)
        return both, torch.stack([share, 1 - share], -1)

    def weights(
        self, chosen: Int[Tensor, " chosen"], size: Float[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        """A size for each chosen neuron and 0 for all others."""
        return torch.zeros_like(size).index_add_(0, chosen, size[chosen])

    def matched_weights(
        self, chosen: Int[Tensor, " chosen"], size: Float[Tensor, " neuron"], among: Bool[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        """The sizes of the chosen neurons, dealt to those that write as strongly."""
        both, share = self.matched(chosen, among)
        return torch.zeros_like(size).index_add_(0, both.flatten(), (size[chosen, None] * share).flatten())

    @property
    def top(self) -> Int[Tensor, " chosen"]:
        """The helpful, then the unhelpful ones."""
        return torch.cat([self.helpful, self.unhelpful])


def middle_layer(layers: int) -> int:
    """The layer whose queries are drawn one by one: 13 of the paper's 16, and as far up in any other (A49)."""
    return min(13 * layers // 16, layers - 1)


@dataclass(frozen=True, eq=False)
class Pull:
    """What one layer's top neurons ask for: a query's inner product with it is Eq. 25 with |C| (A58).

    matched  what neurons that write as strongly would ask for with the same |C|: of the helpful, of the unhelpful
    """

    helpful: Float[Tensor, " width"]
    unhelpful: Float[Tensor, " width"]
    matched: Float[Tensor, "side width"]

    @property
    def net(self) -> Float[Tensor, " width"]:
        """Helpful less unhelpful: Eq. 25 with C."""
        return self.helpful - self.unhelpful


def crosslayer(
    stream: Stream, position: int, ranked: Sequence[RankedNeurons], generator: np.random.Generator
) -> tuple[Columns, Columns, list[Columns]]:
    """Columns of `cross_queries` and `cross_layers` (docs/format.md), and for the top of each layer those of
    `contribution_neurons` that say how they work as queries.

    generator  deals inner products out anew (A62)
    """
    points = stream.points(position)
    queries = torch.cat([points[:1], points.diff(dim=0)])[:-1]
    pulls, called = [], []
    asked = {}
    for layer, order in enumerate(ranked):
        switched = switches(stream, layer, position)
        seen = layer_queries(stream, layer, position)
        inner = switched.share.of(seen) * switched.coefficient.sign()
        called.append(_called(inner, order, layer, generator))
        pulls.append(_pull(switched, order))
        if layer == middle_layer(len(ranked)):
            asked = {name: _padded(column, len(queries)) for name, column in _sums(inner, order).items()}
    names = [f"upper_{side}{suffix}" for suffix in ("", "_matched") for side in ("helpful", "unhelpful")]
    upper = {name: torch.zeros(len(queries)) for name in names}
    for layer, pull in enumerate(pulls):
        below = queries[: len(layer_queries(stream, layer, position))]
        for name, asks in zip(names, (pull.helpful, pull.unhelpful, *pull.matched), strict=True):
            upper[name][: len(below)] += below @ asks
    rows = {"query": torch.arange(len(queries)), **asked, **upper}
    layers, neurons = _layers(stream, position, ranked, pulls)
    layers |= {name: torch.tensor([counts[name] for counts in called]) for name in called[0]}
    return (
        {n: c.cpu().numpy() for n, c in rows.items()},
        {n: c.cpu().numpy() for n, c in layers.items()},
        neurons,
    )


def _pull(switched: Switches, neurons: RankedNeurons) -> Pull:
    size, sides = neurons.increase.abs().float(), (neurons.helpful, neurons.unhelpful)
    own = [neurons.weights(side, size) for side in sides]
    matched = [neurons.matched_weights(side, size, neurons.unlisted) for side in sides]
    asks = (torch.stack([*own, *matched]) * switched.coefficient.sign()) @ switched.share.key
    return Pull(asks[0], asks[1], asks[2:])


def _sums(inner: Float[Tensor, "query neuron"], neurons: RankedNeurons) -> dict[str, Tensor]:
    """Eq. 24 over all helpful, all unhelpful and their top; and Eq. 25, which weights with |C| (A49, A59).

    Beside each, what neurons that write as strongly would have with the same weights.
    """
    weight, even = neurons.increase.abs().float(), torch.ones(inner.shape[1])
    active = neurons.strength > 0
    columns = {"any": inner.sum(-1)}
    for name, sign, top in (("helpful", 1, neurons.helpful), ("unhelpful", -1, neurons.unhelpful)):
        every = (neurons.signs == sign).nonzero()[:, 0]
        columns[f"{name}_certain"] = inner[:, neurons.certain == sign].sum(-1)
        for suffix, chosen, size, others in (
            ("", every, even, active),
            ("_weighted", every, weight, active),
            ("_top", top, even, neurons.unlisted),
            ("_top_weighted", top, weight, neurons.unlisted),
        ):
            columns[f"{name}{suffix}"] = inner @ neurons.weights(chosen, size)
            columns[f"{name}{suffix}_matched"] = inner @ neurons.matched_weights(chosen, size, others)
    return columns


def _padded(column: Tensor, size: int) -> Tensor:
    """NaN for vectors that the layer does not read."""
    return torch.cat([column, torch.full((size - len(column),), torch.nan)])


def _called(
    inner: Float[Tensor, "query neuron"], neurons: RankedNeurons, layer: int, generator: np.random.Generator
) -> dict[str, int]:
    """How many neurons are among the five that some earlier feed-forward layer moves most, weighted with C (A62).

    The same with every layer's inner products dealt out anew and C kept: among all active neurons of the layer, and
    among those that write about as strongly.
    """
    moved = inner[2 : 2 * layer + 1 : 2]
    counts = {}
    for suffix, size in (("", None), ("_dealt", len(neurons.strength)), ("_matched", LIKE)):
        dealt_out = moved if size is None else dealt(moved, neurons.strength, size, generator)
        score = (dealt_out * neurons.increase.float()).abs()
        called = score.topk(min(CALLED, score.shape[-1])).indices.unique()
        counts[f"called{suffix}"] = len(called)
        counts[f"called_top{suffix}"] = int(torch.isin(called, neurons.top).sum())
    return counts


def dealt(
    rows: Float[Tensor, "row neuron"],
    strength: Float[Tensor, " neuron"],
    size: int,
    generator: np.random.Generator,
) -> Float[Tensor, "row neuron"]:
    """Each row dealt out anew among active neurons, so many neighbours in strength at a time."""
    order = torch.argsort(-strength, stable=True)[: int((strength > 0).sum())]
    groups = torch.arange(len(order)) // size
    out = rows.clone()
    for row in range(len(rows)):
        drawn = torch.as_tensor(generator.random(len(order)), device=order.device)
        # Within each group in a random order: the groups are ascending, and one more than any draw apart.
        out[row, order] = rows[row, order[torch.argsort(groups + drawn)]]
    return out


def _layers(
    stream: Stream, position: int, ranked: Sequence[RankedNeurons], pulls: Sequence[Pull]
) -> tuple[dict[str, Tensor], list[Columns]]:
    """What neurons do as queries: for which upper layers they matter, and how much in all (A61, A63, A64)."""
    own = torch.cat([neurons.increase.float() for neurons in ranked])
    sizes = [len(neurons.increase) for neurons in ranked]
    chosen = torch.zeros_like(own)
    for neurons, every, kept in zip(ranked, own.split(sizes), chosen.split(sizes), strict=True):
        kept[neurons.top] = every[neurons.top]
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
    query, asked = torch.cat(summed), torch.cat(named)
    strength = torch.cat([neurons.strength for neurons in ranked])
    first = {
        "values": _first(own),
        "queries": _first(query),
        "chains": _first(chained),
        "writes": _first(strength),
    }
    counts = {f"{name}_first": _by_layer(mask, sizes) for name, mask in first.items()}
    counts |= shared_first(ranked, first["queries"], first["chains"])
    for side in ("helpful", "unhelpful"):
        tops = [getattr(neurons, side) for neurons in ranked]
        counts[side] = torch.tensor([len(top) for top in tops])
        pairs = [neurons.matched(top, neurons.unlisted) for neurons, top in zip(ranked, tops, strict=True)]
        counts[f"{side}_matched"] = torch.stack(
            [(both[:, 0] != top).sum() for (both, _), top in zip(pairs, tops, strict=True)]
        )
        for name, mask in (("asked", asked), ("first", first["queries"])):
            masks = mask.split(sizes)
            counts[f"{side}_{name}"] = torch.stack(
                [of_layer[top].sum() for of_layer, top in zip(masks, tops, strict=True)]
            )
            counts[f"{side}_matched_{name}"] = torch.stack(
                [(of_layer[both] * share).sum() for of_layer, (both, share) in zip(masks, pairs, strict=True)]
            )
    counts["asked"] = _by_layer(asked, sizes)
    for name, score in (("value", own), ("query", query), ("chain", chained), ("write", strength)):
        size = _by_layer(score.abs().double(), sizes)
        counts[f"{name}_mass"] = size / size.sum().clamp_min(1e-300)
    scores = {"query": query, "chain": chained, "asked": asked}
    top = [
        {name: score.split(sizes)[layer][neurons.top].cpu().numpy() for name, score in scores.items()}
        for layer, neurons in enumerate(ranked)
    ]
    return {"layer": torch.arange(len(ranked)), **counts}, top


def shared_first(
    ranked: Sequence[RankedNeurons],
    queries: Bool[Tensor, " cell"],
    chains: Bool[Tensor, " cell"],
) -> dict[str, Tensor]:
    """By layer, how many are first by both scores; and how many would be, were a neuron's chain that of one of its
    layer that writes as strongly."""
    sizes = [len(neurons.strength) for neurons in ranked]
    matched = []
    for neurons, asked, chained in zip(ranked, queries.split(sizes), chains.split(sizes), strict=True):
        both, share = neurons.matched(asked.nonzero()[:, 0], neurons.strength > 0)
        matched.append((chained[both] * share).sum())
    return {"both_first": _by_layer(queries & chains, sizes), "both_matched": torch.stack(matched)}


def _by_layer(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums by layer of what there is for each neuron."""
    return torch.stack([of_layer.sum() for of_layer in values.split(list(sizes))])


def _first(score: Float[Tensor, " cell"]) -> Tensor:
    """bool[cell]: among the hundred largest by size of the whole model, those that are 0 left out."""
    flat = score.abs()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(FIRST, len(flat))).indices] = True
    return mask & (flat > 0)
