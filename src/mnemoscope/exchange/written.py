"""How values and names are written in the files of other tools."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mnemoscope.exchange.sides import Passage
from mnemoscope.text.vocabulary import Vocabulary

_ODD = re.compile(r"[^a-zA-Z0-9_.-]+")


def hook(layer: int) -> str:
    """What TransformerLens calls the coefficients of a layer."""
    return f"blocks.{layer}.mlp.hook_post"


def slug(text: str, longest: int = 60) -> str:
    """A text as a name of letters, digits, points, dashes and underscores; `text` if nothing of it is left."""
    return _ODD.sub("-", text).strip("-.")[:longest].strip("-.") or "text"


def visible(words: Vocabulary, passage: Passage) -> list[str]:
    """The texts of a passage, where one that would be empty shows its bytes: for formats that allow no empty ones."""
    return [
        piece or words.label(token) or "∅"
        for piece, token in zip(passage.pieces, passage.tokens, strict=True)
    ]


def spelled(words: Vocabulary, tokens: Iterable[int]) -> list[str]:
    """Tokens by themselves, with their spaces, and as in `visible`."""
    return [words.text([token]) or words.label(token) or "∅" for token in tokens]


def write_json(file: Path, value: Any) -> None:
    """Write a value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_json(value), encoding="utf-8", errors="replace")


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON for each record; zipped, without a date, where the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(as_json(record) + "\n" for record in records).encode("utf-8", "replace")
    file.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)


def as_json(value: Any) -> str:
    """A value in JSON; ValueError for a number that it has not: NaN, infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
