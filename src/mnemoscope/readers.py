"""Files to documents: one reader for each format, streaming wherever the format allows it.

A reader yields `Document` records and raises `CorpusError` with the file and the place in it.

    .txt       a document for each block of lines between blank lines
    .jsonl     a document for each line (also .ndjson); one field is the text
    .json      a list of texts or of objects, or an object of them (its keys are the titles)
    .parquet   a document for each row; one column is the text

Text formats may be gzipped (.gz). In rows, a field ``title`` is the title, and every other single value is
metadata.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from mnemoscope.errors import CorpusError

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Document:
    """One text with what is known of it. `title` says at least where it is ("notes.txt:120")."""

    text: str
    title: str
    metadata: dict[str, Scalar] = field(default_factory=dict)


def read_file(path: Path, column: str) -> Iterator[Document]:
    """The documents of one file, in order; `column` names the text where the format has columns."""
    return _READERS[_format(path)](path, column)


def readable(path: Path) -> bool:
    """Whether the name of a file is of a known format."""
    return _format(path) in _READERS


def accepted() -> str:
    """The known formats, for messages."""
    return " ".join(_READERS) + " (the text formats also as .gz)"


def row_document(row: Mapping[str, Any], column: str, where: str, title: str) -> Document:
    """A row as a document. `where` is for error messages, `title` for rows without one."""
    if column not in row:
        raise CorpusError(
            f"reading {where}: there is no column {column!r}; there are {', '.join(map(repr, row))}; "
            "name the column that holds the text with text="
        )
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"reading {where}: the column {column!r} holds a {type(text).__name__}, not text; "
            "name the column that holds the text with text="
        )
    metadata = {
        str(key): _scalar(value)
        for key, value in row.items()
        if key not in (column, "title") and not isinstance(value, _NOT_SINGLE)
    }
    given = row.get("title")
    return Document(whole(text or ""), whole(str(given)) if given else title, metadata)


def whole(text: str) -> str:
    """The text with lone surrogates, which JSON can hold and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_NOT_SINGLE = (dict, list, tuple, bytes, bytearray)


def _scalar(value: Any) -> Scalar:
    """A single value as JSON can hold it; dates, decimals and infinities as text."""
    if isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return whole(str(value))


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_text(path: Path, column: str) -> Iterator[Document]:
    block: list[str] = []
    first = 0
    for number, line in _lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield Document("\n".join(block), f"{path.name}:{first}")
            block = []
    if block:
        yield Document("\n".join(block), f"{path.name}:{first}")


def _read_json_lines(path: Path, column: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"reading {where}: not JSON ({error}); each line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(
                f"reading {where}: a JSON {type(row).__name__}; each line must be one JSON object"
            )
        yield row_document(row, column, where, f"{path.name}:{number}")


def _read_json(path: Path, column: str) -> Iterator[Document]:
    """A .json file is read whole: the format has no other way."""
    text = "\n".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except ValueError as error:
        hint = "; one JSON object a line is the format .jsonl" if "Extra data" in str(error) else ""
        raise CorpusError(f"reading {path}: not JSON ({error}){hint}") from error
    if not isinstance(data, dict | list):
        raise CorpusError(
            f"reading {path}: neither a list nor an object of texts or rows; give one of the two"
        )
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, row in entries:
        where, title = f"{path}, entry {key!r}", key if isinstance(key, str) else f"{path.name}:{key}"
        row = {column: row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise CorpusError(
                f"reading {where}: a {type(row).__name__}; accepted are texts and objects with a text column"
            )
        yield row_document(row, column, where, whole(title))


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield row_document(row, column, f"{path}, row {number}", f"{path.name}:{number}")
                    number += 1
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(f"reading {path}: not a whole Parquet file ({reason}); write it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line; refuses what is not text, with the byte."""
    offset = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                if (nul := raw.find(b"\0")) >= 0:
                    raise CorpusError(
                        f"reading {path}: byte {offset + nul} is NUL, so it is a binary file (or UTF-16); "
                        "give text in UTF-8"
                    )
                mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                try:
                    line = raw[mark:].decode()
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"reading {path}: byte {offset + mark + error.start} is not UTF-8 ({error.reason}); "
                        "convert the file to UTF-8"
                    ) from error
                yield number, line.rstrip("\r\n")
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(
            f"reading {path}: not a whole gzip file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise CorpusError(
            f"reading {path}: {error.strerror or error}; give a file that can be read"
        ) from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")
