"""What the commands share: loading, printing, and the progress of long jobs: bars in a terminal, lines in a file."""

from __future__ import annotations

import json
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from typer.core import TyperGroup

from mnemoscope import files
from mnemoscope.cli import door
from mnemoscope.cli.options import CorpusReading, Loading, Reloading
from mnemoscope.cli.stopping import keeping, stopped, tell
from mnemoscope.display import jsonable
from mnemoscope.errors import RunMismatch
from mnemoscope.invocation import command
from mnemoscope.records import Progress

if TYPE_CHECKING:
    from mnemoscope.api import Run
    from mnemoscope.display import Shown
    from mnemoscope.model.model import Model
    from mnemoscope.model.outline import Outline
    from mnemoscope.text.corpus import Corpus

FIRST, EVERY = (
    10.0,
    60.0,
)  # seconds until the first line of a stage that says how long it takes, and between two lines


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Say what happened, as other output does, in place of ending with the code of a difference."""
        raise BrokenPipeError


def stdout() -> Console:
    return _Stdout(highlight=False)


def say(message: str) -> None:
    tell(message)


def print_json(data: Any) -> None:
    """Print data as JSON, in letters that the terminal or file can hold."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(jsonable(data), ensure_ascii=plain, indent=1, default=str))


def print_result(result: Shown, as_json: bool) -> None:
    """Print a result as the terminal shows it, or its data as JSON."""
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(result)


def check_page(path: Path | None) -> None:
    """RunError if the page that was asked for cannot be written there."""
    if path is not None:
        files.check_file(path, "writing the page")


def write_page(result: Shown, path: Path | None) -> None:
    """Write the page if one was asked for: last, so that nothing is lost if the disk filled up meanwhile."""
    if path is not None:
        result.save_page(path)
        say(f"wrote {path}")


def announced(open_page: bool) -> Callable[[str], None]:
    """What says where something is served, and opens it."""

    def ready(address: str) -> None:
        say(f"{address}   (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(address)

    return ready


def load(name: str, loading: Loading) -> Model:
    """The model of that name, loaded and checked."""
    from mnemoscope.model.load import load_model

    with _telling(name) as progress:
        return load_model(name, progress=progress, **asdict(loading))


def load_or_outline(name: str, loading: Loading) -> Model | Outline:
    """The model of that name if its weights are here and fit, or its outline."""
    from mnemoscope.model import outline

    with _telling(name) as progress:
        return outline.load_or_outline(name, progress=progress, **asdict(loading))


@contextmanager
def kept_copies() -> Iterator[None]:
    """Say of what is done in the block what it left in the cache folder: a line for each, once it is there."""
    from mnemoscope.text import cache
    from mnemoscope.views.words import size

    before = {entry.path for entry in cache.entries()}
    yield
    for entry in cache.entries():
        if entry.path not in before:
            say(
                f"kept for the next time: {entry.what} ({size(entry.bytes)}) in {entry.path}; "
                f"{command('cache')} lists and frees it"
            )


def check_run_of(run: Run, model: str) -> None:
    """RunMismatch if a model's configuration says that it is not the one a run was built from.

    Whether the weights are the same the job finds out; this is to spare the loading of a wrong model.
    """
    entry, config = run.manifest.model, _configuration(model)
    names = {"layers": ("num_hidden_layers", "n_layer"), "width": ("hidden_size", "n_embd", "d_model")}
    for fact, keys in names.items():
        value = next((config[key] for key in keys if key in config), None)
        if value not in (None, getattr(entry, fact)):
            raise RunMismatch(
                f"explaining with the run {run.path}: it was built from {entry.id}, with {fact} = "
                f"{getattr(entry, fact)}, and {model} has {value}; give the model it was built from"
            )


def _configuration(model: str) -> dict[str, Any]:
    """What config.json of a model folder says of its text model; nothing where there is none to read."""
    try:
        config = json.loads((files.expanded(model) / "config.json").read_bytes())
        return dict(config.get("text_config") or config)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def model_of(run: Run, again: Reloading, **loading: Any) -> Model:
    """The model that a run was built from, or one that is said to be it."""
    options = asdict(again) | loading
    source = options.pop("model")
    with _telling(source or run.manifest.model.id) as progress:
        return run.load_model(source, progress=progress, **options)


def text_of(name: str, reading: CorpusReading) -> Corpus:
    """The text of that name, fetched if it is behind a URL."""
    from mnemoscope.text.corpus import load_corpus

    with progress_bars() as report:
        return load_corpus(name, report=report, **asdict(reading))


@contextmanager
def _telling(name: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done with a model."""
    with kept_copies(), Console(stderr=True, highlight=False).status(f"{name}: loading") as status:
        yield lambda what: status.update(f"{name}: {what}")


@contextmanager
def building(model: Model, out: str | Path) -> Iterator[Callable[[Progress], None]]:
    """Around the building of a run: how long it takes at least, its progress, and what to do when it is stopped."""
    from mnemoscope.location import place
    from mnemoscope.mine import values
    from mnemoscope.run.remote import work_folder
    from mnemoscope.run.writing import is_finished

    if (minutes := round(values.seconds(model) / 60)) and not is_finished(out):
        say(
            f"{out}: however short the text, reading the values of {model.id} takes about {minutes} min, unless "
            "they are kept from an earlier run"
        )
    with kept_copies(), keeping(work_folder(place(out))), progress_bars() as report:
        yield report


# -- Progress on stderr --------------------------------------------------------------------------------------


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
    """Prints how long a stage takes when it has begun in earnest, and every minute from then on, and when it is
    finished: for logs of jobs without a terminal."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stages: dict[str, _Stage] = {}

    def __call__(self, step: Progress) -> None:
        if step.note:
            say(step.note)
            return
        now = self._now()
        finished = step.done >= step.total > 0
        stage = self._stages.get(step.stage)
        if stage is None or (stage.finished and not finished):  # a job may come to a stage twice
            stage = self._stages[step.stage] = _Stage(now, step.done, now)
        seconds, done = now - stage.begun, step.done - stage.before
        soon = FIRST if done and stage.said == stage.begun else EVERY
        if stage.finished or (not finished and now - stage.said < soon):
            return
        stage.said, stage.finished = now, finished
        of = f" of {step.total:,}" if step.total else ""
        line = f"{step.stage}: {step.done:,}{of} {step.unit}, {_clock(seconds)}"
        if of and done and not finished:
            left = seconds / done * (step.total - step.done)
            line += f", about {_clock(left)} left"
            line += f", {_clock(left + step.after)} until all is done" if step.after else ""
        say(line)


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
            pace, left = bar.tasks[task].speed, bar.tasks[task].time_remaining
            speed = f"{pace:,.0f} {step.unit}/s" if pace and pace >= 1 else step.unit
            if step.after and left:
                speed += f", all in {_clock(left + step.after)}"
            bar.update(task, speed=speed)

        yield report


# -- The application that commands join, and its help: commands in the order of the work -----------------------

ORDER = {
    "Look": (
        "demo",
        "plan",
        "build",
        "merge",
        "show",
        "find",
        "trace",
        "explain",
        "steer",
        "serve",
        "site",
        "mcp",
        "export",
    ),
    "Test": ("patterns", "test", "removal", "verify", "annotate"),
    "Reproduce": ("study", "compare"),
    "Manage": ("push", "pull", "models", "cache"),
}


class Commands(TyperGroup):
    """The commands under the headings of `ORDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of all commands, checked once."""
        door.check(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with stopped(), door.read():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the work."""
        return [name for names in ORDER.values() for name in names if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section of the help for each heading."""
        for heading, names in ORDER.items():
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            width = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section(heading):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands])


app = typer.Typer(
    cls=Commands,
    name="mnemoscope",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mnemoscope {metadata.version('mnemoscope')}")
        raise typer.Exit


@app.callback(epilog="Example: mnemoscope demo")
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The feed-forward memories of a transformer language model: mined, read and shown."""
