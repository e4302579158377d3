"""The neurons that run on the same tokens, and their text: all of a layer, or an expert and what is routed to it.

A neuron of an expert has no coefficient at a token that was routed elsewhere: the token is no part of its text, as if
it had not been read. So whatever is counted over positions (where a neuron is active, where a pattern is, in how many
documents, at what rate by chance) is counted over the tokens routed to the expert, for its neurons and for null units
made of it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mnemoscope.model.capture import Capture, LayerRows, Receiver, RoutedReceiver
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import NEURON, Cells, ContextBatch, NeuronId
from mnemoscope.trials.masked_text import HalfText


@dataclass(frozen=True)
class UnitPlaces:
    """All groups of a model numbered through, those of layer 0 first: a place is where units run on the same tokens.

    layer   i64[place]
    group   i64[place]      which of the layer's groups it is (`Layer.groups`): in a mixture the expert
    routed  bool[place]     whether a router chooses its tokens; a shared expert runs on all
    cells   by kind of unit how many each place has
    """

    layer: np.ndarray
    group: np.ndarray
    routed: np.ndarray
    cells: Mapping[str, Cells]

    @classmethod
    def of(cls, model: Model, nulls: Nulls | None) -> UnitPlaces:
        """Those of a model, with the units of its nulls."""
        anatomy = model.anatomy
        units = {
            (layer, group): size
            for layer, sizes in enumerate(anatomy.groups)
            for group, size in enumerate(sizes)
        }
        layer, group = np.array(list(units), np.int64).reshape(-1, 2).T
        experts = np.array([count for count, _ in anatomy.experts] or [0] * anatomy.n_layers)
        kinds = {NEURON: units} | ({} if nulls is None else dict(nulls.units))
        cells = {kind: Cells(tuple(sizes.get(place, 0) for place in units)) for kind, sizes in kinds.items()}
        return cls(layer, group, group < experts[layer], cells)

    @cached_property
    def at(self) -> dict[tuple[int, int], int]:
        """The number of each, by layer and group."""
        return {
            pair: place
            for place, pair in enumerate(zip(self.layer.tolist(), self.group.tolist(), strict=True))
        }

    def seat(self, kind: str, layer: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64: the places of units of a kind, and which of its units each is; given by layer and number there."""
        offsets = self.cells[kind].offsets
        return self.cells[kind].place(offsets[np.searchsorted(self.layer, layer)] + unit)


@dataclass(frozen=True)
class Group:
    """Neurons `first`, `first + 1` ... of a layer, `size` of them, which run on the same tokens.

    number  which of the layer's groups they are (`Layer.groups`): in a mixture the expert
    """

    model: Model
    layer: int
    number: int
    first: int
    size: int

    @classmethod
    def of(cls, model: Model, address: NeuronId) -> Group:
        """Those that run where one neuron runs."""
        sizes = model.anatomy.groups[address.layer]
        number = int(np.searchsorted(np.cumsum(sizes), address.neuron, side="right"))
        return cls(model, address.layer, number, sum(sizes[:number]), sizes[number])

    @property
    def place(self) -> tuple[int, int]:
        """Layer and number."""
        return self.layer, self.number

    @property
    def is_routed(self) -> bool:
        """Whether a router chooses their tokens; a shared expert runs on all."""
        experts = self.model.anatomy.layers[self.layer].experts
        return not self.model.anatomy.of_units and experts is not None and self.number < experts.count

    def own(self, half: HalfText, tell: Callable[[int], None]) -> HalfText:
        """The half, of which nothing counts but the tokens that these neurons run on; the model reads it to know them.

        tell  is told how many tokens were read
        """
        if not self.is_routed:
            return half
        text = half.text
        routed = np.zeros(len(text), bool)

        def note(rows: LayerRows, batch: ContextBatch) -> None:
            assert rows.rows is not None, "a router chooses these tokens"
            row = rows.rows.cpu().numpy()
            context, position = np.divmod(row[batch.counted.ravel()[row]], batch.tokens.shape[1])
            routed[text.starts[batch.contexts[context]] + position] = True

        self.read(half, lambda *_: None, note, tell)
        return replace(half, text=replace(text, counted=text.counted & routed))

    def read(
        self, half: HalfText, receive: Receiver, receive_rows: RoutedReceiver, tell: Callable[[int], None]
    ) -> None:
        """One pass over a half, as far as the layer: the whole layer is received, or the rows of these neurons."""
        done = 0

        def of_layer(layer: int, *reading: object) -> None:
            if layer == self.layer:
                receive(layer, *reading)  # type: ignore[arg-type]

        def of_experts(rows: LayerRows, batch: ContextBatch) -> None:
            for piece in rows.each() if rows.layer == self.layer else ():
                if piece.group == self.number:
                    receive_rows(piece, batch)

        with Capture(self.model, self.layer) as capture:
            for shard in range(half.plan.shards):
                for batch in half.plan.batches(shard):
                    capture.sweep(batch, of_layer, of_experts)
                    done += batch.n_tokens
                    tell(done)
