"""Build a run: one pass of a corpus through a model, kept as tables about every neuron.

Stages, each resumable: plan (text to shards), mining (one pass for all neurons), values (no text needed), writing.
All of it happens under ``.work`` in the run's folder; the manifest is written last, so a folder with a manifest is a
finished run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from mnemoscope import files
from mnemoscope.arguments import check_build
from mnemoscope.errors import ModelChanged, RunError, RunMismatch
from mnemoscope.location import Location, Place, place
from mnemoscope.mine import loop, values
from mnemoscope.mine.device import shortfall
from mnemoscope.mine.layers import ValueReading
from mnemoscope.mine.places import HISTOGRAM_EDGES, HISTOGRAM_SHARE
from mnemoscope.mine.reconstruction import check_place as check_units
from mnemoscope.mine.statistics import RunStatistics, machine
from mnemoscope.model.devices import hardware
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, Nulls, recipe
from mnemoscope.records import SCHEMA_VERSION, CorpusEntry, Progress, other_format
from mnemoscope.run.reading import REBUILD, Run, open_run
from mnemoscope.run.remote import alone, publish, work_folder
from mnemoscope.run.schemas import arrow_table
from mnemoscope.run.writing import RunWriter, check_place, finish_commit, is_finished
from mnemoscope.text import corpus
from mnemoscope.text.corpus import Corpus
from mnemoscope.text.plan import BATCH_TOKENS, SHARD_TOKENS, Plan
from mnemoscope.text.spelling import token_bytes

TOP = 50
_LONG = 10.0  # seconds of reading values from which on it is tried how many they are
_TRIED = 3  # layers; with the first ones much is done but once
_ROW_SECONDS = 4e-7  # of a row of triggers or values: made, written and sorted, on one core
_SHORT = 48  # characters of a value that are shown in a message
EXCLUDED = ["padding", "position 0 of every context", "special tokens"]
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "numba", "pyarrow")


def build(
    model: Model | PreTrainedModel | str | Path,
    text: Corpus | str | Path | list[str],
    path: str | Path | Location,
    *,
    top: int = TOP,
    nulls: Sequence[str] = DEFAULT,
    workers: int = 1,
    engine: loop.Engine | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Run:
    """Build a run, or go on with one that was interrupted; returns it opened.

    model    what `load_model` takes, or its result
    text     what `load_corpus` takes, or its result
    path     the run's folder; one that already holds this very run is opened and returned. For one behind a URL it is
             made in a folder of the cache (`remote.work_folder`), and uploaded when it is finished
    top      triggers kept for each neuron and polarity
    nulls    kinds of `mnemoscope.model.nulls.KINDS`, mined beside the neurons; () for none
    workers  processes; the result is the same bit for bit whatever their number. A model that was loaded for several
             devices has one on each of them
    engine   who mines, if not so many processes; the result is the same here, too
    report   called with a `Progress` after every step

    Of an encoder-decoder the encoder reads each text, and the decoder its target (`load_corpus`); without targets the
    encoder alone is read, and the manifest says so (`ModelEntry.unused`).

    Raises RunMismatch when the folder holds something built from another model, corpus or options.
    """
    check_build(top, nulls, workers)
    if engine is not None and isinstance(model, Model) and model.devices:
        raise RunError(
            "building a run: a cluster gives each of its processes a device of its own, and {device} are of this "
            "machine; give one, and how many processes with {workers}",
            device=",".join(map(str, model.devices)),
            workers=...,
        )
    engine = engine or loop.Processes(processes(model, workers))
    model, text, path, identity = prepared(model, text, path, top, nulls, engine)
    if not is_finished(path):
        folder = work_folder(path)
        with begun(model, folder) as writer:
            if writer is not None:
                Build(model, text, writer, identity, engine, report or (lambda _: None)).run()
        with alone(path):
            if is_finished(folder):  # or another process has just uploaded it, and removed it here
                _check_built(folder, identity)
                publish(folder, path, report)
    return _check_built(path, identity)


def processes(model: object, workers: int) -> int:
    """How many processes mine: one for each device that the model was loaded for, or as many as were asked for."""
    if not isinstance(model, Model) or not model.devices:
        return workers
    each = len(model.devices)
    if workers not in (1, each):
        raise RunError(
            f"building a run: {{workers}} processes were asked for, and {model.id} was loaded for {each} devices, each "
            "of which has one; leave {workers} out",
            workers=workers,
        )
    return each


def _check_built(path: Place, identity: dict[str, Any]) -> Run:
    """The run, opened; `RunMismatch` if it was built otherwise."""
    run = open_run(path)
    compare(run.manifest.options["identity"], identity, f"{path} holds a run that was")
    return run


def prepared(
    model: Model | PreTrainedModel | str | Path,
    text: Corpus | str | Path | list[str],
    path: str | Path | Location,
    top: int,
    nulls: Sequence[str],
    engine: loop.Engine,
) -> tuple[Model, Corpus, Place, dict[str, Any]]:
    """What a build needs, checked: model, text, folder, and what must be the same for a build to be the same."""
    engine.check()  # before the folder is locked, or a process would wait for its parent
    check_place(path)
    model = model if isinstance(model, Model) else load_model(model)
    text = text if isinstance(text, Corpus) else corpus.load_corpus(text)
    if text.target_column is None:
        model = model.encoder
    elif not model.anatomy.stacks:
        raise RunError(
            f"building a run: {model.id} is no encoder-decoder and reads one text; leave {{target_text}} out",
            target_text=text.target_column,
        )
    model.check_tokenizer()
    return model, text, place(path), _identity(model, text, top, recipe(model, nulls))


@contextmanager
def begun(model: Model, path: Path, patience: float = 0.0) -> Iterator[RunWriter | None]:
    """Hold the folder of a run that is not finished; None if another process finished it meanwhile.

    patience  seconds to wait for another process there
    """
    # Before anything there is touched: another process may be in the middle of its commit.
    lock = path / ".lock"
    with loop.locked(lock, path, patience), model.running():
        if finish_commit(path) or is_finished(path):
            yield None
        else:
            with RunWriter(path) as writer:
                yield writer
    if is_finished(path):
        lock.unlink(missing_ok=True)  # whoever waits for it, or makes another, finds the run


@dataclass(frozen=True)
class PlannedText:
    """What a run says of a text that is planned already and is not read again; fields as of `Corpus`."""

    id: str
    source: dict[str, Any]
    segment: str
    limit: int | None
    target_column: str | None
    sampling: str | None

    @classmethod
    def of(cls, identity: dict[str, Any]) -> PlannedText:
        """As the build that planned it was asked."""
        names = ("corpus", "source", "segment", "limit", "target", "sampling")
        return cls(*(identity[name] for name in names))


@dataclass(frozen=True)
class Build:
    """The stages of one build, in order."""

    model: Model
    text: Corpus | PlannedText
    writer: RunWriter
    identity: dict[str, Any]
    engine: loop.Engine
    report: Callable[[Progress], None]

    @property
    def work(self) -> Path:
        """The folder in which the run is made."""
        return self.writer.work

    def run(self) -> None:
        try:
            self._stages()
        except ModelChanged:
            # What was read before the change and after it cannot be told apart.
            shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _stages(self) -> None:
        plan = self.planned()
        loop.wait_for(self.work)
        writing = self._writing_seconds(plan)
        reading = self._reading_seconds()
        statistics = loop.run_shards(
            self.model,
            plan,
            self.states(plan),
            self.work,
            engine=self.engine,
            report=self._before(reading + writing),
        )
        self.read_values(self.model.cells.layers, report=self._before(writing))
        self._write(plan, statistics)
        self.model.check_weights(self.identity["weights_sha256"], f"building {self.writer.path}")
        self.writer.commit(self._manifest(plan, statistics.machines))

    def _before(self, seconds: float) -> Callable[[Progress], None]:
        """Reports of a stage that others follow, which take about so long."""
        return lambda step: self.report(step._replace(after=seconds))

    def _reading_seconds(self) -> float:
        """About how long it takes to read the values and keys that are not read yet; where that is long, by the last of
        the first layers, which are read now."""
        reading = ValueReading(self.model, self.work)
        expected, missing = values.seconds(self.model), reading.unread(self.model.cells.layers)
        if expected < _LONG or not missing:
            return expected * len(missing) / len(self.model.cells.layers)
        first, ends = missing[:_TRIED], [time.monotonic()]

        def tell(_: int) -> None:
            ends.append(time.monotonic())
            self.report(Progress("reading first values", len(ends) - 1, len(first), "layers"))

        reading.do(reading.file(0), first, tell)
        return (ends[-1] - ends[-2]) * max(0, len(missing) - _TRIED)

    def _writing_seconds(self, plan: Plan) -> float:
        listed = min(self.identity["top"], plan.contexts) + 2 * values.VALUE_TOKENS  # values are sorted, too
        return 2 * listed * len(self.model.cells) * _ROW_SECONDS

    def planned(self) -> Plan:
        """The text as shards, made once."""
        self._claim()
        plan = self._plan()
        check_units(self.model, plan.batches(0))
        return plan

    def states(self, plan: Plan) -> loop.StateFactory[RunStatistics]:
        """How what is mined is begun and read back."""
        return _states(self.model, self.identity["nulls"], self.identity["top"], digest(self.identity, plan))

    def _claim(self) -> None:
        """Say what is being built here, or check that it is what was begun, if any of that is finished."""
        file = self.work / "identity.json"
        here = dict(self.identity)
        # Sums of two kinds of device differ in their last bits; merging parts mines none, and may read no values.
        if isinstance(self.text, Corpus) or ValueReading(self.model, self.work).unread(
            self.model.cells.layers
        ):
            here["device"] = _computed_on(self.model.device)
        if file.exists() and (self.work / "plan.json").exists():
            begun = json.loads(file.read_text(encoding="utf-8"))
            version = begun.get("schema_version", 1)  # format 1 did not say so here
            if version != SCHEMA_VERSION:
                reason = other_format(version, SCHEMA_VERSION, REBUILD)
                raise RunError(f"resuming the build in {self.writer.path}: {reason}")
            compare(begun, here, f"{self.writer.path} holds an unfinished run that was")
        else:
            begun = {"schema_version": SCHEMA_VERSION} | here
            files.write(file, json.dumps(begun, indent=1), "writing the run")

    def _plan(self) -> Plan:
        if (self.work / "plan.json").exists():
            return Plan.load(self.work)
        assert isinstance(self.text, Corpus), "parts are merged once there is a plan"
        plan = corpus.write_plan(
            self.text,
            self.model.tokenizer,
            self.work,
            context_length=self.identity["context_length"],
            start=None if self.text.target_column is None else self.model.decoder_start,
            report=self.report,
        )
        for note in plan.notes:
            self.report(Progress("planning", plan.tokens, plan.tokens, "tokens", note))
        return plan

    def read_values(
        self, layers: Sequence[int], stem: str = "values", report: Callable[[Progress], None] | None = None
    ) -> None:
        """Read the values of layers that are not read yet: here what is kept of them, and by the engine what is not.

        stem  of the names of the locks of who reads
        """
        report, reading = report or self.report, ValueReading(self.model, self.work.absolute(), stem)
        unread = reading.unread(layers)
        kept, done = reading.kept(unread), len(layers) - len(unread)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            report(Progress("reading values", done, len(layers), "layers"))

        tell(0)
        if kept:
            reading.do(reading.file(0), kept, tell)
        if left := [layer for layer in unread if layer not in kept]:
            self.engine.read(reading, left, tell)

    def _write(self, plan: Plan, statistics: RunStatistics) -> None:
        """Write all tables, layer by layer."""
        total, reading = self.model.anatomy.n_layers, ValueReading(self.model, self.work)
        for layer in self.model.cells.layers:
            self.report(Progress("writing tables", layer, total, "layers"))
            tables = statistics.tables(layer)
            tables["values"], columns = reading.tables(layer)
            for name in columns.column_names:
                tables["neurons"] = tables["neurons"].append_column(name, columns[name])
            for name, table in tables.items():
                self.writer.append(name, table)
        self.writer.append("shards", statistics.neurons.shard_rows())
        if self.model.units is not None:
            self.writer.append("units", statistics.rebuilt.rows(self.model))
        self.writer.append("vocabulary", vocabulary_rows(self.model))
        # Links, because the plan must stay whole until the commit.
        self.writer.adopt("contexts", _linked(plan.contexts_file))
        self.writer.adopt("documents", _linked(plan.documents_file))
        self.writer.sort_values_by_token()
        self.report(Progress("writing tables", total, total, "layers"))

    def _mined_on(self) -> str:
        """The kind of device."""
        begun = json.loads((self.work / "identity.json").read_text(encoding="utf-8"))
        return begun.get("device", self.model.device.type).partition(" ")[0]

    def _manifest(self, plan: Plan, machines: frozenset[tuple[str, ...]]) -> dict[str, Any]:
        text = self.text
        every = machines or {machine()}
        processors, torches = (", ".join(sorted({*names})) for names in zip(*every, strict=True))
        return {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "mnemoscope": version("mnemoscope"),
            "model": self.model.entry(),
            "corpus": CorpusEntry(
                id=text.id,
                sha256=plan.sha256,
                source=text.source,
                segment=text.segment,
                limit=text.limit,
                documents=plan.documents,
                contexts=plan.contexts,
                duplicates=plan.duplicates,
                tokens=plan.tokens,
                counted=plan.counted,
                target=text.target_column,
                spelling=plan.corpus.get("spelling", ""),
            ),
            "options": {
                "identity": self.identity,
                "top": self.identity["top"],
                "nulls": self.identity["nulls"],
                "dtype": self.model.dtype,
                "attention": str(getattr(self.model.hf.config, "_attn_implementation", None)),
                "device": self._mined_on(),
                "values_lens": values.LENS,
                **({"values_projection": values.PROJECTION} if self.model.anatomy.bands else {}),
                "shard_tokens": SHARD_TOKENS,
                "batch_tokens": BATCH_TOKENS,
                "special": plan.special,
                "sampling": self.identity["sampling"],
                "notes": list(plan.notes),
                "histogram_share": HISTOGRAM_SHARE,
                "histogram_edges": HISTOGRAM_EDGES[1:-1].tolist(),
            },
            "excluded": EXCLUDED,
            "environment": _environment() | {"processor": processors, "torch": torches},
        }


def _computed_on(place: torch.device) -> str:
    """A kind of device, and which of two ways its sums go, where there are two."""
    plain = place.type == "cuda" and shortfall(place) is not None
    return f"{hardware(place)} in plain torch" if plain else hardware(place)


def digest(identity: dict[str, Any], plan: Plan) -> str:
    """A hash of what states must have alike to be of one build: names and places left out."""
    facts = {
        name: identity[name]
        for name in ("weights_sha256", "tokenizer_sha256", "dtype", "units", "top", "nulls")
    }
    return hashlib.sha256(json.dumps([facts, plan.sha256], sort_keys=True).encode()).hexdigest()


def _states(
    model: Model, nulls: dict[str, Any] | None, top: int, build: str
) -> loop.StateFactory[RunStatistics]:
    units = Nulls.of(model, nulls)
    return loop.StateFactory(
        partial(RunStatistics.of, model, units, top, build),
        partial(RunStatistics.load, units, build=build),
        partial(RunStatistics.held, build=build),
        partial(_states, model, nulls, top, build),
    )


def vocabulary_rows(model: Model) -> pa.Table:
    """The rows of `vocabulary`."""
    spelled = token_bytes(model.tokenizer, model.anatomy.vocabulary)
    text, raw, special = zip(*spelled, strict=True)
    columns = {"token": np.arange(len(spelled)), "text": text, "bytes": raw, "special": special}
    return arrow_table("vocabulary", columns)


def _identity(model: Model, text: Corpus, top: int, nulls: dict[str, Any] | None) -> dict[str, Any]:
    """What must be the same for a build to be the same build."""
    units = None if model.units is None else model.units.sha256
    return {
        "model": model.id,
        "weights_sha256": model.weights_sha256,
        "tokenizer_sha256": model.tokenizer_sha256,
        "dtype": model.dtype,
        "units": units,  # None also in runs from before there were any
        "corpus": text.id,
        "source": text.source,
        "segment": text.segment,
        "limit": text.limit,
        "target": text.target_column,
        "sampling": text.sampling,  # not in runs from before it: they hold the first documents
        "context_length": min(model.anatomy.context_length, corpus.CONTEXT_TOKENS),
        "top": top,
        "nulls": nulls,  # None also in runs from before there were any
    }


def compare(held: dict[str, Any], asked: dict[str, Any], holds: str) -> None:
    """`RunMismatch` where what is held was built otherwise than what is asked for."""
    # The id is a name: the same weights loaded by another name are the same model.
    for name, value in asked.items():
        if name in ("sampling", "device") and name not in held:  # as in builds from before
            continue
        if name != "model" and held.get(name) != value:
            path, before, now = _difference(name, held.get(name), value)
            raise RunMismatch(
                f"building a run: {holds} built with {path} = {before}, and {path} = {now} was given; give the "
                "same, or choose another folder"
            )


def _difference(name: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The place where two values differ, by name ("source.files[0].sha256"), and what they are there, in short."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**now, **before}:
            if key not in before or key not in now or before[key] != now[key]:
                return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list) and not _plain(before + now):
        for index, (item, other) in enumerate(zip_longest(before, now)):
            if item != other:
                return _difference(f"{name}[{index}]", item, other)
    texts = [_text(value) for value in (before, now)]
    same = [character == other for character, other in zip(*texts, strict=False)]
    start = next((index for index, equal in enumerate(same) if not equal), len(same))
    return name, _around(texts[0], start), _around(texts[1], start)


def _plain(values: list[Any]) -> bool:
    """Whether a list is short words or numbers, which are clearer all together."""
    return all(not isinstance(value, dict | list) for value in values) and len(json.dumps(values)) <= _SHORT


def _text(value: Any) -> str:
    if isinstance(value, list) and _plain(value):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _around(text: str, index: int) -> str:
    """A value in short, the characters around an index if it is long."""
    if len(text) <= _SHORT:
        return text
    start = max(0, min(index - 8, len(text) - _SHORT))
    return ("…" if start else "") + text[start : start + _SHORT] + ("…" if start + _SHORT < len(text) else "")


def _linked(file: Path) -> Path:
    """A second name for a file, or a copy where the file system has no links."""
    link = file.with_suffix(".link")
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:
        shutil.copyfile(file, link)
    return link


def _environment() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
