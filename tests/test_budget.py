"""How a budget of tokens is shared among documents, however long some of them are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.patterns.space import _drawn
from mnemoscope.run.text import Text
from mnemoscope.text import sampling
from mnemoscope.text.sampling import half, mixed
from mnemoscope.trials.masked_text import document_sample


class _Words:
    """As much of a vocabulary as a text of numbers needs."""

    special = np.zeros(10, bool)

    def __len__(self) -> int:
        return 10


def text_of(sizes: list[int], context: int = 1000) -> Text:
    """One document for each size, in contexts of at most so many tokens."""
    rows, number = [], 0
    for document, size in enumerate(sizes):
        for start in range(0, size, context):
            rows.append((number, document, np.ones(min(context, size - start), np.int32)))
            number += 1
    return Text.build(rows, _Words(), special=[])  # type: ignore[arg-type]


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@given(documents=st.lists(lengths, min_size=1, max_size=60), budget=st.integers(1, 2000))
def test_a_budget_is_kept_to_and_made_use_of(documents: list[list[int]], budget: int) -> None:
    """Leading contexts only, not more than the budget, and none left out that would still fit; never nothing."""
    contexts = [np.array(one) for one in documents]
    taken = sampling.share(contexts, budget)
    read = sum(int(one[:count].sum()) for one, count in zip(contexts, taken, strict=True))
    assert taken.sum() >= 1 and (read <= budget or taken.tolist() == [1] + [0] * (len(contexts) - 1))
    left = budget - read
    after = [int(one[count]) for one, count in zip(contexts, taken, strict=True) if count < len(one)]
    assert all(size > left for size in after)


@given(st.permutations([100] * 200 + [7_000, 9_000, 70_000]), st.integers(4_000, 12_000))
def test_no_document_keeps_the_others_out(sizes: list[int], budget: int) -> None:
    """Wherever the long ones stand, at least four fifths of the documents are read that could be at best."""
    contexts = [np.full(-(-size // 100), 100) for size in sizes]
    taken = sampling.share(contexts, budget)
    best = min(len(sizes), budget // 100)
    assert (taken > 0).sum() >= 0.8 * best - 1


@pytest.mark.parametrize("place", [0, 1, 3, 10])
def test_one_long_document_does_not_empty_a_test(place: int) -> None:
    """2,000 documents of 100 tokens and one of 70,000, early in the order in which they are drawn."""
    for test in (False, True):
        sizes = np.full(2001, 100)
        own = np.flatnonzero(half(np.arange(2001)) == test)
        order = own[np.argsort(mixed(own, 101), kind="stable")]
        sizes[order[place]] = 70_000
        part, rows = document_sample(text_of(sizes.tolist()), test, 65_536)
        assert len(np.unique(part.document)) > 600 and len(part) <= 65_536
        assert len(rows) == len(part)


def test_books_give_a_part_each() -> None:
    """Forty books of 20,000 tokens: many of either half are read, and of the background."""
    text = text_of([20_000] * 40)
    for test in (False, True):
        part, _ = document_sample(text, test, 16_384)
        assert len(np.unique(part.document)) >= 12 and len(part) > 15_000
    drawn = _drawn(text, 100_000, 0)
    assert len(np.unique(text.document[drawn])) >= 16 and 95_000 < drawn.sum() <= 100_000
    assert _drawn(text, 800_000, 0).all()
