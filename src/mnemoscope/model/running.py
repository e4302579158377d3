"""How a model is run while it is watched: as it is written, in evaluation mode, in fp32 if asked; then as it was."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemoscope.model.experts import computed_here, taken_apart
from mnemoscope.model.packed import packed, unpacked

_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of device


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

    attention  None for the model's own; with any other, experts are computed by our implementation too
    """
    configs = {id(c): c for m in hf.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    training = [module for module in hf.modules() if module.training]
    apart = attention is not None
    with (
        plainly(),
        _widened(hf, apart) if upcast else nullcontext(),
        unpacked(hf) if upcast else nullcontext(),
        taken_apart(hf) if apart else nullcontext(),
    ):
        try:
            hf.eval()
            for config, implementation in before:
                config._attn_implementation_internal = attention or implementation
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            for module in training:
                module.training = True


@contextmanager
def _widened(hf: PreTrainedModel, apart: bool) -> Iterator[None]:
    """While a module runs, its half-precision weights are fp32; outside of its call they are as stored.

    apart  experts are computed by our implementation, which widens one at a time
    """
    handles: list[Any] = []
    for module in hf.modules():
        if (apart and computed_here(module)) or packed(module):
            continue
        tensors = [*_tensors(module)]
        children = (getattr(module, name, None) for name in _read_from_outside(type(module)))  # type: ignore[arg-type]
        read = chain.from_iterable(
            _tensors(child) for child in children if isinstance(child, nn.Module) and not packed(child)
        )
        # Of a whole model a norm, whose dtype it asks for (Zaya), and no embedding for all of the time.
        tensors += [tensor for tensor in read if tensor.ndim == 1 or not isinstance(module, PreTrainedModel)]
        if any(tensor.dtype in _HALF for tensor in tensors):
            widener = _Widener(module, tensors)
            handles.append(module.register_forward_pre_hook(widener.widen, prepend=True))
            handles.append(module.register_forward_hook(widener.restore, always_call=True))
    with hooked(handles):
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


@cache
def _read_from_outside(kind: type) -> tuple[str, ...]:
    """The children whose weights the code of a module reads itself, while they do not run (Jamba, Nemotron H, DBRX)."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return ()
    return tuple(dict.fromkeys(re.findall(r"self\.(\w+)\.(?:weight|bias|[wv][12])\b", source)))


class _Widener:
    """Swaps half-precision weights for fp32 copies, and back.

    What waits elsewhere is brought in the dtype of what stands for it, and something new stands for it afterwards.
    """

    def __init__(self, module: nn.Module, tensors: list[Tensor]) -> None:
        self.module, self.tensors = module, tensors
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.away: list[tuple[str, Tensor]] = []

    def widen(self, *_: Any) -> None:
        self.away = [
            (name, tensor) for name, tensor in self.module.named_parameters(recurse=False) if tensor.is_meta
        ]
        for name, tensor in self.away:
            standing = tensor.float() if tensor.dtype in _HALF else tensor
            self.module._parameters[name] = nn.Parameter(standing.detach(), requires_grad=False)
        for tensor in self.tensors:
            if tensor.dtype in _HALF and not tensor.is_meta:
                self.stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(self, *_: Any) -> None:
        while self.stored:
            tensor, data = self.stored.pop()
            tensor.data = data
        for name, tensor in self.away:
            self.module._parameters[name] = tensor  # type: ignore[assignment]
