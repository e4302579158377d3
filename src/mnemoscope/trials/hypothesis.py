"""A user's own claim about a neuron, tested both ways on text of the half that no pattern was found in.

The whole layer is asked, not the neuron alone: every neuron and every pseudo-neuron gets a threshold of its own for
this very pattern, in the discovery half, and is tested in the test half. So the null is of this pattern (N3), and the
neuron has a rank. In a mixture of experts these are the neurons of its expert and pseudo-neurons made of it, and the
text of all of them is what is routed to the expert (`trials.groups`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import csc_array, hstack

from mnemoscope.arguments import check_budget
from mnemoscope.errors import PatternError
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, Nulls, recipe
from mnemoscope.neuron.claims import Claim, of_row
from mnemoscope.neuron.twoway import LEAST_DOCUMENTS, Rule
from mnemoscope.patterns import language
from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.patterns.language import usual
from mnemoscope.patterns.pattern import Pattern, parse
from mnemoscope.patterns.score import log_binomial_tail
from mnemoscope.patterns.space import strata
from mnemoscope.patterns.triggers import Options, Units, half_triggers
from mnemoscope.records import MAIN, NEURON, NEXT, Cells, NeuronId, Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import half
from mnemoscope.trials.claims import Claims, ClaimsToTest
from mnemoscope.trials.counts import CountingState, Counts, TestCounts, ThresholdCounts
from mnemoscope.trials.discovery import best_thresholds
from mnemoscope.trials.groups import Group
from mnemoscope.trials.masked_text import BUDGET, HalfText, MaskedText, last_tokens, read_half
from mnemoscope.trials.outcomes import Tested, TestTables

Report = Callable[[Progress], None]


def test(
    run: Run,
    model: Model,
    address: tuple[int, int],
    pattern: str | Pattern,
    *,
    polarity: int | None = None,
    budget: int = BUDGET,
    seed: int = 0,
    report: Report | None = None,
) -> Claim:
    """Does active mean the pattern, and the pattern active?

    pattern   a spec (`mnemoscope.patterns.pattern`), or a Pattern such as `patterns.predicate` makes
    polarity  +1 or -1; else the end whose F1 is further beyond chance in the discovery half
    budget    tokens of each half that the model reads, as far as the neuron's layer; twice for a neuron of an expert

    PatternError when the pattern cannot be read, holds nowhere or everywhere in either half, or there are too few
    documents; RunMismatch when the model is not the run's.
    """
    model.check_one_text("testing a pattern of")
    model.check_built(run, "testing patterns of")
    neuron = run.address(*address)
    check_budget(budget, seed)
    if polarity not in (None, 1, -1):
        raise PatternError(f"testing {neuron}: {{polarity}} is not a sign; give 1 or -1", polarity=polarity)
    claimed = language.check(parse(pattern))
    if claimed.tests == NEXT and run.manifest.model.bidirectional:
        raise PatternError(
            f"testing {neuron}: {claimed.spec} is about the token that comes next, and {model.id} is "
            "an encoder, which reads it and predicts none; give a pattern of the text up to the active token"
        )
    with tempfile.TemporaryDirectory() as folder:
        question = _Question(run, model, neuron, claimed, seed, report or (lambda _: None))
        return question.answer(polarity, budget, Path(folder))


class _Question:
    """One pattern, and the neurons of one layer that run on the same tokens."""

    def __init__(
        self, run: Run, model: Model, neuron: NeuronId, pattern: Pattern, seed: int, report: Report
    ) -> None:
        self._run, self._model, self._neuron = run, model, neuron
        self._pattern, self._seed, self._report = pattern, seed, report
        self._group = Group.of(model, neuron)
        self._unit = neuron.neuron - self._group.first
        nulls = run.manifest.options.get("nulls") or recipe(model, DEFAULT)
        self._nulls = Nulls.of(model, nulls, at=self._group.place)
        sizes = {kind: units[self._group.place] for kind, units in self._nulls.units.items()}
        self._cells = {kind: Cells((size,)) for kind, size in ({NEURON: self._group.size} | sizes).items()}

    def answer(self, polarity: int | None, budget: int, folder: Path) -> Claim:
        """Choose thresholds in the discovery half; count and decide in the test half."""
        text = Text.of(self._run)
        duplicates = near_duplicates(text)
        text = duplicates.join(text)
        if duplicates.note:
            self._report(Progress("first look", 0, 0, "tokens", duplicates.note))
        halves = [
            read_half(text, test, budget, folder / str(test), self._run, self._seed) for test in (False, True)
        ]
        shown = [csc_array(usual(read.text, self._pattern)[:, None]) for read in halves]
        early, late = (self._own_text(*pair) for pair in zip(halves, shown, strict=True))
        for note in dict.fromkeys(read.note for read in (early, late) if read.note):
            self._report(Progress("first look", 0, 0, "tokens", note))
        scores = self._thresholds(early, MaskedText(early.text, shown[0]), polarity)
        tokens = np.unique(late.text.tokens[late.text.counted])
        masked = MaskedText(late.text, hstack([shown[1], last_tokens(late.text, tokens)], format="csc"))
        triggers, early_rows = self._triggers(text)
        endings = np.flatnonzero(np.isin(tokens, text.tokens[early_rows])) + 1
        tested = {kind: self._tested(kind, scores[kind], masked, endings) for kind in self._cells}
        counts = {kind: of_kind.counts for kind, of_kind in tested.items()}
        self._read("second look", late, masked, counts)
        return self._claim(tested, masked, self._known(text, (early, late), triggers), triggers)

    def _own_text(self, half: HalfText, shown: csc_array) -> HalfText:
        """The text of the neurons in a half; PatternError where all of it, or nothing, has the pattern."""
        own = self._group.own(half, self._tell("routing", half))
        counted = own.text.counted
        having = int(shown.toarray()[counted].sum())
        if self._group.is_routed and having in (0, int(counted.sum())):
            raise PatternError(
                f"testing {self._pattern.spec!r}: it holds at {'all' if having else 'none'} of the {counted.sum():,} "
                f"tokens that are routed to the expert of {self._neuron}, so that there is nothing to compare; give a "
                "pattern that some of them have and some have not"
            )
        return own

    def _claims(self, kind: str) -> Claims:
        """Every unit of a kind, either polarity."""
        size = len(self._cells[kind])
        unit = np.repeat(np.arange(size), 2)
        return Claims(np.zeros_like(unit), unit, np.tile([1, -1], size), np.zeros_like(unit))

    def _thresholds(self, half: HalfText, masked: MaskedText, polarity: int | None) -> dict[str, np.ndarray]:
        """By kind the score at which each unit is active, -1 where there is none; which polarity is asked about."""
        claims = {kind: self._claims(kind) for kind in self._cells}
        counts = {
            kind: ThresholdCounts(cells, masked.groups, claims[kind]) for kind, cells in self._cells.items()
        }
        self._read("first look", half, masked, counts)
        best = {kind: best_thresholds(counts[kind], len(claims[kind])) for kind in self._cells}
        score, value = (values[2 * self._unit :][:2] for values in best[NEURON])
        sides = [side for side, sign in enumerate((1, -1)) if polarity in (None, sign) and score[side] >= 0]
        if not sides:
            raise PatternError(
                f"testing {self._neuron}: it is active in fewer than {LEAST_DOCUMENTS} of the {masked.documents} "
                "documents that were read to choose a threshold; read more with a larger budget, or ask for the "
                "other polarity"
            )
        side = max(sides, key=lambda side: value[side])
        self._polarity = (1, -1)[side]
        self._own = 2 * self._unit + side
        return {kind: score for kind, (score, _) in best.items()}

    def _triggers(self, text: Text) -> tuple[Units, np.ndarray]:
        """The neuron's triggers of this polarity, and those of the discovery half."""
        triggers = self._run.rows("triggers", *self._neuron).sort("rank")
        triggers = triggers.filter(pl.col("polarity") == self._polarity)
        rows = text.rows(triggers["context"].to_numpy(), triggers["position"].to_numpy())
        return Units.of([rows]), rows[~half(text.document[rows])]

    def _tested(self, kind: str, score: np.ndarray, masked: MaskedText, endings: np.ndarray) -> Tested:
        """Units that have a threshold; the neuron is compared with a table of last tokens, columns `endings`."""
        kept = np.flatnonzero(score >= 0)
        every = self._claims(kind)
        claims = Claims(every.place[kept], every.unit[kept], every.polarity[kept], every.column[kept])
        sizes = np.zeros(len(kept), np.int64)
        if kind == NEURON:
            sizes[np.searchsorted(kept, self._own)] = len(endings)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        chosen = ClaimsToTest(claims, score[kept], starts, endings, np.full(len(kept), -1))
        counts = TestCounts(self._cells[kind], masked, chosen, (np.zeros(1, np.int64),))
        return Tested(chosen, counts, np.full(len(kept), MAIN), np.ones(len(kept)))

    def _tell(self, stage: str, half: HalfText) -> Callable[[int], None]:
        return lambda done: self._report(Progress(stage, done, half.plan.tokens, "tokens"))

    def _read(self, stage: str, half: HalfText, masked: MaskedText, counts: Mapping[str, Counts]) -> None:
        """One pass over a half, as far as the layer, whose neurons are the only place."""
        state = CountingState(masked, self._nulls, counts, {self._group.place: 0})
        self._group.read(half, state.update, state.update_rows, self._tell(stage, half))

    def _known(self, text: Text, halves: Sequence[HalfText], triggers: Units) -> Text:
        """The whole text, of which nothing counts but what the neurons are known to run on: tokens that were read for
        it, and triggers, which can but raise what chance is taken for. All of it where no router chooses."""
        if not self._group.is_routed:
            return text
        known = np.zeros(len(text), bool)
        known[triggers.rows] = True
        for read in (each.text for each in halves):
            rows = np.flatnonzero(read.counted)
            known[text.rows(read.context[rows], read.position[rows])] = True
        return replace(text, counted=text.counted & known, whole=text.frequency)

    def _claim(self, tested: dict[str, Tested], masked: MaskedText, text: Text, triggers: Units) -> Claim:
        """The neuron's row, as it would stand in `pattern_tests`, read like one."""
        layer, claims = self._neuron.layer, tested[NEURON].chosen.claims
        row_of_neuron = np.flatnonzero((claims.unit == self._unit) & (claims.polarity == self._polarity))
        tested[NEURON].q[row_of_neuron] = self._p(text, triggers)
        run, pattern = self._run, self._pattern
        edges = run.manifest.options["histogram_edges"]
        verdicts = TestTables(masked, tested, edges, Rule(), np.array([layer]), self._seed, compete=False)
        measured, calibration = verdicts.layer(layer)
        norms = run.table("neurons").filter(pl.col("layer") == layer).select("value_norm").collect()
        own = slice(self._group.first, self._group.first + self._group.size)
        calibration.append(verdicts.writes(layer, norms["value_norm"].to_numpy()[own]))
        row = {name: _plain(values[row_of_neuron[0]]) for name, values in measured[NEURON].items()}
        row |= {name: getattr(pattern, name) for name in ("spec", "name", "family", "kind")}
        row |= {"polarity": self._polarity, "tests": MAIN}
        row = dict.fromkeys(("quadrants_active", "quadrants_both", "decoy_f1_low", "decoy_q")) | row
        statistics = run.rows("neurons", *self._neuron).row(0, named=True)
        return of_row(run, row, pl.DataFrame(calibration), statistics, own_nulls=True)

    def _p(self, text: Text, triggers: Units) -> float:
        """Chance of as many hits among the neuron's triggers in the test half, at their positions and frequencies.

        One test, so nothing is corrected for.
        """
        late, slots, _ = half_triggers(text, triggers, Options(), test=True)
        slots = slots[slots >= 0]
        shown, counted = usual(late, self._pattern), np.flatnonzero(late.counted)
        stratum = np.full(len(late), -1)
        stratum[counted], _ = strata(late, counted, True)
        rate = np.bincount(stratum[counted], shown[counted]) / np.maximum(np.bincount(stratum[counted]), 1)
        if not len(slots):
            return 1.0
        hits, base = np.array(shown[slots].sum()), np.array(rate[stratum[slots]].mean())
        return float(np.exp(log_binomial_tail(hits, np.array(len(slots)), base)))


def _plain(value: Any) -> Any:
    """An entry of a column as it would come out of a table."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and np.isnan(plain) else plain
