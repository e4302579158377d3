"""Neurons along one's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.arguments import check_least
from mnemoscope.cli.options import AsJson, Loading, Page, Reloading, bundled
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import load, model_of, print_json, say, stdout
from mnemoscope.errors import QueryError


@app.command(epilog='Example: mnemoscope trace runs/demo "The capital of France is" --neuron L24N1005')
@bundled
def trace(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Folder of a finished run, or a model as in build.")
    ],
    text: Annotated[str, typer.Argument(help="Text that the neurons are to see.")],
    *,
    neuron: Annotated[
        list[str] | None,
        typer.Option(help="Address of a neuron to follow along the text, as L13N366; may be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(help="Without --neuron: neurons to list for each token.")] = 5,
    model: Annotated[
        str | None,
        typer.Option(help="Where the run's model is now, if it has moved since the run was built."),
    ] = None,
    html: Page = None,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """See how neurons react to your own text: a given one along it, or the most unusual ones of each token."""
    from mnemoscope import api, files
    from mnemoscope.records import NeuronId
    from mnemoscope.store import is_finished

    check_least("tracing a text", 1, top=top)
    wanted = [NeuronId.parse(address) for address in neuron or []]
    if html is not None:
        files.check_file(html, "writing the page")
    run = api.open_run(source) if is_finished(Path(source)) else None
    if run is None and model is not None:
        raise QueryError(f"tracing a text: {source} is no finished run, and --model is for one; leave it out")
    if run is not None:
        if loading.dtype != "auto" or loading.revision is not None:
            raise QueryError(
                f"tracing a text: {source} is a run, whose model is loaded as it was built; leave out --dtype and "
                "--revision"
            )
        wanted = [run.address(*address) for address in wanted]
        loaded = model_of(run, Reloading(model, loading.device, loading.trust_remote_code))
    else:
        loaded = load(source, loading)
    with progress_bars() as report:
        result = (
            api.trace(loaded, text, wanted, top=top, report=report)
            if run is None
            else run.trace(text, wanted, top=top, model=loaded, report=report)
        )
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(result)
    if html is not None:  # last, so that nothing is lost if the disk filled up meanwhile
        result.save_page(html)
        say(f"wrote {html}")
