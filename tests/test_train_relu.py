"""The bench that trains a ReLU decoder: its losses, and a run built on what it saves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny import WORDS, tokenizer

import mnemoscope as mn
from benches.train_relu import CHUNK, build, chunks, loss_of, model_of, sampled_loss, unigram_loss


def learnable(count: int) -> list[str]:
    """Documents in which each word but a few is followed by the same word: a circle that is entered anywhere."""
    generator = np.random.default_rng(0)
    words = list(dict.fromkeys(WORDS))
    texts = []
    for _ in range(count):
        place, text = int(generator.integers(len(words))), []
        for _ in range(100):
            text.append(words[place % len(words)])
            place += 1 if generator.random() < 0.95 else int(generator.integers(len(words)))
        texts.append(" ".join(text))
    return texts


@pytest.mark.slow
def test_the_sampled_loss_is_the_whole_one() -> None:
    """With all tokens drawn it is the loss over the vocabulary; with some, about that on average."""
    model = model_of(80, 2, 64, 0).eval()
    rows = np.random.default_rng(0).integers(4, 50, (4, CHUNK + 1))
    tokens = torch.from_numpy(rows)
    with torch.no_grad():
        whole = loss_of(model, rows)
        model.eval()
        every = float(sampled_loss(model, tokens, torch.Generator().manual_seed(0), 80))
        few = [float(sampled_loss(model, tokens, torch.Generator().manual_seed(n), 15)) for n in range(50)]
    assert every == pytest.approx(whole, abs=1e-5)
    assert np.mean(few) == pytest.approx(whole, abs=0.02)


def test_held_out_documents_are_not_trained_on() -> None:
    """Rows overlap by the token that is predicted, each document is on one side, and both sides have some."""
    texts = learnable(200)
    train, held_out = chunks(tokenizer(), texts)
    assert len(train) > 5 * len(held_out) > 0 and train.shape[1] == CHUNK + 1
    assert (train[:-1, -1] == train[1:, 0]).all()
    assert not {tuple(row) for row in train} & {tuple(row) for row in held_out}
    limited, _ = chunks(tokenizer(), texts, 4000)
    assert np.array_equal(limited, train[: len(limited)]) and 0 < len(limited) < len(train)


def test_frequencies_alone_have_their_entropy() -> None:
    """Of tokens drawn evenly the loss of frequencies is the log of how many there are."""
    rows = np.random.default_rng(0).integers(0, 50, (400, CHUNK + 1))
    assert unigram_loss(rows[:300], rows[300:], 50) == pytest.approx(np.log(50), abs=0.01)


@pytest.mark.slow
def test_a_trained_model_is_a_model_to_study(tmp_path: Path) -> None:
    """A few seconds bring the loss below that of frequencies; coefficients of its run are 0 and above, as printed."""
    texts = learnable(400)
    told = build(tmp_path / "model", tokenizer(), texts, seconds=60, steps=120, layers=2, width=64)
    assert told["loss_after"] < told["loss_of_frequencies"] - 0.5 < told["loss_before"]
    assert told["tokens"] == 120 * 16 * CHUNK
    model = mn.load_model(str(tmp_path / "model"))
    assert model.anatomy.activation == "relu" and not model.anatomy.gated
    run = mn.build(model, texts[:40], tmp_path / "run", top=5, nulls=())
    assert run.table("neurons").select(pl.col("min").min()).collect().item() >= 0
    assert run.table("triggers").select("polarity").unique().collect()["polarity"].to_list() == [1]
