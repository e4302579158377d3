"""Cards and tables in the terminal, through rich: 80 columns or more, with colour or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import as_called, command
from mnemoscope.views import claims
from mnemoscope.views import claims as claims_terminal
from mnemoscope.views import words as cards

if TYPE_CHECKING:
    from pathlib import Path

    from mnemoscope.neuron.card import Example, KeyToken, NeuronCard, Side
    from mnemoscope.neuron.find import Hits
    from mnemoscope.neuron.striking import Pick
    from mnemoscope.records import Kept
    from mnemoscope.results import Verification
    from mnemoscope.run.reading import Run

BLUE, ORANGE = "#5f9fd6", "#e08a3c"  # negative, positive: readable on a dark and on a light ground
LEAST_BEFORE = 12  # tokens of text before the active one, whatever the width
CHART_ROWS = 4
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class card:  # noqa: N801 - called like a function: text.card(found)
    """A card for the terminal, with at most `triggers` of each polarity, and why it was chosen if it was.

    Active tokens are coloured, and bracketed where there is no colour.
    """

    card: NeuronCard
    triggers: int = 8
    pick: Pick | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        card, width = self.card, options.max_width
        if self.pick:
            yield Text(cards.reason(self.pick), style="italic")
        yield from _head(card, width)
        yield from _readings(card, width)
        yield Text()
        yield from _distribution(card, width)
        yield from claims_terminal.section(card.claims, width)
        bracket = console.color_system is None or console.no_color
        for side in card.sides:
            yield Text()
            yield from _side(card, side, self.triggers, width, bracket)
        if card.between:
            yield Text()
            yield Text("in between: at most one example from each tenth of the range", style="bold")
            yield _examples(card, card.between, width, bracket)
        yield Text()
        yield from _details(card, width)


def plain(renderable: RenderableType, width: int = 80) -> str:
    """Any card or table as text without colour; `NeuronCard` too, since a card lowers itself."""
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as out:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in out.get().splitlines()) + "\n"


def found(result: Hits) -> RenderableType:
    """What a search found: the question, the null it is to be read against, and a table."""
    grid = Table.grid()
    grid.add_row(Text(result.question, style="bold"))
    grid.add_row(Text(result.null, style="dim"))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in result.rows.columns:
        table.add_column(_HEADINGS.get(name, name), justify="left" if name in _WORDS else "right")
    for row in result.rows.iter_rows(named=True):
        table.add_row(*(Text(_cell(name, value)) for name, value in row.items()))
    grid.add_row(table)
    return grid


_HEADINGS = {"purity": "precision", "coverage": "recall"}
_WORDS = ("neuron", "token", "sign", "about", "pattern", "verdict")


def heading(run: Run) -> RenderableType:
    """Model and corpus of a run, in two lines."""
    lines = Text(cards.model_line(run.manifest), style="bold")
    return lines.append("\n").append(cards.corpus_line(run.manifest), style="not bold dim")


def families(names: Sequence[str]) -> RenderableType:
    """The model families that are known, in columns."""
    return Columns([Text(name) for name in names], padding=(0, 3), equal=True, column_first=True)


def kept(entries: Sequence[Kept], folder: Path, *, freed: bool = False) -> RenderableType:
    """What lies in the cache folder, or was freed from it: a row each, and what to do."""
    whole = cards.size(sum(entry.bytes for entry in entries))
    if not entries:
        return Text(f"Nothing is kept in {folder}.")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("kind")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for entry in entries:
        table.add_row(entry.kind, cards.size(entry.bytes), Text(entry.what))
    told = (
        f"{whole} freed in {folder}."
        if freed
        else f"{whole} in {folder}. It can all be made again; to free it: "
    )
    return Group(table, Text(told if freed else told + command("cache", "--clear"), style="dim"))


def anatomy(facts: Mapping[str, object]) -> RenderableType:
    """What is known of a model, a line each."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _cell(name, value))
    return table


def verification(result: Verification) -> RenderableType:
    """A verdict, and a row for each comparison."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("", "compared", "differing", "largest difference"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("", overflow="fold")
    for check in result.checks:
        differing = Text(f"{check.differing:,}", style="bold" if check.differing else "")
        table.add_row(
            check.name, f"{check.compared:,}", differing, cards.number(check.largest), Text(check.note)
        )
    verdict = "identical" if result.identical else "no difference" if result.passed else "differences found"
    grid = Table.grid()
    grid.add_row(Text(f"verification: {verdict}", style="bold"))
    grid.add_row(table)
    return grid


def _cell(name: str, value: object) -> str:
    if name == "verdict":
        return claims.SHORT.get(str(value), str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return cards.share(value) if name.endswith("fraction") else cards.number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _head(card: NeuronCard, width: int) -> RenderResult:
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    line.add_column(no_wrap=True, justify="right")
    around = "  ".join([*(f"< {n}" for n in [card.previous] if n), *(f"{n} >" for n in [card.next] if n)])
    beside = width - len(str(card.id)) - len(cards.where(card)) - len(around) - 4
    line.add_row(
        Text(str(card.id), style="bold"), cards.where(card), Text(around if beside > 0 else "", style="dim")
    )
    yield line
    if note := cards.state_note(card):
        yield Text(note, style="bold")
    if card.spelling:
        yield Text(card.spelling, style="dim")


def _readings(card: NeuronCard, width: int) -> RenderResult:
    for name, tokens in cards.readings(card):
        yield _token_line(name, [token.text for token in tokens], width)
    if note := cards.readings_note(card):
        yield Text(note, style="dim")


def _token_line(name: str, tokens: Sequence[str], width: int) -> Text:
    """A name and as many whole tokens as fit on the line."""
    line = Text(f"{name}  ")
    for i, token in enumerate(tokens):
        piece = f"{' | ' if i else ''}{token}"
        if line.cell_len + cell_len(piece) > width:
            break
        line.append(" | " if i else "", style="dim").append(token, style="bold")
    return line


def _distribution(card: NeuronCard, width: int) -> RenderResult:
    usual = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    usual.add_column("")
    own, median = [], []
    for fact in cards.facts(card):
        usual.add_column(fact.name, justify="right")
        own.append(Text(fact.value, style="bold"))
        median.append(Text(fact.usual or "", style="dim"))
    usual.add_row("coefficient", *own)
    usual.add_row(Text("layer median", style="dim"), *median)
    yield usual
    yield from _chart(card, min(width, 100))


def _chart(card: NeuronCard, width: int) -> RenderResult:
    """Columns of eighth blocks, their height log(1 + count), with marks where triggers begin."""
    top_label = f"{max(card.histogram.counts, default=0):,}"
    indent = max(len(top_label), 5) + 2
    columns = cards.columns(card, width - indent)
    if columns is None:
        return
    top_label = f"{max(columns.counts):,.0f}"
    zero = round(-columns.left / columns.width)
    eighths = [max(round(h * CHART_ROWS * 8), 1 if h else 0) for h in columns.heights]
    for row in reversed(range(CHART_ROWS)):
        label = top_label if row == CHART_ROWS - 1 else "count" if row == CHART_ROWS - 2 else "(log)"
        line = Text(f"{label if row > 0 else '0':>{indent - 2}}  ", style="dim")
        bars = "".join(_BLOCKS[min(max(e - 8 * row, 0), 8)] for e in eighths)
        line.append(bars[:zero], style=f"not dim {BLUE}").append(bars[zero:], style=f"not dim {ORANGE}")
        yield line
    yield _axis(card, columns, indent)
    notes = [cards.histogram_note(card), cards.threshold_note(card)]
    yield Text("\n".join(" " * indent + note for note in notes if note), style="dim")


def _axis(card: NeuronCard, columns: cards.Columns, indent: int) -> Text:
    """Under the chart: a mark at each trigger threshold, and below the numbers of both ends and zero."""
    size = len(columns.counts)
    marks, numbers = [" "] * size, [" "] * size
    for side in card.sides:
        if side.threshold is not None:
            marks[min(int(columns.place(side.threshold) * size), size - 1)] = "▲"
    low, high = cards.number(card.statistics.min), cards.number(card.statistics.max)
    zero = min(round(columns.place(0.0) * size), size - 1)
    for text, at in ((low, 0), (high, size - len(high)), ("0", zero)):
        spot = slice(max(at, 0), max(at, 0) + len(text))
        # A number that would touch another is left out: both ends stand in the table above.
        if not "".join(numbers[max(spot.start - 1, 0) : spot.stop + 1]).strip():
            numbers[spot] = text
    lines = [" " * indent + "".join(cells) for cells in (marks, numbers)]
    return Text("\n".join(line for line in lines if line.strip()), style="dim")


def _side(card: NeuronCard, side: Side, most: int, width: int, bracket: bool) -> RenderResult:
    shown = side.examples[:most]
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    head.add_row(
        Text(cards.side_title(side, len(shown)), style="bold"),
        Text(cards.quadrants(side) or "", style="dim"),
    )
    yield head
    if shown:
        yield _examples(card, shown, width, bracket)


def _examples(card: NeuronCard, examples: Sequence[Example], width: int, bracket: bool) -> Table:
    numbers = [cards.number(example.coefficient, sign=True) for example in examples]
    room = max(len(n) for n in numbers)
    table = Table.grid(padding=(0, 1, 0, 1))
    table.add_column(justify="right", no_wrap=True, min_width=room)
    table.add_column(overflow="fold")
    for example, coefficient in zip(examples, numbers, strict=True):
        style = ORANGE if example.coefficient > 0 else BLUE
        table.add_row(Text(coefficient, style=style), example_line(example, width - room - 5, bracket, style))
    return table


def example_line(example: Example, room: int, bracket: bool, style: str) -> Text:
    """Text before, the active token, the next one and the source: one line if twelve tokens fit on it."""
    end = Text()
    head, active = cards.active(example)
    end.append(head).append(f"[{active}]" if bracket else active, style=f"bold reverse {style}")
    end.append(" → ", style="dim").append(cards.following(example))
    end.append(f"   {cards.source(example)}", style="dim")
    used, start = cell_len(end.plain) + 2, len(example.before)
    while start > 0:
        used += cell_len(example.before[start - 1])
        if used > room and len(example.before) - start >= LEAST_BEFORE:
            break
        start -= 1
    text = Text("…" if start or example.left_out[0] else "", style="")
    text.append("".join(example.before[start:]).lstrip() if start else "".join(example.before))
    return text.append(end)


def _details(card: NeuronCard, width: int) -> RenderResult:
    yield Text("details", style="bold")
    table = Table.grid(padding=(0, 2, 0, 1))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for fact in cards.details(card):
        table.add_row(fact.name, fact.value, f"layer median {fact.usual}" if fact.usual else "")
    yield table
    for name, tokens in (("positive", card.key_positive), ("negative", card.key_negative)):
        if tokens:
            yield _token_line(f" {cards.KEY_TITLE}, most {name}:", [_key(t) for t in tokens], width)
    yield Text(f" {as_called(card.command)}", style="dim", overflow="fold")


def _key(token: KeyToken) -> str:
    return f"{token.text} {cards.number(token.coefficient, sign=True)}"
