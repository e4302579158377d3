"""Reads a filled sheet back: proves that sheet and key belong together, and that the answers make sense.

Everything is checked against the key before anything is counted: the commitment, the digest of every item, the numbers
that answers name. `annotated` gives one neuron with all that was said of its prefixes (A28).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from mnemoscope import files
from mnemoscope.annotation.draw import LEAST
from mnemoscope.annotation.key import FORMAT, RENEW, Key, SheetItem, read_key
from mnemoscope.annotation.sheet import fingerprint, seen
from mnemoscope.errors import RunMismatch, SheetError
from mnemoscope.records import NeuronId, other_format

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

KINDS = ("shallow", "semantic")
_FIELDS = {"item", "annotate", "patterns", "apply", "applies"}


@dataclass(frozen=True)
class SeenPattern:
    """What an annotator saw in some prefixes of an item; indices are 0-based."""

    description: str
    indices: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class SheetAnswer:
    """The answers to one item.

    patterns  None: not answered; empty: nothing was found
    applies   0-based numbers of the prefixes of `apply`; None: not answered
    """

    patterns: tuple[SeenPattern, ...] | None
    applies: frozenset[int] | None
    annotate: tuple[str, ...]  # the prefixes as they were shown
    apply: tuple[str, ...]


@dataclass(frozen=True)
class Filled:
    """One annotator's sheet."""

    path: Path
    annotator: str
    answers: dict[str, SheetAnswer]

    @property
    def answered(self) -> list[str]:
        """Items with an answer, in the order of the sheet."""
        return [name for name, answer in self.answers.items() if answer.patterns is not None]


def read(
    sheets: Sequence[str | Path], *, key: str | Path | None = None, run: Run | None = None
) -> tuple[Key, list[Filled]]:
    """Read one sheet of each annotator, and the key that all of them were written with.

    key  where it is, if not beside the first sheet under its own name
    run  when given, the sheet must be of it (`RunMismatch`)

    `SheetError` naming the file and the item for whatever is not as it was written, or not as it should be filled in.
    """
    paths = [files.expanded(path) for path in sheets]
    raw = [_read_lines(path) for path in paths]
    key_path = files.expanded(key) if key is not None else paths[0].parent / str(raw[0][0].get("key"))
    opened = read_key(key_path)
    for path, lines in zip(paths, raw, strict=True):
        check_key(path, lines, key_path, opened)
    if run is not None:
        check_run(paths[0], opened, run)
    filled = [fill(path, lines, opened) for path, lines in zip(paths, raw, strict=True)]
    if not any(sheet.answered for sheet in filled):
        raise nothing_answered(paths[0])
    return opened, filled


def check_run(path: Path, key: Key, run: Run) -> None:
    """`RunMismatch` unless the sheet `path` of this key was made from the run."""
    if key.run != fingerprint(run):
        raise RunMismatch(
            f"scoring {path}: the sheet was made from another run ({key.model} on {key.corpus}) than "
            f"{run.path}; give that one, or none"
        )


def nothing_answered(path: Path) -> SheetError:
    """What is said of a sheet without an answer."""
    return SheetError(
        f"scoring {path}: no item is answered; fill `patterns` of each item, with [] where there is none"
    )


def annotated(key: Key, filled: Filled, neuron: tuple[int, int]) -> pl.DataFrame:
    """All that was said of the prefixes of one neuron (A28), strongest trigger first.

    Columns: rank, coefficient, context, position, prefix, patterns (descriptions, in the order of the answer), kind
    (`none`, `shallow`, `semantic`, `both`). `SheetError` if the neuron is not on the sheet, or has no answer.
    """
    names = [
        name for name, item in key.items.items() if (item.layer, item.neuron) == neuron and not item.null
    ]
    if not names:
        have = ", ".join(
            str(NeuronId(item.layer or 0, item.neuron or 0)) for item in key.items.values() if not item.null
        )
        raise SheetError(
            f"exporting {NeuronId(*neuron)} from {filled.path}: it is not on the sheet, which has {have}"
        )
    answer, item = filled.answers[names[0]], key.items[names[0]]
    if answer.patterns is None:
        raise SheetError(
            f"exporting {NeuronId(*neuron)} from {filled.path}: its item {names[0]} is not answered; fill it in"
        )
    labels = kinds(answer)
    rows = [
        {
            "rank": prefix.rank,
            "coefficient": prefix.coefficient,
            "context": prefix.context,
            "position": prefix.position,
            "prefix": answer.annotate[index],
            "patterns": [pattern.description for pattern in answer.patterns if index in pattern.indices],
            "kind": LABELS[labels[index]],
        }
        for index, prefix in enumerate(item.annotate)
    ]
    return pl.DataFrame(rows, schema_overrides={"patterns": pl.List(pl.String)}).sort("rank")


LABELS = ("none", "shallow", "semantic", "both")


def kinds(answer: SheetAnswer) -> list[int]:
    """For each prefix of `annotate` its label: a place in `LABELS`."""
    labels = [0] * len(answer.annotate)
    for pattern in answer.patterns or ():
        for index in pattern.indices:
            labels[index] |= 1 << KINDS.index(pattern.kind)
    return labels


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = files.read_text(path)
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise SheetError(f"reading the sheet {path}: {why}; give a sheet of `mnemoscope annotate`") from error
    return parse(path, text)


def parse(path: Path, text: str) -> list[dict[str, Any]]:
    """The lines of a sheet, the header first; `SheetError` naming `path` if the text is none."""
    lines = []
    for number, row in files.json_lines(text):
        try:
            lines.append(json.loads(row))
        except json.JSONDecodeError as error:
            raise SheetError(
                f"{path}, line {number}: this is not JSON ({error.msg} at character {error.colno}); fix it"
            ) from error
        except (ValueError, RecursionError) as error:
            raise SheetError(
                f"{path}, line {number}: this cannot be read ({error}); restore the line"
            ) from error
    header = lines[0] if lines and all(isinstance(line, dict) for line in lines) else {}
    if not ("commitment" in header and isinstance(header.get("sheet"), int)):
        raise SheetError(
            f"reading the sheet {path}: its first line is no header; give a sheet of `mnemoscope annotate`"
        )
    if header["sheet"] != FORMAT:
        raise SheetError(f"reading the sheet {path}: {other_format(header['sheet'], FORMAT, RENEW)}")
    return lines


def check_key(path: Path, lines: list[dict[str, Any]], key_path: Path, key: Key) -> None:
    """`SheetError` unless the key is the one that was sealed with the sheet."""
    if lines[0]["commitment"] != key.commitment:
        raise SheetError(
            f"scoring {path}: the key {key_path} is not the one that was sealed with this sheet, or was changed since; "
            "give the key that was written beside it with {key}",
            key=...,
        )


def fill(path: Path, lines: list[dict[str, Any]], key: Key) -> Filled:
    """The answers on a sheet; `SheetError` naming `path` and the item for what is not as it was written or is wrong."""
    header, *rows = lines
    names = [str(row.get("item")) for row in rows]
    if lost := sorted(key.items.keys() - set(names)):
        raise SheetError(f"scoring {path}: item {lost[0]} is missing; restore its line")
    if len(names) > len(key.items):
        odd = next(name for index, name in enumerate(names) if name not in key.items or name in names[:index])
        raise SheetError(f"scoring {path}: item {odd} is there twice or was never written; remove its line")
    for name, row in zip(names, rows, strict=True):
        item = key.items[name]
        if seen(row) != item.digest or row.keys() - _FIELDS or not _is_of(row, item):
            raise SheetError(
                f"scoring {path}, item {name}: its texts are not those that were written; restore the line, and "
                "change nothing but `patterns` and `applies`"
            )
    answers = {
        name: read_answer(f"{path}, item {name}", row, key.items[name])
        for name, row in zip(names, rows, strict=True)
    }
    return Filled(path, str(header.get("annotator") or path.stem), answers)


def _is_of(row: dict[str, Any], item: SheetItem) -> bool:
    """Whether both halves of a line are texts by number, as many as the key knows."""
    halves = ((row.get("annotate"), item.annotate), (row.get("apply"), item.apply))
    return all(isinstance(shown, dict) and len(shown) == len(known) for shown, known in halves)


def read_answer(where: str, row: dict[str, Any], item: SheetItem) -> SheetAnswer:
    """The answer on one line; `SheetError` that begins with `where` if it makes no sense."""
    described, applies = row.get("patterns"), row.get("applies")
    if described is not None and not isinstance(described, list):
        raise SheetError(
            f"{where}: `patterns` is {json.dumps(described)}; write a list, [] where there is none"
        )
    patterns = (
        None
        if described is None
        else tuple(_pattern(where, entry, len(item.annotate)) for entry in described)
    )
    if applies is not None and not patterns:
        if applies:
            raise SheetError(
                f"{where}: `applies` is filled, and there is no pattern to apply; describe it first"
            )
        applies = None
    chosen = None if applies is None else read_numbers(where, "applies", applies, len(item.apply))
    return SheetAnswer(
        patterns,
        None if chosen is None else frozenset(chosen),
        tuple(row["annotate"].values()),
        tuple(row["apply"].values()),
    )


def _pattern(where: str, entry: Any, size: int) -> SeenPattern:
    if not isinstance(entry, dict) or entry.keys() != {"description", "indices", "kind"}:
        raise SheetError(
            f'{where}: a pattern is {{"description": ..., "indices": [...], "kind": ...}}, not {json.dumps(entry)[:80]}'
        )
    description, kind = entry["description"], entry["kind"]
    if not isinstance(description, str) or not description.strip():
        raise SheetError(f"{where}: a pattern has no description; say in words what the prefixes share")
    if not description.isascii() and any("\ud800" <= letter <= "\udfff" for letter in description):
        raise SheetError(f"{where}: the description {description!a} is no text; write it again")
    if kind not in KINDS:
        raise SheetError(
            f"{where}: the kind of {description!r} is {json.dumps(kind)}; write one of {', '.join(KINDS)}"
        )
    indices = read_numbers(where, "indices", entry["indices"], size)
    if len(indices) < LEAST:
        raise SheetError(
            f"{where}: {description!r} names {len(indices)} of {size} prefixes, a pattern needs {LEAST}; name more or "
            "remove it"
        )
    return SeenPattern(description.strip(), indices, kind)


def read_numbers(where: str, name: str, numbers: Any, size: int) -> tuple[int, ...]:
    good = isinstance(numbers, list) and all(
        type(number) is int and 1 <= number <= size for number in numbers
    )
    if not good or len(set(numbers)) < len(numbers):
        raise SheetError(
            f"{where}: `{name}` is {json.dumps(numbers)[:80]}; write a list of different numbers from 1 to {size}"
        )
    return tuple(sorted(number - 1 for number in numbers))
