"""One statistic against another: each neuron a point that leads to its page, on axes that go through zero.

An axis shows asinh(value / scale): even near zero, logarithmic far from it, so that a few large neurons leave room
for the others. A part that is chosen with the mouse becomes conditions of the table beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

WIDTH, HEIGHT = 560, 260  # of the picture, in its own units
MOST = 4_000  # points
_FINEST = 1e-12  # of the largest value: a finer scale would overflow where most values are next to nothing
TICKS = 6  # of an axis, at most


@dataclass(frozen=True)
class Axis:
    """One statistic on its way to the picture: `start` + `length` asinh(value / scale) scaled to [low, high]."""

    name: str
    scale: float
    low: float
    high: float
    start: float
    length: float

    @classmethod
    def of(cls, name: str, values: np.ndarray, start: float, length: float) -> Axis:
        """An axis that holds all values; its scale is their median size, if that is not next to nothing."""
        sizes = np.abs(values[values != 0])
        scale = max(float(np.median(sizes)), float(sizes.max()) * _FINEST) if len(sizes) else 1.0
        bent = np.arcsinh(values / scale)
        low, high = (float(bent.min()), float(bent.max())) if len(bent) else (0.0, 1.0)
        return cls(name, scale, low, high if high > low else low + 1.0, start, length)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values are in the picture."""
        share = (np.arcsinh(values / self.scale) - self.low) / (self.high - self.low)
        return np.round(self.start + self.length * share, 1)

    @property
    def ticks(self) -> list[tuple[float, float]]:
        """(place, value): zero and powers of ten of either sign, as many as fit."""
        least, most = (self.scale * np.sinh(end) for end in (self.low, self.high))
        first = int(np.floor(np.log10(self.scale)))
        powers = 10.0 ** np.arange(first, first + 12)
        inside = [value for value in (0.0, *powers, *-powers) if least <= value <= most]
        step = max(1, -(-len(inside) // TICKS))
        kept = sorted(inside, key=abs)[::step]
        return sorted(zip(self.place(np.array(kept)).tolist(), map(float, kept), strict=True))


@dataclass(frozen=True)
class Scatter:
    """Points of a picture: (x, y, neuron, and its two statistics); `left` counts neurons that are not shown, undefined
    or too many."""

    x: Axis
    y: Axis
    points: list[tuple[float, float, int, float, float]]
    left: int


def scatter(frame: pl.DataFrame, x: str, y: str) -> Scatter:
    """The neurons of a frame (a layer's rows of `neurons`) by two of its statistics."""
    numbers = (
        frame.select("neuron", pl.col(x, y).cast(pl.Float64)) if x != y else frame.select("neuron", pl.col(x))
    )
    known = numbers.filter(pl.all_horizontal(pl.col(x, y).is_finite()) if x != y else pl.col(x).is_finite())
    shown = known.gather_every(-(-known.height // MOST)) if known.height > MOST else known
    across, up = (shown[name].cast(pl.Float64).to_numpy() for name in (x, y))
    axes = Axis.of(x, across, 0, WIDTH), Axis.of(y, up, HEIGHT, -HEIGHT)
    values = across.tolist(), up.tolist()
    places = (axes[0].place(across).tolist(), axes[1].place(up).tolist(), shown["neuron"].to_list(), *values)
    return Scatter(*axes, list(zip(*places, strict=True)), frame.height - shown.height)
