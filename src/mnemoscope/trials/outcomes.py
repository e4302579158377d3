"""What the test half decides: from counts to the rows of `patterns`, `pattern_tests` and `calibration`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mnemoscope.arguments import DECOYS
from mnemoscope.intervals import Interval, ratio
from mnemoscope.mine.kernel import BINS
from mnemoscope.neuron import decoys, twoway
from mnemoscope.neuron.twoway import Curve, Rule
from mnemoscope.patterns.triggers import Addressed
from mnemoscope.patterns.whole import by_document
from mnemoscope.records import NEURON, WHOLE, Cells
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

    Every figure of a unit is over the text of its place: in a mixture what is routed to its expert. An expert has too
    few pseudo-neurons for a 99th percentile, so that the bar of a verdict is that of all experts of the layer, or that
    of the own expert, if it is higher: the few words that a router gives to an expert are patterns of any unit of it.

    tested   by kind of unit, the neurons first
    layers   i64[place]: the layer of each place, ascending
    seed     of the documents that are drawn again
    compete  whether neurons are judged against decoys of their own, where there are any
    """

    def __init__(
        self,
        masked: MaskedText,
        tested: Mapping[str, Tested],
        edges: Sequence[float],
        rule: Rule,
        layers: np.ndarray,
        seed: int,
        *,
        compete: bool = True,
    ) -> None:
        self._masked, self._tested, self._rule, self._seed = masked, tested, rule, seed
        self._layers = layers
        self._weights = twoway.document_weights(masked.groups, seed=seed)
        self._edges = np.array([-np.inf, *edges, np.inf])
        self._families = np.unique(np.concatenate([of_kind.tests for of_kind in tested.values()])).tolist()
        self._decoys = [kind for kind in tested if compete and kind in DECOYS]
        self._bounds = {kind: self._resampled(of_kind) for kind, of_kind in tested.items()}
        self._rates = self._competition() if self._decoys else {}

    def places(self, layer: int) -> range:
        """The places of a layer."""
        return range(*np.searchsorted(self._layers, [layer, layer + 1]).tolist())

    def claims(self, kind: str, layer: int) -> slice:
        """Which claims of a kind are of this layer."""
        ends = np.searchsorted(self._layers[self._tested[kind].chosen.claims.place], [layer, layer + 1])
        return slice(*ends.tolist())

    def layer(self, layer: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """By kind the columns of its claims (those that counts decide), and rows of `calibration`."""
        measured = {
            kind: _joined([self._measured(kind, place) for place in self.places(layer)])
            for kind in self._tested
        }
        rows = []
        for tests in self._families:
            f1 = {kind: self._of_units(kind, layer, tests, measured[kind]["f1"]) for kind in measured}
            rows += [self._quantiles(kind, layer, tests, values) for kind, values in f1.items()]
            bars = {kind: crossed_bars(values) for kind, values in f1.items() if kind != NEURON}
            rows += [
                {"layer": layer, "unit": kind, "measure": f"bar of {tests}", "count": f1[kind].size,
                 "levels": [0.0, 1.0], "values": bar.tolist()}
                for kind, bar in bars.items()
            ]  # fmt: skip
            highest = self._highest(layer, bars, f1)
            for kind, columns in measured.items():
                here = self.claims(kind, layer)
                of_family = self._tested[kind].tests[here] == tests
                place = self._tested[kind].chosen.claims.place[here] - self.places(layer).start
                bar = highest[place, self._numbers(kind, layer) % 2]
                columns["null"][of_family] = bar[of_family]
        for kind, columns in measured.items():
            here = self.claims(kind, layer)
            columns["q"] = self._tested[kind].q[here]
            if kind in self._rates:
                columns["decoy_f1_low"], columns["decoy_q"] = (of_all[here] for of_all in self._rates[kind])
                # A neuron that beats its decoys need not exceed anything else; one that does not never does.
                columns["null"] = np.where(columns["decoy_q"] <= self._rule.fdr, 0.0, 1.0)
            bounds = columns["precision_low"], columns["recall_low"], columns["f1_low"]
            columns["verdict"] = twoway.verdicts(*bounds, columns.pop("null"), columns["q"], self._rule)
        return measured, rows

    def _resampled(self, tested: Tested) -> dict[str, Interval]:
        """The intervals of all claims of a kind, a few layers at a time to save memory."""

        def of_place(place: int) -> dict[str, Interval]:
            return twoway.resampled(*self._by_document(tested, place), self._weights)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            by_place = list(pool.map(of_place, np.unique(tested.chosen.claims.place).tolist()))
        none = Interval(*np.zeros((3, 0)))
        return {
            name: Interval(*map(np.concatenate, zip(none, *(place[name] for place in by_place), strict=True)))
            for name in ("precision", "recall", "f1")
        }

    def _by_document(self, tested: Tested, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[claim, document] of a place: tokens that are active, both, and that show the pattern."""
        claims, counts = tested.chosen.claims, tested.counts
        here = claims.of(place)
        return counts.active[here], counts.both[here], self._masked.of(place).shown(claims.column[here])

    # -- neurons against decoys of their own, over all layers --------------------------------------------------

    def _competition(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By kind, for each claim: the largest lower end of F1 among the unit's rivals f64[claim], and the level of
        false discoveries f64[claim] at which its own is larger (`decoys.rates`). Layers are pooled; families are not,
        and each unit has at most one claim in each."""
        kinds = [NEURON, *self._decoys]
        sizes = {kind: len(self._tested[kind].tests) for kind in kinds}
        told = {kind: (np.zeros(size), np.ones(size)) for kind, size in sizes.items()}
        for tests in self._families:
            places = {kind: self._unit_numbers(kind, tests) for kind in kinds}
            scores = np.zeros((len(kinds), 2 * len(self._cells(NEURON))))
            for score, (kind, (claims, unit)) in zip(scores, places.items(), strict=True):
                score[unit] = np.nan_to_num(self._bounds[kind]["f1"].low[claims])
            of_neurons, of_decoys = decoys.rates(scores[0], scores[1:].T, self._seed)
            best = scores.argmax(0)
            for index, (kind, (claims, unit)) in enumerate(places.items()):
                rivals = np.delete(scores, index, 0)[:, unit].max(0)
                level = of_neurons if kind == NEURON else np.where(best == index, of_decoys, 1.0)
                told[kind][0][claims], told[kind][1][claims] = rivals, level[unit]
        return told

    def _unit_numbers(self, kind: str, tests: str) -> tuple[np.ndarray, np.ndarray]:
        """Claims i64[...] of a kind and a family, and which unit with sign each is about, over all layers."""
        claims = self._tested[kind].chosen.claims
        of_family = np.flatnonzero(self._tested[kind].tests == tests)
        unit = self._cells(kind).cell(claims.place[of_family], claims.unit[of_family])
        return of_family, 2 * unit + (claims.polarity[of_family] < 0)

    def excess(self) -> list[dict[str, Any]]:
        """Rows of `calibration`: what share of neurons, less what share of decoys, has an F1 of at least so much."""
        rows = []
        for tests in self._families if self._decoys else ():
            counted = decoys.Excess(2 * len(self._cells(NEURON)))
            for kind in (NEURON, *self._decoys):
                tested = self._tested[kind]
                for place in np.unique(tested.chosen.claims.place).tolist():
                    of_family = tested.tests[tested.chosen.claims.of(place)] == tests
                    active, both, present = (counts[of_family] for counts in self._by_document(tested, place))
                    counted.add(kind, decoys.f1_without(active, both, present))
            for kind in self._decoys:
                for of_what, estimates in (
                    ("excess of neurons", counted.over(NEURON, kind)),
                    ("share of neurons", counted.shares(NEURON)),
                    ("share of decoys", counted.shares(kind)),
                ):
                    for end in ("value", "low", "high"):
                        rows.append({
                            "layer": -1, "unit": kind, "measure": f"{of_what} in {tests}: {end}",
                            "count": counted.units, "levels": [*decoys.FIGURES],
                            "values": [getattr(estimate, end) for estimate in estimates],
                        })  # fmt: skip
        return rows

    def _cells(self, kind: str) -> Cells:
        """The units of a kind."""
        return self._tested[kind].counts.cells

    def _units(self, kind: str, layer: int) -> slice:
        """Which of the units of a kind are of this layer."""
        places = self.places(layer)
        return slice(self._cells(kind).of(places[0]).start, self._cells(kind).of(places[-1]).stop)

    def _numbers(self, kind: str, layer: int) -> np.ndarray:
        """i64[claim]: the number in the layer of the unit of each of its claims."""
        claims, here = self._tested[kind].chosen.claims, self.claims(kind, layer)
        cells = self._cells(kind).cell(claims.place[here], claims.unit[here])
        return np.asarray(cells - self._units(kind, layer).start)

    def _highest(
        self, layer: int, bars: Mapping[str, np.ndarray], f1: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """f64[place 2]: the bar of units of even and of odd number in each place of a layer, of all kinds of
        pseudo-neurons (`bars`): that of the layer, or of those of the place.

        f1  f64[unit 2] of each kind in the layer
        """
        places = self.places(layer)
        highest = np.tile(np.max([np.zeros(2), *bars.values()], axis=0), (len(places), 1))
        for kind in bars if len(places) > 1 else ():
            ends = self._cells(kind).offsets[places.start : places.stop + 1] - self._units(kind, layer).start
            for row, (first, last) in zip(highest, pairwise(ends.tolist()), strict=True):
                own = crossed_bars(f1[kind][first:last])
                row[:] = np.maximum(row, own[::-1] if first % 2 else own)
        return highest

    def _of_units(self, kind: str, layer: int, tests: str, f1: np.ndarray) -> np.ndarray:
        """f64[unit 2]: F1 of every unit of a kind in a layer, by sign (+1 first); 0 where there is no claim."""
        here, cells = self.claims(kind, layer), self._units(kind, layer)
        of_family = self._tested[kind].tests[here] == tests
        values = np.zeros((cells.stop - cells.start, 2))
        negative = self._tested[kind].chosen.claims.polarity[here][of_family] < 0
        values[self._numbers(kind, layer)[of_family], negative.astype(int)] = np.nan_to_num(f1[of_family])
        return values

    def _measured(self, kind: str, place: int) -> dict[str, Any]:
        tested, own = self._tested[kind], self._masked.of(place)
        counts, claims, here = tested.counts, tested.chosen.claims, tested.chosen.claims.of(place)
        unit, polarity = claims.unit[here], claims.polarity[here]
        cells = counts.cells.cell(place, unit)
        shown, whole = counts.counts[here].astype(np.int64), counts.totals[cells].astype(np.int64)
        absent = whole - shown
        curve = Curve(*(np.where(polarity[:, None] > 0, side, side[:, ::-1]) for side in (shown, absent)))
        score = tested.chosen.threshold[here]
        at_threshold = lambda values: np.take_along_axis(values, score[:, None], 1)[:, 0]  # noqa: E731
        active, both, present = at_threshold(curve.active), at_threshold(curve.both), curve.shown[:, 0]
        tokens = np.full(len(unit), own.tokens, np.int64)
        bounds = self._bounds[kind]
        table, other = counts.table[here], counts.other[here]
        compared = tested.chosen.other[here] >= 0
        columns: dict[str, Any] = {
            "threshold": np.where(polarity > 0, self._edges[score], self._edges[BINS - score]).astype(np.float32),
            "null": np.zeros(len(unit)),
            "tokens": tokens,
            "documents": np.full(len(unit), own.documents, np.int32),
            "active": active, "present": present, "both": both,
            "iou": at_threshold(curve.iou),
            "auprc": curve.average_precision,
            "pearson": twoway.pearson(
                tokens, counts.total[cells], counts.squares[cells], present, counts.among[here]
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
                columns[f"{name}_{end}"] = np.where(np.isfinite(columns[name]), bound[here], np.nan)
        if kind == NEURON and counts.gated[0]:
            columns["quadrants_active"] = counts.quadrants_active[here]
            columns["quadrants_both"] = counts.quadrants_both[here]
        return columns | self._specificity(kind, place, own)

    def correlations(self, kind: str, place: int, own: MaskedText) -> np.ndarray:
        """f64[pattern unit]: of the units of a kind with the patterns of a place, whose text is `own`."""
        counts = self._tested[kind].counts
        columns, sums = counts.patterns(place)
        units = counts.cells.of(place)
        present = own.shown(columns).sum(1)
        return twoway.pearson(
            np.asarray(own.tokens),
            counts.total[units],
            counts.squares[units],
            present[:, None],
            sums,
        )

    def _specificity(self, kind: str, place: int, own: MaskedText) -> dict[str, np.ndarray]:
        """Where each unit stands for its own pattern: among the neurons, and among all pseudo-neurons.

        NaN for claims of the family `whole`: common patterns would be most of the cost.
        """
        tested = self._tested[kind]
        claims, here = tested.chosen.claims, tested.chosen.claims.of(place)
        unit, polarity = claims.unit[here], claims.polarity[here].astype(np.float64)
        columns, _ = tested.counts.patterns(place)
        if not len(columns):
            return dict.fromkeys(("specificity_rank", "specificity_null"), np.full(len(unit), np.nan))
        left_out = np.isin(np.arange(here.start, here.stop), tested.counts.expecting)
        row = np.where(left_out, 0, np.searchsorted(columns, claims.column[here]))
        correlation = np.where(left_out, np.nan, self.correlations(kind, place, own)[row, unit] * polarity)
        nulls = [self.correlations(other, place, own) for other in self._tested if other != NEURON]
        compared = {"specificity_rank": self.correlations(NEURON, place, own)}
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
        return {
            "layer": layer, "unit": kind, "measure": f"f1 of {tests}", "count": f1.size, "levels": [*LEVELS],
            "values": np.quantile(f1, LEVELS).tolist(),
        }  # fmt: skip

    def writes(self, layer: int, norms: np.ndarray) -> dict[str, Any]:
        """A row of `calibration`: quantiles of |m| |v| over all neurons and tokens of a layer, from bins (A72).

        norms  f32[neuron]: of the values
        """
        totals = self._tested[NEURON].counts.totals[self._units(NEURON, layer)]
        counts = twoway.folded(totals.astype(np.int64))
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


def _joined(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of several places, one after another."""
    return (
        places[0]
        if len(places) == 1
        else {name: np.concatenate([columns[name] for columns in places]) for name in places[0]}
    )


def crossed_bars(f1: np.ndarray) -> np.ndarray:
    """f64[2]: what the lower end of F1 must exceed where there are no decoys, for units of even and of odd number.

    Each is the `NULL_LEVEL` quantile of F1 (f64[unit 2]) of the pseudo-neurons of the other parity, so that none is
    part of the bar that it is held against.
    """
    halves = [f1[1::2], f1[::2]]
    return np.array([np.quantile(half, twoway.NULL_LEVEL) if half.size else 0.0 for half in halves])


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
    layers = run.manifest.model.cells.layers
    norms = run.table("neurons").select("layer", "value_norm").collect()
    calibration = _of_search(smallest)

    def lists() -> Iterator[pa.Table]:
        layer_of = units.layer[candidates["unit"].to_numpy()]
        for layer in layers:
            frame = candidates[np.flatnonzero(layer_of == layer)]
            columns = {name: frame[name] for name in SCHEMAS["patterns"].names if name in frame.columns}
            yield _in_order(
                arrow_table("patterns", columns | {"triggers": frame["n"]} | _described(frame, units))
            )

    def tests() -> Iterator[pa.Table]:
        for layer in layers:
            tell(layer)
            measured, quantiles = verdicts.layer(layer)
            layer_norms = norms.filter(pl.col("layer") == layer)["value_norm"].to_numpy()
            calibration.extend([*quantiles, verdicts.writes(layer, layer_norms)])
            tables = []
            for kind, columns in measured.items():
                frame = candidates[claims[kind].rows[verdicts.claims(kind, layer)]]
                tables.append(arrow_table("pattern_tests", _described(frame, units) | columns))
            yield _in_order(pa.concat_tables(tables))
        tell(run.manifest.model.layers)
        calibration.extend(verdicts.excess())

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
