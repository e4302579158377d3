"""The one loop that pulls batches, feeds accumulators, checkpoints and reports.

A shard is the unit of work. Each worker keeps one state (the merge of the shards it has done) and writes it to a
file of its own; what a run has done is the merge of these files. States merge in any order to the same bits, so
neither the number of workers nor an interruption can show in a result.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.multiprocessing as mp
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from mnemoscope import children, errors
from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.device import shortfall
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.spread import is_spread
from mnemoscope.records import ContextBatch, Progress
from mnemoscope.text.plan import Plan

CHECKPOINT_SECONDS = 30.0
TRIES = 3  # times that a shard may fail
_BLOCK = 8  # neighbouring shards that a worker takes at once when there are many: their sums fold into one
_PATIENCE = 120.0  # seconds to wait until an orphaned worker of a killed run has noticed and left

_KEPT = "nothing finished is lost: run the same command again"

Report = Callable[[Progress], None]


@runtime_checkable
class State(Protocol):
    """What the loop feeds: accumulators that know which shards they hold.

    One that has a method ``update_rows``, a `RoutedReceiver`, is fed mixtures of experts too, and one with
    ``update_rebuilt``, a `RebuiltReceiver`, what other units than neurons rebuild.
    """

    @property
    def shards(self) -> frozenset[int]: ...
    def update(
        self,
        layer: int,
        coefficients: Float[Tensor, "context token neuron"],
        batch: ContextBatch,
        gate: Float[Tensor, "context token neuron"] | None,
        up: Float[Tensor, "context token neuron"] | None,
        inputs: Float[Tensor, "context token width"],
    ) -> None: ...
    def finish_shard(self, shard: int) -> None: ...
    def merge(self, other: Any) -> None: ...
    def save(self, path: Path) -> None: ...


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class StateFactory(Generic[S]):
    """How to start a state and how to read one back; both picklable, because workers call them.

    held  which shards a file holds, without reading what else there is; None to read it whole
    anew  the same of the same model, once it was moved to another device; None where nothing lies on one
    """

    fresh: Callable[[], S]
    load: Callable[[Path], S]
    held: Callable[[Path], frozenset[int]] | None = None
    anew: Callable[[], StateFactory[S]] | None = None

    def shards(self, file: Path) -> frozenset[int]:
        """The shards that a file holds."""
        return self.load(file).shards if self.held is None else self.held(file)


@dataclass(frozen=True)
class Portion:
    """One of so many parts of the shards, neighbours together; `number` counts from 0."""

    number: int
    parts: int

    @property
    def name(self) -> str:
        """As in the names of its files."""
        return f"part-{self.number:05d}-of-{self.parts:05d}"

    def of(self, shards: int) -> range:
        """Its shards, of all."""
        return range(self.number * shards // self.parts, (self.number + 1) * shards // self.parts)

    @contextmanager
    def held(self, folder: Path) -> Iterator[None]:
        """No other process does this part, and none that a killed one began is left."""
        with locked(folder / f"state-{self.name}.lock", folder.parent):
            wait_for(folder, f"*-{self.name}-*.lock")
            yield


@runtime_checkable
class Job(Protocol):
    """What processes share out: numbered pieces, shards (`Mining`) or layers (`layers.ValueReading`), that leave files
    in a folder."""

    @property
    def model(self) -> Model: ...
    @property
    def folder(self) -> Path: ...
    @property
    def doing(self) -> str:
        """Begins what is said of it."""

    @property
    def piece(self) -> str:
        """What a piece is."""

    def file(self, name: str | int) -> Path:
        """What a process has for itself; the lock beside it says that it is at work."""

    def placed(self, device: torch.device) -> Job:
        """The same with the model on a device."""

    def do(
        self,
        file: Path,
        pieces: Iterable[int],
        tell: Callable[[int], None],
        checkpoint_seconds: float | None = None,
    ) -> object:
        """What one process does, with a file of its own; `tell` is called with how much more is done."""


@dataclass(frozen=True)
class Mining(Generic[S]):
    """What is mined: shards of the plan, by the model, into states that are kept as ``<stem>-*.npz`` in the folder."""

    model: Model
    plan: Plan
    factory: StateFactory[S]
    folder: Path
    stem: str = "state"
    doing, piece = "mining", "shard"

    def file(self, name: str | int) -> Path:
        """Where a process keeps a state of its own."""
        return self.folder / f"{self.stem}-{name}.npz"

    def placed(self, device: torch.device) -> Mining[S]:
        """The same with the model on a device, and what is made of it there."""
        if self.model.move(device) and self.factory.anew is not None:
            return replace(self, factory=self.factory.anew())
        return self

    def do(
        self,
        file: Path,
        pieces: Iterable[int],
        tell: Callable[[int], None],
        checkpoint_seconds: float | None = None,
    ) -> S:
        """As `mined`."""
        return mined(self, file, pieces, tell, checkpoint_seconds)


@runtime_checkable
class Engine(Protocol):
    """Who does the work: processes here (`Processes`), or those of a cluster (`cluster.Ray`)."""

    def check(self) -> None:
        """RunError where it cannot be used; asked before a model is loaded."""

    def mine(self, mining: Mining[S], shards: list[int], tell: Callable[[int], None]) -> S | None:
        """Do the shards, none of which any file holds, and leave their states in files; the state, if one holds all
        of it and is at hand. `tell` is called with tokens that are done. Raises what a shard raised."""

    def read(self, reading: Job, layers: list[int], tell: Callable[[int], None]) -> None:
        """Read the values of layers, each into files of its own. `tell` is called with layers that are done. Raises
        what a layer raised."""


def run_shards(
    model: Model,
    plan: Plan,
    factory: StateFactory[S],
    folder: Path,
    *,
    workers: int = 1,
    engine: Engine | None = None,
    report: Report | None = None,
) -> S:
    """Feed every shard of the plan to a state, resuming from the state files in the folder.

    workers  processes; each holds a copy of the state, and all on one device share one copy of the weights
    engine   who does the shards, if not so many processes
    Raises whatever a worker raised; what was checkpointed stays.
    """
    wait_for(folder)
    state = _run(
        Mining(model, plan, factory, folder), range(plan.shards), engine or Processes(workers), report
    )
    return folded(factory, sorted(folder.glob("state-*.npz")), report) if state is None else state


def run_part(
    model: Model,
    plan: Plan,
    factory: StateFactory[S],
    folder: Path,
    portion: Portion,
    engine: Engine,
    report: Report | None = None,
) -> None:
    """Feed the shards of one part, which is held (`Portion.held`), to state files of its own, beside those of other
    processes; otherwise as `run_shards`, which goes on from them."""
    mining = Mining(model, plan, factory, folder, f"state-{portion.name}")
    _run(mining, portion.of(plan.shards), engine, report)


def wait_for(folder: Path, locks: str = "*.lock") -> None:
    """A worker that outlived a killed run has left once its lock is free."""
    for lock in folder.glob(locks):
        with locked(lock, folder.parent, _PATIENCE):
            pass


def _run(mining: Mining[S], shards: range, engine: Engine, report: Report | None) -> S | None:
    """Do those of the shards that no file holds; the state, where it is all that there is."""
    engine.check()
    held = {file: mining.factory.shards(file) for file in sorted(mining.folder.glob("state-*.npz"))}
    done = frozenset().union(*held.values())
    if report and not done.issuperset(shards) and (note := shortfall(mining.model.device)):
        report(Progress("mining", 0, 0, "tokens", note))
    tally = _Tally(mining.plan, shards, done, report)
    state = engine.mine(mining, [shard for shard in shards if shard not in done], tally.add)
    return state if held.keys() <= {mining.file(0)} else None


def folded(factory: StateFactory[S], files: Sequence[Path], report: Report | None = None) -> S:
    """What all of these files hold, read one after another: two states are in memory, and what merging them takes."""
    state: S | None = None
    for number, file in enumerate(files):
        if report and len(files) > 1:
            report(Progress("adding up", number, len(files), "files"))
        state = factory.load(file) if state is None else _merged(state, factory.load(file))
    if report and len(files) > 1:
        report(Progress("adding up", len(files), len(files), "files"))
    return factory.fresh() if state is None else state


def _merged(state: S, other: S) -> S:
    state.merge(other)
    return state


class _Tally:
    """Tokens done, reported after every batch."""

    def __init__(
        self, plan: Plan, shards: Iterable[int], done: frozenset[int], report: Report | None
    ) -> None:
        self._report = report
        self._total = sum(plan.shard_tokens[shard] for shard in shards)
        self._done = sum(plan.shard_tokens[shard] for shard in shards if shard in done)
        self.add(0)

    def add(self, tokens: int) -> None:
        self._done += tokens
        if self._report:
            self._report(Progress("mining", self._done, self._total, "tokens"))


@dataclass(frozen=True)
class Processes:
    """So many processes on this machine, each on one of the model's devices in turn. Those on one device share its copy
    of the weights; a single one is this one."""

    workers: int = 1

    def check(self) -> None:
        """RunError where no further process can be started: each begins by running the main script again."""
        if self.workers > 1:
            _check_script()

    def mine(self, mining: Mining[S], shards: list[int], tell: Callable[[int], None]) -> S | None:
        """As of `Engine`; each process keeps one state, and takes the next shards when it is free.

        ModelNotSupported for several processes of a model that is on several devices.
        """
        if self.workers > 1 and is_spread(mining.model.hf):
            raise ModelNotSupported(
                f"running {mining.model.id} in {self.workers} processes: it is spread over several devices; give one "
                "process"
            )
        workers = min(self.workers, len(shards))
        if workers == 1:
            return mined(mining, mining.file(0), shards, tell)
        if shards:
            _spawn(mining, workers, _blocks(shards, workers), tell)
        return None

    def read(self, reading: Job, layers: list[int], tell: Callable[[int], None]) -> None:
        """As of `Engine`; one process on each device of the model. More of them on one would share what a single one
        uses whole: a processor's cores, or its one product after another."""
        workers = min(self.workers, len(reading.model.devices), len(layers))
        if workers > 1:
            _spawn(reading, workers, [[layer] for layer in layers], tell)
        else:
            reading.do(reading.file(0), layers, tell)


def mined(
    mining: Mining[S],
    file: Path,
    shards: Iterable[int],
    tell: Callable[[int], None],
    checkpoint_seconds: float | None = None,
) -> S:
    """One process's share of the work: shards in, one state file out, in which it goes on from what is there; a shard
    that it holds is not done again.

    The file is written now and then (CHECKPOINT_SECONDS), and once at the end. From there a shard is tried again that
    failed by what has no line of its own; RunError names one that failed TRIES times.
    """
    seconds = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
    waiting, failures = iter(shards), Counter[int]()
    while True:
        try:
            return _mined(mining, file, waiting, tell, seconds)
        except _ShardFailed as failed:
            reason = failed.__cause__
            assert isinstance(reason, Exception)
            if mining.factory.fresh() is failed.state:  # which holds half a shard, and is all that there is
                raise reason from None
            *_, shard = failed.undone
            failures[shard] += 1
            if failures[shard] == TRIES:
                raise errors.RunError(
                    f"mining: shard {shard} failed {TRIES} times, the last time by {_named(reason)}; {_KEPT}"
                ) from reason
            waiting = chain(failed.undone, waiting)
            tell(-failed.tokens)


class _ShardFailed(Exception):  # noqa: N818 - caught where it is raised
    """The last of the shards that a state holds and its file does not, with so many tokens in all, was not finished."""

    def __init__(self, state: State, undone: list[int], tokens: int) -> None:
        self.state, self.undone, self.tokens = state, undone, tokens


def _named(error: Exception) -> str:
    """An error in a line: its kind, what it says, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{f': {said}' if said else ''} ({Path(last.filename).name}:{last.lineno})"


def _mined(
    mining: Mining[S], file: Path, shards: Iterator[int], tell: Callable[[int], None], seconds: float
) -> S:
    """As `mined`, until a shard fails."""
    state = mining.factory.load(file) if file.exists() else mining.factory.fresh()
    saved, undone, tokens = time.monotonic(), list[int](), 0
    more: list[Any] = [getattr(state, name, None) for name in ("update_rows", "update_rebuilt")]

    @contextmanager
    def trying() -> Iterator[None]:
        try:
            yield
        except errors.MnemoscopeError:
            raise
        except Exception as error:
            raise _ShardFailed(state, undone, tokens) from error

    with Capture(mining.model) as capture:
        held = state.shards
        for shard in shards:
            if shard in held:  # by a process that was lost after it had written them
                continue
            undone.append(shard)
            with trying():
                batches = list(mining.plan.batches(shard))
            for batch in batches:
                _stop_if_orphaned()
                with trying():
                    capture.sweep(batch, state.update, *more)
                tokens += batch.n_tokens
                tell(batch.n_tokens)
            with trying():
                state.finish_shard(shard)
            if time.monotonic() - saved > seconds:
                state.save(file)
                saved, tokens = time.monotonic(), 0
                undone.clear()
    if undone:
        _stop_if_orphaned()
        state.save(file)
    return state


def _stop_if_orphaned() -> None:
    """A worker whose parent was killed must not go on writing beside a resumed run."""
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _spawn(job: Job, workers: int, blocks: Iterable[list[int]], tell: Callable[[int], None]) -> None:
    """Do blocks of pieces in processes that take the next block when they are free."""
    context, places = mp.get_context("spawn"), job.model.devices or (job.model.device,)
    tasks, news = context.Queue(), context.Queue()
    for block in blocks:
        tasks.put(block)
    for _ in range(workers):
        tasks.put(None)
    job.model.hf.share_memory()
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(
            target=_work,
            args=(job, index, places[index % len(places)], threads, tasks, news),
            daemon=True,
        )
        for index in range(workers)
    ]
    try:
        with children.starting():
            for process in processes:
                process.start()
        _listen(job.doing, processes, news, tell)
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()


_GUARD = 'put the call under `if __name__ == "__main__":`, or give workers=1'


def _check_script() -> None:
    if getattr(mp.current_process(), "_inheriting", False):
        raise errors.RunError(
            f"mining: a worker process ran the main script again and came to the same build; {_GUARD}"
        )
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is not None and not Path(file).is_file():
        raise errors.RunError(
            f"mining: the program is {Path(file).name}, not a file that worker processes could run; write it to a "
            f"file and {_GUARD}"
        )


def _blocks(shards: list[int], workers: int) -> list[list[int]]:
    """Shards as they are handed out: one by one, or in aligned blocks when every worker gets several of these."""
    size = _BLOCK if len(shards) >= 4 * _BLOCK * workers else 1
    return [list(block) for _, block in groupby(shards, lambda shard: shard // size)]


def _listen(doing: str, processes: list[Any], news: Any, tell: Callable[[int], None]) -> None:
    """Pass on what the workers tell, until each has said that it is done; raise what one raised."""
    waiting = len(processes)
    while waiting:
        try:
            kind, value = news.get(timeout=1.0)
        except queue.Empty:
            for process in processes:
                if process.exitcode not in (None, 0):
                    raise errors.RunError(_ended(doing, process.exitcode)) from None
            continue
        if kind == "more":
            tell(value)
        elif kind == "done":
            waiting -= 1
        elif kind == "failed":
            line, trace = value
            raise errors.RunError(f"{doing}: {line}; {_KEPT}") from RuntimeError(trace)
        else:
            name, message = value
            raise getattr(errors, name, RuntimeError)(message)


def _ended(doing: str, code: int) -> str:
    """Why a worker is gone, as far as its exit code says: a signal, or the script that it began with."""
    if code < 0:
        name = signal.Signals(-code).name
        why = "; the system does so when memory is short" if name == "SIGKILL" else ""
        return f"{doing}: a worker process was ended by {name}{why}; {_KEPT}, with fewer workers"
    return (
        f"{doing}: a worker process stopped with exit code {code} before it had begun or while it worked, and its own "
        f"message is above; if that is about bootstrapping or a script run again, {_GUARD}; {_KEPT}"
    )


def _work(job: Job, number: int, device: torch.device, threads: int, tasks: Any, news: Any) -> None:
    """What a worker process runs."""
    torch.set_num_threads(threads)
    begun = "a worker process"

    def pieces() -> Iterator[int]:
        nonlocal begun
        for piece in chain.from_iterable(iter(tasks.get, None)):
            _stop_if_orphaned()
            begun = f"{job.piece} {piece}"
            yield piece

    try:
        job, file = job.placed(device), job.file(number)
        with locked(file.with_suffix(".lock"), job.folder.parent, _PATIENCE):
            job.do(file, pieces(), lambda more: news.put(("more", more)))
        news.put(("done", None))
    except errors.MnemoscopeError as error:
        news.put(("error", (type(error).__name__, str(error))))
    except Exception as error:
        news.put(("failed", (f"{begun} failed by {_named(error)}", traceback.format_exc())))


@contextmanager
def locked(file: Path, run: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock on (part of) a run's folder, which the system releases however the process ends."""
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except Timeout:
        raise errors.RunError(
            f"building a run: another process is building in {run}; wait for it, stop it, or choose another "
            "folder"
        ) from None
    except OSError as error:
        raise errors.RunError(
            f"building a run: {run}: {error.strerror or error}; choose a folder that can be written to"
        ) from error
    try:
        yield
    finally:
        lock.release()
