"""A trace holds the coefficients of neurons along a text, and how unusual these are by the run's own distributions.

A coefficient x of a neuron is judged by the neuron's stored histogram of T coefficients, counted on the run's text:

    above = (1 + counts in x's bin and in those above it) / (1 + T)        below likewise
    tail  = min(1, 2 min(above, below))

A whole bin counts as being as far out as x, so `tail` is never too small; on text like the run's it falls below a level
in at most that share of cases, and it cannot fall below 2 / (1 + T). Of N neurons, N x tail or fewer are as unusual at
any one token by chance (`NeuronReading.expected`): the most unusual of thousands always looks unusual. What beats
chance shows in `Trace.shares`, beside the same share of the run's pseudo-neurons.

In a mixture of experts a neuron has a reading where the router chose its expert, T are the coefficients of its own
histogram, and N are the neurons that run at an ordinary token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.display import Shown
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.run.reading import Run

LEVEL = 0.001  # of the tails whose share is compared with that of pseudo-neurons, or the least that the run can show


@dataclass(frozen=True)
class TracedToken:
    """A token of the text: `counted` is false for position 0 and special tokens, which no distribution holds."""

    position: int
    token: int
    text: str
    counted: bool


@dataclass(frozen=True)
class NeuronReading:
    """A coefficient of a neuron at a token.

    tail        as the module says; None without a run, and where the token does not count
    expected    neurons of the model that are as unusual at a token by chance, at most
    deviations  (coefficient - mean) / standard deviation on the run's text; None where that is 0, or without a run
    trigger     whether it is at least as strong as the weakest stored trigger of its sign
    size        |coefficient| x norm of the value, in an expert x `weight`: how much is written
    gate, up    signs of the two branches of a gated neuron, else None
    weight      of the router, in an expert; None in a dense layer
    """

    neuron: NeuronId
    position: int
    coefficient: float | None  # None where the token was not routed to the neuron's expert
    tail: float | None = None
    expected: float | None = None
    deviations: float | None = None
    trigger: bool | None = None
    size: float | None = None
    gate: int | None = None
    up: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class NeuronTrace:
    """One neuron along the text: the tokens that its value promotes and suppresses, and a reading for each token that
    its stack reads.

    card  what the run knows of it (without examples), None without a run
    """

    neuron: NeuronId
    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    readings: tuple[NeuronReading, ...]
    card: NeuronCard | None = None


@dataclass(frozen=True)
class Unusual:
    """A reading that stands out at its token, and the first tokens that it writes (with its sign)."""

    reading: NeuronReading
    writes: tuple[str, ...]


class Encoded(NamedTuple):
    """How many of an encoder-decoder's tokens and layers are its encoder's, the first; and neurons of its decoder."""

    tokens: int
    layers: int
    decoder_units: int


@dataclass(frozen=True, repr=False)
class Trace(Shown):
    """A trace of neurons along a text.

    neurons  the neurons that were asked for
    unusual  if none were: for each token the most unusual ones, first by `tail`, then by |deviations|, then by address;
             without a run, those that write most (`NeuronReading.size`); empty where the token does not count
    shares   for each token, by kind of unit (`neuron`, and the run's pseudo-neurons), the share of units whose tail is
             at most `level`; None where the token does not count
    counted  coefficients in each histogram: T; in a mixture in the fullest
    encoded  of an encoder-decoder, whose encoder reads the text, and whose decoder the tokens behind it
    """

    model: str
    run: str | None
    corpus: str | None
    text: str
    tokens: tuple[TracedToken, ...]
    neurons: tuple[NeuronTrace, ...]
    unusual: tuple[tuple[Unusual, ...], ...]
    shares: Mapping[str, tuple[float | None, ...]]
    level: float | None
    counted: int | None
    units: int  # neurons of the model, or its encoder; of a mixture with a run those that run at a token, on average
    routed: bool = False  # whether that is so
    encoded: Encoded | None = None

    def read_by(self, neuron: tuple[int, int]) -> range:
        """The positions of the tokens that the stack of a neuron reads."""
        if self.encoded is None:
            return range(len(self.tokens))
        first = self.encoded.tokens
        return range(first) if neuron[0] < self.encoded.layers else range(first, len(self.tokens))

    def units_at(self, position: int) -> int:
        """How many neurons run at a token."""
        if self.encoded is None or position < self.encoded.tokens:
            return self.units
        return self.encoded.decoder_units

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values: neurons by their address, without the cards."""
        neurons = [
            {
                "neuron": str(entry.neuron),
                "promotes": entry.promotes,
                "suppresses": entry.suppresses,
                "readings": [_plain(reading) for reading in entry.readings],
            }
            for entry in self.neurons
        ]
        unusual = [
            [_plain(entry.reading) | {"writes": entry.writes} for entry in readings]
            for readings in self.unusual
        ]
        facts = ("model", "run", "corpus", "text", "level", "counted", "units")
        encoded = None if self.encoded is None else self.encoded._asdict()
        return {name: getattr(self, name) for name in facts} | {
            "encoded": encoded,
            "tokens": [asdict(token) for token in self.tokens],
            "neurons": neurons,
            "unusual": unusual,
            "shares": dict(self.shares),
        }


def _plain(reading: NeuronReading) -> dict[str, Any]:
    return asdict(reading) | {"neuron": str(reading.neuron)}


@dataclass(frozen=True)
class Distributions:
    """The stored distributions of the units of one layer, of one kind.

    counts  i64[unit bin], `edges` f64[bin - 1] the inner edges, ascending
    mean, std  f64[unit]
    """

    counts: np.ndarray
    edges: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, run: Run, layer: int, kind: str | None = None) -> Distributions:
        """The distributions of the neurons of a layer, or of its pseudo-neurons of a kind."""
        prefix = "" if kind is None else "null_"
        chosen = pl.col("layer") == layer
        if kind is not None:
            chosen &= pl.col("kind") == kind
        counts, moments = (
            run.table(prefix + name).filter(chosen).sort("neuron").select(columns).collect()
            for name, columns in (("histograms", ["counts"]), ("neurons", ["mean", "std"]))
        )
        flat = counts["counts"].explode().to_numpy()
        edges = np.asarray(run.manifest.options["histogram_edges"], np.float64)
        mean, std = (moments[name].cast(pl.Float64).to_numpy() for name in ("mean", "std"))
        return cls(flat.reshape(counts.height, len(edges) + 1), edges, mean, std)

    def only(self, units: np.ndarray | slice) -> Distributions:
        """Those of some units."""
        return Distributions(self.counts[units], self.edges, self.mean[units], self.std[units])

    @property
    def total(self) -> int:
        """Coefficients in each histogram, or in the fullest."""
        return int(self.counts.sum(1).max(initial=0))

    def tails(self, coefficients: np.ndarray) -> np.ndarray:
        """f64[token unit] of coefficients f32[token unit]: see the module."""
        upto = np.cumsum(self.counts, axis=1)
        unit = np.arange(len(self.counts))
        index = self.bins(coefficients)
        total = upto[:, -1]
        below = upto[unit, index]
        above = total - below + self.counts[unit, index]
        return np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (1 + total))

    def bins(self, coefficients: np.ndarray) -> np.ndarray:
        """The bin of each coefficient: it holds its edge nearer to zero, and not the other."""
        right = np.searchsorted(self.edges, coefficients, side="right")
        return np.where(coefficients < 0, np.searchsorted(self.edges, coefficients, side="left"), right)

    def deviations(self, coefficients: np.ndarray) -> np.ndarray:
        """f64[token unit]: standard deviations from the mean, infinite where a neuron that never varied does."""
        with np.errstate(divide="ignore", invalid="ignore"):
            far = (coefficients - self.mean) / self.std
        return np.where(np.isnan(far), 0.0, far)
