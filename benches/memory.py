"""Peak memory of a whole build at 1 M tokens beside that at 100 k (target: at most 1.05 of it).

Each build runs in a process of its own and reports the operating system's figure for it. The default model is a
random one of two layers, so that the bench takes minutes; ``--model sample:smollm2-135m`` takes the real one.

    python -m benches.memory [--model tiny] [--tokens 100000 1000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mnemoscope import build, load_corpus, load_model
from mnemoscope.model.model import Model
from mnemoscope.text import samples


def tiny() -> Model:
    """Two random layers of 1,536 gated neurons under the sample model's tokenizer."""
    folder = samples.model_folder()
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=64,
        intermediate_size=1_536,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return load_model(LlamaForCausalLM(config), tokenizer=AutoTokenizer.from_pretrained(folder))


def one(name: str, tokens: int) -> None:
    """Build, and print the peak of this process in MiB."""
    model = tiny() if name == "tiny" else load_model(name)
    with tempfile.TemporaryDirectory() as folder:
        run = build(model, load_corpus("sample:wikipedia", limit=tokens), Path(folder) / "run")
        counted = run.manifest.corpus.tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens": counted, "peak_mib": round(peak)}))


def main() -> None:
    """Parse, start one process for each size, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.model, arguments.one)
        return
    found = []
    for tokens in arguments.tokens:
        command = [sys.executable, "-m", "benches.memory", "--model", arguments.model, "--one", str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    ratio = round(found[1]["peak_mib"] / found[0]["peak_mib"], 3)
    print(
        json.dumps(
            {"bench": "memory", "model": arguments.model, "runs": found, "ratio": ratio, "target": 1.05}
        )
    )


if __name__ == "__main__":
    main()
