"""An adapter of PEFT, merged into the model that it was trained beside."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import torch
from torch import nn
from transformers import PreTrainedModel

from mnemoscope import files
from mnemoscope.errors import ModelError, ModelNotSupported
from mnemoscope.model.checkpoint import only_cached
from mnemoscope.records import AdapterEntry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = 16  # of the random text on which the merged model is compared with the adapted one
# How far logits may move in merging, as a share of their range: merged weights are rounded to the model's dtype.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def merge(hf: PreTrainedModel, name: str, base: str) -> tuple[PreTrainedModel, AdapterEntry]:
    """Merge an adapter into a model, which is changed, and prove that its logits are those with the adapter beside it.

    name  a folder with adapter_config.json and adapter_model.safetensors, or a Hugging Face id (OWNER/NAME or
          OWNER/NAME@REVISION)
    base  the name of the model

    Raises ModelError where there is no such adapter or it is one of another model, ModelNotSupported where it is of a
    kind that cannot be merged.
    """
    doing = f"merging the adapter {name} into {base}"
    folder, revision, path = _place(name, doing)
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelError(f"{doing}: peft is not installed; pip install 'mnemoscope[adapters]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, which are taken apart here
            config = PeftConfig.from_pretrained(folder)
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            if config.is_prompt_learning:
                raise ModelNotSupported(
                    f"{doing}: a {kind} adapter puts vectors before the prompt that are no tokens; give one that "
                    "changes weights (LoRA, DoRA, IA3 ...)"
                )
            config.inference_mode = True
            adapted = PeftModel(hf, config).eval()
            keys = adapted.load_adapter(str(folder), "default", torch_device=str(hf.device))
            _check_whole(keys.missing_keys, keys.unexpected_keys, doing)
            _untie(adapted)
            beside = _logits(adapted)
            merged = adapted.merge_and_unload(safe_merge=True).eval()
    except ModelError:
        raise
    except Exception as error:  # whatever the library raises, the user can mend only what was given
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelError(
            f"{doing}: {type(error).__name__}: {reason}; give an adapter that was trained beside this model, of a kind "
            "that merges (LoRA, DoRA, IA3 ...)"
        ) from error
    moved = float((_logits(merged) - beside).abs().max() / (beside.max() - beside.min()))
    if not moved <= _ROUNDING.get(hf.dtype, 5e-2):
        raise ModelNotSupported(
            f"{doing}: merged, its logits differ by {moved:.2g} of their range from those with the adapter beside it, "
            "so it would be another model; merge it yourself and give the result"
        )
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    return merged, AdapterEntry(id=name, path=path, revision=revision, kind=kind, sha256=digest, base=base)


def _place(name: str, doing: str) -> tuple[Path, str | None, str | None]:
    """The folder of an adapter, the commit of one from Hugging Face, and the absolute path of a local one."""
    folder = files.expanded(name)
    revision = None
    if not files.kind(folder, f"{doing}:", ModelError) and not name.startswith((".", "/", "~")):
        repository, _, asked = name.partition("@")
        cached = only_cached(repository, asked or None, "adapter", CONFIG)
        fetched = hub.snapshot_download(
            repository, revision=asked or None, allow_patterns=[CONFIG, WEIGHTS], local_files_only=cached
        )
        folder = Path(fetched)
        revision = folder.name
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise ModelError(
            f"{doing}: it has no {missing[0]}; give a folder as save_pretrained of peft writes it, with {CONFIG} and "
            f"{WEIGHTS} (pickles are not read), or its Hugging Face id"
        )
    return folder, revision, None if revision else str(folder.resolve())


def _check_whole(missing: list[str], unexpected: list[str], doing: str) -> None:
    """ModelError unless all of an adapter was read, and all that it should hold was there."""
    for what, names in (("lacks", missing), ("holds beside what is read", unexpected)):
        if names:
            raise ModelError(
                f"{doing}: the adapter {what} {len(names)} tensors (the first is {names[0]}), so it is of another "
                "model or damaged; give the one that was trained beside this model"
            )


def _untie(adapted: nn.Module) -> None:
    """Give an adapted module a weight of its own where others share it: they stay as they are when it is merged."""
    owners: dict[int, list[Any]] = defaultdict(list)
    inside = {id(module.base_layer) for module in adapted.modules() if hasattr(module, "base_layer")}
    for module in adapted.modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners[id(weight)].append(module)
    for sharing in owners.values():
        for module in sharing if len(sharing) > 1 else ():
            if id(module) in inside:
                module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """What a model says of a short random text; fp32."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=tokens.to(model.device))
    return output[0].float()
