"""Runs and texts behind URLs: the same as in a folder, whole or not at all, whatever fails on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal
from synthetic import make_run
from tiny import model_folder, texts
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope import location
from mnemoscope.cli import app
from mnemoscope.errors import CorpusError, RemoteError, RunCorrupt, RunError, RunMismatch, RunMissing
from mnemoscope.location import Location, place
from mnemoscope.mine import build as building
from mnemoscope.mine.build import build
from mnemoscope.records import Progress
from mnemoscope.run import remote, writing
from mnemoscope.run.reading import Run, _SortedTable, open_run, uploaded
from mnemoscope.run.schemas import MANIFEST
from mnemoscope.text import sources
from mnemoscope.text.corpus import load_corpus

URL = "memory://bucket/runs/one"
_NEVER = ("invalidate_cache", "unstrip_protocol")  # ask nobody


class Faulty:
    """A file system of which calls fail as `fault` says: before anything happens, half way, or when all is done."""

    def __init__(self, inner: Any, told: SimpleNamespace) -> None:
        self._inner, self._told = inner, told

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._inner, name)
        if name in _NEVER:
            return real

        def call(path: str, *arguments: Any, **options: Any) -> Any:
            told = self._told
            told.calls += 1
            error, when = told.fault(told.calls) or (None, "")
            if error and when == "before":
                raise error
            if error and when == "half":
                if name == "put_file":
                    content = Path(path).read_bytes()
                    self._inner.pipe_file(arguments[0], content[: len(content) // 2])
                raise error
            answer = real(path, *arguments, **options)
            if error:
                raise error
            told.bytes += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return call


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """What goes over the wire, counted; its `fault` says which call fails, with what, and when. Nothing is kept yet."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(location, "WAIT", 1e-4)
    real, told = fsspec.core.url_to_fs, SimpleNamespace(calls=0, bytes=0, fault=lambda call: None)

    def faulty(url: str) -> tuple[Faulty, str]:
        system, path = real(url)
        return Faulty(system, told), path

    monkeypatch.setattr(fsspec.core, "url_to_fs", faulty)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield told
    memory.store.clear()


def one_in_ten(seed: int) -> Callable[[int], tuple[Exception, str] | None]:
    """Every tenth call fails, on average, and half of these when the work is done already."""
    drawn = random.Random(seed)

    def fault(call: int) -> tuple[Exception, str] | None:
        return (
            (OSError("503 Slow Down"), drawn.choice(["before", "half", "after"]))
            if drawn.random() < 0.1
            else None
        )

    return fault


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("remote") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("remote") / "other", seed=1, layers=2)


def stored() -> dict[str, bytes]:
    """Every file behind the URL."""
    memory = fsspec.filesystem("memory")
    return {name: memory.cat_file(name) for name in memory.find("/bucket")}


def refused(
    call: Callable[..., Any], *arguments: Any, error: type[Exception] | tuple[type[Exception], ...] = RunError
) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    {
        "runs/a": Path("runs/a"),
        "/runs/a:b": Path("/runs/a:b"),
        "C:/runs/a": Path("C:/runs/a"),
        "file:///runs/a": Path("/runs/a"),
        "s3://bucket/runs/a": Location("s3://bucket/runs/a"),
        "S3://bucket/runs/a/": Location("s3://bucket/runs/a"),
        "hf://datasets/user/run": Location("hf://datasets/user/run"),
        Path("s3://bucket/runs/a"): Location("s3://bucket/runs/a"),  # which has lost a slash
        Location("s3://bucket"): Location("s3://bucket"),
    }.items(),
)
def test_a_name_is_a_path_or_a_url(given: Any, meant: Any) -> None:
    """Disks of Windows and colons in names are no URLs; a URL that was made a path is one still."""
    assert place(given) == meant
    assert str(place(str(meant))) == str(meant)


def test_parts_of_a_url_have_names() -> None:
    """As parts of a path have."""
    folder = Location("s3://bucket/runs/a")
    assert (str(folder / "b"), folder.name, str(folder.parent)) == (
        "s3://bucket/runs/a/b",
        "a",
        "s3://bucket/runs",
    )


# -- reading -----------------------------------------------------------------------------------------------


def test_a_run_behind_a_url_is_read_as_one_in_a_folder(run: Run, net: SimpleNamespace) -> None:
    """Tables, cards, searches and SQL are the same, and so is one that fails in every tenth call."""
    net.fault = one_in_ten(0)
    far = mn.push(run.path, URL)
    assert far.manifest == run.manifest and far.check() == []
    near = mn.open_run(run.path)
    for name in run.manifest.tables:
        assert_frame_equal(far.table(name).collect(), near.table(name).collect())
        kinds = far.table(name).collect_schema()
        assert kinds == near.table(name).collect_schema()
    for address in ((0, 0), (1, 3), (2, 7)):
        ours, theirs = far.neuron(address).to_dict(), near.neuron(address).to_dict()
        for way in ("command", "python"):
            assert ours.pop(way) == theirs.pop(way).replace(str(run.path), URL)
        assert ours == theirs
    question = (
        "select layer, count(*) as n, max(coefficient) from triggers where polarity = 1 group by 1 order by 1"
    )
    assert_frame_equal(far.sql(question), near.sql(question))
    assert_frame_equal(far.find(promotes=" Paris").rows, near.find(promotes=" Paris").rows)
    assert_frame_equal(far.find(sort="kurtosis").rows, near.find(sort="kurtosis").rows)
    filtered = pl.col("layer") == 1, pl.col("neuron") < 3
    assert_frame_equal(
        far.table("triggers").filter(*filtered).collect(), near.table("triggers").filter(*filtered).collect()
    )


def test_what_was_read_is_read_from_the_cache(run: Run, net: SimpleNamespace) -> None:
    """A second time only the manifest and the names of the files are asked for; freed, all of it is fetched again."""
    mn.push(run.path, URL)
    net.bytes = net.calls = 0
    first = mn.open_run(URL).neuron(1, 3)
    fetched, whole = net.bytes, sum(entry.bytes for entry in run.manifest.tables.values())
    assert 0 < fetched <= whole
    assert {entry.kind for entry in mn.cache.entries()} == {"parts"}
    assert all(URL in entry.what for entry in mn.cache.entries())
    net.bytes = net.calls = 0
    assert mn.open_run(URL).neuron(1, 3) == first
    assert (net.calls, net.bytes) == (2, len(stored()[f"/bucket/runs/one/{MANIFEST}"]))
    mn.cache.clear("parts")
    net.bytes = 0
    assert mn.open_run(URL).neuron(1, 3) == first
    assert net.bytes == fetched


def test_a_card_reads_the_row_groups_that_it_needs(
    net: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tables by neuron one or two that lie beside each other, however many there are."""
    monkeypatch.setattr(writing, "GROUP_ROWS_DEFAULT", 100)
    monkeypatch.setattr(writing, "GROUP_ROWS", dict.fromkeys(("neurons", "histograms"), 4))
    mn.push(make_run(tmp_path / "many", neurons=16, layers=2).path, URL)
    far, asked = mn.open_run(URL), dict[str, set[int]]()
    read = _SortedTable._read_groups

    def watched(table: _SortedTable, groups: Sequence[int], *columns: Any) -> pa.Table:
        asked.setdefault(table.name, set()).update(groups)
        return read(table, groups, *columns)

    monkeypatch.setattr(_SortedTable, "_read_groups", watched)
    far.neuron(1, 3)
    for name in ("neurons", "histograms", "triggers", "values"):
        count = far._tables[name].metadata.num_row_groups
        assert 1 <= len(asked[name]) <= 2 < count / 2, (name, asked[name], count)


def test_what_is_kept_is_checked(run: Run, net: SimpleNamespace) -> None:
    """A part that a power cut or somebody else has changed is fetched again."""
    mn.push(run.path, URL)
    first = mn.open_run(URL).neuron(1, 3)
    for entry in mn.cache.entries("parts"):
        for file in entry.path.iterdir():
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2] if len(content) % 2 else bytes(len(content)))
    assert mn.open_run(URL).neuron(1, 3) == first


def of_size(rows: pa.Table, file: Path, size: int) -> bytes:
    """A Parquet file of these rows that has so many bytes."""
    padding = 0
    for _ in range(6):
        with pq.ParquetWriter(file, rows.schema, compression="zstd", store_schema=False) as writer:
            writer.write_table(rows)
            writer.add_key_value_metadata({"padding": "x" * padding})
        if not (short := size - file.stat().st_size):
            return file.read_bytes()
        padding += short
    raise AssertionError(short)


def test_what_was_never_the_run_is_not_taken_for_it(run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """Parts of a file that is not what its manifest says are kept as what they are: they come back neither when the
    file has been put right nor from another place that has the run whole."""
    memory, name = fsspec.filesystem("memory"), "triggers.parquet"
    right = (run.path / name).read_bytes()
    rows = pq.read_table(run.path / name)
    places = pa.array([7] * len(rows), pa.int32())
    wrong = rows.set_column(rows.column_names.index("position"), "position", places)
    for file in run.path.iterdir():
        memory.pipe_file(f"/bucket/runs/one/{file.name}", file.read_bytes())
    memory.pipe_file(f"/bucket/runs/one/{name}", of_size(wrong, tmp_path / name, len(right)))
    far = open_run(URL)
    assert set(far.rows("triggers", 1, 3)["position"]) == {7}
    memory.pipe_file(f"/bucket/runs/one/{name}", right)
    assert_frame_equal(open_run(URL).rows("triggers", 1, 3), run.rows("triggers", 1, 3))
    mn.push(run.path, "memory://bucket/runs/elsewhere")
    elsewhere = open_run("memory://bucket/runs/elsewhere")
    assert_frame_equal(elsewhere.rows("triggers", 1, 3), run.rows("triggers", 1, 3))


def test_parts_of_a_large_file_are_fetched_and_no_more(net: SimpleNamespace) -> None:
    """Whatever is read of it, in whatever order, are its bytes; the end, which is read first, is fetched once."""
    drawn = random.Random(0)
    content = drawn.randbytes(300_000)
    fsspec.filesystem("memory").pipe_file("/bucket/large", content)
    for seed in range(20):
        drawn.seed(seed)
        file = Location("memory://bucket/large", f"hash{seed}", len(content))
        net.bytes = 0
        with file.open() as opened:
            for _ in range(30):
                start = drawn.choice(
                    [drawn.randrange(len(content)), len(content) - drawn.randrange(1, 70_000)]
                )
                size = drawn.choice([1, 100, 70_000])
                opened.seek(start)
                assert opened.read(size) == content[start : start + size]
                assert opened.tell() == min(start + size, len(content))
            opened.seek(-8, 2)
            assert opened.read() == content[-8:] and opened.read(5) == b""
        before = net.bytes
        with file.open() as opened:
            opened.seek(len(content) - 65_536)
            assert opened.read() == content[-65_536:]
        assert net.bytes == before


def test_a_run_that_was_copied_there_file_by_file_is_read(run: Run, net: SimpleNamespace) -> None:
    """As copying programs of clouds do."""
    for file in run.path.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/runs/one/{file.name}", file.read_bytes())
    far = open_run(URL)
    assert far.check() == []
    assert_frame_equal(far.rows("triggers", 1, 3), run.rows("triggers", 1, 3))
    fsspec.filesystem("memory").rm_file("/bucket/runs/one/triggers.parquet")
    assert "table triggers is missing" in refused(open_run, URL, error=RunCorrupt)


@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_damage_behind_a_url_is_told(damage: str, run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """What is missing or short when it is opened; what was changed when all is read, and when it is brought back."""
    mn.push(run.path, URL)
    (table,) = [name for name in stored() if "/triggers-" in name]
    memory, content = fsspec.filesystem("memory"), stored()[table]
    memory.rm_file(table)
    if damage != "gone":
        memory.pipe_file(table, content[:-9] if damage == "short" else bytes([content[0] ^ 1]) + content[1:])
    if damage != "changed":
        assert "table triggers" in refused(open_run, URL, error=RunCorrupt)
        return
    assert [problem.table for problem in open_run(URL).check()] == ["triggers"]
    assert "table triggers is not what its manifest says" in refused(
        mn.pull, URL, tmp_path / "back", error=RunCorrupt
    )
    assert not (tmp_path / "back" / MANIFEST).exists()


def test_what_is_changed_needs_a_folder(run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """Jobs that add tables say so before they begin, and nothing is made under the name of a URL."""
    far = mn.push(run.path, URL)
    assert "`mnemoscope pull` it" in refused(lambda: far.folder)
    shown = CliRunner().invoke(app, ["patterns", URL])
    assert "mnemoscope pull" in str(shown.exception)
    shown = CliRunner().invoke(app, ["study", "-o", URL])
    assert "mnemoscope pull" in str(shown.exception)
    assert "parts share a folder" in refused(mn.merge, URL)
    assert not list(Path.cwd().glob("memory:*"))


# -- there and back ----------------------------------------------------------------------------------------


def test_there_and_back_it_is_the_same_run(run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """Byte for byte, the manifest too; a run that is there already is not fetched again."""
    mn.push(run.path, URL)
    net.fault = one_in_ten(1)
    back = mn.pull(URL, tmp_path / "back")
    assert {file.name: file.read_bytes() for file in back.path.iterdir()} == {
        file.name: file.read_bytes() for file in run.path.iterdir()
    }
    net.fault, net.bytes = lambda call: None, 0
    assert mn.pull(URL, tmp_path / "back").path == back.path
    assert net.bytes < 10_000
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "neither empty nor a run" in refused(mn.pull, URL, tmp_path / "mine")


def test_what_was_brought_is_not_fetched_again(run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """Interrupted at any call, it goes on; in between there is no run."""
    mn.push(run.path, URL)
    total = sum(entry.bytes for entry in run.manifest.tables.values())
    for stop in range(3, 12, 4):
        net.calls = net.bytes = 0
        net.fault = lambda call, stop=stop: (KeyboardInterrupt(), "before") if call == stop else None
        with pytest.raises(KeyboardInterrupt):
            mn.pull(URL, tmp_path / str(stop))
        assert not (tmp_path / str(stop) / MANIFEST).exists()
        net.fault = lambda call: None
        assert mn.pull(URL, tmp_path / str(stop)).check() == []
        assert net.bytes < total + 3 * 10_000


def test_an_upload_that_stops_anywhere_leaves_a_whole_run(run: Run, other: Run, net: SimpleNamespace) -> None:
    """Before any call, in the middle of it or after it: what is there is the old run or the new one, whole, and the
    same command again makes it the new one, of which nothing else is left."""
    memory = fsspec.filesystem("memory")
    mn.push(other.path, URL)
    before, drawn = dict(memory.store), random.Random(0)
    net.calls = 0
    mn.push(run.path, URL, overwrite=True)
    calls, after = net.calls, set(stored())
    for stop in range(1, calls):
        for when in (
            ("before", "half", "after") if stop % 5 == 0 else (drawn.choice(["before", "half", "after"]),)
        ):
            memory.store.clear()
            memory.store.update(before)
            net.calls = 0
            net.fault = lambda call, stop=stop, when=when: (
                (KeyboardInterrupt(), when) if call == stop else None
            )
            with pytest.raises(KeyboardInterrupt):
                mn.push(run.path, URL, overwrite=True)
            net.fault = lambda call: None
            held = open_run(URL)
            assert held.manifest in (run.manifest, other.manifest) and held.check() == []
            mn.push(run.path, URL, overwrite=True)
            assert open_run(URL).manifest == run.manifest and set(stored()) == after


def test_half_an_upload_is_no_run(run: Run, net: SimpleNamespace) -> None:
    """Where nothing was before, there is nothing to open until the manifest is there."""
    net.fault = lambda call: (OSError("no route to host"), "half") if call > 8 else None
    assert "no route to host" in refused(mn.push, run.path, URL, error=RemoteError)
    net.fault = lambda call: None
    assert stored() and "never finished" in refused(open_run, URL, error=RunMissing)
    sent = len(stored())
    net.calls = 0
    mn.push(run.path, URL)
    assert net.calls < 2 * len(run.manifest.tables) and len(stored()) > sent


def test_another_run_is_replaced_on_demand_only(
    run: Run, other: Run, net: SimpleNamespace, tmp_path: Path
) -> None:
    """One of the same model and text with other tables is the next state of it, and other files are left alone."""
    copied = Path(shutil.copytree(run.path, tmp_path / "copy"))
    mn.push(copied, URL)
    fsspec.filesystem("memory").pipe_file("/bucket/runs/one/README.md", b"mine")
    remains = refused(mn.push, make_run(tmp_path / "third", seed=2).path, URL)
    assert "holds another one" in remains and "overwrite=True" in remains
    assert open_run(URL).manifest == run.manifest
    mn.push(other.path, URL, overwrite=True)
    assert open_run(URL).manifest == other.manifest
    assert (
        stored()["/bucket/runs/one/README.md"] == b"mine" and len(stored()) == len(other.manifest.tables) + 2
    )


def test_another_try_is_bounded(run: Run, net: SimpleNamespace) -> None:
    """What fails for good is one line after a few tries, and what cannot get better at once."""
    net.fault = lambda call: (OSError("503 Slow Down"), "before")
    assert "503 Slow Down; check the address" in refused(open_run, URL, error=RemoteError)
    assert net.calls == location.TRIES
    net.calls, net.fault = 0, lambda call: (PermissionError("Access Denied"), "before")
    assert "Access Denied" in refused(open_run, URL, error=RemoteError)
    assert net.calls == 1


def test_what_is_no_run_is_one_line(net: SimpleNamespace, tmp_path: Path) -> None:
    """A folder that is not there, a kind of URL that nobody knows, a package that is not installed."""
    assert "no such folder" in refused(open_run, URL, error=RunMissing)
    fsspec.filesystem("memory").pipe_file("/bucket/runs/one/notes.txt", b"x")
    assert "holds no manifest.json" in refused(open_run, URL, error=RunMissing)
    assert "nosuch" in refused(open_run, "nosuch://bucket/run", error=RemoteError)
    line = refused(open_run, "dvc://bucket/run", error=RemoteError)
    assert "a package that reads such URLs is missing" in line and "mnemoscope[remote]" in line
    assert "it is no URL" in refused(mn.pull, str(tmp_path / "x"), tmp_path / "y")


# -- building ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mn.Model:
    return mn.load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")


def test_a_run_is_built_behind_a_url(model: mn.Model, net: SimpleNamespace, tmp_path: Path) -> None:
    """The same tables as in a folder; while it is not uploaded it is kept here, and the same call goes on with it."""
    near = build(model, texts(20), tmp_path / "near", top=3, nulls=())
    net.fault = lambda call: (OSError("no route to host"), "before") if call > 12 else None
    assert "no route" in refused(lambda: build(model, texts(20), URL, top=3, nulls=()), error=RemoteError)
    (entry,) = mn.cache.entries("work")
    assert URL in entry.what and entry.bytes > 10_000
    net.fault = lambda call: None
    assert "never finished" in refused(open_run, URL, error=RunMissing)
    assert "top = 3, and top = 4" in refused(
        lambda: build(model, texts(20), URL, top=4, nulls=()), error=RunMismatch
    )
    net.fault = one_in_ten(3)
    far = build(model, texts(20), URL, top=3, nulls=())
    hashes = [{name: entry.sha256 for name, entry in one.manifest.tables.items()} for one in (near, far)]
    assert hashes[0] == hashes[1] and str(far.path) == URL and far.check() == []
    assert mn.cache.entries("work") == []
    assert str(build(model, texts(20), URL, top=3, nulls=()).path) == URL  # opened, not built again
    assert "top = 3, and top = 4" in refused(
        lambda: build(model, texts(20), URL, top=4, nulls=()), error=RunMismatch
    )


def test_what_came_there_meanwhile_is_left_alone(
    model: mn.Model, other: Run, net: SimpleNamespace, tmp_path: Path
) -> None:
    """Another run, from another machine: the second one is refused, and kept here to be pushed elsewhere."""

    def meanwhile(step: Any) -> None:
        if step.stage == "writing tables" and not stored():
            mn.push(other.path, URL)

    line = refused(lambda: build(model, texts(20), URL, top=3, nulls=(), report=meanwhile))
    assert f"meanwhile {URL} has come to hold another one" in line and "`mnemoscope push` the folder" in line
    assert open_run(URL).manifest == other.manifest and open_run(URL).check() == []
    (entry,) = mn.cache.entries("work")
    assert str(mn.push(entry.path / "run", f"{URL}-b").path) == f"{URL}-b"


def test_a_long_upload_tells_how_far_it_is(run: Run, net: SimpleNamespace, tmp_path: Path) -> None:
    """Within a table too, up and down: from nothing to all of it, and never back."""
    steps: list[Any] = []
    mn.push(run.path, URL, report=steps.append)
    mn.pull(URL, tmp_path / "back", report=steps.append)
    total = sum(entry.bytes for entry in run.manifest.tables.values())
    for stage in ("uploading", "downloading"):
        done = [step.done for step in steps if step.stage == stage]
        assert done == sorted(done) and done[0] == 0 and done[-1] == total
        assert len(done) > len(run.manifest.tables) + 1, "within tables"
    assert {step.total for step in steps} == {total}


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    model: mn.Model, net: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read."""
    net.fault = lambda call: (PermissionError("Access Denied"), "before") if call > 1 else None
    monkeypatch.setattr(building, "load_model", lambda *_: pytest.fail("loaded"))
    assert "Access Denied" in refused(build, "some model", "some text", URL, error=RemoteError)


@pytest.mark.parametrize("refusals", [0, 1, 5, 6])
def test_what_fails_is_asked_again_six_times(refusals: int, net: SimpleNamespace) -> None:
    """And no more often; what is final is not asked again."""
    fsspec.filesystem("memory").pipe_file("/bucket/a", b"x")
    net.fault = lambda call: (OSError("503 Slow Down"), "before") if call <= refusals else None
    if refusals < 6:
        assert Location("memory://bucket/a").read_bytes() == b"x"
    else:
        assert "503" in refused(Location("memory://bucket/a").read_bytes, error=RemoteError)
    assert net.calls == min(refusals + 1, 6)
    net.calls, net.fault = 0, lambda call: (PermissionError("Access Denied"), "before")
    assert "Denied" in refused(Location("memory://bucket/a").read_bytes, error=RemoteError)
    assert net.calls == 1


# -- web servers ------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A web server on loopback of what is in its `folder`, which lists nothing; whether it knows ranges `ranges` says,
    what was asked for `asked`."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(location, "WAIT", 1e-4)
    told = SimpleNamespace(folder=tmp_path / "web", ranges=True, asked=[], bytes=0)
    told.folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.asked.append(f"{self.command} {self.path}")
            file = told.folder / self.path[1:]
            if not file.is_file():
                self.send_error(404)
                return
            content, given = file.read_bytes(), self.headers.get("Range")
            if told.ranges and given:
                first, last = map(int, given.removeprefix("bytes=").split("-"))
                content = content[first : last + 1]
            self.send_response(206 if told.ranges and given else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                told.bytes += len(content)
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("pushed", [True, False])
def test_a_run_on_a_web_server_is_read(
    ranges: bool, pushed: bool, run: Run, web: SimpleNamespace, tmp_path: Path
) -> None:
    """Which lists nothing, of a folder or of what was pushed to a bucket; by its ranges where it knows any."""
    for name, entry in run.manifest.tables.items():
        called = uploaded(name, entry) if pushed else f"{name}.parquet"
        shutil.copyfile(run.path / f"{name}.parquet", web.folder / called)
    shutil.copyfile(run.path / MANIFEST, web.folder / MANIFEST)
    web.ranges = ranges
    far = mn.open_run(web.url)
    assert far.manifest == run.manifest and far.check() == []
    assert_frame_equal(far.rows("triggers", 1, 3), run.rows("triggers", 1, 3))
    assert mn.pull(web.url, tmp_path / "back").manifest == run.manifest
    assert "only read" in refused(mn.push, run.path, web.url, error=RemoteError)
    assert "only read" in refused(mn.build, "no-model", "no-text", web.url, error=RemoteError)
    assert all(each.startswith(("GET", "HEAD")) for each in web.asked)


def test_what_is_not_on_a_web_server_is_one_line(web: SimpleNamespace, run: Run) -> None:
    """No run, part of one, no server."""
    assert "nothing of that name" in refused(open_run, f"{web.url}/none", error=RemoteError)
    shutil.copyfile(run.path / MANIFEST, web.folder / MANIFEST)
    assert "is missing" in refused(open_run, web.url, error=RunCorrupt)
    assert "127.0.0.1:9" in refused(open_run, "http://127.0.0.1:9/run", error=RemoteError)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_text_on_a_web_server_is_read(
    ranges: bool, web: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, however large it is."""
    monkeypatch.setattr(location, "PIECE", 10)
    web.ranges = ranges
    content = "\n\n".join(texts(5))
    (web.folder / "a.txt").write_text(content)
    assert [each.text for each in documents(f"{web.url}/a.txt")] == texts(5)
    assert web.bytes == len(content)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("gs://bucket/run", "pip install gcsfs"),
        ("s3://bucket/run", "pip install 'mnemoscope[remote]'"),
        ("https://example.org/run", "pip install aiohttp"),
    ],
)
def test_a_package_that_is_missing_is_named(url: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, whatever kind of URL it is for."""
    for name in ("gcsfs", "s3fs", "aiohttp"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("fsspec.implementations.http", "gcsfs.core"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    for doing in (lambda: open_run(url), lambda: load_corpus(f"{url}/a.txt")):
        assert told in refused(doing, error=(RemoteError, CorpusError))


# -- texts -------------------------------------------------------------------------------------------------


def documents(source: str) -> list[Any]:
    return list(load_corpus(source).documents)


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "", "*.jsonl"])
def test_a_text_behind_a_url_is_that_of_its_files(kind: str, net: SimpleNamespace, tmp_path: Path) -> None:
    """Documents, names and identity, of a file, a folder and a pattern; fetched once, and again when it has changed."""
    folder, memory = tmp_path / "texts", fsspec.filesystem("memory")
    folder.mkdir()
    rows = [{"text": text, "year": year} for year, text in enumerate(texts(5))]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (folder / "a.txt").write_text("\n\n".join(texts(5)))
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "b.jsonl").write_bytes(lines)
    pq.write_table(pl.DataFrame(rows).to_arrow(), folder / "a.parquet")
    for file in folder.iterdir():
        memory.pipe_file(f"/bucket/texts/{file.name}", file.read_bytes())
    near, url = str(folder / kind), f"memory://bucket/texts/{kind}".rstrip("/")
    net.fault = one_in_ten(4)
    assert documents(url) == documents(near)
    assert load_corpus(url).source == load_corpus(near).source and load_corpus(url).id == load_corpus(near).id
    net.fault, net.bytes = lambda call: None, 0
    documents(url)
    assert net.bytes == 0
    changed = {"": "a.txt", "*.jsonl": "b.jsonl"}.get(kind, kind)
    memory.pipe_file(f"/bucket/texts/{changed}", (folder / changed).read_bytes())  # at another time
    documents(url)
    assert net.bytes > 0
    (kept,) = {entry.kind for entry in mn.cache.entries()}
    assert kept == "text"


def test_what_is_fetched_is_told_and_must_fit(net: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much of how much, once; what the disk has no room for is refused before any of it is fetched, and copies that
    were used long ago make room for it."""
    memory, steps = fsspec.filesystem("memory"), list[Progress]()
    for name in ("a", "b"):
        memory.pipe_file(f"/bucket/texts/{name}.txt", name.encode() * 30_000)
    monkeypatch.setattr(location, "PIECE", 10_000)
    load_corpus("memory://bucket/texts", report=steps.append)
    assert [step.done for step in steps] == [10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 60_000]
    assert {(step.stage, step.total, step.unit) for step in steps} == {("fetching", 60_000, "bytes")}
    load_corpus("memory://bucket/texts", report=steps.append)
    assert len(steps) == 7
    memory.pipe_file("/bucket/more/a.txt", b"words " * 10_000)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 50_000))
        net.bytes = 0
        told = refused(load_corpus, "memory://bucket/more", error=CorpusError)
        assert "0.0 GB are free" in told and net.bytes == 0
    monkeypatch.setattr(sources, "MOST_BYTES", 100_000)
    (kept,) = mn.cache.entries("text")
    os.utime(kept.path, (0, 0))
    load_corpus("memory://bucket/more")
    assert [entry.what for entry in mn.cache.entries("text")] == ["the text memory://bucket/more"]


def test_a_text_that_changes_while_it_is_read_is_refused(
    net: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts would be of two texts; nothing of it is kept."""
    memory, real = fsspec.filesystem("memory"), Location.fetch
    memory.pipe_file("/bucket/texts/a.txt", b"first\n\nwords")

    def fetched(self: Location, target: Path | None = None, *_: Any) -> str:
        digest = real(self, target)
        memory.pipe_file("/bucket/texts/a.txt", b"other\n\nwords")
        return digest

    monkeypatch.setattr(Location, "fetch", fetched)
    assert "changed while it was read" in refused(
        load_corpus, "memory://bucket/texts/a.txt", error=CorpusError
    )
    monkeypatch.undo()
    assert [each.text for each in documents("memory://bucket/texts/a.txt")] == ["other", "words"]


def test_a_text_of_unknown_size_is_read_whole(net: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As web servers send that say no length."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/texts/a.txt", b"first\n\nwords")
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: info(self, path) | {"size": None})
    assert [each.text for each in documents("memory://bucket/texts/a.txt")] == ["first", "words"]


@pytest.mark.parametrize("name", ["texts[1]", "what?", "a b", "ü"])
def test_a_folder_behind_a_url_has_any_name(name: str, net: SimpleNamespace) -> None:
    """What looks like a pattern is none where there is a folder of that name."""
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}/a.txt", b"first\n\nwords")
    assert [each.text for each in documents(f"memory://bucket/{name}")] == ["first", "words"]


def test_a_text_that_is_not_there_is_one_line(net: SimpleNamespace) -> None:
    """A file, a folder, a kind of file, a kind of URL."""
    assert "nothing of that name" in refused(load_corpus, "memory://bucket/none.txt", error=CorpusError)
    fsspec.filesystem("memory").pipe_file("/bucket/x/picture.png", b"x")
    assert "no file there can be read" in refused(load_corpus, "memory://bucket/x", error=CorpusError)
    assert "nosuch" in refused(load_corpus, "nosuch://x/y.txt", error=CorpusError)


# -- the command line --------------------------------------------------------------------------------------


def test_commands_take_urls(
    run: Run, net: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Push, show, find, pull; what a card prints names the URL."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope"])
    runner = CliRunner()
    assert f"show {URL}" in runner.invoke(app, ["push", str(run.path), URL]).output
    card = json.loads(runner.invoke(app, ["show", URL, "L1N3", "--json"]).stdout)
    assert card["id"] == "L1N3" and card["command"] == f"mnemoscope show {URL} L1N3"
    assert "Paris" in runner.invoke(app, ["find", URL, "--promotes", " Paris"]).stdout
    assert runner.invoke(app, ["pull", URL, str(tmp_path / "back")]).exit_code == 0
    assert open_run(tmp_path / "back").manifest == run.manifest
    assert remote.work_folder(tmp_path) == tmp_path


# -- a real server -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_holds_the_same_run(
    s3_server: SimpleNamespace, model: mn.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built to a server of which one request in ten fails, read from it, brought back: the tables of a folder."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    near = mn.build(model, texts(40), tmp_path / "near", top=5)
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
    drawn = random.Random(0)
    refusals = count()
    s3_server.fails = lambda: drawn.random() < 0.1 and next(refusals) >= 0
    far = mn.build(model, texts(40), "s3://bucket/runs/one", top=5)
    assert {name: entry.sha256 for name, entry in far.manifest.tables.items()} == {
        name: entry.sha256 for name, entry in near.manifest.tables.items()
    }
    assert far.check() == []
    ours, theirs = far.neuron(1, 3).to_dict(), near.neuron(1, 3).to_dict()
    assert all(ours.pop(way) != theirs.pop(way) for way in ("command", "python")) and ours == theirs
    assert_frame_equal(far.table("triggers").collect(), near.table("triggers").collect())
    assert mn.pull("s3://bucket/runs/one", tmp_path / "back").manifest == far.manifest
    fsspec.filesystem("s3").pipe_file("bucket/texts/a.txt", "\n\n".join(texts(5)).encode())
    assert [document.text for document in load_corpus("s3://bucket/texts").documents] == texts(5)
    assert next(refusals) > 3
