"""The command line: parse, call, print. What a command answers goes to stdout, everything else to stderr."""

from __future__ import annotations

from mnemoscope.cli import claims, explain, export, runs, serve, studies  # noqa: F401 - each adds its commands to `app`
from mnemoscope.cli.door import answer
from mnemoscope.cli.shared import app


def main() -> None:
    """Entry point."""
    answer(app)
