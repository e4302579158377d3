"""Find the patterns that the triggers of each unit share beyond chance."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl

from mnemoscope.patterns import combine
from mnemoscope.patterns.calibration import GROUPS, OF_EXPERT, DrawnNull, draw, grouped
from mnemoscope.patterns.combine import word_unions
from mnemoscope.patterns.pattern import ALL, SINGLE, Pattern, conjunction, disjunction
from mnemoscope.patterns.score import SUPPORT, SharedPatterns, Top, best, log_binomial_tail, shared
from mnemoscope.patterns.space import Space
from mnemoscope.patterns.triggers import FOUND, Options, OwnTexts, Units, half_triggers
from mnemoscope.records import MAIN
from mnemoscope.run.text import Text

CHUNK = 4000  # sets at a time
BEAM = 20  # patterns of a set that compounds are made of


@dataclass(frozen=True)
class SearchResult:
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
    own: OwnTexts | None = None,
) -> SearchResult:
    """Search the triggers of all units for patterns, in the discovery half of the documents.

    The language is that of the whole half. How often a pattern is met by chance, and what drawn sets have, is counted
    for each of the texts of units (`own`; by default there is one) in that text.

    `PatternError` if the text has too few documents to split. `progress(stage, done, total)` is called as it goes.
    """
    options, own = options or Options(), own or OwnTexts.whole(len(units))
    early, slots, rows = half_triggers(text, units, options, test=False)
    tell = progress or (lambda stage, done, total: None)
    frames, quantiles, group = [], [], {}
    language: list[tuple[str, str, float]] = []
    for tests in options.tests:
        tell(f"patterns ({tests})", 0, len(units))
        needed = np.unique(slots[slots >= 0])
        space = Space.of(
            early,
            tests,
            limits=options.limits,
            stratify=options.stratify,
            needed=needed,
            background=options.background,
            seed=options.seed,
            known=None if own.known is None else own.known[rows],
        )
        group[tests], count = np.full(len(units), -1), 0
        for members, routed in own.split(np.arange(len(units)), rows):
            here = space if routed is None else space.routed(routed, options.limits.most)
            points = np.where(slots[members] >= 0, here.point(slots[members]), -1)
            most = GROUPS if routed is None else OF_EXPERT
            frame, null = _family(here, points, tests, options, most, tell)
            frames.append(
                frame.with_columns(unit=pl.Series(members[frame["unit"].to_numpy()], dtype=pl.Int64))
            )
            quantiles.append(
                _quantiles(here, points, tests, null).with_columns(group=pl.col("group") + count)
            )
            group[tests][members] = np.where(null.group >= 0, null.group + count, -1)
            count += len(null.scores)
        if tests == MAIN:
            language = list(zip(space.specs, space.last_words, space.rate.tolist(), strict=True))
    candidates = pl.concat(frames) if frames else pl.DataFrame(schema=FOUND)
    return SearchResult(candidates.sort("unit", "tests", "rank"), pl.concat(quantiles), group, language)


def _family(
    space: Space,
    slots: np.ndarray,
    tests: str,
    options: Options,
    most: int,
    tell: Callable[[str, int, int], None],
) -> tuple[pl.DataFrame, DrawnNull]:
    """Candidates and null of one family of tests, the null in at most so many groups."""
    enough = np.flatnonzero((slots >= 0).sum(1) >= SUPPORT)
    sets = slots[enough]
    groups = grouped(space, sets, options.seed, most)
    random = np.random.default_rng(options.seed + 1)
    scores = np.zeros((int(groups.max(initial=-1)) + 1, options.draws))
    for group in range(len(scores)):
        members = np.flatnonzero(groups == group)
        drawn = draw(
            space,
            sets[random.choice(members, options.draws)],
            random,
            one_per_document=options.one_per_document,
        )
        scores[group] = np.sort(chosen(space, drawn, tests, options).score)
        tell(f"null ({tests})", group + 1, len(scores))
    group_of = np.full(len(slots), -1)
    group_of[enough] = groups
    null = DrawnNull(group_of, scores)
    proposals: list[_Candidates] = []
    choice = chosen(
        space, sets, tests, options, proposals, lambda done: tell(f"search ({tests})", done, len(sets))
    )
    return _table(space, sets, enough, choice, proposals, null, tests), null


@dataclass(frozen=True)
class _Candidates:
    """Patterns proposed for sets i64[case], besides the best, with their trials."""

    role: str
    sets: np.ndarray
    choice: combine.BestPatterns
    trials: np.ndarray

    @classmethod
    def of(cls, role: str, pairs: SharedPatterns, start: int, trials: np.ndarray) -> _Candidates:
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
    options: Options,
    proposals: list[_Candidates] | None = None,
    tell: Callable[[int], None] | None = None,
) -> combine.BestPatterns:
    """The best pattern of each set, simple or compound; the same for real and for drawn sets.

    Further candidates are added to `proposals`, if it is given.
    """
    read = partial(_chosen, space, slots, tests, options, proposals is not None)
    starts = range(0, len(slots), CHUNK)
    choices = []
    pool = ThreadPoolExecutor(options.threads)
    try:
        for start, (choice, further) in zip(starts, pool.map(read, starts), strict=True):
            choices.append(choice)
            if proposals is not None:
                proposals += further
            if tell:
                tell(min(start + CHUNK, len(slots)))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for the rest
    return combine.stacked(choices)


def _chosen(
    space: Space, slots: np.ndarray, tests: str, options: Options, further: bool, start: int
) -> tuple[combine.BestPatterns, list[_Candidates]]:
    """The same of the sets from `start` on, and what else is proposed for them."""
    price = float(np.log(max(len(space.specs), 2)))
    sets = slots[start : start + CHUNK]
    trials = (sets >= 0).sum(1)
    pairs = shared(space, sets)
    top = best(pairs, len(sets), BEAM, space.aspect)
    choice = combine.singles(top)
    if tests == MAIN:
        combine.disjoin(choice, top, trials, price)
        combine.conjoin(choice, top, space, sets, trials, price)
    proposals: list[_Candidates] = []
    if further:
        _further(proposals, pairs, trials, start, options if tests == MAIN else replace(options, covering=1))
        if tests == MAIN:
            _kinds(proposals, space, sets, pairs, start, price)
    return choice, proposals


def _further(
    proposals: list[_Candidates], pairs: SharedPatterns, trials: np.ndarray, start: int, options: Options
) -> None:
    """Patterns that cover what the best one leaves, one after another; other readings of the whole."""
    rest = pairs
    left = trials.copy()
    for _ in range(options.covering):
        top = best(rest, len(trials), 1)
        sets = np.flatnonzero(top.column[:, 0] >= 0)
        if not len(sets):
            break
        taken = top.pick(sets)
        proposals.append(_Candidates.of("meaning", taken, start, left))
        gone = np.zeros(len(trials), np.uint64)
        gone[sets] = taken.bits
        bits = rest.bits & ~gone[rest.set]
        left = left - np.bitwise_count(gone)
        kept = np.flatnonzero((np.bitwise_count(bits) >= 3) & (gone[rest.set] > 0))
        log_p = log_binomial_tail(np.bitwise_count(bits[kept]), left[rest.set[kept]], rest.base[kept])
        rest = SharedPatterns(rest.set[kept], rest.column[kept], bits[kept], rest.base[kept], log_p)
        rest = rest.take(np.flatnonzero(rest.log_p < -1))
    for other in _readings(best(pairs, len(trials), 12), options.alternatives):
        proposals.append(_Candidates.of("other", other, start, trials))


def _kinds(
    proposals: list[_Candidates],
    space: Space,
    slots: np.ndarray,
    pairs: SharedPatterns,
    start: int,
    price: float,
) -> None:
    """Propose readings whatever their tail: the best topic or list of words, the last word, several last words."""
    trials = (slots >= 0).sum(1)
    listed = pairs.take(np.flatnonzero(space.listed[pairs.column]))
    top = best(listed, len(slots), 1)
    sets = np.flatnonzero(top.column[:, 0] >= 0)
    proposals.append(_Candidates.of("other", top.pick(sets), start, trials))
    for sets, choice in word_unions(space, slots, price):
        proposals.append(_Candidates("other", sets + start, choice, trials[sets]))


def _readings(top: Top, count: int) -> list[SharedPatterns]:
    """Choose among each set's best patterns those that differ from the best and from each other: in the triggers that
    have them (Jaccard below .7), or in how common they are (by a factor of 2)."""
    sets = np.arange(len(top.column))
    ranks = [np.zeros(len(sets), np.int64)]
    out = []
    for _ in range(count):
        fresh = top.column >= 0
        for rank in ranks:
            bits, base = top.bits[sets, rank][:, None], top.base[sets, rank][:, None]
            both, either = np.bitwise_count(top.bits & bits), np.bitwise_count(top.bits | bits)
            ratio = np.maximum(top.base, base) / np.maximum(np.minimum(top.base, base), 1e-12)
            fresh &= (both < 0.7 * either) | (ratio > 2)
        rank = fresh.argmax(1)
        fresh_sets = np.flatnonzero(fresh[sets, rank])
        out.append(top.pick(fresh_sets, rank[fresh_sets]))
        ranks.append(np.where(fresh[sets, rank], rank, 0))
    return out


def _table(
    space: Space,
    slots: np.ndarray,
    units: np.ndarray,
    choice: combine.BestPatterns,
    proposals: list[_Candidates],
    null: DrawnNull,
    tests: str,
) -> pl.DataFrame:
    """Rows of `FOUND`: the best of each set, then what else was proposed, each spec once."""
    trials = (slots >= 0).sum(1)
    sharing = np.flatnonzero(choice.score < 0)
    proposals = [_Candidates("best", sharing, choice.take(sharing), trials[sharing]), *proposals]
    sizes = [len(proposal.sets) for proposal in proposals]
    every = combine.stacked([proposal.choice for proposal in proposals])
    frame = pl.DataFrame(
        {
            "set": np.concatenate([proposal.sets for proposal in proposals]),
            "order": np.repeat(np.arange(len(sizes)), sizes),
            "role": np.repeat([proposal.role for proposal in proposals], sizes),
            "pattern": _numbered(every.how, every.columns),
            "n": np.concatenate([proposal.trials for proposal in proposals]),
            "hits": np.bitwise_count(every.bits),
            "base_rate": every.base,
            "log_p": every.log_p,
            "score": every.score,
            "place": np.arange(sum(sizes)),
        }
    )
    # The null is of what `chosen` returns: without it, other readings have nothing to be measured by.
    frame = frame.filter(pl.Series(choice.score[frame["set"].to_numpy()] < 0))
    frame = frame.sort("set", "order").unique(["set", "pattern"], keep="first", maintain_order=True)
    frame = frame.with_columns(rank=pl.int_range(pl.len()).over("set"))
    unit = units[frame["set"].to_numpy()]
    kinds = _described(space, every.how, every.columns, frame.select("pattern", "place"))
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
    rows = pl.from_numpy(np.concatenate([how[:, None], np.sort(columns, 1)], 1))
    known = rows.unique(maintain_order=True).with_row_index("number")
    return rows.join(known, on=rows.columns, how="left", maintain_order="left")["number"].to_numpy()


def _described(space: Space, how: np.ndarray, columns: np.ndarray, frame: pl.DataFrame) -> pl.DataFrame:
    """For each different pattern its spec, name, family, kind, complexity and equivalents."""
    rows = []
    for number, row in frame.unique("pattern", maintain_order=True).iter_rows():
        pattern = _pattern(space, int(how[row]), columns[row])
        same = list(space.names[columns[row, 0]][1:]) if how[row] == SINGLE else []
        rows.append(
            (number, pattern.spec, pattern.name, pattern.family, pattern.kind, pattern.complexity, same[:8])
        )
    names = ("spec", "name", "family", "kind", "complexity", "equivalents")
    return pl.DataFrame(
        rows, schema={"pattern": pl.Int64, **{name: FOUND[name] for name in names}}, orient="row"
    )


def _pattern(space: Space, how: int, columns: np.ndarray) -> Pattern:
    parts = tuple(space.pattern(int(column)) for column in columns if column >= 0)
    if how == SINGLE:
        return parts[0]
    return (conjunction if how == ALL else disjunction)(parts)


def _quantiles(space: Space, slots: np.ndarray, tests: str, null: DrawnNull) -> pl.DataFrame:
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
            "tests": pl.String,
            **dict.fromkeys(("group", "units", "draws", "patterns", "classes"), pl.Int64),
            "triggers": pl.Float64,
            "p_05": pl.Float64,
            "p_01": pl.Float64,
            "effective_tests": pl.Float64,
        },
    )
