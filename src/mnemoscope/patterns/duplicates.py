"""Documents that are nearly copies of each other: for everything that is asked of patterns they are one document.

Copies with a few words changed lie in both halves, and then a unit that knows no pattern at all seems confirmed by text
that no search has seen. Documents with a Jaccard index of their shingles (runs of tokens) of `LIKE` or more are joined;
MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3)
proposes pairs, and shingles are then compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from mnemoscope.patterns.columns import spans
from mnemoscope.patterns.sequences import hashed
from mnemoscope.run.text import Text

SHINGLE = 3  # tokens
LIKE = 0.5  # of two copies of a document, each with 3 % of its tokens changed, it is .7
LEAST = 8  # shingles of a document that may be joined: in a few words anybody repeats another
LONGEST = 4_096  # tokens of a document that are looked at, from its first
BANDS, ROWS = 32, 4  # of two documents at .5, one pair in eight shares no band; at .7, one in 6,000


@dataclass(frozen=True)
class Duplicates:
    """Which documents count as one.

    document  i64[document]: the ids of the documents of a text, ascending
    group     i64[document]: the id of the first document (in that order) that each is nearly a copy of; its own if
              there is none
    """

    document: np.ndarray
    group: np.ndarray

    @classmethod
    def read(cls, frame: pl.DataFrame) -> Duplicates:
        """Read what `frame` gave."""
        return cls(frame["document"].to_numpy(), frame["group"].to_numpy())

    @property
    def frame(self) -> pl.DataFrame:
        """Columns document, group."""
        return pl.DataFrame({"document": self.document, "group": self.group})

    @property
    def joined(self) -> int:
        """How many documents count as another one."""
        return int((self.document != self.group).sum())

    @property
    def groups(self) -> int:
        """How many documents have such copies."""
        return len(np.unique(self.group[self.document != self.group]))

    @property
    def note(self) -> str:
        """What is to be said of it; nothing where nothing was joined."""
        if not self.joined:
            return ""
        return (
            f"{self.joined:,} of {len(self.document):,} documents are nearly copies of another one: they count as "
            f"the {self.groups:,} documents that they are copies of"
        )

    def of(self, documents: np.ndarray) -> np.ndarray:
        """i64[...]: the group of each of some documents, which must be of the text."""
        return np.asarray(self.group[np.searchsorted(self.document, documents)])

    def join(self, text: Text) -> Text:
        """The text with copies as parts of one document, whose id is that of the first; rows stay where they are."""
        return replace(text, document=self.of(text.document)) if self.joined else text


def near_duplicates(text: Text) -> Duplicates:
    """Find them among all documents of a text. The same each time; a second or two for 10,000 documents of 100 tokens.

    Each document is compared with the first of each group, so that no chain of slight changes joins what is unlike.
    """
    from datasketch import MinHash, MinHashLSH

    documents = np.unique(text.document)
    group = documents.copy()
    known = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    empty = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=int)
    shingles: dict[int, np.ndarray] = {}
    for place, own in _shingles(text, documents):
        sketch = empty.copy()
        sketch.update_batch((own >> np.uint64(32)).tolist())
        alike = [other for other in sorted(known.query(sketch)) if _jaccard(own, shingles[other]) >= LIKE]
        if alike:
            group[place] = documents[alike[0]]
        else:
            known.insert(place, sketch, check_duplication=False)
            shingles[place] = own
    return Duplicates(documents, group)


def _shingles(text: Text, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The place of each document that has enough of them, and its different shingles u64[...], ascending. Special
    tokens are passed over, and so are the borders of contexts."""
    special = np.flatnonzero(text.vocabulary.special)
    rows = np.flatnonzero(text.counted | ((text.position == 0) & ~np.isin(text.tokens, special)))
    place = np.searchsorted(documents, text.document[rows])
    rows = rows[np.argsort(place, kind="stable")]
    sizes = np.bincount(place, minlength=len(documents))
    first, kept = np.cumsum(sizes) - sizes, np.minimum(sizes, LONGEST)
    rows = rows[spans(first, kept)]
    position = spans(np.zeros_like(kept), kept)
    codes, whole = hashed(text.tokens[rows], position, tuple(range(SHINGLE - 1, -1, -1)))
    ends = np.cumsum(kept)
    for number, (start, end) in enumerate(zip((ends - kept).tolist(), ends.tolist(), strict=True)):
        own = np.unique(codes[start:end][whole[start:end]])
        if len(own) >= LEAST:
            yield number, own


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The Jaccard index of two sets (ascending, none twice)."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)
