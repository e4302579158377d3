"""What a trigger loses with one of its tokens: the first, the last, or a random one (A9).

The model is causal, so a prefix is served by a pass over the whole context it comes from: one pass as it is (which also
gives every prefix without its last token), one without the first token, and a few without some other token. The random
token of a prefix is the one of least priority in it, the priorities being drawn once for a context: uniform over the
tokens of each prefix, and yet only about log(length) different ones in a context. All triggers of a sampled context
are served together, which is why contexts are sampled, and not neurons.

Beside each trigger stands its null: the same neuron at the same position of another sampled context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from mnemoscope.arguments import check_removal
from mnemoscope.errors import QueryError
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.running import observed
from mnemoscope.records import ContextBatch, Progress, padded
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.text.plan import BATCH_TOKENS, packed

REMOVED = ("first", "last", "random")
KINDS = ("trigger", "random")
# Position 0, and in some models position 1, is a sink: what is left of a prefix must end beyond it.
SHORTEST = 4  # least position of a trigger
LONGEST = 128  # positions of a context that are read
ROUTED_ANEW = (
    "where a router may choose other experts without a token, and a neuron that does not run has no coefficient to "
    "compare"
)
_POSITIONS = 20  # sampled by a study for each document sampled here: 200 documents in a study of full size

_SCHEMA = pl.DataFrame(pl.from_arrow(SCHEMAS["removal"].empty_table())).schema


class _SampledText(NamedTuple):
    """One sampled context, cut to LONGEST tokens, with what is dropped for the prefix that ends at each position."""

    context: int
    document: int
    tokens: np.ndarray  # i32[token]
    counted: np.ndarray  # bool[token]
    drop: np.ndarray  # i32[token]


@dataclass(frozen=True)
class _Prefixes:
    """Rows to be tested: a trigger's address, and where the prefix stands (`text` numbers the sampled contexts)."""

    rows: pl.DataFrame  # layer, neuron, polarity, rank, kind
    text: np.ndarray
    position: np.ndarray


def removal(
    run: Run,
    model: Model,
    *,
    documents: int = 200,
    per_layer: int = 1000,
    triggers: int = 10,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> pl.DataFrame:
    """Coefficients of triggers with and without one token, as the table `removal` (docs/format.md).

    documents  how many are sampled, and one context of each
    per_layer  triggers tested in each layer, at most
    triggers   how many of each neuron and polarity may be tested, the strongest first

    Triggers at positions 4 to 127 count. Position 0 is never removed. RunMismatch when the model is not the run's,
    QueryError when no trigger can be tested.
    """
    check_removal(documents, per_layer, triggers, seed)
    model.check_built(run, "removing tokens from triggers of")
    generator = np.random.default_rng(seed)
    texts = _sample(run, documents, generator)
    prefixes = _with_null(_chosen(run, texts, per_layer, triggers, generator), texts, generator)
    return _Passes(texts, prefixes).table(model, report or (lambda _: None))


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, list[pa.Table]]:
    """The table `removal`, as a measurement of the study."""
    documents = max(10, sizes.positions // _POSITIONS)
    rows = removal(run, model, documents=documents, seed=sizes.seed, report=work.report)
    return {"removal": [arrow_table("removal", rows.to_dict())]}


def add(
    run: Run,
    model: Model,
    *,
    documents: int = 200,
    per_layer: int = 1000,
    triggers: int = 10,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Run:
    """Measure as `removal` does and keep the table in the run; one measured with the same options stays as it is."""
    model.check_causal("removing tokens from triggers of")
    model.check_dense("removing tokens from triggers of", why=ROUTED_ANEW)
    options = {"documents": documents, "per_layer": per_layer, "triggers": triggers, "seed": seed}
    if "removal" in run.manifest.tables and run.manifest.options.get("removal") == options:
        return run
    rows = removal(run, model, **options, report=report)
    return add_tables(run.folder, {"removal": [arrow_table("removal", rows.to_dict())]}, {"removal": options})


def _sample(run: Run, documents: int, generator: np.random.Generator) -> list[_SampledText]:
    """One random context, of those long enough, from each of some random documents."""
    long = (
        run.table("contexts")
        .filter(pl.col("tokens").list.len() > SHORTEST)
        .select("context", "document")
        .collect()
        .sample(fraction=1, shuffle=True, seed=int(generator.integers(2**32)))
        .unique("document", keep="first", maintain_order=True)
        .head(documents)
        .sort("context")
    )
    special = run.manifest.options.get("special", [])
    return [
        _text(context, stored.document, stored.tokens[:LONGEST], special, generator)
        for context, stored in run.contexts(long["context"].to_list()).items()
    ]


def _text(
    context: int, document: int, tokens: np.ndarray, special: list[int], generator: np.random.Generator
) -> _SampledText:
    priority = generator.random(len(tokens))
    priority[0] = np.inf  # never removed
    least = np.minimum.accumulate(priority)
    drop = np.maximum.accumulate(np.where(priority == least, np.arange(len(tokens)), 0))
    counted = ~np.isin(tokens, special)
    counted[:SHORTEST] = False
    return _SampledText(context, document, tokens, counted, drop.astype(np.int32))


def _chosen(
    run: Run, texts: list[_SampledText], per_layer: int, triggers: int, generator: np.random.Generator
) -> pl.DataFrame:
    """Triggers in the sampled contexts, not too many of a layer: layer, neuron, polarity, rank, context, position."""
    contexts = pl.Series("context", [text.context for text in texts], dtype=pl.Int64)
    rows = (
        run.table("triggers")
        .filter(
            pl.col("rank") < triggers,
            pl.col("position").is_between(SHORTEST, LONGEST - 1),
            pl.col("context").is_in(contexts.implode()),
        )
        .select("layer", "neuron", "polarity", "rank", "context", "position")
        .collect()
    )
    if rows.height == 0 or len(texts) < 2:
        raise QueryError(
            f"removing tokens from triggers of {run.path}: none of the triggers lies at positions {SHORTEST} to "
            f"{LONGEST - 1} of the {len(texts)} contexts that were sampled; sample more documents or triggers"
        )
    shuffled = rows.sample(fraction=1, shuffle=True, seed=int(generator.integers(2**32)))
    return shuffled.group_by("layer").head(per_layer).sort("layer", "neuron", "polarity", "rank")


def _with_null(chosen: pl.DataFrame, texts: list[_SampledText], generator: np.random.Generator) -> _Prefixes:
    """Each trigger, and the same neuron at the same position elsewhere (where any other context counts there)."""
    number = {text.context: index for index, text in enumerate(texts)}
    text = np.array([number[context] for context in chosen["context"]])
    position = chosen["position"].to_numpy()
    other = np.full(len(text), -1)
    for end in np.unique(position):
        reach = np.array([i for i, t in enumerate(texts) if end < len(t.tokens) and t.counted[end]])
        placed = np.flatnonzero(position == end)
        if len(reach) > 1:
            # A step of 1 to n - 1 from one's own place among n: any of the others, with equal chance.
            own = np.searchsorted(reach, text[placed])
            other[placed] = reach[(own + generator.integers(1, len(reach), len(placed))) % len(reach)]
    has = np.flatnonzero(other >= 0)
    address = chosen.select("layer", "neuron", "polarity", "rank")
    rows = pl.concat(
        [address.with_columns(kind=pl.lit("trigger")), address[has].with_columns(kind=pl.lit("random"))]
    )
    return _Prefixes(rows, np.concatenate([text, other[has]]), np.concatenate([position, position[has]]))


class _Passes:
    """Which sequences go through the model, and which coefficient of which answers what."""

    def __init__(self, texts: list[_SampledText], prefixes: _Prefixes) -> None:
        self._texts, self._prefixes = texts, prefixes
        self._keys: dict[tuple[int, int], int] = {}  # (text, removed position; -1 for none) -> pass
        self._ends: list[int] = []  # last position of the text that each pass has to reach
        text, position = prefixes.text, prefixes.position
        drop = np.array([texts[t].drop[p] for t, p in zip(text, position, strict=True)])
        ones = np.ones_like(position)
        whole = self._reach(text, -ones, position)
        self.removed_position = {"first": ones, "last": position, "random": drop}
        # Each question is a pass and a place in it. Without a token, the last place is one less.
        self.questions = {
            "whole": (whole, position),
            "first": (self._reach(text, ones, position), position - 1),
            "last": (whole, position - 1),
            "random": (self._reach(text, drop, position), position - 1),
        }

    def _reach(self, text: np.ndarray, removed: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The pass of each prefix, made or prolonged."""
        passes = []
        for *pair, end in zip(text.tolist(), removed.tolist(), position.tolist(), strict=True):
            key = (pair[0], pair[1])
            if key not in self._keys:
                self._keys[key] = len(self._ends)
                self._ends.append(0)
            number = self._keys[key]
            self._ends[number] = max(self._ends[number], end)
            passes.append(number)
        return np.array(passes)

    def _sequence(self, key: tuple[int, int], end: int) -> np.ndarray:
        text, removed = key
        tokens = self._texts[text].tokens[: end + 1]
        return tokens if removed < 0 else np.delete(tokens, removed)

    def batches(self) -> Iterator[tuple[np.ndarray, ContextBatch]]:
        """Passes of similar length together, with the numbers of the passes."""
        sequences = [self._sequence(key, self._ends[number]) for key, number in self._keys.items()]
        lengths = np.array([len(tokens) for tokens in sequences], np.int32)
        for numbers in packed(np.argsort(lengths, kind="stable"), lengths, BATCH_TOKENS):
            tokens, sizes = padded([sequences[number] for number in numbers])
            within = np.arange(tokens.shape[1])[None, :] < sizes[:, None]
            yield numbers, ContextBatch(numbers, tokens, sizes, within)

    def table(self, model: Model, report: Callable[[Progress], None]) -> pl.DataFrame:
        """Run every pass in fp32, stopping at the last layer, and lay out the answers."""
        answers = _Answers(self.questions, self._prefixes.rows)
        work = list(self.batches())
        total, done = sum(batch.n_tokens for _, batch in work), 0
        wide = observed(model.hf, upcast=model.upcast, attention=None)
        with model.running(), wide, Capture(model) as capture:
            for numbers, batch in work:
                capture.sweep(batch, answers.reader(numbers))
                done += batch.n_tokens
                report(Progress("removing tokens", done, total, "tokens"))
        about = {
            "document": np.array([self._texts[t].document for t in self._prefixes.text]),
            "context": np.array([self._texts[t].context for t in self._prefixes.text]),
            "position": self._prefixes.position,
            "whole": answers.coefficients["whole"],
        }
        parts = [
            self._prefixes.rows.with_columns(
                **{name: pl.Series(values) for name, values in about.items()},
                removed=pl.lit(removed),
                removed_position=pl.Series(self.removed_position[removed]),
                without=pl.Series(answers.coefficients[removed]),
            ).select(pl.col(name).cast(dtype) for name, dtype in _SCHEMA.items())
            for removed in REMOVED
        ]
        kind = pl.col("kind").cast(pl.Enum(KINDS))
        removed = pl.col("removed").cast(pl.Enum(REMOVED))
        return pl.concat(parts).sort("layer", "neuron", "polarity", "rank", kind, removed)


class _Answers:
    """Picks the asked coefficients, and no others, out of what the capture hands out."""

    def __init__(self, questions: dict[str, tuple[np.ndarray, np.ndarray]], rows: pl.DataFrame) -> None:
        self._questions = questions
        self._layer, self._neuron = rows["layer"].to_numpy(), rows["neuron"].to_numpy()
        self.coefficients = {name: np.full(rows.height, np.nan, np.float32) for name in questions}

    def reader(self, numbers: np.ndarray) -> Callable[..., None]:
        """A receiver for the batch of these passes."""
        rows_of = {int(number): row for row, number in enumerate(numbers)}
        asked = []
        for name, (passes, place) in self._questions.items():
            prefixes = np.flatnonzero(np.isin(passes, numbers))
            rows = np.array([rows_of[number] for number in passes[prefixes].tolist()], np.int64)
            asked.append((name, prefixes, rows, place[prefixes]))

        def receive(layer: int, coefficients: Tensor, *_: object) -> None:
            for name, prefixes, rows, place in asked:
                inside = np.flatnonzero(self._layer[prefixes] == layer)
                index = (rows[inside], place[inside], self._neuron[prefixes[inside]])
                picked = coefficients[tuple(torch.from_numpy(axis.astype(np.int64)) for axis in index)]
                self.coefficients[name][prefixes[inside]] = picked.float().cpu().numpy()

        return receive
