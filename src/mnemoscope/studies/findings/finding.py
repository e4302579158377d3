"""What an analysis of the study hands to its views: a sentence, the numbers behind it, and how to draw them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import polars as pl

STATES = ("done", "not applicable")


@dataclass(frozen=True)
class Item:
    """One analysis of the papers or of the objections to them.

    state    done, or not applicable
    command  how to get it, of RUN (a folder) and MODEL (a name); empty if not applicable
    test     the test file that holds it to its definition; empty if not applicable
    why      why it is not applicable, or what is different here; may be empty
    """

    id: str
    title: str
    state: str
    command: str
    test: str
    why: str


def items() -> tuple[Item, ...]:
    """All of them, A1 to A80."""
    text = (files("mnemoscope.studies.findings") / "items.jsonl").read_text(encoding="utf-8")
    return tuple(Item(**json.loads(line)) for line in text.splitlines())


KINDS = ("line", "bar", "stack", "box", "scatter", "heat", "histogram")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ITEM = re.compile(r"A([1-9]|[1-7][0-9]|80)")
_COLUMNS = (
    "x", "x2", "y", "color", "low", "high", "whisker_low", "whisker_high", "null", "null_low", "null_high", "facet",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """How to draw a frame in long form; everything named is one of its columns unless said otherwise.

    kind       line, bar, stack (bars that add up), box, scatter, heat, or histogram (bars from x to x2)
    x, y       what stands on the axes; in a box y is the median
    x_title    with the unit, and likewise y_title (text, not columns)
    color      the series; in a heat map the number that is shaded
    low, high  interval of y; in a box the quartiles, and the whiskers are whisker_low and whisker_high
    null       the base line of each point, null_low to null_high its band
    facet      one panel for each value; `free` panels have y scales of their own
    share      y (in a heat map the colour) is a share of 1, shown in percent
    order      series from first to last (text); the order of their first rows if empty
    rest       the series (text) that is what the others leave, drawn in grey; empty if there is none
    """

    kind: str
    x: str
    y: str
    x_title: str
    y_title: str
    color: str | None = None
    low: str | None = None
    high: str | None = None
    null: str | None = None
    null_low: str | None = None
    null_high: str | None = None
    whisker_low: str | None = None
    whisker_high: str | None = None
    x2: str | None = None
    facet: str | None = None
    free: bool = False
    log_x: bool = False
    log_y: bool = False
    share: bool = False
    order: tuple[str, ...] = ()
    rest: str = ""

    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return tuple(dict.fromkeys(name for field in _COLUMNS if (name := getattr(self, field)) is not None))


_NULL = {"null": "null", "null_low": "null_low", "null_high": "null_high"}
_INTERVAL = {"low": "low", "high": "high"} | _NULL
_QUARTILES = {"low": "quarter", "high": "three_quarters"}
_WHISKERS = {"whisker_low": "low", "whisker_high": "high"}


def line(
    frame: pl.DataFrame, y_title: str, x: str = "layer", y: str = "value", x_title: str = "layer", **more: Any
) -> Figure:
    """Lines with the intervals and nulls of the frame: its columns `low`, `high`, `null`, `null_low`, `null_high`.

    A column that has no number draws nothing; any role can be given another column, or None.
    """
    return Figure("line", x, y, x_title, y_title, **_roles(frame, _INTERVAL) | more)


def bar(
    frame: pl.DataFrame, y_title: str, x: str, y: str = "value", x_title: str = "", **more: Any
) -> Figure:
    """Bars, with intervals and nulls as in `line`."""
    return Figure("bar", x, y, x_title, y_title, **_roles(frame, _INTERVAL) | more)


def box(frame: pl.DataFrame, y_title: str, **more: Any) -> Figure:
    """Boxes by layer of `median`, `quarter`, `three_quarters`, whiskers from `low` to `high`, and the null's band."""
    return Figure(
        "box", "layer", "median", "layer", y_title, **_QUARTILES | _WHISKERS | _roles(frame, _NULL) | more
    )


def stack(y_title: str, x_title: str = "layer", y: str = "value", **more: Any) -> Figure:
    """Bars by layer that add up."""
    return Figure("stack", "layer", y, x_title, y_title, **more)


def _roles(frame: pl.DataFrame, roles: dict[str, str]) -> dict[str, Any]:
    return {
        role: name
        for role, name in roles.items()
        if name in frame.columns and frame[name].null_count() < frame.height
    }


class Difference(NamedTuple):
    """A figure less its null, that a headline may be made of (`headlines.txt`); NaN where there is no interval.

    key  what it is called in its finding
    n    the units that were resampled
    """

    key: str
    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, key: str, figures: Iterable[float | None], n: int) -> Difference:
        """From value, low and high; None is not defined."""
        value, low, high = (float("nan") if figure is None else figure for figure in figures)
        return cls(key, value, low, high, n)


@dataclass(frozen=True)
class Finding:
    """One answer of the study.

    id         names the files of its figure and table: lower case, with hyphens
    items      which analyses it answers: `A21`, ...
    says       one sentence, computed from the data, with the figure that matters and its interval
    frame      the long table behind the figure, without nested columns
    paper      what the paper printed, for its own model; empty if nothing
    null       what the base line or the band is; empty if there is none
    resampled  what the intervals are over: `documents`, `neurons (Wilson)`, ...; empty if there are none
    notes      what a reader must know besides
    contrasts  figures less their nulls, for the headline
    """

    id: str
    items: tuple[str, ...]
    title: str
    says: str
    frame: pl.DataFrame
    figure: Figure | None = None
    paper: str = ""
    null: str = ""
    resampled: str = ""
    notes: tuple[str, ...] = ()
    contrasts: tuple[Difference, ...] = ()

    def __post_init__(self) -> None:
        assert _SLUG.fullmatch(self.id), self.id
        assert self.items and all(_ITEM.fullmatch(item) for item in self.items), self.items
        assert self.says and "\n" not in self.says, self.says
        nested = [name for name, kind in self.frame.schema.items() if kind.is_nested()]
        assert not nested, (self.id, nested)
        if self.figure is not None:
            assert self.figure.kind in KINDS, self.figure.kind
            missing = set(self.figure.columns()) - set(self.frame.columns)
            assert not missing, (self.id, missing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the frame as rows."""
        plain = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("frame", "figure", "items", "notes", "contrasts")
        }
        contrasts = [
            {name: None if value != value else value for name, value in contrast._asdict().items()}
            for contrast in self.contrasts
        ]
        lists = {"items": list(self.items), "notes": list(self.notes), "contrasts": contrasts}
        return {**plain, **lists, "rows": self.frame.to_dicts()}


def chance(value: float) -> str:
    """A probability in two digits: 0.46, 0.0012, 2e-5."""
    return f"{value:.2g}".replace("e-0", "e-")


def bracketed(value: float, low: float, high: float, form: str = ".1%") -> str:
    """`12.3% [11.0%, 13.9%]`: a number with its interval, each in the given format."""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def of_row(row: Mapping[str, Any], form: str = ".1%") -> str:
    """The `share` of a row with its `low` and `high`; without these, how many units were too few for an interval."""
    if row["low"] is None or row["high"] is None:
        return f"{row['share']:{form}} (no interval: n = {row['n']})"
    return bracketed(row["share"], row["low"], row["high"], form)


def went(start: float, stop: float) -> str:
    """What a number did on its way: rises, falls or stays."""
    return "rises" if stop > start else "falls" if stop < start else "stays"


def slug(name: str) -> str:
    """A name as a part of an `id`."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split()) or "set"


@dataclass(frozen=True)
class Section:
    """Findings of one measurement, under one heading.

    missing  why there are none, and how to come by them; empty if there are
    """

    name: str
    title: str
    findings: tuple[Finding, ...]
    missing: str = ""
