"""How neurons of experts see a text: where the router chose their expert, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
from families import MIXTURES
from test_trace import TEXT, slow_tail
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.tracing.trace import trace
from mnemoscope.views.trace import page


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny mixture with a shared expert behind a gate."""
    return mn.load_model(MIXTURES["qwen2_moe"](), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run of it, with null units."""
    return mn.build(model, texts(120), tmp_path_factory.mktemp("runs") / "run", top=5)


@pytest.fixture(scope="module")
def stream(model: Model) -> Stream:
    """The whole pass over the text, token by token."""
    return model.traced(torch.tensor([model.tokenizer(TEXT)["input_ids"]]))


def _sometimes(run: mn.Run, stream: Stream) -> tuple[int, int]:
    """An expert of layer 1 that the router chose at some tokens of the text and not at others, and a neuron of it."""
    weights = stream.layers[1].weights
    assert weights is not None
    count, width = run.manifest.model.experts[1]
    ran = (weights[:, :count] != 0).float().mean(0)
    expert = int((ran * (1 - ran)).argmax())
    return expert, expert * width + 3


def test_a_neuron_of_an_expert_is_followed_where_it_runs(model: Model, run: mn.Run, stream: Stream) -> None:
    """Its coefficients, the router's weights and how unusual they are; none where the token went to other experts."""
    weights, (expert, neuron) = stream.layers[1].weights, _sometimes(run, stream)
    (followed,) = trace(model, TEXT, run=run, neurons=[(1, neuron)]).neurons
    assert str(followed.neuron) == f"L1E{expert}N3"
    seen = [reading.coefficient is not None for reading in followed.readings]
    assert seen == (weights[:, expert] != 0).tolist()
    assert 0 < sum(seen) < len(seen)
    for position, reading in enumerate(followed.readings):
        if reading.coefficient is None:
            assert (reading.tail, reading.size, reading.weight, reading.trigger) == (None, None, None, False)
            continue
        expected = float(stream.layers[1].coefficients[position, followed.neuron.neuron])
        assert reading.coefficient == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert reading.weight == pytest.approx(float(weights[position, expert]), rel=1e-4)
        if position:
            assert reading.tail == slow_tail(run, *followed.neuron, reading.coefficient)


def test_the_most_unusual_are_those_that_run(model: Model, run: mn.Run, stream: Stream) -> None:
    """At each token the least tails of the neurons that the router chose there, and what chance gives of these."""
    found = trace(model, TEXT, run=run, top=3)
    tokens = run.table("neurons").select(pl.col("tokens").sum()).collect().item()
    assert found.units == round(tokens / run.manifest.corpus.counted) < len(model.cells)
    assert set(found.shares) == {"neuron", "random", "rotated"}
    for position in range(1, len(found.tokens)):
        tails = []
        for layer, traced in enumerate(stream.layers):
            ran = model.anatomy.layers[layer].spread(traced.weights[position]) != 0
            for neuron in ran.nonzero()[:, 0].tolist():
                tails.append(slow_tail(run, layer, neuron, float(traced.coefficients[position, neuron])))
        readings = [unusual.reading for unusual in found.unusual[position]]
        assert [reading.tail for reading in readings] == sorted(tails)[:3]
        assert all(reading.expected == reading.tail * found.units for reading in readings)
        share = found.shares["neuron"][position]
        assert share == pytest.approx(np.mean(np.array(tails) <= found.level))
        assert all(0 <= shares[position] <= 1 for shares in found.shares.values())


def test_without_a_run_what_is_written_decides(model: Model, stream: Stream) -> None:
    """|coefficient| x router's weight x norm of the value."""
    found = trace(model, TEXT, top=1)
    for position in range(1, len(found.tokens)):
        written = [
            traced.amounts(layer, position).abs() * layer.values().float().norm(dim=1)
            for layer, traced in zip(model.anatomy.layers, stream.layers, strict=True)
        ]
        (best,) = found.unusual[position]
        assert best.reading.size == pytest.approx(max(float(sizes.max()) for sizes in written), rel=1e-4)


def test_terminal_page_and_json_say_what_was_not_routed(model: Model, run: mn.Run, stream: Stream) -> None:
    """The same words in each, the router's weight beside what ran, and nothing undefined in the JSON."""
    traced = trace(model, TEXT, run=run, neurons=[(1, _sometimes(run, stream)[1])])
    kinds = {reading.coefficient is None for reading in traced.neurons[0].readings}
    assert kinds == {True, False}
    weight = next(r.weight for r in traced.neurons[0].readings if r.weight is not None)
    for shown in (str(traced), page(traced)):
        assert "not routed" in shown
        assert f"router {weight:.3f}"[:10] in shown
    assert "not routed: the router sent the token to other experts" in page(traced)
    assert "that run there" in page(trace(model, TEXT, run=run, top=1))
    assert "NaN" not in json.dumps(traced.to_dict())
