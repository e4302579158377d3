"""Where the token that follows stands in a value's ranking, and how sure a value must be to be right (A12, A13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import wilson
from mnemoscope.studies.findings.finding import Figure, Finding, chance

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BINS = 10  # of equally many values
_TARGETS = {"rank": "next token", "last_rank": "last token", "permuted_rank": "next token of another neuron"}
_LEVELS = {"low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "high": 0.95}
_PAPER_EDGES = (8.9e-5, 1.3e-4, 1.8e-4, 2.2e-4, 2.7e-4, 3.1e-4, 3.6e-4, 4e-4)


def findings(run: Run) -> list[Finding]:
    """From the table `value_ranks`."""
    rows = run.table("value_ranks").collect()
    return [_ranks(run, rows), _probability(rows), _sure(rows)]


def _ranks(run: Run, rows: pl.DataFrame) -> Finding:
    """A12: ranks of the next token, with those of a next token dealt out anew."""
    quantiles = [pl.col("rank").quantile(level, "lower").alias(name) for name, level in _LEVELS.items()]
    null = [
        pl.col("permuted_rank").quantile(level, "lower").alias(name)
        for name, level in {"null": 0.5, "null_low": 0.25, "null_high": 0.75}.items()
    ]
    other = pl.col("other_rank").median().alias("other_layer_median")
    last = pl.col("last_rank").median().alias("last_token_median")
    frame = (
        rows.group_by("polarity", "layer")
        .agg(*quantiles, *null, other, last, values=pl.len())
        .sort("polarity", "layer", descending=[True, False])
        .with_columns(polarity=_side())
    )
    mine = frame.filter(pl.col("polarity") == frame["polarity"][0])
    low, high = mine.row(0, named=True), mine.row(-1, named=True)
    return Finding(
        id="figure-5-rank",
        items=("A12",),
        title="Rank of the next token under the value (Geva Figure 5)",
        says=f"The token after the strongest trigger has a median rank of {low['median']:,.0f} of "
        f"{run.manifest.model.vocabulary:,} under the value in layer {low['layer']} and {high['median']:,.0f} in "
        "layer "
        f"{high['layer']}; the next token of another neuron's trigger has {low['null']:,.0f} and "
        f"{high['null']:,.0f}.",
        frame=frame,
        figure=Figure(
            "box", "layer", "median", "layer", "rank of the next token (0 is first)", low="quarter",
            high="three_quarters", whisker_low="low", whisker_high="high", null="null", null_low="null_low",
            null_high="null_high", facet="polarity", log_y=True,
        ),
        paper="medians about 10,000-15,000 of 267,744 in layers 1-7, 0-2,000 in layers 14-16",
        null="next tokens dealt out anew among the neurons of the layer: median and quartiles",
        notes=(
            "boxes: quartiles over neurons; whiskers: 5th to 95th percentile",
            "the table also has the medians for the trigger's last token and for triggers of another layer",
        ),
    )  # fmt: skip


def _side() -> pl.Expr:
    return pl.when(pl.col("polarity") > 0).then(pl.lit("largest coefficients")).otherwise(
        pl.lit("most negative coefficients")
    )  # fmt: skip


def _probability(rows: pl.DataFrame) -> Finding:
    """A13: agreement by how probable the value's first token is, in bins of equally many values."""
    agree = rows.select("polarity", "top_probability", "permuted_rank", hit=pl.col("rank") == 0)
    place = (pl.col("top_probability").rank("ordinal") - 1) * BINS // pl.len()
    frame = _binned(agree.with_columns(bin=place))
    first, last = frame.row(0, named=True), frame.row(-1, named=True)
    return Finding(
        id="figure-6-confidence",
        items=("A13",),
        title="Are confident values right? (Geva Figure 6)",
        says=f"Of the tenth of the values with the most probable first token (median {chance(last['probability'])}) "
        f"{last['share']:.1%} [{last['low']:.1%}, {last['high']:.1%}] agree with the next token, of the least "
        "confident tenth "
        f"{first['share']:.1%} [{first['low']:.1%}, {first['high']:.1%}].",
        frame=frame,
        figure=Figure(
            "line", "probability", "share", "probability of the value's first token (median of the bin)",
            "values that agree (%)", low="low", high="high", null="null", share=True, log_x=True,
        ),
        paper="near 0 at 8.9e-5, about 95 % above 4e-4, with a vocabulary of 267,744",
        null="next tokens dealt out anew among the neurons of the layer",
        resampled="values (Wilson)",
        notes=("both signs of the coefficient together, each value read with it",),
    )  # fmt: skip


def _sure(rows: pl.DataFrame) -> Finding:
    """A13 with the paper's own bins."""
    edges = np.array(_PAPER_EDGES)
    place = np.searchsorted(edges, rows["top_probability"].to_numpy(), "right")
    names = [f"below {chance(edges[0])}", *(f"from {chance(edge)}" for edge in edges)]
    frame = _binned(rows.with_columns(hit=pl.col("rank") == 0, bin=pl.Series(place)))
    frame = frame.with_columns(bin=pl.Series([names[int(one)] for one in frame["bin"]]))
    top = frame.row(-1, named=True)
    return Finding(
        id="figure-6-absolute-bins",
        items=("A13",),
        title="The same in the paper's bins",
        says=f"{top['values']:,} of {rows.height:,} values fall into the bin {top['bin']!r}, where "
        f"{top['share']:.1%} agree: "
        "absolute bins mean little for another vocabulary and another lens.",
        frame=frame,
        figure=Figure(
            "bar", "bin", "share", "probability of the value's first token", "values that agree (%)", low="low",
            high="high", null="null", share=True,
        ),
        paper="near 0 in the first bin, about 95 % in the last",
        null="next tokens dealt out anew among the neurons of the layer",
        resampled="values (Wilson)",
    )  # fmt: skip


def _binned(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a bin: median probability, how many values, and how many of them agree."""
    frame = (
        rows.group_by("bin")
        .agg(
            probability=pl.col("top_probability").median(),
            values=pl.len(),
            hits=pl.col("hit").sum(),
            null=(pl.col("permuted_rank") == 0).mean(),
        )
        .sort("bin")
    )
    share = wilson(frame["hits"].to_numpy(), frame["values"].to_numpy())
    return frame.with_columns(
        share=pl.Series(share.value), low=pl.Series(share.low), high=pl.Series(share.high)
    )
