"""Examples on the pages that ask: of the run that is served, true of it, and such that they are answered."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from starlette.testclient import TestClient
from synthetic import make_run
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.atlas.app import create
from mnemoscope.atlas.examples import LONGEST, MOST, ExampleQuestion, examples, refused
from mnemoscope.patterns import language
from mnemoscope.run.text import Text

HERE = "http://127.0.0.1:8321"
PAGES = ("explain", "text", "steer", "test", "search", "sql")
LIVE = PAGES[:4]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished run without a model, some of whose text no reader could have typed."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return mn.open_run(make_run(path, neurons=20, documents=60, hostile=True).path)


@pytest.fixture(scope="module")
def client(run: mn.Run) -> TestClient:
    """A browser on this machine."""
    return TestClient(create([run]), base_url=HERE)


@pytest.fixture(scope="module")
def chosen(run: mn.Run) -> dict[str, tuple[ExampleQuestion, ...]]:
    """Of each page all examples that there are of many neurons."""
    cards = [run.neuron(layer, neuron) for layer in range(3) for neuron in range(20)]
    return {page: tuple(each for card in cards for each in examples(page, run, [card])) for page in PAGES}


def _links(html: str) -> list[str]:
    """Where the examples of a page lead."""
    section = html.partition('<section id="examples"')[2].partition("</section>")[0]
    return [unescape(link) for link in re.findall(r'<li><a href="([^"]*)"', section)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_was_asked_nothing_has_examples(client: TestClient, run: mn.Run, page: str) -> None:
    """A few links that fill in its form; before the neurons to begin with are chosen, a part that comes later."""
    fresh = TestClient(create([mn.open_run(run.path)]), base_url=HERE)
    assert f'data-part="/runs/run/examples/{page}"' in fresh.get(f"/runs/run/{page}").text
    there = _links(fresh.get(f"/runs/run/examples/{page}").text)
    assert 2 <= len(there) <= MOST and len(set(there)) == len(there)
    assert _links(fresh.get(f"/runs/run/{page}").text) == there
    data = fresh.get(f"/runs/run/examples/{page}.json").json()
    for link, example in zip(there, data, strict=True):
        place, given = urlsplit(link).path, parse_qs(urlsplit(link).query)
        assert place == f"/runs/run/{page}" and given == {
            name: [value] for name, value in example["given"].items()
        }
        opened = fresh.get(link)
        assert opened.status_code == 200 and not _links(opened.text)
        assert ("data-live" in opened.text) == (page in LIVE)


def test_there_are_no_others(client: TestClient) -> None:
    """A page without examples is said to have none."""
    answer = client.get("/runs/run/examples/annotate.json")
    assert answer.status_code == 404 and "explain" in answer.json()["problem"]


def test_a_neuron_that_is_asked_about_has_its_own(client: TestClient, run: mn.Run) -> None:
    """As when its page led here; an address that is none is passed over."""
    for page in ("steer", "test", "text"):
        name = "neurons" if page == "text" else "neuron"
        links = _links(client.get(f"/runs/run/{page}?{name}=L1N5").text)
        assert links and all("L1N5" in link for link in links[1:])
        assert client.get(f"/runs/run/{page}?{name}=nothing").status_code == 200
    assert not examples("test", run, [run["L1N0"]]), "a dead neuron has no triggers"


def test_texts_are_the_runs_own_and_could_have_been_typed(run: mn.Run, chosen: dict[str, Any]) -> None:
    """Each is found in a context as it is, and holds nothing that is not seen."""
    whole = [
        run.vocabulary.text(row["tokens"]) for row in run.table("contexts").collect().iter_rows(named=True)
    ]
    for page, name in (("explain", "prompt"), ("steer", "prompt"), ("text", "text")):
        assert len(chosen[page]) > 40
        for example in chosen[page]:
            text = example.given[name]
            assert any(text in context for context in whole), text
            assert (
                text == text.lstrip()
                and 0 < len(text) <= 2 * LONGEST
                and "\x00" not in text
                and "\u202e" not in text
            )
    starts = [example.given["prompt"] for example in chosen["explain"] if len(example.given["prompt"]) > 60]
    assert starts and np.mean([text[0].isupper() or not text[0].isascii() for text in starts]) > 0.5, (
        "sentences"
    )


def test_patterns_hold_as_often_as_is_said(run: mn.Run, chosen: dict[str, Any]) -> None:
    """Counted by the language of patterns itself, over the triggers of the neuron."""
    text, said = Text.of(run), 0
    for example in chosen["test"]:
        card = run[example.given["neuron"]]
        side = card.sides[0]
        rows = [
            int(text.starts[np.searchsorted(text.contexts, each.context)]) + each.position
            for each in side.examples
        ]
        mask = language.masks(text, [example.given["pattern"]]).toarray()[:, 0]
        count, stored, *_ = (int(word) for word in example.why.split() if word.isdigit())
        assert stored <= side.stored and count <= int(mask[rows].sum()), (example, mask[rows].sum())
        said += 1
    assert said > 20


def test_searches_and_statements_find_something(client: TestClient, chosen: dict[str, Any]) -> None:
    """Each example of the two pages that need no model."""
    for example in chosen["search"][::5]:
        data = client.get(f"/runs/run/search.json?{example.query}").json()
        assert data[example.given["by"]].get("total"), (example, data)
    for example in chosen["sql"][:6]:
        rows = client.get(f"/runs/run/sql.json?{example.query}").json()
        assert rows and isinstance(rows, list), example


@pytest.mark.parametrize(
    ("page", "changes"),
    [
        ("explain", {"readout": "input embedding"}),
        ("steer", {"bidirectional": True}),
        ("steer", {"encoder_layers": 1}),
        ("test", {"encoder_layers": 1}),
    ],
)
def test_what_a_model_cannot_be_asked_is_said(run: mn.Run, page: str, changes: dict[str, Any]) -> None:
    """In a line in place of examples; what any can be asked is not refused."""
    model = run.manifest.model.model_copy(update=changes)
    why = refused(page, model)
    assert why and not refused(page, run.manifest.model) and not refused("text", model)
    other = mn.open_run(run.path)
    other.manifest = run.manifest.model_copy(update={"model": model})
    shown = TestClient(create([other]), base_url=HERE).get(f"/runs/run/{page}").text
    assert why in shown and 'id="examples"' not in shown


def test_a_model_that_is_gone_is_said(tmp_path: Path) -> None:
    """Before anything is asked; with another place of it, questions can be asked."""
    folder = model_folder(tmp_path / "model")
    run = mn.build(mn.load_model(folder, dtype="fp32"), texts(20), tmp_path / "run", top=3)
    pages = [TestClient(create([run]), base_url=HERE).get(f"/runs/run/{page}").text for page in LIVE]
    assert not any("cannot be asked" in page for page in pages)
    shutil.move(folder, tmp_path / "moved")
    pages = [TestClient(create([run]), base_url=HERE).get(f"/runs/run/{page}").text for page in LIVE]
    assert all("cannot be asked" in page and "is not there any more" in page for page in pages)
    there = TestClient(create([run], str(tmp_path / "moved")), base_url=HERE)
    assert "cannot be asked" not in there.get("/runs/run/steer").text


# -- what is answered -----------------------------------------------------------------------------------------------


def _built(kind: str, folder: Path) -> mn.Run:
    """A run of a tiny model of some kind."""
    from every_family import tiny
    from test_encoder_decoders import whole
    from test_encoders import reading

    text: Any = texts(400)
    if kind == "encoder":
        tiny("bert", "masked").save_pretrained(folder / "model")
        reading().save_pretrained(folder / "model")
    elif kind == "pairs":
        whole("t5", decoder_start_token_id=2).save_pretrained(folder / "model")
        reading().save_pretrained(folder / "model")
        rows = [
            {"text": a, "summary": b} for a, b in zip(texts(60), texts(60, seed=2, longest=20), strict=True)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        text = mn.load_corpus(folder / "pairs.jsonl", target="summary")
    else:
        model_folder(folder / "model", "mixtral" if kind == "mixture" else "llama")
    return mn.build(mn.load_model(folder / "model", dtype="fp32"), text, folder / "run", top=10)


@pytest.fixture(scope="module", params=["decoder", "encoder", "pairs", "mixture"])
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose model can be asked."""
    return _built(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_every_example_is_answered(built: mn.Run) -> None:
    """By the model itself, whatever its kind; of a page that cannot be asked there are none."""
    asked = 0
    with TestClient(create([built]), base_url=HERE) as client:
        client.get("/runs/run/begin")
        for page in PAGES:
            for link in _links(client.get(f"/runs/run/{page}").text):
                place, _, query = link.partition("?")
                answer = client.get(f"{place}.json?{query}")
                assert answer.status_code == 200, (link, answer.text)
                asked += 1
    assert asked >= 8
