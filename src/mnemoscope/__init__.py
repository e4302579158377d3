"""Mnemoscope: the feed-forward memories of a transformer language model, mined, read and shown."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemoscope.corpus import Corpus as Corpus
    from mnemoscope.corpus import load_corpus as load_corpus
    from mnemoscope.explanation import Explanation as Explanation
    from mnemoscope.jobs.build import build as build
    from mnemoscope.jobs.explain import explain as explain
    from mnemoscope.jobs.study.run import study as study
    from mnemoscope.models import Model as Model
    from mnemoscope.models import load_model as load_model
    from mnemoscope.records import NeuronId as NeuronId
    from mnemoscope.store import Run as Run
    from mnemoscope.store import open_run as open_run

# Names are imported on first use, so that reading a run never pays for torch.
_HOME = {
    "Corpus": "mnemoscope.corpus",
    "load_corpus": "mnemoscope.corpus",
    "Model": "mnemoscope.models",
    "load_model": "mnemoscope.models",
    "NeuronId": "mnemoscope.records",
    "Run": "mnemoscope.store",
    "open_run": "mnemoscope.store",
    "build": "mnemoscope.jobs.build",
    "explain": "mnemoscope.jobs.explain",
    "study": "mnemoscope.jobs.study.run",
    "Explanation": "mnemoscope.explanation",
    "errors": "mnemoscope.errors",
}

__all__ = [*_HOME]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mnemoscope' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if module.__name__ == f"mnemoscope.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
