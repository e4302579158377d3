"""The study's measurements on a finished run: each that is not there yet, resumable, in the order of the catalogue."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from mnemoscope.arguments import check_study
from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.catalogue import CATALOGUE, Measurement
from mnemoscope.studies.measures import (
    cases,
    contributions,
    parameters,
    patterned,
    positions,
    questions,
    refinement,
    removed,
    value_ranks,
)
from mnemoscope.studies.measures.positions import Sizes

WHOLE = 1_000_000  # tokens of the run that minutes of the catalogue are about
FIXED = 0.2  # share of those minutes that does not depend on how many
Tables = Mapping[str, Iterable[pa.Table]]
Job = Callable[[Run, Model, Sizes, Path, Callable[[Progress], None]], Tables | Run]
# What each adds to a run: all columns of its tables in the order of the schema, or the run to which it added them
# itself. The folder is its own, for checkpoints.
JOBS: dict[str, Job] = {
    "glance": parameters.measure,
    "keys": patterned.measure,
    "removal": removed.measure,
    "value_ranks": value_ranks.measure,
    "refinement": refinement.measure,
    "contributions": contributions.measure,
    "questions": questions.measure,
    "cases": cases.measure,
}
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
    model.check_built(run, "studying")
    for one in chosen:
        if one.measured and one.state(run, sizes) != "ready":
            try:
                run = _add(run, model, one, sizes, report or (lambda _: None))
            except QueryError as error:
                if skip is None:
                    raise
                skip(one, error)
    return run


def _add(run: Run, model: Model, one: Measurement, sizes: Sizes, report: Callable[[Progress], None]) -> Run:
    about = {"model": model.weights_sha256, "corpus": run.manifest.corpus.sha256, "sizes": one.sizes(sizes)}
    folder = run.path / WORK / f"{one.name}-{positions.digest(about)}"
    folder.mkdir(parents=True, exist_ok=True)
    with model.running():
        found = JOBS[one.name](run, model, sizes, folder, report)
    tables = {} if isinstance(found, Run) else found
    run = add_tables(run.path, tables, {one.key: one.sizes(sizes)})
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
    left = [one for one in chosen if one.measured and one.state(run, sizes) != "ready"]
    forwarded = besides = 0.0
    smaller = FIXED + (1 - FIXED) * min(1.0, run.manifest.corpus.tokens / WHOLE)
    for one in left:
        count = max(one.sizes(sizes).get(name, 0) for name in ("positions", "sentences", "cases"))
        copies = 2 if one.sizes(sizes).get("shuffled") else 1
        besides += 60 * one.minutes * smaller + one.seconds * count * copies
        if one.passes:
            examples = positions.sample(run, count, longest=sizes.longest, seed=sizes.seed)
            forwarded += one.passes * copies * examples.tokens
    return (forwarded / _speed(run, model) if forwarded else 0.0) + besides


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
