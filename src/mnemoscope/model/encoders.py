"""The rows of encoders and of decoders made for them, and where the heads of masked language models keep their parts.

The residual stream is what each norm reads. A post-norm block normalises the stream itself, behind attention (`middle`)
and behind its FFN (`end`); a pre-norm block is that of a decoder whose positions see all others.
"""

from __future__ import annotations

from mnemoscope.model.table import Family, FeedForward, Norms

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
    unused=("encoder_attn_layer_norm",),
    heads="decoder_attention_heads",
)
_MBART = _BART._replace(norms=(Norms("self_attn_layer_norm", "final_layer_norm"),), final_norm="layer_norm")
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
    "eurobert": _LLAMA,
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

# In a model with a head: the linear module and the norm before its decoder, where it has them.
HEADS: tuple[tuple[str, str], ...] = (
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
)
