"""Near-duplicates count as one document: they are found, and certify nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_patterns import small_text, triggers

from mnemoscope.patterns.columns import Groups
from mnemoscope.patterns.duplicates import LONGEST, Duplicates, near_duplicates
from mnemoscope.patterns.search import search
from mnemoscope.patterns.sequences import hashed
from mnemoscope.patterns.triggers import Options, Units, half_triggers
from mnemoscope.records import MAIN
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import half, mixed
from mnemoscope.trials.heldout import FURTHER, confirm, discovery_rate

COPIES = 15
CHANGED = 0.03  # of the tokens


def copied(text: Text, share: float, random: np.random.Generator) -> tuple[Text, np.ndarray]:
    """The text with a share of its documents copied, a few tokens of each copy changed, documents in a random order;
    and i64[document]: what each was before."""
    own = np.unique(text.document)
    sources = random.choice(own, round(share * len(own)), replace=False)
    origin = random.permutation(np.concatenate([own, np.repeat(sources, COPIES)]))
    seen, contexts = set(), []
    for number, source in enumerate(origin.tolist()):
        tokens = text.tokens[text.document == source].copy()
        if source in seen:
            changed = 1 + np.flatnonzero(random.random(len(tokens) - 1) < CHANGED)
            tokens[changed] = random.choice(text.tokens[text.counted], len(changed))
        seen.add(source)
        contexts.append((number, number, tokens))
    return Text.build(contexts, text.vocabulary), origin


def sixes(text: Text, count: int) -> Units:
    """Units that know no pattern: what they say is a hash of the last six tokens."""
    codes, _ = hashed(text.tokens, text.position, tuple(range(5, -1, -1)))
    values = [mixed(codes, 50 + unit).astype(np.float64) for unit in range(count)]
    return Units.of([triggers(text, of_unit) for of_unit in values])


def confirmed(text: Text, units: Units) -> float:
    """Share of the units with a pattern that held-out triggers confirm."""
    options = Options(tests=(MAIN,), draws=500)
    found = search(text, units, options).candidates.filter(FURTHER)
    tested = confirm(text, units, found, options)
    rates = discovery_rate(tested["p_test"].to_numpy(), np.ones(len(tested), bool))
    return tested.filter(pl.Series(rates) <= 0.05)["unit"].n_unique() / len(units)


@pytest.mark.slow
def test_copies_confirm_nothing_once_they_are_joined() -> None:
    """Three documents in a hundred, copied fifteen times: most units of noise seem to have a pattern; joined, none."""
    text, _ = copied(small_text(600)[0], 0.03, np.random.default_rng(0))
    units = sixes(text, 40)
    assert confirmed(text, units) > 0.4
    assert confirmed(near_duplicates(text).join(text), units) <= 0.05


def test_copies_are_found_and_nothing_else() -> None:
    """Every copy counts as the first of its kind in the text; no other document is joined to any."""
    text, origin = copied(small_text(300)[0], 0.05, np.random.default_rng(1))
    found = near_duplicates(text)
    first = {source: number for number, source in reversed(list(enumerate(origin.tolist())))}
    wanted = np.array([first[source] for source in origin.tolist()])
    # A copy may differ from the first one in more tokens than most: it is then left alone, never joined elsewhere.
    assert ((found.group == wanted) | (found.group == found.document)).all()
    assert (found.group == wanted).mean() > 0.98
    assert found.joined == (found.group != np.arange(len(origin))).sum() and found.groups == 15
    assert f"{found.joined} of {len(origin)} documents are nearly copies" in found.note
    joined = found.join(text)
    assert (half(joined.document) == half(found.of(text.document))).all()
    assert (joined.tokens == text.tokens).all() and joined.position is text.position


def test_a_text_without_copies_stays_as_it_is() -> None:
    """Nothing is joined, nothing is said, and the text is the same object; twice the same."""
    text, _ = small_text(120)
    found = near_duplicates(text)
    assert found.joined == found.groups == 0 and found.note == "" and found.join(text) is text
    again = Duplicates.read(found.frame)
    assert (again.group == near_duplicates(text).group).all()


@pytest.mark.parametrize("tokens", [3, 9, 40])
def test_few_tokens_are_no_copies(tokens: int) -> None:
    """The same three or nine tokens do not make two documents one; forty do."""
    text, _ = small_text(60)
    start = text.tokens[text.document == 7][1 : tokens + 1]
    rows = [(0, 0, start), (1, 1, start), (2, 2, text.tokens[text.document == 9][:60])]
    assert near_duplicates(Text.build(rows, text.vocabulary)).joined == int(tokens >= 40)


def test_long_documents_are_compared_by_their_beginning() -> None:
    """However contexts are cut, two books with the same first tokens are one; special tokens between do not matter."""
    text, _ = small_text(120)
    book = text.tokens[text.counted][: LONGEST + 500]
    cut = [
        (0, 0, book[:3000]),
        (1, 0, book[3000:]),
        (2, 5, [0, *book[:1000]]),
        (3, 5, [0, *book[1000:LONGEST]]),
    ]
    found = near_duplicates(Text.build(cut, text.vocabulary))
    assert found.group.tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=60))
def test_documents_of_a_code_are_counted_wherever_they_lie(pairs: list[tuple[int, int]]) -> None:
    """Copies lie apart in the text: the number of different documents is that of numpy, in any order."""
    codes, documents = np.array(pairs).T
    groups = Groups(codes, np.ones(len(codes), bool))
    wanted = [len(np.unique(documents[codes == code])) for code in groups.codes]
    assert groups.spread(documents).tolist() == wanted


def test_a_unit_has_one_trigger_of_all_copies() -> None:
    """Of triggers in copies of one document the strongest alone is a witness, and all copies are in one half."""
    text, origin = copied(small_text(300)[0], 0.05, np.random.default_rng(1))
    joined = near_duplicates(text).join(text)
    many = np.flatnonzero(np.bincount(origin) > 1)
    rows = [np.flatnonzero(text.document == number)[20] for number in np.flatnonzero(origin == many[0])]
    units = Units.of([np.array(rows)])
    kept = [half_triggers(joined, units, Options(), test=test)[1] for test in (False, True)]
    assert sum((slots >= 0).sum() for slots in kept) == 1
    apart = replace(joined, document=text.document)
    kept = [half_triggers(apart, units, Options(), test=test)[1] for test in (False, True)]
    assert sum((slots >= 0).sum() for slots in kept) == COPIES + 1
