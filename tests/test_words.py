"""Words that stand beside a number: they follow from its value and sign."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_run

from mnemoscope.studies import catalogue
from mnemoscope.studies.findings import contributions
from mnemoscope.studies.findings.finding import Finding, Section, chance, went
from mnemoscope.trials.job import Settings, estimate
from mnemoscope.views import findings
from mnemoscope.views.explanation import wording
from mnemoscope.views.terminal import plain


@given(st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_a_probability_that_falls_is_not_said_to_rise(start: float, stop: float) -> None:
    """The verb has the direction of the two numbers beside it."""
    assert went(start, stop) == ("rises" if stop > start else "falls" if stop < start else "stays")


@given(st.floats(-30, 30))
def test_above_and_below_have_the_sign_of_the_number(nats: float) -> None:
    """A negative number of nats is said to lie below, without its sign."""
    said = contributions._beside(nats)
    assert ("above" in said) == (nats >= 0) and ("below" in said) == (nats < 0) and "-" not in said


@pytest.mark.parametrize(
    ("value", "said"), [(0.46, "0.46"), (0.0012, "0.0012"), (2e-5, "2e-5"), (1.0, "1"), (3.4e-12, "3.4e-12")]
)
def test_probabilities_without_idle_exponents(value: float, said: str) -> None:
    """0.46 is not 4.6e-01."""
    assert chance(value) == said


@pytest.mark.parametrize("one", catalogue.CATALOGUE, ids=lambda one: one.name)
def test_costs_are_said_in_words(one: catalogue.Measurement) -> None:
    """What a measurement costs reads as a phrase, one pass in the singular."""
    said = findings.cost({"passes": one.passes, "minutes": one.minutes, "seconds": one.seconds})
    assert "+" not in said and not re.search(r"\b1 passes", said)
    assert (said == "none") == (not one.passes and not one.minutes and not one.seconds)


def test_one_pass_is_not_passes() -> None:
    """Singular, plural, and the rest after commas."""
    row = {"passes": 1, "minutes": 1, "seconds": 0.1}
    assert findings.cost(row) == "1 pass over the sampled text, 1 min, 0.1 s for each example"
    assert findings.cost(row | {"passes": 2}).startswith("2 passes over")


def test_codes_of_items_only_when_asked_for() -> None:
    """A reader who does not know the papers' items is not shown their codes."""
    import polars as pl

    section = Section("one", "One", (Finding("a", ("A2", "A3"), "Title", "It is so.", pl.DataFrame()),))
    row = {
        "name": "one",
        "title": "One",
        "items": ["A2", "A3"],
        "passes": 0,
        "minutes": 0,
        "seconds": 0,
        "state": "ready",
    }
    for view, given_ in ((findings.findings, [section]), (findings.listing, [row])):
        assert "A2" not in plain(view(given_)) and "A2 A3" in plain(view(given_, items=True))


def test_names_of_points_stand_beside_those_of_other_tools() -> None:
    """Lin, Lres, Lout, ATTN and FFN with resid_pre, resid_mid, resid_post, attn and mlp."""
    for name in ("Lin", "Lres", "Lout", "resid_pre", "resid_mid", "resid_post", "ATTN", "FFN", "attn", "mlp"):
        assert name in wording.POINTS


def test_the_time_of_patterns_grows_with_what_is_read(tmp_path: Path) -> None:
    """The estimate that is printed first: more neurons, text or budget take longer."""
    small, large = (make_run(tmp_path / name, layers=layers) for name, layers in (("a", 1), ("b", 4)))
    assert (
        0
        < estimate(small, Settings(1_000))
        < estimate(small, Settings(60_000))
        < estimate(large, Settings(60_000))
    )
