"""Where the token that follows stands in a value's ranking, and how sure a value must be to be right (A12, A13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import wilson
from mnemoscope.studies.findings.finding import Finding, bar, box, chance, line, of_row
from mnemoscope.studies.findings.statistics import BOXES, as_series, quantiles

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BINS = 10  # of equally many values
_TARGETS = {"rank": "next token", "last_rank": "last token", "permuted_rank": "next token of another neuron"}
_PAPER_EDGES = (8.9e-5, 1.3e-4, 1.8e-4, 2.2e-4, 2.7e-4, 3.1e-4, 3.6e-4, 4e-4)


def findings(run: Run) -> list[Finding]:
    """From the table `value_ranks`."""
    rows = run.table("value_ranks").collect()
    return [_ranks(run, rows), _probability(rows), _sure(rows)]


def _ranks(run: Run, rows: pl.DataFrame) -> Finding:
    """A12: ranks of the next token, with those of a next token dealt out anew."""
    null = quantiles(pl.col("permuted_rank"), {"null": 0.5, "null_low": 0.25, "null_high": 0.75}, "lower")
    other = pl.col("other_rank").median().alias("other_layer_median")
    last = pl.col("last_rank").median().alias("last_token_median")
    frame = (
        rows.group_by("polarity", "layer")
        .agg(*quantiles(pl.col("rank"), kind="lower"), *null, other, last, values=pl.len())
        .sort("polarity", "layer", descending=[True, False])
        .with_columns(polarity=_side())
    )
    largest = frame.filter(pl.col("polarity") == frame["polarity"][0])
    low, high = largest.row(0, named=True), largest.row(-1, named=True)
    return Finding(
        id="figure-5-rank",
        items=("A12",),
        title="Rank of the next token under the value (Geva Figure 5)",
        says=f"The token after the strongest trigger has a median rank of {low['median']:,.0f} of "
        f"{run.manifest.model.vocabulary:,} under the value in layer {low['layer']} and {high['median']:,.0f} in "
        f"layer {high['layer']}; the next token of another neuron's trigger has {low['null']:,.0f} and "
        f"{high['null']:,.0f}.",
        frame=frame,
        figure=box(frame, "rank of the next token (0 is first)", facet="polarity", log_y=True),
        paper="medians about 10,000-15,000 of 267,744 in layers 1-7, 0-2,000 in layers 14-16",
        null="next tokens dealt out anew among the neurons of the layer: median and quartiles",
        notes=(
            BOXES,
            "the table also has the medians for the trigger's last token and for triggers of another layer",
        ),
    )


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
        f"{of_row(last)} agree with the next token, of the least "
        f"confident tenth {of_row(first)}.",
        frame=frame,
        figure=line(
            frame,
            "values that agree (%)",
            x="probability",
            y="share",
            x_title="probability of the value's first token (median of the bin)",
            share=True,
            log_x=True,
        ),
        paper="near 0 at 8.9e-5, about 95 % above 4e-4, with a vocabulary of 267,744",
        null="next tokens dealt out anew among the neurons of the layer",
        resampled="values (Wilson)",
        notes=("both signs of the coefficient together, each value read with it",),
    )


def _sure(rows: pl.DataFrame) -> Finding:
    """A13 with the paper's own bins."""
    edges = np.array(_PAPER_EDGES)
    place = np.searchsorted(edges, rows["top_probability"].to_numpy(), "right")
    names = [f"below {chance(edges[0])}", *(f"from {chance(edge)}" for edge in edges)]
    frame = _binned(rows.with_columns(hit=pl.col("rank") == 0, bin=pl.Series(place)))
    frame = frame.with_columns(bin=pl.Series([names[int(number)] for number in frame["bin"]]))
    top = frame.row(-1, named=True)
    return Finding(
        id="figure-6-absolute-bins",
        items=("A13",),
        title="The same in the paper's bins",
        says=f"{top['values']:,} of {rows.height:,} values fall into the bin {top['bin']!r}, where "
        f"{top['share']:.1%} agree: "
        "absolute bins mean little for another vocabulary and another lens.",
        frame=frame,
        figure=bar(
            frame,
            "values that agree (%)",
            x="bin",
            y="share",
            x_title="probability of the value's first token",
            share=True,
        ),
        paper="near 0 in the first bin, about 95 % in the last",
        null="next tokens dealt out anew among the neurons of the layer",
        resampled="values (Wilson)",
    )


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
    return frame.with_columns(**as_series(share, "share"))
