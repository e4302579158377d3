"""Findings with their figures drawn, of one run or of two side by side: what pages of the study show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnemoscope.records import Progress
from mnemoscope.views import report

if TYPE_CHECKING:
    from mnemoscope.api.run import Run
    from mnemoscope.display import Report
    from mnemoscope.results import StudyReport
    from mnemoscope.studies.findings.finding import Section

Drawn = list[tuple["Section", list[report.DrawnFinding]]]


def compared(run: Run, other: Run, only: str, tell: Report) -> Drawn:
    """The figures of two runs side by side, drawn; `tell` is told how far it is, and may end it."""
    return drawn(run.compare(other, only=only, report=tell), tell)


def drawn(study: StudyReport, tell: Report = lambda step: None) -> Drawn:
    """The findings of a study with their figures."""
    total, sections = len(study.findings), Drawn()
    for section in study.sections:
        shown: list[report.DrawnFinding] = []
        for finding in section.findings:
            tell(Progress("drawing", sum(len(each) for _, each in sections) + len(shown), total, "figures"))
            shown.append(report.show(finding))
        sections.append((section, shown))
    return sections


def as_data(sections: Drawn) -> list[dict[str, Any]]:
    """The findings as JSON-ready values, by measurement."""
    return [
        {
            "name": section.name,
            "missing": section.missing,
            "findings": [finding.to_dict() for finding in section.findings],
        }
        for section, _ in sections
    ]
