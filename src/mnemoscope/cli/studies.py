"""The figures and tables of the papers, for one run or two."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemoscope import files
from mnemoscope.arguments import check_build, check_study
from mnemoscope.cli.door import keeping
from mnemoscope.cli.options import (
    AsJson,
    CorpusName,
    Loading,
    Only,
    Reading,
    Reloading,
    RunFolder,
    Workers,
    bundled,
)
from mnemoscope.cli.progress import progress_bars
from mnemoscope.cli.root import app
from mnemoscope.cli.shared import build_run, load, model_of, print_json, say, stdout
from mnemoscope.errors import QueryError

if TYPE_CHECKING:
    from mnemoscope.models import Model
    from mnemoscope.store import Run

FAST_TOKENS = 40_000  # of a study in ten minutes


@app.command(
    epilog="Example: mnemoscope study sample:smollm2-135m --corpus sample:wikipedia -o runs/study --fast"
)
@bundled
def study(
    model: Annotated[
        str | None, typer.Argument(help="Model as in build; not needed once everything is measured.")
    ] = None,
    *,
    corpus: Annotated[str | None, CorpusName] = None,
    reading: Reading,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the run; an unfinished study in it goes on.")
    ] = None,
    only: Only = None,
    fast: Annotated[bool, typer.Option("--fast", help="Use small samples, for a first look.")] = False,
    codes: Annotated[
        bool, typer.Option("--items", help="Say which items of the papers, A1 to A80, each finding answers.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="List the measurements with their cost and state, and stop.")
    ] = False,
    positions: Annotated[
        int | None, typer.Option(help="Prefixes for the measurements refinement and composition.")
    ] = None,
    sentences: Annotated[int | None, typer.Option(help="Prefixes for the contributions.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of which prefixes are drawn.")] = 0,
    shuffled: Annotated[
        bool,
        typer.Option(
            "--shuffled",
            help="Measure refinement and composition in a copy of the model with shuffled weights, too, and mine its "
            "neurons in a new run, at twice the time.",
        ),
    ] = False,
    questions: Annotated[
        list[Path] | None,
        typer.Option(help="File of questions, jsonl of subject, prompt, answer, label."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page to write; by default report.html in the folder of the run.")
    ] = None,
    workers: Workers = 1,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Measure every figure of the study, and write the report. Builds the run if need be; measures what is missing."""
    from mnemoscope.jobs.study import catalogue
    from mnemoscope.jobs.study.positions import Sizes
    from mnemoscope.store import check_place, is_finished, open_run

    check_study(positions, sentences)
    check_build(1, (), workers)
    sizes = Sizes(seed=seed, questions=tuple(questions or ()), shuffled=shuffled)
    sizes = sizes.fast() if fast else sizes
    sizes = replace(sizes, positions=positions or sizes.positions, sentences=sentences or sizes.sentences)
    chosen = catalogue.choose(only)
    found = open_run(out) if out is not None and is_finished(out) else None
    if listed:
        _list_study(chosen, found, sizes, as_json, codes)
        return
    if out is None:
        raise QueryError("studying: there is no folder for the run; give one with -o RUN")
    sizes.to_dict()  # reads the files of questions
    if found is None:
        check_place(out)
    else:
        files.check_folder(out, "studying in")
    if html is not None:
        _check_report(html)
    loaded = None
    if found is None:
        from mnemoscope import nulls
        from mnemoscope.corpus import load_corpus

        if model is None or corpus is None:
            raise QueryError(f"studying: {out} holds no finished run; give MODEL and --corpus to build it")
        if fast and reading.limit is None:
            reading = replace(reading, limit=FAST_TOKENS)
        source = load_corpus(corpus, **asdict(reading))
        loaded = load(model, loading)
        kinds = nulls.KINDS if shuffled else nulls.DEFAULT
        found = build_run(loaded, source, out, nulls=kinds, workers=workers)
    if any(one.job and one.state(found, sizes) != "ready" for one in chosen):
        again = Reloading(model, loading.device, loading.trust_remote_code)
        given = {} if loading.revision is None else {"revision": loading.revision}
        loaded = loaded or model_of(found, again, **given)
        found = _measure(found, loaded, chosen, sizes)
    # The report shows all that the run has, whatever was measured now; the terminal what was asked for.
    sections = {one.name: one.section(found) for one in catalogue.CATALOGUE}
    asked = [sections[one.name] for one in chosen]
    _report_study(
        found, list(sections.values()), html or out / "report.html", as_json, said=asked, codes=codes
    )


@app.command(epilog="Example: mnemoscope compare runs/a runs/b --html compare.html")
def compare(
    one: RunFolder,
    two: RunFolder,
    only: Only = None,
    html: Annotated[Path, typer.Option(help="Page to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Compare two runs, figure by figure, and say how stable each neuron's triggers are."""
    from mnemoscope.analyses.study import stability
    from mnemoscope.analyses.study.finding import Section
    from mnemoscope.jobs.study import catalogue
    from mnemoscope.store import open_run

    runs = [open_run(path) for path in (one, two)]
    _check_report(html)
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
    _report_study(runs[0], sections, html, as_json, beside=runs[1], title=f"{names[0]} and {names[1]}")


def _check_report(page: Path) -> None:
    doing = "writing the report"
    files.make_folder_of(page, doing)
    files.check_file(page, doing)


def _list_study(chosen: Any, run: Run | None, sizes: Any, as_json: bool, codes: bool) -> None:
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
        stdout().print(text.listing(rows, items=codes))


def _measure(run: Run, model: Model, chosen: Any, sizes: Any) -> Run:
    from mnemoscope.jobs.study import run as job

    seconds = job.estimate(run, model, chosen, sizes)
    say(f"{run.path}: measuring; this may take about {max(1, round(seconds / 60))} min")
    with keeping(run.path), progress_bars() as report:
        skip = lambda one, error: say(f"{one.name} was left out: {error}")  # noqa: E731
        return job.measure(run, model, chosen=chosen, sizes=sizes, report=report, skip=skip)


def _report_study(
    run: Run,
    sections: Any,
    path: Path,
    as_json: bool,
    *,
    beside: Run | None = None,
    title: str = "",
    said: Any = None,
    codes: bool = False,
) -> None:
    """Write the page; print the findings of `said`, or of all sections."""
    from mnemoscope.analyses.study.items import items
    from mnemoscope.views.study import report, text

    with progress_bars() as progress:
        listed = () if beside else items()
        report.write(run, sections, path, beside=beside, title=title, items=listed, progress=progress)
    say(f"wrote {path}, and figures and tables in {path.stem}_files beside it")
    if as_json:
        print_json([finding.to_dict() for section in said or sections for finding in section.findings])
    else:
        stdout().print(text.findings(said or sections, items=codes))
