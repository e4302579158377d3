"""Claims about neurons: patterns, your own hypothesis, what a trigger loses with a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mnemoscope import files
from mnemoscope.arguments import check_budget, check_least, check_removal, check_sign
from mnemoscope.cli.options import AsJson, Count, Neuron, Reloading, RunFolder, bundled
from mnemoscope.cli.shared import app, model_of, print_json, print_result, progress_bars, say, stdout
from mnemoscope.cli.stopping import keeping


@app.command(epilog="Example: mnemoscope patterns runs/demo")
@bundled
def patterns(
    run: RunFolder,
    *,
    budget: Annotated[
        int, typer.Option(help="Tokens of each half of the text that the model reads.")
    ] = 65_536,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")] = 0,
    count: Count = 10,
    layers: Annotated[bool, typer.Option("--layers", help="Also print the tables of every layer.")] = False,
    cards: Annotated[int, typer.Option(help="Also show so many of these neurons with examples.")] = 0,
    again: Reloading,
    as_json: AsJson = False,
) -> None:
    """Find and test what every neuron detects. Both ways, on text held out, against nulls; kept in the run."""
    check_budget(budget, seed)
    check_least("showing neurons", 0, count=count, cards=cards)
    from mnemoscope.api import open_run
    from mnemoscope.views.patterns import summary

    opened = open_run(run)
    from mnemoscope.trials.job import Settings, estimate, known

    shown = {"count": count, "cards": 0 if as_json else cards}
    settings = Settings(budget, seed)
    if known(opened, settings):
        result = opened.pattern_report(**shown)
    else:
        files.check_folder(opened.folder, "adding to the run")
        minutes = max(1, round(estimate(opened, settings) / 60))
        say(f"{run}: testing patterns; this may take about {minutes} min")
        with keeping(opened.path), progress_bars() as report:
            loaded = model_of(opened, again)
            result = opened.patterns(budget=budget, seed=seed, model=loaded, report=report, **shown)
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(summary(result, layers=layers))


@app.command(epilog="Example: mnemoscope test runs/demo L13N366 --pattern 'regex:\\b(19|20)\\d\\d$'")
@bundled
def test(
    run: RunFolder,
    neuron: Neuron,
    *,
    pattern: Annotated[
        str,
        typer.Option(
            help="What the neuron is said to detect: year, date, regex:..., words:may,june, suffix:..., file:PATH ..."
        ),
    ],
    sign: Annotated[
        str | None, typer.Option(help="Sign of the coefficient, + or -; by default the one that fits better.")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Tokens of each half of the text that the model reads.")
    ] = 16_384,
    seed: Annotated[int, typer.Option(help="Seed of which documents are read.")] = 0,
    again: Reloading,
    as_json: AsJson = False,
) -> None:
    """Test your own claim about a neuron. Both ways, on text that no pattern was found in."""
    check_sign(sign)
    check_budget(budget, seed)
    from mnemoscope.api import open_run
    from mnemoscope.patterns import language
    from mnemoscope.patterns.pattern import parse

    opened = open_run(run)
    address = opened.parse(neuron)
    wanted = language.check(parse(pattern))
    loaded = model_of(opened, again)
    with progress_bars() as report:
        result = opened.test(
            address, wanted, sign=sign, budget=budget, seed=seed, model=loaded, report=report
        )
    print_result(result, as_json)


@app.command(epilog="Example: mnemoscope removal runs/demo --documents 100")
@bundled
def removal(
    run: RunFolder,
    *,
    documents: Annotated[int, typer.Option(help="Documents to sample; the time grows with them.")] = 200,
    per_layer: Annotated[int, typer.Option(help="Triggers to test in each layer, at most.")] = 1000,
    triggers: Annotated[
        int, typer.Option(help="Strongest triggers of each neuron and sign that may be tested.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Seed of which documents, triggers and tokens are drawn.")] = 0,
    again: Reloading,
    as_json: AsJson = False,
) -> None:
    """Measure what triggers lose without a token: the first, the last or a random one; kept in the run."""
    from mnemoscope.api import open_run

    check_removal(documents, per_layer, triggers, seed)
    opened = open_run(run)
    files.check_folder(opened.folder, "adding to the run")
    loaded = model_of(opened, again)
    sizes = {"documents": documents, "per_layer": per_layer, "triggers": triggers, "seed": seed}
    with progress_bars() as report:
        result = opened.removal(**sizes, model=loaded, report=report)
    print_result(result, as_json)


# -- Blinded sheets for people, and their scores ---------------------------------------------------------------


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
    run: Annotated[
        str | None, typer.Option(help="Folder or URL of the run that the sheets must be of.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hits, false alarms on hidden nulls, and the agreement of several annotators."""
    from mnemoscope import api

    print_result(api.score(sheets, key=key, run=None if run is None else api.open_run(run)), as_json)


@annotation.command(epilog="Example: mnemoscope annotate export sheet.jsonl L13N366")
def export(
    sheet: SheetFile,
    neuron: Annotated[str, typer.Argument(help="Address of a neuron on the sheet.")],
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """One neuron's prefixes with all that was said of them, once the sheet is filled in."""
    from mnemoscope import api

    annotated = api.annotated(sheet, neuron, key=key)
    if as_json:
        print_json(annotated.to_dict()["rows"])
    else:
        stdout().print(annotated)
