"""What a run knows of a neuron's patterns: claims that were tested, with all that a reader needs to judge them.

Clearest is the largest lower end of the interval of F1: a figure that few documents or a common pattern cannot win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.intervals import ratio
from mnemoscope.neuron import twoway
from mnemoscope.neuron.twoway import NONE, Curve, Rule
from mnemoscope.records import MAIN, NEURON, NEXT, POSITION, WHOLE, Cells, ExpertNeuronId

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

ADDRESS = ["layer", "neuron"]
BANDS = (0.001, 0.01, 0.1, 0.5, 1.0)  # of the tokens, from the largest scores down (A71)
WRITE = 0.99  # quantile of |m| |v| over a layer that counts as a large write
PREFIX = (MAIN, WHOLE)  # families of tests of the prefix
QUADRANTS = ("gate > 0, up > 0", "gate > 0, up < 0", "gate < 0, up > 0", "gate < 0, up < 0")


@dataclass(frozen=True)
class Share:
    """A figure with its 95 % interval over documents; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LayerNull:
    """F1 of pseudo-neurons `of` a layer or an expert, each with the best pattern that it has; 0 where it has none."""

    kind: str
    units: int
    median: float
    high: float  # the 99th percentile
    of: str = "layer"


@dataclass(frozen=True)
class CurvePoint:
    """A place on the curve: where active begins (a magnitude), the share of tokens beyond, and what follows."""

    threshold: float
    active: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Band:
    """Tokens between two quantiles of the score: how many of them show the pattern."""

    name: str
    tokens: int
    shown: float


@dataclass(frozen=True)
class Definition:
    """What "active" might mean, and the verdict under that meaning, from the figures themselves without intervals."""

    name: str
    threshold: float | None
    active: float
    precision: float | None
    recall: float | None
    f1: float | None
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One pattern of one neuron and polarity, tested both ways; the fields are columns of `pattern_tests`.

    tokens       of the text that was read; of a neuron of an expert, those that were routed to it
    baselines    F1 of other explanations of the same activity, by name
    neurons      of the layer, or of the expert (`among`), with which it is compared
    nulls        what pseudo-neurons of the layer reach, or of the expert where it alone was asked
    decoy_...    what decoys of the neuron reach, and the rate of false discoveries at which it beats them; None without
    curve        thresholds ascending; bands from the largest scores down
    definitions  the chosen threshold first
    """

    polarity: int
    tests: str
    name: str
    spec: str
    family: str
    kind: str
    threshold: float
    tokens: int
    documents: int
    active: int
    present: int
    both: int
    precision: Share
    recall: Share
    f1: Share
    iou: float
    auprc: float | None
    pearson: float | None
    mutual_information: float
    baselines: Mapping[str, float]
    specificity_rank: int | None
    specificity_null: float | None
    neurons: int
    q: float
    decoy_f1_low: float | None
    decoy_q: float | None
    verdict: str
    nulls: tuple[LayerNull, ...]
    curve: tuple[CurvePoint, ...]
    bands: tuple[Band, ...]
    definitions: tuple[Definition, ...]
    among: str = "layer"  # or "expert"


def within(run: Run, name: str, layer: int | None) -> pl.LazyFrame:
    """A table of a run, or the rows of one layer of it; `QueryError` if there is no such layer."""
    table = run.table(name)
    return table if layer is None else table.filter(pl.col("layer") == run.address(layer, 0).layer)


def has_patterns(run: Run) -> bool:
    """Whether patterns were looked for."""
    return "pattern_tests" in run.manifest.tables


def claims(run: Run, layer: int, neuron: int) -> tuple[Claim, ...]:
    """The tested claims of a neuron; none if it has no candidate.

    Those of the prefix come first, what has a verdict before what has none, then by F1. What triggers and the whole
    distribution both say is there once.
    """
    rows = run.rows("pattern_tests", layer, neuron).filter(pl.col("unit") == NEURON)
    if not len(rows):
        return ()
    calibration = run.table("calibration").filter(pl.col("layer") == layer).collect()
    statistics = run.rows("neurons", layer, neuron).row(0, named=True)
    tested = [of_row(run, row, calibration, statistics) for row in rows.iter_rows(named=True)]
    tested.sort(key=lambda claim: (_order(claim), claim.verdict == twoway.NONE, -(claim.f1.value or 0)))
    distinct: dict[tuple[object, ...], Claim] = {}
    for claim in tested:
        distinct.setdefault((claim.polarity, claim.spec, _order(claim)), claim)
    return tuple(distinct.values())


def _order(claim: Claim) -> tuple[bool, str]:
    return claim.tests not in PREFIX, "" if claim.tests in PREFIX else claim.tests


def of_row(
    run: Run,
    row: Mapping[str, Any],
    calibration: pl.DataFrame,
    statistics: Mapping[str, Any],
    own_nulls: bool = False,
) -> Claim:
    """A row of `pattern_tests` with what it is to be read against.

    calibration  rows of the layer; `own_nulls`: of the neuron's expert alone
    statistics   the neuron's row of `neurons`
    """
    options = run.manifest.options
    asked = options.get("patterns", asdict(Rule()))
    rule = Rule(asked["least"], asked["q"], asked["fdr"])
    edges = np.array([-np.inf, *options["histogram_edges"], np.inf])
    neurons, among = _beside(run.manifest.model.cells, statistics["layer"], statistics["neuron"])
    polarity, nulls = row["polarity"], nulls_of(calibration, row["tests"], among if own_nulls else "layer")
    counts = [np.array(row[f"counts_{presence}"], np.int64) for presence in ("present", "absent")]
    curve = Curve(*(twoway.oriented(bins, polarity) for bins in counts))
    level = max((null.high for null in nulls), default=0.0)
    judge = _Judge(Curve(*counts), curve, edges[:-1], polarity, level, row["q"], rule)
    write = calibration.filter((pl.col("measure") == "write") & (pl.col("unit") == NEURON))
    reach = abs(statistics["max"] if polarity > 0 else statistics["min"])
    fields = ("spec", "name", "family", "kind", "tests", "polarity", "threshold", "tokens", "documents", "active",
              "present", "both", "iou", "auprc", "pearson", "mutual_information", "specificity_rank",
              "specificity_null", "q", "decoy_f1_low", "decoy_q", "verdict")  # fmt: skip
    share = lambda name: Share(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))  # noqa: E731
    baselines = {name: row[f"baseline_{name}"] for name in ("constant", "random", "token", "other")}
    return Claim(
        **{name: row[name] for name in fields},
        precision=share("precision"),
        recall=share("recall"),
        f1=share("f1"),
        baselines={name: value for name, value in baselines.items() if value is not None},
        neurons=neurons,
        among=among,
        nulls=nulls,
        curve=_points(curve, edges[:-1]),
        bands=_bands(curve),
        definitions=tuple(_definitions(judge, row, reach, statistics["value_norm"], write)),
    )  # fmt: skip


def _beside(cells: Cells, layer: int, neuron: int) -> tuple[int, str]:
    """How many neurons run where a neuron does, itself among them, and what they are of: its layer, or its expert."""
    address = cells.id(layer, neuron)
    if not isinstance(address, ExpertNeuronId):
        return cells.sizes[layer], "layer"
    count, width = cells.experts[layer]
    return width if address.expert < count else cells.sizes[layer] - count * width, "expert"


def nulls_of(calibration: pl.DataFrame, tests: str, of: str = "layer") -> tuple[LayerNull, ...]:
    """The nulls of one layer, or of what it is called, and family of tests."""
    rows = calibration.filter((pl.col("measure") == f"f1 of {tests}") & (pl.col("unit") != NEURON)).sort(
        "unit"
    )
    return tuple(
        LayerNull(
            row["unit"],
            row["count"],
            row["values"][row["levels"].index(0.5)],
            row["values"][row["levels"].index(twoway.NULL_LEVEL)],
            of,
        )
        for row in rows.iter_rows(named=True)
    )


def _points(curve: Curve, edges: np.ndarray) -> tuple[CurvePoint, ...]:
    """Positive thresholds that some token reaches, each once where nothing changes between."""
    places = np.arange(len(edges) // 2 + 1, len(edges))
    active = curve.active[places]
    places = places[(active > 0) & (np.diff(active, append=0) != 0)]
    shares = curve.active / np.maximum(curve.tokens, 1)
    columns = [column[places] for column in (edges, shares, curve.precision, curve.recall, curve.f1)]
    return tuple(CurvePoint(*map(float, np.nan_to_num(point))) for point in zip(*columns, strict=True))


def _bands(curve: Curve) -> tuple[Band, ...]:
    """Presence between quantiles of the score, as far as bins can tell them apart."""
    bands, last, both = [], 0, 0
    names = ["top 0.1 %", "0.1 to 1 %", "1 to 10 %", "10 to 50 %", "the rest"]
    for name, share in zip(names, BANDS, strict=True):
        place = int(np.argmax(curve.active <= share * curve.tokens)) if share < 1 else 0
        if not (curve.active <= share * curve.tokens).any():
            continue
        tokens, shown = int(curve.active[place]) - last, int(curve.both[place]) - both
        if tokens > 0:
            bands.append(Band(name, tokens, shown / tokens))
            last, both = last + tokens, both + shown
    return tuple(bands)


class _Judge(NamedTuple):
    """What it takes to say what follows from a meaning of "active".

    edges  f64[bin]: the lower edge of each bin of the score
    """

    signed: Curve
    curve: Curve
    edges: np.ndarray
    polarity: int
    null: float
    q: float
    rule: Rule

    @property
    def sides(self) -> np.ndarray:
        """Edges of the bins around zero and above."""
        return self.edges[len(self.edges) // 2 :]

    def at(self, name: str, threshold: float) -> Definition | None:
        """Active beyond a threshold (a magnitude) on the side of the polarity; None if that never happens."""
        place = int(np.searchsorted(self.sides, threshold)) + len(self.edges) // 2
        if place >= len(self.edges) or not self.curve.active[place]:
            return None
        active, both = int(self.curve.active[place]), int(self.curve.both[place])
        return self.say(name, self.polarity * float(self.edges[place]), active, both)

    def say(self, name: str, threshold: float | None, active: int, both: int) -> Definition:
        """The verdict on some active tokens, `both` of which show the pattern."""
        shown, tokens = int(self.curve.shown[0]), int(self.curve.tokens)
        pairs = np.array([(both, active), (both, shown), (2 * both, active + shown)])
        precision, recall, f1 = ratio(pairs[:, 0], pairs[:, 1])
        verdict = str(twoway.verdicts(precision, recall, f1, self.null, self.q, self.rule))
        known = lambda side: None if np.isnan(side) else float(side)  # noqa: E731
        figures = (known(precision), known(recall), known(f1))
        return Definition(name, threshold, active / max(tokens, 1), *figures, verdict)

    def quantile(self, share: float) -> float:
        """The least magnitude that at most this share of the tokens reaches."""
        reached = self.curve.active[len(self.edges) // 2 :] <= share * self.curve.tokens
        return float(self.sides[int(np.argmax(reached))]) if reached.any() else np.inf

    def either(self, name: str, threshold: float) -> Definition | None:
        """Active as far from zero, on whichever side."""
        folded = Curve(twoway.folded(self.signed.present), twoway.folded(self.signed.absent))
        place = int(np.searchsorted(self.sides, threshold))
        if place >= len(self.sides):
            return None
        return self.say(name, None, int(folded.active[place]), int(folded.both[place]))


def _definitions(
    judge: _Judge, row: Mapping[str, Any], reach: float, norm: float, write: pl.DataFrame
) -> list[Definition]:
    """The verdict under each meaning of "active": the sweep of A72."""
    chosen = (row["threshold"], row["active"], row["both"])
    definitions = [
        judge.say("chosen", *chosen),
        judge.at("above 0 (2⁻¹²)", 2.0**-12),
        *(judge.at(f"top {100 * share:g} % of tokens", judge.quantile(share)) for share in BANDS[2::-1]),
        judge.at("1/10 of largest", reach / 10),
        judge.at("1/2 of largest", reach / 2),
    ]
    if len(write) and norm > 0:
        levels, values = write["levels"][0].to_list(), write["values"][0].to_list()
        name = f"|m|·|v| top {100 * (1 - WRITE):g} %"  # of the layer
        definitions.append(judge.at(name, values[levels.index(WRITE)] / norm))
    definitions.append(judge.either("either sign", abs(row["threshold"])))
    if row["quadrants_active"] is not None:
        pairs = zip(QUADRANTS, row["quadrants_active"], row["quadrants_both"], strict=True)
        definitions += [
            judge.say(f"chosen, {name}", row["threshold"], *pair) for name, *pair in pairs if pair[0]
        ]
    return [definition for definition in definitions if definition is not None]


# -- Neurons with a verdict, clearest first: one order for `patterns`, `find --tested` and cards -------------------

ORDER = "clearest first: by the lower end of the interval of F1"
ABOUT = {NEXT: "the next token", POSITION: "the position"}  # else the text up to the token
_CLAIM = [*ADDRESS, "polarity", "spec"]


def rows_with_verdict(run: Run, layer: int | None = None) -> pl.DataFrame:
    """Rows of `pattern_tests` (without curves) of neurons with a verdict, in one layer or in all, clearest first.

    What triggers and the whole distribution both say of a neuron is there once. `QueryError` if the run has no
    patterns.
    """
    table = within(run, "pattern_tests", layer)
    ends = [f"{side}{end}" for side in ("precision", "recall", "f1") for end in ("", "_low", "_high")]
    return (
        table.filter((pl.col("unit") == NEURON) & (pl.col("verdict") != NONE))
        .select(*_CLAIM, "tests", "name", "verdict", *ends, "active", "present")
        .sort("f1_low", *_CLAIM, descending=[True, *([False] * len(_CLAIM))], nulls_last=True)
        .with_columns(about=pl.col("tests").replace_strict(ABOUT, default="the text so far"))
        .unique([*_CLAIM, "about"], keep="first", maintain_order=True)
        .collect()
    )
