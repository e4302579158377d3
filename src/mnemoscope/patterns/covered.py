"""Which triggers show a shallow pattern, a semantic one, both or none (A8, Geva et al. 2021, Figure 2), unit by unit.

A pattern counts when it was confirmed on triggers of the test half. It is *semantic* when its kind is and it is
confirmed beyond what the last tokens of the triggers explain (N2); every other confirmed pattern is *shallow*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.records import MAIN, NEURON

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LEAST = 3  # triggers that make a pattern, as in the paper
CASES = ("shallow", "shallow and semantic", "semantic", "not covered")
_UNIT = ["layer", "neuron", "polarity"]


def units_covered(run: Run) -> pl.DataFrame:
    """One row per unit (a neuron or a pseudo-neuron, with a sign) that has a trigger: its address, how many `patterns`
    it has, its `triggers` of the test half, how many of these fall in each of CASES, and how many `ordinary ...` ones
    would.

    A unit without a candidate has as many triggers as the mean of the others of its layer and kind.
    """
    rate = run.manifest.options.get("patterns", {}).get("q", 0.05)
    rows = (
        run.table("patterns")
        .filter(pl.col("tests") == MAIN)
        .sort("unit", *_UNIT, maintain_order=True)
        .select("unit", *_UNIT, "kind", "q", "token_q", "test_base_rate", "test_triggers", "test_where")
        .collect()
    )
    joined = units_with_triggers(run).join(
        cases(rows, rate), on=["unit", *_UNIT], how="left", maintain_order="left"
    )
    usual = pl.col("triggers").mean().over("unit", "layer").fill_null(1.0)
    triggers = pl.col("triggers").cast(pl.Float64).fill_null(usual)
    filled = joined.with_columns(triggers=triggers, patterns=pl.col("patterns").fill_null(0))
    return filled.with_columns(
        pl.col(f"{which}{case}").fill_null(0 if case != CASES[-1] else pl.col("triggers"))
        for case in CASES
        for which in ("", "ordinary ")
    )


def cases(rows: pl.DataFrame, rate: float) -> pl.DataFrame:
    """Per unit of consecutive rows of `patterns`: how many triggers show a shallow, both, a semantic, or no confirmed
    pattern (A8), and how many `patterns` there are (A7): confirmed at this false discovery rate, with at least `LEAST`
    triggers that no better one shows. Candidates are also other readings of the same triggers, which are none.

    `ordinary ...` is how many of as many prefixes at the same positions, with last tokens as frequent (N1), are
    expected in each case: by the base rates of the patterns that count, taken as independent.

    Bit i of `test_where` is the i-th trigger.
    """
    units = rows.select("unit", *_UNIT).unique(maintain_order=True)
    if rows.height == 0:
        names = ("patterns", "triggers", *CASES, *(f"ordinary {case}" for case in CASES))
        return units.with_columns(pl.lit(0).alias(name) for name in names)
    first = np.flatnonzero(
        rows.select(pl.struct("unit", *_UNIT).rle_id().alias("id"))["id"].diff().fill_null(1)
    )
    confirmed = (rows["q"] <= rate).to_numpy()
    semantic = ((rows["kind"] == "semantic") & (rows["token_q"] <= rate)).to_numpy()
    where = rows["test_where"].to_numpy().view(np.uint64)
    none = np.zeros_like(where)
    flat = np.bitwise_or.reduceat(np.where(confirmed & ~semantic, where, none), first)
    deep = np.bitwise_or.reduceat(np.where(confirmed & semantic, where, none), first)
    shown = [np.bitwise_count(bits).astype(np.int64) for bits in (flat & ~deep, flat & deep, deep & ~flat)]
    triggers = rows["test_triggers"].to_numpy()[first].astype(np.int64)
    counts = dict(zip(CASES, [*shown, triggers - sum(shown)], strict=True))
    counted = _distinct(np.where(confirmed, where, none), first)
    absent = [
        np.multiply.reduceat(np.where(counted & which, 1 - rows["test_base_rate"].to_numpy(), 1.0), first)
        for which in (~semantic, semantic)
    ]
    for case, share in zip(CASES, _independent(*absent), strict=True):
        counts[f"ordinary {case}"] = share * triggers
    return units.with_columns(
        patterns=pl.Series(np.add.reduceat(counted.astype(np.int64), first)),
        triggers=pl.Series(triggers),
        **{case: pl.Series(count) for case, count in counts.items()},
    )


def _independent(flat: np.ndarray, deep: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shares of CASES where no shallow pattern is with chance `flat`, and no semantic one with chance `deep`."""
    return (1 - flat) * deep, (1 - flat) * (1 - deep), flat * (1 - deep), flat * deep


def _distinct(where: np.ndarray, first: np.ndarray) -> np.ndarray:
    """bool[pattern]: whether it shows `LEAST` triggers that those before it, of the same unit and which count, do not.

    where  u64[pattern]: which triggers show it; unit by unit, the best first
    first  i64[unit]: where each unit begins
    """
    sizes = np.diff(first, append=len(where))
    counted, covered = np.zeros(len(where), bool), np.zeros(len(first), np.uint64)
    for place in range(sizes.max(initial=0)):
        unit = np.flatnonzero(sizes > place)
        shown = where[first[unit] + place]
        more = np.bitwise_count(shown & ~covered[unit]) >= LEAST
        counted[first[unit[more]] + place] = True
        covered[unit[more]] |= shown[more]
    return counted


def units_with_triggers(run: Run) -> pl.DataFrame:
    """Every unit that has a trigger: neurons, and pseudo-neurons if the run has them."""
    parts = [run.table("triggers").select(pl.lit(NEURON).alias("unit"), *map(pl.col, _UNIT))]
    if "null_triggers" in run.manifest.tables:
        parts.append(run.table("null_triggers").select(pl.col("kind").alias("unit"), *map(pl.col, _UNIT)))
    return pl.concat([part.unique().collect() for part in parts]).sort("unit", *_UNIT)
