"""The figures and tables of the papers, for one run or two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemoscope.cli.options import AsJson, Device, Dtype, Revision, RunFolder, Trust
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import build_run, load, print_json, say, stdout
from mnemoscope.errors import QueryError

if TYPE_CHECKING:
    from mnemoscope.models import Model
    from mnemoscope.store import Run

FAST_TOKENS = 40_000  # of a study in ten minutes


@app.command(epilog="Example: mnemoscope study sample:smollm2-135m sample:wikipedia -o runs/study --fast")
def study(
    model: Annotated[str | None, typer.Argument(help="As in build; not needed if all is measured.")] = None,
    corpus: Annotated[str | None, typer.Argument(help="As in build; not needed for a finished run.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the run; goes on where it stopped.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Measurements by name, with commas between.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Small samples, for a first look.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="What there is, with cost and state.")] = False,
    positions: Annotated[int | None, typer.Option(help="Prefixes of refinement and composition.")] = None,
    sentences: Annotated[int | None, typer.Option(help="Prefixes of the contributions.")] = None,
    seed: Annotated[int, typer.Option(help="Which prefixes.")] = 0,
    shuffled: Annotated[
        bool,
        typer.Option(
            "--shuffled",
            help="Refinement and composition also of a copy of the model whose weights are shuffled, and in a new run "
            "neurons of it, to compare with: twice the time.",
        ),
    ] = False,
    questions: Annotated[
        list[Path] | None, typer.Option(help="jsonl of subject, prompt, answer, label; may be repeated.")
    ] = None,
    segment: Annotated[
        str, typer.Option(help="What is a context: document, sentence or window.")
    ] = "document",
    limit: Annotated[int | None, typer.Option(help="Read at most this many tokens.")] = None,
    report: Annotated[Path | None, typer.Option(help="The page; else report.html in the run.")] = None,
    workers: Annotated[int, typer.Option(help="Processes for the build.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Every figure and table of the study: build the run if need be, measure what is missing, write the report."""
    from dataclasses import replace

    from mnemoscope.jobs.study import catalogue
    from mnemoscope.jobs.study.positions import Sizes
    from mnemoscope.store import is_finished, open_run

    sizes = Sizes(seed=seed, questions=tuple(questions or ()), shuffled=shuffled)
    sizes = sizes.fast() if fast else sizes
    sizes = replace(sizes, positions=positions or sizes.positions, sentences=sentences or sizes.sentences)
    chosen = catalogue.choose(only)
    found = open_run(out) if out is not None and is_finished(out) else None
    if listed:
        _list_study(chosen, found, sizes, as_json)
        return
    if out is None:
        raise QueryError("studying: there is no folder for the run; give one with -o RUN")
    loading = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    loaded = None
    if found is None:
        from mnemoscope import nulls
        from mnemoscope.corpus import load_corpus

        if model is None or corpus is None:
            raise QueryError(f"studying: {out} holds no finished run; give MODEL and CORPUS to build it")
        limit = limit or (FAST_TOKENS if fast else None)
        source = load_corpus(corpus, segment=segment, limit=limit)
        loaded = load(model, dtype=dtype, **loading)
        kinds = nulls.KINDS if shuffled else nulls.DEFAULT
        found = build_run(loaded, source, out, nulls=kinds, workers=workers)
    if any(one.job and one.state(found, sizes) != "ready" for one in chosen):
        entry = found.manifest.model
        loading["revision"] = revision or entry.revision
        loaded = loaded or load(model or entry.id, dtype=found.manifest.options["dtype"], **loading)
        found = _measure(found, loaded, chosen, sizes)
    sections = [one.section(found) for one in chosen]
    _report_study(found, sections, report or out / "report.html", as_json)


@app.command(epilog="Example: mnemoscope compare runs/a runs/b --report compare.html")
def compare(
    one: RunFolder,
    two: RunFolder,
    only: Annotated[str | None, typer.Option(help="Measurements by name, with commas between.")] = None,
    report: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Two runs side by side: the study's figures of both, and how stable each neuron's triggers are."""
    from mnemoscope.analyses.study import stability
    from mnemoscope.analyses.study.finding import Section
    from mnemoscope.jobs.study import catalogue
    from mnemoscope.store import open_run

    runs = [open_run(path) for path in (one, two)]
    names = [path.name for path in (one, two)] if one.name != two.name else [f"1: {one}", f"2: {two}"]
    sections = []
    try:
        found = stability.findings(*runs)
        sections.append(Section("stability", "Are they the same neurons?", tuple(found)))
    except QueryError as error:
        sections.append(Section("stability", "Are they the same neurons?", (), str(error)))
    for measurement in catalogue.choose(only):
        both = [measurement.section(run) for run in runs]
        lost = "; ".join(
            f"{name}: {part.missing}" for name, part in zip(names, both, strict=True) if part.missing
        )
        joined = stability.side_by_side(names, [part.findings for part in both])
        sections.append(Section(measurement.name, measurement.title, tuple(joined), lost))
    _report_study(runs[0], sections, report, as_json, beside=runs[1], title=f"{names[0]} and {names[1]}")


def _list_study(chosen: Any, run: Run | None, sizes: Any, as_json: bool) -> None:
    """What there is to measure, what it costs and whether the run has it."""
    from mnemoscope.views.study import text

    facts = ("name", "title", "items", "minutes", "passes", "seconds")
    rows = [
        {name: getattr(one, name) for name in facts}
        | {"adds": list(one.tables), "state": one.state(run, sizes)}
        for one in chosen
    ]
    if as_json:
        print_json(rows)
    else:
        stdout().print(text.listing(rows))


def _measure(run: Run, model: Model, chosen: Any, sizes: Any) -> Run:
    from mnemoscope.jobs.study import run as job

    seconds = job.estimate(run, model, chosen, sizes)
    say(f"{run.path}: measuring; this may take about {max(1, round(seconds / 60))} min")
    with progress_bars() as report:
        skip = lambda one, error: say(f"{one.name} was left out: {error}")  # noqa: E731
        return job.measure(run, model, chosen=chosen, sizes=sizes, report=report, skip=skip)


def _report_study(
    run: Run, sections: Any, path: Path, as_json: bool, beside: Run | None = None, title: str = ""
) -> None:
    from mnemoscope.analyses.study.items import items
    from mnemoscope.views.study import report, text

    with progress_bars() as progress:
        listed = () if beside else items()
        report.write(run, sections, path, beside=beside, title=title, items=listed, progress=progress)
    say(f"wrote {path}, and figures and tables in {path.stem}_files beside it")
    if as_json:
        print_json([finding.to_dict() for section in sections for finding in section.findings])
    else:
        stdout().print(text.findings(sections))
