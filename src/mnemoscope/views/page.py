"""Cards as HTML: a fragment for notebooks, a page of one neuron. Escaped in one place, the templates.

What has no page of its own is what the terminal prints, as elements (`views/printed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mnemoscope.views import charts, claims, glosses, printed, words

if TYPE_CHECKING:
    from mnemoscope.neuron.card import Example, NeuronCard, ValueToken
    from mnemoscope.neuron.claims import Claim
    from mnemoscope.results import ClaimTest, Highlights

_COLUMNS = 72  # of the distribution: a pixel-wide outlier is still seen at this width


@dataclass(frozen=True)
class Most:
    """How much of a card to show: triggers of each polarity, examples in between, tokens of a list."""

    examples: int = 12
    between: int = 10
    tokens: int = 12


def fragment(card: NeuronCard) -> str:
    """A card with its style, to be put into another page: what a notebook displays."""
    return environment().get_template("fragment.html").render(card=card, most=Most())


def page(card: NeuronCard) -> str:
    """A card as a whole page that needs nothing else, with every trigger that the card holds."""
    most = Most(examples=len(card.positive.examples) + len(card.negative.examples), tokens=20)
    return environment().get_template("neuron.html").render(card=card, most=most)


@cache
def environment() -> Environment:
    """The templates, with escaping on, and the wording of `views.words` as filters."""
    templates = Environment(
        loader=PackageLoader("mnemoscope.views"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    wording = (
        words.active, words.corpus_line, words.details, words.facts, words.following, words.histogram_note,
        words.layer_line, words.lens_note, words.model_line, words.number, words.quadrants, words.readings,
        words.readings_note, words.reason, words.share, words.side_title, words.source, words.state_note,
        words.kind_note, words.threshold_note, words.where, claims.active_means, claims.bands,
        claims.baselines, claims.believed,
        claims.definition, claims.doubted, claims.evidence, claims.family, claims.figures,
        claims.meaning, claims.sampled, claims.specificity, claims.verdict_words,
        claims.where_active, glosses.gloss, glosses.glossed, glosses.glosses, glosses.mark, glosses.term,
        glosses.termed,
    )  # fmt: skip
    templates.filters |= {call.__name__: call for call in wording}
    templates.filters |= {
        "clearest": clearest, "columns": _columns, "direction": _direction, "leading": _leading, "scored": scored,
        "shade": _shade, "strength": _strength, "spaces": _spaces,
    }  # fmt: skip
    templates.globals |= {
        "colours": charts.COLOURS,
        "every_gloss": glosses.every_gloss,
        "key_note": words.KEY_NOTE,
        "key_title": words.KEY_TITLE,
        "definition_names": claims.DEFINITIONS,
        "doubted_names": claims.DOUBTED,
        "no_pattern": claims.NONE,
        "sides_note": claims.SIDES_NOTE,
    }
    return templates


def clearest(card: NeuronCard) -> Claim | None:
    """The first of a neuron's tested patterns that has a verdict."""
    return next((claim for claim in card.claims or () if claims.believed(claim)), None)


def scored(token: ValueToken, polarity: int) -> str:
    """What a coefficient of +1 or -1 does to a token; the run keeps probabilities of the value itself, at +1."""
    logit = f"logit {words.number(polarity * token.logit, sign=True)} at coefficient {polarity:+d}"
    return f"{logit}, probability {words.number(token.probability)}" if polarity > 0 else logit


def _leading(card: NeuronCard) -> int:
    return card.sides[0].polarity


def _columns(card: NeuronCard) -> words.Columns | None:
    return words.columns(card, _COLUMNS)


def _direction(example: Example) -> str:
    """Which way the text of an example runs, by its active token or else what stands before it."""
    nearest = "".join([example.active, *reversed(example.before)])
    return "rtl" if words.is_right_to_left(nearest) else "ltr"


def _strength(card: NeuronCard, coefficient: float) -> str:
    """How strongly to shade a token: by its share of the neuron's largest |coefficient|."""
    return f"{0.08 + 0.4 * _share(card, coefficient):.2f}"


def _shade(card: NeuronCard, coefficient: float) -> str:
    """How strongly to shade a token beside the one that triggers: alike, and not at all where it is next to nothing."""
    return "0" if _share(card, coefficient) < 0.02 else f"{0.48 * _share(card, coefficient):.2f}"


def _share(card: NeuronCard, coefficient: float) -> float:
    """|coefficient| as a share of the neuron's largest, at most 1."""
    reach = max(abs(card.statistics.min or 0.0), abs(card.statistics.max or 0.0))
    return min(abs(coefficient) / reach, 1.0) if reach else 0.0


def _spaces(text: str) -> tuple[str, str]:
    """The visible spaces that a label begins with, and the rest."""
    rest = text.lstrip("·")
    return text[: len(text) - len(rest)], rest


# -- What has no page of its own: what the terminal prints, as elements -------------------------------------------


def printed_fragment(shown: Any) -> str:
    """What rich prints, to be put into another page: what a notebook displays."""
    return environment().get_template("printed_fragment.html").render(printed=printed.elements(shown))


def printed_page(shown: Any) -> str:
    """The same as a whole page that needs nothing else."""
    return environment().get_template("printed_page.html").render(printed=printed.elements(shown))


def claim_fragment(test: ClaimTest) -> str:
    """A tested claim of the reader's own, as on a card."""
    return environment().get_template("claim_fragment.html").render(test=test)


def claim_page(test: ClaimTest) -> str:
    """The same as a whole page that needs nothing else."""
    return environment().get_template("claim_page.html").render(test=test)


def highlights_fragment(highlights: Highlights) -> str:
    """Cards of a run's neurons to look at first, each below the reason why."""
    return environment().get_template("highlights_fragment.html").render(shown=highlights, most=Most(4, 0))


def highlights_page(highlights: Highlights) -> str:
    """The same as a whole page that needs nothing else."""
    return environment().get_template("highlights_page.html").render(shown=highlights, most=Most(4, 0))
