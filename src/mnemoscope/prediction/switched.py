"""Frames that say what switched on the neurons that matter, and where the best attention sub-value got its content."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.prediction.bases import ResidualBases
from mnemoscope.prediction.switching import Linear, Switches, adjoint, chain, neuron_shares, origins, switches
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

    It is empty where the stream is normalised on the way, as a part is known as what becomes of it at the end, and of
    units that are not neurons.
    """
    if not prediction.stream.anatomy.tells_switches:
        return pl.DataFrame(schema=_SCHEMA)
    stream, position = prediction.stream, prediction.position
    chosen = list(_important(neurons, most).iter_rows())
    memories = [switches(stream, layer, position, torch.tensor([neuron])) for layer, neuron, _ in chosen]
    rows: list[tuple[object, ...]] = []
    if chosen:
        keys = torch.cat([memory.share.key for memory in memories])
        # One pass over the values of the model for all of them.
        below = [
            neuron_shares(stream, layer, position, keys)
            for layer in range(max(layer for layer, *_ in chosen))
        ]
        for column, (memory, (*_, increase)) in enumerate(zip(memories, chosen, strict=True)):
            rows += _queries_of(prediction, memory, [shares[:, column] for shares in below], increase)
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


def _queries_of(
    prediction: TracedPrediction, memory: Switches, below: list[Float[Tensor, " neuron"]], increase: float
) -> list[tuple[object, ...]]:
    """The rows of one neuron: the largest shares, its key's bias, and what is left."""
    stream, position, count = prediction.stream, prediction.position, prediction.sources
    pieces = prediction.words.pieces(stream.read_tokens.tolist())
    kinds, shares = _all_shares(prediction, memory, below)
    largest = shares.abs().topk(min(ROWS, len(shares))).indices.tolist()
    rows, shown = [], float(memory.share.bias[0])
    coefficient, sums = float(memory.coefficient[0]), torch.zeros(3, dtype=torch.float64)
    address = memory.layer, int(memory.neurons[0])

    def row(query: tuple[object, ...], share: float, values: Tensor) -> tuple[object, ...]:
        gate, up, inner = values.tolist()
        credit = increase * share / coefficient if coefficient else 0.0
        branches = (gate, up if memory.up is not None else None)
        return *address, *query, share, *branches, inner, inner * increase, credit

    for index in (number for number in largest if shares[number] != 0):
        start, kind, layer = next(block for block in reversed(kinds) if block[0] <= index)
        unit = index - start
        if kind == "head":
            vector = prediction.attention(layer).flatten(0, 1)[unit]
            named: tuple[object, ...] = (kind, layer, unit // count, unit % count, pieces[unit % count])
        else:
            vector = _vector(prediction, kind, layer, unit)
            written_in = None if kind == "embedding" else layer
            named = (kind, written_in, unit if kind == "neuron" else None, None, None)
        values = _branches(memory, partial(Linear.of, queries=vector[None]))
        sums += values
        shown += float(shares[index])
        rows.append(row(named, float(shares[index]), values))
    none = (None, None, None, None)
    bias = _branches(memory, lambda linear: linear.bias)
    if bool(bias.any()):
        rows.append(row(("key bias", *none), float(memory.share.bias[0]), bias))
    gate = prediction.stream.layers[memory.layer].gate[position, memory.neurons[0]]
    whole = torch.tensor([coefficient, coefficient, float(gate)], dtype=torch.float64)
    rows.append(row(("remainder", *none), coefficient - shown, whole - sums - bias))
    return rows


def _branches(memory: Switches, read: Callable[[Linear], Tensor]) -> Tensor:
    """Shares by the gate alone and by the other branch alone, and the inner product with the key; 0 if plain."""
    branches = (memory.gate, memory.up, memory.inner)
    values = [0.0 if linear is None else float(read(linear)) for linear in branches]
    return torch.tensor(values, dtype=torch.float64)


def _vector(prediction: TracedPrediction, kind: str, layer: int, unit: int) -> Float[Tensor, " width"]:
    stream, position = prediction.stream, prediction.position
    if kind == "embedding":
        return prediction.points[0]
    if kind == "neuron":
        return stream.neuron_parts(layer, position, torch.tensor([unit]))[0]
    fixed = stream.ffn_bias if kind in ("ffn bias", "per-layer input") else stream.attention_bias
    return fixed(layer, position)


def _all_shares(
    prediction: TracedPrediction, memory: Switches, below: list[Float[Tensor, " neuron"]]
) -> tuple[list[tuple[int, str, int]], Float[Tensor, " query"]]:
    """Every vector below a neuron and its share; ``kinds`` says where each kind and layer begins."""
    stream, position = prediction.stream, prediction.position
    kinds, parts, size = [(0, "embedding", 0)], [memory.share.of(prediction.points[:1])[:, 0]], 1

    def add(kind: str, layer: int, shares: Tensor) -> None:
        nonlocal size
        kinds.append((size, kind, layer))
        parts.append(shares)
        size += len(shares)

    # In parallel blocks the FFN does not read the attention beside it (G5).
    for layer in range(memory.layer + (not stream.anatomy.parallel)):
        add("head", layer, memory.share.of(prediction.attention(layer).flatten(0, 1))[:, 0])
        beside = stream.anatomy.layers[layer].beside_heads
        add(beside, layer, memory.share.of(stream.attention_bias(layer, position)[None])[:, 0])
        if layer < memory.layer:
            add("neuron", layer, below[layer])
            beside = stream.anatomy.layers[layer].beside_neurons
            add(beside, layer, memory.share.of(stream.ffn_bias(layer, position)[None])[:, 0])
    return kinds, torch.cat(parts)


def chained(
    prediction: TracedPrediction, neurons: pl.DataFrame, heads: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The frames of neurons and heads with a column ``chain``: A63 over the shown neurons, leave-one-out as C.

    The column is null where the stream is normalised on the way, and of units that are not neurons.
    """
    anatomy = prediction.stream.anatomy
    if not anatomy.tells_switches:
        nothing = pl.lit(None, pl.Float64).alias("chain")
        before = neurons.columns.index("promotes")
        columns = [*neurons.columns[:before], nothing, *neurons.columns[before:]]
        return neurons.select(columns), heads.with_columns(nothing)
    cells = Cells(anatomy.sizes)
    shown = torch.from_numpy(cells.cell(neurons["layer"], neurons["neuron"]))
    scores = torch.zeros(len(cells))
    scores[shown] = torch.tensor(neurons["leave_one_out"].to_list(), dtype=scores.dtype)
    recursive = chain(prediction.stream, prediction.position, scores)
    totals = recursive.total[shown].double().tolist()
    earned = []
    for layer, head, source, left in heads.select("layer", "head", "source", "leave_one_out").iter_rows():
        pull = recursive.pull[layer + anatomy.parallel]
        earned.append(left + float(prediction.attention(layer)[head, source] @ pull))
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

    It is empty where the stream is normalised on the way, where units stand for heads, and in an encoder-decoder, where
    what a cross attention carries is the encoder's.
    """
    names = ["layer", "source", "source_token", "point", "recomputed", "fixed"]
    kinds = [pl.Int32, pl.Int32, pl.String, pl.String, pl.Float64, pl.Float64]
    schema = dict(zip(names, kinds, strict=True))
    if not prediction.stream.anatomy.tells_switches or prediction.stream.encoded:
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
