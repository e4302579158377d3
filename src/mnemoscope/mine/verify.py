"""Recompute what a run says from the model, and say what differs.

One shard, chosen by a seed, is statistics again with the very batches of the plan, so on the machine that built the run
every number must come out the same bit for bit; elsewhere, within the tolerance of the dtype. Which of the two it is,
the power sums of the shard tell: where they are the stored ones bit for bit, so must be all else that the shard says.

    coefficients  every stored trigger whose context lies in the shard, and no stronger one that is missing;
                  those of null units likewise, which are made again from their recipe
    moments       the power sums of all neurons of every layer in the shard, as stored for it
    ranges        of no neuron and no null unit the shard says more than the run: tokens, extremes, positive ones, bins;
                  of a run of one shard it says all of it
    examples      those that lie in the shard
    values, keys  of a sample of neurons, read again with their norms and entropies
    vocabulary    as the tokenizer has it now

What the tables say of each other is looked at in whole (`laws`), and the sha256 of every table is checked against the
manifest. By their hash alone are known titles and metadata of documents, where in its document the first context of one
starts, and what other jobs added to the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from mnemoscope.arguments import check_verification
from mnemoscope.mine import values
from mnemoscope.mine.build import vocabulary_rows
from mnemoscope.mine.laws import differences, laws, matrix, titled, unit
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import Progress
from mnemoscope.results import Check, Verification
from mnemoscope.run.reading import Run
from mnemoscope.text.plan import batches

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}  # relative, between machines
_READ = 1e-3  # the same of what is read through the vocabulary


@dataclass(frozen=True)
class _Shard:
    """A run, and what one of its shards says by itself.

    tables     those of the shard alone, by name
    contexts   its contexts
    whole      whether the run has no other
    tolerance  0 where its power sums came out bit for bit
    """

    run: Run
    number: int
    tables: dict[str, pl.DataFrame]
    contexts: pl.Series
    whole: bool
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether all of it must come out bit for bit."""
        return self.tolerance == 0

    def kinds(self) -> list[str]:
        """What names of tables begin with: nothing for neurons, and ``null_`` where there are null units."""
        return [of for of in ("", "null_") if f"{of}neurons" in self.tables]


def verify(
    run: Run,
    model: Model,
    *,
    sample: int = 500,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Verification:
    """Recompute a shard and a sample of values; raises RunMismatch when the model is not the run's.

    sample  neurons whose values and keys are read again
    """
    check_verification(sample, seed)
    model = model.as_in(run)
    model.check_built(run, "verifying")
    generator = np.random.default_rng(seed)
    shards = run.table("shards").select(pl.col("shard").max()).collect().item() + 1
    number = int(generator.integers(shards))
    tolerance, say = TOLERANCE[model.dtype], report or (lambda _: None)
    tables, contexts = _mine(run, model, number, say)
    moments = _moments(run, tables["shards"], number, tolerance)
    shard = _Shard(run, number, tables, contexts, shards == 1, tolerance if moments.largest else 0.0)
    checks = _checks(shard, model, moments, tolerance, generator, sample, say)
    return Verification(str(run.path), number, seed, tolerance, tuple(checks))


def _checks(
    shard: _Shard, model: Model, moments: Check, tolerance: float, generator: np.random.Generator, sample: int,
    report: Callable[[Progress], None],
) -> Iterator[Check]:  # fmt: skip
    yield _files(shard.run, report)
    yield moments
    for of in shard.kinds():
        yield _triggers(shard, f"{of}triggers")
        yield _missing(shard, f"{of}triggers")
    yield from (_ranges(shard, of) for of in shard.kinds())
    yield from (_samples(shard, f"{of}samples") for of in shard.kinds())
    yield from _readings(shard.run, model, generator, sample, report)
    if model.units is not None:
        yield _units(shard, tolerance)
    yield _vocabulary(shard.run, model)
    yield from laws(shard.run)


def _mine(
    run: Run, model: Model, shard: int, report: Callable[[Progress], None]
) -> tuple[dict[str, pl.DataFrame], pl.Series]:
    """The tables of one shard alone, and its contexts."""
    options = run.manifest.options
    paired = run.manifest.corpus.target is not None
    work = list(batches(run.file("contexts"), shard, options["special"], paired=paired))
    statistics = RunStatistics.of(model, Nulls.of(model, options.get("nulls")), options["top"])
    total, done = sum(batch.n_tokens for batch in work), 0
    with Capture(model) as capture:
        for batch in work:
            capture.sweep(batch, statistics.update, statistics.update_rows, statistics.update_rebuilt)
            done += batch.n_tokens
            report(Progress("mining again", done, total, "tokens"))
    statistics.finish_shard(shard)
    tables: dict[str, list[pa.Table]] = {"shards": [statistics.neurons.shard_rows()]}
    if model.units is not None:
        tables["units"] = [statistics.rebuilt.rows(model)]
    for layer in statistics.neurons.cells.layers:
        for name, rows in statistics.tables(layer).items():
            tables.setdefault(name, []).append(rows)
    frames = {name: pl.DataFrame(pl.from_arrow(pa.concat_tables(parts))) for name, parts in tables.items()}
    return frames, pl.Series("context", sorted(statistics.neurons.contexts), dtype=pl.Int64)


def _alike(
    name: str,
    stored: pl.DataFrame,
    fresh: pl.DataFrame,
    key: list[str],
    tolerance: float,
    *,
    every: bool = True,
) -> Check:
    """Each stored row beside the fresh one of its key: fractions within the tolerance; without any, all there is.

    every  whether each fresh row must be stored, too
    """
    lost = fresh.join(stored, on=key, how="anti").height if every else 0
    both = stored.join(fresh.with_columns(_again=True), on=key, how="left", suffix="_again")
    wrong, largest = ~both["_again"].fill_null(False).to_numpy(), 0.0
    for column in stored.columns:
        if column in key:
            continue
        first, second = both[column], both[f"{column}_again"]
        if first.dtype.is_float():
            pair = (each.cast(pl.Float64).fill_null(np.nan).to_numpy() for each in (first, second))
            difference = differences(*pair)
            wrong |= difference > tolerance
            largest = max(largest, float(difference.max(initial=0.0)))
        if not tolerance:
            wrong |= first.ne_missing(second).to_numpy()
    return Check(name, stored.height, int(wrong.sum()) + lost, largest)


def _files(run: Run, report: Callable[[Progress], None]) -> Check:
    problems = run.check(report)
    note = "; ".join(f"{problem.table}: {problem.text}" for problem in problems)
    return Check("sha256 of the tables", len(run.manifest.tables), len(problems), 0.0, note)


# -- what the shard says -----------------------------------------------------------------------------------


def _moments(run: Run, fresh: pl.DataFrame, shard: int, tolerance: float) -> Check:
    """Power sums of the shard, each beside the largest that it could be of numbers of that size."""
    stored = run.table("shards").filter(pl.col("shard") == shard).sort("layer").collect()
    fresh, whole, powers = fresh.sort("layer"), ["layer", "contexts", "tokens"], stored.columns[-4:]
    wrong = sum(stored[name].ne_missing(fresh[name]).sum() for name in whole)
    sums, again = (frame.select(powers).to_numpy() for frame in (stored, fresh))
    count = stored["tokens"].to_numpy() * np.array(run.manifest.model.sizes)[stored["layer"].to_numpy()]
    second, fourth = sums[:, 1], sums[:, 3]
    most = np.stack(
        [np.sqrt(count * second), second, np.sqrt(second * fourth), fourth], 1
    )  # Cauchy and Schwarz
    difference = np.abs(sums - again) / np.where(most > 0, most, 1.0)
    note = f"shard {shard}: {int(stored['tokens'][0]):,} tokens x all neurons"
    differing = int(wrong + (difference > tolerance).sum())
    return Check("moments", difference.size, differing, float(difference.max(initial=0.0)), note)


def _listed(rows: pl.LazyFrame, weights: pl.LazyFrame | None) -> pl.LazyFrame:
    """Triggers, with the router's weights where there are any; their ranks are for `laws`."""
    place = ["layer", "neuron", "polarity", "rank"]
    return (rows if weights is None else rows.join(weights, on=place, how="left")).drop("rank")


def _triggers(shard: _Shard, table: str) -> Check:
    """Stored triggers of the shard's contexts against the shard's own top list, which must hold them all."""
    weighed = table == "triggers" and "trigger_weights" in shard.tables
    stored, fresh = (
        _listed(read(table), read("trigger_weights") if weighed else None)
        for read in (shard.run.table, lambda name: shard.tables[name].lazy())
    )
    here = stored.filter(pl.col("context").is_in(shard.contexts.implode())).collect()
    key = [*unit(table), "polarity", "context"]
    return _alike(titled("coefficients", table), here, fresh.collect(), key, shard.tolerance, every=False)


def _missing(shard: _Shard, table: str) -> Check:
    """Triggers of the shard that beat the weakest that is stored, and are not stored."""
    lists = [*unit(table), "polarity"]
    stored = shard.run.table(table)
    weakest = stored.filter(pl.col("rank") == shard.run.manifest.options["top"] - 1)
    absent = (
        shard.tables[table]
        .lazy()
        .join(stored.select(*lists, "context"), on=[*lists, "context"], how="anti")
        .join(weakest.select(*lists, weakest="coefficient"), on=lists, how="left")
        .with_columns(strength=pl.col("coefficient").abs(), bar=pl.col("weakest").abs())
    )
    # A list that is not full has no weakest: everything belongs in it.
    beats = pl.col("bar").is_null() | (pl.col("strength") > pl.col("bar") * (1 + shard.tolerance))
    compared, wrong = absent.select(pl.len(), beats.sum().alias("wrong")).collect().row(0)
    return Check(titled("no trigger is missing", table), compared, wrong, 0.0)


def _samples(shard: _Shard, table: str) -> Check:
    """Stored examples from the shard's contexts, and none in a bin of which the run has no example."""
    name, key = titled("examples", table), [*unit(table), "bin"]
    if not shard.exact:  # what is next to an edge may fall into another bin here
        return Check(name, 0, 0, 0.0, "not compared: the shard does not come out bit for bit on this machine")
    stored, fresh = shard.run.table(table), shard.tables[table]
    here = stored.filter(pl.col("context").is_in(shard.contexts.implode())).collect()
    check = _alike(name, here, fresh, key, 0.0, every=False)
    absent = fresh.join(stored.select(key).collect(), on=key, how="anti").height
    return Check(name, check.compared, check.differing + absent, check.largest)


def _ranges(shard: _Shard, of: str) -> Check:
    """Statistics of every unit: in a run of one shard those of the shard, in others no less than these, nor more than
    they leave to the rest of the text."""
    names = [
        f"{of}neurons",
        f"{of}histograms",
        *(["experts"] if not of and "experts" in shard.tables else []),
    ]
    compared, largest = shard.tables[names[0]].height, 0.0
    if shard.whole and shard.exact:
        checks = [_whole(shard, name) for name in names]
        differing, largest = sum(check.differing for check in checks), max(check.largest for check in checks)
    else:
        differing = sum(_beyond(shard, name) for name in names)
    return Check(titled("ranges and histograms", names[0]), compared, differing, largest)


def _key(table: str) -> list[str]:
    return ["layer", "expert"] if table == "experts" else unit(table)


def _whole(shard: _Shard, table: str) -> Check:
    fresh = shard.tables[table]
    return _alike(table, shard.run.table(table).select(fresh.columns).collect(), fresh, _key(table), 0.0)


def _beyond(shard: _Shard, table: str) -> int:
    """Rows of the shard that say more than the run does, or so little that the rest of the text could not make up."""
    fresh = shard.tables[table]
    stored = shard.run.table(table).select(fresh.columns).collect()
    both = fresh.join(stored, on=_key(table), how="left", suffix="_run")
    if table.endswith("histograms"):
        counts, of_run = matrix(both["counts"]), matrix(both["counts_run"].fill_null([]))
        if not shard.exact:  # what is next to an edge may fall into another bin here
            counts, of_run = counts.sum(1, keepdims=True), of_run.sum(1, keepdims=True)
        return int((counts > of_run).any(1).sum())
    rest = pl.col("tokens_run") - pl.col("tokens")
    wrong = rest.is_null() | (rest < 0)
    if table == "experts":
        for name in ("shared", "neuron", "neurons"):
            wrong |= pl.col(name).ne_missing(pl.col(f"{name}_run"))
    else:
        positive = [pl.col(f"positive_fraction{of}") * pl.col(f"tokens{of}") for of in ("", "_run")]
        more, slack = (
            positive[1] - positive[0],
            pl.col("tokens") * shard.tolerance + 1e-3,
        )  # products of fractions
        reach = pl.max_horizontal(pl.col("max_run").abs(), pl.col("min_run").abs()) * shard.tolerance
        outside = (pl.col("max") > pl.col("max_run") + reach) | (pl.col("min") < pl.col("min_run") - reach)
        wrong |= (pl.col("tokens") > 0) & (outside | (more < -slack) | (more > rest + slack))
    return int(both.select(wrong.sum()).item())


def _units(shard: _Shard, tolerance: float) -> Check:
    """How well units rebuild what they stand for, where the shard is all of the text; else only where they belong."""
    fresh = shard.tables["units"]
    if not shard.whole:
        fresh = fresh.select("layer", "units", "reads", "writes", "activation")
        tolerance = 0.0
    stored = shard.run.table("units").select(fresh.columns).collect()
    return _alike("units", stored, fresh, ["layer"], tolerance)


# -- what the model says without a text --------------------------------------------------------------------


def _readings(
    run: Run, model: Model, generator: np.random.Generator, sample: int, report: Callable[[Progress], None]
) -> Iterator[Check]:
    """Values and keys of a sample of neurons, read again."""
    sample = min(sample, len(model.cells))
    layers, neurons = model.cells.place(np.sort(generator.choice(len(model.cells), sample, replace=False)))
    stored: dict[str, list[pl.DataFrame]] = {"values": [], "neurons": []}
    fresh: dict[str, list[pl.DataFrame]] = {"values": [], "neurons": []}
    chosen = {layer: torch.from_numpy(neurons[layers == layer]) for layer in np.unique(layers).tolist()}
    for done, (layer, rows, columns) in enumerate(values.layers(model, chosen, chosen), start=1):
        report(Progress("reading values again", done, len(chosen), "layers"))
        for name, table in (("values", rows), ("neurons", columns)):
            frame = pl.DataFrame(pl.from_arrow(table))
            fresh[name].append(frame)
            here = (pl.col("layer") == layer) & pl.col("neuron").is_in(chosen[layer].tolist())
            stored[name].append(run.table(name).filter(here).select(frame.columns).collect())
    yield _values(pl.concat(stored["values"]), pl.concat(fresh["values"]), sample)
    yield _keys(pl.concat(stored["neurons"]), pl.concat(fresh["neurons"]))


def _values(stored: pl.DataFrame, fresh: pl.DataFrame, sample: int) -> Check:
    """The tokens of values; only where numbers differ at all may neighbours have changed places."""
    place, token = ["layer", "neuron", "polarity", "rank"], ["layer", "neuron", "polarity", "token"]
    logits = _alike(
        "values", stored.drop("token", "probability"), fresh.drop("token", "probability"), place, 1e-4
    )
    read = _alike("values", stored.drop("token", "logit"), fresh.drop("token", "logit"), place, _READ)
    tokens = stored.join(fresh.select(*place, again="token"), on=place, how="left")
    moved = tokens.filter(pl.col("token").ne_missing(pl.col("again")))
    differing = logits.differing + read.differing
    if logits.largest:
        weakest = fresh.group_by(token[:3]).agg(weakest=pl.col("logit").sort_by("rank").last())
        swapped = moved.join(fresh.select(*token, logit_again="logit"), on=token, how="left").join(
            weakest, on=token[:3]
        )
        other = swapped.select(pl.col("logit_again").fill_null(pl.col("weakest"))).to_series().to_numpy()
        differing += int((differences(swapped["logit"].to_numpy(), other) > 1e-4).sum())
    else:
        differing += moved.height
    note = f"{sample} neurons; {moved.height} tokens at another rank"
    return Check("values", stored.height, differing, logits.largest, note)


def _keys(stored: pl.DataFrame, fresh: pl.DataFrame) -> Check:
    """Norms, entropies, and which tokens switch a neuron on."""
    lists = [name for name, kind in stored.schema.items() if kind == pl.List]
    single = _alike("keys", stored.drop(lists), fresh.drop(lists), ["layer", "neuron"], _READ)
    differing = single.differing
    for tokens in (name for name in lists if "tokens" in name):
        names = [tokens, tokens.replace("tokens", "coefficients")]
        sizes = (frame.select(pl.col(names).list.len()) for frame in (stored, fresh))
        if not next(sizes).equals(next(sizes)):
            differing += 1
            continue
        first, second = (frame.select(names).explode(names) for frame in (stored, fresh))
        numbers = (frame[names[1]].cast(pl.Float64).fill_null(np.nan).to_numpy() for frame in (first, second))
        difference = differences(*numbers)
        differing += int((difference > _READ).sum())
        if not difference.max(initial=0.0):
            differing += int(first[tokens].ne_missing(second[tokens]).sum())
    return Check("norms and keys", stored.height, differing, 0.0)


def _vocabulary(run: Run, model: Model) -> Check:
    """How the tokenizer spells its tokens now."""
    fresh, stored = pl.DataFrame(pl.from_arrow(vocabulary_rows(model))), run.table("vocabulary").collect()
    return _alike("vocabulary", stored, fresh, ["token"], 0.0)
