"""A prediction taken apart into units that are not neurons: with their errors the account adds up exactly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import tiny
from families import FAMILIES, MIXTURES
from tiny import tokenizer
from units import random_units, saelens, tracer

from mnemoscope import explain, load_model
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import replaced
from mnemoscope.prediction.explanation import Explanation

PROMPT = " the capital of France is"
LAYER = 1
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
CASES = [(family, hook) for family in ("llama", "gpt2", "gemma2") for hook in HOOKS]
CASES += [
    ("gpt_neox", "hook_resid_post"), ("gpt_neox", "hook_mlp_out"), ("granite", "hook_mlp_out"),
    ("mixtral", "hook_resid_post"), ("mixtral", "hook_attn_out"), ("bert", "hook_resid_post"), ("bert", "hook_mlp_out"),
    ("llama", "transcoder"), ("gemma2", "transcoder"), ("llama", "across"), ("gemma2", "across"), ("granite", "across"),
]  # fmt: skip
QUICK = (("llama", "hook_resid_post"), ("gemma2", "hook_mlp_out"), ("llama", "across"))


@cache
def model_of(family: str, hook: str, folder: Path) -> Model:
    """A tiny model with random units: their error is large, and must be all that is left."""
    hf = tiny("bert", "masked") if family == "bert" else {**FAMILIES, **MIXTURES}[family]()
    width, layers = hf.config.hidden_size, hf.config.num_hidden_layers
    if hook in ("transcoder", "across"):
        name = f"transcoder:{tracer(folder / 't', layers, width, 20, across=hook == 'across')}"
    else:
        kept = {"normalize_activations": "layer_norm"} if hook == "hook_resid_mid" else {}
        place = saelens(folder / "s", random_units(width, 20), f"blocks.{LAYER}.{hook}", **kept)
        name = f"sae:{place}"
    return load_model(hf, tokenizer=tokenizer(), units=name)


def traced(model: Model) -> tuple[Stream, int]:
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    with model.running(), torch.inference_mode():
        return model.traced(tokens), tokens.shape[1] - 2


def parts_of(stream: Stream, position: int) -> dict[str, torch.Tensor]:
    """The sum of each kind of part over all layers."""
    sums = {"embedding": stream.embedding_part(position), "constant": stream.constant(position)}
    for layer in range(stream.anatomy.n_layers):
        named = [("heads", stream.attention_parts(layer, position).sum((0, 1)))]
        named += [("units", stream.neuron_parts(layer, position).sum(0))]
        named += [(name, vector) for name, _, vector in stream.beside(layer, position)]
        for name, vector in named:
            sums[name] = sums.get(name, torch.zeros_like(vector)) + vector
    return sums


def _slow(case: tuple[str, str]) -> Any:
    return pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("family", "hook"), list(map(_slow, CASES)))
def test_units_errors_and_all_else_add_up(family: str, hook: str, tmp_path: Path) -> None:
    """Embedding, heads, units, biases, FFNs without units and errors are the final residual, at every position."""
    model = model_of(family, hook, tmp_path)
    stream, position = traced(model)
    for place in range(position + 1):
        sums = parts_of(stream, place)
        total = sum(sums.values(), torch.zeros_like(sums["units"]))
        final = stream.final[place].float()
        assert float((total - final).abs().max() / final.abs().max()) < 1e-5
        assert "unit error" in sums and bool(sums["unit error"].any()) and bool(sums["units"].any())
        # What is dropped shows.
        assert float((total - sums["unit error"] - final).abs().max() / final.abs().max()) > 1e-3


@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out", "hook_attn_out"])
def test_a_unit_writes_its_coefficient_times_its_value(hook: str, tmp_path: Path) -> None:
    """In a llama, which normalises nothing on the way: an exact vector, at the layer that it belongs to."""
    model = model_of("llama", hook, tmp_path)
    stream, position = traced(model)
    units = model.anatomy.layers[LAYER].units
    assert units is not None
    coefficients = stream.layers[LAYER].coefficients[position]
    chosen = coefficients.topk(3).indices
    expected = coefficients[chosen, None] * random_units(model.anatomy.width, 20)["W_dec"][chosen]
    assert torch.allclose(stream.neuron_parts(LAYER, position, chosen), expected, atol=1e-6)
    for layer in set(range(model.anatomy.n_layers)) - {LAYER}:
        assert stream.neuron_parts(layer, position).shape[0] == 0


def _explained(family: str, hook: str, folder: Path, lens: str) -> tuple[Model, Explanation]:
    model = model_of(family, hook, folder)
    return model, explain(model, PROMPT, " Paris", [" London"], lens=lens, top=5)


@pytest.mark.parametrize(("family", "hook"), [_slow(case) for case in CASES if case[0] != "bert"])
def test_the_account_of_units_adds_up(family: str, hook: str, tmp_path: Path) -> None:
    """From no information to the model's own log-probability, under two lenses; so does the contrast with a foil."""
    for lens in ("frozen", "own"):
        model, explanation = _explained(family, hook, tmp_path, lens)
        with torch.no_grad():
            logits = model.hf(torch.tensor([model.tokenizer(PROMPT)["input_ids"]])).logits[0, -1].double()
        expected = float(logits.log_softmax(0)[explanation.target.token])
        assert explanation.account["nats"][-1] == pytest.approx(expected, abs=1e-4)
        assert float(explanation.layers["increase"].sum()) == pytest.approx(explanation.total, abs=1e-4)
        contrast = explanation.contrasts[0]
        gained = float(contrast.layers["increase"].sum())
        assert gained == pytest.approx(contrast.total - contrast.start, abs=1e-4)
        for row in explanation.remainders.iter_rows(named=True):
            assert row["shown"] + row["remainder"] == pytest.approx(row["total"], abs=1e-9)
    assert "unit error" in explanation.others["part"].to_list()
    assert explanation.queries.height == 0 and "units of" in " ".join(explanation.notes)


def test_the_logits_of_all_rows_add_up(tmp_path: Path) -> None:
    """Where units stand for the stream, its logit is that of all units, their bias and their error (frozen lens)."""
    model, explanation = _explained("llama", "hook_resid_post", tmp_path, "frozen")
    assert explanation.unit_part == "stream"
    whole = explain(model, PROMPT, " Paris", lens="frozen", top=1000)
    beside = whole.others.filter(pl.col("part").is_in(["unit bias", "unit error"]))["logit"].sum()
    stream = whole.layers.filter(pl.col("part") == "stream")["logit"].sum()
    assert whole.neurons["logit"].sum() + beside == pytest.approx(stream, abs=1e-4)
    heads = whole.heads.filter(pl.col("layer") <= LAYER)
    assert (heads["logit"] == 0).all(), "units stand for all that heads wrote up to there"
    text = str(whole)
    assert "of units, attention and FFN together" in " ".join(text.split())
    assert "errors of units" in text and "all that units stand for" in text and "L1N" in text
    assert "errors of units" in whole._repr_html_()


def test_of_several_layers_the_last_stands_for_the_stream(tmp_path: Path) -> None:
    """Units of the layers below are inside of what it reads, and write nothing beside it."""
    hf = FAMILIES["llama"]()
    for layer in (0, 1):
        saelens(
            tmp_path / "s" / str(layer),
            random_units(hf.config.hidden_size, 20, layer),
            f"blocks.{layer}.hook_resid_post",
        )
    model = load_model(hf, tokenizer=tokenizer(), units=f"sae:{tmp_path / 's'}")
    stream, position = traced(model)
    assert replaced(model.anatomy) == 4
    assert not stream.neuron_parts(0, position).any() and stream.neuron_parts(1, position).any()
    sums = parts_of(stream, position)
    total = sum(sums.values(), torch.zeros_like(sums["units"]))
    assert np.allclose(total, stream.final[position], atol=1e-4)


def test_units_are_not_ablated(tmp_path: Path) -> None:
    """The model computes none of them, which is one line."""
    with pytest.raises(ModelNotSupported, match="parts are ablated that the model itself computes"):
        explain(model_of("llama", "hook_mlp_out", tmp_path), PROMPT, " Paris", ablate=2)
