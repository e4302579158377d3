"""What mining costs beside the model: nanoseconds a coefficient, part by part, on made-up activations.

    python benches/kernel.py [--compile] [--threads N]

Prints JSON. Times are per coefficient that counts, in wall-clock time of all threads together (best of several rounds
over batches that do not fit the cache). `estimate_seconds` is what 130,000 tokens of the sample model would cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from mnemoscope.mine.moments import Histograms, Moments
from mnemoscope.mine.places import HISTOGRAM_EVERY, CountedPlaces
from mnemoscope.mine.scan import scan
from mnemoscope.mine.statistics import NeuronStatistics
from mnemoscope.mine.triggers import Samples, Triggers
from mnemoscope.records import Cells, ContextBatch

CONTEXTS, TOKENS, NEURONS, TOP = 40, 100, 1536, 50
BATCHES = 32  # 32 x 40 contexts: what 130,000 tokens of the sample corpus come to
COEFFICIENTS = 130_000 * 46_080


def batch(index: int) -> ContextBatch:
    """All of one length; position 0 does not count."""
    r = np.random.default_rng(index)
    tokens = r.integers(1, 49_152, (CONTEXTS, TOKENS)).astype(np.int32)
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    ids = np.arange(CONTEXTS) + CONTEXTS * index
    return ContextBatch(ids, tokens, np.full(CONTEXTS, TOKENS, np.int32), counted)


def activations(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Gated, heavy-tailed coefficients with their gate and up; a few buffers, taken in turn."""
    generator = torch.Generator().manual_seed(0)
    buffers = []
    for _ in range(4):
        gate, up = torch.randn(2, CONTEXTS, TOKENS, NEURONS, generator=generator) * 1.5
        buffers.append((torch.nn.functional.silu(gate) * up, gate, up))
    cast = [tuple(part.to(dtype) for part in buffer) for buffer in buffers]
    for index in range(BATCHES):
        yield cast[index % len(cast)]  # type: ignore[misc]


def compile_all(dtype: torch.dtype) -> float:
    """Processor seconds until everything is compiled, or read from the cache."""
    before = time.process_time()
    states = [NeuronStatistics((8,), 2, 1) for _ in range(2)]
    for shard, state in enumerate(states):
        x = torch.randn(CONTEXTS, TOKENS, 8).to(dtype)
        state.update(0, x, batch(0), x, x)
        state.finish_shard(shard)
    states[0].merge(states[1])
    return time.process_time() - before


def measure(dtype: torch.dtype) -> dict[str, float]:
    """Nanoseconds a coefficient of each part, over one simulated layer of the whole corpus."""
    cells = Cells((NEURONS,))
    tables = {
        "triggers": Triggers(cells, TOP),
        "moments": Moments(cells),
        "histograms": Histograms(cells),
        "samples": Samples(cells),
    }
    spent = dict.fromkeys(["places", "scan", *tables], 0.0)

    def clock(name: str, work: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = work()
        spent[name] += time.perf_counter() - start
        return result

    counted = 0
    for index, (x, gate, up) in enumerate(activations(dtype)):
        given = batch(index)
        places: CountedPlaces = clock("places", lambda b=given: CountedPlaces.of(b, HISTOGRAM_EVERY))  # type: ignore[assignment]
        pivot = tables["moments"].pivot(0)  # type: ignore[attr-defined]
        reading = clock(
            "scan",
            lambda a=(x, given, gate, up), p=places, q=pivot: scan(0, *a, places=p, pivot=q),  # type: ignore[misc]
        )
        counted += reading.counted * NEURONS  # type: ignore[attr-defined]
        for name, table in tables.items():
            clock(name, lambda t=table, r=reading: t.update(r))  # type: ignore[misc]
    spent["places"] /= 30  # once for all layers of the sample model
    found = {name: 1e9 * seconds / counted for name, seconds in spent.items()}
    found["all"] = sum(found.values())
    found["estimate_seconds"] = found["all"] * COEFFICIENTS / 1e9
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="time the compiler only, for bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    out: dict[str, object] = {"compile_processor_seconds": round(compile_all(torch.bfloat16), 2)}
    if not given.compile:
        compile_all(torch.float32)
        out["threads"] = given.threads
        out["nanoseconds_a_coefficient"] = {"bf16": measure(torch.bfloat16), "fp32": measure(torch.float32)}
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
