"""Find the patterns that the triggers of each unit share beyond chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from mnemoscope.patterns import combine
from mnemoscope.patterns.calibration import Null, draw, grouped
from mnemoscope.patterns.combine import word_unions
from mnemoscope.patterns.mined import Limits
from mnemoscope.patterns.pattern import Pattern, conjunction, disjunction
from mnemoscope.patterns.score import MOST, Shared, Top, best, log_binomial_tail, shared
from mnemoscope.patterns.space import BACKGROUND, Space
from mnemoscope.records import MAIN, NEXT, POSITION
from mnemoscope.run.text import Text
from mnemoscope.text.split import halves

CHUNK = 1000  # sets at a time
BEAM = 20  # patterns of a set that compounds are made of

FOUND: dict[str, Any] = {
    "unit": pl.Int64,
    "tests": pl.String,
    "rank": pl.Int16,
    "role": pl.String,
    "spec": pl.String,
    "name": pl.String,
    "family": pl.String,
    "kind": pl.String,
    "complexity": pl.Int16,
    "n": pl.Int32,
    "hits": pl.Int32,
    "base_rate": pl.Float64,
    "p": pl.Float64,
    "p_family": pl.Float64,
    "equivalents": pl.List(pl.String),
}


@dataclass(frozen=True)
class Units:
    """Triggers of units as rows of a text, strongest first: those of unit i are `rows[indptr[i] : indptr[i + 1]]`."""

    indptr: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, triggers: Sequence[Sequence[int] | np.ndarray]) -> Units:
        """From one list of rows for each unit."""
        sizes = [len(rows) for rows in triggers]
        flat = [np.asarray(rows, np.int64) for rows in triggers]
        return cls(np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([*flat, np.zeros(0, np.int64)]))

    def __len__(self) -> int:
        return len(self.indptr) - 1


@dataclass(frozen=True)
class Options:
    """How to search.

    tests             families of tests, each with p-values of its own
    draws             drawn sets in the null of each group of units
    covering          patterns of a unit, each found in what the earlier ones leave unexplained
    alternatives      further candidates: other readings of the same triggers, for the two-way test to choose from
    background        prefixes that rates are taken from, at most
    split             search in the discovery half alone
    one_per_document  of several triggers in a document, take the strongest
    stratify          take chance at the position and the token frequency of each trigger (N1), not overall (N0)

    The last three are protections; without any of them the p-values are wrong (tests show how wrong).
    """

    tests: tuple[str, ...] = (MAIN, NEXT, POSITION)
    draws: int = 2000
    covering: int = 3
    alternatives: int = 2
    limits: Limits = field(default_factory=Limits)
    background: int = BACKGROUND
    split: bool = True
    one_per_document: bool = True
    stratify: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What a search found.

    candidates   sorted by unit, tests, rank (columns of `FOUND`). p is the binomial tail of hits of n at
                 base_rate; p_family the chance of a p as small anywhere in the language for triggers drawn at random.
                 Rank 0 of each family of tests is its best. `role`: `best`, `meaning` (covering), `other`
    calibration  one row per family of tests and group of units: tests, group, units, triggers (median), draws,
                 patterns, classes, p_05, p_01 (quantiles of the smallest p), effective_tests
    group        for each family of tests i64[unit]: the group of each unit, -1 for one with too few triggers
    language     of the main family, for each class of patterns: its spec, the spec of the last word that it stands for
                 ("" if it is no word), and the share of the prefixes that have it
    """

    candidates: pl.DataFrame
    calibration: pl.DataFrame
    group: dict[str, np.ndarray]
    language: list[tuple[str, str, float]]


def search(
    text: Text,
    units: Units,
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """Search the triggers of all units for patterns, in the discovery half of the documents.

    `PatternError` if the text has too few documents to split. `progress(stage, done, total)` is called as it goes.
    """
    options = options or Options()
    documents = halves(text.document[text.counted])[0] if options.split else np.unique(text.document)
    part, rows = text.part(documents)
    back = np.full(len(text), -1)
    back[rows] = np.arange(len(rows))
    slots = one_each(part, units, back[units.rows], one_per_document=options.one_per_document)
    tell = progress or (lambda stage, done, total: None)
    frames, quantiles, group = [], [], {}
    language: list[tuple[str, str, float]] = []
    for tests in options.tests:
        tell(f"patterns ({tests})", 0, len(units))
        needed = np.unique(slots[slots >= 0])
        space = Space.of(
            part,
            tests,
            limits=options.limits,
            stratify=options.stratify,
            needed=needed,
            background=options.background,
            seed=options.seed,
        )
        points = np.where(slots >= 0, space.point(slots), -1)
        frame, null = _family(space, points, tests, options, tell)
        frames.append(frame)
        quantiles.append(_quantiles(space, points, tests, null))
        group[tests] = null.group
        if tests == MAIN:
            language = list(zip(space.specs, space.last_words, space.rate.tolist(), strict=True))
    candidates = pl.concat(frames) if frames else pl.DataFrame(schema=FOUND)
    return Found(candidates.sort("unit", "tests", "rank"), pl.concat(quantiles), group, language)


def one_each(text: Text, units: Units, rows: np.ndarray, *, one_per_document: bool = True) -> np.ndarray:
    """i64[unit, slot]: the strongest triggers of each unit in different documents, at most 64; -1 is none.

    rows   the triggers as rows of `text`, -1 for one that is not in it
    """
    owner = np.repeat(np.arange(len(units)), np.diff(units.indptr))
    ok = rows >= 0
    ok[ok] = text.counted[rows[ok]]
    owner, rows = owner[ok], rows[ok]
    if one_per_document and len(rows):
        order = np.lexsort((np.arange(len(rows)), text.document[rows], owner))
        new = np.ones(len(rows), bool)
        same = text.document[rows[order]]
        new[1:] = (owner[order][1:] != owner[order][:-1]) | (same[1:] != same[:-1])
        first = np.sort(order[new])
        owner, rows = owner[first], rows[first]
    place = np.arange(len(rows)) - np.searchsorted(owner, np.arange(len(units)))[owner]
    kept = place < MOST
    out = np.full((len(units), int(min(place.max(initial=-1) + 1, MOST))), -1)
    out[owner[kept], place[kept]] = rows[kept]
    return out


def _family(
    space: Space, slots: np.ndarray, tests: str, options: Options, tell: Callable[[str, int, int], None]
) -> tuple[pl.DataFrame, Null]:
    """Candidates and null of one family of tests."""
    enough = np.flatnonzero((slots >= 0).sum(1) >= 3)
    some = slots[enough]
    groups = grouped(space, some, options.seed)
    random = np.random.default_rng(options.seed + 1)
    scores = np.zeros((int(groups.max(initial=-1)) + 1, options.draws))
    for group in range(len(scores)):
        members = np.flatnonzero(groups == group)
        drawn = draw(
            space,
            some[random.choice(members, options.draws)],
            random,
            one_per_document=options.one_per_document,
        )
        scores[group] = np.sort(chosen(space, drawn, tests).score)
        tell(f"null ({tests})", group + 1, len(scores))
    of = np.full(len(slots), -1)
    of[enough] = groups
    null = Null(of, scores)
    found: list[_Candidates] = []
    choice = chosen(
        space, some, tests, found, options, lambda done: tell(f"search ({tests})", done, len(some))
    )
    return _table(space, some, enough, choice, found, null, tests), null


@dataclass(frozen=True)
class _Candidates:
    """Patterns proposed for sets i64[case], besides the best, with their trials."""

    role: str
    sets: np.ndarray
    choice: combine.Choice
    trials: np.ndarray

    @classmethod
    def of(cls, role: str, pairs: Shared, start: int, trials: np.ndarray) -> _Candidates:
        """Single patterns of sets that are counted from `start`."""
        parts = (pairs.column, pairs.bits, pairs.base, pairs.log_p)
        return cls(
            role,
            pairs.set + start,
            combine.singles(Top(*(part[:, None] for part in parts))),
            trials[pairs.set],
        )


def chosen(
    space: Space,
    slots: np.ndarray,
    tests: str,
    found: list[_Candidates] | None = None,
    options: Options | None = None,
    tell: Callable[[int], None] | None = None,
) -> combine.Choice:
    """The best pattern of each set, simple or compound; the same for real and for drawn sets.

    Further candidates are added to `found`, if it is given.
    """
    price = float(np.log(max(len(space.specs), 2)))
    choices = []
    for start in range(0, len(slots), CHUNK):
        some = slots[start : start + CHUNK]
        trials = (some >= 0).sum(1)
        pairs = shared(space, some)
        top = best(pairs, len(some), BEAM, space.aspect)
        choice = combine.singles(top)
        if tests == MAIN:
            combine.widen(choice, top, trials, price)
            combine.narrow(choice, top, space, some, trials, price)
        choices.append(choice)
        if found is not None and options is not None:
            _further(found, pairs, trials, start, options if tests == MAIN else replace(options, covering=1))
            if tests == MAIN:
                _kinds(found, space, some, pairs, start, price)
        if tell:
            tell(min(start + CHUNK, len(slots)))
    return combine.stacked(choices)


def _further(
    found: list[_Candidates], pairs: Shared, trials: np.ndarray, start: int, options: Options
) -> None:
    """Patterns that cover what the best one leaves, one after another; other readings of the whole."""
    rest = pairs
    left = trials.copy()
    for _ in range(options.covering):
        top = best(rest, len(trials), 1)
        sets = np.flatnonzero(top.column[:, 0] >= 0)
        if not len(sets):
            break
        taken = Shared(sets, top.column[sets, 0], top.bits[sets, 0], top.base[sets, 0], top.log_p[sets, 0])
        found.append(_Candidates.of("meaning", taken, start, left))
        gone = np.zeros(len(trials), np.uint64)
        gone[sets] = taken.bits
        bits = rest.bits & ~gone[rest.set]
        left = left - np.bitwise_count(gone)
        kept = np.flatnonzero((np.bitwise_count(bits) >= 3) & (gone[rest.set] > 0))
        log_p = log_binomial_tail(np.bitwise_count(bits[kept]), left[rest.set[kept]], rest.base[kept])
        rest = Shared(rest.set[kept], rest.column[kept], bits[kept], rest.base[kept], log_p)
        rest = rest.take(np.flatnonzero(rest.log_p < -1))
    for other in _readings(best(pairs, len(trials), 12), options.alternatives):
        found.append(_Candidates.of("other", other, start, trials))


def _kinds(
    found: list[_Candidates], space: Space, slots: np.ndarray, pairs: Shared, start: int, price: float
) -> None:
    """Other readings whatever their tail: the best topic or list of words, the last word, several last words."""
    trials = (slots >= 0).sum(1)
    listed = pairs.take(np.flatnonzero(space.listed[pairs.column]))
    top = best(listed, len(slots), 1)
    sets = np.flatnonzero(top.column[:, 0] >= 0)
    one = Shared(sets, top.column[sets, 0], top.bits[sets, 0], top.base[sets, 0], top.log_p[sets, 0])
    found.append(_Candidates.of("other", one, start, trials))
    for sets, choice in word_unions(space, slots, price):
        found.append(_Candidates("other", sets + start, choice, trials[sets]))


def _readings(top: Top, count: int) -> list[Shared]:
    """Of each set's best patterns those that differ from the best and from each other: in the triggers that
    have them (Jaccard below .7), or in how common they are (by a factor of 2)."""
    sets = np.arange(len(top.column))
    places = [np.zeros(len(sets), np.int64)]
    out = []
    for _ in range(count):
        fresh = top.column >= 0
        for place in places:
            bits, base = top.bits[sets, place][:, None], top.base[sets, place][:, None]
            both, either = np.bitwise_count(top.bits & bits), np.bitwise_count(top.bits | bits)
            ratio = np.maximum(top.base, base) / np.maximum(np.minimum(top.base, base), 1e-12)
            fresh &= (both < 0.7 * either) | (ratio > 2)
        place = fresh.argmax(1)
        some = np.flatnonzero(fresh[sets, place])
        where = (some, place[some])
        out.append(Shared(some, top.column[where], top.bits[where], top.base[where], top.log_p[where]))
        places.append(np.where(fresh[sets, place], place, 0))
    return out


def _table(
    space: Space,
    slots: np.ndarray,
    units: np.ndarray,
    choice: combine.Choice,
    found: list[_Candidates],
    null: Null,
    tests: str,
) -> pl.DataFrame:
    """Rows of `FOUND`: the best of each set, then what else was proposed, each spec once."""
    trials = (slots >= 0).sum(1)
    some = np.flatnonzero(choice.score < 0)
    sets = [some, *(item.sets for item in found)]
    columns = [choice.columns[some], *(item.choice.columns for item in found)]
    how = [choice.how[some], *(item.choice.how for item in found)]
    frame = pl.DataFrame(
        {
            "set": np.concatenate(sets),
            "order": np.repeat(np.arange(len(sets)), [len(part) for part in sets]),
            "role": np.repeat(["best", *(item.role for item in found)], [len(part) for part in sets]),
            "pattern": _numbered(np.concatenate(how), np.concatenate(columns)),
            "n": np.concatenate([trials[some], *(item.trials for item in found)]),
            "hits": np.bitwise_count(
                np.concatenate([choice.bits[some], *(item.choice.bits for item in found)])
            ),
            "base_rate": np.concatenate([choice.base[some], *(item.choice.base for item in found)]),
            "log_p": np.concatenate([choice.log_p[some], *(item.choice.log_p for item in found)]),
            "score": np.concatenate([choice.score[some], *(item.choice.score for item in found)]),
            "place": np.arange(sum(map(len, sets))),
        }
    )
    # The null is of what `chosen` returns: without it, other readings have nothing to be measured by.
    frame = frame.filter(pl.Series(choice.score[frame["set"].to_numpy()] < 0))
    frame = frame.sort("set", "order").unique(["set", "pattern"], keep="first", maintain_order=True)
    frame = frame.with_columns(rank=pl.int_range(pl.len()).over("set"))
    unit = units[frame["set"].to_numpy()]
    kinds = _described(space, np.concatenate(how), np.concatenate(columns), frame.select("pattern", "place"))
    return (
        frame.with_columns(
            unit=pl.Series(unit),
            tests=pl.lit(tests),
            p=pl.Series(np.exp(np.maximum(frame["log_p"].to_numpy(), -690))),
            p_family=pl.Series(null.p(frame["score"].to_numpy(), unit)),
        )
        .join(kinds, on="pattern", how="left", maintain_order="left")
        .select(pl.col(name).cast(dtype) for name, dtype in FOUND.items())
    )


def _numbered(how: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """i64[row]: one number for each different pattern."""
    parts = np.sort(columns, 1)
    return np.unique(np.concatenate([how[:, None], parts], 1), axis=0, return_inverse=True)[1].ravel()


def _described(space: Space, how: np.ndarray, columns: np.ndarray, frame: pl.DataFrame) -> pl.DataFrame:
    """For each different pattern its spec, name, family, kind, complexity and equivalents."""
    rows = []
    for number, place in frame.unique("pattern", maintain_order=True).iter_rows():
        pattern = _pattern(space, int(how[place]), columns[place])
        same = list(space.names[columns[place, 0]][1:]) if how[place] == combine.SINGLE else []
        rows.append(
            (number, pattern.spec, pattern.name, pattern.family, pattern.kind, pattern.complexity, same[:8])
        )
    names = ("spec", "name", "family", "kind", "complexity", "equivalents")
    return pl.DataFrame(
        rows,
        schema={"pattern": pl.Int64, **{name: FOUND[name] for name in names}},
        orient="row",
    )


def _pattern(space: Space, how: int, columns: np.ndarray) -> Pattern:
    parts = tuple(space.pattern(int(column)) for column in columns if column >= 0)
    if how == combine.SINGLE:
        return parts[0]
    return (conjunction if how == combine.ALL else disjunction)(parts)


def _quantiles(space: Space, slots: np.ndarray, tests: str, null: Null) -> pl.DataFrame:
    groups = range(len(null.scores))
    numbers = (slots >= 0).sum(1)
    return pl.DataFrame(
        {
            "tests": [tests for _ in groups],
            "group": list(groups),
            "units": [int((null.group == g).sum()) for g in groups],
            "triggers": [float(np.median(numbers[null.group == g])) for g in groups],
            "draws": [null.scores.shape[1] for _ in groups],
            "patterns": [sum(map(len, space.names)) for _ in groups],
            "classes": [len(space.specs) for _ in groups],
            "p_05": null.quantile(0.05),
            "p_01": null.quantile(0.01),
            "effective_tests": null.effective_tests(),
        },
        schema_overrides={
            "triggers": pl.Float64,
            "p_05": pl.Float64,
            "p_01": pl.Float64,
            "effective_tests": pl.Float64,
        },
    )


__all__ = ["FOUND", "Found", "Options", "Units", "one_each", "search"]
