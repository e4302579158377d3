"""Who switched on the neurons that make a prediction (Yu et al. 2023, 4.4 and D; A49, A58-A64).

The null of a share is what neurons drawn at random from the layer would have, computed and not simulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, ratio
from mnemoscope.studies.findings.finding import Figure, Finding, bar, line
from mnemoscope.studies.findings.statistics import ExampleGrid, number, percent, series

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SIDES = ("helpful", "unhelpful")
EACH = 5  # neurons that an earlier layer calls (A62)
FIRST = 100  # neurons of the model that are counted by layer (A63)
WAYS = {
    "all, Eq. 24": "",
    "ten, Eq. 24": "_top",
    "all, Eq. 25": "_weighted",
    "ten, Eq. 25": "_top_weighted",
}
_DOCUMENTS = "documents"


def findings(run: Run) -> list[Finding]:
    """Everything that the tables `cross_*` say."""
    examples = run.table("contribution_examples").filter(target="model").sort("example").collect()
    queries, layers = (
        ExampleGrid("", run.table(f"cross_{table}").sort("example", place).collect(), examples)
        for table, place in (("queries", "query"), ("layers", "layer"))
    )
    neurons = run.manifest.model.neurons
    counts = run.table("contribution_layers").filter(pl.col("target") == "model").sort("example", "layer")
    seen = int((~np.isnan(queries["any"][0])).sum())
    layer = (seen - 1) // 2
    grid = counts.select("helpful", "unhelpful", "active", "layer").collect().filter(pl.col("layer") == layer)
    active_share = {side: (grid[side] / grid["active"].clip(1)).to_numpy()[:, None] for side in SIDES}
    return [
        _one_layer(queries, layer, active_share),
        _four_ways(queries, layer),
        _upper(queries),
        _both(layers, neurons),
        _called(layers, neurons),
        _where(layers, neurons),
        _mass(layers),
        _extremes(layers, neurons),
    ]


def part(query: int) -> str:
    """Name of a vector: Lin0, ATTN0, FFN0, ATTN1, ..."""
    return "Lin0" if query == 0 else f"{('FFN', 'ATTN')[query % 2]}{(query - 1) // 2}"


def _by_query(interval: Interval, null: Interval | None = None, **labels: str) -> pl.DataFrame:
    frame = series(interval, null, **labels).rename({"layer": "query"})
    names = pl.Series("part", [part(query) for query in range(frame.height)])
    # In parallel blocks a layer does not read the attention beside it (G5).
    return frame.insert_column(1, names).filter(pl.col("value").is_not_null())


def _drawn(frame: pl.DataFrame, y_title: str, **more: Any) -> Figure:
    x_title = "vector: 0 is Lin0, odd are attention, even feed-forward"
    return line(frame, y_title, x="query", x_title=x_title, color="side", **more)


def _one_layer(queries: ExampleGrid, layer: int, share: dict[str, np.ndarray]) -> Finding:
    """A49: what each earlier vector does to helpful and unhelpful neurons of one layer."""
    seen = 2 * layer + 2
    every = queries["any"][:, :seen]
    frames, split = [], {}
    for side in SIDES:
        inner = queries[side][:, :seen]
        null = queries.mean(every * share[side])
        frames.append(_by_query(queries.mean(inner), null, side=side))
        split[side] = [queries.mean(np.nansum(inner[:, start::2], axis=1)) for start in (1, 2)]
    said = "; ".join(
        f"{side}: attention {number(attention)}, feed-forward {number(ffn)}"
        for side, (attention, ffn) in split.items()
    )
    frame = pl.concat(frames)
    return Finding(
        id="figure-8-queries-of-one-layer",
        items=("A49", "A43"),
        title=f"What earlier vectors do to the neurons of layer {layer} (Yu Figure 8)",
        says=f"Inner products with active neurons of layer {layer}, summed over all earlier vectors of a kind: {said}.",
        frame=frame,
        figure=_drawn(frame, "sum of inner products (coefficient)"),
        paper="layer 13 of 16: zigzag; attention mostly above 0, feed-forward lowers or reverses unhelpful neurons",
        null="as many active neurons drawn at random from the layer",
        resampled=_DOCUMENTS,
        notes=(
            "an inner product is the vector's share of the coefficient, by both branches of a gate, with the "
            "coefficient's sign: above 0 it makes the neuron more of what it is",
        ),
    )


def _four_ways(queries: ExampleGrid, layer: int) -> Finding:
    """A58, A59: all neurons or the ten of each side, unweighted or weighted with |C|."""
    seen, frames, net = 2 * layer + 2, [], {}
    for way, suffix in WAYS.items():
        values = {side: queries[f"{side}{suffix}"][:, :seen] for side in SIDES}
        frames += [
            _by_query(queries.mean(grid), side=side, way=way).drop("null", "null_low", "null_high")
            for side, grid in values.items()
        ]
        net[way] = np.nanmean(values["helpful"] - values["unhelpful"], axis=0)
    alike = {way: _correlation(curve, net["ten, Eq. 25"]) for way, curve in net.items()}
    said = ", ".join(f"{way} {alike[way]:.2f}" for way in list(WAYS)[:3])
    frame = pl.concat(frames)
    return Finding(
        id="figures-15-18-four-scores",
        items=("A58", "A59"),
        title=f"Four ways to score what switches layer {layer} on (Yu Figures 15-18)",
        says=f"Helpful less unhelpful, over earlier vectors, correlates with the ten under Eq. 25: {said}.",
        frame=frame,
        figure=_drawn(frame, "cross-layer score", facet="way", free=True),
        paper="Figure 15 (all, Eq. 24) differs from 16 (ten); 16, 17 and 18 are alike",
        resampled=_DOCUMENTS,
        notes=("Eq. 24 sums inner products; Eq. 25 weights them with |C| of the neuron (nats)",),
    )


def _correlation(curve: np.ndarray, other: np.ndarray) -> float:
    known = ~(np.isnan(curve) | np.isnan(other))
    if known.sum() < 3 or curve[known].std() == 0 or other[known].std() == 0:
        return float("nan")
    return float(np.corrcoef(curve[known], other[known])[0, 1])


def _upper(queries: ExampleGrid) -> Finding:
    """A60: Eq. 25 summed over all upper layers."""
    grids = {side: queries[f"upper_{side}"] for side in SIDES}
    grids["helpful less unhelpful"] = grids["helpful"] - grids["unhelpful"]
    means = {side: queries.mean(grid) for side, grid in grids.items()}
    frames = [
        _by_query(mean, side=side).drop("null", "null_low", "null_high") for side, mean in means.items()
    ]
    net = means["helpful less unhelpful"]
    best = int(np.nanargmax(np.abs(net.value)))
    frame = pl.concat(frames)
    return Finding(
        id="figures-13-14-queries-of-all-layers",
        items=("A60",),
        title="What each vector does to all layers above it (Yu Figures 13 and 14)",
        says=f"Weighted with increases and summed over all upper layers, {part(best)} matters most: "
        f"{number(net, best)}.",
        frame=frame,
        figure=_drawn(frame, "cross-layer score (coefficient x nats)"),
        paper="feed-forward layers 1-3 of 16 largest; there helpful and unhelpful both below 0",
        resampled=_DOCUMENTS,
        notes=("over the ten most helpful and ten most unhelpful neurons of every upper layer",),
    )


def _both(layers: ExampleGrid, neurons: int) -> Finding:
    """A61: neurons that matter as values, which upper layers name among their first queries."""
    listed = layers["helpful"] + layers["unhelpful"]
    asked = layers["helpful_asked"] + layers["unhelpful_asked"]
    # With neurons permuted within the layer, each listed one is asked with the chance that any is.
    share, null = layers.share_of(asked, listed), layers.share_of(listed * layers["asked"] / neurons, listed)
    frame = series(share, null).filter(pl.col("layer") < len(share.value) - 1)
    overall = layers.share_of(asked[:, :-1].sum(1), listed[:, :-1].sum(1))
    chance = layers.share_of((listed * layers["asked"] / neurons)[:, :-1].sum(1), listed[:, :-1].sum(1))
    return Finding(
        id="table-3-values-that-are-queries",
        items=("A61", "A64"),
        title="Neurons that act as values and as queries (Yu Table 3)",
        says=f"{percent(overall)} of the ten most helpful and ten most unhelpful neurons of a layer are among the 20 "
        f"strongest queries of the layer for some layer above; {percent(chance)} would be by chance.",
        frame=frame,
        figure=line(frame, "neurons (%)", share=True),
        paper="80, 80, 75, 80, 60, 80, 60, 75, 70, 80, 85, 85, 50, 40, 25 % in layers 0-14 of 16",
        null="neurons permuted within their layer: the share of all neurons that some layer above names",
        resampled=_DOCUMENTS,
        notes=("the last layer has none above it",),
    )


def union_share(called: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Table 4 (A62): distinct neurons, of five for each earlier layer; the paper's 8 in layer 2 are 8/10."""
    return ratio(called, EACH * np.asarray(layer, float))


def chance_union(layer: np.ndarray, neurons: int) -> np.ndarray:
    """What `union_share` would be if each earlier layer called five at random."""
    each = min(EACH, neurons)
    return union_share(neurons * (1 - (1 - each / neurons) ** np.asarray(layer, float)), layer)


def _called(layers: ExampleGrid, neurons: int) -> Finding:
    """A62: whether earlier layers call the same neurons."""
    called = layers["called"]
    place = np.arange(called.shape[1])
    share = layers.mean(union_share(called, np.broadcast_to(place, called.shape)))
    chance = chance_union(place, neurons)
    frame = series(share, Interval(chance, chance, chance)).filter(pl.col("layer") > 0)
    tops = layers.share_of(layers["called_top"][:, 1:].sum(1), called[:, 1:].sum(1))
    return Finding(
        id="table-4-neurons-called-by-earlier-layers",
        items=("A62",),
        title="Do earlier layers call the same neurons? (Yu Table 4)",
        says=f"The five neurons that each earlier feed-forward layer moves most are {percent(share, -1)} distinct "
        f"in the last layer; {percent(tops)} of all are among their layer's ten most helpful or unhelpful.",
        frame=frame,
        figure=line(frame, "distinct neurons of five for each earlier layer (%)", share=True),
        paper="100, 80, 60, 60, 48, 46, 34, 35, 38, 32, 33, 35, 21, 23, 29 % in layers 1-15 of 16",
        null="five drawn at random for each earlier layer",
        resampled=_DOCUMENTS,
        notes=("moved most: largest |inner product x C|",),
    )


_KINDS = {
    "as values": "values_first",
    "as queries, summed": "queries_first",
    "as queries, chained": "chains_first",
}


def _where(layers: ExampleGrid, neurons: int) -> Finding:
    """A63: the hundred strongest values and queries, by layer."""
    total = layers["layer"].shape[1]
    chance = np.full(total, FIRST / total)
    frames, middle = [], {}
    for label, name in _KINDS.items():
        frames.append(series(layers.mean(layers[name]), Interval(chance, chance, chance), kind=label))
        centre = (layers[name] * np.arange(total)).sum(1)
        middle[label] = layers.ratio(centre, layers[name].sum(1))
    both = layers.share_of(layers["both_first"].sum(1), layers["queries_first"].sum(1))
    random = FIRST / (total * neurons)
    said = ", ".join(f"{label} {number(mean)}" for label, mean in middle.items())
    frame = pl.concat(frames)
    return Finding(
        id="figure-19-where-values-and-queries-are",
        items=("A63",),
        title="Where the hundred strongest values and queries are (Yu Figure 19)",
        says=f"Mean layer of the hundred strongest neurons: {said}; the two ways to score queries share "
        f"{percent(both)} of them ({100 * random:.2f} % by chance).",
        frame=frame,
        figure=line(frame, "neurons of the hundred strongest", color="kind"),
        paper="values mainly in layers 11-13 of 16, queries mainly in 0-3; both methods alike",
        null="a hundred neurons drawn from all layers alike",
        resampled=_DOCUMENTS,
        notes=(
            "summed: Eq. 25 over the ten most helpful and ten most unhelpful neurons of every upper layer; chained: "
            "C(b) handed down from the top, C(a) of the query itself left out",
        ),
    )


def _mass(layers: ExampleGrid) -> Finding:
    """A63: how much of all value and of all querying is in each layer."""
    even = np.full(layers["layer"].shape[1], 1 / layers["layer"].shape[1])
    kinds = {"value": "as values", "query": "as queries, summed", "chain": "as queries, chained"}
    means = {label: layers.mean(layers[f"{name}_mass"]) for name, label in kinds.items()}
    half = {
        label: int(np.searchsorted(np.cumsum(mean.value), 0.5 * mean.value.sum()))
        for label, mean in means.items()
    }
    said = ", ".join(f"{label} in layer {layer}" for label, layer in half.items())
    frame = pl.concat([series(mean, Interval(even, even, even), kind=label) for label, mean in means.items()])
    return Finding(
        id="mass-of-values-and-queries",
        items=("A63",),
        title="How value and query scores are spread over layers",
        says=f"Half of the sum of |score| is reached {said}.",
        frame=frame,
        figure=line(frame, "share of the sum of |score| (%)", color="kind", share=True),
        null="alike in all layers",
        resampled=_DOCUMENTS,
    )


def _extremes(layers: ExampleGrid, neurons: int) -> Finding:
    """A64: whether the strongest queries are helpful or unhelpful extremes of their own layer."""
    total = layers["queries_first"].sum(1)
    rows, said = [], []
    for side in SIDES:
        share = layers.share_of(layers[f"{side}_first"].sum(1), total)
        chance = layers.share_of((layers[side] * layers["queries_first"] / neurons).sum(1), total)
        rows.append((side, *map(float, (*share, *chance))))
        said.append(f"{percent(share)} are among the ten most {side} ({percent(chance)} by chance)")
    names = ["side", "value", "low", "high", "null", "null_low", "null_high"]
    frame = pl.DataFrame(rows, dict(zip(names, [pl.String, *[pl.Float64] * 6], strict=True)), orient="row")
    return Finding(
        id="extremes-act-as-queries",
        items=("A64",),
        title="The strongest queries are helpful and unhelpful extremes of their own layers",
        says=f"Of the hundred strongest queries {said[0]}, {said[1]}.",
        frame=frame,
        figure=bar(
            frame,
            "of the hundred strongest queries (%)",
            x="side",
            x_title="extremes of their layer",
            share=True,
        ),
        paper="both play a big role",
        null="neurons permuted within their layer",
        resampled=_DOCUMENTS,
    )
