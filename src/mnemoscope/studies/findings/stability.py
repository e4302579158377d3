"""Runs of the same neurons: do they have the same triggers? And the figures of all side by side.

Where most contexts of the runs coincide, triggers in those can be the same text and position; where they do not (two
halves of a corpus, or one text cut differently), only of the same kind: their last tokens are compared as multisets.
What another neuron of the layer has in common with one is the least that can be asked. Whether neurons keep their
triggers *more than anything else does* is asked of random directions and rotated axes of the same layers, where both
runs have mined the same ones: any direction of the stream is a function of the text, and keeps what it answers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.errors import QueryError
from mnemoscope.intervals import GROUPS, Interval, jackknifed, ratio
from mnemoscope.records import NEURON, NULLS, Cells
from mnemoscope.studies.findings.finding import Finding, line
from mnemoscope.studies.findings.statistics import ContextTokens, columns, percent, points
from mnemoscope.text.sampling import mixed

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SHARED = 0.5  # of the contexts of the smaller run, at least, to compare triggers as texts: else most could not coincide
_SIDE = ["layer", "neuron", "polarity"]


def comparable(one: Run, two: Run) -> None:
    """`QueryError` unless neurons, or units of one kind at the same points, and tokens of the two runs correspond."""
    a, b = one.manifest.model, two.manifest.model
    if _places(one) != _places(two):
        held = ["neurons" if each.units is None else f"units of {each.units.id}" for each in (a, b)]
        raise QueryError(
            f"comparing the triggers of {one.path} and {two.path}: they hold {held[0]} and {held[1]}, which are not of "
            "one kind, in the same layers and at the same points; give runs of the same kind of unit"
        )
    if (a.sizes, a.tokenizer_sha256) != (b.sizes, b.tokenizer_sha256):
        raise QueryError(
            f"comparing the triggers of {one.path} and {two.path}: the models ({a.id}: {a.layers} x {a.cells.spelled}, "
            f"{b.id}: {b.layers} x {b.cells.spelled}) do not have the same neurons and tokens; "
            "give runs of one model, or of its checkpoints"
        )


def _places(run: Run) -> list[tuple[object, ...]]:
    """Of units that are not neurons: kind, layer, what they read and where they write; empty for neurons."""
    units = run.manifest.model.units
    if units is None:
        return []
    places = run.table("units").select("layer", "reads", "writes").sort("layer").collect()
    return [(units.kind, *row) for row in places.iter_rows()]


def _of_units(one: Run, two: Run) -> tuple[str, ...]:
    """A note that says what neurons are in runs of other units."""
    held = [run.manifest.model.units for run in (one, two)]
    names = list(dict.fromkeys(units.id for units in held if units is not None))
    if not names:
        return ()
    note = f"neurons are here units of {' and '.join(names)}"
    if len({units.sha256 for units in held if units is not None}) > 1:
        note += (
            ", with other weights in one run than in the other: units of the same number are compared, which are the "
            "same unit only where one was trained from the other"
        )
    return (note,)


def findings(one: Run, two: Run, *, seed: int = 0) -> list[Finding]:
    """Overlap of triggers with its null; of statistics; of values where the weights differ."""
    comparable(one, two)
    return [_overlap(one, two, shared_contexts(one, two), seed), _statistics(one, two)]


class Shared(NamedTuple):
    """What two runs have in common.

    share  of the contexts of the smaller run, those that the other one has too
    texts  for each run context -> a number that equal texts share, of the contexts that both have
    """

    share: float
    texts: tuple[pl.DataFrame, pl.DataFrame]

    @property
    def enough(self) -> bool:
        """Whether triggers can be compared as texts."""
        return self.share >= SHARED


def shared_contexts(one: Run, two: Run) -> Shared:
    """The contexts that two runs have in common, by their tokens."""
    frames = [run.table("contexts").select("context", "document", "tokens").collect() for run in (one, two)]
    texts = [[tuple(tokens) for tokens in frame["tokens"].to_list()] for frame in frames]
    numbers = {text: number for number, text in enumerate(set(texts[0]) & set(texts[1]))}
    first, second = (
        pl.DataFrame(
            {
                "context": frame["context"],
                "document": frame["document"],
                "text": [numbers.get(text) for text in some],
            },
            schema_overrides={"text": pl.Int64},
        ).drop_nulls()
        for frame, some in zip(frames, texts, strict=True)
    )
    return Shared(len(numbers) / max(min(map(len, texts)), 1), (first, second))


UNITS = {NEURON: "neurons", "random": NULLS["random"], "rotated": NULLS["rotated"]}


def _populations(one: Run, two: Run) -> dict[str, Cells]:
    """Kinds of units that are the same in both runs."""
    populations = {NEURON: one.manifest.model.cells}
    options = [run.manifest.options.get("nulls") for run in (one, two)]
    if options[0] != options[1] or any("null_triggers" not in run.manifest.tables for run in (one, two)):
        return populations
    counts = one.table("null_neurons").group_by("kind", "layer").len().collect()
    for kind in (kind for kind in UNITS if kind != NEURON):
        sizes = dict(counts.filter(pl.col("kind") == kind).select("layer", "len").iter_rows())
        if sizes:
            populations[kind] = Cells(tuple(sizes.get(at, 0) for at in range(one.manifest.model.layers)))
    return populations


def triggers(run: Run, unit: str, cells: Cells, texts: pl.DataFrame | None) -> pl.DataFrame:
    """Triggers of the units of a kind: `side` (which unit and sign), `kind` (what makes two the same), `document`.

    A trigger's kind is its text and position, of those in contexts that both runs have; or, of all, its last token.
    """
    table = (
        run.table("triggers") if unit == NEURON else run.table("null_triggers").filter(pl.col("kind") == unit)
    )
    rows = table.select(*_SIDE, "context", "position").collect()
    if texts is not None:
        rows = rows.join(texts, on="context", how="inner")
        kind = pl.col("text") * 1_000_000 + pl.col("position")
    else:
        text = ContextTokens(run)
        place = text.place(rows)
        rows = rows.with_columns(
            token=pl.Series(text.tokens[place]), document=pl.Series(text.document[place])
        )
        kind = pl.col("token").cast(pl.Int64)
    return rows.select(cells.side(), kind=kind, document="document")


def shares(rows: pl.DataFrame) -> pl.DataFrame:
    """Per side and kind of trigger its share of the side's triggers."""
    counts = rows.group_by("side", "kind").len()
    return counts.with_columns(share=pl.col("len") / pl.col("len").sum().over("side")).drop("len")


def kept(one: pl.DataFrame, two: pl.DataFrame, layer: np.ndarray, layers: int | None = None) -> np.ndarray:
    """f64[1 + group, layer + 1]: means of `common` over the sides of each layer, and over all; then without each of
    `GROUPS` groups of documents, which are the same for all units.

    one, two  side, kind, document
    layer     i64[side]
    layers    of the model: the last may have no units; up to the last that has if None
    """
    layers = int(layer.max()) + 1 if layers is None else layers
    keys = one.select("side", "kind").unique().join(
        two.select("side", "kind").unique(), on=["side", "kind"], how="inner"
    ).with_row_index("key")  # fmt: skip
    owner = keys["side"].to_numpy()
    runs = []
    for rows in (one, two):
        group = mixed(rows["document"].to_numpy(), seed=1) % GROUPS
        matched = rows.join(keys, on=["side", "kind"], how="left", maintain_order="left")["key"]
        key = matched.cast(pl.Int64).fill_null(len(owner)).to_numpy()
        runs.append((group.astype(np.int64), rows["side"].to_numpy(), key))
    figures = []
    for left_out in range(-1, GROUPS):
        least, known = np.full(len(owner), np.inf), np.ones(len(layer), bool)
        for group, side, key in runs:
            read = group != left_out
            total = np.bincount(side[read], minlength=len(layer))
            count = np.bincount(key[read], minlength=len(owner) + 1)[: len(owner)]
            least = np.minimum(least, count / np.maximum(total, 1)[owner])
            known &= total > 0
        values = np.bincount(owner, least, len(layer))[known]
        sums = np.append(np.bincount(layer[known], values, layers), values.sum())
        figures.append(ratio(sums, np.append(np.bincount(layer[known], minlength=layers), known.sum())))
    return np.stack(figures)


def common(one: pl.DataFrame, two: pl.DataFrame, count: int) -> np.ndarray:
    """f64[side]: how much of two distributions over kinds is common: the sum of the smaller shares; NaN without one.

    one, two  side, kind, share
    """
    both = one.join(two, on=["side", "kind"], how="inner", suffix="_two")
    least = both.select("side", least=pl.min_horizontal("share", "share_two"))
    total = np.bincount(least["side"].to_numpy(), least["least"].to_numpy(), count)
    known = np.zeros((2, count), bool)
    for row, frame in zip(known, (one, two), strict=True):
        row[frame["side"].unique().to_numpy()] = True
    return np.where(known.all(0), total, np.nan)


def _overlap(one: Run, two: Run, shared: Shared, seed: int) -> Finding:
    layers = one.manifest.model.layers
    frames, told, whole, figures = [], {}, {}, {}
    for unit, cells in _populations(one, two).items():
        rows = [
            triggers(run, unit, cells, shared.texts[number] if shared.enough else None)
            for number, run in enumerate((one, two))
        ]
        layer = np.repeat(cells.each(), 2)
        first, second = map(shares, rows)
        overlap = common(first, second, len(layer))
        null = common(first, _dealt(second, cells, seed), len(layer))
        known = ~np.isnan(overlap) & ~np.isnan(null)
        figures[unit] = kept(rows[0], rows[1], layer, layers)
        documents = min(one_run["document"].n_unique() for one_run in rows)
        means = whole[unit] = jackknifed(figures[unit]).among(documents)
        places = [known & (layer == at) for at in range(layers)]
        limits = np.array([np.quantile(null[at], 0.95) if at.any() else np.nan for at in places])
        apart = np.array([null[at].mean() if at.any() else np.nan for at in places])
        above = float((overlap[known] > limits[layer[known]]).mean()) if known.any() else float("nan")
        told[unit] = (float(null[known].mean()) if known.any() else float("nan"), above)
        by_layer = means.at(slice(layers))
        band = Interval(apart, np.zeros(layers), limits)
        frames.append(
            pl.DataFrame({"layer": np.arange(layers), **columns(by_layer, "overlap", band)}).select(
                pl.lit(UNITS[unit]).alias("units"), pl.all()
            )
        )
    frame = pl.concat(frames)
    what = "triggers (text and position)" if shared.enough else "last tokens of triggers"
    of_both = (
        f" in the contexts of both runs ({shared.share:.0%} of the smaller one's)" if shared.enough else ""
    )
    others = [unit for unit in whole if unit != NEURON]
    beyond = [
        f"{points(jackknifed(figures[NEURON][:, -1] - figures[unit][:, -1]).among(documents))} beyond {UNITS[unit]}"
        for unit in others
    ]
    special = (
        "neurons keep " + " and ".join(beyond)
        if others
        else "no directions were mined alike in both runs, to say whether that is special"
    )
    beside = "".join(
        f", of {UNITS[unit]} {percent(whole[unit], -1)} (different ones {told[unit][0]:.1%})"
        for unit in others
    )
    known_by = "".join(f", of {UNITS[unit]} {told[unit][1]:.0%}" for unit in others)
    return Finding(
        id="trigger-stability",
        items=("A4",),
        title="Do neurons keep their triggers, and do they more than other directions?",
        says=f"On average {percent(whole[NEURON], -1)} of the {what}{of_both} of a neuron (with its sign) are common "
        f"to both runs, of different neurons {told[NEURON][0]:.1%}{beside}; {told[NEURON][1]:.0%} of the neurons have "
        f"more in common than 95 % of pairs of different neurons of their layer{known_by}; "
        f"{special}.",
        frame=frame,
        figure=line(
            frame, f"common {what} (%)", y="overlap", color="units", share=True, order=tuple(UNITS.values())
        ),
        null="each unit against another one of its kind and layer (mean, and up to the 95th percentile); and "
        "directions, because any function of the text keeps its triggers",
        resampled="documents of the triggers (jackknife over groups of them)",
        notes=(*_of_units(one, two), *(() if shared.enough else (_apart(shared.share),))),
    )


def _apart(share: float) -> str:
    """Why triggers are not compared as texts."""
    some = "no context is" if share == 0 else f"only {share:.1%} of the contexts of the smaller run are"
    return f"{some} in both runs (other text, or cut differently): triggers are compared by their last tokens"


def _dealt(rows: pl.DataFrame, cells: Cells, seed: int) -> pl.DataFrame:
    """The sides dealt out anew among the neurons of their layer, signs kept."""
    generator = np.random.default_rng(seed)
    cell = np.concatenate(
        [cells.offsets[layer] + _moved(cells.sizes[layer], generator) for layer in cells.layers]
    )
    side = rows["side"].to_numpy()
    return rows.with_columns(side=pl.Series(2 * cell[side // 2] + side % 2))


def _moved(count: int, generator: np.random.Generator) -> np.ndarray:
    """A random cyclic order: nobody keeps their place, unless alone."""
    order = generator.permutation(count)
    out = np.empty(count, np.int64)
    out[order] = np.roll(order, 1)
    return out


def _statistics(one: Run, two: Run) -> Finding:
    """How well the statistics of neurons agree, by layer (Spearman)."""
    names = ("mean", "std", "kurtosis", "positive_fraction")
    key = ["layer", "neuron"]
    a, b = (run.table("neurons").select(*key, *names).collect() for run in (one, two))
    both = a.join(b, on=key, how="inner", suffix="_two").drop_nulls()
    rows = [
        both.group_by("layer")
        .agg(statistic=pl.lit(name).first(), correlation=pl.corr(name, f"{name}_two", method="spearman"))
        .sort("layer")
        for name in names
    ]
    frame = pl.concat(rows).with_columns(pl.col("correlation").fill_nan(None))
    middle = {name: median_of(frame.filter(pl.col("statistic") == name)["correlation"]) for name in names}
    return Finding(
        id="statistics-stability",
        items=("A70",),
        title="Do neurons keep their distributions?",
        says=f"Rank correlation of a statistic of {both.height:,} neurons between the two runs, median over "
        f"{one.manifest.model.layers} layers: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in middle.items())
        + ".",
        frame=frame,
        figure=line(frame, "rank correlation over neurons", y="correlation", color="statistic"),
        notes=("kurtosis depends on the rarest tokens, and so on the length of the text",),
    )


def median_of(values: pl.Series) -> float:
    """The median of what is known; NaN where nothing is."""
    known = values.drop_nulls().to_numpy()
    return float(np.median(known)) if len(known) else float("nan")


def along(names: Sequence[str], runs: Sequence[Run]) -> list[Finding]:
    """`findings` of two runs; of more, of each with the next, a panel for each step."""
    every = [findings(*step) for step in pairwise(runs)]
    labels = [f"{one} to {two}" for one, two in pairwise(names)]
    return every[0] if len(every) == 1 else side_by_side(labels, every)


def side_by_side(names: Sequence[str], found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings that all runs have, each as one with a panel for each run."""
    others = [{finding.id: finding for finding in of_run} for of_run in found[1:]]
    return [
        _joined(names, [first, *(of_run[first.id] for of_run in others)])
        for first in found[0]
        if all(first.id in of_run for of_run in others)
    ]


def _joined(names: Sequence[str], alike: Sequence[Finding]) -> Finding:
    first = alike[0]
    facet = None if first.figure is None else first.figure.facet
    frames = [_named(finding.frame, name, facet) for name, finding in zip(names, alike, strict=True)]
    frame = pl.concat(frames, how="diagonal_relaxed")
    if facet is not None:  # panels of the runs in turn
        turns = zip(*map(_panels, frames), strict=False)
        order = [label for panels in turns for label in panels]
        place = pl.col("run").replace_strict(order, range(len(order)), default=len(order))
        frame = frame.sort(place, maintain_order=True)
    return replace(
        first,
        says=" ".join(f"{name}: {finding.says}" for name, finding in zip(names, alike, strict=True)),
        frame=frame,
        figure=None if first.figure is None else replace(first.figure, facet="run"),
        notes=tuple(dict.fromkeys(note for finding in alike for note in finding.notes)),
    )


def _named(frame: pl.DataFrame, name: str, facet: str | None) -> pl.DataFrame:
    """The frame behind a column that says which run it is of, and which panel it was."""
    panel = (
        pl.lit(name) if facet is None else pl.format("{} · {}", pl.col(facet).cast(pl.String), pl.lit(name))
    )
    return frame.select(panel.alias("run"), *map(pl.col, frame.columns))


def _panels(frame: pl.DataFrame) -> list[str]:
    return frame["run"].unique(maintain_order=True).to_list()
