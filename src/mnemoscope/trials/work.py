"""The folder of work in progress inside a run: what each stage made, so that an interrupted job goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from mnemoscope import files

_DOING = "testing patterns: writing"


@dataclass(frozen=True)
class WorkFolder:
    """A folder that goes when the run has its tables."""

    path: Path

    def start(self, identity: dict[str, Any]) -> None:
        """Start over when what lies here was begun on another run, or otherwise."""
        text, file = json.dumps(identity, indent=1, sort_keys=True), self.path / "identity.json"
        if file.exists() and file.read_text() == text:
            return
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        files.write(file, text, _DOING)

    def kept(self, name: str, make: Callable[[], pl.DataFrame] = pl.DataFrame) -> pl.DataFrame:
        """A frame that is made once and lies here from then on."""
        file = self.path / f"{name}.parquet"
        if not file.exists():
            frame = make()
            with files.replacing(file, _DOING) as partial:
                frame.write_parquet(partial)
        return pl.read_parquet(file, glob=False)
