"""Opens a run directory and reads it by key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock, RLock, Timer
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mnemoscope.arguments import check_neurons
from mnemoscope.errors import QueryError, RunCorrupt, RunError, RunMissing
from mnemoscope.files import from_json, kind, sha256
from mnemoscope.location import Location, Place, local, parquet, place, stamp
from mnemoscope.records import SCHEMA_VERSION, Manifest, NeuronId, Progress, TableEntry, other_format
from mnemoscope.run.places import TEXT
from mnemoscope.run.schemas import KEYS, MANIFEST, OFFLINE, OPTIONAL, SCHEMAS, WORK, pack
from mnemoscope.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import duckdb
    from pyarrow.dataset import Dataset

    from mnemoscope.run.places import WholeText

T = TypeVar("T")

_HASH = 16  # hexadecimal digits of a sha256 in the name of a table behind a URL
LOOKS = 3  # at what is behind a URL, until it is said to be damaged
KEPT_GROUPS = 4  # of a table, a few hundred kB each
MOST_BYTES = 32 << 20  # of an answer in SQL, where its rows are limited
_ODD = re.compile(
    r"\b(INTERVAL|UNION|BIT|DATE|TIMESTAMP\w*)\b"
)  # kinds of DuckDB's columns that frames do not all hold
REBUILD = "build it again in another folder with `mnemoscope build`"


class StoredContext(NamedTuple):
    """A context: its document, where it starts there (0-based, in tokens), its tokens i32[token]."""

    document: int
    start: int
    tokens: np.ndarray


class StoredDocument(NamedTuple):
    """A document: its title, if the source has one, and whatever else the source says of it."""

    title: str | None
    metadata: dict[str, Any]


class Problem(NamedTuple):
    """What `Run.check` found wrong with one table."""

    table: str
    text: str


@contextmanager
def _reading(name: str, path: Place) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise _corrupt(name, path, f"cannot be read ({str(error).splitlines()[0]})") from error


def _corrupt(name: str, path: Place, what: str) -> RunCorrupt:
    return RunCorrupt(
        f"reading the run {path.parent}: table {name} {what}; restore {path.name} or build again"
    )


def dataset(file: Place, schema: pa.Schema | None = None) -> Dataset:
    """One Parquet file as DuckDB is given it: as Arrow, because it takes every path for a pattern, and would read
    another run whose name fits it."""
    import pyarrow.dataset as ds  # here, because it imports pandas
    from pyarrow.fs import LocalFileSystem

    form = ds.ParquetFileFormat()
    if isinstance(file, Location):
        return ds.FileSystemDataset([form.make_fragment(pa.PythonFile(file.open(), "r"))], schema, form)
    schema, name = schema or pq.read_schema(file), str(file.absolute())
    return ds.FileSystemDataset.from_paths([name], schema, form, LocalFileSystem())


class _SortedTable:
    """One Parquet file sorted by its key; reads only the row groups that can hold what is asked for."""

    def __init__(self, name: str, path: Place) -> None:
        self.name, self.path, self.key = name, path, KEYS[name]
        self._group = lru_cache(KEPT_GROUPS)(lambda group: self._keyed([group]))
        self._stamp: tuple[int, ...] = ()

    @cached_property
    def metadata(self) -> pq.FileMetaData:
        with _reading(self.name, self.path):
            self._stamp = stamp(self.path)
            with parquet(self.path) as file:
                metadata = file.metadata
        missing = set(SCHEMAS[self.name].names) - set(metadata.schema.to_arrow_schema().names)
        if missing:
            raise _corrupt(self.name, self.path, f"lacks the column {min(missing)}")
        return metadata

    @cached_property
    def dataset(self) -> Dataset:
        """The file for DuckDB; see `dataset`."""
        return dataset(self.path, self.metadata.schema.to_arrow_schema())

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """A lower bound of the first and an upper bound of the last key of each row group, both ascending.

        Statistics are per column: where a group spans two layers they do not give its first and last neuron,
        and its neighbours bound it.
        """
        columns = [self.metadata.schema.to_arrow_schema().get_field_index(name) for name in self.key]
        low = np.zeros(self.metadata.num_row_groups, np.int64)
        high, exact = low.copy(), np.ones(len(low), bool)
        for i in range(len(low)):
            group = self.metadata.row_group(i)
            for depth, column in enumerate(columns):
                statistics = group.column(column).statistics
                low[i], high[i] = low[i] << 32 | statistics.min, high[i] << 32 | statistics.max
                exact[i] &= depth == len(columns) - 1 or statistics.min == statistics.max
        first, last = low.copy(), high.copy()
        first[1:] = np.maximum(low[1:], np.where(exact[:-1], high[:-1], low[:-1]))
        last[:-1] = np.minimum(high[:-1], np.where(exact[1:], low[1:], high[1:]))
        return np.maximum.accumulate(first), np.minimum.accumulate(last[::-1])[::-1]

    def _read(self, groups: Sequence[int]) -> list[tuple[pl.DataFrame, np.ndarray]]:
        """Rows and keys of groups; the last few that were read alone are kept: a neuron's neighbour is in the same."""
        with _reading(self.name, self.path):
            # A run that is gone is not answered for.
            if stamp(self.path) != self._stamp:  # rows would be looked for where they were in the file before
                raise RunCorrupt(
                    f"reading the run {self.path.parent}: table {self.name} was written anew while the run was open; "
                    "open it again"
                )
            if not 1 <= len(groups) <= 2:
                return [self._keyed(groups)]
            return [self._group(group) for group in groups]

    def _keyed(self, groups: Sequence[int]) -> tuple[pl.DataFrame, np.ndarray]:
        rows = self._read_groups(groups)
        return _frame(rows), pack(rows, self.key)

    def _read_groups(self, groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        with parquet(self.path, self.metadata) as file:
            return file.read_row_groups(
                groups, columns, use_threads=len(groups) > 2
            )  # one neuron is no work to share

    def find(self, *key: int) -> pl.DataFrame:
        """The rows with exactly this key, in file order."""
        wanted = 0
        for part in key:
            wanted = wanted << 32 | part
        first, last = self.bounds
        groups = range(int(np.searchsorted(last, wanted)), int(np.searchsorted(first, wanted, "right")))
        parts = []
        for rows, keys in self._read(groups):
            start, stop = np.searchsorted(keys, [wanted, wanted + 1]).tolist()
            parts.append(rows.slice(start, stop - start))
        return parts[0] if len(parts) == 1 else pl.concat(parts)

    def pick(self, ids: Sequence[int]) -> pl.DataFrame:
        """The rows whose (single) key is one of `ids`; `QueryError` if one is not there."""
        wanted = _numbers(self.key[0], ids)
        first, last = self.bounds
        hit = np.searchsorted(wanted, first, "left") < np.searchsorted(wanted, last, "right")
        groups, parts = np.flatnonzero(hit).tolist(), []
        for start in range(0, len(groups), 16):  # some at a time: each call costs, and so does memory
            for rows, keys in self._read(groups[start : start + 16]):
                parts.append(rows[np.flatnonzero(np.isin(keys, wanted))])
        found = pl.concat(parts or [rows for rows, _ in self._read([])])
        lost = np.setdiff1d(wanted, found[self.key[0]].to_numpy())
        if len(lost):
            count = self.metadata.num_rows
            raise QueryError(
                f"reading {self.key[0]} {lost[0]}: the run has none of that number; it has {count}"
            )
        return found


def open_run(path: str | Path | Location, named: Place | None = None) -> Run:
    """Open a finished run in a folder or behind a URL, checking that every table is there with the size that the
    manifest says.

    named  what it is called in what is said of it, if not by its path

    `RunMissing` if there is none or it was never finished, `RunCorrupt` if a table is missing or short,
    `RunError` if an older or a newer mnemoscope wrote it, `RemoteError` if a URL cannot be read. `Run.check` reads
    every byte.
    """
    path = place(path)
    check_name(path, "opening the run")
    if isinstance(path, Path) or not path.is_web:  # of which the manifest says why it cannot be read
        if not (kind(path, "opening the run") == "folder" if isinstance(path, Path) else path.sizes):
            raise RunMissing(
                f"opening the run {path}: there is no such folder; make one with `mnemoscope build`"
            )
        if not is_run(path):
            raise RunMissing(f"opening the run {path}: {_unfinished(path)}")
    for left in reversed(range(1 if isinstance(path, Path) else LOOKS)):
        run = Run(
            named or path, read_manifest(path / MANIFEST), path.absolute() if isinstance(path, Path) else path
        )
        if (damage := _damage(run)) is None:
            return run
        if not left:
            raise damage
        path = place(path)  # another run may have taken its place between two looks
    raise AssertionError(LOOKS)


def _damage(run: Run) -> RunCorrupt | None:
    """What is wrong with the first table that is missing, or has another size than the manifest says."""
    for name, entry in run.manifest.tables.items():
        file = run.file(name)
        size = _size(file)
        if size is None:
            return _corrupt(name, file, "is missing")
        if size != entry.bytes:
            return _corrupt(name, file, f"has {size} bytes instead of {entry.bytes}")
    return None


def check_name(path: Place, doing: str) -> None:
    """RunError for a folder whose name, or that of one above it, is not text: Arrow opens none."""
    try:
        str(path if isinstance(path, Location) else path.absolute()).encode()
    except UnicodeEncodeError:
        raise RunError(f"{doing} {path}: the name is not valid UTF-8; rename the folder") from None


def is_run(folder: Place) -> bool:
    """Whether there is a manifest."""
    if isinstance(folder, Path):
        return kind(folder / MANIFEST, "looking for a run at") != ""
    return folder.held(MANIFEST) is not None


def _size(file: Place) -> int | None:
    """Bytes of a file of a run; None if it is not there."""
    if isinstance(file, Location):
        return file.size if file.sha256 else None
    return file.stat().st_size if file.exists() else None


def _unfinished(path: Place) -> str:
    """Why a folder is no run, and what to do."""
    if isinstance(path, Path):
        if any((path / WORK / name).exists() for name in ("plan.json", MANIFEST)):
            return "it was never finished; resume it with the same `mnemoscope build`"
        if (path / WORK).exists():
            return "a build stopped there before it had read its text; begin again with `mnemoscope build`"
    elif any(stored_name(name) for name in path.sizes):
        return "its upload was never finished; give the same command again"
    return f"the folder holds no {MANIFEST}; make a run with `mnemoscope build`"


def read_manifest(path: Place) -> Manifest:
    """Read a manifest, whose tables are those of `SCHEMAS`, with or without `OPTIONAL`; errors as in `open_run`."""
    try:
        content = from_json(path.read_bytes().decode())
        version = content["schema_version"]
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise RunError(f"opening the run {path.parent}: {other_format(version, SCHEMA_VERSION, REBUILD)}")
        manifest = Manifest.model_validate(content)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise RunCorrupt(
            f"opening the run {path.parent}: {MANIFEST} cannot be read ({reason}); restore it"
        ) from error
    if wrong := (manifest.tables.keys() ^ SCHEMAS.keys()) - OPTIONAL.keys():
        odd = ", ".join(sorted(wrong))
        raise RunCorrupt(
            f"opening the run {path.parent}: {MANIFEST} lacks or invents tables ({odd}); restore it"
        )
    return manifest


def uploaded(name: str, entry: TableEntry) -> str:
    """What a table is called behind a URL: by what it holds, so that two runs are never in each other's way."""
    return f"{name}-{entry.sha256[:_HASH]}.parquet"


def stored_name(file: str) -> str | None:
    """The table that a file is called after as `uploaded` does; None if it is not."""
    match = re.fullmatch(rf"(\w+)-[0-9a-f]{{{_HASH}}}\.parquet", file)
    return match[1] if match and match[1] in SCHEMAS else None


class Run:
    """A finished run. Opened with `open_run`.

    path   as it was given, for what is said of it
    place  the same in full: it stays where it is when the process goes to another folder
    """

    def __init__(self, path: Place, manifest: Manifest, at: Place | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.place = at or (path.absolute() if isinstance(path, Path) else path)
        self._tables = {name: _SortedTable(name, self.file(name)) for name in manifest.tables}
        self._lock = Lock()
        self._kept: dict[Hashable, Any] = {}
        self._making: dict[Hashable, RLock] = {}

    def __repr__(self) -> str:
        model, corpus = self.manifest.model, self.manifest.corpus
        size = f"{model.layers} layers of {model.cells.spelled} neurons, {corpus.tokens:,} tokens"
        return f"Run({str(self.path)!r}: {model.id} on {corpus.id}, {size})"

    def file(self, name: str) -> Place:
        """Where a table lies; behind a URL, unless the folder of a run was copied there as it was, under `uploaded`."""
        if isinstance(self.place, Path):
            return self.place / f"{name}.parquet"
        entry = self.manifest.tables[name]
        named = (self.place.held(each) for each in (uploaded(name, entry), f"{name}.parquet"))
        file = next(filter(None, named), None)
        if file is None:
            return self.place / uploaded(name, entry)
        return replace(file, sha256=entry.sha256, size=entry.bytes if file.size < 0 else file.size)

    @property
    def folder(self) -> Path:
        """The folder in which it lies; RunError if that is behind a URL, where runs are only read."""
        return local(self.place, "adding to the run")

    def reopen(self) -> None:
        """Read the manifest again, and with it the tables that a job has added since."""
        self.manifest = open_run(self.place).manifest
        self._tables = {name: _SortedTable(name, self.file(name)) for name in self.manifest.tables}
        self._kept.clear()
        self.__dict__.pop("_database", None)

    def once(self, name: Hashable, read: Callable[[], T]) -> T:
        """What `read` makes of whole tables, made once and kept while the run is open, under that name.

        Threads that ask at once wait for the one that makes it; `read` may ask for something else in turn.
        """
        with self._lock:
            making = self._making.setdefault(name, RLock())
        with making:
            if name not in self._kept:
                self._kept[name] = read()
            kept: T = self._kept[name]
            return kept

    def kept(self, name: Hashable) -> Any:
        """What `once` keeps under a name, or None."""
        return self._kept.get(name)

    def check(self, report: Callable[[Progress], None] | None = None) -> list[Problem]:
        """Read every byte and compare with the manifest; an empty list if all is well."""
        problems, done = list[Problem](), 0
        total = sum(entry.bytes for entry in self.manifest.tables.values())
        for name, entry in self.manifest.tables.items():
            if report is not None:
                report(Progress("checking tables", done, total, "bytes"))
            done += entry.bytes
            file = self.file(name)
            if _size(file) is None:
                problems.append(Problem(name, "is missing"))
            elif (sha256(file) if isinstance(file, Path) else file.fetch()) != entry.sha256:
                problems.append(Problem(name, "is not the file that was written (sha256 differs)"))
            elif parquet(file).metadata.num_rows != entry.rows:
                problems.append(Problem(name, f"does not have the {entry.rows} rows that the manifest says"))
        if report is not None:
            report(Progress("checking tables", total, total, "bytes"))
        return problems

    def _sorted(self, name: str, key: tuple[str, ...] | None = None) -> _SortedTable:
        known = [table for table in self._tables if key is None or KEYS[table] == key]
        if name in OPTIONAL and name not in self._tables:
            raise QueryError(f"reading table {name!r}: the run {self.path} has none; {OPTIONAL[name]}")
        if name not in known:
            raise QueryError(f"reading table {name!r}: there is none such; choose one of {', '.join(known)}")
        return self._tables[name]

    def address(self, layer: int, neuron: int) -> NeuronId:
        """Check an address against this run; `QueryError` if it is out of range."""
        model = self.manifest.model
        address = model.cells.id(int(layer), int(neuron))
        if not model.cells.has(layer, neuron):
            raise QueryError(
                f"looking up {address}: out of range; {model.id} has {model.cells.range_of(layer)}"
            )
        return address

    def check_neurons(self, doing: str) -> None:
        """QueryError where the run holds other units than neurons; ``doing`` begins its line."""
        units = self.manifest.model.units
        check_neurons(None if units is None else units.id, f"{doing} {self.path}")

    def parse(self, text: str) -> NeuronId:
        """The address that a text is, in this run; `QueryError` if it is none, or out of range."""
        return self.address(*self.manifest.model.cells.parse(text))

    def table(self, name: str) -> pl.LazyFrame:
        """A whole table, lazily."""
        table = self._sorted(name)
        if isinstance(table.path, Location):
            return pl.scan_pyarrow_dataset(table.dataset)
        return pl.scan_parquet(table.path, glob=False)

    def rows(self, name: str, layer: int, neuron: int) -> pl.DataFrame:
        """The rows of one neuron in a table keyed by (layer, neuron), in file order; fast at any size."""
        table = self._sorted(name, ("layer", "neuron"))
        return table.find(*self.address(layer, neuron))

    def columns(self, name: str, layer: int, neuron: int) -> dict[str, list[Any]]:
        """The same as a list for each column: of few rows each is read sooner so."""
        return self.rows(name, layer, neuron).to_dict(as_series=False)

    def by_token(self, token: int, polarity: int = 1) -> pl.DataFrame:
        """Neurons whose value promotes (+1) or suppresses (-1) a token: rows of `values`, strongest first."""
        size = self.manifest.model.vocabulary
        if not 0 <= token < size or polarity not in (1, -1):
            raise QueryError(
                f"looking up token {token} with polarity {polarity}: tokens are 0 to {size - 1}, "
                "polarity is 1 or -1"
            )
        rows = self._tables["values_by_token"].find(int(token))
        return rows.filter(pl.col("polarity") == polarity)

    def contexts(self, ids: Sequence[int]) -> dict[int, StoredContext]:
        """Contexts by id, in ascending order; `QueryError` if there is no such context."""
        written: WholeText | None = self.kept(TEXT)
        wanted = _numbers("context", ids)
        if written is not None and (numbers := written.rows(wanted)) is not None:
            stored = (StoredContext(*context) for context in written.written(numbers))
            return dict(zip(wanted.tolist(), stored, strict=True))
        rows = self._tables["contexts"].pick(ids)
        return {
            context: StoredContext(document, start, tokens.to_numpy())
            for context, document, start, tokens in zip(*rows.get_columns(), strict=True)
        }

    def documents(self, ids: Sequence[int]) -> dict[int, StoredDocument]:
        """Documents by id, in ascending order; `QueryError` if there is no such document."""
        rows = self._tables["documents"].pick(ids).to_dicts()
        return {row["document"]: StoredDocument(row["title"], json.loads(row["metadata"])) for row in rows}

    def titles(self, ids: Sequence[int]) -> dict[int, str | None]:
        """The titles of documents by id; `QueryError` if there is no such document."""
        rows = self._tables["documents"].pick(ids)
        return dict(zip(rows["document"].to_list(), rows["title"].to_list(), strict=True))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes, and which of them are special."""
        table = self._tables["vocabulary"]
        with _reading("vocabulary", table.path):
            rows = table._read_groups(range(table.metadata.num_row_groups), ["bytes", "special"])
        return Vocabulary(rows["bytes"].to_pylist(), rows["special"].to_pylist())

    def sql(
        self,
        query: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        most: int | None = None,
        seconds: float | None = None,
    ) -> pl.DataFrame:
        """Answer one SELECT over the tables with DuckDB; no other statement, and no other file, is allowed.

        most     rows of the answer, at most; and then no more than `MOST_BYTES`
        seconds  that it may take

        What no frame holds comes as text: intervals, unions, bits, and dates, which may be infinite; no table has any.
        `QueryError` with DuckDB's own words if the query is wrong, or takes longer.
        """
        import duckdb

        cursor = self._cursor()
        try:
            statements = duckdb.extract_statements(query)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                raise QueryError("running SQL on a run: a run is read only; give one SELECT statement")
            with _interrupting(cursor, seconds):
                answer = _as_text(cursor.sql(query, params=parameters))
                rows = pa.table(answer if most is None else answer.limit(most))
            if most is not None and rows.nbytes > MOST_BYTES:
                raise QueryError(
                    f"running SQL on a run: the answer has {rows.nbytes >> 20:,} MB, and {MOST_BYTES >> 20} are shown; "
                    "ask for less, or use `run.sql` in Python"
                )
            return _frame(rows)
        except duckdb.InterruptException as error:
            raise QueryError(
                f"running SQL on a run: it took longer than {seconds:g} seconds; ask for less, or use `run.sql` in "
                "Python"
            ) from error
        except duckdb.Error as error:
            outside = isinstance(error, duckdb.PermissionException)  # a file that the query named itself
            for name, table in self._tables.items() if not outside else ():
                if str(table.path.resolve()) in str(error):
                    raise _corrupt(
                        name, table.path, f"cannot be read ({str(error).splitlines()[0]})"
                    ) from error
            raise QueryError(f"running SQL on a run: {' '.join(str(error).split())}") from error

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            return self._database.cursor()

    @cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        database = duckdb.connect(config=OFFLINE)
        for option in ("enable_external_access", "python_enable_replacements"):
            database.execute(f"set {option} = false")
        for name, table in self._tables.items():
            database.from_arrow(table.dataset).create_view(name)
        database.execute("set lock_configuration = true")
        return database


def _numbers(name: str, ids: Sequence[int]) -> np.ndarray:
    """i64, ascending: each of some numbers once; `QueryError` where 64 bits do not hold one."""
    try:
        return np.unique(np.asarray(ids, np.int64))
    except OverflowError as error:
        raise QueryError(f"reading {name} {max(ids, key=abs)}: the run has none of that number") from error


def _as_text(answer: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """An answer, as text where no frame can hold it."""
    odd = [_ODD.search(str(kind)) is not None for kind in answer.types]
    if not any(odd):
        return answer
    columns: list[str] = []
    for number, (name, text) in enumerate(zip(answer.columns, odd, strict=True)):
        before = answer.columns[:number].count(name)
        alias = f"{name}_{before}" if before else name
        columns.append(
            f'#{number + 1}{"::varchar" if text else ""} as "{alias.replace(chr(34), 2 * chr(34))}"'
        )
    return answer.project(", ".join(columns))


@contextmanager
def _interrupting(cursor: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """Interrupt what the cursor does in the block after so long."""
    if seconds is None:
        yield
        return
    timer = Timer(seconds, cursor.interrupt)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _frame(rows: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    return frame
