"""Mean, spread, skewness and kurtosis of every neuron, its extremes, how often it is positive, its histogram (A70).

Adding floating-point numbers in another order gives other bits. So inside a shard power sums are added in
the order of its batches, and shards are added along a binary tree that is fixed by their numbers: shards 2i
and 2i + 1 make node (1, i), and so on. Whoever has both halves of a node adds them, and the result is the
same wherever that happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from mnemoscope.errors import RunError
from mnemoscope.mine import kernel
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.reading import Fields, LayerReading, fields_of, set_fields
from mnemoscope.records import Cells
from mnemoscope.run.schemas import arrow_table


@dataclass(frozen=True)
class Sums:
    """Power sums of (coefficient - pivot) over as many positions as each neuron was counted at.

    A pivot near the mean keeps what a variance is made of apart from what a mean is made of. It is the
    first counted coefficient of the shard, so nobody need know the mean beforehand, and every order of
    shards has the same.

    count   i64[cell]
    pivot   f32[cell]
    powers  f64[4 cell]
    """

    count: np.ndarray
    pivot: np.ndarray
    powers: np.ndarray

    def about(self, pivot: np.ndarray) -> np.ndarray:
        """The power sums about another pivot."""
        d = self.pivot.astype(np.float64) - pivot
        first, second, third, fourth = np.moveaxis(self.powers, -2, 0)
        n = self.count.astype(np.float64)
        return np.stack(
            [
                first + n * d,
                second + d * (2 * first + n * d),
                third + d * (3 * second + d * (3 * first + n * d)),
                fourth + d * (4 * third + d * (6 * second + d * (4 * first + n * d))),
            ],
            axis=-2,
        )

    def plus(self, other: Sums) -> Sums:
        """The sums of both, about the pivot of the first that has counted anything."""
        first = self.count > 0
        if not first.any():
            return other
        pivot = np.where(first, self.pivot, other.pivot)
        # Sums about a pivot that nothing was counted at are zeros.
        return Sums(self.count + other.count, pivot, self.powers + other.about(pivot))


class Moments:
    """Power sums by shard, folded along a fixed tree; extremes and positive counts.

    positive          i64[cell]
    minimum, maximum  f32[cell]
    shard             i32[shard]             ascending
    contexts, tokens  i64[shard layer]       tokens counted
    totals            f64[shard layer 4]     sums of the first to fourth power over all neurons of the layer

    Of layers without neurons nothing is counted, and they have no rows.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("positive", "minimum", "maximum")
    LEDGER: ClassVar[tuple[str, ...]] = ("shard", "contexts", "tokens", "totals")

    def __init__(self, cells: Cells) -> None:
        self._cells, layers = cells, len(cells.sizes)
        self.positive = np.zeros(len(cells), np.int64)
        self.minimum = np.full(len(cells), np.inf, np.float32)
        self.maximum = np.full(len(cells), -np.inf, np.float32)
        self.shard = np.zeros(0, np.int32)
        self.contexts = np.zeros((0, layers), np.int64)
        self.tokens = np.zeros((0, layers), np.int64)
        self.totals = np.zeros((0, layers, 4))
        self._nodes: dict[tuple[int, int], Sums] = {}  # by (level, index)
        self._open()

    def _open(self) -> None:
        """Begin a shard."""
        layers = len(self._cells.sizes)
        self._pivot = np.zeros(len(self._cells), np.float32)
        self._powers = np.zeros((4, len(self._cells)))
        self._counts = np.zeros(len(self._cells), np.int64)
        self._contexts = np.zeros(layers, np.int64)
        self._tokens = np.zeros(layers, np.int64)
        self._paired = False

    @property
    def is_open(self) -> bool:
        """Whether something was taken in since the last shard was finished."""
        return bool(self._contexts.any())

    def pivot(self, layer: int, first: int = 0, neurons: int | None = None) -> np.ndarray | None:
        """f32[neuron] that power sums of a layer, or of so many of its neurons, are to be taken about.

        NaN where nothing was counted yet, and any number will do; None where that is so of all.
        """
        here = self._cells.of(layer)
        start = here.start + first
        here = slice(start, here.stop if neurons is None else start + neurons)
        known = self._counts[here] > 0
        return np.where(known, self._pivot[here], np.float32(np.nan)) if known.any() else None

    def enter(self, layer: int, contexts: int, tokens: int, *, paired: bool = False) -> None:
        """A layer goes through so many contexts and counted tokens; asked once for each batch of a layer.

        paired  a decoder reads other contexts beside these
        """
        self._paired |= paired
        self._contexts[layer] += contexts
        self._tokens[layer] += tokens

    def update(self, reading: LayerReading) -> None:
        """Add to the shard that is being read."""
        here, counted = reading.within(self._cells), np.repeat(reading.counted, reading.width)
        known = self._counts[here] > 0
        assert np.array_equal(self._pivot[here][known], reading.pivot[known]), (
            f"layer {reading.layer}: another pivot inside a shard"
        )
        np.copyto(self._pivot[here], reading.pivot, where=~known & (counted > 0))
        self._counts[here] += counted
        self._powers[:, here] += reading.sums
        self.positive[here] += reading.positive
        # Adding 0.0 makes -0.0 the same as 0.0, which a minimum may return either of.
        smallest, largest = reading.furthest(-1) + 0.0, reading.furthest(1) + 0.0
        np.minimum(self.minimum[here], smallest, out=self.minimum[here])
        np.maximum(self.maximum[here], largest, out=self.maximum[here])

    def finish_shard(self, shard: int) -> None:
        """What was taken in since the last call was shard `shard`; RunError when that is in already."""
        self._refuse([shard])
        tokens = self._tokens[list(self._cells.layers)]
        changes = int((np.diff(tokens) != 0).sum())  # none, but between the stacks of an encoder-decoder
        assert changes <= self._paired, f"shard {shard}: layers saw different tokens: {tokens}"
        sums = Sums(self._counts, self._pivot, self._powers)
        powers = sums.about(np.zeros_like(self._pivot))
        totals = np.stack([powers[:, self._cells.of(layer)].sum(-1) for layer in range(len(self._tokens))])
        self._enter(
            np.array([shard], np.int32),
            self._contexts[None],
            self._tokens[None],
            totals[None],
            {(0, shard): sums},
        )
        self._open()

    def merge(self, other: Moments) -> None:
        """Take in another's shards; RunError when one is in already."""
        assert not (self.is_open or other.is_open), "finish the shard before merging"
        self._refuse(other.shard.tolist())
        self._enter(other.shard, other.contexts, other.tokens, other.totals, other._nodes)
        self.positive += other.positive
        np.minimum(self.minimum, other.minimum, out=self.minimum)
        np.maximum(self.maximum, other.maximum, out=self.maximum)

    def _refuse(self, shards: list[int]) -> None:
        twice = sorted(set(shards) & set(self.shard.tolist()))
        if twice:
            raise RunError(
                f"merging shards: shard {twice[0]} is in both states, and would count twice; "
                "merge each shard once, or start from an empty folder"
            )

    def _enter(
        self,
        shard: np.ndarray,
        contexts: np.ndarray,
        tokens: np.ndarray,
        totals: np.ndarray,
        nodes: Mapping[tuple[int, int], Sums],
    ) -> None:
        order = np.argsort(np.concatenate([self.shard, shard]))
        for name, more in zip(self.LEDGER, (shard, contexts, tokens, totals), strict=True):
            setattr(self, name, np.concatenate([getattr(self, name), more])[order])
        for address, sums in nodes.items():
            self._place(address, sums)

    def _place(self, address: tuple[int, int], sums: Sums) -> None:
        """Put a node into the tree, and go up as long as its sibling is there too."""
        level, index = address
        while (sibling := self._nodes.pop((level, index ^ 1), None)) is not None:
            sums = sibling.plus(sums) if index & 1 else sums.plus(sibling)
            level, index = level + 1, index >> 1
        self._nodes[level, index] = sums

    def state(self) -> dict[str, np.ndarray]:
        """The arrays, and the nodes of the tree stacked in the order of their shards."""
        assert not self.is_open, "finish the shard before saving"
        nodes = self._in_order()
        cells = len(self._cells)
        return {
            **fields_of(self),
            **{name: getattr(self, name) for name in self.LEDGER},
            "node": np.array([address for address, _ in nodes], np.int64).reshape(-1, 2),
            "count": np.array([sums.count for _, sums in nodes], np.int64).reshape(-1, cells),
            "pivot": np.array([sums.pivot for _, sums in nodes], np.float32).reshape(-1, cells),
            "powers": np.array([sums.powers for _, sums in nodes]).reshape(-1, 4, cells),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this state."""
        set_fields(self, state)
        for name in self.LEDGER:
            setattr(self, name, state[name])
        self._nodes = {
            (int(level), int(index)): Sums(count, pivot, powers)
            for (level, index), count, pivot, powers in zip(
                *(state[name] for name in ("node", "count", "pivot", "powers")), strict=True
            )
        }
        self._open()

    def _in_order(self) -> list[tuple[tuple[int, int], Sums]]:
        return sorted(self._nodes.items(), key=lambda node: node[0][1] << node[0][0])

    def result(self, layer: int) -> pa.Table:
        """The moment columns of `neurons`, one row for each; NaN when nothing was counted.

        std is the population's; skewness and kurtosis (excess) are null where std is 0.
        """
        assert not self.is_open, "finish the shard before asking"
        neurons, here = self._cells.sizes[layer], self._cells.of(layer)
        total = Sums(np.zeros(neurons, np.int64), np.zeros(neurons, np.float32), np.zeros((4, neurons)))
        for _, sums in self._in_order():
            total = total.plus(Sums(sums.count[here], sums.pivot[here], sums.powers[:, here]))
        constant = self.minimum[here] == self.maximum[here]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, std, skewness, kurtosis = _standardised(total)
            positive = self.positive[here] / total.count.astype(np.float64)
        std = np.where(constant, 0.0, std)
        minimum, maximum = np.where(
            total.count > 0, [self.minimum[here], self.maximum[here]], np.float32(np.nan)
        )
        flat = ~(std > 0)
        return arrow_table(
            "neurons",
            {
                "layer": layer,
                "neuron": np.arange(neurons),
                "tokens": total.count,
                "mean": mean,
                "std": std,
                "skewness": np.ma.array(skewness, mask=flat),
                "kurtosis": np.ma.array(kurtosis, mask=flat),
                "min": minimum,
                "max": maximum,
                "positive_fraction": positive,
            },
            partial=True,
        )

    def shard_rows(self) -> pa.Table:
        """Rows of `shards`, by (shard, layer)."""
        layers = np.array(self._cells.layers)
        totals = self.totals[:, layers].reshape(-1, 4).T
        columns = dict(zip(("sum", "sum_squares", "sum_cubes", "sum_fourths"), totals, strict=True))
        return arrow_table(
            "shards",
            {
                "shard": np.repeat(self.shard, len(layers)),
                "layer": np.tile(layers, len(self.shard)),
                "contexts": self.contexts[:, layers].ravel(),
                "tokens": self.tokens[:, layers].ravel(),
                **columns,
            },
        )


def _standardised(sums: Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, population std, skewness and excess kurtosis, each f64[neuron]."""
    d, second, third, fourth = sums.powers / sums.count.astype(np.float64)
    variance = np.maximum(second - d * d, 0.0)
    m3 = third - d * (3 * second - 2 * d * d)
    m4 = fourth - d * (4 * third - d * (6 * second - 3 * d * d))
    return sums.pivot + d, np.sqrt(variance), m3 / variance**1.5, m4 / variance**2 - 3


class Histograms(Fields):
    """Counts of every neuron over the bins of `HISTOGRAM_EDGES`, in the selected contexts.

    counts  i32[cell bin]  enough for 2^31 selected tokens
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("counts",)

    def __init__(self, cells: Cells) -> None:
        self._cells, self.counts = cells, np.zeros((len(cells), BINS), np.int32)

    def update(self, reading: LayerReading) -> None:
        """Count the selected positions."""
        counts, bins = reading.by_group(self.counts, self._cells), reading.bins
        reading.share_out(lambda *block: kernel.count_groups(bins, reading.cuts, *block, counts))

    def merge(self, other: Histograms) -> None:
        """Add the counts of another state."""
        self.counts += other.counts

    def result(self, layer: int) -> pa.Table:
        """Rows of `histograms`: one for each neuron."""
        counts = self.counts[self._cells.of(layer)]
        columns = {"layer": layer, "neuron": np.arange(len(counts)), "counts": counts}
        return arrow_table("histograms", columns)
