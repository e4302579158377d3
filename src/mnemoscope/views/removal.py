"""The token-removal test in the terminal: one line a layer, the null beside it, and what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mnemoscope.records import Estimate
    from mnemoscope.studies.findings.removal import Removal


class table:  # noqa: N801 - called like a function: removal.table(found)
    """Change of the summed coefficient, in per cent, with its interval over documents."""

    def __init__(self, found: Removal) -> None:
        self.found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        yield Text("What a coefficient loses with one token of its prefix", style="bold")
        yield Text(
            f"{found.of(None, 'trigger', 'last').prefixes:,} triggers of {found.neurons:,} neurons in "
            f"{found.documents} documents. Change in % of the summed coefficient [95 % over documents]; null: ordinary "
            "prefixes of the same neurons.",
            style="dim",
        )
        grid = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("layer", "first", "random", "last", "null: last"):
            grid.add_column(name, justify="right", no_wrap=True)
        layers = [one.layer for one in found.effects if (one.kind, one.removed) == ("trigger", "last")]
        for layer in layers:
            cells = [percent(found.of(layer, "trigger", one).ratio) for one in ("first", "random", "last")]
            null = percent(found.of(layer, "random", "last").ratio)
            grid.add_row("all" if layer is None else str(layer), *cells, Text(null, style="dim"))
        yield grid
        for line in sentences(found):
            yield Text(line)


def percent(estimate: Estimate) -> str:
    """``-89 [-90, -88]``, or a dash where nothing was measured."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "–"
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return (
        f"{value:.0f} [{low:.0f}, {high:.0f}]".replace("-0 ", "0 ").replace("-0,", "0,").replace("-0]", "0]")
    )


def sentences(found: Removal) -> list[str]:
    """The shape that the paper describes, and whether it is here."""
    clear = [one for one in found.last_against_random if one.high is not None and one.high < 0]
    measured = [one for one in found.last_against_random if one.value is not None]
    lines = [
        f"The last token matters more than a random one in {len(clear)} of {len(measured)} layers "
        "(interval below 0)."
    ]
    trend, beyond = found.trend["last"], found.beyond_null["last"]
    if trend.low is not None and trend.high is not None:
        word = "less" if trend.low > 0 else "more" if trend.high < 0 else "neither clearly less nor more"
        least = max(
            (
                one
                for one in found.effects
                if (one.kind, one.removed) == ("trigger", "last") and one.layer is not None
            ),
            key=lambda one: -1.0 if one.ratio.value is None else one.ratio.value,
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
