"""Parts in the case study: how neurons tell an answer from its near foil, and what ablation does (A55-A57, A79)."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.stats import rankdata

from mnemoscope.intervals import mean_by_document, ratio, share_by_document
from mnemoscope.studies.findings.finding import Figure, Finding, bar, slug
from mnemoscope.studies.findings.statistics import columns, number, percent

WAYS = ("answer among its first", "foil among its last", "query of others", "only the pair")
EDGE = 100  # tokens at either end of what a neuron writes that count as promoted and suppressed
DEALS = 200  # times that effects are dealt out anew
QUARTERS = 4  # of the depth
NAMED = 4  # promoted and suppressed tokens in a row of the table
_QUESTIONS = "questions"
_OTHER = (
    "ten neurons chosen in the same way for another pair of words at the same prompt: the answer of another question, "
    "and the near foil"
)

Tables = dict[str, pl.DataFrame]


def findings(name: str, tables: Tables) -> list[Finding]:
    """Of one set of questions, from the rows of `case_neurons` and `case_ablations`."""
    return [make(name, tables) for make in (_ways, _queries, _one, _ablated, _where_they_differ)]


def ways(neurons: pl.DataFrame) -> np.ndarray:
    """bool[neuron, way]: which of WAYS each neuron acts by; the last when by none of the others (A56)."""
    seen = np.stack(
        [
            (neurons["answer_rank"] < EDGE).to_numpy(),
            (neurons["near_last_rank"] < EDGE).to_numpy(),
            (neurons["chain"].abs() > neurons["difference"].abs()).to_numpy(),
        ],
        axis=1,
    )
    return np.concatenate([seen, ~seen.any(1, keepdims=True)], axis=1)


def _ways(name: str, tables: Tables) -> Finding:
    """A56: by which of four ways the ten neurons act that tell the answer from the near foil best."""
    shares = {}
    for drawn in (False, True):
        rows = tables["neurons"].filter(pl.col("drawn") == drawn)
        shares[drawn] = share_by_document(ways(rows).astype(float), rows["question"].to_numpy())
    share, null = shares[False], shares[True]
    said = ", ".join(
        f"{way} {percent(share, place)} ({percent(null, place)})" for place, way in enumerate(WAYS)
    )
    frame = pl.DataFrame({"way": WAYS, **columns(share, null=null)})
    return Finding(
        id=f"case-ways-{slug(name)}",
        items=("A56",),
        title=f"Four ways in which neurons tell the answer from the near foil ({name})",
        says=f"Of the ten neurons that raise the answer's logit over the near foil's most, over "
        f"{tables['questions'].height} questions, by each way, in brackets of the ten that raise another word most "
        f"over the foil at the same prompt: {said}.",
        frame=frame,
        figure=bar(frame, "neurons (%)", x="way", x_title="way", share=True),
        paper="named by examples: top tokens, last tokens, query, and only the difference of the pair",
        null=_OTHER,
        resampled=_QUESTIONS,
        notes=(
            f"first and last: {EDGE} tokens of what the neuron writes, under the own lens; a query of others moves the "
            "difference more through the neurons it switches on than by itself; the first three do not exclude each "
            "other, the fourth is none of them",
        ),
    )


VECTORS = ("head", "neuron", "embedding", "attention bias", "mixer", "ffn bias", "per-layer input")


def _queries(name: str, tables: Tables) -> Finding:
    """A57: what switched those neurons on."""
    rows = tables["neurons"].filter(pl.col("query_kind").is_not_null())
    kinds = [kind for kind in VECTORS if kind in rows["query_kind"].unique().to_list()]
    hits = (rows["query_kind"].to_numpy()[:, None] == np.array(kinds)[None]).astype(float)
    drawn, questions = rows["drawn"].to_numpy(), rows["question"].to_numpy()
    share, null = (share_by_document(hits[drawn == side], questions[drawn == side]) for side in (False, True))
    usual = (
        rows.group_by("drawn")
        .agg(pl.col("query_share").abs().median())
        .sort("drawn")["query_share"]
        .to_list()
    )
    said = ", ".join(
        f"{kind} {percent(share, place)} ({percent(null, place)})" for place, kind in enumerate(kinds)
    )
    frame = pl.DataFrame({"kind": kinds, **columns(share, null=null)}).fill_nan(None)
    return Finding(
        id=f"case-queries-{slug(name)}",
        items=("A57",),
        title=f"What switched those neurons on ({name})",
        says=f"The earlier vector with the largest share of the coefficient of those ten neurons, over "
        f"{tables['questions'].height} questions, in brackets of the ten for another word: {said}; its share is "
        f"{100 * usual[0]:.1f} % of the coefficient in the "
        f"median{f' ({100 * usual[-1]:.1f} %)' if len(usual) > 1 else ''}.",
        frame=frame,
        figure=bar(frame, "neurons (%)", x="kind", x_title="kind of vector", share=True),
        paper="one question: the sub-values of cities are switched on by attention sub-values of layer 11",
        null=_OTHER,
        resampled=_QUESTIONS,
        notes=(
            "among the embedding, every head x source and neuron below, and biases; `mnemoscope explain` lists them",
        ),
    )


def _one(name: str, tables: Tables) -> Finding:
    """A55: the neurons of one question, as a table."""
    known = tables["questions"]
    right = known.filter(pl.col("rank") == 0)
    case = (right if right.height else known).row(0, named=True)
    rows = tables["neurons"].filter(pl.col("question") == case["question"], ~pl.col("drawn")).sort("rank")
    words = {word: pl.col(word).list.head(NAMED).list.join(" ") for word in ("promotes", "suppresses")}
    frame = rows.select(
        "layer", "neuron", "coefficient", "difference", "chain", answer=_printed("answer"),
        near_foil=_printed("near"), **words,
        query=_query(),
        query_share="query_share",
    )  # fmt: skip
    best = frame.row(0, named=True)
    return Finding(
        id=f"case-table-{slug(name)}",
        items=("A55", "A57"),
        title=f"The neurons behind one answer (Yu Table 2; {name})",
        says=f"For {case['prompt'].strip()!r}, {'' if right.height else 'not '}answered right with "
        f"{case['answer'].strip()!r}, neuron {best['neuron']} of layer {best['layer']} does most for it against "
        f"{case['near'].strip()!r}, {best['difference']:+.2f} logits; in what it writes the answer has rank "
        f"{best['answer']:,} and the foil {best['near_foil']:,}.",
        frame=frame,
        paper="Paris against London: 0.32, 0.22 and 0.08 by the first three",
        notes=(
            "ranks are 0-based, negative ones count from the end (-1 is last); chain is what it does through neurons "
            "that it switches on; the first question of the sample"
            + (" that is answered right" if right.height else ", as none is answered right"),
        ),
    )


def _query() -> pl.Expr:
    """`head 21.7 at " country"`, `neuron 28.1095`: layer and number; null for a neuron without a query."""
    unit = pl.format("{}.{}", "query_layer", "query_unit").fill_null("")
    place = pl.format(" at {}", pl.col("query_source").str.strip_chars()).fill_null("")
    return pl.format("{} {}{}", "query_kind", unit, place).str.strip_chars()


def _printed(word: str) -> pl.Expr:
    """A rank as the paper prints it: from the end where that is nearer."""
    first, last = pl.col(f"{word}_rank"), pl.col(f"{word}_last_rank")
    return pl.when(last < first).then(-1 - last).otherwise(first)


MEASURES = ("increase", "leave_one_out")


def agreement(parts: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """f64[..., 3]: Pearson, Spearman and the share of equal signs of two accounts f64[..., part]."""
    known = (parts != 0) & (effects != 0)
    same = ratio((known & (np.sign(parts) == np.sign(effects))).sum(-1), known.sum(-1))
    return np.stack(
        [_pearson(parts, effects), _pearson(rankdata(parts, axis=-1), rankdata(effects, axis=-1)), same],
        axis=-1,
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    return ratio((x * y).sum(-1), np.sqrt((x**2).sum(-1) * (y**2).sum(-1)))


def agreements(rows: pl.DataFrame, measure: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """f64[question, 3] of an account with the effects, and f64[deal, question, 3] with effects dealt out anew among the
    parts of each question."""
    generator, own, null = np.random.default_rng(seed), [], []
    for _, parts in rows.sort("question").group_by("question", maintain_order=True):
        said, effects = (parts[column].to_numpy().astype(float) for column in (measure, "effect"))
        own.append(agreement(said, effects))
        dealt = generator.permuted(np.tile(effects, (DEALS, 1)), axis=1)
        null.append(agreement(np.tile(said, (DEALS, 1)), dealt))
    return np.stack(own), np.stack(null, axis=1)


_KINDS = {"neuron": "neurons", "head": "heads x sources"}
_AGREEMENT = ("Pearson", "Spearman", "equal signs")


def _ablated(name: str, tables: Tables) -> Finding:
    """A79: what a part is held to do beside what the model loses without it."""
    rows = tables["ablations"]
    said, notes = [], []
    for kind, title in _KINDS.items():
        for measure in MEASURES:
            own, null = agreements(rows.filter(pl.col("kind") == kind), measure)
            means, chance = mean_by_document(own, np.arange(len(own))), np.nanmean(null, axis=1)
            low, high = np.nanquantile(chance, (0.025, 0.975), axis=0)
            told = ", ".join(
                f"{label} {number(means, place)} ({low[place]:.2f} to {high[place]:.2f})"
                for place, label in enumerate(_AGREEMENT)
            )
            if measure == "leave_one_out":
                said.append(f"{title}: {told}")
            else:
                notes.append(f"increase instead of leave-one-out, {title}: {told}")
    return Finding(
        id=f"case-ablation-{slug(name)}",
        items=("A79",),
        title=f"What a part says it does, and what the model loses without it ({name})",
        says=f"Leave-one-out of a part of the answer's log-probability against a forward pass without it, mean over "
        f"{rows['question'].n_unique()} questions, in brackets with effects dealt out anew: {'; '.join(said)}.",
        frame=rows.with_columns(pl.col("kind").replace_strict(_KINDS)),
        figure=Figure(
            "scatter", "leave_one_out", "effect", "leave-one-out (nats)", "effect of the ablation (nats)", color="kind",
            facet="kind", free=True, order=tuple(_KINDS.values()),
        ),
        null=f"effects dealt out anew among the parts of a question, {DEALS} times: 95 % of the means",
        resampled=_QUESTIONS,
        notes=(
            "the parts with the largest |leave-one-out| among those that `explain` lists; a coefficient, or what a "
            "head takes from a source, is set to zero at the last token and everything downstream reacts (Niu et al. "
            "2024 object that where something is stored and what an edit does are two questions)",
            *notes,
        ),
    )  # fmt: skip


def _where_they_differ(name: str, tables: Tables) -> Finding:
    """A79 by depth: where the account and the ablation disagree."""
    layers = int(tables["stream"]["point"].max()) // 2  # type: ignore[arg-type]
    rows = signs(tables["ablations"], layers)
    shares, said = [], []
    for kind, title in _KINDS.items():
        of_kind = rows.filter(pl.col("kind") == kind).sort("quarter", maintain_order=True)
        told = []
        for (quarter,), parts in of_kind.group_by("quarter", maintain_order=True):
            same = share_by_document(parts["same"].to_numpy(), parts["question"].to_numpy())
            span, chance = _span(int(str(quarter)), layers), float(parts["null"].to_numpy().mean())
            shares.append((title, span, *map(float, same), chance, parts.height))
            told.append(f"{span}: {percent(same)} ({100 * chance:.1f} %)")
        said.append(f"{title}, {told[0]}, {told[-1]}")
    names = ["kind", "layers", "value", "low", "high", "null", "parts"]
    frame = pl.DataFrame(shares, names, orient="row")
    return Finding(
        id=f"case-ablation-layers-{slug(name)}",
        items=("A79",),
        title=f"Where the account and the ablation differ ({name})",
        says=f"Leave-one-out and ablation have the same sign, in brackets with signs dealt out anew: "
        f"{'; '.join(said)}; over {rows['question'].n_unique()} questions.",
        frame=frame,
        figure=bar(
            frame,
            "parts with equal signs (%)",
            x="layers",
            x_title="layers",
            facet="kind",
            share=True,
            order=tuple(_KINDS.values()),
        ),
        null="signs dealt out anew among the parts of a question",
        resampled=_QUESTIONS,
    )


def signs(ablations: pl.DataFrame, layers: int) -> pl.DataFrame:
    """Parts that do anything, with `same`: whether both signs agree, `null`: the chance that they would within their
    question, and `quarter` of the depth."""
    says_up, is_up = pl.col("leave_one_out") > 0, pl.col("effect") > 0
    up, risen = says_up.mean(), is_up.mean()
    known = ablations.filter(pl.col("leave_one_out") != 0, pl.col("effect") != 0)
    return known.with_columns(
        same=(says_up == is_up).cast(pl.Float64),
        null=(up * risen + (1 - up) * (1 - risen)).over("question", "kind"),
        quarter=pl.col("layer").cast(pl.Int32) * QUARTERS // layers,
    )


def _span(quarter: int, layers: int) -> str:
    first, end = (-(-number * layers // QUARTERS) for number in (quarter, quarter + 1))
    return f"layers {first} to {end - 1}" if end - 1 > first else f"layer {first}"
