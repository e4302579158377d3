"""Who switched on the neurons that make a prediction (Yu et al. 2023, 4.4 and D; A49, A58-A64).

Listed neurons are those that write most, and what writes much moves much and is moved by much. So the null is neurons
of the layer that write as strongly (the next stronger and the next weaker by |m||v|, weighed so that both together do),
and what sentences say is the excess over it. A neuron without such ones is compared with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, by_document, ratio
from mnemoscope.studies.findings.contributions import excess, over, row
from mnemoscope.studies.findings.finding import Figure, Finding, bar, line
from mnemoscope.studies.findings.statistics import ExampleGrid, contrast, number, percent, points, series

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SIDES = ("helpful", "unhelpful")
EACH = 5  # neurons that an earlier layer calls (A62)
FIRST = 100  # neurons of the model that are counted by layer (A63)
LIKE = 4  # neighbours in strength among which inner products are dealt out anew (A62)
WAYS = {
    "all, Eq. 24": "",
    "ten, Eq. 24": "_top",
    "all, Eq. 25": "_weighted",
    "ten, Eq. 25": "_top_weighted",
}
_DOCUMENTS = "documents"
_MATCHED = (
    "the next stronger and the next weaker neuron of the layer by |m||v|, weighed so that both together write as much; "
    "a neuron without both is compared with itself"
)
_UNLISTED = f"of neurons that are not among their layer's ten most helpful or unhelpful, {_MATCHED}"


def findings(run: Run) -> list[Finding]:
    """Everything that the tables `cross_*` say."""
    examples = run.table("contribution_examples").filter(target="model").sort("example").collect()
    queries, layers = (
        ExampleGrid("", run.table(f"cross_{table}").sort("example", place).collect(), examples)
        for table, place in (("queries", "query"), ("layers", "layer"))
    )
    neurons = np.array(run.manifest.model.sizes)
    counts = run.table("contribution_layers").filter(pl.col("target") == "model").sort("example", "layer")
    seen = int((~np.isnan(queries["any"][0])).sum())
    layer = (seen - 1) // 2
    rows = counts.select("active", "undecided", "layer").filter(pl.col("layer") == layer).collect()
    return [
        _one_layer(
            queries,
            layer,
            float(rows["undecided"].to_numpy().sum() / max(rows["active"].to_numpy().sum(), 1)),
        ),
        _four_ways(queries, layer),
        _upper(queries),
        _both(layers, neurons),
        _called(layers, neurons),
        _where(layers, neurons),
        _mass(layers),
        _extremes(layers),
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


def _one_layer(queries: ExampleGrid, layer: int, undecided: float) -> Finding:
    """A49: what each earlier vector does to helpful and unhelpful neurons of one layer."""
    seen = 2 * layer + 2
    frames, said, contrasts = [], [], []
    for side in SIDES:
        own, certain, matched = (
            queries[f"{side}{suffix}"][:, :seen] for suffix in ("", "_certain", "_matched")
        )
        frame = _by_query(queries.mean(own), queries.mean(matched), side=side)
        sure = queries.mean(certain).value[: frame["query"].max() + 1]  # type: ignore[operator]
        frames.append(frame.with_columns(certain=pl.Series(sure)[frame["query"]]))
        told = []
        for kind, start in (("attention", 1), ("feed-forward", 2)):
            sums = [np.nansum(values[:, start::2], axis=1) for values in (own, certain, matched)]
            more = queries.mean(sums[0] - sums[2])
            contrasts.append(contrast(f"{side}, {kind}", more))
            told.append(
                f"{kind} {number(queries.mean(sums[0]))} (the certain alone {sums[1].mean():.2f}; like neurons "
                f"{number(queries.mean(sums[2]))}, difference {number(more)})"
            )
        said.append(f"with {side} neurons, {', '.join(told)}")
    frame = pl.concat(frames)
    return Finding(
        id="figure-8-queries-of-one-layer",
        items=("A49", "A43"),
        title=f"What earlier vectors do to the neurons of layer {layer} (Yu Figure 8)",
        says=f"Inner products with active neurons of layer {layer}, in units of their coefficients, summed over all "
        f"earlier vectors of a kind and over the neurons of a side, means over {over(queries)}: {'; '.join(said)}. "
        f"Sides are by the estimated sign of the increase; {100 * undecided:.1f} % of the neurons are undecided.",
        frame=frame,
        figure=_drawn(frame, "sum of inner products (coefficient)"),
        paper="layer 13 of 16: zigzag; attention mostly above 0, feed-forward lowers or reverses unhelpful neurons",
        null=f"like neurons, which write as strongly: {_MATCHED}",
        resampled=_DOCUMENTS,
        notes=(
            "an inner product is the vector's share of the coefficient, by both branches of a gate, with the "
            "coefficient's sign: above 0 it makes the neuron more of what it is",
            "column `certain`: over the neurons whose certified interval of the increase has the sign of the side",
        ),
        contrasts=tuple(contrasts),
    )


def _four_ways(queries: ExampleGrid, layer: int) -> Finding:
    """A58, A59: all neurons or the ten of each side, unweighted or weighted with |C|."""
    seen, frames = 2 * layer + 2, []
    nets: list[np.ndarray] = []
    likes: list[np.ndarray] = []
    for way, suffix in WAYS.items():
        for kept, end in ((nets, ""), (likes, "_matched")):
            sides = {side: queries[f"{side}{suffix}{end}"][:, :seen] for side in SIDES}
            kept.append(sides["helpful"] - sides["unhelpful"])
        for side in SIDES:
            own, like = (queries.mean(queries[f"{side}{suffix}{end}"][:, :seen]) for end in ("", "_matched"))
            frames.append(_by_query(own, like, side=side, way=way))
    known = ~np.isnan(np.stack(nets)).any((0, 1))
    curves, dealt = (np.stack(kept, axis=1)[:, :, known] for kept in (nets, likes))
    alike, chance = (_correlations(grid, queries.documents) for grid in (curves, dealt))
    place = np.flatnonzero(known)
    without = [_correlated(np.delete(curves, at, axis=2).sum(0)[None])[0] for at in range(len(place))] or [
        alike.value
    ]
    moved = np.abs(np.array(without) - alike.value)[:, :3]
    most = [int(np.nanargmax(column)) if np.isfinite(column).any() else 0 for column in moved.T]
    ways = list(WAYS)[:3]
    said = ", ".join(
        f"{way} {number(alike, at)} (like neurons {number(chance, at)})" for at, way in enumerate(ways)
    )
    alone = ", ".join(
        f"{way} {without[most[at]][at]:.2f} without {part(int(place[most[at]])) if len(place) else 'any'}"
        for at, way in enumerate(ways)
    )
    frame = pl.concat(frames)
    return Finding(
        id="figures-15-18-four-scores",
        items=("A58", "A59"),
        title=f"Four ways to score what switches layer {layer} on (Yu Figures 15-18)",
        says=f"Cross-layer scores of {len(place)} earlier vectors for the neurons of layer {layer}, helpful less "
        f"unhelpful, means over {over(queries)}: Pearson correlation over the vectors with the score over ten of "
        f"each side under Eq. 25: {said}. Leaving out the one vector that moves each most: {alone}.",
        frame=frame,
        figure=_drawn(frame, "cross-layer score", facet="way", free=True),
        paper="Figure 15 (all, Eq. 24) differs from 16 (ten); 16, 17 and 18 are alike",
        null=f"like neurons, which write as strongly, with the same |C|: {_MATCHED}; for the ten of those that are not "
        "among their layer's ten of either side",
        resampled=_DOCUMENTS,
        notes=(
            "Eq. 24 sums inner products (coefficient); Eq. 25 weights them with |C| of the neuron (coefficient x nats)",
            "sides are by the estimated sign of the increase",
        ),
    )


def _correlated(sums: np.ndarray) -> np.ndarray:
    """f64[sample, way]: Pearson correlation of the curves f64[sample, way, vector] with the last of them."""
    centred = sums - sums.mean(-1, keepdims=True)
    last = centred[:, -1:]
    return ratio((centred * last).sum(-1), np.sqrt((centred**2).sum(-1) * (last**2).sum(-1)))


def _correlations(curves: np.ndarray, documents: np.ndarray) -> Interval:
    """Of curves f64[example, way, vector] summed over examples, resampled by document."""
    return by_document(curves, documents, _correlated)


def _upper(queries: ExampleGrid) -> Finding:
    """A60: Eq. 25 summed over all upper layers."""
    net = "helpful less unhelpful"
    own, like = ({side: queries[f"upper_{side}{suffix}"] for side in SIDES} for suffix in ("", "_matched"))
    for grids in (own, like):
        grids[net] = grids["helpful"] - grids["unhelpful"]
    frames = [_by_query(queries.mean(own[side]), queries.mean(like[side]), side=side) for side in own]
    means, others = (queries.mean(grid) for grid in (own[net], like[net]))
    total, more = (queries.mean(grid.sum(1)) for grid in (own[net], own[net] - like[net]))
    # Each is asked for its own largest: at the place of the other's it would be smaller by that choice alone.
    best, alike = (int(np.nanargmax(np.abs(mean.value))) for mean in (means, others))
    frame = pl.concat(frames)
    return Finding(
        id="figures-13-14-queries-of-all-layers",
        items=("A60",),
        title="What each vector does to all layers above it (Yu Figures 13 and 14)",
        says=f"Eq. 25 (inner product x |C|, coefficient x nats) over the ten most helpful less the ten most unhelpful "
        f"neurons of every layer above, summed over the layers, mean over {over(queries)}: of {len(means.value)} "
        f"vectors {part(best)} has the largest in size, {number(means, best)}, and over neurons that write as strongly "
        f"{part(alike)}, {number(others, alike)}; all vectors together have {number(total)}, {number(more)} more than "
        "over neurons that write as strongly.",
        frame=frame,
        figure=_drawn(frame, "cross-layer score (coefficient x nats)"),
        paper="feed-forward layers 1-3 of 16 largest; there helpful and unhelpful both below 0",
        null=f"the same |C| and neurons that write as strongly: {_UNLISTED}",
        resampled=_DOCUMENTS,
        notes=("over the ten most helpful and ten most unhelpful neurons of every upper layer",),
    )


Sums = tuple[np.ndarray, np.ndarray]


def _listed(layers: ExampleGrid, what: str, sides: Sequence[str] = SIDES) -> tuple[Sums, Sums]:
    """f64[example, layer]: how many listed neurons are so, of how many; and of those that write as strongly."""

    def total(suffix: str) -> np.ndarray:
        return np.sum([layers[f"{side}{suffix}"] for side in sides], axis=0)

    listed = total("")
    # Shares of two neurons are kept in fp32, and may add up to a little more than 1.
    return (total(f"_{what}"), listed), (np.minimum(total(f"_matched_{what}"), listed), listed)


def _over_layers(sums: Sums, layers: slice = slice(None)) -> Sums:
    """f64[example] each."""
    above, below = sums
    return above[:, layers].sum(1), below[:, layers].sum(1)


def _both(layers: ExampleGrid, neurons: np.ndarray) -> Finding:
    """A61: neurons that matter as values, which upper layers name among their first queries."""
    own, like = _listed(layers, "asked")
    below = slice(layers.count - 1)
    share, null = (layers.share_of(*sums) for sums in (own, like))
    frame = series(share, null).filter(pl.col("layer") < layers.count - 1)
    own, like = _over_layers(own, below), _over_layers(like, below)
    overall, matched = (layers.share_of(*sums) for sums in (own, like))
    more = excess(layers.documents, own, like)
    return Finding(
        id="table-3-values-that-are-queries",
        items=("A61", "A64"),
        title="Neurons that act as values and as queries (Yu Table 3)",
        says=f"{percent(overall)} of the ten most helpful and ten most unhelpful neurons of a layer are among its 20 "
        f"strongest queries (|Eq. 25|) for some layer above, over layers 0 to {layers.count - 2} and {over(layers)}; "
        f"of unlisted neurons that write as strongly {percent(matched)} are, an excess of {points(more)}.",
        frame=frame,
        figure=line(frame, "neurons (%)", share=True),
        paper="80, 80, 75, 80, 60, 80, 60, 75, 70, 80, 85, 85, 50, 40, 25 % in layers 0-14 of 16",
        null=_UNLISTED,
        resampled=_DOCUMENTS,
        contrasts=(contrast("asked", more),),
        notes=(
            "the last layer has none above it",
            f"{percent(_paired(layers))} of the listed have unlisted neurons on either side in strength",
            f"of all neurons {percent(_any_asked(layers, neurons))} are",
        ),
    )


def _paired(layers: ExampleGrid) -> Interval:
    """How many listed neurons are not compared with themselves."""
    paired, listed = (
        np.sum([layers[f"{side}{suffix}"] for side in SIDES], axis=0)[:, :-1].sum(1)
        for suffix in ("_matched", "")
    )
    return layers.share_of(paired, listed)


def _any_asked(layers: ExampleGrid, neurons: np.ndarray) -> Interval:
    """How many of all neurons of a layer are asked, where each layer lists as many."""
    listed = np.sum([layers[side] for side in SIDES], axis=0)
    return layers.share_of((listed * layers["asked"] / neurons)[:, :-1].sum(1), listed[:, :-1].sum(1))


def union_share(called: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Table 4 (A62): distinct neurons, of five for each earlier layer; the paper's 8 in layer 2 are 8/10."""
    return ratio(called, EACH * np.asarray(layer, float))


def chance_union(layer: np.ndarray, neurons: int) -> np.ndarray:
    """What `union_share` would be if each earlier layer called five at random."""
    each = min(EACH, neurons)
    return union_share(neurons * (1 - (1 - each / neurons) ** np.asarray(layer, float)), layer)


def _called(layers: ExampleGrid, neurons: np.ndarray) -> Finding:
    """A62: whether earlier layers call the same neurons."""
    place = np.arange(layers.count)

    def distinct(suffix: str) -> np.ndarray:
        called = layers[f"called{suffix}"]
        return union_share(called, np.broadcast_to(place, called.shape))

    own, dealt, like = (distinct(suffix) for suffix in ("", "_dealt", "_matched"))
    chance = chance_union(place, int(neurons[-1]))
    share = layers.mean(own)
    frame = series(share, layers.mean(like)).with_columns(
        dealt=pl.Series(layers.mean(dealt).value), drawn=pl.Series(chance)
    )
    frame = frame.filter(pl.col("layer") > 0).fill_nan(None)
    more = layers.mean(own - like)
    tops = {
        suffix: layers.share_of(
            layers[f"called_top{suffix}"][:, 1:].sum(1), layers[f"called{suffix}"][:, 1:].sum(1)
        )
        for suffix in ("", "_dealt", "_matched")
    }
    return Finding(
        id="table-4-neurons-called-by-earlier-layers",
        items=("A62",),
        title="Do earlier layers call the same neurons? (Yu Table 4)",
        says=f"The five neurons of layer {layers.count - 1}, the last, that each earlier feed-forward layer moves "
        f"most (|inner product x C|) are {percent(share, -1)} distinct, over {over(layers)}; with inner products "
        f"dealt out anew and C kept {percent(layers.mean(dealt), -1)}, dealt out among {LIKE} neurons that write "
        f"about as strongly {percent(layers.mean(like), -1)}, a difference of {points(more, -1)}. Of those called in "
        f"all layers {percent(tops[''])} are among their layer's ten most helpful or unhelpful, dealt out anew "
        f"{percent(tops['_dealt'])} and {percent(tops['_matched'])}.",
        frame=frame,
        figure=line(frame, "distinct neurons of five for each earlier layer (%)", share=True),
        paper="100, 80, 60, 60, 48, 46, 34, 35, 38, 32, 33, 35, 21, 23, 29 % in layers 1-15 of 16",
        null=f"C kept and each earlier layer's inner products dealt out anew among {LIKE} neighbours in |m||v|",
        resampled=_DOCUMENTS,
        contrasts=(contrast("distinct", more, -1),),
        notes=(
            "column `dealt`: dealt out anew among all active neurons of the layer; `drawn`: five drawn at random "
            "for each earlier layer",
        ),
    )


_KINDS = {
    "as values": "values_first",
    "as queries, summed": "queries_first",
    "as queries, chained": "chains_first",
}


def _where(layers: ExampleGrid, neurons: np.ndarray) -> Finding:
    """A63: the hundred strongest values and queries, by layer."""
    total = layers.count
    strongest = layers.mean("writes_first")
    frames, middle = [], {}
    for label, name in {**_KINDS, "as writers, |m||v|": "writes_first"}.items():
        null = strongest if name != "writes_first" else None
        frames.append(series(layers.mean(layers[name]), null, kind=label))
        centre = (layers[name] * np.arange(total)).sum(1)
        middle[label] = (centre, layers[name].sum(1))
    both, like, first = (layers[name].sum(1) for name in ("both_first", "both_matched", "queries_first"))
    like = np.minimum(like, first)
    more = excess(layers.documents, (both, first), (like, first))
    said = ", ".join(
        f"{label} {number(layers.ratio(*middle[label]))} "
        f"(difference {number(excess(layers.documents, middle[label], middle['as writers, |m||v|']))})"
        for label in _KINDS
    )
    frame = pl.concat(frames)
    return Finding(
        id="figure-19-where-values-and-queries-are",
        items=("A63",),
        title="Where the hundred strongest values and queries are (Yu Figure 19)",
        says=f"Mean layer of the hundred strongest neurons of {neurons.sum():,} in {total} layers, over "
        f"{over(layers)}: {said}, of the hundred that write most (|m||v|) "
        f"{number(layers.ratio(*middle['as writers, |m||v|']))}; the two ways to score queries share "
        f"{percent(layers.share_of(both, first))} of theirs, and would share {percent(layers.share_of(like, first))} "
        f"if a query had the chain of one that writes as strongly, an excess of {points(more)}.",
        frame=frame,
        figure=line(frame, "neurons of the hundred strongest", color="kind"),
        paper="values mainly in layers 11-13 of 16, queries mainly in 0-3; both methods alike",
        null=f"the hundred that write most; for what both share, {_MATCHED}",
        resampled=_DOCUMENTS,
        contrasts=(contrast("both", more),),
        notes=(
            "summed: Eq. 25 over the ten most helpful and ten most unhelpful neurons of every upper layer; chained: "
            "C(b) handed down from the top, C(a) of the query itself left out",
            f"of two hundreds drawn at random {100 * FIRST / neurons.sum():.2f} % are shared",
        ),
    )


def _mass(layers: ExampleGrid) -> Finding:
    """A63: how much of all value and of all querying is in each layer."""
    written = layers.mean("write_mass")
    kinds = {"value": "as values", "query": "as queries, summed", "chain": "as queries, chained"}
    means = {label: layers.mean(f"{name}_mass") for name, label in kinds.items()}

    def half(mean: Interval) -> int:
        return int(np.searchsorted(np.cumsum(mean.value), 0.5 * mean.value.sum()))

    said = ", ".join(f"{label} in layer {half(mean)}" for label, mean in means.items())
    frame = pl.concat([series(mean, written, kind=label) for label, mean in means.items()])
    return Finding(
        id="mass-of-values-and-queries",
        items=("A63",),
        title="How value and query scores are spread over layers",
        says=f"From layer 0 up, half of the sum of |score| over all neurons is reached {said}, and half of the sum of "
        f"|m||v| in layer {half(written)}; mean shares of {layers.count} layers over {over(layers)}.",
        frame=frame,
        figure=line(frame, "share of the sum of |score| (%)", color="kind", share=True),
        null="the layer's share of the sum of |m||v|",
        resampled=_DOCUMENTS,
    )


def _extremes(layers: ExampleGrid) -> Finding:
    """A64: whether the strongest queries are helpful or unhelpful extremes of their own layer."""
    frames, said, contrasts = [], [], []
    for side in SIDES:
        own, like = (_over_layers(sums) for sums in _listed(layers, "first", (side,)))
        more = excess(layers.documents, own, like)
        contrasts.append(contrast(side, more))
        share, null = layers.share_of(*own), layers.share_of(*like)
        frames.append(row(share, null, side=side))
        of_queries = layers.share_of(own[0], layers["queries_first"].sum(1))
        said.append(
            f"of the ten most {side} neurons of each layer {percent(share)} (unlisted ones that write as strongly "
            f"{percent(null)}, an excess of {points(more)}); they are "
            f"{percent(of_queries)} of the hundred"
        )
    frame = pl.concat(frames)
    return Finding(
        id="extremes-act-as-queries",
        items=("A64",),
        title="Helpful and unhelpful extremes among the strongest queries",
        says=f"Among the hundred strongest queries of the model (Eq. 25, summed), over {layers.count} layers and "
        f"{over(layers)}, are {'; '.join(said)}.",
        frame=frame,
        figure=bar(
            frame,
            "among the hundred strongest queries (%)",
            x="side",
            x_title="extremes of their layer",
            share=True,
        ),
        paper="both play a big role",
        contrasts=tuple(contrasts),
        null=_UNLISTED,
        resampled=_DOCUMENTS,
    )
