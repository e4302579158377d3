"""Mining on a Ray cluster: who does what when processes are lost, and what is said where there is none. With a cluster:
`test_faults.py`."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.arguments import check_engine
from mnemoscope.errors import ActivationError, RunError
from mnemoscope.mine import loop
from mnemoscope.mine.cluster import TRIES, Ray, _blocks, _cpus_each, _packed, _Process, _share_out, _unpacked
from mnemoscope.mine.layers import ValueReading
from mnemoscope.model.nulls import Nulls, recipe
from mnemoscope.text.corpus import write_plan


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True).map(sorted), st.integers(1, 40))
def test_every_shard_is_in_one_block(shards: list[int], workers: int) -> None:
    """In order; no process has more blocks than so many, and none of them is empty."""
    blocks = _blocks(shards, workers)
    assert [shard for block in blocks for shard in block] == shards
    assert all(blocks) and len(blocks) <= 8 * workers
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@given(st.lists(st.integers(0, 64), max_size=6), st.integers(1, 80))
def test_cores_are_shared_out(machines: list[int], workers: int) -> None:
    """All processes find a place where they can, and with one core more for each they would not."""
    each = _cpus_each(machines, workers)
    places = [sum(cores // size for cores in machines) for size in (each, each + 1)]
    assert each >= 1 and (places[0] >= workers or each == 1) and places[1] < workers


NAMES = ("mining", "shard")


class Pretended:
    """As much of Ray as `_share_out` asks for. A process is lost on a block as often as `losses` says."""

    class exceptions:  # noqa: N801 - as it is spelled there
        class RayActorError(Exception): ...

        class RayTaskError(Exception):
            def __init__(self, cause: Exception) -> None:
                self.cause = cause

    def __init__(self, losses: dict[int, int], raising: dict[int, Exception]) -> None:
        self.losses, self.raising = losses, raising
        self.started, self.done, self.do = 0, list[int](), self

    def start(self) -> Any:
        self.started += 1
        return self

    def remote(self, block: list[int]) -> tuple[int, ...]:
        return (self.started, *block)

    def wait(self, asked: list[Any], num_returns: int) -> Any:
        return [asked[-1]], asked[:-1]

    def get(self, answer: tuple[int, ...]) -> None:
        first = answer[1]
        if self.losses.get(first, 0):
            self.losses[first] -= 1
            raise self.exceptions.RayActorError("The actor died.\nmore")
        if first in self.raising:
            raise self.exceptions.RayTaskError(self.raising[first])
        self.done += answer[1:]


def test_what_a_lost_process_had_goes_to_another() -> None:
    """Each block is done once, and a process is started for each that is lost."""
    ray, told = Pretended({0: 2, 4: 1}, {}), list[int]()
    _share_out(ray, ray.start, NAMES, 3, [[0, 1], [2, 3], [4, 5], [6]], told.extend)
    assert sorted(ray.done) == sorted(told) == list(range(7)) and ray.started == 6


def test_a_block_that_loses_every_process_is_named() -> None:
    """In one line, which says what the last one was lost by."""
    ray = Pretended({2: TRIES}, {})
    with pytest.raises(
        RunError,
        match=r"^mining: 3 processes were lost on shards 2 to 3, the last one so: The actor died\.; nothing finished",
    ):
        _share_out(ray, ray.start, NAMES, 2, [[0, 1], [2, 3]], lambda _: None)


def test_what_a_shard_raises_is_raised() -> None:
    """As itself, where it is one of ours; it is not tried again."""
    ray = Pretended({}, {0: ActivationError("layer 2 gave NaN")})
    with pytest.raises(ActivationError, match="layer 2 gave NaN"):
        _share_out(ray, ray.start, NAMES, 1, [[0]], lambda _: None)


def test_a_process_has_its_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the driver's second GPU is put on the one that the process sees, null units and all."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    nulls = Nulls.of(model, recipe(model, ("rotated",)))
    plan = write_plan(mn.load_corpus(texts(5)), tokenizer(), tmp_path, context_length=64)
    mining = loop.Mining(model, plan, loop.StateFactory(nulls.columns, len), tmp_path)
    jobs: list[loop.Job] = [ValueReading(model, tmp_path), mining]
    for job in jobs:
        with monkeypatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:63")
            content, plain = _packed(job), pickle.dumps(job)
        with pytest.raises(RuntimeError, match="CUDA"):
            pickle.loads(plain)
        found = _unpacked(content, "cpu")
        assert found.folder == tmp_path and found.model.device.type == "cpu"
        for one, other in zip(found.model.hf.parameters(), model.hf.parameters(), strict=True):
            assert torch.equal(one, other)


def test_layers_are_read_where_there_is_more_than_this_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processes of a cluster, one layer at a time; on this machine alone by the driver, which uses all cores."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    asked: list[Any] = []

    def share(ray: Ray, job: Any, blocks: Any, workers: int, tell: Callable[..., None]) -> None:
        asked.append((blocks, workers))
        process, threads = _Process(_packed(job), "cpu", "name", 1), torch.get_num_threads()
        for block in blocks:
            process.do(block)
            tell(block)
        torch.set_num_threads(threads)
        process._held.__exit__(None, None, None)

    monkeypatch.setattr(Ray, "_share_out", share)
    tables: list[Any] = []
    for address in (None, "auto"):
        reading, told = ValueReading(model, tmp_path / f"run-{address}" / ".work"), list[int]()
        reading.folder.mkdir(parents=True)
        Ray(2, address).read(reading, [0, 1, 2], told.append)
        assert sum(told) == 3
        tables.append([each.to_pydict() for layer in range(3) for each in reading.tables(layer)])
    assert asked == [([[0], [1], [2]], 2)] and tables[0] == tables[1]


@pytest.mark.parametrize(
    ("engine", "address", "told"),
    [
        ("spark", None, "engine='spark' is none; give processes or ray"),
        ("processes", "auto", "give engine='ray' too"),
    ],
)
def test_what_is_no_engine_is_refused(engine: str, address: str | None, told: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(RunError, match=told):
        check_engine(engine, address)
    with pytest.raises(RunError, match=told):
        mn.build("no-model", ["no text"], "no-folder", engine=engine, address=address)


def test_without_ray_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is read."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'mnemoscope\[ray\]', or build with processes"):
        mn.build("no-model", ["no text"], tmp_path / "run", engine="ray")


def test_a_cluster_that_would_answer_anyone_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads its token when it is imported; one that was, without, is used only where a cluster is at hand."""
    imported = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", imported)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        RunError, match=r"set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before it is imported, or"
    ):
        Ray(2)._imported()
    assert Ray(2, "auto")._imported() is imported and "RAY_AUTH_TOKEN" not in os.environ
    imported.is_initialized = lambda: True
    assert Ray(2)._imported() is imported
    imported.is_initialized = lambda: False
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert Ray(2)._imported() is imported
