"""Rows to documents: which columns are read of a table, and what is kept of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mnemoscope.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

Scalar = str | int | float | bool | None
Note = Callable[[str], None]  # told once of what is left out

TITLE = "title"
_NOT_SINGLE = (dict, list, tuple, set, bytes, bytearray)


@dataclass(frozen=True)
class Document:
    """One text with what is known of it. `title` says at least where it is ("notes.txt:120")."""

    text: str
    title: str
    metadata: dict[str, Scalar] = field(default_factory=dict)


def row_document(row: Mapping[str, Any], column: str, where: str, title: str) -> Document:
    """A row as a document. `where` is for error messages, `title` for rows without one."""
    if column not in row:
        raise no_column(column, row, where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"reading {where}: the column {column!r} holds a {type(text).__name__}, not text; {_CURE}",
            text=...,
        )
    metadata = {
        whole(str(key)): _scalar(value)
        for key, value in row.items()
        if key not in (column, TITLE) and not isinstance(value, _NOT_SINGLE)
    }
    own_title = row.get(TITLE)
    return Document(whole(text or ""), whole(str(own_title)) if own_title else title, metadata)


def table_documents(
    batches: Iterable[pa.RecordBatch], column: str, name: str, title: str, note: Note
) -> Iterator[Document]:
    """The rows of a table, a batch at a time; `name` is for messages, and `title` with a row number for titles."""
    number = 0
    for batch in batches:
        columns = {key: _values(key, batch.column(key), name, note) for key in batch.schema.names}
        kept = {key: values for key, values in columns.items() if values is not None}
        for row in range(batch.num_rows):
            values = {key: held[row] for key, held in kept.items()}
            yield row_document(values, column, f"{name}, row {number}", f"{title}:{number}")
            number += 1


def wanted(schema: pa.Schema, column: str, name: str, note: Note) -> list[str]:
    """The columns worth reading: the text, the title, and those with single values. CorpusError without the text."""
    names = schema.names
    if column not in names:
        raise no_column(column, names, f"{name}, row 0")
    if twice := [key for key in (column, TITLE) if names.count(key) > 1]:
        raise CorpusError(f"reading {name}: there are two columns {twice[0]!r}; rename one of them")
    single = [
        key for key in names if key in (column, TITLE) or _is_single(schema.field(names.index(key)).type)
    ]
    if left := [key for key in dict.fromkeys(names) if key not in single or names.count(key) > 1]:
        note(f"{name}: columns without a single value in each row are left out: {', '.join(map(repr, left))}")
    return [key for key in single if key not in left]


def no_column(column: str, names: Iterable[str], where: str) -> CorpusError:
    """That the text is missing, and what there is."""
    there = ", ".join(map(repr, names)) or "none"
    return CorpusError(
        f"reading {where}: there is no column {column!r}; there are {there}; {_CURE}", text=...
    )


_CURE = "name the column that holds the text ({text})"


def whole(text: str) -> str:
    """The text with lone surrogates, which JSON and file names can hold and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _scalar(value: Any) -> Scalar:
    """A single value as JSON can hold it; dates, decimals and infinities as text."""
    if isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return whole(str(value))


def _is_single(kind: Any) -> bool:
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    binary = (
        pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_fixed_size_binary(inner)
    )
    return not (pa.types.is_nested(inner) or binary)


def _values(key: str, column: pa.Array, name: str, note: Note) -> list[Any] | None:
    """A column as Python objects; as text where Python has none for it (years beyond 9999, nanoseconds)."""
    import pyarrow as pa

    temporal = pa.types.is_temporal(column.type) and "[ns" in str(column.type)
    if not temporal:
        try:
            return list(column.to_pylist())
        except (ValueError, OverflowError, ImportError, pa.ArrowException):
            pass
    try:
        return list(column.cast(pa.string()).to_pylist())
    except (ValueError, pa.ArrowException):
        note(f"{name}: the column {key!r} ({column.type}) is left out: its values cannot be read")
        return None
