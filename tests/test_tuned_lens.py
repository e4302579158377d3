"""The tuned lens: laws of the fit, the readings against the slow definition, and the findings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, VARIANTS
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError
from mnemoscope.model.capture import residuals
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings.questions import findings as question_findings
from mnemoscope.studies.findings.tuned_lens import findings
from mnemoscope.studies.measures import questions, tuned_lens
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.studies.measures.questions import Question
from mnemoscope.studies.measures.tuned_lens import FittedText, Readings, TunedLens, fit, partners
from mnemoscope.text.sampling import half

BUILDERS = FAMILIES | VARIANTS


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny model and its run with a tuned lens."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    run = mn.build(model, texts(120), tmp_path_factory.mktemp("lens") / "run", top=2, nulls=())
    return study.measure(run, model, chosen=catalogue.choose("lens")), model


def planted(name: str, rows: int = 400) -> tuple[Model, FittedText, torch.Tensor]:
    """Residuals that are a fixed affine map of the last output and a little noise: own lenses read them wrongly."""
    hf = BUILDERS[name]()
    model = Model(hf, None, describe(hf), "tiny")
    width, layers = model.anatomy.width, model.anatomy.n_layers
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(rows, width, generator=generator)
    turns = torch.stack(
        [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(layers)]
    )
    noise = 0.02 * torch.randn(layers, rows, width, generator=generator)
    return model, FittedText(3 * final @ turns + 0.5 + noise, final), turns


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj", "opt_no_final_norm"])
def test_planted_maps_are_found(name: str) -> None:
    """Rotated, stretched and moved residuals are read back: to a hundredth of what the own lens is off by."""
    model, text, _ = planted(name)
    lens = fit(TunedLens.identity(model), text, steps=20)
    for layer in range(model.anatomy.n_layers):
        x, output = text.residual[layer], lens.own.logits(text.final).log_softmax(-1)
        own = tuned_lens.divergences(output, lens.own.logits(x).log_softmax(-1)).mean()
        apart = tuned_lens.divergences(output, lens.logits(layer, x).log_softmax(-1)).mean()
        assert apart < 0.02 * own


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_untrained_it_is_the_own_lens(name: str) -> None:
    """With no steps every layer's reading is bit for bit that of the own lens."""
    model, text, _ = planted(name, 80)
    lens = fit(TunedLens.identity(model), text, steps=0)
    own = Lens.of(model.anatomy, "own")
    for layer, x in enumerate(text.residual):
        assert torch.equal(lens.logits(layer, x), own.logits(x))


@pytest.mark.slow
def test_steps_bring_it_nearer() -> None:
    """Residuals that know the output but roughly: the norm undoes what a regression shrinks, so that it is too sure;
    steps make it less so, on rows that were not fitted."""
    hf = FAMILIES["llama"]()
    hf.lm_head.weight.data.mul_(5)
    hf.lm_head.weight.data[:, :4] = 0  # directions in which a bias makes all else small
    model = Model(hf, None, describe(hf), "tiny")
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(1200, 32, generator=generator)
    x = 3 * final + 3 * torch.randn(3, 1200, 32, generator=generator)
    output = Lens.of(model.anatomy, "own").logits(final[800:]).log_softmax(-1)

    def apart(steps: int) -> float:
        lens = fit(TunedLens.identity(model), FittedText(x[:, :800], final[:800]), steps=steps)
        read = lens.logits(1, x[1, 800:]).log_softmax(-1)
        return float(tuned_lens.divergences(output, read).mean())

    assert apart(100) < 0.98 * apart(1)


def test_a_fit_is_never_worse_where_it_is_checked() -> None:
    """Residuals that know nothing of the output: the map that is kept reads the checked rows no worse than no map."""
    model, text, _ = planted("llama", 200)
    lost = FittedText(
        text.residual, text.final[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    )
    lens = fit(TunedLens.identity(model), lost, steps=10)
    output = lens.own.logits(lost.final[175:]).log_softmax(-1)
    for layer, x in enumerate(lost.residual[:, 175:]):
        own = tuned_lens.divergences(output, lens.own.logits(x).log_softmax(-1)).mean()
        assert tuned_lens.divergences(output, lens.logits(layer, x).log_softmax(-1)).mean() <= own


def test_the_same_seed_fits_the_same() -> None:
    """Twice the same bits; another seed draws other batches."""
    model, text, _ = planted("llama", 300)
    first, again, other = (fit(TunedLens.identity(model), text, steps=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_a_sample_of_the_vocabulary_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted, the drawn tokens stand for all that are not among the probable ones, each of which is itself."""
    monkeypatch.setattr(tuned_lens, "_PROBABLE", 10)
    monkeypatch.setattr(tuned_lens, "_DRAWN", 14)
    mass = torch.rand(80, generator=torch.Generator().manual_seed(0))
    sums = []
    for seed in range(400):
        tokens, extra = tuned_lens._sampled(mass, torch.Generator().manual_seed(seed))
        assert set(mass.topk(10).indices.tolist()) <= set(tokens.tolist()) and len(set(tokens.tolist())) == 24
        assert float(extra.exp().sum()) == pytest.approx(80, rel=1e-5)
        sums.append(float((mass[tokens] * extra.exp()).sum()))
    assert np.mean(sums) == pytest.approx(float(mass.sum()), rel=0.01)


def test_what_is_fitted_is_of_the_discovery_half(studied: tuple[Run, Model]) -> None:
    """Residuals are those of a plain forward pass over contexts of that half, at positions that count."""
    run, model = studied
    text = FittedText.of(run, model, count=10**6)
    rows = run.table("contexts").collect()
    rows = rows.filter(pl.Series(~half(rows["document"].to_numpy())))
    residual, final = [], []
    for tokens in rows["tokens"].to_list():
        seen = residuals(model, torch.tensor(list(tokens))[None])
        special = set(run.manifest.options["special"])
        counted = [place for place, token in enumerate(tokens) if place and token not in special]
        residual.append(seen["Lres"][:, 0, counted])
        final.append(seen["Lout"][-1, 0, counted])
    slow = torch.cat([torch.cat(residual, 1).flatten(0, 0).transpose(0, 1).flatten(1), torch.cat(final)], 1)
    fast = torch.cat([text.residual.transpose(0, 1).flatten(1), text.final], 1)
    assert fast.shape == slow.shape
    order = (np.lexsort(array[:, :3].round(decimals=3).T.numpy()) for array in (fast, slow))
    one, other = (array[torch.from_numpy(places)] for array, places in zip((fast, slow), order, strict=True))
    assert torch.allclose(one.sum(0), other.sum(0), atol=1e-2)
    assert len(FittedText.of(run, model, count=100)) == 100


def test_too_little_text_is_said(studied: tuple[Run, Model], tmp_path: Path) -> None:
    """A discovery half without enough positions is one line that says what to do."""
    _, model = studied
    run = mn.build(model, texts(4), tmp_path / "run", top=2, nulls=())
    with pytest.raises(QueryError, match="64 needed; build the run on more text"):
        FittedText.of(run, model)


def test_readings_are_those_of_hidden_states(studied: tuple[Run, Model]) -> None:
    """Divergence, rank and probability from logits in fp64, of a forward pass over the prefix alone."""
    run, model = studied
    rows = run.table("lens_readings").collect()
    assert half(rows["document"].to_numpy()).all()
    lens = TunedLens.of(run, model)
    assert lens is not None
    raw, own = (Lens.of(model.anatomy, name) for name in ("raw", "own"))
    for example in rows["example"].unique().to_list()[:6]:
        part = rows.filter(pl.col("example") == example)
        context, position = part.select("context", "position").row(0)
        tokens = run.contexts([context])[context].tokens[: position + 1]
        ids = torch.tensor(list(map(int, tokens)))[None]
        seen = residuals(model, ids)
        with torch.no_grad():
            output = model.hf(ids).logits[0, -1].double().log_softmax(-1)
        token = int(output.argmax())
        for row in part.filter(pl.col("layer") >= 0).iter_rows(named=True):
            x = seen["Lres"][row["layer"], :, -1].clone()
            read = {"raw": raw.raw_logits, "own": own.logits}.get(row["lens"])
            scores = (read(x) if read else lens.logits(row["layer"], x))[0].double()
            apart = float((output.exp() * (output - scores.log_softmax(-1))).sum())
            assert row["divergence"] == pytest.approx(apart, abs=2e-4)
            assert row["rank"] == int((scores > scores[token]).sum())
            assert row["probability"] == pytest.approx(float(scores.softmax(-1)[token]), abs=1e-5)


def test_the_last_output_reads_as_the_output(studied: tuple[Run, Model]) -> None:
    """Of a stream of points the tuned lens reads the last by itself: the model's own logits."""
    run, model = studied
    lens = TunedLens.of(run, model)
    assert lens is not None
    tokens = torch.tensor([[5, 9, 12, 30]])
    seen = residuals(model, tokens)
    pairs = torch.stack([seen["Lres"][:, 0, -1], seen["Lout"][:, 0, -1]], 1).flatten(0, 1)
    read = lens.stream(torch.cat([seen["Lin"][:1, 0, -1], pairs]))
    with torch.no_grad():
        assert torch.allclose(read[-1], model.hf(tokens).logits[0, -1], atol=1e-4)
    assert len(read) == model.anatomy.n_layers + 1
    assert torch.allclose(read[1], lens.logits(1, seen["Lres"][1, 0, -1:].clone())[0], atol=1e-4)


def test_questions_are_read_by_it(studied: tuple[Run, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with a tuned lens gains its rows: after each attention layer, and at the end, where it is the own lens."""
    run, model = studied
    asked = [Question("cities", "Paris", "Paris is the capital of", " France", "Europe")] * 2
    monkeypatch.setattr(questions, "built_in", lambda: asked)
    run = study.measure(run, model, chosen=catalogue.choose("questions"))
    rows = run.table("question_ranks").filter(pl.col("question") == 0).collect()
    tuned, own = (rows.filter(pl.col("lens") == lens) for lens in ("tuned", "own"))
    assert tuned["point"].to_list() == [1, 3, 5, 6] and own["point"].to_list() == list(range(7))
    assert tuned.row(-1, named=True)["rank"] == own.row(-1, named=True)["rank"]
    lens = TunedLens.of(run, model)
    assert lens is not None
    seen = residuals(model, torch.tensor([model.tokenizer("Paris is the capital of")["input_ids"]]))
    logits = lens.logits(1, seen["Lres"][1, :, -1].clone())[0].double()
    row = tuned.row(1, named=True)
    assert (row["layer"], row["part"]) == (1, "attention")
    assert row["rank"] == int((logits > logits[row["token"]]).sum())
    assert row["log_probability"] == pytest.approx(float(logits.log_softmax(-1)[row["token"]]), abs=1e-4)
    says = {answer.id: answer.says for answer in question_findings(run)}["answer-rank-cities"]
    assert "under the tuned lens." in says


def test_stored_maps_are_the_fitted_ones(studied: tuple[Run, Model]) -> None:
    """What a run holds reads as what was fitted; a run without reads as none."""
    run, model = studied
    text = FittedText.of(run, model, count=3 * Sizes().positions, longest=Sizes().longest)
    fitted, stored = fit(TunedLens.identity(model), text), TunedLens.of(run, model)
    assert stored is not None
    assert torch.equal(fitted.weight, stored.weight) and torch.equal(fitted.bias, stored.bias)


def test_partners_are_of_other_documents() -> None:
    """Each example has one of another document, or itself where all are of one."""
    documents = np.array([3, 3, 5, 5, 5, 8])
    assert (documents[partners(documents)] != documents).all()
    assert partners(np.array([4, 4, 4])).tolist() == [0, 1, 2]


def test_another_examples_output_is_no_better_than_chance() -> None:
    """Fed with outputs of other examples as their own, a reading knows no more of them than of its null."""
    model, text, turns = planted("llama", 600)
    lens = TunedLens(Lens.of(model.anatomy, "own"), turns / 3 - torch.eye(turns.shape[1]), torch.zeros(3, 32))
    uniform = torch.full((80,), 1 / 80)
    readings = Readings(lens, Lens.of(model.anatomy, "raw"), uniform)
    documents = np.arange(600)

    def difference(final: torch.Tensor) -> tuple[float, float]:
        parts = readings.columns(text.residual.transpose(0, 1), final, documents)
        (tuned,) = (part for part in parts if part["layer"] == 1 and part["lens"] == "tuned")
        apart = (tuned["rank"] == 0).astype(float) - (tuned["null_rank"] == 0)
        return float(apart.mean()), float(2 * apart.std() / np.sqrt(600))

    value, error = difference(text.final)
    assert value - error > 0.5
    value, error = difference(text.final.roll(7, 0))
    assert abs(value) <= error


def test_findings_say_what_the_readings_are(studied: tuple[Run, Model]) -> None:
    """Three findings; means by layer and lens are those of the table, and n is said."""
    run, _ = studied
    rows = run.table("lens_readings").collect()
    answers = {answer.id: answer for answer in findings(run)}
    assert set(answers) == {"lens-divergence", "lens-first", "lens-probability"}
    frame = answers["lens-divergence"].frame
    for row in frame.iter_rows(named=True):
        of_layer = rows.filter(pl.col("layer") == row["layer"], pl.col("lens") + " lens" == row["lens"])
        assert row["value"] == pytest.approx(of_layer["divergence"].mean(), rel=1e-5)
        constant = rows.filter(pl.col("lens") == "constant")["divergence"].mean()
        assert row["null"] == pytest.approx(constant, rel=1e-5)
    for answer in answers.values():
        assert f"{rows['example'].n_unique():,} prefixes of" in answer.says


def test_a_killed_fit_is_not_done_again(
    studied: tuple[Run, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps are kept in the work folder: the second call reads them."""
    run, model = studied
    first = tuned_lens.measure(run, model, Sizes(positions=4), Work(tmp_path))
    monkeypatch.setattr(tuned_lens, "fit", None)
    again = tuned_lens.measure(run, model, Sizes(positions=4), Work(tmp_path))
    assert next(iter(first["tuned_lens"])).equals(next(iter(again["tuned_lens"])))
