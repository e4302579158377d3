"""Intervals: resampled by document against loops, Wilson's against known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mnemoscope.annotation import agreement, scores
from mnemoscope.intervals import (
    Estimate,
    Interval,
    by_document,
    mean_by_document,
    mean_by_group,
    of_share,
    per_document,
    quantile_by_document,
    ratio,
    share_by_document,
    share_by_group,
    share_of_sums,
    unanimous,
    wilson,
)
from mnemoscope.neuron import twoway


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


WITNESSES = st.integers(1, 60)


@given(WITNESSES)
def test_ends_of_unanimous_witnesses_are_clopper_and_pearson(count: int) -> None:
    """All of n witnesses exclude what the exact binomial interval excludes."""
    exact = stats.binomtest(count, count).proportion_ci(0.95, "exact")
    assert float(unanimous(count)) == pytest.approx(exact.low)
    assert (
        float(wilson(np.array(0), np.array(count)).low),
        float(wilson(np.array(count), np.array(count)).high),
    ) == (
        pytest.approx(0, abs=1e-12),
        pytest.approx(1),
    )


@given(count=WITNESSES, value=st.sampled_from([0.0, 1.0]))
def test_no_interval_of_a_share_is_a_point(count: int, value: float) -> None:
    """However a share is resampled, 0 of n (or n of n) leaves open what n witnesses cannot exclude, and no less."""
    hits, documents = np.full(2 * count, value), np.repeat(np.arange(count), 2)
    least = 1 - float(unanimous(count))
    found = {
        "by document": share_by_document(hits, documents, n=20),
        "by group": Interval(
            *(end[0] for end in share_by_group(hits, np.zeros(2 * count, int), 1, documents, n=20))
        ),
        "of sums": share_of_sums(hits * 3, np.full(2 * count, 3.0), documents, n=20),
        "estimate": Estimate.of(np.full(21, value), count),
        "agreement": agreement.agreement(
            np.array([[0, 1 - int(value)], [1, int(value)]] * count), 2, documents, samples=20
        ).same,
    }
    rates = scores._items([bool(value)] * 2 * count, np.ones((21, 2 * count)), np.arange(2 * count) % 2 == 0)
    found |= {"hits": rates.hit_rate, "false alarms": rates.false_alarm_rate}
    both = twoway.resampled(
        np.full((1, count), 2),
        np.full((1, count), int(2 * value)),
        np.full((1, count), 2),
        twoway.document_weights(count, 20),
    )
    for side in ("precision", "recall"):
        found[side] = Interval(np.array(value), both[side].low[0], both[side].high[0])
    for name, one in found.items():
        open_ = float(one.high) if value == 0 else 1 - float(one.low)
        assert float(one.value) == value, name
        assert open_ == pytest.approx(least), name


def test_a_corrected_share_is_no_surer_than_its_rates() -> None:
    """Eight of eight hits and no false alarm in eight: d' and the corrected share have a width too."""
    found = scores._items([True] * 8 + [False] * 8, np.ones((11, 16)), np.arange(16) >= 8)
    for one in (found.d_prime, found.corrected):
        assert one.low is not None and one.high is not None and one.value is not None
        assert one.low < one.value <= one.high
    assert found.corrected.low == pytest.approx((0.6306 - 0.3694) / (1 - 0.3694), abs=1e-3)


def test_a_share_between_keeps_its_interval() -> None:
    """Only unanimous shares are given exact ends."""
    found = Interval(np.array([0.5, 0.0]), np.array([0.4, 0.0]), np.array([0.6, 0.0]))
    assert of_share(found, 8).low.tolist() == [0.4, 0.0] and of_share(found, 8).high[0] == 0.6


def test_nothing_to_resample_is_not_an_error() -> None:
    """No examples: the estimate is not defined, and neither is the interval."""
    found = by_document(np.zeros((0, 2)), np.zeros(0, int), lambda sums: ratio(sums[:, 0], sums[:, 1]))
    assert np.isnan(found.value) and np.isnan(found.low)
