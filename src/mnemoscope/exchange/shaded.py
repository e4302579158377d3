"""A card whose examples have a coefficient at each token: what a run does not keep is the model's, read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from mnemoscope.errors import QueryError
from mnemoscope.exchange import live
from mnemoscope.exchange.sides import Request
from mnemoscope.records import Progress

if TYPE_CHECKING:
    from mnemoscope.model.model import Model
    from mnemoscope.neuron.card import Example, NeuronCard
    from mnemoscope.run.reading import Run


def check(run: Run) -> None:
    """`QueryError` for a run whose contexts are read otherwise."""
    model = run.manifest.model
    if model.encoder_layers or model.experts or model.units is not None:
        raise QueryError(
            f"shading the triggers of {run.path}: neurons of dense layers that read a text by itself are shaded; "
            "give a run of such a model, or trace a text of your own"
        )


def shaded(run: Run, card: NeuronCard, model: Model, report: Callable[[Progress], None] | None) -> NeuronCard:
    """The card with the coefficients around each of its examples; at a trigger the run's own. RunMismatch for a model
    that is not the run's."""
    model.check_built(run, "shading the triggers of")
    lists = (card.positive.examples, card.negative.examples, card.between)
    every = [example for examples in lists for example in examples]
    contexts = run.contexts(sorted({example.context for example in every}))
    tokens = {context: stored.tokens for context, stored in contexts.items()}
    requests = [_request(card, example) for example in every]
    values = live.read(model, report or (lambda _: None), tokens, requests)
    made = iter([_with(example, own) for example, own in zip(every, values, strict=True)])
    positive, negative, between = (_next(made, len(examples)) for examples in lists)
    return replace(
        card,
        positive=replace(card.positive, examples=positive),
        negative=replace(card.negative, examples=negative),
        between=between,
    )


def _request(card: NeuronCard, example: Example) -> Request:
    first = example.position - len(example.before)
    return Request(card.layer, card.neuron, example.context, first, example.position + 1 + len(example.after))


def _with(example: Example, values: np.ndarray) -> Example:
    around = [float(value) for value in values]
    around[len(example.before)] = example.coefficient
    return replace(example, around=tuple(around))


def _next(made: Iterator[Example], count: int) -> tuple[Example, ...]:
    return tuple(islice(made, count))
