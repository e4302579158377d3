"""Two runs side by side: the findings of both, joined."""

from __future__ import annotations

from mnemoscope.errors import QueryError
from mnemoscope.results import StudyReport
from mnemoscope.run.reading import Run
from mnemoscope.studies import catalogue
from mnemoscope.studies.findings import stability
from mnemoscope.studies.findings.finding import Finding, Section


def compare(one: Run, two: Run, *, only: str | None = None) -> StudyReport:
    """The study's findings of both runs, and how stable each neuron's triggers are.

    only  measurements by name, with commas between; all if None
    """
    runs = [one, two]
    paths = [run.path for run in runs]
    names = [path.name for path in paths]
    if names[0] == names[1]:
        names = [f"{number}: {path}" for number, path in enumerate(paths, 1)]
    sections: list[Section] = []
    found: tuple[Finding, ...] = ()
    lost = ""
    try:
        found = tuple(stability.findings(*runs))
    except QueryError as error:
        lost = str(error)
    sections.append(Section("stability", "Are they the same neurons?", found, lost))
    for measurement in catalogue.choose(only):
        both = [measurement.section(run) for run in runs]
        missing = zip(names, (section.missing for section in both), strict=True)
        lost = "; ".join(f"{name}: {text}" for name, text in missing if text)
        joined = stability.side_by_side(names, [section.findings for section in both])
        sections.append(Section(measurement.name, measurement.title, tuple(joined), lost))
    return StudyReport(tuple(runs), tuple(sections), f"{names[0]} and {names[1]}")
