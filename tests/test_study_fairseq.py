"""The study on the papers' own kind of model: no norm at the end, ReLU, an adaptive softmax; what must hold exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_fairseq import FOLDER, PROMPT, loaded, text
from torch import Tensor

import mnemoscope as mn
from mnemoscope.model.lens import Lens
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.studies.findings.refinement import CASES, cases

VARIANT = "untied_proj"
ENDS = (64, 160, 304)
CLEAR = 1e-4  # by which the first token must be ahead for fp32 and fp64 to agree on it


def taken_apart(line: str = PROMPT) -> tuple[Model, Stream]:
    """A fixture, and one line of it."""
    model = loaded(VARIANT)
    return model, model.traced(torch.tensor([model.tokenizer(line)["input_ids"]]))


def adaptive(model: Model, vectors: Tensor) -> Tensor:
    """Log-probabilities in fp64, softmax by softmax, from the weights of the checkpoint itself."""
    weights = {name: weight.double() for name, weight in model.hf.adaptive_softmax.state_dict().items()}
    x = vectors.double()
    head = torch.cat([weights["head.word_proj.weight"], weights["head.class_proj.weight"]])
    first = (x @ head.T).log_softmax(-1)
    bands = [first[..., :64]]
    for number in range(2):
        down, words = weights[f"tail.{number}.0.weight"], weights[f"tail.{number}.2.weight"]
        bands.append((x @ down.T @ words.T).log_softmax(-1) + first[..., 64 + number, None])
    return torch.cat(bands, -1)


def flat(model: Model, vectors: Tensor) -> Tensor:
    """Logits of the flat projection in fp64, from the same weights."""
    weights = {name: weight.double() for name, weight in model.hf.adaptive_softmax.state_dict().items()}
    x = vectors.double()
    tails = [
        x @ weights[f"tail.{number}.0.weight"].T @ weights[f"tail.{number}.2.weight"].T for number in (0, 1)
    ]
    return torch.cat([x @ weights["head.word_proj.weight"].T, *tails], -1)


# -- Identities ----------------------------------------------------------------------------------------------


def test_a_layer_is_what_the_papers_write() -> None:
    """A20: x = LN(r), y = FF(x), o = r + y; A33: m = ReLU(x K + b), y = sum m v + b."""
    model, stream = taken_apart()
    for layer, traced in zip(model.anatomy.layers, stream.layers, strict=True):
        block: Any = layer.module
        x = block.final_layer_norm(traced.lres)
        m = torch.relu(x @ layer.keys().T + layer.key_bias())
        y = m @ layer.values() + layer.down_bias()
        assert torch.allclose(m, traced.coefficients, atol=1e-5)
        assert torch.allclose(traced.lres + y, traced.lout, atol=1e-5)
        parts = m[-1, :, None] * layer.values()
        assert torch.allclose(parts, stream.neuron_parts(model.anatomy.layers.index(layer), -1), atol=1e-6)


def test_the_stream_is_a_sum() -> None:
    """A31: Lout is Lin0 and all updates before; A32: attention is its sub-values and the bias."""
    model, stream = taken_apart()
    total = stream.embedding.clone()
    position = len(stream.tokens) - 1
    for index, traced in enumerate(stream.layers):
        sub_values = stream.attention_parts(index, position).sum((0, 1)) + stream.attention_bias(
            index, position
        )
        assert torch.allclose(sub_values, traced.lres[-1] - traced.lin[-1], atol=1e-5)
        total = total + stream.attention_update(index) + stream.ffn_update(index)
        assert torch.allclose(total, traced.lout, atol=1e-5)
    assert torch.allclose(adaptive(model, total), stream.logits.double(), atol=1e-5)


def test_all_three_lenses_are_one_without_a_norm_at_the_end() -> None:
    """Raw, own and frozen read the same, under either projection."""
    model, stream = taken_apart()
    for projection in ("adaptive", "flat"):
        lenses = [Lens.of(model.anatomy, name, projection) for name in ("raw", "own", "frozen")]
        readings = [lens.logits(stream.final, lens.scale(stream.final)) for lens in lenses]
        assert all(torch.equal(readings[0], reading) for reading in readings[1:])


def test_scores_add_up_within_a_band_and_not_across() -> None:
    """A34, A35: bs(x + v) = bs(x) + bs(v) under flat; log p(w) - log p(w') likewise where both are in one band."""
    model, stream = taken_apart()
    x, v = stream.layers[2].lres[-1], stream.neuron_parts(2, len(stream.tokens) - 1).sum(0)
    bs = flat(model, torch.stack([x, v, x + v]))
    assert torch.allclose(bs[0] + bs[1], bs[2], atol=1e-6)
    before, after = adaptive(model, torch.stack([x, x + v]))
    off = (after - before) - bs[1]
    for start, end in zip((0, *ENDS[:-1]), ENDS, strict=True):
        assert float((off[start:end] - off[start]).abs().max()) <= 1e-6
    assert float((off[[0, 64, 160]] - off[0]).abs().max()) > 1e-3


def test_a_value_is_read_the_same_whatever_its_coefficient_only_under_flat() -> None:
    """A10: ranks by the flat projection are a value's own."""
    values = loaded(VARIANT).anatomy.layers[3].values()
    small, large = values * 0.1, values * 10
    model = loaded(VARIANT)
    assert torch.equal(flat(model, small).argsort(-1), flat(model, large).argsort(-1))
    assert not torch.equal(adaptive(model, small).argsort(-1), adaptive(model, large).argsort(-1))


def test_under_flat_what_both_say_is_what_comes_out(variant: str = VARIANT) -> None:
    """A23: no violation is possible where scores add up, and four cases are all; made-up residuals, many of them."""
    model = loaded(variant)
    generator = torch.Generator().manual_seed(0)
    r, y = (torch.randn(4000, 32, generator=generator) for _ in range(2))
    y = torch.where(torch.arange(4000)[:, None] % 2 == 0, y, 0.7 * r + 0.5 * y)
    counted = {}
    for read in (flat, adaptive):
        tops = [read(model, vectors).argmax(-1).numpy() for vectors in (r, y, r + y)]
        counted[read.__name__] = Counter(CASES[case] for case in cases(*tops).tolist())
        assert sum(counted[read.__name__].values()) == 4000
    assert counted["flat"]["violation"] == 0 and counted["flat"]["agreement"] > 100


# -- The study -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run with the measurements that read through the vocabulary."""
    folder = tmp_path_factory.mktemp("fairseq")
    (folder / "text.txt").write_text(text(120), encoding="utf-8")
    mn.study(
        load_model(FOLDER / VARIANT, dtype="fp32"), str(folder / "text.txt"), folder / "run",
        only="refinement,contributions", positions=40, sentences=4,
    )  # fmt: skip
    return mn.open_run(folder / "run")


def _streams(run: mn.Run, examples: pl.DataFrame) -> dict[int, Stream]:
    model = loaded(VARIANT)
    contexts = run.table("contexts").collect()
    streams = {}
    for row in examples.iter_rows(named=True):
        tokens = contexts.filter(pl.col("context") == row["context"])["tokens"][0].to_list()
        streams[row["example"]] = model.traced(torch.tensor([tokens[: row["position"] + 1]]))
    return streams


def _clear(scores: Tensor) -> bool:
    best = scores.topk(2).values
    return bool(best[0] - best[1] > CLEAR)


@pytest.mark.slow
def test_refinement_equals_its_definition(studied: mn.Run) -> None:
    """A18, A21-A23: residual, y and output are read by the adaptive softmax; memories and y agree by the flat one."""
    model, rows = loaded(VARIANT), studied.table("refinement").filter(pl.col("unit") == "model").collect()
    raw, own = (rows.filter(pl.col("lens") == lens).sort("example", "layer") for lens in ("raw", "own"))
    assert raw.height == own.height >= 100
    for column in ("residual", "ffn", "output", "agree", "rank_output", "p_output"):
        assert raw[column].to_list() == own[column].to_list(), column
    streams = _streams(
        studied, studied.table("refinement_examples").filter(pl.col("unit") == "model").collect()
    )
    checked = 0
    for row in own.iter_rows(named=True):
        stream, layer = streams[row["example"]], row["layer"]
        traced, values = stream.layers[layer], model.anatomy.layers[layer].values()
        r, o = traced.lres[-1].double(), traced.lout[-1].double()
        y = o - r
        for name, vector in (("residual", r), ("ffn", y), ("output", o)):
            scores = adaptive(model, vector)
            if _clear(scores):
                assert row[name] == int(scores.argmax())
                checked += 1
        assert row["p_residual"] == pytest.approx(float(adaptive(model, r).exp().max()), rel=1e-3)
        m, said = traced.coefficients[-1], flat(model, values).argmax(-1)
        for suffix, vector in (("", y), ("_output", o)):
            scores = flat(model, vector)
            if _clear(scores):
                agreeing = (said == scores.argmax()) & (m != 0)
                assert row[f"agree{suffix}"] == int(agreeing.sum())
    assert checked >= 300


@pytest.mark.slow
def test_contributions_equal_their_definition(studied: mn.Run) -> None:
    """A38, A46: what layers add telescopes to the model's own log-probability; a neuron's C is that of A39."""
    model = loaded(VARIANT)
    examples = studied.table("contribution_examples").filter(pl.col("target") == "model").collect()
    points = studied.table("contribution_points").filter(pl.col("target") == "model").collect()
    layers = studied.table("contribution_layers").filter(pl.col("target") == "model").collect()
    neurons = studied.table("contribution_neurons").collect()
    streams = _streams(studied, examples)
    for row in examples.iter_rows(named=True):
        stream, token = streams[row["example"]], row["token"]
        wanted = adaptive(model, stream.points(len(stream.tokens) - 1))[:, token].numpy()
        of_example = points.filter(pl.col("example") == row["example"])
        for (lens,), rows in of_example.group_by("lens"):
            assert rows.sort("point")["log_probability"].to_numpy() == pytest.approx(wanted, abs=1e-5), lens
        added = layers.filter(pl.col("example") == row["example"])
        total = added["attention"].sum() + added["ffn"].sum()
        assert total == pytest.approx(wanted[-1] - wanted[0], abs=1e-5)
        for neuron in neurons.filter(pl.col("example") == row["example"]).iter_rows(named=True):
            layer, number = neuron["layer"], neuron["neuron"]
            before = stream.layers[layer].lres[-1].double()
            part = stream.neuron_parts(layer, len(stream.tokens) - 1, torch.tensor([number]))[0].double()
            gained = adaptive(model, before + part)[token] - adaptive(model, before)[token]
            assert neuron["increase"] == pytest.approx(float(gained), abs=1e-5)
    assert examples.height == 4 and neurons.height >= 100


@pytest.mark.slow
def test_the_whole_study_runs(tmp_path: Path) -> None:
    """Every measurement that has text enough is there, and every page of it can be read."""
    (tmp_path / "text.txt").write_text(text(200), encoding="utf-8")
    report = mn.study(
        load_model(FOLDER / "tied", dtype="fp32"), str(tmp_path / "text.txt"), tmp_path / "run", fast=True
    )
    tables = mn.open_run(tmp_path / "run").manifest.tables
    wanted = {
        "refinement", "contribution_points", "value_ranks", "removal", "group_ablations", "neuron_weights",
        "tuned_lens", "lens_readings", "patterns", "cross_layers", "parameters",
    }  # fmt: skip
    assert wanted <= set(tables)
    assert set(report.skipped) <= {"questions", "cases"}
    assert len(report.findings) >= 40
    readings = (
        mn.open_run(tmp_path / "run").table("lens_readings").filter(pl.col("lens") == "tuned").collect()
    )
    assert np.isfinite(readings["divergence"].to_numpy()).all()
