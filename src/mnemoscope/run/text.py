"""All prefixes of a corpus as flat arrays, in the order of contexts and positions.

A *row* is one prefix: a context up to and including one position. What a pattern may look at is the row itself
and the rows before it in its context; only the family of the next token looks one row ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.errors import QueryError
from mnemoscope.text import sampling
from mnemoscope.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run
    from mnemoscope.text.words import Words

WINDOW = 256  # characters of a prefix that a regex sees


class Spelled(NamedTuple):
    """Contexts as one text: what token `i` adds is `text[ends[i] : ends[i + 1]]`."""

    text: str
    ends: np.ndarray  # i64[prefix + 1]


@dataclass(frozen=True)
class Text:
    """Prefixes of some contexts.

    tokens    i32[prefix]     the last token of the prefix
    context   i64[prefix]     its context
    position  i32[prefix]     its 0-based position there
    document  i64[prefix]     its document
    counted   bool[prefix]    whether statistics are taken here: not position 0, not a special token
    contexts  i64[context]    ids of the contexts, ascending
    starts    i64[context+1]  the first row of each context, and the number of rows
    whole     i64[token]      how often each token is counted in the text that this is a part of; None for a whole one
    """

    tokens: np.ndarray
    context: np.ndarray
    position: np.ndarray
    document: np.ndarray
    counted: np.ndarray
    contexts: np.ndarray
    starts: np.ndarray
    vocabulary: Vocabulary
    whole: np.ndarray | None = None

    @classmethod
    def of(cls, run: Run, contexts: Sequence[int] | None = None) -> Text:
        """The prefixes of all contexts of a run, or of some; `QueryError` if there is no such context."""
        table = run.table("contexts").select("context", "document", "tokens")
        if contexts is not None:
            wanted = pl.Series(np.unique(np.asarray(contexts, np.int64)))
            table = table.filter(pl.col("context").is_in(wanted.implode()))
        frame = table.collect()
        if contexts is not None and len(frame) < len(wanted):
            lost = np.setdiff1d(wanted.to_numpy(), frame["context"].to_numpy())[0]
            raise QueryError(f"reading context {lost}: the run has none of that number")
        lengths = frame["tokens"].list.len().to_numpy().astype(np.int64)
        flat = frame["tokens"].explode().drop_nulls().to_numpy().astype(np.int32)
        return cls._flat(
            frame["context"].to_numpy(), frame["document"].to_numpy(), lengths, flat, run.vocabulary
        )

    @classmethod
    def build(
        cls,
        contexts: Iterable[tuple[int, int, Sequence[int] | np.ndarray]],
        vocabulary: Vocabulary,
        special: Sequence[int] | None = None,
    ) -> Text:
        """From (context, document, token ids), contexts in ascending order; `special` tokens do not count
        (by default those of the vocabulary)."""
        rows = list(contexts)
        lengths = np.array([len(tokens) for *_, tokens in rows], np.int64)
        flat = np.concatenate(
            [np.asarray(tokens, np.int32) for *_, tokens in rows] or [np.zeros(0, np.int32)]
        )
        ids = np.array([row[0] for row in rows], np.int64)
        documents = np.array([row[1] for row in rows], np.int64)
        return cls._flat(ids, documents, lengths, flat, vocabulary, special)

    @classmethod
    def _flat(
        cls,
        contexts: np.ndarray,
        documents: np.ndarray,
        lengths: np.ndarray,
        tokens: np.ndarray,
        vocabulary: Vocabulary,
        special: Sequence[int] | None = None,
    ) -> Text:
        assert (np.diff(contexts) > 0).all(), "contexts must ascend"
        assert not len(tokens) or 0 <= tokens.min() <= tokens.max() < len(vocabulary), (
            "tokens not in vocabulary"
        )
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        position = (np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)).astype(np.int32)
        never = np.flatnonzero(vocabulary.special) if special is None else np.asarray(special, np.int64)
        return cls(
            tokens=tokens,
            context=np.repeat(contexts, lengths),
            position=position,
            document=np.repeat(documents, lengths),
            counted=(position > 0) & ~np.isin(tokens, never),
            contexts=contexts,
            starts=starts,
            vocabulary=vocabulary,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, contexts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """i64[...]: the rows of (context, position); `QueryError` if one is not here."""
        contexts, positions = np.asarray(contexts, np.int64), np.asarray(positions, np.int64)
        place = np.searchsorted(self.contexts, contexts)
        known = place < len(self.contexts)
        place = np.where(known, place, 0)
        if len(self.contexts):
            known &= self.contexts[place] == contexts
            found = self.starts[place] + positions
            known &= (positions >= 0) & (found < self.starts[place + 1])
        if not known.all():
            first = int(np.argmin(known))
            raise QueryError(
                f"looking up context {contexts.flat[first]}, position {positions.flat[first]}: not among the "
                f"{len(self.contexts)} contexts of this text; give contexts of the run, positions within them"
            )
        return found if len(self.contexts) else np.zeros(contexts.shape, np.int64)

    def part(self, documents: np.ndarray) -> tuple[Text, np.ndarray]:
        """The text of some documents alone, and i64[its prefix]: which row of this text each row of it is."""
        return self.cut(np.isin(self.documents, documents))

    @cached_property
    def documents(self) -> np.ndarray:
        """i64[context]: the document of each context."""
        return np.asarray(self.document[np.minimum(self.starts[:-1], max(len(self) - 1, 0))])

    def within(self, documents: np.ndarray, budget: int) -> np.ndarray:
        """bool[context]: the leading contexts of some documents that a budget of tokens reads, those given first before
        others (`sampling.share`)."""
        lengths, order = np.diff(self.starts), np.argsort(self.documents, kind="stable")
        ids, starts = np.unique(self.documents[order], return_index=True)
        held = dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=True))
        contexts = [held[document] for document in documents.tolist()]
        counts = sampling.share([lengths[places] for places in contexts], budget)
        chosen = np.zeros(len(lengths), bool)
        for places, count in zip(contexts, counts.tolist(), strict=True):
            chosen[places[:count]] = True
        return chosen

    def cut(self, contexts: np.ndarray) -> tuple[Text, np.ndarray]:
        """As `part`, of the contexts of a mask bool[context]."""
        chosen = contexts & (np.diff(self.starts) > 0)
        rows = np.flatnonzero(np.repeat(chosen, np.diff(self.starts)))
        lengths = np.diff(self.starts)[chosen]
        part = Text(
            tokens=self.tokens[rows],
            context=self.context[rows],
            position=self.position[rows],
            document=self.document[rows],
            counted=self.counted[rows],
            contexts=self.contexts[chosen],
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            vocabulary=self.vocabulary,
            whole=self.frequency,
        )
        return part, rows

    @cached_property
    def frequency(self) -> np.ndarray:
        """i64[token]: how often each token is counted, in the whole text where this is a part of one."""
        if self.whole is not None:
            return self.whole
        return np.bincount(self.tokens[self.counted], minlength=len(self.vocabulary))

    @cached_property
    def first(self) -> np.ndarray:
        """i64[prefix]: the row where its context starts."""
        return np.asarray(np.arange(len(self)) - self.position)

    @cached_property
    def end(self) -> np.ndarray:
        """i64[prefix]: one past the last row of its context."""
        return np.repeat(self.starts[1:], np.diff(self.starts))

    @cached_property
    def words(self) -> Words:
        """The words of the text, aligned with its tokens."""
        from mnemoscope.text.words import align

        return align(self)

    @cached_property
    def spelled(self) -> Spelled:
        """All contexts as one text without special tokens, and where each prefix ends in it."""
        tokens = self.words.tokens
        pieces = [tokens.texts[place] for place in tokens.places.tolist()]
        broken = tokens.flags(
            lambda piece: "⟨" in piece
        )  # parts of characters, completed by their neighbours
        for place in np.unique(np.searchsorted(self.starts, np.flatnonzero(broken), "right") - 1).tolist():
            start, stop = self.starts[place], self.starts[place + 1]
            whole = self.vocabulary.pieces(self.tokens[start:stop].tolist())
            pieces[start:stop] = [
                piece if tokens.texts[place] else ""
                for piece, place in zip(whole, tokens.places[start:stop], strict=True)
            ]
        ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))])
        return Spelled("".join(pieces), ends)

    def prefix(self, row: int, characters: int = WINDOW) -> str:
        """The last characters of a prefix as text."""
        text, ends = self.spelled
        stop = int(ends[row + 1])
        return text[max(int(ends[row - self.position[row]]), stop - characters) : stop]
