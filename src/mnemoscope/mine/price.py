"""What a build would take, from a few seconds of it on this device: time by stage, memory, disk, and what does not fit.

Each stage does what it does in a build, on a little of it, and what that took is multiplied: batches of the text are
mined with some layers, some values and keys are read through the vocabulary, and rows such as those of the run are
drawn, written and weighed. How much there is of each is counted, and not measured: also of a model of which no more
than an outline is here.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from mnemoscope import memory
from mnemoscope.arguments import check_build, check_least
from mnemoscope.errors import RunError
from mnemoscope.mine import drawn, kept_values, loop
from mnemoscope.mine.drawn import TablePrice
from mnemoscope.mine.tries import (
    MiningTry,
    ReadingTry,
    layers_to_try,
    of_tried_layers,
    try_mining,
    try_reading,
)
from mnemoscope.model import devices as devices_here
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, recipe, sizes_of, units_of
from mnemoscope.model.outline import Outline
from mnemoscope.records import Cells, Progress
from mnemoscope.results import BuildPrice
from mnemoscope.text import corpus
from mnemoscope.text.corpus import Corpus
from mnemoscope.text.plan import SHARD_TOKENS, Plan
from mnemoscope.text.tabular import Document
from mnemoscope.text.tokenizer import encode

COUNTED = 5.0  # seconds that documents are counted
PLANNED = 300_000  # tokens: a text of no more is planned as in the build
PART = 50_000  # tokens that are planned of a longer one
ROOM = 0.7  # of the free memory that weights to try with may take
_KEPT = 64  # documents whose tokens are counted
_LONGEST = 20_000  # characters of these
_HASHED = 1 << 25  # bytes that are hashed to know how long that takes
_WORKER = "from mnemoscope.mine import loop, statistics; from mnemoscope import memory; print(memory.high())"


@dataclass(frozen=True)
class TextPrice(drawn.TextSize):
    """A text: how much there is, and a plan of all of it or of a part.

    padded, batches  tokens of all batches, padding included, and how many there are
    open_end         there is more of it than was counted
    seconds          to plan it
    """

    padded: int
    batches: int
    open_end: bool
    seconds: float


@dataclass(frozen=True)
class _Counted:
    """What is counted of a model, whether its weights are here or not.

    cells    units by kind, its own and null ones
    weights  bytes
    """

    model: Model
    top: int
    kinds: Sequence[str]
    cells: Mapping[str, Cells]
    weights: int

    @classmethod
    def of(cls, model: Model, weights: int, top: int, kinds: Sequence[str]) -> _Counted:
        parts, made = model.anatomy, recipe(model, kinds)
        units = dict(drawn.kinds_of(model, sizes_of(parts, units_of(parts, made))))
        return cls(model, top, kinds, units, weights)

    @property
    def null_units(self) -> dict[str, int]:
        """How many there are, by kind."""
        return {kind: len(cells) for kind, cells in self.cells.items() if kind != "neurons"}

    def state(self, shards: int) -> int:
        """Bytes of what is mined of so many shards."""
        return drawn.state_bytes(self.cells, self.top, self.model.anatomy.n_layers, shards)


def price(
    source: Model | Outline,
    text: Corpus,
    folder: Path = Path(),
    *,
    top: int = 50,
    nulls: Sequence[str] = DEFAULT,
    workers: int = 1,
    devices: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> BuildPrice:
    """What `build` would take of this model and text, with the same arguments; nothing is kept of what is tried.

    source   a model, or an outline of one, some layers of which are then drawn at random to be run
    folder   where the run is to be: how much space there is
    devices  how many there are such as the model's own: each mines a part and reads the values of some layers (`build
             --shard`) with processes of its own, and one of them adds up and does the rest (`merge`); None: those of
             this machine that the model was loaded for, one process on each
    report   called with a `Progress` before each step

    Errors as of `build`.
    """
    check_build(top, nulls, workers)
    model = source.model if isinstance(source, Outline) else source
    several = len(model.devices) if model.device.type != "cpu" else 0  # of this machine; processors are one
    devices = max(1, several) if devices is None else devices
    workers = 1 if several else workers
    check_least("planning a build", 1, RunError, devices=devices)
    import duckdb  # noqa: F401 - what a build imports by and by is there when memory is looked at
    import pyarrow.dataset  # noqa: F401

    began, high = time.perf_counter(), memory.high()
    before, free, there = memory.resident(), memory.available(), devices_here.free(model.device)
    outlined = isinstance(source, Outline)
    weights = source.bytes if isinstance(source, Outline) else _bytes(source)
    if not outlined:
        model.refresh()
    whole = model.encoder if text.target_column is None else model
    whole.check_tokenizer()
    say = report or (lambda _: None)
    counted = _Counted.of(whole, weights, top, nulls)
    with tempfile.TemporaryDirectory(prefix="mnemoscope-") as name:
        say(Progress("trying", 0, 3, "steps"))  # the text, layers, rows
        read = _read(whole, text, Path(name))
        say(Progress("trying", 1, 3, "steps"))
        tried = _tried(source, counted, read, workers, Path(name))
        mined, reading = tried or (None, None)
        say(Progress("trying", 2, 3, "steps"))
        tables = drawn.weigh(
            whole, counted.null_units, read, top, routed=1.0 if mined is None else mined.routed,
            signed=mined is None or mined.signed, folder=Path(name),
        )  # fmt: skip
    say(Progress("trying", 3, 3, "steps"))
    here = _Here(whole.device, workers, devices, max(1, several))
    held = here.memory(counted, read, mined, reading, tables)
    peak = here.peak(held) if outlined else max(high, here.peak(held))
    work = sum(tables.disk.values()) + tables.disk["values"] + workers * devices * held["what is mined"]
    said = BuildPrice(
        model=whole.id,
        corpus=text.id,
        device=str(whole.device),
        devices=devices,
        dtype=whole.dtype,
        random=outlined,
        neurons=len(whole.cells),
        weights=weights,
        tokens=read.tokens,
        open_end=read.open_end,
        contexts=read.contexts,
        shards=read.shards,
        seconds={}
        if mined is None or reading is None
        else here.seconds(counted, read, mined, reading, tables, None if outlined else _missing(whole)),
        divided={"mining": min(devices, read.shards), "reading values": here.readers(whole)},
        memory=held,
        on_device=here.on_device(counted, mined, reading),
        peak=peak,
        rows=dict(tables.rows),
        disk=dict(tables.disk),
        work=work,
        lacking=(),
        measured=time.perf_counter() - began,
    )
    return replace(said, lacking=tuple(_lacking(said, source, max(0, peak - before), (free, there), folder)))


def _bytes(model: Model) -> int:
    """Of the weights, wherever they are."""
    return sum(weight.nbytes for weight in model.hf.parameters())


def _missing(model: Model) -> float:
    """The share of the neurons whose values are not kept from an earlier run."""
    if not any(kept_values.folder().glob("*")):
        return 1.0  # without a hash of all weights
    sizes = model.anatomy.sizes
    return sum(sizes[layer] for layer in kept_values.missing(model)) / sum(sizes)


def _lacking(
    said: BuildPrice, source: Model | Outline, more: int, rooms: tuple[int | None, int | None], folder: Path
) -> Iterator[str]:
    """What does not fit, why, and what to do.

    more   bytes of memory that are needed beside what is taken; rooms, what is free of it, and on the device
    """
    free, there = rooms
    if not said.seconds and isinstance(source, Outline):
        least = source.size(layers_to_try(source.model.anatomy), alike=True)
        yield (
            f"time: the fewest layers that show what all take are {least / 1e9:.1f} GB with the vocabulary, more than "
            "is free here, so that nothing was tried; plan it on a machine that holds these"
        )
    if free is not None and more > free:
        largest = sorted(said.memory.items(), key=lambda entry: -entry[1])[:2]
        holders = " and ".join(f"{name} {count / 1e9:.1f} GB" for name, count in largest)
        yield (
            f"memory: {more / 1e9:.1f} GB more are needed ({holders}), and {free / 1e9:.1f} GB are free; take fewer "
            "--workers, a smaller --top, fewer --nulls, or a machine with more"
        )
    while not folder.exists():
        folder = folder.parent
    space = shutil.disk_usage(folder).free
    if said.work > space:
        yield (
            f"disk: {said.work / 1e9:.1f} GB are needed while it is built, and {space / 1e9:.1f} GB are free in "
            f"{folder}; choose another folder, or a smaller --top"
        )
    if said.on_device:
        stages = [said.on_device[name] for name in ("one batch", "values and keys")]  # one after the other
        needed = sum(said.on_device.values()) - min(stages) - (0 if said.random else said.weights)
        if there is not None and needed > there:
            yield (
                f"device: {needed / 1e9:.1f} GB more are needed on {said.device} (weights {said.weights / 1e9:.1f}), "
                f"which has {there / 1e9:.1f} GB free; spread it over several (--device all), or take a smaller one"
            )
    if said.open_end:
        yield f"the text is longer than the {said.tokens:,} tokens that were counted; give --limit"


def _tried(
    source: Model | Outline, counted: _Counted, read: TextPrice, workers: int, scratch: Path
) -> tuple[MiningTry, ReadingTry] | None:
    """What is tried on this device, with as many threads as a worker has; None where not even one layer of each kind
    fits."""
    parts = counted.model.anatomy
    if isinstance(source, Outline) and not _drew(source, layers_to_try(parts)):
        return None
    # What was drawn is seen anew.
    model = of_tried_layers(replace(counted.model) if isinstance(source, Outline) else counted.model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, threads // workers))
        made = recipe(counted.model, counted.kinds)
        with model.running():
            mined = try_mining(model, parts, made, counted.top, read.plan, scratch)
            torch.set_num_threads(threads)
            return mined, try_reading(model, parts)
    finally:
        torch.set_num_threads(threads)


def _drew(outline: Outline, layers: int) -> bool:
    """Whether there is room for weights to try with; of a mixture perhaps for those of one expert."""
    device = outline.model.device
    free = memory.available() if device.type == "cpu" else devices_here.free(device)
    for alike in (False, True):
        if free is None or outline.size(layers, alike=alike) <= ROOM * free:
            outline.draw(layers, alike=alike)
            return True
    return False


@dataclass(frozen=True)
class _Here:
    """So many processes on each of so many devices, of which so many are of one machine."""

    device: torch.device
    workers: int
    devices: int
    together: int

    @property
    def beside(self) -> int:
        """Processes that mine on one machine."""
        return self.workers * self.together

    def readers(self, model: Model) -> int:
        """Devices that have a layer to read the values of: one process on each, which uses it whole."""
        return min(self.devices, len(model.cells.layers))

    def seconds(
        self,
        counted: _Counted,
        read: TextPrice,
        mined: MiningTry,
        reading: ReadingTry,
        tables: TablePrice,
        missing: float | None,
    ) -> dict[str, float]:
        """By stage; stages follow one another. Weights are hashed before, in between and after, twice as bf16.

        missing  the share of the neurons whose values are not kept; None: nothing is known of them, nor kept
        """
        rate, files = _hashing(), self.workers * self.devices
        as_bf16 = rate * counted.weights * (0.5 if counted.model.dtype == "fp32" else 1.0)
        spent = {"planning": read.seconds + as_bf16, "mining": self._mining(read, mined)}
        if files > 1:
            spent["adding up"] = files * mined.loading + (files - 1) * mined.adding
        layers, readers = len(counted.model.cells.layers), self.readers(counted.model)
        starting = _worker()[1] if self.together > 1 and missing != 0 else 0.0
        own = math.ceil(layers / readers) / layers * (1.0 if missing is None else missing)
        spent["reading values"] = starting + reading.seconds(own) + rate * counted.weights
        spent["writing tables"] = tables.seconds + rate * sum(tables.disk.values()) + as_bf16
        return spent

    def _mining(self, read: TextPrice, mined: MiningTry) -> float:
        """Whole shards, shared out: processes that share a device, or threads, do not do more than these can."""
        each = mined.seconds(read.padded, read.batches) / read.shards + mined.shard
        of_part = math.ceil(read.shards / self.devices)
        workers = min(self.workers, of_part)
        at_once = torch.get_num_threads() if self.device.type == "cpu" else 1
        rounds = math.ceil(of_part / workers) * max(1.0, workers / at_once)
        spent = mined.once + each * rounds
        saves = min(math.ceil(of_part / workers), 1 + int(spent // loop.CHECKPOINT_SECONDS))
        starting = max(1.0, workers / torch.get_num_threads()) * _worker()[1] if self.workers > 1 else 0.0
        return starting + spent + saves * mined.saving

    def memory(
        self,
        counted: _Counted,
        read: TextPrice,
        mined: MiningTry | None,
        reading: ReadingTry | None,
        tables: TablePrice,
    ) -> dict[str, int]:
        """Bytes on one machine, by what holds them."""
        state = counted.state(read.shards)
        beside = memory.resident() if mined is None else mined.beside
        worker = _worker()[0] if self.beside > 1 else 0
        on_cpu = self.device.type == "cpu"
        return {
            "libraries": beside + self.beside * worker,
            "weights": counted.weights if on_cpu else 0,
            "null units": 0 if mined is None or not on_cpu else mined.nulls,
            "what is mined": state,
            "states of other processes": (self.beside - 1) * state,
            "batches": self.beside * (0 if mined is None else mined.batch),
            "values and keys": 0 if reading is None else self.together * reading.bytes,
            "tables": tables.bytes,
        }

    def peak(self, held: Mapping[str, int]) -> int:
        """The most at once: what is given back does not go back to the system, but is there for the next stage; what
        other processes had does, as they end."""
        always = sum(held[name] for name in ("libraries", "weights", "null units", "what is mined"))
        added = held["what is mined"] if self.workers * self.devices > 1 else 0  # one beside another
        stages = max(held["values and keys"], held["tables"])
        if self.beside == 1:
            return always + held["batches"] + max(added, stages)
        return always + max(held["states of other processes"] + held["batches"], added, stages)

    def on_device(
        self, counted: _Counted, mined: MiningTry | None, reading: ReadingTry | None
    ) -> dict[str, int]:
        """Bytes on an accelerator, by what holds them; nothing on a CPU."""
        if self.device.type == "cpu":
            return {}
        nulls, batch = (0, 0) if mined is None else (mined.nulls, mined.on_device)
        read = 0 if reading is None else max(0, reading.on_device - nulls)  # which are not there any more
        return {"weights": counted.weights, "null units": nulls, "one batch": batch, "values and keys": read}


@lru_cache(maxsize=1)
def _worker() -> tuple[int, float]:
    """Bytes that a process takes without a model, and seconds until it has begun."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _WORKER], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout), time.perf_counter() - begin


def _hashing() -> float:
    """Seconds for each byte that is hashed."""
    begin = time.perf_counter()
    hashlib.sha256(bytes(_HASHED))
    return (time.perf_counter() - begin) / _HASHED


# -- text --------------------------------------------------------------------------------------------------


def _read(model: Model, text: Corpus, folder: Path) -> TextPrice:
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
    padded, batches = _padded(plan)
    if whole:
        return TextPrice(plan.tokens, plan.contexts, plan.shards, plan, padded, batches, False, seconds)
    length = plan.tokens / plan.contexts
    readings = 3 if finished and text.limit is not None else 0  # to draw documents, and to read them twice
    each = max(seconds - readings * counting, seconds / 10) / plan.tokens
    return TextPrice(
        tokens,
        round(tokens / length),
        max(1, math.ceil(tokens / (SHARD_TOKENS - min(length, SHARD_TOKENS) / 2))),
        plan,
        round(padded * tokens / plan.tokens),
        math.ceil(batches * tokens / plan.tokens),
        not finished and text.limit is None,
        readings * counting + each * tokens,
    )


def _padded(plan: Plan) -> tuple[int, int]:
    """Tokens of all batches, padding included, and how many batches there are."""
    every = [batch for shard in range(plan.shards) for batch in plan.batches(shard)]
    targets = sum(batch.targets.tokens.size for batch in every if batch.targets is not None)
    return sum(batch.tokens.size for batch in every) + targets, len(every)


def _part(text: Corpus, first: list[Document], whole: bool, finished: bool) -> Corpus:
    """The text, or a part of it: drawn as the documents of the whole are, or its first ones."""
    if whole:
        return text
    if finished and text.shuffled is None:
        return replace(text, limit=PART)
    return corpus.load_corpus(
        first, segment=text.segment, limit=PART, text=text.text_column, target=text.target_column
    )
