"""Two runs of the same neurons: what is common to their triggers, and its null."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
import torch
from families import FAMILIES
from synthetic import make_run
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError
from mnemoscope.intervals import jackknifed
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings import stability, values
from mnemoscope.studies.measures.changes import _correlation, _ranks, changes
from mnemoscope.text.sampling import mixed

synthetic_documents = synthetic._documents


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same neurons over the same text, and the same seed again with other triggers kept."""
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "one", layers=2), make_run(folder / "two", layers=2, top=10)


def test_a_run_has_all_in_common_with_itself(runs: tuple[Run, Run]) -> None:
    """Overlap 1 everywhere, less for different neurons; statistics agree perfectly."""
    one, _ = runs
    overlap, statistics = stability.findings(one, one)
    assert overlap.frame["overlap"].to_list() == pytest.approx([1.0] * 2)
    assert (overlap.frame["null"] < 0.9).all()
    assert statistics.frame["correlation"].to_list() == pytest.approx([1.0] * statistics.frame.height)


def test_what_is_common_is_the_sum_of_smaller_shares() -> None:
    """Against a loop, with sides that only one run has."""
    one = pl.DataFrame({"side": [0, 0, 1, 3], "kind": [5, 6, 5, 7], "share": [0.25, 0.75, 1.0, 1.0]})
    two = pl.DataFrame({"side": [0, 0, 1, 2], "kind": [6, 8, 4, 5], "share": [0.5, 0.5, 1.0, 1.0]})
    found = stability.common(one, two, 4)
    assert found[:2].tolist() == [0.5, 0.0] and np.isnan(found[2:]).all()


def triggers_of(generator: np.random.Generator, sides: int, words: np.ndarray) -> pl.DataFrame:
    """Thirty triggers of each side, nearly all of them words that it answers to; the same documents for all."""
    side = np.repeat(np.arange(sides), 30)
    kind = np.where(generator.random(len(side)) < 0.7, words[side], generator.integers(0, 40, len(side)))
    return pl.DataFrame(
        {"side": side, "kind": kind, "document": np.tile(np.arange(30) * 7, sides) + side % 5}
    )


def test_means_without_groups_of_documents_equal_a_loop() -> None:
    """Over all documents the mean of `common`; then as if the documents of a group were not there."""
    generator = np.random.default_rng(0)
    layer, words = np.arange(12) // 6, generator.integers(0, 40, 12)
    one, two = (triggers_of(generator, 12, words) for _ in range(2))
    found = stability.kept(one, two, layer)
    for row, left_out in enumerate(range(-1, 40)):
        rest = [
            rows.filter(pl.Series(mixed(rows["document"].to_numpy(), 1) % 40 != np.uint64(left_out)))
            if left_out >= 0
            else rows
            for rows in (one, two)
        ]
        values = stability.common(*map(stability.shares, rest), 12)
        assert found[row].tolist() == pytest.approx([values[:6].mean(), values[6:].mean(), values.mean()])


def test_directions_keep_their_triggers_as_neurons_do() -> None:
    """Units that answer to words alike are no more stable for being neurons; others' triggers are not theirs."""
    generator = np.random.default_rng(1)
    layer, figures = np.zeros(200, np.int64), []
    for _ in range(2):
        words = generator.integers(0, 40, 200)
        figures.append(stability.kept(*(triggers_of(generator, 200, words) for _ in range(2)), layer)[:, -1])
    excess = jackknifed(figures[0] - figures[1])
    assert abs(excess.value) <= 1.7 * (excess.high - excess.low) / 2
    strangers = stability.kept(
        *(triggers_of(generator, 200, generator.integers(0, 40, 200)) for _ in range(2)), layer
    )
    beyond = jackknifed(figures[0] - strangers[:, -1])
    assert beyond.low > 0.3


@pytest.mark.slow
def test_neurons_stand_beside_directions_of_both_runs(tmp_path: Path) -> None:
    """Where both runs mined the same directions these are in the figure, and the sentence says what neurons have "
    "more."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    corpus = texts(80)
    one, two = (mn.build(model, corpus[start::2], tmp_path / str(start), top=10) for start in range(2))
    found = stability.findings(one, two)[0]
    assert found.frame["units"].unique(maintain_order=True).to_list() == list(stability.UNITS.values())
    assert found.frame.height == 3 * 3
    assert (
        "points" in found.says and "beyond random directions" in found.says and "rotated axes" in found.says
    )
    assert (
        "no directions were mined alike" in stability.findings(one, _without_nulls(model, tmp_path))[0].says
    )


def _without_nulls(model: Model, folder: Path) -> Run:
    return mn.build(model, texts(80)[1::2], folder / "none", top=10, nulls=())


def test_runs_without_common_text_are_compared_by_last_tokens(tmp_path: Path) -> None:
    """Two halves of a corpus share no context; the kind of trigger is its last token, and the finding says so."""
    one, two = make_run(tmp_path / "one", seed=0), make_run(tmp_path / "two", seed=1, documents=30)
    overlap = stability.findings(one, two)[0]
    assert "last tokens" in overlap.says and "no context is in both runs" in overlap.notes[0]


@pytest.mark.parametrize("share", [0.06, 0.3, 0.7, 1.0])
def test_triggers_are_compared_only_where_texts_coincide(tmp_path: Path, share: float) -> None:
    """Neurons that never changed have all triggers in common where texts coincide, and none are counted elsewhere.

    Where few do (one text cut differently), triggers of the same text are hardly possible: last tokens are compared.
    """
    one, drawn = make_run(tmp_path / "one", layers=1, documents=60, top=300), synthetic._corpus

    def mixed(
        random: np.random.Generator, vocabulary: list[bytes], documents: int, hostile: tuple[str, ...]
    ) -> synthetic._Corpus:
        first = drawn(np.random.default_rng(0), vocabulary, documents, hostile)
        other = drawn(random, vocabulary, documents, hostile)
        kept = round(share * len(first.tokens))
        rest = len(other.tokens) - kept
        return synthetic._Corpus(
            first.tokens[:kept] + [tokens[::-1].copy() for tokens in other.tokens[:rest]],
            first.document[:kept] + [first.document[kept - 1] + 1 + at for at in range(rest)],
            first.start[:kept] + [0] * rest,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_corpus", mixed)
        patch.setattr(synthetic, "_documents", lambda *_: synthetic_documents(400, ()))
        two = make_run(tmp_path / "two", layers=1, documents=60, top=300)
    found = stability.shared_contexts(one, two)
    assert found.share == pytest.approx(share, abs=0.1) and found.enough == (share >= 0.5)
    overlap = stability.findings(one, two)[0]
    if found.enough:
        assert (
            "triggers (text and position) in the contexts of both runs" in overlap.says and not overlap.notes
        )
        assert f"({found.share:.0%} of the smaller one's)" in overlap.says
    else:
        assert "last tokens of triggers" in overlap.says and "text and position" not in overlap.says
        assert f"only {found.share:.1%} of the contexts" in overlap.notes[0]


def test_nobody_stands_in_for_themselves() -> None:
    """The null pairs every neuron with another one."""
    for count in (2, 3, 50):
        moved = stability._moved(count, np.random.default_rng(0))
        assert sorted(moved.tolist()) == list(range(count)) and (moved != np.arange(count)).all()


def test_other_neurons_are_refused(tmp_path: Path) -> None:
    """Runs whose neurons do not correspond have no common triggers to speak of."""
    with pytest.raises(QueryError, match="same neurons"):
        stability.findings(make_run(tmp_path / "a", layers=2), make_run(tmp_path / "b", layers=3))


def test_figures_stand_side_by_side(runs: tuple[Run, Run]) -> None:
    """Each figure of both has a panel for each run, in turn, and loses no row."""
    found = [values.findings(run) for run in runs]
    joined = {one.id: one for one in stability.side_by_side(("one", "two"), found)}
    assert set(joined) == {one.id for one in found[0]}
    plain, split = joined["value-entropy"], joined["figure-4-agreement"]
    assert plain.frame["run"].unique(maintain_order=True).to_list() == ["one", "two"]
    assert split.frame["run"].unique(maintain_order=True).to_list() == [
        "largest coefficients · one", "largest coefficients · two",
        "most negative coefficients · one", "most negative coefficients · two",
    ]  # fmt: skip
    assert split.frame.height == sum(
        {one.id: one for one in some}["figure-4-agreement"].frame.height for some in found
    )


@pytest.mark.slow
def test_several_runs_are_compared_in_their_order(tmp_path: Path) -> None:
    """Each with the next; figures have a panel for each, and their means stand run by run."""
    runs = [make_run(tmp_path / name, layers=2, top=top) for name, top in (("a", 50), ("b", 20), ("c", 5))]
    report = mn.compare(*(run.path for run in runs), only="values")
    (stable, measured) = report.sections
    overlap = stable.findings[0]
    assert overlap.frame["run"].unique(maintain_order=True).to_list() == ["a to b", "b to c"]
    assert overlap.says.startswith("a to b: On average") and " b to c: On average" in overlap.says
    for step, pair in (("a to b", runs[:2]), ("b to c", runs[1:])):
        alone = stability.findings(*pair)[0].frame["overlap"].to_list()
        assert overlap.frame.filter(pl.col("run") == step)["overlap"].to_list() == alone
    moved = measured.findings[-1]
    assert moved.id == "timeline-values" and moved.figure is not None and moved.figure.facet == "figure"
    for number, run in enumerate(runs):
        (entropy,) = (finding for finding in values.findings(run) if finding.id == "value-entropy")
        mean = entropy.frame[entropy.figure.y].mean()
        rows = moved.frame.filter(pl.col("figure") == entropy.title, pl.col("run") == number)
        assert rows["name"].to_list() == ["abc"[number]] and rows["value"][0] == pytest.approx(mean)
    assert report.title == "a, b and c" and len(report.runs) == 3
    page = report.save(tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count("Made by mnemoscope") == 3 and "run by run" in page
    assert not [
        f for f in mn.compare(runs[0], runs[1], only="values").findings if f.id.startswith("timeline")
    ]
    with pytest.raises(QueryError, match="1 was given; give two or more"):
        mn.compare(runs[0])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs of a tiny model, of itself again, and of it with the value of L1N3 turned and the key of L1N5 drawn."""
    folder = tmp_path_factory.mktemp("checkpoints")
    runs = []
    for name in ("first", "second", "third"):
        hf = FAMILIES["opt"]()
        if name == "third":
            with torch.no_grad():
                layer = hf.model.decoder.layers[1]
                layer.fc2.weight[:, 3] *= -1
                layer.fc1.weight[5] = torch.randn(32, generator=torch.Generator().manual_seed(0))
        hf.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        model = mn.load_model(folder / name, dtype="fp32")
        runs.append(mn.build(model, texts(40), folder / f"run-{name}", top=10, nulls=()))
    return runs


def test_what_changed_in_each_neuron_is_told(checkpoints: list[Run]) -> None:
    """Nothing from a model to itself; then a value turned round and a key of another kind, and all else as it was."""
    still, moved = changes(checkpoints, positions=300)
    vectors = ("key", "value", "coefficients")
    assert still.height == moved.height == 3 * 40 and still["up"].null_count() == still.height
    for name in vectors:
        assert still[name].drop_nulls().to_list() == pytest.approx([1.0] * still[name].drop_nulls().len())
        assert (still[f"{name}_null"].drop_nulls() < 0.99).all()
    by = {(row["layer"], row["neuron"]): row for row in moved.iter_rows(named=True)}
    assert by[1, 3]["value"] == pytest.approx(-1) and by[1, 3]["key"] == pytest.approx(1)
    assert abs(by[1, 5]["key"]) < 0.7 and by[1, 5]["value"] == pytest.approx(1)
    assert by[1, 5]["coefficients"] is None or by[1, 5]["coefficients"] < 0.9
    others = moved.filter(~((pl.col("layer") == 1) & pl.col("neuron").is_in([3, 5])))
    assert others["key"].to_list() == pytest.approx([1.0] * others.height)
    # A layer above reads another stream: its coefficients move a little, those below not at all.
    below = moved.filter(pl.col("layer") == 0)["coefficients"].drop_nulls()
    assert below.to_list() == pytest.approx([1.0] * below.len())


def test_rank_correlations_equal_those_of_a_loop() -> None:
    """Spearman with shared ranks, column by column; null where a column never changes."""
    generator = np.random.default_rng(0)
    one, two = (np.maximum(generator.normal(size=(50, 6)), 0).astype(np.float32) for _ in range(2))
    one[:, 4] = 0
    found = _correlation(_ranks(one), _ranks(two))
    for column in range(6):
        wanted = pl.DataFrame({"a": one[:, column], "b": two[:, column]}).select(
            pl.corr("a", "b", method="spearman")
        )
        expected = wanted.item()
        assert found[column] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found[4]) and np.isfinite(found[[0, 1, 2, 3, 5]]).all()


@pytest.mark.slow
def test_comparing_with_weights_names_what_turned_most(checkpoints: list[Run], tmp_path: Path) -> None:
    """The page has the medians of each step, and a row for each neuron; triggers are those of the runs."""
    report = mn.compare(*(run.path for run in checkpoints), only="glance", weights=True)
    told = {finding.id: finding for finding in report.findings}
    assert "values turned most in L1N3" in told["neurons-changed"].says
    each = told["neurons-changed-each"].frame
    assert each["step"].unique(maintain_order=True).to_list() == [
        "run-first to run-second",
        "run-second to run-third",
    ]
    first = each.filter(pl.col("step") == "run-first to run-second")["triggers"].drop_nulls()
    assert first.to_list() == pytest.approx([1.0] * first.len())
    assert report.save(tmp_path / "compare.html").is_file()
    with pytest.raises(QueryError, match="same neurons"):
        changes([checkpoints[0], make_run(tmp_path / "other", layers=2)])
