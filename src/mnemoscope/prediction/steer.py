"""Steering changes one neuron at every position, and lets the model write on: what does it do to the text?

The model as it is, with the neuron changed, and with another one of the layer changed are three rows of one batch, so
that a difference between them is never one between batch sizes. Each row takes its most probable token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mnemoscope.errors import ModelNotSupported, QueryError
from mnemoscope.model.model import Model
from mnemoscope.model.running import hooked, observed
from mnemoscope.prediction.ablate import Cut, cuts_made
from mnemoscope.prediction.steered import DOING, Steered, SteeredText, check_change
from mnemoscope.records import NeuronId, Progress
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import prompt_tokens

LENGTH = 24  # tokens that are written
MOST = 200


def steer(
    model: Model,
    prompt: str,
    neuron: tuple[int, int],
    *,
    factor: float = 0.0,
    value: float = 0.0,
    length: int = LENGTH,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Steered:
    """Let the model go on with a prompt, with the coefficient of a neuron changed at every position and without.

    factor, value  the coefficient becomes ``factor`` times what it was, plus ``value``: 0 and 0 remove the neuron
    length         tokens that are written, at most
    seed           of the other neuron that is changed alike, to compare with

    `QueryError` for a prompt without tokens or without room for `length` more, for a neuron that is not there, and for
    numbers that are not finite; `ModelNotSupported` for a model that does not go on with a text.
    """
    check_change(factor, value, length, seed)
    address = _check(model, neuron)
    with model.running(), torch.inference_mode():
        ids, before = prompt_tokens(model.tokenizer, prompt)
        _check_size(model, len(ids) - before, len(ids), length)
        others = [n for n in range(model.cells.sizes[address.layer]) if n != address.neuron]
        other = int(np.random.default_rng(seed).choice(others)) if others else None
        control = None if other is None else model.cells.id(address.layer, other)
        units = [address] if control is None else [address, control]
        cuts = [[Cut(*unit, value=value, factor=factor, everywhere=True)] for unit in units]
        rows, probabilities = _written(model, ids, cuts, length, report or (lambda _: None))
    whole, *changed = _texts(model, len(ids), rows, probabilities, [None, *units])
    return Steered(
        model.id, prompt, address, factor, value, whole, changed[0], changed[1] if control else None
    )


def _check(model: Model, neuron: tuple[int, int]) -> NeuronId:
    model.check_causal(f"{DOING} a neuron of")
    model.check_tokenizer()
    if model.anatomy.headless:
        raise ModelNotSupported(f"{DOING} {model.id}: it has no language-model head; give a decoder with one")
    address = model.cells.id(*neuron)
    if not model.cells.has(*neuron):
        raise QueryError(
            f"{DOING} {address}: out of range; {model.id} has {model.cells.range_of(address.layer)}"
        )
    return address


def _check_size(model: Model, own: int, tokens: int, length: int) -> None:
    room = min(MOST, model.anatomy.context_length - tokens)
    if own < 1:
        raise QueryError(f"{DOING}: the prompt has no tokens; give other text")
    if length > room:
        raise QueryError(
            f"{DOING}: behind a prompt of {tokens} tokens at most {max(room, 0)} are written; take a {{length}} "
            "up to that, or a shorter prompt",
            length=length,
        )


def _written(
    model: Model,
    ids: Sequence[int],
    cuts: Sequence[Sequence[Cut]],
    length: int,
    report: Callable[[Progress], None],
) -> tuple[Tensor, Float[Tensor, "row step"]]:
    """Tokens of each row, the prompt's first, until all have ended; and the probabilities of those written."""
    rows = torch.tensor(ids, device=model.device).expand(len(cuts) + 1, -1)
    probabilities: list[Tensor] = []
    kept: Any = None
    ends = torch.tensor(sorted(_ends(model)), device=model.device)
    with observed(model.hf, upcast=model.upcast, attention=model.anatomy.attention):
        for step in range(length):
            report(Progress("writing", step, length, "tokens"))
            new = rows if kept is None else rows[:, -1:]
            cache = {"use_cache": _keeps(model)} | ({} if kept is None else {"past_key_values": kept})
            with hooked(cuts_made(model.anatomy, cuts, new.shape[1])):
                output = model.hf(input_ids=new, logits_to_keep=1, **cache)
            kept = output.past_key_values if isinstance(output.get("past_key_values"), DynamicCache) else None
            likely, token = output.logits[:, -1].float().softmax(-1).max(-1)
            rows = torch.cat([rows, token[:, None].to(rows)], dim=1)
            probabilities.append(likely)
            if torch.isin(rows[:, len(ids) :], ends).any(1).all():
                break
    return rows.cpu(), torch.stack(probabilities, dim=1).cpu()


def _keeps(model: Model) -> bool:
    """Whether keys and values are all that a model keeps of what it has read."""
    return not any(layer.mixer for layer in model.anatomy.layers)


def _ends(model: Model) -> set[int]:
    """Tokens with which the model ends a text."""
    settings = (getattr(model.hf, "generation_config", None), model.hf.config, model.tokenizer)
    given = (getattr(setting, "eos_token_id", None) for setting in settings)
    return {
        int(token)
        for ids in given
        for token in (ids if isinstance(ids, list) else [ids])
        if token is not None
    }


def _texts(
    model: Model, start: int, rows: Tensor, probabilities: Tensor, units: Sequence[NeuronId | None]
) -> list[SteeredText]:
    words, ends, texts = vocabulary_of(model.tokenizer, model.anatomy.vocabulary), _ends(model), []
    first = rows[0, start:].tolist()
    for unit, row, likely in zip(units, rows.tolist(), probabilities.tolist(), strict=True):
        tokens = row[start:]
        count = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
        pieces = words.running(row[: start + count])[start:]
        shared = next((n for n in range(count) if tokens[n] != first[n]), count)
        texts.append(SteeredText(unit, tuple(pieces), tuple(likely[:count]), count < len(tokens), shared))
    return texts
