"""Who switched it on: coefficients shared exactly, chains against their recursion, attention taken apart."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import DISTINCT, FAMILIES, GENERIC, VARIANTS, slow_but_for

from mnemoscope.model.reading import describe
from mnemoscope.model.stream import Stream, trace
from mnemoscope.prediction.switching import (
    Linear,
    chain,
    layer_queries,
    neuron_shares,
    origins,
    switches,
)

ALL = {**FAMILIES, **VARIANTS}
TOKENS = torch.tensor([[7, 3, 11, 3, 60, 25]])
AT = 5


@cache
def _stream(name: str) -> Stream:
    hf = {**ALL, **GENERIC}[name]()
    return trace(hf, describe(hf), TOKENS)


@pytest.mark.parametrize("name", slow_but_for([*ALL, "nemotron", "arcee"], {*DISTINCT, "nemotron"}))
def test_the_shares_of_a_coefficient_add_up_to_it(name: str) -> None:
    """Over all earlier vectors and the bias: by both branches together and by each alone (A43, B.5)."""
    stream = _stream(name)
    for layer in range(stream.anatomy.n_layers):
        found = switches(stream, layer, AT)
        queries = layer_queries(stream, layer, AT)
        scale = float(found.coefficient.abs().max())
        for linear in (found.share, found.gate, found.up):
            if linear is not None:
                total = linear.of(queries).sum(0) + linear.bias
                assert torch.allclose(total, found.coefficient, atol=2e-5 * scale)
        inner = found.inner.of(queries).sum(0) + found.inner.bias
        assert torch.allclose(inner, stream.layers[layer].gate[AT], atol=2e-5 * float(inner.abs().max()))
        assert (found.up is not None) == stream.anatomy.gated


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "granite_biases", "olmo2", "gpt2"])
def test_finest_parts_share_like_their_layers(name: str) -> None:
    """Heads x sources, neurons and biases give together what their layer gives."""
    stream, top = _stream(name), 2
    found = switches(stream, top, AT, torch.tensor([1, 30]))
    queries = layer_queries(stream, top, AT)
    for layer in range(top):
        heads = stream.attention_parts(layer, AT).sum((0, 1)) + stream.attention_bias(layer, AT)
        assert torch.allclose(
            found.share.of(heads[None]), found.share.of(queries[1 + 2 * layer, None]), atol=1e-4
        )
        neurons = neuron_shares(stream, layer, AT, found.share.key)
        expected = found.share.of(stream.neuron_parts(layer, AT))
        assert torch.allclose(neurons, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)
        whole = neurons.sum(0) + found.share.of(stream.ffn_bias(layer, AT)[None])[0]
        assert torch.allclose(whole, found.share.of(queries[2 + 2 * layer, None])[0], atol=1e-4)


def test_an_increase_is_shared_like_its_coefficient() -> None:
    """The paper's example: coefficients 2 and 1 share an increase of 5 into 3.33 and 1.66 (A43)."""
    linear = Linear(torch.tensor([[1.0, 0.0]]), torch.zeros(1))
    shares = linear.of(torch.tensor([[2.0, 5.0], [1.0, -3.0]]))[:, 0]
    assert (5 * shares / shares.sum()).tolist() == pytest.approx([10 / 3, 5 / 3])


def test_a_pre_activation_of_zero_is_no_trouble() -> None:
    """At g = 0 the rate is the slope of the activation there, not 0 / 0."""
    stream = _stream("llama")
    stream.layers[1].gate[AT, 3] = 0.0
    try:
        found = switches(stream, 1, AT, torch.tensor([3]))
    finally:
        _stream.cache_clear()
    assert bool(found.share.key.isfinite().all())
    assert float(found.gate.key.norm()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_the_chain_is_its_recursion(name: str) -> None:
    """total(a) = C(a) + sum over all neurons b above of share(a -> b) total(b), written out (A63)."""
    stream = _stream(name)
    layers, neurons = stream.anatomy.n_layers, stream.anatomy.sizes[0]
    own = torch.randn(layers, neurons, generator=torch.Generator().manual_seed(1))
    own[1, ::2] = 0
    # Coefficients near 0 make fractions that no precision can hold.
    for layer in range(layers):
        own[layer][stream.layers[layer].coefficients[AT].abs() < 1e-2] = 0
    total = own.clone().double()
    for lower in reversed(range(layers)):
        for upper in range(lower + 1, layers):
            found = switches(stream, upper, AT)
            fractions = (
                neuron_shares(stream, lower, AT, found.share.key).double() / found.coefficient.double()
            )
            fractions[:, own[upper] == 0] = 0
            total[lower] += fractions @ total[upper]
    result = chain(stream, AT, own.flatten())
    assert torch.allclose(
        result.total.double().view_as(total), total, rtol=1e-3, atol=1e-4 * float(total.abs().max())
    )
    assert bool((result.pull[layers] == 0).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "falcon", "gpt_neox", "mpt", "opt"])
def test_an_attention_sub_value_can_be_asked_without_a_vector(name: str) -> None:
    """Method 1 computes the weights again, method 2 keeps them; both as `attend` would one by one (A53, A54)."""
    stream = _stream(name)
    row = torch.randn(stream.anatomy.width, generator=torch.Generator().manual_seed(2))
    found = origins(stream, 2, AT, 3, lambda vector: float(vector @ row))
    assert [one.point for one in found] == ["Lin0", "ATTN0", "FFN0", "ATTN1", "FFN1"]
    whole = float(stream.attention_parts(2, AT)[:, 3].sum(0) @ row)
    for one in found:
        lin = stream.layers[2].lin.float().clone()
        points = stream.points(3)
        index = ["Lin0", "ATTN0", "FFN0", "ATTN1", "FFN1"].index(one.point)
        lin[3] -= points[0] if index == 0 else points[index] - points[index - 1]
        ((alpha, value),) = stream.attend(2, lin[None])
        part, traced = stream.anatomy.layers[2], stream.layers[2]
        for weights, got in ((alpha, one.recomputed), (traced.alpha, one.fixed)):
            vector = torch.einsum("hd,hdw->w", weights[:, AT, 3, None] * value[:, 3], part.heads())
            if part.post_attention_norm is not None:
                vector = part.post_attention_norm.frozen(vector, traced.attention_output[AT])
            assert got == pytest.approx(whole - float(vector @ row), abs=1e-4)
    assert len({round(one.recomputed, 4) for one in found}) > 1
