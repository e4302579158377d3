"""What this process holds of the machine's memory, and how much more there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def status(name: str) -> int | None:
    """Bytes of a line of what the kernel knows of this process; None where there is no such kernel."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
    return None


def high() -> int:
    """The most bytes that this process has held."""
    if (known := status("VmHWM")) is not None:
        return known
    with suppress(ImportError):
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0


def resident() -> int:
    """The bytes that it holds now."""
    return status("VmRSS") or high()


@contextmanager
def growth() -> Iterator[list[int]]:
    """How many bytes more than at its beginning the block holds at most; where it cannot be told, more than ever."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the most that was held
    before, grown = resident(), [0]
    try:
        yield grown
    finally:
        grown[0] = max(0, high() - before)


def available() -> int | None:
    """Bytes that processes may take; None where that is not known."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
        with suppress(OSError, ValueError):  # of a container or a job of a queue
            held, most = (int((_GROUP / name).read_text()) for name in ("memory.current", "memory.max"))
            free = min(free, most - held)
        return free
    return None
