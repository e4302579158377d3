"""What a model writes when one neuron is changed, beside what it writes as it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mnemoscope.arguments import check_least, check_seed
from mnemoscope.display import Shown
from mnemoscope.errors import QueryError
from mnemoscope.records import NeuronId

DOING = "steering"
LARGEST = 1e6  # of a factor or a value


def check_change(factor: float, value: float, length: int, seed: int = 0) -> None:
    """QueryError for a change that is none, and for a text without tokens."""
    check_least(DOING, 1, length=length)
    check_seed(seed)
    if not (math.isfinite(factor) and math.isfinite(value)) or max(abs(factor), abs(value)) > LARGEST:
        raise QueryError(
            f"{DOING} a neuron: {{factor}} and {{value}} are to be numbers up to a million",
            factor=factor,
            value=value,
        )


@dataclass(frozen=True)
class SteeredText:
    """One continuation: its tokens as text, the probability of each in its own pass, and whether the model ended it.

    neuron  the one that was changed; None: as it is
    shared  how many tokens it begins with that the model writes as it is, too
    """

    neuron: NeuronId | None
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]
    ended: bool
    shared: int


@dataclass(frozen=True, repr=False)
class Steered(Shown):
    """The most probable token, one after the other, with the coefficient of a neuron changed at every position.

    factor, value  the coefficient becomes ``factor`` times what it was, plus ``value``
    whole          as the model is
    changed        with the neuron changed
    control        with another neuron of the layer changed, which was drawn at random
    """

    model: str
    prompt: str
    neuron: NeuronId
    factor: float
    value: float
    whole: SteeredText
    changed: SteeredText
    control: SteeredText | None

    @property
    def texts(self) -> tuple[SteeredText, ...]:
        """All continuations."""
        return tuple(text for text in (self.whole, self.changed, self.control) if text is not None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        texts = {
            name: None if text is None else asdict(text) | {"neuron": text.neuron and str(text.neuron)}
            for name in ("whole", "changed", "control")
            for text in [getattr(self, name)]
        }
        return {name: getattr(self, name) for name in ("model", "prompt", "factor", "value")} | {
            "neuron": str(self.neuron),
            **texts,
        }
