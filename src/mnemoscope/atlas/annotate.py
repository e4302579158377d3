"""Pages on which people write: blinded sheets with their scores, and notes on neurons.

Whatever is written goes into one local file beside the run (`annotation.local`), never into the run.
"""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mnemoscope.annotation import kept
from mnemoscope.annotation.answers import KINDS
from mnemoscope.annotation.notes import LENGTH
from mnemoscope.atlas.library import Shelf
from mnemoscope.atlas.site import Answer, Site, Words, put_change, put_data, put_hidden
from mnemoscope.errors import SheetError

_STATES = ("open", "described", "finished")


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """JSON can spell half a letter, which no file can hold."""
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("there is half a letter in it")
        return value


class SheetSize(_Sent):
    """Of a new sheet: neurons besides its nulls, and prefixes in each half of an item."""

    neurons: Annotated[int, Field(le=400)] = 40
    prefixes: Annotated[int, Field(le=100)] = 25


class TypedPattern(_Sent):
    """A pattern as it is being typed: nothing of it need be there yet."""

    description: Annotated[str, Field(max_length=1000)]
    indices: Annotated[list[int], Field(max_length=200)]
    kind: Literal[*KINDS]  # type: ignore[valid-type]


class TypedAnswer(_Sent):
    """An answer to the item that is the annotator's so manieth; `version` is that of the answer which it follows."""

    sheet: str
    annotator: str
    item: int
    patterns: Annotated[list[TypedPattern], Field(max_length=50)] | None
    applies: Annotated[list[int], Field(max_length=400)] | None
    version: int


class AnnotatorOf(_Sent):
    """One annotator of a sheet."""

    sheet: str
    annotator: str


class SheetNamed(_Sent):
    """One sheet."""

    sheet: str


class FilledFile(_Sent):
    """A sheet that `mnemoscope annotate` wrote, as text; its key, if it is not known here; the name of its file."""

    text: str
    key: str = ""
    file: str = ""


class TypedNote(_Sent):
    """A note in the place of the one of that version."""

    note: Annotated[str, Field(max_length=LENGTH)]
    version: int


def add_annotation(app: FastAPI, site: Site) -> None:
    """Put the pages under their addresses."""
    _add_sheets(app, site)
    _add_answers(app, site)
    _add_files(app, site)
    _add_notes(app, site)


def _sheets(shelf: Shelf) -> kept.KeptSheets:
    """The sheets of a run, and what was answered."""
    return shelf.run.once(("sheets", shelf.file.path), lambda: kept.KeptSheets(shelf.file, shelf.run))


def _add_sheets(app: FastAPI, site: Site) -> None:
    library = site.library

    @site.put(app, "/runs/{run}/annotate", light=True)
    def annotate(
        run: str, sheet: Words = "", annotator: Words = "",
        item: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
        half: Annotated[str, Query(pattern=f"^({'|'.join(kept.HALVES)})$")] = "annotate",
    ) -> Answer:  # fmt: skip
        """Blinded sheets: those of the run, or one item of an annotator, by its place in the own order."""
        shelf = library[run]
        sheets = _sheets(shelf).listed()
        shown: dict[str, Any] = {"shelf": shelf, "sheets": sheets}
        if not annotator.strip():
            return Answer("annotate.html", lambda: {"sheets": [asdict(each) for each in sheets]}, shown)
        sheet = sheet or next((each.sheet for each in sheets), "")
        asked = _sheets(shelf).item(sheet, annotator, item)
        of = next(each for each in sheets if each.sheet == sheet)
        name = kept.checked_name(annotator)
        progress = next((each for each in of.annotators if each.annotator == name), None)
        closed = of.closed or (progress and progress.unsealed)
        shown |= {"of": of, "annotator": name, "item": asked, "half": half, "closed": closed}
        if half == "apply" and asked and not (asked.patterns and asked.state > kept.OPEN):
            raise SheetError(f"reading on in item {asked.number}: say first what its prefixes have in common")
        return Answer("annotate_item.html", lambda: _item(asked, half), shown, written=True)

    def make(run: str, size: SheetSize) -> dict[str, Any]:
        """Draw a blinded sheet from the run; its key stays here."""
        shelf = library[run]
        return {"sheet": _sheets(shelf).make(neurons=size.neurons, prefixes=size.prefixes)}

    put_change(app, "/runs/{run}/annotate/sheets.json", make)

    def close(run: str, given: SheetNamed) -> dict[str, Any]:
        """End the work on a sheet: nobody's answers can be changed any more, and its key can be read."""
        _sheets(library[run]).close(given.sheet)
        return {"sheet": given.sheet}

    put_change(app, "/runs/{run}/annotate/close.json", close)


def _item(asked: kept.ShownItem | None, half: str) -> dict[str, Any]:
    if asked is None:
        return {"item": None}
    data = {name: value for name, value in asdict(asked).items() if name not in kept.HALVES}
    return {**data, "state": _STATES[asked.state], half: getattr(asked, half)}


def _add_answers(app: FastAPI, site: Site) -> None:
    library = site.library

    def save(run: str, given: TypedAnswer) -> dict[str, Any]:
        """Keep an answer, whether it is whole already or not; what it lacks, and which item is next."""
        sheets = _sheets(library[run])
        before = sheets.item(given.sheet, given.annotator, given.item)
        assert before is not None
        patterns = given.model_dump()["patterns"]
        after, following = sheets.save(before.answered(patterns, given.applies, given.version))
        return {
            "version": after.version, "state": _STATES[after.state], "problem": after.problem, "next": following,
        }  # fmt: skip

    put_change(app, "/runs/{run}/annotate/answers.json", save, light=True)  # what is typed waits for nothing

    @site.put(app, "/runs/{run}/annotate/scores")
    def scores(run: str, sheet: Words = "") -> Answer:
        """The scores of all whose seal is open, and their agreement; of the others, how far they are."""
        shelf = library[run]
        sheets = _sheets(shelf).listed()
        of = next((each for each in sheets if each.sheet == (sheet or sheets[0].sheet)), None)
        if of is None:
            raise SheetError(
                f"opening the scores of the sheet {sheet!r}: there is none of that name; make one first"
            )
        scored = _sheets(shelf).scores(of.sheet)
        shown = {"shelf": shelf, "of": of, "scores": scored and site.inside(scored, shelf)}
        return Answer(
            "annotate_scores.html", lambda: {**asdict(of), "scores": scored and scored.to_dict()}, shown
        )

    def unseal(run: str, given: AnnotatorOf) -> dict[str, Any]:
        """Close an annotator's answers, so that they are scored."""
        return {"unfinished": _sheets(library[run]).unseal(given.sheet, given.annotator)}

    put_change(app, "/runs/{run}/annotate/unseal.json", unseal)


def _add_files(app: FastAPI, site: Site) -> None:
    library = site.library

    def sheet_file(run: str, sheet: Words, annotator: Words = "") -> Response:
        """The sheet with one annotator's answers, or with none, as `mnemoscope annotate` writes it."""
        shelf = library[run]
        name = "-".join(word for word in (shelf.name, sheet, annotator.strip()) if word)
        return _download(_sheets(shelf).text(sheet, annotator), f"{name}.jsonl")

    put_hidden(app, "/runs/{run}/annotate/sheet", sheet_file, sheet_file)

    def key_file(run: str, sheet: Words) -> Response:
        """The key of a sheet that was closed."""
        shelf = library[run]
        return _download(_sheets(shelf).key_text(sheet), f"{shelf.name}-{sheet}.key.json")

    put_hidden(app, "/runs/{run}/annotate/key", key_file, key_file)

    def take(run: str, given: FilledFile) -> dict[str, Any]:
        """Take a sheet that `mnemoscope annotate` wrote, with the answers on it."""
        sheet, annotator = _sheets(library[run]).add(given.file, given.text, given.key)
        return {"sheet": sheet, "annotator": annotator}

    put_change(app, "/runs/{run}/annotate/import.json", take)


def _add_notes(app: FastAPI, site: Site) -> None:
    library = site.library

    def note(run: str, address: str) -> dict[str, Any]:
        """The note on a neuron."""
        shelf = library[run]
        return shelf.notes[shelf.run.parse(address)].to_dict()

    put_data(app, "/runs/{run}/neurons/{address}/note.json", note, note, light=True)

    def write(run: str, address: str, given: TypedNote) -> dict[str, Any]:
        """Keep a note on a neuron; an empty one is none."""
        shelf = library[run]
        return shelf.notes.save(shelf.run.parse(address), given.note, given.version).to_dict()

    put_change(app, "/runs/{run}/neurons/{address}/note.json", write, light=True)

    @site.put(app, "/runs/{run}/notes", light=True)
    def notes(run: str) -> Answer:
        """All notes on neurons, the latest first."""
        shelf = library[run]
        listed = shelf.notes.listed()
        return Answer(
            "notes.html", lambda: [each.to_dict() for each in listed], {"shelf": shelf, "notes": listed}
        )

    def note_file(run: str) -> Response:
        """The same as a file, one note a line."""
        shelf = library[run]
        lines = (json.dumps(each.to_dict(), ensure_ascii=False) for each in shelf.notes.listed())
        return _download("".join(f"{line}\n" for line in lines), f"{shelf.name}-notes.jsonl")

    put_hidden(app, "/runs/{run}/notes/file", note_file, note_file)


def _download(text: str, name: str) -> Response:
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return Response(text, media_type="application/jsonl; charset=utf-8", headers=headers)
