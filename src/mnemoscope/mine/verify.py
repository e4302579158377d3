"""Recompute what a run says from the model, and say what differs.

One shard, chosen by a seed, is statistics again with the very batches of the plan, so on the machine that built the run
every number must come out the same bit for bit; elsewhere, within the tolerance of the dtype. From that shard follow

    coefficients  every stored trigger whose context lies in the shard, and no stronger one that is missing;
                  those of null units likewise, which are made again from their recipe
    moments       the power sums of all neurons of every layer in the shard, as stored for it
    distribution  no neuron's stored minimum, maximum or histogram count is exceeded by the shard's
    totals        the moments of `neurons` are those of all shards together
    values        the value tokens of a sample of neurons, read again; the same rows by token

and the sha256 of every table is checked against the manifest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import torch

from mnemoscope.arguments import check_verification
from mnemoscope.mine import values
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import Progress
from mnemoscope.results import Check, Verification
from mnemoscope.run.reading import Run
from mnemoscope.text.plan import batches

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}  # relative, between machines
_KEYS = {
    "triggers": ["layer", "neuron", "polarity", "context"],
    "null_triggers": ["kind", "layer", "neuron", "polarity", "context"],
}


def verify(
    run: Run,
    model: Model,
    *,
    sample: int = 500,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Verification:
    """Recompute a shard and a sample of values; raises RunMismatch when the model is not the run's.

    sample  neurons whose values are read again
    """
    check_verification(sample)
    model = model.as_in(run)
    model.check_built(run, "verifying")
    generator = np.random.default_rng(seed)
    shards = run.table("shards").select(pl.col("shard").max()).collect().item() + 1
    shard = int(generator.integers(shards))
    tolerance = TOLERANCE[model.dtype]
    recomputed = _mine(run, model, shard, report or (lambda _: None))
    tables = [table for table in _KEYS if table in run.manifest.tables]
    checks = (
        _files(run),
        *(check(run, recomputed, table, tolerance) for table in tables for check in (_triggers, _missing)),
        _moments(run, recomputed, shard, tolerance),
        _ranges(run, recomputed, tolerance),
        _totals(run),
        _values(run, model, generator, sample),
        _by_token(run),
        *(() if model.units is None else (_units(run, model, recomputed, shards, tolerance),)),
    )
    return Verification(str(run.path), shard, seed, tolerance, checks)


def _mine(run: Run, model: Model, shard: int, report: Callable[[Progress], None]) -> RunStatistics:
    special = run.manifest.options["special"]
    paired = run.manifest.corpus.target is not None
    work = list(batches(run.file("contexts"), shard, special, paired=paired))
    options = run.manifest.options
    statistics = RunStatistics.of(model, Nulls.of(model, options.get("nulls")), options["top"])
    total, done = sum(batch.n_tokens for batch in work), 0
    with Capture(model) as capture:
        for batch in work:
            capture.sweep(batch, statistics.update, statistics.update_rows, statistics.update_rebuilt)
            done += batch.n_tokens
            report(Progress("mining again", done, total, "tokens"))
    statistics.finish_shard(shard)
    return statistics


def _frame(recomputed: RunStatistics, name: str) -> pl.DataFrame:
    tables = [recomputed.tables(layer)[name] for layer in recomputed.neurons.cells.layers]
    return pl.concat([pl.DataFrame(pl.from_arrow(table)) for table in tables])


def _compare(name: str, stored: np.ndarray, fresh: np.ndarray, tolerance: float, note: str = "") -> Check:
    """Relative difference, where nothing counts as smaller than a thousandth of the largest."""
    scale = np.maximum(np.abs(stored), np.abs(stored).max(initial=0.0) * 1e-3)
    with np.errstate(invalid="ignore"):
        difference = np.abs(stored - fresh) / np.where(scale > 0, scale, 1.0)
    difference = np.where(np.isnan(difference), np.inf, difference)
    differing = int((difference > tolerance).sum())
    return Check(name, stored.size, differing, float(difference.max(initial=0.0)), note)


def _files(run: Run) -> Check:
    problems = run.check()
    note = "; ".join(f"{problem.table}: {problem.text}" for problem in problems)
    return Check("sha256 of the tables", len(run.manifest.tables), len(problems), 0.0, note)


def _name(text: str, table: str) -> str:
    return text if table == "triggers" else f"{text} (null units)"


def _triggers(run: Run, recomputed: RunStatistics, table: str, tolerance: float) -> Check:
    """Stored triggers of the shard's contexts against the shard's own top list, which must hold them all."""
    contexts = pl.Series("context", sorted(recomputed.neurons.contexts), dtype=pl.Int64)
    stored = run.table(table).filter(pl.col("context").is_in(contexts.implode())).collect()
    joined = stored.join(_frame(recomputed, table), on=_KEYS[table], how="left", suffix="_again")
    fresh = joined["coefficient_again"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    moved = joined.filter(pl.col("position") != pl.col("position_again")).height
    coefficients = joined["coefficient"].cast(pl.Float64).to_numpy()
    return _compare(
        _name("coefficients", table), coefficients, fresh, tolerance, f"{moved} at another position"
    )


def _missing(run: Run, recomputed: RunStatistics, table: str, tolerance: float) -> Check:
    """Triggers of the shard that beat the weakest that is stored, and are not stored."""
    top, key = run.manifest.options["top"], _KEYS[table]
    weakest = (
        run.table(table)
        .filter(pl.col("rank") == top - 1)
        .select(*key[:-1], pl.col("coefficient").alias("weakest"))
    )
    absent = (
        _frame(recomputed, table)
        .lazy()
        .join(run.table(table).select(key), on=key, how="anti")
        .join(weakest, on=key[:-1], how="left")
        .with_columns(strength=pl.col("coefficient").abs(), bar=pl.col("weakest").abs())
    )
    # A list that is not full has no weakest: everything belongs in it.
    wrong = absent.filter(
        pl.col("bar").is_null() | (pl.col("strength") > pl.col("bar") * (1 + tolerance))
    ).collect()
    return Check(_name("no trigger is missing", table), absent.collect().height, wrong.height, 0.0)


def _moments(run: Run, recomputed: RunStatistics, shard: int, tolerance: float) -> Check:
    names = ["tokens", "sum", "sum_squares", "sum_cubes", "sum_fourths"]
    stored = run.table("shards").filter(pl.col("shard") == shard).sort("layer").collect()
    fresh = pl.DataFrame(pl.from_arrow(recomputed.neurons.shard_rows())).sort("layer")
    note = f"shard {shard}: {int(stored['tokens'][0]):,} tokens x all neurons"
    return _compare(
        "moments",
        stored.select(names).cast(pl.Float64).to_numpy(),
        fresh.select(names).cast(pl.Float64).to_numpy(),
        tolerance,
        note,
    )


def _ranges(run: Run, recomputed: RunStatistics, tolerance: float) -> Check:
    fresh = _frame(recomputed, "neurons")
    stored = run.table("neurons").select("min", "max", "tokens").collect()
    slack = tolerance * np.maximum(stored["max"].abs().to_numpy(), stored["min"].abs().to_numpy())
    outside = (fresh["max"].to_numpy() > stored["max"].to_numpy() + slack) | (
        fresh["min"].to_numpy() < stored["min"].to_numpy() - slack
    )
    counts = run.table("histograms").select("counts").collect()["counts"].to_list()
    counts_again = _frame(recomputed, "histograms")["counts"].to_list()
    sizes = np.asarray(counts).sum(1)
    more = np.asarray(counts_again).sum(1) > sizes
    # Neurons of all tokens have equally many in their bins; those of an expert no more than were routed to it.
    tokens = stored["tokens"].to_numpy()
    whole = sizes[tokens == tokens.max()]
    wrong = int(outside.sum() + more.sum() + (whole != whole[0]).sum() + (sizes > tokens).sum())
    return Check("ranges and histograms", fresh.height, wrong, 0.0)


def _totals(run: Run) -> Check:
    """Sum of the mean over a layer's neurons, times tokens, is the sum over its shards; squares likewise."""
    shards = run.table("shards").group_by("layer").agg(pl.col("sum", "sum_squares").sum())
    tokens = pl.col("tokens").cast(pl.Float64)
    neurons = (
        run.table("neurons")
        .group_by("layer")
        .agg(
            first=(pl.col("mean").fill_nan(0) * tokens).sum(),
            second=((pl.col("std").fill_nan(0) ** 2 + pl.col("mean").fill_nan(0) ** 2) * tokens).sum(),
        )
    )
    joined = shards.join(neurons, on="layer").sort("layer").collect()
    stored = joined.select("first", "second").to_numpy()
    folded = joined.select("sum", "sum_squares").to_numpy()
    check = _compare("totals over the shards", stored, folded, 1e-6)
    # Another order of summation: not bit for bit, and not meant to be.
    return Check(check.name, check.compared, check.differing, 0.0)


def _units(run: Run, model: Model, recomputed: RunStatistics, shards: int, tolerance: float) -> Check:
    """How well units rebuild what they stand for, where the shard is all of the text; else only where they belong."""
    names = ["tokens", "active", "explained_variance", "error_norm"] if shards == 1 else ["layer", "units"]
    fresh, stored = pl.DataFrame(pl.from_arrow(recomputed.rebuilt.rows(model))), run.table("units").collect()
    columns = [frame.select(names).cast(pl.Float64).fill_null(0.0).to_numpy() for frame in (stored, fresh)]
    return _compare("units", columns[0], columns[1], tolerance)


def _values(run: Run, model: Model, generator: np.random.Generator, sample: int) -> Check:
    sample = min(sample, len(model.cells))
    layers, neurons = model.cells.place(np.sort(generator.choice(len(model.cells), sample, replace=False)))
    stored_logits, fresh_logits, wrong = [], [], 0
    for layer in np.unique(layers):
        here = neurons[layers == layer]
        tokens, logits = values.value_tokens(model, int(layer), torch.from_numpy(here))
        for row, neuron in enumerate(here):
            stored = run.rows("values", int(layer), int(neuron))
            stored_logits.append(stored["logit"].cast(pl.Float64).to_numpy())
            fresh_logits.append(logits[row].ravel().astype(np.float64))
            wrong += int((stored["token"].to_numpy() != tokens[row].ravel()).sum())
    check = _compare("values", np.concatenate(stored_logits), np.concatenate(fresh_logits), 1e-4)
    note = f"{sample} neurons; {wrong} tokens at another rank"
    return Check(check.name, check.compared, check.differing, check.largest, note)


def _by_token(run: Run) -> Check:
    """`values_by_token` against `values`: the same rows, in the order in which tokens are looked up."""
    key, read = ["layer", "neuron", "polarity", "rank"], ["token", "logit", "probability"]
    rows, ordered = (run.table(name).select(key + read) for name in ("values", "values_by_token"))
    first, second = (
        frame.select(pl.struct(pl.all()).hash().sum()).collect().item() for frame in (rows, ordered)
    )
    wrong = 0
    if first != second:  # else no need to bring every row together with itself
        joined = rows.join(ordered, on=key, how="full", suffix="_ordered")
        other = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_ordered")) for name in read)
        wrong = joined.select(other.sum()).collect().item()
    wrong += ordered.select((pl.col("token").diff() < 0).sum()).collect().item()
    return Check("values by token", run.manifest.tables["values"].rows, wrong, 0.0)
