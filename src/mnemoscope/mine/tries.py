"""What mining a text and reading values take of a model on this device, from a little of both.

A few layers of the model are run, all of those that differ in kind among them, and the others take what those of their
kind take.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope import memory
from mnemoscope.mine import values
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.model.outline import of_first_layers
from mnemoscope.model.parts import Anatomy, Layer
from mnemoscope.records import ContextBatch
from mnemoscope.text.plan import BATCH_TOKENS, Plan

SECONDS = 4.0  # that mining is tried, and reading values
LAYERS = 3  # that are run at least: the first, one that follows another, and one more
_FIRST = 64  # tokens, or neurons, of a first try, which warms up


def layers_to_try(parts: Anatomy) -> int:
    """How many of the first layers show what all of them take.

    All, where passes do not go through layers once and one after another, or other units than neurons are read.
    """
    if parts.stacks or parts.of_units or any(layer.turn[1] > 1 for layer in parts.layers):
        return parts.n_layers
    kinds, seen = [_kind(layer) for layer in parts.layers], 0
    least = 1 + max(kinds.index(kind) for kind in set(kinds))
    for number, size in enumerate(parts.sizes, 1):
        seen += size > 0
        if number >= least and size and seen >= LAYERS:
            return number
    return parts.n_layers


def _kind(layer: Layer) -> tuple[Any, ...]:
    """What layers that take the same time have alike."""
    return layer.groups, layer.attention is None, layer.mixer is None


@dataclass(frozen=True)
class MiningTry:
    """What mining takes on this device, of all layers.

    tries      (tokens with their padding, seconds) of batches, or of what was cut off from them
    whole      how many of these, the last ones, were whole batches
    once       seconds of what is done once: null units, and what is compiled or touched for the first time
    shard      seconds at the end of a shard
    saving, loading, adding  seconds of a state: to write it, to read it, and to add another to it
    batch      bytes that a batch takes at most, and `on_device` those on an accelerator
    nulls      bytes of null units
    beside     bytes that the process holds beside its model, null units and what is mined: libraries
    routed     which share of the tokens goes to an expert, on average; 1 of a dense model
    signed     whether coefficients are of both signs
    """

    tries: tuple[tuple[int, float], ...]
    whole: int
    once: float
    shard: float
    saving: float
    loading: float
    adding: float
    batch: int
    on_device: int
    nulls: int
    beside: int
    routed: float
    signed: bool

    def seconds(self, padded: int, batches: int) -> float:
        """Of a text of so many tokens, padding included, in so many batches.

        By whole batches where there were any, whose later half stands for all that are not tried, because lists fill at
        first; else so much for each batch, and for each token.
        """
        if self.whole:
            tried = self.tries[-self.whole :]
            tokens, spent = (sum(column) for column in zip(*tried, strict=True))
            later, taken = (sum(column) for column in zip(*tried[len(tried) // 2 :], strict=True))
            return spent / tokens * min(padded, tokens) + taken / later * max(0, padded - tokens)
        (few, short), (many, long) = self.tries[0], max(self.tries)
        each = (long - short) / (many - few) if many > 1.5 * few and long > short else long / many
        return each * padded + max(0.0, long - each * many) * batches


class _Clocked:
    """A state that notes when it was done with each layer."""

    def __init__(self, state: RunStatistics) -> None:
        self._state = state
        self.ends: dict[int, float] = {}

    def update(self, layer: int, *signals: Any) -> None:
        """As of `RunStatistics`."""
        self._state.update(layer, *signals)
        self.ends[layer] = time.perf_counter()

    def update_rows(self, rows: LayerRows, batch: ContextBatch) -> None:
        """As of `RunStatistics`."""
        self._state.update_rows(rows, batch)
        self.ends[rows.layer] = time.perf_counter()


class _Miner:
    """The first layers of a model, swept as in a build."""

    def __init__(self, model: Model, parts: Anatomy, recipe: Mapping[str, Any] | None, top: int) -> None:
        """`parts` are those of the model whose price is asked; the layers of `model` are the first of these."""
        self._model, self._parts = model, parts
        self.nulls = Nulls.of(model, recipe)
        self.state = RunStatistics.of(model, self.nulls, top)
        states = (each.state() for each in self.state.by_kind.values())
        self.bytes = sum(
            array.nbytes for state in states for array in state.values()
        )  # before anything is mined

    def sweep(self, capture: Capture, batch: ContextBatch) -> float:
        """Seconds of a batch, of all layers."""
        clocked, begin = _Clocked(self.state), time.perf_counter()
        capture.sweep(batch, clocked.update, clocked.update_rows, self.state.update_rebuilt)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return self._of_all(begin, clocked.ends, time.perf_counter())

    def _of_all(self, begin: float, ends: Mapping[int, float], end: float) -> float:
        """What comes before the first layer counts once, and for each other layer what those of its kind took."""
        if self._model.anatomy.n_layers == self._parts.n_layers or len(ends) < 2:
            return end - begin
        times = np.diff([begin, *ends.values(), end])
        taken: dict[tuple[Any, ...], list[float]] = {}
        for layer, seconds in zip(list(ends)[1:], times[1:-1].tolist(), strict=True):
            taken.setdefault(_kind(self._parts.layers[layer]), []).append(seconds)
        usual = fmean(times[1:-1].tolist())
        later = [layer for layer, size in enumerate(self._parts.sizes) if size][1:]
        return float(times[0] + times[-1]) + sum(
            fmean(taken.get(_kind(self._parts.layers[layer]), [usual])) for layer in later
        )


def try_mining(
    model: Model, parts: Anatomy, recipe: Mapping[str, Any] | None, top: int, plan: Plan, scratch: Path
) -> MiningTry:
    """Mine batches of the first shard, in a drawn order and cut where they would take too long; save the state, and
    read it.

    model  of the first of the layers in `parts`
    """
    begin = time.perf_counter()
    miner = _Miner(model, parts, recipe, top)
    share = _share(parts, model.anatomy)
    made = (time.perf_counter() - begin) / share
    batches = list(plan.batches(0))
    random.Random(0).shuffle(batches)
    tries, whole, grown, spent = [], 0, 0, 0.0
    with Capture(model) as capture:
        first = _cut(batches[0], _FIRST)
        cold = miner.sweep(capture, first)  # what is compiled, and memory that is touched for the first time
        once = _chosen(miner.state)  # the same contexts are mined again, and count as one elsewhere
        held = memory.resident() - _weights(model) - _null_bytes(miner.nulls) - miner.bytes
        tries.append((first.tokens.size, miner.sweep(capture, first)))
        for batch in batches:
            size, seconds = tries[-1]
            left = (SECONDS / share - spent) * size / seconds
            piece = batch if batch.tokens.size <= 3 * left else _cut(batch, max(_FIRST, int(left)))
            if whole and piece is not batch:
                break
            with memory.growth() as more:
                seconds = miner.sweep(capture, piece)
            tries.append((piece.tokens.size, seconds))
            whole += piece is batch
            largest = max(piece.tokens.size, min(BATCH_TOKENS, batch.tokens.size))
            grown = max(grown, more[0] * largest // piece.tokens.size)
            spent += seconds
            if spent >= SECONDS / share:
                break
    state, file = miner.state, scratch / "state.npz"
    shard, _ = _timed(lambda: state.finish_shard(0))
    saving, _ = _timed(lambda: state.save(file))
    loading, other = _timed(lambda: RunStatistics.load(miner.nulls, file))
    fresh = RunStatistics.of(model, miner.nulls, top)
    fresh.finish_shard(1)
    adding, _ = _timed(lambda: fresh.merge(other))
    return MiningTry(
        tries=tuple(tries),
        whole=whole,
        once=made + max(0.0, cold - tries[0][1]),
        shard=shard / share,
        saving=saving / share,
        loading=loading / share,
        adding=adding / share,
        batch=grown,
        on_device=_on_device(model.device),
        nulls=round(_null_bytes(miner.nulls) / share),
        beside=max(0, held),
        routed=_routed(state, _chosen(state) - once),
        signed=_signed(state),
    )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = work()
    return time.perf_counter() - begin, made


def _share(parts: Anatomy, tried: Anatomy) -> float:
    """Which share of the neurons is in the layers that are tried."""
    return sum(tried.sizes) / sum(parts.sizes)


def _on_device(device: torch.device) -> int:
    """Bytes of an accelerator that were in use at most, beside what is in use now."""
    if device.type != "cuda":
        return 0
    return max(0, torch.cuda.max_memory_reserved(device) - torch.cuda.memory_allocated(device))


def _weights(model: Model) -> int:
    """Bytes in this machine's memory of weights that have numbers of their own."""
    held = {weight.untyped_storage().data_ptr(): weight for weight in model.hf.parameters()}
    return sum(weight.untyped_storage().nbytes() for weight in held.values() if weight.device.type == "cpu")


def _null_bytes(nulls: Nulls) -> int:
    """Of the tensors of null units, and of the copy of a model whose weights were shuffled."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for each in value.values():
                walk(each)
        elif isinstance(value, Model):
            for weight in value.hf.parameters():
                walk(weight)
        elif type(value).__module__ == Nulls.__module__:
            walk(vars(value))

    for source in nulls._sources.values():
        walk(source)
    return sum(seen.values())


def _chosen(state: RunStatistics) -> np.ndarray:
    """i64[layer]: how often an expert was chosen, shared ones left out."""
    neurons = state.neurons
    counts = [
        neurons.routing.tokens[layer, :count].sum() if count else 0
        for layer, (count, _) in enumerate(neurons.cells.experts)
    ]
    return np.array(counts, np.int64)


def _routed(state: RunStatistics, chosen: np.ndarray) -> float:
    """The router gives each token to so many of the experts, whatever its weights."""
    neurons = state.neurons
    shares = [
        chosen[layer] / (count * neurons.moments.tokens[:, layer].sum())
        for layer, (count, _) in enumerate(neurons.cells.experts)
        if count and neurons.moments.tokens[:, layer].sum()
    ]
    return fmean(map(float, shares)) if shares else 1.0


def _signed(state: RunStatistics) -> bool:
    return bool((state.neurons.moments.minimum < 0).any())


def _cut(batch: ContextBatch, tokens: int) -> ContextBatch:
    """A batch of about so many tokens, padding included, with the first contexts or the beginning of one."""
    size = batch.tokens.size if batch.targets is None else batch.tokens.size + batch.targets.tokens.size
    if size <= tokens:
        return batch
    length = min(batch.tokens.shape[1], max(tokens, 8))
    rows = slice(0, max(1, tokens // length))
    targets = None if batch.targets is None else _cut(replace(batch.targets, targets=None), tokens // 2)
    if targets is not None:
        rows = slice(0, min(rows.stop, len(targets.contexts)))
        targets = _rows(targets, rows, targets.tokens.shape[1])
    return replace(_rows(batch, rows, length), targets=targets)


def _rows(batch: ContextBatch, rows: slice, length: int) -> ContextBatch:
    return ContextBatch(
        batch.contexts[rows],
        batch.tokens[rows, :length],
        np.minimum(batch.lengths[rows], length).astype(np.int32),
        batch.counted[rows, :length],
    )


# -- values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadingTry:
    """What reading values and keys takes: seconds once, and of all neurons; bytes at most, and those on an
    accelerator."""

    once: float
    each: float
    bytes: int
    on_device: int

    def seconds(self, share: float) -> float:
        """Of so much of the neurons."""
        return self.once + self.each * share if share else 0.0


def try_reading(model: Model, parts: Anatomy) -> ReadingTry:
    """Read some of a layer's values through the whole vocabulary, and all of its keys through a part of it.

    model  of the first of the layers in `parts`
    """
    taken = _read(model, parts)
    return ReadingTry(*taken, _on_device(model.device))


def _read(model: Model, parts: Anatomy) -> tuple[float, float, int]:
    layer = max(model.cells.layers, key=lambda index: model.anatomy.sizes[index])
    block, stack = model.anatomy.layers[layer], model.anatomy.stack_of(layer)
    width = model.anatomy.sizes[layer]
    with memory.growth() as grown, torch.inference_mode():
        once, (lens, vectors) = _timed(
            lambda: (Lens.of(stack, values.LENS, values.PROJECTION), values.bare_tokens(model, stack))
        )
        outwards, rows = _timed(lambda: stack.outward(values.value_vectors(block)))
        norms, _ = _timed(lambda: [values._norms(each) for each in (block.values(), block.keys())])
        of_values = _tried(lambda count: values._read_values(lens, rows[:count]), width)
        of_keys = _tried(
            lambda count: values._read_keys(model, block, vectors[:count], torch.arange(width)), len(vectors)
        )
    return once, (outwards + norms + of_values + of_keys) * sum(parts.sizes) / width, grown[0]


def _tried(work: Callable[[int], Any], whole: int) -> float:
    """Seconds that `work` would take of `whole`, a line through what two parts of it take."""
    count, before = min(whole, _FIRST), (0, 0.0)
    work(count)
    while True:
        seconds, _ = _timed(partial(work, count))
        if count == whole:
            return seconds
        if seconds > SECONDS / 4:
            each = max(0.0, seconds - before[1]) / (count - before[0])
            return seconds + each * (whole - count)
        before = (count, seconds)
        count = min(whole, max(2 * count, int(count * SECONDS / 2 / max(seconds, 1e-3))))


def of_tried_layers(model: Model) -> Model:
    """The model, of no more layers than are tried."""
    count = layers_to_try(model.anatomy)
    return model if count == model.anatomy.n_layers else of_first_layers(model, count)
