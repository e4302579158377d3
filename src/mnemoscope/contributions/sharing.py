"""A whole shared among its parts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def shared(contributions: Float[Tensor, " part"], total: float) -> Float[Tensor, " part"]:
    """The contribution of a sum shared among its parts (A41), helpful and unhelpful apart.

    The paper scales every C_i by C(sum) / sum C_i, which is unstable when contributions of both signs cancel. Here the
    side that is too large (the helpful when sum C_i > C(sum), else the unhelpful) is scaled down and the other kept,
    so that signs stay and shares add up to `total`; where a side would have to change its sign for that, the other
    side is scaled up. Zero contributions get nothing; with no contribution at all the total is shared equally.
    """
    up, down = contributions.clamp_min(0), contributions.clamp_max(0)
    if not bool(contributions.any()):
        return torch.full_like(contributions, total / max(len(contributions), 1))
    excess = float(contributions.sum()) - total
    shrink, keep = (up, down) if excess > 0 else (down, up)
    for scaled, kept in ((shrink, keep), (keep, shrink)):
        size = float(scaled.sum())
        factor = (total - float(kept.sum())) / size if size else -1.0
        if 0 <= factor < math.inf:
            return kept + scaled * factor
    # Only one sign is there and the total has the other: the paper's rule is all that is left.
    return contributions * (total / float(contributions.sum()))
