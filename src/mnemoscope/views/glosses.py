"""What the names of statistics mean, in a sentence each: the one table, and how a page says it.

A name is a button under the mouse, the finger, the keyboard and a screen reader alike: it opens the sentence beside
itself, without a script. The sentence is on the page once, however often it is named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

# Names that mean the same wherever they stand.
_ANYWHERE = {
    "excess kurtosis": "How heavy the tails of a distribution are: the fourth standardised moment less 3. A normal "
    "distribution has 0; a few coefficients far out make it large.",
    "skewness": "How lopsided a distribution is (the third standardised moment): above 0 if its longer tail is on the "
    "right, 0 if both sides are alike.",
    "trigger": "A text of the run that ends with the token on which the neuron is active; the run keeps those with the "
    "largest and those with the most negative coefficients.",
    "standard deviations": "A distance in units of how far the coefficient usually is from its mean.",
    "largest write": "The largest |coefficient| times the length of the value: the most that the neuron ever added to "
    "the stream.",
    "layer median": "The median of the same statistic over all neurons of the layer.",
    "precision": "Of the tokens on which the neuron is active, the share that shows the pattern: P(pattern | active).",
    "recall": "Of the tokens that show the pattern, the share on which the neuron is active: P(active | pattern).",
    "F1": "Harmonic mean of precision and recall: 1 if both are 1, small if either of them is.",
    "average precision": "Precision averaged over all thresholds, each counted by the recall it adds.",
    "Pearson": "Correlation of the coefficient with the pattern (1 where it is, 0 elsewhere), over all tokens.",
    "IoU": "Intersection over union: the tokens that are active and show the pattern, of those that do either.",
    "mutual information": "What the coefficient tells of the pattern, and the pattern of the coefficient; 0 if "
    "they are independent.",
    "nats": "Units of natural logarithms: log p that is larger by 1 is a probability 2.72 times as large.",
    "leave-one-out": "What log p of the target loses when this part is taken from the end of the stream, nothing else "
    "reacting.",
}
# Names that do only where they stand alone, as the head of a row or a column.
_ALONE = {
    "coefficient": "How strongly the neuron answers to a token: its value is added to the stream so many times.",
    "min": "The smallest coefficient on any counted token: the most negative, if it takes that sign.",
    "mean": "The mean of the coefficient over all counted tokens.",
    "max": "The largest coefficient on any counted token.",
    "std": "Standard deviation of the coefficient: how far from its mean it usually is.",
    "> 0 in": "The share of counted tokens on which the coefficient is above 0.",
    "norm of the value": "Length of the value, the vector that the neuron adds to the stream for a coefficient of 1.",
    "norm of the key": "Length of the key, the vector that what enters the layer is multiplied with.",
    "norm of the up key": "Length of the second vector of a gated neuron, which scales what the gate lets through.",
    "largest probability of the value": "The probability of the token that comes first when the value alone is read "
    "as a distribution over the vocabulary.",
    "entropy of the value": "How widely the value is spread when it is read as a distribution over the vocabulary: 0 "
    "if all of it is on one token, the largest if all tokens are alike.",
    "tokens counted": "How many tokens of the text the statistics are of.",
    "rank": "Place in the list of what is promoted most, or suppressed most; 0 is the first.",
    "sign": "Of the coefficient that is meant: the value is added where it is positive, and subtracted where it is "
    "negative.",
    "usual": "Whether this is the sign that most of the neuron's triggers have.",
    "logit": "What the value adds to the score of the token, for a coefficient of 1 with that sign.",
    "probability": "Of the token, when the value alone is read as a distribution over the vocabulary.",
    "max probability": "Of the token that comes first in that distribution.",
    "hits": "Triggers of the neuron at which the text stands.",
    "common": "Positions of the text that are triggers of both neurons.",
    "expected": "What chance alone would give: the null to read the number against.",
    "triggers": "How many triggers the run keeps of this neuron and sign.",
    "strongest": "The largest coefficient among them.",
    "active": "Tokens on which the coefficient is beyond the threshold.",
    "verdict": "Precise if at least half of the active tokens show the pattern, complete if at least half of the "
    "pattern's tokens are active, each by the lower end of its interval.",
    "null, 99 %": "F1 that one in a hundred units which mean nothing reaches.",
    "deviations": "Standard deviations between the coefficient and the neuron's mean on the run's text.",
    "tail": "The share of the neuron's own coefficients on the run's text that lie at least as far out.",
    "by chance": "How many neurons are as unusual at an ordinary token of the run's text, at most.",
    "increase": "What the part adds to log p of the target where it is written, before anything above it has worked.",
    "ablated": "What log p of the target loses when the part is really removed and all layers above react.",
    "router weight": "What the router multiplies the output of the expert with.",
    "hit rate": "The share of neurons (or of their prefixes) where a pattern was seen.",
    "false-alarm rate": "The same share where there is nothing to see: hidden null items, or distractors.",
    "d'": "Hit rate against false-alarm rate in standard deviations (signal detection): 0 if both are alike.",
    "corrected share": "The share of neurons that have a pattern after false alarms are taken off (Rogan and Gladen "
    "1978), if no real pattern is ever missed.",
    "same": "The share of pairs of annotators who say the same; chance is not taken off.",
    "Cohen": "Cohen's kappa: agreement of two annotators beyond chance from each one's habits; 1 is full, 0 is chance.",
    "Fleiss": "Fleiss' kappa: agreement beyond chance from the habits of all together; 1 is full, 0 is chance.",
    "AC1": "Gwet's AC1: agreement beyond chance that stays sensible where one answer is rare; 1 is full, 0 is chance.",
    "Krippendorff": "Krippendorff's alpha: agreement beyond chance, corrected for few items; 1 is full, 0 is chance.",
}  # fmt: skip
GLOSSES = _ANYWHERE | _ALONE
# Other spellings: those of columns, and of units and models that have other parts.
_SPELLED = {
    "kurtosis": "excess kurtosis",
    "f1": "F1",
    "iou": "IoU",
    "pearson": "Pearson",
    "positive fraction": "> 0 in",
    "value norm": "norm of the value",
    "key norm": "norm of the key",
    "norm of the gate key": "norm of the key",
    "up norm": "norm of the up key",
    "value entropy": "entropy of the value",
    "entropy of the value in nats": "entropy of the value",
    "value max probability": "largest probability of the value",
}
# What is said of a word in a sentence, where "triggers" are no count of them as at the head of a column.
_WORDS = dict(zip(_ANYWHERE, _ANYWHERE, strict=True)) | {
    "kurtosis": "excess kurtosis",
    "triggers": "trigger",
    "expected": "expected",
}
_IN_TEXT = re.compile(
    rf"(?<!\w)({'|'.join(sorted(map(re.escape, _WORDS), key=len, reverse=True))})(?!\w)([,;:.)]?)"
)
_ASKED = re.compile(r'popovertarget="gloss-([a-z0-9-]+)"')


def gloss(name: str) -> str | None:
    """What a name means that stands alone; None if it is none of these."""
    known = _known(name)
    return None if known is None else GLOSSES[known]


def term(name: str) -> Markup:
    """A name that stands alone, as what says its meaning; as it is, if it is none of these."""
    known = _known(name)
    return escape(name) if known is None else _button(name, known)


def termed(text: str) -> Markup:
    """A sentence in which each name, where it comes first, says its meaning."""
    seen: set[str] = set()

    def put(match: re.Match[str]) -> str:
        known = _WORDS[match[1]]
        if known in seen:
            return match[0]
        seen.add(known)
        button = _button(match[1], known)  # beside which a line may break, though not before a comma
        return Markup('<span class="mn-whole">{}{}</span>').format(button, match[2]) if match[2] else button

    return Markup(_IN_TEXT.sub(put, escape(text)))


def mark(name: str) -> Markup:
    """A mark that says the meaning of a name beside it, which does something else already; nothing without one."""
    known = _known(name)
    return Markup() if known is None else _button("?", known, f"what {known} means")


def glosses(html: str) -> Markup:
    """The sentences of all names on a page, or on a part of it: what is put behind them."""
    return _sentences(_AT[at] for at in dict.fromkeys(_ASKED.findall(str(html))))


def glossed(html: str) -> Markup:
    """A part of somebody else's page with the sentences of its names behind it, under ids that no other part has."""
    text = str(html)
    own = f"mn{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    named = Markup(_ASKED.sub(rf'popovertarget="{own}gloss-\1"', text))
    return named + Markup("\n") + _sentences((_AT[at] for at in dict.fromkeys(_ASKED.findall(text))), own)


def every_gloss() -> Markup:
    """The sentences of all names there are."""
    return _sentences(GLOSSES)


def _sentences(names: Iterable[str], own: str = "") -> Markup:
    said = Markup('<div class="mn-gloss" id="{}gloss-{}" popover><strong>{}</strong> {}</div>')
    return Markup("\n").join(said.format(own, _place(name), name, GLOSSES[name]) for name in names)


def _known(name: str) -> str | None:
    """The entry of the table that a name is of; what is in brackets behind it is left aside."""
    plain = name.partition(" (")[0].replace("_", " ").strip()
    plain = _SPELLED.get(plain, plain)
    return plain if plain in GLOSSES else None


def _button(text: str, known: str, said: str = "") -> Markup:
    """said: what a screen reader says in place of the text."""
    kind = Markup(' aria-label="{}"').format(said) if said else ""
    return Markup(
        '<button type="button" class="mn-term" popovertarget="gloss-{}" title="{}"{}>{}</button>'
    ).format(_place(known), GLOSSES[known], kind, text)


def _place(known: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", known.lower()))


_AT = {_place(known): known for known in GLOSSES}
