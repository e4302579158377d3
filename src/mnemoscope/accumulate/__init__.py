"""Streaming accumulators over coefficients: what is kept of every neuron in one pass.

    coefficients ─ scan ─ Reading ─┬─ Triggers    the largest and the most negative, each with its place
                                   ├─ Moments     four power sums, extremes, positive counts
                                   ├─ Histograms  counts over fixed bins           (a share of the contexts)
                                   └─ Samples     one place from each part of the range     (the same share)

`Memories` is all four, and what the build loop holds. States are plain arrays, declared once, and merge to
the same bits in whatever order (the laws are in tests/test_accumulate.py). Only counted positions are ever
read.
"""

from mnemoscope.accumulate.bins import HISTOGRAM_EDGES, bin_of, coarse_bin_of
from mnemoscope.accumulate.distribution import Histograms, Samples
from mnemoscope.accumulate.memories import Memories, below, load_state, save_state
from mnemoscope.accumulate.moments import Moments
from mnemoscope.accumulate.places import HISTOGRAM_EVERY, HISTOGRAM_SHARE, Places, selected
from mnemoscope.accumulate.protocol import Accumulator
from mnemoscope.accumulate.reading import Extremes, Reading, scan, scan_torch
from mnemoscope.accumulate.triggers import Triggers

__all__ = [
    "HISTOGRAM_EDGES",
    "HISTOGRAM_EVERY",
    "HISTOGRAM_SHARE",
    "Accumulator",
    "Extremes",
    "Histograms",
    "Memories",
    "Moments",
    "Places",
    "Reading",
    "Samples",
    "Triggers",
    "below",
    "bin_of",
    "coarse_bin_of",
    "load_state",
    "save_state",
    "scan",
    "scan_torch",
    "selected",
]
