"""A folder as fairseq leaves it, `model.pt` beside `dict.txt`: read as data, never run.

The pickle inside is opened by torch's own reader of weights, which makes tensors, plain containers and what is listed
here. Arguments are an `argparse.Namespace`; objects of fairseq's own (meters of the training) become empty records.
Anything else would be code, and refuses the file.
"""

from __future__ import annotations

import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mnemoscope.errors import ModelError, ModelNotSupported
from mnemoscope.model.checkpoint import check_tensors
from mnemoscope.model.fairseq import FairseqConfig, FairseqLM

WEIGHTS, DICTIONARY = "model.pt", "dict.txt"
_METERS = ("AverageMeter", "TimeMeter", "StopwatchMeter")
_OLD = tuple(f"fairseq.meters.{name}" for name in _METERS)  # what files from before zip archives hold
_ACTIVATIONS = {
    "relu": "relu",
    "relu_squared": "relu2",
    "gelu": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "linear",
}
_UNREAD = {  # arguments under which fairseq runs another architecture
    "character_embeddings": "it spells its words with a character network",
    "base_layers": "it has BASE layers, mixtures whose experts are assigned in balance",
    "scale_fc": "it normalises the coefficients together (NormFormer)",
    "scale_attn": "it normalises what attention writes (NormFormer)",
    "scale_heads": "it scales each head (NormFormer)",
    "scale_resids": "it scales its residual (NormFormer)",
}


class Record:
    """An object of a class of fairseq's, as nothing: neither its arguments nor its state are kept."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def is_fairseq(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of fairseq's, and none of transformers'."""
    return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()


def load(
    name: str, folder: Path, dtype: torch.dtype, *, allow_unused: bool
) -> tuple[FairseqLM, tuple[str, ...]]:
    """The model of a folder, in evaluation mode, and what of its checkpoint was left unused.

    `ModelError` in one line when the file is damaged or holds code; `ModelNotSupported` for another architecture.
    """
    state = _opened(name, folder / WEIGHTS)
    weights = _weights(name, state)
    config = _config(name, _arguments(name, state), weights)
    model = FairseqLM(config)
    own = model.state_dict()
    wrong = [
        (key, tuple(weights[key].shape), tuple(own[key].shape))
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    info = {
        "missing_keys": set(own) - set(weights),
        "unexpected_keys": set(weights) - set(own),
        "mismatched_keys": wrong,
    }
    unused = check_tensors(name, info, allow_unused=allow_unused)
    model.load_state_dict({key: weights[key] for key in own})
    model.tie()
    return model.to(dtype).eval(), unused


def _opened(name: str, file: Path) -> Mapping[str, Any]:
    """What a checkpoint holds."""
    doing = f"loading the model {name}"
    try:
        names = (
            torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else _OLD
        )
        listed: list[Any] = [(Record, full) for full in names if full.startswith("fairseq.")]
        with torch.serialization.safe_globals([Namespace, *listed]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        code = _code(file)
        held = (
            f"its {WEIGHTS} holds {code}, which is code and not data"
            if code
            else f"its {WEIGHTS} is no data alone"
        )
        raise ModelError(
            f"{doing}: {held}, and was not run; give a checkpoint as fairseq saves it (tensors, numbers, texts and "
            "argparse.Namespace)"
        ) from error
    except (OSError, ValueError, EOFError, RuntimeError, AttributeError, LookupError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"{doing}: its {WEIGHTS} cannot be read ({reason}); give a whole checkpoint as fairseq saves it"
        ) from error
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        raise ModelError(
            f"{doing}: its {WEIGHTS} holds no weights under 'model'; give a checkpoint as fairseq saves it"
        )
    return state


def _code(file: Path) -> str | None:
    """The first thing that a file would call and that is not data."""
    if not zipfile.is_zipfile(file):
        return None
    with torch.serialization.safe_globals([Namespace]):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return min((full for full in names if not full.startswith("fairseq.")), default=None)


def _arguments(name: str, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the model: of the training (``args``), or of the model in a newer configuration (``cfg``)."""
    held = state.get("args")
    if held is None and isinstance(state.get("cfg"), Mapping):
        held = state["cfg"].get("model")
    arguments = vars(held) if isinstance(held, Namespace) else held
    if not isinstance(arguments, Mapping):
        raise ModelError(
            f"loading the model {name}: its {WEIGHTS} does not say how the model is built (args, or cfg with model); "
            "give a checkpoint as fairseq saves it"
        )
    return arguments


def _weights(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by our modules' names; older layouts are brought up to date, and what is no weight is left out."""
    weights: dict[str, Tensor] = {}
    for key, tensor in state["model"].items():
        if key.endswith((".version", "._float_tensor", "embed_positions.weights")):
            continue
        short = (
            key.removeprefix("decoder.")
            if ".adaptive_softmax." in key or ".output_projection." in key
            else key
        )
        if ".in_proj_" in short:  # keys, queries and values in one, until 2019
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[short.replace("in_proj_", f"{letter}_proj.")] = third
            continue
        weights[short] = tensor
    if (rows := weights.pop("decoder.embed_out", None)) is not None:
        weights["output_projection.weight"] = rows
    version = state["model"].get("decoder.version")
    if version is None or float(version) <= 2:  # no norm after the last layer, whatever is stored
        weights = {key: value for key, value in weights.items() if not key.startswith("decoder.layer_norm.")}
    if "decoder.layers.0.fc1.weight" not in weights:
        raise ModelNotSupported(
            f"loading the model {name}: its {WEIGHTS} is no decoder with feed-forward layers (there is no "
            "decoder.layers.0.fc1.weight); fairseq's transformer_lm is accepted"
        )
    return weights


def _config(name: str, arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> FairseqConfig:
    """The architecture, from arguments where they decide and from weights where these show it."""

    def flag(key: str) -> bool:
        return bool(arguments.get(key))

    architecture = str(arguments.get("arch") or arguments.get("_name") or "transformer_lm")
    reasons = [reason for key, reason in _UNREAD.items() if flag(key)]
    if not architecture.startswith("transformer_lm"):
        reasons.insert(0, f"its architecture is {architecture}")
    ffn, width = weights["decoder.layers.0.fc1.weight"].shape
    sides = ("decoder_input_dim", "decoder_output_dim")
    reasons += [
        f"its {side} is not its width" for side in sides if int(arguments.get(side) or width) != width
    ]
    activation = str(arguments.get("activation_fn") or "relu")
    if activation not in _ACTIVATIONS:
        reasons.append(f"its activation is {activation}")
    if any(".encoder_attn." in key for key in weights):
        reasons.append("it is the decoder of an encoder-decoder")
    if reasons:
        raise ModelNotSupported(
            f"loading the model {name}: {reasons[0]}, which is not supported; fairseq's transformer_lm is accepted"
        )
    softmax = _ends(arguments.get("adaptive_softmax_cutoff"))
    tables = [weights[key] for key in _numbered(weights, "decoder.embed_tokens.embeddings.{}.0.weight")]
    if not tables and "decoder.embed_tokens.weight" not in weights:
        raise ModelError(
            f"loading the model {name}: its {WEIGHTS} has no embedding; give a complete checkpoint"
        )
    size = sum(map(len, tables)) or len(weights["decoder.embed_tokens.weight"])
    tail = [weights[key] for key in _numbered(weights, "adaptive_softmax.tail.{}.2.weight")]
    learned = weights.get("decoder.embed_positions.weight")
    length = int(arguments.get("max_target_positions") or arguments.get("tokens_per_sample") or 1024)
    unplaced = flag("no_token_positional_embeddings")
    tied = "adaptive_softmax.head.word_proj.weight" in weights
    return FairseqConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=len(_numbered(weights, "decoder.layers.{}.fc1.weight")),
        num_attention_heads=int(arguments["decoder_attention_heads"]),
        max_position_embeddings=length,
        activation_function=_ACTIVATIONS[activation],
        embed_scale=1.0 if flag("no_scale_embedding") else width**0.5,
        positions="none" if unplaced else "sinusoidal" if learned is None else "learned",
        normalize_before=flag("decoder_normalize_before"),
        final_norm="decoder.layer_norm.weight" in weights and not flag("no_decoder_final_norm"),
        layernorm_embedding=flag("layernorm_embedding"),
        input_bands=torch.tensor([len(table) for table in tables]).cumsum(0).tolist(),
        input_factor=float(arguments.get("adaptive_input_factor") or 4),
        output_bands=[] if not tail else [*softmax, *([] if softmax[-1] == size else [size])],
        output_widths=[] if not tail else [width, *(rows.shape[1] for rows in tail)],
        tied_words=tied or ("output_projection.weight" not in weights and not tail),
        tied_projections=tied and flag("tie_adaptive_proj"),
        dtype=weights["decoder.layers.0.fc1.weight"].dtype,
        attn_implementation="eager",
    )


def _ends(cutoffs: Any) -> list[int]:
    """Cutoffs as fairseq takes them: numbers with commas between, or a list."""
    if not cutoffs:
        return []
    return [int(end) for end in (cutoffs.split(",") if isinstance(cutoffs, str) else cutoffs)]


def _numbered(weights: Mapping[str, Tensor], name: str) -> list[str]:
    """Names that have 0, 1, 2 ... in the place of {}, as far as there are any."""
    names: list[str] = []
    while (key := name.format(len(names))) in weights:
        names.append(key)
    return names
