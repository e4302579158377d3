"""A build in parts: in whatever order they are done, it is the run made in one go (killed: `test_faults.py`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.cli import main
from mnemoscope.errors import RunCorrupt, RunError, RunMismatch
from mnemoscope.mine import loop, parts
from mnemoscope.mine.build import digest
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


def changed(folder: Path) -> Path:
    """The same model with one other weight."""
    model_folder(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


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


@pytest.mark.parametrize(
    "other", ["text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("top", "model"))]
)
def test_what_was_mined_for_another_build_is_refused(other: str, model: Model, tmp_path: Path) -> None:
    """Though it has the shards that are missing here, and as many neurons: by the file, when parts are merged, when
    another one is mined, and when a build goes on."""
    mixed, path = tmp_path / "mixed", tmp_path / "run"
    again = mn.load_model(changed(tmp_path / "again"), dtype="fp32") if other == "model" else model
    text, options = TEXT[::-1] if other == "text" else TEXT, {"top": 7} if other == "top" else {}
    parts.mine(again, text, mixed, Portion(1, 2), **options)
    parts.mine(model, TEXT, path, Portion(0, 2))
    (file,) = (mixed / ".work").glob("state-part-00001*-0.npz")
    copied = path / ".work" / file.name
    copied.write_bytes(file.read_bytes())
    for doing in (
        lambda: mn.merge(path, model),
        lambda: parts.mine(model, TEXT, path, Portion(1, 2)),
        lambda: mn.build(model, TEXT, path),
    ):
        with pytest.raises(RunMismatch, match=f"{file.name}: it is of another build"):
            doing()
    copied.unlink()
    with pytest.raises(RunError, match=r"run what is left: --shard 1/2$"):
        mn.merge(path, model)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_part_that_is_damaged_is_named(damage: str, model: Model, tmp_path: Path) -> None:
    """In one line; without it the part is mined again."""
    path = tmp_path / "run"
    for number in range(2):
        parts.mine(model, TEXT, path, Portion(number, 2))
    (file,) = (path / ".work").glob("state-part-00001*-0.npz")
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(
        RunCorrupt, match=f"{file.name}: it is damaged .*; remove it, and what it held is done again"
    ) as told:
        mn.merge(path, model)
    assert "\n" not in str(told.value)


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
    identity = json.loads((path / ".work" / "identity.json").read_text(encoding="utf-8"))
    held = RunStatistics.held(file, digest(identity, plan))
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
