"""Which view draws which result: what `mnemoscope.api` hands to `display.Shown`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from mnemoscope.display import Report, Shown, View
from mnemoscope.results import (
    Annotated,
    ClaimTest,
    Highlights,
    ModelFacts,
    PatternReport,
    StudyReport,
    Verification,
)

Write = Callable[[Any, Path, Report | None], Any]


def view_of(result: Shown) -> View:
    """How a result is drawn."""
    return _views()[type(result)]


@cache
def _views() -> dict[type, View]:
    """Made when something is shown for the first time: opening a run draws nothing."""
    from mnemoscope.annotation.scores import Scores
    from mnemoscope.neuron.card import NeuronCard
    from mnemoscope.neuron.find import Hits
    from mnemoscope.prediction.explanation import Explanation
    from mnemoscope.studies.findings.removal import Removal
    from mnemoscope.tracing.traced import Trace
    from mnemoscope.views import annotation, removal, trace
    from mnemoscope.views import page as html
    from mnemoscope.views import terminal as text
    from mnemoscope.views.explanation import charts, page, terminal

    return {
        NeuronCard: View(text.card, html.fragment, html.page),
        Explanation: View(terminal.report, page.fragment, page.page, plots=charts.charts),
        Hits: _printed(text.found),
        Trace: View(trace.terminal, trace.fragment, trace.page),
        Verification: _printed(text.verification),
        Removal: _printed(removal.table),
        Scores: _printed(annotation.scores),
        Annotated: _printed(_annotated),
        ModelFacts: _printed(lambda model: text.anatomy(model.facts)),
        Highlights: _printed(_highlights),
        PatternReport: _printed(_patterns),
        ClaimTest: _printed(_Claim),
        StudyReport: _printed(_study, _write_study),
    }


def _printed(terminal: Callable[[Any], Any], write: Write | None = None) -> View:
    """What has no page of its own is shown as the terminal prints it, in the colours of the pages."""
    from mnemoscope.views import printed

    return View(
        terminal, lambda one: printed.fragment(terminal(one)), lambda one: printed.page(terminal(one)), write
    )


def _highlights(found: Highlights) -> RenderableType:
    from mnemoscope.views import terminal as text

    parts: list[RenderableType] = [text.heading(found.run)]
    for pick, card in zip(found.picks, found.cards, strict=True):
        parts += [Text(), text.card(card, triggers=4, pick=pick)]
    return Group(*parts)


def _annotated(found: Annotated) -> RenderableType:
    from mnemoscope.views import annotation

    return annotation.neuron(f"{found.neuron} as annotated by {found.annotator}", found.rows)


def _patterns(found: PatternReport) -> RenderableType:
    from mnemoscope.views import patterns

    return patterns.summary(found.summary, found.labels, found.clearest, found.silent)


@dataclass(frozen=True)
class _Claim:
    test: ClaimTest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from mnemoscope.views import claims as claims_terminal

        yield from claims_terminal.verdict(self.test.claim, options.max_width, whole=True)


def _study(found: StudyReport) -> RenderableType:
    from mnemoscope.views import findings as text

    return text.findings(found.sections)


def _write_study(found: StudyReport, path: Path, progress: Report | None) -> None:
    from mnemoscope.views import report

    one, *beside = found.runs
    report.write(
        one,
        found.whole() if found.whole else found.sections,
        path,
        beside=beside[0] if beside else None,
        title=found.title,
        items=found.items,
        progress=progress,
    )
