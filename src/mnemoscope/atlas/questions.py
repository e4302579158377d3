"""Pages whose answers take a while, most of them the model's: a form, and the answer as it comes."""

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Query, Response
from fastapi.responses import StreamingResponse
from markupsafe import Markup

from mnemoscope.atlas import examples, live
from mnemoscope.atlas.drawn import as_data, compared
from mnemoscope.atlas.library import Shelf
from mnemoscope.atlas.site import Answer, LongText, Site, Words, asked_for, put_data, put_hidden
from mnemoscope.errors import QueryError
from mnemoscope.exchange import graph
from mnemoscope.exchange.written import as_json

Asked = Callable[..., Callable[..., Any] | None]
EXPLAIN = "/runs/{run}/explain"
COMPARED = "glance"  # what two runs are compared by at first, besides their triggers


def add_questions(app: FastAPI, site: Site) -> None:
    """Put the questions under their addresses."""
    question = partial(_question, app, site)

    @question(EXPLAIN)
    def explain(
        run: str, prompt: LongText = "", target: Words = "",
        foil: Annotated[list[Words] | None, Query(max_length=8)] = None, decoder_prompt: LongText = "",
    ) -> Callable[..., Any] | None:  # fmt: skip
        """A prediction, taken apart: what added to the log-probability of its token, or of it against others."""
        foils = [text for text in foil or () if text]
        if not prompt:
            return None
        return lambda opened, report: opened.explain(
            prompt, target or None, foils, decoder_prompt=decoder_prompt, report=report
        )

    def graph_file(**given: Any) -> Response:
        text = as_json(graph.graph(live.answered(_ask(site, EXPLAIN, explain, given))))
        headers = {"content-disposition": 'attachment; filename="graph.json"'}
        return Response(text, media_type="application/json", headers=headers)

    put_hidden(app, f"{EXPLAIN}/graph", explain, graph_file)

    @question("/runs/{run}/text")
    def text(
        run: str, text: LongText = "", neurons: Words = "", decoder_prompt: LongText = ""
    ) -> Callable[..., Any] | None:
        """A text of one's own: neurons along it, or the most unusual ones at each of its tokens."""
        addresses = neurons.replace(",", " ").split() or None
        if not text:
            return None
        return lambda opened, report: opened.trace(
            text, addresses, decoder_prompt=decoder_prompt, report=report
        )

    @question("/runs/{run}/steer")
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

    @question("/runs/{run}/test")
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

    def sections(drawn: Any, shelf: Shelf) -> Markup:
        return Markup(site.part("sections.html", sections=drawn, paths=shelf.run.path, shelf=shelf))

    @question("/runs/{run}/compare", sections, as_data, model=False)
    def compare(run: str, other: Words = "", only: Words = COMPARED) -> Callable[..., Any] | None:
        """Two runs of one model or text: which triggers neurons keep, and figures side by side."""
        if not other:
            return None
        second = site.library[other].run
        return lambda opened, report: compared(opened, second, only, report)


def _ask(site: Site, path: str, asked: Asked, given: dict[str, Any], model: bool = True) -> live.LiveQuestion:
    compute = asked(**given)
    if compute is None:
        raise QueryError("asking: nothing was asked; fill in the form")
    return site.desk.ask(site.library[given["run"]].run, compute, asked_for(path, given), model=model)


def _question(
    app: FastAPI,
    site: Site,
    path: str,
    lowered: Callable[[Any, Shelf], Markup] | None = None,
    data: Callable[[Any], Any] = lambda answer: answer.to_dict(),
    *,
    model: bool = True,
) -> Callable[[Asked], Asked]:
    """Put a question under an address: a page with its form, the events of its answer, and its data.

    What is decorated makes of the parameters what is to be computed, or None while too little is given.

    lowered, data  an answer as a part of the page, and as JSON
    model          whether the model is needed; without it, packages may be that are not `light`
    """
    name = path.rpartition("/")[2]

    def put(asked: Asked) -> Asked:
        def as_page(run: str, **given: Any) -> Response:
            shelf = site.library[run]
            shown = {
                "shelf": shelf,
                "given": given,
                "asked": asked(run=run, **given) is not None,
                "query": urlencode({name: value for name, value in given.items() if value is not None}, True),
            }
            if model:
                named = given.get("neuron") or given.get("neurons") or ""
                shown |= {
                    "lacks": site.desk.lacks(shelf.run) or examples.refused(name, shelf.run.manifest.model),
                    "examples": () if shown["asked"] else examples.known(name, shelf, named),
                    "page": name,
                }
            return site.html(Answer(f"{name}.html", dict, shown))

        def as_events(**given: Any) -> Response:
            shelf = site.library[given["run"]]
            events = _stream(
                _ask(site, path, asked, given, model), lambda answer: (lowered or site.inside)(answer, shelf)
            )
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"cache-control": "no-store"}
            )

        put_data(
            app,
            f"{path}.json",
            asked,
            lambda **given: data(live.answered(_ask(site, path, asked, given, model))),
        )
        put_hidden(app, f"{path}/events", asked, as_events)
        put_hidden(app, path, asked, as_page, light=model)
        return asked

    return put


async def _stream(question: live.LiveQuestion, lower: Callable[[Any], Markup]) -> AsyncIterator[str]:
    """What is said of a question, as server-sent events; an asker who goes away stops it."""
    try:
        async for event in live.told(question):
            if event is None:
                yield ": still here\n\n"
            elif event.kind == "answer":
                yield _event("answer", str(lower(event.value)))
            elif event.kind == "progress":
                yield _event("progress", event.value._asdict())
            else:
                yield _event(event.kind, event.value)
    finally:
        question.stop()


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"
