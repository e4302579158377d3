"""Claims of the family `whole` for units whose coefficients are at hand: `trials.job` without a model."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.sparse import csc_array

from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import bin_of
from mnemoscope.neuron.twoway import Curve, choose, plainest
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import SearchResult
from mnemoscope.patterns.whole import SHARE, Counted, Language, by_document, proposed
from mnemoscope.run.text import Text
from mnemoscope.trials.heldout import LEVEL, discovery_rate
from mnemoscope.trials.job import WHOLE_BUDGET
from mnemoscope.trials.masked_text import BUDGET, GROUPS, MaskedText, document_sample

MIDDLE = BINS // 2
SIDE = BINS - MIDDLE


class Portion:
    """Some documents of one half, with the positive scores of all units there."""

    def __init__(self, text: Text, test: bool, budget: int, units: int) -> None:
        self.text, self._rows = document_sample(text, test, budget)
        self.counted = np.flatnonzero(self.text.counted)
        self._scores = np.zeros((units, len(self.counted)), np.uint8)

    def add(self, unit: int, values: np.ndarray) -> None:
        """The coefficients of a unit, f32[prefix of the whole text]."""
        bins = bin_of(values[self._rows[self.counted]])
        self._scores[unit] = np.maximum(bins.astype(np.int64) - MIDDLE, 0)

    def scores(self, unit: int) -> np.ndarray:
        """i64[counted prefix]: 0 for all that are not positive."""
        return self._scores[unit].astype(np.int64)


class Whole:
    """The three portions of a text."""

    def __init__(self, text: Text, units: int) -> None:
        budgets = ((False, WHOLE_BUDGET), (False, BUDGET), (True, BUDGET))
        self._looks = [Portion(text, test, budget, units) for test, budget in budgets]
        self._threshold = np.zeros(units, np.int64)

    def add(self, unit: int, values: np.ndarray, counted: np.ndarray) -> None:
        """A unit; its threshold is of the whole text, as a run's histograms say."""
        side = np.bincount(np.maximum(bin_of(values[counted]).astype(np.int64) - MIDDLE, 0), minlength=SIDE)
        rare = np.cumsum(side[::-1])[::-1] <= SHARE * side.sum()
        rare[0] = False
        self._threshold[unit] = rare.argmax() if rare.any() else SIDE - 1
        for look in self._looks:
            look.add(unit, values)

    def claims(self, found: SearchResult) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All candidates, and the chosen one of each unit: unit, spec, threshold (the score from which it is active),
        value (F1 beyond chance in the discovery half), p, q."""
        candidates = self._proposed(Language.of(found))
        gate = (pl.col("p_family").first() <= LEVEL).over("unit")
        further = candidates.filter(gate)
        specs = further["spec"].unique().sort()
        columns = further["spec"].cast(pl.Enum(specs)).to_physical().to_numpy().astype(np.int64)
        early, late = self._looks[1:]
        shown = masks(early.text, specs.to_list())[early.counted]
        masked = MaskedText(late.text, masks(late.text, specs.to_list()))
        rows = []
        units, complexity = (further[name].to_numpy() for name in ("unit", "complexity"))
        for unit in np.unique(units).tolist():
            rows_of_unit = np.flatnonzero(units == unit)
            thresholds = [
                _best(early, unit, csc_array(shown[:, [columns[row]]]).indices) for row in rows_of_unit
            ]
            values = np.array([value for _, value in thresholds])
            best = plainest(values, complexity[rows_of_unit])
            if thresholds[best][0] < 0:
                continue
            p = _tested(late, masked, unit, int(columns[rows_of_unit[best]]), thresholds[best][0])
            rows.append(
                (unit, further["spec"][int(rows_of_unit[best])], thresholds[best][0], values[best], p)
            )
        frame = pl.DataFrame(
            rows,
            {
                "unit": pl.Int64,
                "spec": pl.String,
                "threshold": pl.Int64,
                "value": pl.Float64,
                "p": pl.Float64,
            },
            orient="row",
        )
        q = discovery_rate(frame["p"].to_numpy(), np.ones(len(frame), bool))
        return candidates, frame.with_columns(q=pl.Series(q))

    def _proposed(self, language: Language) -> pl.DataFrame:
        look = self._looks[0]
        masked = MaskedText(look.text, masks(look.text, language.specs))
        shown = masks(look.text, language.specs)[look.counted].tocsr().astype(np.int64)
        stratum = masked.stratum[look.counted]
        rates = masked.rates(np.arange(len(language.specs))).astype(np.float64)
        units = len(self._threshold)
        both, strata = np.zeros((units, len(language.specs)), np.int64), np.zeros((units, masked.strata))
        for unit in range(units):
            active = np.flatnonzero(look.scores(unit) >= self._threshold[unit])
            both[unit] = np.asarray(shown[active].sum(0)).ravel()
            strata[unit] = np.bincount(stratum[active], minlength=masked.strata)
        shown_at = masked.shown(np.arange(len(language.specs))).sum(1, dtype=np.int64)
        counted = Counted(both, strata @ rates, strata.sum(1).astype(np.int64), shown_at)
        return proposed(counted, language, np.arange(units))


def _best(look: Portion, unit: int, rows: np.ndarray) -> tuple[int, float]:
    scores = look.scores(unit)
    present, whole = np.bincount(scores[rows], minlength=SIDE), np.bincount(scores, minlength=SIDE)
    documents = look.text.document[look.counted]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    tops = np.bincount(np.maximum.reduceat(scores, starts), minlength=SIDE)
    threshold, value = choose(Curve(present, whole - present), np.cumsum(tops[::-1])[::-1])
    return int(threshold), float(value)


def _tested(look: Portion, masked: MaskedText, unit: int, column: int, threshold: int) -> float:
    active = np.flatnonzero(look.scores(unit) >= threshold)
    rows = look.counted[active]
    shown = np.asarray(masked.columns[rows][:, [column]].todense()).ravel()
    chance = masked.rates(np.array([column]))[:, 0][masked.stratum[rows]]
    both, expected = (
        np.bincount(masked.group[rows], part, minlength=masked.groups)[None] for part in (shown, chance)
    )
    assert masked.groups <= GROUPS
    return float(by_document(both, expected)[0])
