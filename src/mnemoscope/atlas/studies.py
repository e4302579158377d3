"""Pages of the study: what was measured of a run; and the same figures of two runs, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from mnemoscope.atlas.site import Answer, Site
from mnemoscope.errors import QueryError
from mnemoscope.records import Progress
from mnemoscope.views import report

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.display import Report
    from mnemoscope.results import StudyReport
    from mnemoscope.studies.findings.finding import Section

HEADLINE = ("headline", "What holds")
Drawn = list[tuple["Section", list[report.DrawnFinding]]]


def add_studies(app: FastAPI, site: Site) -> None:
    """Put the pages under their addresses."""
    library = site.library

    @site.put(app, "/runs/{run}/study")
    def study(run: str) -> Answer:
        """The measurements of the study, and which of them this run has."""
        shelf = library[run]
        rows = shelf.run.measurements()
        return Answer("study_list.html", lambda: rows, {"shelf": shelf, "rows": rows, "headline": HEADLINE})

    @site.put(app, "/runs/{run}/study/{name}")
    def measurement(run: str, name: str) -> Answer:
        """The findings of one measurement: sentences, figures, what chance gives, tables."""
        shelf = library[run]
        drawn = shelf.run.once(("study", name), lambda: _drawn(shelf.run.measured(name)))
        if not drawn:
            raise QueryError(f"opening {name}: nothing of it was measured; run `mnemoscope study`")
        shown = {"shelf": shelf, "sections": drawn, "paths": shelf.run.path, "title": drawn[0][0].title}
        return Answer("study_page.html", lambda: as_data(drawn), shown)


def compared(run: Run, other: Run, only: str, tell: Report) -> Drawn:
    """The figures of two runs side by side, drawn; `tell` is told how far it is, and may end it."""
    return _drawn(run.compare(other, only=only, report=tell), tell)


def _drawn(study: StudyReport, tell: Report = lambda step: None) -> Drawn:
    total, drawn = len(study.findings), Drawn()
    for section in study.sections:
        shown: list[report.DrawnFinding] = []
        for finding in section.findings:
            tell(Progress("drawing", sum(len(each) for _, each in drawn) + len(shown), total, "figures"))
            shown.append(report.show(finding))
        drawn.append((section, shown))
    return drawn


def as_data(drawn: Drawn) -> list[dict[str, Any]]:
    """The findings as JSON-ready values, by measurement."""
    return [
        {
            "name": section.name,
            "missing": section.missing,
            "findings": [finding.to_dict() for finding in section.findings],
        }
        for section, _ in drawn
    ]
