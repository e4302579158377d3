"""What people type by mistake: one line that says what to do, exit code 2, nothing loaded for it and nothing harmed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from synthetic import make_run
from tiny import model_folder, texts

from mnemoscope.cli import main
from mnemoscope.errors import CorpusError, MnemoscopeError, ModelError, QueryError, RunError

LATE = "  # after the model is loaded"

# Command (without `mnemoscope`), and what its line says. In the folder of `place` below.
TABLE = {
    # which command, which run
    "show": "Missing argument",
    "show run --nosuch": "No such option",
    "shwo run": "No such command 'shwo'. Did you mean 'show'",
    "show nosuch": "nosuch: there is no such folder; make one with `mnemoscope build`",
    "show good.txt": "good.txt",
    "show folder": "holds no manifest.json",
    "show truncated": "triggers has 1000 bytes instead of",
    "show broken": "manifest",
    "show newer": "format 99",
    "show older": r"older version of mnemoscope \(format 1; this one reads 2\); build it again in another folder",
    "patterns older": "format 1; this one reads 2",
    "study -o older": "format 1; this one reads 2",
    "compare run older": "format 1; this one reads 2",
    "build model --corpus good.txt -o older" + LATE: "format 1; this one reads 2",
    "serve": "give folders of runs, or --static",
    "serve run --static folder": "give folders of runs, or --static",
    "serve --static folder --model model": "give folders of runs, or --static",
    "serve --static run": "serving the folder run: it holds no site; write one with `mnemoscope site RUN -o run`",
    "site run -o run": "writing the site .*run: there is something already; choose a new or an empty folder",
    "site run -o good.txt": "writing the site .*good.txt: there is something already",
    # which neuron
    "show run L13N99999": "out of range",
    "show run L99N0": "layers 0 to 2",
    "show run banana": "'banana' is not an address; write L13N366",
    "show run L-1N5": "not an address",
    "show run L1N99999999999999999999999999": "not an address",
    "show run ''": "not an address",
    "show run '13 366'": "not an address",
    "show run --triggers ten": "valid integer",
    "show run --triggers -3": "--triggers -3 is too small; give 0 or more",
    "show run L1N1 --triggers -1": "--triggers -1 is too small; give 0 or more",
    # which page
    "show run L1N1 --html folder": "writing the page folder: there is a folder of that name",
    "show run L1N1 --html nowhere/x.html": "writing the page nowhere/x.html: there is no folder .*nowhere",
    "show run L1N1 --html /proc/x.html": "writing the page /proc/x.html",
    "show run --html folder": "writing the gallery folder: there is a folder of that name",
    "show run --html ''": "--html is empty",
    # what to find
    "find run": "ask exactly one",
    "find run --promotes a --trigger b": "2 questions were asked; ask exactly one of --promotes, --suppresses",
    "find run --promotes paris": 'the nearest are " Paris"',
    "find run --promotes ''": "--promotes is empty",
    "find run --promotes=": "--promotes= is empty",
    "find run --sort foo": "unknown statistic; choose one of",
    "find run --sort ''": "--sort is empty",
    "find run --trigger zzzzqq": "'zzzzqq'",
    "find run --sort max --layer 99": "layers 0 to 2",
    "find run --sort max --layer -1": "layers 0 to 2",
    "find run --sort max -n -4": "--count -4 is too small; give 0 or more",
    "find run --pattern year": "mnemoscope patterns",
    "find run --promotes a --layer one": "valid integer",
    # which model
    "build no/such-model --corpus good.txt -o new" + LATE: "no/such-model: .*check the id and the network",
    "build sample:smollm --corpus good.txt -o new" + LATE: "there is sample:smollm2-135m",
    "build folder --corpus good.txt -o new" + LATE: "has no config.json",
    "build cut-model --corpus good.txt -o new" + LATE: "cut-model",
    "build odd-model --corpus good.txt -o new" + LATE: "odd-model",
    "build good.txt --corpus good.txt -o new" + LATE: "is not a model folder or a .gguf file",
    "build nosuch.gguf --corpus good.txt -o new" + LATE: "there is no file nosuch.gguf",
    "build false.gguf --corpus good.txt -o new" + LATE: "false.gguf",
    "models check ./nosuch" + LATE: "./nosuch is not a model folder",
    "models check model --dtype int8": "--dtype int8 is not a precision; give auto, fp32, bf16, fp16",
    # which text
    "build model -o new": "Missing option '--corpus'",
    "build model --corpus sample:wiki -o new": "there is sample:wikipedia",
    "build model --corpus nosuch.txt -o new": "nosuch.txt: there is no such file",
    "build model --corpus '*.xyz' -o new": "no file matches",
    "build model --corpus empty.txt -o new": "empty.txt: it holds no text",
    "build model --corpus blank.txt -o new": "blank.txt: it holds no text",
    "build model --corpus binary.txt -o new": "binary.txt",
    "build model --corpus latin.txt -o new": "latin.txt.*UTF-8",
    "build model --corpus image.bin -o new": "image.bin",
    "build model --corpus cut.parquet -o new": "cut.parquet",
    "build model --corpus cut.txt.gz -o new": "cut.txt.gz",
    "build model --corpus bodies.jsonl -o new": "there is no column 'text'; there are 'body'",
    "build model --corpus numbers.jsonl -o new": "holds a int",
    "build model --corpus good.txt -o new --text ''": "--text is empty",
    "build model --corpus '' -o new": "--corpus is empty",
    "build model --corpus good.txt -o new --segment paragraph": "--segment paragraph is not known; accepted are",
    "build model --corpus good.txt -o new --segment window:4": "window",
    "build model --corpus good.txt -o new --limit 0": "--limit 0 leaves no token; give a positive number",
    "build model --corpus good.txt -o new --limit -5": "give a positive number of tokens",
    "demo --limit 0 -o new": "--limit 0 is too small; give 1 or more",
    # how to build, and where
    "build model --corpus good.txt -o new --top 0": "--top 0 triggers cannot be kept; give 1 to 10000",
    "build model --corpus good.txt -o new --dtype int8": "--dtype int8 is not a precision",
    "build model --corpus good.txt -o new --device gpu": "--device gpu is not a device; give auto, cpu, cuda",
    "build model --corpus good.txt -o new --device cuda:77": "--device cuda:77 is not there.*give auto or cpu",
    "build model --corpus good.txt -o new --nulls foo": "give some of random, rotated, shuffled",
    "build model --corpus good.txt -o new --workers 0": "--workers 0 processes do no work; give 1 or more",
    "build model --corpus good.txt -o good.txt": "good.txt: Not a directory; choose a folder",
    "build model --corpus good.txt -o good.txt/new": "good.txt/new: Not a directory; choose a folder",
    "build model --corpus good.txt -o .": "neither empty nor a run, it holds",
    "build model --corpus good.txt -o model": "neither empty nor a run, it holds 'config.json'",
    "demo -o model": "neither empty nor a run, it holds 'config.json'",
    "study model --corpus good.txt -o model": "neither empty nor a run, it holds 'config.json'",
    "build model --corpus good.txt -o ''": "-o is empty",
    "build model --corpus good.txt --out=": "--out= is empty",
    # a prediction
    "explain model": "give either a prompt, or --prompts",
    "explain model ''": "the prompt is empty",
    "explain model text --target ''": "--target is empty",
    "explain model text --foil ''": "--foil is empty",
    "explain model text --target a --target-id 3": "both --target a and --target-id 3 were given; give one",
    "explain model text --position 99" + LATE: "take 0 to",
    "explain model text --position one": "valid integer",
    "explain model text --lens tuned": "--lens tuned is not a lens; give raw, own or frozen",
    "explain model text --top 0": "--top 0 is too small; give 1 or more",
    "explain model text --top -5": "--top -5 is too small",
    "explain model text --ablate -1": "--ablate -1 is too small; give 0 or more",
    "explain model text --run nosuch": "nosuch: there is no such folder",
    "explain model text --run run": "it was built from .*, and model has",
    "explain model text --html nowhere/x.html": "there is no folder",
    "explain model text --html folder": "there is a folder of that name",
    "explain model text --device gpu": "is not a device",
    "trace model text --top 0": "--top 0 is too small; give 1 or more",
    "trace model text --neuron banana": "'banana' is not an address",
    "trace run text --neuron L99N0": "layers 0 to 2",
    "trace run text --html folder": "there is a folder of that name",
    "trace model text --device gpu": "is not a device",
    "trace model text --model other": "--model is for one",
    # many of them
    "explain model --prompts prompts.jsonl": "-o TABLE.parquet",
    "explain model text --prompts prompts.jsonl -o t.parquet": "give either",
    "explain model --prompts nosuch.jsonl -o t.parquet": "nosuch.jsonl: no such file",
    "explain model --prompts empty.txt -o t.parquet": "has none; write one JSON object a line",
    "explain model --prompts good.txt -o t.parquet": "line 1: this is not JSON",
    "explain model --prompts bodies.jsonl -o t.parquet": "line 1: unknown key 'body'",
    "explain model --prompts deep.jsonl -o t.parquet": "line 1: this is not JSON .it is nested too deeply",
    "explain model --prompts prompts.jsonl -o t.xlsx": "must end in .parquet, .csv or .jsonl",
    "explain model --prompts prompts.jsonl -o table": "must end in .parquet, .csv or .jsonl",
    "explain model --prompts prompts.jsonl -o good.txt/t.csv": "writing the table good.txt/t.csv",
    "explain model --prompts prompts.jsonl -o prompts.jsonl": "that file is read here and would be lost",
    # patterns
    "test run L1N1": "Missing option '--pattern'",
    "test run L1N1 --pattern 'regex:('": r"regex:\(",
    "test run L1N1 --pattern yeer": "yeer",
    "test run L1N1 --pattern word:a@99999999999999999999": "is no window",
    "test run L1N1 --pattern file:deep.jsonl": "line 1: .* is no label",
    "test run L1N1 --pattern file:nosuch.jsonl": "nosuch.jsonl",
    "test run L1N1 --pattern year --sign plus": "--sign plus is not a sign; give [+] or -",
    "test run L1N1 --pattern year --budget 0": "--budget 0 is too small; give 1 or more",
    "test run L9N1 --pattern year": "layers 0 to 2",
    "test run 'blocks.9.mlp.hook_post.1' --pattern year": "L9N1: out of range|layers 0 to 2",
    "patterns run --budget 0": "--budget 0 is too small; give 1 or more",
    "patterns run -n -1": "--count -1 is too small",
    "patterns run --device gpu": "is not a device",
    "removal run --documents 0": "--documents 0 is too small; give 2 or more",
    "removal run --per-layer 1": "--per-layer 1 is too small; give 2 or more",
    "verify run --sample -1": "--sample -1 is too small; give 1 or more",
    "verify run --sample 9999999999999999999999": "--sample 9999999999999999999999 is too large; give 2,147,483,647 or",
    # the same of whatever draws
    "verify run --seed -1": "--seed -1 is no seed; give 0 to 4294967295",
    "test run L1N1 --pattern year --seed -1": "--seed -1 is no seed",
    "patterns run --seed 99999999999999999999": "--seed 99999999999999999999 is no seed",
    "removal run --seed -1": "--seed -1 is no seed",
    "steer run L1N1 text --seed -1": "--seed -1 is no seed",
    "study -o run --seed -1": "--seed -1 is no seed",
    "annotate run --out new.jsonl --seed -1": "--seed -1 is no seed",
    "find run --sort max -n 99999999999999999999": "--count 99999999999999999999 is too large",
    # the study
    "study": "give one with -o RUN",
    "study -o new": "give MODEL and --corpus to build it",
    "study -o run --only foo": "foo",
    "study -o run --positions 0": "--positions 0 is too small",
    "study -o run --questions nosuch.jsonl": "nosuch.jsonl",
    "study model --corpus good.txt -o good.txt": "good.txt: Not a directory; choose a folder",
    "compare run nosuch": "nosuch: there is no such folder",
    "compare run run --html folder": "writing the report folder: there is a folder of that name",
    # sheets
    "compare run run --html beside.html": "writing the report beside_files: Not a directory; choose a folder",
    "study -o run --html beside.html": "writing the report beside_files: Not a directory; choose a folder",
    "annotate run --neurons 4 --out new.jsonl": "4 neurons",
    "annotate run --neurons -3 --out new.jsonl": "-3 neurons",
    "annotate run --out good.txt": "good.txt is there already",
    "annotate score good.txt": "good.txt",
    "annotate score nosuch.jsonl": "nosuch.jsonl",
    "annotate export good.txt banana": "good.txt",
    "cache --kind foo": "--kind foo is not a kind of what is kept; give one of model, text, gguf, values",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a run of another, and every kind of bad file."""
    at = tmp_path_factory.mktemp("place")
    model_folder(at / "model")
    make_run(at / "run")
    for name, content in {
        "good.txt": "\n\n".join(texts(20)).encode(),
        "empty.txt": b"",
        "blank.txt": b" \n\n  \n",
        "binary.txt": b"\x00\x01\x02 words",
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "image.bin": b"\x89PNG",
        "cut.parquet": b"PAR1",
        "cut.txt.gz": gzip.compress(b"words and more words" * 100)[:30],
        "bodies.jsonl": b'{"body": "words"}\n',
        "numbers.jsonl": b'{"text": 7}\n',
        "prompts.jsonl": b'{"prompt": "the capital of"}\n',
        "deep.jsonl": b"[" * 100_000 + b"]" * 100_000 + b"\n",
        "false.gguf": b"GGUF but not really",
    }.items():
        (at / name).write_bytes(content)
    (at / "folder").mkdir()
    (at / "beside_files").write_text("")
    for kind in ("truncated", "broken", "newer", "older"):
        shutil.copytree(at / "run", at / kind)
    table = at / "truncated" / "triggers.parquet"
    table.write_bytes(table.read_bytes()[:1000])
    (at / "broken" / "manifest.json").write_text('{"schema_version": 1')
    for kind, version in (("newer", 99), ("older", 1)):
        manifest = at / kind / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": version}))
    for kind in ("cut-model", "odd-model"):
        shutil.copytree(at / "model", at / kind)
    weights = at / "cut-model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (at / "odd-model" / "config.json").write_text("{")
    return at


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, through the real entry point."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *words])
    with pytest.raises(SystemExit) as caught:
        main()
        raise SystemExit(0)
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def files(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("command", TABLE)
def test_one_line_says_what_to_do_and_nothing_is_harmed(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line (or the usage and a line), stdout empty, no file changed; a model is loaded only where
    no less could tell."""
    monkeypatch.chdir(place)
    before = files(place)
    if not command.endswith(LATE):
        monkeypatch.setattr("mnemoscope.model.load.load_model", loaded_for_nothing)
        monkeypatch.setattr("mnemoscope.model.load.load_built", loaded_for_nothing)
    capsys.readouterr()
    code, out, err = call(monkeypatch, capsys, *shlex.split(command.removesuffix(LATE)))
    assert (code, out) == (2, ""), (out, err)
    assert "Traceback" not in err
    assert re.search(TABLE[command], err), err
    lines = err.strip().splitlines()
    assert len(lines) == 1 or lines[0].startswith("Usage: "), err
    assert len(err) < 1000, err
    assert files(place) == before


def loaded_for_nothing(*_: object, **__: object) -> None:
    """In the place of loading a model."""
    raise AssertionError("a model was loaded before the options were checked")


@pytest.mark.parametrize("word", [b"caf\xe9".decode("utf-8", "surrogateescape"), "a \ud800 b"])
@pytest.mark.parametrize(
    "command",
    [
        "show {}",
        "show run {}",
        "show run L1N1 --html {}",
        "find run --promotes {}",
        "build {} --corpus good.txt -o new",
        "build model --corpus {} -o new",
        "build model --corpus good.txt -o {}",
        "explain model {}",
        "explain model text --target {}",
        "explain model --prompts prompts.jsonl --out={}",
        "test run L1N1 --pattern {}",
        "annotate score {}",
        "{}",
    ],
)
def test_an_argument_that_is_not_text_is_one_line(
    command: str, word: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are not UTF-8, and lone surrogates, wherever they stand; the line shows them escaped."""
    monkeypatch.chdir(place)
    before = files(place)
    code, out, err = call(monkeypatch, capsys, *(part.format(word) for part in command.split()))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(r"\\ud(ce9|800).* is not valid UTF-8 at character", err)
    assert files(place) == before


@pytest.mark.slow
def test_the_explanation_is_printed_even_if_its_page_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up while the model works costs the page alone."""
    monkeypatch.chdir(place)

    def full(*_: object) -> None:
        raise RunError("writing the page x.html: the disk is full; free some space")

    monkeypatch.setattr("mnemoscope.display.files.write", full)
    words = ("explain", "model", "the capital of", "--html", "x.html")
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 2 and err.endswith(
        "mnemoscope: writing the page x.html: the disk is full; free some space\n"
    )
    assert "capital" in out and len(out.splitlines()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "T.CSV"])
def test_a_table_is_what_its_name_says(
    name: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same rows and columns in each format."""
    monkeypatch.chdir(place)
    words = ("explain", "model", "--prompts", "prompts.jsonl", "--dtype", "fp32", "-o")
    readers = {
        ".parquet": pl.read_parquet,
        ".csv": lambda path: pl.read_csv(path, infer_schema_length=None),
        ".jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
    }
    tables = []
    for at in (tmp_path / "same.parquet", tmp_path / name):
        code, _, err = call(monkeypatch, capsys, *words, str(at))
        assert code == 0, err
        tables.append(readers[at.suffix.lower()](at))
    whole, table = tables
    assert table.columns == whole.columns and table.height == whole.height > 50
    for column in ("frame", "part", "layer", "increase"):
        assert table[column].cast(whole[column].dtype).to_list() == whole[column].to_list(), column


@pytest.mark.parametrize(
    ("job", "words", "kept"),
    [
        (
            "mnemoscope.mine.build.build",
            ["build", "model", "--corpus", "good.txt", "-o", "a new run"],
            "a new run",
        ),
        (
            "mnemoscope.text.corpus.load_corpus",
            ["build", "model", "--corpus", "good.txt", "-o", "a new run"],
            None,
        ),
        ("mnemoscope.trials.job.patterns", ["patterns", "run"], "run"),
        ("mnemoscope.mine.verify.verify", ["verify", "run"], None),
    ],
)
def test_interrupted_it_says_how_to_go_on(
    job: str,
    words: list[str],
    kept: str | None,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C: exit code 130, the command to paste, and where the work is kept if it is."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("mnemoscope.model.load.load_model", lambda *_, **__: None)
    monkeypatch.setattr("mnemoscope.model.load.load_built", lambda *_, **__: None)
    monkeypatch.setattr("mnemoscope.mine.values.seconds", lambda _: 0.0)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, interrupt)
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (130, "")
    line = err.strip().splitlines()[-1]
    assert line.startswith("mnemoscope: interrupted; ")
    assert line.endswith(f": mnemoscope {shlex.join(words)}")
    assert (f"what is done is kept in {kept};" in line) == (kept is not None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y.*Read-only"),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/values.parquet"),
            "run/values.parquet: Permission",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "run"), "run: Is a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/not/given"), None),
        (ValueError("a defect"), None),
    ],
)
def test_what_the_system_refuses_is_one_line_if_the_user_can_do_something(
    error: Exception,
    line: str | None,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """About a path that was given, or a disk; a file of our own that is missing is a defect and keeps its traceback."""
    monkeypatch.chdir(place)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mnemoscope.api.open_stored", refuse)
    if line is None:
        monkeypatch.setattr(sys, "argv", ["mnemoscope", "show", "run"])
        with pytest.raises(type(error)):
            main()
        return
    code, out, err = call(monkeypatch, capsys, "show", "run")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(line, err)


@pytest.mark.slow
def test_the_price_of_values_is_announced(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line before the work where reading them takes minutes, none where it does not or a run is there."""
    monkeypatch.chdir(place)
    words = ("build", "model", "--corpus", "good.txt", "-o", "priced", "--dtype", "fp32", "--top", "2")
    monkeypatch.setattr("mnemoscope.mine.values.seconds", lambda model: 200.0)
    for said in (True, False):  # the second time it is there
        code, _, err = call(monkeypatch, capsys, *words)
        assert code == 0, err
        assert ("values of model takes about 3 min" in err) == said
    monkeypatch.undo()
    monkeypatch.chdir(place)
    words = tuple("cheap" if word == "priced" else word for word in words)
    assert "takes about" not in call(monkeypatch, capsys, *words)[2]


PROGRAM = "from mnemoscope.cli import main; main()"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    """Found out when the last line is flushed, not when Python ends."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "models", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert (
        done.stderr
        == "mnemoscope: writing: the disk is full; free some space and run the same command again\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes are others there")
@pytest.mark.parametrize("words", [["models", "--json"], ["models"]])
def test_a_reader_that_stops_reading_is_no_error(words: list[str]) -> None:
    """`| head`: exit code 0 and nothing on stderr; 1 would say that something differs."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "python", "shell"),
    [
        (QueryError("{top} is too small", top=0), "top=0 is too small", "--top 0 is too small"),
        (CorpusError("name it with {text}", text=...), "name it with text=", "name it with --text"),
        (
            ModelError("pass {trust_remote_code}", trust_remote_code=True),
            "pass trust_remote_code=True",
            "pass --trust-remote-code",
        ),
        (QueryError("no {foils} 'a b'", foils="a b"), "no foils='a b' 'a b'", "no --foil 'a b' 'a b'"),
        (QueryError("braces {top} of the user"), "braces {top} of the user", "braces {top} of the user"),
    ],
)
def test_a_message_names_arguments_as_they_are_given(error: MnemoscopeError, python: str, shell: str) -> None:
    """`name=value` in Python, `--name value` on the command line; through a pickle too (workers)."""
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert (str(one), one.on_command_line()) == (python, shell)
