"""k-means, the few lines of it that are needed (Lloyd 1982; seeded as by Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

import numpy as np


def k_means(points: np.ndarray, count: int, seed: int = 0, rounds: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """f64[cluster, dimension] and i64[point]: centres, and the nearest of them; at most `count` clusters."""
    random = np.random.default_rng(seed)
    points = np.asarray(points, np.float64)
    count = min(count, len(points))
    centres = points[[int(random.integers(len(points)))]] if count else points[:0]
    far = _distance(points, centres)[:, 0] if count else np.zeros(0)
    while len(centres) < count and far.sum() > 0:
        new = points[[int(random.choice(len(points), p=far / far.sum()))]]
        centres = np.concatenate([centres, new])
        far = np.minimum(far, _distance(points, new)[:, 0])
    nearest = np.full(len(points), -1)
    for _ in range(rounds):
        closest = _distance(points, centres).argmin(1) if count else nearest
        if (closest == nearest).all():
            break
        nearest = closest
        sizes = np.bincount(nearest, minlength=len(centres))
        order = np.argsort(nearest, kind="stable")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        totals = np.concatenate([np.zeros((1, points.shape[1])), np.cumsum(points[order], 0)])
        sums = totals[starts[1:]] - totals[starts[:-1]]
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    return centres, nearest


def _distance(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, never below 0."""
    squares = (points**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * points @ centres.T
    return np.maximum(squares, 0.0)
