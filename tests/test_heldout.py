"""Chosen patterns on other triggers, against counting claim by claim and trigger by trigger."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_patterns import small_text, words
from scipy.sparse import csc_array

from mnemoscope.patterns.language import masks
from mnemoscope.patterns.score import log_binomial_tail, poisson_binomial_tail
from mnemoscope.patterns.space import strata
from mnemoscope.patterns.triggers import Options, Units, halves, one_each
from mnemoscope.run.text import Text
from mnemoscope.trials import heldout
from mnemoscope.trials.heldout import (
    PartMasks,
    beyond_last_token,
    confirm,
    count_same_code,
    masks_of_many,
    numbered_names,
)

WORDS = words()
LIST = f"words:{','.join(WORDS[200:240])}@16"
SPECS = [
    f"word:{WORDS[205]}", "suffix:tion", f"word:{WORDS[230]}@all", "year", LIST, "word:nowhere",
    f'any:["word:{WORDS[205]}","word:{WORDS[206]}","suffix:tion"]',
    f'any:["{LIST}","word:{WORDS[230]}@all"]',
    f'all:["{LIST}","word:{WORDS[230]}@all"]',
    f'all:["any:[\\"suffix:ing\\",\\"suffix:tion\\"]","{LIST}"]',
    'any:["suffix:ing","suffix:ing"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def text() -> Text:
    return small_text()[0]


@pytest.fixture(scope="module")
def units(text: Text) -> Units:
    """Five units with triggers at random, one with none."""
    random = np.random.default_rng(0)
    rows = np.flatnonzero(text.counted)
    return Units.of([*(random.choice(rows, 30, replace=False) for _ in range(5)), []])


def _claims(units: Units) -> pl.DataFrame:
    """Every pattern of every unit, mixed."""
    pairs = [(unit, spec) for unit in range(len(units)) for spec in SPECS]
    order = np.random.default_rng(1).permutation(len(pairs))
    return pl.DataFrame([pairs[place] for place in order], schema=["unit", "spec"], orient="row")


def _half(text: Text, units: Units) -> tuple[Text, np.ndarray]:
    part, rows = text.part(halves(text.document[text.counted])[1])
    back = np.full(len(text), -1)
    back[rows] = np.arange(len(rows))
    return part, one_each(part, units, back[units.rows])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_portions_are_masks(text: Text, size: int) -> None:
    """However many at a time, compounds made from the masks of their parts are what each has by itself: one of
    its parts or each of them, row by row."""
    found = np.concatenate([part.toarray() for part in PartMasks(text, SPECS).chunks(SPECS, size)], 1)
    np.testing.assert_array_equal(found, masks(text, SPECS).toarray())
    either, both = found[:, SPECS.index(LIST)], found[:, 2]
    np.testing.assert_array_equal(found[:, 7], either | both)
    np.testing.assert_array_equal(found[:, 8], either & both)
    assert found[:, 8].any() and list(PartMasks(text, []).chunks([], size)) == []
    assert (masks_of_many(text, SPECS) != masks(text, SPECS)).nnz == 0 and masks_of_many(text, []).shape == (
        len(text),
        0,
    )


@given(st.data())
def test_alike_counts_rows_with_the_same_code(data: st.DataObject) -> None:
    """For each claim and row: the rows of its column that have the code of that row; nothing for no row or no code."""
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    has = np.array(bits).reshape(height, width)
    code = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=height, max_size=height)))
    column = np.array(sorted(data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=5))))
    slots = st.lists(st.integers(-1, height - 1), min_size=2, max_size=2)
    rows = np.array([data.draw(slots) for _ in column])
    slow = [
        [sum(has[i, c] and code[i] == code[r] for i in range(height)) if r >= 0 and code[r] >= 0 else 0 for r in own]
        for own, c in zip(rows, column, strict=True)
    ]  # fmt: skip
    assert count_same_code(csc_array(has), code, rows, column).tolist() == slow


@pytest.mark.parametrize("chunk", [3, 2000])
def test_confirm_by_hand(text: Text, units: Units, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits, where they are and the mean rate of the strata, as one would count them for each claim alone."""
    monkeypatch.setattr(heldout, "CHUNK", chunk)
    part, slots = _half(text, units)
    counted = np.flatnonzero(part.counted)
    stratum = np.full(len(part), -1)
    stratum[counted], _ = strata(part, counted, True)
    for row in confirm(text, units, _claims(units), Options()).iter_rows(named=True):
        mask = masks(part, [row["spec"]]).toarray()[:, 0]
        own = slots[row["unit"]][slots[row["unit"]] >= 0]
        rates = [mask[stratum == stratum[trigger]].mean() for trigger in own]
        assert row["n_test"] == len(own) and row["hits_test"] == mask[own].sum()
        assert row["where_test"] == sum(1 << place for place, trigger in enumerate(own) if mask[trigger])
        assert row["base_test"] == pytest.approx(np.mean(rates) if len(own) else 0, abs=1e-15)
        tail = np.exp(log_binomial_tail(mask[own].sum(), np.array(len(own)), np.array(row["base_test"])))
        assert row["p_test"] == pytest.approx(float(tail) if len(own) else 1)


@pytest.mark.parametrize("chunk", [3, 2000])
def test_beyond_by_hand(text: Text, units: Units, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance at each trigger is that of the prefixes of other documents with the same last token."""
    monkeypatch.setattr(heldout, "CHUNK", chunk)
    part, slots = _half(text, units)
    for row in beyond_last_token(text, units, _claims(units), Options()).iter_rows(named=True):
        mask = masks(part, [row["spec"]]).toarray()[:, 0]
        rates, hits = [], 0
        for trigger in slots[row["unit"]][slots[row["unit"]] >= 0]:
            same = part.counted & (part.tokens == part.tokens[trigger])
            same &= part.document != part.document[trigger]
            if same.any():
                rates.append((mask[same].sum() + 1) / (same.sum() + 2))
                hits += mask[trigger]
        assert row["n_n2"] == len(rates) and row["hits_n2"] == hits
        assert row["expected_n2"] == pytest.approx(sum(rates), abs=1e-12)
        tail = poisson_binomial_tail(np.array([hits]), np.array([rates]).reshape(1, -1))
        assert row["p_n2"] == pytest.approx(float(tail[0]))


def test_numbered_names() -> None:
    """Each row has the place of its name among all in order; no rows, no names."""
    names, number = numbered_names(pl.Series(["b", "é", "a", "b", "B"]))
    assert names == ["B", "a", "b", "é"] and number.tolist() == [2, 3, 1, 2, 0]
    names, number = numbered_names(pl.Series([], dtype=pl.String))
    assert names == [] and number.tolist() == []
