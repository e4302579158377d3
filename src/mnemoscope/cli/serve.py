"""A run in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.cli.shared import announced, app


@app.command(epilog="Example: mnemoscope serve runs/demo")
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    model: Annotated[
        str | None, typer.Option(help="Where to load the model from, if not from where the run's came.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8321,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; if others than this machine can reach it, the printed address holds a secret."
        ),
    ] = "127.0.0.1",
    annotations: Annotated[
        Path | None,
        typer.Option(help="Folder for notes and answers written in the browser, instead of beside each run."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve runs to the browser of this machine: every neuron, search, and questions to the model."""
    from mnemoscope import api

    api.serve(*runs, model=model, host=host, port=port, annotations=annotations, ready=announced(open_page))


@app.command(epilog="Example: mnemoscope mcp runs/demo")
def mcp(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Where to load the model from, to explain predictions too; without it, only reading."
        ),
    ] = None,
) -> None:
    """Answer an assistant's questions about a run (Model Context Protocol, over standard input and output)."""
    from mnemoscope import api

    api.assist(run, model)
