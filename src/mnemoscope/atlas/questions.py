"""Pages whose answers take a while, most of them the model's: a form, and the answer as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import urlencode

import polars as pl
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse

from mnemoscope.atlas import examples, live, lowered
from mnemoscope.atlas.drawn import as_data, compared
from mnemoscope.atlas.library import Shelf
from mnemoscope.atlas.site import Answer, LongText, Site, Words, as_json, asked_for, put_hidden, put_waiting
from mnemoscope.atlas.worked import TALL, WIDE, WorkedGraph, worked
from mnemoscope.errors import QueryError
from mnemoscope.exchange import graph, written
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.prediction.explanation import Explanation
    from mnemoscope.text.vocabulary import Vocabulary
    from mnemoscope.tracing.traced import Trace

Asked = Callable[..., Callable[..., Any] | None]
Lower = Callable[[Shelf, Any, dict[str, Any]], str]
Data = Callable[[Any, dict[str, Any]], Any]
EXPLAIN = "/runs/{run}/explain"
COMPARED = "glance"  # what two runs are compared by at first, besides their triggers
EXAMPLES = ("explain", "text", "steer", "test")  # pages that have some
MOST_FOILS = 8
MOST_NODES = 64  # that are pinned, or opened
NodeName = Annotated[str, Query(max_length=40)]


def add_questions(app: FastAPI, site: Site) -> None:
    """Put the questions under their addresses."""
    questions = _Questions(app, site)
    _add_predictions(questions)
    _add_texts(questions)
    _add_neurons(questions)
    _add_runs(questions)


class _Questions:
    """What puts questions under addresses of a server: a page with its form, the events of its answer, and its data."""

    def __init__(self, app: FastAPI, site: Site) -> None:
        self.app, self.site = app, site

    def ask(self, path: str, asked: Asked, given: dict[str, Any], model: bool = True) -> live.LiveQuestion:
        """Put a question to the model; `QueryError` if nothing is asked."""
        compute = asked(**given)
        if compute is None:
            raise QueryError("asking: nothing was asked; fill in the form")
        run = self.site.library[given["run"]].run
        address = f"{self.site.prefix}{path.format(run=given['run'])}?{_query(given)}"
        stamps = tuple(shelf.stamp for shelf in self.site.library.shelves.values())
        key = (stamps, asked_for(path, given))
        return self.site.desk.ask(run, compute, key, address, model=model)

    def put(
        self,
        path: str,
        template: str,
        lower: Lower | None = None,
        data: Data = lambda shown, given: shown.to_dict(),
        of: Callable[[dict[str, Any]], tuple[str, Asked, dict[str, Any]]] | None = None,
        *,
        model: bool = True,
    ) -> Callable[[Asked], Asked]:
        """A decorator of what makes of the parameters what is to be computed, or None while too little is given.

        `lower` and `data` make of the answer what is shown. Of a page that shows the answer to another one's question,
        `of` gives that one. Without `model` it is not needed, but packages may be that are not `light`.
        """
        app, site, name = self.app, self.site, path.rpartition("/")[2]

        def put(asked: Asked) -> Asked:
            def begun(given: dict[str, Any]) -> live.LiveQuestion:
                return self.ask(*(of(given) if of else (path, asked, given)), model)

            def shown_as(shelf: Shelf, shown: Any, given: dict[str, Any]) -> str:
                return lower(shelf, shown, given) if lower else site.inside(shown, shelf)

            def as_page(run: str, **given: Any) -> Response:
                shelf = site.library[run]
                shown = {
                    "shelf": shelf,
                    "given": given,
                    "asked": asked(run=run, **given) is not None,
                    "query": _query(given),
                }
                if model:
                    named = given.get("neuron") or given.get("neurons") or ""
                    bare = shown["asked"] or name not in EXAMPLES
                    shown |= {
                        "lacks": site.desk.lacks(shelf.run)
                        or examples.refused(name, shelf.run.manifest.model),
                        "examples": () if bare else examples.known(name, shelf, named),
                        "page": name,
                    }
                return site.html(Answer(template, dict, shown))

            def as_events(**given: Any) -> Response:
                shelf = site.library[given["run"]]
                return StreamingResponse(
                    _stream(begun(given), lambda shown: shown_as(shelf, shown, given)),
                    media_type="text/event-stream",
                    headers={"cache-control": "no-store"},
                )

            async def as_data(request: Request, **given: Any) -> Response:
                answer = await live.awaited(begun(given), request.is_disconnected)
                return await asyncio.to_thread(lambda: as_json(data(answer, given)))

            put_waiting(app, f"{path}.json", asked, as_data, listed=True)
            put_hidden(app, f"{path}/events", asked, as_events)
            put_hidden(app, path, asked, as_page, light=model)
            return asked

        return put


def _add_predictions(questions: _Questions) -> None:
    site = questions.site

    @questions.put(
        EXPLAIN,
        "explain.html",
        lambda shelf, shown, given: _with_choices(
            site.inside(shown, shelf), shown, given, shelf.run.vocabulary
        ),
    )
    def explain(
        run: str, prompt: LongText = "", target: Words = "",
        foil: Annotated[list[Words] | None, Query(max_length=MOST_FOILS)] = None,
        decoder_prompt: LongText = "", ablate: Annotated[int, Query(ge=0, le=20)] = 0,
    ) -> Callable[..., Any] | None:  # fmt: skip
        """A prediction, taken apart: what added to the log-probability of its token, or of it against others."""
        foils = [text for text in foil or () if text]
        if not prompt:
            return None
        return lambda opened, report: opened.explain(
            prompt, target or None, foils, decoder_prompt=decoder_prompt, ablate=ablate, report=report
        )

    def drawn(shown: Any, given: dict[str, Any]) -> WorkedGraph:
        return worked(graph.graph(shown), given["least"], given["pin"] or (), given["whole"] or ())

    def as_graph(shelf: Shelf, shown: Any, given: dict[str, Any]) -> str:
        return site.part(
            "worked.html", graph=drawn(shown, given), least=given["least"], wide=WIDE, high=TALL,
            toggled=lambda name, id: f"?{_query(_toggled(given, name, id))}",
            neuron=lambda address: site.href(shelf, "neurons", address),
        )  # fmt: skip

    @questions.put(
        "/runs/{run}/graph", "graph.html", as_graph, lambda shown, given: drawn(shown, given).to_dict(),
        of=lambda given: (
            EXPLAIN, explain,
            _alike(given, "run", "prompt", "target", "foil") | {"ablate": 0, "decoder_prompt": ""},
        ),
    )  # fmt: skip
    def graph_of(
        run: str, prompt: LongText = "", target: Words = "",
        foil: Annotated[list[Words] | None, Query(max_length=MOST_FOILS)] = None,
        least: Annotated[float, Query(ge=0, le=1)] = 0.15,
        pin: Annotated[list[NodeName] | None, Query(max_length=MOST_NODES)] = None,
        whole: Annotated[list[NodeName] | None, Query(max_length=MOST_NODES)] = None,
    ) -> Callable[..., Any] | None:  # fmt: skip
        """The graph of a prediction to work with: links from a threshold on, nodes that are pinned, and what one of
        them leaves out opened."""
        return explain(run, prompt, target, foil)

    def explained(run: str, address: str) -> Response:
        """Where a neuron acts in the predictions that were taken apart last."""
        shelf = site.library[run]
        neuron = shelf.run.parse(address)
        rows = [row for kept in site.desk.recent(shelf.run) for row in _acts(kept, neuron)]
        return site.html(Answer("explained.html", dict, {"rows": rows}))

    put_hidden(questions.app, "/runs/{run}/neurons/{address}/explained", explained, explained, light=True)

    async def graph_file(request: Request, **given: Any) -> Response:
        answer = await live.awaited(questions.ask(EXPLAIN, explain, given), request.is_disconnected)
        text = await asyncio.to_thread(lambda: written.as_json(graph.graph(cast("Explanation", answer))))
        headers = {"content-disposition": 'attachment; filename="graph.json"'}
        return Response(text, media_type="application/json", headers=headers)

    put_waiting(questions.app, f"{EXPLAIN}/graph", explain, graph_file)


def _add_texts(questions: _Questions) -> None:
    site = questions.site

    @questions.put(
        "/runs/{run}/text", "text.html",
        lambda shelf, shown, given: _with_tokens(site.inside(shown, shelf), shown, given),
    )  # fmt: skip
    def text(
        run: str, text: LongText = "", context: Annotated[str, Query(pattern="^[0-9]{0,15}$")] = "",
        neurons: Words = "", decoder_prompt: LongText = "",
    ) -> Callable[..., Any] | None:  # fmt: skip
        """A text of one's own, or a context of the run by its number: neurons along it, or the most unusual ones at
        each of its tokens."""
        addresses = neurons.replace(",", " ").split() or None
        if not (text or context):
            return None
        number = int(context) if context else None
        return lambda opened, report: opened.trace(
            text, addresses, context=number, decoder_prompt=decoder_prompt, report=report
        )

    @questions.put("/runs/{run}/steer", "steer.html")
    def steer(
        run: str, prompt: LongText = "", neuron: Words = "",
        factor: Annotated[float, Query(ge=-1e6, le=1e6)] = 0.0, value: Annotated[float, Query(ge=-1e6, le=1e6)] = 0.0,
        length: Annotated[int, Query(ge=1, le=100)] = 24,
    ) -> Callable[..., Any] | None:  # fmt: skip
        """What the model writes with a neuron removed, scaled or set, beside what it writes as it is."""
        if not (prompt and neuron):
            return None
        change = {"factor": factor, "value": value, "length": length}
        return lambda opened, report: opened.steer(prompt, neuron.strip(), **change, report=report)


def _add_neurons(questions: _Questions) -> None:
    @questions.put("/runs/{run}/shade", "shade.html")
    def shade(
        run: str, neuron: Words = "", triggers: Annotated[int, Query(ge=1, le=50)] = 12
    ) -> Callable[..., Any] | None:
        """A neuron's triggers with the coefficient of every token around them, which the model reads again."""
        if not neuron:
            return None
        return lambda opened, report: opened.shaded(neuron.strip(), examples=triggers, report=report)

    @questions.put("/runs/{run}/related", "related.html")
    def related(
        run: str, neuron: Words = "", count: Annotated[int, Query(ge=1, le=100)] = 10
    ) -> Callable[..., Any] | None:
        """Neurons that are near to one by their weights: by value, by key, before it and after it; chance beside."""
        return (
            (lambda opened, report: opened.related(neuron.strip(), count=count, report=report))
            if neuron
            else None
        )

    @questions.put("/runs/{run}/test", "test.html")
    def test(
        run: str, neuron: Words = "", pattern: Words = "",
        sign: Annotated[str, Query(pattern="^[+-]?$")] = "",
    ) -> Callable[..., Any] | None:  # fmt: skip
        """A claim about a neuron, tested both ways on text that was not used to find it."""
        if not (neuron and pattern):
            return None
        if pattern.strip().startswith("file:"):
            raise QueryError("testing a pattern: this server reads no files; use `mnemoscope test`")
        return lambda opened, report: opened.test(neuron.strip(), pattern, sign=sign or None, report=report)


def _add_runs(questions: _Questions) -> None:
    site = questions.site

    def sections(shelf: Shelf, drawn: Any, given: dict[str, Any]) -> str:
        return site.part("sections.html", sections=drawn, paths=shelf.run.path, shelf=shelf)

    @questions.put(
        "/runs/{run}/compare", "compare.html", sections, lambda drawn, given: as_data(drawn), model=False
    )
    def compare(run: str, other: Words = "", only: Words = COMPARED) -> Callable[..., Any] | None:
        """Two runs of one model or text: which triggers neurons keep, and figures side by side."""
        if not other:
            return None
        second = site.library[other].run
        return lambda opened, report: compared(opened, second, only, report)


def _toggled(given: dict[str, Any], name: str, id: str) -> dict[str, Any]:
    """The parameters with a node in a list, or without it if it was there."""
    held = given[name] or []
    return given | {name: [other for other in held if other != id] if id in held else [*held, id]}


def _alike(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names}


def _query(given: dict[str, Any]) -> str:
    """The parameters of a question as they stand in an address."""
    told = {name: value for name, value in given.items() if name != "run" and value not in (None, "")}
    return urlencode(told, doseq=True)


def _acts(kept: live.Answered, neuron: NeuronId) -> Iterator[dict[str, Any]]:
    """What a neuron does in a prediction: nothing in an answer of another kind."""
    told = kept.answer
    if not hasattr(told, "contrasts"):
        return
    explanation = cast("Explanation", told)
    about = {"address": kept.address, "prompt": explanation.prompt, "target": explanation.target.piece}
    of = (pl.col("layer") == neuron.layer) & (pl.col("neuron") == neuron.neuron)
    for row in explanation.neurons.filter(of).iter_rows(named=True):
        yield about | {name: row[name] for name in ("coefficient", "increase", "leave_one_out")}
        return
    below = (pl.col("query_layer") == neuron.layer) & (pl.col("query_unit") == neuron.neuron)
    switched = explanation.queries.filter((pl.col("kind") == "neuron") & below)
    if switched.height:
        ids = switched.select("layer", "neuron").unique(maintain_order=True).rows()
        cells = kept.run.manifest.model.cells
        yield about | {"switched": [str(cells.id(*address)) for address in ids]}


def _with_choices(inside: str, shown: Explanation, given: dict[str, Any], words: Vocabulary) -> str:
    """An explanation whose likely tokens lead to their own, and to the one against each."""
    foils = [text for text in given["foil"] or () if text]
    kept = {name: given[name] for name in ("prompt", "decoder_prompt", "ablate") if given[name]}

    def address(target: str, against: list[str]) -> str:
        return "?" + urlencode(kept | {"target": target, "foil": against}, doseq=True)

    leads: list[tuple[str, str] | None] = []
    for token, piece in shown.predictions.select("token", "piece").iter_rows():
        if not _typed(words, piece, token):
            leads.append(None)
            continue
        others = [text for text in foils if text != piece]
        chosen = token == shown.target.token or len(others) < len(foils) or len(foils) == MOST_FOILS
        against = "" if chosen else address(given["target"], [*foils, piece])
        leads.append((address(piece, others), against))
    return lowered.chosen(inside, leads)


def _typed(words: Vocabulary, piece: str, token: int) -> bool:
    """Whether a token is what its text is read as: part of a character is not, and neither is one without a text."""
    return bool(piece) and token in words.ids(piece)


def _with_tokens(inside: str, shown: Trace, given: dict[str, Any]) -> str:
    """A text whose tokens lead to the most unusual neurons at each."""
    kept = {name: given[name] for name in ("text", "context", "decoder_prompt") if given[name]}
    return lowered.tokens_lead(inside, f"?{urlencode(kept)}" if shown.neurons else "")


async def _stream(question: live.LiveQuestion, lower: Callable[[Any], str]) -> AsyncIterator[str]:
    """What is said of a question, as server-sent events; an asker who goes away stops it."""
    try:
        async for event in live.told(question):
            if event is None:
                yield ": still here\n\n"
            elif event.kind == "answer":
                yield _event("answer", await asyncio.to_thread(lower, event.value))
            elif event.kind == "progress":
                yield _event("progress", event.value._asdict())
            else:
                yield _event(event.kind, event.value)
    finally:
        question.stop()


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"
