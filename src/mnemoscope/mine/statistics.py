"""All accumulators together, for the neurons and for the null units beside them: what the loop feeds and merges."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from mnemoscope import files
from mnemoscope.errors import ActivationError, RunCorrupt, RunMismatch
from mnemoscope.mine.moments import Histograms, Moments
from mnemoscope.mine.places import HISTOGRAM_EVERY, CountedPlaces
from mnemoscope.mine.reading import Accumulator, LayerReading
from mnemoscope.mine.reconstruction import Reconstruction
from mnemoscope.mine.routing import Routing
from mnemoscope.mine.scan import scan, scan_routed
from mnemoscope.mine.triggers import Samples, Triggers
from mnemoscope.model.capture import Coefficients, Inputs, LayerRows, Rebuilt
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import LayerSignals, Nulls
from mnemoscope.records import Cells, ContextBatch

_FORMAT = 6
_NEURONS, _UNITS, _MACHINES, _BUILD = "neurons", "units", "machines", "build"

T = TypeVar("T")


class NeuronStatistics:
    """Triggers, moments, histograms and samples of all neurons, with the shards they come from.

    sizes    neurons of each layer
    top      triggers kept for each neuron and polarity
    every    one context in so many goes into histograms and samples
    experts  of each layer, as in `Cells`; () also of null units of experts, of which no routing is told
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        top: int,
        every: int = HISTOGRAM_EVERY,
        experts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.cells, self.top, self.every = Cells(sizes, experts), top, every
        self.routing = Routing(self.cells)
        self.moments, self._triggers = Moments(self.cells), Triggers(self.cells, top)
        self._tables: dict[str, Accumulator] = {
            "neurons": self.moments,
            "histograms": Histograms(self.cells),
            "triggers": self._triggers,
            "samples": Samples(self.cells),
        }
        self._places: tuple[ContextBatch, CountedPlaces] | None = None
        self._entered: set[int] = set()  # layers that this batch went through
        self._contexts: list[np.ndarray] = []

    @property
    def shards(self) -> frozenset[int]:
        """The shards that are finished, merged or loaded."""
        return frozenset(self.moments.shard.tolist())

    @property
    def contexts(self) -> frozenset[int]:
        """Ids of the contexts that `update` was given; not those that were merged or loaded."""
        return frozenset(np.concatenate([np.zeros(0, np.int64), *self._contexts]).tolist())

    def update(
        self,
        layer: int,
        coefficients: Coefficients,
        batch: ContextBatch,
        gate: Coefficients | None = None,
        up: Coefficients | None = None,
    ) -> None:
        """Take in one layer of one batch of the current shard; the tensors are not kept.

        coefficients  inputs of the down projection
        gate, up      pre-activations of a gated layer, of which triggers tell the signs

        Raises ActivationError when a counted coefficient is NaN or infinite.
        """
        places, pivot = self._enter(layer, batch), self.moments.pivot(layer)
        floor = self._triggers.floor(layer)
        self._take(scan(layer, coefficients, batch, gate, up, places=places, pivot=pivot, floor=floor))

    def update_rows(self, rows: LayerRows, batch: ContextBatch) -> None:
        """Take in experts of one batch of the current shard, each over the tokens routed to it.

        Raises ActivationError when a counted coefficient is NaN or infinite.
        """
        places = self._enter(rows.layer, batch)
        neurons = (len(rows.starts) - 1) * rows.coefficients.shape[1]
        pivot = self.moments.pivot(rows.layer, rows.first, neurons)
        floor = self._triggers.floor(rows.layer, rows.first, neurons)
        self._take(scan_routed(rows, batch, places, pivot, floor))
        if self.cells.experts:
            self.routing.update(rows, batch)

    def _enter(self, layer: int, batch: ContextBatch) -> CountedPlaces:
        """The places of a batch, which a layer enters once, however many experts it has."""
        if self._places is None or self._places[0] is not batch:
            self._places, self._entered = (batch, CountedPlaces.of(batch, self.every)), set()
            self._contexts.append(batch.contexts)
        places = self._places[1]
        if layer not in self._entered:
            self._entered.add(layer)
            paired = batch.targets is not None
            self.moments.enter(layer, len(batch.contexts), len(places.rows), paired=paired)
        return places

    def _take(self, reading: LayerReading) -> None:
        for table in self._tables.values():
            table.update(reading)

    def finish_shard(self, shard: int) -> None:
        """All batches of shard `shard` have been given; RunError when it was in already."""
        self.moments.finish_shard(shard)

    def merge(self, other: NeuronStatistics) -> None:
        """Take in another's shards; RunError when one is in both, RunMismatch when the options differ."""
        if self._options() != other._options():
            raise RunMismatch(
                f"merging states: {_spelled(self._options())} and {_spelled(other._options())}; "
                "merge states of one run only"
            )
        # Moments know about the shards, and refuse before anything has changed.
        for name, table in self._tables.items():
            table.merge(other._tables[name])
        self.routing.merge(other.routing)

    def _options(self) -> dict[str, Any]:
        return {
            "neurons": self.cells.sizes,
            "experts": self.cells.experts,
            "top": self.top,
            "every": self.every,
        }

    def results(self, layer: int) -> dict[str, pa.Table]:
        """The rows of one layer: `neurons` (moment columns only), `histograms`, `triggers`, `samples`; and of experts
        `experts` and `trigger_weights`."""
        tables = {name: table.result(layer) for name, table in self._tables.items()}
        if self.cells.experts and self.cells.experts[layer][0]:
            tables["trigger_weights"] = self._triggers.weights(layer)
            tables["experts"] = self.routing.result(layer, int(self.moments.tokens[:, layer].sum()))
        return tables

    def shard_rows(self) -> pa.Table:
        """The rows of `shards`, by (shard, layer)."""
        return self.moments.shard_rows()

    def state(self) -> dict[str, np.ndarray]:
        """All there is to know, as arrays by name. Finish the shard first."""
        arrays = {
            f"{table}.{name}": array
            for table, accumulator in self._tables.items()
            for name, array in accumulator.state().items()
        }
        options = [_FORMAT, self.top, self.every, *self.cells.sizes]
        arrays |= {f"routing.{name}": array for name, array in self.routing.state().items()}
        experts = np.array(self.cells.experts, np.int64).reshape(-1, 2)
        return arrays | {"options": np.array(options, np.int64), "experts": experts}

    @classmethod
    def of(cls, state: Mapping[str, np.ndarray]) -> NeuronStatistics:
        """What had this state; KeyError or ValueError when it is of another version."""
        version, top, every, *sizes = state["options"].tolist()
        if version != _FORMAT:
            raise ValueError(f"version {version}, not {_FORMAT}")
        experts = tuple((int(count), int(width)) for count, width in state["experts"])
        statistics = cls(tuple(sizes), top, every, experts)
        statistics.routing.restore(Below(state, "routing."))
        for table, accumulator in statistics._tables.items():
            accumulator.restore(Below(state, f"{table}."))
        return statistics


class RunStatistics:
    """A `State` of the loop: one `NeuronStatistics` for the neurons, and one for each kind of null; of other units than
    neurons also how well they rebuild what they stand for.

    All are fed in the same pass, and what is a law of `NeuronStatistics` is one of this.

    machines  what computed it, each as processor and version of torch: parts may be of several, whose last bits differ
    build     a hash of model, text and options, which a file says, so that no other build takes it in
    """

    def __init__(
        self,
        nulls: Nulls,
        by_kind: dict[str, NeuronStatistics],
        rebuilt: Reconstruction,
        machines: frozenset[tuple[str, ...]],
        build: str = "",
    ) -> None:
        self._nulls, self._by_kind, self.rebuilt, self.machines = nulls, by_kind, rebuilt, machines
        self._build = build

    @classmethod
    def of(cls, model: Model, nulls: Nulls, top: int, build: str = "") -> RunStatistics:
        """An empty one, of a model's shape, that keeps `top` triggers."""
        sizes = {_NEURONS: model.anatomy.sizes} | nulls.sizes
        experts = {_NEURONS: model.anatomy.experts}
        return cls(
            nulls,
            {
                name: NeuronStatistics(of_layers, top, experts=experts.get(name, ()))
                for name, of_layers in sizes.items()
            },
            Reconstruction.of(model),
            frozenset([machine()]),
            build,
        )

    @property
    def neurons(self) -> NeuronStatistics:
        """The statistics of the model's own neurons."""
        return self._by_kind[_NEURONS]

    @property
    def by_kind(self) -> Mapping[str, NeuronStatistics]:
        """The statistics of the neurons, and of each kind of null."""
        return self._by_kind

    @property
    def shards(self) -> frozenset[int]:
        """The shards that are finished, merged or loaded."""
        return self.neurons.shards

    def update(
        self,
        layer: int,
        coefficients: Coefficients,
        batch: ContextBatch,
        gate: Coefficients | None,
        up: Coefficients | None,
        inputs: Inputs,
    ) -> None:
        """Take in one layer of one batch: a `Receiver`. ActivationError when something counted is not finite."""
        self.neurons.update(layer, coefficients, batch, gate, up)
        signals = LayerSignals(inputs, coefficients, gate, up)
        for kind, columns in self._nulls.columns(layer, batch, signals).items():
            with _of_kind(kind):
                self._by_kind[kind].update(layer, columns.coefficients, batch, columns.gate, columns.up)

    def update_rows(self, rows: LayerRows, batch: ContextBatch) -> None:
        """Take in experts of one batch: a `RoutedReceiver`. ActivationError when something counted is not finite."""
        self.neurons.update_rows(rows, batch)
        for kind, null_rows in self._nulls.rows(rows, batch).items():
            with _of_kind(kind):
                self._by_kind[kind].update_rows(null_rows, batch)

    def update_rebuilt(self, rebuilt: Rebuilt, batch: ContextBatch) -> None:
        """Take in what units rebuild of one layer of one batch: a `RebuiltReceiver`."""
        self.rebuilt.update(rebuilt, batch)

    def finish_shard(self, shard: int) -> None:
        """All batches of shard `shard` have been given; RunError when it was in already."""
        for statistics in self._by_kind.values():
            statistics.finish_shard(shard)

    def merge(self, other: RunStatistics) -> None:
        """Take in another's shards; RunError when one is in both, RunMismatch when the nulls differ."""
        if self._nulls.recipe != other._nulls.recipe:
            raise RunMismatch(
                f"merging states: their nulls are {self._nulls.recipe} and {other._nulls.recipe}; merge states "
                "of one run only"
            )
        for name, statistics in self._by_kind.items():
            statistics.merge(other._by_kind[name])
        self.rebuilt.merge(other.rebuilt)
        self.machines |= other.machines

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all; RunError when it cannot be."""
        states = {name: statistics.state() for name, statistics in self._by_kind.items()}
        states[_UNITS] = self.rebuilt.state()
        arrays = {f"{name}/{key}": array for name, state in states.items() for key, array in state.items()}
        save_state(
            path,
            arrays | {_MACHINES: np.array(sorted(self.machines), np.str_), _BUILD: np.array(self._build)},
        )

    @classmethod
    def load(cls, nulls: Nulls, path: Path, build: str = "") -> RunStatistics:
        """Read what `save` wrote; RunCorrupt when it is not whole, of another version or without these nulls."""

        def restored(state: Mapping[str, np.ndarray]) -> RunStatistics:
            names = (_NEURONS, *nulls.kinds)
            by_kind = {name: NeuronStatistics.of(Below(state, f"{name}/")) for name in names}
            # Not in states from before they were told.
            machines = frozenset(map(tuple, state[_MACHINES].tolist() if _MACHINES in state else ()))
            return cls(nulls, by_kind, Reconstruction.restored(Below(state, f"{_UNITS}/")), machines, build)

        return load_state(path, restored)

    @staticmethod
    def held(path: Path, build: str = "") -> frozenset[int]:
        """The shards in what `save` wrote; nothing else of it is read. RunMismatch when it is of another build."""

        def shards(state: Mapping[str, np.ndarray]) -> frozenset[int]:
            if _BUILD in state and str(state[_BUILD]) != build:
                raise RunMismatch(
                    f"loading the state {path}: it is of another build, with another model, text or options; move it "
                    "away, and what is missing then is mined"
                )
            return frozenset(state[f"{_NEURONS}/neurons.shard"].tolist())

        return load_state(path, shards)

    def tables(self, layer: int) -> dict[str, pa.Table]:
        """The rows of one layer: `neurons` (moment columns only), `histograms` ..., and the same as `null_...`."""
        return self.neurons.results(layer) | dict(self._null_tables(layer))

    def _null_tables(self, layer: int) -> Iterator[tuple[str, pa.Table]]:
        """The rows of all kinds by (neuron, kind), and within these as they were."""
        by_kind = {kind: self._by_kind[kind].results(layer) for kind in self._nulls.kinds}
        for name in dict.fromkeys(chain.from_iterable(by_kind.values())):
            rows = pa.concat_tables(
                tables[name].add_column(0, "kind", pa.repeat(pa.scalar(kind), tables[name].num_rows))
                for kind, tables in by_kind.items()
            )
            yield f"null_{name}", rows.take(np.argsort(rows["neuron"].to_numpy(), kind="stable"))


def machine() -> tuple[str, ...]:
    """Processor and version of torch that compute here; of which device, the build says."""
    return torch.backends.cpu.get_cpu_capability(), torch.__version__


@contextmanager
def _of_kind(kind: str) -> Iterator[None]:
    """An ActivationError raised inside says that it is about null units."""
    try:
        yield
    except ActivationError as error:
        raise ActivationError(f"in the null units of kind {kind}, {error}") from error


def save_state(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to one file, whole or not at all; RunError when it cannot be."""
    with files.replacing(path, "saving the state") as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_state(path: Path, restore: Callable[[Mapping[str, np.ndarray]], T]) -> T:
    """``restore(arrays)`` of what `save_state` wrote; RunCorrupt when it is not whole or of another version."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return restore(arrays)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RunCorrupt(
            f"loading the state {path}: it is damaged or of another version ({error}); remove it, and what "
            "it held is done again"
        ) from error


class Below(Mapping[str, np.ndarray]):
    """The arrays whose names begin with a prefix, by what follows it; each is read when it is asked for."""

    def __init__(self, state: Mapping[str, np.ndarray], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._state if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _spelled(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in options.items())
