"""The two-way test against scikit-learn, scipy and brute force on the raw coefficients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from scipy.stats import beta
from sklearn import metrics

from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import HISTOGRAM_EDGES, bin_of
from mnemoscope.neuron import twoway
from mnemoscope.neuron.twoway import Curve


class Case(NamedTuple):
    m: np.ndarray
    shown: np.ndarray
    curve: Curve
    polarity: int


def _case(seed: int, tokens: int = 3000) -> Case:
    """A unit that answers, more or less, to a pattern."""
    generator = np.random.default_rng(seed)
    polarity = 1 if seed % 2 else -1
    shown = generator.random(tokens) < generator.uniform(0.005, 0.3)
    answers = shown & (generator.random(tokens) < generator.uniform(0.2, 1))
    m = generator.normal(0, 0.3, tokens) * generator.exponential(1, tokens)
    m = (polarity * (m + answers * generator.gamma(3, generator.uniform(0.1, 2), tokens))).astype(np.float32)
    counts = [np.bincount(bin_of(m[part]), minlength=BINS) for part in (shown, ~shown)]
    return Case(m, shown, Curve(*(twoway.oriented(part, polarity) for part in counts)), polarity)


@pytest.mark.parametrize("seed", range(50))
def test_every_threshold_is_scikit_learns(seed: int) -> None:
    """At every edge of the bins precision, recall, F1 and IoU of the raw coefficients, exactly."""
    case = _case(seed)
    middle = BINS // 2
    filled = np.flatnonzero(case.curve.active[middle:] > 0)[:-1][::13] + middle
    for place in filled[filled > middle]:
        active = case.m * case.polarity >= HISTOGRAM_EDGES[place]
        given_ = (case.shown, active)
        options = {"zero_division": np.nan}
        assert case.curve.precision[place] == pytest.approx(
            metrics.precision_score(*given_, **options), abs=1e-12
        )
        assert case.curve.recall[place] == pytest.approx(metrics.recall_score(*given_), abs=1e-12)
        assert case.curve.f1[place] == pytest.approx(metrics.f1_score(*given_), abs=1e-12)
        assert case.curve.iou[place] == pytest.approx(metrics.jaccard_score(*given_), abs=1e-12)


@pytest.mark.parametrize("seed", range(50))
def test_figures_without_a_threshold(seed: int) -> None:
    """Average precision and information are those of the bins exactly; the raw one is within what bins leave open.

    Within a bin the order is not known: with all hits of a bin first, and with all of them last, average
    precision is the most and the least it can be. Pearson's coefficient is of the coefficients themselves.
    """
    case = _case(seed)
    bins = bin_of(case.m * case.polarity)
    found = float(case.curve.average_precision)
    assert found == pytest.approx(metrics.average_precision_score(case.shown, bins), abs=1e-12)
    low, high = (
        metrics.average_precision_score(case.shown, bins + 0.5 * np.where(case.shown, sign, -sign))
        for sign in (-0.5, 0.5)
    )
    raw = metrics.average_precision_score(case.shown, case.m * case.polarity)
    assert low - 1e-12 <= raw <= high + 1e-12 and abs(raw - found) < 0.05
    information = metrics.mutual_info_score(case.shown, bins)
    assert case.curve.information == pytest.approx(information, abs=1e-12)
    m = case.m.astype(np.float64)
    sums = (len(m), m.sum(), (m**2).sum(), case.shown.sum(), m[case.shown].sum())
    assert twoway.pearson(*map(np.asarray, sums)) == pytest.approx(
        stats.pearsonr(m, case.shown)[0], abs=1e-10
    )


@tries(30)
@given(arrays.arrays(np.int64, (2, 3, 9), elements=st.integers(0, 20)))
def test_a_curve_of_many_is_many_curves(counts: np.ndarray) -> None:
    """Units beside each other do not touch, and every figure is a share."""
    whole = Curve(*counts)
    for name in ("precision", "recall", "f1", "iou", "average_precision", "information"):
        found = getattr(whole, name)
        alone = [getattr(Curve(counts[0, unit], counts[1, unit]), name) for unit in range(3)]
        np.testing.assert_array_equal(found, np.stack(alone))
        assert ((found >= 0) & (found <= 1 + 1e-9) | np.isnan(found)).all()
    np.testing.assert_array_equal(whole.active[..., 0], whole.tokens)


def test_both_signs() -> None:
    """Folded, a histogram of coefficients is one of magnitudes."""
    m = np.random.default_rng(0).normal(0, 2, 500)
    signed = np.bincount(bin_of(m), minlength=BINS)
    size = np.bincount(bin_of(np.abs(m)), minlength=BINS)[BINS // 2 :]
    np.testing.assert_array_equal(twoway.folded(signed), size)


def test_the_best_threshold() -> None:
    """It is the furthest beyond chance among those that enough documents reach; where none is allowed there is none."""
    present, absent = np.array([[5, 1, 4, 9]]), np.array([[90, 9, 1, 1]])
    curve = Curve(present, absent)
    found, value = twoway.choose(curve, np.array([[9, 8, 7, 6]]))
    assert (found[0], value[0]) == (2, curve.beyond_chance[0, 2])
    assert twoway.choose(curve, np.array([[9, 8, 4, 3]]))[0][0] == 1
    assert [float(part[0]) for part in twoway.choose(curve, np.array([[9, 4, 4, 3]]))] == [-1, 0]


def test_the_plainest_of_equals_is_the_claim() -> None:
    """Within the margin fewer parts win, then the larger figure, then the earlier; beyond it only the figure counts."""
    near = 0.6 - twoway.MARGIN / 2
    choose = lambda values, parts: twoway.plainest(np.array(values), np.array(parts))  # noqa: E731
    assert choose([0.6, near, 0.3], [4, 1, 1]) == 1
    assert choose([0.6, 0.6 - 2 * twoway.MARGIN, 0.3], [4, 1, 1]) == 0
    assert choose([near, 0.6, 0.6], [2, 2, 2]) == 1
    assert choose([0.0], [3]) == 0


def test_chance_is_not_beyond_chance() -> None:
    """Two common sets that have nothing to do with each other have a large F1, and nothing beyond chance."""
    counts = np.array([[400, 400]])
    curve = Curve(counts, counts)
    assert curve.f1[0, 1] == 0.5 and curve.beyond_chance[0, 1] == pytest.approx(0)


def test_intervals_are_those_of_resampled_documents() -> None:
    """The vectorised bootstrap is the slow one, document by document."""
    generator = np.random.default_rng(0)
    present = generator.poisson(3, (4, 40))
    both = generator.binomial(present, 0.6)
    active = both + generator.poisson(1, (4, 40))
    weights = twoway.document_weights(40, 200)
    assert (weights.sum(1) == 40).all()
    found = twoway.resampled(active, both, present, weights)
    for claim in range(4):
        a, b, p = (np.array([(w * part[claim]).sum() for w in weights]) for part in (active, both, present))
        slow = {"precision": b / a, "recall": b / p, "f1": 2 * b / (a + p)}
        for name, values in slow.items():
            ends = np.sort(values)[[5, 194]]
            np.testing.assert_allclose([found[name].low[claim], found[name].high[claim]], ends, rtol=1e-6)


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_hold_the_truth(clustered: bool) -> None:
    """95 % intervals hold the true precision in about 95 % of repetitions, also when documents differ from each other.

    Tokens drawn one by one would hold it far less often: the test fails without the protection.
    """
    generator = np.random.default_rng(1)
    repetitions, documents = 300, 60
    share = (
        generator.beta(2, 2, (repetitions, documents))
        if clustered
        else np.full((repetitions, documents), 0.5)
    )
    active = np.full((repetitions, documents), 20)
    both = generator.binomial(active, share)
    found = twoway.resampled(active, both, active, twoway.document_weights(documents, 400))["precision"]
    held = ((found.low <= 0.5) & (found.high >= 0.5)).mean()
    assert 0.9 <= held <= 0.99
    if clustered:
        mean = both.sum(1) / active.sum(1)
        error = np.sqrt(mean * (1 - mean) / active.sum(1))
        assert (np.abs(mean - 0.5) <= 1.96 * error).mean() < 0.8


def test_a_few_documents_do_not_make_certain() -> None:
    """All of seven, or none: each resample says the same, and still the truth may be .6, or .4. A trap: the bootstrap
    alone is as certain of seven documents as of seven hundred, and misses a precision of .9 half of the time."""
    ones, none = np.ones((1, 7), np.int64), np.zeros((1, 7), np.int64)
    weights = twoway.document_weights(7)
    found = twoway.resampled(ones, ones, ones, weights)
    for side in found.values():
        assert side.low[0] == pytest.approx(beta.ppf(0.025, 7, 1)) and side.high[0] == 1
    found = twoway.resampled(ones, none, ones, weights)
    for side in found.values():
        assert side.low[0] == 0 and side.high[0] == pytest.approx(beta.ppf(0.975, 1, 7))
    both = np.random.default_rng(2).binomial(1, 0.9, (1000, 7))
    found = twoway.resampled(np.ones_like(both), both, np.ones_like(both), weights)["precision"]
    assert ((found.low <= 0.9) & (found.high >= 0.9)).mean() > 0.95
    assert (both.mean(1) == 1).mean() > 0.4  # which the bootstrap alone calls [1, 1]


@pytest.mark.slow
def test_baselines_by_drawing() -> None:
    """The random pattern's F1 is what random patterns give, the constant's what scikit-learn gives."""
    generator = np.random.default_rng(0)
    active = np.arange(5000) < 700
    drawn = [metrics.f1_score(active, generator.permutation(5000) < 300) for _ in range(200)]
    found = twoway.random_f1(np.array(700), np.array(300), np.array(5000))
    assert found == pytest.approx(np.mean(drawn), rel=0.02)
    constant = twoway.constant_f1(np.array(700), np.array(5000))
    assert constant == pytest.approx(metrics.f1_score(active, np.ones(5000, bool)))


@pytest.mark.parametrize("labels", ["missing", "extra"])
def test_headline_figures_see_wrong_labels(labels: str) -> None:
    """Half of the pattern taken away, or as much again added to it: F1, average precision, Pearson and IoU all fall
    by a tenth or more. What they must not be replaced with does not: recall and AUC where labels are missing,
    precision where there are too many."""
    random = np.random.default_rng(0)
    truth = np.arange(20_000) < 200
    score = np.abs(random.normal(size=len(truth))) + 6 * truth
    wrong = truth & (np.arange(len(truth)) % 2 == 0) if labels == "missing" else np.arange(len(truth)) < 400
    figures = []
    for shown in (truth, wrong):
        curve = Curve(
            *(
                np.bincount(np.minimum(score[part] * 8, 96).astype(int), minlength=97)
                for part in (shown, ~shown)
            )
        )
        at = int(np.nanargmax(curve.f1)) if shown is truth else at
        r = twoway.pearson(
            *map(np.asarray, (len(score), score.sum(), (score**2).sum(), shown.sum(), score[shown].sum()))
        )
        headline = (curve.f1[at], curve.average_precision, curve.iou[at], r)
        figures.append(
            (np.array(headline), curve.precision[at], curve.recall[at], metrics.roc_auc_score(shown, score))
        )
    (right, precision, recall, area), (other, precision_wrong, recall_wrong, area_wrong) = figures
    assert (other < 0.9 * right).all()
    if labels == "missing":
        assert recall_wrong > 0.95 * recall and area_wrong > 0.95 * area
    else:
        assert precision_wrong > 0.95 * precision


@pytest.mark.parametrize(
    ("precision", "recall", "f1", "q", "verdict"),
    [
        (0.9, 0.8, 0.6, 0.01, "iff"),
        (0.9, 0.4, 0.6, 0.01, "active -> pattern"),
        (0.4, 0.9, 0.6, 0.01, "pattern -> active"),
        (0.4, 0.4, 0.6, 0.01, "neither"),
        (0.9, 0.9, 0.2, 0.01, "no pattern above the null"),
        (0.9, 0.9, 0.6, 0.06, "no pattern above the null"),
        (np.nan, np.nan, np.nan, 1.0, "no pattern above the null"),
    ],
)
def test_verdicts(precision: float, recall: float, f1: float, q: float, verdict: str) -> None:
    """Each verdict where its rule holds."""
    sides = [np.asarray(value) for value in (precision, recall, f1)]
    assert str(twoway.verdicts(sides[0], sides[1], sides[2], 0.2, q)) == verdict


@tries(100)
@given(st.data())
def test_the_threshold_against_a_slow_definition(data: st.DataObject) -> None:
    """Of the thresholds that enough documents reach, exactly enough included, the best beyond chance; the highest."""
    bins = data.draw(st.integers(2, 6))
    counts = st.lists(st.integers(0, 5), min_size=bins, max_size=bins).map(np.array)
    curve = twoway.Curve(data.draw(counts), data.draw(counts))
    reached = data.draw(st.lists(st.integers(0, 2 * twoway.LEAST_DOCUMENTS), min_size=bins, max_size=bins))
    documents = np.array(sorted(reached, reverse=True))
    place, value = twoway.choose(curve, documents)
    allowed = [at for at in range(1, bins) if documents[at] >= twoway.LEAST_DOCUMENTS]
    if not allowed:
        assert (place, value) == (-1, 0)
        return
    gains = {at: max(float(curve.beyond_chance[at]), 0.0) for at in allowed}
    best = max(gains.values())
    assert value == best and place == max(at for at, gain in gains.items() if gain == best)


def test_five_documents_are_enough() -> None:
    """A threshold that exactly `LEAST_DOCUMENTS` documents reach may be chosen; one fewer may not."""
    curve = twoway.Curve(np.array([0, 0, 9]), np.array([90, 1, 0]))
    for documents, place in ((twoway.LEAST_DOCUMENTS, 2), (twoway.LEAST_DOCUMENTS - 1, -1)):
        assert twoway.choose(curve, np.array([40, documents, documents]))[0] == place
