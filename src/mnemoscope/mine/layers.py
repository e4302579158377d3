"""Reads the values and keys of a model layer by layer, each into files of its own in the folder of the run.

    <run>/.work/values-0003.part   rows of `values` of layer 3
                columns-0003.part  what it adds to `neurons`, written last: a layer with this file is read

No layer needs another, so that processes share them out as they do shards, and an interruption costs each of them the
one that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mnemoscope import files
from mnemoscope.mine import kept_values
from mnemoscope.model.model import Model

Tell = Callable[[int], None]


@dataclass(frozen=True)
class ValueReading:
    """What is read: layers of the model, into the folder. A `loop.Job`."""

    model: Model
    folder: Path
    stem: str = "values"
    doing, piece = "reading values", "layer"

    @cached_property
    def _kept(self) -> kept_values.Entry:
        """What is kept of this model: a hash of all weights, which goes to other processes with the rest."""
        return kept_values.Entry.of(self.model)

    def file(self, name: str | int) -> Path:
        """As of `loop.Job`; only the lock beside it is ever there."""
        return self.folder / f"{self.stem}-{name}.none"

    def placed(self, device: torch.device) -> ValueReading:
        """The same with the model on a device."""
        self.model.move(device)
        return self

    def unread(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers that are still to be read."""
        return [layer for layer in layers if not self._part("columns", layer).exists()]

    def kept(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers that an earlier run of the model has read."""
        return [layer for layer in layers if self._kept.has(layer)] if layers else []

    def do(
        self, file: Path, pieces: Iterable[int], tell: Tell, checkpoint_seconds: float | None = None
    ) -> None:
        """Read layers, in turn; `tell` is called with 1 after each."""
        with self.model.running():
            for layer, rows, columns in kept_values.layers(self.model, pieces, self._kept):
                _write(rows, self._part("values", layer))
                _write(columns, self._part("columns", layer))
                tell(1)

    def tables(self, layer: int) -> tuple[pa.Table, pa.Table]:
        """Of a layer that was read: the rows of `values`, and the columns that it adds to `neurons`."""
        columns = pq.read_table(self._part("columns", layer)).drop_columns(["layer", "neuron"])
        return pq.read_table(self._part("values", layer)), columns

    def _part(self, name: str, layer: int) -> Path:
        return self.folder / f"{name}-{layer:04d}.part"


def _write(table: pa.Table, file: Path) -> None:
    with files.replacing(file, "writing the run") as partial:
        pq.write_table(table, partial, compression="zstd")
