"""Who may ask, and what every answer says: below routing, for HTTP and WebSockets alike.

A page of another site can make a browser ask a server on this machine. It cannot read the answer, but it could make
the model work or write notes, and a host name that it points here could read. So a request is answered only under a
name of this machine, one that could change something only from a page of this server, and what a page of another site
loads inside itself not at all: a link there opens, a picture or a script there is refused. There are no cookies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from secrets import compare_digest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE = ("GET", "HEAD", "OPTIONS")
OURS = ("same-origin", "none")  # sites that browsers say who ask from here, or by hand
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


class _TooLarge(BaseException):  # never seen outside; an application that reads a body catches exceptions
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
        self._framed = frames != NOBODY
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
        said = _said(scope["headers"])
        host = said.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return HTTPStatus.BAD_REQUEST, (
                f"asking for the host {host!r}: this server answers to {', '.join(sorted(self.hosts))} only"
            )
        if self.prefix and not self._knows(scope["path"]):
            return HTTPStatus.NOT_FOUND, "the address lacks the word that was printed when the server began"
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if changes and not _from_here(said, host):
            return HTTPStatus.FORBIDDEN, "a page of another site asked for this; open the address yourself"
        if not changes and not self._opened(said):
            return (
                HTTPStatus.FORBIDDEN,
                "a page of another site has this inside it; open the address yourself",
            )
        length = said.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > MOST_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE
        return None

    def _opened(self, said: dict[str, str]) -> bool:
        """Whether a reader opened this: by a page from here, by hand, or by a link from anywhere, which leaves the page
        that has it; in a frame only where frames are allowed."""
        if said.get("sec-fetch-site", "none") in OURS:
            return True
        page = said.get("sec-fetch-dest") == "document" or self._framed
        return page and said.get("sec-fetch-mode") == "navigate"

    def _knows(self, path: str) -> bool:
        """Whether a path begins with the prefix; how long this takes does not tell how much of the word was right."""
        begins, rest = path[: len(self.prefix)], path[len(self.prefix) :]
        return compare_digest(begins.encode("utf-8", "replace"), self.prefix.encode()) and rest[:1] in (
            "",
            "/",
        )

    def _inside(self, scope: Scope) -> Scope:
        if not self.prefix:
            return scope
        path = scope["path"].removeprefix(self.prefix) or "/"
        return {**scope, "path": path, "raw_path": path.encode()}


def guarded(app: ASGIApp, secret: str, frames: str = NOBODY) -> Guard:
    """An application that answers to this machine alone, or to all who know the secret."""
    return Guard(app, None if secret else LOOPBACK, f"/{secret}" if secret else "", frames)


_TOO_LARGE = f"the request is longer than {MOST_BYTES:,} bytes; send less"


def _said(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name; one that comes twice says both, and then is neither a host nor a site that is known."""
    said: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        said[key] = f"{said[key]}, {text}" if key in said else text
    return said


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isascii() and port.isdigit() else host.lower()


def _from_here(said: dict[str, str], host: str) -> bool:
    site = said.get("sec-fetch-site")
    if site is not None:
        return site in OURS
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
