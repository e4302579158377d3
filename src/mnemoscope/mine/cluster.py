"""Mining and reading values by the processes of a Ray cluster, on many machines that share the folder of the run.

The queue of blocks of shards, or of layers, is here, and each process (an actor) has one of them at a time. It loads
the model once, and writes files for each block, whole or not at all, that are the same whoever makes them. So a process
that is lost takes with it what it had not written, and its block goes to another one. No process is restarted: what one
had in memory would be missing afterwards, and nothing would say so.

A process that has a GPU sees no other, so that it is ``cuda:0`` there, whichever the driver's model is on.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mnemoscope import errors
from mnemoscope.arguments import check_engine
from mnemoscope.errors import RunError
from mnemoscope.mine.loop import Job, Mining, S, locked

if TYPE_CHECKING:
    from ray.actor import ActorHandle

TRIES = 3  # processes that a block may lose before it is given up
_BLOCKS = 8  # for each process: a lost one costs an eighth of what it does, and every block is a file
_PATIENCE = 120.0  # seconds that a process waits for one of a driver that was killed


@dataclass(frozen=True)
class Ray:
    """So many processes of a Ray cluster.

    address  of the cluster (``auto``: the one that this machine is part of); None for one of this machine alone, which
             is started and stopped again
    """

    workers: int = 1
    address: str | None = None

    def check(self) -> None:
        """RunError where Ray is not installed."""
        check_engine("ray", self.address)

    def _imported(self) -> Any:
        """Ray. A cluster that is started here listens on all interfaces, but answers only who knows its token; Ray
        reads that from the environment, once, when it is imported."""
        if "ray" in sys.modules:
            self._check_imported(sys.modules["ray"])
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if self.address is None and "RAY_AUTH_MODE" not in os.environ:
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        import ray

        return ray

    def _check_imported(self, ray: Any) -> None:
        """RunError for Ray without a token, of which a cluster that is started now would answer anyone."""
        if self.address is None and "RAY_AUTH_MODE" not in os.environ and not ray.is_initialized():
            raise RunError(
                "building a run on a cluster: ray was imported before and knows no token, so that one that it starts "
                "would do what anyone asks; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before it is imported, or give "
                "{address} of a cluster",
                address=...,
            )

    def mine(self, mining: Mining[S], shards: list[int], tell: Callable[[int], None]) -> None:
        """As of `loop.Engine`; a lost process is replaced, and RunError names a block that loses TRIES of them."""
        if not shards:
            return
        plan = replace(mining.plan, folder=mining.plan.folder.absolute())
        tokens = mining.plan.shard_tokens
        workers = min(self.workers, len(shards))
        self._share_out(
            replace(mining, plan=plan, folder=mining.folder.absolute()),
            _blocks(shards, workers),
            workers,
            lambda block: tell(sum(tokens[shard] for shard in block)),
        )

    def read(self, reading: Job, layers: list[int], tell: Callable[[int], None]) -> None:
        """As of `loop.Engine` and `mine`. Where all processes are on the processor of this machine, the driver reads:
        it uses all cores by itself."""
        if self.address is None and reading.model.device.type == "cpu":
            reading.do(reading.file(0), layers, tell)
            return
        workers = min(self.workers, len(layers))
        self._share_out(reading, [[layer] for layer in layers], workers, lambda block: tell(len(block)))

    def _share_out(
        self, job: Job, blocks: Sequence[Sequence[int]], workers: int, tell: Callable[[Sequence[int]], None]
    ) -> None:
        """Have blocks done by so many processes; paths are such as other processes find."""
        with _connected(self._imported(), self.address) as ray:
            cpus = _cpus_each(
                [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]], workers
            )
            device = job.model.device
            gpus = 1 if device.type == "cuda" else 0
            actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Process)
            held = ray.put(_packed(job, ray.cloudpickle))

            def start() -> ActorHandle:
                return actor.remote(held, "cuda:0" if gpus else str(device), secrets.token_hex(4), cpus)

            _share_out(ray, start, (job.doing, job.piece), workers, blocks, tell)


def _packed(job: Job, pickling: Any = pickle) -> np.ndarray:
    """u8[byte]: a job for processes whose devices have other numbers. Pickled as it is, each tensor would be looked for
    on the device that it is on here."""
    content = io.BytesIO()
    torch.save(job, content, pickle_module=pickling)
    return np.frombuffer(content.getbuffer(), np.uint8)  # which processes of one machine read without a copy


def _unpacked(content: np.ndarray, device: str) -> Job:
    """A job with all of its tensors on a device; the bytes are those of the driver, as all that Ray passes."""
    job: Job = torch.load(io.BytesIO(content.data), map_location=device, weights_only=False)
    return job


class _Process:
    """What a process of the cluster holds. Its lock says to a later driver that it is still there."""

    def __init__(self, content: np.ndarray, device: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._job = _unpacked(content, device)
        lock = self._job.file(f"ray-{name}").with_suffix(".lock")
        self._held = locked(lock, self._job.folder.parent, _PATIENCE)
        self._held.__enter__()

    def do(self, block: Sequence[int]) -> None:
        """Do the pieces of a block, into files of that block."""
        file = self._job.file(f"{self._job.piece}s-{block[0]:07d}-{block[-1]:07d}")
        self._job.do(file, block, lambda _: None, checkpoint_seconds=inf)


def _share_out(
    ray: Any,
    start: Callable[[], ActorHandle],
    names: tuple[str, str],
    workers: int,
    blocks: Sequence[Sequence[int]],
    tell: Callable[[Sequence[int]], None],
) -> None:
    """Have every block done by some process; one that is lost is replaced by another.

    names  of what is done and of what a piece is, as of `Job`
    """
    doing, piece = names
    waiting, lost = deque(blocks), dict.fromkeys(map(tuple, blocks), 0)
    asked: dict[Any, tuple[ActorHandle, Sequence[int]]] = {}

    def ask(process: ActorHandle) -> None:
        if waiting:
            block = waiting.popleft()
            asked[process.do.remote(block)] = process, block

    for _ in range(min(workers, len(blocks))):
        ask(start())
    while asked:
        (answer,), _ = ray.wait(list(asked), num_returns=1)
        process, block = asked.pop(answer)
        try:
            ray.get(answer)
        except ray.exceptions.RayActorError as error:
            lost[tuple(block)] += 1
            if lost[tuple(block)] == TRIES:
                raise RunError(
                    f"{doing}: {TRIES} processes were lost on {piece}s {block[0]} to {block[-1]}, the last one so: "
                    f"{str(error).splitlines()[0]}; nothing finished is lost: run the same command again, with more "
                    "memory for each process"
                ) from error
            waiting.appendleft(block)
            ask(start())
        except ray.exceptions.RayTaskError as error:
            raise _own(error) from None
        else:
            tell(block)
            ask(process)


def _own(error: Any) -> Exception:
    """What a shard raised, as itself where it is one of ours."""
    cause = error.cause
    return cause if isinstance(cause, errors.MnemoscopeError) else error


def _blocks(shards: Sequence[int], workers: int) -> list[list[int]]:
    """Neighbours together, about as many for each block, and so many blocks for each process."""
    count = min(len(shards), _BLOCKS * workers)
    bounds = [place * len(shards) // count for place in range(count + 1)]
    return [list(shards[start:stop]) for start, stop in pairwise(bounds)]


def _cpus_each(machines: Sequence[int], workers: int) -> int:
    """Cores for each process: as many as let all of them find a place on these machines, and 1 if none do."""
    fitting = (
        each for each in range(max(machines, default=1), 0, -1) if sum(n // each for n in machines) >= workers
    )
    return next(fitting, 1)


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[Any]:
    """Ray with a cluster: the one that this process has already, or that of an address, or one that is started here and
    stopped again."""
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = "no cluster could be started here" if address is None else f"there is none at {address}"
        raise RunError(
            f"building a run on a cluster: {what} ({str(error).splitlines()[0]}); give {{address}} as `ray start` "
            "printed it, or auto",
            address=...,
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
