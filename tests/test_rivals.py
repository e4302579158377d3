"""Two uploads to one URL at once: whoever comes when, is killed when, and whatever is read meanwhile.

A process is a thread that waits to be let before every call of the file system, so that a list of numbers says in which
order the calls of all of them happen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
from effort import tries
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_run

import mnemoscope as mn
from mnemoscope import files, location
from mnemoscope.errors import MnemoscopeError, RunError
from mnemoscope.run.reading import Run, open_run, uploaded
from mnemoscope.run.schemas import MANIFEST

URL = "memory://rivals/run"
OLD, ONE, TWO, OTHER = range(4)
_HERE = threading.local()  # .process: the one that a thread is


class _Killed(BaseException):
    """No call is made any more, to clean up neither."""


class Process(threading.Thread):
    """What is done on a machine, by a process that makes a call of the file system when it is let."""

    def __init__(self, machine: str, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.machine, self.work = machine, work
        self.ended = self.killed = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._turn, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.start()
        self._waits.acquire()  # until it comes to its first call

    def run(self) -> None:
        _HERE.process = self
        try:
            self.gate()
            self.result = self.work()
        except BaseException as error:  # which nobody would see, of a thread
            self.error = error
        self.ended = True
        self._waits.release()

    def gate(self) -> None:
        """Wait to be let."""
        if not self.killed:
            self._waits.release()
            self._turn.acquire()
        if self.killed:
            raise _Killed

    def step(self) -> None:
        """Let it make one call, and wait until it comes to the next, or has ended."""
        self._turn.release()
        self._waits.acquire()

    def kill(self) -> None:
        self.killed = True
        self.step()


class _Gated:
    """A file system each of whose calls waits for its turn."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        real, process = getattr(self._inner, name), getattr(_HERE, "process", None)
        if process is None or name in ("invalidate_cache", "unstrip_protocol"):
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            process.gate()
            return real(*arguments, **options)

        return call


class Uploaded(NamedTuple):
    """A run, and every file of it behind a URL."""

    run: Run
    files: dict[str, bytes]

    def __repr__(self) -> str:
        return repr(self.run)

    @classmethod
    def of(cls, run: Run) -> Uploaded:
        held = {
            uploaded(name, entry): (run.folder / f"{name}.parquet").read_bytes()
            for name, entry in run.manifest.tables.items()
        }
        return cls(run, held | {MANIFEST: (run.folder / MANIFEST).read_bytes()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Uploaded]:
    """An old run, two that are it with another table, and one of another text."""
    folder = tmp_path_factory.mktemp("rivals")
    of_one_text = [make_run(folder / str(top), top=top) for top in (20, 10, 15)]
    return [*map(Uploaded.of, (*of_one_text, make_run(folder / "other", seed=1, layers=2)))]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder below which each machine has its cache folder."""
    folder, real = tmp_path_factory.mktemp("machines"), fsspec.core.url_to_fs

    def gated(url: str) -> tuple[_Gated, str]:
        system, path = real(url)
        return _Gated(system), path

    def cache() -> Path:
        process = getattr(_HERE, "process", None)
        return folder / ("here" if process is None else process.machine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(location, "WAIT", 1e-6)
        patch.setattr(fsspec.core, "url_to_fs", gated)
        patch.setattr(files, "cache_folder", cache)
        yield folder
    fsspec.filesystem("memory").store.clear()


def stored() -> dict[str, bytes]:
    """Every file behind the URL, by name."""
    memory = fsspec.filesystem("memory")
    return {name.rpartition("/")[2]: memory.cat_file(name) for name in memory.find("/rivals")}


def held(runs: Sequence[Uploaded]) -> Uploaded | None:
    """The run behind the URL, which is whole."""
    now = stored()
    if MANIFEST not in now:
        return None
    (found,) = [run for run in runs if run.files[MANIFEST] == now[MANIFEST]]
    assert now.items() >= found.files.items()
    return found


def _push(run: Uploaded, overwrite: bool) -> Callable[[], Run]:
    return lambda: mn.push(run.run.path, URL, overwrite=overwrite)


def _begin(before: Uploaded | None) -> None:
    """Have the URL hold a run or nothing."""
    fsspec.filesystem("memory").store.clear()
    for name, content in ({} if before is None else before.files).items():
        fsspec.filesystem("memory").pipe_file(f"/rivals/run/{name}", content)


def _let(processes: Sequence[Process], order: Sequence[int], check: Callable[[], object]) -> None:
    """Let the processes make their calls in an order, the rest in turn, and look after each."""
    turns = [processes[number % len(processes)] for number in order]
    try:
        for process in [*turns, *(process for _ in range(2000) for process in processes)]:
            if not process.ended:
                process.step()
                check()
        assert all(process.ended for process in processes)
    finally:
        for process in processes:
            if not process.ended:
                process.kill()


ORDERS = st.lists(st.integers(0, 2), max_size=80)
LINES = ("same command again", "holds another one")


@tries(120)
@given(
    order=ORDERS,
    new=st.tuples(st.sampled_from([ONE, TWO, OTHER]), st.sampled_from([OLD, TWO, OTHER])),
    overwrite=st.tuples(st.booleans(), st.booleans()),
    machine=st.sampled_from(["a", "b"]),
    empty=st.booleans(),
)
def test_one_whole_run_is_left_of_two_uploads(
    order: list[int],
    new: tuple[int, int],
    overwrite: tuple[bool, bool],
    machine: str,
    empty: bool,
    runs: list[Uploaded],
    machines: Path,
) -> None:
    """In whatever order their calls happen: at every moment there is a whole run, or none if none was there; it is that
    of the last one that was not refused, and nothing of another one is left. Who opens it meanwhile has a whole one."""
    before = None if empty else runs[OLD]
    _begin(before)
    pushing = [
        Process(where, _push(runs[which], over))
        for where, which, over in zip(("a", machine), new, overwrite, strict=True)
    ]
    reading = Process("c", lambda: open_run(URL))
    last, ended = before, set[int]()

    def look() -> None:
        nonlocal last
        there = held(runs)
        assert there is not None or empty
        for number, process in enumerate(pushing):
            if process.ended and number not in ended:
                ended.add(number)
                last = runs[new[number]] if process.error is None else last
                assert process.error is not None or there is last

    _let([*pushing, reading], order, look)
    assert held(runs) is last and stored() == ({} if last is None else last.files)
    for process in (*pushing, reading):
        if process.error is None:
            continue
        assert isinstance(process.error, MnemoscopeError), process.error
        said = str(process.error)
        assert "\n" not in said and (any(line in said for line in LINES) or process is reading)
    if not empty:
        assert reading.error is None and reading.result.manifest in [run.run.manifest for run in runs]
    if not any(overwrite) and new == (ONE, OTHER):
        assert [process.error is None for process in pushing] in (
            [True, False],
            [False, True],
            [False, False],
        )


def test_one_of_two_that_come_at_once_goes_on(runs: list[Uploaded], machines: Path) -> None:
    """Each sees that the other one is there before it has done anything."""
    for machine in ("a", "b"):
        _begin(runs[OLD])
        pushing = [Process("a", _push(runs[ONE], False)), Process(machine, _push(runs[TWO], False))]
        _let(pushing, [], lambda: held(runs))
        assert sorted(process.error is None for process in pushing) == [False, True]
        (error,) = [process.error for process in pushing if process.error is not None]
        words = (
            "another process of this machine"
            if machine == "a"
            else "another machine has been doing so since 20"
        )
        assert isinstance(error, RunError) and words in str(error)


@tries(60)
@given(order=ORDERS, calls=st.integers(0, 30), which=st.sampled_from([ONE, OTHER]), again=st.booleans())
def test_an_upload_that_was_killed_is_told_of(
    order: list[int], calls: int, which: int, again: bool, runs: list[Uploaded], machines: Path
) -> None:
    """Nothing half is a run. From the same machine the same command goes on; from another one a line says what to
    remove."""
    _begin(runs[OLD])
    killed = Process("a", _push(runs[which], True))
    for _ in range(calls):
        if not killed.ended:
            killed.step()
            held(runs)
    if not killed.ended:
        killed.kill()
    marks = [name for name in stored() if name.startswith(".uploading-")]
    next_one = Process("a" if again else "b", _push(runs[which if again else TWO], True))
    _let([next_one], order, lambda: held(runs))
    if marks and not again:
        assert f"if it was killed, remove {URL}/{marks[0]}" in str(next_one.error)
        fsspec.filesystem("memory").rm_file(f"/rivals/run/{marks[0]}")
        next_one = Process("b", _push(runs[TWO], True))
        _let([next_one], order, lambda: held(runs))
    assert next_one.error is None
    assert stored() == runs[which if again else TWO].files


def test_where_nothing_can_be_locked_it_is_uploaded_all_the_same(
    runs: list[Uploaded], machines: Path
) -> None:
    """In a container whose cache folder is read-only, say; two are told apart by their files alone."""
    (machines / "odd").write_text("a file in the place of the folder")
    _begin(runs[OLD])
    pushing = [Process("odd", _push(runs[ONE], False)), Process("odd", _push(runs[TWO], False))]
    _let(pushing, [], lambda: held(runs))
    assert sorted(process.error is None for process in pushing) == [False, True]
    (error,) = [process.error for process in pushing if process.error is not None]
    assert "another machine has been doing so" in str(error)


def test_a_folder_that_is_not_there_yet_is_made(runs: list[Uploaded], machines: Path, tmp_path: Path) -> None:
    """On file systems that have folders (sftp, say), for the first file too, which is the mark."""

    class Disk(LocalFileSystem):
        protocol = ("disk",)
        put_file = AbstractFileSystem.put_file  # as of others

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("disk:").strip("/")

    fsspec.register_implementation("disk", Disk, clobber=True)
    url = f"disk://{tmp_path.relative_to('/')}/new/run"
    assert mn.push(runs[ONE].run.path, url).check() == []
    assert {file.name for file in (tmp_path / "new" / "run").iterdir()} == set(runs[ONE].files)
