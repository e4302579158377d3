"""An explanation in the terminal, through rich: 80 columns or more, with colour or without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import as_called
from mnemoscope.views import words
from mnemoscope.views.card import examples
from mnemoscope.views.explanation import wording
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import (
    NATS,
    ROUTER,
    Against,
    Ledger,
    Part,
    Sheet,
    Step,
    Switched,
    largest,
)
from mnemoscope.views.terminal import ATTENTION, FFN, ORANGE, Fitted, Room, block, listed, sign_style, table

if TYPE_CHECKING:
    from mnemoscope.prediction.explanation import Explanation

_CHART_ROWS = 5
SWITCHED, CAUSES = 4, 5  # neurons, and earlier vectors of each
_WIDE = 110  # from here on tables have their further columns
_FURTHER = ("chain", "logit")


def report(explanation: Explanation, rows: int | None = 10) -> Fitted:
    """The explanation, with at most `rows` parts in each table (half as many against a foil)."""
    return Fitted(partial(_lines, sheet(explanation, rows=rows)))


def _lines(page: Sheet, room: Room) -> RenderResult:
    width = room.width
    yield from _head(page, width)
    yield from _stream(page, width)
    yield from _account(page, width)
    if width >= _WIDE and "chain" in (*page.heads.columns, *page.neurons.columns):
        yield Text(f"\n{wording.CHAIN}", style="dim")
    for title, ledger in (("heads x sources", page.heads), ("neurons", page.neurons)):
        yield Text()
        yield Text(f"{title} (nats)", style="bold")
        yield _ledger(ledger, width)
    yield from _memories(page.neurons, room)
    yield Text(wording.DIFFER, style="dim")
    yield Text(wording.correlation_line(page) if page.ablated else wording.NOT_ABLATED, style="dim")
    for against in page.against:
        yield from _against(page, against, width)
    if page.switched:
        yield Text()
        yield Text(wording.UPSTREAM, style="bold")
        yield Text(wording.SWITCHED, style="dim")
        for neuron in page.switched[:SWITCHED]:
            yield _switched(neuron)
    yield from _cargo(page, width)
    yield Text()
    for line in page.method:
        yield Text(line, style="dim")
    yield Text(as_called(page.command), style="dim", overflow="fold")


def _head(page: Sheet, width: int) -> RenderResult:
    line, room = Text(), max(3 * width, 200)
    for tokens in (page.tokens[: page.encoded], page.tokens[page.encoded :]):
        before = "".join(token.text for token in tokens)
        if cell_len(before) > room:
            before = "…" + before[-room:]
        if tokens:
            line.append(" ⇒ " if line else "", style="dim").append("“").append(before).append("”", style="")
    if page.unread:
        line.append(" (unread: ", style="dim").append(page.unread[:width], style="dim").append(
            ")", style="dim"
        )
    line.append(" → ", style="dim").append(page.target.word.label, style=f"bold reverse {ORANGE}")
    yield line
    yield Text(page.headline, style="bold")
    yield Text(wording.headline_units(page), style="dim")
    yield Text(wording.verdict(page))
    yield _chips("masked" if page.masked else "next", list(map(wording.candidate, page.predictions)), width)
    if page.foils:
        yield _chips("foils", list(map(wording.candidate, page.foils)), width)
    yield Text(page.about, style="dim")
    for note in page.notes:
        yield Text(note, style="italic")


def _chips(name: str, texts: Sequence[str], width: int) -> Text:
    return listed(Text(f"{name}  ", style="dim"), texts, width, "not dim")


def _stream(page: Sheet, width: int) -> RenderResult:
    """Columns of eighth blocks, one for each point of the stream; coloured by what led there."""
    yield Text()
    yield Text("log p along the stream (nats)", style="bold")
    points = list(page.stream)
    indent = 8
    if len(points) > width - indent:  # too many layers for a column each: the ends of layers
        points = points[::2]
    points = points[: width - indent] if len(points) > width - indent else points
    wide = max(1, min(3, (width - indent) // len(points)))
    values = [point.log_probability for point in points]
    low, high = min(values), max(values)
    eighths = [
        1 + round((value - low) / (high - low) * (_CHART_ROWS * 8 - 1)) if high > low else 1
        for value in values
    ]
    for row in reversed(range(_CHART_ROWS)):
        mark = high if row == _CHART_ROWS - 1 else low if row == 0 else None
        line = Text(f"{'' if mark is None else wording.nats(mark, 2):>{indent - 2}}  ", style="dim")
        for point, size in zip(points, eighths, strict=True):
            line.append(block(size, row) * wide, style=f"not dim {_COLOUR[point.step]}")
        yield line
    yield _layer_axis([point.layer for point in points], indent, wide)
    yield Text(wording.stream_line(page), style="dim")
    key = Text()
    for name in ("attention", "FFN"):
        key.append("█ ", style=_COLOUR[name]).append(f"{name}   ", style="dim")
    yield key.append("one column a point: the embedding, then each in turn", style="dim")


_COLOUR = {"embedding": "dim", "attention": ATTENTION, "FFN": FFN}


def _layer_axis(layers: Sequence[int], indent: int, wide: int) -> Text:
    """Numbers of layers, or of every fifth, under their first columns."""
    cells = [" "] * (len(layers) * wide + 4)
    seen: set[int] = set()
    every = 5 if layers[-1] >= 10 else 1
    for index, layer in enumerate(layers):
        if layer not in seen and layer % every == 0:
            cells[index * wide : index * wide + len(str(layer))] = str(layer)
        seen.add(layer)
    return Text("layer".rjust(indent - 2) + "  " + "".join(cells).rstrip(), style="dim")


def _account(page: Sheet, width: int) -> RenderResult:
    yield Text()
    yield Text("what added it (nats, adds up)", style="bold")
    line = Text()
    for index, term in enumerate(page.account):
        last = index == len(page.account) - 1
        line.append(" = " if last else "   " if index else "", style="dim")
        line.append(f"{term.name} {wording.nats(term.nats, 2)}", style="bold" if last else "")
    yield line
    yield Text(wording.shown_line(page), style="dim")
    yield from _steps(page.steps, width)
    yield Text(wording.POINTS, style="dim")


def _steps(steps: Sequence[Step], width: int) -> RenderResult:
    up, down = largest(steps, 8)
    for name, chosen in (("most", up), ("against", down)):
        if chosen:
            yield _chips(
                f"{name:<7}", [f"{step.name} {wording.nats(step.nats, 2)}" for step in chosen], width
            )


def _ledger(ledger: Ledger, width: int) -> Table:
    """A table with its closing rows; further columns and tokens where there is room."""
    columns = [name for name in ledger.columns if width >= _WIDE or name not in _FURTHER]
    cells = [[wording.cell(name, part.values.get(name)) for name in columns] for part in ledger.rows]
    heads = [_HEADS.get(name, name) for name in columns]
    sizes = [
        max(len(text) for text in (*head.split("\n"), *column))
        for head, column in zip(heads, zip(*cells, strict=True), strict=True)
    ]
    first = min(
        max(cell_len(wording.part(part)) for part in ledger.rows), width - sum(sizes) - 2 * len(sizes)
    )
    room = width - first - sum(sizes) - 2 * len(sizes) - 6
    sides = _sides(ledger, room)
    drawn = table(
        ["", *heads, *sides], left=(0, *range(1 + len(heads), 1 + len(heads) + len(sides))), wraps=()
    )
    widths = (first, *sizes, *(room // len(sides) for _ in sides))
    for column, size in zip(drawn.columns, widths, strict=True):
        column.width = size
    for index, part in enumerate(ledger.rows):
        if index == ledger.skipped:
            drawn.add_row(Text("⋮", style="dim"))
        tokens = [_fit(getattr(part, side), room // len(sides)) for side in sides]
        drawn.add_row(_name(part), *(_number(part, name) for name in columns), *tokens)
    return drawn


_HEADS = {"leave-one-out": "leave-\none-out", "coefficient": "coeffi-\ncient", ROUTER: "router\nweight"}
_SIDES = ("promotes", "suppresses")


def _sides(ledger: Ledger, room: int) -> list[str]:
    """Which lists of tokens have a column: both, one or none."""
    present = [side for side in _SIDES if any(getattr(part, side) for part in ledger.parts)]
    return present[: min(room // 14, 1 if room < 56 else 2)] if room > 0 else []


def _name(part: Part) -> Text:
    return Text(wording.part(part), style={"total": "bold", "rest": "italic"}.get(part.kind, ""))


def _number(part: Part, name: str) -> Text:
    if part.kind != "part" and name not in part.values:
        return Text("")
    value = part.values.get(name)
    return Text(wording.cell(name, value), style=sign_style(value) if name in NATS else "")


def _fit(tokens: Sequence[str], room: int) -> Text:
    """As many whole tokens as there is room for; part of the first if it is too long."""
    text = listed(Text(), tokens, room)
    if tokens and not text:
        text.append(tokens[0])
    text.truncate(room, overflow="ellipsis")
    return text


def _memories(ledger: Ledger, room: Room) -> RenderResult:
    """The neurons of a table that a run knows, with two triggers each."""
    for part in ledger.parts:
        if part.memory is not None:
            head = Text(part.name, style="bold").append("  ")
            yield head.append(wording.memory(part.memory), style="not bold dim")
            yield examples(part.memory.triggers, room)


def _against(page: Sheet, against: Against, width: int) -> RenderResult:
    yield Text()
    yield Text(f"against {against.foil.name}", style="bold").append(" (nats)", style="bold")
    yield Text(wording.against_line(page, against), style="dim")
    yield from _steps(against.steps, width)
    ledgers = {"heads x sources": against.heads, "sources": against.sources, "neurons": against.neurons}
    for title, ledger in ledgers.items():
        yield Text(title, style="dim italic")
        yield _ledger(ledger, width)


def _switched(neuron: Switched) -> Table:
    """A neuron and the vectors that gave its coefficient, largest first and the remainder last."""
    names = ["", "share", "of the\ncoefficient", "nats", *(("gate", "up") if neuron.gated else ()), "inner"]
    drawn = table(names)
    drawn.columns[0].header = Text(neuron.name, style="bold")
    drawn.columns[0].min_width = 22
    for cause in neuron.shortened(CAUSES):
        branches = (cause.gate, cause.up) if neuron.gated else ()
        drawn.add_row(
            Text(wording.part(cause), style="italic" if cause.kind == "remainder" else ""),
            words.number(cause.share, sign=True),
            "–" if not neuron.coefficient else f"{100 * cause.share / neuron.coefficient:.0f} %",
            Text(wording.nats(cause.nats), style=sign_style(cause.nats)),
            *(words.number(value, sign=True) for value in branches),
            words.number(cause.inner, sign=True),
        )
    coefficient, increase = words.number(neuron.coefficient, sign=True), wording.nats(neuron.nats)
    drawn.add_row(Text("coefficient", style="bold"), coefficient, "100 %", increase)
    return drawn


def _cargo(page: Sheet, width: int) -> RenderResult:
    if page.cargo is None:
        return
    yield Text()
    yield Text(
        f"what attention {page.cargo.layer} carried from {wording.word(page.cargo.source)}", style="bold"
    )
    yield Text(wording.CARRIED, style="dim")
    for name in ("recomputed", "fixed"):
        lost = {point.point: getattr(point, name) for point in page.cargo.points}
        best = sorted(lost, key=lambda point: -abs(lost[point]))[:12]
        yield _chips(f"{name:<10}", [f"{point} {wording.nats(lost[point], 2)}" for point in best], width)
