"""Commands that are told to stop at random moments, for `test_stops.py`:

    python tests/stops.py PLACE STOPS [COMMAND ...]

In a process of its own, which forks commands when everything is imported and compiled, so that random moments fall into
the work. Prints as JSON, for each command, what was wrong, and how often it was stopped before it had ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tiny import model_folder, texts

import mnemoscope
import mnemoscope as mn
from mnemoscope.cli import main
from mnemoscope.errors import RunMissing

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 120.0  # seconds after which a command that was told to stop has not
MINED = ("model", "--corpus", "text.txt", "--dtype", "fp32", "--top", "5")
_PROMPT = "The capital of France is"


class Disk(LocalFileSystem):
    """Files of this machine, behind a URL; folders have to be made."""

    protocol = ("disk",)
    put_file = AbstractFileSystem.put_file

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("disk:").strip("/")


fsspec.register_implementation("disk", Disk)


class Command(NamedTuple):
    """Words, what it makes, and whether that is new or there already; seconds for what never ends by itself."""

    words: str
    makes: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()  # copies of what `prepare` made, under other names
    seconds: float = 0.0
    same: bool = True  # each time the same bytes


COMMANDS = {
    "build": Command(f"build {' '.join(MINED)} -o out", ("out",)),
    "build to a URL": Command(f"build {' '.join(MINED)} -o disk://PLACE/far", ("far",)),
    "part": Command(f"build {' '.join(MINED)} -o out --shard 0/1", ("out",)),
    "merge": Command("merge parts", ("parts",), ("parts",)),
    "push": Command("push run disk://PLACE/far", ("far",)),
    "pull": Command("pull disk://PLACE/pushed out", ("out",)),
    "plan": Command(f"plan {' '.join(MINED)}"),
    "show": Command("show run --html page.html", ("page.html",)),
    "find": Command("find run --sort kurtosis"),
    "verify": Command("verify run --sample 5"),
    "explain": Command(f"explain model '{_PROMPT}' --dtype fp32 --html page.html", ("page.html",)),
    "prompts": Command("explain model --prompts prompts.jsonl --dtype fp32 -o table.parquet", ("table.parquet",)),
    "trace": Command(f"trace run '{_PROMPT}' --html page.html", ("page.html",)),
    "export": Command("export run --to openai --layer 0 -o out", ("out",)),
    "site": Command("site run -o out", ("out",)),
    "removal": Command("removal copy --documents 8", ("copy",), ("copy",)),
    "patterns": Command("patterns copy --budget 400", ("copy",), ("copy",)),
    "study": Command("study -o copy --fast --only refinement,contributions", ("copy", "copy/report.html"), ("copy",)),
    "compare": Command("compare run run --only glance --html page.html", ("page.html",)),
    "serve": Command("serve run --port 0", seconds=3.0),
}  # fmt: skip


def prepare(place: Path) -> None:
    """A model, a text, a run of it, and what commands begin with."""
    os.chdir(place)
    model_folder(place / "model")
    Path("text.txt").write_text("\n\n".join(texts(80)))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": _PROMPT}) + "\n")
    model, text = mn.load_model("model", dtype="fp32"), mn.load_corpus("text.txt")
    mn.build(model, text, "run", top=5)
    mn.build_part(model, text, "parts", (0, 1), top=5)
    mn.push("run", f"disk://{place}/pushed")


def run(words: list[str], seconds: float | None = None, number: int = 0) -> tuple[int, str, float, list[int]]:
    """Exit code, stderr, seconds, and what is left running of a command, which a signal may stop after so many."""
    began, written = time.monotonic(), Path("stderr")
    if (pid := os.fork()) == 0:
        _do(words, written)
    until = began + PATIENCE + (seconds or 0)
    told = seconds is None
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        now = time.monotonic()
        if not told and now >= began + seconds:  # type: ignore[operator]
            told = True
            os.kill(pid, number)
        if now > until:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    took, left = time.monotonic() - began, []
    for _ in range(100):
        left = [int(each.name) for each in Path("/proc").glob("[0-9]*") if _group(each.name) == pid]
        if not left:
            break
        time.sleep(0.05)
    for each in left:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1]), written.read_text(errors="replace"), took, left


def _group(name: str) -> int:
    with suppress(OSError):
        state, _, group = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:3]
        return 0 if state == "Z" else int(group)
    return 0


def _do(words: list[str], written: Path) -> None:
    os.setpgrp()
    for number, file in ((0, os.devnull), (1, os.devnull), (2, str(written))):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, code = ["mnemoscope", *words], 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def clear(command: Command) -> None:
    """As before the command."""
    for name in command.makes:
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in command.begins:
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree({"copy": "run", "parts": "mined"}[name], name)
    for lock in ("out", "far"):
        shutil.rmtree(lock, ignore_errors=True)


def made(command: Command) -> dict[str, str]:
    """A hash of every file that it has made; of a run those of its tables."""
    hashes = {}
    for top in command.makes:
        for path in [Path(top)] if Path(top).is_file() else sorted(Path(top).rglob("*")):
            if path.name == "manifest.json":
                tables = json.loads(path.read_bytes())["tables"]
                hashes |= {f"{path} {name}": entry["sha256"] for name, entry in tables.items()}
            elif path.is_file() and path.name != ".lock":
                hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def halves(command: Command, whole: dict[str, str]) -> list[str]:
    """What looks finished and is not."""
    wrong = []
    for top in command.makes:
        path = Path(top)
        if path.is_dir() and (top in ("out", "far", "copy", "parts")):
            where = f"disk://{path.absolute()}" if top == "far" else path
            try:
                if (problems := mn.open_run(where).check()) != []:
                    wrong.append(f"{top}: {problems}")
            except RunMissing:
                if top == "copy" or (
                    command.words.split()[0] in ("export", "site") and made(command) != whole
                ):
                    wrong.append(f"{top}: there is a part of it")
        elif path.is_file() and command.same and made(command)[top] != whole[top]:
            wrong.append(f"{top}: half of it")
    return wrong + [f"left behind: {path}" for path in Path().glob(".*")]


def disturb(name: str, place: Path, stops: int, chance: random.Random) -> dict[str, Any]:
    """Stop a command so often at random moments, and give it again each time."""
    command = COMMANDS[name]
    words = shlex.split(command.words.replace("PLACE", str(place)))
    wrong, hits = [], 0
    clear(command)
    code, said, took, _ = run(words, command.seconds or None, signal.SIGINT)
    if code != (130 if command.seconds else 0):
        return {"wrong": [f"undisturbed: {code}: {said[-2000:]}"], "hits": 0}
    whole = made(command)
    for attempt in range(stops):
        clear(command)
        number, seconds = SIGNALS[attempt % 3], chance.uniform(0, (command.seconds or took) * 1.02)
        code, said, _, left = run(words, seconds, number)
        what = f"{number.name} after {seconds:.2f} of {took:.2f} s"
        lines = said.strip().splitlines() or [""]
        if code not in (
            0,
            -number,
            128 + number,
        ):  # before its first line, or after its last, nobody says a word
            wrong.append(f"{what}: exit code {code}: {said[-1500:]}")
        elif code > 0:
            hits += 1
            if (
                not lines[-1].startswith("mnemoscope: interrupted; ")
                or "Traceback" in said
                or "Exception ignored" in said
            ):
                wrong.append(f"{what}: {said[-1500:]}")
        if left:
            wrong.append(f"{what}: still runs: {left}")
        wrong += [f"{what}: {half}" for half in halves(command, whole)]
        if command.seconds:
            continue
        again, said, _, _ = run(words)
        if again != 0 and code != 0:
            wrong.append(f"{what}, again: {again}: {said[-1500:]}")
        elif again == 0 and command.same and made(command) != whole:
            now = made(command)
            differing = sorted(key for key in {*now, *whole} if now.get(key) != whole.get(key))
            wrong.append(f"{what}, again: other bytes: {differing[:5]}")
    clear(command)
    return {"wrong": wrong, "hits": hits, "seconds": round(took, 2)}


def started(work: Callable[[], object]) -> None:
    """Do it in a process of its own, so that nothing of it stays in this one."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def disturb_all() -> None:
    place, stops, *names = sys.argv[1:]
    folder = Path(place).absolute()
    os.environ["MNEMOSCOPE_CACHE"] = str(folder / "cache")
    started(lambda: prepare(folder))
    os.chdir(folder)
    Path("parts").rename("mined")
    for module in pkgutil.walk_packages(mnemoscope.__path__, "mnemoscope."):  # before anything is forked
        with suppress(ImportError):
            import_module(module.name)
    for name in names or COMMANDS:
        told = disturb(name, folder, int(stops), random.Random(name))
        sys.stdout.write(json.dumps({"command": name} | told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    disturb_all()
