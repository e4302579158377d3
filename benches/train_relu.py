"""A small decoder with ReLU neurons is trained on the sample text, so that the papers' claims are testable as printed.

Geva et al. 2021 and Yu et al. 2023 looked at plain ReLU layers: a coefficient is 0 or above, a key is one row, and a
memory is active or not. The sample model is gated. Here an OPT-like decoder with the sample model's tokenizer reads the
text in chunks of 128 tokens, once or twice in 20 minutes on two idle cores. It is saved as a folder that
every command takes for a model; documents that it was not trained on are 5 % of all, by a hash.

The loss of a step is over a sample of the vocabulary: the tokens of the batch, and drawn ones that stand for the rest.
What is printed is the loss over all of it, before and after, on the held-out documents, in nats a token, beside that of
the frequencies of tokens alone.

    python -m benches.train_relu FOLDER [--minutes 20] [--layers 4] [--width 256] [--limit TOKENS] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from mnemoscope import load_corpus
from mnemoscope.text.samples import model_folder
from mnemoscope.text.sampling import splitmix64
from mnemoscope.text.tokenizer import encode

CHUNK = 128  # tokens that a row holds: what can be attended to
BATCH = 16  # rows of a step
DRAWN = 4096  # tokens of the vocabulary that stand for those that are not in the batch
RATE = 2e-3  # of AdamW, at its height
WARM = 0.05  # of the training, in which it rises
HELD_OUT = 20  # one document in so many


def model_of(vocabulary: int, layers: int, width: int, seed: int) -> OPTForCausalLM:
    """An untrained OPT: ReLU, pre-norm, learned positions, tied embeddings; four neurons for each unit of width."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=CHUNK,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return OPTForCausalLM(config)


def chunks(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """i64[row, CHUNK + 1] each: of the documents to train on and of those held out, one after another.

    limit  tokens, of all documents from the first on
    """
    parts: tuple[list[int], list[int]] = ([], [])
    for number, tokens in enumerate(encode(tokenizer, texts)):
        parts[int(splitmix64(number) % np.uint64(HELD_OUT) == 0)].extend(tokens)
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    train, held_out = (np.array(part, np.int64) for part in parts)
    return _rows(train), _rows(held_out)


def _rows(tokens: np.ndarray) -> np.ndarray:
    starts = np.arange(0, len(tokens) - CHUNK, CHUNK)
    return tokens[starts[:, None] + np.arange(CHUNK + 1)]


@torch.no_grad()
def loss_of(model: OPTForCausalLM, rows: np.ndarray) -> float:
    """Mean loss over all positions in nats, through the whole vocabulary."""
    model.eval()
    losses = []
    for row in rows:
        tokens = torch.from_numpy(row)
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[1:])))
    model.train()
    return float(np.mean(losses))


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """The loss of the frequencies of tokens, each counted once more than it is there."""
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out[:, 1:]].mean())


def sampled_loss(
    model: OPTForCausalLM, tokens: torch.Tensor, generator: torch.Generator, drawn: int = DRAWN
) -> torch.Tensor:
    """Mean loss over a sample of the vocabulary: the next tokens of the batch, and others that stand for the rest."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    wanted = tokens[:, 1:]
    present, place = wanted.unique(return_inverse=True)
    rows = model.lm_head.weight
    absent = torch.ones(len(rows), dtype=torch.bool)
    absent[present] = False
    rest = absent.nonzero()[:, 0]
    chosen = rest[torch.randperm(len(rest), generator=generator)[:drawn]]
    extra = math.log(len(rest) / len(chosen)) if len(chosen) else 0.0
    logits = hidden @ rows[torch.cat([present, chosen])].T
    logits = logits + torch.cat([torch.zeros(len(present)), torch.full((len(chosen),), extra)])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), place.flatten())


def train(
    model: OPTForCausalLM, rows: np.ndarray, *, seconds: float, steps: int | None = None, seed: int = 0
) -> tuple[int, float]:
    """Steps until the time or their number is up, the rate falling to 0 by then; returns steps and seconds."""
    generator = torch.Generator().manual_seed(seed)
    decayed = [one for one in model.parameters() if one.ndim >= 2]
    others = [one for one in model.parameters() if one.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.98),
    )
    model.train()
    start, done = time.perf_counter(), 0
    order = torch.empty(0, dtype=torch.int64)
    while (elapsed := time.perf_counter() - start) < seconds and done != steps:
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = order[:BATCH], order[BATCH:]
        gone = max(elapsed / seconds, done / steps if steps else 0.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (gone + 1e-3) / WARM) * 0.5 * (1 + math.cos(math.pi * gone))
        loss = sampled_loss(model, torch.from_numpy(rows[batch.numpy()]), generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done += 1
    model.eval()
    return done, time.perf_counter() - start


def build(
    folder: Path,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seconds: float,
    layers: int = 4,
    width: int = 256,
    steps: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    checked: int = 64,
) -> dict[str, Any]:
    """Train and save a model with its tokenizer; what is printed.

    checked  rows of held-out text on which losses are taken, at most
    """
    rows, held_out = chunks(tokenizer, texts, limit)
    if len(rows) < BATCH or not len(held_out):
        raise SystemExit(f"training: {len(rows)} rows of {CHUNK} tokens are too few; give more text")
    model = model_of(len(tokenizer), layers, width, seed)
    before = loss_of(model, held_out[:checked])
    done, taken = train(model, rows, seconds=seconds, steps=steps, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "layers": layers,
        "neurons": 4 * width,
        "parameters": sum(one.numel() for one in model.parameters()),
        "tokens": done * BATCH * CHUNK,
        "epochs": round(done * BATCH / len(rows), 2),
        "seconds": round(taken, 1),
        "loss_before": round(before, 3),
        "loss_after": round(loss_of(model, held_out[:checked]), 3),
        "loss_of_frequencies": round(unigram_loss(rows, held_out[:checked], len(tokenizer)), 3),
    }


def main() -> None:
    """Parse, train, save, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = [document.text for document in load_corpus("sample:wikipedia").documents]
    result = build(
        arguments.folder,
        tokenizer,
        texts,
        seconds=60 * arguments.minutes,
        layers=arguments.layers,
        width=arguments.width,
        limit=arguments.limit,
        seed=arguments.seed,
    )
    print(json.dumps({"bench": "train_relu", "folder": str(arguments.folder), **result}))


if __name__ == "__main__":
    main()
