"""A run as a folder of pages for any web server: no program answers, a script reads what a page needs.

    index.html, layers/7.html, study/glance.html ...   what the server answers, with links from file to file
    neuron.html?q=L7N3, search.html?q= Paris           are filled by static/folder.js
    cards/7.pack    the cards of layer 7 as the server shows them, a few at a time compressed together (gzip)
    cards/7.json    where each of these blocks begins
    tokens/         how tokens are spelled, and the neurons that promote each, in the same form
    site.json       how many neurons each layer has, and how many lie in a block

One neuron is one block of its layer's file, asked for by its range of bytes. From a server that knows no ranges the
whole file comes, and the page says so. A folder has its name only once everything in it is written.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import polars as pl
from fastapi import FastAPI

from mnemoscope import children, files
from mnemoscope.atlas import live
from mnemoscope.atlas.examples import MOST as EXAMPLES
from mnemoscope.atlas.examples import ExampleQuestion, examples
from mnemoscope.atlas.index import indexed
from mnemoscope.atlas.library import Library
from mnemoscope.atlas.pages import add_pages
from mnemoscope.atlas.site import Answer, Site, style
from mnemoscope.atlas.studies import HEADLINE, add_studies
from mnemoscope.errors import MnemoscopeError, RunError
from mnemoscope.location import Place
from mnemoscope.neuron.card import taken_signs
from mnemoscope.neuron.claims import ADDRESS, within
from mnemoscope.records import Progress
from mnemoscope.run.reading import open_run
from mnemoscope.views.page import Most

if TYPE_CHECKING:
    from mnemoscope.api.run import Run

BLOCK = 8  # cards that are compressed together
TOKENS = 64  # tokens whose neurons are
NEURONS = 40  # of each token
MOST = Most(examples=12, between=10, tokens=20)
WINDOW = (48, 16)  # tokens of text around an example
FILES = ("page.js", "tools.js", "folder.js", "atlas.css")
_DOING = "writing the site"
_TITLE = re.compile(r'(class="mn-term" popovertarget="[^"]*") title="[^"]*"')
_LINK = re.compile(r'(href|src|action|data-root|data-layer)="/(static/|runs/[^"/]+/?)([^"]*)"')


@dataclass(frozen=True)
class StaticSite:
    """A finished folder: how many files and bytes it has, and the bytes of its largest block of cards."""

    path: Path
    files: int
    bytes: int
    largest: int


def write(
    run: Run, out: str | Path, *, workers: int = 1, report: Callable[[Progress], None] | None = None
) -> StaticSite:
    """Write the reading pages of a run to a folder that is new or empty.

    workers  processes that write cards, a layer each

    `RunError` if it is neither, or cannot be written.
    """
    out = files.expanded(out).absolute()
    check(out)
    scratch = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    with files.refusals(f"{_DOING} {out}", "choose a folder that can be written to"):
        try:
            scratch.mkdir(parents=True)
            largest = _Folder(run, scratch, workers, report).fill()
            if out.exists():
                out.rmdir()  # refuses what was put there meanwhile
            scratch.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    return StaticSite(out, len(sizes), sum(sizes), largest)


def check(out: Path) -> None:
    """`RunError` if no site can be written there."""
    there = files.kind(out, _DOING)
    if there and (there != "folder" or any(out.iterdir())):
        raise RunError(f"{_DOING} {out}: there is something already; choose a new or an empty folder")
    files.check_folder(out, _DOING)


def linked(html: str, root: str) -> str:
    """A page of the server with the addresses that files of the folder have; root: "../" for each folder it lies in."""

    def address(match: re.Match[str]) -> str:
        attribute, place, path = match.groups()
        if place.startswith("static"):
            return f'{attribute}="{root}static/{path}"'
        if attribute == "data-root":
            return f'{attribute}="{root}"'
        kind, _, name = path.partition("/")
        if kind == "neurons":
            return f'{attribute}="{root}neuron.html?q={name}"'
        return (
            f'{attribute}="{root}{path or "index"}.html"'
            if "." not in path
            else f'{attribute}="{root}{path}"'
        )

    return _LINK.sub(address, html)


class _Folder:
    """One folder while it is written."""

    def __init__(
        self, run: Run, path: Path, workers: int = 1, report: Callable[[Progress], None] | None = None
    ) -> None:
        self.run, self.path, self.workers = run, path, workers
        self.report = report or (lambda step: None)
        self.site = Site(Library([run]), live.Desk(), served=False)
        (self.shelf,) = self.site.library.shelves.values()

    def fill(self) -> int:
        """Write everything; returns the size of the largest block of cards."""
        for name in ("static", "cards", "tokens", "layers", "study"):
            (self.path / name).mkdir()
        indexed(self.run, self.report)
        (self.path / "static" / "pages.css").write_text(style(), encoding="utf-8")
        for name in FILES:
            shutil.copy(Path(__file__).parent / "static" / name, self.path / "static" / name)
        self._pages()
        self._tokens()
        largest = self._cards()
        model = self.run.manifest.model
        about = {
            "layers": list(model.cells.sizes), "experts": list(model.experts), "block": BLOCK, "tokens": TOKENS
        }  # fmt: skip
        self._write("site.json", json.dumps(about))
        return largest

    def _pages(self) -> None:
        """The server's pages, as it answers them."""
        app = FastAPI()
        add_pages(app, self.site)
        add_studies(app, self.site)
        self.shelf.pictures, self.shelf.highlights  # noqa: B018 - so that the first page has them
        measured = [row["name"] for row in self.run.measurements() if row["state"] != "to measure"]
        names = [HEADLINE[0], *measured] if measured else []
        layers = range(len(self.run.manifest.model.cells.sizes))
        paths = ["", "study", *(f"study/{name}" for name in names), *(f"layers/{layer}" for layer in layers)]
        for number, path in enumerate(paths, start=1):
            status, html = _asked(app, f"{self.site.href(self.shelf)}/{path}".rstrip("/"))
            if status == 200:
                self._page(f"{path or 'index'}.html", html)
            elif path != f"study/{HEADLINE[0]}":
                raise RunError(f"{_DOING} {self.path}: the page {path} failed: {html[:200]}")
            self.report(Progress("pages", number, len(paths), "pages"))
        for name, lead in (("neuron", ""), ("search", self._chance())):
            shown = {
                "shelf": self.shelf,
                "section": name,
                "lead": lead,
                "page": name,
                "examples": self._examples(),
            }
            self._page(
                f"{name}.html", bytes(self.site.html(Answer("filled.html", dict, shown)).body).decode()
            )

    def _examples(self) -> list[ExampleQuestion]:
        """Examples of what the search of a folder finds: neurons by a token that they promote."""
        every = (examples("search", self.run, [card]) for card in self.shelf.highlights.cards)
        return [example for of_neuron in every for example in of_neuron if example.given["by"] == "promotes"][
            :EXAMPLES
        ]

    def _chance(self) -> str:
        """What the search for a token finds by chance, in the words of `Run.find`."""
        words = self.run.vocabulary
        for token in range(len(words)):
            with suppress(MnemoscopeError):
                spelled = words.pieces([token])[0]
                if not words.special[token] and words.ids(spelled) == [token]:
                    return self.run.find(promotes=spelled, count=1).null
        return ""

    def _cards(self) -> int:
        """Write the cards of every layer, several layers at a time; returns the size of the largest block."""
        layers, sizes = self.run.manifest.model.cells.layers, []
        if self.workers == 1:
            return max(map(self.layer, layers), default=0)
        with ProcessPoolExecutor(self.workers, get_context("spawn"), children.follow) as pool:
            places = self.run.place, self.run.path, self.path
            with children.starting():
                jobs = [pool.submit(_layer, type(self.run), *places, layer) for layer in layers]
            try:
                for job in as_completed(jobs):
                    sizes.append(job.result())
                    self.report(Progress("cards", len(sizes), len(jobs), "layers"))
            except BaseException:
                children.end(pool)
                raise
        return max(sizes, default=0)

    def layer(self, layer: int) -> int:
        """Write the cards of a layer; returns the size of the largest block."""
        size, largest = self.run.manifest.model.cells.sizes[layer], 0
        with _Pack(self.path / "cards" / str(layer)) as pack:
            for first in range(0, size, BLOCK):
                neurons = range(first, min(first + BLOCK, size))
                largest = max(largest, pack.add([self._card(layer, neuron) for neuron in neurons]))
                self.report(Progress(f"cards of layer {layer}", neurons.stop, size, "neurons"))
        return largest

    def _card(self, layer: int, neuron: int) -> str:
        card = self.run.neuron(layer, neuron, examples=MOST.examples, window=WINDOW)
        html = self.site.part("card_part.html", card=card, most=MOST, shelf=self.shelf)
        return _TITLE.sub(
            r"\1", linked(html, "")
        )  # the page has these sentences, and its script puts them there

    def _tokens(self) -> None:
        """How tokens are spelled, in one block; and of so many tokens each the neurons that promote them."""
        words, size = self.run.vocabulary, self.run.manifest.model.vocabulary
        with _Pack(self.path / "tokens" / "names") as pack:
            pack.add(words.pieces(list(range(size))))
        rows = self._promoting()
        with _Pack(self.path / "tokens" / "promotes") as pack:
            for first in range(0, size, TOKENS):
                pack.add([rows.get(token, [0]) for token in range(first, min(first + TOKENS, size))])

    def _promoting(self) -> dict[int, list[Any]]:
        """Of each token how many lists have it, and the first: address, sign, usual, rank, logit; in `find`'s order."""
        cells, parts = self.run.manifest.model.cells, []
        for layer in cells.layers:
            signs = taken_signs(self.run, layer).with_columns(polarity="sign").collect()
            values = (
                within(self.run, "values", layer)
                .select(*ADDRESS, "polarity", "rank", "token", "logit")
                .collect()
            )
            parts.append(
                values.join(signs, on=[*ADDRESS, "polarity"]).with_columns(pl.col("logit") * pl.col("sign"))
            )
        order = ["token", "rank", "logit", *ADDRESS]
        rows = pl.concat(parts).sort(order, descending=[False, False, True, False, False])
        counts = rows.group_by("token").len()
        first = rows.group_by("token", maintain_order=True).head(NEURONS)
        lists: dict[int, list[Any]] = {token: [count] for token, count in counts.iter_rows()}
        columns = ["token", *ADDRESS, "sign", "usual", "rank", "logit"]
        for token, layer, neuron, sign, usual, rank, logit in first.select(columns).iter_rows():
            lists[token].append([str(cells.id(layer, neuron)), sign, usual, rank, round(logit, 3)])
        return lists

    def _page(self, path: str, html: str) -> None:
        self._write(path, linked(html, "../" * path.count("/")))

    def _write(self, path: str, text: str) -> None:
        (self.path / path).write_text(text, encoding="utf-8")


def _layer(kind: type[Run], run: Place, named: Place, path: Path, layer: int) -> int:
    """What a worker does: the cards of one layer."""
    opened = kind.of(open_run(run, named))
    indexed(opened)
    return _Folder(opened, path).layer(layer)


class _Pack:
    """Blocks of JSON, each compressed by itself, in one file; beside it where they begin."""

    def __init__(self, path: Path) -> None:
        self.path, self.begins = path, [0]
        self._file = path.with_suffix(".pack").open("wb")

    def __enter__(self) -> _Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path.with_suffix(".json").write_text(json.dumps(self.begins), encoding="utf-8")

    def add(self, block: list[Any]) -> int:
        """Write one more; returns its size in bytes."""
        size = self._file.write(
            gzip.compress(json.dumps(block, ensure_ascii=False).encode("utf-8", "replace"), mtime=0)
        )
        self.begins.append(self.begins[-1] + size)
        return size


def _asked(app: FastAPI, path: str) -> tuple[int, str]:
    """Status and text of a page, asked for in a thread: whoever writes a site may be in a loop of events, as a notebook
    is."""
    with ThreadPoolExecutor(1) as asker:
        return asker.submit(lambda: asyncio.run(_answer(app, path))).result()


async def _answer(app: FastAPI, path: str) -> tuple[int, str]:
    """Status and text of what an application answers, asked without a network."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [], "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 0), "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()
