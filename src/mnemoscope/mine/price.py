"""What a build would take, from a few seconds of it on this device: time by stage, memory, disk, and what does not fit.

Each stage does what it does in a build, on a little of it, and what that took is multiplied: batches of the text are
mined, some values and keys are read through the vocabulary, and row groups as large as those of the run are drawn from
what came out, written and weighed. How much there is of each is counted, and not measured.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mnemoscope.arguments import check_build, check_least
from mnemoscope.errors import RunError
from mnemoscope.mine import kept_values, loop, values
from mnemoscope.mine.build import vocabulary_rows
from mnemoscope.mine.kernel import BINS, COARSE_OCTAVES, SUB_BINS
from mnemoscope.mine.places import HISTOGRAM_EDGES, HISTOGRAM_SHARE
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, Nulls, recipe
from mnemoscope.records import ContextBatch
from mnemoscope.results import BuildPrice
from mnemoscope.run.schemas import GROUP_ROWS, GROUP_ROWS_DEFAULT, SCHEMAS, arrow_table
from mnemoscope.run.writing import TableWriter
from mnemoscope.text import corpus
from mnemoscope.text.corpus import Corpus
from mnemoscope.text.plan import BATCH_TOKENS, SHARD_TOKENS, Plan
from mnemoscope.text.tabular import Document
from mnemoscope.text.tokenizer import encode

SECONDS = 4.0  # that mining and reading values are tried, each
COUNTED = 5.0  # seconds that documents are counted
PLANNED = 300_000  # tokens: a text of no more is planned as in the build
PART = 50_000  # tokens that are planned of a longer one
_FIRST = 64  # tokens, or neurons, of a first try, which warms up
_KEPT = 64  # documents whose tokens are counted
_LONGEST = 20_000  # characters of these
_HASHED = 1 << 25  # bytes that are hashed to know how long that takes


@dataclass(frozen=True)
class _TextPrice:
    """A text: how much there is, and a plan of all of it or of a part."""

    plan: Plan
    tokens: int
    contexts: int
    shards: int
    open_end: bool  # there is more of it than was counted
    seconds: float


def price(
    model: Model,
    text: Corpus,
    folder: Path = Path(),
    *,
    top: int = 50,
    nulls: Sequence[str] = DEFAULT,
    workers: int = 1,
    devices: int | None = None,
) -> BuildPrice:
    """What `build` would take of this model and text, with the same arguments; nothing is kept of what is tried.

    folder   where the run is to be: how much space there is
    devices  how many there are such as the model's own, each with processes of its own; those that it was loaded for
             if None

    Errors as of `build`.
    """
    check_build(top, nulls, workers)
    several = len(model.devices) if model.device.type != "cpu" else 0  # of this machine; processors are one
    devices = max(1, several) if devices is None else devices
    check_least("planning a build", 1, RunError, devices=devices)
    import duckdb  # noqa: F401 - what a build imports by and by is there when memory is looked at
    import pyarrow.dataset  # noqa: F401

    began, high = time.perf_counter(), _high()
    model = model.encoder if text.target_column is None else model
    model.check_tokenizer()
    before = _resident()
    with tempfile.TemporaryDirectory(prefix="mnemoscope-") as scratch, model.running():
        read = _read(model, text, Path(scratch))
        mined = _Mined(model, Nulls.of(model, recipe(model, nulls)), top)
        mined.tried(read.plan, Path(scratch))
        reading = _reading(model)
        tables = _Tables(mined.state, model, read, top, Path(scratch) / "x" / "y")
        disk, writing = tables.weighed()
    seconds = {
        "planning": read.seconds,
        "mining": mined.seconds(read) / read.shards * math.ceil(read.shards / devices),
        "reading values": reading.seconds,
        "writing tables": writing,
    }
    state = mined.state_bytes(read.shards)
    processes = several or (max(1, workers // devices) if model.device.type != "cpu" else workers)
    resident = max(before, mined.resident - mined.state_bytes(1))
    libraries = max(0, resident - _weights(model)) if processes > 1 else 0
    memory = {
        "model and libraries": resident + (processes - 1) * libraries,
        "what is mined": processes * state,
        "one batch": processes * mined.batch_bytes,
        "values and keys": reading.bytes,
        "tables": tables.sorting_bytes,
    }
    peak = max(high, sum(memory.values()))  # what a stage gives back does not go back to the system
    begin = time.perf_counter()
    hashlib.sha256(bytes(_HASHED))
    hashing = (time.perf_counter() - begin) / _HASHED * (sum(disk.values()) + _weights(model))
    seconds["writing tables"] += hashing
    work = sum(disk.values()) + disk["values"] + (devices if several else processes * devices) * state
    return BuildPrice(
        model=model.id,
        corpus=text.id,
        device=str(model.device),
        devices=devices,
        dtype=model.dtype,
        tokens=read.tokens,
        open_end=read.open_end,
        contexts=read.contexts,
        shards=read.shards,
        seconds=seconds,
        memory=memory,
        peak=peak,
        disk=disk,
        work=work,
        lacking=tuple(_lacking(model, peak - before, work, folder, read)),
        measured=time.perf_counter() - began,
    )


def _lacking(model: Model, more: int, work: int, folder: Path, read: _TextPrice) -> Iterator[str]:
    """What does not fit, and what to do."""
    free = _available()
    if free is not None and more > free:
        yield (
            f"memory: {more / 1e9:.1f} GB more are needed, and {free / 1e9:.1f} GB are free; take fewer --workers, a "
            "smaller --top, or fewer --nulls"
        )
    while not folder.exists():
        folder = folder.parent
    space = shutil.disk_usage(folder).free
    if work > space:
        yield (
            f"disk: {work / 1e9:.1f} GB are needed while it is built, and {space / 1e9:.1f} GB are free in {folder}; "
            "choose another folder, or a smaller --top"
        )
    if model.device.type == "cuda":
        device_free, _ = torch.cuda.mem_get_info(model.device)
        used = torch.cuda.max_memory_reserved(model.device) - torch.cuda.memory_reserved(model.device)
        if used > device_free:
            yield f"device: {used / 1e9:.1f} GB more are needed, and {device_free / 1e9:.1f} GB are free"
    if read.open_end:
        yield f"the text is longer than the {read.tokens:,} tokens that were counted; give --limit"


# -- text --------------------------------------------------------------------------------------------------


def _read(model: Model, text: Corpus, folder: Path) -> _TextPrice:
    """Count the documents for a while, and plan all of the text if it is short, or a part."""
    begin = time.perf_counter()
    first: list[Document] = []
    drawn: list[str] = []
    characters, generator, finished = 0, random.Random(0), True
    for number, document in enumerate(text.documents):
        characters += len(document.text)
        if characters <= 8 * PART or not first:
            first.append(document)
        place = number if number < _KEPT else generator.randrange(number + 1)
        if place < _KEPT:
            drawn[place : place + 1] = [document.text[:_LONGEST]]
        if time.perf_counter() - begin > COUNTED:
            finished = False
            break
    counting = time.perf_counter() - begin
    per_character = sum(map(len, encode(model.tokenizer, drawn))) / max(1, sum(map(len, drawn)))
    counted = max(2, round(characters * per_character))
    tokens = counted if text.limit is None else text.limit if not finished else min(text.limit, counted)
    whole = finished and tokens <= PLANNED
    begin = time.perf_counter()
    plan = corpus.write_plan(
        _part(text, first, whole, finished),
        model.tokenizer,
        folder,
        context_length=min(model.anatomy.context_length, corpus.CONTEXT_TOKENS),
        start=None if text.target_column is None else model.decoder_start,
    )
    seconds = time.perf_counter() - begin
    if whole:
        return _TextPrice(plan, plan.tokens, plan.contexts, plan.shards, False, seconds)
    length = plan.tokens / plan.contexts
    readings = 3 if finished and text.limit is not None else 0  # to draw documents, and to read them twice
    each = max(seconds - readings * counting, seconds / 10) / plan.tokens
    return _TextPrice(
        plan,
        tokens,
        round(tokens / length),
        max(1, math.ceil(tokens / (SHARD_TOKENS - min(length, SHARD_TOKENS) / 2))),
        not finished and text.limit is None,
        readings * counting + each * tokens,
    )


def _part(text: Corpus, first: list[Document], whole: bool, finished: bool) -> Corpus:
    """The text, or a part of it: drawn as the documents of the whole are, or its first ones."""
    if whole:
        return text
    if finished and text.shuffled is None:
        return replace(text, limit=PART)
    return corpus.load_corpus(
        first, segment=text.segment, limit=PART, text=text.text_column, target=text.target_column
    )


# -- mining ------------------------------------------------------------------------------------------------


class _Mined:
    """What mining a few batches took, and left.

    wholes  (tokens, seconds) of batches; tries of what was cut
    """

    def __init__(self, model: Model, nulls: Nulls, top: int) -> None:
        self._model, self.state = model, RunStatistics.of(model, nulls, top)
        self.wholes: list[tuple[int, float]] = []
        self.tries: list[tuple[int, float]] = []
        self.batch_bytes = self.resident = 0
        self._batch_tokens = 1.0  # of one, on average
        self._shard_seconds = self._save_seconds = 0.0

    def tried(self, plan: Plan, scratch: Path) -> None:
        """Mine batches of the first shard, in a drawn order and cut where they would take too long; save the state."""
        batches = list(plan.batches(0))
        self._batch_tokens = sum(batch.n_tokens for batch in batches) / len(batches)
        random.Random(0).shuffle(batches)
        with Capture(self._model) as capture:
            first = _cut(batches[0], _FIRST)
            self._sweep(capture, first)  # what is compiled, and memory that is touched for the first time
            self.resident = _resident()
            self.tries.append((first.n_tokens, self._sweep(capture, first)))
            spent = 0.0
            for batch in batches:
                tokens, seconds = self.tries[-1]
                left = (SECONDS - spent) * tokens / seconds
                piece = batch if batch.n_tokens <= 3 * left else _cut(batch, max(_FIRST, int(left)))
                with _growth() as grown:
                    seconds = self._sweep(capture, piece)
                (self.wholes if piece is batch else self.tries).append((piece.n_tokens, seconds))
                largest = max(piece.tokens.size, min(BATCH_TOKENS, batch.tokens.size))
                self.batch_bytes = max(self.batch_bytes, grown[0] * largest // piece.tokens.size)
                spent += seconds
                if spent >= SECONDS:
                    break
        begin = time.perf_counter()
        self.state.finish_shard(0)
        self._shard_seconds = time.perf_counter() - begin
        self.state.save(scratch / "state.npz")
        self._save_seconds = time.perf_counter() - begin - self._shard_seconds

    def _sweep(self, capture: Capture, batch: ContextBatch) -> float:
        begin = time.perf_counter()
        capture.sweep(batch, self.state.update, self.state.update_rows, self.state.update_rebuilt)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter() - begin

    def seconds(self, read: _TextPrice) -> float:
        """Of the whole text: by whole batches where there were any; else so much for each batch, and for each token."""
        if self.wholes:
            tokens, spent = (sum(column) for column in zip(*self.wholes, strict=True))
            fixed, each = 0.0, spent / tokens
        else:
            (few, short), (many, long) = self.tries[0], max(self.tries)
            each = (long - short) / (many - few) if many > 1.5 * few and long > short else long / many
            fixed = max(0.0, long - each * many)
        batches = math.ceil(read.tokens / self._batch_tokens)
        mining = each * read.tokens + fixed * batches + self._shard_seconds * read.shards
        return mining + self._save_seconds * (1 + mining // loop.CHECKPOINT_SECONDS)

    def state_bytes(self, shards: int) -> int:
        """Of what is mined of so many shards: sums of the last ones wait for each other, a pair for each doubling."""
        arrays = sum(
            array.nbytes
            for statistics in self.state.by_kind.values()
            for array in statistics.state().values()
        )
        cells = sum(len(statistics.cells) for statistics in self.state.by_kind.values())
        return arrays + cells * _NODE * (1 + int(math.log2(shards)))


_NODE = 8 + 4 + 4 * 8  # bytes of the sums of a neuron over some shards: count, pivot, four powers


def _cut(batch: ContextBatch, tokens: int) -> ContextBatch:
    """A batch of about so many tokens, padding included, with the first contexts or the beginning of one."""
    size = batch.tokens.size if batch.targets is None else batch.tokens.size + batch.targets.tokens.size
    if size <= tokens:
        return batch
    length = min(batch.tokens.shape[1], max(tokens, 8))
    rows = slice(0, max(1, tokens // length))
    targets = None if batch.targets is None else _cut(replace(batch.targets, targets=None), tokens // 2)
    if targets is not None:
        rows = slice(0, min(rows.stop, len(targets.contexts)))
        targets = _rows(targets, rows, targets.tokens.shape[1])
    return replace(_rows(batch, rows, length), targets=targets)


def _rows(batch: ContextBatch, rows: slice, length: int) -> ContextBatch:
    return ContextBatch(
        batch.contexts[rows],
        batch.tokens[rows, :length],
        np.minimum(batch.lengths[rows], length).astype(np.int32),
        batch.counted[rows, :length],
    )


# -- values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ReadingPrice:
    seconds: float
    bytes: int


def _reading(model: Model) -> _ReadingPrice:
    """What reading values and keys takes that are not kept: some of a layer's values through the whole vocabulary, and
    all of its keys through a part of it."""
    missing = kept_values.missing(model)
    if not missing:
        return _ReadingPrice(0.0, 0)
    layer = missing[len(missing) // 2]
    block, stack = model.anatomy.layers[layer], model.anatomy.stack_of(layer)
    width = len(block.keys())
    with _growth() as grown:
        vectors = values.bare_tokens(model, stack)
        of_values = _tried(lambda count: values.value_tokens(model, layer, torch.arange(count)), width)
        neurons = torch.arange(width)
        of_keys = _tried(
            lambda count: values._read_keys(model, block, vectors[:count], neurons), len(vectors)
        )
    share = sum(model.anatomy.sizes[layer] for layer in missing) / width
    return _ReadingPrice((of_values + of_keys) * share, grown[0])


def _tried(work: Callable[[int], Any], whole: int) -> float:
    """Seconds that `work` would take of `whole`, from what a part takes more than a smaller one."""
    count, before = min(whole, _FIRST), (0, 0.0)
    work(count)
    while True:
        begin = time.perf_counter()
        work(count)
        seconds = time.perf_counter() - begin
        if count == whole:
            return seconds
        if seconds > SECONDS / 4:
            return (seconds - before[1]) / (count - before[0]) * whole
        before = (count, seconds)
        count = min(whole, max(2 * count, int(count * SECONDS / 2 / max(seconds, 1e-3))))


# -- tables ------------------------------------------------------------------------------------------------


class _Tables:
    """Row groups as those of the run will be, written and weighed."""

    def __init__(self, state: RunStatistics, model: Model, read: _TextPrice, top: int, folder: Path) -> None:
        self._state, self._model, self._read, self._top, self._folder = state, model, read, top, folder
        self._generator = np.random.default_rng(0)
        folder.mkdir(parents=True)
        self._seconds = 0.0
        self._tokens = next(read.plan.batches(0)).tokens.ravel()
        self.sorting_bytes = 0

    def weighed(self) -> tuple[dict[str, int], float]:
        """Bytes of each table, and seconds that writing all of them takes."""
        model, read = self._model, self._read
        layer = model.cells.layers[len(model.cells.layers) // 2]
        begin = time.perf_counter()
        tables = self._state.tables(layer)
        making = time.perf_counter() - begin
        neurons = len(model.cells)
        units = {name: len(each.cells) for name, each in self._state.by_kind.items() if name != "neurons"}
        lists = min(self._top, read.contexts)
        disk = {"neurons": self._of("neurons", self._neurons(tables["neurons"]), neurons)}
        shares = self._shares(tables["neurons"])
        rows = {"histograms": neurons, "samples": round(neurons * self._reached(shares))}
        rows["triggers"] = round(self._filled(tables["triggers"], layer) * 2 * lists * neurons)
        drawn = {
            "histograms": self._histograms(shares),
            "samples": self._samples(round(self._reached(shares))),
            "triggers": self._triggers(tables["triggers"], lists),
        }
        for name, wanted in rows.items():
            disk[name] = self._of(name, drawn[name], wanted)
        if units:
            share = sum(units.values()) / neurons
            null = tables["null_neurons"]
            disk["null_neurons"] = self._of("null_neurons", null, sum(units.values()))
            disk |= {f"null_{name}": round(disk[name] * share) for name in rows}
        if "trigger_weights" in tables:
            disk["trigger_weights"] = self._of(
                "trigger_weights", self._some(tables["trigger_weights"]), rows["triggers"]
            )
        listed = neurons * 2 * min(values.VALUE_TOKENS, model.anatomy.vocabulary)
        of_values = self._values(layer)
        disk["values"] = self._of("values", of_values, listed)
        disk["values_by_token"] = self._of("values_by_token", self._by_token(of_values), listed)
        scale = read.tokens / read.plan.tokens
        disk["contexts"] = round(read.plan.contexts_file.stat().st_size * scale)
        disk["documents"] = round(read.plan.documents_file.stat().st_size * scale)
        vocabulary = vocabulary_rows(model)
        disk["vocabulary"] = self._of("vocabulary", vocabulary, vocabulary.num_rows)
        shards = self._state.neurons.shard_rows()
        disk["shards"] = self._of("shards", shards, read.shards * len(model.cells.layers))
        self.sorting_bytes = min(_SORTING, listed * _SORTED)
        made = making * (rows["triggers"] / max(1, tables["triggers"].num_rows))
        return disk, self._seconds + made + listed * _SORT_SECONDS

    def _of(self, name: str, rows: pa.Table, count: int) -> int:
        """Bytes of so many rows such as these, written in groups; the seconds are added up."""
        group = min(max(1, rows.num_rows), GROUP_ROWS.get(name, GROUP_ROWS_DEFAULT))
        empty, full = self._folder / "empty.parquet", self._folder / "full.parquet"
        with TableWriter(name, empty, group):
            pass
        begin = time.perf_counter()
        with TableWriter(name, full, None) as table:
            for start in range(0, rows.num_rows, group):
                table._write(rows.slice(start, group).select(SCHEMAS[name].names).cast(SCHEMAS[name]))
        seconds = time.perf_counter() - begin
        fixed = empty.stat().st_size
        each = (full.stat().st_size - fixed) / max(1, rows.num_rows)
        self._seconds += seconds * count / max(1, rows.num_rows)
        return round(fixed + each * count)

    def _some(self, rows: pa.Table, count: int = GROUP_ROWS_DEFAULT) -> pa.Table:
        """Rows drawn with replacement."""
        return rows.take(self._generator.integers(0, max(1, rows.num_rows), count if rows.num_rows else 0))

    def _filled(self, triggers: pa.Table, layer: int) -> float:
        """Which share of the lists of a layer is filled, of as many contexts as there were."""
        columns = [triggers[name].to_numpy().astype(np.int64) for name in ("neuron", "polarity", "context")]
        contexts = max(1, len(np.unique(columns[2])))
        distinct = len(np.unique(np.stack(columns, 1), axis=0))  # of what is tried twice
        return min(1.0, distinct / (2 * min(self._top, contexts) * self._model.cells.sizes[layer]))

    def _triggers(self, rows: pa.Table, length: int) -> pa.Table:
        """Lists of the length that they will have, with contexts from all of the text."""
        cells = -(-GROUP_ROWS_DEFAULT // (2 * length))
        drawn, count = self._some(rows, cells * 2 * length), cells * 2 * length
        if not rows.num_rows:
            return rows
        columns = {
            "layer": 1,
            "neuron": np.repeat(np.arange(cells), 2 * length),
            "polarity": np.tile(np.repeat([1, -1], length), cells),
            "rank": np.tile(np.arange(length), 2 * cells),
            "context": self._generator.integers(0, self._read.contexts, count),
        }
        made = arrow_table("triggers", columns, partial=True)
        for name in ("coefficient", "position", "next_token", "gate_sign", "up_sign"):
            made = made.append_column(name, drawn[name])
        return made

    def _samples(self, each: int) -> pa.Table:
        """So many samples of every neuron, from anywhere in the text."""
        each = max(1, each)
        cells = -(-GROUP_ROWS_DEFAULT // each)
        generator, count = self._generator, cells * each
        columns = {
            "layer": 1,
            "neuron": np.repeat(np.arange(cells), each),
            "bin": np.tile(np.arange(each), cells),
            "coefficient": generator.standard_normal(count, dtype=np.float32),
            "context": generator.integers(0, self._read.contexts, count),
            "position": generator.integers(1, max(2, self._read.tokens // self._read.contexts), count),
            "next_token": generator.choice(self._tokens, count),
        }
        return arrow_table("samples", columns)

    def _shares(self, rows: pa.Table) -> np.ndarray:
        """f64[neuron bin]: how often a coefficient falls into each bin, if it is spread as Laplace says."""
        mean, std = (np.nan_to_num(rows[name].to_numpy())[:, None] for name in ("mean", "std"))
        edge = (HISTOGRAM_EDGES[None, 1:-1] - mean) * math.sqrt(2) / np.maximum(std, 1e-30)
        below = 0.5 + 0.5 * np.sign(edge) * -np.expm1(-np.abs(edge))
        return np.diff(below, axis=1, prepend=0.0, append=1.0)

    def _reached(self, shares: np.ndarray) -> float:
        """How many bins of samples a neuron reaches, on average."""
        place = np.arange(BINS) - BINS // 2
        coarse = np.sign(place) * -(-np.abs(place) // (COARSE_OCTAVES * SUB_BINS))
        coarse = np.add.reduceat(shares, np.flatnonzero(np.diff(coarse, prepend=-BINS)), axis=1)
        return float((1 - (1 - coarse) ** self._selected).sum(1).mean())

    def _histograms(self, shares: np.ndarray) -> pa.Table:
        """Counts of neurons that are spread like this."""
        shares = shares[: GROUP_ROWS["histograms"]]
        counts = self._generator.multinomial(self._selected, shares)
        return arrow_table("histograms", {"layer": 1, "neuron": np.arange(len(counts)), "counts": counts})

    @property
    def _selected(self) -> int:
        """Tokens of the contexts of which histograms and samples are taken."""
        return max(1, round(self._read.tokens * HISTOGRAM_SHARE))

    def _neurons(self, rows: pa.Table) -> pa.Table:
        """With what reading values adds."""
        generator = self._generator
        numbers = partial(generator.standard_normal, dtype=np.float32)
        tokens = partial(generator.integers, 0, self._model.anatomy.vocabulary)
        shape = (rows.num_rows, values.KEY_TOKENS)
        singles = ("value_norm", "key_norm", "value_max_probability", "value_entropy")
        added: dict[str, Any] = {name: numbers(rows.num_rows) for name in singles}
        added |= {"up_norm": numbers(rows.num_rows) if self._model.anatomy.gated else None}
        for suffix in ("", "_negative"):
            added |= {f"key_tokens{suffix}": tokens(shape), f"key_coefficients{suffix}": numbers(shape)}
        made = arrow_table("neurons", added, partial=True)
        for name in made.column_names:
            rows = rows.append_column(name, made[name])
        return rows

    def _values(self, layer: int) -> pa.Table:
        """Rows of `values` of some neurons."""
        count = min(2 * _FIRST, self._model.anatomy.sizes[layer])
        tokens, logits = values.value_tokens(self._model, layer, torch.arange(count))
        neuron, end, rank = np.indices(tokens.shape)
        columns = {
            "layer": layer,
            "neuron": neuron.ravel(),
            "polarity": np.where(end.ravel() == 0, 1, -1),
            "rank": rank.ravel(),
            "token": tokens.ravel(),
            "logit": logits.ravel(),
            "probability": np.exp(logits - logits.max((1, 2), keepdims=True) - 1.5).ravel(),
        }
        return arrow_table("values", columns)

    def _by_token(self, rows: pa.Table) -> pa.Table:
        """The same rows as they lie between those of all other neurons, by token."""
        cells, count = self._model.cells, rows.num_rows
        layer, neuron = cells.place(self._generator.integers(0, len(cells), count))
        order = (
            np.arange(count) * self._model.anatomy.vocabulary // max(1, len(cells) * 2 * values.VALUE_TOKENS)
        )
        columns = {"layer": layer, "neuron": neuron, "token": order}
        made = arrow_table("values_by_token", columns, partial=True)
        mixed = rows.take(self._generator.permutation(count))
        for name in ("polarity", "rank", "logit", "probability"):
            made = made.append_column(name, mixed[name])
        return made


_SORTED = 60  # bytes of a row while DuckDB sorts values by token, at most so many in all:
_SORTING = 1_000_000_000
_SORT_SECONDS = 4e-7  # of a row, as measured on one core


_GROUP = Path("/sys/fs/cgroup")

# -- memory ------------------------------------------------------------------------------------------------


def _status(name: str) -> int | None:
    """Bytes of a line of what the kernel knows of this process; None where there is no such kernel."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
    return None


def _high() -> int:
    """The most bytes that this process has held."""
    if (known := _status("VmHWM")) is not None:
        return known
    with suppress(ImportError):
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0


def _resident() -> int:
    """The bytes that it holds now."""
    return _status("VmRSS") or _high()


@contextmanager
def _growth() -> Iterator[list[int]]:
    """How many bytes more than at its beginning the block holds at most; where it cannot be told, more than ever."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the most that was held
    before, grown = _resident(), [0]
    try:
        yield grown
    finally:
        grown[0] = max(0, _high() - before)


def _weights(model: Model) -> int:
    return sum(each.nbytes for each in model.hf.parameters() if each.device.type == "cpu")


def _available() -> int | None:
    """Bytes that processes may take; None where that is not known."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
        with suppress(OSError, ValueError):  # of a container or a job of a queue
            held, most = (int((_GROUP / name).read_text()) for name in ("memory.current", "memory.max"))
            free = min(free, most - held)
        return free
    return None
