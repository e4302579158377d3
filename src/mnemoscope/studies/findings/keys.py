"""Keys as detectors: patterns in triggers, shallow or semantic, both directions of a claim (A4, A7, A8, A74, A77).

A pattern counts when it was confirmed on triggers of the test half. It is *semantic* when its kind is and it is
confirmed beyond what the last tokens of the triggers explain; every other confirmed pattern is *shallow*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, ratio_of_sums, share_of_sums, wilson
from mnemoscope.patterns.covered import CASES, units_covered
from mnemoscope.patterns.summary import against_decoys, excess
from mnemoscope.records import MAIN, NEURON, NEXT, NULLS, WHOLE
from mnemoscope.studies.findings.finding import Finding, bar, bracketed, line, stack
from mnemoscope.studies.findings.statistics import as_series, number

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

NULL = "random"
ORDINARY = "ordinary prefixes (N1)"
VERDICTS = ("iff", "active -> pattern", "pattern -> active", "neither", "no pattern above the null")
_FLAT, _DEEP = ("shallow", "shallow and semantic"), ("semantic", "shallow and semantic")
_NAMES = {NEURON: "neurons", **NULLS}


def findings(run: Run) -> list[Finding]:
    """From the tables `patterns` and `pattern_tests`."""
    units = units_covered(run)
    verdicts = [_verdicts(run, MAIN), _verdicts(run, WHOLE)]
    return [
        _covered(units),
        _boundary(units),
        _number(units),
        *(verdict for verdict in verdicts if verdict is not None),
        *_decoys(run),
    ]


def _mean(units: pl.DataFrame, *columns: str, per: str = "triggers") -> tuple[pl.DataFrame, Interval]:
    """Layers of the units, and by layer the sum of some columns over the sum of `per`, resampled over units."""
    layers, group = np.unique(units["layer"].to_numpy(), return_inverse=True)
    above = units.select(pl.sum_horizontal(pl.col(*columns).cast(pl.Float64)))[columns[0]].to_numpy()
    below = np.ones(len(above)) if per == "" else units[per].to_numpy()
    sums = np.zeros((2, len(group), len(layers)))
    sums[:, np.arange(len(group)), group] = above, below
    resampled = share_of_sums if per else ratio_of_sums
    return pl.DataFrame({"layer": layers}), resampled(sums[0], sums[1], np.arange(len(group)), n=200)


def _share(units: pl.DataFrame, *columns: str) -> float:
    """Of all triggers of the units, those in some cases."""
    return float(units.select(pl.sum_horizontal(*columns)).sum().item() / units["triggers"].sum())


def _kinds(units: pl.DataFrame) -> list[str]:
    return [kind for kind in _NAMES if kind in units["unit"].unique().to_list()]


def _covered(units: pl.DataFrame) -> Finding:
    """A8, Figure 2: what share of triggers each kind of pattern covers, beside what ordinary prefixes and
    pseudo-neurons have."""
    parts, chance = [], ""
    bars = [(_NAMES[kind], kind, "") for kind in _kinds(units)]
    for name, kind, which in [bars[0], (ORDINARY, bars[0][1], "ordinary "), *bars[1:]]:
        members = units.filter(pl.col("unit") == kind)
        for case in CASES:
            layers, mean = _mean(members, which + case)
            parts.append(
                layers.with_columns(
                    units=pl.lit(name), case=pl.lit(case), **as_series(mean, "share")
                )
            )  # fmt: skip
        if name != bars[0][0]:
            chance += f", {1 - _share(members, which + CASES[-1]):.1%} of {name}"
    frame = pl.concat(parts)
    neurons = units.filter(pl.col("unit") == "neuron")
    return Finding(
        id="figure-2-covered",
        items=("A8", "A4"),
        title="Shallow and semantic patterns by layer (Geva Figure 2)",
        says=f"Confirmed patterns cover {1 - _share(neurons, CASES[-1]):.1%} of the neurons' triggers of the test half"
        f"{chance}; semantic ones, beyond what the last token explains, {_share(neurons, *_DEEP):.1%}.",
        frame=frame,
        figure=stack(
            "triggers (%)", y="share", color="case", facet="units", share=True, order=CASES, rest=CASES[-1]
        ),
        paper="65-80 % covered; shallow patterns prevail in layers 1-9 of 16, semantic ones in 10-16",
        null="for the neurons' own patterns, prefixes at the same positions whose last tokens are as frequent (N1)"
        + ("; pseudo-neurons, searched and tested in the same way (N3, N4)" if len(bars) > 1 else ""),
        resampled="units (in the table)",
        notes=(
            "a unit is a neuron with a sign; patterns are found by search, not by annotators",
            "N1 takes the patterns that count (three triggers that no better one shows) as independent",
        ),
    )


def _boundary(units: pl.DataFrame) -> Finding:
    """A77: is there a layer above which semantic patterns prevail? Measured, not assumed."""
    neurons = units.filter(pl.col("unit") == "neuron")
    parts, means = [], {}
    for name, counted in (("shallow", _FLAT), ("semantic", _DEEP)):
        layers, mean = _mean(neurons, *counted)
        means[name] = mean
        parts.append(layers.with_columns(kind=pl.lit(name), **as_series(mean, "share")))
    frame = pl.concat(parts)
    above = frame["layer"].to_numpy()[: len(means["shallow"].value)][
        means["semantic"].low > means["shallow"].high
    ]
    says = (
        f"Semantic patterns cover more triggers than shallow ones, beyond the intervals, in layers "
        f"{', '.join(map(str, above.tolist()))}."
        if len(above)
        else "In no layer do semantic patterns cover more triggers than shallow ones beyond the intervals."
    )
    return Finding(
        id="shallow-semantic-boundary",
        items=("A77", "A8"),
        title="Where shallow ends and semantic begins",
        says=says,
        frame=frame,
        figure=line(frame, "triggers covered (%)", y="share", color="kind", share=True),
        paper="assumed a boundary between layers 9 and 10 of 16",
        resampled="units",
    )


def _number(units: pl.DataFrame) -> Finding:
    """A7: patterns per key."""
    neurons, null = (units.filter(pl.col("unit") == kind) for kind in ("neuron", NULL))
    layers, mean = _mean(neurons, "patterns", per="")
    frame = layers.with_columns(**as_series(mean, "patterns"))
    band = {}
    if null.height:
        usual = null.group_by("layer").agg(null=pl.col("patterns").mean())
        frame, band = frame.join(usual, on="layer", how="left"), {"null": "null"}
    keyed = wilson(np.array((neurons["patterns"] > 0).sum()), np.array(neurons.height))
    chance = f", of random directions {(null['patterns'] > 0).to_numpy().mean():.1%}" if null.height else ""
    usual_number = f" and {null['patterns'].to_numpy().mean():.2f}" if null.height else ""
    return Finding(
        id="patterns-per-key",
        items=("A7", "A73", "A78"),
        title="Patterns per key",
        says=f"{number(keyed, form='.1%')} of neurons (with a sign) have a confirmed "
        f"pattern{chance}; the mean is {neurons['patterns'].to_numpy().mean():.2f} patterns{usual_number}.",
        frame=frame,
        figure=line(frame, "patterns per unit (mean)", y="patterns", null=band.get("null")),
        paper="at least 1 for every key, 3.6 on average, by experts",
        null="random directions" if band else "",
        resampled="units",
        notes=("a pattern counts with three triggers that no better one of the unit shows",),
    )


def _verdicts(run: Run, tests: str) -> Finding | None:
    """A74: how often active means the pattern, and the pattern active, by triggers or by the whole distribution."""
    rows = run.table("pattern_tests").filter(pl.col("tests") == tests).collect()
    kinds = [kind for kind in _NAMES if kind in rows["unit"].unique().to_list()]
    if not kinds:
        return None
    rows = rows.filter(pl.col("unit").is_in(kinds))
    frame = (
        rows.group_by("unit", "layer", "verdict")
        .agg(units=pl.len())
        .with_columns(share=pl.col("units") / pl.col("units").sum().over("unit", "layer"))
        .with_columns(pl.col("unit").replace_strict(_NAMES))
        .sort("unit", "layer", "verdict")
    )
    told_apart = frame.filter(pl.col("verdict") != VERDICTS[-1])
    neurons = rows.filter(pl.col("unit") == "neuron")
    told = ", ".join(
        f"{(neurons['verdict'] == verdict).to_numpy().mean():.1%} {verdict}" for verdict in VERDICTS[:3]
    )
    passed = {
        _NAMES[kind]: rows.filter(pl.col("unit") == kind)["verdict"].is_in(VERDICTS[:3]).to_numpy().mean()
        for kind in kinds[1:]
    }
    chance = "".join(f", {share:.1%} of {name}" for name, share in passed.items())
    chance = f"; in either direction pass{chance.removeprefix(',')}" if chance else ""
    return Finding(
        id="two-way-verdicts" if tests == MAIN else "two-way-whole",
        items=("A74", "A78"),
        title="Does active mean the pattern, and the pattern active?"
        if tests == MAIN
        else "The same of common patterns and unions of words, by the whole distribution",
        says=f"Of {neurons.height:,} neurons (with a sign) that have a pattern to test: {told}{chance}.",
        frame=told_apart if told_apart.height else frame,
        figure=stack(
            "units with a pattern (%)", y="share", color="verdict", facet="unit", share=True, order=VERDICTS
        ),
        null="pseudo-neurons with their own best pattern" if chance else "",
        notes=("on text of the test half that was used for nothing else", f"all others: {VERDICTS[-1]}"),
    )


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
            says=f"Of {2 * model.layers * model.neurons:,} neurons with a sign so many beat their own decoys at a rate "
            f"of false discoveries, by what the pattern is about. {'. '.join(map(_capital, sentences))}.",
            frame=frame,
            figure=bar(
                frame, "more neurons than decoys (% of units)",
                x="f1", y="excess", x_title="F1 on held-out text, at least", color="about", facet="decoy", share=True,
            ),
            null="decoys of the same neurons, searched, held out and tested alike",
            resampled=f"documents (jackknife, n = {documents:,})",
            notes=(
                "the rate of false discoveries is knockoff+ (Barber and Candès 2015), layers pooled",
                "a chimera has the neuron's own gate: what the gate alone does, it does as well",
            ),
        )
    ]  # fmt: skip


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
