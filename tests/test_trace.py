"""How neurons see a text: their coefficients, how unusual these are, and against which chance."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from test_views import HOSTILE, assert_self_contained
from tiny import texts, tokenizer
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope.cli import app
from mnemoscope.display import WIDTH
from mnemoscope.errors import QueryError, RunMismatch
from mnemoscope.mine.places import HISTOGRAM_EDGES, bin_of
from mnemoscope.model.model import Model
from mnemoscope.tracing.trace import trace
from mnemoscope.tracing.traced import Distributions, Trace
from mnemoscope.views.trace import followed_cells, found_cells
from mnemoscope.views.trace import page as page_of

TEXT = " the capital of France is Paris and the queen of London"


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama."""
    return mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run of it, with pseudo-neurons."""
    return mn.build(model, texts(120), tmp_path_factory.mktemp("runs") / "run", top=5)


@pytest.fixture(scope="module")
def found(model: Model, run: mn.Run) -> Trace:
    """The most unusual neurons of TEXT."""
    return trace(model, TEXT, run=run, top=4)


def hooked(model: Model, text: str) -> np.ndarray:
    """f32[layer token neuron]: the inputs of the down projections in a plain forward pass."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
        for layer in model.anatomy.layers
    ]
    tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        model.hf(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return torch.stack([part.reshape(tokens.shape[1], -1) for part in seen]).float().numpy()


def slow_tail(run: mn.Run, layer: int, neuron: int, x: float) -> float:
    """The definition, for one number."""
    counts = run.rows("histograms", layer, neuron)["counts"][0].to_numpy()
    place, total = int(bin_of(np.array([x]))[0]), int(counts.sum())
    above, below = int(counts[place:].sum()), int(counts[: place + 1].sum())
    return min(1.0, 2 * min(1 + above, 1 + below) / (1 + total))


# -- coefficients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_coefficients_are_a_plain_hooks(family: str) -> None:
    """Of every token, with the signs of both branches where there are two; nothing of this needs a run."""
    model = mn.load_model(FAMILIES[family](), tokenizer=tokenizer())
    wanted = hooked(model, TEXT)
    asked = [(1, 7), (0, 3), (2, 39)]
    result = trace(model, TEXT, neurons=asked)
    assert [tuple(one.neuron) for one in result.neurons] == asked
    for one, (layer, neuron) in zip(result.neurons, asked, strict=True):
        values = [reading.coefficient for reading in one.readings]
        np.testing.assert_allclose(values, wanted[layer, :, neuron], rtol=1e-4, atol=1e-6)
        assert all((reading.gate is not None) == model.anatomy.gated for reading in one.readings)
        assert all(reading.tail is None and reading.trigger is None for reading in one.readings)
        if model.anatomy.activation == "silu":  # has the sign of its input, so the branches' signs multiply
            assert all(r.gate * r.up == np.sign(r.coefficient) for r in one.readings)  # type: ignore[operator]


def test_the_text_is_framed_as_contexts_are(run: mn.Run, model: Model) -> None:
    """A document of the run, traced, has the coefficients of its triggers at their positions."""
    rows = run.table("triggers").filter((pl.col("layer") == 1) & (pl.col("neuron") == 7)).collect()
    row = rows.row(0, named=True)
    tokens = run.contexts([row["context"]])[row["context"]].tokens
    words = "".join(run.vocabulary.pieces(tokens.tolist()))
    (one,) = trace(model, words, run=run, neurons=[(1, 7)]).neurons
    reading = one.readings[row["position"]]
    assert reading.coefficient == pytest.approx(row["coefficient"], rel=1e-4)
    assert reading.trigger


# -- tails --------------------------------------------------------------------------------------------------


def test_tails_are_the_definition(found: Trace, run: mn.Run) -> None:
    """Tail, number expected by chance and deviations, of everything that is listed, by plain numpy."""
    listed = [one.reading for readings in found.unusual for one in readings]
    assert len(listed) == 4 * sum(token.counted for token in found.tokens)
    for reading in listed:
        assert reading.tail == pytest.approx(slow_tail(run, *reading.neuron, reading.coefficient))
        assert reading.expected == pytest.approx(reading.tail * 3 * 40)
        row = run.rows("neurons", *reading.neuron).row(0, named=True)
        far = (reading.coefficient - row["mean"]) / row["std"]
        assert reading.deviations == pytest.approx(far, rel=1e-4)


def test_the_most_unusual_are_first(found: Trace, model: Model, run: mn.Run) -> None:
    """At each counted token exactly those that a sort of all neurons puts first: tail, deviations, address."""
    values = hooked(model, TEXT)
    for token, listed in zip(found.tokens, found.unusual, strict=True):
        if not token.counted:
            assert listed == ()
            continue
        order = []
        for layer in range(3):
            known = Distributions.of(run, layer)
            tails, far = known.tails(values[layer]), known.deviations(values[layer])
            order += [
                (tails[token.position, neuron], -abs(far[token.position, neuron]), layer, neuron)
                for neuron in range(40)
            ]
        assert [tuple(one.reading.neuron) for one in listed] == [key[2:] for key in sorted(order)[:4]]


_EDGES = HISTOGRAM_EDGES[1:-1]


@given(
    st.lists(
        st.one_of(st.sampled_from(_EDGES.tolist()), st.floats(-1e5, 1e5, width=32)), min_size=1, max_size=30
    )
)
def test_bins_are_those_of_the_histograms(values: list[float]) -> None:
    """The bin of a number, edges included, is the one that it was counted in."""
    numbers = np.array([values], np.float32).T
    known = Distributions(np.ones((1, len(_EDGES) + 1), np.int64), _EDGES, np.zeros(1), np.ones(1))
    assert (known.bins(numbers)[:, 0] == bin_of(numbers[:, 0])).all()


@given(st.lists(st.integers(0, 40), min_size=5, max_size=5), st.floats(-9000, 9000, width=32))
def test_a_tail_is_a_probability(counts: list[int], x: float) -> None:
    """Between what so many coefficients can show and 1, and the less likely the farther out."""
    edges = np.array([-4.0, -1.0, 1.0, 4.0])
    known = Distributions(np.array([counts]), edges, np.zeros(1), np.ones(1))
    tail = known.tails(np.array([[x]], np.float32))[0, 0]
    assert min(1.0, 2 / (1 + sum(counts))) <= tail <= 1
    ladder = known.tails(np.array([[2], [8], [1e4]], np.float32))[:, 0]
    assert (np.diff(ladder) <= 0).all() or sum(counts[3:]) >= sum(counts[:4])


def test_tails_keep_their_level() -> None:
    """On text like the run's a tail of p or less comes up in at most p of cases: drawn from one distribution."""
    random = np.random.default_rng(0)
    drawn = random.standard_t(3, size=(200, 1001)).astype(np.float32)
    counts = np.stack([np.bincount(bin_of(row), minlength=len(_EDGES) + 1) for row in drawn[:, 1:]])
    known = Distributions(counts, _EDGES, np.zeros(200), np.ones(200))
    tails = known.tails(drawn[:, :1].T)[0]
    for level in (0.01, 0.05, 0.2):
        slack = 3 * np.sqrt(level / len(tails))
        assert (tails <= level).mean() <= level + slack


# -- what stands out, and against what ----------------------------------------------------------------------


@torch.no_grad()
def test_a_planted_neuron_is_found(tmp_path: Path) -> None:
    """A neuron made to answer to one word that the run's text never has is the most unusual where that word stands,
    and nowhere else."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    (paris,) = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    layer = model.anatomy.layers[0]
    layer.attention_out.weight.zero_()  # so that its input depends on the token alone
    assert layer.ffn_norm is not None
    (seen,) = layer.ffn_norm(model.anatomy.token_vectors(torch.tensor([paris])))
    for part in (layer.gate, layer.up):
        assert part is not None
        part.weight()[11] = 8 * seen / seen.norm() ** 2
    layer.values()[11] *= 1e-3  # so that nothing further up is unusual, too
    without = [text.replace("Paris", "Berlin") for text in texts(120)]
    run = mn.build(model, without, tmp_path / "run", top=3)
    result = trace(model, TEXT, run=run, top=3)
    first = [readings[0].reading.neuron if readings else None for readings in result.unusual]
    places = [token.position for token in result.tokens if token.token == paris]
    assert places
    assert [at for at, neuron in enumerate(first) if neuron == (0, 11)] == places
    (one,) = trace(model, TEXT, run=run, neurons=[(0, 11)]).neurons
    assert [reading.position for reading in one.readings if (reading.tail or 1) < 0.02] == places


@pytest.mark.slow
def test_shares_stand_beside_those_of_pseudo_neurons(found: Trace, model: Model, run: mn.Run) -> None:
    """At each token the share of neurons beyond the level, and of every kind of pseudo-neuron; the level can be met."""
    assert set(found.shares) == {"neuron", "random", "rotated"}
    assert found.level is not None and found.counted is not None
    assert found.level >= 2 / (1 + found.counted)
    values = hooked(model, TEXT)
    for token, share in zip(found.tokens, found.shares["neuron"], strict=True):
        tails = [
            slow_tail(run, layer, neuron, values[layer, token.position, neuron])
            for layer in range(3)
            for neuron in range(40)
        ]
        wanted = np.mean(np.array(tails) <= found.level) if token.counted else None
        assert share == (None if wanted is None else pytest.approx(wanted))


def test_a_run_without_pseudo_neurons_says_less(model: Model, tmp_path: Path) -> None:
    """The tails are there, and no share of what the run does not have."""
    bare = mn.build(model, texts(30), tmp_path / "run", top=3, nulls=())
    result = bare.trace(TEXT, model=model)
    assert set(result.shares) == {"neuron"}
    assert "random" not in str(result)


def test_tokens_that_do_not_count(model: Model, run: mn.Run) -> None:
    """The first token and special tokens have coefficients and nothing else, wherever they stand."""
    text = " the capital</s> of France"
    result = trace(model, text, run=run, top=1)
    special = [token.position for token in result.tokens if token.token == 2]
    assert special
    assert [token.position for token in result.tokens if not token.counted] == [0, *special]
    (one,) = trace(model, text, run=run, neurons=[(1, 3)]).neurons
    silent = [reading.position for reading in one.readings if reading.tail is None]
    assert silent == [0, *special]
    assert result.shares["neuron"][0] is None


def test_without_a_run_what_writes_most_is_first(model: Model) -> None:
    """Ranked by |coefficient| x norm of the value, and said so, as there is no distribution."""
    result = trace(model, TEXT, top=3)
    values = np.abs(hooked(model, TEXT))
    norms = np.stack([layer.values().detach().norm(dim=1).numpy() for layer in model.anatomy.layers])
    sizes = values * norms[:, None, :]
    for token, listed in zip(result.tokens, result.unusual, strict=True):
        if token.counted:
            wanted = np.sort(sizes[:, token.position].ravel())[::-1][:3]
            np.testing.assert_allclose([one.reading.size for one in listed], wanted, rtol=1e-4)
            assert all(one.reading.tail is None for one in listed)
    assert "there is no null" in " ".join(str(result).split())


@pytest.mark.slow
def test_what_is_written_goes_by_the_sign(found: Trace, run: mn.Run) -> None:
    """The tokens beside a coefficient are what the value promotes, or what it suppresses where it is negative."""
    for readings in found.unusual:
        for one in readings:
            shown = run[tuple(one.reading.neuron)]
            promoted = shown.writes(1 if one.reading.coefficient > 0 else -1)
            assert one.writes == tuple(token.text for token in promoted[:6])


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "longer text"),
        (" the", {}, "longer text"),
        (" the" * 100, {}, "100 tokens"),
        (TEXT, {"neurons": [(9, 0)]}, "L9N0"),
        (TEXT, {"top": 0}, "top=0"),
    ],
)
def test_what_cannot_be_traced_is_one_line(
    text: str, options: dict[str, object], words: str, model: Model, run: mn.Run
) -> None:
    """The line says what was given and what to do."""
    with pytest.raises(QueryError, match=re.escape(words)) as caught:
        trace(model, text, run=run, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused(run: mn.Run) -> None:
    """The run's distributions say nothing of another model."""
    other = mn.load_model(FAMILIES["gpt2"](), tokenizer=tokenizer())
    with pytest.raises(RunMismatch, match="tracing"):
        run.trace(TEXT, model=other)


# -- views and doors ----------------------------------------------------------------------------------------


def hostile(result: Trace) -> Trace:
    """The same with a token that would be markup."""
    tokens = (*result.tokens[:1], replace(result.tokens[1], text=HOSTILE), *result.tokens[2:])
    return replace(result, tokens=tokens)


@pytest.mark.parametrize("kind", ["search", "follow", "bare"])
def test_views_show_every_number(kind: str, model: Model, run: mn.Run) -> None:
    """Terminal and page agree, fit 80 columns, stand by themselves, and show a hostile token as text."""
    options = {"neurons": [(1, 7), (0, 3)]} if kind == "follow" else {"top": 2}
    result = hostile(trace(model, TEXT, run=None if kind == "bare" else run, **options))  # type: ignore[arg-type]
    shown, page = str(result), assert_self_contained(page_of(result))
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "script" not in page.tags
    assert HOSTILE in page.text
    words = " ".join(shown.split())
    columns = {
        "search": ("tail:", "deviations:", "by chance:"),
        "follow": ("tail:", "deviations:", "gate, up:"),
    }
    assert all(name in page.text and name in words for name in columns.get(kind, ()))
    for one in result.neurons:
        for reading in one.readings:
            assert all(cell in page.text and cell in shown for cell in followed_cells(result, reading)[2:])
    for readings in result.unusual:
        for found in readings:
            assert all(cell in page.text and cell in shown for cell in found_cells(result, found.reading))
    assert "<style>" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict()))["tokens"][1]["text"] == HOSTILE


def test_doors_agree(model: Model, run: mn.Run) -> None:
    """From a run, its folder and its model, by any address: the same trace."""
    one = run.trace(TEXT, "L1N7", model=model)
    opened = mn.open_run(run.path)
    opened._model = model
    several = [opened.trace(TEXT, given) for given in ((1, 7), ["L1N7"], [(1, 7), "L1N7"])]
    several.append(mn.trace(opened, TEXT, "1.7"))
    assert all(other.to_dict() == one.to_dict() for other in several)
    assert mn.trace(model, TEXT, "L1N7").run is None


def test_the_command(run: mn.Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminal, JSON and page of a run and of a model; bad options are refused before a model is loaded."""
    from mnemoscope.cli import explain as command

    monkeypatch.setattr(command, "model_of", lambda *_: model)
    monkeypatch.setattr(command, "load", lambda *_: model)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["trace", str(run.path), TEXT, "--neuron", "L1N7", "--html", str(page)])
    assert (done.exit_code, page.exists()) == (0, True), done.output
    assert "L1N7" in done.output
    done = CliRunner().invoke(app, ["trace", "somewhere/model", TEXT, "--top", "1", "--json"])
    assert json.loads(done.stdout)["run"] is None
    monkeypatch.setattr(command, "model_of", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
    for words in (
        [str(run.path), TEXT, "--top", "0"],
        [str(run.path), TEXT, "--neuron", "banana"],
        [str(run.path), TEXT, "--neuron", "L9N0"],
        [str(run.path), TEXT, "--dtype", "fp32"],
        [str(run.path), TEXT, "--html", str(tmp_path / "nowhere" / "page.html")],
        ["somewhere/model", TEXT, "--model", "elsewhere"],
    ):
        refused = CliRunner().invoke(app, ["trace", *words])
        assert isinstance(refused.exception, mn.errors.MnemoscopeError), (words, refused.output)
