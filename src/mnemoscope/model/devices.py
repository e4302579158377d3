"""Where a model can be computed. Needs torch, and no other library that takes long to import."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mnemoscope.arguments import check_loading
from mnemoscope.errors import ModelError


def named(names: str) -> tuple[torch.device, ...]:
    """The devices of these names, with commas between; ModelError if one is not here, or if they are not all alike.

    `auto` is a CUDA device if there is one, else cpu; `all` are the accelerators of this machine.
    """
    check_loading(device=names)
    if names == "auto":
        return (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
    places = _accelerators(names) if names == "all" else tuple(map(_here, names.split(",")))
    kinds = sorted(set(map(hardware, places)))
    if len(kinds) > 1:
        raise ModelError(
            f"loading a model: {{device}} are {kinds[0]} and {kinds[1]}, whose sums differ in their last bits; give "
            "devices that are alike",
            device=names,
        )
    return places


def _accelerators(names: str) -> tuple[torch.device, ...]:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        raise ModelError(
            "loading a model: {device} are the accelerators of this machine, and there is none that this build of "
            "torch can use; give auto or cpu",
            device=names,
        )
    return tuple(torch.device(kind.type, index) for index in range(torch.accelerator.device_count()))


def _here(name: str) -> torch.device:
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError):  # which tell of builds and of dozens of other devices
        raise ModelError(
            "loading a model: {device} is not there, or this build of torch cannot use it; give auto or cpu",
            device=name,
        ) from None
    return wanted


def hardware(device: torch.device) -> str:
    """What a device is: its kind, and of an accelerator its name, where it has one. What is alike computes alike."""
    naming = _asked(device, "get_device_name")
    return device.type if naming is None else f"{device.type} ({naming(device)})"


def free(device: torch.device) -> int | None:
    """Bytes that are free on an accelerator; None for the processor, and where nothing tells."""
    telling = _asked(device, "mem_get_info")
    return None if telling is None else int(telling(device)[0])


def _asked(device: torch.device, function: str) -> Callable[[torch.device], Any] | None:
    """A function of torch's module for a kind of accelerator, if it has that."""
    return None if device.type == "cpu" else getattr(getattr(torch, device.type, None), function, None)


def made_on(device: torch.device) -> AbstractContextManager[object]:
    """New tensors are made there in the block; on the CPU they are anyway, and asking costs at every call."""
    return nullcontext() if device.type == "cpu" else device
