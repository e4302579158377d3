"""Ctrl-C, SIGTERM and a terminal that is gone, at any moment: a line, an exit code, nothing half done or running.

`MNEMOSCOPE_STOPS=30 pytest tests/test_stops.py -rP` stops every command as often, and prints what was hit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemoscope import children
from mnemoscope.cli import stopping
from mnemoscope.cli.stopping import Interrupted, Signalled, keeping, stoppable, stopped
from mnemoscope.errors import QueryError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ASKED = int(os.environ.get("MNEMOSCOPE_STOPS", "0"))
OFTEN = ("build to a URL", "push", "export", "merge", "prompts", "serve")


@pytest.mark.slow
def test_a_command_that_is_stopped_leaves_nothing_half_done(tmp_path: Path) -> None:
    """At random moments, by each signal; given again, it makes the same bytes."""
    command = [sys.executable, str(Path(__file__).with_name("stops.py")), str(tmp_path), str(ASKED or 2)]
    done = subprocess.run([*command, *(() if ASKED else OFTEN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    sys.stdout.write(done.stdout)
    assert [each for each in told if each["wrong"]] == [] and len(told) >= len(OFTEN)
    assert sum(each["hits"] for each in told) >= len(told)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.4, 0.8])
def test_a_command_that_has_hardly_begun_is_stopped_in_a_line(seconds: float, tmp_path: Path) -> None:
    """While the rest of it is imported, which takes longest; before its first line it is Python that says something."""
    begin = "import sys; from mnemoscope.cli import main; sys.stderr.write('begun\\n'); sys.stderr.flush(); main()"
    words = [sys.executable, "-c", begin]
    process = subprocess.Popen([*words, "show", "nosuch"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None and process.stderr.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    if "there is no such folder" not in said:  # else it had ended already
        assert process.returncode == 130 and said.startswith("mnemoscope: interrupted; to start over, run")
        assert len(said.splitlines()) == 1


def _in_a_child(work: Callable[[], Any]) -> tuple[int, str]:
    """How a forked process ends that does this, and what it says on stderr."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w")
        code = 1
        try:
            with stoppable():
                work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_has_its_exit_code(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the line says how to go on; where what is done is kept, if it is."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "build", "a b"])
    begin = "mnemoscope: interrupted; "
    assert _in_a_child(lambda: _signal(number)) == (
        128 + number,
        f"{begin}to start over, run the same command again: mnemoscope build 'a b'\n",
    )

    def kept() -> None:
        with stopped(), keeping(Path("out")):
            _signal(number)

    assert _in_a_child(kept) == (
        128 + number,
        f"{begin}what is done is kept in out; to go on, run the same command again: mnemoscope build 'a b'\n",
    )


def test_a_second_signal_ends_it_at_once() -> None:
    """However long cleaning up takes."""

    def cleaning() -> None:
        try:
            _signal(signal.SIGINT)
        finally:
            _signal(signal.SIGINT)

    assert _in_a_child(cleaning) == (-signal.SIGINT, "")


def test_what_a_library_makes_of_a_signal_is_one_still() -> None:
    """DuckDB makes a failed query of it, and others what they like; where Python could not raise it, it comes again."""

    def other() -> None:
        try:
            _signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise QueryError("Query interrupted") from None

    assert _in_a_child(other)[0] == 143

    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def lost() -> None:
        freed = Freed()
        del freed
        time.sleep(5)

    code, said = _in_a_child(lost)
    assert code == 143 and said.startswith("mnemoscope: interrupted") and len(said.splitlines()) == 1


def test_what_is_ignored_stays_so() -> None:
    """As under nohup, whose commands go on when the terminal is gone."""

    def work() -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert _in_a_child(work) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are taken afterwards as they were before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_are_put_back(handlers: None) -> None:
    """Whoever calls `main` in a larger program has those that it had."""
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    with pytest.raises(SystemExit, match="130"), stoppable():
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), stoppable():
        raise ZeroDivisionError


def test_a_stop_goes_through_everything_that_keeps(handlers: None) -> None:
    """The innermost folder is told; other errors stay what they are."""
    with pytest.raises(Interrupted) as caught, keeping(Path("outer")), keeping(Path("inner")):
        raise Signalled(signal.SIGTERM)
    assert (caught.value.kept, caught.value.number) == (Path("inner"), signal.SIGTERM)
    with pytest.raises(QueryError), keeping(Path("out")):
        raise QueryError("no")


def test_a_log_that_nobody_reads_ends_no_work() -> None:
    """`2>&1 | head` reads the first line, and the build goes on; a closed or full stderr is no matter."""

    def work() -> None:
        sys.stderr = None  # type: ignore[assignment]
        stopping.tell("a line")
        sys.stderr = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        stopping.tell("a line")
        read, write = os.pipe()
        os.close(read)
        sys.stderr = os.fdopen(write, "w")
        stopping.tell("a line")

    assert _in_a_child(work) == (0, "")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """With stdout closed (>&-), a table would have its number, and what a library prints would be in the table."""

    def work() -> None:
        for number in (0, 1):
            os.close(number)
        with stoppable(), (tmp_path / "table").open("wb") as file:
            assert file.fileno() > 2
            os.write(1, b"a warning of a library")

    assert _in_a_child(work) == (0, "") and (tmp_path / "table").read_bytes() == b""


def test_processes_that_are_started_leave_signals_to_who_started_them(handlers: None) -> None:
    """Ctrl-C comes to all of a terminal; to whoever starts one just then it comes a moment later."""

    def work() -> None:
        with children.starting():
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); print('done')"],
                                       stdout=subprocess.PIPE)  # fmt: skip
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            os.kill(started.pid, signal.SIGINT)
            assert started.communicate()[0] == b"done\n"
            raise

    assert _in_a_child(work)[0] == 130
