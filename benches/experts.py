"""What building of a mixture of many small experts costs beside a plain forward pass (target: at most 1.15 of it).

The model is random: its layers are tiny, so that what is done for each expert cannot hide behind its products. Two
ways take turns batch by batch, so that a machine whose speed drifts slows both:

    plain   ``model(input_ids)`` with the language-model head, under the same implementation of experts
    mining  the capture and every accumulator: both polarities, top 50, moments, ranges, histograms, samples

Of the last layer a capture takes no down projections, which of two layers is a larger part than of many: ask for more
of them. Lists are empty at first, and while they fill every context enters them: of more text the ratio is smaller.

    python -m benches.experts [--tokens 200000] [--layers 2] [--width 128] [--neurons 96] [--experts 64] [--top 8]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.check import examine
from mnemoscope.model.experts import taken_apart
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch

CONTEXTS, LENGTH = 16, 256  # of a batch
WARM_UP = 2  # batches: compilation, first touch of memory


def random_model(layers: int, width: int, neurons: int, experts: int, top: int) -> Model:
    """Layers of experts, with weights drawn at random."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=neurons,
        moe_intermediate_size=neurons,
        num_experts=experts,
        num_experts_per_tok=top,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=LENGTH,
    )
    hf = Qwen3MoeForCausalLM(config).eval()
    return Model(hf, None, examine(hf)[0], "random")


def batch_of(number: int) -> ContextBatch:
    """Random tokens of whole contexts."""
    tokens = np.random.default_rng(number).integers(0, 1000, (CONTEXTS, LENGTH)).astype(np.int32)
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    contexts = np.arange(number * CONTEXTS, (number + 1) * CONTEXTS)
    return ContextBatch(contexts, tokens, np.full(CONTEXTS, LENGTH, np.int32), counted)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, of a processor: what other programs take while it runs is not counted."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(model: Model, batches: int) -> dict[str, list[float]]:
    """Processor seconds of each way for each batch but the first few."""
    state = RunStatistics.of(model, Nulls(model, ()), 50)
    seconds: dict[str, list[float]] = {"plain": [], "mining": []}

    def plain(batch: ContextBatch) -> None:
        with torch.inference_mode(), taken_apart(model.hf):
            model.hf(input_ids=torch.from_numpy(batch.tokens).long(), use_cache=False)

    with Capture(model) as capture:
        # The capture's own hooks see the plain pass too, and do nothing with it.
        ways = {"plain": plain, "mining": lambda batch: capture.sweep(batch, state.update, state.update_rows)}
        for number in range(WARM_UP + batches):
            batch = batch_of(number)
            for name in list(ways)[:: 1 if number % 2 else -1]:
                seconds[name].append(timed(lambda way=ways[name], b=batch: way(b)))
    state.finish_shard(0)
    assert int(state.neurons.shard_rows()["tokens"][0].as_py()) == (WARM_UP + batches) * CONTEXTS * (
        LENGTH - 1
    )
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=96)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=8)
    arguments = parser.parse_args()
    sizes = {name: number for name, number in vars(arguments).items() if name != "tokens"}
    model = random_model(**sizes)
    seconds = measure(model, -(-arguments.tokens // (CONTEXTS * LENGTH)))
    ratios = np.divide(seconds["mining"], seconds["plain"])
    spent = {name: sum(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "bench": "experts",
                **vars(arguments),
                "threads": torch.get_num_threads(),
                "seconds": {name: round(value, 2) for name, value in spent.items()},
                "ratio_to_plain": round(spent["mining"] / spent["plain"], 3),
                "ratio_median": round(float(np.median(ratios)), 3),
                "target": 1.15,
            }
        )
    )


if __name__ == "__main__":
    main()
