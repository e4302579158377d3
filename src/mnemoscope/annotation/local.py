"""What people write beside a run: one SQLite file, in which an answer or a note is safe as soon as it is taken.

The run itself is only read. The file is made with the first thing that is written; it says which run it belongs to, and
is refused beside any other. It is in WAL mode: a process that is killed loses what it had not yet written, and nothing
else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from mnemoscope.errors import SheetError
from mnemoscope.location import Place
from mnemoscope.records import other_format

FORMAT = 1
ENDING = ".annotations.sqlite"
PATIENCE = 10.0  # seconds to wait for another process that writes
_OURS = 0x6D6E656D  # "mnem": tells this file from other SQLite files
_TABLES = """
create table about (run text not null);
create table sheets (sheet text primary key, lines text not null, key text not null, made text not null, closed text);
create table annotators (
  sheet text not null, annotator text not null, unsealed text, unfinished integer, primary key (sheet, annotator)
);
create table answers (
  sheet text not null, annotator text not null, item text not null, patterns text, applies text,
  state integer not null, version integer not null, saved text not null, primary key (sheet, annotator, item)
);
create table notes (
  layer integer not null, neuron integer not null, note text not null, version integer not null, saved text not null,
  primary key (layer, neuron)
);
"""


def beside(run: Place, folder: Path | None = None) -> Path:
    """The file of a run: beside its folder (in the current one if that is behind a URL), or under the same name in
    another one."""
    run = run.resolve()
    if folder is None:
        folder = run.parent if isinstance(run, Path) else Path.cwd()
    return folder / f"{run.name}{ENDING}"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class LocalFile:
    """The file `path` of the run with that fingerprint (`annotation.sheet.fingerprint`)."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self._run = path, run
        self._writing = Lock()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read from; to an empty file in memory while nothing was written.

        `SheetError` if the file is another run's, or cannot be read.
        """
        there = self.path.exists() and self.path.stat().st_size > 0
        with self._connected("reading", str(self.path) if there else ":memory:") as connection:
            if there:
                self._check(connection)
            else:
                self._fill(connection)
            connection.execute("begin")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection to write with: all that is done with it, or nothing if the block fails.

        `SheetError` if the file is another run's, or cannot be written to.
        """
        with self._writing, self._connected("writing to", str(self.path)) as connection:
            connection.execute("begin immediate")
            if not _tables(connection):
                self._fill(connection)
            self._check(connection)
            connection.execute("commit")
            with suppress(sqlite3.OperationalError):  # while another process writes: it has set the mode
                connection.execute("pragma journal_mode=wal")
            connection.execute("pragma synchronous=full")
            connection.execute("begin immediate")
            yield connection
            connection.execute("commit")

    @contextmanager
    def _connected(self, doing: str, name: str) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(name, timeout=PATIENCE, isolation_level=None)) as connection:
                connection.row_factory = sqlite3.Row
                yield connection
        except sqlite3.Error as error:
            raise SheetError(
                f"{doing} {self.path}: {error}; restore the file or move it away, or give another folder to "
                "`mnemoscope serve` with --annotations"
            ) from error

    def _fill(self, connection: sqlite3.Connection) -> None:
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute("insert into about values (?)", (self._run,))
        connection.execute(f"pragma application_id={_OURS}")
        connection.execute(f"pragma user_version={FORMAT}")

    def _check(self, connection: sqlite3.Connection) -> None:
        def pragma(name: str) -> int:
            return int(connection.execute(f"pragma {name}").fetchone()[0])

        doing = f"reading {self.path}"
        if pragma("application_id") != _OURS:
            raise SheetError(f"{doing}: it is not a file of annotations; move it away")
        if (version := pragma("user_version")) != FORMAT:
            raise SheetError(f"{doing}: {other_format(version, FORMAT, 'move it away')}")
        if connection.execute("select run from about").fetchone()[0] != self._run:
            raise SheetError(
                f"{doing}: what was written there is about another run; move it away, or give another folder to "
                "`mnemoscope serve` with --annotations"
            )


def _tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("select count(*) from sqlite_master").fetchone()[0])
