"""Which loaded objects are models: what wraps one is unwrapped, everything else is refused by its type."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemoscope.errors import ModelError, ModelNotSupported
from mnemoscope.model.packed import COMPUTED, packed
from mnemoscope.model.spread import is_there

ACCEPTED = "a Hugging Face id, a local folder, a .gguf file, sample:smollm2-135m, or a loaded PreTrainedModel"
_WRAPPERS = {  # by the name of the class: where the model is
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
_CURES = {  # by the name of the class or of its package: what to give instead
    "FullyShardedDataParallel": "its weights are spread over processes: load it whole, without FSDP",
    "HookedTransformer": "give the Hugging Face model, or its id, that it was made from",
    "TransformerBridge": "give the Hugging Face model that it was made from (.original_model)",
    "LanguageModel": "give the Hugging Face model inside (._model)",
    "Pipeline": "give its .model",
}
_MERGE = "give model.merge_and_unload() of the PeftModel (of a copy of it, to keep the adapters)"


def is_path(source: object) -> bool:
    """Whether an object names a model; everything else must be one."""
    return isinstance(source, str | os.PathLike)


def unwrapped(source: object) -> PreTrainedModel:
    """The PreTrainedModel that was given, or that torch.compile, DataParallel or a PeftModel wraps.

    `ModelError` in one line, with the type and the cure, for anything else, and for adapters that are not merged:
    the model that runs with them has other weights than it shows.
    """
    inner: Any = source
    while (name := type(inner).__name__) in _WRAPPERS and isinstance(inner, nn.Module):
        inner = getattr(inner, _WRAPPERS[name])
    if _is_peft(inner):
        inner = _base_of(inner)
    if not isinstance(inner, PreTrainedModel):
        _refuse(inner)
    _check_adapters(inner)
    _check_precision(inner)
    _check_weights(inner)
    return inner


def _refuse(source: object) -> NoReturn:
    kinds = [kind.__name__ for kind in type(source).__mro__]
    cure = next((cure for name, cure in _CURES.items() if name in kinds), f"give {ACCEPTED}")
    name = (
        "None" if source is None else f"an object of type {type(source).__module__}.{type(source).__name__}"
    )
    raise ModelError(f"loading a model: {name.replace('builtins.', '')} is not one; {cure}")


def _is_peft(source: object) -> bool:
    return any(
        kind.__module__.startswith("peft.") and kind.__name__ == "PeftModel" for kind in type(source).__mro__
    )


def _base_of(source: Any) -> Any:
    if getattr(source.active_peft_config, "is_prompt_learning", False):
        raise ModelNotSupported(
            f"loading a {type(source).__name__}: its {source.active_peft_config.peft_type.value} adapter puts vectors "
            "before the prompt that are no tokens; give its base model (get_base_model()) if that is the one you mean"
        )
    return source.get_base_model()


def _check_adapters(hf: PreTrainedModel) -> None:
    """Adapters of PEFT, whoever put them in (also `load_adapter`), must be merged or switched off."""
    for name, module in hf.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("peft.")]
        if "AuxiliaryTrainingWrapper" in kinds:
            raise ModelNotSupported(
                f"loading a {type(hf).__name__}: {name} is a trained copy beside the original (modules_to_save of an "
                f"adapter); {_MERGE}"
            )
        if "BaseTunerLayer" not in kinds or module.disable_adapters:
            continue
        active = set(module.active_adapters) & _held(module)
        if left := sorted(active - set(module.merged_adapters)):
            raise ModelNotSupported(
                f"loading a {type(hf).__name__}: its adapter {left[0]!r} ({type(module).__name__} at {name}, ...) is "
                f"not merged, so its weights are not those that it runs with; {_MERGE}"
            )


def _held(module: Any) -> set[str]:
    """Adapters for which a layer has weights."""
    names: set[str] = set()
    for attribute in module.adapter_layer_names:
        names |= set(getattr(module, attribute, {}).keys())
    return names


def _check_precision(hf: PreTrainedModel) -> None:
    """`ModelNotSupported` if accelerate put an autocast around its forward method (mixed precision)."""
    if "_original_forward" in vars(hf):
        raise ModelNotSupported(
            f"loading a {type(hf).__name__}: accelerate runs it in mixed precision, so it computes in another dtype "
            "than that of its weights; give accelerator.unwrap_model(hf, keep_fp32_wrapper=False)"
        )


def _check_weights(hf: PreTrainedModel) -> None:
    """`ModelNotSupported` unless all weights are there, in a dtype that is computed in; on several devices only where
    accelerate moves what runs from one to the next.
    """
    doing = f"loading a {type(hf).__name__}"
    every = [
        (f"{prefix}.{name}", module, name) for prefix, module in hf.named_modules() for name in _names(module)
    ]
    weights = {path: getattr(module, name) for path, module, name in every}
    if away := [path for path, module, _ in every if not is_there(module, weights[path])]:
        raise ModelNotSupported(
            f"{doing}: {len(away)} of its {len(weights)} tensors (the first is {away[0]}) are on the meta device, "
            "so they were never loaded; load it whole"
        )
    devices = sorted(
        {str(weight.device) for weight in (*hf.parameters(), *hf.buffers()) if not weight.is_meta}
    )
    if len(devices) > 1 and not any(hasattr(module, "_hf_hook") for module in hf.modules()):
        raise ModelNotSupported(
            f"{doing}: its weights are on several devices ({', '.join(devices)}), and nothing moves what runs from "
            "one to the next; load it on one (hf.to(device)), or with device_map"
        )
    spread = next((name for name, weight in weights.items() if type(weight).__name__ == "DTensor"), None)
    if spread is not None:
        raise ModelNotSupported(
            f"{doing}: its weights are spread over processes ({spread} is a DTensor); load it whole in one"
        )
    for name, weight in _computing(hf):
        if weight.is_floating_point() and weight.dtype not in COMPUTED:
            raise ModelNotSupported(
                f"{doing}: {name} is in {str(weight.dtype).removeprefix('torch.')}; float32, bfloat16 and float16 are "
                "accepted: convert a copy (copy.deepcopy(hf).float()), or load it without quantisation"
            )


def _names(module: nn.Module) -> list[str]:
    held = (*module._parameters.items(), *module._buffers.items())
    return [name for name, tensor in held if tensor is not None]


def _computing(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by name, but for those of linear modules that hold them packed."""
    for prefix, module in hf.named_modules():
        if not packed(module):
            yield from module.named_parameters(prefix, recurse=False)
