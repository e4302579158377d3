"""What the patterns of a run amount to: how many neurons have one beyond each null, and what explains the triggers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import wilson
from mnemoscope.neuron import decoys
from mnemoscope.neuron.claims import rows_with_verdict
from mnemoscope.neuron.twoway import NONE, VERDICTS
from mnemoscope.patterns.covered import CASES, units_covered, units_with_triggers
from mnemoscope.patterns.sanity import SCHEMA, sanity
from mnemoscope.records import NEURON, Cells, NeuronId

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SHARES = ("shallow", "both", "semantic", "none")
_BAR = ("layer", "tests", "parity")  # what a bar depends on, besides the kind of null
_ORDER = pl.col("verdict").cast(pl.Enum(VERDICTS))


@dataclass(frozen=True)
class Summary:
    """Units of a kind are counted once, whichever of their polarities has the pattern.

    beyond    a row for each layer, kind of unit, family of tests and null: `units`, of which `share` have a pattern
              beyond it, with its 95 % interval (Wilson, over units: layers hold all of their neurons, so the interval
              is about neurons like these). Nulls: `N1` (position and frequency: confirmed on held-out triggers),
              `N2` (beyond the last token), `N3 random` ... (F1 above the 99th percentile of the other half of the
              layer's pseudo-neurons by the lower end of its interval), `verdict` (any but that there is none)
    verdicts  how many units and polarities have each, by kind of unit and family of tests. Of the kinds of null those
              that were judged as neurons were: decoys, where there are any
    expected  what share of a family's verdicts of neurons would be expected if neurons were pseudo-neurons of a kind:
              the rate of verdicts among these over the rate among neurons, with its interval (Wilson, over
              pseudo-neurons). Verdicts are no surer than that
    decoys    if the run has some: a row for each family of tests and level of false discoveries, how many neurons with
              sign beat decoys of their own at that level and are confirmed, how many decoys do as much, and what share
              of the neurons is estimated from these to be wrong
    excess    if the run has decoys: for each family, kind of decoy and F1, the share of neurons (with sign) that reach
              it, that of decoys, and the difference with its interval over documents
    triggers  A8: for each layer and kind of unit, the share of held-out triggers that confirmed patterns explain:
              `shallow` only, `both`, `semantic` only (beyond the last token, N2), or `none`
    claims    the clearest claims (`neuron.claims.rows_with_verdict`), no pattern and no neuron twice; `silent` some
              neurons without a verdict, drawn at random
    path      of the run
    sanity    what becomes of the figures of claims when labels are wrong (`patterns.sanity`)
    notes     what the job had to say of the text, such as that too few documents could be read
    cells     of the model, by which neurons are named
    """

    beyond: pl.DataFrame
    verdicts: pl.DataFrame
    expected: pl.DataFrame
    decoys: pl.DataFrame
    excess: pl.DataFrame
    triggers: pl.DataFrame
    claims: pl.DataFrame
    silent: tuple[NeuronId, ...]
    path: str
    sanity: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=SCHEMA))
    notes: tuple[str, ...] = ()
    cells: Cells = field(default_factory=lambda: Cells(()))

    @property
    def clearest(self) -> tuple[NeuronId, ...]:
        """The neurons of `claims`."""
        return tuple(self.cells.id(*pair) for pair in self.claims.select("layer", "neuron").iter_rows())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        frames = {
            name: getattr(self, name).to_dicts()
            for name in ("beyond", "verdicts", "expected", "decoys", "excess", "triggers", "claims", "sanity")
        }
        return (
            frames
            | {"notes": list(self.notes)}
            | {name: [str(neuron) for neuron in getattr(self, name)] for name in ("clearest", "silent")}
        )


def summary(run: Run, *, count: int = 10, seed: int = 0) -> Summary:
    """Read the tables that `mnemoscope patterns` added; `QueryError` when they are not there."""
    tests = run.table("pattern_tests").select(
        "layer", "neuron", "unit", "polarity", "tests", "f1_low", "q", "decoy_q", "verdict"
    )
    rows = tests.collect()
    units = _units(run)
    alike = [NEURON, *_judged_alike(units)]
    verdicts = (
        rows.filter(pl.col("unit").is_in(alike))
        .group_by("unit", "tests", "verdict")
        .len()
        .sort("unit", "tests", _ORDER)
    )
    return Summary(
        beyond=_beyond(run, rows, units),
        verdicts=verdicts,
        expected=_expected(verdicts, units),
        decoys=against_decoys(rows, run.manifest.options["patterns"]["q"]),
        excess=excess(run),
        triggers=shares_covered(run),
        claims=clearest(run, count),
        silent=_silent(run, rows, count, seed),
        path=str(run.path),
        sanity=sanity(run, seed),
        notes=tuple(run.manifest.options["patterns"].get("notes", ())),
        cells=run.manifest.model.cells,
    )  # fmt: skip


def _units(run: Run) -> pl.DataFrame:
    """layer, unit, units (with a trigger of either polarity), sides (units and polarities with one)."""
    counts = {"units": pl.col("neuron").n_unique(), "sides": pl.len()}
    sides = units_with_triggers(run).group_by("layer", "unit")
    return sides.agg(count.cast(pl.Int64).alias(name) for name, count in counts.items()).sort("layer", "unit")


def _judged_alike(units: pl.DataFrame) -> list[str]:
    """The kinds of null whose verdicts may stand beside those of neurons."""
    return decoys.judged_alike(sorted(set(units["unit"].unique()) - {NEURON}))


def _beyond(run: Run, rows: pl.DataFrame, units: pl.DataFrame) -> pl.DataFrame:
    rate = run.manifest.options["patterns"]["q"]
    bars = _bars(run)
    tests_of = {"N1": pl.col("q") <= rate, "verdict": pl.col("verdict") != NONE}
    rows = rows.with_columns(parity=pl.col("neuron") % 2)
    for kind in bars["null"].unique().sort():
        of_kind = bars.filter(pl.col("null") == kind).select(*_BAR, pl.col("bar").alias(f"bar {kind}"))
        rows = rows.join(of_kind, on=[*_BAR], how="left")
        tests_of[f"N3 {kind}" if kind != "shuffled" else "N4 shuffled"] = (pl.col("q") <= rate) & (
            pl.col("f1_low").fill_null(0) > pl.col(f"bar {kind}")
        )
    address = ("layer", "unit", "tests", "neuron")
    counted = rows.group_by(address).agg(**{name: test.any() for name, test in tests_of.items()})
    semantic = (
        run.table("patterns")
        .filter((pl.col("q") <= rate) & (pl.col("token_q") <= rate) & (pl.col("kind") == "semantic"))
        .select(*address, pl.lit(True).alias("N2"))
        .unique()
        .collect()
    )
    counted = counted.join(semantic, on=address, how="left").with_columns(pl.col("N2").fill_null(False))
    totals = counted.group_by("layer", "unit", "tests").agg(pl.col(*tests_of, "N2").sum().cast(pl.Int64))
    # Where a family of tests has no claim at all, there is none beyond any null.
    every = units.select("layer", "unit", "units").join(rows.select("tests").unique(), how="cross")
    long = (
        every.join(totals, on=["layer", "unit", "tests"], how="left")
        .fill_null(0)
        .unpivot(
            [*tests_of, "N2"],
            index=["layer", "unit", "tests", "units"],
            variable_name="null",
            value_name="count",
        )
        .filter((pl.col("null") != "verdict") | pl.col("unit").is_in([NEURON, *_judged_alike(units)]))
        .sort("layer", "unit", "tests", "null")
    )
    share, low, high = wilson(long["count"].to_numpy(), long["units"].to_numpy())
    return long.with_columns(share=pl.Series(share), low=pl.Series(low), high=pl.Series(high))


def _expected(verdicts: pl.DataFrame, units: pl.DataFrame) -> pl.DataFrame:
    """tests, unit (a kind of null), believed (of neurons), null (of this kind), share (null without a verdict), low,
    high."""
    sides = dict(units.group_by("unit").agg(pl.col("sides").sum()).iter_rows())
    rows = []
    for tests in verdicts["tests"].unique().sort():
        believed_rows = verdicts.filter((pl.col("tests") == tests) & (pl.col("verdict") != NONE))
        count_of = dict(believed_rows.group_by("unit").agg(pl.col("len").sum()).iter_rows())
        believed = count_of.get(NEURON, 0)
        for kind in _judged_alike(units):
            null = count_of.get(kind, 0)
            rate = wilson(np.array(null), np.array(max(sides[kind], 1)))
            shares = [float(end) * sides[NEURON] / believed if believed else None for end in rate]
            rows.append((tests, kind, believed, null, *shares))
    schema: dict[str, type[pl.DataType]] = {
        "tests": pl.String,
        "unit": pl.String,
        "believed": pl.Int64,
        "null": pl.Int64,
        "share": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
    }
    return pl.DataFrame(rows, schema, orient="row")


def against_decoys(rows: pl.DataFrame, rate: float) -> pl.DataFrame:
    """Of rows of `pattern_tests` (unit, tests, q, decoy_q): tests, level, neurons, decoys, share.

    Units with sign which win at the level and are confirmed on held-out triggers at `rate`; share is what part of the
    neurons is estimated to be wrong, decoys by kind over neurons.
    """
    kinds = rows.filter(pl.col("decoy_q").is_not_null() & (pl.col("unit") != NEURON))["unit"].n_unique()
    told = rows.filter(pl.col("decoy_q").is_not_null() & (pl.col("q") <= rate))
    real = pl.col("unit") == NEURON
    levels = [
        told.filter(pl.col("decoy_q") <= level)
        .group_by("tests")
        .agg(level=pl.lit(level), neurons=real.sum().cast(pl.Int64), decoys=(~real).sum().cast(pl.Int64))
        for level in decoys.LEVELS
    ]
    families = rows.filter(pl.col("decoy_q").is_not_null()).select("tests").unique()
    every = families.join(pl.DataFrame({"level": [*decoys.LEVELS]}), how="cross")
    return (
        every.join(pl.concat(levels), on=["tests", "level"], how="left")
        .with_columns(pl.col("neurons", "decoys").fill_null(0))
        .with_columns(
            share=pl.when(pl.col("neurons") > 0).then(pl.col("decoys") / pl.col("neurons") / max(kinds, 1))
        )
        .sort("tests", "level")
    )


def excess(run: Run) -> pl.DataFrame:
    """tests, unit (the kind of decoy), f1, neurons, decoys, excess, low, high: shares of units with sign."""
    measures = run.table("calibration").filter(pl.col("measure").str.contains(" in .*: ")).collect()
    told = {
        (row["unit"], *row["measure"].replace(": ", " in ").split(" in ")): dict(
            zip(row["levels"], row["values"], strict=True)
        )
        for row in measures.iter_rows(named=True)
    }
    rows = []
    for (unit, what, tests, end), values in told.items():
        if (what, end) != ("excess of neurons", "value"):
            continue
        for f1 in values:
            shares = [told[unit, f"share of {units}", tests, "value"][f1] for units in ("neurons", "decoys")]
            ends = [told[unit, what, tests, which][f1] for which in ("value", "low", "high")]
            rows.append((tests, unit, f1, *shares, *ends))
    figures = ("f1", "neurons", "decoys", "excess", "low", "high")
    schema: dict[str, type[pl.DataType]] = {"tests": pl.String, "unit": pl.String}
    for name in figures:
        schema[name] = pl.Float64
    return pl.DataFrame(rows, schema, orient="row").sort("tests", "unit", "f1")


def _bars(run: Run) -> pl.DataFrame:
    """layer, tests, parity (of a unit's number), null, bar: what the lower end of F1 has to exceed."""
    rows = run.table("calibration").filter(pl.col("measure").str.starts_with("bar of ")).collect()
    return rows.select(
        "layer",
        pl.col("measure").str.strip_prefix("bar of ").alias("tests"),
        pl.col("levels").cast(pl.List(pl.Int32)).alias("parity"),
        pl.col("unit").alias("null"),
        pl.col("values").alias("bar"),
    ).explode("parity", "bar")


def shares_covered(run: Run) -> pl.DataFrame:
    """A8 (Figure 2): layer, unit, `SHARES` of the held-out triggers by what confirmed patterns show, triggers."""
    names = dict(zip(SHARES, CASES, strict=True))
    sums = units_covered(run).group_by("layer", "unit").agg(pl.col("triggers", *CASES).sum())
    return (
        sums.with_columns(pl.col("triggers").clip(1))
        .with_columns(pl.col(case) / pl.col("triggers") for case in CASES[:-1])
        .with_columns((1 - pl.sum_horizontal(CASES[:-1])).alias(CASES[-1]))
        .select("layer", "unit", **names, triggers=pl.col("triggers").round().cast(pl.Int64))
        .sort("layer", "unit")
    )


def clearest(run: Run, count: int) -> pl.DataFrame:
    """The first rows with a verdict, no pattern and no neuron twice."""
    different = rows_with_verdict(run).unique(["name", "about"], keep="first", maintain_order=True)
    return different.unique(["layer", "neuron"], keep="first", maintain_order=True).head(count)


def _silent(run: Run, rows: pl.DataFrame, count: int, seed: int) -> tuple[NeuronId, ...]:
    """Neurons of which no claim of any family holds."""
    spoken = (
        rows.filter((pl.col("unit") == NEURON) & (pl.col("verdict") != NONE))
        .select("layer", "neuron")
        .unique()
    )
    every = (
        run.table("neurons")
        .select("layer", "neuron")
        .collect()
        .join(spoken, on=["layer", "neuron"], how="anti")
    )
    drawn = every.sample(min(count, every.height), seed=seed).sort("layer", "neuron")
    return tuple(run.manifest.model.cells.id(*pair) for pair in drawn.iter_rows())
