"""Pages that are read from the tables of a run: no model, no torch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import polars as pl
from fastapi import FastAPI, Query, Response
from fastapi.responses import RedirectResponse

from mnemoscope.annotation.notes import LENGTH
from mnemoscope.atlas.examples import examples, known
from mnemoscope.atlas.library import AXES, PAGE, STATISTICS, Shelf, twin
from mnemoscope.atlas.site import Answer, FileKind, LongText, Site, Words, download, put_data, put_hidden
from mnemoscope.errors import MnemoscopeError, QueryError, SheetError
from mnemoscope.neuron.card import NeuronCard
from mnemoscope.neuron.find import Hits
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.views.page import Most

T = TypeVar("T")
NOTES = 12  # that the first page shows
ROWS = 500  # of an answer in SQL
SECONDS = 10.0  # that it may take
KINDS = {
    "promotes": "neurons that promote this token",
    "suppresses": "neurons that suppress this token",
    "trigger": "neurons that this text triggers",
    "pattern": "neurons with a tested pattern of this name",
    "note": "neurons whose note has this text",
    "like": "neurons with the same triggers as this neuron",
}
EVERY = 1_000_000  # triggers, which no neuron has


def add_pages(app: FastAPI, site: Site) -> None:
    """Put the pages under their addresses."""
    _add_runs(app, site)
    _add_units(app, site)
    _add_search(app, site)
    _add_sql(app, site)


def _add_runs(app: FastAPI, site: Site) -> None:
    library = site.library

    def runs() -> Answer:
        """The runs that are served."""
        shelves = list(library.shelves.values())
        return Answer("runs.html", lambda: [_said(shelf) for shelf in shelves], {"shelves": shelves})

    put_data(app, "/runs.json", runs, lambda: runs().data(), light=True)

    @app.get("/", include_in_schema=False, response_model=None)
    def begin() -> Response:
        if len(library.shelves) == 1:
            return RedirectResponse(site.href(next(iter(library.shelves.values()))), 307)
        return site.html(runs())

    @site.put(app, "/runs/{run}", light=True)
    def home(run: str) -> Answer:
        """A run: its model and text, its layers at a glance, and neurons to begin with."""
        shelf = library[run]
        manifest = shelf.run.manifest
        shown = {
            "shelf": shelf,
            "manifest": manifest,
            "notes": _noted(shelf.notes.listed) if site.served else [],
            "most_notes": NOTES,
            "chosen": shelf.run.kept("highlights") is not None,
            "drawn": shelf.run.kept("pictures") is not None,
        }
        return Answer("home.html", manifest.model_dump, shown)

    @site.put(app, "/runs/{run}/begin", light=True)
    def begin_with(run: str) -> Answer:
        """Neurons to begin with, each for another reason; of a large run they take a while to choose."""
        shelf = library[run]
        return Answer(
            "begin.html", lambda: [pick.to_dict() for pick in shelf.highlights.picks], {"shelf": shelf}
        )

    @site.put(app, "/runs/{run}/examples/{page}", light=True)
    def examples_of(run: str, page: str) -> Answer:
        """What a page (explain, text, steer, test, search, sql) could be asked of this run: what its form is given."""
        shelf = library[run]
        chosen = examples(page, shelf.run, shelf.highlights.cards)
        shown = {"shelf": shelf, "page": page, "examples": chosen}
        return Answer("examples_page.html", lambda: [example.to_dict() for example in chosen], shown)

    @site.put(app, "/runs/{run}/layers")
    def layers(run: str) -> Answer:
        """Each layer at a glance."""
        shelf = library[run]
        rows = [asdict(layer) for layer in shelf.overview.layers]
        return Answer("layers.html", lambda: rows, {"shelf": shelf, "drawn": True})


def _add_units(app: FastAPI, site: Site) -> None:
    library = site.library

    @site.put(app, "/runs/{run}/layers/{layer}", kept=True, light=True)
    def layer(
        run: str,
        layer: int,
        sort: Words = "kurtosis",
        order: Annotated[str, Query(pattern="^(down|up)$")] = "down",
        where: Annotated[list[Words] | None, Query(max_length=8)] = None,
        page: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        x: Words = AXES[0],
        y: Words = AXES[1],
    ) -> Answer:
        """The neurons of a layer, sorted and filtered by statistics (`where=kurtosis>50`)."""
        shelf = library[run]
        conditions = [condition for condition in where or () if condition.strip()]
        rows = shelf.layer(
            layer, sort, descending=order == "down", conditions=conditions, page=page, axes=(x, y)
        )
        held = shelf.run.manifest.model.cells.layers
        shown = {
            "shelf": shelf, "layer": layer, "summary": shelf.overview.layers[layer], "rows": rows, "page": page,
            "columns": [*dict.fromkeys((sort, *STATISTICS))], "sort": sort, "order": order, "where": conditions,
            "size": PAGE, "x": x, "y": y,
            "below": max((other for other in held if other < layer), default=None),
            "above": min((other for other in held if other > layer), default=None),
        }  # fmt: skip
        return Answer("layer.html", lambda: {"layer": layer, **rows.to_dict()}, shown)

    def layer_file(
        run: str,
        layer: int,
        sort: Words = "kurtosis",
        order: Annotated[str, Query(pattern="^(down|up)$")] = "down",
        where: Annotated[list[Words] | None, Query(max_length=8)] = None,
        as_: FileKind = "csv",
    ) -> Response:
        """All neurons of a layer that fit, with every statistic."""
        shelf = library[run]
        conditions = [condition for condition in where or () if condition.strip()]
        frame = shelf.fitting(layer, sort, descending=order == "down", conditions=conditions)
        return download(frame, f"{shelf.name}-layer-{layer}", as_)

    put_hidden(app, "/runs/{run}/layers/{layer}/file", layer_file, layer_file)

    @site.put(app, "/runs/{run}/neurons/{address}", light=True)
    def neuron(run: str, address: str, triggers: Annotated[int, Query(ge=1, le=1000)] = 25) -> Answer:
        """A neuron: what triggers it either way, how its coefficient is distributed, what its value writes."""
        shelf = library[run]
        card = shelf.run.neuron(address, examples=triggers)
        most = Most(examples=triggers, tokens=20)
        shown = {
            "shelf": shelf, "card": card, "most": most, "triggers": triggers,
            "note": _noted(lambda: shelf.notes[card.id]), "note_length": LENGTH,
            "twins": [twin(shelf, other, card) for other in library.others(shelf)],
        }  # fmt: skip
        return Answer("neuron_page.html", card.to_dict, shown, written=True)

    def trigger_file(run: str, address: str, as_: FileKind = "csv") -> Response:
        """All stored triggers of a neuron with their text, the strongest of each sign first."""
        shelf = library[run]
        card = shelf.run.neuron(address, examples=EVERY)
        return download(pl.DataFrame(_triggers(card)), f"{shelf.name}-{card.id}-triggers", as_)

    put_hidden(app, "/runs/{run}/neurons/{address}/triggers", trigger_file, trigger_file)

    def preview(run: str, address: str) -> Response:
        """A small card of a neuron, for where it is named."""
        shelf = library[run]
        card = shelf.run.neuron(address, examples=3, window=(10, 3))
        return site.html(
            Answer("preview.html", dict, {"card": card, "note": _noted(lambda: shelf.notes[card.id])})
        )

    put_hidden(app, "/runs/{run}/neurons/{address}/preview", preview, preview, light=True)


def _add_search(app: FastAPI, site: Site) -> None:
    library = site.library

    @site.put(app, "/runs/{run}/search", light=True)
    def search(
        run: str, q: Words = "", by: Words = "", count: Annotated[int, Query(ge=1, le=500)] = 12
    ) -> Answer:
        """Neurons by a token that they promote or suppress, a text that triggers them, or a pattern; chance beside."""
        shelf = library[run]
        if by and by not in KINDS:
            raise QueryError(f"searching by {by!r}: choose one of {', '.join(KINDS)}")
        noted = () if _noted(shelf.notes.listed) else ("note",)
        every = [kind for kind in KINDS if kind not in ("like", *noted)]  # an address is asked for by name
        kinds = () if not q else (by,) if by else every
        answers = [(kind, *_answer(shelf, kind, q, count)) for kind in kinds]
        if not by and _mirrored(*(hits for kind, hits, _ in answers if kind in ("promotes", "suppresses"))):
            answers = [answer for answer in answers if answer[0] != "suppresses"]
        shown = {"shelf": shelf, "q": q, "by": by, "count": count, "kinds": KINDS, "answers": answers}
        shown |= {"page": "search", "examples": () if q else known("search", shelf)}
        return Answer(
            "search.html", lambda: {kind: _data(hits, problem) for kind, hits, problem in answers}, shown
        )

    def go(run: str, q: Words = "") -> Response:
        """What is typed into the box of every page: an address leads to its neuron, anything else to the search."""
        shelf = library[run]
        try:
            return RedirectResponse(site.href(shelf, "neurons", str(shelf.run.parse(q.strip()))), 303)
        except MnemoscopeError:
            return RedirectResponse(f"{site.href(shelf, 'search')}?{urlencode({'q': q})}", 303)

    put_hidden(app, "/runs/{run}/go", go, go, light=True)

    def completions(run: str, q: Words = "") -> list[str]:
        """Tokens of the vocabulary that begin so."""
        return library[run].completions(q)

    put_data(app, "/runs/{run}/completions.json", completions, completions, light=True)


def _add_sql(app: FastAPI, site: Site) -> None:
    library = site.library

    @site.put(app, "/runs/{run}/sql")
    def sql(run: str, q: LongText = "") -> Answer:
        """The answer to one SELECT over the tables of the run, cut off after so many rows."""
        shelf = library[run]
        began = time.perf_counter()
        frame = shelf.run.sql(q, most=ROWS, seconds=SECONDS) if q.strip() else None
        shown = {
            "shelf": shelf, "q": q, "frame": frame, "most": ROWS, "limit": SECONDS,
            "seconds": time.perf_counter() - began,
            "tables": {name: SCHEMAS[name].names for name in shelf.run.manifest.tables},
            "page": "sql", "examples": () if q else known("sql", shelf),
        }  # fmt: skip
        return Answer("sql.html", lambda: [] if frame is None else frame.to_dicts(), shown)

    def table(run: str, q: LongText, as_: FileKind = "csv") -> Response:
        """The same as a file."""
        return download(library[run].run.sql(q, most=ROWS, seconds=SECONDS), "answer", as_)

    put_hidden(app, "/runs/{run}/sql/file", table, table)


def _said(shelf: Shelf) -> dict[str, Any]:
    manifest = shelf.run.manifest
    return {"name": shelf.name, "model": manifest.model.id, "corpus": manifest.corpus.id}


def _noted(read: Callable[[], T]) -> T | None:
    """What was written, or None where its file cannot be read: a page of the run does not need it."""
    try:
        return read()
    except SheetError:
        return None


def _answer(shelf: Shelf, kind: str, text: str, count: int) -> tuple[Hits | None, str]:
    """The answer to a search, or why there is none."""
    try:
        return shelf.find(kind, text, count), ""
    except QueryError as error:
        return None, str(error)


def _mirrored(promoting: Hits | None = None, suppressing: Hits | None = None) -> bool:
    """Whether the one list is the other one with all signs turned, as where coefficients of either sign occur."""
    if not promoting or not suppressing:
        return False
    turned = promoting.rows.with_columns(pl.col("sign").replace({"+": "-", "-": "+"}))
    listed, other = (frame.select("neuron", "sign", "rank") for frame in (suppressing.rows, turned))
    return promoting.total == suppressing.total and listed.equals(other)


def _data(hits: Hits | None, problem: str) -> dict[str, Any]:
    return hits.to_dict() if hits else {"problem": problem}


def _triggers(card: NeuronCard) -> Iterator[dict[str, Any]]:
    """A row for each trigger that a card holds."""
    for side in (card.positive, card.negative):
        for rank, example in enumerate(side.examples):
            yield {
                "neuron": str(card.id), "polarity": side.polarity, "rank": rank, "coefficient": example.coefficient,
                "title": example.title, "document": example.document, "context": example.context,
                "position": example.position, "before": "".join(example.before), "token": example.active,
                "next_token": example.next_token, "after": "".join(example.after),
            }  # fmt: skip
