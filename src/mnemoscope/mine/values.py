"""Read every neuron's value, and its key, in vocabulary space (Geva et al. 2021, Section 4; A10).

The value is read under the `own` lens: the final norm with the value's own statistics, then the unembedding, of an
adaptive softmax by its flat projection. Post-norms
fold their weight into the value first (G4). Probabilities are over the whole vocabulary; a value read with a
negative coefficient promotes what is listed as suppressed.

The key is read through the input embedding, as a question with an exact answer: which coefficient would the bare
embedding of a token (no position, no attention) cause if it entered this layer? Both key rows of a gated neuron
take block. This says what switches a neuron on only near the bottom of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.mine.kernel import _compiled
from mnemoscope.mine.reading import share_out
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, Layer
from mnemoscope.model.threads import Threads
from mnemoscope.run.schemas import arrow_table

LENS = "own"
PROJECTION = "flat"  # so that what a value says first is the same whatever its coefficient (B.4)
VALUE_TOKENS = 50  # kept for each neuron and polarity
KEY_TOKENS = 10
_TILE = 64  # neurons read at once: their logits stay near the cache
_ROWS = 8  # of these that a thread takes at a time


def seconds(model: Model) -> float:
    """About how long reading all of a model takes, measured with the sample model on two cores; 0 on a GPU."""
    parts = model.anatomy
    work = len(model.cells) * parts.width * parts.vocabulary
    return 0.0 if model.device.type != "cpu" else work * (1.05e-10 if model.dtype == "fp32" else 0.45e-10)


def read_layer(model: Model, layer: int, lens: Lens, token_vectors: Tensor) -> tuple[pa.Table, pa.Table]:
    """The rows of `values` for one layer, and the columns that it adds to `neurons`.

    lens           of the stack that the layer is in
    token_vectors  Float[Tensor, "vocabulary width"] from `bare_tokens`, of that stack
    """
    block, stack = model.anatomy.layers[layer], model.anatomy.stack_of(layer)
    tokens, logits, normalisers, entropies = _read_values(lens, stack.outward(value_vectors(block)))
    probabilities = np.exp(logits - normalisers[:, None, None])
    neuron, end, rank = np.indices(tokens.shape)
    values = arrow_table(
        "values",
        {
            "layer": layer,
            "neuron": neuron.ravel(),
            "polarity": np.where(end.ravel() == 0, 1, -1),
            "rank": rank.ravel(),
            "token": tokens.ravel(),
            "logit": logits.ravel(),
            "probability": probabilities.ravel(),
        },
    )
    ups = block.ups()
    columns: dict[str, Any] = {
        "layer": layer,
        "neuron": np.arange(len(tokens)),
        "value_norm": _norms(block.values()),
        "key_norm": _norms(block.keys()),
        "up_norm": None if ups is None else _norms(ups),
        "value_max_probability": probabilities[:, 0, 0],
        "value_entropy": entropies,
    }
    key_tokens, coefficients = _read_keys(model, block, token_vectors)
    for side, suffix in ((0, ""), (1, "_negative")):
        columns[f"key_tokens{suffix}"] = key_tokens[:, side]
        columns[f"key_coefficients{suffix}"] = coefficients[:, side]
    return values, arrow_table("neurons", columns, partial=True)


def value_tokens(model: Model, layer: int, neurons: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and logits [neuron, 2, rank] of some neurons of a layer."""
    vectors, stack = value_vectors(model.anatomy.layers[layer])[neurons], model.anatomy.stack_of(layer)
    return _read_values(Lens.of(stack, LENS, PROJECTION), stack.outward(vectors))[:2]


def value_vectors(block: Layer) -> Float[Tensor, "neuron width"]:
    """What each neuron adds to the stream, up to its coefficient and a scale that the own lens removes."""
    rows = block.values().detach().float()
    norm = block.value_norm
    return rows if norm is None else norm.linear(rows, rows.new_ones(1))


def bare_tokens(model: Model, stack: Anatomy) -> Float[Tensor, "vocabulary width"]:
    """Every token's embedding as it enters the first layer of a stack, without a position."""
    with torch.inference_mode():
        return stack.token_vectors(torch.arange(stack.vocabulary, device=model.device))


def _read_values(
    lens: Lens, vectors: Float[Tensor, "neuron width"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and logits [neuron, 2, VALUE_TOKENS], and log-normaliser and entropy (nats) [neuron]."""
    kept: list[tuple[np.ndarray, ...]] = []
    with torch.inference_mode():
        for tile in vectors.split(_TILE):
            logits = lens.logits(tile)
            top = logits.amax(1, keepdim=True)
            # Below -80 a probability is no number that fp32 can hold; clamping spares slow denormals.
            shifted = (logits - top).clamp_(min=-80)
            weights = shifted.exp()
            mass = weights.sum(1, dtype=torch.float64)
            entropy = mass.log() - (weights * shifted).sum(1, dtype=torch.float64) / mass
            tokens, scores = extremes(logits.cpu().numpy(), min(VALUE_TOKENS, logits.shape[1]))
            normaliser = top[:, 0].double() + mass.log()
            kept.append((tokens, scores, normaliser.cpu().numpy(), entropy.cpu().numpy()))
    tokens, scores, normalisers, entropies = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return tokens, scores, normalisers, entropies


def _read_keys(model: Model, block: Layer, token_vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and coefficients [neuron, 2, KEY_TOKENS] that bare embeddings would cause in this layer."""
    kept = []
    with torch.inference_mode(), Threads():
        normed = block.bare(token_vectors)
        if normed is None:
            return np.zeros((len(block.keys()), 2, 0), np.int32), np.zeros(
                (len(block.keys()), 2, 0), np.float32
            )
        normed = normed.T.contiguous()
        for neurons in torch.arange(len(block.keys())).split(_TILE):
            coefficients = _coefficients(block, neurons, normed)
            kept.append(extremes(coefficients.float().cpu().numpy(), min(KEY_TOKENS, normed.shape[1])))
    tokens, scores = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return tokens, scores


def _coefficients(block: Layer, neurons: Tensor, normed: Tensor) -> Tensor:
    """Coefficients [neuron, vocabulary] of some neurons for normed inputs [width, vocabulary]."""

    def project(rows: Tensor, bias: Tensor | None) -> Tensor:
        chosen = rows[neurons].to(normed.dtype) @ normed
        return chosen if bias is None else chosen + bias[neurons, None].to(normed.dtype)

    ups = block.ups()
    gate = project(block.keys(), block.key_bias())
    up = None if ups is None else project(ups, block.up_bias())
    return block.coefficients(neurons, gate.T, None if up is None else up.T).T


def extremes(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest and k smallest columns of every row, in a total order: score, then the smaller column.

    scores f32[row, column] -> columns i32[row, 2, k] and their scores f32[row, 2, k]; side 0 is the largest.
    Library top-k routines leave the order of ties open, and equal rows of an unembedding do tie.
    """
    columns = np.zeros((scores.shape[0], 2, k), np.int32)
    kept = np.zeros((scores.shape[0], 2, k), np.float32)
    scores = np.ascontiguousarray(scores, np.float32)
    share_out(
        lambda first: _extremes(scores, first, min(first + _ROWS, len(scores)), columns, kept),
        range(0, len(scores), _ROWS),
    )
    return columns, kept


@_compiled
def _extremes(scores, start, stop, columns, kept):  # type: ignore[no-untyped-def]
    """Rows ``start <= row < stop``. Not numba's own threads: it would change how many torch computes with."""
    k = columns.shape[2]
    for row in range(start, stop):
        for side in range(2):
            sign = np.float32(1.0) if side == 0 else np.float32(-1.0)
            best = np.full(k, -np.inf, np.float32)
            where = np.zeros(k, np.int32)
            worst = best[k - 1]
            for column in range(scores.shape[1]):
                score = sign * scores[row, column]
                if score > worst:
                    rank = k - 1
                    while rank > 0 and best[rank - 1] < score:
                        best[rank] = best[rank - 1]
                        where[rank] = where[rank - 1]
                        rank -= 1
                    best[rank] = score
                    where[rank] = column
                    worst = best[k - 1]
            for rank in range(k):
                columns[row, side, rank] = where[rank]
                kept[row, side, rank] = sign * best[rank]


def _norms(rows: Tensor) -> np.ndarray:
    return rows.detach().float().norm(dim=1).cpu().numpy()


def layers(model: Model, wanted: Iterable[int]) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """The tables of the wanted layers, in turn."""
    for stack, members in groupby(wanted, model.anatomy.stack_of):
        lens, vectors = Lens.of(stack, LENS, PROJECTION), bare_tokens(model, stack)
        for layer in members:
            yield layer, *read_layer(model, layer, lens, vectors)
