"""Whole distributions of coefficients, not only their tops: shape, mass at zero, thresholds, the range (A69-A72)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy.stats import norm

from mnemoscope.intervals import Interval, share_by_group
from mnemoscope.neuron.striking import RULE, peaked
from mnemoscope.studies.findings.finding import Figure, Finding, box, line, of_row
from mnemoscope.studies.findings.statistics import BOX, BOXES, ContextTokens, columns, quantiles
from mnemoscope.text.sampling import half

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

NEAR = 0.1  # of the spread: what is called near zero
TO_STD = 1.4826  # of a median absolute deviation, in a normal distribution
COLUMNS = 60  # of an example histogram
PARTS = 10  # of a neuron's range
REACH = 1000  # neurons whose samples are followed down the range
FEWEST = 5  # triggers of the discovery half that a mark is chosen from
RULES = ("> 0", "|m| > 1 % of its largest", "|m| > 10 % of its largest", "|m| > 50 % of its largest")


def findings(run: Run) -> list[Finding]:
    """From `neurons`, `histograms`, `samples`, and their nulls where the run has them."""
    return [
        _examples(run),
        _kurtosis(run),
        _mode(run),
        _boxes(run, "positive-share", ("A16", "A70"), "Share of positive coefficients", pl.col("positive_fraction"),
               "tokens with a coefficient > 0 (%)", "share of tokens with a coefficient above 0", share=True),
        _boxes(run, "reach", ("A72",), "How far neurons reach",
               pl.max_horizontal(-pl.col("min"), pl.col("max")).cast(pl.Float64), "largest |coefficient|",
               "largest |coefficient| of the whole text", log=True),
        _thresholds(run),
        _down_the_range(run),
    ]  # fmt: skip


# -- examples ----------------------------------------------------------------------------------------------------


def _examples(run: Run) -> Finding:
    """A69: the distribution of a few neurons, each chosen for a reason."""
    live = run.table("neurons").filter(pl.col("kurtosis").is_not_null()).collect()
    shaped = peaked(run).select("layer", "neuron").join(live, on=["layer", "neuron"], how="left")
    middle = live.with_columns(off=(pl.col("kurtosis") - pl.col("kurtosis").median()).abs()).sort("off")
    picks = {
        "most peaked": shaped,
        "median kurtosis": middle,
        "least peaked": live.sort("kurtosis"),
        "most skewed to the negative": live.sort("skewness"),
    }
    edges, frames = _edges(run), []
    for reason, ranked in picks.items():
        if ranked.height == 0:
            continue
        neuron = ranked.row(0, named=True)
        counts = np.array(run.rows("histograms", neuron["layer"], neuron["neuron"])["counts"][0].to_list())
        frame = even_columns(counts, edges, neuron["min"], neuron["max"])
        frames.append(
            frame.select(pl.lit(f"L{neuron['layer']}N{neuron['neuron']}: {reason}").alias("neuron"), pl.all())
        )
    return Finding(
        id="example-histograms",
        items=("A69",),
        title="Whole distributions of a few neurons",
        says=f"{_most_peaked(shaped)}; the median of {live.height:,} neurons is {_median(live['kurtosis']):.1f}, "
        f"the least peaked has {live['kurtosis'].to_numpy().min():.2f} (a normal distribution has 0).",
        frame=pl.concat(frames),
        figure=Figure(
            "histogram", "left", "tokens", "coefficient", "tokens (logarithmic)", x2="right", facet="neuron", free=True,
            log_y=True,
        ),
        paper="one neuron of OLMo-7B (L32N2500) over 10,000 sentences: extremely leptokurtic, mostly dormant",
        notes=("chosen from all neurons for the reason given", RULE,
               f"histograms are over {_share(run)} of the contexts"),
    )  # fmt: skip


def _most_peaked(shaped: pl.DataFrame) -> str:
    if shaped.height == 0:
        return "No neuron has more than a few tokens far from its mean"
    best = shaped.row(0, named=True)
    name = f"L{best['layer']}N{best['neuron']}"
    return f"The most peaked neuron, {name}, has an excess kurtosis of {best['kurtosis']:,.0f}"


def _share(run: Run) -> str:
    return f"a random {run.manifest.options.get('histogram_share', 1):.3g}"


def _edges(run: Run) -> np.ndarray:
    return np.array(run.manifest.options["histogram_edges"], float)


def even_columns(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> pl.DataFrame:
    """Bins redrawn as COLUMNS of equal width from low to high; what a bin holds is spread evenly over it."""
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    inner = np.clip(edges, low, high)
    left, right = np.concatenate([[low], inner]), np.concatenate([inner, [high]])
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    # The bins inside the range have positive width, and only those; the mass up to a place is linear in between.
    keep = (right > left) | (counts > 0)
    places = np.concatenate([left[keep], [high]])
    heights = np.concatenate([mass[:-1][keep], [mass[-1]]])
    ends = np.linspace(low, high, COLUMNS + 1)
    tokens = np.diff(np.interp(ends, places, heights))
    return pl.DataFrame({"left": ends[:-1], "right": ends[1:], "tokens": tokens})


def _counts(rows: pl.DataFrame) -> np.ndarray:
    """f64[row, bin]."""
    return rows["counts"].explode().to_numpy().reshape(rows.height, -1).astype(float)


def _median(values: pl.Series) -> float:
    return float(np.median(values.to_numpy()))


# -- by layer ----------------------------------------------------------------------------------------------------


def _kurtosis(run: Run) -> Finding:
    """A70: excess kurtosis by layer, with that of random directions."""
    neurons = run.table("neurons").select("layer", "kurtosis").drop_nulls().collect()
    value, y_title = pl.col("kurtosis"), "excess kurtosis (normal: 0)"
    finding = _boxes(run, "kurtosis", ("A70",), "Excess kurtosis by layer", value, y_title, "", log=True)
    heavy = float((neurons["kurtosis"] > 0).to_numpy().mean())
    middle = _median(neurons["kurtosis"])
    says = (
        f"{heavy:.2%} of {neurons.height:,} neurons have heavier tails than a normal distribution (excess kurtosis "
        f"above 0); the median excess kurtosis is {middle:.2f}{_beside_directions(run, neurons, middle)}."
    )
    more = {"says": says, "paper": "extremely leptokurtic (one neuron of OLMo-7B)"}
    return Finding(**{**finding.__dict__, **more})


def _beside_directions(run: Run, neurons: pl.DataFrame, middle: float) -> str:
    """Medians beside those of random directions, and how many neurons and other directions exceed most of these."""
    if "null_neurons" not in run.manifest.tables:
        return ""
    random = (
        run.table("null_neurons").filter(pl.col("kind") == "random").select("layer", "neuron", "kurtosis")
    )
    units = random.drop_nulls().collect()
    if units.height < 2:
        return ""
    own, null = exceeding(neurons, units)
    usual = _median(units["kurtosis"])
    return (
        f", of {units.height:,} random directions of the same layers {usual:.2f}: {middle / usual:.1f} times; "
        f"{own:.0%} of neurons lie above the 95th percentile of one half of the directions of their layer, and "
        f"{null:.0%} of the other half"
    )


def exceeding(neurons: pl.DataFrame, units: pl.DataFrame) -> tuple[float, float]:
    """Shares of neurons, and of every other direction, above the 95th percentile of the rest of the layer's directions.

    neurons, units  layer, kurtosis; units are numbered by `neuron`, too
    """
    bar = (pl.col("neuron") % 2 == 0).alias("bar")
    limit = units.filter(bar).group_by("layer").agg(limit=pl.col("kurtosis").quantile(0.95))
    shares = [
        float((joined["kurtosis"] > joined["limit"]).to_numpy().mean())
        for joined in (
            units_of.join(limit, on="layer", how="inner") for units_of in (neurons, units.filter(~bar))
        )
    ]
    return shares[0], shares[1]


def _null(run: Run, value: pl.Expr) -> pl.DataFrame | None:
    """Median and 5th to 95th percentile of random directions by layer; None if the run has no nulls."""
    if "null_neurons" not in run.manifest.tables:
        return None
    bands = (
        run.table("null_neurons")
        .filter(pl.col("kind") == "random")
        .group_by("layer")
        .agg(null=value.median(), null_low=value.quantile(0.05), null_high=value.quantile(0.95))
        .sort("layer")
        .collect()
    )
    return bands if bands.height else None


def _boxes(
    run: Run,
    id: str,
    items: tuple[str, ...],
    title: str,
    value: pl.Expr,
    y_title: str,
    quantity: str,
    *,
    share: bool = False,
    log: bool = False,
) -> Finding:
    """Quantiles over the neurons of each layer, with the band of random directions."""
    frame = (
        run.table("neurons")
        .group_by("layer")
        .agg(*quantiles(value), neurons=pl.len())
        .sort("layer")
        .collect()
    )
    nulls = _null(run, value)
    if nulls is not None:
        frame = frame.join(nulls, on="layer", how="left")
    first, last = frame.row(0, named=True), frame.row(-1, named=True)
    written = (lambda x: f"{x:.1%}") if share else (lambda x: f"{x:.3g}")
    chance = (
        ""
        if nulls is None
        else f"; the median random direction has {written(first['null'])} and {written(last['null'])}"
    )
    return Finding(
        id=id,
        items=items,
        title=title,
        says=f"The median over the {first['neurons']:,} neurons of a layer of the {quantity} is "
        f"{written(first['median'])} in layer {first['layer']} and {written(last['median'])} in layer "
        f"{last['layer']}{chance}.",
        frame=frame,
        figure=box(frame, y_title, share=share, log_y=log),
        null=""
        if nulls is None
        else "random directions with the layer's key norms: median, 5th to 95th percentile",
        notes=(BOXES,),
    )


def _mode(run: Run) -> Finding:
    """A70: how much of a distribution lies near zero, compared with a normal one of the same spread.

    The spread is the median absolute deviation: a standard deviation is made by the tails that are in question.
    """
    usual = float(2 * norm.cdf(NEAR) - 1)
    parts = [_near(run, "histograms", "neurons", None)]
    if "null_histograms" in run.manifest.tables:
        parts.append(_near(run, "null_histograms", "null_neurons", "random"))
    frame = parts[0].with_columns(normal=pl.lit(usual))
    chance = ""
    if len(parts) == 2 and parts[1].height:
        nulls = parts[1].select("layer", null="median", null_low="low", null_high="high")
        frame = frame.join(nulls, on="layer", how="left")
        chance = f", and the median random direction {_median(nulls['null']):.0%}"
    band = {} if chance else {"null": "normal"}
    middle = _median(frame["median"])
    return Finding(
        id="mass-near-zero",
        items=("A70", "A72"),
        title="Mass near zero",
        says=f"In the median layer the median neuron has {middle:.0%} of its tokens within {NEAR} of its spread "
        f"(median absolute deviation x {TO_STD}) from zero, where a normal distribution around zero has "
        f"{usual:.0%}{chance}.",
        frame=frame,
        figure=box(frame, f"tokens with |m| < {NEAR} of the spread (%)", share=True, **band),
        paper="mostly dormant",
        null="random directions: median, 5th to 95th percentile"
        if chance
        else f"a normal distribution, {usual:.1%}",
        notes=(
            BOXES,
            "from histograms; what a bin holds is spread evenly over it",
            "by standard deviations, which the tails make, heavy tails alone would put more near zero",
        ),
    )


def _near(run: Run, histograms: str, neurons: str, kind: str | None) -> pl.DataFrame:
    live = run.table(neurons).filter(pl.col("std") > 0)
    all_counts, key = run.table(histograms), ["layer", "neuron"]
    if kind is not None:
        live, all_counts = (frame.filter(pl.col("kind") == kind) for frame in (live, all_counts))
    counts = all_counts.join(live.select(key), on=key, how="semi").collect()
    if counts.height == 0:
        return pl.DataFrame(schema={"layer": pl.Int16, **dict.fromkeys(BOX, pl.Float64)})
    table, edges = _counts(counts), _edges(run)
    spread = TO_STD * deviations(table, edges)
    shares = counts.select("layer").with_columns(
        share=pl.Series(within(table, edges, NEAR * spread)), spread=spread
    )
    return shares.group_by("layer").agg(*quantiles(pl.col("share"))).sort("layer")


def deviations(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """f64[row]: median absolute deviations of counts f64[row, bin], to a thousandth of the innermost bin.

    What a bin holds is spread evenly over it; the outermost bins are open, and end where the next to them would.
    """
    ends = np.concatenate([[2 * edges[0] - edges[1]], edges, [2 * edges[-1] - edges[-2]]])
    mass = (
        np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, 1)], 1)
        / np.maximum(counts.sum(1), 1)[:, None]
    )

    def below(x: np.ndarray) -> np.ndarray:
        place = np.clip(np.searchsorted(ends, x, "right") - 1, 0, len(ends) - 2)
        share = np.clip((x - ends[place]) / (ends[place + 1] - ends[place]), 0, 1)
        left, right = (np.take_along_axis(mass, at[:, None], 1)[:, 0] for at in (place, place + 1))
        return np.asarray(left + share * (right - left))

    def solve(share: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> np.ndarray:
        lows, highs = np.full(len(counts), low), np.full(len(counts), high)
        for _ in range(50):
            middle = (lows + highs) / 2
            enough = share(middle) >= 0.5
            lows, highs = np.where(enough, lows, middle), np.where(enough, middle, highs)
        return highs

    median = solve(below, ends[0], ends[-1])
    return solve(lambda reach: below(median + reach) - below(median - reach), 0.0, ends[-1] - ends[0])


def within(counts: np.ndarray, edges: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """f64[row]: share of counts f64[row, bin] within `reach` f64[row] of zero; bins are taken as even inside.

    The outermost bins are open, and count as beyond.
    """
    left, right = edges[:-1], edges[1:]
    inner = counts[:, 1:-1]
    reach = reach[:, None]
    overlap = np.clip(np.minimum(right, reach) - np.maximum(left, -reach), 0, None) / (right - left)
    return np.asarray((inner * overlap).sum(1) / np.maximum(counts.sum(1), 1))


# -- thresholds --------------------------------------------------------------------------------------------------


def _thresholds(run: Run) -> Finding:
    """A72: how many memories are active depends on what active means."""
    counts = run.table("histograms").collect()
    scale = (
        run.table("neurons").select("layer", "neuron", "tokens", "min", "max", "positive_fraction").collect()
    )
    rows = counts.join(scale, on=["layer", "neuron"], how="left").filter(pl.col("tokens") > 0)
    table = _counts(rows)
    top = np.maximum(-rows["min"].to_numpy(), rows["max"].to_numpy()).astype(float)
    shares = [rows["positive_fraction"].to_numpy()]
    shares += [
        np.where(top > 0, 1 - within(table, _edges(run), least * top), 0.0) for least in (0.01, 0.1, 0.5)
    ]
    frame = pl.concat(
        [
            rows.select("layer")
            .with_columns(rule=pl.lit(rule), share=pl.Series(share))
            .group_by("layer", "rule")
            .agg(pl.col("share").mean())
            .sort("layer")
            for rule, share in zip(RULES, shares, strict=True)
        ]
    )
    means = {rule: float(share.mean()) for rule, share in zip(RULES, shares, strict=True)}
    over = f" x {int(rows['tokens'].max()):,} tokens,"  # type: ignore[arg-type]
    if run.manifest.model.experts:
        over = " at the tokens that were routed to their experts,"
    return Finding(
        id="what-active-means",
        items=("A72", "A16"),
        title="How many memories are active, by what active means",
        says=f"Of {rows.height:,} neurons{over} "
        + ", ".join(f"{share:.1%} are active by the rule {rule}" for rule, share in means.items())
        + ".",
        frame=frame,
        figure=line(frame, "active neurons x tokens (%)", y="share", color="rule", share=True, order=RULES),
        paper="10-50 % active by > 0, after a ReLU",
        notes=(
            "the largest is each neuron's own, over the whole text; a signed coefficient is active either way",
        ),
    )


# -- down the range ----------------------------------------------------------------------------------------------


def _down_the_range(run: Run) -> Finding:
    """A71: is the token that marks a neuron's top triggers still there further down its range, in other documents?"""
    rows = _samples(run)
    share, null = persistence(rows)
    frame = pl.DataFrame(
        {
            "part": np.arange(PARTS) / PARTS + 0.5 / PARTS,
            "samples": np.bincount(rows["part"].to_numpy(), minlength=PARTS),
            **columns(share, "share"),
            "null": null,
        }
    ).with_columns(pl.selectors.float().fill_nan(None))
    known = frame.filter(pl.col("share").is_not_null())
    says = "No neuron has enough triggers in one half of the documents and samples in the other."
    if known.height:
        top, low = known.row(-1, named=True), known.row(0, named=True)
        says = (
            f"For the {rows['cell'].n_unique():,} of {len(run.manifest.model.cells):,} neurons in which one last "
            "token is commonest among the positive triggers of one half of the documents, that token is there in "
            f"{of_row(top)} of {top['samples']:,} samples of the other half from the highest tenth of the neuron's "
            f"range that has any ({_others(top)}), and in {of_row(low)} of {low['samples']:,} from the lowest "
            f"({_others(low)})."
        )
    return Finding(
        id="down-the-range",
        items=("A71",),
        title="What the top shows, further down the range",
        says=says,
        frame=frame,
        figure=line(
            frame,
            "samples with that token (%)",
            x="part",
            y="share",
            x_title="coefficient, as a share of the neuron's largest",
            share=True,
        ),
        null="the same samples with the tokens of the other neurons of the "
        f"{run.manifest.model.cells.together} that were chosen (expectation)",
        resampled="documents of the samples",
        notes=(
            f"token and neurons (at most {REACH:,}) are chosen on documents of the discovery half, with at least "
            f"{FEWEST} triggers there, and asked on those of the test half",
        ),
    )


def _others(row: Mapping[str, Any]) -> str:
    """The null of a part of the range in words; a layer with one such neuron has no other to take a token from."""
    if row["null"] is None:
        return "no layer has another such neuron"
    return f"another of these neurons' tokens in {row['null']:.1%}"


def _samples(run: Run) -> pl.DataFrame:
    """Samples of the test half with a positive coefficient, of neurons that the discovery half marks.

    Columns layer, among (`Cells.among`), cell (which neuron), mark (the token expected), token (found), part, document.
    """
    text = ContextTokens(run)
    cell = run.manifest.model.cells.column()
    ends = run.table("triggers").filter(pl.col("polarity") == 1).select(cell, "context", "position").collect()
    ends_of_half = _with_token(ends, text)
    ends_of_half = ends_of_half.filter(pl.Series(~half(ends_of_half["document"].to_numpy())))
    ends_of_half = ends_of_half.filter(pl.len().over("cell") >= FEWEST)
    known, marks, often = _commonest(ends_of_half, run.manifest.model.vocabulary)
    triggers = np.unique(ends_of_half["cell"].to_numpy(), return_counts=True)[1]
    chosen = np.lexsort((known, -often / np.maximum(triggers, 1)))[:REACH]
    mark = np.full(len(run.manifest.model.cells), -1, np.int64)
    mark[known[chosen]] = marks[chosen]
    top = run.table("neurons").select("max").collect()["max"].to_numpy()
    samples = run.table("samples").filter(pl.col("coefficient") > 0)
    rows = samples.select("layer", cell, "coefficient", "context", "position").collect()
    place = rows["cell"].to_numpy()
    among = run.manifest.model.cells.among(place)
    rows = rows.with_columns(
        mark=pl.Series(mark[place]), max=pl.Series(top[place]), among=pl.Series(among)
    ).filter(pl.col("mark") >= 0)
    tenth = (pl.col("coefficient") / pl.col("max") * PARTS).floor().clip(0, PARTS - 1).cast(pl.Int64)
    asked = _with_token(rows, text).with_columns(part=tenth)
    return asked.filter(pl.Series(half(asked["document"].to_numpy())))


def _commonest(rows: pl.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each cell once, ascending, its commonest token (of several the last) and how often that occurs."""
    key = np.sort(rows["cell"].to_numpy() * size + rows["token"].to_numpy())
    first = np.flatnonzero(np.diff(key, prepend=-1))
    count = np.diff(first, append=len(key))
    cells, start = np.unique(key[first] // size, return_index=True)
    best = np.maximum.reduceat(count * size + key[first] % size, start) if len(cells) else cells
    return cells, best % size, best // size


def _with_token(rows: pl.DataFrame, text: ContextTokens) -> pl.DataFrame:
    place = text.place(rows)
    return rows.with_columns(token=pl.Series(text.tokens[place]), document=pl.Series(text.document[place]))


def persistence(rows: pl.DataFrame) -> tuple[Interval, np.ndarray]:
    """By part of the range, the share of samples with the marking token, and what other neurons' marks give."""
    tenth, token, among = (rows[name].to_numpy() for name in ("part", "token", "among"))
    hits = (rows["mark"] == rows["token"]).to_numpy()
    share = share_by_group(hits.astype(float), tenth, PARTS, rows["document"].to_numpy())
    marks = rows.select("among", "cell", "mark").unique()
    chance = np.full(len(token), np.nan)
    for number in np.unique(among):
        inside = among == number
        others = marks.filter(pl.col("among") == number)["mark"].to_numpy()
        size = int(max(others.max(), token[inside].max())) + 1
        met = np.bincount(others, minlength=size)[token[inside]] - hits[inside]
        if len(others) > 1:
            chance[inside] = met / (len(others) - 1)
    known = ~np.isnan(chance)
    total = np.bincount(tenth[known], minlength=PARTS)
    met = np.bincount(tenth[known], chance[known], PARTS)
    return share, np.where(total > 0, met / np.maximum(total, 1), np.nan)
