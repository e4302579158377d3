"""Neuron records as OpenAI's automated interpretability has them: one JSON file a neuron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemoscope.exchange.sides import SIGNS, NeuronSide, Passage, Sides
from mnemoscope.exchange.written import write_json

RANDOM = 20  # passages drawn at random for each record

README = """
`positive/LAYER/NEURON.json` and `negative/LAYER/NEURON.json`: a `NeuronRecord` each. The negative side is the neuron
with its sign turned: its activations are -m, and its mean and skewness are those of -m. Kurtosis is in excess of the
normal's.

- `most_positive_activation_records`: the triggers, strongest first, at most one of a context; a text begins and ends
  where the run's does, or at a special token, or 64 tokens before and 32 after the trigger.
- `random_sample`: {random} places drawn at random for each record.
- `random_sample_by_quantile`: not known, and null.

A token that is part of a character has the text "", and the one that completes it has the character.

```python
from neuron_explainer.fast_dataclasses import loads  # automated-interpretability
import neuron_explainer.activations.activations  # registers NeuronRecord

record = loads(open("{example}").read())
print(record.neuron_id, record.max_activation)
```
"""


def write(folder: Path, sides: Sides) -> str:
    """Write a record of each side; returns what the README says of them."""
    example = ""
    for side in sides:
        example = f"{SIGNS[side.polarity]}/{side.id.layer}/{side.id.neuron}.json"
        write_json(folder / example, record(side))
    return README.format(random=RANDOM, example=example)


def record(side: NeuronSide) -> dict[str, Any]:
    """A `NeuronRecord` as plain values."""
    std = side.moment("std")
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {
            "dataclass_name": "NeuronId",
            "layer_index": side.id.layer,
            "neuron_index": side.id.neuron,
        },
        "random_sample": [_activations(passage) for passage in side.random],
        "random_sample_by_quantile": None,
        "quantile_boundaries": None,
        "mean": side.moment("mean"),
        "variance": None if std is None else std**2,
        "skewness": side.moment("skewness"),
        "kurtosis": side.moment("kurtosis"),
        "most_positive_activation_records": [_activations(passage) for passage in side.top],
    }


def _activations(passage: Passage) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": list(passage.pieces),
        "activations": list(passage.values),
    }
