"""Patterns that people bring: regular expressions, Python predicates, labelled files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import numpy as np
import regex

from mnemoscope import files
from mnemoscope.errors import PatternError
from mnemoscope.patterns.pattern import Pattern
from mnemoscope.run.text import Text

ONE, ALL = 0.5, 120.0  # seconds: for one prefix, for a whole text


def check(pattern: Pattern) -> None:
    """`PatternError` if its expression does not compile, or its file of labels is not one."""
    if pattern.family == "regex":
        compiled(pattern)
    if pattern.family == "file":
        list(_labels(files.expanded(pattern.arguments[0])))


def mask(text: Text, pattern: Pattern) -> np.ndarray:
    """bool[prefix] of a pattern of one of the families `regex`, `predicate` and `file`; else `PatternError`."""
    if pattern.family == "file":
        return _labelled(text, pattern)
    if pattern.family == "predicate":
        return _asked(text, pattern, pattern.arguments[0])
    return _asked(text, pattern, compiled(pattern))


def compiled(pattern: Pattern) -> Callable[[str], bool]:
    """The test of a regex, bounded in time; `PatternError` if it does not compile or runs away."""
    try:
        expression = regex.compile(pattern.arguments[0])
    except regex.error as error:
        raise PatternError(
            f"reading the pattern {pattern.spec!r}: the expression does not compile ({error}); correct it"
        ) from error

    def test(prefix: str) -> bool:
        try:
            return expression.search(prefix, timeout=ONE) is not None
        except TimeoutError as error:
            raise _slow(pattern, f"more than {ONE} s for one prefix") from error

    return test


def _slow(pattern: Pattern, how: str) -> PatternError:
    return PatternError(
        f"matching {pattern.spec!r}: it takes {how}; write it without nested repetition, such as (a+)+"
    )


def _asked(text: Text, pattern: Pattern, test: Callable[[str], bool]) -> np.ndarray:
    out = np.zeros(len(text), bool)
    until = monotonic() + ALL
    for row in range(len(text)):
        out[row] = test(text.prefix(row))
        if row % 1024 == 0 and monotonic() > until:
            raise _slow(pattern, f"more than {ALL:.0f} s for {row:,} of {len(text):,} prefixes")
    return out


def _labelled(text: Text, pattern: Pattern) -> np.ndarray:
    path = files.expanded(pattern.arguments[0])
    out = np.zeros(len(text), bool)
    for number, context, position, label in _labels(path):
        index = int(np.searchsorted(text.contexts, context))
        if index < len(text.contexts) and text.contexts[index] == context:
            row = int(text.starts[index]) + position
            if not text.starts[index] <= row < text.starts[index + 1]:
                raise PatternError(
                    f"reading the labels {path}, line {number}: context {context} has positions 0 to "
                    f"{text.starts[index + 1] - text.starts[index] - 1}, not {position}"
                )
            out[row] = label
    return out


def _labels(path: Path) -> Iterator[tuple[int, int, int, bool]]:
    """Number of the line, context, position and label, for each line of a file."""
    try:
        text = files.read_text(path)
    except (OSError, ValueError) as error:
        raise PatternError(f"reading the labels {path}: {error}; give a file of JSON lines") from error
    for number, line in files.json_lines(text):
        try:
            entry = files.from_json(line)
            context, position, label = int(entry["context"]), int(entry["position"]), bool(entry["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise PatternError(
                f"reading the labels {path}, line {number}: {line[:60]!r} is no label; write "
                '{"context": 12, "position": 40, "label": true}'
            ) from error
        yield number, context, position, label
