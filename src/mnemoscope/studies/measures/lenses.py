"""What the last token of a prefix goes through (`points`), and what values say alone (`value_tops`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.mine.values import value_vectors
from mnemoscope.model.experts import Routed, listen, summed, taken_apart
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.model.running import hooked, observed
from mnemoscope.model.spread import at_home
from mnemoscope.model.watch import after_attention, flat, mixture, watch
from mnemoscope.records import ContextBatch
from mnemoscope.run.reading import Run
from mnemoscope.studies.measures.positions import Work
from mnemoscope.studies.measures.reductions import first_largest

_TILE = 64  # values read at once: their logits stay near the cache
_ROWS = 512  # and where logits are read in pieces


def value_tops(run: Run | None, model: Model, lens: Lens, work: Work, name: str) -> Int[Tensor, "cell side"]:
    """The token that each value promotes most, alone, with a positive (side 0) and a negative coefficient.

    The size of the coefficient is no matter: the own lens removes it, and raw and frozen are linear. Looked up in a run
    that has them, and otherwise read once and kept under the name.
    """
    if run is not None and lens.name == "own" and not lens.biased:
        rows = run.table("values").filter(pl.col("rank") == 0).select("token").collect()
        return torch.from_numpy(rows["token"].to_numpy().copy().reshape(-1, 2)).to(model.device)
    tops = work.kept(f"{name}-{lens.name}", lambda: read_tops(model, lens).cpu().numpy())
    return torch.from_numpy(tops).to(model.device)


def read_tops(model: Model, lens: Lens) -> Int[Tensor, "cell side"]:
    """`value_tops` from the weights."""
    both_sides, size = (_biased, _TILE) if lens.biased else (_both_sides, _ROWS)
    with torch.inference_mode():
        tops = [
            both_sides(lens, tile)
            for layer in model.cells.layers
            for tile in value_vectors(model.anatomy.layers[layer]).split(size)
        ]
    return torch.cat(tops).to(torch.int32)


def _both_sides(lens: Lens, vectors: Float[Tensor, "row width"]) -> Int[Tensor, "row side"]:
    tops = torch.zeros(2, len(vectors), dtype=torch.int64, device=vectors.device)
    most = vectors.new_full((2, len(vectors)), -torch.inf)
    for start, scores in lens.pieces(vectors):
        for side, logits in enumerate((scores, scores.neg())):
            place = first_largest(logits)
            score = logits.gather(1, place[:, None])[:, 0]
            higher = score > most[side]
            tops[side] = torch.where(higher, place + start, tops[side])
            most[side] = torch.where(higher, score, most[side])
    return tops.T


def _biased(lens: Lens, vectors: Float[Tensor, "row width"]) -> Int[Tensor, "row side"]:
    """With biases a value says something else upside down."""
    linear, scale = lens.linear(vectors), lens.scale(vectors)
    return torch.stack([lens.part(side, scale).argmax(-1) for side in (linear, -linear)], -1)


# -- What the last token of each prefix goes through: residuals, feed-forward outputs, coefficients of every layer ---

_POINTS = ("lin", "attention_output", "mixer_output", "coefficients", "ffn_output", "extra_output")
_OF_MIXTURE = ("ffn_norm_input", "ffn_input", "gate", "up", "routed_output", "shared_gate")


@dataclass(frozen=True, eq=False)
class Points:
    """The last position of some prefixes, in fp32.

    residual      r: the stream that the feed-forward output is added to (Lres; in parallel blocks Lin + attention, G5)
    ffn           y: what is added, with biases, post-norm and multiplier (A17, A20)
    coefficients  m: the input of the down projection; in a mixture what its value is multiplied with, which is m times
                  the weight of the expert, and 0 where the token was not routed there
    """

    residual: Float[Tensor, "context layer width"]
    ffn: Float[Tensor, "context layer width"]
    coefficients: Float[Tensor, "context cell"]

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


def _watched(layer: Layer) -> tuple[str, ...]:
    """What is looked at in a layer."""
    return _POINTS if layer.experts is None else _POINTS + _OF_MIXTURE


def points(model: Model, batch: ContextBatch) -> Points:
    """One forward pass over right-padded prefixes, looked at where each ends.

    In fp32 whatever the weights are in, as predictions are taken apart: in half precision a row would depend on those
    that it is batched with.
    """
    parts, shape = model.anatomy, batch.tokens.shape
    rows = torch.arange(len(batch.lengths), device=model.device)
    ends = torch.from_numpy(batch.lengths.astype(np.int64) - 1).to(model.device)
    kept: list[dict[str, Float[Tensor, "context width"]]] = [{} for _ in parts.layers]
    routed: list[list[Routed]] = [[] for _ in parts.layers]

    def keep(seen: dict[str, Tensor], point: str, x: Tensor) -> None:
        # OPT flattens contexts and tokens into one axis; indexing copies, and Falcon adds to its FFN's output in place.
        seen[point] = summed(flat(x), batch.tokens.size).view(*shape, -1)[rows, ends].float()

    def keep_routed(layer: Layer, pieces: list[Routed], piece: Routed) -> None:
        assert layer.experts is not None
        pieces.append(piece.at(rows * shape[1] + ends).moved(layer.experts.module, at_home))

    def added(layer: Layer, seen: dict[str, Tensor]) -> Float[Tensor, "context width"]:
        """What the FFN of a layer wrote, and its extra module, as they are added to the stream."""
        output, norm = seen.get("ffn_output", torch.zeros_like(seen["lin"])), layer.post_ffn_norm
        written = output if norm is None else norm(output)
        written = (written + seen.get("extra_output", 0.0)) * layer.ffn_multiplier
        return written if layer.ffn_shift is None else written + layer.ffn_shift

    tokens = torch.from_numpy(batch.tokens).to(model.device, torch.int64)
    with (
        model.running(),
        observed(model.hf, upcast=model.upcast, attention=None),
        hooked(
            [
                handle
                for layer, seen in zip(parts.layers, kept, strict=True)
                for handle in watch(layer, _watched(layer), partial(keep, seen))
            ]
        ),
        hooked(
            [
                listen(layer.experts.module, partial(keep_routed, layer, pieces))
                for layer, pieces in zip(parts.layers, routed, strict=True)
                if layer.experts is not None
            ]
        ),
        taken_apart(model.hf),
        torch.inference_mode(),
    ):
        parts.body(input_ids=tokens, use_cache=False)
        layers = list(zip(parts.layers, kept, strict=True))
        for (layer, seen), pieces in zip(layers, routed, strict=True):
            if layer.experts is not None:
                seen |= mixture(layer, seen, pieces)
                seen["coefficients"] = seen["coefficients"] * layer.spread(seen["weights"])
        residual = [after_attention(layer, seen) for layer, seen in layers]
        ffn = [added(layer, seen) for layer, seen in layers]
        coefficients = torch.cat([seen["coefficients"] for seen in kept if "coefficients" in seen], -1)
        return Points(torch.stack(residual, 1), torch.stack(ffn, 1), coefficients)
