"""What a build would take: counted exactly where it can be counted, and within bounds where it is drawn."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import model_folder, texts, tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope.cli import app
from mnemoscope.errors import RunError
from mnemoscope.mine import loop, price
from mnemoscope.mine.build import build
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch
from mnemoscope.results import BuildPrice
from mnemoscope.text import plan as planning
from mnemoscope.text.corpus import load_corpus


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Any:
    """Tries of a moment: no time is judged here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price, "SECONDS", 0.05)
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
    mined = price._Mined(model, Nulls(model, nulls), 3)
    mined.tried(plan, tmp_path)
    cells = sum(len(each.cells) for each in mined.state.by_kind.values())
    for shards in range(1, 10):
        state = RunStatistics.of(model, Nulls(model, nulls), 3)
        with Capture(model) as capture:
            batch = next(plan.batches(0))
            for shard in range(shards):
                capture.sweep(batch, state.update)
                state.finish_shard(shard)
        held = sum(array.nbytes for each in state.by_kind.values() for array in each.state().values())
        said = mined.state_bytes(shards)
        assert held - 200 * shards <= said <= held + cells * price._NODE * (1 + np.log2(shards))


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
    piece = price._cut(batch, tokens)
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
        piece = price._cut(replace(batch(20), targets=batch(9)), tokens)
        assert len(piece.targets.contexts) == len(piece.contexts) == len(piece.targets.tokens) >= 1


@given(st.floats(0, 2), st.floats(1e-4, 1e-2), st.integers(1, 100_000))
def test_seconds_of_batches_that_were_cut_are_a_line(fixed: float, each: float, tokens: int) -> None:
    """So much for a batch and so much for a token are told apart by two sizes."""
    mined = price._Mined.__new__(price._Mined)
    mined.wholes, mined._batch_tokens = [], 1000.0
    mined._shard_seconds = mined._save_seconds = 0.0
    mined.tries = [(count, fixed + each * count) for count in (64, 500)]
    read = price._TextPrice(None, tokens, 1, 3, False, 0.0)  # type: ignore[arg-type]
    assert mined.seconds(read) == pytest.approx(each * tokens + fixed * -(-tokens // 1000), rel=1e-6)
    mined.wholes, mined._shard_seconds, mined._save_seconds = [(1000, 2.0), (600, 1.2)], 0.5, 0.25
    mining = tokens * 2e-3 + 1.5
    assert mined.seconds(read) == pytest.approx(mining + 0.25 * (1 + mining // loop.CHECKPOINT_SECONDS))


def test_work_that_is_tried_in_part_is_a_line() -> None:
    """What it takes whatever its size is not multiplied."""
    done: list[int] = []

    def work(count: int) -> None:
        done.append(count)
        clock[0] += 0.003 + count * 1e-4

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price.time, "perf_counter", lambda: clock[0])
        assert price._tried(work, 100_000) == pytest.approx(10.0)
        assert max(done) < 2_000
        assert price._tried(work, 50) == pytest.approx(0.008)


def test_more_devices_share_the_shards(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones: five shards on four devices take as long as two on one."""
    monkeypatch.setattr(price._Mined, "seconds", lambda self, read: 10.0)
    monkeypatch.setattr(planning, "SHARD_TOKENS", 300)
    text = load_corpus(texts(60))
    shards = mn.plan(model, text, nulls=()).shards
    assert shards >= 4
    for devices in (1, 2, 3, 100):
        said = mn.plan(model, text, nulls=(), devices=devices)
        assert said.seconds["mining"] == pytest.approx(10.0 * -(-shards // devices) / shards)


def test_what_does_not_fit_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and disk, each with what to do; else that all fits."""
    text = load_corpus(texts(20))
    assert mn.plan(model, text).lacking == () and "All of it fits." in str(mn.plan(model, text))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(price, "_available", lambda: -1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    memory, disk = mn.plan(model, text).lacking
    assert memory.startswith("memory: ") and "--top" in memory
    assert disk.startswith("disk: ") and "another folder" in disk


def test_growth_is_what_a_block_holds_at_most() -> None:
    """What was given back before its end counts, where the system tells."""
    if price._status("VmHWM") is None:
        pytest.skip("this system does not tell")
    with price._growth() as grown:
        np.ones(60_000_000 // 8).sum()
    assert 50_000_000 < grown[0] < 90_000_000
    with price._growth() as little:
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
    failed = CliRunner().invoke(app, [*arguments, "--devices", "0"])
    assert isinstance(failed.exception, RunError) and "--devices 0" in failed.exception.on_command_line()
