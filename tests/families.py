"""Tiny random models of every family, built from configs: nothing is downloaded.

Every floating parameter is drawn at random, norms and biases too, so that a part that is dropped shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 80
WIDTH = 32
LAYERS = 3

_HIDDEN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_GQA = {**_HIDDEN, "num_key_value_heads": 2, "head_dim": 6}
_N = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": WIDTH,
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}
_MPT = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
_GEMMA = {**_GQA, "query_pre_attn_scalar": 6, "sliding_window": 4}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny(model_type: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal language model of a family in fp32 evaluation mode, the same for the same arguments."""
    config = CONFIG_MAPPING[model_type](**{**_SPECIAL, **settings})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Deprecations inside transformers are not ours to mend.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Fill all parameters from the current generator: matrices like 1/sqrt(width), norms around 1, biases 0.3."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        elif "norm" in name.lower() or ".ln_" in name or "ln_f" in name:
            parameter.normal_(0, 0.3).add_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0, 0.3)


# One builder for each row of the table, and variants of the rows that have options.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": partial(tiny, "gpt2", **_N),
    "gpt_neo": partial(
        tiny,
        "gpt_neo",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
    ),
    "gpt_neox": partial(tiny, "gpt_neox", **_HIDDEN),
    "gptj": partial(tiny, "gptj", **_N, rotary_dim=4),
    "codegen": partial(tiny, "codegen", **_N, rotary_dim=4),
    "opt": partial(tiny, "opt", **_OPT),
    "bloom": partial(tiny, "bloom", **_BLOOM),
    "falcon": partial(tiny, "falcon", **_FALCON),
    "mpt": partial(tiny, "mpt", **_MPT),
    "llama": partial(tiny, "llama", **_GQA),
    "mistral": partial(tiny, "mistral", **_GQA, sliding_window=4),
    "qwen2": partial(tiny, "qwen2", **_GQA),
    "qwen3": partial(tiny, "qwen3", **_GQA),
    "gemma": partial(tiny, "gemma", **_GQA),
    "gemma2": partial(tiny, "gemma2", **_GEMMA, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    "gemma3_text": partial(tiny, "gemma3_text", **_GEMMA),
    "phi": partial(tiny, "phi", **_HIDDEN, partial_rotary_factor=0.5),
    "phi3": partial(tiny, "phi3", **_HIDDEN, num_key_value_heads=2, original_max_position_embeddings=64),
    "olmo": partial(tiny, "olmo", **_HIDDEN, clip_qkv=0.8),
    "olmo2": partial(tiny, "olmo2", **_HIDDEN, num_key_value_heads=2),
    "stablelm": partial(tiny, "stablelm", **_HIDDEN, num_key_value_heads=2),
    "starcoder2": partial(tiny, "starcoder2", **_HIDDEN, num_key_value_heads=2),
    "cohere": partial(tiny, "cohere", **_HIDDEN, num_key_value_heads=2, logit_scale=0.25),
    "granite": partial(
        tiny,
        "granite",
        **_HIDDEN,
        num_key_value_heads=2,
        embedding_multiplier=6.0,
        residual_multiplier=0.3,
        attention_multiplier=0.1,
        logits_scaling=4.0,
    ),
    "smollm3": partial(tiny, "smollm3", **_HIDDEN, num_key_value_heads=2),
}
