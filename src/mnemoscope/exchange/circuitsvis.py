"""Arguments of CircuitsVis' pictures: texts with a number at each token."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mnemoscope.exchange.sides import SIGNS, NeuronSide, Sides
from mnemoscope.exchange.written import write_json

README = """
`positive/LAYER.json` and `negative/LAYER.json`: the arguments of `circuitsvis.topk_samples.topk_samples` for a layer:
`tokens` and `activations` by layer (one), neuron, text and token, with the labels of both dimensions. Texts are those
around triggers, strongest first. The negative side is the neuron with its sign turned: its activations are -m.

```python
import json
from circuitsvis.tokens import colored_tokens
from circuitsvis.topk_samples import topk_samples

arguments = json.load(open("{example}"))
topk_samples(**arguments)  # in a notebook
colored_tokens(arguments["tokens"][0][0][0], arguments["activations"][0][0][0])  # the strongest text alone
```
"""


def write(folder: Path, sides: Sides) -> str:
    """Write a file of each layer and sign; returns what the README says of them."""
    files: dict[str, list[NeuronSide]] = defaultdict(list)
    for side in sides:
        files[f"{SIGNS[side.polarity]}/{side.id.layer}.json"].append(side)
    for name, inside in files.items():
        write_json(folder / name, arguments(inside))
    return README.format(example=next(iter(files), ""))


def arguments(sides: list[NeuronSide]) -> dict[str, Any]:
    """The arguments of `topk_samples` for sides of one layer and sign."""
    return {
        "tokens": [[[list(passage.pieces) for passage in side.top] for side in sides]],
        "activations": [[[list(passage.values) for passage in side.top] for side in sides]],
        "zeroth_dimension_name": "Layer",
        "first_dimension_name": "Neuron",
        "zeroth_dimension_labels": [str(sides[0].id.layer)],
        "first_dimension_labels": [str(side.id.neuron) for side in sides],
    }
