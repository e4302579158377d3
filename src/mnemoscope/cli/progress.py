"""Progress of long jobs on stderr: bars in a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mnemoscope.records import Progress

EVERY = 60.0  # seconds between two lines of a stage


@contextmanager
def progress_bars() -> Iterator[Callable[[Progress], None]]:
    """Draw what a job reports: one bar a stage, with speed and time left; where stderr is no terminal, lines."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield Lines()


class Lines:
    """Prints a stage when it is finished, and every minute until then, for logs of jobs without a terminal."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stages: dict[str, _Stage] = {}

    def __call__(self, step: Progress) -> None:
        if step.note:
            typer.echo(step.note, err=True)
            return
        now = self._now()
        finished = step.done >= step.total > 0
        stage = self._stages.get(step.stage)
        if stage is None or (stage.finished and not finished):  # a job may come to a stage twice
            stage = self._stages[step.stage] = _Stage(now, step.done, now)
        if stage.finished or (not finished and now - stage.said < EVERY):
            return
        stage.said, stage.finished = now, finished
        seconds, done = now - stage.begun, step.done - stage.before
        of = f" of {step.total:,}" if step.total else ""
        line = f"{step.stage}: {step.done:,}{of} {step.unit}, {_clock(seconds)}"
        if of and done and not finished:
            line += f", about {_clock(seconds / done * (step.total - step.done))} left"
        typer.echo(line, err=True)


class _Stage:
    """When it began, and with how much done (a resumed run); when a line was last printed."""

    def __init__(self, begun: float, before: int, said: float) -> None:
        self.begun, self.before, self.said = begun, before, said
        self.finished = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console, speed_estimate_period=60) as bar:
        tasks: dict[str, Any] = {}

        def report(step: Progress) -> None:
            if step.note:
                bar.console.print(step.note, markup=False, highlight=False)
                return
            if step.stage not in tasks:
                # What was done before (a resumed run) must not count as speed.
                tasks[step.stage] = bar.add_task(
                    step.stage, total=step.total or None, completed=step.done, speed=step.unit
                )
            task = tasks[step.stage]
            bar.update(task, completed=step.done, total=step.total or None)
            pace = bar.tasks[task].speed
            bar.update(task, speed=f"{pace:,.0f} {step.unit}/s" if pace and pace >= 1 else step.unit)

        yield report
