"""The list of all analyses A1 to A80 and how each is answered: what the report and the documentation print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

STATES = ("done", "not applicable")


@dataclass(frozen=True)
class Item:
    """One analysis of the papers or of the objections to them.

    state    done, or not applicable
    command  how to get it, of RUN (a folder) and MODEL (a name); empty if not applicable
    test     the test file that holds it to its definition; empty if not applicable
    why      why it is not applicable, or what is different here; may be empty
    """

    id: str
    title: str
    state: str
    command: str
    test: str
    why: str


def items() -> tuple[Item, ...]:
    """All of them, A1 to A80."""
    text = (files("mnemoscope.analyses.study") / "items.jsonl").read_text(encoding="utf-8")
    return tuple(Item(**json.loads(line)) for line in text.splitlines())
