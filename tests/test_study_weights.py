"""What weights say alone: cosines and moments by hand, planted neurons of every kind, and the findings."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from scipy.stats import kurtosis, skew
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.mine.values import value_vectors
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings.weights import CLASSES, _kinds, _silent, classes, findings, kinds
from mnemoscope.studies.measures.weights import cosines, others, read_directions, silent_directions, spread


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def studied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A gated and a plain model, and their runs with what weights say."""
    model = mn.load_model(FAMILIES[request.param](), tokenizer=tokenizer())
    run = mn.build(model, texts(12), tmp_path_factory.mktemp("weights") / "run", top=2, nulls=())
    return study.measure(run, model, chosen=catalogue.choose("weights")), model


def wrapped(name: str) -> Model:
    """A tiny model without a tokenizer."""
    hf = FAMILIES[name]()
    return Model(hf, None, describe(hf), "tiny")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_rows_read_the_stream_as_the_layer_does(name: str) -> None:
    """The product with a direction is the pre-activation, up to the bias and the scale of the norm."""
    model = wrapped(name)
    layer = model.anatomy.layers[1]
    x = torch.randn(5, model.anatomy.width, generator=torch.Generator().manual_seed(0))
    norm = layer.ffn_norm
    normed = x if norm is None else norm(x) - (0 if norm.bias is None else norm.bias)
    scale = torch.ones(5, 1) if norm is None else norm.scale(x)
    for rows, directions in zip((layer.keys(), layer.ups()), read_directions(layer), strict=True):
        if rows is not None and directions is not None:
            assert torch.allclose(x @ directions.T * scale, normed @ rows.T, atol=1e-4)


def test_the_table_is_its_definition(studied: tuple[Run, Model]) -> None:
    """Every cosine and moment of a few neurons again, in fp64 by numpy and scipy."""
    run, model = studied
    rows = run.table("neuron_weights").filter(pl.col("unit") == "neuron").collect()
    lens = Lens.of(model.anatomy, "frozen")
    silent = silent_directions(lens).double().numpy()
    for number, layer in enumerate(model.anatomy.layers):
        gates, ups = read_directions(layer)
        values = value_vectors(layer).double().numpy()
        for neuron in (0, 7, 39):
            (row,) = rows.filter(pl.col("layer") == number, pl.col("neuron") == neuron).to_dicts()
            gate, value = gates[neuron].double().numpy(), values[neuron]
            assert row["gate_value"] == pytest.approx(_cosine(gate, value), abs=1e-5)
            if ups is None:
                assert row["gate_up"] is None and row["up_value"] is None
            else:
                up = ups[neuron].double().numpy()
                assert row["gate_up"] == pytest.approx(_cosine(gate, up), abs=1e-5)
                assert row["up_value"] == pytest.approx(_cosine(up, value), abs=1e-5)
            unit = torch.from_numpy(value / np.linalg.norm(value)).float()[None]
            logits = lens.linear(unit)[0].double().numpy()
            assert row["logit_std"] == pytest.approx(logits.std(), rel=1e-4)
            assert row["logit_skewness"] == pytest.approx(skew(logits), abs=1e-3)
            assert row["logit_kurtosis"] == pytest.approx(kurtosis(logits), abs=1e-3)
            share = ((value @ silent) ** 2).sum() / (value @ value)
            assert row["silent_share"] == pytest.approx(share, abs=1e-5)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_nulls_are_of_the_same_layer(studied: tuple[Run, Model]) -> None:
    """Pairs for all neurons, shuffled values for some; each with its own columns."""
    run, model = studied
    rows = run.table("neuron_weights").collect()
    counts = dict(rows["unit"].value_counts().iter_rows())
    total = len(model.cells)
    assert counts == {"neuron": total, "paired": total, "shuffled": total}  # as many as there are, up to 128
    paired, shuffled = (rows.filter(pl.col("unit") == unit) for unit in ("paired", "shuffled"))
    assert paired["logit_std"].null_count() == total and shuffled["gate_value"].null_count() == total
    assert paired["gate_value"].null_count() == shuffled["silent_share"].null_count() == 0


def test_pairs_are_three_different_neurons() -> None:
    """Each gate meets an up and a value of two others, and each of these is met once."""
    first, second = others(50, np.random.default_rng(0))
    here = np.arange(50)
    assert (first != here).all() and (second != here).all() and (first != second).all()
    assert sorted(first) == sorted(second) == here.tolist()


def test_a_shuffled_value_has_the_same_numbers() -> None:
    """Its length and its entries stay; its logits are those of another vector."""
    model = wrapped("llama")
    lens = Lens.of(model.anatomy, "frozen")
    values = value_vectors(model.anatomy.layers[0])
    silent = silent_directions(lens)
    own = spread(lens, values, silent)
    turned = spread(lens, values.flip(-1), silent)
    assert not np.allclose(own["logit_std"], turned["logit_std"], rtol=1e-3)
    assert np.allclose(spread(lens, 7 * values, silent)["logit_std"], own["logit_std"], rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_silent_directions_move_logits_least(name: str) -> None:
    """No direction has less spread over the vocabulary, and a constant for all tokens is silent."""
    model = wrapped(name)
    hf_rows = model.anatomy.unembedding()
    assert hf_rows.shape == (80, 32)
    lens = Lens.of(model.anatomy, "frozen")
    silent = silent_directions(lens)
    assert silent.shape == (32, 1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(500, 32, generator=generator), dim=1)
    least = lens.linear(silent.T).std(1)
    assert (lens.linear(directions).std(1) > least).all()


def test_planted_neurons_are_named() -> None:
    """Neurons built to enrich, deplete, and so on, and values with a heavy tail, a wide spread, or in silence."""
    model = wrapped("llama")
    layer = model.anatomy.layers[0]
    generator = torch.Generator().manual_seed(0)
    gates, ups = read_directions(layer)
    assert ups is not None
    values = torch.randn(40, 32, generator=generator)
    values[:5] = torch.stack([gates[0], -ups[1], ups[2], -ups[3], gates[4]])
    weight = layer.ffn_norm.weight if layer.ffn_norm is not None else torch.ones(32)
    layer.ups()[0].copy_(gates[0] / weight)
    layer.ups()[1].copy_(-gates[1] / weight)
    values[1] = gates[1]
    columns = cosines(layer, values)
    rows = pl.DataFrame({name: column[:5].astype(float) for name, column in columns.items()})
    assert classes(rows)["class"].to_list() == [
        "enrichment", "depletion", "conditional enrichment", "conditional depletion", "proportional"
    ]  # fmt: skip
    moments = pl.DataFrame(
        {
            "logit_kurtosis": [9.0, 9.0, 0.1, 0.1],
            "logit_skewness": [1.0, -1.0, 1.0, 1.0],
            "logit_std": [1.0, 1.0, 9.0, 1.0],
        }
    )
    assert kinds(moments, (2.0, 2.0))["kind"].to_list() == ["prediction", "suppression", "partition", None]
    lens = Lens.of(model.anatomy, "frozen")
    silent = silent_directions(lens)
    assert spread(lens, silent.T + 0.0, silent)["silent_share"][0] == pytest.approx(1, abs=1e-4)


def test_findings_say_what_the_table_says(studied: tuple[Run, Model]) -> None:
    """One for each kind of figure; classes only where there is an up row; shares of a layer add up to 1."""
    run, model = studied
    rows = run.table("neuron_weights").collect()
    answers = {answer.id: answer for answer in findings(run)}
    expected = {"in-out-cosines", "prediction-suppression-partition", "entropy-neurons"}
    assert set(answers) == expected | ({"in-out-classes"} if model.anatomy.gated else set())
    if model.anatomy.gated:
        frame = answers["in-out-classes"].frame
        sums = frame.group_by("panel", "layer").agg(pl.col("value").sum())["value"].to_list()
        assert sums == pytest.approx([1] * 6)
        assert frame.filter(pl.col("panel") == "neurons")["neurons"].sum() == 120
        assert set(frame["class"]) <= set(CLASSES)
    frame = answers["in-out-cosines"].frame.filter(pl.col("layer") == 1)
    pair = "gate and value" if model.anatomy.gated else "key and value"
    (row,) = frame.filter(pl.col("pair") == pair).to_dicts()
    here = rows.filter(pl.col("layer") == 1)
    assert row["median"] == here.filter(pl.col("unit") == "neuron")["gate_value"].quantile(0.5, "nearest")
    assert row["null"] == pytest.approx(here.filter(pl.col("unit") == "paired")["gate_value"].median())


def test_a_decoy_in_place_of_neurons_is_no_different() -> None:
    """Shuffled values fed in as the neurons' own: every share is the null's within its sampling error."""
    generator = np.random.default_rng(0)
    count = 20_000
    columns = {
        "layer": np.zeros(2 * count, np.int16),
        "neuron": np.tile(np.arange(count), 2),
        "unit": np.repeat(["neuron", "shuffled"], count),
        "logit_kurtosis": generator.exponential(1, 2 * count),
        "logit_skewness": generator.standard_normal(2 * count),
        "logit_std": generator.lognormal(0, 0.2, 2 * count),
        "silent_share": generator.beta(1, 40, 2 * count),
    }
    rows = pl.DataFrame(columns)
    for frame in (_kinds(rows).frame, _silent(rows).frame):
        for row in frame.iter_rows(named=True):
            assert 0 < row["null"] < 0.02
            assert abs(row["value"] - row["null"]) < 3 * np.sqrt(0.01 / 20_000 + 2 * 0.01 / 10_000)
