"""Where the answer to a question stands at every point of the stream: does it rise layer by layer? (A66, A76)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import wilson
from mnemoscope.studies.findings.finding import Finding, line, of_row, slug, stack
from mnemoscope.studies.findings.statistics import as_series, number

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LEAST = 5  # questions of a label that are worth a line of their own
_RULE = (
    "of an answer of several tokens the first is followed, with a leading space where that is more probable"
)
_NULL = "the answer of another question of the same label (of the set, where the label has but one)"


def findings(run: Run) -> list[Finding]:
    """From the table `question_ranks`, for each set of questions."""
    rows = run.table("question_ranks").collect()
    answers = []
    for name in rows["set"].unique(maintain_order=True):
        of_set = rows.filter(pl.col("set") == name)
        answers += [_ranks(name, of_set), _labels(name, of_set), _steps(name, of_set)]
    return answers


def _ranks(name: str, rows: pl.DataFrame) -> Finding:
    """A76: median and quartiles of the rank, under both lenses."""
    frame = (
        rows.group_by("lens", "point", maintain_order=True)
        .agg(
            pl.col("layer").first(),
            pl.col("part").first(),
            median=pl.col("rank").median(),
            quarter=pl.col("rank").quantile(0.25),
            three_quarters=pl.col("rank").quantile(0.75),
            first=(pl.col("rank") == 0).mean(),
            null=pl.col("null_rank").median(),
            questions=pl.len(),
        )
        .with_columns(depth=pl.col("point") / 2, lens=pl.col("lens") + " lens")
    )
    own = frame.filter(pl.col("lens") == "own lens")
    half = own.filter(pl.col("depth") <= own["depth"].max() / 2).row(-1, named=True)  # type: ignore[operator]
    end = own.row(-1, named=True)
    share = wilson(np.array(end["first"] * end["questions"]), np.array(end["questions"]))
    falls = _back(rows.filter(pl.col("lens") == "own"))
    return Finding(
        id=f"answer-rank-{slug(name)}",
        items=("A76", "A66"),
        title=f"Rank of the answer along the stream ({name})",
        says=f"Over {end['questions']} questions the median rank of the answer is {half['median']:,.0f} half way up "
        f"and {end['median']:,.0f} at the end, where {number(share, form='.0%')} "
        f"are first; from one point to the next it gets worse in {falls:.0%} of all steps.",
        frame=frame,
        figure=line(
            frame,
            "rank (0 is first)",
            x="depth",
            y="median",
            x_title="layers passed (steps of a half: attention, feed-forward)",
            color="lens",
            low="quarter",
            high="three_quarters",
            log_y=True,
            order=("own lens", "raw lens", "tuned lens"),
        ),
        null=f"median rank of {_NULL}",
        notes=("tinted bands are quartiles over the questions, no intervals", _RULE),
    )


def _back(rows: pl.DataFrame) -> float:
    """Share of steps along the stream that bring the rank of an answer down."""
    table = rows.sort("question", "point")["rank"].to_numpy().reshape(rows["question"].n_unique(), -1)
    return float((np.diff(table, axis=1) > 0).mean())


def _labels(name: str, rows: pl.DataFrame) -> Finding:
    """A66: the share of answers that are first, by label."""
    frame = (
        rows.filter(pl.col("lens") == "own")
        .group_by("label", "point", maintain_order=True)
        .agg(
            first=(pl.col("rank") == 0).sum(), questions=pl.len(), median_rank=pl.col("rank").median(),
            null=(pl.col("null_rank") == 0).mean(),
        )
        .with_columns(depth=pl.col("point") / 2)
    )  # fmt: skip
    share = wilson(frame["first"].to_numpy(), frame["questions"].to_numpy())
    frame = frame.with_columns(**as_series(share, "share"))
    large = frame.filter(pl.col("questions") >= LEAST)
    ends = (large if large.height else frame).group_by("label").last().sort("share", "label", descending=True)
    told = ", ".join(
        f"{row['label'] or 'without a label'} {of_row(row, '.0%')}" for row in ends.iter_rows(named=True)
    )
    return Finding(
        id=f"answer-first-{slug(name)}",
        items=("A66", "A76"),
        title=f"Answers that are first, by label ({name})",
        says=f"At the end of the stream the answer is first for {told}.",
        frame=frame,
        figure=line(
            frame,
            "questions whose answer is first (%)",
            x="depth",
            y="share",
            x_title="layers passed",
            facet="label",
            share=True,
        ),
        null=_NULL,
        resampled="questions (Wilson)",
        notes=("own lens", _RULE),
    )


def _steps(name: str, rows: pl.DataFrame) -> Finding:
    """A76 against A21: from which point on the answer stays first."""
    own = rows.filter(pl.col("lens") == "own").sort("question", "point")
    count = own["point"].n_unique()
    right = (own["rank"].to_numpy() == 0).reshape(-1, count)
    stays = np.flip(np.logical_and.accumulate(np.flip(right, 1), axis=1), 1)
    known = stays[:, -1]
    first = np.argmax(stays[known], axis=1)
    part = np.where(first == 0, "embedding", np.where(first % 2 == 1, "attention", "feed-forward"))
    frame = (
        pl.DataFrame({"layer": (first + 1) // 2 - 1, "part": part})
        .group_by("layer", "part")
        .agg(questions=pl.len())
        .sort("layer", "part")
    )
    middle = float(np.median((first + 1) // 2 - 1)) if known.any() else float("nan")
    by = float((part == "feed-forward").mean()) if known.any() else float("nan")
    return Finding(
        id=f"answer-settles-{slug(name)}",
        items=("A76", "A21"),
        title=f"Where the answer settles ({name})",
        says=f"Of the {int(known.sum())} answers that end first, half are first for good by layer {middle:.0f}; a "
        f"feed-forward layer took the last step in {by:.0%}."
        if known.any()
        else "No answer ends first.",
        frame=frame,
        figure=stack(
            "questions",
            x_title="layer from which on the answer is first",
            y="questions",
            color="part",
            order=("attention", "feed-forward", "embedding"),
        )
        if known.any()
        else None,
        notes=("own lens",),
    )
