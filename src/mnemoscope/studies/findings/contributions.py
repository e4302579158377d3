"""Who makes a prediction, and how many of them (Yu et al. 2023, Sections 3 and 4; A36-A48, A65).

The null of every figure is another token, about as frequent in the corpus, asked of the same residuals and neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy.stats import rankdata

from mnemoscope.intervals import Interval
from mnemoscope.studies.findings.finding import Figure, Finding
from mnemoscope.studies.findings.statistics import (
    mean_by_document,
    percent,
    ratio_of_sums,
    series,
    share_by_document,
    share_of_sums,
)

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run


def shared(contributions: np.ndarray, total: float) -> np.ndarray:
    """f64[part]: the contribution of a sum shared among its parts, helpful and unhelpful apart (Yu et al. 2023; A41).

    The paper scales every C_i by C(sum) / sum C_i, which is unstable when contributions of both signs cancel. Here the
    side that is too large (the helpful when sum C_i > C(sum), else the unhelpful) is scaled down and the other kept,
    so that signs stay and shares add up to `total`; where a side would have to change its sign for that, the other
    side is scaled up. Zero contributions get nothing; with no contribution at all the total is shared equally.
    """
    up, down = np.maximum(contributions, 0.0), np.minimum(contributions, 0.0)
    if not contributions.any():
        return np.full(len(contributions), total / max(len(contributions), 1))
    shrink, keep = (up, down) if contributions.sum() > total else (down, up)
    for scaled, kept in ((shrink, keep), (keep, shrink)):
        size = float(scaled.sum())
        with np.errstate(over="ignore"):
            factor = float(np.float64(total - kept.sum()) / size) if size else -1.0
        if 0 <= factor < math.inf:
            return np.asarray(kept + scaled * factor)
    # Only one sign is there and the total has the other: the paper's rule is all that is left.
    return np.asarray(contributions * (total / float(contributions.sum())))


SIDES = ("helpful", "unhelpful")
CHOICES = {
    "contribution": "by contribution",
    "rank": "by rank",
    "weight": "by |m||v|",
    "coefficient": "by |m|",
}
_NULL = "another token, about as frequent, asked of the same neurons"
_DOCUMENTS = "documents"
_TOP = 10


@dataclass(frozen=True)
class Told:
    """What was measured for one target (`model`, `null`, `gold`): rows of `contribution_layers` as grids.

    documents  i64[example]
    """

    target: str
    rows: pl.DataFrame
    documents: np.ndarray

    def grid(self, name: str) -> np.ndarray:
        """f64[example, layer]; NaN where it is null."""
        values = self.rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        return values.reshape(len(self.documents), -1)

    def mean(self, name: str) -> Interval:
        """f64[layer], resampled by document."""
        return mean_by_document(self.grid(name), self.documents)

    def total(self, name: str) -> Interval:
        """Summed over layers; one number."""
        return mean_by_document(self.grid(name).sum(1), self.documents)

    def share(self, above: str, below: str) -> Interval:
        """f64[layer]: a ratio of sums, so that examples in which little happens weigh little."""
        return ratio_of_sums(self.grid(above), self.grid(below), self.documents)


def load(run: Run) -> dict[str, Told]:
    """By target, `model` first."""
    examples = run.table("contribution_examples").collect()
    rows = run.table("contribution_layers").collect()
    found = {}
    for target in examples["target"].unique(maintain_order=True):
        mine = examples.filter(pl.col("target") == target).sort("example")
        some = rows.filter(pl.col("target") == target).sort("example", "layer")
        found[target] = Told(target, some, mine["document"].to_numpy())
    return found


def findings(run: Run) -> list[Finding]:
    """Everything that the tables `contribution_*` say."""
    told = load(run)
    return [
        _stream(run, told["model"].documents),
        _curve(run),
        _parts(told),
        _shared(told["model"]),
        _sums(run, told["model"].documents),
        _table(told),
        _table_by_layer(told),
        _counts(told),
        _ten(told),
        _signs(told["model"]),
    ]


def number(found: Interval, at: int | None = None, digits: int = 2) -> str:
    """`1.23 [1.10, 1.39]`"""
    value, low, high = (float(part if at is None else part[at]) for part in found)
    return "undefined" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _line(x: str, x_title: str, y_title: str, **more: Any) -> Figure:
    return Figure(
        "line", x, "value", x_title, y_title,
        **{"low": "low", "high": "high", "null": "null", "null_low": "null_low", "null_high": "null_high"} | more,
    )  # fmt: skip


def _beside(nats: float) -> str:
    return f"{abs(nats):.1f} nats {'above' if nats >= 0 else 'below'} all others together"


def _stream(run: Run, documents: np.ndarray) -> Finding:
    """A46: log p of the prediction at every point of the stream."""
    rows = run.table("contribution_points").sort("example", "point").collect()
    frames, main = [], None
    for lens in ("frozen", "own", "raw"):
        found = {
            target: mean_by_document(
                rows.filter(lens=lens, target=target)["log_probability"]
                .cast(pl.Float64)
                .to_numpy()
                .reshape(len(documents), -1),
                documents,
            )
            for target in ("model", "null")
            if rows.filter(lens=lens, target=target).height
        }
        main = main or found["model"]
        frames.append(series(found["model"], found.get("null"), lens=lens).rename({"layer": "point"}))
    assert main is not None
    rising = int((np.diff(main.value) > 0).sum())
    return Finding(
        id="figure-5-log-p-along-the-stream",
        items=("A46", "A38"),
        title="Log-probability of the prediction along the residual stream (Yu Figure 5)",
        says=f"Under the frozen lens the mean log-probability goes from {number(main, 0)} to {number(main, -1)} nats; "
        f"it rises at {rising} of {len(main.value) - 1} steps.",
        frame=pl.concat(frames),
        figure=_line("point", "point: 0 the embedding, then after attention and after feed-forward",
                     "mean log p of the prediction (nats)", facet="lens", free=True),
        paper="33 points; increasing everywhere, steep in low layers, flat in high ones",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("raw leaves the final norm out: a model trained with one was never read so",),
    )  # fmt: skip


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
    return Finding(
        id="figure-2-probability-against-logit",
        items=("A36",),
        title="Probability against the logit of the target, the others fixed (Yu Figure 2)",
        says=f"From the embedding to the end the median prediction's logit goes from {_beside(middle[0])} to "
        f"{_beside(middle[-1])}; at {late} of {len(middle)} points p is still below 0.1.",
        frame=pl.concat(frames),
        figure=Figure("line", "margin", "value", "logit of the target less log of the sum of exp of the others (nats)",
                      "p, or log p", color="series", facet="scale", free=True),
        paper="slow, then steep; log F nearly linear until it saturates",
        notes=("F(l) = e^l / (e^l + B): in l - log B one curve for all; the median is on it because F is monotone",),
    )  # fmt: skip


def _parts(told: dict[str, Told]) -> Finding:
    """A38, A65: what attention and feed-forward of each layer bring."""
    null = told.get("null")
    frames = [
        series(told["model"].mean(part), None if null is None else null.mean(part), part=label)
        for part, label in (("attention", "attention"), ("ffn", "feed-forward"))
    ]
    both = {part: told["model"].mean(part) for part in ("attention", "ffn")}
    useful = {part: int((found.low > 0).sum()) for part, found in both.items()}
    layers = len(both["ffn"].value)
    return Finding(
        id="contributions-of-layers",
        items=("A38", "A65"),
        title="What attention and feed-forward of each layer contribute",
        says=f"All attention brings {number(told['model'].total('attention'))} nats and all feed-forward "
        f"{number(told['model'].total('ffn'))}; the mean is certainly above 0 in {useful['attention']} and "
        f"{useful['ffn']} of {layers} layers.",
        frame=pl.concat(frames),
        figure=_line("layer", "layer", "mean contribution (nats)", color="part"),
        paper="knowledge is in attention and feed-forward of all layers",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("contributions of all layers add up to log p at the end less log p of the embedding",),
    )


def credited(main: Told) -> np.ndarray:
    """f64[side, example, layer]: what a layer did, shared between its helpful and unhelpful neurons (A41)."""
    sides = np.stack([main.grid(f"{side}_all") for side in SIDES], axis=-1)
    pairs = zip(sides.reshape(-1, 2), main.grid("ffn").reshape(-1), strict=True)
    return np.stack([shared(both, total) for both, total in pairs]).reshape(sides.shape).transpose(2, 0, 1)


def _shared(main: Told) -> Finding:
    """A41: what helpful and unhelpful neurons are credited with, so that both add up to what the layer did."""
    own = {side: main.mean(f"{side}_all") for side in SIDES}
    told = dict(zip(SIDES, (mean_by_document(grid, main.documents) for grid in credited(main)), strict=True))
    whole = main.mean("ffn")
    return Finding(
        id="sides-shared",
        items=("A41",),
        title="What a layer did, shared between helpful and unhelpful neurons",
        says="In the last layer helpful neurons contribute "
        f"{number(own['helpful'], -1)} nats by themselves and unhelpful ones {number(own['unhelpful'], -1)}; shared so "
        f"that both add up to the {number(whole, -1)} nats of the layer, {number(told['helpful'], -1)} and "
        f"{number(told['unhelpful'], -1)}.",
        frame=pl.concat(
            series(some[side], None, side=side, counted=counted)
            for counted, some in (("by themselves", own), ("shared", told))
            for side in SIDES
        ),
        figure=_line("layer", "layer", "contribution (nats)", color="side", facet="counted", null=None, null_low=None,
                     null_high=None),
        paper="every contribution scaled by one factor, so that they add up",
        resampled=_DOCUMENTS,
        notes=(
            "the side that is too large is scaled down and the other kept: one factor explodes where both cancel",
            "biases of the layer are shared out with them",
        ),
    )  # fmt: skip


def correlations(rows: pl.DataFrame) -> pl.DataFrame:
    """example, layer, pearson, spearman, slope: the contribution of sums against the sum of contributions (A40).

    rows  of `contribution_sums`; fewer than three sums, or sums that are all alike, give no number
    """
    found = []
    for (example, layer), some in rows.group_by("example", "layer", maintain_order=True):
        x, y = (some[name].cast(pl.Float64).to_numpy() for name in ("separate", "together"))
        if len(x) >= 3 and x.std() > 0 and y.std() > 0:
            cross = ((x - x.mean()) * (y - y.mean())).mean()
            order = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
            found.append((example, layer, float(cross / x.std() / y.std()), order, float(cross / x.var())))
    names = ["pearson", "spearman", "slope"]
    kinds = {"example": pl.Int32, "layer": pl.Int16} | dict.fromkeys(names, pl.Float64)
    return pl.DataFrame(found, kinds, orient="row")


def _sums(run: Run, documents: np.ndarray) -> Finding:
    """A40: does the contribution of a sum follow the sum of contributions?"""
    rows = run.table("contribution_sums").collect()
    found = correlations(rows)
    place = documents[found["example"].to_numpy()]
    pearson, spearman, slope = (
        mean_by_document(found[name].to_numpy(), place) for name in ("pearson", "spearman", "slope")
    )
    step = rows.with_columns(step=pl.int_range(pl.len()).over("example", "layer"))
    frame = step.group_by("layer", "step").agg(
        pl.col("separate").cast(pl.Float64).mean(), pl.col("together").cast(pl.Float64).mean()
    )
    by_layer = found.group_by("layer").agg(pl.col("pearson").mean(), pl.col("slope").mean()).sort("layer")
    return Finding(
        id="figure-3-contribution-of-sums",
        items=("A39", "A40"),
        title="Helpful neurons together against each alone (Yu Figure 3)",
        says=f"From the least helpful on, the contribution of the sum follows the sum of contributions with Pearson "
        f"{number(pearson)}, Spearman {number(spearman)} and slope {number(slope)}.",
        frame=frame.sort("layer", "step").with_columns(series="layer " + pl.col("layer").cast(pl.String)),
        figure=Figure("line", "separate", "together", "sum of contributions (nats)",
                      "contribution of the sum (nats)", color="series"),
        paper="linear, monotone",
        resampled=_DOCUMENTS,
        notes=tuple(
            f"layer {layer}: Pearson {r:.3f}, slope {b:.2f}" for layer, r, b in by_layer.iter_rows()
        ),
    )  # fmt: skip


def _chosen(told: Told) -> dict[str, np.ndarray]:
    """f64[example, layer] by choice, in layers where all four were made."""
    known = ~np.isnan(told.grid("by_rank")).all(0)
    return {choice: told.grid(f"by_{choice}")[:, known] for choice in CHOICES}


def _table(told: dict[str, Told]) -> Finding:
    """A44: ten neurons chosen in four ways."""
    rows = []
    scores: dict[str, dict[str, Interval]] = {}
    for target, one in told.items():
        scores[target] = {
            choice: mean_by_document(grid.mean(1), one.documents) for choice, grid in _chosen(one).items()
        }
    for choice, label in CHOICES.items():
        null = scores["null"][choice] if "null" in scores else None
        bands = [None] * 3 if null is None else [float(part) for part in null]
        rows.append((label, *(float(part) for part in scores["model"][choice]), *bands))
    names = ["chosen", "value", "low", "high", "null", "null_low", "null_high"]
    best = sorted(CHOICES, key=lambda choice: -float(scores["model"][choice].value))
    more = [f"target {name}: " + ", ".join(f"{CHOICES[c]} {number(found[c])}" for c in CHOICES)
            for name, found in scores.items() if name == "gold"]  # fmt: skip
    layers = next(iter(_chosen(told["model"]).values())).shape[1]
    said = ", ".join(f"{CHOICES[one]} {number(scores['model'][one])}" for one in best)
    return Finding(
        id="table-1-ten-neurons-chosen",
        items=("A44", "A45"),
        title="Ten neurons of a layer, chosen in four ways (Yu Table 1)",
        says=f"Together ten neurons raise log p of the prediction, in nats, chosen {said}.",
        frame=pl.DataFrame(rows, dict(zip(names, [pl.String, *[pl.Float64] * 6], strict=True)), orient="row"),
        figure=Figure("bar", "chosen", "value", "ten neurons chosen", "contribution of their sum (nats)", low="low",
                      high="high", null="null", null_low="null_low", null_high="null_high"),
        paper="contribution 1.75, rank 1.73, m |v| 0.15, m 0.05: contribution >= rank >> m |v| > m",
        null=f"{_NULL}: ten neurons chosen for it raise it, too",
        resampled=_DOCUMENTS,
        notes=(
            f"mean over {layers} layers; inactive neurons are never chosen",
            "rank is that of the token in what the neuron writes, with the sign of its coefficient",
            *more,
        ),
    )  # fmt: skip


def _table_by_layer(told: dict[str, Told]) -> Finding:
    frames = []
    null = told.get("null")
    known = np.flatnonzero(~np.isnan(told["model"].grid("by_rank")).all(0))
    for choice, label in CHOICES.items():
        band = None if null is None else null.mean(f"by_{choice}")
        frame = series(told["model"].mean(f"by_{choice}"), band, chosen=label)
        frames.append(frame.filter(pl.col("layer").is_in(known.tolist())))
    best = told["model"].mean("by_contribution")
    top = int(known[np.nanargmax(best.value[known])])
    return Finding(
        id="table-1-by-layer",
        items=("A44", "A65"),
        title="The same, layer by layer",
        says=f"The contribution of ten neurons chosen by it is largest in layer {top}: {number(best, top)} nats.",
        frame=pl.concat(frames),
        figure=_line("layer", "layer", "contribution of ten neurons (nats)", color="chosen"),
        null=_NULL,
        resampled=_DOCUMENTS,
    )


def _counts(told: dict[str, Told]) -> Finding:
    """A47: how many help, how many do not, and how many it would take."""
    null, main, frames = told.get("null"), told["model"], []
    for what, suffix in (("neurons", ""), ("as concentrated as so many equal ones", "_effective")):
        for side in SIDES:
            name = f"{side}{suffix}"
            band = None if null is None else null.mean(name)
            frames.append(series(main.mean(name), band, side=side, counted=what))
    frames.append(
        series(main.mean("undecided"), None if null is None else null.mean("undecided"), side="undecided",
               counted="neurons")
    )  # fmt: skip
    sides = [main.mean(side) for side in SIDES]
    few = [main.mean(f"{side}_effective") for side in SIDES]
    open_ = share_by_document(main.grid("undecided").sum(1) / main.grid("active").sum(1), main.documents)
    return Finding(
        id="figure-6-helpful-and-unhelpful-neurons",
        items=("A47",),
        title="How many neurons help and how many do not (Yu Figure 6)",
        says=f"In the last layer {number(sides[0], -1, 0)} neurons help and {number(sides[1], -1, 0)} do not, in the "
        f"first {number(sides[0], 0, 0)} and {number(sides[1], 0, 0)}; what they bring is as concentrated as that of "
        f"{number(few[0], -1, 0)} and {number(few[1], -1, 0)} equal ones in the last.",
        frame=pl.concat(frames),
        figure=_line("layer", "layer", "neurons of the layer", color="side", facet="counted", free=True),
        paper="both numbers are large in low layers and small in high ones; with ReLU most neurons are inactive, C = 0",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=(
            f"signs are certified; {percent(open_)} of the active neurons are undecided: their interval holds 0",
            "the second measure is (sum C)^2 / sum C^2 over one side: in a gated model hardly any C is 0, and counts "
            "say little",
        ),
    )


def _ten(told: dict[str, Told]) -> Finding:
    """A48: the ten best together against all together."""
    null, frames = told.get("null"), []
    shares = {side: told["model"].share(f"{side}_top", f"{side}_all") for side in SIDES}
    for side, found in shares.items():
        band = None if null is None else null.share(f"{side}_top", f"{side}_all")
        frames.append(series(found, band, side=side))
    first, last = ({side: percent(shares[side], at) for side in SIDES} for at in (0, -1))
    return Finding(
        id="figure-7-ten-against-all",
        items=("A48", "A65"),
        title="Ten neurons together against all of their side (Yu Figure 7)",
        says=f"The ten most helpful bring {first['helpful']} of what all helpful neurons bring together in layer 0 and "
        f"{last['helpful']} in the last; the ten most unhelpful {first['unhelpful']} and {last['unhelpful']}.",
        frame=pl.concat(frames),
        figure=_line("layer", "layer", "C(ten) / C(all of the side) (%)", color="side", share=True),
        paper="alike in later layers; in the first ones higher for unhelpful neurons; many act together",
        null=_NULL,
        resampled=_DOCUMENTS,
        notes=("a ratio of means, which examples with little to share do not upset",),
    )


def _signs(main: Told) -> Finding:
    """A37: negative coefficients among helpful and unhelpful neurons."""
    shares = {
        side: share_of_sums(main.grid(f"{side}_negative"), main.grid(side), main.documents) for side in SIDES
    }
    overall = {
        side: share_by_document(main.grid(f"{side}_negative").sum(1) / main.grid(side).sum(1).clip(1), main.documents)
        for side in SIDES
    }  # fmt: skip
    return Finding(
        id="negative-coefficients",
        items=("A37",),
        title="Neurons that act upside down",
        says=f"{percent(overall['helpful'])} of helpful and {percent(overall['unhelpful'])} of unhelpful neurons have "
        "a negative coefficient: they raise what their value scores lowest.",
        frame=pl.concat([series(found, side=side) for side, found in shares.items()]),
        figure=_line("layer", "layer", "with m < 0 (%)", color="side", share=True, null=None, null_low=None,
                     null_high=None),
        paper="none: ReLU",
        resampled=_DOCUMENTS,
    )  # fmt: skip
