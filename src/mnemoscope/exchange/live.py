"""Coefficients of the model itself, for what a run does not keep: the tokens around triggers, and whole texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.exchange.sides import Request
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.records import ContextBatch, Progress, padded
from mnemoscope.text.plan import BATCH_TOKENS, packed

Report = Callable[[Progress], None]


def read(
    model: Model, report: Report, contexts: Mapping[int, np.ndarray], requests: Sequence[Request]
) -> list[np.ndarray]:
    """f32[stop - first] for each request, as `sides.Read` says; each context is read once, as far as it is needed."""
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    stops: dict[int, int] = defaultdict(int)
    for index, request in enumerate(requests):
        wanted[request.context, request.layer].append(index)
        stops[request.context] = max(stops[request.context], request.stop)
    values: list[np.ndarray] = [np.zeros(0, np.float32)] * len(requests)

    def receive(layer: int, coefficients: Tensor, batch: ContextBatch, *_: Any) -> None:
        for row, context in enumerate(batch.contexts.tolist()):
            for index in wanted.get((context, layer), ()):
                asked = requests[index]
                seen = coefficients[row, asked.first : asked.stop, asked.neuron]
                values[index] = seen.float().cpu().numpy()

    last = max((request.layer for request in requests), default=0)
    texts = {context: contexts[context][:stop] for context, stop in stops.items()}
    _sweep(model, last, texts, receive, report)
    return values


def rows(
    model: Model, report: Report, contexts: Mapping[int, np.ndarray], neurons: Mapping[int, Sequence[int]]
) -> dict[int, np.ndarray]:
    """Of each layer f32[token neuron]: coefficients of some neurons at all tokens of contexts, one after another."""
    starts = dict(zip(contexts, np.cumsum([0, *map(len, contexts.values())]).tolist(), strict=False))
    size = sum(map(len, contexts.values()))
    values = {layer: np.zeros((size, len(chosen)), np.float32) for layer, chosen in neurons.items()}
    columns = {layer: torch.tensor(list(chosen)) for layer, chosen in neurons.items()}

    def receive(layer: int, coefficients: Tensor, batch: ContextBatch, *_: Any) -> None:
        if layer in columns:
            chosen = coefficients[:, :, columns[layer].to(coefficients.device)].float().cpu().numpy()
            for row, (context, length) in enumerate(zip(batch.contexts, batch.lengths, strict=True)):
                start = starts[int(context)]
                values[layer][start : start + length] = chosen[row, :length]

    _sweep(model, max(neurons), contexts, receive, report)
    return values


def _sweep(
    model: Model,
    last: int,
    contexts: Mapping[int, np.ndarray],
    receive: Callable[..., None],
    report: Report,
) -> None:
    """Read contexts up to a layer."""
    total, done = sum(map(len, contexts.values())), 0
    with Capture(model, last) as capture:
        for batch in _batches(contexts):
            capture.sweep(batch, receive)
            done += batch.n_tokens
            report(Progress("reading", done, total, "tokens"))


def _batches(contexts: Mapping[int, np.ndarray]) -> Iterator[ContextBatch]:
    ids = np.array(list(contexts), np.int64)
    lengths = np.array([len(tokens) for tokens in contexts.values()], np.int64)
    for chosen in packed(np.lexsort((ids, lengths)), lengths, BATCH_TOKENS):
        tokens, sizes = padded([contexts[int(ids[index])] for index in chosen])
        inside = np.arange(tokens.shape[1]) < sizes[:, None]
        yield ContextBatch(ids[chosen], tokens, sizes, inside)
