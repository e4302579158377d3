"""The gallery of a run: one page that holds everything it shows and opens from disk without a network."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from mnemoscope import files
from mnemoscope.neuron import striking
from mnemoscope.neuron.card import card
from mnemoscope.neuron.overview import overview
from mnemoscope.patterns import summary
from mnemoscope.records import NeuronId, Progress
from mnemoscope.views import words
from mnemoscope.views.charts import strips
from mnemoscope.views.page import Most, environment

if TYPE_CHECKING:
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.neuron.overview import LayerSummary, Overview
    from mnemoscope.neuron.striking import Pick
    from mnemoscope.run.reading import Run

BEST = 6  # neurons of the whole run by each criterion, beside the neurons of each layer
MOST = Most(examples=5, between=4, tokens=10)
WINDOW = (28, 14)  # tokens of text around an example: a page of hundreds of cards must stay a few MB
_DOING = "writing the gallery"
_LABELS = {
    "": "all",
    "tested": "clearest tested patterns",
    "next": "says what comes next",
    "token": "one token",
    "peaked": "most peaked",
    "sides": "most two-sided",
    "quiet": "dead or quiet",
    "chance": "at random",
}


@dataclass(frozen=True)
class Reason:
    """Why a neuron is on the page; the table sorts by `score` within one criterion, larger is more striking."""

    criterion: str
    score: float
    text: str


@dataclass(frozen=True)
class LayerSection:
    """One layer of the page: its summary, and its cards with the reasons they were chosen."""

    summary: LayerSummary
    cards: tuple[tuple[NeuronCard, tuple[Reason, ...]], ...]


def write(
    run: Run,
    path: str | Path,
    *,
    neurons_per_layer: int = 6,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write the gallery of a run to an .html file, whole or not at all; returns its path.

    `RunError` if the file cannot be written.
    """
    check(path)
    files.write(path, render(run, neurons_per_layer=neurons_per_layer, progress=progress), _DOING)
    return files.expanded(path)


def check(path: str | Path) -> None:
    """RunError if no gallery can be written there; makes the folder that it is to lie in."""
    files.make_folder_of(path, _DOING)
    files.check_file(path, _DOING)


def render(
    run: Run, *, neurons_per_layer: int = 6, progress: Callable[[Progress], None] | None = None
) -> str:
    """The page as text."""
    report = progress or (lambda step: None)
    whole = overview(run)
    cells = run.manifest.model.cells
    middle = cells.layers[len(cells.layers) // 2]
    picks = _picks(run, len(cells.sizes), neurons_per_layer)
    sections, pictures = [], []
    drawn = zip(whole.layers, strips(whole), strict=True)
    for layer, picture in ((layer, picture) for layer, picture in drawn if layer.neurons):
        report(Progress("drawing gallery", layer.layer, len(whole.layers), "layers"))
        cards = (
            (card(run, address, examples=MOST.examples, window=WINDOW), tuple(reasons))
            for address, reasons in picks[layer.layer].items()
        )
        sections.append(LayerSection(layer, tuple(cards)))
        pictures.append((layer, Markup(picture)))
    page = (
        environment()
        .get_template("gallery.html")
        .render(
            manifest=run.manifest,
            cells=cells,
            example=cells.id(middle, cells.sizes[middle] // 4),
            path=run.path,
            figures=_figures(run, whole),
            strips=pictures,
            layers=sections,
            criteria=_criteria(picks),
            most=MOST,
            per_layer=neurons_per_layer,
            best=BEST,
            total=sum(layer.neurons for layer in whole.layers),
            known={address for layer in picks for address in layer},
            folder=shlex.quote(str(run.path)),
            tested="pattern_tests" in run.manifest.tables,
            licence=run.manifest.corpus.source.get("license") or run.manifest.corpus.source.get("licence"),
        )
    )
    report(Progress("drawing gallery", len(whole.layers), len(whole.layers), "layers"))
    return page


def _picks(run: Run, layers: int, count: int) -> list[dict[NeuronId, list[Reason]]]:
    """For each layer its neurons, in order, each with every reason for which it was chosen."""
    picks: list[dict[NeuronId, list[Reason]]] = [{} for _ in range(layers)]
    for address, reason in _reasons(run, layers, count):
        reasons = picks[address.layer].setdefault(address, [])
        if reason.criterion not in [other.criterion for other in reasons]:
            reasons.append(reason)
    return picks


def _reasons(run: Run, layers: int, count: int) -> Iterable[tuple[NeuronId, Reason]]:
    choice = striking.Striking(run)
    picks = [pick for layer in range(layers) for pick in choice.layer(layer, count)]
    picks += [pick for name in striking.CRITERIA if name != "chance" for pick in choice.best(name, BEST)]
    for pick in picks:
        yield pick.id, Reason(pick.criterion, _score(pick), words.reason(pick))
    if "pattern_tests" not in run.manifest.tables:
        return
    clearest = summary.clearest(run, 2 * BEST)
    text = f"among the {clearest.height} clearest tested patterns of the run"
    for rank, address in enumerate(clearest.select("layer", "neuron").iter_rows()):
        yield NeuronId(*address), Reason("tested", float(clearest.height - rank), text)


def _criteria(picks: list[dict[NeuronId, list[Reason]]]) -> list[tuple[str, str]]:
    """The reasons that occur, with their labels, and first all together."""
    occurring = {
        "",
        *(reason.criterion for layer in picks for reasons in layer.values() for reason in reasons),
    }
    return [(name, label) for name, label in _LABELS.items() if name in occurring]


def _score(pick: Pick) -> float:
    if pick.criterion in ("next", "token"):
        return round(pick.value - (pick.usual or 0.0), 6)
    return round(-pick.value if pick.criterion == "quiet" else pick.value, 6)


def _figures(run: Run, whole: Overview) -> list[tuple[str, str]]:
    total = sum(layer.neurons for layer in whole.layers)
    one_sided = sum(layer.one_sided for layer in whole.layers)
    live = [
        (layer.neurons - layer.dead - layer.constant, layer.heavy_tailed or 0.0) for layer in whole.layers
    ]
    heavy = sum(count * share for count, share in live) / max(sum(count for count, _ in live), 1)
    return [
        ("neurons", f"{total:,}"),
        ("dead (always 0)", f"{whole.dead:,}"),
        ("constant", f"{whole.constant:,}"),
        ("one-sided", f"{one_sided:,}"),
        ("of the others heavier tails than normal", words.share(heavy)),
        ("tokens counted", f"{run.manifest.corpus.counted:,}"),
    ]
