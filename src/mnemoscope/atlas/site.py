"""What the pages of a server share: its runs, its templates, and how a page and its data are put under an address."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from urllib.parse import quote

import polars as pl
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from mnemoscope.atlas import live, lowered
from mnemoscope.atlas.library import Library, Shelf
from mnemoscope.atlas.packages import imported
from mnemoscope.atlas.scatter import Scatter
from mnemoscope.display import Shown, jsonable
from mnemoscope.location import stamp
from mnemoscope.records import Cells
from mnemoscope.run.schemas import MANIFEST
from mnemoscope.views import report, words
from mnemoscope.views.page import environment

if TYPE_CHECKING:
    from mnemoscope.neuron.card import NeuronCard

STYLES = ("theme.css", "card.css", "explanation.css", "trace.css", "printed.css", "study.css", "gallery.css")
TEXT = 400  # letters of a search
LONG = 4_000  # of a prompt, or of a statement
LISTED = 4  # parts of a list that a cell of a table shows; its file has all
KEPT = 32 << 20  # bytes of pages that are kept
# The page of an address and its parameters; None if it is to be made here.
Elsewhere: TypeAlias = "Callable[[str, Mapping[str, Any]], Response | None]"
Words = Annotated[str, Query(max_length=TEXT)]
LongText = Annotated[str, Query(max_length=LONG)]
_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
FileKind = Annotated[str, Query(alias="as", pattern=f"^({'|'.join(_TYPES)})$")]
REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"description": "The run cannot answer this"},
    404: {"description": "There is no such thing"},
    410: {"description": "The run cannot be read any more"},
}


class KeptPages:
    """The pages that were made last, of so many bytes together."""

    def __init__(self, most: int = KEPT) -> None:
        self._most, self._size, self._lock = most, 0, threading.Lock()
        self._pages: OrderedDict[Hashable, Response] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], Response]) -> Response:
        """The page under a key, made if it is not here."""
        with self._lock:
            if key in self._pages:
                self._pages.move_to_end(key)
                return _again(self._pages[key])
        page = make()
        with self._lock:
            if key not in self._pages:
                self._pages[key] = page
                self._size += len(page.body)
            while self._size > self._most:
                self._size -= len(self._pages.popitem(last=False)[1].body)
        return _again(page)


def _again(page: Response) -> Response:
    """A page to be sent, whose headers are its own: what compresses it writes into them."""
    again = copy.copy(page)
    again.raw_headers = list(page.raw_headers)
    return again


@dataclass(frozen=True)
class Answer:
    """A page: its template, the same as data, and what is put into the template.

    written  whether it shows what is written on it, so that no browser keeps it
    """

    template: str
    data: Callable[[], Any]
    shown: dict[str, Any] = field(default_factory=dict)
    written: bool = False


class Site:
    """One server: what every page of it needs.

    prefix  of every address: empty, or "/" and a random word
    served  whether a server answers; else pages are for a folder (`atlas.folder`)
    """

    def __init__(self, library: Library, desk: live.Desk, prefix: str = "", *, served: bool = True) -> None:
        self.library, self.desk, self.prefix, self.served = library, desk, prefix, served
        self.elsewhere: Elsewhere | None = None  # makes pages in another process
        self._answers: dict[str, tuple[Callable[..., Answer], bool]] = {}
        self._pages = KeptPages()
        self._templates = _templates(self)

    def href(self, shelf: Shelf, *path: str) -> str:
        """The address of a run, or of a page of it."""
        return "/".join((self.prefix, "runs", shelf.name, *path))

    def inside(self, shown: Shown, shelf: Shelf) -> Markup:
        """A result as a part of a page of that run."""
        return lowered.inside(shown, lambda address: self.href(shelf, "neurons", address))

    def html(self, answer: Answer, status: int = 200) -> Response:
        """The page."""
        page = self.part(answer.template, **{"shelf": None, "section": "", **answer.shown})
        return HTMLResponse(page, status, {"cache-control": "no-store"} if answer.written else None)

    def part(self, template: str, **shown: Any) -> str:
        """What a template makes of what is put into it."""
        return self._templates.get_template(template).render(shown)

    def refusal(self, path: str, status: int, reason: str, shelf: Shelf | None) -> Response:
        """Why there is no answer, as whatever was asked for."""
        reason = reason.encode("utf-8", "replace").decode()  # it may quote what is no text
        if path.endswith(".json"):
            return as_json({"problem": reason}, status)
        return self.html(
            Answer("problem.html", dict, {"reason": reason, "status": status, "shelf": shelf}), status
        )

    def put(
        self, app: FastAPI, path: str, *, kept: bool = False, light: bool = False
    ) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
        """Put a page under an address, and its data under the same with .json behind it.

        kept   whether the page is kept for a while: it depends on its address and on the run alone
        light  whether it needs nothing of `packages`
        """

        def put(answer: Callable[..., Answer]) -> Callable[..., Answer]:
            self._answers[path] = (answer, kept)
            # the longer address first: in a shorter one .json would be a part of a name
            put_data(app, f"{path}.json", answer, lambda **arguments: answer(**arguments).data(), light=light)
            put_hidden(app, path, answer, lambda **arguments: self.page(path, arguments), light=light)
            return answer

        return put

    def page(self, path: str, arguments: Mapping[str, Any]) -> Response:
        """The page of an address and its parameters, made by another process if there is one."""
        made = self.elsewhere and self.elsewhere(path, arguments)
        return made or self.made(path, arguments)

    def made(self, path: str, arguments: Mapping[str, Any]) -> Response:
        """The same, made here."""
        answer, kept = self._answers[path]
        if not kept:
            return self.html(answer(**arguments))
        key = (stamp(self.library[arguments["run"]].run.place / MANIFEST), asked_for(path, arguments))
        return self._pages.once(key, lambda: self.html(answer(**arguments)))


def asked_for(path: str, arguments: Mapping[str, Any]) -> Hashable:
    """An address and its parameters as a key: the same for the same question."""
    given = sorted(arguments)
    values = (arguments[name] for name in given)
    return (path, *given, *(tuple(value) if isinstance(value, list) else value for value in values))


def put_data(
    app: FastAPI, path: str, asked: Callable[..., Any], answer: Callable[..., Any], *, light: bool = False
) -> None:
    """Put data under an address that OpenAPI lists, with the parameters and the words of `asked`."""
    reply = _like(asked, lambda **arguments: as_json(answer(**arguments)), light)
    app.get(path, response_class=JSONResponse, response_model=None, responses=REFUSED)(reply)


def put_change(app: FastAPI, path: str, change: Callable[..., Any], *, light: bool = False) -> None:
    """Put what writes something under an address that OpenAPI lists; it answers with data."""
    reply = _like(change, lambda **arguments: as_json(change(**arguments)), light)
    app.post(path, response_class=JSONResponse, response_model=None, responses=REFUSED)(reply)


def put_hidden(
    app: FastAPI,
    path: str,
    asked: Callable[..., Any],
    answer: Callable[..., Response],
    *,
    light: bool = False,
) -> None:
    """Put what is for browsers under an address, with the parameters of `asked`."""
    app.get(path, include_in_schema=False, response_model=None)(_like(asked, answer, light))


def put_waiting(
    app: FastAPI,
    path: str,
    asked: Callable[..., Any],
    answer: Callable[..., Awaitable[Response]],
    *,
    listed: bool = False,
) -> None:
    """Put what takes long under an address, with the parameters of `asked`; `answer` also gets the request, and so can
    see whether whoever asked is still there."""

    @functools.wraps(asked)
    async def reply(**arguments: Any) -> Response:
        return await answer(**arguments)

    signature = inspect.signature(asked, eval_str=True)
    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    reply.__signature__ = signature.replace(parameters=[*signature.parameters.values(), request])  # type: ignore[attr-defined]
    responses = REFUSED if listed else None
    app.get(
        path, include_in_schema=listed, response_class=JSONResponse, response_model=None, responses=responses
    )(reply)


def _like(asked: Callable[..., Any], answer: Callable[..., Response], light: bool) -> Callable[..., Response]:
    @functools.wraps(asked)
    def reply(**arguments: Any) -> Response:
        if not light:
            imported()
        return answer(**arguments)

    reply.__signature__ = inspect.signature(asked, eval_str=True)  # type: ignore[attr-defined]
    return reply


def as_json(data: Any, status: int = 200) -> Response:
    """Data as JSON, which has no NaN and no infinity: null."""
    text = json.dumps(jsonable(data), ensure_ascii=False, allow_nan=False, default=str)
    return Response(text, status, media_type="application/json")


def download(frame: pl.DataFrame, name: str, kind: str) -> Response:
    """A frame as a file to keep."""
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.{kind}')}"}
    return Response(_file(frame, kind), media_type=_TYPES[kind], headers=headers)


def _file(frame: pl.DataFrame, kind: str) -> bytes:
    """A frame as a file; in CSV, lists, structs and bytes are text."""
    file = io.BytesIO()
    if kind == "parquet":
        frame.write_parquet(file)
    else:
        nested = [name for name, type_ in frame.schema.items() if type_.is_nested() or type_ == pl.Binary]
        frame.with_columns(
            pl.Series(name, [str(value) for value in frame[name].to_list()], pl.String) for name in nested
        ).write_csv(file)
    return file.getvalue()


@functools.cache
def style() -> str:
    """The rules of all that results show, as one file."""
    templates = environment()
    return "\n".join(templates.get_template(name).render() for name in STYLES)


class _Every:
    """A set that has everything: every neuron has a page."""

    def __contains__(self, item: object) -> bool:
        return True


def _templates(site: Site) -> Environment:
    shared = environment()
    assert shared.loader is not None
    folders = ("templates",) if site.served else ("templates/folder", "templates")
    loaders = [PackageLoader("mnemoscope.atlas", folder) for folder in folders]
    templates = shared.overlay(loader=ChoiceLoader([*loaders, shared.loader]))
    templates.filters = shared.filters | {"cell": _cell, "dots": _dots, "typed": report.typed}
    templates.globals = shared.globals | {
        "prefix": site.prefix,
        "served": site.served,
        "library": site.library,
        "every": _Every(),
        "plain": lambda html: Markup(lowered.without_style(str(html))),
        "walked": lambda html, shelf: Markup(
            lowered.walked(str(html), lambda at: site.href(shelf, "neurons", at))
        ),
        "linked": lambda html, shelf: Markup(
            lowered.linked(str(html), lambda at: site.href(shelf, "neurons", at))
        ),
        "sourced": lambda html, shelf, card: _sourced(site, html, shelf, card),
        "raised": lambda html: Markup(lowered.raised(str(html))),
    }
    return templates


def _sourced(site: Site, html: str, shelf: Shelf, card: NeuronCard) -> Markup:
    """A card whose examples lead to their contexts, and the neuron along them, where a model can be asked."""
    place = site.href(shelf, "text")
    return Markup(
        lowered.sourced(html, lambda context: f"{place}?context={context}&neurons={card.id}")
        if site.served
        else html
    )


def _dots(picture: Scatter, layer: int, cells: Cells, run: str) -> Markup:
    """The points of a layer's picture as links: thousands, for which a template takes longer than for all else."""
    across, up = (axis.name.replace("_", " ") for axis in (picture.x, picture.y))
    said = (
        (x, y, cells.id(layer, neuron), f"{across} {words.number(first)}, {up} {words.number(second)}")
        for x, y, neuron, first, second in picture.points
    )
    return Markup("\n").join(
        Markup(
            f'<a href="{run}/neurons/{id}" tabindex="-1" aria-label="{id}">'
            f'<circle cx="{x}" cy="{y}" r="2.2"><title>{id}: {values}</title></circle></a>'
        )
        for x, y, id, values in said
    )


def _cell(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.number(value)
    if isinstance(value, list):
        more = f", … {len(value):,} in all" if len(value) > LISTED else ""
        return f"[{', '.join(map(_cell, value[:LISTED]))}{more}]"
    return f"{value:,}" if isinstance(value, int) else str(value)
