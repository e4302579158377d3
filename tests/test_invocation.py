"""A command that is printed works when it is pasted."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mnemoscope
from mnemoscope.invocation import as_called, command, program


def executable(path: Path) -> Path:
    """A file that the shell would run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own, and a search path that finds nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)


def test_below_this_folder_it_is_the_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make demo` calls it, whether by the whole path or by a short one."""
    installed = executable(tmp_path / ".venv" / "bin" / "mnemoscope")
    for called in (str(installed), ".venv/bin/mnemoscope"):
        monkeypatch.setattr(sys, "argv", [called])
        assert program() == ".venv/bin/mnemoscope"
    beside = executable(tmp_path / "mnemoscope")
    monkeypatch.setattr(sys, "argv", [str(beside)])
    assert program() == "./mnemoscope"


def test_elsewhere_it_is_the_whole_path_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a space in its name, outside of this one."""
    installed = executable(tmp_path.parent / "my tools" / "mnemoscope")
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert shlex.split(program()) == [str(installed)]


def test_on_the_search_path_it_is_the_name_unless_that_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation that shadows this one would answer to the plain name."""
    installed, other = executable(tmp_path / "a" / "mnemoscope"), executable(tmp_path / "b" / "mnemoscope")
    monkeypatch.setattr(sys, "argv", [str(installed)])
    monkeypatch.setenv("PATH", os.pathsep.join([str(installed.parent), str(other.parent)]))
    assert program() == "mnemoscope"
    monkeypatch.setenv("PATH", os.pathsep.join([str(other.parent), str(installed.parent)]))
    assert program() == "a/mnemoscope"


def test_as_a_module_it_is_the_same_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m mnemoscope` gives its own full path as the first argument."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/mnemoscope/__main__.py", "show"])
    words = shlex.split(program())
    assert words[1:] == ["-m", "mnemoscope"] and Path(words[0]).absolute() == Path(sys.executable).absolute()


def test_under_uv_run_and_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv gives its search path to the child alone; a script has no command line of ours."""
    monkeypatch.setattr(sys, "argv", [str(executable(tmp_path / "bin" / "mnemoscope"))])
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert program() == "uv run mnemoscope"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py"])
    assert program() == "mnemoscope"


def test_commands_are_quoted_and_found_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word survives the shell; in prose only what stands in backticks, or first, is a command."""
    monkeypatch.setattr(sys, "argv", [str(executable(tmp_path / "bin" / "mnemoscope"))])
    words = ("show", Path("my runs/it's"), "--promotes", " Paris")
    assert shlex.split(command(*words)) == ["bin/mnemoscope", *map(str, words)]
    said = "make one with `mnemoscope build`; this mnemoscope reads up to 1"
    assert as_called(said) == "make one with `bin/mnemoscope build`; this mnemoscope reads up to 1"
    assert as_called("mnemoscope show x") == "bin/mnemoscope show x"


PAGES = {"views/report.py"}  # may be read on another machine, where the plain name is right


@pytest.mark.slow
def test_no_command_is_printed_under_its_plain_name() -> None:
    """A text that begins with a command is made by `command`, or passes through `as_called`."""
    root = Path(mnemoscope.__file__).parent
    plain = [
        f"{name}:{node.lineno}"
        for file in root.rglob("*.py")
        if (name := file.relative_to(root).as_posix()) not in PAGES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        and isinstance(first := node.values[0], ast.Constant)
        and re.match("mnemoscope [a-z]", str(first.value))
    ]
    assert plain == []


def test_python_m_mnemoscope_is_the_command_line(tmp_path: Path) -> None:
    """It answers, and its advice is to call it so again."""
    done = subprocess.run(
        [sys.executable, "-m", "mnemoscope", "show", "nosuch"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    advice = done.stderr.split("`")[1]
    assert shlex.split(advice)[1:] == ["-m", "mnemoscope", "build"]
