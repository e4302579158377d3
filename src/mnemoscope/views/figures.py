"""Findings as Altair charts in one visual language.

A grey band and a dashed line are what chance gives; a tinted band or a thin rule is an interval; series differ in
shape or dash besides colour. A chart stands on its own in a notebook and as SVG or PDF on white paper.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from mnemoscope.views.charts import DIM, INK, LINE, PANEL, SIZE, cycled, data, light, series

if TYPE_CHECKING:
    import altair as alt

    from mnemoscope.studies.findings.finding import Figure, Finding

# In the order in which series take them; blue and orange first, as they differ for everybody.
SERIES = tuple(map(light, ("blue", "orange", "teal", "violet", "dim", "ink")))
NULL = light("chance")
_NUMBER = ",.8~g"  # without a precision, Vega chooses one that turns 10 into 1e+1
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_WIDTH, _HEIGHT = 660, 220
_PANEL = (300, 150)
_COLUMNS = 2  # panels side by side
_LAYERS = 200  # numbers of x that are taken to stand a step apart, at most
_SEEN, _FOUND = 80, 600  # points of a line that are drawn, and that can be pointed at
_SHADES = 11  # of the key of a heat map
_LETTER = 5.8  # pixels of a letter of an axis title


def chart(finding: Finding) -> alt.Chart | None:
    """The figure of a finding; None if it has none or nothing to draw."""
    figure, frame = finding.figure, finding.frame
    if figure is None or frame.height == 0:
        return None
    import altair as alt

    if figure.facet is None:
        return _panel(_Drawing(figure, frame, (_WIDTH, _HEIGHT), frame))
    names = frame[figure.facet].unique(maintain_order=True).to_list()
    panels = [
        _panel(_Drawing(figure, frame.filter(pl.col(figure.facet) == name), _PANEL, frame, title=str(name)))
        for name in names
    ]
    # One legend above all panels.
    rows = [
        alt.hconcat(*panels[i : i + _COLUMNS], spacing=28).resolve_scale(color="shared")
        for i in range(0, len(panels), _COLUMNS)
    ]
    return alt.vconcat(*rows, spacing=18).resolve_scale(color="shared")


class _Drawing:
    """One panel: its rows, and the scales it shares with the others."""

    def __init__(
        self,
        figure: Figure,
        rows: pl.DataFrame,
        size: tuple[int, int],
        everything: pl.DataFrame,
        title: str = "",
    ) -> None:
        import altair as alt

        self.figure, self.size, self.title = figure, size, title
        self.rows = rows.select(figure.columns())
        self.base = alt.Chart(data(_plain(self.rows)))
        # Bars of several series stand beside each other, over numbers too; elsewhere they would be stacked.
        beside = figure.kind == "bar" and figure.color is not None
        self.discrete = beside or everything.schema[figure.x] in (pl.String, pl.Boolean, pl.Categorical)
        self.every = rows if figure.free else everything
        self.names = _names(figure, everything)

    def x(self, **more: Any) -> Any:
        import altair as alt

        title = textwrap.wrap(self.figure.x_title, int(self.size[0] / _LETTER))
        if self.discrete:
            order = self.every[self.figure.x].unique(maintain_order=True).to_list()
            fits = max(len(str(name)) for name in order) * 5.5 < self.size[0] / len(order)
            axis = alt.Axis(title=title, labelAngle=0 if fits else -40, labelLimit=160)
            return alt.X(f"{self.figure.x}:N", sort=order, axis=axis, **more)
        if self.figure.log_x:
            scale = alt.Scale(type="log", nice=False)
            return alt.X(
                f"{self.figure.x}:Q",
                scale=scale,
                axis=alt.Axis(title=title, format=".3~g", tickCount=6),
                **more,
            )
        low, high = _range(self.every, [self.figure.x, self.figure.x2])
        whole = self.every.schema[self.figure.x].is_integer() and self.figure.kind != "histogram"
        pad = (0.6 if self.figure.kind in ("bar", "stack", "box", "heat") else 0.15) if whole else 0.0
        axis = alt.Axis(
            title=title,
            format="d" if whole else _NUMBER,
            tickMinStep=1 if whole else 0,
            tickCount=self.size[0] // 34,
        )
        scale = alt.Scale(domain=[low - pad, high + pad], nice=False, zero=False)
        return alt.X(f"{self.figure.x}:Q", scale=scale, axis=axis, **more)

    def y(self, column: str | None = None) -> Any:
        import altair as alt

        figure = self.figure
        shown = "%" if figure.share else _NUMBER
        names = [figure.y, figure.low, figure.high, figure.whisker_low, figure.whisker_high]
        low, high = _range(self.every, [*names, figure.null, figure.null_low, figure.null_high])
        if figure.kind == "stack":
            high = _tallest(self.every, figure)
        title = textwrap.wrap(figure.y_title, int(self.size[1] / _LETTER))
        if figure.log_y:
            scale = alt.Scale(type="symlog", domain=[min(low, 0), high], nice=False)
            axis = alt.Axis(title=title, format=shown, values=_decades(low, high))
        else:
            scale = alt.Scale(domain=[min(low, 0.0), max(high, 0.0) or 1.0], nice=True)
            axis = alt.Axis(title=title, format=shown, tickCount=5, grid=True)
        return alt.Y(f"{column or figure.y}:Q", scale=scale, axis=axis)

    def colour(self) -> Any:
        import altair as alt

        if self.figure.color is None:
            return alt.value(SERIES[0])
        colours = dict(zip(self.names, cycled(SERIES, len(self.names)), strict=True))
        if self.figure.rest in colours:
            colours[self.figure.rest] = NULL
        legend = alt.Legend(
            orient="top",
            title=None,
            columns=4,
            columnPadding=28,  # the page's letters may be wider than those that were measured
            labelLimit=240,
            symbolType="circle",
            symbolOpacity=1,
            symbolStrokeWidth=0,
        )
        return series(alt.Color, self.figure.color, colours, legend)

    def varied(self, channel: str, kinds: tuple[Any, ...]) -> dict[str, Any]:
        """A second channel for the series, without a legend of its own."""
        import altair as alt

        if self.figure.color is None:
            return {}
        made = {"shape": alt.Shape, "strokeDash": alt.StrokeDash}[channel]
        named = dict(zip(self.names, cycled(kinds, len(self.names)), strict=True))
        return {channel: series(made, self.figure.color, named)}


def _panel(drawing: _Drawing) -> Any:
    import altair as alt

    layers = [*_null(drawing), *_MARKS[drawing.figure.kind](drawing)]
    title = (
        {"title": alt.Title(drawing.title, fontSize=11, fontWeight="normal", anchor="start")}
        if drawing.title
        else {}
    )
    panel = alt.layer(*layers).properties(width=drawing.size[0], height=drawing.size[1], **title)
    return alt.hconcat(panel, _key(drawing), spacing=8) if drawing.figure.kind == "heat" else panel


def _null(drawing: _Drawing) -> list[Any]:
    """The grey band and the dashed line of chance, under everything else."""
    figure, marks = drawing.figure, []
    detail = {} if figure.color is None or figure.kind == "heat" else {"detail": f"{figure.color}:N"}
    spread = drawing.discrete or figure.kind in ("bar", "stack", "box")
    if figure.null_low and figure.null_high:
        if spread:
            mark = drawing.base.mark_bar(color=NULL, opacity=0.45, size=_wide(drawing))
        else:
            mark = drawing.base.mark_area(color=NULL, opacity=0.45, interpolate="linear")
        marks.append(
            mark.encode(x=drawing.x(), y=drawing.y(figure.null_low), y2=f"{figure.null_high}:Q", **detail)
        )
    if figure.null:
        if spread:
            tick = drawing.base.mark_tick(orient="horizontal", color=DIM, thickness=1.5, size=_wide(drawing))
            marks.append(tick.encode(x=drawing.x(), y=drawing.y(figure.null)))
        else:
            # Of several series each has its own.
            line = drawing.base.mark_line(color=DIM, strokeDash=[4, 3], strokeWidth=1.2)
            colour = {"color": drawing.colour()} if len(drawing.names) > 1 else {}
            marks.append(line.encode(x=drawing.x(), y=drawing.y(figure.null), **detail, **colour))
    return marks


def _line(drawing: _Drawing) -> list[Any]:
    figure, marks = drawing.figure, []
    common = {"x": drawing.x(), "color": drawing.colour()}
    if figure.low and figure.high:
        area = drawing.base.mark_area(opacity=0.18, line=False)
        marks.append(area.encode(**common, y=drawing.y(figure.low), y2=f"{figure.high}:Q"))
    line = drawing.base.mark_line(strokeWidth=1.8)
    dashes = {} if figure.null else drawing.varied("strokeDash", _DASHES)  # dashes are what chance gives
    marks.append(line.encode(**common, y=drawing.y(), **dashes))
    each = drawing.rows.height / max(len(drawing.names), 1)
    if each <= _FOUND:
        # Where they would stand too near, they are only found with the mouse, and then say their values.
        dots = drawing.base.mark_point(filled=True, size=22, opacity=1 if each <= _SEEN else 0)
        marks.append(dots.encode(**common, y=drawing.y(), **drawing.varied("shape", _SHAPES)))
    return marks


def _bar(drawing: _Drawing) -> list[Any]:
    import altair as alt

    figure = drawing.figure
    grouped = figure.color is not None
    offset = {"xOffset": alt.XOffset(f"{figure.color}:N", sort=drawing.names)} if grouped else {}
    size = {} if drawing.discrete else {"size": _wide(drawing) * 0.72}
    fill = 0.85 if figure.null_low is None else 0.7
    bars = drawing.base.mark_bar(opacity=fill, **size).encode(
        x=drawing.x(), y=drawing.y(), color=drawing.colour(), **offset
    )
    marks = [bars]
    if figure.low and figure.high:
        rule = drawing.base.mark_rule(color=INK, strokeWidth=1.1)
        marks.append(rule.encode(x=drawing.x(), y=drawing.y(figure.low), y2=f"{figure.high}:Q", **offset))
    return marks


def _stack(drawing: _Drawing) -> list[Any]:
    import altair as alt

    figure = drawing.figure
    assert figure.color is not None, "a stack has parts"
    rank = {name: index for index, name in enumerate(drawing.names)}
    base = alt.Chart(data({**row, "_order": rank[str(row[figure.color])]} for row in _plain(drawing.rows)))
    size = {} if drawing.discrete else {"size": _wide(drawing) * 0.9}
    y = drawing.y()
    y.stack = "zero"
    return [
        base.mark_bar(stroke=PANEL, strokeWidth=0.4, **size).encode(
            x=drawing.x(), y=y, color=drawing.colour(), order=alt.Order("_order:Q")
        )
    ]


def _box(drawing: _Drawing) -> list[Any]:
    import altair as alt

    figure, wide = drawing.figure, _wide(drawing)
    offset: dict[str, Any] = {}
    if figure.color is not None:
        if drawing.discrete:
            offset = {"xOffset": alt.XOffset(f"{figure.color}:N", sort=drawing.names)}
        wide *= 0.8 / max(len(drawing.names), 1)
    common = {"x": drawing.x(), "color": drawing.colour(), **offset}
    marks = []
    if figure.whisker_low and figure.whisker_high:
        rule = drawing.base.mark_rule(strokeWidth=1)
        marks.append(rule.encode(**common, y=drawing.y(figure.whisker_low), y2=f"{figure.whisker_high}:Q"))
    if figure.low and figure.high:
        box = drawing.base.mark_bar(size=wide * 0.7, opacity=0.45)
        marks.append(box.encode(**common, y=drawing.y(figure.low), y2=f"{figure.high}:Q"))
    tick = drawing.base.mark_tick(orient="horizontal", thickness=2, size=wide * 0.7, color=INK)
    marks.append(tick.encode(x=drawing.x(), y=drawing.y(), **offset))
    return marks


def _scatter(drawing: _Drawing) -> list[Any]:
    figure, marks = drawing.figure, []
    common = {"x": drawing.x(), "color": drawing.colour()}
    if figure.low and figure.high:
        rule = drawing.base.mark_rule(opacity=0.5)
        marks.append(rule.encode(**common, y=drawing.y(figure.low), y2=f"{figure.high}:Q"))
    many = drawing.rows.height > 300
    dots = drawing.base.mark_point(filled=True, size=14 if many else 30, opacity=0.4 if many else 0.8)
    marks.append(dots.encode(**common, y=drawing.y(), **drawing.varied("shape", _SHAPES)))
    return marks


def _heat(drawing: _Drawing) -> list[Any]:
    """Cells whose opacity is the size of the number and whose colour its sign: right on any ground."""
    import altair as alt

    figure = drawing.figure
    assert figure.color is not None, "a heat map shades a column"
    rows = sorted(drawing.every[figure.y].drop_nulls().unique().to_list())
    kind = "N" if drawing.every.schema[figure.y] == pl.String else "O"
    y = alt.Y(f"{figure.y}:{kind}", sort=rows, axis=alt.Axis(title=figure.y_title, labelOverlap=True))
    columns = drawing.every[figure.x].unique(maintain_order=True).to_list()
    order = columns if drawing.discrete else sorted(columns)
    x = alt.X(
        f"{figure.x}:O", sort=order, axis=alt.Axis(title=figure.x_title, labelOverlap=True, labelAngle=0)
    )
    cells = drawing.base.mark_rect(stroke=LINE, strokeWidth=0.3)
    return [cells.encode(x=x, y=y, **_shade(figure.color, _range(drawing.every, [figure.color])))]


def _shade(column: str, ends: tuple[float, float]) -> dict[str, Any]:
    """Fill opacity by the size of a number, colour by its sign if there are two: right on any ground."""
    import altair as alt

    low, high = ends
    signs = alt.condition(f"datum['{column}'] < 0", alt.value(SERIES[0]), alt.value(SERIES[1]))
    reach = max(-low, high)
    domain, opacity = ([-reach, 0, reach], [1, 0, 1]) if low < 0 < high else ([low, high], [0.06, 1])
    scale = alt.Scale(domain=domain, range=opacity)
    return {
        "color": signs if low < 0 < high else alt.value(SIZE),
        "fillOpacity": alt.FillOpacity(f"{column}:Q", scale=scale, legend=None),
    }


def _key(drawing: _Drawing) -> Any:
    """What the shades of a heat map stand for: a strip from the least to the largest number."""
    import altair as alt

    low, high = _range(drawing.every, [drawing.figure.color])
    step = (high - low or 1.0) / _SHADES
    rows = [
        {"low": low + i * step, "high": low + (i + 1) * step, "middle": low + (i + 0.5) * step}
        for i in range(_SHADES)
    ]
    axis = alt.Axis(orient="right", title=None, format="%" if drawing.figure.share else _NUMBER, tickCount=5)
    y = alt.Y("low:Q", axis=axis, scale=alt.Scale(domain=[low, low + _SHADES * step], nice=False, zero=False))
    strip = alt.Chart(data(rows)).mark_rect(stroke=LINE, strokeWidth=0.3)
    return strip.encode(y=y, y2="high:Q", **_shade("middle", (low, high))).properties(width=12, height=110)


def _histogram(drawing: _Drawing) -> list[Any]:
    import altair as alt

    figure = drawing.figure
    assert figure.x2 is not None, "a histogram has bins"
    bars = drawing.base.mark_bar(opacity=0.8, stroke=LINE, strokeWidth=0.2, binSpacing=0)
    y2 = alt.Y2Datum(0)
    return [bars.encode(x=drawing.x(), x2=f"{figure.x2}:Q", y=drawing.y(), y2=y2, color=drawing.colour())]


_MARKS = {
    "line": _line,
    "bar": _bar,
    "stack": _stack,
    "box": _box,
    "scatter": _scatter,
    "heat": _heat,
    "histogram": _histogram,
}


def _wide(drawing: _Drawing) -> float:
    """Pixels between neighbouring values of x; of numbers of layers, also those between that are not there."""
    values = drawing.every[drawing.figure.x]
    steps = values.n_unique()
    if values.dtype.is_integer() and values.len():
        reach = int(values.max()) - int(values.min()) + 1  # type: ignore[arg-type]
        steps = reach if reach <= _LAYERS else steps
    return drawing.size[0] / max(steps, 1)


def _names(figure: Figure, frame: pl.DataFrame) -> list[str]:
    """The series in their order."""
    if figure.color is None or figure.kind == "heat":
        return []
    seen = [str(name) for name in frame[figure.color].unique(maintain_order=True)]
    return [
        *(name for name in figure.order if name in seen),
        *(name for name in seen if name not in figure.order),
    ]


def _range(frame: pl.DataFrame, names: list[str | None]) -> tuple[float, float]:
    """Least and greatest finite value of some columns; (0, 1) if there is none."""
    parts = [frame[name].cast(pl.Float64).drop_nulls().drop_nans() for name in names if name]
    values = pl.concat(parts)
    values = values.filter(values.is_finite())
    if len(values) == 0:
        return 0.0, 1.0
    return float(values.min()), float(values.max())  # type: ignore[arg-type]


def _tallest(frame: pl.DataFrame, figure: Figure) -> float:
    by = [name for name in (figure.x, figure.facet) if name]
    return float(frame.group_by(by).agg(pl.col(figure.y).sum())[figure.y].max())  # type: ignore[arg-type]


def _decades(low: float, high: float) -> list[float]:
    tops = [10.0**n for n in range(0, 13) if 10.0**n <= max(high, 1.0)]
    bottoms = [-(10.0**n) for n in range(12, -1, -1) if -(10.0**n) >= low]
    return [*bottoms, 0.0, *tops]


def _plain(frame: pl.DataFrame) -> list[Mapping[str, Any]]:
    """Rows as JSON knows them: what is not a number becomes null."""
    finite = [
        pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name)
        for name, kind in frame.schema.items()
        if kind.is_float()
    ]
    return frame.with_columns(finite).to_dicts()  # type: ignore[return-value]
