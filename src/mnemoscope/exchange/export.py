"""An export: what is to be written, in which format; checked before a model is loaded, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemoscope.arguments import check_least, check_question
from mnemoscope.errors import QueryError
from mnemoscope.exchange import circuitsvis, delphi, graph, neuronpedia, openai
from mnemoscope.exchange.sides import SIGNS, Request, Sides
from mnemoscope.files import check_new_folder, expanded, new_folder
from mnemoscope.neuron.striking import Striking
from mnemoscope.records import NeuronId, Progress
from mnemoscope.run.reading import Run

if TYPE_CHECKING:
    from mnemoscope.model.model import Model

Report = Callable[[Progress], None]
LIMIT = 100_000  # tokens of the run's text that delphi's cache holds
_MOST = 2**27  # coefficients of whole texts that are held at once


@dataclass(frozen=True)
class Order:
    """What is exported.

    neurons  by layer, then number; none for a graph, whose neurons the explanation chooses
    prompt   of a graph: the text before the prediction; target and foils as in `explain`
    limit    tokens of the run's text, for delphi's cache
    """

    run: Run
    format: str
    neurons: tuple[NeuronId, ...]
    prompt: str | None
    target: str | None
    foils: tuple[str, ...]
    limit: int

    def sides(
        self, model: Model, report: Report, wanted: Iterable[tuple[NeuronId, int]], **options: Any
    ) -> Sides:
        """Sides of neurons, with the coefficients that the model gives."""
        from mnemoscope.exchange import live

        return Sides(self.run, list(wanted), partial(live.read, model, report), **options)

    def both(self) -> list[tuple[NeuronId, int]]:
        """Both sides of the neurons: by layer, sign, number."""
        layers = sorted({neuron.layer for neuron in self.neurons})
        return [
            (each, sign) for layer in layers for sign in SIGNS for each in self.neurons if each.layer == layer
        ]


def order(
    run: Run,
    to: str,
    path: str | Path,
    *,
    neurons: Sequence[NeuronId] = (),
    layers: Sequence[int] = (),
    prompt: str | None = None,
    target: str | None = None,
    foils: Sequence[str] = (),
    limit: int | None = None,
) -> Order:
    """Check what is to be exported; arguments as in `Run.export`.

    `QueryError` for what the format or the run cannot give, `RunError` for a folder that holds something.
    """
    doing = f"exporting {run.path}"
    if to not in FORMATS:
        raise QueryError(f"{doing}: {{to}} is not a format; give one of {', '.join(FORMATS)}", to=to)
    _check_run(run, doing)
    _check_questions(doing, to, {"prompt": prompt, "target": target, "foils": foils}, bool(neurons or layers))
    if limit is not None:
        if to != "delphi":
            raise QueryError(
                f"{doing}: {{limit}} is for delphi, which takes whole texts; leave it out", limit=limit
            )
        check_least(doing, 1, limit=limit)
    check_new_folder(path, f"{doing} to")
    chosen = () if to == "graph" else _neurons(run, doing, neurons, layers)
    tokens = min(LIMIT if limit is None else limit, run.manifest.corpus.tokens)
    if to == "delphi" and tokens * len(chosen) > _MOST:
        raise QueryError(
            f"{doing}: {len(chosen):,} neurons at {tokens:,} tokens are more coefficients than are held at once; give "
            "fewer neurons, or {limit}",
            limit=_MOST // len(chosen),
        )
    return Order(run, to, chosen, prompt, target, tuple(foils), tokens)


def _check_questions(doing: str, to: str, asked: dict[str, Any], neurons: bool) -> None:
    """QueryError for a graph without a prediction, or with neurons; and for a prediction in any other format."""
    if to != "graph":
        if given := [name for name, value in asked.items() if value]:
            raise QueryError(
                f"{doing}: {{{given[0]}}} is for {{to}}; leave it out", **{given[0]: ..., "to": "graph"}
            )
        return
    if asked["prompt"] is None:
        raise QueryError(
            f"{doing}: a graph is of one prediction; give the text before it, {{prompt}}", prompt=...
        )
    if neurons:
        raise QueryError(
            f"{doing}: the neurons of a graph are those that matter to the prediction; name none"
        )
    check_question(asked["prompt"], asked["target"], asked["foils"])


def _check_run(run: Run, doing: str) -> None:
    """QueryError for what the formats have no place for."""
    model = run.manifest.model
    run.check_neurons("exporting")
    kinds = {
        "an encoder-decoder": model.encoder_layers > 0,
        "an encoder": model.bidirectional,
        "a mixture of experts": bool(model.experts),
    }
    for kind, is_it in kinds.items():
        if is_it:
            raise QueryError(
                f"{doing}: {model.id} is {kind}, and these formats are of neurons that run at every token of a text "
                "that is read from left to right; give a run of such a model"
            )


def _neurons(
    run: Run, doing: str, neurons: Sequence[NeuronId], layers: Sequence[int]
) -> tuple[NeuronId, ...]:
    """The neurons that are given, those of the layers, or else the highlights; QueryError if none has a trigger."""
    sizes = run.manifest.model.sizes
    whole = [
        NeuronId(layer, neuron) for layer in layers for neuron in range(sizes[run.address(layer, 0).layer])
    ]
    chosen = (
        sorted({*neurons, *whole}) if neurons or layers else [pick.id for pick in Striking(run).handful()]
    )
    if not any(run.rows("triggers", *neuron).height for neuron in chosen):
        raise QueryError(f"{doing}: none of these neurons has a trigger; give others")
    return tuple(sorted(chosen))


def export(made: Order, model: Model, path: str | Path, report: Report | None = None) -> Path:
    """Write an export into a new folder, with a README; returns its path.

    `RunMismatch` if the model is not the run's.
    """
    doing = f"exporting {made.run.path} to"
    model.check_built(made.run, "exporting")
    with new_folder(path, doing) as folder:
        text = FORMATS[made.format](made, model, folder, report or (lambda _: None))
        (folder / "README.md").write_text(f"{_head(made)}\n{text.strip()}\n", encoding="utf-8")
    return expanded(path)


def _head(made: Order) -> str:
    about = made.run.manifest
    model, corpus = about.model, about.corpus
    spelling = f" Spelling: {corpus.spelling}." if corpus.spelling else ""
    return (
        f"# {made.format}: {model.id}\n\nWritten by mnemoscope {about.mnemoscope} from a run of {model.id} (weights "
        f"{model.weights_sha256[:16]}) over {corpus.id}: {corpus.tokens:,} tokens, {corpus.contexts:,} contexts. The "
        "coefficient m of a neuron is the input of the down projection, `blocks.LAYER.mlp.hook_post` in "
        f"TransformerLens. It is signed, and was computed in {about.options['dtype']}.{spelling}\n"
    )


def _agreed(sides: Sides) -> str:
    """What becomes of the numbers that a run does not keep, and how far the model agrees with those that it does."""
    reread = sides.reread
    return (
        "\nActivations at triggers are those of the run; a run keeps no others, so that the model read the texts again "
        f"for the tokens around them. At the {reread.compared:,} triggers it gave the same within "
        f"{reread.largest:.1g} of each.\n"
    )


def _of_sides(write: Callable[[Path, Sides], str], random: int = 0) -> Callable[..., str]:
    """A format of sides of neurons."""

    def written(made: Order, model: Model, folder: Path, report: Report) -> str:
        sides = made.sides(model, report, made.both(), random=random)
        return write(folder, sides) + _agreed(sides)

    return written


def _delphi(made: Order, model: Model, folder: Path, report: Report) -> str:
    from mnemoscope.exchange import live

    contexts = dict(_texts(made))
    neurons: dict[int, list[int]] = {}
    for layer, neuron in made.neurons:
        neurons.setdefault(layer, []).append(neuron)
    values = live.rows(model, report, contexts, neurons)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    return delphi.write(folder, made.run.manifest, list(contexts.values()), neurons, values)


def _texts(made: Order) -> Iterable[tuple[int, np.ndarray]]:
    """Contexts of the run from the first on, whole ones, up to the limit; the first in any case."""
    left = made.limit
    for context, tokens in made.run.table("contexts").select("context", "tokens").collect().iter_rows():
        left -= len(tokens)
        if left < 0 and context:
            return
        yield context, np.array(tokens, np.int32)


def _graph(made: Order, model: Model, folder: Path, report: Report) -> str:
    from mnemoscope.exchange import live
    from mnemoscope.prediction.explain import explain

    explanation = explain(model, made.prompt or "", made.target, made.foils, run=made.run, report=report)
    known, position = graph.neurons(explanation), explanation.position
    prompt = {0: explanation.tokens["token"].to_numpy().astype(np.int32)}
    requests = [Request(*neuron, 0, position, position + 1) for neuron in known]
    values = [float(value[0]) for value in live.read(model, report, prompt, requests)]
    drawn = {
        neuron: value if kept is None else kept
        for (neuron, kept), value in zip(known.items(), values, strict=True)
    }
    wanted = [(neuron, -1 if value < 0 else 1) for neuron, value in drawn.items()]
    sides = made.sides(model, report, wanted, most=graph.TRIGGERS, silent=True)
    return graph.write(folder, explanation, drawn, sides) + _agreed(sides)


FORMATS: dict[str, Callable[[Order, Model, Path, Report], str]] = {
    "neuronpedia": _of_sides(neuronpedia.write),
    "openai": _of_sides(openai.write, random=openai.RANDOM),
    "delphi": _delphi,
    "graph": _graph,
    "circuitsvis": _of_sides(circuitsvis.write),
}
