"""Sampling, checkpoints, the catalogue, parameters, and the command from model to report."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from families import FAMILIES
from synthetic import make_run
from test_cli import call
from tiny import model_folder, texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError, RunMismatch
from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import OPTIONAL, SCHEMAS
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings import glance
from mnemoscope.studies.findings.finding import STATES, Item, items
from mnemoscope.studies.measures.positions import Sizes, Work, sample
from mnemoscope.text.sampling import half

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
QUICK = "glance,values,value_ranks,weights,distributions"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny model and a run of it."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "run", top=5, nulls=()), model


# -- sampling ----------------------------------------------------------------------------------------------------


def test_samples_are_what_they_say(case: tuple[Run, Model]) -> None:
    """One position of a context, of test documents, never the first, followed by the target."""
    run, _ = case
    found = sample(run, 1000, longest=20)
    assert len(set(found.contexts.tolist())) == len(found) > 10
    assert half(found.documents).all() and (np.diff(found.contexts) > 0).all()
    stored = run.contexts(found.contexts.tolist())
    for context, at, target, prefix in zip(
        found.contexts.tolist(), found.positions, found.targets, found.prefixes, strict=True
    ):
        tokens = stored[context].tokens
        assert 1 <= at < 20 and tokens[at + 1] == target and prefix.tolist() == tokens[: at + 1].tolist()


@pytest.mark.slow
def test_samples_are_even_over_positions(tmp_path: Path) -> None:
    """Over many seeds every position that counts is drawn about as often as any other of its context."""
    run = make_run(tmp_path / "run", documents=12)
    drawn: dict[int, Counter[int]] = {}
    for seed in range(400):
        found = sample(run, 1000, longest=8, seed=seed)
        for context, at in zip(found.contexts.tolist(), found.positions.tolist(), strict=True):
            drawn.setdefault(context, Counter())[at] += 1
    counts = max(drawn.values(), key=lambda one: len(one))
    assert set(counts) == set(range(1, 8))
    expected = sum(counts.values()) / 7
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 22.5  # chi-squared, 6 df, p = .001


def test_samples_do_not_depend_on_how_many_are_wanted(case: tuple[Run, Model]) -> None:
    """The same seed gives the same; a smaller sample is a part of a larger one."""
    run, _ = case
    large, small = sample(run, 1000, seed=3), sample(run, 5, seed=3)
    places = set(zip(large.contexts.tolist(), large.positions.tolist(), strict=True))
    assert set(zip(small.contexts.tolist(), small.positions.tolist(), strict=True)) <= places
    assert len(small) == 5


def test_batches_serve_every_example_once(case: tuple[Run, Model]) -> None:
    """Prefixes come back whole, at the last counted place of their row."""
    run, _ = case
    found = sample(run, 1000)
    seen = []
    for numbers in found.shards():
        for some, batch in found.batches(numbers):
            for row, number in enumerate(some.tolist()):
                length = int(batch.lengths[row])
                assert batch.tokens[row, :length].tolist() == found.prefixes[number].tolist()
                assert np.flatnonzero(batch.counted[row]).tolist() == [length - 1]
                seen.append(number)
    assert sorted(seen) == list(range(len(found)))


def test_too_little_text_is_said(tmp_path: Path) -> None:
    """Contexts without a position that counts are no sample."""
    run = make_run(tmp_path / "run")
    with pytest.raises(QueryError, match="more text"):
        sample(run, 10, longest=1)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_an_interrupted_measurement_goes_on(case: tuple[Run, Model], tmp_path: Path) -> None:
    """Killed between shards, it does the rest and gives the same rows."""
    run, _ = case
    examples = sample(run, 1000)
    done: list[int] = []

    def measure(numbers: np.ndarray) -> dict[str, pa.Table]:
        if len(done) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        done.append(len(numbers))
        return {"rows": pa.table({"target": examples.targets[numbers]})}

    def everything() -> list[int]:
        tables = Work(tmp_path).shards(examples, measure, "measuring", size=7)
        return pa.concat_tables(tables["rows"])["target"].to_pylist()

    with pytest.raises(KeyboardInterrupt):
        everything()
    (tmp_path / "again").touch()
    assert everything() == examples.targets.tolist()
    assert sum(done) == len(examples)  # no shard was done twice


def test_what_is_measured_is_not_measured_again(case: tuple[Run, Model]) -> None:
    """A second call changes no file; other sizes do; no work folder is left."""
    run, model = case
    chosen = catalogue.choose("glance,value_ranks")
    first = study.measure(run, model, chosen=chosen)
    again = study.measure(first, model, chosen=chosen)
    assert again.manifest == first.manifest and not (run.path / study.WORK).exists()
    assert [one.state(again, Sizes()) for one in chosen] == ["ready", "ready"]
    assert [one.state(again, Sizes(seed=1)) for one in chosen] == ["ready", "other sizes"]
    other = study.measure(again, model, chosen=chosen, sizes=Sizes(seed=1))
    assert other.manifest.tables["value_ranks"] != first.manifest.tables["value_ranks"]
    assert other.check() == []


@pytest.mark.slow
def test_shuffled_weights_on_request(tmp_path: Path) -> None:
    """Asked for, neurons of the copy are mined and its refinement is measured; it counts as another size (A78)."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    plain, sizes = Sizes(positions=4), Sizes(positions=4, shuffled=True)
    mn.study(model, texts(30), tmp_path / "run", only="refinement", positions=4, shuffled=True)
    run = mn.open_run(tmp_path / "run")
    kinds = run.table("null_neurons").select("kind").unique().collect()["kind"].to_list()
    assert sorted(kinds) == ["random", "rotated", "shuffled"]
    (refinement,) = (one for one in catalogue.choose("refinement") if one.measured)
    assert refinement.state(run, sizes) == "ready" and refinement.state(run, plain) == "other sizes"
    units = run.table("refinement").select("unit").unique().collect()["unit"].to_list()
    assert sorted(units) == ["model", "shuffled"]
    rows = run.table("refinement").sort("example", "layer", "lens").collect()
    mine, copied = (
        rows.filter(pl.col("unit") == name)["p_final"].to_numpy() for name in ("model", "shuffled")
    )
    assert not np.allclose(mine, copied)
    run = study.measure(run, model, chosen=[refinement], sizes=plain)
    assert run.table("refinement").select("unit").unique().collect()["unit"].to_list() == ["model"]


def test_another_model_is_refused(case: tuple[Run, Model]) -> None:
    """A run is measured with the model it was built from."""
    run, _ = case
    other = mn.load_model(FAMILIES["gpt2"](), tokenizer=tokenizer())
    with pytest.raises(RunMismatch, match="built from"):
        study.measure(run, other, chosen=catalogue.choose("glance"))


def test_the_estimate_counts_what_is_left(case: tuple[Run, Model]) -> None:
    """Nothing left costs nothing; something costs something."""
    run, model = case
    chosen = catalogue.choose("value_ranks")
    assert study.estimate(run, model, chosen, Sizes(seed=99)) > 0
    assert study.estimate(run, model, catalogue.choose("values"), Sizes()) == 0
    few, many = (study.estimate(run, model, catalogue.choose("cases"), Sizes(cases=n)) for n in (6, 24))
    (cases,) = catalogue.choose("cases")
    assert many - few == pytest.approx(18 * cases.seconds) and cases.seconds > 0


def test_each_line_of_a_study_says_when_all_is_done(
    case: tuple[Run, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what later measurements were expected to take, and by how much that was wrong of earlier ones."""
    run, model = case
    copy = mn.open_run(shutil.copytree(run.path, tmp_path / "copy"))
    sizes, clock = Sizes(seed=99), iter((0.0, 30.0, 30.0, 90.0, 90.0, 91.0))
    chosen = [each for each in catalogue.choose("refinement,contributions,cases") if each.lacks(copy, sizes)]
    assert len(chosen) == 3

    def job(run: Run, model: Model, sizes: Sizes, work: Any) -> dict[str, Any]:
        work.report(Progress("asking", 0, 1, "questions"))
        return {}

    monkeypatch.setattr(study, "_expected", lambda *_: [10.0, 20.0, 30.0])
    monkeypatch.setattr(study, "JOBS", dict.fromkeys(study.JOBS, job))
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps: list[Progress] = []
    study.measure(copy, model, chosen=chosen, sizes=sizes, report=steps.append)
    assert [step.after for step in steps] == [50.0, 90.0, 0.0]


def test_a_fast_study_is_smaller() -> None:
    """Every count of examples shrinks."""
    whole, fast = Sizes(), Sizes().fast()
    for name in ("positions", "sentences", "cases", "tokens", "longest"):
        assert 0 < getattr(fast, name) < getattr(whole, name)


def test_a_shuffled_copy_costs_as_much_again(
    case: tuple[Run, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an example costs is counted twice, and nothing of the measurements that have no such null."""
    run, model = case
    monkeypatch.setattr(study, "_speed", lambda *_: 100.0)
    (one,) = (one for one in catalogue.choose("refinement") if one.measured)

    def cost(name: str, shuffled: bool) -> float:
        return study.estimate(run, model, catalogue.choose(name), Sizes(seed=99, shuffled=shuffled))

    smaller = study.FIXED + (1 - study.FIXED) * run.manifest.corpus.tokens / study.WHOLE
    once, twice = (cost("refinement", both) - 60 * one.minutes * smaller for both in (False, True))
    assert twice == pytest.approx(2 * once) and once > 0
    assert cost("contributions", True) == cost("contributions", False)


# -- the catalogue and the items ---------------------------------------------------------------------------------


def test_the_catalogue_names_what_exists() -> None:
    """What is measured has a job and nothing else has, tables have schemas, names are distinct."""
    names = [one.name for one in catalogue.CATALOGUE]
    assert len(set(names)) == len(names)
    for one in catalogue.CATALOGUE:
        assert one.measured == (one.name in study.JOBS)
        assert set(one.tables) <= OPTIONAL.keys() <= SCHEMAS.keys()


def test_unknown_measurements_are_named() -> None:
    """A name that there is not is said with those that there are."""
    with pytest.raises(QueryError, match="no 'nothing'; choose among glance"):
        catalogue.choose("values,nothing")
    with pytest.raises(QueryError, match="choose among"):
        catalogue.choose(" , ")


def test_every_item_is_answered() -> None:
    """A1 to A80 in order, each done by a command with a test that is there, or not applicable for a reason."""
    found = items()
    assert [one.id for one in found] == [f"A{n}" for n in range(1, 81)]
    for one in found:
        assert one.state in STATES and one.title
        assert one.why if one.state == "not applicable" else one.command
        for test in filter(None, one.test.split(", ")):
            assert (TESTS / test).exists(), (one.id, test)
        if one.command.startswith("mnemoscope study -o RUN --only "):
            name = one.command.split()[-1]
            (measurement,) = (found for found in catalogue.choose(name) if found.name == name)
            assert one.id in measurement.items, one.id


def _answers(module: str, seen: set[str]) -> set[str]:
    """The items that findings of an analysis, and of the analyses that it imports, say they answer."""
    seen.add(module)
    file = files("mnemoscope") / f"{module.replace('.', '/')}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {
        one.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple)
        for one in node.elts
        if isinstance(one, ast.Constant) and re.fullmatch(r"A\d+", str(one.value))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mnemoscope.studies.findings":
            for name in {f"studies.findings.{one.name}" for one in node.names} - seen:
                found |= _answers(name, seen)
    return found


@pytest.mark.parametrize("one", catalogue.CATALOGUE, ids=lambda one: one.name)
def test_every_item_of_a_measurement_has_a_finding(one: catalogue.Measurement) -> None:
    """What a measurement is said to answer, a finding of its analysis names: no item is done by code nobody calls."""
    assert set(one.items) <= _answers(one.analysis.__module__.partition(".")[2], set())


@pytest.mark.parametrize("one", items(), ids=lambda one: one.id)
def test_every_done_item_leads_somewhere(one: Item) -> None:
    """Its command is a measurement of the catalogue, a command, or a page of the documentation."""
    import typer

    from mnemoscope.cli import app

    if one.state != "done":
        pytest.skip(one.why)
    if found := re.fullmatch(r"mnemoscope study -o RUN --only (\w+)", one.command):
        assert found[1] in {measurement.name for measurement in catalogue.CATALOGUE}
    elif one.command.startswith("mnemoscope "):
        assert one.command.split()[1] in typer.main.get_command(app).commands
    else:
        assert (TESTS.parent / one.command).exists()


@pytest.mark.parametrize(
    "typed", sorted({one.command for one in items() if one.command.startswith("mnemoscope ")})
)
def test_every_command_of_an_item_is_one(typed: str, tmp_path: Path) -> None:
    """The command line takes the words as they are printed, with a folder in the place of RUN."""
    import typer

    from mnemoscope.cli import app

    (tmp_path / "run").mkdir()
    name, *words = [str(tmp_path / "run") if word == "RUN" else word for word in typed.split()[1:]]
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, words) is not None  # a word that it does not know is an error


# -- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_parameters_are_counted_once(family: str, tmp_path: Path) -> None:
    """All parts together are the model's parameters; a feed-forward layer has its matrices and biases."""
    model = mn.load_model(FAMILIES[family](), tokenizer=tokenizer())
    run = mn.build(model, texts(12), tmp_path / "run", top=2, nulls=())
    run = study.measure(run, model, chosen=catalogue.choose("glance"))
    rows = run.table("parameters").collect()
    assert rows["parameters"].sum() == sum(one.numel() for one in model.hf.parameters())
    layer = model.anatomy.layers[1]
    matrices = [
        layer.values(),
        layer.keys(),
        layer.ups(),
        layer.down_bias(),
        layer.key_bias(),
        layer.up_bias(),
    ]
    expected = sum(one.numel() for one in matrices if one is not None)
    here = rows.filter(pl.col("layer") == 1, pl.col("part") == "ffn")["parameters"].item()
    assert here == expected
    frame = glance.findings(run)[0].frame
    assert frame["share_of_all"].sum() == pytest.approx(1)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_from_model_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command builds, measures and writes a page that asks nothing of a network; a second one only draws."""
    folder, corpus, out = model_folder(tmp_path / "model"), tmp_path / "text.jsonl", tmp_path / "run"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts(60)), encoding="utf-8")
    only = ("--only", "glance,values,value_ranks,distributions")
    code, told, error = call(monkeypatch, capsys, "study", folder, "--corpus", corpus, "-o", out, *only)
    assert code == 0, error
    assert "Feed-forward layers hold" in told and "measuring" in error
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "") and "All items, A1 to A80" in page
    files = {file.suffix for file in (out / "report_files").iterdir()}
    assert files == {".svg", ".pdf", ".csv", ".parquet"}
    code, listed, error = call(monkeypatch, capsys, "study", "--list", "-o", out, "--json")
    states = {row["name"]: row["state"] for row in json.loads(listed)}
    assert states["value_ranks"] == "ready" and states["questions"] == states["cases"] == "to measure"
    whole = set(re.findall(r'<article id="([^"]+)"', page))
    quick = ("--only", "value_ranks", "--json")
    code, data, error = call(monkeypatch, capsys, "study", "-o", out, *quick)
    assert code == 0 and "measuring" not in error
    asked = {one["id"] for one in json.loads(data)}
    assert asked >= {"figure-5-rank", "figure-6-confidence"}
    # Asked for two of its figures, the page still has all that the run has.
    again = (out / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<article id="([^"]+)"', again)) == whole > asked
    both = tmp_path / "both.html"
    code, _, error = call(monkeypatch, capsys, "compare", out, out, "--only", "value_ranks", "--html", both)
    assert code == 0, error
    assert "Do neurons keep their triggers, and do they more than other directions?" in both.read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("documents", "top", "longest", "only"),
    [(1, 1, 40, None), (20, 5, 40, QUICK), (21, 2, 6, QUICK), (60, 5, 40, QUICK), (100, 20, 5, QUICK)],
)
def test_a_study_of_little_text_says_what_it_can(
    tmp_path: Path, documents: int, top: int, longest: int, only: str | None
) -> None:
    """However little there is, each measurement answers or says what is missing, and no sentence speaks of nan."""
    folder = model_folder(tmp_path / "model")
    run = mn.build(folder, texts(documents, longest=longest), tmp_path / "run", top=top)
    report = run.study(model=folder, only=only, fast=True)
    for section in report.sections:
        assert section.findings or section.missing, section.name
        for finding in section.findings:
            assert not re.search(r"\b(nan|None|inf)\b", finding.says), (finding.id, finding.says)
    report.save_page(tmp_path / "report.html")


def test_study_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, or no model for a folder without a run: one line, exit code 2."""
    code, _, error = call(monkeypatch, capsys, "study")
    assert code == 2 and "-o RUN" in error
    code, _, error = call(monkeypatch, capsys, "study", "-o", tmp_path / "none")
    assert code == 2 and "give MODEL and --corpus" in error
