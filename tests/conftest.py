"""Fixtures that many tests share; shape and type annotations are checked while tests run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import atexit
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
from checked import checked
from effort import load_profile
from xdist.scheduler import WorkStealingScheduling

SOURCE = Path(__file__).parents[1] / "src" / "mnemoscope"
_COMPILED = ("_compiled", "njit")  # loops that numba compiles cannot be wrapped


def _annotated() -> list[str]:
    """Every module whose signatures name shapes, but those with compiled loops."""
    names = []
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "from jaxtyping import" in text and not any(f"@{word}" in text for word in _COMPILED):
            names.append(".".join(file.relative_to(SOURCE.parent).with_suffix("").parts))
    return names


def _import_checked() -> None:
    """Import these modules with the signatures of their functions checked, and the one that hands results views."""
    jaxtyping.jaxtyped = checked  # which is what the hook decorates with
    with jaxtyping.install_import_hook(_annotated(), "beartype.beartype"):
        for name in _annotated():
            import_module(name)
    import_module("mnemoscope.api")


def _cache_of_this_session() -> None:
    """Give tests a cache folder of their own, in which only the samples are the user's: these are fetched once."""
    from mnemoscope.text import samples

    own, users = Path(tempfile.mkdtemp(prefix="mnemoscope-cache-")), samples.cache_folder()
    for name in ("models", "corpora"):
        (users / name).mkdir(parents=True, exist_ok=True)
    for place in users.iterdir():
        if place.name not in ("values", "places"):
            (own / place.name).symlink_to(place)
    os.environ["MNEMOSCOPE_CACHE"] = str(own)
    atexit.register(shutil.rmtree, own, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Get a process ready that runs tests; one that only hands them out to others needs none of it."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    load_profile(quick="not slow" in config.option.markexpr)
    _import_checked()
    _cache_of_this_session()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WorkStealingScheduling | None:
    """Give each worker a run of neighbours: what the tests of a file share is then made by one of them."""
    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def sample_model_folder() -> Path:
    """The converted sample model, fetched once for this machine."""
    from mnemoscope.text import samples

    return samples.model_folder()


@pytest.fixture(scope="session")
def sample_corpus_file() -> Path:
    """The sample text, fetched once for this machine."""
    from mnemoscope.text import samples

    return samples.corpus_file()


@pytest.fixture(scope="session")
def sample_model():
    """The sample model in fp32."""
    from mnemoscope import load_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model("sample:smollm2-135m", dtype="fp32")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SimpleNamespace]:
    """An S3 server on loopback that counts what it sends; its `fails` says of each request whether it is refused, its
    `environment` where it is."""
    pytest.importorskip("s3fs")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    inner, told = (
        DomainDispatcherApplication(create_backend_app),
        SimpleNamespace(bytes=0, fails=lambda: False),
    )
    refusal = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"

    def wire(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if told.fails():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                "503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(refusal)))]
            )
            return [refusal]
        body = b"".join(inner(environ, start_response))
        told.bytes += len(body)
        return [body]

    listening = make_server("127.0.0.1", 0, wire, threaded=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    told.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listening.server_port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield told
    listening.shutdown()
    thread.join()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; tests that ask for it are skipped where there is none, but in CI."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium to look at pages with; apt-get install chromium")
        pytest.skip("there is no chromium to look at pages with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(SWITCHES))
        yield chromium
        chromium.close()
