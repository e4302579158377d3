"""Every public function that takes a path understands it as the others do, and what it cannot be is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import make_run
from test_files import NAMES
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope import files
from mnemoscope.cli import main
from mnemoscope.errors import MnemoscopeError
from mnemoscope.location import place
from mnemoscope.patterns import language
from mnemoscope.patterns.pattern import parse
from mnemoscope.run.schemas import MANIFEST
from mnemoscope.studies.measures import questions

SOURCE = Path(__file__).parents[1] / "src" / "mnemoscope"
_PROMPT = "The capital of France is"
Name = str | Path


class _Ready(Exception):  # noqa: N818
    """What is served says its address."""


def _ready(address: str) -> None:
    raise _Ready(address)


def _serving(call: Callable[..., Any], *given: Any, **options: Any) -> None:
    with pytest.raises(_Ready):
        call(*given, port=0, ready=_ready, **options)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What has to be there: a run, a model, files of every kind."""
    at = tmp_path_factory.mktemp("things")
    run = mn.open_run(make_run(at / "run").path)
    model_folder(at / "model")
    (at / "text.txt").write_text("\n\n".join(texts(8)))
    (at / "prompts.jsonl").write_text(json.dumps({"prompt": _PROMPT}) + "\n")
    (at / "questions.jsonl").write_text(json.dumps({"prompt": "Lyon is in", "answer": " France"}) + "\n")
    (at / "labels.jsonl").write_text(json.dumps({"context": 0, "position": 1, "label": True}) + "\n")
    run.annotate(at / "sheet.jsonl", neurons=8, prefixes=5, seed=0)
    lines = [json.loads(line) for line in (at / "sheet.jsonl").read_text().splitlines()]
    (at / "sheet.jsonl").write_text("".join(json.dumps(line | {"patterns": []}) + "\n" for line in lines))
    model = mn.load_model(at / "model", dtype="fp32")
    explanation = mn.explain(model, _PROMPT, top=2)
    return SimpleNamespace(at=at, run=run, model=model, explanation=explanation)


# What reads a thing of that name, which is a folder or a file, under whatever name it has.
READS: dict[str, tuple[str, Callable[[SimpleNamespace, Name], Any]]] = {
    "open_run": ("run", lambda it, path: mn.open_run(path)),
    "compare": ("run", lambda it, path: mn.compare(it.run, path, only="glance")),
    "Run.compare": ("run", lambda it, path: it.run.compare(path, only="glance")),
    "study": ("run", lambda it, path: mn.study(None, None, path, only="values")),
    "merge": ("run", lambda it, path: mn.merge(path)),
    "push": ("run", lambda it, path: mn.push(path, "memory://entries/run", overwrite=True)),
    "serve": ("run", lambda it, path: _serving(mn.serve, path)),
    "load_model": ("model", lambda it, path: mn.load_model(path, dtype="fp32")),
    "load_model tokenizer": ("model", lambda it, path: mn.load_model(it.model.hf, tokenizer=path)),
    "load_corpus": ("text.txt", lambda it, path: list(mn.load_corpus(path).documents)),
    "explain_many": (
        "prompts.jsonl",
        lambda it, path: mn.explain_many(it.model, path, it.at / "t.csv", top=1),
    ),
    "questions": ("questions.jsonl", lambda it, path: questions.read(files.expanded(path))),
    "labels": ("labels.jsonl", lambda it, path: language.check(parse(f"file:{path}"))),
    "score": ("sheet.jsonl", lambda it, path: mn.score(path, key=it.at / "sheet.key.json")),
    "score key": ("sheet.key.json", lambda it, path: mn.score(it.at / "sheet.jsonl", key=path)),
}
SLOW_READS = ("explain_many", "load_model", "study", "compare", "Run.compare", "serve")


def _page(it: SimpleNamespace) -> Any:
    return it.run["L1N3"]


# What writes a file (or a folder, where its name says so) under a name, and what it gives back.
WRITES: dict[str, Callable[[SimpleNamespace, Name], Any]] = {
    "save.html": lambda it, path: _page(it).save(path),
    "save.json": lambda it, path: _page(it).save(path),
    "save.txt": lambda it, path: _page(it).save(path),
    "save_page.html": lambda it, path: _page(it).save_page(path),
    "report.html": lambda it, path: it.run.measured("values").save(path),
    "gallery.html": lambda it, path: it.run.gallery(path, neurons_per_layer=1),
    "annotate.jsonl": lambda it, path: it.run.annotate(path, neurons=8, prefixes=5, seed=0),
    "write_graph.json": lambda it, path: mn.write_graph(it.explanation, path),
    "explain_many.csv": lambda it, path: mn.explain_many(it.model, [{"prompt": _PROMPT}], path, top=1),
    "site folder": lambda it, path: mn.site(it.run, path),
    "build folder": lambda it, path: mn.build(it.model, texts(3), path, top=1, nulls=()),
    "build_part folder": lambda it, path: mn.build_part(it.model, texts(3), path, (0, 1), top=1, nulls=()),
    "pull folder": lambda it, path: mn.pull("memory://entries/run", path),
    "annotations folder": lambda it, path: _serving(mn.serve, it.run, annotations=path),
}
SLOW_WRITES = (
    "report.html", "gallery.html", "explain_many.csv", "site folder", "build folder", "build_part folder",
    "annotations folder",
)  # fmt: skip


def _cases(table: Any, slow: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in table]


def _spellings(path: Path, home: Path, cwd: Path) -> dict[str, Name]:
    """All ways to say which path is meant; it is below the home folder."""
    below = path.relative_to(home)
    return {
        "text": str(path),
        "path": path,
        "home": f"~/{below}",
        "home, a path": Path("~") / below,
        "relative": os.path.relpath(path, cwd),
        "relative, a path": Path(os.path.relpath(path, cwd)),
        "around": f"{path.parent}/../{path.parent.name}//{path.name}",
        "URL": path.as_uri(),
        "URL of one slash": path.as_uri().replace("///", "/"),
        "URL with a host": path.as_uri().replace("///", "//localhost/"),
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a folder in it that the process is in."""
    (tmp_path / "home" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path / "home" / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("name", ["plain", "per%cent 100%25 #1?x naïve 日本"])
@pytest.mark.parametrize("entry", _cases(READS, SLOW_READS))
def test_what_is_read_is_found_however_it_is_named(
    entry: str, name: str, things: SimpleNamespace, home: Path
) -> None:
    """From the home folder, from here, as a URL of this machine, as text and as a path: by everything that reads."""
    kind, read = READS[entry]
    target = home / "it" / f"{name}{Path(kind).suffix}"
    target.parent.mkdir()
    target.symlink_to(things.at / kind)
    if entry in SLOW_READS or name == "plain":
        spellings = _spellings(target, home, Path.cwd())
    else:
        spellings = {"text": str(target), "home": f"~/it/{target.name}", "URL": target.as_uri()}
    for spelling in spellings.values():
        read(things, spelling)
    if (things.at / kind).is_dir():
        read(things, f"{target}/")
        read(things, f"{target.as_uri()}/")
    assert [path.name for path in Path.cwd().iterdir()] == []


@pytest.mark.parametrize("entry", _cases(WRITES, SLOW_WRITES))
def test_what_is_written_is_where_it_was_said(entry: str, things: SimpleNamespace, home: Path) -> None:
    """However that is said: nothing lies in a folder called ~ or file:."""
    mn.push(things.run.path, "memory://entries/run", overwrite=True)
    suffix = Path(entry).suffix
    few = ("path", "home, a path", "URL") if entry in SLOW_WRITES else None
    for number, way in enumerate(few or _spellings(home / "x", home, Path.cwd())):
        folder = home / f"out {number}"
        folder.mkdir()
        target = folder / f"it's 50% #1{suffix}"
        WRITES[entry](things, _spellings(target, home, Path.cwd())[way])
        assert target.exists(), way
    assert [path.name for path in Path.cwd().iterdir()] == []


@pytest.mark.slow
def test_what_was_written_comes_back_as_a_path_that_exists(things: SimpleNamespace, home: Path) -> None:
    """What functions return can be opened."""
    assert _page(things).save("~/a.html") == home / "a.html"
    assert things.run.gallery(Path("~/b.html"), neurons_per_layer=1) == home / "b.html"
    assert mn.write_graph(things.explanation, "~/c.json") == home / "c.json"
    written = things.run.annotate("~/d.jsonl", neurons=8, prefixes=5, seed=0)
    assert (written.sheet, written.key) == (home / "d.jsonl", home / "d.key.json")


def test_the_home_folder_is_looked_up_in_one_place() -> None:
    """`files.expanded`."""
    there = {
        str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py") if "expanduser" in file.read_text()
    }
    assert there == {"files.py"}


@pytest.mark.parametrize(
    ("given", "meant"),
    {
        "file:///a/b": "/a/b",
        "FILE:///a/b/": "/a/b",
        "file:/a/b": "/a/b",
        "file://localhost/a/b": "/a/b",
        "local:///a/b": "/a/b",
        "file:///a%20b/100%25%C3%A9#1?x": "/a b/100%é#1?x",
        "file:///100%": "/100%",
        "files:///a": "files:/a",
        "~nobody-of-that-name/x": "~nobody-of-that-name/x",
        "a~b": "a~b",
        "file": "file",
    }.items(),
)
def test_a_url_of_this_machine_is_a_path(given: str, meant: str) -> None:
    """With what stands for other letters in it."""
    assert files.expanded(given) == Path(meant) == files.expanded(Path(given))


# -- what it cannot be -----------------------------------------------------------------------------------------


def _wrong(at: Path) -> dict[str, Path]:
    """Things that are neither a run, nor a model, nor a text, nor a place to write to."""
    (at / "dangling").symlink_to(at / "nowhere" / "at all")
    (at / "loop").symlink_to(at / "loop")
    (at / "empty").mkdir()
    (at / "empty file").write_text("")
    os.mkfifo(at / "pipe")
    return {
        "nothing": at / "nothing",
        "a newline": at / "new\nline\x1b[31m",
        "a dangling link": at / "dangling",
        "a loop": at / "loop",
        "a pipe": at / "pipe",
        "a device": Path("/dev/null"),
        "an empty file": at / "empty file",
        "an empty folder": at / "empty",
        "below a file": at / "empty file" / "x",
        "too long": at / ("x" * 300),
        "no name for a file": at / "nul\0",
    }


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _wrong(tmp_path_factory.mktemp("wrong"))


WRONG = ("nothing", "a newline", "a dangling link", "a loop", "a pipe", "a device", "an empty file", "an empty folder",
         "below a file", "too long", "no name for a file")  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("entry", READS)
def test_what_cannot_be_read_is_one_line(
    entry: str, case: str, things: SimpleNamespace, wrong: dict[str, Path], home: Path
) -> None:
    """Of the tree of errors, at once: nobody waits for a pipe into which nobody writes."""
    if (entry, case) == ("labels", "an empty file"):
        pytest.skip("which is one without labels")
    before = sorted(str(path) for path in wrong["nothing"].parent.iterdir())
    with pytest.raises(MnemoscopeError) as caught:
        READS[entry][1](things, wrong[case])
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert sorted(str(path) for path in wrong["nothing"].parent.iterdir()) == before


@pytest.mark.parametrize(
    "case", ["a dangling link", "a loop", "below a file", "too long", "no name for a file"]
)
@pytest.mark.parametrize("entry", WRITES)
def test_what_cannot_be_written_is_one_line(
    entry: str, case: str, things: SimpleNamespace, wrong: dict[str, Path], home: Path
) -> None:
    """And nothing is there afterwards that was not before."""
    mn.push(things.run.path, "memory://entries/run", overwrite=True)
    path = wrong[case].with_name(wrong[case].name + Path(entry).suffix) if case == "too long" else wrong[case]
    if case in ("a dangling link", "a loop") and Path(entry).suffix:  # whose name must end so
        link = home / f"link{Path(entry).suffix}"
        link.symlink_to(path.readlink() if case == "a dangling link" else link)
        path = link
    elif case in ("below a file", "no name for a file"):
        path = path.with_name(path.name + Path(entry).suffix)
    with pytest.raises(MnemoscopeError) as caught:
        WRITES[entry](things, path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert not (wrong["nothing"].parent / "nowhere").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_a_folder_of_any_name_is_opened_and_shown(
    name: str, things: SimpleNamespace, home: Path
) -> None:
    """As long as the system takes it."""
    shutil.copytree(things.run.path, home / name)
    if name == os.fsdecode(b"caf\xe9"):
        with pytest.raises(MnemoscopeError, match="the name is not valid UTF-8; rename the folder"):
            mn.open_run(home / name)
        return
    run = mn.open_run(home / name)
    assert run.check() == [] and run["L1N3"].to_dict()["id"] == "L1N3"
    assert run.sql("select count(*) as n from neurons")["n"][0] == things.run.manifest.tables["neurons"].rows


def test_a_run_stays_where_it_is_when_the_process_goes_elsewhere(
    things: SimpleNamespace, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by a relative name; what is printed of it has the name that was given. A text stays there, too."""
    shutil.copytree(things.run.path, "one")
    make_run("there/one", seed=1, layers=2)  # another run, of the same name
    Path("text.txt").write_text("of here")
    Path("there/text.txt").write_text("of there")
    run, text = mn.open_run("one"), mn.load_corpus("text.txt")
    monkeypatch.chdir("there")
    assert run.check() == [] and run.folder == home / "here" / "one"
    assert run["L2N3"].to_dict() == mn.open_run(home / "here" / "one")["L2N3"].to_dict() | {
        "command": "mnemoscope show one L2N3",
        "python": "mnemoscope.open_run('one')[\"L2N3\"]",
    }
    run.reopen()
    assert run.manifest == things.run.manifest
    assert [document.text for document in text.documents] == ["of here"]
    assert {entry["sha256"] for entry in text.source["files"]} == {files.sha256(home / "here" / "text.txt")}


def test_the_command_line_takes_what_no_shell_has_expanded(
    things: SimpleNamespace, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--html=~/page.html` comes as it is typed."""
    (home / "run").symlink_to(things.run.path)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "show", "~/run", "L1N3", "--html=~/page.html"])
    with pytest.raises(SystemExit):
        main()
    assert (home / "page.html").exists() and "L1N3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", ["show {}/run", "site {}/run -o {}/new", "show open --html {}/page.html"])
def test_a_folder_without_a_right_is_one_line(words: str, things: SimpleNamespace, tmp_path: Path) -> None:
    """Neither a traceback nor a wrong cause."""
    closed = tmp_path / "closed"
    shutil.copytree(things.run.path, closed / "run")
    shutil.copytree(things.run.path, tmp_path / "open")
    closed.chmod(0)
    if os.geteuid() == 0:
        pytest.skip("root may do everything")
    done = subprocess.run(
        [sys.executable, "-c", "from mnemoscope.cli import main; main()", *words.format(closed, closed).split()],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    closed.chmod(0o755)
    assert done.returncode == 2 and "Permission denied" in done.stderr and len(done.stderr.splitlines()) == 1
    assert place(tmp_path / "open") and not (closed / MANIFEST).exists()
