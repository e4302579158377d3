"""Findings in the terminal: a sentence each, and what there is to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mnemoscope.studies.findings.finding import Section


def findings(sections: Sequence[Section], *, items: bool = False) -> Group:
    """Every section with its findings, by title and sentence; with the codes of what each answers if `items`."""
    lines: list[RenderableType] = []
    for section in sections:
        lines.append(Text(f"\n{section.title}", style="bold"))
        if section.missing:
            lines.append(Text(f"  not measured: {section.missing}", style="dim"))
        for one in section.findings:
            codes = f"  {' '.join(one.items)}" if items else ""
            lines.append(Text.assemble(("  " + one.title, "underline"), (codes, "dim")))
            lines.append(Text("  " + one.says))
    return Group(*lines)


def listing(rows: Sequence[Mapping[str, Any]], *, items: bool = False) -> Table:
    """Measurements with their cost and state; with the codes of what each answers if `items`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("name", "what", *(("items",) if items else ()), "cost", "state"):
        table.add_column(name, overflow="fold")
    for row in rows:
        codes = (" ".join(row["items"]),) if items else ()
        table.add_row(row["name"], row["title"], *codes, cost(row), row["state"])
    return table


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
