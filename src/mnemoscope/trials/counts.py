"""Coefficients against patterns, counted in one pass: what the two-way test is made of.

A `CountingState` is a state of the loop (`mine.loop`). It hands each place of each batch (a layer, or in a mixture an
expert) to its parts, one for the neurons and one for each kind of null:

    CandidateCounts   discovery half: every unit against every pattern of a language, from which candidates come
    ThresholdCounts   discovery half: every candidate, from which the best and its threshold are chosen
    TestCounts        test half: everything about the claim that was chosen
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from mnemoscope.errors import RunError
from mnemoscope.mine import kernel
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.reading import fields_of, set_fields, share_out
from mnemoscope.mine.statistics import Below, load_state, save_state
from mnemoscope.model.capture import Coefficients, Inputs, LayerRows
from mnemoscope.model.nulls import LayerSignals, NullColumns, Nulls
from mnemoscope.records import NEURON, Cells, ContextBatch
from mnemoscope.trials import counting
from mnemoscope.trials.claims import Claims, ClaimsToTest
from mnemoscope.trials.masked_text import BatchMasks, MaskedText

MIDDLE = BINS // 2
SIDE = BINS - MIDDLE  # bins of the positive scores, and one for all others

_BLOCK = 128  # units, or claims, that a thread takes at a time
_ROWS = 128


@dataclass(frozen=True)
class LayerBatch:
    """One place of one batch for one kind of unit; of an expert the positions are those that were routed to it.

    columns  of any dtype and device; what is asked for is brought here
    """

    masks: BatchMasks
    columns: NullColumns

    @cached_property
    def values(self) -> np.ndarray:
        """f32[position unit]: coefficients."""
        return _matrix(self.columns.coefficients)

    @cached_property
    def bins(self) -> np.ndarray:
        """u8[row unit]: bins of the counted positions."""
        bins = np.empty((len(self.masks.rows), self.values.shape[1]), np.uint8)
        _share(
            lambda first, last: kernel.assign_bins(self.values, self.masks.rows, first, last, bins),
            len(bins), _ROWS,
        )  # fmt: skip
        return bins

    @cached_property
    def quadrant(self) -> np.ndarray:
        """u8[row unit]: sign quadrants of gate and up; empty if not gated."""
        if self.columns.gate is None or self.columns.up is None:
            return np.zeros((0, 0), np.uint8)
        gate, up = _matrix(self.columns.gate), _matrix(self.columns.up)
        quadrant = np.empty(self.bins.shape, np.uint8)
        _share(
            lambda first, last: counting.sign_quadrants(gate, up, self.masks.rows, first, last, quadrant),
            len(quadrant), _ROWS,
        )  # fmt: skip
        return quadrant


def _matrix(x: Tensor) -> np.ndarray:
    return x.detach().flatten(0, -2).contiguous().cpu().float().numpy()


def _share(work: Callable[[int, int], None], size: int, block: int = _BLOCK) -> None:
    """Work on ranges of `size`, in as many threads as torch has."""
    share_out(lambda first: work(first, min(first + block, size)), range(0, size, block))


class Counts(Protocol):
    """What a pass counts of one kind of unit."""

    FIELDS: ClassVar[tuple[str, ...]]

    def update(self, place: int, batch: LayerBatch) -> None:
        """Take in one place of one batch."""


class CandidateCounts:
    """Every unit against every column, active at its largest scores of either sign.

    both       u16[2 cell column]   active where the pattern is, by polarity (+1 first)
    by_stratum u16[2 cell stratum]  active by position and token frequency
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("both", "by_stratum")

    def __init__(self, cells: Cells, masked: MaskedText, columns: int, threshold: np.ndarray) -> None:
        """`threshold` i64[2 cell] is the score from which a unit is active, by polarity; `BINS` is never."""
        count = np.uint16 if masked.tokens < 2**16 else np.uint32
        self.cells, self.both = cells, np.zeros((2, len(cells), columns), count)
        self.by_stratum = np.zeros((2, len(cells), masked.strata), count)
        self._above, self._below = threshold[0], BINS - 1 - threshold[1]

    def update(self, place: int, batch: LayerBatch) -> None:
        """Count the counted positions."""
        patterns = batch.masks.patterns
        indptr, indices = patterns.indptr.astype(np.int64), patterns.indices.astype(np.int64)
        here = self.cells.of(place)
        arrays = batch.bins, indptr, indices, batch.masks.strata, self._above[here], self._below[here]
        both, by_stratum = self.both[:, here], self.by_stratum[:, here]
        _share(
            lambda start, stop: counting.active_by_column(*arrays, start, stop, both, by_stratum),
            batch.bins.shape[1], 32,
        )  # fmt: skip


def runs_of(places: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Each different place of an ascending i64[...], and where in it that begins and ends."""
    present, first = np.unique(places, return_index=True)
    yield from zip(present.tolist(), first.tolist(), [*first[1:].tolist(), len(places)], strict=True)


class ThresholdCounts:
    """Every candidate in the discovery half.

    totals           i32[cell bin]    histogram of the coefficient
    highest, lowest  u8[group cell]   bins of the extremes of each group of documents
    counts           u32[claim SIDE]  histogram of the positive scores where the pattern is
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("totals", "highest", "lowest", "counts")

    def __init__(self, cells: Cells, groups: int, claims: Claims) -> None:
        self.cells, self._claims = cells, claims
        self.totals = np.zeros((len(cells), BINS), np.int32)
        self.highest = np.zeros((groups, len(cells)), np.uint8)
        self.lowest = np.full((groups, len(cells)), BINS - 1, np.uint8)
        self.counts = np.zeros((len(claims), SIDE), np.uint32)

    def update(self, place: int, batch: LayerBatch) -> None:
        """Count the counted positions."""
        masks, claims, here = batch.masks, self._claims, self._claims.of(place)
        units = self.cells.of(place)
        bins, totals = batch.bins, self.totals[units]
        highest, lowest = self.highest[:, units], self.lowest[:, units]
        unit, polarity, column = claims.unit[here], claims.polarity[here], claims.column[here]

        def count_units(start: int, stop: int) -> None:
            kernel.count(bins, start, stop, totals)
            counting.group_extremes(bins, masks.groups, start, stop, highest, lowest)

        def count_claims(first: int, last: int) -> None:
            counting.score_histograms(
                bins,
                masks.indptr,
                masks.indices,
                unit,
                polarity,
                column,
                MIDDLE,
                first,
                last,
                self.counts[here],
            )

        _share(count_units, bins.shape[1])
        _share(count_claims, len(unit))

    def sides(self, claims: slice) -> np.ndarray:
        """i64[claim SIDE]: histogram of the positive scores of the units of some claims, all text."""
        every = self._claims
        totals = self.totals[self.cells.cell(every.place[claims], every.unit[claims])].astype(np.int64)
        totals = np.where(every.polarity[claims, None] > 0, totals, totals[:, ::-1])
        side = totals[:, MIDDLE:].copy()
        side[:, 0] += totals[:, :MIDDLE].sum(1)
        return side

    def documents(self, claims: slice) -> np.ndarray:
        """i64[claim SIDE]: groups of documents in which the unit reaches each of these scores."""
        every = self._claims
        places, units, positive = every.place[claims], every.unit[claims], every.polarity[claims] > 0
        documents = np.zeros((len(places), SIDE), np.int64)
        for place, first, last in runs_of(places):
            here = slice(first, last)
            cells = self.cells.cell(place, units[here])
            highest, lowest = self.highest[:, cells], self.lowest[:, cells]
            peak = np.where(positive[here], highest, BINS - 1 - lowest.astype(np.int64)) - MIDDLE
            cell = np.maximum(peak, 0) + SIDE * np.arange(last - first)
            counts = np.bincount(cell.ravel(), minlength=SIDE * (last - first)).reshape(-1, SIDE)
            documents[here] = np.cumsum(counts[:, ::-1], 1)[:, ::-1]
        return documents


class TestCounts:
    """Everything about the chosen claims in the test half.

    totals             i32[cell bin]           histogram of the coefficient
    total, squares     f64[cell]               sums of the coefficient and of its square
    counts             u32[claim bin]          histogram of the coefficient where the pattern is
    among              f64[claim]              sum of the coefficient there
    both, active       u16[claim group]        active where the pattern is, and anywhere
    quadrants_both, quadrants_active  i64[claim 4]  the same two by sign quadrant
    table, table_both  i64[claim]              positions in the baseline table, and active
    other, other_both  i64[claim]              positions of the other unit's pattern, and active
    sums               f32[...]                sum of the coefficient where each pattern of a place is (`patterns`)
    expected           f32[expecting group]    shares of the pattern at the position and frequency of active tokens
    gated              bool[1]                 whether there were signs of gate and up to count
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "totals", "total", "squares", "counts", "among", "both", "active", "quadrants_both", "quadrants_active",
        "table", "table_both", "other", "other_both", "sums", "expected", "gated",
    )  # fmt: skip

    def __init__(
        self,
        cells: Cells,
        masked: MaskedText,
        chosen: ClaimsToTest,
        patterns: tuple[np.ndarray, ...],
        expecting: np.ndarray | None = None,
    ) -> None:
        """`patterns` are the columns i64[...] of each place that every unit of the place is measured against,
        `expecting` i64[...] the claims (ascending) of which is asked what chance would give."""
        self.expecting = np.zeros(0, np.int64) if expecting is None else expecting
        self.cells, self.chosen, self._patterns = cells, chosen, patterns
        self._sums = Cells(tuple(len(columns) * cells.sizes[place] for place, columns in enumerate(patterns)))
        claims, groups = chosen.claims, masked.groups
        largest = int(np.bincount(masked.group, minlength=1).max())
        count = np.uint16 if largest < 2**16 else np.uint32
        self.totals = np.zeros((len(cells), BINS), np.int32)
        self.total, self.squares = np.zeros((2, len(cells)))
        self.counts = np.zeros((len(claims), BINS), np.uint32)
        self.among = np.zeros(len(claims))
        self.both, self.active = np.zeros((2, len(claims), groups), count)
        self.quadrants_both, self.quadrants_active = np.zeros((2, len(claims), 4), np.int64)
        self.table, self.table_both, self.other, self.other_both = np.zeros((4, len(claims)), np.int64)
        self.sums = np.zeros(len(self._sums), np.float32)
        self.gated = np.zeros(1, bool)
        positive = claims.polarity > 0
        self._masked, self._rate_of = masked, np.zeros(len(self.expecting), np.int64)
        self._rates: dict[int, np.ndarray] = {}
        of_text = masked.text_of(claims.place[self.expecting])
        for text, first in zip(*np.unique(of_text, return_index=True), strict=True):
            asked = np.flatnonzero(of_text == text)
            columns, self._rate_of[asked] = np.unique(
                claims.column[self.expecting[asked]], return_inverse=True
            )
            self._rates[int(text)] = masked.of(int(claims.place[self.expecting[first]])).rates(columns)
        self.expected = np.zeros((len(self.expecting), groups), np.float32)
        self._low = np.where(positive, chosen.threshold, 0).astype(np.uint8)
        self._high = np.where(positive, BINS - 1, BINS - 1 - chosen.threshold).astype(np.uint8)

    def patterns(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The columns i64[pattern] of a place, and the sums f32[pattern unit] over them."""
        columns = self._patterns[place]
        return columns, self.sums[self._sums.of(place)].reshape(len(columns), self.cells.sizes[place])

    def update(self, place: int, batch: LayerBatch) -> None:
        """Count the counted positions."""
        masks, chosen, here = batch.masks, self.chosen, self.chosen.claims.of(place)
        bins, quadrant, gated = batch.bins, batch.quadrant, batch.columns.gate is not None
        self.gated[0] |= gated
        claims, threshold = chosen.claims, chosen.threshold[here]
        unit, polarity, column = claims.unit[here], claims.polarity[here], claims.column[here]
        starts, other = chosen.starts[here.start : here.stop + 1], chosen.other[here]
        # Without another unit there are no columns to compare with.
        others, other_starts = other[other >= 0], np.concatenate([[0], np.cumsum(other >= 0)])
        columns, sums = self.patterns(place)
        units = self.cells.of(place)
        totals, total, squares = self.totals[units], self.total[units], self.squares[units]

        def count_units(start: int, stop: int) -> None:
            kernel.count(bins, start, stop, totals)
            counting.power_sums(batch.values, masks.rows, start, stop, total, squares)

        def count_claims(first: int, last: int) -> None:
            counting.active_by_group(
                bins, quadrant, gated, masks.groups, unit, self._low[here], self._high[here], first, last,
                self.active[here], self.quadrants_active[here],
            )  # fmt: skip
            counting.present_histograms(
                bins, batch.values, masks.rows, quadrant, gated, masks.groups, masks.indptr, masks.indices,
                unit, polarity, column, threshold, first, last,
                self.counts[here], self.among[here], self.both[here], self.quadrants_both[here],
            )  # fmt: skip
            for begins, compared, shown, both in (
                (starts, chosen.columns, self.table, self.table_both),
                (other_starts, others, self.other, self.other_both),
            ):
                counting.rows_in_columns(
                    bins, masks.indptr, masks.indices, unit, polarity, threshold, begins, compared, first, last,
                    shown[here], both[here],
                )  # fmt: skip

        def add_patterns(first: int, last: int) -> None:
            counting.sums_where_present(
                batch.values, masks.rows, masks.indptr, masks.indices, columns, first, last, sums
            )

        asked = slice(*np.searchsorted(self.expecting, [here.start, here.stop]).tolist())
        asked_claims = self.expecting[asked]

        def add_expected(first: int, last: int) -> None:
            rates = self._rates[int(self._masked.text_of(place))]
            counting.expected_by_group(
                bins, masks.groups, masks.strata, rates, claims.unit[asked_claims], self._low[asked_claims],
                self._high[asked_claims], self._rate_of[asked], first, last, self.expected[asked],
            )  # fmt: skip

        _share(count_units, bins.shape[1])
        _share(count_claims, len(unit))
        _share(add_patterns, len(columns), _ROWS)
        _share(add_expected, len(asked_claims))


class CountingState:
    """A state of the loop: what is counted of each kind of unit, and the shards that were.

    places  by layer and which of its groups runs (`groups.UnitPlaces`): its number among the places that are counted
    """

    def __init__(
        self,
        masked: MaskedText,
        nulls: Nulls | None,
        parts: Mapping[str, Counts],
        places: Mapping[tuple[int, int], int],
    ) -> None:
        self.parts, self._masked, self._nulls, self._places = dict(parts), masked, nulls, places
        self._shards: set[int] = set()

    @property
    def shards(self) -> frozenset[int]:
        """The shards that are finished or loaded."""
        return frozenset(self._shards)

    def update(
        self,
        layer: int,
        coefficients: Coefficients,
        batch: ContextBatch,
        gate: Coefficients | None,
        up: Coefficients | None,
        inputs: Inputs,
    ) -> None:
        """Take in one layer of one batch: a `Receiver`."""
        self._take(layer, LayerSignals(inputs, coefficients, gate, up), batch, self._masked.of_batch(batch))

    def update_rows(self, rows: LayerRows, batch: ContextBatch) -> None:
        """Take in experts of one batch, each over the tokens that were routed to it: a `RoutedReceiver`."""
        for piece in rows.each():
            masks = self._masked.of_batch(batch)
            if piece.rows is not None:
                place = self._places[piece.layer, piece.group]
                masks = self._masked.of_rows(batch, place, piece.rows.cpu().numpy())
            signals = LayerSignals(piece.inputs, piece.coefficients, piece.gate, piece.up, piece.group)
            self._take(piece.layer, signals, batch, masks)

    def _take(self, layer: int, signals: LayerSignals, batch: ContextBatch, masks: BatchMasks) -> None:
        place = self._places[layer, signals.group]
        columns = {NEURON: NullColumns(signals.coefficients, signals.gate, signals.up)}
        if self._nulls is not None:
            columns |= self._nulls.columns(layer, batch, signals)
        for kind, counts in self.parts.items():
            counts.update(place, LayerBatch(masks, columns[kind]))

    def finish_shard(self, shard: int) -> None:
        """All batches of a shard have been given; RunError when it was in already."""
        if shard in self._shards:
            raise RunError(f"counting patterns: shard {shard} was counted before")
        self._shards.add(shard)

    def merge(self, other: Any) -> None:
        """One process counts: its sums are of floats, and stay in the order of the text."""
        raise RunError("counting patterns: tallies are not merged; use one process")

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all."""
        arrays = {
            f"{kind}/{name}": array
            for kind, counts in self.parts.items()
            for name, array in fields_of(counts).items()
        }
        save_state(path, arrays | {"shards": np.array(sorted(self._shards), np.int64)})

    def restore(self, path: Path) -> CountingState:
        """Become what was saved; RunCorrupt when the file is not whole or of another shape."""

        def read(state: Mapping[str, np.ndarray]) -> CountingState:
            for kind, counts in self.parts.items():
                set_fields(counts, Below(state, f"{kind}/"))
            self._shards = set(state["shards"].tolist())
            return self

        return load_state(path, read)
