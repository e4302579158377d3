"""The report of a study: one page that opens from disk, and beside it every figure and table as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mnemoscope import files
from mnemoscope.analyses.study.items import Item
from mnemoscope.records import Progress
from mnemoscope.views import cards, html
from mnemoscope.views.study import figures

if TYPE_CHECKING:
    from mnemoscope.analyses.study.finding import Finding, Section
    from mnemoscope.store import Run

ROWS = 12  # of a table that are on the page; the files hold all
ROWS_BARE = 40  # of a table without a figure


@dataclass(frozen=True)
class Shown:
    """A finding made ready for the page: its figure, the first rows of its table, its files."""

    finding: Finding
    picture: Markup | None
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # columns of numbers
    left: int  # rows that are not on the page
    files: tuple[tuple[str, str], ...]  # kind, address from the page


def write(
    run: Run,
    sections: Sequence[Section],
    path: str | Path,
    *,
    beside: Run | None = None,
    title: str = "",
    items: Sequence[Item] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write the report of a run, or of two that are compared (`beside`), to an .html file, and figures (SVG, PDF) and
    tables (CSV, Parquet) to a folder beside it.

    The folder is named like the file, with `_files` for `.html`. `RunError` if they cannot be written.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_files")
    doing = "writing the report"
    with files.refusals(f"{doing} {path}"):
        folder.mkdir(parents=True, exist_ok=True)
        files.check_file(path, doing)
        text = render(run, sections, folder, beside=beside, title=title, items=items, progress=progress)
    files.write(path, text, doing)
    return path


def render(
    run: Run,
    sections: Sequence[Section],
    folder: Path | None = None,
    *,
    beside: Run | None = None,
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
            shown.append(_show(finding, folder))
            done += 1
        drawn.append((section, shown))
    report(Progress("drawing figures", total, total, "figures"))
    where: dict[str, list[Finding]] = {}
    for finding in (finding for section in sections for finding in section.findings):
        for item in finding.items:
            where.setdefault(item, []).append(finding)
    runs = [run] if beside is None else [run, beside]
    page = html.environment().get_template("study.html")
    return page.render(runs=runs, title=title, sections=drawn, items=items, where=where)


def _show(finding: Finding, folder: Path | None) -> Shown:
    drawn = figures.chart(finding)
    head = finding.frame.head(ROWS if drawn is not None else ROWS_BARE)
    return Shown(
        finding,
        None if drawn is None else Markup(figures.svg(drawn)),
        tuple(name.replace("_", " ") for name in head.columns),
        tuple(tuple(_cell(value) for value in row) for row in head.iter_rows()),
        tuple(kind.is_numeric() for kind in head.schema.values()),
        finding.frame.height - head.height,
        () if folder is None else tuple(_save(finding, drawn, folder)),
    )


def _save(finding: Finding, drawn: Any, folder: Path) -> list[tuple[str, str]]:
    names = [("CSV", "csv"), ("Parquet", "parquet")]
    finding.frame.write_csv(folder / f"{finding.id}.csv")
    finding.frame.write_parquet(folder / f"{finding.id}.parquet")
    if drawn is not None:
        for kind in ("svg", "pdf"):
            (folder / f"{finding.id}.{kind}").write_bytes(figures.saved(drawn, kind))
        names = [("SVG", "svg"), ("PDF", "pdf"), *names]
    return [(name, f"{folder.name}/{finding.id}.{kind}") for name, kind in names]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return cards.number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
