"""A run in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.cli.options import Limit, Reloading, RunFolder, bundled
from mnemoscope.cli.shared import app, model_of, progress_bars, say


@app.command(epilog="Example: mnemoscope export runs/demo --to neuronpedia --neurons L13N366,L24N1005 -o out")
@bundled
def export(
    run: RunFolder,
    *,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="neuronpedia, openai, delphi, circuitsvis, or graph, of a prediction."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write: a new one, or an empty one.")],
    neurons: Annotated[
        str | None,
        typer.Option(
            help="Addresses with commas between, as L13N366,L24N1005; by default the highlights of the run."
        ),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="All neurons of a layer; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Of a graph: text before the prediction.")] = None,
    target: Annotated[str | None, typer.Option(help="Of a graph: token to account for, by its text.")] = None,
    foil: Annotated[
        list[str] | None, typer.Option(help="Of a graph: token to compare it with; may be repeated.")
    ] = None,
    limit: Limit = None,
    again: Reloading,
) -> None:
    """Write neurons, or the graph of a prediction, in a format that another tool reads."""
    from mnemoscope.api import open_run
    from mnemoscope.exchange import export

    opened = open_run(run)
    given = [] if neurons is None else neurons.split(",")
    made = export.order(
        opened, to, out, neurons=[opened.parse(address) for address in given], layers=layer or [], prompt=prompt,
        target=target, foils=foil or [], limit=limit,
    )  # fmt: skip
    loaded = model_of(opened, again)
    with progress_bars() as report:
        export.export(made, loaded, out, report)
    say(f"wrote {out}; {out / 'README.md'} says what is in it")
