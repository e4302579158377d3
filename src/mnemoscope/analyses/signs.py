"""The signs that a neuron's coefficient takes, and the usual one: the sign at most of its triggers.

With as many triggers of either sign, the usual one is the sign whose weakest stored trigger is the stronger; of two
that are alike, +.
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


def taken_signs(run: Run, layer: int | None = None) -> pl.LazyFrame:
    """layer, neuron, sign (+1 or -1), usual (bool): every sign of which a neuron has a trigger."""
    triggers = run.table("triggers")
    if layer is not None:
        triggers = triggers.filter(pl.col("layer") == layer)
    signs = triggers.select(*_NEURON, sign="polarity").unique()
    return signs.join(usual_signs(run, layer), on=_NEURON).select(
        *_NEURON, "sign", usual=pl.col("usual") == pl.col("sign")
    )
