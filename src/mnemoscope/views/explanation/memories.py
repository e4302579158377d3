"""What a run knows of the neurons of an explanation: their strongest triggers and how peaked they are."""

from __future__ import annotations

from collections.abc import Mapping

from mnemoscope.analyses.neuron import NeuronCard, card
from mnemoscope.errors import RunError
from mnemoscope.records import NeuronId
from mnemoscope.store import open_run
from mnemoscope.views.explanation.sheet import Memory

TRIGGERS = 2
WINDOW = (24, 4)  # tokens of text before and after


def of(run: str | None, coefficients: Mapping[NeuronId, float]) -> tuple[dict[NeuronId, Memory], str]:
    """Each neuron's triggers of the sign that its coefficient has here; and what went wrong, or "".

    A run may have moved since the explanation was made; then there is nothing, and a note.
    """
    if run is None:
        return {}, ""
    try:
        opened = open_run(run)
        found = {
            neuron: _memory(card(opened, neuron, examples=TRIGGERS, window=WINDOW), coefficient)
            for neuron, coefficient in coefficients.items()
        }
    except RunError as error:
        return {}, f"triggers are left out: {error}"
    return found, ""


def _memory(found: NeuronCard, coefficient: float) -> Memory:
    side = found.positive if coefficient >= 0 else found.negative
    own, usual = found.statistics, found.layer_median
    return Memory(own.kurtosis, usual.kurtosis, own.max if coefficient >= 0 else own.min, side.examples)
