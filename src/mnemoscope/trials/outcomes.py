"""What the test half decides: from counts to the rows of `patterns`, `pattern_tests` and `calibration`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from mnemoscope.intervals import ratio
from mnemoscope.mine.kernel import BINS
from mnemoscope.neuron import twoway
from mnemoscope.neuron.twoway import Curve, Rule
from mnemoscope.patterns.triggers import Addressed
from mnemoscope.patterns.whole import by_document
from mnemoscope.records import NEURON, WHOLE
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.trials.claims import ClaimsToTest, KindClaims
from mnemoscope.trials.counts import TestCounts
from mnemoscope.trials.heldout import discovery_rate
from mnemoscope.trials.masked_text import MaskedText

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
WRITE_LEVELS = (0.5, 0.9, 0.99, 0.999)
_OPEN = float(2**12 * 1.25)  # what stands for the middle of the outermost bins


@dataclass(frozen=True)
class Tested:
    """One kind of unit: what was chosen of it and what was counted.

    tests  str[claim]  family of tests
    q      f64[claim]  false discovery rate on held-out triggers
    """

    chosen: ClaimsToTest
    counts: TestCounts
    tests: np.ndarray
    q: np.ndarray


class TestTables:
    """The columns of `pattern_tests` and the rows of `calibration`, layer by layer.

    tested  by kind of unit, the neurons first
    seed    of the documents that are drawn again
    """

    def __init__(
        self, masked: MaskedText, tested: Mapping[str, Tested], edges: Sequence[float], rule: Rule, seed: int
    ) -> None:
        self._masked, self._tested, self._rule = masked, tested, rule
        self._weights = twoway.document_weights(masked.groups, seed=seed)
        self._edges = np.array([-np.inf, *edges, np.inf])

    def claims(self, kind: str, layer: int) -> slice:
        """Which claims of a kind are of this layer."""
        return self._tested[kind].chosen.claims.of(layer)

    def layer(self, layer: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """By kind the columns of its claims (those that counts decide), and rows of `calibration`."""
        measured = {kind: self._measured(kind, layer) for kind in self._tested}
        rows = []
        for tests in np.unique(np.concatenate([tested.tests for tested in self._tested.values()])).tolist():
            of_family = {
                kind: tested.tests[self.claims(kind, layer)] == tests for kind, tested in self._tested.items()
            }
            quantiles = [
                self._quantiles(kind, layer, tests, measured[kind]["f1"][claims])
                for kind, claims in of_family.items()
            ]
            for kind, claims in of_family.items():
                measured[kind]["null"][claims] = null_level(quantiles)
            rows += quantiles
        for kind, columns in measured.items():
            columns["q"] = self._tested[kind].q[self.claims(kind, layer)]
            bounds = columns["precision_low"], columns["recall_low"], columns["f1_low"]
            columns["verdict"] = twoway.verdicts(*bounds, columns.pop("null"), columns["q"], self._rule)
        return measured, rows

    def _measured(self, kind: str, layer: int) -> dict[str, Any]:
        tested = self._tested[kind]
        counts, claims, here = tested.counts, tested.chosen.claims, tested.chosen.claims.of(layer)
        unit, polarity, column = claims.unit[here], claims.polarity[here], claims.column[here]
        shown, whole = counts.counts[here].astype(np.int64), counts.totals[layer, unit].astype(np.int64)
        absent = whole - shown
        curve = Curve(*(np.where(polarity[:, None] > 0, side, side[:, ::-1]) for side in (shown, absent)))
        score = tested.chosen.threshold[here]
        at_threshold = lambda values: np.take_along_axis(values, score[:, None], 1)[:, 0]  # noqa: E731
        active, both, present = at_threshold(curve.active), at_threshold(curve.both), curve.shown[:, 0]
        tokens = np.full(len(unit), self._masked.tokens, np.int64)
        of_documents = counts.active[here], counts.both[here], self._masked.shown[column]
        bounds = twoway.resampled(*of_documents, self._weights)
        table, other = counts.table[here], counts.other[here]
        compared = tested.chosen.other[here] >= 0
        columns: dict[str, Any] = {
            "threshold": np.where(polarity > 0, self._edges[score], self._edges[BINS - score]).astype(np.float32),
            "null": np.zeros(len(unit)),
            "tokens": tokens,
            "documents": np.full(len(unit), self._masked.documents, np.int32),
            "active": active, "present": present, "both": both,
            "iou": at_threshold(curve.iou),
            "auprc": curve.average_precision,
            "pearson": twoway.pearson(
                tokens, counts.total[layer, unit], counts.squares[layer, unit], present, counts.among[here]
            ),
            "mutual_information": curve.information,
            "baseline_constant": twoway.constant_f1(active, tokens),
            "baseline_random": twoway.random_f1(active, present, tokens),
            "baseline_token": np.nan_to_num(ratio(2 * counts.table_both[here], active + table)),
            "baseline_other": np.where(
                compared, np.nan_to_num(ratio(2 * counts.other_both[here], active + other)), np.nan
            ),
            "counts_present": shown, "counts_absent": absent,
        }  # fmt: skip
        for name, value in (("precision", curve.precision), ("recall", curve.recall), ("f1", curve.f1)):
            columns[name] = at_threshold(value)
            for end, bound in zip(("low", "high"), bounds[name][1:], strict=True):
                columns[f"{name}_{end}"] = np.where(np.isfinite(columns[name]), bound, np.nan)
        if kind == NEURON and counts.gated[0]:
            columns["quadrants_active"] = counts.quadrants_active[here]
            columns["quadrants_both"] = counts.quadrants_both[here]
        return columns | self._specificity(kind, layer)

    def correlations(self, kind: str, layer: int) -> np.ndarray:
        """f64[pattern unit]: of the units of a kind with the patterns of the layer."""
        counts = self._tested[kind].counts
        columns, sums = counts.patterns(layer)
        present = self._masked.shown[columns].sum(1)
        return twoway.pearson(
            np.asarray(self._masked.tokens),
            counts.total[layer],
            counts.squares[layer],
            present[:, None],
            sums,
        )

    def _specificity(self, kind: str, layer: int) -> dict[str, np.ndarray]:
        """Where each unit stands for its own pattern: among the neurons, and among all pseudo-neurons.

        NaN for claims of the family `whole`: common patterns would be most of the cost.
        """
        tested = self._tested[kind]
        claims, here = tested.chosen.claims, tested.chosen.claims.of(layer)
        unit, polarity = claims.unit[here], claims.polarity[here].astype(np.float64)
        columns, _ = tested.counts.patterns(layer)
        if not len(columns):
            return dict.fromkeys(("specificity_rank", "specificity_null"), np.full(len(unit), np.nan))
        left_out = np.isin(np.arange(here.start, here.stop), tested.counts.expecting)
        row = np.where(left_out, 0, np.searchsorted(columns, claims.column[here]))
        correlation = np.where(left_out, np.nan, self.correlations(kind, layer)[row, unit] * polarity)
        nulls = [self.correlations(other, layer) for other in self._tested if other != NEURON]
        compared = {"specificity_rank": self.correlations(NEURON, layer)}
        if nulls:
            compared["specificity_null"] = np.concatenate(nulls, 1)
        specificity = {"specificity_null": np.full(len(unit), np.nan)}
        for name, of_all in compared.items():
            larger = np.zeros(len(unit))
            for start in range(0, len(unit), 512):
                block = slice(start, start + 512)
                with np.errstate(invalid="ignore"):
                    above = of_all[row[block]] * polarity[block, None] > correlation[block, None] * (1 + 1e-6)
                larger[block] = above.sum(1)
            larger /= of_all.shape[1] if name == "specificity_null" else 1
            specificity[name] = np.where(np.isfinite(correlation), larger, np.nan)
        return specificity

    def _quantiles(self, kind: str, layer: int, tests: str, f1: np.ndarray) -> dict[str, Any]:
        """A row of `calibration`: F1 of all units of a kind in both polarities, 0 where there is no claim."""
        units = 2 * self._tested[kind].counts.total.shape[1]
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
        counts = twoway.folded(self._tested[NEURON].counts.totals[layer].astype(np.int64))
        edges = np.append(self._edges[BINS // 2 + 1 : -1], _OPEN)
        middle = np.concatenate([[0.0], (edges[:-1] + edges[1:]) / 2])
        size = (norms[:, None].astype(np.float64) * middle).ravel()
        order = np.argsort(size, kind="stable")
        reached = np.cumsum(counts.ravel()[order])
        quantile = np.searchsorted(reached, np.array(WRITE_LEVELS) * reached[-1])
        return {
            "layer": layer, "unit": NEURON, "measure": "write", "count": int(reached[-1]),
            "levels": [*WRITE_LEVELS], "values": size[order][quantile].tolist(),
        }  # fmt: skip


def null_level(rows: Sequence[Mapping[str, Any]]) -> float:
    """What the lower end of F1 must exceed: over the kinds of null the largest quantile; 0 without any."""
    level = LEVELS.index(twoway.NULL_LEVEL)
    return max((row["values"][level] for row in rows if row["unit"] != NEURON), default=0.0)


def with_document_tests(
    candidates: pl.DataFrame,
    units: Addressed,
    claims: Mapping[str, KindClaims],
    counts: Mapping[str, TestCounts],
) -> pl.DataFrame:
    """Fills in, for claims of the family `whole`, what the test half says, and `q` over those of neurons."""
    names = ("test_triggers", "test_hits", "test_base_rate", "test_p", "q")
    columns = {name: candidates[name].to_numpy().copy() for name in names}
    for kind, counted in counts.items():
        rows = claims[kind].rows[counted.expecting]
        active, both = counted.active[counted.expecting], counted.both[counted.expecting]
        columns["test_triggers"][rows], columns["test_hits"][rows] = active.sum(1), both.sum(1)
        columns["test_base_rate"][rows] = counted.expected.sum(1) / np.maximum(active.sum(1), 1)
        columns["test_p"][rows] = by_document(both, counted.expected)
    whole = np.flatnonzero((candidates["tests"] == WHOLE).to_numpy() & candidates["chosen"].to_numpy())
    real = units.kind[candidates["unit"].to_numpy()[whole]] == 0
    columns["q"][whole] = discovery_rate(columns["test_p"][whole], real)
    return candidates.with_columns(pl.Series(name, values) for name, values in columns.items())


# -- The tables of the run ---------------------------------------------------------------------------------------


def run_tables(
    run: Run,
    units: Addressed,
    candidates: pl.DataFrame,
    claims: Mapping[str, KindClaims],
    verdicts: TestTables,
    smallest: pl.DataFrame,
    tell: Callable[[int], None],
) -> dict[str, Iterator[pa.Table]]:
    """The tables `patterns`, `pattern_tests` and `calibration`, to be written in this order, a layer at a time.

    smallest  the calibration of the search
    tell      is told how many layers of `pattern_tests` are made
    """
    layers = run.manifest.model.layers
    norms = run.table("neurons").select("layer", "value_norm").collect()
    calibration = _of_search(smallest)

    def lists() -> Iterator[pa.Table]:
        layer_of = units.layer[candidates["unit"].to_numpy()]
        for layer in range(layers):
            frame = candidates[np.flatnonzero(layer_of == layer)]
            columns = {name: frame[name] for name in SCHEMAS["patterns"].names if name in frame.columns}
            yield _in_order(
                arrow_table("patterns", columns | {"triggers": frame["n"]} | _described(frame, units))
            )

    def tests() -> Iterator[pa.Table]:
        for layer in range(layers):
            tell(layer)
            measured, quantiles = verdicts.layer(layer)
            layer_norms = norms.filter(pl.col("layer") == layer)["value_norm"].to_numpy()
            calibration.extend([*quantiles, verdicts.writes(layer, layer_norms)])
            tables = []
            for kind, columns in measured.items():
                frame = candidates[claims[kind].rows[verdicts.claims(kind, layer)]]
                tables.append(arrow_table("pattern_tests", _described(frame, units) | columns))
            yield _in_order(pa.concat_tables(tables))
        tell(layers)

    def calibrated() -> Iterator[pa.Table]:
        by_layer = sorted(calibration, key=lambda row: row["layer"])
        names = SCHEMAS["calibration"].names
        yield arrow_table("calibration", {name: [row[name] for row in by_layer] for name in names})

    return {"patterns": lists(), "pattern_tests": tests(), "calibration": calibrated()}


def _described(candidates: pl.DataFrame, units: Addressed) -> dict[str, Any]:
    """Whose candidates these are, and what they claim."""
    unit = candidates["unit"].to_numpy()
    claim = ("tests", "spec", "name", "family", "kind", "complexity")
    return {
        "layer": units.layer[unit], "neuron": units.neuron[unit], "polarity": units.polarity[unit],
        "unit": np.array(units.kinds, object)[units.kind[unit]],
    } | {name: candidates[name] for name in claim}  # fmt: skip


def _of_search(groups: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of `calibration` that tell how small a p-value drawn sets reach, for each group of alike units."""
    rows: list[dict[str, Any]] = []
    for group in groups.iter_rows(named=True):
        name = f"{group['tests']}:{group['group']}"
        common = {"layer": -1, "unit": "sets", "count": group["draws"]}
        rows += (
            common
            | {"measure": f"smallest p of {name}"}
            | {"levels": [0.01, 0.05], "values": [group["p_01"], group["p_05"]]},
            common
            | {"measure": f"effective tests of {name}", "levels": [], "values": [group["effective_tests"]]},
        )  # fmt: skip
    return rows


def _in_order(rows: pa.Table) -> pa.Table:
    """Rows of one layer by neuron, unit (neurons, then kinds of null), polarity (+1 first), tests and rank."""
    for field in rows.schema:
        if pa.types.is_floating(field.type) and not field.nullable:
            assert not pc.any(pc.is_nan(rows[field.name])).as_py(), (field.name, "NaN")
    unit = rows["unit"].to_numpy().astype(str)
    keys = [rows["rank"].to_numpy()] if "rank" in rows.column_names else []
    keys += [rows["tests"].to_numpy().astype(str), -rows["polarity"].to_numpy(), unit, unit != NEURON]
    return rows.take(np.lexsort([*keys, rows["neuron"].to_numpy()]))
