"""Do the figures of claims notice when labels are wrong? The two sanity checks of NeuronEval (Oikarinen et al. 2025).

The labels are the tokens that show the claim's pattern. Half of them, drawn at random, are taken away; or as many again
are put on tokens drawn at random from the others. A figure that does not fall cannot tell a right pattern from one that
misses half of what it names, or that names twice as much. F1, IoU and Pearson's correlation fall. So does average
precision where the pattern is rare; where a quarter of the tokens show it, added labels are met by chance alone.
Precision does not see that labels are too many, nor recall that they are too few, and so neither stands alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import ratio
from mnemoscope.neuron.twoway import NONE, Curve
from mnemoscope.records import NEURON

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

HEADLINE = ("F1", "IoU", "Pearson")  # average precision, too, of a pattern that is rare
REMOVED, ADDED = "half of the labels removed", "as many labels added"
DRAWS = 24  # whose mean is compared: of a claim with a handful of tokens a single draw says little
SCHEMA = {"figure": pl.String, "change": pl.String, "claims": pl.Int64, "fell": pl.Int64, "left": pl.Float64}


def sanity(run: Run, seed: int = 0) -> pl.DataFrame:
    """A row for each figure and change: `claims` of neurons with a verdict, in how many of them the figure `fell`, and
    the median of what is `left` of it, as a share. No rows without a verdict.

    seed  of the labels that are drawn
    """
    rows = run.table("pattern_tests").filter((pl.col("unit") == NEURON) & (pl.col("verdict") != NONE))
    frame = rows.select("polarity", "active", "pearson", "counts_present", "counts_absent").collect()
    if not frame.height:
        return pl.DataFrame(schema=SCHEMA)
    negative = frame["polarity"].to_numpy() < 0
    present, absent = (
        np.where(negative[:, None], counts[:, ::-1], counts)
        for counts in (np.stack(frame[name].to_list()) for name in ("counts_present", "counts_absent"))
    )
    active = frame["active"].to_numpy()
    correlation = frame["pearson"].to_numpy() * frame["polarity"].to_numpy()
    random = np.random.default_rng(seed)
    was = figures(present, absent, active) | {"Pearson": correlation}
    told = []
    for change, drawn in ((REMOVED, removed), (ADDED, added)):
        share = present.sum(1) / (present + absent).sum(1)
        draws = [figures(*drawn(present, absent, random), active) for _ in range(DRAWS)]
        now = {name: np.mean([np.nan_to_num(draw[name]) for draw in draws], axis=0) for name in draws[0]}
        now["Pearson"] = correlation * _left_of_pearson(share, change)
        for name, values in was.items():
            left = ratio(now[name], values)
            fell = int((left < 1).sum())
            told.append((name, change, frame.height, fell, float(np.median(np.nan_to_num(left)))))
    return pl.DataFrame(told, SCHEMA, orient="row")


def removed(
    present: np.ndarray, absent: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms i64[claim bin] with the label and without, after each label was taken away by a fair coin."""
    kept = random.binomial(present, 0.5)
    return kept, absent + present - kept


def added(
    present: np.ndarray, absent: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same after as many labels as there are, in expectation, were put where there was none."""
    chance = np.minimum(present.sum(1) / np.maximum(absent.sum(1), 1), 1)
    more = random.binomial(absent, chance[:, None])
    return present + more, absent - more


def figures(present: np.ndarray, absent: np.ndarray, active: np.ndarray) -> dict[str, np.ndarray]:
    """f64[claim] of each figure but Pearson's, from histograms i64[claim bin] of the score.

    active  i64[claim]: tokens at or above the threshold, which labels have nothing to do with
    """
    curve = Curve(present, absent)
    place = (curve.active >= active[:, None]).sum(1, keepdims=True) - 1  # the last with so many
    at = {"F1": curve.f1, "IoU": curve.iou, "precision": curve.precision, "recall": curve.recall}
    one = {name: np.take_along_axis(values, place, 1)[:, 0] for name, values in at.items()}
    return one | {"average precision": curve.average_precision}


def _left_of_pearson(share: np.ndarray, change: str) -> np.ndarray:
    """f64[claim]: what is left of the correlation with labels on a `share` of the tokens, in expectation. The
    covariance is halved, or falls by the chance of a new label; the variance of the labels is that of the new share."""
    if change == REMOVED:
        return np.asarray(np.sqrt(0.5 * (1 - share) / (1 - share / 2)))
    chance = np.minimum(share / np.maximum(1 - share, 1e-12), 1)
    variance = 2 * share * (1 - 2 * share)
    return np.where(
        variance > 0, (1 - chance) * np.sqrt(share * (1 - share) / np.maximum(variance, 1e-12)), 0.0
    )
