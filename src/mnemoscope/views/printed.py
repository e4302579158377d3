"""What the terminal prints, as HTML: its weights and colours, in those of the pages, light and dark."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from mnemoscope.views.explanation.terminal import ATTENTION, FFN
from mnemoscope.views.page import environment
from mnemoscope.views.terminal import BLUE, ORANGE

WIDTH = 100  # columns
# Plain, dim and inverted text are what a terminal makes of its own two colours.
_GROUND, _PLAIN, _DIM = "#ffffff", "#000000", "#7f7f7f"
_VARIABLES = {
    _GROUND: "panel", _PLAIN: "ink", _DIM: "dim", BLUE: "blue", ORANGE: "orange",
    ATTENTION: "violet", FFN: "teal",
}  # fmt: skip
_COLOUR = re.compile(r"((?:background-|decoration-)?color: )(#[0-9a-f]{6})")
_STYLE = re.compile(r'(?<=<span style=")[^"]*"')


def fragment(printed: Any) -> str:
    """What rich prints, to be put into another page: what a notebook displays."""
    return environment().get_template("printed_fragment.html").render(printed=_lines(printed))


def page(printed: Any) -> str:
    """The same as a whole page that needs nothing else."""
    return environment().get_template("printed_page.html").render(printed=_lines(printed))


def _lines(printed: Any) -> Markup:
    console = Console(
        file=StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor", _environ={}
    )
    console.print(printed)
    black, white = (0, 0, 0), (255, 255, 255)
    code = console.export_html(
        theme=TerminalTheme(white, black, [black] * 8), inline_styles=True, code_format="{code}"
    )
    return Markup(_STYLE.sub(_themed, code))


def _themed(style: re.Match[str]) -> str:
    """A style in the page's variables; what is mixed of other colours is read as plain text.

    Text on a ground of its own is inverted: the terminal leaves its colour out.
    """
    named = _COLOUR.sub(lambda colour: f"{colour[1]}var(--{_VARIABLES.get(colour[2], 'ink')})", style[0])
    return f"{named[:-1]}; color: var(--panel){named[-1]}" if "background-color" in named else named
