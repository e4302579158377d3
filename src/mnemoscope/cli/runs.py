"""Runs: build one, look at it, search it, verify it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemoscope.arguments import check_build, check_least, check_verification, parse_part
from mnemoscope.cli.options import (
    ADDRESS,
    AsJson,
    CorpusName,
    CorpusReading,
    Count,
    Limit,
    Loading,
    Miners,
    ModelName,
    Page,
    Reloading,
    RunFolder,
    Workers,
    bundled,
)
from mnemoscope.cli.shared import (
    announced,
    app,
    building,
    check_page,
    keeping,
    kept_copies,
    load,
    load_or_outline,
    model_of,
    print_json,
    print_result,
    progress_bars,
    say,
    stdout,
    text_of,
    write_page,
)
from mnemoscope.errors import RunError
from mnemoscope.files import expanded
from mnemoscope.invocation import command
from mnemoscope.location import local, place

if TYPE_CHECKING:
    from mnemoscope.api import Run


@app.command(epilog="Example: mnemoscope demo -o runs/demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("runs/demo"),
    limit: Limit = None,
    serve: Annotated[bool, typer.Option("--serve", help="Open the run in the browser at the end.")] = False,
) -> None:
    """Build a run of the sample model, and show what it found. The model and its text are fetched once."""
    from mnemoscope import api
    from mnemoscope.run.writing import check_place
    from mnemoscope.text.corpus import load_corpus

    if limit is not None:
        check_least("building a run", 1, limit=limit)
    out = local(place(out), "building the demo in")
    check_place(out)
    if limit is None:
        limit = api.demo_tokens()
        if limit < api.DEMO_TOKENS:
            say(
                f"This processor multiplies no tiles of bf16, so that the demo reads {limit:,} tokens "
                f"(--limit {api.DEMO_TOKENS} reads as much as on one that does)."
            )
    model = load(api.SAMPLE_MODEL, Loading())
    corpus = load_corpus(api.SAMPLE_TEXT, limit=limit)
    with building(model, out) as report:
        run = api.build(model, corpus, out, report=report)
    page = out / "gallery.html"
    _overview(run, page)
    _next_steps(run, page)
    if serve:
        api.serve(run, ready=announced(open_page=True))


@app.command(epilog="Example: mnemoscope build gpt2 --corpus wikitext.txt -o runs/gpt2")
@bundled
def build(
    model: ModelName,
    *,
    corpus: Annotated[str, CorpusName],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            help="Folder of the run, or a URL to upload it to; an unfinished build of it goes on.",
        ),
    ],
    reading: CorpusReading,
    top: Annotated[int, typer.Option(help="Triggers to keep for each neuron and sign.")] = 50,
    nulls: Annotated[
        str,
        typer.Option(
            help="Units that mean nothing, mined beside the neurons to compare them with, with commas between, or "
            "none: random and rotated, 64 in each layer; shuffled, 64 neurons of a second model, at twice the time and "
            "memory; chimera and covariance, a decoy for every neuron, so that patterns can be told with a bound on "
            "false discoveries."
        ),
    ] = "random,rotated",
    mining: Miners,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Mine one part of so many (3/16: the fourth), beside other processes with the same folder, on this "
            "machine or others; `mnemoscope merge` makes the run of all."
        ),
    ] = None,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Run a text through a model, and keep what every neuron does: its triggers, distribution and value."""
    from mnemoscope import api
    from mnemoscope.run.writing import check_place

    kinds = [] if nulls == "none" else [kind.strip() for kind in nulls.split(",")]
    check_build(top, kinds, mining.workers)
    portion = None if shard is None else parse_part(shard)
    if portion is not None and mining.engine != "processes":
        raise RunError(
            "building a run: {shard} is for a queue outside of this program, and {engine} has its own; give one",
            shard=shard,
            engine=mining.engine,
        )
    check_place(out)
    source = text_of(corpus, reading)
    loaded = load(model, loading)
    if portion is not None:
        with kept_copies(), keeping(expanded(out)), progress_bars() as report:
            api.build_part(
                loaded, source, out, portion, top=top, nulls=kinds, workers=mining.workers, report=report
            )
        say(f"{out}: part {shard} is mined. When all are: {command('merge', out)}")
        return
    with building(loaded, out) as report:
        run = api.build(loaded, source, out, top=top, nulls=kinds, report=report, **asdict(mining))
    if as_json:
        print_json(run.manifest.model_dump())
    else:
        say(f"{out}: finished. Look at it with: {command('show', out)}")


@app.command(epilog="Example: mnemoscope plan gpt2 --corpus wikitext.txt --limit 1000000")
@bundled
def plan(
    model: ModelName,
    *,
    corpus: Annotated[str, CorpusName],
    out: Annotated[
        str, typer.Option("-o", "--out", help="Where the run is to be; its disk is looked at.")
    ] = ".",
    reading: CorpusReading,
    top: Annotated[int, typer.Option(help="Triggers to keep for each neuron and sign.")] = 50,
    nulls: Annotated[str, typer.Option(help="Units that mean nothing, as in build.")] = "random,rotated",
    workers: Workers = 1,
    devices: Annotated[
        int | None,
        typer.Option(
            help="How many devices there are such as the one that is tried, each with so many workers; those given if "
            "none."
        ),
    ] = None,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Say what a build would take, from a few seconds of it: time by stage, memory, disk, and what does not fit. No
    weights are downloaded: where they are not here, layers with random ones are tried.
    """
    from mnemoscope import api

    kinds = [] if nulls == "none" else [kind.strip() for kind in nulls.split(",")]
    check_build(top, kinds, workers)
    source = text_of(corpus, reading)
    loaded = load_or_outline(model, loading)
    with progress_bars() as report:
        result = api.plan(
            loaded, source, out, top=top, nulls=kinds, workers=workers, devices=devices, report=report
        )
    print_result(result, as_json)


@app.command(epilog="Example: mnemoscope merge runs/llama")
@bundled
def merge(
    run: Annotated[Path, typer.Argument(help="Folder in which all parts were mined.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="Where to load the model from, if not from where the parts had theirs.")
    ] = None,
    loading: Loading,
) -> None:
    """Make the run of parts that several processes mined (build --shard)."""
    from mnemoscope import api

    loaded = None if model is None else load(model, loading)
    with kept_copies(), keeping(run), progress_bars() as report:
        api.merge(run, loaded, report=report)
    say(f"{run}: finished. Look at it with: {command('show', run)}")


@app.command(epilog="Example: mnemoscope push runs/llama s3://bucket/runs/llama")
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    url: Annotated[str, typer.Argument(help="Where to: s3://bucket/run, gs://, hf://datasets/user/run ...")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run of another model or text that is there.")
    ] = False,
) -> None:
    """Upload a run. Until the last moment what was there is there still; an interrupted upload goes on."""
    from mnemoscope import api

    with progress_bars() as report:
        opened = api.push(run, url, overwrite=overwrite, report=report)
    say(f"{opened.path}: uploaded. Look at it with: {command('show', url)}")


@app.command(epilog="Example: mnemoscope pull s3://bucket/runs/llama runs/llama")
def pull(
    url: Annotated[
        str, typer.Argument(help="Where a run is: s3://bucket/run, gs://, hf://datasets/user/run ...")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to bring it to, new or empty.")],
) -> None:
    """Bring a run to this machine, every byte compared with its manifest; an interrupted one goes on."""
    from mnemoscope import api

    with keeping(folder), progress_bars() as report:
        api.pull(url, folder, report=report)
    say(f"{folder}: finished. Look at it with: {command('show', folder)}")


@app.command(epilog="Example: mnemoscope show runs/demo L13N366")
def show(
    run: RunFolder,
    neuron: Annotated[str | None, typer.Argument(help=ADDRESS)] = None,
    triggers: Annotated[int, typer.Option(help="Triggers to show for each sign.")] = 10,
    html: Page = None,
    as_json: AsJson = False,
) -> None:
    """Show one neuron, or the highlights of a run. A neuron: triggers and value both ways, and distribution."""
    from mnemoscope.api import open_run
    from mnemoscope.views.card import card

    check_least("showing a neuron", 0, triggers=triggers)
    opened = open_run(run)
    if neuron is None:
        _overview(opened, html, as_json)
        return
    check_page(html)
    chosen = opened.neuron(neuron, examples=triggers)
    if as_json:
        print_json(chosen.to_dict())
    else:
        stdout().print(card(chosen, triggers=triggers))
    write_page(chosen, html)


@app.command(epilog='Example: mnemoscope find runs/demo --promotes " Paris"')
def find(
    run: RunFolder,
    promotes: Annotated[str | None, typer.Option(help="Token that the neuron promotes.")] = None,
    suppresses: Annotated[str | None, typer.Option(help="Token that the neuron suppresses.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Text at the end of triggers.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Part of the name of a tested pattern.")] = None,
    like: Annotated[
        str | None, typer.Option(help="Neuron, such as L13N366, whose triggers are shared.")
    ] = None,
    tested: Annotated[
        bool, typer.Option("--tested", help="Neurons whose tested pattern has a verdict, clearest first.")
    ] = False,
    sort: Annotated[
        str | None, typer.Option(help="Statistic to sort by: kurtosis, max, min, skewness ...")
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Sort the smallest first.")] = False,
    layer: Annotated[int | None, typer.Option(help="Only neurons of this layer.")] = None,
    count: Count = 20,
    as_json: AsJson = False,
) -> None:
    """Find neurons by value, trigger, pattern or statistic."""
    from mnemoscope.api import open_run

    neurons = open_run(run).find(
        promotes=promotes, suppresses=suppresses, trigger=trigger, pattern=pattern, like=like, tested=tested,
        sort=sort, ascending=ascending, layer=layer, count=count,
    )  # fmt: skip
    print_result(neurons, as_json)


@app.command(epilog="Example: mnemoscope verify runs/demo --sample 500")
@bundled
def verify(
    run: RunFolder,
    *,
    sample: Annotated[int, typer.Option(help="Neurons whose values are read again.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of which neurons and which shard are checked.")] = 0,
    again: Reloading,
    as_json: AsJson = False,
) -> None:
    """Recompute parts of a run, and say what differs; then the exit code is 1."""
    from mnemoscope.api import open_run

    check_verification(sample, seed)
    opened = open_run(run)
    loaded = model_of(opened, again)
    with progress_bars() as report:
        result = opened.verify(sample=sample, seed=seed, model=loaded, report=report)
    print_result(result, as_json)
    raise typer.Exit(0 if result.passed else 1)


def _overview(run: Run, page: Path | None, as_json: bool = False) -> None:
    """Highlights in the terminal; the gallery as a page when one is wanted."""
    from mnemoscope.views import gallery

    if page:
        gallery.check(page)
    highlights = run.highlights()
    if as_json:
        print_json(highlights.to_dict()["neurons"])
    else:
        stdout().print(highlights)
    if page:
        with progress_bars() as report:
            run.gallery(page, report=report)
        say(f"wrote {page}")


def _next_steps(run: Run, page: Path) -> None:
    folder = page.parent
    stdout().print(
        f"\nThe gallery: {page.resolve().as_uri()}\n\nTry next:\n"
        f"  {command('show', folder, 'L13N366')}\n"
        f"  {command('find', folder, '--promotes', ' Paris')}\n"
        f"  {command('find', folder, '--sort', 'kurtosis')}\n"
        f"  {command('verify', folder, '--sample', '500')}\n\n"
        f"All of it in the browser, with questions to the model:\n  {command('serve', folder)}\n",
        markup=False,
        soft_wrap=True,
    )


# -- Models: the families that are known, and whether one can be taken apart -----------------------------------

families = typer.Typer(help="List the model families, or check a model.")

app.add_typer(families, name="models")


@families.callback(invoke_without_command=True, epilog="Example: mnemoscope models")
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the model families that can be taken apart, and why others cannot, or check a model."""
    if context.invoked_subcommand:
        return
    from mnemoscope import api
    from mnemoscope.views import answers

    known = api.families()
    if as_json:
        print_json([row._asdict() for row in known])
    else:
        stdout().print(answers.families(known))


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
    print_result(facts, as_json)


# -- What is kept on this machine between runs -----------------------------------------------------------------


@app.command(epilog="Example: mnemoscope cache --clear --kind values")
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Free what is listed; all can be made again.")
    ] = False,
    kind: Annotated[
        str | None, typer.Option(help="Only this kind: model, text, gguf, values, places, parts or work.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is kept between runs, with its size, or free it."""
    from mnemoscope.files import cache_folder
    from mnemoscope.text.cache import clear as free
    from mnemoscope.text.cache import entries
    from mnemoscope.views import answers

    kept = free(kind) if clear else entries(kind)
    if as_json:
        print_json(
            {"folder": str(cache_folder()), "freed": clear, "entries": [entry.to_dict() for entry in kept]}
        )
    else:
        stdout().print(answers.kept(kept, cache_folder(), freed=clear))
