"""Odd surroundings: terminals without width or letters, streams that are closed, no home, nowhere to keep anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.display import as_text

SOURCE = Path(__file__).parents[1] / "src"

# What is set and what is missing (None), and which streams are closed.
SURROUNDINGS: dict[str, tuple[dict[str, str | None], tuple[int, ...]]] = {
    "no letters but ASCII": (
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        (),
    ),
    "a terminal of no width": ({"COLUMNS": "1", "LINES": "1", "TERM": "dumb", "NO_COLOR": "1"}, ()),
    "nowhere to keep anything": (
        {"HOME": "/proc/none", "MNEMOSCOPE_CACHE": None, "XDG_CACHE_HOME": None, "TMPDIR": "/none", "TZ": "No/Where"},
        (),
    ),
    "no streams": ({}, (0, 1, 2)),
}  # fmt: skip

# Prints nothing: streams may be closed. Ends with what each command ended with, in a file.
_PROGRAM = """
import json, sys, traceback
from mnemoscope.cli import main
ends = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["mnemoscope", *words]
    try:
        main()
        ends.append(0)
    except SystemExit as end:
        ends.append(end.code or 0)
    except BaseException:
        ends.append(traceback.format_exc())
open("ends.json", "w").write(json.dumps(ends))
"""


def _ends(folder: Path, name: str, commands: list[list[str]]) -> list[Any]:
    """How commands end in a folder, in surroundings of that name."""
    changed, closed = SURROUNDINGS[name]
    surroundings = {**os.environ, "PYTHONPATH": str(SOURCE), **changed}

    def close() -> None:
        for stream in closed:
            os.close(stream)

    subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(commands)],
        cwd=folder, env={key: value for key, value in surroundings.items() if value is not None}, preexec_fn=close,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    ends: list[Any] = json.loads((folder / "ends.json").read_text())
    (folder / "ends.json").unlink()
    return ends


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished synthetic run."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("surroundings") / "run").path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_run_is_read_in_any_surroundings(name: str, run: mn.Run, tmp_path: Path) -> None:
    """And what is wrong is a line still, with its exit code; nothing but what was asked for is made."""
    (tmp_path / "run").symlink_to(run.path)
    commands = [
        "show run L1N3",
        "show run --html page.html",
        "find run --sort kurtosis",
        "cache",
        "show nosuch",
    ]
    assert _ends(tmp_path, name, [words.split() for words in commands]) == [0, 0, 0, 0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nowhere to keep anything", "no streams"])
def test_a_run_is_built_in_any_surroundings(name: str, tmp_path: Path) -> None:
    """Whole, without a word in its tables."""
    model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(texts(20)))
    words = ["build", "model", "--corpus", "text.txt", "--top", "2", "--nulls", "none", "-o", "new"]
    assert _ends(tmp_path, name, [words]) == [0]
    assert mn.open_run(tmp_path / "new").check() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new", "text.txt"]


@pytest.mark.parametrize("width", [1, 2, 10, 31, 33, 50])
def test_everything_is_drawn_in_a_terminal_of_any_width(width: int, run: mn.Run) -> None:
    """In one of no width as in the narrowest, broken where the terminal likes."""
    drawn = [
        run["L1N3"],
        run["L1N0"],
        run.highlights(2),
        run.find(promotes=" Paris"),
        run.find(sort="kurtosis"),
    ]
    for result in drawn:
        assert as_text(result, width).strip()
