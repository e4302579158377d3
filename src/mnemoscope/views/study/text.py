"""Findings in the terminal: a sentence each, and what there is to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mnemoscope.analyses.study.finding import Section


def findings(sections: Sequence[Section]) -> Group:
    """Every section with its findings, by title and sentence."""
    lines: list[RenderableType] = []
    for section in sections:
        lines.append(Text(f"\n{section.title}", style="bold"))
        if section.missing:
            lines.append(Text(f"  not measured: {section.missing}", style="dim"))
        for one in section.findings:
            lines.append(Text.assemble(("  " + one.title, "underline"), ("  " + " ".join(one.items), "dim")))
            lines.append(Text("  " + one.says))
    return Group(*lines)


def listing(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Measurements with their items, cost and state."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("name", "what", "items", "cost", "state"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["title"], " ".join(row["items"]), _cost(row), row["state"])
    return table


def _cost(row: Mapping[str, Any]) -> str:
    """In passes over the sampled prefixes, and time besides with the sample model on two cores."""
    parts = [f"{row['passes']:g} passes"] if row["passes"] else []
    parts += [f"{row['minutes']:g} min"] if row["minutes"] else []
    parts += [f"{row['seconds']:g} s an example"] if row["seconds"] else []
    return " + ".join(parts) or "none"
