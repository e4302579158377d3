"""Run the body of a model over a batch, handing out coefficients layer by layer.

The coefficient is the input of the down projection, seen by a pre-hook, so plain and gated feed-forward layers
look alike and nothing is computed twice. The language-model head never runs, and the pass stops at the last
layer's down projection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.model.model import Model
from mnemoscope.model.watch import EndOfPass, hooked, watch
from mnemoscope.records import ContextBatch

Coefficients = Float[Tensor, "context token neuron"]
Inputs = Float[Tensor, "context token width"]
Receiver = Callable[[int, Coefficients, ContextBatch, Coefficients | None, Coefficients | None, Inputs], None]
"""Takes layer, coefficients, batch, gate, up, and what the layer's first projections read."""


class Capture:
    """Hooks on one model, which is in evaluation mode; use as a context manager, then call `sweep` for each batch.

    `ModelChanged` when the model is no longer the one that it was when the context was entered.
    """

    def __init__(self, model: Model, last: int | None = None) -> None:
        """`last` is the layer after which a pass ends, of all layers by default."""
        self._model = model
        self._last = model.anatomy.n_layers - 1 if last is None else last
        self._receive: Receiver | None = None
        self._batch: ContextBatch | None = None
        self._seen: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Capture:
        parts = self._model.anatomy
        points = ("ffn_input", *(("gate", "up") if parts.gated else ()), "coefficients")
        self._stack.enter_context(self._model.running())
        handles = [
            watch(layer, points, partial(self._see, index)) for index, layer in enumerate(parts.layers)
        ]
        self._stack.enter_context(hooked(list(chain.from_iterable(handles))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sweep(self, batch: ContextBatch, receive: Receiver) -> None:
        """Call ``receive(layer, coefficients, batch, gate, up, inputs)`` for every layer.

        gate and up, the pre-activations, are None if plain; inputs are what the first projections read. The
        tensors are in the model's dtype, are the model's own, and must not be kept or changed.
        """
        tokens = torch.from_numpy(batch.tokens).to(self._model.device, torch.int64)
        self._receive, self._batch = receive, batch
        try:
            with torch.inference_mode(), self._model.running(), suppress(EndOfPass):
                # Right padding under a causal mask changes nothing before it, so no attention mask is needed.
                self._model.anatomy.body(input_ids=tokens, use_cache=False)
        finally:
            self._receive = self._batch = None
            self._seen = {}

    def _see(self, layer: int, point: str, tensor: Tensor) -> None:
        if self._receive is None or self._batch is None:
            return
        # OPT flattens contexts and tokens into one axis.
        self._seen[point] = tensor.view(*self._batch.tokens.shape, -1)
        if point == "coefficients":
            seen, self._seen = self._seen, {}
            gate, up, inputs = seen.get("gate"), seen.get("up"), seen["ffn_input"]
            self._receive(layer, seen["coefficients"], self._batch, gate, up, inputs)
            if layer == self._last:
                raise EndOfPass


def residuals(model: Model, tokens: Tensor) -> dict[str, Float[Tensor, "layer context token width"]]:
    """The residual stream at every point of one forward pass: ``Lin``, ``Lres`` and ``Lout`` (A30).

    The same points are TransformerLens' ``hook_resid_pre``, ``hook_resid_mid`` and ``hook_resid_post``.
    In a block whose attention and feed-forward layers run in parallel, ``Lres`` is ``Lin`` plus the attention
    output, which is what the feed-forward output is added to (G5).
    """
    kept: dict[str, list[Tensor]] = {"lin": [], "attention_output": [], "lout": []}
    layers = model.anatomy.layers
    handles = [
        watch(layer, kept, lambda point, tensor: kept[point].append(tensor.detach())) for layer in layers
    ]
    with model.running(), hooked(list(chain.from_iterable(handles))), torch.inference_mode():
        model.anatomy.body(input_ids=tokens.to(model.device), use_cache=False)
    mids = []
    for layer, start, update in zip(layers, kept["lin"], kept["attention_output"], strict=True):
        if layer.post_attention_norm is not None:
            update = layer.post_attention_norm(update)
        mids.append(start + model.anatomy.residual_multiplier * update.to(start.dtype))
    return {"Lin": torch.stack(kept["lin"]), "Lres": torch.stack(mids), "Lout": torch.stack(kept["lout"])}
