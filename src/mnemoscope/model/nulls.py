"""Pseudo-neurons that mean nothing, so that every number can stand beside what chance gives (A78).

Each kind answers a different doubt:

    random    "any direction of this layer's input would do": keys drawn isotropically, as long as real ones
    rotated   "any axis of the coefficients would do": no privileged basis
    shuffled  "any network of these weight statistics would do": a copy of the model, its matrices shuffled

Two kinds are *decoys*: there is one for each neuron, made of the layer's own parts, so that neuron and decoy can
compete one against one (`neuron.decoys`).

    chimera     "the gates and the ups would do, however paired": the neuron's gate with the up of another neuron.
                In a plain layer two other keys are added about the layer's mean, over the square root of 2
    covariance  "any direction would do that is distributed as the keys are": sums of many of the layer's keys with
                random signs, about their mean; gate, up and biases are drawn together

Units that are not neurons have decoys as neurons of a plain layer have, each with the threshold of its unit; under TopK
a decoy competes with all units of the layer. Anything with keys, an activation function and a column of coefficients
can enter by the same door.

Neurons of an expert run on the tokens that are routed to it, and so do its null units: they are made of its keys, its
axes and its neurons alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mnemoscope.arguments import DECOYS, check_nulls
from mnemoscope.arguments import DEFAULT_NULLS as DEFAULT
from mnemoscope.arguments import NULLS as KINDS
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.capture import Capture, Coefficients, Inputs, LayerRows
from mnemoscope.model.experts import Rows
from mnemoscope.model.model import Model
from mnemoscope.model.packed import packings
from mnemoscope.model.parts import Anatomy, Layer
from mnemoscope.model.spread import is_spread
from mnemoscope.model.units import Activation
from mnemoscope.records import ContextBatch

COUNT = 64  # pseudo-neurons in a layer: a 99th percentile over the layers, for a few per cent of the time
EACH = 4  # at least, in an expert

Place = tuple[int, int]  # layer, and which of its `groups`

_BLOCK = 512  # inputs that are multiplied at once
_SUMMED = 64  # keys that make a direction of kind "covariance"


class NullColumns(NamedTuple):
    """Coefficients of pseudo-neurons, and the pre-activations behind them where the kind has any; of experts by row."""

    coefficients: Coefficients | Float[Tensor, "row neuron"]
    gate: Coefficients | Float[Tensor, "row neuron"] | None = None
    up: Coefficients | Float[Tensor, "row neuron"] | None = None


class LayerSignals(NamedTuple):
    """What a layer reads and computes of a batch.

    inputs        what its first projections read
    coefficients  of its neurons
    gate, up      their pre-activations, None if it is plain
    group         which of the layer's experts this is; then all are of the rows that were routed to it
    """

    inputs: Inputs | Float[Tensor, "row width"]
    coefficients: Coefficients | Float[Tensor, "row neuron"]
    gate: Coefficients | Float[Tensor, "row neuron"] | None
    up: Coefficients | Float[Tensor, "row neuron"] | None
    group: int = 0


class NullSource(Protocol):
    """One kind of pseudo-neurons."""

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """The coefficients of its pseudo-neurons in one layer of one batch."""


def recipe(
    model: Model, kinds: Sequence[str] = DEFAULT, count: int = COUNT, seed: int = 0
) -> dict[str, Any] | None:
    """What `Nulls` depend on, as plain values for a manifest, or None for no kinds; arguments as there."""
    check_nulls(kinds)
    if not kinds:
        return None
    return {
        "kinds": [kind for kind in KINDS if kind in kinds],
        "count": min(count, max(model.anatomy.sizes)),
        "seed": seed,
    }


def units_of(
    parts: Anatomy, recipe: Mapping[str, Any] | None, at: Place | None = None
) -> dict[str, dict[Place, int]]:
    """By kind how many pseudo-neurons there are in each place that has any; `at` as of `Nulls`."""
    if recipe is None:
        return {}
    count = recipe["count"]
    return {
        kind: {
            (index, group): neurons
            if kind in DECOYS
            else min(_share(layer, count) if at is None else count, neurons)
            for index, layer in enumerate(parts.layers)
            for group, neurons in enumerate(parts.groups[index])
            if at in (None, (index, group))
        }
        for kind in recipe["kinds"]
    }


def sizes_of(parts: Anatomy, units: Mapping[str, Mapping[Place, int]]) -> dict[str, tuple[int, ...]]:
    """By kind how many pseudo-neurons each layer has."""
    return {
        kind: tuple(
            sum(of_kind.get((index, group), 0) for group in range(len(parts.groups[index])))
            for index in range(len(parts.layers))
        )
        for kind, of_kind in units.items()
    }


class Nulls:
    """`count` pseudo-neurons of each kind in every layer, or one for each neuron if the kind is one of `DECOYS`; the
    same for the same model and recipe. Experts of a layer share them out, each with at least `EACH`.

    kinds  of `KINDS`, in any order; "shuffled" runs a copy of the model and so doubles time and memory
    count  as asked, or the layer's neurons where these are fewer
    at     the only place that has any, and then all `count` of them
    sizes  of each kind the units of each layer, and `units` those of each place that has any

    Raises RunError when a kind is not known, ModelNotSupported for kind "shuffled" where `shuffled_copy` does.
    """

    def __init__(
        self,
        model: Model,
        kinds: Sequence[str] = DEFAULT,
        count: int = COUNT,
        seed: int = 0,
        at: Place | None = None,
    ) -> None:
        if model.units is not None and "shuffled" in kinds:
            raise ModelNotSupported(
                f"making null units for {model.id}: its units were trained to read its own stream, and of a copy with "
                f"shuffled weights they read another, so that there are none of kind 'shuffled'; give some of "
                f"{', '.join(kind for kind in KINDS if kind != 'shuffled')}, or none"
            )
        self.recipe = recipe(model, kinds, count, seed)
        self.kinds: tuple[str, ...] = tuple(self.recipe["kinds"]) if self.recipe else ()
        self.units = units_of(model.anatomy, self.recipe, at)
        self.sizes = sizes_of(model.anatomy, self.units)
        self._sources: dict[str, NullSource] = {
            kind: _SOURCES[kind](model, self.units[kind], seed) for kind in self.kinds
        }

    @classmethod
    def of(cls, model: Model, recipe: Mapping[str, Any] | None, at: Place | None = None) -> Nulls:
        """The nulls of a run: `recipe` is what its manifest says in ``options.get("nulls")``."""
        return cls(model, **(recipe or {"kinds": ()}), at=at)

    def columns(
        self,
        layer: int,
        batch: ContextBatch,
        signals: LayerSignals,
    ) -> dict[str, NullColumns]:
        """The coefficients of the pseudo-neurons by kind, in the model's dtype; ask layer by layer."""
        return {kind: source.columns(layer, batch, signals) for kind, source in self._sources.items()}

    def rows(self, rows: LayerRows, batch: ContextBatch) -> dict[str, LayerRows]:
        """By kind what the pseudo-neurons of experts make of the rows that were routed to these."""
        by_kind: dict[str, list[NullColumns]] = {kind: [] for kind in self.kinds}
        for piece in rows.each() if self.kinds else ():
            signals = LayerSignals(piece.inputs, piece.coefficients, piece.gate, piece.up, piece.group)
            for kind, columns in self.columns(rows.layer, batch, signals).items():
                by_kind[kind].append(columns)
        return {kind: self._joined(kind, rows, columns) for kind, columns in by_kind.items()}

    def first(self, kind: str, layer: int, group: int) -> int:
        """The first pseudo-neuron of one of a layer's groups among those of the layer."""
        return sum(self.units[kind][layer, before] for before in range(group))

    def _joined(self, kind: str, rows: LayerRows, columns: list[NullColumns]) -> LayerRows:
        coefficients = torch.cat([group.coefficients for group in columns])
        gates = [group.gate for group in columns if group.gate is not None]
        ups = [group.up for group in columns if group.up is not None]
        return replace(
            rows,
            first=self.first(kind, rows.layer, rows.group),
            weight=1.0,
            coefficients=coefficients,
            gate=torch.cat(gates) if gates else coefficients,
            up=torch.cat(ups) if ups else None,
        )


class _Random:
    """Isotropic keys with the norms, and the biases, of neurons of the layer drawn at random.

    Where a layer is gated, both keys of a pseudo-neuron take after the same neuron; of other units it has the threshold
    of the one that it takes after, and competes with all of them where they do.
    """

    def __init__(self, model: Model, units: Mapping[Place, int], seed: int) -> None:
        self._layers, self._units = model.anatomy.layers, units
        self._acts: dict[int, Activation] = {}
        self._like: dict[Place, np.ndarray] = {}
        weights, biases = {}, {}
        for place, rows in _rows(model, units):
            firsts, generator = _firsts(rows), _generator(seed, "random", *place)
            like = generator.choice(len(rows.keys), units[place], replace=False)
            self._like[place] = like
            if (held := self._layers[place[0]].units) is not None:
                self._acts[place[0]] = held.act.of(torch.from_numpy(like).to(model.device))
            weights[place] = np.concatenate([_directions(keys, like, generator) for keys, _ in firsts])
            biases[place] = np.concatenate([_biases(bias, like) for _, bias in firsts])
        self._weight, self._bias = _ByPlace(weights, model), _ByPlace(biases, model)

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """act(x.g + a) * (x.u + b), or act(x.k + a) where the layer is plain, beside its units where they compete."""
        place = layer, signals.group
        products = _product(signals.inputs, self._weight[place]).add_(self._bias[place])
        block, act = self._layers[layer], self._acts.get(layer)
        like = torch.from_numpy(self._like[place]).to(products.device)
        return _activated(block, signals, products, self._units[place], act, like)


class _Rotated:
    """The first columns of a random rotation, uniform over all, of the layer's coefficients."""

    def __init__(self, model: Model, units: Mapping[Place, int], seed: int) -> None:
        rows = {
            place: _orthonormal(
                _generator(seed, "rotated", *place).standard_normal(
                    (count, model.anatomy.groups[place[0]][place[1]])
                )
            )
            for place, count in units.items()
        }
        self._weight = _ByPlace(rows, model)

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """m R; it has no keys of its own, and so no gate."""
        return NullColumns(_product(signals.coefficients, self._weight[layer, signals.group]))


def shuffled_copy(model: Model, seed: int = 0) -> Model:
    """A copy of the model in which every matrix of every block has its entries permuted.

    Norms, biases and embeddings stay; a matrix that holds several projections is permuted as a whole.
    """
    if model.anatomy.experts:
        raise ModelNotSupported(
            f"making null units for {model.id}: it is a mixture of experts, of which a copy with shuffled weights "
            "routes other tokens to each expert, so that null units of kind 'shuffled' are no measure for its "
            "neurons; give other kinds of them"
        )
    if packed := packings(model.hf):
        raise ModelNotSupported(
            f"making null units for {model.id}: its weights are packed ({packed[0]}), and packed weights cannot be "
            "shuffled; leave the kind shuffled out"
        )
    if is_spread(model.hf):
        raise ModelNotSupported(
            f"making null units for {model.id}: it is spread over several devices, and a copy with shuffled weights "
            "has no place; leave the kind shuffled out"
        )
    # One call, so that the parts of the copied anatomy are the modules of the copied model.
    hf, anatomy = copy.deepcopy((model.hf, model.anatomy))
    for index, layer in enumerate(anatomy.layers):
        _shuffle(layer.module, _generator(seed, "shuffled", index))
    return replace(model, hf=hf, anatomy=anatomy)


class _Shuffled:
    """Neurons of a shuffled copy of the model, drawn at random.

    The copy reads each batch when its first layer is asked for.
    """

    def __init__(self, model: Model, units: Mapping[Place, int], seed: int) -> None:
        self._model = shuffled_copy(model, seed)
        self._chosen = {}
        for layer, group in units:
            generator = _generator(seed, "shuffled", layer, 1)
            drawn = generator.choice(model.anatomy.sizes[layer], units[layer, group], replace=False)
            self._chosen[layer] = torch.from_numpy(np.sort(drawn)).to(model.device)
        self._batch: ContextBatch | None = None
        self._columns: dict[int, NullColumns] = {}

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """What the copy computes for the chosen neurons."""
        held = self._batch is not None and (batch is self._batch or batch is self._batch.targets)
        if not held or layer not in self._columns:
            self._batch, self._columns = batch, {}
            with Capture(self._model) as capture:
                capture.sweep(batch, self._keep)
        return self._columns.pop(layer)

    def _keep(
        self,
        layer: int,
        coefficients: Tensor,
        batch: ContextBatch,
        gate: Tensor | None,
        up: Tensor | None,
        inputs: Tensor,
    ) -> None:
        if layer not in self._chosen:
            return
        chosen = self._chosen[layer]
        branches = [None if branch is None else branch[..., chosen] for branch in (gate, up)]
        self._columns[layer] = NullColumns(coefficients[..., chosen], *branches)


class _Chimera:
    """For each neuron its gate with the up of another; in a plain layer two other keys, mixed.

    The other is so many places further on: the order of neurons means nothing, and a shift is read in order.
    """

    def __init__(self, model: Model, units: Mapping[Place, int], seed: int) -> None:
        self._layers = model.anatomy.layers
        self._shifts = {
            place: _shifts(_generator(seed, "chimera", *place), count, 2) for place, count in units.items()
        }
        self._mixed = None
        if not model.anatomy.gated:
            self._mixed = _Mixtures(
                model,
                {
                    place: (self._shifts[place], np.ones((len(self._shifts[place]), count)))
                    for place, count in units.items()
                },
            )

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """act(x.g + a) * (x.u' + b'), or act(x.k' + a') where the layer is plain."""
        if self._mixed is not None:
            return self._mixed.columns(layer, signals)
        assert signals.gate is not None and signals.up is not None, "a gated layer has a gate and an up"
        other = signals.up.roll(-int(self._shifts[layer, signals.group][0]), -1)
        return _gated(self._layers[layer], signals, signals.gate, other)


class _Covariance:
    """For each neuron a direction with the mean and the covariance of the layer's keys."""

    def __init__(self, model: Model, units: Mapping[Place, int], seed: int) -> None:
        drawn = {}
        for place, count in units.items():
            generator = _generator(seed, "covariance", *place)
            shifts = _shifts(generator, count, _SUMMED)
            drawn[place] = (shifts, generator.choice([-1.0, 1.0], (len(shifts), count)))
        self._mixed = _Mixtures(model, drawn)

    def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
        """act(x.g' + a') * (x.u' + b'), or act(x.k' + a') where the layer is plain."""
        return self._mixed.columns(layer, signals)


class _Mixtures:
    """Keys that are sums of the layer's keys about their mean, one for each neuron.

    drawn  for each place with neurons shifts i64[term], and signs f64[term neuron]: neuron i has the keys of the
           neurons i + shift, by sign. Gate, up and biases are summed alike, and so keep what ties them.
    """

    def __init__(self, model: Model, drawn: Mapping[Place, tuple[np.ndarray, np.ndarray]]) -> None:
        self._layers = model.anatomy.layers
        weights, biases = {}, {}
        for place, group in _rows(model, drawn):
            (shifts, signs), firsts = drawn[place], _firsts(group)
            every = np.arange(len(group.keys))
            rows = [keys.cpu().double().numpy() for keys, _ in firsts]
            offsets = [_biases(bias, every)[:, None] for _, bias in firsts]
            weights[place] = np.concatenate([_mixed(matrix, shifts, signs) for matrix in rows])
            biases[place] = np.concatenate([_mixed(column, shifts, signs)[:, 0] for column in offsets])
        self._weight, self._bias = _ByPlace(weights, model), _ByPlace(biases, model)

    def columns(self, layer: int, signals: LayerSignals) -> NullColumns:
        """What these keys make of the inputs of a layer."""
        place = layer, signals.group
        products = nn.functional.linear(signals.inputs, self._weight[place], self._bias[place])
        held = self._layers[layer].units
        act = None if held is None else held.act
        return _activated(self._layers[layer], signals, products, signals.coefficients.shape[-1], act)


def _mixed(rows: np.ndarray, shifts: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """f64[neuron width]: mean + the sum of signed, shifted (rows - mean), over the square root of their number."""
    mean = rows.mean(0)
    about, total = rows - mean, np.zeros_like(rows)
    for shift, sign in zip(shifts, signs, strict=True):
        total += sign[:, None] * np.roll(about, -shift, 0)
    return mean + total / np.sqrt(max(len(shifts), 1))


def _shifts(generator: np.random.Generator, neurons: int, count: int) -> np.ndarray:
    """i64[term]: different numbers of places, never back to the neuron itself; fewer where there are not so many."""
    if neurons == 1:
        return np.zeros(1, np.int64)
    return 1 + generator.choice(neurons - 1, min(count, neurons - 1), replace=False)


def _activated(
    layer: Layer,
    signals: LayerSignals,
    products: Tensor,
    count: int,
    act: Activation | None,
    like: Tensor | slice = slice(None),
) -> NullColumns:
    """Coefficients of `count` units from the products with their keys, the gates before the ups.

    act   of units that are not neurons; the others of the layer compete with them where they do with one another
    like  the neurons that they take after
    """
    if act is not None:
        return NullColumns(act.beside(products, signals.coefficients))
    gate, up = (products, None) if products.shape[-1] == count else products.split(count, -1)
    return _gated(layer, signals, gate, up, like)


def _gated(
    layer: Layer, signals: LayerSignals, gate: Tensor, up: Tensor | None, like: Tensor | slice = slice(None)
) -> NullColumns:
    """Coefficients from pre-activations; where a layer's are divided by all of them, by those of the layer."""
    if layer.inner_norm is None:
        coefficients = layer.activated(signals.group, gate, up)
    else:
        assert signals.gate is not None, "a layer whose coefficients are divided by all of them is gated"
        bare = replace(layer, inner_norm=None).activated(signals.group, gate, up)
        coefficients = bare * layer.normed(signals.gate, signals.up, like)
    return NullColumns(coefficients) if up is None else NullColumns(coefficients, gate, up)


_SOURCES: dict[str, Callable[[Model, Mapping[Place, int], int], NullSource]] = {
    "random": _Random,
    "rotated": _Rotated,
    "shuffled": _Shuffled,
    "chimera": _Chimera,
    "covariance": _Covariance,
}


def _generator(seed: int, kind: str, *address: int) -> np.random.Generator:
    return np.random.default_rng([seed, KINDS.index(kind), *address])


def _share(layer: Layer, count: int) -> int:
    """How many of so many units each of a layer's groups has."""
    if layer.experts is None or layer.units is not None:
        return count
    return max(EACH, -(-count // len(layer.groups)))


def _rows(model: Model, places: Collection[Place]) -> Iterator[tuple[Place, Rows]]:
    """Of some groups of neurons that run on the same tokens the weights, with keys of what the group itself reads."""
    for layer in sorted({layer for layer, _ in places}):
        block = model.anatomy.layers[layer]
        if block.units is not None:
            every = slice(0, len(block.keys()))
            yield (layer, 0), Rows(every, block.keys(), block.key_bias(), None, None, block.values())
            continue
        for group, rows in enumerate(model.anatomy.layers[layer].rows(of_stream=False)):
            if (layer, group) in places:
                yield (layer, group), rows


def _firsts(rows: Rows) -> list[tuple[Tensor, Tensor | None]]:
    """The keys of a group and their bias, and those of its up projection if it is gated."""
    keys = (rows.keys, rows.key_bias)
    return [keys] if rows.ups is None else [keys, (rows.ups, rows.up_bias)]


def _directions(keys: Tensor, like: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """f64[count width]: isotropic, as long as the rows `like` of keys."""
    rows = keys[torch.from_numpy(like)].cpu().double().numpy()
    drawn = generator.standard_normal(rows.shape)
    return drawn * (_lengths(rows) / _lengths(drawn))[:, None]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt((rows * rows).sum(1))


def _biases(bias: Tensor | None, like: np.ndarray) -> np.ndarray:
    return np.zeros(len(like)) if bias is None else bias.cpu().double().numpy()[like]


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Gram and Schmidt's rows, each cleared twice; of Gaussian rows they are uniform (Haar).

    Not by LAPACK: its last bits depend on the number of threads, and a run's must not.
    """
    done = np.empty_like(rows)
    for index, row in enumerate(rows):
        for _ in range(2):
            row = row - np.einsum("k,kn->n", np.einsum("kn,n->k", done[:index], row), done[:index])
        done[index] = row / np.sqrt((row * row).sum())
    return done


class _ByPlace:
    """An array for each place with units, in one tensor: shared with workers, each tensor costs a file handle."""

    def __init__(self, arrays: Mapping[Place, np.ndarray], model: Model) -> None:
        flat = np.concatenate([array.ravel() for array in arrays.values()])
        self.all = torch.from_numpy(flat).to(model.device, model.anatomy.unit_dtype)
        ends = np.cumsum([array.size for array in arrays.values()]).tolist()
        self._places = {
            place: (end - array.size, end, array.shape)
            for (place, array), end in zip(arrays.items(), ends, strict=True)
        }

    def __getitem__(self, place: Place) -> Tensor:
        start, end, shape = self._places[place]
        return self.all[start:end].view(shape)


def _product(x: Float[Tensor, "... width"], rows: Float[Tensor, "unit width"]) -> Float[Tensor, "... unit"]:
    """x rowsᵀ, added up block by block.

    A product with many inputs and few outputs is otherwise cut along its inputs, into as many pieces as there
    are threads, and its last bits show how many there were.
    """
    total = nn.functional.linear(x[..., :_BLOCK], rows[:, :_BLOCK])
    for start in range(_BLOCK, x.shape[-1], _BLOCK):
        block = slice(start, start + _BLOCK)
        total += nn.functional.linear(x[..., block], rows[:, block])
    return total


@torch.no_grad()
def _shuffle(block: nn.Module, generator: np.random.Generator) -> None:
    """Permute the entries of every matrix that a block multiplies with."""
    for module in block.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight
            order = torch.from_numpy(generator.permutation(weight.numel())).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
