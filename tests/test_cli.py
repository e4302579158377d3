"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from synthetic import make_run
from tiny import model_folder, texts, tokenizer
from typer.testing import CliRunner

import mnemoscope
from mnemoscope.cli import app, main
from mnemoscope.cli.shared import ORDER
from mnemoscope.errors import MnemoscopeError
from mnemoscope.run.reading import open_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished synthetic run."""
    return make_run(tmp_path_factory.mktemp("runs") / "synthetic").path


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, through the real entry point."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
        raise SystemExit(0)
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def text_file(path: Path, content: bytes) -> Path:
    """A file with that content."""
    path.write_bytes(content)
    return path


def test_build_show_find_verify(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main job from end to end, each command with exit code 0 and data on stdout as JSON."""
    source = text_file(tmp_path / "text.txt", "\n\n".join(texts(30)).encode())
    run = tmp_path / "run"
    code, out, _ = call(
        monkeypatch,
        capsys,
        "build",
        model,
        "--corpus",
        source,
        "-o",
        run,
        "--top",
        5,
        "--dtype",
        "fp32",
        "--json",
    )
    assert (code, json.loads(out)["corpus"]["documents"]) == (0, 30)
    code, out, _ = call(monkeypatch, capsys, "show", run, "L1N3", "--json")
    assert (code, json.loads(out)["layer"]) == (0, 1)
    code, out, _ = call(monkeypatch, capsys, "show", run, "1.3")
    assert code == 0
    assert "L1N3" in out
    code, out, _ = call(monkeypatch, capsys, "find", run, "--promotes", " Paris", "-n", 999, "--json")
    assert code == 0
    hits = json.loads(out)["rows"]
    code, out, _ = call(
        monkeypatch, capsys, "find", run, "--promotes", " Paris", "-n", 999, "--sort", "max", "--json"
    )
    ordered = json.loads(out)["rows"]
    assert code == 0 and {row["neuron"] for row in ordered} == {row["neuron"] for row in hits} > set()
    assert [row["max"] for row in ordered] == sorted((row["max"] for row in ordered), reverse=True)
    code, out, _ = call(monkeypatch, capsys, "verify", run, "--sample", 10, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    code, _, _ = call(monkeypatch, capsys, "show", run, "--html", tmp_path / "page.html")
    assert (code, (tmp_path / "page.html").exists()) == (0, True)


BAD_TEXT = {
    "missing": (None, "no such file"),
    "empty": (b"", "no text"),
    "blank": (b" \n\n  \n", "no text"),
    "binary": (b"\x00\x01\x02 words", "binary"),
    "broken": (b"good words \xff\xfe", "UTF-8"),
}


@pytest.mark.parametrize("kind", sorted(BAD_TEXT))
def test_bad_text_is_one_line_and_exit_code_2(
    kind: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file is named, and so is what is wrong with it; no folder appears."""
    content, words = BAD_TEXT[kind]
    source = tmp_path / f"{kind}.txt"
    if content is not None:
        source.write_bytes(content)
    code, out, err = call(monkeypatch, capsys, "build", model, "--corpus", source, "-o", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith("mnemoscope: ")
    assert len(err.strip().splitlines()) == 1, err
    assert words in err
    assert source.name in err
    assert not (tmp_path / "run").exists()


def test_a_jsonl_without_the_column_names_those_it_has(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says which columns there are."""
    source = text_file(tmp_path / "rows.jsonl", b'{"body": "words", "title": "a"}\n')
    code, _, err = call(monkeypatch, capsys, "build", model, "--corpus", source, "-o", tmp_path / "run")
    assert code == 2
    assert "body" in err
    assert "text" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such-model-anywhere", "local folder"),
        ("EMPTY", "config.json"),
        ("MAMBA", "mamba"),
    ],
)
def test_a_bad_model_is_one_line_and_exit_code_2(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown id, folder without config, and families that are not supported, with the reason."""
    folder = tmp_path / "model"
    folder.mkdir()
    if name == "MAMBA":
        from transformers import MambaConfig, MambaForCausalLM

        MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)).save_pretrained(
            folder
        )
        tokenizer().save_pretrained(folder)
    capsys.readouterr()  # what saving printed
    given = name if "/" in name else folder
    code, _, err = call(monkeypatch, capsys, "models", "check", given)
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert words in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "RUN", "L99N0"], "layers 0 to 2"),
        (["show", "RUN", "L0N9999"], "neurons 0 to"),
        (["show", "RUN", "thirteen"], "L13N366"),
        (["show", "NOWHERE"], "no such folder"),
        (["find", "RUN"], "ask exactly one"),
        (["find", "RUN", "--promotes", " Paris", "--trigger", "a", "--sort", "max"], "ask exactly one"),
        (["find", "RUN", "--sort", "beauty"], "kurtosis"),
        (["find", "RUN", "--promotes", "zzzzqqqq"], "zzzzqqqq"),
        (["explain", "x"], "give either a prompt, or --prompts"),
        (["explain", "x", "words", "--prompts", "FILE.jsonl", "-o", "t.parquet"], "give either"),
        (["explain", "x", "--prompts", "FILE.jsonl"], "-o TABLE.parquet"),
        (["explain", "x", "words", "--run", "NOWHERE"], "no such folder"),
        (["build", "x", "--corpus", "NOWHERE.txt", "-o", "out"], "NOWHERE.txt"),
        (["steer", "RUN", "L99N0", "words"], "layers 0 to 2"),
        (["steer", "RUN", "L1N3", "words", "--factor", "nan"], "--factor"),
        (["steer", "RUN", "L1N3", "words", "--length", 0], "give 1 or more"),
    ],
)
def test_a_question_without_an_answer_is_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line says what is accepted."""
    given = [str(run) if word == "RUN" else word for word in words]
    code, out, err = call(monkeypatch, capsys, *given)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert said in err


@pytest.mark.parametrize("table", ["triggers", "contexts", "neurons"])
@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_damaged_run_names_the_table(
    table: str,
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half a run is refused when it is opened."""
    path = make_run(tmp_path / "run").path
    file = path / f"{table}.parquet"
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    code, _, err = call(monkeypatch, capsys, "show", path, "L0N1")
    assert code == 2
    assert table in err


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_build_goes_on_afterwards(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ENOSPC while the state is saved: exit code 2; with room again, the same command finishes."""
    source = text_file(tmp_path / "text.txt", "\n\n".join(texts(30)).encode())
    command = ["build", model, "--corpus", source, "-o", tmp_path / "run", "--top", 5]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mnemoscope.mine.statistics.np.savez", full)
        code, _, err = call(patch, capsys, *command)
    assert code == 2
    assert "the disk is full" in err
    code, _, _ = call(monkeypatch, capsys, *command)
    assert code == 0
    assert not open_run(tmp_path / "run").check()


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group with its words."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    """Each --help, or -h, exits with 0 and ends in an example."""
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(app, [*path, flag])
        assert result.exit_code == 0
        assert "Example: mnemoscope " in result.output


def test_the_help_lists_every_command_in_the_order_of_the_work() -> None:
    """Under headings, demo and build first; none is left out."""
    shown = CliRunner().invoke(app, ["--help"]).output
    group = typer.main.get_command(app)
    listed = re.findall(r"^  ([a-z]+)  ", shown, re.M)
    assert sorted(listed) == sorted(group.commands)
    assert listed == [name for names in ORDER.values() for name in names if name in group.commands]
    headings = [line.rstrip(":") for line in shown.splitlines() if re.fullmatch(r"[A-Z][a-z]+:", line)]
    assert headings == ["Options", *ORDER]


SHARED = {"limit", "corpus", "segment", "text", "dtype", "device", "workers", "revision", "only", "as_json"}


def test_one_name_for_one_thing() -> None:
    """What several commands take has one spelling and one meaning in all of them, and each option says what it is."""
    options = [option for path, command in commands() if path for option in command.params]
    assert not [option.name for option in options if not option.help]
    for name in SHARED:
        same = [option for option in options if option.name == name and option.opts[0].startswith("-")]
        assert len({(tuple(option.opts), option.help) for option in same}) == 1, name
    spelled = {spelling for option in options for spelling in option.opts}
    assert not spelled & {"--tokens", "--report", "--output", "--file", "--page"}


def test_the_version_is_printed() -> None:
    """--version, on stdout."""
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mnemoscope {mnemoscope.__version__}\n")


def test_models_lists_the_families(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What closes and why not for the rest, as JSON for machines and in words."""
    code, out, _ = call(monkeypatch, capsys, "models", "--json")
    assert code == 0
    rows = json.loads(out)
    assert {"gpt2", "llama", "gemma2", "phi3"} <= {row["family"] for row in rows if row["error"] is not None}
    assert all((row["error"] is None) == bool(row["reason"]) for row in rows)
    code, out, _ = call(monkeypatch, capsys, "models")
    assert code == 0 and "rwkv" in out.split("are refused")[1]


def test_errors_of_the_tree_are_the_only_ones_made_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "models"])
    monkeypatch.setattr("mnemoscope.cli.app", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main()
    assert issubclass(MnemoscopeError, Exception)
