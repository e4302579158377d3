"""Whatever is killed, full or refused, a run is the undisturbed one, or one line says what is wrong.

`MNEMOSCOPE_KILLS=10 pytest tests/test_faults.py -rP` kills as often in each cell, and prints what was hit.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from tiny import model_folder, texts

import mnemoscope as mn

SOURCE = Path(__file__).parents[1] / "src" / "mnemoscope"
KILLS = {"one": 4, "two": 2, "devices": 1, "parts": 3, "ray": 1}  # of Ray each costs half a minute
ASKED = int(os.environ.get("MNEMOSCOPE_KILLS", "0"))
FAULTS = {  # what is done to builds of which engine; one process is its own driver
    "driver": ("one", "two", "parts", "ray"),
    "worker": ("two", "devices", "parts", "ray"),
    "bucket": ("one", "two", "parts", "ray"),
    "upload": ("one",),
    "second": ("one",),
    "room": ("one",),
}
CELLS = [(engine, fault, "llama") for fault, engines in FAULTS.items() for engine in engines]
CELLS += [("one", "driver", "qwen2_moe"), ("two", "driver", "qwen2_moe")]


def disturbed(engine: str, fault: str, model: Path, place: Path) -> dict[str, Any]:
    """What `faults.py` says."""
    if engine == "ray":
        pytest.importorskip("ray")
    kills = 1 if fault in ("second", "room") else ASKED or KILLS[engine]
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), engine, fault, str(model)]
    command += [str(place), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600 + 90 * kills)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert fault == "bucket" or told["kills"] >= kills
    return told


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("engine", "fault", "family"), CELLS, ids=map(" ".join, CELLS))
def test_a_disturbed_run_is_the_same(
    engine: str, fault: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each table has the sha256 of that of one process that was left alone."""
    refused = request.getfixturevalue("unreliable") if fault in ("bucket", "upload") else None
    told = disturbed(engine, fault, model_folder(tmp_path / "model", family), tmp_path)
    assert told["same"] and told["runs"], told
    if refused is not None:
        told["calls refused"] = refused()
        assert told["calls refused"] > 0
    sys.stdout.write(json.dumps(told) + "\n")


@pytest.fixture
def unreliable(s3_server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket of a server that refuses one call in ten; how many it has refused."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    s3_server.fails = lambda: False
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
    drawn, refused = random.Random(1), count()
    s3_server.fails = lambda: drawn.random() < 0.1 and next(refused) >= 0
    yield lambda: next(refused)
    s3_server.fails = lambda: False


def test_a_clock_that_jumps_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Years back and forth at every look, and between two calls: the tables are the same. No wait and no order is by
    the clock, but which copies are kept."""
    model = mn.load_model(model_folder(tmp_path / "model"), dtype="fp32")
    one = mn.build(model, texts(20), tmp_path / "one", top=3, nulls=())
    jumps = random.Random(0)
    monkeypatch.setattr("time.time", lambda: jumps.choice([0.0, 1e9, 2e9, 4e9]) + jumps.random())
    path = tmp_path / "other"

    def stop(step: Any) -> None:
        if step.stage == "reading values":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mn.build(model, texts(20), path, top=3, nulls=(), report=stop)
    for number, file in enumerate(sorted((path / ".work").rglob("*"))):
        os.utime(file, (number % 3 * 2e9,) * 2)
    other = mn.build(model, texts(20), path, top=3, nulls=())
    hashes = [{name: entry.sha256 for name, entry in run.manifest.tables.items()} for run in (one, other)]
    assert hashes[0] == hashes[1] and other.check() == []
    look = re.compile(r"\btime\.time\(|import time\b.*\btime$")
    looks = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py") if look.search(file.read_text())}
    assert looks == {"files.py", "text/samples.py", "atlas/index.py"}, "what was left, by its age"
