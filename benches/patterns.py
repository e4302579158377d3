"""Planted truth on a real text: recovery by kind, false discoveries on every null, precision and recall, speed.

nulls        units that know nothing (independent), or only documents, positions or token frequencies: share with
             a family-wise p below .05, Kolmogorov-Smirnov p of uniformity, false discovery proportion after
             confirmation and Benjamini-Hochberg as in `mnemoscope patterns`, share that could have a verdict
recovery     share of planted units whose claim is confirmed and has, on all of the text, a mask with a Jaccard index
             of .7 or more with what was planted (.3 for topics, planted by a label that the search never sees: a word
             of the documents' descriptions, which must be one that the documents' words tell; words of descriptions
             that are no topics are counted apart). The claim is the best of the first candidates by F1 in the discovery
             half, of the claim by triggers and of that by the whole distribution the confirmed one, or the better by F1
             beyond chance; `first` is the same of the first candidate. Targets of single patterns hold from a base rate
             of 1e-3 and 60 documents with firings on; units below are counted apart
two-way      precision and recall of the claim in the test half, against those with which the unit fired
speed        the whole search of `--speed` units with as many triggers as neurons have

Each part is a line of JSON as soon as it is there, with its number of units (repetitions) and its seconds.

python -m benches.patterns [--units 40] [--nulls 300] [--speed 96000] [--tokens N] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy.stats import kstest

from benches.planting import LABEL, TOPIC, Planted, planted, sample_text
from benches.whole import Whole
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import bin_of
from mnemoscope.neuron.twoway import Curve, Rule, choose, plainest
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import search
from mnemoscope.patterns.triggers import Options, Units
from mnemoscope.patterns.whole import Language
from mnemoscope.records import MAIN
from mnemoscope.run.text import Text
from mnemoscope.text.sampling import half
from mnemoscope.trials.discovery import TESTED
from mnemoscope.trials.heldout import LEVEL, confirm, discovery_rate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted_patterns import NULLS, fire, null, triggers

LEVELS = (0.5, 0.8, 1.0)  # of precision and of recall
LIKE = {TOPIC: 0.3, LABEL: 0.3}
TARGETS = {TOPIC: 0.8, "conjunction": 0.7}
WITHIN = 0.03
MIDDLE = BINS // 2


@dataclass(frozen=True)
class World:
    """A text, planted units first and null units after them, and what the search said of them.

    truth, sides  of the planted units: what they answer to, with what precision and recall
    values, on    f32[prefix] and bool[prefix] of a planted unit: coefficients and firings, the same each time
    kinds         str[unit]
    claims        the candidates that the two-way test chooses from, confirmed, with `q`
    whole         claims of the family `whole`, one of a unit
    p             f64[unit]: family-wise, 1 where nothing is shared
    """

    text: Text
    truth: list[Planted]
    sides: list[tuple[float, float]]
    values: Callable[[int], np.ndarray]
    on: Callable[[int], np.ndarray]
    kinds: np.ndarray
    claims: pl.DataFrame
    whole: pl.DataFrame
    p: np.ndarray

    def confirmed(self) -> dict[str, np.ndarray]:
        """bool[unit]: whether any of its claims is, by triggers, by the whole distribution, or by either."""
        out = {}
        for name, claims in (("triggers", self.claims), ("whole", self.whole)):
            out[name] = np.zeros(len(self.kinds), bool)
            out[name][claims.filter(pl.col("q") <= Rule().q)["unit"].to_numpy()] = True
        return out | {"either": out["triggers"] | out["whole"]}


def fired(text: Text, what: Planted, sides: tuple[float, float], unit: int, noise: float = 1.0) -> np.ndarray:
    """f32[prefix]: the coefficients of a planted unit, the same each time."""
    mask = np.zeros(len(text), bool)
    mask[what.rows] = True
    return fire(text, mask, *sides, np.random.default_rng([1, unit]), noise=noise)


def world(text: Text, descriptions: list[str], count: int, nulls: int, seed: int, say: Say) -> World:
    """Plant, search, confirm: as `trials.job` does with the units of a run."""
    random = np.random.default_rng(seed)
    truth = list(planted(text, descriptions, count, random))
    sides = [tuple(random.choice(LEVELS, 2).tolist()) for _ in truth]
    kinds = [what.kind for what in truth] + [kind for kind in NULLS for _ in range(nulls)]

    def values(unit: int) -> np.ndarray:
        if unit >= len(truth):
            return null(text, kinds[unit], random)
        return fired(text, truth[unit], sides[unit], unit)

    def on(unit: int) -> np.ndarray:
        return fired(text, truth[unit], sides[unit], unit, noise=0.0) > 0

    return searched(text, truth, sides, kinds, values, on, say)


def searched(
    text: Text,
    truth: list[Planted],
    sides: list[tuple[float, float]],
    kinds: list[str],
    values: Callable[[int], np.ndarray],
    on: Callable[[int], np.ndarray],
    say: Say,
) -> World:
    """Search and confirm; `values` is asked once of each unit in turn, and again of planted ones by `outcomes`."""
    whole, rows = Whole(text, len(kinds)), []
    for unit in range(len(kinds)):
        of_unit = values(unit)
        rows.append(triggers(text, of_unit))
        whole.add(unit, of_unit, text.counted)
    say("planted", {"units": len(truth), "nulls": len(rows) - len(truth)})
    units = Units.of(rows)
    result = search(text, units, Options(tests=(MAIN,)))
    best = result.candidates.filter(pl.col("rank") == 0)
    p = np.ones(len(rows))
    p[best["unit"].to_numpy()] = best["p_family"].to_numpy()
    tests = result.calibration["effective_tests"]
    about = {
        "patterns": int(result.calibration["patterns"][0]),
        "effective_tests": [round(float(tests.min())), round(float(tests.max()))],  # type: ignore[arg-type]
    }
    say("search", about | {"drawn_sets": int(result.calibration["draws"].sum())})
    further = pl.Series(p[result.candidates["unit"].to_numpy()] <= LEVEL)
    claims = confirm(text, units, result.candidates.filter(further))
    rates = discovery_rate(claims["p_test"].to_numpy(), np.ones(len(claims), bool))
    claims = claims.with_columns(q=pl.Series(rates)).filter(pl.col("rank") < TESTED[MAIN])
    say("confirmed", {"claims": len(claims)})
    _, by_all = whole.claims(result)
    say(
        "whole",
        {
            "columns": len(Language.of(result).specs),
            "common": Language.of(result).common,
            "claims": len(by_all),
        },
    )
    return World(text, truth, sides, values, on, np.array(kinds), claims, by_all, p)


def nulls_of(world: World) -> dict[str, Any]:
    """What becomes of the units that know nothing."""
    passed, real, by_whole = world.confirmed(), len(world.truth), world.whole
    results = {}
    for kind in (*dict.fromkeys(world.kinds[real:].tolist()), "all"):
        here = world.kinds == kind if kind != "all" else np.arange(len(world.kinds)) >= real
        false = int((passed["either"] & here).sum())
        true = int(passed["either"][:real].sum())
        results[kind] = {
            "units": int(here.sum()),
            "family_wise_05": round(float((world.p[here] < 0.05).mean()), 4),
            "ks_p": round(float(kstest(world.p[here], "uniform").pvalue), 4),
            "ks_target": 0.01,
            "false_discoveries": false,
            "by_triggers": int((passed["triggers"] & here).sum()),
            "by_whole_distribution": int((passed["whole"] & here).sum()),
            "whole_05": _mean((by_whole["p"].to_numpy() < 0.05)[here[by_whole["unit"].to_numpy()]].tolist()),
            "discoveries": true + false,
            "false_discovery_proportion": round(false / max(true + false, 1), 4),
            "proportion_target": 0.05,
            "no_verdict": round(1 - false / int(here.sum()), 4),
            "no_verdict_target": 0.95,
        }
    return results


@dataclass(frozen=True)
class Outcome:
    """What became of one planted unit: how like (Jaccard) its first candidate and its claim are to what was planted,
    whether the claim is confirmed, precision and recall as claimed and as fired in the test half, and what the targets
    require."""

    kind: str
    first: float
    like: float
    confirmed: bool
    measured: tuple[float, float]
    true: tuple[float, float]
    of_truth: tuple[float, float]
    parts: float
    rate: float
    documents: int
    planted: str
    claim: str

    @property
    def recovered(self) -> bool:
        """Whether this is the right pattern."""
        return self.confirmed and self.like >= LIKE.get(self.kind, 0.7)

    @property
    def ample(self) -> bool:
        """Whether the targets hold here."""
        if self.kind == LABEL:
            return False
        return self.kind in TARGETS or (self.rate >= 1e-3 and self.documents >= 60)


class Half:
    """The counted rows of one half, by document."""

    def __init__(self, text: Text, test: bool) -> None:
        self.rows = np.flatnonzero(text.counted & (half(text.document) == test))
        documents = text.document[self.rows]
        self.starts = np.flatnonzero(np.diff(documents, prepend=-1))

    def curve(self, score: np.ndarray, shown: np.ndarray) -> tuple[Curve, np.ndarray]:
        """Positive scores by bin where a pattern is and is not; documents that are active at each threshold."""
        bins, has = score[self.rows], shown[self.rows]
        width = BINS - MIDDLE
        present, whole = np.bincount(bins[has], minlength=width), np.bincount(bins, minlength=width)
        tops = np.bincount(np.maximum.reduceat(bins, self.starts), minlength=width)
        return Curve(present, whole - present), np.cumsum(tops[::-1])[::-1]


def outcomes(world: World) -> Iterator[Outcome]:
    """The two-way test of every planted unit."""
    text, claims = world.text, world.claims
    named = [
        claims_of.filter(pl.col("unit") < len(world.truth))["spec"] for claims_of in (claims, world.whole)
    ]
    specs = pl.concat(named).unique().sort().to_list()
    matrix, column_of = masks(text, specs), {spec: number for number, spec in enumerate(specs)}
    discovery, test = Half(text, False), Half(text, True)
    by_unit = {
        key[0]: claims_of.sort("rank") for key, claims_of in claims.partition_by("unit", as_dict=True).items()
    }
    by_all = {row["unit"]: row for row in world.whole.iter_rows(named=True)}

    def shown(spec: str) -> np.ndarray:
        out = np.zeros(len(text), bool)
        out[matrix.indices[matrix.indptr[column_of[spec]] : matrix.indptr[column_of[spec] + 1]]] = True
        return out

    for unit, (what, sides) in enumerate(zip(world.truth, world.sides, strict=True)):
        score = np.maximum(bin_of(world.values(unit)) - MIDDLE, 0)
        on = world.on(unit)
        truth = np.zeros(len(text), bool)
        truth[what.rows] = True
        candidates = by_unit.get(unit)
        masked = [shown(spec) for spec in candidates["spec"]] if candidates is not None else []
        thresholds = [choose(*discovery.curve(score, mask)) for mask in masked]
        best = -1
        if candidates is not None:
            best = plainest(np.array([value for _, value in thresholds]), candidates["complexity"].to_numpy())
        threshold, _ = choose(*discovery.curve(score, truth))
        claim = _Claim("", np.zeros(len(text), bool), -1, 0.0, False)
        if candidates is not None:
            passed = bool(candidates["q"][best] <= Rule().q)
            claim = _Claim(
                candidates["spec"][best],
                masked[best],
                int(thresholds[best][0]),
                float(thresholds[best][1]),
                passed,
            )
        if (row := by_all.get(unit)) is not None:
            other = _Claim(
                row["spec"], shown(row["spec"]), row["threshold"], row["value"], row["q"] <= Rule().q
            )
            claim = max(claim, other, key=lambda candidate: (candidate.confirmed, candidate.value))
        yield Outcome(
            kind=what.kind,
            first=_like(masked[0], truth) if masked else 0.0,
            like=_like(claim.shown, truth),
            confirmed=claim.confirmed,
            measured=_sides(test, score, claim.shown, claim.threshold),
            true=_shares(on[test.rows], truth[test.rows]),
            of_truth=_sides(test, score, truth, int(threshold)),
            parts=_named(masked, what, text) if masked else 0.0,
            rate=len(what.rows) / len(text),
            documents=len(np.unique(text.document[on])),
            planted=f"{what.name} (precision {sides[0]:g}, recall {sides[1]:g})",
            claim=claim.spec,
        )


class _Claim(NamedTuple):
    """`threshold` is the score from which a unit is active, `value` F1 beyond chance in the discovery half."""

    spec: str
    shown: np.ndarray
    threshold: int
    value: float
    confirmed: bool


def _like(mask: np.ndarray, other: np.ndarray) -> float:
    return float((mask & other).sum() / max((mask | other).sum(), 1))


def _shares(active: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    both = float((active & shown).sum())
    return both / max(float(active.sum()), 1), both / max(float(shown.sum()), 1)


def _sides(test: Half, score: np.ndarray, shown: np.ndarray, threshold: int) -> tuple[float, float]:
    """Precision and recall in the test half with the threshold that the discovery half chose."""
    return _shares(score[test.rows] >= threshold, shown[test.rows]) if threshold >= 0 else (0.0, 0.0)


def _named(masked: list[np.ndarray], what: Planted, text: Text) -> float:
    """Share of the meanings that some claim names, alone or with the others."""
    named = 0
    for rows in what.parts:
        meaning = np.zeros(len(text), bool)
        meaning[rows] = True
        named += any(
            _like(mask, meaning) >= 0.7
            or (mask[rows].mean() > 0.9 and mask[what.rows].sum() > 0.7 * mask.sum())
            for mask in masked
        )
    return named / len(what.parts)


def recovery(done: list[Outcome]) -> dict[str, Any]:
    """By kind of pattern."""
    results = {}
    for kind in dict.fromkeys(outcome.kind for outcome in done):
        of_kind = [outcome for outcome in done if outcome.kind == kind]
        ample = [outcome for outcome in of_kind if outcome.ample]
        few = [outcome for outcome in of_kind if not outcome.ample]
        results[kind] = {
            "units": len(ample),
            "recovered": _mean([outcome.recovered for outcome in ample]),
            "target": TARGETS.get(kind, 0.95) if ample else None,
            "first": _mean([outcome.confirmed and outcome.first >= LIKE.get(kind, 0.7) for outcome in ample]),
            "confirmed": _mean([outcome.confirmed for outcome in ample]),
            "jaccard": _quantiles([outcome.like for outcome in ample]),
            "base_rate": _quantiles([outcome.rate for outcome in of_kind]),
            "meanings_named": _mean([outcome.parts for outcome in ample]),
            "units_below": len(few),
            "recovered_below": _mean([outcome.recovered for outcome in few]),
            "missed": [
                [outcome.planted, outcome.claim[:80], round(outcome.like, 2)]
                for outcome in ample
                if not outcome.recovered
            ][:8],
        }
    return results


def two_way(done: list[Outcome]) -> dict[str, Any]:
    """How far precision and recall are from those with which the units fired, where the targets hold."""
    results = {}
    done = [outcome for outcome in done if outcome.ample]
    recovered = [outcome for outcome in done if outcome.recovered]
    for name, claims, of_claims in (
        ("what was planted", [outcome.of_truth for outcome in done], done),
        ("the recovered claim", [outcome.measured for outcome in recovered], recovered),
    ):
        off = np.abs(np.array(claims) - np.array([outcome.true for outcome in of_claims]))
        near = (off <= WITHIN).all(1)
        results[name] = {
            "units": len(of_claims),
            "within": WITHIN,
            "both_by_kind": {
                kind: _mean(
                    [bool(is_near) for is_near, o in zip(near, of_claims, strict=True) if o.kind == kind]
                )
                for kind in dict.fromkeys(o.kind for o in of_claims)
            },
            **{
                side: {
                    "share": _mean((off[:, column] <= WITHIN).tolist()),
                    "median": round(float(np.median(off[:, column])), 4),
                    "mean_error": round(
                        float(
                            np.mean(
                                np.array(claims)[:, column] - np.array([o.true for o in of_claims])[:, column]
                            )
                        ),
                        4,
                    ),
                }
                for column, side in enumerate(("precision", "recall"))
            },
        }
    return results


def _mean(values: list[Any]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


def _quantiles(values: list[float]) -> list[float]:
    return [float(f"{value:.2g}") for value in np.quantile(values, (0.1, 0.5, 0.9))] if values else []


def speed(text: Text, count: int) -> dict[str, Any]:
    """Seconds to search so many units, some of whose triggers share a token."""
    random = np.random.default_rng(1)
    rows = np.flatnonzero(text.counted)
    order = rows[np.argsort(text.tokens[rows], kind="stable")]
    triggers_of = []
    for _ in range(count):
        start, near_count = int(random.integers(len(order) - 400)), int(random.integers(51))
        near = random.choice(order[start : start + 400], near_count)
        triggers_of.append(np.concatenate([near, rows[random.integers(len(rows), size=50 - near_count)]]))
    begin, cpu = time.perf_counter(), time.process_time()
    search(text, Units.of(triggers_of), Options(tests=(MAIN,)))
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    return {"units": count, "wall": round(wall, 1), "cpu": round(used, 1), "target_seconds": 180}


class Say:
    """Prints each part when it is done, with the seconds (wall, processor) since the last."""

    def __init__(self, bench: str = "patterns") -> None:
        self._bench = bench
        self._last = (time.perf_counter(), time.process_time())

    def __call__(self, part: str, result: dict[str, Any]) -> None:
        now = (time.perf_counter(), time.process_time())
        seconds = [round(b - a, 1) for a, b in zip(self._last, now, strict=True)]
        self._last = now
        print(json.dumps({"bench": self._bench, "part": part, "seconds": seconds, **result}), flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--nulls", type=int, default=300)
    parser.add_argument("--speed", type=int, default=96_000)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    say = Say()
    text, descriptions = sample_text(arguments.tokens)
    say("text", {"tokens": len(text), "documents": len(np.unique(text.document))})
    if arguments.units:
        planted_world = world(text, descriptions, arguments.units, arguments.nulls, arguments.seed, say)
        say("nulls", nulls_of(planted_world))
        done = list(outcomes(planted_world))
        say("recovery", recovery(done))
        say("two-way", two_way(done))
    if arguments.speed:
        say("speed", speed(text, arguments.speed))


if __name__ == "__main__":
    main()
