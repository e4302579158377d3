"""Cases with foils: every column against fp64 by hand, how foils are dealt, and figures of planted tables."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from scipy.stats import pearsonr, spearmanr
from slow_sentence import normed
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.model.reading import describe
from mnemoscope.model.stream import trace
from mnemoscope.prediction.switching import switches
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import CASES
from mnemoscope.studies import catalogue
from mnemoscope.studies import run as study
from mnemoscope.studies.findings import case_parts
from mnemoscope.studies.findings import cases as answers
from mnemoscope.studies.measures import cases as job
from mnemoscope.studies.measures import questions
from mnemoscope.studies.measures.cases import NEURONS, WORDS, classes, deal
from mnemoscope.studies.measures.positions import Sizes
from mnemoscope.studies.measures.questions import Asked, Question
from mnemoscope.views.figures import chart

LINES = [
    {"subject": "Paris", "prompt": " the city of Paris is in", "answer": " France", "label": "place"},
    {"subject": "Berlin", "prompt": " Berlin is the city of", "answer": " London", "label": "place"},
    {"subject": "river", "prompt": " the river is to the", "answer": " north", "label": "place"},
    {"subject": "king", "prompt": " the king is with a", "answer": " queen", "label": "person"},
    {"subject": "team", "prompt": " a player of the team in a", "answer": " season", "label": "person"},
    {"subject": "film", "prompt": " the film of the", "answer": " year", "label": "alone"},
]


@cache
def _model(name: str) -> Model:
    return mn.load_model(FAMILIES[name](), tokenizer=tokenizer())


def _measured(folder: Path, lines: list[dict[str, str]], name: str) -> Run:
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run = mn.build(_model(name), texts(12), folder / "run", top=3, nulls=())
    sizes = Sizes(questions=(folder / "mine.jsonl",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "built_in", lambda: [])  # its words are not in this vocabulary
        return study.measure(run, _model(name), chosen=catalogue.choose("cases"), sizes=sizes)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2", "gptj")]


@pytest.fixture(scope="module", params=["llama", *_SLOW])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run of a tiny model with five questions that have foils and one that has not."""
    return _measured(tmp_path_factory.mktemp("cases"), LINES, request.param), request.param


class Slow:
    """The end of a prompt in fp64, read by the frozen lens with all biases."""

    def __init__(self, name: str, prompt: str) -> None:
        self.hf = copy.deepcopy(_model(name).hf).double()
        self.parts = describe(self.hf)
        tokens = torch.tensor([tokenizer()(prompt)["input_ids"]])
        self.tokens, self.at = tokens, tokens.shape[1] - 1
        self.stream = trace(self.hf, self.parts, tokens)
        self.points = self.stream.points(self.at).numpy()
        self.rows = self.parts.unembedding().double().detach().numpy()

    def read(self, vectors: np.ndarray, *, bias: bool = False) -> np.ndarray:
        norm = self.parts.final_norm
        x = vectors if norm is None else normed(norm, vectors, self.points[-1], bias=bias)
        scores = x @ self.rows.T
        if bias and self.parts.unembedding_bias is not None:
            scores = scores + self.parts.unembedding_bias.double().detach().numpy()
        return scores * self.parts.logit_multiplier

    def logits(self) -> torch.Tensor:
        """The model's own, at the last token."""
        with torch.no_grad():
            return self.hf(self.tokens).logits[0, -1]

    def cap(self, scores: np.ndarray) -> np.ndarray:
        cap = self.parts.softcap
        return scores if cap is None else cap * np.tanh(scores / cap)

    def moved(self, vectors: np.ndarray, point: int, tokens: list[int]) -> np.ndarray:
        """How much the (capped) logit of the first token rises more than that of the second."""
        before = self.read(self.points[point], bias=True)[tokens]
        found = self.cap(before + self.read(vectors)[..., tokens]) - self.cap(before)
        return found[..., 0] - found[..., 1]


def _cases(run: Run, name: str) -> list[tuple[dict[str, object], Slow, list[int]]]:
    rows = run.table("case_questions").collect().to_dicts()
    return [
        (row, Slow(name, row["prompt"]), [row["token"], row["near_token"], row["far_token"]]) for row in rows
    ]


def _of(run: Run, table: str, row: dict[str, object]) -> pl.DataFrame:
    return run.table(table).filter(pl.col("question") == row["question"]).collect()


def test_every_question_with_foils_is_there(case: tuple[Run, str]) -> None:
    """The one whose label has no second answer is left out; words are those of the questions; no part is missing."""
    run, name = case
    rows = run.table("case_questions").collect()
    assert sorted(rows["prompt"].to_list()) == sorted(line["prompt"] for line in LINES[:-1])
    assert rows["question"].to_list() == list(range(5))
    for row, slow, words in _cases(run, name):
        texts = [row[word] for word in WORDS]
        assert [tokenizer()(text)["input_ids"] for text in texts] == [[word] for word in words]
        logits = slow.logits()
        assert row["rank"] == int((logits > logits[words[0]]).sum())
    for table in CASES:
        assert run.table(table).select("question").unique().collect().height == 5


def test_the_stream_is_read_in_fp64(case: tuple[Run, str]) -> None:
    """Logits of the words at every point, here and at the partner's prompt; the end is the model's own (A50)."""
    run, name = case
    for row, slow, words in _cases(run, name):
        rows, partner = _of(run, "case_stream", row), Slow(name, str(row["partner"]))
        assert row["partner"] != row["prompt"]
        for word, token in zip(WORDS, words, strict=True):
            mine = rows.filter(pl.col("word") == word).sort("point")
            for column, one in (("logit", slow), ("null", partner)):
                expected = one.read(one.points, bias=True)[:, token]
                assert mine[column].to_numpy() == pytest.approx(expected, abs=1e-3, rel=1e-4)
                final = float(one.logits()[token])
                assert one.cap(mine[column].to_numpy()[-1]) == pytest.approx(final, abs=1e-3, rel=1e-4)


def test_sources_are_sums_over_heads_and_layers(case: tuple[Run, str]) -> None:
    """What attention brings from each token to answer minus near foil (A52), and which tokens are the subject's."""
    run, name = case
    for row, slow, words in _cases(run, name):
        rows = _of(run, "case_sources", row)
        expected = np.zeros(slow.at + 1)
        for layer in range(slow.parts.n_layers):
            parts = slow.stream.attention_parts(layer, slow.at).numpy()  # head, source
            expected += slow.moved(parts, 2 * layer, words[:2]).sum(0)
        assert rows["increase"].to_numpy() == pytest.approx(expected, abs=2e-3, rel=1e-3)
        subject = rows.filter(pl.col("class") == "subject")["source_token"].to_list()
        assert [text.strip() for text in subject] == [row["subject"]]
        assert rows["class"].to_list()[-1] == "last"


def test_classes_of_tokens() -> None:
    """Before, in and after the subject, and the last; a prompt without its subject has none."""
    pieces = ["<s>", " The", " city", " of", " Mar", "seille", " is", " in"]
    assert classes(pieces, "Marseille") == [*["before"] * 4, "subject", "subject", "after", "last"]
    assert classes([" in", " Paris"], "Paris") == ["before", "subject"]
    assert classes(pieces, "") == classes(pieces, "Lyon") == [None] * 8


@pytest.mark.slow
def test_origins_are_those_of_the_explanation(case: tuple[Run, str]) -> None:
    """The sub-value with the largest logit of answer minus near foil, and every vector of its source (A53, A54)."""
    run, name = case
    for row, slow, words in _cases(run, name):
        rows = _of(run, "case_origins", row)
        scores = []
        for layer in range(slow.parts.n_layers):
            found = slow.read(slow.stream.attention_parts(layer, slow.at).sum(0).numpy())
            scores.append(found[:, words[0]] - found[:, words[1]])
        layer, source = np.unravel_index(np.argmax(scores), np.shape(scores))
        assert rows.select("layer", "source").unique().rows() == [(layer, source)]
        assert rows["vector"].to_list() == list(range(2 * int(layer) + 1))
        seen = mn.explain(_model(name), str(row["prompt"]), str(row["answer"]), [str(row["near"])], top=1)
        for method in ("recomputed", "fixed"):
            expected = seen.attention_queries[method].to_numpy()
            assert rows[method].to_numpy() == pytest.approx(expected, abs=1e-5, rel=1e-4)


def _written(slow: Slow, layer: int) -> np.ndarray:
    return slow.stream.neuron_parts(layer, slow.at).numpy()


def test_neurons_are_the_best_of_all(case: tuple[Run, str]) -> None:
    """The ten that raise answer minus near foil most, found by brute force, with ranks (A55, A56); and the ten that
    raise the answer of another question most over the same foil, chosen in the same way."""
    run, name = case
    for row, slow, words in _cases(run, name):
        rows = _of(run, "case_neurons", row)
        answers_of = run.table("case_questions").filter(pl.col("prompt") == row["partner"]).collect()
        answer = answers_of["token"][0] if answers_of.height else None
        other = [words[2] if answer in (None, words[1]) else answer, words[1]]
        pairs = {False: words[:2], True: other}
        moved = {
            side: [slow.moved(_written(slow, at), 2 * at + 1, pair) for at in range(slow.parts.n_layers)]
            for side, pair in pairs.items()
        }
        norm = slow.parts.final_norm
        for side in pairs if answer is not None else (False,):
            chosen = rows.filter(pl.col("drawn") == side)
            best = np.sort(np.concatenate(moved[side]))[::-1][:NEURONS]
            assert chosen["difference"].to_numpy() == pytest.approx(best, abs=1e-4, rel=1e-3)
            assert chosen["rank"].to_list() == list(range(NEURONS))
            places = list(chosen.select("layer", "neuron").iter_rows())
            assert len(set(places)) == len(places)
        for one in rows.iter_rows(named=True):
            layer, neuron, every = one["layer"], one["neuron"], moved[one["drawn"]]
            if one["drawn"] and answer is None:
                continue  # the partner is no question of the table
            words = pairs[one["drawn"]]
            assert one["difference"] == pytest.approx(every[layer][neuron], abs=1e-4, rel=1e-3)
            coefficient = float(slow.stream.layers[layer].coefficients[slow.at, neuron])
            assert one["coefficient"] == pytest.approx(coefficient, abs=1e-5, rel=1e-4)
            vector = _written(slow, layer)[neuron]
            scores = (vector if norm is None else normed(norm, vector, vector, bias=True)) @ slow.rows.T
            if slow.parts.unembedding_bias is not None:  # the own lens has all biases in every reading
                scores = scores + slow.parts.unembedding_bias.double().detach().numpy()
            for word, token in zip(("answer", "near"), words, strict=False):
                assert one[f"{word}_rank"] == (scores > scores[token] + 1e-9).sum()
                assert one[f"{word}_last_rank"] == (scores < scores[token] - 1e-9).sum()
            assert len(one["promotes"]) == len(one["suppresses"]) == 6


def _everything(slow: Slow, layer: int) -> list[np.ndarray]:
    """Whatever is below the feed-forward part of a layer at the last token: embedding, heads x sources, neurons."""
    below = [slow.points[:1]]
    for at in range(layer + (not slow.parts.parallel)):
        below.append(slow.stream.attention_parts(at, slow.at).flatten(0, 1).numpy())
        below.append(slow.stream.attention_bias(at, slow.at)[None].numpy())
        if at < layer:
            below += [_written(slow, at), slow.stream.ffn_bias(at, slow.at)[None].numpy()]
    return below


def test_chains_and_queries_by_their_recursion(case: tuple[Run, str]) -> None:
    """What a neuron does through those above it, recursively (A63), and the largest share of its coefficient (A57)."""
    run, name = case
    row, slow, _ = _cases(run, name)[0]
    rows, stream = _of(run, "case_neurons", row).filter(~pl.col("drawn")), slow.stream
    near = mn.explain(
        _model(name), str(row["prompt"]), str(row["answer"]), [str(row["near"])], top=job.TOP
    ).contrasts[0]
    shown = list(
        near.neurons.sort("layer", descending=True).select("layer", "neuron", "increase").iter_rows()
    )
    asked = {
        (layer, neuron): switches(stream, layer, slow.at, torch.tensor([neuron]))
        for layer, neuron in {(at, n) for at, n, _ in shown} | set(rows.select("layer", "neuron").iter_rows())
    }
    total: dict[tuple[int, int], float] = {}

    def through(layer: int, vector: np.ndarray) -> float:
        """What a vector written by a layer earns by switching on the shown neurons above it."""
        earned = 0.0
        for above, neuron, _ in shown:
            if above > layer:
                found = asked[above, neuron]
                share = float(found.share.of(torch.from_numpy(vector)[None]))
                earned += share / float(found.coefficient[0]) * total[above, neuron]
        return earned

    for layer, neuron, own in shown:
        total[layer, neuron] = own + through(layer, _written(slow, layer)[neuron])
    for one in rows.iter_rows(named=True):
        layer, neuron = one["layer"], one["neuron"]
        expected = through(layer, _written(slow, layer)[neuron])
        assert one["chain"] == pytest.approx(expected, abs=2e-3, rel=2e-2)
        found = asked[layer, neuron]
        vectors = torch.from_numpy(np.concatenate(_everything(slow, layer)))
        shares = found.share.of(vectors)[:, 0] / found.coefficient[0]
        largest = shares[shares.abs().argmax()]
        assert one["query_share"] == pytest.approx(float(largest), abs=1e-4, rel=1e-3)
        assert one["query_kind"] in case_parts.VECTORS


def test_ablations_are_forward_passes_without_them(case: tuple[Run, str]) -> None:
    """With a neuron's coefficient set to zero by a hook of its own, log p of the answer falls by the effect (A79)."""
    run, name = case
    row, slow, words = _cases(run, name)[0]
    rows = _of(run, "case_ablations", row)
    assert rows.group_by("kind").len().filter(pl.col("len") > job.ABLATED).height == 0

    def log_p() -> float:
        return float(slow.logits().log_softmax(-1)[words[0]])

    whole = log_p()
    for one in rows.filter(pl.col("kind") == "neuron").head(4).iter_rows(named=True):

        def cut(
            _: object, inputs: tuple[torch.Tensor, ...], unit: int = one["unit"]
        ) -> tuple[torch.Tensor, ...]:
            given = inputs[0].clone()
            given.view(-1, given.shape[-1])[-1, unit] = 0.0
            return (given, *inputs[1:])

        handle = slow.parts.layers[one["layer"]].down.register_forward_pre_hook(cut)
        assert one["effect"] == pytest.approx(whole - log_p(), abs=2e-4, rel=1e-3)
        handle.remove()


# -- dealing -----------------------------------------------------------------------------------------------------


def _asked(label: str, token: int) -> Asked:
    question = Question("set", f"s{token}", f"p{token}", f" a{token}", label)
    return Asked(question, (1, 2), token, False, 1, torch.zeros(1, 1))


def test_foils_are_near_and_far() -> None:
    """Of the same label and of another, with three different tokens; the partner's answer is none of them."""
    asked = [_asked(label, 10 * place + n) for place, label in enumerate("abc") for n in range(4)]
    seen = set()
    for seed in range(20):
        dealt = list(deal(asked, seed))
        assert len(dealt) == len(asked)
        for one in dealt:
            assert len(set(one.words)) == 3 and one.partner.token not in one.words
            assert one.near.question.label == one.asked.question.label != one.far.question.label
            seen.add((one.asked.token, one.near.token))
        assert [one.words for one in deal(asked, seed)] == [one.words for one in dealt]
    assert len(seen) == 12 * 3  # every near foil comes up


def test_equal_tokens_are_no_foils() -> None:
    """Two questions with one answer are no foils of each other; without a second label there is none."""
    assert list(deal([_asked("a", 1), _asked("a", 1), _asked("b", 2)], 0)) == []
    assert list(deal([_asked("a", 1), _asked("a", 2)], 0)) == []
    dealt = list(deal([_asked("a", 1), _asked("a", 2), _asked("b", 3), _asked("b", 3)], 0))
    assert {one.words for one in dealt} == {(1, 2, 3), (2, 1, 3)}


def test_questions_without_foils_are_said(tmp_path: Path) -> None:
    """Nothing is measured where no question has two foils."""
    with pytest.raises(QueryError, match="none has foils"):
        _measured(tmp_path, LINES[:2], "llama")


# -- figures -----------------------------------------------------------------------------------------------------


def test_findings_say_what_the_tables_hold(case: tuple[Run, str]) -> None:
    """Means over questions with their nulls; each finding can be drawn; the same tables give the same sentences."""
    run, _ = case
    found = {one.id: one for one in answers.findings(run)}
    assert {item for one in found.values() for item in one.items} == {
        *(f"A{n}" for n in range(50, 58)),
        "A79",
    }
    assert all(name.endswith("-mine") for name in found)
    rows = run.table("case_stream").collect()
    along = found["case-along-mine"].frame
    for row in along.iter_rows(named=True):
        here = rows.filter(pl.col("point") == 2 * row["depth"])
        words = {word: here.filter(pl.col("word") == word).sort("question") for word in WORDS}
        foil = words[row["foil"].split()[0]]
        for column, name in (("logit", "value"), ("null", "null")):
            assert row[name] == pytest.approx(
                float((words["answer"][column] - foil[column]).mean()), abs=1e-4
            )
        assert (
            row["n"] < 20 and row["low"] is None and row["high"] is None
        )  # a handful of questions has no interval
    layers = found["case-layers-mine"].frame.filter(pl.col("foil") == "near foil")
    near = along.filter(pl.col("foil") == "near foil")["value"]
    assert layers["value"].sum() == pytest.approx(near[-1] - near[0], abs=1e-3)
    classes = found["case-sources-mine"].frame
    assert classes["value"].sum() == pytest.approx(1) and classes["null"].sum() == pytest.approx(1)
    for one in found.values():
        assert (chart(one) is None) == (one.figure is None)
    assert [one.says for one in answers.findings(run)] == [one.says for one in found.values()]


def test_ways_by_their_definition() -> None:
    """First, last, through others; none of these is the fourth (A56)."""
    rows = pl.DataFrame(
        {
            "answer_rank": [99, 100, 500, 500],
            "near_last_rank": [99, 100, 99, 500],
            "chain": [-3.0, -1.0, 0.5, 2.0],
            "difference": [2.0, 1.0, 1.0, 1.0],
        }
    )
    assert case_parts.ways(rows).tolist() == [
        [True, True, True, False],
        [False, False, False, True],
        [False, True, False, False],
        [False, False, True, False],
    ]


def test_agreement_by_definition() -> None:
    """Pearson, Spearman and equal signs as scipy and counting give them; zeros have no sign."""
    one, other = np.random.default_rng(0).normal(size=(2, 30))
    other += one
    one[3] = 0
    found = case_parts.agreement(one, other)
    known = one != 0
    expected = [
        pearsonr(one, other).statistic, spearmanr(one, other).statistic,
        np.mean(np.sign(one[known]) == np.sign(other[known])),
    ]  # fmt: skip
    assert found == pytest.approx(expected)


def test_dealt_effects_agree_with_nothing() -> None:
    """Accounts that are the effects agree wholly; dealt out anew they correlate with 0 on average."""
    generator = np.random.default_rng(1)
    effect = generator.normal(size=200)
    rows = pl.DataFrame(
        {"question": np.repeat(np.arange(4), 50), "leave_one_out": 2 * effect, "effect": effect}
    )
    own, null = case_parts.agreements(rows, "leave_one_out")
    assert own == pytest.approx(np.ones((4, 3)))
    assert null.shape == (case_parts.DEALS, 4, 3)
    assert np.abs(null.mean(axis=(0, 1)) - [0, 0, 0.5]).max() < 0.03
    assert 0.1 < null[:, :, 0].std() < 0.18  # 1 / sqrt(49)


def test_signs_by_depth() -> None:
    """Equal signs are counted in quarters of the depth, beside what the shares of positive ones give."""
    rows = pl.DataFrame(
        {
            "question": 0, "kind": "neuron", "layer": pl.Series([0, 1, 6, 7, 7], dtype=pl.Int16),
            "leave_one_out": [1.0, -1.0, 1.0, 1.0, 0.0], "effect": [1.0, 1.0, -1.0, 2.0, 1.0],
        }
    )  # fmt: skip
    found = case_parts.signs(rows, 8)
    assert found["same"].to_list() == [1, 0, 0, 1]
    assert found["quarter"].to_list() == [0, 0, 3, 3]
    assert found["null"].to_list() == [0.75 * 0.75 + 0.25 * 0.25] * 4
