"""A claim about a neuron of an expert, tested both ways: its text is what is routed to the expert, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from test_experts import _batch, _swept
from tiny import WORDS, texts, tokenizer

from mnemoscope import build, load_model
from mnemoscope.cli import main
from mnemoscope.errors import PatternError
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import HISTOGRAM_EDGES, bin_of
from mnemoscope.model.capture import LayerRows
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import LayerSignals, Nulls
from mnemoscope.neuron import twoway
from mnemoscope.neuron.claims import Claim
from mnemoscope.neuron.twoway import Curve
from mnemoscope.patterns.language import masks
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import half
from mnemoscope.trials import hypothesis
from mnemoscope.trials.counts import MIDDLE
from mnemoscope.views.claims import sentence, specificity, where_active

BUDGET, SIZE, WIDTH, EXPERT = 3000, 80, 24, 1
GIVEN = ("river", "war", "Paris", "king", "queen", "city")  # words that the router gives to one expert
PLANTED = {3: "river", 4: "war"}  # neurons of that expert, and the word that switches each on
LOUD = 5  # a neuron of that expert that is active wherever it runs


def _mixture() -> Model:
    """Four experts, of which a token goes to two; one of them gets some words only, and all of these.

    Half of the residual stream is one-hot for the word, the other half a loud random mixture of the words before it.
    """
    generator = torch.Generator().manual_seed(0)
    hf = tiny(
        "mixtral", vocab_size=SIZE, hidden_size=2 * SIZE, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=SIZE, intermediate_size=WIDTH, max_position_embeddings=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    words = tokenizer()
    number = {word: words(f" {word}")["input_ids"][0] for word in WORDS}
    one_hot = torch.eye(SIZE, 2 * SIZE)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else drawn)
        hf.model.embed_tokens.weight.copy_(one_hot)
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[:SIZE] = 0
            layer.self_attn.o_proj.weight[SIZE:] *= 8
            layer.mlp.experts.down_proj.mul_(1e-3)
        router, experts = hf.model.layers[0].mlp.gate.weight, hf.model.layers[0].mlp.experts
        router[EXPERT] = -100 * one_hot.sum(0)
        for word in GIVEN:
            router[EXPERT, number[word]] = 100
        for neuron, word in PLANTED.items():
            for row in (neuron, WIDTH + neuron):  # gate and up
                experts.gate_up_proj[EXPERT, row] = 0.5 * one_hot[number[word]]
        for row in (LOUD, WIDTH + LOUD):
            experts.gate_up_proj[EXPERT, row] = 0.5 * one_hot[[number[word] for word in GIVEN]].sum(0)
    return load_model(hf, tokenizer=words)


@pytest.fixture(scope="module")
def model() -> Model:
    return _mixture()


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(model, texts(160), tmp_path_factory.mktemp("mixture") / "run", top=24)


def _address(neuron: int) -> tuple[int, int]:
    return 0, EXPERT * WIDTH + neuron


class _Slow:
    """What every token of one expert was, in a half of the documents: a loop over the rows of a sweep."""

    def __init__(self, run: Run, model: Model, spec: str, number: int, nulls: Nulls | None = None) -> None:
        text = Text.of(run)
        shown = masks(text, [spec]).toarray()[:, 0]
        rows: list[int] = []
        values: list[np.ndarray] = []
        of_piece: list[tuple[LayerRows, np.ndarray]] = []
        for piece, place, context, position, _ in _swept(model, run):
            if (piece.layer, piece.group) != (0, number):
                continue
            if not of_piece or of_piece[-1][0] is not piece:
                signals = LayerSignals(piece.inputs, piece.coefficients, piece.gate, piece.up, piece.group)
                columns = None if nulls is None else nulls.columns(0, _batch(), signals)["random"]
                coefficients = piece.coefficients if columns is None else columns.coefficients
                of_piece.append((piece, coefficients.numpy()))
            rows.append(int(text.rows(np.array([context]), np.array([position]))[0]))
            values.append(of_piece[-1][1][place])
        self.document, self.shown = text.document[rows], shown[rows]
        self.values, self.late = np.array(values), half(text.document[rows])

    def threshold(self, unit: int, polarity: int) -> int:
        """The score where active begins, by the tokens of the discovery half; -1 if there is none."""
        early = ~self.late
        scores = bin_of(polarity * self.values[early, unit]) - MIDDLE
        size = BINS - MIDDLE
        counts = [
            np.bincount(np.maximum(scores[part], 0), minlength=size)
            for part in (self.shown[early], ~self.shown[early])
        ]
        reached = [
            len(set(self.document[early][scores >= score])) if score else len(set(self.document[early]))
            for score in range(size)
        ]
        chosen, _ = twoway.choose(Curve(*(part[None] for part in counts)), np.array([reached]))
        return -1 if chosen[0] < 0 else int(chosen[0]) + MIDDLE

    def f1(self, unit: int, polarity: int) -> float:
        """F1 in the test half at that threshold; 0 where there is none."""
        score = self.threshold(unit, polarity)
        if score < 0:
            return 0.0
        active = bin_of(polarity * self.values[self.late, unit]) >= score
        shown = self.shown[self.late]
        return 2 * (active & shown).sum() / max(active.sum() + shown.sum(), 1)


def test_a_planted_word_is_found_among_the_tokens_of_its_expert(run: Run, model: Model) -> None:
    """Its neuron means the word, its other neurons mean nothing of the kind, and what is read out names the expert."""
    for neuron, word in PLANTED.items():
        claim = hypothesis.test(run, model, _address(neuron), f"word:{word}", budget=BUDGET)
        assert (claim.verdict, claim.polarity, claim.specificity_rank) == ("iff", 1, 0)
        assert (claim.neurons, claim.among) == (WIDTH, "expert")
        assert "of this expert" in sentence(claim) and "of this layer" not in sentence(claim)
        assert "held-out tokens routed to its expert" in where_active(claim)
        assert "no neuron of the expert" in str(specificity(claim))
    other = hypothesis.test(run, model, _address(4), "word:river", budget=BUDGET)
    assert other.verdict == twoway.NONE


@pytest.mark.parametrize("neuron", [3, LOUD, 11])
def test_a_claim_is_counted_over_the_tokens_routed_to_the_expert(run: Run, model: Model, neuron: int) -> None:
    """Tokens, documents, threshold, both sides and the distribution, from a loop over all that the expert was given."""
    spec = "words:river,war,king"
    claim = hypothesis.test(run, model, _address(neuron), spec, polarity=1, budget=100_000)
    slow = _Slow(run, model, spec, EXPERT)
    late, m = slow.late, slow.values[slow.late, neuron]
    shown = slow.shown[late]
    assert 0 < claim.tokens == late.sum() < Text.of(run).counted.sum() / 4
    assert claim.documents == len(np.unique(slow.document[late]))
    assert claim.present == shown.sum() and 0 < claim.present < claim.tokens
    assert claim.threshold == pytest.approx(HISTOGRAM_EDGES[slow.threshold(neuron, 1)])
    active = m >= claim.threshold
    # Another batch gives other last bits, and a bin may begin between the two.
    assert abs(claim.active - active.sum()) <= 1 and abs(claim.both - (active & shown).sum()) <= 1
    assert claim.pearson == pytest.approx(np.corrcoef(m, shown)[0, 1], abs=1e-4)
    assert claim.baselines["constant"] == pytest.approx(2 * claim.active / (claim.active + claim.tokens))
    assert sum(band.tokens for band in claim.bands) == claim.tokens


def test_pseudo_neurons_of_the_expert_are_asked_the_same(run: Run, model: Model) -> None:
    """As many as a whole layer has, made of the expert: their F1 over its tokens is what the claim stands against."""
    claim = hypothesis.test(run, model, _address(3), "word:river", budget=100_000)
    nulls = Nulls.of(model, run.manifest.options["nulls"], at=(0, EXPERT))
    slow = _Slow(run, model, "word:river", EXPERT, nulls)
    assert {null.kind: null.units for null in claim.nulls} == {"random": 2 * WIDTH, "rotated": 2 * WIDTH}
    f1 = [slow.f1(unit, polarity) for unit in range(slow.values.shape[1]) for polarity in (1, -1)]
    of_random = next(null for null in claim.nulls if null.kind == "random")
    assert of_random.median == pytest.approx(np.quantile(f1, 0.5), abs=0.02)
    assert of_random.high == pytest.approx(np.quantile(f1, twoway.NULL_LEVEL), abs=0.02)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("words:" + ",".join(word.lower() for word in GIVEN), "all of the"),
        ("word:film", "none of the"),
    ],
)
def test_what_the_router_decides_is_no_claim_about_a_neuron(
    run: Run, model: Model, pattern: str, said: str
) -> None:
    """All tokens of the expert have it, or none: over the whole text the first would be both ways, and say nothing."""
    with pytest.raises(PatternError, match=rf"{said}.*routed to the expert of L0E1N5") as caught:
        hypothesis.test(run, model, _address(LOUD), pattern, budget=BUDGET)
    assert "\n" not in str(caught.value)


def test_a_shared_expert_has_all_of_the_text(tmp_path: Path) -> None:
    """It runs on every token, and so does what it is compared with."""
    from families import MIXTURES

    model = load_model(MIXTURES["qwen2_moe"](), tokenizer=tokenizer())
    run = build(model, texts(120), tmp_path / "run", top=8)
    experts = model.anatomy.layers[1].experts
    assert experts is not None
    first = experts.count * experts.width
    claim = hypothesis.test(run, model, (1, first + 2), "word:river", budget=100_000)
    slow = _Slow(run, model, "word:river", experts.count)
    text = Text.of(run)
    assert claim.tokens == (text.counted & half(text.document)).sum()
    assert claim.neurons == model.anatomy.groups[1][-1] and claim.among == "expert"
    assert not len(slow.values) or len(slow.values) == text.counted.sum()


def test_the_number_of_threads_does_not_show(run: Run, model: Model) -> None:
    """One thread and two count the same, to the last digit of every figure."""
    before, claims = torch.get_num_threads(), list[Claim]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            claims.append(hypothesis.test(run, model, _address(3), "word:river", budget=BUDGET))
    finally:
        torch.set_num_threads(before)
    assert claims[0] == claims[1]


def test_as_a_command(
    run: Run,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The address of a neuron of an expert is taken, and said as it is printed elsewhere."""
    folder = tmp_path / "model"
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    asked = ("test", run.path, "L0E1N3", "--pattern", "word:river", "--budget", BUDGET, "--model", folder)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, asked)])
    with pytest.raises(SystemExit) as caught:
        main()
        raise SystemExit(0)
    said = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code and "both ways" in said and "of this expert" in said, said
