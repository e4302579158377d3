"""Scores of annotators, and one annotated neuron, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import polars as pl

    from mnemoscope.annotation.scores import Annotator, Scores
    from mnemoscope.records import Estimate

_NULLS = {
    "random": "random prefixes",
    "direction": "random directions",
    "mixed": "many neurons mixed",
}
_QUESTIONS = {
    "found": "a pattern was found (items)",
    "held": "it held up on held-out triggers (items)",
    "applied": "it was seen in held-out triggers (prefixes)",
}
_ASKED = {
    "found": "has the item a pattern",
    "labels": "kind of pattern of a prefix",
    "applied": "does a pattern apply",
}


@dataclass(frozen=True)
class scores:  # noqa: N801 - called like a function: annotation.scores(found)
    """Every annotator, and their agreement if there are several."""

    found: Scores

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        yield Text(f"Annotations of {found.model} on {found.corpus}", style="bold")
        yield Text(
            f"{found.neurons} neurons and {found.nulls} hidden null items, {found.prefixes} prefixes each; "
            "[95 % over items].",
            style="dim",
        )
        for annotator in found.annotators:
            yield Text()
            yield from _annotator(annotator)
        if found.agreement:
            yield Text()
            yield _agreement(found)


def _annotator(one: Annotator) -> Iterator[Text | Table]:
    left = f", {one.open} items left open" if one.open else ""
    yield Text(f"{one.name}{left}", style="bold")
    table = _table("", "hits", "false alarms", "d'", "corrected share")
    for name, question in _QUESTIONS.items():
        judged = getattr(one, name)
        figures = (judged.hit_rate, judged.false_alarm_rate, judged.d_prime, judged.corrected)
        table.add_row(question, *(estimate(figure) for figure in figures))
    yield table
    for kind, (items, found, held) in one.false_alarms.items():
        yield Text(f"  {_NULLS[kind]}: a pattern in {found} of {items} items, held up in {held}", style="dim")
    yield Text(
        f"  patterns per item: {estimate(one.patterns)}, in null items {estimate(one.patterns_in_nulls)}; prefixes "
        f"covered: {estimate(one.covered)}, in null items {estimate(one.covered_in_nulls)}; of these with a semantic "
        f"pattern: {estimate(one.semantic)}"
    )


def _agreement(found: Scores) -> Table:
    table = _table("agreement", "same", "Cohen", "Fleiss", "AC1", "Krippendorff")
    for name, question in _ASKED.items():
        one = found.agreement[name]
        figures = (one.same, one.cohen, one.fleiss, one.gwet, one.krippendorff)
        table.add_row(question, *(estimate(figure) for figure in figures))
    return table


@dataclass(frozen=True)
class neuron:  # noqa: N801
    """The annotated prefixes of one neuron (A28)."""

    title: str
    rows: pl.DataFrame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        names = list(dict.fromkeys(name for some in self.rows["patterns"] for name in some))
        for number, name in enumerate(names, 1):
            count = sum(name in some for some in self.rows["patterns"])
            yield Text(f"  {number}  {name} ({count} of {self.rows.height})")
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            table.add_column(overflow="fold")
        for row in self.rows.iter_rows(named=True):
            marks = ",".join(map(str, sorted(names.index(name) + 1 for name in row["patterns"])))
            table.add_row(f"{row['coefficient']:+.3g}", marks or "–", row["kind"], Text(row["prefix"]))
        yield table


def estimate(one: Estimate) -> str:
    """``.62 [.50, .73]``, or a dash where it is not defined."""
    if one.value is None or one.low is None or one.high is None:
        return "–"
    value, low, high = (f"{number:.2f}".replace("0.", ".", 1) for number in (one.value, one.low, one.high))
    return f"{value} [{low}, {high}]"


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at else "left", overflow="fold")
    return table
