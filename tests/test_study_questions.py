"""The rank of an answer at every point of the stream, and sets of questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings.questions import findings
from mnemoscope.studies.measures import questions
from mnemoscope.studies.measures.positions import Sizes

LINES = [
    {"subject": "Paris", "prompt": "Paris is the capital of", "answer": " France", "label": "capital"},
    {"subject": "London", "prompt": "London is the", "answer": "capital"},
    {"subject": "Berlin", "prompt": "Berlin is a city in the", "answer": " north west", "label": "capital"},
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny model, a run, and the user's three questions."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    run = mn.build(model, texts(12), folder / "run", top=3, nulls=())
    monkey = pytest.MonkeyPatch()
    monkey.setattr(questions, "built_in", lambda: [])  # its words are not in this vocabulary
    sizes = Sizes(questions=(folder / "mine.jsonl",))
    run = study.measure(run, model, chosen=catalogue.choose("questions"), sizes=sizes)
    monkey.undo()
    return run, model


def test_ranks_are_those_of_the_models_own_hidden_states(asked: tuple[Run, Model]) -> None:
    """At the end of the stream the own lens is the model: its logits give rank and log-probability."""
    run, model = asked
    rows = run.table("question_ranks").filter(pl.col("lens") == "own").collect()
    for row in rows.filter(pl.col("point") == pl.col("point").max()).iter_rows(named=True):
        ids = torch.tensor([model.tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            logits = model.hf(ids).logits[0, -1].double()
        assert row["rank"] == int((logits > logits[row["token"]]).sum())
        assert row["log_probability"] == pytest.approx(float(logits.log_softmax(0)[row["token"]]), abs=1e-4)


def test_points_of_the_stream_are_the_layers_outputs(asked: tuple[Run, Model]) -> None:
    """Points 0, 2, 4, ... are the hidden states between blocks, read by the raw lens without a norm."""
    run, model = asked
    rows = run.table("question_ranks").filter(pl.col("lens") == "raw", pl.col("question") == 0).collect()
    assert rows.height == 2 * model.anatomy.n_layers + 1
    ids = torch.tensor([model.tokenizer(LINES[0]["prompt"])["input_ids"]])
    kept: list[torch.Tensor] = []
    handles = [
        layer.module.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.anatomy.layers
    ]
    with torch.no_grad():
        model.hf(ids)
    for handle in handles:
        handle.remove()
    for layer, state in enumerate(kept):
        scores = state.reshape(-1, state.shape[-1])[-1] @ model.anatomy.unembedding().T
        row = rows.filter(pl.col("layer") == layer, pl.col("part") == "ffn").row(0, named=True)
        assert row["rank"] == int((scores > scores[row["token"]]).sum())


def test_first_tokens_and_leading_spaces(asked: tuple[Run, Model]) -> None:
    """Of several tokens the first is followed, and it is counted; missing labels are empty."""
    run, model = asked
    first = run.table("question_ranks").group_by("question").first().sort("question").collect()
    names = model.tokenizer.convert_ids_to_tokens(first["token"].to_list())
    assert names == ["ĠFrance", "Ġcapital", "Ġnorth"]
    assert first["pieces"].to_list() == [1, 1, 2]
    assert first["label"].to_list() == ["capital", "", "capital"]


def test_the_null_is_another_questions_answer(asked: tuple[Run, Model]) -> None:
    """Questions 0 and 2 share a label, so each is compared with the other's answer at the same point."""
    run, _ = asked
    rows = run.table("question_ranks").filter(pl.col("lens") == "own").collect()
    assert rows["null_rank"].null_count() == 0


def test_findings_follow_every_set(asked: tuple[Run, Model]) -> None:
    """Medians per point; shares by label with intervals; where answers settle."""
    run, _ = asked
    found = {one.id: one for one in findings(run)}
    assert set(found) == {"answer-rank-mine", "answer-first-mine", "answer-settles-mine"}
    frame = found["answer-rank-mine"].frame.filter(pl.col("lens") == "own lens")
    rows = run.table("question_ranks").filter(pl.col("lens") == "own").collect()
    for row in frame.iter_rows(named=True):
        assert row["median"] == np.median(rows.filter(pl.col("point") == row["point"])["rank"].to_numpy())


def test_the_built_in_set_is_large_and_distinct() -> None:
    """At least sixty questions, each of its own city, with an answer that begins with a space."""
    found = questions.built_in()
    assert len(found) >= 60 and len({one.subject for one in found}) == len(found)
    assert all(one.answer.startswith(" ") and one.subject in one.prompt for one in found)
    assert {one.label for one in found} == {"Europe", "Asia", "Africa", "Americas", "Oceania"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "line 1 of bad is none"),
        ('{"prompt": "a"}', "line 1 of bad is none"),
        ('{"prompt": "a", "answer": ""}', "lacks a text"),
        ("", "has none"),
        ('{"prompt": "a", "answer": "b", "extra": 1}', "line 1 of bad is none"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, text: str, said: str) -> None:
    """A line that is no question is named with its number; an empty file is refused."""
    file = tmp_path / "bad.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(QueryError, match=said):
        questions.read(file)


def test_a_missing_file_is_said() -> None:
    """So is one that cannot be read."""
    with pytest.raises(QueryError, match="cannot be read"):
        questions.read(Path("nowhere.jsonl"))
