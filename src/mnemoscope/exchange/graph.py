"""An explanation as an attribution graph, as Neuronpedia and circuit-tracer's viewer read it.

Nodes are tokens of the prompt, neurons at the explained position, the rest of each layer, and the target with its
foils. A neuron is a layer and a number, of which the format makes one number: Cantor's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

from mnemoscope.errors import QueryError
from mnemoscope.exchange.sides import NeuronSide, Passage, Sides
from mnemoscope.exchange.written import slug, spelled, visible, write_json
from mnemoscope.prediction.explanation import ChosenToken, Contrast, Explanation
from mnemoscope.records import NeuronId
from mnemoscope.text.vocabulary import Vocabulary

CARDS = "features"  # folder of the cards, beside the graph
TRIGGERS = 8  # of a card
LOGITS = 10  # tokens raised, and lowered, of a card
LEFT = "leave_one_out"
_Part = tuple[Any, ...]  # kind, and where
_SPACE = str.maketrans({"\n": "⏎", "\t": "⇥", '"': "”"})

DESCRIPTION = (
    "A prediction taken apart by mnemoscope. Links to an output are in nats: what its log-probability loses when the "
    "part is left out of the end of the residual stream, under the {lens} lens, with nothing downstream reacting; such "
    "numbers do not add up. From a token comes what all heads brought from it, and from the last one its own embedding "
    "too; from the rest of a layer (err) what leaving out the layer and biases beside it costs, less what its drawn "
    "neurons cost. Links to a neuron are shares of its coefficient, 1 being all of it, with norms and rates of "
    "activation as they were; from a token comes what heads carried from it. What is too small to be listed is not "
    "drawn, so that shares do not add up to 1, and only the neurons that matter most have such links. Activation is "
    "the coefficient, with its sign."
)

README = """
`{slug}.json`: the graph of the prediction, and `graph-metadata.json`, which lists it: a data folder of
circuit-tracer's viewer. `features/`: a card of each drawn neuron, with the triggers of the side that it was on here
(with its sign turned where its coefficient was negative), and the tokens that this side raises and lowers. What the
weights of links are is said in the graph, in `metadata.info.description`.

```python
from circuit_tracer.frontend.local_server import serve  # circuit-tracer; it listens on every address of this machine

server = serve(data_dir=".", port=8032)  # then open http://localhost:8032/index.html
```

To upload the graph to Neuronpedia, put the id of a model there in `metadata.scan`.
"""


def check(explanation: Explanation) -> None:
    """QueryError for what the format has no place for."""
    if explanation.encoded:
        raise QueryError(
            "drawing a graph: it has one row of tokens and one of layers, and an encoder-decoder has two; use --html"
        )


def write(
    folder: Path, explanation: Explanation, coefficients: Mapping[NeuronId, float], sides: Sides
) -> str:
    """Write a folder for the viewer, with a card of each of `sides`; returns what its README says.

    coefficients  of all `neurons`
    """
    raised = {}
    for side in sides:
        shown = card(side, sides.run.vocabulary)
        write_json(folder / CARDS / f"{shown['index']}.json", shown)
        raised[side.id] = shown["top_logits"]
    drawn = graph(explanation, coefficients, raised, scan=f"./data/{CARDS}")
    name = drawn["metadata"]["slug"]
    write_json(folder / f"{name}.json", drawn)
    write_json(folder / "graph-metadata.json", {"graphs": [drawn["metadata"]]})
    return README.format(slug=name)


def graph(
    explanation: Explanation,
    coefficients: Mapping[NeuronId, float] | None = None,
    raised: Mapping[NeuronId, Sequence[str]] | None = None,
    scan: str | None = None,
) -> dict[str, Any]:
    """The graph as plain values.

    coefficients  of all `neurons`; None for what the explanation knows
    raised        tokens that neurons raise, which stand beside their names; the explanation knows those of most
    scan          where cards are; the name of the model if None

    `QueryError` for an encoder-decoder.
    """
    check(explanation)
    drawn = _GraphParts(explanation, coefficients or neurons(explanation), raised or {})
    return {
        "metadata": {
            "slug": slug(explanation.prompt),
            "scan": scan or slug(explanation.model),
            "transcoder_list": [],
            "prompt_tokens": list(explanation.tokens["piece"]),
            "prompt": explanation.prompt,
            "schema_version": 1,
            "info": {
                "description": DESCRIPTION.format(lens=explanation.lens),
                "generator": {"name": "mnemoscope", "version": metadata.version("mnemoscope")},
                "create_time_ms": time.time_ns() // 1_000_000,
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "either",
            "clickedId": drawn.output(explanation.target),
            "sg_pos": "",
        },
        "nodes": list(drawn.nodes()),
        "links": [
            {"source": source, "target": target, "weight": weight} for source, target, weight in drawn.links()
        ],
    }


def cantor(layer: int, neuron: int) -> int:
    """The one number of a neuron."""
    return (layer + neuron) * (layer + neuron + 1) // 2 + neuron


def neurons(explanation: Explanation) -> dict[NeuronId, float | None]:
    """The neurons that are drawn, with their coefficients; of one that only switched others on it is not known."""
    rows = explanation.neurons.select("layer", "neuron", "coefficient").iter_rows()
    known: dict[NeuronId, float | None] = {NeuronId(layer, neuron): value for layer, neuron, value in rows}
    below = explanation.queries.filter(pl.col("kind") == "neuron").select("query_layer", "query_unit")
    return {NeuronId(*address): None for address in below.iter_rows()} | known


@dataclass(frozen=True)
class _GraphParts:
    """The nodes and links of an explanation."""

    of: Explanation
    coefficients: Mapping[NeuronId, float | None]
    raised: Mapping[NeuronId, Sequence[str]]

    def neuron(self, address: tuple[int, int]) -> str:
        return f"{address[0]}_{address[1]}_{self.of.position}"

    def rest(self, layer: int) -> str:
        return f"err_{layer}_{self.of.position}"

    def token(self, position: int) -> str:
        return f"E_{self.of.tokens['token'][position]}_{position}"

    def output(self, chosen: ChosenToken) -> str:
        return f"{self.of.layer_count + 1}_{chosen.token}_{self.of.position}"

    def nodes(self) -> Iterator[dict[str, Any]]:
        """Tokens, rests of layers, neurons, outputs."""
        explanation, position = self.of, self.of.position
        for place, token in explanation.tokens.select("position", "token").iter_rows():
            yield _node(self.token(place), "E", place, place, "embedding", f"E_{token}-{place}")
        for layer in self._layers():
            name = self.rest(layer)
            yield _node(
                name, layer, position, -1, "mlp reconstruction error", f"{name}-0", f"rest of layer {layer}"
            )
        raised = dict(self.raised) | {
            NeuronId(layer, neuron): promotes
            for layer, neuron, promotes in explanation.neurons.select(
                "layer", "neuron", "promotes"
            ).iter_rows()
        }
        names = self._names()
        for address, coefficient in self.coefficients.items():
            layer, neuron = address
            words = " ".join(piece.strip() or "·" for piece in (raised.get(address) or ())[:3]).translate(
                _SPACE
            )
            yield _node(
                self.neuron(address), layer, position, cantor(layer, neuron), "cross layer transcoder",
                f"{layer}_{neuron}-0", f"{names.get(address, str(address))} {words}".strip(), activation=coefficient,
            )  # fmt: skip
        yield self._output(explanation.target, float(explanation.stream["probability"][-1]), True)
        for contrast in explanation.contrasts:
            yield self._output(contrast.foil, contrast.probability, False)

    def _names(self) -> dict[NeuronId, str]:
        """What neurons are called in a mixture of experts, with the expert; none in other models."""
        columns = {
            ("layer", "neuron", "address"): self.of.neurons,
            ("query_layer", "query_unit", "query_address"): self.of.queries.filter(
                pl.col("kind") == "neuron"
            ),
        }
        return {
            NeuronId(layer, neuron): name
            for names, frame in columns.items()
            if names[2] in frame.columns
            for layer, neuron, name in frame.select(names).iter_rows()
        }

    def _output(self, chosen: ChosenToken, probability: float, is_target: bool) -> dict[str, Any]:
        position, layer = self.of.position, self.of.layer_count + 1
        return _node(
            self.output(chosen), layer, position, chosen.token, "logit", f"L_{chosen.token}-{position}",
            f'Output "{chosen.piece.translate(_SPACE)}" (p={probability:.3f})',
            token_prob=probability, is_target_logit=is_target,
        )  # fmt: skip

    def _layers(self) -> list[int]:
        """Those with a rest: of the account, and what switched neurons on without being a head or a neuron."""
        told = self.of.layers.filter(pl.col("part") == self.of.unit_part)["layer"]
        below = self.of.queries.filter(~pl.col("kind").is_in(["embedding", "head", "neuron"]))["query_layer"]
        return sorted({*told, *below.drop_nulls()})

    def links(self) -> Iterator[tuple[str, str, float]]:
        """Sources, targets and weights, as `DESCRIPTION` says; no two of the same nodes, and none of 0."""
        target = self._costs(self.of, "tokens", "position")
        ends = {self.output(self.of.target): self._weights(target)}
        for contrast in self.of.contrasts:
            apart = self._costs(contrast, "sources", "source")  # of the target less those of the foil
            foil = {key: target[key] - apart[key] for key in target.keys() & apart.keys()}
            ends.setdefault(self.output(contrast.foil), self._weights(foil))
        for end, weights in (ends | self._switched()).items():
            for source, weight in weights.items():
                if weight:
                    yield source, end, weight

    def _costs(self, frames: Explanation | Contrast, brought: str, position: str) -> dict[_Part, float]:
        """What leaving out each part costs: what heads brought from a token, a layer and biases beside it, a neuron."""
        unit_part = self.of.unit_part
        layers = frames.layers.filter(pl.col("part") == unit_part)
        rows = [
            *(
                (("token", at), cost)
                for at, cost in getattr(frames, brought).select(position, LEFT).iter_rows()
            ),
            *((("layer", layer), cost) for layer, cost in layers.select("layer", LEFT).iter_rows()),
        ]
        costs: dict[_Part, float] = defaultdict(float)
        for key, cost in rows:
            costs[key] += cost
        for kind, layer, cost in frames.others.select("part", "layer", LEFT).iter_rows():
            if kind == "embedding":
                costs["token", self.of.position] += cost
            elif kind in ("attention bias", "mixer") and unit_part == "ffn":
                costs["layer", layer] += cost
        for layer, neuron, cost in frames.neurons.select("layer", "neuron", LEFT).iter_rows():
            costs["neuron", layer, neuron] = cost
        return dict(costs)

    def _weights(self, costs: Mapping[_Part, float]) -> dict[str, float]:
        """The links of an output: a layer is what its drawn neurons leave of it."""
        weights = {}
        for (kind, *place), cost in costs.items():
            if kind == "layer":
                inside = [
                    value
                    for (inner, *where), value in costs.items()
                    if inner == "neuron" and where[0] == place[0]
                ]
                weights[self.rest(place[0])] = cost - sum(inside)
            else:
                weights[self.token(*place) if kind == "token" else self.neuron((place[0], place[1]))] = cost
        return weights

    def _switched(self) -> dict[str, dict[str, float]]:
        """Of each neuron whose queries are known the shares of its coefficient."""
        drawn, shares = self.coefficients, defaultdict[str, dict[str, float]](lambda: defaultdict(float))
        names = ("layer", "neuron", "kind", "query_layer", "query_unit", "source", "share")
        for layer, neuron, kind, below, unit, source, share in self.of.queries.select(names).iter_rows():
            coefficient = drawn[NeuronId(layer, neuron)]
            if kind == "embedding":
                node = self.token(self.of.position)
            elif kind == "head":
                node = self.token(source)
            elif kind == "neuron":
                node = self.neuron((below, unit))
            elif below is not None:
                node = self.rest(below)
            else:
                continue  # the key's bias, and what is not listed
            shares[self.neuron((layer, neuron))][node] += share / coefficient if coefficient else 0.0
        return shares


def _node(
    name: str, layer: int | str, position: int, feature: int, kind: str, js: str, clerp: str = "", **more: Any
) -> dict[str, Any]:
    return {
        "node_id": name, "feature": feature, "layer": str(layer), "ctx_idx": position, "feature_type": kind,
        "jsNodeId": js, "clerp": clerp,
    } | more  # fmt: skip


def card(side: NeuronSide, words: Vocabulary) -> dict[str, Any]:
    """What the viewer shows of a neuron."""
    return {
        "transcoder_id": side.card.model,
        "index": cantor(*side.id),
        "examples_quantiles": [
            {
                "quantile_name": f"{side.id}, {'with its sign turned, ' if side.polarity < 0 else ''}strongest",
                "examples": [_example(passage, words) for passage in side.top],
            }
        ],
        "top_logits": spelled(words, [token for token, _ in side.writes()[:LOGITS]]),
        "bottom_logits": spelled(words, [token for token, _ in side.writes(raised=False)[:LOGITS]]),
        "act_min": 0.0,
        "act_max": side.maximum,
        "quantile_values": [],
        "histogram": [],
        "activation_frequency": side.active,
    }


def _example(passage: Passage, words: Vocabulary) -> dict[str, Any]:
    return {
        "tokens": visible(words, passage),
        "tokens_acts_list": list(passage.values),
        "train_token_ind": passage.at,
        "is_repeated_datapoint": False,
    }
