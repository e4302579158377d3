"""Keeps what a model's values and keys read as, between runs of the same weights: on a CPU it takes minutes.

    <cache folder>/values/<key>/about.json           which model, for people
                                values-0003.parquet  rows of `values` of layer 3, after the hash of what follows
                                columns-0003.parquet what it adds to `neurons`

The key is a hash of everything that decides the bytes: every weight as it was loaded, the configuration, the code that
reads them, torch and the processor (the number of threads does not: numba changes it on the way). A file is written
beside its place and renamed, and read only if its hash is right, so that processes may share the folder and a damaged
file is made again. A run keeps its own copy; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mnemoscope import files
from mnemoscope.mine import values
from mnemoscope.model import lens, packed, parts, reading, table
from mnemoscope.model.devices import hardware
from mnemoscope.model.model import Model
from mnemoscope.model.state import weights

MOST_BYTES = 8 << 30  # of all entries; those that were used longest ago make room
TABLES = ("values", "columns")
_HASH = hashlib.sha256().digest_size
_NAMES = ("_name_or_path", "transformers_version")  # of a configuration: say nothing of what is computed


def folder() -> Path:
    """Where all entries lie; not created here."""
    return files.cache_folder() / "values"


def layers(
    model: Model, wanted: Iterable[int], entry: Entry | None = None
) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """What `values.layers` gives, from the cache where it is there and to the cache where it is not; the next layer is
    asked for when this one is done.

    entry  of this model; None to look at all weights for it
    """
    entry = entry or Entry.of(model)
    absent: list[int] = []
    fresh = values.layers(model, iter(absent.pop, None))
    for layer in wanted:
        tables = entry.read(layer)
        if tables is None:
            absent.append(layer)
            _, *made = next(fresh)
            tables = (made[0], made[1])
            entry.write(layer, tables)
        yield layer, *tables


def missing(model: Model) -> list[int]:
    """The layers of which nothing is kept."""
    entry = Entry.of(model)
    return [layer for layer in model.cells.layers if not entry.has(layer)]


class Entry:
    """The entry of one model, in the cache folder of whichever machine it is asked on."""

    def __init__(self, key: str, about: dict[str, Any]) -> None:
        self._key, self._about = key, about

    @classmethod
    def of(cls, model: Model) -> Entry:
        """The entry for these weights as they are now."""
        entry = cls(_key(model), {"model": model.id, "dtype": model.dtype})
        with suppress(OSError):
            os.utime(entry._folder)  # used now
        return entry

    @property
    def _folder(self) -> Path:
        return folder() / self._key

    def has(self, layer: int) -> bool:
        """Whether there are files of a layer, whole or not."""
        return all(self._file(name, layer).is_file() for name in TABLES)

    def read(self, layer: int) -> tuple[pa.Table, pa.Table] | None:
        """The tables of a layer; None if one is not as it was written."""
        tables = [_read(self._file(name, layer)) for name in TABLES]
        rows, columns = tables
        return None if rows is None or columns is None else (rows, columns)

    def write(self, layer: int, tables: tuple[pa.Table, pa.Table]) -> None:
        """Keep the tables of a layer; where nothing can be written nothing is kept."""
        with suppress(OSError):
            if not (self._folder / files.ABOUT).exists():
                files.make_room(folder(), MOST_BYTES)
                self._folder.mkdir(parents=True, exist_ok=True)
                files.keep(self._folder / files.ABOUT, json.dumps(self._about, indent=1).encode())
            for name, table in zip(TABLES, tables, strict=True):
                sink = pa.BufferOutputStream()
                pq.write_table(table, sink, compression="zstd")
                content = sink.getvalue().to_pybytes()
                files.keep(self._file(name, layer), hashlib.sha256(content).digest() + content)

    def _file(self, name: str, layer: int) -> Path:
        return self._folder / f"{name}-{layer:04d}.parquet"


def _read(file: Path) -> pa.Table | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[_HASH:]).digest() != content[:_HASH]:
        return None
    return pq.read_table(pa.BufferReader(content[_HASH:]))


def _key(model: Model) -> str:
    """A hash of everything that decides the bytes of the tables."""
    config = {name: value for name, value in model.hf.config.to_dict().items() if name not in _NAMES}
    digest = hashlib.sha256()
    facts = {
        "config": config,
        "activation": type(model.anatomy.layers[0].act).__qualname__,
        "family": model.anatomy.family,
        "vocabulary": model.anatomy.vocabulary,
        "units": None if model.units is None else model.units.sha256,
        "lens": values.LENS,
        "kept": [values.VALUE_TOKENS, values.KEY_TOKENS],
        "torch": torch.__version__,
        "device": hardware(model.device),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for source in (values, lens, packed, parts, reading, table):
        digest.update(inspect.getsource(source).encode())
    for name, tensor in weights(model.hf):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:40]
