"""What a pattern is, and how it is written.

A spec is a head, a colon and arguments, or the name of a built-in (`year`, `open-quote`, ...):

    tokens:[" of",null," year"]   the prefix ends with these tokens; null is any token, a number a token id
    folded:["of","the"]           the same, whatever the case and the spaces
    word:river                    the last word so far (case-folded); word:river@16 within the last 16 tokens,
                                  word:river@all anywhere so far
    words:may,june                one of these words, with @ as above
    topic:3:band,album,song       at least 3 of these words so far
    suffix:tion  prefix:un        the last word so far ends, begins with
    shape:Xx     casing:upper     form of the last word so far
    digits:2                      the last word so far is a number of two digits
    position:5-8                  0-based position in the context
    followed:" York"              the last token stood earlier in the context, and this token followed it
    next:" York"  nextword:york  nextclass:number     what comes next: a family of its own
    all:[SPEC, ...]  any:[SPEC, ...]                  conjunction, disjunction (JSON lists of specs)
    lemma:go                  the last word so far is a form of it (English; needs the [nlp] extra)
    regex:EXPRESSION              found in the last 256 characters of the prefix, or there at its end with `$`
    file:PATH                     labels of rows: JSON lines of context, position, label
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mnemoscope.errors import PatternError
from mnemoscope.files import from_json
from mnemoscope.records import MAIN, NEXT, POSITION

WINDOWS = (4, 16, 64)
SINGLE, ALL, ANY = 0, 1, 2  # how a pattern is made of others
PARTS = {ALL: 3, ANY: 4}  # at most

# Name -> (how it reads, kind). Their masks are in `forms`.
BUILTINS: dict[str, tuple[str, str]] = {
    "number": ("a number", "shallow"),
    "year": ("a year", "shallow"),
    "decimal": ("a number with a decimal point", "shallow"),
    "grouped-number": ("a number such as 1,234", "shallow"),
    "decade": ("a decade (1980s)", "shallow"),
    "year-range": ("a range of years", "shallow"),
    "date": ("a date", "shallow"),
    "time": ("a time of day", "shallow"),
    "time-range": ("a range of times", "shallow"),
    "money": ("an amount of money", "shallow"),
    "percent": ("a percentage", "shallow"),
    "ordinal": ("an ordinal number", "shallow"),
    "measure": ("a number with a unit", "shallow"),
    "initial": ("an initial (J.)", "shallow"),
    "punctuation": ("punctuation", "shallow"),
    "piece": ("inside a word", "shallow"),
    "sentence-start": ("the first word of a sentence", "syntactic"),
    "sentence-end": ("the end of a sentence", "syntactic"),
    "open-quote": ("inside a quotation", "syntactic"),
    "open-bracket": ("inside brackets", "syntactic"),
    "list": ("inside a list of three or more", "syntactic"),
    "list-item": ("the start of an item of a list", "syntactic"),
    "heading": ("inside a heading", "syntactic"),
    "new-line": ("the first word of a line", "syntactic"),
    "repeated": ("its last token stood there before", "syntactic"),
    "repeated-pair": ("its last two tokens stood there before", "syntactic"),
}
_KINDS = {
    "tokens": "shallow",
    "folded": "shallow",
    "word": "shallow",
    "words": "semantic",
    "topic": "semantic",
    "suffix": "shallow",
    "prefix": "shallow",
    "shape": "shallow",
    "casing": "shallow",
    "digits": "shallow",
    "position": "shallow",
    "followed": "syntactic",
    "next": "shallow",
    "nextword": "shallow",
    "nextclass": "shallow",
    "lemma": "shallow",
    "regex": "shallow",
    "file": "semantic",
    "predicate": "semantic",
}
_RANK = ("shallow", "syntactic", "semantic")
HEADS = (*_KINDS, "all", "any")


@dataclass(frozen=True)
class Pattern:
    """A property of prefixes.

    spec        how it is written; `parse` reads it back
    name        how it is read by people: what stands after "active means ..."
    family      what computes its mask (the head of the spec, `form` for a built-in)
    kind        shallow, syntactic or semantic: what it looks at; whether it is beyond the last token, N2 decides
    complexity  parts that would have to be named
    arguments   what the family needs
    """

    spec: str
    name: str
    family: str
    kind: str
    complexity: int
    arguments: tuple[Any, ...] = field(default=(), compare=False)

    @property
    def tests(self) -> str:
        """The family of tests it belongs to: `main`, `next` (the next token) or `position`."""
        inside = {part.tests for part in self.arguments} if self.family in ("all", "any") else set()
        if self.family in ("next", "nextword", "nextclass") or NEXT in inside:
            return NEXT
        return POSITION if self.family == "position" or inside == {POSITION} else MAIN


def predicate(test: Callable[[str], bool], name: str) -> Pattern:
    """A pattern that only Python can write: `test` is asked of the last 256 characters of each prefix."""
    return Pattern(f"predicate:{name}", name, "predicate", _KINDS["predicate"], 1, (test,))


def parse(spec: str | Pattern) -> Pattern:
    """Read a spec; `PatternError` says what is wrong with it."""
    if isinstance(spec, Pattern):
        return spec
    if spec in BUILTINS:
        name, kind = BUILTINS[spec]
        return Pattern(spec, name, "form", kind, 1, (spec,))
    head, colon, rest = spec.partition(":")
    if not colon or head not in _READERS:
        raise _wrong(
            spec, "no such pattern", f"write {', '.join(h + ':' for h in _READERS)} or {', '.join(BUILTINS)}"
        )
    if not rest:
        raise _wrong(spec, "nothing stands after the colon", "give what to look for")
    return _READERS[head](spec, rest)


_part = lru_cache(2**16)(parse)  # compounds of a search share their parts


def conjunction(parts: tuple[Pattern, ...]) -> Pattern:
    """The pattern that a prefix has when it has all of these."""
    return _compound("all", parts)


def disjunction(parts: tuple[Pattern, ...]) -> Pattern:
    """The pattern that a prefix has when it has any of these."""
    return _compound("any", parts)


def _compound(head: str, parts: tuple[Pattern, ...]) -> Pattern:
    parts = tuple(sorted(parts, key=lambda part: part.spec))
    kind = max((part.kind for part in parts), key=_RANK.index)
    name = (" and " if head == "all" else " or ").join(
        f"({part.name})" if part.family in ("all", "any") else part.name for part in parts
    )
    spec = f"{head}:[{','.join(_quoted(part.spec) for part in parts)}]"
    return Pattern(spec, name, head, kind, sum(part.complexity for part in parts), parts)


def _wrong(spec: str, what: str, hint: str) -> PatternError:
    return PatternError(f"reading the pattern {spec!r}: {what}; {hint}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_quoted = lru_cache(2**16)(_json)


def _listed(spec: str, text: str) -> list[Any]:
    try:
        values = from_json(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not values:
        raise _wrong(
            spec, "what follows the colon is not a JSON list", 'write for example tokens:[" of"," the"]'
        )
    return values


def _is_number(text: str) -> bool:
    """Whether a text is a number of a size that places and counts have."""
    return text.isdecimal() and len(text) <= 9


def quoted(texts: list[str]) -> str:
    """Pieces of text as one quotation."""
    return "“" + "".join(texts).strip().replace("\n", "↵") + "”"


def _tokens(spec: str, rest: str) -> Pattern:
    tokens = _listed(spec, rest)
    if (
        any(not isinstance(token, str | int | None) or isinstance(token, bool) for token in tokens)
        or None in tokens[-1:]
    ):
        raise _wrong(
            spec, "tokens are texts, ids or null, and the last is no null", 'write tokens:[" of",null,"s"]'
        )
    shown = [" …" if token is None else f"⟨{token}⟩" if isinstance(token, int) else token for token in tokens]
    name = f"ends with {quoted(shown)}"
    if len(tokens) == 1 and isinstance(tokens[0], str):
        name = f"the token {_json(tokens[0])}"
    return Pattern(f"tokens:{_json(tokens)}", name, "tokens", "shallow", _named(tokens), tuple(tokens))


def _folded(spec: str, rest: str) -> Pattern:
    tokens = _listed(spec, rest)
    if any(not isinstance(token, str | None) for token in tokens) or tokens[-1] is None:
        raise _wrong(spec, "tokens are texts or null, and the last is no null", 'write folded:["of","the"]')
    tokens = [token if token is None else token.strip().casefold() for token in tokens]
    shown = [" …" if token is None else f" {token}" for token in tokens]
    name = f"ends with {quoted(shown)} in any case"
    return Pattern(f"folded:{_json(tokens)}", name, "folded", "shallow", _named(tokens), tuple(tokens))


def _named(tokens: list[Any]) -> int:
    return sum(token is not None for token in tokens)


def _window(spec: str, rest: str) -> tuple[str, int | None, str, str]:
    """The words, the window (1 is the last word alone, None anywhere), its suffix and how it reads."""
    text, separator, window = rest.rpartition("@")
    if not separator or not text:
        return rest, 1, "", ""
    if window == "all":
        return text, None, "@all", " so far"
    if not _is_number(window) or int(window) < 2:
        raise _wrong(spec, f"{window!r} is no window", "write @all, or @ and a number of tokens of 2 or more")
    return text, int(window), f"@{int(window)}", f" within {int(window)} tokens"


def _word(spec: str, rest: str) -> Pattern:
    word, window, suffix, where = _window(spec, rest)
    word = word.strip().casefold()
    if not word or len(word.split()) > 1:
        raise _wrong(
            spec, f"{word!r} is not one word", 'write word:river, or folded:["of","the"] for several tokens'
        )
    name = f"“{word}”{where}" if where else f"the word “{word}”"
    kind = "semantic" if window != 1 and (window is None or window > WINDOWS[0]) else "shallow"
    return Pattern(f"word:{word}{suffix}", name, "word", kind, 1, (word, window))


def _several(spec: str, rest: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip().casefold() for word in rest.split(",") if word.strip()))
    if not words:
        raise _wrong(spec, "no words are given", "write words separated by commas: may,june")
    return words


def shortened(words: tuple[str, ...], shown: int = 4) -> str:
    """The first few of several words."""
    return ", ".join(words[:shown]) + (f", … ({len(words)})" if len(words) > shown else "")


def _words(spec: str, rest: str) -> Pattern:
    text, window, suffix, where = _window(spec, rest)
    words = _several(spec, text)
    name = f"one of {shortened(words)}{where}"
    return Pattern(f"words:{','.join(words)}{suffix}", name, "words", "semantic", 2, (words, window))


def _topic(spec: str, rest: str) -> Pattern:
    count, colon, text = rest.partition(":")
    words = _several(spec, text)
    if not colon or not _is_number(count) or not 1 <= int(count) <= len(words):
        raise _wrong(spec, "a topic is a number and at least as many words", "write topic:2:band,album,song")
    name = f"about {shortened(words)}"
    return Pattern(f"topic:{int(count)}:{','.join(words)}", name, "topic", "semantic", 2, (int(count), words))


def _plain(head: str, template: str, fold: bool = False) -> Callable[[str, str], Pattern]:
    def read(spec: str, rest: str) -> Pattern:
        text = rest.strip().casefold() if fold else rest.strip()
        return Pattern(f"{head}:{text}", template.format(text), head, _KINDS[head], 1, (text,))

    return read


def _digits(spec: str, rest: str) -> Pattern:
    if not _is_number(rest.strip()) or not int(rest):
        raise _wrong(spec, f"{rest!r} is no number of digits", "write digits:2")
    name = f"a number of {int(rest)} digit{'s' if int(rest) > 1 else ''}"
    return Pattern(f"digits:{int(rest)}", name, "digits", "shallow", 1, (str(int(rest)),))


def _position(spec: str, rest: str) -> Pattern:
    low, dash, high = rest.partition("-")
    if not _is_number(low) or (dash and high and not _is_number(high)) or (high and int(high) < int(low)):
        raise _wrong(
            spec, f"{rest!r} is no range of positions", "write position:5, position:5-8 or position:64-"
        )
    last = int(low) if not dash else int(high) if high else None
    end = "" if last == int(low) else "-" if last is None else f"-{last}"
    shown = f"position {int(low)}" + (" and later" if last is None else f" to {last}" if end else "")
    return Pattern(f"position:{int(low)}{end}", shown, "position", "shallow", 1, (int(low), last))


def _token(head: str, template: str) -> Callable[[str, str], Pattern]:
    def read(spec: str, rest: str) -> Pattern:
        try:
            token = from_json(rest)
        except ValueError:
            token = rest
        if isinstance(token, bool) or not isinstance(token, str | int):
            raise _wrong(spec, f"{rest} is no token", f'write {head}:" York"')
        shown = f"⟨{token}⟩" if isinstance(token, int) else _json(token)
        return Pattern(f"{head}:{_json(token)}", template.format(shown), head, _KINDS[head], 1, (token,))

    return read


def _many(head: str, reader: Callable[[tuple[Pattern, ...]], Pattern]) -> Callable[[str, str], Pattern]:
    def read(spec: str, rest: str) -> Pattern:
        parts = _listed(spec, rest)
        if len(parts) < 2 or any(not isinstance(part, str) for part in parts):
            raise _wrong(spec, "it needs two specs or more", f'write {head}:["word:river","suffix:ed"]')
        return reader(tuple(map(_part, parts)))

    return read


def _verbatim(head: str, template: str) -> Callable[[str, str], Pattern]:
    def read(spec: str, rest: str) -> Pattern:
        return Pattern(spec, template.format(rest), head, _KINDS[head], 1, (rest,))

    return read


_READERS: dict[str, Callable[[str, str], Pattern]] = {
    "tokens": _tokens,
    "folded": _folded,
    "word": _word,
    "words": _words,
    "topic": _topic,
    "suffix": _plain("suffix", "a word in -{}", fold=True),
    "prefix": _plain("prefix", "a word in {}-", fold=True),
    "shape": _plain("shape", "a word shaped {}"),
    "casing": _plain("casing", "a word in {} case"),
    "digits": _digits,
    "position": _position,
    "followed": _token("followed", "its last token stood there before, followed by {}"),
    "next": _token("next", "before the token {}"),
    "nextword": _plain("nextword", "before “{}”", fold=True),
    "nextclass": _plain("nextclass", "before a {}"),
    "lemma": _plain("lemma", "a form of “{}”", fold=True),
    "regex": _verbatim("regex", "matches /{}/"),
    "file": _verbatim("file", "labelled in {}"),
    "all": _many("all", conjunction),
    "any": _many("any", disjunction),
}
