"""What goes into the items of a sheet: neurons, hidden nulls of three kinds, and matched distractors.

Prefixes of one item come from different documents, always: two of one document share more than chance allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.annotation.key import NULLS, Kind, Prefix
from mnemoscope.errors import SheetError
from mnemoscope.run.text import Text

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SHARE = 0.275  # of the items are null
LEAST_NEURONS = 8  # below, there is no room for a null item of each kind
LEAST = 3  # prefixes that a pattern needs (A5)
LEAST_PREFIXES = 5  # in each half of an item
_UNITS = 400  # that are read, at least: neurons, and what mixed items are made of
_TRIES = 64  # draws before a coarser match is taken
_ADDRESS = ("layer", "neuron", "polarity")


@dataclass(frozen=True)
class Unit:
    """Triggers of one neuron or null direction, one of a document, strongest first."""

    address: tuple[int, int, int]
    rows: np.ndarray  # i64[trigger] of the text
    ranks: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True)
class DrawnItem:
    """One item before it is written: prefixes with their rows of the text."""

    kind: Kind
    address: tuple[int, int, int] | None
    annotate: list[tuple[int, Prefix]]
    apply: list[tuple[int, Prefix]]


def items(run: Run, text: Text, neurons: int, prefixes: int, random: np.random.Generator) -> list[DrawnItem]:
    """`neurons` items of neurons with a polarity and 25 to 30 % null items, in random order.

    prefixes  in each half of an item, at most; fewer where the run keeps fewer triggers from different documents
    """
    if neurons < LEAST_NEURONS:
        raise SheetError(
            f"making an annotation sheet of {neurons} neurons: with so few there is no room for hidden null items; "
            f"take {LEAST_NEURONS} or more"
        )
    if prefixes < LEAST_PREFIXES:
        raise SheetError(
            f"making an annotation sheet with {prefixes} prefixes in each half: take {LEAST_PREFIXES} or more"
        )
    units = _neurons(run, text, neurons, random)
    prefixes = min(prefixes, int(np.median([len(unit.rows) for unit in units])) // 2)
    full = [index for index, unit in enumerate(units) if len(unit.rows) >= 2 * prefixes]
    if prefixes < LEAST_PREFIXES or len(full) <= neurons:
        raise SheetError(
            f"making an annotation sheet of {neurons} neurons: of {len(units)} neurons and polarities, {len(full)} "
            f"have {2 * max(prefixes, LEAST_PREFIXES)} triggers in different documents; ask for fewer than "
            "{neurons}, or build the run on more documents",
            neurons=neurons,
        )
    chosen, spare = full[:neurons], [units[index] for index in full[neurons:]]
    others = [unit for index, unit in enumerate(units) if index not in set(chosen)]
    match = Matcher(text, random)
    sources: list[tuple[Kind, Unit]] = [("neuron", units[index]) for index in chosen]
    sources += _nulls(run, text, neurons, 2 * prefixes, spare, others, match, random)
    drawn = [_item(kind, unit, prefixes, text, match, random) for kind, unit in sources]
    return [drawn[index] for index in random.permutation(len(drawn))]


def null_items(neurons: int) -> int:
    """How many hidden null items stand beside so many neurons."""
    return round(neurons * SHARE / (1 - SHARE))


def _neurons(run: Run, text: Text, neurons: int, random: np.random.Generator) -> list[Unit]:
    """Random neurons with a random polarity each, those without triggers left out, in random order."""
    cells = run.manifest.model.cells
    layer, neuron = cells.place(random.permutation(len(cells))[: max(_UNITS, 8 * neurons)])
    frame = pl.DataFrame(
        {
            "layer": pl.Series(layer, dtype=pl.Int16),
            "neuron": pl.Series(neuron, dtype=pl.Int32),
            "polarity": pl.Series(random.choice([1, -1], len(layer)), dtype=pl.Int8),
            "order": pl.Series(np.arange(len(layer))),
        }
    )
    triggers = run.table("triggers").join(frame.lazy(), on=_ADDRESS, how="inner").collect()
    # A neuron that is never negative has but one polarity; the other one is simply not there.
    return _units(triggers.sort("order", "rank"), text)


def _units(triggers: pl.DataFrame, text: Text) -> list[Unit]:
    rows = text.rows(triggers["context"].to_numpy(), triggers["position"].to_numpy())
    single = (
        triggers.with_columns(row=pl.Series(rows), document=pl.Series(text.document[rows]))
        .unique([*_ADDRESS, "document"], keep="first", maintain_order=True)
        .partition_by(*_ADDRESS, maintain_order=True)
    )
    return [
        Unit(
            triggers_of_unit.select(_ADDRESS).row(0),
            *(triggers_of_unit[name].to_numpy() for name in ("row", "rank", "coefficient")),
        )
        for triggers_of_unit in single
    ]


def _nulls(
    run: Run,
    text: Text,
    neurons: int,
    size: int,
    spare: Sequence[Unit],
    others: Sequence[Unit],
    match: Matcher,
    random: np.random.Generator,
) -> list[tuple[Kind, Unit]]:
    directions = [unit for unit in _directions(run, text) if len(unit.rows) >= size]
    kinds = [kind for kind in NULLS if kind != "direction" or directions]
    made: list[tuple[Kind, Unit]] = []
    for number in range(null_items(neurons)):
        kind = kinds[number % len(kinds)]
        if kind == "random":
            template = spare[int(random.integers(len(spare)))]
            made.append((kind, _bare(list(match.elsewhere(template.rows[:size])))))
        elif kind == "direction":
            made.append((kind, directions.pop(int(random.integers(len(directions))))))
            kinds = kinds if directions else [other for other in kinds if other != "direction"]
        else:
            made.append((kind, _bare(_mixed(others, size, text, random))))
    return made


def _directions(run: Run, text: Text) -> list[Unit]:
    """Random directions of the run, if it carries them."""
    if "null_triggers" not in run.manifest.tables:
        return []
    triggers = run.table("null_triggers").filter(pl.col("kind") == "random").collect()
    return _units(triggers.sort(*_ADDRESS, "rank"), text)


def _bare(rows: list[int]) -> Unit:
    nothing = np.full(len(rows), -1)
    return Unit((-1, -1, 0), np.array(rows), nothing, nothing)


def _mixed(units: Sequence[Unit], size: int, text: Text, random: np.random.Generator) -> list[int]:
    """Triggers of many neurons, from different documents; of none so many that its own pattern would count."""
    rows: list[int] = []
    seen: set[int] = set()
    for index in np.concatenate([random.permutation(len(units)) for _ in range(LEAST - 1)]):
        free = [row for row in units[index].rows.tolist() if int(text.document[row]) not in seen]
        if free and len(rows) < size:
            rows.append(free[random.integers(len(free))])
            seen.add(int(text.document[rows[-1]]))
    if len(rows) < size:
        raise SheetError(
            f"making an annotation sheet: triggers of {len(units)} neurons do not fill a mixed item of {size} prefixes "
            "from different documents; take fewer neurons, or build the run on more documents"
        )
    return rows


def _item(
    kind: Kind, unit: Unit, prefixes: int, text: Text, match: Matcher, random: np.random.Generator
) -> DrawnItem:
    """The strongest triggers in two random halves, the second among as many distractors."""
    order = random.permutation(2 * prefixes)
    real = kind in ("neuron", "direction")

    def prefix(index: int) -> tuple[int, Prefix]:
        row = int(unit.rows[index])
        rank, coefficient = int(unit.ranks[index]), float(unit.coefficients[index])
        return row, Prefix(
            context=int(text.context[row]),
            position=int(text.position[row]),
            rank=rank if real else None,
            coefficient=coefficient if real else None,
        )

    held_out = [prefix(index) for index in order[prefixes:]]
    distractors = [
        (row, Prefix(context=int(text.context[row]), position=int(text.position[row]), source=False))
        for row in match.like([row for row, _ in held_out], unit.rows)
    ]
    both = held_out + distractors
    return DrawnItem(
        kind,
        unit.address if real else None,
        [prefix(index) for index in order[:prefixes]],
        [both[index] for index in random.permutation(len(both))],
    )


class Matcher:
    """Draws ordinary prefixes that resemble given ones in where they end."""

    def __init__(self, text: Text, random: np.random.Generator) -> None:
        self._text, self._random = text, random
        self._rows = np.flatnonzero(text.counted)
        tokens, position = text.tokens[self._rows], text.position[self._rows]
        often = np.bincount(tokens, minlength=1)
        # Octaves of how often the last token occurs, and of the position.
        self._octave = np.floor(np.log2(np.maximum(often, 1))).astype(np.int64)
        frequency, octave = self._octave[tokens], np.log2(np.maximum(position, 1)).astype(np.int64)
        self._levels = [
            _Strata(frequency * 64 + octave),
            _Strata(frequency),
            _Strata(np.zeros(len(self._rows), np.int64)),
        ]
        self._positions = _Strata(position.astype(np.int64))

    def like(self, rows: Sequence[int], avoid: np.ndarray) -> Iterator[int]:
        """For each row another of like token frequency and position, from documents that are none of these."""
        text = self._text
        seen = set(text.document[np.concatenate([np.asarray(rows, np.int64), avoid])].tolist())
        for row in rows:
            frequency = int(self._octave[text.tokens[row]])
            octave = int(np.log2(max(int(text.position[row]), 1)))
            yield self._draw([frequency * 64 + octave, frequency, 0], self._levels, seen)

    def elsewhere(self, rows: np.ndarray) -> Iterator[int]:
        """For each row a random one at the same position, each from another document."""
        seen: set[int] = set()
        for row in rows.tolist():
            codes, strata = [int(self._text.position[row]), 0], [self._positions, self._levels[-1]]
            yield self._draw(codes, strata, seen)

    def _draw(self, codes: Sequence[int], strata: Sequence[_Strata], seen: set[int]) -> int:
        for code, level in zip(codes, strata, strict=True):
            members = level.members(code)
            for _ in range(_TRIES if len(members) else 0):
                row = int(self._rows[members[self._random.integers(len(members))]])
                document = int(self._text.document[row])
                if document not in seen:
                    seen.add(document)
                    return row
        raise SheetError(
            f"making an annotation sheet: {len(np.unique(self._text.document))} documents are too few for prefixes "
            "that all come from different ones; build the run on more documents"
        )


class _Strata:
    """Places grouped by a code."""

    def __init__(self, codes: np.ndarray) -> None:
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def members(self, code: int) -> np.ndarray:
        start, stop = np.searchsorted(self._codes, [code, code + 1])
        return self._order[start:stop]
