"""Agreement statistics: published worked examples, and what every such figure has to obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mnemoscope.annotation.agreement import agreement, cohen, fleiss, gwet, krippendorff, same

FIGURES = {"cohen": cohen, "fleiss": fleiss, "gwet": gwet, "krippendorff": krippendorff}


def from_table(table: list[list[int]]) -> np.ndarray:
    """Ratings of two annotators from how often they chose each pair of categories."""
    return np.array(
        [(a, b) for a, row in enumerate(table) for b, count in enumerate(row) for _ in range(count)]
    )


def from_counts(counts: list[list[int]]) -> np.ndarray:
    """Ratings, in any order of annotators, from how many chose each category."""
    return np.array([np.repeat(np.arange(len(row)), row) for row in counts])


# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, example C: 4 observers, 12 units, 5 values.
OBSERVERS = (
    np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
            [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
        ]
    ).T
    - 1
)

# Fleiss (1971), Table 1: 30 patients, 6 psychiatrists, 5 diagnoses.
PATIENTS = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""

# The worked example of Fleiss' kappa on Wikipedia: 10 subjects, 14 raters, 5 categories.
SUBJECTS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_cohens_kappa_of_the_textbook() -> None:
    """Fleiss, Levin and Paik (2003), Table 18.1: 100 subjects, three diagnoses, kappa .68 (.676)."""
    assert cohen(from_table([[75, 1, 4], [5, 4, 1], [0, 0, 10]]), 3) == pytest.approx(0.676, abs=5e-4)
    assert cohen(from_table([[20, 5], [10, 15]]), 2) == pytest.approx(0.4)


def test_fleiss_kappa_of_the_paper() -> None:
    """Fleiss (1971): kappa .430; and the example of the encyclopedia, .210."""
    patients = from_counts([[int(count) for count in row] for row in PATIENTS.split()])
    assert patients.shape == (30, 6)
    assert fleiss(patients, 5) == pytest.approx(0.4302445, abs=5e-7)
    assert fleiss(from_counts(SUBJECTS), 5) == pytest.approx(0.210, abs=5e-4)


def test_ac1_where_kappa_breaks_down() -> None:
    """Gwet (2008): 118, 5, 2 and 0 of 125: observed .944, kappa about 0 (-.023), AC1 .941."""
    ratings = from_table([[118, 5], [2, 0]])
    assert same(ratings, 2) == pytest.approx(0.944)
    assert cohen(ratings, 2) == pytest.approx(-0.0234, abs=5e-4)
    assert gwet(ratings, 2) == pytest.approx(0.941, abs=5e-4)


def test_missing_ratings_as_published() -> None:
    """Krippendorff (2011), example C: alpha .743; Gwet (2014) for the same ratings: AC1 .775, Fleiss' kappa .761."""
    assert krippendorff(OBSERVERS, 5) == pytest.approx(0.743, abs=5e-4)
    assert gwet(OBSERVERS, 5) == pytest.approx(0.77544, abs=5e-6)
    assert fleiss(OBSERVERS, 5) == pytest.approx(0.76117, abs=5e-6)
    assert same(OBSERVERS, 5) == pytest.approx(0.81818, abs=5e-6)


def test_alpha_of_two_observers() -> None:
    """Krippendorff (2011), example A: binary data of two observers, alpha .095."""
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff(np.array([first, second]).T, 2) == pytest.approx(0.095, abs=5e-4)


RATINGS = npst.arrays(np.int64, st.tuples(st.integers(4, 25), st.integers(2, 4)), elements=st.integers(-1, 2))


@given(RATINGS, st.randoms(use_true_random=False))
def test_nobody_and_nothing_has_a_place_of_its_own(ratings: np.ndarray, random: object) -> None:
    """Annotators, units and names of categories can change places; no figure exceeds 1."""
    shuffled = ratings.copy()
    order = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    shuffled = shuffled[order.permutation(len(ratings))][:, order.permutation(ratings.shape[1])]
    renamed = np.where(shuffled < 0, -1, order.permutation(3)[np.maximum(shuffled, 0)])
    for name, figure in FIGURES.items():
        value = figure(ratings, 3)
        assert figure(renamed, 3) == pytest.approx(value, nan_ok=True), name
        assert not value > 1 + 1e-12, name


@given(
    npst.arrays(np.int64, st.integers(3, 30), elements=st.integers(0, 2)).filter(
        lambda one: len(set(one)) > 1
    )
)
def test_perfect_agreement_is_one(labels: np.ndarray) -> None:
    """Whatever the labels are, as long as there are two."""
    for figure in FIGURES.values():
        assert figure(np.stack([labels, labels], axis=1), 3) == pytest.approx(1)


@pytest.mark.parametrize("annotators", [2, 5])
def test_chance_is_about_zero(annotators: int) -> None:
    """Independent ratings agree no more than they must; AC1 is exact where categories are equally common."""
    ratings = np.random.default_rng(0).integers(0, 3, (4000, annotators))
    for name, figure in FIGURES.items():
        if (name, annotators) != ("cohen", 5):
            assert abs(figure(ratings, 3)) < 0.04, name


def test_no_figure_where_none_is_defined() -> None:
    """One category, no pair of ratings, or no unit at all: NaN, and None with an interval."""
    alone, empty = np.array([[0, -1], [-1, 1]]), np.zeros((0, 2), int)
    for figure in FIGURES.values():
        assert np.isnan(figure(alone, 2))
        assert np.isnan(figure(empty, 2))
    assert np.isnan(krippendorff(np.zeros((5, 2), int), 2))
    assert agreement(empty, 2, np.zeros(0, int), samples=5).fleiss.value is None


def test_intervals_resample_items_not_units() -> None:
    """Ten units of each item that say the same are one observation: the interval is that of the items."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, (40, 2))
    few = agreement(labels, 2, np.arange(40))
    many = agreement(np.repeat(labels, 10, axis=0), 2, np.repeat(np.arange(40), 10))
    assert many.units == 400
    assert many.fleiss.value == pytest.approx(few.fleiss.value)
    assert many.fleiss.high - many.fleiss.low == pytest.approx(few.fleiss.high - few.fleiss.low, rel=0.1)
    assert few.fleiss.low < few.fleiss.value < few.fleiss.high
