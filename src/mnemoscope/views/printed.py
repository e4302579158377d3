"""What the terminal prints, as the elements of a page: lines are paragraphs, and tables are tables.

What is drawn of blocks, a distribution or a curve, is left as the terminal draws it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from typing import Any

from markupsafe import Markup, escape
from rich.columns import Columns
from rich.console import Console, Group
from rich.padding import Padding
from rich.protocol import rich_cast
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mnemoscope.display import as_text
from mnemoscope.views.glosses import termed
from mnemoscope.views.terminal import ATTENTION, BLOCKS, BLUE, FFN, ORANGE, Fitted, Room

WIDTH = 100  # columns of what is fitted to a width
_COLOURS = {BLUE: "blue", ORANGE: "orange", ATTENTION: "violet", FFN: "teal"}  # variables of the pages
_DRAWN = re.compile(f"[{BLOCKS.strip()}]{{2}}")  # one alone may be a token
_STYLES = Console(file=StringIO(), force_jupyter=False, _environ={})  # which knows what a style is called


def elements(printed: Any) -> Markup:
    """HTML of something that rich prints."""
    return Markup("\n").join(_lowered(printed))


def _lowered(printed: Any) -> Iterator[Markup]:
    printed = rich_cast(printed)
    if isinstance(printed, Fitted):
        for line in printed.lines(Room(WIDTH, coloured=True)):
            yield from _lowered(line)
    elif isinstance(printed, Group | Columns):
        for renderable in printed.renderables:
            yield from _lowered(renderable)
    elif isinstance(printed, Padding):
        yield Markup('<div class="in">{}</div>').format(elements(printed.renderable))
    elif isinstance(printed, Table):
        yield from _table(printed)
    elif isinstance(printed, str | Text):
        text = Text.from_markup(printed) if isinstance(printed, str) else printed
        if _DRAWN.search(text.plain):
            yield _as_drawn(text)
        elif text.plain.strip():
            yield _paragraph(text)
    else:
        yield _as_drawn(printed)


def _paragraph(text: Text) -> Markup:
    """One that is bold throughout heads what follows."""
    heads = Style.parse(text.style).bold if isinstance(text.style, str) else text.style.bold
    plain = Text("").join([text])
    plain.rstrip()
    return Markup("<p{}>{}</p>").format(Markup(' class="head"') if heads else "", _inline(plain))


def _table(table: Table) -> Iterator[Markup]:
    cells = [list(column.cells) for column in table.columns]
    if len(cells) == 1 and not _headings(table):  # lines one below the other
        for cell in cells[0]:
            yield from _lowered(cell)
        return
    if any(isinstance(cell, str | Text) and _DRAWN.search(str(cell)) for column in cells for cell in column):
        yield _as_drawn(table)
        return
    names = _headings(table)
    rows = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<td{}>{}</td>").format(_class(column.justify), _cell(cell, column.style, row.style))
                for column, cell in zip(table.columns, cells_of_row, strict=True)
            )
        )
        for row, cells_of_row in zip(table.rows, zip(*cells, strict=True), strict=True)
    ]
    head = Markup("")
    if names:
        head = Markup("<thead><tr>{}</tr></thead>").format(
            Markup("").join(
                Markup('<th scope="col"{}>{}</th>').format(_class(column.justify), termed(name))
                if name
                else Markup("<td></td>")
                for column, name in zip(table.columns, names, strict=True)
            )
        )
    label = f"table: {', '.join(filter(None, names))}" if names else "table"
    yield Markup(
        '<div class="mn-scroll" tabindex="0" role="group" aria-label="{}"><table>{}<tbody>{}</tbody></table></div>'
    ).format(label, head, Markup("\n").join(rows))


def _headings(table: Table) -> list[str]:
    """Names of the columns; none if none has one."""
    names = [
        Text.from_markup(column.header).plain if isinstance(column.header, str) else str(column.header)
        for column in table.columns
    ]
    return names if table.show_header and any(names) else []


def _class(justify: str) -> Markup:
    return Markup(' class="n"') if justify == "right" else Markup("")


def _cell(cell: Any, *styles: Any) -> Markup:
    if not isinstance(cell, str | Text):
        return elements(cell)
    text = Text.from_markup(cell) if isinstance(cell, str) else cell.copy()
    for style in styles:
        if style:
            text.stylize_before(style)
    return _inline(text)


def _inline(text: Text) -> Markup:
    """A text with its weights and colours; nothing in it is markup."""
    runs = []
    for segment in text.render(_STYLES):
        marked = escape(segment.text)
        for wanted, opening, closing in _tags(segment.style) if segment.text.strip() else ():
            if wanted:
                marked = Markup(opening) + marked + Markup(closing)
        runs.append(marked)
    return Markup("").join(runs).strip()


def _tags(style: Style | None) -> Iterator[tuple[Any, str, str]]:
    style = style or Style.null()
    colour = style.color.get_truecolor().hex if style.color else ""
    classes = [name for name, wanted in (("mn-dim", style.dim), ("mark", style.reverse)) if wanted]
    classes += [_COLOURS[colour]] if colour in _COLOURS else []
    yield classes, f'<span class="{" ".join(classes)}">', "</span>"
    yield style.italic, "<i>", "</i>"
    yield style.bold, "<b>", "</b>"
    yield style.underline, "<u>", "</u>"


def _as_drawn(printed: Any) -> Markup:
    lines = as_text(printed, WIDTH).rstrip()
    return Markup('<pre class="mn-scroll" tabindex="0">{}</pre>').format(lines)
