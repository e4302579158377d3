"""The figures of an explanation as Altair charts: one idea each, axes with units, in the colours of `views.charts`.

Sign is shown by direction or by a written sign besides colour, attention and FFN by panel or by shape, so that no
figure needs colour to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from mnemoscope.views.charts import DIM, INK, LINE
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import Against, Cargo, Grid, Point, Sheet, Step
from mnemoscope.views.theme import light

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
    found: dict[str, Any] = {"stream": stream(page), "layers": steps(page.steps, "added to log p (nats)")}
    if page.grid.heads and page.grid.words:
        found["heads"] = heads(page.grid)
    for one in page.against:
        found[f"against {one.foil.name}"] = against(page, one)
    if page.cargo:
        found["carried"] = carried(page.cargo)
    if page.ablated:
        found["ablated"] = ablated(page)
    return found


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

    points = page.stream
    names = [page.target.word.label, *(foil.word.label for foil in page.foils)]
    values = [[point.log_probability, *point.foils] for point in points]
    low, high = min(map(min, values)), max(map(max, values))
    x = alt.X("at:Q", scale=alt.Scale(domain=[0, len(points) - 1], nice=False), axis=_layer_axis(points))
    y = alt.Y("nats:Q", scale=alt.Scale(domain=[low, max(high, 0.0)], zero=False), title="log p (nats)")
    foils = [
        _rows(at=at, nats=row[1 + k], name=str(k))
        for k in range(len(page.foils)) for at, row in enumerate(values)
    ]  # fmt: skip
    dashes = alt.Scale(
        domain=[str(k) for k in range(len(page.foils))],
        range=[_DASHES[k % len(_DASHES)] for k in range(len(page.foils))],
    )
    thin = alt.Chart(_data(foils)).mark_line(color=DIM, strokeWidth=1).encode(
        x=x, y=y, detail="name:N", strokeDash=alt.StrokeDash("name:N", scale=dashes, legend=None)
    )  # fmt: skip
    pieces = [
        _rows(at=at - 1, to=at, nats=values[at - 1][0], end=values[at][0], step=points[at].step)
        for at in range(1, len(points))
    ]
    colour = alt.Color("step:N", scale=alt.Scale(domain=list(_PART), range=list(_PART.values())), legend=None)
    shape = alt.Shape(
        "step:N", scale=alt.Scale(domain=list(_SHAPE), range=list(_SHAPE.values())), legend=None
    )
    line = (
        alt.Chart(_data(pieces))
        .mark_rule(strokeWidth=2, strokeCap="round")
        .encode(x=x, x2="to:Q", y=y, y2="end:Q", color=colour)
    )
    dots = (
        alt.Chart(_data([_rows(at=at, nats=row[0], step=points[at].step) for at, row in enumerate(values)]))
        .mark_point(filled=True, size=22, opacity=1)
        .encode(x=x, y=y, color=colour, shape=shape)
    )
    tall = 190
    ends = _apart(values[-1], (max(high, 0.0) - low) * 12 / tall or 1.0)
    text = [
        _rows(nats=end, name=name, target=k == 0)
        for k, (end, name) in enumerate(zip(ends, names, strict=True))
    ]
    labels = (
        alt.Chart(_data(text))
        .mark_text(align="left", dx=8, fontSize=11, limit=130)
        .encode(
            x=alt.value(_WIDTH),
            y=y,
            text="name:N",
            color=alt.condition("datum.target", alt.value(INK), alt.value(DIM)),
        )
    )
    upper = alt.layer(thin, line, dots, labels).properties(width=_WIDTH, height=tall)
    return alt.vconcat(upper, _ranks(points), spacing=6)


def _ranks(points: Sequence[Point]) -> Any:
    import altair as alt

    rows = [_rows(at=at, rank=point.rank + 1) for at, point in enumerate(points)]
    top = max(row["rank"] for row in rows)
    ticks = [tick for tick in (1, 11, 101, 1001, 10001, 100001) if tick <= max(top, 11)]
    axis = alt.Axis(values=ticks, labelExpr="format(datum.value - 1, ',')", title="rank")
    scale = alt.Scale(type="log", domain=[1, max(top, 11)], reverse=True, nice=False)
    return (
        alt.Chart(_data(rows))
        .mark_line(interpolate="step-after", color=INK, strokeWidth=1)
        .encode(
            x=alt.X(
                "at:Q",
                scale=alt.Scale(domain=[0, len(points) - 1], nice=False),
                axis=_layer_axis(points, "layer"),
            ),
            y=alt.Y("rank:Q", scale=scale, axis=axis),
        )
        .properties(width=_WIDTH, height=54)
    )


def _layer_axis(points: Sequence[Point], title: str | None = None) -> Any:
    """A tick where a layer begins to add; labelled with its number, at most twenty of them."""
    import altair as alt

    last = points[-1].layer
    every = max(1, -(-(last + 1) // 20))
    values = [2 * layer for layer in range(0, last + 1, every)]
    return alt.Axis(values=values, labelExpr="datum.value / 2", title=title, labels=title is not None)


def steps(rows: Sequence[Step], title: str) -> Any:
    """What each attention layer and each FFN layer added: two panels on one scale."""
    import altair as alt

    data = [_rows(layer=one.layer, nats=one.nats, part=one.part) for one in rows]
    values = [one.nats for one in rows] or [0.0]
    scale = alt.Scale(domain=[min(*values, 0.0), max(*values, 0.0)], nice=True)
    last = max((one.layer for one in rows), default=0)
    size = min(_WIDTH / (last + 1) * 0.72, 26)

    def panel(part: str, labelled: bool) -> Any:
        x = alt.X(
            "layer:Q",
            scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
            axis=alt.Axis(
                values=list(range(0, last + 1, max(1, -(-(last + 1) // 20)))),
                title="layer" if labelled else None,
                labels=labelled,
                format="d",
            ),
        )
        y = alt.Y("nats:Q", scale=scale, title=f"{part} (nats)", axis=_signed(5))
        some = [row for row in data if row["part"] == part]
        bars = alt.Chart(_data(some)).mark_bar(size=size, color=_PART[part]).encode(x=x, y=y)
        zero = alt.Chart(_data([_rows(nats=0)])).mark_rule(color=DIM, strokeWidth=0.75).encode(y="nats:Q")
        return alt.layer(bars, zero).properties(width=_WIDTH, height=92)

    return alt.vconcat(panel("attention", False), panel("FFN", True), spacing=8)


def against(page: Sheet, one: Against) -> Any:
    """What each layer did to log p(target) - log p(foil)."""
    return steps(one.steps, f"log p({page.target.word.label}) - log p({one.foil.word.label}), nats")


def heads(grid: Grid) -> Any:
    """Heads x source tokens: opacity is the size of leave-one-out, colour and a written sign its direction."""
    import altair as alt

    top = max((abs(value) for row in grid.cells for value in row), default=0.0) or 1.0
    wide = max(18.0, min(64.0, _WIDTH / len(grid.words)))
    columns = [f"{index:04d}" for index in range(len(grid.words))]
    rows = [
        _rows(
            column=columns[c], head=name, size=abs(value) / top, sign="+" if value > 0 else "-",
            shown=_in_cell(value, top, wide),
        )
        for name, row in zip(grid.heads, grid.cells, strict=True) for c, value in enumerate(row)
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
    base = alt.Chart(_data(rows))
    sign = alt.Color("sign:N", scale=alt.Scale(domain=["-", "+"], range=[NEGATIVE, POSITIVE]), legend=None)
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

    names = [one.point for one in cargo.points]
    rows = [
        _rows(at=at, nats=value, part="FFN" if one.point.startswith("FFN") else "attention", way=way)
        for at, one in enumerate(cargo.points)
        for way, value in (("recomputed", one.recomputed), ("fixed", one.fixed))
    ]
    every = max(1, -(-len(names) // 24))
    ticks = list(range(0, len(names), every))

    def panel(way: str, labelled: bool) -> Any:
        some = [row for row in rows if row["way"] == way]
        axis = alt.Axis(
            values=ticks, labelExpr=_lookup({at: names[at] for at in ticks}), labelAngle=-60, title=None,
            labels=labelled, labelOverlap=False,
        )  # fmt: skip
        x = alt.X("at:Q", scale=alt.Scale(domain=[-0.5, len(names) - 0.5], nice=False), axis=axis)
        colour = alt.Color(
            "part:N", scale=alt.Scale(domain=list(_PART), range=list(_PART.values())), legend=None
        )
        y = alt.Y("nats:Q", title=f"{way} (score)", axis=_signed(4))
        bars = (
            alt.Chart(_data(some))
            .mark_bar(size=min(_WIDTH / len(names) * 0.7, 20))
            .encode(x=x, y=y, color=colour)
        )
        zero = alt.Chart(_data([_rows(nats=0)])).mark_rule(color=DIM, strokeWidth=0.75).encode(y="nats:Q")
        return alt.layer(bars, zero).properties(width=_WIDTH, height=72)

    return alt.vconcat(panel("recomputed", False), panel("fixed", True), spacing=8)


def ablated(page: Sheet) -> Any:
    """Leave-one-out against true ablation, a point each, with the line on which both are equal."""
    import altair as alt

    rows = [
        _rows(x=one.left_out, y=one.effect, kind=one.kind, name=one.name)
        for one in page.ablated
        if one.left_out is not None
    ]
    values = [value for row in rows for value in (row["x"], row["y"])] or [0.0]
    ends = [min(*values, 0.0), max(*values, 0.0)]
    pad = (ends[1] - ends[0]) * 0.06 or 1.0
    scale = alt.Scale(domain=[ends[0] - pad, ends[1] + pad], nice=False)
    axis = _signed(5)
    x = alt.X("x:Q", scale=scale, axis=axis, title="leave-one-out (nats)")
    y = alt.Y("y:Q", scale=scale, axis=axis, title="ablated (nats)")
    equal = [_rows(x=end, y=end) for end in (ends[0] - pad, ends[1] + pad)]
    line = alt.Chart(_data(equal)).mark_line(color=LINE, strokeWidth=1).encode(x=x, y=y)
    kinds = alt.Scale(domain=["neuron", "head"], range=[FFN, ATTENTION])
    shapes = alt.Scale(domain=["neuron", "head"], range=["square", "circle"])
    dots = alt.Chart(_data(rows)).mark_point(filled=True, size=34, opacity=0.85).encode(
        x=x,
        y=y,
        color=alt.Color("kind:N", scale=kinds, legend=None),
        shape=alt.Shape("kind:N", scale=shapes, legend=None),
    )  # fmt: skip
    named = sorted(rows, key=lambda row: -max(abs(row["x"]), abs(row["y"])))[:4]
    text = alt.Chart(_data(named)).mark_text(align="left", dx=6, dy=-5, fontSize=9, color=DIM).encode(
        x=x, y=y, text="name:N"
    )  # fmt: skip
    return alt.layer(line, dots, text).properties(width=230, height=230)


def _signed(count: int) -> Any:
    import altair as alt

    return alt.Axis(tickCount=count, labelExpr="datum.value == 0 ? '0' : format(datum.value, '+.3~g')")


def _rows(**fields: Any) -> dict[str, Any]:
    return fields


def _data(rows: Sequence[Mapping[str, Any]]) -> Any:
    import altair as alt

    return alt.InlineData(values=[dict(row) for row in rows])


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
