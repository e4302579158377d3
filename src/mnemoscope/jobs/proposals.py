"""From the counts of a `WholeLook` to candidates of the family `whole`."""

from __future__ import annotations

import numpy as np
import polars as pl

from mnemoscope.jobs.ground import Ground
from mnemoscope.jobs.tallies import MIDDLE, WholeLook
from mnemoscope.kernel import BINS
from mnemoscope.patterns.search import FOUND
from mnemoscope.patterns.triggers import Addressed
from mnemoscope.patterns.twoway import oriented
from mnemoscope.patterns.whole import SHARE, Counted, Language, proposed
from mnemoscope.records import NEURON
from mnemoscope.store import Run


def thresholds(run: Run, kind: str) -> np.ndarray:
    """i64[layer 2 unit]: the least positive score that at most `SHARE` of the run's tokens reach, by polarity (+1
    first); `BINS` where none is reached."""
    rows = run.table("histograms" if kind == NEURON else "null_histograms")
    if kind != NEURON:
        rows = rows.filter(pl.col("kind") == kind)
    frame = rows.sort("layer", "neuron").select("counts").collect()
    counts = frame["counts"].explode().to_numpy().reshape(run.manifest.model.layers, -1, BINS)
    return np.stack([_reached(oriented(counts, polarity)) for polarity in (1, -1)], 1)


def _reached(counts: np.ndarray) -> np.ndarray:
    """i64[layer unit]"""
    side = counts[..., MIDDLE + 1 :]
    above = np.flip(np.cumsum(np.flip(side, -1), -1), -1)
    rare = above <= SHARE * counts.sum(-1, keepdims=True)
    # Of scores that nothing reaches, none is a threshold; where even the largest are common, that of the largest is.
    place = np.where(rare.any(-1), rare.argmax(-1), side.shape[-1] - 1)
    lowest = np.where(np.take_along_axis(above, place[..., None], -1)[..., 0] > 0, place, place - 1)
    return np.where(side.sum(-1) > 0, np.maximum(lowest, 0) + MIDDLE + 1, BINS)


def proposals(
    units: Addressed, kind: str, look: WholeLook, ground: Ground, language: Language
) -> pl.DataFrame:
    """Candidates (columns of `FOUND`) of all units of a kind that have triggers."""
    rates = ground.rates(np.arange(len(language.specs))).astype(np.float64)
    shown = ground.shown.sum(1, dtype=np.int64)
    number = units.kinds.index(kind)
    parts = [pl.DataFrame(schema=FOUND)]
    for layer, (both, by_stratum) in enumerate(zip(look.both, look.by_stratum, strict=True)):
        unit = np.flatnonzero((units.kind == number) & (units.layer == layer))
        own = (units.polarity[unit] < 0).astype(np.int64), units.neuron[unit]
        strata = by_stratum[own].astype(np.float64)
        counted = Counted(both[own].astype(np.int64), strata @ rates, strata.sum(1).astype(np.int64), shown)
        parts.append(proposed(counted, language, unit))
    return pl.concat(parts)
