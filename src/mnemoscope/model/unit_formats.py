"""Formats of units: where each says which point it belongs to, and what its tensors mean (docs/units.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnemoscope.errors import ModelError
from mnemoscope.model.units import POINTS, WRITABLE, Activation, LayerUnits, Write

# TransformerLens' names of points, then those of modules of transformers.
_HOOKS = {
    r"blocks\.(\d+)\.hook_resid_pre": "residual_in",
    r"blocks\.(\d+)\.(?:hook_resid_mid|hook_mlp_in)": "residual_mid",
    r"blocks\.(\d+)\.hook_resid_post": "residual_out",
    r"blocks\.(\d+)\.hook_attn_out": "attention_output",
    r"blocks\.(\d+)\.mlp\.hook_in": "ffn_input",
    r"blocks\.(\d+)\.ln2\.hook_normalized": "ffn_norm",
    r"blocks\.(\d+)\.(?:hook_mlp_out|mlp\.hook_out)": "ffn_output",
    r"(?:model\.)?layers[._](\d+)(?:\.output)?": "residual_out",
    r"(?:model\.)?layers[._](\d+)[._]mlp(?:\.output)?": "ffn_output",
    r"(?:model\.)?layers\.(\d+)\.post_feedforward_layernorm\.output": "ffn_output",
    r"(?:model\.)?layers\.(\d+)\.pre_feedforward_layernorm\.output": "ffn_input",
}
_SCOPES = {"res": "residual_out", "resid_post": "residual_out", "mlp": "ffn_output", "mlp_out": "ffn_output"}

Tensors = Mapping[str, Tensor]
_Act = Callable[[int, Tensor | None], Activation]  # of so many units, with their thresholds if they have any


class Place(NamedTuple):
    """A point of a layer."""

    layer: int
    point: str


class UnitSource(NamedTuple):
    """What was asked for, where its files are, and the point that the question itself names."""

    name: str
    kind: str
    path: Path
    at: Place | None = None

    def error(self, reason: str) -> ModelError:
        return ModelError(f"reading units ({self.name}): {reason}")


# -- One set of tensors, whatever its file ---------------------------------------------------------------------


def _place(source: UnitSource, hook: str | None) -> Place:
    """The point that a hook's name stands for, or the one that was asked for."""
    if source.at is not None and source.kind == "sae":
        return source.at
    for pattern, point in _HOOKS.items():
        if match := re.fullmatch(pattern, hook or ""):
            return Place(int(match[1]), point)
    said = (
        f"it was trained on {hook}, which is not read" if hook else "it does not say what it was trained on"
    )
    raise source.error(
        f"{said}; if it belongs to one of {', '.join(POINTS)}, say so behind the path, as in @13.residual_out"
    )


def _units(source: UnitSource, place: Place, tensors: Tensors, act: Activation, **more: Any) -> LayerUnits:
    """Units of tensors by SAELens' names, keys a row for each."""
    reads, writes = place.point, more.pop("writes", place.point)
    keys, values = tensors["W_enc"], tensors["W_dec"]
    bias = tensors.get("b_dec", torch.zeros(values.shape[-1]))
    if keys.shape[0] != values.shape[0] or len(tensors["b_enc"]) != len(keys):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise source.error(f"its tensors do not fit each other ({shapes}); give a whole file")
    return LayerUnits(
        reads, writes, keys.contiguous(), tensors["b_enc"], act, (Write(place.layer, values),), bias, **more
    )


def _relu(count: int) -> Tensor:
    return torch.zeros(count)


# -- SAELens ----------------------------------------------------------------------------------------------------


def saelens(source: UnitSource) -> tuple[int, LayerUnits]:
    config = _modern(_json(source, source.path / "cfg.json"))
    tensors = dict(_tensors(source, source.path / "sae_weights.safetensors"))
    name, about = str(config.get("architecture", "standard")), config.get("metadata") or {}
    transcoder = name.endswith("transcoder")
    norm = config.get("normalize_activations") or "none"
    if norm == "expected_average_only_in":  # its factor is in no file: SAELens folds it in when it saves
        norm = "none"
    if norm not in ("none", "layer_norm", "constant_norm_rescale"):
        raise source.error(
            f"its activations are normalised by {norm}, which is not read; fold it in and save again"
        )
    if config.get("reshape_activations", "none") != "none":
        raise source.error("it reads attention heads before they are mixed (hook_z), which is not read")
    place = _place(source, about.get("hook_name") or config.get("hook_name"))
    writes = place.point
    if transcoder:
        out = _place(source, about.get("hook_name_out") or config.get("hook_name_out"))
        if out.layer != place.layer:
            raise source.error(
                f"it reads layer {place.layer} and writes layer {out.layer}; a layer's own are read"
            )
        writes = out.point
    tensors["W_enc"] = _taken(source, tensors, "W_enc").T
    if "scaling_factor" in tensors:  # of coefficients, before 6.0: found by fine-tuning, and 1 without
        tensors["W_dec"] = _taken(source, tensors, "W_dec") * tensors["scaling_factor"][:, None]
    act = _saelens_activation(source, config, name.removesuffix("_transcoder").removesuffix("_skip"), tensors)
    subtracted = bool(config.get("apply_b_dec_to_input", True)) and not transcoder
    units = _units(
        source, place, tensors, act, writes=writes, norm=norm, undone=not transcoder,
        centre=tensors["b_dec"] if subtracted else None,
        skip=tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None,
    )  # fmt: skip
    return place.layer, units


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before SAELens 6.0 under the names since."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    options = config.get("activation_fn_kwargs") or {}
    if config.get("activation_fn") == "topk" and options.get("k") is not None:
        config |= {"architecture": "topk", "k": options["k"]}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = (
            "expected_average_only_in" if config["normalize_activations"] else "none"
        )
    return config


def _saelens_activation(
    source: UnitSource, config: Mapping[str, Any], name: str, tensors: dict[str, Tensor]
) -> Activation:
    """The activation function of an architecture; tensors that it folds away are changed."""
    count = len(tensors["W_enc"])
    if name in ("standard", "transcoder", "skip"):
        return Activation("relu", _relu(count))
    if name == "gated":
        # One set of keys with two biases: what the gate asks is that the magnitude exceeds a threshold.
        scale, magnitude = tensors["r_mag"].exp(), tensors["b_mag"]
        threshold = magnitude - tensors["b_gate"] * scale
        tensors |= {"W_enc": tensors["W_enc"] * scale[:, None], "b_enc": magnitude}
        return Activation("gated", threshold.clamp_min(0))
    if name not in ("topk", "abstopk") and (held := {"threshold", "topk_threshold"} & tensors.keys()):
        threshold = tensors[min(held)]
        known = "batchtopk" if "batchtopk" in name else "jumprelu"
        return Activation(known, threshold.expand(count).clamp_min(0).contiguous())
    if name in ("topk", "abstopk"):
        if config.get("rescale_acts_by_decoder_norm"):
            lengths = tensors["W_dec"].norm(dim=-1)
            tensors |= {
                "W_enc": tensors["W_enc"] * lengths[:, None],
                "b_enc": tensors["b_enc"] * lengths,
                "W_dec": tensors["W_dec"] / lengths[:, None],
            }
        signed = name == "abstopk"
        return Activation(name, None if signed else _relu(count), int(config["k"]), signed)
    reason = "is not read"
    if "topk" in name:
        reason = "has no threshold, and without one units of a batch compete with each other"
    raise source.error(
        f"its architecture {name!r} {reason}; accepted are standard, gated, jumprelu, topk, abstopk, batchtopk (with "
        "its threshold) and transcoders of these"
    )


# -- Others -----------------------------------------------------------------------------------------------------


def sparsify(source: UnitSource) -> tuple[int, LayerUnits]:
    """EleutherAI's sparsify: TopK, in a folder that is called after its hook."""
    config = _json(source, source.path / "cfg.json")
    stored = _tensors(source, source.path / "sae.safetensors")
    keys = _taken(source, stored, "encoder.weight", "W_enc")
    count = len(keys)
    tensors = {
        "W_enc": keys,
        "b_enc": stored.get("encoder.bias", stored.get("b_enc", torch.zeros(count))),
        "W_dec": _taken(source, stored, "W_dec", "decoder.weight"),
        "b_dec": stored.get("b_dec", stored.get("decoder.bias", torch.zeros(keys.shape[1]))),
    }
    if tensors["W_dec"].shape != keys.shape:
        tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    place, transcoder = _place(source, source.path.name), bool(config.get("transcode"))
    signed = bool(config.get("signed"))
    act = Activation(
        "abstopk" if signed else "topk", None if signed else _relu(count), int(config["k"]), signed
    )
    skip = stored["W_skip"].T.contiguous() if "W_skip" in stored else None
    reads = Place(place.layer, "ffn_input" if transcoder else place.point)
    centre = None if transcoder else tensors["b_dec"]
    return place.layer, _units(source, reads, tensors, act, writes=place.point, centre=centre, skip=skip)


def scope(source: UnitSource) -> tuple[int, LayerUnits]:
    """Gemma Scope, 1 (params.npz) and 2 (params.safetensors): JumpReLU, with the layer in the folder's name."""
    path = source.path
    file = path if path.is_file() else next(path.glob("params.*"))
    stored = {
        name.lower(): tensor
        for name, tensor in (
            _arrays(source, file) if file.suffix == ".npz" else _tensors(source, file)
        ).items()
    }
    tensors = {
        new: _taken(source, stored, old)
        for new, old in (("W_enc", "w_enc"), ("W_dec", "w_dec"), ("b_enc", "b_enc"), ("b_dec", "b_dec"))
    }
    tensors["W_enc"] = tensors["W_enc"].T
    place, writes = _scoped(source, file)
    act = Activation("jumprelu", _taken(source, stored, "threshold").clamp_min(0))
    skip = stored.get("affine_skip_connection")
    return place.layer, _units(source, place, tensors, act, writes=writes, skip=skip)


def _scoped(source: UnitSource, file: Path) -> tuple[Place, str]:
    """Where units of Gemma Scope read and write, by config.json or by the names of folders."""
    beside = file.with_name("config.json")
    config = _json(source, beside) if beside.is_file() else {}
    transcoder = source.kind == "transcoder"
    if (hook := config.get("hf_hook_point_in")) and source.at is None:
        place = _place(source, hook)
        return place, _place(source, config.get("hf_hook_point_out")).point if transcoder else place.point
    at, names = source.at, "/".join([source.name, *file.parts])
    if at is None:
        layer = re.search(r"layer_(\d+)", names)
        site = re.search(r"gemma-scope-[\w.]+?-(?:pt|it)-(res|mlp)\b", names) or re.search(
            r"/(resid_post|mlp_out)/", names
        )
        if layer and transcoder:
            at = Place(int(layer[1]), "ffn_norm")
        elif layer and site:
            at = Place(int(layer[1]), _SCOPES[site[1]])
    if at is None:
        at = _place(source, None)
    return at, "ffn_output" if transcoder else at.point


def _tracer(source: UnitSource, pattern: str) -> Iterator[tuple[int, Path, str, str, _Act]]:
    """Layers, files, points and activation of a folder of circuit-tracer's."""
    config = _yaml(source, source.path / "config.yaml")
    k = config.get("k")
    hooks = [config.get("feature_input_hook"), config.get("feature_output_hook")]
    numbers = {int(re.findall(r"\d+", file.stem)[-1]): file for file in source.path.glob(pattern)}

    def activation(count: int, threshold: Tensor | None) -> Activation:
        if k is not None or config.get("activation") == "topk":
            return Activation("topk", None, int(k or 0))  # its TopK keeps what is negative
        if threshold is not None:
            return Activation("jumprelu", threshold.expand(count).contiguous())
        return Activation("relu", _relu(count))

    for layer, file in sorted(numbers.items()):
        reads, writes = (
            source.at.point
            if source.at and not index
            else _place(source, hook and f"blocks.{layer}.{hook}").point
            for index, hook in enumerate(hooks)
        )
        yield layer, file, reads, writes, activation


def per_layer(source: UnitSource) -> dict[int, LayerUnits]:
    """circuit-tracer's transcoders: encoder and decoder have a row for each unit."""
    layers = {}
    for layer, file, reads, writes, activation in _tracer(source, "layer_*.safetensors"):
        tensors = _tensors(source, file)
        keys = _taken(source, tensors, "W_enc")
        act = activation(len(keys), tensors.get("activation_function.threshold", tensors.get("threshold")))
        skip = tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None
        layers[layer] = _units(source, Place(layer, reads), tensors, act, writes=writes, skip=skip)
    return layers


def cross_layer(source: UnitSource) -> dict[int, LayerUnits]:
    """circuit-tracer's cross-layer transcoders: units of a layer write in it and in all above."""
    layers = {}
    for layer, file, reads, writes, activation in _tracer(source, "W_enc_*.safetensors"):
        read = _tensors(source, file)
        written = _tensors(source, source.path / f"W_dec_{layer}.safetensors")
        values = _taken(source, written, f"W_dec_{layer}")
        names = {"W_enc": f"W_enc_{layer}", "b_enc": f"b_enc_{layer}", "b_dec": f"b_dec_{layer}"}
        tensors = {new: _taken(source, read, old) for new, old in names.items()} | {"W_dec": values[:, 0]}
        act = activation(len(values), read.get(f"threshold_{layer}"))
        units = _units(
            source, Place(layer, reads), tensors, act, writes=writes, skip=read.get(f"W_skip_{layer}")
        )
        writes_to = tuple(
            Write(layer + step, values[:, step].contiguous()) for step in range(values.shape[1])
        )
        layers[layer] = replace(units, write=writes_to)
    return layers


def directions(source: UnitSource) -> dict[int, LayerUnits]:
    """``LAYER.POINT.keys`` [unit, width] in one file, beside it ``.values``, ``.key_bias`` and ``.threshold``, and in
    the metadata of the file ``LAYER.POINT.names``, a JSON list: a coefficient is the product with a key."""
    if source.path.is_dir() or source.path.suffix != ".safetensors":
        raise source.error("directions are read from one .safetensors file; give its path")
    tensors, layers = _tensors(source, source.path), {}
    with _reading(source, source.path), safe_open(source.path, framework="pt") as file:
        metadata = file.metadata() or {}
    for name, keys in tensors.items():
        match = re.fullmatch(r"(\d+)\.(\w+)\.(\w+)", name)
        if (
            match is None
            or match[2] not in WRITABLE
            or match[3] not in ("keys", "values", "key_bias", "threshold")
        ):
            raise source.error(
                f"the tensor {name!r} is not known; call them LAYER.POINT.keys (and .values, .key_bias, .threshold), "
                f"where POINT is one of {', '.join(WRITABLE)}"
            )
        if match[3] != "keys":
            continue
        layer, about = int(match[1]), f"{match[1]}.{match[2]}"
        if layer in layers:
            raise source.error(
                f"it holds directions of two points of layer {layer}; give one of them in a file"
            )
        threshold = tensors.get(f"{about}.threshold")
        act = Activation("identity" if threshold is None else "jumprelu", threshold)
        parts = {
            "W_enc": keys,
            "W_dec": tensors.get(f"{about}.values", keys),
            "b_enc": tensors.get(f"{about}.key_bias", torch.zeros(len(keys))),
        }
        names = tuple(json.loads(metadata.get(f"{about}.names", "[]")))
        layers[layer] = _units(source, Place(layer, match[2]), parts, act, names=names)
    if not layers:
        raise source.error("it holds no tensor called LAYER.POINT.keys; give a file with one")
    return layers


# -- Files ------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(source: UnitSource, file: Path) -> Iterator[None]:
    """Turn what cannot be read into one line."""
    try:
        yield
    except FileNotFoundError:
        raise source.error(f"there is no {file.name} where it belongs; give a whole folder") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise source.error(f"{file.name} cannot be read ({reason}); give a whole file") from error


def _tensors(source: UnitSource, file: Path) -> dict[str, Tensor]:
    with _reading(source, file), safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118


def _arrays(source: UnitSource, file: Path) -> dict[str, Tensor]:
    with _reading(source, file), np.load(file, allow_pickle=False) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name], np.float32)) for name in stored.files}


def _json(source: UnitSource, file: Path) -> dict[str, Any]:
    with _reading(source, file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _yaml(source: UnitSource, file: Path) -> dict[str, Any]:
    import yaml

    with _reading(source, file):
        try:
            return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _taken(source: UnitSource, tensors: Tensors, *names: str) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise source.error(
        f"it has no tensor {names[0]!r} (it has {', '.join(sorted(tensors))}); give a whole file"
    )
