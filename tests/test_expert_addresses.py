"""Neurons of experts are asked for, and printed, with their expert."""

from __future__ import annotations

import json
import pickle

import pytest
from families import FAMILIES, MIXTURES
from tiny import model_folder, texts, tokenizer
from typer.testing import CliRunner

from mnemoscope import build, explain, load_model
from mnemoscope.api import Run, open_run
from mnemoscope.cli import app
from mnemoscope.errors import QueryError
from mnemoscope.records import Cells, ExpertNeuronId, NeuronId, check_address
from mnemoscope.views import words
from mnemoscope.views.words import number

CELLS = Cells((40, 4 * 20 + 28), ((0, 0), (4, 20)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a mixture with a shared expert."""
    folder = tmp_path_factory.mktemp("mixture")
    model = load_model(model_folder(folder / "model", "qwen2_moe"), dtype="fp32")
    build(model, texts(60), folder / "run", top=5, nulls=())
    return open_run(folder / "run")


def test_every_neuron_is_found_by_what_it_prints() -> None:
    """An address prints with its expert, reads back, and is the pair of layer and neuron that it always was."""
    for layer, size in enumerate(CELLS.sizes):
        for neuron in range(size):
            address = CELLS.id(layer, neuron)
            assert address == (layer, neuron) == CELLS.parse(str(address)) == CELLS.parse(f"{layer}.{neuron}")
            assert ("E" in str(address)) == (layer == 1)
            assert str(pickle.loads(pickle.dumps(address))) == str(address)
    assert str(CELLS.id(1, 25)) == "L1E1N5" and str(CELLS.id(1, 85)) == "L1E4N5"
    assert str(CELLS.id(0, 5)) == "L0N5" and isinstance(CELLS.id(1, 0), ExpertNeuronId)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("L1E5N0", "layer 1 has experts 0 to 4"),
        ("L1E3N20", "expert 3 of layer 1 has neurons 0 to 19"),
        ("L1E4N28", "expert 4 of layer 1 has neurons 0 to 27"),
        ("L0E1N3", "layer 0 has no experts"),
        ("L7E1N3", "layers 0 to 1"),
        ("L1EN3", "is not an address"),
    ],
)
def test_an_expert_that_is_not_there_is_one_line(text: str, reason: str) -> None:
    """The message names what there is."""
    with pytest.raises(QueryError, match=reason) as caught:
        CELLS.parse(text)
    assert "\n" not in str(caught.value)


def test_an_address_is_checked_before_a_model_is_loaded() -> None:
    """With an expert or without; what is neither is refused."""
    check_address("L13E5N366")
    check_address("13.366")
    with pytest.raises(QueryError, match="L13E5N366"):
        check_address("L13E5")


def test_a_run_is_asked_by_expert(run: Run) -> None:
    """Card, terminal, JSON and find name the expert, and say how often tokens are routed to it."""
    card = run["L1E2N3"]
    width = card.experts[1] if card.experts else 0
    assert (card.layer, card.neuron) == (1, 2 * width + 3)
    assert str(card.id) == "L1E2N3" and str(card.next) == "L1E2N4" and str(card.previous) == "L1E2N2"
    tokens = run.table("neurons").collect().row(run.manifest.model.cells.cell(*card.id), named=True)["tokens"]
    assert card.routed == tokens / run.manifest.corpus.counted
    assert 0 < card.routed < 1
    assert f"expert 2 of 4, routed in {card.routed * 100:.3g} % of tokens" in str(card)
    assert "routed in" in card._repr_html_()
    assert card.to_dict()["id"] == "L1E2N3" and card.to_dict()["neuron"] == card.neuron
    assert "shared expert, routed in 100 % of tokens" in str(run["L1E4N0"])
    assert run.find(sort="max", count=3).rows["neuron"].str.contains("E").all()
    with pytest.raises(QueryError, match="experts 0 to 4"):
        run["L1E9N0"]


def test_the_router_weight_stands_beside_each_trigger(run: Run) -> None:
    """On the card as stored, and in the terminal and on the page before the title."""
    card = run["L1E2N3"]
    sides = {1: card.positive, -1: card.negative}
    stored = run.rows("trigger_weights", 1, card.neuron)
    assert len(stored) == sum(side.stored for side in sides.values()) > 0
    for row in stored.iter_rows(named=True):
        example = sides[row["polarity"]].examples[row["rank"]]
        assert example.router_weight == row["router_weight"]
        assert f"router {number(row['router_weight'])} · " in words.source(example)
    first = card.sides[0].examples[0]
    assert f"router {number(first.router_weight)} · " in str(card)
    assert f"router {number(first.router_weight)} · " in card._repr_html_()
    assert all(example.router_weight is None for example in card.between)


def test_the_commands_take_an_expert(run: Run) -> None:
    """`show` prints it; an expert that is not there is one line."""
    shown = CliRunner().invoke(app, ["show", str(run.path), "L1E2N3", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)["id"] == "L1E2N3"
    refused = CliRunner().invoke(app, ["show", str(run.path), "L1E9N3"])
    assert refused.exit_code != 0


def test_an_explanation_names_experts(run: Run) -> None:
    """Rows, causes and the headline say the expert; numbers of layer and neuron stay in the frames."""
    model = load_model(MIXTURES["mixtral"](), tokenizer=tokenizer())
    explanation = explain(model, "the capital of France is", " Paris", " London")
    rows = explanation.neurons.select("layer", "neuron", "address").rows()
    assert all(model.cells.parse(name) == (layer, neuron) for layer, neuron, name in rows)
    assert rows[0][2] in str(explanation)
    asked = explanation.queries.filter(explanation.queries["kind"] == "neuron").row(0, named=True)
    assert model.cells.parse(asked["query_address"]) == (asked["query_layer"], asked["query_unit"])
    assert "E" not in str(load_model(FAMILIES["llama"](), tokenizer=tokenizer()).cells.id(1, 3))
    assert isinstance(NeuronId(0, 1), tuple)
