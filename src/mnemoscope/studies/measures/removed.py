"""Triggers without one of their tokens, as a measurement of the study (A9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa

from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.studies.measures.positions import Sizes
from mnemoscope.studies.measures.removal import removal

_SHARE = 20  # sampled positions for each sampled document: 200 documents in a study of full size


def measure(
    run: Run, model: Model, sizes: Sizes, folder: Path, report: Callable[[Progress], None]
) -> Mapping[str, list[pa.Table]]:
    """The table `removal`."""
    documents = max(10, sizes.positions // _SHARE)
    rows = removal(run, model, documents=documents, seed=sizes.seed, report=report)
    return {"removal": [rows.to_arrow()]}
