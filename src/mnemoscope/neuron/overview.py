"""Each layer of a run at a glance: how many neurons are dead, how peaked they are, how far they reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BINS = (36, 28)  # reach, kurtosis: what a small picture can show


@dataclass(frozen=True)
class Cell:
    """Neurons of a layer in one cell of the grid: reach in [x, x2), kurtosis in [y, y2)."""

    x: float
    x2: float
    y: float
    y2: float
    neurons: int


@dataclass(frozen=True)
class LayerSummary:
    """One layer. Kurtosis is in excess of the normal's; reach is the largest |coefficient| of a neuron.

    dead      every counted coefficient is 0
    constant  all counted coefficients are equal, and not 0
    one_sided never positive, or always positive
    """

    layer: int
    neurons: int
    dead: int
    constant: int
    one_sided: int
    median_kurtosis: float | None
    median_reach: float | None
    heavy_tailed: float | None  # share with kurtosis > 0, of those where it is defined
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Overview:
    """All layers, on one grid: `reach` and `kurtosis` are the least and the greatest value drawn."""

    layers: tuple[LayerSummary, ...]
    reach: tuple[float, float]
    kurtosis: tuple[float, float]

    @property
    def dead(self) -> int:
        """Dead neurons of the whole model."""
        return sum(layer.dead for layer in self.layers)

    @property
    def constant(self) -> int:
        """Constant neurons of the whole model."""
        return sum(layer.constant for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The overview as JSON-ready values."""
        return asdict(self)


def overview(run: Run) -> Overview:
    """Summarise every layer; neurons without a kurtosis (dead, constant) are counted but not in a cell."""
    neurons = run.table("neurons").select("layer", "min", "max", "kurtosis").collect()
    neurons = neurons.with_columns(
        pl.max_horizontal(-pl.col("min"), pl.col("max")).cast(pl.Float64).alias("reach")
    )
    drawn = neurons.filter(pl.col("kurtosis").is_not_null(), pl.col("reach") > 0)
    grid = _LogGrid(drawn["reach"].to_numpy(), drawn["kurtosis"].to_numpy())
    cells = run.manifest.model.cells  # the table has a row for each, in this order
    layers = [_summary(layer, neurons[cells.of(layer)], grid) for layer in range(run.manifest.model.layers)]
    return Overview(tuple(layers), grid.reach, grid.kurtosis)


class _LogGrid:
    """Logarithmic bins over reach and over kurtosis + 3 (the standardised fourth moment, at least 1)."""

    def __init__(self, reach: np.ndarray, kurtosis: np.ndarray) -> None:
        self._x = _log_edges(reach, BINS[0])
        self._y = _log_edges(kurtosis + 3, BINS[1]) - 3
        self.reach = (float(self._x[0]), float(self._x[-1]))
        self.kurtosis = (float(self._y[0]), float(self._y[-1]))

    def cells(self, reach: np.ndarray, kurtosis: np.ndarray) -> tuple[Cell, ...]:
        counts, _, _ = np.histogram2d(reach, kurtosis, bins=(self._x, self._y))
        x, y = self._x.tolist(), self._y.tolist()
        return tuple(
            Cell(x[i], x[i + 1], y[j], y[j + 1], int(counts[i, j]))
            for i, j in zip(*np.nonzero(counts), strict=True)
        )


def _log_edges(values: np.ndarray, bins: int) -> np.ndarray:
    if len(values) == 0:
        return np.geomspace(1, 10, bins + 1)
    # Widened by a hair, so that the extremes themselves fall inside after rounding.
    return np.geomspace(values.min() * (1 - 1e-6), values.max() * (1 + 1e-6), bins + 1)


def _summary(layer: int, rows: pl.DataFrame, grid: _LogGrid) -> LayerSummary:
    low, high = pl.col("min"), pl.col("max")
    count = rows.select(
        ((low == 0) & (high == 0)).sum().alias("dead"),
        ((low == high) & (low != 0)).sum().alias("constant"),
        ((low < high) & ((high <= 0) | (low > 0))).sum().alias("one_sided"),
    ).row(0, named=True)
    drawn = rows.filter(pl.col("kurtosis").is_not_null(), pl.col("reach") > 0)
    middle = drawn.select(
        pl.col("kurtosis").median(), pl.col("reach").median(), (pl.col("kurtosis") > 0).mean().alias("heavy")
    ).row(0, named=True)
    return LayerSummary(
        layer=layer,
        neurons=rows.height,
        **count,
        median_kurtosis=middle["kurtosis"],
        median_reach=middle["reach"],
        heavy_tailed=middle["heavy"],
        cells=grid.cells(drawn["reach"].to_numpy(), drawn["kurtosis"].to_numpy()),
    )
