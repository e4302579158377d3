"""The command line: parse, call, print. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.records import NeuronId, Progress

if TYPE_CHECKING:
    from mnemoscope.explanation import Explanation
    from mnemoscope.models import Model
    from mnemoscope.store import Run

app = typer.Typer(
    name="mnemoscope",
    help="The feed-forward memories of a transformer language model: mined, read and shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
families = typer.Typer(help="Model families known, and whether a given model can be taken apart.")
app.add_typer(families, name="models")

SAMPLE_MODEL, SAMPLE_TEXT = "sample:smollm2-135m", "sample:wikipedia"
DEMO_TOKENS = 250_000
# Without native bf16 the same pass takes seven times as long; a demo should not take a quarter of an hour.
DEMO_TOKENS_SLOW = 60_000

ModelName = Annotated[
    str, typer.Argument(help="Hugging Face id, folder, .gguf file, or sample:smollm2-135m.")
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON on stdout.")]
Dtype = Annotated[
    str, typer.Option(help="auto (bf16 where the processor has it, else fp32), fp32, bf16, fp16.")
]
Device = Annotated[str, typer.Option(help="auto (CUDA when there is one), cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model carries.")]


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except MnemoscopeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"mnemoscope: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("mnemoscope: interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


@app.command(epilog="Example: mnemoscope demo -o runs/demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("runs/demo"),
    tokens: Annotated[int | None, typer.Option(help="How much of the sample text to read.")] = None,
) -> None:
    """Build a run of the sample model over the sample text, and show what it found."""
    from mnemoscope.corpus import load_corpus
    from mnemoscope.models import native_bf16

    if tokens is None:
        tokens = DEMO_TOKENS if native_bf16() else DEMO_TOKENS_SLOW
        if tokens < DEMO_TOKENS:
            _say(
                f"This processor has no native bf16, so the demo reads {tokens:,} tokens in fp32 "
                f"(--tokens {DEMO_TOKENS} reads as much as on one that has)."
            )
    model = _load(SAMPLE_MODEL)
    run = _build(model, load_corpus(SAMPLE_TEXT, limit=tokens), out)
    page = out / "gallery.html"
    _overview(run, page)
    _next_steps(run, page)


@app.command(epilog="Example: mnemoscope build gpt2 --corpus wikitext.txt -o runs/gpt2")
def build(
    model: ModelName,
    corpus: Annotated[
        str, typer.Option(help="File, folder, glob, Hugging Face data set, or sample:wikipedia.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run; an unfinished one goes on.")],
    segment: Annotated[
        str, typer.Option(help="What is a context: document, sentence or window.")
    ] = "document",
    limit: Annotated[int | None, typer.Option(help="Read at most this many tokens.")] = None,
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    top: Annotated[int, typer.Option(help="Triggers kept for each neuron and polarity.")] = 50,
    workers: Annotated[int, typer.Option(help="Processes; the result is the same for any number.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Run a corpus through a model once and keep every neuron's triggers, distribution and value."""
    from mnemoscope.corpus import load_corpus

    source = load_corpus(corpus, segment=segment, limit=limit, text=text)
    loaded = _load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    run = _build(loaded, source, out, top=top, workers=workers)
    if as_json:
        _print_json(run.manifest.model_dump())
    else:
        _say(f"{out}: finished. Look at it with: mnemoscope show {out}")


@app.command(epilog="Example: mnemoscope show runs/demo L13N366")
def show(
    run: RunFolder,
    neuron: Annotated[str | None, typer.Argument(help="L13N366, 13.366, 13/366 or 13_366.")] = None,
    triggers: Annotated[int, typer.Option(help="Triggers shown for each polarity.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    as_json: AsJson = False,
) -> None:
    """One neuron (triggers both ways, distribution, value both ways), or without one the run's highlights."""
    from mnemoscope.store import open_run

    opened = open_run(run)
    if neuron is None:
        _overview(opened, html, as_json)
        return
    from mnemoscope.analyses.neuron import card
    from mnemoscope.views import html as pages
    from mnemoscope.views import text

    found = card(opened, NeuronId.parse(neuron), examples=triggers)
    if html:
        pages.write(found, html)
        _say(f"wrote {html}")
    if as_json:
        _print_json(found.to_dict())
    else:
        _out().print(text.card(found, triggers=triggers))


@app.command(epilog='Example: mnemoscope find runs/demo --promotes " Paris"')
def find(
    run: RunFolder,
    promotes: Annotated[str | None, typer.Option(help="A token that the value promotes.")] = None,
    suppresses: Annotated[str | None, typer.Option(help="A token that the value suppresses.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Text that the triggers end with.")] = None,
    sort: Annotated[str | None, typer.Option(help="A statistic: kurtosis, max, min, skewness, ...")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first, for --sort.")] = False,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="How many neurons.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Neurons by value token, by trigger text or by statistics."""
    from mnemoscope.analyses import search
    from mnemoscope.store import open_run
    from mnemoscope.views import text

    asked = {"promotes": promotes, "suppresses": suppresses, "trigger": trigger, "sort": sort}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise QueryError(
            f"finding neurons: {len(given)} questions were asked ({', '.join(given) or 'none'}); ask exactly one of "
            "--promotes, --suppresses, --trigger, --sort"
        )
    name, value = given.popitem()
    options: dict[str, Any] = {"layer": layer, "count": count}
    if name == "sort":
        options["descending"] = not ascending
    found = getattr(search, name)(open_run(run), value, **options)
    if as_json:
        _print_json(found.to_dict())
    else:
        _out().print(text.found(found))


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
    loaded = _load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    if prompts and out:
        with _progress() as report:
            batch.explain_many(loaded, prompts, out, report=report, **options)
        _say(f"wrote {out}")
        return
    with Console(stderr=True, highlight=False).status("explaining") as status:
        report = lambda step: status.update(f"explaining: {step.stage}")  # noqa: E731
        found = job(loaded, prompt or "", target, foil or [], position=position, report=report, **options)
    _show_explanation(found, html, as_json)


@app.command(epilog="Example: mnemoscope verify runs/demo --sample 500")
def verify(
    run: RunFolder,
    sample: Annotated[int, typer.Option(help="Neurons whose values are read again.")] = 500,
    seed: Annotated[int, typer.Option(help="Which neurons and which shard.")] = 0,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if not where it was.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Recompute stored coefficients, moments and values from the model; exit with 1 if something differs."""
    from mnemoscope.jobs.verify import verify as check
    from mnemoscope.store import open_run
    from mnemoscope.views import text

    opened = open_run(run)
    entry, options = opened.manifest.model, opened.manifest.options
    loaded = _load(model or entry.id, dtype=options["dtype"], device=device, revision=entry.revision)
    with _progress() as report:
        result = check(opened, loaded, sample=sample, seed=seed, report=report)
    if as_json:
        _print_json(result.to_dict())
    else:
        _out().print(text.verification(result))
    raise typer.Exit(0 if result.passed else 1)


@families.callback(invoke_without_command=True, epilog="Example: mnemoscope models")
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the model families that are known."""
    if context.invoked_subcommand:
        return
    from mnemoscope.anatomy import FAMILIES
    from mnemoscope.views import text

    if as_json:
        _print_json(sorted(FAMILIES))
    else:
        _out().print(text.families(sorted(FAMILIES)))


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

    loaded = _load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    facts = loaded.entry().model_dump() | {"known_family": loaded.anatomy.known, "dtype": loaded.dtype}
    if as_json:
        _print_json(facts)
    else:
        _out().print(text.anatomy(facts))


# -- what the commands share -----------------------------------------------------------------------------------


def _out() -> Console:
    return Console(highlight=False)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def _load(name: str, **options: Any) -> Model:
    from mnemoscope.models import load_model

    console = Console(stderr=True, highlight=False)
    with console.status(f"{name}: loading") as status:
        return load_model(name, progress=lambda what: status.update(f"{name}: {what}"), **options)


def _build(model: Model, corpus: Any, out: Path, **options: Any) -> Run:
    from mnemoscope.jobs.build import build as run_build

    with _progress() as report:
        return run_build(model, corpus, out, report=report, **options)


def _show_explanation(found: Explanation, html: Path | None, as_json: bool) -> None:
    from mnemoscope.views.explanation import page, terminal

    if html:
        page.write(found, html)
        _say(f"wrote {html}")
    if as_json:
        _print_json(found.to_dict())
    else:
        _out().print(terminal.report(found))


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Draw progress on stderr: one bar a stage, with speed and time left."""
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=60) as bar:
        tasks: dict[str, Any] = {}

        def report(step: Progress) -> None:
            if step.stage not in tasks:
                # What was done before (a resumed run) must not count as speed.
                tasks[step.stage] = bar.add_task(
                    step.stage, total=step.total, completed=step.done, speed=step.unit
                )
            task = tasks[step.stage]
            bar.update(task, completed=step.done, total=step.total)
            pace = bar.tasks[task].speed
            bar.update(task, speed=f"{pace:,.0f} {step.unit}/s" if pace and pace >= 1 else step.unit)

        yield report


def _overview(run: Run, page: Path | None, as_json: bool = False) -> None:
    """Highlights in the terminal; the gallery as a page when one is wanted."""
    from mnemoscope.analyses import striking
    from mnemoscope.analyses.neuron import card
    from mnemoscope.views import gallery, text

    picks = striking.choose(run)
    cards = [card(run, pick.id) for pick in picks]
    if as_json:
        _print_json([pick.to_dict() | found.to_dict() for pick, found in zip(picks, cards, strict=True)])
    else:
        console = _out()
        console.print(text.heading(run))
        for pick, found in zip(picks, cards, strict=True):
            console.print()
            console.print(text.card(found, triggers=4, pick=pick))
    if page:
        with _progress() as report:
            gallery.write(run, page, progress=report)
        _say(f"wrote {page}")


def _next_steps(run: Run, page: Path) -> None:
    folder = page.parent
    _out().print(
        f"\nThe gallery: {page.resolve().as_uri()}\n\nTry next:\n"
        f"  mnemoscope show {folder} L13N366\n"
        f'  mnemoscope find {folder} --promotes " Paris"\n'
        f"  mnemoscope find {folder} --sort kurtosis\n"
        f"  mnemoscope verify {folder} --sample 500\n",
        markup=False,
    )
