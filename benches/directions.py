"""What becomes of the pseudo-neurons of a real run: random directions, rotated basis, shuffled weights.

For each kind and family of tests: the share without a verdict, and how many of the neurons' verdicts would be expected
of pseudo-neurons (their share with a verdict over that of the neurons). `crossed` is the same with the layer's level
taken from one half of the pseudo-neurons and applied to the other half.

python -m benches.directions RUN
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mnemoscope import open_run
from mnemoscope.neuron.twoway import NULL_LEVEL, Rule
from mnemoscope.records import NEURON
from mnemoscope.run.reading import Run
from mnemoscope.trials.discovery import TESTED


def directions(run: Run, tests: str) -> dict[str, Any]:
    """What becomes of the pseudo-neurons of a run: for each kind, over all layers and both polarities (`sides`)."""
    rows = run.table("pattern_tests").filter(pl.col("tests") == tests)
    frame = rows.select("layer", "neuron", "unit", "f1", "f1_low", "q").collect()
    frame = frame.with_columns(pl.col("f1", "f1_low").fill_null(0))
    kinds = sorted(set(frame["unit"].unique()) - {NEURON})
    model, count = run.manifest.model, run.manifest.options["nulls"]["count"]
    sides = {NEURON: 2 * len(model.cells)} | dict.fromkeys(kinds, 2 * model.layers * count)
    believed = believed_of(frame, kinds, model.layers, count, None)
    crossed = [believed_of(frame, kinds, model.layers, count, parity) for parity in (0, 1)]
    results: dict[str, Any] = {NEURON: {"sides": sides[NEURON], "with_verdict": believed[NEURON]}}
    for kind in kinds:
        of_kind = frame.filter(pl.col("unit") == kind)
        shares = believed[kind] / sides[kind], sum(half[kind] for half in crossed) / sides[kind]
        real = believed[NEURON], sum(half[NEURON] for half in crossed) / 2
        rates = [share * sides[NEURON] / max(of, 1) for share, of in zip(shares, real, strict=True)]
        results[kind] = {
            "sides": sides[kind],
            "confirmed_N1": round(of_kind.filter(pl.col("q") <= Rule().q).height / sides[kind], 4),
            "with_verdict": believed[kind],
            "no_verdict": round(1 - shares[0], 4),
            "no_verdict_crossed": round(1 - shares[1], 4),
            "no_verdict_target": 0.95,
            "false_discovery_proportion": round(rates[0], 4),
            "false_discovery_proportion_crossed": round(rates[1], 4),
            "proportion_target": 0.05,
        }
    return results


def believed_of(
    frame: pl.DataFrame, kinds: list[str], layers: int, count: int, parity: int | None
) -> dict[str, int]:
    """Sides with a verdict, by kind. With a parity the level comes from pseudo-neurons of that parity, and those of
    the other are counted."""
    counts = dict.fromkeys([NEURON, *kinds], 0)
    frames = frame.partition_by("layer", "unit", as_dict=True)
    fits = pl.lit(True) if parity is None else pl.col("neuron") % 2 == parity
    tried = pl.lit(True) if parity is None else pl.col("neuron") % 2 != parity
    sides = 2 * len(range(parity or 0, count, 1 if parity is None else 2))
    for layer in range(layers):
        of_layer = {kind: frames.get((layer, kind), frame.clear()) for kind in counts}
        f1 = [of_layer[kind].filter(fits)["f1"].to_numpy() for kind in kinds]
        level = max(
            float(np.quantile(np.concatenate([values, np.zeros(sides - len(values))]), NULL_LEVEL))
            for values in f1
        )
        for kind, rows in of_layer.items():
            counted = rows if kind == NEURON else rows.filter(tried)
            counts[kind] += counted.filter((pl.col("f1_low") > level) & (pl.col("q") <= Rule().q)).height
    return counts


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    run = open_run(parser.parse_args().run)
    for tests in TESTED:
        print(json.dumps({"bench": "directions", "tests": tests, **directions(run, tests)}), flush=True)


if __name__ == "__main__":
    main()
