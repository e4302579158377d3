"""One forward pass as a sum of parts, multiplied out on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mnemoscope.model.parts import Anatomy, Norm, bias_of
from mnemoscope.model.running import hooked, observed
from mnemoscope.model.watch import LayerTrace, Products, Witness, flat, heads_of, shared_out, watch


@dataclass(eq=False)
class Stream:
    """One forward pass taken apart.

    Parts are fp32 and carry frozen post-norms and multipliers: at every position (0-based) the embedding
    plus ``attention_parts``, ``attention_bias``, ``neuron_parts`` and ``ffn_bias`` of all layers add up to
    ``final``.

    Where the residual stream itself is normalised (post-norm encoders), or goes through a linear module and an
    activation function before the last norm (the head of a masked language model), parts and points are what becomes of
    them there: each is carried through all that follows, with statistics frozen at those of the pass, and
    gelu(z) as z * (gelu(z) / z). So they add up as elsewhere; what these norms add is in the biases of the layers, and
    what the head adds, whatever it reads, is ``constant``.
    """

    hf: PreTrainedModel = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    tokens: Int[Tensor, " token"]
    layers: tuple[LayerTrace, ...] = field(repr=False)
    logits: Float[Tensor, "token vocabulary"] = field(repr=False)  # the model's own
    upcast: bool
    dense: Float[Tensor, "token out"] | None = field(
        default=None, repr=False
    )  # what the head's linear module returned
    read: Float[Tensor, "token out"] | None = field(
        default=None, repr=False
    )  # what the last norm read behind it

    @property
    def embedding(self) -> Float[Tensor, "token width"]:
        """Lin0: what enters the first block, positions included where they are added."""
        return self.layers[0].lin

    @property
    def final(self) -> Float[Tensor, "token width"]:
        """What the final norm reads: the last Lout, or what the head's transform made of it."""
        return self.layers[-1].lout if self.read is None else self.read

    def points(self, position: int) -> Float[Tensor, "point width"]:
        """The 2L+1 residuals Lin0, Lres0, Lout0, Lres1, ... at a position (A30), fp32."""
        rows = [self.embedding[position]]
        for traced in self.layers:
            rows += [traced.lres[position], traced.lout[position]]
        carried = [self.carried(row.float(), stage, position) for stage, row in enumerate(rows)]
        return torch.stack(carried) + self.constant(position)

    def carried(
        self, vectors: Float[Tensor, "*rows width"], stage: int, where: int | slice
    ) -> Float[Tensor, "*rows out"]:
        """What becomes of vectors up to the last norm: through all norms of the stream that follow, and the head.

        stage  2 x layer for what is added before or by an attention, one more by an FFN, 2 x layers behind the last
        where  the position of all vectors, or all positions, which are the rows
        """
        for later in range(stage, 2 * len(self.layers) + 1):
            vectors = self._through(vectors, later, where)
        return vectors

    def onward(
        self, residual: Float[Tensor, "token width"], stage: int, where: int | slice = slice(None)
    ) -> Float[Tensor, "token out"]:
        """The residual behind the norm of a stage, or the head's transform, with the biases."""
        after, bias = self._through(residual, stage, where), self._added(stage, where)
        return after if bias is None else after + bias

    def constant(self, position: int) -> Float[Tensor, " out"]:
        """What the transform of the head adds, whatever it reads; 0 without one."""
        last = 2 * len(self.layers)
        added = self._added(last, position)
        return torch.zeros_like(self.final[position], dtype=torch.float32) if added is None else added

    def embedding_part(self, position: int) -> Float[Tensor, " out"]:
        """What becomes of the embedding at a position."""
        return self.carried(self.embedding[position].float(), 0, position)

    def _norm(self, stage: int) -> tuple[Norm | None, Tensor | None]:
        """The norm of the stream at a stage, and what it read."""
        layer, half = divmod(stage, 2)
        block, traced = self.anatomy.layers[layer], self.layers[layer]
        return (block.end_norm, traced.end) if half else (block.middle_norm, traced.middle)

    def _through(self, vectors: Tensor, stage: int, where: int | slice) -> Tensor:
        if stage < 2 * len(self.layers):
            norm, reference = self._norm(stage)
            return vectors if norm is None or reference is None else norm.frozen(vectors, reference[where])
        transform = self.anatomy.transform
        if transform is None:
            return vectors
        if transform.norm is not None:
            vectors = transform.norm.frozen(vectors, self.layers[-1].lout[where])
        return transform.linear(vectors) * self._slope(where)

    def _added(self, stage: int, where: int | slice) -> Tensor | None:
        """What a stage adds whatever it reads."""
        if stage < 2 * len(self.layers):
            norm, _ = self._norm(stage)
            return None if norm is None else norm.bias
        transform = self.anatomy.transform
        if transform is None:
            return None
        bias, dense = None if transform.norm is None else transform.norm.bias, bias_of(transform.dense)
        known = [
            *([] if bias is None else [transform.linear(bias)]),
            *([] if dense is None else [dense.float()]),
        ]
        return reduce(torch.add, known) * self._slope(where) if known else None

    def _slope(self, where: int | slice) -> Tensor:
        """gelu(z) / z of the head, as it was seen."""
        assert self.dense is not None and self.read is not None, "a pass through a transform has seen it"
        z, active = self.dense[where].float(), self.read[where].float()
        return torch.where(z == 0, torch.zeros_like(z), active / z)

    def sources(self, position: int) -> int:
        """How many positions a position sees, from the first."""
        return len(self.tokens) if self.anatomy.bidirectional else position + 1

    def attention_parts(self, layer: int, position: int) -> Float[Tensor, "head source width"]:
        """What each head writes from each source: up to ``position``, in an encoder from all (A32)."""
        traced, block, seen = self.layers[layer], self.anatomy.layers[layer], self.sources(position)
        alpha = traced.alpha[:, position, :seen].float()
        weighted = traced.weighted(position, alpha[..., None] * traced.value[:, :seen].float())
        written = weighted @ block.heads().float()
        output, factor = traced.attention_output[position], block.attention_multiplier
        folded = self._folded(written, block.post_attention_norm, output, factor)
        return self.carried(folded, 2 * layer, position)

    def attention_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What a layer writes before its FFN whatever it attends to: a bias, or all that an opaque mixer writes."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        output, factor = traced.attention_output[position], block.attention_multiplier
        bias = self._bias(traced.fixed(block, position), block.post_attention_norm, output, factor)
        return self._with_norm(bias, 2 * layer, position)

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
        output, factor = traced.ffn_output[position], block.ffn_multiplier
        return self.carried(
            self._folded(written, block.post_ffn_norm, output, factor), 2 * layer + 1, position
        )

    def ffn_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What the FFN of a layer writes whatever it detects, and what its extra module writes after that."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        output, factor = traced.ffn_output[position], block.ffn_multiplier
        bias = self._bias(self.down_bias(layer, position), block.post_ffn_norm, output, factor)
        if traced.extra_output is not None:
            bias = bias + traced.extra_output[position].float() * factor
        return self._with_norm(bias, 2 * layer + 1, position)

    def attention_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all heads x sources and the bias, at every position, from weights and values; as it is added."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        mixed = traced.weighted(slice(None), traced.alpha.float() @ traced.value.float())
        written = (mixed @ block.heads().float()).sum(0)
        fixed = traced.fixed(block, slice(None))
        norm, factor = block.post_attention_norm, block.attention_multiplier
        bias = self._bias(fixed, norm, traced.attention_output, factor)
        return self._folded(written, norm, traced.attention_output, factor) + bias

    def ffn_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons and the bias, at every position, from coefficients and values; as it is added."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        norm, factor = block.post_ffn_norm, block.ffn_multiplier
        bias = self._bias(self.down_bias(layer, slice(None)), norm, traced.ffn_output, factor)
        if traced.extra_output is not None:
            bias = bias + traced.extra_output.float() * factor
        return self._folded(self.neurons_written(layer), norm, traced.ffn_output, factor) + bias

    def neurons_written(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons before any post-norm, multiplier and bias; weights are widened group by group."""
        amounts = self.layers[layer].amounts(self.anatomy.layers[layer])
        products = (
            amounts[:, rows.neurons] @ rows.values.float() for rows in self.anatomy.layers[layer].rows()
        )
        return reduce(torch.add, products, torch.zeros_like(self.layers[layer].lin, dtype=torch.float32))

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
                x = (lin / block.arrives.lin).to(self.embedding.dtype)[None]
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

    def _folded(self, written: Tensor, norm: Norm | None, output: Tensor, factor: float) -> Tensor:
        """``written`` through the post-norm frozen at its output, and a multiplier (G4)."""
        if norm is not None:
            scale = norm.scale(output)
            written = norm.linear(written, scale)
        return written * factor

    def _with_norm(self, bias: Tensor, stage: int, position: int) -> Tensor:
        """A bias carried on, and that of the norm of the stream that it goes through first."""
        carried, added = self.carried(bias, stage, position), self._added(stage, position)
        return carried if added is None else carried + self.carried(added, stage + 1, position)

    def _bias(self, bias: Tensor | None, norm: Norm | None, output: Tensor, factor: float) -> Tensor:
        written = (
            torch.zeros_like(output, dtype=torch.float32) if bias is None else bias.float().expand_as(output)
        )
        written = self._folded(written, norm, output, factor)
        if norm is not None and norm.bias is not None:
            written = written + norm.bias * factor
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
    head: dict[str, Tensor] = {}
    handles += _at_the_head(anatomy, head)
    with hooked(handles), observed(hf, upcast=upcast, attention=anatomy.attention), recorder:
        logits = anatomy.outputs(hf(input_ids=tokens, **anatomy.calling()))[0]
    layers = tuple(witness.trace(index, anatomy) for index, witness in enumerate(witnesses))
    return Stream(hf, anatomy, tokens[0], layers, logits, upcast, **head)


def _at_the_head(anatomy: Anatomy, seen: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep what the linear module of a head's transform returns, and what the last norm reads."""
    if anatomy.transform is None:
        return []
    norm = anatomy.final_norm
    assert norm is not None and norm.module is not None, "a transform ends in a norm"

    def returned(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        seen["dense"] = flat(output)

    def read(_: Any, args: tuple[Any, ...]) -> None:
        seen["read"] = flat(args[0])

    dense = anatomy.transform.dense.register_forward_hook(returned)
    return [dense, norm.module.register_forward_pre_hook(read)]
