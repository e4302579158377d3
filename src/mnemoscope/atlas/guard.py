"""Who may ask, and what every answer says: below routing, for HTTP and WebSockets alike.

A page of another site can make a browser ask a server on this machine. It cannot read the answer, but it could make
the model work or write notes, and a host name that it points here could read. So a request is answered only under a
name of this machine, and one that could change something only from a page of this server. There are no cookies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE = ("GET", "HEAD", "OPTIONS")
MOST_BYTES = 8 << 20  # of a request's body: a sheet of annotations has one or two million
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors "
)
NOBODY = "'none'"  # may put a page into one of its own
NOTEBOOKS = "http://127.0.0.1:* http://localhost:* vscode-webview:"  # of this machine
HEADERS = {
    "content-security-policy": POLICY + NOBODY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class _TooLarge(Exception):  # noqa: N818 - never seen outside
    pass


class Guard:
    """ASGI: refuses what is not from here, and puts the headers of safety on every answer.

    hosts  names under which the server may be asked, without a port; None for any (then `prefix` is the secret)
    prefix what every path begins with; another path is not there. Empty, or "/" and a random word
    frames whose pages may show ours inside: `NOBODY`, or `NOTEBOOKS`
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str] | None = LOOPBACK, prefix: str = "", frames: str = NOBODY
    ) -> None:
        self.app, self.prefix = app, prefix
        self._headers = HEADERS | {"content-security-policy": POLICY + frames}
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": _with_headers(message.get("headers", []), self._headers)}
            await send(message)

        try:
            await self.app(self._inside(scope), _limited(receive), sent)
        except _TooLarge:
            if begun:
                raise
            await _refuse(scope, send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE)

    def refusal(self, scope: Scope) -> tuple[HTTPStatus, str] | None:
        """Why a request is not answered, or None."""
        said = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = said.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return HTTPStatus.BAD_REQUEST, (
                f"asking for the host {host!r}: this server answers to {', '.join(sorted(self.hosts))} only"
            )
        path = scope["path"]
        if self.prefix and path != self.prefix and not path.startswith(f"{self.prefix}/"):
            return HTTPStatus.NOT_FOUND, "the address lacks the word that was printed when the server began"
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if changes and not _from_here(said, host):
            return HTTPStatus.FORBIDDEN, "a page of another site asked for this; open the address yourself"
        length = said.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > MOST_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE
        return None

    def _inside(self, scope: Scope) -> Scope:
        if not self.prefix:
            return scope
        path = scope["path"].removeprefix(self.prefix) or "/"
        return {**scope, "path": path, "raw_path": path.encode()}


def guarded(app: ASGIApp, secret: str, frames: str = NOBODY) -> Guard:
    """An application that answers to this machine alone, or to all who know the secret."""
    return Guard(app, None if secret else LOOPBACK, f"/{secret}" if secret else "", frames)


_TOO_LARGE = f"the request is longer than {MOST_BYTES:,} bytes; send less"


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isascii() and port.isdigit() else host.lower()


def _from_here(said: dict[str, str], host: str) -> bool:
    site = said.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = said.get("origin")
    return origin is None or origin.partition("://")[2] == host


def _with_headers(
    headers: Iterable[tuple[bytes, bytes]], of_safety: Mapping[str, str] = HEADERS
) -> list[tuple[bytes, bytes]]:
    own = {name.encode(): value.encode() for name, value in of_safety.items()}
    return [(name, value) for name, value in headers if name.lower() not in own] + list(own.items())


def _limited(receive: Receive) -> Receive:
    count = 0

    async def received() -> Message:
        nonlocal count
        message: Any = await receive()
        if message["type"] == "http.request":
            count += len(message.get("body", b""))
            if count > MOST_BYTES:
                raise _TooLarge
        return message

    return received


async def _refuse(scope: Scope, send: Send, status: HTTPStatus, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason[:120]})
        return
    headers = _with_headers([(b"content-type", b"text/plain; charset=utf-8")])
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
