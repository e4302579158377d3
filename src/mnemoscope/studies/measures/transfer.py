"""Ten neurons chosen on one prefix, scored on another with the same prediction (A44, A48).

Ten that are chosen and scored on the same sentence would raise anything: the score is what they were chosen by. Two
prefixes of different documents whose predictions are the same token make a pair. The null goes through the same
choice: ten that were chosen on a prefix with another prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.prediction.bases import ResidualBases
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.studies.measures.positions import Work

CHOICES = ("increase", "coefficient", "weight", "rank")  # ways of choosing neurons (A44)
CHOSEN = (*(f"by_{choice}" for choice in CHOICES), "unhelpful_top")
KINDS = ("same", "other")  # prediction of the prefix on which neurons are chosen
TABLE = "contribution_pairs"


def scores(
    bases: ResidualBases, sums: Float[Tensor, "layer sum width"], names: Sequence[str]
) -> dict[str, Float[Tensor, " layer"]]:
    """What each sum does to log p where its layer adds it, and to the logit above the mean token's; NaN as it is."""
    known = ~sums[..., 0].isnan()
    base = 2 * torch.arange(len(sums))[:, None].expand(known.shape) + 1
    columns: dict[str, Tensor] = {}
    for suffix, read in (("", bases.increases), ("_logit", bases.above_mean)):
        values = torch.full(known.shape, torch.nan, dtype=torch.float64)
        values[known] = read(sums[known], base[known])
        columns |= {f"{name}{suffix}": values[:, column] for column, name in enumerate(names)}
    return columns


@dataclass(frozen=True)
class Pairs:
    """For each example those on whose prefixes neurons are chosen for it; -1 where there is none.

    same   i64[example]: of another document, with the same prediction: the next one, and behind the last the first
    other  i64[example]: of another document, with another prediction; only where there is one of the same
    """

    same: np.ndarray
    other: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, documents: np.ndarray, seed: int) -> Pairs:
        """From the prediction and the document of every example."""
        same, other = np.full(len(tokens), -1), np.full(len(tokens), -1)
        for token in np.unique(tokens):
            members = np.flatnonzero(tokens == token)
            for place, example in enumerate(members):
                following = np.roll(members, -place - 1)[:-1]
                away = following[documents[following] != documents[example]]
                if not len(away):
                    continue
                same[example] = away[0]
                far = np.flatnonzero((tokens != token) & (documents != documents[example]))
                if len(far):
                    other[example] = np.random.default_rng([seed, int(example), 2]).choice(far)
        return cls(same, other)

    def partners(self, example: int) -> dict[str, int]:
        """By kind, those that there are."""
        partners = {kind: int(getattr(self, kind)[example]) for kind in KINDS}
        return {kind: partner for kind, partner in partners.items() if partner >= 0}


def transferred(
    pairs: Pairs, chosen: pl.DataFrame, read: Callable[[int], TracedPrediction], work: Work
) -> list[pa.Table]:
    """The table `contribution_pairs` (docs/format.md).

    chosen  example, layer, choice, neuron: which neurons were chosen on each prefix
    read    traces the prefix of an example
    """
    sets = {
        example: {
            (layer, choice): rows["neuron"].to_numpy()
            for (layer, choice), rows in of_example.group_by("layer", "choice")
        }
        for (example,), of_example in chosen.group_by("example")
    }

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        parts = []
        for example in numbers.tolist():
            if partners := pairs.partners(example):
                prediction = read(example)
                parts += [
                    _scored(prediction, example, kind, partner, sets[partner])
                    for kind, partner in partners.items()
                ]
        columns = {
            name: np.concatenate([rows[name] for rows in parts]) if parts else np.empty(0)
            for name in SCHEMAS[TABLE].names
        }
        return {TABLE: arrow_table(TABLE, columns)}

    return work.shards(pairs.same, shard, "neurons chosen elsewhere")[TABLE]


def _scored(
    prediction: TracedPrediction,
    example: int,
    kind: str,
    partner: int,
    chosen: Mapping[tuple[int, str], np.ndarray],
) -> dict[str, np.ndarray]:
    width = prediction.points.shape[1]
    sums = torch.full((prediction.layers, len(CHOSEN), width), torch.nan)
    for layer in range(prediction.layers):
        for place, name in enumerate(CHOSEN):
            if (neurons := chosen.get((layer, name))) is not None:
                index = torch.from_numpy(neurons.astype(np.int64))
                sums[layer, place] = prediction.stream.neuron_parts(layer, prediction.position, index).sum(0)
    fixed = {"example": example, "kind": kind, "partner": partner}
    columns = {name: np.full(prediction.layers, value) for name, value in fixed.items()}
    columns["layer"] = np.arange(prediction.layers)
    return columns | {
        name: column.cpu().numpy() for name, column in scores(prediction.bases, sums, CHOSEN).items()
    }
