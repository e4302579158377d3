"""Processes that make pages beside the one that serves: Python makes one page at a time, and readers come at once.

Each opens the runs for itself and maps the same index; what takes long to count is handed to it. It makes pages that
are only read. Questions to a model, and whatever is written, stay with the process that serves, which makes a page
itself where none of these could: it says what is wrong then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response

from mnemoscope import children
from mnemoscope.atlas import live
from mnemoscope.atlas.index import indexed
from mnemoscope.atlas.library import Library
from mnemoscope.atlas.site import Site
from mnemoscope.location import Place
from mnemoscope.run.reading import open_run

if TYPE_CHECKING:
    from mnemoscope.api.run import Run


@dataclass(frozen=True)
class Opened:
    """What a process is told of a run: its folder, what it is called, and what was counted of it (`Run.once`)."""

    kind: type[Run]
    place: Place
    path: Place
    counted: Mapping[Hashable, Any]


class PageProcesses:
    """Some processes that make pages of a site: those that each of `adding` puts under their addresses."""

    def __init__(self, count: int, site: Site, *adding: Callable[[FastAPI, Site], None]) -> None:
        self._count, self._site, self._adding = count, site, adding
        self._pool: ProcessPoolExecutor | None = None

    def begin(self) -> None:
        """Start them, once everything is there that they read; until they are ready pages are made without them."""
        library = self._site.library
        runs = [
            Opened(type(run := shelf.run), run.place, run.path, shelf.counted())
            for shelf in library.shelves.values()
        ]
        given = (runs, self._site.prefix, library.annotations, self._adding)
        pool = ProcessPoolExecutor(
            self._count, mp_context=get_context("spawn"), initializer=_open, initargs=given
        )
        try:
            with children.starting():
                ready: list[Future[None]] = [pool.submit(_ready) for _ in range(self._count)]
            for each in ready:
                each.result()
        except (BrokenExecutor, RuntimeError):  # one cannot begin, or the server ends already
            return
        self._pool = pool

    def made(self, path: str, arguments: Mapping[str, Any]) -> Response | None:
        """The page of an address and its parameters; None if it is to be made without them."""
        if self._pool is None:
            return None
        try:
            return self._pool.submit(_made, path, arguments).result()
        except (BrokenExecutor, RuntimeError):  # one was killed, or the server ends
            self._pool = None
            return None

    def close(self) -> None:
        """End them."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


# -- what a process does ------------------------------------------------------------------------------------------

_site: Site | None = None


def _open(
    runs: Sequence[Opened],
    prefix: str,
    annotations: Path | None,
    adding: Sequence[Callable[[FastAPI, Site], None]],
) -> None:
    global _site
    children.follow()
    library = Library([run.kind.of(open_run(run.place, run.path)) for run in runs], annotations)
    for run, shelf in zip(runs, library.shelves.values(), strict=True):
        for name, value in run.counted.items():
            shelf.run.once(name, partial(_itself, value))
        indexed(shelf.run)
    site, app = Site(library, live.Desk(), prefix), FastAPI()
    for add in adding:
        add(app, site)
    _site = site


def _itself(value: Any) -> Any:
    return value


def _ready() -> None:
    assert _site is not None


def _made(path: str, arguments: Mapping[str, Any]) -> Response | None:
    assert _site is not None
    try:
        return _site.made(path, arguments)
    except Exception:  # whoever serves makes it again, and says what is wrong
        return None
