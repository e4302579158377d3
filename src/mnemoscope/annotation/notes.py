"""Notes on neurons: a few words of one's own, kept in the local file of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnemoscope.annotation.local import LocalFile, now
from mnemoscope.errors import SheetError
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LENGTH = 4_000  # letters of a note


@dataclass(frozen=True)
class Note:
    """What was written about a neuron.

    version  how often it was saved; 0: there is none
    """

    neuron: NeuronId
    note: str
    version: int
    saved: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"neuron": str(self.neuron), "note": self.note, "version": self.version, "saved": self.saved}


class Notes:
    """The notes on the neurons of a run in its local file."""

    def __init__(self, file: LocalFile, run: Run) -> None:
        self.file, self._run = file, run

    def __getitem__(self, address: NeuronId) -> Note:
        notes = self._read("and layer = ? and neuron = ?", *address)
        return notes[0] if notes else Note(address, "", 0, None)

    def listed(self) -> list[Note]:
        """All notes, the latest first."""
        return self._read("and note != '' order by saved desc, rowid desc")

    def having(self, text: str) -> list[Note]:
        """Notes that have this text in them, capitals or not."""
        return [note for note in self.listed() if text.casefold() in note.note.casefold()]

    def save(self, address: NeuronId, text: str, version: int) -> Note:
        """Keep a note in the place of the one that was saved `version` times; an empty one is none.

        `SheetError` if another was saved since.
        """
        with self.file.writing() as connection:
            row = connection.execute(
                "select note, version from notes where layer = ? and neuron = ?", tuple(address)
            ).fetchone()
            kept, last = (row["note"], row["version"]) if row else ("", 0)
            if kept != text:
                if last != version:
                    raise SheetError(
                        f"saving the note on {address}: it was changed in another window since; reload the page"
                    )
                connection.execute(
                    "insert or replace into notes values (?, ?, ?, ?, ?)", (*address, text, last + 1, now())
                )
        return self[address]

    def _read(self, where: str, *values: int) -> list[Note]:
        with self.file.reading() as connection:
            rows = connection.execute(f"select * from notes where true {where}", values).fetchall()
        cells = self._run.manifest.model.cells
        return [
            Note(cells.id(row["layer"], row["neuron"]), row["note"], row["version"], row["saved"])
            for row in rows
        ]
