"""Patterns of every neuron, as a measurement of the study (A7, A8, A74, A77)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.studies.measures.positions import Sizes
from mnemoscope.trials.job import Settings, patterns


def measure(run: Run, model: Model, sizes: Sizes, folder: Path, report: Callable[[Progress], None]) -> Run:
    """The run with the tables `patterns`, `pattern_tests` and `calibration`."""
    return patterns(run, model, Settings(budget=sizes.tokens, seed=sizes.seed), report=report)
