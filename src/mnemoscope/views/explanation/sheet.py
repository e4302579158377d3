"""An explanation as plain values: what terminal, notebook and page all draw, in the order they draw it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mnemoscope.neuron.card import Example

STREAM_OF_UNITS = "stream of units"  # what units of the residual stream stand for, in the account
INCREASE, LEFT_OUT, ABLATED = "increase", "leave-one-out", "ablated"
ROUTER = "router weight"
NATS = (INCREASE, LEFT_OUT, ABLATED)  # columns that share one unit and one scale
_PART = re.compile(r"L\d+[HN]\d+")


@dataclass(frozen=True)
class Word:
    """A token as a reader sees it: its label, whitespace visible, and where it stands in the prompt."""

    label: str
    position: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A token that could come next.

    given  the label of the text that was asked for, where this token is only its beginning
    """

    word: Word
    probability: float
    rank: int | None = None
    given: str | None = None

    @property
    def name(self) -> str:
        """The token, and the text it stands for: ·B of ·Bordeaux."""
        return f"{self.word.label} of {self.given}" if self.given else self.word.label


@dataclass(frozen=True)
class PromptToken:
    """A token of the prompt in running text, and what all attention together brought from it (nats)."""

    text: str
    position: int
    nats: float
    strength: float  # |nats| as a share of the largest
    explained: bool  # whether the prediction is of what follows it, or of what it masks


@dataclass(frozen=True)
class Sum:
    """A line of the account: from `start` to `stop` on the way from no information to log p (nats)."""

    name: str
    nats: float
    start: float
    stop: float


@dataclass(frozen=True)
class Point:
    """log p of the target and of the foils at one point of the stream (nats); `step` is what led to it."""

    name: str
    layer: int
    step: str  # embedding | attention | FFN
    log_probability: float
    rank: int
    foils: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """What the attention or the FFN of one layer added (nats)."""

    layer: int
    part: str  # attention | FFN
    nats: float

    @property
    def name(self) -> str:
        """Short: ATTN12, FFN24."""
        return f"{'ATTN' if self.part == 'attention' else 'FFN'}{self.layer}"


@dataclass(frozen=True)
class Memory:
    """What a run knows of a neuron: its strongest triggers with the sign of the coefficient here."""

    kurtosis: float | None
    usual_kurtosis: float | None
    extreme: float | None  # the largest coefficient of that sign in the run
    triggers: tuple[Example, ...]


@dataclass(frozen=True)
class Part:
    """A row: a head and its source, a neuron, a source, or (with `kind` other than "part") a closing line."""

    name: str
    values: Mapping[str, float | None]
    word: Word | None = None
    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()
    memory: Memory | None = None
    kind: str = "part"  # part | bias | rest | total


@dataclass(frozen=True)
class Ledger:
    """Rows with the same columns, sorted; the closing rows say what is not shown and what all add up to.

    skipped  index of the first row after the gap between the largest and the most negative, if there is one
    """

    columns: tuple[str, ...]
    parts: tuple[Part, ...]
    closing: tuple[Part, ...]
    skipped: int | None = None

    @property
    def rows(self) -> tuple[Part, ...]:
        """Everything, closing rows last."""
        return self.parts + self.closing

    @property
    def reach(self) -> float:
        """The largest size of a part in nats: the scale of all bars of the table."""
        sizes = [abs(part.values.get(name) or 0.0) for part in self.parts for name in NATS]
        return max(sizes, default=0.0)


@dataclass(frozen=True)
class Against:
    """Target against one foil; everything in nats of log p(target) - log p(foil)."""

    foil: Candidate
    start: float
    total: float
    steps: tuple[Step, ...]
    heads: Ledger
    sources: Ledger
    neurons: Ledger


@dataclass(frozen=True)
class Cause:
    """One earlier vector's share in a neuron's coefficient; `nats` is the neuron's increase, shared alike."""

    name: str
    word: Word | None
    share: float
    nats: float | None
    gate: float | None
    up: float | None
    inner: float | None
    kind: str


@dataclass(frozen=True)
class Switched:
    """A neuron and what switched it on: the largest shares, and last what is not shown."""

    name: str
    coefficient: float
    nats: float | None
    causes: tuple[Cause, ...]

    @property
    def gated(self) -> bool:
        """Whether its coefficient has two branches."""
        return any(cause.up is not None for cause in self.causes)

    def shortened(self, count: int) -> tuple[Cause, ...]:
        """The `count` largest causes, and all others (the remainder among them) added up to one."""
        named = [cause for cause in self.causes if cause.kind != "remainder"]
        named.sort(key=lambda cause: -abs(cause.share))
        rest = [*named[count:], *(cause for cause in self.causes if cause.kind == "remainder")]
        return (*named[:count], _together(rest)) if rest else tuple(named)


@dataclass(frozen=True)
class Carried:
    """What one vector at the source has to do with what attention carried from there (nats)."""

    point: str
    recomputed: float
    fixed: float


@dataclass(frozen=True)
class Cargo:
    """Where the best attention sub-value got what it carries (A53, A54)."""

    layer: int
    source: Word
    points: tuple[Carried, ...]


@dataclass(frozen=True)
class Ablated:
    """One true ablation beside the accounts of the same part (nats)."""

    name: str
    word: Word | None
    kind: str  # neuron | head
    how: str
    increase: float | None
    left_out: float | None
    effect: float


@dataclass(frozen=True)
class Grid:
    """Leave-one-out of heads x source tokens, in nats.

    tokens    of the prompt
    together  how many the last column adds up; 0 if it is a token like the others
    """

    heads: tuple[str, ...]
    words: tuple[Word, ...]
    cells: tuple[tuple[float, ...], ...]  # a row for each head
    tokens: int
    together: int = 0


@dataclass(frozen=True)
class AttentionPattern:
    """Where a head looks: from each of some tokens (rows) to others (columns).

    explained  the row that is explained
    cells      row, column and weight of what can be seen
    """

    name: str
    queries: tuple[Word, ...]
    sources: tuple[Word, ...]
    explained: int
    cells: tuple[tuple[int, int, float], ...]

    @property
    def strongest(self) -> list[tuple[Word, float]]:
        """The sources of the explained row, with the largest weight first."""
        row = [(self.sources[column], weight) for at, column, weight in self.cells if at == self.explained]
        return sorted(row, key=lambda pair: -pair[1])


@dataclass(frozen=True)
class Sheet:
    """All that a reader is shown of one prediction."""

    title: str
    headline: str
    about: str
    tokens: tuple[PromptToken, ...]
    encoded: int  # the first of these, which an encoder has read and the others only look at
    unread: str  # what of the prompt comes after the explained position
    right_to_left: bool
    target: Candidate
    foils: tuple[Candidate, ...]
    predictions: tuple[Candidate, ...]
    log_probability: float
    account: tuple[Sum, ...]
    stream: tuple[Point, ...]
    steps: tuple[Step, ...]
    total: float
    remainder: float
    grid: Grid
    attention: tuple[AttentionPattern, ...]
    heads: Ledger
    neurons: Ledger
    against: tuple[Against, ...]
    switched: tuple[Switched, ...]
    cargo: Cargo | None
    ablated: tuple[Ablated, ...]
    correlation: float | None
    parallel: bool
    masked: bool  # an encoder's: of the token at the masked place, and not of the one that follows
    notes: tuple[str, ...]
    method: tuple[str, ...]
    command: str


def _together(causes: Sequence[Cause]) -> Cause:
    """What is not shown, added up; unknown where nothing is known."""

    def total(name: str) -> float | None:
        known = [value for value in (getattr(cause, name) for cause in causes) if value is not None]
        return math.fsum(known) if known else None

    share = math.fsum(cause.share for cause in causes)
    nats, gate, up, inner = map(total, ("nats", "gate", "up", "inner"))
    return Cause("not shown", None, share, nats, gate, up, inner, "remainder")


def largest(steps: Sequence[Step], count: int) -> tuple[list[Step], list[Step]]:
    """The steps that added most and those that removed most, at most `count` of each."""
    ranked = sorted(steps, key=lambda step: -step.nats)
    up = [step for step in ranked[:count] if step.nats > 0]
    down = [step for step in reversed(ranked[-count:]) if step.nats < 0]
    return up, down


# -- Addresses on a page: each neuron and each head has one, where it stands first ---------------------------


def anchor(part: Part | Cause | Switched) -> str:
    """L24N1005, L23H4-from-3 for a head and one of its sources; empty for what is neither."""
    if not _PART.fullmatch(part.name):
        return ""
    word = getattr(part, "word", None)
    return part.name if word is None or word.position is None else f"{part.name}-from-{word.position}"


class Places:
    """The addresses of one page, which are given in the order in which its rows are drawn.

    prefix  before every address: empty on a page, an own word for each explanation of a notebook
    """

    def __init__(self, page: Sheet, prefix: str = "") -> None:
        self.prefix = prefix
        tables: list[Sheet | Against] = [page, *page.against]
        rows = [part for table in tables for part in (*table.heads.parts, *table.neurons.parts)]
        self._known = {anchor(part) for part in rows} | {
            f"switched-{neuron.name}" for neuron in page.switched
        }
        self._known |= {f"attention-{pattern.name}" for pattern in page.attention}
        self._free = {anchor(part) for part in rows} | {part.name for part in rows}
        self._free.discard("")

    def has(self, id: str) -> bool:
        """Whether something on the page has this address."""
        return id in self._known

    def take(self, part: Part) -> tuple[str, str]:
        """The address of a row and that of its head alone, each if no row before has it; else empty."""
        row, head = anchor(part), part.name
        row_id, head_id = (id if id in self._free else "" for id in (row, head if head != row else ""))
        self._free -= {row_id, head_id}
        return row_id, head_id
