"""What two dozen triggers cannot certify: common patterns, and unions of words, on the whole distribution.

Where a third of all prefixes have a pattern, so do eight of 25 triggers of anything; and of a unit that answers to
four words, and half of the time to something else, each word ends three. So each unit is active at its largest `SHARE`
of the tokens of some text, and those tokens are compared with all others at their position and token frequency (N1).

    Language          the columns: common patterns, and words
    proposed(...)     candidates of each unit, in the discovery half
    by_document(...)  the p-value of a claim in the test half, which takes documents for witnesses and not tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
from scipy.stats import norm, t

from mnemoscope.patterns.pattern import ANY, PARTS, Pattern, disjunction, parse
from mnemoscope.patterns.triggers import FOUND
from mnemoscope.records import WHOLE

if TYPE_CHECKING:
    from mnemoscope.patterns.search import SearchResult

SHARE = 0.02  # of the tokens, at most, where a unit is active while candidates are looked for
COMMON = 0.03  # share of the prefixes from which a pattern is common
WORDS = 2e-4  # the same of words that unions are made of
SINGLES = 3  # common patterns that are proposed of a unit, at most
_CLAIMS = 4_096  # whose documents are looked at at once
CLEAR = 3.0  # standard deviations above chance from which a word may be part of a union


class Language(NamedTuple):
    """Patterns of the columns, the common ones before the words that unions are made of."""

    specs: list[str]
    common: int

    @classmethod
    def of(cls, result: SearchResult) -> Language:
        """Choose the columns from the main family of a search."""
        common = [spec for spec, _, rate in result.language if rate >= COMMON]
        words = [word for _, word, rate in result.language if word and rate >= WORDS]
        return cls(common + words, len(common))

    @classmethod
    def read(cls, frame: pl.DataFrame) -> Language:
        """Read what `frame` gave."""
        return cls(frame["spec"].to_list(), int(frame["common"].sum()))

    @property
    def frame(self) -> pl.DataFrame:
        """Columns spec, common."""
        return pl.DataFrame({"spec": self.specs, "common": np.arange(len(self.specs)) < self.common})


class Counted(NamedTuple):
    """What units do in some text.

    both      i64[unit, column]   active where the pattern is
    expected  f64[unit, column]   the same by the share of the pattern at the position and frequency of active tokens
    active    i64[unit]
    shown     i64[column]         tokens with the pattern
    """

    both: np.ndarray
    expected: np.ndarray
    active: np.ndarray
    shown: np.ndarray

    def of(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """both, expected [unit]: summed over disjoint columns i64[unit, part]; -1 is none."""
        rows = np.arange(len(columns))[:, None]
        return tuple(
            np.where(columns >= 0, values[rows, columns], 0).sum(1) for values in (self.both, self.expected)
        )


def surprise(both: np.ndarray, expected: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Standard deviations above chance if tokens were independent. They are not: this puts patterns in order."""
    spread = np.sqrt(np.maximum(expected * (1 - expected / np.maximum(active, 1)), 1e-12))
    return np.asarray(np.where(expected > 0, (both - expected) / np.maximum(spread, 0.3), 0.0))


def proposed(counted: Counted, language: Language, unit: np.ndarray) -> pl.DataFrame:
    """Candidates (columns of `FOUND`), the most surprising first: common patterns, a word, unions of two to four words.

    unit  i64[row of `counted`]: what each is called in the frame; ascending
    """
    score = surprise(counted.both, counted.expected, counted.active[:, None])
    common, units = language.common, np.arange(len(unit))
    parts = []
    best = np.argsort(-score[:, :common], 1, kind="stable")[:, :SINGLES]
    for column in best.T:
        parts.append((units, np.pad(column[:, None], ((0, 0), (0, PARTS[ANY] - 1)), constant_values=-1)))
    # A union is of the words at which the unit is most often active, beyond chance.
    words = np.where(
        score[:, common:] >= CLEAR,
        (counted.both - counted.expected)[:, common:] / np.maximum(counted.shown[common:], 1),
        -np.inf,
    )
    often = np.argsort(-words, 1, kind="stable")[:, : PARTS[ANY]]
    clear = np.take_along_axis(words, often, 1) > -np.inf
    columns = np.pad(
        np.where(clear, often + common, -1), ((0, 0), (0, PARTS[ANY] - often.shape[1])), constant_values=-1
    )
    for size in range(1, PARTS[ANY] + 1):
        rows_of = np.flatnonzero((columns >= 0).sum(1) >= size)
        parts.append((rows_of, np.where(np.arange(PARTS[ANY]) < size, columns[rows_of], -1)))
    rows, columns = map(np.concatenate, zip(*parts, strict=True))
    kept = counted.active[rows] > 0
    return _frame(counted, language, unit, rows[kept], columns[kept])


def _frame(
    counted: Counted, language: Language, unit: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> pl.DataFrame:
    rowwise = Counted(counted.both[rows], counted.expected[rows], counted.active[rows], counted.shown)
    both, expected = rowwise.of(columns)
    score = surprise(both, expected, rowwise.active)
    order = np.lexsort((-score, rows))
    rows, columns, both, expected, score = (part[order] for part in (rows, columns, both, expected, score))
    parts = (columns >= 0).sum(1)
    patterns, number = _patterns(language.specs, columns)
    p = norm.sf(score)
    asked = len(language.specs) * np.maximum(parts, 1.0)
    frame = pl.DataFrame(
        {
            "unit": unit[rows],
            "tests": pl.repeat(WHOLE, len(rows), eager=True),
            "place": number,
            "n": counted.active[rows],
            "hits": both,
            "base_rate": expected / np.maximum(counted.active[rows], 1),
            "p": p,
            "p_family": np.minimum(p * asked, 1),
        }
    )
    described = pl.DataFrame(
        {
            "place": np.arange(len(patterns)),
            **{
                name: [getattr(pattern, name) for pattern in patterns]
                for name in ("spec", "name", "family", "kind", "complexity")
            },
            "equivalents": [[] for _ in patterns],
        },
        schema_overrides={"equivalents": pl.List(pl.String)},
    )
    # A word may be a common pattern, too.
    frame = frame.unique(["unit", "place"], keep="first", maintain_order=True)
    frame = frame.with_columns(rank=pl.int_range(pl.len()).over("unit"))
    role = pl.when(pl.col("rank") == 0).then(pl.lit("best")).otherwise(pl.lit("other")).alias("role")
    frame = frame.join(described, on="place", how="left", maintain_order="left").with_columns(role)
    return frame.select(pl.col(name).cast(dtype) for name, dtype in FOUND.items())


def _patterns(specs: Sequence[str], columns: np.ndarray) -> tuple[list[Pattern], np.ndarray]:
    """The different patterns, and i64[row] which of them each row of columns is."""
    parsed = [parse(spec) for spec in specs]
    first = {spec: column for column, spec in reversed(list(enumerate(specs)))}
    same = np.array([*(first[spec] for spec in specs), -1])  # of specs that are there twice
    different, number = np.unique(np.sort(same[columns], 1), axis=0, return_inverse=True)
    made = [tuple(parsed[column] for column in row if column >= 0) for row in different.tolist()]
    return [parts[0] if len(parts) == 1 else disjunction(parts) for parts in made], number.ravel()


def by_document(both: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """p f64[claim] (one-sided): more active tokens with the pattern than their positions and frequencies explain.

    The excess of each document is one observation: tokens of a document are no independent witnesses. Its sum over
    the root of the sum of its squares is Student's, with as many degrees of freedom as documents matter, less
    one: (sum of squares)^2 / sum of fourth powers of them (after Kish 1965). 1 where nothing is active.

    both, expected  [claim, document]
    """
    tails = [
        _tail(both[block] - expected[block].astype(np.float64))
        for block in (slice(start, start + _CLAIMS) for start in range(0, len(both), _CLAIMS))
    ]
    return np.concatenate([np.zeros(0), *tails])


def _tail(over: np.ndarray) -> np.ndarray:
    """p f64[claim] of an excess f64[claim, document]."""
    squares = (over**2).sum(1)
    known = squares > 0
    matter = np.where(known, squares**2 / np.maximum((over**4).sum(1), 1e-300), 2)
    ratio = over.sum(1) / np.sqrt(np.where(known, squares, 1))
    return np.where(known, t.sf(ratio, np.maximum(matter - 1, 1)), 1.0)
