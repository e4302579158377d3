"""Tiny random models of every family, built from configs: nothing is downloaded.

Every floating parameter is drawn at random, norms and biases too, so that a part that is dropped shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import pytest
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


def dense_between_experts() -> PreTrainedModel:
    """Three layers: a dense one between two of four experts and a shared one."""
    return tiny(
        "qwen2_moe", vocab_size=80, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, intermediate_size=16,
        shared_expert_intermediate_size=12, mlp_only_layers=[1], max_position_embeddings=64,
    )  # fmt: skip


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw all parameters: matrices like 1/sqrt(width), norm weights around 1, biases around 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        elif "norm" in name.lower() or ".ln_" in name or "ln_f" in name:
            parameter.normal_(0, 0.3).add_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0, 0.3)
    for name, buffer in model.named_buffers():
        if "logits_bias" in name:
            buffer.normal_(0, 0.3)
        if "scalar" in name:  # of the residual stream
            buffer.uniform_(0.5, 1.5)


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

# The same rows with their options turned.
VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2_scaled_by_layer": partial(
        tiny, "gpt2", **_N, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
    "gpt_neox_sequential": partial(tiny, "gpt_neox", **_HIDDEN, use_parallel_residual=False),
    "opt_no_bias": partial(tiny, "opt", **_OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt_no_final_norm": partial(tiny, "opt", **_OPT, _remove_final_layer_norm=True),
    "opt_gelu": partial(tiny, "opt", **_OPT, activation_function="gelu"),
    "falcon_old": partial(tiny, "falcon", **_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "falcon_multi_query": partial(tiny, "falcon", **_FALCON, multi_query=True, parallel_attn=True, bias=True),
    "falcon_rw_alibi": partial(
        tiny, "falcon", **_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon_new": partial(tiny, "falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_new_one_norm": partial(
        tiny,
        "falcon",
        **_FALCON,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
    ),
    "llama_biases": partial(tiny, "llama", **_GQA, attention_bias=True, mlp_bias=True),
    "llama_multi_query": partial(tiny, "llama", **_HIDDEN, num_key_value_heads=1),
    "llama_tied": partial(tiny, "llama", **_GQA, tie_word_embeddings=True),
    "qwen2_sliding": partial(
        tiny, "qwen2", **_GQA, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "gemma2_no_caps": partial(
        tiny, "gemma2", **_GEMMA, final_logit_softcapping=None, attn_logit_softcapping=None
    ),
    "phi_qk_norm": partial(tiny, "phi", **_HIDDEN, qk_layernorm=True, num_key_value_heads=2),
    "phi3_sliding": partial(
        tiny, "phi3", **_HIDDEN, num_key_value_heads=2, original_max_position_embeddings=64, sliding_window=4
    ),
    "stablelm_parallel_qk_norm": partial(
        tiny,
        "stablelm",
        **_HIDDEN,
        num_key_value_heads=2,
        use_parallel_residual=True,
        qk_layernorm=True,
        use_qkv_bias=True,
    ),
    "cohere_qk_norm": partial(tiny, "cohere", **_HIDDEN, num_key_value_heads=2, use_qk_norm=True),
    "granite_biases": partial(
        tiny,
        "granite",
        **_HIDDEN,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=6.0,
        residual_multiplier=0.3,
        logits_scaling=4.0,
    ),
    "mpt_clipped": partial(tiny, "mpt", **_MPT, attn_config={"clip_qkv": 0.5}),
    "starcoder2_sliding": partial(tiny, "starcoder2", **_HIDDEN, num_key_value_heads=2, sliding_window=4),
}

# Decoders without a row, which the generic rule reads.
GENERIC: dict[str, Callable[[], PreTrainedModel]] = {
    "arcee": partial(tiny, "arcee", **_GQA),
    "cohere2": partial(tiny, "cohere2", **_GQA),
    "ernie4_5": partial(tiny, "ernie4_5", **_GQA),
    "exaone4": partial(tiny, "exaone4", **_GQA),
    "glm": partial(tiny, "glm", **_GQA),
    "glm4": partial(tiny, "glm4", **_GQA),
    "gpt_bigcode": partial(tiny, "gpt_bigcode", **_N),
    "helium": partial(tiny, "helium", **{**_GQA, "head_dim": 8}),
    "hunyuan_v1_dense": partial(tiny, "hunyuan_v1_dense", **_GQA),
    "ministral": partial(tiny, "ministral", **_GQA),
    "nemotron": partial(tiny, "nemotron", **_GQA),
    "olmo3": partial(tiny, "olmo3", **_HIDDEN, num_key_value_heads=2),
    "persimmon": partial(tiny, "persimmon", **_HIDDEN),
    "seed_oss": partial(tiny, "seed_oss", **_GQA),
    "vaultgemma": partial(tiny, "vaultgemma", **_GQA),
    "xglm": partial(
        tiny, "xglm", vocab_size=VOCABULARY, d_model=WIDTH, ffn_dim=40, num_layers=LAYERS, attention_heads=4
    ),
}

# One for each way of reading a block; with these the others' rows are tried one by one in the slow tests.
DISTINCT = frozenset(
    {"gpt2", "gpt_neox", "opt", "falcon", "llama", "gemma2", "phi3", "olmo2", "cohere", "granite"}
)


def slow_but_for(names: Iterable[str], quick: Container[str] = DISTINCT) -> list[Any]:
    """Parameters of a test over names, slow where the name is not one of the quick ones."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


_MIXTURE = {**_HIDDEN, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_LOCAL = {**_MIXTURE, "num_local_experts": 4}
_COUNTED = {**_MIXTURE, "num_experts": 4}
_NARROW = {**_COUNTED, "moe_intermediate_size": 24}
_GROUPED = {
    **_MIXTURE,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 24,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GRANITE = {
    **_LOCAL,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.1,
    "logits_scaling": 4.0,
}

# Mixtures of experts: routed, shared, gated per token, with biases, with factors outside the router.
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": partial(tiny, "mixtral", **_LOCAL),
    "qwen2_moe": partial(tiny, "qwen2_moe", **_NARROW, shared_expert_intermediate_size=28),
    "qwen3_moe": partial(tiny, "qwen3_moe", **_NARROW, head_dim=6),
    "gpt_oss": partial(
        tiny,
        "gpt_oss",
        **_LOCAL,
        head_dim=8,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v2": partial(tiny, "deepseek_v2", **{**_GROUPED, **_LATENT}),
    "deepseek_v3": partial(tiny, "deepseek_v3", **{**_GROUPED, **_LATENT}),
    "glm4_moe": partial(tiny, "glm4_moe", **_GROUPED),
    "olmoe": partial(tiny, "olmoe", **_COUNTED),
    "granitemoe": partial(tiny, "granitemoe", **_GRANITE),
    "granitemoeshared": partial(tiny, "granitemoeshared", **_GRANITE, shared_intermediate_size=28),
    "cohere2_moe": partial(tiny, "cohere2_moe", **_COUNTED, head_dim=8),
}
