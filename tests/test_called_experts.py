"""Experts that no registry chooses, but that are called as if one did (DBRX): ours stands in place of their code."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_family import tiny
from tiny import texts, tokenizer
from torch import Tensor, nn

from mnemoscope import build, load_model
from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.verify import verify
from mnemoscope.model import experts
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.check import examine
from mnemoscope.model.experts import Routed, dispatched, listen, taken_apart
from mnemoscope.model.model import Model
from mnemoscope.model.running import hooked
from mnemoscope.model.state import structure
from mnemoscope.model.stream import trace
from mnemoscope.records import ContextBatch

TOKENS = np.array([[5, 9, 3, 70, 22], [8, 1, 60, 33, 2]])


@cache
def _model() -> Model:
    return load_model(tiny("dbrx"), tokenizer=tokenizer())


def _modules(hf: nn.Module) -> list[Any]:
    return [module for module in hf.modules() if dispatched(module)]


@torch.no_grad()
def _eager() -> list[tuple[Tensor, Tensor]]:
    """What each expert of its own code reads, and what its down projection reads, by layer and expert."""
    read: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        x, gate, up, _ = args
        read.append((x.clone(), module.activation_fn(x @ gate.T) * (x @ up.T)))

    handles = [module.mlp.register_forward_pre_hook(note) for module in _modules(_model().hf)]
    _model().hf(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    return read


def _sorted(rows: Tensor) -> Tensor:
    return rows.double().sort(0).values


def test_a_sweep_hands_out_what_each_expert_read_and_did() -> None:
    """Inputs and coefficients of each expert are those of its own code, and nobody is left out."""
    batch = ContextBatch(np.arange(2), TOKENS, np.array([5, 5]), np.ones_like(TOKENS, dtype=bool))
    pieces: list[LayerRows] = []
    with Capture(_model()) as capture:
        capture.sweep(batch, lambda *_: None, lambda rows, _: pieces.extend(rows.each()))
    eager = _eager()
    assert len(eager) == len(pieces) > 4
    assert sum(len(x) for x, _ in eager) == 2 * 2 * TOKENS.size, (
        "each token goes to two experts in both layers"
    )
    for piece, (read, coefficients) in zip(pieces, eager, strict=True):
        assert torch.allclose(_sorted(piece.inputs), _sorted(read), atol=1e-6)
        assert torch.allclose(_sorted(piece.coefficients), _sorted(coefficients), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_adds_up(dtype: torch.dtype) -> None:
    """Router weight x coefficient x value, beside attention whose projections are clipped, in either dtype."""
    hf = tiny("dbrx").to(dtype)
    anatomy, error = examine(hf)
    assert error < 1e-5
    assert [layer.groups for layer in anatomy.layers] == [(40,) * 4] * 2
    rows = next(anatomy.layers[0].rows())
    glu = _modules(hf)[0].mlp
    assert torch.equal(rows.keys, glu.w1[:40]) and torch.equal(rows.values, glu.w2[:40])
    assert rows.ups is not None and torch.equal(rows.ups, glu.v1[:40])


def test_its_own_code_is_back_afterwards() -> None:
    """Also after an error, and where one block stands in another; a pass does not look like another model."""
    hf, before = _model().hf, structure(_model().hf)
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        own = hf(input_ids=tokens, use_cache=False).logits
        with taken_apart(hf):
            with taken_apart(hf):
                apart = hf(input_ids=tokens, use_cache=False).logits
            assert all("forward" in vars(module) for module in _modules(hf))
            assert structure(hf) == before
    assert torch.allclose(own, apart, atol=1e-5)
    with pytest.raises(ZeroDivisionError), taken_apart(hf):
        _ = 1 // 0
    assert not any("forward" in vars(module) for module in _modules(hf))
    assert structure(hf) == before


def test_a_dropped_router_weight_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are added up without their weights are no longer what the block adds to the stream."""
    computed = experts.experts_forward
    monkeypatch.setattr(
        experts,
        "experts_forward",
        lambda module, x, index, weight: computed(module, x, index, torch.ones_like(weight)),
    )
    with pytest.raises(ModelNotSupported):
        examine(tiny("dbrx"))


def test_it_is_mined_and_verified(tmp_path: Path) -> None:
    """A run of it holds what the model computes again."""
    run = build(_model(), texts(80), tmp_path / "run", top=4)
    assert run.manifest.model.experts == [(4, 40)] * 2
    assert verify(run, _model(), sample=30).passed
    assert "L1E2N3" in str(run.neuron("L1E2N3"))


@torch.no_grad()
def _jetmoe(hf: Any) -> list[tuple[Tensor, Tensor]]:
    """What experts of JetMoE read, and what their down projections read, by layer and expert, by its own code."""
    read: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in hf.model.layers:
        kept: list[Tensor] = []
        handles += [
            block.mlp.input_linear.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0])),
            block.mlp.output_linear.register_forward_pre_hook(
                lambda _, args, kept=kept: read.extend(
                    zip(kept.pop().split(args[1]), args[0].split(args[1]), strict=True)
                )
            ),
        ]
    hf(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    return [(x, m) for x, m in read if len(x)]


@torch.no_grad()
def _switch(hf: Any) -> list[tuple[Tensor, Tensor]]:
    """The same of Switch, whose encoder comes first."""
    read: list[tuple[Tensor, Tensor]] = []
    inputs: list[Tensor] = []
    handles = []
    for experts_module in _modules(hf):
        for expert in range(experts_module.num_experts):
            module = experts_module[f"expert_{expert}"]
            handles.append(module.wi.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
            handles.append(
                module.wo.register_forward_pre_hook(lambda _, args: read.append((inputs.pop(), args[0])))
            )
    tokens = torch.from_numpy(TOKENS)
    hf(input_ids=tokens, decoder_input_ids=tokens)
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("family", ["jetmoe", "switch_transformers"])
def test_experts_that_are_called_in_ways_of_their_own_are_read(family: str) -> None:
    """Inputs and coefficients of each expert are those of its own code: which rows those of JetMoE are the router says,
    and Switch marks one expert for each token, in encoder and decoder."""
    pair = family == "switch_transformers"
    hf = tiny(family, "seq2seq" if pair else "causal")
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check < 1e-5
    lengths, counted = np.array([5, 5]), np.ones_like(TOKENS, dtype=bool)
    batch = ContextBatch(np.arange(2), TOKENS, lengths, counted)
    batch = replace(batch, targets=batch) if pair else batch
    pieces: list[LayerRows] = []
    with Capture(model) as capture:
        capture.sweep(batch, lambda *_: None, lambda rows, _: pieces.extend(rows.each()))
    eager = (_switch if pair else _jetmoe)(hf)
    assert len(eager) == len(pieces) > 3
    for piece, (read, coefficients) in zip(pieces, eager, strict=True):
        assert torch.allclose(_sorted(piece.inputs), _sorted(read.flatten(0, -2)), atol=1e-6)
        assert torch.allclose(_sorted(piece.coefficients), _sorted(coefficients.flatten(0, -2)), atol=1e-6)


def test_an_expert_without_room_leaves_a_token_out() -> None:
    """Switch drops what goes beyond the room of an expert, in the order of the text: those tokens were not routed."""
    hf = tiny("switch_transformers", "seq2seq")
    for module in hf.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1
    anatomy, error = examine(hf)
    assert error < 1e-5
    tokens = torch.from_numpy(TOKENS[:1])
    stream = trace(hf.get_encoder(), anatomy.stacks[0], tokens)
    weights = [layer.weights for layer in stream.layers if layer.weights is not None]
    assert weights and all(((each != 0).sum(0) <= 1).all() for each in weights)
    assert any((each == 0).all(1).any() for each in weights), "some token has no expert"


def test_a_weight_of_zero_is_not_routed() -> None:
    """Zaya sends a token that skips its experts to the first one, with a weight of 0: it did not run on it."""
    module = _modules(tiny("zaya"))[0]
    seen: list[Routed] = []
    with torch.no_grad(), taken_apart(module), hooked([listen(module, seen.append)]):
        index, weights = torch.tensor([[0], [1], [0]]), torch.tensor([[0.0], [0.5], [0.25]])
        module(torch.randn(3, 32), index, weights)
    assert seen[0].tokens.tolist() == [2, 1] and seen[0].expert.tolist() == [0, 1]
