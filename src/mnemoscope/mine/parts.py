"""A build in parts: processes that share a folder, on one machine or many, and no other than that.

Each does some shards of the one plan and keeps what it mined in files of its own, beside the others'. What a run has
done is the merge of all files, in any order, and so a run made in parts is the run made in one go, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from mnemoscope import files
from mnemoscope.arguments import check_build
from mnemoscope.errors import RunError, RunMismatch
from mnemoscope.location import Location, place
from mnemoscope.mine import loop
from mnemoscope.mine.build import TOP, Build, PlannedText, begun, compare, digest, prepared, processes
from mnemoscope.mine.loop import Portion
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.model.load import load_model
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import DEFAULT
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run, open_run
from mnemoscope.run.writing import WORK, is_finished
from mnemoscope.text.corpus import Corpus
from mnemoscope.text.plan import Plan

PATIENCE = 86_400.0  # seconds that a part waits while another one plans the text
_PARTS = "parts.json"  # in how many a build was begun

Report = Callable[[Progress], None]


def mine(
    model: Model | PreTrainedModel | str | Path,
    text: Corpus | str | Path | list[str],
    path: str | Path,
    portion: Portion,
    *,
    top: int = TOP,
    nulls: Sequence[str] = DEFAULT,
    workers: int = 1,
    report: Report | None = None,
) -> None:
    """Mine one part of a build, or go on with it; arguments and errors as of `build.build`, for each part the same.

    The first one there plans the text, and others wait for it. Nothing is done where the run is finished.
    """
    report = report or (lambda _: None)
    path = _shared(path)
    check_build(top, nulls, workers)
    engine = loop.Processes(processes(model, workers))
    model, text, _, identity = prepared(model, text, path, top, nulls, engine)
    with begun(model, path, PATIENCE) as writer:
        if writer is None:
            compare(open_run(path).manifest.options["identity"], identity, f"{path} holds a run that was")
            return
        build = Build(model, text, writer, identity, engine, report)
        _count(build.work, portion)
        plan = build.planned()
    with model.running(), portion.held(build.work):
        loop.run_part(model, plan, build.states(plan), build.work, portion, engine, report)
        layers = model.cells.layers
        own = portion.of(len(layers))
        build.read_values(layers[own.start : own.stop], f"values-{portion.name}")
    model.check_weights(identity["weights_sha256"], f"mining {portion.name} of {path}")


def _shared(path: str | Path) -> Path:
    """The folder of parts; RunError for a URL, behind which processes cannot lock a file for each other."""
    if isinstance(place(path), Location):
        raise RunError(
            f"mining a part of a build: parts share a folder, and {path} is behind a URL; give a folder that all of "
            "them reach, and `mnemoscope push` the merged run"
        )
    return files.expanded(path)


def _count(work: Path, portion: Portion) -> None:
    file = work / _PARTS
    if not file.exists():
        files.write(file, json.dumps({"parts": portion.parts}), "mining a part of a build")
    known = json.loads(file.read_text(encoding="utf-8"))["parts"]
    if known != portion.parts:
        raise RunMismatch(
            f"mining a part of a build: {work.parent} was begun in {known} parts, and {portion.parts} were given; give "
            f"{known}, or choose another folder"
        )


def merge(
    path: str | Path,
    model: Model | PreTrainedModel | str | Path | None = None,
    *,
    report: Report | None = None,
) -> Run:
    """Make the run of the parts that were mined in a folder; returns it opened.

    model  what `load_model` takes, or its result; None for where the parts had theirs from

    `RunError` if a part is not done, or nothing was begun there; `RunMismatch` for another model.
    """
    path = _shared(path)
    if is_finished(path):
        return open_run(path)
    try:
        identity = json.loads((path / WORK / "identity.json").read_text(encoding="utf-8"))
        for name in ("schema_version", "device"):  # of what was begun, and not of what it is
            identity.pop(name, None)
        plan = Plan.load(path / WORK)
    except (OSError, ValueError) as error:
        raise RunError(f"merging parts: {path} holds none; mine them with build --shard first") from error
    _check_done(path, plan, digest(identity, plan))
    source = identity["model"] if model is None else model
    loaded = source if isinstance(source, Model) else load_model(source, dtype=identity["dtype"])
    loaded = loaded if identity["target"] else loaded.encoder
    of_model = {
        "weights_sha256": loaded.weights_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "units": None if loaded.units is None else loaded.units.sha256,
    }
    compare(identity, of_model, f"{path} holds parts that were")
    engine = loop.Processes(processes(loaded, 1))
    engine.check()
    with begun(loaded, path) as writer:
        if writer is not None:
            text = PlannedText.of(identity)
            Build(loaded, text, writer, identity, engine, report or (lambda _: None)).run()
    return open_run(path)


def _check_done(path: Path, plan: Plan, build: str) -> None:
    held = [RunStatistics.held(file, build) for file in sorted((path / WORK).glob("state-*.npz"))]
    done = frozenset().union(*held)
    if len(done) < sum(map(len, held)):
        raise RunError(
            f"merging parts: {path} holds a shard twice; two processes did it at once: remove what is in "
            f"{path / WORK}, and mine the parts again"
        )
    if left := [shard for shard in range(plan.shards) if shard not in done]:
        file = path / WORK / _PARTS
        number = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.exists() else 1
        unfinished = [place for place in range(number) if {*Portion(place, number).of(plan.shards)} & {*left}]
        raise RunError(
            f"merging parts: {len(left)} of {plan.shards} shards in {path} are not done; run what is left: "
            + ", ".join(f"--shard {place}/{number}" for place in unfinished[:8])
            + (" ..." if len(unfinished) > 8 else "")
        )
