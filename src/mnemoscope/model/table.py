"""The table: one row of facts for each family, and the pieces the rows are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class FeedForward(NamedTuple):
    """Paths inside a block; ``up`` is None for a plain FFN, and equals ``gate`` where they are fused."""

    down: str
    gate: str
    up: str | None = None


class Norms(NamedTuple):
    """Paths inside a block of the norms before attention and FFN, of those after them (G4), and of those that the
    residual stream itself goes through: in the middle of the block, behind attention, and at its end.
    """

    input: str | None
    ffn: str | None
    post_attention: str | None = None
    post_ffn: str | None = None
    middle: str | None = None
    end: str | None = None


_GATED = FeedForward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_FUSED = FeedForward("mlp.down_proj", "mlp.gate_up_proj", "mlp.gate_up_proj")
_C_FC = FeedForward("mlp.c_proj", "mlp.c_fc")
_FC_IN = FeedForward("mlp.fc_out", "mlp.fc_in")
_4H = FeedForward("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
_FC1 = FeedForward("fc2", "fc1")
_MLP_FC1 = FeedForward("mlp.fc2", "mlp.fc1")
_UP_DOWN = FeedForward("mlp.down_proj", "mlp.up_proj")
_FFN_UP_DOWN = FeedForward("ffn.down_proj", "ffn.up_proj")

_LN_12 = Norms("ln_1", "ln_2")
_LN_1 = Norms("ln_1", "ln_1")
_NORM_12 = Norms("norm_1", "norm_2")
_PRE = Norms("input_layernorm", "post_attention_layernorm")
_SHARED = Norms("input_layernorm", "input_layernorm")
_TWO = Norms("ln_attn", "ln_mlp")
_OPT = Norms("self_attn_layer_norm", "final_layer_norm")
_VAULT = Norms("input_layernorm", "pre_feedforward_layernorm")
_POST = Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH = Norms(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
_PERI = Norms("input_layernorm", "post_attention_layernorm", "post_norm1", "post_norm2")
_GLM4 = Norms("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


class Crossing(NamedTuple):
    """Paths inside a block of the output projection of its cross attention, of the norms around that (before it, after
    it, and the one that the stream itself goes through behind it), and of what reads the stream and mixes.
    """

    out: str
    input: str | None = None
    post: str | None = None
    middle: str | None = None
    attention: str | None = None  # by default what holds the output projection

    @property
    def norms(self) -> tuple[str | None, ...]:
        """The paths of its norms."""
        return self.input, self.post, self.middle


class Gate(NamedTuple):
    """What the mixed heads are multiplied with before the output projection: a function of what a module returns, or
    what an RMS norm of them all does (without a function).
    """

    path: str
    function: str | None = None  # of torch.nn.functional
    bias: str | None = (
        None  # path of a parameter with one number for each head, added to what the module returns
    )


def _bf16(number: float) -> float:
    """A number as a buffer in bf16 holds it: eight significant bits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


class Factors(NamedTuple):
    """What a block multiplies beside what its config says of all blocks: what it passes on of the stream as its
    attention and as its FFN is added, what these write, what a mixer beside the attention writes (relative to the
    attention's factor), and what goes into the activation; and what it adds to the stream with its attention and with
    its FFN, whatever they write. Those of the stream and of what is added to it may have a number for each channel.
    """

    keep_attention: Any = 1.0
    attention: Any = 1.0
    keep_ffn: Any = 1.0
    ffn: Any = 1.0
    mixer: float = 1.0
    gate: float = 1.0
    attention_shift: Any = None
    ffn_shift: Any = None


PLAIN = Factors()


def _scalar(block: Any) -> Factors:
    """Gemma 4: the whole stream is multiplied at the end of a block."""
    scalar = float(block.layer_scalar)
    return Factors(keep_ffn=scalar, ffn=scalar)


def _doge(block: Any) -> Factors:
    kept = (block.input_residual, block.post_attention_residual)
    return Factors(keep_attention=kept[0].detach().float(), keep_ffn=kept[1].detach().float())


def _zaya(block: Any) -> Factors:
    def read(scaling: Any) -> tuple[Any, Any, Any]:
        names = ("residual_scale", "hidden_states_scale", "residual_bias", "hidden_states_bias")
        kept, written, before, beside = (getattr(scaling, name).detach().float() for name in names)
        return kept, written, kept * before + written * beside

    kept, written, shift = read(block.post_attention_residual_scale)
    kept_ffn, written_ffn, shift_ffn = read(block.post_mlp_residual_scale)
    return Factors(kept, written, kept_ffn, written_ffn, attention_shift=shift, ffn_shift=shift_ffn)


def _by_depth(block: Any) -> Factors:
    """Beam: the n-th part makes 1/n of the variance of the stream."""
    first, second = block.attn_residual_add_idx, block.mlp_residual_add_idx
    return Factors((1 - 1 / first) ** 0.5, first**-0.5, (1 - 1 / second) ** 0.5, second**-0.5)


def _falcon_h1(block: Any) -> Factors:
    attention, ffn = block.attn_out_multiplier, block.feed_forward
    return Factors(
        attention=attention,
        ffn=ffn.down_multiplier,
        mixer=block.ssm_out_multiplier / attention,
        gate=ffn.gate_multiplier,
    )


class Beside(NamedTuple):
    """The norms of experts that run beside a dense FFN, in a block that has any: of what they read, of what they write,
    and of what the dense FFN writes, before the norm of the sum."""

    read: str
    written: str
    shared_written: str


OPAQUE = ""  # heads of an attention that is no one product of weights and values are not told apart


Number = str | Callable[[Any], Any] | None  # a field of the config, or what is computed from several


class Family(NamedTuple):
    """One row: paths inside a block, paths inside the body, and the config fields that matter.

    ``norms`` lists alternatives; the one that uses exactly the norms a block has is taken. A field is named
    only where the family's code reads it; ``refused`` lists (field, the value that is handled, why).
    """

    attention_out: str  # OPAQUE: its attention is one of `mixers`
    ffn: FeedForward
    norms: tuple[Norms, ...]
    blocks: str = "layers"
    final_norm: str | None = "norm"
    embedding_norm: str | None = None
    embedding_map: str | None = None  # to the width of the blocks, where that is another
    parallel: str | None = None
    embedding_multiplier: Number = None
    embedding_factor: str | None = None  # of the body: a parameter with a number for each channel
    residual_multiplier: Number = None
    logit_multiplier: Number = None
    logit_divisor: Number = None
    softcap: str | None = None
    mixers: tuple[
        str, ...
    ] = ()  # paths of what mixes tokens without attention weights; a block has one or none
    gate: Gate | None = None
    sink: bool = False  # some attention goes to nothing, by a factor after the weights
    factors: Callable[[Any], Factors] | None = None  # of a block
    outer_bias: str | None = (
        None  # of a parameter that a block adds to what its attention output projection writes
    )
    inner_norm: str | None = None  # of all coefficients together, before the down projection
    latent: tuple[str, str] | None = None  # of the linear modules before and after the experts, beside these
    beside: Beside | None = None
    halves: bool = False  # a block is an attention, a mixer or an FFN, whose norms are listed first and last
    extra: str | None = None  # the path of what writes one more part after the FFN
    images: str | None = None  # in the blocks with this part text alone does not go through
    activation: str | None = None  # where the code and not the config says it
    norms_before: str | None = (
        None  # the field without which norms before parts are those of the stream behind them
    )
    bands: str | None = None  # the field that says where the bands of an adaptive softmax end
    attention: str | None = (
        None  # what reads the residual and mixes; by default what holds the output projection
    )
    inner: str | None = None  # of a group of blocks: the block, used again and again
    lists: tuple[str, ...] = ()  # of the body: a block is the n-th module of each, run in this order
    first_position: Number = None  # of the first token, where positions below it are never used
    cross: Crossing | None = None  # in the decoder of an encoder-decoder
    unused: tuple[str | None, ...] = ()  # norms of a block that its stream does not go through
    plain: FeedForward | None = None  # its FFN where the config says that this is not gated (is_gated_act)
    heads: str = "num_attention_heads"  # the field that says how many
    bidirectional: bool = False  # unless the config makes a decoder of it (is_decoder)
    refused: tuple[tuple[str, Any, str], ...] = ()


_LLAMA = Family("self_attn.o_proj", _GATED, (_PRE,))
_GPT2 = Family("attn.c_proj", _C_FC, (_LN_12,), blocks="h", final_norm="ln_f")

_GRANITE = _LLAMA._replace(
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)
_GEMMA4 = _LLAMA._replace(
    norms=(_SANDWICH,),
    softcap="final_logit_softcapping",
    factors=_scalar,
    extra="post_per_layer_input_norm",
    beside=Beside(
        "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm_1"
    ),
)
_GATED_HEADS = _LLAMA._replace(gate=Gate("self_attn.g_proj", "sigmoid"))
_LFM2 = Family(
    "self_attn.out_proj",
    FeedForward("feed_forward.w2", "feed_forward.w1", "feed_forward.w3"),
    (Norms("operator_norm", "ffn_norm"),),
    final_norm="embedding_norm",
    mixers=("conv",),
    activation="silu",
)
_QWEN3_NEXT = _LLAMA._replace(mixers=("linear_attn",), gate=Gate("self_attn.q_proj", "sigmoid"))
_BAMBA = Family(
    "self_attn.o_proj",
    FeedForward("feed_forward.down_proj", "feed_forward.gate_proj", "feed_forward.up_proj"),
    (Norms("input_layernorm", "pre_ff_layernorm"),),
    final_norm="final_layernorm",
    mixers=("mamba",),
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "openai-gpt": _GPT2._replace(norms=(Norms(None, None, middle="ln_1", end="ln_2"),), final_norm=None),
    "gpt_neo": _GPT2._replace(attention_out="attn.attention.out_proj"),
    "gptj": _GPT2._replace(attention_out="attn.out_proj", ffn=_FC_IN, norms=(_LN_1,)),
    "codegen": _GPT2._replace(attention_out="attn.out_proj", ffn=_FC_IN, norms=(_LN_1,)),
    "gpt_neox": Family(
        "attention.dense", _4H, (_PRE,), final_norm="final_layer_norm", parallel="use_parallel_residual"
    ),
    "gpt_neox_japanese": Family(
        "attention.dense",
        _4H,
        (_PRE,),
        final_norm="final_layer_norm",
        outer_bias="attention.dense_bias",
    ),
    "opt": Family(
        "self_attn.out_proj",
        _FC1,
        (_OPT,),
        final_norm="final_layer_norm",
        norms_before="do_layer_norm_before",
    ),
    "bloom": Family(
        "self_attention.dense",
        _4H,
        (_PRE,),
        blocks="h",
        final_norm="ln_f",
        embedding_norm="word_embeddings_layernorm",
        refused=(
            ("apply_residual_connection_post_layernorm", False, "its residual is taken after the norm"),
            ("slow_but_exact", False, "it computes its projections in slices"),
        ),
    ),
    "falcon": Family(
        "self_attention.dense",
        _4H,
        (_TWO, _PRE, _SHARED),
        blocks="h",
        final_norm="ln_f",
        parallel="parallel_attn",
    ),
    "mpt": Family("attn.out_proj", _FFN_UP_DOWN, (_NORM_12,), blocks="blocks", final_norm="norm_f"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA._replace(norms=(_SANDWICH,), softcap="final_logit_softcapping"),
    "gemma3_text": _LLAMA._replace(norms=(_SANDWICH,), softcap="final_logit_softcapping"),
    "phi": Family("self_attn.dense", _MLP_FC1, (_SHARED,), final_norm="final_layernorm"),
    "phi3": _LLAMA._replace(ffn=_FUSED),
    "olmo": _LLAMA,
    "olmo2": _LLAMA._replace(norms=(_POST,)),
    "stablelm": _LLAMA._replace(norms=(_PRE, _SHARED), parallel="use_parallel_residual"),
    "starcoder2": _LLAMA._replace(ffn=_C_FC),
    "cohere": _LLAMA._replace(norms=(_SHARED,), logit_multiplier="logit_scale"),
    "granite": _GRANITE,
    "smollm3": _LLAMA,
    "hyperclovax": _LLAMA._replace(
        norms=(_PERI, _PRE),
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logit_multiplier="logits_scaling",
    ),
    "minicpm3": _LLAMA._replace(
        residual_multiplier=lambda config: config.scale_depth / config.num_hidden_layers**0.5,
        logit_divisor=lambda config: config.hidden_size / config.dim_model_base,
    ),
    "nanochat": _LLAMA._replace(
        ffn=FeedForward("mlp.fc2", "mlp.fc1"), embedding_norm="norm", softcap="final_logit_softcapping"
    ),
    "ctrl": Family(
        "multi_head_attention.dense",
        FeedForward("ffn.2", "ffn.0"),
        (Norms("layernorm1", "layernorm2"),),
        blocks="h",
        final_norm="layernorm",
        embedding_multiplier=lambda config: config.n_embd**0.5,
        activation="relu",
    ),
    "diffllama": _LLAMA._replace(attention_out=OPAQUE, mixers=("self_attn",)),
    "moshi": _LLAMA._replace(
        attention_out="self_attn.o_proj.linear",
        ffn=FeedForward("mlp.fc2", "mlp.fc1", "mlp.fc1"),
        attention="self_attn",
    ),
    "xlstm": Family(
        OPAQUE,
        FeedForward("ffn.proj_down", "ffn.proj_up_gate", "ffn.proj_up"),
        (Norms("norm_mlstm", "norm_ffn"),),
        blocks="blocks",
        final_norm="out_norm",
        softcap="output_logit_soft_cap",
        mixers=("mlstm_layer",),
        heads="num_heads",
        activation="silu",
        refused=(("weight_mode", "single", "it keeps the weights of each layer in one matrix"),),
    ),
    "jetmoe": _LLAMA._replace(attention_out=OPAQUE, mixers=("self_attention",)),
    "doge": _LLAMA._replace(
        factors=_doge, refused=(("is_moe", False, "its experts are single rows of an embedding"),)
    ),
    "zaya": _LLAMA._replace(factors=_zaya, embedding_factor="input_hidden_states_scale"),
    "bitnet": _LLAMA._replace(gate=Gate("self_attn.attn_sub_norm"), inner_norm="mlp.ffn_sub_norm"),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "bamba": _BAMBA,
    "jamba": _BAMBA,
    "granitemoehybrid": _GRANITE._replace(
        ffn=FeedForward("shared_mlp.output_linear", "shared_mlp.input_linear", "shared_mlp.input_linear"),
        mixers=("mamba",),
    ),
    "olmo_hybrid": _LLAMA._replace(norms=(_POST, _PRE), mixers=("linear_attn",)),
    "recurrent_gemma": Family(
        "temporal_block.o_proj",
        FeedForward("mlp_block.down_proj", "mlp_block.gate_proj", "mlp_block.up_proj"),
        (Norms("temporal_pre_norm", "channel_pre_norm"),),
        final_norm="final_norm",
        embedding_multiplier=lambda config: _bf16(config.hidden_size**0.5),
        softcap="logits_soft_cap",
        mixers=("temporal_block",),
    ),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    "beam": _LLAMA._replace(
        norms=(_SANDWICH,),
        gate=Gate("self_attn.gate_proj", "sigmoid", "self_attn.gate_bias"),
        factors=_by_depth,
        softcap="final_logit_softcapping",
    ),
    "falcon_h1": _BAMBA._replace(
        embedding_multiplier="embedding_multiplier",
        logit_multiplier="lm_head_multiplier",
        factors=_falcon_h1,
        refused=(("attention_in_multiplier", 1.0, "it multiplies what its attention reads"),),
    ),
    "nemotron_h": Family(
        "mixer.o_proj",
        FeedForward("mixer.down_proj", "mixer.up_proj"),
        (Norms("norm", None), Norms(None, "norm")),
        final_norm="norm_f",
        mixers=("mixer",),
        halves=True,
        latent=("fc1_latent_proj", "fc2_latent_proj"),
        activation="relu2",
    ),
    "dbrx": _LLAMA._replace(
        attention_out="norm_attn_norm.attn.out_proj",
        norms=(Norms("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),),
        blocks="blocks",
        final_norm="norm_f",
    ),
    "llama4_text": _LLAMA._replace(
        ffn=FeedForward("feed_forward.down_proj", "feed_forward.gate_proj", "feed_forward.up_proj")
    ),
    "apertus": _LLAMA._replace(
        ffn=FeedForward("mlp.down_proj", "mlp.up_proj"),
        norms=(Norms("attention_layernorm", "feedforward_layernorm"),),
    ),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), _GRANITE._replace(sink=True)),
    "mllama_text_model": _LLAMA._replace(images="cross_attn"),
    "lfm3": _LFM2._replace(
        attention_out="self_attn.o_proj",
        norms=(
            Norms("operator_norm", "ffn_norm", "post_operator_norm", "post_ffn_norm"),
            Norms("operator_norm", "ffn_norm"),
        ),
        gate=Gate("self_attn.g_proj", "sigmoid"),
    ),
    "dots3_note_text": _GATED_HEADS,
    "bailing_hybrid": _GATED_HEADS,
    "kimi_linear": _LLAMA,
    "afmoe": _LLAMA._replace(
        norms=(
            Norms("input_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        ),
        gate=Gate("self_attn.gate_proj", "sigmoid"),
    ),
    "fairseq_lm": Family(
        "self_attn.out_proj",
        _FC1,
        (_OPT,),
        final_norm="layer_norm",
        embedding_multiplier="embed_scale",
        bands="output_bands",
        norms_before="normalize_before",
        refused=(("layernorm_embedding", False, "it normalises embeddings and positions together"),),
    ),
    "laguna": _LLAMA._replace(gate=Gate("self_attn.g_proj", "softplus")),
}

# Why a family is not read, where its blocks do not say it themselves.
_NO_FFN = "its blocks have no FFN, so it has no neurons"
_CODEBOOKS = "its embeddings and its heads are lists, one of each for each codebook"
_DRAFTS = "it only drafts for another model, whose keys and values it reads"
_STREAMS = "it has several residual streams, which it mixes at each layer"
BLOCKS = "its attention looks at blocks of a text, and after the first short text at all of any"
WINDOWS = "it fills each text up to whole attention windows, so its stream has positions that no text has"
REFUSED: dict[str, str] = {
    "longformer": WINDOWS,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _NO_FFN),
    "rwkv": "its FFN multiplies what it writes by a gate, so a neuron has no vector of its own",
    **dict.fromkeys(("zamba", "zamba2"), "its shared FFN feeds a mixer and not the residual stream"),
    "xlnet": "the projections of its attention are no modules",
    "prophetnet": "it predicts several tokens ahead, from streams of their own",
    "reformer": "its layers are reversible, with two residual streams",
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text"), _STREAMS
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _CODEBOOKS),
    "big_bird": BLOCKS,
    "convbert": "its convolutions see the padding of a batch",
    "nystromformer": "a convolution over the values of its attention sees the padding of a batch",
    "yoso": "its attention sees the padding of a batch",
    "fnet": "it mixes positions by a Fourier transform, which sees the padding",
    "funnel": "it pools its positions, so its layers have no common stream",
    "ibert": "its modules pass a factor for rounding on beside what they compute",
    "mra": "transformers computes its attention by CUDA code alone, and as 0 on a processor",
    "neomme": "its attention reads the stream mixed with what entered the first layer",
    "mobilebert": "its blocks have several FFNs between bottlenecks",
    "perceiver": "its residual stream has no positions of the text",
    "squeezebert": "its projections are convolutions in groups",
    "xmod": "an adapter for each language follows its FFN, which is not supported yet",
    "cpmant": "it puts tokens of its own before each input",
    "inkling2_text": "each of its layers reads a mixture of all layers before it",
    "inkling_text": "it mixes what attention and FFN write with that of the tokens before, by a convolution",
    "minimax": "its residual is taken after the norm",
    "minimax_m3_vl_text": "its dense FFN clamps its gate, and multiplies with 1 + a clamped up projection",
    "hrm_text": "it goes through its layers again and again, and so has no number of layers",
    "voxtral_realtime": "what its FFN reads is scaled by how far the text lags behind the sound",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    "axk2": "its norms have a gate of their own, which depends on all channels",
    "blt": "it reads patches of bytes, between two smaller models",
    "longcat_flash": "its blocks have two attentions and two FFNs, and a mixture beside them",
}

# What an unlisted decoder may be made of, likeliest first.
ANY_OUT = tuple(dict.fromkeys(row.attention_out for row in FAMILIES.values() if row.attention_out != OPAQUE))
ANY_FFN = (_GATED, _FUSED, _C_FC, _FC_IN, _4H, _FC1, _MLP_FC1, _UP_DOWN, _FFN_UP_DOWN)
ANY_NORMS = (_SANDWICH, _GLM4, _POST, _PRE, _SHARED, _LN_12, _LN_1, _NORM_12, _TWO, _OPT, _VAULT)
ANY_FINAL = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")


class Outcome(NamedTuple):
    """What became of a tiny random model of one entry of transformers' mappings."""

    family: str
    task: str  # causal, masked or seq2seq
    error: float | None  # of the self-check, as a share of the range of the logits; None where it is refused
    reason: str | None  # of a refusal


def outcomes() -> list[Outcome]:
    """Every entry, as outcomes.txt has it."""
    lines = Path(__file__).with_name("outcomes.txt").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return [
        Outcome(family, task, float(said), None)
        if re.match(r"[\d.]", said)
        else Outcome(family, task, None, said)
        for task, family, said in rows
    ]


# Inside the expert of a mixture that every token goes through.
SHARED = (
    FeedForward("down_proj", "gate_proj", "up_proj"),
    FeedForward("output_linear", "input_linear", "input_linear"),
    FeedForward("down_proj", "gate_up_proj", "gate_up_proj"),
    FeedForward("down_proj", "up_proj"),
)
