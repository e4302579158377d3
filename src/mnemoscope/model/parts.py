"""What a decoder is made of: norms, projections, layers, and the whole, the right way round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()[self.start : self.stop]

    def of(self, output: Float[Tensor, "... fused"]) -> Float[Tensor, "... neuron"]:
        """This projection's share of what the module returned (for a forward hook on ``module``)."""
        return output[..., self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: its modules, for hooks, and its weights, as stored and the right way round.

    The coefficients are the *input* of ``down``. ``gate`` gives the pre-activation that goes through the
    activation function: the gate of a gated FFN, the only first projection of a plain one (``up`` is None).
    ``ffn_norm is input_norm`` in blocks where attention and FFN read the same normalised vector.
    """

    module: nn.Module
    attention: nn.Module
    attention_out: nn.Module
    down: nn.Module
    gate: Projection
    up: Projection | None
    n_heads: int
    input_norm: Norm | None
    ffn_norm: Norm | None
    post_attention_norm: Norm | None
    post_ffn_norm: Norm | None

    def values(self) -> Float[Tensor, "neuron width"]:
        """What each neuron writes, before any post-norm or residual multiplier."""
        return rows_of(self.down).T

    def down_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the down projection."""
        return bias_of(self.down)

    def keys(self) -> Float[Tensor, "neuron width"]:
        """What each neuron detects: gate rows, or the rows of the only first projection."""
        return self.gate.weight()

    def key_bias(self) -> Float[Tensor, " neuron"] | None:
        """Bias that belongs to `keys`."""
        return self.gate.bias()

    def ups(self) -> Float[Tensor, "neuron width"] | None:
        """The second key rows of a gated FFN."""
        return None if self.up is None else self.up.weight()

    def up_bias(self) -> Float[Tensor, " neuron"] | None:
        """Bias that belongs to `ups`."""
        return None if self.up is None else self.up.bias()

    def heads(self) -> Float[Tensor, "head dimension width"]:
        """Rows of the attention output projection, per query head."""
        rows = rows_of(self.attention_out).T
        return rows.reshape(self.n_heads, -1, rows.shape[-1])

    def out_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the attention output projection."""
        return bias_of(self.attention_out)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A decoder taken apart: ``logits = softcap(logit_multiplier * (unembedding . final_norm(x) + bias))``.

    Every block adds ``residual_multiplier * post_norm(part)`` to the residual stream, for its attention and
    for its FFN; with ``parallel`` both read the layer's input (G5).
    """

    family: str
    known: bool  # the family has a row in the table
    layers: tuple[Layer, ...]
    n_layers: int
    n_neurons: int  # per layer
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int
    gated: bool
    activation: str
    act: Callable[[Tensor], Tensor]
    parallel: bool
    embedding_multiplier: float
    residual_multiplier: float
    logit_multiplier: float
    softcap: float | None
    embedding: nn.Module
    embedding_norm: Norm | None
    final_norm: Norm | None
    head: nn.Module
    body: nn.Module  # call it with token ids to run everything but the head
    attention: str = "eager"  # the implementation under which its attention is taken apart: eager or sdpa

    def unembedding(self) -> Float[Tensor, "vocabulary width"]:
        """Rows of the output embedding, as stored."""
        return rows_of(self.head)

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocabulary"] | None:
        """Bias of the output embedding (GPT-J, CodeGen, Phi)."""
        return bias_of(self.head)

    @torch.no_grad()
    def token_vectors(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token width"]:
        """Bare token embeddings as they enter layer 0: multiplier and norm included, positions left out."""
        vectors = self.embedding(tokens)
        if self.embedding_multiplier != 1:
            vectors = vectors * torch.tensor(self.embedding_multiplier, dtype=vectors.dtype)
        return vectors if self.embedding_norm is None else self.embedding_norm(vectors)

    def logits(self, normalised: Float[Tensor, "... width"]) -> Float[Tensor, "... vocabulary"]:
        """Logits in fp32 of vectors that went through the final norm: bias, multiplier and cap included."""
        logits = normalised.float() @ self.unembedding().float().T
        if self.unembedding_bias is not None:
            logits = logits + self.unembedding_bias.float()
        logits = logits * self.logit_multiplier
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def rows_of(module: nn.Module) -> Float[Tensor, "output input"]:
    """The weight of a linear module with one row per output (`Conv1D` stores it the other way)."""
    weight = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Float[Tensor, " output"] | None:
    """The bias of a linear module, or None."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()
