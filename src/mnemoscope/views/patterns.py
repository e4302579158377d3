"""What `mnemoscope patterns` found in a run, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import command
from mnemoscope.neuron.card import NeuronCard
from mnemoscope.neuron.claims import Share
from mnemoscope.patterns.labels import LabelCheck
from mnemoscope.patterns.summary import SHARES, Summary
from mnemoscope.records import MAIN, NEURON, NEXT, NULLS, POSITION, WHOLE, Cells
from mnemoscope.results import PatternReport
from mnemoscope.views import words
from mnemoscope.views.claims import PRECISE, SHORT, VERDICTS, believed, decimal, interval, verdict
from mnemoscope.views.terminal import Fitted, Room, table

EXAMPLES = 3
ABOUT = {
    MAIN: "the text so far",
    WHOLE: "the same, common patterns",
    NEXT: "the next token",
    POSITION: "the position",
}


def summary(report: PatternReport, *, layers: bool = False) -> RenderableType:
    """The answer: verdicts by what they are about beside the nulls' rates, and the clearest neurons.

    layers  also the outside check, and shares and explained triggers of each layer
    """
    parts: list[RenderableType] = [*_answer(report.summary)]
    if layers:
        parts += _by_layer(report.summary)
        if report.summary.sanity.height:
            parts.append(_title("do figures fall when labels are wrong?"))
            parts += [Text(line) for line in sanity_lines(report.summary)]
        if report.labels:
            parts += [_title("outside check"), Text(label_line(report.labels))]
    silent = "no pattern above the null, drawn at random"
    for title, cards in (("clearest", report.clearest), (silent, report.silent)):
        if cards:
            parts.append(_title(title))
        for card in cards:
            parts += [Text(), *short(card)]
    return Group(*parts)


def _answer(known: Summary) -> Iterator[RenderableType]:
    """What most readers want to know, on one screen."""
    for line in expected_lines(known) or ["no neuron has a verdict"]:
        yield Text(line, style="bold")
    for line in known.notes:
        yield _note(f"{line}.")
    yield _verdicts(known)
    yield _note(f"{PRECISE}.")
    if known.claims.height:
        yield _title("clearest neurons, by the lower end of the interval of F1; each pattern once")
        yield _clearest(known)
    yield Text()
    first = str(known.clearest[0]) if known.clearest else "L0N0"
    yield _note(command("show", known.path, first))
    yield _note(command("find", known.path, "--tested"))
    yield _note(command("patterns", known.path, "--layers") + "   # or --cards 10")


def _clearest(known: Summary) -> Fitted:
    """A line for each of the clearest claims; the name of the pattern takes the room that is left."""
    rows = [_claim(row, known.cells) for row in known.claims.iter_rows(named=True)]

    def lines(room: Room) -> Iterator[Table]:
        names = ("neuron", "sign", "pattern", "precision", "recall", "verdict")
        sizes = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
        sizes[2] = min(sizes[2], max(room.width - sum(sizes) + sizes[2] - len(sizes) + 1, 12))
        drawn = table(names, (tuple(map(Text, row)) for row in rows), left=range(6), wraps=(), gap=1)
        for column, size in zip(drawn.columns, sizes, strict=True):
            column.width = size
        yield drawn

    return Fitted(lines)


def _claim(row: Mapping[str, Any], cells: Cells) -> tuple[str, ...]:
    about = "" if row["about"] == "the text so far" else f" ({row['about']})"
    precision, recall = (
        Share(*(row[f"{side}{end}"] for end in ("", "_low", "_high"))) for side in ("precision", "recall")
    )
    sign = "+" if row["polarity"] > 0 else "-"
    neuron = str(cells.id(row["layer"], row["neuron"]))
    return neuron, sign, row["name"] + about, interval(precision), interval(recall), SHORT[row["verdict"]]


def _by_layer(known: Summary) -> list[RenderableType]:
    return [
        _title("neurons with a pattern beyond each null, by layer"),
        _note(
            "% of neurons, either sign; in brackets 95 % intervals (Wilson, over neurons); in italics pseudo-neurons"
        ),
        _shares(known, "main"),
        _title("the same of common patterns and unions of words, by the whole distribution"),
        _shares(known, "whole"),
        _title("the same about the token that comes next"),
        _shares(known, "next"),
        _title("held-out triggers explained by confirmed patterns, shares"),
        _note("semantic: beyond the last token (N2); in italics random directions"),
        _explained(known),
    ]


def expected_lines(known: Summary) -> list[str]:
    """For each kind of pattern how many neurons have a verdict, and how many of that is what chance gives: by decoys of
    their own if the run has some, else by pseudo-neurons."""
    if known.decoys.height:
        return list(_decoy_lines(known))
    lines = []
    expected = known.expected.filter(pl.col("believed") > 0)
    for (tests,), units in expected.group_by("tests", maintain_order=True):
        shares = [
            f"{NULLS.get(row['unit'], row['unit'])} {'' if index else 'would give '}{words.share(row['share'])} "
            f"[{', '.join(_percent(row[end]) for end in ('low', 'high'))}]{'' if index else ' as many'}"
            for index, row in enumerate(units.iter_rows(named=True))
        ]
        nulls = f"; {', '.join(shares)}" if shares else ""
        lines.append(f"{ABOUT[str(tests)]}: {units['believed'][0]:,} neurons and signs have a verdict{nulls}")
    return lines


def _decoy_lines(known: Summary) -> Iterator[str]:
    """How many neurons beat their decoys, by level of false discoveries; and how many more of them reach an F1."""
    for tests, about in ABOUT.items():
        counts = known.decoys.filter(pl.col("tests") == tests)
        if not counts.height:
            continue
        levels = ", ".join(
            f"{row['neurons']:,} at {words.share(row['level'])}"
            for row in counts.sort("level").iter_rows(named=True)
        )
        yield f"{about}: neurons and signs that beat their decoys, by the rate of false discoveries: {levels}"
        for row in known.excess.filter((pl.col("tests") == tests) & (pl.col("f1") == 0.5)).iter_rows(
            named=True
        ):
            ends = "" if row["low"] is None else f" [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
            yield (
                f"  F1 of at least .5: {100 * row['neurons']:.2f} % of them, {100 * row['decoys']:.2f} % of "
                f"{NULLS[row['unit']]}: {100 * row['excess']:+.2f}{ends} points"
            )


def sanity_lines(known: Summary) -> Iterator[str]:
    """In how many claims each figure falls, a line for each way in which labels are made wrong."""
    for (change,), rows in known.sanity.group_by("change", maintain_order=True):
        figures = ", ".join(
            f"{row['figure']} in {words.share(row['fell'] / row['claims'])} (to {words.share(row['left'])})"
            for row in rows.iter_rows(named=True)
        )
        yield f"{change}, {rows['claims'][0]:,} claims with a verdict; it falls: {figures}"


def label_line(check: LabelCheck) -> str:
    """The outside check in a sentence."""
    documents = f"{check.labels} labels, {check.documents:,} held-out documents"
    beside = "; no pseudo-neuron has a topic pattern to compare with"
    if check.null_patterns:
        beside = (
            f". Of {check.null_patterns:,} topic pattern{'s' * (check.null_patterns != 1)} of pseudo-neurons: median "
            f"{words.number(check.null_median)} nats, {check.null_beyond:,} exceed theirs: topics are made of the "
            "documents' words, whoever they were found for"
        )
    return (
        f"{check.patterns:,} topic patterns of neurons against the documents' own “{check.key}” ({documents}): median "
        f"mutual information {words.number(check.median)} nats, {words.number(check.shuffled)} with shuffled labels; "
        f"{check.beyond:,} exceed the 95th percentile of their shuffles ({0.05 * check.patterns:.0f} would by chance)"
        + beside
    )


def short(card: NeuronCard) -> list[RenderableType]:
    """A neuron in a few lines: its claims, and some triggers of the side that the first one is about."""
    claims = [claim for claim in card.claims or () if believed(claim)] or list(card.claims or ())[:1]
    lines: list[RenderableType] = [Text(str(card.id), style="bold")]
    for claim in claims[:1]:
        lines += verdict(claim, 80, whole=False)
    polarity = claims[0].polarity if claims else card.sides[0].polarity
    side = card.positive if polarity > 0 else card.negative
    for example in side.examples[:EXAMPLES]:
        head, active = words.active(example)
        text = Text(f"   {words.number(example.coefficient, sign=True):>7}  ", style="dim")
        text.append("".join(example.before)[-60:] + head, style="not dim").append(
            f"[{active}]", style="not dim bold"
        )
        lines.append(text)
    return lines


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _note(text: str) -> Text:
    return Text(text, style="dim")


def _shares(known: Summary, tests: str) -> RenderableType:
    beyond = known.beyond.filter(pl.col("tests") == tests)
    nulls = beyond["null"].unique().sort().to_list()
    if not nulls:
        return _note("none was found")
    shares = _table(["layer", *nulls])
    for layer in beyond["layer"].unique().sort():
        units = beyond.filter(pl.col("layer") == layer)
        for unit in sorted(units["unit"].unique(), key=lambda unit: (unit != NEURON, unit)):
            cells = {row["null"]: row for row in units.filter(pl.col("unit") == unit).iter_rows(named=True)}
            if unit == NEURON:
                shares.add_row(str(layer), *(_share(cells[null]) for null in nulls))
            else:
                texts = [_percent(cells[null]["share"]) if null in cells else "" for null in nulls]
                shares.add_row(f"  {unit}", *texts, style="dim italic")
    return shares


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


def _verdicts(known: Summary) -> RenderableType:
    """Neurons and signs with each verdict, by what the pattern is about."""
    neurons = known.verdicts.filter(pl.col("unit") == NEURON)
    counts = {
        (tests, verdict): count
        for tests, verdict, count in neurons.select("tests", "verdict", "len").iter_rows()
    }
    verdicts = _table(["patterns about", *(SHORT[verdict] for verdict in VERDICTS), "tested"])
    for tests, about in ABOUT.items():
        tested = [counts.get((tests, verdict), 0) for verdict in VERDICTS]
        verdicts.add_row(about, *(f"{count:,}" for count in [*tested, sum(tested)]))
    return verdicts


def _explained(known: Summary) -> RenderableType:
    shares = _table(["layer", *SHARES, "triggers"])
    for row in known.triggers.iter_rows(named=True):
        if row["unit"] not in (NEURON, "random"):
            continue
        cells = [decimal(row[name]) for name in SHARES] + [f"{row['triggers']:,}"]
        real = row["unit"] == NEURON
        shares.add_row(str(row["layer"]) if real else "", *cells, style=None if real else "dim italic")
    return shares


def _table(names: Sequence[str]) -> Table:
    return table(names, wraps=(), gap=1)
