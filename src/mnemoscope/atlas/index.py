"""The index that searches of a served run are answered from: its text, and its triggers by where they are.

It is made once, in the time of two readings of the triggers, and kept in the cache folder, from where it is mapped into
memory. It is no part of the run.

    <cache folder>/places/<key>/about.json               of which run, for people, and how long each file is
                                wholetext-text.npy ...   the fields of `WholeText`
                                byplace-begins.npy ...   the fields of `ByPlace`

The key is a hash of what the manifest says of the tables: of a run that was built anew there is nothing yet, and what
was made of the earlier one in the same folder goes. A folder has its name only once everything in it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import polars as pl

from mnemoscope.files import cache_folder
from mnemoscope.records import Progress
from mnemoscope.run.places import BY_PLACE, TEXT, ByPlace, WholeText, spans

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

ABOUT = "about.json"
_LONG = 3600.0  # seconds after which what has no name yet was given up


def indexed(run: Run, report: Callable[[Progress], None] | None = None) -> ByPlace:
    """The index of a run, once while it is open: from the cache folder, made first where it is not there yet.

    Where nothing can be written there it is kept in memory.
    """

    def read() -> ByPlace:
        told = report or (lambda step: None)
        with suppress(OSError):
            text, index = _opened(run) or _made(run, told)
            run.once(TEXT, lambda: text)
            return index
        return _fill(run, WholeText.of(run), None, told)

    return run.once(BY_PLACE, read)


def _files(folder: Path) -> dict[type, dict[str, Path]]:
    """The file of each field of both."""
    return {
        kind: {field.name: folder / f"{kind.__name__.lower()}-{field.name}.npy" for field in fields(kind)}
        for kind in (WholeText, ByPlace)
    }


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for files in _files(folder).values() for file in files.values()}


def _opened(run: Run) -> tuple[WholeText, ByPlace] | None:
    """What was made of this run, mapped into memory; None if nothing was, or not all of it is there."""
    folder = _folder(run)
    with suppress(OSError, ValueError, KeyError):
        if json.loads((folder / ABOUT).read_text(encoding="utf-8"))["bytes"] == _sizes(folder):
            text, index = (
                kind(**{name: np.asarray(np.load(file, mmap_mode="r")) for name, file in files.items()})
                for kind, files in _files(folder).items()
            )
            return text, index
    return None


def _made(run: Run, report: Callable[[Progress], None]) -> tuple[WholeText, ByPlace]:
    """Make both in the cache folder; OSError if that cannot be."""
    folder = _folder(run)
    scratch = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        _forget(run)
        scratch.mkdir(parents=True)
        text = WholeText.read(run)
        for name, file in _files(scratch)[WholeText].items():
            np.save(file, getattr(text, name))
        index = _fill(run, text, scratch, report)
        about = {"run": str(run.place.resolve()), "model": run.manifest.model.id, "bytes": _sizes(scratch)}
        (scratch / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if (kept := _opened(run)) is None:  # another process may just have been first
            shutil.rmtree(folder, ignore_errors=True)  # what a full disk or a power cut left of one
            scratch.rename(folder)
            kept = _opened(run)
        return kept or (text, index)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(run: Run, text: WholeText, folder: Path | None, report: Callable[[Progress], None]) -> ByPlace:
    """Read the triggers of one layer after another, twice: to count, and to put each where it belongs."""
    cells, rows = run.manifest.model.cells, run.manifest.tables["triggers"].rows

    def array(name: str, kind: type, size: int) -> np.ndarray:
        if folder is None or not size:  # nothing can be mapped of an empty file
            return np.zeros(size, kind)
        file = _files(folder)[ByPlace][name]
        made = np.lib.format.open_memmap(file, "w+", kind, (size,))
        _take(file)
        return made

    made = ByPlace(
        array("begins", np.int64, len(text.ends) + 1),
        array("sides", np.uint32, rows),
        array("strengths", np.float32, rows),
        array("stored", np.int32, 2 * len(cells)),
        array("weakest", np.float32, 2 * len(cells)),
    )
    made.weakest[:] = np.nan
    steps = 2 * len(cells.layers)
    for number, layer in enumerate(cells.layers):
        report(Progress("index of triggers", number, steps, "layers"))
        tokens, _, _ = _layer(run, text, layer)
        made.begins[1:] += np.bincount(tokens, minlength=len(text.ends))
    np.cumsum(made.begins, out=made.begins)
    filled = np.array(made.begins[:-1])
    for number, layer in enumerate(cells.layers, start=len(cells.layers)):
        report(Progress("index of triggers", number, steps, "layers"))
        tokens, sides, strengths = _layer(run, text, layer)
        order = np.argsort(tokens, kind="stable")
        begins = np.flatnonzero(np.diff(tokens[order], prepend=-1))
        sizes = np.diff(begins, append=len(order))
        present = tokens[order][begins]
        places = spans(filled[present], filled[present] + sizes)
        made.sides[places], made.strengths[places] = sides[order], strengths[order]
        filled[present] += sizes
        lists, first = np.unique(sides, return_index=True)
        made.stored[lists] = np.diff(first, append=len(sides))
        made.weakest[lists] = strengths[np.append(first[1:], len(sides)) - 1]
    report(Progress("index of triggers", steps, steps, "layers"))
    return made


def _take(file: Path) -> None:
    """Have the disk give a file its room; OSError where it has not: a process that found out while it wrote to what is
    mapped would be killed."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _layer(run: Run, text: WholeText, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, sides and strengths of the triggers of a layer, in the order of the table."""
    columns = (run.manifest.model.cells.side(), "context", "position", pl.col("coefficient").abs())
    rows = run.table("triggers").filter(pl.col("layer") == layer).select(*columns).collect()
    sides, contexts, positions, strengths = (column.to_numpy() for column in rows.get_columns())
    return text.numbers(contexts, positions), sides, strengths


def _folder(run: Run) -> Path:
    tables = run.manifest.tables
    facts = [tables[name].sha256 for name in ("contexts", "triggers", "vocabulary")]
    return cache_folder() / "places" / hashlib.sha256("\n".join(["1", *facts]).encode()).hexdigest()[:40]


def _forget(run: Run) -> None:
    """Let go of what was made of an earlier run in the same folder, and of what was never finished."""
    for folder in (cache_folder() / "places").glob("*"):
        with suppress(OSError, ValueError, KeyError):
            if folder.name.startswith("."):
                gone = time.time() - folder.stat().st_mtime > _LONG
            else:
                about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
                gone = about["run"] == str(run.place.resolve())
            if gone:
                shutil.rmtree(folder)
