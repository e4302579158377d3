"""Target 6: reading one neuron from a run of 458,752 neurons x 2 x 50 triggers takes at most 20 ms (median).

    python benches/reading.py [NEURONS_PER_LAYER]     # 16384 unless told; a minute and 1 GB of temporary disk

Builds the run in a temporary folder, then times random neurons, values, tokens and contexts in one warm
process, comparing some of what is read with what was written. Prints JSON; fails when the target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mnemoscope.records import SCHEMA_VERSION, CorpusEntry, ModelEntry
from mnemoscope.run.reading import Run, open_run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.writing import RunWriter

LAYERS, TOP, VALUES, VOCABULARY = 28, 50, 10, 49_152
CONTEXTS, LENGTH, SHARD = 40_000, 128, 256
TARGET_MS = 20.0


def _columns(name: str, **columns: np.ndarray | pa.Array) -> pa.Table:
    return pa.table(columns, schema=SCHEMAS[name])


def _heads(layer: int, neurons: int, ranks: int) -> dict[str, np.ndarray]:
    """layer, neuron, polarity and rank of a whole layer."""
    rows = neurons * 2 * ranks
    return {
        "layer": np.full(rows, layer, np.int16),
        "neuron": np.repeat(np.arange(neurons, dtype=np.int32), 2 * ranks),
        "polarity": np.tile(np.repeat(np.array([1, -1], np.int8), ranks), neurons),
        "rank": np.tile(np.arange(ranks, dtype=np.int16), 2 * neurons),
    }


def _triggers(layer: int, neurons: int) -> pa.Table:
    random, rows = np.random.default_rng(layer), neurons * 2 * TOP
    size = np.sort(random.standard_gamma(2, (neurons, 2, TOP)).astype(np.float32))[..., ::-1]
    return _columns(
        "triggers",
        **_heads(layer, neurons, TOP),
        coefficient=(size * np.array([[[1], [-1]]], np.float32)).ravel(),
        context=random.integers(0, CONTEXTS, rows),
        position=random.integers(1, LENGTH, rows, dtype=np.int32),
        next_token=random.integers(0, VOCABULARY, rows, dtype=np.int32),
        gate_sign=random.choice(np.array([-1, 1], np.int8), rows),
        up_sign=random.choice(np.array([-1, 1], np.int8), rows),
    )


def _values(layer: int, neurons: int) -> pa.Table:
    random, rows = np.random.default_rng(layer), neurons * 2 * VALUES
    return _columns(
        "values",
        **_heads(layer, neurons, VALUES),
        token=random.integers(0, VOCABULARY, rows, dtype=np.int32),
        logit=random.standard_normal(rows, np.float32),
        probability=random.random(rows, np.float32),
    )


def _contexts(start: int) -> pa.Table:
    ids = np.arange(start, min(start + SHARD, CONTEXTS))
    tokens = (ids[:, None] * 31 + np.arange(LENGTH)) % VOCABULARY
    offsets = np.arange(0, tokens.size + 1, LENGTH, dtype=np.int32)
    return _columns(
        "contexts",
        context=ids,
        document=ids // 4,
        start=(ids % 4 * LENGTH).astype(np.int32),
        tokens=pa.ListArray.from_arrays(offsets, tokens.astype(np.int32).ravel()),
    )


def build(folder: Path, neurons: int) -> Run:
    """Stream the synthetic run to disk, one layer at a time."""
    writer = RunWriter(folder)
    for layer in range(LAYERS):
        writer.append("triggers", _triggers(layer, neurons))
        writer.append("values", _values(layer, neurons))
    with writer.table("contexts", rows_per_group=None) as table:
        for start in range(0, CONTEXTS, SHARD):
            table.append(_contexts(start))
    writer.sort_values_by_token()
    for name in ("neurons", "histograms", "samples", "documents", "vocabulary", "shards"):
        writer.append(name, SCHEMAS[name].empty_table())
    return writer.commit(_about(neurons))


def _about(neurons: int) -> dict[str, Any]:
    model = ModelEntry(
        id="synthetic",
        family="llama",
        weights_sha256="",
        tokenizer_sha256="",
        layers=LAYERS,
        neurons=neurons,
        width=1,
        vocabulary=VOCABULARY,
        gated=True,
        activation="silu",
        context_length=LENGTH,
        self_check=0.0,
    )
    corpus = CorpusEntry(
        id="synthetic",
        sha256="",
        source={},
        segment="window",
        limit=None,
        documents=0,
        contexts=CONTEXTS,
        duplicates=0,
        tokens=CONTEXTS * LENGTH,
        counted=CONTEXTS * (LENGTH - 1),
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "created": "",
        "mnemoscope": "",
        "model": model,
        "corpus": corpus,
        "options": {},
        "excluded": [],
        "environment": {},
    }


def _verify(run: Run, neurons: int, random: np.random.Generator) -> None:
    for layer in random.choice(LAYERS, 2, replace=False).tolist():
        written = _triggers(layer, neurons)
        for neuron in [0, neurons - 1, *random.integers(0, neurons, 20).tolist()]:
            expected = written.slice(neuron * 2 * TOP, 2 * TOP)
            assert run.rows("triggers", layer, neuron).to_arrow().cast(written.schema).equals(expected)
    for context, stored in run.contexts(random.integers(0, CONTEXTS, 100).tolist()).items():
        assert (stored.tokens == (context * 31 + np.arange(LENGTH)) % VOCABULARY).all()


def _milliseconds(read: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        read()
        times.append((time.perf_counter() - start) * 1e3)
    median, high = np.percentile(times, [50, 95])
    return {"median": round(float(median), 2), "p95": round(float(high), 2)}


def measure(folder: Path, neurons: int) -> dict[str, object]:
    """Build, verify and time; every figure in milliseconds unless its name says otherwise."""
    start = time.perf_counter()
    build(folder, neurons)
    seconds, random = time.perf_counter() - start, np.random.default_rng(0)
    start = time.perf_counter()
    run = open_run(folder)
    run.rows("triggers", LAYERS // 2, neurons // 2)
    first = (time.perf_counter() - start) * 1e3
    _verify(run, neurons, random)

    def some(count: int) -> list[int]:
        return [int(i) for i in random.integers(0, count, 100)]

    def neuron(name: str) -> object:
        return run.rows(name, int(random.integers(LAYERS)), int(random.integers(neurons)))

    triggers = _milliseconds(lambda: neuron("triggers"), 500)
    return {
        "bench": "reading",
        "neurons": LAYERS * neurons,
        "rows": {name: run.manifest.tables[name].rows for name in ("triggers", "values", "contexts")},
        "megabytes": round(sum(entry.bytes for entry in run.manifest.tables.values()) / 1e6),
        "build_seconds": round(seconds, 1),
        "open_and_first_neuron": round(first, 1),
        "triggers": triggers,
        "values": _milliseconds(lambda: neuron("values"), 200),
        "by_token": _milliseconds(lambda: run.by_token(int(random.integers(VOCABULARY))), 100),
        "contexts_100": _milliseconds(lambda: run.contexts(some(CONTEXTS)), 20),
        "target": TARGET_MS,
        "met": triggers["median"] <= TARGET_MS,
    }


def main() -> int:
    """Exit code 0 if the target is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("neurons", type=int, nargs="?", default=16_384)
    neurons = parser.parse_args().neurons
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder) / "run", neurons)
    print(json.dumps(result, indent=2))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
