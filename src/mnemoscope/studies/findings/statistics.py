"""What findings are counted from: tokens in one array, tables as grids over examples, and rows of figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import (
    Interval,
    by_document,
    chance_of_zero,
    discoveries,
    mean_by_document,
    per_document,
    ratio,
    ratio_of_sums,
    share_by_document,
    share_of_sums,
)
from mnemoscope.studies.findings.finding import Difference

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


# -- A null passes the selection of the figure it stands beside --------------------------------------------------

# What another example's feed-forward output, target or strongest memory gives an example is in the columns that end in
# `_permuted`; some go by another name, or are the partner's own; what is of the residual alone stays.
PARTNER, OTHER_LAYER = "_permuted", "_other"
_RENAMED = {("output", PARTNER): "permuted"}
_OF_PARTNER = {"ffn", "prediction"}
_OF_RESIDUAL = {"residual"}


@dataclass(frozen=True)
class Quantities:
    """The quantities of examples: their own, or with another's output in place of it, under the same names.

    suffix  "" for their own, else that of the columns that hold the others
    """

    grid: ExampleGrid
    suffix: str = ""

    def __getitem__(self, name: str) -> np.ndarray:
        """f64[example, place]; KeyError for what the other side has no counterpart of."""
        name_here = _RENAMED.get((name, self.suffix), f"{name}{self.suffix}")
        if name_here in self.grid.rows.columns:
            return self.grid[name_here]
        if name == "prediction":
            values = self.grid.examples["prediction"].to_numpy().astype(float)[:, None]
        elif name in _OF_PARTNER | _OF_RESIDUAL:
            values = self.grid[name]
        else:
            raise KeyError(name_here)
        return self.grid.partners(values) if self.suffix == PARTNER and name in _OF_PARTNER else values

    def known(self) -> np.ndarray:
        """bool[example, 1]: there is such a side of the example."""
        return self.grid.known() if self.suffix == PARTNER else np.ones((self.grid.examples.height, 1), bool)


Selection = Callable[[Quantities], np.ndarray]


def everything(of: Quantities) -> np.ndarray:
    """Select every example at every place."""
    return np.ones((1, 1), bool)


@dataclass(frozen=True)
class ExampleFigure:
    """A figure of examples, said once for the examples and for whatever they are compared with.

    hits   bool[example, place] (or f64, of a mean) of a side's quantities
    among  bool[example, place]: which are selected, by the same quantities
    """

    hits: Selection
    among: Selection = everything


@dataclass(frozen=True)
class BesidePartner:
    """A figure and its null, both through one selection, and what is between them; resampled by document.

    sums  f64[document, 4, place]: sum over the selected and how many they are, of the figure, then of the null
    """

    own: Interval
    null: Interval
    sums: np.ndarray

    @cached_property
    def excess(self) -> Interval:
        """The figure less its null."""
        return by_document(self.sums, np.arange(len(self.sums)), _difference, witnesses=self._witnesses)

    @property
    def _witnesses(self) -> np.ndarray:
        return np.asarray(np.minimum(*(self.sums[:, [1, 3]] > 0).sum(0)))

    @cached_property
    def differs(self) -> np.ndarray:
        """bool[place]: where the figure is not its null, of all places together (Benjamini and Hochberg)."""
        return discoveries(chance_of_zero(self.sums, np.arange(len(self.sums)), _difference))

    def rows(self, **labels: str) -> pl.DataFrame:
        """Rows of a figure, as `series`, and the excess with its interval."""
        excess = dict(
            zip(("excess", "excess_low", "excess_high"), columns(self.excess).values(), strict=False)
        )
        return series(self.own, self.null, **labels).with_columns(**excess)


def _difference(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[:, 0], sums[:, 1]) - ratio(sums[:, 2], sums[:, 3])


def against_partner(
    asked: ExampleFigure, own: Quantities, partner: Quantities, *, overall: bool = False
) -> BesidePartner:
    """A figure of examples beside the same figure with another's output in place of their own.

    overall  over all places at once
    """
    sums, intervals = [], []
    for side in (own, partner):
        hits = np.asarray(asked.hits(side))
        hits, among = np.broadcast_arrays(hits, asked.among(side) & side.known())
        values = np.where(among, hits.astype(float), np.nan)
        documents = own.grid.documents
        if overall:
            documents, values = np.repeat(documents, values.shape[1]), values.reshape(-1, 1)
        measured = share_by_document if hits.dtype == bool else mean_by_document
        intervals.append(measured(values, documents))
        known = ~np.isnan(values)
        sums.append(per_document(np.stack([np.where(known, values, 0.0), known], 1), documents))
    return BesidePartner(intervals[0], intervals[1], np.concatenate(sums, axis=1))


def layers_named(which: np.ndarray) -> str:
    """`layers 3, 5-8`, `layer 2` or `no layer`."""
    places = np.flatnonzero(which)
    if not len(places):
        return "no layer"
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    said = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer {said}" if len(places) == 1 else f"layers {said}"


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


def running(run: Run) -> np.ndarray:
    """f64[layer]: neurons of each layer that has any, in a mixture those that run at a counted token, on average."""
    cells = run.manifest.model.cells
    if not cells.experts:
        return np.array([size for size in cells.sizes if size], float)
    tokens = run.table("neurons").group_by("layer").agg(pl.col("tokens").sum()).sort("layer").collect()
    return np.asarray(tokens["tokens"].to_numpy() / run.manifest.corpus.counted)


def columns(interval: Interval, value: str = "value", null: Interval | None = None) -> dict[str, pl.Series]:
    """Columns of a frame: the estimate under a name, `low`, `high`, `null`, `null_low`, `null_high`; `n` if counted.

    What is not defined is null.
    """
    names = (value, "low", "high", "null", "null_low", "null_high")
    numbers_of = dict(zip(names, (*interval, *(null or ())), strict=False))
    frame = {name: pl.Series(np.atleast_1d(numbers)).fill_nan(None) for name, numbers in numbers_of.items()}
    return frame if interval.n is None else frame | {"n": pl.Series(np.atleast_1d(interval.n))}


as_series = columns  # for `with_columns`

BOX = {"low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "high": 0.95}
BOXES = "boxes: quartiles over neurons; whiskers: 5th to 95th percentile"


def quantiles(value: pl.Expr, levels: Mapping[str, float] = BOX, kind: Any = "nearest") -> list[pl.Expr]:
    """Columns of a box."""
    return [value.quantile(level, kind).alias(name) for name, level in levels.items()]


def series(interval: Interval, null: Interval | None = None, **labels: str) -> pl.DataFrame:
    """Rows of a figure: layer, labels, value, low, high, the null with its band (null where there is none), and n."""
    blank = np.full(len(interval.value), np.nan)
    numbers = columns(interval, null=null or Interval(blank, blank, blank))
    counted = {"n": pl.Series([None] * len(interval.value), dtype=pl.Int64)} | numbers
    frame = pl.DataFrame({"layer": np.arange(len(interval.value)), **counted})
    texts = (pl.lit(text).alias(name) for name, text in labels.items())
    return frame.select("layer", *texts, pl.exclude("layer", *labels, "n"), "n")


def contrast(key: str, interval: Interval, place: int | None = None) -> Difference:
    """A difference as a candidate of the headline; without counted units there is no p-value, and so none is made."""
    figure = interval if place is None else interval.at(place)
    assert figure.n is not None, f"{key}: what was resampled was not counted"
    return Difference.of(key, (float(end) for end in figure), int(figure.n))


def percent(interval: Interval, place: int | None = None) -> str:
    """`12.3 % [11.0, 13.9]` of a share; where there are too few units for an interval, it says how many."""
    return _written(interval, place, ".1f", 100, " %", "no example")


def points(interval: Interval, place: int | None = None) -> str:
    """`-1.2 points [-2.3, -0.1]` of a difference of shares."""
    return _written(interval, place, "+.1f", 100, " points", "undefined")


def number(interval: Interval, place: int | None = None, form: str = ".2f") -> str:
    """`1.23 [1.10, 1.37]` of anything else."""
    return _written(interval, place, form, 1, "", "undefined")


def _written(
    interval: Interval, place: int | None, form: str, scale: float, unit: str, undefined: str
) -> str:
    figure = interval if place is None else interval.at(place)
    value, low, high = (scale * float(end) for end in figure)
    if np.isnan(value):
        return undefined
    if np.isnan(low) or np.isnan(high):
        return f"{value:{form}}{unit} (no interval" + (")" if figure.n is None else f": n = {int(figure.n)})")
    return f"{value:{form}}{unit} [{low:{form}}, {high:{form}}]"
