"""Encoder-decoders: two stacks, whose decoder also looks across at what the encoder has read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import tiny, tiny_config
from families import randomise, slow_but_for
from scipy.stats import spearmanr
from test_encoders import reading
from tiny import texts, tokenizer
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from mnemoscope import build, compare, explain, load_corpus
from mnemoscope import trace as mnemoscope_trace
from mnemoscope.errors import CorpusError, ModelNotSupported, QueryError, RunError
from mnemoscope.mine.verify import verify
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.encoders import STACKS
from mnemoscope.model.load import load_model
from mnemoscope.model.parts import Anatomy, Attention, Layer, Norm
from mnemoscope.model.stream import Stream, trace
from mnemoscope.prediction.ablate import Cut, effects
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.run.reading import Run
from mnemoscope.studies.run import measure
from mnemoscope.tracing.traced import Distributions

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
    whole("t5", decoder_start_token_id=2).save_pretrained(path)
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


PROMPT, WRITTEN = "the capital of France is Paris", "the king of"
ADDITIVE = ["t5", "umt5", "bart", "marian", "m2m_100", "mbart", "pegasus", "seamless_m4t", "encoder-decoder"]


def _explained(family: str, **options: Any) -> Explanation:
    model = load_model(whole(family, decoder_start_token_id=2), tokenizer=reading())
    return explain(model, PROMPT, "London", "Berlin", decoder_prompt=WRITTEN, **options)


@pytest.mark.parametrize("family", slow_but_for(ADDITIVE, ("t5", "bart")))
def test_a_prediction_of_a_decoder_is_the_sum_of_its_parts(family: str) -> None:
    """All heads, neurons and biases together leave nothing of a contrast; their logits are the target's."""
    explanation = _explained(family, top=5000)
    contrast = explanation.contrasts[0]
    assert abs(contrast.remainder) <= 1e-4 and abs(contrast.total) > 1e-3
    frames = (explanation.heads, explanation.neurons, explanation.others)
    total = sum(float(frame["logit"].sum()) for frame in frames)
    assert total == pytest.approx(float(explanation.stream["logit"][-1]), abs=1e-4)
    assert float(explanation.account["nats"][-1]) == pytest.approx(explanation.log_probability, abs=1e-5)


def test_layers_heads_and_tokens_are_counted_through() -> None:
    """Layers and tokens of the encoder come first; heads of cross attention have an X and look at its tokens."""
    explanation = _explained("t5", top=5000)
    frames = (explanation.layers, explanation.heads, explanation.neurons, explanation.contrasts[0].heads)
    assert all(set(frame["layer"]) == {2, 3} for frame in frames)
    assert explanation.stream["point"].to_list() == ["Lin2", "Lres2", "Lout2", "Lres3", "Lout3"]
    assert set(explanation.queries["query_layer"].drop_nulls()) <= {2, 3}
    pieces = explanation.tokens["piece"].to_list()
    assert explanation.encoded == 8 and "".join(pieces[1:7]).strip() == PROMPT
    assert "".join(pieces[10:]).strip() == WRITTEN and explanation.position == 4
    across = {row["head"] >= explanation.own_heads for row in explanation.heads.iter_rows(named=True)}
    assert across == {True, False}
    for row in explanation.heads.iter_rows(named=True):
        assert (row["head"] >= explanation.own_heads) == (row["source"] < explanation.encoded)
        assert row["source_token"] == pieces[row["source"]] and row["weight"] > 0
    assert explanation.head(3, explanation.own_heads + 1) == "L3X1" and explanation.head(3, 1) == "L3H1"
    printed = str(explanation)
    assert "⇒" in printed and "L3X" in printed and "--decoder-prompt" in printed


def test_the_model_is_asked_what_follows_its_first_token() -> None:
    """Without a text of its own a decoder has read only the token that it begins with, and what is put before texts."""
    model = load_model(whole("t5", decoder_start_token_id=2), tokenizer=tokenizer())
    explanation = explain(model, PROMPT)
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    logits = model.hf(input_ids=ids, decoder_input_ids=torch.tensor([[2]])).logits[0, -1].detach()
    assert explanation.target.token == int(logits.argmax())
    assert explanation.log_probability == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def most_seen(stream: Stream, layer: int, head: int) -> int:
    """The source that a head looks at most."""
    return int(stream.attention_weights(layer, len(stream.tokens) - 1)[head].argmax())


@pytest.mark.parametrize("family", slow_but_for(("t5", "bart", "t5gemma"), ("t5",)))
def test_ablated_parts_of_a_decoder_are_left_out_of_a_pass(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neuron, a head x position of the decoder, and a head of cross attention x position of the encoder: log p falls
    by as much as in a pass whose own code leaves them out."""
    hf = whole(family, decoder_start_token_id=2)
    hf.set_attn_implementation("eager")
    model = load_model(hf, tokenizer=reading())
    stream, target = model.traced(TOKENS, SOURCE), 7
    decoder, last = stream.anatomy, TOKENS.shape[1] - 1
    own, encoded = decoder.layers[0].n_heads, SOURCE.shape[1]
    active = int(stream.layers[0].coefficients[-1].abs().argmax())
    cuts = [
        Cut(0, active),
        Cut(1, 5, value=2.0),
        *(
            Cut(layer, head, most_seen(stream, layer, head))
            for layer, head in ((0, 1), (1, own + 2), (0, own))
        ),
    ]
    found = effects(model, stream, target, cuts)
    code = import_module(type(hf).__module__)
    eager = code.eager_attention_forward
    for cut, effect in zip(cuts, found, strict=True):
        block = decoder.layers[cut.layer]
        across = cut.source is not None and cut.unit >= own
        attention = block.cross.attention if across and block.cross is not None else block.attention
        head, source = (
            cut.unit - own * across,
            0 if cut.source is None else cut.source - encoded * (not across),
        )

        def without(
            module: Any, *args: Any, attention: Any = attention, place: Any = (head, source), **kwargs: Any
        ) -> Any:
            output, weights = eager(module, *args, **kwargs)
            if module is attention:
                weights = weights.clone()
                weights[0, place[0], last, place[1]] = 0
                value = args[2].repeat_interleave(weights.shape[1] // args[2].shape[1], 1)
                output = (weights @ value).transpose(1, 2).contiguous()
            return output, weights

        def cleared(_: Any, args: tuple[torch.Tensor], cut: Cut = cut) -> tuple[torch.Tensor]:
            changed = args[0].clone()
            changed[0, last, cut.unit] = cut.value
            return (changed,)

        assert block.down is not None
        handle = None if cut.source is not None else block.down.register_forward_pre_hook(cleared)
        if cut.source is not None:
            monkeypatch.setattr(code, "eager_attention_forward", without)
        with torch.no_grad():
            logits = hf(input_ids=SOURCE, decoder_input_ids=TOKENS).logits[0, -1].double()
        if handle is not None:
            handle.remove()
        monkeypatch.setattr(code, "eager_attention_forward", eager)
        lost = float((stream.logits[-1].double().log_softmax(-1) - logits.log_softmax(-1))[target])
        assert effect == pytest.approx(lost, abs=1e-5) and abs(effect) > 1e-6


def test_ablations_of_a_decoder_stand_beside_contributions(folder: Path, mined: Run, tmp_path: Path) -> None:
    """Layers are counted through; a neuron is set to its mean in the run, which is one of both stacks."""
    model = load_model(folder, dtype="fp32")
    explanation = explain(model, PROMPT, ablate=2, ablate_to="mean", run=mined, decoder_prompt=WRITTEN)
    rows = explanation.ablations
    assert set(rows["layer"]) <= {2, 3} and rows["how"].to_list() == ["mean", "mean", "zero", "zero"]
    assert (rows["effect"].abs() > 0).all()
    alone = build(model, texts(10), tmp_path / "run", top=2)
    with pytest.raises(ModelNotSupported, match="built without targets"):
        explain(model, PROMPT, ablate=2, ablate_to="mean", run=alone)


def test_a_text_for_a_decoder_needs_an_encoder_decoder() -> None:
    """A line says so."""
    bert = load_model(tiny("bert", "masked"), tokenizer=reading())
    with pytest.raises(QueryError, match="is no encoder-decoder, so it reads one text; leave decoder_prompt"):
        explain(bert, "the <mask>", decoder_prompt="the")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty texts with targets, one pair twice, and one with nothing to write."""
    sources, targets = texts(60, seed=1), texts(60, seed=2, longest=20)
    rows = [
        {"text": a, "summary": b, "title": f"t{i}"}
        for i, (a, b) in enumerate(zip(sources, targets, strict=True))
    ]
    rows += [
        rows[3],
        {"text": sources[4], "summary": targets[5], "title": "other"},
        {"text": "the", "summary": None},
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mined(folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of both stacks."""
    text = load_corpus(pairs, target="summary")
    return build(load_model(folder, dtype="fp32"), text, tmp_path_factory.mktemp("mined") / "run", top=8)


def test_both_stacks_are_mined_over_texts_and_targets(mined: Run, folder: Path) -> None:
    """A stored coefficient of the decoder is that behind its target, with the encoder at the text before it."""
    model = load_model(folder, dtype="fp32")
    entry = mined.manifest.model
    assert entry.layers == 4 and entry.encoder_layers == 2 and not entry.bidirectional
    assert mined.manifest.corpus.target == "summary" and mined.manifest.corpus.contexts == 2 * 62
    assert mined.manifest.corpus.duplicates == 2
    rows = mined.table("triggers").filter(pl.col("rank") == 0, pl.col("polarity") == 1).collect()
    for row in rows.sample(16, seed=0).iter_rows(named=True):
        place, decoder = row["context"], row["layer"] >= 2
        assert place % 2 == decoder
        source, target = (
            torch.from_numpy(np.asarray(mined.contexts([at])[at].tokens, np.int64))[None]
            for at in (place - place % 2, place - place % 2 + 1)
        )
        assert int(source[0, -1]) == 2 and target[0, :2].tolist() == [2, 1]
        stream = model.traced(target, source) if decoder else model.encoder.traced(source)
        traced = stream.layers[row["layer"] - 2 * decoder]
        coefficient = float(traced.coefficients[row["position"], row["neuron"]])
        assert coefficient == pytest.approx(row["coefficient"], rel=1e-4)


def test_a_run_of_both_stacks_is_verified_and_shown(mined: Run, folder: Path) -> None:
    """Cards say which stack a neuron is in; those of the encoder have both sides, and values of its embedding."""
    model = load_model(folder, dtype="fp32")
    assert verify(mined, model, sample=30).passed
    encoder, decoder = mined.neuron(1, 3), mined.neuron(3, 3)
    assert "layer 1 of 4 (encoder)" in str(encoder) and "layer 3 of 4 (decoder)" in str(decoder)
    assert encoder.positive.examples[0].whole and not decoder.positive.examples[0].whole
    assert encoder.readout == "input embedding" and "as the encoder has no head" in str(encoder)
    assert decoder.readout == "head"
    values = model.hf.decoder.block[1].layer[2].DenseReluDense.wo.weight.T
    normed = values * model.hf.decoder.final_layer_norm.weight
    best = (normed @ model.hf.lm_head.weight.T).argmax(-1)
    rows = mined.table("values").filter(pl.col("layer") == 3, pl.col("rank") == 0, pl.col("polarity") == 1)
    assert rows.sort("neuron").collect()["token"].to_list() == best.tolist()
    layers = {int(address[1]) for address in mined.find(promotes=" Paris", count=200).rows["neuron"]}
    assert layers & {0, 1} and layers & {2, 3}


def test_two_runs_of_both_stacks_are_compared(mined: Run, folder: Path, pairs: Path, tmp_path: Path) -> None:
    """A step of training in the decoder: triggers, and each neuron's coefficients on the same pairs of texts, as passes
    over these have them."""
    tuned = load_model(folder, dtype="fp32")
    with torch.no_grad():
        weight = tuned.hf.decoder.block[0].layer[2].DenseReluDense.wi.weight
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    tuned.hf.save_pretrained(tmp_path / "tuned")
    reading().save_pretrained(tmp_path / "tuned")
    text = load_corpus(pairs, target="summary")
    after = build(load_model(tmp_path / "tuned", dtype="fp32"), text, tmp_path / "run", top=8)
    report = compare(mined, after, only="values,distributions", weights=True)
    found = {finding.id: finding for finding in report.findings}
    frame = found["neurons-changed-each"].frame
    assert set(frame["layer"]) == {0, 1, 2, 3} and "trigger-stability" in found
    assert frame.filter(pl.col("layer") != 2)["key"].to_list() == pytest.approx([1.0] * 120, abs=1e-6)
    models = [load_model(folder, dtype="fp32"), load_model(tmp_path / "tuned", dtype="fp32")]
    seen: list[list[torch.Tensor]] = [[], []]
    for context in range(0, mined.manifest.corpus.contexts, 2):
        source, target = (
            torch.from_numpy(np.asarray(mined.contexts([at])[at].tokens, np.int64))[None]
            for at in (context, context + 1)
        )
        counted = [
            place for place, token in enumerate(target[0].tolist()) if place > 0 and token not in {0, 1, 2, 3}
        ]
        for side, model in zip(seen, models, strict=True):
            side.append(model.traced(target, source).layers[0].coefficients[counted])
    one, two = (torch.cat(side).numpy() for side in seen)
    rows = frame.filter(pl.col("layer") == 2).sort("neuron")
    for neuron in range(0, 40, 7):
        correlation = spearmanr(one[:, neuron], two[:, neuron]).statistic
        assert rows["coefficients"][neuron] == pytest.approx(correlation, abs=1e-4)


def test_a_trace_follows_both_stacks_along_their_texts(mined: Run, folder: Path) -> None:
    """Neurons of the encoder along its text, of the decoder along what it has written: what down projections read; and
    the most unusual of each token are those of a slow search among the neurons of its stack."""
    model = load_model(folder, dtype="fp32")
    ids = {"encoder": torch.tensor([model.tokenizer(PROMPT)["input_ids"]])}
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = [
        layer.down.register_forward_pre_hook(
            lambda _, args, place=(name, index): seen.update({place: args[0][0].detach()})
        )
        for name, stack in zip(("encoder", "decoder"), model.anatomy.stacks, strict=True)
        for index, layer in enumerate(stack.layers)
        if layer.down is not None
    ]
    trace = mined.trace(PROMPT, ["L1N3", "L2N5"], decoder_prompt=WRITTEN, model=model)
    first = ids["encoder"].shape[1]
    written = torch.tensor([[token.token for token in trace.tokens[first:]]])
    assert [token.token for token in trace.tokens[:first]] == ids["encoder"][0].tolist()
    seen.clear()
    with torch.no_grad():
        model.hf(input_ids=ids["encoder"], decoder_input_ids=written)
    for handle in handles:
        handle.remove()
    for neuron, place, start in (
        (trace.neurons[0], ("encoder", 1), 0),
        (trace.neurons[1], ("decoder", 0), first),
    ):
        found = [reading.coefficient for reading in neuron.readings]
        assert found == pytest.approx(seen[place][:, neuron.neuron.neuron].tolist(), abs=1e-5)
        assert [reading.position for reading in neuron.readings] == list(range(start, start + len(found)))
    assert trace.encoded is not None and trace.encoded.tokens == first
    whole = mined.trace(PROMPT, decoder_prompt=WRITTEN, top=3, model=model)
    assert whole.encoded is not None
    for token, best in zip(whole.tokens, whole.unusual, strict=True):
        assert len(best) == (3 if token.counted else 0)
        decoder = token.position >= first
        for unusual in best:
            assert (unusual.reading.neuron.layer >= 2) == decoder
            count = (whole.encoded.decoder_units if decoder else whole.units) * (unusual.reading.tail or 0.0)
            assert unusual.reading.expected == pytest.approx(count)
        tails: list[float] = []
        for layer in range(2) if token.counted else ():
            stored = Distributions.of(mined, layer + 2 * decoder)
            row = seen["decoder" if decoder else "encoder", layer][token.position - first * decoder]
            tails += stored.tails(row[None].numpy())[0].tolist()
        expected = sorted(tails)[:3] if token.counted else []
        assert sorted(one.reading.tail or 0.0 for one in best) == pytest.approx(expected)
    for text in (str(whole), str(trace), whole._repr_html_(), trace._repr_html_()):
        assert f"tokens 0 to {first - 1}" in " ".join(text.split())
    assert json.loads(json.dumps(trace.to_dict()))["encoded"]["layers"] == 2


def test_a_trace_without_a_text_for_the_decoder_is_of_the_encoder(
    mined: Run, folder: Path, tmp_path: Path
) -> None:
    """As in a model that has no other stack; a neuron of the decoder asks for its text, and others have none."""
    model = load_model(folder, dtype="fp32")
    trace = mined.trace(PROMPT, "L1N3", model=model)
    both = mined.trace(PROMPT, "L1N3", decoder_prompt=WRITTEN, model=model)
    assert trace.neurons[0].readings == both.neurons[0].readings and trace.encoded is None
    with pytest.raises(QueryError, match="L3N3: it is in the decoder of"):
        mined.trace(PROMPT, "L3N3", model=model)
    bert = load_model(tiny("bert", "masked"), tokenizer=reading())
    with pytest.raises(QueryError, match="so that it reads one text; leave decoder_prompt"):
        mnemoscope_trace(bert, "the king", decoder_prompt="of")


def test_tables_of_neurons_say_which_stack_each_is_in(mined: Run) -> None:
    """Beside the address, whatever was searched for; a run of one stack has no such column."""
    for hits in (
        mined.find(promotes=" Paris", count=50),
        mined.find(sort="max", count=50),
        mined.find(like="L3N3"),
    ):
        rows = hits.rows
        assert rows.columns[:2] == ["neuron", "stack"] and len(rows)
        told = dict(rows.select("neuron", "stack").rows())
        assert all((int(address[1]) < 2) == (stack == "encoder") for address, stack in told.items())
    assert "encoder" in str(mined.find(sort="max", layer=1, count=3))


@pytest.mark.slow
def test_workers_and_limits_do_not_cut_pairs_apart(
    folder: Path, pairs: Path, tmp_path: Path, mined: Run
) -> None:
    """Two workers give the same tables; under a limit both contexts of a pair are there or none; shuffled nulls run."""
    model = load_model(folder, dtype="fp32")
    text = load_corpus(pairs, target="summary")
    again = build(model, text, tmp_path / "two", top=8, workers=2)
    for name in ("triggers", "neurons", "histograms", "values"):
        assert again.table(name).collect().equals(mined.table(name).collect())
    few = build(
        model, load_corpus(pairs, target="summary", limit=400), tmp_path / "few", top=3, nulls=["shuffled"]
    )
    lengths = few.table("contexts").collect()["tokens"].list.len().to_list()
    assert len(lengths) % 2 == 0 and sum(lengths) <= 400 and verify(few, model).passed
    kinds = few.table("null_triggers").collect()
    assert set(kinds["layer"]) == {0, 1, 2, 3}


def test_targets_are_asked_for_where_they_are(folder: Path, pairs: Path, tmp_path: Path) -> None:
    """A column that is not there, another way to cut texts, a model that writes nothing: a line each."""
    with pytest.raises(CorpusError, match="no column 'abstract' beside its text; there are 'summary'"):
        load_corpus(pairs, target="abstract")
    with pytest.raises(CorpusError, match="texts with targets are read whole"):
        load_corpus(pairs, target="summary", segment="sentence")
    bert = load_model(tiny("bert", "masked"), tokenizer=reading())
    with pytest.raises(RunError, match="is no encoder-decoder and reads one text; leave"):
        build(bert, load_corpus(pairs, target="summary"), tmp_path / "run")
