"""Mnemoscope: the feed-forward memories of a transformer language model, mined, read and shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemoscope import errors as errors
    from mnemoscope.api import Run as Run
    from mnemoscope.api import annotated as annotated
    from mnemoscope.api import build as build
    from mnemoscope.api import build_part as build_part
    from mnemoscope.api import check as check
    from mnemoscope.api import compare as compare
    from mnemoscope.api import demo as demo
    from mnemoscope.api import explain as explain
    from mnemoscope.api import explain_many as explain_many
    from mnemoscope.api import families as families
    from mnemoscope.api import measurements as measurements
    from mnemoscope.api import merge as merge
    from mnemoscope.api import open_run as open_run
    from mnemoscope.api import plan as plan
    from mnemoscope.api import pull as pull
    from mnemoscope.api import push as push
    from mnemoscope.api import score as score
    from mnemoscope.api import serve as serve
    from mnemoscope.api import serve_folder as serve_folder
    from mnemoscope.api import site as site
    from mnemoscope.api import study as study
    from mnemoscope.api import trace as trace
    from mnemoscope.api import verify as verify
    from mnemoscope.api import write_graph as write_graph
    from mnemoscope.model.load import load_model as load_model
    from mnemoscope.model.model import Model as Model
    from mnemoscope.prediction.explanation import Explanation as Explanation
    from mnemoscope.records import NeuronId as NeuronId
    from mnemoscope.text import cache as cache
    from mnemoscope.text.corpus import Corpus as Corpus
    from mnemoscope.text.corpus import load_corpus as load_corpus

__all__ = [
    "Corpus",
    "Explanation",
    "Model",
    "NeuronId",
    "Run",
    "annotated",
    "build",
    "build_part",
    "cache",
    "check",
    "compare",
    "demo",
    "errors",
    "explain",
    "explain_many",
    "families",
    "load_corpus",
    "load_model",
    "measurements",
    "merge",
    "open_run",
    "plan",
    "pull",
    "push",
    "score",
    "serve",
    "serve_folder",
    "site",
    "study",
    "trace",
    "verify",
    "write_graph",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that reading a run never pays for torch.
    if name not in __all__:
        raise AttributeError(f"module 'mnemoscope' has no attribute {name!r}")
    from mnemoscope import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
