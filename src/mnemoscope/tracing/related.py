"""Look for the relatives of a neuron: its value and its key against those of all neurons of its stack, layer by layer.

A value is what the neuron adds to the residual stream, a key what it detects there: the gate's row, or the only one,
through the weight of the norm before it. Cosines do not know how long vectors are. For each list the same is looked for
from other neurons of the layer and from random directions: the nearest of a hundred thousand is always near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.arguments import check_least
from mnemoscope.mine.values import value_vectors
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.records import NeuronId, Progress
from mnemoscope.run.reading import Run
from mnemoscope.tracing.relatives import RELATIONS, Chance, Relatives

OTHERS = 32  # of each kind, from which the same is looked for
WRITES = 4  # tokens that are named of a value


def related(
    model: Model,
    run: Run,
    address: NeuronId,
    *,
    count: int = 10,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Relatives:
    """The nearest neurons by weights; see `Relatives` for what comes back.

    count  of each list
    seed   of the neurons and directions that the lists are compared with

    RunMismatch for a model that is not the run's.
    """
    check_least("looking for relatives", 1, count=count)
    model.check_built(run, "looking for relatives by")
    anatomy, say = model.anatomy, report or (lambda _: None)
    stack = anatomy.stack_of(address.layer)
    layers = [index for index in range(anatomy.n_layers) if anatomy.stack_of(index) is stack]
    layers = [index for index in layers if sum(anatomy.layers[index].groups)]
    with torch.inference_mode():
        own = anatomy.layers[address.layer]
        chosen = _chosen(sum(own.groups), address.neuron, seed)
        directions = {"value": _values(own)[chosen], "key": _keys(own)[chosen]}
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(OTHERS, anatomy.width, generator=generator).to(directions["key"].device)
        wanted = {name: torch.cat([rows, _unit(random)]) for name, rows in directions.items()}
        nearest = {name: _Nearest(count) for name in RELATIONS}
        for place, index in enumerate(layers):
            say(Progress("looking for relatives", place, len(layers), "layers"))
            block = anatomy.layers[index]
            against = {"value": _values(block), "key": _keys(block)}
            for name, (given, sought) in _PAIRS.items():
                if not _in_order(name, address.layer, index):
                    continue
                cosines = against[sought] @ wanted[given].T.to(against[sought].device)
                if index == address.layer:
                    cosines[chosen, torch.arange(len(chosen))] = 0.0  # itself
                nearest[name].see(index, cosines.cpu().numpy())
        say(Progress("looking for relatives", len(layers), len(layers), "layers"))
    held = {name: each for name, each in nearest.items() if each.rows}
    return Relatives(
        model.id,
        address,
        {name: _frame(run, each.rows) for name, each in held.items()},
        {name: each.chance(len(chosen)) for name, each in held.items()},
    )


# Of each relation which direction of the neuron is compared with which of others.
_PAIRS = {
    "values": ("value", "value"),
    "keys": ("key", "key"),
    "upstream": ("key", "value"),
    "downstream": ("value", "key"),
}


def _in_order(relation: str, layer: int, other: int) -> bool:
    return {"upstream": other < layer, "downstream": other > layer}.get(relation, True)


def _chosen(size: int, neuron: int, seed: int) -> Tensor:
    """i64[neuron]: the neuron, and others of its layer."""
    others = np.random.default_rng(seed).permutation(np.delete(np.arange(size), neuron))[:OTHERS]
    return torch.from_numpy(np.concatenate([[neuron], others]).astype(np.int64))


def _unit(rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    return torch.nn.functional.normalize(rows.detach().float(), dim=-1)


def _values(block: Layer) -> Float[Tensor, "neuron width"]:
    return _unit(value_vectors(block))


def _keys(block: Layer) -> Float[Tensor, "neuron width"]:
    """Directions of the residual stream that keys detect: through the weight of the norm, and its mean left out."""
    keys, norm = block.keys().detach().float(), block.ffn_norm
    if norm is None:
        return _unit(keys)
    keys = keys if norm.weight is None else keys * norm.weight.to(keys.device)
    return _unit(keys - keys.mean(-1, keepdim=True) if norm.kind == "layer" else keys)


@dataclass
class _Nearest:
    """The nearest to the first of some directions, and how near the nearest to each of the others is.

    rows  (layer, neuron, cosine), nearest first
    """

    count: int
    rows: list[tuple[int, int, float]] = field(default_factory=list)
    _largest: np.ndarray | None = None

    def see(self, layer: int, cosines: np.ndarray) -> None:
        """Let the neurons of a layer compete; f32[neuron direction]."""
        own = cosines[:, 0]
        first = np.argsort(-np.abs(own), kind="stable")[: self.count].tolist()
        rows = [*self.rows, *((layer, neuron, float(own[neuron])) for neuron in first)]
        self.rows = sorted(rows, key=lambda row: (-abs(row[2]), row[0], row[1]))[: self.count]
        largest = np.abs(cosines[:, 1:]).max(0)
        self._largest = largest if self._largest is None else np.maximum(self._largest, largest)

    def chance(self, chosen: int) -> Chance:
        """What others find; of the directions the first are neurons of the layer."""
        assert self._largest is not None
        peers, random = self._largest[: chosen - 1], self._largest[chosen - 1 :]
        high = float(np.quantile(peers, 0.95)) if len(peers) else float("nan")
        middle = float(np.median(peers)) if len(peers) else float("nan")
        return Chance(float(np.median(random)), middle, high, OTHERS)


def _frame(run: Run, rows: list[tuple[int, int, float]]) -> pl.DataFrame:
    cells = run.manifest.model.cells
    return pl.DataFrame(
        {
            "neuron": [str(cells.id(layer, neuron)) for layer, neuron, _ in rows],
            "cosine": [cosine for *_, cosine in rows],
            "promotes": [_promotes(run, layer, neuron, cosine) for layer, neuron, cosine in rows],
        },
        schema={"neuron": pl.String, "cosine": pl.Float64, "promotes": pl.List(pl.String)},
    )


def _promotes(run: Run, layer: int, neuron: int, cosine: float) -> list[str]:
    values = run.rows("values", layer, neuron).filter(pl.col("polarity") == (1 if cosine > 0 else -1))
    return [run.vocabulary.label(token) for token in values.sort("rank")["token"].head(WRITES).to_list()]
