"""What each command costs on an accelerator beside a plain forward pass, in one script of at most six minutes.

Models of the shapes of Llama 3.2 1B and Llama 3.1 8B are made on the device, with random weights, and nothing is
downloaded. One JSON object a line, for each shape:

    forward   ``model(input_ids)`` with the language-model head over batches of 4,096 tokens
    build     the capture and every accumulator over the same batches, in turn (aim: at most 1.10 of forward)
    values    values and keys of one layer through the vocabulary (aim: at most 1.5 of the bare products)
    explain   one prediction after 64 tokens, the second time it is asked
    peak      memory of the device in each of these, of the process on a CPU

    python -m benches.device [--device auto] [--shapes 1b,8b] [--seconds 330]
    python -m benches.device --tiny    # a few layers on a CPU: tries the script, its figures mean nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import string
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benches.values import products
from mnemoscope.mine import values
from mnemoscope.mine.device import has_triton
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.model.reading import describe
from mnemoscope.prediction.explain import explain
from mnemoscope.records import ContextBatch

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "neurons": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 700},
    "1b": {"width": 2048, "neurons": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocabulary": 128_256},
    "8b": {"width": 4096, "neurons": 14_336, "layers": 32, "heads": 32, "kv_heads": 8, "vocabulary": 128_256},
}
LENGTH = 256  # tokens of a context
WARM_UP = 2  # batches: compilation, first touch of memory, lists that are empty
SHARES = {"build": 0.6}  # of the time that a shape has; the rest takes what it takes


def words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words of letters."""
    names = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    vocabulary = {"<s>": 0, "<unk>": 1} | {
        "Ġ" + name: i + 2 for i, name in zip(range(count - 2), names, strict=False)
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def random_model(shape: dict[str, int], device: torch.device) -> Model:
    """Weights drawn at random where they stay; not checked, for it is as all Llamas are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["neurons"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=shape["layers"] < 32,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with device:
            hf = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return Model(hf, words(shape["vocabulary"]), describe(hf), "random")


def batch_of(number: int, contexts: int, vocabulary: int) -> ContextBatch:
    """Random tokens of whole contexts."""
    tokens = np.random.default_rng(number).integers(2, vocabulary, (contexts, LENGTH)).astype(np.int32)
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    ids = np.arange(number * contexts, (number + 1) * contexts)
    return ContextBatch(ids, tokens, np.full(contexts, LENGTH, np.int32), counted)


class Clock:
    """Seconds of work on a device, and the memory that it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak: dict[str, float] = {}

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    @contextmanager
    def of(self, name: str) -> Any:
        """GiB at the most while this is entered."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        most = torch.cuda.max_memory_allocated(self._device) if cuda else 1024 * _resident()
        self.peak[name] = round(most / 2**30, 2)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def building(model: Model, clock: Clock, seconds: float, contexts: int) -> dict[str, object]:
    """Forward passes and mining in turn, batch by batch, for as long as there is time."""
    state = RunStatistics.of(model, Nulls(model, ()), 50)
    spent: dict[str, list[float]] = {"forward": [], "build": []}
    until = time.perf_counter() + seconds

    def forward(batch: ContextBatch) -> None:
        with torch.inference_mode():
            model.hf(input_ids=torch.from_numpy(batch.tokens).long().to(model.device), use_cache=False)

    number = 0
    with Capture(model) as capture:
        # The capture's own hooks see the plain pass too, and do nothing with it.
        ways: dict[str, Callable[[ContextBatch], None]] = {
            "forward": forward,
            "build": lambda batch: capture.sweep(batch, state.update, state.update_rows),
        }
        while number < WARM_UP + 2 or time.perf_counter() < until:
            batch = batch_of(number, contexts, model.anatomy.vocabulary)
            for name in list(ways)[:: 1 if number % 2 else -1]:
                spent[name].append(clock(lambda way=ways[name], b=batch: way(b)))
            number += 1
    state.finish_shard(0)
    kept = {name: each[WARM_UP:] for name, each in spent.items()}
    return {
        "tokens": contexts * LENGTH * len(kept["build"]),
        "tokens_per_second": {
            name: round(contexts * LENGTH * len(each) / sum(each)) for name, each in kept.items()
        },
        "build_to_forward": round(sum(kept["build"]) / sum(kept["forward"]), 3),
        "build_to_forward_at_the_end": round(kept["build"][-1] / kept["forward"][-1], 3),
    }


def measure(name: str, device: torch.device, seconds: float, contexts: int = 16) -> dict[str, object]:
    """Everything of one shape."""
    begin, clock = time.perf_counter(), Clock(device)
    model = random_model(SHAPES[name], device)
    made = time.perf_counter() - begin
    left = seconds - made
    with clock.of("build"):
        built = building(model, clock, SHARES["build"] * left, contexts)
    with clock.of("values"):
        rounds = [
            (clock(lambda: products(model, values._TOKENS)), clock(lambda: list(values.layers(model, [0]))))
            for _ in range(2)
        ]
    prompt = " ".join(model.tokenizer.convert_ids_to_tokens(range(2, 66))).replace("Ġ", "")
    with clock.of("explain"):
        explained = [clock(lambda: explain(model, prompt)) for _ in range(2)]
    bare, read = rounds[-1]
    return {
        "bench": "device",
        "shape": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "kernel": "triton" if has_triton(device.type) else "torch",
        "dtype": model.dtype,
        "seconds": {
            "made": round(made, 2), "values_of_a_layer": round(read, 3), "products": round(bare, 3),
            "explain_first": round(explained[0], 2), "explain": round(explained[1], 2),
            "all": round(time.perf_counter() - begin, 1),
        },
        **built,
        "values_to_products": round(read / bare, 3),
        "peak_gib": clock.peak,
        "targets": {"build_to_forward": 1.1, "values_to_products": 1.5},
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--seconds", type=float, default=330, help="for all shapes together")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        print(json.dumps(measure("tiny", torch.device("cpu"), 4, contexts=2)))
        return
    found = torch.accelerator.current_accelerator() if given.device == "auto" else torch.device(given.device)
    if found is None or not torch.accelerator.is_available():
        print(
            "benches.device: there is no accelerator here that torch can use; --tiny tries the script on a CPU",
            file=sys.stderr,
        )
        sys.exit(2)
    names = given.shapes.split(",")
    weights = {name: SHAPES[name]["layers"] for name in names}
    for name in names:
        print(
            json.dumps(measure(name, found, given.seconds * weights[name] / sum(weights.values()))),
            flush=True,
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
