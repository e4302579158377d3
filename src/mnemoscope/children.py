"""Processes that this one starts: signals are for the one that started them, which ends them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import parent_process
from types import FrameType

_OURS = [
    getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)
]  # and not of those started
_LATER = [*_OURS, signal.SIGTERM]


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of processes, which then do not take Ctrl-C, nor that the terminal is gone: all that a terminal
    has started are told. What comes meanwhile is taken afterwards: a process of which half is started is lost."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    came: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {}  # another thread may take it, and then this one runs its handler
    if threading.current_thread() is threading.main_thread():
        handlers = {
            number: signal.signal(number, later) for number in _LATER if callable(signal.getsignal(number))
        }
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def follow() -> None:
    """In a process that was started: end with whoever started it, however that does."""
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def end(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool, whatever they are at."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(cancel_futures=True)
