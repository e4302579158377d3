"""What `mnemoscope patterns` found in a run, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import command
from mnemoscope.neuron.card import NeuronCard
from mnemoscope.neuron.claims import Share
from mnemoscope.patterns.labels import LabelCheck
from mnemoscope.patterns.summary import SHARES, Summary
from mnemoscope.records import MAIN, NEURON, NEXT, NULLS, POSITION, WHOLE, NeuronId
from mnemoscope.views import claims as claims_terminal
from mnemoscope.views import words as cards
from mnemoscope.views.claims import PRECISE, SHORT, VERDICTS, believed, decimal, interval
from mnemoscope.views.words import number

EXAMPLES = 3
ABOUT = {
    MAIN: "the text so far",
    WHOLE: "the same, common patterns",
    NEXT: "the next token",
    POSITION: "the position",
}


def summary(
    found: Summary,
    check: LabelCheck | None,
    clear: Sequence[NeuronCard] = (),
    silent: Sequence[NeuronCard] = (),
    *,
    layers: bool = False,
) -> RenderableType:
    """The answer: verdicts by what they are about beside the nulls' rates, and the clearest neurons.

    check, layers  below it, if `layers`, the outside check and shares and explained triggers of each layer
    clear, silent  short cards of some neurons with and without a pattern
    """
    parts: list[RenderableType] = [*_answer(found)]
    if layers:
        parts += _by_layer(found)
        if check:
            parts += [_title("outside check"), Text(label_line(check))]
    for title, some in (("clearest", clear), ("no pattern above the null, drawn at random", silent)):
        if some:
            parts.append(_title(title))
        for card in some:
            parts += [Text(), *short(card)]
    return Group(*parts)


def _answer(found: Summary) -> Iterator[RenderableType]:
    """What most readers want to know, on one screen."""
    for line in expected_lines(found) or ["no neuron has a verdict"]:
        yield Text(line, style="bold")
    yield _verdicts(found)
    yield _note(f"{PRECISE}.")
    if found.claims.height:
        yield _title("clearest neurons, by the lower end of the interval of F1; each pattern once")
        yield _Clearest(found)
    yield Text()
    first = str(found.clearest[0]) if found.clearest else "L0N0"
    yield _note(command("show", found.path, first))
    yield _note(command("find", found.path, "--tested"))
    yield _note(command("patterns", found.path, "--layers") + "   # or --cards 10")


class _Clearest:
    """A line for each of the clearest claims; the name of the pattern takes the room that is left."""

    def __init__(self, found: Summary) -> None:
        self.rows = [_claim(row) for row in found.claims.iter_rows(named=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = ("neuron", "sign", "pattern", "precision", "recall", "verdict")
        sizes = [max(map(cell_len, column)) for column in zip(names, *self.rows, strict=True)]
        sizes[2] = min(sizes[2], max(options.max_width - sum(sizes) + sizes[2] - len(sizes) + 1, 12))
        table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
        for name, size in zip(names, sizes, strict=True):
            table.add_column(name, no_wrap=True, overflow="ellipsis", width=size)
        for row in self.rows:
            table.add_row(*map(Text, row))
        yield table


def _claim(row: Mapping[str, Any]) -> tuple[str, ...]:
    about = "" if row["about"] == "the text so far" else f" ({row['about']})"
    precision, recall = (
        Share(*(row[f"{side}{end}"] for end in ("", "_low", "_high"))) for side in ("purity", "coverage")
    )
    sign = "+" if row["polarity"] > 0 else "-"
    neuron = str(NeuronId(row["layer"], row["neuron"]))
    return neuron, sign, row["name"] + about, interval(precision), interval(recall), SHORT[row["verdict"]]


def _by_layer(found: Summary) -> list[RenderableType]:
    return [
        _title("neurons with a pattern beyond each null, by layer"),
        _note(
            "% of neurons, either sign; in brackets 95 % intervals (Wilson, over neurons); in italics pseudo-neurons"
        ),
        _shares(found, "main"),
        _title("the same of common patterns and unions of words, by the whole distribution"),
        _shares(found, "whole"),
        _title("the same about the token that comes next"),
        _shares(found, "next"),
        _title("held-out triggers explained by confirmed patterns, shares"),
        _note("semantic: beyond the last token (N2); in italics random directions"),
        _explained(found),
    ]


def expected_lines(found: Summary) -> list[str]:
    """For each kind of pattern how many neurons have a verdict, and how many pseudo-neurons would."""
    lines = []
    for (tests,), some in found.expected.filter(pl.col("believed") > 0).group_by(
        "tests", maintain_order=True
    ):
        rates = [
            f"{NULLS.get(row['unit'], row['unit'])} {'would give ' if first else ''}{cards.share(row['share'])}"
            f"{' as many' if first else ''}"
            for first, row in zip([True, *([False] * some.height)], some.iter_rows(named=True), strict=False)
        ]
        nulls = f"; {', '.join(rates)}" if rates else ""
        lines.append(f"{ABOUT[str(tests)]}: {some['believed'][0]:,} neurons and signs have a verdict{nulls}")
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
    """Neurons and signs with each verdict, by what the pattern is about."""
    mine = found.verdicts.filter(pl.col("unit") == NEURON)
    counts = {
        (tests, verdict): count
        for tests, verdict, count in mine.select("tests", "verdict", "len").iter_rows()
    }
    table = _table(["patterns about", *(SHORT[verdict] for verdict in VERDICTS), "tested"])
    for tests, about in ABOUT.items():
        some = [counts.get((tests, verdict), 0) for verdict in VERDICTS]
        table.add_row(about, *(f"{count:,}" for count in [*some, sum(some)]))
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
