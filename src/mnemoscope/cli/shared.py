"""What the commands share: loading, printing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from mnemoscope.cli.options import Loading, Reloading
from mnemoscope.cli.progress import progress_bars

if TYPE_CHECKING:
    from mnemoscope.models import Model
    from mnemoscope.store import Run


def stdout() -> Console:
    return Console(highlight=False)


def say(message: str) -> None:
    typer.echo(message, err=True)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def load(name: str, loading: Loading) -> Model:
    """The model of that name, loaded and checked."""
    return _load(name, asdict(loading))


def _load(name: str, options: dict[str, Any]) -> Model:
    from mnemoscope.models import load_model

    console = Console(stderr=True, highlight=False)
    with console.status(f"{name}: loading") as status:
        return load_model(name, progress=lambda what: status.update(f"{name}: {what}"), **options)


def model_of(run: Run, again: Reloading) -> Model:
    """The model that a run was built from, or one that is said to be it."""
    entry, options = run.manifest.model, asdict(again)
    built = {"dtype": run.manifest.options["dtype"], "revision": entry.revision}
    return _load(options.pop("model") or entry.id, options | built)


def build_run(model: Model, corpus: Any, out: Path, **options: Any) -> Run:
    from mnemoscope.jobs.build import build as run_build

    with progress_bars() as report:
        return run_build(model, corpus, out, report=report, **options)
