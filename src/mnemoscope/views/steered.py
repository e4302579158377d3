"""What a model writes with a neuron changed: in the terminal and as HTML. The words that both share come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views import words
from mnemoscope.views.page import environment

if TYPE_CHECKING:
    from mnemoscope.prediction.steered import Steered, SteeredText


def change(result: Steered) -> str:
    """What was done to the coefficient."""
    factor, value = words.number(result.factor), words.number(result.value, sign=True)
    if result.factor == result.value == 0:
        return "removed"
    if result.factor == 0:
        return f"set to {words.number(result.value)}"
    return f"times {factor}" if result.value == 0 else f"times {factor}, {value}"


def whose(text: SteeredText, result: Steered) -> str:
    """Which neuron was changed, if any, as it follows the neuron's address."""
    if text.neuron is None:
        return "as it is"
    return "changed" if text is result.changed else "changed, drawn at random from the same layer"


def difference(text: SteeredText, whole: SteeredText) -> str:
    """Where a continuation parts from that of the model as it is."""
    if (text.tokens, text.ended) == (whole.tokens, whole.ended):
        return "the same text"
    if text.shared >= min(len(text.tokens), len(whole.tokens)):
        return f"the same for {text.shared} tokens, where one ends"
    pairs = ((each.tokens[text.shared], each.probabilities[text.shared]) for each in (text, whole))
    said = (f"“{token}” ({words.number(likely)})" for token, likely in pairs)
    begins = f"the same for {text.shared} tokens, then" if text.shared else "begins with"
    return f"{begins} {' instead of '.join(said)}; in brackets their probabilities"


def prompt(result: Steered) -> str:
    """What is gone on with, on one line."""
    return Vocabulary.visible(result.prompt, edges=False)


# -- terminal -----------------------------------------------------------------------------------------------


def terminal(result: Steered) -> Group:
    """The continuations one below the other; what differs from that of the model as it is stands out."""
    lines: list[RenderableType] = [
        Text(f"{result.neuron} of {result.model}, {change(result)} at every position", style="bold"),
        Text(f"{prompt(result)} ...", style="dim"),
    ]
    for text in result.texts:
        whom = f"{text.neuron} " if text.neuron else ""
        lines += [Text(), Text(f"{whom}{whose(text, result)}", style="dim"), _continuation(text)]
        if text.neuron is not None:
            lines.append(Text(f"  {difference(text, result.whole)}", style="dim"))
    return Group(*lines)


def _continuation(text: SteeredText) -> Text:
    whole = text.neuron is None
    line = Text("  ").append("".join(text.tokens[: text.shared]), "" if whole else "dim")
    return line.append("".join(text.tokens[text.shared :]), "bold").append(
        " (the end)" if text.ended else "", "dim"
    )


# -- HTML ---------------------------------------------------------------------------------------------------


def fragment(result: Steered) -> str:
    """The continuations side by side where there is room, to be put into another page."""
    return _render("steered_fragment.html", result)


def page(result: Steered) -> str:
    """The same as a whole page that needs nothing else."""
    return _render("steered_page.html", result)


def _render(template: str, result: Steered) -> str:
    said = {"change": change, "whose": whose, "difference": difference, "prompt": prompt}
    return environment().get_template(template).render(steered=result, **said)
