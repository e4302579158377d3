"""Writes a blinded sheet, one item a line, and its sealed key (A5, A73).

Every item looks the same: prefixes to annotate, and as many again, mixed with distractors, to apply the patterns to.
Nothing says which neuron it is, or whether it is one.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mnemoscope import files
from mnemoscope.annotation import draw
from mnemoscope.annotation.key import FORMAT, Key, SheetItem, digest
from mnemoscope.arguments import check_seed
from mnemoscope.errors import SheetError
from mnemoscope.run.text import Text

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

PREFIXES = 25  # that an annotator sees of a neuron, and as many again to apply patterns to (A5)
TOKENS = 48  # of a prefix that are shown

_DOING = "writing the annotation sheet"
_HOW = (
    "Each line below is an item. `annotate` holds prefixes of texts; the last token, in brackets, is where each ends.",
    f"Look for what at least {draw.LEAST} of them have in common, and fill `patterns`: a list of "
    '{"description": ..., "indices": [1, 4, 9], "kind": "shallow" or "semantic"}; shallow is recurring words or '
    "characters, semantic is a recurring topic or meaning. A prefix may show several patterns. Find none, write [].",
    "Only then read `apply`, and fill `applies`: the numbers of the prefixes that show at least one of your patterns; "
    "[] for none. Items without patterns need no `applies`.",
    "Some items are prefixes that have nothing in common but chance. Do not change anything else.",
)


class Written(NamedTuple):
    """What `write` made."""

    sheet: Path
    key: Path
    items: int
    prefixes: int


def fingerprint(run: Run) -> str:
    """What tells a run from any other: its weights, its text, and its triggers."""
    manifest = run.manifest
    return digest([manifest.model.weights_sha256, manifest.corpus.sha256, manifest.tables["triggers"].sha256])


def key_path(sheet: Path) -> Path:
    """Where the key of a sheet is written."""
    return sheet.with_suffix(".key.json")


def make(
    run: Run, *, neurons: int = 40, prefixes: int = PREFIXES, seed: int | None = None
) -> tuple[list[dict[str, Any]], Key]:
    """The lines of a sheet, the header first, and its key.

    seed  which neurons, nulls and prefixes; None draws one. It is in the key and not in the sheet, and the salt of the
          key is not drawn from it, so that who has the run and the sheet cannot make the key.
    """
    check_seed(seed)
    seed = secrets.randbits(32) if seed is None else seed
    text = Text.of(run)
    drawn = draw.items(run, text, neurons, prefixes, np.random.default_rng(seed))
    width = len(str(len(drawn)))
    lines, items = [], {}
    for number, item in enumerate(drawn, 1):
        name = str(number).zfill(width)
        shown = {
            part_name: {
                str(index): show(text, row) for index, (row, _) in enumerate(getattr(item, part_name), 1)
            }
            for part_name in ("annotate", "apply")
        }
        lines.append(
            {"item": name, "annotate": shown["annotate"], "patterns": None}
            | {"apply": shown["apply"], "applies": None}
        )
        layer, neuron, polarity = item.address or (None, None, None)
        items[name] = SheetItem(
            kind=item.kind,
            layer=layer,
            neuron=neuron,
            polarity=polarity,
            annotate=tuple(prefix for _, prefix in item.annotate),
            apply=tuple(prefix for _, prefix in item.apply),
            digest=seen(lines[-1]),
        )
    key = Key(
        format=FORMAT,
        salt=secrets.token_hex(32),
        seed=seed,
        model=run.manifest.model.id,
        corpus=run.manifest.corpus.id,
        run=fingerprint(run),
        items=items,
    )
    header = {
        "sheet": FORMAT,
        "how": _HOW,
        "annotator": "",
        "items": len(lines),
        "prefixes": len(drawn[0].annotate),
        "key": None,
        "commitment": key.commitment,
    }
    return [header, *lines], key


def write(
    run: Run, out: Path, *, neurons: int = 40, prefixes: int = PREFIXES, seed: int | None = None
) -> Written:
    """Write a sheet and, beside it, its key; a sheet that is there already is left alone (`SheetError`)."""
    key_file = key_path(out)
    files.make_folder_of(out, _DOING, SheetError)
    for file in (out, key_file):
        files.check_file(file, _DOING, SheetError)
        if file.exists():
            raise SheetError(f"{_DOING}: {file} is there already, perhaps with answers; choose another name")
    (header, *lines), key = make(run, neurons=neurons, prefixes=prefixes, seed=seed)
    header["key"] = key_file.name
    files.write(key_file, key.model_dump_json(indent=1) + "\n", "writing the key", SheetError)
    try:
        files.write(out, spell([header, *lines]), _DOING, SheetError)
    except BaseException:
        key_file.unlink()  # of no sheet, and in the way of the next try
        raise
    return Written(out, key_file, len(lines), header["prefixes"])


def spell(lines: list[dict[str, Any]]) -> str:
    """The lines of a sheet as its file has them."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def seen(line: dict[str, Any]) -> str:
    """The digest of an item without its answers."""
    return digest([line.get("item"), line.get("annotate"), line.get("apply")])


def show(text: Text, row: int) -> str:
    """A prefix as the annotator reads it, on one line: the last tokens of it, the very last in brackets."""
    words, start = text.vocabulary, max(int(text.first[row]), row + 1 - TOKENS)
    # Special tokens are no text.
    tokens = [token for token in text.tokens[start : row + 1].tolist() if not words.special[token]]
    pieces = words.running(tokens)
    last = pieces[-1] or words.label(int(text.tokens[row]))
    return f"{'…' if start > text.first[row] else ''}{''.join(pieces[:-1])}⟦{last}⟧"
