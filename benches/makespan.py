"""When a build on many devices is done, by simulation: slow devices, lost ones, and what adding up takes.

Shards are taken in blocks from one queue, as `mine.cluster` does: a device that is lost takes with it the block that it
was at, which another one begins again, and comes back after a while. Every block leaves a file as large as the state of
the run; adding them up comes after all. Times of shards are drawn from measured ones (`--measure` makes them: so many
shards of the sample text by the sample model, over their mean).

    python -m benches.makespan                       # the cases of docs/scale.md, as JSON
    python -m benches.makespan --measure 8 [--model sample:smollm2-135m | tiny]
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

DRAWS = 200  # simulated builds of each case
# Times of shards over their mean, as `--measure 10 --model tiny` gave them on a shared machine (processor time).
SPREAD = (0.976, 1.128, 0.882, 1.115, 1.128, 0.896, 0.852, 0.811, 1.214)
NEURON_BYTES = 2_830  # of a neuron in a state, with fifty triggers of each sign
SHARD_TOKENS = 32_768


@dataclass(frozen=True)
class Job:
    """What is to be mined, on one kind of device.

    flops    of the layers for one token; device  what it does of them in a second
    neurons  whose state a process has; loading  seconds until one is ready
    """

    name: str
    tokens: float
    flops: float
    neurons: int
    device: float = 4e14
    loading: float = 120.0

    @property
    def shards(self) -> int:
        """How many there are."""
        return math.ceil(self.tokens / SHARD_TOKENS)

    @property
    def shard_seconds(self) -> float:
        """What a device needs for one."""
        return SHARD_TOKENS * self.flops / self.device

    @property
    def state(self) -> int:
        """Bytes of a state."""
        return self.neurons * NEURON_BYTES


@dataclass(frozen=True)
class Fleet:
    """Devices, and what goes wrong.

    slow      share of devices that take `slowness` times as long, for the whole of a build
    failures  hours between two failures of one device; back  seconds until it, or another, begins to load again
    blocks    for each device
    backups   whether an idle device does a block that another one is still at
    storage   bytes a second that all devices together write and one reader reads; merge  bytes a second of adding up
    """

    devices: int
    slow: float = 0.0
    slowness: float = 2.0
    failures: float = math.inf
    back: float = 300.0
    blocks: int = 8
    backups: bool = False
    storage: float = 2e9
    merge: float = 1.5e9


def simulated(job: Job, fleet: Fleet, spread: Sequence[float], generator: np.random.Generator) -> float:
    """Seconds until every block is done, in one build."""
    count = min(job.shards, fleet.blocks * fleet.devices)
    bounds = np.arange(count + 1) * job.shards // count
    means = [generator.choice(spread, size).sum() * job.shard_seconds for size in np.diff(bounds).tolist()]
    pace = np.where(generator.random(fleet.devices) < fleet.slow, fleet.slowness, 1.0)
    writing = job.state / (fleet.storage / fleet.devices)
    waiting, done, at = list(range(count))[::-1], set[int](), dict[int, int]()
    events = [(job.loading, device, False) for device in range(fleet.devices)]
    begun, idle, now = dict[int, float](), set[int](), 0.0
    while len(done) < count:
        now, device, is_lost = heapq.heappop(events)
        block = at.pop(device, None)
        if is_lost:  # with what it was at; it comes back
            assert block is not None, "a device without work is not counted on"
            heapq.heappush(events, (now + fleet.back + job.loading, device, False))
            if block not in done and block not in at.values():
                waiting.append(block)
        else:
            idle.add(device)
            done |= set() if block is None else {block}
        for free in sorted(idle):
            if (block := _next(waiting, done, at, begun, fleet.backups)) is None:
                break
            idle.remove(free)
            at[free] = block
            begun.setdefault(block, now)
            takes = means[block] * pace[free] + writing
            fails = (
                generator.exponential(fleet.failures * 3600) if math.isfinite(fleet.failures) else math.inf
            )
            heapq.heappush(events, (now + min(takes, fails), free, fails < takes))
    return now


def _next(
    waiting: list[int], done: set[int], at: dict[int, int], begun: dict[int, float], backups: bool
) -> int | None:
    """The block that an idle device takes; None if there is nothing for it."""
    if waiting:
        return waiting.pop()
    held = list(at.values())
    alone = [block for block in held if block not in done and held.count(block) == 1]
    return min(alone, key=begun.__getitem__) if backups and alone else None


def folding(job: Job, fleet: Fleet) -> tuple[float, float]:
    """Seconds of adding up all files, one after another in one place, and by pairs on all devices."""
    files = min(job.shards, fleet.blocks * fleet.devices)
    each = job.state / fleet.merge
    serial = files * (job.state / fleet.storage + each)
    rounds = math.ceil(math.log2(fleet.devices)) if fleet.devices > 1 else 0
    moving = (
        sum(max(1, fleet.devices >> (1 + number)) for number in range(rounds)) * job.state / fleet.storage
    )
    return serial, (min(fleet.blocks, files) - 1) * each + rounds * each + moving


def case(job: Job, fleet: Fleet, spread: Sequence[float] = SPREAD, draws: int = DRAWS) -> dict[str, object]:
    """A row: hours, and what they are of the ideal, in which all devices are busy until the end."""
    generator = np.random.default_rng(0)
    times = [simulated(job, fleet, spread, generator) for _ in range(draws)]
    ideal = job.shards * job.shard_seconds / fleet.devices
    serial, by_pairs = folding(job, fleet)
    return {
        "job": job.name,
        **{name: value for name, value in asdict(fleet).items() if value != getattr(Fleet(0), name)},
        "ideal_hours": round(ideal / 3600, 3),
        "median_of_ideal": round(statistics.median(times) / ideal, 3),
        "worst_of_20_of_ideal": round(float(np.quantile(times, 0.95)) / ideal, 3),
        "state_gb": round(job.state / 1e9, 2),
        "files_gb": round(min(job.shards, fleet.blocks * fleet.devices) * job.state / 1e9),
        "fold_serial_hours": round(serial / 3600, 3),
        "fold_by_pairs_hours": round(by_pairs / 3600, 3),
    }


DENSE = Job("8B, dense", 1e9, 2 * 7.0e9, 32 * 14_336)
MIXTURE = Job("30B, mixture", 1e9, 2 * 2.7e9, 48 * 128 * 768, device=2e14)


def cases() -> list[dict[str, object]]:
    """Those of docs/scale.md."""
    rows = []
    for job in (DENSE, MIXTURE):
        for devices in (1, 8, 64):
            whole = Fleet(devices)
            rough = replace(whole, slow=0.05, failures=200.0)
            rows += [case(job, each) for each in (whole, rough, replace(rough, backups=True))]
    rows += [case(DENSE, Fleet(64, slow=0.05, failures=200.0, blocks=blocks)) for blocks in (1, 2, 32)]
    return rows


def measured(model: str, shards: int) -> list[float]:
    """Times of so many shards over their mean."""
    from benches.memory import tiny
    from mnemoscope import load_corpus, load_model
    from mnemoscope.mine.statistics import RunStatistics
    from mnemoscope.model.capture import Capture
    from mnemoscope.model.nulls import Nulls
    from mnemoscope.text.corpus import write_plan

    loaded = tiny() if model == "tiny" else load_model(model)
    times = []
    with tempfile.TemporaryDirectory() as folder, loaded.running():
        text = load_corpus("sample:wikipedia", limit=shards * SHARD_TOKENS)
        plan = write_plan(text, loaded.tokenizer, Path(folder), context_length=2048)
        state = RunStatistics.of(loaded, Nulls(loaded), 50)
        with Capture(loaded) as capture:
            for shard in range(plan.shards):
                begin = time.process_time()
                for batch in plan.batches(shard):
                    capture.sweep(batch, state.update)
                state.finish_shard(shard)
                times.append((time.process_time() - begin) / plan.shard_tokens[shard])
    times = times[1:]  # the first one warms up
    return [round(each / statistics.mean(times), 3) for each in times]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int)
    parser.add_argument("--model", default="sample:smollm2-135m")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps({"bench": "makespan", "of_mean": measured(given.model, given.measure)}))
        return
    for row in cases():
        print(json.dumps({"bench": "makespan"} | row))


if __name__ == "__main__":
    main()
