"""Intervals: resampled by document against loops, Wilson's against known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.analyses.study.resample import (
    by_document,
    mean_by_document,
    mean_by_group,
    per_document,
    quantile_by_document,
    ratio,
    wilson,
)


def test_means_by_document_equal_a_loop_over_resampled_documents() -> None:
    """The vectorised bootstrap is the plain one: draw documents, take all of their examples, average."""
    generator = np.random.default_rng(1)
    values, documents = generator.normal(size=(60, 2)), generator.integers(0, 7, 60)
    values[3, 0] = np.nan
    found = mean_by_document(values, documents, n=30, seed=5)
    draws = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), 30)
    means = [
        np.nanmean(np.concatenate([np.repeat(values[documents == d], times, 0) for d, times in enumerate(one)]), 0)
        for one in draws
    ]  # fmt: skip
    assert found.value == pytest.approx(np.nanmean(values, 0))
    assert found.low == pytest.approx(np.quantile(means, 0.025, axis=0))
    assert found.high == pytest.approx(np.quantile(means, 0.975, axis=0))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_groups_are_means_of_their_examples(size: int, groups: int, seed: int) -> None:
    """Each group's estimate is its mean, inside its interval; a group without examples has none."""
    generator = np.random.default_rng(seed)
    values, group = generator.random(size), generator.integers(0, groups, size)
    found = mean_by_group(values, group, groups, generator.integers(0, 6, size), n=50)
    for one in range(groups):
        if (group == one).any():
            assert found.value[one] == pytest.approx(values[group == one].mean())
            assert found.low[one] <= found.high[one]
        else:
            assert np.isnan(found.value[one])


def test_documents_matter() -> None:
    """Examples that repeat within documents give a wider interval than the same examples all apart."""
    values = np.repeat(np.random.default_rng(0).random(20), 10)
    together = mean_by_document(values, np.repeat(np.arange(20), 10))
    apart = mean_by_document(values, np.arange(200))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_quantiles_of_all_documents_are_quantiles() -> None:
    """Without resampling a quantile is the lower one of the sorted values."""
    values = np.random.default_rng(0).random((41, 3))
    found = quantile_by_document(values, np.arange(41) % 9, (0.25, 0.5))
    assert found.value == pytest.approx(np.quantile(values, (0.25, 0.5), axis=0, method="inverted_cdf"))
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


def test_sums_of_documents_are_in_the_order_of_their_ids() -> None:
    """Documents ascend, whatever the order of the examples."""
    assert per_document(np.array([1.0, 2, 4]), np.array([9, 3, 9])).tolist() == [2, 5]


def test_wilson_is_wilsons() -> None:
    """10 of 100 gives [0.0552, 0.1744] (Newcombe 1998's method 3); nothing of nothing is not defined."""
    found = wilson(np.array([10, 0]), np.array([100, 0]))
    assert [found.low[0], found.high[0]] == pytest.approx([0.0552, 0.1744], abs=1e-4)
    assert np.isnan(found.value[1]) and np.isnan(found.low[1])


def test_nothing_to_resample_is_not_an_error() -> None:
    """No examples: the estimate is not defined, and neither is the interval."""
    found = by_document(np.zeros((0, 2)), np.zeros(0, int), lambda sums: ratio(sums[:, 0], sums[:, 1]))
    assert np.isnan(found.value) and np.isnan(found.low)
