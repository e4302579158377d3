"""What may be given as a text: files of every format, folders, tables, and what is refused in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import refused
from test_files import NAMES

from mnemoscope.errors import CorpusError
from mnemoscope.text.corpus import load_corpus
from mnemoscope.text.tabular import Document

TEXTS = ["the king of France", "the river, in flood", "a “queen”\nof the north"]


def texts_of(source: Any, **options: Any) -> list[str]:
    return [document.text for document in load_corpus(source, **options).documents]


# -- tables ------------------------------------------------------------------------------------------------


def _dataset(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


TABLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "arrow": pa.table,
    "batch": lambda columns: pa.RecordBatch.from_pydict(columns),
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "lazy": pl.LazyFrame,
    "datasets": _dataset,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gives_its_column_of_texts(kind: str) -> None:
    """Whatever library it is of: rows are documents, other single values metadata, and the identity is its content."""
    columns = {"body": TEXTS, "year": [1, 2, 3], "title": ["A", None, "C"]}
    corpus = load_corpus(TABLES[kind](columns), text="body")
    documents = list(corpus.documents)
    assert [document.text for document in documents] == TEXTS
    assert [document.title for document in documents] == ["A", "row:1", "C"]
    assert [document.metadata for document in documents] == [{"year": 1}, {"year": 2}, {"year": 3}]
    assert list(corpus.documents) == documents
    again = load_corpus(TABLES[kind](columns), text="body").source
    assert corpus.source == again
    other = load_corpus(TABLES[kind](columns | {"year": [1, 2, 4]}), text="body").source
    assert corpus.source != other
    assert "there is no column 'text'; there are 'body', 'year', 'title'" in refused(TABLES[kind](columns))


def test_rows_are_documents() -> None:
    """A list of dicts, as data sets give their rows."""
    rows = [{"body": text, "year": year, "nested": [year]} for year, text in enumerate(TEXTS)]
    documents = list(load_corpus(rows, text="body").documents)
    assert [(one.text, one.title, one.metadata) for one in documents] == [
        (text, f"row {year}", {"year": year}) for year, text in enumerate(TEXTS)
    ]
    assert "item 0: there is no column 'text'; there are 'body', 'year', 'nested'" in refused(rows)
    assert {type(text) for text in texts_of(np.array(TEXTS))} == {str}


def test_a_frame_with_a_column_of_mixed_objects() -> None:
    """What no column of Arrow can hold is text, and the texts are read."""
    frame = pd.DataFrame({"text": TEXTS, "odd": [1, "two", None]})
    assert [document.metadata for document in load_corpus(frame).documents] == [
        {"odd": "1"}, {"odd": "two"}, {"odd": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [tuple, np.array, pd.Series, pl.Series, pa.array, lambda texts: pa.chunked_array([texts]),
     lambda texts: _dataset({"text": texts})["text"], lambda texts: dict.fromkeys(texts).keys()],
)  # fmt: skip
def test_sequences_of_texts_are_texts(make: Callable[[list[str]], Any]) -> None:
    """A column of any library is a list of texts."""
    assert texts_of(make(TEXTS)) == TEXTS


def _splits() -> Any:
    return pytest.importorskip("datasets").DatasetDict(train=_dataset({"text": TEXTS}))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "splits": (_splits, "of type DatasetDict is not one text; give one of its splits: 'train'"),
    "columns": (lambda: {"text": TEXTS}, "of type dict is not one text; give a list of its texts"),
    "a generator": (lambda: (text for text in TEXTS), "can be read only once"),
    "a map": (lambda: map(str, TEXTS), "can be read only once"),
    "a stream": (lambda: _dataset({"text": TEXTS}).to_iterable_dataset(), "is streamed"),
    "a set": (lambda: set(TEXTS), "it has no order; give sorted"),
    "bytes": (lambda: b"the king", "decode it"),
    "a file": (lambda: io.StringIO("the king"), "give the path of the file"),
    "a number": (lambda: 7, "give a path, a data set id, texts"),
    "nothing": (lambda: None, "give a path, a data set id, texts"),
    "a list with a hole": (lambda: ["a", None], "item 1 is a NoneType; each must be a string"),
    "a matrix": (lambda: np.array([["a", "b"]]), "item 0 is a ndarray; each must be a string"),
    "a text": (lambda: "the capital of France is Paris", "to give a text itself, put it into a list"),
    "a question": (lambda: "Is it the king and/or the queen?", "no file matches"),
    "lines": (lambda: "the king\n\nof France / and the queen", "to give a text itself, put it into a list"),
    "a long text": (lambda: "the king of France " * 500, "to give a text itself, put it into a list"),
    "a long text as a path": (lambda: Path("x" * 5000), "to give a text itself, put it into a list"),
    "NUL": (lambda: "a\0b/c.txt", "there is no such file or folder"),
    "a wrong path": (lambda: "texts/of/mine", "there is no such file or folder; give a path that exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_with_the_cure(case: str) -> None:
    """One line, short, whatever was given; no text is looked for on a hub or in a file."""
    make, words = REFUSED[case]
    message = refused(make())
    assert words in message and len(message) < 400


# -- files -------------------------------------------------------------------------------------------------


def _arrow_stream(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _arrow_file(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _separated(delimiter: str) -> Callable[[Path, list[str]], None]:
    def save(path: Path, texts: list[str]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["n", "text"], *([place, text] for place, text in enumerate(texts))])

    return save


FORMATS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.csv": _separated(","),
    "a.tsv": _separated("\t"),
    "a.arrow": _arrow_stream,
    "file.arrow": _arrow_file,
    "a.parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path),
    "a.jsonl": lambda path, texts: path.write_text("\n".join(json.dumps({"text": text}) for text in texts)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1).filter(
            str.strip
        ),
        min_size=1,
        max_size=5,
    )
)
@tries(25)
def test_every_format_gives_back_its_texts(
    name: str, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What was written is what is read, quotes, separators and line ends included."""
    path = tmp_path_factory.mktemp("format") / name
    FORMATS[name](path, texts)
    assert texts_of(path) == texts


def test_a_long_field_is_no_limit(tmp_path: Path) -> None:
    """Documents are longer than the fields that the csv library expects."""
    _separated(",")(tmp_path / "a.csv", ["word " * 100_000])
    before = csv.field_size_limit()
    assert len(texts_of(tmp_path / "a.csv")[0]) == 500_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "n,text\n1,the king, of France\n", "line 2: 3 fields under 2 columns; put fields that hold a comma"),
        ("a.csv", 'n,text\n1,"the king\n', "line 2: not CSV (unexpected end of data)"),
        ("a.tsv", "n\ttext\n1\n", "line 2: 1 fields under 2 columns"),
        ("a.csv", "n;text\n1;x\n", "line 2: there is no column 'text'; there are 'n;text'"),
        ("a.arrow", "ARROW1 no", "not a whole Arrow file"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "z": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: JSON nested"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "a.json: JSON nested too deeply"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    """The file, the line, what is wrong and what to do."""
    (tmp_path / name).write_text(content)
    assert words in refused(tmp_path / name)


def test_text_and_source_files_are_one_document_each(tmp_path: Path) -> None:
    """Their title is their path in the folder."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("def f():\n\n    return 1\n")
    (tmp_path / "notes.md").write_text("# Notes\n\ntext\n")
    assert [(doc.title, doc.text) for doc in load_corpus(tmp_path).documents] == [
        ("notes.md", "# Notes\n\ntext"),
        ("src/a.py", "def f():\n\n    return 1"),
    ]
    assert texts_of(f"{tmp_path}/**/*.py") == ["def f():\n\n    return 1"]


def test_standard_input_is_read_and_known_again() -> None:
    """`-` is text in blocks; the same text is the same source."""
    code = (
        "from mnemoscope.text.corpus import load_corpus; c = load_corpus('-'); "
        "print([d.text for d in c.documents], [d.text for d in c.documents], c.source['sha256'])"
    )

    def run(given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False
        )

    said = run("the king\n\nof France\n").stdout
    assert said.startswith("['the king', 'of France'] ['the king', 'of France'] ")
    assert said == run("the king\n\nof France\n").stdout != run("the king\n\nof Spain\n").stdout
    assert "loading the corpus -: it holds no text" in run("").stderr


# -- folders -----------------------------------------------------------------------------------------------


def test_saved_data_sets_are_read_and_their_caches_are_not(tmp_path: Path) -> None:
    """A folder of `save_to_disk`, of one set or of splits, gives the rows of the files that it names."""
    datasets = pytest.importorskip("datasets")
    one = _dataset({"text": TEXTS, "label": [1, 2, 3]})
    one.save_to_disk(tmp_path / "one")
    _arrow_stream(tmp_path / "one" / "cache-1234.arrow", ["not of it"])
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "one") == TEXTS
    assert texts_of(tmp_path / "splits" / "train") == TEXTS
    assert sorted(texts_of(tmp_path / "splits")) == sorted([*TEXTS, TEXTS[0]])


def test_what_describes_a_data_set_is_no_document(tmp_path: Path) -> None:
    """A snapshot of a repository gives its data, and none of the files that are about it."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "data" / "train-00000-of-00001.parquet")
    for name in ("README.md", "dataset_infos.json", "dataset_info.json", ".gitattributes"):
        (tmp_path / name).write_text(json.dumps({"citation": "somebody", "description": "Lorem."}))
    (tmp_path / "loader.py").write_text("import datasets")
    corpus = load_corpus(tmp_path)
    assert [document.text for document in corpus.documents] == TEXTS
    assert [note for note in corpus.notes if "files .py beside the data are left out" in note]


@pytest.mark.parametrize("name", [name for name in NAMES if len(os.fsencode(name)) < 250])
def test_a_path_that_exists_is_no_pattern(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder of any name is read itself, also beside one that its name would match; its names can be kept."""
    monkeypatch.chdir(tmp_path)
    for sibling in ("run1.txt", "whatx.txt", "starry.txt", "plain1.txt"):
        Path(sibling).write_text("another")
    Path(f"{name}.txt").write_text("the very file")
    Path(name).mkdir()
    (Path(name) / f"{name}.jsonl").write_text('{"text": "in the folder"}')
    with (Path(name) / "z.parquet").open("wb") as file:
        pq.write_table(pa.table({"text": ["a row"]}), file)
    for source in (f"{name}.txt", Path(f"{name}.txt"), tmp_path / f"{name}.txt"):
        corpus = load_corpus(source)
        assert [document.text for document in corpus.documents] == ["the very file"]
    folder = load_corpus(tmp_path / name)
    assert sorted(document.text for document in folder.documents) == ["a row", "in the folder"]
    for kept in (corpus.id, *(document.title for document in folder.documents), json.dumps(folder.source)):
        kept.encode()


# -- columns -----------------------------------------------------------------------------------------------

HARD: dict[str, pa.Array] = {
    "nanoseconds": pa.array([1700000000123456789] * 3, pa.timestamp("ns")),
    "nanoseconds of a zone": pa.array([1700000000123456789] * 3, pa.timestamp("ns", "America/New_York")),
    "the year 20000": pa.array([569000000000 * 10**6] * 3, pa.timestamp("us")),
    "before year 1": pa.array([-800000] * 3, pa.int32()).cast(pa.date32()),
    "a duration": pa.array([123456789] * 3, pa.duration("ns")),
    "a long duration": pa.array([9 * 10**18] * 3, pa.duration("us")),
    "a time": pa.array([123456789] * 3, pa.time64("ns")),
    "uint64": pa.array([2**64 - 1] * 3, pa.uint64()),
    "a list": pa.array([[1.0] * 8] * 3),
    "a structure": pa.array([{"a": 1}] * 3),
    "a map": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "bytes": pa.array([b"\xff"] * 3),
    "nothing": pa.nulls(3),
    "categories": pa.array(["a", "b", "a"]).dictionary_encode(),
}
LEFT_OUT = {"a list", "a structure", "a map", "bytes"}


@pytest.mark.parametrize("pandas", [True, False], ids=["pandas", "no pandas"])
@pytest.mark.parametrize("kind", HARD)
def test_no_column_stops_a_corpus(
    kind: str, pandas: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python has no value for is text, or is left out with a word; the texts are all read."""
    if not pandas:
        monkeypatch.setitem(sys.modules, "pandas", None)
    pq.write_table(pa.table({"text": TEXTS, kind: HARD[kind]}), tmp_path / "a.parquet")
    corpus = load_corpus(tmp_path / "a.parquet")
    documents = list(corpus.documents)
    assert [document.text for document in documents] == TEXTS
    kept = kind in documents[0].metadata
    assert kept == (kind not in LEFT_OUT)
    assert kept != any(repr(kind) in note for note in corpus.notes)
    json.dumps([document.metadata for document in documents], allow_nan=False)


def test_only_the_columns_that_are_kept_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of vectors is not read from the disk at all, and said once."""
    table = pa.table({"text": TEXTS, "title": ["A", "B", "C"], "n": [1, 2, 3], "vector": [[0.0] * 768] * 3})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    asked: list[Any] = []
    read = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return read(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    corpus = load_corpus(tmp_path / "a.parquet")
    assert next(iter(corpus.documents)) == Document(TEXTS[0], "A", {"n": 1})
    assert {tuple(columns) for columns in asked} == {("text", "title", "n")}
    assert len(corpus.notes) == 1 and "'vector'" in corpus.notes[0]


def test_two_columns_of_the_text_s_name_are_refused(tmp_path: Path) -> None:
    """Nobody could say which is meant."""
    table = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns 'text'; rename one" in refused(tmp_path / "a.parquet")


# -- streams -----------------------------------------------------------------------------------------------


def test_a_stream_with_a_limit_is_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set whose end is not known gives documents of a shuffled stream, and says so."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    rows = _dataset({"text": [f"text {place}" for place in range(100)]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="abc"))
    corpus = load_corpus("some/data", limit=100)
    assert corpus.sampling == "first documents of a shuffled stream (seed 0, buffer 10000)"
    assert [document.text for document in corpus.documents] == [f"text {place}" for place in range(100)]
    first, second = (list(corpus.shuffled or ()) for _ in range(2))
    assert first == second and first != list(corpus.documents)
    assert load_corpus("some/data").sampling is None
    assert load_corpus(TEXTS, limit=9).sampling == "documents by hash of place and text"
    with pytest.raises(CorpusError):
        load_corpus("some/data", limit=0)
