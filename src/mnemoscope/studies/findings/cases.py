"""What tells an answer from its neighbours, over many questions with two foils each (A50-A54).

Yu et al. 2023 took one question apart. Here every figure is a mean over questions beside what chance gives; single
neurons and ablations are in `case_parts.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, mean_by_document, share_by_document, wilson
from mnemoscope.studies.findings import case_parts
from mnemoscope.studies.findings.finding import Finding, bar, line, slug
from mnemoscope.studies.findings.statistics import as_series, columns, number, percent

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

FOILS = ("near", "far")
CLASSES = ("subject", "before", "after", "last")
MATTERS = 0.1  # of the largest change: a vector that changes as much matters
_TABLES = ("questions", "stream", "sources", "origins", "neurons", "ablations")
_QUESTIONS = "questions"
_DEPTH = "layers passed (steps of a half: attention, feed-forward)"
_RULE = (
    "a near foil answers another question of the same label, a far one a question of another label; logits are under "
    "the frozen lens, before a soft cap"
)

Tables = dict[str, pl.DataFrame]


def findings(run: Run) -> list[Finding]:
    """From the tables `case_*`, for each set of questions."""
    every = {name: run.table(f"case_{name}").collect() for name in _TABLES}
    answers: list[Finding] = []
    for name in every["questions"]["set"].unique(maintain_order=True):
        of_set = every["questions"].filter(pl.col("set") == name)["question"].implode()
        tables = {key: rows.filter(pl.col("question").is_in(of_set)) for key, rows in every.items()}
        answers += [
            _along(name, tables),
            _by_layer(name, tables),
            *_sources(name, tables),
            _origins(name, tables),
        ]
        answers += case_parts.findings(name, tables)
    return answers


def mean(values: np.ndarray) -> Interval:
    """Means over questions of f64[question, ...], NaN left out, with an interval by resampling questions."""
    return mean_by_document(values, np.arange(len(values)))


def _differences(stream: pl.DataFrame, column: str) -> dict[str, np.ndarray]:
    """f64[question, point] for each foil: the answer's logit minus the foil's."""
    rows = stream.sort("question", "point")
    words = {
        word: rows.filter(pl.col("word") == word)[column].to_numpy().astype(float).reshape(_count(rows), -1)
        for word in ("answer", *FOILS)
    }
    return {foil: words["answer"] - words[foil] for foil in FOILS}


def _count(rows: pl.DataFrame) -> int:
    return rows["question"].n_unique()


def _along(name: str, tables: Tables) -> Finding:
    """A50: the answer's logit minus each foil's at every point of the stream."""
    own, null = (_differences(tables["stream"], column) for column in ("logit", "null"))
    means = {foil: mean(own[foil]) for foil in FOILS}
    chance = {foil: mean(null[foil]) for foil in FOILS}
    parts = [
        pl.DataFrame(
            {
                "depth": np.arange(len(means[foil].value)) / 2,
                **columns(means[foil]),
                "null": chance[foil].value,
            }
        ).with_columns(foil=pl.lit(f"{foil} foil"))
        for foil in FOILS
    ]
    half = len(means["near"].value) // 4 * 2
    right = (tables["questions"]["rank"] == 0).sum()
    frame = pl.concat(parts)
    return Finding(
        id=f"case-along-{slug(name)}",
        items=("A50",),
        title=f"The answer against its foils along the stream (Yu Figure 9; {name})",
        says=f"Mean over {_count(tables['stream'])} questions ({right} answered right), in logits: the answer's minus "
        f"the near foil's is {number(means['near'], half)} before layer {half // 2}, half way up, and "
        f"{number(means['near'], -1)} at the end, minus the far foil's {number(means['far'], half)} and "
        f"{number(means['far'], -1)}; at the prompt of another question with another answer the same words end at "
        f"{number(chance['near'], -1)} and {number(chance['far'], -1)}.",
        frame=frame,
        figure=line(
            frame, "logit of the answer minus the foil's (mean)", x="depth", x_title=_DEPTH, color="foil"
        ),
        paper="one question: Paris and London alike until layer 13 of 16, Bordeaux always below Paris",
        null="the same words at the prompt of another question with another answer",
        resampled=_QUESTIONS,
        notes=(_RULE,),
    )


def _by_layer(name: str, tables: Tables) -> Finding:
    """A51: what each attention and feed-forward layer adds to that difference."""
    parts, best = [], {}
    own, null = (_differences(tables["stream"], column) for column in ("logit", "null"))
    for foil in FOILS:
        increase, chance = mean(np.diff(own[foil])), mean(np.diff(null[foil]))
        step = np.arange(len(increase.value))
        part = np.where(step % 2 == 0, "attention", "feed-forward")
        # Each by its own largest step: at the other's it would be smaller by that choice alone.
        top, alike = int(np.argmax(increase.value)), int(np.argmax(chance.value))
        best[foil] = (
            f"{part[top]} of layer {top // 2} adds {number(increase, top)} (at another prompt {part[alike]} of layer "
            f"{alike // 2}, {number(chance, alike)})"
        )
        parts.append(
            pl.DataFrame(
                {
                    "foil": np.repeat(f"{foil} foil", len(step)), "layer": step // 2, "part": part, **columns(increase),
                    "null": chance.value,
                }
            )
        )  # fmt: skip
    frame = pl.concat(parts)
    return Finding(
        id=f"case-layers-{slug(name)}",
        items=("A51",),
        title=f"What each layer adds to the answer against its foils (Yu Figure 10; {name})",
        says=f"Of all layers most is added to the logit of the answer minus the near foil's, mean over "
        f"{_count(tables['stream'])} questions, where {best['near']}, and minus the far foil's where {best['far']}; "
        "the null is the same words at the prompt of another question with another answer, by its own largest step.",
        frame=frame,
        figure=line(
            frame,
            "logits added to the difference (mean)",
            color="part",
            facet="foil",
            order=("attention", "feed-forward"),
        ),
        paper="one question: Paris minus London rises by attention in layers 12-15 of 16, Paris minus Bordeaux by "
        "feed-forward layers 11-13",
        null="the same words at the prompt of another question with another answer",
        resampled=_QUESTIONS,
        notes=("a layer's biases are in what it adds", _RULE),
    )


def _sources(name: str, tables: Tables) -> list[Finding]:
    """A52: from which token attention brings what tells the answer from the near foil."""
    rows = tables["sources"].filter(pl.col("class").is_not_null())
    if rows.height == 0:
        return []
    largest = (
        rows.sort("increase", descending=True, maintain_order=True)
        .group_by("question", maintain_order=True)
        .first()
    )
    total = largest.height
    counts = [int((largest["class"] == kind).sum()) for kind in CLASSES]
    share = wilson(np.array(counts), np.full(len(CLASSES), total))
    # Each question counts alike, whatever the length of its prompt.
    tokens = [
        rows.group_by("question", maintain_order=True).agg((pl.col("class") == kind).mean())["class"]
        for kind in CLASSES
    ]
    chance = np.array([float(shares.to_numpy().mean()) for shares in tokens])
    brought = [mean(_brought(rows, kind)) for kind in CLASSES]
    logits, low, high = np.array(brought).T
    frame = pl.DataFrame(
        {
            "class": CLASSES,
            **columns(share),
            "null": chance,
            "logits": logits,
            "logits_low": low,
            "logits_high": high,
        }
    )
    finding = Finding(
        id=f"case-sources-{slug(name)}",
        items=("A52",),
        title=f"The token that tells the answer from the near foil ({name})",
        says=f"The token from which attention brings most for the answer against the near foil is one of the subject "
        f"in {percent(share, 0)} of {total} questions; of the prompt's tokens {100 * chance[0]:.1f} % are. What "
        f"attention of all layers brings from the subject adds {number(brought[0])} logits to the difference, from the "
        f"last token itself {number(brought[3])}.",
        frame=frame,
        figure=bar(frame, "questions (%)", x="class", x_title="token with the largest increase", share=True),
        paper="one question: the sub-value of the country's name carries the improvement",
        null="share of the prompt's tokens that are of this kind",
        resampled="questions (Wilson)",
        notes=("all heads of all layers together, for each token they read from",),
    )
    return [finding]


def _brought(rows: pl.DataFrame, kind: str) -> np.ndarray:
    """f64[question]: what all tokens of a kind contribute together."""
    those = pl.col("increase").filter(pl.col("class") == kind).sum()
    return rows.group_by("question", maintain_order=True).agg(those)["increase"].to_numpy().astype(float)


_METHODS = {"recomputed": "weights recomputed (method 1)", "fixed": "weights kept (method 2)"}


def _origins(name: str, tables: Tables) -> Finding:
    """A53, A54: what the best attention sub-value loses with each earlier vector of its source."""
    rows = tables["origins"].sort("question", "vector")
    questions = [vectors for _, vectors in rows.group_by("question", maintain_order=True)]
    points = rows.select("vector", "point").unique().sort("vector")
    parts, said = [], []
    for method, title in _METHODS.items():
        grid = np.full((len(questions), points.height), np.nan)
        for row, vectors in enumerate(questions):
            grid[row, : vectors.height] = vectors[method].to_numpy()
        size = np.abs(grid)
        most = np.nanmax(size, axis=1, keepdims=True)
        first = wilson(np.array((np.nanargmax(size, axis=1) == 0).sum()), np.array(len(grid)))
        matter = share_by_document(
            (size >= MATTERS * most).sum(1) / (~np.isnan(grid)).sum(1), np.arange(len(grid))
        )
        said.append(
            f"{title}: the embedding in {percent(first)} of the questions; {percent(matter)} of the vectors"
        )
        alike = np.where(np.isnan(grid), np.nan, np.nanmean(grid, axis=1, keepdims=True))
        parts.append(points.with_columns(method=pl.lit(title), null=pl.Series(mean(alike).value),
                                         **as_series(mean(grid))))  # fmt: skip
    chance = float(np.mean([1 / vectors.height for vectors in questions]))
    frame = pl.concat(parts).fill_nan(None)
    return Finding(
        id=f"case-origins-{slug(name)}",
        items=("A53", "A54"),
        title=f"What the best attention sub-value loses without one vector of its source (Yu Figures 11, 12; {name})",
        says=f"Of the vectors of a source, over {len(questions)} questions, the one that changes the score (logits) of "
        f"the best attention sub-value most, and how many change it at least a tenth as much: {'; '.join(said)}. With "
        f"all vectors alike the embedding would be the first in {100 * chance:.1f} %.",
        frame=frame,
        figure=line(
            frame,
            "fall of answer minus near foil (logits, mean)",
            x="vector",
            x_title="vector taken out: 0 is Lin0, odd are attention, even feed-forward",
            color="method",
        ),
        paper="one question: with weights recomputed almost all vectors matter, with weights kept the embedding "
        "dominates",
        null="every vector of the source alike",
        resampled=_QUESTIONS,
        notes=(
            "the sub-value (what all heads of a layer take from one token) with the largest logit of answer minus near "
            "foil; the norm is computed again without the vector; questions whose sub-value is in a lower layer have "
            "fewer vectors",
        ),
    )
