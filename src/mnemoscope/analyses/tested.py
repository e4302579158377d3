"""The neurons whose tested pattern has a verdict, clearest first: one order for `patterns`, `find --tested` and cards.

Clearest is the largest lower end of the interval of F1: a figure that few documents or a common pattern cannot win.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from mnemoscope.patterns.twoway import NONE
from mnemoscope.records import NEURON, NEXT, POSITION

if TYPE_CHECKING:
    from mnemoscope.store import Run

ORDER = "clearest first: by the lower end of the interval of F1"
ABOUT = {NEXT: "the next token", POSITION: "the position"}  # else the text up to the token
_CLAIM = ["layer", "neuron", "polarity", "spec"]


def tested(run: Run, layer: int | None = None) -> pl.DataFrame:
    """Rows of `pattern_tests` (without curves) of neurons with a verdict, in one layer or in all, clearest first.

    What triggers and the whole distribution both say of a neuron is there once. `QueryError` if the run has no
    patterns.
    """
    table = run.table("pattern_tests")
    if layer is not None:
        table = table.filter(pl.col("layer") == layer)
    ends = [f"{side}{end}" for side in ("purity", "coverage", "f1") for end in ("", "_low", "_high")]
    return (
        table.filter((pl.col("unit") == NEURON) & (pl.col("verdict") != NONE))
        .select(*_CLAIM, "tests", "name", "verdict", *ends, "active", "present")
        .sort("f1_low", *_CLAIM, descending=[True, *([False] * len(_CLAIM))], nulls_last=True)
        .with_columns(about=pl.col("tests").replace_strict(ABOUT, default="the text so far"))
        .unique([*_CLAIM, "about"], keep="first", maintain_order=True)
        .collect()
    )
