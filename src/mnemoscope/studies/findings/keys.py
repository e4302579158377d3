"""Keys as detectors: patterns in triggers, shallow or semantic, both directions of a claim (A4, A7, A8, A74, A77).

A pattern counts when it was confirmed on triggers of the test half. It is *semantic* when its kind is and it is
confirmed beyond what the last tokens of the triggers explain; every other confirmed pattern is *shallow*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import LEAST, Interval, discoveries, jackknifed, jackknifed_chance, ratio
from mnemoscope.neuron import decoys
from mnemoscope.patterns.covered import CASES, documents_of_triggers, units_covered, without_documents
from mnemoscope.patterns.summary import against_decoys, excess
from mnemoscope.records import MAIN, NEURON, NEXT, NULLS, WHOLE
from mnemoscope.studies.findings.finding import Difference, Finding, bracketed, line, stack
from mnemoscope.studies.findings.statistics import columns, contrast, layers_named, number, percent, points

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

NULL = "random"
ORDINARY = "ordinary prefixes (N1)"
VERDICTS = ("iff", "active -> pattern", "pattern -> active", "neither", "no pattern above the null")
_FLAT, _DEEP = ("shallow", "shallow and semantic"), ("semantic", "shallow and semantic")
_NAMES = {NEURON: "neurons", **NULLS}


def findings(run: Run) -> list[Finding]:
    """From the tables `patterns` and `pattern_tests`."""
    units = Covered.of(run)
    verdicts = [_verdicts(run, MAIN), _verdicts(run, WHOLE)]
    return [
        _covered(units),
        _boundary(units),
        _number(units),
        *(verdict for verdict in verdicts if verdict is not None),
        *_decoys(run),
    ]


_COUNTED = (
    "triggers",
    "patterns",
    "keyed",
    "units",
    *(f"{of}{case}" for case in CASES for of in ("", "ordinary ")),
)


@dataclass(frozen=True)
class Covered:
    """What patterns cover, summed over the units of a kind and layer, and again without each group of documents.

    kinds      of units, the neurons first
    layers     i64[layer]: their numbers
    documents  that the triggers of the test half are in
    sums       f64[1 + group, kind, layer, counted]: `_COUNTED`, over all documents and then without each group
    """

    kinds: tuple[str, ...]
    layers: np.ndarray
    documents: int
    sums: np.ndarray

    @classmethod
    def of(cls, run: Run) -> Covered:
        """Count all triggers of the test half, then without the documents of each group."""
        units = units_covered(run)
        present = set(units["unit"].unique())
        kinds = tuple(kind for kind in _NAMES if kind in present)
        layers = np.unique(units["layer"].to_numpy())
        masks, documents = documents_of_triggers(run)
        sums = [_summed(covered, kinds, layers) for covered in (units, *without_documents(run, masks))]
        return cls(kinds, layers, documents, np.stack(sums))

    def figures(self, kind: str, *counted: str, per: str = "triggers", overall: bool = False) -> np.ndarray:
        """f64[1 + group, layer]: sums of some columns over that of `per`; of all layers together f64[1 + group, 1]."""
        sums = self.sums[:, self.kinds.index(kind)]
        if overall:
            sums = sums.sum(1, keepdims=True)
        place = [_COUNTED.index(name) for name in counted]
        return ratio(sums[..., place].sum(-1), sums[..., _COUNTED.index(per)])

    def mean(self, kind: str, *counted: str, per: str = "triggers", overall: bool = False) -> Interval:
        """f64[layer]: the same with intervals, jackknife over documents."""
        return self.interval(self.figures(kind, *counted, per=per, overall=overall))

    def interval(self, figures: np.ndarray) -> Interval:
        """Of figures f64[1 + group, ...]."""
        return jackknifed(figures).among(self.documents)


def _summed(units: pl.DataFrame, kinds: tuple[str, ...], layers: np.ndarray) -> np.ndarray:
    """f64[kind, layer, counted]"""
    rows = units.with_columns(keyed=pl.col("patterns") > 0, units=pl.lit(1))
    totals = rows.group_by("unit", "layer").agg(pl.col(name).sum().cast(pl.Float64) for name in _COUNTED)
    out = np.zeros((len(kinds), len(layers), len(_COUNTED)))
    for kind, layer, *counts in totals.select("unit", "layer", *_COUNTED).iter_rows():
        if kind in kinds:
            out[kinds.index(kind), np.searchsorted(layers, layer)] = counts
    return out


_BY_DOCUMENT = "documents of the triggers (jackknife over groups of them)"
_GIVEN = "intervals are over how much the confirmed patterns cover; that they are confirmed is taken as given"


def _covered(units: Covered) -> Finding:
    """A8, Figure 2: what share of triggers each kind of pattern covers, beside what ordinary prefixes and
    pseudo-neurons have."""
    parts, beside = [], ""
    bars = [(_NAMES[kind], kind, "") for kind in units.kinds]
    for name, kind, of in [bars[0], (ORDINARY, bars[0][1], "ordinary "), *bars[1:]]:
        for case in CASES:
            share = columns(units.mean(kind, of + case), "share")
            parts.append(
                pl.DataFrame({"layer": units.layers, **share}).with_columns(
                    units=pl.lit(name), case=pl.lit(case)
                )
            )
        if name != bars[0][0]:
            beside += f", {percent(_complement(units.mean(kind, of + CASES[-1], overall=True)), 0)} of {name}"
    neurons = _complement(units.mean(NEURON, CASES[-1], overall=True))
    deep = {kind: units.figures(kind, *_DEEP, overall=True) for kind in units.kinds}
    more = ""
    contrasts: tuple[Difference, ...] = ()
    if NULL in units.kinds:
        excess = units.interval(deep[NEURON] - deep[NULL])
        contrasts = (contrast("semantic", excess, 0),)
        more = f", of {_NAMES[NULL]}' {percent(units.interval(deep[NULL]), 0)} ({points(excess, 0)})"
    return Finding(
        id="figure-2-covered",
        items=("A8", "A4"),
        title="Shallow and semantic patterns by layer (Geva Figure 2)",
        says=f"In {units.documents:,} documents of the test half, confirmed patterns cover {percent(neurons, 0)} of "
        f"the neurons' triggers of all layers{beside}; semantic ones, beyond what the last token explains, cover "
        f"{percent(units.interval(deep[NEURON]), 0)}{more}.",
        frame=pl.concat(parts),
        figure=stack(
            "triggers (%)", y="share", color="case", facet="units", share=True, order=CASES, rest=CASES[-1]
        ),
        paper="65-80 % covered; shallow patterns prevail in layers 1-9 of 16, semantic ones in 10-16",
        null="for the neurons' own patterns, prefixes at the same positions whose last tokens are as frequent (N1)"
        + ("; pseudo-neurons, searched and tested in the same way (N3, N4)" if len(bars) > 1 else ""),
        resampled=_BY_DOCUMENT,
        notes=(
            "a unit is a neuron with a sign; patterns are found by search, not by annotators",
            "N1 takes the patterns that count (three triggers that no better one shows) as independent",
            _GIVEN,
        ),
        contrasts=contrasts,
    )


def _complement(share: Interval) -> Interval:
    """What is left of a share, with the same n."""
    left = Interval(1 - share.value, 1 - share.high, 1 - share.low)
    return left if share.n is None else left.among(share.n)


def _boundary(units: Covered) -> Finding:
    """A77: is there a layer above which semantic patterns prevail? Measured, not assumed."""
    figures = {"shallow": units.figures(NEURON, *_FLAT), "semantic": units.figures(NEURON, *_DEEP)}
    parts = [
        pl.DataFrame({"layer": units.layers, **columns(units.interval(values), "share")}).with_columns(
            kind=pl.lit(name)
        )
        for name, values in figures.items()
    ]
    more = figures["semantic"] - figures["shallow"]
    differs = discoveries(jackknifed_chance(more)) & (units.documents >= LEAST)
    above = np.zeros(int(units.layers.max()) + 1, bool)
    above[units.layers[differs & (more[0] > 0)]] = True
    frame = pl.concat(parts)
    whole = [percent(units.mean(NEURON, *of, overall=True), 0) for of in (_DEEP, _FLAT)]
    return Finding(
        id="shallow-semantic-boundary",
        items=("A77", "A8"),
        title="Where shallow ends and semantic begins",
        says=f"In {units.documents:,} documents of the test half, semantic patterns cover {whole[0]} of the neurons' "
        f"triggers of all layers and shallow ones {whole[1]}; semantic ones cover more in {layers_named(above)} (of "
        f"{len(units.layers)} layers together at a false discovery rate of 5 %).",
        frame=frame,
        figure=line(frame, "triggers covered (%)", y="share", color="kind", share=True),
        paper="assumed a boundary between layers 9 and 10 of 16",
        resampled=_BY_DOCUMENT,
        notes=(_GIVEN,),
    )


def _number(units: Covered) -> Finding:
    """A7: patterns per key."""
    frame = pl.DataFrame(
        {"layer": units.layers, **columns(units.mean(NEURON, "patterns", per="units"), "patterns")}
    )
    count = int(units.sums[0, units.kinds.index(NEURON), :, _COUNTED.index("units")].sum())
    keyed, many = (
        {kind: units.figures(kind, name, per="units", overall=True) for kind in units.kinds}
        for name in ("keyed", "patterns")
    )
    beside = ["", ""]
    contrasts: tuple[Difference, ...] = ()
    if NULL in units.kinds:
        frame = frame.with_columns(
            null=pl.Series(units.figures(NULL, "patterns", per="units")[0]).fill_nan(None)
        )
        excess = [units.interval(values[NEURON] - values[NULL]) for values in (keyed, many)]
        contrasts = (contrast("share", excess[0], 0), contrast("number", excess[1], 0))
        beside = [
            f", and {percent(units.interval(keyed[NULL]), 0)} of {_NAMES[NULL]} ({points(excess[0], 0)})",
            f" and {number(units.interval(many[NULL]), 0)} (a difference of {number(excess[1], 0, '+.2f')})",
        ]
    return Finding(
        id="patterns-per-key",
        items=("A7", "A73", "A78"),
        title="Patterns per key",
        says=f"Of {count:,} neurons with a sign, {percent(units.interval(keyed[NEURON]), 0)} have a confirmed pattern "
        f"in their triggers in {units.documents:,} documents{beside[0]}; the mean number is "
        f"{number(units.interval(many[NEURON]), 0)}{beside[1]}.",
        frame=frame,
        figure=line(frame, "patterns per unit (mean)", y="patterns", null="null" if beside[0] else None),
        paper="at least 1 for every key, 3.6 on average, by experts",
        null="random directions" if beside[0] else "",
        resampled=_BY_DOCUMENT,
        notes=("a pattern counts with three triggers that no better one of the unit shows", _GIVEN),
        contrasts=contrasts,
    )


def _verdicts(run: Run, tests: str) -> Finding | None:
    """A74: how often active means the pattern, and the pattern active, by triggers or by the whole distribution."""
    rows = run.table("pattern_tests").filter(pl.col("tests") == tests).collect()
    present = rows["unit"].unique().to_list()
    if not present:
        return None
    nulls = decoys.judged_alike(kind for kind in _NAMES if kind in present and kind != NEURON)
    kinds = [NEURON, *nulls]
    rows = rows.filter(pl.col("unit").is_in(kinds))
    frame = (
        rows.group_by("unit", "layer", "verdict")
        .agg(units=pl.len())
        .with_columns(share=pl.col("units") / pl.col("units").sum().over("unit", "layer"))
        .with_columns(pl.col("unit").replace_strict(_NAMES))
        .sort("unit", "layer", "verdict")
    )
    told_apart = frame.filter(pl.col("verdict") != VERDICTS[-1])
    counts = {kind: _passed(rows.filter(pl.col("unit") == kind)) for kind in kinds}
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in counts[NEURON].items())
    beside = ", ".join(
        f"{sum(counts[kind].values()):,} of {rows.filter(pl.col('unit') == kind).height:,} {_NAMES[kind]}"
        for kind in kinds[1:]
    )
    chance = f"; in either direction pass {beside}" if beside else ""
    neurons = rows.filter(pl.col("unit") == NEURON).height
    documents = int(rows["documents"].max() or 0)  # type: ignore[arg-type]
    return Finding(
        id="two-way-verdicts" if tests == MAIN else "two-way-whole",
        items=("A74", "A78"),
        title="Does active mean the pattern, and the pattern active?"
        if tests == MAIN
        else "The same of common patterns and unions of words, by the whole distribution",
        says=f"Of {neurons:,} neurons (with a sign, all layers) that have a pattern to test in {documents:,} "
        f"documents of the test half, so many have a verdict: {told} "
        f"({sum(counts[NEURON].values()) / max(neurons, 1):.1%} in all){chance}.",
        frame=told_apart if told_apart.height else frame,
        figure=stack(
            "units with a pattern (%)", y="share", color="verdict", facet="unit", share=True, order=VERDICTS
        ),
        null="pseudo-neurons with their own best pattern" if chance else "",
        notes=(
            "on documents of the test half; the triggers in that half also confirmed the patterns",
            f"all others: {VERDICTS[-1]}",
        ),
    )


def _passed(rows: pl.DataFrame) -> dict[str, int]:
    """How many units pass by each verdict, in either direction or both."""
    return {verdict: int((rows["verdict"] == verdict).sum()) for verdict in VERDICTS[:3]}


_ABOUT = {
    MAIN: "the text so far, by triggers",
    WHOLE: "the same, by the whole distribution",
    NEXT: "the next token",
}
_REACHED = 0.5  # the F1 that the sentence is about


def _decoys(run: Run) -> list[Finding]:
    """A74, A78: what neurons do that decoys of their own do not. Nothing for a run without decoys."""
    rows = run.table("pattern_tests").select("unit", "tests", "q", "decoy_q", "documents").collect()
    if rows["decoy_q"].null_count() == rows.height:
        return []
    told = against_decoys(rows, run.manifest.options["patterns"]["q"])
    frame = excess(run).filter(pl.col("tests").is_in(list(_ABOUT)))
    model, documents = run.manifest.model, rows["documents"][0]
    sentences = []
    for tests, about in _ABOUT.items():
        counts = told.filter(pl.col("tests") == tests).sort("level")
        if not counts.height:
            continue
        levels = ", ".join(
            f"{row['neurons']:,} at {row['level']:.0%}" for row in counts.iter_rows(named=True)
        )
        reached = [
            f"{row['neurons']:.2%} reach an F1 of {_REACHED} and {row['decoys']:.2%} of {NULLS[row['unit']]}, "
            + (
                f"{row['excess']:+.2%} (no interval)"
                if row["low"] is None
                else bracketed(row["excess"], row["low"], row["high"], "+.2%")
            )
            for row in frame.filter((pl.col("tests") == tests) & (pl.col("f1") == _REACHED)).iter_rows(
                named=True
            )
        ]
        sentences.append(f"{about}: {levels}; {'; '.join(reached)}")
    contrasts = tuple(
        Difference.of(f"{row['tests']}, {row['unit']}", (row["excess"], row["low"], row["high"]), documents)
        for row in frame.filter(pl.col("f1") == _REACHED).iter_rows(named=True)
    )
    frame = frame.with_columns(
        about=pl.col("tests").replace_strict(_ABOUT),
        decoy=pl.col("unit").replace_strict(NULLS),
        null=pl.lit(0.0),
    )
    return [
        Finding(
            id="neurons-against-decoys",
            items=("A74", "A78"),
            title="What neurons do that decoys of their own do not",
            says=f"Of {2 * len(model.cells):,} neurons with a sign so many beat their own decoys at a rate "
            f"of false discoveries, by what the pattern is about. {'. '.join(map(_capital, sentences))}.",
            frame=frame,
            figure=line(
                frame, "more neurons than decoys (% of units)",
                x="f1", y="excess", x_title="F1 on held-out text, at least", color="about",
                facet="decoy" if frame["decoy"].n_unique() > 1 else None, share=True,
            ),
            null="decoys of the same neurons, searched, held out and tested alike",
            resampled=f"documents (jackknife, n = {documents:,})",
            notes=(
                "the rate of false discoveries is knockoff+ (Barber and Candès 2015), layers pooled",
                "a chimera has the neuron's own gate: what the gate alone does, it does as well",
            ),
            contrasts=contrasts,
        )
    ]  # fmt: skip


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
