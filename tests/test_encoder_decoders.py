"""Encoder-decoders: two stacks, whose decoder also looks across at what the encoder has read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_family import tiny, tiny_config
from families import randomise, slow_but_for
from test_encoders import reading
from tiny import texts
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from mnemoscope import build
from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.verify import verify
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.encoders import STACKS
from mnemoscope.model.load import load_model
from mnemoscope.model.parts import Anatomy, Attention, Layer, Norm
from mnemoscope.model.stream import trace
from mnemoscope.studies.run import measure

FAMILIES = [*STACKS, "encoder-decoder"]
SOURCE = torch.tensor([[9, 5, 33, 70, 22, 41, 6, 12, 17]])
TOKENS = torch.tensor([[2, 13, 70, 22, 41]])
AT = 3


def whole(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random encoder-decoder with some fields of its config set."""
    config = tiny_config(family, "seq2seq")
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(type(config)(**config.to_dict() | settings)).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("family", slow_but_for(FAMILIES, ("t5", "bart")))
def test_the_parts_of_a_decoder_add_up_to_the_logits(family: str) -> None:
    """Embedding, own heads x own positions, heads x positions of the encoder, neurons and biases, at every point."""
    model = tiny(family, "seq2seq")
    anatomy, error = examine(model)
    assert error <= 1e-5 and len(anatomy.stacks) == 2
    encoder, decoder = anatomy.stacks
    assert anatomy.layers == (*encoder.layers, *decoder.layers)
    assert anatomy.sizes == (*encoder.sizes, *decoder.sizes)
    stream = trace(model, anatomy, TOKENS, SOURCE)
    encoded, own = SOURCE.shape[1], decoder.layers[0].n_heads
    total = stream.embedding_part(AT) + stream.constant(AT)
    for layer in range(decoder.n_layers):
        heads, weights = stream.attention_parts(layer, AT), stream.attention_weights(layer, AT)
        assert heads.shape[:2] == weights.shape == (decoder.n_heads, encoded + AT + 1)
        assert not bool(heads[:own, :encoded].any()) and not bool(heads[own:, encoded:].any())
        assert bool(heads[:own, encoded:].any()) and bool(heads[own:, :encoded].all(0).any())
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
        before, within, after = stream.points(AT)[2 * layer : 2 * layer + 3]
        added = heads.sum((0, 1)) + stream.attention_bias(layer, AT)
        torch.testing.assert_close(before + added, within, rtol=1e-4, atol=1e-4)
        written = stream.neuron_parts(layer, AT).sum(0) + stream.ffn_bias(layer, AT)
        torch.testing.assert_close(within + written, after, rtol=1e-4, atol=1e-4)
        total = total + added + written
    torch.testing.assert_close(total, stream.final[AT].float(), rtol=1e-4, atol=1e-4)
    normed = total if decoder.final_norm is None else decoder.final_norm(total)
    truth = model(input_ids=SOURCE, decoder_input_ids=TOKENS).logits[0, AT]
    torch.testing.assert_close(anatomy.logits(normed), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", slow_but_for(("t5", "mt5", "umt5"), ()))
def test_both_kinds_of_t5_close(family: str, gated: bool) -> None:
    """Plain and gated, with a head that is tied, and so divides by the root of the width, and with one that is not."""
    kind = {"feed_forward_proj": "gated-gelu" if gated else "relu", "is_gated_act": gated}
    for tied in (True, False):
        model = whole(family, **kind, tie_word_embeddings=tied, scale_decoder_outputs=tied)
        anatomy, error = examine(model)
        assert error <= 1e-5 and anatomy.gated == gated


def _decoder(change: Callable[[Anatomy], Anatomy]) -> Callable[[Anatomy], Anatomy]:
    return lambda whole: replace(whole, stacks=(whole.stacks[0], change(whole.stacks[1])))


def _blocks(change: Callable[[Layer], Layer]) -> Callable[[Anatomy], Anatomy]:
    return _decoder(lambda stack: replace(stack, layers=tuple(map(change, stack.layers))))


def _across(change: Callable[[Attention], Attention]) -> Callable[[Anatomy], Anatomy]:
    def changed(layer: Layer) -> Layer:
        assert layer.cross is not None
        return replace(layer, cross=change(layer.cross))

    return _blocks(changed)


def _unbiased(norm: Norm | None) -> Norm | None:
    return None if norm is None else replace(norm, bias=None)


class _Without(Attention):
    """A cross attention without its bias, or without its first head."""

    dropped: str

    @classmethod
    def of(cls, block: Attention, dropped: str) -> _Without:
        made = cls(**{name: getattr(block, name) for name in Attention.__dataclass_fields__})
        object.__setattr__(made, "dropped", dropped)
        return made

    def out_bias(self) -> torch.Tensor | None:
        return None if self.dropped == "bias" else super().out_bias()

    def heads(self) -> torch.Tensor:
        heads = super().heads().clone()
        if self.dropped == "head":
            heads[0] = 0
        return heads


DROPPED: dict[str, tuple[str, Callable[[Anatomy], Anatomy]]] = {
    "cross attention": ("t5", _blocks(lambda layer: replace(layer, cross=None))),
    "a cross head": ("t5", _across(lambda block: _Without.of(block, "head"))),
    "the norm before it": ("t5", _across(lambda block: replace(block, input_norm=None))),
    "the factor of a tied head": ("t5", _decoder(lambda stack: replace(stack, logit_multiplier=1.0))),
    "the last norm": ("t5", _decoder(lambda stack: replace(stack, final_norm=None))),
    "the bias of cross attention": ("bart", _across(lambda block: _Without.of(block, "bias"))),
    "the norm behind it": ("bart", _across(lambda block: replace(block, middle_norm=None))),
    "the bias of that norm": (
        "bart",
        _across(lambda block: replace(block, middle_norm=_unbiased(block.middle_norm))),
    ),
    "the norm of the self-attention": ("bart", _blocks(lambda layer: replace(layer, middle_norm=None))),
    "the bias of the logits": ("bart", _decoder(lambda stack: replace(stack, outer_head=None))),
    "the norm after cross attention": ("t5gemma", _across(lambda b: replace(b, post_attention_norm=None))),
    "a norm of the encoder": (
        "bart",
        lambda whole: replace(whole, stacks=(_headless(whole.stacks[0]), whole.stacks[1])),
    ),
}


def _headless(encoder: Anatomy) -> Anatomy:
    return replace(encoder, layers=tuple(replace(layer, end_norm=None) for layer in encoder.layers))


@pytest.mark.parametrize("what", slow_but_for(DROPPED, ("a cross head", "the norm behind it")))
def test_what_is_left_out_is_caught(what: str) -> None:
    """A head, a bias, a norm, a factor: without any one of them the parts do not add up."""
    family, change = DROPPED[what]
    model = tiny(family, "seq2seq")
    anatomy, _ = examine(model)
    with pytest.raises(ModelNotSupported, match="differ"):
        self_check(model, change(anatomy))


def test_another_stream_than_the_encoders_is_caught() -> None:
    """What cross attention reads must be what the encoder makes of its text by itself."""
    model = tiny("t5", "seq2seq")
    block = model.decoder.block[1].layer[1]
    before = block.forward
    block.forward = lambda x, key_value_states, **rest: before(x, 2 * key_value_states, **rest)
    with pytest.raises(ModelNotSupported, match="cross attention: the last stream of the encoder"):
        examine(model)


def test_a_model_without_a_head_says_how_to_load_it() -> None:
    """A body alone predicts nothing."""
    with pytest.raises(ModelNotSupported, match="load it as a sequence-to-sequence"):
        examine(tiny("bart", "seq2seq").model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with a tokenizer."""
    path = tmp_path_factory.mktemp("t5")
    tiny("t5", "seq2seq").save_pretrained(path)
    reading().save_pretrained(path)
    return path


def test_without_targets_the_encoder_alone_is_mined(folder: Path, tmp_path: Path) -> None:
    """Its coefficients are those of the encoder run by itself; the manifest says what was not read."""
    model = load_model(folder, dtype="fp32")
    assert model.self_check <= 1e-5 and model.unused == ()
    run = build(model, texts(30), tmp_path / "run", top=5)
    entry, encoder = run.manifest.model, model.anatomy.stacks[0]
    assert entry.bidirectional and entry.layers == encoder.n_layers and entry.readout == "input embedding"
    assert any("the encoder alone" in line for line in entry.unused)
    assert entry.weights_sha256 == model.weights_sha256
    assert verify(run, model).passed
    row = run.table("triggers").collect().row(0, named=True)
    tokens = torch.from_numpy(np.asarray(run.contexts([row["context"]])[row["context"]].tokens, np.int64))
    states = model.hf.get_encoder()(tokens[None], output_hidden_states=True).hidden_states
    traced = model.encoder.traced(tokens[None])
    torch.testing.assert_close(traced.layers[1].lin, states[1][0])
    coefficient = traced.layers[row["layer"]].coefficients[row["position"], row["neuron"]]
    assert float(coefficient) == pytest.approx(row["coefficient"], rel=1e-4)


def test_what_asks_about_one_text_refuses_both_stacks(folder: Path, tmp_path: Path) -> None:
    """The study says so in a line."""
    model = load_model(folder, dtype="fp32")
    run = build(model, texts(30), tmp_path / "run", top=5)
    with pytest.raises(ModelNotSupported, match="it is an encoder-decoder, and this asks about one text"):
        measure(run, model)
