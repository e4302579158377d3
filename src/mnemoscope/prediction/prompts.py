"""The prompts of an explanation of many, and the table they go to, are checked as a whole; no torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mnemoscope import files
from mnemoscope.arguments import either
from mnemoscope.errors import QueryError

TABLES = (".parquet", ".csv", ".jsonl")
WRITING = "writing the table"


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts; `line` is where it stood, from 1."""

    prompt: str
    target: str | None = None
    foils: tuple[str, ...] = ()
    label: str | None = None
    position: int = -1
    target_id: int | None = None
    foil_ids: tuple[int, ...] = ()
    decoder_prompt: str = ""
    line: int = 0


KEYS = tuple(field.name for field in fields(Prompt) if field.name != "line")


def check_table(path: str | Path, prompts: str | Path | Iterable[Mapping[str, Any]] = ()) -> None:
    """QueryError if the name of a table does not say in which format it is to be; RunError if it cannot be written, or
    is the file of the prompts."""
    if Path(path).suffix.lower() not in TABLES:
        raise QueryError(f"{WRITING} {path}: the name must end in {either(TABLES)}; give such a name")
    files.make_folder_of(path, WRITING)
    files.check_file(path, WRITING, reads=[prompts] if isinstance(prompts, str | Path) else ())


def read_prompts(prompts: str | Path | Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """All records of a jsonl file, or of an iterable; QueryError with the number of the line for one that is wrong."""
    if not isinstance(prompts, str | Path):
        records = [_record(row, line, "prompts") for line, row in enumerate(prompts, 1)]
        name = "prompts"
    else:
        name = str(prompts)
        records = [_record(row, line, name) for line, row in _lines(files.expanded(prompts))]
    if not records:
        raise QueryError(f"reading prompts: {name} has none; write one JSON object a line, {_example()}")
    return records


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = files.read_text(path)
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise QueryError(f"reading prompts: {path}: {why}; give a file of one JSON object a line") from error
    for line, row in files.json_lines(text):
        try:
            yield line, files.from_json(row)
        except ValueError as error:
            raise QueryError(
                f"{path}, line {line}: this is not JSON ({error}); write {_example()}"
            ) from error


def _record(row: Any, line: int, name: str) -> Prompt:
    where = f"{name}, line {line}"
    if not isinstance(row, Mapping):
        raise QueryError(f"{where}: this is a {type(row).__name__}, not an object; write {_example()}")
    if unknown := [key for key in row if key not in KEYS]:
        raise QueryError(f"{where}: unknown key {unknown[0]!r}; a prompt has {', '.join(KEYS)}")
    foils = row.get("foils") or ()
    foils = (foils,) if isinstance(foils, str) else tuple(foils) if isinstance(foils, list | tuple) else foils
    ids = row.get("foil_ids") or ()
    ids = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    wrong = {
        "prompt": not isinstance(row.get("prompt"), str),
        "target": not isinstance(row.get("target"), str | None),
        "foils": not (isinstance(foils, tuple) and all(isinstance(foil, str) for foil in foils)),
        "label": not isinstance(row.get("label"), str | None),
        "decoder_prompt": not isinstance(row.get("decoder_prompt", ""), str),
        "position": type(row.get("position", -1)) is not int,
        "target_id": row.get("target_id") is not None and type(row["target_id"]) is not int,
        "foil_ids": not (isinstance(ids, tuple) and all(type(token) is int for token in ids)),
    }
    if bad := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise QueryError(
            f"{where}: {bad[0]!r} is {json.dumps(row.get(bad[0]), default=str)}; write {_example()}, position and "
            "ids whole numbers"
        )
    return Prompt(
        row["prompt"], row.get("target"), foils, row.get("label"), row.get("position", -1), row.get("target_id"), ids,
        row.get("decoder_prompt", ""), line,
    )  # fmt: skip


def _example() -> str:
    return '{"prompt": "...", "target": "...", "foils": ["..."], "label": "..."}'
