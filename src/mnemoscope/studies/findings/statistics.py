"""Intervals by resampling documents with replacement, because tokens of one document are not independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import TAIL, Interval, of_share
from mnemoscope.studies.findings.finding import bracketed

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

TIMES = 1000
_BLOCK = 64  # resamples at once


def by_document(
    values: np.ndarray,
    documents: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int = TIMES,
    seed: int = 0,
) -> Interval:
    """A statistic of sums over examples, with the 2.5th and 97.5th percentile over resampled documents.

    values     f64[example, ...]   what is summed; no NaN
    documents  i64[example]        whose example it is
    statistic  f64[sample, ...] sums -> f64[sample, ...], each sample on its own
    """
    sums = per_document(values, documents)
    flat = sums.reshape(len(sums), int(np.prod(sums.shape[1:])))
    generator = np.random.default_rng(seed)
    even = np.full(len(sums), 1 / max(len(sums), 1))
    drawn = []
    for start in range(0, n if len(sums) else 0, _BLOCK):
        weights = generator.multinomial(len(sums), even, min(_BLOCK, n - start))
        drawn.append(statistic((weights @ flat).reshape(len(weights), *sums.shape[1:])))
    value = statistic(sums.sum(0, keepdims=True))[0]
    return interval(value, np.concatenate(drawn) if drawn else value[None] * np.nan)


def mean_by_document(values: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of values f64[example, ...], NaN left out, resampled by document."""
    known = ~np.isnan(values)
    both = np.stack([np.where(known, values, 0.0), known], axis=1)
    return by_document(both, documents, lambda sums: ratio(sums[:, 0], sums[:, 1]), n, seed)


def share_by_document(hits: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0) -> Interval:
    """Means over examples of shares (or hits) f64[example, ...] in [0, 1], NaN left out, resampled by document."""
    known = ~np.isnan(hits)
    _assert_shares(hits[known])
    witnesses = (per_document(known.astype(float), documents) > 0).sum(0)
    return of_share(mean_by_document(hits, documents, n, seed), witnesses)


def share_by_group(
    hits: np.ndarray, groups: np.ndarray, count: int, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """As `mean_by_group`, of shares (or hits) in [0, 1]."""
    _assert_shares(hits)
    _, place = _numbered(documents)
    witnesses = np.bincount(np.unique(place * count + groups) % count, minlength=count)
    return of_share(mean_by_group(hits, groups, count, documents, n, seed), witnesses)


def share_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """How many of `below` f64[example, ...] are `above`, summed over examples; resampled by document."""
    assert ((above >= 0) & (above <= below + 1e-6)).all()
    found = ratio_of_sums(above, below, documents, n, seed)
    return of_share(found, (per_document(below, documents) > 0).sum(0))


def ratio_of_sums(
    above: np.ndarray, below: np.ndarray, documents: np.ndarray, n: int = TIMES, seed: int = 0
) -> Interval:
    """The sum of `above` over the sum of `below` f64[example, ...], resampled by document."""
    both = np.stack([above, below], axis=1)
    return by_document(both, documents, lambda sums: ratio(sums[:, 0], sums[:, 1]), n, seed)


def _assert_shares(values: np.ndarray) -> None:
    assert ((values >= 0) & (values <= 1 + 1e-6)).all(), (values.min(), values.max())


def mean_by_group(
    values: np.ndarray,
    groups: np.ndarray,
    count: int,
    documents: np.ndarray,
    n: int = TIMES,
    seed: int = 0,
) -> Interval:
    """Means f64[group] of values f64[example], each example in one of `count` groups, resampled by document."""
    ids, place = _numbered(documents)
    cell, size = place * count + groups, len(ids) * count
    sums = np.stack([np.bincount(cell, values, size), np.bincount(cell, minlength=size)], axis=-1)
    both = sums.reshape(len(ids), count, 2)
    return by_document(both, ids, lambda some: ratio(some[..., 0], some[..., 1]), n, seed)


def _numbered(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `np.unique` with the inverse, without sorting millions of ids that lie close together."""
    if len(documents) == 0 or np.ptp(documents) > 4 * len(documents):
        return np.unique(documents, return_inverse=True)
    place = documents - documents.min()
    seen = np.bincount(place) > 0
    return np.flatnonzero(seen) + documents.min(), (np.cumsum(seen) - 1)[place]


def quantile_by_document(
    values: np.ndarray, documents: np.ndarray, levels: tuple[float, ...], n: int = 200, seed: int = 0
) -> Interval:
    """Quantiles f64[level, column] of values f64[example, column], resampled by document; the lower one of two."""
    _, place = np.unique(documents, return_inverse=True)
    count = int(place.max()) + 1
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, 0)
    generator = np.random.default_rng(seed)

    def of(weights: np.ndarray) -> np.ndarray:
        mass = np.cumsum(weights[place][order], axis=0)
        picks = [(mass < level * mass[-1]).sum(0).clip(max=len(values) - 1) for level in levels]
        return np.stack([np.take_along_axis(ranked, pick[None], 0)[0] for pick in picks])

    drawn = [of(generator.multinomial(count, np.full(count, 1 / count))) for _ in range(n)]
    return interval(of(np.ones(count)), np.stack(drawn))


def per_document(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """f64[document, ...]: sums over the examples of each document, ascending by id."""
    ids, place = np.unique(documents, return_inverse=True)
    sums = np.zeros((len(ids), *values.shape[1:]))
    np.add.at(sums, place, values)
    return sums


def interval(value: np.ndarray, drawn: np.ndarray) -> Interval:
    """The estimate with the percentiles of its resamples f64[sample, ...], those that are defined."""
    lost = np.isnan(drawn).all(0) | np.isnan(value)
    low, high = np.nanquantile(np.where(lost, 0.0, drawn), (TAIL, 1 - TAIL), axis=0)
    return Interval(value, np.where(lost, np.nan, low), np.where(lost, np.nan, high))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


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
