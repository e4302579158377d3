"""What the study counts and sums of surveyed contributions, against all of them taken through a real vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.stream import trace
from mnemoscope.prediction.bases import Geometry, norms
from mnemoscope.prediction.search import Intervals, IntervalSurvey, exhaustive
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.studies.measures.contributions import TOP, _Neurons, rank, spread
from mnemoscope.studies.measures.crosslayer import RankedNeurons
from mnemoscope.text.vocabulary import Vocabulary

pytestmark = [pytest.mark.sample, pytest.mark.slow]

TEXT = "The Eiffel Tower is in the city of"
LAYERS = spread(30, 4)
OFF = 0.02  # what docs/methods.md (A39) promises of columns that add up estimates: two in a hundred


@pytest.fixture(scope="module")
def prediction(sample_model: Model) -> TracedPrediction:
    """One traced sentence under the study's lens."""
    tokens = sample_model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    lens = Lens.of(sample_model.anatomy, "frozen")
    with torch.inference_mode():
        stream = trace(sample_model.hf, sample_model.anatomy, tokens, upcast=sample_model.dtype != "fp32")
        target = int(stream.logits[-1].argmax())
        return TracedPrediction(stream, lens, target, (), Vocabulary([], []), Geometry(lens.unembedding))


@cache
def both(prediction: TracedPrediction) -> dict[int, tuple[_Neurons, Intervals, Intervals]]:
    """The neurons of some layers, surveyed and evaluated one by one."""
    with torch.inference_mode():
        groups = prediction.groups("neurons")
        surveyed = IntervalSurvey(prediction.bases, TOP)(groups)
        found = {}
        for layer in LAYERS:
            exact = exhaustive(prediction.bases, groups[layer])[:, 0]
            neurons = _Neurons.of(prediction, layer)
            base = torch.full((len(exact),), neurons.base)
            size = norms(prediction.bases.directions(neurons.vectors, base))
            doubt = prediction.bases.rounding(size, base, exact)
            found[layer] = neurons, surveyed[layer], Intervals(exact - doubt, exact + doubt, exact)
        return found


@cache
def other(prediction: TracedPrediction) -> int:
    """A token that the model does not predict."""
    return int(prediction.stream.logits[-1].topk(50).indices[-1])


def ranked(
    prediction: TracedPrediction, layer: int, null: bool
) -> tuple[_Neurons, RankedNeurons, RankedNeurons]:
    """A layer in order for the prediction or for another token, surveyed and exact."""
    neurons, surveyed, exact = both(prediction)[layer]
    if null:
        odds = neurons.odds(prediction.bases, other(prediction))
        surveyed, exact = surveyed.moved(*odds), exact.moved(*odds)
    return neurons, rank(surveyed, neurons.strength), rank(exact, neurons.strength)


@pytest.mark.parametrize("layer", LAYERS)
def test_intervals_hold_what_is_exact(prediction: TracedPrediction, layer: int) -> None:
    """To what fp32 may be off; the ten of each side are exact."""
    _, surveyed, exact = both(prediction)[layer]
    assert bool(((surveyed.low <= exact.high) & (exact.low <= surveyed.high)).all())
    _, mine, theirs = ranked(prediction, layer, null=False)
    assert torch.equal(mine.top, theirs.top)
    assert torch.allclose(mine.increase[mine.top], theirs.increase[mine.top], atol=1e-6, rtol=1e-5)
    # Evaluated: as narrow as rounding allows, and no wider.
    widths = [(one.high - one.low)[mine.top] for one in (surveyed, exact)]
    assert torch.allclose(*widths, rtol=1e-3, atol=0)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_counts_are_certain_and_what_is_undecided_is_little(
    prediction: TracedPrediction, layer: int, null: bool
) -> None:
    """Signs are right where they are certain; a side has so many as are certain, and at most the undecided more."""
    neurons, mine, theirs = ranked(prediction, layer, null)
    assert bool((mine.certain * theirs.certain >= 0).all())
    found, exact = neurons.counts(mine), neurons.counts(theirs)
    for side in ("helpful", "unhelpful"):
        assert 0 <= exact[side] - found[f"{side}_certain"] <= found["undecided"]
        assert found[side] == pytest.approx(exact[side], abs=0.02 * found["active"])
    assert found["undecided"] <= 0.1 * found["active"]
    size = theirs.increase.abs()
    assert float(size[mine.certain == 0].sum()) <= 0.1 * float(size.sum())


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_how_concentrated_a_layer_is(prediction: TracedPrediction, layer: int, null: bool) -> None:
    """(sum C)^2 / sum C^2 of estimates."""
    neurons, mine, theirs = ranked(prediction, layer, null)
    found, exact = neurons.counts(mine), neurons.counts(theirs)
    for side in ("helpful_effective", "unhelpful_effective"):
        assert found[side] == pytest.approx(exact[side], rel=OFF)


@pytest.mark.parametrize("layer", LAYERS)
def test_sums_of_helpful_neurons(prediction: TracedPrediction, layer: int) -> None:
    """The helpful, from the least helpful on: each alone, added up, and together (A40)."""
    neurons, mine, theirs = ranked(prediction, layer, null=False)
    theirs = replace(
        theirs, increase=torch.where(mine.signs * theirs.signs > 0, theirs.increase, 0.0 * mine.increase)
    )
    mine = replace(mine, increase=torch.where(theirs.signs == 0, 0.0, mine.increase))
    with torch.inference_mode():
        found, exact = (neurons.cumulated(one, prediction.bases) for one in (mine, theirs))
    for column in ("separate", "together"):
        most = float(np.abs(exact[column]).max())
        assert found[column] == pytest.approx(exact[column], abs=OFF * most)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_sums_weighted_with_increases(prediction: TracedPrediction, layer: int, null: bool) -> None:
    """Sums of |C| over the neurons of a side, which weight queries (A49), and over all (A63)."""
    _, mine, theirs = ranked(prediction, layer, null)
    for some in (mine.signs > 0, mine.signs < 0, mine.signs < 2):
        sums = [float(one.increase[some].abs().sum()) for one in (mine, theirs)]
        assert sums[0] == pytest.approx(sums[1], rel=OFF)
