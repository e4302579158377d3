"""Whole distributions: mass near zero, columns of histograms, thresholds, down the range."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import HISTOGRAM_EDGES, make_run

from mnemoscope.run.reading import Run
from mnemoscope.studies.findings import distributions
from mnemoscope.studies.findings.distributions import deviations, even_columns, persistence, within
from mnemoscope.text.sampling import half

EDGES = np.array(HISTOGRAM_EDGES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made by hand."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", layers=3, neurons=8)


def counted(values: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(EDGES, values, "right"), minlength=len(EDGES) + 1)


def test_mass_near_zero_of_a_normal_distribution() -> None:
    """From the bins of many normal draws: the normal distribution's own mass, at several reaches."""
    values = np.random.default_rng(0).normal(size=200_000)
    counts = np.repeat(counted(values)[None], 3, 0).astype(float)
    reach = np.array([0.1, 0.5, 2.0])
    assert within(counts, EDGES, reach) == pytest.approx(2 * stats.norm.cdf(reach) - 1, abs=0.01)


def test_columns_keep_every_token() -> None:
    """Whatever lies between the least and the greatest value is drawn, and no more."""
    values = np.random.default_rng(0).standard_t(2, 5_000)
    frame = even_columns(counted(values), EDGES, values.min(), values.max())
    assert frame["tokens"].sum() == pytest.approx(5_000)
    assert frame["left"][0] == values.min() and frame["right"][-1] == pytest.approx(values.max())
    exact, _ = np.histogram(values, np.append(frame["left"].to_numpy(), frame["right"][-1]))
    assert np.abs(np.cumsum(frame["tokens"].to_numpy()) - np.cumsum(exact)).max() < 0.1 * 5_000


def test_columns_of_a_constant_neuron() -> None:
    """A neuron that is always 0 has one column with all of it."""
    counts = counted(np.zeros(50))
    frame = even_columns(counts, EDGES, 0.0, 0.0)
    assert frame["tokens"].sum() == pytest.approx(50)


def test_findings_of_a_run(run: Run) -> None:
    """Every figure covers every layer; shares are shares."""
    found = {one.id: one for one in distributions.findings(run)}
    for name in ("kurtosis", "positive-share", "reach", "mass-near-zero"):
        assert found[name].frame["layer"].to_list() == [0, 1, 2]
    active = found["what-active-means"].frame
    assert active["share"].is_between(0, 1).all() and active.height == 3 * len(distributions.RULES)


def test_active_by_the_first_rule_is_the_share_of_positive_coefficients(run: Run) -> None:
    """The rule > 0 is exact: the mean over neurons of `positive_fraction`."""
    frame = {one.id: one for one in distributions.findings(run)}["what-active-means"].frame
    mine = frame.filter(pl.col("rule") == "> 0").sort("layer")["share"]
    exact = (
        run.table("neurons").group_by("layer").agg(pl.col("positive_fraction").mean()).sort("layer").collect()
    )
    assert mine.to_list() == pytest.approx(exact["positive_fraction"].to_list())


def test_the_marking_token_fades_down_the_range() -> None:
    """Samples that carry the mark at the top only: whole at the top, nothing below, another's mark in between."""
    rows = pl.DataFrame(
        {
            "among": [0] * 40,
            "cell": [4, 5] * 20,
            "mark": [1, 2] * 20,
            "token": [1, 2] * 10 + [3] * 10 + [2, 1] * 5,
            "part": [9] * 20 + [0] * 20,
            "document": list(range(40)),
        }
    )
    share, null = persistence(rows)
    assert share.value[9] == 1 and share.value[0] == 0 and np.isnan(share.value[5])
    assert null[9] == 0 and null[0] == pytest.approx(0.5)


def test_marks_are_chosen_on_one_half_and_asked_on_the_other(tmp_path: Path) -> None:
    """No sample is of a document that a mark was chosen from, and marks are what the other half's triggers end with."""
    run = make_run(tmp_path / "run", layers=2, neurons=8, documents=80, top=40)
    rows = distributions._samples(run)
    assert rows.height and half(rows["document"].to_numpy()).all()
    text = {one: stored.tokens for one, stored in run.contexts(range(run.manifest.corpus.contexts)).items()}
    owner = dict(run.table("contexts").select("context", "document").collect().iter_rows())
    triggers = run.table("triggers").filter(pl.col("polarity") == 1).collect()
    for cell, mark in rows.select("cell", "mark").unique().iter_rows():
        of = triggers.filter(pl.col("layer") == cell // 8, pl.col("neuron") == cell % 8)
        ends = Counter(
            int(text[context][position])
            for context, position in of.select("context", "position").iter_rows()
            if not half(np.array([owner[context]]))[0]
        )
        assert ends.total() >= distributions.FEWEST and ends[mark] == max(ends.values())


@pytest.mark.parametrize("draws", ["normal", "standard_cauchy", "exponential"])
def test_the_spread_is_that_of_the_middle(draws: str) -> None:
    """From the bins: the median absolute deviation of the draws, however heavy their tails."""
    values = getattr(np.random.default_rng(0), draws)(size=(2, 100_000))
    found = deviations(np.stack([counted(row) for row in values]).astype(float), EDGES)
    assert found == pytest.approx(stats.median_abs_deviation(values, axis=1), rel=0.02)


def test_a_silent_neuron_has_no_spread() -> None:
    """All of it in one bin about zero: no more than the bin's own width."""
    assert deviations(counted(np.zeros(50))[None].astype(float), EDGES)[0] < 1e-3


def test_nulls_are_bands_where_a_run_has_them(tmp_path: Path, run: Run) -> None:
    """A run without null units is drawn without a band, and says so by leaving the null empty."""
    found = {one.id: one for one in distributions.findings(run)}
    assert found["kurtosis"].null == "" and found["kurtosis"].figure is not None
    assert found["kurtosis"].figure.null_low is None
