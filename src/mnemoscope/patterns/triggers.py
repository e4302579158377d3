"""The triggers of a run as units of a search: neurons of either polarity, and pseudo-neurons of the nulls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.patterns.search import Units
from mnemoscope.records import NEURON
from mnemoscope.run.text import Text

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

_UNIT = ("kind", "layer", "neuron", "polarity")


@dataclass(frozen=True)
class Addressed:
    """Units with their addresses, sorted by kind (the neurons first), layer, neuron, polarity (+1 first).

    kinds     names; `kind` i64[unit] indexes them
    layer, neuron, polarity   i64[unit]
    units     their triggers, strongest first
    """

    kinds: tuple[str, ...]
    kind: np.ndarray
    layer: np.ndarray
    neuron: np.ndarray
    polarity: np.ndarray
    units: Units

    def __len__(self) -> int:
        return len(self.kind)


def addressed(run: Run, text: Text) -> Addressed:
    """All units of a run that have a trigger; `text` is the whole of the run's."""
    columns = ["layer", "neuron", "polarity", "rank", "context", "position"]
    parts = [run.table("triggers").select(pl.lit(NEURON).alias("kind"), *columns)]
    if "null_triggers" in run.manifest.tables:
        parts.append(run.table("null_triggers").select("kind", *columns))
    frame = pl.concat(parts).collect()
    kinds = (NEURON, *sorted(set(frame["kind"].unique()) - {NEURON}))
    frame = frame.with_columns(
        kind=pl.col("kind").replace_strict(kinds, range(len(kinds)), return_dtype=pl.Int64)
    ).sort(*_UNIT, "rank", descending=[False, False, False, True, False])
    address = frame.select(*_UNIT).to_numpy().astype(np.int64)
    first = np.flatnonzero(np.any(np.diff(address, axis=0, prepend=address[:1] - 1), axis=1))
    rows = text.rows(frame["context"].to_numpy(), frame["position"].to_numpy())
    kind, layer, neuron, polarity = address[first].T
    return Addressed(kinds, kind, layer, neuron, polarity, Units(np.append(first, len(frame)), rows))
