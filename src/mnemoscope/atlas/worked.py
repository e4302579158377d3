"""The graph of a prediction to work with: of each node what is under a threshold is left out, and counted.

What is pinned stays, with its links to all that is shown, and what a node leaves out can be opened. All of this stands
in the address of the page; the nodes and links are those of `exchange.graph`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mnemoscope.views.words import number

WIDE, TALL, ROW, GAP = 176, 24, 32, 108  # of a box, from row to row, and between columns
_THICKEST = 11.0
_SHORT = 22  # letters of a name in a box
_KINDS = {
    "embedding": "cause",
    "mlp reconstruction error": "rest",
    "cross layer transcoder": "neuron",
    "logit": "target",
}


@dataclass(frozen=True)
class NodeBox:
    """A node where it is drawn; `neuron` is its address, if it is one."""

    id: str
    name: str
    said: str
    kind: str
    neuron: str
    pinned: bool
    x: float
    y: float


@dataclass(frozen=True)
class Link:
    """A link that is drawn, from one box to another; `said` in words."""

    source: str
    target: str
    weight: float
    said: str
    path: str
    thick: float


@dataclass(frozen=True)
class LeftOut:
    """What a node does not show: how many links into it, and what they add up to."""

    id: str
    name: str
    count: int
    weight: str
    opened: bool


@dataclass(frozen=True)
class WorkedGraph:
    """What is drawn, and what is not."""

    boxes: tuple[NodeBox, ...]
    links: tuple[Link, ...]
    left_out: tuple[LeftOut, ...]
    wide: float
    tall: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values: without places."""
        return {
            "nodes": [
                {name: getattr(box, name) for name in ("id", "name", "said", "kind", "neuron", "pinned")}
                for box in self.boxes
            ],
            "links": [
                {name: getattr(link, name) for name in ("source", "target", "weight")} for link in self.links
            ],
            "left_out": [vars(each) for each in self.left_out],
        }


def worked(
    drawn: Mapping[str, Any], least: float, pinned: Collection[str] = (), opened: Collection[str] = ()
) -> WorkedGraph:
    """What is shown of a graph.

    least   a link is left out under this share of the largest into the same node
    pinned  nodes that are shown whatever their links are, by their ids
    opened  nodes that show all links into them
    """
    nodes = {node["node_id"]: node for node in drawn["nodes"]}
    into: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for link in drawn["links"]:
        into[link["target"]].append((link["source"], link["weight"]))
    ends = [name for name, node in nodes.items() if node["feature_type"] == "logit" or name in pinned]
    shown, links, left_out = dict.fromkeys(ends), [], []
    for end in ends:  # which grows by the neurons that are shown
        largest = max((abs(weight) for _, weight in into[end]), default=0.0)
        rest = []
        for source, weight in into[end]:
            if abs(weight) >= least * largest or source in pinned or end in opened:
                links.append((source, end, weight))
                if source not in shown:
                    shown[source] = None
                    ends.append(source)
            else:
                rest.append(weight)
        if rest or end in opened:
            name, unit = _name(nodes[end], drawn), _amount(nodes[end], sum(rest))
            left_out.append(LeftOut(end, name, len(rest), unit, end in opened))
    places, wide, tall = _places(list(shown), links, nodes)
    boxes = tuple(_box(nodes[name], drawn, name in pinned, *places[name]) for name in shown)
    return WorkedGraph(boxes, tuple(_links(links, nodes, drawn, places)), tuple(left_out), wide, tall)


def _places(
    shown: list[str], links: list[tuple[str, str, float]], nodes: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, tuple[float, float]], float, float]:
    """x and y of each node, and the size of it all: a column for each step before the output, tokens first."""
    leads: dict[str, list[str]] = defaultdict(list)
    for source, end, _ in links:
        leads[source].append(end)
    steps: dict[str, int] = {}

    def before(name: str) -> int:
        """Links from a node to an output, at most; an output has none."""
        if name not in steps:
            steps[name] = 1 + max(map(before, leads[name]), default=-1)
        return steps[name]

    kinds = {name: _KINDS[nodes[name]["feature_type"]] for name in shown}
    neurons = {name: max(before(name), 1) for name in shown if kinds[name] == "neuron"}
    last = max(neurons.values(), default=0) + 1
    columns: dict[int, list[str]] = defaultdict(list)
    for name in shown:
        first = last - neurons[name] if name in neurons else 0
        columns[last if kinds[name] == "target" else first].append(name)
    tall = ROW * max(map(len, columns.values()))
    places: dict[str, tuple[float, float]] = {}
    for column, names in columns.items():
        names.sort(key=lambda name: _order(nodes[name]))
        room = tall / len(names)
        for row, name in enumerate(names):
            places[name] = (column * (WIDE + GAP), round(room * (row + 0.5) - TALL / 2, 1))
    return places, (last + 1) * WIDE + last * GAP, tall


def _order(node: Mapping[str, Any]) -> tuple[int, int, int, str]:
    layer = -1 if node["layer"] == "E" else int(node["layer"])
    return node["feature_type"] != "embedding", layer, node["ctx_idx"], node["node_id"]


def _links(
    links: list[tuple[str, str, float]],
    nodes: Mapping[str, Mapping[str, Any]],
    drawn: Mapping[str, Any],
    places: Mapping[str, tuple[float, float]],
) -> list[Link]:
    largest: dict[str, float] = defaultdict(float)
    for _, end, weight in links:
        kind = nodes[end]["feature_type"]
        largest[kind] = max(largest[kind], abs(weight))
    made = []
    for source, end, weight in links:
        (x1, y1), (x2, y2) = places[source], places[end]
        x1, y1, y2 = x1 + WIDE, y1 + TALL / 2, y2 + TALL / 2
        middle = round((x1 + x2) / 2, 1)
        names = (_name(nodes[source], drawn), _name(nodes[end], drawn))
        said = f"{names[0]} → {names[1]}: {_amount(nodes[end], weight)}"
        thick = round(max(_THICKEST * abs(weight) / (largest[nodes[end]["feature_type"]] or 1.0), 0.6), 2)
        path = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"
        made.append(Link(source, end, weight, said, path, thick))
    return sorted(made, key=lambda link: -link.thick)


def _amount(end: Mapping[str, Any], weight: float) -> str:
    """Nats of an output, or a share of a neuron's coefficient."""
    if end["feature_type"] == "logit":
        return f"{number(weight, sign=True)} nats"
    return f"{100 * weight:+.3g} % of its coefficient"


def _name(node: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    kind, place = node["feature_type"], node["ctx_idx"]
    if kind == "embedding":
        return f"{drawn['metadata']['prompt_tokens'][place].strip() or '·'} @{place}"
    if kind == "cross layer transcoder":
        return str(node["clerp"].split()[0])
    return str(node["clerp"].removeprefix("Output "))


def _box(node: Mapping[str, Any], drawn: Mapping[str, Any], pinned: bool, x: float, y: float) -> NodeBox:
    name, kind = _name(node, drawn), _KINDS[node["feature_type"]]
    short = name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…"
    return NodeBox(
        node["node_id"], short, node["clerp"] or name, kind, name if kind == "neuron" else "", pinned, x, y
    )
