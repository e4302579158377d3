"""A tiny random model of every entry of transformers' causal, masked and sequence-to-sequence mappings.

Sizes are put in wherever the default config of a model type has a field of that name, also inside configs of its text,
images or sound; what a family wants beyond that stands in `OVERRIDES`. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from families import randomise
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.check import examine
from mnemoscope.model.table import REFUSED, Outcome

TASKS: dict[str, tuple[Any, Any]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
ENTRIES = tuple((task, model_type) for task, (_, types) in TASKS.items() for model_type in types)
# Models that also read images, which are no entries of those mappings.
TASKS["composite"] = (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LARGEST = 8_000_000  # parameters

_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth"
)
_WIDTH = "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size"
_HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_key_value_heads"
)
_FFN = "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim dff dim_ff inner_dim"
SIZES: dict[str, int] = (
    dict.fromkeys(_LAYERS.split(), 2)
    | dict.fromkeys(_WIDTH.split(), 32)
    | dict.fromkeys(_HEADS.split(), 4)
    | dict.fromkeys(_FFN.split(), 40)
    | {
        "vocab_size": 80,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 40,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_num_experts": 4,
        "num_experts_per_tok": 2,
        "num_experts_per_token": 2,
        "moe_topk": 2,
        "top_k_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_k": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "o_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "index_topk": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 80,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_d_state": 8,
        "ssm_state_size": 8,
        "state_size": 8,
        "entity_vocab_size": 20,
        "sliding_window": 8,
        "head_dim": 8,
        "d_kv": 8,
        "max_position_embeddings": 64,
        "n_positions": 64,
        "n_ctx": 64,
        "max_seq_len": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)

_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention shares no heads
_HYBRID = ["mamba", "attention"]
_DELTA = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {**_LATENT, **_DELTA}
_LLAMA4 = {"moe_layers": [1], "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}}
_CODEGEN = {"rotary_dim": 4}

_COMPASS = {
    "rope_parameters": {"full_attention": _MROPE["rope_parameters"]},
    "layer_types": ["full_attention"] * 2,
}

_BERT = {
    "model_type": "bert",
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}

# What a family wants beyond small sizes: widths that must agree, or lists with an entry for each layer.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LINEAR, "linear_num_heads": 4, "linear_head_dim": 8},
    "beam": {"head_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "codegen": _CODEGEN,
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 0.5},
        "ffn_config": {"ffn_hidden_size": 40, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "dots3_note": {
        "text_config": {**_LATENT, "per_layer_config": {}, "layer_types": ["full_attention"] * 2},
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "per_layer_config": {},
            "mlp_layer_types": ["dense"] * 2,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _LATENT,
    "encoder-decoder": {
        "encoder": _BERT,
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "esm": {"vocab_size": 80, "pad_token_id": 1, "mask_token_id": 3},
    "esmc": _LATENT,
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "embedding_multiplier": 5.7,
        "lm_head_multiplier": 0.4,
        "attention_out_multiplier": 0.9,
        "ssm_out_multiplier": 0.7,
        "mlp_multipliers": [0.8, 0.6],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "layer_types": ["full_attention"] * 2,
            "num_hidden_layers": 2,
        }
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 20, "patch_size": 4}
    },
    "gemma4_unified_assistant": {
        "text_config": {
            "model_type": "gemma4_unified_text",
            "layer_types": ["full_attention"] * 2,
            "num_hidden_layers": 2,
        }
    },
    "granite_speech": {
        "encoder_config": {"hidden_dim": 32, "num_layers": 1, "dim_head": 8, "output_dim": 8, "input_dim": 16}
    },
    "granite_speech_plus": {
        "encoder_config": {"hidden_dim": 32, "num_layers": 1, "dim_head": 8, "output_dim": 8, "input_dim": 16}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": _CODEGEN,
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hyperclovax": {"use_post_norm": True, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {**_LINEAR, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm3": {
        "layer_types": ["conv", "full_attention"],
        "use_attention_gate": True,
        "use_sandwich_norm": True,
    },
    "mllama": {"text_config": {"cross_attention_layers": [1], "num_hidden_layers": 3}},
    "llama4_text": _LLAMA4,
    "llama4": {"text_config": _LLAMA4},
    "composite llama4": {
        "text_config": _LLAMA4,
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    **{name: {"text_config": _MROPE} for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "cosmos3_edge")},
    **{name: {"text_config": _LATENT} for name in ("kimi_k25", "mistral_large4", "unlimited_ocr")},
    **{name: {"text_config": _DELTA} for name in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")},
    **{
        name: {"text_config": _MROPE, "vision_config": {"out_hidden_size": 32}}
        for name in ("glm4v", "glm46v", "granite_docling")
    },
    **{
        name: {"text_config": _HALF_MROPE, "vision_config": {"out_hidden_size": 32}}
        for name in ("glm4v_moe", "glm_ocr", "glmga")
    },
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": _LATENT,
    **dict.fromkeys(("axk1", "glm4_moe_lite", "glm_moe_dsa", "hy_v4"), _LATENT),
    "ministral": {"head_dim": 8},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "num_hidden_layers": 4,
        "n_groups": 2,
        "expand": 2,
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "d_latents": 32,
        "d_model": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 32,
        "v_channels": 32,
    },
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    **{name: {"text_config": _DELTA} for name in ("qwen3_5", "qwen3_5_moe")},
    "olmo_hybrid": _DELTA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "masked reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlm": {"n_words": 80, "emb_dim": 32},
    "flaubert": {"n_words": 80, "emb_dim": 32},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
        "semantic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
    },
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def _small(config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for a tiny config of the kind of a default one."""
    default = config.to_dict()
    names = set(default) | set(config.attribute_map)
    small = {
        name: size
        for name, size in SIZES.items()
        if name in names and name not in config.attribute_map and default.get(name) is not None
    }
    for name, kind in config.sub_configs.items():
        inner = getattr(config, name, None)
        if inner is None and isinstance(kind, type) and kind is not PreTrainedConfig and name in names:
            try:
                inner = kind()
            except Exception:  # of which it says nothing until it is needed
                continue
        if isinstance(inner, PreTrainedConfig):
            small[name] = {"model_type": inner.model_type} | _small(inner, {})
    return _merged(small, given)


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(a)
    for name, value in b.items():
        old = merged.get(name)
        merged[name] = (
            _merged(old, value)
            if isinstance(old, dict) and isinstance(value, dict) and name.endswith("config")
            else value
        )
    return merged


def tiny_config(model_type: str, task: str = "causal") -> PreTrainedConfig:
    """A config of two layers and 32 dimensions."""
    kind = CONFIG_MAPPING[model_type]
    given = OVERRIDES.get(f"{task} {model_type}", OVERRIDES.get(model_type, {}))
    try:
        default = kind()
    except Exception:  # a default that its own class refuses
        default = kind(**given)
    return kind(**_small(default, given))


def tiny(model_type: str, task: str = "causal", *, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32 and evaluation mode, the same for the same arguments; all its parameters are drawn."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = tiny_config(model_type, task)
        auto = TASKS[task][0]
        with torch.device("meta"):
            size = sum(weight.numel() for weight in auto.from_config(copy.deepcopy(config)).parameters())
        assert size <= LARGEST, f"{model_type}: {size} parameters"
        model = auto.from_config(config, dtype=torch.float32)
        randomise(model)
    return model.eval()


def outcome(task: str, model_type: str) -> Outcome:
    """What the self-check says of a tiny model; where transformers cannot build one, its own reason."""
    try:
        model = tiny(model_type, task)
    except Exception as error:
        if model_type in REFUSED:  # which needs no model to be true
            return Outcome(model_type, task, None, REFUSED[model_type])
        reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        return Outcome(model_type, task, None, f"transformers builds none by itself ({reason})")
    try:
        return Outcome(model_type, task, examine(model)[1], None)
    except ModelNotSupported as error:
        return Outcome(model_type, task, None, _reason(str(error)))


def _reason(message: str) -> str:
    """A refusal without the name of the family and the advice."""
    said = re.sub(r"^(reading|checking|running).*? '[a-z0-9_.-]+' model[^:]*: ", "", message)
    said = re.split(r"; (decoders with one|the family has no row)", said)[0]
    return re.sub(
        r" by [0-9.e-]+ relative \(limit [0-9.e-]+\)", "", said
    )  # which is the random weights' affair
