"""What comes in from the shell and what goes out to it: arguments checked once, failures in one line, exit codes.

    0    done
    1    something differs (`verify`)
    2    something the user can fix, in one line on stderr
    128  and the number of the signal that stopped it (`stopping`): 130 for Ctrl-C

A defect of this program keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mnemoscope import files
from mnemoscope.cli.stopping import tell
from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.invocation import as_called

# No argument is to blame for these, and no line of this program either.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Unread(Exception):  # noqa: N818
    """Nobody reads the output any more (`| head`)."""


@contextmanager
def read() -> Iterator[None]:
    """Around what is printed: flushed, so that what nobody reads is noticed; given a name that typer does not know."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise Unread from None


def answer(app: Callable[[], object]) -> None:
    """Run the application, and turn what can be fixed into one line."""
    _tolerate_encodings()
    try:
        app()
    except MnemoscopeError as error:
        _refuse(error.on_command_line())
    except Unread:
        _discard_output()
        sys.exit(0)
    except OSError as error:
        if (line := _explained(error, sys.argv[1:])) is None:
            raise
        _discard_output()
        _refuse(line)


def check(words: Sequence[str]) -> None:
    """QueryError for an argument that is not text, and for an option whose value is empty."""
    for index, word in enumerate(words):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = word.encode("utf-8", "backslashreplace").decode()
            raise QueryError(
                f"reading the arguments: '{shown}' is not valid UTF-8 at character {error.start}; give text in UTF-8, "
                "and rename files whose names are not"
            ) from None
        if word == "" and words[index - 1 : index] and words[index - 1].startswith("-"):
            raise QueryError(
                f"reading the arguments: {words[index - 1]} is empty; give a value, or leave the option out"
            )
        if word.startswith("--") and word.endswith("=") and word.count("=") == 1:
            raise QueryError(f"reading the arguments: {word} is empty; give a value, or leave the option out")


def _refuse(line: str) -> NoReturn:
    tell(f"mnemoscope: {as_called(line)}")
    sys.exit(2)


def _explained(error: OSError, words: Sequence[str]) -> str | None:
    """What the system refused in a line, if it is about a path that the user gave or about the machine."""
    reason = error.strerror or " ".join(str(error).split())
    if error.errno in _MACHINE:
        where = f" ({error.filename})" if error.filename else ""
        reason = "the disk is full" if error.errno == errno.ENOSPC else reason
        cure = "free some space" if error.errno in _FULL else "see to it"
        return f"writing{where}: {reason}; {cure} and run the same command again"
    if error.filename is not None and _named(os.fsdecode(error.filename), words):
        return f"{os.fsdecode(error.filename)}: {reason}; give a path that can be used"
    return None


def _named(file: str, words: Sequence[str]) -> bool:
    """Whether a file is at, in, or above a path among the words."""
    path = Path(file).absolute()
    for word in words:
        with suppress(OSError, ValueError):
            named = files.expanded(word.rpartition("=")[2]).absolute()
            if path == named or named in path.parents or (path in named.parents and path != Path.cwd()):
                return True
    return False


def _discard_output() -> None:
    """Send what is still waiting to be written nowhere, or Python would fail over it once more when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _tolerate_encodings() -> None:
    """Show a question mark where a terminal has no such character."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")
