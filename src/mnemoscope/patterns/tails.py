"""Upper tails of the binomial and the Poisson binomial, for many cases at once."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

MOST = 64  # trials: the triggers of a unit are bits of one integer

_LOG_FACTORIAL = gammaln(np.arange(MOST + 2) + 1.0)


def log_binomial_tail(hits: np.ndarray, trials: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """f64[...]: log P(X >= hits), X ~ Binomial(trials, rate), exact in the far tail; trials at most `MOST`.

    The first term in logarithms times one plus the sum of the ratios of those that follow.
    """
    k, n = (np.asarray(values, np.int64) for values in (hits, trials))
    rate = np.clip(
        np.asarray(rate, np.float64), 1e-15, 1 - 1e-4
    )  # beyond, odds overflow and nothing is evidence
    first = _LOG_FACTORIAL[n] - _LOG_FACTORIAL[k] - _LOG_FACTORIAL[n - k]
    first = first + k * np.log(rate) + (n - k) * np.log1p(-rate)
    odds = rate / (1 - rate)
    total, term = np.ones(np.shape(first)), np.ones(np.shape(first))
    for step in range(int((n - k).max(initial=0))):
        term = term * (np.maximum(n - k - step, 0) / (k + 1 + step)) * odds
        total += term
        if not (term > 1e-12 * total).any():
            break
    return np.minimum(first + np.log(total), 0.0)


def poisson_binomial_tail(hits: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """f64[case]: P(sum of independent coins >= hits).

    rates   f64[case, trial] chance of each coin; 0 for one that is not thrown
    """
    cases, trials = rates.shape
    chances = np.zeros((cases, trials + 1))
    chances[:, 0] = 1
    for trial in range(trials):
        p = rates[:, trial, None]
        chances[:, 1:] = chances[:, 1:] * (1 - p) + chances[:, :-1] * p
        chances[:, 0] *= 1 - p[:, 0]
    above = np.concatenate([np.cumsum(chances[:, ::-1], 1)[:, ::-1], np.zeros((cases, 1))], 1)
    return np.minimum(above[np.arange(cases), np.minimum(hits, trials + 1)], 1.0)
