"""The model and the text at a glance: where the parameters are, and what was read (A2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from mnemoscope.studies.findings.finding import Finding, bar, chance
from mnemoscope.studies.findings.statistics import running

if TYPE_CHECKING:
    from mnemoscope.records import ModelEntry
    from mnemoscope.run.reading import Run


_OUTSIDE = {"embedding": "embedding", "unembedding": "unembedding", "other": "final norm and other"}


def findings(run: Run) -> list[Finding]:
    """Parameter shares (the table `parameters`), and the run in one table."""
    return [_shares(run), _facts(run)]


def _shares(run: Run) -> Finding:
    rows = run.table("parameters").collect()
    layers = rows.filter(pl.col("layer") >= 0)
    inside = {
        part: int(count)
        for part, count in layers.group_by("part").agg(pl.col("parameters").sum()).iter_rows()
    }
    body, total = sum(inside.values()), int(rows["parameters"].sum())
    outside = rows.filter(pl.col("layer") < 0)
    names = {"attention": "attention", "ffn": "feed-forward", "other": "norms of the layers"}
    counted: list[tuple[str, int, float | None]] = [
        (names[part], count, count / body) for part, count in sorted(inside.items())
    ]
    counted += [
        (_OUTSIDE[part], count, None)
        for part, count in outside.select("part", "parameters").iter_rows()
        if count
    ]
    frame = pl.DataFrame(counted, ["part", "parameters", "share_of_layers"], orient="row")
    frame = frame.with_columns(share_of_all=pl.col("parameters") / total)
    model = run.manifest.model
    return Finding(
        id="parameter-shares",
        items=("A2",),
        title="Where the parameters are",
        says=f"Feed-forward layers hold {inside['ffn'] / body:.1%} of the parameters inside the layers "
        f"({inside['ffn']:,} of "
        f"{body:,}) and {inside['ffn'] / total:.1%} of all {total:,}.",
        frame=frame,
        figure=bar(frame, "share of all parameters (%)", x="part", y="share_of_all", share=True),
        paper="two thirds: 8 d² of 12 d² in each layer, with d_m = 4 d",
        notes=(
            f"here d_m / d = {_per_width(model)}"
            + (", three matrices in a feed-forward layer because it is gated" if model.gated else ""),
            "a tied unembedding is counted once, as the embedding",
        ),
    )


def _per_width(model: ModelEntry) -> str:
    """Neurons of a layer, as a multiple of the width of the stream."""
    ends = dict.fromkeys(f"{size / model.width:.2f}" for size in (min(model.sizes), max(model.sizes)))
    return " to ".join(ends)


def _facts(run: Run) -> Finding:
    model, corpus, options = run.manifest.model, run.manifest.corpus, run.manifest.options
    nulls = sorted({str(kind) for kind in _nulls(run)})
    facts = {
        "model": model.id,
        "family": model.family,
        "layers x neurons": f"{model.layers} x {model.cells.spelled} = {len(model.cells):,}",
        **(
            {"neurons that run at a token": f"{running(run).sum():,.0f}, on average"} if model.experts else {}
        ),
        "width, vocabulary": f"{model.width:,}, {model.vocabulary:,}",
        "feed-forward layer": f"{'gated, ' if model.gated else ''}{model.activation}",
        "largest error of the rebuilt logits": f"{chance(model.self_check)} of their range",
        "corpus": corpus.id,
        "contexts": f"{corpus.contexts:,} ({corpus.segment}), {corpus.duplicates:,} duplicates left out",
        "tokens": f"{corpus.tokens:,}, of which {corpus.counted:,} count",
        "documents": f"{corpus.documents:,}",
        "dtype": str(options.get("dtype", "")),
        "triggers kept": f"{options.get('top', '')} for each neuron and sign, one a context",
        "null units": ", ".join(nulls) or "none",
        "not counted": ", ".join(run.manifest.excluded),
    }
    return Finding(
        id="model-and-corpus",
        items=("A2", "A3", "A26"),
        title="What was studied",
        says=f"{len(model.cells):,} neurons of {model.id} over {corpus.counted:,} tokens of "
        f"{corpus.documents:,} documents.",
        frame=pl.DataFrame({"what": list(facts), "value": list(facts.values())}),
    )


def _nulls(run: Run) -> list[str]:
    if "null_neurons" not in run.manifest.tables:
        return []
    return run.table("null_neurons").select("kind").unique().collect()["kind"].to_list()
