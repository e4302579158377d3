"""The report of a study: one page that opens from disk, and beside it every figure and table as files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from mnemoscope import files
from mnemoscope.records import Progress
from mnemoscope.studies.findings.finding import Item
from mnemoscope.views.charts import as_file, placed, rendered
from mnemoscope.views.figures import chart
from mnemoscope.views.page import environment
from mnemoscope.views.words import number

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run
    from mnemoscope.studies.findings.finding import Finding, Section

_DOING = "writing the report"
ROWS = 12  # of a table that are on the page; the files hold all
ROWS_BARE = 40  # of a table without a figure


@dataclass(frozen=True)
class DrawnFinding:
    """A finding made ready for the page: its figure, the first rows of its table, its files."""

    finding: Finding
    picture: Markup | None
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # columns of numbers
    left: int  # rows that are not on the page
    files: tuple[tuple[str, str], ...]  # kind, address from the page


@dataclass(frozen=True)
class ItemAnswer:
    """An item of the papers: what this page shows of it, or else how it stands, and the command for this run."""

    id: str
    title: str
    why: str
    findings: tuple[Finding, ...]
    state: str
    command: str


def write(
    run: Run,
    sections: Sequence[Section],
    path: str | Path,
    *,
    beside: Sequence[Run] = (),
    title: str = "",
    items: Sequence[Item] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write the report of a run, or of several that are compared (`beside`), to an .html file, and figures (SVG, PDF)
    and tables (CSV, Parquet) to a folder beside it.

    The folder is named like the file, with `_files` for `.html`. RunError if they cannot be written.
    """
    path = files.expanded(path)
    check(path)
    folder = folder_of(path)
    with files.refusals(f"{_DOING} {path}"):
        folder.mkdir(exist_ok=True)
        text = render(run, sections, folder, beside=beside, title=title, items=items, progress=progress)
    files.write(path, text, _DOING)
    return path


def folder_of(path: Path) -> Path:
    """Where the figures and tables of a report go: beside the page, and named like it."""
    path = files.expanded(path)
    return path.with_name(f"{path.stem}_files")


def check(path: Path) -> None:
    """Make the folder of a report, and raise RunError if the page or what lies beside it cannot be written there."""
    files.make_folder_of(path, _DOING)
    files.check_file(path, _DOING)
    files.check_folder(folder_of(path), _DOING)


def render(
    run: Run,
    sections: Sequence[Section],
    folder: Path | None = None,
    *,
    beside: Sequence[Run] = (),
    title: str = "",
    items: Sequence[Item] = (),
    progress: Callable[[Progress], None] | None = None,
) -> str:
    """The page as text; with a folder, its figures and tables are saved there."""
    report = progress or (lambda _: None)
    total, done, drawn = sum(len(section.findings) for section in sections), 0, []
    for section in sections:
        shown = []
        for finding in section.findings:
            report(Progress("drawing figures", done, total, "figures"))
            shown.append(show(finding, folder))
            done += 1
        drawn.append((section, shown))
    report(Progress("drawing figures", total, total, "figures"))
    answers = _answers(run, [finding for section in sections for finding in section.findings], items)
    runs = [run, *beside]
    templates = environment().overlay()
    templates.filters = templates.filters | {"typed": typed}
    return templates.get_template("study.html").render(runs=runs, title=title, sections=drawn, items=answers)


def _answers(run: Run, findings: Sequence[Finding], items: Sequence[Item]) -> list[ItemAnswer]:
    answering: dict[str, list[Finding]] = {}
    for finding in findings:
        for code in finding.items:
            answering.setdefault(code, []).append(finding)
    return [
        ItemAnswer(item.id, item.title, item.why, tuple(answering.get(item.id, ())), *_standing(run, item))
        for item in items
    ]


def _standing(run: Run, item: Item) -> tuple[str, str]:
    """How an item stands without a figure here, and what is to be typed for this run."""
    model = run.manifest.model
    adapter = [] if model.adapter is None else ["--adapter", model.adapter.id]
    words = {"RUN": [str(run.path)], "MODEL": [model.base, *adapter]}
    command = _WORDS.sub(lambda word: shlex.join(words[word[0]]), item.command)
    if item.command.startswith("mnemoscope build"):
        return "measured: it is the run", f"mnemoscope show {shlex.quote(str(run.path))}"
    if item.command.startswith("mnemoscope study"):
        return "not measured", command
    return (
        "for one neuron, prediction or sheet" if command.startswith("mnemoscope") else "nothing to measure"
    ), command


def typed(text: str, path: Path) -> Markup:
    """A sentence in which what stands between backticks is a command for this run."""
    pieces = [escape(piece) for piece in _WORDS.sub(lambda word: shlex.quote(str(path)), text).split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else piece for index, piece in enumerate(pieces)
    )


_WORDS = re.compile(r"\b(RUN|MODEL)\b")


def show(finding: Finding, folder: Path | None = None) -> DrawnFinding:
    """A finding made ready for a page; with a folder, its files are saved there."""
    picture = chart(finding)
    drawn = None if picture is None else rendered(picture)
    head = finding.frame.head(ROWS if drawn is not None else ROWS_BARE)
    return DrawnFinding(
        finding,
        None if drawn is None else Markup(placed(drawn, f"{finding.title}. {finding.says}")),
        tuple(name.replace("_", " ") for name in head.columns),
        tuple(tuple(_cell(value) for value in row) for row in head.iter_rows()),
        tuple(kind.is_numeric() for kind in head.schema.values()),
        finding.frame.height - head.height,
        () if folder is None else tuple(_save(finding, drawn, folder)),
    )


def _save(finding: Finding, drawn: str | None, folder: Path) -> list[tuple[str, str]]:
    names = [("CSV", "csv"), ("Parquet", "parquet")]
    finding.frame.write_csv(folder / f"{finding.id}.csv")
    finding.frame.write_parquet(folder / f"{finding.id}.parquet")
    if drawn is not None:
        for kind in ("svg", "pdf"):
            (folder / f"{finding.id}.{kind}").write_bytes(as_file(drawn, kind))
        names = [("SVG", "svg"), ("PDF", "pdf"), *names]
    return [(name, f"{folder.name}/{finding.id}.{kind}") for name, kind in names]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
