"""The parts add up, for every family; and a part left out is noticed, with its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, GENERIC, VARIANTS, VOCABULARY, slow_but_for, tiny
from torch import nn
from transformers import PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.parts import Anatomy, Layer
from mnemoscope.model.reading import describe
from mnemoscope.model.stream import Stream, trace
from mnemoscope.model.table import FAMILIES as ROWS
from mnemoscope.model.table import REFUSED
from mnemoscope.model.watch import TOLERANCE

ALL = {**FAMILIES, **VARIANTS, **GENERIC}
TOKENS = torch.tensor([[7, 3, 11, 3, 60, 25, 14]])


@cache
def _model(name: str) -> PreTrainedModel:
    """Built once: no test changes it."""
    return ALL[name]()


@cache
def _stream(name: str) -> Stream:
    return trace(_model(name), describe(_model(name)), TOKENS)


@pytest.mark.parametrize("name", ALL)
def test_the_self_check_closes(name: str) -> None:
    """Logits rebuilt from all parts equal the model's own, far inside the limit."""
    anatomy, error = examine(_model(name))
    assert error <= TOLERANCE / 20
    assert anatomy.known == (name not in GENERIC)


@pytest.mark.parametrize("name", slow_but_for(FAMILIES))
def test_the_parts_of_every_position_add_up_to_the_final_residual(name: str) -> None:
    """Embedding + every head x source + every neuron + every bias is what the final norm reads (A31-A33)."""
    stream = _stream(name)
    for position in (0, 4, 6):
        total = stream.embedding[position].clone()
        for layer in range(stream.anatomy.n_layers):
            heads = stream.attention_parts(layer, position)
            assert heads.shape == (4, position + 1, stream.anatomy.width)
            total += heads.sum((0, 1)) + stream.attention_bias(layer, position)
            total += stream.neuron_parts(layer, position).sum(0) + stream.ffn_bias(layer, position)
        _close(total, stream.final[position])


@pytest.mark.parametrize("name", slow_but_for(FAMILIES))
def test_each_update_is_the_sum_of_its_parts(name: str) -> None:
    """Sub-values and bias add up to what attention and FFN add to the residual, position by position."""
    stream = _stream(name)
    for layer in range(stream.anatomy.n_layers):
        points = stream.points(5)
        attention = stream.attention_parts(layer, 5).sum((0, 1)) + stream.attention_bias(layer, 5)
        ffn = stream.neuron_parts(layer, 5).sum(0) + stream.ffn_bias(layer, 5)
        _close(attention, stream.attention_update(layer)[5])
        _close(ffn, stream.ffn_update(layer)[5])
        _close(points[2 * layer] + attention, points[2 * layer + 1])
        _close(points[2 * layer + 1] + ffn, points[2 * layer + 2])


def test_some_neurons_are_rows_of_all() -> None:
    """Asking for chosen neurons gives the same vectors as choosing from all."""
    stream = _stream("gemma2")
    chosen = torch.tensor([5, 0, 17])
    torch.testing.assert_close(stream.neuron_parts(1, 3, chosen), stream.neuron_parts(1, 3)[chosen])


@pytest.mark.parametrize("name", slow_but_for(FAMILIES))
def test_attention_can_be_asked_again(name: str) -> None:
    """Given the residual that was there, `attend` repeats weights and values; given another it does not."""
    stream = _stream(name)
    traced = stream.layers[1]
    other = traced.lin + torch.randn_like(traced.lin)
    (alpha, value), (_, changed) = stream.attend(1, torch.stack([traced.lin, other]))
    _close(alpha, traced.alpha)
    _close(value, traced.value)
    assert not torch.allclose(changed, traced.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bloom"])
def test_attention_weights_are_causal_and_add_up_to_one(name: str) -> None:
    """Each row of weights is a distribution over the sources so far; this makes value biases exact (G8)."""
    stream = _stream(name)
    for traced in stream.layers:
        torch.testing.assert_close(traced.alpha.sum(-1), torch.ones(4, TOKENS.shape[1]))
        assert not traced.alpha.triu(1).any()


def test_heads_of_a_group_share_their_values() -> None:
    """Under grouped-query attention two neighbouring query heads read the same value vectors (G6)."""
    value = _stream("llama").layers[0].value
    assert torch.equal(value[0], value[1]) and torch.equal(value[2], value[3])
    assert not torch.equal(value[1], value[2])


def test_the_stream_carries_the_models_own_logits() -> None:
    """A traced pass is the model's usual pass: same logits, same coefficients."""
    model = _model("qwen2")
    with torch.no_grad():
        logits = model(TOKENS).logits[0]
    torch.testing.assert_close(_stream("qwen2").logits, logits, rtol=1e-4, atol=1e-4)


# -- half precision, and leaving no trace --------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but_for(FAMILIES))
def test_a_bf16_model_is_checked_in_fp32_and_left_as_it_was(name: str) -> None:
    """The check is as exact as in fp32, and no weight or buffer has changed value, dtype or storage."""
    model = FAMILIES[name]().bfloat16()
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in _state(model).items()}
    assert examine(model)[1] <= TOLERANCE / 20
    for key, tensor in _state(model).items():
        pointer, copy = before[key]
        assert tensor.data_ptr() == pointer and tensor.dtype == copy.dtype and torch.equal(tensor, copy)


@pytest.mark.parametrize("fails", [False, True])
def test_tracing_leaves_the_model_as_it_was(fails: bool) -> None:
    """Mode, attention implementation and hooks are put back, after success and after an error."""
    model = FAMILIES["llama"]().bfloat16()
    model.config._attn_implementation = "sdpa"
    anatomy = describe(model)
    model.train()
    model.model.norm.eval()
    tokens = torch.tensor([[VOCABULARY + 5]]) if fails else TOKENS
    try:
        trace(model, anatomy, tokens, upcast=True)
    except IndexError:
        assert fails
    else:
        assert not fails
    assert model.config._attn_implementation == "sdpa"
    assert model.training and not model.model.norm.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


# -- what is left out is noticed -----------------------------------------------------------------------------


def _layers(change: Callable[[Layer], Layer]) -> Callable[[Anatomy], Anatomy]:
    return lambda a: replace(a, layers=(a.layers[0], change(a.layers[1]), *a.layers[2:]))


def _without_bias(name: str) -> Callable[[Anatomy], Anatomy]:
    return _layers(lambda layer: replace(layer, **{name: replace(getattr(layer, name), bias=None)}))


MUTATIONS: dict[str, tuple[str, Callable[[Anatomy], Anatomy], str]] = {
    "residual multiplier": (
        "granite",
        _layers(lambda layer: replace(layer, attention_multiplier=1.0)),
        "layer 1, attention",
    ),
    "embedding multiplier": ("granite", lambda a: replace(a, embedding_multiplier=1.0), "layer 0, embedding"),
    "logit multiplier": ("cohere", lambda a: replace(a, logit_multiplier=1.0), "multiplier"),
    "logit divisor": ("granite", lambda a: replace(a, logit_multiplier=1.0), "multiplier"),
    "soft cap": ("gemma2", lambda a: replace(a, softcap=None), "logits"),
    "embedding norm": ("bloom", lambda a: replace(a, embedding_norm=None), "embedding"),
    "final norm": ("llama", lambda a: replace(a, final_norm=None), "logits"),
    "final norm's bias": (
        "gpt2",
        lambda a: replace(a, final_norm=replace(a.final_norm, bias=None)),
        "logits",
    ),
    "parallel": ("gpt_neox", lambda a: replace(a, parallel=False), "layer 0, attention"),
    "sequential": ("gpt2", lambda a: replace(a, parallel=True), "layer 0, FFN"),
    "post-norm after attention": (
        "gemma2",
        _layers(lambda layer: replace(layer, post_attention_norm=None)),
        "layer 1, attention",
    ),
    "post-norm after the FFN": (
        "olmo2",
        _layers(lambda layer: replace(layer, post_ffn_norm=None)),
        "layer 1, FFN",
    ),
    "norm before attention": (
        "llama",
        _layers(lambda layer: replace(layer, input_norm=None)),
        "layer 1, attention",
    ),
    "bias of the norm before attention": ("gpt2", _without_bias("input_norm"), "layer 1, attention"),
    "bias of the norm before the FFN": ("gpt2", _without_bias("ffn_norm"), "layer 1, FFN"),
    "activation": ("llama", _layers(lambda layer: replace(layer, act=torch.relu)), "layer 1, FFN"),
    "gate and up exchanged": (
        "phi3",
        _layers(lambda layer: replace(layer, gate=layer.up, up=layer.gate)),
        "layer 1, FFN",
    ),
    "another layer's output": (
        "llama",
        lambda a: replace(a, layers=(a.layers[0], replace(a.layers[1], down=a.layers[2].down), a.layers[2])),
        "layer 1",
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_part_left_out_is_caught_and_placed(what: str) -> None:
    """An anatomy that lacks one part is refused, and the message says in which layer and half."""
    family, mutate, place = MUTATIONS[what]
    model = _model(family)
    with pytest.raises(ModelNotSupported, match=place) as caught:
        self_check(model, mutate(describe(model)))
    assert repr(family) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "part", "place"),
    [
        ("gpt2", "down_bias", "layer 0, FFN"),
        ("gpt2", "out_bias", "layer 0, attention"),
        ("gpt2", "key_bias", "layer 0, FFN"),
        ("llama_biases", "up_bias", "layer 0, FFN"),
        ("gpt_neox", "down_bias", "layer 0, FFN"),
        ("phi", "out_bias", "layer 0, attention"),
    ],
)
def test_a_dropped_bias_is_caught(
    monkeypatch: pytest.MonkeyPatch, family: str, part: str, place: str
) -> None:
    """Forgetting one bias of a block is refused with its place."""
    monkeypatch.setattr(Layer, part, lambda self: None)
    model = _model(family)
    with pytest.raises(ModelNotSupported, match=place):
        self_check(model, describe(model))


def test_a_dropped_unembedding_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J's output bias belongs to its logits."""
    monkeypatch.setattr(Anatomy, "unembedding_bias", None)
    model = _model("gptj")
    with pytest.raises(ModelNotSupported, match="logits"):
        self_check(model, describe(model))


@pytest.mark.parametrize(
    ("family", "settings", "place"),
    [
        ("gpt_neox_japanese", {}, "layer 2, attention"),  # a bias that is kept outside of the projection
        (
            "doge",
            {"num_key_value_heads": 2},
            "layer 0, attention",
        ),  # a scale of the residual, channel by channel
    ],
)
def test_a_decoder_beyond_the_generic_rule_is_refused(
    monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any], place: str
) -> None:
    """A layout that looks right but computes something else fails the check, and the place is named."""
    for table in (REFUSED, ROWS):
        monkeypatch.delitem(table, family, raising=False)  # type: ignore[arg-type]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    with pytest.raises(ModelNotSupported, match=place) as caught:
        examine(tiny(family, **sizes, **settings))
    assert "generic rule" in str(caught.value)


def test_a_model_with_damaged_weights_is_refused() -> None:
    """NaN in a weight is said to be that, and not a missing part."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ModelNotSupported, match="not finite"):
        examine(model)


def test_attention_that_looks_ahead_is_refused() -> None:
    """A decoder whose weights reach later positions is no causal model, whatever else adds up."""
    model = FAMILIES["gpt_neo"]()
    for block in model.transformer.h:
        block.attn.attention.bias.fill_(True)
    with pytest.raises(ModelNotSupported, match="looking ahead"):
        _check_without_mask(model)


def _check_without_mask(model: PreTrainedModel) -> float:
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
        for block in model.transformer.h
    ]
    try:
        return self_check(model, describe(model))
    finally:
        for hook in hooks:
            hook.remove()


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest entry."""
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-5 * float(b.abs().max().clamp_min(1e-3)))


@pytest.mark.sample
@pytest.mark.slow
def test_the_sample_model_closes(sample_model: Any) -> None:
    """On the sample model the check closes too, in well under its limit."""
    assert self_check(sample_model.hf, sample_model.anatomy) <= TOLERANCE / 20
