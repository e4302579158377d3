"""A model of which only the configuration and the tokenizer are read, with random numbers for its weights.

All of its modules are there, so that its parts can be found and counted. Every matrix is one number that stands at all
places, and takes no memory, until `Outline.draw` gives some of the layers numbers of their own, to be run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemoscope import files
from mnemoscope.errors import ModelError
from mnemoscope.memory import available
from mnemoscope.model import devices
from mnemoscope.model.fairseq_checkpoint import is_fairseq
from mnemoscope.model.load import Where, configured, dtype_of, load_model, tokenizer_of
from mnemoscope.model.model import Model, embedding_rows
from mnemoscope.model.reading import describe
from mnemoscope.text import samples
from mnemoscope.text.tokenizer import accepted, check_rows

_NOISE = 1_048_573  # numbers that are drawn and repeated: a prime, so that no two rows are alike
_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    model  its parts have the shapes, and none of the numbers, of those that are meant
    bytes  of all of its weights, in its dtype
    """

    model: Model
    bytes: int

    def size(self, layers: int, *, alike: bool = False) -> int:
        """Bytes of what `draw` makes."""
        drawn = (_one_of(weight) if alike and weight.ndim > 2 else weight for weight in self._run(layers))
        return sum(weight.numel() * weight.element_size() for weight in drawn)

    @torch.no_grad()
    def draw(self, layers: int, *, alike: bool = False) -> None:
        """Random numbers for the first layers, and for all that stands around layers.

        alike  the experts of a layer have the same, which take the memory of one
        """
        noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
        first = 0  # no two matrices begin with the same
        for weight in self._run(layers):
            shape = _one_of(weight).shape if alike and weight.ndim > 2 else weight.shape
            numbers = (noise.roll(-first) / math.sqrt(weight.shape[-1])).to(weight.device, weight.dtype)
            count = math.prod(shape)
            drawn = torch.empty(count, dtype=weight.dtype, device=weight.device)
            for start in range(0, count, _NOISE):
                drawn[start : start + _NOISE] = numbers[: count - start]
            weight.data = drawn.view(shape).expand(weight.shape)
            first = (first + count) % _NOISE

    def _run(self, layers: int) -> Iterator[Tensor]:
        """The matrices that are to be drawn."""
        parts = self.model.anatomy
        later = {id(weight) for layer in parts.layers[layers:] for weight in layer.module.parameters()}
        modules = (parts.body, parts.embedding, parts.head)
        weights = {id(weight): weight for module in modules for weight in module.parameters()}
        yield from (weight for key, weight in weights.items() if key not in later and weight.ndim > 1)


def outline(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    """A model as its config.json says it, and its tokenizer; no weights are looked at. Arguments as of `load_model`.

    Raises ModelError when config or tokenizer cannot be read, ModelNotSupported for a model whose parts are not known.
    """
    name, places = os.fspath(source), devices.named(device)
    where = Where.of(name, revision, trust_remote_code, lambda _: None)
    config, auto = configured(where)
    with samples.quiet_transformers():
        with torch.device("meta"):
            hf = auto.from_config(
                config, dtype=dtype_of(dtype, places[0]), trust_remote_code=where.trust_remote_code
            )
        size = sum(weight.numel() * weight.element_size() for weight in hf.parameters())
        _hollow(hf, places[0])
    tokenizer = accepted(tokenizer_of(where))
    check_rows(tokenizer, embedding_rows(hf), name)
    commit = getattr(hf.config, "_commit_hash", None) or revision
    several = places if len(places) > 1 else ()
    model = Model(hf.eval(), tokenizer, describe(hf), name, commit, path=where.path, devices=several)
    return Outline(model, size)


@torch.no_grad()
def _hollow(hf: PreTrainedModel, device: torch.device) -> None:
    """Put a number in the place of every matrix of a model on the meta device, and what transformers begins with in
    that of vectors and buffers, which are small."""
    made: dict[int, nn.Parameter] = {}
    for module in hf.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                # What is tied is one.
                made.setdefault(id(weight), nn.Parameter(_number(weight, device), requires_grad=False))
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.ones_like(buffer, device=device)
    for weight in made.values():
        weight._is_hf_initialized = weight.ndim > 1  # type: ignore[attr-defined]
    hf.initialize_weights()


def _number(weight: Tensor, device: torch.device) -> Tensor:
    if weight.ndim < 2:
        return torch.ones(weight.shape, dtype=weight.dtype, device=device)
    return torch.full((), 0.02, dtype=weight.dtype, device=device).expand(weight.shape)


def _one_of(weight: Tensor) -> Tensor:
    return weight[:1]


def load_or_outline(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    units: str | None = None,
    **loading: Any,
) -> Model | Outline:
    """A model if its weights are here and fit into memory, else its outline; weights are not fetched.

    Arguments as of `load_model`. A model whose units are read is loaded, and an adapter does not change an outline.
    """
    reading: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    reading["trust_remote_code"] = trust_remote_code
    held, places = stored(source, revision), devices.named(device)
    room = [devices.free(place) for place in places]
    free = available() if None in room else sum(each for each in room if each is not None)
    wide = 2 if dtype_of(dtype, places[0]) == torch.float32 else 1  # most are stored as bf16
    if units is not None or (held is not None and (free is None or held * wide < free)):
        return load_model(source, units=units, **reading, **loading)
    return outline(source, **reading)


def stored(name: str | os.PathLike[str], revision: str | None = None) -> int | None:
    """Bytes of the weights that are here of a model, by its folder or Hugging Face id; None where they are not, or not
    all of them. Nothing is fetched. Of other kinds of files (fairseq's, .gguf, samples) 0: they are loaded.
    """
    text = os.fspath(name)
    folder = files.expanded(text)
    is_folder = files.kind(folder, "loading the model", ModelError) == "folder"
    if text.startswith("sample:") or folder.suffix == ".gguf" or (is_folder and is_fairseq(folder)):
        return 0
    if is_folder:
        return _bytes(folder)
    try:
        held = [hub.try_to_load_from_cache(text, file, revision=revision) for file in _FILES]
    except HFValidationError:  # no id at all, which is said where it is read
        return None
    known = [Path(file) for file in held if isinstance(file, str)]
    return _bytes(known[0].parent) if known else None


def _bytes(folder: Path) -> int | None:
    """None where a file of several is missing: their names say of how many they are."""
    held = list(folder.glob("*.safetensors"))
    counts = [int(count) for file in held if (count := file.stem.rpartition("-of-")[2]).isdecimal()]
    return sum(file.stat().st_size for file in held) if len(held) >= max(counts, default=1) else None


def of_first_layers(model: Model, count: int) -> Model:
    """A model that ends with one of its first layers; its modules are the same, and passes through them end there."""
    parts: Any = model.anatomy
    return replace(
        model,
        anatomy=replace(parts, layers=parts.layers[:count], n_layers=count, sizes=parts.sizes[:count]),
    )
