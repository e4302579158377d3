"""Findings in the terminal: a sentence each, what there is to measure, and what triggers lose without a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.views.terminal import table

if TYPE_CHECKING:
    from mnemoscope.intervals import Estimate
    from mnemoscope.studies.findings.finding import Section
    from mnemoscope.studies.findings.removal import Effect, Removal


def findings(sections: Sequence[Section], *, items: bool = False) -> Group:
    """Every section with its findings, by title and sentence; with the codes of what each answers if `items`."""
    lines: list[RenderableType] = []
    for section in sections:
        lines.append(Text(f"\n{section.title}", style="bold"))
        if section.missing:
            lines.append(Text(f"  not measured: {section.missing}", style="dim"))
        for finding in section.findings:
            codes = f"  {' '.join(finding.items)}" if items else ""
            lines.append(Text.assemble(("  " + finding.title, "underline"), (codes, "dim")))
            lines.append(Text("  " + finding.says))
    return Group(*lines)


def listing(rows: Sequence[Mapping[str, Any]], *, items: bool = False) -> Table:
    """Measurements with their cost and state; with the codes of what each answers if `items`."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("name", "what", *(("items",) if items else ()), "cost", "state"):
        lines.add_column(name, overflow="fold")
    for row in rows:
        codes = (" ".join(row["items"]),) if items else ()
        lines.add_row(row["name"], row["title"], *codes, cost(row), row["state"])
    return lines


def cost(row: Mapping[str, Any]) -> str:
    """Passes over the sampled prefixes, and the time besides with the sample model on two cores."""
    parts = []
    if row["passes"]:
        parts.append(f"{row['passes']:g} {'pass' if row['passes'] == 1 else 'passes'} over the sampled text")
    if row["minutes"]:
        parts.append(f"{row['minutes']:g} min")
    if row["seconds"]:
        parts.append(f"{row['seconds']:g} s for each example")
    return ", ".join(parts) or "none"


# -- The token-removal test: a line for each layer, the null beside it, and what follows --------------------------


def removal(measured: Removal) -> Group:
    """Change of the summed coefficient, in per cent, with its interval over documents."""
    rows: list[list[str | Text]] = []
    for layer in (effect.layer for effect in _last_tokens(measured)):
        cells = [percent(measured.of(layer, "trigger", token).ratio) for token in ("first", "random", "last")]
        null = percent(measured.of(layer, "random", "last").ratio)
        rows.append(["all" if layer is None else str(layer), *cells, Text(null, style="dim")])
    return Group(
        Text("What a coefficient loses with one token of its prefix", style="bold"),
        Text(
            f"{measured.of(None, 'trigger', 'last').prefixes:,} triggers of {measured.neurons:,} neurons in "
            f"{measured.documents} documents. Change in % of the summed coefficient [95 % over documents]; null: "
            "ordinary prefixes of the same neurons.",
            style="dim",
        ),
        table(("layer", "first", "random", "last", "null: last"), rows, left=()),
        *map(Text, sentences(measured)),
    )


def _last_tokens(measured: Removal) -> list[Effect]:
    """What triggers lose without their last token: in each layer, and in all."""
    return [effect for effect in measured.effects if (effect.kind, effect.removed) == ("trigger", "last")]


def percent(estimate: Estimate) -> str:
    """``-89 [-90, -88]``, the figure alone where it has no interval, or a dash where nothing was measured."""
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.0f}"
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return (
        f"{value:.0f} [{low:.0f}, {high:.0f}]".replace("-0 ", "0 ").replace("-0,", "0,").replace("-0]", "0]")
    )


def sentences(measured: Removal) -> list[str]:
    """The shape that the paper describes, and whether it is here."""
    layers = measured.last_against_random
    known = sum(layer.value is not None for layer in layers)
    lines = [
        f"The last token matters more than a random one in {measured.last_matters_more} of {known} layers (of all "
        "layers together, at a false discovery rate of 5 %)."
    ]
    trend, beyond = measured.trend["last"], measured.beyond_null["last"]
    if trend.low is not None and trend.high is not None:
        word = "less" if trend.low > 0 else "more" if trend.high < 0 else "neither clearly less nor more"
        least = max(
            (effect for effect in _last_tokens(measured) if effect.layer is not None),
            key=lambda effect: -1.0 if effect.ratio.value is None else effect.ratio.value,
        )
        lines.append(
            f"It matters {word} in upper layers: {percent(trend)} points from the lowest to the highest along a line; "
            f"least in layer {least.layer}, {percent(least.ratio)}."
        )
    if beyond.low is not None and beyond.high is not None:
        word = "less" if beyond.high < 0 else "more" if beyond.low > 0 else "neither clearly less nor more"
        lines.append(
            f"Without it, {word} is left of what was out of the ordinary in a trigger than in an ordinary prefix: "
            f"{percent(beyond)} points."
        )
    return lines
