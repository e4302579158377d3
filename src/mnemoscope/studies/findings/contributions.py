"""Who makes a prediction, and how many of them (Yu et al. 2023, Sections 3 and 4; A36-A48, A65).

The null of every figure is another token, about as frequent in the corpus, asked of the same residuals and neurons; it
goes through the same choice of neurons. Log-probabilities saturate, so that figures of sums stand in logits, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, by_document, mean_by_document, ratio, share_by_document
from mnemoscope.studies.findings.finding import Difference, Finding, bar, line
from mnemoscope.studies.findings.statistics import ExampleGrid, contrast, number, percent, points, series

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
SCALES = {"nats": "", "logits": "_logit"}
_NULL = "another token, about as frequent, asked of the same neurons"
_ELSEWHERE = "chosen elsewhere"
_LOGITS = "logits: of the target above the mean token's, before a soft cap; they do not saturate and add up"
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


def load_pairs(run: Run) -> dict[str, ExampleGrid]:
    """`contribution_pairs` by kind (`same`, `other`), of the examples that have both; nothing where none has."""
    examples = run.table("contribution_examples").filter(target="model").collect()
    rows = run.table("contribution_pairs").collect()
    of = {kind: rows.filter(kind=kind).sort("example", "layer") for kind in ("same", "other")}
    both = (
        of["same"].join(of["other"].select("example").unique(), on="example", how="semi")["example"].unique()
    )
    if not len(both):
        return {}
    examples = examples.filter(pl.col("example").is_in(both.implode())).sort("example")
    return {
        kind: ExampleGrid(kind, of_kind.filter(pl.col("example").is_in(both.implode())), examples)
        for kind, of_kind in of.items()
    }


def findings(run: Run) -> list[Finding]:
    """Everything that the tables `contribution_*` say."""
    grids, pairs = load(run), load_pairs(run)
    return [
        _stream(run, grids["model"].examples),
        _curve(run),
        _parts(grids),
        _shared(grids["model"]),
        _sums(run, grids["model"]),
        _table(grids, pairs),
        _table_by_layer(grids),
        _counts(grids),
        _ten(grids, pairs),
        _signs(grids["model"]),
    ]


def over(grid: ExampleGrid) -> str:
    """How many examples a figure is over."""
    return f"{grid.examples.height:,} prefixes of {len(np.unique(grid.documents)):,} documents"


def excess(
    documents: np.ndarray, own: tuple[np.ndarray, np.ndarray], null: tuple[np.ndarray, np.ndarray]
) -> Interval:
    """One ratio of sums f64[example, ...] less another, both of the same documents, resampled together."""
    sums = np.stack(np.broadcast_arrays(*own, *null), axis=1)
    return by_document(
        sums, documents, lambda drawn: ratio(drawn[:, 0], drawn[:, 1]) - ratio(drawn[:, 2], drawn[:, 3])
    )


def above(own: ExampleGrid, null: ExampleGrid, values: np.ndarray, others: np.ndarray) -> str:
    """Whether a figure of the prediction is above that of the null, of the same examples."""
    difference = mean_by_document(values - others, own.documents)
    if difference.low > 0:
        return f"above it by {number(difference)}"
    return f"{'below it' if difference.high < 0 else 'not certainly another'}, {number(difference)}"


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
        says=f"Under the frozen lens the mean log-probability of the model's prediction goes from {number(main, 0)} "
        f"nats at the embedding to {number(main, -1)} at the end, over {examples.height:,} prefixes; it rises at "
        f"{rising} of {len(main.value) - 1} steps. {_ends(frames[0])}",
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


def _ends(frame: pl.DataFrame) -> str:
    if frame["null"].null_count():
        return ""
    first, last = frame["null"][0], frame["null"][-1]
    return f"That of another token, about as frequent, goes from {first:.2f} to {last:.2f}."


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
        says=f"Under the frozen lens the prediction's logit, median over {rows['example'].n_unique():,} prefixes, "
        f"goes from {_beside(middle[0])} (log of the sum of their exp) at the embedding to {_beside(middle[-1])} at "
        f"the end; at {late} of {len(middle)} points of the stream p is still below 0.1.",
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
        says=f"Of log p of the prediction all attention layers bring {number(total['attention'])} nats and all "
        f"feed-forward layers {number(total['ffn'])}, means over {over(grids['model'])}"
        + (
            ""
            if null is None
            else f" (of another token's {number(null.mean(null['attention'].sum(1)))} and "
            f"{number(null.mean(null['ffn'].sum(1)))})"
        )
        + f"; the interval of the mean is above 0 in {useful['attention']} and {useful['ffn']} of {layers} layers, "
        "each by itself.",
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
        says=f"In layer {main.count - 1}, the last, all helpful neurons together raise log p of the prediction by "
        f"{number(own['helpful'], -1)} nats and all unhelpful ones by {number(own['unhelpful'], -1)}, means over "
        f"{over(main)}; shared so that both add up to the {number(whole, -1)} nats of the layer, "
        f"{number(shares['helpful'], -1)} and {number(shares['unhelpful'], -1)}.",
        frame=frame,
        figure=line(frame, "increase (nats)", color="side", facet="counted"),
        paper="every increase scaled by one factor, so that they add up",
        resampled=_DOCUMENTS,
        notes=(
            "the side that is too large is scaled down and the other kept: one factor explodes where both cancel",
            "biases of the layer are shared out with them",
            f"signs are estimates; of the certain ones alone {number(main.mean('helpful_all_certain'), -1)} and "
            f"{number(main.mean('unhelpful_all_certain'), -1)} nats in the last layer",
        ),
    )


def slopes(rows: pl.DataFrame) -> pl.DataFrame:
    """example, layer, slope: of the increase by sums over the sum of increases, by least squares (A40).

    rows  of `contribution_sums`; fewer than three sums, or sums that are all alike, give no number
    """
    fitted = []
    for (example, layer), sums in rows.group_by("example", "layer", maintain_order=True):
        x, y = (sums[name].cast(pl.Float64).to_numpy() for name in ("separate", "together"))
        if len(x) >= 3 and x.std() > 0:
            fitted.append((example, layer, float(((x - x.mean()) * (y - y.mean())).mean() / x.var())))
    return pl.DataFrame(fitted, {"example": pl.Int32, "layer": pl.Int16, "slope": pl.Float64}, orient="row")


def _sums(run: Run, main: ExampleGrid) -> Finding:
    """A40: by how much does the increase by a sum fall short of the sum of increases?"""
    rows = run.table("contribution_sums").collect()
    fitted = slopes(rows)
    slope = mean_by_document(fitted["slope"].to_numpy(), main.documents[fitted["example"].to_numpy()])
    step = rows.with_columns(step=pl.int_range(pl.len()).over("example", "layer"))
    frame = step.group_by("layer", "step").agg(
        pl.col(name).cast(pl.Float64).mean() for name in ("separate", "together", "logit")
    )
    by_layer = fitted.group_by("layer").agg(pl.col("slope").mean()).sort("layer")
    frame = frame.sort("layer", "step").with_columns(series="layer " + pl.col("layer").cast(pl.String))
    layers = ", ".join(map(str, by_layer["layer"].to_list()))
    return Finding(
        id="figure-3-increase-by-sums",
        items=("A39", "A40"),
        title="Helpful neurons together against each alone (Yu Figure 3)",
        says="With helpful neurons added from the least helpful on, log p of the prediction rises by "
        f"{number(slope)} nats for each nat that they bring one by one: the mean slope of {fitted.height:,} fits "
        f"over {over(main)} in layers {layers}. In logits the slope is 1 by construction: what is missing is "
        "saturation.",
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
        notes=(
            "cumulated sums of positive numbers in ascending order rise by construction, so that Pearson and Spearman "
            "come near 1 for any neurons and say nothing",
            f"{_LOGITS} (column `logit`)",
            *(f"layer {layer}: slope {slope:.2f}" for layer, slope in by_layer.iter_rows()),
        ),
    )


def _chosen(grid: ExampleGrid, scale: str) -> dict[str, np.ndarray]:
    """f64[example, layer] by choice, in layers where all four were made."""
    known = ~np.isnan(grid["by_rank"]).all(0)
    return {choice: grid[f"by_{choice}{SCALES[scale]}"][:, known] for choice in CHOICES}


def _elsewhere(
    pairs: dict[str, ExampleGrid], main: ExampleGrid
) -> tuple[list[pl.DataFrame], str, tuple[Difference, ...]]:
    """A44: ten neurons chosen on one prefix and scored on another, as rows, as a sentence and as contrasts."""
    if not pairs:
        return (
            [],
            "No two prefixes of different documents have the same prediction, so that ten could be chosen on one.",
            (),
        )
    frames, told, contrasts = [], [], []
    for scale in SCALES:
        own, others = (_chosen(pairs[kind], scale) for kind in ("same", "other"))
        for choice, label in CHOICES.items():
            means = (pairs["same"].mean(values[choice].mean(1)) for values in (own, others))
            frames.append(row(*means, chosen=label, scale=f"{scale}, {_ELSEWHERE}"))
        same, other = (values["increase"].mean(1) for values in (own, others))
        mean, chance, more = (pairs["same"].mean(values) for values in (same, other, same - other))
        told.append(f"{number(mean)} {scale} ({number(chance)}, difference {number(more)})")
        contrasts.append(contrast(scale, more))
    of = f"{pairs['same'].examples.height:,} of {main.examples.height:,} prefixes have one"
    said = (
        f"Ten chosen by increase on a prefix of another document with the same prediction ({of}) raise the prediction "
        f"here by {' and '.join(told)}; in brackets ten chosen on a prefix with another prediction."
    )
    return frames, said, tuple(contrasts)


def _table(grids: dict[str, ExampleGrid], pairs: dict[str, ExampleGrid]) -> Finding:
    """A44: ten neurons chosen in four ways."""
    main, null = grids["model"], grids.get("null")
    frames, said = [], []
    for scale in SCALES:
        own = _chosen(main, scale)
        scores = {choice: main.mean(values.mean(1)) for choice, values in own.items()}
        others = {} if null is None else {
            choice: null.mean(values.mean(1)) for choice, values in _chosen(null, scale).items()
        }  # fmt: skip
        for choice, label in CHOICES.items():
            frames.append(row(scores[choice], others.get(choice), chosen=label, scale=scale))
        best = sorted(CHOICES, key=lambda choice: -float(scores[choice].value))
        told = ", ".join(f"{CHOICES[choice]} {number(scores[choice])}" for choice in best)
        if null is not None:
            both = (own["increase"].mean(1), _chosen(null, scale)["increase"].mean(1))
            told += (
                f"; ten chosen by increase for another token, about as frequent, raise that one by "
                f"{number(others['increase'])}, and the prediction's is {above(main, null, *both)}"
            )
        said.append(told)
    more = [f"target {name}, nats: " + ", ".join(
                f"{label} {number(grid.mean(_chosen(grid, 'nats')[choice].mean(1)))}"
                for choice, label in CHOICES.items())
            for name, grid in grids.items() if name == "gold"]  # fmt: skip
    layers = _chosen(main, "nats")["increase"].shape[1]
    rows, elsewhere, contrasts = _elsewhere(pairs, main)
    frame = pl.concat([*frames, *rows])
    return Finding(
        id="table-1-ten-neurons-chosen",
        items=("A44", "A45"),
        title="Ten neurons of a layer, chosen in four ways (Yu Table 1)",
        says=f"Ten neurons of a layer together raise log p of the prediction, mean over {layers} layers and "
        f"{over(main)}, in nats, chosen {said[0]}. In logits above the mean token's, which do not saturate: {said[1]}. "
        f"{elsewhere}",
        frame=frame,
        figure=bar(
            frame, "increase by their sum", x="chosen", x_title="ten neurons chosen", facet="scale", free=True
        ),
        paper="increase 1.75, rank 1.73, m |v| 0.15, m 0.05: increase >= rank >> m |v| > m",
        null=f"{_NULL}: ten neurons chosen for it raise it, too; of those chosen elsewhere, ten chosen on a prefix "
        "with another prediction",
        resampled=_DOCUMENTS,
        notes=(
            f"mean over {layers} layers; inactive neurons are never chosen",
            "chosen and scored on the same prefix, but for what is chosen elsewhere: on one of another document",
            "rank is that of the token in what the neuron writes, with the sign of its coefficient",
            _LOGITS,
            *more,
        ),
        contrasts=contrasts,
    )


def row(value: Interval, null: Interval | None, **labels: str) -> pl.DataFrame:
    """One row of a figure without layers."""
    own, chance = (
        None
        if interval is None
        else Interval(*(None if end is None else np.atleast_1d(end) for end in interval))
        for interval in (value, null)
    )
    assert own is not None
    return series(own, chance, **labels).drop("layer")


def _table_by_layer(grids: dict[str, ExampleGrid]) -> Finding:
    frames = []
    main, null = grids["model"], grids.get("null")
    known = np.flatnonzero(~np.isnan(main["by_rank"]).all(0))
    for scale, suffix in SCALES.items():
        for choice, label in CHOICES.items():
            band = None if null is None else null.mean(f"by_{choice}{suffix}")
            frame = series(main.mean(f"by_{choice}{suffix}"), band, chosen=label, scale=scale)
            frames.append(frame.filter(pl.col("layer").is_in(known.tolist())))
    said = []
    for scale, suffix in SCALES.items():
        best = main.mean(f"by_increase{suffix}")
        top = int(known[np.nanargmax(best.value[known])])
        beside = ""
        if null is not None:
            # In its own largest layer: in the prediction's it would be smaller by that choice alone.
            like = null.mean(f"by_increase{suffix}")
            most = int(known[np.nanargmax(like.value[known])])
            beside = f" (another token's most in layer {most}, by {number(like, most)})"
        said.append(f"layer {top}, by {number(best, top)} {scale}{beside}")
    frame = pl.concat(frames)
    return Finding(
        id="table-1-by-layer",
        items=("A44", "A65"),
        title="The same, layer by layer",
        says=f"Ten neurons chosen by increase raise log p of the prediction most in {said[0]}, and its logit above "
        f"the mean token's in {said[1]}; means over {over(main)}, of {len(known)} layers.",
        frame=frame,
        figure=line(frame, "increase by ten neurons", color="chosen", facet="scale", free=True),
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=(_LOGITS,),
    )


def _counts(grids: dict[str, ExampleGrid]) -> Finding:
    """A47: how many help, how many do not, and how many it would take."""
    null, main, frames = grids.get("null"), grids["model"], []
    ends = {
        "neurons": lambda grid, side: grid[side],
        "neurons, certainly": lambda grid, side: grid[f"{side}_certain"],
        "neurons, at most": lambda grid, side: grid[f"{side}_certain"] + grid["undecided"],
        "as concentrated as so many equal ones": lambda grid, side: grid[f"{side}_effective"],
    }
    for what, count in ends.items():
        for side in SIDES:
            band = None if null is None else null.mean(count(null, side))
            frames.append(series(main.mean(count(main, side)), band, side=side, counted=what))
    # Intervals of another token are those of the prediction, moved: how many are open says nothing of the token.
    frames.append(series(main.mean("undecided"), side="undecided", counted="neurons"))

    def counted(layer: int) -> str:
        told = []
        for side in SIDES:
            certain, most = (float(count(main, side)[:, layer].mean()) for count in [*ends.values()][1:3])
            beside = "" if null is None else f"; another token's {null[side][:, layer].mean():.0f}"
            told.append(
                f"{number(main.mean(side), layer, '.0f')} {side} (certainly {certain:.0f}, at most {most:.0f}{beside})"
            )
        return " and ".join(told)

    few = [number(main.mean(f"{side}_effective"), -1, ".0f") for side in SIDES]
    active = main.mean("active")
    open_ = share_by_document(main["undecided"].sum(1) / main["active"].sum(1).clip(1), main.documents)
    frame = pl.concat(frames)
    return Finding(
        id="figure-6-helpful-and-unhelpful-neurons",
        items=("A47",),
        title="How many neurons help and how many do not (Yu Figure 6)",
        says=f"By the sign of their increase of log p of the prediction, {counted(-1)} of {active.value[-1]:,.0f} "
        f"active neurons in layer {main.count - 1}, the last; {counted(0)} in layer 0; means over {over(main)}. "
        f"{percent(open_)} of active neurons are undecided: their certified interval holds 0. What the sides bring "
        f"in the last layer is as concentrated as that of {few[0]} and {few[1]} equal neurons.",
        frame=frame,
        figure=line(frame, "neurons of the layer", color="side", facet="counted", free=True),
        paper="both numbers are large in low layers and small in high ones; with ReLU most neurons are inactive, C = 0",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=(
            "signs are those of estimates, which lie inside of certified intervals",
            "the last measure is (sum C)^2 / sum C^2 over one side: in a gated model hardly any C is 0, and counts "
            "say little",
        ),
    )


def _share(grid: ExampleGrid, side: str, scale: str) -> tuple[np.ndarray, np.ndarray]:
    return grid[f"{side}_top{SCALES[scale]}"], grid[f"{side}_all{SCALES[scale]}"]


def _ten_elsewhere(pairs: dict[str, ExampleGrid], main: ExampleGrid) -> tuple[str, tuple[Difference, ...]]:
    """A48: ten chosen on another prefix, against all helpful neurons here."""
    if not pairs:
        return "", ()
    here = np.searchsorted(main.examples["example"].to_numpy(), pairs["same"].examples["example"].to_numpy())
    every = main["helpful_all_logit"][here]
    same, other = ((grid["by_increase_logit"], every) for grid in (pairs["same"], pairs["other"]))
    more = excess(pairs["same"].documents, same, other)
    said = (
        f" Ten chosen as most helpful on a prefix of another document with the same prediction add "
        f"{percent(pairs['same'].ratio(*same), -1)} of that logit in the last layer, ten chosen on one with another "
        f"prediction {percent(pairs['other'].ratio(*other), -1)}, a difference of {points(more, -1)} "
        f"({pairs['same'].examples.height:,} prefixes)."
    )
    return said, (contrast("chosen elsewhere", more, -1),)


def _ten(grids: dict[str, ExampleGrid], pairs: dict[str, ExampleGrid]) -> Finding:
    """A48: the ten best together against all together."""
    main, null, frames, said = grids["model"], grids.get("null"), [], []
    for scale in SCALES:
        told = []
        for side in SIDES:
            own = _share(main, side, scale)
            share = main.ratio(*own)
            band = None if null is None else null.ratio(*_share(null, side, scale))
            frames.append(series(share, band, side=side, scale=scale))
            told.append(
                f"the ten most {side} {percent(share, 0)} in layer 0 and {percent(share, -1)} in the last"
            )
            if null is not None and band is not None:
                more = excess(main.documents, own, _share(null, side, scale))
                told[-1] += f" (another token's {percent(band, -1)}, difference {points(more, -1)})"
        said.append("; ".join(told))
    frame, (elsewhere, contrasts) = pl.concat(frames), _ten_elsewhere(pairs, main)
    return Finding(
        id="figure-7-ten-against-all",
        items=("A48", "A65"),
        title="Ten neurons together against all of their side (Yu Figure 7)",
        says=f"Of what all neurons of their side add to the logit of the prediction above the mean token's, over "
        f"{over(main)}: {said[1]}. Of what they add to log p, which ends at 0 and so flatters the first: {said[0]}."
        f"{elsewhere}",
        frame=frame,
        figure=line(
            frame, "ten of all of the side (%)", color="side", facet="scale", share=True, order=tuple(SIDES)
        ),
        paper="alike in later layers; in the first ones higher for unhelpful neurons; many act together",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("a ratio of means, which examples with little to share do not upset", _LOGITS),
        contrasts=contrasts,
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
        says=f"{percent(overall['helpful'])} of neurons that raise log p of the prediction and "
        f"{percent(overall['unhelpful'])} of those that lower it have a negative coefficient, over all {main.count} "
        f"layers and {over(main)}: they raise what their value scores lowest.",
        frame=frame,
        figure=line(frame, "with m < 0 (%)", color="side", share=True),
        paper="none: ReLU",
        resampled=_DOCUMENTS,
    )
