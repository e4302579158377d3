"""The small graph of one prediction: earlier vectors, the neurons they switched on, and the target (A57, A63).

A neuron's increase is shared among the vectors that made its coefficient, so that along the whole graph the numbers
are nats of the same log p(target), and what enters a neuron adds up to what leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mnemoscope.views.explanation.sheet import Cause, Sheet, Switched, Word, anchor
from mnemoscope.views.explanation.wording import nats

NEURONS, CAUSES = 5, 4  # drawn: neurons, and named vectors of each
_ROW, _TALL, _TOP = 30, 24, 26
_LEFT, _MIDDLE, _RIGHT = (0, 262), (420, 596), (740, 860)  # from x to x of the boxes of each column
_THICKEST = 13.0


@dataclass(frozen=True)
class Box:
    """A node: its name, a token beside it, the nats that pass through it, and the address of the part."""

    name: str
    word: Word | None
    nats: float | None
    x: float
    y: float
    wide: float
    tall: float
    role: str  # cause | rest | neuron | target
    leads: str = ""


@dataclass(frozen=True)
class Edge:
    """A curve between two boxes, as thick as its nats; `said` in words, `leads` to what the neuron is made of."""

    path: str
    nats: float
    thick: float
    said: str
    leads: str


@dataclass(frozen=True)
class Graph:
    """Boxes and edges, and the size of the picture."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    wide: float
    tall: float


def graph(page: Sheet) -> Graph | None:
    """Lay out the neurons that matter most, or None if there are none with a known increase."""
    chosen = [neuron for neuron in page.switched if neuron.nats is not None][:NEURONS]
    if not chosen:
        return None
    switches = {neuron.name: neuron.shortened(CAUSES) for neuron in chosen}
    causes = _causes(switches)
    rows = max(len(causes), 2 * len(chosen) - 1)
    tall = _TOP + rows * _ROW
    left = {
        key: _box(_LEFT, y, cause.name, cause.word, total, _role(cause), anchor(cause))
        for (key, cause, total), y in zip(causes, _spread(len(causes), tall), strict=True)
    }
    middle = {
        neuron.name: _box(_MIDDLE, y, neuron.name, None, neuron.nats, "neuron", neuron.name)
        for neuron, y in zip(chosen, _spread(len(chosen), tall), strict=True)
    }
    total = sum(neuron.nats or 0.0 for neuron in chosen)
    end = _box(_RIGHT, _spread(1, tall)[0], page.target.word.label, None, total, "target")
    flows = [
        (left[_key(cause)], middle[name], cause.nats or 0.0)
        for name, causes_of in switches.items()
        for cause in causes_of
    ]
    flows += [(middle[neuron.name], end, neuron.nats or 0.0) for neuron in chosen]
    top = max((abs(flow) for *_, flow in flows), default=0.0) or 1.0
    edges = tuple(_edge(source, sink, flow, top) for source, sink, flow in flows)
    return Graph((*left.values(), *middle.values(), end), edges, _RIGHT[1], tall + 4)


def _box(
    column: tuple[int, int],
    y: float,
    name: str,
    word: Word | None,
    nats: float | None,
    role: str,
    leads: str = "",
) -> Box:
    return Box(name, word, nats, column[0], y, column[1] - column[0], _TALL, role, leads)


def _causes(switches: dict[str, tuple[Cause, ...]]) -> list[tuple[str, Cause, float]]:
    """Every vector once, with all nats that leave it: by depth, what is not shown last."""
    last: dict[str, Cause] = {}
    totals: dict[str, float] = {}
    for cause in (cause for causes in switches.values() for cause in causes):
        key = _key(cause)
        last[key], totals[key] = cause, totals.get(key, 0.0) + (cause.nats or 0.0)
    order = sorted(last, key=lambda key: _depth(last[key]))
    return [(key, last[key], totals[key]) for key in order]


def _key(cause: Cause) -> str:
    return f"{cause.name} {cause.word.position if cause.word else ''}"


def _depth(cause: Cause) -> tuple[int, int, str]:
    order = {"embedding": 0, "key bias": 2, "remainder": 3}.get(cause.kind, 1)
    digits = "".join(letter if letter.isdigit() else " " for letter in cause.name).split()
    return order, int(digits[0]) if digits else 0, cause.name


def _role(cause: Cause) -> str:
    return "rest" if cause.kind == "remainder" else "cause"


def _spread(count: int, tall: float) -> list[float]:
    """Tops of boxes, spread evenly over the height under the headings."""
    room = (tall - _TOP) / count
    return [round(_TOP + room * (index + 0.5) - _TALL / 2, 1) for index in range(count)]


def _edge(source: Box, sink: Box, flow: float, top: float) -> Edge:
    x1, y1 = source.x + source.wide, source.y + source.tall / 2
    x2, y2 = sink.x, sink.y + sink.tall / 2
    middle = round((x1 + x2) / 2, 1)
    said = f"{source.name} → {sink.name}: {nats(flow)} nats"
    thick = round(max(_THICKEST * abs(flow) / top, 0.6), 2)
    leads = f"switched-{source.name if source.role == 'neuron' else sink.name}"
    return Edge(f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}", flow, thick, said, leads)


def headings(switched: Sequence[Switched]) -> list[tuple[float, str, str]]:
    """x, anchor and words above each column."""
    shown = min(len(switched), NEURONS)
    return [
        (_LEFT[0], "start", "written earlier"),
        (_MIDDLE[0], "start", f"contributes to ({shown} of {len(switched)})"),
        (_RIGHT[1], "end", "which raises"),
    ]
