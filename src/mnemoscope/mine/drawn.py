"""How large the tables of a run are, and what writing them takes: rows as they will be, drawn at random, and written.

How many rows there are is counted. What is in them is drawn without a look at what the model computes, so that a price
is the same for a model and for its outline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mnemoscope import memory
from mnemoscope.mine import values
from mnemoscope.mine.build import vocabulary_rows
from mnemoscope.mine.kernel import BINS, COARSE_BINS, COARSE_OCTAVES, EMPTY, SPREADER, SUB_BINS
from mnemoscope.mine.places import HISTOGRAM_EDGES, HISTOGRAM_SHARE
from mnemoscope.mine.statistics import NeuronStatistics
from mnemoscope.model.model import Model
from mnemoscope.records import Cells
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.run.writing import RunWriter
from mnemoscope.text.plan import Plan
from mnemoscope.text.sampling import splitmix64

_CELLS, _READ = 1_024, 4_096  # neurons of which rows are drawn, and of which values are
_WIDTH = 8  # neurons of an expert that is drawn
_SHARDS = 10_000  # rows of `shards` that are drawn at most
_SPREAD = 0.3  # of coefficients, which are drawn as Laplace says
_SORTING = 1_000_000_000  # bytes that DuckDB sorts in at most


@dataclass(frozen=True)
class TextSize:
    """What rows say of a text.

    tokens, contexts, shards  of all of it; plan, of all or of a part
    """

    tokens: int
    contexts: int
    shards: int
    plan: Plan


@dataclass(frozen=True)
class TablePrice:
    """Of each table rows and bytes; seconds that writing all of them takes, and bytes of memory that it takes."""

    rows: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: float
    bytes: int


def weigh(
    model: Model,
    kinds: Mapping[str, int],
    text: TextSize,
    top: int,
    *,
    routed: float,
    signed: bool,
    folder: Path,
) -> TablePrice:
    """Draw rows of all tables, write them, and reckon from these.

    kinds   of null units how many there are
    routed  which share of the tokens goes to an expert; 1 of a dense model
    signed  whether coefficients are of both signs
    """
    drawn = _Drawn(model, text, top, routed, signed)
    cells, units = len(model.cells), sum(kinds.values())
    with memory.growth() as grown:
        tables, making = drawn.tables()
        tables["vocabulary"] = vocabulary_rows(model)
        tables["values"] = drawn.values(model.anatomy.vocabulary)
        if units:
            for name in ("neurons", "histograms", "triggers", "samples"):
                kind = pa.repeat(pa.scalar("random"), tables[name].num_rows)
                rows = tables[name].add_column(0, "kind", kind)
                tables[f"null_{name}"] = rows.select(SCHEMAS[f"null_{name}"].names)
        tables["neurons"] = drawn.with_values(tables["neurons"])
        sizes, spent = _written(tables, folder / "written")
    wanted = _wanted(model, tables, units, drawn.n) | {"shards": text.shards * len(model.cells.layers)}
    disk = {name: _reckoned(sizes[name], tables[name].num_rows, wanted[name]) for name in tables}
    seconds = sum(spent[name] * wanted[name] / max(1, tables[name].num_rows) for name in tables)
    seconds += making * (cells + units) / drawn.n
    rows = drawn.values(max(1, round(model.anatomy.vocabulary * min(1.0, _READ / cells))))
    size, sorted_seconds, sorting = _sorted(rows, folder / "sorted")
    wanted["values_by_token"] = wanted["values"]
    disk["values_by_token"] = _reckoned(size, rows.num_rows, wanted["values"])
    more = wanted["values"] / max(1, rows.num_rows)
    for name, file in (("contexts", text.plan.contexts_file), ("documents", text.plan.documents_file)):
        disk[name] = round(file.stat().st_size * text.tokens / text.plan.tokens)
    wanted["contexts"] = text.contexts
    most = max(grown[0], min(_SORTING, round(sorting * max(1.0, more))))
    return TablePrice(wanted, disk, seconds + sorted_seconds * more, most)


def _wanted(model: Model, tables: Mapping[str, pa.Table], units: int, n: int) -> dict[str, int]:
    """Rows of each table."""
    cells = len(model.cells)
    of_cells = {name: round(rows.num_rows * cells / n) for name, rows in tables.items()}
    of_units = {name: round(rows.num_rows * units / n) for name, rows in tables.items()}
    known = {"vocabulary": tables["vocabulary"].num_rows}
    known["values"] = cells * 2 * min(values.VALUE_TOKENS, model.anatomy.vocabulary)
    if "experts" in tables:
        known["experts"] = sum(len(layer.groups) for layer in model.anatomy.layers if layer.experts)
    return {
        name: known.get(name, of_units[name] if name.startswith("null_") else of_cells[name])
        for name in tables
    }


def _reckoned(sizes: tuple[int, int], rows: int, wanted: int) -> int:
    """Bytes of so many rows, from those of an empty file and of one of so many rows."""
    empty, full = sizes
    return round(empty + (full - empty) * wanted / max(1, rows))


def _written(
    tables: Mapping[str, pa.Table], folder: Path
) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Bytes of each file without rows and with them, and seconds that writing the rows took."""
    seconds, sizes = {}, {}
    for name, rows in tables.items():
        files, ends = [], []
        for kind, held in (("empty", rows.slice(0, 0)), ("full", rows)):
            with RunWriter(folder / name / kind) as writer:
                begin = time.perf_counter()
                table = writer.table(name)
                with table:
                    table.append(held)
                ends.append(time.perf_counter() - begin)
                files.append(table.path.stat().st_size)
        sizes[name], seconds[name] = (files[0], files[1]), max(0.0, ends[1] - ends[0])
    return sizes, seconds


def _sorted(rows: pa.Table, folder: Path) -> tuple[tuple[int, int], float, int]:
    """The same of `values_by_token`, made of rows of `values`; and bytes of memory."""
    files, ends, held = [], [], 0
    for kind, of_kind in (("empty", rows.slice(0, 1)), ("full", rows)):
        with RunWriter(folder / kind) as writer:
            writer.append("values", of_kind)
            writer._close()
            begin = time.perf_counter()
            with memory.growth() as grown:
                writer.sort_values_by_token()
            ends.append(time.perf_counter() - begin)
            files.append((writer.work / "tables" / "values_by_token.parquet").stat().st_size)
            held = grown[0]
    return (files[0], files[1]), max(0.0, ends[1] - ends[0]), held


class _Drawn:
    """Rows of some neurons of a run."""

    def __init__(self, model: Model, text: TextSize, top: int, routed: float, signed: bool) -> None:
        self._model, self._text, self._signed, self._routed = model, text, signed, routed
        self._random = np.random.default_rng(0)
        self.n = min(_CELLS, len(model.cells))
        experts = ((self.n // _WIDTH, _WIDTH),) if model.anatomy.experts else ()
        self._held = NeuronStatistics((self.n,), top, experts=experts)
        batches = list(text.plan.batches(0))
        self._tokens = np.concatenate([batch.tokens[batch.counted] for batch in batches])
        self._positions = np.concatenate([np.nonzero(batch.counted)[1] for batch in batches])
        if not len(self._tokens):
            self._tokens, self._positions = np.ones((2, 1), np.int64)
        self._length = len(self._tokens) / sum(len(batch.contexts) for batch in batches)

    def tables(self) -> tuple[dict[str, pa.Table], float]:
        """Those that are mined, and `shards`; and seconds that making them of what was mined took."""
        state = self._held.state()
        shares = self._shares()
        counts = self._random.multinomial(self._selected, shares, self.n)
        self._fill_triggers(state)
        self._fill_samples(state, counts)
        state["histograms.counts"][:] = counts
        state["neurons.positive"][:] = self._random.integers(0, self._text.tokens, self.n)
        state["neurons.minimum"][:] = -self._coefficients(self.n)
        state["neurons.maximum"][:] = self._coefficients(self.n)
        state |= self._moments()
        for name in ("routing.tokens", "routing.weights"):
            state[name][:] = 1
        held = NeuronStatistics.of(state)
        begin = time.perf_counter()
        tables = held.results(0)
        return tables | {"shards": held.shard_rows()}, time.perf_counter() - begin

    def _moments(self) -> dict[str, np.ndarray]:
        """Power sums of which mean, variance and what follows are told, and a ledger of shards."""
        n, tokens = self.n, self._text.tokens
        shards = min(_SHARDS, self._text.shards * len(self._model.cells.layers))
        mean, std = self._random.normal(0, 0.05, n), self._random.exponential(_SPREAD, n) + 1e-3
        powers = np.stack([mean, std**2 + mean**2, std**3 * self._random.normal(0, 1, n), std**4 * 6.0])
        return {
            "neurons.shard": np.arange(shards, dtype=np.int32),
            "neurons.contexts": self._random.integers(0, 1_000, (shards, 1)),
            "neurons.tokens": self._random.integers(1, 30_000, (shards, 1)),
            "neurons.totals": self._random.normal(size=(shards, 1, 4)),
            "neurons.node": np.zeros((1, 2), np.int64),
            "neurons.count": np.full((1, n), tokens),
            "neurons.pivot": np.zeros((1, n), np.float32),
            "neurons.powers": powers[None] * tokens,
        }

    def _fill_triggers(self, state: dict[str, np.ndarray]) -> None:
        """Lists as long as contexts reach them, the strongest first."""
        key, what = state["triggers.key"], state["triggers.what"]
        reach = 1 - (1 - min(1.0, self._routed)) ** max(1.0, self._length)
        lists = min(key.shape[2], max(1, round(self._text.contexts * reach)))
        shape = (2, self.n, lists)
        coefficients = -np.sort(-self._coefficients(shape))
        contexts = self._random.integers(0, self._text.contexts, shape).astype(np.uint64)
        bits = coefficients.view(np.uint32).astype(np.uint64) << np.uint64(32)
        key[:, :, :lists] = bits | (np.uint64(0xFFFFFFFF) - contexts)
        place = self._random.integers(0, len(self._tokens), shape)
        position, token = (held[place].astype(np.uint64) for held in (self._positions, self._tokens))
        signs = np.array([0b1010, 0b1000] if self._model.anatomy.gated else [0b1111] * 2, np.uint64)
        held = position << np.uint64(36) | (token + np.uint64(1)) << np.uint64(4)
        what[:, :, :lists] = held | signs[:, None, None]
        if not self._signed:
            key[1] = 0
        weight = state["triggers.weight"]
        weight[:] = self._random.random(weight.shape, np.float32)

    def _fill_samples(self, state: dict[str, np.ndarray], counts: np.ndarray) -> None:
        """One in every coarse bin that was reached."""
        place = np.arange(BINS) - BINS // 2
        coarse = np.sign(place) * -(-np.abs(place) // (COARSE_OCTAVES * SUB_BINS)) + COARSE_BINS // 2
        cuts = np.flatnonzero(np.diff(coarse, prepend=-1))
        reached = np.add.reduceat(counts, cuts, axis=1) > 0
        salt, shape = splitmix64(np.arange(1, self.n + 1)), reached.shape
        context = self._random.integers(0, self._text.contexts, shape).astype(np.uint64)
        drawn = self._random.integers(0, len(self._tokens), shape)
        hashes = splitmix64(context << np.uint64(21) | self._positions[drawn].astype(np.uint64))
        key = (hashes ^ salt[:, None]) * SPREADER
        state["samples.key"][:] = np.where(reached, key, EMPTY)
        state["samples.coefficient"][:] = self._coefficients(shape)
        state["samples.next_token"][:] = self._tokens[drawn]

    def _shares(self) -> np.ndarray:
        """f64[bin]: how often a coefficient falls into each bin."""
        edge = HISTOGRAM_EDGES[1:-1] / _SPREAD
        below = 0.5 + 0.5 * np.sign(edge) * -np.expm1(-np.abs(edge))
        if not self._signed:
            below = np.where(edge < 0, 0.0, below)
        return np.diff(below, prepend=0.0, append=1.0)

    def _coefficients(self, shape: Any) -> np.ndarray:
        """f32: magnitudes, as exact as they are computed."""
        drawn = torch.from_numpy(self._random.exponential(_SPREAD, shape))
        return drawn.to(self._model.anatomy.unit_dtype).float().numpy()

    @property
    def _selected(self) -> int:
        """Tokens of the contexts of which histograms and samples are taken."""
        return max(1, round(self._text.tokens * self._routed * HISTOGRAM_SHARE))

    def with_values(self, rows: pa.Table) -> pa.Table:
        """Rows of `neurons` with what reading values adds."""
        numbers = partial(self._random.standard_normal, dtype=np.float32)
        tokens = partial(self._random.integers, 0, self._model.anatomy.vocabulary)
        shape = (rows.num_rows, min(values.KEY_TOKENS, self._model.anatomy.vocabulary))
        singles = ("value_norm", "key_norm", "value_max_probability", "value_entropy")
        added: dict[str, Any] = {name: numbers(rows.num_rows) for name in singles}
        added |= {"up_norm": numbers(rows.num_rows) if self._model.anatomy.gated else None}
        for suffix in ("", "_negative"):
            coefficients = -np.sort(-self._coefficients(shape))
            added |= {f"key_tokens{suffix}": tokens(shape), f"key_coefficients{suffix}": coefficients}
        made = arrow_table("neurons", added, partial=True)
        for name in made.column_names:
            rows = rows.append_column(name, made[name])
        return rows

    def values(self, vocabulary: int) -> pa.Table:
        """Rows of `values` of neurons from all layers, with so many of the tokens."""
        cells: Cells = self._model.cells
        count = min(_READ, len(cells))
        chosen = np.sort(self._random.choice(len(cells), count, replace=False))
        layer, neuron = cells.place(chosen)
        shape = (count, 2, min(values.VALUE_TOKENS, self._model.anatomy.vocabulary))
        logits = -np.sort(-self._random.exponential(1.0, shape).astype(np.float32)) + 4
        cell, end, rank = np.indices(shape)
        columns = {
            "layer": layer[cell.ravel()],
            "neuron": neuron[cell.ravel()],
            "polarity": np.where(end.ravel() == 0, 1, -1),
            "rank": rank.ravel(),
            "token": self._random.integers(0, vocabulary, shape).ravel(),
            "logit": (logits * np.array([1, -1], np.float32)[:, None]).ravel(),
            "probability": np.exp(logits - 12).ravel(),
        }
        return arrow_table("values", columns)


def state_bytes(cells: Mapping[str, Cells], top: int, layers: int, shards: int) -> int:
    """Of what is mined of so many shards, by kind of unit: sums of the last ones wait for each other, a pair for each
    doubling."""
    return sum(_of_cells(each, top) * len(each) + _ledger(layers, shards) for each in cells.values()) + sum(
        len(each) * _NODE * (1 + int(math.log2(shards))) for each in cells.values()
    )


_NODE = 8 + 4 + 4 * 8  # bytes of the sums of a neuron over some shards: count, pivot, four powers


def _of_cells(cells: Cells, top: int) -> int:
    """Bytes of one neuron."""

    def size(count: int) -> int:
        experts = ((1, 1),) if cells.experts else ()
        return sum(map(_nbytes, NeuronStatistics((count,), top, experts=experts).state().items()))

    return size(2) - size(1)


def _nbytes(entry: tuple[str, np.ndarray]) -> int:
    name, array = entry
    return 0 if name in ("options", "experts") else array.nbytes


def _ledger(layers: int, shards: int) -> int:
    return shards * (4 + layers * (8 + 8 + 4 * 8))


def kinds_of(model: Model, sizes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Cells]]:
    """The units of which statistics are kept, and null units of each kind."""
    yield "neurons", model.cells
    for kind, of_layers in sizes.items():
        yield kind, Cells(of_layers)
