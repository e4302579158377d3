"""How many parameters each part of the model has (A2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
from torch import nn

from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.studies.measures.positions import Sizes

PARTS = ("attention", "ffn", "other")


def measure(
    run: Run, model: Model, sizes: Sizes, folder: Path, report: Callable[[Progress], None]
) -> Mapping[str, list[pa.Table]]:
    """The table `parameters`: attention, feed-forward and other parameters of every layer, and what is in none."""
    seen: set[int] = set()
    rows = []
    for index, layer in enumerate(model.anatomy.layers):
        counts = [_count(modules, seen) for modules in _modules(layer)]
        rows += [
            {"layer": index, "part": part, "parameters": count}
            for part, count in zip(PARTS, counts, strict=True)
        ]
    # Shared weights (a tied unembedding) are counted where they are first.
    outside = [
        ("embedding", _count([model.anatomy.embedding], seen)),
        ("unembedding", _count([model.anatomy.head], seen)),
        ("other", _count([model.hf], seen)),
    ]
    rows = [{"layer": -1, "part": part, "parameters": count} for part, count in outside] + rows
    return {"parameters": [pa.Table.from_pylist(rows, schema=SCHEMAS["parameters"])]}


def _modules(layer: Layer) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Modules of attention, of the feed-forward layer, and the block, in the order of PARTS."""
    first = [layer.gate.module, *([layer.up.module] if layer.up is not None else [])]
    return [layer.attention], [*first, layer.down], [layer.module]


def _count(modules: list[nn.Module], seen: set[int]) -> int:
    """Parameters of the modules that were not counted yet."""
    fresh = {id(one): one for module in modules for one in module.parameters() if id(one) not in seen}
    seen.update(fresh)
    return sum(one.numel() for one in fresh.values())
