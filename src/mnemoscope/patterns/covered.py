"""Which triggers show a shallow pattern, a semantic one, both or none (A8, Geva et al. 2021, Figure 2), unit by unit.

A pattern counts when it was confirmed on triggers of the test half. It is *semantic* when its kind is and it is
confirmed beyond what the last tokens of the triggers explain (N2); every other confirmed pattern is *shallow*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import GROUPS
from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.patterns.triggers import Options, addressed, half_triggers
from mnemoscope.records import MAIN, NEURON
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import mixed

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
    return _filled(units_with_triggers(run), cases(_tested(run), _rate(run)))


def _rate(run: Run) -> float:
    return float(run.manifest.options.get("patterns", {}).get("q", 0.05))


def _tested(run: Run) -> pl.DataFrame:
    return (
        run.table("patterns")
        .filter(pl.col("tests") == MAIN)
        .sort("unit", *_UNIT, maintain_order=True)
        .select("unit", *_UNIT, "kind", "q", "token_q", "test_base_rate", "test_triggers", "test_where")
        .collect()
    )


def _filled(units: pl.DataFrame, covered: pl.DataFrame) -> pl.DataFrame:
    joined = units.join(covered, on=["unit", *_UNIT], how="left", maintain_order="left")
    usual = pl.col("triggers").mean().over("unit", "layer").fill_null(1.0)
    triggers = pl.col("triggers").cast(pl.Float64).fill_null(usual)
    filled = joined.with_columns(triggers=triggers, patterns=pl.col("patterns").fill_null(0))
    return filled.with_columns(
        pl.col(f"{which}{case}").fill_null(0 if case != CASES[-1] else pl.col("triggers"))
        for case in CASES
        for which in ("", "ordinary ")
    )


def documents_of_triggers(run: Run) -> tuple[pl.DataFrame, int]:
    """Which triggers of the test half are in each of `GROUPS` groups of documents, and how many documents there are.

    One row per unit with triggers: its address, and `group_0`, ... u64: bit i is the i-th trigger, as in `test_where`.
    """
    whole = Text.of(run)
    text = near_duplicates(whole).join(whole)
    units = addressed(run, text)
    half_text, slots, _ = half_triggers(text, units.units, Options(), test=True)
    known = slots >= 0
    documents = np.where(known, half_text.document[np.maximum(slots, 0)], 0)
    group = np.where(known, (mixed(documents, seed=1) % GROUPS).astype(np.int64), -1)
    bits = np.uint64(1) << np.arange(slots.shape[1], dtype=np.uint64)
    masks = {
        f"group_{number}": np.where(group == number, bits, np.uint64(0)).sum(1, dtype=np.uint64)
        for number in range(GROUPS)
    }
    address = {"unit": np.array(units.kinds)[units.kind], "layer": units.layer, "neuron": units.neuron}
    table = pl.DataFrame(address | {"polarity": units.polarity} | masks)
    return table.cast({"layer": pl.Int16, "neuron": pl.Int32, "polarity": pl.Int8}), len(
        np.unique(documents[known])
    )


def without_documents(run: Run, masks: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """`units_covered` without the triggers in each group of documents, one group after another.

    Which patterns are confirmed stays: it is how much they cover that is asked without the group.
    """
    units, rows = units_with_triggers(run), _tested(run)
    lost = rows.join(masks, on=["unit", *_UNIT], how="left", maintain_order="left")
    where, triggers = rows["test_where"].to_numpy().view(np.uint64), rows["test_triggers"].to_numpy()
    there = np.where(
        triggers >= 64, ~np.uint64(0), (np.uint64(1) << (triggers % 64).astype(np.uint64)) - np.uint64(1)
    )
    for number in range(GROUPS):
        gone = lost[f"group_{number}"].fill_null(0).to_numpy() & there
        left = rows.with_columns(
            test_where=pl.Series((where & ~gone).view(np.int64)),
            test_triggers=pl.Series(triggers - np.bitwise_count(gone)),
        )
        yield _filled(units, cases(left, _rate(run)))


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
