"""Tested patterns in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mnemoscope.patterns.claims import Claim
from mnemoscope.views import claims as wording
from mnemoscope.views.cards import number

_SIDES = {"purity": "precision", "coverage": "recall", "f1": "F1"}


def section(claims: Sequence[Claim] | None, width: int) -> Iterator[RenderableType]:
    """The part of a card that is about patterns; nothing if none were looked for."""
    if claims is None:
        return
    yield Text()
    yield Text("patterns, on held-out text", style="bold")
    if not claims:
        yield Text(" none that its triggers share beyond chance", style="dim")
    for claim in claims:
        if wording.believed(claim):
            yield from verdict(claim, width, whole=True)
    if rest := [claim for claim in claims if not wording.believed(claim)]:
        yield Padding(doubted(rest), (0, 0, 0, 1))
    if claims:
        yield Padding(Text(wording.RESAMPLED, style="dim"), (0, 0, 0, 1))


def verdict(claim: Claim, width: int, *, whole: bool) -> Iterator[RenderableType]:
    """The verdict as a sentence; if `whole`, also what it rests on."""
    line = Text(f"{wording.active_means(claim)} ")
    line.append(claim.name, style="bold italic").append(wording.family(claim))
    line.append(f" {wording.evidence(claim)}: ", style="" if whole else "dim").append(
        wording.verdict_words(claim), style="bold"
    )
    line.append(f". {wording.meaning(claim)}")
    yield Padding(line, (0, 0, 0, 1))
    if not whole:
        return
    parts = (
        wording.where_active(claim), wording.figures(claim), wording.baselines(claim), wording.specificity(claim),
        wording.bands(claim),
    )  # fmt: skip
    for text in parts:
        if text:
            yield Padding(Text(text, style="dim"), (0, 0, 0, 3))
    yield Padding(curve(claim, width - 20), (0, 0, 0, 3))
    yield Padding(definitions(claim), (0, 0, 0, 3))


def doubted(claims: Sequence[Claim]) -> RenderableType:
    """Claims without a verdict, a row each."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(wording.DOUBTED):
        table.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
    for claim in claims:
        table.add_row(*wording.doubted(claim), style="dim")
    return table


def curve(claim: Claim, most: int) -> RenderableType:
    """Precision, recall and F1 over thresholds, as lines of blocks of 0 to 1."""
    points = wording.sampled(claim, min(most, 48))
    table = Table.grid(padding=(0, 2, 0, 0))
    if not points:
        return table
    for name, told in _SIDES.items():
        values = [getattr(point, name) for point in points]
        table.add_row(Text(told, style="dim"), wording.spark(values))
    ends = [number(claim.polarity * points[place].threshold, sign=True) for place in (0, -1)]
    table.add_row(
        "", Text(f"{ends[0]}{ends[1]:>{max(len(points) - len(ends[0]), len(ends[1]) + 1)}}", style="dim")
    )
    return table


def definitions(claim: Claim) -> RenderableType:
    """The verdict under other meanings of active."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(wording.DEFINITIONS):
        table.add_column(name, justify="left" if place in (0, 6) else "right", no_wrap=0 < place < 6)
    for one in claim.definitions:
        table.add_row(*wording.definition(one))
    return table
