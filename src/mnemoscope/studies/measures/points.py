"""What the last token of each prefix goes through: residuals, feed-forward outputs and coefficients of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.model.model import Model
from mnemoscope.model.parts import Norm
from mnemoscope.model.watch import hooked, watch
from mnemoscope.records import ContextBatch

_POINTS = ("lin", "attention_output", "coefficients", "ffn_output")


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
    parts, shape = model.anatomy, batch.tokens.shape
    rows = torch.arange(len(batch.lengths), device=model.device)
    ends = torch.from_numpy(batch.lengths.astype(np.int64) - 1).to(model.device)
    seen: dict[str, list[Float[Tensor, "context width"]]] = {point: [] for point in _POINTS}

    def keep(point: str, x: Tensor) -> None:
        # OPT flattens contexts and tokens into one axis; indexing copies, and Falcon adds to its FFN's output in place.
        seen[point].append(x.detach().reshape(*shape, -1)[rows, ends].float())

    def added(outputs: list[Tensor], norms: list[Norm | None]) -> list[Float[Tensor, "context width"]]:
        """What a projection wrote in each layer, as it is added to the stream."""
        normed = (x if norm is None else norm(x) for x, norm in zip(outputs, norms, strict=True))
        return [x * parts.residual_multiplier for x in normed]

    tokens = torch.from_numpy(batch.tokens).to(model.device, torch.int64)
    handles = [handle for layer in parts.layers for handle in watch(layer, _POINTS, keep)]
    with model.running(), hooked(handles), torch.inference_mode():
        parts.body(input_ids=tokens, use_cache=False)
        attended = added(seen["attention_output"], [layer.post_attention_norm for layer in parts.layers])
        residual = [stream + update for stream, update in zip(seen["lin"], attended, strict=True)]
        ffn = added(seen["ffn_output"], [layer.post_ffn_norm for layer in parts.layers])
        return Points(*(torch.stack(by_layer, 1) for by_layer in (residual, ffn, seen["coefficients"])))
