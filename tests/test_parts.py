"""A build in parts: in whatever order they are done, it is the run made in one go (killed: `test_faults.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.cli import main
from mnemoscope.errors import RunError, RunMismatch
from mnemoscope.mine import loop, parts
from mnemoscope.mine.loop import Portion
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT, Nulls, recipe
from mnemoscope.text import plan as plans

TEXT = texts(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return mn.load_model(folder, dtype="fp32")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few contexts."""
    monkeypatch.setattr(plans, "SHARD_TOKENS", 32)


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tables of the run made in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "SHARD_TOKENS", 32)
        return tables(mn.build(model, TEXT, tmp_path_factory.mktemp("runs") / "whole"))


def tables(run: mn.Run) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in run.manifest.tables.items()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_are_the_whole(
    model: Model, whole: dict[str, str], tmp_path: Path, order: tuple[int, ...]
) -> None:
    """In any order; nothing is a run before they are merged."""
    path = tmp_path / "run"
    for number in order:
        parts.mine(model, TEXT, path, Portion(number, 3))
        assert not (path / "manifest.json").exists()
    assert tables(mn.merge(path, model)) == whole
    assert tables(mn.merge(path)) == whole, "what is finished is opened"
    parts.mine(model, TEXT, path, Portion(0, 3))  # nothing is left to do


def test_a_run_says_on_what_its_parts_were_computed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever machine merges them: the last bits of two kinds of processor are not the same."""
    path = tmp_path / "run"
    for number, processor in enumerate(("AVX512", "AVX2")):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda processor=processor: processor)
        parts.mine(model, TEXT, path, Portion(number, 2))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    manifest = mn.merge(path, model).manifest
    assert manifest.environment["processor"] == "AVX2, AVX512" and manifest.options["device"] == "cpu"


@pytest.mark.slow
def test_a_part_may_have_several_workers(model: Model, whole: dict[str, str], tmp_path: Path) -> None:
    """Each with a file of its own."""
    path = tmp_path / "run"
    parts.mine(model, TEXT, path, Portion(0, 2), workers=2)
    assert len([*(path / ".work").glob("state-part-*.npz")]) == 2
    parts.mine(model, TEXT, path, Portion(1, 2))
    assert tables(mn.merge(path, model)) == whole


def test_a_build_goes_on_from_parts(model: Model, whole: dict[str, str], tmp_path: Path) -> None:
    """Without a part the same call does what is left."""
    path = tmp_path / "run"
    parts.mine(model, TEXT, path, Portion(1, 3))
    assert tables(mn.build(model, TEXT, path)) == whole


def test_the_model_is_found_where_the_parts_had_it(
    folder: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """A merge needs the folder alone."""
    for number in range(2):
        parts.mine(mn.load_model(folder, dtype="fp32"), TEXT, tmp_path / "run", Portion(number, 2))
    assert tables(mn.merge(tmp_path / "run")) == whole


def test_a_merge_says_what_is_left(model: Model, tmp_path: Path) -> None:
    """By the parts that are to be run again."""
    path = tmp_path / "run"
    with pytest.raises(RunError, match="holds none"):
        mn.merge(path, model)
    parts.mine(model, TEXT, path, Portion(1, 3))
    with pytest.raises(RunError, match=r"are not done; run what is left: --shard 0/3, --shard 2/3$"):
        mn.merge(path, model)


def test_parts_of_different_builds_are_refused(model: Model, folder: Path, tmp_path: Path) -> None:
    """Another number of parts, text or model."""
    path = tmp_path / "run"
    parts.mine(model, TEXT, path, Portion(0, 2))
    with pytest.raises(RunMismatch, match="was begun in 2 parts, and 3 were given"):
        parts.mine(model, TEXT, path, Portion(1, 3))
    with pytest.raises(RunMismatch, match="unfinished run"):
        parts.mine(model, TEXT[:-1], path, Portion(1, 2))
    parts.mine(model, TEXT, path, Portion(1, 2))
    other = model_folder(tmp_path / "other", "gpt2")
    with pytest.raises(RunMismatch, match="weights_sha256"):
        mn.merge(path, mn.load_model(other, dtype="fp32"))


def test_a_shard_that_was_done_twice_is_refused(model: Model, tmp_path: Path) -> None:
    """Copies of what one part did are not counted twice."""
    path = tmp_path / "run"
    for number in range(2):
        parts.mine(model, TEXT, path, Portion(number, 2))
    (file,) = (path / ".work").glob("state-part-00000*-0.npz")
    (file.with_name("state-copied.npz")).write_bytes(file.read_bytes())
    with pytest.raises(RunError, match="holds a shard twice"):
        mn.merge(path, model)


def test_one_part_has_one_process(model: Model, tmp_path: Path) -> None:
    """While it is mined, a second one of it is refused, and so is the whole build."""
    path = tmp_path / "run"
    parts.mine(model, TEXT, path, Portion(0, 2))
    lock = path / ".work" / f"state-{Portion(1, 2).name}.lock"
    with loop.locked(lock, path), pytest.raises(RunError, match="another process is building"):
        parts.mine(model, TEXT, path, Portion(1, 2))


def test_parts_cover_every_shard_once() -> None:
    """Neighbours together, and some of them empty where there are more parts than shards."""
    for shards in (0, 1, 7, 16, 100):
        for count in (1, 3, 16):
            covered = [shard for number in range(count) for shard in Portion(number, count).of(shards)]
            assert covered == list(range(shards))


def test_shards_of_a_file_are_known_without_reading_it(model: Model, tmp_path: Path) -> None:
    """What a file says it holds is what it holds."""
    path = tmp_path / "run"
    parts.mine(model, TEXT, path, Portion(1, 3))
    (file,) = (path / ".work").glob("state-part-*.npz")
    plan = plans.Plan.load(path / ".work")
    nulls = Nulls.of(model, recipe(model, DEFAULT))
    held = RunStatistics.held(file)
    assert held == RunStatistics.load(nulls, file).shards == frozenset(Portion(1, 3).of(plan.shards))
    assert len(held) > 1, "there is more than one shard to be found"


@pytest.mark.parametrize("given", ["3/3", "x", "1", "-1/3", "1/0", "1/2/3"])
def test_what_is_no_part_is_refused(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, by the name that it was given under, before anything is read."""
    words = ["build", "no-model", "--corpus", "no-text", "-o", str(tmp_path / "run"), f"--shard={given}"]
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{given!r} in --shard" in line and "such as 3/16" in line
