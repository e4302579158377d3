"""What findings are counted from: tokens in one array, tables as grids over examples, and rows of figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, mean_by_document, ratio_of_sums, share_by_document, share_of_sums
from mnemoscope.studies.findings.finding import bracketed

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run


class ContextTokens:
    """The tokens of all contexts as one array, and for each the document and where its context ends."""

    def __init__(self, run: Run) -> None:
        contexts = run.table("contexts").select("context", "document", "tokens").collect()
        sizes = contexts["tokens"].list.len().to_numpy().astype(np.int64)
        self.ids, self.starts = contexts["context"].to_numpy(), np.cumsum(sizes) - sizes
        self.tokens = contexts["tokens"].explode().to_numpy()
        self.document = np.repeat(contexts["document"].to_numpy(), sizes)
        self.ends = np.repeat(np.cumsum(sizes), sizes)

    def place(self, rows: pl.DataFrame) -> np.ndarray:
        """i64[row]: where the `context` and `position` of rows are in the array."""
        return (
            self.starts[np.searchsorted(self.ids, rows["context"].to_numpy())] + rows["position"].to_numpy()
        )


# -- Tables by example and place as grids, and rows of figures ---------------------------------------------------


@dataclass(frozen=True)
class ExampleGrid:
    """Rows of one table as grids over examples and places (layers, points, queries), resampled by document.

    name      what the rows are of: a lens or a target; may be empty
    rows      by example and place
    examples  a row each, ascending; `document`, and `partner` where there is one
    """

    name: str
    rows: pl.DataFrame
    examples: pl.DataFrame

    @property
    def documents(self) -> np.ndarray:
        """i64[example]"""
        return self.examples["document"].to_numpy()

    @property
    def count(self) -> int:
        """How many places there are."""
        return self.rows.height // max(self.examples.height, 1)

    def __getitem__(self, name: str) -> np.ndarray:
        """f64[example, place] of a column; NaN where it is null."""
        values = self.rows[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        return values.reshape(self.examples.height, self.count)

    def known(self) -> np.ndarray:
        """bool[example, 1]: the example has a partner."""
        return self.examples["partner"].is_not_null().to_numpy()[:, None]

    def partners(self, values: np.ndarray) -> np.ndarray:
        """An array [example, ...] with the rows of the partners; an example alone is its own."""
        first = self.examples["example"].to_numpy()
        partner = self.examples["partner"].fill_null(self.examples["example"]).to_numpy()
        return values[np.searchsorted(first, partner)]

    def mean(self, values: np.ndarray | str) -> Interval:
        """f64[...]: means over examples of values f64[example, ...] or of a column."""
        return mean_by_document(self[values] if isinstance(values, str) else values, self.documents)

    def share(self, hits: np.ndarray, among: np.ndarray | None = None) -> Interval:
        """f64[place]: how many examples of a place hit, of those asked for."""
        return share_by_document(_asked(hits, among), self.documents)

    def overall(self, hits: np.ndarray, among: np.ndarray | None = None) -> Interval:
        """The same over all places at once."""
        flat = _asked(hits, among).reshape(-1)
        return share_by_document(flat, np.repeat(self.documents, hits.shape[1]))

    def share_of(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """f64[...]: how many of `below` are `above`, summed over examples."""
        return share_of_sums(above, below, self.documents)

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """f64[...]: a ratio of sums, so that examples in which little happens weigh little."""
        return ratio_of_sums(above, below, self.documents)


def _asked(hits: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    return hits.astype(float) if among is None else np.where(among, hits, np.nan)


def refinement_grids(run: Run) -> dict[tuple[str, str], ExampleGrid]:
    """`refinement` by unit and lens, in the order of the table; `QueryError` when the run has not been measured."""
    rows = run.table("refinement").collect()
    examples = run.table("refinement_examples").collect()
    return {
        (unit, lens): ExampleGrid(
            lens, rows.filter(unit=unit, lens=lens), examples.filter(unit=unit).sort("example")
        )
        for unit, lens in rows.select("unit", "lens").unique(maintain_order=True).iter_rows()
    }


def columns(interval: Interval, value: str = "value", null: Interval | None = None) -> dict[str, np.ndarray]:
    """Columns of a frame: the estimate under a name, `low`, `high`, and `null`, `null_low`, `null_high`."""
    names = (value, "low", "high", "null", "null_low", "null_high")
    return dict(zip(names, (*interval, *(null or ())), strict=False))


def as_series(interval: Interval, value: str = "value") -> dict[str, pl.Series]:
    """The same for `with_columns`."""
    return {name: pl.Series(numbers) for name, numbers in columns(interval, value).items()}


BOX = {"low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "high": 0.95}
BOXES = "boxes: quartiles over neurons; whiskers: 5th to 95th percentile"


def quantiles(value: pl.Expr, levels: Mapping[str, float] = BOX, kind: Any = "nearest") -> list[pl.Expr]:
    """Columns of a box."""
    return [value.quantile(level, kind).alias(name) for name, level in levels.items()]


def series(interval: Interval, null: Interval | None = None, **labels: str) -> pl.DataFrame:
    """Rows of a figure: layer, labels, value, low, high, and the null with its band (null where there is none)."""
    blank = np.full(len(interval.value), np.nan)
    numbers = columns(interval, null=null or Interval(blank, blank, blank))
    frame = pl.DataFrame({"layer": np.arange(len(interval.value)), **numbers})
    texts = (pl.lit(text).alias(name) for name, text in labels.items())
    return frame.select("layer", *texts, *numbers).fill_nan(None)


def percent(interval: Interval, place: int | None = None) -> str:
    """`12.3 % [11.0, 13.9]` of a share."""
    value, low, high = (100 * number for number in _floats(interval, place))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]" if not np.isnan(value) else "no example"


def number(interval: Interval, place: int | None = None, form: str = ".2f") -> str:
    """`1.23 [1.10, 1.37]` of anything else."""
    value, low, high = _floats(interval, place)
    return "undefined" if np.isnan(value) else bracketed(value, low, high, form)


def _floats(interval: Interval, place: int | None) -> tuple[float, float, float]:
    value, low, high = (float(numbers if place is None else numbers[place]) for numbers in interval)
    return value, low, high
