"""Every entry of transformers' mappings: what becomes of it is written down, and nothing crashes."""

from __future__ import annotations

import pytest
from every_family import ENTRIES, outcome

from mnemoscope.model.table import FAMILIES, Outcome, outcomes

WRITTEN = {(row.task, row.family): row for row in outcomes()}


def test_every_entry_is_written_down_once() -> None:
    """The list has the entries of the mappings, in their order, each closed or with a reason of one line."""
    assert tuple((row.task, row.family) for row in outcomes()) == ENTRIES
    assert all((row.error is None) != (row.reason is None) for row in WRITTEN.values())
    assert all(row.error is None or row.error <= 1e-5 for row in WRITTEN.values())


def test_every_row_of_the_table_closes() -> None:
    """No family is claimed in the table whose parts do not add up."""
    closed = {row.family for row in WRITTEN.values() if row.error is not None}
    entries = {row.family for row in WRITTEN.values()}
    assert set(FAMILIES) & entries <= closed


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "masked", "seq2seq"])
def test_what_is_written_down_is_so(task: str) -> None:
    """A tiny model of every entry closes or is refused as the list says; any other exception fails here."""
    different: list[tuple[Outcome, Outcome]] = []
    for written in (row for row in WRITTEN.values() if row.task == task):
        now = outcome(task, written.family)
        if (now.error is None, now.reason) != (written.error is None, written.reason) or (
            now.error or 0
        ) > 1e-5:
            different.append((written, now))
    assert not different
