"""Pages of the study: what was measured of a run."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import quote

import polars as pl
from fastapi import FastAPI, Response

from mnemoscope.atlas.drawn import Drawn, as_data, drawn
from mnemoscope.atlas.site import Answer, FileKind, Site, Words, download, put_hidden
from mnemoscope.errors import QueryError
from mnemoscope.views import report

HEADLINE = ("headline", "What holds")


def add_studies(app: FastAPI, site: Site) -> None:
    """Put the pages under their addresses."""
    library = site.library

    @site.put(app, "/runs/{run}/study")
    def study(run: str) -> Answer:
        """The measurements of the study, and which of them this run has."""
        shelf = library[run]
        rows = shelf.run.measurements()
        return Answer("study_list.html", lambda: rows, {"shelf": shelf, "rows": rows, "headline": HEADLINE})

    def measured(run: str, name: str) -> Drawn:
        shelf = library[run]
        return shelf.run.once(("study", name), lambda: drawn(shelf.run.measured(name)))

    @site.put(app, "/runs/{run}/study/{name}")
    def measurement(run: str, name: str) -> Answer:
        """The findings of one measurement: sentences, figures, what chance gives, tables."""
        shelf, sections = library[run], measured(run, name)
        if not sections:
            raise QueryError(f"opening {name}: nothing of it was measured; run `mnemoscope study`")
        place = f"{site.href(shelf, 'study', name, 'file')}?" if site.served else ""
        shown = {
            "shelf": shelf, "sections": _filed(sections, place), "paths": shelf.run.path, "name": name,
            "title": sections[0][0].title,
        }  # fmt: skip
        return Answer("study_page.html", lambda: as_data(sections), shown)

    def measurement_file(run: str, name: str, finding: Words, as_: FileKind = "csv") -> Response:
        """The table of a finding, whole."""
        return download(_frame(measured(run, name), finding), f"{library[run].name}-{finding}", as_)

    put_hidden(app, "/runs/{run}/study/{name}/file", measurement_file, measurement_file)


def _filed(sections: Drawn, place: str) -> Drawn:
    """The same with addresses of each table's files, which begin with a place; "" for none."""
    if not place:
        return sections
    kinds = (("CSV", "csv"), ("Parquet", "parquet"))

    def filed(each: report.DrawnFinding) -> report.DrawnFinding:
        name = quote(each.finding.id)
        return replace(each, files=tuple((said, f"{place}finding={name}&as={kind}") for said, kind in kinds))

    return [(section, [filed(each) for each in findings]) for section, findings in sections]


def _frame(sections: Drawn, name: str) -> pl.DataFrame:
    frames = {each.finding.id: each.finding.frame for _, findings in sections for each in findings}
    if name not in frames:
        raise QueryError(f"opening the table of {name!r}: there is none; choose among {', '.join(frames)}")
    return frames[name]
