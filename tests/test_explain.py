"""Explaining a prediction: the account adds up for every family, and a question without an answer is one clear line."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, VARIANTS, slow_but_for
from tiny import WORDS, tokenizer
from tokenizers import normalizers, processors
from transformers.cache_utils import DynamicCache

from mnemoscope import explain, load_model
from mnemoscope.errors import ModelError, QueryError, RunMismatch
from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.model import Model
from mnemoscope.prediction import ablate
from mnemoscope.prediction.ablate import Cut, _kept, effects, without
from mnemoscope.prediction.explain import KINDS
from mnemoscope.prediction.explain import explain as explain_in_run
from mnemoscope.prediction.explanation import ChosenToken, Explanation
from mnemoscope.prediction.search import Parts, exhaustive
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.records import Progress
from mnemoscope.text.spelling import vocabulary_of

PROMPT = " the capital of France is"
NAMES = [
    *FAMILIES,
    "llama_biases",
    "gpt_neox_sequential",
    "granite_biases",
    "cohere_qk_norm",
    "falcon_old",
]
CAPPED = ("gemma2",)


@cache
def _model(name: str) -> Model:
    return load_model({**FAMILIES, **VARIANTS}[name](), tokenizer=tokenizer())


@cache
def _explained(name: str, lens: str = "frozen") -> Explanation:
    return explain(_model(name), PROMPT, " Paris", [" London", " Berlin"], lens=lens, top=5)


def _prediction(name: str, lens: str) -> TracedPrediction:
    """The prediction behind `_explained`, for brute force."""
    from mnemoscope.model.stream import trace

    model = _model(name)
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    stream = trace(model.hf, model.anatomy, tokens)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    reading = Lens.of(model.anatomy, lens)
    target, foil = (words.find(text)[0] for text in (" Paris", " London"))
    return TracedPrediction(stream, reading, target, (foil,), words)


@pytest.mark.parametrize("name", slow_but_for(NAMES))
def test_the_account_adds_up(name: str) -> None:
    """Layers telescope, the account reaches the model's own log-probability, shown and remainder make the total."""
    found = _explained(name)
    model = _model(name)
    with torch.no_grad():
        logits = model.hf(torch.tensor([model.tokenizer(PROMPT)["input_ids"]])).logits[0, -1].double()
    expected = float(logits.log_softmax(0)[found.target.token])
    assert found.log_probability == pytest.approx(expected, abs=1e-4)
    assert found.stream.height == 2 * found.layer_count + 1
    assert float(found.layers["increase"].sum()) == pytest.approx(found.total, abs=1e-4)
    account = found.account
    assert account["nats"][-1] == pytest.approx(expected, abs=1e-4)
    shown = found.heads["increase"].sum() + found.neurons["increase"].sum()
    biases = found.others.filter(pl.col("part").is_in(["attention bias", "ffn bias"]))["increase"].sum()
    assert shown + biases + found.remainder == pytest.approx(found.total, abs=1e-9)
    for row in found.remainders.iter_rows(named=True):
        assert row["shown"] + row["remainder"] == pytest.approx(row["total"], abs=1e-9)


@pytest.mark.parametrize("name", slow_but_for(NAMES))
def test_logits_of_all_parts_add_up_under_the_frozen_lens(name: str) -> None:
    """Embedding, layers and the biases of the head give the model's logit, before a soft cap (A35)."""
    found = _explained(name)
    total = float(found.layers["logit"].sum())
    total += float(found.others.filter(pl.col("part").is_in(["embedding", "head bias"]))["logit"].sum())
    cap = _model(name).anatomy.softcap
    logit = float(found.stream["logit"][-1])
    assert (total if cap is None else cap * np.tanh(total / cap)) == pytest.approx(logit, abs=1e-4)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "olmo2", "granite"])
def test_the_frames_hold_the_extremes_of_everything(name: str, lens: str) -> None:
    """Heads x sources, whole heads, sources and neurons agree with brute force over all of them."""
    found, prediction = _explained(name, lens), _prediction(name, lens)
    keys = {
        "heads": ["layer", "head", "source"],
        "whole_heads": ["layer", "head"],
        "sources": ["layer", "source"],
        "neurons": ["layer", "neuron"],
    }
    for kind in KINDS:
        groups: list[Parts] = prediction.groups(kind)
        every = torch.stack([exhaustive(prediction.bases, group, final=prediction.final) for group in groups])
        frame = getattr(found, kind)
        index = frame[keys[kind][1]].to_numpy()
        if kind == "heads":
            index = index * (prediction.position + 1) + frame["source"].to_numpy()
        layer = frame["layer"].to_numpy()
        shown = torch.tensor(np.array(frame.select("increase", "leave_one_out").to_numpy()))
        assert torch.allclose(shown, every[layer.tolist(), index.tolist()], atol=1e-5)
        top = 5 if kind in ("heads", "neurons") else 1
        for column in range(2):
            flat = every[..., column].flatten().sort().values
            have = np.sort(shown[:, column].numpy())
            assert np.allclose(have[:top], flat[:top], atol=1e-5)
            assert np.allclose(have[-top:], flat[-top:], atol=1e-5)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "stablelm"])
def test_contrasts_telescope_and_add_up(name: str, lens: str) -> None:
    """log p(target) - log p(foil) is the sum over the layers, and under linear lenses over all parts (A50-A52)."""
    found = _explained(name, lens)
    scores = found.stream.select(pl.col("logit") - pl.col("logit_ London"))["logit"]
    contrast = found.contrasts[0]
    assert contrast.foil.piece == " London"
    assert contrast.total == pytest.approx(scores[-1], abs=1e-4)
    assert float(contrast.layers["increase"].sum()) == pytest.approx(
        contrast.total - contrast.start, abs=1e-4
    )
    shown = contrast.heads["increase"].sum() + contrast.neurons["increase"].sum()
    assert contrast.remainder <= abs(contrast.total - contrast.start) + abs(shown) + 10
    if lens != "own" and name not in CAPPED:
        attention = contrast.layers.filter(pl.col("part") == "attention")["increase"].sum()
        biases = contrast.others.filter(pl.col("part") == "attention bias")["increase"].sum()
        assert float(contrast.sources["increase"].sum()) + biases == pytest.approx(attention, abs=1e-4)
        assert np.allclose(contrast.heads["increase"], contrast.heads["leave_one_out"], atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "phi"])
def test_queries_add_up_to_their_coefficient(name: str) -> None:
    """Named shares and the remainder make the coefficient, by each branch; increases make the neuron's (A43)."""
    found = _explained(name)
    neurons = {(row["layer"], row["neuron"]): row for row in found.neurons.iter_rows(named=True)}
    for (layer, neuron), rows in found.queries.group_by("layer", "neuron"):
        row = neurons[layer, neuron]
        for column in ("share", "gate") + (("up",) if _model(name).anatomy.gated else ()):
            assert float(rows[column].sum()) == pytest.approx(row["coefficient"], abs=1e-4)
        assert float(rows["increase"].sum()) == pytest.approx(row["increase"], abs=1e-3)
        assert rows["kind"].to_list().count("remainder") == 1
    assert found.queries["up"].is_null().all() != _model(name).anatomy.gated


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_heads_look_where_the_model_says(name: str) -> None:
    """Every weight that is kept is the model's own, those that are left out are small; the grid's heads are there."""
    found, model = _explained(name), _model(name)
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        looked = model.hf(ids, output_attentions=True).attentions
    model.hf.set_attn_implementation(before)
    heads = set(found.attention.select("layer", "head").iter_rows())
    assert set(found.grid.select("layer", "head").iter_rows()) <= heads
    left = {(layer, head): looked[layer][0, head].clone() for layer, head in heads}
    for layer, head, query, source, weight in found.attention.iter_rows():
        assert weight == pytest.approx(float(looked[layer][0, head, query, source]), abs=1e-5)
        left[layer, head][query, source] = 0
    assert all(float(rest.max()) < 0.01 + 1e-5 for rest in left.values())
    assert found.attention["query"].unique().sort().to_list() == list(range(ids.shape[1]))


def test_everything_goes_to_json() -> None:
    """`to_dict` holds plain values only."""
    text = json.dumps(_explained("llama").to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["target"]["piece"] == " Paris"
    assert back["contrasts"][0]["remainder"] == _explained("llama").contrasts[0].remainder
    assert {"layer", "neuron", "coefficient", "increase", "leave_one_out", "logit"} <= set(back["neurons"][0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "bloom"])
def test_ablation_is_a_forward_pass_without_it(name: str) -> None:
    """Nothing downstream reacts to a neuron of the last layer: its effect is its leave-one-out."""
    model, prediction = _model(name), _prediction(name, "own")
    layer, parallel = prediction.layers - 1, model.anatomy.parallel
    neurons = [0, 7, 21]
    cuts = [Cut(layer, neuron) for neuron in neurons] + [Cut(0, 3), Cut(1, 2, 1), Cut(layer, 0, 2)]
    found = effects(model, prediction.stream, prediction.target, cuts)
    group = prediction.groups("neurons")[layer]
    if model.anatomy.layers[layer].post_ffn_norm is None:
        expected = exhaustive(prediction.bases, group, final=prediction.final)[neurons, 1]
        assert np.allclose(found[:3], expected, atol=1e-4)
    if parallel:
        expected = exhaustive(prediction.bases, prediction.groups("heads")[layer], final=prediction.final)[
            2, 1
        ]
        assert found[-1] == pytest.approx(float(expected), abs=1e-4)
    assert bool((np.abs(found[4:]) > 1e-9).all())
    coefficient = float(prediction.stream.layers[1].coefficients[-1, 4])
    assert effects(model, prediction.stream, prediction.target, [Cut(1, 4, None, coefficient)])[
        0
    ] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", slow_but_for([*FAMILIES, *VARIANTS], {"llama", "gpt2", "bloom", "gemma2"}))
def test_going_on_from_what_was_read_is_reading_it_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go on from the keys and values of the prompt have the logits of rows that are read whole."""
    model, stream = _model(name), _prediction(name, "own").stream
    last = model.anatomy.n_layers - 1
    groups = [[Cut(0, 3), Cut(last, 5, None, 0.7)], [Cut(0, 1, 1)], [], [Cut(last, 0, 2), Cut(0, 4)]]
    assert _kept(model, stream) is not None, "every family of decoders goes on from its cache"
    monkeypatch.setattr(ablate, "KEPT_TOKENS", 3 * len(stream.tokens))
    going_on = [torch.cat([whole[None], cut]) for whole, cut in without(model, stream, groups)]
    assert len(going_on) == 2, "two groups in a batch"
    monkeypatch.setattr(ablate, "_kept", lambda *_: None)
    ((whole, cut),) = without(model, stream, groups)
    read = torch.cat([whole[None], cut])
    size = float(whole.max() - whole.min())
    for rows, expected in zip(going_on, (read[:3], read[[0, 3, 4]]), strict=True):
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5 * size)


def test_a_model_that_goes_on_otherwise_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are not gone on from where the logits would be others than those of the whole prompt."""
    model, stream = load_model(FAMILIES["llama"](), tokenizer=tokenizer()), _prediction("llama", "own").stream
    assert _kept(model, stream) is not None
    forward = model.hf.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(*args, past_key_values=None if past_key_values is None else DynamicCache(), **kwargs)

    monkeypatch.setattr(model.hf.model, "forward", forgetful)
    assert _kept(model, stream) is None


def test_ablations_stand_beside_contributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame has the asked number of neurons and of heads x sources, with all three measures; how many are done is
    told."""
    monkeypatch.setattr(ablate, "KEPT_TOKENS", 3 * len(_model("llama").tokenizer(PROMPT).input_ids))
    steps: list[Progress] = []
    found = explain(_model("llama"), PROMPT, top=3, ablate=2, ablate_to=0.5, report=steps.append).ablations
    assert [step[1:3] for step in steps if step.unit == "parts"] == [(2, 4), (4, 4)]
    assert found["kind"].to_list() == ["neuron", "neuron", "head", "head"]
    assert found["how"].to_list() == ["value", "value", "zero", "zero"]
    assert found.select("increase", "leave_one_out", "effect").null_count().sum_horizontal().item() == 0


def test_half_precision_is_explained_in_fp32() -> None:
    """The arithmetic is fp32 whatever the weights are stored in, so the account adds up as well."""
    model = load_model(FAMILIES["llama"]().to(torch.bfloat16), tokenizer=tokenizer())
    found = explain(model, PROMPT, " Paris", " London", top=3, ablate=1)
    assert found.dtype == "bf16"
    assert float(found.layers["increase"].sum()) == pytest.approx(found.total, abs=1e-4)
    assert found.log_probability == pytest.approx(_explained("llama").log_probability, abs=0.2)


def test_the_models_own_choice_is_the_target() -> None:
    """Without a target the most probable token is explained."""
    found = explain(_model("llama"), PROMPT, top=2)
    assert found.target.given is None
    assert found.target.token == found.predictions["token"][0]
    assert found.stream["rank"][-1] == 0


def test_a_position_in_the_middle_sees_nothing_after_it() -> None:
    """Explaining position 2 is explaining the prompt that ends there."""
    middle = explain(_model("llama"), PROMPT, " Paris", position=2, top=2)
    ended = explain(_model("llama"), " the capital of", " Paris", top=2)
    assert middle.position == 2
    assert middle.neurons.equals(ended.neurons)
    assert explain(_model("llama"), PROMPT, " Paris", position=-3, top=2).neurons.equals(ended.neurons)


def test_numbers_and_lists_of_other_libraries_are_as_good() -> None:
    """NumPy's and torch's whole numbers, and foils from a generator."""
    model = _model("llama")
    plain = explain(model, PROMPT, " Paris", [" London"], position=2, top=2)
    london = torch.tensor(model.tokenizer(" London")["input_ids"])[0]
    other = explain(model, PROMPT, " Paris", (text for text in [" London"]), position=np.int64(2), top=2)
    assert other.contrasts[0].neurons.equals(plain.contrasts[0].neurons)
    by_id = explain(model, PROMPT, " Paris", foil_ids=[london], position=2, top=2)
    assert by_id.contrasts[0].neurons.equals(plain.contrasts[0].neurons)


def test_what_follows_the_position_is_known_by_the_tokens() -> None:
    """Whatever stands around a text or is changed in it, the rest of the prompt is what was not read."""
    framed = tokenizer()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <pad> $A </s>", special_tokens=[("<s>", 1), ("<pad>", 0), ("</s>", 2)]
    )
    framed.backend_tokenizer.normalizer = normalizers.Replace("X", "e")
    model = load_model(FAMILIES["llama"](), tokenizer=framed)
    prompt = "thX capital of France is"
    middle, end = (explain(model, prompt, " Paris", position=at, top=2) for at in (3, -1))
    assert (middle.unread, end.unread) == (" of France is", "")
    assert "--position 3" in " ".join(str(middle).split())
    assert "--position" not in str(end)


def test_tokens_added_after_loading_are_met_with_one_line() -> None:
    """They have no row in the embedding, and the index would fail deep in torch."""
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    model.tokenizer.add_tokens([f"<{number}>" for number in range(model.anatomy.vocabulary)])
    with pytest.raises(ModelError, match=r"its embedding has \d+ rows, and its tokenizer has the token"):
        explain(model, PROMPT + " <99>", " Paris")


def test_shared_beginnings_move_the_question() -> None:
    """Target and foil that begin alike are compared at the first token in which they differ, and this is said."""
    found = explain(_model("llama"), PROMPT, " the river", " the king", top=2)
    assert found.target.piece == " river"
    assert found.foils[0].piece == " king"
    assert found.tokens["piece"][-1] == " the"
    assert "appended" in found.notes[0]
    assert "several tokens" in found.target.note


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "long prompt": ({"prompt": " the" * 65}, "65 tokens"),
    "empty target": ({"target": ""}, "the target is empty"),
    "empty foil": ({"foils": [""]}, "the foil is empty"),
    "same target and foil": ({"target": " Paris", "foils": " Paris"}, "same tokens throughout"),
    "foil that begins like the target": (
        {"target": " Paris", "foils": " Paris king"},
        "same tokens throughout",
    ),
    "foils that differ at different tokens": (
        {"target": " the king", "foils": [" the river", " Paris"]},
        "one at a time",
    ),
    "position out of range": ({"position": 5}, "take 0 to 4"),
    "negative position out of range": ({"position": -6}, "take 0 to 4"),
    "unknown lens": ({"lens": "tuned"}, "is not a lens"),
    "top of nothing": ({"top": 0}, "top=0 is too small; give 1 or more"),
    "word that cannot be spelled": ({"target": " xyzzy"}, "not in the vocabulary"),
    "id and text": ({"target": " Paris", "target_id": 5}, "give one of them"),
    "id beyond the vocabulary": (
        {"target_id": 4000},
        "target_id=4000 is not a token; give a whole number from 0",
    ),
    "id that is none": ({"foil_ids": [True]}, "foil_ids=True is not a token"),
    "target as a number": (
        {"target": 5},
        "the target is of type int; give a text; a token's id goes to target_id",
    ),
    "foil as a number": ({"target": " Paris", "foils": [5]}, "ids of tokens go to foil_ids"),
    "foils that are no list": ({"foils": 5}, "foils is of type int; give a list"),
    "prompt as bytes": ({"prompt": b" the"}, "the prompt is of type bytes; give a text"),
    "prompt as a list": ({"prompt": [" the"]}, "the prompt is of type list"),
    "prompt with half a character": ({"prompt": " the \ud800"}, "the lone surrogate U+D800 at character 5"),
    "prompt with a stray byte": ({"prompt": " the \udcff"}, "the byte 0xff at character 5"),
    "target with half a character": ({"target": "\ud800"}, "the target holds the lone surrogate"),
    "foil with half a character": ({"target": " Paris", "foils": "\ud800"}, "the foil holds the lone"),
    "no position": ({"position": None}, "take 0 to 4"),
    "position as a word": ({"position": "1"}, "take 0 to 4"),
    "mean without a run": ({"ablate": 1, "ablate_to": "mean"}, "run="),
    "ablation to nonsense": ({"ablate": 1, "ablate_to": "median"}, "zero, mean or a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_question_is_one_clear_line(case: str) -> None:
    """Each mistake is named in one line with what is accepted."""
    arguments, expected = BAD[case]
    with pytest.raises(QueryError) as caught:
        explain(_model("llama"), **{"prompt": PROMPT, **arguments})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_foil_that_is_the_models_choice_needs_a_target() -> None:
    """Without a target, a foil equal to the prediction has nothing to be compared with."""
    owns = ((_model(name), explain(_model(name), PROMPT, top=1).target.piece) for name in FAMILIES)
    model, own = next((model, piece) for model, piece in owns if piece.strip() in WORDS)
    with pytest.raises(QueryError, match="own prediction"):
        explain(model, PROMPT, foils=own)


def test_a_run_of_another_model_is_refused() -> None:
    """The weights' hash in the manifest decides."""

    class Other:
        path = "runs/other"

        class manifest:  # noqa: N801 - stands for an attribute
            class model:  # noqa: N801
                id, weights_sha256 = "other", "0" * 64

    with pytest.raises(RunMismatch, match="built from other"):
        explain_in_run(_model("llama"), PROMPT, run=Other())  # type: ignore[arg-type]


def _framed(after: bool) -> Model:
    """A model whose tokenizer puts <s> before a text and, if wanted, </s> behind it."""
    framed = tokenizer()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" + (" </s>" if after else ""), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return load_model(FAMILIES["llama"](), tokenizer=framed)


def test_a_closing_token_is_no_part_of_a_prompt() -> None:
    """The prediction behind the last word is explained, not that behind </s>, and this is said."""
    closed, opened = (explain(_framed(after), PROMPT, " Paris", top=2) for after in (True, False))
    assert closed.tokens["piece"].to_list() == ["<s>", " the", " capital", " of", " France", " is"]
    assert closed.position == opened.position == 5
    assert closed.neurons.equals(opened.neurons)
    assert any("closes a text with </s>" in note for note in closed.notes)
    assert explain(_framed(True), PROMPT, " Paris", position=-2, top=2).tokens["piece"][-1] == " France"
    with pytest.raises(QueryError, match="take 0 to 5"):
        explain(_framed(True), PROMPT, " Paris", position=6)


def test_a_token_can_be_given_by_its_id() -> None:
    """It is explained as it is, said in the note, and can stand beside foils of both kinds."""
    model = _model("llama")
    paris, london = (model.tokenizer(text)["input_ids"][0] for text in (" Paris", " London"))
    found = explain(model, PROMPT, target_id=paris, foils=[" Berlin"], foil_ids=[london], top=2)
    assert found.target == ChosenToken(
        None, paris, " Paris", (paris,), f"token {paris}, given by its id", by_id=True
    )
    assert [foil.piece for foil in found.foils] == [" Berlin", " London"]
    assert found.neurons.equals(explain(model, PROMPT, " Paris", [" Berlin", " London"], top=2).neurons)
    assert f"--target-id {paris}" in str(found).replace("\n", " ")


@pytest.mark.slow
def test_foils_that_read_alike_keep_their_own_columns() -> None:
    """Two tokens with one spelling are told apart by their ids; the same foil twice is one column."""
    twins = tokenizer()
    twins.add_tokens([" London"])  # beside the one that begins with the letter for a space
    model = load_model(FAMILIES["llama"](), tokenizer=twins)
    one, other = twins.convert_tokens_to_ids(["ĠLondon", " London"])
    found = explain(model, PROMPT, " Paris", foil_ids=[one, other], top=2)
    assert found.stream.columns[-2:] == [f"logit_ London (token {one})", f"logit_ London (token {other})"]
    assert (
        found.stream[found.stream.columns[-1]].to_list() != found.stream[found.stream.columns[-2]].to_list()
    )
    assert "<svg" in found._repr_html_() or str(found)
    twice = explain(model, PROMPT, " Paris", foil_ids=[one, one], top=2)
    assert twice.stream.columns[-1] == "logit_ London"


@pytest.mark.sample
@pytest.mark.slow
def test_paris(sample_model: Model) -> None:
    """The papers' example on the sample model: capitals in the top neurons, France in what beats London."""
    found = explain(sample_model, "The capital of France is", "Paris", [" London", " Bordeaux"])
    assert found.target.piece == " Paris"
    assert "leading space" in found.target.note
    assert found.log_probability == pytest.approx(np.log(0.7725), abs=1e-2)
    assert float(found.layers["increase"].sum()) == pytest.approx(found.total, abs=1e-4)
    best = found.neurons.sort("leave_one_out", descending=True).head(3)
    assert any("capital" in token for row in best["promotes"] for token in row)
    sources = found.contrasts[0].heads.sort("increase", descending=True).head(3)
    assert " France" in sources["source_token"].to_list()
    assert found.contrasts[0].sources.sort("increase", descending=True)["source_token"][0] == " France"
    assert "several tokens" in found.foils[1].note
