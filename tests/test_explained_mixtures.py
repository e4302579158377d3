"""Explaining a prediction of a mixture of experts: parts carry the router's weight, and add up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import polars as pl
import pytest
import torch
from families import FAMILIES, MIXTURES, slow_but_for
from tiny import tokenizer
from transformers import PreTrainedModel

from mnemoscope import explain, load_model
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.prediction.search import exhaustive
from mnemoscope.prediction.switching import layer_queries, neuron_shares, switches
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Cells
from mnemoscope.text.spelling import vocabulary_of

PROMPT = "the capital of France is"
EVERY = 1_000_000  # rows: all that there are
NAMES = slow_but_for(sorted(MIXTURES), {"mixtral", "gpt_oss", "qwen2_moe"})


@cache
def _model(name: str) -> Model:
    torch.manual_seed(0)
    return load_model(MIXTURES[name](), tokenizer=tokenizer())


@cache
def _explained(name: str, top: int = EVERY) -> Explanation:
    return explain(_model(name), PROMPT, " Paris", " London", top=top)


@cache
def _stream(name: str) -> Stream:
    model = _model(name)
    with model.running():
        return model.traced(torch.tensor([tokenizer()(PROMPT)["input_ids"]]))


@pytest.mark.parametrize("name", NAMES)
def test_all_parts_add_up(name: str) -> None:
    """Logits of all heads, neurons and biases are the model's, and nothing of a contrast is left; in nats."""
    explanation = _explained(name)
    rows = [explanation.heads, explanation.neurons, explanation.others]
    whole = float(explanation.stream["logit"][-1])
    assert sum(float(frame["logit"].sum()) for frame in rows) == pytest.approx(whole, abs=1e-4)
    assert abs(explanation.contrasts[0].remainder) <= 1e-4
    with torch.no_grad():
        plain = _model(name).hf(_stream(name).tokens[None]).logits[0, -1]
    assert whole == pytest.approx(float(plain[explanation.target.token]), abs=1e-4)
    assert any("router" in note for note in explanation.notes)


@pytest.mark.parametrize("name", NAMES)
def test_shares_add_up_to_coefficients(name: str) -> None:
    """What came before and the key's bias make each coefficient, by both branches together and by each alone."""
    stream = _stream(name)
    last = len(stream.tokens) - 1
    ran = 0
    for layer, size in enumerate(stream.anatomy.sizes):
        if not size:
            continue
        amounts = stream.layers[layer].amounts(stream.anatomy.layers[layer], last)
        routed = amounts.nonzero()[:, 0]
        ran += len(routed)
        memory = switches(stream, layer, last, routed)
        below = layer_queries(stream, layer, last)
        for linear in filter(None, (memory.share, memory.gate, memory.up)):
            total = linear.of(below).sum(0) + linear.bias
            assert torch.allclose(total, memory.coefficient, rtol=1e-3, atol=1e-4 * float(total.abs().max()))
    assert 0 < ran < sum(stream.anatomy.sizes)


@pytest.mark.parametrize("name", NAMES)
def test_neurons_bring_to_others_what_their_layer_brings(name: str) -> None:
    """What neurons and biases bring to any key is what the FFN wrote brings: the router's weight is in it."""
    stream = _stream(name)
    last = len(stream.tokens) - 1
    keys = torch.randn(3, stream.anatomy.width, generator=torch.Generator().manual_seed(0))
    points = stream.points(last)
    for layer, size in enumerate(stream.anatomy.sizes):
        if size:
            written = points[2 * layer + 2] - points[2 * layer + 1]
            shares = neuron_shares(stream, layer, last, keys).sum(0) + keys @ stream.ffn_bias(layer, last)
            assert torch.allclose(shares, keys @ written, rtol=1e-3, atol=1e-4), layer


def test_the_router_weight_stands_beside_each_neuron() -> None:
    """It is that of the neuron's expert at the explained position, null in a dense layer, and 0 where none ran."""
    hf = cast("Callable[..., PreTrainedModel]", MIXTURES["glm4_moe"])(first_k_dense_replace=1)
    model = load_model(hf, tokenizer=tokenizer())
    explanation = explain(model, PROMPT, " Paris", " London", top=EVERY)
    with model.running():
        stream = model.traced(torch.tensor([tokenizer()(PROMPT)["input_ids"]]))
    frame, last = explanation.neurons, len(stream.tokens) - 1
    for row in frame.iter_rows(named=True):
        traced, block = stream.layers[row["layer"]], stream.anatomy.layers[row["layer"]]
        if traced.weights is None:
            assert row["router_weight"] is None
            continue
        group = next(i for i, rows in enumerate(block.rows()) if row["neuron"] < rows.neurons.stop)
        assert row["router_weight"] == pytest.approx(float(traced.weights[last, group]))
    assert frame["router_weight"].null_count() > 0
    assert (frame["router_weight"] > 0).any()
    assert "router_weight" in explanation.contrasts[0].neurons.columns


def test_a_dense_model_has_no_router_weight() -> None:
    """Its frames are what they were."""
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    explanation = explain(model, PROMPT, " Paris", " London")
    assert "router_weight" not in explanation.neurons.columns
    assert not any("router" in note for note in explanation.notes)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_neurons_shown_are_the_largest_of_all(name: str) -> None:
    """The certified search finds what brute force over all weighted vectors finds."""
    model, few = _model(name), _explained(name, top=5)
    lens = Lens.of(model.anatomy, "frozen")
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    prediction = TracedPrediction(_stream(name), lens, few.target.token, (), words)
    groups = prediction.groups("neurons")
    values = torch.cat([exhaustive(prediction.bases, group, final=prediction.final) for group in groups])
    cells = Cells(model.anatomy.sizes)
    shown = {int(cells.cell(row["layer"], row["neuron"])) for row in few.neurons.iter_rows(named=True)}
    for column in range(values.shape[1]):
        for sign in (1, -1):
            assert set((sign * values[:, column]).topk(5).indices.tolist()) <= shown


def test_switches_carry_to_the_page_and_to_json() -> None:
    """Terminal and page show the router's weight; a neuron on top of the list has a row for each of its causes."""
    explanation = explain(_model("mixtral"), PROMPT, " Paris", " London", ablate=3)
    assert "router" in str(explanation) and "router weight" in explanation._repr_html_()
    assert explanation.to_dict()["neurons"][0]["router_weight"] is not None
    assert explanation.ablations.height > 0
    sums = explanation.queries.group_by("layer", "neuron").agg(pl.col("share").sum())
    joined = sums.join(explanation.neurons, on=["layer", "neuron"])
    assert joined["share"].to_numpy() == pytest.approx(joined["coefficient"].to_numpy(), rel=1e-4)
