"""Watching a forward pass: what each block reads, mixes and writes, with the model left as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.parts import Anatomy, Layer

TOLERANCE = 1e-4  # of the logit range for logits, of the largest entry of the vector for everything else
_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of device


@dataclass(eq=False)
class LayerTrace:
    """What one block saw and did, for one sequence, in the dtype of the pass.

    ``lres`` is the residual after attention; in parallel blocks, which have no such point, ``lin`` plus the
    attention update (G5). ``value`` is given per query head: heads that share a key-value head have equal
    rows (G6), and a bias of the value projection is inside it, which is exact because weights add up to 1
    (G8). ``*_output`` are the outputs of the two output projections, before post-norm and multiplier.
    """

    lin: Float[Tensor, "token width"]
    lres: Float[Tensor, "token width"]
    lout: Float[Tensor, "token width"]
    alpha: Float[Tensor, "head token source"]
    value: Float[Tensor, "head source dimension"]
    mixed: Float[Tensor, "token heads_x_dimension"]  # input of the attention output projection
    attention_input: Float[Tensor, "token width"]
    attention_output: Float[Tensor, "token width"]
    ffn_input: Float[Tensor, "token width"]
    gate: Float[Tensor, "token neuron"]  # pre-activation
    up: Float[Tensor, "token neuron"] | None
    coefficients: Float[Tensor, "token neuron"]
    ffn_output: Float[Tensor, "token width"]
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)  # how the attention module was called


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
    key, value = (part.repeat_interleave(shared, 1) for part in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1), value


def heads_of(operands: tuple[Tensor, Tensor] | None, n_heads: int) -> tuple[Tensor, Tensor]:
    """Both operands of ``weights @ values`` as [head, ...]; a value shared by all heads is repeated."""
    if operands is None:
        raise ModelNotSupported(
            "taking attention apart: no product of attention weights and values was seen before the output "
            "projection; load the model with attn_implementation='eager'"
        )
    alpha, value = (operand.reshape(-1, *operand.shape[-2:]) for operand in operands)
    return alpha, value.expand(n_heads, -1, -1)


class Witness:
    """What one block was seen to do; its methods are the hooks."""

    def __init__(self, part: Layer, recorder: Products) -> None:
        self.part, self.recorder = part, recorder
        self.seen: dict[str, Tensor] = {}
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.product: tuple[Tensor, Tensor] | None = None

    def handles(self) -> list[Any]:
        """Register all hooks; the caller removes them (`hooked`)."""
        part, norm = self.part, self.part.ffn_norm
        handles = [
            part.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            part.module.register_forward_hook(self.leave),
            part.attention.register_forward_pre_hook(self.attend, with_kwargs=True),
            part.attention_out.register_forward_pre_hook(self.mix),
            part.attention_out.register_forward_hook(partial(self.keep, "attention_output")),
            part.gate.module.register_forward_hook(self.detect),
            part.down.register_forward_pre_hook(partial(self.read, "coefficients")),
            part.down.register_forward_hook(partial(self.keep, "ffn_output")),
        ]
        if part.up is not None and part.up.module is not part.gate.module:
            handles.append(part.up.module.register_forward_hook(self.detect_up))
        if norm is not None and norm.module is not None:
            handles.append(norm.module.register_forward_pre_hook(partial(self.read, "ffn_norm_input")))
        return handles

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen["lin"] = hidden(args, kwargs)

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.seen["lout"] = flat(output[0] if isinstance(output, tuple) else output)

    def attend(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)
        self.seen["attention_input"] = hidden(args, kwargs)

    def mix(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.product = self.recorder.settle()
        self.seen["mixed"] = flat(args[0])

    def detect(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen["ffn_input"] = flat(args[0])
        self.seen["gate"] = flat(self.part.gate.of(output))
        if self.part.up is not None and self.part.up.module is self.part.gate.module:
            self.seen["up"] = flat(self.part.up.of(output))

    def detect_up(self, _: nn.Module, __: Any, output: Tensor) -> None:
        assert self.part.up is not None
        self.seen["up"] = flat(self.part.up.of(output))

    def read(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen[name] = flat(args[0])

    def keep(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        # A copy, because Falcon adds to its FFN's output in place.
        self.seen[name] = flat(output).clone()

    def trace(self, index: int, anatomy: Anatomy) -> LayerTrace:
        """What was seen, once the pass has ended; `ModelNotSupported` if a part was never called."""
        seen = dict(self.seen)
        for name, what in _NEEDED.items():
            if name not in seen:
                raise failed(anatomy, index, "layer", f"its {what} was never called")
        read = seen.pop("ffn_norm_input", seen["ffn_input"])
        alpha, value = heads_of(self.product, self.part.n_heads)
        seen["lres"] = self._after_attention(anatomy.residual_multiplier) if anatomy.parallel else read
        return LayerTrace(alpha=alpha, value=value, up=seen.pop("up", None), call=self.call, **seen)

    def _after_attention(self, multiplier: float) -> Tensor:
        output, norm = self.seen["attention_output"].float(), self.part.post_attention_norm
        update = (output if norm is None else norm(output)) * multiplier
        return (self.seen["lin"] + update).to(self.seen["lin"].dtype)


_NEEDED = {
    "lin": "block",
    "mixed": "attention output projection",
    "gate": "first FFN projection",
    "coefficients": "down projection",
}


def hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "token width"]:
    """The residual among the arguments of a block or of its attention."""
    return flat(args[0] if args else kwargs["hidden_states"])


def flat(x: Float[Tensor, "... width"]) -> Float[Tensor, "token width"]:
    """One row per token, without the axis of the single sequence."""
    return x.detach().reshape(-1, x.shape[-1])


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end of the block, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plainly() -> Iterator[None]:
    """Whatever surrounds the block, models compute as they are written, in the dtype of their weights.

    What torch.compile was asked to compile is not, so that hooks see its parts; autocast is off, and new tensors are
    fp32 on the processor unless something else is asked for. Other processes (workers) have none of these settings.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        # Importing the compiler takes a second, and without it nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in filter(torch.is_autocast_enabled, _AUTOCAST):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def observed(hf: PreTrainedModel, *, upcast: bool, attention: str | None = "eager") -> Iterator[None]:
    """Evaluation mode and one attention implementation, and fp32 arithmetic if asked, for the time of the block.

    attention  None for the model's own
    """
    configs = {id(c): c for m in hf.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    training = [module for module in hf.modules() if module.training]
    with plainly(), _widened(hf) if upcast else nullcontext():
        try:
            hf.eval()
            for config, own in before:
                config._attn_implementation_internal = attention or own
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            for module in training:
                module.training = True


@contextmanager
def _widened(hf: PreTrainedModel) -> Iterator[None]:
    """While a module runs, its half-precision weights are fp32; outside of its call they are as stored."""
    handles: list[Any] = []
    for module in hf.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.dtype in _HALF for tensor in own):
            widener = _Widener()
            handles.append(module.register_forward_pre_hook(widener.widen, prepend=True))
            handles.append(module.register_forward_hook(widener.restore, always_call=True))
    with hooked(handles):
        yield


class _Widener:
    """Swaps the half-precision weights of one module for fp32 copies, and back."""

    def __init__(self) -> None:
        self.stored: list[tuple[Tensor, Tensor]] = []

    def widen(self, module: nn.Module, *_: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype in _HALF:
                self.stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(self, *_: Any) -> None:
        while self.stored:
            tensor, data = self.stored.pop()
            tensor.data = data


def failed(anatomy: Anatomy, index: int, where: str, what: str) -> ModelNotSupported:
    """The error to raise when a part of a layer is not what the model computed."""
    known = "" if anatomy.known else "; the family has no row in the table and was read by the generic rule"
    return ModelNotSupported(
        f"checking that the parts of a {anatomy.family!r} model add up: layer {index}, {where}: {what}{known}"
    )
