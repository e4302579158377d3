"""Where the truth is known: explain names exactly the planted head and neurons, with sign and size."""

from __future__ import annotations

import math
from functools import cache

import polars as pl
import pytest
import torch
from planted import COPYING, COUNTRY, FOIL, MEMORIES, PROMPT, VETO, planted

from mnemoscope import explain
from mnemoscope.model.model import Model
from mnemoscope.prediction.explanation import Explanation


@cache
def _model() -> Model:
    return planted()


@cache
def _found(prompt: str = PROMPT, lens: str = "frozen") -> Explanation:
    return explain(_model(), prompt, " Paris", " London", top=4, lens=lens, ablate=4)


def _neurons(frame: pl.DataFrame, sign: int) -> set[tuple[int, int]]:
    rows = frame.filter(pl.col("leave_one_out") * sign > 1e-6)
    return {(row["layer"], row["neuron"]) for row in rows.iter_rows(named=True)}


def test_it_says_the_capital() -> None:
    """The construction works: Paris is predicted after France, Berlin after the made-up country."""
    assert _found().predictions["piece"][0] == " Paris"
    other = explain(_model(), " the capital of east is", top=1)
    assert other.target.piece == " Berlin"


@pytest.mark.parametrize("lens", ["frozen", "own", "raw"])
def test_the_head_and_its_source_are_named(lens: str) -> None:
    """One head x source carries the capital; every other one carries nothing to speak of."""
    heads = _found(lens=lens).heads.sort(pl.col("leave_one_out").abs(), descending=True)
    best = heads.row(0, named=True)
    assert (best["layer"], best["head"], best["source"]) == (*COPYING, COUNTRY)
    assert best["source_token"] == " France"
    assert best["weight"] > 0.99
    # The own lens renormalises what is left, and so hides most of a loss.
    assert best["leave_one_out"] > (1e-3 if lens == "own" else 0.05)
    assert heads["leave_one_out"][1:].abs().max() < 1e-6


@pytest.mark.parametrize("lens", ["frozen", "raw"])
def test_the_memories_and_the_vetoes_are_named_with_their_signs(lens: str) -> None:
    """Exactly the planted neurons act: two write the capital, one vetoes it, one says the foil."""
    neurons = _found(lens=lens).neurons
    assert _neurons(neurons, 1) == set(MEMORIES)
    assert _neurons(neurons, -1) == {VETO, FOIL}
    order = neurons.sort("leave_one_out", descending=True)
    assert (order["layer"][0], order["neuron"][0]) == MEMORIES[0]
    assert order["promotes"][0][0] == " Paris"
    veto = neurons.filter((pl.col("layer") == VETO[0]) & (pl.col("neuron") == VETO[1])).row(0, named=True)
    assert veto["suppresses"][0] == " Paris"


def test_sizes_are_those_of_the_construction() -> None:
    """Logits of the planted neurons are coefficient x value x unembedding / rms of the final residual."""
    found = _found()
    stream = _residuals()
    for (layer, neuron), value in ((MEMORIES[0], 0.30), (MEMORIES[1], 0.20), (VETO, -0.15)):
        row = found.neurons.filter((pl.col("layer") == layer) & (pl.col("neuron") == neuron)).row(
            0, named=True
        )
        rms = float(stream.square().mean().sqrt())
        assert row["logit"] == pytest.approx(row["coefficient"] * value * 0.45 / rms, rel=1e-4)
        # Only the target's logit moves, so its probability alone says what normalisation takes back.
        p = math.exp(found.log_probability)
        expected = row["logit"] + math.log(p * math.exp(-row["logit"]) + 1 - p)
        assert row["leave_one_out"] == pytest.approx(expected, abs=1e-4)


def _residuals() -> torch.Tensor:
    from mnemoscope.model.stream import trace

    model = _model()
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    return trace(model.hf, model.anatomy, tokens).final[-1].float()


def test_the_chain_shows_the_known_edge() -> None:
    """The memories were switched on by the head's copy of the country, the veto by the token that is there."""
    queries = _found().queries
    for memory in MEMORIES:
        best = _best(queries, memory)
        assert (best["kind"], best["query_layer"], best["query_unit"], best["source"]) == (
            "head",
            *COPYING,
            COUNTRY,
        )
        assert best["source_token"] == " France"
    assert _best(queries, VETO)["kind"] == "embedding"
    head = _found().heads.filter((pl.col("head") == COPYING[1]) & (pl.col("source") == COUNTRY)).sort("layer")
    assert head["chain"][0] > head["leave_one_out"][0]  # it earns what the memories do with it


def _best(queries: pl.DataFrame, neuron: tuple[int, int]) -> dict[str, object]:
    rows = queries.filter((pl.col("layer") == neuron[0]) & (pl.col("neuron") == neuron[1]))
    rows = rows.filter(pl.col("kind") != "remainder").sort(pl.col("share").abs(), descending=True)
    best = rows.row(0, named=True)
    # Nothing else has a share to speak of, as nothing else was built.
    assert abs(float(best["share"])) > 20 * float(rows["share"][1:].abs().max() or 0)
    assert set(rows["kind"]) <= {"head", "neuron", "embedding"}
    return best


def test_what_beats_the_foil_is_the_country() -> None:
    """Paris minus London comes from the token France, and falls by the neuron that says London."""
    contrast = _found().contrasts[0]
    best = contrast.sources.sort("increase", descending=True).row(0, named=True)
    assert best["source_token"] == " France"
    worst = contrast.neurons.sort("increase").row(0, named=True)
    assert (worst["layer"], worst["neuron"]) in {FOIL, VETO}


def test_the_sub_value_came_from_the_embedding_of_the_country() -> None:
    """By both methods, only the token's own embedding matters for what the head takes from it (A53, A54)."""
    explained = explain(_model(), PROMPT, " Paris", " London", top=2)
    rows = explained.attention_queries
    assert set(rows["source_token"]) == {" France"}
    assert rows.sort("fixed", descending=True)["point"][0] == "Lin0"


def test_ablation_agrees_on_who_acts() -> None:
    """Without the copying head the memories stay off as well: its effect is larger than its leave-one-out."""
    tried = _found().ablations
    head = tried.filter(pl.col("kind") == "head").sort("effect", descending=True).row(0, named=True)
    assert (head["layer"], head["unit"], head["source"]) == (*COPYING, COUNTRY)
    assert head["effect"] > head["leave_one_out"]
    veto = tried.filter((pl.col("kind") == "neuron") & (pl.col("unit") == VETO[1])).row(0, named=True)
    assert veto["effect"] < 0
