"""An accelerator that is none: tensors that say they are on it lie in memory, where torch does what is done with them.

What no accelerator allows raises as it does there: tensors of two devices in one call, numpy of a tensor that is not in
memory, a generator of another device, products of integers, and fp64 where the kind has none (MPS). What passes
between it and the processor is counted with the line of this package that asked for it: numbers that go in, numbers
that come out, and results whose size the host must wait for.

It knows no kernel, no memory that runs out and no order in which things happen: what is wrong there only a device says.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from mnemoscope.mine import device as reductions
from mnemoscope.model import check, load, packed, parts

SOURCE = str(Path(packed.__file__).parents[1])
COMPUTED = (*packed.COMPUTED, torch.float64)
_READ = {
    "item", "tolist", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "__contains__", "__format__", "__repr__",
}  # fmt: skip
_WAITED_FOR = {
    "nonzero", "unique", "unique_consecutive", "masked_select", "bincount", "argwhere", "_unique2",
}  # fmt: skip
_PRODUCTS = {
    "matmul",
    "mm",
    "bmm",
    "mv",
    "dot",
    "addmm",
    "baddbmm",
    "linear",
    "einsum",
    "__matmul__",
    "__rmatmul__",
}
_SIZES_ONLY = {"expand_as", "view_as", "reshape_as", "__get__", "__set__"}  # of the other tensor


class Pretended(Tensor):
    """A tensor on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Pretence.current is not None, f"{func} after the device was gone"
        return Pretence.current(func, args, kwargs or {})


class Pretence(TorchFunctionMode):
    """The device, for as long as it is entered.

    crossings  how often numbers went ``in`` or ``out``, or the host waited, by the line that asked
    doubles    numbers of fp64 that were made there
    """

    current: Pretence | None = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.crossings: Counter[tuple[str, str]] = Counter()
        self.doubles: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self(func, args, dict(kwargs or {}))

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the device makes of a call of torch."""
        name = _name(func)
        given = list(_tensors((args, kwargs)))
        mine = [each for each in given if isinstance(each, Pretended)]
        special = getattr(self, f"_{name.strip('_')}", None)
        if special is not None and given:
            return special(func, *args, **kwargs)
        if name in ("is_cuda", "is_mps", "is_xpu", "is_cpu"):
            return name == f"is_{self.device.type if mine else 'cpu'}"
        if name in _READ:
            if mine and name != "__repr__":
                self._alike(name, given)
                self._count("out")
            return self._run(func, args, kwargs)
        return self._computed(func, name, args, kwargs, given, bool(mine))

    def _computed(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], given: list[Tensor], here: bool
    ) -> Any:
        if here:
            self._alike(name, given)
        if func in _device._device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = _device.CURRENT_DEVICE or torch.device("cpu")
        if kwargs.get("device") is not None:
            here, before = self._is_mine(kwargs["device"]), here
            kwargs["device"] = torch.device("cpu")
            if here != before and (given or name in ("tensor", "as_tensor", "asarray")):
                self._count("in" if here else "out")
        generator = kwargs.get("generator")
        if here and generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")
        result = self._run(func, args, kwargs)
        if here and (name in _WAITED_FOR or (name == "repeat_interleave" and len(given) > 1)):
            self._count("waits")
        if here and name in _PRODUCTS and not all(each.is_floating_point() for each in _tensors(result)):
            raise RuntimeError(f'"{name}" not implemented for integers on {self.device.type}')
        return self._as(result, here)

    @staticmethod
    def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def _is_mine(self, device: Any) -> bool:
        return isinstance(device, int) or torch.device(device).type == self.device.type

    def _alike(self, name: str, given: Iterable[Tensor]) -> None:
        if name in _SIZES_ONLY:
            return
        for each in given:
            if not isinstance(each, Pretended) and (each.ndim or name in ("cat", "stack")):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {self.device} "
                    f"and cpu! ({name})"
                )

    def _count(self, kind: str) -> None:
        self.crossings[kind, _line()] += 1

    def _as(self, result: Any, here: bool) -> Any:
        if isinstance(result, Tensor):
            return self._placed(result) if here else _plain(result)
        if isinstance(result, tuple | list) and any(
            isinstance(each, Tensor | tuple | list) for each in result
        ):
            return type(result)([self._as(each, here) for each in result])
        return result

    def _placed(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            if tensor.dtype in (torch.float64, torch.complex128):
                if self.device.type == "mps":
                    raise TypeError(
                        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it"
                    )
                self.doubles[_line()] += tensor.numel()
            if isinstance(tensor, Pretended):
                return tensor
            if tensor.is_leaf and tensor.requires_grad:  # and is to be one there
                return tensor.detach().as_subclass(Pretended).requires_grad_()
            return tensor.as_subclass(Pretended)

    # -- Calls that are about where a tensor is, by the name of the function

    def _device(self, func: Any, tensor: Tensor, *_: Any) -> torch.device:
        return self.device if isinstance(tensor, Pretended) else self._run(func, (tensor, *_), {})

    def _get_device(self, func: Any, tensor: Tensor) -> int:
        return 0 if isinstance(tensor, Pretended) else -1

    def _numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, Pretended):
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first."
            )
        return self._run(func, (tensor, *args), kwargs)

    _array = _numpy

    def _cpu(self, func: Any, tensor: Tensor, *_: Any) -> Tensor:
        return self._to(func, tensor, "cpu")

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        here, copied = isinstance(tensor, Pretended), kwargs.pop("copy", False)
        kwargs.pop("non_blocking", None)
        target, dtype = kwargs.get("device"), kwargs.get("dtype")
        for each in args:
            if isinstance(each, Tensor):
                target, dtype = each.device, each.dtype
            elif isinstance(each, str | torch.device):
                target = each
            elif isinstance(each, torch.dtype):
                dtype = each
        there = here if target is None else self._is_mine(target)
        with torch._C.DisableTorchFunction():
            if not there and target is not None and torch.device(target).type != "cpu":  # meta
                return tensor.to(target, dtype)
            same = dtype in (None, tensor.dtype) and not copied
            if there == here and same:
                return tensor
            moved = tensor.detach() if tensor.is_inference() else tensor
            moved = moved.clone() if same else moved.to(dtype or tensor.dtype, copy=True)
        if there != here:
            self._count("in" if there else "out")
        return self._placed(moved) if there else _plain(moved)

    def _copy(self, func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not args:  # __copy__
            return self._as(self._run(func, (tensor,), kwargs), isinstance(tensor, Pretended))
        self._crossed(tensor, args[0])
        return self._run(func, (tensor, *args), kwargs)

    def _crossed(self, tensor: Tensor, other: Any) -> None:
        if isinstance(other, Tensor) and isinstance(tensor, Pretended) != isinstance(other, Pretended):
            self._count("in" if isinstance(tensor, Pretended) else "out")

    def _getitem(self, func: Any, tensor: Tensor, index: Any) -> Any:
        self._indexed(tensor, index)
        return self._as(self._run(func, (tensor, index), {}), isinstance(tensor, Pretended))

    def _setitem(self, func: Any, tensor: Tensor, index: Any, value: Any) -> None:
        self._indexed(tensor, index)
        if (
            isinstance(value, Tensor)
            and value.ndim
            and isinstance(tensor, Pretended) != isinstance(value, Pretended)
        ):
            if any(True for _ in _tensors(index)) or _has_list(index):
                self._alike(
                    "index_put_", [tensor, value] if isinstance(tensor, Pretended) else [value, tensor]
                )
            self._crossed(tensor, value)
        self._run(func, (tensor, index, value), {})

    def _indexed(self, tensor: Tensor, index: Any) -> None:
        """Places may come from the processor; nothing in memory is looked up with places that do not."""
        for each in _tensors(index):
            if isinstance(tensor, Pretended):
                if not isinstance(each, Pretended) and each.ndim:
                    self._count("in")
                if each.dtype in (torch.bool, torch.uint8):
                    self._count("waits")
            elif isinstance(each, Pretended):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                )
        if isinstance(tensor, Pretended) and _has_list(index):
            self._count("in")

    def _histc(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Accelerators count whole numbers, too, and transformers has them count the tokens of experts."""
        return self._computed(
            func, "histc", (tensor.float(), *args), kwargs, [tensor], isinstance(tensor, Pretended)
        )

    def _deepcopy(self, func: Any, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if not isinstance(tensor, Pretended):
            return self._run(func, (tensor, memo), {})
        if id(tensor) not in memo:
            memo[id(tensor)] = _like(self._placed(_plain(tensor).detach().clone()), tensor)
        return memo[id(tensor)]


def _has_list(index: Any) -> bool:
    parts_of = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(each, list) or (type(each).__module__ == "numpy" and each.ndim) for each in parts_of
    )


def _name(func: Any) -> str:
    """Of a function, or of the attribute that is read or written."""
    own = getattr(func, "__name__", "")
    return str(func.__self__.__name__) if own == "__get__" else str(own)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, tuple | list):
        for each in given:
            yield from _tensors(each)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor) if isinstance(tensor, Pretended) else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A parameter where the other is one."""
    with torch._C.DisableTorchFunction():
        if isinstance(other, nn.Parameter):
            tensor.requires_grad_(other.requires_grad)
            tensor._is_param = True  # type: ignore[attr-defined]
        return tensor


def _line() -> str:
    """The innermost line of the package that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(SOURCE):
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}"


def placed(module: Any, pretence: Pretence) -> Any:
    """Weights and buffers of a module, put on the device as `nn.Module.to` does it: in place, what is shared once."""
    moved: dict[int, Tensor] = {}
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, Pretended):
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _like(pretence._placed(tensor.detach().clone()), tensor)
                    held[name] = moved[id(tensor)]
    return module


@contextmanager
def pretending(kind: str = "cuda") -> Iterator[Pretence]:
    """An accelerator of a kind is here: models are put on it with ``hf.to(pretence.device)``."""
    pretence, to = Pretence(kind), nn.Module.to

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and isinstance(args[0], str | torch.device) and pretence._is_mine(args[0]):
            return placed(module, pretence)
        return to(module, *args, **kwargs)

    def ordinary(tensor: Tensor) -> bool:
        return type(tensor) in (Tensor, nn.Parameter, Pretended) and tensor.dtype in COMPUTED

    with pytest.MonkeyPatch.context() as patch:
        for module in (packed, check, parts, load):
            patch.setattr(module, "ordinary", ordinary)
        patch.setattr(nn.Module, "to", moved)
        if hasattr(getattr(torch, kind), "get_device_name"):
            patch.setattr(getattr(torch, kind), "get_device_name", lambda _: "pretended")
        patch.setattr(
            torch.cuda, "get_device_capability", lambda _: (7, 0)
        )  # older than what has kernels of its own
        patch.setattr(torch.accelerator, "synchronize", lambda *_: None)
        patch.setattr(reductions, "has_triton", lambda _: False)
        patch.setattr(Pretence, "current", pretence)
        with pretence:
            yield pretence
