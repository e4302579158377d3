"""Where a search takes place: prefixes that count, the patterns they have, and how often those are met where.

Equal masks are found by a hash of each column, masks with a Jaccard index above a bound by MinHash (Broder 1997) and
then compared exactly. The simplest member stands for its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csc_array, csr_array

from mnemoscope.patterns.columns import Groups, columns
from mnemoscope.patterns.language import Limits, mine
from mnemoscope.patterns.pattern import Pattern, parse
from mnemoscope.records import POSITION
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import mixed

JACCARD = 0.95
HASHES, BAND = 12, 3  # of two masks at .95, one in 2,000 shares none of the bands


def representatives(
    matrix: csc_array, costs: Sequence[int] | np.ndarray, jaccard: float = JACCARD
) -> np.ndarray:
    """i64[column]: the column that stands for each one, itself if it stands for itself; empty ones alone.

    costs   the cheapest column of a class stands for it; of equals the first
    """
    sizes = np.diff(matrix.indptr)
    order = np.lexsort((np.arange(len(sizes)), np.asarray(costs)))
    out = _equal(matrix, sizes, order)
    if jaccard < 1:
        kept = np.flatnonzero((out == np.arange(len(out))) & (sizes > 0))
        nearly = _near(matrix, sizes, kept, np.argsort(order), jaccard)
        out = nearly[out]
    return out


def _equal(matrix: csc_array, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Columns with the same rows, by the sum of their rows' hashes modulo 2^64."""
    out = np.arange(len(sizes))
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return out
    with np.errstate(over="ignore"):
        sums = np.add.reduceat(mixed(np.arange(matrix.shape[0]), 7)[matrix.indices], matrix.indptr[filled])
        codes = np.zeros(len(sizes), np.uint64)
        codes[filled] = mixed(sums) ^ sizes[filled].astype(np.uint64)
    rank = np.argsort(order)
    by_cost = Groups(codes[order], sizes[order] > 0)
    for_group = order[by_cost.rows[by_cost.starts[:-1]]]
    out[order[by_cost.rows]] = np.repeat(for_group, np.diff(by_cost.starts))
    assert (rank[out] <= rank).all()
    return out


def _near(
    matrix: csc_array, sizes: np.ndarray, kept: np.ndarray, rank: np.ndarray, jaccard: float
) -> np.ndarray:
    out = np.arange(len(sizes))
    pairs = _candidates(matrix, kept)
    near = sizes[pairs]
    likely = near.min(1) > jaccard * near.max(1)
    pairs = pairs[likely]
    first = np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    second = pairs.sum(1) - first
    for a, b in sorted(
        zip(first.tolist(), second.tolist(), strict=True), key=lambda p: (rank[p[0]], rank[p[1]])
    ):
        if out[a] == a and out[b] == b and _overlap(matrix, a, b) > jaccard:
            out[b] = a
    return out


def _candidates(matrix: csc_array, kept: np.ndarray) -> np.ndarray:
    """i64[pair, 2]: columns that share a band of their signatures, each with the first that has it and the next."""
    starts = matrix.indptr[kept]
    signatures = np.empty((HASHES, len(kept)), np.uint64)
    for number in range(HASHES):
        scattered = mixed(np.arange(matrix.shape[0]), 100 + number)
        signatures[number] = np.minimum.reduceat(scattered[matrix.indices], starts) if len(kept) else 0
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(0, HASHES, BAND):
        keys = signatures[band]
        for row in signatures[band + 1 : band + BAND]:
            keys = mixed(keys ^ (row >> np.uint64(1)))
        groups = Groups(keys, np.ones(len(keys), bool))
        members = kept[groups.rows]
        bucket = np.repeat(np.arange(len(groups.codes)), np.diff(groups.starts))
        leader = members[groups.starts[bucket]]
        pairs.append(np.stack([leader, members], 1)[leader != members])
        same = bucket[1:] == bucket[:-1]
        pairs.append(np.stack([members[:-1], members[1:]], 1)[same])
    return np.unique(np.concatenate(pairs), axis=0)


def _overlap(matrix: csc_array, a: int, b: int) -> float:
    """The Jaccard index of two columns."""
    first, second = (matrix.indices[matrix.indptr[c] : matrix.indptr[c + 1]] for c in (a, b))
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / max(len(first) + len(second) - both, 1)


TYPES = (
    8  # different tokens in a bin of frequency, at least: a bin of one token would explain that token away
)
FEWER = 4  # the same where all tokens of a text are asked and not two dozen triggers: less has to be left to explain
NARROW = 0.1  # nats that a bin of frequency spans, at most, unless it needs more for so many tokens
MOST = 64  # triggers of a unit: which of them have a pattern is one integer of as many bits
BACKGROUND = 600_000  # prefixes; of a longer text, whole documents are drawn


def position_bin(position: np.ndarray) -> np.ndarray:
    """i64[...]: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, ...: two bins to an octave."""
    clipped = np.maximum(position, 1).astype(np.float64)
    octave = np.floor(np.log2(clipped))
    return np.asarray(2 * octave + (clipped >= 1.5 * 2**octave) * (octave > 0)).astype(np.int64)


def frequency_bin(tokens: np.ndarray, frequency: np.ndarray, types: int = TYPES) -> np.ndarray:
    """i64[...]: bins of neighbouring ranks of frequency, 0 the rarest, as narrow as `NARROW` and `types` let them be.

    frequency  i64[token]: how often each stands in the text; equally frequent ones share a bin
    """
    counts, kinds = np.unique(np.maximum(frequency, 1), return_counts=True)
    bins, top, filled, number = np.zeros(len(counts), np.int64), int(counts[-1]), 0, 0
    for place in range(len(counts) - 1, -1, -1):
        if filled >= types and counts[place] < top * np.exp(-NARROW):
            number, filled, top = number + 1, 0, int(counts[place])
        bins[place], filled = number, filled + kinds[place]
    if filled < types:  # what is left over at the rare end goes to the last full bin
        bins = np.minimum(bins, max(number - 1, 0))
    return np.asarray((bins.max() - bins)[np.searchsorted(counts, np.maximum(frequency, 1))][tokens])


@dataclass(frozen=True)
class Space:
    """Counted prefixes of some documents (*points*) with the patterns of one family of tests.

    text      the text of those documents
    rows      i64[point]          rows of `text`
    has       bool[point, pattern]  one column for each class of patterns; `columns` is the same by column
    specs     the spec of each column
    names     the specs of the patterns that each column stands for, its own first
    stratum   i32[point]          position x frequency of the last token (N1); all 0 when not stratified
    margins   i64[stratum, 2]     the bins of position and frequency of each stratum
    drawn     bool[point]         whether it belongs to the background that rates are taken from
    """

    text: Text
    rows: np.ndarray
    has: csr_array
    columns: csc_array
    specs: list[str]
    names: list[tuple[str, ...]]
    stratum: np.ndarray
    margins: np.ndarray
    drawn: np.ndarray
    patterns: dict[int, Pattern] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        text: Text,
        tests: str,
        *,
        limits: Limits | None = None,
        stratify: bool = True,
        needed: np.ndarray | None = None,
        background: int = BACKGROUND,
        seed: int = 0,
        known: np.ndarray | None = None,
    ) -> Space:
        """Mine a text. Rows in `needed` become points whether they are drawn or not. The tests of position
        are never stratified, or there would be nothing to find.

        known  bool[prefix]: the background, instead of one that is drawn
        """
        limits = limits or Limits()
        drawn = text.counted & (_drawn(text, background, seed) if known is None else known)
        usable = drawn.copy()
        if needed is not None:
            usable[needed] = text.counted[needed]
        rows = np.flatnonzero(usable)
        specs, matrix, costs = mine(text, tests, limits, seed)
        has = _only(matrix, rows)
        share = np.diff(has.indptr) / max(len(rows), 1)
        kept = np.flatnonzero((share > 0) & (share <= limits.most))
        has, specs = csc_array(has[:, kept]), [specs[column] for column in kept]
        standing = representatives(has, np.asarray(costs)[kept])
        names: dict[int, list[str]] = {}
        for column in np.argsort(standing != np.arange(len(standing)), kind="stable").tolist():
            names.setdefault(int(standing[column]), []).append(specs[column])
        standing = np.array(sorted(names), np.int64)
        has = csc_array(has[:, standing])
        stratum, margins = strata(text, rows, stratify and tests != POSITION)
        return cls(
            text=text,
            rows=rows,
            has=has.tocsr(),
            columns=has,
            specs=[specs[column] for column in standing],
            names=[tuple(names[column]) for column in standing],
            stratum=stratum,
            margins=margins,
            drawn=drawn[rows],
        )

    def routed(self, rows: np.ndarray, most: float) -> Space:
        """Those of the points that are among some rows of the text (bool[prefix]): rates and strata are of these alone,
        and patterns those of the whole text that some of these have, and a share of at most `most`."""
        points = np.flatnonzero(rows[self.rows])
        has = csc_array(self.has[points])
        sizes = np.diff(has.indptr)
        kept = np.flatnonzero((sizes > 0) & (sizes <= most * len(points)))
        has = csc_array(has[:, kept])
        margins, stratum = np.unique(self.stratum[points], return_inverse=True)
        return replace(
            self,
            rows=self.rows[points],
            has=has.tocsr(),
            columns=has,
            specs=[self.specs[column] for column in kept],
            names=[self.names[column] for column in kept],
            stratum=stratum.ravel().astype(np.int32),
            margins=self.margins[margins],
            drawn=self.drawn[points],
            patterns={},
        )

    @cached_property
    def document(self) -> np.ndarray:
        """i64[point]: its document."""
        return self.text.document[self.rows]

    @cached_property
    def marks(self) -> csr_array:
        """u64[point, pattern]: `has` as ones that bits can be multiplied with."""
        return csr_array(
            (np.ones(self.has.nnz, np.uint64), self.has.indices, self.has.indptr), shape=self.has.shape
        )

    @cached_property
    def rates(self) -> np.ndarray:
        """f32[stratum, pattern]: share of the background of a stratum that has the pattern.

        When not every point is background, a rate leans on the rate of the whole as if on `LEAN` further
        points: a stratum may then lack what a trigger has.
        """
        strata = int(self.stratum.max(initial=0)) + 1
        points = np.flatnonzero(self.drawn)
        shape = (strata, len(self.stratum))
        spread = csr_array(csc_array((np.ones(len(points)), (self.stratum[points], points)), shape=shape))
        counts = np.asarray((spread @ self.has.astype(np.float64)).todense())
        sizes = np.bincount(self.stratum[points], minlength=strata)[:, None]
        if self.drawn.all():
            return np.asarray(counts / np.maximum(sizes, 1), np.float32, order="F")
        whole = (np.asarray(self.has.astype(np.float64).sum(0)).ravel() + 1) / (len(self.rows) + 1)
        return np.asarray((counts + LEAN * whole) / (sizes + LEAN), np.float32, order="F")

    @cached_property
    def rate(self) -> np.ndarray:
        """f64[pattern]: share of all points that have it."""
        return np.diff(self.columns.indptr) / max(len(self.rows), 1)

    @cached_property
    def aspect(self) -> np.ndarray:
        """i64[pattern]: what it looks at: the last token, a word met earlier (whatever the window), a list of words, or
        something of its own. Within an aspect patterns repeat each other; a conjunction is of several."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(_aspect(spec), len(known)) for spec in self.specs], np.int64)

    @cached_property
    def last_words(self) -> list[str]:
        """The spec of the last word that each column stands for; "" if it is none."""
        plain = lambda name: name.startswith("word:") and "@" not in name  # noqa: E731
        return [next(filter(plain, names), "") for names in self.names]

    @cached_property
    def last_word(self) -> np.ndarray:
        """i64[point]: the column of the last word so far; -1 if it has none."""
        known = {word[5:]: column for column, word in enumerate(self.last_words) if word}
        words = self.text.words
        codes = np.array([known.get(word, -1) for word in words.folded], np.int64)
        return np.asarray(codes[words.word[self.rows]])

    @cached_property
    def listed(self) -> np.ndarray:
        """bool[pattern]: a topic or a list of words."""
        return np.array([spec.startswith(("words:", "topic:")) for spec in self.specs], bool)

    def point(self, rows: np.ndarray) -> np.ndarray:
        """i64[...]: the points of rows of the text; -1 for one that is none."""
        where = np.full(len(self.text) + 1, -1)
        where[self.rows] = np.arange(len(self.rows))
        return where[rows]

    def pattern(self, column: int) -> Pattern:
        """The pattern of a column."""
        if column not in self.patterns:
            self.patterns[column] = parse(self.specs[column])
        return self.patterns[column]


LEAN = 50


def _aspect(spec: str) -> str:
    head, colon, rest = spec.partition(":")
    if head in ("words", "topic"):
        return "list"
    earlier = head == "word" and "@" in rest
    return spec.partition("@")[0] if earlier else "last" if colon and head != "followed" else spec


def _only(matrix: csc_array, rows: np.ndarray) -> csc_array:
    """Take some rows of a matrix (ascending), column by column."""
    new_row = np.full(matrix.shape[0], -1, np.int32)
    new_row[rows] = np.arange(len(rows))
    moved = new_row[matrix.indices]
    starts = np.concatenate([[0], np.cumsum(moved >= 0)])[matrix.indptr]
    return columns(starts, moved[moved >= 0], len(rows))


def _drawn(text: Text, background: int, seed: int) -> np.ndarray:
    """bool[prefix]: documents by the smallest hash of their id, until there is enough; of long ones a part."""
    if len(text) <= background:
        return np.ones(len(text), bool)
    ids = np.unique(text.document)
    order = np.argsort(mixed(ids, seed + 11))
    return np.repeat(text.within(ids[order], background), np.diff(text.starts))


def strata(text: Text, rows: np.ndarray, stratify: bool, types: int = TYPES) -> tuple[np.ndarray, np.ndarray]:
    """i32[point], numbered without gaps, and i64[stratum, 2]: position, and frequency in the whole text, not in the
    part that is read. A unit that follows the frequency of tokens, however narrowly, knows no pattern."""
    if not stratify or not len(rows):
        return np.zeros(len(rows), np.int32), np.zeros((1, 2), np.int64)
    often = frequency_bin(text.tokens[rows], text.frequency, types)
    pairs = np.stack([position_bin(text.position[rows]), often], 1)
    margins, stratum = np.unique(pairs, axis=0, return_inverse=True)
    return stratum.ravel().astype(np.int32), margins
