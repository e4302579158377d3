"""Many prompts, one table; and the command that explains one or many."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from synthetic_explanation import make
from test_views import assert_self_contained
from tiny import model_folder

from mnemoscope.cli import main
from mnemoscope.errors import QueryError, RunError
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.prediction.batch import SCHEMA, explain_many, rows

PROMPTS = [
    {
        "prompt": "Paris is the capital of",
        "target": " France",
        "foils": [" London", " Berlin"],
        "label": "capital",
    },
    {"prompt": "the river in the city", "foils": " of"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """The same, loaded."""
    return load_model(str(folder), dtype="fp32")


@pytest.fixture(scope="module")
def table(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both prompts explained."""
    return explain_many(
        model, PROMPTS, tmp_path_factory.mktemp("out") / "new" / "table.parquet", top=3, ablate=1
    )


def test_tokens_by_their_ids_are_explained(model: Model, tmp_path: Path) -> None:
    """A line may give ids where a text would be read otherwise, one foil or a list."""
    france, london = (model.tokenizer(text)["input_ids"][0] for text in (" France", " London"))
    lines = [
        {"prompt": "Paris is the capital of", "target": " France", "foils": " London"},
        {"prompt": "Paris is the capital of", "target_id": france, "foil_ids": london},
    ]
    both = pl.read_parquet(explain_many(model, lines, tmp_path / "table.parquet", top=2)).drop("label")
    one, other = (both.filter(pl.col("prompt") == number).drop("prompt") for number in (0, 1))
    assert one.equals(other)


def test_the_schema_is_the_documented_one(table: Path) -> None:
    """The file has the columns of `SCHEMA`, says what made it, and docs/format.md names them all."""
    schema = pq.read_schema(table)
    assert schema.remove_metadata() == SCHEMA
    assert schema.metadata[b"lens"] == b"frozen"
    assert len(schema.metadata[b"weights_sha256"]) == 64
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    described = page.split("## Explanations of many prompts")[1]
    assert [name for name in SCHEMA.names if f"`{name}`" not in described] == []


def test_rows_are_in_order_and_whole(table: Path) -> None:
    """Prompts follow the input, every frame is there, and a label is that of its line."""
    found = pl.read_parquet(table)
    assert found["prompt"].is_sorted()
    assert found["prompt"].unique().to_list() == [0, 1]
    assert found.filter(pl.col("prompt") == 0)["label"].unique().to_list() == ["capital"]
    assert (
        found.filter(pl.col("prompt") == 1)["label"].null_count()
        == found.filter(pl.col("prompt") == 1).height
    )
    frames = {
        "total",
        "remainder",
        "stream",
        "layers",
        "others",
        "heads",
        "whole_heads",
        "sources",
        "neurons",
    }
    assert frames | {"queries", "ablations"} == set(found["frame"])
    assert found["foil"].drop_nulls().n_unique() == 3


def test_a_table_adds_up(table: Path) -> None:
    """For each prompt and foil the `layers` sum to `total`, and so do listed parts and `remainder`."""
    found = pl.read_parquet(table)
    for _, group in found.group_by("prompt", "foil"):
        sums = {name: group.filter(pl.col("frame") == name)["increase"].sum() for name in set(group["frame"])}
        assert sums["layers"] == pytest.approx(sums["total"], abs=1e-4)
        biases = group.filter((pl.col("frame") == "others") & pl.col("part").str.ends_with("bias"))
        listed = sums["heads"] + sums["neurons"] + biases["increase"].sum()
        assert listed + sums["remainder"] == pytest.approx(sums["total"], abs=1e-4)


def test_every_row_of_every_frame_is_kept() -> None:
    """One explanation becomes as many rows as its frames have, and two for each total and remainder."""
    one = make()
    found = rows(one, 4, "label")
    frames = [
        one.stream,
        one.layers,
        one.others,
        one.heads,
        one.whole_heads,
        one.sources,
        one.neurons,
        one.queries,
    ]
    count = sum(frame.height for frame in (*frames, one.ablations)) + 2
    for each in one.contrasts:
        parts = (each.layers, each.others, each.heads, each.sources, each.neurons)
        count += sum(frame.height for frame in parts) + 2
    assert found.height == count
    switched = found.filter(pl.col("frame") == "queries")
    assert switched["share"].to_list() == one.queries["share"].to_list()
    assert set(found.columns) <= set(SCHEMA.names)


BAD = {
    "not JSON": ("{'prompt': 'x'}", "line 3: this is not JSON"),
    "not an object": ('["x"]', "line 3: this is a list"),
    "no prompt": ('{"target": " x"}', "line 3: 'prompt' is null"),
    "wrong foils": ('{"prompt": "x", "foils": [1]}', "line 3: 'foils' is [1]"),
    "wrong position": ('{"prompt": "x", "position": "last"}', "line 3: 'position' is \"last\""),
    "wrong id": ('{"prompt": "x", "target_id": " Paris"}', "line 3: 'target_id' is \" Paris\""),
    "wrong ids": ('{"prompt": "x", "foil_ids": [1, true]}', "line 3: 'foil_ids' is [1, true]"),
    "unknown key": (
        '{"prompt": "x", "foil": " y"}',
        "line 3: unknown key 'foil'; a prompt has prompt, target, foils",
    ),
    "no answer": ('{"prompt": ""}', "line 3: explaining a prediction: the prompt is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named(kind: str, model: Model, tmp_path: Path) -> None:
    """The message has the number of the line, blank lines counted; and no table appears."""
    line, words = BAD[kind]
    source, out = tmp_path / "prompts.jsonl", tmp_path / "table.parquet"
    source.write_text(f'{{"prompt": "Paris is"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(QueryError) as caught:
        explain_many(model, source, out, top=2)
    assert f"{source}, {words}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"\n\n", "has none"), (b"\xff", "utf-8")]
)
def test_a_file_without_prompts_is_refused(
    content: bytes | None, words: str, model: Model, tmp_path: Path
) -> None:
    """Missing, empty, or not text."""
    source = tmp_path / "prompts.jsonl"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(QueryError, match=words):
        explain_many(model, source, tmp_path / "table.parquet")


def test_a_table_that_cannot_be_written_leaves_nothing(model: Model, tmp_path: Path) -> None:
    """Where there is a folder of that name, one line says so, and what was there stays."""
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(RunError, match="writing the table"):
        explain_many(model, PROMPTS[1:], tmp_path / "taken.csv", top=2)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.csv"]


@pytest.mark.slow
def test_the_command_explains_one_and_many(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`explain` prints a report, or JSON that is the whole explanation; writes a page; and a table for a file."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mnemoscope", "explain", str(folder), *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        return capsys.readouterr().out

    question = ["Paris is the capital of", "--target", " France", "--foil", " London", "--dtype", "fp32"]
    shown = call(*question, "--html", tmp_path / "page.html", "--ablate", 2, "--top", 3)
    assert shown.startswith("“ Paris is the capital of” → ·France")
    assert "not shown" in shown
    assert_self_contained((tmp_path / "page.html").read_text(encoding="utf-8"))
    data = json.loads(call(*question, "--position", 1, "--lens", "own", "--json"))
    assert "--position 1" in call(*question, "--position", 1)
    assert (data["position"], data["lens"], data["contrasts"][0]["foil"]["piece"]) == (1, "own", " London")
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(map(json.dumps, PROMPTS)), encoding="utf-8")
    assert call("--prompts", source, "-o", tmp_path / "table.parquet", "--dtype", "fp32", "--top", 2) == ""
    assert pl.read_parquet(tmp_path / "table.parquet")["prompt"].n_unique() == 2
