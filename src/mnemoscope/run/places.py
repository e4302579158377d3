"""The text of a run as bytes that can be searched, and its triggers by where they are.

`triggers` is sorted by neuron: who has a trigger at a place of the text is known only when all of it was read.
`ByPlace` is the same by place, for those who ask again and again; `atlas.index` makes it and keeps it. A run for which
it is not kept (`Run.once`) is searched by reading all of its triggers, with the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

TEXT, BY_PLACE = "text", "triggers by place"  # their names in `Run.once`
_BLOCK = 1 << 20  # bytes that are counted at a time


def spans(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """i64: the numbers of all spans [start, stop), one span after another."""
    sizes = stops - starts
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


@dataclass(frozen=True)
class WholeText:
    """The text of all contexts, one after another: as bytes, so that one search goes over all of it, and as tokens.

    text       u8[byte]      what the tokens spell
    tokens     i32[token]    their ids
    ends       i64[token]    where each token ends in the text
    counted    bool[token]   whether it is neither special nor the first of its context
    first      i64[context]  the first token of each context
    contexts   i64[context]  their ids, ascending
    documents  i64[context]  the document of each
    starts     i32[context]  where it starts in the tokens of its document
    """

    text: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray
    counted: np.ndarray
    first: np.ndarray
    contexts: np.ndarray
    documents: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, run: Run) -> WholeText:
        """Read it, once for each open run."""
        return run.once(TEXT, lambda: cls.read(run))

    @classmethod
    def read(cls, run: Run) -> WholeText:
        """Read it anew."""
        words = run.table("vocabulary").select("bytes", "special").collect()
        raw, special = words["bytes"].to_list(), words["special"].to_numpy()
        rows = run.table("contexts").collect()
        tokens = rows["tokens"].explode(empty_as_null=False).to_numpy()
        sizes = rows["tokens"].list.len().to_numpy().astype(np.int64)
        first = np.cumsum(sizes) - sizes
        counted = ~special[tokens]
        counted[first[sizes > 0]] = False
        lengths = np.array([len(piece) for piece in raw], np.int64)
        return cls(
            text=np.frombuffer(b"".join([raw[token] for token in tokens.tolist()]), np.uint8),
            tokens=tokens,
            ends=np.cumsum(lengths[tokens]),
            counted=counted,
            first=first,
            contexts=rows["context"].to_numpy(),
            documents=rows["document"].to_numpy(),
            starts=rows["start"].to_numpy(),
        )

    def rows(self, contexts: np.ndarray) -> np.ndarray | None:
        """i64: which contexts these are; None if one is not there."""
        rows = np.searchsorted(self.contexts, contexts)
        known = bool(np.all(rows < len(self.contexts))) and bool(np.all(self.contexts[rows] == contexts))
        return rows if known else None

    def written(self, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Of each of some contexts its document, where it starts there, its tokens."""
        after = self.first[np.minimum(rows + 1, len(self.first) - 1)]
        stops = np.where(rows + 1 < len(self.first), after, len(self.tokens))
        places = (self.documents[rows], self.starts[rows], self.first[rows], stops)
        for document, offset, start, stop in zip(*(place.tolist() for place in places), strict=True):
            yield document, offset, np.array(self.tokens[start:stop])

    def numbers(self, contexts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """i64: the numbers that the tokens at places have in the whole text."""
        return self.first[np.searchsorted(self.contexts, contexts)] + positions

    def places(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64 contexts and i32 positions: `numbers` undone."""
        number = np.searchsorted(self.first, tokens, side="right") - 1
        return self.contexts[number], (tokens - self.first[number]).astype(np.int32)

    def overlapped(self, wanted: bytes) -> np.ndarray:
        """i64, ascending: the tokens that an occurrence overlaps which lies within one context."""
        starts = self._occurrences(wanted)
        touched = np.searchsorted(self.ends, np.stack([starts, starts + len(wanted) - 1]), side="right")
        context = np.searchsorted(self.first, touched, side="right")
        begins, ends = touched[:, context[0] == context[1]]
        return np.unique(spans(begins, ends + 1))

    def _occurrences(self, wanted: bytes) -> np.ndarray:
        """i64: where the text has these bytes; the rarest of them is looked for first."""
        data, last = self.text, len(self.text) - len(wanted) + 1
        if last <= 0:
            return np.zeros(0, np.int64)
        rarest, *others = sorted(range(len(wanted)), key=lambda place: self._frequency[wanted[place]])
        starts = np.flatnonzero(data[rarest : rarest + last] == wanted[rarest])
        for place in others:
            starts = starts[data[starts + place] == wanted[place]]
        return starts

    @cached_property
    def _frequency(self) -> np.ndarray:
        """i64[byte]: how often each is in the text."""
        counts = np.zeros(256, np.int64)
        for start in range(0, len(self.text), _BLOCK):
            counts += np.bincount(self.text[start : start + _BLOCK], minlength=256)
        return counts


@dataclass(frozen=True)
class ByPlace:
    """The triggers of every neuron in the order of the text, and how long each list of them is.

    begins     i64[token + 1]  where the triggers at each token of `WholeText` begin
    sides      u32[trigger]    whose they are: `Cells.side`
    strengths  f32[trigger]    |coefficient|
    stored     i32[side]       triggers of each list
    weakest    f32[side]       the smallest |coefficient| of each list; NaN of an empty one
    """

    begins: np.ndarray
    sides: np.ndarray
    strengths: np.ndarray
    stored: np.ndarray
    weakest: np.ndarray

    def at(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many triggers there are at each of some tokens, and which rows of `sides` and `strengths` they are."""
        starts, stops = self.begins[tokens], self.begins[tokens + 1]
        return stops - starts, spans(starts, stops)

    def lists(self, run: Run) -> pl.DataFrame:
        """layer, neuron, polarity, stored, weakest of every list that is not empty, in the order of the run."""
        sides = np.flatnonzero(self.stored)
        layer, neuron = run.manifest.model.cells.place(sides // 2)
        columns = {
            "layer": layer.astype(np.int16),
            "neuron": neuron.astype(np.int32),
            "polarity": (1 - 2 * (sides % 2)).astype(np.int8),
            "stored": self.stored[sides].astype(np.uint32),
            "weakest": self.weakest[sides],
        }
        return pl.DataFrame(columns)
