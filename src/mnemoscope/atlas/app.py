"""The server: its addresses, files and failures.

Every page has its data at the same address with `.json` behind it; `/api.json` (OpenAPI) lists these, and `/api` does
for people.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from starlette.exceptions import HTTPException as StarletteHTTPException

from mnemoscope.atlas import live
from mnemoscope.atlas.annotate import add_annotation
from mnemoscope.atlas.guard import NOBODY, Guard, guarded
from mnemoscope.atlas.library import Library, Shelf, preparing
from mnemoscope.atlas.pages import add_pages
from mnemoscope.atlas.processes import PageProcesses
from mnemoscope.atlas.questions import add_questions
from mnemoscope.atlas.site import Answer, Site, style
from mnemoscope.atlas.studies import add_studies
from mnemoscope.errors import MnemoscopeError, RunError, RunMismatch

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.display import Report

_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


def create(
    runs: Sequence[Run],
    model: str | None = None,
    secret: str = "",
    annotations: Path | None = None,
    frames: str = NOBODY,
    report: Report | None = None,
    workers: int = 1,
) -> Guard:
    """The application for these runs, which answers to this machine alone, or to all who know the secret.

    model        where to load models from, if not from where each run's came
    secret       a word that every address begins with, where others than this machine can ask
    annotations  folder for what is written in the browser; None for the one that each run lies in
    frames       whose pages may show these inside
    report       is told how far the indices are that searches need, which are made while pages are answered already
    workers      processes that make pages; of 1 it is the one that serves
    """
    prefix = f"/{secret}" if secret else ""
    desk, library = live.Desk(model), Library(runs, annotations)
    site = Site(library, desk, prefix)
    processes = PageProcesses(workers, site, add_pages, add_studies)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with preparing(library, report, processes.begin if workers > 1 else lambda: None):
            yield
        processes.close()
        await asyncio.to_thread(desk.close)

    app = FastAPI(
        title="mnemoscope",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api.json",
        servers=[{"url": prefix}] if prefix else None,
        lifespan=life,
    )
    if secret:  # on one machine, to compress takes longer than to send
        app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=4)
    site.elsewhere = processes.made
    add_pages(app, site)
    add_questions(app, site)
    add_studies(app, site)
    add_annotation(app, site)
    _add_files(app)
    _add_api(app, site)
    _add_failures(app, site)
    return guarded(app, secret, frames)


def _add_files(app: FastAPI) -> None:
    @app.get("/static/{name}", include_in_schema=False, response_model=None)
    def static(name: str) -> Response:
        if name == "pages.css":
            return Response(style(), media_type=_TYPES[".css"])
        files = {file.name: file for file in (Path(__file__).parent / "static").iterdir()}
        if name not in files or files[name].suffix not in _TYPES:
            raise HTTPException(404, f"there is no file {name!r}")
        return Response(files[name].read_bytes(), media_type=_TYPES[files[name].suffix])


def _add_api(app: FastAPI, site: Site) -> None:
    @app.get("/api", include_in_schema=False, response_model=None)
    def api() -> Response:
        return site.html(Answer("api.html", dict, {"operations": list(_operations(app.openapi()))}))


def _operations(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What OpenAPI lists, a row each: method, path, what it says, and the names of its parameters."""
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
            yield {"method": method.upper(), "path": path, "says": operation["description"], "names": names}


def _add_failures(app: FastAPI, site: Site) -> None:
    def refuse(request: Request, status: int, reason: str) -> Response:
        return site.refusal(request.url.path, status, reason, _shelf(site, request))

    @app.exception_handler(MnemoscopeError)
    def failed(request: Request, error: MnemoscopeError) -> Response:
        gone = isinstance(error, RunError) and not isinstance(error, RunMismatch)
        status = 410 if gone else 404 if str(error).startswith(_NOT_THERE) else 400
        return refuse(request, status, str(error))

    @app.exception_handler(OSError)
    @app.exception_handler(pa.ArrowException)
    def gone(request: Request, error: Exception) -> Response:
        return refuse(request, 410, f"reading the run: {error}; was it moved or deleted while it was served?")

    @app.exception_handler(StarletteHTTPException)
    def missing(request: Request, error: StarletteHTTPException) -> Response:
        return refuse(request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def wrong(request: Request, error: RequestValidationError) -> Response:
        problems = (
            f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()
        )
        read = "the address" if request.method == "GET" else "what was sent"
        return refuse(request, 422, f"reading {read}: {'; '.join(problems)}")


_NOT_THERE = ("looking up", "opening")


def _shelf(site: Site, request: Request) -> Shelf | None:
    return site.library.shelves.get(request.path_params.get("run", ""))
