"""A user's own claim about a neuron, tested both ways on text of the half that no pattern was found in.

The whole layer is asked, not the neuron alone: every neuron and every pseudo-neuron gets a threshold of its own for
this very pattern, in the discovery half, and is tested in the test half. So the null is of this pattern (N3), and the
neuron has a rank.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import csc_array, hstack

from mnemoscope.arguments import check_budget
from mnemoscope.errors import PatternError
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, Nulls, recipe
from mnemoscope.neuron.claims import Claim, of_row
from mnemoscope.neuron.twoway import LEAST_DOCUMENTS, Rule
from mnemoscope.patterns import foreign
from mnemoscope.patterns.language import usual
from mnemoscope.patterns.pattern import Pattern, parse
from mnemoscope.patterns.score import log_binomial_tail
from mnemoscope.patterns.search import Units, one_each
from mnemoscope.patterns.space import strata
from mnemoscope.records import MAIN, NEURON, NeuronId, Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.split import half, halves
from mnemoscope.trials.ground import Ground, Half, last_tokens, read_half
from mnemoscope.trials.job import BUDGET
from mnemoscope.trials.looks import Chosen, Claims, FirstLook, SecondLook, Tally
from mnemoscope.trials.outcomes import Outcomes, Tested, best

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
    budget    tokens of each half that the model reads, as far as the neuron's layer

    PatternError when the pattern cannot be read, holds nowhere or everywhere in either half, or there are too few
    documents; RunMismatch when the model is not the run's.
    """
    model.check_built(run, "testing patterns of")
    layer, neuron = run.address(*address)
    check_budget(budget)
    if polarity not in (None, 1, -1):
        raise PatternError(
            f"testing {NeuronId(layer, neuron)}: {{polarity}} is not a sign; give 1 or -1", polarity=polarity
        )
    with tempfile.TemporaryDirectory() as folder:
        question = _Question(
            run,
            model,
            NeuronId(layer, neuron),
            foreign.check(parse(pattern)),
            seed,
            report or (lambda _: None),
        )
        return question.answer(polarity, budget, Path(folder))


class _Question:
    """One pattern, one layer."""

    def __init__(
        self, run: Run, model: Model, neuron: NeuronId, pattern: Pattern, seed: int, report: Report
    ) -> None:
        self._run, self._model, self._neuron = run, model, neuron
        self._pattern, self._seed, self._report = pattern, seed, report
        self._nulls = Nulls.of(model, run.manifest.options.get("nulls") or recipe(model, DEFAULT))
        self._sizes = {NEURON: run.manifest.model.neurons} | dict.fromkeys(
            self._nulls.kinds, self._nulls.count
        )

    def answer(self, polarity: int | None, budget: int, folder: Path) -> Claim:
        text = Text.of(self._run)
        early, late = (
            read_half(text, test, budget, folder / str(test), self._run, self._seed) for test in (False, True)
        )
        for note in dict.fromkeys(read.note for read in (early, late) if read.note):
            self._report(Progress("first look", 0, 0, "tokens", note))
        shown = [csc_array(usual(part.text, self._pattern)[:, None]) for part in (early, late)]
        scores = self._thresholds(early, Ground(early.text, shown[0]), polarity)
        tokens = np.unique(late.text.tokens[late.text.counted])
        ground = Ground(late.text, hstack([shown[1], last_tokens(late.text, tokens)], format="csc"))
        triggers = self._triggers(text)
        ending = np.flatnonzero(np.isin(tokens, text.tokens[triggers[self._own][1]])) + 1
        tested = {kind: self._tested(kind, scores[kind], ground, ending) for kind in self._sizes}
        self._read(
            "second look", late, Tally(ground, self._nulls, {kind: one.look for kind, one in tested.items()})
        )
        return self._claim(tested, ground, text, triggers[self._own][0])

    def _claims(self, kind: str) -> Claims:
        """Every unit of a kind, either polarity."""
        unit = np.repeat(np.arange(self._sizes[kind]), 2)
        return Claims(
            np.full(len(unit), self._neuron.layer),
            unit,
            np.tile([1, -1], self._sizes[kind]),
            np.zeros_like(unit),
        )

    def _thresholds(self, half: Half, ground: Ground, polarity: int | None) -> dict[str, np.ndarray]:
        """By kind the score at which each unit is active, -1 where there is none; which polarity is asked about."""
        layers = self._neuron.layer + 1
        looks = {
            kind: FirstLook(layers, size, ground.groups, self._claims(kind))
            for kind, size in self._sizes.items()
        }
        self._read("first look", half, Tally(ground, self._nulls, looks))
        found = {kind: best(look, 2 * self._sizes[kind]) for kind, look in looks.items()}
        score, value = (part[2 * self._neuron.neuron :][:2] for part in found[NEURON])
        sides = [
            place for place, sign in enumerate((1, -1)) if polarity in (None, sign) and score[place] >= 0
        ]
        if not sides:
            raise PatternError(
                f"testing {self._neuron}: it is active in fewer than {LEAST_DOCUMENTS} of the {ground.documents} "
                "documents that were read to choose a threshold; read more with a larger budget, or ask for the "
                "other polarity"
            )
        self._own = max(sides, key=lambda place: value[place])
        return {kind: score for kind, (score, _) in found.items()}

    def _triggers(self, text: Text) -> list[tuple[Units, np.ndarray]]:
        """For each polarity the neuron's triggers, and those of the discovery half."""
        rows = self._run.rows("triggers", *self._neuron).sort("rank")
        out = []
        for sign in (1, -1):
            mine = rows.filter(pl.col("polarity") == sign)
            found = text.rows(mine["context"].to_numpy(), mine["position"].to_numpy())
            out.append((Units.of([found]), found[~half(text.document[found])]))
        return out

    def _tested(self, kind: str, score: np.ndarray, ground: Ground, ending: np.ndarray) -> Tested:
        """Units that have a threshold; the neuron is compared with a table of last tokens, columns `ending`."""
        kept = np.flatnonzero(score >= 0)
        every = self._claims(kind)
        claims = Claims(*(part[kept] for part in (every.layer, every.unit, every.polarity, every.column)))
        sizes = np.zeros(len(kept), np.int64)
        if kind == NEURON:
            sizes[np.searchsorted(kept, self._place)] = len(ending)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        chosen = Chosen(claims, score[kept], starts, ending, np.full(len(kept), -1))
        columns = tuple(
            np.zeros(int(layer == self._neuron.layer), np.int64) for layer in range(self._neuron.layer + 1)
        )
        look = SecondLook(self._neuron.layer + 1, self._sizes[kind], ground, chosen, columns)
        return Tested(chosen, look, np.full(len(kept), MAIN), np.ones(len(kept)))

    @property
    def _place(self) -> int:
        return 2 * self._neuron.neuron + self._own

    def _read(self, stage: str, half: Half, tally: Tally) -> None:
        """One pass over a half, as far as the layer."""
        done = 0

        def receive(layer: int, *reading: Any) -> None:
            if layer == self._neuron.layer:
                tally.update(layer, *reading)

        with Capture(self._model, self._neuron.layer) as capture:
            for shard in range(half.plan.shards):
                for batch in half.plan.batches(shard):
                    capture.sweep(batch, receive)
                    done += batch.n_tokens
                    self._report(Progress(stage, done, half.plan.tokens, "tokens"))

    def _claim(self, tested: dict[str, Tested], ground: Ground, text: Text, triggers: Units) -> Claim:
        """The neuron's row, as it would stand in `pattern_tests`, read like one."""
        claims = tested[NEURON].chosen.claims
        place = np.flatnonzero((claims.unit == self._neuron.neuron) & (claims.polarity == (1, -1)[self._own]))
        tested[NEURON].q[place] = self._p(text, triggers)
        run, pattern = self._run, self._pattern
        outcomes = Outcomes(ground, tested, run.manifest.options["histogram_edges"], Rule(), self._seed)
        measured, rows = outcomes.layer(self._neuron.layer)
        norms = (
            run.table("neurons").filter(pl.col("layer") == self._neuron.layer).select("value_norm").collect()
        )
        rows.append(outcomes.writes(self._neuron.layer, norms["value_norm"].to_numpy()))
        row = {name: _plain(values[place[0]]) for name, values in measured[NEURON].items()}
        row |= {name: getattr(pattern, name) for name in ("spec", "name", "family", "kind")}
        row |= {"polarity": (1, -1)[self._own], "tests": MAIN}
        row = dict.fromkeys(("quadrants_active", "quadrants_both")) | row
        statistics = run.rows("neurons", *self._neuron).row(0, named=True)
        return of_row(run, row, pl.DataFrame(rows), statistics)

    def _p(self, text: Text, triggers: Units) -> float:
        """Chance of as many hits among the neuron's triggers in the test half, at their positions and frequencies.

        One test, so nothing is corrected for.
        """
        part, rows = text.part(halves(text.document[text.counted])[1])
        back = np.full(len(text), -1)
        back[rows] = np.arange(len(rows))
        slots = one_each(part, triggers, back[triggers.rows])[0]
        slots = slots[slots >= 0]
        shown, counted = usual(part, self._pattern), np.flatnonzero(part.counted)
        stratum = np.full(len(part), -1)
        stratum[counted], _ = strata(part, counted, True)
        rate = np.bincount(stratum[counted], shown[counted]) / np.maximum(np.bincount(stratum[counted]), 1)
        if not len(slots):
            return 1.0
        hits, base = np.array(shown[slots].sum()), np.array(rate[stratum[slots]].mean())
        return float(np.exp(log_binomial_tail(hits, np.array(len(slots)), base)))


def _plain(value: Any) -> Any:
    """An entry of a column as it would come out of a table."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    found = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(found, float) and np.isnan(found) else found
