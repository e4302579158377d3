"""Patterns of form: the last word so far, and what is open or repeated at its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from mnemoscope.errors import PatternError
from mnemoscope.patterns.columns import previous
from mnemoscope.run.text import Text

AFFIXES = (4, 3, 2)  # of those that are the same on a text, the longest stands for all
REACH = 48  # characters before the end of a prefix that a built-in form looks at

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_YEAR = r"(?:1[0-9]|20)\d\d"
_CLOCK = r"\d{1,2}:\d\d(?: ?[ap]\.?m\.?)?|\d{1,2}(?:\.\d\d)? ?[ap]\.?m\.?"
_UNITS = "km mi miles kilometres kilometers metres meters m ft feet kg pounds tons tonnes acres hectares minutes hours"
_SCALE = "thousand|million|billion|trillion"

# Name -> (what the last word must be like, for speed; what the prefix must end with).
_ENDINGS = {
    "decimal": (r"\d+", r"\d\.\d+$"),
    "grouped-number": (r"\d+", r"(?<![\d,.])\d{1,3}(?:,\d\d\d)+$"),
    "year-range": (r"\d+", rf"(?<!\d){_YEAR} ?[-–—] ?(?:{_YEAR}|\d\d)$"),
    "date": (
        rf"\d+|{_MONTH.casefold()}",
        rf"(?<!\d)\d{{1,2}} {_MONTH}$|{_MONTH} \d{{1,2}}$|(?<!\d)\d{{4}}-\d\d-\d\d$",
    ),
    "time": (r"\d+|[ap]?\.?m|.*[ap]m|\.", rf"(?<![\d.:])(?:{_CLOCK})$"),
    "time-range": (
        r"\d+|[ap]?\.?m|.*[ap]m|\.",
        rf"(?<![\d.:])(?:{_CLOCK}|\d{{1,2}}) ?(?:[-–—]|to) ?(?:{_CLOCK})$",
    ),
    "money": (
        rf"\d+|{_SCALE}|dollars|euros|pounds|yen",
        rf"[$€£¥] ?[\d,.]*\d(?: (?:{_SCALE}))?$|\d(?: (?:{_SCALE}))? (?:dollars|euros|pounds|yen)$",
    ),
    "percent": (r"%.*|percent|cent", r"\d ?(?:%|percent|per cent)$"),
    "measure": (_UNITS.replace(" ", "|"), rf"\d ?(?:{_UNITS.replace(' ', '|')})$"),
}
_WHOLE = {
    "number": r"\d+",
    "year": _YEAR,
    "decade": rf"{_YEAR[:-2]}0s",
    "ordinal": r"\d*(?:1st|2nd|3rd|\dth)|first|second|third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf)th",
    "initial": r"[B-HJ-Z]",
}
_ITEM = re.compile(r"(?:^|\n)\s*(?:[-*•]|\d{1,3}[.)])\s+\S+$")
_HEADING = re.compile(r"(?:^|\n)(?:#+|=+) [^\n]*$")


def shape(word: str) -> str:
    """Upper, lower, digits, others, each run shown by at most two letters: `Xxx` is `Xx`, `1984` is `dd`."""
    runs = groupby("X" if c.isupper() else "x" if c.isalpha() else "d" if c.isdigit() else c for c in word)
    return "".join(kind * min(2, len(list(run))) for kind, run in runs)


def casing(word: str) -> str:
    """lower, Title, UPPER or miXed."""
    if word.islower():
        return "lower"
    return "upper" if word.isupper() and len(word) > 1 else "title" if word.istitle() else "mixed"


def lemmas(words: Sequence[str]) -> list[str]:
    """The dictionary form of each English word ("" stays), by simplemma; `PatternError` without it."""
    try:
        from simplemma import lemmatize
    except ImportError as error:
        raise PatternError(
            "reading a pattern `lemma:`: simplemma is not installed; pip install 'mnemoscope[nlp]', or write word:"
        ) from error
    return [lemmatize(word, lang="en").casefold() if word else "" for word in words]


def labels(text: Text, head: str, size: int = 0) -> tuple[np.ndarray, list[str]]:
    """i32[prefix] and their names: the label of each row in a family of forms of the last word; -1 is none."""
    words = text.words
    if head == "word":
        return np.where(words.lettered[words.word], words.word, -1), words.folded
    if head in ("suffix", "prefix"):
        cut: Callable[[str], str] = (lambda w: w[-size:]) if head == "suffix" else (lambda w: w[:size])
        long = [cut(word) if len(word) > size and word.isalpha() else "" for word in words.folded]
        return _coded(long, words.word)
    if head == "lemma":
        return _coded(
            lemmas([w if ok else "" for w, ok in zip(words.folded, words.lettered, strict=True)]), words.word
        )
    if head == "digits":
        return _coded([str(len(word)) if word.isdecimal() else "" for word in words.folded], words.word)
    form = shape if head == "shape" else casing
    return _coded([form(word) if any(map(str.isalpha, word)) else "" for word in words.forms], words.raw)


def _coded(names: Sequence[str], index: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number the names; the empty one is none."""
    known: dict[str, int] = {"": -1}
    for name in names:
        known.setdefault(name, len(known) - 1)
    codes = np.fromiter((known[name] for name in names), np.int64, len(names))
    return codes[index], list(known)[1:]


def flags(text: Text, names: Sequence[str]) -> list[np.ndarray]:
    """bool[prefix] for each built-in."""
    return [_flag(text, name) for name in names]


def _flag(text: Text, name: str) -> np.ndarray:
    words = text.words
    if name in _WHOLE:
        test = re.compile(_WHOLE[name])
        texts = words.forms if name == "initial" else words.folded
        index = words.raw if name == "initial" else words.word
        return np.fromiter((test.fullmatch(word) is not None for word in texts), bool, len(texts))[index]
    if name in _ENDINGS:
        quick, whole = _ENDINGS[name]
        test = re.compile(quick)
        likely = np.fromiter(
            (test.fullmatch(word) is not None for word in words.folded), bool, len(words.folded)
        )
        return _ending(text, re.compile(whole), likely[words.word])
    return _PLACES[name](text)


def _ending(text: Text, test: re.Pattern[str], likely: np.ndarray) -> np.ndarray:
    """Where the last characters of a prefix match, looked at only where that is likely."""
    out = np.zeros(len(text), bool)
    for row in np.flatnonzero(likely).tolist():
        out[row] = test.search(text.prefix(row, REACH)) is not None
    return out


def _marks(text: Text, characters: str) -> np.ndarray:
    """i64[prefix]: how many of these characters stand in the context so far."""
    tokens = text.words.tokens
    each = np.fromiter((sum(map(t.count, characters)) for t in tokens.texts), np.int64, len(tokens.texts))
    total = np.concatenate([[0], np.cumsum(each[tokens.places])])
    return np.asarray(total[1:] - total[text.first])


def _last(text: Text, happens: np.ndarray) -> np.ndarray:
    """i64[prefix]: tokens since it last happened in the context, counting this one as 0; large if never."""
    rows = np.arange(len(text))
    seen = np.maximum.accumulate(np.where(happens, rows, -1)) if len(rows) else rows
    return np.where(seen >= text.first, rows - seen, len(text))


def _sentence_end(text: Text) -> np.ndarray:
    return text.words.tokens.flags(lambda piece: piece.strip().endswith((".", "!", "?", "。")))


def _before_word(text: Text, happens: np.ndarray) -> np.ndarray:
    """bool[prefix]: whether something happens in the token before the last word, which must have letters; also at the
    very start."""
    rows = np.arange(len(text))
    breaks = text.words.tokens.flags(lambda piece: "\n" in piece or not piece or not piece.isspace())
    solid = np.maximum.accumulate(np.where(breaks, rows, 0)) if len(rows) else rows
    before = solid[np.maximum(text.words.start - 1, 0)]  # spaces of their own are passed over
    opening = (text.words.start == text.first) | (before <= text.first)
    return text.words.lettered[text.words.word] & (opening | happens[before])


def _new_line(text: Text) -> np.ndarray:
    breaks = text.words.tokens.flags(lambda piece: "\n" in piece)
    return _before_word(text, breaks)


def _list(text: Text) -> np.ndarray:
    """Two commas in the last 16 tokens of the sentence."""
    commas = text.words.tokens.flags(lambda piece: "," in piece)
    total = np.concatenate([[0], np.cumsum(commas)])
    rows = np.arange(len(text))
    reach = np.minimum(np.minimum(15, text.position), _last(text, _sentence_end(text)))
    return np.asarray(total[rows + 1] - total[rows - reach] >= 2) & (_last(text, commas) < 16)


def _item(text: Text) -> np.ndarray:
    near = _last(text, text.words.tokens.flags(lambda piece: "\n" in piece)) < 6
    return _ending(text, _ITEM, near | (text.position < 4))


def _heading(text: Text) -> np.ndarray:
    return _ending(text, _HEADING, _last(text, text.words.tokens.flags(lambda p: "#" in p or "=" in p)) < 16)


_PLACES: dict[str, Callable[[Text], np.ndarray]] = {
    "punctuation": lambda text: ~text.words.lettered[text.words.word],
    "piece": lambda text: (text.words.start < np.arange(len(text))) & text.words.lettered[text.words.word],
    "sentence-start": lambda text: _before_word(text, _sentence_end(text)),
    "sentence-end": _sentence_end,
    "open-quote": lambda text: (_marks(text, '"') % 2 == 1) | (_marks(text, "“«") > _marks(text, "”»")),
    "open-bracket": lambda text: _marks(text, "([{") > _marks(text, ")]}"),
    "list": _list,
    "list-item": _item,
    "heading": _heading,
    "new-line": _new_line,
    "repeated": lambda text: previous(text, (0,)) >= 0,
    "repeated-pair": lambda text: previous(text, (1, 0)) >= 0,
}
