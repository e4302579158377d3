"""Where sentences end, and how long runs of tokens are cut into windows.

The splitter is a set of rules and nothing else, so that a corpus is cut the same on every machine: stops
with their closing quotes, abbreviations, initials, acronyms, numbers, list marks, line ends, and the stops
of Chinese and Japanese.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from mnemoscope.errors import CorpusError

Splitter = Callable[[str], list[str]]

_STOPS = ".!?…‽؟۔।"
_CLOSING = r"""["'”’»›)\]}]"""
_STOP = re.compile(
    rf"(?<![{_STOPS}])(?P<stop>[{_STOPS}]+){_CLOSING}*(?:\[\w{{1,4}}\])*(?=\s)"  # not 3.14 nor example.org
    r"|(?P<wide>[。！？｡]+[」』”’）】〉》]*)"  # needs none
    r"|(?P<line>(?<![ \t])[ \t]*\r?\n\s*)"
)
_OPENING = "\"'“‘«‹([{¿¡*_-–—"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name follows: never the end.
_TITLES = _words(
    """
    mr mrs ms mx dr prof st ste mt rev hon pres gov sen rep gen col lt maj sgt capt cpl cmdr adm messrs mme
    mlle fr hr vs v e.g i.e eg ie cf viz approx
    """
)
# A number follows, or else it may be the end.
_NUMBERED = _words("no nos vol vols pp fig figs eq eqs sec ch art ed op nr ca fl est")
# The end only if a typical first word follows.
_EITHER = _words(
    """
    inc ltd co corp llc plc jr sr dept univ ave blvd rd
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun
    """
)
_STARTERS = _words(
    """
    the a an this that these those it its he she they we you his her their our in on at by for from to as
    after before during since when while where if although though because but and or so yet however there
    here then thus what who why how which with without some many most all both each one two other such no
    not
    """
)
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_WRAPPED = range(40, 101)  # characters of a line that was broken to fit a page


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, without the white space around them; none is empty."""
    return [text[start:end] for start, end in spans(text)]


def spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence in `text`, in characters."""
    start = 0
    for stop in _STOP.finditer(text):
        if _ends(text, start, stop):
            yield from _trimmed(text, start, stop.end())
            start = stop.end()
    yield from _trimmed(text, start, len(text))


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    piece = text[start:end]
    if piece.strip():
        lead = len(piece) - len(piece.lstrip())
        yield start + lead, start + len(piece.rstrip())


def _ends(text: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence that began at `start` ends with this stop."""
    if stop["wide"]:
        return True
    if stop["line"]:
        return _line_ends(text, stop)
    following = text[stop.end() : stop.end() + 40].lstrip().lstrip(_OPENING)
    if following[:1].islower():
        return False
    if stop["stop"] != ".":
        return True
    words = text[max(start, stop.start() - 24) : stop.start()].split()
    word = words[-1].lstrip(_OPENING) if words else ""
    if word.casefold() in _TITLES or (word.isdigit() and text[start : stop.start()].strip() == word):
        return False  # "Dr. Who", and the mark of a list: "1. First"
    if word.casefold() in _NUMBERED:
        return not following[:1].isdigit()
    if word.casefold() in _EITHER or _ACRONYM.fullmatch(word) or (len(word) == 1 and word.isalpha()):
        first = re.match(r"\w+\b(?!\.)", following)  # "A. Milne" begins with an initial, not with an article
        return first is not None and first[0].casefold() in _STARTERS
    return True


def _line_ends(text: str, stop: re.Match[str]) -> bool:
    """A line end is a sentence's end, unless the line was only broken to fit a page."""
    if stop[0].count("\n") > 1:
        return True
    line = text[text.rfind("\n", 0, stop.start()) + 1 : stop.start()]
    following = text[stop.end() : stop.end() + 1]
    return not following.islower() and len(line) not in _WRAPPED


def spacy_sentences() -> Splitter:
    """spaCy's rule-based sentencizer; `CorpusError` when the `[nlp]` extra is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise CorpusError(
            "cutting text into sentences with spaCy: it is not installed; "
            "pip install 'mnemoscope[nlp]', or give {segment} for the built-in rules",
            segment="sentence",
        ) from error
    pipeline: Any = spacy.blank("xx")
    pipeline.add_pipe("sentencizer")
    pipeline.max_length = 1 << 40  # the limit is for parsers, which take memory

    def split(text: str) -> list[str]:
        return [piece for sentence in pipeline(text).sents if (piece := sentence.text.strip())]

    return split


def windows(length: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of the fewest consecutive windows of at most `size` that cover `length` tokens.

    Their lengths differ by one at most, so that no window is a stump without anything to its left.
    """
    assert size >= 3, size  # below, equal windows could be single tokens
    count = -(-length // size)
    edges = [length * index // count for index in range(count + 1)] if count else []
    return list(pairwise(edges))
