"""What `mnemoscope patterns` found in a run, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.analyses.labels import LabelCheck
from mnemoscope.analyses.neuron import NeuronCard
from mnemoscope.analyses.patterns import SHARES, Summary
from mnemoscope.patterns.triggers import NEURON, NULLS
from mnemoscope.views import cards, claims_terminal
from mnemoscope.views.cards import number
from mnemoscope.views.claims import believed, decimal

EXAMPLES = 3


def summary(
    found: Summary, check: LabelCheck | None, clear: Sequence[NeuronCard], silent: Sequence[NeuronCard]
) -> RenderableType:
    """Tables of shares, the outside check, and short cards of some neurons with and without a pattern."""
    parts: list[RenderableType] = [
        _title("neurons with a pattern beyond each null, by layer"),
        _note(
            "% of neurons, either sign; in brackets 95 % intervals (Wilson, over neurons); in italics pseudo-neurons"
        ),
        _shares(found, "main"),
        _title("the same of common patterns and unions of words, by the whole distribution"),
        _shares(found, "whole"),
        _title("the same about the token that comes next"),
        _shares(found, "next"),
        _title("verdicts"),
        _verdicts(found),
        *(_note(line) for line in expected_lines(found)),
        _title("held-out triggers explained by confirmed patterns (Figure 2, A8)"),
        _note("semantic: beyond the last token (N2); in italics random directions"),
        _explained(found),
    ]
    if check:
        parts += [_title("outside check"), Text(label_line(check))]
    for title, some in (("clearest", clear), ("no pattern above the null, drawn at random", silent)):
        if some:
            parts.append(_title(title))
        for card in some:
            parts += [Text(), *short(card)]
    return Group(*parts)


def expected_lines(found: Summary) -> list[str]:
    """How many verdicts of each family pseudo-neurons would have had in place of neurons."""
    lines = []
    for (tests,), some in found.expected.filter(pl.col("believed") > 0).group_by(
        "tests", maintain_order=True
    ):
        rates = [
            f"of {NULLS.get(row['unit'], row['unit'])} {cards.share(row['share'])}"
            for row in some.iter_rows(named=True)
        ]
        count = some["believed"][0]
        lines.append(
            f"{tests}: {count:,} of neurons; at the rate {', '.join(rates)} of as many would be expected"
        )
    return lines


def label_line(check: LabelCheck) -> str:
    """The outside check in a sentence."""
    documents = f"{check.labels} labels, {check.documents:,} held-out documents"
    return (
        f"{check.patterns:,} topic patterns of neurons against the documents' own “{check.key}” ({documents}): median "
        f"mutual information {number(check.median)} nats, {number(check.shuffled)} with shuffled labels; "
        f"{check.beyond:,} exceed the 95th percentile of their shuffles ({0.05 * check.patterns:.0f} would by chance)"
    )


def short(card: NeuronCard) -> list[RenderableType]:
    """A neuron in a few lines: its claims, and some triggers of the side that the first one is about."""
    claims = [claim for claim in card.claims or () if believed(claim)] or list(card.claims or ())[:1]
    line = Text(str(card.id), style="bold")
    lines: list[RenderableType] = [line]
    for claim in claims[:1]:
        lines += claims_terminal.verdict(claim, 80, whole=False)
    polarity = claims[0].polarity if claims else card.sides[0].polarity
    side = card.positive if polarity > 0 else card.negative
    for example in side.examples[:EXAMPLES]:
        head, active = cards.active(example)
        text = Text(f"   {number(example.coefficient, sign=True):>7}  ", style="dim")
        text.append("".join(example.before)[-60:] + head, style="not dim").append(
            f"[{active}]", style="not dim bold"
        )
        lines.append(text)
    return lines


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _note(text: str) -> Text:
    return Text(text, style="dim")


def _shares(found: Summary, tests: str) -> RenderableType:
    rows = found.beyond.filter(pl.col("tests") == tests)
    nulls = rows["null"].unique().sort().to_list()
    if not nulls:
        return _note("none was found")
    table = _table(["layer", *nulls])
    for layer in rows["layer"].unique().sort():
        here = rows.filter(pl.col("layer") == layer)
        for unit in sorted(here["unit"].unique(), key=lambda unit: (unit != NEURON, unit)):
            cells = {row["null"]: row for row in here.filter(pl.col("unit") == unit).iter_rows(named=True)}
            if unit == NEURON:
                table.add_row(str(layer), *(_share(cells[null]) for null in nulls))
            else:
                texts = [_percent(cells[null]["share"]) for null in nulls]
                table.add_row(f"  {unit}", *texts, style="dim italic")
    return table


def _share(row: dict[str, float]) -> str:
    return f"{_percent(row['share'])} [{_percent(row['low'])}, {_percent(row['high'])}]"


def _percent(value: float) -> str:
    """As short as a cell of a table has to be; never none or all when it is neither."""
    percent = 100 * value
    if percent in (0, 100):
        return f"{percent:.0f}"
    if percent >= 99:
        return ">99"
    return f"{percent:.0f}" if percent >= 1 else "<.1" if percent < 0.1 else f"{percent:.1f}".lstrip("0")


def _verdicts(found: Summary) -> RenderableType:
    kinds = sorted(found.verdicts["unit"].unique(), key=lambda unit: (unit != NEURON, unit))
    table = _table(["about", "verdict", *kinds])
    for (tests, verdict), rows in found.verdicts.group_by("tests", "verdict", maintain_order=True):
        counts = dict(rows.select("unit", "len").iter_rows())
        table.add_row(str(tests), str(verdict), *(f"{counts.get(kind, 0):,}" for kind in kinds))
    return table


def _explained(found: Summary) -> RenderableType:
    table = _table(["layer", *SHARES, "triggers"])
    for row in found.triggers.iter_rows(named=True):
        if row["unit"] not in (NEURON, "random"):
            continue
        cells = [decimal(row[name]) for name in SHARES] + [f"{row['triggers']:,}"]
        real = row["unit"] == NEURON
        table.add_row(str(row["layer"]) if real else "", *cells, style=None if real else "dim italic")
    return table


def _table(names: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place == 0 or name == "verdict" else "right", no_wrap=True)
    return table
