"""From layer to layer: what the residual would predict, and what a feed-forward layer changes (A21-A25).

Geva et al. 2021, Section 5.2. The null of every change is another example's feed-forward output, added to the same
residual; the null of every agreement with the prediction is another example's prediction.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval
from mnemoscope.studies.findings.finding import Figure, Finding, chance, went
from mnemoscope.studies.findings.statistics import Layers, load, percent, quantile_by_document, series

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
    units = load(run)
    mine = {lens: found for (unit, lens), found in units.items() if unit == "model"}
    main = next(iter(mine.values()))
    return [
        _agreement(units),
        _probability(mine),
        _rank(mine),
        _cases(mine),
        _changes(mine),
        _veto(mine),
        _veto_ranks(main),
        _similarity(main),
        _last_layer(run, main),
    ]


def _lens(found: Layers) -> str:
    return f"{found.lens} lens"


def _agreement(units: dict[tuple[str, str], Layers]) -> Finding:
    """A21: how often the residual's first token is what the model will say."""
    frames, notes, main = [], [], None
    for (unit, lens), found in units.items():
        prediction = found.examples["prediction"].to_numpy()[:, None]
        residual = found.grid("residual")
        share = found.share((residual == prediction).astype(float))
        null = found.share((residual == found.partners(prediction)).astype(float), found.known())
        name = _lens(found) if unit == "model" else f"shuffled weights, {lens} lens"
        frames.append(series(share, null, series=name))
        main = main or (share, null)
        if unit == "model" and lens != next(iter(units))[1]:
            notes.append(_differs(main[0], share, lens))
    assert main is not None
    share, null = main
    half = np.flatnonzero(share.value >= 0.5)
    reached = f"it passes half at layer {half[0]}" if len(half) else "it never reaches half"
    return Finding(
        id="figure-9-residual-is-prediction",
        items=("A21",),
        title="Does the residual already say what the model will say? (Geva Figure 9)",
        says=f"Before the feed-forward layer, the residual's first token is the model's prediction in "
        f"{percent(share, 0)} of prefixes in layer 0 and {percent(share, -1)} in the last; {reached}. Another "
        f"example's prediction is met in {percent(null, -1)} in the last.",
        frame=pl.concat(frames),
        figure=_line("prefixes (%)", color="series"),
        paper="about 0 in layer 1 of 16, 20-40 % by layer 9, about 95 % in layer 16",
        null="another example's prediction, permuted so that tokens stay as frequent",
        resampled=_DOCUMENTS,
        notes=tuple(notes),
    )


def _differs(one: Interval, other: Interval, lens: str) -> str:
    gap = np.abs(one.value - other.value)
    at = int(np.nanargmax(gap))
    return f"the {lens} lens differs most in layer {at}: {percent(other, at)} instead of {percent(one, at)}"


def _line(title: str, **more: Any) -> Figure:
    return Figure(
        "line",
        "layer",
        "value",
        "layer",
        title,
        low="low",
        high="high",
        null="null",
        null_low="null_low",
        null_high="null_high",
        **{"share": True, **more},
    )


def _box(found: Layers, column: str, null: str | None) -> pl.DataFrame:
    """Quantiles by layer, with the interval of the median, and the null's median where there is a column of it."""
    quantiles = quantile_by_document(found.grid(column), found.documents, tuple(LEVELS.values()))
    middle = list(LEVELS).index("median")
    frame = pl.DataFrame(
        {
            "layer": np.arange(found.count),
            **{name: quantiles.value[at] for at, name in enumerate(LEVELS)},
            "median_low": quantiles.low[middle],
            "median_high": quantiles.high[middle],
        }
    )
    if null is not None:
        known = found.grid(null)[found.known()[:, 0]]
        medians = np.quantile(known, 0.5, axis=0) if len(known) else np.full(found.count, np.nan)
        frame = frame.with_columns(null=pl.Series(medians)).fill_nan(None)
    return frame.select(pl.lit(_lens(found)).alias("lens"), pl.all())


def _boxes(y_title: str, **more: Any) -> Figure:
    return Figure(
        "box", "layer", "median", "layer", y_title, low="quarter", high="three_quarters", whisker_low="whisker_low",
        whisker_high="whisker_high", facet="lens", **more,
    )  # fmt: skip


def _probability(mine: dict[str, Layers]) -> Finding:
    """A22: how much probability the residual gives to what the model will say."""
    frame = pl.concat([_box(found, "p_final", "p_final_permuted") for found in mine.values()])
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
        figure=_boxes("probability", null="null"),
        paper="about 0 in layers 1-7 of 16, medians of 0.6-0.8 in layers 14-16",
        null="median probability of another example's prediction",
        resampled=_DOCUMENTS,
        notes=("boxes: quartiles over prefixes; whiskers: 5th to 95th percentile",),
    )


def _rank(mine: dict[str, Layers]) -> Finding:
    """A21 beside the argmax: the rank of what the model will say."""
    frame = pl.concat([_box(found, "rank_final", None) for found in mine.values()])
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
        figure=_boxes("rank of the prediction (0 is first)", log_y=True),
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


def _observed(found: Layers) -> np.ndarray:
    return cases(found.grid("residual"), found.grid("ffn"), found.grid("output"))


def _null_cases(found: Layers) -> np.ndarray:
    return cases(found.grid("residual"), found.partners(found.grid("ffn")), found.grid("permuted"))


def _stack(found: Layers, which: np.ndarray, panel: str, among: np.ndarray | None = None) -> pl.DataFrame:
    parts = []
    for number, case in enumerate(CASES):
        share = found.share((which == number).astype(float), among)
        parts.append(series(share, case=case, panel=panel).drop("null", "null_low", "null_high"))
    return pl.concat(parts)


def _cases(mine: dict[str, Layers]) -> Finding:
    """A23: whose word the sum is."""
    main = next(iter(mine.values()))
    which, null = _observed(main), _null_cases(main)
    stacks = [_stack(found, _observed(found), _lens(found)) for found in mine.values()]
    stacks.append(_stack(main, null, f"another example's FFN output ({_lens(main)})", main.known()))
    changed = (which == 2) | (which == 3) | (which == 4)
    kept, to_ffn = main.overall((~changed).astype(float)), main.overall((which == 3).astype(float), changed)
    violations = {lens: float((_observed(found) == 4).mean()) for lens, found in mine.items()}
    return Finding(
        id="figure-11-cases",
        items=("A20", "A23"),
        title="Whose word is it after the feed-forward layer? (Geva Figure 11)",
        says=f"Over all layers the residual's first token survives the feed-forward layer in {percent(kept)} of cases; "
        f"where it changes, the new one is the feed-forward layer's own in {percent(to_ffn)}.",
        frame=pl.concat(stacks),
        figure=Figure(
            "stack",
            "layer",
            "value",
            "layer",
            "prefixes (%)",
            color="case",
            facet="panel",
            share=True,
            order=CASES,
        ),
        paper="residual 60-85 % in most layers, the others small, ffn very small; violations impossible there",
        null=_PERMUTED,
        resampled=_DOCUMENTS,
        notes=tuple(
            f"violations under the {lens} lens: {100 * share:.2f} %" for lens, share in violations.items()
        ),
    )


def _changes(mine: dict[str, Layers]) -> Finding:
    """A23, the other way round: how often a feed-forward layer changes the first token."""
    frames, overall = [], []
    for found in mine.values():
        residual, known = found.grid("residual"), found.known()
        changed = (found.grid("output") != residual).astype(float)
        permuted = (found.grid("permuted") != residual).astype(float)
        frames.append(series(found.share(changed), found.share(permuted, known), lens=_lens(found)))
        overall.append((found, found.overall(changed), found.overall(permuted, known)))
    found, own, null = overall[0]
    return Finding(
        id="changes-of-the-first-token",
        items=("A23",),
        title="How often a feed-forward layer changes the first token",
        says=f"A feed-forward layer changes the residual's first token in {percent(own)} of cases, and another "
        f"example's output would in {percent(null)} ({_lens(found)}).",
        frame=pl.concat(frames),
        figure=_line("prefixes (%)", color="lens"),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
    )


def _veto(mine: dict[str, Layers]) -> Finding:
    """A24: in compositions, does the new token come from the head of r, and does y push the old one down?"""
    frames, says = list[pl.DataFrame](), list[str]()
    for found in mine.values():
        mixed = _observed(found) == 2
        other = (_null_cases(found) == 2) & found.known()
        old, old_null = found.grid("ffn_z_residual") < 0, found.grid("ffn_z_residual_permuted") < 0
        new, new_null = found.grid("rank_output") < HEAD, found.grid("rank_output_permuted") < HEAD
        asked = {
            f"the new token is among the residual's first {HEAD}": (new, mixed, new_null, other),
            "the FFN puts the old token below its average token": (
                old,
                mixed,
                old_null,
                mixed & found.known(),
            ),
        }
        for question, (hits, among, null, null_among) in asked.items():
            share = found.share(hits.astype(float), among)
            frames.append(
                series(
                    share, found.share(null.astype(float), null_among), question=question, lens=_lens(found)
                )
            )
            if len(says) < 2:
                by_chance = percent(found.overall(null.astype(float), null_among))
                says.append(
                    f"{question} in {percent(found.overall(hits.astype(float), among))} (by chance {by_chance})"
                )
    return Finding(
        id="veto",
        items=("A24",),
        title="Is a composition a veto?",
        says=f"Of compositions, {says[0]}, and {says[1]}.",
        frame=pl.concat(frames),
        figure=_line("compositions (%)", color="lens", facet="question"),
        paper="conjectured: the layer vetoes the first token, and another from the head of the residual takes over",
        null=f"{_PERMUTED}: its compositions, and what it does to the old token",
        resampled=_DOCUMENTS,
    )


def _veto_ranks(found: Layers) -> Finding:
    """A24: the distributions behind `_veto`, over all layers."""
    mixed, other = _observed(found) == 2, (_null_cases(found) == 2) & found.known()
    asked = {
        "new token, under the residual": ("rank_output", mixed, "rank_output_permuted", other),
        "old token, under the FFN output": (
            "ffn_rank_residual",
            mixed,
            "ffn_rank_residual_permuted",
            mixed & found.known(),
        ),
    }
    parts, medians = list[pl.DataFrame](), list[float]()
    edges = [*_BINS.values(), np.inf]
    for token, (column, among, null, null_among) in asked.items():
        ranks, null_ranks = found.grid(column), found.grid(null)
        medians.append(float(np.median(ranks[among])) if among.any() else float("nan"))
        for label, low, high in zip(_BINS, edges, edges[1:], strict=False):
            inside = found.overall(((ranks >= low) & (ranks < high)).astype(float), among)
            chance = found.overall(((null_ranks >= low) & (null_ranks < high)).astype(float), null_among)
            one, other = (Interval(*map(np.atleast_1d, part)) for part in (inside, chance))
            parts.append(series(one, other, token=token, rank=label).drop("layer"))
    return Finding(
        id="veto-ranks",
        items=("A24",),
        title="Where compositions take their token from, and where they put the old one",
        says=f"In compositions of all layers the new token has a median rank of {medians[0]:,.0f} under the residual, "
        f"and the old one of {medians[1]:,.0f} under the feed-forward output ({_lens(found)}).",
        frame=pl.concat(parts),
        figure=Figure(
            "bar", "rank", "value", "rank (0 is first)", "compositions (%)", low="low", high="high",
            null="null", null_low="null_low", null_high="null_high", facet="token", share=True,
        ),
        null=_PERMUTED,
        resampled=_DOCUMENTS,
    )  # fmt: skip


def _similarity(found: Layers) -> Finding:
    """A25: are the tokens of a change in the last layer alike?"""
    mixed = (_observed(found) == 2)[:, -1]
    near = found.grid("similarity")[:, -1]
    null = found.grid("similarity_permuted")[:, -1]
    unlike = found.grid("residual") != found.partners(found.grid("output"))
    known = (found.known() & unlike)[:, -1]
    limit = float(np.quantile(null[known], 0.95)) if known.any() else float("nan")
    alike = found.overall((near > limit).astype(float)[:, None], mixed[:, None])
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
    return _listed(run, load(run)["model", lens], count, seed)


def _listed(run: Run, found: Layers, count: int, seed: int) -> pl.DataFrame:
    layers = {name: found.grid(name)[:, -1] for name in ("residual", "ffn", "output", "similarity")}
    mixed = np.flatnonzero((_observed(found) == 2)[:, -1])
    rows = np.sort(np.random.default_rng(seed).permutation(mixed)[:count])
    words, places = run.vocabulary, found.examples[rows]
    texts = run.contexts(places["context"].to_list()) if len(rows) else {}

    def token(column: np.ndarray) -> list[str]:
        return [words.label(int(one)) for one in column[rows]]

    ends = [
        "".join(words.pieces(texts[context].tokens[max(0, at + 1 - _WORDS) : at + 1].tolist()))
        for context, at in places.select("context", "position").iter_rows()
    ]
    other = found.partners(layers["output"])
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


def _last_layer(run: Run, found: Layers) -> Finding:
    """A25: the pairs."""
    listed = _listed(run, found, PAIRS, seed=0)
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
