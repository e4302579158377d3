"""What the answers of annotators are worth: in the terminal and as HTML. The words that both share come first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.views.page import environment
from mnemoscope.views.terminal import table

if TYPE_CHECKING:
    from mnemoscope.annotation.agreement import Agreement
    from mnemoscope.annotation.scores import Annotator, Detection, Scores
    from mnemoscope.intervals import Estimate

NULL_ITEMS = {
    "random": "random prefixes",
    "direction": "random directions",
    "mixed": "many neurons mixed",
}
QUESTIONS = {
    "found": "a pattern was found (items)",
    "held": "it held up on held-out triggers (items)",
    "applied": "it was seen in held-out triggers (prefixes)",
}
ASKED = {
    "found": "has the item a pattern",
    "labels": "kind of pattern of a prefix",
    "applied": "does a pattern apply",
}
FIGURES = ("hit rate", "false-alarm rate", "d'", "corrected share")
AGREED = ("same", "Cohen", "Fleiss", "AC1", "Krippendorff")


def title(result: Scores) -> str:
    """What was annotated."""
    return f"Annotations of {result.model} on {result.corpus}"


def sizes(result: Scores) -> str:
    """How much of it there is, and what the brackets are."""
    return (
        f"{result.neurons} neurons and {result.nulls} hidden null items, {result.prefixes} prefixes each; "
        "[95 % over items]."
    )


def left_open(annotator: Annotator) -> str:
    """How many items have no answer; nothing if all have."""
    return f"{annotator.open} items left open" if annotator.open else ""


def figures(judged: Detection) -> tuple[str, ...]:
    """The figures of one question, in the order of FIGURES."""
    return tuple(map(estimate, (judged.hit_rate, judged.false_alarm_rate, judged.d_prime, judged.corrected)))


def agreed(figure: Agreement) -> tuple[str, ...]:
    """The figures of one question, in the order of AGREED."""
    return tuple(map(estimate, (figure.same, figure.cohen, figure.fleiss, figure.gwet, figure.krippendorff)))


def estimate(figure: Estimate) -> str:
    """``.62 [.50, .73]``, or a dash where it is not defined."""
    if figure.value is None or figure.low is None or figure.high is None:
        return "–"
    numbers = (figure.value, figure.low, figure.high)
    value, low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{number:.2f}") for number in numbers)
    return f"{value} [{low}, {high}]"


# -- terminal -----------------------------------------------------------------------------------------------


def terminal(result: Scores) -> Group:
    """Every annotator, and their agreement if there are several."""
    lines: list[RenderableType] = [Text(title(result), style="bold"), Text(sizes(result), style="dim")]
    for annotator in result.annotators:
        lines += [Text(), *_annotator(annotator)]
    if result.agreement:
        rows = [(question, *agreed(result.agreement[name])) for name, question in ASKED.items()]
        lines += [Text(), _wrapped(("agreement", *AGREED), rows)]
    return Group(*lines)


def _annotator(annotator: Annotator) -> Iterator[RenderableType]:
    yield Text(", ".join(filter(None, (annotator.name, left_open(annotator)))), style="bold")
    rows = [(question, *figures(getattr(annotator, name))) for name, question in QUESTIONS.items()]
    yield _wrapped(("", "hits", "false alarms", "d'", "corrected share"), rows)
    for kind, (items, named, held) in annotator.false_alarms.items():
        yield Text(
            f"  {NULL_ITEMS[kind]}: a pattern in {named} of {items} items, held up in {held}", style="dim"
        )
    yield Text(
        f"  patterns per item: {estimate(annotator.patterns)}, in null items {estimate(annotator.patterns_in_nulls)}; "
        f"prefixes covered: {estimate(annotator.covered)}, in null items {estimate(annotator.covered_in_nulls)}; of "
        f"these with a semantic pattern: {estimate(annotator.semantic)}"
    )


def _wrapped(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return table(names, rows, wraps=range(len(names)))


# -- HTML ---------------------------------------------------------------------------------------------------

_LEFT, _WIDE, _ROW = 250, 330, 20  # of the picture: where its axis begins, how long it is, and a row


class DrawnShare(NamedTuple):
    """A share with its interval in the picture: where it is, and what it says."""

    x: float
    low: float
    high: float
    said: str


class DrawnRow(NamedTuple):
    """An annotator and a question in the picture; a share that is not defined is not drawn.

    question  what is asked, in the first row of it; else ""
    """

    y: int
    question: str
    annotator: str
    hits: DrawnShare | None
    alarms: DrawnShare | None


def drawn(result: Scores) -> list[DrawnRow]:
    """The rows of the picture: each question, and below it what each annotator was right and wrong in."""
    rows, y = [], 0
    for name, question in QUESTIONS.items():
        y += _ROW
        for annotator in result.annotators:
            judged: Detection = getattr(annotator, name)
            shares = _share("hit rate", judged.hit_rate), _share("false-alarm rate", judged.false_alarm_rate)
            rows.append(DrawnRow(y, question, annotator.name, *shares))
            y, question = y + _ROW, ""
    return rows


def _share(name: str, figure: Estimate) -> DrawnShare | None:
    if figure.value is None or figure.low is None or figure.high is None:
        return None
    x, low, high = (round(_LEFT + _WIDE * value, 1) for value in (figure.value, figure.low, figure.high))
    return DrawnShare(x, low, high, f"{name} {estimate(figure)}")


def fragment(result: Scores) -> str:
    """The scores to be put into another page: a picture of hits and false alarms, and tables."""
    return _render("scores_fragment.html", result)


def page(result: Scores) -> str:
    """The same as a whole page that needs nothing else."""
    return _render("scores_page.html", result)


def _render(template: str, result: Scores) -> str:
    said = {
        "title": title(result), "sizes": sizes(result), "questions": QUESTIONS, "asked": ASKED,
        "null_items": NULL_ITEMS,
        "figure_names": FIGURES, "agreed_names": AGREED, "figures": figures, "agreed": agreed, "estimate": estimate,
        "left_open": left_open, "rows": drawn(result), "left": _LEFT, "wide": _WIDE, "row": _ROW,
    }  # fmt: skip
    return environment().get_template(template).render(scores=result, **said)
