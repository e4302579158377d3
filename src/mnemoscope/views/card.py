"""The card of a neuron in the terminal, 80 columns wide or more, with colour or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import as_called
from mnemoscope.views import claims, words
from mnemoscope.views.terminal import BLUE, ORANGE, Fitted, Room, block, listed, sign_style, table

if TYPE_CHECKING:
    from mnemoscope.neuron.card import Example, KeyToken, NeuronCard, Side
    from mnemoscope.neuron.striking import Pick

LEAST_BEFORE = 12  # tokens of text before the active one, whatever the width
CHART_ROWS = 4


def card(card: NeuronCard, triggers: int = 8, pick: Pick | None = None) -> Fitted:
    """A card for the terminal, with at most `triggers` of each polarity, and why it was chosen if it was.

    Active tokens are coloured, and bracketed where there is no colour.
    """
    return Fitted(lambda room: _lines(card, triggers, pick, room))


def _lines(card: NeuronCard, triggers: int, pick: Pick | None, room: Room) -> RenderResult:
    if pick:
        yield Text(words.reason(pick), style="italic")
    yield from _head(card, room.width)
    yield from _readings(card, room.width)
    yield Text()
    yield from _distribution(card, room.width)
    yield from claims.section(card.claims, room.width)
    for side in card.sides:
        yield Text()
        yield from _side(side, triggers, room)
    if card.between:
        yield Text()
        yield Text("in between: at most one example from each tenth of the range", style="bold")
        yield examples(card.between, room)
    yield Text()
    yield from _details(card, room.width)


def _head(card: NeuronCard, width: int) -> RenderResult:
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    line.add_column(no_wrap=True, justify="right")
    around = "  ".join([*(f"< {n}" for n in [card.previous] if n), *(f"{n} >" for n in [card.next] if n)])
    beside = width - len(str(card.id)) - len(words.where(card)) - len(around) - 4
    line.add_row(
        Text(str(card.id), style="bold"), words.where(card), Text(around if beside > 0 else "", style="dim")
    )
    yield line
    if note := words.kind_note(card):
        yield Text(note)
    if note := words.state_note(card):
        yield Text(note, style="bold")
    if card.spelling:
        yield Text(card.spelling, style="dim")


def _readings(card: NeuronCard, width: int) -> RenderResult:
    for name, tokens in words.readings(card):
        yield _tokens(name, [token.text for token in tokens], width)
    if note := words.readings_note(card):
        yield Text(note, style="dim")


def _tokens(name: str, tokens: Sequence[str], width: int) -> Text:
    return listed(Text(f"{name}  "), tokens, width, "bold", between="dim")


def _distribution(card: NeuronCard, width: int) -> RenderResult:
    facts = words.facts(card)
    own: list[str | Text] = ["coefficient", *(Text(fact.value, style="bold") for fact in facts)]
    usual = [Text("layer median", style="dim"), *(Text(fact.usual or "", style="dim") for fact in facts)]
    yield table(["", *(fact.name for fact in facts)], [own, usual], wraps=range(len(facts) + 1))
    yield from _chart(card, min(width, 100))


def _chart(card: NeuronCard, width: int) -> RenderResult:
    """Columns of eighth blocks, their height log(1 + count), with marks where triggers begin."""
    top_label = f"{max(card.histogram.counts, default=0):,}"
    indent = max(len(top_label), 5) + 2
    columns = words.columns(card, width - indent)
    if columns is None:
        return
    top_label = f"{max(columns.counts):,.0f}"
    zero = round(-columns.left / columns.width)
    eighths = [max(round(height * CHART_ROWS * 8), 1 if height else 0) for height in columns.heights]
    for row in reversed(range(CHART_ROWS)):
        label = top_label if row == CHART_ROWS - 1 else "count" if row == CHART_ROWS - 2 else "(log)"
        line = Text(f"{label if row > 0 else '0':>{indent - 2}}  ", style="dim")
        bars = "".join(block(height, row) for height in eighths)
        line.append(bars[:zero], style=f"not dim {BLUE}").append(bars[zero:], style=f"not dim {ORANGE}")
        yield line
    yield _axis(card, columns, indent)
    notes = [words.histogram_note(card), words.threshold_note(card)]
    yield Text("\n".join(" " * indent + note for note in notes if note), style="dim")


def _axis(card: NeuronCard, columns: words.Columns, indent: int) -> Text:
    """Under the chart: a mark at each trigger threshold, and below the numbers of both ends and zero."""
    size = len(columns.counts)
    marks, numbers = [" "] * size, [" "] * size
    for side in card.sides:
        if side.threshold is not None:
            marks[min(int(columns.place(side.threshold) * size), size - 1)] = "▲"
    low, high = words.number(card.statistics.min), words.number(card.statistics.max)
    zero = min(round(columns.place(0.0) * size), size - 1)
    for text, column in ((low, 0), (high, size - len(high)), ("0", zero)):
        span = slice(max(column, 0), max(column, 0) + len(text))
        # A number that would touch another is left out: both ends stand in the table above.
        if not "".join(numbers[max(span.start - 1, 0) : span.stop + 1]).strip():
            numbers[span] = text
    lines = [" " * indent + "".join(cells) for cells in (marks, numbers)]
    return Text("\n".join(line for line in lines if line.strip()), style="dim")


def _side(side: Side, most: int, room: Room) -> RenderResult:
    shown = side.examples[:most]
    head = Table.grid(expand=True, padding=(0, 1, 0, 0))
    title = words.side_title(side, len(shown))
    head.add_column(no_wrap=True)
    head.add_column(justify="right", ratio=1)
    head.add_row(Text(title, style="bold"), Text(words.quadrants(side) or "", style="dim"))
    yield head
    if shown:
        yield examples(shown, room)


def examples(shown: Sequence[Example], room: Room) -> Table:
    """Triggers, each behind its coefficient."""
    numbers = [words.number(example.coefficient, sign=True) for example in shown]
    size = max(map(len, numbers), default=0)
    table = Table.grid(padding=(0, 1, 0, 1))
    table.add_column(justify="right", no_wrap=True, min_width=size)
    table.add_column(overflow="fold")
    for example, coefficient in zip(shown, numbers, strict=True):
        style = sign_style(example.coefficient)
        line = _example_line(example, room.width - size - 5, not room.coloured, style)
        table.add_row(Text(coefficient, style=style), line)
    return table


def _example_line(example: Example, room: int, bracket: bool, style: str) -> Text:
    """Text before, the active token, the next one and the source: one line if twelve tokens fit on it.

    Of an encoder, which reads both sides, some text behind it instead of the next token.
    """
    end = Text()
    head, active = words.active(example)
    end.append(head).append(f"[{active}]" if bracket else active, style=f"bold reverse {style}")
    if example.whole:
        end.append(words.behind(example))
    else:
        end.append(" → ", style="dim").append(words.following(example))
    end.append(f"   {words.source(example)}", style="dim")
    used, start = cell_len(end.plain) + 2, len(example.before)
    while start > 0:
        used += cell_len(example.before[start - 1])
        if used > room and len(example.before) - start >= LEAST_BEFORE:
            break
        start -= 1
    text = Text("…" if start or example.left_out[0] else "")
    text.append("".join(example.before[start:]).lstrip() if start else "".join(example.before))
    return text.append(end)


def _details(card: NeuronCard, width: int) -> RenderResult:
    yield Text("details", style="bold")
    table = Table.grid(padding=(0, 2, 0, 1))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for fact in words.details(card):
        table.add_row(fact.name, fact.value, f"layer median {fact.usual}" if fact.usual else "")
    yield table
    for name, tokens in (("positive", card.key_positive), ("negative", card.key_negative)):
        if tokens:
            yield _tokens(f" {words.KEY_TITLE}, most {name}:", [_key(token) for token in tokens], width)
    yield Text(f" {as_called(card.command)}", style="dim", overflow="fold")


def _key(token: KeyToken) -> str:
    return f"{token.text} {words.number(token.coefficient, sign=True)}"
