"""Fixtures that many tests share; shape and type annotations are checked while tests run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import atexit
import shutil
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

CHECKED = (  # every annotated module but those with compiled loops, which cannot be wrapped
    "mnemoscope.accumulate.memories",
    "mnemoscope.accumulate.reading",
    "mnemoscope.anatomy",
    "mnemoscope.capture",
    "mnemoscope.contributions",
    "mnemoscope.decompose",
    "mnemoscope.jobs.scene",
    "mnemoscope.jobs.study.crosslayer",
    "mnemoscope.jobs.study.points",
    "mnemoscope.jobs.study.reading",
    "mnemoscope.jobs.study.value_order",
    "mnemoscope.jobs.switched",
    "mnemoscope.lens",
    "mnemoscope.switching",
)

with install_import_hook(list(CHECKED), "beartype.beartype"):
    for name in CHECKED:
        import_module(name)

from hypothesis import HealthCheck, settings  # noqa: E402

import mnemoscope.api  # noqa: E402, F401 - hands results their views

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def _cache_of_this_session() -> None:
    """Give tests a cache folder of their own, in which only the samples are the user's: these are fetched once."""
    from mnemoscope import samples

    own, users = Path(tempfile.mkdtemp(prefix="mnemoscope-cache-")), samples.cache_folder()
    for name in ("models", "corpora"):
        (users / name).mkdir(parents=True, exist_ok=True)
    for place in users.iterdir():
        if place.name != "values":
            (own / place.name).symlink_to(place)
    os.environ["MNEMOSCOPE_CACHE"] = str(own)
    atexit.register(shutil.rmtree, own, ignore_errors=True)


_cache_of_this_session()


@pytest.fixture(scope="session")
def sample_model_folder() -> Path:
    """The converted sample model, fetched once for this machine."""
    from mnemoscope import samples

    return samples.model_folder()


@pytest.fixture(scope="session")
def sample_corpus_file() -> Path:
    """The sample text, fetched once for this machine."""
    from mnemoscope import samples

    return samples.corpus_file()


@pytest.fixture(scope="session")
def sample_model():
    """The sample model in fp32."""
    from mnemoscope import load_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model("sample:smollm2-135m", dtype="fp32")
