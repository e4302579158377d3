"""How neurons see a text: in the terminal and as HTML. The words that both share come first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mnemoscope.records import NULLS
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.tracing.traced import NeuronTrace, Reading, Trace, TracedToken, Unusual
from mnemoscope.views import page as html
from mnemoscope.views import words as cards
from mnemoscope.views.terminal import BLUE, ORANGE

_BAR = 8  # cells on each side of zero
FOLLOWED = ("", "token", "coefficient", "deviations", "tail", "gate", "up", "")
FOUND = ("neuron", "coefficient", "deviations", "tail", "by chance")
FOUND_BARE = ("neuron", "coefficient", "written")

_USUAL = (
    "tail: the share of the neuron's own coefficients on the run's text that lie at least as far out, on either side; "
    "deviations: standard deviations from its mean"
)
_UNUSUAL = f"{_USUAL}, which decide between equal tails"
_GATED = "gate, up: the signs of a gated neuron's two branches, whose product is the sign of its coefficient"
_TRIGGER = "as a trigger: at least as far out as the weakest trigger that the run stores of this sign"
_BARE = (
    "Without a run there is no distribution, so usual cannot be told from unusual, and there is no null: ranked by "
    "what is written, |coefficient| x norm of the value."
)


def source_line(trace: Trace) -> str:
    """Where the numbers come from."""
    if trace.run is None:
        return trace.model
    return f"{trace.model} · distributions of {trace.run} on {trace.corpus}, {trace.counted or 0:,} coefficients each"


def notes(trace: Trace) -> list[str]:
    """What the columns mean; of the most unusual neurons also the null to read them against."""
    if trace.neurons:
        readings = [reading for neuron in trace.neurons for reading in neuron.readings]
        known = [_USUAL] if trace.run is not None else []
        known += [_GATED] if any(reading.gate is not None for reading in readings) else []
        return known + ([_TRIGGER] if any(reading.trigger for reading in readings) else [])
    if trace.run is None:
        return [_BARE]
    return [
        _UNUSUAL,
        f"by chance: how many of the {trace.units:,} neurons are as unusual at an ordinary token of the run's text, at "
        "most",
    ]


def shares_line(trace: Trace, position: int) -> str:
    """How many units are beyond the level at a token: neurons, and beside them pseudo-neurons."""
    level = cards.number(trace.level)
    names = {"neuron": "of neurons"} | {kind: f"of {name}" for kind, name in NULLS.items()}
    parts = [
        f"{_percent(shares[position])} {names.get(kind, f'of {kind}')}"
        for kind, shares in trace.shares.items()
        if shares[position] is not None
    ]
    return f"with a tail of at most {level}: {', '.join(parts)}" if parts else ""


def scale_line(neuron: NeuronTrace) -> str:
    """The neuron's own distribution, which the shades are a share of."""
    if neuron.card is None:
        return "shaded by the largest coefficient of this text: there is no run to take a scale from"
    known, number = neuron.card.statistics, cards.number
    line = f"on the run's text: min {number(known.min)}, mean {number(known.mean)}, std {number(known.std)}, max "
    line += number(known.max)
    bounds = [side.threshold for side in (neuron.card.negative, neuron.card.positive) if side.stored]
    shown = " and ".join(number(bound, sign=True) for bound in bounds)
    return f"{line}; stored triggers begin at {shown}" if bounds else line


def writes_lines(neuron: NeuronTrace) -> list[tuple[str, tuple[str, ...]]]:
    """What is written at either sign."""
    return [("promotes when positive", neuron.promotes), ("promotes when negative", neuron.suppresses)]


def reach(neuron: NeuronTrace) -> float:
    """What the darkest shade stands for: the largest |coefficient| of the run, or of the text without one."""
    if neuron.card is None:
        return max((abs(reading.coefficient) for reading in neuron.readings), default=0.0)
    return max(abs(neuron.card.statistics.min or 0.0), abs(neuron.card.statistics.max or 0.0))


def strength(neuron: NeuronTrace, reading: Reading) -> float:
    """|coefficient| as a share of `reach`, at most 1."""
    largest = reach(neuron)
    return min(abs(reading.coefficient) / largest, 1.0) if largest else 0.0


def label(token: TracedToken) -> str:
    """A token on its own: on one line, its spaces visible."""
    return Vocabulary.visible(token.text)


def before_word(token: TracedToken) -> tuple[str, str]:
    """The spaces that a token begins with, and the rest, which has the number above it and is not broken."""
    word = token.text.lstrip(" ")
    return (token.text[: -len(word)], word) if word else ("", token.text)


def followed_cells(trace: Trace, reading: Reading) -> tuple[str, ...]:
    """A token of a followed neuron, in the columns FOLLOWED."""
    token = trace.tokens[reading.position]
    note = "as a trigger" if reading.trigger else ""
    return (
        str(reading.position),
        label(token),
        cards.number(reading.coefficient, sign=True),
        cards.number(reading.deviations, sign=True),
        cards.number(reading.tail),
        _sign(reading.gate),
        _sign(reading.up),
        note if token.counted else "not counted",
    )


def found_cells(trace: Trace, reading: Reading) -> tuple[str, ...]:
    """One of the most unusual, in the columns FOUND, or FOUND_BARE without a run."""
    start = (str(reading.neuron), cards.number(reading.coefficient, sign=True))
    if trace.run is None:
        return (*start, cards.number(reading.size))
    deviations = "" if reading.deviations is None else cards.number(reading.deviations, sign=True)
    return (*start, deviations, cards.number(reading.tail), cards.number(reading.expected))


def _sign(sign: int | None) -> str:
    return "" if sign is None else "> 0" if sign > 0 else "≤ 0"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2g} %"


# -- terminal -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class terminal:  # noqa: N801 - called like a function: trace.terminal(result)
    """A trace for the terminal."""

    trace: Trace

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        trace, width = self.trace, options.max_width
        yield Text(source_line(trace), style="dim")
        for note in notes(trace):
            yield Text(note, style="dim")
        for neuron in trace.neurons:
            yield Text()
            yield from _followed(trace, neuron, width)
        if trace.neurons:
            return
        for token, found in zip(trace.tokens, trace.unusual, strict=True):
            yield Text()
            head = Text(f"{token.position} ", style="dim").append(label(token), style="not dim bold")
            if not token.counted:
                yield head.append("  not counted", style="dim")
                continue
            yield head.append(f"  {shares_line(trace, token.position)}", style="dim")
            yield _found(trace, found, width)


def _followed(trace: Trace, neuron: NeuronTrace, width: int) -> Iterator[RenderableType]:
    yield Text(str(neuron.neuron), style="bold")
    for name, tokens in writes_lines(neuron):
        yield _cut(Text(f"{name}  ", style="dim"), tokens, width)
    yield Text(scale_line(neuron), style="dim")
    line = Text()
    for token, reading in zip(trace.tokens, neuron.readings, strict=True):
        line.append(token.text, style=_shade(neuron, reading) if token.counted else "dim")
    yield Padding(line, (1, 0))
    gated = any(reading.gate is not None for reading in neuron.readings)
    table = _table(FOLLOWED, (1, 7), () if gated else (5, 6))
    table.add_column("")
    for reading in neuron.readings:
        cells = followed_cells(trace, reading)
        shown = [cell for place, cell in enumerate(cells) if gated or place not in (5, 6)]
        table.add_row(*map(Text, shown), _bar(strength(neuron, reading), reading.coefficient))
    yield table


def _table(names: tuple[str, ...], left: tuple[int, ...], without: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(names):
        if place not in without:
            table.add_column(name, justify="left" if place in left else "right", no_wrap=place not in left)
    return table


def _found(trace: Trace, found: Sequence[Unusual], width: int) -> Table:
    table = _table(FOUND_BARE if trace.run is None else FOUND, (0,))
    table.columns[0].min_width = len("L29N1535")
    table.add_column("promotes here", ratio=1, no_wrap=True)
    for one in found:
        style = ORANGE if one.reading.coefficient > 0 else BLUE
        name, size, *rest = found_cells(trace, one.reading)
        room = width - (50 if trace.run is not None else 32)
        words = _cut(Text(), one.writes, room)
        table.add_row(Text(name), Text(size, style=style), *map(Text, rest), words)
    return table


def _cut(line: Text, tokens: tuple[str, ...], width: int) -> Text:
    """As many whole tokens as fit."""
    for place, token in enumerate(tokens):
        piece = f"{' | ' if place else ''}{token}"
        if line.cell_len + len(piece) > width:
            break
        line.append(piece)
    return line


def _shade(neuron: NeuronTrace, reading: Reading) -> str:
    part = strength(neuron, reading)
    colour = ORANGE if reading.coefficient > 0 else BLUE
    return f"bold reverse {colour}" if part >= 0.5 else f"underline {colour}" if part >= 0.1 else ""


def _bar(part: float, coefficient: float) -> Text:
    """A bar to the left for what is negative, to the right for what is positive, around a line at zero."""
    cells = round(part * _BAR)
    left, right = (cells, 0) if coefficient < 0 else (0, cells)
    bar = Text(" " * (_BAR - left)).append("█" * left, style=BLUE).append("│", style="dim")
    return bar.append("█" * right, style=ORANGE)


# -- HTML ---------------------------------------------------------------------------------------------------


def fragment(trace: Trace) -> str:
    """A trace with its style, to be put into another page: what a notebook displays."""
    return _render("trace_fragment.html", trace)


def page(trace: Trace) -> str:
    """A trace as a whole page that needs nothing else."""
    return _render("trace_page.html", trace)


def _render(template: str, trace: Trace) -> str:
    lines = [
        (token, found, shares_line(trace, token.position))
        for token, found in zip(trace.tokens, trace.unusual, strict=not trace.neurons)
    ]
    return (
        html.environment()
        .get_template(template)
        .render(
            trace=trace,
            lines=lines,
            source=source_line(trace),
            notes=notes(trace),
            followed=FOLLOWED,
            found=FOUND_BARE if trace.run is None else FOUND,
            scale_line=scale_line,
            label=label,
            before_word=before_word,
            writes_lines=writes_lines,
            strength=strength,
            followed_cells=followed_cells,
            found_cells=found_cells,
        )
    )
