"""The compiled loops, one by one, against plain numpy; what they mean together is in test_accumulate.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnemoscope.mine import kernel
from mnemoscope.mine.places import bin_of, coarse_bin_of


def as_bf16(x: np.ndarray) -> np.ndarray:
    """The upper 16 bits of fp32 numbers."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def as_fp32(bits: np.ndarray) -> np.ndarray:
    """What bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("neurons", [1, 100, kernel.STRIP, kernel.STRIP + 1, 2 * kernel.STRIP + 37])
@pytest.mark.parametrize("half", [False, True])
def test_contexts_are_reduced_whatever_the_width(neurons: int, half: bool) -> None:
    """Less than a strip of neurons, exactly one, or several; contexts with 0 to 9 positions that count."""
    r = np.random.default_rng(neurons)
    tokens = 10
    counted = np.arange(tokens)[None, :] < np.arange(tokens)[:, None]
    values = r.standard_normal((tokens * tokens, neurons)).astype(np.float32)
    values = as_bf16(values) if half else values
    x = (as_fp32(values) if half else values).reshape(tokens, tokens, neurons)
    rows = np.flatnonzero(counted)
    offsets = np.concatenate([[0], np.cumsum(counted.sum(1))])
    pivot = r.standard_normal(neurons).astype(np.float32)
    maximum, minimum = np.empty((2, tokens, neurons), np.float32)
    maximum_at, minimum_at = np.empty((2, tokens, neurons), np.int32)
    sums, positive = np.empty((2, 4, neurons)), np.empty((2, neurons), np.int64)
    for index, part in enumerate([(0, 6), (6, tokens)]):
        kernel.reduce_contexts(
            values, rows, offsets, tokens, *part, pivot,
            maximum, maximum_at, minimum, minimum_at, sums[index], positive[index],
        )  # fmt: skip
    assert np.array_equal(maximum[0], np.full(neurons, -np.inf))
    assert np.array_equal(minimum[0], np.full(neurons, np.inf))
    assert (maximum_at[0] == -1).all()
    assert (minimum_at[0] == -1).all()
    for c in range(1, tokens):
        mine = x[c, :c]
        assert np.array_equal(maximum[c], mine.max(0))
        assert np.array_equal(maximum_at[c], mine.argmax(0))
        assert np.array_equal(minimum[c], mine.min(0))
        assert np.array_equal(minimum_at[c], mine.argmin(0))
    d = x[counted].astype(np.float64) - pivot
    for power in range(4):
        np.testing.assert_allclose(sums.sum(0)[power], (d ** (power + 1)).sum(0), rtol=1e-10, atol=1e-10)
    assert np.array_equal(positive.sum(0), (x[counted] > 0).sum(0))


@pytest.mark.parametrize("half", [False, True])
def test_every_bf16_number_goes_into_the_bin_of_its_definition(half: bool) -> None:
    """All 65,280 finite ones, read as bf16 and as fp32; neurons outside the range asked for stay untouched."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = as_fp32(bits)
    finite = np.isfinite(x)
    values = np.ascontiguousarray(np.broadcast_to((bits if half else x)[finite][:, None], (finite.sum(), 3)))
    rows = np.arange(len(values))
    bins = np.empty(values.shape, np.uint8)
    for first in range(0, len(rows), 20_000):
        kernel.assign_bins(values, rows, first, min(first + 20_000, len(rows)), bins)
    counts = np.zeros((3, kernel.BINS), np.int32)
    kernel.count(bins, 1, 2, counts)
    assert np.array_equal(counts[1], np.bincount(bin_of(x[finite]), minlength=kernel.BINS))
    assert not counts[[0, 2]].any()
    key = np.full((3, kernel.COARSE_BINS), kernel.EMPTY)
    coefficient, token = np.zeros(key.shape, np.float32), np.zeros(key.shape, np.int32)
    hashes, salt = rows.astype(np.uint64), np.zeros(3, np.uint64)
    kernel.sample(values, rows, bins, hashes, rows.astype(np.int32), 1, 2, salt, key, coefficient, token)
    assert np.array_equal(coarse_bin_of(coefficient[1]), np.arange(kernel.COARSE_BINS))
    for place in range(kernel.COARSE_BINS):
        inside = coarse_bin_of(x[finite]) == place
        with np.errstate(over="ignore"):
            assert key[1, place] == (hashes[inside] * kernel.SPREADER).min()
    assert (key[[0, 2]] == kernel.EMPTY).all()


def test_every_fp32_exponent_and_edge_goes_into_its_bin() -> None:
    """A million random bit patterns, and the neighbours of every edge."""
    r = np.random.default_rng(0)
    edges = np.float32(
        [s * 2.0**e * m for s in (-1, 1) for e in range(-13, 14) for m in (1, 1.25, 1.5, 1.75)]
    )
    x = np.concatenate(
        [
            r.integers(0, 2**32, 1_000_000, np.uint32).view(np.float32),
            edges,
            np.nextafter(edges, np.float32(0)),
            np.nextafter(edges, np.float32(np.inf)),
        ]
    )
    x = x[np.isfinite(x)]
    bins = np.empty((len(x), 1), np.uint8)
    kernel.assign_bins(x[:, None].copy(), np.arange(len(x)), 0, len(x), bins)
    assert np.array_equal(bins[:, 0], bin_of(x))


@pytest.mark.parametrize("places", [1, 2, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_merging_sorted_lists_keeps_the_largest(places: int, weighted: bool) -> None:
    """The first k of both, descending, each with what belongs to it; 0 stands for none."""
    r = np.random.default_rng(places)
    lists = np.zeros((2, 50, places), np.uint64)
    distinct = r.permutation(10_000).astype(np.uint64)[: lists.size].reshape(lists.shape) + np.uint64(1)
    kept = np.arange(places) < r.integers(0, places + 1, (2, 50, 1))
    lists[kept] = distinct[kept]
    lists = np.sort(lists, -1)[..., ::-1].copy()
    whats = lists * np.uint64(3)
    expected = np.sort(np.concatenate(lists, -1), -1)[:, ::-1][:, :places]
    untouched = lists[0, 40:].copy()
    weights = lists.astype(np.float32)[..., : places if weighted else 0].copy()
    kernel.merge_ranked(lists[0], whats[0], weights[0], lists[1], whats[1], weights[1], 0, 40)
    if weighted:
        assert np.array_equal(weights[0, :40], expected[:40].astype(np.float32))
    assert np.array_equal(lists[0, :40], expected[:40])
    assert np.array_equal(whats[0, :40], expected[:40] * np.uint64(3))
    assert np.array_equal(lists[0, 40:], untouched)


_WITHOUT_A_CACHE = """
import json, sys
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as when no folder can be written
import numpy as np
from mnemoscope.mine import kernel
counts = np.zeros((1, kernel.BINS), np.int32)
kernel.count(np.full((2, 1), 7, np.uint8), 0, 1, counts)
print(json.dumps(counts.nonzero()[1].tolist()))
"""


@pytest.mark.slow
def test_without_a_folder_to_cache_in_it_still_works() -> None:
    """A read-only installation compiles in every process, silently."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_A_CACHE], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [7]
    assert done.stderr == ""


@pytest.mark.slow
def test_compiling_everything_is_quick(tmp_path: Path) -> None:
    """For a first run on a fresh machine: well below a minute of processor time for one dtype."""
    script = Path(__file__).parent.parent / "benches" / "kernel.py"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "--compile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["compile_processor_seconds"] < 45
