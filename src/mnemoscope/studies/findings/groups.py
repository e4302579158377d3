"""What a prediction loses without ten, a hundred or three hundred neurons, chosen by each score (A79)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from mnemoscope.intervals import mean_by_document
from mnemoscope.studies.findings.finding import Finding, line
from mnemoscope.studies.findings.statistics import columns, contrast, number

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SCORES = {
    "increase": "increase C",
    "weight": "|m||v|",
    "coefficient": "|m|",
    "standing": "standing of the token",
}
_MATCHED = "for each neuron of a group another of the same layer with nearly the same |m||v|"


def findings(run: Run) -> list[Finding]:
    """From the table `group_ablations`."""
    rows = run.table("group_ablations").with_columns(reciprocal=1 / (pl.col("rank") + 1)).collect()
    return [
        _lost(rows, "log_probability", "log-probability", "nats"),
        _lost(rows, "logit", "logit above the mean token", "logits"),
        _lost(rows, "reciprocal", "reciprocal rank", "1 is first"),
    ]


def changes(rows: pl.DataFrame, measure: str) -> pl.DataFrame:
    """For each example, score and size: `own` and `matched`, what a measure changes by without the group."""
    whole = rows.filter(pl.col("kind") == "whole").select("example", before=measure)
    cut = rows.filter(pl.col("kind") != "whole").join(whole, on="example", how="left", maintain_order="left")
    keys = ["example", "document", "score", "neurons"]
    changed = cut.with_columns(change=pl.col(measure) - pl.col("before"))
    return changed.pivot("kind", index=keys, values="change", maintain_order=True)


def _lost(rows: pl.DataFrame, measure: str, name: str, unit: str) -> Finding:
    changed = changes(rows, measure)
    parts, told, contrasts = [], [], []
    largest = int(changed["neurons"].to_numpy().max())
    for score, label in SCORES.items():
        for (size,), group in changed.filter(pl.col("score") == score).group_by(
            "neurons", maintain_order=True
        ):
            documents = group["document"].to_numpy()
            own, null = (mean_by_document(group[kind].to_numpy(), documents) for kind in ("own", "matched"))
            apart = mean_by_document((group["own"] - group["matched"]).to_numpy(), documents)
            parts.append(pl.DataFrame({"score": [label], "neurons": [size], **columns(own, null=null)}))
            if size == largest:
                contrasts.append(contrast(score, apart))
                told.append(f"{label}: {number(own)}, matched {number(null)}, difference {number(apart)}")
    count, sources = changed["example"].n_unique(), changed["document"].n_unique()
    frame = pl.concat(parts)
    return Finding(
        id=f"groups-{measure.replace('_', '-')}",
        items=("A79",),
        title=f"What the {name} of the prediction loses without the neurons that a score lists",
        says=f"Change of the prediction's {name} ({unit}) without the {largest} neurons of all layers with the largest "
        f"score, and without {largest} others of the same layers and strength: {'; '.join(told)} (means over {count:,} "
        f"prefixes of {sources:,} test documents).",
        frame=frame,
        figure=line(
            frame,
            f"change of the {name} ({unit})",
            x="neurons",
            x_title="neurons set to zero at the last token",
            facet="score",
            log_x=True,
            order=tuple(SCORES.values()),
        ),
        paper="300 neurons set to zero, chosen by seven scores: reciprocal rank, p and log p of the answer",
        null=_MATCHED,
        resampled="documents",
        notes=_strengths(rows, largest),
        contrasts=tuple(contrasts),
    )


def _strengths(rows: pl.DataFrame, largest: int) -> tuple[str, ...]:
    """How well the matched groups are matched: those that write most have no equal."""
    means = (
        rows.filter(pl.col("neurons") == largest)
        .group_by("score", "kind")
        .agg(pl.col("strength").mean())
        .pivot("kind", index="score", values="strength")
    )
    shares = {row["score"]: (row["own"], row["matched"]) for row in means.iter_rows(named=True)}
    told = ", ".join(
        f"{label} {100 * shares[score][0]:.1f} % (matched {100 * shares[score][1]:.1f} %)"
        for score, label in SCORES.items()
        if score in shares
    )
    return (
        f"share of {largest} neurons in the sum of |m||v| over all: {told}; no others write as much as those "
        "that write most, so that their match is weaker",
        "coefficients are set to zero at the last token, and everything downstream reacts",
        "standing: how far the prediction is above the mean token in what a neuron writes, in standard deviations",
    )
