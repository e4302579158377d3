"""Examples of every neuron: contexts with its largest and its most negative coefficients (A1), and some in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa

from mnemoscope.mine import kernel
from mnemoscope.mine.kernel import COARSE_BINS, EMPTY, SPREADER
from mnemoscope.mine.places import address_of
from mnemoscope.mine.reading import Contenders, Extremes, Fields, LayerReading, share_out
from mnemoscope.records import Cells
from mnemoscope.run.schemas import arrow_table
from mnemoscope.text.sampling import splitmix64

POLARITIES = (1, -1)
_BLOCK = 128  # neurons that a thread takes at a time
_LOW = np.uint64(0xFFFFFFFF)
_UNSPREADER = np.uint64(pow(int(SPREADER), -1, 2**64))


class Triggers(Fields):
    """Top-k contexts of every neuron in both polarities, each by its extreme position.

    The order is total: larger |coefficient| first, then the lower context id; of equal coefficients in one
    context the first position stands. So the k first are the same whatever the order of arrival. A
    coefficient must be above 0 to enter the positive list and below 0 to enter the other: dead neurons have
    empty lists.

    key   u64[polarity cell rank]  descending; upper half: the bits of |coefficient|, lower half:
                                   2^32 - 1 - context; 0 where there is no trigger
    what  u64[polarity cell rank]  position << 36 | (next token + 1) << 4 | gate << 2 | up, where the signs are
                                   0, 1, 2 for -1, 0, 1, and 3 when the layer is not gated
    weight  f32[polarity cell rank]  of the router, NaN in a dense layer; where no layer has experts, of no rank
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key", "what", "weight")

    def __init__(self, cells: Cells, k: int) -> None:
        assert k >= 1, k
        self._cells, self.key = cells, np.zeros((2, len(cells), k), np.uint64)
        self.what = np.zeros_like(self.key)
        self.weight = np.zeros((2, len(cells), k if cells.experts else 0), np.float32)
        self._threshold = np.zeros((2, len(cells)), np.float32)

    def update(self, reading: LayerReading) -> None:
        """Enter the extremes of each context; only those that enter have their place looked up."""
        if isinstance(reading.largest, Contenders) and isinstance(reading.smallest, Contenders):
            self._enter(0, reading.largest, reading)
            self._enter(1, reading.smallest, reading)
            return
        assert isinstance(reading.largest, Extremes), "both or neither"
        assert isinstance(reading.smallest, Extremes), "both or neither"
        largest, smallest = (self._extremes(reading, side) for side in (reading.largest, reading.smallest))
        highest, lowest = (
            tuple(
                reading.by_group(array[index], self._cells)
                for array in (self._threshold, self.key, self.what, self.weight)
            )
            for index in range(len(POLARITIES))
        )
        following, gated = reading.places.following, reading.largest.gate is not None
        reading.share_out(
            lambda *block: kernel.rank_groups(
                largest, smallest, highest, lowest, reading.batch.contexts, following, gated,
                reading.places.positions, reading.weights, *block,
            )
        )  # fmt: skip

    def floor(self, layer: int, first: int = 0, neurons: int | None = None) -> np.ndarray:
        """f32[polarity neuron]: what is below, of a layer or of so many of its neurons, enters no list."""
        start = self._cells.of(layer).start + first
        return self._threshold[:, start : self._cells.of(layer).stop if neurons is None else start + neurons]

    def _enter(self, index: int, hits: Contenders, reading: LayerReading) -> None:
        """Enter what a device found, of one polarity."""
        here, places = reading.within(self._cells), reading.places
        context = reading.batch.contexts[hits.context].astype(np.uint64)
        word = np.abs(hits.value).view(np.uint32).astype(np.uint64) << np.uint64(32) | (_LOW - context)
        token = (places.following[hits.context, hits.position] + 1).astype(np.uint64)
        what = hits.position.astype(np.uint64) << np.uint64(36) | token << np.uint64(4) | hits.signs
        weights = reading.weights
        carried = weights[hits.row] if len(weights) else np.full(len(word), np.nan, np.float32)
        lists = (array[index, here] for array in (self._threshold, self.key, self.what, self.weight))
        kernel.enter(hits.neuron, word, what, carried, *lists)

    @staticmethod
    def _extremes(reading: LayerReading, extremes: Extremes) -> tuple[np.ndarray, ...]:
        """Values and positions by group, gate and up; of a plain layer nothing is in the place of these."""
        shape, nothing = (len(reading.counted), -1, reading.width), reading.values[:0]
        branches = (extremes.gate, extremes.up)
        return (
            extremes.value.reshape(shape),
            extremes.position.reshape(shape),
            *(nothing if branch is None else branch for branch in branches),
        )

    def merge(self, other: Triggers) -> None:
        """Keep the k first triggers of both."""
        size = 2 * len(self._cells)
        kept, others = (
            [getattr(lists, name).reshape(size, getattr(lists, name).shape[-1]) for name in self.FIELDS]
            for lists in (self, other)
        )
        step = 8 * _BLOCK
        share_out(
            lambda start: kernel.merge_ranked(*kept, *others, start, min(start + step, len(kept[0]))),
            range(0, len(kept[0]), step),
        )
        self._set_threshold()

    def _set_threshold(self) -> None:
        self._threshold = _coefficients(self.key[..., -1])

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what had this state."""
        super().restore(state)
        self._set_threshold()

    def result(self, layer: int) -> pa.Table:
        """Rows of `triggers`, by (neuron, polarity descending, rank); no row where there is no trigger."""
        neuron, polarity, rank, key, what = self._listed(layer, self.key, self.what)
        token = ((what >> np.uint64(4)) & _LOW).astype(np.int64) - 1
        gate_sign = ((what >> np.uint64(2)) & np.uint64(3)).astype(np.int8) - 1
        up_sign = (what & np.uint64(3)).astype(np.int8) - 1
        return arrow_table(
            "triggers",
            {
                "layer": layer,
                "neuron": neuron,
                "polarity": polarity,
                "rank": rank,
                "coefficient": _coefficients(key) * polarity.astype(np.float32),
                "context": (_LOW - (key & _LOW)).astype(np.int64),
                "position": what >> np.uint64(36),
                "next_token": np.ma.array(token, mask=token < 0),
                "gate_sign": np.ma.array(gate_sign, mask=gate_sign == 2),
                "up_sign": np.ma.array(up_sign, mask=up_sign == 2),
            },
        )

    def weights(self, layer: int) -> pa.Table:
        """Rows of `trigger_weights`, for each of `result` the router's weight."""
        neuron, polarity, rank, weight = self._listed(layer, self.weight)
        columns = {"neuron": neuron, "polarity": polarity, "rank": rank, "router_weight": weight}
        return arrow_table("trigger_weights", {"layer": layer, **columns})

    def _listed(self, layer: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Neuron, polarity and rank of every trigger of a layer, and what arrays have for it."""
        here = self._cells.of(layer)
        neuron, index, rank = np.nonzero(self.key[:, here].swapaxes(0, 1))
        columns = (array[:, here].swapaxes(0, 1)[neuron, index, rank] for array in arrays)
        return neuron, np.array(POLARITIES, np.int8)[index], rank, *columns


def _coefficients(key: np.ndarray) -> np.ndarray:
    """|coefficient| as f32, from the upper half of a key."""
    return (key >> np.uint64(32)).astype(np.uint32).view(np.float32)


class Samples(Fields):
    """Examples: a position drawn uniformly from each part of every neuron's range, in the selected contexts (A71).

    Of all positions whose coefficient falls into a coarse bin, the one with the least key is kept: a
    uniform draw that does not depend on the order of arrival (bottom-k sampling, Cohen and Kaplan 2007,
    with k = 1). The key is (hash of context and position, xor salt of the neuron) * SPREADER, a bijection:
    it tells context and position, no two are equal, and neurons draw independently.

    key          u64[cell bin]  EMPTY where there is none
    coefficient  f32[cell bin]
    next_token   i32[cell bin]  -1 at the end of a context
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key", "coefficient", "next_token")

    def __init__(self, cells: Cells) -> None:
        self._cells, shape = cells, (len(cells), COARSE_BINS)
        self.key = np.full(shape, EMPTY)
        self.coefficient = np.zeros(shape, np.float32)
        self.next_token = np.zeros(shape, np.int32)
        self._salt = splitmix64(np.arange(1, len(cells) + 1))

    def update(self, reading: LayerReading) -> None:
        """Let the selected positions compete."""
        places, bins = reading.places, reading.bins
        following = places.following.ravel()[places.chosen]
        held = [
            reading.by_group(array, self._cells)
            for array in (self._salt, self.key, self.coefficient, self.next_token)
        ]
        reading.share_out(
            lambda *block: kernel.sample_groups(
                reading.values, reading.chosen, bins, reading.cuts, places.hashes, following, *block, *held
            )
        )

    def merge(self, other: Samples) -> None:
        """Keep the least key of both in every bin."""
        wins = other.key < self.key
        for name in self.FIELDS:
            np.copyto(getattr(self, name), getattr(other, name), where=wins)

    def result(self, layer: int) -> pa.Table:
        """Rows of `samples`, by (neuron, bin); no row where a bin is empty."""
        here = self._cells.of(layer)
        neuron, bin_ = np.nonzero(self.key[here] != EMPTY)
        key, token = self.key[here][neuron, bin_], self.next_token[here][neuron, bin_]
        context, position = address_of((key * _UNSPREADER) ^ self._salt[here][neuron])
        return arrow_table(
            "samples",
            {
                "layer": layer,
                "neuron": neuron,
                "bin": bin_,
                "coefficient": self.coefficient[here][neuron, bin_],
                "context": context,
                "position": position,
                "next_token": np.ma.array(token, mask=token < 0),
            },
        )
