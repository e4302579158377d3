"""Where a model can be computed. Needs torch, and no other library that takes long to import."""

from __future__ import annotations

import torch

from mnemoscope.arguments import check_loading
from mnemoscope.errors import ModelError


def device(name: str) -> torch.device:
    """The device of that name; ModelError if there is none here. `auto` is a CUDA device if there is one, else cpu."""
    check_loading(device=name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError):  # which tell of builds and of dozens of other devices
        raise ModelError(
            "loading a model: {device} is not there, or this build of torch cannot use it; give auto or cpu",
            device=name,
        ) from None
    return wanted
