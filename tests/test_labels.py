"""Topics against the documents' own labels: what neurons are said to know stands beside what pseudo-neurons do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import make_run
from test_study_keys import rows

from mnemoscope.patterns import labels
from mnemoscope.patterns.labels import LabelCheck, check
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables
from mnemoscope.views.patterns import label_line

TOPICS = ("topic:1:paris,france", "topic:1:river,bank", "topic:1:year")


def _with(path: Path, of_neurons: tuple[str, ...], of_nulls: tuple[str, ...]) -> Run:
    """A run in which these topics were confirmed; one more that was not."""
    made = make_run(path, layers=1, neurons=6, documents=200)
    told = [("neuron", spec) for spec in of_neurons] + [("random", spec) for spec in of_nulls]
    common = {"polarity": 1, "tests": "main", "family": "topic", "kind": "semantic", "layer": 0}
    tested = [
        common | {"neuron": number, "unit": unit, "spec": spec, "q": 0.01}
        for number, (unit, spec) in enumerate(sorted(told))
    ]
    tested.append(common | {"neuron": 6, "unit": "random", "spec": "topic:1:never", "q": 0.5})
    tested.sort(key=lambda row: row["neuron"])
    return add_tables(
        made.path, {"pattern_tests": [rows("pattern_tests", *tested)]}, {"patterns": {"q": 0.05}}
    )


def _check(run: Run) -> LabelCheck:
    found = check(run, "topic")
    assert found is not None
    return found


def test_the_same_topics_have_the_same_figures(tmp_path: Path) -> None:
    """The neurons' topics fed in as the pseudo-neurons': nothing is left that neurons have more."""
    found = _check(_with(tmp_path / "run", TOPICS, TOPICS))
    assert (found.patterns, found.median, found.beyond) == (
        found.null_patterns,
        found.null_median,
        found.null_beyond,
    )
    assert found.patterns == 3


def test_each_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pseudo-neurons have is counted apart, each topic once; those that were not confirmed nowhere."""
    monkeypatch.setattr(
        labels, "information", lambda met, code: np.array([3.0, 1.0, 2.0])[: met.shape[1]] * (code[0] >= 0)
    )
    found = _check(_with(tmp_path / "run", TOPICS[:1], TOPICS[1:]))
    assert (found.patterns, found.median) == (1, 3.0)
    assert (found.null_patterns, found.null_median) == (2, 1.5)


def test_what_is_said(tmp_path: Path) -> None:
    """The line names both, or says that there is nothing to compare with."""
    found = _check(_with(tmp_path / "run", TOPICS[:2], TOPICS[2:]))
    assert "2 topic patterns of neurons" in label_line(found)
    assert "Of 1 topic pattern of pseudo-neurons: median" in label_line(found)
    alone = _check(_with(tmp_path / "other", TOPICS, ()))
    assert (alone.null_patterns, alone.null_median, alone.null_beyond) == (0, None, 0)
    assert label_line(alone).endswith("no pseudo-neuron has a topic pattern to compare with")
    assert check(_with(tmp_path / "none", (), TOPICS), "topic") is None
