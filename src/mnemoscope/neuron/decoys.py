"""Neurons against decoys of their own: which do something that a decoy does not, at a bound on false discoveries.

Every neuron has a decoy (`model.nulls`, kinds of `DECOYS`) that was searched, held out, read and tested exactly as the
neuron was. A neuron *wins* when its figure is larger than its decoy's, by a margin. If there is nothing about a neuron
that its decoy lacks, either is as likely to win, whatever the margin: so as many such neurons win by a margin as
decoys do, and the decoys can be counted. The estimate (1 + decoys) / neurons among those that win by at least some
margin is the knockoff+ of Barber and Candès (2015): choosing the least margin at which it is below a level keeps the
expected share of false discoveries below that level, however many neurons are asked and whatever their figures are,
provided that the coins of different neurons are independent. With several decoys to a neuron the best of them wins,
and (1 + decoys) is divided by their number (Gimenez and Zou 2019).

    judged_alike(kinds)     the kinds of unit whose verdicts may stand beside those of neurons
    rates(own, decoys)      f64[unit]: the level from which each neuron is a discovery (a q-value)
    f1_without(...)         f64[1 + group claim]: F1 without some of the documents, for `Excess`
    Excess                  neurons that reach a figure less decoys that do, with an interval over documents
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from mnemoscope.arguments import DECOYS
from mnemoscope.intervals import GROUPS, Estimate, jackknife

LEVELS = (0.05, 0.10, 0.20)  # of false discoveries at which results are told
FIGURES = (0.25, 0.5, 0.75)  # of F1, from which on units are counted


def judged_alike(kinds: Iterable[str]) -> list[str]:
    """Those kinds of null, in order, whose units are given a verdict as neurons are.

    Where there are decoys, only these: neurons are then judged against decoys, other pseudo-neurons against a bar.
    """
    nulls = list(kinds)
    return [kind for kind in nulls if kind in DECOYS] or nulls


def margins(own: np.ndarray, decoys: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """bool[unit] whether the neuron wins, f64[unit] by how much the winner is ahead of the next.

    own     f64[unit]        a figure of each neuron, at least 0 (0 for one of which nothing is claimed)
    decoys  f64[unit kind]   the same figure of its decoys
    seed    of the coins that are thrown for equals; their margin is 0, and says nothing
    """
    scores = np.concatenate([own[:, None], decoys], 1)
    coins = np.random.default_rng([seed, len(own)]).random(scores.shape)
    order = np.lexsort((coins, scores), axis=-1)
    first, second = (np.take_along_axis(scores, order[:, -place, None], 1)[:, 0] for place in (1, 2))
    return order[:, -1] == 0, first - second


def rates(own: np.ndarray, decoys: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The least level at which each unit is a discovery, f64[unit] of neurons and of the best decoys; 1 at most, and 1
    for those that do not win. Of a decoy it is the level at which it is taken for one: so many are expected to be
    wrong. Arguments as of `margins`."""
    wins, margin = margins(own, decoys, seed)
    counted = np.flatnonzero(margin > 0)
    order = counted[np.argsort(-margin[counted], kind="stable")]
    won, lost = np.cumsum(wins[order]), np.cumsum(~wins[order])
    share = (1 + lost) / decoys.shape[1] / np.maximum(won, 1)
    ordered = margin[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1  # of those with the same margin
    # A smaller margin may be enough, and then the larger one is, too.
    least = np.minimum.accumulate(share[last][::-1])[::-1]
    level = np.ones(len(own))
    level[order] = np.minimum(least, 1.0)
    return np.where(wins, level, 1.0), np.where(wins, 1.0, level)


def f1_without(active: np.ndarray, both: np.ndarray, present: np.ndarray, groups: int = GROUPS) -> np.ndarray:
    """f64[1 + group claim]: F1 over all documents, and over those outside of each group of them; 0 where undefined.

    active, both, present  [claim document]: tokens; document d belongs to group d mod `groups`, as far as there are
    """
    documents = active.shape[1]
    count = min(groups, documents)
    inside = np.zeros((documents, 1 + count))
    inside[np.arange(documents), 1 + np.arange(documents) % count] = 1
    (above, below) = (
        counts.sum(1, dtype=np.float64)[:, None] - counts.astype(np.float64) @ inside
        for counts in (2 * both.astype(np.int64), active.astype(np.int64) + present)
    )
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0).T


@dataclass
class Excess:
    """How many units of each kind have a figure of at least each of `FIGURES`, over all documents and without each
    group of them.

    Intervals are `intervals.jackknife`'s over groups of documents.

    units  of a kind, with sign: what the counts are shares of
    """

    units: int
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, kind: str, figures: np.ndarray) -> None:
        """Count some claims of a kind: f64[1 + group claim] of `f1_without`, one claim a unit."""
        more = (figures[..., None] >= np.array(FIGURES)).sum(1).astype(np.float64)
        self.counts[kind] = self.counts.get(kind, 0.0) + more

    def shares(self, kind: str) -> list[Estimate]:
        """For each of `FIGURES` the share of the units of a kind that reach it, with its interval over documents."""
        return [jackknife(column) for column in self._share(kind).T]

    def over(self, own: str, decoy: str) -> list[Estimate]:
        """For each of `FIGURES` the share of neurons that reach it less that of decoys."""
        return [jackknife(column) for column in (self._share(own) - self._share(decoy)).T]

    def _share(self, kind: str) -> np.ndarray:
        none = np.zeros((1, len(FIGURES)))
        return np.asarray(self.counts.get(kind, none)) / self.units
