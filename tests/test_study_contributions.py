"""Contributions over many sentences: every column against fp64 by hand, its laws, and figures of planted tables."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from effort import tries
from families import FAMILIES
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import linregress
from slow_sentence import PREFIX, Slow, wrapped
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.model.stream import trace
from mnemoscope.prediction.bases import Geometry, ResidualBases, norms
from mnemoscope.prediction.search import Intervals, IntervalSurvey, Parts, exhaustive
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import CONTRIBUTIONS, SCHEMAS
from mnemoscope.run.writing import add_tables
from mnemoscope.studies import catalogue
from mnemoscope.studies.findings import contributions as answers
from mnemoscope.studies.findings import crosslayer
from mnemoscope.studies.findings.contributions import shared
from mnemoscope.studies.findings.finding import Finding
from mnemoscope.studies.measures import contributions
from mnemoscope.studies.measures.contributions import (
    TOP,
    ContributionSurvey,
    Frequencies,
    Rows,
    measure,
    quotients,
    rank,
    spread,
)
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.transfer import Pairs
from mnemoscope.studies.measures.value_ranks import ValueRanks, marked
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views.figures import chart

NAMES = ("llama", "opt_no_final_norm", "gpt2", "gptj", "olmo2", "gemma2", "granite")
OTHER = 40  # the null's token


class Exact(IntervalSurvey):
    """Everything through the whole vocabulary: what a survey would say if it had all the time."""

    def __call__(self, groups: Sequence[Parts], quotients: object = None) -> list[Intervals]:
        values = [exhaustive(self._bases, group)[:, 0] for group in groups]
        return [Intervals(one, one, one) for one in values]


@cache
def read(name: str, lens: str, folder: Path) -> Rows:
    """One prefix at the survey, every neuron measured whole."""
    kept = folder / f"{name}-{lens}"
    kept.mkdir(exist_ok=True)
    survey = ContributionSurvey.of(wrapped(name), Vocabulary([], []), lens, 10, Work(kept))
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(contributions, "IntervalSurvey", Exact)
        return survey.example(
            PREFIX, {"gold": 9}, ("model", "null", "gold"), lambda _: OTHER, np.random.default_rng(0)
        )


CASES = [("llama", "frozen"), ("opt_no_final_norm", "frozen")]
MORE = [(name, lens) for name in NAMES for lens in LENSES if (name, lens) not in CASES]
SOME = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


def of(rows: Rows, table: str, **where: object) -> pl.DataFrame:
    """The rows of a table that have these values."""
    frame = pl.concat([pl.DataFrame(part) for part in rows[table]])
    return frame.filter(*(pl.col(name) == value for name, value in where.items()))


@pytest.mark.parametrize(("name", "lens"), SOME)
def test_points_and_layers_are_log_probabilities_in_fp64(name: str, lens: str, folder: Path) -> None:
    """Every point of the stream under every lens, F(l) of every point, and layers as differences (A36, A38, A46)."""
    rows, slow = read(name, lens, folder), Slow(name, lens)
    wanted = of(rows, "contribution_examples")
    assert wanted["target"].to_list() == ["model", "null", "gold"]
    assert wanted["token"].to_list() == [int(slow.stream.logits[-1].argmax()), OTHER, 9]
    for target, token in wanted.select("target", "token").iter_rows():
        for reading in LENSES:
            found = of(rows, "contribution_points", target=target, lens=reading)
            expected = slow.log_p(slow.points, token, reading)
            assert found["log_probability"].to_numpy() == pytest.approx(expected, abs=2e-4, rel=1e-4)
            logit, others = found["logit"].to_numpy(), found["others"].to_numpy()
            assert 1 / (1 + np.exp(others - logit)) == pytest.approx(np.exp(expected), abs=2e-4)
            assert logit == pytest.approx(slow.logits(slow.points, reading)[:, token], abs=2e-3, rel=1e-4)
        layers = of(rows, "contribution_layers", target=target)
        steps = np.diff(slow.log_p(slow.points, token))
        assert layers["attention"].to_numpy() == pytest.approx(steps[0::2], abs=2e-4, rel=1e-4)
        assert layers["ffn"].to_numpy() == pytest.approx(steps[1::2], abs=2e-4, rel=1e-4)
        total = layers["attention"].sum() + layers["ffn"].sum()
        ends = slow.log_p(slow.points[[0, -1]], token)
        assert total == pytest.approx(ends[1] - ends[0], abs=1e-3, rel=1e-4)


@pytest.mark.parametrize(("name", "lens"), SOME)
def test_counts_sums_and_choices_equal_their_definitions(name: str, lens: str, folder: Path) -> None:
    """Helpful and unhelpful (A47, A37), their sums (A48), and ten chosen in four ways (A44), neuron by neuron."""
    rows, slow = read(name, lens, folder), Slow(name, lens)
    for target, token in of(rows, "contribution_examples").select("target", "token").iter_rows():
        for layer in range(len(slow.stream.layers)):
            row = of(rows, "contribution_layers", target=target, layer=layer).row(0, named=True)
            m, vectors = slow.coefficients(layer), slow.written(layer)
            alone = np.array([float(slow.gain(layer, vector, token)) for vector in vectors])
            helpful, unhelpful = alone > 0, alone < 0
            assert row["active"] == (m != 0).sum()
            assert row["helpful_certain"] + row["unhelpful_certain"] + row["undecided"] == row["active"]
            for side, mine, sign in (("helpful", helpful, 1), ("unhelpful", unhelpful, -1)):
                assert row[side] == mine.sum()
                assert row[f"{side}_negative"] == (mine & (m < 0)).sum()
                size = np.abs(alone[mine])
                assert row[f"{side}_effective"] == pytest.approx(
                    size.sum() ** 2 / (size**2).sum() if mine.any() else 0, rel=1e-3
                )
                top = np.argsort(-sign * alone, kind="stable")[: min(TOP, mine.sum())]
                for name_, chosen in ((f"{side}_all", mine), (f"{side}_top", top)):
                    expected = float(slow.gain(layer, vectors[chosen].sum(0), token))
                    assert row[name_] == pytest.approx(expected, abs=2e-4, rel=2e-4)
                    logit = slow.above_mean(layer, vectors[chosen].sum(0), token)
                    assert row[f"{name_}_logit"] == pytest.approx(logit, abs=2e-4, rel=2e-4)
                # Everything was evaluated: the certain are all.
                assert row[f"{side}_all_certain"] == pytest.approx(row[f"{side}_all"], abs=1e-5)
            active = np.flatnonzero(m)
            order = {
                "increase": -alone,
                "coefficient": -np.abs(m),
                "weight": -np.linalg.norm(vectors, axis=1),
                "rank": slow.ranks(vectors, token),
            }
            for choice, score in order.items():
                chosen = active[np.argsort(score[active], kind="stable")[:TOP]]
                expected = float(slow.gain(layer, vectors[chosen].sum(0), token))
                assert row[f"by_{choice}"] == pytest.approx(expected, abs=2e-4, rel=2e-4), (choice, layer)
                logit = slow.above_mean(layer, vectors[chosen].sum(0), token)
                assert row[f"by_{choice}_logit"] == pytest.approx(logit, abs=2e-4, rel=2e-4)


@pytest.mark.parametrize(("name", "lens"), SOME)
def test_helpful_neurons_together_equal_their_definition(name: str, lens: str, folder: Path) -> None:
    """From the least helpful on: the sum of increases and the increase by the sum (A40); the top as listed."""
    rows, slow = read(name, lens, folder), Slow(name, lens)
    token = of(rows, "contribution_examples", target="model")["token"][0]
    for layer in range(len(slow.stream.layers)):
        vectors = slow.written(layer)
        alone = np.array([float(slow.gain(layer, vector, token)) for vector in vectors])
        ascending = [int(one) for one in np.argsort(alone, kind="stable") if alone[one] > 0]
        found = of(rows, "contribution_sums", layer=layer)
        assert found["neurons"][-1] == len(ascending)
        kept = ("neurons", "separate", "together", "logit")
        for count, separate, together, logit in found.select(kept).iter_rows():
            some = ascending[:count]
            assert separate == pytest.approx(alone[some].sum(), abs=1e-4, rel=1e-3)
            expected = float(slow.gain(layer, vectors[some].sum(0), token))
            assert together == pytest.approx(expected, abs=2e-4, rel=2e-4)
            alike = slow.above_mean(layer, vectors[some].sum(0), token)
            assert logit == pytest.approx(alike, abs=2e-4, rel=2e-4)
        for side in (1, -1):
            listed = of(rows, "contribution_neurons", layer=layer, side=side)
            best = [int(one) for one in np.argsort(-side * alone, kind="stable") if side * alone[one] > 0][
                :TOP
            ]
            assert listed["neuron"].to_list() == best
            assert listed["rank"].to_list() == list(range(len(best)))
            assert listed["increase"].to_numpy() == pytest.approx(alone[best], abs=1e-5, rel=1e-4)
            assert listed["coefficient"].to_numpy() == pytest.approx(slow.coefficients(layer)[best], rel=1e-3)


@pytest.mark.parametrize(("name", "lens"), SOME)
def test_a_survey_holds_every_increase_and_is_exact_at_the_ends(name: str, lens: str) -> None:
    """Intervals hold what brute force finds, for the target and for any other token; extremes and signs are right."""
    model, words = wrapped(name), Vocabulary([], [])
    with torch.inference_mode():
        stream = trace(model.hf, model.anatomy, torch.from_numpy(PREFIX.astype(np.int64))[None])
        prediction = contributions.TracedPrediction(stream, Lens.of(model.anatomy, lens), 11, (), words)
        known = quotients(model, prediction.lens, Geometry(prediction.lens.unembedding))
        surveyed = IntervalSurvey(prediction.bases, 3)(prediction.groups("neurons"), known)
        for one, other in zip(
            surveyed, IntervalSurvey(prediction.bases, 3)(prediction.groups("neurons")), strict=True
        ):
            assert torch.allclose(one.likely, other.likely, atol=1e-6, rtol=1e-5)
        for layer, found in enumerate(surveyed):
            neurons = contributions._Neurons.of(prediction, layer)
            group = Parts(len(neurons.vectors), neurons.base, lambda _, all=neurons.vectors: all)
            for token in (11, OTHER):
                bases = prediction.bases.following(token)
                exact = exhaustive(bases, group)[:, 0]
                mine = found.moved(*neurons.odds(prediction.bases, token))
                assert bool((mine.low <= exact + 2e-6).all())
                assert bool((mine.high >= exact - 2e-6).all())
                assert bool((mine.signs * exact >= 0).all())
                assert bool(((mine.low <= mine.likely) & (mine.likely <= mine.high)).all())
                if token == 11:
                    order = exact.argsort()
                    ends = torch.cat([order[:3], order[-3:]])
                    # Evaluated: as narrow as rounding allows, and no wider.
                    base = torch.full((len(exact),), group.base)
                    size = norms(bases.directions(neurons.vectors, base)) * abs(prediction.lens.multiplier)
                    doubt = bases.rounding(size, base, exact)
                    assert torch.allclose((found.high - found.low)[ends], 2 * doubt[ends], rtol=1e-3, atol=0)
                    assert torch.allclose(mine.likely[ends], exact[ends], atol=1e-7)
                    assert torch.equal(mine.likely.argsort()[:3], order[:3])


def test_a_survey_of_many_tokens_decides_most_signs() -> None:
    """With far more tokens than are evaluated, most signs are known, and all that are known are right (A47)."""
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(6000, 12, generator=generator)
    lens = Lens("raw", None, unembedding, None, 1.0, None)
    vectors = 0.03 * torch.randn(400, 12, generator=generator)
    vectors[5] = 0
    bases = ResidualBases(lens, 5, torch.randn(1, 12, generator=generator), None)
    group = Parts(400, 0, lambda some: vectors if some is None else vectors[some])
    (found,) = IntervalSurvey(bases, 4)([group])
    exact = exhaustive(bases, group)[:, 0]
    assert bool(((found.low <= exact + 1e-7) & (exact <= found.high + 1e-7)).all())
    assert bool((found.signs * exact >= 0).all())
    assert float((found.signs == 0).float().mean()) < 0.2
    assert float(found.low[5]) == float(found.high[5]) == float(found.likely[5]) == 0.0
    assert bool(((found.low <= found.likely) & (found.likely <= found.high)).all())
    off = (found.likely - exact).abs().sum() / exact.abs().sum()
    assert float(off) < 0.02


@tries(30)
@given(st.integers(1, 3000))
def test_marks_are_dense_at_both_ends(vocabulary: int) -> None:
    """Ranks are marked from first to last, alike from above and below, and none is further off than a tenth."""
    places = marked(vocabulary)
    assert places[0] == 0
    assert places[-1] == vocabulary - 1
    assert np.array_equal(places, (vocabulary - 1 - places)[::-1])
    depth = np.minimum(places, vocabulary - 1 - places)
    gaps = np.diff(places)
    assert (gaps <= np.maximum(1, np.ceil(0.1 * np.maximum(depth[:-1], depth[1:]) + 1))).all()


def test_ranks_between_marks_are_nearly_right(tmp_path: Path) -> None:
    """Exact where ranks are marked, within a tenth elsewhere, upside down for a negative coefficient (A44)."""
    generator = torch.Generator().manual_seed(0)
    hf = FAMILIES["llama"]()
    lens = Lens("raw", None, torch.randn(2000, 32, generator=generator), None, 1.0, None)
    part = describe(hf).layers[1]
    order = ValueRanks.of(lens, part, Work(tmp_path), "order")
    again = ValueRanks.of(lens, part, Work(tmp_path), "order")
    assert torch.equal(order.marks, again.marks)
    coefficient = torch.randn(40, generator=generator)
    coefficient[3] = 0
    vectors = coefficient[:, None] * part.values().detach()
    for token in range(0, 2000, 37):
        scores = vectors @ lens.unembedding.T
        exact = (scores > scores[:, [token]]).sum(-1).float()
        found = order.rank(vectors, coefficient < 0, token)
        assert torch.isinf(found[3])
        keep = torch.arange(40) != 3
        depth = torch.minimum(exact, 1999 - exact)
        off = (found - exact).abs()[keep]
        assert bool((off <= torch.where(depth < 60, 0.0, 0.1 * depth + 1)[keep]).all())


@given(st.integers(1, 200), st.integers(1, 40))
def test_layers_are_spread_from_first_to_last(layers: int, most: int) -> None:
    """Distinct, ascending, at most so many, and both ends where there is room for two."""
    found = spread(layers, most)
    assert found == sorted(set(found))
    assert len(found) == min(layers, most)
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, layers - 1)


def test_ranking_puts_signs_apart_and_ties_in_order() -> None:
    """The helpful are above 0, the unhelpful below, and equal ones in the order of their numbers."""
    values = torch.tensor([0.0, 1, 2, 1, -1, 0, -3, -1], dtype=torch.float64)
    found = rank(Intervals(values, values, values), torch.ones(8))
    assert found.helpful.tolist() == [2, 1, 3]
    assert found.unhelpful.tolist() == [6, 4, 7]
    assert found.signs.tolist() == [0, 1, 1, 1, -1, 0, -1, -1]


@tries(50)
@given(st.integers(0, 300), st.integers(0, 50))
def test_a_null_token_is_another_one_and_about_as_frequent(token: int, example: int) -> None:
    """It is within ten places in the order of frequency, never the token itself, and drawn again alike."""
    others = Frequencies(np.arange(250) * 2)
    near = others.near(3, example)
    found = near(token)
    assert found == near(token)
    assert found != token
    assert found % 2 == 0
    if token % 2 == 0 and 40 <= token <= 450:
        assert abs(found - token) <= 40


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny gated model and a run of it."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "run", top=5), model


def tables(run: Run, model: Model, folder: Path) -> dict[str, pl.DataFrame]:
    """What the measurement adds to a run."""
    folder.mkdir(exist_ok=True)
    found = measure(run, model, Sizes(sentences=20), Work(folder))
    return {name: pl.concat([pl.from_arrow(part) for part in parts]) for name, parts in found.items()}  # type: ignore[misc]


@pytest.mark.slow
def test_an_interrupted_measurement_ends_in_the_same_tables(
    case: tuple[Run, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second shard and begun again, it gives the very same rows."""
    run, model = case
    whole = tables(run, model, tmp_path / "whole")
    example, calls = ContributionSurvey.example, iter(range(17))

    def fails(*some: Any) -> Rows:
        next(calls)
        return example(*some)

    with monkeypatch.context() as patch:
        patch.setattr(ContributionSurvey, "example", fails)
        with pytest.raises(StopIteration):
            tables(run, model, tmp_path / "cut")
    resumed = tables(run, model, tmp_path / "cut")
    assert whole.keys() == set(CONTRIBUTIONS)
    for name, frame in whole.items():
        assert frame.equals(resumed[name], null_equal=True), name
        assert frame.columns == SCHEMAS[name].names


@pytest.fixture(scope="module")
def measured(case: tuple[Run, Model], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with the tables in it."""
    run, model = case
    copied = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(run.path, copied)
    work = tmp_path_factory.mktemp("work")
    return add_tables(copied, measure(run, model, Sizes(sentences=20), Work(work)), {})


def test_tables_have_a_row_for_everything(measured: Run) -> None:
    """One for each example, target, lens, point and layer; null tokens differ from the model's; sums are of ranks."""
    sizes = {name: measured.table(name).collect() for name in CONTRIBUTIONS}
    examples = sizes["contribution_examples"]["example"].n_unique()
    assert sizes["contribution_examples"].height == 2 * examples
    assert sizes["contribution_points"].height == examples * 2 * 3 * 7
    assert sizes["contribution_layers"].height == examples * 2 * 3
    assert sizes["cross_layers"].height == examples * 3
    assert sizes["cross_queries"].height == examples * 6
    tokens = sizes["contribution_examples"].pivot("target", index="example", values="token")
    assert (tokens["model"] != tokens["null"]).all()
    assert sizes["contribution_layers"]["by_rank"].null_count() == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 99))
def test_pairs_are_of_other_documents(rows: list[tuple[int, int]], seed: int) -> None:
    """The partner has the same prediction and is of another document, wherever there is such a prefix (A44)."""
    tokens, documents = np.array(rows).T
    pairs = Pairs.of(tokens, documents, seed)
    for place, (token, document) in enumerate(rows):
        away = [one for one in range(len(rows)) if documents[one] != document]
        alike = [one for one in away if tokens[one] == token]
        assert (pairs.same[place] in alike) if alike else (pairs.same[place] == -1)
        far = [one for one in away if tokens[one] != token] if alike else []
        assert (pairs.other[place] in far) if far else (pairs.other[place] == -1)
        assert set(pairs.partners(place).values()) <= {pairs.same[place], pairs.other[place]} - {-1}


def test_neurons_chosen_elsewhere_are_scored_here(measured: Run, case: tuple[Run, Model]) -> None:
    """The ten by size and by increase of the partner, summed as they write here; in nats and in logits (A44)."""
    _, model = case
    rows = measured.table("contribution_pairs").collect()
    examples = measured.table("contribution_examples").filter(target="model").collect()
    listed = measured.table("contribution_neurons").filter(side=1).collect()
    contexts = measured.table("contexts").select("context", "tokens").collect()
    survey = contributions.ContributionSurvey(
        model, Lens.of(model.anatomy, "frozen"), (), Vocabulary([], []),
        Geometry(Lens.of(model.anatomy, "frozen").unembedding), {}, None,
    )  # fmt: skip

    def traced(example: int) -> contributions.TracedPrediction:
        row = examples.row(example, named=True)
        tokens = contexts.filter(context=row["context"])["tokens"][0].to_numpy()
        return survey.traced(tokens[: row["position"] + 1].astype(np.int32))

    assert rows.filter(kind="same").height > 0
    with torch.inference_mode():
        for row in rows.sample(6, seed=0).iter_rows(named=True):
            same = [examples.row(row[name], named=True)["token"] for name in ("example", "partner")]
            assert (same[0] == same[1]) == (row["kind"] == "same")
            here, there, layer = traced(row["example"]), traced(row["partner"]), row["layer"]
            m = there.stream.layers[layer].coefficients[there.position]
            vectors = here.stream.neuron_parts(layer, here.position)
            best = listed.filter(example=row["partner"], layer=layer)["neuron"].to_list()
            for name, chosen in (
                ("coefficient", m.abs().topk(TOP).indices),
                ("increase", torch.tensor(best)),
            ):
                total, base = vectors[chosen].sum(0, keepdim=True), torch.tensor([2 * layer + 1])
                if name == "increase" and len(best) < TOP:
                    continue
                expected = float(here.bases.increases(total, base))
                assert row[f"by_{name}"] == pytest.approx(expected, abs=1e-5)
                logit = float(here.bases.above_mean(total, base))
                assert row[f"by_{name}_logit"] == pytest.approx(logit, abs=1e-5)


@pytest.fixture(scope="module")
def found(measured: Run) -> dict[str, Finding]:
    """All findings, by id."""
    return {one.id: one for one in [*answers.findings(measured), *crosslayer.findings(measured)]}


def values(finding: Finding, **where: object) -> list[float]:
    """The column `value` of some rows."""
    return finding.frame.filter(*(pl.col(name) == value for name, value in where.items()))["value"].to_list()


def test_figures_of_contributions_equal_their_definitions(measured: Run, found: dict[str, Finding]) -> None:
    """Means over examples, ratios of means, and the null beside them, from the tables by other means (A44-A48)."""
    rows = measured.table("contribution_layers").collect()
    points = measured.table("contribution_points").collect()
    for target, column in (("model", "value"), ("null", "null")):
        some = rows.filter(target=target).drop("target")
        means = some.group_by("layer").mean().sort("layer")
        for choice, label in answers.CHOICES.items():
            for scale, suffix in answers.SCALES.items():
                row = found["table-1-ten-neurons-chosen"].frame.filter(chosen=label, scale=scale)
                assert row[column][0] == pytest.approx(some[f"by_{choice}{suffix}"].mean(), rel=1e-5)
        for side in answers.SIDES:
            counts = found["figure-6-helpful-and-unhelpful-neurons"].frame.filter(
                side=side, counted="neurons"
            )
            assert counts[column].to_list() == pytest.approx(means[side].to_list())
            certain, most = (
                found["figure-6-helpful-and-unhelpful-neurons"].frame.filter(
                    side=side, counted=f"neurons, {end}"
                )
                for end in ("certainly", "at most")
            )
            assert certain[column].to_list() == pytest.approx(means[f"{side}_certain"].to_list())
            assert (most[column] - certain[column]).to_list() == pytest.approx(means["undecided"].to_list())
            for scale, suffix in answers.SCALES.items():
                ten = found["figure-7-ten-against-all"].frame.filter(side=side, scale=scale)
                expected = (means[f"{side}_top{suffix}"] / means[f"{side}_all{suffix}"]).to_list()
                assert ten[column].to_list() == pytest.approx(expected, rel=1e-4)
        for part, label in (("attention", "attention"), ("ffn", "feed-forward")):
            parts = found["increases-by-layers"].frame.filter(part=label)
            assert parts[column].to_list() == pytest.approx(means[part].to_list(), rel=1e-4, abs=1e-6)
        for lens in LENSES:
            curve = (
                points.filter(target=target, lens=lens)
                .drop("target", "lens")
                .group_by("point")
                .mean()
                .sort("point")
            )
            drawn = found["figure-5-log-p-along-the-stream"].frame.filter(lens=lens)
            assert drawn[column].to_list() == pytest.approx(curve["log_probability"].to_list(), rel=1e-5)
    signs = rows.filter(target="model").drop("target").group_by("layer").sum().sort("layer")
    expected = (signs["helpful_negative"] / signs["helpful"]).to_list()
    assert values(found["negative-coefficients"], side="helpful") == pytest.approx(expected)


def test_the_curve_of_a_logit_is_the_logistic_and_the_stream_is_on_it(found: dict[str, Finding]) -> None:
    """F(l) = e^l / (e^l + B) at every margin, and the points of the stream lie on it (A36)."""
    frame = found["figure-2-probability-against-logit"].frame
    for scale, of in (
        ("p", lambda x: 1 / (1 + np.exp(-x))),
        ("log p (nats)", lambda x: -np.log1p(np.exp(-x))),
    ):
        some = frame.filter(scale=scale)
        assert some["value"].to_list() == pytest.approx(of(some["margin"].to_numpy()).tolist(), rel=1e-6)
    assert frame["series"].n_unique() == 2


def test_slopes_of_sums_are_the_textbooks(measured: Run) -> None:
    """Least squares for each example and layer (A40); in logits sums are additive, with slope 1."""
    rows = measured.table("contribution_sums").collect()
    found = answers.slopes(rows)
    assert found.height > 10
    for row in found.iter_rows(named=True):
        some = rows.filter(example=row["example"], layer=row["layer"])
        x, y = some["separate"].to_numpy(), some["together"].to_numpy()
        assert row["slope"] == pytest.approx(linregress(x, y).slope, rel=1e-3)


def test_figures_of_queries_equal_their_definitions(measured: Run, found: dict[str, Finding]) -> None:
    """Figures 8 and 13-19 and Tables 3 and 4, with their nulls, from the tables by other means (A49, A58-A64)."""
    queries, layers = measured.table("cross_queries").collect(), measured.table("cross_layers").collect()
    total = measured.manifest.model.layers
    means = queries.group_by("query").mean().sort("query")
    for side in crosslayer.SIDES:
        figure = found["figure-8-queries-of-one-layer"]
        assert values(figure, side=side) == pytest.approx(means[side].to_list(), rel=1e-4, abs=1e-6)
        for column, name in (("null", "matched"), ("certain", "certain")):
            drawn = figure.frame.filter(side=side)[column].to_list()
            assert drawn == pytest.approx(means[f"{side}_{name}"].to_list(), rel=1e-4, abs=1e-6)
        upper = found["figures-13-14-queries-of-all-layers"]
        assert values(upper, side=side) == pytest.approx(means[f"upper_{side}"].to_list(), rel=1e-4, abs=1e-6)
        for way, suffix in crosslayer.WAYS.items():
            drawn = values(found["figures-15-18-four-scores"], side=side, way=way)
            assert drawn == pytest.approx(means[f"{side}{suffix}"].to_list(), rel=1e-4, abs=1e-6)
            null = found["figures-15-18-four-scores"].frame.filter(side=side, way=way)["null"].to_list()
            assert null == pytest.approx(means[f"{side}{suffix}_matched"].to_list(), rel=1e-4, abs=1e-6)
    sums = layers.group_by("layer").sum().sort("layer")
    listed = (sums["helpful"] + sums["unhelpful"])[:-1]
    table = found["table-3-values-that-are-queries"].frame
    asked = ((sums["helpful_asked"] + sums["unhelpful_asked"])[:-1] / listed).to_list()
    assert table["value"].to_list() == pytest.approx(asked)
    matched = (sums["helpful_matched_asked"] + sums["unhelpful_matched_asked"])[:-1]
    assert table["null"].to_list() == pytest.approx((matched / listed).to_list())
    called = layers.group_by("layer").mean().sort("layer")["called"].to_list()
    union = [called[at] / (5 * at) for at in range(1, total)]
    assert values(found["table-4-neurons-called-by-earlier-layers"]) == pytest.approx(union)
    dealt = layers.group_by("layer").mean().sort("layer")["called_matched"].to_list()
    null = found["table-4-neurons-called-by-earlier-layers"].frame["null"].to_list()
    assert null == pytest.approx([dealt[at] / (5 * at) for at in range(1, total)])
    counts = layers.group_by("layer").mean().sort("layer")
    for label, name in {
        "as values": "values",
        "as queries, summed": "queries",
        "as queries, chained": "chains",
    }.items():
        drawn = values(found["figure-19-where-values-and-queries-are"], kind=label)
        assert drawn == pytest.approx(counts[f"{name}_first"].to_list())
        where = found["figure-19-where-values-and-queries-are"].frame.filter(kind=label)
        assert where["null"].to_list() == pytest.approx(counts["writes_first"].to_list())
    extremes = found["extremes-act-as-queries"].frame.filter(side="helpful")
    assert extremes["value"][0] == pytest.approx(sums["helpful_first"].sum() / sums["helpful"].sum())
    like = sums["helpful_matched_first"].sum() / sums["helpful"].sum()
    assert extremes["null"][0] == pytest.approx(like)


@pytest.mark.slow
def test_every_figure_can_be_drawn(found: dict[str, Finding]) -> None:
    """Each names its analyses, says a number, and lowers to a chart."""
    assert len(found) == 18
    for one in found.values():
        assert any(letter.isdigit() for letter in one.says), one.id
        assert "nan" not in one.says.lower().split(), one.says
        assert chart(one) is not None


# -- sharing a whole among its parts ------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(-5, 5))
@example([1.0, -7e-310], -1.0)  # a side so small that no finite factor makes it count
def test_shares_add_up_to_their_total(values: list[float], total: float) -> None:
    """Sharing conserves the total (A41)."""
    increases = np.array(values)
    if abs(float(increases.sum())) < 1e-3 and increases.any():
        return
    found = shared(increases, total)
    assert float(found.sum()) == pytest.approx(total, abs=1e-6 * (1 + float(np.abs(increases).max()) * 1e3))


def test_sharing_keeps_signs_where_the_total_allows_it() -> None:
    """Helpful and unhelpful are scaled apart, so cancelling increases do not blow up (A41)."""
    found = shared(np.array([4.0, 2.0, -5.9]), 1.0)
    assert found.tolist() == pytest.approx([4.0, 2.0, -5.0])
    found = shared(np.array([4.0, 2.0, -1.0]), 2.0)
    assert found.tolist() == pytest.approx([2.0, 1.0, -1.0])


def test_what_sides_are_credited_with_adds_up(found: dict[str, Finding], measured: Run) -> None:
    """A41: shared between helpful and unhelpful neurons is what the layer did, for every example and on average."""
    main = answers.load(measured)["model"]
    both = answers.credited(main)
    np.testing.assert_allclose(both.sum(0), main["ffn"], atol=1e-5)
    frame = found["sides-shared"].frame
    means = (
        frame.filter(pl.col("counted") == "shared").group_by("layer").agg(pl.col("value").sum()).sort("layer")
    )
    np.testing.assert_allclose(means["value"].to_numpy(), main.mean("ffn").value, atol=1e-5)
    own = frame.filter((pl.col("counted") == "by themselves") & (pl.col("side") == "unhelpful")).sort("layer")
    np.testing.assert_allclose(own["value"].to_numpy(), main.mean("unhelpful_all").value, atol=1e-6)


def test_every_item_of_a_measurement_has_a_finding(found: dict[str, Finding]) -> None:
    """What contributions and cross-layer scores are said to answer, some figure or table answers."""
    answered = {item for one in found.values() for item in one.items}
    for name in ("contributions", "crosslayer"):
        (measurement,) = (one for one in catalogue.CATALOGUE if one.name == name)
        assert set(measurement.items) <= answered


def test_the_undecided_are_counted_by_their_estimates() -> None:
    """Where an interval holds 0 the sign is the estimate's, and what is certain stands apart (A47)."""
    low, high = (
        torch.tensor(ends, dtype=torch.float64) for ends in ([1.0, -1, -2, -1, 0], [2.0, 2, 1, -0.5, 0])
    )
    likely = torch.tensor([1.5, 1, -1, -0.7, 0], dtype=torch.float64)
    found = rank(Intervals(low, high, likely), torch.ones(5))
    assert found.signs.tolist() == [1, 1, -1, -1, 0]
    assert found.certain.tolist() == [1, 0, 0, -1, 0]
    neurons = contributions._Neurons(0, 1, torch.eye(5), torch.tensor([1.0, -1, 1, 1, 0]))
    counts = neurons.counts(found)
    sides = {name: counts[name] for name in ("helpful", "unhelpful", "helpful_certain", "unhelpful_certain")}
    assert sides == {"helpful": 2, "unhelpful": 2, "helpful_certain": 1, "unhelpful_certain": 1}
    assert (counts["active"], counts["undecided"], counts["helpful_negative"]) == (4, 2, 1)
