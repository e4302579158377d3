"""Blinded sheets for people, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mnemoscope.cli.options import AsJson, RunFolder
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import print_json, say, stdout


class _OrSheet(TyperGroup):
    """`annotate RUN` is `annotate sheet RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["sheet", *args]
        return super().parse_args(ctx, args)


annotation = typer.Typer(cls=_OrSheet, no_args_is_help=True)

app.add_typer(annotation, name="annotate")

SheetFile = Annotated[Path, typer.Argument(help="Sheet that was filled in.")]

KeyFile = Annotated[Path | None, typer.Option("--key", help="Key of the sheet, if it is not beside it.")]


@annotation.callback(epilog="Example: mnemoscope annotate runs/demo --neurons 40 --out sheet.jsonl")
def annotate() -> None:
    """Make blinded sheets for annotators, and score them. Hidden among the neurons are items that mean nothing."""


@annotation.command(epilog="Example: mnemoscope annotate runs/demo --neurons 40 --out sheet.jsonl")
def sheet(
    run: RunFolder,
    out: Annotated[Path, typer.Option("-o", "--out", help="Sheet to write; its key is written beside it.")],
    neurons: Annotated[int, typer.Option(help="Neurons on the sheet, besides hidden null items.")] = 40,
    prefixes: Annotated[
        int,
        typer.Option(help="Prefixes to annotate for each neuron; as many again to judge."),
    ] = 25,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of what is drawn; by default a new one each time."),
    ] = None,
) -> None:
    """Write a sheet to fill in, and its sealed key. `mnemoscope annotate RUN` does the same."""
    from mnemoscope.api import open_run

    made = open_run(run).annotate(out, neurons=neurons, prefixes=prefixes, seed=seed)
    say(
        f"wrote {made.sheet}: {made.items} items of {made.prefixes} prefixes; keep {made.key} from the annotators"
    )


@annotation.command(epilog="Example: mnemoscope annotate score anna.jsonl ben.jsonl --key sheet.key.json")
def score(
    sheets: Annotated[list[Path], typer.Argument(help="Sheets that were filled in, one for each annotator.")],
    key: KeyFile = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run that the sheets must be of.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hits, false alarms on hidden nulls, and the agreement of several annotators."""
    from mnemoscope import api

    found = api.score(sheets, key=key, run=None if run is None else api.open_run(run))
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(found)


@annotation.command(epilog="Example: mnemoscope annotate export sheet.jsonl L13N366")
def export(
    sheet: SheetFile,
    neuron: Annotated[str, typer.Argument(help="Address of a neuron on the sheet.")],
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """One neuron's prefixes with all that was said of them, once the sheet is filled in."""
    from mnemoscope import api

    found = api.annotated(sheet, neuron, key=key)
    if as_json:
        print_json(found.to_dict()["rows"])
    else:
        stdout().print(found)
