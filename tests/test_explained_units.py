"""A prediction taken apart into units that are not neurons: with their errors the account adds up exactly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import tiny
from families import FAMILIES, MIXTURES
from tiny import tokenizer
from units import random_units, saelens, tracer

from mnemoscope import explain, load_model
from mnemoscope.exchange.graph import graph
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import replaced
from mnemoscope.prediction.ablate import Cut, effects
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.prediction.steer import steer
from mnemoscope.prediction.switched import _below_units, _Written
from mnemoscope.prediction.switching import Switches, switches
from mnemoscope.prediction.traced import TracedPrediction
from mnemoscope.text.spelling import vocabulary_of

PROMPT = " the capital of France is"
LAYER = 1
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
CASES = [(family, hook) for family in ("llama", "gpt2", "gemma2") for hook in HOOKS]
CASES += [
    ("gpt_neox", "hook_resid_post"), ("gpt_neox", "hook_mlp_out"), ("granite", "hook_mlp_out"),
    ("mixtral", "hook_resid_post"), ("mixtral", "hook_attn_out"), ("bert", "hook_resid_post"), ("bert", "hook_mlp_out"),
    ("llama", "transcoder"), ("gemma2", "transcoder"), ("llama", "across"), ("gemma2", "across"), ("granite", "across"),
]  # fmt: skip
QUICK = (("llama", "hook_resid_post"), ("gemma2", "hook_mlp_out"), ("llama", "across"))


@cache
def model_of(family: str, hook: str, folder: Path) -> Model:
    """A tiny model with random units: their error is large, and must be all that is left."""
    hf = tiny("bert", "masked") if family == "bert" else {**FAMILIES, **MIXTURES}[family]()
    width, layers = hf.config.hidden_size, hf.config.num_hidden_layers
    if hook in ("transcoder", "across"):
        name = f"transcoder:{tracer(folder / 't', layers, width, 20, across=hook == 'across')}"
    else:
        kept = {"normalize_activations": "layer_norm"} if hook == "hook_resid_mid" else {}
        place = saelens(folder / "s", random_units(width, 20), f"blocks.{LAYER}.{hook}", **kept)
        name = f"sae:{place}"
    return load_model(hf, tokenizer=tokenizer(), units=name)


def traced(model: Model) -> tuple[Stream, int]:
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    with model.running(), torch.inference_mode():
        return model.traced(tokens), tokens.shape[1] - 2


def parts_of(stream: Stream, position: int) -> dict[str, torch.Tensor]:
    """The sum of each kind of part over all layers."""
    sums = {"embedding": stream.embedding_part(position), "constant": stream.constant(position)}
    for layer in range(stream.anatomy.n_layers):
        named = [("heads", stream.attention_parts(layer, position).sum((0, 1)))]
        named += [("units", stream.neuron_parts(layer, position).sum(0))]
        named += [(name, vector) for name, _, vector in stream.beside(layer, position)]
        for name, vector in named:
            sums[name] = sums.get(name, torch.zeros_like(vector)) + vector
    return sums


def _slow(case: tuple[str, str]) -> Any:
    return pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("family", "hook"), list(map(_slow, CASES)))
def test_units_errors_and_all_else_add_up(family: str, hook: str, tmp_path: Path) -> None:
    """Embedding, heads, units, biases, FFNs without units and errors are the final residual, at every position."""
    model = model_of(family, hook, tmp_path)
    stream, position = traced(model)
    for place in range(position + 1):
        sums = parts_of(stream, place)
        total = sum(sums.values(), torch.zeros_like(sums["units"]))
        final = stream.final[place].float()
        assert float((total - final).abs().max() / final.abs().max()) < 1e-5
        assert "unit error" in sums and bool(sums["unit error"].any()) and bool(sums["units"].any())
        # What is dropped shows.
        assert float((total - sums["unit error"] - final).abs().max() / final.abs().max()) > 1e-3


@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out", "hook_attn_out"])
def test_a_unit_writes_its_coefficient_times_its_value(hook: str, tmp_path: Path) -> None:
    """In a llama, which normalises nothing on the way: an exact vector, at the layer that it belongs to."""
    model = model_of("llama", hook, tmp_path)
    stream, position = traced(model)
    units = model.anatomy.layers[LAYER].units
    assert units is not None
    coefficients = stream.layers[LAYER].coefficients[position]
    chosen = coefficients.topk(3).indices
    expected = coefficients[chosen, None] * random_units(model.anatomy.width, 20)["W_dec"][chosen]
    assert torch.allclose(stream.neuron_parts(LAYER, position, chosen), expected, atol=1e-6)
    for layer in set(range(model.anatomy.n_layers)) - {LAYER}:
        assert stream.neuron_parts(layer, position).shape[0] == 0


def _explained(family: str, hook: str, folder: Path, lens: str) -> tuple[Model, Explanation]:
    model = model_of(family, hook, folder)
    return model, explain(model, PROMPT, " Paris", [" London"], lens=lens, top=5)


@pytest.mark.parametrize(("family", "hook"), [_slow(case) for case in CASES if case[0] != "bert"])
def test_the_account_of_units_adds_up(family: str, hook: str, tmp_path: Path) -> None:
    """From no information to the model's own log-probability, under two lenses; so does the contrast with a foil."""
    for lens in ("frozen", "own"):
        model, explanation = _explained(family, hook, tmp_path, lens)
        with torch.no_grad():
            logits = model.hf(torch.tensor([model.tokenizer(PROMPT)["input_ids"]])).logits[0, -1].double()
        expected = float(logits.log_softmax(0)[explanation.target.token])
        assert explanation.account["nats"][-1] == pytest.approx(expected, abs=1e-4)
        assert float(explanation.layers["increase"].sum()) == pytest.approx(explanation.total, abs=1e-4)
        contrast = explanation.contrasts[0]
        gained = float(contrast.layers["increase"].sum())
        assert gained == pytest.approx(contrast.total - contrast.start, abs=1e-4)
        for row in explanation.remainders.iter_rows(named=True):
            assert row["shown"] + row["remainder"] == pytest.approx(row["total"], abs=1e-9)
    assert "unit error" in explanation.others["part"].to_list()
    assert explanation.queries.height > 0 and "units of" in " ".join(explanation.notes)


def test_the_logits_of_all_rows_add_up(tmp_path: Path) -> None:
    """Where units stand for the stream, its logit is that of all units, their bias and their error (frozen lens)."""
    model, explanation = _explained("llama", "hook_resid_post", tmp_path, "frozen")
    assert explanation.unit_part == "stream"
    whole = explain(model, PROMPT, " Paris", lens="frozen", top=1000)
    beside = whole.others.filter(pl.col("part").is_in(["unit bias", "unit error"]))["logit"].sum()
    stream = whole.layers.filter(pl.col("part") == "stream")["logit"].sum()
    assert whole.neurons["logit"].sum() + beside == pytest.approx(stream, abs=1e-4)
    heads = whole.heads.filter(pl.col("layer") <= LAYER)
    assert (heads["logit"] == 0).all(), "units stand for all that heads wrote up to there"
    text = str(whole)
    assert "of units, attention and FFN together" in " ".join(text.split())
    assert "errors of units" in text and "all that units stand for" in text and "L1N" in text
    assert "errors of units" in whole._repr_html_()


def test_of_several_layers_the_last_stands_for_the_stream(tmp_path: Path) -> None:
    """Units of the layers below are inside of what it reads, and write nothing beside it."""
    hf = FAMILIES["llama"]()
    for layer in (0, 1):
        saelens(
            tmp_path / "s" / str(layer),
            random_units(hf.config.hidden_size, 20, layer),
            f"blocks.{layer}.hook_resid_post",
        )
    model = load_model(hf, tokenizer=tokenizer(), units=f"sae:{tmp_path / 's'}")
    stream, position = traced(model)
    assert replaced(model.anatomy) == 4
    assert not stream.neuron_parts(0, position).any() and stream.neuron_parts(1, position).any()
    sums = parts_of(stream, position)
    total = sum(sums.values(), torch.zeros_like(sums["units"]))
    assert np.allclose(total, stream.final[position], atol=1e-4)


# -- units taken out of a forward pass ------------------------------------------------------------------------------

# Whose output passes the point, in a block; behind its post-norm.
WRITERS = {
    ("llama", "hook_attn_out"): "self_attn", ("llama", "hook_mlp_out"): "mlp", ("granite", "hook_mlp_out"): "mlp",
    ("gemma2", "hook_attn_out"): "post_attention_layernorm", ("gemma2", "hook_mlp_out"): "post_feedforward_layernorm",
    ("gpt2", "hook_attn_out"): "attn", ("gpt2", "hook_mlp_out"): "mlp", ("gpt_neox", "hook_mlp_out"): "mlp",
    ("llama", "transcoder"): "mlp", ("gemma2", "transcoder"): "post_feedforward_layernorm", ("llama", "across"): "mlp",
}  # fmt: skip
ABLATED = [*((family, hook) for family, hook in WRITERS), *(("llama", hook) for hook in HOOKS[:3])]
ABLATED += [("gemma2", "hook_resid_mid"), ("gpt_neox", "hook_resid_post"), ("mixtral", "hook_resid_post")]


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class Patched:
    """A model whose forward methods are replaced: units read at a point, and what they write made anew."""

    def __init__(self, model: Model, hook: str, cut: Cut) -> None:
        self.model, self.hook, self.cut, self.read = model, hook, cut, torch.zeros(0)
        body = model.hf.get_decoder()
        self.blocks = body.h if hasattr(body, "h") else body.layers
        self.units = model.anatomy.layers[cut.layer].units

    def written(self, x: torch.Tensor, above: int = 0) -> torch.Tensor:
        """All units but one as they were, that one as it is to be, and the error, at the last position."""
        units, unit = self.units, self.cut.unit
        assert units is not None
        values, x = units.write[above].values, x.clone()
        reading = units.read(self.read)
        scale = 1.0 if reading.scale is None else reading.scale
        m = units.act(units.pre(reading))
        changed = m.clone()
        changed[unit] = self.cut.of(m[unit])
        error = x[0, -1] - scale * (m @ values)
        x[0, -1] = scale * (changed @ values) + error
        return x

    def logits(self, family: str, tokens: torch.Tensor) -> torch.Tensor:
        block = self.blocks[self.cut.layer]
        kept = [(module, module.forward) for module in block.modules()]
        kept += [(module, module.forward) for other in self.blocks for module in other.modules()]
        try:
            getattr(self, "_" + self.hook.removeprefix("hook_"))(block, family)
            with torch.no_grad():
                return self.model.hf(tokens, use_cache=False).logits[0, -1].double()
        finally:
            for module, forward in kept:
                module.forward = forward

    def _resid_pre(self, block: Any, family: str) -> None:
        before = block.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.read = x[0, -1]
            return before(self.written(x), *args, **kwargs)

        block.forward = forward

    def _behind(self, module: Any, reads: bool = True, above: int = 0) -> None:
        before = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = before(*args, **kwargs)
            self.read = first_of(output)[0, -1] if reads else self.read
            changed = self.written(first_of(output), above)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        module.forward = forward

    def _resid_post(self, block: Any, family: str) -> None:
        self._behind(block)

    def _attn_out(self, block: Any, family: str) -> None:
        self._behind(block.get_submodule(WRITERS[family, self.hook]))

    _mlp_out = _attn_out

    def _transcoder(self, block: Any, family: str) -> None:
        """What the FFN reads is read, and what each FFN from there writes is written anew."""
        across = self.hook == "across"
        ffn, before = block.mlp, block.mlp.forward

        def forward(x: torch.Tensor) -> Any:
            self.read = x[0, -1]
            return before(x)

        ffn.forward = forward
        for above, other in enumerate(self.blocks[self.cut.layer :] if across else [block]):
            self._behind(other.get_submodule(WRITERS[family, self.hook]), reads=False, above=above)

    _across = _transcoder

    def _resid_mid(self, block: Any, family: str) -> None:
        """What attention adds is changed by as much as the stream is to be."""
        module = block.post_attention_layernorm if family == "gemma2" else block.self_attn
        whole, before = block.forward, module.forward

        def entering(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.entered = x
            return whole(x, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = before(*args, **kwargs)
            added = first_of(output)
            self.read = (self.entered + added)[0, -1]
            changed = added + self.written(self.entered + added) - (self.entered + added)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        block.forward, module.forward = entering, forward


def _quickly(case: tuple[str, str]) -> Any:
    quick = case in (("llama", "hook_resid_mid"), ("gemma2", "hook_mlp_out"), ("llama", "across"))
    return pytest.param(*case, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "hook"), list(map(_quickly, ABLATED)))
def test_an_ablated_unit_is_left_out_where_it_writes(family: str, hook: str, tmp_path: Path) -> None:
    """log p falls by as much as in a model whose own code writes all units but one and their error."""
    model = model_of(family, hook, tmp_path)
    stream, _ = traced(model)
    layer = LAYER if "hook" in hook else 0
    coefficients = stream.layers[layer].coefficients[-1]
    active, off = coefficients.nonzero()[:2, 0].tolist(), int((coefficients == 0).nonzero()[0])
    cuts = [
        *(Cut(layer, unit) for unit in active),
        Cut(layer, active[0], factor=-2.0),
        Cut(layer, off, value=3.0),
    ]
    tokens, target = stream.tokens[None], 7
    with model.running(), torch.inference_mode():
        found = effects(model, stream, target, cuts)
    whole = stream.logits[-1].double().log_softmax(0)[target]
    for cut, effect in zip(cuts, found, strict=True):
        changed = Patched(model, hook, cut).logits(family, tokens).log_softmax(0)[target]
        assert effect == pytest.approx(float(whole - changed), abs=2e-5)
    assert np.abs(found).min() > 1e-4


def test_ablations_of_units_stand_beside_contributions(tmp_path: Path) -> None:
    """The frame and the page have them; heads that units stand for are no parts, and not ablated."""
    model = model_of("llama", "hook_resid_post", tmp_path)
    explanation = explain(model, PROMPT, " Paris", ablate=3)
    rows = explanation.ablations
    units = rows.filter(pl.col("kind") == "neuron")
    assert units.height == 3 and set(units["layer"]) == {LAYER}
    assert (units["effect"].abs() > 0).any() and "L1N" in str(explanation)
    assert (rows.filter(pl.col("kind") == "head")["layer"] > LAYER).all()
    assert "mnemoscope" in explanation._repr_html_() or explanation._repr_html_()


def test_a_steered_unit_is_changed_at_every_position(tmp_path: Path) -> None:
    """With a factor of 1 nothing happens; the first new token has the probability of a patched pass."""
    model = model_of("llama", "hook_resid_post", tmp_path)
    stream, position = traced(model)
    unit = int(stream.layers[LAYER].coefficients[position].argmax())
    same = steer(model, PROMPT, (LAYER, unit), factor=1.0, length=3)
    assert same.changed.tokens == same.whole.tokens
    assert same.changed.probabilities == pytest.approx(same.whole.probabilities, abs=1e-5)
    changed = steer(model, PROMPT, (LAYER, unit), value=40.0, length=1).changed
    held, block = model.anatomy.layers[LAYER].units, model.hf.model.layers[LAYER]
    assert held is not None

    def writes(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        m = held.act(held.pre(held.read(output)))[..., unit, None]
        return output + (40.0 - m) * held.write[0].values[unit]

    handle = block.register_forward_hook(writes)
    with torch.no_grad():
        likely = model.hf(stream.tokens[None]).logits[0, -1].softmax(-1).max()
    handle.remove()
    assert changed.probabilities[0] == pytest.approx(float(likely), abs=1e-5)


# -- what switched units on -----------------------------------------------------------------------------------------


SWITCHED = [case for case in CASES if case[0] not in ("bert",)]


def below(model: Model, unit: tuple[int, int]) -> tuple[Switches, list[_Written]]:
    stream, position = traced(model)
    words = vocabulary_of(model.tokenizer, model.anatomy.vocabulary)
    prediction = TracedPrediction(stream, Lens.of(model.anatomy, "frozen"), 7, (), words, at=position)
    memory = switches(stream, unit[0], position, torch.tensor([unit[1]]))
    return memory, list(_below_units(prediction, memory))


def inner_of(model: Model, stream: Stream, position: int, unit: tuple[int, int], part: torch.Tensor) -> float:
    """The pre-activation less what it would be without a part of what is read, every statistic held; by hand."""
    block, held = model.anatomy.layers[unit[0]], model.anatomy.layers[unit[0]].units
    assert held is not None
    x, key, part = stream.layers[unit[0]], held.keys[unit[1]].double(), part.double()
    if held.reads == "ffn_input":
        assert block.ffn_norm is not None and block.ffn_norm.weight is not None
        read = (x.lin if model.anatomy.parallel else x.lres)[position].double()
        part = part - part.mean() if block.ffn_norm.kind == "layer" else part
        spread = read.var(correction=0) if block.ffn_norm.kind == "layer" else read.square().mean()
        part = part / (spread + block.ffn_norm.eps).sqrt() * block.ffn_norm.weight.double()
    elif held.reads == "ffn_output":
        part = part / block.ffn_multiplier
    elif held.reads == "attention_output":
        part = part / block.attention_multiplier
    if held.norm == "layer_norm":
        part = (part - part.mean()) / (x.lres[position].double().std() + 1e-5)
    return float(part @ key)


@pytest.mark.parametrize(("family", "hook"), [_slow(case) for case in SWITCHED])
def test_what_switched_a_unit_on_adds_up_to_its_coefficient(family: str, hook: str, tmp_path: Path) -> None:
    """Each share is what the pre-activation loses without the part; all of them and the key's bias are all of it."""
    model = model_of(family, hook, tmp_path)
    stream, position = traced(model)
    layer = model.anatomy.n_layers - 1 if hook in ("transcoder", "across") else LAYER
    unit = layer, int(stream.layers[layer].coefficients[position].argmax())
    memory, written = below(model, unit)
    total = float(memory.share.bias[0])
    for vectors in written:
        total += float(vectors.shares.double().sum())
        for index in (0, len(vectors.shares) // 2, len(vectors.shares) - 1):
            expected = inner_of(model, stream, position, unit, vectors.vector(index))
            assert float(vectors.shares[index]) == pytest.approx(expected, abs=1e-4)
    assert float(memory.coefficient[0]) > 0
    assert total == pytest.approx(float(memory.coefficient[0]), rel=1e-4, abs=1e-4)
    kinds = {vectors.kind for vectors in written if bool(vectors.shares.any())}
    if hook in ("transcoder", "across"):
        assert {"embedding", "head", "neuron", "unit error"} <= kinds and "ffn" not in kinds
        assert not any(bool(v.shares.any()) for v in written if v.kind == "neuron" and v.layer >= layer)
    elif hook == "hook_mlp_out":
        assert kinds == {"ffn"}
    elif hook == "hook_attn_out":
        assert kinds <= {"head", "attention bias"}
    else:
        assert {"embedding", "head", "ffn"} <= kinds and "neuron" not in kinds


def test_the_account_says_what_switched_units_on(tmp_path: Path) -> None:
    """The shares of a unit add up to its coefficient in the frame, too; a page and a graph name what they are of."""
    explanation = _explained("llama", "across", tmp_path, "frozen")[1]
    coefficients = dict(zip(zip(*explanation.neurons.select("layer", "neuron").to_dict(as_series=False).values(),
                                strict=True), explanation.neurons["coefficient"], strict=True))  # fmt: skip
    told = explanation.queries.group_by("layer", "neuron").agg(pl.col("share").sum())
    assert told.height >= 5
    for layer, neuron, share in told.iter_rows():
        assert share == pytest.approx(coefficients[layer, neuron], rel=1e-4)
    left = explanation.queries.filter(pl.col("kind") == "remainder")["share"]
    assert left.abs().max() < explanation.neurons["coefficient"].abs().max()
    assert "error of units" in str(explanation) + explanation._repr_html_()
    for name in ("across", "hook_resid_post"):
        drawn = graph(_explained("llama", name, tmp_path / name, "frozen")[1])
        nodes = {node["node_id"] for node in drawn["nodes"]}
        assert {end for link in drawn["links"] for end in (link["source"], link["target"])} <= nodes
