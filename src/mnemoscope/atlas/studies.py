"""Pages of the study: what was measured of a run."""

from __future__ import annotations

from fastapi import FastAPI

from mnemoscope.atlas.drawn import as_data, drawn
from mnemoscope.atlas.site import Answer, Site
from mnemoscope.errors import QueryError

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

    @site.put(app, "/runs/{run}/study/{name}")
    def measurement(run: str, name: str) -> Answer:
        """The findings of one measurement: sentences, figures, what chance gives, tables."""
        shelf = library[run]
        sections = shelf.run.once(("study", name), lambda: drawn(shelf.run.measured(name)))
        if not sections:
            raise QueryError(f"opening {name}: nothing of it was measured; run `mnemoscope study`")
        shown = {"shelf": shelf, "sections": sections, "paths": shelf.run.path, "title": sections[0][0].title}
        return Answer("study_page.html", lambda: as_data(sections), shown)
