"""Files to documents: one reader for each format, streaming wherever the format allows it.

A reader yields `Document` records and raises `CorpusError` with the file and the place in it.

    .txt                a document for each block of lines between blank lines
    .tokens             as WikiText is kept: a document for each article, which begins with a line ``= title =``;
                        blocks where there is no such line
    .jsonl .ndjson      a document for each line; one field is the text
    .json               a list of texts or of objects, or an object of them (its keys are the titles)
    .csv .tsv           a document for each row; the first line names the columns, one of which is the text
    .parquet .arrow     a document for each row; one column is the text
    .md, source code    a document for each file, its name the title

Text formats may be gzipped (.gz). In rows, a field ``title`` is the title, and every other single value is metadata;
columns of lists, structures and bytes are not read.

Of a folder every file is read that holds data (all of the above but the last line), and where there is none every
text and source file. Hidden files are no text, and neither are those that describe a data set (README.md,
dataset_info.json ...); of a data set saved with `save_to_disk` the files that it names are read, and no caches.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mnemoscope.errors import CorpusError
from mnemoscope.text.tabular import Document, Note, row_document, table_documents, wanted, whole

_ROWS = 1024  # of a table that are read at once
# Characters of a field of a .csv: the library's own limit is shorter than many documents.
_LONGEST = 2**31 - 1
_TITLE = re.compile(r"= ([^=\s](?:.*[^=\s])?) =")  # of an article of WikiText; sections have more signs


def read_file(path: Path, column: str, note: Note = lambda _: None) -> Iterator[Document]:
    """The documents of one file, in order; `column` names the text where the format has columns.

    `note` is told, in a sentence, of columns that are left out.
    """
    return _READERS[_format(path)](path, column, note)


def readable(path: Path) -> bool:
    """Whether the name of a file is of a known format."""
    return _format(path) in _READERS


def is_one_text(path: Path) -> bool:
    """Whether a file of this name is one document as a whole."""
    return _format(path) not in _DATA


def accepted() -> str:
    """The known formats, for messages."""
    return f"{' '.join(_DATA)} .md, source code such as .py (the text formats also as .gz)"


def files_in(folder: Path, note: Note = lambda _: None) -> list[Path]:
    """The files of a folder that are read, sorted by path; `note` is told of formats that are not."""
    visible = [
        file
        for file in folder.rglob("*")
        if not any(name.startswith(".") for name in file.relative_to(folder).parts) and file.is_file()
    ]
    saved = {file.parent: _saved(file) for file in visible if file.name == "state.json"}
    texts = [
        file
        for file in visible
        if readable(file)
        and file.name.lower() not in _ABOUT
        and (saved.get(file.parent) is None or file.name in saved[file.parent])
    ]
    data = [file for file in texts if _format(file) in _DATA]
    if left := sorted({_format(file) for file in texts if file not in data} if data else ()):
        note(f"{whole(folder.name)}: files {' '.join(left)} beside the data are left out; a pattern such as "
             f"'{whole(folder.name)}/**/*{left[0]}' reads them")  # fmt: skip
    return sorted(data or texts, key=lambda file: file.relative_to(folder).as_posix())


_ABOUT = ("readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _saved(state: Path) -> list[str]:
    """The files that a data set saved with `save_to_disk` names."""
    try:
        return [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] not in ([".parquet"], [".arrow"]):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _name(path: Path) -> str:
    return whole(path.name)


def _read_text(path: Path, column: str, note: Note) -> Iterator[Document]:
    block: list[str] = []
    first = 0
    for number, line in _lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield Document("\n".join(block), f"{_name(path)}:{first}")
            block = []
    if block:
        yield Document("\n".join(block), f"{_name(path)}:{first}")


def _read_articles(path: Path, column: str, note: Note) -> Iterator[Document]:
    """WikiText: the lines of an article, blank ones too, from its title to the next; blocks where there is none."""
    lines: list[str] = []
    title, where = "", _name(path)
    for number, line in _lines(path):
        begins = _TITLE.fullmatch(line.strip())
        if lines and (begins or not (title or line.strip())):
            yield Document("\n".join(lines).rstrip(), title or where)
            lines = []
        if begins:
            title = begins[1]
        if lines or line.strip():
            where = where if lines else f"{_name(path)}:{number}"
            lines.append(line)
    if lines:
        yield Document("\n".join(lines).rstrip(), title or where)


def _read_whole(path: Path, column: str, note: Note) -> Iterator[Document]:
    """A file that is one text."""
    yield Document("\n".join(line for _, line in _lines(path)), _name(path))


def _parsed(text: str, where: str, cure: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise CorpusError(f"reading {where}: JSON nested too deeply to be read; flatten it") from error
    except ValueError as error:
        hint = "; one JSON object a line is the format .jsonl" if "Extra data" in str(error) else ""
        raise CorpusError(f"reading {where}: not JSON ({error}){cure or hint}") from error


def _read_json_lines(path: Path, column: str, note: Note) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{whole(str(path))}, line {number}"
        row = _parsed(line, where, "; each line must be one JSON object")
        if not isinstance(row, dict):
            raise CorpusError(
                f"reading {where}: a JSON {type(row).__name__}; each line must be one JSON object"
            )
        yield row_document(row, column, where, f"{_name(path)}:{number}")


def _read_json(path: Path, column: str, note: Note) -> Iterator[Document]:
    """A .json file is read whole: the format has no other way."""
    text = "\n".join(line for _, line in _lines(path))
    if not text.strip():
        return
    data = _parsed(text, whole(str(path)), "")
    if not isinstance(data, dict | list):
        raise CorpusError(
            f"reading {whole(str(path))}: neither a list nor an object of texts or rows; give one of the two"
        )
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, row in entries:
        where = f"{whole(str(path))}, entry {key!r}"
        title = key if isinstance(key, str) else f"{_name(path)}:{key}"
        row = {column: row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise CorpusError(
                f"reading {where}: a {type(row).__name__}; accepted are texts and objects with a text column"
            )
        yield row_document(row, column, where, whole(title))


def _read_csv(path: Path, column: str, note: Note) -> Iterator[Document]:
    before = csv.field_size_limit(_LONGEST)
    try:
        yield from _read_rows(path, column, "\t" if _format(path) == ".tsv" else ",")
    finally:
        csv.field_size_limit(before)


def _read_rows(path: Path, column: str, delimiter: str) -> Iterator[Document]:
    name, rows = (
        whole(str(path)),
        csv.reader((f"{line}\n" for _, line in _lines(path)), delimiter=delimiter, strict=True),
    )
    header: list[str] | None = None
    while True:
        first = rows.line_num + 1
        where = f"{name}, line {first}"
        try:
            fields = next(rows, None)
        except csv.Error as error:
            raise CorpusError(
                f"reading {where}: not {path.suffix[1:].upper()} ({error}); put fields that hold a comma, a quote or "
                "a line end into quotes"
            ) from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            continue
        if len(fields) != len(header):
            raise CorpusError(
                f"reading {where}: {len(fields)} fields under {len(header)} columns; put fields that hold a "
                f"{'tab' if delimiter == chr(9) else 'comma'} into quotes"
            )
        yield row_document(dict(zip(header, fields, strict=True)), column, where, f"{_name(path)}:{first}")


def _read_parquet(path: Path, column: str, note: Note) -> Iterator[Document]:
    import pyarrow.parquet as pq

    name = whole(str(path))
    with _opened(path, "Parquet") as handle, pq.ParquetFile(handle) as file:
        columns = wanted(file.schema_arrow, column, name, note)
        batches = file.iter_batches(batch_size=_ROWS, columns=columns)
        yield from table_documents(batches, column, name, _name(path), note)


def _read_arrow(path: Path, column: str, note: Note) -> Iterator[Document]:
    """The stream that `datasets` writes, or a file of Feather's second version."""
    name = whole(str(path))
    with _opened(path, "Arrow") as handle:
        table = _arrow_batches(handle)
        columns = wanted(table.schema, column, name, note)
        batches = (batch.select(columns) for batch in _parts(table))
        yield from table_documents(batches, column, name, _name(path), note)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[IO[bytes]]:
    """A file of tables, open; by handle, because pyarrow takes no name that is not UTF-8."""
    import pyarrow as pa

    try:
        with path.open("rb") as handle:
            yield handle
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"reading {whole(str(path))}: not a whole {kind} file ({reason}); write it again"
        ) from error


def _arrow_batches(handle: IO[bytes]) -> Any:
    import pyarrow as pa

    is_file = handle.read(6) == b"ARROW1"
    handle.seek(0)
    return pa.ipc.open_file(handle) if is_file else pa.ipc.open_stream(handle)


def _parts(reader: Any) -> Iterator[Any]:
    """Batches of either kind of reader, none of them large."""
    count = getattr(reader, "num_record_batches", None)
    batches = reader if count is None else map(reader.get_batch, range(count))
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


_Reader = Callable[[Path, str, Note], Iterator[Document]]

_DATA: dict[str, _Reader] = {
    ".txt": _read_text,
    ".tokens": _read_articles,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_SOURCES = (
    ".md .markdown .rst .tex .html .py .pyi .js .mjs .jsx .ts .tsx .java .kt .scala .c .h .cpp .cc .hpp .cs .go .rs "
    ".rb .php .swift .m .r .jl .lua .pl .sh .sql .hs .ml .ex .erl .clj .lisp .css .yaml .yml .toml"
)
_READERS: dict[str, _Reader] = _DATA | dict.fromkeys(_SOURCES.split(), _read_whole)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line; refuses what is not text, with the byte."""
    offset, name = 0, whole(str(path))
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                if (nul := raw.find(b"\0")) >= 0:
                    raise CorpusError(
                        f"reading {name}: byte {offset + nul} is NUL, so it is a binary file (or UTF-16); "
                        "give text in UTF-8"
                    )
                mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                try:
                    line = raw[mark:].decode()
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"reading {name}: byte {offset + mark + error.start} is not UTF-8 ({error.reason}); "
                        "convert the file to UTF-8"
                    ) from error
                yield number, line.rstrip("\r\n")
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(
            f"reading {name}: not a whole gzip file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise CorpusError(
            f"reading {name}: {error.strerror or error}; give a file that can be read"
        ) from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")
