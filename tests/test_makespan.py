"""The simulation of many devices: what it must give where that is known, and docs/scale.md, which says what it gave."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benches.makespan import DENSE, MIXTURE, Fleet, Job, case, folding, simulated

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (8B|mixture), (\d+)(?: devices?)? \|(.*)\|$", PAGE, re.M)
SMALL = Job("small", 64 * 32_768, 1e9, 1_000, loading=0.0)


def numbers(cells: str) -> list[tuple[float, float]]:
    """Of the cells of a row, each with half a unit of its last digit; files in GB."""
    units = {"TB": 1e3, "GB": 1.0, "h": 1.0, "": 1.0}
    found = re.findall(r"\**([\d.]+)\**\s*(TB|GB|h|)", cells)
    return [
        (float(number) * units[unit], 0.501 * units[unit] / 10 ** len(number.partition(".")[2]))
        for number, unit in found
    ]


def said(name: str) -> Job:
    return DENSE if name == "8B" else MIXTURE


@pytest.mark.parametrize(("name", "devices", "cells"), ROWS)
def test_the_page_says_what_is_reckoned(name: str, devices: str, cells: str) -> None:
    """Ideal hours, files, and what adding them up takes."""
    ideal, *_, files, one, pairs = numbers(cells)
    made = case(said(name), Fleet(int(devices)), draws=1)
    names = ("ideal_hours", "files_gb", "fold_serial_hours", "fold_by_pairs_hours")
    for (number, half), name in zip((ideal, files, one, pairs), names, strict=True):
        assert made[name] == pytest.approx(number, abs=half), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices", "cells"), ROWS)
def test_the_page_says_what_is_simulated(name: str, devices: str, cells: str) -> None:
    """Over the ideal: as it is, with slow and lost devices, and the worst of twenty of these."""
    _, plain, median, worst, *_ = (number for number, _ in numbers(cells))
    whole = Fleet(int(devices))
    rough = case(said(name), replace(whole, slow=0.05, failures=200.0), draws=60)
    assert plain == pytest.approx(case(said(name), whole, draws=20)["median_of_ideal"], rel=0.05)
    assert median == pytest.approx(rough["median_of_ideal"], rel=0.05)
    assert worst == pytest.approx(rough["worst_of_20_of_ideal"], rel=0.15)


def test_all_cases_are_on_the_page() -> None:
    """Both models, on 1, 8 and 64 devices, with seven figures each."""
    assert [(name, int(devices)) for name, devices, _ in ROWS] == [
        (name, devices) for name in ("8B", "mixture") for devices in (1, 8, 64)
    ]
    assert all(len(numbers(cells)) == 7 for *_, cells in ROWS)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_alike_shards_take_what_they_take(devices: int) -> None:
    """Without losses all devices are busy until the end; twice as slow ones take twice as long."""
    fleet = Fleet(devices, storage=math.inf)
    drawn = np.random.default_rng(0)
    ideal = SMALL.shards * SMALL.shard_seconds / devices
    assert simulated(SMALL, fleet, (1.0,), drawn) == pytest.approx(ideal)
    assert simulated(SMALL, replace(fleet, slow=1.0), (1.0,), drawn) == pytest.approx(2 * ideal)
    late = replace(SMALL, loading=7.0)
    assert simulated(late, fleet, (1.0,), drawn) == pytest.approx(ideal + 7.0)


def test_lost_devices_come_back_and_every_block_is_done() -> None:
    """However often they are lost, it ends, later than without; two hold a block when one does it twice."""
    often = Fleet(4, storage=math.inf, failures=4 * SMALL.shard_seconds / 3600, back=1.0)
    drawn = np.random.default_rng(0)
    ideal = SMALL.shards * SMALL.shard_seconds / 4
    for backups in (False, True):
        assert simulated(SMALL, replace(often, backups=backups), (1.0,), drawn) > 1.1 * ideal
    one, pairs = folding(SMALL, Fleet(1))
    assert 0 < pairs <= one
