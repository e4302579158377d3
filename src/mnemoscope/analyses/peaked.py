"""The most peaked neurons: the largest excess kurtosis that more than a few outliers make.

One token far out among n gives a kurtosis of about n, which is no shape. So a neuron counts as peaked if at least
`LEAST` of its triggers of one sign, each of another context, lie further than `FAR` standard deviations from its mean.
Every place that ranks neurons by how peaked they are asks here, and prints `RULE` or a part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from mnemoscope.store import Run

LEAST = 10
FAR = 5.0
RULE = (
    f"most peaked: the largest excess kurtosis among neurons with {LEAST} triggers of one sign further than {FAR:g} "
    "standard deviations from their mean (a single outlier makes a large kurtosis too)"
)
_NEURON = ["layer", "neuron"]


def peaked(run: Run, layer: int | None = None) -> pl.DataFrame:
    """layer, neuron, kurtosis of the neurons that count as peaked, in one layer or in all; most peaked first.

    A run that keeps fewer triggers than `LEAST` is asked for all that it keeps.
    """
    least = min(LEAST, int(run.manifest.options.get("top", LEAST)))
    neurons, triggers = run.table("neurons"), run.table("triggers")
    if layer is not None:
        neurons, triggers = (table.filter(pl.col("layer") == layer) for table in (neurons, triggers))
    weakest = triggers.filter(pl.col("rank") == least - 1).select(*_NEURON, "coefficient", "polarity")
    distance = (pl.col("coefficient").cast(pl.Float64) - pl.col("mean")) * pl.col("polarity")
    return (
        neurons.select(*_NEURON, "mean", "std", "kurtosis")
        .join(weakest, on=_NEURON, how="inner")
        .filter(pl.col("kurtosis").is_not_null() & (distance > FAR * pl.col("std")))
        .select(*_NEURON, "kurtosis")
        .unique(_NEURON)
        .sort("kurtosis", *_NEURON, descending=[True, False, False])
        .collect()
    )
