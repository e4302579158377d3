"""Run the body of a model over a batch, handing out coefficients layer by layer; owns the hooks.

The coefficient is the input of the down projection, seen by a pre-hook, so plain and gated feed-forward layers
look alike and nothing is computed twice. The language-model head never runs, and the pass stops at the last
layer's down projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemoscope.model.model import Model
from mnemoscope.model.parts import Projection
from mnemoscope.records import ContextBatch

Coefficients = Float[Tensor, "context token neuron"]
Inputs = Float[Tensor, "context token width"]
Receiver = Callable[[int, Coefficients, ContextBatch, Coefficients | None, Coefficients | None, Inputs], None]
"""Takes layer, coefficients, batch, gate, up, and what the layer's first projections read."""


class _LastLayerSeen(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the last coefficient has been handed out."""


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
        self._handles: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Capture:
        self._stack.enter_context(self._model.running())
        for index, layer in enumerate(self._model.anatomy.layers):
            self._handles.append(layer.gate.module.register_forward_pre_hook(self._keep_inputs))
            if layer.up is not None:
                for name, part in (("gate", layer.gate), ("up", layer.up)):
                    self._handles.append(part.module.register_forward_hook(self._keep(name, part)))
            self._handles.append(layer.down.register_forward_pre_hook(self._hand_out(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.close()

    def sweep(self, batch: ContextBatch, receive: Receiver) -> None:
        """Call ``receive(layer, coefficients, batch, gate, up, inputs)`` for every layer.

        gate and up, the pre-activations, are None if plain; inputs are what the first projections read. The
        tensors are in the model's dtype, are the model's own, and must not be kept or changed.
        """
        tokens = torch.from_numpy(batch.tokens).to(self._model.device, torch.int64)
        self._receive, self._batch = receive, batch
        try:
            with torch.inference_mode(), self._model.running():
                # Right padding under a causal mask changes nothing before it, so no attention mask is needed.
                self._model.anatomy.body(input_ids=tokens, use_cache=False)
        except _LastLayerSeen:
            pass
        finally:
            self._receive = self._batch = None
            self._seen.clear()

    def _keep_inputs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen["inputs"] = inputs[0]

    def _keep(self, name: str, part: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[name] = part.of(output)

        return hook

    def _hand_out(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._receive is None or self._batch is None:
                return
            # OPT flattens contexts and tokens into one axis.
            shape = (*self._batch.tokens.shape, -1)
            gate, up = (self._seen.pop(name, None) for name in ("gate", "up"))
            self._receive(
                index,
                inputs[0].view(shape),
                self._batch,
                None if gate is None else gate.view(shape),
                None if up is None else up.view(shape),
                self._seen.pop("inputs").view(shape),
            )
            if index == self._last:
                raise _LastLayerSeen

        return hook


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def residuals(model: Model, tokens: Tensor) -> dict[str, Float[Tensor, "layer context token width"]]:
    """The residual stream at every point of one forward pass: ``Lin``, ``Lres`` and ``Lout`` (A30).

    The same points are TransformerLens' ``hook_resid_pre``, ``hook_resid_mid`` and ``hook_resid_post``.
    In a block whose attention and feed-forward layers run in parallel, ``Lres`` is ``Lin`` plus the attention
    output, which is what the feed-forward output is added to (G5).
    """
    kept: dict[str, list[Tensor]] = {"Lin": [], "Lout": []}

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kept["Lin"].append((arguments[0] if arguments else keywords["hidden_states"]).detach())

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        kept["Lout"].append((output[0] if isinstance(output, tuple) else output).detach())

    updates: list[Tensor] = []

    def attended(module: nn.Module, inputs: Any, output: Any) -> None:
        updates.append((output[0] if isinstance(output, tuple) else output).detach())

    handles: list[Any] = []
    for layer in model.anatomy.layers:
        handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.module.register_forward_hook(after))
        handles.append(layer.attention_out.register_forward_hook(attended))
    with model.running(), _hooks(handles), torch.inference_mode():
        model.anatomy.body(input_ids=tokens.to(model.device), use_cache=False)
    points = {name: torch.stack(found) for name, found in kept.items()}
    mids = []
    for layer, start, update in zip(model.anatomy.layers, points["Lin"], updates, strict=True):
        if layer.post_attention_norm is not None:
            update = layer.post_attention_norm(update)
        mids.append(start + model.anatomy.residual_multiplier * update.to(start.dtype))
    return {"Lin": points["Lin"], "Lres": torch.stack(mids), "Lout": points["Lout"]}
