"""What everything in the terminal is drawn with: colours, tables, lists cut to the width, columns of blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.display import as_text

BLUE, ORANGE = "#5f9fd6", "#e08a3c"  # negative, positive: readable on a dark and on a light ground
ATTENTION, FFN = "#a274c9", "#3f9b94"  # as on the page, and as readable
NARROWEST = 32  # columns; of fewer (COLUMNS=1) the terminal breaks lines where it likes
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Room:
    """What a terminal offers: columns, and whether it has colours."""

    width: int
    coloured: bool


@dataclass(frozen=True)
class Fitted:
    """Something to print whose lines depend on the room there is for them."""

    lines: Callable[[Room], RenderResult]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        yield from self.lines(Room(max(options.max_width, NARROWEST), coloured))


def plain(renderable: RenderableType, width: int = 80) -> str:
    """What rich prints as text without colour; `NeuronCard` too, since a card lowers itself."""
    return as_text(renderable, width)


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[str | Text]] = (),
    *,
    left: Collection[int] = (0,),
    wraps: Collection[int] | None = None,
    gap: int = 2,
    style: str | None = None,
) -> Table:
    """A table without lines: numbers to the right, words to the left.

    left   columns of words
    wraps  columns whose cells may be broken; those of words if None
    gap    columns of space between two
    style  of every row
    """
    wraps = left if wraps is None else wraps
    drawn = Table(box=None, header_style="dim", padding=(0, gap, 0, 0), pad_edge=False)
    for index, name in enumerate(names):
        drawn.add_column(
            name,
            justify="left" if index in left else "right",
            no_wrap=index not in wraps,
            overflow="fold" if index in wraps else "ellipsis",
        )
    for row in rows:
        drawn.add_row(*row, style=style)
    return drawn


def listed(
    line: Text, tokens: Iterable[str], width: int, style: str = "", between: str | None = None
) -> Text:
    """The line, and behind it as many whole tokens as fit; what stands between them is styled alike if None."""
    for index, token in enumerate(tokens):
        bar = " | " if index else ""
        if line.cell_len + cell_len(bar + token) > width:
            break
        if between is None:
            line.append(bar + token, style=style)
        else:
            line.append(bar, style=between).append(token, style=style)
    return line


def block(eighths: int, row: int = 0) -> str:
    """What a column of so many eighths shows in a row of the chart, counted from below."""
    return BLOCKS[min(max(eighths - 8 * row, 0), 8)]


def sign_style(value: float | None) -> str:
    """The colour of a number's sign; none for nothing and for zero."""
    return "" if not value else ORANGE if value > 0 else BLUE
