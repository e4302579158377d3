"""The figures and tables of the papers, for one run or two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemoscope import files
from mnemoscope.arguments import check_build, check_neurons, check_study
from mnemoscope.cli.options import (
    AsJson,
    CorpusName,
    CorpusReading,
    Loading,
    Only,
    Workers,
    bundled,
)
from mnemoscope.cli.shared import (
    app,
    building,
    load,
    model_of,
    print_json,
    progress_bars,
    say,
    stdout,
    text_of,
)
from mnemoscope.cli.stopping import keeping
from mnemoscope.errors import QueryError
from mnemoscope.location import local, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mnemoscope.api import Run
    from mnemoscope.model.model import Model
    from mnemoscope.results import StudyReport
    from mnemoscope.studies.catalogue import Measurement
    from mnemoscope.studies.measures.positions import Sizes


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
    reading: CorpusReading,
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
    from mnemoscope import api
    from mnemoscope.run.writing import check_place, is_finished
    from mnemoscope.studies import catalogue
    from mnemoscope.views import report

    check_study(positions, sentences, seed)
    check_neurons(loading.units, "studying")
    check_build(1, (), workers)
    sampling: dict[str, Any] = {
        "fast": fast, "positions": positions, "sentences": sentences, "seed": seed, "shuffled": shuffled,
        "questions": questions or (),
    }  # fmt: skip
    sizes = api.study_sizes(**sampling)
    chosen = catalogue.choose(only)
    out = None if out is None else local(place(out), "studying")
    run = api.open_run(out) if out is not None and is_finished(out) else None
    if listed:
        _list(api.measurements(run, sizes, only=only), as_json, codes)
        return
    if out is None:
        raise QueryError("studying: there is no folder for the run; give one with -o RUN")
    sizes.to_dict()  # reads the files of questions
    if run is None:
        check_place(out)
    else:
        files.check_folder(out, "studying in")
    if html is not None or run is not None:
        report.check(html or out / "report.html")
    loaded = None
    if run is None:
        from mnemoscope.model import nulls

        if model is None or corpus is None:
            raise QueryError(f"studying: {out} holds no finished run; give MODEL and --corpus to build it")
        if fast and reading.limit is None:
            reading = replace(reading, limit=api.FAST_TOKENS)
        source = text_of(corpus, reading)
        loaded = load(model, loading)
        kinds = (*nulls.DEFAULT, "shuffled") if shuffled else nulls.DEFAULT
        with building(loaded, out) as progress:
            run = api.build(loaded, source, out, nulls=kinds, workers=workers, report=progress)
    if not any(each.lacks(run, sizes) for each in chosen):
        result = run.study(only=only, **sampling)
    else:
        again = loading.again(model)
        pinned = {} if loading.revision is None else {"revision": loading.revision}
        loaded = loaded or model_of(run, again, **pinned)
        _say_price(run, loaded, chosen, sizes)
        with keeping(out), progress_bars() as progress:
            result = run.study(only=only, **sampling, model=loaded, report=progress)
    _report(result, html or out / "report.html", as_json, codes=codes)


@app.command(epilog="Example: mnemoscope compare runs/a runs/b --html compare.html")
def compare(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="RUNS", help="Folders or URLs of two finished runs or more, in their order."),
    ],
    only: Only = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Load the models, too, and say of each neuron what changed: its key, its value, its coefficients on "
            "the same text.",
        ),
    ] = False,
    html: Annotated[Path, typer.Option(help="Page to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Compare runs, figure by figure, and say how stable each neuron's triggers are from each to the next."""
    from mnemoscope import api
    from mnemoscope.views import report

    runs = [api.open_run(path) for path in folders]
    report.check(html)
    with progress_bars() as progress:
        result = api.compare(*runs, only=only, weights=weights, report=progress)
    _report(result, html, as_json)


def _list(measurements: list[dict[str, Any]], as_json: bool, codes: bool) -> None:
    """What there is to measure, what it costs and whether the run has it."""
    from mnemoscope.views import findings

    if as_json:
        print_json(measurements)
    else:
        stdout().print(findings.listing(measurements, items=codes))


def _say_price(run: Run, model: Model, chosen: Sequence[Measurement], sizes: Sizes) -> None:
    from mnemoscope.studies.run import estimate

    seconds = estimate(run, model, chosen, sizes)
    say(f"{run.path}: measuring; this may take about {max(1, round(seconds / 60))} min")


def _report(result: StudyReport, page: Path, as_json: bool, *, codes: bool = False) -> None:
    """Write the page of all that there is; print the findings that were asked for."""
    from mnemoscope.views import findings, report

    with progress_bars() as progress:
        result.save_page(page, report=progress)
    say(f"wrote {page}, and figures and tables in {report.folder_of(page).name} beside it")
    if as_json:
        print_json(result.to_dict()["findings"])
    else:
        stdout().print(findings.findings(result.sections, items=codes))
