"""Reading values by layers that processes share out: the same whoever reads them and whatever is killed."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp
from families import FAMILIES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import RunError, RunMismatch
from mnemoscope.mine import build as building
from mnemoscope.mine import kept_values, loop, parts, values
from mnemoscope.mine.build import build
from mnemoscope.mine.layers import ValueReading
from mnemoscope.mine.loop import Portion, Processes
from mnemoscope.model.model import Model
from mnemoscope.records import Progress

Layer = tuple[int, pa.Table, pa.Table]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept from other tests."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama for two processors, which are one."""
    return replace(
        mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer()), devices=(torch.device("cpu"),) * 2
    )


@pytest.fixture
def reading(model: Model, tmp_path: Path) -> ValueReading:
    """Nothing is read yet."""
    (tmp_path / "run" / ".work").mkdir(parents=True)
    return ValueReading(model, tmp_path / "run" / ".work")


def held(reading: ValueReading) -> list[list[Any]]:
    """What was read, in the order of layers."""
    return [[each.to_pydict() for each in reading.tables(layer)] for layer in reading.model.cells.layers]


def defined(model: Model) -> list[list[Any]]:
    """What is to be read: all layers in turn, as `values` gives them."""
    every = values.layers(model, model.cells.layers)
    return [
        [rows.to_pydict(), columns.drop_columns(["layer", "neuron"]).to_pydict()]
        for _, rows, columns in every
    ]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that are read of the model, as they are."""
    told, layer = list[int](), values.read_layer

    def watched(model: Model, number: int, *rest: Any) -> Any:
        told.append(number)
        return layer(model, number, *rest)

    monkeypatch.setattr(values, "read_layer", watched)
    return told


# -- Whoever reads -----------------------------------------------------------------------------------------------


def test_layers_are_read_as_they_are_asked_for(reading: ValueReading, read: list[int]) -> None:
    """In any order, one after another, and none before it is wanted; each is told when it is whole."""
    wanted = defined(reading.model)
    read.clear()
    done: list[int] = []

    def pieces() -> Iterator[int]:
        for number, layer in enumerate((2, 0, 1)):
            assert read == [2, 0][:number] and len(done) == number
            yield layer

    reading.do(reading.file(0), pieces(), done.append)
    assert done == [1, 1, 1] and reading.unread(reading.model.cells.layers) == []
    assert held(reading) == wanted


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_layers_out(
    reading: ValueReading, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on each device, whatever the number of processes that mine; each takes the next layer when it is free, and
    what is read is the same."""
    started: list[int] = []

    def spawn(job: Any, workers: int, blocks: list[list[int]], tell: Callable[[int], None]) -> None:
        started.append(workers)
        assert blocks == [[0], [1], [2]]
        news: Any = queue.Queue()
        for number in range(workers):  # every second layer, the last ones first
            tasks: Any = queue.Queue()
            for task in (*blocks[number::workers][::-1], None):
                tasks.put(task)
            loop._work(job, number, torch.device("cpu"), 1, tasks, news)
        loop._listen(job.doing, [None] * workers, news, tell)

    monkeypatch.setattr(loop, "_spawn", spawn)
    done: list[int] = []
    threads = torch.get_num_threads()
    try:
        Processes(processes).read(reading, [0, 1, 2], done.append)
    finally:
        torch.set_num_threads(threads)
    assert started == ([] if processes == 1 else [2]) and sum(done) == 3
    assert held(reading) == defined(reading.model)
    alone = ValueReading(replace(reading.model, devices=()), reading.folder)
    Processes(processes).read(alone, [0, 1, 2], done.append)
    assert len(started) == (processes > 1), "processes on one device would wait for each other"


def test_what_is_kept_is_not_shared_out(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine reads what neither this build nor an earlier run has; all of it is told of all layers."""
    for layer, *_ in kept_values.layers(model, [1]):
        assert layer == 1
    asked: list[list[int]] = []
    alone = replace(model, devices=())

    class Watched(Processes):
        def read(self, reading: loop.Job, layers: list[int], tell: Callable[[int], None]) -> None:
            asked.append(layers)
            super().read(reading, layers, tell)

    def stop(step: Progress) -> None:
        if (step.stage, step.done) == ("reading values", 2):
            raise KeyboardInterrupt

    steps: list[Progress] = []
    with pytest.raises(KeyboardInterrupt):
        build(alone, texts(12), tmp_path / "run", top=2, nulls=(), engine=Watched(), report=stop)
    kept_values.folder().rename(tmp_path / "gone")
    run = build(alone, texts(12), tmp_path / "run", top=2, nulls=(), engine=Watched(), report=steps.append)
    assert asked == [[0, 2], [2]]
    told = [step for step in steps if step.stage == "reading values"]
    assert [(step.done, step.total) for step in told] == [(2, 3), (3, 3)]
    once = build(alone, texts(12), tmp_path / "once", top=2, nulls=(), engine=Processes())
    assert run.manifest.tables == once.manifest.tables


# -- What fails --------------------------------------------------------------------------------------------------


def test_a_layer_that_fails_is_named(reading: ValueReading, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with what failed where; what it says behind the line is for who asks."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(values, "read_layer", fail)
    tasks, news = queue.Queue[Any](), queue.Queue[Any]()
    for task in ([2], None):
        tasks.put(task)
    loop._work(reading, 0, torch.device("cpu"), torch.get_num_threads(), tasks, news)
    with pytest.raises(RunError) as caught:
        loop._listen(reading.doing, [None], news, lambda _: None)
    assert str(caught.value).startswith(
        "reading values: layer 2 failed by OutOfMemoryError: CUDA out of memory. Tried"
    )
    assert "\n" not in str(caught.value) and "run the same command again" in str(caught.value)
    assert "read_layer" in str(caught.value.__cause__)


class Waiting(ValueReading):
    """Reads one layer, and is then about to read the next for as long as it is left alone."""

    def do(self, file: Path, pieces: Iterable[int], tell: Callable[[int], None], *_: Any) -> None:
        def slowly() -> Iterator[int]:
            for number, piece in enumerate(pieces):
                time.sleep(600 * number)
                yield piece

        super().do(file, slowly(), tell)


@pytest.mark.slow
def test_processes_that_are_killed_cost_the_layers_that_they_read(
    reading: ValueReading, read: list[int], tmp_path: Path
) -> None:
    """A line says so; what is written is whole, and only the rest is read again."""
    told: list[int] = []

    def kill(more: int) -> None:
        for process in mp.active_children():
            process.kill()
        told.append(more)

    layers = list(reading.model.cells.layers)
    with pytest.raises(RunError, match=r"^reading values: a worker process was ended by SIGKILL[^\n]*$"):
        Processes(2).read(Waiting(reading.model, reading.folder), layers, kill)
    left = reading.unread(layers)
    assert len(told) <= len(layers) - len(left) <= 2
    kept_values.folder().rename(tmp_path / "gone")
    Processes().read(reading, left, told.append)
    assert read == left and held(reading) == defined(reading.model)


# -- Parts -------------------------------------------------------------------------------------------------------


def test_every_part_reads_some_layers(model: Model, tmp_path: Path, read: list[int]) -> None:
    """Each layer is read by one of them; a merge reads none, and what a part had read it does not read again."""
    path, alone = tmp_path / "run", replace(model, devices=())
    for number, layers in ((3, [2]), (0, []), (1, [0]), (1, [])):
        parts.mine(alone, texts(12), path, Portion(number, 4), top=2, nulls=())
        assert read == layers
        read.clear()
    kept_values.folder().rename(tmp_path / "gone")
    parts.mine(alone, texts(12), path, Portion(2, 4), top=2, nulls=())
    run = parts.merge(path, alone)
    assert read == [1]
    once = build(alone, texts(12), tmp_path / "once", top=2, nulls=())
    assert run.manifest.tables == once.manifest.tables


def test_a_merge_reads_no_layer_on_another_kind_of_device(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last bits would be others; where all layers are read, any device will do."""
    path, alone = tmp_path / "run", replace(model, devices=())
    parts.mine(alone, texts(12), path, Portion(0, 1), top=2, nulls=())
    monkeypatch.setattr(building, "hardware", lambda _: "cuda (H200)")
    columns = path / ".work" / "columns-0001.part"
    columns.rename(tmp_path / "elsewhere")
    with pytest.raises(RunMismatch, match=r"with device = cpu, and device = cuda \(H200\) was given"):
        parts.merge(path, alone)
    (tmp_path / "elsewhere").rename(columns)
    assert parts.merge(path, alone).manifest.options["device"] == "cpu"
