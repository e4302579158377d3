"""Builds a run directory whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnemoscope import files
from mnemoscope.errors import RunCorrupt, RunError
from mnemoscope.files import sha256, sync
from mnemoscope.location import Location, local, place
from mnemoscope.records import Manifest, TableEntry
from mnemoscope.run.reading import Run, check_name, dataset, is_run, open_run, read_manifest
from mnemoscope.run.schemas import (
    ADDING,
    GROUP_ROWS,
    GROUP_ROWS_DEFAULT,
    KEYS,
    MANIFEST,
    OFFLINE,
    OPTIONAL,
    SCHEMAS,
    WORK,
    pack,
)


def _writing(path: Path) -> AbstractContextManager[None]:
    """Turn what the file system refuses into one line."""
    full = f"free some space and run the same command again, it resumes from {WORK}"
    return files.refusals(f"writing the run {path}", "choose a folder that can be written to", full)


def _kinds(schema: pa.Schema) -> list[tuple[str, str]]:
    """Column names and types, without the accidents of how a writer names list items or declares nulls."""
    return [
        (field.name, f"list<{field.type.value_type}>" if pa.types.is_list(field.type) else str(field.type))
        for field in schema
    ]


class TableWriter:
    """Streams one sorted table into a Parquet file; equal rows give equal bytes, however chunked."""

    def __init__(self, name: str, path: Path, rows_per_group: int | None) -> None:
        self.name, self.path, self.rows_per_group = name, path, rows_per_group
        self._run, self._partial = path.parents[2], path.with_suffix(".partial")
        self._waiting: list[pa.Table] = []
        self._last: int | None = None
        floats = {f.name for f in SCHEMAS[name] if pa.types.is_floating(f.type)}
        self._file = pq.ParquetWriter(
            self._partial,
            SCHEMAS[name],
            compression="zstd",
            use_dictionary=[column for column in SCHEMAS[name].names if column not in floats],
            write_statistics=list(
                KEYS[name]
            ),  # which rows are looked up by; of others they would fill the footer
        )

    def append(self, rows: pa.Table) -> None:
        """Add rows that follow those before in the order of `KEYS`; columns as in `SCHEMAS`, in any order."""
        schema = SCHEMAS[self.name]
        assert set(rows.column_names) == set(schema.names), (self.name, rows.column_names)
        for field in schema:
            assert field.nullable or rows[field.name].null_count == 0, (self.name, field.name, "null")
        rows = rows.select(schema.names).cast(schema)
        if rows.num_rows == 0:
            return
        keys = pack(rows, KEYS[self.name])
        assert (np.diff(keys) >= 0).all(), (self.name, "is not sorted")
        assert self._last is None or keys[0] >= self._last, (self.name, self._last, keys[0])
        self._last = int(keys[-1])
        with _writing(self._run):
            self._write(rows)

    def _write(self, rows: pa.Table) -> None:
        if self.rows_per_group is None:
            self._file.write_table(rows.combine_chunks(), row_group_size=rows.num_rows)
            return
        self._waiting.append(rows)
        if sum(table.num_rows for table in self._waiting) >= self.rows_per_group:
            self._flush(self.rows_per_group)

    def _flush(self, size: int) -> None:
        rows = pa.concat_tables(self._waiting)
        whole = rows.num_rows - rows.num_rows % size
        for start in range(0, whole, size):
            self._file.write_table(rows.slice(start, size).combine_chunks(), row_group_size=size)
        self._waiting = [rows.slice(whole)]

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _writing(self._run):
            try:
                rest = sum(table.num_rows for table in self._waiting)
                if kind is None and rest:
                    self._flush(rest)
                self._file.close()
                if kind is None:
                    sync(self._partial)
                    self._partial.replace(self.path)
            finally:
                self._partial.unlink(missing_ok=True)  # when something failed: a full disk needs the room


class RunWriter:
    """Builds a run in `path/.work` and publishes it in one step.

    `work` is the folder for checkpoints: it survives interruption and goes with the commit. A finished run at
    `path` is refused (`RunError`) unless `overwrite`, and then stays whole until the new one is complete.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.work = self.path / WORK
        self._stage = self.work / "tables"
        self._open, self._writers, self._closed = ExitStack(), dict[str, TableWriter](), set[str]()
        if not overwrite:
            check_place(self.path)
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            finish_commit(self.path)
            if (self.path / MANIFEST).exists() and not overwrite:
                raise RunError(
                    f"writing the run {self.path}: it holds a finished run; choose another folder, or "
                    "pass overwrite to replace it"
                )
            self._stage.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        """What was not committed is no run; finished tables and `work` are kept for resuming."""
        self._open.__exit__(*failure)

    def table(self, name: str, *, rows_per_group: int | None = 0) -> TableWriter:
        """A streaming writer for one table; replaces an earlier attempt when it closes without an error.

        `rows_per_group` None makes each `append` one row group (contexts: a shard each); 0 is the usual size.
        """
        if rows_per_group == 0:
            rows_per_group = _group_rows(name)
        with _writing(self.path):
            return TableWriter(name, self._stage / f"{name}.parquet", rows_per_group)

    def append(self, name: str, rows: pa.Table) -> None:
        """Add rows to table `name`, which stays open, beside others, until something needs it whole."""
        assert name not in self._closed, f"table {name} is already complete"
        if name not in self._writers:
            self._writers[name] = self._open.enter_context(self.table(name))
        self._writers[name].append(rows)

    def _close(self) -> None:
        self._open.close()
        self._closed |= self._writers.keys()
        self._writers.clear()

    def holds(self, name: str, entry: TableEntry) -> bool:
        """Whether a table is complete already, and is this one."""
        file = self._stage / f"{name}.parquet"
        return file.exists() and sha256(file) == entry.sha256

    def adopt(self, name: str, file: str | Path) -> None:
        """Move a finished Parquet file in as table `name`; done already counts as done."""
        source, target = Path(file), self._stage / f"{name}.parquet"
        if not source.exists() and target.exists():
            return
        with _writing(self.path):
            kinds = _kinds(pq.read_schema(source))
            assert kinds == _kinds(SCHEMAS[name]), (name, kinds)
            shutil.move(source, target)
            sync(target)

    def sort_values_by_token(self, *, memory: str = "1GB") -> None:
        """Write `values_by_token` from the table `values`, sorting on disk beyond `memory`.

        Order: token, polarity descending, then the strongest first (probability descending where it is
        promoted, ascending where it is suppressed), layer, neuron. The order is total:
        the bytes are reproducible.
        """
        import duckdb

        self._close()
        source, scratch = dataset(self._stage / "values.parquet"), self.work / "sorting"
        order = "token, polarity desc, polarity * probability desc, layer, neuron"
        try:
            with duckdb.connect(config=OFFLINE) as database, self.table("values_by_token") as table:
                database.execute(f"set memory_limit = '{memory}'")
                database.execute("set temp_directory = ?", [str(scratch)])
                database.register("stored", source)
                rows = database.sql(f"select * from stored order by {order}")
                for batch in pa.RecordBatchReader.from_stream(rows):
                    table.append(pa.Table.from_batches([batch]))
        except (duckdb.Error, pa.ArrowException) as error:  # no room to sort in, most likely
            reason = " ".join(str(error).split())
            raise RunError(
                f"writing the run {self.path}: sorting the values by token failed ({reason})"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def commit(self, about: Mapping[str, Any]) -> Run:
        """Publish the tables and open the run; `about` is all of a `Manifest` but its `tables`.

        Every table of `SCHEMAS` but those of `OPTIONAL` must have been written. Interrupted before the new run is
        complete, an earlier run is untouched; after that, `finish_commit` (or another `RunWriter`) completes it.
        """
        self._close()
        with _writing(self.path):
            files = {name: self._stage / f"{name}.parquet" for name in SCHEMAS}
            for name, file in files.items():
                assert name in OPTIONAL or file.exists(), f"table {name} was never written"
            entries = {name: _entry(file) for name, file in files.items() if file.exists()}
            sync(self._stage)
            manifest = Manifest(**about, tables=entries)
            _write_manifest(self.work, manifest)
            finish_commit(self.path)
        return open_run(self.path)


def _entry(file: Path) -> TableEntry:
    """What a manifest knows of a finished file, which is on the disk when this returns."""
    rows = pq.read_metadata(file).num_rows
    sync(file)
    return TableEntry(rows=rows, bytes=file.stat().st_size, sha256=sha256(file))


def add_tables(
    path: str | Path | Location, tables: Mapping[str, Iterable[pa.Table]], options: Mapping[str, Any]
) -> Run:
    """Add tables of `OPTIONAL` to a finished run in a folder, or replace them, and open it.

    tables   the rows of each, in parts, in the order of `KEYS`
    options  entries that `options` of the manifest gains

    Whatever is killed when, the folder holds a whole run: first the manifest forgets the tables that are to be
    replaced, then the new files move in, and the manifest that names them comes last.
    """
    folder = local(place(path), "adding to the run")
    run = open_run(folder)
    assert tables.keys() <= OPTIONAL.keys(), tables.keys()
    stage = folder / ADDING / "tables"
    with _writing(folder):
        stage.mkdir(parents=True, exist_ok=True)
        for name, parts in tables.items():
            with TableWriter(name, stage / f"{name}.parquet", _group_rows(name)) as table:
                for rows in parts:
                    table.append(rows)
        known = {name: entry for name, entry in run.manifest.tables.items() if name not in tables}
        if len(known) < len(run.manifest.tables):
            _write_manifest(folder, run.manifest.model_copy(update={"tables": known}))
        for name in tables:
            known[name] = _entry(stage / f"{name}.parquet")
            (stage / f"{name}.parquet").replace(folder / f"{name}.parquet")
        sync(folder)
        ordered = {name: known[name] for name in SCHEMAS if name in known}
        gained = {"tables": ordered, "options": {**run.manifest.options, **options}}
        _write_manifest(folder, run.manifest.model_copy(update=gained))
        shutil.rmtree(folder / ADDING)
    return open_run(folder)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files.write(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n", "writing the manifest")


def _group_rows(name: str) -> int:
    return GROUP_ROWS.get(name, GROUP_ROWS_DEFAULT)


_TRIAL = ".trial"  # behind a URL: written and removed, to see whether that can be
_OURS = frozenset({WORK, ".lock", ".DS_Store", "Thumbs.db", "desktop.ini"})  # the latter of file managers


def check_place(path: str | Path | Location) -> None:
    """Raise `RunError` now if no run can be built there: no name, something else in the folder, no right to write
    (behind a URL `RemoteError`).

    A folder that is missing or empty will do, and so will a run, finished or begun. Behind a URL there may be other
    files, which are left alone.
    """
    doing = f"building a run in {str(path)!r}"
    if not str(path):
        raise RunError(f"{doing}: the path is empty; give the name of a new folder")
    path = place(path)
    check_name(path, "building a run in")
    if isinstance(path, Location):
        path.check_written("building a run in")
        if not is_finished(path):
            (path / _TRIAL).write_bytes(b"")
            (path / _TRIAL).unlink()
        return
    with files.refusals(doing, "choose a folder that can be written to"):
        if is_finished(path):
            return
        files.check_folder(path, "writing the run")
        held = sorted(file.name for file in path.iterdir()) if path.exists() else []
    if WORK not in held:
        strange = [name for name in held if name not in _OURS]
    else:  # what is begun must not end on top of what is not its own
        tables = () if (path / WORK / MANIFEST).exists() else [f"{name}.parquet" for name in SCHEMAS]
        strange = [name for name in held if name in tables]
    if strange and not is_finished(path):  # by now: another process may just have committed
        raise RunError(
            f"{doing}: the folder is neither empty nor a run, it holds {strange[0]!r}; choose a new or an empty folder"
        )


def is_finished(path: str | Path | Location) -> bool:
    """Whether the folder holds a run, and no commit that is under way or was interrupted."""
    path = place(path)
    return is_run(path) and not (isinstance(path, Path) and (path / WORK / MANIFEST).exists())


def finish_commit(path: str | Path) -> bool:
    """Complete a commit that was interrupted after its run was complete; False if there is none. Repeatable.

    The manifest moves last, and `.work` is emptied before it: what lies beside a manifest is always its own.
    """
    path = Path(path)
    work, ready = path / WORK, path / WORK / MANIFEST
    if not ready.exists():
        return False
    with _writing(path):
        entries = read_manifest(ready).tables
        moves = {name: (work / "tables" / f"{name}.parquet", path / f"{name}.parquet") for name in entries}
        for name, (source, target) in moves.items():
            file = source if source.exists() else target
            if not file.exists() or file.stat().st_size != entries[name].bytes:
                raise RunCorrupt(
                    f"finishing the run {path}: table {name} is missing or short in {WORK}; "
                    f"remove {work} and build again"
                )
        (path / MANIFEST).unlink(missing_ok=True)
        sync(path)
        for source, target in moves.values():
            if source.exists():
                source.replace(target)
        for name in OPTIONAL.keys() - entries.keys():  # of an earlier run
            (path / f"{name}.parquet").unlink(missing_ok=True)
        sync(path)
        for leftover in work.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover != ready:
                leftover.unlink()
        ready.replace(path / MANIFEST)
        sync(path)
        work.rmdir()
    return True
