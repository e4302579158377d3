"""The words and rounded numbers that terminal and page share."""

from __future__ import annotations

from mnemoscope.views.explanation.sheet import (
    INCREASE,
    NATS,
    ROUTER,
    STREAM_OF_UNITS,
    Against,
    AttentionPattern,
    Candidate,
    Cause,
    Grid,
    Memory,
    Part,
    Sheet,
    Switched,
    Word,
)
from mnemoscope.views.words import number

DIFFER = (
    "They answer three questions. Increase: what the part adds to what its layer reads, before anything above it has "
    "worked. Leave-one-out: what is lost when it is taken from the end, nothing else reacting. Ablated: what is lost "
    "when it is really removed and all layers above react, often by making up for it."
)
NOT_ABLATED = (
    "Nothing was ablated; --ablate 10 takes out each of the ten most important neurons and heads in turn."
)
UPSTREAM = "upstream contributions"
SWITCHED = (
    "A neuron's coefficient, shared exactly among the vectors written before it (both branches of a gated neuron); "
    "in nats, the neuron's increase shared out in the same way."
)
CHAIN = (
    "chain: a part's own leave-one-out and its share of that of the listed neurons above, to whose coefficients it "
    "contributes"
)
POINTS = (
    "Lin, Lres, Lout: the residual stream before attention, before and after the FFN (resid_pre, resid_mid, "
    "resid_post); ATTN, FFN: what a layer's attention and feed-forward network write (attn, mlp)"
)
CARRIED = (
    "The score of that sub-value is the logit it writes for the target less that for the first foil, or without a foil "
    "less the expected one. Shown is how much of it is lost when a vector is taken out of its source: with attention "
    "worked out anew (recomputed), and with its weights kept (fixed)."
)


def nats(value: float | None, places: int = 3) -> str:
    """A signed increase; a dash where there is none; what rounds to nothing has no sign."""
    if value is None:
        return "–"
    shown = f"{value:+.{places}f}"
    return f"{0:.{places}f}" if float(shown) == 0 else shown


def cell(name: str, value: float | None) -> str:
    """A number under the column `name`."""
    if name in ("coefficient", "logit"):
        return number(value, sign=True)
    if name in ("weight", ROUTER):
        return "–" if value is None else f"{value:.2f}"
    return nats(value)


def probability(value: float) -> str:
    """Three decimals, or as many digits as a small one needs."""
    return f"{value:.3f}" if value >= 0.0995 or value == 0 else number(value)


def word(token: Word | None) -> str:
    """A token and its position: ·France@3."""
    if token is None:
        return ""
    return token.label if token.position is None else f"{token.label}@{token.position}"


def part(row: Part | Cause) -> str:
    """Name of a row, or of what switched a neuron on: L21H5 ← ·France@3."""
    return " ← ".join(text for text in (row.name, word(row.word)) if text)


def verdict(sheet: Sheet) -> str:
    """How the target stands at the end."""
    target = sheet.target
    chance = f"probability {probability(target.probability)}"
    return f"{chance} · rank {target.rank:,} · log p {nats(sheet.log_probability, 2)}"


def headline_units(sheet: Sheet) -> str:
    """What the numbers of the headline are."""
    if sheet.against:
        return f"In nats of log p({sheet.target.word.label}) less log p({sheet.against[0].foil.word.label})."
    return "In nats: layers by what they add to log p, heads and neurons by what it would lose without them."


def candidate(token: Candidate) -> str:
    """A token and its probability."""
    return f"{token.name} {probability(token.probability)}"


def stream_line(sheet: Sheet) -> str:
    """From where to where the stream goes."""
    first, last = sheet.stream[0], sheet.stream[-1]
    return (
        f"from {nats(first.log_probability, 2)} (rank {first.rank:,}) at {first.name} to "
        f"{nats(last.log_probability, 2)} (rank {last.rank:,}) at {last.name}: {nats(sheet.total, 2)} nats"
    )


def shown_line(sheet: Sheet) -> str:
    """How much of what attention and FFN added has a row in the two tables."""
    rest = sum(
        row.values[INCREASE] or 0.0
        for ledger in (sheet.heads, sheet.neurons)
        for row in ledger.closing
        if row.kind == "rest"
    )
    units = "units, " if any(row.name == STREAM_OF_UNITS for row in sheet.account) else ""
    return (
        f"of {units}attention and FFN together {nats(sheet.total, 2)}: in the tables below "
        f"{nats(sheet.total - rest, 2)}, not shown {nats(rest, 2)}"
    )


def grid_line(grid: Grid) -> str:
    """What the grid shows, and how much of the prompt it leaves out."""
    alone = len(grid.words) - bool(grid.together)
    tokens = f"{alone} of {grid.tokens} tokens" if alone < grid.tokens else "every token"
    if grid.together:
        tokens += f", the next {grid.together} together in the last column"
    return (
        f"The heads that matter most, by depth, and what each brought from {tokens}: leave-one-out in nats, orange and "
        "+ for, blue and - against."
    )


ATTENTION = (
    "Where heads look: each row is a token, each column one that it can look at; the darker a cell, the more weight "
    "the token gives it. Rows add up to 1; what is next to nothing is not drawn."
)


def attention_line(pattern: AttentionPattern) -> str:
    """Where a head looks from the explained token."""
    seen = ", ".join(f"{word.label} {number(weight)}" for word, weight in pattern.strongest[:3])
    return f"from {pattern.queries[pattern.explained].label} at {seen or 'no token in particular'}"


def memory(known: Memory) -> str:
    """Statistics of a neuron in the run, each beside what is usual."""
    extreme = number(known.extreme, sign=True)
    return (
        f"in the run: strongest {extreme}, excess kurtosis {number(known.kurtosis)} "
        f"(layer median {number(known.usual_kurtosis)})"
    )


def against_line(sheet: Sheet, against: Against) -> str:
    """Where target and foil start and end."""
    return (
        f"log p({sheet.target.word.label}) - log p({against.foil.word.label}): {nats(against.start, 2)} at the "
        f"embedding, {nats(against.total, 2)} at the end"
    )


def switched_line(neuron: Switched) -> str:
    """A neuron, its coefficient, and what it increased."""
    increase = "" if neuron.nats is None else f", increase {nats(neuron.nats)} nats"
    return f"coefficient {number(neuron.coefficient, sign=True)}{increase}"


def correlation_line(sheet: Sheet) -> str:
    """How far accounting and causation agree over what was ablated."""
    ways = dict.fromkeys(f"to {'a ' if part.how == 'value' else ''}{part.how}" for part in sheet.ablated)
    agree = "" if sheet.correlation is None else f"; correlation with leave-one-out {sheet.correlation:.2f}"
    return f"{len(sheet.ablated)} parts ablated ({' and '.join(ways)}){agree}"


def unit(name: str) -> str:
    """The unit under a column's name."""
    return "nats" if name in (*NATS, "chain") else ""
