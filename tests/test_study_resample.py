"""Intervals: resampled by document against loops, Wilson's against known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mnemoscope.annotation import agreement, scores
from mnemoscope.intervals import (
    LEAST,
    Estimate,
    Interval,
    by_document,
    chance_of_zero,
    discoveries,
    groups_of,
    jackknifed,
    jackknifed_chance,
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
    values, documents = generator.normal(size=(600, 2)), generator.permutation(np.arange(600) % 120)
    values[3, 0] = np.nan
    found = mean_by_document(values, documents, n=30, seed=5)
    means = loop(values, documents, np.random.default_rng(5), 30)
    assert found.value == pytest.approx(np.nanmean(values, 0))
    assert found.low == pytest.approx(np.quantile(means, 0.025, axis=0))
    assert found.high == pytest.approx(np.quantile(means, 0.975, axis=0))
    assert found.n is not None and found.n.tolist() == [120, 120]


def loop(values: np.ndarray, documents: np.ndarray, generator: np.random.Generator, times: int) -> np.ndarray:
    """Means of the examples of drawn documents, one resample at a time."""
    count = len(np.unique(documents))
    draws = generator.multinomial(count, np.full(count, 1 / count), times)
    return np.array([
        np.nanmean(np.concatenate([np.repeat(values[documents == d], often, 0) for d, often in enumerate(one)]), 0)
        for one in draws
    ])  # fmt: skip


def slow_bca(value: float, drawn: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """Efron's interval written out for one figure, with Student's reach and the unbiased skewness."""
    count = len(without)
    share = (np.sum(drawn < value - 1e-12) + np.sum(np.abs(drawn - value) <= 1e-12) / 2) / len(drawn)
    bias = stats.norm.ppf(min(max(share, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    skewness = stats.skew(without.mean() - without, bias=False) / (6 * np.sqrt(count))
    reach = np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1)
    levels = [
        stats.norm.cdf(bias + (bias + sign * reach) / (1 - skewness * (bias + sign * reach)))
        for sign in (-1, 1)
    ]
    low, high = np.quantile(drawn, levels, method="weibull")
    return float(low), float(high)


@pytest.mark.parametrize("count", [20, 37, 100])
def test_intervals_of_few_documents_are_corrected(count: int) -> None:
    """From twenty to a hundred documents the ends are those of the slow definition, also where most say nothing."""
    generator = np.random.default_rng(count)
    documents = np.repeat(np.arange(count), 3)
    values = generator.lognormal(size=(3 * count, 2))
    values[:, 1] = np.round(values[:, 1] > 2)
    found = mean_by_document(values, documents, n=50, seed=2)
    drawn = loop(values, documents, np.random.default_rng(2), 100)
    without = np.array([values[documents != one].mean(0) for one in range(count)])
    for column in range(2):
        slow = slow_bca(values[:, column].mean(), drawn[:, column], without[:, column])
        assert (found.low[column], found.high[column]) == pytest.approx(slow, rel=1e-6)
    sparse = mean_by_document(np.concatenate([values[:, :1], np.full((200, 1), np.nan)]), np.append(
        documents, np.arange(200, 400)), n=50)  # fmt: skip
    assert sparse.n is not None and sparse.n[0] == count
    assert sparse.low[0] < sparse.value[0] < sparse.high[0]


@pytest.mark.slow
def test_the_interval_covers_a_skewed_mean_of_two_dozen() -> None:
    """Of lognormal samples of 24 documents at least 90 in 100 intervals hold the true mean, of normal ones 93."""
    generator = np.random.default_rng(0)
    for draw, truth, least in ((generator.lognormal, np.exp(0.5), 0.9), (generator.normal, 0.0, 0.93)):
        found = mean_by_document(draw(size=(24, 8000)), np.arange(24), n=500)
        assert ((found.low <= truth) & (truth <= found.high)).mean() >= least


def test_below_twenty_documents_there_is_no_interval() -> None:
    """The estimate and how many documents there are, and no ends; counted by those that have something to say."""
    values, documents = np.random.default_rng(0).random((300, 2)), np.arange(300)
    values[19:, 1] = np.nan
    found = share_by_document(values, documents, n=20)
    assert found.n is not None and found.n.tolist() == [300, 19]
    assert not np.isnan(found.low[0]) and np.isnan([found.low[1], found.high[1]]).all()
    assert found.value[1] == pytest.approx(values[:19, 1].mean())
    assert np.isnan(quantile_by_document(values[:19], documents[:19], (0.5,), n=5).low).all()


def test_a_peak_is_not_corrected_but_counted() -> None:
    """Where a figure moves in steps, percentiles are taken as they are, whatever the number of documents."""
    values = np.random.default_rng(0).normal([0, 3, 0], 1, (30, 3))
    found = by_document(values, np.arange(30), lambda sums: sums.argmax(-1).astype(float), corrected=False)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_leaving_out_groups_gives_an_interval_and_a_chance() -> None:
    """Of a mean, one document a group, both are those of Student's test; below twenty groups there are none."""
    values = np.random.default_rng(0).normal(0.3, 1, (40, 3))
    figures = np.stack([values.mean(0), *(np.delete(values, one, 0).mean(0) for one in range(40))])
    found, expected = jackknifed(figures), stats.ttest_1samp(values, 0)
    assert found.low == pytest.approx(expected.confidence_interval().low)
    assert jackknifed_chance(figures) == pytest.approx(expected.pvalue)
    assert found.n is not None and found.n.tolist() == [40] * 3
    few = figures[:20]
    assert np.isnan(jackknifed(few).low).all() and (jackknifed_chance(few) == 1).all()


def test_groups_of_documents_are_even() -> None:
    """Documents of one id stay together, and no group has more than one document more than another."""
    documents = np.random.default_rng(0).integers(0, 90, 1000) * 1000
    group = groups_of(documents)
    by_document = {int(one): set(group[documents == one].tolist()) for one in np.unique(documents)}
    sizes = np.bincount([places.pop() for places in by_document.values() if len(places) == 1], minlength=40)
    assert sizes.sum() == len(by_document) and sizes.max() - sizes.min() <= 1
    assert len(np.unique(groups_of(np.arange(7)))) == 7


def test_a_family_is_corrected_together() -> None:
    """Benjamini and Hochberg: as scipy adjusts p; nothing of an empty family."""
    p = np.random.default_rng(0).random(40) ** 3
    assert discoveries(p).tolist() == (stats.false_discovery_control(p) <= 0.05).tolist()
    assert discoveries(np.zeros(0)).shape == (0,)


def test_no_difference_is_rarely_called_one() -> None:
    """Of two figures that are alike p is below .05 about once in twenty; of unlike ones it is small."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 400))
    p = chance_of_zero(values, np.arange(60), lambda sums: sums)
    assert 0.02 <= (p < 0.05).mean() <= 0.09
    assert chance_of_zero(values + 1, np.arange(60), lambda sums: sums).max() < 0.002
    assert (chance_of_zero(values[:19], np.arange(19), lambda sums: sums) == 1).all()


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_groups_are_means_of_their_examples(size: int, groups: int, seed: int) -> None:
    """Each group's estimate is its mean, inside its interval; a group without examples has none."""
    generator = np.random.default_rng(seed)
    values, group = generator.random(size), generator.integers(0, groups, size)
    found = mean_by_group(values, group, groups, generator.integers(0, 6, size), n=50)
    wide = mean_by_group(np.repeat(values, 25), np.repeat(group, 25), groups, np.arange(25 * size), n=50)
    for one in range(groups):
        if (group == one).any():
            assert found.value[one] == pytest.approx(values[group == one].mean())
            assert found.n is not None and found.n[one] < LEAST and np.isnan(found.low[one])
            assert wide.low[one] <= values[group == one].mean() + 1e-9 and wide.low[one] <= wide.high[one]
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
    found = quantile_by_document(values, np.arange(41) % 29, (0.25, 0.5))
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


@pytest.mark.slow
@given(count=WITNESSES, value=st.sampled_from([0.0, 1.0]))
def test_no_interval_of_a_share_is_a_point(count: int, value: float) -> None:
    """However a share is resampled, 0 of n (or n of n) leaves open what n witnesses cannot exclude, and no less."""
    hits, documents = np.full(2 * count, value), np.repeat(np.arange(count), 2)
    least = 1 - float(unanimous(count))
    found = {
        "by document": share_by_document(hits, documents, n=20),
        "by group": share_by_group(hits, np.zeros(2 * count, int), 1, documents, n=20).at(0),
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
        if count < LEAST and name in ("by document", "by group", "of sums"):
            assert (
                np.isnan(open_) and isinstance(one, Interval) and one.n is not None and one.n == count
            )  # too few: none at all
        else:
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
