"""What a run directory holds: the columns of every table, and the order that makes a table searchable.

docs/format.md describes each column; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

MANIFEST = "manifest.json"
WORK = ".work"

# DuckDB fetches extensions by itself unless told not to.
OFFLINE: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


def _schema(*columns: tuple[str, pa.DataType], null: Sequence[str] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=name in null) for name, dtype in columns])


_NEURON = (("layer", pa.int16()), ("neuron", pa.int32()))
_PLACE = (("context", pa.int64()), ("position", pa.int32()), ("next_token", pa.int32()))
_VALUES = _schema(
    *_NEURON,
    ("polarity", pa.int8()),
    ("rank", pa.int16()),
    ("token", pa.int32()),
    ("logit", pa.float32()),
    ("probability", pa.float32()),
)

SCHEMAS: dict[str, pa.Schema] = {
    "neurons": _schema(
        *_NEURON,
        ("tokens", pa.int64()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("skewness", pa.float64()),
        ("kurtosis", pa.float64()),
        ("min", pa.float32()),
        ("max", pa.float32()),
        ("positive_fraction", pa.float64()),
        ("value_norm", pa.float32()),
        ("key_norm", pa.float32()),
        ("up_norm", pa.float32()),
        ("value_max_probability", pa.float32()),
        ("value_entropy", pa.float32()),
        ("key_tokens", pa.list_(pa.int32())),
        ("key_coefficients", pa.list_(pa.float32())),
        ("key_tokens_negative", pa.list_(pa.int32())),
        ("key_coefficients_negative", pa.list_(pa.float32())),
        null=["skewness", "kurtosis", "up_norm"],
    ),
    "histograms": _schema(*_NEURON, ("counts", pa.list_(pa.int64()))),
    "triggers": _schema(
        *_NEURON,
        ("polarity", pa.int8()),
        ("rank", pa.int16()),
        ("coefficient", pa.float32()),
        *_PLACE,
        ("gate_sign", pa.int8()),
        ("up_sign", pa.int8()),
        null=["next_token", "gate_sign", "up_sign"],
    ),
    "samples": _schema(
        *_NEURON, ("bin", pa.int16()), ("coefficient", pa.float32()), *_PLACE, null=["next_token"]
    ),
    "values": _VALUES,
    "values_by_token": _VALUES,
    "contexts": _schema(
        ("context", pa.int64()),
        ("document", pa.int64()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ),
    "documents": _schema(
        ("document", pa.int64()), ("title", pa.string()), ("metadata", pa.string()), null=["title"]
    ),
    "vocabulary": _schema(
        ("token", pa.int32()), ("text", pa.string()), ("bytes", pa.binary()), ("special", pa.bool_())
    ),
    "shards": _schema(
        ("shard", pa.int32()),
        ("layer", pa.int16()),
        ("contexts", pa.int64()),
        ("tokens", pa.int64()),
        ("sum", pa.float64()),
        ("sum_squares", pa.float64()),
        ("sum_cubes", pa.float64()),
        ("sum_fourths", pa.float64()),
    ),
}

# What each file is sorted by first, and so what can be looked up in it without reading the rest.
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("neurons", "histograms", "triggers", "samples", "values"), ("layer", "neuron")),
    "values_by_token": ("token",),
    "contexts": ("context",),
    "documents": ("document",),
    "vocabulary": ("token",),
    "shards": ("shard", "layer"),
}

# Rows per group: small enough that one key costs a millisecond, large enough that the footer stays small.
GROUP_ROWS = {"neurons": 4_096, "histograms": 256}
GROUP_ROWS_DEFAULT = 12_800


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column without nulls, not copied where that is possible.

    Not by `to_numpy`, which imports pandas where it is installed: a quarter of a second before the first neuron.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(whole)


def pack(rows: pa.Table, key: Sequence[str]) -> np.ndarray:
    """One sortable i64 per row from one key column, or from two (the first in the upper half)."""
    packed = np.zeros(rows.num_rows, np.int64)
    for column in key:
        packed = (packed << 32) | numbers(rows[column]).astype(np.int64)
    return packed
