"""A null passes the selection of its figure: with another's output fed in as one's own, own minus chance covers 0.

Every figure of contributions, queries and cases that has a null is in one of the lists below. Where the null is another
token, one is followed as if the model predicted it; where it is neurons that write as strongly, increases are drawn by
how strongly neurons write and by nothing else; where it is another prompt, pair of words or order, that is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from scipy.stats import norm
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.intervals import Interval, by_document, mean_by_document
from mnemoscope.model.stream import Stream
from mnemoscope.prediction.bases import norms
from mnemoscope.prediction.search import Intervals
from mnemoscope.prediction.switching import Chain
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.findings import case_parts, cases
from mnemoscope.studies.findings import contributions as answers
from mnemoscope.studies.findings import crosslayer as calls
from mnemoscope.studies.findings.finding import Finding
from mnemoscope.studies.findings.statistics import ExampleGrid
from mnemoscope.studies.measures import contributions, crosslayer
from mnemoscope.studies.measures.cases import WORDS
from mnemoscope.studies.measures.contributions import ContributionSurvey, Frequencies, measure, rank
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.transfer import Pairs

SENTENCES = 60


@dataclass
class Decoys:
    """A study of a tiny model in which nothing is an example's own."""

    run: Run

    @cached_property
    def tokens(self) -> dict[str, ExampleGrid]:
        return answers.load(self.run)

    @cached_property
    def pairs(self) -> dict[str, ExampleGrid]:
        return answers.load_pairs(self.run)

    @cached_property
    def points(self) -> dict[str, ExampleGrid]:
        rows = self.run.table("contribution_points").filter(lens="frozen").sort("example", "point").collect()
        examples = self.tokens["model"].examples
        return {name: ExampleGrid(name, rows.filter(target=name), examples) for name in ("model", "null")}

    def grid(self, table: str, place: str) -> ExampleGrid:
        rows = self.run.table(table).sort("example", place).collect()
        return ExampleGrid("", rows, self.tokens["model"].examples)

    @cached_property
    def queries(self) -> ExampleGrid:
        return self.grid("cross_queries", "query")

    @cached_property
    def layers(self) -> ExampleGrid:
        return self.grid("cross_layers", "layer")


pytestmark = pytest.mark.slow  # two measurements of two hundred documents


@pytest.fixture(scope="module")
def decoys(tmp_path_factory: pytest.TempPathFactory) -> Decoys:
    folder = tmp_path_factory.mktemp("decoys")
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    run = mn.build(model, texts(200), folder / "run", top=5, nulls=())
    others, numbers = Frequencies.of(run), iter(range(10**6))
    traced, pairs = ContributionSurvey.traced, Pairs.of

    def of_another_token(survey: ContributionSurvey, prefix: np.ndarray) -> TracedPrediction:
        """The same token whenever the prefix is traced."""
        prediction = traced(survey, prefix)
        return replace(prediction, target=others.near(int(prefix.sum()), len(prefix))(prediction.target))

    def both_of_others(tokens: np.ndarray, documents: np.ndarray, seed: int) -> Pairs:
        first, second = (pairs(tokens, documents, seed + more).other for more in (0, 1))
        return Pairs(np.where(second >= 0, first, -1), second)

    def by_strength(intervals: Intervals, strength: torch.Tensor) -> crosslayer.RankedNeurons:
        drawn = strength.double() * _noise(numbers, strength)
        return rank(Intervals(drawn, drawn, drawn), strength)

    def chained(stream: Stream, position: int, increases: torch.Tensor) -> Chain:
        size = torch.cat(
            [norms(stream.neuron_parts(layer, position)) for layer in range(stream.anatomy.n_layers)]
        )
        return Chain((size * _noise(numbers, size)).float() + increases, torch.zeros(1, 1))

    tables = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContributionSurvey, "traced", of_another_token)
        patch.setattr(Pairs, "of", both_of_others)
        tables |= _of(run, model, folder / "tokens", "contribution_")
        patch.setattr(contributions, "rank", by_strength)
        patch.setattr(crosslayer, "chain", chained)
        # A tiny layer has 40 neurons: fewer are listed, asked and first.
        for module, name, count in (
            (contributions, "TOP", 3),
            (crosslayer, "ASKED", 4),
            (crosslayer, "FIRST", 12),
        ):
            patch.setattr(module, name, count)
        tables |= _of(run, model, folder / "neurons", "cross_")
    return Decoys(add_tables(run.path, tables, {}))


def _noise(numbers: Iterator[int], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([7, next(numbers)]).standard_normal(like.shape))


def _of(run: Run, model: mn.Model, folder: object, prefix: str) -> dict[str, object]:
    folder.mkdir()  # type: ignore[attr-defined]
    found = measure(run, model, Sizes(sentences=SENTENCES), Work(folder))  # type: ignore[arg-type]
    return {name: rows for name, rows in found.items() if name.startswith(prefix)}


def _tokens(*columns: str) -> Callable[[Decoys], Interval]:
    """Means over layers of columns, of the prediction less the null."""

    def difference(decoys: Decoys) -> Interval:
        own, null = (
            np.stack([decoys.tokens[name][column] for column in columns]) for name in ("model", "null")
        )
        return decoys.tokens["model"].mean(np.nanmean(own - null, axis=-1).T)

    return difference


def _ratio(side: str, suffix: str) -> Callable[[Decoys], Interval]:
    def difference(decoys: Decoys) -> Interval:
        shares = [answers._share(decoys.tokens[name], side, suffix) for name in ("model", "null")]
        return answers.excess(decoys.tokens["model"].documents, *shares)

    return difference


def _pairs(*columns: str) -> Callable[[Decoys], Interval]:
    def difference(decoys: Decoys) -> Interval:
        own, null = (
            np.stack([decoys.pairs[kind][column] for column in columns]) for kind in ("same", "other")
        )
        return decoys.pairs["same"].mean(np.nanmean(own - null, axis=-1).T)

    return difference


def _points(decoys: Decoys) -> Interval:
    own, null = (decoys.points[name]["log_probability"] for name in ("model", "null"))
    return mean_by_document((own - null)[:, -1], decoys.points["model"].documents)


def _queries(*columns: str) -> Callable[[Decoys], Interval]:
    """Sums over vectors of columns, less those of neurons that write as strongly."""

    def difference(decoys: Decoys) -> Interval:
        grid = decoys.queries
        return grid.mean(
            np.stack([np.nansum(grid[c] - grid[f"{c}_matched"], axis=1) for c in columns], axis=1)
        )

    return difference


def _ways(decoys: Decoys) -> Interval:
    """Correlations of the three scores with the fourth, less those of neurons that write as strongly."""
    curves = []
    for end in ("", "_matched"):
        sides = [
            np.stack([decoys.queries[f"{side}{way}{end}"] for way in calls.WAYS.values()], axis=1)
            for side in calls.SIDES
        ]
        curves.append(sides[0] - sides[1])
    both = np.stack(curves, axis=1)
    known = ~np.isnan(both).any((0, 1, 2))
    statistic = lambda sums: (calls._correlated(sums[:, 0]) - calls._correlated(sums[:, 1]))[:, :3]  # noqa: E731
    return by_document(both[..., known], decoys.queries.documents, statistic)


def _listed(what: str, *sides: str) -> Callable[[Decoys], Interval]:
    def difference(decoys: Decoys) -> Interval:
        own, like = (calls._over_layers(sums) for sums in calls._listed(decoys.layers, what, sides))
        return answers.excess(decoys.layers.documents, own, like)

    return difference


def _called(decoys: Decoys) -> Interval:
    grid = decoys.layers
    own, like = (
        calls.union_share(grid[name], np.broadcast_to(np.arange(grid.count), grid[name].shape))[:, 1:]
        for name in ("called", "called_matched")
    )
    return grid.mean(own - like)


def _shared(decoys: Decoys) -> Interval:
    both, like, first = (
        decoys.layers[name].sum(1) for name in ("both_first", "both_matched", "queries_first")
    )
    return answers.excess(decoys.layers.documents, (both, first), (like, first))


def _mass(decoys: Decoys) -> Interval:
    return decoys.layers.mean(decoys.layers["value_mass"] - decoys.layers["write_mass"])


CHOSEN = [f"by_{choice}" for choice in answers.CHOICES]
FIGURES: dict[str, Callable[[Decoys], Interval]] = {
    "figure-5-log-p-along-the-stream": _points,
    "increases-by-layers": _tokens("attention", "ffn"),
    "table-1-ten-neurons-chosen": _tokens(*CHOSEN, *(f"{name}_logit" for name in CHOSEN)),
    "table-1-ten-neurons-chosen, elsewhere": _pairs(*CHOSEN, *(f"{name}_logit" for name in CHOSEN)),
    "table-1-by-layer": _tokens("by_increase", "by_increase_logit"),
    "figure-6-helpful-and-unhelpful-neurons": _tokens("helpful", "unhelpful", "helpful_effective"),
    "figure-7-ten-against-all, helpful": _ratio("helpful", "logits"),
    "figure-7-ten-against-all, unhelpful": _ratio("unhelpful", "logits"),
    "figure-7-ten-against-all, nats": _ratio("helpful", "nats"),
    "figure-8-queries-of-one-layer": _queries("helpful", "unhelpful"),
    "figures-15-18-four-scores": _queries(
        "helpful_top", "unhelpful_top", "helpful_weighted", "unhelpful_weighted"
    ),
    "figures-15-18-four-scores, ten": _queries("helpful_top_weighted", "unhelpful_top_weighted"),
    "figures-15-18-four-scores, correlations": _ways,
    "figures-13-14-queries-of-all-layers": _queries("upper_helpful", "upper_unhelpful"),
    "table-3-values-that-are-queries": _listed("asked", *calls.SIDES),
    "table-4-neurons-called-by-earlier-layers": _called,
    "figure-19-where-values-and-queries-are": _shared,
    "mass-of-values-and-queries": _mass,
    "extremes-act-as-queries, helpful": _listed("first", "helpful"),
    "extremes-act-as-queries, unhelpful": _listed("first", "unhelpful"),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_with_anothers_output_as_ones_own_there_is_no_excess(decoys: Decoys, figure: str) -> None:
    """Own minus chance covers 0, with intervals widened for how many are looked at (Bonferroni)."""
    found = FIGURES[figure](decoys)
    value, low, high = (np.atleast_1d(end) for end in found[:3])
    known = np.isfinite(low)
    assert known.any()
    wider = norm.ppf(1 - 0.025 / (len(FIGURES) * known.sum())) / norm.ppf(0.975)
    assert (value - wider * (value - low) <= 0)[known].all(), (value, low, high)
    assert (value + wider * (high - value) >= 0)[known].all(), (value, low, high)


def test_every_figure_with_a_null_is_listed(decoys: Decoys) -> None:
    """None of contributions and queries is left out."""
    findings = [*answers.findings(decoys.run), *calls.findings(decoys.run)]
    assert {one.id for one in findings if one.null} == {figure.split(",")[0] for figure in FIGURES}


def test_neurons_drawn_from_the_layer_are_no_null(decoys: Decoys) -> None:
    """Increases that know nothing but strength would be far above it: what a share of all neurons says (A61, A64)."""
    grid, count = decoys.layers, decoys.run.manifest.model.neurons
    listed = np.sum([grid[side] for side in calls.SIDES], axis=0)
    for what, every in (("asked", grid["asked"]), ("first", grid["queries_first"])):
        own, _ = calls._listed(grid, what)
        drawn = (calls._over_layers(pair) for pair in (own, (listed * every / count, listed)))
        assert answers.excess(grid.documents, *drawn).low > 0.05


# -- Cases: another prompt, pair of words or order in place of a question's own ---------------------------------------

QUESTIONS, LAYERS, PROMPT = 200, 6, 12


def _stream(generator: np.random.Generator) -> pl.DataFrame:
    """Logits of the words at two prompts, neither of which is about them."""
    points = 2 * LAYERS + 1
    walk = generator.standard_normal((2, QUESTIONS, 3, points)).cumsum(-1)
    size = QUESTIONS * 3 * points
    return pl.DataFrame(
        {
            "question": np.arange(size) // (3 * points),
            "word": np.array(WORDS)[np.arange(size) // points % 3],
            "point": np.arange(size) % points,
            "logit": walk[0].ravel(),
            "null": walk[1].ravel(),
        }
    )


def _parts(generator: np.random.Generator) -> pl.DataFrame:
    """Parts whose effects are those of other parts of their question."""
    shape = (QUESTIONS, 20)
    account, effect = generator.standard_normal((2, *shape))
    columns = {"increase": account, "leave_one_out": account + 0.1, "effect": effect}
    rows = {name: values.ravel() for name, values in columns.items()}
    kinds = np.array(["neuron", "head"])[np.arange(QUESTIONS * 20) % 2]
    places = {"question": np.arange(QUESTIONS).repeat(20), "layer": np.arange(QUESTIONS * 20) % LAYERS}
    return pl.DataFrame({**places, "kind": kinds, **rows})


def _tables(generator: np.random.Generator) -> dict[str, pl.DataFrame]:
    tokens = generator.standard_normal((QUESTIONS, PROMPT))
    every = np.arange(QUESTIONS).repeat(PROMPT)
    place = np.tile(np.arange(PROMPT), QUESTIONS)
    kinds = np.array(["before", "subject", "after", "last"])[[0, 1, 1, *[2] * (PROMPT - 4), 3]][place]
    vectors = generator.standard_normal((2, QUESTIONS, PROMPT)).reshape(2, -1)
    drawn = np.arange(QUESTIONS * 20) % 20 >= 10
    neurons = {
        "question": np.arange(QUESTIONS).repeat(20),
        "drawn": drawn,
        "answer_rank": generator.integers(0, 400, len(drawn)),
        "near_last_rank": generator.integers(0, 400, len(drawn)),
        "chain": generator.standard_normal(len(drawn)),
        "difference": generator.standard_normal(len(drawn)),
        "query_kind": generator.choice(["head", "neuron", "embedding"], len(drawn)),
        "query_share": generator.random(len(drawn)),
    }
    return {
        "questions": pl.DataFrame({"question": np.arange(QUESTIONS), "rank": np.zeros(QUESTIONS, int)}),
        "stream": _stream(generator),
        "sources": pl.DataFrame({"question": every, "class": kinds, "increase": tokens.ravel()}),
        "origins": pl.DataFrame(
            {
                "question": every,
                "vector": place,
                "point": np.array([f"point {at}" for at in place]),
                "recomputed": vectors[0],
                "fixed": vectors[1],
            }
        ),
        "neurons": pl.DataFrame(neurons),
        "ablations": _parts(generator),
    }


CASES: dict[str, Callable[[str, dict[str, pl.DataFrame]], Finding | list[Finding]]] = {
    "case-along": cases._along,
    "case-layers": cases._by_layer,
    "case-sources": cases._sources,
    "case-origins": cases._origins,
    "case-ways": case_parts._ways,
    "case-queries": case_parts._queries,
    "case-ablation-layers": case_parts._where_they_differ,
}


@pytest.mark.parametrize("figure", CASES)
def test_with_anothers_words_a_question_is_like_its_null(figure: str) -> None:
    """What the figure draws covers its null at every place, with intervals widened for how many there are."""
    found = CASES[figure]("planted", _tables(np.random.default_rng(0)))
    frame = (found[0] if isinstance(found, list) else found).frame.drop_nulls(["low", "null"])
    assert frame.height
    wider = 1.2 * norm.ppf(1 - 0.025 / frame.height) / norm.ppf(0.975)
    value, low, high, null = (frame[name].to_numpy() for name in ("value", "low", "high", "null"))
    # A null that is resampled itself is as uncertain as its figure.
    wider *= 2**0.5
    assert ((value - wider * (value - low) <= null) & (null <= value + wider * (high - value))).all(), frame


def test_an_account_with_effects_of_other_parts_agrees_as_dealt_effects_do() -> None:
    """Pearson, Spearman and equal signs of the account are within what effects dealt out anew give (A79)."""
    rows = _parts(np.random.default_rng(1))
    for kind in ("neuron", "head"):
        for account in case_parts.MEASURES:
            own, null = case_parts.agreements(rows.filter(pl.col("kind") == kind), account)
            difference = mean_by_document(own - np.nanmean(null, axis=0), np.arange(len(own)))
            wider = norm.ppf(1 - 0.025 / 12) / norm.ppf(0.975)
            assert (difference.value - wider * (difference.value - difference.low) <= 0).all()
            assert (difference.value + wider * (difference.high - difference.value) >= 0).all()


def test_every_case_with_a_null_is_listed() -> None:
    """None of the findings of a set of questions is left out; the scatter of A79 is tested by its own figures."""
    source = Path(cases.__file__).read_text(encoding="utf-8") + Path(case_parts.__file__).read_text(
        encoding="utf-8"
    )
    made = [block for block in source.split("Finding(\n")[1:] if " null=" in block.split("\n    )\n")[0]]
    ids = {re.search(r'id=f"([a-z-]+)-\{', block)[1] for block in made}  # type: ignore[index]
    assert ids == {*CASES, "case-ablation"}
