"""What of a checkpoint was not used: tensors that the model has no place for, or another shape, or another type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mnemoscope.errors import ModelError

# What transformers itself ignores for some classes, or computes: buffers that old checkpoints carry, causal masks of
# GPT-2, GPT-Neo(X) and CodeGen, and heads that predict several tokens ahead.
_HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.(original_)?inv_freq$"
    r"|(^|\.)(attn|attention|self_attn|crossattention)\.(masked_)?bias$"
    r"|(^|\.)(position_ids|mtp\..*|mtp_.*)$"
)
# Towers for images and sound, which text alone does not go through.
_OTHER_SENSES = re.compile(
    r"(^|\.)(vision|visual|image|audio|speech|video|multi_modal|mm_|img_|embed_vision|embed_audio)[a-z_0-9]*\."
)
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}


def check_tensors(name: str, found: Mapping[str, Any], *, allow_unused: bool) -> tuple[str, ...]:
    """What was left unused, a line for each kind; `ModelError` for what may make it another model.

    found  the loading info of transformers: missing, unexpected and mismatched keys
    """
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"loading the model {name}: its weights lack {len(missing)} tensors (the first is {missing[0]}), which "
            "would be random; give a complete checkpoint of a causal language model"
        )
    if wrong := sorted(found["mismatched_keys"]):
        first, stored, wanted = wrong[0]
        raise ModelError(
            f"loading the model {name}: {len(wrong)} tensors have another size than its config.json says (the first is "
            f"{first}: {list(stored)} instead of {list(wanted)}); give weights and a config that belong together"
        )
    unused = sorted(one for one in found["unexpected_keys"] if not _HARMLESS.search(one))
    senses = [one for one in unused if _OTHER_SENSES.search(one)]
    others = [one for one in unused if not _OTHER_SENSES.search(one)]
    if others and not allow_unused:
        raise ModelError(
            f"loading the model {name}: nothing reads {len(others)} tensors of its checkpoint ({_first(others)}), so "
            "it may not be the model that was trained (scales of quantised weights, biases, parts of another class); "
            "give a checkpoint whose config.json says what it holds, or give {allow_unused}",
            allow_unused=True,
        )
    return (*_kinds(others, "not read"), *_kinds(senses, "not read: only text goes through the model"))


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _kinds(names: Iterable[str], why: str) -> list[str]:
    """Names without their layer numbers, counted."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", one) for one in names)
    if len(counts) > 8:
        counts = Counter({f"{'.'.join(one.split('.')[:2])}.*": 0 for one in counts})
        for one in names:
            counts[f"{'.'.join(re.sub(r'[.][0-9]+(?=[.]|$)', '.*', one).split('.')[:2])}.*"] += 1
    return [f"{kind} ({count}; {why})" for kind, count in sorted(counts.items())]


def check_types(name: str, folder: Path, used: set[str]) -> None:
    """`ModelError` if weights are stored as integers and the config says nothing of a quantisation.

    folder  holds the .safetensors files that were read
    used    names of the weights of the model
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                packed = [one for one in tensors.keys() if one in used and _is_packed(tensors, one)]  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # whether a file is whole was seen when it was loaded
        if packed:
            raise ModelError(
                f"loading the model {name}: {len(packed)} weights are stored as integers (the first is {packed[0]}) "
                "and its config.json has no quantization_config that says how to read them; give it as it was before "
                "it was quantised"
            )


def _is_packed(tensors: Any, name: str) -> bool:
    part = tensors.get_slice(name)
    return len(part.get_shape()) >= 2 and part.get_dtype() in _INTEGERS
