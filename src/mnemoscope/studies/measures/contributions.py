"""Who makes a prediction, in nats, over many sentences (Yu et al. 2023, 4.1-4.4 and D; A36-A49, A58-A65).

Each prefix is traced once. Its target is what the model predicts. Beside it stands a null: another token, about as
frequent in the corpus, asked of the same residuals and neurons: some neurons help any token, and ten chosen for it
raise it. Sub-values of the prediction's neurons are surveyed (`IntervalSurvey`): evaluated where they are among the
ten most helpful or unhelpful of a layer, and certified intervals with an estimate for the rest. Neurons are helpful or
unhelpful by their estimates; how many are so for certain stands beside.

Log-probabilities saturate: what is nearly certain cannot be raised by much. So beside every increase by a sum stands
what the sum does to the target's logit, above the mean token's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.mine.values import value_vectors
from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.model import Model
from mnemoscope.prediction.bases import ROUNDING, Geometry, ResidualBases, norms
from mnemoscope.prediction.search import Intervals, IntervalSurvey
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures.crosslayer import Columns, RankedNeurons, crosslayer
from mnemoscope.studies.measures.positions import Examples, Sizes, Work, sample
from mnemoscope.studies.measures.reductions import log_sums
from mnemoscope.studies.measures.transfer import CHOICES, Pairs, scores, transferred
from mnemoscope.studies.measures.value_ranks import ValueRanks
from mnemoscope.text.vocabulary import Vocabulary

TARGETS = ("model", "null")  # and `gold`, the token that really follows, on request
TOP = 10  # most helpful, most unhelpful neurons of a layer; neurons in each row of Table 1
SUMS = (
    *("helpful_all", "helpful_top", "unhelpful_all", "unhelpful_top"),
    *("helpful_all_certain", "unhelpful_all_certain"),
    *(f"by_{choice}" for choice in CHOICES),
)
_CHOSEN = "chosen"  # kept with the tables of a shard, and in none of a run

_STEPS = 16  # sums of helpful neurons, from the least helpful on (A40)
_SUMMED = 6  # layers in which they are taken
_NEAR = 10  # places in the order of frequency within which a null token is drawn
_EXAMPLES = 16  # of a shard
_TABLES = (
    "contribution_examples",
    "contribution_points",
    "contribution_layers",
    "contribution_neurons",
    "contribution_sums",
    "cross_queries",
    "cross_layers",
)

Rows = dict[str, list[Columns]]


def measure(
    run: Run,
    model: Model,
    sizes: Sizes,
    work: Work,
    *,
    lens: str = "frozen",
    targets: Sequence[str] = TARGETS,
) -> Mapping[str, Iterable[pa.Table]]:
    """The tables `contribution_*` and `cross_*` (docs/format.md) of one position of each of some contexts.

    lens     under which increases are taken; the stream is read under all three
    targets  `model` first; `null` and `gold` are asked the same
    """
    examples = sample(run, sizes.sentences, longest=sizes.longest, seed=sizes.seed)
    survey = ContributionSurvey.of(model, run.vocabulary, lens, sizes.sentences // 10, work)
    others = Frequencies.of(run)

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        rows: Rows = {name: [] for name in (*_TABLES, _CHOSEN)}
        for number in numbers.tolist():
            followed = {"gold": int(examples.targets[number])}
            columns = survey.example(
                examples.prefixes[number],
                followed,
                targets,
                others.near(sizes.seed, number),
                np.random.default_rng([sizes.seed, number, 1]),
            )
            for name, parts in columns.items():
                rows[name] += [_of(examples, number, name, part) for part in parts]
        chosen = pa.table(_joined(rows.pop(_CHOSEN)))
        return {name: arrow_table(name, _joined(parts)) for name, parts in rows.items()} | {_CHOSEN: chosen}

    def read(number: int) -> TracedPrediction:
        return survey.traced(examples.prefixes[number])

    with torch.inference_mode():
        tables: dict[str, list[pa.Table]] = work.shards(examples, shard, "contributions", size=_EXAMPLES)
        chosen = pl.concat(pl.DataFrame(pl.from_arrow(rows)) for rows in tables.pop(_CHOSEN))
        main = pl.concat(pl.DataFrame(pl.from_arrow(rows)) for rows in tables["contribution_examples"])
        main = main.filter(target="model").sort("example")
        pairs = Pairs.of(main["token"].to_numpy(), main["document"].to_numpy(), sizes.seed)
        folder = work.folder / "pairs"
        folder.mkdir(exist_ok=True)
        tables["contribution_pairs"] = transferred(pairs, chosen, read, Work(folder, work.report))
        return tables


@dataclass(frozen=True)
class Frequencies:
    """Tokens in the order of how often the corpus has them.

    tokens  i64[place], rarest first; special tokens and those that never occur left out
    """

    tokens: np.ndarray

    @classmethod
    def of(cls, run: Run) -> Frequencies:
        """Of all contexts."""
        special = run.manifest.options.get("special", [])
        counts = (
            run.table("contexts")
            .select(pl.col("tokens").explode().alias("token"))
            .group_by("token")
            .len()
            .filter(~pl.col("token").is_in(special))
            .sort("len", "token")
            .collect()
        )
        return cls(counts["token"].to_numpy().astype(np.int64))

    def near(self, seed: int, example: int) -> Callable[[int], int]:
        """A token drawn among those about as frequent as a given one, and another."""

        def other(token: int) -> int:
            places = np.flatnonzero(self.tokens == token)
            place = int(places[0]) if len(places) else 0
            low = max(0, min(place - _NEAR, len(self.tokens) - 2 * _NEAR - 1))
            near = self.tokens[low : low + 2 * _NEAR + 1]
            return int(np.random.default_rng([seed, example]).choice(near[near != token]))

        return other


@dataclass(frozen=True, eq=False)
class ContributionSurvey:
    """A model and what is known of it before any sentence.

    orders     of the layers in which neurons are chosen by rank: reading a layer's values costs as much as some
               sentences
    quotients  `Geometry.quotient` of every layer's values, where a neuron's direction is always its value's
    """

    model: Model
    lens: Lens
    lenses: Sequence[Lens]
    words: Vocabulary
    geometry: Geometry
    orders: Mapping[int, ValueRanks]
    quotients: Sequence[Tensor] | None

    @classmethod
    def of(
        cls,
        model: Model,
        words: Vocabulary,
        lens: str,
        most: int,
        work: Work,
    ) -> ContributionSurvey:
        """With the values of at most so many layers (and at least four) read for their ranks, once."""
        main, orders = Lens.of(model.anatomy, lens), {}
        layers = spread(model.anatomy.n_layers, max(4, most))
        with torch.inference_mode():
            for done, layer in enumerate(layers):
                work.report(Progress("ordering values", done, len(layers), "layers"))
                orders[layer] = ValueRanks.of(main, model.anatomy.layers[layer], work, f"order-{layer}")
            geometry = Geometry(main.unembedding)
            known = quotients(model, main, geometry)
        lenses = [Lens.of(model.anatomy, name) for name in LENSES]
        return cls(model, main, lenses, words, geometry, orders, known)

    def traced(self, prefix: np.ndarray) -> TracedPrediction:
        """A prefix taken apart; the target is what the model predicts."""
        stream = self.model.traced(torch.from_numpy(prefix.astype(np.int64))[None].to(self.model.device))
        predicted = int(stream.logits[-1].argmax())
        return TracedPrediction(stream, self.lens, predicted, (), self.words, self.geometry)

    def example(
        self,
        prefix: np.ndarray,
        followed: Mapping[str, int],
        targets: Sequence[str],
        other: Callable[[int], int],
        generator: np.random.Generator,
    ) -> Rows:
        """Columns of every table, without those that say which example it is, and the neurons that were chosen.

        followed   the tokens of targets that the model does not decide; `other` gives the null's from the model's
        generator  of `crosslayer`
        """
        prediction = self.traced(prefix)
        stream, predicted = prediction.stream, prediction.target
        wanted = {"model": predicted, "null": other(predicted), **followed}
        wanted = {
            name: wanted[name] for name in ("model", *(target for target in targets if target != "model"))
        }
        names = np.array(list(wanted))
        rows: Rows = {name: [] for name in (*_TABLES, _CHOSEN)}
        rows["contribution_examples"] = [{"target": names, "token": np.array(list(wanted.values()))}]
        rows["contribution_points"] = self._points(prediction, wanted)
        ranked = self._layers(prediction, wanted, rows)
        queries, layers, neurons = crosslayer(stream, prediction.position, ranked, generator)
        rows["cross_queries"], rows["cross_layers"] = [queries], [layers]
        for part, more in zip(rows["contribution_neurons"], neurons, strict=True):
            part |= more
        return rows

    def _points(self, prediction: TracedPrediction, wanted: Mapping[str, int]) -> list[Columns]:
        """Every point of the stream under every lens: the target's logit, and all others' as one (A36, A46)."""
        of_target: dict[str, list[Columns]] = {name: [] for name in wanted}
        for lens in self.lenses:
            logits = lens.cap(lens.raw_logits(prediction.points, lens.scale(prediction.points[-1])))
            for name, token in wanted.items():
                logit = logits[:, token].clone()
                logits[:, token] = -torch.inf
                others = log_sums(logits)
                logits[:, token] = logit
                logit = logit.double()
                columns = {
                    "logit": logit,
                    "others": others,
                    "log_probability": logit - torch.logaddexp(logit, others),
                }
                fixed = {"target": name, "lens": lens.name}
                of_target[name].append(_columns(fixed, point=torch.arange(len(logit)), **columns))
        return [part for parts in of_target.values() for part in parts]

    def _layers(
        self, prediction: TracedPrediction, wanted: Mapping[str, int], rows: Rows
    ) -> list[RankedNeurons]:
        """Neurons of every layer: counts, sums, choices; and the ranking of the model's target."""
        surveyed = IntervalSurvey(prediction.bases, TOP)(prediction.groups("neurons"), self.quotients)
        bases = {name: prediction.bases.following(token) for name, token in wanted.items()}
        sums: dict[str, list[Tensor]] = {name: [] for name in wanted}
        counts: dict[str, list[dict[str, int | float]]] = {name: [] for name in wanted}
        summed = spread(prediction.layers, _SUMMED)
        ranked = []
        for layer in range(prediction.layers):
            neurons = _Neurons.of(prediction, layer)
            for name, token in wanted.items():
                intervals = surveyed[layer]
                if name != "model":
                    intervals = intervals.moved(*neurons.odds(prediction.bases, token))
                order = rank(intervals, neurons.strength)
                counts[name].append(neurons.counts(order))
                chosen = neurons.choices(order, self.orders.get(layer), token)
                sums[name].append(neurons.sums(order, chosen))
                if name == "model":
                    rows[_CHOSEN] += neurons.listed(chosen | {"unhelpful_top": order.unhelpful})
                    ranked.append(order)
                    rows["contribution_neurons"].append(neurons.top(order))
                    if layer in summed:
                        rows["contribution_sums"].append(neurons.cumulated(order, prediction.bases))
        for name in wanted:
            rows["contribution_layers"].append(
                _layer_columns(prediction, bases[name], name, counts[name], torch.stack(sums[name]))
            )
        return ranked


def quotients(model: Model, lens: Lens, geometry: Geometry) -> list[Float[Tensor, " neuron"]] | None:
    """What `ContributionSurvey` keeps of values; None under a lens that is not linear."""
    if not lens.additive or (lens.name == "own" and lens.norm is not None):
        return None
    return [geometry.quotient(lens.weighted(value_vectors(layer))) for layer in model.anatomy.layers]


def spread(layers: int, most: int) -> list[int]:
    """At most so many layers, first and last among them, evenly apart."""
    return np.unique(np.linspace(0, layers - 1, min(layers, most)).round().astype(int)).tolist()


def rank(intervals: Intervals, strength: Float[Tensor, " neuron"]) -> RankedNeurons:
    """A surveyed layer in order; ties go to the lower number."""
    likely = intervals.likely
    down, up = (torch.argsort(sign * likely, stable=True)[:TOP] for sign in (-1, 1))
    return RankedNeurons(likely, intervals.signs, down[likely[down] > 0], up[likely[up] < 0], strength)


@dataclass(frozen=True, eq=False)
class _Neurons:
    """The neurons of one layer in one sentence; `vectors` are what they write, added to row `base`."""

    layer: int
    base: int
    vectors: Float[Tensor, "neuron width"]
    coefficient: Float[Tensor, " neuron"]

    @classmethod
    def of(cls, prediction: TracedPrediction, layer: int) -> _Neurons:
        coefficient = prediction.stream.layers[layer].coefficients[prediction.position].float()
        vectors = prediction.stream.neuron_parts(layer, prediction.position)
        return cls(layer, 2 * layer + 1, vectors, coefficient)

    @property
    def strength(self) -> Float[Tensor, " neuron"]:
        """|m||v|: the length of what each writes."""
        return norms(self.vectors)

    def odds(
        self, bases: ResidualBases, token: int
    ) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
        """How much more each moves another token's logit than the target's, and what fp32 may be off."""
        base = torch.full((len(self.vectors),), self.base)
        both = bases.odds(self.vectors, base, torch.tensor([bases.target, token]))
        moved = both[:, 1] - both[:, 0]
        reach = norms(bases.directions(self.vectors, base)).double() * abs(bases.lens.multiplier)
        if bases.lens.bands is not None:
            return moved, bases.rounding(reach, base, moved) + bases.following(token).rounding(
                reach, base, moved
            )
        return moved, 2 * ROUNDING * reach * bases.geometry.longest

    def counts(self, ranked: RankedNeurons) -> dict[str, int | float]:
        """How many help and how many do not (A47), of both kinds those with a negative coefficient (A37)."""
        negative, active = self.coefficient < 0, self.coefficient != 0
        columns: dict[str, int | float] = {"active": int(active.sum())}
        for name, sign in (("helpful", 1), ("unhelpful", -1)):
            side = ranked.signs == sign
            size = (sign * ranked.increase).clamp_min(0)
            columns[name] = int(side.sum())
            columns[f"{name}_certain"] = int((ranked.certain == sign).sum())
            columns[f"{name}_negative"] = int((side & negative).sum())
            # So many equally strong would be as concentrated; in a gated model hardly any neuron has C = 0.
            columns[f"{name}_effective"] = float(size.sum() ** 2 / size.square().sum().clamp_min(1e-300))
        columns["undecided"] = int((active & (ranked.certain == 0)).sum())
        return columns

    def choices(self, ranked: RankedNeurons, order: ValueRanks | None, token: int) -> dict[str, Tensor]:
        """Ten active neurons, chosen in each way (A44): by rank where a layer was read for it."""
        best = {
            "increase": -ranked.increase,
            "coefficient": -self.coefficient.abs(),
            "weight": -ranked.strength,
        }
        if order is not None:
            best["rank"] = order.rank(self.vectors, self.coefficient < 0, token)
        idle, chosen = self.coefficient == 0, {}
        for choice, score in best.items():
            first = torch.argsort(score.double().masked_fill(idle, torch.inf), stable=True)[:TOP]
            chosen[f"by_{choice}"] = first[~idle[first]]
        return chosen

    def sums(self, ranked: RankedNeurons, chosen: Mapping[str, Tensor]) -> Float[Tensor, "sum width"]:
        """All helpful together, their top, both of the unhelpful (A48); those of either side that are certain; and
        what was chosen (A44); NaN for what was not."""
        masks = [ranked.signs > 0, self._mask(ranked.helpful), ranked.signs < 0, self._mask(ranked.unhelpful)]
        masks += [ranked.certain > 0, ranked.certain < 0]
        masks += [self._mask(neurons) for neurons in chosen.values()]
        summed = torch.stack(masks).float() @ self.vectors
        missing = torch.full((len(SUMS) - len(summed), summed.shape[1]), torch.nan)
        return torch.cat([summed, missing])

    def listed(self, chosen: Mapping[str, Tensor]) -> list[Columns]:
        """A row for every neuron that was chosen."""
        return [
            _columns({"layer": self.layer, "choice": name}, neuron=neurons)
            for name, neurons in chosen.items()
            if len(neurons)
        ]

    def cumulated(self, ranked: RankedNeurons, bases: ResidualBases) -> Columns:
        """Helpful neurons together, from the least helpful on, and the sum of what each does alone (A40).

        In logits both are the same.
        """
        order = torch.argsort(ranked.increase, stable=True)
        order = order[ranked.signs[order] > 0]
        ends = torch.arange(1, _STEPS + 1, dtype=torch.float64) * len(order) / _STEPS
        ends = ends.ceil().long().unique()
        ends = ends[ends > 0]
        mask = torch.arange(len(order))[None] < ends[:, None]
        together = mask.float() @ self.vectors[order]
        alone = ranked.increase[order].cumsum(0)[ends - 1]
        increase = logit = alone
        if len(ends):
            base = torch.full((len(ends),), self.base)
            increase, logit = bases.increases(together, base), bases.above_mean(together, base)
        return _columns({"layer": self.layer}, neurons=ends, separate=alone, together=increase, logit=logit)

    def top(self, ranked: RankedNeurons) -> Columns:
        """The ten most helpful, then the ten most unhelpful."""
        sides = torch.tensor([1] * len(ranked.helpful) + [-1] * len(ranked.unhelpful))
        places = torch.cat([torch.arange(len(ranked.helpful)), torch.arange(len(ranked.unhelpful))])
        return _columns(
            {"layer": self.layer}, neuron=ranked.top, side=sides, rank=places,
            coefficient=self.coefficient[ranked.top], increase=ranked.increase[ranked.top],
        )  # fmt: skip

    def _mask(self, chosen: Tensor) -> Tensor:
        mask = torch.zeros(len(self.vectors), dtype=torch.bool)
        mask[chosen] = True
        return mask


def _layer_columns(
    prediction: TracedPrediction,
    bases: ResidualBases,
    name: str,
    counts: Sequence[Mapping[str, int | float]],
    sums: Tensor,
) -> Columns:
    steps = bases.log_probabilities[: prediction.final + 1, bases.target].double().diff()
    return _columns(
        {"target": name},
        layer=torch.arange(prediction.layers),
        attention=steps[0::2],
        ffn=steps[1::2],
        **{key: torch.tensor([of_layer[key] for of_layer in counts]) for key in counts[0]},
        **scores(bases, sums, SUMS),
    )


def _columns(fixed: Mapping[str, object], **columns: Tensor) -> Columns:
    size = len(next(iter(columns.values())))
    same = {name: np.full(size, value) for name, value in fixed.items()}
    return same | {name: column.cpu().numpy() for name, column in columns.items()}


def _of(examples: Examples, number: int, name: str, part: Columns) -> Columns:
    """With the columns that say which example it is."""
    size = len(next(iter(part.values())))
    which = {"example": number}
    if name == "contribution_examples":
        which |= {
            "document": int(examples.documents[number]),
            "context": int(examples.contexts[number]),
            "position": int(examples.positions[number]),
            "next_token": int(examples.targets[number]),
        }
    return {key: np.full(size, value) for key, value in which.items()} | part


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
