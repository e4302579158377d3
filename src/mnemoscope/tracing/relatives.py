"""Relatives of a neuron by weights: neurons whose values or keys lie near its own, and those before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from mnemoscope.display import Shown
from mnemoscope.records import NeuronId

RELATIONS = {
    "values": "whose value points the same way, or the opposite",
    "keys": "whose key detects the same direction, or the opposite",
    "upstream": "of earlier layers, whose value its key detects",
    "downstream": "of later layers, whose key detects its value",
}


class Chance(NamedTuple):
    """The largest |cosine| that the same search finds for others: medians over `others` of each kind.

    random  random directions
    peers   other neurons of the layer, drawn at random; one in twenty of them finds `high` or more
    """

    random: float
    peers: float
    high: float
    others: int


@dataclass(frozen=True, repr=False)
class Relatives(Shown):
    """The neurons that are nearest to one by its weights.

    lists   by each of `RELATIONS` that has any: neuron, cosine (of directions of the residual stream, after the norm
            that the key reads through), promotes (the first tokens that it writes at the sign of the cosine)
    chance  by each of these what the same search finds where there is nothing to find
    """

    model: str
    neuron: NeuronId
    lists: Mapping[str, pl.DataFrame]
    chance: Mapping[str, Chance]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "model": self.model,
            "neuron": str(self.neuron),
            "relatives": {
                name: {"chance": self.chance[name]._asdict(), "rows": rows.to_dicts()}
                for name, rows in self.lists.items()
            },
        }
