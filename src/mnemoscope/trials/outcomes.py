"""From counts to the rows of `pattern_tests` and `calibration`: what the test half says of every chosen claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mnemoscope.mine.kernel import BINS
from mnemoscope.neuron import twoway
from mnemoscope.neuron.twoway import Curve, Rule, oriented
from mnemoscope.patterns.search import FOUND
from mnemoscope.patterns.triggers import Addressed
from mnemoscope.patterns.whole import SHARE, Counted, Language, proposed
from mnemoscope.records import NEURON
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.trials.ground import Ground
from mnemoscope.trials.looks import MIDDLE, Chosen, FirstLook, SecondLook, WholeLook

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
WRITE_LEVELS = (0.5, 0.9, 0.99, 0.999)
_CLAIMS = 50_000  # whose curves are held at once
_OPEN = float(2**12 * 1.25)  # what stands for the middle of the outermost bins


def best(look: FirstLook, claims: int) -> tuple[np.ndarray, np.ndarray]:
    """For each candidate the score i64[claim] where active begins (-1 if none may), and how far F1 is beyond chance."""
    score, value = np.full(claims, -1), np.zeros(claims)
    for start in range(0, claims, _CLAIMS):
        some = slice(start, min(start + _CLAIMS, claims))
        shown = look.counts[some].astype(np.int64)
        place, f1 = twoway.choose(Curve(shown, look.sides(some) - shown), look.documents(some))
        score[some], value[some] = np.where(place < 0, -1, place + BINS // 2), f1
    return score, value


@dataclass(frozen=True)
class Tested:
    """One kind of unit: what was chosen of it and what was counted.

    tests  str[claim]  family of tests
    q      f64[claim]  false discovery rate on held-out triggers
    """

    chosen: Chosen
    look: SecondLook
    tests: np.ndarray
    q: np.ndarray


class Outcomes:
    """The rows of the tables, layer by layer.

    tested  by kind of unit, the neurons first
    seed    of the documents that are drawn again
    """

    def __init__(
        self, ground: Ground, tested: Mapping[str, Tested], edges: Sequence[float], rule: Rule, seed: int
    ) -> None:
        self._ground, self._tested, self._rule = ground, tested, rule
        self._weights = twoway.draws(ground.groups, seed=seed)
        self._edges = np.array([-np.inf, *edges, np.inf])

    def claims(self, kind: str, layer: int) -> slice:
        """Which claims of a kind are of this layer."""
        return self._tested[kind].chosen.claims.of(layer)

    def layer(self, layer: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """By kind the columns of its claims (those that counts decide), and rows of `calibration`."""
        measured = {kind: self._measured(kind, layer) for kind in self._tested}
        rows = []
        for tests in np.unique(np.concatenate([one.tests for one in self._tested.values()])).tolist():
            mine = {kind: one.tests[self.claims(kind, layer)] == tests for kind, one in self._tested.items()}
            some = [
                self._quantiles(kind, layer, tests, measured[kind]["f1"][which])
                for kind, which in mine.items()
            ]
            for kind, which in mine.items():
                measured[kind]["null"][which] = null_level(some)
            rows += some
        for kind, found in measured.items():
            found["q"] = self._tested[kind].q[self.claims(kind, layer)]
            found["verdict"] = twoway.verdicts(
                found["purity_low"],
                found["coverage_low"],
                found["f1_low"],
                found.pop("null"),
                found["q"],
                self._rule,
            )
        return measured, rows

    def _measured(self, kind: str, layer: int) -> dict[str, Any]:
        tested = self._tested[kind]
        look, claims, mine = tested.look, tested.chosen.claims, tested.chosen.claims.of(layer)
        unit, polarity, column = claims.unit[mine], claims.polarity[mine], claims.column[mine]
        shown, whole = look.counts[mine].astype(np.int64), look.totals[layer, unit].astype(np.int64)
        curve = Curve(
            *(np.where(polarity[:, None] > 0, part, part[:, ::-1]) for part in (shown, whole - shown))
        )
        score = tested.chosen.threshold[mine]
        at = lambda values: np.take_along_axis(values, score[:, None], 1)[:, 0]  # noqa: E731
        active, both, present = at(curve.active), at(curve.both), curve.shown[:, 0]
        tokens = np.full(len(unit), self._ground.tokens, np.int64)
        of_documents = look.active[mine], look.both[mine], self._ground.shown[column]
        bounds = twoway.resampled(*of_documents, self._weights)
        table, other = look.table[mine], look.other[mine]
        compared = tested.chosen.other[mine] >= 0
        found: dict[str, Any] = {
            "threshold": np.where(polarity > 0, self._edges[score], self._edges[BINS - score]).astype(np.float32),
            "null": np.zeros(len(unit)),
            "tokens": tokens,
            "documents": np.full(len(unit), self._ground.documents, np.int32),
            "active": active, "present": present, "both": both,
            "iou": at(curve.iou),
            "auprc": curve.average_precision,
            "pearson": twoway.pearson(
                tokens, look.total[layer, unit], look.squares[layer, unit], present, look.among[mine]
            ),
            "mutual_information": curve.information,
            "baseline_constant": twoway.constant_f1(active, tokens),
            "baseline_random": twoway.random_f1(active, present, tokens),
            "baseline_token": np.nan_to_num(twoway.ratio(2 * look.table_both[mine], active + table)),
            "baseline_other": np.where(
                compared, np.nan_to_num(twoway.ratio(2 * look.other_both[mine], active + other)), np.nan
            ),
            "counts_present": shown, "counts_absent": whole - shown,
        }  # fmt: skip
        for name, value in (("purity", curve.purity), ("coverage", curve.coverage), ("f1", curve.f1)):
            defined = np.isfinite(value := at(value))
            found[name] = value
            for end, bound in zip(("low", "high"), bounds[name], strict=True):
                found[f"{name}_{end}"] = np.where(defined, bound, np.nan)
        if kind == NEURON and look.gated[0]:
            found["quadrants_active"] = look.quadrants_active[mine]
            found["quadrants_both"] = look.quadrants_both[mine]
        found |= self._specificity(kind, layer)
        return found

    def correlations(self, kind: str, layer: int) -> np.ndarray:
        """f64[pattern unit]: of the units of a kind with the patterns of the layer."""
        look = self._tested[kind].look
        columns, sums = look.patterns(layer)
        present = self._ground.shown[columns].sum(1)
        return twoway.pearson(
            np.asarray(self._ground.tokens), look.total[layer], look.squares[layer], present[:, None], sums
        )

    def _specificity(self, kind: str, layer: int) -> dict[str, np.ndarray]:
        """Where each unit stands for its own pattern: among the neurons, and among all pseudo-neurons.

        NaN for claims of the family `whole`: common patterns would be most of the cost.
        """
        tested = self._tested[kind]
        claims, mine = tested.chosen.claims, tested.chosen.claims.of(layer)
        unit, polarity = claims.unit[mine], claims.polarity[mine].astype(np.float64)
        columns, _ = tested.look.patterns(layer)
        if not len(columns):
            return dict.fromkeys(("specificity_rank", "specificity_null"), np.full(len(unit), np.nan))
        left_out = np.isin(np.arange(mine.start, mine.stop), tested.look.expecting)
        row = np.where(left_out, 0, np.searchsorted(columns, claims.column[mine]))
        own = np.where(left_out, np.nan, self.correlations(kind, layer)[row, unit] * polarity)
        nulls = [self.correlations(other, layer) for other in self._tested if other != NEURON]
        fields = {"specificity_rank": self.correlations(NEURON, layer)}
        if nulls:
            fields["specificity_null"] = np.concatenate(nulls, 1)
        found = {"specificity_null": np.full(len(unit), np.nan)}
        for name, of_all in fields.items():
            larger = np.zeros(len(unit))
            for start in range(0, len(unit), 512):
                some = slice(start, start + 512)
                with np.errstate(invalid="ignore"):
                    above = of_all[row[some]] * polarity[some, None] > own[some, None] * (1 + 1e-6)
                larger[some] = above.sum(1)
            larger /= of_all.shape[1] if name == "specificity_null" else 1
            found[name] = np.where(np.isfinite(own), larger, np.nan)
        return found

    def _quantiles(self, kind: str, layer: int, tests: str, f1: np.ndarray) -> dict[str, Any]:
        """A row of `calibration`: F1 of all units of a kind in both polarities, 0 where there is no claim."""
        units = 2 * self._tested[kind].look.total.shape[1]
        values = np.concatenate([np.nan_to_num(f1), np.zeros(units - len(f1))])
        quantiles = np.quantile(values, LEVELS).tolist()
        return {
            "layer": layer, "unit": kind, "measure": f"f1 of {tests}", "count": units, "levels": [*LEVELS],
            "values": quantiles,
        }  # fmt: skip

    def writes(self, layer: int, norms: np.ndarray) -> dict[str, Any]:
        """A row of `calibration`: quantiles of |m| |v| over all neurons and tokens of a layer, from bins (A72).

        norms  f32[neuron]: of the values
        """
        counts = twoway.folded(self._tested[NEURON].look.totals[layer].astype(np.int64))
        edges = np.append(self._edges[BINS // 2 + 1 : -1], _OPEN)
        middle = np.concatenate([[0.0], (edges[:-1] + edges[1:]) / 2])
        size = (norms[:, None].astype(np.float64) * middle).ravel()
        order = np.argsort(size, kind="stable")
        reached = np.cumsum(counts.ravel()[order])
        place = np.searchsorted(reached, np.array(WRITE_LEVELS) * reached[-1])
        return {
            "layer": layer, "unit": NEURON, "measure": "write", "count": int(reached[-1]),
            "levels": [*WRITE_LEVELS], "values": size[order][place].tolist(),
        }  # fmt: skip


def null_level(rows: Sequence[Mapping[str, Any]]) -> float:
    """What the lower end of F1 must exceed: over the kinds of null the largest quantile; 0 without any."""
    place = LEVELS.index(twoway.NULL_LEVEL)
    return max((row["values"][place] for row in rows if row["unit"] != NEURON), default=0.0)


def table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Columns as a table of `SCHEMAS`: NaN is null, a matrix a list column."""
    schema = SCHEMAS[name]
    return pa.table(
        {field.name: _column(columns.get(field.name), field, _length(columns)) for field in schema}, schema
    )


def _length(columns: Mapping[str, Any]) -> int:
    return len(columns["layer"])


def _column(values: Any, field: pa.Field, length: int) -> pa.Array:
    if values is None:
        assert field.nullable, field.name
        return pa.nulls(length, field.type)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), field.type.value_type))
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        empty = np.isnan(values)
        whole = np.where(empty, 0, values) if pa.types.is_integer(field.type) else values
        return pa.array(whole, field.type, mask=empty)
    return pa.array(values, field.type)


def in_order(rows: pa.Table) -> pa.Table:
    """Rows of one layer by neuron, unit (neurons, then kinds of null), polarity (+1 first), tests and rank."""
    unit = rows["unit"].to_numpy().astype(str)
    keys = [rows["rank"].to_numpy()] if "rank" in rows.column_names else []
    keys += [rows["tests"].to_numpy().astype(str), -rows["polarity"].to_numpy(), unit, unit != NEURON]
    return rows.take(np.lexsort([*keys, rows["neuron"].to_numpy()]))


# -- From the counts of a `WholeLook` to candidates of the family `whole` --------------------------------------


def thresholds(run: Run, kind: str) -> np.ndarray:
    """i64[layer 2 unit]: the least positive score that at most `SHARE` of the run's tokens reach, by polarity (+1
    first); `BINS` where none is reached."""
    rows = run.table("histograms" if kind == NEURON else "null_histograms")
    if kind != NEURON:
        rows = rows.filter(pl.col("kind") == kind)
    frame = rows.sort("layer", "neuron").select("counts").collect()
    counts = frame["counts"].explode().to_numpy().reshape(run.manifest.model.layers, -1, BINS)
    return np.stack([_reached(oriented(counts, polarity)) for polarity in (1, -1)], 1)


def _reached(counts: np.ndarray) -> np.ndarray:
    """i64[layer unit]"""
    side = counts[..., MIDDLE + 1 :]
    above = np.flip(np.cumsum(np.flip(side, -1), -1), -1)
    rare = above <= SHARE * counts.sum(-1, keepdims=True)
    # Of scores that nothing reaches, none is a threshold; where even the largest are common, that of the largest is.
    place = np.where(rare.any(-1), rare.argmax(-1), side.shape[-1] - 1)
    lowest = np.where(np.take_along_axis(above, place[..., None], -1)[..., 0] > 0, place, place - 1)
    return np.where(side.sum(-1) > 0, np.maximum(lowest, 0) + MIDDLE + 1, BINS)


def proposals(
    units: Addressed, kind: str, look: WholeLook, ground: Ground, language: Language
) -> pl.DataFrame:
    """Candidates (columns of `FOUND`) of all units of a kind that have triggers."""
    rates = ground.rates(np.arange(len(language.specs))).astype(np.float64)
    shown = ground.shown.sum(1, dtype=np.int64)
    number = units.kinds.index(kind)
    parts = [pl.DataFrame(schema=FOUND)]
    for layer, (both, by_stratum) in enumerate(zip(look.both, look.by_stratum, strict=True)):
        unit = np.flatnonzero((units.kind == number) & (units.layer == layer))
        own = (units.polarity[unit] < 0).astype(np.int64), units.neuron[unit]
        strata = by_stratum[own].astype(np.float64)
        counted = Counted(both[own].astype(np.int64), strata @ rates, strata.sum(1).astype(np.int64), shown)
        parts.append(proposed(counted, language, unit))
    return pl.concat(parts)
