"""Do several annotators say the same? Chance-corrected agreement on nominal labels, with intervals by item (A73).

`ratings` is i64[unit, annotator]: a category from 0, or -1 where there is no rating. All figures are 1 when everybody
agrees and about 0 when ratings are independent; each is NaN where it is not defined (nobody ever used two categories).

    cohen         Cohen 1960: two annotators, chance from each one's own habits
    fleiss        Fleiss 1971: chance from the habits of all together; any number of ratings a unit
    gwet          AC1, Gwet 2008: stays sensible where one category is rare
    krippendorff  alpha, nominal, Krippendorff 2011: corrected for small samples; any number of ratings a unit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mnemoscope.intervals import Estimate

RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """Agreement of some annotators on some units; intervals resample the items that the units belong to.

    units  that at least two have rated
    same   share of pairs of ratings of a unit that are equal
    cohen  not defined for more than two annotators
    """

    units: int
    annotators: int
    same: Estimate
    cohen: Estimate
    fleiss: Estimate
    gwet: Estimate
    krippendorff: Estimate


def same(ratings: np.ndarray, categories: int) -> float:
    """The mean over units of the share of pairs of ratings that are equal."""
    return _observed(_counts(ratings, categories))


def cohen(ratings: np.ndarray, categories: int) -> float:
    """Cohen's kappa of two annotators, over the units that both have rated; NaN for any other number of them."""
    if ratings.shape[1] != 2:
        return np.nan
    both = ratings[(ratings >= 0).all(axis=1)]
    table = np.zeros((categories, categories))
    np.add.at(table, (both[:, 0], both[:, 1]), 1)
    share = table / max(table.sum(), 1)
    return _corrected(float(np.trace(share)) if len(both) else np.nan, float(share.sum(0) @ share.sum(1)))


def fleiss(ratings: np.ndarray, categories: int) -> float:
    """Fleiss' kappa; with missing ratings, as Gwet (2014) extends it."""
    counts = _counts(ratings, categories)
    usual = _usual(counts)
    return _corrected(_observed(counts), float(usual @ usual))


def gwet(ratings: np.ndarray, categories: int) -> float:
    """Gwet's AC1."""
    counts = _counts(ratings, categories)
    usual = _usual(counts)
    return _corrected(_observed(counts), float(usual @ (1 - usual)) / max(categories - 1, 1))


def krippendorff(ratings: np.ndarray, categories: int) -> float:
    """Krippendorff's alpha with the nominal difference; units with fewer than two ratings say nothing."""
    counts = _counts(ratings, categories)
    counts = counts[counts.sum(1) >= 2]
    total = counts.sum()
    if not total:
        return np.nan
    raters = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1) / (raters - 1)
    values = counts.sum(0)
    chance = (values * (values - 1)).sum() / (total * (total - 1))
    return _corrected(float(agreeing.sum() / total), float(chance))


def agreement(
    ratings: np.ndarray, categories: int, items: np.ndarray, *, samples: int = RESAMPLES, seed: int = 0
) -> Agreement:
    """Compute every figure with its interval.

    items  i64[unit]: units of one item are resampled together, since they share what was thought of the item
    """
    kinds, item_of = np.unique(items, return_inverse=True)
    units = [np.flatnonzero(item_of == kind) for kind in range(len(kinds))]
    random = np.random.default_rng(seed)
    draws = [ratings]
    for _ in range(samples if len(kinds) else 0):
        drawn = random.integers(0, len(kinds), len(kinds))
        draws.append(ratings[np.concatenate([units[kind] for kind in drawn])])

    def estimate(figure: Callable[[np.ndarray, int], float]) -> Estimate:
        return Estimate.of(np.array([figure(draw, categories) for draw in draws]))

    several = (ratings >= 0).sum(1) >= 2
    equal = Estimate.of(
        np.array([same(draw, categories) for draw in draws]), len(np.unique(item_of[several]))
    )
    return Agreement(
        int(several.sum()),
        ratings.shape[1],
        equal,
        *(estimate(figure) for figure in (cohen, fleiss, gwet, krippendorff)),
    )


def _counts(ratings: np.ndarray, categories: int) -> np.ndarray:
    """f64[unit, category]: how many annotators chose each category."""
    return np.stack([(ratings == category).sum(1) for category in range(categories)], axis=1).astype(float)


def _observed(counts: np.ndarray) -> float:
    raters = counts.sum(1)
    counts, raters = counts[raters >= 2], raters[raters >= 2]
    if not len(counts):
        return np.nan
    return float(((counts * (counts - 1)).sum(1) / (raters * (raters - 1))).mean())


def _usual(counts: np.ndarray) -> np.ndarray:
    """f64[category]: the mean over units of the share of ratings that chose it."""
    rated = counts[counts.sum(1) > 0]
    return np.asarray((rated / rated.sum(1, keepdims=True)).sum(0) / max(len(rated), 1))


def _corrected(observed: float, chance: float) -> float:
    return (observed - chance) / (1 - chance) if chance < 1 else np.nan
