"""What a loaded module is at the moment: its weights, settings, code, hooks, attention and mode, cheaply seen.

Whoever holds a model can train it, hook it or switch its mode at any time. What was found on load is used only while
these are as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnemoscope.model.experts import implementation
from mnemoscope.model.packed import multiplied_out, packed, stored
from mnemoscope.model.spread import waiting

SAMPLED = 64  # entries of a matrix that are looked at; of a vector, all
_BITS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by bytes: whole numbers of the same bits


class Fingerprint(NamedTuple):
    """What changes when a model does, short of a few entries of a matrix that are written behind autograd's back, and
    of the integers of packed weights.
    """

    # Modules, their code, hooks, attention, experts, and how often autograd saw each weight written.
    structure: tuple[Any, ...]
    # Of the bits of each vector and of sampled entries of each matrix, for writes that it did not see.
    sums: tuple[int, ...]
    settings: tuple[Any, ...] = ()  # numbers that modules compute with: epsilons, multipliers, caps


def fingerprint(hf: nn.Module) -> Fingerprint:
    """The fingerprint of all weights and buffers, in milliseconds."""
    return Fingerprint(structure(hf), _sums(hf), _settings(hf))


def structure(hf: nn.Module) -> tuple[Any, ...]:
    """The part that is cheap enough to be seen at every batch."""
    modules = tuple(
        (id(module), _code(module), *_hooks(module), _attention(module), implementation(module))
        for module in hf.modules()
    )
    return modules, tuple(map(_written, hf.parameters()))


def _written(weight: Tensor) -> tuple[Any, ...]:
    """What of a weight is seen to change; libraries rearrange the integers of packed ones from pass to pass."""
    if weight.is_meta:  # something new stands for it after each pass
        return tuple(weight.shape), weight.dtype
    if not weight.is_floating_point():
        return id(weight), weight.nbytes
    return id(weight), tuple(weight.shape), weight.dtype, _version(weight)


def _code(module: nn.Module) -> int:
    """The identity of its forward method, which may have been replaced in the module or in its class."""
    forward: Any = module.forward
    if isinstance(forward, partial) and _own(forward):
        forward = forward.args[0]  # in whose place it stands for the time of a pass
    return id(getattr(forward, "__func__", forward))  # a bound method is another object at every look


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """Hooks that are not this package's own, in their order."""
    registered = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return tuple(id(hook) for hook in registered if not _own(hook))


def _own(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("mnemoscope.")


def _attention(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _settings(hf: nn.Module) -> tuple[Any, ...]:
    """Fractions only: whole numbers, words and flags are also counters and caches of the forward pass."""
    configs = {
        id(config): config
        for module in hf.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    owners = [*hf.modules(), *configs.values()]
    return tuple(
        tuple((name, value) for name, value in vars(owner).items() if isinstance(value, float))
        for owner in owners
    )


@torch.no_grad()
def _sums(hf: nn.Module) -> tuple[int, ...]:
    tensors = chain.from_iterable(map(stored, (*hf.parameters(), *_kept(hf))))
    sums = [
        _sampled(tensor).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
        if not tensor.is_meta and (tensor.is_floating_point() or tensor.ndim < 2)
    ]
    return tuple(torch.stack([total.to(sums[0].device) for total in sums]).tolist()) if sums else ()


def _kept(hf: nn.Module) -> Iterator[Tensor]:
    """Buffers that a checkpoint holds; others are scratch of the forward pass."""
    for module in hf.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _sampled(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor
    if not tensor.is_contiguous():  # where one number stands at many places, it is looked at once
        return tensor[tuple(slice(None) if step else slice(0, 1) for step in tensor.stride())]
    return tensor.view(-1)[:: max(1, tensor.numel() // SAMPLED)]


def weights(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and numbers of what a checkpoint of a model holds, by name; packed weights are multiplied out.

    How they are packed is not seen: some libraries rearrange them when they are run or asked for.
    """
    modules = {f"{prefix}.weight": module for prefix, module in hf.named_modules() if packed(module)}
    state: dict[str, Any] = {} if modules else hf.state_dict()
    for prefix, module in hf.named_modules() if modules else ():
        if packed(module):
            state |= {f"{prefix}.bias": module.bias} if getattr(module, "bias", None) is not None else {}
        else:
            module._save_to_state_dict(state, f"{prefix}." if prefix else "", False)
    every = dict(hf.named_modules())
    for name in sorted(state.keys() | modules.keys()):
        owner, _, own = name.rpartition(".")
        tensor = multiplied_out(modules[name]) if name in modules else state[name]
        yield name, waiting(every[owner], own, tensor) if owner in every else tensor


class Mode:
    """Evaluation mode for as long as someone runs the model; at the end each module's own flag is put back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._training: list[nn.Module] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Mode, ()  # a copy, or a worker's, starts afresh

    @property
    def active(self) -> bool:
        """Somebody is running the model."""
        return self._depth > 0

    @contextmanager
    def evaluating(self, hf: nn.Module) -> Iterator[None]:
        """Put everything into evaluation mode; blocks may lie inside one another and in several threads."""
        with self._lock:
            self._depth += 1
            training = [module for module in hf.modules() if module.training]
            self._training += training
            for module in training:
                module.training = False
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    for module in self._training:
                        module.training = True
                    self._training.clear()
