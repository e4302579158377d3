"""One prediction taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mnemoscope.cli.options import AsJson, Device, Dtype, ModelName, Revision, Trust
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import load, print_json, say, stdout
from mnemoscope.errors import QueryError

if TYPE_CHECKING:
    from mnemoscope.explanation import Explanation


@app.command(
    epilog='Example: mnemoscope explain gpt2 "The capital of France is" --target " Paris" --foil " London"'
)
def explain(
    model: ModelName,
    prompt: Annotated[str | None, typer.Argument(help="The text before the prediction.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The token to account for; else the model's first choice.")
    ] = None,
    foil: Annotated[list[str] | None, typer.Option(help="What to compare with; may be repeated.")] = None,
    position: Annotated[int, typer.Option(help="Whose prediction, from 0; negative from the end.")] = -1,
    lens: Annotated[str, typer.Option(help="How vectors are read: frozen, own or raw.")] = "frozen",
    top: Annotated[int, typer.Option(help="Parts found for each sign and measure.")] = 20,
    run: Annotated[Path | None, typer.Option(help="Run of this model, for triggers.")] = None,
    ablate: Annotated[int, typer.Option(help="Neurons, and heads, that are really taken out.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="Instead of a prompt: jsonl with prompt, target, foils, label.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Table to write, with --prompts.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """One prediction taken apart: which heads and memories made it, and what switched them on."""
    from mnemoscope.jobs import batch
    from mnemoscope.jobs.explain import explain as job
    from mnemoscope.store import open_run

    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise QueryError("explaining: give either a prompt, or --prompts FILE.jsonl with -o TABLE.parquet")
    options: dict[str, Any] = {
        "lens": lens,
        "top": top,
        "ablate": ablate,
        "run": None if run is None else open_run(run),
    }
    loaded = load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    if prompts and out:
        with progress_bars() as report:
            batch.explain_many(loaded, prompts, out, report=report, **options)
        say(f"wrote {out}")
        return
    with Console(stderr=True, highlight=False).status("explaining") as status:
        report = lambda step: status.update(f"explaining: {step.stage}")  # noqa: E731
        found = job(loaded, prompt or "", target, foil or [], position=position, report=report, **options)
    _show_explanation(found, html, as_json)


def _show_explanation(found: Explanation, html: Path | None, as_json: bool) -> None:
    from mnemoscope.views.explanation import page, terminal

    if html:
        page.write(found, html)
        say(f"wrote {html}")
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(terminal.report(found))
