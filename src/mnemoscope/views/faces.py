"""Which view draws which result: what `mnemoscope.api` hands to `display.Shown`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mnemoscope.display import Report, Shown, View
from mnemoscope.results import (
    Annotated,
    BuildPrice,
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
    from mnemoscope.prediction.steered import Steered
    from mnemoscope.studies.findings.removal import Removal
    from mnemoscope.tracing.relatives import Relatives
    from mnemoscope.tracing.traced import Trace
    from mnemoscope.views import answers, card, claims, findings, page, patterns, scores, steered, trace

    return {
        NeuronCard: View(card.card, page.fragment, page.page),
        Explanation: _of_explanations(),
        Hits: _printed(answers.found),
        Relatives: _printed(answers.relatives),
        Trace: View(trace.terminal, trace.fragment, trace.page),
        Verification: _printed(answers.verification),
        Removal: _printed(findings.removal),
        Scores: View(scores.terminal, scores.fragment, scores.page),
        Steered: View(steered.terminal, steered.fragment, steered.page),
        Annotated: _printed(answers.annotated),
        BuildPrice: _printed(answers.price),
        ModelFacts: _printed(lambda model: answers.anatomy(model.facts)),
        Highlights: View(answers.highlights, page.highlights_fragment, page.highlights_page),
        PatternReport: _printed(patterns.summary),
        ClaimTest: View(lambda test: claims.tested(test.claim), page.claim_fragment, page.claim_page),
        StudyReport: _printed(lambda study: findings.findings(study.sections), _write_study),
    }


def _of_explanations() -> View:
    from mnemoscope.views.explanation.charts import charts
    from mnemoscope.views.explanation.page import fragment, page
    from mnemoscope.views.explanation.terminal import report

    return View(report, fragment, page, plots=charts)


def _printed(terminal: Callable[[Any], Any], write: Write | None = None) -> View:
    """What has no page of its own is what the terminal prints, its tables as tables."""
    from mnemoscope.views.page import printed_fragment, printed_page

    return View(
        terminal,
        lambda result: printed_fragment(terminal(result)),
        lambda result: printed_page(terminal(result)),
        write,
    )


def _write_study(study: StudyReport, path: Path, progress: Report | None) -> None:
    from mnemoscope.views import report

    run, *beside = study.runs
    report.write(
        run,
        study.whole() if study.whole else study.sections,
        path,
        beside=beside,
        title=study.title,
        items=study.items,
        progress=progress,
    )
