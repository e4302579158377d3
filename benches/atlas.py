"""Targets of the served run, on 458,752 neurons x 2 x 50 triggers: what a reader waits for, and what the server holds.

    python -m benches.atlas                     # in a temporary folder: minutes, and 3 GB of disk
    python -m benches.atlas FOLDER              # makes FOLDER/run if it is not there, and keeps it
    python -m benches.atlas --neurons 128 --requests 500     # the same, small

Starts `mnemoscope serve` as a reader would and asks it over HTTP, so that every figure is what a browser on this
machine sees. Checks what it is answered while it times. Prints JSON; fails when a target is missed.

Readers: each opens a page, reads it for two seconds on average, and opens the next: in seven of ten cases one of
458,752 neurons (so that hardly any is asked for twice), in two one of 2,000 words (a quarter are no tokens, and are
answered with the nearest), in one a layer. `without_pause` are as many programs that read nothing: each asks again at
once. It has no target; the readers have.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from mnemoscope.records import SCHEMA_VERSION, CorpusEntry, ModelEntry
from mnemoscope.run.reading import Run, open_run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.run.writing import RunWriter

LAYERS, NEURONS, TOP, VALUES, VOCABULARY = 32, 14_336, 50, 50, 49_152
CONTEXTS, LENGTH, SHARD = 40_000, 128, 256
READERS, THINKING, EACH = 50, 2.0, 20  # readers, seconds between two pages of one (mean), pages of each
WORKERS, WORDS = 2, 2000
TARGETS = {  # milliseconds, but for the first page (s) and the growth (MB)
    "first_page_seconds": 1.5, "neuron_ms": 50, "search_ms": 200, "readers_p95_ms": 300, "growth_mb": 50,
}  # fmt: skip
_STEPS = np.array([2.0**octave * (1 + step / 4) for octave in range(-12, 12) for step in range(4)])
_PARTS = [consonant + vowel for consonant in "bcdfghlmnprstv" for vowel in "aeio"]


# -- the run ---------------------------------------------------------------------------------------------------


def pieces() -> list[bytes]:
    """The vocabulary: an end, the 256 bytes, and words of one to four syllables, most with a space before."""
    words = [
        f"{'' if number % 4 == 3 else ' '}{_word(number)}".encode() for number in range(VOCABULARY - 257)
    ]
    return [b"<|endoftext|>", *(bytes([value]) for value in range(256)), *words]


def _word(number: int) -> str:
    syllables = []
    number += 1
    while number:
        number, last = divmod(number, len(_PARTS))
        syllables.append(_PARTS[last])
    return "".join(syllables)


def _heads(layer: int, neurons: int, ranks: int, name: str = "rank") -> dict[str, np.ndarray]:
    """layer, neuron, polarity and rank of a whole layer."""
    return {
        "layer": np.full(neurons * 2 * ranks, layer, np.int16),
        "neuron": np.repeat(np.arange(neurons, dtype=np.int32), 2 * ranks),
        "polarity": np.tile(np.repeat(np.array([1, -1], np.int8), ranks), neurons),
        name: np.tile(np.arange(ranks, dtype=np.int16), 2 * neurons),
    }


def _strengths(random: np.random.Generator, neurons: int, ranks: int) -> np.ndarray:
    """f32[row]: the strongest first, of either sign."""
    sizes = np.sort(random.standard_gamma(2, (neurons, 2, ranks)).astype(np.float32))[..., ::-1]
    return (sizes * np.array([[[1], [-1]]], np.float32)).ravel()


def _triggers(layer: int, neurons: int) -> pa.Table:
    random, rows = np.random.default_rng(layer), neurons * 2 * TOP
    columns = {
        **_heads(layer, neurons, TOP),
        "coefficient": _strengths(random, neurons, TOP),
        "context": random.integers(0, CONTEXTS, rows),
        "position": random.integers(1, LENGTH, rows),
        "next_token": random.integers(257, VOCABULARY, rows),
        "gate_sign": random.choice(np.array([-1, 1]), rows),
        "up_sign": random.choice(np.array([-1, 1]), rows),
    }
    return arrow_table("triggers", columns)


def _values(layer: int, neurons: int) -> pa.Table:
    random, rows = np.random.default_rng(layer), neurons * 2 * VALUES
    columns = {
        **_heads(layer, neurons, VALUES),
        "token": random.integers(0, VOCABULARY, rows),
        "logit": _strengths(random, neurons, VALUES),
        "probability": random.random(rows),
    }
    return arrow_table("values", columns)


def _neurons(layer: int, neurons: int) -> pa.Table:
    random = np.random.default_rng(layer)
    columns: dict[str, Any] = {
        "layer": layer,
        "neuron": np.arange(neurons),
        "tokens": CONTEXTS * (LENGTH - 1),
    }
    for name in ("std", "value_norm", "key_norm", "up_norm", "value_entropy"):
        columns[name] = random.gamma(2, 1, neurons)
    for name in ("mean", "skewness"):
        columns[name] = random.normal(0, 1, neurons)
    for name in ("positive_fraction", "value_max_probability"):
        columns[name] = random.random(neurons)
    columns |= {"min": -random.gamma(9, 1, neurons), "max": random.gamma(9, 1, neurons)}
    columns["kurtosis"] = random.lognormal(1, 1.5, neurons)
    for name in ("tokens", "tokens_negative"):
        columns[f"key_{name}"] = random.integers(257, VOCABULARY, (neurons, 10))
        columns[f"key_{name.replace('tokens', 'coefficients')}"] = random.normal(0, 1, (neurons, 10))
    return arrow_table("neurons", columns)


def _histograms(layer: int, neurons: int) -> pa.Table:
    random, bins = np.random.default_rng(layer), 2 * len(_STEPS) + 1
    shapes = np.exp(-np.square(np.linspace(-3, 3, bins)) * random.uniform(0.5, 2, (64, 1)))
    counts = (shapes * CONTEXTS).astype(np.int64)[random.integers(0, 64, neurons)]
    return arrow_table("histograms", {"layer": layer, "neuron": np.arange(neurons), "counts": counts})


def _samples(layer: int, neurons: int) -> pa.Table:
    random, rows = np.random.default_rng(layer), neurons * 10
    columns = {
        "layer": layer,
        "neuron": np.repeat(np.arange(neurons), 10),
        "bin": np.tile(np.arange(10), neurons),
        "coefficient": np.tile(np.linspace(-4, 4, 10), neurons),
        "context": random.integers(0, CONTEXTS, rows),
        "position": random.integers(1, LENGTH, rows),
        "next_token": random.integers(257, VOCABULARY, rows),
    }
    return arrow_table("samples", columns)


def _tokens(start: int) -> np.ndarray:
    """i64[context, token]: words as often as in a language, the first words the commonest."""
    count = min(SHARD, CONTEXTS - start)
    rank = np.random.default_rng(start).zipf(1.2, (count, LENGTH))
    tokens = 257 + rank % (VOCABULARY - 257)
    tokens[:, 0] = 0
    return tokens


def _contexts(start: int) -> pa.Table:
    tokens = _tokens(start)
    ids = np.arange(start, start + len(tokens))
    columns = {"context": ids, "document": ids // 4, "start": ids % 4 * LENGTH, "tokens": tokens}
    return arrow_table("contexts", columns)


def build(folder: Path, neurons: int) -> Run:
    """Stream the synthetic run to disk, one layer at a time."""
    writer, words = RunWriter(folder), pieces()
    makers = {
        "neurons": _neurons,
        "histograms": _histograms,
        "triggers": _triggers,
        "samples": _samples,
        "values": _values,
    }
    for layer in range(LAYERS):
        for name, make in makers.items():
            writer.append(name, make(layer, neurons))
    with writer.table("contexts", rows_per_group=None) as table:
        for start in range(0, CONTEXTS, SHARD):
            table.append(_contexts(start))
    documents = -(-CONTEXTS // 4)
    titles = [f"Article {number}" for number in range(documents)]
    writer.append(
        "documents",
        arrow_table("documents", {"document": np.arange(documents), "title": titles, "metadata": "{}"}),
    )
    vocabulary = {
        "token": np.arange(VOCABULARY),
        "text": [piece.decode(errors="replace") for piece in words],
        "bytes": words,
        "special": np.arange(VOCABULARY) == 0,
    }
    writer.append("vocabulary", arrow_table("vocabulary", vocabulary))
    writer.append("shards", arrow_table("shards", {name: np.zeros(0) for name in _SHARDS}))
    writer.sort_values_by_token()
    return writer.commit(_about(neurons))


_SHARDS = ("shard", "layer", "contexts", "tokens", "sum", "sum_squares", "sum_cubes", "sum_fourths")


def _about(neurons: int) -> dict[str, Any]:
    model = ModelEntry(
        id="synthetic", family="llama", weights_sha256="", tokenizer_sha256="", layers=LAYERS, neurons=neurons,
        width=1, vocabulary=VOCABULARY, gated=True, activation="silu", context_length=LENGTH, self_check=0.0,
    )  # fmt: skip
    corpus = CorpusEntry(
        id="synthetic", sha256="", source={}, segment="window", limit=None, documents=CONTEXTS // 4, contexts=CONTEXTS,
        duplicates=0, tokens=CONTEXTS * LENGTH, counted=CONTEXTS * (LENGTH - 1),
    )  # fmt: skip
    edges = [*(-_STEPS[::-1]).tolist(), *_STEPS.tolist()]
    return {
        "schema_version": SCHEMA_VERSION, "created": "", "mnemoscope": "", "model": model, "corpus": corpus,
        "options": {"top": TOP, "histogram_edges": edges}, "excluded": ["position 0"], "environment": {},
    }  # fmt: skip


# -- the server, asked as a browser asks ---------------------------------------------------------------------------


class Server:
    """`mnemoscope serve` in a process of its own, and those that it starts."""

    def __init__(self, run: Path, workers: int) -> None:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "mnemoscope",
            "serve",
            str(run),
            "--port",
            "0",
            "--workers",
            str(workers),
        ]
        self.workers = workers
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().split()[0].rstrip("/").rpartition(":")[2])
        threading.Thread(target=self._drain, daemon=True).start()
        self.path = f"/runs/{run.name}"
        with self.reader() as ask:
            ask(self.path)
        self.first_page = time.perf_counter() - began

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr)

    def prepared(self) -> float:
        """Wait until the index is made, and what chance gives is counted; returns the seconds since the first page."""
        began = time.perf_counter()
        time.sleep(3)  # it begins after the first page
        with self.reader() as ask:
            while b"is being made" in ask(f"{self.path}/search"):
                time.sleep(1)
            for kind in ("promotes", "suppresses"):
                ask(f"{self.path}/search?q=%20ba&by={kind}")
        while self.workers > 1 and len(self.processes()) <= self.workers:
            time.sleep(0.2)
        time.sleep(5 * (self.workers > 1))  # they open the run
        return time.perf_counter() - began

    def processes(self) -> list[int]:
        """It, and the processes that it started."""
        held = [self.process.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                words = stat.read_text().rpartition(")")[2].split()
                if int(words[1]) == self.process.pid:
                    held.append(int(stat.parent.name))
        return held

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], bytes]]:
        """Asks for pages on one connection, as a browser does; a page that failed is an error here."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

        def ask(path: str) -> bytes:
            try:
                connection.request("GET", path, headers={"accept-encoding": "gzip, deflate, br"})
                answer = connection.getresponse()
            except (
                http.client.RemoteDisconnected,
                ConnectionError,
            ):  # it was idle for long: a browser asks anew
                connection.close()
                connection.request("GET", path, headers={"accept-encoding": "gzip, deflate, br"})
                answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status}")
            return body

        try:
            yield ask
        finally:
            connection.close()

    def seconds(self) -> float:
        """What it has computed for, all threads together: on a machine that does other work, too, less than it took."""
        stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.processes())
        return sum(int(words[11]) + int(words[12]) for words in stats) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        """What the server holds for itself: memory that goes with it, without pages of files."""
        statuses = (Path(f"/proc/{pid}/status").read_text().splitlines() for pid in self.processes())
        lines = (line.split()[1] for status in statuses for line in status if line.startswith("RssAnon"))
        return sum(map(int, lines)) / 1024

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)


def _timed(server: Server, ask: Callable[[str], bytes], paths: Sequence[str]) -> dict[str, float]:
    """What a reader waits for, and what the server computes for it (mean)."""
    times, before = [], server.seconds()
    for path in paths:
        start = time.perf_counter()
        ask(path)
        times.append((time.perf_counter() - start) * 1e3)
    return _spread(times) | {"computed": round((server.seconds() - before) / len(paths) * 1e3, 1)}


def _spread(times: Sequence[float]) -> dict[str, float]:
    names, shares = ("median", "p95", "most"), (50, 95, 100)
    return dict(zip(names, (round(float(value), 1) for value in np.percentile(times, shares)), strict=True))


def _together(
    server: Server, paths: Callable[[np.random.Generator], str], thinking: float, each: int
) -> dict[str, float]:
    """Readers at once: each opens a page, reads it for a while, and opens the next; pages in a second, and what the
    server and these readers compute for one (ms)."""
    times: list[float] = []
    began, before, own = time.perf_counter(), server.seconds(), time.process_time()

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        with server.reader() as ask:
            for _ in range(each):
                time.sleep(random.exponential(thinking) if thinking else 0)
                start = time.perf_counter()
                ask(paths(random))
                times.append((time.perf_counter() - start) * 1e3)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(times) < READERS * each:
        raise RuntimeError("a reader was not answered")
    count = len(times)
    return _spread(times) | {
        "a_second": round(count / (time.perf_counter() - began), 1),
        "computed": round((server.seconds() - before) / count * 1e3, 1),
        "computed_by_readers": round((time.process_time() - own) / count * 1e3, 1),
    }


def measure(folder: Path, neurons: int, requests: int, workers: int = WORKERS) -> dict[str, Any]:
    """Everything, in milliseconds unless its name says otherwise."""
    run, random = folder / "run", np.random.default_rng(0)
    began = time.perf_counter()
    built = open_run(run) if (run / "manifest.json").exists() else build(run, neurons)
    seconds = time.perf_counter() - began
    server = Server(run, workers)
    words = [_word(int(number)) for number in random.integers(0, WORDS, 60)]

    def neuron(random: np.random.Generator) -> str:
        return f"{server.path}/neurons/L{random.integers(LAYERS)}N{random.integers(neurons)}"

    def search(kind: str, text: str) -> str:
        return f"{server.path}/search?q={quote(text)}&by={kind}"

    def mixed(random: np.random.Generator) -> str:
        chosen = random.random()
        if chosen < 0.7:
            return neuron(random)
        if chosen < 0.9:
            return search("promotes", f" {_word(int(random.integers(WORDS)))}")
        return f"{server.path}/layers/{random.integers(LAYERS)}"

    try:
        index = server.prepared()
        with server.reader() as ask:
            result = {
                "bench": "atlas",
                "neurons": LAYERS * neurons,
                "rows": {
                    name: built.manifest.tables[name].rows for name in ("triggers", "values", "contexts")
                },
                "megabytes": round(sum(entry.bytes for entry in built.manifest.tables.values()) / 1e6),
                "open_or_build_seconds": round(seconds, 1),
                "first_page_seconds": round(server.first_page, 2),
                "index_seconds": round(index, 1),
                "neuron": _timed(server, ask, [neuron(random) for _ in range(200)]),
                "layer": _timed(server, ask, [f"{server.path}/layers/{layer}" for layer in range(LAYERS)]),
                "layer_again": _timed(
                    server, ask, [f"{server.path}/layers/{layer}" for layer in range(4)] * 5
                ),
                "promotes": _timed(server, ask, [search("promotes", f" {word}") for word in words]),
                "trigger_rare_text": _timed(
                    server, ask, [search("trigger", f"{word} ba") for word in words[:20]]
                ),
                "trigger_token": _timed(server, ask, [search("trigger", f" {word}") for word in words]),
                "trigger_common": _timed(
                    server, ask, [search("trigger", text) for text in (" ce", "a", "ba", " co")]
                ),
                "everything": _timed(
                    server, ask, [f"{server.path}/search?q={quote(f' {word}')}" for word in words[:20]]
                ),
                "like": _timed(server, ask, [search("like", f"L{layer}N7") for layer in range(20)]),
            }
        print(json.dumps(result), file=sys.stderr)
        result["readers"] = _together(server, mixed, THINKING, EACH)
        print(json.dumps(result["readers"]), file=sys.stderr)
        result["without_pause"] = _together(server, mixed, 0.0, 2 * EACH)
        print(json.dumps(result["without_pause"]), file=sys.stderr)
        result["memory"] = _memory(server, mixed, requests)
    finally:
        server.close()
    return result | _judged(result)


def _memory(server: Server, paths: Callable[[np.random.Generator], str], requests: int) -> dict[str, float]:
    """Megabytes after a tenth of the requests and after all; what was kept once is in the first."""
    random, held = np.random.default_rng(1), [server.megabytes()]
    with server.reader() as ask:
        for number in range(requests):
            ask(paths(random))
            if number + 1 in (requests // 10, requests // 2, requests):
                held.append(server.megabytes())
    return dict(zip(("before", "after_a_tenth", "after_half", "after_all"), map(round, held), strict=True))


def _judged(result: dict[str, Any]) -> dict[str, Any]:
    searches = (
        "promotes",
        "trigger_rare_text",
        "trigger_token",
        "like",
    )  # `trigger_common` is a tenth of the text
    reached = {
        "first_page_seconds": result["first_page_seconds"],
        "neuron_ms": result["neuron"]["median"],
        "search_ms": max(result[name]["median"] for name in searches),
        "readers_p95_ms": result["readers"]["p95"],
        "growth_mb": result["memory"]["after_all"] - result["memory"]["after_a_tenth"],
    }
    return {
        "target": TARGETS,
        "reached": reached,
        "met": all(reached[name] <= TARGETS[name] for name in TARGETS),
    }


def main() -> int:
    """Exit code 0 if the targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--neurons", type=int, default=NEURONS, help="of a layer")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that make pages")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        os.environ["MNEMOSCOPE_CACHE"] = str(
            folder / "cache"
        )  # the index is made anew, or kept beside the run
        result = measure(folder, given.neurons, given.requests, given.workers)
    print(json.dumps(result, indent=2))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
