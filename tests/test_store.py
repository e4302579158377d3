"""The run directory: whole or not at all, and read as it was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from synthetic import HISTOGRAM_EDGES, make_run

import mnemoscope as mn
from mnemoscope.errors import QueryError, RunCorrupt, RunError, RunMissing
from mnemoscope.records import SCHEMA_VERSION
from mnemoscope.run.reading import Run, _SortedTable, open_run
from mnemoscope.run.schemas import ADDING, KEYS, MANIFEST, OPTIONAL, SCHEMAS, TABLES, WORK, arrow_table
from mnemoscope.run.writing import RunWriter, add_tables, finish_commit

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("store") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("store") / "other", seed=1, gated=False)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run.path, tmp_path / "copy"))


def rewrite(run: Run, path: Path, *, overwrite: bool = True) -> Run:
    """Write an existing run's tables to `path` as a new run."""
    writer = RunWriter(path, overwrite=overwrite)
    for name in run.manifest.tables:
        writer.adopt(name, shutil.copy(run.file(name), writer.work / f"{name}.new"))
    return writer.commit(dict(run.manifest.model_dump(exclude={"tables"})))


# -- the format ------------------------------------------------------------------------------------------

_DTYPES = {
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float": "f32",
    "double": "f64",
    "string": "str",
    "binary": "bytes",
    "bool": "bool",
}


def _dtype(kind: pa.DataType) -> str:
    return f"list<{_dtype(kind.value_type)}>" if pa.types.is_list(kind) else _DTYPES[str(kind)]


def test_format_page_lists_every_column() -> None:
    """docs/format.md names the columns of each table, in order, with dtypes and whether they can be null."""
    page = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    documented = {
        name: re.findall(r"^\| `(\w+)` \| (\S+) \|[^|]*\| ([^|]+) \|", section, re.M)
        for name, section in re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.M | re.S)
    }
    declared = {
        name: [(field.name, _dtype(field.type), field.nullable) for field in schema]
        for name, schema in SCHEMAS.items()
    }
    assert {
        name: [(column, dtype, null != "never") for column, dtype, null in rows]
        for name, rows in documented.items()
    } == declared


def test_every_column_is_described() -> None:
    """Each table has a sentence, each column a unit and a meaning, and each is found by its name in tables.txt."""
    text = (HERE.parent / "src" / "mnemoscope" / "run" / "tables.txt").read_text(encoding="utf-8")
    found = re.findall(r"^(\w+) +\| ", text, re.M)
    assert found == [column.name for table in TABLES.values() for column in table.columns]
    for table in TABLES.values():
        assert table.meaning.endswith(".") and set(table.key) <= set(SCHEMAS[table.name].names), table.name
        assert len(set(SCHEMAS[table.name].names)) == len(table.columns), table.name
        assert not [column for column in table.columns if not all(column)], table.name


def test_columns_become_rows() -> None:
    """One value is for all rows, a matrix gives lists; what is masked, NaN where it may be, or missing is null."""
    columns = {
        "layer": 3,
        "neuron": pl.Series([1, 2]),
        "polarity": torch.tensor([1, -1]),
        "rank": [0, 1],
        "context": np.arange(2),
        "coefficient": np.array([0.5, 2.0]),
    }
    masked = np.ma.array([5, -1], mask=[False, True])
    rows = arrow_table("triggers", columns | {"position": np.ones(2), "next_token": masked})
    assert rows.schema.equals(SCHEMAS["triggers"])
    assert rows["layer"].to_pylist() == [3, 3] and rows["neuron"].to_pylist() == [1, 2]
    assert rows["polarity"].to_pylist() == [1, -1] and rows["position"].to_pylist() == [1, 1]
    assert rows["next_token"].to_pylist() == [5, None] and rows["gate_sign"].to_pylist() == [None, None]
    for skewness in (np.array([np.nan, 1.0]), pl.Series([np.nan, 1.0])):
        given = {"skewness": skewness, "key_tokens": np.eye(2, dtype=int)}
        few = arrow_table("neurons", given, partial=True)
        assert few.to_pydict() == {"skewness": [None, 1.0], "key_tokens": [[1, 0], [0, 1]]}
    with pytest.raises(AssertionError, match="position"):
        arrow_table("triggers", columns)
    with pytest.raises(AssertionError, match="nuron"):
        arrow_table("neurons", {"nuron": 1}, partial=True)
    with pytest.raises(pa.ArrowInvalid, match="truncated"):
        arrow_table("neurons", {"neuron": np.array([1.5])}, partial=True)


def _cell(field: pa.Field) -> st.SearchStrategy:
    kind = field.type
    if pa.types.is_list(kind):
        return st.lists(_cell(pa.field("item", kind.value_type, nullable=False)), max_size=3)
    if pa.types.is_integer(kind):
        half = 2 ** (kind.bit_width - 1)
        cell: st.SearchStrategy = st.integers(-half, half - 1)
    elif pa.types.is_floating(kind):
        cell = st.floats(allow_nan=False, width=kind.bit_width)
    elif pa.types.is_boolean(kind):
        cell = st.booleans()
    else:
        cell = st.binary(max_size=5) if pa.types.is_binary(kind) else st.text(max_size=5)
    return cell | st.none() if field.nullable else cell


@st.composite
def _tables(draw: st.DrawFn, name: str) -> pa.Table:
    """Rows of one table, sorted by its key."""
    schema, key = SCHEMAS[name], KEYS[name]
    cells = {field.name: st.integers(0, 9) if field.name in key else _cell(field) for field in schema}
    rows = draw(st.lists(st.fixed_dictionaries(cells), max_size=12))
    rows.sort(key=lambda row: [row[column] for column in key])
    return pa.Table.from_pylist(rows, schema=schema)


def _write(folder: str | Path, name: str, parts: list[pa.Table], rows_per_group: int = 5) -> Path:
    writer = RunWriter(folder)
    with writer.table(name, rows_per_group=rows_per_group) as table:
        for part in parts:
            table.append(part)
    return writer.work / "tables" / f"{name}.parquet"


@pytest.mark.parametrize("name", SCHEMAS)
@tries(8)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    """What is written is read back, and the bytes do not depend on how the rows were chunked."""
    rows = data.draw(_tables(name))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows.num_rows), max_size=3)))
    bounds = [0, *cuts, rows.num_rows]
    parts = [rows.slice(a, b - a) for a, b in pairwise(bounds)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole, chunked = _write(one, name, [rows]), _write(two, name, parts)
        assert pq.read_table(whole).equals(rows)
        assert whole.read_bytes() == chunked.read_bytes()


@tries(40)
@given(data=st.data(), name=st.sampled_from(["triggers", "values_by_token"]), size=st.integers(1, 7))
def test_find_equals_filter(data: st.DataObject, name: str, size: int) -> None:
    """Looking up a key gives the rows that a full scan gives, wherever row groups begin and end."""
    rows = data.draw(_tables(name))
    with tempfile.TemporaryDirectory() as folder:
        table = _SortedTable(name, _write(folder, name, [rows], rows_per_group=size))
        key = data.draw(st.tuples(*[st.integers(0, 9)] * len(KEYS[name])))
        mask = np.ones(rows.num_rows, bool)
        for column, value in zip(KEYS[name], key, strict=True):
            mask &= rows[column].to_numpy() == value
        assert table.find(*key).to_dicts() == rows.filter(pa.array(mask)).to_pylist()


def test_find_reads_few_groups(tmp_path: Path) -> None:
    """One neuron costs at most two row groups of many, even where a group spans two layers."""
    address = np.repeat(np.arange(60), 3)
    rows = pa.Table.from_pylist(
        [{"layer": a // 20, "neuron": a % 20, "counts": [int(a)]} for a in address],
        schema=SCHEMAS["histograms"],
    )
    table = _SortedTable("histograms", _write(tmp_path, "histograms", [rows], rows_per_group=7))
    reads: list[int] = []
    read = table._read
    table._read = lambda groups: (reads.append(len(groups)), read(groups))[1]  # type: ignore[method-assign]
    for a in range(60):
        assert table.find(a // 20, a % 20)["counts"].to_list() == [[a]] * 3
    assert max(reads) <= 2


def test_writer_refuses_disorder(tmp_path: Path) -> None:
    """Rows out of order, missing columns and nulls where none are allowed are caught when written."""
    good = {"layer": 1, "neuron": 1, "counts": [1]}
    schema = SCHEMAS["histograms"].remove_metadata()
    loose = pa.schema([field.with_nullable(True) for field in schema])
    bad = [
        [good, {**good, "layer": 0}],
        [{**good, "counts": None}],
    ]
    for rows in bad:
        with pytest.raises(AssertionError), RunWriter(tmp_path).table("histograms") as table:
            for row in rows:
                table.append(pa.Table.from_pylist([row], schema=loose))
    with pytest.raises(AssertionError), RunWriter(tmp_path).table("histograms") as table:
        table.append(pa.table({"layer": [1]}))
    assert not list((tmp_path / WORK / "tables").iterdir())


# -- whole or not at all ---------------------------------------------------------------------------------


class _Power(BaseException):
    """The power goes: nothing may catch this."""


def _hashes(run: Run) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in run.manifest.tables.items()}


def _fail_at(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> Iterator[int]:
    """Let the n-th change of the disk fail instead of happening; gives the counter of changes."""
    counter = count()

    def failing(change):
        def call(*arguments, **options):
            if next(counter) == step:
                raise error
            return change(*arguments, **options)

        return call

    for name in ("replace", "fsync", "unlink", "rmdir"):
        patch.setattr(os, name, failing(getattr(os, name)))
    return counter


@pytest.mark.parametrize(
    ("earlier", "error"),
    [
        pytest.param(False, _Power(), marks=pytest.mark.slow),
        pytest.param(True, _Power(), marks=pytest.mark.slow),
        (True, OSError(errno.EIO, "I/O error")),
    ],
    ids=["power, empty folder", "power, earlier run", "I/O, earlier run"],
)
def test_interrupted_at_every_step(
    run: Run, other: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, error: BaseException
) -> None:
    """Wherever writing stops, the folder holds the old run, none, or the new, and the next try succeeds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # counted, but not waited for
    for step in count():
        path = tmp_path / str(step)
        if earlier:
            shutil.copytree(other.path, path)
        with monkeypatch.context() as patch:
            changes = _fail_at(patch, step, error)
            try:
                rewrite(run, path)
            except (_Power, RunError):
                pass
            else:
                assert next(changes) <= step, "a change that failed was ignored"
                break
        try:
            found = open_run(path)
        except RunMissing:
            assert not earlier or (path / WORK / MANIFEST).exists(), (
                "the old run went before the new was complete"
            )
            if finish_commit(path):
                assert _hashes(open_run(path)) == _hashes(run)
        else:
            assert found.check() == []
            assert _hashes(found) in ([_hashes(other), _hashes(run)] if earlier else [_hashes(run)])
        again = rewrite(run, path)
        assert _hashes(again) == _hashes(run) and again.check() == []
        assert not (path / WORK).exists()
    assert step > 40


@pytest.mark.slow
def test_killed(run: Run, tmp_path: Path) -> None:
    """Killed outright at random moments, the folder holds no half run, and the next build is whole."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom synthetic import make_run\n"
    code += f"print('ready', flush=True)\nwhile True: make_run({str(tmp_path / 'run')!r}, overwrite=True)"
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(random.Random(attempt).uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        with suppress(RunMissing):
            assert open_run(tmp_path / "run").check() == []
        assert _hashes(make_run(tmp_path / "run", overwrite=True)) == _hashes(run)


def _calibration(value: float) -> dict[str, list[pa.Table]]:
    row = {"layer": 0, "unit": "random", "measure": "f1", "count": 3, "levels": [0.5], "values": [value]}
    return {"calibration": [pa.Table.from_pylist([row], schema=SCHEMAS["calibration"])]}


def _added(run: Run) -> float | None:
    if "calibration" not in run.manifest.tables:
        return None
    return run.table("calibration").collect()["values"][0][0]


@pytest.mark.parametrize("error", [_Power(), OSError(errno.EIO, "I/O error")], ids=["power", "I/O"])
def test_adding_interrupted_at_every_step(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Wherever adding stops, the folder holds a whole run: with the old table, without one, or with the new."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    add_tables(copy, _calibration(1.0), {"patterns": 1})
    seen = set()
    for step in count():
        path = Path(shutil.copytree(copy, tmp_path / str(step)))
        with monkeypatch.context() as patch:
            _fail_at(patch, step, error)
            try:
                add_tables(path, _calibration(2.0), {"patterns": 2})
            except (_Power, RunError):
                pass
            else:
                break
        found = open_run(path)
        assert found.check() == []
        seen.add(_added(found))
        again = add_tables(path, _calibration(2.0), {"patterns": 2})
        assert _added(again) == 2.0 and again.manifest.options["patterns"] == 2 and again.check() == []
        assert not (path / ADDING).exists()
        shutil.rmtree(path)
    assert seen == {1.0, None, 2.0}


def test_an_earlier_runs_additions_go_with_it(run: Run, copy: Path) -> None:
    """A new run in the folder has no table that was added to the old one."""
    add_tables(copy, _calibration(1.0), {})
    assert "calibration" not in rewrite(run, copy).manifest.tables
    assert not (copy / "calibration.parquet").exists()
    with pytest.raises(QueryError, match=r"has none; add it with `mnemoscope patterns RUN`"):
        open_run(copy).table("calibration")


def test_commit_that_lost_a_table(
    run: Run, other: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the tables of an interrupted commit are damaged, an earlier run stays and the table is named."""
    path = Path(shutil.copytree(other.path, tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(_Power):
        patch.setattr(Path, "unlink", _raise_power)
        rewrite(run, path)
    (path / WORK / "tables" / "values.parquet").write_bytes(b"")
    with pytest.raises(RunCorrupt, match="table values is missing or short"):
        finish_commit(path)
    assert _hashes(open_run(path)) == _hashes(other)


def _raise_power(*_: object, **__: object) -> None:
    raise _Power


def test_no_room_to_sort(run: Run, tmp_path: Path) -> None:
    """A sort that runs out of room is one line, and leaves no half table."""
    writer = RunWriter(tmp_path / "run")
    writer.adopt("values", shutil.copy(run.file("values"), tmp_path / "values.parquet"))
    with pytest.raises(RunError, match="sorting the values by token failed") as caught:
        writer.sort_values_by_token(memory="1KB")
    assert "\n" not in str(caught.value)
    assert [file.name for file in (writer.work / "tables").iterdir()] == ["values.parquet"]


def test_finished_run_is_refused(run: Run, copy: Path) -> None:
    """A finished run is not written over unless asked, and the message says how to ask."""
    with pytest.raises(RunError, match="holds a finished run; choose another folder, or pass overwrite"):
        RunWriter(copy)
    RunWriter(copy, overwrite=True)
    assert open_run(copy).check() == []


def test_adopt(run: Run, tmp_path: Path) -> None:
    """A file is moved in, doing it twice is harmless, and a file with other columns is refused."""
    writer = RunWriter(tmp_path / "run")
    source = Path(shutil.copy(run.file("contexts"), tmp_path / "contexts.parquet"))
    writer.adopt("contexts", source)
    assert not source.exists()
    writer.adopt("contexts", source)
    with pytest.raises(AssertionError):
        writer.adopt("documents", shutil.copy(run.file("contexts"), source))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is one line that says so."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunError, match=r"writing the run \S+/run: the disk is full; free some space"):
        make_run(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_device(tmp_path: Path) -> None:
    """A device that is really full is recognised through pyarrow as well."""
    writer = RunWriter(tmp_path / "run")
    (writer.work / "tables" / "histograms.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match="the disk is full"), writer.table("histograms") as table:
        rows = [{"layer": 0, "neuron": i, "counts": [i] * 193} for i in range(300)]
        table.append(pa.Table.from_pylist(rows, schema=SCHEMAS["histograms"]))


def test_tables_side_by_side(run: Run, tmp_path: Path) -> None:
    """Tables can be written in turns; what was being written when something failed leaves nothing behind."""
    frames = {name: pq.read_table(run.file(name)) for name in ("triggers", "values")}

    def write(path: Path, fail: bool) -> list[str]:
        with suppress(_Power), RunWriter(path) as writer:
            for layer in range(3):
                for name, rows in frames.items():
                    writer.append(name, rows.filter(pa.array(rows["layer"].to_numpy() == layer)))
                if fail:
                    raise _Power
        return sorted(file.name for file in (path / WORK / "tables").iterdir())

    assert write(tmp_path / "failed", True) == []
    assert write(tmp_path / "run", False) == ["triggers.parquet", "values.parquet"]
    for name in frames:
        written = tmp_path / "run" / WORK / "tables" / f"{name}.parquet"
        assert written.read_bytes() == run.file(name).read_bytes()


def test_unwritable(tmp_path: Path) -> None:
    """A place that cannot be a folder is one line that says so."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="choose a folder that can be written to"):
            RunWriter(path)


# -- damage ----------------------------------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    """No folder, an empty folder and an unfinished run are told apart."""
    with pytest.raises(RunMissing, match="no such folder"):
        open_run(tmp_path / "none")
    with pytest.raises(RunMissing, match=r"holds no manifest\.json"):
        open_run(tmp_path)
    writer = RunWriter(tmp_path)
    with pytest.raises(RunMissing, match="before it had read its text; begin again"):
        open_run(tmp_path)
    (writer.work / "plan.json").write_text("{}")
    with pytest.raises(RunMissing, match="never finished; resume"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in OPTIONAL])
def test_damaged_table_is_named(name: str, copy: Path) -> None:
    """A flipped byte is found by check; a short or deleted table already on opening; each names the table."""
    file = copy / f"{name}.parquet"
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert [problem.table for problem in open_run(copy).check()] == [name]
    file.write_bytes(whole[:middle])
    with pytest.raises(RunCorrupt, match=f"table {name} has {middle} bytes instead of {len(whole)}"):
        open_run(copy)
    file.unlink()
    with pytest.raises(RunCorrupt, match=f"table {name} is missing"):
        open_run(copy)


def test_damage_found_while_reading(copy: Path) -> None:
    """A table that is damaged or goes after opening is named by whatever reads it."""
    opened = open_run(copy)
    opened.rows("triggers", 0, 1)
    size = opened.manifest.tables["triggers"].bytes
    for damage in (b"x" * size, None):
        for found in (opened, open_run(copy)) if damage is None else (opened,):
            if damage is None:
                (copy / "triggers.parquet").unlink(missing_ok=True)
            else:
                (copy / "triggers.parquet").write_bytes(damage)
            with pytest.raises(RunCorrupt, match="table triggers"):
                found.rows("triggers", 0, 1)
            with pytest.raises(RunCorrupt, match="table triggers"):
                found.sql("select * from triggers")
    assert [problem.table for problem in opened.check()] == ["triggers"]


_OLDER = rf"older version of mnemoscope \(format 1; this one reads {SCHEMA_VERSION}\); build it again in another folder"


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda m: {**m, "schema_version": 99}, RunError, "format 99.*upgrade"),
        (lambda m: {**m, "schema_version": 99, "new": 1}, RunError, "format 99.*upgrade"),
        (lambda m: {**m, "schema_version": 1}, RunError, _OLDER),
        (lambda m: {"schema_version": 1, "tables": {}}, RunError, _OLDER),
        (lambda m: {**m, "surprise": 1}, RunCorrupt, "cannot be read"),
        (lambda m: {k: v for k, v in m.items() if k != "schema_version"}, RunCorrupt, "cannot be read"),
        (lambda m: [m], RunCorrupt, "cannot be read"),
        (lambda m: {**m, "tables": {}}, RunCorrupt, "lacks or invents tables"),
        (lambda m: {**m, "tables": {**m["tables"], "../x": m["tables"]["values"]}}, RunCorrupt, "invents"),
    ],
)
def test_edited_manifest(edit, error: type[RunError], words: str, copy: Path) -> None:
    """A manifest from the past or the future, or one that was tampered with, is refused in one line."""
    file = copy / MANIFEST
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    for opened in (open_run, mn.open_run):
        with pytest.raises(error, match=words) as caught:
            opened(copy)
        assert type(caught.value) is error and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"opening the run {copy}: ")


def test_truncated_manifest(copy: Path) -> None:
    """Half a manifest, and one that is not text, is a corrupt run."""
    for content in (b'{"schema_version": 1,', b"\xff\xfe", b""):
        (copy / MANIFEST).write_bytes(content)
        with pytest.raises(RunCorrupt, match="cannot be read"):
            open_run(copy)


def test_edited_figures(copy: Path) -> None:
    """Figures changed in the manifest are found: sizes on opening, rows and hashes by check."""
    file = copy / MANIFEST
    manifest = json.loads(file.read_text())
    for key, value in (("rows", 1), ("sha256", "0" * 64)):
        edited = json.loads(json.dumps(manifest))
        edited["tables"]["values"][key] = value
        file.write_text(json.dumps(edited))
        assert [problem.table for problem in open_run(copy).check()] == ["values"]


# -- reading ---------------------------------------------------------------------------------------------


def test_rows_equal_scan(run: Run) -> None:
    """The quick path gives what a scan gives, for every neuron and table."""
    for name in ("neurons", "histograms", "triggers", "samples", "values"):
        everything = run.table(name).collect()
        parts = [run.rows(name, layer, neuron) for layer in range(3) for neuron in range(8)]
        assert pl.concat(parts).equals(everything)


def test_out_of_range(run: Run) -> None:
    """An address, token, table, context or document that the run lacks is one line with what it has."""
    for layer, neuron in ((3, 0), (0, 8), (-1, 0), (0, -1)):
        for question in (lambda a, b: run.rows("values", a, b), run.address):
            with pytest.raises(
                QueryError, match="out of range; synthetic has layers 0 to 2 and neurons 0 to 7"
            ):
                question(layer, neuron)
    with pytest.raises(QueryError, match="polarity 2: tokens are 0 to"):
        run.by_token(1, 2)
    with pytest.raises(QueryError, match="token 100000"):
        run.by_token(100_000)
    with pytest.raises(QueryError, match=r"one of neurons, histograms, triggers, samples, values$"):
        run.rows("contexts", 0, 0)
    with pytest.raises(QueryError, match="choose one of neurons"):
        run.table("nothing")
    with pytest.raises(QueryError, match="reading context 9999"):
        run.contexts([1, 9999])
    with pytest.raises(QueryError, match="reading document -1"):
        run.documents([-1])


def test_reopening_finds_what_was_added(run: Run, tmp_path: Path) -> None:
    """Tables that were added since a run was opened are there after `reopen`, for SQL too."""
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    opened = open_run(path)
    assert opened.sql("select count(*) as n from neurons")["n"][0] > 0
    table = pa.table({"layer": [0], "part": ["ffn"], "parameters": [7]}, schema=SCHEMAS["parameters"])
    add_tables(path, {"parameters": [table]}, {"study_glance": {}})
    with pytest.raises(QueryError):
        opened.table("parameters")
    opened.reopen()
    assert opened.table("parameters").collect()["parameters"].to_list() == [7]
    assert opened.sql("select parameters from parameters")["parameters"].to_list() == [7]
    assert opened.manifest.options["study_glance"] == {}


def test_a_table_that_is_written_anew_is_not_read_where_rows_were(run: Run, tmp_path: Path) -> None:
    """Whoever has the run open is told, until it is opened again."""
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    opened = open_run(path)
    before = opened.rows("triggers", 1, 3)
    make_run(path, seed=5, overwrite=True)
    for _ in range(2):
        with pytest.raises(
            RunCorrupt, match="table triggers was written anew while the run was open; open it again"
        ):
            opened.rows("triggers", 1, 4)
    opened.reopen()
    assert opened.rows("triggers", 1, 3).equals(open_run(path).rows("triggers", 1, 3))
    assert not opened.rows("triggers", 1, 3).equals(before)


def test_contexts_and_documents(run: Run) -> None:
    """Contexts and documents come back by id, in ascending order and once each."""
    everything = run.table("contexts").collect().to_dicts()
    ids = [30, 3, 3, 17]
    found = run.contexts(ids)
    assert list(found) == [3, 17, 30]
    for context, stored in found.items():
        row = everything[context]
        assert (stored.document, stored.start) == (row["document"], row["start"])
        assert stored.tokens.tolist() == row["tokens"] and stored.tokens.dtype == np.int32
    assert run.contexts([]) == {}
    titles = dict(run.table("documents").select("document", "title").collect().iter_rows())
    documents = run.documents(list(titles))
    assert {document: stored.title for document, stored in documents.items()} == titles
    assert documents[1].metadata == {"topic": "topic 1"}


def test_by_token_equals_sort(run: Run) -> None:
    """Looking up a token gives its rows of the value table, strongest first."""
    values = run.table("values").collect()
    for token in range(run.manifest.model.vocabulary):
        for polarity in (1, -1):
            slow = values.filter((pl.col("token") == token) & (pl.col("polarity") == polarity))
            slow = slow.sort("probability", "layer", "neuron", descending=[polarity == 1, False, False])
            assert run.by_token(token, polarity).equals(slow)


def test_sort_by_token_spills(tmp_path: Path) -> None:
    """Sorting in little memory gives the bytes that sorting in much memory gives."""
    rows, generator = 40_000, np.random.default_rng(0)
    address = np.arange(rows)
    values = pa.table(
        {
            "layer": (address // 10_000).astype(np.int16),
            "neuron": (address % 10_000).astype(np.int32),
            "polarity": generator.choice([-1, 1], rows).astype(np.int8),
            "rank": np.zeros(rows, np.int16),
            "token": generator.integers(0, 50, rows).astype(np.int32),
            "logit": generator.standard_normal(rows).astype(np.float32),
            "probability": generator.integers(0, 3, rows).astype(np.float32),
        },
        schema=SCHEMAS["values"],
    )
    files = []
    for memory in ("1GB", "20MB"):
        writer = RunWriter(tmp_path / memory)
        with writer.table("values") as table:
            table.append(values)
        writer.sort_values_by_token(memory=memory)
        files.append((writer.work / "tables" / "values_by_token.parquet").read_bytes())
    assert files[0] == files[1]


def test_vocabulary(run: Run) -> None:
    """The vocabulary joins byte-level pieces of a stored context into its text."""
    tokens = run.table("contexts").collect()["tokens"].explode().to_list()
    text = "".join(run.vocabulary.pieces(tokens))
    assert "東京都はとても大きい。" in text and "שלום עולם" in text and "👋🏽" in text


def test_sql(run: Run) -> None:
    """SQL sees every table, takes parameters, and names what is wrong with a query."""
    for name, entry in run.manifest.tables.items():
        assert run.sql(f"select count(*) n from {name}")["n"].to_list() == [entry.rows]
    assert run.sql("select max(layer) m from neurons where neuron = ?", [3])["m"].to_list() == [2]
    assert run.sql("select count(*) n from neurons where layer = $l", {"l": 1})["n"].to_list() == [8]
    assert run.sql("with t as (from triggers) select distinct polarity from t").height == 2
    for query in ("select nothing from triggers", "select * from nowhere", "selec", "select 1/", "select ?"):
        with pytest.raises(QueryError, match="running SQL on a run") as caught:
            run.sql(query)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        "copy triggers to '{path}/triggers.parquet' (format parquet)",
        "explain analyze copy triggers to '{path}/triggers.parquet' (format parquet)",
        "select 1; copy triggers to '{path}/triggers.parquet' (format parquet)",
        "copy triggers to '{path}/new.csv'",
        "create table t as select 1",
        "drop view triggers",
        "attach '{path}/new.db'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "pragma enable_profiling",
        "",
    ],
)
def test_sql_is_read_only(query: str, run: Run) -> None:
    """Nothing but one SELECT is run, and the run stays as it was."""
    before = sorted(file.name for file in run.path.iterdir())
    with pytest.raises(QueryError):
        run.sql(query.format(path=run.path))
    assert run.check() == [] and before == sorted(file.name for file in run.path.iterdir())


def test_sql_reads_no_other_file(run: Run, tmp_path: Path) -> None:
    """A query cannot read what lies outside the run."""
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for source in (
        f"'{secret}'",
        f"read_text('{secret}')",
        f"glob('{tmp_path}/*')",
        "'https://example.org/a.csv'",
    ):
        with pytest.raises(QueryError):
            run.sql(f"select * from {source}")


# A folder's name, and that of a sibling which it would match if it were taken for a pattern.
TRAPS = [
    ("run[1]", "run1"), ("what?", "whatx"), ("star*", "starry"), ("**", "anything"), ("a{b,c}", "ab"), ("[!x]", "y"),
    ("back\\[s]lash", "back\\slash"), ("per%cent [0-9]", "per%cent 7"), ('it\'s "one" ü [日]', 'it\'s "one" ü 日'),
    ("new\nline[1]", "new\nline1"), ("x" * 250 + "[1]", "x" * 250 + "1"), ("-dash", "dash"), ("lang=en", "lang"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sibling"), [*TRAPS[:6], *(pytest.param(*trap, marks=pytest.mark.slow) for trap in TRAPS[6:])]
)
def test_a_folders_name_is_no_pattern(
    name: str, sibling: str, run: Run, other: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a folder is called, it is written and read itself, and never a sibling whose name fits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.path, sibling)
    shutil.copytree(run.path, Path(sibling) / WORK / "tables")  # as if it were being built
    make_run(Path(name), seed=1, gated=False)
    opened = open_run(name)
    assert opened.check() == [] and _hashes(opened) == _hashes(other)
    assert opened.path.name == name and sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [name, sibling]
    )
    for table, entry in other.manifest.tables.items():
        assert opened.sql(f"select count(*) n from {table}")["n"].to_list() == [entry.rows]
        assert opened.table(table).collect().height == entry.rows
    assert opened.rows("triggers", 1, 3).equals(other.rows("triggers", 1, 3))
    assert opened.by_token(3).equals(other.by_token(3))


def test_two_readers(run: Run) -> None:
    """Threads that share a run read what one reader reads."""
    fresh = open_run(run.path)

    def read(i: int) -> bool:
        layer, neuron = i % 3, i % 8
        same = fresh.rows("triggers", layer, neuron).equals(run.rows("triggers", layer, neuron))
        counted = fresh.sql("select count(*) n from triggers where layer = ? and neuron = ?", [layer, neuron])
        same &= counted["n"][0] == fresh.rows("triggers", layer, neuron).height
        return same and list(fresh.contexts([i % 40])) == [i % 40]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(120)))


_READ = """
import sys
from mnemoscope import open_run
run = open_run(sys.argv[1])
run.rows("triggers", 1, 3), run.contexts([1]), run.vocabulary, run.by_token(3)
run.table("values").collect()
print(sorted({"pandas"} & set(sys.modules)))
run.sql("select 1")
heavy = {"torch", "transformers", "numba"}
print(sorted(heavy & set(sys.modules)))
sys.modules["numba"] = sys  # a stand-in, to see that it would be noticed
print(sorted(heavy & set(sys.modules)))
"""


def test_reading_is_light(run: Run) -> None:
    """Reading a run imports no torch, transformers, numba or pandas; a stand-in for one of them is noticed."""
    command = [sys.executable, "-c", _READ, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "['numba']"]


# -- the synthetic run itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run", "other"])
def test_synthetic_is_consistent(which: str, request: pytest.FixtureRequest) -> None:
    """In the synthetic run the tables agree with each other and keep the rules of docs/format.md."""
    run: Run = request.getfixturevalue(which)
    neurons = run.table("neurons").collect()
    contexts = run.table("contexts").collect()["tokens"].to_list()
    for row in run.table("triggers").collect().iter_rows(named=True):
        tokens = [*contexts[row["context"]], None]
        assert row["next_token"] == tokens[row["position"] + 1] and row["coefficient"] * row["polarity"] > 0
        assert row["position"] > 0 and (row["gate_sign"] is not None) == run.manifest.model.gated
    counts = run.table("histograms").select(pl.col("counts").list.sum()).collect()["counts"]
    assert counts.to_list() == neurons["tokens"].to_list() == [run.manifest.corpus.counted] * 24
    assert len(HISTOGRAM_EDGES) == 192 and sorted(HISTOGRAM_EDGES) == HISTOGRAM_EDGES
    assert run.rows("triggers", 1, 0).is_empty() and neurons["std"][8] == 0 and neurons["kurtosis"][8] is None
    assert run.rows("triggers", 1, 1)["polarity"].unique().to_list() == [1]
    assert neurons.filter(pl.col("neuron") == 2)["kurtosis"].min() > 20  # type: ignore[operator]


def test_synthetic_is_reproducible(run: Run, tmp_path: Path) -> None:
    """The same seed gives the same bytes."""
    assert _hashes(make_run(tmp_path / "again")) == _hashes(run)


def test_a_table_that_lacks_a_column_is_one_line(run: Run, tmp_path: Path) -> None:
    """A table that was written anew without a column, with the manifest told so, is no run."""
    path = shutil.copytree(run.path, tmp_path / "thinner")
    file = path / "neurons.parquet"
    thinner = pq.read_table(file).drop_columns(["kurtosis"])
    pq.write_table(thinner, file)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["tables"]["neurons"] |= {"bytes": file.stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        RunCorrupt, match=r"table neurons lacks the column kurtosis; restore neurons\.parquet"
    ):
        open_run(path).rows("neurons", 0, 0)
