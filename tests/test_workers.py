"""Several processes: what is said where they cannot be started, or end too soon."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import model_folder, texts

from mnemoscope.mine.loop import _ended

SCRIPT = """
import mnemoscope as mn
if {guard}:
    run = mn.build(mn.load_model("model"), "text.txt", "run", top=3, nulls=(), workers=2)
    print("built", run.manifest.corpus.documents)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    model_folder(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(texts(3000)))
    return folder


def call(place: Path, guard: str, stdin: bool) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(guard=guard)
    (place / "script.py").write_text(script)
    command = [sys.executable, *([] if stdin else ["script.py"])]
    return subprocess.run(
        command, input=script if stdin else "", cwd=place, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "stdin", "words"),
    [
        ("True", False, 'put the call under `if __name__ == "__main__":`'),
        ("True", True, "not a file that worker processes could run"),
    ],
    ids=["no guard", "standard input"],
)
def test_a_script_without_a_guard_is_told_of_it(guard: str, stdin: bool, words: str, place: Path) -> None:
    """The guard is named, and memory is not."""
    done = call(place, guard, stdin)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and words in last and "memory" not in last, done.stderr


def test_only_a_killed_worker_is_said_to_have_been() -> None:
    """A signal is named; memory is a guess that only SIGKILL allows; another end points to the process's own words."""
    assert "ended by SIGKILL; the system does so when memory is short" in _ended("mining", -signal.SIGKILL)
    assert "ended by SIGSEGV" in _ended("mining", -signal.SIGSEGV) and "memory" not in _ended(
        "mining", -signal.SIGSEGV
    )
    assert (
        "exit code 1" in _ended("mining", 1)
        and "__main__" in _ended("mining", 1)
        and "memory" not in _ended("mining", 1)
    )
