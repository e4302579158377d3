"""What one pass over a text keeps: memories of the neurons, and of the null units beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from mnemoscope.errors import ActivationError, RunMismatch
from mnemoscope.mine.statistics import Memories, below, load_state, save_state
from mnemoscope.model.capture import Coefficients, Inputs
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch

_NEURONS = "neurons"


class Mined:
    """A `State` of the loop: one `Memories` for the neurons, and one for each kind of null.

    All of them are fed in the same pass, and what is a law of `Memories` is one of this.
    """

    def __init__(self, nulls: Nulls, parts: dict[str, Memories]) -> None:
        self._nulls, self._parts = nulls, parts

    @classmethod
    def of(cls, model: Model, nulls: Nulls, top: int) -> Mined:
        """An empty one, of a model's shape, that keeps `top` triggers."""
        sizes = {_NEURONS: model.anatomy.n_neurons} | dict.fromkeys(nulls.kinds, nulls.count)
        return cls(nulls, {name: Memories(model.anatomy.n_layers, size, top) for name, size in sizes.items()})

    @property
    def neurons(self) -> Memories:
        """Those of the model's own neurons."""
        return self._parts[_NEURONS]

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
        for kind, found in self._nulls.columns(layer, batch, inputs, coefficients).items():
            try:
                self._parts[kind].update(layer, found.coefficients, batch, found.gate, found.up)
            except ActivationError as error:
                raise ActivationError(f"in the null units of kind {kind}, {error}") from error

    def finish_shard(self, shard: int) -> None:
        """All batches of shard `shard` have been given; RunError when it was in already."""
        for part in self._parts.values():
            part.finish_shard(shard)

    def merge(self, other: Mined) -> None:
        """Take in another's shards; RunError when one is in both, RunMismatch when the nulls differ."""
        if self._nulls.recipe != other._nulls.recipe:
            raise RunMismatch(
                f"merging states: their nulls are {self._nulls.recipe} and {other._nulls.recipe}; merge states "
                "of one run only"
            )
        for name, part in self._parts.items():
            part.merge(other._parts[name])

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all; RunError when it cannot be."""
        states = {name: part.state() for name, part in self._parts.items()}
        save_state(
            path, {f"{name}/{key}": array for name, state in states.items() for key, array in state.items()}
        )

    @classmethod
    def load(cls, nulls: Nulls, path: Path) -> Mined:
        """Read what `save` wrote; RunCorrupt when it is not whole, of another version or without these nulls."""

        def restored(state: Mapping[str, np.ndarray]) -> Mined:
            names = (_NEURONS, *nulls.kinds)
            return cls(nulls, {name: Memories.of(below(state, f"{name}/")) for name in names})

        return load_state(path, restored)

    def tables(self, layer: int) -> dict[str, pa.Table]:
        """The rows of one layer: `neurons` (moment columns only), `histograms` ..., and the same as `null_...`."""
        return self.neurons.results(layer) | dict(self._null_tables(layer))

    def _null_tables(self, layer: int) -> Iterator[tuple[str, pa.Table]]:
        """By (neuron, kind), and within these as they were."""
        found = {kind: self._parts[kind].results(layer) for kind in self._nulls.kinds}
        for name in dict.fromkeys(chain.from_iterable(found.values())):
            rows = pa.concat_tables(
                tables[name].add_column(0, "kind", pa.repeat(pa.scalar(kind), tables[name].num_rows))
                for kind, tables in found.items()
            )
            yield f"null_{name}", rows.take(np.argsort(rows["neuron"].to_numpy(), kind="stable"))
