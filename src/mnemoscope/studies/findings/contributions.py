"""Who makes a prediction, and how many of them (Yu et al. 2023, Sections 3 and 4; A36-A48, A65).

The null of every figure is another token, about as frequent in the corpus, asked of the same residuals and neurons.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy.stats import rankdata

from mnemoscope.intervals import Interval, mean_by_document, share_by_document
from mnemoscope.studies.findings.finding import Finding, bar, line
from mnemoscope.studies.findings.statistics import ExampleGrid, number, percent, series

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run


def shared(increases: np.ndarray, total: float) -> np.ndarray:
    """f64[part]: the increase by a sum shared among its parts, helpful and unhelpful apart (Yu et al. 2023; A41).

    The paper scales every C_i by C(sum) / sum C_i, which is unstable when increases of both signs cancel. Here the
    side that is too large (the helpful when sum C_i > C(sum), else the unhelpful) is scaled down and the other kept,
    so that signs stay and shares add up to `total`; where a side would have to change its sign for that, the other
    side is scaled up. Zero increases get nothing; with no increase at all the total is shared equally.
    """
    up, down = np.maximum(increases, 0.0), np.minimum(increases, 0.0)
    if not increases.any():
        return np.full(len(increases), total / max(len(increases), 1))
    shrink, keep = (up, down) if increases.sum() > total else (down, up)
    for scaled, kept in ((shrink, keep), (keep, shrink)):
        size = float(scaled.sum())
        with np.errstate(over="ignore"):
            factor = float(np.float64(total - kept.sum()) / size) if size else -1.0
        if 0 <= factor < math.inf:
            return np.asarray(kept + scaled * factor)
    # Only one sign is there and the total has the other: the paper's rule is all that is left.
    return np.asarray(increases * (total / float(increases.sum())))


SIDES = ("helpful", "unhelpful")
CHOICES = {
    "increase": "by increase",
    "rank": "by rank",
    "weight": "by |m||v|",
    "coefficient": "by |m|",
}
_NULL = "another token, about as frequent, asked of the same neurons"
_DOCUMENTS = "documents"
_TOP = 10


def load(run: Run) -> dict[str, ExampleGrid]:
    """`contribution_layers` by target (`model`, `null`, `gold`), `model` first."""
    examples = run.table("contribution_examples").collect()
    rows = run.table("contribution_layers").collect()
    return {
        target: ExampleGrid(
            target,
            rows.filter(target=target).sort("example", "layer"),
            examples.filter(target=target).sort("example"),
        )
        for target in examples["target"].unique(maintain_order=True)
    }


def findings(run: Run) -> list[Finding]:
    """Everything that the tables `contribution_*` say."""
    grids = load(run)
    return [
        _stream(run, grids["model"].examples),
        _curve(run),
        _parts(grids),
        _shared(grids["model"]),
        _sums(run, grids["model"]),
        _table(grids),
        _table_by_layer(grids),
        _counts(grids),
        _ten(grids),
        _signs(grids["model"]),
    ]


def _beside(nats: float) -> str:
    return f"{abs(nats):.1f} nats {'above' if nats >= 0 else 'below'} all others together"


def _stream(run: Run, examples: pl.DataFrame) -> Finding:
    """A46: log p of the prediction at every point of the stream."""
    rows = run.table("contribution_points").sort("example", "point").collect()
    frames, main = [], None
    for lens in ("frozen", "own", "raw"):
        means = {
            target: ExampleGrid(target, points, examples).mean("log_probability")
            for target in ("model", "null")
            if (points := rows.filter(lens=lens, target=target)).height
        }
        main = main or means["model"]
        frames.append(series(means["model"], means.get("null"), lens=lens).rename({"layer": "point"}))
    assert main is not None
    rising = int((np.diff(main.value) > 0).sum())
    frame = pl.concat(frames)
    return Finding(
        id="figure-5-log-p-along-the-stream",
        items=("A46", "A38"),
        title="Log-probability of the prediction along the residual stream (Yu Figure 5)",
        says=f"Under the frozen lens the mean log-probability goes from {number(main, 0)} to {number(main, -1)} nats; "
        f"it rises at {rising} of {len(main.value) - 1} steps.",
        frame=frame,
        figure=line(
            frame,
            "mean log p of the prediction (nats)",
            x="point",
            x_title="point: 0 the embedding, then after attention and after feed-forward",
            facet="lens",
            free=True,
        ),
        paper="33 points; increasing everywhere, steep in low layers, flat in high ones",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("raw leaves the final norm out: a model trained with one was never read so",),
    )


def _curve(run: Run) -> Finding:
    """A36: p as a function of the target's logit with the others fixed, and where the stream is on it."""
    rows = run.table("contribution_points").filter(lens="frozen", target="model").collect()
    rows = rows.with_columns(margin=(pl.col("logit") - pl.col("others")).cast(pl.Float64))
    middle = rows.group_by("point").agg(pl.col("margin").median()).sort("point")["margin"].to_numpy()
    margins = np.linspace(min(-12.0, middle.min()), max(8.0, middle.max()), 81)
    frames = []
    for name, at in (("F(l), computed", margins), ("median of the stream, point by point", middle)):
        for what, value in (("p", 1 / (1 + np.exp(-at))), ("log p (nats)", -np.logaddexp(0, -at))):
            frames.append(
                pl.DataFrame({"margin": at, "value": value}).with_columns(
                    pl.lit(name).alias("series"), pl.lit(what).alias("scale")
                )
            )
    late = int((middle < -np.log(9)).sum())
    frame = pl.concat(frames)
    return Finding(
        id="figure-2-probability-against-logit",
        items=("A36",),
        title="Probability against the logit of the target, the others fixed (Yu Figure 2)",
        says=f"From the embedding to the end the median prediction's logit goes from {_beside(middle[0])} to "
        f"{_beside(middle[-1])}; at {late} of {len(middle)} points p is still below 0.1.",
        frame=frame,
        figure=line(
            frame,
            "p, or log p",
            x="margin",
            x_title="logit of the target less log of the sum of exp of the others (nats)",
            color="series",
            facet="scale",
            free=True,
        ),
        paper="slow, then steep; log F nearly linear until it saturates",
        notes=(
            "F(l) = e^l / (e^l + B): in l - log B one curve for all; the median is on it because F is monotone",
        ),
    )


def _parts(grids: dict[str, ExampleGrid]) -> Finding:
    """A38, A65: what attention and feed-forward of each layer bring."""
    null = grids.get("null")
    frames = [
        series(grids["model"].mean(part), None if null is None else null.mean(part), part=label)
        for part, label in (("attention", "attention"), ("ffn", "feed-forward"))
    ]
    both = {part: grids["model"].mean(part) for part in ("attention", "ffn")}
    total = {part: grids["model"].mean(grids["model"][part].sum(1)) for part in both}
    useful = {part: int((mean.low > 0).sum()) for part, mean in both.items()}
    layers = len(both["ffn"].value)
    frame = pl.concat(frames)
    return Finding(
        id="increases-by-layers",
        items=("A38", "A65"),
        title="What attention and feed-forward of each layer contribute",
        says=f"All attention brings {number(total['attention'])} nats and all feed-forward "
        f"{number(total['ffn'])}; the mean is certainly above 0 in {useful['attention']} and "
        f"{useful['ffn']} of {layers} layers.",
        frame=frame,
        figure=line(frame, "mean increase (nats)", color="part"),
        paper="knowledge is in attention and feed-forward of all layers",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("increases by all layers add up to log p at the end less log p of the embedding",),
    )


def credited(main: ExampleGrid) -> np.ndarray:
    """f64[side, example, layer]: what a layer did, shared between its helpful and unhelpful neurons (A41)."""
    sides = np.stack([main[f"{side}_all"] for side in SIDES], axis=-1)
    pairs = zip(sides.reshape(-1, 2), main["ffn"].reshape(-1), strict=True)
    return np.stack([shared(both, total) for both, total in pairs]).reshape(sides.shape).transpose(2, 0, 1)


def _shared(main: ExampleGrid) -> Finding:
    """A41: what helpful and unhelpful neurons are credited with, so that both add up to what the layer did."""
    own = {side: main.mean(f"{side}_all") for side in SIDES}
    shares = dict(zip(SIDES, (main.mean(grid) for grid in credited(main)), strict=True))
    whole = main.mean("ffn")
    frame = pl.concat(
        series(sides[side], None, side=side, counted=counted)
        for counted, sides in (("by themselves", own), ("shared", shares))
        for side in SIDES
    )
    return Finding(
        id="sides-shared",
        items=("A41",),
        title="What a layer did, shared between helpful and unhelpful neurons",
        says="In the last layer helpful neurons contribute "
        f"{number(own['helpful'], -1)} nats by themselves and unhelpful ones {number(own['unhelpful'], -1)}; shared so "
        f"that both add up to the {number(whole, -1)} nats of the layer, {number(shares['helpful'], -1)} and "
        f"{number(shares['unhelpful'], -1)}.",
        frame=frame,
        figure=line(frame, "increase (nats)", color="side", facet="counted"),
        paper="every increase scaled by one factor, so that they add up",
        resampled=_DOCUMENTS,
        notes=(
            "the side that is too large is scaled down and the other kept: one factor explodes where both cancel",
            "biases of the layer are shared out with them",
        ),
    )


def correlations(rows: pl.DataFrame) -> pl.DataFrame:
    """example, layer, pearson, spearman, slope: the increase by sums against the sum of increases (A40).

    rows  of `contribution_sums`; fewer than three sums, or sums that are all alike, give no number
    """
    correlated = []
    for (example, layer), sums in rows.group_by("example", "layer", maintain_order=True):
        x, y = (sums[name].cast(pl.Float64).to_numpy() for name in ("separate", "together"))
        if len(x) >= 3 and x.std() > 0 and y.std() > 0:
            cross = ((x - x.mean()) * (y - y.mean())).mean()
            order = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
            correlated.append(
                (example, layer, float(cross / x.std() / y.std()), order, float(cross / x.var()))
            )
    names = ["pearson", "spearman", "slope"]
    kinds = {"example": pl.Int32, "layer": pl.Int16} | dict.fromkeys(names, pl.Float64)
    return pl.DataFrame(correlated, kinds, orient="row")


def _sums(run: Run, main: ExampleGrid) -> Finding:
    """A40: does the increase by a sum follow the sum of increases?"""
    rows = run.table("contribution_sums").collect()
    correlated = correlations(rows)
    documents = main.documents[correlated["example"].to_numpy()]
    pearson, spearman, slope = (
        mean_by_document(correlated[name].to_numpy(), documents) for name in ("pearson", "spearman", "slope")
    )
    step = rows.with_columns(step=pl.int_range(pl.len()).over("example", "layer"))
    frame = step.group_by("layer", "step").agg(
        pl.col("separate").cast(pl.Float64).mean(), pl.col("together").cast(pl.Float64).mean()
    )
    by_layer = (
        correlated.group_by("layer").agg(pl.col("pearson").mean(), pl.col("slope").mean()).sort("layer")
    )
    frame = frame.sort("layer", "step").with_columns(series="layer " + pl.col("layer").cast(pl.String))
    return Finding(
        id="figure-3-increase-by-sums",
        items=("A39", "A40"),
        title="Helpful neurons together against each alone (Yu Figure 3)",
        says=f"From the least helpful on, the increase by the sum follows the sum of increases with Pearson "
        f"{number(pearson)}, Spearman {number(spearman)} and slope {number(slope)}.",
        frame=frame,
        figure=line(
            frame,
            "increase by the sum (nats)",
            x="separate",
            y="together",
            x_title="sum of increases (nats)",
            color="series",
        ),
        paper="linear, monotone",
        resampled=_DOCUMENTS,
        notes=tuple(f"layer {layer}: Pearson {r:.3f}, slope {b:.2f}" for layer, r, b in by_layer.iter_rows()),
    )


def _chosen(grid: ExampleGrid) -> dict[str, np.ndarray]:
    """f64[example, layer] by choice, in layers where all four were made."""
    known = ~np.isnan(grid["by_rank"]).all(0)
    return {choice: grid[f"by_{choice}"][:, known] for choice in CHOICES}


def _table(grids: dict[str, ExampleGrid]) -> Finding:
    """A44: ten neurons chosen in four ways."""
    rows = []
    scores = {
        target: {choice: grid.mean(values.mean(1)) for choice, values in _chosen(grid).items()}
        for target, grid in grids.items()
    }
    for choice, label in CHOICES.items():
        band = map(float, scores["null"][choice]) if "null" in scores else [None] * 3
        rows.append((label, *map(float, scores["model"][choice]), *band))
    names = ["chosen", "value", "low", "high", "null", "null_low", "null_high"]
    best = sorted(CHOICES, key=lambda choice: -float(scores["model"][choice].value))
    more = [f"target {name}: " + ", ".join(f"{CHOICES[c]} {number(means[c])}" for c in CHOICES)
            for name, means in scores.items() if name == "gold"]  # fmt: skip
    layers = next(iter(_chosen(grids["model"]).values())).shape[1]
    said = ", ".join(f"{CHOICES[choice]} {number(scores['model'][choice])}" for choice in best)
    frame = pl.DataFrame(rows, dict(zip(names, [pl.String, *[pl.Float64] * 6], strict=True)), orient="row")
    return Finding(
        id="table-1-ten-neurons-chosen",
        items=("A44", "A45"),
        title="Ten neurons of a layer, chosen in four ways (Yu Table 1)",
        says=f"Together ten neurons raise log p of the prediction, in nats, chosen {said}.",
        frame=frame,
        figure=bar(frame, "increase by their sum (nats)", x="chosen", x_title="ten neurons chosen"),
        paper="increase 1.75, rank 1.73, m |v| 0.15, m 0.05: increase >= rank >> m |v| > m",
        null=f"{_NULL}: ten neurons chosen for it raise it, too",
        resampled=_DOCUMENTS,
        notes=(
            f"mean over {layers} layers; inactive neurons are never chosen",
            "rank is that of the token in what the neuron writes, with the sign of its coefficient",
            *more,
        ),
    )


def _table_by_layer(grids: dict[str, ExampleGrid]) -> Finding:
    frames = []
    null = grids.get("null")
    known = np.flatnonzero(~np.isnan(grids["model"]["by_rank"]).all(0))
    for choice, label in CHOICES.items():
        band = None if null is None else null.mean(f"by_{choice}")
        frame = series(grids["model"].mean(f"by_{choice}"), band, chosen=label)
        frames.append(frame.filter(pl.col("layer").is_in(known.tolist())))
    best = grids["model"].mean("by_increase")
    top = int(known[np.nanargmax(best.value[known])])
    frame = pl.concat(frames)
    return Finding(
        id="table-1-by-layer",
        items=("A44", "A65"),
        title="The same, layer by layer",
        says=f"Ten neurons chosen by increase raise log p most in layer {top}: by {number(best, top)} nats.",
        frame=frame,
        figure=line(frame, "increase by ten neurons (nats)", color="chosen"),
        null=_NULL,
        resampled=_DOCUMENTS,
    )


def _counts(grids: dict[str, ExampleGrid]) -> Finding:
    """A47: how many help, how many do not, and how many it would take."""
    null, main, frames = grids.get("null"), grids["model"], []
    for what, suffix in (("neurons", ""), ("as concentrated as so many equal ones", "_effective")):
        for side in SIDES:
            name = f"{side}{suffix}"
            band = None if null is None else null.mean(name)
            frames.append(series(main.mean(name), band, side=side, counted=what))
    frames.append(
        series(main.mean("undecided"), None if null is None else null.mean("undecided"), side="undecided",
               counted="neurons")
    )  # fmt: skip
    last, first = ([number(main.mean(side), layer, ".0f") for side in SIDES] for layer in (-1, 0))
    few = [number(main.mean(f"{side}_effective"), -1, ".0f") for side in SIDES]
    open_ = share_by_document(main["undecided"].sum(1) / main["active"].sum(1), main.documents)
    frame = pl.concat(frames)
    return Finding(
        id="figure-6-helpful-and-unhelpful-neurons",
        items=("A47",),
        title="How many neurons help and how many do not (Yu Figure 6)",
        says=f"In the last layer {last[0]} neurons help and {last[1]} do not, in the first {first[0]} and {first[1]}; "
        f"what they bring is as concentrated as that of {few[0]} and {few[1]} equal ones in the last.",
        frame=frame,
        figure=line(frame, "neurons of the layer", color="side", facet="counted", free=True),
        paper="both numbers are large in low layers and small in high ones; with ReLU most neurons are inactive, C = 0",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=(
            f"signs are certified; {percent(open_)} of the active neurons are undecided: their interval holds 0",
            "the second measure is (sum C)^2 / sum C^2 over one side: in a gated model hardly any C is 0, and counts "
            "say little",
        ),
    )


def _share(grid: ExampleGrid, side: str) -> Interval:
    return grid.ratio(grid[f"{side}_top"], grid[f"{side}_all"])


def _ten(grids: dict[str, ExampleGrid]) -> Finding:
    """A48: the ten best together against all together."""
    null, frames = grids.get("null"), []
    shares = {side: _share(grids["model"], side) for side in SIDES}
    for side, share in shares.items():
        band = None if null is None else _share(null, side)
        frames.append(series(share, band, side=side))
    first, last = ({side: percent(shares[side], layer) for side in SIDES} for layer in (0, -1))
    frame = pl.concat(frames)
    return Finding(
        id="figure-7-ten-against-all",
        items=("A48", "A65"),
        title="Ten neurons together against all of their side (Yu Figure 7)",
        says=f"The ten most helpful bring {first['helpful']} of what all helpful neurons bring together in layer 0 and "
        f"{last['helpful']} in the last; the ten most unhelpful {first['unhelpful']} and {last['unhelpful']}.",
        frame=frame,
        figure=line(frame, "C(ten) / C(all of the side) (%)", color="side", share=True),
        paper="alike in later layers; in the first ones higher for unhelpful neurons; many act together",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("a ratio of means, which examples with little to share do not upset",),
    )


def _signs(main: ExampleGrid) -> Finding:
    """A37: negative coefficients among helpful and unhelpful neurons."""
    shares = {side: main.share_of(main[f"{side}_negative"], main[side]) for side in SIDES}
    overall = {
        side: share_by_document(main[f"{side}_negative"].sum(1) / main[side].sum(1).clip(1), main.documents)
        for side in SIDES
    }  # fmt: skip
    frame = pl.concat([series(share, side=side) for side, share in shares.items()])
    return Finding(
        id="negative-coefficients",
        items=("A37",),
        title="Neurons that act upside down",
        says=f"{percent(overall['helpful'])} of helpful and {percent(overall['unhelpful'])} of unhelpful neurons have "
        "a negative coefficient: they raise what their value scores lowest.",
        frame=frame,
        figure=line(frame, "with m < 0 (%)", color="side", share=True),
        paper="none: ReLU",
        resampled=_DOCUMENTS,
    )
