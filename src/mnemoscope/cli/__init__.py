"""The command line: parse, call, print. What a command answers goes to stdout, everything else to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnemoscope.cli.stopping import stoppable

if TYPE_CHECKING:
    from mnemoscope.cli.shared import app as app


def main() -> None:
    """Entry point."""
    with stoppable():
        from mnemoscope import cli
        from mnemoscope.cli.door import answer

        answer(cli.app)


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: that takes a moment, in which Ctrl-C may come.
    if name != "app":
        raise AttributeError(f"module 'mnemoscope.cli' has no attribute {name!r}")
    from mnemoscope.cli import claims, explain, export, runs, serve, studies  # noqa: F401 - each adds its commands
    from mnemoscope.cli.shared import app

    return app
