"""Where the parts are: the table, the generic rule, measured norms, and refusals with a reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from every_family import ENTRIES, OVERRIDES, tiny_config
from every_family import tiny as smallest
from families import FAMILIES, GENERIC, LAYERS, VARIANTS, VOCABULARY, WIDTH, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.check import examine
from mnemoscope.model.parts import Anatomy, Norm
from mnemoscope.model.reading import describe
from mnemoscope.model.table import FAMILIES as ROWS

ALL = {**FAMILIES, **VARIANTS, **GENERIC}


@cache
def _described(name: str) -> tuple[PreTrainedModel, Anatomy]:
    """Built once: no test changes it."""
    model = ALL[name]()
    return model, describe(model)


@pytest.fixture(params=ALL)
def described(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Anatomy]:
    """A tiny model of each kind, and its anatomy."""
    return _described(request.param)


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    """No family is claimed that the tests do not build."""
    assert set(FAMILIES) <= set(ROWS)
    inside = {
        tiny_config(name).get_text_config().model_type
        for name, given in OVERRIDES.items()
        if "text_config" in given and " " not in name
    }
    checkpoints = {"fairseq_lm"}  # of test_fairseq.py
    assert set(ROWS) <= set(FAMILIES) | {model_type for _, model_type in ENTRIES} | inside | checkpoints


def test_sizes_are_those_of_the_model(described: tuple[PreTrainedModel, Anatomy]) -> None:
    """Layers, width, vocabulary and the shapes of all weights agree with the config."""
    model, anatomy = described
    assert anatomy.n_layers == len(anatomy.layers) == model.config.num_hidden_layers >= LAYERS
    assert (anatomy.width, anatomy.vocabulary) == (WIDTH, VOCABULARY)
    assert anatomy.unembedding().shape == (VOCABULARY, WIDTH)
    assert anatomy.n_heads == 4 and anatomy.n_heads % anatomy.n_kv_heads == 0
    for layer in anatomy.layers:
        assert layer.values().shape == layer.keys().shape == (anatomy.sizes[0], WIDTH)
        assert (layer.ups() is None) == (not anatomy.gated)
        assert layer.heads().shape == (4, anatomy.head_dim, WIDTH)


def test_values_and_heads_are_what_the_modules_write(described: tuple[PreTrainedModel, Anatomy]) -> None:
    """Feeding one unit into an output projection gives that row of values() or heads(), plus the bias."""
    _, anatomy = described
    layer = anatomy.layers[1]
    for module, rows, bias in (
        (layer.down, layer.values(), layer.down_bias()),
        (layer.attention_out, layer.heads().flatten(0, 1), layer.out_bias()),
    ):
        with torch.no_grad():
            said = module(torch.eye(len(rows)))
        torch.testing.assert_close(said, rows + (0 if bias is None else bias))


def test_keys_are_what_the_modules_detect(described: tuple[PreTrainedModel, Anatomy]) -> None:
    """A projection's own output is x . keys + bias, for the gate and for the up half of a gated FFN."""
    _, anatomy = described
    layer, x = anatomy.layers[-1], torch.randn(5, WIDTH)
    for projection in filter(None, (layer.gate, layer.up)):
        bias = projection.bias()
        with torch.no_grad():
            said = projection.of(projection.module(x))
        torch.testing.assert_close(said, x @ projection.weight().T + (0 if bias is None else bias))


def test_norms_equal_their_modules(described: tuple[PreTrainedModel, Anatomy]) -> None:
    """Each measured norm gives its module's output, with its own statistics, at usual and tiny sizes."""
    _, anatomy = described
    layer = anatomy.layers[0]
    norms = [anatomy.final_norm, anatomy.embedding_norm, layer.input_norm, layer.ffn_norm]
    norms += [layer.post_attention_norm, layer.post_ffn_norm]
    x = torch.cat([torch.randn(3, WIDTH) * 4 - 1, torch.randn(3, WIDTH) * 1e-2])
    for norm in filter(None, norms):
        with torch.no_grad():
            torch.testing.assert_close(norm(x), norm.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "offset"),
    [
        ("llama", "rms", 0),
        ("gemma", "rms", 1),
        ("gemma2", "rms", 1),
        ("gpt2", "layer", 0),
        ("nemotron", "layer", 1),
    ],
)
def test_the_weight_convention_is_measured(family: str, kind: str, offset: int) -> None:
    """Gemma's and Nemotron's weights are stored as an offset from 1; Llama's and GPT-2's are not."""
    norm = _described(family)[1].layers[0].input_norm
    assert norm.kind == kind
    torch.testing.assert_close(norm.weight, norm.module.weight.detach() + offset)


@given(st.sampled_from(["rms", "layer"]), st.integers(0, 1000))
def test_a_frozen_norm_is_additive(kind: str, seed: int) -> None:
    """With the statistics frozen, the norm of a sum is the sum of the norms, and the bias is left out."""
    generator = torch.Generator().manual_seed(seed)
    a, b, weight, bias = torch.randn(4, WIDTH, generator=generator).unbind()
    norm = Norm(kind, weight, bias, 1e-5)
    torch.testing.assert_close(
        norm.frozen(a + b, a), norm.frozen(a, a) + norm.frozen(b, a), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(norm(a), norm.frozen(a, a) + bias)


def test_parallel_and_shared_norms_are_recognised() -> None:
    """Blocks whose FFN reads the layer's input say so, with one norm or with two."""
    parallel = {name for name in {**FAMILIES, **VARIANTS} if _described(name)[1].parallel}
    assert parallel == {
        "gptj", "codegen", "gpt_neox", "phi", "phi_qk_norm", "cohere", "cohere_qk_norm", "falcon",
        "falcon_multi_query", "falcon_new", "falcon_new_one_norm", "stablelm_parallel_qk_norm",
    }  # fmt: skip
    assert (one := _described("gptj")[1].layers[0]).ffn_norm is one.input_norm
    assert (two := _described("gpt_neox")[1].layers[0]).ffn_norm is not two.input_norm


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", 2),
        ("llama_multi_query", 1),
        ("falcon", 1),
        ("falcon_old", 4),
        ("falcon_new", 2),
        ("gpt2", 4),
    ],
)
def test_key_value_heads_are_counted(name: str, heads: int) -> None:
    """Grouped, multi-query and plain attention differ in their number of key-value heads."""
    assert _described(name)[1].n_kv_heads == heads


def test_token_vectors_are_what_enters_the_first_block() -> None:
    """In models without added positions a bare token vector is exactly the first residual."""
    for name in ("llama", "gemma2", "granite", "bloom", "gptj"):
        anatomy, tokens, seen = _described(name)[1], torch.tensor([5, 9, 3]), []
        handle = anatomy.layers[0].module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            anatomy.body(input_ids=tokens[None])
        handle.remove()
        torch.testing.assert_close(anatomy.token_vectors(tokens), seen[0][0], rtol=1e-4, atol=1e-5)


def test_the_table_is_known_and_the_rest_is_not() -> None:
    """`known` tells a listed family from one that the generic rule read."""
    assert _described("llama")[1].known
    assert not _described("arcee")[1].known


# -- refusals ------------------------------------------------------------------------------------------------

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}


def _unequal() -> nn.Module:
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.down_proj = nn.Linear(7, WIDTH, bias=False)
    return model


def _packed() -> nn.Module:
    model = FAMILIES["llama"]()
    nameless = nn.Module()  # it does not say how many inputs and outputs it has
    nameless.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj = nameless
    return model


def _renamed() -> PreTrainedModel:
    """A decoder that nothing is known of."""
    model = smallest("git")
    model.config.model_type = "unheard_of"
    return model


REFUSED = {
    "big_bird": (lambda: smallest("big_bird", "masked"), "after the first short text at all of any"),
    "classifier": (
        lambda: BertForSequenceClassification(BertConfig(**_SMALL, intermediate_size=16)),
        "another head than a language model's",
    ),
    "led": (lambda: smallest("led", "seq2seq"), "whole attention windows"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)),
        "no FFN",
    ),
    "bloom": (
        lambda: tiny("bloom", **_SMALL, apply_residual_connection_post_layernorm=True),
        "after the norm",
    ),
    "xlnet": (lambda: smallest("xlnet"), "the projections of its attention are no modules"),
    "no family known": (
        _renamed,
        r"GitLayer \(attention, intermediate, output\) is not made of parts known here",
    ),
    "no head": (
        lambda: LlamaModel(LlamaConfig(**_SMALL, intermediate_size=16)),
        "no language-model head",
    ),
    "packed weights": (_packed, r"an output projection is no matrix \(Module\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_dense_decoder_is_refused_with_the_reason(kind: str) -> None:
    """The message is one line, and names the family and why."""
    build, reason = REFUSED[kind]
    model = build()
    with pytest.raises(ModelNotSupported, match=reason) as caught:
        describe(model)
    assert repr(model.config.model_type) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_opt_closes_with_its_norms_before_parts_or_after_them() -> None:
    """One field says where the same two norms stand; after, they are norms of the stream."""
    for before in (True, False):
        options = {"ffn_dim": 16, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": before}
        anatomy, error = examine(tiny("opt", **_SMALL, **options))
        assert error <= 1e-6 and anatomy.adds_up_as_read is before
        assert (anatomy.layers[0].end_norm is None) is before


def test_a_down_projection_of_another_width_than_its_keys_is_refused() -> None:
    """Layers may differ in width; what a layer reads and writes may not, and the refusal is one line."""
    with pytest.raises(ModelNotSupported, match="a forward pass over a few tokens failed") as caught:
        examine(_unequal())
    assert "\n" not in str(caught.value)
