"""Addresses on the page of an explanation: each neuron and each head has one, where it stands first."""

from __future__ import annotations

import re

from mnemoscope.views.explanation.sheet import Cause, Part, Sheet, Switched

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
        ledgers = [
            page.heads,
            page.neurons,
            *(one for each in page.against for one in (each.heads, each.neurons)),
        ]
        rows = [part for ledger in ledgers for part in ledger.parts]
        self._known = {anchor(part) for part in rows} | {f"switched-{one.name}" for one in page.switched}
        self._free = {anchor(part) for part in rows} | {part.name for part in rows}
        self._free.discard("")

    def has(self, id: str) -> bool:
        """Whether something on the page has this address."""
        return id in self._known

    def take(self, part: Part) -> tuple[str, str]:
        """The address of a row and that of its head alone, each if no row before has it; else empty."""
        row, head = anchor(part), part.name
        found = tuple(id if id in self._free else "" for id in (row, head if head != row else ""))
        self._free -= set(found)
        return found[0], found[1]
