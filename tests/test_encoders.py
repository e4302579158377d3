"""Encoders: their parts add up through every later norm and the head, alone and in padded batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from every_family import tiny
from families import slow_but_for
from tiny import tokenizer
from torch import nn

from mnemoscope import explain
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.capture import Capture
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.encoders import ENCODERS
from mnemoscope.model.load import load_model
from mnemoscope.model.parts import Anatomy, Layer, Norm
from mnemoscope.model.stream import trace
from mnemoscope.records import ContextBatch, padded

CAUSAL_ONLY = ("bert-generation", "modernbert-decoder")
MASKED = [family for family in ENCODERS if family not in CAUSAL_ONLY]
TOKENS = torch.tensor([[5, 9, 13, 70, 22, 41, 6]])
AT = 3


@pytest.mark.parametrize("family", slow_but_for(MASKED, ("bert", "albert", "modernbert")))
def test_the_parts_of_an_encoder_add_up_to_its_logits(family: str) -> None:
    """Embedding, heads from both sides, neurons, biases and the head's constant give what the last norm reads."""
    model = tiny(family, "masked")
    anatomy, error = examine(model)
    assert error <= 1e-5 and anatomy.bidirectional
    stream = trace(model, anatomy, TOKENS)
    total = stream.embedding_part(AT) + stream.constant(AT)
    for layer in range(anatomy.n_layers):
        heads = stream.attention_parts(layer, AT)
        assert heads.shape[:2] == (anatomy.n_heads, TOKENS.shape[1])
        assert bool(heads[:, AT + 1 :].any()), "an encoder attends to what follows"
        before, within, after = stream.points(AT)[2 * layer : 2 * layer + 3]
        added = heads.sum((0, 1)) + stream.attention_bias(layer, AT)
        torch.testing.assert_close(before + added, within, rtol=1e-4, atol=1e-4)
        written = stream.neuron_parts(layer, AT).sum(0) + stream.ffn_bias(layer, AT)
        torch.testing.assert_close(within + written, after, rtol=1e-4, atol=1e-4)
        total = total + added + written
    torch.testing.assert_close(total, stream.final[AT].float(), rtol=1e-4, atol=1e-4)
    normed = total if anatomy.final_norm is None else anatomy.final_norm(total)
    torch.testing.assert_close(anatomy.logits(normed), model(TOKENS).logits[0, AT], rtol=1e-3, atol=1e-3)


def _without_bias(norm: Norm | None) -> Norm | None:
    return None if norm is None else replace(norm, bias=None)


def _layers(change: Callable[[Layer], Layer]) -> Callable[[Anatomy], Anatomy]:
    return lambda anatomy: replace(anatomy, layers=tuple(map(change, anatomy.layers)))


def _unbiased(module: nn.Linear) -> nn.Linear:
    bare = nn.Linear(module.in_features, module.out_features, bias=False)
    bare.weight = module.weight
    return bare


def _bare_head(anatomy: Anatomy) -> Anatomy:
    """The transform of the head without the bias of its linear module, which is still the module that is watched."""
    transform = anatomy.transform
    assert transform is not None

    class Watched(nn.Linear):
        def register_forward_hook(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            return transform.dense.register_forward_hook(*args, **kwargs)  # type: ignore[arg-type]

    bare = _unbiased(transform.dense)  # type: ignore[arg-type]
    bare.__class__ = Watched
    return replace(anatomy, transform=replace(transform, dense=bare))


DROPPED: dict[str, Callable[[Anatomy], Anatomy]] = {
    "norm in the middle": _layers(lambda layer: replace(layer, middle_norm=None)),
    "its bias": _layers(lambda layer: replace(layer, middle_norm=_without_bias(layer.middle_norm))),
    "norm at the end": _layers(lambda layer: replace(layer, end_norm=None)),
    "bias at the end": _layers(lambda layer: replace(layer, end_norm=_without_bias(layer.end_norm))),
    "head": lambda anatomy: replace(anatomy, transform=None),
    "bias of the head": _bare_head,
    "norm of the head": lambda anatomy: replace(anatomy, final_norm=_without_bias(anatomy.final_norm)),
    "bias of the decoder": lambda anatomy: replace(anatomy, head=_unbiased(anatomy.head)),  # type: ignore[arg-type]
    "direction": lambda anatomy: replace(anatomy, bidirectional=False),
}


@pytest.mark.parametrize("what", DROPPED)
def test_what_is_left_out_of_an_encoder_is_caught(what: str) -> None:
    """A norm, a bias, the linear module of the head: without any one of them the parts do not add up."""
    model = tiny("bert", "masked")
    anatomy, _ = examine(model)
    with pytest.raises((ModelNotSupported, RuntimeError, AssertionError)):
        self_check(model, DROPPED[what](anatomy))


@pytest.mark.parametrize("family", slow_but_for(MASKED, ("roberta", "albert")))
def test_padding_is_not_seen(family: str) -> None:
    """Coefficients of a right-padded batch are those of each context alone."""
    model = load_model(tiny(family, "masked"), tokenizer=tokenizer())
    contexts = [np.array([5, 9, 13, 70, 22, 41, 6]), np.array([7, 30, 8])]

    def coefficients(rows: list[np.ndarray]) -> list[torch.Tensor]:
        tokens, lengths = padded(rows)
        batch = ContextBatch(np.arange(len(rows)), tokens, lengths, np.ones(tokens.shape, bool))
        seen: list[torch.Tensor] = []
        with Capture(model) as capture:
            capture.sweep(batch, lambda layer, activity, *_: seen.append(activity.clone()))
        return seen

    together = coefficients(contexts)
    assert len(together) == model.anatomy.n_layers
    for row, context in enumerate(contexts):
        for batched, alone in zip(together, coefficients([context]), strict=True):
            torch.testing.assert_close(batched[row, : len(context)], alone[0], rtol=1e-4, atol=1e-5)


def test_a_body_without_a_head_closes_on_its_own_states() -> None:
    """A sentence encoder has no logits: its last states are read through its input embedding."""
    model = tiny("bert", "masked").base_model
    anatomy, error = examine(model)
    assert error <= 1e-5 and anatomy.headless and anatomy.transform is None
    stream = trace(model, anatomy, TOKENS)
    torch.testing.assert_close(stream.final, model(TOKENS).last_hidden_state[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(anatomy.unembedding(), model.embeddings.word_embeddings.weight)


def test_a_decoder_of_the_same_blocks_looks_back_only() -> None:
    """With is_decoder a BERT is a decoder whose stream is normalised; it closes, and is not explained as yet."""
    hf = tiny("bert", "causal")
    hf.config.is_decoder = hf.base_model.config.is_decoder = True
    for module in hf.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
        if hasattr(module, "is_decoder"):
            module.is_decoder = True
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check <= 1e-5 and not model.anatomy.bidirectional
    with pytest.raises(ModelNotSupported, match="normalised on the way"):
        explain(model, "the city of", "Paris")
