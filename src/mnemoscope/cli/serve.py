"""A run in the browser, or as a folder of pages."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.cli.options import AsJson, RunFolder, Workers
from mnemoscope.cli.shared import Lines, announced, app, print_json, progress_bars, say
from mnemoscope.errors import RunError
from mnemoscope.invocation import command


@app.command(epilog="Example: mnemoscope serve runs/demo")
def serve(
    runs: Annotated[list[str] | None, typer.Argument(help="Folders or URLs of finished runs.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where to load the model from, if not from where the run's came.")
    ] = None,
    static: Annotated[
        Path | None, typer.Option(help="Serve this folder, written by `site`, and no runs.", metavar="FOLDER")
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
    workers: Workers = 1,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve runs to the browser of this machine: every neuron, search, and questions to the model."""
    with _beginning() as begun:
        from mnemoscope import api

        if bool(runs) == (static is not None) or (static is not None and model is not None):
            raise RunError(
                "serving: give folders of runs, or --static with one folder that `mnemoscope site` wrote"
            )
        announce = announced(open_page)

        def ready(address: str) -> None:
            begun()
            announce(address)

        if static is not None:
            api.serve_folder(static, host=host, port=port, ready=ready)
            return
        api.serve(
            *runs or (),
            model=model,
            host=host,
            port=port,
            annotations=annotations,
            workers=workers,
            ready=ready,
            report=Lines(),
        )


@contextmanager
def _beginning() -> Iterator[Callable[[], None]]:
    """Look for no garbage until what is handed out is called: nearly all that is made by then stays, and to look
    through it again and again takes a tenth of the time until the first page. Later it is left aside."""

    def begun() -> None:
        gc.freeze()
        gc.enable()

    gc.disable()
    try:
        yield begun
    finally:
        gc.enable()


@app.command(epilog="Example: mnemoscope site runs/demo -o site")
def site(
    run: RunFolder,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Write a run as a folder of pages for any web server: layers, every neuron, search by token, the study."""
    from mnemoscope import api
    from mnemoscope.views.words import size

    with progress_bars() as report:
        written = api.site(run, out, workers=workers, report=report)
    if as_json:
        print_json(vars(written) | {"path": str(written.path)})
        return
    say(
        f"{out}: {written.files:,} files, {size(written.bytes)}; a neuron is read as one part of at most "
        f"{size(written.largest)}. Look at it with: {command('serve', '--static', out)}"
    )


@app.command(epilog="Example: mnemoscope mcp runs/demo")
def mcp(
    run: RunFolder,
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
