"""Scores of annotators, and one annotated neuron, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.views.terminal import table

if TYPE_CHECKING:
    from mnemoscope.annotation.scores import Annotator, Scores
    from mnemoscope.intervals import Estimate
    from mnemoscope.results import Annotated

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


def scores(result: Scores) -> Group:
    """Every annotator, and their agreement if there are several."""
    lines: list[RenderableType] = [
        Text(f"Annotations of {result.model} on {result.corpus}", style="bold"),
        Text(
            f"{result.neurons} neurons and {result.nulls} hidden null items, {result.prefixes} prefixes each; "
            "[95 % over items].",
            style="dim",
        ),
    ]
    for annotator in result.annotators:
        lines += [Text(), *_annotator(annotator)]
    if result.agreement:
        lines += [Text(), _agreement(result)]
    return Group(*lines)


def _annotator(annotator: Annotator) -> Iterator[RenderableType]:
    left = f", {annotator.open} items left open" if annotator.open else ""
    yield Text(f"{annotator.name}{left}", style="bold")
    rows = []
    for name, question in _QUESTIONS.items():
        judged = getattr(annotator, name)
        figures = (judged.hit_rate, judged.false_alarm_rate, judged.d_prime, judged.corrected)
        rows.append((question, *map(estimate, figures)))
    yield _table(("", "hits", "false alarms", "d'", "corrected share"), rows)
    for kind, (items, named, held) in annotator.false_alarms.items():
        yield Text(f"  {_NULLS[kind]}: a pattern in {named} of {items} items, held up in {held}", style="dim")
    yield Text(
        f"  patterns per item: {estimate(annotator.patterns)}, in null items {estimate(annotator.patterns_in_nulls)}; "
        f"prefixes covered: {estimate(annotator.covered)}, in null items {estimate(annotator.covered_in_nulls)}; of "
        f"these with a semantic pattern: {estimate(annotator.semantic)}"
    )


def _agreement(result: Scores) -> Table:
    rows = []
    for name, question in _ASKED.items():
        agreed = result.agreement[name]
        figures = (agreed.same, agreed.cohen, agreed.fleiss, agreed.gwet, agreed.krippendorff)
        rows.append((question, *map(estimate, figures)))
    return _table(("agreement", "same", "Cohen", "Fleiss", "AC1", "Krippendorff"), rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return table(names, rows, wraps=range(len(names)))


def neuron(result: Annotated) -> Group:
    """The annotated prefixes of one neuron (A28)."""
    rows = result.rows
    names = list(dict.fromkeys(name for patterns in rows["patterns"] for name in patterns))
    lines: list[RenderableType] = [Text(f"{result.neuron} as annotated by {result.annotator}", style="bold")]
    for number, name in enumerate(names, 1):
        count = sum(name in patterns for patterns in rows["patterns"])
        lines.append(Text(f"  {number}  {name} ({count} of {rows.height})"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(4):
        grid.add_column(overflow="fold")
    for row in rows.iter_rows(named=True):
        marks = ",".join(map(str, sorted(names.index(name) + 1 for name in row["patterns"])))
        grid.add_row(f"{row['coefficient']:+.3g}", marks or "–", row["kind"], Text(row["prefix"]))
    return Group(*lines, grid)


def estimate(figure: Estimate) -> str:
    """``.62 [.50, .73]``, or a dash where it is not defined."""
    if figure.value is None or figure.low is None or figure.high is None:
        return "–"
    numbers = (figure.value, figure.low, figure.high)
    value, low, high = (f"{number:.2f}".replace("0.", ".", 1) for number in numbers)
    return f"{value} [{low}, {high}]"
