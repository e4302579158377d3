"""What a user may give as a text, and what it is then: how its documents are read, and what identifies it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mnemoscope import files
from mnemoscope.errors import CorpusError, RemoteError
from mnemoscope.location import Location, is_url, place
from mnemoscope.records import Progress
from mnemoscope.text.readers import accepted, files_in, is_one_text, read_file, readable
from mnemoscope.text.samples import SAMPLES, corpus_file
from mnemoscope.text.tabular import Document, Note, row_document, table_documents, wanted, whole

MOST_BYTES = 32 << 30  # of copies of what is behind URLs; those that were used longest ago make room
SHUFFLE = {"seed": 0, "buffer": 10_000}  # of a data set that is streamed up to a limit
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/\s]*){0,2}")
_GLOB = "*?["
Report = Callable[[Progress], None]

_SHOWN = 200  # characters of a path that are quoted; a text that was given in place of one is longer
_ROWS = 1024  # of a table that are made documents at once


@dataclass(frozen=True)
class Source:
    """A text as it was given.

    id        a name for it
    column    of the text, where it has columns
    open      its documents, from the first, each time it is called
    identify  what tells it from any other text, as JSON holds it
    drawn     its documents in a drawn order, where they cannot be counted first; None where they can
    notes     what was left out of it, in sentences; grows as it is read
    """

    id: str
    column: str
    open: Callable[[], Iterator[Document]] = field(repr=False)
    identify: Callable[[], dict[str, Any]] = field(repr=False)
    drawn: Callable[[], Iterator[Document]] | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list, repr=False, compare=False)


class _Notes(list[str]):
    """Sentences that say what was left out, each once."""

    def __call__(self, sentence: str) -> None:
        if sentence not in self:
            self.append(sentence)


def resolve(source: Any, column: str, report: Report = lambda _: None) -> Source:
    """What is meant by a path, an id, or an object that holds texts; CorpusError if nothing can be.

    report  told of what is fetched
    """
    if isinstance(source, os.PathLike) or (isinstance(source, str) and is_url(source)):
        named = place(source)
        return _fetched(named, column, report) if isinstance(named, Location) else _files(named, column)
    if not isinstance(source, str):
        return _held(source, column)
    source = str(source)  # of NumPy's kind of text, too
    if source.startswith("sample:"):
        return _sample(source, column)
    if source == "-":
        return _stdin(column)
    path = files.expanded(source)
    meant = source.startswith(("~", ".", "/")) or readable(path)  # a path, whether there is one or not
    if os.path.exists(path) or any(mark in source for mark in _GLOB) or meant:  # noqa: PTH110 - any text is given
        return _files(path, column)
    if _DATASET.fullmatch(source):
        return _dataset(source, column)
    raise _missing(source)


def _missing(source: str) -> CorpusError:
    """Nothing of that name: a path that is wrong, or a text in place of one."""
    text = "\n" in source or " " in source or len(source) > 255
    cure = (
        "; a path is expected: to give a text itself, put it into a list"
        if text
        else "; give a path that exists"
    )
    return CorpusError(f"reading {_short(source)}: there is no such file or folder{cure}")


def _short(source: str) -> str:
    return _named(source if len(source) <= _SHOWN else source[: _SHOWN - 1] + "…")


def _named(path: Path | str) -> str:
    """A path in a message of one line."""
    shown = whole(str(path))
    return shown if shown.isprintable() else repr(shown)


# -- files -------------------------------------------------------------------------------------------------


def _files(path: Path, column: str) -> Source:
    notes = _Notes()
    try:
        base, paths = _matching(path, notes)
    except (OSError, ValueError) as error:  # a name too long, or one that no file can have
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise CorpusError(
                f"reading {_named(path)}: {error.strerror}; give a path that can be read"
            ) from error
        raise _missing(str(path)) from error

    base, paths = base.absolute(), [file.absolute() for file in paths]  # wherever the process goes meanwhile

    def identify() -> dict[str, Any]:
        held = [{"name": whole(_below(file, base)), "sha256": files.sha256(file)} for file in paths]
        return {"kind": "files", "files": held, "column": column}

    def documents() -> Iterator[Document]:
        for file in paths:
            for document in read_file(file, column, notes):
                yield replace(document, title=whole(_below(file, base))) if is_one_text(file) else document

    return Source(whole(path.name), column, documents, identify, notes=notes)


def _fetched(url: Location, column: str, report: Report) -> Source:
    """Files behind a URL, which are read from a copy in the cache folder: a text is read several times."""
    try:
        listed = url.below()
        base = url if str(url) not in map(str, listed) else url.parent
        while any(mark in base.name for mark in _GLOB):
            base = base.parent
        facts = [str(url), *(f"{file} {file.size} {file.version}" for file in listed)]
        kept = files.cache_folder() / "texts" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:40]
        folder = kept / (base.name or "text")
        with files.refusals(f"keeping a copy of {url} in {kept}", "see to it that it can be written to"):
            wanted = _missing_of(listed, base, folder)
            if wanted:
                _check_room(url, sum(max(0, file.size) for file in wanted.values()))
                _fetch(wanted, report)
            if wanted and url.below() != listed:  # parts of two versions make no text
                for target in wanted:
                    target.unlink()
                raise CorpusError(
                    f"reading {url}: it was changed while it was read; give the same command again"
                )
            kept.mkdir(parents=True, exist_ok=True)
            files.keep(kept / files.ABOUT, json.dumps({"url": str(url)}).encode())
    except RemoteError as error:
        raise CorpusError(str(error)) from error
    if not listed:
        raise CorpusError(f"reading {url}: there is nothing of that name; give a URL of files that exist")
    if not folder.exists():
        raise CorpusError(f"reading {url}: no file there can be read; accepted are {accepted()}")
    return replace(_files(folder / url.url.removeprefix(base.url).lstrip("/"), column), id=whole(url.name))


def _missing_of(listed: Sequence[Location], base: Location, folder: Path) -> dict[Path, Location]:
    """What is to be fetched into a folder, by where it is to lie there."""
    wanted = {}
    for file in listed:
        target = folder / file.url.removeprefix(f"{base.url}/")
        if ".." in target.relative_to(folder).parts:
            raise CorpusError(f"reading {base}: {file} would lie outside of the copy; name it otherwise")
        if (readable(target) or target.name == "state.json") and not target.exists():
            wanted[target] = file
    return wanted


def _check_room(url: Location, size: int) -> None:
    """Make room for so many bytes, as far as other copies may go; CorpusError where there is none."""
    kept = files.cache_folder() / "texts"
    kept.mkdir(parents=True, exist_ok=True)
    files.make_room(kept, max(0, MOST_BYTES - size))
    if size > (free := shutil.disk_usage(kept).free):
        raise CorpusError(
            f"reading {url}: it is read from a copy, of {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{kept}; give some of its files (a pattern), or another folder in MNEMOSCOPE_CACHE"
        )


def _fetch(wanted: Mapping[Path, Location], report: Report) -> None:
    total, done = sum(max(0, file.size) for file in wanted.values()), 0

    def tell(more: int) -> None:
        report(Progress("fetching", done + more, total, "bytes"))

    for target, file in wanted.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target, "keeping a copy of a text") as partial:
            file.fetch(partial, tell)
        done += max(0, file.size)
    tell(0)


def _below(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix()


def _matching(path: Path, note: Note) -> tuple[Path, list[Path]]:
    """(folder they are named from, sorted files) of a file, folder or glob."""
    if path.is_dir():
        if not (paths := files_in(path, note)):
            raise CorpusError(
                f"reading the folder {_named(path)}: no file in it can be read; accepted are {accepted()}"
            )
        return path, paths
    if path.exists():
        base, paths = path.parent, [path]
    else:
        fixed = next((n for n, name in enumerate(path.parts) if any(mark in name for mark in _GLOB)), None)
        if fixed is None:
            raise _missing(str(path))
        base = Path(*path.parts[:fixed])
        paths = sorted(file for file in base.glob(str(Path(*path.parts[fixed:]))) if file.is_file())
        if not paths:
            raise CorpusError(
                f"reading {_named(path)}: no file matches; put the pattern in quotes, and check the folder"
            )
    for file in paths:
        if not file.is_file():
            raise CorpusError(
                f"reading {_named(file)}: it is no ordinary file, and a text is read more than once; write it to one, "
                "or give - for standard input"
            )
        if not readable(file):
            raise CorpusError(
                f"reading {_named(file)}: a file named *{file.suffix} is not known; accepted are {accepted()}"
            )
    return base, paths


def _sample(source: str, column: str) -> Source:
    path = corpus_file(name := source.removeprefix("sample:"))
    pin = SAMPLES[name]
    column = "extract" if column == "text" else column
    identity = {
        "kind": "sample",
        "wheel": f"{pin.wheel}=={pin.version}",
        "sha256": pin.sha256,
        "column": column,
    }
    return Source(source, column, lambda: read_file(path, column), lambda: identity)


def _stdin(column: str) -> Source:
    """Standard input as text, kept in a file that goes with the process: it is read more than once."""
    with files.refusals("reading standard input", "give a file", error=CorpusError):
        folder = tempfile.TemporaryDirectory(prefix="mnemoscope-")
        path = Path(folder.name) / "stdin.txt"
        with path.open("wb") as spool:
            while block := sys.stdin.buffer.read(1 << 20):
                spool.write(block)

    def documents() -> Iterator[Document]:
        return read_file(Path(folder.name) / "stdin.txt", column)  # which keeps the folder

    return Source("-", column, documents, lambda: {"kind": "stdin", "sha256": files.sha256(path)})


# -- what a program holds ----------------------------------------------------------------------------------


def _held(holder: Any, column: str) -> Source:
    """Texts, or a table that has them in a column. What can be read only once, or holds several texts, is refused."""
    kind = type(holder).__name__
    if isinstance(holder, Mapping):
        names = ", ".join(repr(str(name)) for name in list(holder)[:6])
        several = any(hasattr(value, "column_names") for value in holder.values())
        cure = (
            f"give one of its splits: {names}"
            if several
            else f"give a list of its texts, those of one of its columns: {names}"
        )
        raise CorpusError(f"loading a corpus: {_of_type(kind)} is not one text; {cure}")
    if (table := _table(holder)) is not None:
        return _of_table(table, kind, column)
    refusal = {
        "bytes": (isinstance(holder, bytes | bytearray | memoryview), "decode it, and put the text into a list"),
        "set": (isinstance(holder, set | frozenset), "it has no order; give sorted(...) of it"),
        "file": (hasattr(holder, "readable"), "give the path of the file"),
        "stream": (hasattr(holder, "__next__") or hasattr(holder, "_ex_iterable"), "it can be read only once, or is "
                   "streamed; give a list of it, a Dataset, or the id of the data set"),
    }  # fmt: skip
    for refused, cure in refusal.values():
        if refused:
            raise CorpusError(f"loading a corpus: {_of_type(kind)} is not a text; {cure}")
    return _texts(holder, column)


def _of_type(kind: str) -> str:
    return "None" if kind == "NoneType" else f"an object of type {kind}"


def _texts(texts: Iterable[Any], column: str) -> Source:
    kind = type(texts).__name__
    try:
        held = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)
    except TypeError as error:
        raise CorpusError(
            f"loading a corpus: {_of_type(kind)} is not a text; give a path, a data set id, texts or a table of them"
        ) from error
    documents = [_document(item, index, column) for index, item in enumerate(held)]
    return Source(
        f"{len(documents)} texts",
        column,
        lambda: iter(documents),
        lambda: {"kind": "texts", "texts": len(documents), "sha256": _digest(documents)},
    )


def _document(item: Any, index: int, column: str) -> Document:
    """A text, a row with a column of that name, or a document as it is."""
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document(whole(str(item)), f"text {index}")  # NumPy's kind of text is a str, too
    if isinstance(item, Mapping):
        return row_document(item, column, f"a list of rows, item {index}", f"row {index}")
    raise CorpusError(
        f"loading a list of texts: item {index} is a {type(item).__name__}; each must be a string, or a row (a dict) "
        f"with the column {column!r}"
    )


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(asdict(document), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _table(holder: Any) -> Any | None:
    """A table of Arrow, pandas, polars or datasets, as one of Arrow or of datasets; None for anything else."""
    import pyarrow as pa

    module = type(holder).__module__.partition(".")[0]
    if isinstance(holder, pa.Table):
        return holder
    if isinstance(holder, pa.RecordBatch):
        return pa.table(holder)
    if module == "pandas" and hasattr(holder, "columns"):
        return _of_pandas(holder)
    if module == "polars" and hasattr(holder, "collect_schema"):
        return holder.lazy().collect().to_arrow()
    if module == "datasets" and hasattr(holder, "with_format") and hasattr(holder, "num_rows"):
        return holder.with_format("arrow")
    return None


def _of_pandas(frame: Any) -> Any:
    """Column by column: one of mixed objects becomes text, as it would be written."""
    import pyarrow as pa

    columns = {}
    for index, name in enumerate(map(str, frame.columns)):
        series = frame.iloc[:, index]
        try:
            columns[name] = pa.Array.from_pandas(series)
        except pa.ArrowException:
            columns[name] = pa.array([None if value is None else str(value) for value in series], pa.string())
    return pa.table(columns)


def _of_table(table: Any, kind: str, column: str) -> Source:
    notes, name = _Notes(), f"a {kind}"
    saved = hasattr(table, "features")  # of datasets
    schema = table.features.arrow_schema if saved else table.schema
    columns = wanted(schema, column, name, notes)

    def documents() -> Iterator[Document]:
        chosen = table.select_columns(columns) if saved else table.select(columns)
        batches = (
            (batch for rows in chosen.iter(_ROWS) for batch in rows.to_batches())
            if saved
            else iter(chosen.to_batches(max_chunksize=_ROWS))
        )
        return table_documents(batches, column, name, "row", notes)

    rows = len(table)
    return Source(
        f"{kind} of {rows} rows",
        column,
        documents,
        lambda: {"kind": "table", "rows": rows, "column": column, "sha256": _digest(documents())},
        notes=notes,
    )


# -- the hub -----------------------------------------------------------------------------------------------


def _dataset(source: str, column: str) -> Source:
    name, *rest = source.split(":")
    configuration, split = (rest[0] or None if rest else None), (rest[1] if rest[1:] else "train")
    doing = f"opening the data set {source!r} (there is no such file)"
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError as error:
        raise CorpusError(
            f"{doing}: Hugging Face data sets need the datasets library; pip install 'mnemoscope[datasets]'"
        ) from error
    try:
        revision = HfApi().dataset_info(name).sha  # pinned, so that reading twice reads the same
        rows = load_dataset(name, configuration, split=split, revision=revision, streaming=True)
    except Exception as error:  # the libraries raise dozens of kinds, and none that they promise
        raise _unreachable(doing, error) from error

    def documents(rows: Iterable[Any] = rows) -> Iterator[Document]:
        stream = enumerate(rows)
        while True:
            try:
                index, row = next(stream)
            except StopIteration:
                return
            except Exception as error:  # as above
                raise _unreachable(f"streaming the data set {source!r}", error) from error
            yield row_document(row, column, f"the data set {source}, row {index}", f"{name}:{index}")

    identity = {
        "kind": "dataset",
        "id": name,
        "configuration": configuration,
        "split": split,
        "revision": revision,
    }
    return Source(
        source,
        column,
        documents,
        lambda: identity | {"column": column},
        drawn=lambda: documents(rows.shuffle(seed=SHUFFLE["seed"], buffer_size=SHUFFLE["buffer"])),
    )


def _unreachable(doing: str, error: Exception) -> CorpusError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CorpusError(f"{doing}: {reason}; check the id, and the network, or give a local file")
