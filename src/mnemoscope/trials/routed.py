"""Which tokens of a text a router sends to each expert of a mixture: the text of the expert's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mnemoscope.errors import RunError
from mnemoscope.mine import loop
from mnemoscope.mine.reading import fields_of, set_fields
from mnemoscope.mine.statistics import load_state, save_state
from mnemoscope.model.capture import LayerRows
from mnemoscope.patterns.triggers import OwnTexts
from mnemoscope.records import ContextBatch
from mnemoscope.run.text import Text
from mnemoscope.trials.groups import UnitPlaces
from mnemoscope.trials.masked_text import HalfText

if TYPE_CHECKING:
    from mnemoscope.patterns.triggers import Addressed


class RoutedTokens:
    """A state of the loop: the counted prefixes of a text that were routed to each expert.

    bits  u8[expert byte]  eight prefixes to a byte; the experts of all layers, in the order of their places
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("bits",)

    def __init__(self, half: HalfText, places: UnitPlaces) -> None:
        self.text, self._places = half.text, places
        self._text_of = np.where(places.routed, np.cumsum(places.routed), 0)
        self.bits = np.zeros((int(places.routed.sum()), -(-len(half.text) // 8)), np.uint8)
        self._shards: set[int] = set()

    @classmethod
    def read(
        cls, half: HalfText, places: UnitPlaces, model: Any, folder: Path, report: loop.Report
    ) -> RoutedTokens:
        """One pass of the model over the text, from where it was interrupted; what was read lies in a folder."""
        folder.mkdir(exist_ok=True)
        state = cls(half, places)
        return loop.run_shards(
            model, half.plan, loop.StateFactory(lambda: state, state.restore), folder, report=report
        )

    def text_of(self, places: Any) -> Any:
        """i64[...]: the number of the text that the units of places run on: 0 for all of it, of an expert its own."""
        return self._text_of[places]

    def of(self, place: int) -> np.ndarray:
        """bool[prefix]: what the units of a place run on."""
        number = self._text_of[place]
        if not number:
            return np.ones(len(self.text), bool)
        return np.unpackbits(self.bits[number - 1], count=len(self.text)).astype(bool)

    @property
    def shards(self) -> frozenset[int]:
        """The shards that are finished or loaded."""
        return frozenset(self._shards)

    def update(self, *_: object) -> None:
        """Layers without experts route nothing."""

    def update_rows(self, rows: LayerRows, batch: ContextBatch) -> None:
        """Take in the experts of one layer of one batch; a shared one is given all."""
        if rows.rows is None:
            return
        given = rows.rows.cpu().numpy()
        expert = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
        context, position = np.divmod(given, batch.tokens.shape[1])
        counted = batch.counted[context, position]
        prefix = self.text.starts[batch.contexts[context[counted]]] + position[counted]
        first = self._text_of[self._places.at[rows.layer, rows.group]] - 1
        _set(self.bits, first + expert[counted], prefix)

    def finish_shard(self, shard: int) -> None:
        """All batches of a shard have been given."""
        self._shards.add(shard)

    def merge(self, other: RoutedTokens) -> None:
        """Take in what another has taken in; RunError for a shard that both have."""
        if both := self._shards & other._shards:
            raise RunError(f"reading what is routed where: shard {min(both)} was read twice")
        self.bits |= other.bits
        self._shards |= other._shards

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all."""
        save_state(path, fields_of(self) | {"shards": np.array(sorted(self._shards), np.int64)})

    def restore(self, path: Path) -> RoutedTokens:
        """Become what was saved; RunCorrupt when the file is not whole or of another shape."""

        def read(state: Mapping[str, np.ndarray]) -> RoutedTokens:
            set_fields(self, state)
            self._shards = set(state["shards"].tolist())
            return self

        return load_state(path, read)


def own_texts(text: Text, units: Addressed, places: UnitPlaces, reads: Sequence[RoutedTokens]) -> OwnTexts:
    """Which prefixes of a text each unit runs on, as parts of it were read; a trigger was routed to the expert of its
    unit, whether it was read or not."""
    first, known = reads[0], np.zeros(len(text), bool)
    routed = np.zeros((len(first.bits), -(-len(text) // 8)), np.uint8)
    for read in reads:
        rows = text.rows(read.text.context, read.text.position)
        known[rows] = True
        for place in np.flatnonzero(places.routed).tolist():
            chosen = np.zeros(len(text), bool)
            chosen[rows] = read.of(place)
            routed[read.text_of(place) - 1] |= np.packbits(chosen)
    number = np.zeros(len(units), np.int64)
    for index, kind in enumerate(units.kinds):
        of_kind = units.kind == index
        seats, _ = places.seat(kind, units.layer[of_kind], units.neuron[of_kind])
        number[of_kind] = first.text_of(seats)
    owner = np.repeat(number, np.diff(units.units.indptr))
    _set(routed, owner[owner > 0] - 1, units.units.rows[owner > 0])
    return OwnTexts(number, routed, known)


def _set(bits: np.ndarray, row: np.ndarray, prefix: np.ndarray) -> None:
    """Set bits of u8[row byte], in the order of `np.packbits`."""
    np.bitwise_or.at(bits, (row, prefix // 8), (128 >> (prefix % 8)).astype(np.uint8))
