"""What a neuron card says, in words and rounded numbers: the one wording that terminal and page share."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

from mnemoscope.neuron.card import Example, NeuronCard, Side, UnitNote, ValueToken
from mnemoscope.neuron.claims import QUADRANTS
from mnemoscope.neuron.overview import LayerSummary
from mnemoscope.neuron.striking import FAR, LEAST, Pick
from mnemoscope.records import UNIT_KINDS, UNIT_POINTS, ExpertNeuronId, Manifest

BEHIND = 8  # tokens after the active one that the terminal shows of an encoder's text
SIGN = {1: "positive", -1: "negative"}

KEY_TITLE = "tokens that the key prefers by themselves"
KEY_NOTE = (
    "Which tokens the key prefers by themselves: the coefficient that a token's input embedding alone would give if it "
    "entered this layer, without position or context; it says what a neuron responds to only near the bottom of the "
    "model."
)


@dataclass(frozen=True)
class Fact:
    """A number with its name and, where there is one, what is usual in the layer."""

    name: str
    value: str
    usual: str | None = None


@dataclass(frozen=True)
class Columns:
    """A histogram redrawn as columns of equal width, with an edge on zero.

    Counts of a stored bin are spread evenly over its width, so they need not be whole.
    """

    left: float
    width: float
    counts: tuple[float, ...]

    @property
    def heights(self) -> tuple[float, ...]:
        """log(1 + count), as a share of the tallest column."""
        top = math.log1p(max(self.counts, default=0.0))
        return tuple(math.log1p(count) / top if top else 0.0 for count in self.counts)

    def place(self, value: float) -> float:
        """Where a coefficient stands, as a share of the whole width."""
        return (value - self.left) / (self.width * len(self.counts))


def number(value: float | None, *, sign: bool = False) -> str:
    """Three significant digits; a dash for a value that is not defined; never a bare exponent below 1e6."""
    if value is None or not math.isfinite(value):
        return "–"
    mark = "+" if sign and value > 0 else ""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        return f"{mark}{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1000:
        return f"{mark}{value:,.0f}"
    places = max(0, 2 - math.floor(math.log10(size)))
    return f"{mark}{value:.{min(places, 4)}f}"


def share(value: float | None) -> str:
    """A fraction as a percentage that never rounds to all or nothing when it is neither."""
    if value is None:
        return "–"
    percent = 100 * value
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if 10 <= percent <= 90 or percent in (0, 100) else f"{percent:.1f} %"


def is_right_to_left(text: str) -> bool:
    """Whether the first character with a direction of its own runs right to left."""
    for character in text:
        kind = unicodedata.bidirectional(character)
        if kind in ("L", "R", "AL"):
            return kind != "L"
    return False


def model_line(manifest: Manifest) -> str:
    """The model of a run in one line."""
    model = manifest.model
    kind = f"gated ({model.activation})" if model.gated else model.activation
    if model.units is not None:
        place = f"{len(model.cells.layers)} of {model.layers} layers"
        return f"{model.id} · {len(model.cells):,} units of {model.units.id} in {place}, {kind}"
    return f"{model.id} · {model.layers} layers of {model.cells.spelled} neurons, {kind}"


def corpus_line(manifest: Manifest) -> str:
    """The corpus of a run in one line."""
    corpus = manifest.corpus
    return (
        f"{corpus.id} · {corpus.documents:,} documents, {corpus.contexts:,} contexts ({corpus.segment}), "
        f"{corpus.counted:,} tokens counted{corpus.spelling and f'; {corpus.spelling}'}"
    )


def layer_line(layer: LayerSummary) -> str:
    """A layer in one line."""
    parts = [
        f"median excess kurtosis {number(layer.median_kurtosis)}",
        f"heavier tails than normal in {share(layer.heavy_tailed)}",
        f"median of the largest |coefficient| {number(layer.median_reach)}",
        f"{layer.dead:,} dead" if layer.dead else "none dead",
    ]
    if layer.constant:
        parts.append(f"{layer.constant:,} constant")
    if layer.one_sided:
        parts.append(f"{layer.one_sided:,} one-sided")
    return " · ".join([f"{layer.neurons:,} neurons", *parts])


def where(card: NeuronCard) -> str:
    """Model, place and kind of the neuron in one line."""
    kind = f"gated ({card.activation})" if card.gated else card.activation
    stack = "" if card.stack is None else f" ({card.stack})"
    return f"{card.model} · layer {card.layer} of {card.layers}{stack} · {kind}"


def unit_note(unit: UnitNote, card: NeuronCard) -> str:
    """What a unit is that is no neuron, and how well those of its layer rebuild what they stand for."""
    name = "" if unit.name is None else f"{unit.name}: "
    reads, writes = (UNIT_POINTS[point].format(card.layer) for point in (unit.reads, unit.writes))
    place = f"of {reads}" if reads == writes else f"from {reads} to {writes}"
    rebuilt = (
        "" if unit.explained is None else f", which explain {share(max(unit.explained, 0.0))} of its variance"
    )
    what = f"{name}unit of {unit.source} ({UNIT_KINDS[unit.kind]}) {place}"
    if unit.active is None:
        return what
    return f"{what}; {number(unit.active)} of {card.neurons:,} are active on a token{rebuilt}"


def kind_note(card: NeuronCard) -> str | None:
    """The expert of a neuron and how often tokens are routed to it, or what a unit is that is none; else None."""
    address = card.id
    if card.unit is not None:
        return unit_note(card.unit, card)
    if card.experts is None or card.routed is None or not isinstance(address, ExpertNeuronId):
        return None
    which = (
        "shared expert"
        if address.expert == card.experts[0]
        else f"expert {address.expert} of {card.experts[0]}"
    )
    weight = (
        ""
        if card.router_weight is None
        else f", with a router weight of {number(card.router_weight)} on average"
    )
    return f"{which}, routed in {card.routed * 100:.3g} % of tokens{weight}"


def state_note(card: NeuronCard) -> str | None:
    """A sentence for a neuron that is dead, constant or one-sided."""
    tokens = f"{card.statistics.tokens or 0:,.0f} tokens"
    return {
        None: None,
        "dead": f"dead: its coefficient was 0 on every one of {tokens}",
        "constant": f"constant: its coefficient was {number(card.statistics.min)} on every one of {tokens}",
    }.get(card.state, f"{card.state}, on any of {tokens}")


def readings(card: NeuronCard) -> list[tuple[str, tuple[ValueToken, ...]]]:
    """What the neuron promotes and suppresses, read at its usual sign: that of most of its triggers."""
    polarity = card.sides[0].polarity
    sign = f" (usual sign: {SIGN[polarity]})" if _two_signs(card) else ""
    sign = " (if it were positive)" if card.state == "dead" else sign
    return [(f"promotes{sign}", card.writes(polarity)), (f"suppresses{sign}", card.writes(-polarity))]


def readings_note(card: NeuronCard) -> str | None:
    """Said of neurons that take both signs, and of a model without a head."""
    other = SIGN[-card.sides[0].polarity]
    notes = [f"when {other}, the two change places"] if _two_signs(card) else []
    if card.readout != "head":
        notes.append(f"read through the {card.readout}, as the {card.stack or 'model'} has no head")
    return "; ".join(notes) or None


def _two_signs(card: NeuronCard) -> bool:
    low, high = card.statistics.min or 0.0, card.statistics.max or 0.0
    return low < 0 < high


def facts(card: NeuronCard) -> list[Fact]:
    """The distribution of the coefficient, each number beside the median of its layer."""
    own, usual = card.statistics, card.layer_median
    rows = [
        Fact(name, number(getattr(own, key)), number(getattr(usual, key)))
        for name, key in (
            ("min", "min"),
            ("mean", "mean"),
            ("max", "max"),
            ("std", "std"),
            ("skewness", "skewness"),
            ("excess kurtosis", "kurtosis"),
        )
    ]
    return [*rows, Fact("> 0 in", share(own.positive_fraction), share(usual.positive_fraction))]


def details(card: NeuronCard) -> list[Fact]:
    """Norms and the shape of the value as a distribution over the vocabulary."""
    own, usual = card.statistics, card.layer_median
    gate = [Fact("norm of the up key", number(own.up_norm), number(usual.up_norm))] if card.gated else []
    return [
        Fact("norm of the value", number(own.value_norm), number(usual.value_norm)),
        Fact(f"norm of the {'gate ' if card.gated else ''}key", number(own.key_norm), number(usual.key_norm)),
        *gate,
        Fact(
            f"largest probability of the value (uniform: {number(1 / card.vocabulary)})",
            number(own.value_max_probability),
            number(usual.value_max_probability),
        ),
        Fact(
            f"entropy of the value in nats (uniform: {number(math.log(card.vocabulary))})",
            number(own.value_entropy),
            number(usual.value_entropy),
        ),
        Fact("tokens counted", f"{own.tokens or 0:,.0f}"),
    ]


def side_title(side: Side, shown: int) -> str:
    """Heading of a list of triggers: which, how many are shown of how many stored."""
    if side.stored == 0:
        return f"strongest {SIGN[side.polarity]}: none, it never was {SIGN[side.polarity]}"
    count = f"{side.stored}" if shown == side.stored else f"{shown} of {side.stored}"
    return f"strongest {SIGN[side.polarity]} ({count})"


def quadrants(side: Side) -> str | None:
    """Gate and up signs of the stored triggers, the quadrants that occur."""
    if side.quadrants is None:
        return None
    return " · ".join(f"{c} with {n}" for n, c in zip(QUADRANTS, side.quadrants, strict=True) if c)


def source(example: Example) -> str:
    """Document title and the active token's position in the document; in an expert the router's weight before them."""
    weight = "" if example.router_weight is None else f"router {number(example.router_weight)} · "
    return f"{weight}{example.title or f'document {example.document}'} @{example.offset + example.position}"


def active(example: Example) -> tuple[str, str]:
    """The spaces that the active token begins with, which stand outside its box, and the rest of it."""
    rest = example.active.lstrip(" ")
    if not rest:
        return "", "·" * len(example.active)
    return " " * (len(example.active) - len(rest)), rest


def following(example: Example) -> str:
    """The next token, or that there is none."""
    return "(end)" if example.next_token is None else example.next_token


def behind(example: Example) -> str:
    """Some of the text after the active token, for an example of an encoder."""
    cut = len(example.after) > BEHIND or example.left_out[1]
    return "".join(example.after[:BEHIND]) + ("…" if cut else "")


def threshold_note(card: NeuronCard) -> str | None:
    """What the marks under the distribution stand for."""
    weakest = [side.threshold for side in (card.negative, card.positive) if side.threshold is not None]
    if not weakest:
        return None
    return f"▲ weakest stored trigger: {', '.join(number(value, sign=True) for value in weakest)}"


def histogram_note(card: NeuronCard) -> str:
    """What the columns of the distribution count: all contexts or a share of them."""
    counted, tokens = card.histogram.total, int(card.statistics.tokens or 0)
    count = f"{counted:,} of {tokens:,}" if counted < tokens else f"{counted:,}"
    return f"{count} coefficients; columns of equal width, log counts"


def lens_note(card: NeuronCard) -> str:
    """How the value was read."""
    through = (
        ""
        if card.readout == "head"
        else f" through the {card.readout} (the {card.stack or 'model'} has no head)"
    )
    return f"The value is read under the lens “{card.lens}”{through}, over all {card.vocabulary:,} tokens."


def reason(pick: Pick) -> str:
    """Why a neuron was chosen, the null beside the number."""
    usual = f"(layer median {number(pick.usual)})"
    if pick.criterion in ("next", "token"):
        hits = (
            f"{round(pick.value * (pick.stored or 0))} of {pick.stored} {SIGN[pick.polarity or 1]} triggers"
        )
        expected = f"(expected {number((pick.usual or 0) * (pick.stored or 0))})"
        if pick.criterion == "token":
            return f"one token: {hits} at “{pick.token}” {expected}"
        if pick.stands:
            return f"says what stands there: {hits} are at a token that it promotes at that sign {expected}"
        return (
            f"says what comes next: {hits} are followed by a token that it promotes at that sign {expected}"
        )
    if pick.criterion == "quiet":
        name = "dead" if pick.value == 0 else "most quiet"
        return f"{name}: its largest write has the norm {number(pick.value)} {usual}"
    return {
        "peaked": f"most peaked: excess kurtosis {number(pick.value)} {usual}, with {LEAST} triggers of one sign "
        f"further than {FAR:g} standard deviations from the mean",
        "sides": f"most two-sided: {LEAST} triggers of either sign beyond {number(pick.value)} standard deviations "
        f"{usual}",
        "chance": "drawn at random, not chosen",
    }[pick.criterion]


def columns(card: NeuronCard, most: int) -> Columns | None:
    """The card's histogram as at most `most` columns of equal width, zero among their edges.

    None if there is nothing to draw: no count, or all coefficients equal.
    """
    histogram = card.histogram
    if not histogram.counts or card.state in ("dead", "constant"):
        return None
    low = min(card.statistics.min or 0.0, 0.0)
    high = max(card.statistics.max or 0.0, 0.0)
    width = (high - low) / (most - 1)
    before, after = math.ceil(-low / width - 1e-9), math.ceil(high / width - 1e-9)
    spread = [0.0] * (before + after)
    for count, a, b in zip(histogram.counts, histogram.edges, histogram.edges[1:], strict=False):
        _pour(spread, count, (max(a, low) / width) + before, (min(b, high) / width) + before)
    return Columns(-before * width, width, tuple(spread))


def _pour(spread: list[float], count: int, start: float, stop: float) -> None:
    """Add `count` evenly between two places, given in columns."""
    last = len(spread) - 1
    if stop - start < 1e-9:  # a bin of no width, or one that only touches [min, max]
        spread[min(max(int(start), 0), last)] += count
        return
    for column in range(max(int(start), 0), min(math.ceil(stop), last + 1)):
        overlap = min(stop, column + 1) - max(start, column)
        spread[column] += count * max(overlap, 0.0) / (stop - start)


def duration(seconds: float) -> str:
    """As people say it: 12 s, 3:40 min, 5:07 h, 12 days."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)}:{int(seconds % 60):02} min"
    return (
        f"{int(minutes // 60)}:{int(minutes % 60):02} h"
        if minutes < 48 * 60
        else f"{minutes / 1440:,.0f} days"
    )


def size(count: int) -> str:
    """Bytes as people say them: 540 MB, 1.2 GB."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 999.5e6
        else f"{max(count, 1) / 1e6:.{0 if count >= 1e7 else 1}f} MB"
    )
