"""A trace shows how neurons see one's own text: a pass of the model over it, read by the run's distributions.

With neurons, each is followed along the text. Without, every neuron is looked at, and for each token the most unusual
are kept, layer by layer, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mnemoscope.arguments import check_least
from mnemoscope.errors import QueryError
from mnemoscope.mine import values
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import LayerSignals, Nulls
from mnemoscope.neuron.card import card
from mnemoscope.records import ContextBatch, NeuronId, Progress
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import encode, special_ids, written_tokens
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.tracing.traced import (
    LEVEL,
    Distributions,
    Encoded,
    NeuronReading,
    NeuronTrace,
    Trace,
    TracedToken,
    Unusual,
)

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

WRITES = 6  # tokens that are named of a value


def trace(
    model: Model,
    text: str,
    *,
    run: Run | None = None,
    neurons: Sequence[tuple[int, int]] = (),
    tokens: Sequence[int] | None = None,
    decoder_prompt: str = "",
    top: int = 5,
    report: Callable[[Progress], None] | None = None,
) -> Trace:
    """Trace a text; see `Trace` for what comes back.

    tokens          what the text was read as, special tokens too, as a run keeps its contexts; None to read it here
    run             a run of the same model, whose distributions say what is unusual
    neurons         those to follow; without any, the `top` most unusual at each token
    decoder_prompt  of an encoder-decoder: what its decoder has written so far; without it the encoder alone is traced

    QueryError for a text without two tokens, or with more than the model reads, for a neuron that is not there, for a
    text for a decoder where there is none beside an encoder, and for a `top` below 1; RunMismatch for a run of other
    weights.
    """
    check_least("tracing a text", 1, top=top)
    chosen = [_address(model, neuron, decoder_prompt) for neuron in neurons]
    model = model if decoder_prompt else model.encoder
    batch = _batch(model, text, decoder_prompt) if tokens is None else _context(model, text, list(tokens))
    if run is not None:
        model.check_built(run, "tracing a text by")
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    read = [each for each in (batch, batch.targets) if each is not None]
    ids = [token for each in read for token in each.tokens[0].tolist()]
    counted = [counts for each in read for counts in each.counted[0].tolist()]
    pieces = words.running(ids)
    traced = tuple(
        TracedToken(position, token, piece or words.label(token), counts)
        for position, (token, piece, counts) in enumerate(zip(ids, pieces, counted, strict=True))
    )
    about = Trace(
        model=model.id,
        run=None if run is None else str(run.path),
        corpus=None if run is None else run.manifest.corpus.id,
        text=text,
        tokens=traced,
        neurons=(),
        unusual=(),
        shares={},
        level=None,
        counted=None,
        units=_units(model, run),
        routed=run is not None and bool(run.manifest.model.experts),
    )
    if stacks := model.anatomy.stacks:
        sizes = [sum(stack.sizes) for stack in stacks]
        encoded = Encoded(batch.tokens.shape[1], stacks[0].n_layers, sizes[1])
        about = replace(about, units=sizes[0], encoded=encoded)
    watch = _FollowedNeurons(model, run, about, chosen) if chosen else _UnusualNeurons(model, run, about, top)
    say, layers = report or (lambda _: None), model.anatomy.n_layers

    def receive(layer: int, coefficients: Tensor, batch: ContextBatch, *activity: Any) -> None:
        say(Progress("tracing", layer, layers, "layers"))
        gate, up, inputs = (None if signal is None else signal[0] for signal in activity)
        assert inputs is not None, "a layer reads something"
        positions = about.read_by(model.cells.id(layer, 0))
        watch.see(_Seen(layer, 0, 0, np.array(positions), None, coefficients[0], gate, up, inputs), batch)

    def receive_rows(rows: LayerRows, batch: ContextBatch) -> None:
        say(Progress("tracing", rows.layer, layers, "layers"))
        for piece in rows.each():
            watch.see(_Seen.of(piece), batch)

    last = max(neuron.layer for neuron in chosen) if chosen else None
    with Capture(model, last) as capture:
        capture.sweep(batch, receive, receive_rows)
    say(Progress("tracing", layers, layers, "layers"))
    return watch.result(words)


def _batch(model: Model, text: str, decoder_prompt: str) -> ContextBatch:
    """The text as one context, with the special tokens that the contexts of a run have, and what a decoder reads."""
    (ids,) = encode(model.tokenizer, [text], special=True)
    if not decoder_prompt:
        return _context(model, text, ids)
    if not model.anatomy.stacks:
        raise QueryError(
            f"tracing a text: {model.id} is no encoder-decoder, or its encoder alone was mined, so that it reads "
            "one text; leave {decoder_prompt} out",
            decoder_prompt=decoder_prompt,
        )
    (written,) = written_tokens(model.tokenizer, model.decoder_start, [decoder_prompt])
    return replace(_context(model, text, ids), targets=_context(model, decoder_prompt, written))


def _context(model: Model, text: str, ids: list[int]) -> ContextBatch:
    """Tokens as a batch of one context."""
    if len(ids) > (most := model.anatomy.context_length):
        raise QueryError(
            f"tracing a text: it has {len(ids)} tokens and {model.id} reads at most {most}; shorten it"
        )
    special = special_ids(model.tokenizer)
    counted = np.array([[position > 0 and token not in special for position, token in enumerate(ids)]], bool)
    if not counted.any():
        raise QueryError(
            f"tracing the text {text!r}: none of its {len(ids)} tokens counts, as the first and special tokens never "
            "do; give a longer text"
        )
    return ContextBatch(
        np.zeros(1, np.int64), np.array([ids], np.int32), np.array([len(ids)], np.int32), counted
    )


def _address(model: Model, neuron: tuple[int, int], decoder_prompt: str) -> NeuronId:
    cells, address = model.cells, model.cells.id(*neuron)
    stacks = model.anatomy.stacks
    if stacks and not decoder_prompt and stacks[0].n_layers <= address.layer < model.anatomy.n_layers:
        raise QueryError(
            f"tracing {address}: it is in the decoder of {model.id}, which reads a text of its own; give that text "
            "({decoder_prompt})",
            decoder_prompt=...,
        )
    if not cells.has(*address):
        raise QueryError(f"tracing {address}: out of range; {model.id} has {cells.range_of(address.layer)}")
    return address


def _units(model: Model, run: Run | None) -> int:
    """How many neurons run at a token: all; of a mixture with a run those that run at a counted one, on average."""
    if run is None or not run.manifest.model.experts:
        return len(model.cells)
    tokens = run.table("neurons").select(pl.col("tokens").sum()).collect().item()
    return round(tokens / run.manifest.corpus.counted)


@dataclass(frozen=True)
class _Seen:
    """What neighbouring neurons of a layer did at some tokens: all neurons at all, or those of one expert.

    first      of these neurons in the layer
    positions  i64[row]
    weights    f32[row] of the router, None in a dense layer
    """

    layer: int
    group: int
    first: int
    positions: np.ndarray
    weights: np.ndarray | None
    coefficients: Tensor
    gate: Tensor | None
    up: Tensor | None
    inputs: Tensor

    @classmethod
    def of(cls, rows: LayerRows) -> _Seen:
        """What one expert did."""
        size = len(rows.coefficients)
        positions = np.arange(size) if rows.rows is None else rows.rows.cpu().numpy()
        weight = np.full(size, rows.weight) if isinstance(rows.weight, float) else rows.weight.cpu().numpy()
        gate = None if rows.up is None else rows.gate
        return cls(
            rows.layer,
            rows.group,
            rows.first,
            positions,
            weight,
            rows.coefficients,
            gate,
            rows.up,
            rows.inputs,
        )

    @property
    def neurons(self) -> slice:
        """These neurons among all of the layer."""
        return slice(self.first, self.first + self.coefficients.shape[1])


class _Known:
    """What is known of the neurons of a layer beside their coefficients; of the last layer that was asked for."""

    def __init__(self, model: Model, run: Run | None) -> None:
        self._model, self._run = model, run
        self._layer, self._norms = -1, np.zeros(0)
        self._stored: Distributions | None = None

    def of(self, layer: int) -> tuple[np.ndarray, Distributions | None]:
        """f32[neuron] norms of the values, and the run's distributions if there is one."""
        if self._layer != layer:
            self._layer, self._norms = layer, _norms(self._model, layer)
            self._stored = None if self._run is None else Distributions.of(self._run, layer)
        return self._norms, self._stored


@dataclass(frozen=True)
class _LayerReadings:
    """Some neurons of a layer: what a pass says of them, and what the run knows.

    neurons i64[neuron], coefficients f32[row neuron], norms f32[neuron], gate and up signs i64[row neuron], tails and
    deviations f64[row neuron] where a run has their distributions of `total` coefficients
    """

    seen: _Seen
    neurons: np.ndarray
    coefficients: np.ndarray
    norms: np.ndarray
    gate: np.ndarray | None
    up: np.ndarray | None
    tails: np.ndarray | None = None
    deviations: np.ndarray | None = None
    total: int | None = None

    @classmethod
    def of(cls, known: _Known, seen: _Seen, neurons: Sequence[int] | slice) -> _LayerReadings:
        """The readings of some of the neurons that were seen, by their numbers in the layer."""
        norms, stored = known.of(seen.layer)
        chosen = np.arange(len(norms))[neurons]
        columns = chosen - seen.first
        numbers = _numbers(seen.coefficients)[:, columns]
        gate, up = (None if branch is None else _signs(branch)[:, columns] for branch in (seen.gate, seen.up))
        measured = cls(seen, chosen, numbers, norms[chosen], gate, up)
        if stored is None:
            return measured
        own = stored.only(chosen)
        return replace(
            measured, tails=own.tails(numbers), deviations=own.deviations(numbers), total=stored.total
        )

    def reading(self, about: Trace, neuron: NeuronId, row: int, column: int) -> NeuronReading:
        """The reading of one neuron, which is a column here, at one token."""
        gate, up = (None if branch is None else int(branch[row, column]) for branch in (self.gate, self.up))
        coefficient, position = float(self.coefficients[row, column]), int(self.seen.positions[row])
        weight = None if self.seen.weights is None else float(self.seen.weights[row])
        size = abs(coefficient) * float(self.norms[column]) * (1.0 if weight is None else weight)
        reading = NeuronReading(neuron, position, coefficient, size=size, gate=gate, up=up, weight=weight)
        if self.tails is None or self.deviations is None or not about.tokens[position].counted:
            return reading
        tail, far = float(self.tails[row, column]), float(self.deviations[row, column])
        return replace(
            reading,
            tail=tail,
            expected=tail * about.units_at(position),
            deviations=far if np.isfinite(far) else None,
        )


class _FollowedNeurons:
    """A watch of chosen neurons along the text."""

    def __init__(self, model: Model, run: Run | None, about: Trace, neurons: Sequence[NeuronId]) -> None:
        self._model, self._run, self._about = model, run, about
        self._neurons, self._known = tuple(dict.fromkeys(neurons)), _Known(model, run)
        self._readings = {
            neuron: [NeuronReading(neuron, position, None) for position in about.read_by(neuron)]
            for neuron in self._neurons
        }
        self._total: int | None = None

    def see(self, seen: _Seen, batch: ContextBatch) -> None:
        """Keep the columns of those that are among these."""
        inside = range(seen.neurons.start, seen.neurons.stop)
        followed = [n for n in self._neurons if n.layer == seen.layer and n.neuron in inside]
        if not followed:
            return
        measured = _LayerReadings.of(self._known, seen, [neuron.neuron for neuron in followed])
        self._total = measured.total
        for column, neuron in enumerate(followed):
            first = self._about.read_by(neuron).start
            for row, position in enumerate(seen.positions.tolist()):
                reading = measured.reading(self._about, neuron, row, column)
                self._readings[neuron][position - first] = reading

    def result(self, words: Vocabulary) -> Trace:
        """The trace of each neuron, in the order asked for."""
        followed = tuple(self._neuron(neuron, words) for neuron in self._neurons)
        return replace(self._about, neurons=followed, counted=self._total)

    def _neuron(self, neuron: NeuronId, words: Vocabulary) -> NeuronTrace:
        readings = self._readings[neuron]
        if self._run is None:
            promotes, suppresses = _read(self._model, [neuron], words)[neuron]
            return NeuronTrace(neuron, promotes, suppresses, tuple(readings))
        stored = card(self._run, neuron, examples=0)
        bounds = {1: stored.positive.threshold, -1: stored.negative.threshold}
        promotes, suppresses = (
            tuple(token.text for token in tokens[:WRITES]) for tokens in (stored.promoted, stored.suppressed)
        )
        readings = [
            replace(reading, trigger=_is_trigger(reading.coefficient, bounds)) for reading in readings
        ]
        return NeuronTrace(neuron, promotes, suppresses, tuple(readings), stored)


class _UnusualNeurons:
    """A watch of every neuron, which keeps the most unusual at each token."""

    def __init__(self, model: Model, run: Run | None, about: Trace, top: int) -> None:
        self._model, self._run, self._about, self._top = model, run, about, top
        self._best: list[list[tuple[tuple[float, ...], NeuronReading]]] = [[] for _ in about.tokens]
        self._known = _Known(model, run)
        self._beyond: dict[str, np.ndarray] = {}
        self._units: dict[str, np.ndarray] = {}
        self._total: int | None = None
        mined = run is not None and "null_histograms" in run.manifest.tables
        self._nulls = Nulls.of(model, run.manifest.options["nulls"]) if run is not None and mined else None

    @property
    def _level(self) -> float:
        return max(LEVEL, 2 / (1 + (self._total or 1)))

    def see(self, seen: _Seen, batch: ContextBatch) -> None:
        """Let neurons compete, and count how many units of each kind are beyond the level."""
        measured = _LayerReadings.of(self._known, seen, seen.neurons)
        if self._run is None or measured.tails is None or measured.deviations is None:
            weights = 1.0 if seen.weights is None else seen.weights[:, None]
            self._keep(measured, [-np.abs(measured.coefficients) * measured.norms * weights])
            return
        self._total = max(self._total or 0, measured.total or 0)
        self._keep(measured, [measured.tails, -np.abs(measured.deviations)])
        self._count("neuron", seen, measured.tails)
        if self._nulls is None:
            return
        signals = LayerSignals(seen.inputs, seen.coefficients, seen.gate, seen.up, seen.group)
        for kind, columns in self._nulls.columns(seen.layer, batch, signals).items():
            stored = Distributions.of(self._run, seen.layer, kind)
            first, count = self._nulls.first(kind, seen.layer, seen.group), columns.coefficients.shape[-1]
            own = stored.only(slice(first, first + count))
            self._count(kind, seen, own.tails(_numbers(columns.coefficients)))

    def _count(self, kind: str, seen: _Seen, tails: np.ndarray) -> None:
        blank = np.zeros(len(self._about.tokens))
        self._beyond.setdefault(kind, blank.copy())[seen.positions] += (tails <= self._level).sum(1)
        self._units.setdefault(kind, blank.copy())[seen.positions] += tails.shape[1]

    def _keep(self, measured: _LayerReadings, order: Sequence[np.ndarray]) -> None:
        """Merge the best of these into the best of all; `order`: what is least for the first, f64[row neuron] each."""
        layer, cells = measured.seen.layer, self._model.cells
        for row, position in enumerate(measured.seen.positions.tolist()):
            if not self._about.tokens[position].counted:
                continue
            keys = [scores[row] for scores in order]
            first = np.lexsort((np.arange(len(keys[0])), *reversed(keys)))[: self._top]
            for column in first.tolist():
                neuron = cells.id(layer, int(measured.neurons[column]))
                reading = measured.reading(self._about, neuron, row, column)
                self._best[position].append(((*(float(key[column]) for key in keys), *neuron), reading))
            self._best[position] = sorted(self._best[position], key=lambda ranked: ranked[0])[: self._top]

    def result(self, words: Vocabulary) -> Trace:
        """The best of each token, with what they write, and the shares."""
        addresses = sorted({reading.neuron for best in self._best for _, reading in best})
        written = _read(self._model, addresses, words) if self._run is None else _stored(self._run, addresses)
        unusual = tuple(
            tuple(
                Unusual(reading, written[reading.neuron][0 if (reading.coefficient or 0) > 0 else 1])
                for _, reading in best
            )
            for best in self._best
        )
        shares = {
            kind: tuple(
                float(count / units) if token.counted else None
                for token, count, units in zip(self._about.tokens, counts, self._units[kind], strict=True)
            )
            for kind, counts in self._beyond.items()
        }
        level = None if self._run is None else self._level
        return replace(self._about, unusual=unusual, shares=shares, level=level, counted=self._total)


def _is_trigger(coefficient: float | None, bounds: dict[int, float | None]) -> bool:
    if coefficient is None:
        return False
    bound = bounds[1 if coefficient > 0 else -1]
    return bound is not None and coefficient != 0 and abs(coefficient) >= abs(bound)


def _numbers(coefficients: Tensor) -> np.ndarray:
    """f32[row unit]; of a context row by row."""
    return coefficients.flatten(0, -2).float().cpu().numpy()


def _signs(branch: Tensor) -> np.ndarray:
    return np.where(_numbers(branch) > 0, 1, -1)


def _norms(model: Model, layer: int) -> np.ndarray:
    """f32[neuron] of the values of a layer."""
    return model.anatomy.layers[layer].values().detach().float().norm(dim=1).cpu().numpy()


# What each neuron writes when it is positive, and when it is negative.
Words = dict[NeuronId, tuple[tuple[str, ...], tuple[str, ...]]]


def _read(model: Model, neurons: Sequence[NeuronId], words: Vocabulary) -> Words:
    """The tokens that some values write, read through the lens."""
    written: Words = {}
    for layer in sorted({neuron.layer for neuron in neurons}):
        chosen = [neuron for neuron in neurons if neuron.layer == layer]
        rows = torch.tensor([neuron.neuron for neuron in chosen], device=model.device)
        tokens, _ = values.value_tokens(model, layer, rows)
        for neuron, (promoted, suppressed) in zip(chosen, tokens[:, :, :WRITES].tolist(), strict=True):
            written[neuron] = tuple(map(words.label, promoted)), tuple(map(words.label, suppressed))
    return written


def _stored(run: Run, neurons: Sequence[NeuronId]) -> Words:
    """The tokens that some values write, as a run keeps them."""
    written: Words = {}
    for neuron in neurons:
        rows = run.rows("values", *neuron).filter(pl.col("rank") < WRITES).sort("rank")
        sides = [rows.filter(pl.col("polarity") == sign)["token"].to_list() for sign in (1, -1)]
        written[neuron] = (
            tuple(map(run.vocabulary.label, sides[0])),
            tuple(map(run.vocabulary.label, sides[1])),
        )
    return written
