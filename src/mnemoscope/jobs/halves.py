"""Text that the model reads to test patterns: documents of one half, up to a budget, and parts of long ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csc_array

from mnemoscope.patterns.split import halves, mixed
from mnemoscope.patterns.text import Text
from mnemoscope.patterns.twoway import LEAST_DOCUMENTS
from mnemoscope.plan import Plan, PlanWriter
from mnemoscope.store import Run


@dataclass(frozen=True)
class Half:
    """Text of one half of the documents, and how the model will read it: the plan numbers its contexts from 0."""

    text: Text
    plan: Plan

    @property
    def note(self) -> str:
        """What is to be said of it: that too few documents can be read for a threshold; else nothing."""
        count = len(np.unique(self.text.document))
        if count >= LEAST_DOCUMENTS:
            return ""
        return (
            f"only {count} documents of a half can be read within the budget, and a claim needs {LEAST_DOCUMENTS}: no "
            "pattern can be confirmed; give a larger budget"
        )


def read_half(text: Text, test: bool, budget: int, folder: Path, run: Run, seed: int = 0) -> Half:
    """`portion` of a text as a plan in a folder."""
    part, _ = portion(text, test, budget, seed)
    folder.mkdir(exist_ok=True)
    if (folder / "plan.json").exists():
        plan = Plan.load(folder)
    else:
        writer = PlanWriter(folder, run.manifest.options["special"])
        for context in range(len(part.contexts)):
            tokens = part.tokens[part.starts[context] : part.starts[context + 1]]
            writer.add("", {}, [(0, tokens.tolist())], None)
        plan = writer.finish({}, int(np.diff(part.starts).max()))
    assert plan.contexts == len(part.contexts), (plan.contexts, len(part.contexts))
    return Half(part, plan)


def portion(text: Text, test: bool, budget: int, seed: int = 0) -> tuple[Text, np.ndarray]:
    """Documents of one half, by the smallest hash of their id, up to `budget` tokens, at least one, and of long ones
    the leading contexts; and their rows i64[...] in the text."""
    documents = halves(text.document[text.counted])[int(test)]
    order = np.argsort(mixed(documents, seed + 101), kind="stable")
    return text.cut(text.within(documents[order], budget))


def last_tokens(text: Text, tokens: np.ndarray) -> csc_array:
    """bool[prefix, token]: the last token of each prefix."""
    rows = np.flatnonzero(text.counted)
    place = np.searchsorted(tokens, text.tokens[rows])
    return csc_array((np.ones(len(rows), bool), (rows, place)), shape=(len(text), len(tokens)))
