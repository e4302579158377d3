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
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import LayerSignals, Nulls
from mnemoscope.neuron.card import card
from mnemoscope.records import ContextBatch, NeuronId, Progress
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import encode, special_ids
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.tracing.traced import (
    LEVEL,
    Distributions,
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
    top: int = 5,
    report: Callable[[Progress], None] | None = None,
) -> Trace:
    """Trace a text; see `Trace` for what comes back.

    run      a run of the same model, whose distributions say what is unusual
    neurons  those to follow; without any, the `top` most unusual at each token

    QueryError for a text without two tokens, or with more than the model reads, for a neuron that is not there and for
    a `top` below 1; RunMismatch for a run of other weights.
    """
    batch = _batch(model, text)
    chosen = [_address(model, neuron) for neuron in neurons]
    check_least("tracing a text", 1, top=top)
    if run is not None:
        model.check_built(run, "tracing a text by")
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    ids, counted = batch.tokens[0].tolist(), batch.counted[0].tolist()
    pieces = [words.visible(piece, edges=False) for piece in words.pieces(ids)]
    tokens = tuple(
        TracedToken(position, token, piece or words.label(token), counts)
        for position, (token, piece, counts) in enumerate(zip(ids, pieces, counted, strict=True))
    )
    about = Trace(
        model=model.id,
        run=None if run is None else str(run.path),
        corpus=None if run is None else run.manifest.corpus.id,
        text=text,
        tokens=tokens,
        neurons=(),
        unusual=(),
        shares={},
        level=None,
        counted=None,
        units=len(model.cells),
    )
    watch = _FollowedNeurons(model, run, about, chosen) if chosen else _UnusualNeurons(model, run, about, top)
    say, layers = report or (lambda _: None), model.anatomy.n_layers

    def receive(layer: int, *activity: Any) -> None:
        say(Progress("tracing", layer, layers, "layers"))
        watch.see(layer, *activity)

    last = max(neuron.layer for neuron in chosen) if chosen else None
    with Capture(model, last) as capture:
        capture.sweep(batch, receive)
    say(Progress("tracing", layers, layers, "layers"))
    return watch.result(words)


def _batch(model: Model, text: str) -> ContextBatch:
    """The text as one context, with the special tokens that the contexts of a run have."""
    (ids,) = encode(model.tokenizer, [text], special=True)
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


def _address(model: Model, neuron: tuple[int, int]) -> NeuronId:
    cells, address = model.cells, model.cells.id(*neuron)
    if not cells.has(*address):
        raise QueryError(f"tracing {address}: out of range; {model.id} has {cells.range_of(address.layer)}")
    return address


@dataclass(frozen=True)
class _LayerReadings:
    """Some neurons of a layer: what a pass says of them, and what the run knows.

    coefficients f32[token neuron], norms f32[neuron], gate and up signs i64[token neuron], tails and deviations
    f64[token neuron] where a run has their distributions of `total` coefficients
    """

    coefficients: np.ndarray
    norms: np.ndarray
    gate: np.ndarray | None
    up: np.ndarray | None
    tails: np.ndarray | None = None
    deviations: np.ndarray | None = None
    total: int | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        run: Run | None,
        layer: int,
        coefficients: Tensor,
        gate: Tensor | None,
        up: Tensor | None,
        neurons: Sequence[int] | slice,
    ) -> _LayerReadings:
        """The readings of the chosen neurons of a layer."""
        numbers = _numbers(coefficients)[:, neurons]
        gate_signs, up_signs = (
            None if branch is None else _signs(branch)[:, neurons] for branch in (gate, up)
        )
        measured = cls(numbers, _norms(model, layer)[neurons], gate_signs, up_signs)
        if run is None:
            return measured
        stored = Distributions.of(run, layer)
        chosen = replace(
            stored, counts=stored.counts[neurons], mean=stored.mean[neurons], std=stored.std[neurons]
        )
        return replace(
            measured, tails=chosen.tails(numbers), deviations=chosen.deviations(numbers), total=stored.total
        )

    def reading(self, about: Trace, neuron: NeuronId, position: int, column: int) -> NeuronReading:
        """The reading of one neuron, which is a column here, at one token."""
        gate, up = (
            None if branch is None else int(branch[position, column]) for branch in (self.gate, self.up)
        )
        coefficient = float(self.coefficients[position, column])
        reading = NeuronReading(
            neuron, position, coefficient, size=abs(coefficient) * float(self.norms[column]), gate=gate, up=up
        )
        if self.tails is None or self.deviations is None or not about.tokens[position].counted:
            return reading
        tail, far = float(self.tails[position, column]), float(self.deviations[position, column])
        return replace(
            reading, tail=tail, expected=tail * about.units, deviations=far if np.isfinite(far) else None
        )


class _FollowedNeurons:
    """A watch of chosen neurons along the text."""

    def __init__(self, model: Model, run: Run | None, about: Trace, neurons: Sequence[NeuronId]) -> None:
        self._model, self._run, self._about = model, run, about
        self._neurons = tuple(dict.fromkeys(neurons))
        self._readings: dict[NeuronId, list[NeuronReading]] = {}
        self._total: int | None = None

    def see(
        self,
        layer: int,
        coefficients: Tensor,
        batch: ContextBatch,
        gate: Tensor | None,
        up: Tensor | None,
        inputs: Tensor,
    ) -> None:
        """Keep the columns of those that are in this layer."""
        followed = [neuron for neuron in self._neurons if neuron.layer == layer]
        if not followed:
            return
        columns = [neuron.neuron for neuron in followed]
        measured = _LayerReadings.of(self._model, self._run, layer, coefficients, gate, up, columns)
        self._total = measured.total
        for column, neuron in enumerate(followed):
            self._readings[neuron] = [
                measured.reading(self._about, neuron, position, column)
                for position in range(len(self._about.tokens))
            ]

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
        self._beyond: dict[str, np.ndarray] = {}
        self._units: dict[str, int] = {}
        self._total: int | None = None
        mined = run is not None and "null_histograms" in run.manifest.tables
        self._nulls = Nulls.of(model, run.manifest.options["nulls"]) if run is not None and mined else None

    @property
    def _level(self) -> float:
        return max(LEVEL, 2 / (1 + (self._total or 1)))

    def see(
        self,
        layer: int,
        coefficients: Tensor,
        batch: ContextBatch,
        gate: Tensor | None,
        up: Tensor | None,
        inputs: Tensor,
    ) -> None:
        """Let the neurons of a layer compete, and count how many units of each kind are beyond the level."""
        measured = _LayerReadings.of(self._model, self._run, layer, coefficients, gate, up, slice(None))
        if self._run is None or measured.tails is None or measured.deviations is None:
            self._keep(layer, measured, [-np.abs(measured.coefficients) * measured.norms])
            return
        self._total = measured.total
        self._keep(layer, measured, [measured.tails, -np.abs(measured.deviations)])
        self._count("neuron", measured.tails)
        if self._nulls is not None:
            signals = LayerSignals(inputs, coefficients, gate, up)
            for kind, columns in self._nulls.columns(layer, batch, signals).items():
                stored = Distributions.of(self._run, layer, kind)
                self._count(kind, stored.tails(_numbers(columns.coefficients)))

    def _count(self, kind: str, tails: np.ndarray) -> None:
        self._beyond[kind] = self._beyond.get(kind, 0) + (tails <= self._level).sum(1)
        self._units[kind] = self._units.get(kind, 0) + tails.shape[1]

    def _keep(self, layer: int, measured: _LayerReadings, order: Sequence[np.ndarray]) -> None:
        """Merge a layer's best into the best of all; `order`: what is least for the first, f64[token neuron] each."""
        for position, token in enumerate(self._about.tokens):
            if not token.counted:
                continue
            keys = [scores[position] for scores in order]
            first = np.lexsort((np.arange(len(keys[0])), *reversed(keys)))[: self._top]
            for column in first.tolist():
                reading = measured.reading(self._about, NeuronId(layer, column), position, column)
                self._best[position].append(((*(float(key[column]) for key in keys), layer, column), reading))
            self._best[position] = sorted(self._best[position], key=lambda ranked: ranked[0])[: self._top]

    def result(self, words: Vocabulary) -> Trace:
        """The best of each token, with what they write, and the shares."""
        addresses = sorted({reading.neuron for best in self._best for _, reading in best})
        written = _read(self._model, addresses, words) if self._run is None else _stored(self._run, addresses)
        unusual = tuple(
            tuple(
                Unusual(reading, written[reading.neuron][0 if reading.coefficient > 0 else 1])
                for _, reading in best
            )
            for best in self._best
        )
        shares = {
            kind: tuple(
                float(count) / self._units[kind] if token.counted else None
                for token, count in zip(self._about.tokens, counts, strict=True)
            )
            for kind, counts in self._beyond.items()
        }
        level = None if self._run is None else self._level
        return replace(self._about, unusual=unusual, shares=shares, level=level, counted=self._total)


def _is_trigger(coefficient: float, bounds: dict[int, float | None]) -> bool:
    bound = bounds[1 if coefficient > 0 else -1]
    return bound is not None and coefficient != 0 and abs(coefficient) >= abs(bound)


def _numbers(coefficients: Tensor) -> np.ndarray:
    """f32[token unit] of one context."""
    return coefficients[0].float().cpu().numpy()


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
