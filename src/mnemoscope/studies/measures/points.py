"""What the last token of each prefix goes through: residuals, feed-forward outputs and coefficients of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.model.model import Model
from mnemoscope.model.parts import Norm
from mnemoscope.model.watch import hooked
from mnemoscope.records import ContextBatch


@dataclass(frozen=True, eq=False)
class Points:
    """The last position of some prefixes, in fp32.

    residual      r: the stream that the feed-forward output is added to (Lres; in parallel blocks Lin + attention, G5)
    ffn           y: what is added, with biases, post-norm and multiplier (A17, A20)
    coefficients  m: the input of the down projection
    """

    residual: Float[Tensor, "context layer width"]
    ffn: Float[Tensor, "context layer width"]
    coefficients: Float[Tensor, "context layer neuron"]

    @property
    def output(self) -> Float[Tensor, "context layer width"]:
        """o = r + y (Lout)."""
        return self.residual + self.ffn

    @classmethod
    def joined(cls, parts: list[Points], order: np.ndarray) -> Points:
        """Several as one, its rows in this order."""
        index = torch.from_numpy(order.astype(np.int64)).to(parts[0].ffn.device)
        names = ("residual", "ffn", "coefficients")
        return cls(*(torch.cat([getattr(part, name) for part in parts])[index] for name in names))


def points(model: Model, batch: ContextBatch) -> Points:
    """One forward pass over right-padded prefixes, looked at where each ends."""
    watch = _Watch(model, batch)
    tokens = torch.from_numpy(batch.tokens).to(model.device, torch.int64)
    with model.running(), hooked(watch.handles()), torch.inference_mode():
        model.anatomy.body(input_ids=tokens, use_cache=False)
        residual, ffn = [], []
        for index, part in enumerate(model.anatomy.layers):
            attended = watch.added("attention", index, part.post_attention_norm)
            residual.append(watch.seen["stream", index] + attended)
            ffn.append(watch.added("ffn", index, part.post_ffn_norm))
        coefficients = [watch.seen["coefficients", index] for index in range(model.anatomy.n_layers)]
        return Points(*(torch.stack(rows, 1) for rows in (residual, ffn, coefficients)))


class _Watch:
    """Keeps the last position of what passes by."""

    def __init__(self, model: Model, batch: ContextBatch) -> None:
        self._parts, self._shape = model.anatomy, batch.tokens.shape
        self._rows = torch.arange(len(batch.lengths), device=model.device)
        self._ends = torch.from_numpy(batch.lengths.astype(np.int64) - 1).to(model.device)
        self.seen: dict[tuple[str, int], Float[Tensor, "context width"]] = {}

    def handles(self) -> list[Any]:
        """Register the hooks; the caller removes them."""
        handles = []
        for index, layer in enumerate(self._parts.layers):
            handles += [
                layer.module.register_forward_pre_hook(self._enter(index), with_kwargs=True),
                layer.attention_out.register_forward_hook(self._after("attention", index)),
                layer.down.register_forward_pre_hook(self._before("coefficients", index)),
                layer.down.register_forward_hook(self._after("ffn", index)),
            ]
        return handles

    def added(self, name: str, index: int, norm: Norm | None) -> Float[Tensor, "context width"]:
        """What a projection wrote, as it is added to the stream."""
        written = self.seen[name, index]
        return (written if norm is None else norm(written)) * self._parts.residual_multiplier

    def _keep(self, name: str, index: int, x: Tensor) -> None:
        # OPT flattens contexts and tokens into one axis; indexing copies, and Falcon adds to its FFN's output in place.
        self.seen[name, index] = x.detach().reshape(*self._shape, -1)[self._rows, self._ends].float()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep("stream", index, args[0] if args else kwargs["hidden_states"])

        return hook

    def _before(self, name: str, index: int) -> Callable[..., None]:
        return lambda _, args: self._keep(name, index, args[0])

    def _after(self, name: str, index: int) -> Callable[..., None]:
        return lambda _, args, output: self._keep(name, index, output)
