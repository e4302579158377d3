"""The text of one half as a counting pass sees it: which patterns hold where, in whose documents, in which strata."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array

from mnemoscope.neuron.twoway import LEAST_DOCUMENTS
from mnemoscope.patterns.space import FEWER, strata
from mnemoscope.patterns.triggers import halves
from mnemoscope.records import ContextBatch
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.plan import Plan, PlanWriter
from mnemoscope.text.sampling import mixed

BUDGET = 65_536  # tokens of each half that the model reads
GROUPS = 1_024  # documents beyond these share a group: the unit of what is drawn again


class BatchMasks(NamedTuple):
    """The counted positions of a batch, of which the text may count fewer.

    rows             i64[row]   position in the batch, contexts one after another, padding included
    groups           i64[row]
    strata           i64[row]
    patterns         bool[row column]   by row
    indptr, indices             the same by column
    """

    rows: np.ndarray
    groups: np.ndarray
    strata: np.ndarray
    patterns: csr_array
    indptr: np.ndarray
    indices: np.ndarray


class MaskedText:
    """A text with the masks of some patterns, and the document group and stratum of each prefix.

    text     batches name its contexts by their place, from 0
    columns  bool[prefix, column]
    group    i64[prefix]  whose document it is; stratum i64[prefix]: position and token frequency (N1)
    """

    def __init__(self, text: Text, columns: csc_array) -> None:
        self._text, self.columns = text, csr_array(columns)
        documents = np.unique(text.document[text.counted])
        self.documents = len(documents)
        self.groups = min(len(documents), GROUPS)
        self.tokens = int(text.counted.sum())
        group = np.searchsorted(documents, text.document)
        if len(documents) > GROUPS:
            group = (mixed(text.document) % np.uint64(GROUPS)).astype(np.int64)
        self.group = np.minimum(group, self.groups - 1)
        rows = np.flatnonzero(text.counted)
        self.stratum = np.zeros(len(text), np.int64)
        self.stratum[rows], margins = strata(text, rows, True, FEWER)
        self.strata = len(margins)
        self._last: tuple[ContextBatch, BatchMasks] | None = None

    @cached_property
    def shown(self) -> np.ndarray:
        """i32[column, group]: counted positions where each pattern is."""
        return self._spread(self.group, self.groups, self.columns)

    def rates(self, columns: np.ndarray) -> np.ndarray:
        """f32[stratum, column]: share of the positions of a stratum (N1) where each of some patterns is."""
        sizes = np.bincount(self.stratum[self._text.counted], minlength=self.strata)
        return np.asarray(
            self._spread(self.stratum, self.strata, self.columns[:, columns]).T / sizes[:, None], np.float32
        )

    def _spread(self, code: np.ndarray, codes: int, columns: csr_array) -> np.ndarray:
        """i32[column, code]: counted positions with a code where each pattern is."""
        rows = np.flatnonzero(self._text.counted)
        spread = csr_array((np.ones(len(rows), np.int32), (code[rows], rows)), shape=(codes, len(self._text)))
        return np.asarray((spread @ columns.astype(np.int32)).T.todense(), np.int32)

    def of_batch(self, batch: ContextBatch) -> BatchMasks:
        """The counted positions of a batch; remembered while its layers come."""
        if self._last is None or self._last[0] is not batch:
            rows = np.flatnonzero(batch.counted)
            context, position = np.divmod(rows, batch.tokens.shape[1])
            prefixes = self._text.starts[batch.contexts[context]] + position
            counted = self._text.counted[prefixes]
            rows, prefixes = rows[counted], prefixes[counted]
            patterns = self.columns[prefixes]
            by_column = patterns.tocsc()
            masks = BatchMasks(
                rows, self.group[prefixes], self.stratum[prefixes], patterns,
                by_column.indptr.astype(np.int64), by_column.indices.astype(np.int64),
            )  # fmt: skip
            self._last = (batch, masks)
        return self._last[1]


# -- Text that the model reads to test patterns: documents of one half, up to a budget, and parts of long ones ---


@dataclass(frozen=True)
class HalfText:
    """Text of one half of the documents, and how the model will read it: the plan numbers its contexts from 0."""

    text: Text
    plan: Plan

    @property
    def note(self) -> str:
        """What is to be said of it: that too few documents can be read for a threshold; else nothing."""
        count = len(np.unique(self.text.document[self.text.counted]))
        if count >= LEAST_DOCUMENTS:
            return ""
        return (
            f"only {count} documents of a half can be read within the budget, and a claim needs {LEAST_DOCUMENTS}: no "
            "pattern can be confirmed; give a larger budget"
        )


def read_half(text: Text, test: bool, budget: int, folder: Path, run: Run, seed: int = 0) -> HalfText:
    """`document_sample` of a text as a plan in a folder."""
    sample, _ = document_sample(text, test, budget, seed)
    folder.mkdir(exist_ok=True)
    if (folder / "plan.json").exists():
        plan = Plan.load(folder)
    else:
        writer = PlanWriter(folder, run.manifest.options["special"])
        for context in range(len(sample.contexts)):
            tokens = sample.tokens[sample.starts[context] : sample.starts[context + 1]]
            writer.add("", {}, [(0, tokens.tolist())], None)
        plan = writer.finish({}, int(np.diff(sample.starts).max()))
    assert plan.contexts == len(sample.contexts), (plan.contexts, len(sample.contexts))
    return HalfText(sample, plan)


def document_sample(text: Text, test: bool, budget: int, seed: int = 0) -> tuple[Text, np.ndarray]:
    """Documents of one half, by the smallest hash of their id, up to `budget` tokens, at least one, and of long ones
    the leading contexts; and their rows i64[...] in the text."""
    documents = halves(text.document[text.counted])[int(test)]
    order = np.argsort(mixed(documents, seed + 101), kind="stable")
    return text.cut(text.within(documents[order], budget))


def last_tokens(text: Text, tokens: np.ndarray) -> csc_array:
    """bool[prefix, token]: the last token of each prefix."""
    rows = np.flatnonzero(text.counted)
    column = np.searchsorted(tokens, text.tokens[rows])
    return csc_array((np.ones(len(rows), bool), (rows, column)), shape=(len(text), len(tokens)))
