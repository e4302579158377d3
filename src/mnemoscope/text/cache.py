"""What is kept in the cache folder between runs: listed with its size, and freed. All of it can be made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from mnemoscope import files
from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.files import ABOUT, cache_folder
from mnemoscope.records import Kept
from mnemoscope.text.samples import SAMPLES

KINDS = ("model", "text", "gguf", "values", "places", "parts", "work")
# Of what is behind a URL: the folder, its kind, and what it is.
_REMOTE = {
    "texts": ("text", "the text {}"),
    "parts": ("parts", "what was read of {}"),
    "work": ("work", "the run for {}, which is not uploaded yet"),
}


def entries(kind: str | None = None) -> list[Kept]:
    """Everything that is kept, or what is of one kind of `KINDS`, the largest first; QueryError for another kind.

    Files in the folder that this program did not write are left out, and so is what is being made right now.
    """
    if kind not in (None, *KINDS):
        raise QueryError(
            f"listing the cache: {{kind}} is not a kind of what is kept; give one of {', '.join(KINDS)}",
            kind=kind,
        )
    kept = [entry for entry in _all(cache_folder()) if kind in (None, entry.kind)]
    return sorted(kept, key=lambda entry: (-entry.bytes, str(entry.path)))


def clear(kind: str | None = None) -> list[Kept]:
    """Free everything, or one kind; returns what was freed. MnemoscopeError if the system does not let it."""
    freed = entries(kind)
    for entry in freed:
        # First out of sight, so that nothing half deleted has the name of what is whole.
        hidden = entry.path.with_name(f".{entry.path.name}.{uuid4().hex[:8]}")
        with files.refusals(f"freeing {entry.path}", "delete it yourself", error=MnemoscopeError):
            entry.path.rename(hidden)
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
    return freed


def _all(folder: Path) -> Iterator[Kept]:
    for path in _in(folder / "models"):
        with suppress(OSError, ValueError):  # not ours, or gone meanwhile
            origin = json.loads((path / "origin.json").read_text(encoding="utf-8"))
            if "wheel" in origin:
                yield Kept("model", f"the sample model, from {origin['wheel']}", _size(path), path)
            else:
                yield Kept("gguf", f"{origin['file']}, converted to fp32 safetensors", _size(path), path)
    for path in _in(folder / "corpora"):
        name = path.name.rpartition("-")[0]
        if path.is_file() and name in SAMPLES:
            yield Kept("text", f"the sample text {name}", _size(path), path)
    for path in _in(folder / "values"):
        with suppress(OSError, ValueError, KeyError):
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            what = f"values of {about['model']} in {about['dtype']}, read through its vocabulary"
            yield Kept("values", what, _size(path), path)
    for path in _in(folder / "places"):
        with suppress(OSError, ValueError, KeyError):
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            yield Kept("places", f"triggers of {about['run']} by where they are", _size(path), path)
    for name, (kind, what) in _REMOTE.items():
        for path in _in(folder / name):
            with suppress(OSError, ValueError, KeyError):
                about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
                yield Kept(kind, what.format(about["url"]), _size(path), path)


def _in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return []


def _size(path: Path) -> int:
    return sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
    )
