"""Compiled loops over rows of logits against what torch and fp64 say of them, ties and extremes included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mnemoscope.studies.measures.reductions import central_powers, first_largest, log_sums, moments, ranks

FEW = st.sampled_from([-np.inf, -3.4e38, -1.0, -0.0, 0.0, 1e-45, 1.0, 3.4e38, np.inf])  # many ties
ANY = st.floats(width=32, allow_nan=False)
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 63, 64, 65, 130, 511, 512, 513, 1100]))


@st.composite
def rows(draw: st.DrawFn, elements: st.SearchStrategy[float]) -> Tensor:
    """Some rows of logits, most of them alike."""
    return torch.from_numpy(draw(arrays(np.float32, SHAPES, elements=elements)))


@given(st.one_of(rows(FEW), rows(ANY)))
def test_the_largest_is_the_first_of_equals(scores: Tensor) -> None:
    """Of a row of -inf, too; -0.0 equals 0.0."""
    expected = [next(j for j, x in enumerate(row) if x == max(row)) for row in scores.tolist()]
    assert first_largest(scores).tolist() == expected


@given(st.one_of(rows(FEW), rows(ANY)), st.data())
def test_ranks_count_what_is_strictly_higher(scores: Tensor, data: st.DataObject) -> None:
    """Equals are not higher; the largest has rank 0."""
    size = scores.shape[1]
    chosen = st.lists(st.integers(0, size - 1), min_size=len(scores), max_size=len(scores))
    tokens = torch.tensor([data.draw(chosen), first_largest(scores).tolist()]).T
    expected = (scores[:, None, :] > scores.gather(-1, tokens)[..., None]).sum(-1)
    assert torch.equal(ranks(scores, tokens), expected)
    assert ranks(scores, tokens)[:, 1].tolist() == [0] * len(scores)


def normal(size: int, spread: float) -> Tensor:
    return spread * torch.randn(3, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [1, 63, 64, 200, 49152])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_sums_are_those_of_fp64(size: int, spread: float) -> None:
    """Log-sum-exp, mean and population standard deviation, of small and of huge logits far from 0."""
    scores = normal(size, spread) + 7 * spread
    whole = scores.double()
    assert torch.allclose(log_sums(scores), whole.logsumexp(-1), rtol=1e-7, atol=1e-7)
    mean, std = moments(scores)
    assert torch.allclose(mean, whole.mean(-1), rtol=1e-12)
    assert torch.allclose(std, whole.std(-1, correction=0), rtol=1e-4, atol=1e-6 * spread)


@pytest.mark.parametrize("size", [1, 63, 64, 200, 49152])
def test_central_powers_are_those_of_fp64(size: int) -> None:
    """About whatever mean is given, of rows that lie far from 0; parts of a row add up to it."""
    scores, mean = normal(size, 2.0) + 40, torch.tensor([40.0, 38.5, 41.25])
    differences = (scores - mean[:, None]).double()
    expected = torch.stack([(differences**power).sum(-1) for power in (2, 3, 4)], -1)
    sums = central_powers(scores, mean)
    assert torch.allclose(sums, expected, rtol=1e-12, atol=1e-9)
    parts = sum(central_powers(part, mean) for part in scores.split(50, dim=1))
    assert torch.allclose(parts, sums, rtol=1e-12, atol=1e-9)


def test_tokens_that_cannot_be_are_nothing() -> None:
    """Logits of -inf add nothing to a log-sum-exp."""
    scores = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 5.0, -torch.inf]])
    assert log_sums(scores).tolist() == pytest.approx([np.log(2), 5.0])


def test_a_row_depends_on_no_other_and_on_no_threads() -> None:
    """The same bits alone, among others, and with one thread or two."""
    scores = normal(5000, 10.0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            middle = scores.mean(-1)
            together = (log_sums(scores), *moments(scores), central_powers(scores, middle))
            for at in range(len(scores)):
                one = scores[[at]]
                alone = (log_sums(one), *moments(one), central_powers(one, middle[[at]]))
                assert all(torch.equal(a[[at]], b) for a, b in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)
