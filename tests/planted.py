"""A transformer with constructed weights, of which it is known who does what.

A LLaMA of two layers without noise, over the words of `tiny`. Directions of the residual stream are one-hot:
one per word for "the token here is w" and one per word for "say w". It is built so that after
``the capital of France is``

    head (0, 1)      attends from ``is`` to the country and copies its capital: writes "say Paris"
    neurons (1, 3..4)  are switched on by "say Paris" and write "say Paris" again (the memory)
    neuron (1, 7)    is switched on by "the token here is is" and vetoes: writes minus "say Paris"
    neuron (0, 5)    is switched on by "the token here is is" and says London, the foil

All other heads and neurons have zero values. The head's keys find any country, whatever comes before it.
"""

from __future__ import annotations

import torch
from families import tiny
from tiny import tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope import load_model
from mnemoscope.model.model import Model

PROMPT = " the capital of France is"
CAPITALS = {
    " France": " Paris",
    " north": " London",
    " east": " Berlin",
}  # two of the "countries" are made up
COPYING = (0, 1)  # layer, head
COUNTRY = 3  # position of France in the prompt
MEMORIES = ((1, 3), (1, 4))
VETO = (1, 7)
FOIL = (0, 5)

HEADS, DIMENSION, VOCABULARY = 2, 80, 80
WIDTH = HEADS * DIMENSION  # 80 directions for "is w", 80 for "say w"


def planted() -> Model:
    """The model, with its tokenizer."""
    hf = tiny(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIMENSION,
        intermediate_size=10,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        # So slow a rotation that position does not matter within a prompt.
        rope_theta=1e30,
    )
    _construct(hf)
    return load_model(hf, tokenizer=tokenizer())


def token(text: str) -> int:
    """The id of a word."""
    return int(tokenizer()(text)["input_ids"][0])


@torch.no_grad()
def _construct(hf: PreTrainedModel) -> None:
    for name, parameter in hf.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    here, say = torch.eye(WIDTH)[:VOCABULARY], torch.eye(WIDTH)[VOCABULARY:]
    hf.model.embed_tokens.weight.copy_(here)
    # A trace of the token itself, so that logits differ where nothing else speaks.
    hf.lm_head.weight.copy_(0.45 * say + 0.02 * here)
    _copy_capitals(hf, here, say)
    paris, london, now = say[token(" Paris")], say[token(" London")], here[token(" is")]
    # An RMS norm over WIDTH directions makes one-hot inputs large: sqrt(WIDTH) for a lone embedding.
    for (layer, neuron), key, value in (
        (MEMORIES[0], paris, 0.30 * paris),
        (MEMORIES[1], paris, 0.20 * paris),
        (VETO, now, -0.15 * paris),
        (FOIL, now, 0.10 * london),
    ):
        mlp = hf.model.layers[layer].mlp
        mlp.gate_proj.weight[neuron] = key
        mlp.up_proj.weight[neuron] = key * 0.2
        mlp.down_proj.weight[:, neuron] = value


def _copy_capitals(hf: PreTrainedModel, here: Tensor, say: Tensor) -> None:
    layer, head = COPYING
    attention = hf.model.layers[layer].self_attn
    first = head * DIMENSION
    # Rotary pairs turn dimension i with i + DIMENSION / 2; the last pair turns slowest.
    slow = first + DIMENSION // 2 - 1
    attention.q_proj.weight[slow] = here[token(" is")] * 8
    for country in CAPITALS:
        attention.k_proj.weight[slow] += here[token(country)] * 8
    for place, (country, capital) in enumerate(CAPITALS.items()):
        attention.v_proj.weight[first + place] = here[token(country)]
        attention.o_proj.weight[:, first + place] = say[token(capital)] * 0.2
