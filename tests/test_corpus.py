"""Text to documents, contexts, shards and batches: nothing lost, nothing twice, always the same."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mnemoscope.errors import CorpusError, RunCorrupt, RunError, RunMissing
from mnemoscope.records import Progress
from mnemoscope.text import plan as plans
from mnemoscope.text import sampling
from mnemoscope.text.corpus import load_corpus, write_plan
from mnemoscope.text.plan import BATCH_TOKENS, SHARD_TOKENS, Plan
from mnemoscope.text.readers import read_file
from mnemoscope.text.segment import sentences, windows
from mnemoscope.text.tabular import Document

BOS, EOS = 0, 1


@lru_cache
def tokenizer(frame: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `frame` names what it puts around a text: "b" <s> before, "e" </s> after."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 3, trainer)
    template = ("<s> " if "b" in frame else "") + "$A" + (" </s>" if "e" in frame else "")
    pairs = [("<s>", BOS), ("</s>", EOS)]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[Any]:
    """Writes a file and returns the texts that come out of it."""

    def read(name: str, content: bytes | str, **options: Any) -> list[str]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [document.text for document in load_corpus(tmp_path / name, **options).documents]

    return read


def refused(source: Any, **options: Any) -> str:
    """The message with which a source is refused; it must be one line."""
    with pytest.raises(CorpusError) as caught:
        list(load_corpus(source, **options).documents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ------------------------------------------------------------------


def test_text_files_are_split_at_blank_lines(texts: Any) -> None:
    """A block between blank lines is a document, whatever the line ends and the byte order mark."""
    assert texts("a.txt", "\ufeffone\ntwo\r\n \r\n\n\nthree\n") == ["one\ntwo", "three"]


def test_titles_say_where_a_document_is(tmp_path: Path) -> None:
    """A document without a title is named by file and line, or by file and row."""
    (tmp_path / "a.txt").write_text("\none\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y", "title": "Y"}\n')
    assert [document.title for document in load_corpus(tmp_path).documents] == [
        "a.txt:2",
        "a.txt:4",
        "b.jsonl:1",
        "Y",
    ]


def test_json_lines_give_text_title_and_metadata(tmp_path: Path) -> None:
    """The text column is the text, "title" the title, and other single values are metadata."""
    row = {
        "body": "hello",
        "title": "T",
        "year": 7,
        "nested": {"a": 1},
        "list": [1],
        "none": None,
        "x": 1e999,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (document,) = load_corpus(tmp_path / "a.jsonl", text="body").documents
    assert document == Document("hello", "T", {"year": 7, "none": None, "x": "inf"})


def test_empty_texts_are_no_documents(texts: Any) -> None:
    """Null, empty and blank texts are passed over."""
    assert texts("a.jsonl", '{"text": null}\n{"text": ""}\n{"text": " \\n"}\n{"text": "x"}') == ["x"]


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ"])
def test_gzip(texts: Any, name: str) -> None:
    """Text formats may be gzipped."""
    assert texts(name, gzip.compress("naïve\n\nb".encode(), mtime=0)) == ["naïve", "b"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["a", "b"], [("a", "a.json:0"), ("b", "a.json:1")]),
        ([{"text": "a", "title": "A"}], [("a", "A")]),
        ({"A": "a"}, [("a", "A")]),
        ({"A": {"text": "a"}, "B": {"text": "b", "title": "other"}}, [("a", "A"), ("b", "other")]),
    ],
)
def test_json(tmp_path: Path, data: Any, expected: list[tuple[str, str]]) -> None:
    """Lists and objects, of texts and of rows; the keys of an object are titles."""
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert [(doc.text, doc.title) for doc in load_corpus(tmp_path / "a.json").documents] == expected


def test_parquet(tmp_path: Path) -> None:
    """Rows are documents; dates and other single values become text, nested ones are left out."""
    columns = {
        "text": ["a", None, "b"],
        "title": ["A", "N", None],
        "day": pa.array([0, 1, 2], pa.date32()),
        "tags": [["x"], [], []],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert list(load_corpus(tmp_path / "a.parquet").documents) == [
        Document("a", "A", {"day": "1970-01-01"}),
        Document("b", "a.parquet:2", {"day": "1970-01-03"}),
    ]


def test_folders_are_read_sorted_and_deep(tmp_path: Path) -> None:
    """Every readable file below a folder, by path; hidden and unknown ones are passed over."""
    for name in ("b.txt", "a/z.txt", "a/b.jsonl", ".hidden/c.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    corpus = load_corpus(tmp_path)
    assert [document.text for document in corpus.documents] == ["a/b.jsonl", "a/z.txt", "b.txt"]
    assert [file["name"] for file in corpus.source["files"]] == ["a/b.jsonl", "a/z.txt", "b.txt"]
    assert [document.text for document in load_corpus(str(tmp_path / "**" / "*.txt")).documents][
        -1
    ] == "b.txt"


def test_globs(tmp_path: Path) -> None:
    """A pattern gives the files that match, sorted."""
    for name in ("2.txt", "1.txt", "3.json"):
        (tmp_path / name).write_text(name)
    assert [document.text for document in load_corpus(str(tmp_path / "*.txt")).documents] == [
        "1.txt",
        "2.txt",
    ]


def test_lists(tmp_path: Path) -> None:
    """Python lists of texts, or of documents, are corpora."""
    assert [document.text for document in load_corpus(["a", " ", "b"]).documents] == ["a", "b"]
    assert list(load_corpus([Document("x", "T", {"k": 1})]).documents) == [Document("x", "T", {"k": 1})]
    assert load_corpus(["a"]).id == "1 texts"


def test_documents_can_be_read_again(tmp_path: Path) -> None:
    """Asking for the documents twice gives them twice."""
    (tmp_path / "a.txt").write_text("x\n\ny")
    corpus = load_corpus(tmp_path / "a.txt")
    assert list(corpus.documents) == list(corpus.documents)


def test_identity_follows_the_content(tmp_path: Path) -> None:
    """The same text in another place is the same source; another text or another column is not."""

    def source(folder: str, content: str, **options: str) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(content)
        return load_corpus(tmp_path / folder / "a.jsonl", **options).source

    row = '{"text": "a", "other": "b"}'
    one = source("one", row)
    assert one == source("two", row)
    assert one["files"] == [{"name": "a.jsonl", "sha256": hashlib.sha256(row.encode()).hexdigest()}]
    assert one != source("three", row + "\n")
    assert one != source("four", row, text="other")
    assert load_corpus(["a"]).source == load_corpus(["a"]).source != load_corpus(["b"]).source


def test_lone_surrogates_become_replacement_characters(texts: Any) -> None:
    """JSON can hold what UTF-8 cannot; it must not stop a corpus."""
    assert texts("a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}') == ["a\ufffdb 😀"]
    assert [document.text for document in load_corpus(["\ud800"]).documents] == ["\ufffd"]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that does not exist is named."""
    for path in ("none.txt", "none/deeper/none", "./none"):
        assert "there is no such file or folder; give a path that exists" in refused(str(tmp_path / path))
    assert (
        refused("none.jsonl.gz")
        == "reading none.jsonl.gz: there is no such file or folder; give a path that exists"
    )


def test_articles_of_wikitext_are_documents(tmp_path: Path) -> None:
    """Paragraphs and sections of one article are one document with its title, blank lines within it too."""
    file = tmp_path / "wiki.valid.tokens"
    file.write_text(
        " \n = Du Fu = \n \n A poet , = 3 . \n \n = = Early life = = \n \n Born in <unk> . \n \n"
        " = Li Bai = \n \n Another . \n"
    )
    documents = list(read_file(file, "text"))
    assert [document.title for document in documents] == ["Du Fu", "Li Bai"]
    assert (
        documents[0].text == " = Du Fu = \n \n A poet , = 3 . \n \n = = Early life = = \n \n Born in <unk> ."
    )
    file.write_text("one \ntwo\n\n\nthree = 3 =\n")
    assert [(document.text, document.title) for document in read_file(file, "text")] == [
        ("one \ntwo", "wiki.valid.tokens:1"),
        ("three = 3 =", "wiki.valid.tokens:5"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "loading the corpus a.txt: it holds no text; give one with at least one document"),
        ("a.json", b"", "loading the corpus a.json: it holds no text"),
        ("a.txt", b" \n\n", "loading the corpus a.txt: it holds no text"),
        ("a.jsonl", b'{"text": ""}', "loading the corpus a.jsonl: it holds no text"),
        ("a.txt", b"ok\nab\0c", "byte 5 is NUL, so it is a binary file (or UTF-16); give text in UTF-8"),
        ("a.txt", b"ok\nab\xff\xfec", "byte 5 is not UTF-8 (invalid start byte); convert the file to UTF-8"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "byte 5 is not UTF-8"),
        ("a.txt", b"ok\n\xe2\x80", "byte 3 is not UTF-8 (unexpected end of data)"),
        (
            "a.jsonl",
            b'{"body": "x", "n": 1}',
            "line 1: there is no column 'text'; there are 'body', 'n'; name the column",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": 1}',
            "line 3: there is no column 'text'; there are 'body'; name",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1: the column 'text' holds a int, not text; name the column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON (Expecting value"),
        ("a.jsonl", b'["x"]', "line 1: a JSON list; each line must be one JSON object"),
        (
            "a.json",
            b'{"text": "x"}\n{"text": "y"}',
            "not JSON (Extra data: line 2 column 1 (char 14)); one JSON object",
        ),
        ("a.json", b"3", "neither a list nor an object of texts or rows; give one of the two"),
        ("a.json", b"[3]", "entry 0: a int; accepted are texts and objects with a text column"),
        ("a.json", b'{"k": {"body": ""}}', "entry 'k': there is no column 'text'; there are 'body'"),
        ("a.txt.gz", b"plain", "not a whole gzip file (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "not a whole gzip file (Compressed file ended"),
        ("a.parquet", b"PAR1 no", "not a whole Parquet file ("),
        (
            "a.pdf",
            b"x",
            "a file named *.pdf is not known; accepted are .txt .tokens .jsonl .ndjson .json",
        ),
        ("a", b"x", "a file named * is not known"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """What is wrong, in which file, at which line or byte, and what to do."""
    (tmp_path / name).write_bytes(content)
    said = refused(str(tmp_path / name))
    assert message in said
    assert str(tmp_path / name) in said or said.startswith(f"loading the corpus {name}")


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    """The columns that there are, are named."""
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert "a.parquet, row 0: there is no column 'text'; there are 'body', 'n'" in refused(
        tmp_path / "a.parquet"
    )


def test_patterns_and_folders_without_files_are_refused(tmp_path: Path) -> None:
    """No match, and a folder with nothing readable, are said as such."""
    (tmp_path / "a.png").write_text("x")
    assert "*.txt: no file matches; put the pattern in quotes" in refused(str(tmp_path / "*.txt"))
    assert "no file in it can be read; accepted are .txt" in refused(tmp_path)
    assert "a.png: a file named *.png is not known" in refused(str(tmp_path / "*.png"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (["a"], {"limit": 0}, "loading a corpus: limit=0 leaves no token; give a positive number"),
        (
            ["a"],
            {"segment": "word"},
            "segment='word' is not known; accepted are document, sentence, sentence:spacy,",
        ),
        (["a"], {"segment": "window:x"}, "segment='window:x' is not known"),
        (["a"], {"segment": "window:7"}, "segment='window:7' is not known"),
        (["a", 3], {}, "loading a list of texts: item 1 is a int; each must be a string"),
        ([], {}, "loading the corpus 0 texts: it holds no text"),
        (7, {}, "loading a corpus: an object of type int is not a text; give a path, a data set id, texts"),
    ],
)
def test_bad_arguments_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    """What was given and what is accepted."""
    assert message in refused(source, **options)


# --- data sets ----------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub with one data set; returns what was asked of it."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    asked: list[Any] = []

    def load(name: str, configuration: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, configuration, options))
        return [{"text": "one", "title": "One", "label": 3}, {"text": "two"}]

    def info(self: Any, name: str) -> SimpleNamespace:
        if name == "nobody/nothing":
            raise ConnectionError("cannot reach\nthe hub")
        return SimpleNamespace(sha="abc123")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return asked


@pytest.mark.parametrize(
    ("source", "configuration", "split"),
    [
        ("some/data", None, "train"),
        ("some/data:raw", "raw", "train"),
        ("data:raw:test", "raw", "test"),
        ("data::test", None, "test"),
    ],
)
def test_data_sets_are_streamed_at_a_fixed_revision(
    hub: list[Any], source: str, configuration: str | None, split: str
) -> None:
    """An id, a configuration and a split name a data set, whose revision is part of the identity."""
    corpus = load_corpus(source)
    assert next(iter(corpus.documents)) == Document("one", "One", {"label": 3})
    assert hub == [
        (
            source.split(":", maxsplit=1)[0],
            configuration,
            {"split": split, "revision": "abc123", "streaming": True},
        )
    ]
    assert corpus.source["revision"] == "abc123"


def test_data_set_that_cannot_be_reached_is_refused(hub: list[Any]) -> None:
    """Offline, the reason and the ways out are one line."""
    assert refused("nobody/nothing") == (
        "opening the data set 'nobody/nothing' (there is no such file): cannot reach the hub; "
        "check the id, and the network, or give a local file"
    )


def test_data_set_that_breaks_off_is_refused(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that goes away in the middle is said as such, and is not taken for the end."""

    def rows(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Rows(rows))
    assert "streaming the data set 'some/data': gone; check the id" in refused("some/data")


class Rows:
    """An iterable that begins anew each time, as streamed data sets do."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


@pytest.mark.parametrize(
    ("source", "options", "missing", "extra"),
    [("some/data", {}, "datasets", "datasets"), (["a"], {"segment": "sentence:spacy"}, "spacy", "nlp")],
)
def test_missing_extras_name_the_install(
    source: Any, options: dict[str, Any], missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library the message has the command that installs it."""
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert f"pip install 'mnemoscope[{extra}]'" in refused(source, **options)


# --- sentences and windows ----------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met J. R. R. Tolkien.|He smiled.",
        "The U.S. President spoke.|He lives in the U.S.|The end.",
        "Pi is 3.14 or so.|See example.org now.|Done.",
        'He asked "Why?" and left.|"No!" she said.|"Go."',
        "He went (at last.)|Then... nothing.|Well…|What?!|Yes.",
        "Apple Inc. announced it.|He works at Apple Inc.|The firm is big.",
        "World War I.|The peace.|An essay by A. A. Milne.",
        "1. First item.|2. Second item.",
        "No. 5 is alive.|He said no.|Then he left, cf. Fig. 3 and pp. 4.",
        "It was 146 BC.|Rome won.|It began at 5 p.m.|The rest, etc.|Often not.",
        "A fact.[12]|Another.",
        "東京は首都です。|人口は多い！|「本当？」|はい。",
        "नमस्ते।|ठीक है।",
        "Ends without a stop",
    ],
)
def test_sentences(text: str) -> None:
    """Sentences end where readers end them, by the rules listed in `segment`."""
    assert sentences(text.replace("|", " ")) == text.split("|")


def test_sentences_and_line_ends() -> None:
    """Lines are sentences, unless they were broken to fit a page; blank lines always are ends."""
    assert sentences("Heading\nText of it.\n\nmore\n") == ["Heading", "Text of it.", "more"]
    wrapped = "This line is broken at about sixty characters by a very old\nMan with no patience."
    assert sentences(wrapped) == [wrapped]
    assert sentences("it goes\non here") == ["it goes\non here"]


@given(st.text(alphabet=st.sampled_from('ab AB1.!?…。"”)([]\n\t,')))
def test_sentences_lose_no_character(text: str) -> None:
    """Sentences are consecutive pieces of the text, trimmed and not empty, with only white space between."""
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(piece and piece == piece.strip() for piece in found)


def test_sentences_are_linear_in_hostile_text() -> None:
    """Long runs of stops, closing marks or spaces take no noticeable time."""
    for text in ("." * 50_000 + "x", " " * 50_000 + "x", ".)" * 25_000 + "x", "a. " * 20_000):
        assert sentences(text)


@given(st.integers(0, 3000), st.integers(3, 300))
def test_windows_cover_evenly(length: int, size: int) -> None:
    """Windows are consecutive, as few as can be, of equal length up to one, never one token of many."""
    found = windows(length, size)
    assert [position for start, end in found for position in range(start, end)] == list(range(length))
    lengths = {end - start for start, end in found}
    assert len(found) == -(-length // size)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert length == 1 or 1 not in lengths


# --- plans --------------------------------------------------------------------

TEXTS = st.lists(st.text(alphabet="abc .\n", min_size=1, max_size=80), min_size=1, max_size=12)
FRAMES = {"": ([], []), "b": ([BOS], []), "be": ([BOS], [EOS])}


def plan_of(texts: list[str], folder: Path, frame: str = "", length: int = 16, **options: Any) -> Plan:
    return write_plan(load_corpus(texts, **options), tokenizer(frame), folder, context_length=length)


def contexts_of(plan: Plan) -> list[dict[str, Any]]:
    return pq.read_table(plan.contexts_file).to_pylist()


def slow_contexts(texts: list[str], frame: str, size: int, split: Any) -> list[tuple[int, list[int]]]:
    """The definition: (start, tokens) of all contexts that are new and have two tokens, in order."""
    (before, after), found = FRAMES[frame], []
    for text in texts:
        start = 0
        for unit in split(text):
            ids = tokenizer()(unit)["input_ids"]
            for left, right in windows(len(ids), size - len(before) - len(after)):
                context = [*before, *ids[left:right], *after]
                if len(context) > 1 and context not in [tokens for _, tokens in found]:
                    found.append((start + left, context))
            start += len(ids)
    return found


@tries(60)
@given(
    texts=TEXTS,
    frame=st.sampled_from(list(FRAMES)),
    segment=st.sampled_from(["document", "sentence", "window:8"]),
)
def test_contexts_are_the_definition(texts: list[str], frame: str, segment: str) -> None:
    """Contexts are framed windows of documents or sentences, without the short and the seen, in order."""
    texts = [*texts, "abc"]
    split = sentences if segment == "sentence" else lambda text: [text]
    size = 8 if segment == "window:8" else 16
    expected = slow_contexts([text for text in texts if text.strip()], frame, size, split)
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(texts, Path(name), frame, segment=segment)
        rows = contexts_of(plan)
        documents = pq.read_table(plan.documents_file).to_pylist()
    assert [(row["start"], row["tokens"]) for row in rows] == expected
    assert [row["context"] for row in rows] == list(range(plan.contexts))
    assert sorted({row["document"] for row in rows}) == list(range(plan.documents))
    assert [row["document"] for row in documents] == list(range(plan.documents))
    assert plan.tokens == sum(len(tokens) for _, tokens in expected)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("count", [1, 7, 14, 15, 16, 17, 33, 500])
def test_long_documents_lose_nothing(tmp_path: Path, frame: str, count: int) -> None:
    """The windows of a document, without their frame, are the document; every one is framed as a text is."""
    text = " ".join(str(number) for number in range(count)) + "."
    (before, after) = FRAMES[frame]
    rows = contexts_of(plan_of([text], tmp_path, frame))
    inner = [row["tokens"][len(before) : len(row["tokens"]) - len(after)] for row in rows]
    assert [token for tokens in inner for token in tokens] == tokenizer()(text)["input_ids"]
    assert all(row["tokens"] == [*before, *tokens, *after] for row, tokens in zip(rows, inner, strict=True))
    assert all(len(row["tokens"]) <= 16 for row in rows)


@tries(40)
@given(texts=TEXTS, frame=st.sampled_from(list(FRAMES)), shard=st.integers(1, 60), batch=st.integers(1, 60))
def test_every_context_is_in_one_batch(texts: list[str], frame: str, shard: int, batch: int) -> None:
    """Shards and batches are within their limits, and together they are all contexts, once."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "SHARD_TOKENS", shard)
        patch.setattr(plans, "BATCH_TOKENS", batch)
        plan = plan_of([*texts, "abc"], Path(name), frame)
        rows = {row["context"]: row["tokens"] for row in contexts_of(plan)}
        ranges = [list(plan.batches(index)) for index in range(plan.shards)]
    counted = 0
    ids = [sorted(int(i) for item in batches for i in item.contexts) for batches in ranges]
    assert [i for group in ids for i in group] == list(range(plan.contexts))
    assert all(len(group) == 1 or sum(len(rows[i]) for i in group) <= shard for group in ids)
    for item in (item for batches in ranges for item in batches):
        assert item.tokens.size <= batch or len(item.contexts) == 1
        assert item.tokens.shape[1] == item.lengths.max()
        keys = list(zip(item.lengths.tolist(), item.contexts.tolist(), strict=True))
        assert keys == sorted(keys)
        for context, tokens, length, mask in zip(
            item.contexts, item.tokens, item.lengths, item.counted, strict=True
        ):
            assert tokens[:length].tolist() == rows[int(context)]
            assert (tokens[length:] == tokens[length - 1]).all()
            expected = [at > 0 and token not in (BOS, EOS) for at, token in enumerate(rows[int(context)])]
            assert mask.tolist() == expected + [False] * (len(tokens) - length)
        counted += int(item.counted.sum())
    assert counted == plan.counted


def test_batch_dtypes_and_sizes(tmp_path: Path) -> None:
    """Batches have the dtypes that records.py promises."""
    (batch,) = plan_of(["the cat sat"], tmp_path).batches(0)
    dtypes = [array.dtype for array in (batch.contexts, batch.tokens, batch.lengths, batch.counted)]
    assert dtypes == [np.int64, np.int32, np.int32, np.bool_]
    assert batch.n_tokens == 3


def test_two_plans_are_the_same_bytes(tmp_path: Path) -> None:
    """Planning twice gives the same files; another text gives another hash."""
    texts = [f"the cat {number} sat on the mat" for number in range(50)]
    one, two = plan_of(texts, tmp_path / "one"), plan_of(texts, tmp_path / "two")
    assert sorted(path.name for path in one.folder.iterdir()) == [
        "contexts.parquet",
        "documents.parquet",
        "plan.json",
    ]
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes()
    assert plan_of(texts[1:], tmp_path / "three").sha256 != one.sha256


def test_hash_is_over_lengths_and_tokens(tmp_path: Path) -> None:
    """The hash of a plan can be recomputed from the contexts alone."""
    plan = plan_of(["the cat sat", "on the mat"], tmp_path, "b")
    digest = hashlib.sha256()
    for row in contexts_of(plan):
        digest.update(len(row["tokens"]).to_bytes(8, "little"))
        digest.update(np.asarray(row["tokens"], "<i4").tobytes())
    assert plan.sha256 == digest.hexdigest()


def test_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    """A context that was seen is not there twice, nor is a document that has no other."""
    plan = plan_of(["the cat", "the dog", "the cat"], tmp_path)
    assert (plan.contexts, plan.documents, plan.duplicates) == (2, 2, 1)
    plan = plan_of(["A cat. A dog. A cat.", "A cat. A man."], tmp_path, segment="sentence")
    assert (plan.contexts, plan.documents, plan.duplicates) == (3, 2, 2)
    assert Counter(row["document"] for row in contexts_of(plan)) == {0: 2, 1: 1}


def test_titles_and_metadata_follow_their_documents(tmp_path: Path) -> None:
    """The table of documents has the title, and the metadata as JSON with sorted keys."""
    texts = [
        Document("the cat", "Cat", {"b": 1, "a": "ü"}),
        Document("x", "gone"),
        Document("the dog", "Dog"),
    ]
    plan = write_plan(load_corpus(texts), tokenizer(), tmp_path, context_length=16)
    assert pq.read_table(plan.documents_file).to_pylist() == [
        {"document": 0, "title": "Cat", "metadata": '{"a": "\\u00fc", "b": 1}'},
        {"document": 1, "title": "Dog", "metadata": "{}"},
    ]


@pytest.mark.slow
@given(
    sizes=st.lists(st.one_of(st.integers(2, 60), st.integers(2, 900)), min_size=1, max_size=40),
    limit=st.integers(20, 900),
    seed=st.integers(0, 5),
)
@tries(60)
def test_a_limit_is_kept_to_and_made_use_of(sizes: list[int], limit: int, seed: int) -> None:
    """Not exceeded, not wasted while there is text, and every document read keeps its order and its beginning."""
    texts = [" ".join(f"{seed}{place}x{word}" for word in range(size)) for place, size in enumerate(sizes)]
    whole = {text: tokenizer()(text)["input_ids"] for text in texts}
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(texts, Path(name), limit=limit)
        rows = contexts_of(plan)
        again = plan_of(list(texts), Path(name), limit=limit)
    assert plan.sha256 == again.sha256
    total = sum(map(len, whole.values()))
    assert plan.tokens <= limit or plan.contexts == 1
    assert plan.tokens > min(limit, total) - 2 * 16  # a context is at most 16 tokens
    read: dict[int, list[int]] = {}
    for row in rows:
        read.setdefault(row["document"], []).extend(row["tokens"])
    places = [
        next(place for place, text in enumerate(texts) if whole[text][: len(tokens)] == tokens)
        for tokens in read.values()
    ]
    assert places == sorted(set(places))


def test_a_limit_reads_all_subjects(tmp_path: Path) -> None:
    """Of a text in the order of its subjects the first tenth is read of each of them, and not all of the first."""
    texts = [f"subject {place // 100} number {place} of a thousand" for place in range(1000)]
    sizes = [len(tokenizer()(text)["input_ids"]) for text in texts]
    plan = plan_of(texts, tmp_path, length=64, limit=sum(sizes) // 10)
    titles = pq.read_table(plan.documents_file)["title"].to_pylist()
    subjects = Counter(int(title.split()[1]) // 100 for title in titles)
    assert len(subjects) == 10 and max(subjects.values()) < 25


@pytest.mark.slow
def test_one_long_document_does_not_fill_a_limit(tmp_path: Path) -> None:
    """Books longer than the limit give a part each."""
    books = [" ".join(f"{book}-{word}" for word in range(2000)) for book in range(40)]
    plan = plan_of(books, tmp_path, limit=1600)
    assert plan.documents >= 12 and 1500 < plan.tokens <= 1600


def test_what_is_drawn_is_all_that_is_held() -> None:
    """However long the text is, what is drawn from it is all that is in memory."""
    drawn = sampling.draw((Document(f"{place} " * 50, "") for place in range(20_000)), 10_000)
    assert not drawn.complete and len(drawn.places) < 100


def test_progress_is_reported(tmp_path: Path) -> None:
    """Planning says how many tokens of how many it has, and at the end how many there are."""
    told: list[Progress] = []
    corpus = load_corpus(["the cat", "the dog"], limit=100)
    write_plan(corpus, tokenizer(), tmp_path, context_length=16, report=told.append)
    assert [(item.stage, item.done, item.total, item.unit) for item in told] == [
        ("planning", 2, 100, "tokens"),
        ("planning", 4, 100, "tokens"),
        ("planning", 4, 4, "tokens"),
    ]


def test_plans_are_opened_again(tmp_path: Path) -> None:
    """A loaded plan is the plan that was written."""
    plan = plan_of(["the cat sat", "on the mat"], tmp_path, "b")
    assert Plan.load(tmp_path) == plan
    assert plan.corpus["segment"] == "document"


def test_unfinished_and_damaged_plans_are_refused(tmp_path: Path) -> None:
    """Without plan.json there is no plan; with a damaged one, or another table, it is not trusted."""
    with pytest.raises(RunMissing, match="there is none that was finished; build it again"):
        Plan.load(tmp_path)
    plan = plan_of(["the cat sat"], tmp_path)
    whole = plan.contexts_file.read_bytes()
    plan.contexts_file.write_bytes(whole[:-20])
    with pytest.raises(RunCorrupt, match=r"contexts\.parquet is damaged; build it again"):
        Plan.load(tmp_path)
    plan_of(["the cat sat", "the dog"], tmp_path / "other")
    plan.contexts_file.write_bytes((tmp_path / "other" / "contexts.parquet").read_bytes())
    with pytest.raises(RunCorrupt, match=r"contexts\.parquet is not of this plan"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text('{"shards": ')
    with pytest.raises(RunCorrupt, match=r"plan\.json is damaged"):
        Plan.load(tmp_path)


def test_an_interrupted_plan_is_no_plan(tmp_path: Path) -> None:
    """A plan that is being written over is gone until the new one is whole."""
    plan_of(["the cat sat"], tmp_path)
    broken = tmp_path.parent / "broken.jsonl"
    broken.write_text('{"text": "the dog"}\n{')
    with pytest.raises(CorpusError, match="line 2: not JSON"):
        write_plan(load_corpus(broken), tokenizer(), tmp_path, context_length=16)
    with pytest.raises(RunMissing):
        Plan.load(tmp_path)


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    """A folder that cannot be made is named, with what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/plan: Not a directory; choose a folder"):
        plan_of(["the cat sat"], tmp_path / "file" / "plan")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["contexts.parquet", "documents.parquet", ".plan.json.partial"])
def test_a_full_disk_is_refused(tmp_path: Path, name: str) -> None:
    """When the disk is full, whatever file it hits, there is one clear line and no plan."""
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"writing the plan \S+.*: the disk is full; free some space"):
        plan_of(["the cat sat", "on the mat"], tmp_path)
    with pytest.raises(RunMissing):
        Plan.load(tmp_path)


def test_texts_too_short_for_a_context_are_refused(tmp_path: Path) -> None:
    """A corpus of single tokens, and a context too small for any, are said as such."""
    with pytest.raises(CorpusError, match="planning 1 texts: no context has two tokens; give longer texts"):
        plan_of(["a"], tmp_path)
    assert plan_of(["a"], tmp_path, "b").counted == 1
    with pytest.raises(CorpusError, match="a context of 4 tokens is too short; at least 8 are needed"):
        plan_of(["the cat"], tmp_path, "be", length=4)


def test_the_size_of_shards_and_batches_is_fixed() -> None:
    """These numbers are part of the format: changing them changes every run."""
    assert (SHARD_TOKENS, BATCH_TOKENS) == (32_768, 4_096)


@pytest.mark.slow
@pytest.mark.sample
def test_sample_corpus_is_planned_as_ever(
    sample_model_folder: Path, sample_corpus_file: Path, tmp_path: Path
) -> None:
    """100,000 tokens drawn from the sample corpus are the same tokens on every machine, and of all its topics."""
    tokens = PreTrainedTokenizerFast.from_pretrained(sample_model_folder)
    corpus = load_corpus("sample:wikipedia", limit=100_000)
    plan = write_plan(corpus, tokens, tmp_path, context_length=4096)
    assert (plan.shards, plan.documents, plan.contexts, plan.duplicates) == (4, 940, 940, 0)
    assert (plan.tokens, plan.counted) == (100_000, 99_060)
    assert plan.sha256.startswith("5fe655fd89c1d6a8")
    rows = pq.read_table(plan.documents_file)["metadata"].to_pylist()
    topics = Counter(json.loads(row)["topic"] for row in rows)
    assert len(topics) == 12 and max(topics.values()) < 200
    first = next(iter(corpus.documents))
    assert (first.title, sorted(first.metadata)) == ("20th-century classical music", ["description", "topic"])
