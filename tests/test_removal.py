"""The token-removal test: the passes against plain ones, the statistics against slow definitions, planted effects."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from planted import CAPITALS, FOIL, planted, token
from scipy import stats
from test_cli import call
from tiny import model_folder, texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError, RunMismatch
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.studies.findings import removal as analysis
from mnemoscope.studies.measures.removal import LONGEST, SHORTEST, _text, removal
from mnemoscope.views import findings
from mnemoscope.views.terminal import plain


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Model, pl.DataFrame]:
    """A tiny model, a run of it, and the table."""
    model = mn.load_model(FAMILIES[request.param](), tokenizer=tokenizer())
    run = mn.build(model, texts(40), tmp_path_factory.mktemp("runs") / "run", top=10)
    return run, model, removal(run, model, documents=20, per_layer=60, triggers=10)


def coefficient(model: Model, layer: int, neuron: int, tokens: np.ndarray) -> float:
    """The coefficient at the last of some tokens, by a hook of its own."""
    kept: list[torch.Tensor] = []
    part = model.anatomy.layers[layer].down
    handle = part.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.inference_mode():
        model.hf(input_ids=torch.from_numpy(tokens.astype(np.int64))[None])
    handle.remove()
    return float(kept[0].reshape(-1, kept[0].shape[-1])[-1, neuron])


def test_every_coefficient_is_that_of_the_shortened_prefix_alone(
    case: tuple[Run, Model, pl.DataFrame],
) -> None:
    """Passes that serve many prefixes give what the model gives for each prefix fed alone."""
    run, model, rows = case
    for row in rows.sample(30, seed=0).iter_rows(named=True):
        tokens = run.contexts([row["context"]])[row["context"]].tokens[: row["position"] + 1]
        whole = coefficient(model, row["layer"], row["neuron"], tokens)
        without = coefficient(model, row["layer"], row["neuron"], np.delete(tokens, row["removed_position"]))
        assert [row["whole"], row["without"]] == pytest.approx([whole, without], rel=1e-4, abs=1e-5)


def test_weights_in_half_precision_are_read_in_fp32(tmp_path: Path) -> None:
    """Whole and shortened prefixes are read as a copy of the model in fp32 reads them; the weights stay as they are."""
    model = mn.load_model(FAMILIES["llama"]().to(torch.bfloat16), tokenizer=tokenizer())
    run = mn.build(model, texts(30), tmp_path / "run", top=5, nulls=())
    wide = mn.load_model(copy.deepcopy(model.hf).float(), tokenizer=tokenizer())
    rows = removal(run, model, documents=10, per_layer=20, triggers=5)
    assert {weight.dtype for weight in model.hf.parameters()} == {torch.bfloat16}
    for row in rows.sample(12, seed=0).iter_rows(named=True):
        tokens = run.contexts([row["context"]])[row["context"]].tokens[: row["position"] + 1]
        without = coefficient(wide, row["layer"], row["neuron"], np.delete(tokens, row["removed_position"]))
        assert row["whole"] == pytest.approx(
            coefficient(wide, row["layer"], row["neuron"], tokens), rel=1e-3, abs=1e-5
        )
        assert row["without"] == pytest.approx(without, rel=1e-3, abs=1e-5)


def test_what_is_removed_and_what_stands_beside(case: tuple[Run, Model, pl.DataFrame]) -> None:
    """Triggers are those of the run; the null is the same neuron and position elsewhere; position 0 stays."""
    run, _, rows = case
    assert rows.columns == SCHEMAS["removal"].names
    assert rows.null_count().sum_horizontal().item() == 0
    assert rows["position"].min() >= SHORTEST
    assert rows["removed_position"].min() >= 1
    assert (rows["removed_position"] <= rows["position"]).all()
    assert (rows.filter(removed="first")["removed_position"] == 1).all()
    last = rows.filter(removed="last")
    assert (last["removed_position"] == last["position"]).all()
    key = ["layer", "neuron", "polarity", "rank", "removed"]
    triggers, null = (rows.filter(kind=kind) for kind in ("trigger", "random"))
    joined = triggers.join(run.table("triggers").collect(), on=key[:4])
    assert joined.height == triggers.height
    assert joined["whole"].to_numpy() == pytest.approx(joined["coefficient"].to_numpy(), rel=1e-4)
    assert (joined["context"] == joined["context_right"]).all()
    beside = null.join(triggers, on=key)
    assert beside.height == null.height > 0.9 * triggers.height
    assert (beside["position"] == beside["position_right"]).all()
    assert (beside["document"] != beside["document_right"]).all()


def test_it_is_the_same_for_the_same_seed(case: tuple[Run, Model, pl.DataFrame]) -> None:
    """One generator decides everything."""
    run, model, rows = case
    assert removal(run, model, documents=20, per_layer=60, triggers=10).equals(rows)
    assert not removal(run, model, documents=20, per_layer=60, triggers=10, seed=1).equals(rows)


def test_the_random_token_is_any_with_equal_chance() -> None:
    """Of the tokens of a prefix behind position 0, each is dropped equally often (chi-square)."""
    generator, end, draws = np.random.default_rng(3), 9, 6000
    found = [_text(0, 0, np.arange(40), [], generator).drop[end] for _ in range(draws)]
    counts = np.bincount(found, minlength=end + 1)
    assert counts[0] == 0
    assert len(counts) == end + 1
    assert stats.chisquare(counts[1:]).pvalue > 0.001


def test_few_passes_serve_a_long_context() -> None:
    """The dropped tokens of all prefixes of a context are about log(length) different ones."""
    generator = np.random.default_rng(0)
    different = [len(set(_text(0, 0, np.arange(LONGEST), [], generator).drop[1:])) for _ in range(300)]
    assert np.mean(different) == pytest.approx(sum(1 / n for n in range(1, LONGEST)), rel=0.1)


def test_a_neuron_that_detects_the_last_token_loses_all_with_it(tmp_path: Path) -> None:
    """In the constructed transformer the neuron that is switched on by "is" needs that token alone."""
    model = planted()
    run = mn.build(model, texts(60, longest=30), tmp_path / "run", top=20)
    rows = removal(run, model, documents=60, triggers=20)
    mine = rows.filter(kind="trigger", layer=FOIL[0], neuron=FOIL[1], polarity=1)
    tokens = {context: one.tokens for context, one in run.contexts(mine["context"].to_list()).items()}
    countries = {token(country) for country in CAPITALS}  # a head attends to them, so they do matter
    places = list(mine.select("context", "position").iter_rows())
    assert all(tokens[c][p] == token(" is") for c, p in places)
    clean = [tokens[c][p - 1] != token(" is") and tokens[c][1] not in countries for c, p in places]
    mine = mine.filter(pl.Series(clean)).with_columns(change=pl.col("without") / pl.col("whole") - 1)
    assert mine.height >= 15
    assert (mine.filter(removed="last")["change"] < -0.99).all()
    assert (mine.filter(removed="first")["change"].abs() < 0.01).all()


def made(
    *, slope: float, noise: float = 0.2, layers: int = 4, documents: int = 60, seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows where m' = slope m + noise (mean 0, unit variance); triggers are m > 2, and the null is not chosen."""
    generator, parts = np.random.default_rng(seed), []
    for layer in range(layers):
        whole = generator.normal(size=40_000)
        for kind, chosen in (("trigger", whole[whole > 2]), ("random", whole[:900])):
            for removed in analysis.REMOVED:
                size = len(chosen)
                parts.append(
                    pl.DataFrame(
                        {
                            "layer": np.full(size, layer),
                            "neuron": np.zeros(size, int),
                            "kind": [kind] * size,
                            "removed": [removed] * size,
                            "document": generator.integers(0, documents, size),
                            "whole": chosen,
                            "without": slope * chosen + generator.normal(0, noise, size),
                        }
                    )
                )
    scales = pl.DataFrame({"layer": range(layers), "neuron": 0, "mean": 0.0, "std": 1.0})
    return pl.concat(parts), scales


@pytest.mark.parametrize("slope", [0.0, 0.4, 0.9])
def test_regression_to_the_mean_is_not_taken_for_an_effect(slope: float) -> None:
    """Triggers that only fall back like ordinary prefixes do lose a lot, and nothing beyond the null."""
    found = analysis.effects(*made(slope=slope))
    effect = found.of(None, "trigger", "last")
    assert effect.ratio.value == pytest.approx(slope - 1, abs=0.02)
    assert effect.retained.value == pytest.approx(slope, abs=0.02)
    beyond = found.beyond_null["last"]
    assert beyond.value == pytest.approx(0, abs=0.02)
    assert beyond.low < beyond.high


def test_the_measures_equal_their_definitions() -> None:
    """By layer, kind and removed token: relative, ratio, difference and retained, computed the slow way."""
    rows, scales = made(slope=0.5, layers=2)
    rows = rows.with_columns(pl.col("document").cast(pl.Int64))
    scales = scales.with_columns(mean=pl.Series([0.3, -0.1]), std=pl.Series([2.0, 0.5]))
    found = analysis.effects(rows, scales, samples=50)
    for layer, mean, std in ((0, 0.3, 2.0), (1, -0.1, 0.5)):
        for kind in analysis.KINDS:
            some = rows.filter(layer=layer, kind=kind, removed="first")
            m, n = some["whole"].to_numpy(), some["without"].to_numpy()
            clear = np.abs(m) >= 0.1 * std
            effect = found.of(layer, kind, "first")
            assert effect.prefixes == len(m)
            assert effect.relative.value == pytest.approx(np.mean((n - m)[clear] / m[clear]))
            assert effect.ratio.value == pytest.approx(np.sum(np.sign(m) * (n - m)) / np.abs(m).sum())
            assert effect.difference.value == pytest.approx(np.mean(np.sign(m) * (n - m)) / std)
            assert effect.retained.value == pytest.approx(
                np.sum((n - mean) * (m - mean)) / np.sum((m - mean) ** 2)
            )


@pytest.mark.slow
def test_the_intervals_hold_what_they_promise() -> None:
    """With documents that differ, the 95 % interval of the ratio covers the truth in about 95 of 100 repetitions."""
    generator, covered = np.random.default_rng(0), 0
    scales = pl.DataFrame({"layer": [0], "neuron": [0], "mean": [0.0], "std": [1.0]})
    for seed in range(100):
        documents = np.repeat(np.arange(60), 10)
        of_document = generator.normal(-0.5, 0.2, 60)[documents]
        whole = np.full(600, 4.0)
        rows = pl.DataFrame({"document": documents, "whole": whole, "without": whole * (1 + of_document)})
        rows = rows.with_columns(layer=0, neuron=0, kind=pl.lit("trigger"), removed=pl.lit("last"))
        ratio = analysis.effects(rows, scales, samples=300, seed=seed).of(0, "trigger", "last").ratio
        covered += ratio.low <= -0.5 <= ratio.high
    assert 88 <= covered <= 99


@pytest.mark.parametrize(("slopes", "word"), [((0.1, 0.4, 0.7), "less"), ((0.7, 0.4, 0.1), "more")])
def test_what_is_said_of_the_layers(slopes: tuple[float, ...], word: str) -> None:
    """Whether the last token matters less in upper layers follows from the figures; so does where it does least."""
    parts = [made(slope=slope, layers=1, seed=layer) for layer, slope in enumerate(slopes)]
    rows, scales = (
        pl.concat([pair[at].with_columns(layer=layer) for layer, pair in enumerate(parts)]) for at in (0, 1)
    )
    page = " ".join(plain(findings.removal(analysis.effects(rows, scales))).split())
    assert f"It matters {word} in upper layers" in page
    assert f"least in layer {slopes.index(max(slopes))}, " in page
    assert "neither clearly less nor more is left" in page


def test_what_was_not_measured_is_none_and_a_constant_neuron_is_harmless() -> None:
    """No rows, or neurons without a spread, give no number rather than a wrong one."""
    rows = pl.DataFrame(
        {"layer": [1, 1], "neuron": [0, 0], "document": [0, 1], "whole": [2.0, 2.0], "without": [1.0, 1.0]}
    )
    rows = rows.with_columns(kind=pl.lit("trigger"), removed=pl.lit("first"))
    found = analysis.effects(rows, pl.DataFrame({"layer": [1], "neuron": [0], "mean": [2.0], "std": [0.0]}))
    effect = found.of(1, "trigger", "first")
    assert effect.ratio.value == -0.5
    assert effect.difference.value is effect.retained.value is effect.relative.value is None
    assert found.of(0, "trigger", "first").ratio.value is None
    assert found.of(1, "random", "first").prefixes == 0
    json.dumps(found.to_dict())


def test_bad_questions(case: tuple[Run, Model, pl.DataFrame]) -> None:
    """Another model, too few documents: one line each."""
    run, model, _ = case
    other = mn.load_model(FAMILIES["opt"](), tokenizer=tokenizer())
    with pytest.raises(RunMismatch, match="are others; give the model"):
        removal(run, other)
    with pytest.raises(QueryError, match="documents=1 is too small"):
        removal(run, model, documents=1)


@pytest.mark.slow
def test_the_command_adds_a_table_that_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`removal` measures, keeps and prints; the same question is answered from what was kept."""
    folder = model_folder(tmp_path / "model")
    run = mn.build(mn.load_model(str(folder), dtype="fp32"), texts(40), tmp_path / "run", top=10).path
    words = ("removal", run, "--documents", 20, "--per-layer", 50)
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 0, err
    assert "The last token matters more than a random one" in out
    kept = mn.open_run(run)
    assert kept.table("removal").collect().height > 0
    assert kept.check() == []
    monkeypatch.setattr(
        "mnemoscope.studies.measures.removal.removal", lambda *_, **__: pytest.fail("measured again")
    )
    code, again, err = call(monkeypatch, capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(again)["documents"] == kept.table("removal").collect()["document"].n_unique()
