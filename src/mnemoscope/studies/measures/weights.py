"""What a neuron's own weights say, without any text (A80).

Cosines of the gate row, the up row and the value of a neuron in the residual stream (Gerstner and Schütze 2025): does
it write what it reads? Its null is a gate, an up and a value of three different neurons of the layer.

How the logits of the value are spread over the vocabulary (Gurnee et al. 2024): prediction neurons have a heavy tail of
tokens that they raise, suppression neurons one of tokens that they lower, partition neurons a wide spread without
either. And how much of the value lies in directions that the unembedding hardly reads, which acts through the final
norm alone (entropy neurons; Stolfo et al. 2024). Their null are values with their entries shuffled: the same numbers,
so that coordinates that are large in every value are not lost, in other places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.mine.values import value_vectors
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, Layer, Norm
from mnemoscope.prediction.bases import Geometry
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.reductions import central_powers

SHUFFLED = 128  # values of a layer that are shuffled
SILENT = 0.02  # of the directions of the stream: those that the unembedding reads least

_TILE = 512  # values read at once


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, Iterator[pa.Table]]:
    """The table `neuron_weights`: a row for each neuron, and for each unit of two nulls."""
    return {"neuron_weights": _layers(model, sizes.seed, work)}


def _layers(model: Model, seed: int, work: Work) -> Iterator[pa.Table]:
    lens = Lens.of(model.anatomy, "frozen", "flat")
    total = model.anatomy.n_layers
    with torch.inference_mode():
        silent = silent_directions(lens)
        for number, layer in enumerate(model.anatomy.layers):
            work.report(Progress("reading weights", number, total, "layers"))
            generator = np.random.default_rng([seed, number])
            yield _layer(model.anatomy, lens, layer, silent, number, generator)
    work.report(Progress("reading weights", total, total, "layers"))


def _layer(
    anatomy: Anatomy, lens: Lens, layer: Layer, silent: Tensor, number: int, generator: np.random.Generator
) -> pa.Table:
    values = value_vectors(layer)
    count = len(values)
    chosen = np.sort(generator.choice(count, min(SHUFFLED, count), replace=False))
    orders = generator.permuted(np.tile(np.arange(values.shape[1]), (len(chosen), 1)), axis=1)
    shuffled = values[torch.from_numpy(chosen)].gather(1, torch.from_numpy(orders).to(values.device))
    units = {
        "neuron": cosines(layer, values) | spread(lens, anatomy.outward(values), silent),
        "paired": cosines(layer, values, others(count, generator)),
        "shuffled": spread(lens, anatomy.outward(shuffled), silent),
    }
    which = {"neuron": np.arange(count), "paired": np.arange(count), "shuffled": chosen}
    rows: list[dict[str, Any]] = [
        {"layer": number, "neuron": which[unit], "unit": unit, **columns} for unit, columns in units.items()
    ]
    table = pa.concat_tables([arrow_table("neuron_weights", columns) for columns in rows])
    return table.sort_by([("layer", "ascending"), ("neuron", "ascending"), ("unit", "ascending")])


# -- Cosines -----------------------------------------------------------------------------------------------------


def cosines(
    layer: Layer, values: Float[Tensor, "neuron width"], pairs: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """`gate_up`, `gate_value` and `up_value` of each neuron; of a plain layer the key with the value alone.

    pairs  whose up and whose value each gate is compared with, instead of its own
    """
    up, value = (None, None) if pairs is None else (torch.from_numpy(numbers) for numbers in pairs)
    gates, ups = read_directions(layer)
    values = values if value is None else values[value]
    columns = {"gate_value": _cosine(gates, values)}
    if ups is not None:
        ups = ups if up is None else ups[up]
        columns |= {"gate_up": _cosine(gates, ups), "up_value": _cosine(ups, values)}
    return columns


def others(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two other neurons for each of so many, no two alike where there are three: turns of one random circle."""
    circle = generator.permutation(count)
    place = np.argsort(circle)
    first, second = (circle[(place + step) % count] for step in (1, 2))
    return first, second


def read_directions(
    layer: Layer,
) -> tuple[Float[Tensor, "neuron width"], Float[Tensor, "neuron width"] | None]:
    """Gate and up rows as directions of the residual stream, the norm before them included."""
    ups = layer.ups()
    return _unnormed(layer.keys(), layer.ffn_norm), None if ups is None else _unnormed(ups, layer.ffn_norm)


def _unnormed(rows: Tensor, norm: Norm | None) -> Float[Tensor, "neuron width"]:
    """k' with k' . x = k . (w * (x - [mean x])), which is what a row sees of x up to the scale of the norm."""
    rows = rows.detach().float()
    if norm is None:
        return rows
    rows = rows if norm.weight is None else rows * norm.weight
    rows = rows - rows.mean(-1, keepdim=True) if norm.kind == "layer" else rows
    return rows / norm.unit if isinstance(norm.unit, Tensor) else rows


def _cosine(one: Tensor, other: Tensor) -> np.ndarray:
    return torch.cosine_similarity(one, other, dim=-1).cpu().numpy()


# -- Values over the vocabulary ----------------------------------------------------------------------------------


def spread(
    lens: Lens, values: Float[Tensor, "neuron width"], silent: Float[Tensor, "width direction"]
) -> dict[str, np.ndarray]:
    """Standard deviation, skewness and excess kurtosis over the vocabulary of the logits of each value at unit length,
    and its share in the silent directions."""
    unit = values / values.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30)
    parts = [_moments(lens, tile) for tile in unit.split(_TILE)]
    std, skewness, kurtosis = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    share = (unit @ silent).square().sum(-1).cpu().numpy()
    return {
        "logit_std": std, "logit_skewness": skewness, "logit_kurtosis": kurtosis, "silent_share": share
    }  # fmt: skip


def _moments(lens: Lens, vectors: Float[Tensor, "row width"]) -> tuple[Tensor, Tensor, Tensor]:
    middle = lens.table.mean(0, dtype=torch.float64) * lens.multiplier
    mean = (lens.weighted(vectors).double() @ middle).float()
    sums = [central_powers(logits, mean) for _, logits in lens.pieces(vectors)]
    variance, third, fourth = (torch.stack(sums).sum(0) / len(lens.table)).T
    size = variance.clamp_min(1e-30)
    return variance.sqrt(), third / size**1.5, fourth / size.square() - 3


def silent_directions(lens: Lens) -> Float[Tensor, "width direction"]:
    """Orthonormal directions of the stream along which logits, less their mean, change least: `SILENT` of all.

    Adding the same to every logit changes no probability, and so the mean is no matter.
    """
    scatter = Geometry(lens.unembedding).scatter.double().to(lens.unembedding.device)
    norm = lens.norm
    if norm is not None and norm.weight is not None:
        scatter = scatter * norm.weight.double()[:, None] * norm.weight.double()
    if norm is not None and norm.kind == "layer":
        scatter = scatter - scatter.mean(0)
        scatter = scatter - scatter.mean(1, keepdim=True)
    count = max(1, round(SILENT * len(scatter)))
    return torch.linalg.eigh(scatter).eigenvectors[:, :count].float()
