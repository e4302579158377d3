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

from mnemoscope.model.parts import Anatomy, Attention, Factor, Norm, SourceText, bias_of, rows_of
from mnemoscope.model.running import hooked, observed
from mnemoscope.model.spread import at_home
from mnemoscope.model.unit_parts import (
    Beside,
    beside_units,
    heads_are_replaced,
    replaced,
    unit_parts,
    with_units,
)
from mnemoscope.model.watch import (
    AttentionTrace,
    LayerTrace,
    Products,
    Witness,
    flat,
    heads_of,
    shared_out,
    watch,
)


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

    Of an encoder-decoder this is the decoder's, and ``source`` are the tokens that the encoder has read. Positions that
    heads look at are then counted through, the encoder's first, and heads of cross attention follow a layer's own.
    """

    hf: PreTrainedModel = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    tokens: Int[Tensor, " token"]
    layers: tuple[LayerTrace, ...] = field(repr=False)
    logits: Float[Tensor, "token vocabulary"] = field(repr=False)  # the model's own
    upcast: bool
    dense: tuple[Float[Tensor, "token _"], ...] = field(
        default=(), repr=False
    )  # what each linear module of the head returned
    read: tuple[Float[Tensor, "token _"], ...] = field(
        default=(), repr=False
    )  # what was read of each, behind its function
    source: Int[Tensor, " source"] | None = None

    @property
    def embedding(self) -> Float[Tensor, "token width"]:
        """Lin0: what enters the first block, positions included where they are added."""
        return self.layers[0].lin

    @property
    def final(self) -> Float[Tensor, "token width"]:
        """What the final norm reads: the last Lout, or what the head's transform made of it."""
        return self.read[-1] if self.read else self.layers[-1].lout

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
        """What becomes of the embedding at a position; nothing where units stand for the stream that it is in."""
        if replaced(self.anatomy) >= 0:
            return torch.zeros_like(self.final[position], dtype=torch.float32)
        return self.carried(self.embedding[position].float(), 0, position)

    def attentions(self, layer: int) -> list[tuple[Attention, AttentionTrace, int]]:
        """The attentions of a layer in the order in which they add to the stream: its own, and a cross attention; each
        with the first position that it looks at, counted through.
        """
        block, traced = self.anatomy.layers[layer], self.layers[layer]
        own: list[tuple[Attention, AttentionTrace, int]] = [(block, traced, self.encoded)]
        return own if block.cross is None or traced.cross is None else [*own, (block.cross, traced.cross, 0)]

    def _attentions(self, layer: int) -> list[tuple[Attention, AttentionTrace]]:
        return [(block, traced) for block, traced, _ in self.attentions(layer)]

    def _norms(self, stage: int, first: int = 0) -> list[tuple[Norm, Tensor]]:
        """The norms that the stream goes through at a stage, each with what it read; from one attention on."""
        layer, half = divmod(stage, 2)
        pairs = [(block.middle_norm, traced.middle) for block, traced in self._attentions(layer)[first:]]
        if half:
            pairs = [(self.anatomy.layers[layer].end_norm, self.layers[layer].end)]
        return [(norm, read) for norm, read in pairs if norm is not None and read is not None]

    def _through(self, vectors: Tensor, stage: int, where: int | slice, first: int = 0) -> Tensor:
        if stage < 2 * len(self.layers):
            for norm, reference in self._norms(stage, first):
                vectors = norm.frozen(vectors, reference[where])
            return vectors
        transform = self.anatomy.transform
        if transform is None:
            return vectors
        if transform.norm is not None:
            vectors = transform.norm.frozen(vectors, self.layers[-1].lout[where])
        for module, slope in zip(transform.dense, self._slopes(where), strict=True):
            vectors = vectors.float() @ rows_of(module).float().T * slope
        return vectors

    def _added(self, stage: int, where: int | slice) -> Tensor | None:
        """What a stage adds whatever it reads."""
        if stage < 2 * len(self.layers):
            total = None
            for norm, reference in self._norms(stage):
                total = None if total is None else norm.frozen(total, reference[where])
                if norm.bias is not None:
                    total = norm.bias if total is None else total + norm.bias
            return total
        transform = self.anatomy.transform
        if transform is None:
            return None
        added = None if transform.norm is None else transform.norm.bias
        for module, slope in zip(transform.dense, self._slopes(where), strict=True):
            bias = bias_of(module)
            known = [
                *([] if added is None else [added.float() @ rows_of(module).float().T]),
                *([] if bias is None else [bias.float()]),
            ]
            added = reduce(torch.add, known) * slope if known else None
        return added

    def _slopes(self, where: int | slice) -> Iterator[Tensor]:
        """gelu(z) / z of each linear module of the head, as it was seen."""
        for returned, read in zip(self.dense, self.read, strict=True):
            z, active = returned[where].float(), read[where].float()
            yield torch.where(z == 0, torch.zeros_like(z), active / z)

    @property
    def read_tokens(self) -> Int[Tensor, " position"]:
        """The tokens of all positions that heads may look at."""
        return self.tokens if self.source is None else torch.cat([self.source, self.tokens])

    @property
    def encoded(self) -> int:
        """How many of them are the encoder's."""
        return 0 if self.source is None else len(self.source)

    def sources(self, position: int) -> int:
        """How many positions a position sees, from the first."""
        return len(self.tokens) if self.anatomy.bidirectional else self.encoded + position + 1

    def attention_parts(self, layer: int, position: int) -> Float[Tensor, "head source width"]:
        """What each head writes from each source: up to ``position``, in an encoder from all (A32).

        Heads of cross attention write 0 from the decoder's positions, all others 0 from the encoder's.
        """
        if heads_are_replaced(self.anatomy, layer):
            shape = (self.anatomy.n_heads, self.sources(position), self.final.shape[-1])
            return self.final.new_zeros(shape, dtype=torch.float32)
        return self.heads_written(layer, position)

    def heads_written(self, layer: int, position: int) -> Float[Tensor, "head source width"]:
        """`attention_parts`, also where units stand for the heads."""
        parts = []
        for first, (block, traced) in enumerate(self._attentions(layer)):
            alpha = self._alpha(first, traced, position).float()
            values = alpha[..., None] * traced.value[:, : alpha.shape[-1]].float()
            written = traced.weighted(position, values) @ block.heads().float()
            output, factor = traced.attention_output[position], block.attention_multiplier
            written = self._folded(written, block.post_attention_norm, output, factor)
            parts.append(self._onward(written, layer, first, position))
        return parts[0] if len(parts) == 1 else _beside(*parts)

    def attention_weights(self, layer: int, position: int) -> Float[Tensor, "head source"]:
        """The weight that each head gives each source, as in `attention_parts`."""
        weights = [self._alpha(a, traced, position) for a, (_, traced) in enumerate(self._attentions(layer))]
        return weights[0] if len(weights) == 1 else _beside(*weights)

    def _alpha(self, which: int, traced: AttentionTrace, position: int) -> Float[Tensor, "head source"]:
        """The weights of one attention of a layer: of what a position sees of its own stack, or of the encoder's."""
        return traced.alpha[:, position, : None if which else self.sources(position) - self.encoded]

    def _onward(self, vectors: Tensor, layer: int, first: int, position: int) -> Tensor:
        """`carried` for what one attention of a layer adds."""
        return self.carried(self._through(vectors, 2 * layer, position, first), 2 * layer + 1, position)

    def attention_bias(self, layer: int, position: int) -> Float[Tensor, " width"]:
        """What a layer writes before its FFN whatever it attends to: biases, or all that an opaque mixer writes."""
        fixed = [
            self._onward(self._fixed(block, traced, position), layer, first, position)
            for first, (block, traced) in enumerate(self._attentions(layer))
        ]
        added = self._added(2 * layer, position)
        return reduce(
            torch.add, fixed if added is None else [*fixed, self.carried(added, 2 * layer + 1, position)]
        )

    def _fixed(self, block: Attention, traced: AttentionTrace, where: int | slice) -> Tensor:
        """What one attention writes whatever it attends to, as it is added."""
        output, factor = traced.attention_output[where], block.attention_multiplier
        fixed = self._bias(traced.fixed(block, where), block.post_attention_norm, output, factor)
        return fixed if block.shift is None else fixed + block.shift

    def neuron_parts(
        self, layer: int, position: int, neurons: Int[Tensor, " neuron"] | None = None
    ) -> Float[Tensor, "neuron width"]:
        """What each neuron writes, coefficient times value (A33); all neurons of the layer by default.

        In a mixture times the weight of its expert: 0 where the position was not routed to it. Of other units what they
        write in all layers.
        """
        if self.anatomy.of_units:
            return unit_parts(self, layer, position, slice(None) if neurons is None else neurons)
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
        output, block = self.layers[layer].ffn_output[position], self.anatomy.layers[layer]
        bias = self._bias(self.down_bias(layer, position), block.post_ffn_norm, output, block.ffn_multiplier)
        return self.with_norm(self._with_extra(bias, layer, position), 2 * layer + 1, position)

    def _with_extra(self, written: Tensor, layer: int, where: int | slice) -> Tensor:
        """What an FFN writes, with what is added to the stream beside it."""
        extra, block = self.layers[layer].extra_output, self.anatomy.layers[layer]
        if extra is not None:
            written = written + extra[where].float() * block.ffn_multiplier
        return written if block.ffn_shift is None else written + block.ffn_shift

    def ffn_whole(self, layer: int, position: int) -> Float[Tensor, " out"]:
        """All that the FFN of a layer writes, as one part, with what its extra module writes after that."""
        output, block = self.layers[layer].ffn_output[position], self.anatomy.layers[layer]
        written = self._bias(output, block.post_ffn_norm, output, block.ffn_multiplier)
        return self.with_norm(self._with_extra(written, layer, position), 2 * layer + 1, position)

    def beside(self, layer: int, position: int) -> list[Beside]:
        """What a layer adds that no head and no neuron (or unit) wrote."""
        if self.anatomy.of_units:
            return beside_units(self, layer, position)
        block = self.anatomy.layers[layer]
        return [
            (block.beside_heads, 2 * layer, self.attention_bias(layer, position)),
            (block.beside_neurons, 2 * layer + 1, self.ffn_bias(layer, position)),
        ]

    def attention_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all heads x sources and the bias, at every position, from weights and values; as it is added."""
        return reduce(torch.add, (self._update(*attention) for attention in self._attentions(layer)))

    def attended(self, layer: int, residual: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """The residual behind the attentions of a layer, and behind their norms of the stream with the biases."""
        for block, traced in self._attentions(layer):
            residual = residual + self._update(block, traced)
            norm = block.middle_norm
            if norm is not None and traced.middle is not None:
                residual = norm.frozen(residual, traced.middle)
                residual = residual if norm.bias is None else residual + norm.bias
        return residual

    def _update(self, block: Attention, traced: AttentionTrace) -> Float[Tensor, "token width"]:
        """The sum of the heads x sources of one attention and its bias, as it is added."""
        every = slice(None)
        mixed = traced.weighted(every, traced.alpha.float() @ traced.value.float())
        written = (mixed @ block.heads().float()).sum(0)
        norm, factor = block.post_attention_norm, block.attention_multiplier
        return self._folded(written, norm, traced.attention_output, factor) + self._fixed(
            block, traced, every
        )

    def ffn_update(self, layer: int) -> Float[Tensor, "token width"]:
        """The sum of all neurons and the bias, at every position, from coefficients and values; as it is added."""
        traced, block = self.layers[layer], self.anatomy.layers[layer]
        norm, factor = block.post_ffn_norm, block.ffn_multiplier
        bias = self._bias(self.down_bias(layer, slice(None)), norm, traced.ffn_output, factor)
        bias = self._with_extra(bias, layer, slice(None))
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
        weights, block = self.layers[layer].weights, self.anatomy.layers[layer]
        outer = None if block.experts is None else block.experts.outer_bias
        biases = block.group_biases()
        if biases is None:
            return outer
        total = biases[0] if weights is None else weights[where] @ biases.float()
        return total if outer is None else total + outer

    def _folded(self, written: Tensor, norm: Norm | None, output: Tensor, factor: Factor) -> Tensor:
        """``written`` through the post-norm frozen at its output, and a multiplier (G4)."""
        if norm is not None:
            scale = norm.scale(output)
            written = norm.linear(written, scale)
        return written * factor

    def with_norm(self, bias: Tensor, stage: int, position: int) -> Tensor:
        """A bias carried on, and that of the norm of the stream that it goes through first."""
        carried, added = self.carried(bias, stage, position), self._added(stage, position)
        return carried if added is None else carried + self.carried(added, stage + 1, position)

    def _bias(self, bias: Tensor | None, norm: Norm | None, output: Tensor, factor: Factor) -> Tensor:
        written = (
            torch.zeros_like(output, dtype=torch.float32) if bias is None else bias.float().expand_as(output)
        )
        written = self._folded(written, norm, output, factor)
        if norm is not None and norm.bias is not None:
            written = written + norm.bias * factor
        return written


def _beside(
    own: Float[Tensor, "head token *width"], cross: Float[Tensor, "cross_head encoded *width"]
) -> Float[Tensor, "every_head source *width"]:
    """Those of a layer's own heads and then those of its cross attention, by sources counted through."""
    shape = (len(own) + len(cross), cross.shape[1] + own.shape[1], *own.shape[2:])
    whole = own.new_zeros(shape)
    whole[: len(own), cross.shape[1] :], whole[len(own) :, : cross.shape[1]] = own, cross
    return whole


@torch.no_grad()
def trace(
    hf: PreTrainedModel,
    anatomy: Anatomy,
    tokens: Int[Tensor, "1 token"],
    source: Int[Tensor, "1 source"] | None = None,
    *,
    upcast: bool = False,
) -> Stream:
    """Run the whole model once on one sequence, without a cache, and keep what every block did.

    Keeps O(layers x token x (neurons + head x token)) numbers. ``upcast`` runs a bf16 or fp16 model in
    fp32, by widening one module's weights at a time while it runs: the most extra memory is its largest
    single weight. The model's mode, attention implementation and weights are put back, also after an error.

    source  what the encoder of an encoder-decoder reads, whose decoder then reads the tokens
    """
    recorder, predicting = Products(), anatomy.predicting
    witnesses = [Witness(layer, recorder) for layer in predicting.layers]
    handles = [handle for witness in witnesses for handle in witness.handles()]
    dense: list[Tensor] = []
    read: list[Tensor] = []
    handles += _at_the_head(anatomy, dense, read)
    given = None if source is None else SourceText(source)
    with hooked(handles), observed(hf, upcast=upcast, attention=anatomy.attention), recorder:
        logits = anatomy.outputs(hf(**anatomy.calling(tokens, source=given)))[0]
    layers = tuple(witness.trace(index, predicting) for index, witness in enumerate(witnesses))
    layers = with_units(predicting, layers) if predicting.of_units else layers
    text = None if source is None else source[0]
    return Stream(hf, predicting, tokens[0], layers, logits, upcast, tuple(dense), tuple(read), source=text)


def _at_the_head(anatomy: Anatomy, dense: list[Tensor], read: list[Tensor]) -> list[Any]:
    """Hooks that keep what the linear modules of a head's transform return, and what is read of that."""
    if anatomy.transform is None:
        return []
    last = anatomy.head if anatomy.final_norm is None else anatomy.final_norm.module
    assert last is not None, "the norm of a head was read from a module"

    def returned(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        dense.append(at_home(anatomy.body, flat(output)))

    def reading(_: Any, args: tuple[Any, ...]) -> None:
        read.append(at_home(anatomy.body, flat(args[0])))

    modules = anatomy.transform.dense
    handles = [module.register_forward_hook(returned) for module in modules]
    return handles + [module.register_forward_pre_hook(reading) for module in (*modules[1:], last)]
