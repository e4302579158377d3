"""An explanation in the terminal, through rich: 80 columns or more, with colour or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import as_called
from mnemoscope.views import words as cards
from mnemoscope.views.explanation import wording
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import NATS, Against, Ledger, Part, Sheet, Step, Switched, largest
from mnemoscope.views.terminal import BLUE, ORANGE, example_line

if TYPE_CHECKING:
    from mnemoscope.prediction.explanation import Explanation

ATTENTION, FFN = "#a274c9", "#3f9b94"  # as on the page: readable on a dark and on a light ground
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CHART_ROWS = 5
SWITCHED, CAUSES = 4, 5  # neurons, and earlier vectors of each
_WIDE = 110  # from here on tables have their further columns
_FURTHER = ("chain", "logit")


@dataclass(frozen=True)
class report:  # noqa: N801 - called like a function: terminal.report(explanation)
    """The explanation, with at most `rows` parts in each table (half as many against a foil)."""

    explanation: Explanation
    rows: int | None = 10

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        page, width = sheet(self.explanation, rows=self.rows), options.max_width
        yield from _head(page, width)
        yield from _stream(page, width)
        yield from _account(page, width)
        if width >= _WIDE and "chain" in (*page.heads.columns, *page.neurons.columns):
            yield Text(f"\n{wording.CHAIN}", style="dim")
        yield from _section("heads x sources", _ledger(page.heads, width))
        yield from _section("neurons", _ledger(page.neurons, width))
        bracket = console.color_system is None or console.no_color
        yield from _memories(page.neurons, width, bracket)
        yield Text(wording.DIFFER, style="dim")
        yield Text(wording.correlation_line(page) if page.ablated else wording.NOT_ABLATED, style="dim")
        for one in page.against:
            yield from _against(page, one, width)
        if page.switched:
            yield Text()
            yield Text(wording.UPSTREAM, style="bold")
            yield Text(wording.SWITCHED, style="dim")
            for neuron in page.switched[:SWITCHED]:
                yield _switched(neuron, width)
        yield from _cargo(page, width)
        yield Text()
        for line in page.method:
            yield Text(line, style="dim")
        yield Text(as_called(page.command), style="dim", overflow="fold")


def _head(page: Sheet, width: int) -> RenderResult:
    before = "".join(token.text for token in page.tokens)
    room = max(3 * width, 200)
    if cell_len(before) > room:
        before = "…" + before[-room:]
    line = Text("“").append(before).append("”", style="")
    if page.unread:
        line.append(" (unread: ", style="dim").append(page.unread[:width], style="dim").append(
            ")", style="dim"
        )
    line.append(" → ", style="dim").append(page.target.word.label, style=f"bold reverse {ORANGE}")
    yield line
    yield Text(page.headline, style="bold")
    yield Text(wording.headline_units(page), style="dim")
    yield Text(wording.verdict(page))
    yield _chips("next", [wording.candidate(one) for one in page.predictions], width)
    if page.foils:
        yield _chips("foils", [wording.candidate(one) for one in page.foils], width)
    yield Text(page.about, style="dim")
    for note in page.notes:
        yield Text(note, style="italic")


def _chips(name: str, words: Sequence[str], width: int) -> Text:
    """A name and as many whole words as fit on the line."""
    line = Text(f"{name}  ", style="dim")
    for i, one in enumerate(words):
        text = f"{' | ' if i else ''}{one}"
        if line.cell_len + cell_len(text) > width:
            break
        line.append(text, style="not dim")
    return line


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
            block = _BLOCKS[min(max(size - 8 * row, 0), 8)] * wide
            line.append(block, style=f"not dim {_COLOUR[point.step]}")
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
    for i, one in enumerate(page.account):
        last = i == len(page.account) - 1
        line.append(" = " if last else "   " if i else "", style="dim")
        line.append(f"{one.name} {wording.nats(one.nats, 2)}", style="bold" if last else "")
    yield line
    yield Text(wording.shown_line(page), style="dim")
    yield from _steps(page.steps, width)
    yield Text(wording.POINTS, style="dim")


def _steps(steps: Sequence[Step], width: int) -> RenderResult:
    up, down = largest(steps, 8)
    for name, chosen in (("most", up), ("against", down)):
        if chosen:
            yield _chips(f"{name:<7}", [f"{one.name} {wording.nats(one.nats, 2)}" for one in chosen], width)


def _section(title: str, body: Table) -> RenderResult:
    yield Text()
    yield Text(f"{title} (nats)", style="bold")
    yield body


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
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="ellipsis", no_wrap=True, width=first)
    for head, size in zip(heads, sizes, strict=True):
        table.add_column(head, justify="right", no_wrap=True, width=size)
    sides = _sides(ledger, room)
    for side in sides:
        table.add_column(side, no_wrap=True, width=room // len(sides))
    for index, part in enumerate(ledger.rows):
        if index == ledger.skipped:
            table.add_row(Text("⋮", style="dim"))
        extra = [_fit(getattr(part, _SIDES[side]), room // len(sides)) for side in sides]
        table.add_row(_name(part), *(_number(part, name) for name in columns), *extra)
    return table


_HEADS = {"leave-one-out": "leave-\none-out", "coefficient": "coeffi-\ncient"}
_SIDES = {"promotes": "promotes", "suppresses": "suppresses"}


def _sides(ledger: Ledger, room: int) -> list[str]:
    """Which lists of tokens have a column: both, one or none."""
    there = [side for side, name in _SIDES.items() if any(getattr(part, name) for part in ledger.parts)]
    return there[: min(room // 14, 1 if room < 56 else 2)] if room > 0 else []


def _name(part: Part) -> Text:
    return Text(wording.part(part), style={"total": "bold", "rest": "italic"}.get(part.kind, ""))


def _number(part: Part, name: str) -> Text:
    if part.kind != "part" and name not in part.values:
        return Text("")
    value = part.values.get(name)
    return Text(wording.cell(name, value), style=_sign(value) if name in NATS else "")


def _fit(tokens: Sequence[str], room: int) -> Text:
    """As many whole tokens as there is room for; part of the first if it is too long."""
    text = ""
    for token in tokens:
        longer = f"{text} | {token}" if text else token
        if text and cell_len(longer) > room:
            break
        text = longer
    found = Text(text)
    found.truncate(room, overflow="ellipsis")
    return found


def _memories(ledger: Ledger, width: int, bracket: bool) -> RenderResult:
    """The neurons of a table that a run knows, with two triggers each."""
    for part in ledger.parts:
        if part.memory is None:
            continue
        head = Text(part.name, style="bold").append("  ")
        yield head.append(wording.memory(part.memory), style="not bold dim")
        table = Table.grid(padding=(0, 1, 0, 1))
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for example in part.memory.triggers:
            number, style = cards.number(example.coefficient, sign=True), _sign(example.coefficient)
            line = example_line(example, width - len(number) - 5, bracket, style)
            table.add_row(Text(number, style=style), line)
        yield table


def _against(page: Sheet, one: Against, width: int) -> RenderResult:
    yield Text()
    yield Text(f"against {one.foil.name}", style="bold").append(" (nats)", style="bold")
    yield Text(wording.against_line(page, one), style="dim")
    yield from _steps(one.steps, width)
    for title, ledger in (("heads x sources", one.heads), ("sources", one.sources), ("neurons", one.neurons)):
        yield Text(title, style="dim italic")
        yield _ledger(ledger, width)


def _switched(one: Switched, width: int) -> Table:
    """A neuron and the vectors that gave its coefficient, largest first and the remainder last."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(Text(one.name, style="bold"), overflow="fold", min_width=22)
    for name in ("share", "of the\ncoefficient", "nats", *(("gate", "up") if one.gated else ()), "inner"):
        table.add_column(name, justify="right", no_wrap=True)
    for cause in one.shortened(CAUSES):
        branches = (cause.gate, cause.up) if one.gated else ()
        table.add_row(
            Text(wording.cause(cause), style="italic" if cause.kind == "remainder" else ""),
            cards.number(cause.share, sign=True),
            "–" if not one.coefficient else f"{100 * cause.share / one.coefficient:.0f} %",
            Text(wording.nats(cause.nats), style=_sign(cause.nats)),
            *(cards.number(value, sign=True) for value in branches),
            cards.number(cause.inner, sign=True),
        )
    increase = wording.nats(one.nats)
    table.add_row(
        Text("coefficient", style="bold"), cards.number(one.coefficient, sign=True), "100 %", increase
    )
    return table


def _cargo(page: Sheet, width: int) -> RenderResult:
    if page.cargo is None:
        return
    yield Text()
    yield Text(
        f"what attention {page.cargo.layer} carried from {wording.word(page.cargo.source)}", style="bold"
    )
    yield Text(wording.CARRIED, style="dim")
    for name in ("recomputed", "fixed"):
        best = sorted(page.cargo.points, key=lambda one: -abs(getattr(one, name)))
        yield _chips(
            f"{name:<10}", [f"{one.point} {wording.nats(getattr(one, name), 2)}" for one in best[:12]], width
        )


def _sign(value: float | None) -> str:
    return "" if not value else ORANGE if value > 0 else BLUE
