"""What a model is made of: norms, projections, layers, and the whole, the right way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mnemoscope.model.adaptive import Bands
from mnemoscope.model.experts import Experts, Rows
from mnemoscope.model.packed import multiplied_out, ordinary, packed, sizes
from mnemoscope.model.spread import at_home, held
from mnemoscope.model.units import LayerUnits, passing

Factor = float | Float[Tensor, " width"]
"""What vectors of the stream are multiplied with: one number, or one for each channel."""


def is_one(factor: Factor) -> bool:
    """Whether a factor is the number 1."""
    return not isinstance(factor, Tensor) and factor == 1


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation over the width, read from its module: ``weight * (x - [mean x]) * scale(x) + bias``.

    ``weight`` is effective (Gemma's ``1 + w`` is folded) and, like ``bias``, an fp32 copy: describe the model
    again after changing its weights. Statistics are taken in fp32.
    """

    kind: str  # "rms" | "layer" (which also subtracts the mean)
    weight: Float[Tensor, " width"] | None
    bias: Float[Tensor, " width"] | None
    eps: float
    module: nn.Module | None = field(default=None, repr=False)  # where it was read, for hooks
    unit: float | Float[Tensor, " width"] = 1.0  # what it reads is measured by this: it is divided first

    def scale(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... 1"]:
        """1 / rms of ``x``, or 1 / (population) standard deviation, epsilon included; fp32."""
        x = self._centre(x)
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def linear(
        self, v: Float[Tensor, "*#rows width"], scale: Float[Tensor, "*#rows 1"]
    ) -> Float[Tensor, "*rows width"]:
        """``weight * (v - [mean v]) * scale`` in fp32, without the bias: additive in ``v`` (G2, G3)."""
        out = self._centre(v) * scale
        return out if self.weight is None else out * self.weight

    def frozen(
        self, v: Float[Tensor, "*#rows width"], reference: Float[Tensor, "*#rows width"]
    ) -> Float[Tensor, "*rows width"]:
        """`linear` with the statistics of ``reference``."""
        return self.linear(v, self.scale(reference))

    def __call__(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """The whole norm with the statistics of ``x`` itself, in the dtype of ``x``."""
        out = self.linear(x, self.scale(x))
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def _centre(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        x = x if is_one(self.unit) else x / self.unit
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x


@dataclass(frozen=True, eq=False)
class Projection:
    """Some outputs of a linear module: all of them, or one half of a fused gate and up projection."""

    module: nn.Module
    start: int
    stop: int

    def weight(self) -> Float[Tensor, "neuron width"]:
        """One row per output, as stored (a view; `Conv1D` is transposed)."""
        return rows_of(self.module)[self.start : self.stop]

    def bias(self) -> Float[Tensor, " neuron"] | None:
        """One number per output, or None."""
        bias = held(self.module, "bias")
        return None if bias is None else bias[self.start : self.stop]

    def of(self, output: Float[Tensor, "... fused"]) -> Float[Tensor, "... neuron"]:
        """This projection's share of what the module returned (for a forward hook on ``module``)."""
        return output[..., self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Gated:
    """What multiplies the mixed heads of each token before the output projection: a function of a module's output, or
    an RMS norm of all of them, whose statistic is that of the pass.
    """

    module: nn.Module
    function: Callable[[Tensor], Tensor]
    n_heads: int
    bias: Tensor | None = None  # one number for each head
    norm: Norm | None = None

    def of(self, output: Float[Tensor, "token out"], width: int) -> Float[Tensor, "token heads_x_dimension"]:
        """One factor for each of ``width`` channels: all that the module returns, the second half for each head
        (beside its queries), or one number for each head; of a norm, which is given what it reads, what it divides by.
        """
        if self.norm is not None:
            return self.norm.linear(torch.ones_like(output), self.norm.scale(output))
        if output.shape[-1] == 2 * width:
            output = output.reshape(len(output), self.n_heads, 2, -1)[:, :, 1].flatten(1)
        if self.bias is not None:
            output = output + self.bias.repeat_interleave(output.shape[-1] // self.n_heads)
        factors = self.function(output.float())
        return factors if factors.shape[-1] == width else factors.repeat_interleave(width // self.n_heads, -1)


class Arrives(NamedTuple):
    """How much arrives at the end of the last layer of what enters a block, its FFN reads, and leaves."""

    lin: Factor = 1.0
    lres: Factor = 1.0
    lout: Factor = 1.0

    @property
    def whole(self) -> bool:
        """Whether all of it does."""
        return all(map(is_one, self))


ALL_ARRIVES = Arrives()


@dataclass(frozen=True, eq=False)
class Transform:
    """What an encoder does between its last block and the last norm before the unembedding.

    A norm of its body, where it has one, and linear modules, each with a function of each of its outputs, which is seen
    and not known.
    """

    norm: Norm | None
    dense: tuple[nn.Module, ...]

    def linear(self, v: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """What the linear modules make of vectors, without biases; fp32."""
        return reduce(lambda vectors, module: vectors @ rows_of(module).float().T, self.dense, v.float())


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention:
    """What mixes positions in a block, with its norms: a block's own, or its cross attention to what an encoder read.

    ``module`` reads the stream as it enters: the block, or of a cross attention its norm, or the attention itself. In a
    post-norm block the stream goes through ``middle_norm`` after attention has added to it.
    """

    module: nn.Module
    attention: nn.Module | None
    attention_out: nn.Module | None
    n_heads: int
    width: int
    input_norm: Norm | None
    post_attention_norm: Norm | None
    middle_norm: Norm | None = None
    outer_bias: Tensor | None = None  # added to what the attention output projection writes
    attention_multiplier: Factor = 1.0
    shift: Float[Tensor, " width"] | None = None  # what is added to the stream beside

    def heads(self) -> Float[Tensor, "head dimension width"]:
        """Rows of the attention output projection, per query head; zeros of dimension 1 where there is none."""
        if self.attention_out is None:
            return self._nothing(self.n_heads, 1)
        rows = rows_of(self.attention_out).T
        return rows.reshape(self.n_heads, -1, rows.shape[-1])

    def out_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the attention output projection."""
        inner = None if self.attention_out is None else bias_of(self.attention_out)
        known = [bias for bias in (inner, self.outer_bias) if bias is not None]
        return sum(known[1:], known[0]) if known else None

    def _nothing(self, *rows: int) -> Float[Tensor, "*rows width"]:
        weight = next(filter(ordinary, self.module.parameters()))
        device = torch.device("cpu") if weight.is_meta else weight.device
        return at_home(self.module, torch.zeros(*rows, self.width, dtype=weight.dtype, device=device))


@dataclass(frozen=True, eq=False)
class OwnNorms:
    """RMS norms of experts and of a dense FFN beside them, which read and write through norms of their own (Gemma 4).

    The dense FFN is counted as the expert that every token goes through. What both read is the stream over its root
    mean square: the weights of these norms belong to keys and values, and what a norm of the sum divides by to the
    weight that each token has for the experts, or for the dense FFN.
    """

    read: Norm
    written: Norm
    shared_read: Norm
    shared_written: Norm

    def of(self, rows: Rows, shared: bool) -> Rows:
        """Weights of neurons as of what is read before these norms, and written behind them."""
        read, written = (self.shared_read, self.shared_written) if shared else (self.read, self.written)
        return replace(
            rows,
            keys=_times(rows.keys, read),
            ups=None if rows.ups is None else _times(rows.ups, read),
            values=_times(rows.values, written),
        )


def _times(rows: Float[Tensor, "neuron width"], norm: Norm) -> Float[Tensor, "neuron width"]:
    return rows if norm.weight is None else rows.float() * norm.weight


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(Attention):
    """One block: its modules, for hooks, and its weights, as stored and the right way round.

    The coefficients are the *input* of ``down``. ``gate`` gives the pre-activation that goes through the
    activation function: the gate of a gated FFN, the only first projection of a plain one (``up`` is None).
    ``ffn_norm is input_norm`` in blocks where attention and FFN read the same normalised vector.

    In a mixture the neurons of the ``experts`` come first, expert by expert, and ``down``, ``gate`` and ``up`` are
    those of the shared expert, whose neurons follow; they are None where there is none.

    Where experts and a dense FFN run beside each other through ``own_norms``, ``ffn_norm`` is what these have in
    common, and ``down``, ``gate`` and ``up`` are those of the dense FFN.

    In a post-norm block the residual stream itself goes through ``middle_norm``, after attention has added to it, and
    through ``end_norm`` after the FFN has. ``turn`` is (which use of its modules this layer is, of how many).

    In the decoder of an encoder-decoder ``cross`` attention to the last stream of the encoder adds to the stream
    between the block's own attention and its FFN.

    A block may have no FFN, and no neurons then, or nothing but one. Where it has ``units`` of another kind, keys,
    values and coefficients are theirs, and `rows` and `groups` still those of its neurons.
    Where its modules stand in several lists, ``module`` only holds them, and is never run: ``ends`` are.

    A ``mixer`` (a state space, a linear attention, a short convolution) mixes tokens without attention weights, instead
    of the attention, which is then None, or beside it: what it writes is one part of the block. So is what an attention
    writes that is no product of weights and values, and what an ``extra`` module writes after the FFN (Gemma's
    input per layer).

    What attention and FFN write is added after their post-norms, times their multipliers, and beside it a `shift`.
    Where blocks scale the whole stream, or each channel of it, it is measured by what of it `arrives` at the end: then
    the parts of all layers add up, and norms read it in that unit.
    """

    down: nn.Module | None
    gate: Projection | None
    up: Projection | None
    ffn_norm: Norm | None
    post_ffn_norm: Norm | None
    act: Callable[[Tensor], Tensor]  # of the gate; experts have their own
    experts: Experts | None = None
    mixer: nn.Module | None = None
    mixed_gate: Gated | None = None
    cross: Attention | None = None
    ffn_multiplier: Factor = 1.0
    ffn_shift: Float[Tensor, " width"] | None = None
    mixer_multiplier: float = 1.0  # beside that of the attention
    extra: nn.Module | None = None
    arrives: Arrives = ALL_ARRIVES
    sink: bool = False  # what is mixed is multiplied by the share of attention that does not go to nothing
    end_norm: Norm | None = None
    turn: tuple[int, int] = (0, 1)
    own_norms: OwnNorms | None = None
    inner_norm: Norm | None = None  # an RMS norm of all coefficients together, before the down projection
    units: LayerUnits | None = None
    ends: tuple[nn.Module, nn.Module] | None = (
        None  # what reads its input and returns its output, if not `module`
    )

    @property
    def groups(self) -> tuple[int, ...]:
        """Neurons that run on the same tokens: of the whole layer, or of each expert and of the shared one."""
        routed = () if self.experts is None else (self.experts.width,) * self.experts.count
        return routed if self.down is None else (*routed, shape_of(self.down)[1])

    @property
    def gated(self) -> bool:
        """Whether neurons have two key rows."""
        if self.units is not None:
            return False
        return self.up is not None or (self.experts is not None and self.experts.gated)

    @property
    def beside_neurons(self) -> str:
        """What is written with the FFN by no neuron: `extra` where there is one, any bias included."""
        return "ffn bias" if self.extra is None else "per-layer input"

    @property
    def beside_heads(self) -> str:
        """What is written before the FFN by no head: `mixer` where there is one, any bias included."""
        return "attention bias" if self.mixer is None else "mixer"

    def rows(self, of_stream: bool = True) -> Iterator[Rows]:
        """The weights of each of `groups` in turn; keys of the residual stream, or of what experts themselves read."""
        if not self.groups:
            return
        if self.experts is None:
            every = slice(0, sum(self.groups))
            yield Rows(every, self.keys(), self.key_bias(), self.ups(), self.up_bias(), self.values())
            return
        own = self.own_norms if of_stream else None
        for expert in range(self.experts.count):
            routed = self.experts.rows(expert, of_stream)
            yield routed if own is None else own.of(routed, shared=False)
        if self.down is not None:
            every = slice(self.experts.count * self.experts.width, sum(self.groups))
            weights = (_weight(self.gate), _bias(self.gate), _weight(self.up), _bias(self.up))
            assert weights[0] is not None, "a shared expert has keys"
            shared = Rows(every, weights[0], *weights[1:], rows_of(self.down).T)
            yield shared if own is None else own.of(shared, shared=True)

    def activated(self, group: int, gate: Tensor, up: Tensor | None) -> Float[Tensor, "... neuron"]:
        """Coefficients of the pre-activations of one of `groups`."""
        if self.experts is not None and group < self.experts.count:
            return self.experts.activated(gate, up)
        active = self._active(gate, up)
        return active if self.inner_norm is None else active * self.normed(gate, up)

    def _active(self, gate: Tensor, up: Tensor | None) -> Float[Tensor, "... neuron"]:
        return self.act(gate) if up is None else self.act(gate) * up

    def normed(
        self, gate: Tensor, up: Tensor | None, neurons: slice | Tensor = slice(None)
    ) -> Float[Tensor, "... neuron"] | float:
        """What a norm of all coefficients of a layer multiplies those of some neurons with; 1 without one.

        gate, up  pre-activations of all
        """
        if self.inner_norm is None:
            return 1.0
        active = self._active(gate, up)
        scale = self.inner_norm.scale(active).to(active.dtype)
        weight = self.inner_norm.weight
        return scale if weight is None else scale * weight[neurons].to(active.dtype)

    def coefficients(self, neurons: Tensor, gate: Tensor, up: Tensor | None) -> Float[Tensor, "... neuron"]:
        """`activated` of any neurons, by their numbers in the layer; of units as if they did not compete, and of others
        as if nothing divided all of them.
        """
        if self.units is not None:
            return self.units.act.of(neurons).alone(gate)
        dense = self._active(gate, up)
        if self.inner_norm is not None and self.inner_norm.weight is not None:
            dense = dense * self.inner_norm.weight[neurons].to(dense.dtype)
        if self.experts is None:
            return dense
        routed = neurons < self.experts.count * self.experts.width
        return torch.where(routed.to(gate.device), self.experts.activated(gate, up), dense)

    def spread(self, weights: Float[Tensor, "... group"]) -> Float[Tensor, "... neuron"]:
        """For each neuron what there is for each of `groups`."""
        groups = torch.tensor(self.groups, device=weights.device)
        return weights.repeat_interleave(groups, -1, output_size=sum(self.groups))

    def values(self) -> Float[Tensor, "neuron width"]:
        """What each neuron writes, before the router's weight, any post-norm or residual multiplier; of units what
        arrives in the stream.
        """
        if self.units is not None:
            return self.units.values()
        if self.experts is None and self.down is not None:
            return rows_of(self.down).T
        return torch.cat([rows.values for rows in self.rows()]) if self.groups else self._nothing(0)

    def down_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the down projection, in a mixture of the shared expert's."""
        return None if self.down is None else bias_of(self.down)

    def group_biases(self) -> Float[Tensor, "group width"] | None:
        """What each of `groups` writes whatever it detects, before the router's weight; None if all is 0."""
        shared = self.down_bias()
        routed = None if self.experts is None else self.experts.down_biases()
        if shared is None and routed is None:
            return None
        known = next(bias for bias in (shared, routed) if bias is not None)
        rows = known.new_zeros(len(self.groups), known.shape[-1])
        if routed is not None:
            rows[: len(routed)] = routed
        if shared is not None:
            rows[-1] = shared
        return rows

    def keys(self) -> Float[Tensor, "neuron width"]:
        """What each neuron detects: gate rows, or the rows of the only first projection."""
        if self.units is not None:
            return self.units.keys
        if self.experts is None and self.gate is not None:
            return self.gate.weight()
        return torch.cat([rows.keys for rows in self.rows()]) if self.groups else self._nothing(0)

    def key_bias(self) -> Float[Tensor, " neuron"] | None:
        """Bias that belongs to `keys`."""
        if self.units is not None:
            return self.units.key_bias
        return _bias(self.gate) if self.experts is None else self._biases("key_bias")

    def ups(self) -> Float[Tensor, "neuron width"] | None:
        """The second key rows of a gated FFN."""
        if self.units is not None:
            return None
        if self.experts is None or not self.gated:
            return _weight(self.up)
        return torch.cat([rows.ups for rows in self.rows() if rows.ups is not None])

    def up_bias(self) -> Float[Tensor, " neuron"] | None:
        """Bias that belongs to `ups`."""
        if self.units is not None:
            return None
        return _bias(self.up) if self.experts is None else self._biases("up_bias")

    def bare(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"] | None:
        """What keys would read of vectors that entered this layer alone; None for units that read what it writes."""
        if self.units is None:
            return vectors if self.ffn_norm is None else self.ffn_norm(vectors).to(vectors.dtype)
        if self.units.reads in ("attention_output", "ffn_output"):
            return None
        vectors = vectors.float()
        if self.units.reads == "ffn_input" and self.ffn_norm is not None:
            vectors = self.ffn_norm(vectors)
        return self.units.read(passing(self, self.units.reads, vectors)).inputs

    @property
    def value_norm(self) -> Norm | None:
        """What values go through on their way to the stream; those of units are in it."""
        return self.post_ffn_norm if self.units is None else None

    def _biases(self, name: str) -> Tensor | None:
        """Biases of all groups, 0 in those without; None if none has any."""
        biases = [(rows.keys, getattr(rows, name)) for rows in self.rows()]
        if all(bias is None for _, bias in biases):
            return None
        return torch.cat([keys.new_zeros(len(keys)) if bias is None else bias for keys, bias in biases])


class SourceText(NamedTuple):
    """What the encoder of an encoder-decoder reads, and what of it is no padding."""

    tokens: Int[Tensor, "context source"]
    mask: Int[Tensor, "context source"] | None = None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model taken apart: ``logits = softcap(logit_multiplier * (unembedding . final_norm(x) + bias))``.

    Under an adaptive softmax (``bands``) the rows of its classes stand behind those of the tokens, and logits are the
    log-probabilities that `Bands` makes of all of them.

    Every block adds ``multiplier * post_norm(part)`` to the residual stream, for its attention and
    for its FFN; with ``parallel`` both read the layer's input (G5).

    An encoder is ``bidirectional``: its positions see all others. Its x may be what its ``transform`` makes of the last
    residual. One without a head is read through its input embedding (``headless``).

    An encoder-decoder is two ``stacks``, an encoder without a head and a decoder, whose cross attention reads the
    encoder's last stream. Its layers are theirs, the encoder's first; all else is the decoder's.
    """

    family: str
    known: bool  # the family has a row in the table
    layers: tuple[Layer, ...]
    n_layers: int
    sizes: tuple[int, ...]  # units of each layer; 0 where it has none
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int
    gated: bool
    activation: str
    parallel: bool
    embedding_multiplier: Factor
    logit_multiplier: float
    softcap: float | None
    embedding: nn.Module
    embedding_norm: Norm | None
    embedding_map: nn.Module | None
    final_norm: Norm | None
    head: nn.Module
    body: nn.Module  # call it with token ids to run everything but the head
    bands: Bands | None = None
    bidirectional: bool = False
    transform: Transform | None = None
    headless: bool = False
    of_encoder: bool = (
        False  # an encoder, or a decoder made of such blocks, whose embedding is of token and position
    )
    outer_head: nn.Module | None = None  # what adds a bias of its own to what the head returns
    attention: str = "eager"  # the implementation under which its attention is taken apart: eager or sdpa
    stacks: tuple[Anatomy, ...] = ()

    @property
    def predicting(self) -> Anatomy:
        """The stack whose stream ends in the logits: the decoder of an encoder-decoder, else the whole."""
        return self.stacks[-1] if self.stacks else self

    def stack_of(self, layer: int) -> Anatomy:
        """The stack that a layer is in."""
        return self.stacks[layer >= self.stacks[0].n_layers] if self.stacks else self

    @property
    def experts(self) -> tuple[tuple[int, int], ...]:
        """Of each layer how many experts there are, and neurons of one; (0, 0) in a dense one, and () if all are, or
        if other units are read."""
        held = [] if self.of_units else [layer.experts for layer in self.layers]
        return tuple((e.count, e.width) if e else (0, 0) for e in held) if any(held) else ()

    @property
    def of_units(self) -> bool:
        """Whether what is read are units that are not neurons."""
        return any(layer.units for layer in self.layers)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer how many neurons run on the same tokens (`Layer.groups`), or all units that are read."""
        if self.of_units:
            return tuple((size,) if size else () for size in self.sizes)
        return tuple(layer.groups for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values of neurons, and so of their coefficients."""
        first = next(layer for layer in self.layers if layer.groups)
        if first.experts is not None:
            return first.experts.dtype
        return rows_of(self.embedding if first.down is None or packed(first.down) else first.down).dtype

    @property
    def unit_dtype(self) -> torch.dtype:
        """Of the coefficients: those of other units than neurons are fp32."""
        return torch.float32 if self.of_units else self.dtype

    @property
    def adds_up_as_read(self) -> bool:
        """Whether the residual stream is a plain sum up to the final norm."""
        norms = (norm for layer in self.layers for norm in (layer.middle_norm, layer.end_norm))
        return self.transform is None and all(norm is None for norm in norms)

    def outward(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """Vectors of the last residual where the last norm reads them, up to a scale: through the linear modules of the
        head, without their biases and activation functions.
        """
        if self.transform is None:
            return vectors
        norm = self.transform.norm
        return self.transform.linear(vectors if norm is None else norm.linear(vectors, vectors.new_ones(1)))

    def calling(
        self,
        tokens: Int[Tensor, "context token"],
        mask: Int[Tensor, "context token"] | None = None,
        source: SourceText | None = None,
    ) -> dict[str, Any]:
        """How the model is called: a decoder without a cache, an encoder with a mask of the padding.

        Right padding under a causal mask changes nothing before it, so a decoder needs no attention mask.

        source  what the encoder of an encoder-decoder reads; the tokens are then its decoder's
        """
        if source is not None:
            read = {"input_ids": source.tokens, "decoder_input_ids": tokens, "use_cache": False}
            return read if source.mask is None else read | {"attention_mask": source.mask}
        if not self.bidirectional:
            return {"input_ids": tokens, "use_cache": False}
        return {"input_ids": tokens} if mask is None else {"input_ids": tokens, "attention_mask": mask}

    def outputs(self, output: Any) -> Float[Tensor, "context token vocabulary"]:
        """The logits in what the model returned; of a model without a head, its states read through the embedding."""
        if not self.headless:
            return output.logits
        return output.last_hidden_state.float() @ self.unembedding().float().T

    def unembedding(self) -> Float[Tensor, "row width"]:
        """Rows of the output embedding, as stored; those of classes, if there are any, behind the tokens'."""
        return rows_of(self.head)

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocabulary"] | None:
        """Bias of the output embedding (GPT-J, CodeGen, Phi), or of the module around it (ESM, BART)."""
        if self.outer_head is None:
            return bias_of(self.head)
        bias = getattr(self.outer_head, "final_logits_bias", None)
        return bias_of(self.outer_head) if bias is None else at_home(self.outer_head, bias.detach()[0])

    @torch.no_grad()
    def token_vectors(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """Bare token embeddings as they enter layer 0: multiplier and norm included, positions left out."""
        vectors = self.embedding(tokens)
        if not is_one(self.embedding_multiplier):
            vectors = vectors * torch.as_tensor(self.embedding_multiplier).to(vectors)
        vectors = vectors if self.embedding_norm is None else self.embedding_norm(vectors)
        return vectors if self.embedding_map is None else self.embedding_map(vectors)

    def logits(self, normalised: Float[Tensor, "... width"]) -> Float[Tensor, "... vocabulary"]:
        """Logits in fp32 of vectors that went through the final norm: bias, multiplier and cap included."""
        logits = normalised.float() @ self.unembedding().float().T
        if self.unembedding_bias is not None:
            logits = logits + self.unembedding_bias.float()
        logits = logits * self.logit_multiplier
        if self.bands is not None:
            return self.bands.log_probabilities(logits)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _weight(projection: Projection | None) -> Tensor | None:
    return None if projection is None else projection.weight()


def _bias(projection: Projection | None) -> Tensor | None:
    return None if projection is None else projection.bias()


def rows_of(module: nn.Module) -> Float[Tensor, "output input"]:
    """The weight of a linear module with one row per output (`Conv1D` stores it the other way, others packed)."""
    if packed(module):
        return at_home(module, multiplied_out(module))
    weight = held(module, "weight")
    assert weight is not None, f"{type(module).__name__} has no weight"
    return weight.T if isinstance(module, Conv1D) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear module."""
    if packed(module):
        return sizes(module)
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def bias_of(module: nn.Module) -> Float[Tensor, " output"] | None:
    """The bias of a linear module, or None."""
    return held(module, "bias")
