"""Mixtures of experts: what each expert did, against loops over tokens and experts in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import OVERRIDES, _small
from families import MIXTURES as BY_HAND
from families import slow_but_for, tiny
from tiny import texts, tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mnemoscope import build, load_corpus, load_model, open_run
from mnemoscope.errors import ModelChanged, ModelNotSupported
from mnemoscope.mine.places import bin_of, selected
from mnemoscope.mine.verify import verify
from mnemoscope.model import experts
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.check import examine, self_check
from mnemoscope.model.experts import Routed, dispatched, listen, taken_apart
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.model.reading import describe
from mnemoscope.model.state import structure
from mnemoscope.model.stream import trace
from mnemoscope.records import ContextBatch
from mnemoscope.run.reading import Run
from mnemoscope.text.plan import batches

TOKENS = torch.arange(3, 23)[None]

_SPARSE = {"mlp_layer_types": ["sparse"] * 2}
_EARLY = {"first_k_dense_replace": 0}
# More families, small as in the list of every entry, and with experts in all layers.
_MORE: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "aria_text": {},
    "axk1": {**_SPARSE, "num_key_value_heads": 4},
    "cohere2_moe": {},
    "deepseek_v32": {**_SPARSE, **_EARLY, "num_key_value_heads": 4},
    "dots1": _EARLY,
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "exaone_moe": {**_SPARSE, **_EARLY},
    "flex_olmo": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "glm4_moe_lite": {**_SPARSE, **_EARLY, "num_key_value_heads": 4},
    "glm_moe_dsa": {**_SPARSE, **_EARLY, "num_key_value_heads": 4},
    "granitemoe_swa": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {**_SPARSE, **_EARLY},
    "kolibri1": {**_SPARSE},
    "laguna": {**_SPARSE},
    "lfm2_moe": {"num_dense_layers": 0},
    "mellum": {**_SPARSE},
    "mimo_v2_flash": {**_SPARSE, "moe_layer_freq": 1},
    "minimax_m2": {},
    "phimoe": {},
    "solar_open": {**_EARLY},
}


def _like_every_entry(model_type: str) -> Any:
    default = CONFIG_MAPPING[model_type]()
    known = set(default.to_dict())
    given = {name: value for name, value in _MORE[model_type].items() if name in known}
    return tiny(model_type, **_small(default, {**OVERRIDES.get(model_type, {}), **given}))


MIXTURES: dict[str, Callable[[], Any]] = BY_HAND | {name: partial(_like_every_entry, name) for name in _MORE}
_QUICK = {"qwen2_moe", "gpt_oss"}  # a shared expert behind a gate; biases and a clamp

every_mixture = pytest.mark.parametrize("name", slow_but_for(MIXTURES, _QUICK))


def _modules(hf: nn.Module) -> list[Any]:
    return [module for module in hf.modules() if dispatched(module)]


@contextmanager
def _calls(hf: nn.Module) -> Iterator[list[tuple[Any, tuple[Tensor, ...]]]]:
    """How each experts module was called."""
    calls: list[tuple[Any, tuple[Tensor, ...]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append((module, (*args, *kwargs.values())))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in _modules(hf)]
    yield calls
    for handle in handles:
        handle.remove()


def _experts(piece: Routed) -> list[tuple[int, slice]]:
    """Each expert that has rows, and these."""
    every = enumerate(pairwise(piece.starts))
    return [(expert, slice(start, stop)) for expert, (start, stop) in every if stop > start]


def _read_by_down(hf: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """What the eager code of the experts hands to its down projection, in order: storage of the weight, operand."""
    downs = {module.down_proj.untyped_storage().data_ptr() for module in _modules(hf)}
    read: list[tuple[int, Tensor]] = []
    linear, matmul = functional.linear, torch.Tensor.__matmul__

    def note(x: Tensor, weight: Tensor) -> None:
        pointer = weight.untyped_storage().data_ptr()
        if pointer in downs:
            read.append((pointer, x.clone()))

    def noting_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        note(x, weight)
        return linear(x, weight, bias)

    def noting_matmul(x: Tensor, weight: Tensor) -> Tensor:
        note(x, weight)
        return matmul(x, weight)

    monkeypatch.setattr(functional, "linear", noting_linear)
    monkeypatch.setattr(torch.Tensor, "__matmul__", noting_matmul)
    hf.set_experts_implementation("eager")
    with torch.no_grad():
        hf(input_ids=TOKENS, use_cache=False)
    monkeypatch.undo()
    return read


@every_mixture
def test_coefficients_are_what_the_eager_down_projection_reads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of each expert are those that the model's own code multiplies with its down projection."""
    hf = MIXTURES[name]()
    read = _read_by_down(hf, monkeypatch)
    pieces: list[tuple[int, Routed]] = []
    for module in _modules(hf):
        pointer = module.down_proj.untyped_storage().data_ptr()
        listen(module, lambda piece, pointer=pointer: pieces.append((pointer, piece)))
    try:
        with torch.no_grad(), taken_apart(hf):
            hf(input_ids=TOKENS, use_cache=False)
    finally:
        experts._listeners.clear()
    each = [(pointer, piece.coefficients[rows]) for pointer, piece in pieces for _, rows in _experts(piece)]
    assert len(each) == len(read) > 0
    for (pointer, coefficients), (owner, eager) in zip(each, read, strict=True):
        assert pointer == owner
        # The eager code orders its rows by choice and then by token.
        ours = coefficients.double().sort(0).values
        assert torch.allclose(ours, eager.double().sort(0).values, rtol=1e-5, atol=1e-6)


@every_mixture
def test_rows_are_the_tokens_the_router_chose(name: str) -> None:
    """Tokens ascend, belong to the expert, and carry the router's own weight: a loop over both says so."""
    hf = MIXTURES[name]()
    pieces: dict[int, list[Routed]] = {}
    for module in _modules(hf):
        listen(module, pieces.setdefault(id(module), []).append)
    try:
        with torch.no_grad(), taken_apart(hf), _calls(hf) as calls:
            hf(input_ids=TOKENS, use_cache=False)
    finally:
        experts._listeners.clear()
    for module, (hidden, index, weight) in calls:
        wanted: dict[int, list[tuple[int, float]]] = {}
        for token in range(len(hidden)):
            for choice in range(index.shape[1]):
                wanted.setdefault(int(index[token, choice]), []).append((token, float(weight[token, choice])))
        (piece,) = pieces[id(module)]
        assert {expert for expert, _ in _experts(piece)} == set(wanted)
        assert torch.equal(piece.read[piece.taken], hidden[piece.tokens])
        for expert, rows in _experts(piece):
            assert set(piece.expert[rows].tolist()) == {expert}
            assert piece.tokens[rows].tolist() == [token for token, _ in wanted[expert]]
            assert piece.weight[rows].tolist() == pytest.approx([value for _, value in wanted[expert]])


@every_mixture
def test_a_mixture_adds_up(name: str) -> None:
    """Router weight x coefficient x value, with all biases, is what every block adds to the stream."""
    hf = MIXTURES[name]()
    anatomy, error = examine(hf)
    assert error < 1e-5
    stream = trace(hf, anatomy, TOKENS)
    for index in range(anatomy.n_layers):
        before = stream.layers[index].lout - stream.ffn_update(index)
        before = before - (stream.attention_update(index) if anatomy.parallel else 0)
        start = stream.layers[index].lin if anatomy.parallel else stream.layers[index].lres
        assert torch.allclose(before, start, atol=1e-5)
        for position in (1, 7):
            parts = stream.neuron_parts(index, position).sum(0) + stream.ffn_bias(index, position)
            assert torch.allclose(parts, stream.ffn_update(index)[position], atol=1e-5)


@every_mixture
def test_the_model_is_left_as_it_was(name: str) -> None:
    """The implementation of the experts is the model's own again, also after an error, and no listener stays."""
    hf = MIXTURES[name]()
    before = hf.get_experts_implementation()
    examine(hf)
    assert hf.get_experts_implementation() == before
    with pytest.raises(ZeroDivisionError), taken_apart(hf):
        assert {module.config._experts_implementation for module in _modules(hf)} == {experts.NAME}
        _ = 1 // 0
    assert hf.get_experts_implementation() == before
    assert not experts._listeners


@every_mixture
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_gives_the_same_logits(name: str, implementation: str) -> None:
    """Taken apart, a mixture has the logits that it has under each implementation that transformers ships."""
    hf = MIXTURES[name]()
    hf.set_experts_implementation(implementation)
    with torch.no_grad():
        own = hf(input_ids=TOKENS, use_cache=False).logits
        with taken_apart(hf):
            apart = hf(input_ids=TOKENS, use_cache=False).logits
    assert torch.allclose(own, apart, atol=1e-5 * float(own.abs().max()))


def test_another_implementation_of_the_experts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own implementation that computes something else makes another model of what was taken apart."""
    hf = MIXTURES["mixtral"]()

    def halved(module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return experts.experts_forward(module, hidden, index, weight / 2)

    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS._global_mapping, "halved", halved)
    hf.set_experts_implementation("halved")
    with pytest.raises(ModelNotSupported, match="as it is run"):
        examine(hf)


def _without_weight(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda module, hidden, index, weight: function(module, hidden, index, torch.ones_like(weight))


def test_a_dropped_router_weight_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are added up without their weights are no longer what the block adds to the stream."""
    hf = MIXTURES["mixtral"]()
    forward = _without_weight(experts.experts_forward)
    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS._global_mapping, experts.NAME, forward)
    with pytest.raises(ModelNotSupported):
        examine(hf)


def _caught(name: str, change: Callable[[Layer], dict[str, Any]]) -> None:
    hf = MIXTURES[name]()
    anatomy = describe(hf)
    self_check(hf, anatomy)
    layer = replace(anatomy.layers[1], **change(anatomy.layers[1]))
    with pytest.raises(ModelNotSupported, match="layer 1"):
        self_check(hf, replace(anatomy, layers=(anatomy.layers[0], layer, *anatomy.layers[2:])))


def _with_experts(**changes: Any) -> Callable[[Layer], dict[str, Any]]:
    def change(layer: Layer) -> dict[str, Any]:
        assert layer.experts is not None
        return {"experts": replace(layer.experts, **changes)}

    return change


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "granitemoeshared", "axk1"])
def test_a_dropped_shared_expert_is_caught(name: str) -> None:
    """Without the expert that all tokens go through a layer does not add up, and it is that layer that is named."""
    _caught(name, lambda _: {"down": None, "gate": None, "up": None})


def test_a_dropped_gate_of_the_shared_expert_is_caught() -> None:
    """The sigmoid gate of each token is part of the weight of the shared expert."""
    _caught("qwen2_moe", _with_experts(shared_gate=None))


@pytest.mark.parametrize("factors", [{"factor": 2.0}, {"shared_factor": 2.0}])
def test_a_wrong_factor_outside_the_router_is_caught(factors: dict[str, float]) -> None:
    """What the sum over experts, or the shared one, is multiplied with belongs to the weight of each."""
    _caught("deepseek_v3", _with_experts(**factors))


def test_a_dropped_norm_is_caught() -> None:
    """Experts read what the norm before them gives."""
    _caught("qwen3_moe", lambda _: {"ffn_norm": None})


def test_a_dropped_norm_of_the_sum_is_caught() -> None:
    """What experts add up to goes through a norm of its own before it is written."""
    _caught("axk1", lambda _: {"post_ffn_norm": None})


@pytest.mark.parametrize("norm", ["read", "written", "shared_read", "shared_written"])
def test_a_norm_of_experts_beside_a_dense_ffn_is_caught(norm: str) -> None:
    """Gemma 4: without the weight of one of the four the keys, or the FFN, are not what the model computes."""

    def without(layer: Layer) -> dict[str, Any]:
        assert layer.own_norms is not None
        plain = replace(getattr(layer.own_norms, norm), weight=None)
        return {"own_norms": replace(layer.own_norms, **{norm: plain})}

    _caught("gemma4_text", without)


def test_a_dropped_dense_ffn_beside_experts_is_caught() -> None:
    """Gemma 4: what the dense FFN writes is part of the sum that its norm reads."""
    _caught("gemma4_text", lambda _: {"down": None, "gate": None, "up": None})


@pytest.mark.parametrize("bias", ["down_proj_bias", "gate_up_proj_bias"])
def test_a_dropped_bias_is_caught(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of experts are read from the module: zeros in their place do not add up."""
    hf = MIXTURES["gpt_oss"]()
    anatomy = describe(hf)
    read = experts.Experts._matrix

    def zeroed(self: experts.Experts, module: nn.Module, name: str) -> Tensor:
        weight = read(self, module, name)
        return torch.zeros_like(weight) if name == bias else weight

    monkeypatch.setattr(experts.Experts, "_matrix", zeroed)
    with pytest.raises(ModelNotSupported, match="layer 0, FFN"):
        self_check(hf, anatomy)


def _batch() -> ContextBatch:
    tokens = np.stack([np.arange(3, 15), np.arange(20, 32)]).astype(np.int32)
    counted = np.ones((2, 12), bool)
    counted[:, 0] = False
    counted[1, 9:] = False
    return ContextBatch(np.array([0, 1]), tokens, np.array([12, 9], np.int32), counted)


def test_who_is_handed_experts_computes_the_same_with_any_number_of_threads() -> None:
    """Null units are made there: functions that show where threads are cut are still cut where it does not show."""
    hf = MIXTURES["mixtral"]()
    model = Model(hf, None, examine(hf)[0], "mixtral")
    columns = torch.randn(1629, 80, generator=torch.Generator().manual_seed(0))[:, :40]
    computed: list[torch.Tensor] = []

    def receive(rows: LayerRows, batch: ContextBatch) -> None:
        before = torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            computed.append(torch.nn.functional.silu(columns))
        torch.set_num_threads(before)

    with Capture(model) as capture:
        capture.sweep(_batch(), lambda *_: None, receive)
    assert computed and all(torch.equal(computed[0], each) for each in computed)


@every_mixture
def test_a_sweep_hands_out_each_expert_with_its_tokens(name: str) -> None:
    """What is handed out in a batch is what a trace of each context alone has, at the positions that were routed."""
    hf = MIXTURES[name]()
    anatomy, _ = examine(hf)
    model = Model(hf, None, anatomy, name)
    pieces: list[LayerRows] = []
    batch = _batch()
    with Capture(model) as capture:
        capture.sweep(
            batch, lambda *_: pytest.fail("no layer is dense"), lambda rows, _: pieces.extend(rows.each())
        )
    streams = [trace(hf, anatomy, torch.from_numpy(ids[None]).long()) for ids in batch.tokens]
    seen = np.zeros((anatomy.n_layers, len(anatomy.layers[0].groups), batch.tokens.size), int)
    scales: dict[tuple[int, int, bool], float] = {}
    for piece in pieces:
        rows = range(batch.tokens.size) if piece.rows is None else piece.rows.tolist()
        units = slice(piece.first, piece.first + piece.coefficients.shape[1])
        assert list(rows) == sorted(rows)
        for place, row in enumerate(rows):
            context, position = divmod(row, batch.tokens.shape[1])
            traced = streams[context].layers[piece.layer]
            assert traced.weights is not None
            weight = piece.weight if isinstance(piece.weight, float) else float(piece.weight[place])
            own = anatomy.layers[piece.layer].own_norms
            if own is None:
                assert weight == pytest.approx(float(traced.weights[position, piece.group]), rel=1e-4)
                expected = traced.ffn_input[position]
            else:  # what a norm of the sum divides by is the same for all experts of a token
                shared = piece.group == len(anatomy.layers[piece.layer].groups) - 1
                scale = float(traced.weights[position, piece.group]) / weight
                known = scales.setdefault((piece.layer, row, shared), scale)
                assert scale == pytest.approx(known, rel=1e-4)
                read = own.shared_read if shared else own.read
                assert read.weight is not None
                expected = traced.ffn_input[position] * read.weight
            for ours, theirs in ((piece.coefficients, traced.coefficients), (piece.gate, traced.gate)):
                assert torch.allclose(ours[place], theirs[position, units], atol=1e-4)
            assert torch.allclose(piece.inputs[place], expected, atol=1e-4)
            seen[piece.layer, piece.group, row] += 1
    weights = np.concatenate([[layer.weights.numpy() for layer in s.layers] for s in streams], 1)
    assert (seen.transpose(0, 2, 1) == (weights != 0)).all()


def test_questions_of_dense_models_refuse_a_mixture() -> None:
    """Without a receiver of routed rows nothing is read as if every token had been everywhere."""
    hf = MIXTURES["mixtral"]()
    model = Model(hf, None, examine(hf)[0], "mixtral")
    with Capture(model) as capture, pytest.raises(ModelNotSupported, match="mixture of experts"):
        capture.sweep(_batch(), lambda *_: None)


# -- Mining ------------------------------------------------------------------------------------------------------

TOP, NULLS = 4, ("random", "rotated", "chimera", "covariance")
MINED = ["mixtral", "qwen2_moe", "gpt_oss"]


def _model(name: str, folder: Path) -> Model:
    """A mixture with a tokenizer, from a folder."""
    MIXTURES[name]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_model(str(folder), dtype="fp32")


def _build(model: Model, folder: Path, workers: int = 1, count: int = 70) -> Run:
    build(model, load_corpus(texts(count)), folder, top=TOP, nulls=NULLS, workers=workers)
    return open_run(folder)


def _swept(model: Model, run: Run) -> Iterator[tuple[LayerRows, int, int, int, float]]:
    """Every counted token of every expert of a run: its rows, which of them, context, position, router's weight."""
    kept: list[tuple[LayerRows, ContextBatch]] = []
    shards = run.table("shards").select(pl.col("shard").max()).collect().item() + 1
    with Capture(model) as capture:
        for shard in range(shards):
            for batch in batches(run.file("contexts"), shard, run.manifest.options["special"]):
                capture.sweep(batch, lambda *_: None, lambda *piece: kept.append(piece))
    for rows, batch in kept:
        for piece in rows.each():
            where = range(batch.tokens.size) if piece.rows is None else piece.rows.tolist()
            for place, row in enumerate(where):
                context, position = divmod(row, batch.tokens.shape[1])
                if batch.counted[context, position]:
                    weight = piece.weight if isinstance(piece.weight, float) else float(piece.weight[place])
                    yield piece, place, int(batch.contexts[context]), position, weight


def _routed(model: Model, run: Run) -> dict[tuple[int, int], list[tuple[int, int, float, float]]]:
    """By layer and neuron: context, position, coefficient and weight of every counted token that the neuron ran on."""
    rows: dict[tuple[int, int], list[tuple[int, int, float, float]]] = {}
    for piece, place, context, position, weight in _swept(model, run):
        for unit, value in enumerate(piece.coefficients[place].tolist()):
            rows.setdefault((piece.layer, piece.first + unit), []).append((context, position, value, weight))
    return rows


def _weights(model: Model, run: Run) -> dict[tuple[int, int], list[float]]:
    """By layer and expert: the router's weight of every counted token."""
    weights: dict[tuple[int, int], list[float]] = {}
    for piece, _, _, _, weight in _swept(model, run):
        weights.setdefault((piece.layer, piece.group), []).append(weight)
    return weights


@pytest.mark.parametrize("name", slow_but_for(MINED, {"qwen2_moe"}))
def test_a_mixture_is_mined_over_the_tokens_routed_to_each_expert(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triggers, moments, ranges and histograms of every neuron equal the slow definition; not routed is absent."""
    monkeypatch.setattr("mnemoscope.text.plan.BATCH_TOKENS", 300)
    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 800)
    model = _model(name, tmp_path / "model")
    run = _build(model, tmp_path / "run")
    routed = _routed(model, run)
    neurons = run.table("neurons").sort("layer", "neuron").collect()
    counts = run.table("histograms").sort("layer", "neuron").collect()["counts"].to_list()
    tails = {
        key: rows.sort("polarity", "rank", descending=[True, False])
        for key, rows in run.table("triggers").collect().partition_by("layer", "neuron", as_dict=True).items()
    }
    assert len(neurons) == sum(model.anatomy.sizes)
    for stored, histogram in zip(neurons.iter_rows(named=True), counts, strict=True):
        address = (stored["layer"], stored["neuron"])
        rows = routed.get(address, [])
        assert stored["tokens"] == len(rows)
        if not rows:
            assert not sum(histogram) and address not in tails
            continue
        contexts, _, values, _ = (np.array(column) for column in zip(*rows, strict=True))
        assert (stored["min"], stored["max"]) == (values.min(), values.max())
        assert stored["positive_fraction"] == (values > 0).mean()
        assert stored["mean"] == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
        assert stored["std"] == pytest.approx(values.std(), rel=1e-5, abs=1e-9)
        chosen = bin_of(values[selected(contexts)])
        assert histogram == np.bincount(chosen, minlength=len(histogram)).tolist()
        wanted: list[tuple[int, int, int, float]] = []
        for polarity in (1, -1):
            best: dict[int, tuple[float, int, int]] = {}
            for context, position, value, _ in rows:
                entry = (-polarity * value, context, position)
                if entry[0] < 0 and entry < best.get(context, (0.0, 0, 0)):
                    best[context] = entry
            kept = sorted(best.values())[:TOP]
            wanted += [(polarity, context, position, -polarity * v) for v, context, position in kept]
        listed = tails[address].select("polarity", "context", "position", "coefficient").rows()
        assert listed == wanted
        weight_of = {(context, position): weight for context, position, _, weight in rows}
        told = run.rows("trigger_weights", *address).sort("polarity", "rank", descending=[True, False])
        assert told["router_weight"].to_list() == [
            pytest.approx(weight_of[context, position], abs=1e-6) for _, context, position, _ in wanted
        ]
    experts = run.table("experts").collect()
    weights = _weights(model, run)
    assert len(experts) == sum(len(layer.groups) for layer in model.anatomy.layers)
    for row in experts.iter_rows(named=True):
        given = weights.get((row["layer"], row["expert"]), [])
        assert row["tokens"] == len(given)
        assert row["routed_fraction"] == len(given) / run.manifest.corpus.counted
        assert row["router_weight"] == (pytest.approx(np.mean(given), abs=1e-6) if given else None)
        layer = neurons.filter(pl.col("layer") == row["layer"])["tokens"].to_list()
        assert set(layer[row["neuron"] :][: row["neurons"]]) == {row["tokens"]}
    experts_tokens = neurons.filter(pl.col("layer") == 0)["tokens"].unique()
    assert len(experts_tokens) > 1, "experts are given different numbers of tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", MINED)
def test_a_mixture_is_the_same_with_any_number_of_workers_and_verifies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table has the same bits with one and with two workers, and what is stored is found again.

    One worker computes with two threads, and two with one each.
    """
    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 3_000)
    model, before = _model(name, tmp_path / "model"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = _build(model, tmp_path / "one", count=400)
        other = _build(model, tmp_path / "two", workers=2, count=400)
    finally:
        torch.set_num_threads(before)
    assert run.table("shards").select("shard").collect().n_unique() > 2
    assert {key: entry.sha256 for key, entry in run.manifest.tables.items()} == {
        key: entry.sha256 for key, entry in other.manifest.tables.items()
    }
    result = verify(run, model, sample=30)
    assert result.passed, result.checks
    assert all(check.largest == 0 for check in result.checks if check.name != "values"), result.checks


def test_another_implementation_of_experts_is_a_change_of_the_model() -> None:
    """It is seen as another attention is, also while the model is run; ours, which is put back, is none."""
    model = load_model(BY_HAND["mixtral"](), tokenizer=tokenizer())
    before, batch = structure(model.hf), _batch()
    with Capture(model) as capture:
        assert structure(model.hf) == before
        capture.sweep(batch, lambda *_: None, lambda *_: None)
    assert structure(model.hf) == before
    model.hf.set_experts_implementation("eager")
    assert structure(model.hf) != before
    with pytest.raises(ModelChanged, match="changed meanwhile"), Capture(model) as capture:
        model.hf.set_experts_implementation("batched_mm")
        capture.sweep(batch, lambda *_: None, lambda *_: None)
    assert model.hf.config._experts_implementation == "batched_mm"
