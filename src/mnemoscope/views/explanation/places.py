"""Addresses on the page of an explanation: each neuron and each head has one, where it stands first."""

from __future__ import annotations

import re

from mnemoscope.views.explanation.sheet import Against, Cause, Part, Sheet, Switched

_PART = re.compile(r"L\d+[HN]\d+")


def anchor(part: Part | Cause | Switched) -> str:
    """L24N1005, L23H4-from-3 for a head and one of its sources; empty for what is neither."""
    if not _PART.fullmatch(part.name):
        return ""
    word = getattr(part, "word", None)
    return part.name if word is None or word.position is None else f"{part.name}-from-{word.position}"


class Places:
    """The addresses of one page, which are given in the order in which its rows are drawn.

    prefix  before every address: empty on a page, an own word for each explanation of a notebook
    """

    def __init__(self, page: Sheet, prefix: str = "") -> None:
        self.prefix = prefix
        tables: list[Sheet | Against] = [page, *page.against]
        rows = [part for table in tables for part in (*table.heads.parts, *table.neurons.parts)]
        self._known = {anchor(part) for part in rows} | {
            f"switched-{neuron.name}" for neuron in page.switched
        }
        self._free = {anchor(part) for part in rows} | {part.name for part in rows}
        self._free.discard("")

    def has(self, id: str) -> bool:
        """Whether something on the page has this address."""
        return id in self._known

    def take(self, part: Part) -> tuple[str, str]:
        """The address of a row and that of its head alone, each if no row before has it; else empty."""
        row, head = anchor(part), part.name
        row_id, head_id = (id if id in self._free else "" for id in (row, head if head != row else ""))
        self._free -= {row_id, head_id}
        return row_id, head_id
