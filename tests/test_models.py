"""Loading: from a folder, from memory, in a dtype; and what is said when it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny import model_folder, tokenizer
from transformers import BertConfig, BertLMHeadModel

from mnemoscope.errors import ModelError
from mnemoscope.model.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


def test_a_folder_loads_with_its_parts_proven(folder: Path) -> None:
    """The entry says what the model is, and the self-check closes far below its bound."""
    model = load_model(folder, dtype="fp32")
    assert model.self_check < 1e-5
    entry = model.entry()
    assert (entry.family, entry.gated, entry.layers) == ("llama", True, 3)
    assert model.dtype == "fp32"


def test_the_hash_of_weights_does_not_depend_on_the_dtype(folder: Path) -> None:
    """fp32 and bf16 loads of one checkpoint are one model; another checkpoint is another."""
    one, two = load_model(folder, dtype="fp32"), load_model(folder, dtype="bf16")
    assert two.dtype == "bf16"
    assert one.weights_sha256 == two.weights_sha256
    with torch.no_grad():
        next(two.hf.parameters()).mul_(1.1)
    assert one.weights_sha256 != two.weights_sha256


def test_a_loaded_model_is_taken_with_a_tokenizer() -> None:
    """A PreTrainedModel needs no files when the tokenizer is passed beside it."""
    model = load_model(FAMILIES["gpt2"](), tokenizer=tokenizer())
    assert model.anatomy.family == "gpt2"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such-model-anywhere", ["neither in the local cache nor reachable", "local folder"]),
        ("./nothing/here", ["is not a model folder or a .gguf file", "Hugging Face id"]),
        ("missing.gguf", ["there is no file missing.gguf"]),
        ("sample:nothing", ["smollm2-135m"]),
    ],
)
def test_what_cannot_be_found_is_one_clear_line(source: str, words: list[str]) -> None:
    """The line says what was given and what is accepted."""
    with pytest.raises(Exception, match=words[0]) as caught:
        load_model(source)
    message = str(caught.value)
    assert isinstance(caught.value, ModelError) or source.startswith("sample:")
    assert "\n" not in message
    assert all(word in message for word in words)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """The line names the folder and the missing file."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """A config alone is no model."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="must hold config"):
        load_model(tmp_path)


def test_a_damaged_weight_file_is_refused(folder: Path, tmp_path: Path) -> None:
    """A truncated safetensors file is one clear line."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="loading the model"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """Tensors that would be left random are named."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path)


def test_a_checkpoint_is_read_by_the_class_that_it_names(tmp_path: Path) -> None:
    """BERT with the head of a language model has its logits, not those of a body alone or of another head."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert type(load_model(tmp_path).hf) is BertLMHeadModel


@pytest.mark.parametrize(
    ("keywords", "words"), [({"dtype": "int3"}, "int3"), ({"device": "quantum"}, "quantum")]
)
def test_unknown_dtype_and_device_are_refused(folder: Path, keywords: dict[str, str], words: str) -> None:
    """The line names what was given."""
    with pytest.raises(ModelError, match=words):
        load_model(folder, **keywords)


@pytest.mark.slow
def test_products_do_not_depend_on_the_number_of_threads() -> None:
    """One and two threads give the same bits for products of few rows, where MKL would otherwise differ."""
    script = """
import torch, mnemoscope.model
torch.manual_seed(0)
for rows in (5, 64, 100, 130, 257):
    for wide, narrow in ((1536, 576), (576, 576), (576, 192)):
        x, w, found = torch.randn(rows, wide), torch.randn(narrow, wide), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.nn.functional.linear(x, w))
        assert torch.equal(*found), (rows, wide, narrow)
"""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
