"""How a neuron's coefficients are distributed: counts over fixed bins, one example from each part of the range."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa

from mnemoscope.mine import kernel
from mnemoscope.mine.kernel import BINS, COARSE_BINS, EMPTY, SPREADER
from mnemoscope.mine.places import address_of
from mnemoscope.mine.reading import Fields, LayerReading, share_out
from mnemoscope.run.schemas import arrow_table
from mnemoscope.text.sampling import splitmix64

_BLOCK = 128  # neurons that a thread takes at a time
_UNSPREADER = np.uint64(pow(int(SPREADER), -1, 2**64))


class Histograms(Fields):
    """Counts of every neuron over the bins of `HISTOGRAM_EDGES`, in the selected contexts.

    counts  i32[layer neuron bin]  enough for 2^31 selected tokens
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("counts",)

    def __init__(self, layers: int, neurons: int) -> None:
        self.counts = np.zeros((layers, neurons, BINS), np.int32)

    def update(self, reading: LayerReading) -> None:
        """Count the selected positions."""
        counts, bins = self.counts[reading.layer], reading.bins

        def block(start: int) -> None:
            kernel.count(bins, start, min(start + _BLOCK, len(counts)), counts)

        share_out(block, range(0, len(counts), _BLOCK))

    def merge(self, other: Histograms) -> None:
        """Add the counts of another state."""
        self.counts += other.counts

    def result(self, layer: int) -> pa.Table:
        """Rows of `histograms`: one for each neuron."""
        counts = self.counts[layer]
        columns = {"layer": layer, "neuron": np.arange(len(counts)), "counts": counts}
        return arrow_table("histograms", columns)


class Samples(Fields):
    """Examples: a position drawn uniformly from each part of every neuron's range, in the selected contexts (A71).

    Of all positions whose coefficient falls into a coarse bin, the one with the least key is kept: a
    uniform draw that does not depend on the order of arrival (bottom-k sampling, Cohen and Kaplan 2007,
    with k = 1). The key is (hash of context and position, xor salt of the neuron) * SPREADER, a bijection:
    it tells context and position, no two are equal, and neurons draw independently.

    key          u64[layer neuron bin]  EMPTY where there is none
    coefficient  f32[layer neuron bin]
    next_token   i32[layer neuron bin]  -1 at the end of a context
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key", "coefficient", "next_token")

    def __init__(self, layers: int, neurons: int) -> None:
        shape = (layers, neurons, COARSE_BINS)
        self.key = np.full(shape, EMPTY)
        self.coefficient = np.zeros(shape, np.float32)
        self.next_token = np.zeros(shape, np.int32)
        self._salt = splitmix64(np.arange(1, layers * neurons + 1)).reshape(layers, neurons)

    def update(self, reading: LayerReading) -> None:
        """Let the selected positions compete."""
        layer, places, bins = reading.layer, reading.places, reading.bins
        following = places.following.ravel()[places.chosen]
        state = (self.key[layer], self.coefficient[layer], self.next_token[layer])

        def block(start: int) -> None:
            stop = min(start + _BLOCK, self.key.shape[1])
            kernel.sample(
                reading.values, reading.chosen, bins, places.hashes, following, start, stop,
                self._salt[layer], *state,
            )  # fmt: skip

        share_out(block, range(0, self.key.shape[1], _BLOCK))

    def merge(self, other: Samples) -> None:
        """Keep the least key of both in every bin."""
        wins = other.key < self.key
        for name in self.FIELDS:
            np.copyto(getattr(self, name), getattr(other, name), where=wins)

    def result(self, layer: int) -> pa.Table:
        """Rows of `samples`, by (neuron, bin); no row where a bin is empty."""
        neuron, bin_ = np.nonzero(self.key[layer] != EMPTY)
        key, token = self.key[layer][neuron, bin_], self.next_token[layer][neuron, bin_]
        context, position = address_of((key * _UNSPREADER) ^ self._salt[layer][neuron])
        return arrow_table(
            "samples",
            {
                "layer": layer,
                "neuron": neuron,
                "bin": bin_,
                "coefficient": self.coefficient[layer][neuron, bin_],
                "context": context,
                "position": position,
                "next_token": np.ma.array(token, mask=token < 0),
            },
        )
