"""What tells an answer from its neighbours: questions taken apart with two foils each (Yu et al. 2023, 5; A50-A57).

The near foil is the answer of another question of the label, the far one of another label. Everything about parts is
what `explain` says. The null of the stream is a partner: the same words at the prompt of another question, which has
another answer; the null of the neurons is those that tell another pair of words apart, chosen in the same way at the
same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.errors import QueryError
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.prediction.explain import PROMOTED, explain, geometry_of
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.prediction.questions import ask
from mnemoscope.prediction.switched import queries
from mnemoscope.prediction.switching import chain
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Cells
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.questions import Asked, ask_all
from mnemoscope.studies.measures.reductions import ranks
from mnemoscope.text.spelling import vocabulary_of

TOP = 25  # rows of each sign and measure: enough for the ablated
ABLATED = 50  # neurons, and heads x sources
NEURONS = 10  # with the largest increase, and as many for another pair of words
WORDS = ("answer", "near", "far")

Frames = dict[str, pl.DataFrame]


@dataclass(frozen=True)
class Case:
    """A question with those whose answers are its foils, and the one at whose prompt its words are read, too."""

    asked: Asked
    near: Asked
    far: Asked
    partner: Asked

    @property
    def words(self) -> tuple[int, int, int]:
        """Tokens of WORDS."""
        return self.asked.token, self.near.token, self.far.token

    @property
    def other(self) -> tuple[int, int]:
        """Another pair of words: the partner's answer, or the far foil where that is the near one; and the near
        foil."""
        answer = self.partner.token
        return (self.far.token if answer == self.near.token else answer), self.near.token


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, Iterable[pa.Table]]:
    """The tables `case_*` (docs/format.md); `QueryError` when no question has two foils."""
    cases = chosen(model, ask_all(model, sizes, work.report), sizes)

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        (number,) = numbers.tolist()
        frames = taken_apart(model, cases[number])
        return {name: _rows(name, number, frame) for name, frame in frames.items()}

    return work.shards(cases, shard, "cases", size=1)


def chosen(model: Model, asked: Sequence[Asked], sizes: Sizes) -> list[Case]:
    """The first `sizes.cases` of each set that have foils, in an order drawn with the seed."""
    cases = []
    for name in dict.fromkeys(candidate.question.set for candidate in asked):
        of_set = [candidate for candidate in asked if candidate.question.set == name]
        dealt = (case for case in deal(of_set, sizes.seed) if _fits(model, case))
        cases += [case for case, _ in zip(dealt, range(sizes.cases), strict=False)]
    if not cases:
        raise QueryError(
            "taking questions apart: none has foils; a set needs two labels, and two answers of a label that begin "
            "with different tokens"
        )
    return cases


def deal(asked: Sequence[Asked], seed: int) -> Iterable[Case]:
    """The questions of one set that have a near and a far foil, with foils and a partner drawn."""
    for place in np.random.default_rng(seed).permutation(len(asked)).tolist():
        own, generator = asked[place], np.random.default_rng([seed, place])
        label = own.question.label
        near = _drawn(asked, generator, {own.token}, lambda other: other.question.label == label)  # noqa: B023
        if near is None:
            continue
        words = {own.token, near.token}
        far = _drawn(asked, generator, words, lambda other: other.question.label != label)  # noqa: B023
        if far is None:
            continue
        partner = _drawn(asked, generator, {*words, far.token}) or _drawn(asked, generator, {own.token})
        assert partner is not None, "the near foil's question is one"
        yield Case(own, near, far, partner)


def _drawn(
    asked: Sequence[Asked],
    generator: np.random.Generator,
    without: set[int],
    among: Callable[[Asked], bool] = lambda _: True,
) -> Asked | None:
    candidates = [candidate for candidate in asked if candidate.token not in without and among(candidate)]
    return candidates[int(generator.integers(len(candidates)))] if candidates else None


def _text(asked: Asked) -> str:
    """The answer so that it is read as it was."""
    return " " + asked.question.answer if asked.spaced else asked.question.answer


def _fits(model: Model, case: Case) -> bool:
    """Whether behind this prompt, too, the foils begin with the tokens that they have behind their own."""
    lens = Lens.of(model.anatomy, "own")
    scores = lens.logits(case.asked.stream[-1:])[0]
    foils = [_text(case.near), _text(case.far)]
    try:
        answer = ask(model, case.asked.question.prompt, _text(case.asked), foils, -1, lambda _: scores)
    except QueryError:
        return False
    assert answer.target is not None
    return (answer.target.token, *(foil.token for foil in answer.foils)) == case.words


def taken_apart(model: Model, case: Case) -> Frames:
    """Every table of one question, without its number."""
    foils = [_text(case.near), _text(case.far)]
    explanation = explain(
        model, case.asked.question.prompt, _text(case.asked), foils, top=TOP, ablate=ABLATED
    )
    with torch.inference_mode():
        prediction = _prediction(model, case.asked, case.words)
        near = explanation.contrasts[0]
        pieces = near.sources["source_token"].to_list()
        named = pl.DataFrame(
            {"source": range(len(pieces)), "class": classes(pieces, case.asked.question.subject)},
            {"source": pl.Int32, "class": pl.String},
        )
        return {
            "case_questions": _about(case, explanation),
            "case_stream": _stream(prediction, _prediction(model, case.partner, case.words), case),
            "case_sources": near.sources.join(named, on="source", how="left", maintain_order="left"),
            "case_origins": explanation.attention_queries.join(
                named, on="source", how="left", maintain_order="left"
            ).with_row_index("vector"),
            "case_neurons": _neurons(prediction, near.neurons, case.other),
            "case_ablations": explanation.ablations,
        }


def _prediction(model: Model, asked: Asked, words: tuple[int, int, int]) -> TracedPrediction:
    """The end of a prompt, asked for the words of a case."""
    tokens = torch.tensor([asked.tokens], device=model.device)
    stream = model.traced(tokens)
    lens = Lens.of(model.anatomy, "frozen")
    pieces = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    return TracedPrediction(stream, lens, words[0], words[1:], pieces, geometry_of(model, lens))


def _about(case: Case, explanation: Explanation) -> pl.DataFrame:
    question = case.asked.question
    return pl.DataFrame(
        {
            **{name: [getattr(question, name)] for name in ("set", "subject", "prompt", "answer", "label")},
            "near": [case.near.question.answer],
            "far": [case.far.question.answer],
            **dict(zip(("token", "near_token", "far_token"), ([word] for word in case.words), strict=True)),
            "rank": [explanation.stream["rank"][-1]],
            "partner": [case.partner.question.prompt],
        }
    )


def _stream(prediction: TracedPrediction, partner: TracedPrediction, case: Case) -> pl.DataFrame:
    """Logits of the three words at every point, before a soft cap, here and at the partner's prompt (A50, A51)."""
    words = list(case.words)
    own, null = (
        traced.lens.raw_logits(traced.points, traced.scale)[:, words].T.flatten().cpu().numpy()
        for traced in (prediction, partner)
    )
    count = len(prediction.points)
    return pl.DataFrame(
        {
            "word": np.repeat(WORDS, count),
            "point": np.tile(np.arange(count), len(WORDS)),
            "logit": own,
            "null": null,
        }
    )


def classes(pieces: Sequence[str], subject: str) -> list[str | None]:
    """Where each token of a prompt stands: subject, before, after or last; None if the subject is not in it."""
    ends = np.cumsum([len(piece) for piece in pieces])
    start = "".join(pieces).find(subject) if subject else -1
    if start < 0:
        return [None] * len(pieces)
    begin, end = ends - [len(piece) for piece in pieces], start + len(subject)
    standing = np.where(ends <= start, "before", np.where(begin >= end, "after", "subject")).astype(object)
    if standing[-1] != "subject":
        standing[-1] = "last"
    return list(standing)


def _neurons(prediction: TracedPrediction, shown: pl.DataFrame, other: tuple[int, int]) -> pl.DataFrame:
    """The neurons that tell the answer from the near foil best, and those that tell another pair best (A55-A57)."""
    another = replace(prediction, target=other[0], foils=other[1:])
    pairs = [(prediction, shown), (another, extremes(another))]
    frames = [
        told_apart(pair, of_pair).with_columns(drawn=pl.lit(bool(number)))
        for number, (pair, of_pair) in enumerate(pairs)
    ]
    return pl.concat(frames)


def extremes(prediction: TracedPrediction) -> pl.DataFrame:
    """layer, neuron, increase: the first TOP neurons of either sign by what they do to target minus first foil."""
    moved = []
    for layer in range(prediction.layers):
        vectors = prediction.stream.neuron_parts(layer, prediction.position)
        moved.append(prediction.odds(vectors, torch.full((len(vectors),), 2 * layer + 1))[:, 0, 0])
    every = torch.cat(moved)
    order = torch.argsort(every, descending=True, stable=True)
    chosen = torch.cat([order[:TOP], order[-TOP:]]).unique()
    layers, neurons = Cells(prediction.stream.anatomy.sizes).place(chosen.cpu().numpy())
    frame = {"layer": layers, "neuron": neurons, "increase": every[chosen].cpu().numpy()}
    return pl.DataFrame(frame).filter(pl.col("increase") != 0)


def told_apart(prediction: TracedPrediction, shown: pl.DataFrame) -> pl.DataFrame:
    """The ten neurons that raise target minus first foil most, of those shown, and what there is to say of them."""
    place = ["layer", "neuron"]
    best = shown.sort("increase", descending=True, maintain_order=True).head(NEURONS)
    addresses = list(best.select(place).iter_rows())
    layer, neuron = np.array(addresses, np.int64).reshape(-1, 2).T
    vectors = torch.cat(
        [prediction.stream.neuron_parts(a, prediction.position, torch.tensor([b])) for a, b in addresses]
    )
    coefficient = [
        float(prediction.stream.layers[a].coefficients[prediction.position, b]) for a, b in addresses
    ]
    moved = prediction.odds(vectors, torch.as_tensor(2 * layer + 1))[..., 0]
    cells = Cells(prediction.stream.anatomy.sizes)
    chains = _chains(prediction, shown)[torch.from_numpy(cells.cell(layer, neuron))]
    scores = Lens.of(prediction.stream.anatomy, "own", "flat").raw_logits(vectors)
    words = torch.tensor([[prediction.target, prediction.foils[0]]]).expand(len(addresses), 2)
    first, last = ranks(scores, words), ranks(-scores, words)
    promotes, suppresses = prediction.promoted(vectors, PROMOTED)
    frame = pl.DataFrame(
        {
            "rank": range(len(addresses)),
            "layer": layer,
            "neuron": neuron,
            "coefficient": coefficient,
            "difference": moved[:, 0].cpu().numpy(),
            "chain": chains.cpu().numpy(),
            "answer_rank": first[:, 0].cpu().numpy(),
            "near_rank": first[:, 1].cpu().numpy(),
            "answer_last_rank": last[:, 0].cpu().numpy(),
            "near_last_rank": last[:, 1].cpu().numpy(),
            "promotes": promotes,
            "suppresses": suppresses,
        }
    ).with_columns(pl.col(place).cast(pl.Int32))
    asked = frame.select(*place, "coefficient", increase="difference", leave_one_out="difference")
    return frame.join(_first(prediction, asked), on=place, how="left", maintain_order="left")


def _chains(prediction: TracedPrediction, shown: pl.DataFrame) -> Float[Tensor, " cell"]:
    """What each neuron does to answer minus near foil by switching on those above it that are shown (A63)."""
    cells = Cells(prediction.stream.anatomy.sizes)
    own = torch.zeros(len(cells))
    own[torch.from_numpy(cells.cell(shown["layer"], shown["neuron"]))] = torch.tensor(
        shown["increase"].to_list(), dtype=own.dtype
    )
    return chain(prediction.stream, prediction.position, own).total - own


def _first(prediction: TracedPrediction, neurons: pl.DataFrame) -> pl.DataFrame:
    """By neuron: the earlier vector with the largest share of its coefficient, and that share as a fraction of it."""
    shares = queries(prediction, neurons, (neurons.height, 0))
    parts = shares.filter(~pl.col("kind").is_in(["key bias", "remainder"]))
    first = parts.group_by("layer", "neuron", maintain_order=True).first()
    joined = first.join(neurons.select("layer", "neuron", "coefficient"), on=["layer", "neuron"])
    return joined.select(
        "layer",
        "neuron",
        query_kind="kind",
        query_layer="query_layer",
        query_unit="query_unit",
        query_source="source_token",
        query_share=pl.col("share") / pl.col("coefficient"),
    )


def _rows(name: str, number: int, frame: pl.DataFrame) -> pa.Table:
    """Rows of a table, from those columns of a frame that the table has."""
    numbered = frame.with_columns(question=pl.lit(number)).select(SCHEMAS[name].names)
    return arrow_table(name, numbered.to_dict())
