"""Where the token that follows stands in a value's ranking, and how sure a value must be to be right (A12, A13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, quantile_by_document, share_by_group
from mnemoscope.studies.findings.finding import Finding, bar, box, chance, line, of_row
from mnemoscope.studies.findings.statistics import BOXES, columns, contrast, number, quantiles

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BINS = 10  # of equally many values
_KEY = ["layer", "neuron", "polarity"]
_BY_DOCUMENT = "documents of the triggers"
_TARGETS = {"rank": "next token", "last_rank": "last token", "permuted_rank": "next token of another neuron"}
_PAPER_EDGES = (8.9e-5, 1.3e-4, 1.8e-4, 2.2e-4, 2.7e-4, 3.1e-4, 3.6e-4, 4e-4)


def findings(run: Run) -> list[Finding]:
    """From the table `value_ranks`."""
    rows = with_documents(run, run.table("value_ranks").collect())
    return [_ranks(run, rows), _probability(rows), _sure(rows)]


def with_documents(run: Run, rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with the document of each strongest trigger."""
    strongest = run.table("triggers").filter(pl.col("rank") == 0).select(*_KEY, "context").collect()
    texts = run.table("contexts").select("context", "document").collect()
    return rows.join(strongest, on=_KEY, how="left", maintain_order="left").join(
        texts, on="context", how="left", maintain_order="left"
    )


def medians(rows: pl.DataFrame) -> Interval:
    """f64[3]: the median rank, that of a dealt out next token, and the difference; by document of the trigger."""
    ranks = rows.select("rank", "permuted_rank").to_numpy().astype(float)
    return quantile_by_document(
        ranks,
        rows["document"].to_numpy(),
        (0.5,),
        of=lambda middle: np.append(middle[0], middle[0, 0] - middle[0, 1]),
    )


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
    keys = rows.select("polarity", "layer").unique().sort("polarity", "layer", descending=[True, False])
    middles = [medians(rows.filter(polarity=side, layer=layer)) for side, layer in keys.iter_rows()]
    ends = {
        f"{name}_{end}": pl.Series([getattr(middle, end)[place] for middle in middles]).fill_nan(None)
        for name, place in (("median", 0), ("difference", 2))
        for end in ("value", "low", "high")
        if (name, end) != ("median", "value")
    }
    documents = pl.Series([0 if middle.n is None else int(middle.n[0]) for middle in middles])
    frame = frame.with_columns(**ends, n=documents).rename({"difference_value": "difference"})
    sides = dict(zip(frame.select("polarity", "layer").iter_rows(), middles, strict=True))
    largest = frame.filter(pl.col("polarity") == frame["polarity"][0])
    said = []
    for row in (largest.row(0, named=True), largest.row(-1, named=True)):
        middle = sides[row["polarity"], row["layer"]]
        said.append(
            f"{number(middle, 0, ',.0f')} in layer {row['layer']}, where the next token of another neuron's trigger "
            f"has {middle.value[1]:,.0f}: a difference of {number(middle, 2, '+,.0f')} over {row['values']:,} neurons"
        )
    return Finding(
        id="figure-5-rank",
        items=("A12",),
        title="Rank of the next token under the value (Geva Figure 5)",
        says=f"Among {run.manifest.model.vocabulary:,} tokens, the one after a neuron's strongest trigger has a median "
        f"rank under its value of {said[0]}, and of {said[1]} (by document; largest coefficients).",
        frame=frame,
        figure=box(frame, "rank of the next token (0 is first)", facet="polarity", log_y=True),
        paper="medians about 10,000-15,000 of 267,744 in layers 1-7, 0-2,000 in layers 14-16",
        null="next tokens dealt out anew among the neurons of the layer: median and quartiles",
        resampled=_BY_DOCUMENT,
        notes=(
            BOXES,
            "the table also has the medians for the trigger's last token and for triggers of another layer",
        ),
        contrasts=() if middle.n is None else (contrast("last layer", middle, 2),),
    )


def _side() -> pl.Expr:
    return pl.when(pl.col("polarity") > 0).then(pl.lit("largest coefficients")).otherwise(
        pl.lit("most negative coefficients")
    )  # fmt: skip


def _probability(rows: pl.DataFrame) -> Finding:
    """A13: agreement by how probable the value's first token is, in bins of equally many values."""
    agree = rows.select("polarity", "top_probability", "permuted_rank", "document", hit=pl.col("rank") == 0)
    place = (pl.col("top_probability").rank("ordinal") - 1) * BINS // pl.len()
    frame = _binned(agree.with_columns(bin=place))
    first, last = frame.row(0, named=True), frame.row(-1, named=True)
    return Finding(
        id="figure-6-confidence",
        items=("A13",),
        title="Are confident values right? (Geva Figure 6)",
        says=f"Of the tenth of {rows.height:,} values (both signs, all layers) with the most probable first token "
        f"(median {chance(last['probability'])}) {of_row(last)} write first what follows their strongest trigger, "
        f"with next tokens dealt out anew {last['null']:.2%}; of the least confident tenth {of_row(first)} and "
        f"{first['null']:.2%}.",
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
        resampled=_BY_DOCUMENT,
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
        f"{of_row(top)} write first what follows their strongest trigger, with next tokens dealt out anew "
        f"{top['null']:.2%}: absolute bins mean little for another vocabulary and another lens.",
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
        resampled=_BY_DOCUMENT,
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
    count = int(frame["bin"].max()) + 1  # type: ignore[arg-type]
    share = share_by_group(
        rows["hit"].to_numpy().astype(float),
        rows["bin"].to_numpy().astype(np.int64),
        count,
        rows["document"].to_numpy(),
    )
    figures = pl.DataFrame({"bin": np.arange(count), **columns(share, "share")})
    return frame.join(figures.cast({"bin": frame.schema["bin"]}), on="bin", how="left", maintain_order="left")
