"""Thirty contrasts that were listed before they were run (`headlines.txt`), and which hold when corrected together."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, chance, holm
from mnemoscope.studies.findings.finding import Difference, Finding, Section, bar

LEVEL = 0.05  # the chance that any of them is said to hold that does not


class Listed(NamedTuple):
    """A line of the list: the `Difference` of a finding, and what it asks."""

    finding: str
    key: str
    asks: str


def listed() -> tuple[Listed, ...]:
    """The list, in its order; nothing is added to it or taken from it once a run has been looked at."""
    text = (files("mnemoscope.studies.findings") / "headlines.txt").read_text(encoding="utf-8")
    return tuple(Listed(*(cell.strip() for cell in line.split("|"))) for line in text.splitlines())


def section(sections: Iterable[Section]) -> Section:
    """The heading that begins a whole study, from the contrasts of its findings; empty when none was measured."""
    measured = {
        (finding.id, contrast.key): contrast
        for each in sections
        for finding in each.findings
        for contrast in finding.contrasts
    }
    findings = () if measured.keys().isdisjoint(row[:2] for row in listed()) else (_headline(measured),)
    return Section(
        "headline", "What holds", findings, "" if findings else "none of the contrasts was measured"
    )


def _headline(measured: dict[tuple[str, str], Difference]) -> Finding:
    rows = listed()
    known = [measured.get(row[:2]) for row in rows]
    numbers = np.array([(np.nan,) * 3 if each is None else each[1:4] for each in known])
    units = np.array([0 if each is None else each.n for each in known])
    value, low, high = numbers.T
    p = chance(Interval(value, low, high).among(units))
    corrected = holm(p)
    frame = pl.DataFrame(
        {
            "number": [str(number) for number in range(1, len(rows) + 1)],
            "contrast": [row.asks for row in rows],
            "finding": [row.finding for row in rows],
            "key": [row.key for row in rows],
            "value": value, "low": low, "high": high, "n": units, "p": p, "holm": corrected,
            "errors": _errors(value, p),
        }
    ).with_columns(pl.selectors.float().fill_nan(None))  # fmt: skip
    there = [each is not None for each in known]
    above, below = ((corrected <= LEVEL) & (sign * value > 0) for sign in (1, -1))
    return Finding(
        id="headline-contrasts",
        items=("A78",),
        title="Thirty contrasts that were listed before they were run",
        says=f"This run has {sum(there)} of {len(rows)} differences between a figure and its null that were listed "
        f"before they were run; corrected together (Holm, at 5 %), {int(above.sum())} are above 0 and "
        f"{int(below.sum())} below, and of {sum(there) - int(above.sum() + below.sum())} it cannot be told.",
        frame=frame,
        figure=bar(
            frame,
            "difference from the null (standard errors)",
            x="number",
            y="errors",
            x_title="contrast, by its number in the table",
            low=None,
            high=None,
        ),
        null="each contrast's own, named in it",
        resampled="documents, as in the finding that each comes from",
        notes=(
            "p is of Student's t, from the 95 % interval of each (Altman and Bland 2011); what was not measured, or "
            "has no interval, counts as p = 1",
            *(f"not measured: {row.asks}" for row, each in zip(rows, known, strict=True) if each is None),
        ),
    )


def _errors(value: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Standard errors of a normal distribution that have the same p, with the sign of the difference."""
    from scipy.special import ndtri

    return np.where(p < 1, -np.sign(value) * ndtri(np.maximum(p, 1e-300) / 2), np.nan)
