"""Models: the families that are known, and whether one can be taken apart."""

from __future__ import annotations

import typer

from mnemoscope.cli.options import AsJson, Device, Dtype, ModelName, Revision, Trust
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import load, print_json, stdout

families = typer.Typer(help="Model families known, and whether a given model can be taken apart.")

app.add_typer(families, name="models")


@families.callback(invoke_without_command=True, epilog="Example: mnemoscope models")
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the model families that are known."""
    if context.invoked_subcommand:
        return
    from mnemoscope.anatomy import FAMILIES
    from mnemoscope.views import text

    if as_json:
        print_json(sorted(FAMILIES))
    else:
        stdout().print(text.families(sorted(FAMILIES)))


@families.command(epilog="Example: mnemoscope models check sample:smollm2-135m")
def check(
    model: ModelName,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Load a model and say what the self-check found: do its parts add up to its logits?"""
    from mnemoscope.views import text

    loaded = load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    facts = loaded.entry().model_dump() | {"known_family": loaded.anatomy.known, "dtype": loaded.dtype}
    if as_json:
        print_json(facts)
    else:
        stdout().print(text.anatomy(facts))
