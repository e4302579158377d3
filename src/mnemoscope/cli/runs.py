"""Runs: build one, look at it, search it, verify it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemoscope.cli.options import AsJson, Device, Dtype, ModelName, Moved, Revision, RunFolder, Trust
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import build_run, load, model_of, print_json, say, stdout
from mnemoscope.errors import QueryError
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.store import Run


SAMPLE_MODEL, SAMPLE_TEXT = "sample:smollm2-135m", "sample:wikipedia"

# What two cores read in a little under three minutes: with tiles of bf16, with native bf16, and in fp32.
DEMO_TOKENS, DEMO_TOKENS_BF16, DEMO_TOKENS_FP32 = 250_000, 65_000, 40_000


@app.command(epilog="Example: mnemoscope demo -o runs/demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("runs/demo"),
    tokens: Annotated[int | None, typer.Option(help="How much of the sample text to read.")] = None,
) -> None:
    """Build a run of the sample model over the sample text, and show what it found."""
    from mnemoscope.corpus import load_corpus
    from mnemoscope.models import native_bf16, tiles

    if tokens is None:
        slower = DEMO_TOKENS_BF16 if native_bf16() else DEMO_TOKENS_FP32
        tokens = DEMO_TOKENS if tiles() else slower
        if tokens < DEMO_TOKENS:
            say(
                f"This processor multiplies no tiles of bf16, so that the demo reads {tokens:,} tokens "
                f"(--tokens {DEMO_TOKENS} reads as much as on one that does)."
            )
    model = load(SAMPLE_MODEL)
    run = build_run(model, load_corpus(SAMPLE_TEXT, limit=tokens), out)
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
    nulls: Annotated[
        str,
        typer.Option(
            help="Units that mean nothing, mined beside the neurons to compare with: random, rotated and shuffled, "
            "by commas, or none. With shuffled a second model runs: twice the time and memory."
        ),
    ] = "random,rotated",
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
    loaded = load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    kinds = [] if nulls == "none" else [kind.strip() for kind in nulls.split(",")]
    run = build_run(loaded, source, out, top=top, nulls=kinds, workers=workers)
    if as_json:
        print_json(run.manifest.model_dump())
    else:
        say(f"{out}: finished. Look at it with: mnemoscope show {out}")


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
        say(f"wrote {html}")
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(text.card(found, triggers=triggers))


@app.command(epilog='Example: mnemoscope find runs/demo --promotes " Paris"')
def find(
    run: RunFolder,
    promotes: Annotated[str | None, typer.Option(help="A token that the value promotes.")] = None,
    suppresses: Annotated[str | None, typer.Option(help="A token that the value suppresses.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Text that the triggers end with.")] = None,
    pattern: Annotated[str | None, typer.Option(help="A word of the name of a tested pattern.")] = None,
    sort: Annotated[str | None, typer.Option(help="A statistic: kurtosis, max, min, skewness, ...")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first, for --sort.")] = False,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="How many neurons.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Neurons by value token, by trigger text, by pattern or by statistics."""
    from mnemoscope.analyses import search
    from mnemoscope.store import open_run
    from mnemoscope.views import text

    asked = {
        "promotes": promotes,
        "suppresses": suppresses,
        "trigger": trigger,
        "pattern": pattern,
        "sort": sort,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise QueryError(
            f"finding neurons: {len(given)} questions were asked ({', '.join(given) or 'none'}); ask exactly one of "
            "--promotes, --suppresses, --trigger, --pattern, --sort"
        )
    name, value = given.popitem()
    options: dict[str, Any] = {"layer": layer, "count": count}
    if name == "sort":
        options["descending"] = not ascending
    found = getattr(search, name)(open_run(run), value, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        stdout().print(text.found(found))


@app.command(epilog="Example: mnemoscope verify runs/demo --sample 500")
def verify(
    run: RunFolder,
    sample: Annotated[int, typer.Option(help="Neurons whose values are read again.")] = 500,
    seed: Annotated[int, typer.Option(help="Which neurons and which shard.")] = 0,
    model: Moved = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Recompute stored coefficients, moments and values from the model; exit with 1 if something differs."""
    from mnemoscope.jobs.verify import verify as check
    from mnemoscope.store import open_run
    from mnemoscope.views import text

    opened = open_run(run)
    loaded = model_of(opened, model, device)
    with progress_bars() as report:
        result = check(opened, loaded, sample=sample, seed=seed, report=report)
    if as_json:
        print_json(result.to_dict())
    else:
        stdout().print(text.verification(result))
    raise typer.Exit(0 if result.passed else 1)


def _overview(run: Run, page: Path | None, as_json: bool = False) -> None:
    """Highlights in the terminal; the gallery as a page when one is wanted."""
    from mnemoscope.analyses import striking
    from mnemoscope.analyses.neuron import card
    from mnemoscope.views import gallery, text

    picks = striking.choose(run)
    cards = [card(run, pick.id) for pick in picks]
    if as_json:
        print_json([pick.to_dict() | found.to_dict() for pick, found in zip(picks, cards, strict=True)])
    else:
        console = stdout()
        console.print(text.heading(run))
        for pick, found in zip(picks, cards, strict=True):
            console.print()
            console.print(text.card(found, triggers=4, pick=pick))
    if page:
        with progress_bars() as report:
            gallery.write(run, page, progress=report)
        say(f"wrote {page}")


def _next_steps(run: Run, page: Path) -> None:
    folder = page.parent
    stdout().print(
        f"\nThe gallery: {page.resolve().as_uri()}\n\nTry next:\n"
        f"  mnemoscope show {folder} L13N366\n"
        f'  mnemoscope find {folder} --promotes " Paris"\n'
        f"  mnemoscope find {folder} --sort kurtosis\n"
        f"  mnemoscope verify {folder} --sample 500\n",
        markup=False,
    )
