"""An explanation as HTML: a fragment for notebooks, a page that needs nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment
from markupsafe import Markup

from mnemoscope.views.charts import svg
from mnemoscope.views.explanation import charts, graph, wording
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import Against, Places, PromptToken, Sheet, Word, anchor, largest
from mnemoscope.views.page import environment

if TYPE_CHECKING:
    from mnemoscope.prediction.explanation import Explanation

ROWS = 16  # of each table; what they leave out is in its closing rows
_SHORT = 18  # characters of a token in the graph


def fragment(explanation: Explanation) -> str:
    """An explanation with its style, to be put into another page: what a notebook displays."""
    # A notebook holds several: the same addresses must not be there twice.
    named = zlib.crc32(f"{explanation.model} {explanation.prompt} {explanation.target}".encode())
    return _render("explanation_fragment.html", explanation, f"mn{named:08x}-")


def page(explanation: Explanation) -> str:
    """An explanation as a whole page, with all figures."""
    return _render("explanation_page.html", explanation)


def _render(template: str, explanation: Explanation, prefix: str = "") -> str:
    lowered = sheet(explanation, rows=ROWS)
    pictures = {
        name: Markup(svg(chart, charts.described(name, lowered)))
        for name, chart in charts.drawn(lowered).items()
    }
    return (
        _environment()
        .get_template(template)
        .render(page=lowered, pictures=pictures, drawn=graph.graph(lowered), places=Places(lowered, prefix))
    )


@cache
def _environment() -> Environment:
    """The templates of `views.page`, with the wording of an explanation."""
    templates = environment().overlay()
    templates.filters = templates.filters | {
        call.__name__: call
        for call in (
            wording.attention_line, wording.correlation_line, graph.headings, wording.grid_line,
            wording.headline_units, largest, wording.memory, wording.nats, wording.probability,
            wording.shown_line, wording.stream_line, wording.switched_line, wording.unit, wording.verdict,
        )
    }  # fmt: skip
    templates.filters |= {
        "anchor": anchor,
        "cell": _cell,
        "against_line": _against_line,
        "reach": _reach,
        "short": _short,
    }
    templates.globals = templates.globals | {
        "about_attention": wording.ATTENTION,
        "differ": wording.DIFFER,
        "not_ablated": wording.NOT_ABLATED,
        "about_switched": wording.SWITCHED,
        "about_carried": wording.CARRIED,
        "chain_note": wording.CHAIN,
        "points_note": wording.POINTS,
    }
    return templates


def _cell(value: float | None, name: str) -> str:
    return wording.cell(name, value)


def _against_line(against: Against, lowered: Sheet) -> str:
    return wording.against_line(lowered, against)


def _reach(tokens: Sequence[PromptToken]) -> float:
    """What the darkest token of the prompt stands for."""
    return max((token.nats for token in tokens), key=abs, default=0.0)


def _short(word: Word) -> str:
    text = word.label if len(word.label) <= _SHORT else word.label[: _SHORT - 1] + "…"
    return text if word.position is None else f"{text} @{word.position}"
