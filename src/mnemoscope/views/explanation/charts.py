"""The figures of an explanation as Altair charts: one idea each, axes with units, in the colours of `views.charts`.

Sign is shown by direction or by a written sign besides colour, attention and FFN by panel or by shape, so that no
figure needs colour to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from mnemoscope.views.charts import DIM, INK, LINE, cycled, data, light, series
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import Cargo, Grid, Point, Sheet, Step
from mnemoscope.views.words import number

if TYPE_CHECKING:
    import altair as alt

    from mnemoscope.prediction.explanation import Explanation

ATTENTION, FFN, NEGATIVE, POSITIVE = map(light, ("violet", "teal", "blue", "orange"))
_DARKEST = 0.4  # opacity of a cell: its number is read on it, light or dark
_WIDTH = 700
_PART = {"attention": ATTENTION, "FFN": FFN, "embedding": INK}
_SHAPE = {"attention": "circle", "FFN": "square", "embedding": "diamond"}
_DASHES = ([5, 2], [1.5, 2], [8, 2, 1.5, 2], [3, 3])


def charts(explanation: Explanation) -> dict[str, alt.Chart]:
    """Every figure by name: stream, layers, heads, against <foil>, carried, ablated; those that there are."""
    return drawn(sheet(explanation))


def drawn(page: Sheet) -> dict[str, Any]:
    """The figures of a lowered explanation."""
    figures: dict[str, Any] = {"stream": stream(page), "layers": steps(page.steps)}
    if page.grid.heads and page.grid.words:
        figures["heads"] = heads(page.grid)
    for contrast in page.against:
        figures[f"against {contrast.foil.name}"] = steps(contrast.steps)
    if page.cargo:
        figures["carried"] = carried(page.cargo)
    if page.ablated:
        figures["ablated"] = ablated(page)
    return figures


def described(name: str, page: Sheet) -> str:
    """What a figure shows, for those who do not see it."""
    target = page.target.word.label
    return {
        "stream": f"log p of {target} along the stream, from layer to layer, and its rank",
        "layers": f"what attention and FFN of each layer added to log p of {target}",
        "heads": f"what each head brought to {target} from each token of the prompt",
        "carried": "what attention carried, vector by vector of its source",
        "ablated": "leave-one-out against true ablation of the same parts",
    }.get(name, f"what each layer did to log p of {target}, {name}")


def stream(page: Sheet) -> Any:
    """log p of target and foils at all points of the stream, and under it the rank of the target."""
    import altair as alt

    points, last = page.stream, len(page.stream) - 1
    names = [page.target.word.label, *(foil.word.label for foil in page.foils)]
    values = [[point.log_probability, *point.foils] for point in points]
    low, high = min(map(min, values)), max(map(max, values))
    x = alt.X("at:Q", scale=_exact(0, last), axis=_stream_axis(points, labels=False))
    y = alt.Y("nats:Q", scale=alt.Scale(domain=[low, max(high, 0.0)], zero=False), title="log p (nats)")
    foils = [str(index) for index in range(len(page.foils))]
    dashes = alt.Scale(domain=foils, range=cycled(_DASHES, len(foils)))
    thin = alt.Chart(data(
        {"at": at, "nats": row[1 + int(name)], "name": name} for name in foils for at, row in enumerate(values)
    )).mark_line(color=DIM, strokeWidth=1).encode(
        x=x, y=y, detail="name:N", strokeDash=alt.StrokeDash("name:N", scale=dashes, legend=None)
    )  # fmt: skip
    ways = [
        {"at": at, "to": at + 1, "nats": before[0], "end": after[0], "step": points[at + 1].step}
        for at, (before, after) in enumerate(pairwise(values))
    ]
    colour = series(alt.Color, "step", _PART)
    line = (
        alt.Chart(data(ways))
        .mark_rule(strokeWidth=2, strokeCap="round")
        .encode(x=x, x2="to:Q", y=y, y2="end:Q", color=colour)
    )
    dots = (
        alt.Chart(
            data(
                {"at": at, "nats": row[0], "step": points[at].step, "said": _said(points[at], names)}
                for at, row in enumerate(values)
            )
        )
        .mark_point(filled=True, size=22, opacity=1)
        .encode(x=x, y=y, color=colour, shape=series(alt.Shape, "step", _SHAPE), description="said:N")
    )
    tall = 190
    ends = _apart(values[-1], (max(high, 0.0) - low) * 12 / tall or 1.0)
    labels = (
        alt.Chart(data(
            {"nats": end, "name": name, "target": index == 0}
            for index, (end, name) in enumerate(zip(ends, names, strict=True))
        ))
        .mark_text(align="left", dx=8, fontSize=11, limit=130)
        .encode(
            x=alt.value(_WIDTH),
            y=y,
            text="name:N",
            color=alt.condition("datum.target", alt.value(INK), alt.value(DIM)),
        )
    )  # fmt: skip
    upper = alt.layer(thin, line, dots, labels).properties(width=_WIDTH, height=tall)
    return alt.vconcat(upper, _ranks(points), spacing=6)


def _said(point: Point, names: Sequence[str]) -> str:
    """A point of the stream in words: log p of the target and of each foil."""
    values = (point.log_probability, *point.foils)
    told = ", ".join(f"{name} {number(value)}" for name, value in zip(names, values, strict=True))
    return f"after {point.name}: log p of {told}; rank {point.rank:,}"


def _ranks(points: Sequence[Point]) -> Any:
    import altair as alt

    rows = [
        {"at": at, "rank": point.rank + 1, "said": f"{point.name}: rank {point.rank:,}"}
        for at, point in enumerate(points)
    ]
    top = max(11, *(point.rank + 1 for point in points))
    ticks = [tick for tick in (1, 11, 101, 1001, 10001, 100001) if tick <= top]
    axis = alt.Axis(values=ticks, labelExpr="format(datum.value - 1, ',')", title="rank")
    scale = alt.Scale(type="log", domain=[1, top], reverse=True, nice=False)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("at:Q", scale=_exact(0, len(points) - 1), axis=_stream_axis(points, labels=True)),
        y=alt.Y("rank:Q", scale=scale, axis=axis),
    )
    line = base.mark_line(interpolate="step-after", color=INK, strokeWidth=1)
    unseen = base.mark_point(filled=True, size=40, opacity=0, color=INK).encode(description="said:N")
    return alt.layer(line, unseen).properties(width=_WIDTH, height=54)


def _stream_axis(points: Sequence[Point], *, labels: bool) -> Any:
    """A tick where a layer begins to add; labelled with its number, at most twenty of them."""
    import altair as alt

    first = points[0].layer  # of a decoder behind an encoder not 0
    ticks = [2 * layer for layer in _ticks(points[-1].layer + 1 - first, 20)]
    title = "layer" if labels else None
    return alt.Axis(values=ticks, labelExpr=f"datum.value / 2 + {first}", title=title, labels=labels)


def steps(rows: Sequence[Step]) -> Any:
    """What each attention layer and each FFN layer added: two panels on one scale."""
    import altair as alt

    values = [step.nats for step in rows] or [0.0]
    scale = alt.Scale(domain=[min(*values, 0.0), max(*values, 0.0)], nice=True)
    layers = [step.layer for step in rows] or [0]
    first, count = min(layers), 1 + max(layers) - min(layers)

    def panel(part: str, labelled: bool) -> Any:
        axis = alt.Axis(
            values=[first + layer for layer in _ticks(count, 20)], title="layer" if labelled else None,
            labels=labelled, format="d",
        )  # fmt: skip
        bars = alt.Chart(data(
            {"layer": step.layer, "nats": step.nats, "part": step.part} for step in rows if step.part == part
        )).mark_bar(size=min(_WIDTH / count * 0.72, 26), color=_PART[part]).encode(
            x=alt.X("layer:Q", scale=_exact(first - 0.5, first + count - 0.5), axis=axis),
            y=alt.Y("nats:Q", scale=scale, title=f"{part} (nats)", axis=_signed(5)),
        )  # fmt: skip
        return _above_zero(bars, 92)

    return alt.vconcat(panel("attention", False), panel("FFN", True), spacing=8)


def _above_zero(bars: Any, tall: float) -> Any:
    """A panel of signed bars, with the line that they stand on."""
    import altair as alt

    zero = alt.Chart(data([{"nats": 0}])).mark_rule(color=DIM, strokeWidth=0.75).encode(y="nats:Q")
    return alt.layer(bars, zero).properties(width=_WIDTH, height=tall)


def _ticks(count: int, most: int) -> list[int]:
    """Every number below `count`, or every second, third ... so that there are at most `most`."""
    return list(range(0, count, max(1, -(-count // most))))


def _exact(low: float, high: float) -> Any:
    """A scale with these ends and no others."""
    import altair as alt

    return alt.Scale(domain=[low, high], nice=False)


def heads(grid: Grid) -> Any:
    """Heads x source tokens: opacity is the size of leave-one-out, colour and a written sign its direction."""
    import altair as alt

    top = max((abs(value) for row in grid.cells for value in row), default=0.0) or 1.0
    wide = max(18.0, min(64.0, _WIDTH / len(grid.words)))
    columns = [f"{index:04d}" for index in range(len(grid.words))]
    rows = [
        {
            "column": column, "head": head, "size": abs(value) / top, "sign": "+" if value > 0 else "-",
            "shown": _in_cell(value, top, wide),
        }
        for head, row in zip(grid.heads, grid.cells, strict=True)
        for column, value in zip(columns, row, strict=True)
    ]  # fmt: skip
    flat = all(cell_len(word.label) * 6 < wide for word in grid.words)
    labels = {key: _column(word.label) for key, word in zip(columns, grid.words, strict=True)}
    names = alt.Axis(
        orient="top",
        labelExpr=_lookup(labels),
        labelAngle=0 if flat else -50,
        labelAlign="center" if flat else "left",
        labelPadding=4 if flat else 6,
        labelLimit=120,
        labelOverlap=False,
        title=None,
        domain=False,
        ticks=False,
    )
    x = alt.X("column:O", sort=columns, axis=names)
    y = alt.Y("head:N", sort=list(grid.heads), axis=alt.Axis(title=None, domain=False, ticks=False))
    base = alt.Chart(data(rows))
    sign = series(alt.Color, "sign", {"-": NEGATIVE, "+": POSITIVE})
    shade = alt.Scale(domain=[0, 1], range=[0, _DARKEST])
    cells = base.mark_rect(stroke=LINE, strokeWidth=0.5).encode(
        x=x, y=y, color=sign, opacity=alt.Opacity("size:Q", scale=shade, legend=None)
    )
    frame = base.mark_rect(filled=False, stroke=LINE, strokeWidth=0.5).encode(x=x, y=y)
    text = base.mark_text(fontSize=9, color=INK).encode(x=x, y=y, text="shown:N")
    return alt.layer(frame, cells, text).properties(width=wide * len(columns), height=19 * len(grid.heads))


def _in_cell(value: float, top: float, wide: float) -> str:
    """The number where it fits and counts, its sign where only that fits."""
    if abs(value) < 0.04 * top:
        return ""
    return f"{value:+.2f}" if wide >= 30 else "+" if value > 0 else "−"


def carried(cargo: Cargo) -> Any:
    """The score that the best attention sub-value loses with each vector of its source, both ways (A53, A54)."""
    import altair as alt

    names = [carried.point for carried in cargo.points]
    ticks = _ticks(len(names), 24)
    labels = _lookup({at: names[at] for at in ticks})

    def panel(way: str, labelled: bool) -> Any:
        axis = alt.Axis(
            values=ticks, labelExpr=labels, labelAngle=-60, title=None, labels=labelled, labelOverlap=False
        )
        rows = [
            {"at": at, "nats": getattr(carried, way), "part": _part(carried.point), "way": way}
            for at, carried in enumerate(cargo.points)
        ]
        bars = alt.Chart(data(rows)).mark_bar(size=min(_WIDTH / len(names) * 0.7, 20)).encode(
            x=alt.X("at:Q", scale=_exact(-0.5, len(names) - 0.5), axis=axis),
            y=alt.Y("nats:Q", title=f"{way} (score)", axis=_signed(4)),
            color=series(alt.Color, "part", _PART),
        )  # fmt: skip
        return _above_zero(bars, 72)

    return alt.vconcat(panel("recomputed", False), panel("fixed", True), spacing=8)


def _part(point: str) -> str:
    return "FFN" if point.startswith("FFN") else "attention"


def ablated(page: Sheet) -> Any:
    """Leave-one-out against true ablation, a point each, with the line on which both are equal."""
    import altair as alt

    rows: list[dict[str, Any]] = [
        {"x": part.left_out, "y": part.effect, "kind": part.kind, "name": part.name}
        for part in page.ablated
        if part.left_out is not None
    ]
    values = [value for row in rows for value in (row["x"], row["y"])] or [0.0]
    low, high = min(*values, 0.0), max(*values, 0.0)
    pad = (high - low) * 0.06 or 1.0
    ends, axis = (low - pad, high + pad), _signed(5)
    x = alt.X("x:Q", scale=_exact(*ends), axis=axis, title="leave-one-out (nats)")
    y = alt.Y("y:Q", scale=_exact(*ends), axis=axis, title="ablated (nats)")
    equal = alt.Chart(data({"x": end, "y": end} for end in ends))
    line = equal.mark_line(color=LINE, strokeWidth=1).encode(x=x, y=y)
    dots = alt.Chart(data(rows)).mark_point(filled=True, size=34, opacity=0.85).encode(
        x=x,
        y=y,
        color=series(alt.Color, "kind", {"neuron": FFN, "head": ATTENTION}),
        shape=series(alt.Shape, "kind", {"neuron": "square", "head": "circle"}),
    )  # fmt: skip
    named = sorted(rows, key=lambda row: -max(abs(row["x"]), abs(row["y"])))[:4]
    text = alt.Chart(data(named)).mark_text(align="left", dx=6, dy=-5, fontSize=9, color=DIM).encode(
        x=x, y=y, text="name:N"
    )  # fmt: skip
    return alt.layer(line, dots, text).properties(width=230, height=230)


def _signed(count: int) -> Any:
    import altair as alt

    return alt.Axis(tickCount=count, labelExpr="datum.value == 0 ? '0' : format(datum.value, '+.3~g')")


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at these heights, moved down until none is nearer than `gap` to the one above."""
    places = list(values)
    order = sorted(range(len(values)), key=lambda index: -values[index])
    for before, index in pairwise(order):
        places[index] = min(places[index], places[before] - gap)
    return places


def _column(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"


def _lookup(labels: Mapping[Any, str]) -> str:
    """A Vega expression from an axis value to its label; labels are data, quoted as such."""
    import json

    keys = {str(key): text for key, text in labels.items()}
    return f"{json.dumps(keys)}[datum.value]"
