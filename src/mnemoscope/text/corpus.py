"""Text -> documents -> contexts -> shards of fixed batches.

`load_corpus` says which text and how it is cut; `write_plan` tokenizes it once into a `Plan`, which from
then on hands out the same batches to whoever asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope import files
from mnemoscope.errors import CorpusError
from mnemoscope.records import Progress
from mnemoscope.text import sampling
from mnemoscope.text.plan import BATCH_TOKENS, Plan, PlanWriter, Units
from mnemoscope.text.segment import Splitter, sentences, spacy_sentences, windows
from mnemoscope.text.sources import SHUFFLE, Source, resolve
from mnemoscope.text.spelling import Fidelity
from mnemoscope.text.tabular import Document
from mnemoscope.text.tokenizer import changes_text, encode, frame, special_ids, written_tokens

CONTEXT_TOKENS = BATCH_TOKENS  # a context is no longer than a batch, however much a model could take
WINDOW = 256  # tokens of a context with segment="window"

_SEGMENTS = "document, sentence, sentence:spacy, window or window:N (N tokens, at least 8)"
_CHARACTERS = 8  # of a token, at most, for a first guess at how many documents make up a limit
_CHUNK = 1 << 19  # characters that are tokenized at once: enough to keep the tokenizer busy
_FRAMED = 8  # texts of each chunk that are also tokenized with their special tokens


@dataclass(frozen=True)
class Corpus:
    """Which text, and how it is cut into contexts. Made by `load_corpus`; holds no text itself."""

    id: str
    segment: str
    limit: int | None  # tokens, in whole documents
    text_column: str
    target_column: str | None  # of what the decoder of an encoder-decoder is to write
    _source: Source = field(repr=False)

    @property
    def documents(self) -> Iterator[Document]:
        """All documents that hold any text, in order; a fresh iterator every time."""
        return _with_text(self._source.open())

    @property
    def shuffled(self) -> Iterator[Document] | None:
        """Documents of a stream in a drawn order, fixed by a seed; None for what can be counted first."""
        return None if self._source.drawn is None else _with_text(self._source.drawn())

    @property
    def together(self) -> int:
        """How many contexts are read beside each other: a text and its target, or one."""
        return 1 if self.target_column is None else 2

    @property
    def sampling(self) -> str | None:
        """How documents are drawn up to the limit; None without one."""
        if self.limit is None:
            return None
        return (
            "documents by hash of place and text"
            if self._source.drawn is None
            else (
                f"first documents of a shuffled stream (seed {SHUFFLE['seed']}, buffer {SHUFFLE['buffer']})"
            )
        )

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the text: files with their sha256, a data set with its revision, or a hash."""
        return self._source.identify()

    @property
    def notes(self) -> Sequence[str]:
        """What was left out so far, in sentences."""
        return self._source.notes


def load_corpus(
    source: str | os.PathLike[str] | Sequence[str] | Sequence[Document] | Any,
    *,
    segment: str = "document",
    limit: int | None = None,
    text: str = "text",
    target: str | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Corpus:
    """Say which text to use; raises `CorpusError` at once when it cannot be read or holds none.

    source   "sample:wikipedia"; a file of text or data (see `readers`), a folder of them or a glob (a path that
             exists is never taken for one); "-" for standard input; a list of texts or of `Document`; a Dataset,
             DataFrame or Arrow table with a column of texts; or the id of a Hugging Face data set as
             ``id[:configuration[:split]]``, which is streamed
    segment  what becomes one context: "document"; "sentence" (built-in rules) or "sentence:spacy"; "window"
             (of 256 tokens) or "window:N". What is longer than the model's context is cut into equal windows
    limit    tokens that are not exceeded: documents are drawn by a hash of their place and text, always the same,
             and read in their order; of long ones the leading contexts. A streamed data set is shuffled
    text     name of the column that holds the text
    target   of an encoder-decoder, whose encoder reads the text: name of the column that holds what its decoder is to
             write. A text and its target are never cut apart: of what is longer than a context the first tokens are
             read
    report   called with a `Progress` while what is behind a URL is fetched, which is read from a copy in the cache
             folder
    """
    if limit is not None and limit < 1:
        raise CorpusError(
            "loading a corpus: {limit} leaves no token; give a positive number of tokens, or none for all",
            limit=limit,
        )
    _check_segment(segment)
    if target is not None and segment != "document":
        raise CorpusError(
            "loading a corpus: texts with targets are read whole, and {segment} was given; leave it out",
            segment=segment,
        )
    resolved = resolve(source, text, report or (lambda _: None))
    corpus = Corpus(resolved.id, segment, limit, resolved.column, target, resolved)
    first = next(corpus.documents, None)
    if first is not None and target is not None:
        _target_of(first, corpus)
    if first is None:
        raise CorpusError(
            f"loading the corpus {resolved.id}: it holds no text; give one with at least one document"
        )
    return corpus


def _with_text(documents: Iterator[Document]) -> Iterator[Document]:
    return (document for document in documents if document.text and not document.text.isspace())


def _target_of(document: Document, corpus: Corpus) -> str:
    """What is to be written beside a document; "" where its place is empty, `CorpusError` without such a column."""
    column = corpus.target_column
    assert column is not None
    if column not in document.metadata:
        there = ", ".join(map(repr, document.metadata)) or "none"
        raise CorpusError(
            f"reading targets of {corpus.id}: {document.title} has no column {column!r} beside its text; there are "
            f"{there}; name the one that holds what a decoder is to write ({{target_text}})",
            target_text=...,
        )
    value = document.metadata[column]
    return "" if value is None else str(value)


def _check_segment(segment: str) -> None:
    kind, _, size = segment.partition(":")
    known = segment in ("document", "sentence", "sentence:spacy", "window")
    if not known and not (kind == "window" and size.isdecimal() and len(size) < 16 and int(size) >= 8):
        raise CorpusError(
            f"loading a corpus: {{segment}} is not known; accepted are {_SEGMENTS}", segment=segment
        )
    if segment == "sentence:spacy":
        spacy_sentences()


def write_plan(
    corpus: Corpus,
    tokenizer: Any,
    folder: Path,
    *,
    context_length: int,
    start: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Plan:
    """Tokenize a corpus into a plan in `folder`; the same input always gives the same bytes.

    `tokenizer`: a Hugging Face tokenizer. Every context begins with the special tokens that it puts before
    a text (and ends with those it puts after), windows from the middle of a document too. `start` counts a
    document's own tokens before the context. Contexts of one token are left out (position 0 does not
    count), and so are contexts whose tokens were seen before. `report` hears tokens of the limit (0
    without one). ``plan.json`` is written last; under ``corpus`` it says whether tokens spell the text. Raises
    `CorpusError`, `ModelError` for a tokenizer that changes a text when it adds special tokens, and `RunError` when
    the folder cannot be written.

    start  the token with which a decoder begins; needed for a corpus with targets
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
        writer = PlanWriter(folder, special_ids(tokenizer), paired=start is not None)
        opened.callback(writer.close)
        fidelity = Fidelity(tokenizer)

        def contexts(documents: Iterable[Document], kept: bool) -> Iterator[tuple[Document, Units]]:
            tokenized = _tokenized(corpus, documents, tokenizer, fidelity if kept else None)
            if start is not None:
                for document, ((_, tokens),) in tokenized:
                    (target,) = written_tokens(tokenizer, start, [_target_of(document, corpus)])
                    yield document, [(0, [*before, *tokens[:room], *after]), (0, target[:context_length])]
                return
            for document, units in tokenized:
                yield (
                    document,
                    [
                        (place + left, [*before, *unit[left:right], *after])
                        for place, unit in units
                        for left, right in windows(len(unit), max(room, 3))
                    ],
                )

        for document, units in _limited(corpus, contexts):
            metadata = {key: value for key, value in document.metadata.items() if key != corpus.target_column}
            more = writer.add(document.title, metadata, units, corpus.limit)
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
        return writer.finish(about, context_length, corpus.notes)


# Documents with their contexts; whether these are kept, or only counted.
_Contexts = Callable[[Iterable[Document], bool], Iterator[tuple[Document, Units]]]


def _limited(corpus: Corpus, contexts: _Contexts) -> Iterator[tuple[Document, Units]]:
    """The documents that are read, in their order, with the contexts of each that are."""
    if corpus.limit is None:
        yield from contexts(corpus.documents, True)
    elif (stream := corpus.shuffled) is not None:
        for document, units in contexts(stream, True):
            most = sampling.within(_lengths(units, corpus.together), corpus.limit // sampling.LEAST)
            yield document, units[: corpus.together * most]
    else:
        counts = _drawn(corpus, corpus.limit, contexts)
        places = sorted(counts)
        for place, (document, units) in zip(places, contexts(_at(corpus, places), True), strict=True):
            yield document, units[: corpus.together * counts[place]]


def _drawn(corpus: Corpus, limit: int, contexts: _Contexts) -> dict[int, int]:
    """How many contexts are read of each document, by the place of those of which any are."""
    characters = _CHARACTERS * limit
    while True:
        drawn = sampling.draw(corpus.documents, characters)
        places = sorted(drawn.places)
        counted = contexts(_at(corpus, places), False)
        by_place = {
            place: _lengths(units, corpus.together) for place, (_, units) in zip(places, counted, strict=True)
        }
        lengths = [by_place[place] for place in drawn.places]
        if drawn.complete or sampling.wished(lengths, limit) >= limit:
            break
        characters *= 4  # tokens are longer than was guessed
    counts = sampling.share(lengths, limit).tolist()
    return {place: count for place, count in zip(drawn.places, counts, strict=True) if count}


def _lengths(contexts: Units, step: int) -> np.ndarray:
    """i64[unit]: tokens that each context, or `step` together, adds to a plan, which leaves out those of one token."""
    lengths = np.array([len(tokens) for _, tokens in contexts], np.int64).reshape(-1, step)
    return lengths.sum(1) * (lengths >= 2).all(1)


def _at(corpus: Corpus, places: Sequence[int]) -> Iterator[Document]:
    """The documents at these places, ascending, and no further reading than that."""
    wanted = iter(places)
    place = next(wanted, None)
    for number, document in enumerate(corpus.documents):
        if place is None:
            return
        if number == place:
            yield document
            place = next(wanted, None)


def _tokenized(
    corpus: Corpus, documents: Iterable[Document], tokenizer: Any, fidelity: Fidelity | None
) -> Iterator[tuple[Document, Units]]:
    """Each document with its units (the document, or its sentences): (tokens before it, its tokens)."""
    split: Splitter = {"sentence": sentences}.get(corpus.segment, lambda text: [text])
    if corpus.segment == "sentence:spacy":
        split = spacy_sentences()
    for chunk in _chunked(documents):
        texts = [split(document.text) for document in chunk]
        flat = [text for units in texts for text in units]
        encoded = encode(tokenizer, flat)
        _check_frame(tokenizer, flat[:_FRAMED], encoded)
        pairs = iter(zip(flat, encoded, strict=True))
        for document, units in zip(chunk, texts, strict=True):
            start, out = 0, []
            for text, tokens in islice(pairs, len(units)):
                if fidelity:
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


def _chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
