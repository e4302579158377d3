"""What the tables of a run say of each other: laws of every run, looked at without its model.

text      the tokens are those that were planned (sha256); contexts, documents and shards count them alike
order     lists have ranks from 0 on without a gap, the strongest first, with the sign that they are listed under
extremes  the largest and the smallest coefficient of a neuron are those of its first triggers
tokens    of a neuron are those of its layer's shards, or of its expert
totals    the power sums of neurons are those of the shards
bins      histograms of a layer hold equally many; there is an example of every part of a range that has any
by token  `values_by_token` are the rows of `values`, in the order in which tokens are looked up
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import polars as pl

from mnemoscope.location import parquet
from mnemoscope.mine.kernel import BINS, COARSE, COARSE_BINS
from mnemoscope.mine.places import coarse_bin_of
from mnemoscope.results import Check
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import numbers

UNIT = ["layer", "neuron"]
_TOTALS = 1e-6  # relative: power sums of neurons are standardised and back, in fp64


def laws(run: Run) -> Iterator[Check]:
    """Each law as a check of whole tables."""
    held = run.manifest.tables
    kinds = [of for of in ("", "null_") if f"{of}neurons" in held]
    yield _text(run)
    yield from (_in_order(run, name) for name in ("triggers", "null_triggers", "values") if name in held)
    if "trigger_weights" in held:
        yield _weights(run)
    yield from (_extremes(run, of) for of in kinds)
    yield _tokens(run)
    yield _totals(run)
    yield from (_bins(run, of) for of in kinds)
    yield _by_token(run)


def unit(table: str) -> list[str]:
    """The columns that name a unit in a table."""
    return ["kind", *UNIT] if table.startswith("null_") else UNIT


def titled(text: str, table: str) -> str:
    """The name of a check of a table."""
    return f"{text} (null units)" if table.startswith("null_") else text


def differences(stored: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """f64[...]: relative differences, where nothing counts as smaller than a thousandth of the largest of a column, and
    what is undefined in one alone is infinitely far off."""
    size = np.abs(stored)
    scale = np.maximum(size, np.nanmax(size, axis=0, initial=0.0) * 1e-3)
    with np.errstate(invalid="ignore"):
        difference = np.abs(stored - fresh) / np.where(scale > 0, scale, 1.0)
    difference = np.where(np.isnan(difference), np.inf, difference)
    return np.where(np.isnan(stored) & np.isnan(fresh), 0.0, difference)


# -- the text ----------------------------------------------------------------------------------------------


def _text(run: Run) -> Check:
    corpus, model = run.manifest.corpus, run.manifest.model
    step = 1 if corpus.target is None else 2  # a text, and what is written beside it
    digest, wrong, tokens = hashlib.sha256(), 0, 0
    counts: list[list[int]] = []
    counted: list[list[int]] = []
    context, document, start = 0, -1, -1
    with parquet(run.file("contexts")) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group).combine_chunks()
            ids, documents, starts = (numbers(rows[name]) for name in ("context", "document", "start"))
            lists = rows["tokens"].chunk(0)
            flat, lengths = lists.flatten().to_numpy(), np.diff(lists.offsets.to_numpy())
            digest.update(_spelled(flat, lengths))
            units, begins = documents[::step], starts[::step]
            more = np.diff(units, prepend=document)
            wrong += int((ids != np.arange(context, context + len(ids))).sum() + (begins < 0).sum())
            wrong += int(
                (~np.isin(more, (0, 1)) | ((more == 0) & (np.diff(begins, prepend=start) <= 0))).sum()
            )
            if step == 2:
                wrong += int((documents[1::2] != units).sum() + (starts[1::2] != 0).sum())
            context, document, start = context + len(ids), int(units[-1]), int(begins[-1])
            tokens += len(flat)
            each = _counted(flat, lengths, run.manifest.options["special"])
            counts.append([len(units)] * step)
            counted.append([int(each[place::step].sum()) for place in range(step)])
    shards = run.table("shards").collect()
    stack = (shards["layer"].to_numpy() >= model.encoder_layers).astype(int) * (step - 1)
    places = (np.minimum(shards["shard"].to_numpy(), len(counts) - 1), stack)
    wrong += int((shards["contexts"].to_numpy() != np.array(counts)[places]).sum())
    wrong += int((shards["tokens"].to_numpy() != np.array(counted)[places]).sum())
    wrong += shards.height != len(counts) * len(model.cells.layers)
    numbered = pl.col("document") != pl.int_range(pl.len())
    wrong += run.table("documents").select(numbered.sum()).collect().item()
    said = (corpus.contexts, corpus.tokens, corpus.counted, corpus.documents, corpus.sha256)
    read = (context, tokens, sum(map(sum, counted)), document + 1, digest.hexdigest())
    wrong += sum(before != now for before, now in zip(said, read, strict=True))
    wrong += run.manifest.tables["documents"].rows != corpus.documents
    return Check("text", tokens, wrong, 0.0, "" if said[-1] == read[-1] else "other tokens than were planned")


def _spelled(flat: np.ndarray, lengths: np.ndarray) -> bytes:
    """What the hash of a plan is taken over: of each context how many tokens it has (8 bytes), then these (4 each)."""
    out = np.zeros(len(flat) + 2 * len(lengths), "<i4")
    heads = np.cumsum(lengths) - lengths + 2 * np.arange(len(lengths))
    rest = np.ones(len(out), bool)
    rest[heads] = rest[heads + 1] = False
    out[heads], out[rest] = lengths, flat
    return out.tobytes()


def _counted(flat: np.ndarray, lengths: np.ndarray, special: list[int]) -> np.ndarray:
    """i64[context]: tokens that count."""
    first = np.cumsum(lengths) - lengths
    counts = ~np.isin(flat, special)
    counts[first] = False
    return np.add.reduceat(counts, first, dtype=np.int64)


# -- lists -------------------------------------------------------------------------------------------------


def _in_order(run: Run, table: str) -> Check:
    value = "logit" if table == "values" else "coefficient"
    lists, strength = [*unit(table), "polarity"], pl.col(value) * pl.col("polarity")
    follows = pl.all_horizontal(pl.col(lists) == pl.col(lists).shift()).fill_null(False)
    before = strength.shift()
    wrong = (strength > before) | (pl.col("rank") != pl.col("rank").shift() + 1)
    first = pl.col("rank") != 0
    of_text = pl.lit(False)
    if table != "values":  # what a value suppresses most may have any logit
        wrong |= (strength == before) & (pl.col("context") <= pl.col("context").shift())
        of_text = strength <= 0
    rows = run.table(table).select((pl.when(follows).then(wrong).otherwise(first) | of_text).sum()).collect()
    name = "values in order" if table == "values" else titled("triggers in order", table)
    return Check(name, run.manifest.tables[table].rows, rows.item(), 0.0)


def _weights(run: Run) -> Check:
    """Each trigger of a mixture has its router's weight."""
    place = [*UNIT, "polarity", "rank"]
    frames = (run.table(name).select(place) for name in ("triggers", "trigger_weights"))
    listed, weighed = (frame.select(pl.struct(place).hash().sum()).collect().item() for frame in frames)
    rows = run.manifest.tables["trigger_weights"].rows
    return Check("weights of triggers", rows, int(listed != weighed), 0.0)


def _extremes(run: Run, of: str) -> Check:
    units = unit(f"{of}neurons")
    rows = run.table(f"{of}neurons").select(*units, pl.col("min", "max").fill_nan(None))
    first = run.table(f"{of}triggers").filter(pl.col("rank") == 0)
    for polarity, column in ((1, "max"), (-1, "min")):
        side = first.filter(pl.col("polarity") == polarity).select(
            *units, pl.col("coefficient").alias(f"{column}_first")
        )
        rows = rows.join(side, on=units, how="left")
        reached = pl.when(pl.col(column) * polarity > 0).then(column)
        rows = rows.with_columns(reached.ne_missing(pl.col(f"{column}_first")).alias(f"{column}_wrong"))
    wrong = rows.select(pl.col("max_wrong", "min_wrong").sum()).collect().row(0)
    return Check(
        titled("extremes", f"{of}neurons"), run.manifest.tables[f"{of}neurons"].rows, sum(wrong), 0.0
    )


# -- numbers -----------------------------------------------------------------------------------------------


def _tokens(run: Run) -> Check:
    """Of every neuron, and of null units that are no experts', how many tokens it was counted at."""
    cells, wrong = run.manifest.model.cells, 0
    of_layer = dict(run.table("shards").group_by("layer").agg(pl.col("tokens").sum()).collect().iter_rows())
    expected = np.array([of_layer.get(layer, 0) for layer in range(len(cells.sizes))], np.int64)[cells.each()]
    if "experts" in run.manifest.tables:
        experts = run.table("experts").collect()
        for row in experts.iter_rows(named=True):
            start = cells.of(row["layer"]).start + row["neuron"]
            expected[start : start + row["neurons"]] = row["tokens"]
            wrong += row["tokens"] > of_layer.get(row["layer"], 0)
        shares = experts["tokens"] / pl.Series([of_layer.get(layer, 0) or None for layer in experts["layer"]])
        wrong += int(shares.ne_missing(experts["routed_fraction"]).sum())
    layers, neurons = cells.place(np.arange(len(cells)))
    columns = {"layer": layers.astype(np.int16), "neuron": neurons.astype(np.int32), "expected": expected}
    stored = run.table("neurons").select(*UNIT, "tokens").collect()
    both = stored.join(pl.DataFrame(columns), on=UNIT, how="full")
    wrong += int(both["tokens"].ne_missing(both["expected"]).sum())
    if "null_neurons" in run.manifest.tables and not cells.experts:
        nulls = run.table("null_neurons").select("layer", "tokens").collect()
        wrong += int(
            (nulls["tokens"].to_numpy() != [of_layer.get(layer, 0) for layer in nulls["layer"]]).sum()
        )
    return Check("tokens", stored.height, wrong, 0.0)


def _totals(run: Run) -> Check:
    """Sums over a layer's neurons of the first four powers, from their standardised moments, against its shards'."""
    names = ["sum", "sum_squares", "sum_cubes", "sum_fourths"]
    shards = run.table("shards").group_by("layer").agg(pl.col(names).sum())
    tokens, mean, std, skewness, kurtosis = (
        pl.col(name).cast(pl.Float64).fill_nan(0).fill_null(0)
        for name in ("tokens", "mean", "std", "skewness", "kurtosis")
    )
    powers = (
        mean,
        std**2 + mean**2,
        skewness * std**3 + 3 * mean * std**2 + mean**3,
        (kurtosis + 3) * std**4 + 4 * mean * skewness * std**3 + 6 * mean**2 * std**2 + mean**4,
    )
    again = [(power * tokens).sum().alias(f"{name}_again") for name, power in zip(names, powers, strict=True)]
    joined = shards.join(run.table("neurons").group_by("layer").agg(again), on="layer").collect()
    difference = differences(
        joined.select(names).to_numpy(), joined.select(f"{name}_again" for name in names).to_numpy()
    )
    # Another order of summation: not bit for bit, and not meant to be.
    return Check("totals over the shards", difference.size, int((difference > _TOTALS).sum()), 0.0)


def _bins(run: Run, of: str) -> Check:
    wrong = sum(_bins_of(run, of, layer) for layer in run.manifest.model.cells.layers)
    rows = run.manifest.tables[f"{of}histograms"].rows
    wrong += abs(rows - run.manifest.tables[f"{of}neurons"].rows)
    return Check(titled("histograms and examples", f"{of}neurons"), rows, wrong, 0.0)


def _bins_of(run: Run, of: str, layer: int) -> int:
    units = unit(f"{of}neurons")
    neurons, histograms, samples = (
        run.table(f"{of}{name}").filter(pl.col("layer") == layer)
        for name in ("neurons", "histograms", "samples")
    )
    stored = histograms.join(neurons.select(*units, "tokens"), on=units).collect()
    counts = matrix(stored["counts"])
    sizes = counts.sum(1)
    wrong = int((counts < 0).sum() + (sizes > stored["tokens"].to_numpy()).sum())
    if not run.manifest.model.cells.experts:  # which are counted over the tokens that were routed to them
        wrong += int((sizes != np.median(sizes)).sum())
    parts = np.zeros((len(counts), COARSE_BINS), np.int64)
    np.add.at(parts.T, COARSE, counts.T)
    rows = (
        stored.select(units)
        .with_row_index("row")
        .join(samples.select(*units, "bin", "coefficient").collect(), on=units)
    )
    wrong += int((coarse_bin_of(rows["coefficient"].to_numpy()) != rows["bin"].to_numpy()).sum())
    there = np.zeros_like(parts, bool)
    there[rows["row"].to_numpy(), np.clip(rows["bin"].to_numpy(), 0, COARSE_BINS - 1)] = True
    return wrong + int((there != (parts > 0)).sum())


def matrix(counts: pl.Series) -> np.ndarray:
    """i64[row bin] of a column of histograms; what has other bins has none."""
    whole = counts.list.len() == BINS
    return (
        pl.select(pl.when(whole).then(counts).otherwise(pl.lit([0] * BINS, pl.List(pl.Int64))))
        .to_series()
        .explode()
        .to_numpy()
        .reshape(-1, BINS)
    )


def _by_token(run: Run) -> Check:
    key, read = [*UNIT, "polarity", "rank"], ["token", "logit", "probability"]
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
