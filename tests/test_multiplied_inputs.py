"""Experts that read each token times the router's score (Llama 4): they are no entries of transformers' registry."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from every_family import tiny
from tiny import tokenizer
from torch import Tensor

from mnemoscope import explain
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model import stream as streams
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream, trace
from mnemoscope.prediction.ablate import Cut, effects
from mnemoscope.prediction.switching import layer_queries, switches
from mnemoscope.records import ContextBatch

TOKENS = np.array([[5, 9, 3, 70, 22], [8, 1, 60, 33, 2]])


@cache
def _model() -> Model:
    return load_model(tiny("llama4_text"), tokenizer=tokenizer())


def _stream() -> Stream:
    return trace(_model().hf, _model().anatomy, torch.from_numpy(TOKENS[:1]))


@torch.no_grad()
def _eager(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the experts of layer 1 read, and what their down projections read, by the module's own formula."""
    experts: Any = _model().anatomy.layers[1].experts
    read: list[Tensor] = []
    handle = experts.module.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    _model().hf(input_ids=torch.from_numpy(tokens), use_cache=False)
    handle.remove()
    x = read[0].view(len(experts.module.down_proj), tokens.size, -1)
    gate, up = torch.bmm(x, experts.module.gate_up_proj).chunk(2, -1)
    return x, up * experts.module.act_fn(gate)


def test_a_sweep_hands_out_what_each_expert_read_and_did() -> None:
    """Inputs with the router's score in them, coefficients and tokens are the eager ones; all weights are 1."""
    inputs, coefficients = _eager(TOKENS)
    batch = ContextBatch(np.arange(2), TOKENS, np.array([5, 5]), np.ones_like(TOKENS, dtype=bool))
    pieces: list[LayerRows] = []
    with Capture(_model()) as capture:
        capture.sweep(batch, lambda *_: None, lambda rows, _: pieces.extend(rows.each()))
    routed = [piece for piece in pieces if piece.group < 4]
    assert len(routed) > 1
    for piece in routed:
        assert piece.rows is not None and piece.layer == 1
        assert piece.rows.tolist() == inputs[piece.group].any(-1).nonzero()[:, 0].tolist()
        torch.testing.assert_close(piece.inputs, inputs[piece.group, piece.rows])
        torch.testing.assert_close(piece.coefficients, coefficients[piece.group, piece.rows])
        assert isinstance(piece.weight, Tensor) and bool((piece.weight == 1).all())
    assert sum(len(piece.inputs) for piece in routed) == 2 * TOKENS.size


def test_an_explanation_adds_up_and_so_do_the_shares_of_coefficients() -> None:
    """Keys are read through the router's score: what came before makes each coefficient."""
    told = explain(_model(), "the city of", " Paris", top=10_000)
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    stream, last = _stream(), TOKENS.shape[1] - 1
    ran = stream.layers[1].amounts(stream.anatomy.layers[1], last).nonzero()[:, 0]
    memory = switches(stream, 1, last, ran)
    for linear in filter(None, (memory.share, memory.gate, memory.up)):
        total = linear.of(layer_queries(stream, 1, last)).sum(0) + linear.bias
        torch.testing.assert_close(total, memory.coefficient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_neuron_of_an_expert_is_ablated() -> None:
    """Its effect is that of the model without its value: the row of the down projection set to 0."""
    stream, model = _stream(), _model()
    experts: Any = model.anatomy.layers[1].experts
    last = stream.layers[1].coefficients[-1]
    neuron = int(last[: experts.count * experts.width].abs().argmax())
    expert, unit = divmod(neuron, experts.width)
    whole = model.hf(input_ids=stream.tokens[None], use_cache=False).logits[0, -1].log_softmax(-1)[7]
    row = experts.module.down_proj[expert, unit]
    kept = row.clone()
    row.zero_()
    changed = model.hf(input_ids=stream.tokens[None], use_cache=False).logits[0, -1].log_softmax(-1)[7]
    row.copy_(kept)
    (effect,) = effects(load_model(model.hf, tokenizer=tokenizer()), stream, 7, [Cut(1, neuron)])
    assert effect == pytest.approx(float(whole - changed), abs=1e-5) and abs(effect) > 1e-6


@pytest.mark.parametrize("part", ["score of the router", "shared expert", "experts"])
def test_a_part_that_is_left_out_is_caught(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the scores keys do not give what the experts computed; without a half of them the FFN does not add up."""
    model = tiny("llama4_text")
    anatomy, error = examine(model)
    assert error <= 1e-5
    if part == "score of the router":
        whole = streams.Witness.trace

        def forgetful(self: Any, index: int, anatomy: Any) -> Any:
            return replace(whole(self, index, anatomy), scores=None)

        monkeypatch.setattr(streams.Witness, "trace", forgetful)
    elif part == "experts":
        anatomy = replace(anatomy, layers=(anatomy.layers[0], replace(anatomy.layers[1], experts=None)))
    else:
        changed = replace(anatomy.layers[1], down=None)
        anatomy = replace(anatomy, layers=(anatomy.layers[0], changed))
    with pytest.raises(ModelNotSupported):
        self_check(model, anatomy)
