"""Which token of a trigger matters: the coefficient with and without it, layer by layer (A9, Geva et al. 2021, Fig. 3).

Triggers are extremes, so anything done to them brings the coefficient down: regression to the mean. The same removals
from prefixes that were not chosen, for the same neurons at the same positions, say how much of it there is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.display import Shown
from mnemoscope.intervals import Estimate, Interval, by_document, chance_of_zero, discoveries, ratio
from mnemoscope.studies.findings.finding import Difference, Finding, bracketed, line

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

KINDS = ("trigger", "random")
REMOVED = ("first", "last", "random")
MEASURES = ("relative", "ratio", "difference", "retained")
# A quotient of a coefficient below this share of its neuron's standard deviation says nothing.
LEAST = 0.1


@dataclass(frozen=True)
class Effect:
    """What removing one token did to the coefficient `m` (`m'` without it), over the prefixes of a layer.

    layer       None: the mean over layers, each counting the same
    kind        `trigger`, or `random` for the null
    removed     `first`, `last` or `random`
    relative    mean of (m' - m) / m, where |m| is at least a tenth of the neuron's standard deviation
    ratio       sum of sign(m) (m' - m) over sum of |m|: large coefficients count more, small ones cannot blow it up
    difference  mean of sign(m) (m' - m) in standard deviations of the neuron
    retained    slope of m' over m, both measured from the neuron's mean in its standard deviations: the share
                of what was out of the ordinary that is left
    """

    layer: int | None
    kind: str
    removed: str
    prefixes: int
    relative: Estimate
    ratio: Estimate
    difference: Estimate
    retained: Estimate


@dataclass(frozen=True, repr=False)
class Removal(Shown):
    """Effects by layer and over all layers, and what they are compared by.

    last_against_random  by layer, `ratio` without the last less `ratio` without a random token: below 0, the last
                         matters more
    trend                by removed token, how much `ratio` rises from the lowest to the highest layer along the
                         fitted line
    beyond_null          by removed token, `retained` of triggers less `retained` of the null, over all layers
    last_matters_more    in how many layers `last_against_random` is below 0, of all layers together at a false
                         discovery rate of 5 %
    """

    effects: tuple[Effect, ...]
    last_against_random: tuple[Estimate, ...]
    trend: dict[str, Estimate]
    beyond_null: dict[str, Estimate]
    last_matters_more: int
    documents: int
    neurons: int

    def of(self, layer: int | None, kind: str, removed: str) -> Effect:
        """One effect."""
        wanted = (layer, kind, removed)
        return next(
            effect for effect in self.effects if (effect.layer, effect.kind, effect.removed) == wanted
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def removal(run: Run, *, samples: int = 1000, seed: int = 0) -> Removal:
    """The effects stored in table `removal` of a run; `QueryError` when it has none."""
    rows = run.table("removal").collect()
    scales = run.table("neurons").select("layer", "neuron", "mean", "std").collect()
    return effects(rows, scales, samples=samples, seed=seed)


def effects(rows: pl.DataFrame, scales: pl.DataFrame, *, samples: int = 1000, seed: int = 0) -> Removal:
    """Summarise rows of the table `removal`.

    scales   layer, neuron, mean, std: one row a neuron
    samples  resamplings of the documents behind each interval
    """
    layers = int(rows["layer"].max()) + 1  # type: ignore[arg-type]
    sums = _sums(rows.join(scales, on=["layer", "neuron"], how="left"), layers)
    shape = (layers + 1, len(KINDS), len(REMOVED), len(MEASURES))
    intervals = by_document(sums, np.arange(len(sums)), _figures, samples, seed, witnesses=_witnesses(sums))
    estimates = [_estimate(intervals, place) for place in range(len(intervals.value))]
    table = np.array(estimates[: int(np.prod(shape))], object).reshape(shape)
    rest = iter(estimates[int(np.prod(shape)) :])
    counts = sums.sum(0)[..., 0].astype(int)
    counts = np.concatenate([counts, counts.sum(0, keepdims=True)])
    return Removal(
        effects=tuple(
            Effect(
                None if layer == layers else layer,
                kind,
                removed,
                int(counts[layer, k, r]),
                *table[layer, k, r],
            )
            for layer in range(layers + 1)
            for k, kind in enumerate(KINDS)
            for r, removed in enumerate(REMOVED)
        ),
        last_against_random=tuple(next(rest) for _ in range(layers)),
        trend={removed: next(rest) for removed in REMOVED},
        beyond_null={removed: next(rest) for removed in REMOVED},
        last_matters_more=_last_matters_more(sums),
        documents=len(sums),
        neurons=rows.select("layer", "neuron").unique().height,
    )


def _figures(sums: np.ndarray) -> np.ndarray:
    """f64[sample, figure] of sums [sample, layer, kind, removed, sum]: effects by layer and over all layers, then
    `last_against_random`, `trend` and `beyond_null`."""
    table = _measures(sums)
    with_mean = np.concatenate([table, _mean(table)[:, None]], axis=1)
    quotient, retained = (
        table[:, :, 0, :, MEASURES.index("ratio")],
        with_mean[:, -1, :, :, MEASURES.index("retained")],
    )
    layers = table.shape[1]
    line = np.linspace(-1, 1, layers) if layers > 1 else np.zeros(1)
    rise = 2 * np.einsum("l,slr->sr", line, quotient) / max(float(line @ line), 1e-300)
    parts = (with_mean, _gap(sums), rise, retained[:, 0] - retained[:, 1])
    return np.concatenate([block.reshape(len(sums), -1) for block in parts], axis=1)


def _gap(sums: np.ndarray) -> np.ndarray:
    """f64[sample, layer]: `ratio` of triggers without the last less without a random token."""
    quotient = _measures(sums)[:, :, 0, :, MEASURES.index("ratio")]
    return np.asarray(quotient[:, :, REMOVED.index("last")] - quotient[:, :, REMOVED.index("random")])


def _last_matters_more(sums: np.ndarray) -> int:
    """In how many layers, of all together (Benjamini and Hochberg)."""
    documents = np.arange(len(sums))
    below = _gap(sums.sum(0, keepdims=True))[0] < 0
    return int((discoveries(chance_of_zero(sums, documents, _gap)) & below).sum())


def _witnesses(sums: np.ndarray) -> np.ndarray:
    """i64[figure]: how many documents each of `_figures` rests on."""
    known = (sums[..., 0] > 0).sum(0)  # [layer, kind, removed]
    every = (sums[..., 0] > 0).any(1).sum(0)[None]  # in any layer
    effects = np.concatenate([known, every])[..., None].repeat(len(MEASURES), -1)
    gap = known[:, 0, [REMOVED.index("last"), REMOVED.index("random")]].min(-1)
    return np.concatenate([effects.ravel(), gap, every[0, 0], every[0].min(0)])


def _estimate(found: Interval, place: int) -> Estimate:
    ends = (float(end[place]) for end in found)
    return Estimate(*(None if np.isnan(end) else end for end in ends))


def _sums(rows: pl.DataFrame, layers: int) -> np.ndarray:
    """f64[document, layer, kind, removed, sum]: everything the measures are made of, additive over documents."""
    documents, place = np.unique(rows["document"].to_numpy(), return_inverse=True)
    kind = rows["kind"].replace_strict(KINDS, range(2), return_dtype=pl.Int64).to_numpy()
    removed = rows["removed"].replace_strict(REMOVED, range(3), return_dtype=pl.Int64).to_numpy()
    whole, without = (rows[name].cast(pl.Float64).to_numpy() for name in ("whole", "without"))
    mean, std = rows["mean"].to_numpy(), rows["std"].to_numpy()
    drop, varies = np.sign(whole) * (without - whole), std > 0
    scale = np.where(varies, std, 1.0)
    clear = varies & (np.abs(whole) >= LEAST * std)
    before, after = (np.where(varies, (values - mean) / scale, 0.0) for values in (whole, without))
    parts = np.stack(
        [
            np.ones_like(whole),
            clear,
            np.where(clear, drop / np.where(clear, np.abs(whole), 1.0), 0.0),
            np.abs(whole),
            drop,
            varies,
            np.where(varies, drop / scale, 0.0),
            before * before,
            before * after,
        ],
        axis=1,
    )
    shape = (len(documents), layers, len(KINDS), len(REMOVED))
    cell = np.ravel_multi_index((place, rows["layer"].to_numpy().astype(int), kind, removed), shape)
    sums = [np.bincount(cell, values, np.prod(shape)).reshape(shape) for values in parts.T]
    return np.stack(sums, axis=-1)


def _measures(sums: np.ndarray) -> np.ndarray:
    """f64[..., measure] from sums f64[..., sum]; NaN where nothing was measured."""
    _, clear, relative, size, drop, varies, standard, before, together = np.moveaxis(sums, -1, 0)
    pairs = ((relative, clear), (drop, size), (standard, varies), (together, before))
    return np.stack([ratio(*pair) for pair in pairs], axis=-1)


def _mean(table: np.ndarray) -> np.ndarray:
    """The mean over layers, leaving out those where nothing was measured."""
    known = ~np.isnan(table)
    return ratio(np.where(known, table, 0).sum(1), known.sum(1))


# -- Which token of a trigger matters, as findings of the study (A9); measured by `mnemoscope removal` ---------


def findings(run: Run) -> list[Finding]:
    """From the table `removal`."""
    summary = removal(run)
    return [_relative(summary), _retained(summary)]


def _rows(summary: Removal, kind: str, measure: str) -> pl.DataFrame:
    rows = []
    for effect in summary.effects:
        if effect.kind == kind and effect.layer is not None:
            estimate: Estimate = getattr(effect, measure)
            numbers = (estimate.value, estimate.low, estimate.high)
            rows.append((effect.layer, f"without the {effect.removed}", effect.prefixes, *numbers))
    names = {"layer": pl.Int64, "token": pl.String, "prefixes": pl.Int64}
    schema = {**names, **dict.fromkeys((measure, "low", "high"), pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _text(estimate: Estimate, form: str = "+.1%") -> str:
    if estimate.value is None:
        return "not defined"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}} (no interval)"
    return bracketed(estimate.value, estimate.low, estimate.high, form)


def _read(summary: Removal) -> str:
    read = summary.of(None, "trigger", "last").prefixes
    return f"{read:,} triggers of {summary.neurons:,} neurons in {summary.documents:,} documents"


def _relative(summary: Removal) -> Finding:
    """Figure 3: the change of the coefficient, weighted by its size."""
    mean = {removed: summary.of(None, "trigger", removed).ratio for removed in REMOVED}
    null = summary.of(None, "random", "last").ratio
    known = sum(1 for gap in summary.last_against_random if gap.value is not None)
    frame = _rows(summary, "trigger", "ratio")
    return Finding(
        id="figure-3-token-removal",
        items=("A9",),
        title="Triggers without one of their tokens (Geva Figure 3)",
        says=f"Over {_read(summary)}, mean over layers, the coefficient changes by "
        + ", ".join(f"{_text(change)} without the {removed}" for removed, change in mean.items())
        + f" token; that of ordinary prefixes of the same neurons by {_text(null)} without the last. The last matters "
        f"more than a random one in {summary.last_matters_more} of {known} layers (at a false discovery rate of 5 %).",
        frame=frame,
        figure=line(frame, "change of the coefficient (%)", y="ratio", color="token", share=True),
        paper="first about -10 to -15 %, random -15 to -20 %, last -65 % in layer 1 rising to -20 % in layer 16",
        resampled=f"documents (n = {summary.documents:,})",
        notes=("sum of changes over sum of |m|: single small coefficients cannot blow it up",),
    )


def _retained(summary: Removal) -> Finding:
    """Beside prefixes that were not chosen: how much of what is out of the ordinary is left."""
    frame = _rows(summary, "trigger", "retained").rename({"retained": "share"})
    null = _rows(summary, "random", "retained").select(
        "layer", "token", null="retained", null_low="low", null_high="high"
    )
    frame = frame.join(null, on=["layer", "token"], how="left")
    last: Effect = summary.of(None, "trigger", "last")
    ordinary = summary.of(None, "random", "last")
    usual = ordinary.retained
    return Finding(
        id="token-removal-null",
        items=("A9",),
        title="What is left of a trigger, beside ordinary prefixes",
        says=f"Over {_read(summary)}, mean over layers, without the last token {_text(last.retained, '.1%')} of a "
        f"coefficient's distance from the neuron's mean is left in triggers and {_text(usual, '.1%')} in "
        f"{ordinary.prefixes:,} ordinary prefixes of the same neurons: a difference of "
        f"{_text(summary.beyond_null['last'])}.",
        frame=frame,
        figure=line(
            frame, "left of the deviation from the neuron's mean (%)", y="share", facet="token", share=True
        ),
        null="the same removal from prefixes that are no triggers, same neurons and positions",
        resampled=f"documents (n = {summary.documents:,})",
        notes=("triggers are extremes, and fall back whatever is done to them; this slope does not",),
        contrasts=_contrasts(summary),
    )


def _contrasts(summary: Removal) -> tuple[Difference, ...]:
    """What is left without the last token, of triggers less of ordinary prefixes."""
    beyond = summary.beyond_null["last"]
    return (Difference.of("last", (beyond.value, beyond.low, beyond.high), summary.documents),)
