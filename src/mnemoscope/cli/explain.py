"""A text of one's own: its prediction taken apart, neurons along it, and what a model writes with one changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mnemoscope.arguments import check_explanation, check_least, check_question
from mnemoscope.cli.options import AsJson, Loading, ModelName, Neuron, Page, Reloading, RunFolder, bundled
from mnemoscope.cli.shared import (
    Lines,
    app,
    check_page,
    check_run_of,
    load,
    model_of,
    print_result,
    progress_bars,
    say,
    write_page,
)
from mnemoscope.errors import QueryError
from mnemoscope.files import check_file
from mnemoscope.records import Progress


@app.command(
    epilog='Example: mnemoscope explain gpt2 "The capital of France is" --target " Paris" --foil " London"'
)
@bundled
def explain(
    model: ModelName,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text before the prediction; for an encoder all of it, with one mask token; for an encoder-decoder "
            "what its encoder reads."
        ),
    ] = None,
    *,
    target: Annotated[
        str | None,
        typer.Option(help="Token to account for, by its text; by default the model's first choice."),
    ] = None,
    foil: Annotated[list[str] | None, typer.Option(help="Token to compare it with; may be repeated.")] = None,
    target_id: Annotated[int | None, typer.Option(help="Token to account for, by its id.")] = None,
    foil_id: Annotated[list[int] | None, typer.Option(help="Token to compare it with, by its id.")] = None,
    decoder_prompt: Annotated[
        str, typer.Option(help="For an encoder-decoder: what its decoder has written so far.")
    ] = "",
    position: Annotated[
        int, typer.Option(help="Position of the prediction, from 0; negative counts from the end.")
    ] = -1,
    lens: Annotated[str, typer.Option(help="How vectors are read: frozen, own or raw.")] = "frozen",
    projection: Annotated[
        str,
        typer.Option(help="How vectors meet tokens in a model with an adaptive softmax: adaptive or flat."),
    ] = "adaptive",
    top: Annotated[int, typer.Option(help="Parts to list for each sign and measure.")] = 20,
    run: Annotated[
        str | None, typer.Option(help="Folder or URL of a run of this model, for triggers.")
    ] = None,
    ablate: Annotated[int, typer.Option(help="Neurons, and as many heads, to really take out.")] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of many prompts instead of one: jsonl of prompt, target, foils, label."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Table to write for --prompts.")] = None,
    html: Page = None,
    graph: Annotated[
        Path | None, typer.Option(help="Also write an attribution graph, for Neuronpedia and its viewers.")
    ] = None,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Take one prediction apart into heads and neurons, exactly, and say what switched those on."""
    from mnemoscope import api

    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise QueryError("explaining: give either a prompt, or --prompts FILE.jsonl with -o TABLE.parquet")
    for name, file in (("html", html), ("graph", graph)):
        if prompts is not None and file is not None:
            raise QueryError(
                f"explaining: {{{name}}} is of one prediction; leave it out with {{prompts}}",
                **{name: ..., "prompts": ...},
            )
    check_explanation(lens, top, ablate, projection=projection)
    check_page(html)
    if graph is not None:
        check_file(graph, "writing the graph")
    opened = None if run is None else api.open_run(run)
    if opened is not None:
        check_run_of(opened, model)
    options: dict[str, Any] = {
        "lens": lens, "projection": projection, "top": top, "ablate": ablate, "run": opened
    }  # fmt: skip
    if prompts is not None and out is not None:
        _explain_many(model, loading, prompts, out, options)
        return
    check_question(prompt or "", target, foil or [], target_id)
    loaded = load(model, loading)
    with Console(stderr=True, highlight=False).status("explaining") as status:
        lines = Lines()

        def report(step: Progress) -> None:
            status.update(f"explaining: {step.stage}")
            if step.unit == "parts" and step.done < step.total:
                lines(step)

        options |= {"target_id": target_id, "foil_ids": foil_id or [], "position": position}
        options["decoder_prompt"] = decoder_prompt
        explanation = api.explain(loaded, prompt or "", target, foil or [], report=report, **options)
    print_result(explanation, as_json)
    write_page(explanation, html)
    if graph is not None:
        api.write_graph(explanation, graph)
        say(f"wrote {graph}")


def _explain_many(model: str, loading: Loading, prompts: Path, out: Path, options: dict[str, Any]) -> None:
    from mnemoscope import api
    from mnemoscope.prediction.prompts import check_table, read_prompts

    read_prompts(prompts)
    check_table(out, prompts)
    loaded = load(model, loading)
    with progress_bars() as report:
        api.explain_many(loaded, prompts, out, report=report, **options)
    say(f"wrote {out}")


# -- Neurons along one's own text ------------------------------------------------------------------------------


@app.command(epilog='Example: mnemoscope trace runs/demo "The capital of France is" --neuron L24N1005')
@bundled
def trace(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="Folder or URL of a finished run, or a model as in build."
        ),
    ],
    text: Annotated[str, typer.Argument(help="Text that the neurons are to see.")],
    *,
    decoder_prompt: Annotated[
        str, typer.Option(help="For an encoder-decoder: what its decoder has written so far.")
    ] = "",
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
    from mnemoscope import api
    from mnemoscope.records import check_address
    from mnemoscope.run.writing import is_finished

    check_least("tracing a text", 1, top=top)
    for address in neuron or []:
        check_address(address)
    check_page(html)
    run = api.open_run(source) if is_finished(source) else None
    if run is None and model is not None:
        raise QueryError(f"tracing a text: {source} is no finished run, and --model is for one; leave it out")
    if run is not None:
        if loading.dtype != "auto" or loading.revision is not None:
            raise QueryError(
                f"tracing a text: {source} is a run, whose model is loaded as it was built; leave out --dtype and "
                "--revision"
            )
        for address in neuron or []:
            run.parse(address)
        loaded = model_of(run, loading.again(model))
    else:
        loaded = load(source, loading)
    options: dict[str, Any] = {"decoder_prompt": decoder_prompt, "top": top}
    with progress_bars() as report:
        result = (
            api.trace(loaded, text, neuron, **options, report=report)
            if run is None
            else run.trace(text, neuron, **options, model=loaded, report=report)
        )
    print_result(result, as_json)
    write_page(result, html)


# -- What is written with a neuron changed ---------------------------------------------------------------------


@app.command(epilog='Example: mnemoscope steer runs/demo L24N1005 "The capital of France is" --factor -2')
@bundled
def steer(
    run: RunFolder,
    neuron: Neuron,
    prompt: Annotated[str, typer.Argument(help="Text that the model goes on with.")],
    *,
    factor: Annotated[
        float, typer.Option(help="What the coefficient is multiplied with; 0 removes the neuron.")
    ] = 0.0,
    value: Annotated[float, typer.Option(help="What is added to it afterwards.")] = 0.0,
    length: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the other neuron of the layer to compare with.")] = 0,
    html: Page = None,
    again: Reloading,
    as_json: AsJson = False,
) -> None:
    """Let the model write with a neuron removed, scaled or set, beside what it writes as it is."""
    from mnemoscope.api import open_run
    from mnemoscope.prediction.steered import check_change

    check_change(factor, value, length, seed)
    check_page(html)
    opened = open_run(run)
    address, loaded = opened.parse(neuron), model_of(opened, again)
    change: dict[str, Any] = {"factor": factor, "value": value, "length": length, "seed": seed}
    with progress_bars() as report:
        result = opened.steer(prompt, address, **change, model=loaded, report=report)
    print_result(result, as_json)
    write_page(result, html)
