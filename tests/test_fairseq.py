"""Checkpoints of fairseq's, the papers' own kind of model: read as data, and equal to what fairseq computed."""

from __future__ import annotations

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from mnemoscope.errors import ModelError, ModelNotSupported, QueryError
from mnemoscope.mine.build import build
from mnemoscope.mine.verify import verify
from mnemoscope.model import fairseq
from mnemoscope.model.adaptive import Bands
from mnemoscope.model.capture import Capture, residuals
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.lens import Lens
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.neuron.card import card
from mnemoscope.prediction.bases import ResidualBases, norms
from mnemoscope.prediction.explain import explain
from mnemoscope.prediction.search import IntervalSurvey, Parts, TopK, certified, exhaustive, search
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import ContextBatch, NeuronId
from mnemoscope.text.dictionary import dictionary_tokenizer
from mnemoscope.text.spelling import vocabulary_of
from mnemoscope.text.tokenizer import frame, special_ids

FOLDER = Path(__file__).parent / "fairseq"
VARIANTS = ("tied", "untied_proj")
EXACT = 1e-5
LINES = [
    "w000 w066 w196 <unk> w283 w147 w287 w179 w088",
    "w000 w066 w196 <unk> w117",
    "w000 w066 w196 <unk> w183 w018 w096 w040 w095 w051 w208 w068",
]


@cache
def loaded(variant: str) -> Model:
    """A fixture, in fp32."""
    return load_model(FOLDER / variant, dtype="fp32", device="cpu")


@cache
def golden(variant: str) -> dict[str, np.ndarray]:
    """What fairseq computed for `LINES`, one row each, padded on the right."""
    with np.load(FOLDER / variant / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of a fixture."""
    return str(request.param)


def _off(variant: str, name: str, built: Tensor) -> float:
    """The largest difference from fairseq's where there is no padding; axes are lines, tokens, ..."""
    seen = golden(variant)["src_tokens"] != fairseq.PADDING
    return float(np.abs(built.detach().numpy() - golden(variant)[name])[seen].max())


def test_words_are_those_of_the_dictionary(variant: str) -> None:
    """A line begins with the end of the line before it; what the dictionary lacks is unknown."""
    rows = golden(variant)["src_tokens"]
    model = loaded(variant)
    assert [model.tokenizer(line)["input_ids"] for line in LINES] == [
        row[row != fairseq.PADDING].tolist() for row in rows
    ]
    assert model.tokenizer("w000\nw001 elsewhere")["input_ids"] == [2, 4, 2, 5, 3]
    assert frame(model.tokenizer) == ((2,), ())
    assert special_ids(model.tokenizer) == [0, 1, 2, 3]


def test_residuals_equal_those_of_fairseq(variant: str) -> None:
    """After attention and after the feed-forward layer, in every layer."""
    stream = residuals(loaded(variant), torch.from_numpy(golden(variant)["src_tokens"]))
    for layer in range(4):
        assert _off(variant, f"resid_mid.{layer}", stream["Lres"][layer]) <= EXACT
        assert _off(variant, f"resid_out.{layer}", stream["Lout"][layer]) <= EXACT


def test_coefficients_equal_those_of_fairseq(variant: str) -> None:
    """What mining hands out is what fairseq's second projection reads."""
    model, tokens = loaded(variant), golden(variant)["src_tokens"].astype(np.int32)
    lengths = (tokens != fairseq.PADDING).sum(1).astype(np.int32)
    batch = ContextBatch(np.arange(len(tokens)), tokens, lengths, np.ones(tokens.shape, bool))
    kept: dict[int, Tensor] = {}
    with Capture(model) as capture:
        capture.sweep(batch, lambda layer, coefficients, *_: kept.update({layer: coefficients.clone()}))
    assert sorted(kept) == [0, 1, 2, 3]
    assert max(_off(variant, f"ffn_hidden.{layer}", kept[layer]) for layer in kept) <= EXACT


def test_log_probabilities_equal_those_of_fairseq(variant: str) -> None:
    """Of the model itself, of its final residual read by every lens, of values, and of nothing."""
    model, arrays = loaded(variant), golden(variant)
    tokens = torch.from_numpy(arrays["src_tokens"])
    with torch.no_grad():
        assert _off(variant, "logprobs", model.hf(input_ids=tokens).logits) <= EXACT
    stream = residuals(model, tokens)
    for name in ("raw", "own", "frozen"):
        lens = Lens.of(model.anatomy, name)
        scale = lens.scale(stream["Lout"][3])
        assert _off(variant, "logprobs", lens.logits(stream["Lout"][3], scale)) <= EXACT
        assert (
            _off(variant, "logprob_resid_out.2", lens.cap(lens.raw_logits(stream["Lout"][2], scale))) <= EXACT
        )
        for layer in (0, 3):
            values = lens.logits(model.anatomy.layers[layer].values())
            assert float(np.abs(values.detach().numpy() - arrays[f"value_logprob.{layer}"]).max()) <= EXACT
    nothing = Lens.of(model.anatomy, "raw").logits(torch.zeros(32))
    assert float(np.abs(nothing.numpy() - arrays["zero_vector_logprob"]).max()) <= EXACT


def test_scores_of_a_line_equal_those_of_fairseq(variant: str) -> None:
    """The log-probability of each next word."""
    model = loaded(variant)
    for index, line in enumerate(LINES):
        tokens = torch.tensor(model.tokenizer(line)["input_ids"])
        with torch.no_grad():
            logits = model.hf(input_ids=tokens[None]).logits[0]
        scores = logits[:-1].gather(1, tokens[1:, None])[:, 0]
        assert np.abs(scores.numpy() - golden(variant)[f"positional_scores.{index}"]).max() <= EXACT


def test_what_is_shared_is_shared(variant: str) -> None:
    """Tied weights are one: as many numbers as fairseq counts."""
    numbers = sum(parameter.numel() for parameter in loaded(variant).hf.parameters())
    assert numbers == {"tied": 34_528, "untied_proj": 34_848}[variant]


def test_embeddings_are_multiplied_out(variant: str) -> None:
    """The matrix of all embeddings is what looking each up gives."""
    model, wanted = loaded(variant), golden(variant)["embed_tokens_all"]
    with torch.no_grad():
        looked_up = model.anatomy.embedding(torch.arange(304)).numpy()
        assert np.abs(model.hf.get_input_embeddings().weight.numpy() - wanted).max() <= EXACT
    assert np.abs(looked_up - wanted).max() <= EXACT


# -- The adaptive softmax ------------------------------------------------------------------------------------


def test_bands_equal_the_definition() -> None:
    """log p(w) = log p(class) + log p(w | class), by a loop over tokens; and probabilities add up to 1."""
    bands = Bands((3, 5, 9))
    scores = torch.randn(4, bands.rows, generator=torch.Generator().manual_seed(0)).double() * 3
    logs = bands.log_probabilities(scores)
    for token in range(9):
        first = torch.cat([scores[:, :3], scores[:, 9:]], 1).softmax(1)
        if token < 3:
            wanted = first[:, token]
        elif token < 5:
            wanted = first[:, 3] * scores[:, 3:5].softmax(1)[:, token - 3]
        else:
            wanted = first[:, 4] * scores[:, 5:9].softmax(1)[:, token - 5]
        assert torch.allclose(logs[:, token].exp(), wanted, atol=1e-12)
        added = sum(
            scores[:, bands.softmax(number)].log_softmax(1)[:, row] for number, row in bands.softmaxes(token)
        )
        assert torch.allclose(logs[:, token], added, atol=1e-12)
    assert torch.allclose(logs.exp().sum(1), torch.ones(4, dtype=torch.float64))


def test_the_flat_projection_is_additive_and_the_adaptive_one_is_not(variant: str) -> None:
    """B.4: ranks are a value's own under flat, and depend on its coefficient under adaptive."""
    anatomy = loaded(variant).anatomy
    values = anatomy.layers[1].values()
    flat, adaptive = (Lens.of(anatomy, "raw", name) for name in ("flat", "adaptive"))
    assert flat.additive and not adaptive.additive
    assert flat.logits(values).shape == adaptive.logits(values).shape == (48, 304)
    sums = flat.logits(values[:1] + values[1:2]) - flat.logits(values[:1]) - flat.logits(values[1:2])
    assert float(sums.abs().max()) <= EXACT
    assert torch.equal(flat.logits(values).argsort(1), flat.logits(values * 8).argsort(1))
    assert not torch.equal(adaptive.logits(values).argsort(1), adaptive.logits(values * 8).argsort(1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda hf: hf.decoder.layers[1].fc2.bias,
        lambda hf: hf.decoder.layers[2].final_layer_norm.weight,
        lambda hf: hf.adaptive_softmax.head.class_proj.weight,
        lambda hf: hf.adaptive_softmax.tail[1][0].weight,
    ],
    ids=["bias", "norm", "classes", "tail"],
)
def test_a_part_that_is_not_what_the_model_computes_is_seen(damage: Callable[[Any], Tensor]) -> None:
    """An anatomy read before a weight changed does not pass the check of the model as it is now."""
    model = load_model(FOLDER / "untied_proj", dtype="fp32", device="cpu")
    assert self_check(model.hf, model.anatomy) <= 1e-6
    weight = damage(model.hf)

    def moved(by: float) -> Callable[..., None]:
        def move(*_: Any) -> None:
            weight.data.add_(by)

        return move

    hook = model.hf.register_forward_pre_hook(moved(0.5))
    after = model.hf.register_forward_hook(moved(-0.5))
    with pytest.raises(ModelNotSupported):
        self_check(model.hf, model.anatomy)
    hook.remove()
    after.remove()


# -- What is accepted, and what is refused -------------------------------------------------------------------


def _copied(path: Path, change: Callable[[dict[str, Any]], Any] = lambda state: state) -> Path:
    """A fixture in a folder of its own, with its checkpoint changed."""
    shutil.copytree(FOLDER / "untied_proj", path, dirs_exist_ok=True)
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(path / "model.pt", weights_only=True)
    torch.save(change(state) or state, path / "model.pt")
    return path


class _Hostile:
    """What a pickle would run on being opened."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", ["mkdir", "eval"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(
    tmp_path: Path, function: str, legacy: bool
) -> None:
    """One line says what it holds; the folder that it would make is not there."""
    folder, made = _copied(tmp_path / "model"), tmp_path / "made"
    evaluated = f"__import__('os').mkdir({str(made)!r})"
    call = _Hostile(os.mkdir, str(made)) if function == "mkdir" else _Hostile(eval, evaluated)
    state = {"args": Namespace(), "model": {}, "extra_state": call}
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="was not run; give a checkpoint") as caught:
        load_model(folder)
    assert not made.exists() and "\n" not in str(caught.value)
    assert legacy or function in str(caught.value)
    torch.load(folder / "model.pt", weights_only=False)  # the trap is a live one
    assert made.exists()


def test_objects_of_fairseqs_own_are_data_without_content(tmp_path: Path) -> None:
    """Meters of the training are passed over; the weights are as they were."""
    import sys
    from types import ModuleType

    module, meter = ModuleType("fairseq.meters"), type("AverageMeter", (), {})
    meter.__module__ = "fairseq.meters"
    module.AverageMeter = meter  # type: ignore[attr-defined]
    sys.modules |= {"fairseq": ModuleType("fairseq"), "fairseq.meters": module}
    try:
        held = meter()
        held.sum = 3.0  # type: ignore[attr-defined]
        folder = _copied(tmp_path / "model", lambda state: state | {"extra_state": {"train_loss": held}})
    finally:
        del sys.modules["fairseq.meters"], sys.modules["fairseq"]
    assert load_model(folder, dtype="fp32").weights_sha256 == loaded("untied_proj").weights_sha256


def test_older_and_newer_layouts_are_the_same_model(tmp_path: Path) -> None:
    """Keys, queries and values in one matrix (2018); arguments in a configuration (since 2020); no zip archive."""

    def older(state: dict[str, Any]) -> dict[str, Any]:
        weights = state["model"]
        for layer in range(4):
            for kind in ("weight", "bias"):
                name = f"decoder.layers.{layer}.self_attn"
                thirds = [weights.pop(f"{name}.{letter}_proj.{kind}") for letter in "qkv"]
                weights[f"{name}.in_proj_{kind}"] = torch.cat(thirds)
        return state

    def newer(state: dict[str, Any]) -> dict[str, Any]:
        return {"args": None, "cfg": {"model": vars(state["args"])}, "model": state["model"]}

    for name, change in (("older", older), ("newer", newer)):
        model = load_model(_copied(tmp_path / name, change), dtype="fp32")
        assert model.weights_sha256 == loaded("untied_proj").weights_sha256
    state = torch.load(tmp_path / "newer" / "model.pt", weights_only=True)
    torch.save(state, tmp_path / "newer" / "model.pt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "newer", dtype="fp32").weights_sha256 == loaded("untied_proj").weights_sha256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layernorm_embedding": True}, "lack 2 tensors|normalises embeddings and positions together"),
        ({"scale_heads": True}, "NormFormer"),
        ({"character_embeddings": True}, "character network"),
        ({"arch": "fconv_lm"}, "its architecture is fconv_lm"),
        ({"activation_fn": "relu_cubed"}, "its activation is relu_cubed"),
        ({"decoder_output_dim": 16}, "decoder_output_dim is not its width"),
    ],
)
def test_another_architecture_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    def change(state: dict[str, Any]) -> None:
        vars(state["args"]).update(changes)

    with pytest.raises(ModelError, match=reason) as caught:
        load_model(_copied(tmp_path / "model", change), dtype="fp32")
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_refused_in_a_line(tmp_path: Path) -> None:
    """Half a file, no weights, a part that is missing, a part that is too many, and no dictionary."""
    folder = _copied(tmp_path / "half")
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:5000])
    cases: list[tuple[Path, str]] = [(folder, "cannot be read|is no data alone")]
    cases.append(
        (_copied(tmp_path / "empty", lambda _: {"args": Namespace()}), "holds no weights under 'model'")
    )
    cases.append((_copied(tmp_path / "silent", lambda state: {"model": state["model"]}), "does not say how"))

    def lacking(state: dict[str, Any]) -> None:
        del state["model"]["decoder.layers.2.fc2.bias"]

    def beyond(state: dict[str, Any]) -> None:
        state["model"]["decoder.layers.2.gate.weight"] = torch.zeros(3, 3)

    cases.append((_copied(tmp_path / "lacking", lacking), "lack 1 tensors"))
    cases.append((_copied(tmp_path / "beyond", beyond), "nothing reads 1 tensors"))
    wordless = _copied(tmp_path / "wordless")
    (wordless / "dict.txt").unlink()
    cases.append((wordless, "dict.txt cannot be read"))
    for case, reason in cases:
        with pytest.raises(ModelError, match=reason) as caught:
            load_model(case, dtype="fp32")
        assert "\n" not in str(caught.value), caught.value


def test_a_dictionary_gives_ids_by_its_order(tmp_path: Path) -> None:
    """Counts may be 0 and words may be numbers; a second entry, or a line without a count, is refused."""
    file = tmp_path / "dict.txt"
    file.write_text("the 9\n10 7\n#$% 0\n", encoding="utf-8")
    assert dictionary_tokenizer(file)("the 10\n#$%")["input_ids"] == [2, 4, 5, 2, 6]
    for text, reason in (("the 9\nthe 3\n", "a second time"), ("the\n", "line 1 of dict.txt")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=reason):
            dictionary_tokenizer(file)
    file.write_text("the 9\n<unk> 3 #fairseq:overwrite\n", encoding="utf-8")
    assert dictionary_tokenizer(file)("<unk>")["input_ids"] == [2, 5]


def test_a_plain_softmax_and_learned_positions_close() -> None:
    """The same modules without bands, tied or not, with a norm at the end."""
    for tied in (False, True):
        config = fairseq.FairseqConfig(
            vocab_size=40, num_hidden_layers=2, num_attention_heads=4, positions="learned", final_norm=True,
            embed_scale=3.0, tied_words=tied, activation_function="gelu", attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        hf = fairseq.FairseqLM(config).eval()
        hf.tie()
        for parameter in hf.parameters():
            parameter.data.normal_(0, 0.3)
        anatomy, error = examine(hf)
        assert error <= 1e-6 and anatomy.bands is None and anatomy.final_norm is not None
        assert pickle.loads(pickle.dumps(hf)).config.positions == "learned"


# -- A prediction taken apart --------------------------------------------------------------------------------

PROMPT = LINES[0]
TARGETS = (" w012", " w070", " w250")  # of each band


@pytest.mark.parametrize("target", TARGETS)
def test_an_explanation_adds_up_under_the_adaptive_softmax(variant: str, target: str) -> None:
    """All heads, neurons and biases together, in nats, and against a foil of another band; end and start are known."""
    model = loaded(variant)
    explanation = explain(model, PROMPT, target, " w020", top=10_000)
    stream = model.traced(torch.tensor([model.tokenizer(PROMPT)["input_ids"]]))
    own = stream.logits[-1]
    token = explanation.target.token
    assert abs(explanation.log_probability - float(own[token])) <= EXACT
    assert abs(explanation.start - float(golden(variant)["zero_vector_logprob"][token])) <= EXACT
    lines = explanation.layers["increase"].sum() + explanation.stream["log_probability"][0]
    assert abs(lines - explanation.log_probability) <= 1e-9
    account = explanation.account
    assert abs(account["nats"][:-1].sum() - account["nats"][-1]) <= 1e-9
    final, row = stream.final[-1].double(), Lens.of(model.anatomy, "raw", "flat").unembedding[token].double()
    logits = explanation.layers["logit"].sum() + explanation.others["logit"][0]
    assert abs(logits - float(final @ row)) <= 1e-4
    parts = [getattr(explanation, name)["logit"].sum() for name in ("heads", "neurons", "others")]
    assert abs(sum(parts) - float(final @ row)) <= 1e-4
    assert abs(explanation.contrasts[0].total - float(own[token] - own[24])) <= EXACT


@pytest.mark.parametrize("target", [5, 400, 4000])
def test_the_search_finds_what_a_sort_of_all_finds(target: int) -> None:
    """Bounds under several softmaxes add up, hold, and leave the same extremes; a survey's intervals hold, too."""
    bands = Bands((300, 1000, 11_000))
    generator = torch.Generator().manual_seed(target)
    table = torch.randn(bands.rows, 16, generator=generator)
    lens = Lens("raw", None, table, None, 1.0, None, bands)
    bases = ResidualBases(lens, target, torch.randn(3, 16, generator=generator), None)
    vectors = [0.2 * torch.randn(500, 16, generator=generator) for _ in range(2)]
    groups = [
        Parts(500, number, lambda index, own=own: own if index is None else own[index])  # type: ignore[misc]
        for number, own in enumerate(vectors)
    ]
    every = torch.cat([exhaustive(bases, group, final=2) for group in groups])
    for count, screen in ((0, False), (96, False), (384, False), (4096, False), (96, True)):
        low, high = certified(bases, groups, count, final=2, screen=screen).unbind(-1)
        assert bool((low <= every).all()) and bool((every <= high).all()), count
    (extremes,) = search(bases, [TopK(groups, 7)], final=2)
    place = 500 * extremes.group + extremes.index
    for column in range(2):
        order = every[:, column].argsort(stable=True)
        assert set(order[:7].tolist()) | set(order[-7:].tolist()) <= set(place.tolist())
    assert torch.allclose(extremes.values, every[place], atol=1e-6) and extremes.full < extremes.of
    for number, intervals in enumerate(IntervalSurvey(bases, 5)(groups)):
        increase = every[500 * number : 500 * number + 500, 0]
        assert bool((intervals.low <= increase).all()) and bool((increase <= intervals.high).all())
        assert float((intervals.likely - increase).abs().mean()) <= 0.05


def test_an_explanation_by_the_flat_projection_says_so_and_adds_up(variant: str) -> None:
    """One softmax over all tokens: its log-probability, the same neurons by a sort of all, and a note; none else is."""
    model = loaded(variant)
    stream = model.traced(torch.tensor([model.tokenizer(PROMPT)["input_ids"]]))
    flat = Lens.of(model.anatomy, "frozen", "flat")
    explanation = explain(model, PROMPT, " w070", projection="flat", top=3)
    logits = flat.logits(stream.final[-1], flat.scale(stream.final[-1]))
    assert abs(explanation.log_probability - float(logits.log_softmax(0)[74])) <= EXACT
    assert any("flat projection" in note for note in explanation.notes)
    prediction = TracedPrediction(stream, flat, 74, (), vocabulary_of(model.tokenizer, 304))
    every = torch.cat(
        [
            exhaustive(prediction.bases, group, final=prediction.final)
            for group in prediction.groups("neurons")
        ]
    )
    left = explanation.neurons["leave_one_out"]
    assert left.max() == pytest.approx(float(every[:, 1].max())) and left.min() == pytest.approx(
        float(every[:, 1].min())
    )
    with pytest.raises(QueryError, match="not a projection; give adaptive or flat"):
        explain(model, PROMPT, projection="steep")


def test_what_a_part_does_is_what_the_definition_says(variant: str) -> None:
    """Increase and leave-one-out of every neuron, from log-probabilities of residuals with and without it, in fp64."""
    model = loaded(variant)
    stream = model.traced(torch.tensor([model.tokenizer(PROMPT)["input_ids"]]))
    lens, words = Lens.of(model.anatomy, "frozen"), vocabulary_of(model.tokenizer, 304)
    table, bands = lens.table.double(), model.anatomy.bands
    assert bands is not None
    for token in (12, 70, 250):
        prediction = TracedPrediction(stream, lens, token, (24,), words)

        def log_p(vectors: Tensor, token: int = token) -> Tensor:
            return bands.log_probabilities(vectors.double() @ table.T)[:, token]

        final = prediction.points[-1:].double()
        for layer in range(4):
            parts, base = stream.neuron_parts(layer, prediction.position), torch.full((48,), 2 * layer + 1)
            before = prediction.points[2 * layer + 1][None].double()
            increase = log_p(before + parts) - log_p(before)
            left = log_p(final) - log_p(final - parts)
            values = prediction.measured(parts, base)
            assert float((values - torch.stack([increase, left], 1)).abs().max()) <= 1e-6
            odds = prediction.odds(parts, base)[:, :, 0]
            foil = torch.stack(
                [log_p(before + parts, 24) - log_p(before, 24), log_p(final, 24) - log_p(final - parts, 24)],
                1,
            )
            assert float((odds - (values - foil)).abs().max()) <= 2e-6  # what all tokens share cancels
            doubt = prediction.bases.rounding(norms(parts), base, values[:, 0])
            assert bool(((values[:, 0] - increase).abs() <= doubt + 1e-13).all())  # that of fp64
        point = final[0].clone().requires_grad_()
        with torch.enable_grad():
            bands.log_probabilities(point @ table.T)[token].backward()
        assert torch.allclose(prediction.bases.gradient(prediction.final).double(), point.grad, atol=1e-6)


def test_norms_after_each_part_close_and_are_explained(tmp_path: Path) -> None:
    """Without decoder_normalize_before the stream itself is normalised; parts are carried through all later norms."""

    def change(state: dict[str, Any]) -> None:
        vars(state["args"])["decoder_normalize_before"] = False

    model = load_model(_copied(tmp_path / "model", change), dtype="fp32")
    assert model.self_check <= 1e-6
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    places = 2 + torch.arange(tokens.shape[1])
    with torch.no_grad():
        x: Any = 32**0.5 * model.anatomy.embedding(tokens) + fairseq.sinusoids(places, 32)
        for block in model.hf.decoder.layers:
            x = block.self_attn_layer_norm(x + block.self_attn(x))
            x = block.final_layer_norm(x + block.fc2(torch.relu(block.fc1(x))))
        wanted = Lens.of(model.anatomy, "raw").logits(x[0])
        assert torch.allclose(model.hf(input_ids=tokens).logits[0], wanted, atol=EXACT)
    explanation = explain(model, PROMPT, " w070", " w250", top=10_000)
    assert abs(explanation.log_probability - float(wanted[-1, 74])) <= EXACT
    row = Lens.of(model.anatomy, "raw", "flat").unembedding[74].double()
    parts = [getattr(explanation, name)["logit"].sum() for name in ("heads", "neurons", "others")]
    assert abs(sum(parts) - float(x[0, -1].double() @ row)) <= 1e-4


# -- Whole jobs ----------------------------------------------------------------------------------------------


@cache
def text(documents: int = 60) -> str:
    """Documents of three lines of the dictionary's words, the frequent ones often."""
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, 297)
    share /= share.sum()

    def line() -> str:
        return " ".join(f"w{word:03d}" for word in generator.choice(296, generator.integers(6, 30), p=share))

    return "\n\n".join("\n".join(line() for _ in range(3)) for _ in range(documents))


def test_a_folder_is_built_shown_and_verified(tmp_path: Path) -> None:
    """From the command's own arguments: a folder and a .tokens file; values are read by the flat projection."""
    file = tmp_path / "wiki.valid.tokens"
    file.write_text(text(), encoding="utf-8")
    model = load_model(FOLDER / "tied", dtype="fp32")
    run = build(model, str(file), tmp_path / "run")
    assert run.manifest.model.family == "fairseq_lm" and run.manifest.model.vocabulary == 304
    assert run.manifest.options["values_projection"] == "flat"
    assert verify(run, model, sample=20).passed
    values = run.table("values").filter(pl.col("layer") == 2, pl.col("neuron") == 7, pl.col("polarity") == 1)
    rows = values.collect().sort("rank")
    flat = Lens.of(model.anatomy, "own", "flat").logits(model.anatomy.layers[2].values()[7:8])[0]
    assert rows["token"].to_list() == flat.topk(50).indices.tolist()
    assert rows["probability"].to_list() == pytest.approx(flat.softmax(0).topk(50).values.tolist())
    first = run.table("triggers").filter(pl.col("layer") == 1, pl.col("neuron") == 3, pl.col("rank") == 0)
    trigger = first.collect().row(0, named=True)
    contexts = run.table("contexts").filter(pl.col("context") == trigger["context"]).collect()
    tokens = contexts["tokens"][0].to_list()
    stream = model.traced(torch.tensor([tokens]))
    coefficient = float(stream.layers[1].coefficients[trigger["position"], 3])
    assert coefficient == pytest.approx(trigger["coefficient"], abs=EXACT)
    assert tokens[0] == 2 and tokens.count(2) == 3
    assert "w0" in str(card(run, NeuronId(2, 7)).to_dict())
