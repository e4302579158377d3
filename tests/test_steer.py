"""Steering: a neuron is changed at every position, and the model writes on as a slow definition says that it does."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from every_family import tiny as encoders
from families import FAMILIES, MIXTURES, slow_but_for
from tiny import model_folder, texts, tokenizer

import mnemoscope as mn
from mnemoscope.cli import main
from mnemoscope.errors import ModelNotSupported, QueryError
from mnemoscope.model.model import Model
from mnemoscope.prediction.steer import steer
from mnemoscope.prediction.steered import SteeredText

PROMPT = "The capital of France"
UNIT = (1, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model from a folder."""
    return mn.load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")


def slowly(model: Model, unit: tuple[int, int] | None, factor: float, value: float, length: int) -> list[int]:
    """The prompt read from its beginning for each token, alone in its batch, by a hook of one's own."""
    layer, neuron = unit or UNIT

    def change(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        changed = inputs[0].clone()
        changed[..., neuron] = factor * changed[..., neuron] + value
        return (changed, *inputs[1:])

    down = model.anatomy.layers[layer].down
    assert down is not None
    ids = list(model.tokenizer(PROMPT)["input_ids"])
    start = len(ids)
    for _ in range(length):
        handle = down.register_forward_pre_hook(change) if unit else None
        with torch.inference_mode():
            ids.append(int(model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if handle:
            handle.remove()
    return ids[start:]


def words_of(model: Model, ids: list[int]) -> tuple[str, ...]:
    """Tokens as a result shows them."""
    from mnemoscope.text.spelling import vocabulary_of

    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    own = list(model.tokenizer(PROMPT)["input_ids"])
    return tuple(words.visible(piece, edges=False) for piece in words.pieces(own + ids)[len(own) :])


def without_end(model: Model) -> Model:
    """The same, which never ends a text: a random model would at any moment."""
    model.hf.generation_config.eos_token_id = model.hf.config.eos_token_id = None
    model.tokenizer.eos_token = None
    return model


@pytest.mark.parametrize("family", slow_but_for(FAMILIES, ("llama", "opt")))
@pytest.mark.parametrize(("factor", "value"), [(0.0, 0.0), (-3.0, 0.0), (0.0, 9.0)])
def test_texts_are_those_of_a_plain_hook(family: str, factor: float, value: float) -> None:
    """As it is, with the neuron changed, and with the control, of every family: gated, plain, parallel, flattened."""
    model = without_end(mn.load_model(FAMILIES[family](), tokenizer=tokenizer()))
    result = steer(model, PROMPT, UNIT, factor=factor, value=value, length=5)
    assert result.control is not None and result.control.neuron is not None
    assert result.control.neuron.layer == 1 and result.control.neuron != UNIT
    for text, unit in ((result.whole, None), (result.changed, UNIT), (result.control, result.control.neuron)):
        assert text.tokens == words_of(model, slowly(model, unit, factor, value, 5))
        assert all(0 < likely <= 1 for likely in text.probabilities)
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


def test_experts_are_changed_where_they_run() -> None:
    """The neuron of an expert, set far off, changes the text where the router chose the expert, and only that row."""
    model = without_end(mn.load_model(MIXTURES["mixtral"](), tokenizer=tokenizer()))
    width = model.anatomy.layers[1].experts.width
    changed = 0
    for expert in range(4):
        result = steer(model, PROMPT, (1, expert * width + 3), value=300.0, length=6)
        plain = steer(model, PROMPT, (0, 1), factor=1.0, length=6).whole
        assert (
            result.whole.tokens == plain.tokens
        )  # rows of an expert are multiplied together: to the last bits
        assert result.whole.probabilities == pytest.approx(plain.probabilities, rel=1e-5)
        changed += result.changed.shared < len(result.changed.tokens)
    assert changed > 0


def test_nothing_changed_is_the_same_text(model: Model) -> None:
    """Times 1, plus 0."""
    result = steer(model, PROMPT, UNIT, factor=1.0)
    for text in result.texts:
        assert (text.tokens, text.ended) == (result.whole.tokens, result.whole.ended)
        assert text.probabilities == pytest.approx(result.whole.probabilities, rel=1e-4)
        assert text.shared == len(text.tokens)


def test_a_text_ends_where_the_model_ends_it(model: Model) -> None:
    """At any of its tokens for the end, which is not shown."""
    third = slowly(model, None, 1.0, 0.0, 3)[2]
    before = model.hf.generation_config.eos_token_id
    model.hf.generation_config.eos_token_id = [third]
    try:
        result = steer(model, PROMPT, UNIT, factor=1.0, length=10)
    finally:
        model.hf.generation_config.eos_token_id = before
    assert result.whole.ended and len(result.whole.tokens) <= 2
    assert "(the end)" in str(result)


def test_a_step_can_be_stopped(model: Model) -> None:
    """Whoever reports may end the work, and the model is left as it was."""

    def report(progress: Any) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steer(model, PROMPT, UNIT, report=report)
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"neuron": (9, 1)}, "out of range"),
        ({"prompt": ""}, "has no tokens"),
        ({"length": 0}, "give 1 or more"),
        ({"length": 10_000}, "tokens at most"),
        ({"factor": float("nan")}, "numbers up to a million"),
        ({"value": 1e9}, "numbers up to a million"),
    ],
)
def test_what_is_refused(model: Model, options: dict[str, Any], words: str) -> None:
    """In a line."""
    asked = {"prompt": PROMPT, "neuron": UNIT} | options
    with pytest.raises(QueryError, match=words) as error:
        steer(model, asked.pop("prompt"), asked.pop("neuron"), **asked)
    assert "\n" not in str(error.value)


def test_an_encoder_does_not_go_on() -> None:
    """It is told which models do."""
    model = mn.load_model(encoders("bert", "masked"), tokenizer=tokenizer())
    with pytest.raises(ModelNotSupported, match="encoder"):
        steer(model, PROMPT, UNIT)


def test_a_run_steers_and_says_what_differs(model: Model, tmp_path: Any) -> None:
    """By an address; the words say where texts part, and that a run of another model is refused."""
    run = mn.build(model, texts(20), tmp_path / "run", top=3)
    result = run.steer(PROMPT, "L1N7", value=200.0, length=4, model=model)
    assert "L1N7 of" in str(result) and "set to 200" in str(result)
    assert result.to_dict()["changed"]["neuron"] == "L1N7" and result.to_dict()["whole"]["neuron"] is None
    if result.changed.shared < 4:
        assert "instead of" in str(result)
    parted = SteeredText(result.neuron, ("<b>", "x"), (0.5, 0.25), False, 0)
    from dataclasses import replace

    other = replace(result, changed=parted)
    assert "&lt;b&gt;" in other._repr_html_() and "begins with “&lt;b&gt;”" in other._repr_html_()
    page = tmp_path / "steered.html"
    other.save(page)
    shown = page.read_text(encoding="utf-8")
    assert shown.count("<section>") == len(other.texts) and "set to 200 at every position" in shown
    assert shown.count('title="probability ') == sum(len(text.tokens) for text in other.texts)


def test_the_command_steers_as_python_does(
    model: Model, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same texts, as JSON, and a page."""
    folder = tmp_path / "model"
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    run = mn.build(mn.load_model(folder, dtype="fp32"), texts(20), tmp_path / "run", top=3)
    words = (
        "steer",
        run.path,
        "L1N7",
        PROMPT,
        "--value",
        200,
        "--length",
        4,
        "--html",
        tmp_path / "page.html",
    )
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, words), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    wanted = run.steer(PROMPT, "L1N7", value=200.0, length=4).to_dict()
    assert found == json.loads(json.dumps(wanted))
    assert "L1N7" in (tmp_path / "page.html").read_text(encoding="utf-8")
