"""The search on planted truth: it finds what is there, believes nothing that is not, and each protection is needed."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext
from math import comb
from time import process_time
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from planted_patterns import NULLS, all_rows, fire, null, small_text, triggers, words
from scipy.stats import false_discovery_control, hypergeom, kstest

from mnemoscope.errors import PatternError
from mnemoscope.patterns import score
from mnemoscope.patterns import search as search_module
from mnemoscope.patterns.combine import word_unions
from mnemoscope.patterns.language import Limits, masks
from mnemoscope.patterns.score import log_binomial_tail, poisson_binomial_tail
from mnemoscope.patterns.search import SearchResult, search
from mnemoscope.patterns.space import NARROW, Space, frequency_bin, strata
from mnemoscope.patterns.topics import k_means, log_odds
from mnemoscope.patterns.triggers import Options, Units, halves
from mnemoscope.run.text import Text
from mnemoscope.trials.heldout import beyond_last_token, confirm

EACH = 60
QUICK = Options(tests=("main",), draws=300)
WORDS = words()
PLANTED = {
    "word": f"word:{WORDS[205]}",
    "affix": "suffix:tion",
    "window": f"word:{WORDS[230]}@16",
    "year": "year",
    "bigram": f'tokens:[" {WORDS[180]}"," {WORDS[181]}"]',
    "any of four": f"words:{','.join(WORDS[i] for i in (206, 215, 222, 230))}",
    "conjunction": f'all:["suffix:ing","word:{WORDS[210]}@all"]',
}


class Planting(NamedTuple):
    """Units with their labels, the search of them, and the claims that come first, confirmed."""

    text: Text
    topic: np.ndarray
    units: Units
    labels: list[str]
    found: SearchResult
    first: pl.DataFrame


@pytest.fixture(scope="module")
def planting() -> Planting:
    """Null units of each kind, planted units of each kind with precision and recall of .8 and of 1, two topics, and
    a unit with two meanings."""
    text, topic = small_text(400)
    random = np.random.default_rng(2)
    rows, labels = [], []
    for kind in NULLS:
        rows += [triggers(text, null(text, kind, random)) for _ in range(EACH)]
        labels += [kind] * EACH
    truth = masks(text, list(PLANTED.values())).toarray().T
    for (kind, _), mask in zip(PLANTED.items(), truth, strict=True):
        rows += [triggers(text, fire(text, mask, level, level, random)) for level in (0.8, 1.0)]
        labels += [kind] * 2
    for number in range(2):
        about = (topic[text.document] == number) & (text.position > 15)
        rows.append(triggers(text, fire(text, about, 1.0, 0.8, random)))
        labels.append(f"topic {number}")
    two = masks(text, [PLANTED["word"], f"word:{WORDS[216]}"]).toarray().T
    rows.append(triggers(text, fire(text, two[0] | two[1], 1.0, 1.0, random)))
    labels.append("two meanings")
    units = Units.of(rows)
    found = search(text, units, replace(QUICK, tests=("main", "next")))
    first = found.candidates.filter((pl.col("tests") == "main") & (pl.col("rank") == 0))
    first = confirm(text, units, first, QUICK)
    return Planting(text, topic, units, labels, found, first)


def family_wise(found: SearchResult, units: int) -> np.ndarray:
    """f64[unit]: p_family of the best pattern; 1 where nothing is shared."""
    best = found.candidates.filter((pl.col("tests") == "main") & (pl.col("rank") == 0))
    out = np.ones(units)
    out[best["unit"].to_numpy()] = best["p_family"].to_numpy()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", NULLS)
def test_the_family_wise_p_value_is_uniform_on_every_null(planting: Planting, kind: str) -> None:
    """Kolmogorov and Smirnov find no departure from uniformity, and about one null in twenty is below .05."""
    here = np.flatnonzero(np.array(planting.labels) == kind)
    p = family_wise(planting.found, len(planting.units))[here]
    assert kstest(p, "uniform").pvalue > 0.01
    assert (p < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / EACH)


@pytest.mark.slow
def test_false_discoveries_are_few(planting: Planting) -> None:
    """Discovered on one half, tested once on the other, corrected by Benjamini and Hochberg: nulls hardly pass."""
    passed = false_discovery_control(planting.first["p_test"].to_numpy()) < 0.05
    null_units = np.isin(np.array(planting.labels)[planting.first["unit"].to_numpy()], NULLS)
    assert (passed & null_units).sum() <= 1 and passed[~null_units].mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_what_was_planted_is_found(planting: Planting, kind: str) -> None:
    """The first candidate of a planted unit has the mask that was planted, or nearly, and is significant. Where strata
    are narrow, triggers alone are too few for the price of four words: the union is a further candidate then."""
    truth = masks(planting.text, [PLANTED[kind]]).toarray()[:, 0]
    for unit in np.flatnonzero(np.array(planting.labels) == kind):
        (row,) = planting.first.filter(pl.col("unit") == unit).iter_rows(named=True)
        further = planting.found.candidates.filter(unit=int(unit), tests="main")["spec"].to_list()
        specs = further if kind == "any of four" else [row["spec"]]
        shown = masks(planting.text, specs).toarray().T
        assert row["p_family"] < 1e-3 and row["p_test"] < 1e-3
        assert max((mask & truth).sum() / (mask | truth).sum() for mask in shown) > 0.5, row["name"]


@pytest.mark.slow
def test_topics_are_found_as_topics(planting: Planting) -> None:
    """A unit that fires in documents of one topic is described by a class or topic of that topic's words."""
    for number in range(2):
        unit = planting.labels.index(f"topic {number}")
        (row,) = planting.first.filter(pl.col("unit") == unit).iter_rows(named=True)
        own = {WORDS[i] for i in range(30 * number, 30 * number + 30)}
        listed = set(row["spec"].split("@")[0].split(":")[-1].split(","))
        assert row["kind"] == "semantic" and len(listed & own) > 0.8 * len(listed)


@pytest.mark.slow
def test_a_unit_with_several_meanings_gets_them_one_after_another(planting: Planting) -> None:
    """Sequential covering names both patterns, each on the triggers that the other leaves."""
    unit = planting.labels.index("two meanings")
    rows = planting.found.candidates.filter((pl.col("unit") == unit) & (pl.col("tests") == "main"))
    text = " ".join(rows.filter(pl.col("p_family") < 0.01)["spec"])
    assert rows["role"].to_list()[0] == "best" and "meaning" in rows["role"].to_list()
    assert WORDS[205] in text and WORDS[216] in text


@pytest.mark.slow
def test_the_next_token_is_never_in_the_same_p_value(planting: Planting) -> None:
    """Families of tests have candidates, ranks and nulls of their own."""
    rows = planting.found.candidates
    is_next = rows["family"].is_in(["next", "nextword", "nextclass"])
    assert (is_next == (rows["tests"] == "next")).all() and is_next.any()
    assert set(planting.found.calibration["tests"]) == {"main", "next"}
    assert (planting.found.calibration["effective_tests"] > 1).all()


@pytest.mark.slow
def test_semantic_is_what_goes_beyond_the_last_token(planting: Planting) -> None:
    """N2 rejects for a unit that wants a topic before a token, and not for one that wants the token."""
    text, random = planting.text, np.random.default_rng(4)
    token = masks(text, [f'tokens:[" {WORDS[180]}"]']).toarray()[:, 0]
    about = masks(text, [f"words:{','.join(WORDS[:30])}@all"]).toarray()[:, 0]
    units = Units.of([triggers(text, fire(text, mask, 1.0, 1.0, random)) for mask in (token & about, token)])
    spec = f"words:{','.join(WORDS[:30])}@all"
    claims = pl.DataFrame({"unit": [0, 1, 1], "spec": [spec, spec, f'tokens:[" {WORDS[180]}"]']})
    for test in (True, False):
        found = beyond_last_token(text, units, claims, QUICK, test=test)
        assert found["p_n2"][0] < 1e-4 and found["p_n2"][1] > 0.01 and found["p_n2"][2] > 0.01
        assert (found["n_n2"] > 5).all()


# Traps: each protection, switched off, lets through what it should stop.


@pytest.mark.slow
def test_one_trigger_per_document_is_needed(planting: Planting) -> None:
    """Several triggers of a document share its words: without the protection, nulls that know nothing but
    documents are all significant; with it, about one in twenty."""
    random = np.random.default_rng(8)
    units = Units.of([all_rows(planting.text, null(planting.text, "document", random)) for _ in range(30)])
    off = search(planting.text, units, replace(QUICK, one_per_document=False))
    assert (family_wise(off, 30)[off.group["main"] >= 0] < 0.05).mean() > 0.9
    on = search(planting.text, units, QUICK)
    assert (family_wise(on, 30) < 0.05).mean() < 0.25


@pytest.mark.slow
def test_strata_of_position_and_frequency_are_needed(planting: Planting) -> None:
    """Units that know only positions are significant overall, and not at their positions."""
    random, text = np.random.default_rng(9), planting.text
    noise = [random.normal(size=len(text)) for _ in range(30)]
    rows = [triggers(text, values - 4.0 * np.abs(text.position - 1)) for values in noise]
    on, off = (search(text, Units.of(rows), replace(QUICK, stratify=on)) for on in (True, False))
    assert (family_wise(off, 30) < 0.05).mean() > 0.5
    assert (family_wise(on, 30) < 0.05).mean() < 0.25


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=400), st.integers(1, 9))
def test_bins_of_frequency(counts: list[int], types: int) -> None:
    """Neighbouring ranks: ascending with frequency, equally frequent tokens together, no bin of too few tokens (if
    there are enough), none wider than it may be unless it would have too few."""
    frequency = np.array(counts)
    bins = frequency_bin(np.arange(len(counts)), frequency, types)
    often = np.maximum(frequency, 1)
    order = np.argsort(often, kind="stable")
    steps = np.diff(bins[order])
    assert (
        bins.min() == 0
        and ((steps == 0) | (steps == 1)).all()
        and not steps[np.diff(often[order]) == 0].any()
    )
    sizes = np.bincount(bins)
    assert sizes.min() >= min(types, len(counts))
    for number in range(1, bins.max() + 1):  # the rarest bin also holds what is left over
        inside = np.sort(often[bins == number])[::-1]
        wide = inside < inside[0] * np.exp(-NARROW)
        assert not wide.any() or (inside > inside[-1]).sum() < types


def test_frequency_is_that_of_the_whole_text() -> None:
    """A part has the strata of the whole text: the few tokens that are read say little of how common any is."""
    text, _ = small_text(60)
    part, rows = text.part(np.arange(20))
    assert (part.frequency == text.frequency).all() and (
        part.part(np.arange(5))[0].frequency == text.frequency
    ).all()
    of_part, margins = strata(part, np.arange(len(part)), True)
    of_whole, others = strata(text, np.arange(len(text)), True)
    assert (margins[of_part] == others[of_whole[rows]]).all()


@pytest.mark.slow
def test_the_split_is_needed(planting: Planting) -> None:
    """Tested again on the triggers that chose it, the best pattern of any null looks certain; on others it does not."""
    nulls = [unit for unit, label in enumerate(planting.labels) if label == "independent"]
    first = planting.first.filter(pl.col("unit").is_in(nulls))
    again = confirm(
        planting.text,
        planting.units,
        first.drop(pl.selectors.ends_with("_test")),
        replace(QUICK, split=False),
    )
    assert (again["p_test"] < 0.05).mean() > 0.7
    assert (first["p_test"] < 0.05).mean() < 0.15


@pytest.mark.slow
def test_the_best_of_many_has_to_be_corrected(planting: Planting) -> None:
    """Nearly all sets that share nothing have some pattern in three with a small p-value of its own; one in
    twenty has one that is small for the best of the whole language."""
    nulls = [unit for unit, label in enumerate(planting.labels) if label in NULLS]
    best = planting.found.candidates.filter(
        (pl.col("tests") == "main") & (pl.col("rank") == 0) & pl.col("unit").is_in(nulls)
    )
    assert (best["hits"] >= 3).all() and (best["p"] < 0.05).sum() > 0.9 * len(nulls)
    assert (best["p_family"] < 0.05).sum() < 0.1 * len(nulls)


@pytest.mark.slow
def test_coarse_patterns_are_left_to_the_whole_distribution(planting: Planting) -> None:
    """25 of 25 at a base rate of .5 cannot be certified among 1e5 patterns of 1e6 units, so no such column exists."""
    assert log_binomial_tail(np.array(25), np.array(25), np.array(0.5)) > np.log(0.05 / 1e11)
    space = Space.of(planting.text.part(np.arange(60))[0], "main")
    assert space.rate.max() <= Options().limits.most and space.rate.min() > 0
    assert len(set(space.specs)) == len(space.specs) < sum(map(len, space.names))
    everything = Space.of(planting.text.part(np.arange(60))[0], "main", limits=Limits(most=1.0))
    assert everything.rate.max() > 0.5


def test_unions_are_of_words_that_triggers_end_with() -> None:
    """Of a unit that answers to three words, one of them in two triggers only, the union holds all three, the one
    before it two, the first the commonest; hits and rates are those of the parts; a stray word is in none."""
    text, _ = small_text(120)
    space = Space.of(text, "main")
    column, count = np.unique(space.last_word[space.last_word >= 0], return_counts=True)
    a, b, c, stray = (int(one) for one in column[(count > 8) & (count < 40)][:4])
    some = [
        np.flatnonzero(space.last_word == one)[:size] for one, size in ((a, 6), (b, 4), (c, 2), (stray, 1))
    ]
    slots = np.concatenate(some)[None]
    found = word_unions(space, slots, 5.0)
    assert [here.tolist() for here, _ in found] == [[0], [0], [0]]
    parts = [set(choice.columns[0][choice.columns[0] >= 0].tolist()) for _, choice in found]
    assert parts == [{a}, {a, b, c}, {a, b}]
    assert [int(np.bitwise_count(choice.bits[0])) for _, choice in found] == [6, 12, 10]
    for (_, choice), columns in zip(found, parts, strict=True):
        rates = space.rates[space.stratum[slots[0]]][:, sorted(columns)].sum(1).mean()
        assert choice.base[0] == pytest.approx(rates, rel=1e-5)
        assert choice.score[0] == pytest.approx(choice.log_p[0] + 5.0 * (len(columns) - 1))
    assert not any(len(here) for here, _ in word_unions(space, some[3][None], 5.0))


@pytest.mark.parametrize("block", [7, 16_384])
def test_the_base_rate_is_a_mean_over_triggers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shares of prefixes that have the pattern, each in the stratum of the trigger, for any block."""
    monkeypatch.setattr(score, "BLOCK", block)
    space = Space.of(small_text(60)[0], "main")
    random = np.random.default_rng(3)
    slots = random.integers(0, len(space.rows), (6, 5))
    slots[random.random(slots.shape) < 0.3] = -1
    slots[:, 0] = np.arange(6)
    owner = np.repeat(np.arange(6), 10)
    column = random.integers(0, len(space.specs), len(owner))
    slow = []
    for one, pattern in zip(owner, column, strict=True):
        has = space.columns[:, [pattern]].toarray()[:, 0]
        slow.append(np.mean([has[space.stratum == space.stratum[p]].mean() for p in slots[one] if p >= 0]))
    assert score.base_of(space, slots, owner, column) == pytest.approx(np.array(slow), rel=1e-5)
    assert len(set(space.stratum[slots[slots >= 0]])) > 1 and max(slow) > 0


def test_a_text_too_small_to_split_is_refused() -> None:
    """The message counts the documents of both halves and says what to do."""
    text, _ = small_text(10)
    with pytest.raises(PatternError, match="build the run on more documents"):
        search(text, Units.of([np.array([1, 2, 3])]), QUICK)
    found, other = halves(np.arange(1000))
    assert 400 < len(found) < 600 and len(found) + len(other) == 1000


def test_the_same_search_gives_the_same_answer_and_few_triggers_none() -> None:
    """Nothing depends on anything but the text, the triggers and the seed; a unit with two triggers has no candidate,
    a small background still finds what is there."""
    text, _ = small_text(120)
    mask = masks(text, ["year"]).toarray()[:, 0]
    rows = [
        triggers(text, fire(text, mask, 1.0, 1.0, np.random.default_rng(3))),
        np.array([1, 2]),
        np.zeros(0, int),
    ]
    options = replace(QUICK, draws=100)
    one, two = (search(text, Units.of(rows), options) for _ in range(2))
    assert one.candidates.equals(two.candidates) and one.calibration.equals(two.calibration)
    assert set(one.candidates["unit"]) == {0} and one.group["main"].tolist() == [0, -1, -1]
    small = search(text, Units.of(rows), replace(options, background=2500))
    assert small.candidates["spec"][0] == one.candidates["spec"][0] == "year"


@given(st.integers(0, 64), st.integers(0, 64), st.floats(1e-6, 0.99))
def test_binomial_tails_are_the_sum_in_sixty_digits(hits: int, trials: int, rate: float) -> None:
    """The logarithm of the tail equals the sum of its terms in long decimals, far out too."""
    hits = min(hits, trials)
    ours = float(log_binomial_tail(np.array(hits), np.array(trials), np.array(rate)))
    with localcontext(prec=60):
        p = Decimal(rate)
        terms = (comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(hits, trials + 1))
        exact = float(sum(terms, Decimal(0)).ln())
    assert ours == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_tails_do_not_cost_a_call_each() -> None:
    """A hundred thousand tails in a twentieth of the time that as many calls of scipy's hypergeometric take."""
    random = np.random.default_rng(0)
    hits, rate = random.integers(3, 25, 100_000), random.uniform(1e-5, 0.3, 100_000)
    begin = process_time()
    log_binomial_tail(hits, np.full(len(hits), 25), rate)
    together = process_time() - begin
    begin = process_time()
    for hit, share in zip(hits[:100].tolist(), rate[:100].tolist(), strict=True):
        hypergeom.logsf(hit - 1, 10**6, int(share * 10**6), 25)
    assert together < (process_time() - begin) * 1000 / 20


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 6))
@tries(40)
def test_poisson_binomial_tails_are_the_sum_over_all_outcomes(rates: list[float], hits: int) -> None:
    """For a few coins every outcome can be written down."""
    total = 0.0
    for outcome in range(2 ** len(rates)):
        heads = [outcome >> i & 1 for i in range(len(rates))]
        if sum(heads) >= hits:
            total += np.prod([rate if head else 1 - rate for rate, head in zip(rates, heads, strict=True)])
    assert poisson_binomial_tail(np.array([hits]), np.array([rates]))[0] == pytest.approx(total, abs=1e-12)


@given(st.integers(0, 10**6))
@tries(20)
def test_clusters_are_settled(seed: int) -> None:
    """Every point belongs to the nearest centre, and every centre is the mean of its points."""
    points = np.random.default_rng(seed).normal(size=(60, 3))
    centres, nearest = k_means(points, 3, seed, rounds=200)
    distance = ((points[:, None] - centres[None]) ** 2).sum(-1)
    assert (nearest == distance.argmin(1)).all()
    for cluster in np.unique(nearest):
        np.testing.assert_allclose(centres[cluster], points[nearest == cluster].mean(0), atol=1e-9)


def test_separated_clusters_are_found() -> None:
    """Well separated points are clustered as they were drawn, but for a few unlucky beginnings."""
    found = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 3, 60)
        points = 20 * np.eye(3)[truth] + random.normal(size=(60, 3))
        _, nearest = k_means(points, 3, seed)
        found += len(set(zip(truth.tolist(), nearest.tolist(), strict=True))) == 3
    assert found >= 95


@given(st.integers(0, 10**6))
@tries(20)
def test_log_odds(seed: int) -> None:
    """A word of one group has the largest log-odds there."""
    random = np.random.default_rng(seed)
    counts = random.poisson(5, (3, 8)).astype(float)
    counts[1, 4] += 60
    assert log_odds(counts)[:, 4].argmax() == 1 and log_odds(counts)[1].argmax() == 4


def test_threads_and_chunks_change_nothing(planting: Planting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set is searched by itself, whatever is searched beside it and by how many threads."""
    monkeypatch.setattr(search_module, "CHUNK", 37)
    again = search(planting.text, planting.units, replace(QUICK, threads=3))
    alone = search(planting.text, planting.units, QUICK)
    assert again.candidates.equals(alone.candidates) and again.calibration.equals(alone.calibration)
    monkeypatch.undo()
    whole = search(planting.text, planting.units, QUICK)
    assert again.candidates.equals(whole.candidates) and again.language == whole.language
