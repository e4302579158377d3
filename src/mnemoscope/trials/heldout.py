"""Chosen patterns on triggers that had no part in choosing them: against chance, and beyond the last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.sparse import csc_array, hstack

from mnemoscope.patterns.columns import Groups, columns
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.pattern import Pattern, parse
from mnemoscope.patterns.score import log_binomial_tail, poisson_binomial_tail
from mnemoscope.patterns.search import Options, Units, one_each
from mnemoscope.patterns.sequences import hashed
from mnemoscope.patterns.space import strata
from mnemoscope.run.text import Text
from mnemoscope.text.split import halves
from mnemoscope.trials import counting

CHUNK = 2000  # specs at a time


def confirm(text: Text, units: Units, claims: pl.DataFrame, options: Options | None = None) -> pl.DataFrame:
    """`claims` (columns unit, spec among others) with `n_test`, `hits_test`, `where_test`, `base_test`, `p_test`.

    One test of each claim on the triggers of the test half, against the rate of its pattern there at the positions and
    token frequencies of those triggers (N1). p_test is 1 where there are no triggers. Across units it
    wants a correction, such as `scipy.stats.false_discovery_control`; the claims of one unit are not independent.
    Bit i of where_test says whether the i-th of these triggers, strongest first, has the pattern.
    """
    options = options or Options()
    part, slots = _triggers(text, units, options)
    rows = np.flatnonzero(part.counted)
    stratum = np.full(len(part), -1)
    stratum[rows], _ = strata(part, rows, options.stratify)
    sizes = np.bincount(stratum[rows])
    n, hits, base = (np.zeros(len(claims)) for _ in range(3))
    where = np.zeros(len(claims), np.uint64)
    bit = np.uint64(1) << np.arange(slots.shape[1], dtype=np.uint64)
    for claim, triggers, column, found in _chunks(part, slots, claims):
        filled = triggers >= 0
        values = np.where(filled, alike(found, stratum, triggers, column) / sizes[stratum[triggers]], 0)
        n[claim] = filled.sum(1)
        base[claim] = values.sum(1) / np.maximum(filled.sum(1), 1)
        shown = _has(found, triggers, column)
        hits[claim], where[claim] = shown.sum(1), (shown * bit).sum(1)
    p = np.where(n > 0, np.exp(np.maximum(log_binomial_tail(hits, n, base), -690)), 1.0)
    return claims.with_columns(
        n_test=pl.Series(n.astype(np.int32)),
        hits_test=pl.Series(hits.astype(np.int32)),
        where_test=pl.Series(where.view(np.int64)),
        base_test=pl.Series(base),
        p_test=pl.Series(p),
    )


def beyond(
    text: Text,
    units: Units,
    claims: pl.DataFrame,
    options: Options | None = None,
    *,
    tokens: int = 1,
    test: bool = True,
) -> pl.DataFrame:
    """`claims` with `n_n2`, `hits_n2`, `expected_n2` and `p_n2`: is the pattern beyond the last token(s) (N2)?

    Each trigger is compared with the prefixes of other documents that end with the same `tokens` tokens: the chance of
    the pattern there is (count + 1) / (prefixes + 2), and the hits have a Poisson binomial tail. A trigger whose ending
    stands in no other document says nothing and is left out. On the test half, or else on the half where
    the claims were found (then p_n2 is optimistic: the claims were chosen for their hits there).
    """
    options = options or Options()
    part, slots = _triggers(text, units, options, test=test)
    codes, reaches = hashed(part.tokens, part.position, tuple(range(tokens - 1, -1, -1)))
    same = _Neighbours.of(part, codes, part.counted & reaches)
    n, hits, expected = (np.zeros(len(claims)) for _ in range(3))
    p = np.ones(len(claims))
    for claim, triggers, column, found in _chunks(part, slots, claims):
        usable = (triggers >= 0) & (same.others[triggers] > 0)
        rates = np.where(usable, (same.having(found, triggers, column) + 1) / (same.others[triggers] + 2), 0)
        n[claim], expected[claim] = usable.sum(1), rates.sum(1)
        hits[claim] = (_has(found, triggers, column) & usable).sum(1)
        p[claim] = poisson_binomial_tail(hits[claim].astype(np.int64), rates)
    return claims.with_columns(
        n_n2=pl.Series(n.astype(np.int16)),
        hits_n2=pl.Series(hits.astype(np.int16)),
        expected_n2=pl.Series(expected),
        p_n2=pl.Series(p),
    )


def _triggers(text: Text, units: Units, options: Options, *, test: bool = True) -> tuple[Text, np.ndarray]:
    """The text of one half, and i64[unit, slot] the rows of the triggers there."""
    documents = halves(text.document[text.counted])[int(test)] if options.split else np.unique(text.document)
    part, rows = text.part(documents)
    back = np.full(len(text), -1)
    back[rows] = np.arange(len(rows))
    return part, one_each(part, units, back[units.rows], one_per_document=options.one_per_document)


def _chunks(
    part: Text, slots: np.ndarray, claims: pl.DataFrame
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, csc_array]]:
    """Some claims at a time: their places, their triggers i64[claim, slot], their column, the masks."""
    unit = claims["unit"].to_numpy()
    specs, number = numbered(claims["spec"])
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(0, len(specs) + CHUNK, CHUNK))
    for place, found in enumerate(portions(part, specs, CHUNK)):
        claim = order[bounds[place] : bounds[place + 1]]
        yield claim, slots[unit[claim]], number[claim] - place * CHUNK, found


def together(text: Text, specs: Sequence[str | Pattern]) -> csc_array:
    """`masks` of hundreds of thousands of specs, most of them compounds, in a third of the memory."""
    parts = list(portions(text, specs, CHUNK))
    return csc_array(hstack(parts, format="csc")) if parts else masks(text, [])


def portions(text: Text, specs: Sequence[str | Pattern], size: int) -> Iterator[csc_array]:
    """`masks` of so many specs after another; what compounds are made of is made once for all of them."""
    patterns = [parse(spec) for spec in specs]
    parts = {part.spec: part for pattern in patterns for part in _parts(pattern)}
    place = {spec: number for number, spec in enumerate(parts)}
    found = masks(text, list(parts.values()))
    found.sort_indices()
    for start in range(0, len(patterns), size):
        yield _merged(found, place, patterns[start : start + size])


def _parts(pattern: Pattern) -> tuple[Pattern, ...]:
    """What a compound is made of; another pattern is its own only part."""
    return pattern.arguments if pattern.family in ("any", "all") else (pattern,)


def _merged(found: csc_array, place: Mapping[str, int], patterns: Sequence[Pattern]) -> csc_array:
    """Compounds from the masks of their parts: `any` has one of its parts, `all` has each.

    place   the column of each part, by its spec
    """
    own = [sorted({place[part.spec] for part in _parts(pattern)}) for pattern in patterns]
    sizes = np.array([len(mine) for mine in own])
    needed = np.where([pattern.family == "all" for pattern in patterns], sizes, 1)
    starts, parts = np.concatenate([[0], np.cumsum(sizes)]), np.concatenate(own)
    ends = np.zeros(len(own) + 1, np.int64)
    rows = np.empty(int(np.diff(found.indptr)[parts].sum()), np.int32)
    counting.merged(found.indptr, found.indices, starts, parts, needed, ends[1:], rows)
    return columns(ends, rows[: ends[-1]], found.shape[0])


def numbered(names: pl.Series) -> tuple[list[str], np.ndarray]:
    """Different names in order, and i64[row] which of them each is. (Arrays of text are as wide as the longest.)"""
    different = names.unique().sort()
    number = names.cast(pl.Enum(different)).to_physical() if len(names) else different
    return different.to_list(), number.to_numpy().astype(np.int64)


def alike(found: csc_array, code: np.ndarray, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """i64[claim, slot]: how many prefixes have the pattern of a claim and the code of its row; 0 for no row (-1).

    code    i64[prefix]  -1 for one that is not counted
    column  i64[claim]   ascending
    """
    out = np.zeros(rows.shape, np.int64)
    sizes = np.zeros(int(code.max(initial=-1)) + 1, np.int32)
    counting.alike(found.indptr, found.indices, code, rows, column, sizes, out)
    return out


def _has(found: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """bool[claim, slot]: whether each row (-1 is none) has the pattern of its claim."""
    return alike(found, np.arange(found.shape[0]), rows, column) > 0


class _Neighbours(NamedTuple):
    """Prefixes with the same ending, and those of them in the same document.

    ending  i64[prefix]  a number for each ending, -1 for a prefix that is not compared
    own     i64[prefix]  a number for each ending in each document
    others  i64[prefix]  prefixes with its ending in other documents
    """

    ending: np.ndarray
    own: np.ndarray
    others: np.ndarray

    @classmethod
    def of(cls, text: Text, codes: np.ndarray, usable: np.ndarray) -> _Neighbours:
        groups = Groups(codes, usable)  # in ascending order of rows, so documents lie together
        documents = text.document[groups.rows]
        new = np.ones(len(documents), bool)
        new[1:] = documents[1:] != documents[:-1]
        new[groups.starts[:-1]] = True
        ending, own = np.full((2, len(text)), -1)
        ending[groups.rows] = np.repeat(np.arange(len(groups.codes)), np.diff(groups.starts))
        own[groups.rows] = np.cumsum(new) - 1
        others = np.zeros(len(text), np.int64)
        sizes = [np.bincount(part[groups.rows])[part[groups.rows]] for part in (ending, own)]
        others[groups.rows] = sizes[0] - sizes[1]
        return cls(ending, own, others)

    def having(self, found: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
        """i64[claim, slot]: how many of those others have the pattern of the claim."""
        whole, own = (alike(found, code, rows, column) for code in (self.ending, self.own))
        return np.asarray(whole - own)
