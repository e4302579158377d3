"""How well units that are not neurons rebuild what they stand for, and how many of them are active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa

from mnemoscope.errors import ModelError
from mnemoscope.mine.reading import Fields
from mnemoscope.model.capture import Capture, Rebuilt
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.model.units import points_of
from mnemoscope.records import UNIT_POINTS, ContextBatch
from mnemoscope.run.schemas import arrow_table

SAMPLE = 2048  # tokens that show whether units are where they belong
_FRACTION = (
    2.0**32
)  # whole numbers and fractions are added apart, as integers, so that no order of adding shows


class Reconstruction(Fields):
    """Sums over the counted tokens, by layer; of each a whole number and 2^-32ths.

    tokens, active  i64[layer]          active: of all units
    errors          i64[layer 2]        |x - rebuilt|^2
    squares         i64[layer 2]        |x|^2
    sums            i64[layer width 2]  x
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("tokens", "active", "errors", "squares", "sums")

    def __init__(self, layers: int, width: int) -> None:
        self.tokens, self.active = np.zeros((2, layers), np.int64)
        self.errors, self.squares = np.zeros((2, layers, 2), np.int64)
        self.sums = np.zeros((layers, width, 2), np.int64)

    @classmethod
    def of(cls, model: Model) -> Reconstruction:
        """An empty one; of no layers for a model whose neurons are read."""
        parts = model.anatomy
        return cls(parts.n_layers if parts.of_units else 0, parts.width)

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> Reconstruction:
        """What had this state."""
        empty = cls(*state["sums"].shape[:2])
        empty.restore(state)
        return empty

    def update(self, rebuilt: Rebuilt, batch: ContextBatch) -> None:
        """Add one layer of one batch."""
        layer, counted = rebuilt.layer, batch.counted
        x, said = (each.cpu().numpy()[counted].astype(np.float64) for each in (rebuilt.seen, rebuilt.said))
        self.tokens[layer] += len(x)
        self.active[layer] += int(rebuilt.active.cpu().numpy()[counted].sum())
        self.errors[layer] += _whole(np.square(x - said).sum())
        self.squares[layer] += _whole(np.square(x).sum())
        self.sums[layer] += _whole(x.sum(0))

    def merge(self, other: Reconstruction) -> None:
        """Add the numbers of another state."""
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def explained(self, layer: int) -> float | None:
        """The share of the variance that is rebuilt; None where nothing varies."""
        squares, error = _number(self.squares[layer]), _number(self.errors[layer])
        variance = squares - np.square(_number(self.sums[layer])).sum() / max(self.tokens[layer], 1)
        return float(1 - error / variance) if variance > 0 else None

    def result(self, layer: int, block: Layer, writes: str) -> pa.Table:
        """The row of `units` of one layer."""
        tokens, squares = int(self.tokens[layer]), float(_number(self.squares[layer]))
        units, error = block.units, float(_number(self.errors[layer]))
        return arrow_table(
            "units",
            {
                "layer": [layer],
                "units": [0 if units is None else len(units.keys)],
                "reads": ["" if units is None else units.reads],
                "writes": [writes],
                "activation": ["" if units is None else units.act.name],
                "tokens": [tokens],
                "active": [self.active[layer] / tokens if tokens else None],
                "explained_variance": [self.explained(layer)],
                "error_norm": [float(np.sqrt(error / squares)) if squares else None],
            },
        )

    def rows(self, model: Model) -> pa.Table:
        """The rows of `units`: of every layer that units read or write in."""
        assert model.units is not None, "of neurons there is no such table"
        layers, writes = model.anatomy.layers, model.units.writes
        return pa.concat_tables(
            self.result(layer, layers[layer], writes) for layer in points_of(model.anatomy)
        )


def check_place(model: Model, batches: Iterable[ContextBatch]) -> None:
    """ModelError where units explain less of what they stand for than its mean would, over the first of some batches.

    Units that were trained at another point, in another layer, behind another norm or on another model do. Directions
    are not meant to rebuild anything.
    """
    if model.units is None or model.units.kind == "directions":
        return
    rebuilt = Reconstruction.of(model)
    with Capture(model) as capture:
        for batch in batches:
            capture.sweep(batch, lambda *_: None, rebuilt=rebuilt.update)
            if rebuilt.tokens.max() >= SAMPLE:
                break
    for layer in points_of(model.anatomy):
        explained = rebuilt.explained(layer)
        if explained is not None and explained <= 0:
            place = UNIT_POINTS[model.units.writes].format(layer)
            raise ModelError(
                f"reading {model.units.id} for {model.id}: of the variance of {place} it explains {explained:.2g} over "
                f"{rebuilt.tokens[layer]:,} tokens of the text, which is less than the mean alone would (0), so it "
                "belongs to another point, layer, normalisation or model; give the units of this one, or say where "
                "they belong (...@13.residual_out)"
            )


def _whole(sums: np.ndarray) -> np.ndarray:
    """i64[... 2]: whole numbers, and what is left in 2^-32ths."""
    down = np.floor(sums)
    return np.stack([down, np.rint((sums - down) * _FRACTION)], -1).astype(np.int64)


def _number(sums: np.ndarray) -> np.ndarray:
    """f64: what `_whole` took apart."""
    return sums[..., 0] + sums[..., 1] / _FRACTION
