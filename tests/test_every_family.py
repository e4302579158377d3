"""Every entry of transformers' mappings: what becomes of it is written down, and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from every_family import ENTRIES, _small, outcome, tiny, tiny_config
from families import randomise, slow_but_for
from tiny import texts, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mnemoscope import build, explain
from mnemoscope.api import open_run
from mnemoscope.errors import ModelError, ModelNotSupported, QueryError
from mnemoscope.mine.verify import verify
from mnemoscope.model.capture import Capture, residuals
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.encoders import REFUSED_STACKS
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, Arrives
from mnemoscope.model.running import hooked
from mnemoscope.model.stream import Stream, trace
from mnemoscope.model.table import FAMILIES, REFUSED, Outcome, outcomes
from mnemoscope.prediction import ablate
from mnemoscope.prediction.ablate import Cut, effects
from mnemoscope.records import ContextBatch

WRITTEN = {(row.task, row.family): row for row in outcomes()}


def test_every_entry_is_written_down_once() -> None:
    """The list has the entries of the mappings, in their order, each closed or with a reason of one line."""
    assert tuple((row.task, row.family) for row in outcomes()) == ENTRIES
    assert all((row.error is None) != (row.reason is None) for row in WRITTEN.values())
    assert all(row.error is None or row.error <= 1e-5 for row in WRITTEN.values())


def test_every_row_of_the_table_closes() -> None:
    """No family is claimed in the table whose parts do not add up."""
    closed = {row.family for row in WRITTEN.values() if row.error is not None}
    entries = {row.family for row in WRITTEN.values()}
    assert set(FAMILIES) & entries <= closed


def test_no_refusal_says_only_that_nothing_is_known() -> None:
    """Each family that is refused is refused for what it does, and not for want of a row."""
    vague = (
        "no row in the table",
        "without a row",
        "not made of parts",
        "could not follow",
        "cannot be measured",
    )
    for row in WRITTEN.values():
        if row.reason is not None and row.family not in {"neomme", "ultrabert", "ultravbert"}:
            assert not any(words in row.reason for words in vague), row


def test_every_reason_of_the_table_is_given() -> None:
    """A family with a reason of its own is refused with that reason, whatever its task."""
    for family, reason in REFUSED.items():
        given = {row.reason for row in WRITTEN.values() if row.family == family}
        assert given == {reason}, family


def test_every_reason_of_an_encoder_decoder_is_given() -> None:
    """What is of both stacks together, and says nothing of its decoder by itself."""
    for family, reason in REFUSED_STACKS.items():
        assert WRITTEN["seq2seq", family].reason == reason


def _every_layer(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    return lambda anatomy: replace(
        anatomy, layers=tuple(replace(layer, **changes) for layer in anatomy.layers)
    )


def _whole(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    return lambda anatomy: replace(anatomy, **changes)


def _every_norm(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    def changed(anatomy: Anatomy) -> Anatomy:
        layers = (
            replace(layer, ffn_norm=replace(layer.ffn_norm, **changes))  # type: ignore[type-var]
            for layer in anatomy.layers
        )
        return replace(anatomy, layers=tuple(layers))

    return changed


def _without_outer_bias(anatomy: Anatomy) -> Anatomy:
    layers = []
    for layer in anatomy.layers:
        assert layer.experts is not None
        held = layer.experts.held
        without = replace(layer.experts, held=lambda m, n, held=held: None if n == "bias" else held(m, n))
        layers.append(replace(layer, experts=without))
    return replace(anatomy, layers=tuple(layers))


# What is left out of an anatomy, which must show.
DROPPED: dict[str, dict[str, Callable[[Anatomy], Anatomy]]] = {
    "hyperclovax": {
        "residual multiplier": _every_layer(attention_multiplier=1.0),
        "logit multiplier": _whole(logit_multiplier=1.0),
        "norm after attention": _every_layer(post_attention_norm=None),
        "norm after the FFN": _every_layer(post_ffn_norm=None),
    },
    "minicpm3": {
        "residual multiplier": _every_layer(attention_multiplier=1.0),
        "logit divisor": _whole(logit_multiplier=1.0),
    },
    "nanochat": {"norm of the embedding": _whole(embedding_norm=None), "cap": _whole(softcap=None)},
    "ctrl": {
        "embedding multiplier": _whole(embedding_multiplier=1.0),
        "activation": _every_layer(act=torch.nn.functional.gelu),
        "final norm": _whole(final_norm=None),
    },
    "lfm2": {"short convolution": _every_layer(mixer=None)},
    "bamba": {"state space": _every_layer(mixer=None)},
    "qwen3_5_text": {
        "linear attention": _every_layer(mixer=None),
        "gate of the mixed heads": _every_layer(mixed_gate=None),
    },
    "laguna": {"gate of the mixed heads": _every_layer(mixed_gate=None)},
    "apertus": {
        "numbers of the activation": lambda anatomy: _every_layer(act=anatomy.layers[0].act)(anatomy)
    },
    "falcon_h1": {
        "state space": _every_layer(mixer=None),
        "multiplier of the state space": _every_layer(mixer_multiplier=1.0),
        "multiplier of the attention": _every_layer(attention_multiplier=1.0),
        "multiplier of the FFN": _every_layer(ffn_multiplier=1.0),
        "multiplier inside the activation": _every_layer(act=torch.nn.functional.silu),
        "embedding multiplier": _whole(embedding_multiplier=1.0),
        "logit multiplier": _whole(logit_multiplier=1.0),
    },
    "gemma4_text": {
        "scale of the stream": _every_layer(arrives=Arrives()),
        "input of each layer": _every_layer(extra=None),
        "norm after the FFN": _every_layer(post_ffn_norm=None),
    },
    "beam": {
        "scale of the stream": _every_layer(arrives=Arrives()),
        "gate of the mixed heads": _every_layer(mixed_gate=None),
        "bias of the gate": lambda anatomy: replace(
            anatomy,
            layers=tuple(
                replace(layer, mixed_gate=replace(layer.mixed_gate, bias=None))  # type: ignore[type-var]
                for layer in anatomy.layers
            ),
        ),
        "multiplier of the attention": _every_layer(attention_multiplier=1.0),
    },
    "nemotron_h": {
        "state space": _every_layer(mixer=None),
        "experts": _every_layer(experts=None),
        "activation": lambda anatomy: replace(
            anatomy, layers=(*anatomy.layers[:3], replace(anatomy.layers[3], act=torch.relu))
        ),
        "norm before the FFN": _every_layer(ffn_norm=None),
    },
    "bitnet": {
        "norm of the mixed heads": _every_layer(mixed_gate=None),
        "norm of the coefficients": _every_layer(inner_norm=None),
    },
    "doge": {
        "factors of the channels": _every_layer(arrives=Arrives()),
        "multiplier of the FFN": _every_layer(ffn_multiplier=1.0),
        "unit of a norm": _every_norm(unit=1.0),
    },
    "zaya": {
        "factors of the channels": _every_layer(arrives=Arrives()),
        "what is added with attention": _every_layer(shift=None),
        "what is added with the FFN": _every_layer(ffn_shift=None),
        "factors of what attention writes": _every_layer(attention_multiplier=1.0),
        "factors of the embedding": _whole(embedding_multiplier=1.0),
    },
    "diffllama": {"attention": _every_layer(mixer=None)},
    "xlstm": {"memory": _every_layer(mixer=None), "cap": _whole(softcap=None)},
    "jetmoe": {
        "attention": _every_layer(mixer=None),
        "experts": _every_layer(experts=None),
        "bias of the mixture": _without_outer_bias,
    },
    "moshi": {"norm before the FFN": _every_layer(ffn_norm=None)},
    "openai-gpt": {
        "norm of the stream after attention": _every_layer(middle_norm=None),
        "norm of the stream after the FFN": _every_layer(end_norm=None),
    },
    "gpt_neox_japanese": {"bias beside the output projection": _every_layer(outer_bias=None)},
    "granite_swa": {"share of attention that goes to nothing": _every_layer(sink=False)},
    "dots3_note_text": {"gate of the mixed heads": _every_layer(mixed_gate=None)},
    "lfm3": {
        "gate of the mixed heads": _every_layer(mixed_gate=None),
        "norm after attention": _every_layer(post_attention_norm=None),
        "short convolution": _every_layer(mixer=None),
    },
    "kimi_linear": {"linear attention": _every_layer(mixer=None)},
    "olmo_hybrid": {"norm after attention": _every_layer(post_attention_norm=None)},
    "granitemoehybrid": {"residual multiplier": _every_layer(ffn_multiplier=0.5)},
}


@pytest.mark.parametrize("family", DROPPED)
def test_a_part_that_is_left_out_is_caught(family: str) -> None:
    """The parts add up, and without any one of them they do not."""
    model = tiny(family)
    anatomy, error = examine(model)
    assert error <= 1e-5
    for what, drop in DROPPED[family].items():
        with pytest.raises(ModelNotSupported):
            self_check(model, drop(anatomy))
            pytest.fail(f"{what} of {family} can be left out unseen")


def test_a_layer_without_attention_is_one_part_that_adds_up() -> None:
    """Embedding, heads, neurons, biases and what opaque mixers write give the last residual, at a position."""
    model = tiny("qwen3_5_text")
    anatomy, _ = examine(model)
    assert [layer.attention is None for layer in anatomy.layers] == [True, False]
    stream = trace(model, anatomy, torch.tensor([[5, 9, 3, 70, 22]]))
    total = stream.embedding[3].float()
    for layer in range(anatomy.n_layers):
        total = total + stream.attention_parts(layer, 3).sum((0, 1)) + stream.attention_bias(layer, 3)
        total = total + stream.neuron_parts(layer, 3).sum(0) + stream.ffn_bias(layer, 3)
    torch.testing.assert_close(total, stream.final[3], rtol=1e-4, atol=1e-5)
    assert not bool(stream.attention_parts(0, 3).any()) and bool(stream.attention_bias(0, 3).any())


@pytest.mark.parametrize("family", ["gemma4_text", "beam", "doge", "zaya"])
def test_parts_of_a_stream_that_is_scaled_add_up_at_its_end(family: str) -> None:
    """What of each part arrives at the end adds up to the last residual, and so do the points in between."""
    model = tiny(family)
    anatomy, _ = examine(model)
    assert not anatomy.layers[0].arrives.whole
    stream = trace(model, anatomy, torch.tensor([[5, 9, 3, 70, 22]]))
    total, points = stream.embedding[3].float(), stream.points(3)
    for layer in range(anatomy.n_layers):
        total = total + stream.attention_parts(layer, 3).sum((0, 1)) + stream.attention_bias(layer, 3)
        torch.testing.assert_close(total, points[2 * layer + 1], rtol=1e-4, atol=1e-5)
        total = total + stream.neuron_parts(layer, 3).sum(0) + stream.ffn_bias(layer, 3)
        torch.testing.assert_close(total, points[2 * layer + 2], rtol=1e-4, atol=1e-5)
        again = next(stream.attend(layer, stream.layers[layer].lin[None]))
        torch.testing.assert_close(again[0], stream.layers[layer].alpha)
    loaded = load_model(model, tokenizer=tokenizer())
    seen = residuals(loaded, stream.tokens[None])
    for layer, traced in enumerate(stream.layers):
        torch.testing.assert_close(seen["Lres"][layer, 0], traced.lres, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["Lout"][layer, 0], traced.lout, rtol=1e-4, atol=1e-5)


def test_explain_and_ablation_follow_layers_that_share_keys_and_have_inputs() -> None:
    """An explanation has a row for the input of each layer; layers that run on the last position alone are cut, too."""
    model = load_model(_sharing(), tokenizer=tokenizer())
    told = explain(model, "the city of", " Paris", top=10_000)
    assert told.others["part"].to_list().count("per-layer input") == 3
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    assert "per-layer input" in told.queries["kind"] and "inputs of layers" in str(told)
    stream = trace(model.hf, model.anatomy, torch.tensor([[5, 9, 3, 70]]))
    largest = [int(traced.coefficients[-1].abs().argmax()) for traced in stream.layers]
    source = int(stream.layers[2].alpha[0, -1].argmax())
    cuts = [Cut(2, largest[2]), Cut(2, 0, source=source), Cut(0, largest[0])]
    found = effects(model, stream, 7, cuts)
    for cut, effect in zip(cuts, found, strict=True):
        assert effect == pytest.approx(_cut_by_hand(model, stream, cut), abs=1e-5) and abs(effect) > 1e-6


def _sharing() -> PreTrainedModel:
    return _built(
        "gemma4_text",
        num_hidden_layers=3,
        layer_types=["full_attention"] * 3,
        num_kv_shared_layers=1,
        use_double_wide_mlp=True,
    )


def _built(family: str, **given: Any) -> PreTrainedModel:
    kind = CONFIG_MAPPING[family]
    config = kind(**_small(kind(), given))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    return model.eval()


def test_experts_that_read_a_projection_of_the_stream_have_keys_in_the_stream() -> None:
    """Keys and values are those of the experts times the projections around them; without one it is caught."""
    kinds = ["mamba", "moe", "attention", "moe"]
    hf = _built(
        "nemotron_h",
        layers_block_type=kinds,
        num_hidden_layers=4,
        n_groups=2,
        expand=2,
        moe_latent_size=16,
    )
    anatomy, error = examine(hf)
    assert error <= 1e-5 and anatomy.dtype == torch.float32
    experts = anatomy.layers[1].experts
    assert experts is not None and experts.rows(0).keys.shape == experts.rows(0).values.shape == (16, 32)
    for dropped in ("inlet", "outlet"):
        layers = list(anatomy.layers)
        layers[1] = replace(layers[1], experts=replace(experts, **{dropped: None}))
        with pytest.raises((ModelNotSupported, RuntimeError, BeartypeCallHintViolation)):
            self_check(hf, replace(anatomy, layers=tuple(layers)))
    told = explain(load_model(hf, tokenizer=tokenizer()), "the city of", " Paris", top=10_000)
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    half = load_model(hf.to(torch.bfloat16), tokenizer=tokenizer())
    assert half.self_check <= 1e-4 and half.anatomy.dtype == torch.bfloat16


def test_blocks_that_are_only_one_half_add_up_and_are_mined() -> None:
    """A block is a mixer, an attention or an FFN; only the last has neurons, and an explanation follows all."""
    kinds = ["mamba", "mlp", "attention", "mlp"]
    hf = _built("nemotron_h", layers_block_type=kinds, num_hidden_layers=4, n_groups=2, expand=2)
    model = load_model(hf, tokenizer=tokenizer())
    layers = model.anatomy.layers
    assert model.anatomy.sizes == (0, 40, 0, 40) and model.cells.layers == (1, 3)
    assert [layer.mixer is not None for layer in layers] == [True, False, False, False]
    assert [layer.attention is not None for layer in layers] == [False, False, True, False]
    told = explain(model, "the city of", " Paris", top=10_000)
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    assert set(told.neurons["layer"]) == {1, 3} and "mixer" in told.others["part"]
    tokens = torch.tensor([[5, 9, 3, 70]])
    points, stream = residuals(model, tokens), trace(hf, model.anatomy, tokens)
    for layer, traced in enumerate(stream.layers):
        torch.testing.assert_close(points["Lres"][layer, 0], traced.lres, rtol=1e-4, atol=1e-5)
    swept: dict[int, torch.Tensor] = {}
    ids = tokens.numpy()
    batch = ContextBatch(np.arange(1), ids, np.array([4]), np.ones_like(ids, dtype=bool))
    with Capture(model) as capture:
        capture.sweep(batch, lambda layer, coefficients, *_: swept.update({layer: coefficients[0].clone()}))
    assert set(swept) == {1, 3}
    torch.testing.assert_close(swept[3], stream.layers[3].coefficients, rtol=1e-4, atol=1e-5)


MIXERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention"] * 2},
    "jamba": {"attn_layer_period": 99, "attn_layer_offset": 98},
    "recurrent_gemma": {"block_types": ["recurrent"] * 2},
}


@pytest.mark.parametrize("family", slow_but_for(MIXERS, {"lfm2"}))
def test_a_model_of_mixers_alone_closes(family: str) -> None:
    """transformers does not run it with a cache, so it is compared with itself under a mask alone."""
    anatomy, error = examine(_built(family, **MIXERS[family]))
    assert error <= 1e-5 and all(layer.attention is None and layer.mixer for layer in anatomy.layers)


@torch.no_grad()
def _cut_by_hand(model: Model, stream: Stream, cut: Cut) -> float:
    """The change of log p(7) at the end, by a hook on the whole pass, which keeps all positions."""
    block = model.anatomy.layers[cut.layer]
    module = block.down if cut.source is None else block.attention_out
    assert module is not None

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        changed = args[0].clone()
        if cut.source is None:
            changed[0, -1, cut.unit] = 0
        else:
            traced = stream.layers[cut.layer]
            size = traced.value.shape[-1]
            taken = traced.alpha[cut.unit, -1, cut.source] * traced.value[cut.unit, cut.source]
            changed[0, -1, cut.unit * size : (cut.unit + 1) * size] -= taken
        return (changed,)

    def score() -> float:
        return float(
            model.hf(input_ids=stream.tokens[None], use_cache=False).logits[0, -1].log_softmax(-1)[7]
        )

    whole = score()
    with hooked([module.register_forward_pre_hook(hook)]):
        return whole - score()


def test_explain_and_residuals_follow_a_hybrid() -> None:
    """An explanation has one row for what the mixer of a layer writes, and residuals are those of the trace."""
    model = load_model(tiny("qwen3_5_text"), tokenizer=tokenizer())
    told = explain(model, "the city of", " Paris", top=3)
    rows = told.others.filter(told.others["part"] == "mixer")
    assert rows["layer"].to_list() == [0] and "attention bias" not in told.others["part"]
    assert "mixers" in str(told) and "attention biases" not in str(told)
    assert "attention bias" not in told.queries["kind"]
    whole = explain(model, "the city of", " Paris", top=10_000)
    logits = sum(frame["logit"].sum() for frame in (whole.heads, whole.neurons, whole.others))
    assert logits == pytest.approx(whole.stream["logit"][-1], abs=1e-4)
    assert "mixer" in whole.queries["kind"]
    points = residuals(model, torch.tensor([[5, 9, 3]]))
    stream = trace(model.hf, model.anatomy, torch.tensor([[5, 9, 3]]))
    for layer, traced in enumerate(stream.layers):
        torch.testing.assert_close(points["Lres"][layer, 0], traced.lres, rtol=1e-4, atol=1e-5)


def test_blocks_that_only_images_go_through_are_no_layers() -> None:
    """Text passes a block of cross-attention to images unchanged, and layers are numbered without it."""
    model = tiny("mllama")
    anatomy, _ = examine(model)
    assert len(anatomy.body.layers) == 3 and anatomy.n_layers == 2  # type: ignore[arg-type]
    assert [layer.module for layer in anatomy.layers] == [anatomy.body.layers[i] for i in (0, 2)]  # type: ignore[index]


def test_a_sink_takes_its_share_of_attention() -> None:
    """Attention weights are those that the model multiplied its values with: they add up to less than 1."""
    model = tiny("granite_swa")
    anatomy, _ = examine(model)
    stream = trace(model, anatomy, torch.tensor([[5, 9, 3, 70, 22]]))
    sums = stream.layers[0].alpha.sum(-1)
    assert bool((sums < 1).all()) and bool((sums > 0).all())
    again = next(stream.attend(0, stream.layers[0].lin[None]))
    torch.testing.assert_close(again[0], stream.layers[0].alpha)


DECODERS = [row.family for row in outcomes() if row.task == "causal" and row.error is not None]


@pytest.mark.parametrize("family", slow_but_for(DECODERS, {"gemma4_text", "mixtral"}))
def test_ablations_that_go_on_from_a_cache_are_those_of_whole_prompts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a family keeps of a prompt, cuts of neurons and heads have the logits that they have without it."""
    hf = tiny(family)
    anatomy = examine(hf)[0]
    model, stream = Model(hf, None, anatomy, family), trace(hf, anatomy, torch.arange(3, 11)[None])
    last = anatomy.n_layers - 1
    cuts = [Cut(0, 3), Cut(last, 5, None, 0.7), Cut(last, 1, 1), Cut(0, 0, 2)]
    possible = [
        cut
        for cut in cuts
        if (anatomy.sizes[cut.layer] if cut.source is None else anatomy.layers[cut.layer].attention_out)
    ]
    going_on = effects(model, stream, 7, possible)
    monkeypatch.setattr(ablate, "_kept", lambda *_: None)
    np.testing.assert_allclose(going_on, effects(model, stream, 7, possible), atol=1e-4)


@pytest.mark.slow
def test_the_text_half_of_a_composite_loads_from_a_folder(tmp_path: Path) -> None:
    """A model that also reads images is loaded for its text, though it is no causal language model by name."""
    model = tiny("llava", "composite")
    assert isinstance(model, tuple(AutoModelForImageTextToText._model_mapping.values()))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="fp32").self_check <= 1e-5


# Models that read images beside text, and are read for their text: no entries of the mappings, and much used.
COMPOSITES = [
    "aria",
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "cosmos3_edge",
    "deepseek_vl",
    "exaone4_5",
    "fuyu",
    "gemma3",
    "gemma4",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "got_ocr2",
    "idefics2",
    "idefics3",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "minicpmv4_6",
    "mistral3",
    "mistral_large4",
    "mllama",
    "ovis2",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "vipllava",
]


@pytest.mark.parametrize("family", slow_but_for(COMPOSITES, {"qwen2_5_vl", "llama4", "mistral3"}))
def test_a_composite_is_read_for_its_text(family: str) -> None:
    """The parts of the text half of a model that reads images, too, add up to its own logits for text."""
    assert examine(tiny(family, "composite"))[1] <= 1e-5


CLOSED = [row.family for row in WRITTEN.values() if row.task == "causal" and row.error is not None]


# xLSTM's own code multiplies fp32 with bf16 where a text fills a chunk, and runs in fp32 alone.
HALVED = [family for family in CLOSED if family != "xlstm"]


@pytest.mark.parametrize("family", slow_but_for(HALVED, {"apertus", "nemotron_h"}))
def test_weights_in_half_precision_are_widened_wherever_they_are_read(family: str) -> None:
    """Checkpoints are in bf16: also weights that another module reads, and numbers of an activation, are fp32 then."""
    assert examine(tiny(family).to(torch.bfloat16))[1] <= 1e-4


def test_what_fails_inside_transformers_is_one_line(tmp_path: Path) -> None:
    """A config that its own class cannot be built from is a ModelError, not an AttributeError."""
    tiny_config("musicgen").save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "masked", "seq2seq"])
def test_what_is_written_down_is_so(task: str) -> None:
    """A tiny model of every entry closes or is refused as the list says; any other exception fails here."""
    different: list[tuple[Outcome, Outcome]] = []
    for written in (row for row in WRITTEN.values() if row.task == task):
        now = outcome(task, written.family)
        if (now.error is None, now.reason) != (written.error is None, written.reason) or (
            now.error or 0
        ) > 1e-5:
            different.append((written, now))
    assert not different


def test_a_model_with_layers_without_neurons_makes_a_whole_run(tmp_path: Path) -> None:
    """Tables, verification, cards and an address that is not there: two layers of four have rows."""
    kinds = ["mamba", "mlp", "attention", "mlp"]
    hf = _built("nemotron_h", layers_block_type=kinds, num_hidden_layers=4, n_groups=2, expand=2)
    model = load_model(hf, tokenizer=tokenizer())
    run = open_run(build(model, texts(40), tmp_path / "run", top=5).path)
    assert run.table("neurons").collect()["layer"].unique().to_list() == [1, 3]
    assert run.table("shards").collect()["layer"].unique().to_list() == [1, 3]
    assert verify(run, model, sample=20).passed
    assert "L3N5" in str(run["L3N5"])
    with pytest.raises(QueryError, match="no neurons in layer 0"):
        run["L0N0"]
