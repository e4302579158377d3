"""Figures: altair to SVG through vl-convert, in one visual language, and in the colours of all pages, light and dark.

A chart is specified in the light colours, so that its file is right on white paper; `svg` puts the page's variables in
their place, so that the same picture follows the page into the dark, and refuses one that would stay as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from mnemoscope.views.words import number

if TYPE_CHECKING:
    import altair as alt

    from mnemoscope.neuron.overview import Cell, Overview

# What charts use: name of the variable, light, dark. No light colour is there twice.
CHARTS = {
    "panel": ("#ffffff", "#1a1b1e"),
    "ink": ("#1d1c1a", "#e7e5e0"),
    "dim": ("#68655f", "#a5a29a"),
    "line": ("#e3e1db", "#303236"),
    "chance": ("#b9b5ac", "#5a5852"),
    "blue": ("#1f64ad", "#7db4ec"),
    "orange": ("#b4520a", "#f0a561"),
    "teal": ("#2f6f6a", "#6cc4ba"),
    "violet": ("#8557a8", "#be97e0"),
}
COLOURS = CHARTS | {
    "paper": ("#fdfdfc", "#131416"),
    "wash": ("#f3f2ee", "#25272b"),
    "shadow": ("#00000030", "#000000d0"),
    "blue-wash": ("#1f64ad", "#5698de"),
    "orange-wash": ("#d86a14", "#e2842e"),
}


def light(name: str) -> str:
    """A colour as it is on white paper."""
    return COLOURS[name][0]


INK, DIM, LINE, PANEL = map(light, ("ink", "dim", "line", "panel"))
SIZE = light("teal")  # the sequential scale is this one colour at rising opacity
_PANEL = (150, 104)
_KURTOSIS_TICKS = (0, 10, 100, 1_000, 10_000, 100_000)


def strips(overview: Overview) -> Iterator[str]:
    """SVG of each layer's neurons: largest |coefficient| against excess kurtosis, shaded by number.

    Both axes are logarithmic (kurtosis counted from -3) and the same for all layers of the overview; the
    line is the normal distribution's kurtosis.
    """
    spec = _strip(overview)  # validated once; only its rows differ between layers
    for layer in overview.layers:
        rows = [
            {"x": c.x, "x2": c.x2, "y": c.y + 3, "y2": c.y2 + 3, "neurons": c.neurons, "said": _cell(c)}
            for c in layer.cells
        ]
        drawn = {**spec, "datasets": {"cells": rows, "normal": [{"y": 3}]}}
        yield svg(
            drawn,
            f"layer {layer.layer}: excess kurtosis against largest |coefficient|, {layer.neurons:,} neurons",
        )


def _cell(cell: Cell) -> str:
    """What a cell of a strip holds, in words."""
    return f"{cell.neurons:,}: {number(cell.x)} to {number(cell.x2)}, {number(cell.y)} to {number(cell.y2)}"


def _strip(overview: Overview) -> dict[str, Any]:
    import altair as alt

    top = max(overview.kurtosis[1] + 3, 4.0)
    x = alt.Scale(type="log", domain=list(overview.reach), nice=False)
    y = alt.Scale(type="log", domain=[min(overview.kurtosis[0] + 3, 2.5), top], nice=False)
    ticks = alt.Axis(
        values=[tick + 3 for tick in _KURTOSIS_TICKS if tick + 3 <= top],
        labelExpr="format(datum.value - 3, '~s')",
        title=None,
    )
    most = max((cell.neurons for layer in overview.layers for cell in layer.cells), default=1)
    shade = alt.Scale(type="log", domain=[1, max(most, 2)], range=[0.22, 1])
    cells = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(color=SIZE)
        .encode(
            x=alt.X("x:Q", scale=x, axis=alt.Axis(values=_powers(overview.reach), format="~s", title=None)),
            x2="x2:Q",
            y=alt.Y("y:Q", scale=y, axis=ticks),
            y2="y2:Q",
            opacity=alt.Opacity("neurons:Q", scale=shade, legend=None),
            description="said:N",
        )
    )
    normal = (
        alt.Chart(alt.NamedData("normal"))
        .mark_rule(color=INK, strokeWidth=0.75, aria=False)
        .encode(y=alt.Y("y:Q", scale=y))
    )
    return alt.layer(cells, normal).properties(width=_PANEL[0], height=_PANEL[1]).to_dict()


def svg(drawn: alt.Chart | dict[str, Any], said: str) -> str:
    """A chart, or its specification, as an SVG element to put into a page: the common look, no outside address.

    said  what the picture shows, for those who do not see it
    """
    return placed(rendered(drawn), said)


def rendered(drawn: alt.Chart | dict[str, Any]) -> str:
    """A chart, or its specification, drawn in the common look as SVG; the background is left to the page."""
    import vl_convert

    spec = drawn if isinstance(drawn, dict) else drawn.to_dict(validate=False)
    return str(vl_convert.vegalite_to_svg({**spec, "config": LOOK}))


def placed(text: str, said: str) -> str:
    """What was rendered as an element of a page, with what it shows said; under the mouse each mark says its values."""
    return _TAG.sub(_plain, text).replace("<svg", f'<svg role="img" aria-label="{escape(said)}"', 1)


def as_file(text: str, kind: str) -> bytes:
    """What was rendered as a file of its own: `svg` or `pdf`, on white."""
    import vl_convert

    tag = _TAG.search(text)
    assert tag is not None and tag[0].startswith("<svg"), "a picture begins with its own tag"
    white = f'{text[: tag.end()]}<rect width="100%" height="100%" fill="white"/>{text[tag.end() :]}'
    return bytes(vl_convert.svg_to_pdf(white)) if kind == "pdf" else white.encode()


# Labels are text: what stands between tags is left alone.
_TAG = re.compile(r"""<(?:[^"'>]|"[^"]*"|'[^']*')*>""")
# An SVG inside a page needs no namespaces, and so the page names no address at all.
_LEFT_OUT = re.compile(r"""\s(xmlns(:xlink)?|aria-[a-z]+|role|pointer-events|font-family)="[^"]*\"""")
# What Vega says of a mark to those who do not see it; of a line or an area it is the first of its points.
_VALUES = re.compile(
    r'aria-label="(?P<values>[^"]+)" role="graphics-symbol" aria-roledescription="(?P<mark>[^"]*)"'
)
_MANY = ("line", "area", "trail", "axis", "legend", "title", "header")
_DIGITS = re.compile(r"-?\d+\.\d{3,}(?:e[-+]?\d+)?")
_COLOUR = re.compile(r'(fill|stroke)="(?!none"|transparent"|url)([^"]*)"')
_VARIABLES = {shade: name for name, (shade, _) in CHARTS.items()}


def _plain(tag: re.Match[str]) -> str:
    """A tag without what a page does not need, its numbers in hundredths, its colours those of the page."""
    needed = _COLOUR.sub(_variable, _LEFT_OUT.sub("", tag[0]))
    needed = re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", needed)
    said = _VALUES.search(tag[0])
    if said is None or said["mark"].startswith(_MANY) or not needed.endswith("/>"):
        return needed
    values = _DIGITS.sub(lambda digits: number(float(digits[0])), said["values"])
    name = needed[1:].partition(" ")[0]
    return f"{needed[:-2]}><title>{values}</title></{name}>"


def _variable(colour: re.Match[str]) -> str:
    attribute, value = colour.groups()
    assert value in _VARIABLES, f"{value} is no colour of the theme"
    return f'{attribute}="var(--{_VARIABLES[value]})"'


def _powers(ends: tuple[float, float]) -> list[float]:
    """The powers of ten between two ends, or of two where fewer than two of ten fit."""
    for base in (10.0, 2.0):
        powers = [base**n for n in range(-40, 41) if ends[0] <= base**n <= ends[1]]
        if len(powers) > 1:
            return powers
    return []


def data(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows of a chart, kept in its specification."""
    import altair as alt

    return alt.InlineData(values=list(rows))


def series(channel: Any, column: str, kinds: Mapping[str, Any], legend: Any = None) -> Any:
    """A channel (`alt.Color`, `alt.Shape` ...) that gives each series, by its name in a column, its own kind."""
    import altair as alt

    scale = alt.Scale(domain=list(kinds), range=list(kinds.values()))
    return channel(f"{column}:N", scale=scale, legend=legend)


def cycled(kinds: Sequence[Any], count: int) -> list[Any]:
    """So many kinds, from the first again where they do not suffice."""
    return [kinds[index % len(kinds)] for index in range(count)]


_TITLE = {"titleColor": DIM, "titleFontSize": 10, "titleFontWeight": "normal"}
LOOK = {
    "background": None,
    "view": {"stroke": None},
    "title": {"color": INK, "subtitleColor": DIM},
    "legend": {"labelColor": INK, "labelFontSize": 10, "symbolStrokeColor": DIM, **_TITLE},
    "header": {"labelColor": INK, "titleColor": DIM},
    "text": {"color": INK},
    "axis": {
        "labelColor": DIM,
        "labelFontSize": 9,
        "tickColor": LINE,
        "domainColor": LINE,
        "gridColor": LINE,
        "grid": False,
        "tickSize": 3,
        "labelPadding": 2,
        **_TITLE,
    },
}
