"""From layer to layer: what the residual would predict, and what a feed-forward layer changes (A21-A25).

Geva et al. 2021, Section 5.2. The null of every change is another example's feed-forward output, added to the same
residual; the null of every agreement with the prediction is another example's prediction.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, quantile_by_document
from mnemoscope.studies.findings.finding import Figure, Finding, bar, box, chance, line, stack, went
from mnemoscope.studies.findings.statistics import ExampleGrid, percent, refinement_grids, series

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

CASES = ("residual", "agreement", "composition", "ffn", "violation")
LEVELS = {"whisker_low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "whisker_high": 0.95}
HEAD = 5  # tokens that are the head of a distribution (A24)
PAIRS = 100  # changes of the last layer that are listed (A25)
_BINS = {"0": 0, "1": 1, "2-4": 2, "5-9": 5, "10-99": 10, "100-999": 100, "1,000 on": 1000}
_WORDS = 12  # tokens of a prefix that are shown
_DOCUMENTS = "documents"
_PERMUTED = "another example's feed-forward output added to the same residual"


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
    frames, notes, main = [], [], None
    for (unit, lens), grid in units.items():
        prediction = grid.examples["prediction"].to_numpy()[:, None]
        residual = grid["residual"]
        share = grid.share(residual == prediction)
        null = grid.share((residual == grid.partners(prediction)), grid.known())
        name = _lens(grid) if unit == "model" else f"shuffled weights, {lens} lens"
        frames.append(series(share, null, series=name))
        main = main or (share, null)
        if unit == "model" and lens != next(iter(units))[1]:
            notes.append(_differs(main[0], share, lens))
    assert main is not None
    share, null = main
    half = np.flatnonzero(share.value >= 0.5)
    reached = f"it passes half at layer {half[0]}" if len(half) else "it never reaches half"
    frame = pl.concat(frames)
    return Finding(
        id="figure-9-residual-is-prediction",
        items=("A21",),
        title="Does the residual already say what the model will say? (Geva Figure 9)",
        says=f"Before the feed-forward layer, the residual's first token is the model's prediction in "
        f"{percent(share, 0)} of prefixes in layer 0 and {percent(share, -1)} in the last; {reached}. Another "
        f"example's prediction is met in {percent(null, -1)} in the last.",
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
        }
    )
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
    last = frame.filter(pl.col("layer") == frame["layer"].max()).row(0, named=True)
    first = frame.row(0, named=True)
    return Finding(
        id="figure-10-probability-of-prediction",
        items=("A22",),
        title="How probable the residual finds what the model will say (Geva Figure 10)",
        says=f"The median probability of the model's prediction {went(first['median'], last['median'])} from "
        f"{chance(first['median'])} in layer 0 to {last['median']:.2f} "
        f"[{last['median_low']:.2f}, {last['median_high']:.2f}] before the last feed-forward layer ({first['lens']}).",
        frame=frame,
        figure=_boxes(frame, "probability"),
        paper="about 0 in layers 1-7 of 16, medians of 0.6-0.8 in layers 14-16",
        null="median probability of another example's prediction",
        resampled=_DOCUMENTS,
        notes=("boxes: quartiles over prefixes; whiskers: 5th to 95th percentile",),
    )


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
        title="The rank of what the model will say, under the residual of each layer",
        says=f"The prediction has a median rank of {first['median']:,.0f} [{first['median_low']:,.0f}, "
        f"{first['median_high']:,.0f}] in layer 0 and {where} ({first['lens']}).",
        frame=frame,
        figure=_boxes(frame, "rank of the prediction (0 is first)", log_y=True),
        resampled=_DOCUMENTS,
        notes=("boxes: quartiles over prefixes; whiskers: 5th to 95th percentile",),
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
    for number, case in enumerate(CASES):
        share = grid.share((which == number), among)
        parts.append(series(share, case=case, panel=panel).drop("null", "null_low", "null_high"))
    return pl.concat(parts)


def _cases(grids: dict[str, ExampleGrid]) -> Finding:
    """A23: whose word the sum is."""
    main = next(iter(grids.values()))
    which, null = _observed(main), _null_cases(main)
    stacks = [_stack(grid, _observed(grid), _lens(grid)) for grid in grids.values()]
    stacks.append(_stack(main, null, f"another example's FFN output ({_lens(main)})", main.known()))
    changed = (which == 2) | (which == 3) | (which == 4)
    kept, to_ffn = main.overall(~changed), main.overall((which == 3), changed)
    violations = {lens: float((_observed(grid) == 4).mean()) for lens, grid in grids.items()}
    return Finding(
        id="figure-11-cases",
        items=("A20", "A23"),
        title="Whose word is it after the feed-forward layer? (Geva Figure 11)",
        says=f"Over all layers the residual's first token survives the feed-forward layer in {percent(kept)} of cases; "
        f"where it changes, the new one is the feed-forward layer's own in {percent(to_ffn)}.",
        frame=pl.concat(stacks),
        figure=stack("prefixes (%)", color="case", facet="panel", share=True, order=CASES),
        paper="residual 60-85 % in most layers, the others small, ffn very small; violations impossible there",
        null=_PERMUTED,
        resampled=_DOCUMENTS,
        notes=tuple(
            f"violations under the {lens} lens: {100 * share:.2f} %" for lens, share in violations.items()
        ),
    )


def _changes(grids: dict[str, ExampleGrid]) -> Finding:
    """A23, the other way round: how often a feed-forward layer changes the first token."""
    frames, overall = [], []
    for grid in grids.values():
        residual, known = grid["residual"], grid.known()
        changed = grid["output"] != residual
        permuted = grid["permuted"] != residual
        frames.append(series(grid.share(changed), grid.share(permuted, known), lens=_lens(grid)))
        overall.append((grid, grid.overall(changed), grid.overall(permuted, known)))
    grid, own, null = overall[0]
    frame = pl.concat(frames)
    return Finding(
        id="changes-of-the-first-token",
        items=("A23",),
        title="How often a feed-forward layer changes the first token",
        says=f"A feed-forward layer changes the residual's first token in {percent(own)} of cases, and another "
        f"example's output would in {percent(null)} ({_lens(grid)}).",
        frame=frame,
        figure=_line(frame, "prefixes (%)", color="lens"),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
    )


def _veto(grids: dict[str, ExampleGrid]) -> Finding:
    """A24: in compositions, does the new token come from the head of r, and does y push the old one down?"""
    frames, says = list[pl.DataFrame](), list[str]()
    for grid in grids.values():
        mixed = _observed(grid) == 2
        other = (_null_cases(grid) == 2) & grid.known()
        old, old_null = grid["ffn_z_residual"] < 0, grid["ffn_z_residual_permuted"] < 0
        new, new_null = grid["rank_output"] < HEAD, grid["rank_output_permuted"] < HEAD
        asked = {
            f"the new token is among the residual's first {HEAD}": (new, mixed, new_null, other),
            "the FFN puts the old token below its average token": (
                old,
                mixed,
                old_null,
                mixed & grid.known(),
            ),
        }
        for question, (hits, among, null, null_among) in asked.items():
            band = grid.share(null, null_among)
            frames.append(series(grid.share(hits, among), band, question=question, lens=_lens(grid)))
            if len(says) < 2:
                by_chance = percent(grid.overall(null, null_among))
                says.append(f"{question} in {percent(grid.overall(hits, among))} (by chance {by_chance})")
    frame = pl.concat(frames)
    return Finding(
        id="veto",
        items=("A24",),
        title="Is a composition a veto?",
        says=f"Of compositions, {says[0]}, and {says[1]}.",
        frame=frame,
        figure=_line(frame, "compositions (%)", color="lens", facet="question"),
        paper="conjectured: the layer vetoes the first token, and another from the head of the residual takes over",
        null=f"{_PERMUTED}: its compositions, and what it does to the old token",
        resampled=_DOCUMENTS,
    )


def _veto_ranks(grid: ExampleGrid) -> Finding:
    """A24: the distributions behind `_veto`, over all layers."""
    mixed, other = _observed(grid) == 2, (_null_cases(grid) == 2) & grid.known()
    asked = {
        "new token, under the residual": ("rank_output", mixed, "rank_output_permuted", other),
        "old token, under the FFN output": (
            "ffn_rank_residual",
            mixed,
            "ffn_rank_residual_permuted",
            mixed & grid.known(),
        ),
    }
    parts, medians = list[pl.DataFrame](), list[float]()
    edges = [*_BINS.values(), np.inf]
    for token, (column, among, null, null_among) in asked.items():
        ranks, null_ranks = grid[column], grid[null]
        medians.append(float(np.median(ranks[among])) if among.any() else float("nan"))
        for label, low, high in zip(_BINS, edges, edges[1:], strict=False):
            inside = grid.overall(((ranks >= low) & (ranks < high)), among)
            chance = grid.overall(((null_ranks >= low) & (null_ranks < high)), null_among)
            share, band = (Interval(*map(np.atleast_1d, numbers)) for numbers in (inside, chance))
            parts.append(series(share, band, token=token, rank=label).drop("layer"))
    frame = pl.concat(parts)
    return Finding(
        id="veto-ranks",
        items=("A24",),
        title="Where compositions take their token from, and where they put the old one",
        says=f"In compositions of all layers the new token has a median rank of {medians[0]:,.0f} under the residual, "
        f"and the old one of {medians[1]:,.0f} under the feed-forward output ({_lens(grid)}).",
        frame=frame,
        figure=bar(
            frame, "compositions (%)", x="rank", x_title="rank (0 is first)", facet="token", share=True
        ),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
    )


def _similarity(grid: ExampleGrid) -> Finding:
    """A25: are the tokens of a change in the last layer alike?"""
    mixed = (_observed(grid) == 2)[:, -1]
    near = grid["similarity"][:, -1]
    null = grid["similarity_permuted"][:, -1]
    unlike = grid["residual"] != grid.partners(grid["output"])
    known = (grid.known() & unlike)[:, -1]
    limit = float(np.quantile(null[known], 0.95)) if known.any() else float("nan")
    alike = grid.overall((near > limit)[:, None], mixed[:, None])
    edges = np.linspace(-0.2, 1.0, 25)
    counts = np.histogram(near[mixed], edges)[0]
    chance = np.histogram(null[known], edges)[0]
    frame = pl.DataFrame(
        {
            "from": edges[:-1],
            "to": edges[1:],
            "value": counts / max(counts.sum(), 1),
            "null": chance / max(chance.sum(), 1),
        }
    )
    return Finding(
        id="last-layer-similarity",
        items=("A25",),
        title="How alike the two tokens of a change in the last layer are",
        says=f"Of {int(mixed.sum())} compositions in the last layer, {percent(alike)} are between tokens whose rows of "
        f"the unembedding are more alike (cosine above {limit:.2f}) than 95 % of unrelated pairs.",
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
        null="the residual's token with another example's output token, where these differ",
        resampled=_DOCUMENTS,
        notes=("a cosine is no annotation: `sheet` gives the pairs for one",),
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
    for number, row in enumerate(generator.permutation(listed.height).tolist()):
        item = listed.row(row, named=True)
        shown = {"id": number, "text": item["text"], "before": item["before"]}
        items.append({**shown, "after": item["other" if null[row] else "after"], "judgement": ""})
        about = {name: item[name] for name in ("example", "similarity")}
        key.append({"id": number, "null": bool(null[row]), **about})
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
        says=f"{listed.height} random prefixes on which the last layer settles on a token that neither side had first"
        + (f": {'; '.join(pairs)}." if pairs else "."),
        frame=listed.drop("other"),
        paper="people to same, later to earlier, gastric to stomach",
        notes=("`mnemoscope.studies.findings.refinement.sheet` makes a blinded sheet of them",),
    )
