"""Where the answer to a question stands at every point of the stream: does it rise layer by layer? (A66, A76)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mnemoscope.intervals import Interval, mean_by_document, share_by_document
from mnemoscope.studies.findings.finding import Finding, line, of_row, slug, stack
from mnemoscope.studies.findings.statistics import columns, number

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LEAST = 5  # questions of a label that are worth a line of their own
_RULE = (
    "of an answer of several tokens the first is followed, with a leading space where that is more probable"
)
_BASIS = (
    "in the output basis: the stream is read through the model's own final norm and unembedding, with no map fitted to "
    "its layers, so that an answer held in another basis counts as unknown"
)
_ANSWERS = "answers: questions with the same answer count as one"
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
    last = rows.filter(pl.col("lens") == "own", pl.col("point") == rows["point"].max())
    share, falls = first_by_answer(last), _back(rows.filter(pl.col("lens") == "own"))
    return Finding(
        id=f"answer-rank-{slug(name)}",
        items=("A76", "A66"),
        title=f"Rank of the answer along the stream, in the output basis ({name})",
        says=f"Over {end['questions']} questions with {last['answer'].n_unique()} answers, read in the output basis "
        f"(own lens), the median rank of the answer is {half['median']:,.0f} after half of the layers and "
        f"{end['median']:,.0f} at the end, another question's {_rank(half['null'])} and {_rank(end['null'])}; at the "
        f"end {number(share, form='.0%')} of the answers are first; from one point of the stream to the next the rank "
        f"gets worse in {falls:.0%} of all steps.{_tuned(rows)}",
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
        resampled=_ANSWERS,
        notes=("tinted bands are quartiles over the questions, no intervals", _BASIS, _RULE),
    )


def _rank(value: float | None) -> str:
    return "undefined" if value is None else f"{value:,.0f}"


def first_by_answer(rows: pl.DataFrame) -> Interval:
    """The share of questions whose answer is first, resampled by answer; one row a question."""
    return share_by_document((rows["rank"] == 0).to_numpy().astype(float), _numbers(rows["answer"]))


def _numbers(names: pl.Series) -> np.ndarray:
    return np.unique(names.to_numpy(), return_inverse=True)[1]


def _tuned(rows: pl.DataFrame) -> str:
    """What the tuned lens says before the last feed-forward layer, beside the own lens; nothing without one."""
    before = rows.filter(pl.col("part") == "attention").filter(pl.col("point") == pl.col("point").max())
    tuned, own = (before.filter(pl.col("lens") == lens) for lens in ("tuned", "own"))
    if not tuned.height:
        return ""
    return (
        f" Before the last feed-forward layer the answer is first for {number(first_by_answer(own), form='.0%')} of "
        f"the questions under the own lens and for {number(first_by_answer(tuned), form='.0%')} under the tuned lens."
    )


def _back(rows: pl.DataFrame) -> float:
    """Share of steps along the stream that bring the rank of an answer down."""
    table = rows.sort("question", "point")["rank"].to_numpy().reshape(rows["question"].n_unique(), -1)
    return float((np.diff(table, axis=1) > 0).mean())


def _labels(name: str, rows: pl.DataFrame) -> Finding:
    """A66: the share of answers that are first, by label."""
    own = rows.filter(pl.col("lens") == "own").sort("label", "point", "question")
    frame = (
        own.group_by("label", "point", maintain_order=True)
        .agg(
            first=(pl.col("rank") == 0).sum(), questions=pl.len(), median_rank=pl.col("rank").median(),
            null=(pl.col("null_rank") == 0).mean(),
        )
        .with_columns(depth=pl.col("point") / 2)
    )  # fmt: skip
    frame = pl.concat(
        [
            of_label.with_columns(**columns(_first_by_point(own.filter(pl.col("label") == label)), "share"))
            for (label,), of_label in frame.group_by("label", maintain_order=True)
        ]
    )
    large = frame.filter(pl.col("questions") >= LEAST)
    ends = (large if large.height else frame).group_by("label").last().sort("share", "label", descending=True)
    told = ", ".join(
        f"{row['label'] or 'without a label'} {of_row(row, '.0%')} of {row['questions']} (by chance "
        f"{row['null'] or 0:.0%})"
        for row in ends.iter_rows(named=True)
    )
    return Finding(
        id=f"answer-first-{slug(name)}",
        items=("A66", "A76"),
        title=f"Answers that are first, by label, in the output basis ({name})",
        says=f"At the end of the stream (own lens) the answer is first, by label and resampled by answer, for {told}.",
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
        resampled=_ANSWERS,
        notes=("own lens", _BASIS, _RULE),
    )


def _first_by_point(rows: pl.DataFrame) -> Interval:
    """f64[point]: the share of questions of one label whose answer is first, resampled by answer."""
    table = rows.sort("question", "point")
    hits = (table["rank"] == 0).to_numpy().astype(float).reshape(table["question"].n_unique(), -1)
    answers = table.unique("question", keep="first", maintain_order=True)["answer"]
    return share_by_document(hits, _numbers(answers))


def _steps(name: str, rows: pl.DataFrame) -> Finding:
    """A76 against A21: from which point on the answer stays first."""
    own = rows.filter(pl.col("lens") == "own").sort("question", "point")
    count = own["point"].n_unique()
    right = (own["rank"].to_numpy() == 0).reshape(-1, count)
    stays = np.flip(np.logical_and.accumulate(np.flip(right, 1), axis=1), 1)
    known = stays[:, -1]
    first = np.argmax(stays[known], axis=1)
    kind = np.where(first == 0, "embedding", np.where(first % 2 == 1, "attention", "feed-forward"))
    frame = (
        pl.DataFrame({"layer": (first + 1) // 2 - 1, "part": kind})
        .group_by("layer", "part")
        .agg(questions=pl.len())
        .sort("layer", "part")
    )
    middle = float(np.median((first + 1) // 2 - 1)) if known.any() else float("nan")
    by = float((kind == "feed-forward").mean()) if known.any() else float("nan")
    taken = mean_by_document(
        (first == count - 1).astype(float), _numbers(own.filter(pl.col("point") == 0)["answer"])[known]
    )
    return Finding(
        id=f"answer-settles-{slug(name)}",
        items=("A76", "A21"),
        title=f"Where the answer settles, in the output basis ({name})",
        says=f"Of the {int(known.sum())} of {len(known)} questions whose answer ends first (own lens), half have it "
        f"first for good by layer {middle:.0f} of {count // 2}; a feed-forward layer took the last step in {by:.0%}, "
        f"the very last one of all in {number(taken, form='.0%')}."
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
        resampled=_ANSWERS if known.any() else "",
        notes=("own lens", _BASIS),
    )
