"""Runs, and folders made of them, served to a browser until Ctrl-C."""

from __future__ import annotations

import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mnemoscope import files
from mnemoscope.arguments import check_least
from mnemoscope.errors import RunError

if TYPE_CHECKING:
    from types import FrameType

    import uvicorn

    from mnemoscope.api.run import Run
    from mnemoscope.atlas.folder import StaticSite
    from mnemoscope.atlas.guard import Guard
    from mnemoscope.display import Report

PORT = 8321
LOOPBACK = "127.0.0.1"
_OURS = (LOOPBACK, "localhost", "::1")
FRAME = 760  # pixels that a page has in a notebook
_NEAR = 20  # ports that are tried after the usual one


def serve(
    runs: Sequence[Run],
    model: str | None = None,
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    annotations: str | Path | None = None,
    workers: int = 1,
    ready: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> None:
    """Serve runs until the process is interrupted.

    model        where to load models from, if not from where each run's came
    host         to listen at; where others than this machine can reach it, every address holds a random word
    port         0 for any that is free; if the usual one is taken, the next that is free
    annotations  folder for what is written in the browser, made if need be; else each run's own neighbour
    workers      processes that make pages, for many readers at once; the pages are the same for any number
    ready        is told the address
    report       is told how far the indices are that searches need

    `RunError` if what a server needs is not installed, or nothing can listen there.
    """
    with _installed("serving a run", "web"):
        from mnemoscope.atlas.app import create
    folder = None if annotations is None else files.expanded(annotations)
    if folder is not None:
        files.check_folder(folder, "keeping annotations in")
        folder.mkdir(parents=True, exist_ok=True)
    check_least("serving a run", 1, workers=workers)
    _serve(
        lambda secret: create(runs, model, secret, folder, report=report, workers=workers), host, port, ready
    )


def serve_folder(
    folder: str | Path,
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a folder of pages (`atlas.folder`) until the process is interrupted; options and errors as of `serve`."""
    folder = files.expanded(folder)
    if not (folder / "site.json").is_file():
        raise RunError(
            f"serving the folder {folder}: it holds no site; write one with `mnemoscope site RUN -o {folder}`"
        )
    with _installed("serving a folder", "web"):
        from starlette.applications import Starlette
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles

        from mnemoscope.atlas.guard import guarded
    pages = Starlette(routes=[Mount("/", StaticFiles(directory=folder, html=True))])
    _serve(lambda secret: guarded(pages, secret), host, port, ready)


def writer() -> Callable[..., StaticSite]:
    """What writes such a folder; `RunError` if what it needs is not installed."""
    with _installed("writing a site", "web"):
        from mnemoscope.atlas.folder import write
    return write


def _serve(
    application: Callable[[str], Guard], host: str, port: int, ready: Callable[[str], None] | None
) -> None:
    """Answer with an application, which is told the secret that addresses begin with, until Ctrl-C."""
    with _installed("serving", "web"):
        import uvicorn
    secret = "" if host in _OURS else secrets.token_urlsafe(16)
    answering = application(secret)
    with _listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        if ready:
            ready("/".join((f"http://{name}:{listener.getsockname()[1]}", *([secret] if secret else ()), "")))
        config = uvicorn.Config(answering, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with _hanging_up(server):
            server.run(sockets=[listener])


@contextmanager
def _hanging_up(server: uvicorn.Server) -> Iterator[None]:
    """End a server as Ctrl-C does where its terminal goes, of which uvicorn knows nothing; the signal is raised again
    when it has ended."""
    number = getattr(signal, "SIGHUP", None)
    here = threading.current_thread() is threading.main_thread()
    if number is None or not here or signal.getsignal(number) is signal.SIG_IGN:  # on Windows, under nohup
        yield
        return
    came = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        server.should_exit = True

    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)
        for each in came[:1]:
            signal.raise_signal(each)


@dataclass(frozen=True)
class Atlas:
    """A page of a run that a thread of this process serves to this machine; a notebook shows it as a frame.

    address  of the page
    """

    address: str
    server: uvicorn.Server = field(repr=False)

    def at(self, *path: str) -> Atlas:
        """A page below this one."""
        return replace(self, address="/".join((self.address, *path)))

    def close(self) -> None:
        """Serve no more, this page and any other of the run."""
        self.server.should_exit = True

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{self.address}" title="atlas" width="100%" height="{FRAME}" style="border: 1px solid #8884">'
            f'</iframe><br><a href="{self.address}" target="_blank" rel="noopener">{self.address}</a>'
        )


def in_thread(run: Run, model: str | None = None) -> Atlas:
    """Serve a run from a thread of this process, to pages of notebooks of this machine too.

    `RunError` if what a server needs is not installed.
    """
    with _installed("serving a run", "web"):
        import uvicorn

        from mnemoscope.atlas.app import create
    from mnemoscope.atlas.guard import NOTEBOOKS
    from mnemoscope.atlas.library import Library

    application = create([run], model, frames=NOTEBOOKS)
    listener = _listening(LOOPBACK, 0)
    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    sockets = {"sockets": [listener]}
    threading.Thread(target=server.run, kwargs=sockets, name="atlas", daemon=True).start()
    name = next(iter(Library([run]).shelves))
    return Atlas(f"http://{LOOPBACK}:{listener.getsockname()[1]}/runs/{name}", server)


def assist(run: Run, model: str | None = None) -> None:
    """Answer an assistant over standard input and output, until that ends; see `assistant.create`.

    `RunError` if what it needs is not installed.
    """
    with _installed("answering an assistant", "mcp"):
        from mnemoscope.atlas.assistant import create
    create(run, model).run("stdio")


@contextmanager
def _installed(doing: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RunError(
            f"{doing}: {error.name} is not installed; install it with: pip install 'mnemoscope[{extra}]'"
        ) from error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem = OSError()
    for wanted in range(port, port + (_NEAR if port == PORT else 1)):
        # asyncio sends what is small at once only through sockets that name their protocol; through others, a page
        # that comes in two pieces waits for the reader's delayed acknowledgement, 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, wanted))
            listener.listen()  # at once: whoever is told the address may ask
            return listener
        except OSError as error:
            listener.close()
            problem = error
    raise RunError(
        f"serving a run at {host}, port {port}: {problem.strerror or problem}; give another port or host"
    )
