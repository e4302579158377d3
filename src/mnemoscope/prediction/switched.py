"""Frames that say what switched on the neurons that matter, and where the best attention sub-value got its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import beside_update, rebuilt_at, unit_parts, updates_read, writes
from mnemoscope.model.units import POINTS, RESIDUAL
from mnemoscope.prediction.bases import ResidualBases
from mnemoscope.prediction.switching import (
    Switches,
    adjoint,
    chain,
    neuron_shares,
    origins,
    switches,
    unit_shares,
)
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Cells

NEURONS = (6, 2)  # explained: the largest |leave_one_out|, and the largest |increase| besides
ROWS = 12  # queries named for each neuron

_SCHEMA = {
    "layer": pl.Int32,
    "neuron": pl.Int32,
    "kind": pl.String,
    "query_layer": pl.Int32,
    "query_unit": pl.Int32,
    "source": pl.Int32,
    "source_token": pl.String,
    "share": pl.Float64,
    "gate": pl.Float64,
    "up": pl.Float64,
    "inner": pl.Float64,
    "score": pl.Float64,
    "increase": pl.Float64,
}


def queries(
    prediction: TracedPrediction, neurons: pl.DataFrame, most: tuple[int, int] = NEURONS
) -> pl.DataFrame:
    """The frame `queries` of an `Explanation`, for so many neurons by each measure.

    It is empty where the stream is normalised on the way, as a part is known as what becomes of it at the end.
    """
    if not prediction.stream.anatomy.adds_up_as_read:
        return pl.DataFrame(schema=_SCHEMA)
    stream, position = prediction.stream, prediction.position
    chosen = list(_important(neurons, most).iter_rows())
    memories = [switches(stream, layer, position, torch.tensor([neuron])) for layer, neuron, _ in chosen]
    rows: list[tuple[object, ...]] = []
    if stream.anatomy.of_units:
        for memory, (*_, increase) in zip(memories, chosen, strict=True):
            rows += _queries_of(prediction, memory, [*_below_units(prediction, memory)], increase)
    elif chosen:
        keys = torch.cat([memory.share.key for memory in memories])
        # One pass over the values of the model for all of them.
        below = [
            neuron_shares(stream, layer, position, keys)
            for layer in range(max(layer for layer, *_ in chosen))
        ]
        for column, (memory, (*_, increase)) in enumerate(zip(memories, chosen, strict=True)):
            neurons_below = _below(prediction, memory, [shares[:, column] for shares in below])
            rows += _queries_of(prediction, memory, [*neurons_below], increase)
    frame = pl.DataFrame(rows, _SCHEMA, orient="row")
    experts = stream.anatomy.experts
    return _named(frame, Cells(stream.anatomy.sizes, experts)) if experts else frame


def _named(frame: pl.DataFrame, cells: Cells) -> pl.DataFrame:
    """With the columns address and query_address, which say the expert of a neuron."""
    names, below = [], []
    for row in frame.iter_rows(named=True):
        names.append(str(cells.id(row["layer"], row["neuron"])))
        of_neuron = row["kind"] == "neuron"
        below.append(str(cells.id(row["query_layer"], row["query_unit"])) if of_neuron else None)
    return frame.with_columns(
        pl.Series("address", names, pl.String), pl.Series("query_address", below, pl.String)
    )


def _important(neurons: pl.DataFrame, most: tuple[int, int]) -> pl.DataFrame:
    chosen = [
        neurons.sort(pl.col(name).abs(), descending=True, maintain_order=True).head(count)
        for name, count in zip(("leave_one_out", "increase"), most, strict=True)
    ]
    rows = pl.concat(chosen).filter(pl.col("coefficient") != 0)  # what is off was not switched on
    return rows.select("layer", "neuron", "increase").unique(maintain_order=True)


@dataclass(frozen=True)
class _Written:
    """Vectors of one kind that a layer wrote below a neuron, their shares of it, and how one of them is made."""

    kind: str
    layer: int
    shares: Float[Tensor, " query"]
    vector: Callable[[int], Float[Tensor, " width"]]


def _queries_of(
    prediction: TracedPrediction, memory: Switches, below: Sequence[_Written], increase: float
) -> list[tuple[object, ...]]:
    """The rows of one neuron: the largest shares, its key's bias, and what is left."""
    stream, position, count = prediction.stream, prediction.position, prediction.sources
    pieces = prediction.words.pieces(stream.read_tokens.tolist())
    cells = Cells(tuple(len(written.shares) for written in below))
    shares = torch.cat([written.shares for written in below])
    largest = shares.abs().topk(min(ROWS, len(shares))).indices
    largest = largest[shares[largest] != 0]
    gate = stream.layers[memory.layer].gate[position, memory.neurons[0]]
    known = torch.stack([memory.share.bias[0], memory.coefficient[0].float(), gate.float()]).tolist()
    shown, coefficient, pre_activation = known
    address = memory.layer, int(memory.neurons[0])

    def row(query: tuple[object, ...], share: float, values: Sequence[float]) -> tuple[object, ...]:
        gate, up, inner = values
        credit = increase * share / coefficient if coefficient else 0.0
        branches = (gate, up if memory.up is not None else None)
        return *address, *query, share, *branches, inner, inner * increase, credit

    places = [each.tolist() for each in cells.place(largest.cpu().numpy())]
    vectors = [below[place].vector(unit) for place, unit in zip(*places, strict=True)]
    branches = _branches(memory, torch.stack(vectors)) if vectors else []
    rows = []
    for place, unit, share, values in zip(*places, shares[largest].tolist(), branches, strict=True):
        kind, layer = below[place].kind, below[place].layer
        named: tuple[object, ...] = (kind, None if kind == "embedding" else layer, None, None, None)
        if kind == "head":
            named = (kind, layer, unit // count, unit % count, pieces[unit % count])
        elif kind == "neuron":
            named = (kind, layer, unit, None, None)
        shown += share
        rows.append(row(named, share, values))
    none = (None, None, None, None)
    (bias,) = _branches(memory, None)
    if any(bias):
        rows.append(row(("key bias", *none), known[0], bias))
    whole = (coefficient, coefficient, pre_activation)
    left = [all_of - sum(each) - fixed for all_of, fixed, *each in zip(whole, bias, *branches, strict=True)]
    rows.append(row(("remainder", *none), coefficient - shown, left))
    return rows


def _branches(memory: Switches, vectors: Float[Tensor, "query width"] | None) -> list[list[float]]:
    """Shares of each vector by the gate alone and by the other branch alone, and the inner product with the key; 0 if
    plain. Of no vectors those of the bias."""
    branches = (memory.gate, memory.up, memory.inner)
    read = [
        None if linear is None else linear.bias if vectors is None else linear.of(vectors)[:, 0]
        for linear in branches
    ]
    like = next(each for each in read if each is not None)
    return torch.stack([torch.zeros_like(like) if each is None else each for each in read], -1).tolist()


def _below(
    prediction: TracedPrediction, memory: Switches, neurons: Sequence[Float[Tensor, " _"]]
) -> Iterator[_Written]:
    """Every vector below a neuron; `neurons` are the shares of those of each layer below it."""
    stream, position = prediction.stream, prediction.position
    yield _vectors("embedding", 0, memory, prediction.points[:1])
    # In parallel blocks the FFN does not read the attention beside it (G5).
    for layer in range(memory.layer + (not stream.anatomy.parallel)):
        block = stream.anatomy.layers[layer]
        yield _vectors("head", layer, memory, prediction.attention(layer).flatten(0, 1))
        yield _vectors(block.beside_heads, layer, memory, stream.attention_bias(layer, position)[None])
        if layer < memory.layer:
            made = partial(_neuron, stream, layer, position)
            yield _Written("neuron", layer, neurons[layer], made)
            yield _vectors(block.beside_neurons, layer, memory, stream.ffn_bias(layer, position)[None])


def _below_units(prediction: TracedPrediction, memory: Switches) -> Iterator[_Written]:
    """Every vector that a unit which is no neuron reads: by units where they stand for what heads or FFN wrote.

    What units of the residual stream read, and what units read of the very update that they stand for, is told by heads
    and FFNs: units would be said to switch themselves on.
    """
    stream, position, anatomy = prediction.stream, prediction.position, prediction.stream.anatomy
    updates, point = updates_read(anatomy, memory.layer), writes(anatomy)
    own = 2 * memory.layer + POINTS[point].stage
    if updates.start == 0:
        yield _vectors("embedding", 0, memory, prediction.points[:1])
    for step in updates:
        layer, half = divmod(step, 2)
        rebuilt = step != own and rebuilt_at(stream, step)
        if not half and not rebuilt:
            yield _vectors("head", layer, memory, stream.heads_written(layer, position).flatten(0, 1))
        for kind, _, vector in beside_update(stream, step, position, rebuilt):
            yield _vectors(kind, layer, memory, vector[None])
    others = () if point in RESIDUAL else range(anatomy.n_layers)
    read = range(updates.start, min(updates.stop, own))
    for layer in (other for other in others if anatomy.layers[other].units is not None):
        shares = unit_shares(stream, layer, position, memory.share.key[0], read)
        yield _Written("neuron", layer, shares, partial(_unit, stream, layer, position, read))


def _vectors(kind: str, layer: int, memory: Switches, vectors: Float[Tensor, "query width"]) -> _Written:
    return _Written(kind, layer, memory.share.of(vectors)[:, 0], vectors.__getitem__)


def _neuron(stream: Stream, layer: int, position: int, neuron: int) -> Float[Tensor, " width"]:
    return stream.neuron_parts(layer, position, torch.tensor([neuron]))[0]


def _unit(stream: Stream, layer: int, position: int, updates: range, unit: int) -> Float[Tensor, " width"]:
    return unit_parts(stream, layer, position, torch.tensor([unit]), updates)[0]


def chained(
    prediction: TracedPrediction, neurons: pl.DataFrame, heads: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The frames of neurons and heads with a column ``chain``: A63 over the shown neurons, leave-one-out as C.

    The column is null where the stream is normalised on the way, and of units that are not neurons.
    """
    anatomy = prediction.stream.anatomy
    if anatomy.of_units or not anatomy.adds_up_as_read:
        nothing = pl.lit(None, pl.Float64).alias("chain")
        before = neurons.columns.index("promotes")
        columns = [*neurons.columns[:before], nothing, *neurons.columns[before:]]
        return neurons.select(columns), heads.with_columns(nothing)
    cells = Cells(anatomy.sizes)
    shown = torch.as_tensor(cells.cell(neurons["layer"], neurons["neuron"]))
    scores = torch.zeros(len(cells))
    scores[shown] = torch.tensor(neurons["leave_one_out"].to_list(), dtype=scores.dtype)
    recursive = chain(prediction.stream, prediction.position, scores)
    totals = recursive.total[shown].double().tolist()
    brought = [
        prediction.attention(layer)[head, source] @ recursive.pull[layer + anatomy.parallel]
        for layer, head, source in heads.select("layer", "head", "source").iter_rows()
    ]
    more = torch.stack(brought).tolist() if brought else []
    earned = [left + each for left, each in zip(heads["leave_one_out"], more, strict=True)]
    column = neurons.columns.index("promotes")
    return (
        neurons.insert_column(column, pl.Series("chain", totals, pl.Float64)),
        heads.with_columns(pl.Series("chain", earned, pl.Float64)),
    )


def score_row(prediction: TracedPrediction) -> Float[Tensor, " width"]:
    """The row that scores a vector for the target by a dot product: its logit minus the first foil's.

    Without a foil, minus the expected logit: the gradient of log p(target). With the statistic of the final residual
    under own and frozen.
    """
    bases: ResidualBases = prediction.bases
    row = bases.gradient(prediction.final, prediction.foils[0] if prediction.foils else None)[None]
    if prediction.lens.name != "raw" and prediction.lens.norm is not None:
        row = adjoint(prediction.lens.norm, prediction.scale, row)
    return row[0]


def attention_queries(prediction: TracedPrediction) -> pl.DataFrame:
    """The frame `attention_queries`: the sub-value with the highest score, and where it got that (A52-A54).

    It is empty where the stream is normalised on the way, of units that are not neurons, and in an encoder-decoder,
    where what a cross attention carries is the encoder's.
    """
    names = ["layer", "source", "source_token", "point", "recomputed", "fixed"]
    kinds = [pl.Int32, pl.Int32, pl.String, pl.String, pl.Float64, pl.Float64]
    schema = dict(zip(names, kinds, strict=True))
    anatomy = prediction.stream.anatomy
    if anatomy.of_units or not anatomy.adds_up_as_read or prediction.stream.encoded:
        return pl.DataFrame(schema=schema)
    row = score_row(prediction)
    scores = torch.stack([prediction.attention(layer).sum(0) @ row for layer in range(prediction.layers)])
    layer, source = divmod(int(scores.argmax()), scores.shape[1])
    vectors = origins(
        prediction.stream, layer, prediction.position, source, lambda vector: float(vector @ row)
    )
    piece = prediction.words.pieces(prediction.stream.tokens.tolist())[source]
    rows = [(layer, source, piece, origin.point, origin.recomputed, origin.fixed) for origin in vectors]
    return pl.DataFrame(rows, schema, orient="row")
