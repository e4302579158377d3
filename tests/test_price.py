"""What a build would take: counted exactly where it can be counted, and within bounds where it is drawn."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, MIXTURES, dense_between_experts
from families import tiny as tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import model_folder, texts, tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope import memory
from mnemoscope.cli import app
from mnemoscope.errors import ModelError, RunError
from mnemoscope.mine import drawn, price, tries
from mnemoscope.mine.build import build
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.mine.tries import MiningTry, ReadingTry
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.model.outline import Outline, load_or_outline, outline, stored
from mnemoscope.records import ContextBatch
from mnemoscope.results import BuildPrice
from mnemoscope.text import plan as planning
from mnemoscope.text.corpus import load_corpus

DEEP: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Any:
    """Tries of a moment: no time is judged here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries, "SECONDS", 0.05)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return mn.load_model(folder, dtype="fp32")


def test_a_short_text_is_counted_exactly(model: Model, tmp_path: Path) -> None:
    """Tokens, contexts and shards are those of the run, with a limit and without."""
    for limit in (None, 900):
        text = load_corpus(texts(80), limit=limit)
        said = mn.plan(model, text)
        run = build(model, text, tmp_path / str(limit), top=3)
        corpus = run.manifest.corpus
        shards = run.table("shards").select("shard").collect()["shard"].n_unique()
        assert (said.tokens, said.contexts, said.shards) == (corpus.tokens, corpus.contexts, shards)
        assert not said.open_end and list(said.seconds) == [
            "planning",
            "mining",
            "reading values",
            "writing tables",
        ]


@pytest.mark.slow
def test_a_long_text_is_counted_by_a_part(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where planning all of it would take long, tokens, contexts and shards come close; a limit is kept."""
    monkeypatch.setattr(planning, "SHARD_TOKENS", 600)
    monkeypatch.setattr(price, "SHARD_TOKENS", 600)
    monkeypatch.setattr(price, "PLANNED", 1_000)
    monkeypatch.setattr(price, "PART", 1_500)
    source = texts(600, longest=60)
    for limit in (None, 7_000):
        text = load_corpus(source, limit=limit)
        said = mn.plan(model, text, nulls=())
        run = build(model, text, tmp_path / str(limit), top=3, nulls=())
        shards = run.table("shards").select("shard").collect()["shard"].n_unique()
        assert said.tokens == pytest.approx(run.manifest.corpus.tokens, rel=0.1)
        assert said.contexts == pytest.approx(run.manifest.corpus.contexts, rel=0.15)
        assert said.shards == pytest.approx(shards, rel=0.15)
    monkeypatch.setattr(price, "COUNTED", -1.0)
    said = mn.plan(model, load_corpus(source), nulls=())
    assert said.open_end and "give --limit" in said.lacking[0] and "at least" in str(said)
    assert mn.plan(model, load_corpus(source, limit=7_000), nulls=()).tokens == 7_000


@pytest.mark.parametrize("nulls", [(), ("random", "rotated")])
def test_the_state_is_as_large_as_it_is_said(nulls: tuple[str, ...], model: Model, tmp_path: Path) -> None:
    """Of one shard to the byte; of more of them never less than there is, and a node of the sums more at most."""
    text = load_corpus(texts(60))
    plan = price.corpus.write_plan(text, model.tokenizer, tmp_path, context_length=64)
    counted = price._Counted.of(model, 0, 3, nulls)
    units = sum(map(len, counted.cells.values()))
    for shards in range(1, 10):
        state = RunStatistics.of(model, Nulls(model, nulls), 3)
        with Capture(model) as capture:
            batch = next(plan.batches(0))
            for shard in range(shards):
                capture.sweep(batch, state.update)
                state.finish_shard(shard)
        arrays = [each.state().items() for each in state.by_kind.values()]
        held = sum(
            array.nbytes for each in arrays for name, array in each if name not in ("options", "experts")
        )
        said = counted.state(shards)
        nodes = units * drawn._NODE * (1 + int(np.log2(shards)) - shards.bit_count())
        addresses = 16 * len(arrays) * shards.bit_count()
        assert held == said - nodes + addresses


@pytest.mark.slow
@pytest.mark.sample
def test_tables_are_as_large_as_they_are_said(sample_model_folder: Path, tmp_path: Path) -> None:
    """All together within an eighth, and each that is large enough for its rows to count, within two fifths."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # coefficients as large as those of trained models, which are what is drawn
    )
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(sample_model_folder)
    model = mn.load_model(LlamaForCausalLM(config), tokenizer=words, dtype="fp32")
    text = load_corpus("sample:wikipedia", limit=6_000)
    said = mn.plan(model, text, top=30)
    run = build(model, text, tmp_path / "run", top=30)
    made = {name: entry.bytes for name, entry in run.manifest.tables.items()}
    assert said.disk.keys() == made.keys()
    assert sum(said.disk.values()) == pytest.approx(sum(made.values()), rel=0.125)
    large = [name for name, size in made.items() if size > 60_000 and not name.startswith("null_")]
    assert {"triggers", "values", "values_by_token", "neurons"} <= set(large)
    for name in large:
        assert said.disk[name] == pytest.approx(made[name], rel=0.4), name
    assert said.work >= sum(made.values())


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 500))
def test_a_batch_is_cut_to_so_many_tokens(contexts: int, length: int, tokens: int) -> None:
    """What is left is a batch, of the first contexts or of the beginning of one."""
    lengths = np.sort(np.random.default_rng(length).integers(1, length + 1, contexts)).astype(np.int32)
    filled = np.arange(contexts * length, dtype=np.int32).reshape(contexts, length)
    counted = (np.arange(length) > 0) & (np.arange(length) < lengths[:, None])
    batch = ContextBatch(np.arange(contexts), filled, lengths, counted)
    piece = tries._cut(batch, tokens)
    rows, width = piece.tokens.shape
    assert piece.tokens.size <= max(tokens, 8) and rows >= 1 and width >= 1
    assert np.array_equal(piece.tokens, filled[:rows, :width]) and piece.counted.shape == (rows, width)
    assert (piece.lengths == np.minimum(lengths[:rows], width)).all() and len(piece.contexts) == rows
    if filled.size <= tokens:
        assert piece is batch


def test_targets_are_cut_with_their_sources() -> None:
    """As many of them, whatever either is cut to."""

    def batch(length: int) -> ContextBatch:
        lengths = np.full(6, length, np.int32)
        return ContextBatch(np.arange(6), np.ones((6, length), np.int32), lengths, np.ones((6, length), bool))

    for tokens in (8, 30, 100, 1000):
        piece = tries._cut(replace(batch(20), targets=batch(9)), tokens)
        assert len(piece.targets.contexts) == len(piece.contexts) == len(piece.targets.tokens) >= 1


def _mined(sizes: list[tuple[int, float]], whole: int = 0) -> MiningTry:
    return MiningTry(tuple(sizes), whole, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 1.0, True)


@given(st.floats(0, 2), st.floats(1e-4, 1e-2), st.integers(1, 100_000), st.integers(1, 50))
def test_seconds_of_batches_that_were_cut_are_a_line(
    fixed: float, each: float, tokens: int, batches: int
) -> None:
    """So much for a batch and so much for a token are told apart by two sizes."""
    mined = _mined([(count, fixed + each * count) for count in (64, 500)])
    assert mined.seconds(tokens, batches) == pytest.approx(each * tokens + fixed * batches, rel=1e-6)


@given(st.integers(1, 10_000))
def test_whole_batches_stand_for_the_others(tokens: int) -> None:
    """What was tried counts as it was, and all else as the later half of it."""
    mined = _mined([(64, 9.0), (1000, 4.0), (1000, 2.0)], whole=2)
    expected = tokens * 3e-3 if tokens <= 2000 else 6.0 + (tokens - 2000) * 2e-3
    assert mined.seconds(tokens, 3) == pytest.approx(expected)


def test_work_that_is_tried_in_part_is_a_line() -> None:
    """What it takes whatever its size is not multiplied."""
    done: list[int] = []

    def work(count: int) -> None:
        done.append(count)
        clock[0] += 0.003 + count * 1e-4

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries.time, "perf_counter", lambda: clock[0])
        assert tries._tried(work, 100_000) == pytest.approx(10.003)
        assert max(done) < 2_000
        assert tries._tried(work, 50) == pytest.approx(0.008)


def test_devices_and_workers_share_whole_shards(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five shards on four devices take as long as two on one, and three layers on two as long as two; processes that
    share threads gain nothing. More of either means states to add up, and no other stage is shorter."""
    monkeypatch.setattr(MiningTry, "seconds", lambda self, padded, batches: 1000.0)
    monkeypatch.setattr(ReadingTry, "seconds", lambda self, share: 300.0 * share)
    monkeypatch.setattr(price, "_missing", lambda _: 1.0)
    monkeypatch.setattr(price, "_worker", lambda: (1_000_000, 0.0))
    monkeypatch.setattr(planning, "SHARD_TOKENS", 300)
    text = load_corpus(texts(60))
    shards = mn.plan(model, text, nulls=()).shards
    assert shards >= 4
    for devices in (1, 2, 3, 100):
        said = mn.plan(model, text, nulls=(), devices=devices)
        assert said.seconds["mining"] == pytest.approx(1000.0 * -(-shards // devices) / shards, rel=0.02)
        layers = model.anatomy.n_layers
        assert said.divided == {"mining": min(devices, shards), "reading values": min(devices, layers)}
        reading = 300.0 * -(-layers // devices) / layers
        assert said.seconds["reading values"] == pytest.approx(reading, rel=0.02) and said.longest == "mining"
        shared = said.seconds["mining"] + said.seconds["reading values"]
        assert said.undivided == pytest.approx(sum(said.seconds.values()) - shared)
        assert ("adding up" in said.seconds) == (devices > 1)
    alone, two = (mn.plan(model, text, nulls=(), workers=workers) for workers in (1, 2))
    at_once = min(2, torch.get_num_threads())
    rounds = -(-shards // 2) * 2 / at_once
    assert two.seconds["mining"] == pytest.approx(1000.0 * rounds / shards, rel=0.02)
    assert two.memory["states of other processes"] == alone.memory["what is mined"] and two.work > alone.work


def test_a_price_grows_with_what_is_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, disk and rows with top, null units and decoys, and mining about as the text does."""
    monkeypatch.setattr(price, "_worker", lambda: (1_000_000, 0.0))
    text = load_corpus(texts(80))
    little, much = (mn.plan(model, text, nulls=(), top=top) for top in (2, 20))
    assert much.memory["what is mined"] > little.memory["what is mined"] and much.work > little.work
    assert much.rows["triggers"] == 10 * little.rows["triggers"]
    bare, usual, decoys = (
        mn.plan(model, text, top=2, nulls=kinds) for kinds in ((), ("random",), ("random", "chimera"))
    )
    for one, more in ((bare, usual), (usual, decoys)):
        assert more.memory["what is mined"] > one.memory["what is mined"]
        assert sum(more.disk.values()) > sum(one.disk.values())
        assert more.rows["neurons"] == one.rows["neurons"] == model.cells.offsets[-1]
    assert decoys.rows["null_neurons"] - usual.rows["null_neurons"] == len(model.cells)


# -- Models whose weights are not here ---------------------------------------------------------------------------

OUTLINED = {
    "llama": FAMILIES["llama"],
    "gpt2": FAMILIES["gpt2"],
    "deep": partial(tiny_model, "llama", **{**DEEP, "num_hidden_layers": 9}),
    "qwen3_moe": MIXTURES["qwen3_moe"],
    "dense between experts": dense_between_experts,
}


def _without_weights(folder: Path) -> Path:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "deep" else pytest.mark.slow) for name in OUTLINED]
)
def test_an_outline_has_the_price_of_the_model(name: str, tmp_path: Path) -> None:
    """In all that is counted: text, neurons, weights, states, null units, rows and bytes of tables; and it says that
    its weights are random."""
    OUTLINED[name]().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text = load_corpus(texts(40))
    given = mn.plan(mn.load_model(tmp_path, dtype="fp32"), text, tmp_path, top=5)
    source = load_or_outline(_without_weights(tmp_path), dtype="fp32")
    assert isinstance(source, Outline)
    said = mn.plan(source, text, tmp_path, top=5)
    for field in ("tokens", "contexts", "shards", "neurons", "weights", "rows", "disk", "dtype", "open_end"):
        assert getattr(said, field) == getattr(given, field), field
    for holder in ("weights", "what is mined", "null units"):
        assert said.memory[holder] == pytest.approx(given.memory[holder], rel=1e-3), holder
    assert said.random and not given.random and set(said.seconds) == set(given.seconds)
    assert "random" in str(said) and "random" not in str(given)


def test_an_outline_takes_the_memory_of_what_is_tried(tmp_path: Path) -> None:
    """Matrices of layers that are not run are one number; those that are run have numbers of their own, no two rows
    alike, and of a mixture in need those of one expert."""
    tiny_model("llama", **{**DEEP, "num_hidden_layers": 9}).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = outline(_without_weights(tmp_path), dtype="fp32")
    layers = made.model.anatomy.layers
    assert {layer.values().untyped_storage().nbytes() for layer in layers} == {4}
    made.draw(2)
    assert [len(layer.values().T.unique(dim=0)) > 1 for layer in layers] == [True, True] + [False] * 7
    assert made.size(2) < made.size(9) < made.bytes
    assert not torch.allclose(layers[0].keys(), layers[0].ups())
    mixed = MIXTURES["qwen3_moe"]()
    mixed.save_pretrained(tmp_path / "mixed")
    tokenizer().save_pretrained(tmp_path / "mixed")
    mixture = outline(_without_weights(tmp_path / "mixed"), dtype="fp32")
    mixture.draw(3, alike=True)
    first, second, *_ = mixture.model.anatomy.layers[0].rows()
    assert torch.equal(first.keys, second.keys) and len(first.keys.unique(dim=0)) == len(first.keys)
    assert mixture.size(3, alike=True) < mixture.size(3)


def test_what_does_not_fit_is_outlined(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model is loaded if its weights are here, all of them, and fit into memory; and where no layer fits, all is
    counted and no time is said."""
    assert stored(folder) and stored(tmp_path) is None and stored("sample:smollm2-135m") == 0
    assert isinstance(load_or_outline(folder, dtype="fp32"), Model)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert stored(tmp_path) is None
    monkeypatch.setattr("mnemoscope.model.outline.available", lambda: 10)
    source = load_or_outline(folder, dtype="fp32")
    assert isinstance(source, Outline)
    monkeypatch.setattr(memory, "available", lambda: -1)
    said = mn.plan(source, load_corpus(texts(20)), nulls=())
    assert said.seconds == {} and said.longest is None and said.rows["neurons"] == len(source.model.cells)
    assert said.lacking[0].startswith("time: ") and said.lacking[1].startswith("memory: ")
    assert "weights" in str(said)


def test_no_weights_are_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id whose weights are not in the cache is outlined, and one that is none is one line."""
    asked: list[str] = []
    monkeypatch.setattr("mnemoscope.model.outline.outline", lambda name, **_: asked.append(name))
    monkeypatch.setattr("mnemoscope.model.outline.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert load_or_outline("owner/name") is None and asked == ["owner/name"]
    monkeypatch.undo()
    for name in (str(tmp_path), "owner/name", "no such thing"):
        with pytest.raises(ModelError):
            load_or_outline(name)


def test_a_configuration_that_makes_no_model_is_one_line(tmp_path: Path) -> None:
    """Whatever transformers thinks of it, with weights and without."""
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 30}))
    for loading in (mn.load_model, outline):
        with pytest.raises(ModelError, match=r"30\) is not a multiple .*config.json") as told:
            loading(folder, dtype="fp32")
        assert "\n" not in str(told.value)


def test_kinds_of_layers_are_all_tried() -> None:
    """Three layers where all are alike; with a mixture behind dense ones as many as reach it; all where passes are not
    straight."""
    deep = mn.load_model(
        tiny_model("llama", **{**DEEP, "num_hidden_layers": 9}), tokenizer=tokenizer(), dtype="fp32"
    )
    assert tries.layers_to_try(deep.anatomy) == tries.LAYERS == 3
    layers = deep.anatomy.layers
    other = replace(layers[5], mixer=layers[5].attention)
    mixed = replace(deep.anatomy, layers=(*layers[:5], other, *layers[6:]))
    assert tries.layers_to_try(mixed) == 6
    turned = replace(deep.anatomy, layers=tuple(replace(layer, turn=(0, 2)) for layer in layers))
    assert tries.layers_to_try(turned) == 9


def test_layers_that_are_not_run_take_what_their_kind_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one with what comes before it once, and each of the others as those of its kind."""
    deep = mn.load_model(
        tiny_model("llama", **{**DEEP, "num_hidden_layers": 9}), tokenizer=tokenizer(), dtype="fp32"
    )
    layers = deep.anatomy.layers
    slow = [
        replace(layer, mixer=layer.attention) if index in (2, 7, 8) else layer
        for index, layer in enumerate(layers)
    ]
    parts = replace(deep.anatomy, layers=tuple(slow))
    miner = tries._Miner(tries.of_first_layers(deep, 3), parts, None, 2)
    assert miner._of_all(0.0, {0: 5.0, 1: 6.0, 2: 16.0}, 16.5) == pytest.approx(5 + 0.5 + 5 * 1 + 3 * 10)


def test_what_does_not_fit_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and disk, each with what to do; else that all fits."""
    text = load_corpus(texts(20))
    assert mn.plan(model, text).lacking == () and "All of it fits." in str(mn.plan(model, text))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(memory, "available", lambda: -1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    short, disk = mn.plan(model, text).lacking
    assert short.startswith("memory: ") and "--top" in short
    assert disk.startswith("disk: ") and "another folder" in disk


def test_growth_is_what_a_block_holds_at_most() -> None:
    """What was given back before its end counts, where the system tells."""
    if memory.status("VmHWM") is None:
        pytest.skip("this system does not tell")
    with memory.growth() as grown:
        np.ones(60_000_000 // 8).sum()
    assert 50_000_000 < grown[0] < 90_000_000
    with memory.growth() as little:
        pass
    assert little[0] < 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_any_family_is_priced(family: str) -> None:
    """One whose neurons are not gated, and a mixture of experts."""
    from families import MIXTURES

    built = {**FAMILIES, **MIXTURES}[family]()
    said = mn.plan(mn.load_model(built, tokenizer=tokenizer(), dtype="fp32"), texts(20))
    assert isinstance(said, BuildPrice) and all(seconds >= 0 for seconds in said.seconds.values())
    assert ("trigger_weights" in said.disk) == (family == "qwen3_moe")


@pytest.mark.slow
def test_the_command_prints_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a table and as JSON; a number of devices that is none is one line."""
    monkeypatch.setattr(sys, "argv", ["mnemoscope"])
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(texts(20)))
    arguments = ["plan", str(folder), "--corpus", str(source), "--nulls", "none"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "reading values" in shown and "disk, the run" in shown
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert data["tokens"] > 100 and data["disk"]["triggers"] > 0 and "null_triggers" not in data["disk"]
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    rows = page.partition("## The price of a build")[2].partition("\n## ")[0].splitlines()
    fields = {
        name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert fields == data.keys()
    failed = CliRunner().invoke(app, [*arguments, "--devices", "0"])
    assert isinstance(failed.exception, RunError) and "--devices 0" in failed.exception.on_command_line()
