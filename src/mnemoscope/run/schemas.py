"""What a run directory holds, read from tables.txt: the columns of every table, and the order that makes it searchable.

TABLES["triggers"].columns[4]     # Column(name='coefficient', dtype='f32', unit='coefficient', null='never', ...)
SCHEMAS["triggers"]               # the same columns as Arrow takes them
KEYS["triggers"]                  # ('layer', 'neuron')
arrow_table("triggers", columns)  # rows of it, from arrays, tensors or series
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

MANIFEST = "manifest.json"
WORK = ".work"
ADDING = ".adding"

# DuckDB fetches extensions by itself unless told not to.
OFFLINE: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}

_ARROW = {
    "i8": pa.int8(),
    "i16": pa.int16(),
    "i32": pa.int32(),
    "i64": pa.int64(),
    "f32": pa.float32(),
    "f64": pa.float64(),
    "str": pa.string(),
    "bytes": pa.binary(),
    "bool": pa.bool_(),
}
_NEVER = "never"
_SCALAR = (str, bytes, bool, int, float, np.generic)


class Column(NamedTuple):
    """A column as tables.txt describes it."""

    name: str
    dtype: str  # a key of `_ARROW`, or list<...> of one
    unit: str
    null: str  # when it is null; "never"
    meaning: str

    @property
    def field(self) -> pa.Field:
        """The column as Arrow takes it."""
        of_list = re.fullmatch(r"list<(\w+)>", self.dtype)
        dtype = pa.list_(_ARROW[of_list[1]]) if of_list else _ARROW[self.dtype]
        return pa.field(self.name, dtype, nullable=self.null != _NEVER)


@dataclass
class Table:
    """A table as tables.txt describes it."""

    name: str
    meaning: str  # one sentence
    key: tuple[str, ...] = ()  # what it is sorted by first, and can be looked up by without reading the rest
    then: str = ""  # what it is sorted by after that
    added: str = ""  # how to come by it; empty when every run has it
    notes: list[str] = field(default_factory=list)  # lines of text
    columns: list[Column] = field(default_factory=list)


def _tables(text: str) -> Iterator[Table]:
    """What tables.txt says; its head explains the form."""
    _, *parts = re.split(r"^\[(\w+)\]\n", text, flags=re.M)
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        meaning, *lines = filter(None, content.splitlines())
        table = Table(name, meaning)
        for line in lines:
            if attribute := re.fullmatch(r"(key|then|added): (.+)", line):
                value = tuple(attribute[2].split(", ")) if attribute[1] == "key" else attribute[2]
                setattr(table, attribute[1], value)
            elif re.match(r"\w+ +\| ", line):
                table.columns.append(Column(*(cell.strip() for cell in line.split(" | ", 4))))
            else:
                table.notes.append(line)
        yield table


TABLES = {
    table.name: table for table in _tables(Path(__file__).with_name("tables.txt").read_text(encoding="utf-8"))
}
SCHEMAS: dict[str, pa.Schema] = {
    name: pa.schema([column.field for column in table.columns]) for name, table in TABLES.items()
}
KEYS = {name: table.key for name, table in TABLES.items()}
OPTIONAL = {name: table.added for name, table in TABLES.items() if table.added}

CONTRIBUTIONS = tuple(name for name in TABLES if name.startswith(("contribution_", "cross_")))
CASES = tuple(name for name in TABLES if name.startswith("case_"))

# Rows per group: small enough that one key costs a millisecond, large enough that the footer stays small.
GROUP_ROWS = {
    "neurons": 512,
    "histograms": 64,
    "null_neurons": 4_096,
    "null_histograms": 256,
    "pattern_tests": 512,
}
GROUP_ROWS_DEFAULT = 12_800


def arrow_table(name: str, columns: Mapping[str, Any], *, partial: bool = False) -> pa.Table:
    """Rows of table `name` from its columns, by name and in any order.

    columns  arrays, tensors, series or lists with a value for each row; a matrix, whose rows become lists; or one value
             for all rows. Null becomes what a masked array masks and, where the column may be null, NaN
    partial  whether to make the columns that are given and no others; else those that are missing are null
    """
    schema = SCHEMAS[name]
    assert columns.keys() <= set(schema.names), (name, columns.keys() - set(schema.names))
    fields = [field for field in schema if not partial or field.name in columns]
    lengths = (len(values) for values in columns.values() if not isinstance(values, (*_SCALAR, type(None))))
    length = next(lengths, 1)
    arrays = [_arrow_array(columns.get(field.name), field, length) for field in fields]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _arrow_array(values: Any, field: pa.Field, length: int) -> pa.Array:
    if values is None:
        assert field.nullable, field.name
        return pa.nulls(length, field.type)
    if isinstance(values, _SCALAR):
        return pa.repeat(pa.scalar(values, field.type), length)
    if isinstance(values, pl.Series):
        may_be_nan = field.nullable and values.dtype.is_float()
        return (values.fill_nan(None) if may_be_nan else values).to_arrow().cast(field.type)
    if isinstance(values, list | tuple):
        return pa.array(values, field.type)
    values = np.asanyarray(values)  # keeps a mask; of a tensor the numbers
    if values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()).cast(field.type.value_type))
    data, null = np.ma.getdata(values), None
    if field.nullable:
        null = np.ma.getmaskarray(values) | (np.isnan(data) if data.dtype.kind == "f" else False)
    return pa.array(data, field.type if data.dtype == object else None, mask=null).cast(field.type)


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
