"""What a prediction loses without many neurons at once, chosen over all layers by a score (A79; Yu and Ananiadou 2024).

The coefficients of a group become zero at the last token, in a forward pass in which everything downstream reacts.
Beside each group stands its null: for every neuron of it another of the same layer that writes about as much,
|m| |v|. What both lose alike is owed to how much was written, and not to who wrote it.

    increase     C, what the neuron adds to the target's log-probability where it is added (frozen lens; A38)
    weight       |m| |v|, how much it writes; no group that matches it is as strong
    coefficient  |m|
    standing     how far the target is above the mean token in what it writes, in standard deviations over the
                 vocabulary: a stand-in for the target's rank, for which all values would have to be read
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.prediction.ablate import Cut, without
from mnemoscope.prediction.bases import Geometry
from mnemoscope.prediction.search import IntervalSurvey
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Cells
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures.contributions import TOP, quotients
from mnemoscope.studies.measures.positions import Examples, Sizes, Work, sample
from mnemoscope.text.vocabulary import Vocabulary

SCORES = ("increase", "weight", "coefficient", "standing")
GROUPS = (10, 100, 300)  # neurons

_NEAREST = 5  # free neurons of the layer among which the one that stands in is drawn
_FEWEST = 24  # sentences, where the text has as many
_SENTENCES = 16  # of `sizes.sentences` for each that is read here
_SHARD = 8  # examples

Scores = dict[str, Float[np.ndarray, " cell"]]


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, Iterable[pa.Table]]:
    """The table `group_ablations` (docs/format.md)."""
    count = max(_FEWEST, sizes.sentences // _SENTENCES)
    examples = sample(run, count, longest=sizes.longest, seed=sizes.seed)
    with torch.inference_mode():
        scoring = Scoring.of(model, run.vocabulary)

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        tables = []
        for number in numbers.tolist():
            generator = np.random.default_rng([sizes.seed, number])
            columns = losses(scoring, examples.prefixes[number], generator)
            tables.append(arrow_table("group_ablations", _which(examples, number) | columns))
        return {"group_ablations": pa.concat_tables(tables)}

    with torch.inference_mode():
        return work.shards(examples, shard, "groups of neurons", size=_SHARD)


def _which(examples: Examples, number: int) -> dict[str, Any]:
    return {
        "example": number,
        "document": int(examples.documents[number]),
        "context": int(examples.contexts[number]),
        "position": int(examples.positions[number]),
    }


@dataclass(frozen=True, eq=False)
class Scoring:
    """A model and what is known of its values before any sentence."""

    model: Model
    lens: Lens
    words: Vocabulary
    geometry: Geometry
    quotients: Sequence[Tensor] | None  # as `contributions.quotients`

    @classmethod
    def of(cls, model: Model, words: Vocabulary) -> Scoring:
        """Under the frozen lens."""
        lens = Lens.of(model.anatomy, "frozen")
        geometry = Geometry(lens.unembedding)
        return cls(model, lens, words, geometry, quotients(model, lens, geometry))

    def scores(self, prediction: TracedPrediction) -> tuple[Scores, Float[np.ndarray, " cell"]]:
        """Every score of every neuron at the last token, the largest to be chosen; and |m| |v|."""
        surveyed = IntervalSurvey(prediction.bases, TOP)(prediction.groups("neurons"), self.quotients)
        coefficients = [layer.coefficients[prediction.position].float() for layer in prediction.stream.layers]
        written = [
            prediction.stream.neuron_parts(layer, prediction.position) for layer in range(prediction.layers)
        ]
        weight = torch.cat([vectors.square().sum(-1).sqrt() for vectors in written])
        standing = [self._standing(vectors, prediction.target) for vectors in written]
        scores = {
            "increase": torch.cat([intervals.likely for intervals in surveyed]),
            "weight": weight,
            "coefficient": torch.cat(coefficients).abs(),
            "standing": torch.cat(standing),
        }
        return {name: score.cpu().double().numpy() for name, score in scores.items()}, weight.cpu().numpy()

    def _standing(self, vectors: Float[Tensor, "neuron width"], token: int) -> Float[Tensor, " neuron"]:
        """(logit of the token - mean logit) / standard deviation over the vocabulary; least for who writes nothing."""
        weighted = self.lens.weighted(vectors) * (-1.0 if self.lens.multiplier < 0 else 1.0)
        size = weighted.square().sum(-1).sqrt()
        above = weighted @ (self.geometry.unembedding[token] - self.geometry.centre)
        spread = (self.geometry.quotient(weighted) / len(self.geometry.unembedding)).clamp_min(
            0
        ).sqrt() * size
        return torch.where(size > 0, above / spread.clamp_min(1e-30), -torch.inf)


def losses(scoring: Scoring, prefix: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of `group_ablations` for one prefix, without those that say which: the whole model first."""
    model = scoring.model
    tokens = torch.from_numpy(prefix.astype(np.int64))[None].to(model.device)
    stream = model.traced(tokens)
    target = int(stream.logits[-1].argmax())
    prediction = TracedPrediction(stream, scoring.lens, target, (), scoring.words, scoring.geometry)
    scores, weight = scoring.scores(prediction)
    names, groups = ["none"], [np.zeros((0, 2), np.int64)]
    kinds, sizes = ["whole"], [0]
    for name, score in scores.items():
        for size in sizes_of(len(score)):
            group = top(score, model.cells, size)
            for kind, members in (
                ("own", group),
                ("matched", matched(group, weight, model.cells, generator)),
            ):
                names.append(name)
                kinds.append(kind)
                sizes.append(size)
                groups.append(members)
    return {
        "token": np.full(len(groups), target),
        "score": np.array(names),
        "kind": np.array(kinds),
        "neurons": np.array(sizes),
        "strength": np.array([weight[model.cells.cell(*group.T)].sum() / weight.sum() for group in groups]),
        **_told(model, stream, target, groups),
    }


def _told(
    model: Model, stream: Stream, target: int, groups: Sequence[np.ndarray]
) -> dict[str, Float[np.ndarray, " group"]]:
    """The target's log-probability, logit above the mean token, and rank without each group.

    Each is shifted by what its own batch differs from the first where nothing is taken out, which is nothing but
    rounding, so that a loss is never one between batches.
    """
    cuts = [[Cut(layer, neuron) for layer, neuron in group.tolist()] for group in groups]
    rows: list[tuple[float, float, int]] = []
    first: tuple[float, float, int] | None = None
    for whole, batch in without(model, stream, cuts):
        before = _of_target(whole, target)
        first = first or before
        for after in (_of_target(cut, target) for cut in batch):
            rows.append((after[0] - before[0] + first[0], after[1] - before[1] + first[1], after[2]))
    log_p, logit, place = zip(*rows, strict=True)
    return {"log_probability": np.array(log_p), "logit": np.array(logit), "rank": np.array(place)}


def _of_target(logits: Tensor, target: int) -> tuple[float, float, int]:
    logits = logits.double()
    above = int((logits > logits[target]).sum())
    return float(logits.log_softmax(-1)[target]), float(logits[target] - logits.mean()), above


def sizes_of(neurons: int) -> list[int]:
    """Sizes of groups that leave at least as many neurons as they take; in a small model the half is the largest."""
    most = neurons // 2
    return sorted({min(size, most) for size in GROUPS})


def top(score: Float[np.ndarray, " cell"], cells: Cells, size: int) -> np.ndarray:
    """i64[neuron, 2]: layer and number of those with the largest score, no more than half of any layer.

    Ties go to the lower layer and number.
    """
    order = np.argsort(-score, kind="stable")
    layer = cells.layer(order)
    taken = np.zeros(len(order), np.int64)
    for number in cells.layers:
        places = np.flatnonzero(layer == number)
        taken[places] = np.arange(len(places))
    half = np.array(cells.sizes)[layer] // 2
    return np.stack(cells.place(order[taken < half][:size]), 1)


def matched(
    group: np.ndarray, weight: Float[np.ndarray, " cell"], cells: Cells, generator: np.random.Generator
) -> np.ndarray:
    """i64[neuron, 2]: for each of the group another neuron of its layer, none twice, drawn among the five that are free
    and write most nearly as much; the strongest of the group choose first."""
    stand_ins = np.empty_like(group)
    for layer in np.unique(group[:, 0]):
        places, of_layer = np.flatnonzero(group[:, 0] == layer), weight[cells.of(layer)]
        places = places[np.argsort(-of_layer[group[places, 1]], kind="stable")]
        free = np.setdiff1d(np.arange(len(of_layer)), group[places, 1])
        for place in places:
            away = np.abs(of_layer[free] - of_layer[group[place, 1]])
            near = np.argsort(away, kind="stable")[:_NEAREST]
            drawn = int(near[generator.integers(len(near))])
            stand_ins[place] = layer, free[drawn]
            free = np.delete(free, drawn)
    return stand_ins
