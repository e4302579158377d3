"""An ablation shows what really happens when a neuron or a head x source is taken out of a forward pass (A79).

Accounting asks what a vector did to the end of the stream with everything else as it was; ablation lets everything
downstream react. Each row of a batch is the same prompt with one thing ablated, at one position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mnemoscope.model.experts import Listener, Routed, listen
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, SourceText
from mnemoscope.model.running import hooked, observed
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import heads_are_replaced
from mnemoscope.model.watch import AttentionTrace
from mnemoscope.prediction.unit_cuts import cuts_of_units
from mnemoscope.records import NeuronId
from mnemoscope.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BATCH_TOKENS = 512  # rows x tokens of one forward pass
KEPT_TOKENS = 4096  # rows x tokens whose keys and values are held at once
_REPEATED = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
)  # keys and values alone, which are repeated for every row
_SAME = 1e-5  # of the range of the logits, between reading a prompt whole and going on from what was kept

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
    """One ablation at the last position, or at every one.

    unit    a neuron, or a head when `source` is given: what the head takes from that position becomes zero
    value   what the neuron's coefficient becomes, with `factor` times what it was added
    """

    layer: int
    unit: int
    source: int | None = None
    value: float = 0.0
    factor: float = 0.0
    everywhere: bool = False

    def of(self, coefficient: Tensor) -> Tensor:
        """What a neuron's coefficient becomes."""
        return self.value + self.factor * coefficient


def effects(
    model: Model,
    stream: Stream,
    target: int,
    cuts: Sequence[Cut],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Float[np.ndarray, " cut"]:
    """log p(target) minus log p(target) with each cut made, at the end of the traced sequence; nats.

    tell  called with how many are done, of how many, after each batch

    Row 0 of every batch is left whole, so that a difference is never one between batch sizes.
    """
    differences: list[float] = []
    for logits in _batches(model, stream, [[cut] for cut in cuts]):
        scores = logits.double().log_softmax(-1)[:, target]
        differences += (scores[0] - scores[1:]).tolist()
        tell(len(differences), len(cuts))
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
    """Logits of batches: row 0 with nothing cut, then a row for each group.

    What comes before the last token feels no cut there. It is read once, and every row goes on from the keys and values
    that were kept of it; where a model does not keep them, or does not go on exactly, each row is read whole.
    """
    kept = _kept(model, stream)
    size = max(1, (BATCH_TOKENS if kept is None else KEPT_TOKENS) // len(stream.read_tokens) - 1)
    for start in range(0, len(groups), size):
        yield _last_logits(model, stream, groups[start : start + size], kept)


def _last_logits(
    model: Model, stream: Stream, groups: Sequence[Sequence[Cut]], kept: DynamicCache | None
) -> Float[Tensor, "row vocabulary"]:
    """Logits of one batch at the last token, of whole prompts or of that token after what was kept."""
    rows, tokens, source = len(groups) + 1, stream.tokens, stream.source
    cache: dict[str, Any] = {"use_cache": False}
    watched = observed(model.hf, upcast=stream.upcast, attention=stream.anatomy.attention)
    with torch.inference_mode():
        if kept is not None:
            tokens, past = tokens[-1:], copy.deepcopy(kept)
            past.batch_repeat_interleave(rows)
            cache = {"use_cache": True, "past_key_values": past}
    call = {"input_ids": tokens.expand(rows, -1), "logits_to_keep": 1} | cache
    if source is not None:
        call = stream.anatomy.calling(tokens.expand(rows, -1), source=SourceText(source.expand(rows, -1)))
    with torch.inference_mode(), hooked(cuts_made(stream.anatomy, groups, len(tokens), stream)), watched:
        return model.hf(**call).logits[:, -1]


def _kept(model: Model, stream: Stream) -> DynamicCache | None:
    """Keys and values of all tokens but the last, if from them the model goes on to what it says of the prompt."""
    anatomy = stream.anatomy
    if len(stream.tokens) < 2 or anatomy.of_encoder or any(layer.mixer for layer in anatomy.layers):
        return None
    watched = observed(model.hf, upcast=stream.upcast, attention=anatomy.attention)
    with torch.inference_mode(), watched:
        output = model.hf(input_ids=stream.tokens[None, :-1], use_cache=True, logits_to_keep=1)
    kept = getattr(output, "past_key_values", None)
    if not isinstance(kept, DynamicCache) or not all(type(layer) in _REPEATED for layer in kept.layers):
        return None
    going_on, whole = _last_logits(model, stream, (), kept)[0].float(), stream.logits[-1].float()
    away = (going_on - whole).abs().max()
    return kept if away <= _SAME * (whole.max() - whole.min()) else None


Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]
Change = Callable[[Tensor, Cut], None]  # of what a module reads where the cut is, in place


def cuts_made(
    anatomy: Anatomy, groups: Sequence[Sequence[Cut]], tokens: int, stream: Stream | None = None
) -> list[Any]:
    """Hooks that make the cuts of each row after the first, where a row has so many tokens.

    stream  what was traced of the sequence; needed for cuts of heads
    """
    by_module: dict[tuple[int, bool], list[tuple[int, Cut]]] = {}
    for row, cuts in enumerate(groups, start=1):
        for cut in cuts:
            by_module.setdefault((cut.layer, cut.source is None), []).append((row, cut))
    handles, count = [], len(groups) + 1
    for (layer, is_neuron), rows in by_module.items():
        block = anatomy.layers[layer]
        if is_neuron and block.units is not None:
            handles += cuts_of_units(anatomy, layer, rows, count)
            continue
        if not is_neuron:
            assert stream is not None
            handles += _sources_dropped(stream, layer, rows, count)
            continue
        routed = 0 if block.experts is None else block.experts.count * block.experts.width
        if block.experts is not None:
            inside = [(row, cut) for row, cut in rows if cut.unit < routed]
            handles.append(listen(block.experts.module, _listener(block.experts.width, inside, tokens)))
        shared = [(row, replace(cut, unit=cut.unit - routed)) for row, cut in rows if cut.unit >= routed]
        if shared and block.down is not None:
            handles.append(block.down.register_forward_pre_hook(_hook(count, shared, _set_coefficient)))
    return handles


def _listener(width: int, rows: Sequence[tuple[int, Cut]], tokens: int) -> Listener:
    """Sets coefficients of experts where a cut is; where that was not routed to an expert, there are none."""

    def change(piece: Routed) -> Tensor:
        changed = piece.coefficients.clone()
        for row, cut in rows:
            expert, unit = divmod(cut.unit, width)
            inside = slice(*piece.starts[expert : expert + 2])
            first, last = row * tokens, (row + 1) * tokens - 1
            at = piece.tokens[inside] >= (first if cut.everywhere else last)
            at &= piece.tokens[inside] <= last
            changed[inside][at, unit] = cut.of(changed[inside][at, unit])
        return changed

    return change


def _hook(count: int, rows: Sequence[tuple[int, Cut]], change: Change) -> Hook:
    """Changes what a module reads in some of ``count`` sequences, at the last position or at all.

    OPT flattens contexts and tokens; the layers of Gemma 4 that share keys and values run on the last position alone.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = inputs[0].clone()
        flat = changed.view(count, -1, changed.shape[-1])
        for row, cut in rows:
            change(flat[row] if cut.everywhere else flat[row, -1], cut)
        return (changed, *inputs[1:])

    return hook


def _set_coefficient(coefficients: Tensor, cut: Cut) -> None:
    coefficients[..., cut.unit] = cut.of(coefficients[..., cut.unit])


def _sources_dropped(stream: Stream, layer: int, rows: Sequence[tuple[int, Cut]], count: int) -> list[Any]:
    """Hooks on the output projections of a layer's own heads, and of its cross attention, whose heads follow these."""
    handles, first = [], 0
    for block, traced, encoded in stream.attentions(layer):
        heads = range(first, first + block.n_heads)
        cuts = [(row, replace(cut, unit=cut.unit - first)) for row, cut in rows if cut.unit in heads]
        if cuts:
            assert block.attention_out is not None, "a source was chosen in a layer without attention"
            drop = _hook(count, cuts, partial(_drop_source, traced, encoded))
            handles.append(block.attention_out.register_forward_pre_hook(drop))
        first += block.n_heads
    return handles


def _drop_source(traced: AttentionTrace, before: int, values: Tensor, cut: Cut) -> None:
    # Nothing before this layer was touched, so its weights and values are those of the trace.
    assert cut.source is not None, "what is dropped is what a head takes from a source"
    heads, source = len(traced.alpha), cut.source - before
    taken = traced.alpha[cut.unit, -1, source] * traced.value[cut.unit, source]
    if traced.mixed_gate is not None:
        taken = taken * traced.mixed_gate[-1].unflatten(-1, (heads, -1))[cut.unit]
    values.view(heads, -1)[cut.unit] -= taken.to(values)


def ablate_top(
    model: Model,
    stream: Stream,
    target: int,
    frames: Mapping[str, pl.DataFrame],
    words: Vocabulary,
    count: int,
    to: str | float,
    run: Run | None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> pl.DataFrame:
    """The frame `ablations`: the ``count`` neurons and heads x sources with the largest |leave_one_out|.

    Heads that units stand for are no parts, and not ablated.
    """
    pieces, anatomy = words.pieces(stream.read_tokens.tolist()), stream.anatomy
    first = model.anatomy.stacks[0].n_layers if model.anatomy.stacks else 0  # of the decoder, in a run
    told = [layer for layer in range(anatomy.n_layers) if not heads_are_replaced(anatomy, layer)]
    rows: list[list[object]] = []
    cuts: list[Cut] = []
    best = pl.col("leave_one_out").abs()
    for kind, unit in (("neurons", "neuron"), ("heads", "head")):
        parts = frames[kind] if kind == "neurons" else frames[kind].filter(pl.col("layer").is_in(told))
        largest = parts.sort(best, descending=True, maintain_order=True).head(count)
        for row in largest.iter_rows(named=True):
            source = row.get("source")
            value, how = 0.0, "zero"
            if source is None:
                value, how = _value(to, run, row["layer"] + first, row["neuron"])
            cuts.append(Cut(row["layer"], row[unit], source, value))
            piece = None if source is None else pieces[source]
            measured = [row["increase"], row["leave_one_out"]]
            rows.append([unit, row["layer"], row[unit], source, piece, how, *measured])
    changes = effects(model, stream, target, cuts, tell)
    return pl.DataFrame(
        [[*row, effect] for row, effect in zip(rows, changes, strict=True)], _SCHEMA, orient="row"
    )


def _value(to: str | float, run: Run | None, layer: int, neuron: int) -> tuple[float, str]:
    if to == "mean":
        assert run is not None, "a mean needs a run; explain() checks this"
        rows = run.rows("neurons", *NeuronId(layer, neuron))
        return float(rows["mean"][0]), "mean"
    return (0.0, "zero") if to == "zero" else (float(to), "value")
