"""Run every bench, each in a process of its own, and print one JSON object a line."""

from __future__ import annotations

import subprocess
import sys

BENCHES = (
    "kernel",
    "values",
    "reading",
    "mining",
    "peers",
    "memory",
    "plan",
    "makespan",
    "explain",
    "ablation",
    "patterns",
    "atlas",
    "planted_truth",
)


def main() -> None:
    """Names on the command line choose; all by default."""
    wanted = [name for name in sys.argv[1:] if not name.startswith("-")] or list(BENCHES)
    failed = 0
    for name in wanted:
        failed |= subprocess.run([sys.executable, "-m", f"benches.{name}"], check=False).returncode
    sys.exit(failed)


if __name__ == "__main__":
    main()
