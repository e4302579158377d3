"""Models whose layers differ in width: everything that a run is made for, and the slow definitions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import _GQA, randomise
from families import tiny as tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import texts, tokenizer
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import mnemoscope
from mnemoscope.errors import QueryError
from mnemoscope.mine.build import build
from mnemoscope.mine.places import bin_of, selected
from mnemoscope.mine.verify import verify
from mnemoscope.model.capture import Capture
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.records import Cells, ModelEntry
from mnemoscope.run.reading import Run, open_run
from mnemoscope.text.plan import batches
from mnemoscope.views import gallery

SIZES = (40, 24, 56)
NULLS = ("random", "rotated", "shuffled", "chimera", "covariance")
TOP = 6


def ragged(sizes: tuple[int, ...] = SIZES) -> PreTrainedModel:
    """A tiny Llama in which each feed-forward layer has a width of its own."""
    hf = tiny_model("llama", **_GQA)
    for layer, size in zip(hf.model.layers, sizes, strict=True):
        layer.mlp = LlamaMLP(type(hf.config)(**{**hf.config.to_dict(), "intermediate_size": size}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        randomise(hf)
    return hf.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    """Loaded, and so its parts add up."""
    return load_model(ragged(), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all kinds of null units."""
    return build(model, texts(120), tmp_path_factory.mktemp("ragged") / "run", top=TOP, nulls=NULLS)


def hashes(run: Run) -> dict[str, str]:
    """The sha256 of every table."""
    return {name: entry.sha256 for name, entry in run.manifest.tables.items()}


# -- Numbers of units ----------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_cells_number_all_units_once(sizes: list[int]) -> None:
    """Place undoes cell, layers are the ranges of their offsets, and a column of a table is numbered alike."""
    cells = Cells(tuple(sizes))
    every = [(layer, neuron) for layer, size in enumerate(sizes) for neuron in range(size)]
    layer, neuron = np.array(every).T
    assert cells.cell(layer, neuron).tolist() == list(range(len(cells))) == list(range(sum(sizes)))
    assert list(zip(*(part.tolist() for part in cells.place(np.arange(len(cells)))), strict=True)) == every
    assert cells.each().tolist() == layer.tolist()
    assert [cells.of(at).stop - cells.of(at).start for at in range(len(sizes))] == sizes
    assert cells.layers == tuple(sorted(set(layer.tolist())))
    frame = pl.DataFrame({"layer": layer, "neuron": neuron, "polarity": np.where(neuron % 2, 1, -1)})
    table = frame.with_columns(pl.col("layer").cast(pl.Int16), pl.col("neuron").cast(pl.Int32))
    assert table.select(cells.column()).to_series().to_list() == list(range(len(cells)))
    side = table.lazy().select(cells.side()).collect().to_series().to_numpy()
    assert (side == 2 * np.arange(len(cells)) + (neuron % 2 == 0)).all()
    assert all(cells.has(*address) for address in every)
    assert not any(cells.has(at, size) for at, size in enumerate(sizes)) and not cells.has(len(sizes), 0)


def test_a_manifest_gives_one_number_where_layers_are_alike(model: Model, run: Run) -> None:
    """An int as ever, and a list where they differ; both read back as sizes."""
    alike = load_model(ragged((24, 24, 24)), tokenizer=tokenizer()).entry()
    assert alike.neurons == 24 and alike.sizes == (24, 24, 24)
    assert model.entry().neurons == list(SIZES)
    stored = open_run(run.path).manifest.model
    assert isinstance(stored, ModelEntry) and stored.neurons == list(SIZES) and stored.sizes == SIZES


# -- A run -----------------------------------------------------------------------------------------------------------


def rows_of(model: Model, run: Run) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Contexts and positions that count, and by layer f64[row neuron], with plain hooks one context at a time."""
    places: list[tuple[int, int]] = []
    kept: list[list[np.ndarray]] = [[] for _ in SIZES]
    special = run.manifest.options["special"]
    for row in run.table("contexts").collect().iter_rows(named=True):
        counted = [at for at, token in enumerate(row["tokens"]) if at and token not in special]
        places += [(row["context"], at) for at in counted]

        def keep(number: int, inputs: torch.Tensor, counted: list[int] = counted) -> None:
            kept[number].append(inputs[0][counted].double().numpy())

        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, inputs, number=number, keep=keep: keep(number, inputs[0])
            )
            for number, layer in enumerate(model.hf.model.layers)
        ]
        with torch.no_grad():
            model.hf(torch.tensor([row["tokens"]]))
        for hook in hooks:
            hook.remove()
    context, position = np.array(places).T
    return context, position, [np.concatenate(layer) for layer in kept]


def test_moments_and_triggers_of_every_layer_equal_the_definition(model: Model, run: Run) -> None:
    """As many rows as each layer has neurons, with the numbers of a full sort over all positions."""
    context, _, by_layer = rows_of(model, run)
    neurons, triggers = (run.table(name).collect() for name in ("neurons", "triggers"))
    for layer, values in enumerate(by_layer):
        rows = neurons.filter(pl.col("layer") == layer)
        assert rows["neuron"].to_list() == list(range(SIZES[layer])) and set(rows["tokens"]) == {len(values)}
        for name, expected in (("mean", values.mean(0)), ("std", values.std(0)), ("max", values.max(0))):
            np.testing.assert_allclose(rows[name].to_numpy(), expected, rtol=1e-3, atol=1e-5)
        for neuron in range(0, SIZES[layer], 3):
            stored = triggers.filter((pl.col("layer") == layer) & (pl.col("neuron") == neuron))
            for polarity in (1, -1):
                best = [
                    (polarity * values[context == at, neuron]).max() for at in np.unique(context).tolist()
                ]
                expected = sorted((value for value in best if value > 0), reverse=True)[:TOP]
                own = stored.filter(pl.col("polarity") == polarity).sort("rank")["coefficient"].to_numpy()
                np.testing.assert_allclose(own * polarity, expected, rtol=1e-3)


def test_histograms_of_every_layer_equal_the_definition(model: Model, run: Run) -> None:
    """Bin by bin over the selected contexts, on the very coefficients of the batches."""
    counts = [np.zeros((size, 193), np.int64) for size in SIZES]
    shards = int(run.table("shards").select(pl.col("shard").max()).collect().item()) + 1
    with Capture(model) as capture:
        for shard in range(shards):
            for batch in batches(run.file("contexts"), shard, run.manifest.options["special"]):
                chosen = torch.from_numpy(batch.counted & selected(batch.contexts)[:, None])

                def count(layer: int, m: torch.Tensor, *_: object, chosen: torch.Tensor = chosen) -> None:
                    for neuron, bins in enumerate(bin_of(m[chosen].numpy()).T):
                        counts[layer][neuron] += np.bincount(bins, minlength=193)

                capture.sweep(batch, count)
    stored = run.table("histograms").collect()
    for layer, of_layer in enumerate(counts):
        assert (np.array(stored.filter(pl.col("layer") == layer)["counts"].to_list()) == of_layer).all()
        assert of_layer.sum() > 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_is_the_same_bit_for_bit(
    model: Model, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many shards, after an interruption and with several processes: the tables have the same sha256."""
    from mnemoscope.mine import loop

    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 200)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    kinds = ("random", "chimera")
    whole = build(model, texts(60), tmp_path / "whole", top=TOP, nulls=kinds)
    assert whole.table("shards").select("shard").collect().n_unique() > 3
    seen = 0

    def interrupt(step: mnemoscope.Progress) -> None:
        nonlocal seen
        seen += step.stage == "mining"
        if seen == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, texts(60), tmp_path / "again", top=TOP, nulls=kinds, report=interrupt)
    again = build(model, texts(60), tmp_path / "again", top=TOP, nulls=kinds, workers=workers)
    assert hashes(again) == hashes(whole)


def test_null_units_are_as_many_as_the_layer_allows(run: Run) -> None:
    """At most 64, never more than neurons, and of decoys one for each neuron."""
    counts = run.table("null_neurons").group_by("kind", "layer").len().collect()
    for kind, layer, count in counts.iter_rows():
        assert count == SIZES[layer], (kind, layer)
    assert counts.height == len(NULLS) * len(SIZES)


def test_addresses_out_of_range_are_told_the_range_of_their_layer(run: Run, model: Model) -> None:
    """One line each, with the neurons of that very layer."""
    assert run.address(2, 55) == (2, 55) and run.address(1, 23) == (1, 23)
    opened = mnemoscope.open_run(run.path)
    for address, expected in {
        "L1N24": "has neurons 0 to 23 in layer 1",
        "L0N40": "has neurons 0 to 39 in layer 0",
        "L3N0": "has layers 0 to 2",
    }.items():
        with pytest.raises(QueryError, match=expected):
            opened.neuron(address)
        with pytest.raises(QueryError, match=expected):
            opened.trace("the city", address, model=model)
    assert opened.neuron("L2N55").next is None and opened.neuron("L1N22").next == (1, 23)


def test_the_run_is_read_and_verified(run: Run, model: Model, tmp_path: Path) -> None:
    """Cards, searches, pages, explanations, traces, and everything again from the model."""
    opened = mnemoscope.open_run(run.path)
    assert "3 layers of 24 to 56 neurons" in repr(opened)
    assert opened.highlights().to_dict() and opened.find(sort="kurtosis").rows.height > 0
    assert gallery.write(run, tmp_path / "gallery.html").stat().st_size > 10_000
    explanation = mnemoscope.explain(
        model, "the river in the city", " of", " the", run=opened, top=500, lens="frozen"
    )
    assert explanation.neurons.height == sum(SIZES) and abs(explanation.contrasts[0].remainder) < 1e-4
    layers = explanation.neurons["layer"].to_numpy()
    assert (explanation.neurons["neuron"].to_numpy() < np.array(SIZES)[layers]).all()
    assert opened.trace("the city of Paris", model=model).units == sum(SIZES)
    assert verify(run, model, sample=40).passed


@pytest.mark.slow
def test_patterns_are_tested_in_layers_of_any_width(run: Run, model: Model, tmp_path: Path) -> None:
    """Neurons and decoys of every layer are asked about, and a claim of the user's own is counted."""
    shutil.copytree(run.path, tmp_path / "run")
    opened = mnemoscope.open_run(tmp_path / "run")
    opened.patterns(model=model)
    tests = opened.table("pattern_tests").filter(pl.col("unit") == "neuron").collect()
    assert set(tests["layer"]) == {0, 1, 2}
    assert (tests["neuron"].to_numpy() < np.array(SIZES)[tests["layer"].to_numpy()]).all()
    assert tests.filter(pl.col("layer") == 2)["neuron"].max() >= 40
    claim = opened.test("L2N50", "word:the", model=model).claim
    assert claim.neurons == 56


@pytest.mark.slow
def test_the_study_is_measured_and_drawn(run: Run, model: Model, tmp_path: Path) -> None:
    """Every measurement, every figure, and two runs beside each other."""
    for name in ("one", "two"):
        shutil.copytree(run.path, tmp_path / name)
    opened = mnemoscope.open_run(tmp_path / "one")
    report = opened.study(fast=True, model=model)
    assert report.save(tmp_path / "report.html")
    assert opened.compare(tmp_path / "two").save(tmp_path / "compare.html")
