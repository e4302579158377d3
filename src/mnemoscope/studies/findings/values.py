"""Values as predictions: does a value say what follows its triggers? (Geva et al. 2021, Section 4; A10-A15, A75)

A value is read with the sign of the coefficient that writes it: for triggers of polarity -1 its prediction is the token
that it suppresses most. The null keeps how often tokens occur: the next tokens of the strongest triggers of a layer are
dealt out anew among its neurons, in a mixture among those of an expert, because a router has chosen what these see.
(1/V, the papers' base line, is beaten by whatever says " the".)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import (
    Interval,
    by_document,
    chance_of_zero,
    discoveries,
    groups_of,
    jackknifed,
    ratio,
    share_by_group,
)
from mnemoscope.studies.findings.finding import Finding, box, chance, line, of_row
from mnemoscope.studies.findings.statistics import (
    BOXES,
    ContextTokens,
    columns,
    contrast,
    layers_named,
    number,
    percent,
    quantiles,
)

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SHUFFLES = 200
OFFSETS = range(-4, 5)  # tokens from the trigger's last one
CONFIDENT = 100  # values of the largest probability (A14)
EXAMPLES = 24
_KEY = ["layer", "neuron", "polarity"]
_DEALT = "targets dealt out anew among the neurons of the {among} ({times} times): mean, 2.5th to 97.5th percentile"


def findings(run: Run) -> list[Finding]:
    """Everything that the tables of any run answer; ranks are in `value_ranks`.

    Of an encoder how peaked values are (A10): the others are about the token that follows a trigger.
    """
    if run.manifest.model.bidirectional:
        return [_spread(run)]
    rows = triggers(run)
    best = _precise(run, rows)
    return [
        _spread(run),
        _agreement(run, rows),
        _duality(run, rows),
        _confident(run, rows, best),
        _examples(run, best),
    ]


def triggers(run: Run) -> pl.DataFrame:
    """One row per trigger that is followed by a token; polarity -1 only in gated models.

    side                   number of the neuron, times two, and one more for polarity -1
    layer, polarity, rank  of the trigger
    among                  the same number of neurons that run on the same tokens (`Cells.among`)
    next, last             the token after it, and its last one
    top                    the token that its value writes first at that sign
    place, before, after   where its last token is in all of the text, and how many tokens of the context lie around
    document               whose text it is
    """
    model = run.manifest.model
    side = model.cells.side()
    followed = run.table("triggers").filter(pl.col("next_token").is_not_null())
    followed = followed if model.gated else followed.filter(polarity=1)
    rows = followed.select(
        side, "layer", "polarity", "rank", "context", "position", next="next_token"
    ).collect()
    first = run.table("values").filter(pl.col("rank") == 0).select(side, "token").collect()
    # Looked up by number: joins of millions of rows on three columns take many times as long.
    top = np.zeros(2 * len(model.cells), np.int32)
    top[first["side"].to_numpy()] = first["token"].to_numpy()
    text = ContextTokens(run)
    place = text.place(rows)
    return rows.select("side", "layer", "polarity", "rank", "next", before="position").with_columns(
        among=pl.Series(model.cells.among(rows["side"].to_numpy() // 2)),
        top=pl.Series(top[rows["side"].to_numpy()]),
        last=pl.Series(text.tokens[place]),
        document=pl.Series(text.document[place]),
        place=pl.Series(place),
        after=pl.Series(text.ends[place] - place - 1),
    )


def _spread(run: Run) -> Finding:
    """A10: how peaked values are, as distributions."""
    size = run.manifest.model.vocabulary
    entropy = pl.col("value_entropy")
    frame = (
        run.table("neurons")
        .group_by("layer")
        .agg(
            *quantiles(entropy),
            largest_probability=pl.col("value_max_probability").median(),
            neurons=pl.len(),
        )
        .sort("layer")
        .with_columns(uniform=pl.lit(float(np.log(size))))
        .collect()
    )
    low, high = frame.row(0, named=True), frame.row(-1, named=True)
    return Finding(
        id="value-entropy",
        items=("A10",),
        title="How peaked values are as distributions",
        says=f"Over the {low['neurons']:,} values of a layer, the median entropy is {low['median']:.2f} nats in layer "
        f"0 and {high['median']:.2f} in layer {high['layer']}, where ln {size:,} = {np.log(size):.2f} would be no "
        f"preference; the median probability of a value's first token is {chance(low['largest_probability'])} and "
        f"{chance(high['largest_probability'])}.",
        frame=frame,
        figure=box(frame, "entropy of the value (nats)", null="uniform"),
        null="a uniform distribution over the vocabulary",
        notes=(_lens(run), BOXES),
    )


def _lens(run: Run) -> str:
    lens = run.manifest.options.get("values_lens", "own")
    return (
        f"read under the {lens} lens: its scale changes entropies and probabilities, hardly the first token"
    )


def _agreement(run: Run, rows: pl.DataFrame) -> Finding:
    """A11, and A75's other mode: is the value's first token the one after, or the last of, the strongest trigger?"""
    first = rows.filter(pl.col("rank") == 0)
    layers = run.manifest.model.layers
    parts, agreements = [], {}
    for side in first["polarity"].unique(maintain_order=True):
        triggers = first.filter(pl.col("polarity") == side)
        for mode in ("next", "last"):
            agreement = agreements[side, mode] = TriggerAgreement.of(triggers, mode, layers)
            parts.append(_layers(agreement.share, agreement.dealt, side, mode))
    frame = pl.concat(parts)
    return Finding(
        id="figure-4-agreement",
        items=("A11", "A75"),
        title="Does a value predict what follows its strongest trigger? (Geva Figure 4)",
        says=_says_agreement(agreements[1, "next"], run.manifest.model.cells.together),
        frame=frame,
        figure=line(frame, "neurons that agree (%)", y="share", color="target", facet="polarity", share=True),
        paper="next token: about 0 in layers 1-10 of 16, then rising to 3.5 %; drawn against 1/V = 0.0004 %",
        null=_DEALT.format(times=SHUFFLES, among=run.manifest.model.cells.together),
        resampled="documents of the triggers",
        notes=(
            "a prediction is the first token of the value, read with the sign of the coefficient",
            "the layer of the peak is drawn anew with the documents: its interval is over where the peak is",
        ),
        contrasts=(contrast("next", agreements[1, "next"].overall),),
    )


@dataclass(frozen=True)
class TriggerAgreement:
    """How often the first tokens of values are those of their strongest triggers, layer by layer, and by chance.

    share  of the neurons of each layer
    dealt  f64[time, layer]: the same with the targets of neurons that run together dealt out anew
    sums   f64[document, 3, layer]: triggers that agree, that would by chance (expectation), and that there are
    """

    share: Interval
    dealt: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, triggers: pl.DataFrame, mode: str, layers: int) -> TriggerAgreement:
        """Of the strongest triggers of one polarity: columns layer, among, top, document and `mode`."""
        top, target, documents = (triggers[name].to_numpy() for name in ("top", mode, "document"))
        layer, among = (triggers[name].to_numpy().astype(np.int64) for name in ("layer", "among"))
        hits = (target == top).astype(float)
        expected = by_chance(top, target, among)
        ids, place = np.unique(documents, return_inverse=True)
        cell, size = place * layers + layer, len(ids) * layers
        sums = [np.bincount(cell, weights, size) for weights in (hits, expected, np.ones(len(hits)))]
        return cls(
            share_by_group(hits, layer, layers, documents),
            dealt(top, target, layer, layers, among),
            np.stack([column.reshape(len(ids), layers) for column in sums], axis=1),
        )

    @property
    def excess(self) -> Interval:
        """f64[layer]: the share less the one by chance."""
        return by_document(self.sums, np.arange(len(self.sums)), _beyond_chance)

    @property
    def overall(self) -> Interval:
        """The same of all layers together."""
        return by_document(self.sums.sum(2), np.arange(len(self.sums)), _beyond_chance)

    @property
    def above(self) -> np.ndarray:
        """bool[layer]: where it is above chance, of all layers together (Benjamini and Hochberg)."""
        p = chance_of_zero(self.sums, np.arange(len(self.sums)), _beyond_chance)
        return discoveries(p) & (_beyond_chance(self.sums.sum(0, keepdims=True))[0] > 0)

    @property
    def peak(self) -> Interval:
        """The layer with the largest share."""

        def layer(sums: np.ndarray) -> np.ndarray:
            return np.nan_to_num(ratio(sums[:, 0], sums[:, 2]), nan=-1).argmax(-1).astype(float)

        return by_document(self.sums, np.arange(len(self.sums)), layer, corrected=False)


def _beyond_chance(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[:, 0] - sums[:, 1], sums[:, 2])


def by_chance(top: np.ndarray, target: np.ndarray, group: np.ndarray) -> np.ndarray:
    """f64[row]: the chance that the row's first token meets a target dealt out of its group, its own among them."""
    size = int(max(top.max(initial=0), target.max(initial=0))) + 1
    out = np.zeros(len(top))
    for member in np.unique(group):
        inside = group == member
        out[inside] = np.bincount(target[inside], minlength=size)[top[inside]] / inside.sum()
    return out


def _layers(share: Interval, null: np.ndarray, side: int, mode: str) -> pl.DataFrame:
    low, high = np.quantile(null, (0.025, 0.975), axis=0)
    return pl.DataFrame(
        {
            "polarity": _side(side),
            "target": f"{mode} token",
            "layer": np.arange(len(share.value)),
            **columns(share, "share", Interval(null.mean(0), low, high)),
        }
    ).with_columns(pl.selectors.float().fill_nan(None))


def _side(side: int) -> str:
    return "largest coefficients" if side > 0 else "most negative coefficients"


def dealt(
    top: np.ndarray,
    target: np.ndarray,
    group: np.ndarray,
    count: int,
    among: np.ndarray | None = None,
    *,
    times: int = SHUFFLES,
    seed: int = 0,
) -> np.ndarray:
    """f64[time, group]: the share that agrees when targets are dealt out anew in each group; NaN if it is empty.

    among  i64[row]: parts of groups, if targets are dealt out within these
    """
    generator = np.random.default_rng(seed)
    among = group if among is None else among
    out = np.full((times, count), np.nan)
    for member in np.unique(group):
        rows = np.flatnonzero(group == member)
        dealt_together = [rows[among[rows] == number] for number in np.unique(among[rows])]
        out[:, member] = [
            sum((top[own] == generator.permutation(target[own])).sum() for own in dealt_together) / len(rows)
            for _ in range(times)
        ]
    return out


def _says_agreement(found: TriggerAgreement, among: str) -> str:
    share, layers = found.share.value, len(found.share.value)
    peak = int(np.nanargmax(share))
    lower = [layer for layer in range(layers) if 3 * layer < 2 * layers]
    usual = np.nanmean(found.dealt, axis=0) if len(found.dealt) else np.full(layers, np.nan)
    most = float(np.nanmax(np.nan_to_num(found.dealt, nan=-1.0), axis=1).mean())
    above = found.above
    return (
        f"Of {int(found.sums[:, 2].sum()):,} neurons (largest coefficients) with strongest triggers in "
        f"{len(found.sums):,} documents, the value's first token is the token after the trigger most often in layer "
        f"{number(found.peak, form='.0f')} of {layers}: {percent(found.share, peak)} of its neurons, with targets "
        f"dealt out anew in the {among} {usual[peak]:.2%} there and {most:.2%} wherever that is largest. In the lower "
        f"two thirds of the layers it is {np.nanmax(share[lower]):.1%} at most; it is above chance in "
        f"{layers_named(above)} ({int(above.sum())} of {layers} at a false discovery rate of 5 %)."
    )


def _duality(run: Run, rows: pl.DataFrame) -> Finding:
    """A75: which token of the text the value's first token is, by distance from the trigger's end."""
    text = ContextTokens(run)
    layers = run.manifest.model.layers
    groups = min(3, layers)
    third = rows["layer"].to_numpy().astype(np.int64) * groups // layers
    top, place, document = (rows[name].to_numpy() for name in ("top", "place", "document"))
    among, before, after = (rows[name].to_numpy() for name in ("among", "before", "after"))
    together = run.manifest.model.cells.together
    parts = []
    for offset in OFFSETS:
        there = (before + offset >= 1) & (after >= offset)
        token = text.tokens[np.clip(place + offset, 0, len(text.tokens) - 1)]
        hits = (token == top)[there].astype(float)
        share = share_by_group(hits, third[there], groups, document[there], n=200)
        null = _expected(top[there], token[there], among[there], third[there], groups)
        parts.append(
            pl.DataFrame(
                {
                    "layers": [_third(number, groups, layers) for number in range(groups)],
                    "offset": offset,
                    "triggers": np.bincount(third[there], minlength=groups),
                    **columns(share, "share"),
                    "null": null,
                }
            )
        )
    frame = pl.concat(parts).with_columns(pl.selectors.float().fill_nan(None))
    upper = frame.filter(pl.col("layers") == _third(groups - 1, groups, layers)).sort(
        "share", descending=True, nulls_last=True
    )
    best = upper.row(0, named=True)
    at = {0: "the trigger's last token", 1: "the token after it"}.get(
        best["offset"], f"the token at {best['offset']:+d}"
    )
    return Finding(
        id="current-and-next-token",
        items=("A75",),
        title="Which token of the text is the value's first token?",
        says=f"In the upper third of the layers ({best['layers']}) the value's first token is most often {at}: in "
        f"{of_row(best, '.2%')} of {best['triggers']:,} stored triggers of {best['n']:,} documents, with tokens dealt "
        f"out anew among the triggers of the {together} in {best['null']:.2%}.",
        frame=frame,
        figure=line(
            frame,
            "triggers (%)",
            x="offset",
            y="share",
            x_title="tokens from the last token of the trigger (0: itself, 1: next)",
            color="layers",
            share=True,
        ),
        null=f"tokens at the same distance dealt out anew among the triggers of the {together} (expectation)",
        resampled="documents of the triggers",
        notes=("all stored triggers, not only the strongest",),
    )


def _third(number: int, parts: int, layers: int) -> str:
    members = [layer for layer in range(layers) if layer * parts // layers == number]
    return f"layers {members[0]}-{members[-1]}"


def _expected(
    top: np.ndarray, token: np.ndarray, among: np.ndarray, third: np.ndarray, groups: int
) -> np.ndarray:
    """f64[third]: the share that agrees when tokens are dealt out anew where `among` (ascending) is alike, exactly."""
    total = np.zeros(groups)
    starts = np.flatnonzero(np.diff(among, prepend=-1))
    for start, end in pairwise([*starts, len(among)]):
        size = int(max(top[start:end].max(), token[start:end].max())) + 1
        first, second = (np.bincount(tokens[start:end], minlength=size) for tokens in (top, token))
        total[third[start]] += float(first @ second) / (end - start)
    count = np.bincount(third, minlength=groups)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _precise(run: Run, rows: pl.DataFrame) -> pl.DataFrame:
    """One row per neuron and polarity: how many stored triggers are followed by what the value writes first."""
    side = rows["side"].to_numpy()
    triggers = np.bincount(side)
    hits = np.bincount(side, (rows["next"] == rows["top"]).to_numpy())
    top = np.zeros(len(triggers), np.int32)
    top[side] = rows["top"].to_numpy()
    known = np.flatnonzero(triggers)
    layer, neuron = run.manifest.model.cells.place(known // 2)
    frame = pl.DataFrame(
        {
            "layer": layer.astype(np.int16),
            "neuron": neuron.astype(np.int32),
            "polarity": (1 - 2 * (known % 2)).astype(np.int8),
            "top": top[known],
            "hits": hits[known].astype(np.int64),
            "triggers": triggers[known],
            "precision": hits[known] / triggers[known],
        }
    )
    return frame.sort("precision", "hits", *_KEY, descending=[True, True, False, False, True])


def _confident(run: Run, rows: pl.DataFrame, best: pl.DataFrame) -> Finding:
    """A14: the values of the largest probability, where they are, and whether their triggers agree."""
    neurons = run.table("neurons").select("layer", "neuron", probability="value_max_probability").collect()
    chosen = neurons.sort("probability", "layer", "neuron", descending=[True, False, False]).head(CONFIDENT)
    table = chosen.join(best.filter(pl.col("polarity") == 1), on=["layer", "neuron"], how="left")
    texts, together = _labels(run), run.manifest.model.cells.together
    layers = run.manifest.model.layers
    side = 2 * run.manifest.model.cells.cell(table["layer"], table["neuron"])
    positive = rows.filter(pl.col("polarity") == 1)
    share, by_others = agreeing(positive, side), others_agree(positive, side)
    usual = float((best.filter(pl.col("polarity") == 1)["hits"] > 0).mean())  # type: ignore[arg-type]
    upper = table.filter(pl.col("layer") * 16 >= 10 * layers).height
    frame = table.select(
        address=pl.format("L{}N{}", "layer", "neuron"),
        layer="layer",
        probability="probability",
        prediction=pl.col("top").replace_strict(texts, default=None, return_dtype=pl.String),
        agreeing="hits",
        triggers="triggers",
        null=pl.Series(by_others).fill_nan(None),
    )
    return Finding(
        id="most-confident-values",
        items=("A14",),
        title=f"The {table.height} most confident values",
        says=f"{upper} of the {table.height} values of the largest probability lie in the upper six sixteenths of "
        f"the layers; of the {table.height}, {number(share, form='.0%')} have a positive trigger that is followed by "
        f"their first token, where the triggers of another neuron of the {together} would have one in "
        f"{np.nanmean(by_others) if len(by_others) else np.nan:.0%}; of all values {usual:.0%}.",
        frame=frame,
        paper="97 of 100 in layers 11-16; 46 of 100 have one among their 50 triggers",
        null=f"the same values with the triggers of the other neurons of their {together} (expectation)",
        resampled="documents of the triggers (jackknife over groups of them)",
    )


def agreeing(rows: pl.DataFrame, side: np.ndarray) -> Interval:
    """How many of the sides have a trigger that is followed by the value's first token; jackknife over documents."""
    groups = groups_of(rows["document"].to_numpy())
    count = int(groups.max(initial=-1)) + 1
    hit = (rows["next"] == rows["top"]).to_numpy()
    sides = rows["side"].to_numpy()[hit]
    place = np.searchsorted(np.sort(side), sides).clip(max=max(len(side) - 1, 0))
    chosen = np.sort(side)[place] == sides if len(side) else np.zeros(len(sides), bool)
    hits = np.zeros((len(side), count))
    np.add.at(hits, (place[chosen], groups[hit][chosen]), 1)
    whole = hits.sum(1)
    figures = [(whole > 0).mean(), *((whole[:, None] - hits > 0).mean(0))] if len(side) else [np.nan]
    return jackknifed(np.array(figures), rows["document"].n_unique())


def others_agree(rows: pl.DataFrame, side: np.ndarray) -> np.ndarray:
    """f64[side]: the share of other sides that run with it and have a trigger that is followed by its value's first
    token."""
    known = rows.select("side", "among", "top").unique("side")
    chosen = pl.DataFrame({"side": side}).join(known, on="side", how="left", maintain_order="left")
    count = known.group_by("among").len()
    met = rows.select("among", "next", other="side").unique()
    pairs = chosen.join(met, left_on=["among", "top"], right_on=["among", "next"], how="inner")
    pairs = pairs.filter(pl.col("other") != pl.col("side")).group_by("side").agg(met=pl.len())
    table = chosen.join(pairs, on="side", how="left", maintain_order="left")
    table = table.join(count, on="among", how="left", maintain_order="left")
    return ratio(table["met"].fill_null(0).to_numpy(), (table["len"].fill_null(1) - 1).to_numpy())


def _examples(run: Run, best: pl.DataFrame) -> Finding:
    """A15: the values whose first token follows the largest share of their triggers, one a prediction."""
    enough = (
        best.filter(pl.col("triggers") >= 10, pl.col("hits") > 0)
        .unique("top", keep="first", maintain_order=True)
        .head(EXAMPLES)
    )
    texts = _labels(run)
    rows = []
    for value in enough.iter_rows(named=True):
        stored = run.rows("triggers", value["layer"], value["neuron"]).filter(
            pl.col("polarity") == value["polarity"]
        )
        agree = stored.filter(pl.col("next_token") == value["top"]).row(0, named=True)
        rows.append(
            {
                "address": f"L{value['layer']}N{value['neuron']}"
                + ("" if value["polarity"] > 0 else " (negative)"),
                "prediction": texts[value["top"]],
                "precision": value["precision"],
                "triggers": value["triggers"],
                "trigger": _excerpt(run, agree["context"], agree["position"]),
            }
        )
    schema = {
        "address": pl.String,
        "prediction": pl.String,
        "precision": pl.Float64,
        "triggers": pl.UInt32,
        "trigger": pl.String,
    }
    frame = pl.DataFrame(rows, schema=schema)
    good = int((best["precision"] >= 0.5).sum())
    return Finding(
        id="table-2-examples",
        items=("A15",),
        title="Values that predict what follows their triggers (Geva Table 2)",
        says=f"{good:,} of {best.height:,} values (with their sign) write first what follows at least half of their "
        "stored "
        "triggers; the clearest, one for each prediction, are listed with their precision at "
        f"{run.manifest.options['top']}.",
        frame=frame,
        paper="each 68 %, played 16 %, extratropical 4 %, part 92 %, line 84 %, jail 4 % (50 triggers)",
        notes=("chosen as the best of all: their precision would be lower on other text",),
    )


def _labels(run: Run) -> dict[int, str]:
    words = run.vocabulary
    used = run.table("values").filter(pl.col("rank") == 0).select("token").unique().collect()["token"]
    return {token: words.label(token) for token in used.to_list()}


def _excerpt(run: Run, context: int, position: int, width: int = 14) -> str:
    """The end of a trigger as text, and after an arrow the token that followed."""
    tokens = run.contexts([context])[context].tokens
    pieces = run.vocabulary.pieces(tokens[: position + 2].tolist())
    before = "".join(pieces[max(0, position + 1 - width) : position + 1])
    return run.vocabulary.visible(f"{before} → {pieces[position + 1].strip()}", edges=False)
