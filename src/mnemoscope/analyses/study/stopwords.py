"""What counts as a stop word: a pinned list of English function words (A27)."""

from __future__ import annotations

# Articles, pronouns, prepositions, conjunctions, auxiliaries, particles; no punctuation, and no words with content.
STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each either few for from further had has have having he her
    here hers herself him himself his how i if in into is it its itself just may me might more most must my myself
    neither no nor not now of off on once only or other our ours ourselves out over own same shall she should since
    so some such than that the their theirs them themselves then there these they this those though through to too
    under until up upon us very was we were what when where whether which while who whom whose why will with within
    without would yet you your yours yourself
    """.split()  # noqa: SIM905 - a list of 150 strings reads worse
)


def kind(text: str) -> str:
    """`stop word`, `punctuation` (no letter, no digit) or `other`, for a token's text, case and spaces aside."""
    word = text.strip().casefold()
    if word in STOP_WORDS:
        return "stop word"
    return "other" if any(letter.isalnum() for letter in word) else "punctuation"
