"""Delphi's cache of latents: where each neuron is above 0, and how far, over rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mnemoscope.exchange.sides import SIGNS
from mnemoscope.exchange.written import hook, write_json
from mnemoscope.records import Manifest

ROW = 256  # tokens of a row; delphi's examples are of a length that divides it

README = """
`latents/HOOK` and `latents/HOOK-negative`: the coefficients of the neurons of a layer that are above 0, and those of
the same with their signs turned (-m), each as a module of delphi's cache: `locations` (row, position, neuron),
`activations` and `tokens`. Positions that the run does not count (the first of a context, special tokens) have none.

The rows, {row} tokens each, are contexts of the run, one after another: {contexts:,} contexts, {tokens:,} tokens. Each
context was read by itself, so that no neuron saw the one before. The last row is filled up.
A neuron of a gated model is above 0 at about half of all tokens: delphi then finds no text without it, and says so.

```python
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
from transformers import AutoTokenizer

dataset = LatentDataset(
    "latents", SamplerConfig(), ConstructorConfig(min_examples=10),
    tokenizer=AutoTokenizer.from_pretrained("tokenizer"),
)
for record in dataset:
    print(record.latent, record.max_activation, record.per_token_frequency)
```
"""


def write(
    folder: Path,
    about: Manifest,
    texts: Sequence[np.ndarray],
    neurons: Mapping[int, Sequence[int]],
    values: Mapping[int, np.ndarray],
) -> str:
    """Write a module of each layer and sign; returns what the README says of them.

    texts    tokens of contexts, i32[token] each
    neurons  of each layer those that were read
    values   of each layer f32[token neuron], over all texts one after another
    """
    special = np.array(about.options["special"], np.int64)
    flat = np.concatenate(texts)
    counted = ~np.isin(flat, special)
    counted[np.cumsum([0, *map(len, texts[:-1])])] = False
    fill = int(special[0]) if len(special) else int(flat[-1])
    tokens = np.concatenate([flat, np.full(-len(flat) % ROW, fill)]).astype(np.int64).reshape(-1, ROW)
    for layer, chosen in neurons.items():
        for polarity in SIGNS:
            module = folder / "latents" / (hook(layer) + ("" if polarity > 0 else "-negative"))
            above = np.where(counted[:, None], values[layer] * polarity, 0)
            write_json(module / "config.json", _config(about, tokens))
            save_file(
                _tensors(above, np.asarray(chosen), tokens),
                module / f"0_{about.model.sizes[layer] - 1}.safetensors",
            )
    return README.format(row=ROW, contexts=len(texts), tokens=len(flat))


def _tensors(values: np.ndarray, neurons: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """locations [N, 3], activations [N] and tokens [row, position] of values f32[token neuron] above 0."""
    place, column = np.nonzero(values > 0)
    small = max(len(tokens), int(neurons.max(initial=0)) + 1) <= 2**16
    locations = np.empty((len(place), 3), np.uint16 if small else np.uint32)
    for index, numbers in enumerate((place // ROW, place % ROW, neurons[column])):
        locations[:, index] = numbers
    activations = values[place, column]
    half = activations.max(initial=0) <= np.finfo(np.float16).max
    return {
        "locations": locations,
        "activations": activations.astype(np.float16 if half else np.float32),
        "tokens": tokens,
    }


def _config(about: Manifest, tokens: np.ndarray) -> dict[str, Any]:
    return {
        "dataset_repo": about.corpus.id,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": len(tokens),
        "cache_ctx_len": ROW,
        "n_tokens": tokens.size,
        "n_splits": 1,
        "model_name": about.model.base,
    }
