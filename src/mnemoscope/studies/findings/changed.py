"""What a step of training changed in each neuron: a finding for the layers, and a table of all neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from mnemoscope.records import NEURON, NeuronId
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings.finding import Finding, line
from mnemoscope.studies.findings.stability import common, median_of, shared_contexts, shares, triggers

_NAMES = {
    "key": "cosine of keys",
    "up": "cosine of second keys",
    "value": "cosine of values",
    "coefficients": "rank correlation of coefficients",
    "triggers": "common triggers",
}
_MOST = 5  # neurons that are named


def findings(names: Sequence[str], runs: Sequence[Run], changes: Sequence[pl.DataFrame]) -> list[Finding]:
    """For each step the medians of every layer, and a row for each neuron.

    changes  of `measures.changes`, from each run to the next
    """
    frames = []
    for number, frame in enumerate(changes):
        step = f"{names[number]} to {names[number + 1]}"
        frames.append(
            _with_triggers(runs[number], runs[number + 1], frame).select(pl.lit(step).alias("step"), pl.all())
        )
    every = pl.concat(frames)
    kinds = [kind for kind in _NAMES if every[kind].null_count() < every.height]
    layers = pl.concat(
        every.group_by("step", "layer", maintain_order=True)
        .agg(
            value=pl.col(kind).median(),
            null=pl.col(f"{kind}_null").median()
            if f"{kind}_null" in every.columns
            else pl.lit(None, pl.Float64),
        )
        .with_columns(measure=pl.lit(_NAMES[kind]))
        for kind in kinds
    )
    return [
        Finding(
            id="neurons-changed",
            items=("A4", "A70"),
            title="What changed in the neurons from each run to the next",
            says=" ".join(_told(rows, kinds) for rows in every.partition_by("step", maintain_order=True)),
            frame=layers,
            figure=line(layers, "median over neurons", color="step", facet="measure"),
            null="each neuron against another one of its layer after the step",
            notes=("coefficients are compared on the same positions of the first run's text",),
        ),
        Finding(
            id="neurons-changed-each",
            items=("A4", "A70"),
            title="Each neuron from each run to the next",
            says=f"{every.height:,} rows: cosines of key and value, rank correlation of coefficients, common triggers.",
            frame=every,
        ),
    ]


def _told(rows: pl.DataFrame, kinds: Sequence[str]) -> str:
    medians = [f"{_NAMES[kind]} {median_of(rows[kind]):.2f}" for kind in kinds]
    least = rows.drop_nulls("value").sort("value", "layer", "neuron").head(_MOST)
    named = [str(NeuronId(layer, neuron)) for layer, neuron in least.select("layer", "neuron").iter_rows()]
    return f"{rows['step'][0]}, in the median neuron: {', '.join(medians)}; values turned most in {', '.join(named)}."


def _with_triggers(one: Run, two: Run, frame: pl.DataFrame) -> pl.DataFrame:
    """With the share of triggers that are common, the mean of both signs; null where a neuron has none."""
    shared, cells = shared_contexts(one, two), one.manifest.model.cells
    first, second = (
        shares(triggers(run, NEURON, cells, shared.texts[number] if shared.enough else None))
        for number, run in enumerate((one, two))
    )
    sides = common(first, second, 2 * len(cells)).reshape(-1, 2)
    known = ~np.isnan(sides)
    mean = np.where(known, sides, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    cell = cells.cell(frame["layer"], frame["neuron"])
    return frame.with_columns(triggers=pl.Series(mean[cell]).fill_nan(None))
