"""The command line: parse, call, print. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

from mnemoscope.cli import annotation, cache, claims, families, predictions, runs, studies, trace  # noqa: F401
from mnemoscope.cli.door import answer
from mnemoscope.cli.root import app


def main() -> None:
    """Entry point."""
    answer(app)
