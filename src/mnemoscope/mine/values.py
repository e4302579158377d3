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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.mine.kernel import _compiled, _insert, widen
from mnemoscope.mine.reading import bits_or_floats, share_out
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, Layer
from mnemoscope.model.threads import Threads
from mnemoscope.run.schemas import arrow_table

LENS = "own"
PROJECTION = "flat"  # so that what a value says first is the same whatever its coefficient (B.4)
VALUE_TOKENS = 50  # kept for each neuron and polarity
KEY_TOKENS = 10
_TOGETHER = 2048  # neurons whose lists are held at once: each piece of the vocabulary is fetched once for all of these
_TILE, _TOKENS = (
    256,
    1024,
)  # neurons and tokens that are multiplied at once: what comes out stays in the cache
_ROWS = 64  # neurons that a thread takes at a time
_LANES = 64  # tokens that are looked at together, and sums that are kept apart
_WHOLE = 64  # neurons that an accelerator reads through the whole vocabulary at once


def seconds(model: Model) -> float:
    """About how long reading all of a model takes, measured with the sample model on two cores; 0 on a GPU."""
    parts = model.anatomy
    work = len(model.cells) * parts.width * parts.vocabulary
    return 0.0 if model.device.type != "cpu" else work * (0.7e-10 if model.dtype == "fp32" else 0.26e-10)


def read_layer(
    model: Model, layer: int, lens: Lens, token_vectors: Tensor, neurons: Tensor | None = None
) -> tuple[pa.Table, pa.Table]:
    """The rows of `values` for one layer, and the columns that it adds to `neurons`.

    lens           of the stack that the layer is in
    token_vectors  Float[Tensor, "vocabulary width"] from `bare_tokens`, of that stack
    neurons        i64[neuron], ascending: these alone; None for all
    """
    block, stack = model.anatomy.layers[layer], model.anatomy.stack_of(layer)
    chosen = slice(None) if neurons is None else neurons
    tokens, logits, normalisers, entropies = _read_values(lens, stack.outward(value_vectors(block)[chosen]))
    names = np.arange(len(tokens)) if neurons is None else neurons.numpy()
    probabilities = np.exp(logits - normalisers[:, None, None])
    neuron, end, rank = np.indices(tokens.shape)
    values = arrow_table(
        "values",
        {
            "layer": layer,
            "neuron": names[neuron.ravel()],
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
        "neuron": names,
        "value_norm": _norms(block.values()[chosen]),
        "key_norm": _norms(block.keys()[chosen]),
        "up_norm": None if ups is None else _norms(ups[chosen]),
        "value_max_probability": probabilities[:, 0, 0],
        "value_entropy": entropies,
    }
    key_tokens, coefficients = _read_keys(model, block, token_vectors, torch.from_numpy(names))
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
    rows = rows if norm is None else norm.linear(rows, rows.new_ones(1))
    factor = block.ffn_multiplier  # one for each channel is no such scale
    return rows * factor if isinstance(factor, Tensor) and block.units is None else rows


def bare_tokens(model: Model, stack: Anatomy) -> Float[Tensor, "vocabulary width"]:
    """Every token's embedding as it enters the first layer of a stack, without a position."""
    with torch.inference_mode():
        return stack.token_vectors(torch.arange(stack.vocabulary, device=model.device))


class Ends(NamedTuple):
    """Of rows of scores what comes first from either end, and their softmax.

    columns      i32[row 2 k]  of the k largest scores and of the k smallest, the furthest first; of equal scores the
                               smaller column first
    scores       f32[row 2 k]
    normalisers  f64[row]      log of the sum of exp of all scores; NaN where it was not asked for
    entropies    f64[row]      nats
    """

    columns: np.ndarray
    scores: np.ndarray
    normalisers: np.ndarray
    entropies: np.ndarray


Scores = Callable[[slice, slice], Float[Tensor, "row column"]]
"""Makes the scores of some rows and some columns."""


def _read_values(lens: Lens, vectors: Float[Tensor, "neuron width"]) -> Ends:
    """Values by their numbers through the vocabulary."""
    with torch.inference_mode():
        directions = lens.directions(vectors)
        return ends(
            lambda neurons, tokens: lens.scores(directions[neurons], tokens),
            (len(directions), len(lens.table)),
            VALUE_TOKENS,
            directions.device,
            softmax=True,
        )


def _read_keys(
    model: Model, block: Layer, token_vectors: Tensor, neurons: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and coefficients [neuron, 2, KEY_TOKENS] that bare embeddings would cause in this layer."""
    with torch.inference_mode(), Threads():
        if block.bare(token_vectors[:1]) is None:
            nothing = (len(neurons), 2, 0)
            return np.zeros(nothing, np.int32), np.zeros(nothing, np.float32)
        weights = [(block.keys(), block.key_bias()), (block.ups(), block.up_bias())]
        neurons = neurons.to(token_vectors.device)  # once, and not with each piece of the vocabulary

        @lru_cache(maxsize=1)  # one piece of the vocabulary meets many neurons
        def normed(start: int, stop: int) -> Tensor:
            inputs = block.bare(token_vectors[start:stop])
            assert inputs is not None, "what is read of one token is read of all"
            return inputs

        def coefficients(chosen: slice, tokens: slice) -> Tensor:
            inputs = normed(tokens.start, tokens.stop)
            gate, up = (
                None
                if rows is None
                else _projected(
                    rows[neurons[chosen]], None if bias is None else bias[neurons[chosen]], inputs
                )
                for rows, bias in weights
            )
            assert gate is not None, "neurons have keys"
            return block.coefficients(neurons[chosen], gate.T, None if up is None else up.T).T

        shape = (len(neurons), len(token_vectors))
        read = ends(coefficients, shape, KEY_TOKENS, token_vectors.device)
        return read.columns, read.scores


def _projected(
    rows: Float[Tensor, "neuron width"], bias: Tensor | None, inputs: Float[Tensor, "token width"]
) -> Float[Tensor, "neuron token"]:
    product = rows.to(inputs.dtype) @ inputs.T
    return product if bias is None else product + bias[:, None].to(inputs.dtype)


def ends(
    scores: Scores, shape: tuple[int, int], k: int, device: torch.device, *, softmax: bool = False
) -> Ends:
    """Reads a matrix of scores that is never whole in memory, each of them once.

    shape    rows, and columns
    k        how many of either end, of all columns at most
    softmax  whether normalisers and entropies are wanted
    """
    n_rows, n_columns = shape
    read = _in_pieces if device.type == "cpu" else _in_rows
    blocks = [
        read(scores, range(start, min(start + _TOGETHER, n_rows)), n_columns, min(k, n_columns), softmax)
        for start in range(0, max(n_rows, 1), _TOGETHER)
    ]
    return Ends(*map(np.concatenate, zip(*blocks, strict=True)))


def _in_pieces(scores: Scores, rows: range, n_columns: int, k: int, softmax: bool) -> Ends:
    """`ends` of neighbouring rows: pieces that stay in the cache are read there by a compiled loop."""
    best = np.full((len(rows), 2, k), -np.inf, np.float32)
    columns = np.zeros(best.shape, np.int32)
    mass, moment = np.zeros((2, len(rows), _LANES if softmax else 0))
    for first in range(0, n_columns, _TOKENS):
        for start in range(0, len(rows), _TILE):
            stop = min(start + _TILE, len(rows))
            chosen = slice(rows.start + start, rows.start + stop)
            piece = bits_or_floats(scores(chosen, slice(first, min(first + _TOKENS, n_columns)))[None])
            held = [array[start:stop] for array in (best, columns, mass, moment)]
            share_out(partial(_read_rows, piece, first, held), range(0, len(piece), _ROWS))
    with np.errstate(divide="ignore", invalid="ignore"):  # where no softmax is asked for
        total = mass.sum(1)
        normalisers = best[:, 0, 0] + np.log(total)
        entropies = np.log(total) - moment.sum(1) / total
    best[:, 1] *= -1
    return Ends(columns, best, normalisers, entropies)


def _read_rows(piece: np.ndarray, first: int, held: list[np.ndarray], row: int) -> None:
    _read_piece(piece, first, row, min(row + _ROWS, len(piece)), *held)


_FLOOR = -80.0  # nats: no fp32 probability is smaller, and exp of less is slow where it is denormal
_LOG2E, _ROUND = math.log2(math.e), 1.5 * 2.0**52  # adding the latter rounds to whole numbers
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723e-6  # the former has few bits


@_compiled
def _read_piece(scores, first, start, stop, best, columns, mass, moment):  # type: ignore[no-untyped-def]
    """Read columns from `first` on of rows ``start <= row < stop``, once those before have been read.

    Not numba's own threads: it would change how many torch computes with.

    scores   [row, column]  fp32, or bf16 as its 16 bits
    best     f32[row 2 k]   in, out: descending, of the smallest with the signs turned
    columns  i32[row 2 k]   in, out
    mass     f64[row lane]  in, out: sums of exp(score - best[row, 0, 0]), column by column in turn; of no lane: not
                            asked for
    moment   f64[row lane]  in, out: sums of exp(d) d of the same differences d
    """
    k, lanes = best.shape[2], mass.shape[1]
    piece = np.empty(_LANES, np.float32)
    for row in range(start, stop):
        largest, smallest = best[row, 0], best[row, 1]
        for begin in range(0, scores.shape[1], _LANES):
            width = min(_LANES, scores.shape[1] - begin)
            source = scores[row][begin : begin + width]
            above, below = largest[k - 1], -smallest[k - 1]
            hits = np.int32(0)
            for j in range(width):
                x = np.float32(widen(source[j]))
                piece[j] = x
                hits += np.int32(x > above) | np.int32(x < below)
            before = largest[0]
            if hits:
                for j in range(width):
                    column = np.int32(first + begin + j)
                    if piece[j] > largest[k - 1]:
                        _insert(largest, columns[row, 0], piece[j], column)
                    if -piece[j] > smallest[k - 1]:
                        _insert(smallest, columns[row, 1], -piece[j], column)
            if lanes:
                if largest[0] > before > -np.inf:
                    d = np.float64(before) - np.float64(largest[0])
                    factor = math.exp(d)
                    for j in range(lanes):
                        moment[row, j] = (moment[row, j] + mass[row, j] * d) * factor
                        mass[row, j] *= factor
                _add_exponentials(piece, width, largest[0], mass[row], moment[row])


@_compiled
def _add_exponentials(piece, width, top, mass, moment):  # type: ignore[no-untyped-def]
    """Add exp(d) and exp(d) d of d = piece - top to each lane; exp by its series about 0, to 1e-11 of itself.

    `math.exp` is not vectorised; with fp32 one probability in a hundred ended in another last bit.
    """
    top = np.float64(top)
    for j in range(width):
        d = np.float64(piece[j]) - top
        d = _FLOOR if d < _FLOOR else d  # what is not a number stays what it is
        shifted = d * _LOG2E + _ROUND
        whole = shifted - _ROUND
        r = d - whole * _LN2_HIGH - whole * _LN2_LOW
        p = ((r / 362880 + 1 / 40320) * r + 1 / 5040) * r + 1 / 720
        p = ((((p * r + 1 / 120) * r + 1 / 24) * r + 1 / 6) * r + 0.5) * r * r + r + 1.0
        # The last bits of the shifted number are the exponent, which is moved to its place.
        exponent = (np.float64(shifted).view(np.int64) + np.int64(1023)) << np.int64(52)
        weight = p * np.int64(exponent).view(np.float64)
        mass[j] += weight
        moment[j] += weight * d


def _in_rows(scores: Scores, rows: range, n_columns: int, k: int, softmax: bool) -> Ends:
    """`ends` of neighbouring rows in plain torch: a few rows at once through all columns, and only ends leave the
    device. Sums are fp32."""
    blocks = []
    for start in range(rows.start, max(rows.stop, rows.start + 1), _WHOLE):
        whole = scores(slice(start, min(start + _WHOLE, rows.stop)), slice(0, n_columns)).float()
        first, last = _first(whole, k), _first(-whole, k)
        normalisers = entropies = whole.new_full((len(whole),), torch.nan)
        if softmax:
            top = whole.amax(1, keepdim=True)
            shifted = (whole - top).clamp_(min=_FLOOR)
            weights = shifted.exp()
            mass = weights.sum(1)
            normalisers, entropies = top[:, 0] + mass.log(), mass.log() - (weights * shifted).sum(1) / mass
        blocks.append(
            (
                torch.stack([first[0], last[0]], 1).int(),
                torch.stack([first[1], -last[1]], 1),
                normalisers,
                entropies,
            )
        )
    columns, best, *sums = (torch.cat(parts).cpu().numpy() for parts in zip(*blocks, strict=True))
    return Ends(columns, best, *(each.astype(np.float64) for each in sums))


def _first(scores: Float[Tensor, "row column"], k: int) -> tuple[Tensor, Tensor]:
    """Columns and scores of the k largest, of equal ones the smaller column first: whole numbers in that order."""
    bits = (scores + 0.0).view(torch.int32)  # zeros have no sign
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    low = 0xFFFFFFFF - torch.arange(scores.shape[1], device=scores.device)
    first = ((order << 32) | low).topk(k, dim=1).values
    columns = 0xFFFFFFFF - (first & 0xFFFFFFFF)
    return columns, scores.gather(1, columns)


def _norms(rows: Tensor) -> np.ndarray:
    return rows.detach().float().norm(dim=1).cpu().numpy()


def layers(
    model: Model, wanted: Iterable[int], neurons: Mapping[int, Tensor] | None = None
) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """The tables of the wanted layers, in turn; of some `neurons` of each, as in `read_layer`, if these are given."""
    for stack, members in groupby(wanted, model.anatomy.stack_of):
        lens, vectors = Lens.of(stack, LENS, PROJECTION), bare_tokens(model, stack)
        for layer in members:
            yield layer, *read_layer(model, layer, lens, vectors, None if neurons is None else neurons[layer])
