"""What of a checkpoint was not used: tensors that the model has no place for, or another shape, or another type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from mnemoscope.errors import ModelError

# What transformers itself ignores for some classes, or computes: buffers that old checkpoints carry, causal masks of
# GPT-2, GPT-Neo(X) and CodeGen, heads that predict several tokens ahead, and those of encoders that say whether one
# sentence follows another.
_HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.(original_)?inv_freq$"
    r"|(^|\.)(attn|attention|self_attn|crossattention)\.(masked_)?bias$"
    r"|(^|\.)(position_ids|mtp\..*|mtp_.*)$"
    r"|(^|\.)(pooler|seq_relationship|sop_classifier)\."
)
# Towers for images and sound, which text alone does not go through.
_OTHER_SENSES = re.compile(
    r"(^|\.)(vision|visual|image|audio|speech|video|multi_modal|mm_|img_|embed_vision|embed_audio)[a-z_0-9]*\."
)
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}


def check_tensors(name: str, info: Mapping[str, Any], *, allow_unused: bool) -> tuple[str, ...]:
    """What was left unused, a line for each kind; `ModelError` for what may make it another model.

    info  the loading info of transformers: missing, unexpected and mismatched keys
    """
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"loading the model {name}: its weights lack {len(missing)} tensors (the first is {missing[0]}), which "
            "would be random; give a complete checkpoint of a language model"
        )
    if wrong := sorted(info["mismatched_keys"]):
        first, stored, wanted = wrong[0]
        raise ModelError(
            f"loading the model {name}: {len(wrong)} tensors have another size than its config.json says (the first is "
            f"{first}: {list(stored)} instead of {list(wanted)}); give weights and a config that belong together"
        )
    unused = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.search(key))
    senses = [key for key in unused if _OTHER_SENSES.search(key)]
    others = [key for key in unused if not _OTHER_SENSES.search(key)]
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
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    if len(counts) > 8:
        counts = Counter({f"{'.'.join(kind.split('.')[:2])}.*": 0 for kind in counts})
        for name in names:
            counts[f"{'.'.join(re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name).split('.')[:2])}.*"] += 1
    return [f"{kind} ({count}; {why})" for kind, count in sorted(counts.items())]


def check_types(name: str, folder: Path, used: set[str]) -> None:
    """`ModelError` if weights are stored as integers and the config says nothing of a quantisation.

    folder  holds the .safetensors files that were read
    used    names of the weights of the model
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                packed = [key for key in tensors.keys() if key in used and _is_packed(tensors, key)]  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # whether a file is whole was seen when it was loaded
        if packed:
            raise ModelError(
                f"loading the model {name}: {len(packed)} weights are stored as integers (the first is {packed[0]}) "
                "and its config.json has no quantization_config that says how to read them; give it as it was before "
                "it was quantised"
            )


def _is_packed(tensors: Any, name: str) -> bool:
    weight = tensors.get_slice(name)
    return len(weight.get_shape()) >= 2 and weight.get_dtype() in _INTEGERS


# -- Whether a Hugging Face model can be had: one look at the cache and one at the network, both short ---------

SECONDS = 5.0  # to wait for an answer
_ELSE = "or give a local folder, a .gguf file or sample:smollm2-135m"


def only_cached(name: str, revision: str | None, what: str = "model", file: str = "config.json") -> bool:
    """Whether a model, or `what` else a repository holds, has to come from the cache: the network does not answer.

    `ModelError` when it can be had from neither, saying what was seen. Without this look, loading would ask again
    and again for half a minute.
    """
    doing = f"loading the {what} {name}"
    try:
        cached = isinstance(hub.try_to_load_from_cache(name, file, revision=revision), str)
        url = hub.hf_hub_url(name, file, revision=revision)
        hub.get_hf_file_metadata(url, token=hub.get_token(), timeout=SECONDS)
    except HFValidationError:
        raise ModelError(
            f"{doing}: there is no such folder or file, and it is no Hugging Face id (OWNER/NAME); {_ELSE[3:]}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{doing}: its owner gives it out on request only; ask on {constants.ENDPOINT}/{name} and log in with "
            f"`hf auth login`, {_ELSE}"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{doing}: it has no revision {revision!r}; give a branch, tag or commit of it"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{doing}: there is no such folder, and {constants.ENDPOINT} knows no such {what} (or shows it to you only "
            f"when you are logged in); check the id, {_ELSE}"
        ) from None
    except EntryNotFoundError:
        raise ModelError(
            f"{doing}: it has no {file}, so it is no {what} of transformers (an adapter, or files of another format); "
            f"give another id, {_ELSE}"
        ) from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        if cached:
            return True
        raise ModelError(_unreachable(doing, error)) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        if cached:
            return True
        raise ModelError(_unreachable(doing, error)) from error
    return False


_UNITS = ("cfg.json", "sae*.safetensors", "config.yaml", "layer_*.safetensors", "W_???_*.safetensors")


def fetched(where: str, doing: str) -> tuple[Path, str]:
    """The local copy of OWNER/REPOSITORY or of a folder or file in it, and its commit; fetched if that can be.

    `ModelError` when it can be had from neither the cache nor the network; ``doing`` begins its line.
    """
    owner, _, rest = where.partition("/")
    name, _, inside = rest.partition("/")
    else_ = "give a local folder or file, or OWNER/REPOSITORY/FOLDER of one that is there"
    try:
        patterns = [inside, f"{inside}/*"] if inside else list(_UNITS)
        root = Path(hub.snapshot_download(f"{owner}/{name}", allow_patterns=patterns, etag_timeout=SECONDS))
    except HFValidationError:
        raise ModelError(
            f"{doing}: there is no such folder or file, and it is no repository; {else_}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{doing}: its owner gives it out on request only; ask on {constants.ENDPOINT}/{owner}/{name} and log in "
            f"with `hf auth login`, or {else_}"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reason
        raise ModelError(
            f"{doing}: there is no such folder or file, and as a repository it is neither in the local cache nor "
            f"reachable ({reason}); {else_}"
        ) from error
    path = root / inside
    if not path.exists():
        raise ModelError(f"{doing}: {owner}/{name} has no {inside}, or it is not in the local cache; {else_}")
    return path, root.name


def _unreachable(doing: str, error: Exception) -> str:
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = (
        "HF_HUB_OFFLINE is set" if offline else (str(error).strip().splitlines() or [type(error).__name__])[0]
    )
    return (
        f"{doing}: there is no such folder, and as a Hugging Face model it is neither in the local cache nor reachable "
        f"({reason.rstrip('.')}); check the id and the network, {_ELSE}"
    )
