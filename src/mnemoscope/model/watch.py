"""Watching a forward pass: what each block reads, mixes and writes, with the model left as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.experts import (
    Routed,
    listen,
    shared_weight,
    summed,
)
from mnemoscope.model.parts import Anatomy, Attention, Factor, Layer, Projection, is_one
from mnemoscope.model.spread import at_home

TOLERANCE = 1e-4  # of the logit range for logits, of the largest entry of the vector for everything else


@dataclass(eq=False, kw_only=True)
class AttentionTrace:
    """What one attention saw and did, for one sequence, in the dtype of the pass.

    ``lin`` is the residual that enters, ``middle`` what the norm of the stream behind it reads in a post-norm block.
    ``value`` is given per query head: heads that share a key-value head have equal rows (G6), and a bias of the value
    projection is inside it, which is exact because weights add up to 1 (G8). ``attention_output`` is the output of the
    output projection, before post-norm and multiplier.

    ``mixed_gate`` is what each mixed channel is multiplied with, ``mixer_output`` what an opaque mixer writes, which is
    inside ``attention_output``. A layer without attention has heads with weights and values of 0.
    """

    lin: Float[Tensor, "token width"]
    alpha: Float[Tensor, "head token source"]
    value: Float[Tensor, "head source dimension"]
    mixed: Float[Tensor, "token heads_x_dimension"]  # input of the attention output projection
    attention_input: Float[Tensor, "token width"]
    attention_output: Float[Tensor, "token width"]
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)  # how the attention module was called
    mixed_gate: Float[Tensor, "token heads_x_dimension"] | None = None
    mixer_output: Float[Tensor, "token width"] | None = None
    middle: Float[Tensor, "token width"] | None = None

    def weighted(
        self, where: int | slice, mixed: Float[Tensor, "head *rows dimension"]
    ) -> Float[Tensor, "head *rows dimension"]:
        """Mixed values as the output projection reads them at a position, or at all: by the gate if there is one; fp32.

        where  the position of every row, or all positions, which are the rows
        """
        if self.mixed_gate is None:
            return mixed.float()
        gate = self.mixed_gate[where].float().unflatten(-1, (len(mixed), -1))
        return mixed.float() * (gate[:, None] if gate.ndim == 2 else gate.transpose(0, 1))

    def fixed(self, block: Attention, where: int | slice) -> Tensor | None:
        """What is written before the FFN whatever is attended to, before post-norm and multiplier; fp32."""
        bias = block.out_bias()
        if self.mixer_output is None:
            return bias
        written = self.mixer_output[where].float()
        return written if bias is None else written + bias.float()


@dataclass(eq=False, kw_only=True)
class LayerTrace(AttentionTrace):
    """What one block saw and did, for one sequence, in the dtype of the pass.

    ``lres`` is the residual after attention, also after the ``cross`` attention where there is one; in parallel blocks,
    which have no such point, ``lin`` plus the attention update (G5). ``ffn_output`` is the output of the down
    projection, before post-norm and multiplier.

    In a mixture ``weights`` are those of the router, with all factors, for each of `Layer.groups`, fp32: 0 where a
    token was not routed to an expert, whose neurons then have a gate, an up and a coefficient of 0. ``scores`` are what
    a router multiplies with what experts read, if it does.

    ``extra_output`` is what an extra module writes after the FFN, ``end`` what the norm at the end of a post-norm block
    reads.

    Where units that are not neurons are read, ``gate`` and ``coefficients`` are theirs, fp32; a token's ``unit_scale``
    multiplies what they write, ``rebuilt`` is what all say passes the point that they write, and ``unit_bias`` what of
    that is written whatever is active.
    """

    lres: Float[Tensor, "token width"]
    lout: Float[Tensor, "token width"]
    ffn_input: Float[Tensor, "token width"]
    gate: Float[Tensor, "token neuron"]  # pre-activation
    up: Float[Tensor, "token neuron"] | None
    coefficients: Float[Tensor, "token neuron"]
    ffn_output: Float[Tensor, "token width"]
    weights: Float[Tensor, "token group"] | None = None
    scores: Float[Tensor, "token group"] | None = None
    end: Float[Tensor, "token width"] | None = None
    extra_output: Float[Tensor, "token width"] | None = None
    cross: AttentionTrace | None = None
    unit_scale: Float[Tensor, "token 1"] | None = None
    rebuilt: Float[Tensor, "token width"] | None = None
    unit_bias: Float[Tensor, "token width"] | None = None

    def amounts(
        self, layer: Layer, where: int | slice | Tensor = slice(None)
    ) -> Float[Tensor, "*tokens neuron"]:
        """What each value was multiplied with: the coefficient, in a mixture times the weight of its expert; fp32.

        where  a position, or several; all by default
        """
        coefficients = self.coefficients[where].float()
        return coefficients if self.weights is None else coefficients * layer.spread(self.weights[where])


class Products(TorchFunctionMode):
    """Remembers the operands of the last matrix product, until ``settle`` hands them out.

    Scaled dot product attention is such a product with the weights inside: they are computed again.
    """

    _FUNCTIONS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._FUNCTIONS and len(args) == 2:
            self.last = (args[0], args[1])
        if func is nn.functional.scaled_dot_product_attention:
            self.last = _inside_sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def settle(self) -> tuple[Tensor, Tensor] | None:
        settled, self.last = self.last, None
        return settled


def _inside_sdpa(
    query: Float[Tensor, "batch head token dimension"],
    key: Float[Tensor, "batch kv_head source dimension"],
    value: Float[Tensor, "batch kv_head source dimension"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights [batch head token source] and values of a call of `torch.nn.functional.scaled_dot_product_attention`."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1), value


def shared_out(alpha: Tensor, value: Tensor, mixed: Float[Tensor, "token heads_x_dimension"]) -> Tensor:
    """Attention weights times the one number for each head and token by which what they mix was made smaller."""
    whole = alpha.float() @ value.float()
    seen = mixed.float().unflatten(-1, (len(alpha), -1)).transpose(0, 1)
    factor = (seen * whole).sum(-1) / whole.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return alpha * factor[..., None].to(alpha.dtype)


def heads_of(operands: tuple[Tensor, Tensor] | None, n_heads: int) -> tuple[Tensor, Tensor]:
    """Both operands of ``weights @ values`` as [head, ...]; a value shared by all heads is repeated."""
    if operands is None:
        raise ModelNotSupported(
            "taking attention apart: no product of attention weights and values was seen before the output "
            "projection; load the model with attn_implementation='eager'"
        )
    alpha, value = (operand.reshape(-1, *operand.shape[-2:]) for operand in operands)
    return alpha, value.expand(n_heads, -1, -1)


class EndOfPass(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once what was wanted has been seen."""


def watch(block: Attention, points: Iterable[str], see: Callable[[str, Tensor], None]) -> list[Any]:
    """Hooks that call ``see(point, tensor)`` with what passes the points of a layer; `hooked` removes them.

    lin, lout                            the residual that enters and leaves the block
    attention_input, ffn_norm_input      what the attention and the norm before the FFN read
    mixed, attention_output              what the attention output projection reads and writes
    mixed_gate, mixer_output             what the gate of the mixed heads is made of, and what an opaque mixer writes
    extra_output                         what an extra module writes after the FFN
    ffn_input, gate, up                  what the first FFN projections read, and their pre-activations
    coefficients, ffn_output             what the down projection reads and writes
    routed_output, shared_gate           what the experts write, and the gate of the shared expert before its sigmoid
    shared_input                         what the first projections of the shared expert read
    middle, end                          what the norms of the residual stream read, in a post-norm block

    In a mixture the points from gate to ffn_output are those of the shared expert; `experts.listen` sees the others.
    Residuals are measured by what of them arrives at the end, and a mixer by the attention's multiplier. All others are
    the model's own tensors; Falcon adds to its FFN's output in place. A point that a layer lacks is left out; a cross
    attention has those of an attention.
    """
    first, last = (block.ends if isinstance(block, Layer) else None) or (block.module, block.module)
    before: dict[str, nn.Module | None] = {
        "lin": first,
        "attention_input": block.attention,
        "mixed": block.attention_out,
        "middle": None if block.middle_norm is None else block.middle_norm.module,
    }
    after: dict[str, nn.Module | None] = {"attention_output": block.attention_out}
    units: dict[str, Factor] = {}
    projections: dict[str, Projection | None] = {}
    turn = (0, 1)
    if isinstance(block, Layer):
        layer, turn, norm, end, gate = block, block.turn, block.ffn_norm, block.end_norm, block.mixed_gate
        before |= {
            "attention_input": layer.attention or layer.mixer,
            "ffn_norm_input": None if norm is None else norm.module,
            "ffn_input": _first_reader(layer),
            "shared_input": None if layer.gate is None else layer.gate.module,
            "coefficients": layer.down,
            "end": None if end is None else end.module,
            "mixed_gate": None if gate is None or gate.norm is None else gate.module,
        }
        after |= {
            "lout": last,
            "mixed_gate": None if gate is None else gate.module,
            "mixer_output": layer.mixer,
            "extra_output": layer.extra,
            "ffn_output": layer.down,
            "routed_output": None if layer.experts is None else layer.experts.writer,
            "shared_gate": None if layer.experts is None else layer.experts.shared_gate,
        }
        units = {
            "lin": layer.arrives.lin,
            "ffn_norm_input": layer.arrives.lres,
            "lout": layer.arrives.lout,
            "mixer_output": layer.mixer_multiplier,
        }
        projections = {"gate": layer.gate, "up": layer.up}

    def measured(point: str, tensor: Tensor) -> None:
        if point == "attention_output" and block.outer_bias is not None:
            tensor = tensor + block.outer_bias
        tensor, unit = at_home(first, tensor), units.get(point, 1.0)
        see(point, tensor if is_one(unit) else tensor * unit)

    handles = []
    see = _in_turn(see, turn)
    for point in points:
        if (module := before.get(point)) is not None:
            handles.append(module.register_forward_pre_hook(_reading(point, measured), with_kwargs=True))
        elif (module := after.get(point)) is not None:
            handles.append(module.register_forward_hook(_writing(point, measured)))
        elif (projection := projections.get(point)) is not None:
            handles.append(projection.module.register_forward_hook(_projecting(point, projection, measured)))
    return handles


def _first_reader(layer: Layer) -> nn.Module | None:
    """A module that reads what the FFN of a layer reads: its experts, unless the router multiplies that before."""
    if layer.experts is not None and not layer.experts.multiplies_inputs:
        return layer.experts.inlet or layer.experts.module
    return None if layer.gate is None else layer.gate.module


def _in_turn(see: Callable[[str, Tensor], None], turn: tuple[int, int]) -> Callable[[str, Tensor], None]:
    """See a module that several layers share only where it stands for one of them."""
    which, uses = turn
    if uses == 1:
        return see
    calls: Counter[str] = Counter()

    def counted(point: str, tensor: Tensor) -> None:
        calls[point] += 1
        if (calls[point] - 1) % uses == which:
            see(point, tensor)

    return counted


def _reading(point: str, see: Callable[[str, Tensor], None]) -> Callable[..., None]:
    return lambda _, args, kwargs: see(point, args[0] if args else kwargs["hidden_states"])


def _writing(point: str, see: Callable[[str, Tensor], None]) -> Callable[..., None]:
    return lambda _, args, output: see(point, output[0] if isinstance(output, tuple | list) else output)


def _projecting(
    point: str, projection: Projection, see: Callable[[str, Tensor], None]
) -> Callable[..., None]:
    return lambda _, args, output: see(point, projection.of(output))


class Witness:
    """What one block was seen to do in one pass."""

    def __init__(self, layer: Layer, recorder: Products) -> None:
        self.layer, self.recorder = layer, recorder
        self.seen: dict[str, Tensor] = {}
        self.crossed: dict[str, Any] = {}
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.product: tuple[Tensor, Tensor] | None = None
        self.routed: list[Routed] = []
        self.calls = 0

    def handles(self) -> list[Any]:
        """Register all hooks; the caller removes them (`hooked`)."""
        handles = watch(self.layer, _POINTS, self.see)
        if self.layer.attention is not None:
            handles.append(self.layer.attention.register_forward_pre_hook(self.attend, with_kwargs=True))
        if self.layer.experts is not None:
            experts = self.layer.experts.module
            handles.append(listen(experts, lambda piece: self.routed.append(piece.moved(experts, at_home))))
        if (cross := self.layer.cross) is not None and cross.attention is not None:
            handles += watch(cross, _CROSS, self.see_cross)
            handles.append(cross.attention.register_forward_pre_hook(self.attend_across, with_kwargs=True))
        return handles

    def see_cross(self, point: str, tensor: Tensor) -> None:
        if point == "mixed":
            self.crossed["product"] = self.recorder.settle()
        self.crossed[point] = flat(tensor)

    def attend_across(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.crossed["call"] = (args, kwargs)

    def attend(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        which, uses = self.layer.turn
        if self.calls % uses == which:
            # XLM keeps keys and values whether it is asked to or not.
            self.call = (args, {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()})
        self.calls += 1

    def see(self, point: str, tensor: Tensor) -> None:
        if point == "mixed" and (product := self.recorder.settle()) is not None:
            weights, values = (at_home(self.layer.module, operand) for operand in product)
            self.product = (weights, values)
        # A copy, because Falcon adds to its FFN's output in place.
        self.seen[point] = flat(tensor).clone() if point.endswith("_output") else flat(tensor)

    def trace(self, index: int, anatomy: Anatomy) -> LayerTrace:
        """What was seen, once the pass has ended; `ModelNotSupported` if a part was never called."""
        seen = dict(self.seen)
        if self.layer.experts is not None and "routed_output" in seen:
            seen |= mixture(self.layer, self.seen, self.routed)
            del seen["routed_output"]
        seen.pop("shared_gate", None)
        if self.layer.attention is None and "lin" in seen:
            seen |= self._without_attention(seen)
        elif "mixer_output" in seen:
            seen["attention_output"] = seen["attention_output"] + seen["mixer_output"]
        if self.layer.mixed_gate is not None and "mixed" in seen:
            seen["mixed_gate"] = self.layer.mixed_gate.of(seen["mixed_gate"], seen["mixed"].shape[-1])
        if not self.layer.groups and "lout" in seen:
            seen |= self._without_ffn(seen["lout"])
        for name, what in _NEEDED.items():
            if name not in seen:
                raise failed(anatomy, index, "layer", f"its {what} was never called")
        read = seen.pop("ffn_norm_input", seen["ffn_input"])
        if self.layer.attention is not None:
            alpha, value = heads_of(self.product, self.layer.n_heads)
            tokens, heads = len(seen["lin"]), self.layer.n_heads
            if alpha.shape != (heads, tokens, tokens) or value.shape[:2] != (heads, tokens):
                raise failed(anatomy, index, "attention", _NO_PRODUCT)
            seen["alpha"], seen["value"] = alpha, value
            if self.layer.sink:
                seen["alpha"] = shared_out(alpha, value, seen["mixed"])
        seen["lres"] = after_attention(self.layer, self.seen) if anatomy.parallel else read
        cross = None if self.layer.cross is None else self._cross(self.layer.cross, index, anatomy)
        return LayerTrace(up=seen.pop("up", None), call=self.call, cross=cross, **seen)

    def _cross(self, block: Attention, index: int, anatomy: Anatomy) -> AttentionTrace:
        if "attention_output" not in self.crossed:
            raise failed(anatomy, index, "cross attention", "its output projection was never called")
        alpha, value = heads_of(self.crossed.pop("product"), block.n_heads)
        if len(alpha) != block.n_heads or alpha.shape[1] != len(self.crossed["lin"]):
            raise failed(anatomy, index, "cross attention", _NO_PRODUCT)
        return AttentionTrace(alpha=alpha, value=value, **self.crossed)

    def _without_ffn(self, output: Tensor) -> dict[str, Tensor]:
        """An FFN that reads what leaves the block and writes nothing, in a layer that has none."""
        nothing = output.new_zeros(len(output), 0)
        return {
            "ffn_input": output,
            "gate": nothing,
            "coefficients": nothing,
            "ffn_output": torch.zeros_like(output),
        }

    def _without_attention(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Heads that look nowhere, in a layer that has none; its output is that of its mixer, if it has one."""
        output = seen.get("mixer_output", torch.zeros_like(seen["lin"]))
        zeros, heads = output.new_zeros, self.layer.n_heads
        return {
            "attention_input": seen.get("attention_input", seen["lin"]),
            "alpha": zeros(heads, len(output), len(output)),
            "value": zeros(heads, len(output), 1),
            "mixed": zeros(len(output), heads),
            "attention_output": output,
        }


def mixture(layer: Layer, seen: Mapping[str, Tensor], routed: Sequence[Routed]) -> dict[str, Tensor]:
    """What the dense points of a layer are in a mixture: of all its neurons, and of the sum over its groups; from what
    its points saw of some tokens [token, width], and what its experts did with these."""
    experts, read = layer.experts, seen["ffn_input"]
    assert experts is not None, "a mixture has experts"
    blank = torch.zeros(len(read), sum(layer.groups), dtype=read.dtype, device=read.device)
    gate, up, coefficients = blank, blank.clone() if layer.gated else None, blank.clone()
    weights = torch.zeros(len(read), len(layer.groups), device=read.device)
    scores = torch.ones_like(weights)
    for piece in routed:
        expert = piece.expert
        units = torch.arange(experts.width, device=read.device) + experts.width * expert[:, None]
        place = (piece.tokens[:, None], units)
        gate[place], coefficients[place] = piece.gate, piece.coefficients
        if up is not None and piece.up is not None:
            up[place] = piece.up
        weights[piece.tokens, expert] = piece.weight * experts.factor
        if experts.multiplies_inputs:
            x = read[piece.tokens].float()
            inputs = piece.read[piece.taken]
            scores[piece.tokens, expert] = (inputs * x).sum(-1) / x.square().sum(-1)
    output = _through(layer, summed(seen["routed_output"], len(read)), weights[:, : experts.count], False)
    output = output * experts.factor
    if "ffn_output" in seen:
        first = experts.count * experts.width
        gate[:, first:], coefficients[:, first:] = seen["gate"], seen["coefficients"]
        if up is not None:
            up[:, first:] = seen["up"]
        weights[:, -1] = shared_weight(experts, seen.get("shared_gate"))
        shared = weights[:, -1:] * seen["ffn_output"].float()
        output = output + _through(layer, shared, weights[:, experts.count :], True)
    whole = {"gate": gate, "coefficients": coefficients, "ffn_output": output, "weights": weights}
    if layer.own_norms is not None and layer.ffn_norm is not None:
        whole["ffn_input"] = layer.ffn_norm(seen["ffn_norm_input"])
    if experts.multiplies_inputs:
        whole["scores"] = scores
    return whole if up is None else whole | {"up": up}


def _through(
    layer: Layer, output: Float[Tensor, "token width"], weights: Float[Tensor, "token group"], shared: bool
) -> Float[Tensor, "token width"]:
    """What experts wrote, through their own norm if they have one, which then is in their weights too; fp32."""
    own = layer.own_norms
    if own is None:
        return output.float()
    norm = own.shared_written if shared else own.written
    scale = norm.scale(output)
    weights *= scale
    return norm.linear(output, scale)


def after_attention(layer: Layer, seen: Mapping[str, Tensor]) -> Float[Tensor, "*rows width"]:
    """The residual stream after the attention of a block and its mixer, from their outputs; in the dtype of ``lin``."""
    outputs = (seen[point].float() for point in ("attention_output", "mixer_output") if point in seen)
    update, norm = (
        reduce(torch.add, outputs, torch.zeros((), device=seen["lin"].device)),
        layer.post_attention_norm,
    )
    written = (update if norm is None else norm(update)) * layer.attention_multiplier
    written = written if layer.shift is None else written + layer.shift
    return (seen["lin"] + written).to(seen["lin"].dtype)


_POINTS = (
    "lin",
    "lout",
    "attention_input",
    "mixed",
    "attention_output",
    "mixed_gate",
    "mixer_output",
    "extra_output",
    "ffn_norm_input",
    "ffn_input",
    "gate",
    "up",
    "coefficients",
    "ffn_output",
    "routed_output",
    "shared_gate",
    "middle",
    "end",
)
_NO_PRODUCT = "the last product before its output is not of weights and values"
_CROSS = ("lin", "attention_input", "mixed", "attention_output", "middle")
_NEEDED = {
    "lin": "block",
    "mixed": "attention output projection",
    "ffn_input": "feed-forward layer",
    "gate": "first FFN projection",
    "coefficients": "down projection",
}


def flat(x: Float[Tensor, "... width"]) -> Float[Tensor, "token width"]:
    """One row per token, without the axis of the single sequence."""
    return x.detach().reshape(-1, x.shape[-1])


def failed(anatomy: Anatomy, index: int, where: str, what: str) -> ModelNotSupported:
    """The error to raise when a part of a layer is not what the model computed."""
    known = "" if anatomy.known else "; the family has no row in the table and was read by the generic rule"
    return ModelNotSupported(
        f"checking that the parts of a {anatomy.family!r} model add up: layer {index}, {where}: {what}{known}"
    )
