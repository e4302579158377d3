"""Run the body of a model over a batch, handing out coefficients layer by layer.

The coefficient is the input of the down projection, seen by a pre-hook, so plain and gated feed-forward layers
look alike and nothing is computed twice. Experts hand out their rows themselves, each the tokens that were routed to
it (`LayerRows`). Units that are not neurons are computed beside the model, from what passes the point that they read.
The language-model head never runs, and the pass stops at the last layer's down projections, with a shared expert at the
end of its mixture, or where the last units are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.experts import Routed, listen, shared_weight, taken_apart
from mnemoscope.model.parts import SourceText
from mnemoscope.model.running import hooked
from mnemoscope.model.spread import at_home
from mnemoscope.model.threads import Threads
from mnemoscope.model.units import POINTS, Rebuilding, passing, points_of
from mnemoscope.model.watch import EndOfPass, after_attention, watch
from mnemoscope.records import ContextBatch

if TYPE_CHECKING:
    from mnemoscope.model.model import Model

Coefficients = Float[Tensor, "context token neuron"]
Inputs = Float[Tensor, "context token width"]
Receiver = Callable[[int, Coefficients, ContextBatch, Coefficients | None, Coefficients | None, Inputs], None]
"""Takes layer, coefficients, batch, gate, up, and what the layer's first projections read."""


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What the experts of a mixture did with the tokens given to them: a dense matrix of each, one after another.

    Each expert is like a text of its own, of the tokens routed to it and of no others: a token that was not routed is
    absent, and no coefficient of it is 0. The tensors are in the model's dtype, are its own, and must not be kept or
    changed.

    group         the first of these experts, 0-based; the shared expert, which all tokens go through, is the one after
                  the last, and comes by itself
    first         the first of its neurons in the layer: their indices are first, first + 1, ...; those of the next
                  expert follow
    starts        i64[expert + 1]  the first row of each expert, and at the end how many rows there are
    rows          where each row is in the batch: context * (tokens of a context) + position, ascending in each expert;
                  padding and positions that do not count are among them. None: all of them, in that order
    weight        what the router multiplies each row with, all factors included, fp32; one number if all are alike. A
                  norm of the sum over experts is no factor of it
    coefficients  inputs of the down projection
    gate, up      pre-activations; up is None where experts are not gated
    read          what the first projections read, some of it by several experts
    taken         which row of `read` each row is; None: the same
    """

    layer: int
    group: int
    first: int
    starts: np.ndarray
    rows: Int[Tensor, " row"] | None
    weight: Float[Tensor, " row"] | float
    coefficients: Float[Tensor, "row neuron"]
    gate: Float[Tensor, "row neuron"]
    up: Float[Tensor, "row neuron"] | None
    read: Float[Tensor, "taken width"]
    taken: Int[Tensor, " row"] | None

    @property
    def inputs(self) -> Float[Tensor, "row width"]:
        """What the first projections read, row by row."""
        return self.read if self.taken is None else self.read[self.taken]

    def each(self) -> Iterator[LayerRows]:
        """The rows of one expert after another, of those that have any."""
        width = self.coefficients.shape[1]
        for expert, (start, stop) in enumerate(pairwise(self.starts.tolist())):
            if stop > start:
                of = slice(start, stop)
                yield replace(
                    self,
                    group=self.group + expert,
                    first=self.first + expert * width,
                    starts=np.array([0, stop - start]),
                    rows=None if self.rows is None else self.rows[of],
                    weight=self.weight if isinstance(self.weight, float) else self.weight[of],
                    coefficients=self.coefficients[of],
                    gate=self.gate[of],
                    up=None if self.up is None else self.up[of],
                    taken=None if self.taken is None else self.taken[of],
                )


RoutedReceiver = Callable[[LayerRows, ContextBatch], None]
"""Takes the rows of all experts of a layer, if there are any, and then those of a shared one."""


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """What passed the point that units write at a layer, and what they say of it; fp32.

    active  how many units of the layer are not 0
    """

    layer: int
    seen: Float[Tensor, "context token width"]
    said: Float[Tensor, "context token width"]
    active: Int[Tensor, "context token"]


RebuiltReceiver = Callable[[Rebuilt, ContextBatch], None]
"""Takes what units rebuild of a layer; called once for each layer that units write in, once all of them are read."""


class Capture:
    """Hooks on one model, which is in evaluation mode; use as a context manager, then call `sweep` for each batch.

    `ModelChanged` when the model is no longer the one that it was when the context was entered.
    """

    def __init__(self, model: Model, last: int | None = None) -> None:
        """`last` is the layer after which a pass ends, by default the last that has units."""
        self._model = model
        self._last = model.cells.layers[-1] if last is None else last
        # Layers that share modules are told apart by counting calls, which only whole passes keep right.
        shared = any(layer.turn[1] > 1 for layer in model.anatomy.layers)
        self._stop = model.cells.layers[-1] if shared else self._last
        self._receive: Receiver | None = None
        self._routed: RoutedReceiver | None = None
        self._rebuilt: RebuiltReceiver | None = None
        self._points = points_of(model.anatomy)
        self._units = Rebuilding(model.anatomy)
        self._batch: ContextBatch | None = None
        self._seen: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Capture:
        parts = self._model.anatomy
        self._writes = "" if self._model.units is None else self._model.units.writes
        points = ("ffn_input", *(("gate", "up") if parts.gated else ()), "coefficients")
        self._stack.enter_context(self._model.running())
        handles: list[Any] = []
        for index, layer in enumerate(parts.layers):
            if parts.of_units:
                handles += watch(layer, self._points.get(index, ()), partial(self._see_units, index))
            elif layer.experts is None:
                handles += watch(layer, points, partial(self._see, index))
            else:
                handles += watch(layer, _SHARED, partial(self._see_shared, index))
                handles.append(listen(layer.experts.module, partial(self._see_routed, index)))
        self._stack.enter_context(hooked(handles))
        self._stack.enter_context(taken_apart(self._model.hf))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sweep(
        self,
        batch: ContextBatch,
        receive: Receiver,
        routed: RoutedReceiver | None = None,
        rebuilt: RebuiltReceiver | None = None,
    ) -> None:
        """Call ``receive(layer, coefficients, batch, gate, up, inputs)`` for every layer with units and no experts.

        gate and up, the pre-activations, are None if plain; inputs are what the first projections read. The
        tensors are in the model's dtype, are the model's own, and must not be kept or changed. Of a mixture,
        ``routed`` is called with the `LayerRows` of its experts; `ModelNotSupported` where it is not given. Of other
        units than neurons inputs are what the keys are multiplied with, coefficients are fp32, and ``rebuilt``, if it
        is given, is called with what they say is written.
        """
        parts = self._model.anatomy
        if routed is None:
            self._model.check_dense("reading neurons of", self._last)
        tokens = torch.from_numpy(batch.tokens).to(self._model.device, torch.int64)
        self._receive, self._routed, self._rebuilt, self._batch = receive, routed, rebuilt, batch
        self._units = Rebuilding(parts)
        try:
            with torch.inference_mode(), self._model.running(), Threads(), suppress(EndOfPass):
                lengths = torch.from_numpy(batch.lengths).to(tokens.device)
                mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
                parts, targets = self._model.anatomy, batch.targets
                call = parts.calling(tokens, mask)
                if targets is not None:
                    written = torch.from_numpy(targets.tokens).to(tokens.device, torch.int64)
                    call = parts.calling(written, source=SourceText(tokens, mask))
                parts.body(**call)
        finally:
            self._receive = self._routed = self._rebuilt = self._batch = None
            self._seen, self._units = {}, Rebuilding(parts)

    def _read(self, layer: int) -> ContextBatch | None:
        """What a layer reads of the batch: the decoder of an encoder-decoder its targets."""
        stacks, batch = self._model.anatomy.stacks, self._batch
        return batch.targets if batch is not None and stacks and layer >= stacks[0].n_layers else batch

    def _see(self, layer: int, point: str, tensor: Tensor) -> None:
        batch = self._read(layer)
        if self._receive is None or batch is None:
            return
        # OPT flattens contexts and tokens into one axis.
        self._seen[point] = tensor.view(*batch.tokens.shape, -1)
        if point == "coefficients":
            seen, self._seen = self._seen, {}
            gate, up, inputs = seen.get("gate"), seen.get("up"), seen["ffn_input"]
            if layer <= self._last:
                self._receive(layer, seen["coefficients"], batch, gate, up, inputs)
            if layer == self._stop:
                raise EndOfPass

    def _see_units(self, layer: int, point: str, tensor: Tensor) -> None:
        """Units are read and written where they stand; of a pass that asks for no more, the last layer is read only."""
        if self._receive is None or self._batch is None:
            return
        block, seen = self._model.anatomy.layers[layer], tensor.view(*self._batch.tokens.shape, -1)
        units, last = block.units, layer == self._stop
        if units is not None and point == POINTS[units.reads].watched:
            reading, coefficients = self._units.read(layer, seen)
            if layer <= self._last:
                self._receive(layer, coefficients, self._batch, None, None, reading.inputs)
            if last and self._rebuilt is None:
                raise EndOfPass
        writes = self._writes
        if self._rebuilt is not None and point == POINTS[writes].watched:
            active = self._units.active.get(layer, torch.zeros_like(seen[..., 0], dtype=torch.int64))
            said = self._units.written(layer)
            self._rebuilt(Rebuilt(layer, passing(block, writes, seen), said, active), self._batch)
            if layer == max(self._points):
                raise EndOfPass

    def _see_routed(self, layer: int, piece: Routed) -> None:
        batch = self._read(layer)
        if self._routed is None or batch is None:
            return
        experts = self._model.anatomy.layers[layer].experts
        assert experts is not None
        piece = piece.moved(experts.module, at_home)
        rows = LayerRows(
            layer, 0, 0, np.array(piece.starts), piece.tokens, piece.weight * experts.factor,
            piece.coefficients, piece.gate, piece.up, piece.read, piece.taken,
        )  # fmt: skip
        self._routed(rows, batch)
        # With no shared expert to come, what these write is written for nobody.
        if layer == self._last and len(self._model.anatomy.layers[layer].groups) == experts.count:
            raise EndOfPass

    def _see_shared(self, layer: int, point: str, tensor: Tensor) -> None:
        """Points of the shared expert come in any order; with the end of the block all are there."""
        batch = self._read(layer)
        if self._routed is None or batch is None:
            return
        self._seen[point] = tensor.reshape(batch.tokens.size, -1)
        if point != "lout":
            return
        seen, self._seen = self._seen, {}
        experts = self._model.anatomy.layers[layer].experts
        assert experts is not None
        if "coefficients" in seen:
            rows = LayerRows(
                layer, experts.count, experts.count * experts.width, np.array([0, batch.tokens.size]), None,
                shared_weight(experts, seen.get("shared_gate")),
                seen["coefficients"], seen["gate"], seen.get("up"), seen["shared_input"], None,
            )  # fmt: skip
            self._routed(rows, batch)
        if layer == self._last:
            raise EndOfPass


_SHARED = ("shared_input", "gate", "up", "coefficients", "shared_gate", "lout")


def _keep(seen: dict[str, Tensor], point: str, tensor: Tensor) -> None:
    seen[point] = tensor.detach()


def residuals(model: Model, tokens: Tensor) -> dict[str, Float[Tensor, "layer context token width"]]:
    """The residual stream at every point of one forward pass: ``Lin``, ``Lres`` and ``Lout`` (A30).

    The same points are TransformerLens' ``hook_resid_pre``, ``hook_resid_mid`` and ``hook_resid_post``.
    In a block whose attention and feed-forward layers run in parallel, ``Lres`` is ``Lin`` plus the attention
    output, which is what the feed-forward output is added to (G5).
    """
    points = ("lin", "attention_output", "mixer_output", "lout")
    kept: list[dict[str, Tensor]] = [{} for _ in model.anatomy.layers]
    layers = model.anatomy.layers
    handles = [watch(layer, points, partial(_keep, seen)) for layer, seen in zip(layers, kept, strict=True)]
    with model.running(), hooked(list(chain.from_iterable(handles))), torch.inference_mode():
        model.anatomy.body(**model.anatomy.calling(tokens.to(model.device)))
    mids = [after_attention(layer, seen) for layer, seen in zip(layers, kept, strict=True)]
    starts, ends = (torch.stack([seen[point] for seen in kept]) for point in ("lin", "lout"))
    return {"Lin": starts, "Lres": torch.stack(mids), "Lout": ends}
