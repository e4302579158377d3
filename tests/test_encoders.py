"""Encoders: their parts add up through every later norm and the head, alone and in padded batches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import tiny
from families import randomise, slow_but_for
from tiny import texts, tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertForPreTraining, PreTrainedModel, PreTrainedTokenizerFast

from mnemoscope import build, explain
from mnemoscope.api import open_run
from mnemoscope.errors import ModelNotSupported, PatternError, QueryError
from mnemoscope.mine.verify import verify
from mnemoscope.model.capture import Capture
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.encoders import ENCODERS
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Anatomy, Layer, Norm
from mnemoscope.model.stream import trace
from mnemoscope.neuron.striking import Striking
from mnemoscope.records import ContextBatch, padded
from mnemoscope.run.reading import Run
from mnemoscope.studies.measures import removal
from mnemoscope.trials.hypothesis import test as hypothesis

DECODERS = [family for family, row in ENCODERS.items() if not row.bidirectional]
OF_PAIRS = ["t5", "mt5", "umt5"]  # encoders of encoder-decoders
MASKED = [family for family in ENCODERS if family not in (*DECODERS, *OF_PAIRS, "bert-generation")]
TOKENS = torch.tensor([[5, 9, 13, 70, 22, 41, 6]])
AT = 3


@pytest.mark.parametrize("family", slow_but_for(MASKED, ("bert", "albert", "modernbert")))
def test_the_parts_of_an_encoder_add_up_to_its_logits(family: str) -> None:
    """Embedding, heads from both sides, neurons, biases and the head's constant give what the last norm reads."""
    model = tiny(family, "masked")
    anatomy, error = examine(model)
    assert error <= 1e-5 and anatomy.bidirectional
    stream = trace(model, anatomy, TOKENS)
    total = stream.embedding_part(AT) + stream.constant(AT)
    for layer in range(anatomy.n_layers):
        heads = stream.attention_parts(layer, AT)
        assert heads.shape[:2] == (anatomy.n_heads, TOKENS.shape[1])
        assert bool(heads[:, AT + 1 :].any()), "an encoder attends to what follows"
        before, within, after = stream.points(AT)[2 * layer : 2 * layer + 3]
        added = heads.sum((0, 1)) + stream.attention_bias(layer, AT)
        torch.testing.assert_close(before + added, within, rtol=1e-4, atol=1e-4)
        written = stream.neuron_parts(layer, AT).sum(0) + stream.ffn_bias(layer, AT)
        torch.testing.assert_close(within + written, after, rtol=1e-4, atol=1e-4)
        total = total + added + written
    torch.testing.assert_close(total, stream.final[AT].float(), rtol=1e-4, atol=1e-4)
    normed = total if anatomy.final_norm is None else anatomy.final_norm(total)
    torch.testing.assert_close(anatomy.logits(normed), model(TOKENS).logits[0, AT], rtol=1e-3, atol=1e-3)


def _without_bias(norm: Norm | None) -> Norm | None:
    return None if norm is None else replace(norm, bias=None)


def _layers(change: Callable[[Layer], Layer]) -> Callable[[Anatomy], Anatomy]:
    return lambda anatomy: replace(anatomy, layers=tuple(map(change, anatomy.layers)))


def _unbiased(module: nn.Linear) -> nn.Linear:
    bare = nn.Linear(module.in_features, module.out_features, bias=False)
    bare.weight = module.weight
    return bare


def _bare_head(anatomy: Anatomy) -> Anatomy:
    """The transform of the head without the bias of its linear module, which is still the module that is watched."""
    transform = anatomy.transform
    assert transform is not None

    class Watched(nn.Linear):
        def register_forward_hook(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            return watched.register_forward_hook(*args, **kwargs)  # type: ignore[arg-type]

    (watched,) = transform.dense
    bare = _unbiased(watched)  # type: ignore[arg-type]
    bare.__class__ = Watched
    return replace(anatomy, transform=replace(transform, dense=(bare,)))


DROPPED: dict[str, Callable[[Anatomy], Anatomy]] = {
    "norm in the middle": _layers(lambda layer: replace(layer, middle_norm=None)),
    "its bias": _layers(lambda layer: replace(layer, middle_norm=_without_bias(layer.middle_norm))),
    "norm at the end": _layers(lambda layer: replace(layer, end_norm=None)),
    "bias at the end": _layers(lambda layer: replace(layer, end_norm=_without_bias(layer.end_norm))),
    "head": lambda anatomy: replace(anatomy, transform=None),
    "bias of the head": _bare_head,
    "norm of the head": lambda anatomy: replace(anatomy, final_norm=_without_bias(anatomy.final_norm)),
    "bias of the decoder": lambda anatomy: replace(anatomy, head=_unbiased(anatomy.head)),  # type: ignore[arg-type]
    "direction": lambda anatomy: replace(anatomy, bidirectional=False),
}


@pytest.mark.parametrize("what", DROPPED)
def test_what_is_left_out_of_an_encoder_is_caught(what: str) -> None:
    """A norm, a bias, the linear module of the head: without any one of them the parts do not add up."""
    model = tiny("bert", "masked")
    anatomy, _ = examine(model)
    with pytest.raises((ModelNotSupported, RuntimeError, AssertionError)):
        self_check(model, DROPPED[what](anatomy))


@pytest.mark.parametrize("family", slow_but_for(MASKED, ("roberta", "albert")))
def test_padding_is_not_seen(family: str) -> None:
    """Coefficients of a right-padded batch are those of each context alone."""
    model = load_model(tiny(family, "masked"), tokenizer=tokenizer())
    contexts = [np.array([5, 9, 13, 70, 22, 41, 6]), np.array([7, 30, 8])]

    def coefficients(rows: list[np.ndarray]) -> list[torch.Tensor]:
        tokens, lengths = padded(rows)
        batch = ContextBatch(np.arange(len(rows)), tokens, lengths, np.ones(tokens.shape, bool))
        seen: list[torch.Tensor] = []
        with Capture(model) as capture:
            capture.sweep(batch, lambda layer, activity, *_: seen.append(activity.clone()))
        return seen

    together = coefficients(contexts)
    assert len(together) == model.anatomy.n_layers
    for row, context in enumerate(contexts):
        for batched, alone in zip(together, coefficients([context]), strict=True):
            torch.testing.assert_close(batched[row, : len(context)], alone[0], rtol=1e-4, atol=1e-5)


def reading() -> PreTrainedTokenizerFast:
    """The tiny tokenizer as that of an encoder: it frames a text, and has a token that masks."""
    made = tokenizer()
    inner = made.backend_tokenizer
    inner.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A run of a tiny BERT from a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny("bert", "masked").save_pretrained(folder / "model")
    reading().save_pretrained(folder / "model")
    model = load_model(folder / "model", dtype="fp32")
    return build(model, texts(80), folder / "run", top=10), model


def test_an_encoder_builds_and_its_run_is_verified(built: tuple[Run, Model]) -> None:
    """A stored coefficient is that of its context alone and whole, and everything is found again."""
    run, model = built
    assert run.manifest.model.bidirectional and run.manifest.model.readout == "head"
    assert verify(run, model).passed
    rows = run.table("triggers").filter(pl.col("rank") == 0, pl.col("polarity") == 1).collect()
    for row in rows.sample(12, seed=0).iter_rows(named=True):
        tokens = run.contexts([row["context"]])[row["context"]].tokens
        assert tokens[0] == 1 and tokens[-1] == 2
        stream = model.traced(torch.from_numpy(np.asarray(tokens, np.int64))[None])
        coefficient = stream.layers[row["layer"]].coefficients[row["position"], row["neuron"]]
        assert float(coefficient) == pytest.approx(row["coefficient"], rel=1e-4)


def test_values_are_read_through_the_head(built: tuple[Run, Model]) -> None:
    """The first token of a value is that of the decoder, the norm and the linear module of the head in a row."""
    run, model = built
    head = model.hf.cls.predictions
    values = model.hf.bert.encoder.layer[1].output.dense.weight.T
    logits = head.decoder(head.transform.LayerNorm(values @ head.transform.dense.weight.T))
    rows = run.table("values").filter(pl.col("layer") == 1, pl.col("rank") == 0, pl.col("polarity") == 1)
    assert rows.sort("neuron").collect()["token"].to_list() == logits.argmax(-1).tolist()


def test_a_trigger_of_an_encoder_is_shown_with_both_sides(built: tuple[Run, Model]) -> None:
    """No arrow to the next token, but the text behind; what is striking is the token that stands there."""
    run, _ = built
    card = run.neuron(1, 3)
    example = next(example for example in card.positive.examples if len(example.after) > 2)
    assert example.whole
    printed = str(card)
    assert "→" not in printed and "".join(example.after[:2]).strip() in printed.replace("\n", " ")
    assert all(pick.stands for pick in Striking(run).best("next", 3))


@pytest.mark.parametrize("head", ["masked", "body", "pretraining"])
def test_a_checkpoint_is_loaded_with_the_head_that_it_has(tmp_path: Path, head: str) -> None:
    """A masked language model's head if there is one, also beside another; else the body alone."""
    hf = tiny("bert", "masked")
    if head == "body":
        hf = hf.base_model
    if head == "pretraining":
        hf = BertForPreTraining(hf.config)
        randomise(hf)
    hf.save_pretrained(tmp_path)
    reading().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="fp32")
    assert model.self_check <= 1e-5 and model.anatomy.headless == (head == "body")
    assert model.entry().readout == ("input embedding" if head == "body" else "head")
    assert model.weights_sha256 == load_model(tmp_path, dtype="fp32").weights_sha256


def test_what_asks_about_prefixes_refuses_an_encoder(built: tuple[Run, Model]) -> None:
    """Tokens removed from triggers, and a claim about the next token, in a line, before anything is read."""
    run, model = built
    with pytest.raises(ModelNotSupported, match="it is an encoder, whose positions see all of the text"):
        removal.add(run, model)
    with pytest.raises(PatternError, match=r"is about the token that comes next.*an encoder, which reads it"):
        hypothesis(run, model, (0, 1), "nextword:city")


@torch.no_grad()
def _planted() -> PreTrainedModel:
    """A BERT whose neuron 3 of layer 0 is active where the token is " Paris", whatever stands around it."""
    hf = tiny("bert", "masked")
    first, embeddings = hf.bert.encoder.layer[0], hf.bert.embeddings
    first.attention.output.dense.weight.zero_()
    first.attention.output.dense.bias.zero_()
    for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.zero_()
    for norm in (embeddings.LayerNorm, first.attention.output.LayerNorm):
        norm.weight.fill_(1)
        norm.bias.zero_()
    vectors = embeddings.LayerNorm(embeddings.word_embeddings.weight)
    key = vectors[tokenizer().convert_tokens_to_ids("ĠParis")]
    first.intermediate.dense.weight[3] = key
    second = (vectors @ key).sort(descending=True).values[1]
    first.intermediate.dense.bias[3] = -(key @ key + second) / 2
    return hf


def test_patterns_of_an_encoder_are_those_of_its_positions(tmp_path: Path) -> None:
    """A planted neuron is found and confirmed both ways; the family of the next token is left out, which is said; and
    the study answers what applies to an encoder.
    """
    model = load_model(_planted(), tokenizer=reading())
    run = open_run(build(model, texts(400), tmp_path / "run", top=20).path)
    said: list[str] = []
    report = run.patterns(budget=20_000, model=model, report=lambda step: said.append(step.note))
    assert any("patterns of the next token are not looked for" in note for note in said)
    tests = run.table("patterns").collect()["tests"].unique().to_list()
    assert "next" not in tests and "main" in tests and report is not None
    claim = run.test((0, 3), "words:paris", model=model).claim
    assert (claim.precision.value, claim.recall.value, claim.f1.value) == (1.0, 1.0, 1.0), claim
    study = run.study(fast=True, model=model)
    told = {section.name: section for section in study.sections}
    assert all(told[name].findings for name in ("glance", "keys", "values", "weights", "distributions"))
    for name in (
        "removal",
        "refinement",
        "contributions",
        "crosslayer",
        "questions",
        "cases",
        "lens",
        "groups",
    ):
        assert (
            not told[name].findings and "encoder" in told[name].missing and ";" not in told[name].missing[:40]
        )


PROMPT = "the capital of <mask> is Paris"


def test_the_page_of_an_encoder_marks_the_masked_token(tmp_path: Path) -> None:
    """The outline in the prompt is around what is predicted, not around its end."""
    model = load_model(tiny("bert", "masked"), tokenizer=reading())
    explain(model, PROMPT, "France").save(tmp_path / "page.html")
    marked = re.findall(
        r'<span[^>]*class="\w+ explained"[^>]*>([^<]*)</span>', (tmp_path / "page.html").read_text()
    )
    assert marked == [" &lt;mask&gt;"] or marked == ["&lt;mask&gt;"]


@pytest.mark.parametrize("family", slow_but_for(MASKED, ("bert", "albert")))
def test_a_masked_token_is_explained_and_adds_up(family: str) -> None:
    """Every part of the contrast is shown and nothing is left; logits of parts give that of the model."""
    model = load_model(tiny(family, "masked"), tokenizer=reading())
    told = explain(model, PROMPT, "France", "London", top=100_000)
    tokens = model.tokenizer(PROMPT)["input_ids"]
    place = tokens.index(model.tokenizer.mask_token_id)
    assert told.masked and told.position == place and told.tokens.height == len(tokens)
    assert told.heads["source"].max() == len(tokens) - 1
    assert abs(told.contrasts[0].remainder) <= 1e-4
    logits = sum(frame["logit"].sum() for frame in (told.heads, told.neurons, told.others))
    assert logits == pytest.approx(told.stream["logit"][-1], abs=1e-4)
    own = model.hf(torch.tensor([tokens])).logits[0, place].detach().log_softmax(-1)
    assert told.log_probability == pytest.approx(float(own[told.target.token]), abs=1e-4)
    assert told.account["nats"][-1] == pytest.approx(told.log_probability, abs=1e-6)
    assert "masked" in str(told) and "next " not in str(told)
    assert told.predictions["token"][0] == int(own.argmax())


@pytest.mark.parametrize("family", slow_but_for(DECODERS, ("bart", "mbart")))
def test_a_decoder_made_for_an_encoder_is_explained_by_itself(family: str) -> None:
    """Of BART to Whisper, and ModernBERT's: no cross attention without an encoder; its predictions add up."""
    model = load_model(tiny(family, "causal"), tokenizer=tokenizer())
    assert model.self_check <= 1e-5 and not model.anatomy.bidirectional
    told = explain(model, "the city of", "Paris", "London", top=100_000)
    assert abs(told.contrasts[0].remainder) <= 1e-4
    own = model.hf(torch.tensor([model.tokenizer("the city of")["input_ids"]])).logits[0, -1].detach()
    assert told.log_probability == pytest.approx(float(own.log_softmax(-1)[told.target.token]), abs=1e-4)
    assert bool(told.queries.height) == model.anatomy.adds_up_as_read


def test_what_switched_neurons_on_is_told_where_the_stream_is_a_sum() -> None:
    """Of a pre-norm encoder without a transform it adds up to the coefficient; of others a note says that it is not."""
    plain = load_model(tiny("eurobert", "masked"), tokenizer=reading())
    told = explain(plain, PROMPT, "France")
    assert told.queries.height and told.attention_queries.height and not told.neurons["chain"].has_nulls()
    shares = told.queries.group_by("layer", "neuron").agg(pl.col("share").sum())
    for layer, neuron, share in shares.iter_rows():
        (coefficient,) = told.neurons.filter(pl.col("layer") == layer, pl.col("neuron") == neuron)[
            "coefficient"
        ]
        assert share == pytest.approx(coefficient, rel=1e-4, abs=1e-5)
    other = explain(load_model(tiny("bert", "masked"), tokenizer=reading()), PROMPT)
    assert not other.queries.height and any("normalised on the way" in note for note in other.notes)


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("the capital of France", {}, "the prompt has none; write <mask> once"),
        ("<mask> of <mask>", {}, "the prompt has 2 of them; write <mask> once"),
        (PROMPT, {"position": 1}, "leave the position out"),
        (PROMPT, {"ablate": 2}, "leave ablate= out"),
        (PROMPT, {"target": "Paris king", "foils": "Paris queen"}, "a mask stands for one token"),
    ],
)
def test_a_question_that_an_encoder_cannot_answer(prompt: str, options: dict[str, Any], reason: str) -> None:
    """Each is one line that says what to do."""
    model = load_model(tiny("bert", "masked"), tokenizer=reading())
    with pytest.raises((QueryError, ModelNotSupported)) as caught:
        explain(model, prompt, **options)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_a_head_predicts_nothing() -> None:
    """A sentence encoder is not explained, and a tokenizer without a mask is named."""
    body = load_model(tiny("bert", "masked").base_model, tokenizer=reading())
    with pytest.raises(ModelNotSupported, match="it has no language-model head"):
        explain(body, PROMPT)
    bare = load_model(tiny("bert", "masked"), tokenizer=tokenizer())
    with pytest.raises(QueryError, match="its tokenizer has no mask token"):
        explain(bare, PROMPT)


def test_a_body_without_a_head_closes_on_its_own_states() -> None:
    """A sentence encoder has no logits: its last states are read through its input embedding."""
    model = tiny("bert", "masked").base_model
    anatomy, error = examine(model)
    assert error <= 1e-5 and anatomy.headless and anatomy.transform is None
    stream = trace(model, anatomy, TOKENS)
    torch.testing.assert_close(stream.final, model(TOKENS).last_hidden_state[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(anatomy.unembedding(), model.embeddings.word_embeddings.weight)


def test_a_decoder_of_the_same_blocks_looks_back_only() -> None:
    """With is_decoder a BERT is a decoder whose stream is normalised; it closes, and its predictions add up."""
    hf = tiny("bert", "causal")
    hf.config.is_decoder = hf.base_model.config.is_decoder = True
    for module in hf.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
        if hasattr(module, "is_decoder"):
            module.is_decoder = True
    model = load_model(hf, tokenizer=tokenizer())
    assert model.self_check <= 1e-5 and not model.anatomy.bidirectional
    told = explain(model, "the city of", "Paris", "London", top=10_000)
    assert told.position == 2 and told.sources["source"].max() == 2 and not told.masked
    assert abs(told.contrasts[0].remainder) <= 1e-4
