"""The usual sign of a neuron: the sign of the coefficient at most of its triggers.

With as many of either sign it is the sign whose weakest stored trigger is the stronger; of two that are alike, +.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from mnemoscope.store import Run

_NEURON = ["layer", "neuron"]


def usual_signs(run: Run, layer: int | None = None) -> pl.LazyFrame:
    """layer, neuron, usual (+1 or -1) of every neuron of one layer or of all; +1 without triggers."""
    neurons, triggers = run.table("neurons"), run.table("triggers")
    if layer is not None:
        neurons, triggers = (table.filter(pl.col("layer") == layer) for table in (neurons, triggers))
    sides = triggers.group_by(*_NEURON, "polarity").agg(
        stored=pl.len(), weakest=pl.col("coefficient").abs().min()
    )
    usual = (
        sides.sort("stored", "weakest", "polarity", descending=True)
        .unique(_NEURON, keep="first", maintain_order=True)
        .select(*_NEURON, usual="polarity")
    )
    return (
        neurons.select(_NEURON).join(usual, on=_NEURON, how="left").with_columns(pl.col("usual").fill_null(1))
    )
