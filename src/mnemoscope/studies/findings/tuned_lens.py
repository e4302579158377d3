"""How near each layer's residual is to the model's output, under the raw, own and tuned lens (A21, A22).

The tuned lens was fitted on the discovery half of the documents; everything here is of prefixes of the test half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, mean_by_document, share_by_document
from mnemoscope.studies.findings.finding import Finding, line
from mnemoscope.studies.findings.statistics import ExampleGrid, contrast, number, percent, points, series

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LENSES = ("tuned", "own", "raw")
_ORDER = tuple(f"{lens} lens" for lens in LENSES)
_PARTNER = "the same reading, asked for what the model predicts after another prefix of another document"
_RESAMPLED = "documents"
_FITTED = "the tuned lens is an affine map a layer, fitted on other documents to read the model's output"


def findings(run: Run) -> list[Finding]:
    """From the table `lens_readings`."""
    rows = run.table("lens_readings").collect()
    examples = rows.select("example", "document").unique("example").sort("example")
    grids = {
        lens: ExampleGrid(lens, rows.filter(pl.col("lens") == lens).sort("example", "layer"), examples)
        for lens in (*LENSES, "constant")
    }
    return [_divergence(grids), _first(grids), _probability(grids)]


def _size(grid: ExampleGrid) -> str:
    return f"{grid.examples.height:,} prefixes of {len(np.unique(grid.documents)):,} test documents"


def _divergence(grids: dict[str, ExampleGrid]) -> Finding:
    """A21: how many nats each reading is from the output, and what tuning gains."""
    own, tuned, constant = grids["own"], grids["tuned"], grids["constant"]
    mean = {lens: grids[lens].mean("divergence") for lens in LENSES}
    baseline = constant.mean("divergence")
    band = Interval(*(np.repeat(end, own.count) for end in tuple(baseline)[:3]))
    frame = pl.concat([series(mean[lens], band, lens=f"{lens} lens") for lens in LENSES])
    middle = own.count // 2
    gain = mean_by_document((own["divergence"] - tuned["divergence"]).mean(1), own.documents)
    return Finding(
        id="lens-divergence",
        items=("A21", "A22"),
        title="How far each residual's reading is from the model's output",
        says=f"The residual before the feed-forward layer of layer {middle} of {own.count} is, read by the own lens, "
        f"{number(mean['own'], middle)} nats from the model's output, and by the tuned lens "
        f"{number(mean['tuned'], middle)}; over all layers the tuned lens is nearer by {number(gain)} nats "
        f"({_size(own)}; the mean output of the fitted text, whatever the prefix, is {number(baseline, 0)} away).",
        frame=frame,
        figure=line(
            frame, "divergence from the model's output (nats)", color="lens", order=_ORDER, log_y=True
        ),
        null="the mean output of the fitted text, read off without looking at the prefix",
        resampled=_RESAMPLED,
        notes=(_FITTED, "Kullback-Leibler divergence of a reading from the output, mean over prefixes"),
        contrasts=(contrast("gain", gain),),
    )


def _first(grids: dict[str, ExampleGrid]) -> Finding:
    """A21: how often the reading says first what the model will say."""
    frames = []
    for lens in LENSES:
        grid = grids[lens]
        null = grid["null_rank"]
        chance = share_by_document(np.where(np.isnan(null), np.nan, null == 0), grid.documents)
        frames.append(series(grid.share(grid["rank"] == 0), chance, lens=f"{lens} lens"))
    own, tuned = grids["own"], grids["tuned"]
    last = own.count - 1
    difference = mean_by_document(
        (tuned["rank"] == 0).astype(float) - (own["rank"] == 0).astype(float), own.documents
    )
    half = {lens: _half(grids[lens]) for lens in ("own", "tuned")}
    frame = pl.concat(frames)
    return Finding(
        id="lens-first",
        items=("A21",),
        title="From where on the residual says what the model will say",
        says=f"Before the last feed-forward layer, layer {last}, the model's prediction is already first in "
        f"{percent(own.share(own['rank'] == 0), last)} of prefixes under the own lens and in "
        f"{percent(tuned.share(tuned['rank'] == 0), last)} under the tuned lens (difference "
        f"{points(difference, last)}); it is so in half of them from {half['own']} under the own lens and from "
        f"{half['tuned']} under the tuned lens ({_size(own)}).",
        frame=frame,
        figure=line(frame, "prefixes whose prediction is first (%)", color="lens", share=True, order=_ORDER),
        paper="with the raw lens: about a third in the lower half of 16 layers, then rising",
        null=_PARTNER,
        resampled=_RESAMPLED,
        notes=(_FITTED,),
        contrasts=(contrast("last layer", difference, last),),
    )


def _half(grid: ExampleGrid) -> str:
    """The layer from which on at least half of the examples have it first."""
    share = (grid["rank"] == 0).mean(0)
    stays = np.logical_and.accumulate((share >= 0.5)[::-1])[::-1]
    return f"layer {int(np.argmax(stays))} on" if stays.any() else "the output on only"


def _probability(grids: dict[str, ExampleGrid]) -> Finding:
    """A22: how probable each reading finds what the model will say."""
    frames = []
    for lens in LENSES:
        grid = grids[lens]
        frames.append(series(grid.mean("probability"), grid.mean("null_probability"), lens=f"{lens} lens"))
    own, tuned = grids["own"], grids["tuned"]
    middle = own.count // 2
    frame = pl.concat(frames)
    return Finding(
        id="lens-probability",
        items=("A22",),
        title="How probable each residual's reading finds what the model will say",
        says=f"Before the feed-forward layer of layer {middle} of {own.count} the model's prediction has a mean "
        f"probability of {number(own.mean('probability'), middle)} under the own lens and of "
        f"{number(tuned.mean('probability'), middle)} under the tuned lens ({_size(own)}).",
        frame=frame,
        figure=line(frame, "probability", color="lens", order=_ORDER),
        paper="with the raw lens, medians: about 0 in layers 1-7 of 16, 0.6-0.8 in layers 14-16",
        null=_PARTNER,
        resampled=_RESAMPLED,
        notes=(_FITTED,),
    )
