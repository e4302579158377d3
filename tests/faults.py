"""Builds that are disturbed until a number of kills is used up, for `test_faults.py`:

    python tests/faults.py ENGINE FAULT MODEL PLACE KILLS

In a process of its own, which forks drivers when everything is imported and compiled, so that random moments fall into
the work. Prints as JSON what was hit while it did what, and how many runs there were, each the same as undisturbed.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import psutil
from tiny import texts

import mnemoscope as mn
from mnemoscope.errors import MnemoscopeError, RunMissing
from mnemoscope.mine import loop
from mnemoscope.records import Progress
from mnemoscope.run.writing import is_finished
from mnemoscope.text import plan

PARTS = 3
DOING = mmap.mmap(-1, 64)  # the stage that a driver is in, shared with it; nothing before it has told of one
Work = Callable[[], object]


def tell(step: Progress) -> None:
    """What a driver reports."""
    DOING[:] = step.stage.encode().ljust(len(DOING))


def doing() -> str:
    return DOING[:].strip(b"\0 ").decode() or "starting"


class Driver:
    """A process that works; it ends with 2 where a line says what is wrong."""

    def __init__(self, work: Work) -> None:
        DOING[:] = bytes(len(DOING))
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _do(work)
        with suppress(OSError):  # the child does it too; whoever comes first, the group is there from here on
            os.setpgid(self.pid, self.pid)

    def code(self, seconds: float = inf) -> int | None:
        """What it ended with; None if it has not within so many seconds."""
        until = time.monotonic() + seconds
        while self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(0.002)
        return self._code

    def workers(self) -> list[psutil.Process]:
        """Processes that mine for it."""
        try:
            below = psutil.Process(self.pid).children(recursive=True)
            return [each for each in below if _mines(" ".join(each.cmdline()))]
        except psutil.Error:
            return []


def _do(work: Work) -> NoReturn:
    os.setpgrp()
    code = 1
    try:
        work()
        code = 0
    except MnemoscopeError as error:
        assert "\n" not in str(error)
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _mines(command: str) -> bool:
    return "ray::_Process" in command or "spawn_main" in command


def at_work(process: psutil.Process) -> bool:
    """Whether it holds a lock of the run, which it takes before it mines."""
    try:
        return any(file.path.endswith(".lock") for file in process.open_files())
    except psutil.Error:
        return False


class Disturbance:
    """One engine, and what is done to it."""

    def __init__(self, engine: str, model: str, place: Path, kills: int) -> None:
        self.engine, self.place, self.kills = engine, place, kills
        self.model, self.text = mn.load_model(model, dtype="fp32"), mn.load_corpus(texts(600))
        self.chance = random.Random(engine)
        self.hits, self.refused, self.paths = Counter[str](), Counter[str](), list[Path]()
        self.build(place / "reference", "one")  # compiles, too
        self.took = 0.0

    def build(self, path: Path | str, engine: str) -> None:
        """All of a build."""
        ways: dict[str, dict[str, Any]] = {
            "one": {},
            "two": {"workers": 2},
            "devices": {"device": "cpu,cpu"},
            "ray": {"workers": 2, "engine": "ray"},
        }
        if engine == "parts":
            for number in range(PARTS):
                self.part(path, number)
            self.merge(path)
        else:
            mn.build(self.model, self.text, path, top=7, report=tell, **ways[engine])

    def part(self, path: Path | str, number: int) -> None:
        mn.build_part(self.model, self.text, path, (number, PARTS), top=7, report=tell)

    def merge(self, path: Path | str) -> None:
        mn.merge(path, self.model, report=tell)

    @property
    def left(self) -> bool:
        """Whether there are kills left."""
        return self.hits.total() < self.kills

    def disturb(self, once: Callable[[Path], None]) -> None:
        """Run after run, until the kills are used up."""
        while self.left and len(self.paths) < 20 + 2 * self.kills:
            self.paths.append(self.place / f"disturbed-{len(self.paths)}")
            once(self.paths[-1])

    def timed(self, path: Path, work: Work) -> None:
        """Measure the work undisturbed."""
        begin = time.monotonic()
        assert Driver(work).code() == 0
        self.took = time.monotonic() - begin
        self.paths.append(path)

    def report(self) -> dict[str, Any]:
        """What came of it."""
        wanted = tables(self.place / "reference")
        return {
            "engine": self.engine,
            "kills": self.hits.total(),
            "at_work": self.hits.total() - self.hits["starting"],
            "hits": dict(self.hits),
            "refused": dict(self.refused),
            "runs": len(self.paths),
            "same": all(tables(path) == wanted for path in self.paths)
            and not any(mn.open_run(path).check() for path in self.paths),
            "seconds": round(self.took, 1),
        }

    # -- drivers -----------------------------------------------------------------------------------------------

    def driver(self) -> None:
        """Killed at random moments; of parts it is the merge."""
        if self.engine == "parts":
            self.timed_merge()
        else:
            path = self.place / "undisturbed"
            self.timed(path, lambda: self.build(path, self.engine))
        self.disturb(self._driver)

    def timed_merge(self) -> None:
        mined, path = self.place / "mined", self.place / "undisturbed"
        for number in range(PARTS):
            self.part(mined, number)
        shutil.copytree(mined, path)
        self.timed(path, lambda: self.merge(path))

    def _driver(self, path: Path) -> None:
        work: Work = lambda: self.build(path, self.engine)  # noqa: E731
        if self.engine == "parts":
            shutil.copytree(self.place / "mined", path)
            work = lambda: self.merge(path)  # noqa: E731
        while not is_finished(path):
            driver = Driver(work)
            if self.left and driver.code(self.chance.uniform(0, self.took)) is None:
                # Now and then its workers are orphaned.
                whole = self.engine != "ray" and self.chance.random() < 0.5
                (os.killpg if whole else os.kill)(driver.pid, signal.SIGKILL)
                if driver.code() == -signal.SIGKILL:
                    self.hits[doing()] += 1
            else:
                assert driver.code() == 0, driver.code()

    # -- workers -----------------------------------------------------------------------------------------------

    def worker(self) -> None:
        """One of the workers, killed at random moments while some of them work."""
        path = self.place / "undisturbed"
        self.timed(path, lambda: self.build(path, self.engine))
        self.disturb(self._part if self.engine == "parts" else self._worker)

    def _worker(self, path: Path) -> None:
        while not is_finished(path):
            driver = Driver(lambda: self.build(path, self.engine))
            while driver.code(0.02) is None:
                if self.left and any(map(at_work, driver.workers())):
                    driver.code(self.chance.uniform(0, 1))
                    if found := driver.workers():
                        self._kill(self.chance.choice(found))
            assert driver.code() in (0, 2), driver.code()
            self.refused["driver"] += driver.code() == 2

    def _part(self, path: Path) -> None:
        def start(number: int) -> Driver:
            return Driver(lambda: self.part(path, number))

        running = {number: start(number) for number in range(PARTS)}
        while self.left:
            time.sleep(self.chance.uniform(0, self.took / PARTS))
            if not (alive := [number for number in running if running[number].code(0) is None]):
                break
            number = self.chance.choice(alive)
            self._kill(psutil.Process(running[number].pid))
            if running[number].code() != 0:
                running[number] = start(number)
        assert [driver.code() for driver in running.values()] == [0] * PARTS
        assert Driver(lambda: self.merge(path)).code() == 0

    def _kill(self, process: psutil.Process) -> None:
        try:
            process.suspend()
            stage = "mining" if at_work(process) else "starting"
            process.kill()
            self.hits[stage] += 1
        except psutil.NoSuchProcess:
            pass

    # -- the rest ----------------------------------------------------------------------------------------------

    def room(self) -> None:
        """Files may be so large and no larger, until all of them are small enough."""
        self.disturb(self._room)

    def _room(self, path: Path) -> None:
        import resource

        def limited(room: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            self.build(path, self.engine)

        for room in (int(1.5**power) for power in range(12, 45)):
            driver = Driver(lambda room=room: limited(room))  # type: ignore[misc]
            if driver.code() == 0:
                break
            assert driver.code() == 2, (driver.code(), doing())
            self.hits[doing()] += 1

    def second(self) -> None:
        """Another driver on the same run."""
        self.disturb(self._second)

    def _second(self, path: Path) -> None:
        first = Driver(lambda: self.build(path, self.engine))
        while doing() == "starting" and first.code(0.01) is None:
            pass
        stage, second = doing(), Driver(lambda: self.build(path, self.engine))
        assert second.code() in (0, 2), second.code()
        self.hits[stage] += second.code() == 2
        assert first.code() == 0, first.code()

    def bucket(self) -> None:
        """Built to a bucket, or built in parts and pushed there; brought back, it is the same."""
        url = f"s3://bucket{self.place}/{self.engine}"
        if self.engine == "parts":
            self.build(self.place / "near", "parts")
            far = mn.push(self.place / "near", url)
        else:
            self.build(url, self.engine)
            far = mn.open_run(url)
        assert far.check() == []
        self.paths.append(Path(mn.pull(url, self.place / "back").path))

    def upload(self) -> None:
        """Killed while it is uploaded: each time there is a whole run or none; brought back, it is the same."""
        self.disturb(self._upload)

    def _upload(self, path: Path) -> None:
        url = f"s3://bucket{path}"
        while True:
            driver = Driver(lambda: self.build(url, self.engine))
            while doing() != "uploading" and driver.code(0.002) is None:
                pass
            if not self.left or driver.code(self.chance.uniform(0, 1)) is not None:
                break
            os.kill(driver.pid, signal.SIGKILL)
            if driver.code() == -signal.SIGKILL:
                self.hits[doing()] += 1
            assert Driver(lambda: _check_whole(url)).code() == 0
        assert driver.code() == 0
        assert Driver(lambda: mn.pull(url, path)).code() == 0


def _check_whole(url: str) -> None:
    with suppress(RunMissing):
        assert mn.open_run(url).check() == []


def tables(path: Path) -> dict[str, str]:
    """The sha256 of each table, as the manifest says."""
    entries = json.loads((path / "manifest.json").read_bytes())["tables"]
    return {name: entry["sha256"] for name, entry in entries.items()}


def main() -> None:
    engine, fault, model, place, kills = sys.argv[1:]
    plan.SHARD_TOKENS, loop.CHECKPOINT_SECONDS = 200, 0.0
    disturbance = Disturbance(engine, model, Path(place), int(kills))
    getattr(disturbance, fault)()
    sys.stdout.write(json.dumps({"fault": fault} | disturbance.report()) + "\n")


if __name__ == "__main__":
    main()
