"""Models that accelerate spread: weights that wait elsewhere until they are run, and layers on other devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, MIXTURES, slow_but_for
from tiny import texts, tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.build import build
from mnemoscope.mine.verify import verify
from mnemoscope.model import reading, spread
from mnemoscope.model.capture import Capture
from mnemoscope.model.load import load_model
from mnemoscope.model.parts import Norm
from mnemoscope.model.stream import trace
from mnemoscope.prediction.explain import explain
from mnemoscope.records import ContextBatch

TOKENS = torch.tensor([[5, 9, 3, 70]])
_EVERY = {**FAMILIES, **MIXTURES}


def _offloaded(hf: PreTrainedModel, kind: str, path: Path) -> PreTrainedModel:
    from accelerate import cpu_offload, disk_offload

    device = torch.device("cpu")
    if kind == "disk":
        return disk_offload(hf, str(path / "offload"), execution_device=device)
    return cpu_offload(hf, execution_device=device)


KINDS = [
    "llama cpu fp32", "llama disk fp32", "llama cpu bf16", "llama disk bf16", "gpt2 cpu fp32", "mixtral cpu fp32",
    "mixtral cpu bf16",
]  # fmt: skip


@pytest.mark.parametrize("kind", slow_but_for(KINDS, {"llama disk bf16", "mixtral cpu fp32"}))
def test_weights_that_wait_elsewhere_are_read_there(kind: str, tmp_path: Path) -> None:
    """Parts, hash and explanation are those of the same model in one piece, and the weights wait again afterwards."""
    family, where, dtype = kind.split()
    whole = _EVERY[family]().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    plain, hf = load_model(whole, tokenizer=tokenizer()), _offloaded(copy.deepcopy(whole), where, tmp_path)
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check == plain.self_check and model.dtype == dtype
    assert model.weights_sha256 == plain.weights_sha256 and model.device == torch.device("cpu")
    for layer, other in zip(model.anatomy.layers, plain.anatomy.layers, strict=True):
        assert torch.equal(layer.values(), other.values()) and torch.equal(layer.heads(), other.heads())
    told, same = (explain(each, "the city of", " Paris", top=5) for each in (model, plain))
    assert told.neurons.equals(same.neurons) and told.heads.equals(same.heads)
    weights = list(hf.parameters())
    assert all(weight.is_meta for weight in weights) and {weight.dtype for weight in weights} == {whole.dtype}


def test_a_run_of_an_offloaded_model_is_built_and_verified(tmp_path: Path) -> None:
    """Mined by one process; more are refused, and so are shuffled weights."""
    model = load_model(_offloaded(FAMILIES["llama"](), "cpu", tmp_path), tokenizer=tokenizer())
    run = build(model, texts(40), tmp_path / "run", top=5)
    assert verify(run, model, sample=20).passed
    with pytest.raises(ModelNotSupported, match="several devices; give one process"):
        build(model, texts(40), tmp_path / "two", top=5, workers=2)
    with pytest.raises(ModelNotSupported, match=r"spread over several devices.*leave the kind shuffled out"):
        build(model, texts(40), tmp_path / "three", top=5, nulls=("shuffled",))


def _norm_on(home: torch.device, measure: Callable[..., Norm | None]) -> Callable[..., Norm | None]:
    """A norm that is measured where it is, and whose weights then stand where parts are added up."""

    def moved(module: Any, *given: Any) -> Norm | None:
        elsewhere = spread._HOMES.pop(module, None)
        norm = measure(module, *given)
        if elsewhere is not None:
            spread._HOMES[module] = elsewhere
        if norm is None:
            return None
        weights = {name: getattr(norm, name) for name in ("weight", "bias")}
        return replace(norm, **{name: None if w is None else w.to(home) for name, w in weights.items()})

    return moved


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_everything_that_is_read_comes_to_one_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device is stood in for by meta, with which nothing that stayed behind can be added or multiplied."""
    home, hf = torch.device("meta"), _EVERY[family]()
    for module in hf.modules():
        if module is not hf.get_input_embeddings():
            spread._HOMES[module] = home
    monkeypatch.setattr(reading, "remember", lambda _: None)
    monkeypatch.setattr(reading, "_measure", _norm_on(home, reading._measure))
    monkeypatch.setattr(
        reading, "_measured_experts", lambda block, module, *_: reading.Experts(module, held=spread.held)
    )
    anatomy = next(reading.candidates(hf))
    stream = trace(hf, anatomy, TOKENS)
    for layer in range(anatomy.n_layers):
        parts: list[Tensor] = [
            stream.attention_update(layer), stream.ffn_update(layer), stream.attention_parts(layer, 2),
            stream.attention_bias(layer, 2), stream.neuron_parts(layer, 2), stream.ffn_bias(layer, 2),
            *next(stream.attend(layer, torch.zeros(1, 4, 32))),
        ]  # fmt: skip
        assert {part.device for part in parts} == {home}
    assert anatomy.unembedding().device == home


def test_a_model_that_is_in_one_piece_again_is_read_as_such(tmp_path: Path) -> None:
    """Where it was spread is forgotten with the hooks."""
    from accelerate.hooks import remove_hook_from_submodules

    hf = _offloaded(FAMILIES["llama"](), "cpu", tmp_path)
    load_model(hf, tokenizer=tokenizer())
    assert hf.model.layers[0] in spread._HOMES
    remove_hook_from_submodules(hf)
    assert load_model(hf, tokenizer=tokenizer()).self_check <= 1e-5
    assert hf.model.layers[0] not in spread._HOMES


def test_coefficients_come_to_one_device() -> None:
    """What mining hands out of each layer."""
    hf = FAMILIES["llama"]()
    model = load_model(hf, tokenizer=tokenizer())
    spread._HOMES.update(dict.fromkeys(hf.modules(), torch.device("meta")))
    ids = TOKENS.numpy().astype(np.int32)
    batch = ContextBatch(np.arange(1), ids, np.array([4], np.int32), np.ones_like(ids, dtype=bool))
    seen: list[torch.device] = []
    with Capture(model) as capture:
        capture.sweep(batch, lambda _, coefficients, *__: seen.append(coefficients.device))
    assert seen == [torch.device("meta")] * 3
