"""Units from files: which file holds them, of which layer they are, and what its tensors mean.

    sae:PATH_OR_REPO          SAELens and sparsify folders, Gemma Scope's params.npz and params.safetensors
    transcoder:PATH_OR_REPO   circuit-tracer's, per layer or across layers, and the formats above
    directions:FILE           vectors in one .safetensors file

A folder of such folders holds the units of several layers. Where a file does not say which point it was trained on,
``@LAYER.POINT`` behind the path does. Weights are read as data: no pickle is opened. docs/units.md has the formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mnemoscope import files
from mnemoscope.arguments import either
from mnemoscope.errors import ModelError
from mnemoscope.model.checkpoint import fetched
from mnemoscope.model.unit_formats import (
    Place,
    UnitSource,
    cross_layer,
    directions,
    per_layer,
    saelens,
    scope,
    sparsify,
)
from mnemoscope.model.unit_set import UnitSet
from mnemoscope.model.units import POINTS, LayerUnits
from mnemoscope.records import UNIT_KINDS

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_PLACE = re.compile(r"(.+)@(\d+)\.(\w+)")


def load_units(name: str) -> UnitSet:
    """Read what ``KIND:WHERE`` names, from a local path or, if it is no such path, from a repository of Hugging Face.

    ModelError, one line, for what is not there, is not known or is not whole. Nothing is fetched when offline.
    """
    kind, _, where = name.partition(":")
    if kind not in UNIT_KINDS or not where:
        raise ModelError(
            f"reading units: {name!r} names none; give {either([f'{kind}:PATH' for kind in UNIT_KINDS])} (a folder, a "
            "file, or OWNER/REPOSITORY/FOLDER)"
        )
    at = None
    if place := _PLACE.fullmatch(where):
        where, at = place[1], Place(int(place[2]), place[3])
        if at.point not in POINTS:
            raise ModelError(
                f"reading units ({name}): {at.point!r} is no point; give one of {', '.join(POINTS)}"
            )
    path, revision = files.expanded(where), None
    local = files.kind(path, f"reading units ({name}):", ModelError) != ""
    if not local:
        path, revision = fetched(where, f"reading units ({name})")
    source = UnitSource(name, kind, path, at)
    layers = directions(source) if kind == "directions" else _layers(source)
    return UnitSet(name, kind, layers, str(path.resolve()) if local else None, revision)


def _layers(source: UnitSource) -> dict[int, LayerUnits]:
    path = source.path
    if path.is_dir() and (readers := _across(path)):
        return readers(source)
    below = sorted(each for each in path.rglob("*") if _reader(each) and not _reader(each.parent))
    folders = [path] if _reader(path) else below
    if not folders:
        held = sorted(each.name for each in (path.rglob("*") if path.is_dir() else [path]))
        if pickles := [each for each in held if each.endswith(_PICKLES)]:
            raise source.error(
                f"{pickles[0]} is a pickle, which could run code and is not read; give it as .safetensors or .npz"
            )
        raise source.error(
            "there are no weights that are known; give a folder with cfg.json and sae_weights.safetensors (SAELens) or "
            "sae.safetensors (sparsify), params.npz or params.safetensors (Gemma Scope), or config.yaml and "
            "layer_0.safetensors or W_enc_0.safetensors (circuit-tracer)"
        )
    layers: dict[int, LayerUnits] = {}
    for folder in folders:
        reader = _reader(folder)
        assert reader is not None, "what has no reader was left out"
        layer, units = reader(source._replace(path=folder))
        if layer in layers:
            raise source.error(
                f"it holds more than one set of units for layer {layer} ({folder.relative_to(path)} is the second), "
                "and a run has one; give the folder of one of them"
            )
        layers[layer] = units
    return layers


def _reader(path: Path) -> Callable[[UnitSource], tuple[int, LayerUnits]] | None:
    """How a folder or a file is read; None if it holds no units."""
    if path.is_dir():
        known = {"sae_weights.safetensors": saelens, "sae.safetensors": sparsify}
        known |= {"params.safetensors": scope, "params.npz": scope}
        return next((reader for name, reader in known.items() if (path / name).is_file()), None)
    known = {"params.npz": scope, "params.safetensors": scope}
    return known.get(path.name) or (scope if path.suffix == ".npz" else None)


def _across(path: Path) -> Callable[[UnitSource], dict[int, LayerUnits]] | None:
    """How a folder of circuit-tracer's is read, across layers or layer by layer; None if it is none."""
    if any(path.glob("W_enc_*.safetensors")):
        return cross_layer
    return per_layer if any(path.glob("layer_*.safetensors")) else None
