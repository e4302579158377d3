"""Every refusal is read against the code of transformers: the lines that make its reason true must still be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from mnemoscope.model.table import Outcome, outcomes

# What the modelling code of each refused family says, whose reason is then true; with another version of transformers
# a line that is gone has to be read again.
BECAUSE: dict[str, tuple[str, ...]] = {
    "axk2": (r"y \* torch\.sigmoid\(self\.mlp\(y\)",),
    "big_bird": (r'self\.set_attention_type\("original_full"\)', r"_pad_to_block_size"),
    "bigbird_pegasus": (r'self\.set_attention_type\("original_full"\)',),
    "blt": (r"class BltPatcher", r"class BltLocalEncoder", r"class BltGlobalTransformer"),
    "convbert": (r"SeparableConv1D", r"self\.unfold|nn\.functional\.unfold"),
    "cpmant": (
        r"self\.prompt_length \* 2 \+ self\.vocab_size",
        r"hidden_states\[:, self\.prompt_length :, :\]",
    ),
    "deepseek_v4": (r"class DeepseekV4HyperConnection",),
    "falcon_mamba": (r"class FalconMambaBlock", r"hidden_states = residual \+ hidden_states"),
    "fnet": (r"torch\.fft\.fftn, dim=\(1, 2\)",),
    "fsmt": (r"shape \*\(seq_len, batch, embed_dim\)\*",),
    "funnel": (r"pool_tensor",),
    "gemma3n": (r"altup_num_inputs",),
    "gemma3n_text": (r"altup_num_inputs",),
    "gemma4_assistant": (r"shared_kv_states",),
    "gemma4_unified_assistant": (r"shared_kv_states",),
    "hrm_text": (r"for high_cycle_idx in range\(self\.config\.H_cycles\)", r"self\.L_module\("),
    "hy_v4": (r"class HYV4HyperConnection",),
    "ibert": (r"hidden_states_scaling_factor",),
    "inkling2_text": (r"class Inkling2BlockAttentionResidual",),
    "inkling_text": (r"self\.attn_sconv\(hidden_states", r"self\.mlp_sconv\(hidden_states"),
    "led": (r"_pad_to_window_size",),
    "longcat_flash": (r"for i in \[0, 1\]", r"shortcut_mlp_output"),
    "longformer": (r"_pad_to_window_size",),
    "mamba": (r"class MambaBlock", r"hidden_states = residual \+ hidden_states"),
    "mamba2": (r"class Mamba2Block", r"hidden_states = residual \+ hidden_states"),
    "minimax": (r"hidden_states = self\.input_layernorm\(hidden_states\)\n\s+residual = hidden_states",),
    "minimax_m3_vl_text": (r"gate\.clamp\(max=self\.swiglu_limit\)", r"\(up \+ 1\.0\) \* glu"),
    "mobilebert": (r"self\.bottleneck = Bottleneck\(config\)", r"for ffn_module in self\.ffn"),
    "mra": (r"if mra_cuda_kernel is None:\n\s+return torch\.zeros_like\(query\)",),
    "musicgen": (r"self\.embed_tokens = nn\.ModuleList", r"self\.lm_heads = nn\.ModuleList"),
    "musicgen_melody": (r"self\.embed_tokens = nn\.ModuleList", r"self\.lm_heads = nn\.ModuleList"),
    "neomme": (r"self\.lambdas\[1\] \* initial_hidden_states",),
    "nllb-moe": (
        r"return top_1_mask, router_probs",
        r"one_hot\(router_mask, num_classes=self\.num_experts\)",
    ),
    "nystromformer": (r"context_layer \+= self\.conv\(value_layer\)",),
    "pegasus_x": (r"global_hidden_states",),
    "perceiver": (r"self\.latents", r"num_latents"),
    "prophetnet": (r"ngram_embeddings", r"self\.ngram"),
    "qwen4_exp": (r"class Qwen4ExpTextGatedResidual",),
    "qwen4_exp_text": (r"class Qwen4ExpTextGatedResidual",),
    "reformer": (r"class _ReversibleFunction",),
    "rwkv": (r"return receptance \* value, state",),
    "squeezebert": (r"nn\.Conv1d\(in_channels=cin", r"groups="),
    "t5gemma2": (r"class T5Gemma2MergedAttention",),
    "voxtral_realtime": (r"hidden_states \* \(1 \+ self\.ada_rms_norm\(t_cond\)\)",),
    "xlnet": (r"self\.o = nn\.Parameter", r"torch\.einsum"),
    "xmod": (r"self\.adapter_modules\[str\(language\)\] = XmodAdapter",),
    "yoso": (r"attention_mask = 1\.0 \+ attention_mask / 10000\.0",),
    "zamba": (
        r"transformer_hidden_states = self\.linear\(transformer_hidden_states\)",
        r"hidden_states \+ transformer_hidden_states",
    ),
    "zamba2": (
        r"transformer_hidden_states = self\.linear\(transformer_hidden_states\)",
        r"hidden_states \+ transformer_hidden_states",
    ),
}
BUILT = {"nemo_speechlm"}  # whose reason is transformers' own, as it builds none

REFUSED = [row for row in outcomes() if row.reason is not None]


def code_of(family: str) -> str:
    """The modelling code of a family, which is not run."""
    name = model_type_to_module_name(family)
    return (Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.task} {row.family}")
def test_the_code_is_what_the_reason_says(row: Outcome) -> None:
    """Each line is in the modelling code of the family."""
    if row.family in BUILT:
        return
    code = code_of(row.family)
    for line in BECAUSE[row.family]:
        assert re.search(line, code), f"{row.family}: {row.reason}"


def test_no_line_is_of_a_family_that_closes() -> None:
    """Every family that lines are given of is refused, and of every other they are given."""
    assert {row.family for row in REFUSED} - BUILT == set(BECAUSE)
