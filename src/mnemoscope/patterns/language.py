"""The pattern language: the mask of any spec, and all the patterns that a text has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.errors import PatternError
from mnemoscope.patterns import foreign, forms, sequences
from mnemoscope.patterns.columns import Groups, columns, from_flags, joined
from mnemoscope.patterns.pattern import BUILTINS, WINDOWS, Pattern, parse
from mnemoscope.patterns.topics import classes, topics
from mnemoscope.records import MAIN, NEXT, POSITION
from mnemoscope.run.text import Text

Mined = tuple[list[str], csc_array, list[int]]  # specs, masks, costs (parts that would have to be named)


def check(pattern: Pattern) -> Pattern:
    """Return the pattern; `PatternError` if an expression in it does not compile, its file of labels is not one, or it
    needs what is not installed."""
    for part in pattern.arguments:
        if isinstance(part, Pattern):
            check(part)
    foreign.check(pattern)
    if pattern.family == "lemma":
        forms.lemmas([])
    return pattern


def masks(text: Text, specs: Sequence[str | Pattern]) -> csc_array:
    """bool[prefix, pattern]: where each pattern holds, thousands at a time; `PatternError` for one that
    cannot be read. Every prefix has a mask, whether it is counted or not."""
    patterns = [parse(spec) for spec in specs]
    groups: dict[tuple[str, object], list[int]] = {}
    for number, pattern in enumerate(patterns):
        groups.setdefault((pattern.family, _variant(pattern)), []).append(number)
    if not patterns:
        return joined([], len(text))
    blocks = [
        _FAMILIES[family](text, [patterns[n] for n in numbers]) for (family, _), numbers in groups.items()
    ]
    order = np.argsort(np.concatenate([np.array(numbers) for numbers in groups.values()]))
    return csc_array(joined(blocks, len(text))[:, order])


def usual(text: Text, pattern: Pattern) -> np.ndarray:
    """bool[prefix]: the mask of one pattern, which must hold at some of the counted prefixes but not at all;
    else `PatternError`."""
    mask = masks(text, [pattern]).toarray()[:, 0]
    share = float(mask[text.counted].mean()) if text.counted.any() else 0.0
    if share in (0.0, 1.0):
        aside = 0 if share else int(mask[~text.counted].sum())
        only = (
            f" (only at {aside:,} that end at position 0 or a special token, which do not count)"
            if aside
            else ""
        )
        raise PatternError(
            f"testing {pattern.spec!r}: it holds at {'all' if share else 'none'} of the {int(text.counted.sum()):,} "
            f"prefixes{only}, so that there is nothing to compare; give a pattern that some have and some have not"
        )
    return mask


def _variant(pattern: Pattern) -> object:
    """What patterns must share for their masks to be made at once."""
    if pattern.family in ("word", "words"):
        return pattern.arguments[1]
    if pattern.family in ("suffix", "prefix"):
        return len(pattern.arguments[0])
    return None


def _labels(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    head = patterns[0].family
    codes, names = forms.labels(text, head, len(patterns[0].arguments[0]))
    return _coded(text, codes, names, [pattern.arguments[0] for pattern in patterns])


def _coded(text: Text, codes: np.ndarray, names: Sequence[str], wanted: Sequence[str]) -> csc_array:
    known = {name: number for number, name in enumerate(names)}
    return sequences.masks_codes(text, codes, [known.get(name, -1) for name in wanted])


def _word(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    words, window = [pattern.arguments[0] for pattern in patterns], patterns[0].arguments[1]
    if window == 1:
        return _coded(text, *forms.labels(text, "word"), words)
    return sequences.word_masks(text, words, window)


def _words(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    return sequences.any_of(text, [pattern.arguments[0] for pattern in patterns], patterns[0].arguments[1])


def _topic(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    return sequences.at_least(
        text, [pattern.arguments[1] for pattern in patterns], [pattern.arguments[0] for pattern in patterns]
    )


def _form(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    return from_flags(forms.flags(text, [pattern.arguments[0] for pattern in patterns]), len(text))


def _position(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    bounds = [pattern.arguments for pattern in patterns]
    inside = [(text.position >= low) & (text.position <= (high or len(text))) for low, high in bounds]
    return from_flags(inside, len(text))


def _following(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    after, again = sequences.following(text)
    number = sequences.token_number(text)
    codes = after if patterns[0].family == "next" else again
    return sequences.masks_codes(text, codes, [number(pattern.arguments[0]) for pattern in patterns])


def next_labels(text: Text, head: str) -> tuple[np.ndarray, list[str]]:
    """i64[prefix] and their names: the folded token that comes next, or its class; -1 at the end of a context."""
    tokens = text.words.tokens
    if head == "nextword":
        codes, names = tokens.fold[tokens.places], tokens.folded
    else:
        kinds = [_class(piece) for piece in tokens.texts]
        names = list(dict.fromkeys(kinds))
        codes = np.array([names.index(kind) for kind in kinds], np.int64)[tokens.places]
    after = np.full(len(text), -1, np.int64)
    after[:-1] = np.where(text.position[1:] > 0, codes[1:], -1)
    return after, names


def _class(piece: str) -> str:
    """number, capitalised word, word, continuation, line break, punctuation."""
    bare = piece.strip()
    if "\n" in piece:
        return "line break"
    if bare[:1].isdigit():
        return "number"
    if not bare[:1].isalpha():
        return "punctuation mark"
    if piece[:1] != " ":
        return "continuation"
    return "capitalised word" if bare[0].isupper() else "word"


def _next(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    return _coded(
        text, *next_labels(text, patterns[0].family), [pattern.arguments[0] for pattern in patterns]
    )


def _foreign(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    return from_flags([foreign.mask(text, pattern) for pattern in patterns], len(text))


def _many(text: Text, patterns: Sequence[Pattern]) -> csc_array:
    """Compounds, their parts made once for all of them: `any` has one of its parts, `all` has each."""
    parts = {part.spec: part for pattern in patterns for part in pattern.arguments}
    column_of = {spec: number for number, spec in enumerate(parts)}
    columns_of = [sorted({column_of[part.spec] for part in pattern.arguments}) for pattern in patterns]
    sizes = np.array([len(members) for members in columns_of])
    member = csc_array(
        (
            np.ones(int(sizes.sum()), np.int16),
            np.concatenate(columns_of),
            np.concatenate([[0], np.cumsum(sizes)]),
        ),
        shape=(len(parts), len(patterns)),
    )
    met = csc_array(masks(text, list(parts.values())).astype(np.int16) @ member)
    met.sort_indices()
    needed = np.repeat(sizes if patterns[0].family == "all" else np.ones_like(sizes), np.diff(met.indptr))
    kept = met.data >= needed
    before = np.concatenate([[0], np.cumsum(kept)])
    return columns(before[met.indptr], met.indices[kept], len(text))


_FAMILIES: dict[str, Callable[[Text, Sequence[Pattern]], csc_array]] = {
    "tokens": sequences.masks,
    "folded": sequences.masks,
    "word": _word,
    "words": _words,
    "topic": _topic,
    "suffix": _labels,
    "prefix": _labels,
    "shape": _labels,
    "casing": _labels,
    "digits": _labels,
    "lemma": _labels,
    "form": _form,
    "position": _position,
    "followed": _following,
    "next": _following,
    "nextword": _next,
    "nextclass": _next,
    "regex": _foreign,
    "file": _foreign,
    "predicate": _foreign,
    "all": _many,
    "any": _many,
}


# -- All the patterns that a text has: the columns among which a search looks ----------------------------------


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
    makers = {MAIN: _mine_main, NEXT: _mine_next, POSITION: _mine_position}
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


def _mine_main(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
    for head in ("tokens", "folded"):
        yield sequences.mine(text, head, text.counted, limits.least)
    for head, size in (("word", 0), *((h, n) for h in ("suffix", "prefix") for n in forms.AFFIXES)):
        yield _labelled(text, head, size, limits)
    for head in ("shape", "casing", *(["lemma"] if find_spec("simplemma") else [])):
        yield _labelled(text, head, 0, limits)
    yield _each(list(BUILTINS), from_flags(forms.flags(text, list(BUILTINS)), len(text)))
    yield _labelled(text, "digits", 0, limits)  # after what has a name: a year is a year first
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


def _mine_next(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
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


def _mine_position(text: Text, limits: Limits, seed: int) -> Iterator[Mined]:
    specs, low = [f"position:{position}" for position in range(1, 8)], 1
    while len(text) and low <= text.position.max():
        specs += [f"position:{low}-{2 * low - 1}", f"position:{low}-"]
        low *= 2
    specs = list(dict.fromkeys(spec for spec in specs if spec != "position:1-1"))
    yield _each(specs, masks(text, specs))


def _spec(head: str, token: str | int) -> str:
    return f"{head}:{sequences.written(token)}"
