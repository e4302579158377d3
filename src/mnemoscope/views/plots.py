"""Figures: altair to SVG through vl-convert, in one visual language.

Every figure uses the colours named here and no other, so that a page can restyle them for a dark ground by
attribute (`templates/gallery.css` does), and so that a figure saved on its own is right on white paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemoscope.analyses.overview import Overview

INK, DIM, LINE = "#1d1c1a", "#68655f", "#e3e1db"
SIZE = "#2f6f6a"  # the sequential scale is this one colour at rising opacity
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
            {"x": c.x, "x2": c.x2, "y": c.y + 3, "y2": c.y2 + 3, "neurons": c.neurons} for c in layer.cells
        ]
        yield svg({**spec, "datasets": {"cells": rows, "normal": [{"y": 3}]}})


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
        .mark_rect(color=SIZE, aria=False)
        .encode(
            x=alt.X("x:Q", scale=x, axis=alt.Axis(values=_powers(overview.reach), format="~s", title=None)),
            x2="x2:Q",
            y=alt.Y("y:Q", scale=y, axis=ticks),
            y2="y2:Q",
            opacity=alt.Opacity("neurons:Q", scale=shade, legend=None),
        )
    )
    normal = (
        alt.Chart(alt.NamedData("normal"))
        .mark_rule(color=INK, strokeWidth=0.75, aria=False)
        .encode(y=alt.Y("y:Q", scale=y))
    )
    return alt.layer(cells, normal).properties(width=_PANEL[0], height=_PANEL[1]).to_dict()


def svg(spec: dict[str, Any]) -> str:
    """A Vega-Lite specification as an SVG element to put into a page: the common look, no outside address."""
    import vl_convert

    text = vl_convert.vegalite_to_svg({**spec, "config": LOOK})
    return _TAG.sub(_plain, text)


_TAG = re.compile(
    r"""<(?:[^"'>]|"[^"]*"|'[^']*')*>"""
)  # labels are text: what stands between tags is left alone
# An SVG inside a page needs no namespaces, and so the page names no address at all.
_LEFT_OUT = re.compile(r"""\s(xmlns(:xlink)?|aria-[a-z]+|role|pointer-events|font-family)="[^"]*\"""")


def _plain(tag: re.Match[str]) -> str:
    """A tag without what a page does not need, its numbers in hundredths."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", _LEFT_OUT.sub("", tag[0]))


def _powers(ends: tuple[float, float]) -> list[float]:
    """The powers of ten between two ends, or of two where fewer than two of ten fit."""
    for base in (10.0, 2.0):
        found = [base**n for n in range(-40, 41) if ends[0] <= base**n <= ends[1]]
        if len(found) > 1:
            return found
    return []


LOOK = {
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": DIM,
        "labelFontSize": 9,
        "tickColor": LINE,
        "domainColor": LINE,
        "gridColor": LINE,
        "grid": False,
        "tickSize": 3,
        "labelPadding": 2,
        "titleColor": DIM,
        "titleFontSize": 10,
        "titleFontWeight": "normal",
    },
}
