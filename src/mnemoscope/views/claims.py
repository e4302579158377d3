"""What is said of a tested pattern, in words and rounded numbers: the one wording that terminal and page share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mnemoscope.neuron.claims import Claim, CurvePoint, Definition, LayerNull, Share
from mnemoscope.neuron.twoway import ACTIVE_PATTERN, IFF, NEITHER, NONE, PATTERN_ACTIVE
from mnemoscope.records import NULLS
from mnemoscope.views.terminal import Fitted, block, table
from mnemoscope.views.words import SIGN, number, share

SIDES_NOTE = (
    "Precision, P(pattern | active), and recall, P(active | pattern), are the two sides of a claim. Intervals hold "
    "95 % of 1,000 resamples of the documents of the test half, in which neither the pattern nor the threshold was "
    "chosen; where all resamples agree, what so many documents leave open."
)
VERDICTS = {  # as stored, and as readers are told
    IFF: "both ways (precise and complete)",
    ACTIVE_PATTERN: "precise",
    PATTERN_ACTIVE: "complete",
    NEITHER: "neither precise nor complete",
    NONE: NONE,
}
SHORT = VERDICTS | {IFF: "both ways", NEITHER: "neither", NONE: "no pattern"}  # in a table
PRECISE = (
    "precise: at least half of the active tokens show the pattern; complete: at least half of the tokens with the "
    "pattern are active (each by the lower end of its interval)"
)
_MEANING = {
    IFF: "Precision and recall are both certainly at least a half.",
    ACTIVE_PATTERN: "Precision is certainly at least a half, recall is not: it may know only a part of the pattern.",
    PATTERN_ACTIVE: "Recall is certainly at least a half, precision is not: it may do more than that.",
    NEITHER: "Better than units that mean nothing, but neither precision nor recall is certainly at least a half.",
    NONE: "Units that mean nothing do as well, or held-out triggers do not confirm it.",
}
_FAMILIES = {
    "main": "",
    "whole": " (by its whole distribution)",
    "next": " (what comes next)",
    "position": " (position)",
}
_BASELINES = {
    "token": "a table of its triggers' last tokens",
    "other": "another unit's pattern",
    "random": "a random pattern as frequent",
    "constant": "a pattern that is always there",
}


def decimal(value: float | None) -> str:
    """A share or a correlation to two places, without the leading zero; never 0 or 1 when it is neither."""
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{value:g}"
    size = abs(value)
    text = "< .01" if size < 0.005 else "> .99" if size >= 0.995 else f"{size:.2f}".lstrip("0")
    return f"-{text}" if value < 0 else text


def interval(figure: Share) -> str:
    """A figure with its interval."""
    if figure.value is None:
        return "undefined"
    return f"{decimal(figure.value)} [{decimal(figure.low)}, {decimal(figure.high)}]"


def active_means(claim: Claim) -> str:
    """What the claim is about: the prefix, the next token or the position, and for which sign."""
    return f"When {SIGN[claim.polarity]}:"


def family(claim: Claim) -> str:
    """What a name does not say of itself: which tests the claim belongs to."""
    return _FAMILIES[claim.tests]


def evidence(claim: Claim) -> str:
    """Both sides, and what pseudo-neurons reach."""
    lines = [*map(null_line, claim.nulls), *decoy_line(claim)]
    nulls = "; ".join(lines) or "the run was built without nulls"
    return f"(precision {interval(claim.precision)}, recall {interval(claim.recall)}, F1 {interval(claim.f1)}; {nulls})"


def decoy_line(claim: Claim) -> list[str]:
    """What the best decoy of the very neuron reaches, and how surely the neuron does more; nothing without decoys."""
    if claim.decoy_q is None or claim.decoy_f1_low is None:
        return []
    reached = f"its own decoy: F1 {decimal(claim.decoy_f1_low)} at the lower end"
    if claim.decoy_q >= 1:
        return [f"{reached}, not surely less"]
    return [f"{reached}, beaten at a rate of false discoveries of {share(claim.decoy_q)}"]


def null_line(null: LayerNull) -> str:
    """What one kind of null reaches."""
    where = "" if null.kind == "shuffled" else f" of this {null.of}"
    return (
        f"{NULLS.get(null.kind, null.kind)}{where}: median F1 {decimal(null.median)}, 99th percentile "
        f"{decimal(null.high)}"
    )


def verdict_words(claim: Claim) -> str:
    """The verdict in words."""
    return VERDICTS[claim.verdict]


def meaning(claim: Claim) -> str:
    """What the verdict amounts to."""
    return _MEANING[claim.verdict]


def sentence(claim: Claim) -> str:
    """The verdict as a sentence."""
    return f"{active_means(claim)} *{claim.name}* {evidence(claim)}: {verdict_words(claim)}. {meaning(claim)}"


def where_active(claim: Claim) -> str:
    """Threshold, and how much text was read."""
    sign = "at least" if claim.polarity > 0 else "at most"
    tokens = "held-out tokens" if claim.among == "layer" else "held-out tokens routed to its expert"
    return (
        f"active: {sign} {number(claim.threshold, sign=True)}, {claim.active:,} of {claim.tokens:,} {tokens} "
        f"in {claim.documents:,} documents; the pattern is at {claim.present:,}, both at {claim.both:,}"
    )


def figures(claim: Claim) -> str:
    """Headline figures, beside F1, that do not depend on one threshold."""
    numbers = [
        f"F1 {interval(claim.f1)}", f"average precision {decimal(claim.auprc)}", f"Pearson {decimal(claim.pearson)}",
        f"IoU {decimal(claim.iou)}", f"mutual information {number(claim.mutual_information)} nats",
    ]  # fmt: skip
    return " · ".join(numbers)


def baselines(claim: Claim) -> str:
    """F1 of other explanations of the same activity."""
    known = [
        f"{_BASELINES[name]} {decimal(claim.baselines[name])}"
        for name in _BASELINES
        if name in claim.baselines
    ]
    return "F1 of other explanations: " + " · ".join(known)


def specificity(claim: Claim) -> str | None:
    """Where the neuron stands for its own pattern."""
    if claim.specificity_rank is None:
        return None
    rank = claim.specificity_rank
    closer = "no neuron" if rank == 0 else f"{rank:,} of {claim.neurons:,} neurons"
    text = f"{closer} of the {claim.among} has a larger correlation with this pattern"
    if claim.specificity_null is not None:
        text += f"; {share(claim.specificity_null)} of the pseudo-neurons do"
    return text


def bands(claim: Claim) -> str:
    """Whether the pattern persists down the range."""
    return "P(pattern) by rank of the coefficient: " + " · ".join(
        f"{band.name} {decimal(band.shown)}" for band in claim.bands
    )


def definition(active: Definition) -> tuple[str, str, str, str, str, str, str]:
    """A row of the sweep: what active means, threshold, share of tokens, precision, recall, F1, verdict."""
    sides = (decimal(active.precision), decimal(active.recall), decimal(active.f1))
    return (
        active.name,
        number(active.threshold, sign=True),
        share(active.active),
        *sides,
        SHORT[active.verdict],
    )


DEFINITIONS = ("active means", "from", "tokens", "precision", "recall", "F1", "verdict")


def believed(claim: Claim) -> bool:
    """Whether there is more to say than that there is nothing."""
    return claim.verdict != NONE


DOUBTED = (NONE, "when", "precision", "recall", "F1", "null, 99 %")


def doubted(claim: Claim) -> tuple[str, str, str, str, str, str]:
    """A row for a claim without a verdict: sign, both sides, F1, and the 99th percentile of pseudo-neurons."""
    high = max((null.high for null in claim.nulls), default=None)
    return (
        claim.name + family(claim),
        "> 0" if claim.polarity > 0 else "< 0",
        decimal(claim.precision.value),
        decimal(claim.recall.value),
        interval(claim.f1),
        decimal(high),
    )


def sampled(claim: Claim, most: int) -> list[CurvePoint]:
    """At most so many points of the curve, evenly over its places, both ends among them."""
    points = list(claim.curve)
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def spark(shares: list[float]) -> str:
    """Shares between 0 and 1 as a line of blocks."""
    return "".join(block(min(int(share * 8), 7) + 1) for share in shares)


# -- Tested patterns in the terminal ---------------------------------------------------------------------------


def section(claims: Sequence[Claim] | None, width: int) -> Iterator[RenderableType]:
    """The part of a card that is about patterns; nothing if none were looked for."""
    if claims is None:
        return
    yield Text()
    yield Text("patterns, on held-out text", style="bold")
    if not claims:
        yield Text(" none that its triggers share beyond chance", style="dim")
    for claim in claims:
        if believed(claim):
            yield from verdict(claim, width, whole=True)
    if rest := [claim for claim in claims if not believed(claim)]:
        yield Padding(doubted_table(rest), (0, 0, 0, 1))
    if claims:
        yield Padding(Text(SIDES_NOTE, style="dim"), (0, 0, 0, 1))


def tested(claim: Claim) -> Fitted:
    """The verdict on a claim of the reader's own, and what it rests on."""
    return Fitted(lambda room: verdict(claim, room.width, whole=True))


def verdict(claim: Claim, width: int, *, whole: bool) -> Iterator[RenderableType]:
    """The verdict as a sentence; if `whole`, also what it rests on."""
    line = Text(f"{active_means(claim)} ")
    line.append(claim.name, style="bold italic").append(family(claim))
    line.append(f" {evidence(claim)}: ", style="" if whole else "dim").append(
        verdict_words(claim), style="bold"
    )
    line.append(f". {meaning(claim)}")
    yield Padding(line, (0, 0, 0, 1))
    if not whole:
        return
    for text in (where_active(claim), figures(claim), baselines(claim), specificity(claim), bands(claim)):
        if text:
            yield Padding(Text(text, style="dim"), (0, 0, 0, 3))
    yield Padding(curve(claim, width - 20), (0, 0, 0, 3))
    yield Padding(definitions(claim), (0, 0, 0, 3))


def doubted_table(claims: Sequence[Claim]) -> RenderableType:
    """Claims without a verdict, a row each."""
    return table(DOUBTED, map(doubted, claims), gap=1, style="dim")


def curve(claim: Claim, most: int) -> RenderableType:
    """Precision, recall and F1 over thresholds, as lines of blocks of 0 to 1."""
    points = sampled(claim, min(most, 48))
    lines = Table.grid(padding=(0, 2, 0, 0))
    if not points:
        return lines
    for heading in ("precision", "recall", "F1"):
        shares = [getattr(point, heading.lower()) for point in points]
        lines.add_row(Text(heading, style="dim"), spark(shares))
    first, last = (number(claim.polarity * point.threshold, sign=True) for point in (points[0], points[-1]))
    ends = f"{first}{last:>{max(len(points) - len(first), len(last) + 1)}}"
    lines.add_row("", Text(ends, style="dim"))
    return lines


def definitions(claim: Claim) -> RenderableType:
    """The verdict under other meanings of active."""
    return table(DEFINITIONS, map(definition, claim.definitions), left=(0, 6), gap=1)
