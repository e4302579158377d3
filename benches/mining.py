"""What building costs beside a plain forward pass over the same tokens (target: at most 1.00 of it).

Six ways take turns batch by batch, so that a machine whose speed drifts slows all of them:

    plain   ``model(input_ids)`` with the language-model head: what a user pays anyway
    floor   the body alone, stopped at the last down projection: what one pass must cost
    mining  the capture and every accumulator: both polarities, top 50, moments, ranges, histograms, samples
    nulls   the same, with the null units that a build has unless told otherwise (target: at most 1.08 of mining)
    chimera, covariance   mining with a decoy of that kind for every neuron (target: at most 2.0 of mining)

    python -m benches.mining [--tokens 200000] [--dtype auto]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mnemoscope import load_corpus, load_model
from mnemoscope.arguments import DECOYS
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model, native_bf16
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch
from mnemoscope.text.corpus import write_plan
from mnemoscope.text.plan import Plan

WARM_UP = 3  # batches: compilation, first touch of memory


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(model: Model, plan: Plan) -> dict[str, float]:
    """Seconds spent in each way over all batches of the plan but the first few."""
    states = {
        "mining": RunStatistics.of(model, Nulls(model, ()), 50),
        "nulls": RunStatistics.of(model, Nulls(model), 50),
        **{kind: RunStatistics.of(model, Nulls(model, [kind]), 50) for kind in DECOYS},
    }
    spent = dict.fromkeys(("plain", "floor", *states), 0.0)
    seen = 0

    def plain(batch: ContextBatch) -> None:
        with torch.inference_mode():
            model.hf(input_ids=torch.from_numpy(batch.tokens).long(), use_cache=False)

    def floor(batch: ContextBatch) -> None:
        with Capture(model) as capture:
            capture.sweep(batch, lambda *_: None)

    def mining(batch: ContextBatch, state: str = "mining") -> None:
        with Capture(model) as capture:
            capture.sweep(batch, states[state].update)

    ways = {"plain": plain, "floor": floor} | {name: partial(mining, state=name) for name in states}
    for shard in range(plan.shards):
        for batch in plan.batches(shard):
            order = list(ways)[seen % len(ways) :] + list(ways)[: seen % len(ways)]
            for name in order:
                seconds = timed(lambda way=ways[name], b=batch: way(b))
                spent[name] += seconds if seen >= WARM_UP else 0.0
            seen += 1
        for name, state in states.items():
            spent[name] += timed(lambda s=state, n=shard: s.finish_shard(n))
    return spent


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = load_model("sample:smollm2-135m", dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus("sample:wikipedia", limit=arguments.tokens)
        plan = write_plan(corpus, model.tokenizer, Path(folder), context_length=2048)
        spent = measure(model, plan)
    print(
        json.dumps(
            {
                "bench": "mining",
                "dtype": model.dtype,
                "native_bf16": native_bf16(),
                "tokens": plan.tokens,
                "threads": torch.get_num_threads(),
                "seconds": {name: round(value, 1) for name, value in spent.items()},
                "tokens_per_second": {name: round(plan.tokens / value) for name, value in spent.items()},
                "ratio_to_plain": round(spent["mining"] / spent["plain"], 3),
                "floor_to_plain": round(spent["floor"] / spent["plain"], 3),
                "target": 1.0,
                "nulls_to_mining": round(spent["nulls"] / spent["mining"], 3),
                "nulls_target": 1.08,
                "decoys_to_mining": {kind: round(spent[kind] / spent["mining"], 3) for kind in DECOYS},
                "decoys_target": 2.0,
            }
        )
    )


if __name__ == "__main__":
    main()
