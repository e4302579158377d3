"""From layer to layer: what the residual would predict, and what a feed-forward layer changes (A21-A25).

Geva et al. 2021, Section 5.2. The null of every change is another example's feed-forward output, added to the same
residual; the null of every agreement with the prediction is another example's prediction. Each figure is said once, in
`ASKED`, and asked of both: where it is about compositions, the null is about those that the other output makes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, quantile_by_document
from mnemoscope.studies.findings.finding import (
    Difference,
    Figure,
    Finding,
    bar,
    box,
    chance,
    line,
    stack,
    went,
)
from mnemoscope.studies.findings.statistics import (
    PARTNER,
    BesidePartner,
    ExampleFigure,
    ExampleGrid,
    Quantities,
    Selection,
    against_partner,
    contrast,
    layers_named,
    number,
    percent,
    points,
    refinement_grids,
    series,
)

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

CASES = ("residual", "agreement", "composition", "ffn", "violation")
LEVELS = {"whisker_low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "whisker_high": 0.95}
HEAD = 5  # tokens that are the head of a distribution (A24, A25), as in the measurement
PAIRS = 100  # changes of the last layer that are listed (A25)
ALIKE = 0.95  # of unrelated pairs, beyond which two tokens are called alike (A25)
_BINS = {"0": 0, "1": 1, "2-4": 2, "5-9": 5, "10-99": 10, "100-999": 100, "1,000 on": 1000}
_WORDS = 12  # tokens of a prefix that are shown
_DOCUMENTS = "documents of the prefixes"
_PERMUTED = "another example's feed-forward output added to the same residual"
_BASIS = (
    "in the output basis: residuals are read through the model's own final norm and unembedding, with no map fitted to "
    "their layer, so that what a residual holds in another basis counts as undecided"
)


def composed(of: Quantities) -> np.ndarray:
    """Select compositions: neither the residual's first token nor the feed-forward output's comes out first."""
    return cases(of["residual"], of["ffn"], of["output"]) == CASES.index("composition")


def _in_last(selection: Selection) -> Selection:
    def last(of: Quantities) -> np.ndarray:
        chosen = selection(of).copy()
        chosen[:, :-1] = False
        return chosen

    return last


def _changed(of: Quantities) -> np.ndarray:
    return of["output"] != of["residual"]


ASKED = {
    "said": ExampleFigure(lambda of: of["residual"] == of["prediction"]),
    "probability": ExampleFigure(lambda of: of["p_final"]),
    "changed": ExampleFigure(_changed),
    "by the layer's word": ExampleFigure(lambda of: of["output"] == of["ffn"], _changed),
    "from the head": ExampleFigure(lambda of: of["rank_output"] < HEAD, composed),
    "old one lowered": ExampleFigure(lambda of: of["ffn_z_residual"] < 0, composed),
    "cosine": ExampleFigure(lambda of: of["similarity"], _in_last(composed)),
}


def _against(asked: ExampleFigure, grid: ExampleGrid, *, overall: bool = False) -> BesidePartner:
    return against_partner(asked, Quantities(grid), Quantities(grid, PARTNER), overall=overall)


def _prefixes(grid: ExampleGrid) -> str:
    documents = len(np.unique(grid.documents))
    return f"{grid.examples.height:,} prefixes of {documents:,} documents"


def findings(run: Run) -> list[Finding]:
    """Everything that the table `refinement` says about layers after layers."""
    units = refinement_grids(run)
    grids = {lens: grid for (unit, lens), grid in units.items() if unit == "model"}
    main = next(iter(grids.values()))
    return [
        _agreement(units),
        _probability(grids),
        _rank(grids),
        _cases(grids),
        _changes(grids),
        _veto(grids),
        _veto_ranks(main),
        _similarity(main),
        _last_layer(run, main),
    ]


def _lens(grid: ExampleGrid) -> str:
    return f"{grid.name} lens"


def _agreement(units: dict[tuple[str, str], ExampleGrid]) -> Finding:
    """A21: how often the residual's first token is what the model will say."""
    frames, notes = [], [_BASIS]
    contrasts = {key: _against(ASKED["said"], grid) for key, grid in units.items()}
    main_key, main = next(iter(contrasts.items()))
    for (unit, lens), beside in contrasts.items():
        name = f"{lens} lens" if unit == "model" else f"shuffled weights, {lens} lens"
        frames.append(beside.rows(series=name))
        if unit == "model" and lens != main_key[1]:
            notes.append(_differs(main.own, beside.own, lens))
    half = np.flatnonzero(main.own.value >= 0.5)
    reached = f"it passes half at layer {half[0]}" if len(half) else "it never reaches half"
    frame = pl.concat(frames)
    grid = units[main_key]
    return Finding(
        id="figure-9-residual-is-prediction",
        items=("A21",),
        title="Does the residual already say what the model will say, in the output basis? (Geva Figure 9)",
        says=f"Over {_prefixes(grid)}, read in the output basis ({_lens(grid)}), the residual before the feed-forward "
        f"layer has the model's prediction first in {percent(main.own, 0)} of prefixes in layer 0 and in "
        f"{percent(main.own, -1)} in layer {grid.count - 1}; {reached}. Another example's prediction is first in "
        f"{percent(main.null, -1)} in layer {grid.count - 1}.",
        frame=frame,
        figure=_line(frame, "prefixes (%)", color="series"),
        paper="about 0 in layer 1 of 16, 20-40 % by layer 9, about 95 % in layer 16",
        null="another example's prediction, permuted so that tokens stay as frequent",
        resampled=_DOCUMENTS,
        notes=tuple(notes),
    )


def _differs(main: Interval, other: Interval, lens: str) -> str:
    layer = int(np.nanargmax(np.abs(main.value - other.value)))
    return f"the {lens} lens differs most in layer {layer}: {percent(other, layer)} instead of {percent(main, layer)}"


def _line(frame: pl.DataFrame, title: str, **more: Any) -> Figure:
    return line(frame, title, share=True, **more)


def _box(grid: ExampleGrid, column: str, null: str | None) -> pl.DataFrame:
    """Quantiles by layer, with the interval of the median, and the null's median where there is a column of it."""
    quantiles = quantile_by_document(grid[column], grid.documents, tuple(LEVELS.values()))
    middle = list(LEVELS).index("median")
    frame = pl.DataFrame(
        {
            "layer": np.arange(grid.count),
            **{name: quantiles.value[level] for level, name in enumerate(LEVELS)},
            "median_low": quantiles.low[middle],
            "median_high": quantiles.high[middle],
            "n": np.full(grid.count, len(np.unique(grid.documents))),
        }
    ).with_columns(pl.col("median_low", "median_high").fill_nan(None))
    if null is not None:
        known = grid[null][grid.known()[:, 0]]
        medians = np.quantile(known, 0.5, axis=0) if len(known) else np.full(grid.count, np.nan)
        frame = frame.with_columns(null=pl.Series(medians)).fill_nan(None)
    return frame.select(pl.lit(_lens(grid)).alias("lens"), pl.all())


def _boxes(frame: pl.DataFrame, y_title: str, **more: Any) -> Figure:
    whiskers = {"whisker_low": "whisker_low", "whisker_high": "whisker_high"}
    return box(frame, y_title, facet="lens", **whiskers, **more)


def _probability(grids: dict[str, ExampleGrid]) -> Finding:
    """A22: how much probability the residual gives to what the model will say."""
    frame = pl.concat([_box(grid, "p_final", "p_final_permuted") for grid in grids.values()])
    grid = next(iter(grids.values()))
    first, last = (frame.row(at, named=True) for at in (0, grid.count - 1))
    null = "" if last["null"] is None else f"; of another example's prediction {chance(last['null'])}"
    return Finding(
        id="figure-10-probability-of-prediction",
        items=("A22",),
        title="How probable the residual finds what the model will say, in the output basis (Geva Figure 10)",
        says=f"Over {_prefixes(grid)}, read in the output basis ({first['lens']}), the median probability of the "
        f"model's prediction {went(first['median'], last['median'])} from {chance(first['median'])} in layer 0 to "
        f"{_median(last, '.2f')} before the feed-forward layer of layer {last['layer']}{null}.",
        frame=frame,
        figure=_boxes(frame, "probability"),
        paper="about 0 in layers 1-7 of 16, medians of 0.6-0.8 in layers 14-16",
        null="median probability of another example's prediction",
        resampled=_DOCUMENTS,
        notes=("boxes: quartiles over prefixes; whiskers: 5th to 95th percentile", _BASIS),
    )


def _median(row: dict[str, Any], form: str) -> str:
    """The median of a row with its interval, if there is one."""
    if row["median_low"] is None:
        return f"{row['median']:{form}} (no interval: n = {row['n']})"
    return f"{row['median']:{form}} [{row['median_low']:{form}}, {row['median_high']:{form}}]"


def _rank(grids: dict[str, ExampleGrid]) -> Finding:
    """A21 beside the argmax: the rank of what the model will say."""
    frame = pl.concat([_box(grid, "rank_final", None) for grid in grids.values()])
    first = frame.row(0, named=True)
    top = frame.filter(pl.col("lens") == first["lens"], pl.col("median") < 10)
    where = (
        f"is among the first ten from layer {top['layer'][0]} on"
        if top.height
        else "is never among the first ten"
    )
    return Finding(
        id="rank-of-prediction",
        items=("A21", "A76"),
        title="The rank of what the model will say, under the residual of each layer, in the output basis",
        says=f"Over {_prefixes(next(iter(grids.values())))}, read in the output basis ({first['lens']}), the "
        f"prediction has a median rank of {_median(first, ',.0f')} in layer 0 and {where}.",
        frame=frame,
        figure=_boxes(frame, "rank of the prediction (0 is first)", log_y=True),
        resampled=_DOCUMENTS,
        notes=("boxes: quartiles over prefixes; whiskers: 5th to 95th percentile", _BASIS),
    )


def cases(residual: np.ndarray, ffn: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Which of `CASES` each is, from first tokens (A23): every one is exactly one.

    residual     o says what r says, and y something else
    agreement    all three say the same
    composition  o says what neither says, and these differ
    ffn          o says what y says, and r something else
    violation    r and y say the same, and o does not: impossible where the lens is additive
    """
    same = residual == ffn
    conditions = [output == residual, output == ffn]
    return np.where(same, np.where(conditions[0], 1, 4), np.select(conditions, [0, 3], 2))


def _observed(grid: ExampleGrid) -> np.ndarray:
    return cases(grid["residual"], grid["ffn"], grid["output"])


def _null_cases(grid: ExampleGrid) -> np.ndarray:
    return cases(grid["residual"], grid.partners(grid["ffn"]), grid["permuted"])


def _stack(grid: ExampleGrid, which: np.ndarray, panel: str, among: np.ndarray | None = None) -> pl.DataFrame:
    parts = []
    for place, case in enumerate(CASES):
        share = grid.share((which == place), among)
        parts.append(series(share, case=case, panel=panel).drop("null", "null_low", "null_high"))
    return pl.concat(parts)


def _cases(grids: dict[str, ExampleGrid]) -> Finding:
    """A23: whose word the sum is."""
    main = next(iter(grids.values()))
    null = _null_cases(main)
    stacks = [_stack(grid, _observed(grid), _lens(grid)) for grid in grids.values()]
    stacks.append(_stack(main, null, f"another example's FFN output ({_lens(main)})", main.known()))
    changed, by_ffn = (
        _against(ASKED[name], main, overall=True) for name in ("changed", "by the layer's word")
    )
    kept, null_kept = (_rest(share) for share in (changed.own, changed.null))
    violations = {lens: float((_observed(grid) == 4).mean()) for lens, grid in grids.items()}
    return Finding(
        id="figure-11-cases",
        items=("A20", "A23"),
        title="Whose word is it after the feed-forward layer? (Geva Figure 11)",
        says=f"Over {_prefixes(main)} and all {main.count} layers ({_lens(main)}) the residual's first token survives "
        f"the feed-forward layer in {percent(kept, 0)} of cases, with another example's output in "
        f"{percent(null_kept, 0)}; where it changes, the new one is the feed-forward layer's own in "
        f"{percent(by_ffn.own, 0)}, with another's output in {percent(by_ffn.null, 0)}.",
        frame=pl.concat(stacks),
        figure=stack("prefixes (%)", color="case", facet="panel", share=True, order=CASES),
        paper="residual 60-85 % in most layers, the others small, ffn very small; violations impossible there",
        null=_PERMUTED,
        resampled=_DOCUMENTS,
        notes=tuple(
            f"violations under the {lens} lens: {100 * share:.2f} %" for lens, share in violations.items()
        ),
    )


def _rest(share: Interval) -> Interval:
    """What is left of a share, with the same n."""
    left = Interval(1 - share.value, 1 - share.high, 1 - share.low)
    return left if share.n is None else left.among(share.n)


def _changes(grids: dict[str, ExampleGrid]) -> Finding:
    """A23, the other way round: how often a feed-forward layer changes the first token, layer by layer."""
    grid = next(iter(grids.values()))
    by_lens = {lens: _against(ASKED["changed"], each) for lens, each in grids.items()}
    frame = pl.concat([beside.rows(lens=f"{lens} lens") for lens, beside in by_lens.items()])
    overall, layers = _against(ASKED["changed"], grid, overall=True), by_lens[grid.name]
    above, below = (layers.differs & (sign * layers.excess.value > 0) for sign in (1, -1))
    return Finding(
        id="changes-of-the-first-token",
        items=("A23",),
        title="How often a feed-forward layer changes the first token",
        says=f"Over {_prefixes(grid)} and all {grid.count} layers ({_lens(grid)}) a feed-forward layer changes the "
        f"residual's first token in {percent(overall.own, 0)} of cases, and another example's output would in "
        f"{percent(overall.null, 0)}: {points(overall.excess, 0)}. Layer by layer its own changes it more often in "
        f"{layers_named(above)} and less often in {layers_named(below)} (paired by prefix; of {grid.count} layers "
        "together at a false discovery rate of 5 %).",
        frame=frame,
        figure=_line(frame, "prefixes (%)", color="lens"),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
        notes=("the table has the paired difference of each layer: excess, excess_low, excess_high",),
        contrasts=(contrast("all layers", overall.excess, 0),),
    )


def _veto(grids: dict[str, ExampleGrid]) -> Finding:
    """A24: in compositions, does the new token come from the head of r, and does y push the old one down?"""
    questions = {
        f"the new token is among the residual's first {HEAD}": ASKED["from the head"],
        "the FFN puts the old token below its average token": ASKED["old one lowered"],
    }
    main = next(iter(grids.values()))
    frame = pl.concat(
        [
            _against(asked, grid).rows(question=question, lens=_lens(grid))
            for grid in grids.values()
            for question, asked in questions.items()
        ]
    )
    told: list[str] = []
    contrasts: list[Difference] = []
    for question, asked in questions.items():
        beside = _against(asked, main, overall=True)
        contrasts.append(contrast("old one lowered" if told else "from the head", beside.excess, 0))
        told.append(
            f"{question} in {percent(beside.own, 0)} of them and in {percent(beside.null, 0)} of the compositions "
            f"that another example's output makes ({points(beside.excess, 0)})"
        )
    mixed, other = (composed(side) & side.known() for side in (Quantities(main), Quantities(main, PARTNER)))
    return Finding(
        id="veto",
        items=("A24",),
        title="Is a composition a veto?",
        says=f"Of {int(mixed.sum()):,} compositions over {_prefixes(main)} and all layers ({_lens(main)}; with "
        f"another's output {int(other.sum()):,}), {told[0]}, and {told[1]}.",
        frame=frame,
        figure=_line(frame, "compositions (%)", color="lens", facet="question"),
        paper="conjectured: the layer vetoes the first token, and another from the head of the residual takes over",
        contrasts=tuple(contrasts),
        null=f"{_PERMUTED}: the compositions that it makes, asked the same",
        resampled=_DOCUMENTS,
        notes=("any output that displaces a token tends to score it low: the null displaces one, too",),
    )


def _veto_ranks(grid: ExampleGrid) -> Finding:
    """A24: the distributions behind `_veto`, over all layers."""
    columns = {
        "new token, under the residual": "rank_output",
        "old token, under the FFN output": "ffn_rank_residual",
    }
    own, partner = Quantities(grid), Quantities(grid, PARTNER)
    parts = [
        _against(asked, grid, overall=True).rows(token=token, rank=label).drop("layer")
        for token, column in columns.items()
        for label, asked in binned(column).items()
    ]
    medians = [
        f"{_middle(own, column)} (with another's output {_middle(partner, column)})"
        for column in columns.values()
    ]
    frame = pl.concat(parts)
    return Finding(
        id="veto-ranks",
        items=("A24",),
        title="Where compositions take their token from, and where they put the old one",
        says=f"In {int(composed(own).sum()):,} compositions of all layers the new token has a median rank of "
        f"{medians[0]} under the residual, and the old one of {medians[1]} under the feed-forward output "
        f"({_lens(grid)}).",
        frame=frame,
        figure=bar(
            frame, "compositions (%)", x="rank", x_title="rank (0 is first)", facet="token", share=True
        ),
        null=f"{_PERMUTED}: the compositions that it makes",
        resampled=_DOCUMENTS,
    )


def _middle(side: Quantities, column: str) -> str:
    """The median of a column over compositions."""
    values = side[column][composed(side) & side.known()]
    return f"{np.median(values):,.0f}" if len(values) else "undefined"


def binned(column: str) -> dict[str, ExampleFigure]:
    """The shares of compositions whose rank is in each bin, by what the bin is called."""
    edges = [*_BINS.values(), np.inf]
    return {
        label: _between(column, low, high) for label, low, high in zip(_BINS, edges, edges[1:], strict=False)
    }


def _between(column: str, low: float, high: float) -> ExampleFigure:
    return ExampleFigure(lambda of: (of[column] >= low) & (of[column] < high), composed)


def alike(grid: ExampleGrid) -> tuple[float, BesidePartner]:
    """A25: the cosine beyond which tokens are alike, and how often the two of a change in the last layer are."""
    unlike = (grid["residual"] != grid.partners(grid["output"])) & grid.known()
    unrelated = grid["similarity_unrelated"][:, -1][unlike[:, -1]]
    limit = float(np.quantile(unrelated, ALIKE)) if len(unrelated) else float("nan")
    asked = ExampleFigure(lambda of: of["similarity"] > limit, ASKED["cosine"].among)
    return limit, _against(asked, grid, overall=True)


def _similarity(grid: ExampleGrid) -> Finding:
    """A25: are the tokens of a change in the last layer alike, more than others that it might have changed to?"""
    limit, beside = alike(grid)
    cosine = _against(ASKED["cosine"], grid, overall=True)
    mixed = np.broadcast_to(ASKED["cosine"].among(Quantities(grid)), grid["residual"].shape)
    head = grid["similarity_head"]
    shares = {
        "share": grid.overall(head > limit, mixed),
        "mean": grid.mean(np.where(mixed, head, np.nan)).at(-1),
    }
    edges = np.linspace(-0.2, 1.0, 25)
    chosen = [
        (side, ASKED["cosine"].among(side) & side.known())
        for side in (Quantities(grid), Quantities(grid, PARTNER))
    ]
    cosines = {
        name: side["similarity"][which] for name, (side, which) in zip(("value", "null"), chosen, strict=True)
    }
    cosines["head"] = head[mixed]
    bins = {name: np.histogram(values, edges)[0] / max(len(values), 1) for name, values in cosines.items()}
    above = "unknown, for want of such pairs" if np.isnan(limit) else f"above {limit:.2f}"
    frame = pl.DataFrame({"from": edges[:-1], "to": edges[1:], **bins})
    return Finding(
        id="last-layer-similarity",
        items=("A25",),
        title="How alike the two tokens of a change in the last layer are",
        says=f"Of {int(mixed.sum()):,} compositions in layer {grid.count - 1} ({_lens(grid)}), "
        f"{percent(beside.own, 0)} are between tokens whose rows of the unembedding are more alike (cosine {above}) "
        f"than 95 % of unrelated pairs; of the {len(cosines['null']):,} that another example's output "
        f"makes {percent(beside.null, 0)} ({points(beside.excess, 0)}), of the old token with another of the "
        f"residual's first {HEAD} {percent(shares['share'])}. "
        f"The mean cosine is {number(cosine.own, 0)}, {number(cosine.null, 0)} and {number(shares['mean'])}.",
        frame=frame,
        figure=Figure(
            "histogram",
            "from",
            "value",
            "cosine of the two tokens",
            "compositions (%)",
            x2="to",
            null="null",
            share=True,
        ),
        paper="by hand: 34 of 100 changes to a related word, 66 to a distant one",
        contrasts=(contrast("alike", beside.excess, 0),),
        null="compositions that another example's feed-forward output makes of the same residuals",
        resampled=_DOCUMENTS,
        notes=(
            "a cosine is no annotation: `sheet` gives the pairs for one",
            "the head of a residual is alike in itself, and every composition takes its token from there: unrelated "
            "pairs are no chance for it",
        ),
    )


def changes(run: Run, count: int = PAIRS, seed: int = 0, lens: str = "own") -> pl.DataFrame:
    """At most `count` random compositions of the last layer, with the texts of their tokens (A25).

    Columns: example, context, position, text (the end of the prefix), before (the residual's token), ffn, after (the
    output's), similarity, and `other`: the output token of another example, for null items.
    """
    return _listed(run, refinement_grids(run)["model", lens], count, seed)


def _listed(run: Run, grid: ExampleGrid, count: int, seed: int) -> pl.DataFrame:
    layers = {name: grid[name][:, -1] for name in ("residual", "ffn", "output", "similarity")}
    mixed = np.flatnonzero((_observed(grid) == 2)[:, -1])
    rows = np.sort(np.random.default_rng(seed).permutation(mixed)[:count])
    words, places = run.vocabulary, grid.examples[rows]
    texts = run.contexts(places["context"].to_list()) if len(rows) else {}

    def token(column: np.ndarray) -> list[str]:
        return [words.label(int(number)) for number in column[rows]]

    ends = [
        "".join(words.pieces(texts[context].tokens[max(0, position + 1 - _WORDS) : position + 1].tolist()))
        for context, position in places.select("context", "position").iter_rows()
    ]
    other = grid.partners(layers["output"])
    return pl.DataFrame(
        {
            "example": places["example"],
            "context": places["context"],
            "position": places["position"],
            "text": pl.Series(ends, dtype=pl.String),
            "before": pl.Series(token(layers["residual"]), dtype=pl.String),
            "ffn": pl.Series(token(layers["ffn"]), dtype=pl.String),
            "after": pl.Series(token(layers["output"]), dtype=pl.String),
            "similarity": layers["similarity"][rows],
            "other": pl.Series(token(other), dtype=pl.String),
        }
    )


def sheet(listed: pl.DataFrame, seed: int = 0) -> tuple[str, str]:
    """A blinded sheet and its key, as JSON lines: is `after` related to `before`, or distant? (A25)

    Half of the items, chosen at random, show another example's token instead: what an annotator calls related among
    these is what chance gives. The sheet has id, text, before, after, and an empty judgement.
    """
    generator = np.random.default_rng(seed)
    null = generator.permutation(np.arange(listed.height) % 2 == 1)
    items, key = [], []
    for id_, row in enumerate(generator.permutation(listed.height).tolist()):
        item = listed.row(row, named=True)
        shown = {"id": id_, "text": item["text"], "before": item["before"]}
        items.append({**shown, "after": item["other" if null[row] else "after"], "judgement": ""})
        about = {name: item[name] for name in ("example", "similarity")}
        key.append({"id": id_, "null": bool(null[row]), **about})
    return _lines(items), _lines(key)


def _lines(items: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _last_layer(run: Run, grid: ExampleGrid) -> Finding:
    """A25: the pairs."""
    listed = _listed(run, grid, PAIRS, seed=0)
    pairs = [f"{row['before']} to {row['after']}" for row in listed.head(3).iter_rows(named=True)]
    return Finding(
        id="last-layer-changes",
        items=("A25",),
        title="Compositions of the last layer",
        says=f"{listed.height} random prefixes on which layer {grid.count - 1}, the last, settles on a token that "
        f"neither the residual nor the feed-forward output had first ({_lens(grid)})"
        + (f": {'; '.join(pairs)}." if pairs else "."),
        frame=listed.drop("other"),
        paper="people to same, later to earlier, gastric to stomach",
        notes=("`mnemoscope.studies.findings.refinement.sheet` makes a blinded sheet of them",),
    )
