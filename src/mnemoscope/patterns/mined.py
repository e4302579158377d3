"""All the patterns that a text has: the columns among which a search looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.patterns import forms, sequences
from mnemoscope.patterns.columns import Groups, from_flags, joined
from mnemoscope.patterns.language import masks, next_labels
from mnemoscope.patterns.pattern import BUILTINS, WINDOWS
from mnemoscope.patterns.topics import classes, topics
from mnemoscope.records import MAIN, NEXT, POSITION
from mnemoscope.run.text import Text

Mined = tuple[list[str], csc_array, list[int]]  # specs, masks, costs (parts that would have to be named)


@dataclass(frozen=True)
class Limits:
    """Which patterns are worth a column.

    least  documents where it holds; fewer could never be shared by so many triggers, one a document
    most   share of the prefixes where it holds; a couple of dozen triggers cannot certify what is so common
    """

    least: int = 3
    most: float = 0.35


def mine(text: Text, tests: str, limits: Limits, seed: int = 0) -> Mined:
    """Specs, masks bool[prefix, pattern] and costs of a family of tests: `main`, `next` or `position`."""
    makers = {MAIN: _main, NEXT: _next, POSITION: _position}
    specs: list[str] = []
    costs: list[int] = []
    blocks = []
    for texts, block, cost in makers[tests](text, limits, seed):
        specs += texts
        costs += cost
        blocks.append(block)
    return specs, joined(blocks, len(text)), costs


def _each(specs: list[str], block: csc_array, cost: int = 1) -> Mined:
    return specs, block, [cost] * len(specs)


def _main(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
    for head in ("tokens", "folded"):
        yield sequences.mine(text, head, text.counted, limits.least)
    for head, size in (("word", 0), *((h, n) for h in ("suffix", "prefix") for n in forms.AFFIXES)):
        yield _labelled(text, head, size, limits)
    for head in ("shape", "casing", *(["lemma"] if find_spec("simplemma") else [])):
        yield _labelled(text, head, 0, limits)
    yield _each(list(BUILTINS), from_flags(forms.flags(text, list(BUILTINS)), len(text)))
    for window in (*WINDOWS, None):
        yield _windowed(text, window, limits)
    write = sequences.spelling(text)
    _, again = sequences.following(text)
    yield _each(
        *sequences.mine_codes(text, again, text.counted, limits.least, lambda t: _spec("followed", write(t)))
    )
    for specs in (classes(text, seed), topics(text, seed)):
        yield _each(specs, masks(text, specs), 2)


def _labelled(text: Text, head: str, size: int, limits: Limits) -> Mined:
    codes, names = forms.labels(text, head, size)
    return _written(text, codes, head, names, limits)


def _written(text: Text, codes: np.ndarray, head: str, names: list[str], limits: Limits) -> Mined:
    return _each(
        *sequences.mine_codes(text, codes, text.counted, limits.least, lambda c: f"{head}:{names[c]}")
    )


def _windowed(text: Text, window: int | None, limits: Limits) -> Mined:
    words = text.words
    codes = words.word.astype(np.int64)
    groups = Groups(codes, words.lettered[words.word])
    size = sequences.sizes(text, codes, window, groups)
    kept = np.flatnonzero((groups.spread(text.document) >= limits.least) & (size <= limits.most * len(text)))
    suffix = "all" if window is None else window
    specs = [f"word:{words.folded[code]}@{suffix}" for code in groups.codes[kept].tolist()]
    return _each(specs, sequences.covered(text, codes, window, groups, kept))


def _next(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
    write = sequences.spelling(text)
    after, _ = sequences.following(text)
    yield _each(
        *sequences.mine_codes(text, after, text.counted, limits.least, lambda t: _spec("next", write(t)))
    )
    for head in ("nextword", "nextclass"):
        codes, names = next_labels(text, head)
        codes = np.where(
            np.array([bool(name) for name in names])[codes], codes, -1
        )  # a space alone has no name
        yield _written(text, codes, head, names, limits)


def _position(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
    specs, low = [f"position:{position}" for position in range(1, 8)], 1
    while len(text) and low <= text.position.max():
        specs += [f"position:{low}-{2 * low - 1}", f"position:{low}-"]
        low *= 2
    specs = list(dict.fromkeys(spec for spec in specs if spec != "position:1-1"))
    yield _each(specs, masks(text, specs))


def _spec(head: str, token: str | int) -> str:
    return f"{head}:{sequences.written(token)}"
