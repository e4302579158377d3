"""Chosen patterns on triggers that had no part in choosing them: against chance, and beyond the last token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.sparse import csc_array, csr_array

from mnemoscope.patterns.columns import Groups
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import Options, Units, one_each
from mnemoscope.patterns.sequences import hashed
from mnemoscope.patterns.space import strata
from mnemoscope.patterns.split import halves
from mnemoscope.patterns.tails import log_binomial_tail, poisson_binomial_tail
from mnemoscope.patterns.text import Text

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
    starts = np.arange(len(rows) + 1)
    spread = csc_array((np.ones(len(rows)), stratum[rows], starts), shape=(len(sizes), len(rows)))
    n, hits, base = (np.zeros(len(claims)) for _ in range(3))
    where = np.zeros(len(claims), np.uint64)
    bit = np.uint64(1) << np.arange(slots.shape[1], dtype=np.uint64)
    for claim, triggers, column, found in _chunks(part, slots, claims):
        filled = triggers >= 0
        rates = np.asarray((spread @ csr_array(found.tocsr()[rows], dtype=float)).todense()) / sizes[:, None]
        values = np.where(filled, rates[stratum[triggers], column[:, None]], 0)
        n[claim] = filled.sum(1)
        base[claim] = values.sum(1) / np.maximum(filled.sum(1), 1)
        shown = _has(found, triggers, column) & filled
        hits[claim], where[claim] = shown.sum(1), (shown * bit).sum(1)
    p = np.where(n > 0, np.exp(np.maximum(log_binomial_tail(hits, n, base), -690)), 1.0)
    return claims.with_columns(
        n_test=pl.Series(n.astype(np.int16)),
        hits_test=pl.Series(hits.astype(np.int16)),
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
    specs = claims["spec"].to_numpy()
    different, number = np.unique(specs.astype(str), return_inverse=True) if len(specs) else (specs, unit)
    for start in range(0, len(different), CHUNK):
        claim = np.flatnonzero((number >= start) & (number < start + CHUNK))
        found = masks(part, [str(spec) for spec in different[start : start + CHUNK]])
        yield claim, slots[unit[claim]], number[claim] - start, found


def _keys(found: csc_array, place: np.ndarray | None = None) -> np.ndarray:
    """i64[...]: column x height + row (or the place of the row) of all that a matrix has, ascending."""
    column = np.repeat(np.arange(found.shape[1]), np.diff(found.indptr)) * found.shape[0]
    rows = found.indices if place is None else place[found.indices]
    return np.sort(column + rows)


def _has(found: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """bool[claim, slot]: whether each row (-1 is none) has the pattern of its claim."""
    keys = _keys(found)
    if not len(keys):
        return np.zeros(rows.shape, bool)
    wanted = column[:, None] * found.shape[0] + np.maximum(rows, 0)
    return np.asarray(
        (keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted) & (rows >= 0)
    )


class _Neighbours(NamedTuple):
    """Prefixes with the same ending lie together, and within them those of the same document.

    place     i64[prefix]     where each prefix lies
    whole     i64[prefix, 2]  from where to where those with its ending lie
    own       i64[prefix, 2]  the same, in its document
    others    i64[prefix]     prefixes with its ending in other documents
    """

    place: np.ndarray
    whole: np.ndarray
    own: np.ndarray
    others: np.ndarray

    @classmethod
    def of(cls, text: Text, codes: np.ndarray, usable: np.ndarray) -> _Neighbours:
        groups = Groups(codes, usable)  # in ascending order of rows, so documents lie together
        place = np.full(len(text), len(text) - 1)
        place[groups.rows] = np.arange(len(groups.rows))
        whole, own = np.zeros((len(text), 2), np.int64), np.zeros((len(text), 2), np.int64)
        sizes = np.diff(groups.starts)
        bounds = np.stack([groups.starts[:-1], groups.starts[1:]], 1)
        whole[groups.rows] = np.repeat(bounds, sizes, axis=0)
        documents = text.document[groups.rows]
        new = np.ones(len(documents), bool)
        new[1:] = documents[1:] != documents[:-1]
        new[groups.starts[:-1]] = True
        starts = np.append(np.flatnonzero(new), len(documents))
        inner = np.stack([starts[:-1], starts[1:]], 1)
        own[groups.rows] = np.repeat(inner, np.diff(starts), axis=0)
        return cls(place, whole, own, np.diff(whole)[:, 0] - np.diff(own)[:, 0])

    def having(self, found: csc_array, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
        """i64[claim, slot]: how many of those others have the pattern of the claim."""
        counted = csc_array(found.multiply((np.diff(self.whole)[:, 0] > 0)[:, None]))
        counted.eliminate_zeros()
        keys = _keys(counted, self.place)
        base = column[:, None] * found.shape[0]
        low, high = self.whole[rows, 0], self.whole[rows, 1]
        inner_low, inner_high = self.own[rows, 0], self.own[rows, 1]
        at = [np.searchsorted(keys, base + bound) for bound in (low, high, inner_low, inner_high)]
        return np.asarray((at[1] - at[0]) - (at[3] - at[2]))
