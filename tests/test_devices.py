"""Several devices: which are meant, one process on each, and what is too large for one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from pretended import pretending
from tiny import model_folder, texts, tokenizer
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope.cli import app
from mnemoscope.errors import ModelError, RunError, RunMismatch
from mnemoscope.mine import build as building
from mnemoscope.mine import loop
from mnemoscope.mine.build import build
from mnemoscope.mine.layers import ValueReading
from mnemoscope.model import devices
from mnemoscope.model import load as loading
from mnemoscope.model.model import Model
from mnemoscope.text import plan as planning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def two(folder: Path) -> Model:
    """A model for two processors, which are one."""
    return mn.load_model(folder, dtype="fp32", device="cpu,cpu")


def hashes(run: mn.Run) -> dict[str, str]:
    return {name: table.sha256 for name, table in run.manifest.tables.items()}


# -- Which devices are meant -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cuda:0,cpu", "are devices of several kinds, whose sums differ"),
        ("cpu,gpu", "is not a device"),
        ("all,cpu", "is not a device"),
        ("cpu,", "is not a device"),
        ("all", "there is none that this build of torch can use; give auto or cpu"),
        ("cuda:0,cuda:7", "is not there"),
    ],
)
def test_devices_that_cannot_be_had_are_one_line(
    names: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their name, in Python and on the command line."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ModelError, match=words) as refused:
        devices.named(names)
    named = "cuda:0" if "cuda:7" in names else names
    assert f"device='{named}'" in str(refused.value) and "\n" not in str(refused.value)
    failed = CliRunner().invoke(app, ["build", "model", "--corpus", "x.txt", "-o", "run", "--device", names])
    assert isinstance(failed.exception, ModelError)
    assert f"--device {named}" in failed.exception.on_command_line()


def test_all_are_the_accelerators_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as torch counts; devices of two names would add up otherwise, and are refused."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    assert devices.named("all") == tuple(torch.device("cuda", index) for index in range(3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("H200", "A100", "A100")[device.index])
    with pytest.raises(ModelError, match=r"are cuda \(A100\) and cuda \(H200\), whose sums differ"):
        devices.named("all")


# -- A process on each -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_are_the_same_on_any_number_of_devices(
    folder: Path, two: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two of a loaded model, and two that `build` is asked for: every byte of every table."""
    monkeypatch.setattr(planning, "SHARD_TOKENS", 200)
    spawned: list[tuple[str, int]] = []
    spawn = loop._spawn

    def watched(job: Any, workers: int, *rest: Any) -> None:
        spawned.append((job.doing, workers))
        spawn(job, workers, *rest)

    monkeypatch.setattr(loop, "_spawn", watched)
    one = mn.load_model(folder, dtype="fp32", device="cpu")
    assert one.devices == () and two.devices == (torch.device("cpu"),) * 2
    runs = []
    for name, model, device in (("one", one, "auto"), ("two", two, "auto"), ("asked", two.hf, "cpu,cpu")):
        monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / f"cache-{name}"))  # or values are read once
        runs.append(mn.build(model, texts(60), tmp_path / name, top=3, device=device))
    assert runs[0].manifest.options["device"] == "cpu"
    assert spawned == [("mining", 2), ("reading values", 2)] * 2
    assert hashes(runs[0]) == hashes(runs[1]) == hashes(runs[2])


def test_every_process_has_a_device_of_its_own(two: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn; and as many processes as devices, or the line says so."""
    started: list[tuple[Any, ...]] = []

    class Process:
        exitcode, pid = 0, 1

        def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
            started.append(args[1:3])

        def start(self) -> None: ...

        terminate = join = start

    context = loop.mp.get_context("spawn")
    monkeypatch.setattr(type(context), "Process", Process)
    monkeypatch.setattr(loop, "_listen", lambda *_: None)
    places = (torch.device("cuda", 1), torch.device("cuda", 3))
    model = Model(two.hf, two.tokenizer, two.anatomy, "model", devices=places)
    loop._spawn(ValueReading(model, Path("work")), 2, [[0], [1], [2]], lambda _: None)
    assert started == [(0, places[0]), (1, places[1])]
    assert (
        building.processes(model, 1) == building.processes(model, 2) == 2
        and building.processes("gpt2", 3) == 3
    )
    with pytest.raises(
        RunError, match="was loaded for 2 devices, each of which has one; leave workers=3 out"
    ):
        building.processes(model, 3)


def test_a_cluster_gives_its_processes_their_devices(two: Model, tmp_path: Path) -> None:
    """And takes no list of this machine's."""
    with pytest.raises(RunError, match="of this machine; give one"):
        mn.build(two, texts(5), tmp_path / "run", engine="ray")


@pytest.mark.parametrize("kinds", [("random", "rotated"), ("shuffled", "chimera", "covariance")])
def test_what_is_made_of_a_model_is_made_anew_where_it_is_put(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Put on another device it is proven there, and nothing of what is mined stays behind: the run is the CPU's."""
    text, whole = texts(12), mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    expected = build(whole, text, tmp_path / "cpu", top=3, nulls=kinds)
    moved: list[bool] = []

    class Moving(loop.Processes):
        def mine(self, mining: Any, shards: list[int], tell: Callable[[int], None]) -> Any:
            mining = mining.placed(pretence.device)
            moved.append(mining.model.device == pretence.device)
            return super().mine(mining, shards, tell)

    with pretending() as pretence:
        model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
        found = build(model, text, tmp_path / "moved", top=3, nulls=kinds, engine=Moving())
        assert moved == [True]
        assert model.move(pretence.device) is False and model.self_check <= 1e-5
    for name in ("triggers", "null_triggers", "histograms"):
        assert expected.table(name).collect().equals(found.table(name).collect()), name


def test_what_was_begun_on_another_kind_of_device_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums would be added up with others; what is finished is opened by either."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    monkeypatch.setattr(loop, "run_shards", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(model, texts(12), tmp_path / "run", top=2, nulls=())
    monkeypatch.undo()
    monkeypatch.setattr(building, "hardware", lambda _: "cuda (H200)")
    with pytest.raises(RunMismatch, match=r"with device = cpu, and device = cuda \(H200\) was given"):
        build(model, texts(12), tmp_path / "run", top=2, nulls=())
    monkeypatch.undo()
    run = build(model, texts(12), tmp_path / "run", top=2, nulls=())
    monkeypatch.setattr(building, "hardware", lambda _: "cuda (H200)")
    assert build(model, texts(12), tmp_path / "run", top=2, nulls=()).manifest == run.manifest


# -- What is too large for one -----------------------------------------------------------------------------------


def test_what_one_device_does_not_hold_is_spread_or_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bytes of its weights and what is free: on each, over all of them, or nowhere, in one line."""
    config = loading.AutoConfig.from_pretrained(folder)
    where = loading.Where.of(str(folder), None, False, lambda _: None)
    size = sum(weight.nbytes for weight in FAMILIES["llama"]().parameters())
    places = tuple(torch.device("cuda", index) for index in range(2))

    def asked(*free: int | None) -> dict[str, Any]:
        monkeypatch.setattr(devices, "free", lambda place: free[place.index])
        return loading._spread(
            where, loading.AutoModelForCausalLM, config, torch.float32, places[: len(free)]
        )

    assert asked(None, None) == {} and asked(2 * size, 2 * size) == {}
    spread = asked(2 * size, size)
    assert spread["device_map"] == "auto" and spread["max_memory"] == {
        0: int(2 * size / 1.1),
        1: int(size / 1.1),
    }
    for free in ((size,), (size // 3, size // 3)):
        with pytest.raises(ModelError, match=r"do not fit: cuda:0 has .* free; give more of them") as refused:
            asked(*free)
        assert f"{size:,} bytes" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_spread_model_is_proven_and_mined_by_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate spreads, here over the processor and a file, closes at load and gives the same run."""
    size = sum(weight.nbytes for weight in FAMILIES["llama"]().parameters())
    keywords = {
        "device_map": "auto", "max_memory": {"cpu": size * 2 // 3}, "offload_folder": str(tmp_path / "offload"),
    }  # fmt: skip
    whole = mn.load_model(folder, dtype="fp32", device="cpu")
    monkeypatch.setattr(loading, "_spread", lambda *_: keywords)
    model = mn.load_model(folder, dtype="fp32", device="cpu,cpu")
    assert loading.is_spread(model.hf) and model.devices == () and model.self_check <= 1e-5
    expected, found = (
        mn.build(each, texts(12), tmp_path / name, top=3) for each, name in ((whole, "a"), (model, "b"))
    )
    assert hashes(expected) == hashes(found)


def test_a_plan_counts_the_devices_that_a_model_is_for(two: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of accelerators; two processors are one. A number that is given says otherwise."""
    assert mn.plan(two, texts(8), nulls=()).devices == 1
    with pretending() as pretence:
        model = mn.load_model(FAMILIES["llama"]().to(pretence.device), tokenizer=tokenizer())
        model.devices = (pretence.device,) * 2
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        assert mn.plan(model, texts(8), nulls=()).devices == 2
        assert mn.plan(model, texts(8), nulls=(), devices=4).devices == 4
