"""Candidates on triggers that had no part in finding them: against chance, and beyond the last token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
from scipy.sparse import csc_array, hstack
from scipy.stats import false_discovery_control

from mnemoscope.patterns.columns import Groups, columns
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.pattern import Pattern, parse
from mnemoscope.patterns.score import log_binomial_tail, poisson_binomial_tail
from mnemoscope.patterns.sequences import hashed
from mnemoscope.patterns.space import strata
from mnemoscope.patterns.triggers import Options, OwnTexts, Units, half_triggers
from mnemoscope.run.text import Text
from mnemoscope.trials import counting

if TYPE_CHECKING:
    from mnemoscope.patterns.triggers import Addressed

CHUNK = 2000  # specs at a time
LEVEL = 0.05  # of p_family: units whose best pattern drawn sets equal more often are not tested further
FURTHER = (pl.col("p_family").first() <= LEVEL).over("unit", "tests")
_COLUMNS = {  # how `confirm` calls columns, and how the table does
    "n_test": "test_triggers",
    "hits_test": "test_hits",
    "where_test": "test_where",
    "base_test": "test_base_rate",
    "p_test": "test_p",
}


def hold_out(
    text: Text, units: Addressed, candidates: pl.DataFrame, options: Options, own: OwnTexts | None = None
) -> pl.DataFrame:
    """Candidates of a search with what the triggers of the test half say of them; chance is that of the text that the
    units run on (`own`; by default all of it).

    Adds test_triggers, test_hits, test_where, test_base_rate, test_p and `q` (N1), token_p, token_rate and `token_q`
    (N2, of semantic patterns).
    """
    confirmed = confirm(text, units.units, candidates, options, own).rename(_COLUMNS)
    semantic = np.flatnonzero((candidates["kind"] == "semantic").to_numpy())
    against = beyond_last_token(text, units.units, candidates[semantic], options, own)
    p, rate, asked = np.ones(len(candidates)), np.zeros(len(candidates)), np.zeros(len(candidates), bool)
    p[semantic], asked[semantic] = against["p_n2"], against["n_n2"] > 0
    rate[semantic] = (against["expected_n2"] / against["n_n2"].clip(1)).to_numpy()
    confirmed = confirmed.with_columns(token_p=pl.Series(p), token_rate=pl.Series(rate))
    return _with_rates(confirmed, units.kind[candidates["unit"].to_numpy()] == 0, asked)


def _with_rates(frame: pl.DataFrame, real: np.ndarray, asked: np.ndarray) -> pl.DataFrame:
    """Adds `q` and `token_q`: for each family of tests, over the candidates of neurons that went further.

    real, asked  bool[candidate]: whether it is of a neuron, and whether N2 was asked
    """
    further = frame.select(FURTHER).to_series().to_numpy()
    q, token_q = np.ones((2, len(frame)))
    for tests in frame["tests"].unique():
        of_family = (frame["tests"] == tests).to_numpy() & further
        for rates, name, rows in ((q, "test_p", of_family), (token_q, "token_p", of_family & asked)):
            rates[rows] = discovery_rate(frame[name].to_numpy()[rows], real[rows])
    return frame.with_columns(q=pl.Series(q), token_q=pl.Series(token_q))


def discovery_rate(p: np.ndarray, among: np.ndarray) -> np.ndarray:
    """f64[test]: the false discovery rate at which each test would be accepted (Benjamini and Hochberg 1995).

    among  bool[test]: the tests that are counted. Others (of nulls) get the rate of the next larger counted one,
           which is to say: they would be accepted by the same bound on p
    """
    if not among.any():
        return np.ones(len(p))
    counted = np.sort(p[among])
    rates = np.maximum.accumulate(false_discovery_control(counted))
    next_larger = np.searchsorted(counted, p)
    return np.where(next_larger < len(counted), rates[np.minimum(next_larger, len(counted) - 1)], 1.0)


def confirm(
    text: Text,
    units: Units,
    claims: pl.DataFrame,
    options: Options | None = None,
    own: OwnTexts | None = None,
) -> pl.DataFrame:
    """`claims` (columns unit, spec among others) with `n_test`, `hits_test`, `where_test`, `base_test`, `p_test`.

    One test of each claim on the triggers of the test half, against the rate of its pattern there at the positions and
    token frequencies of those triggers (N1). p_test is 1 where there are no triggers. Across units it
    wants a correction, such as `scipy.stats.false_discovery_control`; the claims of one unit are not independent.
    Bit i of where_test says whether the i-th of these triggers, strongest first, has the pattern.
    """
    options, own = options or Options(), own or OwnTexts.whole(len(units))
    half, slots, rows = half_triggers(text, units, options, test=True)
    n, hits, base = (np.zeros(len(claims)) for _ in range(3))
    where = np.zeros(len(claims), np.uint64)
    bit = np.uint64(1) << np.arange(slots.shape[1], dtype=np.uint64)
    parts = PartMasks(half, claims["spec"])
    for of_text, routed in own.split(claims["unit"].to_numpy(), rows):
        points = np.flatnonzero(half.counted if routed is None else half.counted & routed)
        stratum = np.full(len(half), -1)
        stratum[points], _ = strata(half, points, options.stratify)
        sizes = np.bincount(stratum[points])
        for place, triggers, column, chunk in _chunks(parts, slots, claims[of_text]):
            claim, filled = of_text[place], triggers >= 0
            values = np.where(
                filled, count_same_code(chunk, stratum, triggers, column) / sizes[stratum[triggers]], 0
            )
            n[claim] = filled.sum(1)
            base[claim] = values.sum(1) / np.maximum(filled.sum(1), 1)
            has = _has(chunk, triggers, column)
            hits[claim], where[claim] = has.sum(1), (has * bit).sum(1)
    p = np.where(n > 0, np.exp(np.maximum(log_binomial_tail(hits, n, base), -690)), 1.0)
    return claims.with_columns(
        n_test=pl.Series(n.astype(np.int32)),
        hits_test=pl.Series(hits.astype(np.int32)),
        where_test=pl.Series(where.view(np.int64)),
        base_test=pl.Series(base),
        p_test=pl.Series(p),
    )


def beyond_last_token(
    text: Text,
    units: Units,
    claims: pl.DataFrame,
    options: Options | None = None,
    own: OwnTexts | None = None,
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
    options, own = options or Options(), own or OwnTexts.whole(len(units))
    half, slots, rows = half_triggers(text, units, options, test=test)
    codes, reaches = hashed(half.tokens, half.position, tuple(range(tokens - 1, -1, -1)))
    n, hits, expected = (np.zeros(len(claims)) for _ in range(3))
    p = np.ones(len(claims))
    parts = PartMasks(half, claims["spec"])
    for of_text, routed in own.split(claims["unit"].to_numpy(), rows):
        compared = half.counted & reaches
        same = _Neighbours.of(half, codes, compared if routed is None else compared & routed)
        for place, triggers, column, chunk in _chunks(parts, slots, claims[of_text]):
            claim, usable = of_text[place], (triggers >= 0) & (same.others[triggers] > 0)
            rates = np.where(
                usable, (same.having(chunk, triggers, column) + 1) / (same.others[triggers] + 2), 0
            )
            n[claim], expected[claim] = usable.sum(1), rates.sum(1)
            hits[claim] = (_has(chunk, triggers, column) & usable).sum(1)
            p[claim] = poisson_binomial_tail(hits[claim].astype(np.int64), rates)
    return claims.with_columns(
        n_n2=pl.Series(n.astype(np.int16)),
        hits_n2=pl.Series(hits.astype(np.int16)),
        expected_n2=pl.Series(expected),
        p_n2=pl.Series(p),
    )


def _chunks(
    parts: PartMasks, slots: np.ndarray, claims: pl.DataFrame
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, csc_array]]:
    """Some claims at a time: their places, their triggers i64[claim, slot], their column, the masks."""
    unit = claims["unit"].to_numpy()
    specs, number = numbered_names(claims["spec"])
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(0, len(specs) + CHUNK, CHUNK))
    for step, chunk in enumerate(parts.chunks(specs, CHUNK)):
        claim = order[bounds[step] : bounds[step + 1]]
        yield claim, slots[unit[claim]], number[claim] - step * CHUNK, chunk


def masks_of_many(text: Text, specs: Sequence[str | Pattern]) -> csc_array:
    """`masks` of hundreds of thousands of specs, most of them compounds, in a third of the memory."""
    chunks = list(PartMasks(text, specs).chunks(specs, CHUNK))
    return csc_array(hstack(chunks, format="csc")) if chunks else masks(text, [])


class PartMasks:
    """Masks of all that some patterns are made of, from which those of the patterns are made, some at a time."""

    def __init__(self, text: Text, specs: Iterable[str | Pattern]) -> None:
        parts = {part.spec: part for spec in dict.fromkeys(specs) for part in _parts(parse(spec))}
        self._column_of = {spec: number for number, spec in enumerate(parts)}
        self._matrix = masks(text, list(parts.values()))
        self._matrix.sort_indices()

    def chunks(self, specs: Sequence[str | Pattern], size: int) -> Iterator[csc_array]:
        """`masks` of so many of these patterns after another."""
        for start in range(0, len(specs), size):
            patterns = [parse(spec) for spec in specs[start : start + size]]
            yield _compound_masks(self._matrix, self._column_of, patterns)


def _parts(pattern: Pattern) -> tuple[Pattern, ...]:
    """What a compound is made of; another pattern is its own only part."""
    return pattern.arguments if pattern.family in ("any", "all") else (pattern,)


def _compound_masks(
    matrix: csc_array, column_of: Mapping[str, int], patterns: Sequence[Pattern]
) -> csc_array:
    """Compounds from the masks of their parts: `any` has one of its parts, `all` has each.

    column_of  the column of each part, by its spec
    """
    columns_of = [sorted({column_of[part.spec] for part in _parts(pattern)}) for pattern in patterns]
    sizes = np.array([len(members) for members in columns_of])
    needed = np.where([pattern.family == "all" for pattern in patterns], sizes, 1)
    starts, parts = np.concatenate([[0], np.cumsum(sizes)]), np.concatenate(columns_of)
    ends = np.zeros(len(columns_of) + 1, np.int64)
    rows = np.empty(int(np.diff(matrix.indptr)[parts].sum()), np.int32)
    counting.compound_rows(matrix.indptr, matrix.indices, starts, parts, needed, ends[1:], rows)
    return columns(ends, rows[: ends[-1]], matrix.shape[0])


def numbered_names(names: pl.Series) -> tuple[list[str], np.ndarray]:
    """Different names in order, and i64[row] which of them each is. (Arrays of text are as wide as the longest.)"""
    different = names.unique().sort()
    number = names.cast(pl.Enum(different)).to_physical() if len(names) else different
    return different.to_list(), number.to_numpy().astype(np.int64)


def count_same_code(matrix: csc_array, code: np.ndarray, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """i64[claim, slot]: how many prefixes have the pattern of a claim and the code of its row; 0 for no row (-1).

    code    i64[prefix]  -1 for one that is not counted
    column  i64[claim]   ascending
    """
    out = np.zeros(rows.shape, np.int64)
    sizes = np.zeros(int(code.max(initial=-1)) + 1, np.int32)
    counting.count_same_code(matrix.indptr, matrix.indices, code, rows, column, sizes, out)
    return out


def _has(matrix: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """bool[claim, slot]: whether each row (-1 is none) has the pattern of its claim."""
    return count_same_code(matrix, np.arange(matrix.shape[0]), rows, column) > 0


class _Neighbours(NamedTuple):
    """Prefixes with the same ending, and those of them in the same document.

    ending       i64[prefix]  a number for each ending, -1 for a prefix that is not compared
    in_document  i64[prefix]  a number for each ending in each document
    others       i64[prefix]  prefixes with its ending in other documents
    """

    ending: np.ndarray
    in_document: np.ndarray
    others: np.ndarray

    @classmethod
    def of(cls, text: Text, codes: np.ndarray, usable: np.ndarray) -> _Neighbours:
        groups = Groups(codes, usable)
        rows, new = groups.by_document(text.document)
        ending, in_document = np.full((2, len(text)), -1)
        ending[rows] = np.repeat(np.arange(len(groups.codes)), np.diff(groups.starts))
        in_document[rows] = np.cumsum(new) - 1
        others = np.zeros(len(text), np.int64)
        sizes = [np.bincount(code[rows])[code[rows]] for code in (ending, in_document)]
        others[rows] = sizes[0] - sizes[1]
        return cls(ending, in_document, others)

    def having(self, matrix: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
        """i64[claim, slot]: how many of those others have the pattern of the claim."""
        anywhere, same_document = (
            count_same_code(matrix, code, rows, column) for code in (self.ending, self.in_document)
        )
        return np.asarray(anywhere - same_document)
