"""A null passes the selection of its figure: another's output, fed in as one's own, exceeds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.intervals import Interval
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.findings import composition, refinement
from mnemoscope.studies.findings.statistics import (
    PARTNER,
    Asked,
    ExampleGrid,
    Side,
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


DECOY_OF = {
    **{("refinement", name): "prediction" if name == "said" else "output" for name in refinement.ASKED},
    **{("composition", name): "output" for name in composition.ASKED},
}
ANALYSES: dict[str, Any] = {"refinement": refinement, "composition": composition}


@pytest.mark.parametrize(("analysis", "name"), DECOY_OF)
def test_anothers_output_as_ones_own_exceeds_nothing(
    decoys: dict[str, Run], analysis: str, name: str
) -> None:
    """Every figure of examples with a null, over all layers and lens by lens (A18, A21, A23-A25, A29)."""
    grids = refinement_grids(decoys[DECOY_OF[analysis, name]])
    for grid in grids.values():
        contrast = ANALYSES[analysis].contrasts(grid)[name]
        assert contrast.excess.n is not None and contrast.excess.n[0] >= 20
        assert covers_zero(contrast.excess), (grid.name, contrast.own, contrast.null, contrast.excess)


def test_tokens_of_a_change_are_no_more_alike_by_anothers_output(decoys: dict[str, Run]) -> None:
    """A25, the share beyond the bound that unrelated pairs set."""
    for grid in refinement_grids(decoys["output"]).values():
        _, contrast = refinement.alike(grid)
        assert covers_zero(contrast.excess), (grid.name, contrast)


def test_a_null_without_the_selection_would_be_seen(decoys: dict[str, Run]) -> None:
    """Asked where one's own output displaced a token, another's looks innocent: that is what is to be found here."""
    grid = refinement_grids(decoys["output"])["model", "own"]
    own = refinement.composed(Side(grid))
    unselected = Asked(refinement.ASKED["old one lowered"].hits, lambda of: own)
    contrast = against_partner(unselected, Side(grid), Side(grid, PARTNER), overall=True)
    assert not covers_zero(contrast.excess)


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
        Asked(lambda of: of["x"] > 0, lambda of: of["y"] > 0.2), Side(grid), Side(grid, PARTNER)
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
        Side(grid, PARTNER)["z"]
