"""Models: the families that are known, and whether one can be taken apart."""

from __future__ import annotations

import typer

from mnemoscope.cli.options import AsJson, Loading, ModelName, bundled
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import load, print_json, stdout

families = typer.Typer(help="List the model families, or check a model.")

app.add_typer(families, name="models")


@families.callback(invoke_without_command=True, epilog="Example: mnemoscope models")
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the model families that are known, or check whether a model can be taken apart."""
    if context.invoked_subcommand:
        return
    from mnemoscope import api
    from mnemoscope.views import text

    known = api.families()
    if as_json:
        print_json(known)
    else:
        stdout().print(text.families(known))


@families.command(epilog="Example: mnemoscope models check sample:smollm2-135m")
@bundled
def check(
    model: ModelName,
    *,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Load a model and say what the self-check found: do its parts add up to its logits?"""
    from mnemoscope import api

    facts = api.check(load(model, loading))
    if as_json:
        print_json(facts.to_dict())
    else:
        stdout().print(facts)
