"""How neurons see a text: in the terminal and as HTML. The words that both share come first."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mnemoscope.records import NULLS
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.tracing.traced import NeuronReading, NeuronTrace, Trace, TracedToken, Unusual
from mnemoscope.views import words
from mnemoscope.views.page import environment
from mnemoscope.views.terminal import BLUE, ORANGE, Fitted, listed, sign_style, table

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
_ROUTED = "not routed: the router sent the token to other experts, and the neuron did not run"
_BARE = (
    "Without a run there is no distribution, so usual cannot be told from unusual, and there is no null: ranked by "
    "what is written, |coefficient| x norm of the value."
)


def source_line(trace: Trace) -> str:
    """Where the numbers come from."""
    if trace.run is None:
        return trace.model
    each = f"{'at most ' if trace.routed else ''}{trace.counted or 0:,} coefficients each"
    return f"{trace.model} · distributions of {trace.run} on {trace.corpus}, {each}"


def notes(trace: Trace) -> list[str]:
    """What the columns mean; of the most unusual neurons also the null to read them against."""
    if trace.neurons:
        readings = [reading for neuron in trace.neurons for reading in neuron.readings]
        said = {
            _USUAL: trace.run is not None,
            _GATED: any(reading.gate is not None for reading in readings),
            _TRIGGER: any(reading.trigger for reading in readings),
            _ROUTED: any(reading.coefficient is None for reading in readings),
        }
        return [*_stacks(trace), *(note for note, holds in said.items() if holds)]
    if trace.run is None:
        return [*_stacks(trace), _BARE]
    who = f"{trace.units:,} neurons{' that run there' if trace.routed else ''}"
    if trace.encoded is not None:
        who = f"{trace.units:,} neurons of the encoder, or {trace.encoded.decoder_units:,} of the decoder,"
    return [
        *_stacks(trace),
        _UNUSUAL,
        f"by chance: how many of the {who} are as unusual at an ordinary token of the run's text, at most",
    ]


def _stacks(trace: Trace) -> list[str]:
    """Which tokens the encoder of an encoder-decoder reads, and which its decoder."""
    if trace.encoded is None:
        return []
    first, layers = trace.encoded.tokens, trace.encoded.layers
    return [
        f"the encoder (layers 0 to {layers - 1}) reads tokens 0 to {first - 1}, and the decoder those from {first} on, "
        "with what the encoder made of the others"
    ]


def shares_line(trace: Trace, position: int) -> str:
    """How many units are beyond the level at a token: neurons, and beside them pseudo-neurons."""
    level = words.number(trace.level)
    names = {"neuron": "of neurons"} | {kind: f"of {name}" for kind, name in NULLS.items()}
    units = [
        f"{_percent(shares[position])} {names.get(kind, f'of {kind}')}"
        for kind, shares in trace.shares.items()
        if shares[position] is not None
    ]
    return f"with a tail of at most {level}: {', '.join(units)}" if units else ""


def scale_line(neuron: NeuronTrace) -> str:
    """The neuron's own distribution, which the shades are a share of."""
    if neuron.card is None:
        return "shaded by the largest coefficient of this text: there is no run to take a scale from"
    known, number = neuron.card.statistics, words.number
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
        return max((abs(reading.coefficient or 0.0) for reading in neuron.readings), default=0.0)
    return max(abs(neuron.card.statistics.min or 0.0), abs(neuron.card.statistics.max or 0.0))


def strength(neuron: NeuronTrace, reading: NeuronReading) -> float:
    """|coefficient| as a share of `reach`, at most 1."""
    largest = reach(neuron)
    return min(abs(reading.coefficient or 0.0) / largest, 1.0) if largest else 0.0


def label(token: TracedToken) -> str:
    """A token on its own: on one line, its spaces visible."""
    return Vocabulary.visible(token.text)


def before_word(token: TracedToken) -> tuple[str, str]:
    """The spaces that a token begins with, and the rest, which has the number above it and is not broken."""
    word = token.text.lstrip(" ")
    return (token.text[: -len(word)], word) if word else ("", token.text)


def followed_cells(trace: Trace, reading: NeuronReading) -> tuple[str, ...]:
    """A token of a followed neuron, in the columns FOLLOWED."""
    token = trace.tokens[reading.position]
    router = "" if reading.weight in (None, 1.0) else f"router {words.number(reading.weight)}"
    said = (router, "as a trigger" if reading.trigger else "")
    note = "not routed" if reading.coefficient is None else ", ".join(filter(None, said))
    return (
        str(reading.position),
        label(token),
        words.number(reading.coefficient, sign=True),
        words.number(reading.deviations, sign=True),
        words.number(reading.tail),
        _sign(reading.gate),
        _sign(reading.up),
        note if token.counted else "not counted",
    )


def found_cells(trace: Trace, reading: NeuronReading) -> tuple[str, ...]:
    """One of the most unusual, in the columns FOUND, or FOUND_BARE without a run."""
    start = (str(reading.neuron), words.number(reading.coefficient, sign=True))
    if trace.run is None:
        return (*start, words.number(reading.size))
    deviations = "" if reading.deviations is None else words.number(reading.deviations, sign=True)
    return (*start, deviations, words.number(reading.tail), words.number(reading.expected))


def _sign(sign: int | None) -> str:
    return "" if sign is None else "> 0" if sign > 0 else "≤ 0"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2g} %"


# -- terminal -----------------------------------------------------------------------------------------------


def terminal(trace: Trace) -> Fitted:
    """A trace for the terminal."""
    return Fitted(lambda room: _lines(trace, room.width))


def _lines(trace: Trace, width: int) -> Iterator[RenderableType]:
    yield Text(source_line(trace), style="dim")
    for note in notes(trace):
        yield Text(note, style="dim")
    for neuron in trace.neurons:
        yield Text()
        yield from _followed(trace, neuron, width)
    if trace.neurons:
        return
    for token, unusual in zip(trace.tokens, trace.unusual, strict=True):
        yield Text()
        head = Text(f"{token.position} ", style="dim").append(label(token), style="not dim bold")
        if not token.counted:
            yield head.append("  not counted", style="dim")
            continue
        yield head.append(f"  {shares_line(trace, token.position)}", style="dim")
        yield _unusual(trace, unusual, width)


def _followed(trace: Trace, neuron: NeuronTrace, width: int) -> Iterator[RenderableType]:
    yield Text(str(neuron.neuron), style="bold")
    for name, tokens in writes_lines(neuron):
        yield listed(Text(f"{name}  ", style="dim"), tokens, width)
    yield Text(scale_line(neuron), style="dim")
    line = Text()
    for reading in neuron.readings:
        token = trace.tokens[reading.position]
        line.append(token.text, style=_shade(neuron, reading) if token.counted else "dim")
    yield Padding(line, (1, 0))
    gated = any(reading.gate is not None for reading in neuron.readings)
    shown = [index for index in range(len(FOLLOWED)) if gated or FOLLOWED[index] not in ("gate", "up")]
    rows = (
        (
            *(Text(cells[index]) for index in shown),
            _bar(strength(neuron, reading), reading.coefficient or 0.0),
        )
        for reading in neuron.readings
        for cells in [followed_cells(trace, reading)]
    )
    names = [*(FOLLOWED[index] for index in shown), ""]
    yield table(names, rows, left=(1, len(names) - 2, len(names) - 1), gap=1)


def _unusual(trace: Trace, unusual: Sequence[Unusual], width: int) -> Table:
    room = width - (50 if trace.run is not None else 32)
    rows = []
    for neuron in unusual:
        name, size, *rest = found_cells(trace, neuron.reading)
        coefficient = Text(size, style=sign_style(neuron.reading.coefficient or 0.0))
        rows.append((Text(name), coefficient, *map(Text, rest), listed(Text(), neuron.writes, room)))
    names = FOUND_BARE if trace.run is None else FOUND
    drawn = table((*names, "promotes here"), rows, left=(0, len(names)), wraps=(0,), gap=1)
    drawn.columns[0].min_width = len("L29N1535")
    drawn.columns[-1].ratio = 1
    return drawn


def _shade(neuron: NeuronTrace, reading: NeuronReading) -> str:
    shade, colour = strength(neuron, reading), sign_style(reading.coefficient or 0.0)
    return f"bold reverse {colour}" if shade >= 0.5 else f"underline {colour}" if shade >= 0.1 else ""


def _bar(share: float, coefficient: float) -> Text:
    """A bar to the left for what is negative, to the right for what is positive, around a line at zero."""
    cells = round(share * _BAR)
    left, right = (cells, 0) if coefficient < 0 else (0, cells)
    bar = Text(" " * (_BAR - left)).append("█" * left, style=BLUE).append("│", style="dim")
    return bar.append("█" * right, style=ORANGE)


# -- HTML ---------------------------------------------------------------------------------------------------


def fragment(trace: Trace) -> str:
    """A trace with its style, to be put into another page: what a notebook displays."""
    # A notebook holds several: the same addresses must not be there twice.
    return _render(
        "trace_fragment.html", trace, f"mn{zlib.crc32(f'{trace.model} {trace.text}'.encode()):08x}-"
    )


def page(trace: Trace) -> str:
    """A trace as a whole page that needs nothing else."""
    return _render("trace_page.html", trace)


def _render(template: str, trace: Trace, prefix: str = "") -> str:
    lines = [
        (token, unusual, shares_line(trace, token.position))
        for token, unusual in zip(trace.tokens, trace.unusual, strict=not trace.neurons)
    ]
    return (
        environment()
        .get_template(template)
        .render(
            trace=trace,
            prefix=prefix,
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
