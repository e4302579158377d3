"""Signals that stop this program: one line that says how to go on, and an exit code; nothing half done is left.

    130  Ctrl-C (SIGINT)
    143  it was told to end (SIGTERM)
    129  the terminal is gone (SIGHUP)

A second signal ends it at once. Imports nothing that takes long: Ctrl-C may come while the rest is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mnemoscope.invocation import command

if TYPE_CHECKING:
    from mnemoscope.location import Place

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_MOMENT = 0.05  # seconds


class Signalled(KeyboardInterrupt):
    """A signal came, of that number; wherever Ctrl-C is understood, so is this."""

    def __init__(self, number: int) -> None:
        self.number = number


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal, before typer makes an exit code of it; `kept` is the folder with what was done, if any is."""

    def __init__(self, number: int, kept: Place | None = None) -> None:
        self.number, self.kept = number, kept


_came: list[int] = []  # the number of the signal that stops this process


@contextmanager
def stoppable() -> Iterator[None]:
    """Around all that this program does."""
    _open_standard_streams()
    with _signalled():
        try:
            with stopped():
                yield
        except Interrupted as stop:
            _end(stop)


@contextmanager
def stopped(kept: Place | None = None) -> Iterator[None]:
    """Give what typer would answer itself, and without a word, another name; and so whatever else a library makes of a
    signal (DuckDB a failed query)."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if not (_came or isinstance(error, KeyboardInterrupt)):
            raise
        number = _came[0] if _came else getattr(error, "number", int(signal.SIGINT))
        raise Interrupted(number, kept) from None


def keeping(folder: Place) -> AbstractContextManager[None]:
    """Around a job that goes on, when it is called again, with what it left in a folder."""
    return stopped(folder)


def tell(line: str) -> None:
    """Print a line on stderr; where nobody can read it, the work goes on all the same."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - typer is not imported yet


def _end(stop: Interrupted) -> NoReturn:
    again = f"run the same command again: {command(*sys.argv[1:])}"
    done = (
        f"what is done is kept in {stop.kept}; to go on, {again}" if stop.kept else f"to start over, {again}"
    )
    tell(f"mnemoscope: interrupted; {done}")
    sys.exit(128 + stop.number)


@contextmanager
def _signalled() -> Iterator[None]:
    """Raise `Signalled` for the first signal; those that are ignored (nohup) or handled already stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) in usual}
    unraisable = sys.unraisablehook

    def take(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        _came[:] = [number]
        raise Signalled(number)

    def again(lost: sys.UnraisableHookArgs) -> None:
        """Where Python cannot raise (it was freeing an object), a moment later."""
        if not isinstance(lost.exc_value, Signalled):
            unraisable(lost)
            return
        signal.signal(lost.exc_value.number, take)
        threading.Timer(_MOMENT, signal.raise_signal, [lost.exc_value.number]).start()

    _came.clear()
    sys.unraisablehook = again
    for number in before:
        signal.signal(number, take)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        if not _came:  # else a second one ends the process
            for number, handler in before.items():
                signal.signal(number, handler)


def _open_standard_streams() -> None:
    """Where a standard stream is closed (>&-), have nothing in its place: the next file that is opened, a table say,
    would get its number, and whatever a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
