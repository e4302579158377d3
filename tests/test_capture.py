"""The capture hands out what the model computes, for every family, and leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, slow_but_for
from transformers import PreTrainedModel

from mnemoscope.model.capture import Capture, residuals
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.records import ContextBatch


def wrapped(hf: PreTrainedModel) -> Model:
    """A model without a tokenizer: enough for everything that takes token ids."""
    return Model(hf, None, describe(hf), "tiny")


def padded(lengths: list[int], seed: int = 0) -> ContextBatch:
    """Random contexts, right-padded."""
    generator = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    counted = np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        tokens[row, :length] = generator.integers(3, 80, length)
        counted[row, 1:length] = True
    return ContextBatch(np.arange(len(lengths)), tokens, np.asarray(lengths, np.int32), counted)


def swept(model: Model, batch: ContextBatch) -> dict[int, tuple[torch.Tensor, ...]]:
    """Copies of everything a sweep hands out, by layer."""
    kept: dict[int, tuple[torch.Tensor, ...]] = {}
    with Capture(model) as capture:
        capture.sweep(
            batch,
            lambda layer, m, _, gate, up, inputs: kept.__setitem__(
                layer, tuple(part.clone() for part in (m, gate, up) if part is not None)
            ),
        )
    return kept


@pytest.mark.parametrize("name", slow_but_for(sorted(FAMILIES)))
def test_coefficients_of_padded_contexts_equal_each_context_alone(name: str) -> None:
    """Right padding changes nothing, and a gated neuron's coefficient is act(gate) * up."""
    model = wrapped(FAMILIES[name]())
    batch = padded([7, 4, 6])
    together = swept(model, batch)
    assert sorted(together) == list(range(model.anatomy.n_layers))
    for row, length in enumerate(batch.lengths):
        single = ContextBatch(
            batch.contexts[row : row + 1],
            batch.tokens[row : row + 1, :length],
            batch.lengths[row : row + 1],
            batch.counted[row : row + 1, :length],
        )
        for layer, (alone, *_) in swept(model, single).items():
            torch.testing.assert_close(together[layer][0][row, :length], alone[0], rtol=1e-4, atol=1e-5)
    for layer, found in together.items():
        if model.anatomy.gated:
            coefficients, gate, up = found
            torch.testing.assert_close(
                coefficients, model.anatomy.layers[layer].act(gate) * up, rtol=1e-4, atol=1e-6
            )
        else:
            assert len(found) == 1


def test_hooks_are_gone_afterwards() -> None:
    """A model that was swept has no hook left, also when the receiver raised."""
    hf = FAMILIES["llama"]()
    model = wrapped(hf)
    with pytest.raises(ZeroDivisionError), Capture(model) as capture:
        capture.sweep(padded([3]), lambda *_: 1 // 0)
    hooks = [
        len(getattr(module, kind))
        for module in hf.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    ]
    assert sum(hooks) == 0


@pytest.mark.parametrize("name", slow_but_for(sorted(FAMILIES)))
def test_residuals_are_those_that_transformers_reports(name: str) -> None:
    """Lin of every layer is the hidden state that the model itself returns; Lin of the next layer is Lout."""
    hf = FAMILIES[name]()
    model = wrapped(hf)
    tokens = torch.tensor([[5, 9, 11, 30, 17]])
    points = residuals(model, tokens)
    with torch.no_grad():
        states = hf(tokens, output_hidden_states=True).hidden_states
    for layer in range(model.anatomy.n_layers):
        torch.testing.assert_close(points["Lin"][layer], states[layer], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(points["Lin"][1:], points["Lout"][:-1])
