"""A study that is killed again and again measures what an uninterrupted one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import model_folder, texts

KILLED = """
import os, random, shutil, signal, sys, time
from mnemoscope import build, load_corpus, load_model, open_run
from mnemoscope.studies.catalogue import choose
from mnemoscope.studies.measures.positions import Sizes
from mnemoscope.studies.run import measure

if __name__ == "__main__":
    folder, text, place, rounds = *sys.argv[1:4], int(sys.argv[4])
    model, chance = load_model(folder, dtype="fp32"), random.Random(5)
    build(model, load_corpus(text), f"{place}/built", top=7)
    sizes, chosen = Sizes(positions=300, sentences=60, tokens=3000), choose(None)

    def hashes(name):
        run = measure(open_run(f"{place}/{name}"), model, chosen=chosen, sizes=sizes, skip=lambda *_: None)
        return {name: entry.sha256 for name, entry in run.manifest.tables.items()}

    for name in ("compiled", "whole", "killed"):
        shutil.copytree(f"{place}/built", f"{place}/{name}")
    hashes("compiled")
    begin = time.monotonic()
    whole = hashes("whole")
    took = time.monotonic() - begin
    killed = 0
    for _ in range(rounds):
        child = os.fork()  # no import again: the moments fall into the work
        if child == 0:
            hashes("killed")
            os._exit(0)
        time.sleep((0.05 + 0.4 * chance.random()) * took)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(killed, len(whole), hashes("killed") == whole == hashes("compiled"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_study_is_the_same(tmp_path: Path) -> None:
    """SIGKILL five times, each time resumed; every table has the sha256 of an uninterrupted study's."""
    folder = model_folder(tmp_path / "model")
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(400)))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(folder), str(source), str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, tables, same = done.stdout.split()
    assert int(killed) >= 2
    assert int(tables) > 20
    assert same == "True"
