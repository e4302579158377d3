"""Figures of several runs in their order (checkpoints of a training): the middle of each, run by run."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from mnemoscope.studies.findings.finding import Finding, line

_READ = ("line", "bar", "box", "stack")  # kinds of figures whose y is a number of the run


def timeline(
    name: str, title: str, names: Sequence[str], found: Sequence[Sequence[Finding]]
) -> Finding | None:
    """The mean over the points of each figure of a measurement, a panel for each; None where no figure has one.

    name, title  of the measurement
    found        the findings of each run, in order; figures that not all of them have are left out
    """
    lists = [{finding.id: finding for finding in of_run} for of_run in found]
    shared = [first for first in found[0] if all(first.id in of_run for of_run in lists)]
    frames = [
        _values(first.title, run, name, of_run[first.id])
        for first in shared
        for run, (name, of_run) in enumerate(zip(names, lists, strict=True))
        if first.figure is not None and first.figure.kind in _READ
    ]
    rows = pl.concat(frames).drop_nulls("value") if frames else pl.DataFrame()
    if not rows.height:
        return None
    told = [
        f"{figure}{_series(series)}: {', '.join(f'{value:.3g}' for value in values)}"
        for figure, series, values in rows.group_by("figure", "series", maintain_order=True)
        .agg("value")
        .iter_rows()
    ]
    return Finding(
        id=f"timeline-{name.replace('_', '-')}",
        items=tuple(dict.fromkeys(item for first in shared for item in first.items)),
        title=f"{title}, run by run",
        says=f"Means over the points of each figure in {', '.join(names)}, in this order. {'; '.join(told)}.",
        frame=rows,
        figure=line(
            rows, "mean of the figure", x="run", x_title="run, in the order given", color="series", facet="figure",
            free=True,
        ),
        notes=("a mean over points says whether a figure moved, and not where: that is in the panels above",),
    )  # fmt: skip


def _series(series: str) -> str:
    return f" ({series})" if series else ""


def _values(title: str, run: int, name: str, finding: Finding) -> pl.DataFrame:
    """The mean of y of each series of a figure, in one run."""
    assert finding.figure is not None
    labels = [
        pl.col(column).cast(pl.String) for column in (finding.figure.facet, finding.figure.color) if column
    ]
    series = pl.concat_str(labels, separator=" \u00b7 ") if labels else pl.lit("")
    value = pl.col(finding.figure.y).cast(pl.Float64).fill_nan(None).mean()
    rows = finding.frame.group_by(series.alias("series"), maintain_order=True).agg(value=value)
    return rows.select(
        figure=pl.lit(title), series="series", run=pl.lit(run, pl.Int32), name=pl.lit(name), value="value"
    )
