"""One prediction taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mnemoscope import files
from mnemoscope.arguments import check_explanation, check_question
from mnemoscope.cli.options import AsJson, Loading, ModelName, Page, bundled
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import check_run_of, load, print_json, say, stdout
from mnemoscope.errors import QueryError

if TYPE_CHECKING:
    from mnemoscope.explanation import Explanation


@app.command(
    epilog='Example: mnemoscope explain gpt2 "The capital of France is" --target " Paris" --foil " London"'
)
@bundled
def explain(
    model: ModelName,
    prompt: Annotated[str | None, typer.Argument(help="Text before the prediction.")] = None,
    *,
    target: Annotated[
        str | None,
        typer.Option(help="Token to account for, by its text; by default the model's first choice."),
    ] = None,
    foil: Annotated[list[str] | None, typer.Option(help="Token to compare it with; may be repeated.")] = None,
    target_id: Annotated[int | None, typer.Option(help="Token to account for, by its id.")] = None,
    foil_id: Annotated[list[int] | None, typer.Option(help="Token to compare it with, by its id.")] = None,
    position: Annotated[
        int, typer.Option(help="Position of the prediction, from 0; negative counts from the end.")
    ] = -1,
    lens: Annotated[str, typer.Option(help="How vectors are read: frozen, own or raw.")] = "frozen",
    top: Annotated[int, typer.Option(help="Parts to list for each sign and measure.")] = 20,
    run: Annotated[Path | None, typer.Option(help="Folder of a run of this model, for triggers.")] = None,
    ablate: Annotated[int, typer.Option(help="Neurons, and as many heads, to really take out.")] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of many prompts instead of one: jsonl of prompt, target, foils, label."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Table to write for --prompts.")] = None,
    html: Page = None,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Take one prediction apart into heads and neurons, exactly, and say what switched those on."""
    from mnemoscope import api

    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise QueryError("explaining: give either a prompt, or --prompts FILE.jsonl with -o TABLE.parquet")
    check_explanation(lens, top, ablate)
    if html is not None:
        files.check_file(html, "writing the page")
    opened = None if run is None else api.open_run(run)
    if opened is not None:
        check_run_of(opened, model)
    options: dict[str, Any] = {"lens": lens, "top": top, "ablate": ablate, "run": opened}
    if prompts is not None and out is not None:
        _explain_many(model, loading, prompts, out, options)
        return
    check_question(prompt or "", target, foil or [], target_id)
    loaded = load(model, loading)
    with Console(stderr=True, highlight=False).status("explaining") as status:
        report = lambda step: status.update(f"explaining: {step.stage}")  # noqa: E731
        options |= {"target_id": target_id, "foil_ids": foil_id or [], "position": position}
        found = api.explain(loaded, prompt or "", target, foil or [], report=report, **options)
    _show_explanation(found, html, as_json)


def _explain_many(model: str, loading: Loading, prompts: Path, out: Path, options: dict[str, Any]) -> None:
    from mnemoscope import api
    from mnemoscope.jobs.prompts import check_table, read_prompts

    read_prompts(prompts)
    check_table(out, prompts)
    loaded = load(model, loading)
    with progress_bars() as report:
        api.explain_many(loaded, prompts, out, report=report, **options)
    say(f"wrote {out}")


def _show_explanation(found: Explanation, html: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(found)
    if html:  # last, so that nothing is lost if the disk filled up meanwhile
        found.save_page(html)
        say(f"wrote {html}")
