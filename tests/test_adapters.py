"""An adapter that is named is merged: the model loaded is the one that runs with it, and a run knows which it was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, VARIANTS, slow_but_for
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import model_folder, texts, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mnemoscope.api import build, open_run
from mnemoscope.cli import app
from mnemoscope.errors import ModelError, ModelNotSupported
from mnemoscope.mine.verify import verify
from mnemoscope.model.adapters import merge
from mnemoscope.model.load import load_built, load_model
from mnemoscope.prediction.explain import explain

FF, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj", "o_proj"]
TOKENS = torch.tensor([[5, 9, 3, 70, 22]])
KINDS: dict[str, tuple[str, Any]] = {
    "lora on everything": ("llama", LoraConfig(r=4, lora_alpha=8, target_modules=FF + ATTENTION)),
    "dora": ("llama", LoraConfig(r=4, target_modules=FF, use_dora=True)),
    "rslora": ("llama", LoraConfig(r=4, lora_alpha=3, target_modules=FF, use_rslora=True)),
    "rank and alpha by module": (
        "llama",
        LoraConfig(r=4, target_modules=FF, rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 5}),
    ),
    "saved head": ("llama", LoraConfig(r=4, target_modules=FF, modules_to_save=["lm_head"])),
    "saved norm": ("llama", LoraConfig(r=4, target_modules=FF, modules_to_save=["norm"])),
    "embedding beside a tied head": ("llama_tied", LoraConfig(r=4, target_modules=["embed_tokens"])),
    "head beside a tied embedding": ("llama_tied", LoraConfig(r=4, target_modules=["lm_head"])),
    "conv1d": ("gpt2", LoraConfig(r=4, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    "lora bias": ("gpt2", LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True, lora_bias=True)),
    "ia3": (
        "llama",
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "experts": ("mixtral", LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft


def _family(name: str) -> Any:
    return {**FAMILIES, **VARIANTS, **MIXTURES}[name]()


@torch.no_grad()
def _trained(family: str, config: Any, folder: Path) -> Any:
    """A model with an adapter whose every weight is drawn, saved to a folder and still beside the model."""
    adapted = get_peft_model(_family(family), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def _folders(tmp_path: Path, family: str = "llama") -> tuple[Path, Path]:
    """A saved model, and an adapter of it."""
    base = model_folder(tmp_path / "base", family)
    _trained(family, LoraConfig(r=4, target_modules=FF), tmp_path / "lora")
    return base, tmp_path / "lora"


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("kind", slow_but_for(KINDS, {"dora", "embedding beside a tied head", "experts"}))
def test_a_merged_adapter_is_the_adapted_model(kind: str, tmp_path: Path) -> None:
    """Logits are those with the adapter beside the model, for every way of saying what is adapted and how much."""
    family, config = KINDS[kind]
    adapted = _trained(family, config, tmp_path)
    hf, entry = merge(_family(family), str(tmp_path), "base")
    torch.testing.assert_close(_logits(hf), _logits(adapted), rtol=1e-4, atol=1e-4)
    assert float((_logits(hf) - _logits(_family(family))).abs().max()) > 1e-2
    assert entry.kind == config.peft_type.value and entry.path == str(tmp_path.resolve())
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check <= 1e-5


def test_a_merged_adapter_is_compared_with_the_adapted_model(tmp_path: Path, monkeypatch: Any) -> None:
    """Were the weights of a tied head changed with the embedding, it would be another model, which is seen."""
    family, config = KINDS["embedding beside a tied head"]
    _trained(family, config, tmp_path)
    monkeypatch.setattr("mnemoscope.model.adapters._untie", lambda _: None)
    with pytest.raises(ModelNotSupported, match="merged, its logits differ by"):
        merge(_family(family), str(tmp_path), "base")


def test_a_run_knows_its_adapter_and_loads_it_again(tmp_path: Path) -> None:
    """Manifest, cards and verification are of the tuned model; moved or changed, the adapter is asked for."""
    base, lora = _folders(tmp_path)
    model = load_model(base, adapter=lora)
    run = build(model, texts(40), tmp_path / "run", top=5)
    entry = open_run(run.path).manifest.model
    assert entry.id == f"{base} + {lora}" and entry.base == str(base)
    assert entry.adapter is not None and entry.adapter.kind == "LORA" and len(entry.adapter.sha256) == 64
    again = load_built(run)
    assert again.weights_sha256 == model.weights_sha256 != load_model(base).weights_sha256
    assert verify(run, again, sample=20).passed
    assert run["L1N3"].model == entry.id
    moved = lora.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"which was merged into it, is not there.*adapter="):
        load_built(run)
    assert load_built(run, adapter=str(moved)).weights_sha256 == model.weights_sha256


def test_the_command_line_builds_with_an_adapter_and_compares(tmp_path: Path) -> None:
    """What a user types: two runs of a model, without and with, side by side; explain and trace take it as well."""
    base, lora = _folders(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts(40)))
    run = lambda *words: CliRunner().invoke(app, [str(word) for word in words])  # noqa: E731
    for name, options in (("plain", []), ("tuned", ["--adapter", lora])):
        out = tmp_path / name
        done = run("build", base, "--corpus", text, "-o", out, "--top", 5, "--nulls", "none", *options)
        assert done.exit_code == 0, done.output
    page = tmp_path / "compare.html"
    done = run(
        "compare", tmp_path / "plain", tmp_path / "tuned", "--weights", "--html", page, "--only", "glance"
    )
    assert done.exit_code == 0 and page.exists(), done.output
    told = run("explain", base, "the city of", "--adapter", lora, "--json")
    assert json.loads(told.stdout)["model"] == f"{base} + {lora}"
    assert run("verify", tmp_path / "tuned", "--sample", 20).exit_code == 0
    assert str(lora) in run("trace", tmp_path / "tuned", "the city of").stdout


def test_an_explanation_of_a_tuned_model_adds_up(tmp_path: Path) -> None:
    """The log-probability is that of the adapted model."""
    base, lora = _folders(tmp_path)
    told = explain(load_model(base, adapter=lora, dtype="fp32"), "the city of", top=3)
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(lora)).eval()
    tokens = torch.tensor([tokenizer()("the city of")["input_ids"]])
    with torch.no_grad():
        own = adapted(input_ids=tokens).logits[0, -1].log_softmax(-1)[told.target.token]
    assert told.log_probability == pytest.approx(float(own), abs=1e-4)


def test_half_precision_is_merged_in_half_precision(tmp_path: Path) -> None:
    """The merged weights are rounded to the model's dtype, and the model closes."""
    base, lora = _folders(tmp_path)
    model = load_model(base, adapter=lora, dtype="bf16")
    assert model.dtype == "bf16" and model.self_check <= 1e-4


def _without_first(lora: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, lora / "adapter_model.safetensors")


def _with_more(lora: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = tensors[name].clone()
    save_file(tensors, lora / "adapter_model.safetensors")


def _pickled(lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")


def _of_gpt2(lora: Path) -> None:
    shutil.rmtree(lora)
    _trained("gpt2", LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True), lora)


def _prompting(lora: Path) -> None:
    shutil.rmtree(lora)
    _trained("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), lora)


REFUSED = {
    "lacks a tensor": (_without_first, r"the adapter lacks 1 tensors \(the first is .*lora"),
    "holds one more": (_with_more, "holds beside what is read 1 tensors"),
    "pickle": (_pickled, "it has no adapter_model.safetensors.*pickles are not read"),
    "of another family": (_of_gpt2, "give an adapter that was trained beside this model"),
    "prompt tuning": (_prompting, "puts vectors before the prompt that are no tokens"),
    "nowhere": (shutil.rmtree, "no such|it has no adapter_config.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_one_line(kind: str, tmp_path: Path) -> None:
    """What is wrong with it and what to give; nothing is merged by halves."""
    base, lora = _folders(tmp_path)
    spoil, words = REFUSED[kind]
    spoil(lora)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(base, adapter=lora)
    assert "\n" not in str(caught.value)


def test_what_has_no_peft_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    """The library is optional."""
    _, lora = _folders(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'mnemoscope\[adapters\]'"):
        merge(_family("llama"), str(lora), "base")


def test_a_model_in_memory_takes_no_adapter_and_a_folder_of_one_is_no_model(tmp_path: Path) -> None:
    """The one is left as it is; of the other the message says how it is given."""
    base, lora = _folders(tmp_path)
    with pytest.raises(ModelError, match=r"adapter=.*left as it is.*merge_and_unload"):
        load_model(_family("llama"), tokenizer=tokenizer(), adapter=lora)
    with pytest.raises(ModelError, match=r"holds an adapter .*give that model, and this folder as adapter="):
        load_model(lora)
    assert isinstance(load_model(base).hf, nn.Module)
