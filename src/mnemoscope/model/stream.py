"""One forward pass as a sum of parts, multiplied out on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.model.parts import Anatomy, Norm
from mnemoscope.model.watch import (
    LayerTrace,
    Products,
    Witness,
    heads_of,
    hooked,
    observed,
    shared_out,
    watch,
)


@dataclass(eq=False)
class Stream:
    """One forward pass taken apart.

    Parts are fp32 and carry frozen post-norms and multipliers: at every position (0-based) the embedding
    plus ``attention_parts``, ``attention_bias``, ``neuron_parts`` and ``ffn_bias`` of all layers add up to
    ``final``.
    """

    hf: PreTrainedModel = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    tokens: Int[Tensor, " token"]
    layers: tuple[LayerTrace, ...] = field(repr=False)
    logits: Float[Tensor, "token vocabulary"] = field(repr=False)  # the model's own
    upcast: bool

    @property
    def embedding(self) -> Float[Tensor, "token width"]:
        """Lin0: what enters the first block, positions included where they are added."""
        return self.layers[0].lin

    @property
    def final(self) -> Float[Tensor, "token width"]:
        """The last Lout, which the final norm reads."""
        return self.layers[-1].lout

    def points(self, position: int) -> Float[Tensor, "point width"]:
        """The 2L+1 residuals Lin0, Lres0, Lout0, Lres1, ... at a position (A30), fp32."""
        rows = [self.embedding[position]]
        for traced in self.layers:
            rows += [traced.lres[position], traced.lout[position]]
        return torch.stack(rows).float()

    def attention_parts(self, layer: int, position: int) -> Float[Tensor, "head source width"]:
        """What each head writes from each source up to ``position`` (A32)."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        alpha = traced.alpha[:, position, : position + 1].float()
        weighted = traced.weighted(position, alpha[..., None] * traced.value[:, : position + 1].float())
        written = weighted @ block.heads().float()
        return self._folded(written, block.post_attention_norm, traced.attention_output[position])

    def attention_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What a layer writes before its FFN whatever it attends to: a bias, or all that an opaque mixer writes."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        return self._bias(
            traced.fixed(block, position), block.post_attention_norm, traced.attention_output[position]
        )

    def neuron_parts(
        self, layer: int, position: int, neurons: Int[Tensor, " neuron"] | None = None
    ) -> Float[Tensor, "neuron width"]:
        """What each neuron writes, coefficient times value (A33); all neurons of the layer by default.

        In a mixture times the weight of its expert: 0 where the position was not routed to it.
        """
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        amounts, values = traced.amounts(block, position), block.values()
        if neurons is not None:
            amounts, values = amounts[neurons], values[neurons]
        written = amounts[:, None] * values.float()
        return self._folded(written, block.post_ffn_norm, traced.ffn_output[position])

    def ffn_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What the FFN of a layer writes whatever it detects."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        return self._bias(self.down_bias(layer, position), block.post_ffn_norm, traced.ffn_output[position])

    def attention_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all heads x sources and the bias, at every position, from weights and values."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        mixed = traced.weighted(slice(None), traced.alpha.float() @ traced.value.float())
        written = (mixed @ block.heads().float()).sum(0)
        fixed = traced.fixed(block, slice(None))
        bias = self._bias(fixed, block.post_attention_norm, traced.attention_output)
        return self._folded(written, block.post_attention_norm, traced.attention_output) + bias

    def ffn_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons and the bias, at every position, from coefficients and values."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        bias = self._bias(self.down_bias(layer, slice(None)), block.post_ffn_norm, traced.ffn_output)
        written = self.neurons_written(layer)
        return self._folded(written, block.post_ffn_norm, traced.ffn_output) + bias

    def neurons_written(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons before any post-norm, multiplier and bias; weights are widened group by group."""
        amounts = self.layers[layer].amounts(self.anatomy.layers[layer])
        products = (
            amounts[:, rows.neurons] @ rows.values.float() for rows in self.anatomy.layers[layer].rows()
        )
        return reduce(torch.add, products)

    def attend(
        self, layer: int, lins: Float[Tensor, "case token width"]
    ) -> Iterator[tuple[Float[Tensor, "head token source"], Float[Tensor, "head source dimension"]]]:
        """Attention weights and value vectors if the residual entering ``layer`` were each of ``lins`` (A53, A54)."""
        block, (args, kwargs) = self.anatomy.layers[layer], self.layers[layer].call
        if block.attention is None:
            yield from ((self.layers[layer].alpha, self.layers[layer].value) for _ in lins)
            return
        witness = Witness(block, Products())
        handles = watch(block, ("mixed",), witness.see)
        watched = observed(self.hf, upcast=self.upcast, attention=self.anatomy.attention)
        with torch.no_grad(), hooked(handles), watched, witness.recorder:
            for lin in lins:
                x = lin.to(self.embedding.dtype)[None]
                if block.input_norm is not None and block.input_norm.module is not None:
                    x = block.input_norm.module(x)
                if args:
                    block.attention(x, *args[1:], **kwargs)
                else:
                    block.attention(**{**kwargs, "hidden_states": x})
                alpha, value = heads_of(witness.product, block.n_heads)
                yield (shared_out(alpha, value, witness.seen["mixed"]) if block.sink else alpha), value

    def down_bias(self, layer: int, where: int | slice) -> Tensor | None:
        """The bias of the down projection, in a mixture those of its groups by their weights."""
        weights, biases = self.layers[layer].weights, self.anatomy.layers[layer].group_biases()
        if biases is None:
            return None
        return biases[0] if weights is None else weights[where] @ biases.float()

    def _folded(self, written: Tensor, norm: Norm | None, output: Tensor) -> Tensor:
        """``written`` through the post-norm frozen at its output, and the residual multiplier (G4)."""
        if norm is not None:
            scale = norm.scale(output)
            written = norm.linear(written, scale)
        return written * self.anatomy.residual_multiplier

    def _bias(self, bias: Tensor | None, norm: Norm | None, output: Tensor) -> Tensor:
        written = (
            torch.zeros_like(output, dtype=torch.float32) if bias is None else bias.float().expand_as(output)
        )
        written = self._folded(written, norm, output)
        if norm is not None and norm.bias is not None:
            written = written + norm.bias * self.anatomy.residual_multiplier
        return written


@torch.no_grad()
def trace(
    hf: PreTrainedModel, anatomy: Anatomy, tokens: Int[Tensor, "1 token"], *, upcast: bool = False
) -> Stream:
    """Run the whole model once on one sequence, without a cache, and keep what every block did.

    Keeps O(layers x token x (neurons + head x token)) numbers. ``upcast`` runs a bf16 or fp16 model in
    fp32, by widening one module's weights at a time while it runs: the most extra memory is its largest
    single weight. The model's mode, attention implementation and weights are put back, also after an error.
    """
    recorder = Products()
    witnesses = [Witness(layer, recorder) for layer in anatomy.layers]
    handles = [handle for witness in witnesses for handle in witness.handles()]
    with hooked(handles), observed(hf, upcast=upcast, attention=anatomy.attention), recorder:
        logits = hf(input_ids=tokens, use_cache=False).logits[0]
    layers = tuple(witness.trace(index, anatomy) for index, witness in enumerate(witnesses))
    return Stream(hf, anatomy, tokens[0], layers, logits, upcast)
