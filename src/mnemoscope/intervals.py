"""Intervals of shares, at 95 %: Wilson's, and what so many witnesses leave open where all of them agree.

A bootstrap never draws what was not seen: of 0 hits in 8 items every resample has 0, and its interval would be as
certain of eight items as of eight thousand. There an end of the interval is what so many witnesses can exclude
(Clopper and Pearson 1934): `unanimous`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mnemoscope.records import Estimate

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
# Of the normal distribution at 1 - TAIL, as scipy.stats gives it, which takes half a second to import.
_QUANTILE = 1.959963984540054


class Interval(NamedTuple):
    """f64[...] each: an estimate and the interval around it; NaN where it is not defined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def wilson(hits: np.ndarray, total: np.ndarray) -> Interval:
    """A share with Wilson's score interval (1927); NaN where the total is 0."""
    hits, total = np.asarray(hits, float), np.asarray(total, float)
    z = _QUANTILE
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(total > 0, hits / total, np.nan)
        middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
        half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return Interval(share, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1))


def unanimous(witnesses: np.ndarray | int) -> np.ndarray:
    """f64[...]: the least share that so many independent witnesses, hits all of them, do not exclude."""
    return np.asarray(TAIL ** (1 / np.maximum(witnesses, 1)))


def of_share(found: Interval, witnesses: np.ndarray | int) -> Interval:
    """The interval of a share in [0, 1] by resampling, with exact ends where all or none of its witnesses are hits."""
    least = unanimous(witnesses)
    low = np.where(found.value == 1, np.minimum(found.low, least), found.low)
    high = np.where(found.value == 0, np.maximum(found.high, 1 - least), found.high)
    return Interval(found.value, low, high)


def estimate_of_share(values: np.ndarray, witnesses: int) -> Estimate:
    """As `Estimate.of`, from f64[1 + sample] of a share in [0, 1]."""
    one = Estimate.of(values)
    if one.value is None or one.low is None or one.high is None:
        return one
    found = of_share(Interval(*(np.asarray(end) for end in (one.value, one.low, one.high))), witnesses)
    return Estimate(*map(float, found))
