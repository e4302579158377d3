"""Where each model family keeps its parts, as a table.

A row of `FAMILIES` says which modules of a block are the attention output, the FFN projections and the norms,
and which fields of the config multiply what. Everything that can be measured is measured instead of listed: a
norm's kind, weight convention and epsilon are found by comparing candidates with the module's own output. A
decoder that has no row is tried against every combination of the known pieces that uses all of its norms.
Whether an `Anatomy` is right is decided by `decompose.self_check`, never here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from mnemoscope.errors import ModelNotSupported

# -- the parts of a block ------------------------------------------------------------------------------------


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
        return _rows(self.module)[self.start : self.stop]

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
        return _rows(self.down).T

    def down_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the down projection."""
        return _bias(self.down)

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
        rows = _rows(self.attention_out).T
        return rows.reshape(self.n_heads, -1, rows.shape[-1])

    def out_bias(self) -> Float[Tensor, " width"] | None:
        """Bias of the attention output projection."""
        return _bias(self.attention_out)


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

    def unembedding(self) -> Float[Tensor, "vocabulary width"]:
        """Rows of the output embedding, as stored."""
        return _rows(self.head)

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocabulary"] | None:
        """Bias of the output embedding (GPT-J, CodeGen, Phi)."""
        return _bias(self.head)

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


def _rows(module: nn.Module) -> Tensor:
    weight = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


# -- the table -----------------------------------------------------------------------------------------------


class FeedForward(NamedTuple):
    """Paths inside a block; ``up`` is None for a plain FFN, and equals ``gate`` where they are fused."""

    down: str
    gate: str
    up: str | None = None


class Norms(NamedTuple):
    """Paths inside a block of the norms before attention and FFN, and of those after them (G4)."""

    input: str | None
    ffn: str | None
    post_attention: str | None = None
    post_ffn: str | None = None


_GATED = FeedForward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_FUSED = FeedForward("mlp.down_proj", "mlp.gate_up_proj", "mlp.gate_up_proj")
_C_FC = FeedForward("mlp.c_proj", "mlp.c_fc")
_FC_IN = FeedForward("mlp.fc_out", "mlp.fc_in")
_4H = FeedForward("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
_FC1 = FeedForward("fc2", "fc1")
_MLP_FC1 = FeedForward("mlp.fc2", "mlp.fc1")
_UP_DOWN = FeedForward("mlp.down_proj", "mlp.up_proj")
_FFN_UP_DOWN = FeedForward("ffn.down_proj", "ffn.up_proj")

_LN_12 = Norms("ln_1", "ln_2")
_LN_1 = Norms("ln_1", "ln_1")
_NORM_12 = Norms("norm_1", "norm_2")
_PRE = Norms("input_layernorm", "post_attention_layernorm")
_SHARED = Norms("input_layernorm", "input_layernorm")
_TWO = Norms("ln_attn", "ln_mlp")
_OPT = Norms("self_attn_layer_norm", "final_layer_norm")
_VAULT = Norms("input_layernorm", "pre_feedforward_layernorm")
_POST = Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH = Norms(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
_GLM4 = Norms("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


class Family(NamedTuple):
    """One row: paths inside a block, paths inside the body, and the config fields that matter.

    ``norms`` lists alternatives; the one that uses exactly the norms a block has is taken. A field is named
    only where the family's code reads it; ``refused`` lists (field, the value that is handled, why).
    """

    attention_out: str
    ffn: FeedForward
    norms: tuple[Norms, ...]
    blocks: str = "layers"
    final_norm: str = "norm"
    embedding_norm: str | None = None
    parallel: str | None = None
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    refused: tuple[tuple[str, Any, str], ...] = ()


_LLAMA = Family("self_attn.o_proj", _GATED, (_PRE,))
_GPT2 = Family("attn.c_proj", _C_FC, (_LN_12,), blocks="h", final_norm="ln_f")

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2._replace(attention_out="attn.attention.out_proj"),
    "gptj": _GPT2._replace(attention_out="attn.out_proj", ffn=_FC_IN, norms=(_LN_1,)),
    "codegen": _GPT2._replace(attention_out="attn.out_proj", ffn=_FC_IN, norms=(_LN_1,)),
    "gpt_neox": Family(
        "attention.dense", _4H, (_PRE,), final_norm="final_layer_norm", parallel="use_parallel_residual"
    ),
    "opt": Family(
        "self_attn.out_proj",
        _FC1,
        (_OPT,),
        final_norm="final_layer_norm",
        refused=(("do_layer_norm_before", True, "it normalises the residual stream after each part"),),
    ),
    "bloom": Family(
        "self_attention.dense",
        _4H,
        (_PRE,),
        blocks="h",
        final_norm="ln_f",
        embedding_norm="word_embeddings_layernorm",
        refused=(
            ("apply_residual_connection_post_layernorm", False, "its residual is taken after the norm"),
            ("slow_but_exact", False, "it computes its projections in slices"),
        ),
    ),
    "falcon": Family(
        "self_attention.dense",
        _4H,
        (_TWO, _PRE, _SHARED),
        blocks="h",
        final_norm="ln_f",
        parallel="parallel_attn",
    ),
    "mpt": Family("attn.out_proj", _FFN_UP_DOWN, (_NORM_12,), blocks="blocks", final_norm="norm_f"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA._replace(norms=(_SANDWICH,), softcap="final_logit_softcapping"),
    "gemma3_text": _LLAMA._replace(norms=(_SANDWICH,), softcap="final_logit_softcapping"),
    "phi": Family("self_attn.dense", _MLP_FC1, (_SHARED,), final_norm="final_layernorm"),
    "phi3": _LLAMA._replace(ffn=_FUSED),
    "olmo": _LLAMA,
    "olmo2": _LLAMA._replace(norms=(_POST,)),
    "stablelm": _LLAMA._replace(norms=(_PRE, _SHARED), parallel="use_parallel_residual"),
    "starcoder2": _LLAMA._replace(ffn=_C_FC),
    "cohere": _LLAMA._replace(norms=(_SHARED,), logit_multiplier="logit_scale"),
    "granite": _LLAMA._replace(
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "smollm3": _LLAMA,
}

# What an unlisted decoder may be made of, likeliest first.
_ANY_OUT = tuple(dict.fromkeys(row.attention_out for row in FAMILIES.values()))
_ANY_FFN = (_GATED, _FUSED, _C_FC, _FC_IN, _4H, _FC1, _MLP_FC1, _UP_DOWN, _FFN_UP_DOWN)
_ANY_NORMS = (_SANDWICH, _GLM4, _POST, _PRE, _SHARED, _LN_12, _LN_1, _NORM_12, _TWO, _OPT, _VAULT)
_ANY_FINAL = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")


# -- reading a model -----------------------------------------------------------------------------------------


def describe(hf: PreTrainedModel) -> Anatomy:
    """Find the parts of a decoder: its family's row, or the first layout of known pieces that fits.

    `ModelNotSupported` with the family and the reason for anything else. This only *reads*; call
    `decompose.self_check` to know that the parts add up.
    """
    return next(candidates(hf))


def candidates(hf: PreTrainedModel) -> Iterator[Anatomy]:
    """Every anatomy worth a self-check, at least one: a single one for a family in the table."""
    config = hf.config.get_text_config()
    family = str(config.model_type)
    if reason := _unsupported_kind(hf):
        raise _refuse(family, reason)
    body = hf.get_decoder()
    if family in FAMILIES:
        row = FAMILIES[family]
        for name, accepted, reason in row.refused:
            if getattr(config, name, accepted) != accepted:
                raise _refuse(family, f"{reason} ({name} = {getattr(config, name)})")
        yield _read(hf, body, row, family, known=True)
        return
    rows = list(_generic_rows(body, config))
    if not rows:
        raise _refuse(family, "it has no row in the table, and its blocks are not made of parts known here")
    yield from (_read(hf, body, row, family, known=False) for row in rows)


def _refuse(family: str, reason: str) -> ModelNotSupported:
    return ModelNotSupported(
        f"reading the anatomy of a {family!r} model: {reason}; decoders with one dense FFN per block are "
        "accepted, and `mnemoscope models` lists the families known"
    )


def _unsupported_kind(hf: PreTrainedModel) -> str | None:
    config = hf.config.get_text_config()
    if getattr(hf.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    names = " ".join({type(module).__name__ for module in hf.modules()})
    if any(mark in names for mark in ("Moe", "MoE", "MOE", "Experts")):
        return "it is a mixture of experts, which is not supported yet"
    if any(mark in names for mark in ("Mamba", "Rwkv", "SSM", "Recurrent", "LSTM", "DeltaNet")):
        return "it is a state space or recurrent model"
    masked = type(hf).__name__ in _class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if masked or (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    ):
        return "it is an encoder"
    if hf.get_output_embeddings() is None:
        return f"{type(hf).__name__} has no language-model head (load it as a causal language model)"
    return None


def _class_names(mapping: dict[str, Any]) -> set[str]:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return {str(name) for name in mapping.values()} - {str(name) for name in causal}


def _generic_rows(body: nn.Module, config: Any) -> Iterator[Family]:
    blocks = [
        name
        for name, child in body.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    finals = [name for name in _ANY_FINAL if hasattr(body, name)]
    for block, final in product(blocks, finals):
        first = getattr(body, block)[0]
        for out, ffn, norms in product(_ANY_OUT, _ANY_FFN, _ANY_NORMS):
            if _has(first, (out, *ffn)) and _uses_all_norms(first, norms):
                yield Family(
                    out,
                    ffn,
                    (norms,),
                    blocks=block,
                    final_norm=final,
                    parallel=_present(config, "use_parallel_residual", "parallel_attn"),
                    embedding_multiplier=_present(config, "embedding_multiplier"),
                    residual_multiplier=_present(config, "residual_multiplier"),
                    logit_multiplier=_present(config, "logit_scale"),
                    logit_divisor=_present(config, "logits_scaling"),
                    softcap=_present(config, "final_logit_softcapping"),
                )


def _present(config: Any, *names: str) -> str | None:
    return next((name for name in names if getattr(config, name, None) is not None), None)


def _has(module: nn.Module, paths: tuple[str | None, ...]) -> bool:
    return all(path is None or _find(module, path) is not None for path in paths)


def _find(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _uses_all_norms(block: nn.Module, norms: Norms) -> bool:
    present = {name for name, child in block.named_children() if "norm" in type(child).__name__.lower()}
    return present == {name for name in norms if name is not None}


def _read(hf: PreTrainedModel, body: nn.Module, row: Family, family: str, *, known: bool) -> Anatomy:
    config = hf.config.get_text_config()
    blocks = _part(body, row.blocks, family)
    assert isinstance(blocks, nn.ModuleList), f"{row.blocks} of a {family} model is a {type(blocks).__name__}"
    layers = tuple(_layer(block, row, config, family) for block in blocks)
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    first = layers[0]
    n_neurons, width = first.values().shape
    for index, layer in enumerate(layers):
        if layer.values().shape != first.values().shape:
            raise _refuse(family, f"layer {index} has {len(layer.values())} neurons and layer 0 {n_neurons}")
    if _rows(head).shape[1] != width or embedding.weight.shape[1] != width:
        raise _refuse(family, "its embeddings are projected to another width")
    activation = _present(config, "hidden_activation", "hidden_act", "activation_function", "activation")
    name = str(getattr(config, activation)) if activation else "gelu"
    shared = first.ffn_norm is not None and first.ffn_norm is first.input_norm
    return Anatomy(
        family=family,
        known=known,
        layers=layers,
        n_layers=len(layers),
        n_neurons=n_neurons,
        width=width,
        n_heads=first.n_heads,
        n_kv_heads=_kv_heads(config, first.n_heads),
        head_dim=first.heads().shape[1],
        vocabulary=_rows(head).shape[0],
        context_length=_context_length(config),
        gated=first.up is not None,
        activation=name,
        act=_activation(first.module, name),
        parallel=shared or hasattr(first.module, "ln_mlp") or _flag(config, row.parallel),
        embedding_multiplier=_number(config, row.embedding_multiplier),
        residual_multiplier=_number(config, row.residual_multiplier),
        logit_multiplier=_number(config, row.logit_multiplier) / _number(config, row.logit_divisor),
        softcap=getattr(config, row.softcap) if row.softcap else None,
        embedding=embedding,
        embedding_norm=_norm(body, row.embedding_norm, width, config, family),
        final_norm=_norm(body, row.final_norm, width, config, family),
        head=head,
        body=body,
    )


def _flag(config: Any, name: str | None) -> bool:
    return bool(name and getattr(config, name))


def _number(config: Any, name: str | None) -> float:
    return float(getattr(config, name)) if name else 1.0


def _part(module: nn.Module, path: str, family: str) -> nn.Module:
    found = _find(module, path)
    if found is None:
        raise _refuse(family, f"{type(module).__name__} has no part {path!r}")
    return found


def _layer(block: nn.Module, row: Family, config: Any, family: str) -> Layer:
    out, down = _part(block, row.attention_out, family), _part(block, row.ffn.down, family)
    for module in (out, down):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            raise _refuse(
                family, f"its weights are packed ({type(module).__name__}); load it without quantisation"
            )
    width, n_neurons = _rows(down).shape
    norms = next((norms for norms in row.norms if _uses_all_norms(block, norms)), None)
    if norms is None:
        names = [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]
        raise _refuse(
            family, f"the norms of its blocks are not those expected ({', '.join(names) or 'none'})"
        )
    gate, up = _first_projections(block, row.ffn, n_neurons, family)
    input_norm = _norm(block, norms.input, width, config, family)
    return Layer(
        module=block,
        attention=_part(block, row.attention_out.rpartition(".")[0], family),
        attention_out=out,
        down=down,
        gate=gate,
        up=up,
        n_heads=config.num_attention_heads,
        input_norm=input_norm,
        ffn_norm=input_norm if norms.ffn == norms.input else _norm(block, norms.ffn, width, config, family),
        post_attention_norm=_norm(block, norms.post_attention, width, config, family),
        post_ffn_norm=_norm(block, norms.post_ffn, width, config, family),
    )


def _first_projections(
    block: nn.Module, ffn: FeedForward, n_neurons: int, family: str
) -> tuple[Projection, Projection | None]:
    gate = _part(block, ffn.gate, family)
    if ffn.up == ffn.gate:
        return Projection(gate, 0, n_neurons), Projection(gate, n_neurons, 2 * n_neurons)
    up = None if ffn.up is None else Projection(_part(block, ffn.up, family), 0, n_neurons)
    return Projection(gate, 0, n_neurons), up


def _kv_heads(config: Any, n_heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    name = _present(config, "num_key_value_heads", "num_kv_heads")
    return int(getattr(config, name)) if name else n_heads


def _context_length(config: Any) -> int:
    """Positions the model was made for; 2048 where the config does not say (ALiBi models have no limit)."""
    name = _present(config, "max_position_embeddings", "max_seq_len", "seq_length")
    return int(getattr(config, name)) if name else 2048


def _activation(block: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """The block's own activation module; the registered function of that name where it has none."""
    for owner in (block, getattr(block, "mlp", None), getattr(block, "ffn", None)):
        for attribute in ("act_fn", "activation_fn", "act", "gelu_impl", "activation"):
            act = getattr(owner, attribute, None)
            if callable(act):
                return act
    return ACT2FN[name]


# -- norms are measured --------------------------------------------------------------------------------------


def _norm(owner: nn.Module, path: str | None, width: int, config: Any, family: str) -> Norm | None:
    if path is None:
        return None
    module = _part(owner, path, family)
    found = _measure(module, width, config)
    if found is None:
        raise _refuse(family, f"{path} ({type(module).__name__}) is no RMS or layer norm over the width")
    return found


@torch.no_grad()
def _measure(module: nn.Module, width: int, config: Any) -> Norm | None:
    """The candidate that reproduces the module's own output in fp32, on vectors of usual and of tiny size."""
    parameters = {name: value.detach().float() for name, value in module.named_parameters()}
    device = next((value.device for value in parameters.values()), torch.device("cpu"))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.cat([x + 0.5, x * 1e-3])  # where epsilon shows
    said = torch.func.functional_call(module, parameters, (x,))
    if said.shape != x.shape:
        return None
    weight, bias = parameters.get("weight"), parameters.get("bias")
    weights = [None] if weight is None else [weight, 1 + weight]
    for kind, effective, eps in product(("rms", "layer"), weights, _epsilons(module, config)):
        norm = Norm(kind, effective, bias, eps, module)
        if torch.allclose(norm(x), said, rtol=1e-4, atol=1e-5 * float(said.abs().max())):
            return norm
    return None


def _epsilons(module: nn.Module, config: Any) -> list[float]:
    own = [getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon")]
    fields = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    given = [
        value for value in (*own, *(getattr(config, name, None) for name in fields)) if value is not None
    ]
    return list(dict.fromkeys([*map(float, given), 1e-5, 1e-6, float(torch.finfo(torch.float32).eps)]))
