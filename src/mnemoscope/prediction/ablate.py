"""An ablation shows what really happens when a neuron or a head x source is taken out of a forward pass (A79).

Accounting asks what a vector did to the end of the stream with everything else as it was; ablation lets everything
downstream react. Each row of a batch is the same prompt with one thing ablated, at one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemoscope.model.experts import Listener, Routed, listen
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.model.watch import hooked, observed
from mnemoscope.records import NeuronId
from mnemoscope.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BATCH_TOKENS = 512  # rows x tokens of one forward pass

_SCHEMA = {
    "kind": pl.String,
    "layer": pl.Int32,
    "unit": pl.Int32,
    "source": pl.Int32,
    "source_token": pl.String,
    "how": pl.String,
    "increase": pl.Float64,
    "leave_one_out": pl.Float64,
    "effect": pl.Float64,
}
NO_ABLATIONS = pl.DataFrame(schema=_SCHEMA)


@dataclass(frozen=True)
class Cut:
    """One ablation at the last position.

    unit    a neuron, or a head when `source` is given: what the head takes from that position becomes zero
    value   what the neuron's coefficient becomes
    """

    layer: int
    unit: int
    source: int | None = None
    value: float = 0.0


def effects(model: Model, stream: Stream, target: int, cuts: Sequence[Cut]) -> Float[np.ndarray, " cut"]:
    """log p(target) minus log p(target) with each cut made, at the end of the traced sequence; nats.

    Row 0 of every batch is left whole, so that a difference is never one between batch sizes.
    """
    differences: list[float] = []
    for logits in _batches(model, stream, [[cut] for cut in cuts]):
        scores = logits.double().log_softmax(-1)[:, target]
        differences += (scores[0] - scores[1:]).tolist()
    return np.asarray(differences)


def without(
    model: Model, stream: Stream, groups: Sequence[Sequence[Cut]]
) -> Iterator[tuple[Float[Tensor, " vocabulary"], Float[Tensor, "group vocabulary"]]]:
    """Logits at the end of the traced sequence as it is, and with all cuts of each group made at once; by batches."""
    for logits in _batches(model, stream, groups):
        yield logits[0], logits[1:]


def _batches(
    model: Model, stream: Stream, groups: Sequence[Sequence[Cut]]
) -> Iterator[Float[Tensor, "row vocabulary"]]:
    """Logits of batches: row 0 with nothing cut, then a row for each group."""
    size = max(1, BATCH_TOKENS // len(stream.tokens) - 1)
    for start in range(0, len(groups), size):
        batch = groups[start : start + size]
        tokens = stream.tokens.expand(len(batch) + 1, -1)
        handles = _hooks(stream, batch)
        watched = observed(model.hf, upcast=stream.upcast, attention=stream.anatomy.attention)
        with torch.inference_mode(), hooked(handles), watched:
            logits = model.hf(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        yield logits


Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]
Change = Callable[[Stream, Tensor, Cut], None]  # of what a module reads at the last position, in place


def _hooks(stream: Stream, groups: Sequence[Sequence[Cut]]) -> list[Any]:
    by_module: dict[tuple[int, bool], list[tuple[int, Cut]]] = {}
    for row, cuts in enumerate(groups, start=1):
        for cut in cuts:
            by_module.setdefault((cut.layer, cut.source is None), []).append((row, cut))
    handles, count = [], len(groups) + 1
    for (layer, is_neuron), rows in by_module.items():
        block = stream.anatomy.layers[layer]
        if not is_neuron:
            assert block.attention_out is not None, "a source was chosen in a layer without attention"
            handles.append(
                block.attention_out.register_forward_pre_hook(_hook(stream, count, rows, _drop_source))
            )
            continue
        routed = 0 if block.experts is None else block.experts.count * block.experts.width
        if block.experts is not None:
            handles.append(listen(block.experts.module, _listener(stream, block.experts.width, rows)))
        shared = [(row, replace(cut, unit=cut.unit - routed)) for row, cut in rows if cut.unit >= routed]
        if shared and block.down is not None:
            handles.append(
                block.down.register_forward_pre_hook(_hook(stream, count, shared, _set_coefficient))
            )
    return handles


def _listener(stream: Stream, width: int, rows: Sequence[tuple[int, Cut]]) -> Listener:
    """Sets coefficients of experts at the last position; where that was not routed to an expert, there are none."""

    def change(piece: Routed) -> Tensor | None:
        inside = [(row, cut) for row, cut in rows if cut.unit // width == piece.expert]
        if not inside:
            return None
        changed = piece.coefficients.clone()
        for row, cut in inside:
            last = (row + 1) * len(stream.tokens) - 1
            changed[piece.tokens == last, cut.unit % width] = cut.value
        return changed

    return change


def _hook(stream: Stream, count: int, rows: Sequence[tuple[int, Cut]], change: Change) -> Hook:
    """Changes what a module reads at the last position of some of ``count`` sequences.

    OPT flattens contexts and tokens; the layers of Gemma 4 that share keys and values run on the last position alone.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = inputs[0].clone()
        flat = changed.view(count, -1, changed.shape[-1])
        for row, cut in rows:
            change(stream, flat[row, -1], cut)
        return (changed, *inputs[1:])

    return hook


def _set_coefficient(_: Stream, coefficients: Tensor, cut: Cut) -> None:
    coefficients[cut.unit] = cut.value


def _drop_source(stream: Stream, values: Tensor, cut: Cut) -> None:
    # Nothing before this layer was touched, so its weights and values are those of the trace.
    traced = stream.layers[cut.layer]
    taken = traced.alpha[cut.unit, -1, cut.source] * traced.value[cut.unit, cut.source]
    if traced.mixed_gate is not None:
        taken = taken * traced.mixed_gate[-1].unflatten(-1, (stream.anatomy.n_heads, -1))[cut.unit]
    values.view(stream.anatomy.n_heads, stream.anatomy.head_dim)[cut.unit] -= taken.to(values.dtype)


def ablate_top(
    model: Model,
    stream: Stream,
    target: int,
    frames: Mapping[str, pl.DataFrame],
    words: Vocabulary,
    count: int,
    to: str | float,
    run: Run | None,
) -> pl.DataFrame:
    """The frame `ablations`: the ``count`` neurons and heads x sources with the largest |leave_one_out|."""
    pieces = words.pieces(stream.tokens.tolist())
    rows: list[list[object]] = []
    cuts: list[Cut] = []
    best = pl.col("leave_one_out").abs()
    for kind, unit in (("neurons", "neuron"), ("heads", "head")):
        largest = frames[kind].sort(best, descending=True, maintain_order=True).head(count)
        for row in largest.iter_rows(named=True):
            source = row.get("source")
            value, how = (0.0, "zero") if source is not None else _value(to, run, row["layer"], row["neuron"])
            cuts.append(Cut(row["layer"], row[unit], source, value))
            piece = None if source is None else pieces[source]
            measured = [row["increase"], row["leave_one_out"]]
            rows.append([unit, row["layer"], row[unit], source, piece, how, *measured])
    changes = effects(model, stream, target, cuts)
    return pl.DataFrame(
        [[*row, effect] for row, effect in zip(rows, changes, strict=True)], _SCHEMA, orient="row"
    )


def _value(to: str | float, run: Run | None, layer: int, neuron: int) -> tuple[float, str]:
    if to == "mean":
        assert run is not None, "a mean needs a run; explain() checks this"
        rows = run.rows("neurons", *NeuronId(layer, neuron))
        return float(rows["mean"][0]), "mean"
    return (0.0, "zero") if to == "zero" else (float(to), "value")
