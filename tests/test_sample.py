"""The main job on the real sample model and text, against plain hooks and a full sort."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from mnemoscope import load_corpus
from mnemoscope.mine import loop, values
from mnemoscope.mine.places import bin_of, selected
from mnemoscope.mine.statistics import NeuronStatistics, RunStatistics
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.text.corpus import write_plan

pytestmark = [pytest.mark.sample, pytest.mark.slow]

DOCUMENTS = 150
NEURONS = 500
TOP = 50


@pytest.fixture(scope="module")
def mined(
    sample_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[NeuronStatistics, pl.DataFrame, list[int]]:
    """What the build keeps of the first documents, their contexts, and the special ids."""
    folder = tmp_path_factory.mktemp("plan")
    documents = list(islice(load_corpus("sample:wikipedia").documents, DOCUMENTS))
    plan = write_plan(load_corpus(documents), sample_model.tokenizer, folder, context_length=2048)
    nulls = Nulls(sample_model, ())
    kind = loop.StateFactory(
        partial(RunStatistics.of, sample_model, nulls, TOP), partial(RunStatistics.load, nulls)
    )
    memories = loop.run_shards(sample_model, plan, kind, folder).neurons
    return memories, pl.read_parquet(plan.contexts_file), plan.special


@pytest.fixture(scope="module")
def chosen(sample_model: Model) -> np.ndarray:
    """(layer, neuron) of five hundred random neurons."""
    generator = np.random.default_rng(0)
    flat = np.sort(generator.choice(len(sample_model.cells), NEURONS, replace=False))
    return np.stack(sample_model.cells.place(flat), axis=1)


@pytest.fixture(scope="module")
def slow(
    sample_model: Model, mined: tuple[NeuronStatistics, pl.DataFrame, list[int]], chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts, positions and coefficients [position, chosen] with plain hooks, one document at a time."""
    _, contexts, special = mined
    columns = {
        layer: chosen[chosen[:, 0] == layer, 1].tolist() for layer in range(sample_model.anatomy.n_layers)
    }
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, i=index: found.__setitem__(i, inputs[0][0, :, columns[i]])
        )
        for index, layer in enumerate(sample_model.hf.model.layers)
    ]
    rows: list[np.ndarray] = []
    where: list[tuple[int, int]] = []
    with torch.no_grad():
        for row in contexts.iter_rows(named=True):
            tokens = torch.tensor([row["tokens"]])
            sample_model.hf.model(tokens)
            together = torch.cat([found[i] for i in sorted(found)], dim=1).numpy()
            kept = [p for p in range(1, len(row["tokens"])) if row["tokens"][p] not in special]
            rows.append(together[kept])
            where += [(row["context"], position) for position in kept]
    for hook in hooks:
        hook.remove()
    places = np.array(where)
    return places[:, 0], places[:, 1], np.concatenate(rows).astype(np.float64)


def test_triggers_equal_a_brute_force_recomputation(
    mined: tuple[NeuronStatistics, pl.DataFrame, list[int]],
    slow: tuple[np.ndarray, np.ndarray, np.ndarray],
    chosen: np.ndarray,
) -> None:
    """Same contexts and positions (near ties may swap), coefficients to 1e-4 relative, both polarities."""
    memories, _, _ = mined
    contexts, positions, coefficients = slow
    tables = {
        layer: pl.from_arrow(memories.results(layer)["triggers"]) for layer in set(chosen[:, 0].tolist())
    }
    for index, (layer, neuron) in enumerate(chosen.tolist()):
        for polarity in (1, -1):
            table = (
                tables[layer]
                .filter((pl.col("neuron") == neuron) & (pl.col("polarity") == polarity))
                .sort("rank")
            )
            strength = polarity * coefficients[:, index]
            order = np.lexsort((positions, contexts, -strength))
            order = order[strength[order] > 0]
            _, first = np.unique(contexts[order], return_index=True)
            best = order[np.sort(first)][:TOP]
            expected = coefficients[best, index]
            stored = table["coefficient"].to_numpy()
            np.testing.assert_allclose(stored, expected, rtol=1e-4)
            places = list(zip(table["context"], table["position"], strict=True))
            for rank, place in enumerate(zip(contexts[best].tolist(), positions[best].tolist(), strict=True)):
                if places[rank] != place:
                    near = np.abs(strength[best] - strength[best][rank]) <= 1e-5 * strength[best][rank]
                    last = strength[best][rank] - strength[best][-1] <= 1e-5 * strength[best][rank]
                    assert near.sum() > 1 or last, (layer, neuron, polarity, rank)


def test_moments_equal_their_definition(
    mined: tuple[NeuronStatistics, pl.DataFrame, list[int]],
    slow: tuple[np.ndarray, np.ndarray, np.ndarray],
    chosen: np.ndarray,
    sample_model: Model,
) -> None:
    """Mean and std to 1e-5 relative (of the spread, for means near zero), skewness and kurtosis to 1e-3."""
    memories, _, _ = mined
    coefficients = slow[2]
    mean, std = coefficients.mean(0), coefficients.std(0)
    centred = (coefficients - mean) / std
    table = pl.concat(
        [pl.from_arrow(memories.results(layer)["neurons"]) for layer in range(sample_model.anatomy.n_layers)]
    )
    stored = table[sample_model.cells.cell(*chosen.T).tolist()]
    assert stored["tokens"].unique().to_list() == [len(coefficients)]
    assert (np.abs(stored["mean"].to_numpy() - mean) <= 1e-5 * np.maximum(np.abs(mean), std)).all()
    np.testing.assert_allclose(stored["std"].to_numpy(), std, rtol=1e-5)
    np.testing.assert_allclose(stored["skewness"].to_numpy(), (centred**3).mean(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stored["kurtosis"].to_numpy(), (centred**4).mean(0) - 3, rtol=1e-3, atol=1e-3)


def test_histograms_count_the_same_coefficients(
    mined: tuple[NeuronStatistics, pl.DataFrame, list[int]],
    slow: tuple[np.ndarray, np.ndarray, np.ndarray],
    chosen: np.ndarray,
) -> None:
    """Every bin holds what it should, but for the few coefficients that lie within rounding of an edge."""
    memories, _, _ = mined
    contexts, _, coefficients = slow
    taken = coefficients[selected(contexts)]
    tables = {
        layer: memories.results(layer)["histograms"]["counts"].to_pylist()
        for layer in set(chosen[:, 0].tolist())
    }
    differing = 0
    for index, (layer, neuron) in enumerate(chosen.tolist()):
        expected = np.bincount(bin_of(taken[:, index]), minlength=193)
        stored = np.array(tables[layer][neuron])
        assert stored.sum() == len(taken)
        differing += np.abs(stored - expected).sum() // 2
    # Coefficients near zero are differences of larger numbers: rounding moves them by more than their size suggests.
    assert differing <= 1e-4 * taken.size


def test_values_are_the_models_own_reading(sample_model: Model) -> None:
    """Value tokens of some neurons equal a plain sort of softmax(norm(v) E) in fp64; equals to 1e-6 may swap."""
    hf = sample_model.hf
    for layer, neuron in ((13, 366), (24, 1005), (29, 0)):
        tokens, logits = values.value_tokens(sample_model, layer, torch.tensor([neuron]))
        vector = hf.model.layers[layer].mlp.down_proj.weight[:, neuron].detach().double()
        scale = torch.rsqrt(vector.square().mean() + hf.config.rms_norm_eps)
        scores = hf.lm_head.weight.detach().double() @ (
            hf.model.norm.weight.detach().double() * vector * scale
        )
        for side, largest in ((0, True), (1, False)):
            listed = torch.as_tensor(tokens[0, side]).long()
            best = scores.topk(values.VALUE_TOKENS, largest=largest).values
            assert len(set(listed.tolist())) == values.VALUE_TOKENS
            assert torch.allclose(scores[listed], best, rtol=1e-6, atol=0)
            np.testing.assert_allclose(logits[0, side], best.numpy(), rtol=1e-4)


def test_paris_is_the_capital_of_france(sample_model: Model) -> None:
    """The sample model is the one that is meant: " Paris" follows with probability 0.77."""
    tokens = torch.tensor([sample_model.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        probabilities = sample_model.hf(tokens).logits[0, -1].softmax(-1)
    assert sample_model.tokenizer.decode([int(probabilities.argmax())]) == " Paris"
    assert float(probabilities.max()) == pytest.approx(0.7725, abs=0.01)


def test_the_cache_is_where_it_should_be(sample_model_folder: Path) -> None:
    """Converted once: a finished folder with weights, tokenizer and its origin."""
    names = {path.name for path in sample_model_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "origin.json"} <= names
