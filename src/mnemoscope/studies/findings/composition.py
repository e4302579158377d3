"""Within a layer: how many memories are active, and whether any of them alone says what the layer says (A16-A19, A29).

Geva et al. 2021, Section 5.1. In a gated model a coefficient is hardly ever 0, so "active" needs a rule: every figure
shows several. The null of an agreement is another example's target, permuted so that tokens stay as frequent, and
asked in the same way (`ASKED`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval
from mnemoscope.studies.findings.finding import Figure, Finding, bar, line
from mnemoscope.studies.findings.statistics import (
    OTHER_LAYER,
    PARTNER,
    BesidePartner,
    ExampleFigure,
    ExampleGrid,
    Quantities,
    against_partner,
    contrast,
    percent,
    points,
    refinement_grids,
    running,
    series,
)

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

# Articles, pronouns, prepositions, conjunctions, auxiliaries, particles; no punctuation, and no words with content.
STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each either few for from further had has have having he her
    here hers herself him himself his how i if in into is it its itself just may me might more most must my myself
    neither no nor not now of off on once only or other our ours ourselves out over own same shall she should since
    so some such than that the their theirs them themselves then there these they this those though through to too
    under until up upon us very was we were what when where whether which while who whom whose why will with within
    without would yet you your yours yourself
    """.split()  # noqa: SIM905 - a list of 150 strings reads worse
)


def kind(text: str) -> str:
    """`stop word`, `punctuation` (no letter, no digit) or `other`, for a token's text, case and spaces aside."""
    word = text.strip().casefold()
    if word in STOP_WORDS:
        return "stop word"
    return "other" if any(letter.isalnum() for letter in word) else "punctuation"


RULES = {
    "m > 0": "active",
    "at least 1 % of the largest": "active_1",
    "at least 10 % of the largest": "active_10",
    "at least half of the largest": "active_50",
    "participation ratio": "participation",
}
MASSES = {"the 10 strongest": "mass_10", "the 100 strongest": "mass_100"}
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of |m||v|, as a share of the layer's largest
SHORT = 5  # tokens; a prefix with fewer is short (A19)
HEAD = 10  # tokens of the layer's reading among which a memory's word is heard (A29)
_STRONG = 0.1
_PERMUTED = "another example's target, permuted so that tokens stay as frequent"
_DOCUMENTS = "documents of the prefixes"
_GATED, _PLAIN, _STRONG_ONLY = "m other than 0", "m > 0", "at least 10 % of the largest"

# Whether no active memory says the layer's first token, by what counts as active (A18).
SILENT = {
    _GATED: ExampleFigure(lambda of: of["agree"] < 1),
    _PLAIN: ExampleFigure(lambda of: of["agree_positive"] < 1),
    _STRONG_ONLY: ExampleFigure(lambda of: of["strongest"] < _STRONG),
    "all, active or not": ExampleFigure(lambda of: of["agree_all"] < 1),
}
# Whether what the strongest memory says is heard in what the layer says (A29).
HEARD = {
    "first": ExampleFigure(lambda of: of["ffn_rank_memory"] < 1),
    f"not among the first {HEAD}": ExampleFigure(lambda of: of["ffn_rank_memory"] >= HEAD),
}
# The same, by how strong a memory must be to count.
SWEEP = {
    least: ExampleFigure(lambda of, least=least: of["strongest"] < least)  # type: ignore[misc]
    for least in THRESHOLDS
}
ASKED = {f"silent, {rule}": asked for rule, asked in SILENT.items()} | {
    f"heard, {word}": asked for word, asked in HEARD.items()
}


def _against(
    asked: ExampleFigure, grid: ExampleGrid, suffix: str = PARTNER, *, overall: bool = False
) -> BesidePartner:
    return against_partner(asked, Quantities(grid), Quantities(grid, suffix), overall=overall)


def _cases(grid: ExampleGrid) -> str:
    read, documents = grid.examples.height, len(np.unique(grid.documents))
    return f"{read:,} prefixes of {documents:,} documents and all {grid.count} layers ({grid.name} lens)"


def findings(run: Run) -> list[Finding]:
    """Everything that the table `refinement` says about memories in one layer."""
    units = refinement_grids(run)
    main = next(grid for (unit, _), grid in units.items() if unit == "model")
    copy = units.get(("shuffled", main.name))
    others = [grid for (unit, lens), grid in units.items() if unit == "model" and lens != main.name]
    return [
        _active(run, main, copy),
        _mass(main, copy),
        _zero_agreement(run, main, others),
        _sweep(main),
        _who_agrees(run, main),
        _suppressed(main),
    ]


def _line(frame: pl.DataFrame, title: str, color: str, facet: str | None = None) -> Figure:
    return line(frame, title, color=color, facet=facet, share=True)


def _active(run: Run, grid: ExampleGrid, copy: ExampleGrid | None) -> Finding:
    """A16: active memories, by several rules."""
    frames, size = [], running(run)
    for rule, column in RULES.items():
        null = None if copy is None else copy.share(copy[column] / size)
        frames.append(series(grid.share(grid[column] / size), null, rule=rule))
    positive, strong = (grid.overall(grid[RULES[rule]] / size) for rule in list(RULES)[:3:2])
    number = size.mean() * float(strong.value)
    frame = pl.concat(frames)
    return Finding(
        id="figure-7-active-memories",
        items=("A16", "A72"),
        title="How many memories of a layer are active (Geva Figure 7)",
        says=f"Over {_cases(grid)}, {percent(positive)} of the {_memories(run, size)} have a positive "
        f"coefficient, and {percent(strong)} (about {number:,.0f}) write at least a tenth as strongly (|m||v|) as the "
        f"strongest of their layer{_of_copy(copy, lambda other: other.overall(other['active_10'] / size))}.",
        frame=frame,
        figure=_line(frame, "memories of the layer (%)", "rule"),
        paper="40-50 % in layers 1-5 of 16, 10-15 % at layer 10, 15-20 % in 11-16; ReLU, so active is m > 0",
        null="" if copy is None else "a copy of the model with shuffled weights",
        resampled=_DOCUMENTS,
        notes=("strength is |m||v|; the participation ratio is (sum |m||v|)^2 / sum (|m||v|)^2",),
    )


def _memories(run: Run, size: np.ndarray) -> str:
    """The memories of a layer in words; in a mixture those that run, `size` f64[layer] on average."""
    cells = run.manifest.model.cells
    if not cells.experts:
        return f"{cells.spelled} memories of a layer"
    return f"memories of a layer that run at a token (on average {size.mean():,.0f} of {cells.spelled})"


def _of_copy(copy: ExampleGrid | None, share: Callable[[ExampleGrid], Interval]) -> str:
    return "" if copy is None else f"; in a copy with shuffled weights {percent(share(copy))}"


def _mass(grid: ExampleGrid, copy: ExampleGrid | None) -> Finding:
    """A16: how much of what is written the strongest write."""
    frames = [
        series(grid.share(grid[column]), None if copy is None else copy.share(copy[column]), memories=label)
        for label, column in MASSES.items()
    ]
    ten = grid.overall(grid["mass_10"])
    frame = pl.concat(frames)
    return Finding(
        id="mass-of-the-strongest",
        items=("A16",),
        title="How much of a layer's output the strongest memories write",
        says=f"Over {_cases(grid)}, the ten strongest memories of a layer have {percent(ten)} of the sum of |m||v| "
        f"over its memories{_of_copy(copy, lambda other: other.overall(other['mass_10']))}.",
        frame=frame,
        figure=_line(frame, "share of the sum of |m||v| (%)", "memories"),
        null="" if copy is None else "a copy of the model with shuffled weights",
        resampled=_DOCUMENTS,
    )


def _different(grid: ExampleGrid) -> list[str]:
    """Rules, without those that come to the same as one before them: in a gated model all memories are active."""
    kept: list[str] = []
    values = {rule: asked.hits(Quantities(grid)) for rule, asked in SILENT.items()}
    for rule, silent in values.items():
        if not any(np.array_equal(silent, values[other]) for other in kept):
            kept.append(rule)
    return kept


def _zero_agreement(run: Run, grid: ExampleGrid, others: list[ExampleGrid]) -> Finding:
    """A18: examples in which no memory says what the layer says."""
    frames = []
    for rule in _different(grid):
        asked = SILENT[rule]
        frames.append(_against(asked, grid).rows(target="the layer's own first token", active=rule))
        for target, suffix in {
            "the output's first token": "_output",
            "the layer's own, said by values of another layer": OTHER_LAYER,
        }.items():
            frames.append(
                series(grid.share(asked.hits(Quantities(grid, suffix))), target=target, active=rule)
            )
    rule = _GATED if run.manifest.model.gated else _PLAIN
    told = {
        name: (
            _against(SILENT[name], grid, overall=True),
            _against(SILENT[name], grid, OTHER_LAYER, overall=True),
        )
        for name in (rule, _STRONG_ONLY)
    }
    said = {
        name: f"{percent(partner.own, 0)}, of another example's first token {percent(partner.null, 0)} "
        f"({points(partner.excess, 0)}), and with the words of another layer's values {percent(other.null, 0)}"
        for name, (partner, other) in told.items()
    }
    frame = pl.concat(frames, how="diagonal")
    return Finding(
        id="figure-8-zero-agreement",
        items=("A18",),
        title="How often no memory alone says what its layer says (Geva Figure 8)",
        says=f"Over {_cases(grid)}, no active memory ({rule}) has the layer's first token as its own in {said[rule]}; "
        f"no memory a tenth as strong as the strongest does in {said[_STRONG_ONLY]}.",
        frame=frame,
        figure=_line(frame, "prefixes without an agreeing memory (%)", "target", "active"),
        paper="at least 68 % everywhere, 85-90 % around layers 5-9, 68-80 % at the ends",
        null=_PERMUTED,
        resampled=_DOCUMENTS,
        notes=(
            f"memories are read under the {grid.name} lens, with the sign of their coefficient",
            *(
                f"{other.name} lens, {rule}: {percent(_against(SILENT[rule], other, overall=True).own, 0)}"
                for other in others
            ),
        ),
        contrasts=(contrast("strong", told[_STRONG_ONLY][0].excess, 0),),
    )


def _sweep(grid: ExampleGrid) -> Finding:
    """A18, A72: the same, by how strong a memory must be to count."""
    contrasts = {least: _against(asked, grid, overall=True) for least, asked in SWEEP.items()}
    frame = pl.concat(
        [
            contrast.rows().drop("layer").select(pl.lit(least).alias("threshold"), pl.all())
            for least, contrast in contrasts.items()
        ]
    )
    ends = [contrasts[least] for least in (THRESHOLDS[0], THRESHOLDS[-1])]
    return Finding(
        id="zero-agreement-by-strength",
        items=("A18", "A72"),
        title="Zero agreement, by how strong a memory must be to count",
        says=f"Over {_cases(grid)}, counting memories from a thousandth of the strongest on, none says the layer's "
        f"first token in {percent(ends[0].own, 0)} of cases, and another example's in {percent(ends[0].null, 0)}; "
        f"counting the strongest alone, in {percent(ends[1].own, 0)} and {percent(ends[1].null, 0)}.",
        frame=frame,
        figure=line(
            frame,
            "cases without an agreeing memory (%)",
            x="threshold",
            x_title="least strength, as a share of the layer's strongest",
            log_x=True,
            share=True,
        ),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
    )


def lengths(run: Run, grid: ExampleGrid) -> np.ndarray:
    """i64[example]: tokens of each prefix that are not special (A27)."""
    special = run.manifest.options.get("special", [])
    texts = run.contexts(grid.examples["context"].to_list())
    places = grid.examples.select("context", "position").iter_rows()
    return np.array(
        [(~np.isin(texts[context].tokens[: position + 1], special)).sum() for context, position in places]
    )


def _who_agrees(run: Run, grid: ExampleGrid) -> Finding:
    """A19: what is said, and after how much, where a memory alone says it."""
    kinds = np.array([kind("".join(run.vocabulary.pieces([token]))) for token in range(len(run.vocabulary))])
    target = kinds[grid["ffn"].astype(np.int64)]
    short = np.broadcast_to(lengths(run, grid)[:, None] < SHORT, target.shape)
    asked = {
        "the token is a stop word": target == "stop word",
        "the token is punctuation": target == "punctuation",
        f"the prefix has fewer than {SHORT} tokens": short,
    }
    groups = {
        "any memory agrees": grid["agree"] > 0,
        "a strong memory agrees": grid["strongest"] >= _STRONG,
        "none agrees": grid["agree"] == 0,
    }
    rows = []
    for question, hits in asked.items():
        base = grid.overall(hits)
        for group, among in groups.items():
            share = grid.overall(hits, among)
            rows.append((question, group, int(among.sum()), *map(float, (*share, base.value))))
    schema = {"question": pl.String, "cases": pl.String, "n": pl.Int64} | dict.fromkeys(
        ("value", "low", "high", "base"), pl.Float64
    )
    frame = pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)
    strong = [grid.overall(hits, groups["a strong memory agrees"]) for hits in asked.values()]
    usual = [grid.overall(hits) for hits in asked.values()]
    return Finding(
        id="cases-of-agreement",
        items=("A19", "A27"),
        title="Where one memory says what the layer says",
        says=f"Over {_cases(grid)}: where a memory a tenth as strong as the strongest says the layer's first token "
        f"(n = {int(groups['a strong memory agrees'].sum()):,} cases), that is a stop word in {percent(strong[0])} and "
        f"the prefix shorter than {SHORT} tokens in {percent(strong[2])}; over all cases in {percent(usual[0])} and "
        f"{percent(usual[2])}.",
        frame=frame,
        figure=bar(frame, "cases (%)", x="question", color="cases", null="base", share=True),
        paper="where a memory agrees: a stop word in 60 %, a prefix of fewer than 5 tokens in 43 %",
        null="all cases",
        resampled=_DOCUMENTS,
        notes=(
            "stop words: the pinned list in studies/findings/composition.py, case aside",
            "lengths are in tokens, special ones aside",
            "how short prefixes are depends on how positions were sampled: compare with all cases",
        ),
    )


def _suppressed(grid: ExampleGrid) -> Finding:
    """A29: is what the strongest memory says still heard in what the layer says?"""
    frame = pl.concat([_against(asked, grid).rows(word=word) for word, asked in HEARD.items()])
    first, lost = (_against(asked, grid, overall=True) for asked in HEARD.values())
    return Finding(
        id="suppressed-memories",
        items=("A29",),
        title="Is the strongest memory heard?",
        says=f"Over {_cases(grid)}, what the strongest memory says is the layer's first token in "
        f"{percent(first.own, 0)} of cases, what another example's says in {percent(first.null, 0)}; it is not among "
        f"the layer's first {HEAD} in {percent(lost.own, 0)}, and another example's in {percent(lost.null, 0)} "
        f"({points(lost.excess, 0)}).",
        frame=frame,
        figure=_line(frame, "prefixes (%)", "word"),
        paper="suggested as a use: patterns that a memory identifies and the layer does not act on",
        null="what the strongest memory of another example says, asked the same",
        resampled=_DOCUMENTS,
        notes=("a memory is suppressed only if it is heard less often than another example's would be",),
        contrasts=(contrast("first", first.excess, 0), contrast("lost", lost.excess, 0)),
    )
