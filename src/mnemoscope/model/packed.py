"""Weights that a linear module holds packed (in 4 or 8 bits, with scales), whatever the library that packed them.

The module runs as it is. Where its weights are needed as numbers they are multiplied out: by a method of the tensor's
own, or by giving the module basis vectors, which is exact for any module that is linear in what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 1024  # basis vectors at once


def ordinary(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that are computed with as they are stored."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in (*COMPUTED, torch.float64)


def plain(module: nn.Module) -> bool:
    """Whether the weight of a module is a matrix of ordinary numbers."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and ordinary(weight)


def packed(module: nn.Module) -> bool:
    """Whether a module is linear and its weights are packed: it says its sizes, and holds tensors of other kinds."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(size, int) for size in sizes) or plain(module):
        return False
    held = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return any(not ordinary(tensor) for tensor in held)


def sizes(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a packed module, as it says them."""
    return module.out_features, module.in_features


def packings(hf: nn.Module) -> list[str]:
    """What packed modules there are, by their classes and those of their weights."""
    names = set()
    for module in filter(packed, hf.modules()):
        weight = getattr(module, "weight", None)
        inner = (
            "" if weight is None or type(weight) in (Tensor, nn.Parameter) else f" ({type(weight).__name__})"
        )
        names.add(type(module).__name__ + inner)
    return sorted(names)


@torch.no_grad()
def multiplied_out(module: Any) -> Float[Tensor, "output input"]:
    """The weights of a packed module, without its bias."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and hasattr(weight, "__tensor_flatten__") and hasattr(weight, "dequantize"):
        return weight.dequantize()
    device = next(chain(module.parameters(), module.buffers())).device
    for dtype in COMPUTED:  # some compute in half precision only
        try:
            return _on_basis(module, dtype, device)
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            failure = error
    raise RuntimeError(
        f"{type(module).__name__} computes in none of the usual dtypes: {failure}"
    ) from failure


def _on_basis(module: Any, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "output input"]:
    forward, size = module.forward, module.in_features
    if isinstance(forward, partial) and forward.func is _product:
        forward = forward.args[0]  # its own, which a library may have put there
    nothing = forward(torch.zeros(1, size, dtype=dtype, device=device))
    columns = [forward(rows) - nothing for rows in torch.eye(size, dtype=dtype, device=device).split(_ROWS)]
    return torch.cat(columns).T


@contextmanager
def unpacked(hf: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """For the time of the block packed modules multiply with their weights multiplied out.

    dtype  of the product; that of the pass if None
    """
    modules: list[Any] = list(filter(packed, hf.modules()))
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(_product, module.forward, module, dtype)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _product(
    _: Any, module: Any, dtype: torch.dtype | None, x: Float[Tensor, "*rows input"]
) -> Float[Tensor, "*rows output"]:
    dtype, weight, bias = dtype or x.dtype, multiplied_out(module), getattr(module, "bias", None)
    bias = None if bias is None else bias.to(dtype)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that one of a packed kind is made of; itself where it is none."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor
