"""Values as predictions: does a value say what follows its triggers? (Geva et al. 2021, Section 4; A10-A15, A75)

A value is read with the sign of the coefficient that writes it: for triggers of polarity -1 its prediction is the token
that it suppresses most. The null keeps how often tokens occur: the next tokens of the strongest triggers of a layer are
dealt out anew among its neurons. (1/V, the papers' base line, is beaten by whatever says " the".)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, wilson
from mnemoscope.studies.findings.finding import Figure, Finding, chance
from mnemoscope.studies.findings.statistics import share_by_group

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SHUFFLES = 200
OFFSETS = range(-4, 5)  # tokens from the trigger's last one
CONFIDENT = 100  # values of the largest probability (A14)
EXAMPLES = 24
_KEY = ["layer", "neuron", "polarity"]
_DEALT = (
    "targets dealt out anew among the neurons of the layer ({times} times): mean, 2.5th to 97.5th percentile"
)


def findings(run: Run) -> list[Finding]:
    """Everything that the tables of any run answer; ranks are in `value_ranks`."""
    rows = triggers(run)
    found = [_spread(run), _agreement(run, rows), _duality(run, rows)]
    best = _precise(run, rows)
    return [*found, _confident(run, best), _examples(run, best)]


def triggers(run: Run) -> pl.DataFrame:
    """One row per trigger that is followed by a token; polarity -1 only in gated models.

    side                   number of the neuron, times two, and one more for polarity -1
    layer, polarity, rank  of the trigger
    next, last             the token after it, and its last one
    top                    the token that its value writes first at that sign
    place, before, after   where its last token is in all of the text, and how many tokens of the context lie around
    document               whose text it is
    """
    size, model = run.manifest.model.neurons, run.manifest.model
    side = ((pl.col("layer").cast(pl.Int64) * size + pl.col("neuron")) * 2 + (pl.col("polarity") < 0)).alias(
        "side"
    )
    rows = run.table("triggers").filter(pl.col("next_token").is_not_null())
    rows = rows if model.gated else rows.filter(pl.col("polarity") == 1)
    found = rows.select(side, "layer", "polarity", "rank", "context", "position", next="next_token").collect()
    first = run.table("values").filter(pl.col("rank") == 0).select(side, "token").collect()
    # Looked up by number: joins of millions of rows on three columns take many times as long.
    top = np.zeros(2 * model.layers * size, np.int32)
    top[first["side"].to_numpy()] = first["token"].to_numpy()
    text = _Text(run.table("contexts").select("context", "document", "tokens").collect())
    place = text.place(found["context"].to_numpy(), found["position"].to_numpy())
    return found.select("side", "layer", "polarity", "rank", "next", before="position").with_columns(
        top=pl.Series(top[found["side"].to_numpy()]),
        last=pl.Series(text.tokens[place]),
        document=pl.Series(text.document[place]),
        place=pl.Series(place),
        after=pl.Series(text.ends[place] - place - 1),
    )


class _Text:
    """All contexts as one array, with the end of the context that each place is in."""

    def __init__(self, contexts: pl.DataFrame) -> None:
        sizes = contexts["tokens"].list.len().to_numpy().astype(np.int64)
        self.ids, self.starts = contexts["context"].to_numpy(), np.cumsum(sizes) - sizes
        self.tokens = contexts["tokens"].explode().to_numpy()
        self.document = np.repeat(contexts["document"].to_numpy(), sizes)
        self.ends = np.repeat(np.cumsum(sizes), sizes)

    def place(self, context: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Where a position of a context is in the array."""
        return self.starts[np.searchsorted(self.ids, context)] + position


def _spread(run: Run) -> Finding:
    """A10: how peaked values are, as distributions."""
    size = run.manifest.model.vocabulary
    entropy = pl.col("value_entropy")
    frame = (
        run.table("neurons")
        .group_by("layer")
        .agg(
            *(entropy.quantile(level).alias(name) for name, level in _BOX.items()),
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
        says=f"The median value has an entropy of {low['median']:.2f} nats in layer 0 and {high['median']:.2f} in "
        "layer "
        f"{high['layer']}, where ln {size:,} = {np.log(size):.2f} would be no preference; its first token gets a "
        f"probability of {chance(low['largest_probability'])} and {chance(high['largest_probability'])}.",
        frame=frame,
        figure=Figure(
            "box", "layer", "median", "layer", "entropy of the value (nats)", low="quarter", high="three_quarters",
            whisker_low="low", whisker_high="high", null="uniform",
        ),
        null="a uniform distribution over the vocabulary",
        notes=(_lens(run), "boxes: quartiles over neurons; whiskers: 5th to 95th percentile"),
    )  # fmt: skip


_BOX = {"low": 0.05, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "high": 0.95}


def _lens(run: Run) -> str:
    lens = run.manifest.options.get("values_lens", "own")
    return (
        f"read under the {lens} lens: its scale changes entropies and probabilities, hardly the first token"
    )


def _agreement(run: Run, rows: pl.DataFrame) -> Finding:
    """A11, and A75's other mode: is the value's first token the one after, or the last of, the strongest trigger?"""
    first = rows.filter(pl.col("rank") == 0)
    layers = run.manifest.model.layers
    parts = []
    for side in first["polarity"].unique(maintain_order=True):
        some = first.filter(pl.col("polarity") == side)
        for mode in ("next", "last"):
            hits = (some[mode] == some["top"]).to_numpy().astype(float)
            layer = some["layer"].to_numpy().astype(np.int64)
            share = share_by_group(hits, layer, layers, some["document"].to_numpy())
            null = dealt(some["top"].to_numpy(), some[mode].to_numpy(), layer, layers)
            parts.append(_layers(share, null, side, mode))
    frame = pl.concat(parts)
    return Finding(
        id="figure-4-agreement",
        items=("A11", "A75"),
        title="Does a value predict what follows its strongest trigger? (Geva Figure 4)",
        says=_says_agreement(frame),
        frame=frame,
        figure=Figure(
            "line", "layer", "share", "layer", "neurons that agree (%)", color="target", low="low", high="high",
            null="null", null_low="null_low", null_high="null_high", facet="polarity", share=True,
        ),
        paper="next token: about 0 in layers 1-10 of 16, then rising to 3.5 %; drawn against 1/V = 0.0004 %",
        null=_DEALT.format(times=SHUFFLES),
        resampled="documents of the triggers",
        notes=("a prediction is the first token of the value, read with the sign of the coefficient",),
    )  # fmt: skip


def _layers(share: Interval, null: np.ndarray, side: int, mode: str) -> pl.DataFrame:
    low, high = np.quantile(null, (0.025, 0.975), axis=0)
    return pl.DataFrame(
        {
            "polarity": _side(side),
            "target": f"{mode} token",
            "layer": np.arange(len(share.value)),
            "share": share.value,
            "low": share.low,
            "high": share.high,
            "null": null.mean(0),
            "null_low": low,
            "null_high": high,
        }
    ).with_columns(pl.selectors.float().fill_nan(None))


def _side(side: int) -> str:
    return "largest coefficients" if side > 0 else "most negative coefficients"


def dealt(
    top: np.ndarray, target: np.ndarray, group: np.ndarray, count: int, times: int = SHUFFLES, seed: int = 0
) -> np.ndarray:
    """f64[time, group]: the share that agrees when targets are dealt out anew in each group; NaN if it is empty."""
    generator = np.random.default_rng(seed)
    out = np.full((times, count), np.nan)
    for one in np.unique(group):
        mine = group == one
        first, wanted = top[mine], target[mine]
        out[:, one] = [(first == generator.permutation(wanted)).mean() for _ in range(times)]
    return out


def _says_agreement(frame: pl.DataFrame) -> str:
    mine = frame.filter(
        pl.col("target") == "next token", pl.col("polarity") == _side(1), pl.col("share").is_not_null()
    )
    lower = mine.filter(pl.col("layer") * 3 < 2 * (pl.col("layer").max() + 1))["share"].to_numpy().max()
    best = mine.sort("share", descending=True).row(0, named=True)
    above = mine.filter(pl.col("low") > pl.col("null_high")).height
    return (
        f"Agreement with the next token peaks in layer {best['layer']} at {best['share']:.1%} [{best['low']:.1%}, "
        f"{best['high']:.1%}] against {best['null']:.2%} by chance, and is at most {lower:.1%} in the lower two "
        f"thirds; it is above chance in {above} of {mine.height} layers."
    )


def _duality(run: Run, rows: pl.DataFrame) -> Finding:
    """A75: which token of the text the value's first token is, by distance from the trigger's end."""
    text = _Text(run.table("contexts").select("context", "document", "tokens").collect())
    layers = run.manifest.model.layers
    groups = min(3, layers)
    third = rows["layer"].to_numpy().astype(np.int64) * groups // layers
    top, place, document = (rows[name].to_numpy() for name in ("top", "place", "document"))
    layer, before, after = (rows[name].to_numpy() for name in ("layer", "before", "after"))
    parts = []
    for offset in OFFSETS:
        there = (before + offset >= 1) & (after >= offset)
        token = text.tokens[np.clip(place + offset, 0, len(text.tokens) - 1)]
        hits = (token == top)[there].astype(float)
        share = share_by_group(hits, third[there], groups, document[there], n=200)
        null = _expected(top[there], token[there], layer[there], third[there], groups)
        parts.append(
            pl.DataFrame(
                {
                    "layers": [_third(one, groups, layers) for one in range(groups)],
                    "offset": offset,
                    "triggers": np.bincount(third[there], minlength=groups),
                    "share": share.value,
                    "low": share.low,
                    "high": share.high,
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
        says=f"In the upper third of the layers the value's first token is most often {at}: in {best['share']:.2%} "
        f"[{best['low']:.2%}, {best['high']:.2%}] of all stored triggers, against {best['null']:.2%} by chance.",
        frame=frame,
        figure=Figure(
            "line", "offset", "share", "tokens from the last token of the trigger (0: itself, 1: next)",
            "triggers (%)", color="layers", low="low", high="high", null="null", share=True,
        ),
        null="tokens at the same distance dealt out anew among the triggers of the layer (expectation)",
        resampled="documents of the triggers",
        notes=("all stored triggers, not only the strongest",),
    )  # fmt: skip


def _third(one: int, parts: int, layers: int) -> str:
    members = [layer for layer in range(layers) if layer * parts // layers == one]
    return f"layers {members[0]}-{members[-1]}"


def _expected(
    top: np.ndarray, token: np.ndarray, layer: np.ndarray, third: np.ndarray, groups: int
) -> np.ndarray:
    """f64[third]: the share that agrees when tokens are dealt out anew within layers (ascending), exactly."""
    total = np.zeros(groups)
    ends = np.flatnonzero(np.diff(layer, append=-1)) + 1
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        size = int(max(top[start:end].max(), token[start:end].max())) + 1
        first, second = (np.bincount(some[start:end], minlength=size) for some in (top, token))
        total[third[start]] += float(first @ second) / (end - start)
    count = np.bincount(third, minlength=groups)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _precise(run: Run, rows: pl.DataFrame) -> pl.DataFrame:
    """One row per neuron and polarity: how many stored triggers are followed by what the value writes first."""
    side, size = rows["side"].to_numpy(), run.manifest.model.neurons
    triggers = np.bincount(side)
    hits = np.bincount(side, (rows["next"] == rows["top"]).to_numpy())
    top = np.zeros(len(triggers), np.int32)
    top[side] = rows["top"].to_numpy()
    known = np.flatnonzero(triggers)
    frame = pl.DataFrame(
        {
            "layer": (known // (2 * size)).astype(np.int16),
            "neuron": (known // 2 % size).astype(np.int32),
            "polarity": (1 - 2 * (known % 2)).astype(np.int8),
            "top": top[known],
            "hits": hits[known].astype(np.int64),
            "triggers": triggers[known],
            "precision": hits[known] / triggers[known],
        }
    )
    return frame.sort("precision", "hits", *_KEY, descending=[True, True, False, False, True])


def _confident(run: Run, best: pl.DataFrame) -> Finding:
    """A14: the values of the largest probability, where they are, and whether their triggers agree."""
    neurons = run.table("neurons").select("layer", "neuron", probability="value_max_probability").collect()
    chosen = neurons.sort("probability", "layer", "neuron", descending=[True, False, False]).head(CONFIDENT)
    rows = chosen.join(best.filter(pl.col("polarity") == 1), on=["layer", "neuron"], how="left")
    texts = _labels(run)
    some = int((rows["hits"].fill_null(0) > 0).sum())
    usual = float((best.filter(pl.col("polarity") == 1)["hits"] > 0).mean())  # type: ignore[arg-type]
    share = wilson(np.array(some), np.array(rows.height))
    layers = run.manifest.model.layers
    upper = rows.filter(pl.col("layer") * 16 >= 10 * layers).height
    frame = rows.select(
        address=pl.format("L{}N{}", "layer", "neuron"),
        layer="layer",
        probability="probability",
        prediction=pl.col("top").replace_strict(texts, default=None, return_dtype=pl.String),
        agreeing="hits",
        triggers="triggers",
    )
    return Finding(
        id="most-confident-values",
        items=("A14",),
        title=f"The {rows.height} most confident values",
        says=f"{upper} of the {rows.height} values of the largest probability lie in the upper six sixteenths of "
        "the layers; "
        f"{some} ({float(share.value):.0%} [{float(share.low):.0%}, {float(share.high):.0%}]) have a trigger that "
        "is followed "
        f"by their first token, of all values {usual:.0%}.",
        frame=frame,
        paper="97 of 100 in layers 11-16; 46 of 100 have one among their 50 triggers",
        resampled="values (Wilson)",
    )


def _examples(run: Run, best: pl.DataFrame) -> Finding:
    """A15: the values whose first token follows the largest share of their triggers, one a prediction."""
    enough = (
        best.filter(pl.col("triggers") >= 10, pl.col("hits") > 0)
        .unique("top", keep="first", maintain_order=True)
        .head(EXAMPLES)
    )
    texts = _labels(run)
    rows = []
    for one in enough.iter_rows(named=True):
        mine = run.rows("triggers", one["layer"], one["neuron"]).filter(pl.col("polarity") == one["polarity"])
        agree = mine.filter(pl.col("next_token") == one["top"]).row(0, named=True)
        rows.append(
            {
                "address": f"L{one['layer']}N{one['neuron']}"
                + ("" if one["polarity"] > 0 else " (negative)"),
                "prediction": texts[one["top"]],
                "precision": one["precision"],
                "triggers": one["triggers"],
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
