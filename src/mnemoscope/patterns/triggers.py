"""What a search takes and gives: units with their triggers, the options, and the columns of a candidate.

A unit is a neuron of either polarity, or a pseudo-neuron of a null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.errors import PatternError
from mnemoscope.patterns.language import Limits
from mnemoscope.patterns.space import BACKGROUND, MOST
from mnemoscope.records import MAIN, NEURON, NEXT, POSITION
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import half

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LEAST = 8  # documents in each half

FOUND: dict[str, Any] = {
    "unit": pl.Int64,
    "tests": pl.String,
    "rank": pl.Int16,
    "role": pl.String,
    "spec": pl.String,
    "name": pl.String,
    "family": pl.String,
    "kind": pl.String,
    "complexity": pl.Int16,
    "n": pl.Int32,
    "hits": pl.Int32,
    "base_rate": pl.Float64,
    "p": pl.Float64,
    "p_family": pl.Float64,
    "equivalents": pl.List(pl.String),
}

_UNIT = ("kind", "layer", "neuron", "polarity")


@dataclass(frozen=True)
class Options:
    """How to search.

    tests             families of tests, each with p-values of its own
    draws             drawn sets in the null of each group of units
    covering          patterns of a unit, each found in what the earlier ones leave unexplained
    alternatives      further candidates: other readings of the same triggers, for the two-way test to choose from
    background        prefixes that rates are taken from, at most
    split             search in the discovery half alone
    one_per_document  of several triggers in a document, take the strongest
    stratify          take chance at the position and the token frequency of each trigger (N1), not overall (N0)
    threads           that search at once; what they find is the same for any number

    `split` to `stratify` are protections; without any of them the p-values are wrong (tests show how wrong).
    """

    tests: tuple[str, ...] = (MAIN, NEXT, POSITION)
    draws: int = 2000
    covering: int = 3
    alternatives: int = 2
    limits: Limits = field(default_factory=Limits)
    background: int = BACKGROUND
    split: bool = True
    one_per_document: bool = True
    stratify: bool = True
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Units:
    """Triggers of units as rows of a text, strongest first: those of unit i are `rows[indptr[i] : indptr[i + 1]]`."""

    indptr: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, triggers: Sequence[Sequence[int] | np.ndarray]) -> Units:
        """Make units from one list of rows for each."""
        sizes = [len(rows) for rows in triggers]
        flat = [np.asarray(rows, np.int64) for rows in triggers]
        return cls(np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([*flat, np.zeros(0, np.int64)]))

    def __len__(self) -> int:
        return len(self.indptr) - 1


@dataclass(frozen=True)
class Addressed:
    """Units with their addresses, sorted by kind (the neurons first), layer, neuron, polarity (+1 first).

    kinds     names; `kind` i64[unit] indexes them
    layer, neuron, polarity   i64[unit]
    units     their triggers, strongest first
    """

    kinds: tuple[str, ...]
    kind: np.ndarray
    layer: np.ndarray
    neuron: np.ndarray
    polarity: np.ndarray
    units: Units

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class OwnTexts:
    """Which prefixes each unit runs on: all of a text, or, in a mixture of experts, those routed to its expert.

    text    i64[unit]      0 is all of it; number t is that of row t - 1 of `routed`
    routed  u8[text byte]  the prefixes of each, eight to a byte (`np.packbits`)
    known   bool[prefix]   of which it is known where they were routed; None for all. Others are routed nowhere, but for
                           the triggers of an expert's units
    """

    text: np.ndarray
    routed: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    known: np.ndarray | None = None

    @classmethod
    def whole(cls, units: int) -> OwnTexts:
        """Of units that all run everywhere."""
        return cls(np.zeros(units, np.int64))

    def split(self, units: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Units by their text: which of `units` i64[...] they are, ascending, and bool[row] which of `rows` of the text
        they run on, None for all. Those of the whole text come first."""
        number = self.text[units]
        order = np.argsort(number, kind="stable")
        present, first = np.unique(number[order], return_index=True)
        for text, members in zip(present.tolist(), np.split(order, first)[1:], strict=True):
            yield members, self.of(text)[rows] if text else None

    def of(self, text: int) -> np.ndarray:
        """bool[prefix]: those of a text that is not the whole; longer than it by what fills the last byte."""
        return np.unpackbits(self.routed[text - 1]).astype(bool)


def addressed(run: Run, text: Text) -> Addressed:
    """All units of a run that have a trigger; `text` is the whole of the run's."""
    columns = ["layer", "neuron", "polarity", "rank", "context", "position"]
    parts = [run.table("triggers").select(pl.lit(NEURON).alias("kind"), *columns)]
    if "null_triggers" in run.manifest.tables:
        parts.append(run.table("null_triggers").select("kind", *columns))
    frame = pl.concat(parts).collect()
    kinds = (NEURON, *sorted(set(frame["kind"].unique()) - {NEURON}))
    frame = frame.with_columns(
        kind=pl.col("kind").replace_strict(kinds, range(len(kinds)), return_dtype=pl.Int64)
    ).sort(*_UNIT, "rank", descending=[False, False, False, True, False])
    address = frame.select(*_UNIT).to_numpy().astype(np.int64)
    first = np.flatnonzero(np.any(np.diff(address, axis=0, prepend=address[:1] - 1), axis=1))
    rows = text.rows(frame["context"].to_numpy(), frame["position"].to_numpy())
    kind, layer, neuron, polarity = address[first].T
    return Addressed(kinds, kind, layer, neuron, polarity, Units(np.append(first, len(frame)), rows))


def halves(documents: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the documents to discover on and of those to test on, ascending; `PatternError` if either half
    has fewer than `LEAST`."""
    ids = np.unique(documents)
    test = half(ids, seed)
    if min(test.sum(), (~test).sum()) < LEAST:
        raise PatternError(
            f"splitting {len(ids)} documents into one half to discover on ({(~test).sum()}) and one to test on "
            f"({test.sum()}): each needs at least {LEAST}; build the run on more documents"
        )
    return ids[~test], ids[test]


def half_triggers(
    text: Text, units: Units, options: Options, *, test: bool
) -> tuple[Text, np.ndarray, np.ndarray]:
    """The text of one half of the documents, i64[unit, slot] the rows of the triggers there, and i64[prefix] which row
    of the text each of its prefixes is; the whole text when it is not split.

    `PatternError` if it has too few documents.
    """
    documents = halves(text.document[text.counted])[int(test)] if options.split else np.unique(text.document)
    half_text, rows = text.part(documents)
    back = np.full(len(text), -1)
    back[rows] = np.arange(len(rows))
    slots = one_each(half_text, units, back[units.rows], one_per_document=options.one_per_document)
    return half_text, slots, rows


def one_each(text: Text, units: Units, rows: np.ndarray, *, one_per_document: bool = True) -> np.ndarray:
    """i64[unit, slot]: the strongest triggers of each unit in different documents, at most 64; -1 is none.

    rows   the triggers as rows of `text`, -1 for one that is not in it
    """
    owner = np.repeat(np.arange(len(units)), np.diff(units.indptr))
    ok = rows >= 0
    ok[ok] = text.counted[rows[ok]]
    owner, rows = owner[ok], rows[ok]
    if one_per_document and len(rows):
        order = np.lexsort((np.arange(len(rows)), text.document[rows], owner))
        new = np.ones(len(rows), bool)
        same = text.document[rows[order]]
        new[1:] = (owner[order][1:] != owner[order][:-1]) | (same[1:] != same[:-1])
        first = np.sort(order[new])
        owner, rows = owner[first], rows[first]
    slot = np.arange(len(rows)) - np.searchsorted(owner, np.arange(len(units)))[owner]
    kept = slot < MOST
    out = np.full((len(units), int(min(slot.max(initial=-1) + 1, MOST))), -1)
    out[owner[kept], slot[kept]] = rows[kept]
    return out
