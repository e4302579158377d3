"""The study's measurements on a finished run: each that is not there yet, resumable, in the order of the catalogue."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import torch
from torch import nn

from mnemoscope.arguments import check_study
from mnemoscope.errors import QueryError
from mnemoscope.model.devices import made_on
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.catalogue import CATALOGUE, Measurement
from mnemoscope.studies.measures import (
    cases,
    contributions,
    groups,
    positions,
    questions,
    refinement,
    removal,
    tuned_lens,
    value_ranks,
    weights,
)
from mnemoscope.studies.measures.positions import Sizes, Work
from mnemoscope.trials.job import Settings, patterns

WHOLE = 1_000_000  # tokens of the run that minutes of the catalogue are about
FIXED = 0.2  # share of those minutes that does not depend on how many
Tables = Mapping[str, Iterable[pa.Table]]
Measure = Callable[[Run, Model, Sizes, Work], Tables | Run]
WORK = ".study"  # in the folder of the run, while a measurement is under way


def measure(
    run: Run,
    model: Model,
    *,
    chosen: Sequence[Measurement] = CATALOGUE,
    sizes: Sizes | None = None,
    report: Callable[[Progress], None] | None = None,
    skip: Callable[[Measurement, QueryError], None] | None = None,
) -> Run:
    """Add the tables of every chosen measurement that the run lacks, or has in other sizes; returns it opened.

    Killed at any moment, the run stays whole, and the same call goes on after the last finished shard of examples.
    skip  told of a measurement that this run has too little text for; without it, its `QueryError` is raised
    RunMismatch when the model is not the run's.
    """
    sizes = sizes or Sizes()
    check_study(sizes.positions, sizes.sentences)
    if not model.anatomy.bidirectional:  # an encoder is asked what applies to it
        model.check_causal("studying")
    model.check_doubles("studying")
    model.check_built(run, "studying")
    left = [each for each in chosen if each.lacks(run, sizes)]
    expected = [0.0] * len(left)
    if report and len(left) > 1:
        with suppress(QueryError):  # of too little text, of which each measurement has a line
            expected = _expected(run, model, left, sizes)
    known = spent = 0.0  # seconds of what was measured: expected, and really
    for place, measurement in enumerate(left):
        if measurement.lacks(run, sizes):
            begun, after = time.monotonic(), sum(expected[place + 1 :]) * (spent / known if known else 1.0)
            try:
                run = _add(run, model, measurement, sizes, _before(after, report))
            except QueryError as error:
                if skip is None:
                    raise
                skip(measurement, error)
            else:
                known, spent = known + expected[place], spent + time.monotonic() - begun
    return run


def _before(seconds: float, report: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """Reports of a measurement that others follow, which take about so long."""
    return lambda step: report(step._replace(after=seconds)) if report else None


def _add(
    run: Run, model: Model, measurement: Measurement, sizes: Sizes, report: Callable[[Progress], None]
) -> Run:
    about = {
        "model": model.weights_sha256,
        "corpus": run.manifest.corpus.sha256,
        "sizes": measurement.sizes(sizes),
    }
    folder = run.folder / WORK / f"{measurement.name}-{positions.digest(about)}"
    folder.mkdir(parents=True, exist_ok=True)
    with model.running(), made_on(model.device):
        added = JOBS[measurement.name](run, model, sizes, Work(folder, report))
        tables = {} if isinstance(added, Run) else added
        run = add_tables(
            run.folder, tables, {measurement.key: measurement.sizes(sizes)}
        )  # which makes some of them
    _remove(folder)
    return run


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def estimate(run: Run, model: Model, chosen: Sequence[Measurement], sizes: Sizes) -> float:
    """Seconds that the measurements still to be done may take: a pass over some prefixes is timed.

    An order of magnitude: what a measurement does besides forwarding is known for the sample model only.
    """
    return sum(_expected(run, model, [m for m in chosen if m.lacks(run, sizes)], sizes))


def _expected(run: Run, model: Model, left: Sequence[Measurement], sizes: Sizes) -> list[float]:
    """The same of each of these."""
    seconds, pace = list[float](), 0.0
    smaller = FIXED + (1 - FIXED) * min(1.0, run.manifest.corpus.tokens / WHOLE)
    for measurement in left:
        count = max(measurement.sizes(sizes).get(name, 0) for name in ("positions", "sentences", "cases"))
        copies = 2 if measurement.sizes(sizes).get("shuffled") else 1
        seconds.append(60 * measurement.minutes * smaller + measurement.seconds * count * copies)
        if measurement.passes:
            examples = positions.sample(run, count, longest=sizes.longest, seed=sizes.seed)
            pace = pace or _speed(run, model)
            seconds[-1] += measurement.passes * copies * examples.tokens / pace
    return seconds


def _speed(run: Run, model: Model) -> float:
    """Tokens that the body reads in a second, over the first prefixes of the sample."""
    examples = positions.sample(run, 2 * positions.SHARD, longest=64)
    _, batch = next(examples.batches(examples.shards()[0]))
    tokens = torch.from_numpy(batch.tokens[:16]).to(model.device, torch.int64)
    with model.running(), torch.inference_mode():
        model.anatomy.body(input_ids=tokens, use_cache=False)  # the first pass is slower
        start = time.perf_counter()
        model.anatomy.body(input_ids=tokens, use_cache=False)
    return tokens.numel() / (time.perf_counter() - start)


# -- What there is to measure ------------------------------------------------------------------------------------

_PARTS = ("attention", "ffn", "other")


def _parameters(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, list[pa.Table]]:
    """The table `parameters` (A2): attention, feed-forward and other parameters of every layer, and what is in none."""
    seen: set[int] = set()
    rows: list[tuple[int, str, int]] = []
    for index, layer in enumerate(model.anatomy.layers):
        counts = [_count(modules, seen) for modules in _modules(layer)]
        rows += [(index, part, count) for part, count in zip(_PARTS, counts, strict=True)]
    # Shared weights (a tied unembedding) are counted where they are first.
    outside = [
        (-1, "embedding", _count([model.anatomy.embedding], seen)),
        (-1, "unembedding", _count([model.anatomy.head], seen)),
        (-1, "other", _count([model.hf], seen)),
    ]
    columns = dict(zip(("layer", "part", "parameters"), zip(*outside, *rows, strict=True), strict=True))
    return {"parameters": [arrow_table("parameters", columns)]}


def _modules(layer: Layer) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Modules of attention, of the feed-forward layer, and the block, in the order of _PARTS."""
    first = [projection.module for projection in (layer.gate, layer.up) if projection is not None]
    experts = None if layer.experts is None else layer.experts.module
    ffn = [*first, *(module for module in (layer.down, experts) if module is not None)]
    mixing = [module for module in (layer.attention, layer.mixer) if module is not None]
    return mixing, ffn, [layer.module]


def _count(modules: list[nn.Module], seen: set[int]) -> int:
    """Parameters of the modules that were not counted yet."""
    fresh = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
    seen.update(fresh)
    return sum(p.numel() for p in fresh.values())


def _patterns(run: Run, model: Model, sizes: Sizes, work: Work) -> Run:
    """The run with the tables `patterns`, `pattern_tests` and `calibration` of every neuron (A7, A8, A74, A77)."""
    return patterns(run, model, Settings(budget=sizes.tokens, seed=sizes.seed), report=work.report)


# What each adds to a run: all columns of its tables in the order of the schema, or the run to which it added them
# itself.
JOBS: dict[str, Measure] = {
    "glance": _parameters,
    "keys": _patterns,
    "removal": removal.measure,
    "groups": groups.measure,
    "value_ranks": value_ranks.measure,
    "weights": weights.measure,
    "lens": tuned_lens.measure,
    "refinement": refinement.measure,
    "contributions": contributions.measure,
    "questions": questions.measure,
    "cases": cases.measure,
}
