"""What the commands share: loading, printing, progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mnemoscope.records import Progress

if TYPE_CHECKING:
    from mnemoscope.models import Model
    from mnemoscope.store import Run


def stdout() -> Console:
    return Console(highlight=False)


def say(message: str) -> None:
    typer.echo(message, err=True)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def load(name: str, **options: Any) -> Model:
    from mnemoscope.models import load_model

    console = Console(stderr=True, highlight=False)
    with console.status(f"{name}: loading") as status:
        return load_model(name, progress=lambda what: status.update(f"{name}: {what}"), **options)


def model_of(run: Run, name: str | None, device: str) -> Model:
    """The model that a run was built from, or one that is said to be it."""
    entry, options = run.manifest.model, run.manifest.options
    return load(name or entry.id, dtype=options["dtype"], device=device, revision=entry.revision)


def build_run(model: Model, corpus: Any, out: Path, **options: Any) -> Run:
    from mnemoscope.jobs.build import build as run_build

    with progress_bars() as report:
        return run_build(model, corpus, out, report=report, **options)


@contextmanager
def progress_bars() -> Iterator[Callable[[Progress], None]]:
    """Draw progress on stderr: one bar a stage, with speed and time left."""
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=60) as bar:
        tasks: dict[str, Any] = {}

        def report(step: Progress) -> None:
            if step.stage not in tasks:
                # What was done before (a resumed run) must not count as speed.
                tasks[step.stage] = bar.add_task(
                    step.stage, total=step.total, completed=step.done, speed=step.unit
                )
            task = tasks[step.stage]
            bar.update(task, completed=step.done, total=step.total)
            pace = bar.tasks[task].speed
            bar.update(task, speed=f"{pace:,.0f} {step.unit}/s" if pace and pace >= 1 else step.unit)

        yield report
