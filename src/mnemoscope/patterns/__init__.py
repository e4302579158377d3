"""What neurons detect: a language of patterns, a search with calibrated p-values. No torch."""

from mnemoscope.patterns.language import masks, usual
from mnemoscope.patterns.pattern import Pattern, parse, predicate
from mnemoscope.patterns.search import Found, Options, Units
from mnemoscope.patterns.split import half, halves
from mnemoscope.patterns.text import Text

__all__ = [
    "Found",
    "Options",
    "Pattern",
    "Text",
    "Units",
    "half",
    "halves",
    "masks",
    "parse",
    "predicate",
    "usual",
]
