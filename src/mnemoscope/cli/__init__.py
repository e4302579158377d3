"""The command line: parse, call, print. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

# isort: off - commands join in the order of the help
from mnemoscope.cli import annotation, claims, families, predictions, runs, studies  # noqa: F401
from mnemoscope.cli.root import app
from mnemoscope.errors import MnemoscopeError

# isort: on


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except MnemoscopeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"mnemoscope: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("mnemoscope: interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
