"""The units of a model, of one kind: which they are, and their place in a model that can have them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.parts import Anatomy, Factor, Layer
from mnemoscope.model.units import ORDER, POINTS, WRITABLE, LayerUnits
from mnemoscope.records import UNIT_POINTS, UnitsEntry


@dataclass(frozen=True, eq=False)
class UnitSet:
    """The units of a model: one kind, in some of its layers.

    id    as it was given; `kind` one of `UNIT_KINDS`
    path  of a local file or folder, absolute; `revision` the commit of a repository
    """

    id: str
    kind: str
    layers: Mapping[int, LayerUnits]
    path: str | None = None
    revision: str | None = None

    @property
    def writes(self) -> str:
        """The point that all of them write; they are of one kind."""
        return next(iter(self.layers.values())).writes

    @cached_property
    def sha256(self) -> str:
        """Hash of all weights and of where they belong, whatever the files that held them."""
        digest = hashlib.sha256()
        for layer, units in sorted(self.layers.items()):
            facts = (layer, units.reads, units.writes, units.norm, units.undone, units.act.name, units.act.k)
            digest.update(f"{facts}\n".encode())
            writes = {f"values-{write.layer}": write.values for write in units.write}
            tensors = vars(units) | writes | {"threshold": units.act.threshold}
            for name, tensor in sorted(tensors.items()):
                if isinstance(tensor, Tensor):
                    digest.update(f"{name} {list(tensor.shape)}\n".encode())
                    digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def entry(self) -> UnitsEntry:
        """The entry of these units in a manifest."""
        names = {str(layer): list(units.names) for layer, units in self.layers.items() if units.names}
        return UnitsEntry(
            id=self.id,
            kind=self.kind,
            path=self.path,
            revision=self.revision,
            sha256=self.sha256,
            names=names,
        )


def attached(anatomy: Anatomy, units: Mapping[int, LayerUnits], what: str) -> Anatomy:
    """A model whose layers have these units instead of their neurons; ModelNotSupported where they cannot have them."""
    doing = f"reading {what}"
    if anatomy.stacks:
        raise ModelNotSupported(
            f"{doing}: the model is an encoder-decoder, of which units are not read yet; give units of a decoder or an "
            "encoder"
        )
    if wrong := [layer for layer in units if layer >= anatomy.n_layers]:
        raise ModelNotSupported(
            f"{doing}: it has units of layer {wrong[0]}, and the model has layers 0 to {anatomy.n_layers - 1}; give "
            "units that were trained on this model"
        )
    points = sorted({f"{held.reads} to {held.writes}" for held in units.values()})
    if len(points) > 1:
        raise ModelNotSupported(
            f"{doing}: it holds units of two kinds ({points[0]} and {points[1]}), and a run holds one; give the "
            "folder of one of them"
        )
    for layer, held in units.items():
        _check(anatomy, layer, held, doing)
    layers, device = list(anatomy.layers), anatomy.unembedding().device
    for layer, held in units.items():
        factors = [_factor(layers[write.layer], held.writes) for write in held.write]
        writes = tuple(
            replace(write, factor=factor) for write, factor in zip(held.write, factors, strict=True)
        )
        layers[layer] = replace(layers[layer], units=replace(held, write=writes).to(device))
    sizes = tuple(len(units[layer].keys) if layer in units else 0 for layer in range(anatomy.n_layers))
    names = dict.fromkeys(held.act.name for held in units.values())
    return replace(anatomy, layers=tuple(layers), sizes=sizes, gated=False, activation=" and ".join(names))


def _factor(layer: Layer, point: str) -> Factor:
    factors = {"attention_output": layer.attention_multiplier, "ffn_output": layer.ffn_multiplier}
    return factors.get(point, 1.0)


def _check(anatomy: Anatomy, layer: int, units: LayerUnits, doing: str) -> None:
    widths = {units.keys.shape[1], len(units.bias), *(write.values.shape[1] for write in units.write)}
    if widths != {anatomy.width}:
        raise ModelNotSupported(
            f"{doing}: its vectors are {' and '.join(map(str, sorted(widths)))} wide, and the residual stream of the "
            f"model is {anatomy.width}; give units that were trained on this model"
        )
    if not all(block.arrives.whole for block in anatomy.layers):
        raise ModelNotSupported(
            f"{doing}: a {anatomy.family!r} model scales its whole residual stream, which units are not read in as "
            "yet; give units of another model"
        )
    if units.writes not in WRITABLE or ORDER.index(units.reads) > ORDER.index(units.writes):
        raise ModelNotSupported(
            f"{doing}: it reads {units.reads} and writes {units.writes}, where nothing that is read there can arrive; "
            f"give units that write one of {', '.join(WRITABLE)}, no earlier than they read"
        )
    for point, written in ((units.reads, (layer,)), (units.writes, [write.layer for write in units.write])):
        for place in written:
            if reason := _missing(anatomy, anatomy.layers[place], point):
                raise ModelNotSupported(
                    f"{doing}: it needs {UNIT_POINTS[point].format(place)}, and {reason}; give units of another "
                    f"point ({', '.join(POINTS)})"
                )


def _missing(anatomy: Anatomy, layer: Layer, point: str) -> str:
    """Why a layer has no such point; empty if it has."""
    if point in ("residual_mid", "ffn_norm"):
        if anatomy.parallel:
            return "attention and FFN of the model run in parallel"
        if layer.ffn_norm is None or layer.ffn_norm.module is None:
            return "no norm stands before the FFN of that layer"
    if point == "attention_output" and (layer.attention_out is None or layer.mixer is not None):
        return "that layer has no attention, or something beside it"
    if point.startswith("ffn") and not layer.groups:
        return "that layer has no FFN"
    if point == "ffn_output" and layer.experts is not None:
        return "a mixture of experts writes there"
    return ""
