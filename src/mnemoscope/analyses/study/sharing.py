"""A whole shared among its parts (A41)."""

from __future__ import annotations

import math

import numpy as np


def shared(contributions: np.ndarray, total: float) -> np.ndarray:
    """f64[part]: the contribution of a sum shared among its parts, helpful and unhelpful apart (Yu et al. 2023; A41).

    The paper scales every C_i by C(sum) / sum C_i, which is unstable when contributions of both signs cancel. Here the
    side that is too large (the helpful when sum C_i > C(sum), else the unhelpful) is scaled down and the other kept,
    so that signs stay and shares add up to `total`; where a side would have to change its sign for that, the other
    side is scaled up. Zero contributions get nothing; with no contribution at all the total is shared equally.
    """
    up, down = np.maximum(contributions, 0.0), np.minimum(contributions, 0.0)
    if not contributions.any():
        return np.full(len(contributions), total / max(len(contributions), 1))
    shrink, keep = (up, down) if contributions.sum() > total else (down, up)
    for scaled, kept in ((shrink, keep), (keep, shrink)):
        size = float(scaled.sum())
        with np.errstate(over="ignore"):
            factor = float(np.float64(total - kept.sum()) / size) if size else -1.0
        if 0 <= factor < math.inf:
            return np.asarray(kept + scaled * factor)
    # Only one sign is there and the total has the other: the paper's rule is all that is left.
    return np.asarray(contributions * (total / float(contributions.sum())))
