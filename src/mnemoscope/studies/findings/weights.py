"""What the weights of neurons say alone: in-out cosines, and values over the vocabulary, beside their nulls (A80).

All neurons are here and nothing is drawn of them, so that there are no intervals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from mnemoscope.studies.findings.finding import Finding, box, line, stack
from mnemoscope.studies.findings.statistics import BOXES, quantiles

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

ALIKE = 0.5  # |cosine| from which two directions are called alike
RARE = 0.01  # of shuffled values are beyond a limit
CLASSES = (
    "enrichment", "depletion", "conditional enrichment", "conditional depletion", "proportional", "neither",
)  # fmt: skip
_PAIRED = "a gate row, an up row and a value of three different neurons of the layer"
_SHUFFLED = "values with their entries shuffled"
_PANELS = {"neuron": "neurons", "paired": "three different neurons taken as one"}
_PAIRS = {"gate_up": "gate and up", "gate_value": "gate and value", "up_value": "up and value"}


def findings(run: Run) -> list[Finding]:
    """From the table `neuron_weights`."""
    rows = run.table("neuron_weights").collect()
    gated = rows["up_value"].null_count() < rows.height
    answers = [_cosines(rows, gated)]
    if gated:
        answers.append(_classes(rows))
    return [*answers, _kinds(rows), _silent(rows)]


def _cosines(rows: pl.DataFrame, gated: bool) -> Finding:
    pairs = _PAIRS if gated else {"gate_value": "key and value"}
    parts, told = [], []
    for column, title in pairs.items():
        own, null = (rows.filter(pl.col("unit") == unit) for unit in ("neuron", "paired"))
        band = null.group_by("layer").agg(
            null=pl.col(column).median(),
            null_low=pl.col(column).quantile(0.05),
            null_high=pl.col(column).quantile(0.95),
        )
        boxes = own.group_by("layer").agg(*quantiles(pl.col(column))).join(band, on="layer").sort("layer")
        parts.append(boxes.with_columns(pair=pl.lit(title)))
        shares = [_beyond(frame[column].abs(), ALIKE) for frame in (own, null)]
        told.append(f"{title} {shares[0]:.1%} (in three different neurons {shares[1]:.1%})")
    count = rows.filter(pl.col("unit") == "neuron").height
    frame = pl.concat(parts)
    return Finding(
        id="in-out-cosines",
        items=("A80",),
        title="Does a neuron write what it reads?",
        says=f"Of all {count:,} neurons, so many have a cosine beyond {ALIKE} in either direction: {'; '.join(told)}.",
        frame=frame,
        figure=box(frame, "cosine", facet="pair", order=tuple(pairs.values())),
        paper="Gerstner and Schütze 2025: neurons that strengthen what they read in early and middle layers, and that "
        "weaken it in late ones",
        null=_PAIRED,
        notes=(BOXES, "gate and up rows with the norm before them, values with the one after"),
    )


def _beyond(values: pl.Series, limit: float) -> float:
    return float((values.to_numpy() > limit).mean())


def classes(rows: pl.DataFrame) -> pl.DataFrame:
    """With `class`, by which rows a value is like (|cosine| above `ALIKE`).

    enrichment, depletion  the up row, in the same or the opposite direction, and the gate row
    conditional ...        the up row, and not the gate row
    proportional           the gate row, and not the up row
    """
    up, gate = pl.col("up_value"), pl.col("gate_value").abs() > ALIKE
    side = pl.when(up > 0).then(pl.lit("enrichment")).otherwise(pl.lit("depletion"))
    of_up = pl.when(gate).then(side).otherwise(pl.lit("conditional ") + side)
    rest = pl.when(gate).then(pl.lit("proportional")).otherwise(pl.lit("neither"))
    return rows.with_columns(pl.when(up.abs() > ALIKE).then(of_up).otherwise(rest).alias("class"))


def _classes(rows: pl.DataFrame) -> Finding:
    named = classes(rows.filter(pl.col("unit") != "shuffled"))
    share = (
        named.group_by("unit", "layer", "class")
        .len()
        .with_columns(value=pl.col("len") / pl.col("len").sum().over("unit", "layer"))
    )
    order = pl.DataFrame({"class": CLASSES, "place": range(len(CLASSES))})
    frame = (
        share.join(order, on="class")
        .with_columns(panel=pl.col("unit").replace_strict(_PANELS))
        .sort("panel", "place", "layer")
        .select("panel", "layer", "class", "value", neurons="len")
    )
    by_class = {
        unit: dict(members["class"].value_counts(normalize=True).iter_rows())
        for (unit,), members in named.group_by("unit")
    }
    told = ", ".join(
        f"{name} {by_class['neuron'].get(name, 0):.1%} ({by_class['paired'].get(name, 0):.1%})"
        for name in CLASSES[:-1]
    )
    count = rows.filter(pl.col("unit") == "neuron").height
    return Finding(
        id="in-out-classes",
        items=("A80",),
        title="Neurons by what they do to the direction that they read",
        says=f"Of all {count:,} neurons, in brackets of three different neurons taken as one: {told}.",
        frame=frame,
        figure=stack("neurons (%)", color="class", facet="panel", share=True, order=CLASSES, rest="neither"),
        null=_PAIRED,
        notes=(
            f"two directions are alike from a |cosine| of {ALIKE} on; enrichment and depletion: the value is like the "
            "up row (in the same or the opposite direction) and the gate row; conditional: like the up row alone; "
            "proportional: like the gate row alone",
        ),
    )


_KINDS = ("prediction", "suppression", "partition")


def limits(shuffled: pl.DataFrame) -> tuple[float, float]:
    """Excess kurtosis and standard deviation that one in a hundred shuffled values is beyond."""
    kurtosis, std = (shuffled[name].quantile(1 - RARE) for name in ("logit_kurtosis", "logit_std"))
    return float(kurtosis or 0), float(std or 0)


def kinds(rows: pl.DataFrame, limit: tuple[float, float]) -> pl.DataFrame:
    """With `kind` of each value, for a coefficient above 0: a heavy tail with a skew upwards or downwards, or a wide
    spread without one; null if it is none."""
    heavy, up = pl.col("logit_kurtosis") > limit[0], pl.col("logit_skewness") > 0
    wide = pl.col("logit_std") > limit[1]
    tail = pl.when(up).then(pl.lit("prediction")).otherwise(pl.lit("suppression"))
    return rows.with_columns(kind=pl.when(heavy).then(tail).when(wide).then(pl.lit("partition")))


def _kinds(rows: pl.DataFrame) -> Finding:
    own, shuffled = (rows.filter(pl.col("unit") == unit) for unit in ("neuron", "shuffled"))
    even = pl.col("neuron") % 2 == 0
    limit = limits(shuffled.filter(even))
    null = kinds(shuffled.filter(~even), limit)["kind"].value_counts(normalize=True)
    chance = dict(null.drop_nulls().iter_rows())
    by_layer = (
        kinds(own, limit)
        .group_by("layer", maintain_order=True)
        .agg(*((pl.col("kind") == name).fill_null(False).mean().alias(name) for name in _KINDS))
    )
    frame = by_layer.unpivot(_KINDS, index="layer", variable_name="kind", value_name="value")
    frame = frame.with_columns(
        null=pl.col("kind").replace_strict(
            {name: chance.get(name, 0.0) for name in _KINDS}, return_dtype=pl.Float64
        )
    )
    named = kinds(own, limit)["kind"]
    told = ", ".join(f"{int((named == name).sum() or 0):,} {name} neurons" for name in _KINDS)
    expected = ", ".join(f"{chance.get(name, 0) * own.height:,.0f}" for name in _KINDS)
    return Finding(
        id="prediction-suppression-partition",
        items=("A80",),
        title="Prediction, suppression and partition neurons",
        says=f"Of all {own.height:,} neurons, by how the logits of their value are spread over the vocabulary: {told}; "
        f"as many shuffled values would give {expected}.",
        frame=frame,
        figure=line(frame, "neurons (%)", color="kind", share=True, order=_KINDS),
        paper="Gurnee et al. 2024: prediction neurons from the middle on, most before the last layers, and then "
        "suppression neurons",
        null=f"{_SHUFFLED}, other ones than the limits are from",
        notes=(
            f"prediction and suppression: excess kurtosis above {limit[0]:.2f} and a skew upwards or downwards; "
            f"partition: a standard deviation above {limit[1]:.3f} logits at unit length without that; "
            f"{RARE:.0%} of shuffled values are beyond each",
            "for a coefficient above 0; where a gated neuron's is below, prediction and suppression change places",
        ),
    )


def _silent(rows: pl.DataFrame) -> Finding:
    """Entropy neurons: values that the unembedding hardly reads."""
    own, shuffled = (rows.filter(pl.col("unit") == unit) for unit in ("neuron", "shuffled"))
    even = pl.col("neuron") % 2 == 0
    limit = float(shuffled.filter(even)["silent_share"].quantile(1 - RARE) or 0)
    chance = _beyond(shuffled.filter(~even)["silent_share"], limit)
    frame = (
        own.group_by("layer", maintain_order=True)
        .agg(value=(pl.col("silent_share") > limit).mean(), most=pl.col("silent_share").max())
        .with_columns(null=pl.lit(chance))
    )
    many = int((own["silent_share"] > limit).sum())
    top = own.sort("silent_share", descending=True).head(3)
    named = ", ".join(
        f"L{row['layer']}N{row['neuron']} ({row['silent_share']:.0%})" for row in top.iter_rows(named=True)
    )
    largest = frame.sort("value", descending=True).row(0, named=True)
    return Finding(
        id="entropy-neurons",
        items=("A80",),
        title="Values that the unembedding hardly reads: entropy neurons",
        says=f"{many:,} of {own.height:,} values have more than {limit:.1%} of their squared length in the fiftieth of "
        f"all directions that moves logits least, where as many shuffled values give {chance * own.height:,.0f}; most "
        f"in layer {largest['layer']} ({largest['value']:.1%} of its neurons), first {named}.",
        frame=frame,
        figure=line(frame, "neurons (%)", share=True),
        paper="Stolfo et al. 2024: a few neurons of the last layers, which make the model less sure through the norm",
        null=f"{_SHUFFLED}, other ones than the limit is from",
        notes=(
            "such a value moves all logits by changing the scale of the final norm; `frozen` does not see it",
            f"limit: {RARE:.0%} of shuffled values are beyond it",
        ),
    )
