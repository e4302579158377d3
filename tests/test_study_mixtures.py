"""The study of a mixture: what applies is over the tokens routed to experts, and the rest says why not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import MIXTURES, dense_between_experts, slow_but_for
from hypothesis import given
from hypothesis import strategies as st
from test_study_cases import LINES
from tiny import texts, tokenizer

from mnemoscope import build, load_model, open_run
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import shuffled_copy
from mnemoscope.patterns.triggers import Options
from mnemoscope.records import Cells, ContextBatch, ExpertNeuronId, padded
from mnemoscope.results import StudyReport
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings import values
from mnemoscope.studies.findings.statistics import running
from mnemoscope.studies.measures import questions, removal, value_ranks
from mnemoscope.studies.measures.lenses import points
from mnemoscope.trials import job


@st.composite
def _cells(draw: st.DrawFn) -> Cells:
    """Layers with experts, with a shared one or none, and without any."""
    sizes, experts = [], []
    for _ in range(draw(st.integers(1, 4))):
        count, width, shared = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
        sizes.append(count * width + (shared if count else width))
        experts.append((count, width) if count else (0, 0))
    return Cells(tuple(sizes), tuple(experts) if any(count for count, _ in experts) else ())


@given(_cells())
def test_neurons_run_together_where_layer_and_expert_are_the_same(cells: Cells) -> None:
    """The number is that of the pair, ascending; in a dense model it is the layer."""
    every = np.arange(len(cells))
    found = cells.among(every)
    layer, neuron = cells.place(every)
    ids = [cells.id(*pair) for pair in zip(layer.tolist(), neuron.tolist(), strict=True)]
    pairs = [(one.layer, one.expert if isinstance(one, ExpertNeuronId) else 0) for one in ids]
    assert (np.diff(found) >= 0).all()
    assert len(set(zip(pairs, found.tolist(), strict=True))) == len(set(pairs)) == len(set(found.tolist()))
    if not cells.experts:
        assert found.tolist() == layer.tolist() and cells.together == "layer"


@pytest.mark.parametrize("name", slow_but_for(MIXTURES, ("qwen2_moe", "gpt_oss")))
def test_points_are_those_of_each_prefix_taken_apart(name: str) -> None:
    """Residual, what the experts write, and what each value is multiplied with, of a padded batch: as in a trace."""
    model = load_model(MIXTURES[name](), tokenizer=tokenizer())
    generator = np.random.default_rng(0)
    prefixes = [generator.integers(4, 40, size).astype(np.int32) for size in (9, 3, 6)]
    tokens, lengths = padded(prefixes)
    counted = np.zeros(tokens.shape, bool)
    counted[np.arange(len(lengths)), lengths - 1] = True
    seen = points(model, ContextBatch(np.arange(3), tokens, lengths, counted))
    for row, prefix in enumerate(prefixes):
        stream = model.traced(torch.from_numpy(prefix.astype(np.int64))[None])
        last = len(prefix) - 1
        of_stream = stream.points(last)
        for number, layer in enumerate(model.anatomy.layers):
            amounts = stream.layers[number].amounts(layer, last)
            torch.testing.assert_close(
                seen.coefficients[row, model.cells.of(number)], amounts, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                seen.residual[row, number], of_stream[2 * number + 1], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                seen.output[row, number], of_stream[2 * number + 2], rtol=1e-4, atol=1e-5
            )
            routed = layer.experts is not None and layer.experts.count * layer.experts.width
            if routed:
                assert 0 < (amounts[:routed] != 0).sum() < routed


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A dense layer between two of four experts and a shared one."""
    model = load_model(dense_between_experts(), tokenizer=tokenizer())
    return build(model, texts(90), tmp_path_factory.mktemp("mixture") / "run", top=12), model


def test_what_runs_at_a_token(case: tuple[Run, Model]) -> None:
    """Two experts of four and the shared one, and all of a dense layer."""
    run, _ = case
    np.testing.assert_allclose(running(run), [2 * 12 + 12, 16, 2 * 12 + 12])


def test_targets_are_dealt_out_within_an_expert(case: tuple[Run, Model]) -> None:
    """The null of an agreement keeps what the router gives to each expert."""
    run, _ = case
    rows = values.triggers(run).filter((pl.col("rank") == 0) & (pl.col("polarity") == 1))
    top, target, layer, among = (rows[name].to_numpy() for name in ("top", "next", "layer", "among"))
    assert len(np.unique(among)) == 11
    everywhere = np.arange(len(top))
    chance = values.by_chance(target, target, among)
    slow = [(target[among == among[row]] == target[row]).mean() for row in everywhere]
    np.testing.assert_allclose(chance, slow)
    # Where each expert has a target of its own, dealing within experts changes nothing.
    own = among * 0 + among
    dealt = values.dealt(own, own, layer.astype(np.int64), 3, among, times=3)
    assert (dealt == 1).all() and (values.dealt(own, own, layer.astype(np.int64), 3, times=3)[:, 0] < 1).all()
    measured = value_ranks._targets(run)
    of_layer = measured.filter(pl.col("layer") == 0)
    number = run.manifest.model.cells.among(of_layer["neuron"].to_numpy())
    marked = of_layer.with_columns(token=pl.Series(number))
    asked = value_ranks._asked(measured, marked, 3, np.random.default_rng(0), number)
    assert (asked[:, 2] == number).all()


def test_what_does_not_apply_is_said(case: tuple[Run, Model]) -> None:
    """Triggers without a token, and a copy of the model with shuffled weights: one line each."""
    run, model = case
    for refused in (lambda: removal.add(run, model), lambda: shuffled_copy(model)):
        with pytest.raises(
            ModelNotSupported, match=r"mixture of experts.*other experts|routes other tokens"
        ) as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def study(case: tuple[Run, Model], tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    """With questions in words of the vocabulary."""
    run, model = case
    asked = tmp_path_factory.mktemp("asked") / "mine.jsonl"
    asked.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "built_in", lambda: [])
        patch.setattr(job, "Options", partial(Options, draws=200))
        return open_run(run.path).study(fast=True, positions=40, sentences=6, questions=[asked], model=model)


@pytest.mark.slow
def test_the_study_of_a_mixture_runs_to_its_end(study: StudyReport, tmp_path: Path) -> None:
    """Every measurement has findings, or a sentence that says why it is not asked; the page is written."""
    told = {section.name: section for section in study.sections}
    assert "router" in told["removal"].missing and not told["removal"].findings
    assert not study.skipped, study.skipped
    assert [name for name, section in told.items() if not section.findings] == ["removal"]
    study.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "NaN" not in page.replace("isNaN", "") and "memories of a layer that run at a token" in page
