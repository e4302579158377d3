"""A run for assistants: the questions of the atlas as tools of the Model Context Protocol, over standard input.

Every tool reads: none takes a path, none writes. Lists come in pages, since clients cut off long answers, and each says
what chance gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from mnemoscope.atlas import live
from mnemoscope.atlas.packages import imported
from mnemoscope.display import jsonable
from mnemoscope.errors import MnemoscopeError, QueryError
from mnemoscope.neuron import find

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.neuron.card import Example, NeuronCard
    from mnemoscope.neuron.find import Hits

MOST_ROWS = 200  # of an answer
SECONDS = 10.0  # that a query may take
WINDOW = (24, 8)  # tokens of text before and after the token that triggers
CLAIMS = 6  # that a card shows, the clearest, without their curves
TOKENS = 12  # that a card shows of what a neuron promotes and suppresses
EXPLAINED = (
    "prompt",
    "target",
    "foils",
    "predictions",
    "tokens",
    "neurons",
    "remainders",
)  # besides the text
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)

Count = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Layer = Annotated[int | None, Field(ge=0)]
Neurons = Annotated[list[str], Field(min_length=2, max_length=8)]
Contexts = Annotated[list[int], Field(min_length=1, max_length=20)]
Answer = TypeVar("Answer")


class ListPage(BaseModel):
    """One page of a list.

    cursor     to be given back for the next page; None on the last
    truncated  whether there is more
    null       what the numbers are to be read against
    """

    question: str
    null: str
    total: int
    rows: list[dict[str, object]]
    cursor: str | None = None
    truncated: bool = False


def create(run: Run, model: str | None = None) -> MCPServer[Any]:
    """The server of one run; questions to the model only if it is told where to load it from."""
    server: MCPServer[Any] = MCPServer(
        "mnemoscope", instructions=_instructions(run), version=metadata.version("mnemoscope")
    )
    tools: list[Callable[..., Any]] = [*_reading(run), *([_asking(run, model)] if model else [])]
    for tool in tools:
        server.add_tool(_refusing(tool), annotations=READS)

    @server.resource("run://manifest", mime_type="application/json")
    def manifest() -> str:
        """What the run is: model, text, options, tables."""
        return run.manifest.model_dump_json()

    @server.resource("neuron://{address}", mime_type="application/json")
    def neuron(address: str) -> dict[str, object]:
        """The card of a neuron."""
        try:
            return _card(run.neuron(address, examples=10, window=WINDOW))
        except MnemoscopeError as error:
            raise ResourceError(str(error)) from error

    return server


def _instructions(run: Run) -> str:
    manifest = run.manifest
    return (
        f"Feed-forward neurons of {manifest.model.id}, mined over {manifest.corpus.tokens:,} tokens of "
        f"{manifest.corpus.id}. A neuron is a key, which detects a pattern in the prefix, and a value, which writes a "
        "distribution over the next token. Each has an address such as L13N366. A neuron has triggers of both signs; "
        "at a negative coefficient its value writes what it otherwise suppresses. Read every count beside what chance "
        "gives (`null`, `expected`), and a pattern only with its verdict on held-out text."
    )


def _refusing(tool: Callable[..., Answer]) -> Callable[..., Answer]:
    """The tool, whose refusals are told to the assistant as they are told to people."""

    @functools.wraps(tool)
    def answer(*arguments: Any, **named: Any) -> Answer:
        imported()
        try:
            return tool(*arguments, **named)
        except MnemoscopeError as error:
            raise ToolError(str(error)) from error

    return answer


def _reading(run: Run) -> Sequence[Callable[..., Any]]:
    """The tools that need no model."""

    def run_info() -> dict[str, object]:
        """What this run is: model, text, layers, and its tables with their columns (for `sql`)."""
        manifest = run.manifest
        columns = {name: list(run.table(name).collect_schema()) for name in manifest.tables}
        return {
            "model": manifest.model.id,
            "layers": len(manifest.model.cells.sizes),
            "neurons": list(manifest.model.cells.sizes),
            "corpus": manifest.corpus.id,
            "tokens": manifest.corpus.tokens,
            "tables": columns,
            "measured": [
                row["name"] for row in run.measurements() if row["state"] in ("ready", "other sizes")
            ],
        }

    def find_neurons(
        promotes: str | None = None,
        suppresses: str | None = None,
        trigger: str | None = None,
        pattern: str | None = None,
        like: str | None = None,
        sort: str | None = None,
        ascending: bool = False,
        layer: Layer = None,
        limit: Count = 20,
        cursor: str | None = None,
    ) -> ListPage:
        """Find neurons by exactly one question: a token that they promote or suppress (spaces count: " Paris"), a
        text that triggers them, part of the name of a tested pattern, or an address whose triggers they share. `sort`
        orders by a statistic of the table `neurons` (kurtosis, max ...), alone or beside a question."""
        begin = _begin(cursor)
        hits = run.find(
            promotes=promotes, suppresses=suppresses, trigger=trigger, pattern=pattern, like=like, sort=sort,
            ascending=ascending, layer=layer, count=begin + limit,
        )  # fmt: skip
        return _page(hits, begin, limit)

    def neuron_card(neuron: str, triggers: Annotated[int, Field(ge=0, le=50)] = 10) -> dict[str, object]:
        """One neuron (L13N366): its triggers of both signs with the token marked by [[ ]], how its coefficient is
        distributed, what its value promotes and suppresses, and the tested claims about it."""
        return _card(run.neuron(neuron, examples=triggers, window=WINDOW))

    def compare_neurons(neurons: Neurons) -> dict[str, object]:
        """Two to eight neurons side by side: statistics, what each promotes, and which triggers pairs have in common,
        beside what would be common by chance."""
        cards = [run.neuron(address, examples=3, window=WINDOW) for address in neurons]
        named = [str(card.id) for card in cards]
        pairs: list[dict[str, object]] = []
        for place, name in enumerate(named):
            shared = run.find(like=name, count=find.ALL).rows.to_dicts()
            later = set(named[place + 1 :])
            pairs += [{"with": name, **row} for row in shared if str(row["neuron"]) in later]
        return {"neurons": [_card(card) for card in cards], "triggers_in_common": pairs}

    def patterns(layer: Layer = None, limit: Count = 20, cursor: str | None = None) -> ListPage:
        """The clearest tested patterns: what neurons detect, with precision, recall and verdict on held-out text."""
        begin = _begin(cursor)
        return _page(run.find(tested=True, layer=layer, count=begin + limit), begin, limit)

    def contexts(ids: Contexts) -> dict[str, object]:
        """The text of contexts (the numbers that stand at triggers), with the titles of their documents."""
        read = run.contexts(ids)
        documents = run.documents(sorted({context.document for context in read.values()}))
        words = run.vocabulary
        return {
            str(number): {
                "document": context.document,
                "title": documents[context.document].title,
                "start": context.start,
                "text": "".join(words.pieces(context.tokens.tolist())),
            }
            for number, context in read.items()
        }

    def sql(query: str, limit: Count = 50) -> ListPage:
        """One SELECT (DuckDB) over the tables of the run (`run_info` lists them); at most 200 rows and ten seconds."""
        rows = run.sql(query, most=limit + 1, seconds=SECONDS).to_dicts()
        more = len(rows) > limit
        null = "none: what you count yourself has no null beside it; null units stand in null_neurons"
        shown = rows[:limit]
        return ListPage(question=query, null=null, total=len(shown), rows=jsonable(shown), truncated=more)

    return run_info, find_neurons, neuron_card, compare_neurons, patterns, contexts, sql


def _asking(run: Run, model: str | None) -> Callable[..., Any]:
    desk = live.Desk(model)

    def explain(
        prompt: Annotated[str, Field(min_length=1, max_length=4000)],
        target: str | None = None,
        foils: Annotated[list[str] | None, Field(max_length=8)] = None,
    ) -> dict[str, object]:
        """Take a prediction apart: what layers, heads and neurons add to the log-probability (nats) of the next token,
        or of `target` (against `foils`): the account as text, and the neurons in it. Takes seconds to minutes."""
        answer = live.answered(
            desk.ask(run, lambda opened, report: opened.explain(prompt, target, foils or (), report=report))
        )
        told = {name: value for name, value in answer.to_dict().items() if name in EXPLAINED}
        return dict(jsonable({"text": str(answer), **told}))

    return explain


def _begin(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9:
        raise QueryError(f"reading on: {cursor!r} is no cursor; give the one of the page before")
    return int(cursor)


def _page(hits: Hits, begin: int, limit: int) -> ListPage:
    rows = hits.rows.slice(begin, limit)
    more = begin + limit < hits.total
    return ListPage(
        question=hits.question,
        null=hits.null,
        total=hits.total,
        rows=jsonable(rows.to_dicts()),
        cursor=str(begin + limit) if more else None,
        truncated=more,
    )


def _card(card: NeuronCard) -> dict[str, object]:
    """A card in few words: an assistant reads text, not lists of tokens."""
    whole = card.to_dict()
    for name in ("positive", "negative"):
        side = getattr(card, name)
        whole[name] = {**whole[name], "examples": [_example(example) for example in side.examples]}
    if card.claims:
        left = max(0, len(card.claims) - CLAIMS)
        claims = [
            {name: value for name, value in claim.items() if name != "curve"} for claim in whole["claims"]
        ]
        whole |= {"claims": claims[:CLAIMS], "claims_left_out": left}
    whole["between"] = [_example(example) for example in card.between]
    for name in ("promoted", "suppressed", "key_positive", "key_negative"):
        whole[name] = [
            {key: value for key, value in token.items() if key != "id"} for token in whole[name][:TOKENS]
        ]
    return dict(jsonable({name: value for name, value in whole.items() if value is not None}))


def _example(example: Example) -> dict[str, object]:
    text = f"{''.join(example.before)}[[{example.active}]]{''.join(example.after)}"
    return {
        "coefficient": example.coefficient,
        "text": text,
        "title": example.title,
        "context": example.context,
        "position": example.position,
    }
