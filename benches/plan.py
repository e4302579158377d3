"""What `mnemoscope plan` says beside what the build then takes (target: within 25 % of time, memory and disk).

Each is done in a process of its own, with a cache folder in which no values are kept. The random model has the shape of
Llama 3.2 1B, but for its vocabulary, which is that of the sample model's tokenizer.

    python -m benches.plan [--model sample:smollm2-135m random-1b] [--tokens 40000 100000 250000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RANDOM = "random-1b"
RANDOM_TOKENS = 2_000
TARGET = 0.25


def loaded(name: str) -> Any:
    """The model of that name."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from benches.memory import tiny
    from mnemoscope import load_model
    from mnemoscope.model.model import native_bf16
    from mnemoscope.text import samples

    if name == "tiny":
        return tiny()
    if name != RANDOM:
        return load_model(name)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2_048,
        intermediate_size=8_192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        dtype=torch.bfloat16 if native_bf16() else torch.float32,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(config.dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return load_model(model, tokenizer=AutoTokenizer.from_pretrained(samples.model_folder()))


def planned(name: str, tokens: int) -> dict[str, Any]:
    """What is said."""
    from mnemoscope import load_corpus, plan

    said = plan(loaded(name), load_corpus("sample:wikipedia", limit=tokens)).to_dict()
    return {
        "tokens": said["tokens"],
        "seconds": said["seconds"],
        "all_seconds": sum(said["seconds"].values()),
        "peak_bytes": said["peak"],
        "disk_bytes": sum(said["disk"].values()),
        "disk": said["disk"],
        "memory": said["memory"],
        "measured_seconds": said["measured"],
    }


def built(name: str, tokens: int) -> dict[str, Any]:
    """What it takes."""
    from mnemoscope import build, load_corpus
    from mnemoscope.memory import high

    model, text, seconds = loaded(name), load_corpus("sample:wikipedia", limit=tokens), Counter[str]()

    def told(step: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        # Some layers are read before anything is mined, to say how long all of it takes.
        seconds[step.stage.replace("reading first values", "reading values")] += now - last
        last = now

    with tempfile.TemporaryDirectory() as folder:
        begin = last = time.perf_counter()
        run = build(model, text, Path(folder) / "run", report=told)
        whole = time.perf_counter() - begin
    seconds["writing tables"] += begin + whole - last  # hashes of the weights and the tables
    return {
        "tokens": run.manifest.corpus.tokens,
        "seconds": dict(seconds),
        "all_seconds": whole,
        "peak_bytes": high(),
        "disk_bytes": sum(entry.bytes for entry in run.manifest.tables.values()),
        "disk": {table: entry.bytes for table, entry in run.manifest.tables.items()},
    }


def apart(what: str, name: str, tokens: int) -> dict[str, Any]:
    """One of the two in a process of its own."""
    from mnemoscope.files import cache_folder

    with tempfile.TemporaryDirectory() as cache:
        for kind in ("models", "corpora"):
            (Path(cache) / kind).symlink_to(cache_folder() / kind)
        command = [
            sys.executable,
            "-m",
            "benches.plan",
            "--one",
            what,
            "--model",
            name,
            "--tokens",
            str(tokens),
        ]
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"MNEMOSCOPE_CACHE": cache},
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compared(name: str, tokens: int) -> dict[str, Any]:
    """Both, and what is said over what it takes."""
    said, took = (apart(what, name, tokens) for what in ("planned", "built"))
    ratios = {
        key: round(said[key] / took[key], 3) for key in ("tokens", "all_seconds", "peak_bytes", "disk_bytes")
    }
    stages = {
        stage: [round(said["seconds"].get(stage, 0.0), 1), round(seconds, 1)]
        for stage, seconds in took["seconds"].items()
    }
    tables = {table: [said["disk"].get(table, 0), size] for table, size in took["disk"].items()}
    return {
        "bench": "plan",
        "model": name,
        "limit": tokens,
        "ratios": ratios,
        "within_target": all(abs(ratio - 1) <= TARGET for ratio in ratios.values()),
        "trying_seconds": round(said["measured_seconds"], 1),
        "stages": stages,
        "memory": said["memory"],
        "peak_bytes": [said["peak_bytes"], took["peak_bytes"]],
        "tables": tables,
    }


def main() -> None:
    """Print one JSON object for each model and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["sample:smollm2-135m", RANDOM])
    parser.add_argument("--tokens", nargs="+", type=int, default=[40_000, 100_000, 250_000])
    parser.add_argument("--one", choices=["planned", "built"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps({"planned": planned, "built": built}[given.one](given.model[0], given.tokens[0])))
        return
    for name in given.model:
        for tokens in given.tokens if name != RANDOM else [RANDOM_TOKENS]:
            print(json.dumps(compared(name, tokens)), flush=True)


if __name__ == "__main__":
    main()
