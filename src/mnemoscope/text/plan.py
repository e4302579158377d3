"""A corpus as numbered contexts in shards of fixed batches: two Parquet tables and a small JSON file.

A shard is a range of consecutive contexts, one row group of ``contexts.parquet``, and the unit of work: its
batches are the same whoever asks, in whatever order and in however many processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnemoscope import files
from mnemoscope.errors import RunCorrupt, RunMissing
from mnemoscope.location import Place, parquet
from mnemoscope.records import ContextBatch, padded

SHARD_TOKENS = 32_768  # tokens in a shard, at most (a single longer context is a shard)
BATCH_TOKENS = 4_096  # contexts x longest context of a batch, at most (a single longer context is a batch)

_DOCUMENTS = 4_096  # rows of documents that are written at once

CONTEXTS = pa.schema(
    [
        ("context", pa.int64()),
        ("document", pa.int64()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)
DOCUMENTS = pa.schema([("document", pa.int64()), ("title", pa.string()), ("metadata", pa.string())])


Units = Sequence[tuple[int, Sequence[int]]]  # (tokens of the document before it, its tokens)


@dataclass(frozen=True)
class Plan:
    """What was planned: counts, and the batches of each shard. Made by `corpus.write_plan`."""

    folder: Path
    context_length: int
    special: list[int]  # token ids that never count
    shards: int
    documents: int  # that have a context
    contexts: int
    tokens: int  # in the contexts
    counted: int  # tokens that are neither special nor at position 0
    duplicates: int  # contexts left out because their tokens had been seen
    sha256: str  # over the lengths and token ids of all contexts, in order
    corpus: dict[str, Any]  # id, source, segment, limit
    notes: Sequence[str] = ()  # what was left out, in sentences
    paired: bool = False  # every second context is what a decoder reads beside the one before

    @property
    def contexts_file(self) -> Path:
        """Table of contexts, one row group a shard."""
        return self.folder / "contexts.parquet"

    @property
    def documents_file(self) -> Path:
        """Table of the documents that have a context."""
        return self.folder / "documents.parquet"

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Open a plan; `RunMissing` when it was not finished, `RunCorrupt` when it is not whole."""
        path = Path(folder) / "plan.json"
        try:
            plan = cls(folder=Path(folder), **json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RunMissing(
                f"opening the plan in {folder}: there is none that was finished; build it again"
            ) from error
        except (ValueError, TypeError) as error:
            raise RunCorrupt(
                f"opening the plan in {folder}: plan.json is damaged ({error}); build it again"
            ) from error
        try:
            metadata = pq.read_metadata(plan.contexts_file)
        except (OSError, pa.ArrowException) as error:
            raise RunCorrupt(
                f"opening the plan in {folder}: contexts.parquet is damaged; build it again"
            ) from error
        if (metadata.num_row_groups, metadata.num_rows) != (plan.shards, plan.contexts):
            raise RunCorrupt(
                f"opening the plan in {folder}: contexts.parquet is not of this plan; build it again"
            )
        return plan

    @cached_property
    def shard_tokens(self) -> tuple[int, ...]:
        """How many tokens each shard holds."""
        metadata = pq.read_metadata(self.contexts_file)
        return tuple(metadata.row_group(shard).column(3).num_values for shard in range(self.shards))

    def batches(self, shard: int) -> Iterator[ContextBatch]:
        """The batches of a shard."""
        assert 0 <= shard < self.shards, (shard, self.shards)
        return batches(self.contexts_file, shard, self.special, paired=self.paired)


def batches(
    contexts: Place, shard: int, special: Sequence[int], *, paired: bool = False
) -> Iterator[ContextBatch]:
    """The batches of a row group of contexts: by (length, id), as many at a time as BATCH_TOKENS holds.

    paired  every second context is the target of the one before (`ContextBatch.targets`)
    """
    with parquet(contexts) as file:
        table = file.read_row_group(shard, columns=["context", "tokens"]).combine_chunks()
    ids = table["context"].to_numpy()
    column = table["tokens"].chunk(0)
    offsets, flat = column.offsets.to_numpy(), column.values.to_numpy()
    lengths = np.diff(offsets).astype(np.int32)

    def batch(rows: np.ndarray, targets: ContextBatch | None) -> ContextBatch:
        tokens, _ = padded([flat[offsets[row] : offsets[row + 1]] for row in rows])
        counted = np.arange(tokens.shape[1])[None, :] < lengths[rows][:, None]
        counted[:, 0] = False
        counted &= ~np.isin(tokens, special)
        return ContextBatch(ids[rows], tokens, lengths[rows], counted, targets)

    step = 2 if paired else 1
    together = lengths.reshape(-1, step).sum(1)
    for units in packed(np.lexsort((ids[::step], together)), together, BATCH_TOKENS):
        yield batch(units * step, batch(units * step + 1, None) if paired else None)


def packed(order: np.ndarray, lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Runs of `order` (ascending by length) whose size x longest is at most so many tokens."""
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - begin) * int(lengths[order[end]]) > most:
            yield order[begin:end]
            begin = end


def _key(arrays: Sequence[np.ndarray]) -> bytes:
    """What tells a context, or a source with its target, from others."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.digest()


class PlanWriter:
    """Streams contexts into one row group a shard and documents beside them, and counts.

    paired  contexts come two and two, a source and its target, which are kept or left out together
    """

    def __init__(self, folder: Path, special: list[int], *, paired: bool = False) -> None:
        self.folder, self.special, self.paired = folder, special, paired
        self.tokens = self.counted = self.contexts = self.documents = self.duplicates = self.shards = 0
        self._never = frozenset(special)
        self._seen: set[bytes] = set()
        self._digest = hashlib.sha256()
        self._shard: list[tuple[int, int, int, np.ndarray]] = []
        self._shard_tokens = 0
        self._titles: list[tuple[int, str, str]] = []
        options = {"compression": "zstd", "version": "2.6"}
        self._contexts_file = pq.ParquetWriter(folder / "contexts.parquet", CONTEXTS, **options)
        self._documents_file = pq.ParquetWriter(folder / "documents.parquet", DOCUMENTS, **options)

    def add(self, title: str, metadata: Mapping[str, Any], contexts: Units, limit: int | None) -> bool:
        """Take the contexts of the next document; False when the limit is reached.

        A document that would exceed it is not taken at all, unless it is the first: then its leading
        contexts are, as many as fit and at least one.
        """
        fresh: list[list[tuple[int, np.ndarray]]] = []
        seen: set[bytes] = set()
        duplicates, step = 0, 2 if self.paired else 1
        for first in range(0, len(contexts), step):
            unit = [(start, np.asarray(tokens, np.int32)) for start, tokens in contexts[first : first + step]]
            key = _key([array for _, array in unit])
            enough = min(len(array) for _, array in unit) >= 2
            if enough and key not in self._seen and key not in seen:
                seen.add(key)
                fresh.append(unit)
            elif enough:
                duplicates += step
        sizes = np.cumsum([sum(len(array) for _, array in unit) for unit in fresh])
        fits = limit is None or self.tokens + int(sizes[-1] if fresh else 0) <= limit
        if not fits:
            if self.contexts:
                return False
            fresh = fresh[: max(1, int((sizes <= limit).sum()))]
        self._seen |= seen
        self.duplicates += duplicates
        for unit in fresh:
            self._make_room(sum(len(array) for _, array in unit))
            for start, array in unit:
                self._append(start, array)
        if fresh:
            self._titles.append((self.documents, title, json.dumps(metadata, sort_keys=True)))
            self.documents += 1
        if len(self._titles) == _DOCUMENTS:
            self._flush_documents()
        return fits

    def _make_room(self, tokens: int) -> None:
        if self._shard and self._shard_tokens + tokens > SHARD_TOKENS:
            self._flush_shard()

    def _append(self, start: int, array: np.ndarray) -> None:
        self._shard.append((self.contexts, self.documents, start, array))
        self._shard_tokens += len(array)
        self._digest.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
        self.contexts += 1
        self.tokens += len(array)
        self.counted += sum(token not in self._never for token in array[1:].tolist())

    def _flush_shard(self) -> None:
        ids, documents, starts, arrays = zip(*self._shard, strict=True)
        offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
        tokens = pa.ListArray.from_arrays(offsets, np.concatenate(arrays))
        columns = [
            pa.array(ids, pa.int64()),
            pa.array(documents, pa.int64()),
            pa.array(starts, pa.int32()),
            tokens,
        ]
        table = pa.Table.from_arrays(columns, schema=CONTEXTS)
        self._contexts_file.write_table(table, row_group_size=len(ids))
        self.shards += 1
        self._shard, self._shard_tokens = [], 0

    def _flush_documents(self) -> None:
        rows = zip(*self._titles, strict=True)
        columns = [pa.array(column, kind.type) for column, kind in zip(rows, DOCUMENTS, strict=True)]
        self._documents_file.write_table(pa.Table.from_arrays(columns, schema=DOCUMENTS))
        self._titles = []

    def finish(self, corpus: dict[str, Any], context_length: int, notes: Sequence[str] = ()) -> Plan:
        """Write what is left, and ``plan.json`` last; needs at least one context."""
        self._flush_shard()
        if self._titles:
            self._flush_documents()
        self.close()
        counts = ("shards", "documents", "contexts", "tokens", "counted", "duplicates")
        fields: dict[str, Any] = {name: getattr(self, name) for name in counts}
        fields |= {"sha256": self._digest.hexdigest(), "context_length": context_length}
        if self.duplicates:
            count = "1 context was" if self.duplicates == 1 else f"{self.duplicates:,} contexts were"
            notes = [*notes, f"{count} left out: their tokens were seen before"]
        fields |= {"special": self.special, "corpus": corpus, "notes": list(notes), "paired": self.paired}
        files.write(self.folder / "plan.json", json.dumps(fields, indent=1) + "\n", "writing the plan")
        return Plan(folder=self.folder, **fields)

    def close(self) -> None:
        self._contexts_file.close()
        self._documents_file.close()
