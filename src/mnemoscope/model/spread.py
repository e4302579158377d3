"""Models that accelerate spread: layers on several devices, or weights that wait elsewhere until they are run.

Its hooks bring what is needed where it is needed. Parts are added up on one device, which is the embedding's.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_HOMES: WeakKeyDictionary[nn.Module, torch.device] = (
    WeakKeyDictionary()
)  # of the modules of models that are spread


def is_spread(hf: nn.Module) -> bool:
    """Whether accelerate put the weights of a model on several devices, or keeps some elsewhere until they are run."""
    weights = {weight.device for weight in hf.parameters()}
    return len(weights) > 1 or torch.device("meta") in weights


def home(hf: Any) -> torch.device:
    """The device on which the parts of a model are added up."""
    embedding = hf.get_input_embeddings()
    weight: Tensor = next(embedding.parameters())
    executing = getattr(_hook_of(embedding), "execution_device", None)
    return torch.device(executing) if weight.is_meta and executing is not None else weight.device


def remember(hf: nn.Module) -> None:
    """Note where what is read of a model comes, if it is spread; forget what was noted of one that is no longer."""
    spread = dict.fromkeys(hf.modules(), home(hf)) if is_spread(hf) else {}
    for module in hf.modules():
        _HOMES.pop(module, None)
    _HOMES.update(spread)


def at_home(module: nn.Module, tensor: Tensor) -> Tensor:
    """What a module of a model has to do with, where the parts of that model are added up."""
    device = _HOMES.get(module)
    return tensor if device is None else tensor.to(device)


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a module, without its history, where parts are added up; None where there is none."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    return at_home(module, waiting(module, name, tensor.detach()))


def is_there(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a parameter of a module has numbers, or waits elsewhere until it is run."""
    return not tensor.is_meta or getattr(_hook_of(module), "weights_map", None) is not None


def waiting(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What stands for a parameter of a module that waits elsewhere until it is run; else the tensor itself."""
    weights = getattr(_hook_of(module), "weights_map", None)
    return tensor if not tensor.is_meta or weights is None else weights[name].to(tensor.dtype)


def _hook_of(module: nn.Module) -> Any:
    """The hook of accelerate that moves weights: itself or among several in a row."""
    hook = getattr(module, "_hf_hook", None)
    every = getattr(hook, "hooks", (hook,))
    return next((each for each in every if getattr(each, "offload", False)), hook)
