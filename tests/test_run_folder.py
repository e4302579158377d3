"""Which folders a run may be built in, and what is said of those where it may not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_files import NAMES
from tiny import model_folder, texts

from mnemoscope import open_run
from mnemoscope.errors import CorpusError, MnemoscopeError, RunError, RunMismatch, RunMissing
from mnemoscope.mine.build import _difference, build
from mnemoscope.mine.verify import verify
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import check_place
from mnemoscope.text.corpus import load_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(model, texts(20), tmp_path_factory.mktemp("runs") / "run", top=3, nulls=())


def held(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(error: type[MnemoscopeError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [*[name for name in NAMES if name.isprintable()][::4], "run[1]", "new\nline"]
)
def test_a_run_is_built_in_a_folder_of_any_name(
    name: str, model: Model, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same run whatever its folder is called, given as it is, relative to where one stands."""
    monkeypatch.chdir(tmp_path)
    made = build(model, texts(20), name, top=3, nulls=())
    assert {key: entry.sha256 for key, entry in made.manifest.tables.items()} == {
        key: entry.sha256 for key, entry in run.manifest.tables.items()
    }
    assert [file.name for file in tmp_path.iterdir()] == [name]


FOREIGN: dict[str, dict[str, str]] = {
    "one file": {"thesis.tex": "x"},
    "a table": {"triggers.parquet": "x"},
    "hidden": {".git/config": "x"},
    "a table beside a build that was begun": {".work/identity.json": "{}", "values.parquet": "x"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_with_something_else_is_refused_and_left_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: one line that names what is there, and not a byte is changed."""
    for name, content in FOREIGN[case].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = held(tmp_path)
    monkeypatch.setattr("mnemoscope.model.load.load_model", lambda *_: pytest.fail("loaded"))
    message = refused(RunError, "some model", "some text", tmp_path)
    assert "neither empty nor a run" in message
    assert any(repr(name.partition("/")[0]) in message for name in before)
    assert held(tmp_path) == before


def test_an_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the current folder, which nobody named."""
    monkeypatch.chdir(tmp_path)
    assert "the path is empty" in refused(RunError, "some model", "some text", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["new", "deep/new", "empty", "finder"])
def test_new_and_empty_folders_will_do(name: str, tmp_path: Path) -> None:
    """So will a folder that only a file manager has been in."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "finder").mkdir()
    (tmp_path / "finder" / ".DS_Store").touch()
    check_place(tmp_path / name)
    assert not (tmp_path / "deep").exists()


def test_a_finished_run_will_do_where_nothing_can_be_written(
    model: Model, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very run is opened; a new folder there is refused before anything is loaded."""

    def no(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", no)
    assert build(model, texts(20), run.path, top=3, nulls=()).path == run.path
    message = refused(RunError, "some model", "some text", run.path / "new")
    assert "Permission denied; choose a folder" in message


def test_a_finished_run_is_not_replaced_by_another(model: Model, run: Run) -> None:
    """Other options are refused, and every byte stays."""
    before = held(run.path)
    assert "top = 3, and top = 4 was given" in refused(RunMismatch, model, texts(20), run.path, top=4)
    assert held(run.path) == before


def test_a_build_that_stopped_at_a_bad_line_starts_afresh(model: Model, tmp_path: Path) -> None:
    """Nothing was finished, so that the text, the options, or both may be others the next time."""
    source, path = tmp_path / "text.jsonl", tmp_path / "run"
    lines = [json.dumps({"text": text}) for text in texts(20)]
    source.write_text("\n".join([*lines[:10], "{broken", *lines[10:]]))
    assert "line 11: not JSON" in refused(CorpusError, model, str(source), path, top=3)
    with pytest.raises(RunMissing, match="begin again"):
        open_run(path)
    source.write_text("\n".join(lines))
    made = build(model, str(source), path, top=4)
    assert made.manifest.corpus.documents == 20 and made.manifest.options["top"] == 4
    assert not {".work", ".lock"} & {file.name for file in path.iterdir()}


def test_values_that_differ_are_shown_where_they_differ(model: Model, tmp_path: Path) -> None:
    """Of two files of one name the message shows the hashes, and not the same sixty characters of both."""
    source, path = tmp_path / "text.txt", tmp_path / "run"
    source.write_text("\n\n".join(texts(20)))
    build(model, str(source), path, top=3)
    source.write_text("\n\n".join(texts(20, seed=1)))
    message = refused(RunMismatch, model, str(source), path, top=3)
    place, before, now = re.search(r"built with (\S+) = (\S+), and \1 = (\S+) was given", message).groups()
    assert place == "source.files[0].sha256"
    assert before != now and now.rstrip("…") in hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}, ("x.b.c", "1, 2", "1, 3")),
        ({"a": 1}, {}, ("x.a", "1", "none")),
        ([1], [1, {"d": 2}], ("x[1]", "none", '{"d": 2}')),
        (None, {"a": 1}, ("x", "none", '{"a": 1}')),
        ("p" * 90 + "q", "p" * 90 + "r", ("x", "…" + "p" * 47 + "q", "…" + "p" * 47 + "r")),
        ("p" * 9 + "q" * 90, "p" * 9 + "r" * 90, ("x", "…" + "p" * 8 + "q" * 40 + "…", "…" + "p" * 8 + "r" * 40 + "…")),
    ],
)  # fmt: skip
def test_the_first_difference(before: Any, now: Any, shown: tuple[str, str, str]) -> None:
    """By key, by place in a list, by character of a long text."""
    assert _difference("x", before, now) == shown


def test_verify_finds_values_by_token_that_are_another_runs(model: Model, run: Run, tmp_path: Path) -> None:
    """Rows of another run, or the run's own in another order, signed as if they were right."""
    other = build(model, texts(20), tmp_path / "other", top=3, nulls=())
    own = shutil.copytree(run.path, tmp_path / "own")
    import polars as pl

    def failed(rows: pl.DataFrame) -> list[str]:
        file = own / "values_by_token.parquet"
        rows.write_parquet(file)
        manifest = json.loads((own / "manifest.json").read_text())
        raw = file.read_bytes()
        manifest["tables"]["values_by_token"] |= {
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        (own / "manifest.json").write_text(json.dumps(manifest))
        return [check.name for check in verify(open_run(own), model, sample=5).checks if check.differing]

    rows = other.table("values_by_token").collect()
    assert failed(rows) == []
    assert failed(rows.with_columns(pl.col("probability") * 0.5)) == ["values by token"]
    assert failed(rows.reverse()) == ["values by token"]
    assert failed(rows.with_columns(pl.col("token").shuffle(seed=0))) == ["values by token"]
    assert os.fspath(other.path) != os.fspath(own)


def test_what_was_left_out_is_said_once_and_kept(model: Model, tmp_path: Path) -> None:
    """Contexts seen before, and columns that cannot be kept, at the end of planning and in the manifest."""
    import polars as pl

    said: list[str] = []
    held = [*texts(20), *texts(5), *texts(5)]
    frame = pl.DataFrame({"text": held, "vector": [[1.0, 2.0]] * len(held)})
    options: dict[str, Any] = {"top": 3, "nulls": ()}
    made = build(
        model, load_corpus(frame), tmp_path / "run", report=lambda step: said.append(step.note), **options
    )
    notes = [note for note in said if note]
    assert notes == made.manifest.options["notes"] and len(notes) == 2
    assert "'vector'" in notes[0]
    assert notes[1] == "10 contexts were left out: their tokens were seen before"
    assert made.manifest.options["sampling"] is None


def test_runs_from_before_documents_were_drawn_are_opened(model: Model, tmp_path: Path) -> None:
    """A finished run with a limit whose identity says nothing of sampling is the run that was asked for."""
    text = load_corpus(texts(40), limit=200)
    made = build(model, text, tmp_path / "run", top=3, nulls=())
    assert made.manifest.options["sampling"] == "documents by hash of place and text"
    file = tmp_path / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    del (
        manifest["options"]["identity"]["sampling"],
        manifest["options"]["sampling"],
        manifest["options"]["notes"],
    )
    file.write_text(json.dumps(manifest))
    assert build(model, text, tmp_path / "run", top=3, nulls=()).check() == []
