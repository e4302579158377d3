"""Agreement of values and text against loops, its null, and ranks against a slow definition in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from synthetic import make_run
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings import value_ranks, values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made by hand."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", layers=4, neurons=12)


def by_id(run: Run) -> dict[str, values.Finding]:
    return {one.id: one for one in values.findings(run)}


def test_agreement_is_that_of_a_loop_over_neurons(run: Run) -> None:
    """Per layer and sign, the share of strongest triggers whose next (last) token the value writes first."""
    frame = by_id(run)["figure-4-agreement"].frame
    tops = (
        run.table("values").filter(pl.col("rank") == 0).collect().rows_by_key(["layer", "neuron", "polarity"])
    )
    hits: dict[tuple[str, str, int], list[bool]] = {}
    for row in run.table("triggers").filter(pl.col("rank") == 0).collect().iter_rows(named=True):
        if row["next_token"] is None:
            continue
        top = tops[row["layer"], row["neuron"], row["polarity"]][0][1]
        tokens = run.contexts([row["context"]])[row["context"]].tokens
        side = "largest coefficients" if row["polarity"] > 0 else "most negative coefficients"
        for mode, token in (("next token", row["next_token"]), ("last token", tokens[row["position"]])):
            hits.setdefault((side, mode, row["layer"]), []).append(token == top)
    assert frame.height == len(hits)
    for row in frame.iter_rows(named=True):
        expected = np.mean(hits[row["polarity"], row["target"], row["layer"]])
        assert row["share"] == pytest.approx(expected)
        assert (
            row["n"] <= 12 and row["low"] is None
        )  # twelve neurons cannot have triggers in twenty documents


def test_dealt_out_targets_agree_as_often_as_tokens_meet() -> None:
    """The null's mean is what independent draws without replacement give, and empty groups have none."""
    generator = np.random.default_rng(0)
    top, target, group = generator.integers(0, 4, 200), generator.integers(0, 3, 200), np.repeat([0, 2], 100)
    found = values.dealt(top, target, group, 3, times=400)
    for one in (0, 2):
        mine = group == one
        expected = sum((top[mine] == t).mean() * (target[mine] == t).mean() for t in range(4))
        assert found[:, one].mean() == pytest.approx(expected, abs=0.01)
    assert np.isnan(found[:, 1]).all()


def test_a_planted_agreement_is_found_and_its_null_is_not(tmp_path: Path) -> None:
    """When every value writes what follows its triggers, agreement is whole and chance stays low."""
    generator = np.random.default_rng(0)
    token = generator.integers(0, 50, 300)
    null = values.dealt(token, token, np.zeros(300, int), 1)
    assert null.max() < 0.1 < (token == token).mean()


def test_offsets_count_every_stored_trigger(run: Run) -> None:
    """At each distance, the share is over the triggers that have a token there; 0 is the last token itself."""
    frame = by_id(run)["current-and-next-token"].frame
    rows = values.triggers(run)
    top_third = rows.filter(pl.col("layer") * 3 // 4 == 2)
    here = frame.filter(pl.col("offset") == 0, pl.col("layers") == "layers 3-3").row(0, named=True)
    assert here["triggers"] == top_third.height
    assert here["share"] == pytest.approx((top_third["last"] == top_third["top"]).mean())


def test_precision_is_hits_over_stored_triggers(run: Run) -> None:
    """Table 2 lists values by the share of their triggers that their first token follows."""
    frame = by_id(run)["table-2-examples"].frame
    assert frame["precision"].is_sorted(descending=True)
    assert frame["trigger"].str.contains("→").all()


def test_a_plain_model_is_read_one_way() -> None:
    """Without a gate, negative coefficients are no memories of their own: one sign is read."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        plain = make_run(Path(folder) / "run", gated=False)
        assert by_id(plain)["figure-4-agreement"].frame["polarity"].n_unique() == 1


@pytest.fixture(scope="module", params=["llama", "opt"])
def ranked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny model, gated or with ReLU, and a run with ranks."""
    model = mn.load_model(FAMILIES[request.param](), tokenizer=tokenizer())
    run = mn.build(model, texts(30), tmp_path_factory.mktemp("runs") / "run", top=5, nulls=())
    return study.measure(run, model, chosen=catalogue.choose("value_ranks")), model


def test_ranks_equal_the_slow_definition(ranked: tuple[Run, Model]) -> None:
    """In fp64: norm the value by its own statistic, multiply with every row, count what scores higher."""
    run, model = ranked
    rows = run.table("value_ranks").collect()
    norm, table = model.anatomy.final_norm, model.anatomy.unembedding().double()
    for row in rows.sample(40, seed=0, with_replacement=True).iter_rows(named=True):
        layer = model.anatomy.layers[row["layer"]]
        vector = layer.values()[row["neuron"]].double() * row["polarity"]
        assert norm is not None
        centred = vector - vector.mean() if norm.kind == "layer" else vector
        normed = centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight.double()
        logits = table @ (normed if norm.bias is None else normed + norm.bias.double())
        p = logits.softmax(0)
        assert row["rank"] == int((logits > logits[row["token"]] + 1e-6).sum())
        assert row["last_rank"] == int((logits > logits[row["last_token"]] + 1e-6).sum())
        assert row["probability"] == pytest.approx(float(p[row["token"]]), rel=1e-4)
        assert row["top_probability"] == pytest.approx(float(p.max()), rel=1e-4)


def test_ranks_know_what_follows_and_keep_its_frequency(ranked: tuple[Run, Model]) -> None:
    """A row for each strongest trigger that is followed by a token; a plain model has one sign only."""
    run, _ = ranked
    rows = run.table("value_ranks").collect()
    first = run.table("triggers").filter(pl.col("rank") == 0, pl.col("next_token").is_not_null()).collect()
    if not run.manifest.model.gated:
        first = first.filter(pl.col("polarity") == 1)
    assert rows.select("layer", "neuron", "polarity").equals(first.select("layer", "neuron", "polarity"))
    assert rows["token"].equals(first["next_token"].alias("token"))


def test_findings_of_ranks(ranked: tuple[Run, Model]) -> None:
    """Figures 5 and 6 hold every value once."""
    run, _ = ranked
    found = {one.id: one for one in value_ranks.findings(run)}
    count = run.table("value_ranks").collect().height
    assert found["figure-5-rank"].frame["values"].sum() == count
    assert found["figure-6-confidence"].frame["values"].sum() == count
    assert found["figure-6-absolute-bins"].frame["values"].sum() == count
    assert found["figure-6-confidence"].frame["probability"].is_sorted()
