"""Claims about neurons: patterns, your own hypothesis, what a trigger loses with a token."""

from __future__ import annotations

from typing import Annotated

import typer

from mnemoscope import files
from mnemoscope.arguments import check_budget, check_least, check_removal, check_sign
from mnemoscope.cli.door import keeping
from mnemoscope.cli.options import AsJson, Count, Neuron, Reloading, RunFolder, bundled
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import model_of, print_json, say, stdout
from mnemoscope.records import NeuronId


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
    check_budget(budget)
    check_least("showing neurons", 0, count=count, cards=cards)
    from mnemoscope.api import open_run
    from mnemoscope.views import patterns as view

    opened = open_run(run)
    from mnemoscope.jobs.patterns import Settings, estimate, known

    shown = {"count": count, "cards": 0 if as_json else cards}
    settings = Settings(budget, seed)
    if known(opened, settings):
        result = opened.pattern_report(**shown)
    else:
        files.check_folder(opened.path, "adding to the run")
        minutes = max(1, round(estimate(opened, settings) / 60))
        say(f"{run}: testing patterns; this may take about {minutes} min")
        with keeping(opened.path), progress_bars() as report:
            loaded = model_of(opened, again)
            result = opened.patterns(budget=budget, seed=seed, model=loaded, report=report, **shown)
    if as_json:
        print_json(result.to_dict())
    else:
        cards_of = (result.clearest, result.silent)
        stdout().print(view.summary(result.summary, result.labels, *cards_of, layers=layers))


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
    check_budget(budget)
    from mnemoscope.api import open_run
    from mnemoscope.patterns import foreign
    from mnemoscope.patterns.pattern import parse

    opened = open_run(run)
    address = opened.address(*NeuronId.parse(neuron))
    wanted = foreign.check(parse(pattern))
    loaded = model_of(opened, again)
    with progress_bars() as report:
        result = opened.test(
            address, wanted, sign=sign, budget=budget, seed=seed, model=loaded, report=report
        )
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(result)


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

    check_removal(documents, per_layer, triggers)
    opened = open_run(run)
    files.check_folder(opened.path, "adding to the run")
    loaded = model_of(opened, again)
    sizes = {"documents": documents, "per_layer": per_layer, "triggers": triggers, "seed": seed}
    with progress_bars() as report:
        found = opened.removal(**sizes, model=loaded, report=report)
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(found)
