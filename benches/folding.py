"""How much memory it takes to add up what many parts of a build mined (target: three states).

Each state is as large as that of a real run of so many neurons, of one shard of random coefficients; a few are drawn
and lie in files, and each is read again and again as that of another shard. They are folded as `mnemoscope merge` does,
and the memory of all arrays is measured.

    python -m benches.folding [--files 40] [--layers 32] [--neurons 14336] [--top 50]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from collections import ChainMap
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mnemoscope.mine import loop
from mnemoscope.mine.statistics import NeuronStatistics, load_state, save_state
from mnemoscope.records import ContextBatch

CONTEXTS, LENGTH = 4, 24
DRAWN = 2  # files with numbers of their own


def drawn(sizes: tuple[int, ...], top: int, seed: int) -> NeuronStatistics:
    """What a shard of a few random contexts leaves."""
    generator = torch.Generator().manual_seed(seed)
    tokens = np.full((CONTEXTS, LENGTH), 5, np.int32)
    counted = np.arange(LENGTH)[None, :].repeat(CONTEXTS, 0) > 0
    contexts = np.arange(CONTEXTS) + seed * CONTEXTS
    batch = ContextBatch(contexts, tokens, np.full(CONTEXTS, LENGTH, np.int32), counted)
    statistics = NeuronStatistics(sizes, top)
    for layer, size in enumerate(sizes):
        statistics.update(layer, torch.randn(CONTEXTS, LENGTH, size, generator=generator), batch)
    statistics.finish_shard(seed)
    return statistics


class NumberedState:
    """A state of the loop, read from a file of many names: `number` says which shard it stands for."""

    def __init__(self, statistics: NeuronStatistics) -> None:
        self.statistics = statistics

    def merge(self, other: NumberedState) -> None:
        """Take in another's shards."""
        self.statistics.merge(other.statistics)

    @classmethod
    def load(cls, files: list[Path], number: Path) -> NumberedState:
        """The state that stands for a shard."""
        shard = int(number.name)
        own = {"neurons.shard": np.array([shard], np.int32), "neurons.node": np.array([[0, shard]])}
        statistics = load_state(
            files[shard % len(files)], lambda state: NeuronStatistics.of(ChainMap(own, state))
        )
        return cls(statistics)


def measured(folder: Path, count: int) -> dict[str, float]:
    """Fold so many states; megabytes and seconds."""
    files = sorted(folder.glob("*.npz"))
    load = partial(NumberedState.load, files)
    tracemalloc.start()
    state = load(Path("0"))
    one = tracemalloc.get_traced_memory()[0]
    del state
    began = time.perf_counter()
    factory = loop.StateFactory(NumberedState, load)  # type: ignore[type-var]
    loop.folded(factory, [Path(str(number)) for number in range(count)])
    peak = tracemalloc.get_traced_memory()[1]
    return {
        "files": count,
        "state_mb": round(one / 2**20),
        "peak_mb": round(peak / 2**20),
        "peak_states": round(peak / one, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=14_336)
    parser.add_argument("--top", type=int, default=50)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        print(json.dumps(measured(given.folder, given.files)))
        return
    with TemporaryDirectory() as folder:
        for seed in range(DRAWN):
            state = drawn((given.neurons,) * given.layers, given.top, seed).state()
            save_state(Path(folder) / f"{seed}.npz", state)
        arguments = ["--folder", folder, "--files", str(given.files)]
        subprocess.run([sys.executable, "-m", "benches.folding", *arguments], check=True)


if __name__ == "__main__":
    main()
