"""What is kept on this machine between runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mnemoscope.cli.options import AsJson
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import print_json, stdout


@app.command(epilog="Example: mnemoscope cache --clear --kind values")
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Free what is listed; all can be made again.")
    ] = False,
    kind: Annotated[str | None, typer.Option(help="Only this kind: model, text, gguf or values.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is kept between runs, with its size, or free it."""
    from mnemoscope import cache as kept
    from mnemoscope.samples import cache_folder
    from mnemoscope.views import text

    found = kept.clear(kind) if clear else kept.entries(kind)
    if as_json:
        print_json(
            {"folder": str(cache_folder()), "freed": clear, "entries": [entry.to_dict() for entry in found]}
        )
    else:
        stdout().print(text.kept(found, cache_folder(), freed=clear))
