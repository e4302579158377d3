"""Finding modules by path, and measuring what a norm does instead of trusting its name."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import nn

from mnemoscope.anatomy.parts import Norm
from mnemoscope.errors import ModelNotSupported

_WRAPPERS = {  # of single parts, by the name of the class: where the part is
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def refused(family: str, reason: str) -> ModelNotSupported:
    """The error to raise for a model that cannot be read, with the reason."""
    return ModelNotSupported(
        f"reading the anatomy of a {family!r} model: {reason}; decoders with one dense FFN per block are "
        "accepted, and `mnemoscope models` lists the families known"
    )


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, itself and not what wraps it, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return bare(module)


def bare(module: nn.Module) -> nn.Module:
    """A part that was compiled or checkpointed by itself, without what wraps it."""
    while (name := _WRAPPERS.get(type(module).__name__)) is not None and isinstance(module, nn.Module):
        module = getattr(module, name)
    return module


def part_of(module: nn.Module, path: str, family: str) -> nn.Module:
    """The module at a dotted path; `ModelNotSupported` if it is missing."""
    found = find(module, path)
    if found is None:
        raise refused(family, f"{type(module).__name__} has no part {path!r}")
    return found


def measured_norm(owner: nn.Module, path: str | None, width: int, config: Any, family: str) -> Norm | None:
    """The norm at a path as it behaves, None for no path; `ModelNotSupported` if it is neither RMS nor layer."""
    if path is None:
        return None
    module = part_of(owner, path, family)
    found = _measure(module, width, config)
    if found is None:
        raise refused(family, f"{path} ({type(module).__name__}) is no RMS or layer norm over the width")
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
