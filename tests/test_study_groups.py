"""Groups of neurons taken out: forward passes by other means, laws of groups and their matches, and the findings."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Cells
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings.groups import changes, findings
from mnemoscope.studies.measures.groups import SCORES, Scoring, losses, matched, sizes_of, top
from mnemoscope.studies.measures.positions import Sizes
from mnemoscope.text.vocabulary import Vocabulary

PREFIX = np.array([5, 17, 40, 8, 23, 11], np.int32)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny model and its run with ablated groups."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    run = mn.build(model, texts(100), tmp_path_factory.mktemp("groups") / "run", top=2, nulls=())
    return study.measure(run, model, chosen=catalogue.choose("groups"), sizes=Sizes(sentences=240)), model


def scoring(name: str) -> Scoring:
    """Of a tiny model without a tokenizer."""
    hf = FAMILIES[name]()
    model = Model(hf, None, describe(hf), "tiny")
    words = Vocabulary([b"x"] * 80, [False] * 80)
    return Scoring.of(model, words)


def traced(one: Scoring, prefix: np.ndarray) -> TracedPrediction:
    """The prediction behind a prefix."""
    stream = one.model.traced(torch.from_numpy(prefix.astype(np.int64))[None])
    target = int(stream.logits[-1].argmax())
    return TracedPrediction(stream, one.lens, target, (), one.words, one.geometry)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gemma2"])
def test_a_group_is_taken_out_of_the_forward_pass(name: str) -> None:
    """Weights whose values are zeroed for the chosen neurons give the same where the prefix is one token long; and a
    hook of our own on longer ones."""
    one = scoring(name)
    model = one.model
    with torch.inference_mode():
        columns = losses(one, PREFIX, np.random.default_rng(0))
        scores, weight = one.scores(traced(one, PREFIX))
    tokens = torch.from_numpy(PREFIX.astype(np.int64))[None]
    generator = np.random.default_rng(0)
    row = 1
    for name_of_score, score in scores.items():
        for size in sizes_of(len(score)):
            group = top(score, model.cells, size)
            for kind, members in (
                ("own", group),
                ("matched", matched(group, weight, model.cells, generator)),
            ):
                handles = []
                for number, layer in enumerate(model.anatomy.layers):
                    gone = members[members[:, 0] == number, 1]

                    def hook(_, inputs, gone=gone):
                        kept = inputs[0].clone()
                        kept.view(1, len(PREFIX), -1)[0, -1, gone] = 0
                        return (kept,)

                    handles.append(layer.down.register_forward_pre_hook(hook))
                with torch.no_grad():
                    logits = model.hf(tokens).logits[0, -1].double()
                for handle in handles:
                    handle.remove()
                token = int(columns["token"][row])
                assert (columns["score"][row], columns["kind"][row]) == (name_of_score, kind)
                assert columns["neurons"][row] == size == len(members)
                assert columns["log_probability"][row] == pytest.approx(
                    float(logits.log_softmax(-1)[token]), abs=1e-4
                )
                assert columns["logit"][row] == pytest.approx(float(logits[token] - logits.mean()), abs=1e-4)
                assert columns["rank"][row] == int((logits > logits[token]).sum())
                row += 1
    assert row == len(columns["token"])


def test_scores_are_their_definitions() -> None:
    """C by exact evaluation, |m||v|, |m|, and where the token stands among the logits of what a neuron writes."""
    one = scoring("llama")
    with torch.inference_mode():
        prediction = traced(one, PREFIX)
        scores, weight = one.scores(prediction)
        for layer in range(prediction.layers):
            vectors = prediction.stream.neuron_parts(layer, prediction.position)
            here = one.model.cells.of(layer)
            base = torch.full((len(vectors),), 2 * layer + 1)
            exact = prediction.bases.increases(vectors, base).numpy()
            assert np.argmax(exact) == np.argmax(scores["increase"][here])
            assert np.allclose(scores["increase"][here], exact, atol=0.05)
            logits = one.lens.weighted(vectors) @ one.lens.unembedding.T
            centred = logits - logits.mean(-1, keepdim=True)
            slow = centred[:, prediction.target] / centred.std(-1, correction=0)
            assert np.allclose(scores["standing"][here], slow.numpy(), atol=1e-3)
            assert np.allclose(scores["weight"][here], vectors.norm(dim=-1).numpy(), rtol=1e-5)
            coefficients = prediction.stream.layers[layer].coefficients[-1].abs().numpy()
            assert np.allclose(scores["coefficient"][here], coefficients, rtol=1e-6)
    assert np.allclose(weight, scores["weight"]) and set(scores) == set(SCORES)


def test_groups_are_the_largest_and_leave_half() -> None:
    """The largest of all layers, unless a layer would give more than half of its neurons."""
    generator = np.random.default_rng(0)
    score = generator.standard_normal((4, 20))
    cells = Cells((20,) * 4)
    plain = top(score.ravel(), cells, 7)
    assert sorted(score[tuple(plain.T)]) == sorted(np.sort(score.ravel())[-7:])
    score[2] += 100
    crowded = top(score.ravel(), cells, 15)
    assert (crowded[:, 0] == 2).sum() == 10 and len(np.unique(crowded, axis=0)) == 15
    assert sizes_of(3 * 40) == [10, 60] and sizes_of(30 * 1536) == [10, 100, 300]


def test_matches_are_others_of_the_same_layer_and_strength() -> None:
    """None of the group, none twice, layer for layer; as strong, where there are equals."""
    generator = np.random.default_rng(1)
    weight = generator.lognormal(0, 1, (5, 400))
    group = np.stack([generator.integers(0, 5, 300), generator.integers(0, 400, 300)], 1)
    group = np.unique(group, axis=0)
    others = matched(group, weight.ravel(), Cells((400,) * 5), generator)
    assert (others[:, 0] == group[:, 0]).all()
    both = np.concatenate([group, others])
    assert len(np.unique(both, axis=0)) == len(both)
    one, other = weight[tuple(group.T)], weight[tuple(others.T)]
    assert abs(one.sum() / other.sum() - 1) < 0.03 and np.median(np.abs(one - other) / one) < 0.03


@pytest.mark.slow
def test_a_group_chosen_by_nothing_loses_what_its_match_loses(studied: tuple[Run, Model]) -> None:
    """Fed with a score that knows nothing of the sentence, own less matched is 0 within its interval."""
    run, model = studied
    one = Scoring.of(model, run.vocabulary)
    generator = np.random.default_rng(0)

    class Blind(Scoring):
        """Scores at random."""

        def scores(self, prediction: TracedPrediction) -> tuple[dict[str, np.ndarray], np.ndarray]:
            scores, weight = super().scores(prediction)
            return {"increase": generator.standard_normal(scores["increase"].shape)}, weight

    blind = Blind(one.model, one.lens, one.words, one.geometry, one.quotients)
    apart = []
    with torch.inference_mode():
        for _ in range(80):
            prefix = generator.integers(4, 40, 6).astype(np.int32)
            columns = losses(blind, prefix, generator)
            apart.append(np.diff(columns["log_probability"][1:].reshape(-1, 2), axis=1)[:, 0])
    table = np.stack(apart)
    error = 2.5 * table.std(0) / np.sqrt(len(table))
    assert (np.abs(table.mean(0)) <= error).all()


def test_what_is_chosen_for_the_token_counts_for_more(studied: tuple[Run, Model]) -> None:
    """The neurons that raise the token most are lost more than others that write as much, in logits."""
    run, _ = studied
    changed = changes(run.table("group_ablations").collect(), "logit").filter(pl.col("score") == "increase")
    apart = (changed["own"] - changed["matched"]).to_numpy()
    assert apart.mean() + 2 * apart.std() / np.sqrt(len(apart)) < 0


def test_findings_say_what_the_table_says(studied: tuple[Run, Model]) -> None:
    """Three measures; means of the changes by score and size, with n."""
    run, _ = studied
    rows = run.table("group_ablations").collect()
    answers = {answer.id: answer for answer in findings(run)}
    assert set(answers) == {"groups-log-probability", "groups-logit", "groups-reciprocal"}
    changed = changes(rows, "log_probability")
    assert changed.height == 24 * len(SCORES) * 2
    frame = answers["groups-log-probability"].frame
    (row,) = frame.filter(pl.col("score") == "|m|", pl.col("neurons") == 10).to_dicts()
    part = changed.filter(pl.col("score") == "coefficient", pl.col("neurons") == 10)
    assert row["value"] == pytest.approx(part["own"].mean())
    assert row["null"] == pytest.approx(part["matched"].mean())
    assert "24 prefixes of" in answers["groups-logit"].says


def test_the_whole_model_is_the_models_own(studied: tuple[Run, Model]) -> None:
    """The row without a group says what the model itself says: its prediction, first."""
    run, model = studied
    rows = run.table("group_ablations").filter(pl.col("kind") == "whole").collect()
    assert rows["rank"].to_list() == [0] * rows.height and rows["strength"].max() == 0
    row = rows.row(3, named=True)
    tokens = run.contexts([row["context"]])[row["context"]].tokens[: row["position"] + 1]
    with torch.no_grad():
        logits = model.hf(torch.tensor(list(map(int, tokens)))[None]).logits[0, -1].double()
    assert row["log_probability"] == pytest.approx(float(logits.log_softmax(-1)[row["token"]]), abs=1e-5)
