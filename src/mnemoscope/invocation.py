"""How this program was called, so that a command which it prints works when it is pasted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

NAME = "mnemoscope"
_COMMAND = re.compile(rf"(^|`){NAME}(?= )")


def command(*words: str | os.PathLike[str]) -> str:
    """A command of this program as one line for the shell that it was called from."""
    return as_called(f"{NAME} {_quoted(words)}")


def as_called(text: str) -> str:
    """The text with the program as it was called in every command: at the start, or behind a backtick."""
    return _COMMAND.sub(lambda match: match[1] + program(), text)


def program() -> str:
    """``mnemoscope`` if the shell finds this one by that name, else what was typed to call it.

    In a script or a notebook, where nobody typed it, the plain name.
    """
    called = Path(sys.argv[0]) if sys.argv else Path(NAME)
    if called.name == "__main__.py" and called.parent.name == NAME:
        return f"{_callable(Path(sys.executable))} -m {NAME}"
    if called.stem != NAME or called.parent == Path():
        return NAME
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # `uv run` gives the search path to its child alone
        return f"uv run {NAME}"
    return _callable(called)


def _callable(file: Path) -> str:
    """The name of an executable if the shell finds that very file by it, else its path, short below this folder."""
    by_name, path, folder = shutil.which(file.name), file.absolute(), Path.cwd()
    if by_name and Path(by_name).absolute() == path:
        return file.name
    if not path.is_relative_to(folder):
        return _quoted([path])
    below = path.relative_to(folder)
    if len(below.parts) == 1:  # a bare name would be looked for on the search path
        return _quoted([f"{os.curdir}{os.sep}{below}"])
    return _quoted([below])


def _quoted(words: Iterable[str | os.PathLike[str]]) -> str:
    plain = [os.fspath(word) for word in words]
    return subprocess.list2cmdline(plain) if os.name == "nt" else shlex.join(plain)
