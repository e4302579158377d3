"""NeuronEval's sanity checks of the figures of claims: headline figures notice wrong labels, half-figures do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import make_run
from test_study_keys import rows

from mnemoscope.neuron.twoway import NONE, Curve, pearson
from mnemoscope.patterns.sanity import ADDED, HEADLINE, REMOVED, figures, sanity
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables

BINS, TOKENS, CLAIMS = 193, 20_000, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which claims of every precision and recall are told, from histograms made token by token; the last is
    of a neuron without a verdict."""
    random, told = np.random.default_rng(0), []
    for number in range(CLAIMS):
        shown = random.random(TOKENS) < random.uniform(0.005, 0.2)
        polarity = 1 if number % 2 else -1
        fires = np.where(shown, random.random(TOKENS) < random.uniform(0.4, 1), random.random(TOKENS) < 0.004)
        score = np.clip(96 + 8 * random.normal(size=TOKENS) + 60 * fires, 0, 192).astype(int)
        active = score >= 130
        bins = score if polarity > 0 else 192 - score
        value = bins - 96.0
        counts = [np.bincount(bins[which], minlength=BINS).tolist() for which in (shown, ~shown)]
        told.append({
            "layer": 0, "neuron": number // 4, "unit": "neuron", "polarity": polarity, "tests": f"t{number:02}",
            "verdict": NONE if number == CLAIMS - 1 else "iff", "active": int(active.sum()),
            "counts_present": counts[0], "counts_absent": counts[1],
            "pearson": float(np.corrcoef(value, shown)[0, 1]),
        })  # fmt: skip
    told.sort(key=lambda row: (row["neuron"], -row["polarity"], row["tests"]))
    made = make_run(tmp_path_factory.mktemp("runs") / "run", layers=1, neurons=6)
    return add_tables(made.path, {"pattern_tests": [rows("pattern_tests", *told)]}, {"patterns": {"q": 0.05}})


def test_headline_figures_fall(run: Run) -> None:
    """F1, IoU, average precision and Pearson's correlation fall in every claim, whichever way labels are wrong; recall
    does not see that half of them are missing, nor precision that there are twice as many."""
    found = sanity(run)
    assert set(found["claims"]) == {CLAIMS - 1}
    told = {(row["figure"], row["change"]): row for row in found.iter_rows(named=True)}
    for change in (REMOVED, ADDED):
        for figure in (*HEADLINE, "average precision"):  # of patterns that are rare
            assert told[figure, change]["fell"] == CLAIMS - 1, (figure, change, told[figure, change])
            assert told[figure, change]["left"] < 0.9
    assert told["recall", REMOVED]["fell"] < 0.8 * CLAIMS and abs(told["recall", REMOVED]["left"] - 1) < 0.05
    assert told["precision", ADDED]["fell"] == 0 and told["precision", REMOVED]["fell"] == CLAIMS - 1
    assert told["recall", ADDED]["fell"] == CLAIMS - 1


def test_the_correlation_is_that_of_changed_labels() -> None:
    """What is said to be left of a correlation is what is left when labels are drawn, token by token."""
    from mnemoscope.patterns.sanity import _left_of_pearson

    random = np.random.default_rng(1)
    shown = random.random(400_000) < 0.1
    value = random.normal(size=shown.size) + 2 * shown
    missing = shown & (random.random(shown.size) < 0.5)
    more = shown | (random.random(shown.size) < shown.mean() / (1 - shown.mean()))
    whole = np.corrcoef(value, shown)[0, 1]
    for change, labels in ((REMOVED, missing), (ADDED, more)):
        left = np.corrcoef(value, labels)[0, 1] / whole
        assert left == pytest.approx(_left_of_pearson(np.array([shown.mean()]), change)[0], abs=0.02)
    assert pearson(np.array(4), np.array(2.0), np.array(2.0), np.array(2), np.array(2.0)) == pytest.approx(1)


def test_figures_are_those_of_the_curve() -> None:
    """At the threshold where so many tokens are active, also where bins beside it are empty."""
    present, absent = np.array([[0, 3, 0, 0, 5, 2]]), np.array([[9, 1, 0, 0, 1, 0]])
    found = figures(present, absent, np.array([8]))
    assert (found["precision"][0], found["recall"][0]) == (7 / 8, 7 / 10)
    assert found["F1"][0] == pytest.approx(14 / 18) and found["IoU"][0] == pytest.approx(7 / 11)
    assert found["average precision"][0] == Curve(present, absent).average_precision[0]


def test_no_verdict_no_rows(tmp_path: Path) -> None:
    """Without a verdict there is nothing to check."""
    made = make_run(tmp_path / "run", layers=1, neurons=6)
    row = {"layer": 0, "neuron": 0, "unit": "neuron", "polarity": 1, "tests": "main", "verdict": NONE}
    told = add_tables(made.path, {"pattern_tests": [rows("pattern_tests", row)]}, {})
    assert sanity(told).height == 0
