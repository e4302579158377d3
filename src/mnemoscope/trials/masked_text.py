"""The text of one half as a counting pass sees it: which patterns hold where, in whose documents, in which strata, and
in a mixture which of it each expert is given.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from mnemoscope.trials.routed import RoutedTokens

BUDGET = 65_536  # tokens of each half that the model reads
GROUPS = 1_024  # documents beyond these share a group: the unit of what is drawn again


class BatchMasks(NamedTuple):
    """The counted positions of a batch, of which the text may count fewer, and of them an expert fewer still.

    rows             i64[row]   position in the batch, contexts one after another, padding included; of an expert among
                                those that it was given
    prefixes         i64[row]   the prefix of the text
    groups           i64[row]
    strata           i64[row]
    patterns         bool[row column]   by row
    indptr, indices             the same by column
    """

    rows: np.ndarray
    prefixes: np.ndarray
    groups: np.ndarray
    strata: np.ndarray
    patterns: csr_array
    indptr: np.ndarray
    indices: np.ndarray

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        prefixes: np.ndarray,
        groups: np.ndarray,
        strata: np.ndarray,
        patterns: csr_array,
    ) -> BatchMasks:
        """With the patterns by column, too."""
        by_column = patterns.tocsc()
        indptr, indices = by_column.indptr.astype(np.int64), by_column.indices.astype(np.int64)
        return cls(rows, prefixes, groups, strata, patterns, indptr, indices)


class MaskedText:
    """A text with the masks of some patterns, and the document group and stratum of each prefix.

    text     batches name its contexts by their place, from 0
    columns  bool[prefix, column]
    group    i64[prefix]  whose document it is; stratum i64[prefix]: position and token frequency (N1)
    routed   which tokens each expert is given; None where all units run on all of them
    """

    def __init__(self, text: Text, columns: csc_array, routed: RoutedTokens | None = None) -> None:
        self._text, self.columns, self._routed = text, csr_array(columns), routed
        documents = np.unique(text.document[text.counted])
        self.groups = min(len(documents), GROUPS)
        group = np.searchsorted(documents, text.document)
        if len(documents) > GROUPS:
            group = (mixed(text.document) % np.uint64(GROUPS)).astype(np.int64)
        self.group = np.minimum(group, self.groups - 1)
        rows = np.flatnonzero(text.counted)
        self.stratum = np.zeros(len(text), np.int64)
        self.stratum[rows], margins = strata(text, rows, True, FEWER)
        self.strata = len(margins)
        self._last: tuple[ContextBatch, BatchMasks] | None = None
        self._count(rows)

    def _count(self, rows: np.ndarray) -> None:
        """Take figures over some of the counted positions."""
        self._rows, self._held = rows, csc_array(self.columns[rows])
        self.tokens, self.documents = len(rows), len(np.unique(self._text.document[rows]))

    def text_of(self, places: Any) -> Any:
        """i64[...]: the number of the text that the units of each place run on, 0 for all of it."""
        return 0 * places if self._routed is None else self._routed.text_of(places)

    def of(self, place: int) -> MaskedText:
        """The text of the units of a place (`groups.UnitPlaces`): itself, or that of which nothing counts but what was
        routed to their expert. Groups and strata are numbered alike."""
        if self._routed is None or not self._routed.text_of(place):
            return self
        own = copy(self)
        own._count(self._rows[self._routed.of(place)[self._rows]])
        return own

    def shown(self, columns: np.ndarray) -> np.ndarray:
        """i32[column, group]: counted positions where each of some patterns is."""
        return self._spread(self.group, self.groups, columns)

    def rates(self, columns: np.ndarray) -> np.ndarray:
        """f32[stratum, column]: share of the counted positions of a stratum (N1) where each of some patterns is, or 0
        where there are none."""
        sizes = np.maximum(np.bincount(self.stratum[self._rows], minlength=self.strata), 1)
        return np.asarray(self._spread(self.stratum, self.strata, columns).T / sizes[:, None], np.float32)

    def _spread(self, code: np.ndarray, codes: int, columns: np.ndarray) -> np.ndarray:
        """i32[column, code]: counted positions with a code where each of some patterns is."""
        different, number = np.unique(columns, return_inverse=True)
        count = len(self._rows)
        spread = csr_array(
            (np.ones(count, np.int32), (code[self._rows], np.arange(count))), shape=(codes, count)
        )
        held = self._held[:, different].astype(np.int32)
        return np.asarray((spread @ held).T.todense(), np.int32)[number]

    def of_batch(self, batch: ContextBatch) -> BatchMasks:
        """The counted positions of a batch; remembered while its layers come."""
        if self._last is None or self._last[0] is not batch:
            rows = np.flatnonzero(batch.counted)
            context, position = np.divmod(rows, batch.tokens.shape[1])
            prefixes = self._text.starts[batch.contexts[context]] + position
            counted = self._text.counted[prefixes]
            rows, prefixes = rows[counted], prefixes[counted]
            masks = BatchMasks.of(
                rows, prefixes, self.group[prefixes], self.stratum[prefixes], self.columns[prefixes]
            )
            self._last = (batch, masks)
        return self._last[1]

    def of_rows(self, batch: ContextBatch, place: int, given: np.ndarray) -> BatchMasks:
        """Of a batch those that the units of a place were given, `given` i64[...] (ascending), at least one.

        What the text says was routed there and was not given is left out: another pass of the same text may end in
        other last bits where a device adds up in no fixed order, and then a router may choose otherwise.
        """
        masks = self.of_batch(batch)
        where = np.searchsorted(given, masks.rows)
        kept = given.take(where, mode="clip") == masks.rows
        if self._routed is not None:
            kept &= self._routed.of(place)[masks.prefixes]
        return BatchMasks.of(
            where[kept], masks.prefixes[kept], masks.groups[kept], masks.strata[kept], masks.patterns[kept]
        )


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
