"""The tables of the refinement measurement as grids over examples and layers, and rows of figures over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.analyses.study.resample import share_by_document
from mnemoscope.intervals import Interval

if TYPE_CHECKING:
    from mnemoscope.store import Run


@dataclass(frozen=True)
class Layers:
    """What was measured of one unit (`model`, `shuffled`) under one lens.

    rows      of `refinement`, by example and layer
    examples  of `refinement_examples`
    """

    lens: str
    rows: pl.DataFrame
    examples: pl.DataFrame

    @property
    def documents(self) -> np.ndarray:
        """i64[example]"""
        return self.examples["document"].to_numpy()

    @property
    def count(self) -> int:
        """How many layers there are."""
        return self.rows.height // max(self.examples.height, 1)

    def grid(self, name: str) -> np.ndarray:
        """f64[example, layer] of a column; NaN where it is null."""
        values = self.rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        return values.reshape(self.examples.height, self.count)

    def known(self) -> np.ndarray:
        """bool[example, 1]: it has a partner."""
        return self.examples["partner"].is_not_null().to_numpy()[:, None]

    def partners(self, values: np.ndarray) -> np.ndarray:
        """An array [example, ...] with the rows of the partners; an example alone is its own."""
        first = self.examples["example"].to_numpy()
        partner = self.examples["partner"].fill_null(self.examples["example"]).to_numpy()
        return values[np.searchsorted(first, partner)]

    def share(self, hits: np.ndarray, among: np.ndarray | None = None) -> Interval:
        """f64[layer]: how many examples of a layer hit, of those asked for, resampled by document."""
        asked = np.ones_like(hits, float) if among is None else np.where(among, 1.0, np.nan)
        return share_by_document(np.where(np.isnan(asked), np.nan, hits), self.documents)

    def overall(self, hits: np.ndarray, among: np.ndarray | None = None) -> Interval:
        """The same over all layers at once."""
        asked = np.ones_like(hits, bool) if among is None else among
        flat = np.where(asked, hits, np.nan).reshape(-1)
        return share_by_document(flat, np.repeat(self.documents, hits.shape[1]))


def load(run: Run) -> dict[tuple[str, str], Layers]:
    """By unit and lens, in the order of the table; `QueryError` when the run has not been measured."""
    rows = run.table("refinement").collect()
    examples = run.table("refinement_examples").collect()
    return {
        (unit, lens): Layers(
            lens, rows.filter(unit=unit, lens=lens), examples.filter(unit=unit).sort("example")
        )
        for unit, lens in rows.select("unit", "lens").unique(maintain_order=True).iter_rows()
    }


def series(found: Interval, null: Interval | None = None, **labels: str) -> pl.DataFrame:
    """Rows of a figure: layer, labels, value, low, high, and the null with its band (null where there is none)."""
    columns = {"value": found.value, "low": found.low, "high": found.high}
    blank = np.full(len(found.value), np.nan)
    band = null or Interval(blank, blank, blank)
    columns |= {"null": band.value, "null_low": band.low, "null_high": band.high}
    frame = pl.DataFrame({"layer": np.arange(len(found.value)), **columns})
    return frame.select(
        "layer", *(pl.lit(text).alias(name) for name, text in labels.items()), *columns
    ).fill_nan(None)


def percent(found: Interval, at: int | None = None) -> str:
    """`12.3 % [11.0, 13.9]` of a share."""
    value, low, high = (100 * float(part if at is None else part[at]) for part in found)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]" if not np.isnan(value) else "no example"


def number(found: Interval, at: int | None = None) -> str:
    """`1.23 [1.10, 1.37]` of anything else."""
    value, low, high = (float(part if at is None else part[at]) for part in found)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
