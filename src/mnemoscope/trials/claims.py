"""Candidates of a table as the claims that a pass counts: a unit, a polarity and a column of the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.patterns.columns import spans
from mnemoscope.text.sampling import half

if TYPE_CHECKING:
    from mnemoscope.patterns.triggers import Addressed
    from mnemoscope.run.text import Text
    from mnemoscope.trials.groups import UnitPlaces


@dataclass(frozen=True)
class Claims:
    """Units and the columns that are claimed of them, sorted by place; i64[claim] each.

    place  where the unit runs (`groups.UnitPlaces`): a layer, or in a mixture an expert; `unit` is its number there
    """

    place: np.ndarray
    unit: np.ndarray
    polarity: np.ndarray
    column: np.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def of(self, place: int) -> slice:
        """The claims of one place."""
        first, last = np.searchsorted(self.place, [place, place + 1])
        return slice(int(first), int(last))


@dataclass(frozen=True)
class ClaimsToTest:
    """The claims that are tested, and what they are compared with.

    threshold        i64[claim]      score at which active begins
    starts, columns  i64[claim + 1], i64[...]  disjoint columns of the baseline table of each claim
    other            i64[claim]      the column of another unit's claim, or -1
    """

    claims: Claims
    threshold: np.ndarray
    starts: np.ndarray
    columns: np.ndarray
    other: np.ndarray


class KindClaims(NamedTuple):
    """The claims of one kind of unit, and the rows i64[claim] of the table of candidates that they are."""

    rows: np.ndarray
    claims: Claims


def claims_by_kind(
    places: UnitPlaces, units: Addressed, candidates: pl.DataFrame, rows: np.ndarray, column: np.ndarray
) -> dict[str, KindClaims]:
    """Some candidates as claims, by kind of unit; units lie in the order of kind, then place.

    rows, column  i64[candidate]: which rows of `candidates`, and the column of the pattern of each
    """
    unit = candidates["unit"].to_numpy()[rows]
    by_kind = {}
    for number, kind in enumerate(units.kinds):
        of_kind = np.flatnonzero(units.kind[unit] == number)
        owner = unit[of_kind]
        seats = places.seat(kind, units.layer[owner], units.neuron[owner])
        claims = Claims(*seats, units.polarity[owner], column[of_kind])
        by_kind[kind] = KindClaims(rows[of_kind], claims)
    return by_kind


class Baselines:
    """What claims are compared with in the test half.

    tokens  the last tokens of the text, ascending, which are columns from `first` on
    seed    of which other unit's pattern each claim is compared with
    """

    def __init__(self, units: Addressed, text: Text, tokens: np.ndarray, first: int, seed: int) -> None:
        self._tokens, self._first, self._seed = tokens, first, seed
        self._starts, self._endings = _last_tokens_of(units, text)

    def compared(self, candidates: pl.DataFrame, claims: Claims) -> ClaimsToTest:
        """The claims with their baselines: the last tokens of the unit's triggers in the discovery half, and the
        pattern of another unit of its place, polarity and family of tests."""
        unit = candidates["unit"].to_numpy()
        sizes = np.diff(self._starts)[unit]
        endings = self._endings[spans(self._starts[unit], sizes)]
        column = np.minimum(np.searchsorted(self._tokens, endings), len(self._tokens) - 1)
        known = self._tokens[column] == endings  # the others end no prefix of the text that is read
        sizes = np.bincount(np.repeat(np.arange(len(unit)), sizes)[known], minlength=len(unit))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        other = self._others(claims, candidates["tests"].to_numpy().astype(str))
        return ClaimsToTest(
            claims, candidates["score"].to_numpy(), starts, column[known] + self._first, other
        )

    def _others(self, claims: Claims, tests: np.ndarray) -> np.ndarray:
        """i64[claim]: the column of another unit's claim, or -1."""
        other = np.full(len(claims), -1)
        random = np.random.default_rng([self._seed, 3])
        family = np.unique(tests, return_inverse=True)[1]
        like = np.stack([claims.place, claims.polarity, family], 1)
        group = np.unique(like, axis=0, return_inverse=True)[1].ravel()
        order = np.lexsort((random.permutation(len(group)), group))
        for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            if len(members) > 1:
                other[members] = claims.column[np.roll(members, 1)]
        return other


def _last_tokens_of(units: Addressed, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """For each unit the last tokens of its triggers in the discovery half, each once: starts, tokens."""
    triggers = units.units
    owner = np.repeat(np.arange(len(units)), np.diff(triggers.indptr))
    early = ~half(text.document[triggers.rows], 0)
    pairs = np.unique(np.stack([owner[early], text.tokens[triggers.rows[early]]], 1), axis=0)
    return np.searchsorted(pairs[:, 0], np.arange(len(triggers) + 1)), pairs[:, 1]
