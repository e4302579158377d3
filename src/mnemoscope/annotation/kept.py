"""Sheets that are filled in bit by bit: each annotator in an order of one's own, the key sealed until it is scored.

    sheets = KeptSheets(LocalFile(beside(run.path), fingerprint(run)), run)
    name = sheets.make()
    item = sheets.item(name, "anna", 3)                                   # the third one that anna sees
    sheets.save(item.answered([{"description": "months", "indices": [1, 4, 9], "kind": "semantic"}], None))
    sheets.unseal(name, "anna")                                           # no answer of hers is taken from now on
    sheets.scores(name)                                                   # of all whose seal is open

What is written is a sheet of `annotation.sheet` and answers to it: they are judged, exported and scored as a file is.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sqlite3 import Connection, Row
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemoscope.annotation import answers, sheet
from mnemoscope.annotation.key import Key, digest, parse_key
from mnemoscope.annotation.local import LocalFile, now
from mnemoscope.errors import SheetError

if TYPE_CHECKING:
    from mnemoscope.annotation.scores import Scores
    from mnemoscope.run.reading import Run

HALVES = ("annotate", "apply")
NAME = 60  # letters of an annotator's name
DIGITS = 12  # of a sheet's commitment, by which it is called
OPEN, DESCRIBED, FINISHED = range(
    3
)  # states of an answer: no valid one, its patterns, and where they apply, too


class KeptLines(NamedTuple):
    """A sheet as it was written: its name, its lines without answers by item, and its key."""

    name: str
    header: dict[str, Any]
    lines: dict[str, dict[str, Any]]
    key: Key

    def order(self, annotator: str) -> list[str]:
        """Items in the order in which this annotator sees them."""
        return sorted(self.lines, key=lambda item: digest([self.header["commitment"], annotator, item]))

    def filled(self, annotator: str, said: dict[str, Row]) -> list[dict[str, Any]]:
        """The lines with one annotator's valid answers; what is not valid yet is left open."""
        lines = [{**self.header, "annotator": annotator}]
        for name, line in self.lines.items():
            row = said.get(name)
            lines.append({**line, **_answer(None if row is None or row["state"] == OPEN else row)})
        return lines


@dataclass(frozen=True)
class AnnotatorProgress:
    """How far an annotator is: items finished; `unsealed` when, and how many were not finished then."""

    annotator: str
    finished: int
    unsealed: str | None
    unfinished: int | None


@dataclass(frozen=True)
class KeptSheet:
    """What may be said of a sheet before it is scored."""

    sheet: str
    items: int
    prefixes: int
    made: str
    closed: str | None
    annotators: tuple[AnnotatorProgress, ...]


@dataclass(frozen=True)
class ShownItem:
    """One item as an annotator sees it, with what was answered so far.

    number    1-based, in the annotator's own order, of `of`
    patterns  as they were typed, valid or not; None: nothing yet
    version   how often the answer was saved: an answer to an older one is refused
    problem   why the answer is not valid yet; "" if it is, or if there is none
    """

    sheet: str
    annotator: str
    number: int
    of: int
    annotate: dict[str, str]
    apply: dict[str, str]
    patterns: list[dict[str, Any]] | None
    applies: list[int] | None
    version: int
    state: int
    problem: str = ""

    def answered(
        self, patterns: list[dict[str, Any]] | None, applies: list[int] | None, version: int | None = None
    ) -> ShownItem:
        """The same with another answer, to this version of it or to an older one."""
        version = self.version if version is None else version
        return replace(self, patterns=patterns, applies=applies, version=version)


class KeptSheets:
    """The sheets of a run in its local file."""

    def __init__(self, file: LocalFile, run: Run) -> None:
        self.file, self._run = file, run
        self._written: dict[str, KeptLines] = {}

    def listed(self) -> list[KeptSheet]:
        """All sheets, the newest first."""
        with self.file.reading() as connection:
            rows = connection.execute("select sheet, made, closed from sheets order by made desc, rowid desc")
            return [self._said(connection, row) for row in rows.fetchall()]

    def make(self, *, neurons: int, prefixes: int, seed: int | None = None) -> str:
        """Draw a sheet from the run, and seal its key; its name. Errors as of `sheet.make`."""
        (header, *lines), key = sheet.make(self._run, neurons=neurons, prefixes=prefixes, seed=seed)
        with self.file.writing() as connection:
            return self._keep(connection, [header, *lines], key)

    def item(self, name: str, annotator: str, number: int | None = None) -> ShownItem | None:
        """One item of an annotator, by its place in the own order; without one the first that is not finished, or None.

        `SheetError` for a sheet or a place that there is not.
        """
        annotator = checked_name(annotator)
        with self.file.reading() as connection:
            written = self._open(connection, name)
            said, order = _said_of(connection, written.name, annotator), written.order(annotator)
        if number is None:
            number = _next(order, said, 0)
        return None if number is None else self._item(written, annotator, number, order, said)

    def save(self, item: ShownItem) -> tuple[ShownItem, int | None]:
        """Keep an answer, valid or not; it as it was kept, and the number of the next item that is not finished.

        `SheetError` if the answer is of no such item, names prefixes that are not there, was changed elsewhere since
        `item.version`, or if the annotator's answers are closed.
        """
        with self.file.writing() as connection:
            written = self._open(connection, item.sheet)
            doing = f"saving item {item.number} of {item.annotator}"
            _check_open(connection, written.name, item.annotator, doing)
            said, order = _said_of(connection, written.name, item.annotator), written.order(item.annotator)
            kept = self._item(written, item.annotator, item.number, order, said)
            if (kept.patterns, kept.applies) != (item.patterns, item.applies):
                if kept.version != item.version:
                    raise SheetError(f"{doing}: it was changed in another window since; reload the page")
                state, _ = self._judge(written, order[item.number - 1], item)
                _check_numbers(doing, item)
                _write(connection, written.name, item.annotator, order[item.number - 1], item, state)
                said = _said_of(connection, written.name, item.annotator)
                kept = self._item(written, item.annotator, item.number, order, said)
            return kept, _next(order, said, item.number)

    def unseal(self, name: str, annotator: str) -> int:
        """Close an annotator's answers so that they are scored; how many items were not finished.

        `SheetError` if nothing was answered.
        """
        annotator = checked_name(annotator)
        with self.file.writing() as connection:
            written = self._open(connection, name)
            self._filled(connection, written, annotator)
            return _unseal(connection, written, annotator)

    def close(self, name: str) -> None:
        """End the work on a sheet: everybody's answers are closed, nobody begins, and the key may be read."""
        with self.file.writing() as connection:
            written = self._open(connection, name)
            for progress in _progress(connection, written.name):
                _unseal(connection, written, progress.annotator)
            connection.execute(
                "update sheets set closed = coalesce(closed, ?) where sheet = ?", (now(), written.name)
            )

    def text(self, name: str, annotator: str = "") -> str:
        """The sheet as `mnemoscope annotate` writes it, with an annotator's valid answers, or with nobody's."""
        with self.file.reading() as connection:
            written = self._open(connection, name)
            said = _said_of(connection, written.name, checked_name(annotator)) if annotator else {}
        return sheet.spell(written.filled(annotator, said))

    def key_text(self, name: str) -> str:
        """The key of a sheet that was closed, as `mnemoscope annotate` writes it; `SheetError` while it is sealed."""
        with self.file.reading() as connection:
            written = self._open(connection, name)
            (closed,) = connection.execute(
                "select closed from sheets where sheet = ?", (written.name,)
            ).fetchone()
        if closed is None:
            raise SheetError(
                f"reading the key of {written.name}: it is sealed; close the sheet for everybody first"
            )
        return f"{written.key.model_dump_json(indent=1)}\n"

    def add(self, file: str, text: str, key: str = "") -> tuple[str, str]:
        """Take a sheet that `mnemoscope annotate` wrote: its name, and the annotator whose answers it had, or "".

        file  its name, which is the annotator's where the sheet names none
        key   of a sheet that is not known yet

        `SheetError` for whatever `annotate score` would refuse, and for an annotator who has answers already;
        `RunMismatch` for a sheet of another run.
        """
        path = Path(file or "the sheet")
        lines = answers.parse(path, text)
        with self.file.writing() as connection:
            name = str(lines[0]["commitment"])[:DIGITS]
            known = connection.execute("select key from sheets where sheet = ?", (name,)).fetchone()
            if not (known or key):
                raise SheetError(
                    f"reading {path}: its key is not known here; give the key that was written beside it"
                )
            key_path = Path(str(lines[0].get("key")))
            opened = parse_key(key_path, known["key"] if known else key)
            answers.check_key(path, lines, key_path, opened)
            answers.check_run(path, opened, self._run)
            filled = answers.fill(path, lines, opened)
            if not filled.answers:
                raise SheetError(f"reading {path}: it has no items; give a sheet of `mnemoscope annotate`")
            if not known:
                self._keep(connection, lines, opened)
            annotator = checked_name(filled.annotator) if filled.answered else ""
            if annotator:
                self._take(connection, self._open(connection, name), annotator, lines[1:], path)
            return name, annotator

    def scores(self, name: str) -> Scores | None:
        """The scores of all whose seal is open, as `annotate score` would give them; None while there is nobody."""
        from mnemoscope.annotation.scores import score

        with self.file.reading() as connection:
            written = self._open(connection, name)
            unsealed = [who for who in _progress(connection, written.name) if who.unsealed]
            filled = [self._filled(connection, written, who.annotator) for who in unsealed]
        # Closed answers change no more: the same people have the same scores.
        kept = ("scores", self.file.path, written.name, *unsealed)
        return self._run.once(kept, lambda: score(written.key, filled)) if filled else None

    # -- inside ---------------------------------------------------------------------------------------------------

    def _keep(self, connection: Connection, lines: list[dict[str, Any]], key: Key) -> str:
        header, *rows = lines
        name = str(header["commitment"])[:DIGITS]
        bare = [{**row, "patterns": None, "applies": None} for row in rows]
        header = {**header, "annotator": "", "key": header["key"] or f"{self._run.path.name}-{name}.key.json"}
        values = (name, sheet.spell([header, *bare]), key.model_dump_json(), now())
        connection.execute("insert into sheets (sheet, lines, key, made) values (?, ?, ?, ?)", values)
        return name

    def _open(self, connection: Connection, name: str) -> KeptLines:
        row = connection.execute("select sheet, lines, key from sheets where sheet = ?", (name,)).fetchone()
        if row is None:
            raise SheetError(
                f"opening the sheet {name!r}: there is none of that name beside the run; make one"
            )
        if name not in self._written:
            header, *lines = answers.parse(self.file.path, row["lines"])
            key = parse_key(self.file.path, row["key"])
            self._written[name] = KeptLines(name, header, {line["item"]: line for line in lines}, key)
        return self._written[name]

    def _said(self, connection: Connection, row: Row) -> KeptSheet:
        lines = self._open(connection, row["sheet"]).lines
        prefixes = len(next(iter(lines.values()))["annotate"])
        progress = tuple(_progress(connection, row["sheet"]))
        return KeptSheet(row["sheet"], len(lines), prefixes, row["made"], row["closed"], progress)

    def _item(
        self, written: KeptLines, annotator: str, number: int, order: Sequence[str], said: dict[str, Row]
    ) -> ShownItem:
        if not 1 <= number <= len(order):
            raise SheetError(f"opening item {number}: the sheet {written.name} has items 1 to {len(order)}")
        line, row = written.lines[order[number - 1]], said.get(order[number - 1])
        item = ShownItem(
            written.name, annotator, number, len(order), line["annotate"], line["apply"],
            **_answer(row),
            version=row["version"] if row else 0, state=row["state"] if row else OPEN,
        )  # fmt: skip
        return replace(item, problem=self._judge(written, order[number - 1], item)[1])

    def _judge(self, written: KeptLines, name: str, item: ShownItem) -> tuple[int, str]:
        """The state of an answer, and why it is not valid."""
        line = {**written.lines[name], "patterns": item.patterns, "applies": item.applies}
        try:
            answer = answers.read_answer(f"item {item.number}", line, written.key.items[name])
        except SheetError as error:
            return OPEN, str(error)
        if answer.patterns is None:
            return OPEN, ""
        return FINISHED if answer.patterns == () or answer.applies is not None else DESCRIBED, ""

    def _filled(self, connection: Connection, written: KeptLines, annotator: str) -> answers.Filled:
        lines = written.filled(annotator, _said_of(connection, written.name, annotator))
        filled = answers.fill(Path(annotator), lines, written.key)
        if not filled.answered:
            raise answers.nothing_answered(Path(annotator))
        return filled

    def _take(
        self,
        connection: Connection,
        written: KeptLines,
        annotator: str,
        rows: Sequence[dict[str, Any]],
        path: Path,
    ) -> None:
        """Keep the answers of a filled sheet."""
        doing = f"reading {path}"
        _check_open(connection, written.name, annotator, doing)
        if _said_of(connection, written.name, annotator):
            raise SheetError(
                f"{doing}: {annotator} has answers to this sheet already; change `annotator` in its first line"
            )
        for number, row in enumerate(rows, 1):
            if row.get("patterns") is not None:
                item = ShownItem(
                    written.name,
                    annotator,
                    number,
                    len(rows),
                    {},
                    {},
                    row["patterns"],
                    row.get("applies"),
                    0,
                    OPEN,
                )
                state, _ = self._judge(written, row["item"], item)
                _write(connection, written.name, annotator, row["item"], item, state)


def checked_name(annotator: str) -> str:
    """An annotator's name without what surrounds it; `SheetError` if it is none."""
    name = unicodedata.normalize("NFC", annotator).strip()
    if not (0 < len(name) <= NAME and name.isprintable()):
        raise SheetError(f"annotating as {annotator[:80]!a}: give a name of 1 to {NAME} letters")
    return name


def _check_numbers(doing: str, item: ShownItem) -> None:
    """An answer that is not valid yet names prefixes that are there."""
    for numbers, half in ((pattern["indices"], item.annotate) for pattern in item.patterns or ()):
        answers.read_numbers(doing, "indices", numbers, len(half))
    answers.read_numbers(doing, "applies", item.applies or [], len(item.apply))


def _check_open(connection: Connection, name: str, annotator: str, doing: str) -> None:
    row = connection.execute("select closed from sheets where sheet = ?", (name,)).fetchone()
    if row["closed"]:
        raise SheetError(f"{doing}: the sheet {name} was closed at {row['closed']}; make another one")
    row = connection.execute(
        "select unsealed from annotators where sheet = ? and annotator = ?", (name, annotator)
    ).fetchone()
    if row and row["unsealed"]:
        raise SheetError(f"{doing}: the answers were closed at {row['unsealed']}, when they were scored")


def _said_of(connection: Connection, name: str, annotator: str) -> dict[str, Row]:
    """An annotator's answers by item."""
    rows = connection.execute(
        "select item, patterns, applies, state, version from answers where sheet = ? and annotator = ?",
        (name, annotator),
    )
    return {row["item"]: row for row in rows}


def _answer(row: Row | None) -> dict[str, Any]:
    names = ("patterns", "applies")
    return {name: None if row is None or row[name] is None else json.loads(row[name]) for name in names}


def _write(
    connection: Connection, name: str, annotator: str, item: str, answer: ShownItem, state: int
) -> None:
    said = (None if value is None else json.dumps(value) for value in (answer.patterns, answer.applies))
    connection.execute(
        "insert into annotators (sheet, annotator) values (?, ?) on conflict do nothing", (name, annotator)
    )
    connection.execute(
        "insert or replace into answers (sheet, annotator, item, patterns, applies, state, version, saved) "
        "values (?, ?, ?, ?, ?, ?, ?, ?)",
        (name, annotator, item, *said, state, answer.version + 1, now()),
    )


def _next(order: Sequence[str], said: dict[str, Row], after: int) -> int | None:
    """The number of the first item after another that is not finished, around the end; None if all are."""
    numbers = [*range(after + 1, len(order) + 1), *range(1, after + 1)]
    unfinished = (n for n in numbers if order[n - 1] not in said or said[order[n - 1]]["state"] < FINISHED)
    return next(unfinished, None)


def _progress(connection: Connection, name: str) -> list[AnnotatorProgress]:
    rows = connection.execute(
        "select annotator, unsealed, unfinished, (select count(*) from answers where answers.sheet = annotators.sheet "
        f"and answers.annotator = annotators.annotator and state = {FINISHED}) as finished "
        "from annotators where sheet = ? order by rowid",
        (name,),
    )
    return [
        AnnotatorProgress(row["annotator"], row["finished"], row["unsealed"], row["unfinished"])
        for row in rows
    ]


def _unseal(connection: Connection, written: KeptLines, annotator: str) -> int:
    """Close the answers unless they are; how many items were not finished then."""
    (progress,) = (who for who in _progress(connection, written.name) if who.annotator == annotator)
    if progress.unsealed is None:
        connection.execute(
            "update annotators set unsealed = ?, unfinished = ? where sheet = ? and annotator = ?",
            (now(), len(written.lines) - progress.finished, written.name, annotator),
        )
        return len(written.lines) - progress.finished
    return progress.unfinished or 0
