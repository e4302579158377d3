"""Pages of the study: what was measured of a run, and the same figures of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from mnemoscope.atlas.site import Answer, Site, Words
from mnemoscope.errors import QueryError
from mnemoscope.views import report

if TYPE_CHECKING:
    from mnemoscope.results import StudyReport
    from mnemoscope.studies.findings.finding import Section

HEADLINE = ("headline", "What holds")
COMPARED = "glance"  # what two runs are compared by at first, besides their triggers


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
        return Answer("study_page.html", lambda: _data(drawn), shown)

    @site.put(app, "/runs/{run}/compare")
    def compare(run: str, other: Words = "", only: Words = COMPARED) -> Answer:
        """Two runs of one model or text: which triggers neurons keep, and figures side by side."""
        shelf = library[run]
        others = [name for name in library.shelves if name != run]
        drawn: Sequence[Any] = ()
        if other:
            second = library[other]
            drawn = shelf.run.once(
                ("compare", other, only),
                lambda: _drawn(shelf.run.compare(second.run, only=only)),
            )
        shown = {
            "shelf": shelf, "sections": drawn, "paths": shelf.run.path, "others": others, "other": other, "only": only,
            "measurements": [(each["name"], each["title"]) for each in shelf.run.measurements()],
        }  # fmt: skip
        return Answer("compare.html", lambda: _data(drawn), shown)


def _drawn(study: StudyReport) -> list[tuple[Section, list[report.DrawnFinding]]]:
    return [(section, [report.show(finding) for finding in section.findings]) for section in study.sections]


def _data(drawn: Sequence[tuple[Section, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": section.name,
            "missing": section.missing,
            "findings": [finding.to_dict() for finding in section.findings],
        }
        for section, _ in drawn
    ]
