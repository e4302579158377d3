"""The same job with TransformerLens and nnsight (target: at least 3 x slower than mining).

The job is the top 50 tokens of every neuron, both polarities, over the same padded batches in the same dtype. The
peers are used as their documentation shows: cache the input of the down projection, mask what does not count,
``torch.topk`` along the tokens, and merge with the running top. Mining does this and more (moments, ranges,
histograms, samples, one trigger per context); ``_and_moments`` are the peers with the moments and ranges as well, in
plain torch, histograms and samples still left out. Each way runs every batch in turn.

    python -m benches.peers [--batches 6] [--dtype auto]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import nnsight
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mnemoscope import load_corpus, load_model
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.capture import Capture, residuals
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.records import ContextBatch
from mnemoscope.text.corpus import write_plan

TOP = 50


class RunningTop:
    """Top values and where they were, per layer and polarity, by torch.topk."""

    def __init__(self) -> None:
        self.best: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, coefficients: Tensor, batch: ContextBatch) -> None:
        """Merge one layer of one batch."""
        counted = torch.from_numpy(batch.counted)
        places = torch.nonzero(counted.flatten())[:, 0] + (int(batch.contexts[0]) << 24)
        flat = coefficients[counted]
        for polarity in (1, -1):
            values, rows = flat.topk(min(TOP, flat.shape[0]), dim=0, largest=polarity > 0)
            where = places[rows]
            if (layer, polarity) in self.best:
                old_values, old_where = self.best[layer, polarity]
                values, where = torch.cat([old_values, values]), torch.cat([old_where, where])
                values, rows = values.topk(min(TOP, values.shape[0]), dim=0, largest=polarity > 0)
                where = where.gather(0, rows)
            self.best[layer, polarity] = (values, where)


class RunningMoments:
    """Four power sums, range and positive share, per layer, as one would write them."""

    def __init__(self) -> None:
        self.known: dict[int, list[Tensor]] = {}

    def update(self, layer: int, coefficients: Tensor, batch: ContextBatch) -> None:
        """Add one layer of one batch."""
        flat = coefficients[torch.from_numpy(batch.counted)].float()
        sums = torch.stack([flat.pow(power).sum(0) for power in (1, 2, 3, 4)]).double()
        found = [sums, (flat > 0).sum(0), flat.amin(0), flat.amax(0)]
        if layer in self.known:
            old = self.known[layer]
            found = [
                old[0] + found[0], old[1] + found[1], old[2].minimum(found[2]), old[3].maximum(found[3])
            ]  # fmt: skip
        self.known[layer] = found


Keep = Callable[[int, Tensor, ContextBatch], None]


def keepers(moments: bool) -> list[Keep]:
    """What a peer does with a layer's coefficients."""
    return [RunningTop().update, RunningMoments().update] if moments else [RunningTop().update]


def transformer_lens_way(bridge: TransformerBridge, moments: bool) -> Callable[[ContextBatch], None]:
    """run_with_cache, then topk."""
    keep = keepers(moments)

    def run(batch: ContextBatch) -> None:
        tokens = torch.from_numpy(batch.tokens).long()
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("mlp.hook_post"))
            for layer in range(bridge.cfg.n_layers):
                for one in keep:
                    one(layer, cache[f"blocks.{layer}.mlp.hook_post"], batch)

    return run


def nnsight_way(model: Model, moments: bool) -> Callable[[ContextBatch], None]:
    """A trace that saves every down projection's input, then topk."""
    wrapped = nnsight.LanguageModel(model.hf, tokenizer=model.tokenizer)
    keep = keepers(moments)

    def run(batch: ContextBatch) -> None:
        tokens = torch.from_numpy(batch.tokens).long()
        with torch.inference_mode(), wrapped.trace(tokens):
            kept = nnsight.save([layer.mlp.down_proj.input for layer in wrapped.model.layers])
        with torch.inference_mode():
            for layer, coefficients in enumerate(kept):
                for one in keep:
                    one(layer, coefficients, batch)

    return run


def mnemoscope_way(model: Model) -> Callable[[ContextBatch], None]:
    """Everything that a build keeps of the neurons."""
    mined = RunStatistics.of(model, Nulls(model, ()), TOP)

    def run(batch: ContextBatch) -> None:
        with Capture(model) as capture:
            capture.sweep(batch, mined.update)

    return run


def agreement(model: Model, bridge: TransformerBridge, batch: ContextBatch) -> dict[str, float]:
    """Largest difference from TransformerLens' own hooks, as a share of the largest value (fp32: 1e-4)."""
    tokens = torch.from_numpy(batch.tokens[:2]).long()
    worst = {"coefficients": 0.0, "residuals": 0.0}
    part = ContextBatch(batch.contexts[:2], batch.tokens[:2], batch.lengths[:2], batch.counted[:2])
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(tokens)
    points = residuals(model, tokens)
    names = {"Lin": "hook_resid_pre", "Lres": "hook_resid_mid", "Lout": "hook_resid_post"}

    def share(found: Tensor, expected: Tensor) -> float:
        return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())

    def compare(layer: int, coefficients: Tensor, *_: object) -> None:
        expected = cache[f"blocks.{layer}.mlp.hook_post"]
        worst["coefficients"] = max(worst["coefficients"], share(coefficients, expected))

    with Capture(model) as capture:
        capture.sweep(part, compare)
    for layer in range(model.anatomy.n_layers):
        for point, name in names.items():
            difference = share(points[point][layer], cache[f"blocks.{layer}.{name}"])
            worst["residuals"] = max(worst["residuals"], difference)
    return worst


def measure(
    ways: dict[str, Callable[[ContextBatch], None]], batches: Iterable[ContextBatch]
) -> dict[str, float]:
    """Seconds of each way over the batches after the first, in turns."""
    spent = dict.fromkeys(ways, 0.0)
    for index, batch in enumerate(batches):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(batch)
            spent[name] += time.perf_counter() - begin if index else 0.0
    return spent


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = load_model("sample:smollm2-135m", dtype=arguments.dtype)
    other = load_model("sample:smollm2-135m", dtype=arguments.dtype)
    bridge = TransformerBridge.boot_transformers(
        "sample",
        hf_model=other.hf,
        tokenizer=other.tokenizer,
        device="cpu",
        dtype=next(other.hf.parameters()).dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus("sample:wikipedia", limit=40_000)
        plan = write_plan(corpus, model.tokenizer, Path(folder), context_length=2048)
        batches = list(islice(plan.batches(0), arguments.batches + 1))
    found = agreement(model, bridge, batches[0])
    assert model.dtype != "fp32" or max(found.values()) < 1e-4, found
    third = load_model("sample:smollm2-135m", dtype=arguments.dtype)
    ways = {"mnemoscope": mnemoscope_way(model)}
    for name, moments in (("", False), ("_and_moments", True)):
        ways[f"transformer_lens{name}"] = transformer_lens_way(bridge, moments)
        ways[f"nnsight{name}"] = nnsight_way(third, moments)
    spent = measure(ways, batches)
    print(
        json.dumps(
            {
                "bench": "peers",
                "dtype": model.dtype,
                "tokens": sum(batch.n_tokens for batch in batches[1:]),
                "seconds": {name: round(value, 1) for name, value in spent.items()},
                "times_slower": {
                    name: round(value / spent["mnemoscope"], 2)
                    for name, value in spent.items()
                    if name != "mnemoscope"
                },
                "target": 3.0,
                "largest_difference_from_transformer_lens": found,
            }
        )
    )


if __name__ == "__main__":
    main()
