"""Neurons against decoys of their own: the bound on false discoveries, the excess, and both in a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_patterns_job import planted_model
from tiny import WORDS, texts

from mnemoscope import build
from mnemoscope.intervals import LEAST
from mnemoscope.neuron import decoys, twoway
from mnemoscope.patterns import summary
from mnemoscope.patterns.search import Options
from mnemoscope.results import PatternReport
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings import keys
from mnemoscope.trials import job
from mnemoscope.trials.job import Settings, patterns
from mnemoscope.trials.outcomes import crossed_bars
from mnemoscope.views.patterns import summary as printed
from mnemoscope.views.terminal import plain

figures = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.9]), min_size=2, max_size=2)


def slow_rates(own: np.ndarray, others: np.ndarray, seed: int) -> tuple[list[float], list[float]]:
    """Every threshold tried for every unit, as the estimate is written."""
    wins, margin = decoys.margins(own, others, seed)
    level: tuple[list[float], list[float]] = ([], [])
    for unit in range(len(own)):
        best = 1.0
        for t in margin[(margin > 0) & (margin <= margin[unit])]:
            lost = sum(m >= t and not won for won, m in zip(wins, margin, strict=True))
            won = sum(m >= t and won for won, m in zip(wins, margin, strict=True))
            best = min(best, (1 + lost) / others.shape[1] / max(won, 1))
        level[0].append(best if wins[unit] else 1.0)
        level[1].append(1.0 if wins[unit] else best)
    return level


@given(st.lists(figures, min_size=1, max_size=30), st.integers(1, 2), st.integers(0, 9))
def test_rates_equal_the_definition(scores: list[list[float]], kinds: int, seed: int) -> None:
    """Of every unit and its decoys, by all thresholds; equals say nothing, and a larger margin is never surer wrong."""
    own, others = np.array(scores)[:, 0], np.repeat(np.array(scores)[:, 1:], kinds, 1)
    others[:, -1:] *= 0.5 if kinds == 2 else 1
    found, slow = decoys.rates(own, others, seed), slow_rates(own, others, seed)
    for level, expected in zip(found, slow, strict=True):
        np.testing.assert_allclose(level, expected)
    wins, margin = decoys.margins(own, others, seed)
    assert (found[0][margin == 0] == 1).all()
    order = np.flatnonzero(wins)[np.argsort(-margin[wins])]
    assert (np.diff(found[0][order]) >= 0).all()


@given(st.lists(figures, min_size=1, max_size=30))
def test_swapping_neurons_and_decoys_swaps_who_wins(scores: list[list[float]]) -> None:
    """Nothing but the figures says which of the two is the neuron."""
    own, other = np.array(scores).T
    wins, margin = decoys.margins(own, other[:, None])
    swapped, same = decoys.margins(other, own[:, None])
    assert (margin == same).all()
    assert (wins != swapped)[margin > 0].all()


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("signals", [0, 20, 150])
def test_false_discoveries_stay_below_the_level(kinds: int, signals: int) -> None:
    """300 worlds of 600 neurons whose figures differ wildly: those that are as their decoys are among the discoveries
    no more often than at the level, and signals are found."""
    random = np.random.default_rng(kinds + signals)
    shares: dict[float, list[float]] = {level: [] for level in decoys.LEVELS}
    power = []
    for world in range(300):
        scale = random.lognormal(0, 1, 600)[:, None]
        scores = np.abs(random.standard_t(3, (600, 1 + kinds))) * scale
        scores[:signals, 0] += 20 * scale[:signals, 0]
        level, _ = decoys.rates(scores[:, 0], scores[:, 1:], world)
        for bound, found in shares.items():
            chosen = np.flatnonzero(level <= bound)
            found.append(float((chosen >= signals).sum() / max(len(chosen), 1)))
        power.append((level[:signals] <= 0.1).mean() if signals else 1.0)
    for bound, found in shares.items():
        assert np.mean(found) <= bound + 3 * np.std(found) / 300**0.5, (bound, np.mean(found))
    assert signals < 100 or np.mean(power) > 0.5


@given(st.integers(0, 99), st.sampled_from([9, 45]))
def test_the_excess_of_a_thing_over_itself_is_nothing(seed: int, documents: int) -> None:
    """Neurons in the place of their decoys, too: 0 with an interval of 0; figures equal F1 told one by one."""
    random = np.random.default_rng(seed)
    active, present = random.integers(0, 5, (2, 6, documents))
    both = random.binomial(np.minimum(active, present), 0.5)
    figures = decoys.f1_without(active, both, present, 40)
    assert figures.shape == (1 + min(documents, 40), 6)
    for group in range(len(figures)):
        kept = [d for d in range(documents) if group == 0 or d % min(documents, 40) != group - 1]
        for claim in range(6):
            a, b, p = (int(counts[claim, kept].sum()) for counts in (active, both, present))
            assert np.isclose(figures[group, claim], 2 * b / (a + p) if a + p else 0)
    excess = decoys.Excess(12)
    excess.add("neuron", figures)
    excess.add("chimera", figures[:, ::-1])
    ends = (0.0, 0.0) if documents >= LEAST else (None, None)
    assert {(e.value, e.low, e.high) for e in excess.over("neuron", "chimera")} == {(0.0, *ends)}
    shares = [estimate.value for estimate in excess.shares("neuron")]
    assert shares == [float((figures[0] >= figure).sum() / 12) for figure in decoys.FIGURES]


@pytest.mark.slow
def test_the_interval_of_an_excess_holds_what_it_should() -> None:
    """In 400 draws of 60 documents the interval of a share above a bar holds the share of a very long text about as
    often as it says, and is not far too wide."""
    random = np.random.default_rng(0)
    rate = random.beta(2, 2, (300, 1))  # of each claim: how often an active token shows the pattern
    length = 400

    truth = np.mean([(decoys.f1_without(*_long(random, rate, length))[0] >= 0.5).mean() for _ in range(3)])
    held = widths = 0.0
    for _ in range(400):
        excess = decoys.Excess(300)
        excess.add("neuron", decoys.f1_without(*_long(random, rate, 60)))
        share = excess.shares("neuron")[1]
        assert share.low is not None and share.high is not None
        held += (share.low <= truth <= share.high) / 400
        widths += (share.high - share.low) / 400
    assert held >= 0.88 and widths < 0.1, (held, widths)


def _long(random: np.random.Generator, rate: np.ndarray, documents: int) -> tuple[np.ndarray, ...]:
    """Claims whose precision is `rate` and whose recall is 1, in documents of very different length."""
    active = random.poisson(random.lognormal(1, 1, documents), (len(rate), documents)) + 1
    both = random.binomial(active, rate)
    return active, both, both


# -- in a run ------------------------------------------------------------------------------------------------

PLANTED = {neuron: f" {word}" for neuron, word in enumerate(WORDS[8:38], 2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """30 neurons that know one word each among 32, with both kinds of decoys."""
    model = planted_model(PLANTED, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Options", partial(Options, draws=300))
        path = tmp_path_factory.mktemp("decoys") / "run"
        bare = build(model, texts(160), path, top=24, nulls=("random", "chimera", "covariance"))
        yield patterns(bare, model, Settings(budget=3000))


@pytest.mark.slow
def test_planted_neurons_beat_their_decoys(run: Run) -> None:
    """At a tenth of false discoveries; few others do, and no decoy has more than its share."""
    rows = run.table("pattern_tests").filter(tests="main").collect()
    told = rows.filter((pl.col("unit") == "neuron") & (pl.col("decoy_q") <= 0.1) & (pl.col("q") <= 0.05))
    planted = told.filter(
        (pl.col("layer") == 0) & pl.col("neuron").is_in(list(PLANTED)) & (pl.col("polarity") > 0)
    )
    assert planted.height >= 0.8 * len(PLANTED), rows.filter(unit="neuron").select(
        "neuron", "f1_low", "decoy_f1_low"
    )
    assert told.height - planted.height <= 0.2 * told.height
    assert (told["verdict"] != twoway.NONE).all()
    known = summary.summary(run)
    row = known.decoys.row(by_predicate=(pl.col("tests") == "main") & (pl.col("level") == 0.1), named=True)
    assert row["neurons"] == told.height and row["share"] == row["decoys"] / 2 / told.height <= 0.1
    for kind in ("chimera", "covariance"):
        excess = known.excess.filter(
            (pl.col("tests") == "main") & (pl.col("unit") == kind) & (pl.col("f1") == 0.5)
        )
        assert np.isclose(excess["excess"][0], excess["neurons"][0] - excess["decoys"][0])
        assert excess["low"][0] > 0
        assert excess["neurons"][0] >= 0.8 * len(PLANTED) / (2 * 2 * 32)


@pytest.mark.slow
def test_rivals_in_the_tables_are_the_units_own(run: Run) -> None:
    """What a row says of its rivals is what the rivals' rows say; levels follow from the rows alone."""
    table = run.table("pattern_tests").collect()
    kinds = ("neuron", "chimera", "covariance")
    assert (
        table.filter(pl.col("unit") == "random")["decoy_q"].null_count() == (table["unit"] == "random").sum()
    )
    for tests in table["tests"].unique():
        rows = table.filter((pl.col("tests") == tests) & pl.col("unit").is_in(kinds))
        of = {
            (row["unit"], row["layer"], row["neuron"], row["polarity"]): row
            for row in rows.iter_rows(named=True)
        }
        units = [(layer, neuron, sign) for layer in (0, 1) for neuron in range(32) for sign in (1, -1)]
        low = np.array([[of.get((kind, *unit), {}).get("f1_low") or 0 for kind in kinds] for unit in units])
        own, best_decoy = decoys.rates(low[:, 0], low[:, 1:], 0)
        for place, unit in enumerate(units):
            for index, kind in enumerate(kinds):
                if (kind, *unit) not in of:
                    continue
                row = of[kind, *unit]
                assert row["decoy_f1_low"] == np.delete(low[place], index).max()
                level = own[place] if kind == "neuron" else best_decoy[place]
                assert row["decoy_q"] == (level if kind == "neuron" or low[place].argmax() == index else 1)


@pytest.mark.slow
def test_only_what_was_judged_alike_stands_beside_neurons(run: Run) -> None:
    """Random directions have a bar and no rival, so that their verdicts are another thing: nowhere beside neurons'."""
    known = summary.summary(run)
    kinds = {"chimera", "covariance"}
    assert set(known.verdicts["unit"]) == {"neuron"} | kinds and set(known.expected["unit"]) == kinds
    beyond = known.beyond.filter(pl.col("null") == "verdict")
    assert set(beyond["unit"]) == {"neuron"} | kinds
    assert "random" in known.beyond.filter(pl.col("null") == "N1")["unit"].to_list()
    assert "random" in plain(printed(PatternReport(known, None, (), ()), layers=True), 100)
    (verdicts,) = [finding for finding in keys.findings(run) if finding.id == "two-way-verdicts"]
    assert "random" not in verdicts.says and "chimeras" in verdicts.says
    assert decoys.judged_alike(["random", "rotated"]) == ["random", "rotated"]


@pytest.mark.slow
def test_the_study_says_what_decoys_do_not(run: Run) -> None:
    """One finding with what was counted, drawn beside zero; none for a run without decoys (`test_study_keys`)."""
    (finding,) = [finding for finding in keys.findings(run) if finding.id == "neurons-against-decoys"]
    counts = summary.against_decoys(run.table("pattern_tests").collect(), 0.05)
    at_ten = counts.row(by_predicate=(pl.col("tests") == "main") & (pl.col("level") == 0.1), named=True)
    assert f"Of {2 * 2 * 32:,} neurons" in finding.says and f"{at_ten['neurons']} at 10%" in finding.says
    assert "chimeras" in finding.says and "covariance of the keys" in finding.says
    assert "n = " in finding.resampled and (finding.frame["null"] == 0).all()
    assert set(finding.frame["f1"]) == set(decoys.FIGURES)


@pytest.mark.slow
def test_a_world_of_noise_has_hardly_a_verdict(tmp_path: Path) -> None:
    """All neurons are random, as their decoys are: held against these, or against bars of pseudo-neurons, no more of
    them have a verdict than the level allows, in any family."""
    model = planted_model({}, 32)
    for name, kinds in (("decoys", ("chimera", "covariance")), ("bars", ("random", "rotated"))):
        bare = build(model, texts(160), tmp_path / name, top=24, nulls=kinds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "Options", partial(Options, draws=300))
            rows = patterns(bare, model, Settings(budget=3000)).table("pattern_tests").collect()
        told = rows.filter((pl.col("unit") == "neuron") & (pl.col("verdict") != twoway.NONE))
        sides = 2 * 2 * 32
        for tests in rows["tests"].unique():
            assert told.filter(tests=tests).height <= 0.02 * sides, (
                name,
                tests,
                told.select("name", "f1_low", "q"),
            )


def test_bars_are_of_others() -> None:
    """Neurons and pseudo-neurons alike, 400 times: as many of either exceed the crossed bars. The trap: of those that
    are held against a bar of their own, fewer do, and what is said to be expected of neurons is too little."""
    random = np.random.default_rng(0)
    above = np.zeros(3)
    for _ in range(400):
        neurons, nulls = random.beta(1, 6, (500, 2)), random.beta(1, 6, (64, 2))
        even, odd = crossed_bars(nulls)
        bar = np.where(np.arange(500) % 2 == 0, even, odd)
        above[0] += (neurons > bar[:, None]).mean() / 400
        above[1] += (nulls > bar[:64, None]).mean() / 400
        above[2] += (nulls > np.quantile(nulls, twoway.NULL_LEVEL)).mean() / 400
    assert abs(above[0] - above[1]) < 0.004 and above[0] < 0.03, above
    assert above[2] < 0.8 * above[0], above
