"""Text -> documents -> contexts -> shards of fixed batches.

`load_corpus` says which text and how it is cut; `write_plan` tokenizes it once into a `Plan`, which from
then on hands out the same batches to whoever asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mnemoscope import files
from mnemoscope import segment as cut
from mnemoscope.errors import CorpusError
from mnemoscope.plan import BATCH_TOKENS, SHARD_TOKENS, Plan, PlanWriter, Units
from mnemoscope.readers import Document, accepted, read_file, readable, row_document, whole
from mnemoscope.records import Progress
from mnemoscope.samples import SAMPLES, corpus_file, file_sha256
from mnemoscope.spelling import Fidelity
from mnemoscope.tokenizer import changes_text, encode, frame, special_ids

__all__ = [
    "BATCH_TOKENS",
    "CONTEXT_TOKENS",
    "SHARD_TOKENS",
    "Corpus",
    "Document",
    "Plan",
    "load_corpus",
    "write_plan",
]

CONTEXT_TOKENS = BATCH_TOKENS  # a context is no longer than a batch, however much a model could take
WINDOW = 256  # tokens of a context with segment="window"

_SEGMENTS = "document, sentence, sentence:spacy, window or window:N (N tokens, at least 8)"
_CHUNK = 1 << 19  # characters that are tokenized at once: enough to keep the tokenizer busy
_FRAMED = 8  # texts of each chunk that are also tokenized with their special tokens


@dataclass(frozen=True)
class Corpus:
    """Which text, and how it is cut into contexts. Made by `load_corpus`; holds no text itself."""

    id: str
    segment: str
    limit: int | None  # tokens, in whole documents
    text_column: str
    _open: Callable[[], Iterator[Document]] = field(repr=False)
    _identify: Callable[[], dict[str, Any]] = field(repr=False)

    @property
    def documents(self) -> Iterator[Document]:
        """All documents that hold any text, in order; a fresh iterator every time."""
        return (document for document in self._open() if document.text and not document.text.isspace())

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the text: files with their sha256, a data set with its revision, or a hash."""
        return self._identify()


def load_corpus(
    source: str | os.PathLike[str] | Sequence[str] | Sequence[Document],
    *,
    segment: str = "document",
    limit: int | None = None,
    text: str = "text",
) -> Corpus:
    """Say which text to use; raises `CorpusError` at once when it cannot be read or holds none.

    source   "sample:wikipedia"; a .txt, .jsonl, .json or .parquet file (see `readers`), a folder (every
             readable file in it, sorted by path) or a glob of them; a list of texts or of `Document`; or
             the id of a Hugging Face data set as ``id[:configuration[:split]]``, which is streamed
    segment  what becomes one context: "document"; "sentence" (built-in rules) or "sentence:spacy"; "window"
             (of 256 tokens) or "window:N". What is longer than the model's context is cut into equal windows
    limit    stop before this many tokens are exceeded, at the end of a document
    text     name of the column that holds the text
    """
    if limit is not None and limit < 1:
        raise CorpusError(
            f"loading a corpus: limit={limit} leaves no token; give a positive number of tokens, or None"
        )
    _check_segment(segment)
    name, column, opening, identify = _resolve(source, text)
    corpus = Corpus(name, segment, limit, column, opening, identify)
    if next(corpus.documents, None) is None:
        raise CorpusError(f"loading the corpus {name}: it holds no text; give one with at least one document")
    return corpus


def _check_segment(segment: str) -> None:
    kind, _, size = segment.partition(":")
    known = segment in ("document", "sentence", "sentence:spacy", "window")
    if not known and not (kind == "window" and size.isdecimal() and int(size) >= 8):
        raise CorpusError(f"loading a corpus: segment={segment!r} is not known; accepted are {_SEGMENTS}")
    if segment == "sentence:spacy":
        cut.spacy_sentences()


_Resolved = tuple[str, str, Callable[[], Iterator[Document]], Callable[[], dict[str, Any]]]


def _resolve(source: Any, column: str) -> _Resolved:
    """(id, text column, how to open, how to identify) of a source."""
    if isinstance(source, os.PathLike):
        return _files(Path(source), column)
    if not isinstance(source, str):
        return _texts(source, column)
    if source.startswith("sample:"):
        return _sample(source, column)
    path = files.expanded(source)
    dataset = source.count("/") <= 1 and not path.is_absolute() and not readable(path)
    if path.exists() or any(mark in source for mark in "*?[") or not dataset or source.startswith(("~", ".")):
        return _files(path, column)
    return _dataset(source, column)


def _texts(texts: Any, column: str) -> _Resolved:
    try:
        held = list(texts)
    except TypeError as error:
        raise CorpusError(
            f"loading a corpus: a {type(texts).__name__} is none; give a path, a data set id or texts"
        ) from error
    documents = []
    for index, item in enumerate(held):
        if not isinstance(item, str | Document):
            raise CorpusError(
                f"loading a list of texts: item {index} is a {type(item).__name__}; each must be a string"
            )
        documents.append(Document(whole(item), f"text {index}") if isinstance(item, str) else item)

    def identify() -> dict[str, Any]:
        digest = hashlib.sha256()
        for document in documents:
            digest.update(json.dumps(asdict(document), sort_keys=True).encode() + b"\n")
        return {"kind": "texts", "texts": len(documents), "sha256": digest.hexdigest()}

    return f"{len(documents)} texts", column, lambda: iter(documents), identify


def _sample(source: str, column: str) -> _Resolved:
    path = corpus_file(name := source.removeprefix("sample:"))
    pin = SAMPLES[name]
    column = "extract" if column == "text" else column
    identity = {
        "kind": "sample",
        "wheel": f"{pin.wheel}=={pin.version}",
        "sha256": pin.sha256,
        "column": column,
    }
    return source, column, lambda: read_file(path, column), lambda: identity


def _files(path: Path, column: str) -> _Resolved:
    base, paths = _matching(path)

    def identify() -> dict[str, Any]:
        files = [{"name": file.relative_to(base).as_posix(), "sha256": file_sha256(file)} for file in paths]
        return {"kind": "files", "files": files, "column": column}

    return path.name, column, lambda: (doc for file in paths for doc in read_file(file, column)), identify


def _matching(path: Path) -> tuple[Path, list[Path]]:
    """(folder they are named from, sorted files) of a file, folder or glob."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and readable(file)]
        visible = [
            file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not visible:
            raise CorpusError(
                f"reading the folder {path}: no file in it can be read; accepted are {accepted()}"
            )
        return path, sorted(visible, key=lambda file: file.relative_to(path).as_posix())
    if path.exists():
        base, paths = path.parent, [path]
    else:
        fixed = next((n for n, part in enumerate(path.parts) if any(mark in part for mark in "*?[")), None)
        if fixed is None:
            raise CorpusError(f"reading {path}: there is no such file or folder; give a path that exists")
        base = Path(*path.parts[:fixed])
        paths = sorted(file for file in base.glob(str(Path(*path.parts[fixed:]))) if file.is_file())
        if not paths:
            raise CorpusError(
                f"reading {path}: no file matches; put the pattern in quotes, and check the folder"
            )
    for file in paths:
        if not readable(file):
            raise CorpusError(
                f"reading {file}: a file named *{file.suffix} is not known; accepted are {accepted()}"
            )
    return base, paths


def _dataset(source: str, column: str) -> _Resolved:
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

    def documents() -> Iterator[Document]:
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
    return source, column, documents, lambda: identity | {"column": column}


def _unreachable(doing: str, error: Exception) -> CorpusError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CorpusError(f"{doing}: {reason}; check the id, and the network, or give a local file")


def write_plan(
    corpus: Corpus,
    tokenizer: Any,
    folder: Path,
    *,
    context_length: int,
    report: Callable[[Progress], None] | None = None,
) -> Plan:
    """Tokenize a corpus into a plan in `folder`; the same input always gives the same bytes.

    `tokenizer`: a Hugging Face tokenizer. Every context begins with the special tokens that it puts before
    a text (and ends with those it puts after), windows from the middle of a document too. `start` counts a
    document's own tokens before the context. Contexts of one token are left out (position 0 does not
    count), and so are contexts whose tokens were seen before. A first document longer than the limit gives
    the contexts that fit, at least one. `report` hears tokens of the limit (0 without one). ``plan.json``
    is written last; under ``corpus`` it says whether tokens spell the text. Raises `CorpusError`, `ModelError` for a
    tokenizer that changes a text when it adds special tokens, and `RunError` when the folder cannot be written.
    """
    before, after = frame(tokenizer)
    room = context_length - len(before) - len(after)
    if room < 3:
        raise CorpusError(
            f"planning {corpus.id}: a context of {context_length} tokens is too short; at least 8 are needed"
        )
    kind, _, size = corpus.segment.partition(":")
    if kind == "window":
        room = min(room, (int(size) if size else WINDOW) - len(before) - len(after))
    doing = f"writing the plan of {corpus.id} into {folder}"
    with files.refusals(doing, "choose a folder that can be written to"), ExitStack() as opened:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").unlink(missing_ok=True)
        writer = PlanWriter(folder, special_ids(tokenizer))
        opened.callback(writer.close)
        fidelity = Fidelity(tokenizer)
        for document, units in _tokenized(corpus, tokenizer, fidelity):
            contexts = [
                (start + left, [*before, *unit[left:right], *after])
                for start, unit in units
                for left, right in cut.windows(len(unit), max(room, 3))
            ]
            more = writer.add(document.title, document.metadata, contexts, corpus.limit)
            if report is not None:
                report(Progress("planning", writer.tokens, corpus.limit or 0, "tokens"))
            if not more:
                break
        if not writer.contexts:
            raise CorpusError(f"planning {corpus.id}: no context has two tokens; give longer texts")
        if report is not None:
            report(Progress("planning", writer.tokens, writer.tokens, "tokens"))
        about = {"id": corpus.id, "source": corpus.source, "segment": corpus.segment, "limit": corpus.limit}
        about["spelling"] = fidelity.sentence
        return writer.finish(about, context_length)


def _tokenized(corpus: Corpus, tokenizer: Any, fidelity: Fidelity) -> Iterator[tuple[Document, Units]]:
    """Each document with its units (the document, or its sentences): (tokens before it, its tokens)."""
    split: cut.Splitter = {"sentence": cut.sentences}.get(corpus.segment, lambda text: [text])
    if corpus.segment == "sentence:spacy":
        split = cut.spacy_sentences()
    for documents in _chunked(corpus.documents):
        texts = [split(document.text) for document in documents]
        flat = [text for units in texts for text in units]
        encoded = encode(tokenizer, flat)
        _check_frame(tokenizer, flat[:_FRAMED], encoded)
        pairs = iter(zip(flat, encoded, strict=True))
        for document, units in zip(documents, texts, strict=True):
            start, out = 0, []
            for text, tokens in islice(pairs, len(units)):
                fidelity.add(text, tokens)
                out.append((start, tokens))
                start += len(tokens)
            yield document, out


def _check_frame(tokenizer: Any, texts: list[str], encoded: list[list[int]]) -> None:
    """`ModelError` if the special tokens are not put around these texts as around others."""
    before, after = frame(tokenizer)
    for tokens, full in zip(encoded, encode(tokenizer, texts, special=True), strict=False):
        if full not in ([*before, *tokens, *after], [*tokens, *after]):
            raise changes_text(tokenizer)


def _chunked(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
