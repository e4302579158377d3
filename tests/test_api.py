"""The public door: what the command line does can be done from Python, and every result shows itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer
from synthetic import make_run
from tiny import model_folder, texts
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope import api
from mnemoscope.atlas import assistant
from mnemoscope.cli import app
from mnemoscope.cli.shared import print_result
from mnemoscope.display import WIDTH, Shown
from mnemoscope.errors import MnemoscopeError, QueryError, RunError, RunMissing
from mnemoscope.neuron.card import card
from mnemoscope.patterns.triggers import Options
from mnemoscope.records import NeuronId
from mnemoscope.run.reading import Run as StoredRun
from mnemoscope.trials import job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run of it."""
    model = mn.load_model(folder, dtype="fp32")
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "built", top=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished synthetic run, opened as a user opens it."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "synthetic").path)


# -- every command ------------------------------------------------------------------------------------------

Call = Callable[[mn.Run, Path, Path], Any]  # run, folder of its model, empty folder -> result


def _filled(run: mn.Run, tmp: Path) -> Path:
    """A sheet on which an annotator found nothing in any item."""
    written = run.annotate(tmp / "sheet.jsonl", neurons=8, prefixes=5, seed=0)
    lines = [json.loads(line) for line in written.sheet.read_text().splitlines()]
    for line in lines[1:]:
        line["patterns"] = []
    lines[0]["annotator"] = "anna"
    written.sheet.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return written.sheet


def _annotated(run: mn.Run, tmp: Path) -> Any:
    sheet = _filled(run, tmp)
    items = json.loads(sheet.with_suffix(".key.json").read_text())["items"].values()
    one = next(item for item in items if item["kind"] == "neuron")
    return mn.annotated(sheet, (one["layer"], one["neuron"]))


class _Ready(Exception):  # noqa: N818
    """The server says its address."""


def _address(run: mn.Run) -> str:
    def ready(address: str) -> None:
        raise _Ready(address)

    with pytest.raises(_Ready) as said:
        mn.serve(run.path, port=0, ready=ready)
    return str(said.value)


PROMPT = " The capital of France is"

# For each command what does the same in Python.
COUNTERPARTS: dict[str, Call] = {
    "demo": lambda run, model, tmp: mn.demo(tmp / "demo", limit=60),
    "build": lambda run, model, tmp: mn.build(run.model, texts(8), tmp / "run", top=2, nulls=()),
    "show": lambda run, model, tmp: run["L1N3"],
    "find": lambda run, model, tmp: run.find(promotes=" Paris"),
    "explain": lambda run, model, tmp: run.explain(PROMPT, " Paris", " London", top=2),
    "trace": lambda run, model, tmp: run.trace(PROMPT, "L1N3"),
    "steer": lambda run, model, tmp: run.steer(PROMPT, "L1N3", factor=-2, length=3),
    "patterns": lambda run, model, tmp: run.patterns(budget=400, cards=1),
    "test": lambda run, model, tmp: run.test("L1N3", "word:Paris", budget=400),
    "removal": lambda run, model, tmp: run.removal(documents=8),
    "verify": lambda run, model, tmp: run.verify(sample=5),
    "study": lambda run, model, tmp: mn.study(None, None, run.path, only="glance"),
    "cache": lambda run, model, tmp: mn.cache.entries(),
    "compare": lambda run, model, tmp: run.compare(run.path, only="glance"),
    "annotate sheet": lambda run, model, tmp: run.annotate(
        tmp / "sheet.jsonl", neurons=8, prefixes=5, seed=0
    ),
    "annotate score": lambda run, model, tmp: mn.score(_filled(run, tmp)),
    "annotate export": lambda run, model, tmp: _annotated(run, tmp),
    "serve": lambda run, model, tmp: _address(run),
    "export": lambda run, model, tmp: run.export(tmp / "exported", "openai", neurons="L1N3"),
    "plan": lambda run, model, tmp: mn.plan(run.model, texts(8), tmp, top=2, nulls=()),
    "push": lambda run, model, tmp: mn.push(run.path, "memory://counterparts/run", overwrite=True),
    "pull": lambda run, model, tmp: mn.pull(_pushed(run), tmp / "pulled"),
    "merge": lambda run, model, tmp: mn.merge(_mined(model, tmp)),
    "site": lambda run, model, tmp: api.site(run, tmp / "site"),
    "mcp": lambda run, model, tmp: assistant.create(run),
    "models": lambda run, model, tmp: mn.families(),
    "models check": lambda run, model, tmp: mn.check(str(model)),
}


def _pushed(run: mn.Run) -> str:
    """The address that a run was uploaded to."""
    return str(mn.push(run.path, "memory://counterparts/run", overwrite=True).path)


def _mined(model: Path, tmp: Path) -> Path:
    """The folder of a build in one part."""
    mn.build_part(mn.load_model(model, dtype="fp32"), texts(10), tmp / "parts", (0, 1))
    return tmp / "parts"


def _commands(group: typer.Typer, before: str = "") -> Iterator[str]:
    """Every command that does something, groups that are commands themselves included."""
    for command in group.registered_commands:
        yield before + str(command.name or command.callback.__name__)  # type: ignore[union-attr]
    for inner in group.registered_groups:
        name = f"{before}{inner.name}"
        if inner.typer_instance.registered_callback.invoke_without_command is True:  # type: ignore[union-attr]
            yield name
        yield from _commands(inner.typer_instance, f"{name} ")  # type: ignore[arg-type]


def test_every_command_has_a_counterpart() -> None:
    """What the command line can do is in the table, and the table has nothing else."""
    assert sorted(_commands(app)) == sorted(COUNTERPARTS)


@pytest.mark.parametrize("command", sorted(set(COUNTERPARTS) - {"demo"}))
def test_the_counterparts_answer(
    command: str, built: mn.Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is called once on a tiny run, and what it gives shows itself in 80 columns, in a notebook and as JSON."""
    monkeypatch.setattr(
        job, "Options", partial(Options, draws=100)
    )  # which is what takes the time of a search
    result = COUNTERPARTS[command](built, folder, tmp_path)
    assert result is not None
    if isinstance(result, Shown):
        monkeypatch.setattr(
            "rich.console._is_jupyter", lambda: True
        )  # where rich shows what it prints to a string
        monkeypatch.setattr("rich.jupyter.display", lambda *shown: pytest.fail("it is shown twice"))
        assert all(len(line) <= WIDTH for line in str(result).splitlines()), str(result)
        assert repr(result) == str(result).rstrip("\n")
        assert "<" in result._repr_html_()
        json.dumps(result.to_dict(), default=str)


def test_demo_builds_the_sample(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """The demo is a run of the sample model over the sample text, of which it reads so many tokens."""
    monkeypatch.setattr(api, "SAMPLE_MODEL", str(folder))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts(30)))
    monkeypatch.setattr(api, "SAMPLE_TEXT", str(text))
    demo = COUNTERPARTS["demo"](None, folder, tmp_path)  # type: ignore[arg-type]
    assert isinstance(demo, mn.Run)
    assert 0 < demo.manifest.corpus.tokens <= 60


def test_demo_ends_with_the_run_in_the_browser(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """The last line says how it is opened; with --serve it is served, and its address opened."""
    monkeypatch.setattr(api, "SAMPLE_MODEL", str(folder))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts(40)))
    monkeypatch.setattr(api, "SAMPLE_TEXT", str(text))
    served: list[Any] = []

    def serve(run: mn.Run, ready: Callable[[str], None]) -> None:
        served.append(run.path)
        ready("http://127.0.0.1:1/")

    monkeypatch.setattr(api, "serve", serve)
    monkeypatch.setattr("webbrowser.open", served.append)
    for options in ([], ["--serve"]):
        run = tmp_path / f"run{len(options)}"
        call = CliRunner().invoke(
            app, ["demo", "-o", str(run), "--limit", "400", *options], catch_exceptions=False
        )
        assert call.exit_code == 0
        last = call.output.strip().splitlines()
        assert (served == [run, "http://127.0.0.1:1/"]) == bool(options)
        assert f"mnemoscope serve {run}" in " ".join(last[-2:]) or options


# -- a run --------------------------------------------------------------------------------------------------


def test_a_neuron_by_any_address(run: mn.Run) -> None:
    """Text, pair, id, two numbers of any integer type: the same card."""
    wanted = card(run, (1, 3))
    given = [run["L1N3"], run["1.3"], run[1, 3], run[NeuronId(1, 3)], run.neuron("L1N3"), run.neuron(1, 3)]
    given += [run.neuron((1, 3)), run.neuron(np.int64(1), np.int32(3))]  # type: ignore[arg-type]
    assert all(one == wanted for one in given)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run["nothing"], "L13N366"),
        (lambda run: run[3], "13, 366"),
        (lambda run: run.neuron(1), "13, 366"),
        (lambda run: run.neuron(1, 2.5), "13, 366"),
        (lambda run: run["L1N3", 4], "13, 366"),
        (lambda run: run["L3N0"], "out of range"),
        (lambda run: run.find(), "promotes="),
        (lambda run: run.find(promotes="a", suppresses="a", sort="max"), "2 questions"),
        (lambda run: run.find(promotes=" Paris", sort="beauty"), "kurtosis"),
        (lambda run: run.find(promotes="a", ascending=True), "ascending=True"),
        (lambda run: run.find(sort="max", count=-4), "count=-4"),
        (lambda run: run.test("L1N3", "year", sign="plus"), "sign='plus'"),
        (lambda run: run.test("L1N3", "no such pattern"), "no such pattern"),
        (lambda run: run.test("L1N3", "regex:("), "does not compile"),
        (lambda run: run.removal(documents=1), "documents=1"),
        (lambda run: run.verify(sample=0), "sample=0"),
        (lambda run: run.pattern_report(), "patterns"),
        (lambda run: run["L1N3"].save("card.pdf"), ".html, .json, .txt"),
        (lambda run: mn.study(None, None, "nowhere"), "nowhere"),
        (lambda run: mn.compare(run, "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    ask: Callable[[mn.Run], Any], words: str, run: mn.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names what Python calls it, no option of the command line, and no model is loaded to find out."""
    monkeypatch.setattr(mn.Run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(MnemoscopeError) as caught:
        ask(run)
    assert words in str(caught.value)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_job_adds_is_there_at_once(built: mn.Run) -> None:
    """After `patterns`, the very run that was asked has the tables, its cards have the claims, and a second call
    loads no model."""
    model = built.model
    fresh = mn.open_run(built.path)
    fresh.patterns(budget=400, model=model)
    assert fresh["L1N3"].claims is not None
    assert "pattern_tests" in fresh.manifest.tables
    again = mn.open_run(built.path)
    again.patterns(budget=400)
    assert again._model is None


@pytest.mark.parametrize("layer", [None, 2])
def test_alike_by_chance_is_the_same_search_for_directions(built: mn.Run, layer: int | None) -> None:
    """For lists of random directions and rotated axes of the neuron's layer, the most that any list has in common."""

    def lists(rows: pl.LazyFrame, *unit: str) -> dict[tuple[Any, ...], set[tuple[int, int]]]:
        every: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
        for *key, context, position in rows.select(*unit, "context", "position").collect().iter_rows():
            every.setdefault(tuple(key), set()).add((context, position))
        return every

    own = lists(built.table("triggers"), "layer", "neuron", "polarity")
    neurons = [places for unit, places in own.items() if layer in (None, unit[0])]
    directions = lists(built.table("null_triggers").filter(layer=1), "kind", "neuron", "polarity")
    said = built.find(like="L1N3", layer=layer).null
    for kind, name in (("random", "random directions"), ("rotated", "rotated axes")):
        most = [
            max(len(places & other) for other in neurons)
            for unit, places in directions.items()
            if unit[0] == kind
        ]
        high = pl.Series(most).quantile(0.95)
        assert f"of {name} {np.median(most):.0f} in the median and {high:.0f} in one of twenty" in said, said


def test_the_runs_own_model_is_loaded_once(built: mn.Run) -> None:
    """Jobs load the model the run was built from, in its dtype, and keep it; another one can be given."""
    opened = mn.open_run(built.path)
    assert opened._model is None
    first = opened.model
    assert (first.dtype, first.weights_sha256) == ("fp32", built.manifest.model.weights_sha256)
    assert opened.verify(sample=2).passed
    assert opened.model is first
    assert mn.verify(built.path, first, sample=2).passed


def test_functions_take_either_run(built: mn.Run) -> None:
    """A run of the store is as good as an opened one, and an opened one passes for one of the store."""
    stored = StoredRun(built.path, built.manifest)
    assert isinstance(built, StoredRun)
    assert mn.Run.of(built) is built
    assert mn.verify(stored, built.model, sample=2).passed
    assert mn.compare(stored, built, only="glance").findings
    assert mn.explain(built.model, PROMPT, " Paris", run=stored, top=1).run == str(built.path)


@pytest.mark.slow
def test_a_finished_study_needs_no_model(built: mn.Run, tmp_path: Path) -> None:
    """What is measured is read; the page and its files are written by `save`."""
    mn.study(built.manifest.model.id, built.manifest.corpus.id, built.path, only="glance")
    opened = mn.open_run(built.path)
    report = opened.study(only="glance")
    assert opened._model is None
    assert [section.name for section in report.sections] == ["glance"]
    assert report.whole is not None and len(report.whole()) > len(
        report.sections
    )  # the page is of all there is
    assert report.save(tmp_path / "report.html").is_file()
    assert (tmp_path / "report_files").is_dir()
    listed = mn.measurements(opened, only="glance")
    assert [(one["name"], one["state"]) for one in listed] == [("glance", "ready")]


# -- results ------------------------------------------------------------------------------------------------


def test_a_card_saves_itself(run: mn.Run, tmp_path: Path) -> None:
    """A page that needs nothing else, data, or text; nothing is left beside it."""
    shown = run["L1N3"]
    (tmp_path / "new").mkdir()
    for ending in ("html", "json", "txt"):
        assert shown.save(tmp_path / "new" / f"card.{ending}").is_file()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "card.html",
        "card.json",
        "card.txt",
    ]
    assert json.loads((tmp_path / "new/card.json").read_text())["id"] == "L1N3"
    assert (tmp_path / "new/card.txt").read_text() == str(shown)
    assert "L1N3" in (tmp_path / "new/card.html").read_text()


def test_what_cannot_be_saved_is_one_line(run: mn.Run, tmp_path: Path) -> None:
    """A folder in the way, or a file where a folder is needed: a line that names it, and nothing is left."""
    (tmp_path / "taken.html").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken.html", tmp_path / "file" / "card.html"):
        with pytest.raises(RunError, match=path.name):
            run["L1N3"].save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.html"]


def test_a_repr_is_what_the_terminal_shows(run: mn.Run) -> None:
    """A few thousand characters in 80 columns instead of every field."""
    for shown in (run["L1N3"], run.find(sort="kurtosis"), run.highlights(2)):
        assert len(repr(shown)) < 20_000
        assert max(map(len, repr(shown).splitlines())) <= WIDTH


def test_names_are_listed_and_there() -> None:
    """`dir` lists the public names, each of which exists; others do not."""
    assert set(mn.__all__) <= set(dir(mn))
    assert all(getattr(mn, name) is not None for name in mn.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        mn.nothing_such  # noqa: B018
    with pytest.raises(RunMissing):
        mn.open_run("nowhere")
    assert issubclass(mn.errors.QueryError, QueryError)


_QUESTIONS = """
import sys
import mnemoscope as mn
run = mn.open_run(sys.argv[1])
assert not {"scipy", "altair", "jinja2"} & set(sys.modules), "opening a run draws nothing"
for shown in (run["L1N3"], run.find(promotes=" Paris"), run.highlights(2), run.compare(run, only="values")):
    str(shown), shown._repr_html_(), shown.to_dict()
run.annotate(sys.argv[2], neurons=8, prefixes=5, seed=0)
heavy = sorted({"torch", "transformers", "numba"} & set(sys.modules))
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


@pytest.mark.slow
def test_questions_that_need_no_model_import_no_torch(run: mn.Run, tmp_path: Path) -> None:
    """Cards, searches, highlights, a comparison and a sheet leave torch alone, and opening a run all that draws."""
    command = [sys.executable, "-c", _QUESTIONS, str(run.path), str(tmp_path / "sheet.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_data_are_json_whatever_is_undefined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no number is null, in what is saved and in what is printed: JSON knows neither NaN nor infinity."""

    class Undefined(Shown):
        def to_dict(self) -> dict[str, Any]:
            return {"a": float("nan"), "b": [1.0, float("-inf")], "c": {(1, 2): "x"}}

    print_result(Undefined(), as_json=True)
    for text in (Undefined().save(tmp_path / "a.json").read_text(), capsys.readouterr().out):
        assert json.loads(text, parse_constant=pytest.fail) == {
            "a": None,
            "b": [1.0, None],
            "c": {"(1, 2)": "x"},
        }
