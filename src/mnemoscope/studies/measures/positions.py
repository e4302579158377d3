"""Which prefixes a measurement reads, one random counted position of each context, held out by document (A26); and how
its work is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mnemoscope import files
from mnemoscope.errors import QueryError
from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.records import ContextBatch, Progress, padded
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.plan import packed
from mnemoscope.text.sampling import half

SHARD = 128  # examples: the unit of work and of checkpoints

_DOING = "keeping what was measured in"
_BATCH = 1024  # prefixes x longest of a batch, at most: of larger ones a third is padding


@dataclass(frozen=True)
class Sizes:
    """How much a study reads; stored with every table that a measurement adds.

    positions  prefixes of the refinement and composition measurements (the paper: 4,000; A26)
    sentences  prefixes of the contribution measurements (the paper: 1,000; A44)
    cases      questions of each set that are taken apart with foils (the paper: 1; A50)
    tokens     of each half of the documents that the two-way test of patterns reads (A74)
    longest    tokens of a prefix, at most: positions beyond are not sampled
    seed       which
    questions  jsonl files of a user's own questions (A76)
    shuffled   also a copy of the model whose matrices are shuffled, where a measurement has it as a null (A78)
    """

    positions: int = 4000
    sentences: int = 1000
    cases: int = 24
    tokens: int = 65_536
    longest: int = 128
    seed: int = 0
    questions: tuple[Path, ...] = ()
    shuffled: bool = False

    def fast(self) -> Sizes:
        """A small part, for a first look in ten minutes."""
        positions, sentences = self.positions // 16, self.sentences // 40
        return replace(
            self, positions=positions, sentences=sentences, cases=self.cases // 6, tokens=self.tokens // 8, longest=64
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; files by name and hash, and the shuffled copy only where there is one."""
        sizes = {**asdict(self), "questions": [_file(path) for path in self.questions]}
        return {name: size for name, size in sizes.items() if name != "shuffled" or self.shuffled}


@dataclass(frozen=True)
class Examples:
    """Prefixes, in the order of their contexts; the last token of each is where the model is looked at.

    contexts   i64[example]
    documents  i64[example]
    positions  i32[example]  0-based, in the context
    targets    i32[example]  the token that really follows
    prefixes   tokens i32[token] of each, from the first token of the context
    """

    contexts: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    prefixes: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def tokens(self) -> int:
        """Tokens of all prefixes: what a pass costs."""
        return sum(len(prefix) for prefix in self.prefixes)

    def shards(self, size: int | None = None) -> list[np.ndarray]:
        """Numbers of the examples, so many (SHARD) at a time."""
        return _shards(len(self), size or SHARD)

    def batches(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, ContextBatch]]:
        """These examples, those of similar length together, so that little is padding; with their numbers.

        The looked-at position of row `i` is `batch.lengths[i] - 1`. The ids of a batch are those of the contexts.
        """
        lengths = np.array([len(self.prefixes[number]) for number in numbers], np.int32)
        for rows in packed(np.argsort(lengths, kind="stable"), lengths, _BATCH):
            yield numbers[rows], self._batch(numbers[rows], lengths[rows])

    def _batch(self, numbers: np.ndarray, lengths: np.ndarray) -> ContextBatch:
        tokens, _ = padded([self.prefixes[number] for number in numbers])
        counted = np.zeros(tokens.shape, bool)
        counted[np.arange(len(numbers)), lengths - 1] = True
        return ContextBatch(self.contexts[numbers], tokens, lengths, counted)


def sample(run: Run, count: int, *, longest: int = 128, seed: int = 0, held_out: bool = True) -> Examples:
    """At most `count` prefixes: of randomly chosen contexts one position each, with equal chance among those that
    count and are followed by a token that is not special.

    longest   tokens of a prefix, at most; prefixes begin where their context does
    held_out  only documents of the test half, on which no pattern was looked for
    `QueryError` when no context has such a position.
    """
    generator = np.random.default_rng(seed)
    special = np.array(run.manifest.options.get("special", []), np.int64)
    rows = run.table("contexts").select("context", "document", "tokens").collect()
    if held_out:
        groups = near_duplicates(Text.of(run)).of(rows["document"].to_numpy())
        rows = rows.filter(pl.Series(half(groups)))
    rows = rows[generator.permutation(rows.height)]
    chosen: list[tuple[int, int, int, int, np.ndarray]] = []
    for context, document, column in rows.iter_rows():
        tokens = np.asarray(column, np.int32)
        plain = ~np.isin(tokens, special)
        # Never position 0, and always followed.
        usable = 1 + np.flatnonzero((plain[1:-1] & plain[2:])[: longest - 1])
        pick = generator.random()  # drawn for every context, so that one more context changes no other
        if len(usable) and len(chosen) < count:
            position = int(usable[int(pick * len(usable))])
            target, prefix = int(tokens[position + 1]), tokens[: position + 1]
            chosen.append((context, document, position, target, prefix))
    if not chosen:
        raise QueryError(
            f"sampling prefixes of {run.path}: none of its {rows.height} held-out contexts has a position that counts; "
            "build the run on more text"
        )
    chosen.sort(key=lambda example: example[0])
    contexts, documents, positions, targets, prefixes = zip(*chosen, strict=True)
    return Examples(
        np.array(contexts, np.int64),
        np.array(documents, np.int64),
        np.array(positions, np.int32),
        np.array(targets, np.int32),
        prefixes,
    )


@dataclass(frozen=True)
class Work:
    """What a measurement has finished, in a folder of its own while it is under way, and who is told how far it is."""

    folder: Path
    report: Callable[[Progress], None] = lambda _: None

    def kept(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that is read once."""
        file = self.folder / f"{name}.npy"
        if not file.exists():
            with files.replacing(file, "reading values: writing") as partial, partial.open("wb") as stream:
                np.save(stream, read())
        return np.asarray(np.load(file))

    def shards(
        self,
        examples: Sized,
        measure: Callable[[np.ndarray], dict[str, pa.Table]],
        stage: str,
        size: int | None = None,
    ) -> dict[str, list[pa.Table]]:
        """Tables of `measure(numbers)` for every shard of the examples, in order; finished ones are read.

        Each shard is written when it is finished, whole or not at all, so that a killed study loses one shard at most
        and gives the same bits as one that was not.
        """
        size = size or SHARD
        measured: dict[str, list[pa.Table]] = {}
        for index, numbers in enumerate(_shards(len(examples), size)):
            self.report(Progress(stage, index * size, len(examples), "examples"))
            done = self.folder / f"{index:05d}.json"
            table_of = lambda name: self.folder / f"{index:05d}-{name}.parquet"  # noqa: B023, E731
            if not done.exists():
                tables = measure(numbers)
                for name, table in tables.items():
                    with files.replacing(table_of(name), _DOING) as partial:
                        pq.write_table(table, partial, compression="zstd")
                files.write(done, json.dumps(sorted(tables)), _DOING)
            for name in json.loads(done.read_text()):
                measured.setdefault(name, []).append(pq.read_table(table_of(name)))
        self.report(Progress(stage, len(examples), len(examples), "examples"))
        return measured


def _shards(count: int, size: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), range(size, count, size))


def _file(path: Path) -> str:
    try:
        return f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise QueryError(
            f"reading questions: {path} cannot be read ({error.strerror}); give a jsonl file"
        ) from error


def digest(about: dict[str, Any]) -> str:
    """A short name for work that must not be mixed with other work."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
