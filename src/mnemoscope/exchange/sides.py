"""One side of a neuron as the formats of other tools take it: its figures, and texts with a coefficient at each token.

The negative side is the neuron with its sign turned, -m for m, so that on either side large is strong. What a run keeps
of a text is the coefficient at the trigger; those of the tokens around it are the model's, read again (`live`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.neuron.card import NeuronCard, card
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

BEFORE, AFTER = 64, 32  # tokens around a trigger, at most
TOGETHER = 1_000  # sides whose texts are read in one pass
SIGNS = {1: "positive", -1: "negative"}


class Request(NamedTuple):
    """The coefficients of a neuron from a position of a context up to another, which is not among them."""

    layer: int
    neuron: int
    context: int
    first: int
    stop: int


Read = Callable[[Mapping[int, np.ndarray], Sequence[Request]], list[np.ndarray]]
"""Takes the tokens of contexts, i32[token], and requests; gives f32[stop - first] for each request."""


class TextPlace(NamedTuple):
    """A position of a context, and the coefficient that the run keeps of it, if it does."""

    context: int
    position: int
    coefficient: float | None = None


@dataclass(frozen=True)
class Passage:
    """A stretch of counted tokens of a context, with the coefficient of one side of a neuron at each.

    first   position of the first of them in the context
    tokens  ids; `pieces` their texts, which joined are the text, so that part of a character may be ""
    at      which of them was chosen: the trigger
    """

    context: int
    first: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    values: tuple[float, ...]
    at: int


@dataclass(frozen=True)
class NeuronSide:
    """One side of a neuron.

    top     passages around its triggers, strongest first; the value at a trigger is the run's
    random  passages around counted places drawn at random, whatever the neuron does there
    """

    card: NeuronCard
    polarity: int
    top: tuple[Passage, ...]
    random: tuple[Passage, ...] = ()

    @property
    def id(self) -> NeuronId:
        """The address of the neuron."""
        return self.card.id

    @property
    def maximum(self) -> float:
        """The largest coefficient of this side over the text of the run."""
        statistics = self.card.statistics
        return float((statistics.max if self.polarity > 0 else -(statistics.min or 0.0)) or 0.0)

    @property
    def active(self) -> float:
        """The share of tokens with a coefficient above 0; of the negative side those not above 0, without the share of
        them that is in the histogram's bin around 0."""
        positive = float(self.card.statistics.positive_fraction or 0)
        if self.polarity > 0:
            return positive
        below = sum(count for _, count in self.histogram)
        bins = zip(self.card.histogram.edges, self.card.histogram.counts, strict=False)
        around = sum(count for low, count in bins if low <= 0) - below
        return (1 - positive) * below / max(below + around, 1)

    @property
    def histogram(self) -> list[tuple[float, int]]:
        """The middles of the bins above that around 0, ascending, and how many coefficients each holds."""
        histogram, statistics = self.card.histogram, self.card.statistics
        edges = np.clip(histogram.edges, statistics.min or 0.0, statistics.max or 0.0) * self.polarity
        sides = zip(edges, edges[1:], histogram.counts, strict=False)
        return sorted((float(a + b) / 2, count) for a, b, count in sides if min(a, b) > 0)

    def moment(self, name: str) -> float | None:
        """A moment of this side over all tokens: mean, std, skewness or (excess) kurtosis."""
        value = getattr(self.card.statistics, name)
        turned = self.polarity if name in ("mean", "skewness") else 1
        return None if value is None else turned * float(value)

    def writes(self, raised: bool = True) -> list[tuple[int, float]]:
        """The tokens that this side raises most, or lowers most, and the logits that its value adds to them."""
        sign = self.polarity if raised else -self.polarity
        return [(token.id, self.polarity * token.logit) for token in self.card.writes(sign)]


@dataclass
class Reread:
    """How far the model was from the coefficients that a run keeps: how many, and the largest share of one."""

    compared: int = 0
    largest: float = 0.0

    def see(self, stored: float, again: float) -> None:
        """Compare one."""
        self.compared += 1
        self.largest = max(self.largest, abs(stored - again) / abs(stored))


@dataclass
class Sides:
    """Sides of neurons of a run, whose texts are read as they are iterated over.

    read    the coefficients of the model
    random  passages drawn at random for each side
    most    triggers of each side, at most; None for all that the run keeps
    silent  whether a side without a trigger comes, too; else it is left out
    """

    run: Run
    wanted: Sequence[tuple[NeuronId, int]]
    read: Read
    random: int = 0
    most: int | None = None
    silent: bool = False
    reread: Reread = field(default_factory=Reread)
    _cards: dict[NeuronId, NeuronCard] = field(default_factory=dict)

    def __iter__(self) -> Iterator[NeuronSide]:
        """Each side in the order of `wanted`."""
        for start in range(0, len(self.wanted), TOGETHER):
            yield from self._together(self.wanted[start : start + TOGETHER])

    def _together(self, wanted: Sequence[tuple[NeuronId, int]]) -> Iterator[NeuronSide]:
        places = {side: self._triggers(*side) for side in wanted}
        places = {side: triggers for side, triggers in places.items() if triggers or self.silent}
        drawn = {side: self._drawn(*side) for side in places}
        contexts = self.run.contexts(
            sorted({place.context for each in (places, drawn) for all_ in each.values() for place in all_})
        )
        tokens = {context: stored.tokens for context, stored in contexts.items()}
        jobs = [
            (
                side,
                place,
                Request(*side[0], place.context, *self._around(tokens[place.context], place.position)),
            )
            for side in places
            for place in (*places[side], *drawn[side])
        ]
        values = self.read(tokens, [request for *_, request in jobs])
        passages: dict[tuple[NeuronId, int], list[Passage]] = {side: [] for side in places}
        for (side, place, request), numbers in zip(jobs, values, strict=True):
            passages[side].append(
                self._passage(tokens[place.context], place, request, numbers * side[1], side[1])
            )
        for side, read in passages.items():
            count = len(places[side])
            yield NeuronSide(self._card(side[0]), side[1], tuple(read[:count]), tuple(read[count:]))

    def _card(self, neuron: NeuronId) -> NeuronCard:
        """The card of a neuron, kept from its first side to its second."""
        known = self._cards.pop(neuron, None)
        if known is None:
            known = self._cards[neuron] = card(self.run, neuron, examples=0)
        return known

    def _triggers(self, neuron: NeuronId, polarity: int) -> list[TextPlace]:
        rows = self.run.rows("triggers", *neuron).filter(pl.col("polarity") == polarity).sort("rank")
        rows = rows if self.most is None else rows.head(self.most)
        return [TextPlace(*row) for row in rows.select("context", "position", "coefficient").iter_rows()]

    def _drawn(self, neuron: NeuronId, polarity: int) -> list[TextPlace]:
        """Places by a generator of this side alone; a context without a counted token has none."""
        if not self.random:
            return []
        ids = self.run.once("ids of contexts", lambda: self.run.table("contexts").select("context").collect())
        generator = np.random.default_rng([*neuron, polarity + 1])
        count = min(self.random, ids.height)
        chosen = generator.choice(ids["context"].to_numpy(), count, replace=False)
        places = []
        for context, stored in self.run.contexts(chosen.tolist()).items():
            counted = np.flatnonzero(self._counted(stored.tokens))
            if len(counted):
                places.append(TextPlace(context, int(generator.choice(counted))))
        return places

    def _counted(self, tokens: np.ndarray) -> np.ndarray:
        """bool[token]: all but position 0 and special tokens, of which a run keeps nothing."""
        return (np.arange(len(tokens)) > 0) & ~np.isin(tokens, self.run.manifest.options["special"])

    def _around(self, tokens: np.ndarray, position: int) -> tuple[int, int]:
        """From where to where the tokens around a position are counted, at most so many on each side."""
        never = np.flatnonzero(~self._counted(tokens))
        first = max(position - BEFORE, int(never[never < position].max(initial=-1)) + 1)
        stop = min(position + AFTER + 1, int(never[never > position].min(initial=len(tokens))))
        return first, stop

    def _passage(
        self, tokens: np.ndarray, place: TextPlace, request: Request, values: np.ndarray, polarity: int
    ) -> Passage:
        at, ids = place.position - request.first, tokens[request.first : request.stop].tolist()
        numbers = (values + 0.0).tolist()  # 0 with its sign turned is 0
        if place.coefficient is not None:
            stored = place.coefficient * polarity
            self.reread.see(stored, numbers[at])
            numbers[at] = stored
        pieces = self.run.vocabulary.pieces(ids)
        return Passage(place.context, request.first, tuple(ids), tuple(pieces), tuple(numbers), at)
