"""Packed weights: the model runs as it is, and its values, keys and heads are the numbers that it multiplies with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import slow_but_for, tiny
from tiny import texts, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.build import build
from mnemoscope.mine.verify import verify
from mnemoscope.model import parts
from mnemoscope.model.capture import Capture
from mnemoscope.model.load import load_built, load_model
from mnemoscope.model.model import hash_of
from mnemoscope.prediction.explain import explain
from mnemoscope.records import ContextBatch

_SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip


class Codes(nn.Module):
    """As GPTQ and AWQ have it: integers and scales in buffers, no `weight`, and arithmetic of its own."""

    def __init__(
        self, linear: nn.Linear, accepted: tuple[torch.dtype, ...], compute: torch.dtype | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (weight / scales).round().to(torch.int32))
        self.register_buffer("scales", scales.to(linear.weight.dtype))
        self.accepted, self.compute = accepted, compute

    def numbers(self) -> Tensor:
        """The weights as they are multiplied with."""
        return self.qweight * self.scales

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, in a dtype of its own if it has one."""
        if x.dtype not in self.accepted:
            raise RuntimeError(f"expected one of {self.accepted}")
        dtype = self.compute or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.numbers().to(dtype), bias).to(x.dtype)


class Rearranged(Codes):
    """As bitsandbytes on a processor: when it is first run its codes are laid out anew, in another shape."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.weight = nn.Parameter(self.qweight.to(torch.uint8), requires_grad=False)
        self.laid_out = False

    def numbers(self) -> Tensor:
        codes = self.weight.T if self.laid_out else self.weight
        return codes.to(torch.int8) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        if not self.laid_out:
            self.weight.data, self.laid_out = self.weight.data.T.contiguous(), True
        return super().forward(x)


class Eight(nn.Linear):
    """As FP8 checkpoints have it: a weight in float8 beside its scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        self.weight_scale_inv = nn.Parameter(
            linear.weight.detach().float().abs().max() / 448, requires_grad=False
        )
        codes = (linear.weight.detach().float() / self.weight_scale_inv).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def numbers(self) -> Tensor:
        """The weights as they are multiplied with."""
        return self.weight.float() * self.weight_scale_inv

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of the input."""
        return nn.functional.linear(x, self.numbers().to(x.dtype), self.bias)


def _replaced(linear: nn.Linear) -> nn.Module:
    """As compressed-tensors has it: a plain class, whose forward method a library put there."""
    inner = Codes(linear, EVERY, None)
    module = nn.Linear(linear.in_features, linear.out_features, bias=False)
    del module.weight
    module.register_buffer("weight_packed", inner.qweight)
    module.forward = inner.forward  # type: ignore[method-assign]
    module.numbers = inner.numbers
    return module


class Rounding(Codes):
    """Rounds what it reads to four bits, too."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
        return super().forward((x / scale).round() * scale)


EVERY = (torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, tuple[Callable[[nn.Linear], nn.Module], torch.dtype]] = {
    "codes": (partial(Codes, accepted=EVERY, compute=None), torch.float32),
    "codes in bf16": (partial(Codes, accepted=EVERY, compute=None), torch.bfloat16),
    "computes in bf16": (partial(Codes, accepted=EVERY, compute=torch.bfloat16), torch.float32),
    "half only": (partial(Codes, accepted=(torch.float16,), compute=None), torch.float16),
    "rearranged": (lambda linear: Rearranged(linear, EVERY, None), torch.float32),
    "float8": (Eight, torch.bfloat16),
    "replaced forward": (_replaced, torch.float32),
}


def _packed(pack: Callable[[nn.Linear], nn.Module], dtype: torch.dtype) -> PreTrainedModel:
    """A tiny model all of whose blocks' linear modules are packed."""
    hf = tiny("llama", **_SIZES).to(dtype)
    for block in hf.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, pack(child))
    return hf.eval()


@pytest.mark.parametrize("kind", slow_but_for(KINDS, {"computes in bf16", "half only", "rearranged"}))
def test_parts_are_the_numbers_that_are_multiplied_with(kind: str) -> None:
    """Values, keys and heads are codes times scales; the model closes and is explained, and is as it was."""
    hf = _packed(*KINDS[kind])
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check <= 1e-5 and model.entry().packed
    down, gate = hf.model.layers[1].mlp.down_proj, hf.model.layers[1].mlp.gate_proj
    layer = model.anatomy.layers[1]
    tolerance: dict[str, Any] = {
        "rtol": 1e-6 if kind not in ("computes in bf16", "half only") else 1e-2,
        "atol": 1e-6,
    }
    torch.testing.assert_close(layer.values().float(), down.numbers().float().T, **tolerance)
    torch.testing.assert_close(layer.keys().float(), gate.numbers().float(), **tolerance)
    assert model.anatomy.dtype == hf.dtype
    told = explain(model, "the city of", " Paris", top=10_000)
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    assert ("forward" in vars(down)) == (kind == "replaced forward")


def test_coefficients_are_those_of_the_packed_model() -> None:
    """What is mined is what the packed down projection reads, to the bit."""
    hf = _packed(*KINDS["computes in bf16"])
    model = load_model(hf, tokenizer=tokenizer())
    ids, read, swept = np.array([[5, 9, 3, 70]]), {}, {}
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, index=index: read.update({index: args[0]})
        )
        for index, block in enumerate(hf.model.layers)
    ]
    with torch.inference_mode():
        hf(input_ids=torch.from_numpy(ids), use_cache=False)
    for handle in handles:
        handle.remove()
    batch = ContextBatch(
        np.arange(1), ids.astype(np.int32), np.array([4], np.int32), np.ones_like(ids, dtype=bool)
    )
    with Capture(model) as capture:
        capture.sweep(batch, lambda layer, coefficients, *_: swept.update({layer: coefficients.clone()}))
    assert all(torch.equal(swept[index], read[index]) for index in (0, 1))


def test_what_rounds_its_inputs_is_refused_for_that() -> None:
    """It is no linear map, and the line says by how much."""
    with pytest.raises(
        ModelNotSupported, match=r"packed weights \(Rounding\).*more than the weights is rounded"
    ) as caught:
        load_model(
            _packed(partial(Rounding, accepted=EVERY, compute=None), torch.float32), tokenizer=tokenizer()
        )
    assert "\n" not in str(caught.value)


def test_weights_that_are_multiplied_out_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost scale is a part that does not add up."""
    whole = parts.multiplied_out
    monkeypatch.setattr(parts, "multiplied_out", lambda module: whole(module) * 1.01)
    with pytest.raises(ModelNotSupported, match="layer 0, attention: heads x sources"):
        load_model(_packed(*KINDS["codes"]), tokenizer=tokenizer())


def test_a_hash_is_of_the_numbers_and_not_of_how_they_are_packed() -> None:
    """Codes that are laid out anew are the same weights; another scale makes others."""
    hf = _packed(*KINDS["rearranged"])
    before = hash_of(hf)
    with torch.no_grad():
        hf(input_ids=torch.tensor([[1, 2]]))
    assert hash_of(hf) == before
    hf.model.layers[1].mlp.down_proj.scales *= 2
    assert hash_of(hf) != before


def test_a_run_of_a_packed_model_is_built_and_verified(tmp_path: Path) -> None:
    """Its manifest says how its weights are packed; shuffled weights are refused."""
    model = load_model(_packed(*KINDS["rearranged"]), tokenizer=tokenizer())
    run = build(model, texts(40), tmp_path / "run", top=5)
    assert run.manifest.model.packed == ["Rearranged"]
    assert verify(run, model, sample=20).passed
    with pytest.raises(ModelNotSupported, match=r"packed \(Rearranged\).*leave the kind shuffled out"):
        build(model, texts(40), tmp_path / "other", top=5, nulls=("shuffled",))


@pytest.mark.filterwarnings("ignore")  # of a library that is imported
def test_torchao_loads_from_a_folder_and_makes_a_run(tmp_path: Path) -> None:
    """Weights in eight bits by torchao: saved, loaded by name, mined by two processes, and verified."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    base, packed = tmp_path / "base", tmp_path / "packed"
    tiny("llama", **_SIZES).save_pretrained(base)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(packed)
    tokenizer().save_pretrained(packed)
    _whole(packed, tmp_path / "run", "Linear (Int8Tensor)", workers=2)


@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_load_from_a_folder_and_make_a_run(tmp_path: Path) -> None:
    """Weights in four bits by compressed-tensors, which unpacks them when they are first run."""
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    hf = tiny("llama", **_SIZES)
    weights = library.QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=weights)
    config = library.QuantizationConfig(
        config_groups={"all": scheme},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="frozen",
    )
    library.apply_quantization_config(hf, config)
    for module in hf.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 7
    compressor = ModelCompressor.from_pretrained_model(hf)
    compressor.compress_model(hf)
    hf.save_pretrained(tmp_path / "packed")
    compressor.update_config(str(tmp_path / "packed"))
    tokenizer().save_pretrained(tmp_path / "packed")
    _whole(tmp_path / "packed", tmp_path / "run", None)


def _whole(folder: Path, path: Path, packed: str | None, workers: int = 1) -> None:
    """A run of a folder, whose model is loaded again and verified."""
    model = load_model(folder)
    assert model.self_check <= 1e-5
    run = build(model, texts(40), path, top=5, workers=workers)
    assert run.manifest.model.packed == ([] if packed is None else [packed])
    again = load_built(run)
    assert again.weights_sha256 == model.weights_sha256 and verify(run, again, sample=20).passed
