"""What the discovery half decides: which patterns are candidates, and which of them is the claim, at what threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from mnemoscope.mine.kernel import BINS
from mnemoscope.neuron import twoway
from mnemoscope.neuron.twoway import MARGIN, Curve, oriented
from mnemoscope.patterns.triggers import FOUND, Addressed
from mnemoscope.patterns.whole import SHARE, Counted, Language, proposed
from mnemoscope.records import MAIN, NEURON, NEXT, POSITION, WHOLE
from mnemoscope.run.reading import Run
from mnemoscope.trials.claims import KindClaims
from mnemoscope.trials.counts import MIDDLE, CandidateCounts, ThresholdCounts, runs_of
from mnemoscope.trials.groups import UnitPlaces
from mnemoscope.trials.heldout import FURTHER
from mnemoscope.trials.masked_text import MaskedText

TESTED = {
    MAIN: 10,
    NEXT: 2,
    POSITION: 1,
    WHOLE: 7,
}  # candidates of a unit whose threshold is asked of the model
_RATES = ("test_p", "token_p", "q", "token_q")  # which are 1 where they were not asked for
_CLAIMS = 50_000  # whose curves are held at once

# -- Candidates that triggers cannot certify: the family `whole`, from the counts of all patterns of a language ---


def thresholds(run: Run, kind: str) -> np.ndarray:
    """i64[2 cell]: the least positive score that at most `SHARE` of the run's tokens reach, by polarity (+1
    first); `BINS` where none is reached."""
    rows = run.table("histograms" if kind == NEURON else "null_histograms")
    if kind != NEURON:
        rows = rows.filter(pl.col("kind") == kind)
    frame = rows.sort("layer", "neuron").select("counts").collect()
    counts = frame["counts"].explode().to_numpy().reshape(-1, BINS)
    return np.stack([_rare_score(oriented(counts, polarity)) for polarity in (1, -1)])


def _rare_score(counts: np.ndarray) -> np.ndarray:
    """i64[cell]: that score, from histograms of it."""
    side = counts[..., MIDDLE + 1 :]
    above = np.flip(np.cumsum(np.flip(side, -1), -1), -1)
    rare = above <= SHARE * counts.sum(-1, keepdims=True)
    # Of scores that nothing reaches, none is a threshold; where even the largest are common, that of the largest is.
    first = np.where(rare.any(-1), rare.argmax(-1), side.shape[-1] - 1)
    lowest = np.where(np.take_along_axis(above, first[..., None], -1)[..., 0] > 0, first, first - 1)
    return np.where(side.sum(-1) > 0, np.maximum(lowest, 0) + MIDDLE + 1, BINS)


def proposals(
    places: UnitPlaces,
    units: Addressed,
    kind: str,
    counts: CandidateCounts,
    masked: MaskedText,
    language: Language,
) -> pl.DataFrame:
    """Candidates (columns of `FOUND`) of all units of a kind that have triggers."""
    every = np.arange(len(language.specs))
    of_kind = np.flatnonzero(units.kind == units.kinds.index(kind))
    place_of, number = places.seat(kind, units.layer[of_kind], units.neuron[of_kind])
    frames, text = [pl.DataFrame(schema=FOUND)], None
    for place, first, last in runs_of(place_of):
        if (own := masked.of(place)) is not text:
            text, rates = own, own.rates(every).astype(np.float64)
            shown = own.shown(every).sum(1, dtype=np.int64)
        unit = of_kind[first:last]
        side = (units.polarity[unit] < 0).astype(np.int64), counts.cells.cell(place, number[first:last])
        strata = counts.by_stratum[side].astype(np.float64)
        counted = Counted(
            counts.both[side].astype(np.int64), strata @ rates, strata.sum(1).astype(np.int64), shown
        )
        frames.append(proposed(counted, language, unit))
    return pl.concat(frames)


def with_proposals(candidates: pl.DataFrame, proposed: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Candidates of all families, by unit; of those that triggers were not asked about nothing is confirmed."""
    blank = {name: dtype for name, dtype in candidates.schema.items() if name not in FOUND}
    columns = [pl.lit(1.0 if name in _RATES else 0).cast(dtype).alias(name) for name, dtype in blank.items()]
    frames = [candidates, *(frame.with_columns(columns) for frame in proposed)]
    return pl.concat(frames).sort("unit", "tests", "rank")


# -- The claim of each unit and family of tests, and its threshold ---------------------------------------------


def first_candidates(candidates: pl.DataFrame) -> np.ndarray:
    """i64[candidate]: rows of those whose threshold is asked of the model, the first few of each family of tests."""
    counted = pl.col("tests").replace_strict(TESTED, return_dtype=pl.Int64)
    return np.flatnonzero(candidates.select(FURTHER & (pl.col("rank") < counted)).to_series().to_numpy())


def with_choice(
    candidates: pl.DataFrame, claims: Mapping[str, KindClaims], counts: Mapping[str, ThresholdCounts]
) -> pl.DataFrame:
    """Adds `score`, where active begins (-1 for one that was not counted), `discovery_score` and `chosen`: of the
    candidates whose F1 beyond chance is within `MARGIN` of the best, the one with the fewest parts."""
    score, f1 = np.full(len(candidates), -1), np.zeros(len(candidates))
    for kind, (rows, of_kind) in claims.items():
        score[rows], f1[rows] = best_thresholds(counts[kind], len(of_kind))
    frame = candidates.with_columns(score=pl.Series(score), discovery_score=pl.Series(f1))
    near = pl.col("discovery_score") >= pl.col("discovery_score").max().over("unit", "tests") - MARGIN
    order = pl.struct((~near).alias("far"), "complexity", -pl.col("discovery_score"), "rank")
    allowed = frame.with_columns(chosen=pl.col("score") >= 0)
    first = order.rank("ordinal").over("unit", "tests", "chosen") == 1
    return allowed.with_columns(chosen=pl.col("chosen") & first)


def best_thresholds(counts: ThresholdCounts, claims: int) -> tuple[np.ndarray, np.ndarray]:
    """For each claim the score i64[claim] where active begins (-1 if none may), and how far F1 is beyond chance."""
    score, value = np.full(claims, -1), np.zeros(claims)
    for start in range(0, claims, _CLAIMS):
        block = slice(start, min(start + _CLAIMS, claims))
        shown = counts.counts[block].astype(np.int64)
        threshold, f1 = twoway.choose(Curve(shown, counts.sides(block) - shown), counts.documents(block))
        score[block], value[block] = np.where(threshold < 0, -1, threshold + MIDDLE), f1
    return score, value
