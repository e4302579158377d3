"""The headline: contrasts listed beforehand, corrected together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.intervals import LEAST, Interval, chance, holm, jackknifed, jackknifed_chance
from mnemoscope.studies.findings import headline
from mnemoscope.studies.findings.finding import Difference, Finding, Section


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_reject(p: list[float]) -> None:
    """At any level: the smallest p against level / m, the next against level / (m - 1), until one is above."""
    corrected = holm(np.array(p))
    for level in (0.01, 0.05, 0.5, 0.99):
        rejected, order = set(), sorted(range(len(p)), key=p.__getitem__)
        for step, place in enumerate(order):
            if p[place] * (len(p) - step) > level:
                break
            rejected.add(place)
        assert {place for place in range(len(p)) if corrected[place] <= level} == rejected


def test_the_chance_of_an_interval_is_that_of_its_test() -> None:
    """Of a jackknife, whose interval is Student's, p is the same from the interval as from the groups."""
    generator = np.random.default_rng(0)
    values = generator.normal(np.linspace(0, 1, 50), 1, (30, 50))
    figures = np.concatenate([values.mean(0)[None], (values.sum(0) - values) / 29])
    expected = jackknifed_chance(figures)
    assert chance(jackknifed(figures)) == pytest.approx(expected, rel=1e-9)
    assert expected.min() < 1e-3 < 0.5 < expected.max()


def test_without_an_interval_nothing_is_certain() -> None:
    """Too few units, none counted, or an interval without ends: p is 1."""
    ends = np.array([1.0]), np.array([0.9]), np.array([1.1])
    assert chance(Interval(*ends).among(LEAST))[0] < 0.001
    assert chance(Interval(*ends).among(LEAST - 1))[0] == 1 and chance(Interval(*ends))[0] == 1
    assert chance(Interval(ends[0], *(np.array([np.nan]),) * 2).among(50))[0] == 1


def test_what_was_not_measured_counts() -> None:
    """p is corrected for all thirty, however many a run has: to measure less makes nothing hold."""
    rows = headline.listed()
    assert len(rows) == 30 == len({row[:2] for row in rows})
    assert len({row.asks for row in rows}) == 30
    contrast = Difference(rows[-1].key, 0.2, 0.1, 0.3, 50)
    finding = Finding(rows[-1].finding, ("A1",), "", "Says.", pl.DataFrame(), contrasts=(contrast,))
    (alone,) = headline.section([Section("x", "", (finding,))]).findings
    row = alone.frame.row(-1, named=True)
    assert row["holm"] == pytest.approx(30 * row["p"]) and row["p"] < 0.01 and row["errors"] > 2
    assert (alone.frame["holm"][:-1] == 1).all() and alone.says.startswith("This run has 1 of 30")
    assert not headline.section([Section("x", "", ())]).findings


@pytest.mark.slow
def test_every_contrast_of_the_list_is_measured(tmp_path: Path) -> None:
    """By a whole study of a run with decoys, and its page begins with them; asked for a part, it does not."""
    folder = model_folder(tmp_path / "model")
    run = mn.build(folder, texts(120), tmp_path / "run", top=10, nulls=("random", "rotated", "chimera"))
    study = run.study(model=folder, fast=True)
    head = study.findings[0]
    assert head.id == "headline-contrasts"
    assert [note for note in head.notes if note.startswith("not measured")] == []
    assert study.to_dict()["findings"][0]["rows"][0]["key"] == headline.listed()[0].key
    assert run.study(only="glance").findings[0].id != head.id
    assert run.study(only="glance").whole()[0].name == "headline"
