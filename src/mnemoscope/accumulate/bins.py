"""The fixed bins of histograms and samples: signed, log-spaced, read off a float's bits.

A bin around zero holds |x| < 2^-12. From there, each octave up to 2^12 is cut into four equally wide bins
for each sign, and the outermost bins hold what is larger still. Samples have coarser bins, two octaves
each.
"""

from __future__ import annotations

import numpy as np

from mnemoscope.kernel import BINS, COARSE_BINS, COARSE_OCTAVES, OCTAVES, SUB_BINS, ZERO_EXPONENT

_MAGNITUDES = np.concatenate(
    [
        2.0**octave * (1 + np.arange(SUB_BINS) / SUB_BINS)
        for octave in range(ZERO_EXPONENT, ZERO_EXPONENT + OCTAVES)
    ]
)
HISTOGRAM_EDGES = np.concatenate([[-np.inf], -_MAGNITUDES[:0:-1], [-_MAGNITUDES[0]], _MAGNITUDES, [np.inf]])
"""f64[bin + 1], ascending. A bin holds its edge nearer to zero and not the other; the bin around zero holds
neither. The outermost bins have no outer edge."""


def bin_of(x: np.ndarray) -> np.ndarray:
    """The histogram bin (i64) of each finite number: the definition that the kernel follows."""
    size = np.searchsorted(_MAGNITUDES, np.abs(x), side="right")
    return np.where(x < 0, BINS // 2 - size, BINS // 2 + size)


def coarse_bin_of(x: np.ndarray) -> np.ndarray:
    """The bin (i64) of `Samples` for each finite number: ascending; the bin around zero is its own."""
    size = np.searchsorted(_MAGNITUDES[:: COARSE_OCTAVES * SUB_BINS], np.abs(x), side="right")
    return np.where(x < 0, COARSE_BINS // 2 - size, COARSE_BINS // 2 + size)
