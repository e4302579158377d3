"""The rows of encoders and of decoders made for them, and where the heads of masked language models keep their parts.

The residual stream is what each norm reads. A post-norm block normalises the stream itself, behind attention (`middle`)
and behind its FFN (`end`); a pre-norm block is that of a decoder whose positions see all others.
"""

from __future__ import annotations

from typing import Any

from mnemoscope.model.table import BLOCKS, FAMILIES, OPAQUE, WINDOWS, Crossing, Family, FeedForward, Norms

_BERT = Family(
    "attention.output.dense",
    FeedForward("output.dense", "intermediate.dense"),
    (Norms(None, None, middle="attention.output.LayerNorm", end="output.LayerNorm"),),
    blocks="encoder.layer",
    final_norm=None,
    embedding_norm="embeddings.LayerNorm",
    attention="attention.self",
    bidirectional=True,
)
_LLAMA = Family(
    "self_attn.o_proj",
    FeedForward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
    (Norms("input_layernorm", "post_attention_layernorm"),),
    bidirectional=True,
)
_GTE = _LLAMA._replace(
    norms=(Norms(None, None, middle="post_attention_layernorm", end="post_mlp_layernorm"),),
    final_norm=None,
    embedding_norm="embeddings.LayerNorm",
)

_XLM = Family(
    "attentions.out_lin",
    FeedForward("ffns.lin2", "ffns.lin1"),
    (Norms(None, None, middle="layer_norm1", end="layer_norm2"),),
    blocks="attentions",
    lists=("attentions", "layer_norm1", "ffns", "layer_norm2"),
    final_norm=None,
    embedding_norm="layer_norm_emb",
    bidirectional=True,
    refused=(
        ("causal", False, "it is an encoder whose positions see only those before them"),
        ("pre_norm", False, "its norms stand before its parts"),
        ("asm", False, "its head is an adaptive softmax"),
    ),
)
_MODERN = Family(
    "attn.Wo",
    FeedForward("mlp.Wo", "mlp.Wi", "mlp.Wi"),
    (Norms("attn_norm", "mlp_norm"), Norms(None, "mlp_norm")),
    final_norm="final_norm",
    embedding_norm="embeddings.norm",
    bidirectional=True,
)
# Encoders and decoders of encoder-decoders, by themselves.
_DENSE = "layer.1.DenseReluDense"
_T5 = Family(
    "layer.0.SelfAttention.o",
    FeedForward(f"{_DENSE}.wo", f"{_DENSE}.wi_0", f"{_DENSE}.wi_1"),
    (Norms("layer.0.layer_norm", "layer.1.layer_norm"),),
    blocks="encoder.block",
    final_norm="encoder.final_layer_norm",
    plain=FeedForward(f"{_DENSE}.wo", f"{_DENSE}.wi"),
    bidirectional=True,
)
_BART = Family(
    "self_attn.out_proj",
    FeedForward("fc2", "fc1"),
    (Norms(None, None, middle="self_attn_layer_norm", end="final_layer_norm"),),
    final_norm=None,
    cross=Crossing("encoder_attn.out_proj", middle="encoder_attn_layer_norm"),
    heads="decoder_attention_heads",
)
_MBART = _BART._replace(
    norms=(Norms("self_attn_layer_norm", "final_layer_norm"),),
    final_norm="layer_norm",
    cross=Crossing("encoder_attn.out_proj", input="encoder_attn_layer_norm"),
)
_ROBERTA = _BERT._replace(first_position=lambda config: config.pad_token_id + 1)

ENCODERS: dict[str, Family] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "deberta", "deberta-v2", "ernie", "layoutlm", "roc_bert", "tapas"), _BERT
    ),
    "git": _BERT._replace(bidirectional=False),  # the decoder of captions of images
    **dict.fromkeys(("camembert", "data2vec-text", "luke", "roberta", "xlm-roberta"), _ROBERTA),
    "electra": _BERT._replace(embedding_map="embeddings_project"),
    "roformer": _BERT._replace(embedding_map="embeddings_project"),
    "rembert": _BERT._replace(embedding_map="encoder.embedding_hidden_mapping_in"),
    "albert": Family(
        "attention.dense",
        FeedForward("ffn_output", "ffn"),
        (Norms(None, None, middle="attention.LayerNorm", end="full_layer_layer_norm"),),
        blocks="encoder.albert_layer_groups",
        inner="albert_layers.0",
        final_norm=None,
        embedding_norm="embeddings.LayerNorm",
        embedding_map="encoder.embedding_hidden_mapping_in",
        attention="attention",
        bidirectional=True,
    ),
    "distilbert": Family(
        "attention.out_lin",
        FeedForward("ffn.lin2", "ffn.lin1"),
        (Norms(None, None, middle="sa_layer_norm", end="output_layer_norm"),),
        blocks="transformer.layer",
        final_norm=None,
        embedding_norm="embeddings.LayerNorm",
        bidirectional=True,
    ),
    "mpnet": _ROBERTA._replace(
        attention_out="attention.attn.o",
        norms=(Norms(None, None, middle="attention.LayerNorm", end="output.LayerNorm"),),
        attention="attention.attn",
    ),
    "megatron-bert": _BERT._replace(
        norms=(Norms("attention.ln", "ln"),), final_norm="encoder.ln", embedding_norm=None
    ),
    "roberta-prelayernorm": _ROBERTA._replace(
        norms=(Norms("attention.LayerNorm", "intermediate.LayerNorm"),), final_norm="LayerNorm"
    ),
    "xlm-roberta-xl": _ROBERTA._replace(
        norms=(Norms("attention.self_attn_layer_norm", "LayerNorm"),),
        final_norm="encoder.LayerNorm",
        embedding_norm=None,
    ),
    "esm": _ROBERTA._replace(
        norms=(Norms("attention.LayerNorm", "LayerNorm"),),
        final_norm="encoder.emb_layer_norm_after",
        embedding_norm=None,
        activation="gelu",
    ),
    "gte": _GTE,
    "nomic_bert": _GTE,
    "jina_embeddings_v3": _GTE._replace(ffn=FeedForward("mlp.fc2", "mlp.fc1")),
    **dict.fromkeys(("eurobert", "ultrabert"), _LLAMA),
    **dict.fromkeys(("flaubert", "xlm"), _XLM),
    "esmc": _LLAMA._replace(residual_multiplier=lambda config: (36 / config.num_hidden_layers) ** 0.5),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(
        ("bart", "blenderbot-small", "mvp", "plbart"), _BART._replace(embedding_norm="layernorm_embedding")
    ),
    **dict.fromkeys(("marian", "trocr"), _BART),
    **dict.fromkeys(("blenderbot", "pegasus", "whisper"), _MBART),
    "mbart": _MBART._replace(embedding_norm="layernorm_embedding"),
    "bigbird_pegasus": _MBART._replace(final_norm="layernorm_embedding"),
    "modernbert": _MODERN,
    "modernbert-decoder": _MODERN._replace(bidirectional=False),
}

_DENSE_2 = _DENSE.replace("layer.1", "layer.2")
_T5_STACK = _T5._replace(blocks="block", final_norm="final_layer_norm")
_T5_DECODER = _T5_STACK._replace(
    ffn=FeedForward(f"{_DENSE_2}.wo", f"{_DENSE_2}.wi_0", f"{_DENSE_2}.wi_1"),
    plain=FeedForward(f"{_DENSE_2}.wo", f"{_DENSE_2}.wi"),
    norms=(Norms("layer.0.layer_norm", "layer.2.layer_norm"),),
    cross=Crossing("layer.1.EncDecAttention.o", input="layer.1.layer_norm"),
    bidirectional=False,
)


_T5GEMMA = Family(
    "self_attn.o_proj",
    FeedForward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
    (
        Norms(
            "pre_self_attn_layernorm",
            "pre_feedforward_layernorm",
            "post_self_attn_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    embedding_multiplier=lambda config: config.hidden_size**0.5,
    softcap="final_logit_softcapping",
    cross=Crossing("cross_attn.o_proj", "pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
)
_SEAMLESS = Family(
    "self_attn.out_proj",
    FeedForward("ffn.fc2", "ffn.fc1"),
    (Norms("self_attn_layer_norm", "ffn_layer_norm"),),
    final_norm="layer_norm",
    cross=Crossing("cross_attention.out_proj", "cross_attention_layer_norm"),
    heads="decoder_attention_heads",
)


def _alike(decoder: Family) -> tuple[Family, Family]:
    """Rows of both stacks where their blocks have the same parts, but for cross attention."""
    heads = decoder.heads.replace("decoder", "encoder")
    return decoder._replace(cross=None, heads=heads, softcap=None, bidirectional=True), decoder


def _scaled_outputs(config: Any) -> float:
    return float(config.d_model**-0.5) if config.scale_decoder_outputs else 1.0


def _scaled_if_tied(config: Any) -> float:
    return float(config.d_model**-0.5) if config.tie_word_embeddings else 1.0


# Encoder-decoders: the rows of their encoder and of their decoder.
STACKS: dict[str, tuple[Family, Family]] = {
    "t5": (
        _T5_STACK,
        _T5_DECODER._replace(logit_multiplier=_scaled_outputs),
    ),
    "mt5": (_T5_STACK, _T5_DECODER),
    "umt5": (_T5_STACK, _T5_DECODER._replace(logit_multiplier=_scaled_if_tied)),
    **{
        name: _alike(ENCODERS[name])
        for name in ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart")
    },
    "m2m_100": _alike(_MBART),
    "switch_transformers": (
        _T5_STACK._replace(ffn=FeedForward("layer.1.mlp.wo", "layer.1.mlp.wi"), plain=None),
        _T5_DECODER._replace(
            ffn=FeedForward("layer.2.mlp.wo", "layer.2.mlp.wi"),
            plain=None,
            logit_multiplier=_scaled_if_tied,
        ),
    ),
    "longt5": (
        _T5_STACK._replace(
            attention_out=OPAQUE,
            mixers=("layer.0.LocalSelfAttention", "layer.0.TransientGlobalSelfAttention"),
        ),
        _T5_DECODER._replace(logit_multiplier=_scaled_outputs),
    ),
    "t5gemma": _alike(_T5GEMMA),
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), _alike(_SEAMLESS)),
}
_BERT_ACROSS = Crossing(
    "crossattention.output.dense",
    middle="crossattention.output.LayerNorm",
    attention="crossattention.self",
)


def stacks_of(config: Any) -> tuple[Family, Family] | None:
    """The rows of both stacks of an encoder-decoder, also of one put together from two models; None if unknown."""
    if config.model_type != "encoder-decoder":
        return STACKS.get(config.model_type)
    encoder, decoder = (ENCODERS.get(half.model_type) for half in (config.encoder, config.decoder))
    if encoder is None or decoder is None or decoder.attention_out != _BERT.attention_out:
        return None
    return encoder, decoder._replace(bidirectional=False, cross=_BERT_ACROSS)


def whole_attention(family: str) -> str:
    """Which attention of a family is one part, without heads; empty if none is."""
    if any(row.attention_out == OPAQUE for row in STACKS.get(family, ())):
        return "its encoder's attention is one part, without heads"
    row = FAMILIES.get(family) or ENCODERS.get(family)
    return (
        "its attention is one part, without heads" if row is not None and row.attention_out == OPAQUE else ""
    )


# Why others are not read, where it is of the whole and not of each stack.
REFUSED_STACKS: dict[str, str] = {
    "bigbird_pegasus": BLOCKS,
    "led": WINDOWS,
    "pegasus_x": "its encoder keeps a stream of global tokens beside that of the text",
    "fsmt": "its blocks read positions first and texts second, which is not supported",
    "nllb-moe": "transformers reads its router's marks as numbers of experts, so that only the first two ever run",
    "t5gemma2": "one attention looks at its own positions and at the encoder's together, which is not supported yet",
}

# In a model with a head: the linear modules and the norm, or None, before its decoder, where it has them.
HEADS: tuple[tuple[str | None, ...], ...] = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    ("cls.predictions.transform.dense", "cls.predictions.transform.layer_norm"),
    ("cls.predictions.dense", "cls.predictions.LayerNorm"),
    ("lm_head.dense", "lm_head.layer_norm"),
    ("generator_predictions.dense", "generator_predictions.LayerNorm"),
    ("predictions.dense", "predictions.LayerNorm"),
    ("vocab_transform", "vocab_layer_norm"),
    ("head.dense", "head.norm"),
    ("projection_head.dense", "projection_head.norm"),
    ("lm_head.dense", "lm_head.norm"),
    ("head.linear1", "head.linear2", None),
    ("projection_head.linear1", "projection_head.linear2", None),
)
