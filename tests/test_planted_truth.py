"""Planted truth by another hand, small: `benches.planted_truth` on a text of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from planted_patterns import small_text

sys.path.insert(0, str(Path(__file__).parents[1]))
from benches.patterns import Say, outcomes
from benches.planted_truth import FORMS, KINDS, Decoded, nulls_by_kind, recovery, world
from mnemoscope.patterns.language import masks


def test_decoded_text_agrees_with_the_language() -> None:
    """Where a regular expression of the bench ends and where the pattern of that name holds are the same prefixes."""
    text, _ = small_text(40)
    decoded = Decoded(text, text.vocabulary.pieces)
    for spec, name in (
        ("digits:2", "two-digit number"),
        ("digits:3", "three-digit number"),
        ("year", "year"),
    ):
        rows = np.flatnonzero(masks(text, [spec]).toarray()[:, 0])
        assert len(rows) and decoded.now(FORMS[name]).tolist() == rows.tolist(), name
    word, rows = max(decoded.words().items(), key=lambda pair: len(pair[1]))
    shown = masks(text, [f"word:{word}"]).toarray()[:, 0]
    assert shown[rows].all()
    goes_on = np.setdiff1d(np.flatnonzero(shown), rows) + 1  # a prefix does not know that its last word does
    assert {text.vocabulary.pieces([token])[0] for token in text.tokens[goes_on].tolist()} <= {"s", "ly"}


@pytest.mark.slow
def test_what_is_planted_is_found_and_nothing_else() -> None:
    """Of a few units of each kind nearly all are found, with the precision and recall that they have; of the null units
    of every kind at most one in twenty discoveries is."""
    text, _ = small_text(500)
    found = world(Decoded(text, text.vocabulary.pieces), 3, 10, 0, Say("planted truth"), KINDS)
    told = recovery(list(outcomes(found)))
    assert {"word", "affix", "any of four", "form"} <= set(told)
    kinds = [told[kind] for kind in ("word", "affix", "any of four", "form")]
    assert np.mean([kind["recovered"][0] for kind in kinds]) >= 0.75, told
    assert all(abs(kind["precision"]["mean_error"] or 0) < 0.1 for kind in kinds), told
    nulls = nulls_by_kind(found)
    assert set(nulls) == {*KINDS, "all"}
    assert nulls["all"]["false_discovery_proportion"] <= 0.1 and nulls["all"]["family_wise_05"][1] < 0.1, (
        nulls
    )
