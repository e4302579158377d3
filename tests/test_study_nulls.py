"""A null passes the selection of its figure: another's output, fed in as one's own, exceeds nothing.

Here are the figures of examples (A18, A21 to A25, A29: `ASKED`, the bins of ranks, the sweep), of values (A11, A14,
A75), their ranks (A12, A13), distributions (A70, A71) and questions (A66, A76). Elsewhere: patterns of keys (A7, A8) in
test_study_keys.py, two runs (A4) in test_study_stability.py, triggers without a token (A9) in test_removal.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.intervals import Interval, share_by_group
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.findings import composition, distributions, questions, refinement, value_ranks, values
from mnemoscope.studies.findings.statistics import (
    PARTNER,
    ExampleFigure,
    ExampleGrid,
    Quantities,
    against_partner,
    refinement_grids,
)
from mnemoscope.studies.measures.lenses import Points
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.refinement import _Unit, measure

# Half widths of a 95 % interval within which nothing is nothing: 1.7 of them are 3.3 standard errors, which one figure
# in a thousand leaves, and all figures of this file together one time in thirty.
NOTHING = 1.7


def covers_zero(excess: Interval, place: int = 0) -> bool:
    """Whether a difference is within what chance leaves of 0."""
    one = excess.at(place)
    return bool(abs(one.value) <= NOTHING * (one.high - one.low) / 2)


Change = Callable[[pytest.MonkeyPatch, np.random.Generator], None]


def _outputs(patch: pytest.MonkeyPatch, generator: np.random.Generator) -> None:
    """Every residual and its memories get the feed-forward output of a random other example as their own."""
    joined = Points.joined.__func__  # type: ignore[attr-defined]

    def dealt(cls: type[Points], parts: list[Points], order: np.ndarray) -> Points:
        seen = joined(cls, parts, order)
        return Points(seen.residual, seen.ffn[_moved(len(seen.ffn), generator)], seen.coefficients)

    patch.setattr(Points, "joined", classmethod(dealt))


def _predictions(patch: pytest.MonkeyPatch, generator: np.random.Generator) -> None:
    """Every example gets the prediction of a random other one as its own."""
    end = _Unit._end

    def dealt(unit: _Unit, seen: Points) -> dict[str, torch.Tensor]:
        columns = end(unit, seen)
        order = _moved(len(columns["prediction"]), generator)
        return {name: values[order] for name, values in columns.items()}

    patch.setattr(_Unit, "_end", dealt)


def _moved(count: int, generator: np.random.Generator) -> torch.Tensor:
    """A random circle: nobody keeps their own."""
    order = generator.permutation(count)
    out = np.empty(count, np.int64)
    out[order] = np.roll(order, 1)
    return torch.from_numpy(out)


@pytest.fixture(scope="module")
def decoys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of a tiny model in which what is another example's stands as one's own."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    folder = tmp_path_factory.mktemp("decoys")
    runs = {}
    for name, change in {"output": _outputs, "prediction": _predictions}.items():
        run = mn.build(model, texts(900), folder / name, top=2, nulls=())
        with pytest.MonkeyPatch.context() as patch:
            change(patch, np.random.default_rng(1))
            (folder / f"work-{name}").mkdir()
            work = Work(folder / f"work-{name}", lambda _: None)
            found = measure(run, model, Sizes(positions=400), work)
            runs[name] = add_tables(run.path, found, {})
    return runs


FIGURES: dict[str, ExampleFigure] = {
    **refinement.ASKED,
    **{f"{column} {label}": asked for column in ("rank_output", "ffn_rank_residual")
       for label, asked in refinement.binned(column).items()},
    **composition.ASKED,
    **{f"none as strong as {least}": asked for least, asked in composition.SWEEP.items()},
}  # fmt: skip
OF_PREDICTIONS = {"said", "probability"}


@pytest.mark.parametrize("name", FIGURES)
def test_anothers_output_as_ones_own_exceeds_nothing(decoys: dict[str, Run], name: str) -> None:
    """Every figure of examples with a null, over all layers and lens by lens (A18, A21, A23-A25, A29)."""
    for grid in refinement_grids(decoys["prediction" if name in OF_PREDICTIONS else "output"]).values():
        contrast = against_partner(FIGURES[name], Quantities(grid), Quantities(grid, PARTNER), overall=True)
        assert contrast.excess.n is not None and contrast.excess.n[0] >= 20
        assert covers_zero(contrast.excess), (grid.name, contrast.own, contrast.null, contrast.excess)


def test_tokens_of_a_change_are_no_more_alike_by_anothers_output(decoys: dict[str, Run]) -> None:
    """A25, the share beyond the bound that unrelated pairs set."""
    for grid in refinement_grids(decoys["output"]).values():
        _, contrast = refinement.alike(grid)
        assert covers_zero(contrast.excess), (grid.name, contrast)


def test_a_null_without_the_selection_would_be_seen(decoys: dict[str, Run]) -> None:
    """ExampleFigure where one's own output displaced a token, another's looks innocent: that is what is to be found "
    "here."""
    grid = refinement_grids(decoys["output"])["model", "own"]
    own = refinement.composed(Quantities(grid))
    unselected = ExampleFigure(refinement.ASKED["old one lowered"].hits, lambda of: own)
    contrast = against_partner(unselected, Quantities(grid), Quantities(grid, PARTNER), overall=True)
    assert not covers_zero(contrast.excess)


# -- Figures of values, ranks, distributions and questions ---------------------------------------------------------

LAYERS, NEURONS, WORDS = 3, 400, 30


def triggers(seed: int) -> pl.DataFrame:
    """Strongest triggers whose values and next tokens are about as uneven as words, and have nothing to do with "
    "another."""
    generator = np.random.default_rng(seed)
    count = LAYERS * NEURONS
    weights = 1 / np.arange(1, WORDS + 1)
    top, token = generator.choice(WORDS, (2, count), p=weights / weights.sum())
    return pl.DataFrame(
        {
            "side": 2 * np.arange(count), "layer": np.repeat(np.arange(LAYERS), NEURONS), "top": top, "next": token,
            "document": generator.integers(0, 150, count),
        }
    ).with_columns(among="layer")  # fmt: skip


def test_dealt_out_targets_as_ones_own_agree_as_by_chance() -> None:
    """A11: by layer, and no layer is called above chance, of twenty draws in more than one or two."""
    called = 0
    for seed in range(20):
        found = values.TriggerAgreement.of(triggers(seed), "next", LAYERS)
        assert all(covers_zero(found.excess, layer) for layer in range(LAYERS))
        called += bool(found.above.any())
    assert called <= 3


def test_an_agreement_is_called_and_its_peak_found() -> None:
    """Where every tenth value of one layer writes what follows, that layer alone is above chance, and the peak."""
    rows = triggers(0).with_row_index()
    planted = (pl.col("layer") == 1) & (pl.col("index") % 10 == 0)
    found = values.TriggerAgreement.of(
        rows.with_columns(next=pl.when(planted).then("top").otherwise("next")), "next", LAYERS
    )
    assert found.above.tolist() == [False, True, False]
    assert found.peak.value == 1 and 0 <= found.peak.low <= 1 <= found.peak.high <= 2


def test_other_neurons_triggers_have_what_a_value_says_as_often() -> None:
    """A14: values with triggers that are not theirs agree as often as their chance says."""
    rows = triggers(3)
    rows = pl.concat(
        [rows, triggers(4).select(rows.columns).with_columns(top=rows["top"])]
    )  # two triggers of each
    side = rows["side"].unique().to_numpy()
    share, chance = values.agreeing(rows, side), values.others_agree(rows, side)
    assert abs(share.value - chance.mean()) <= NOTHING * (share.high - share.low) / 2
    hits = rows.filter(pl.col("next") == pl.col("top"))["side"].n_unique()
    assert share.value == pytest.approx(hits / len(side)) and share.low < share.value < share.high


def test_tokens_dealt_out_as_ones_own_are_met_by_chance() -> None:
    """A75: the expectation of dealt out tokens is what tokens that have nothing to do with the value give."""
    rows = triggers(5)
    top, token, layer = (rows[name].to_numpy() for name in ("top", "next", "layer"))
    null = values._expected(top, token, layer, layer, LAYERS)
    share = share_by_group((top == token).astype(float), layer, LAYERS, rows["document"].to_numpy())
    assert (np.abs(share.value - null) <= NOTHING * (share.high - share.low) / 2).all()


def ranks(seed: int = 0) -> pl.DataFrame:
    """Ranks of next tokens that are drawn as those of another neuron's are."""
    generator = np.random.default_rng(seed)
    rank, other = (generator.lognormal(1, 2, (2, 4000))).astype(int)
    return pl.DataFrame(
        {
            "rank": rank, "permuted_rank": other, "top_probability": generator.random(4000),
            "document": generator.integers(0, 200, 4000),
        }
    )  # fmt: skip


def test_another_neurons_next_token_ranks_as_ones_own() -> None:
    """A12, A13: medians differ by nothing; in every bin of confidence the share that agrees is the one by chance."""
    found = value_ranks.medians(ranks())
    assert covers_zero(found, 2)
    binned = value_ranks._binned(
        ranks().with_columns(hit=pl.col("rank") == 0, bin=pl.int_range(pl.len()) % 10)
    )
    for row in binned.iter_rows(named=True):
        half = NOTHING * (row["high"] - row["low"]) / 2
        assert abs(row["share"] - row["null"]) <= half * np.sqrt(2), row  # the null is drawn, too


def test_another_neurons_mark_is_met_as_often_as_ones_own() -> None:
    """A71: marks dealt out among the neurons of a layer are met by chance, in every part of the range."""
    generator = np.random.default_rng(0)
    cells, each = 80, 60
    cell = np.repeat(np.arange(cells), each)
    rows = pl.DataFrame(
        {
            "among": cell // (cells // 2), "cell": cell, "mark": generator.integers(0, 6, cells)[cell],
            "token": generator.integers(0, 6, cells * each), "part": generator.integers(0, 10, cells * each),
            "document": generator.integers(0, 300, cells * each),
        }
    )  # fmt: skip
    share, null = distributions.persistence(rows)
    for part in range(10):
        assert abs(share.value[part] - null[part]) <= NOTHING * (share.high[part] - share.low[part]) / 2


def test_directions_as_neurons_exceed_directions_as_others_do() -> None:
    """A70: of random directions as many lie above the bound of the others as were set apart to say so."""
    generator = np.random.default_rng(0)
    count = 4000
    units = pl.DataFrame({"layer": np.arange(count) % 4, "neuron": np.arange(count) // 4,
                          "kurtosis": generator.standard_t(4, count)})  # fmt: skip
    neurons = units.with_columns(kurtosis=generator.standard_t(4, count))
    own, null = distributions.exceeding(neurons, units)
    assert own == pytest.approx(null, abs=4 * np.sqrt(0.05 / (count / 2)))


def test_another_questions_answer_as_ones_own_is_first_as_often() -> None:
    """A66, A76: first as often as the null's, and what is resampled is answers."""
    generator = np.random.default_rng(0)
    answers = [f"answer {number}" for number in generator.integers(0, 60, 300)]
    rows = pl.DataFrame({"rank": generator.integers(0, 3, 300), "answer": answers})
    null = rows.with_columns(rank=generator.integers(0, 3, 300))
    share, chance = questions.first_by_answer(rows), questions.first_by_answer(null)
    assert share.n is not None and share.n == rows["answer"].n_unique()
    assert (
        abs(share.value - chance.value)
        <= NOTHING * np.hypot(share.high - share.low, chance.high - chance.low) / 2
    )
    alike = rows.with_columns(answer=pl.Series(np.arange(300).astype(str)))
    together = pl.concat([alike] * 4)  # four questions with each answer say no more than one
    assert questions.first_by_answer(together).low == pytest.approx(questions.first_by_answer(alike).low)


# -- The mechanism ---------------------------------------------------------------------------------------------------


def test_both_sides_go_through_one_selection() -> None:
    """The figure over what a side selects by its own quantities, each against a loop, and their difference."""
    generator = np.random.default_rng(0)
    count, layers = 60, 2
    rows = pl.DataFrame(
        {
            "x": generator.normal(size=count * layers), "x_permuted": generator.normal(size=count * layers),
            "y": generator.normal(size=count * layers), "y_permuted": generator.normal(size=count * layers),
        }
    )  # fmt: skip
    numbers = np.arange(count)
    examples = pl.DataFrame({"example": numbers, "document": numbers, "partner": np.roll(numbers, 3)})
    examples = examples.with_columns(partner=pl.when(pl.col("example") != 7).then("partner"))
    grid = ExampleGrid("own", rows, examples)
    found = against_partner(
        ExampleFigure(lambda of: of["x"] > 0, lambda of: of["y"] > 0.2),
        Quantities(grid),
        Quantities(grid, PARTNER),
    )
    for layer in range(layers):
        of = rows[layer::layers]
        own = of.filter(pl.col("y") > 0.2)["x"].to_numpy() > 0
        other = (
            of.filter((pl.col("y_permuted") > 0.2) & (pl.Series(numbers) != 7))["x_permuted"].to_numpy() > 0
        )
        assert (found.own.value[layer], found.null.value[layer]) == pytest.approx((own.mean(), other.mean()))
        assert found.excess.value[layer] == pytest.approx(own.mean() - other.mean())
        assert found.excess.low[layer] < found.excess.value[layer] < found.excess.high[layer]
    with pytest.raises(KeyError):
        Quantities(grid, PARTNER)["z"]
