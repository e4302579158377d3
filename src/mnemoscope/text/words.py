"""Tokens and words, aligned once.

A word is a run of tokens without a space between them whose touching characters are letters or digits; what is
neither (punctuation) is a word of its own. At a row stands the word *so far*: its pieces up to that row and none
after, since a prefix does not know how its last word goes on.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mnemoscope.text.sampling import chain

if TYPE_CHECKING:
    from mnemoscope.run.text import Text
    from mnemoscope.text.vocabulary import Vocabulary

_UNFIT = re.compile(r"[⟨,@\s]")
LONGEST = 16  # pieces; scripts without spaces would make a word of a whole text


@dataclass(frozen=True)
class Tokens:
    """What the distinct tokens of a text look like, `texts` in the order of `ids`; a special token has none.

    ids     i32[distinct]   ascending
    places  i32[prefix]     index into them
    fold    i32[distinct]   index into `folded`: the text without outer spaces, case-folded
    """

    ids: np.ndarray
    places: np.ndarray
    texts: list[str]
    fold: np.ndarray
    folded: list[str]

    @classmethod
    def of(cls, tokens: np.ndarray, vocabulary: Vocabulary) -> Tokens:
        """Read the tokens of a text."""
        ids, places = np.unique(tokens, return_inverse=True)
        texts = ["" if vocabulary.special[token] else vocabulary.pieces([token])[0] for token in ids.tolist()]
        fold, folded = _numbered([text.strip().casefold() for text in texts])
        return cls(ids, places.astype(np.int32), texts, fold, folded)

    def flags(self, test: object) -> np.ndarray:
        """bool[prefix]: which rows end with a token whose text passes `test`."""
        assert callable(test)
        return np.fromiter((bool(test(text)) for text in self.texts), bool, len(self.texts))[self.places]


@dataclass(frozen=True)
class Words:
    """The word so far at every row.

    raw     i32[prefix]  index into `forms`: as written
    start   i64[prefix]  row of the first piece of the word
    ends    bool[prefix] whether the word ends here: known from the next token, so only for later rows
    fold    i32[form]    index into `folded`: case-folded
    """

    tokens: Tokens
    raw: np.ndarray
    start: np.ndarray
    ends: np.ndarray
    forms: list[str]
    fold: np.ndarray
    folded: list[str]

    @cached_property
    def word(self) -> np.ndarray:
        """i32[prefix]: the word so far, as an index into `folded`."""
        return self.fold[self.raw]

    @cached_property
    def lettered(self) -> np.ndarray:
        """bool[folded]: whether it has a letter or a digit, and can be written in a list of words; bytes that
        are no character (``⟨e2⟩``) have none."""
        has = (any(map(str.isalnum, word)) and not _UNFIT.search(word) for word in self.folded)
        return np.fromiter(has, bool, len(self.folded))


def align(text: Text) -> Words:
    """Align the tokens of a text into words."""
    tokens = Tokens.of(text.tokens, text.vocabulary)
    opens = tokens.flags(lambda piece: piece[:1] and _inner(piece[0]))
    closes = tokens.flags(lambda piece: piece[-1:] and _inner(piece[-1]))
    rows = np.arange(len(text))
    goes_on = opens & (text.position > 0)
    goes_on[1:] &= closes[:-1]
    start = np.maximum.accumulate(np.where(goes_on, 0, rows)) if len(rows) else rows
    depth = (rows - start) % LONGEST
    goes_on &= depth > 0
    start = rows - depth
    hashes = chain(np.zeros(len(text), np.uint64), tokens.places)
    for step in range(1, int(depth.max(initial=0)) + 1):
        deep = np.flatnonzero(depth == step)
        hashes[deep] = chain(hashes[deep - 1], tokens.places[deep])
    _, sample, form_of = np.unique(hashes, return_index=True, return_inverse=True)
    pieces = [
        "".join(tokens.texts[piece] for piece in tokens.places[start[row] : row + 1].tolist()).strip()
        for row in sample.tolist()
    ]
    form, forms = _numbered(pieces)
    fold, folded = _numbered([word.casefold() for word in forms])
    ends = np.ones(len(text), bool)
    ends[:-1] = ~goes_on[1:]
    return Words(tokens, form[form_of], start, ends, forms, fold, folded)


def _inner(character: str) -> bool:
    """Whether a character belongs inside a word; combining marks do."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _numbered(names: list[str]) -> tuple[np.ndarray, list[str]]:
    known: dict[str, int] = {}
    numbers = np.fromiter((known.setdefault(name, len(known)) for name in names), np.int32, len(names))
    return numbers, list(known)
