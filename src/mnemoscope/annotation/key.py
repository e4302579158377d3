"""The sealed key of an annotation sheet: what every item is, and proof that it was fixed before anyone answered.

The sheet carries a commitment: the sha256 of the key, which holds a random salt, so that nobody can find the key
by trying. The key in turn holds a digest of every item as it was written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mnemoscope import files
from mnemoscope.errors import SheetError
from mnemoscope.records import other_format

FORMAT = 1  # of a sheet and of its key
RENEW = "write a new sheet with `mnemoscope annotate`"
Kind = Literal["neuron", "random", "direction", "mixed"]
NULLS: tuple[Kind, ...] = ("random", "direction", "mixed")


class _SealedModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Format(BaseModel):
    """What a key of any version says of its format."""

    format: int


class Prefix(_SealedModel):
    """Where a prefix comes from; rank and coefficient where it is a trigger of the item's own unit.

    source  whether it belongs to what the item is made of; in `apply` the others are distractors
    """

    context: int
    position: int
    source: bool = True
    rank: int | None = None
    coefficient: float | None = None


class SheetItem(_SealedModel):
    """What an item is: a neuron with a polarity, a null direction with its number, or neither.

    digest  of the item as the annotator sees it, without answers
    """

    kind: Kind
    layer: int | None = None
    neuron: int | None = None
    polarity: int | None = None
    annotate: tuple[Prefix, ...]
    apply: tuple[Prefix, ...]
    digest: str

    @property
    def null(self) -> bool:
        """Whether there is nothing of a neuron's to be found."""
        return self.kind != "neuron"


class Key(_SealedModel):
    """What belongs to a sheet and is kept from the annotator; `run` is the fingerprint of the run."""

    format: int
    salt: str
    seed: int
    model: str
    corpus: str
    run: str
    items: dict[str, SheetItem]

    @property
    def commitment(self) -> str:
        """The hash that the sheet carries."""
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """The sha256 of JSON-ready values, whatever the spacing and the order of keys in a file."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_key(path: Path) -> Key:
    """Read a key; `SheetError` if there is none, it is none, or an older or a newer mnemoscope wrote it."""
    try:
        text = files.read_text(path)
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise SheetError(
            f"reading the key {path}: {why}; give the key that was written beside the sheet with {{key}}",
            key=...,
        ) from error
    return parse_key(path, text)


def parse_key(path: Path, text: str) -> Key:
    """The key that a text is; `SheetError` naming `path` if it is none."""
    try:
        version = _Format.model_validate_json(text).format
        if version != FORMAT:
            raise SheetError(f"reading the key {path}: {other_format(version, FORMAT, RENEW)}")
        return Key.model_validate_json(text)
    except ValidationError as error:
        raise SheetError(
            f"reading the key {path}: it is not the key of a sheet ({error.errors()[0]['msg']}); restore it"
        ) from error
