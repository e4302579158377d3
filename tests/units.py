"""Folders of units as other tools write them, and units whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def mirrored(width: int, seed: int = 0) -> dict[str, Tensor]:
    """A ReLU autoencoder that rebuilds everything: an orthonormal basis, and its mirror image."""
    basis = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0])
    rows = torch.cat([basis, -basis]).float()
    return {
        "W_enc": rows.T.contiguous(),
        "W_dec": rows,
        "b_enc": torch.zeros(2 * width),
        "b_dec": torch.zeros(width),
    }


def saelens(
    folder: Path, tensors: dict[str, Tensor], hook: str, architecture: str = "standard", **config: Any
) -> Path:
    """A folder as SAELens 6 writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    out = config.pop("hook_name_out", None)
    metadata = {"hook_name": hook, "model_name": "tiny", "sae_lens_version": "6.54.12"}
    metadata |= {} if out is None else {"hook_name_out": out}
    about = {"architecture": architecture, "d_in": len(tensors["W_enc"]), "dtype": "float32", "device": "cpu"}
    about |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": metadata} | config
    (folder / "cfg.json").write_text(json.dumps(about), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors"
    )
    return folder


def random_units(width: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a standard autoencoder, by SAELens' names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (width, count), "W_dec": (count, width), "b_enc": (count,), "b_dec": (width,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tracer(folder: Path, layers: int, width: int, count: int, *, across: bool, **config: Any) -> Path:
    """A folder of transcoders as circuit-tracer writes it, per layer or across layers."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_name": "tiny", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    about |= {"model_kind": "cross_layer_transcoder" if across else "transcoder_set", "scan": "tiny"} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
    for layer in range(layers):
        tensors = random_units(width, count, seed=layer)
        rows = {
            "W_enc": tensors["W_enc"].T.contiguous() / width,
            "b_enc": tensors["b_enc"],
            "b_dec": tensors["b_dec"],
        }
        if across:
            named = {f"{name}_{layer}": tensor for name, tensor in rows.items()}
            save_file(named, folder / f"W_enc_{layer}.safetensors")
            values = torch.randn(
                (count, layers - layer, width), generator=torch.Generator().manual_seed(100 + layer)
            )
            save_file({f"W_dec_{layer}": values / count}, folder / f"W_dec_{layer}.safetensors")
        else:
            save_file(rows | {"W_dec": tensors["W_dec"] / count}, folder / f"layer_{layer}.safetensors")
    return folder
