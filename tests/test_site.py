"""A run as a folder of pages: the server's pages, linked among themselves, and every card as the server shows it."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from loops import awaited
from starlette.testclient import TestClient
from synthetic import make_run
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope.atlas import folder
from mnemoscope.atlas.app import create
from mnemoscope.cli import app
from mnemoscope.errors import RunError

HERE = "http://127.0.0.1:8321"
_ARTICLE = re.compile(r"<article.*?</article>", re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose text and titles hold HTML."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "a run", neurons=19, hostile=True).path)


@pytest.fixture(scope="module")
def site(run: mn.Run, tmp_path_factory: pytest.TempPathFactory) -> folder.StaticSite:
    """It as a folder."""
    return mn.site(run, tmp_path_factory.mktemp("sites") / "site")


def _blocks(site: folder.StaticSite, name: str) -> list[Any]:
    begins = json.loads((site.path / f"{name}.json").read_text())
    packed = (site.path / f"{name}.pack").read_bytes()
    assert begins[-1] == len(packed)
    return [json.loads(gzip.decompress(packed[a:b])) for a, b in pairwise(begins)]


def test_every_neuron_has_the_card_that_the_server_shows(
    run: mn.Run, site: folder.StaticSite, monkeypatch: Any
) -> None:
    """With as many triggers, and links from card to card."""
    monkeypatch.setattr(
        "mnemoscope.api.run.Run.neuron.__kwdefaults__", {"examples": 50, "window": folder.WINDOW}
    )
    client = TestClient(create([run]), base_url=HERE)
    for layer in range(3):
        cards = [card for block in _blocks(site, f"cards/{layer}") for card in block]
        assert len(cards) == 19
        for neuron in (0, 2, 7, 18):
            page = client.get(f"/runs/a-run/neurons/L{layer}N{neuron}?triggers={folder.MOST.examples}").text
            (shown,), (kept,) = _ARTICLE.findall(page), _ARTICLE.findall(cards[neuron])
            bare = re.sub(r'(class="mn-term"[^>]*?) title="[^"]*"', r"\1", shown)  # a script puts it there
            bare = re.sub(r'<a class="source" href="[^"]*"(.*?)</a>', r'<span class="source"\1</span>', bare)
            assert kept == bare.replace("/runs/a-run/neurons/", "neuron.html?q=")
            assert f'id="L{layer}N{neuron}"' in kept


def test_it_is_written_from_a_notebook_too(run: mn.Run, tmp_path: Path) -> None:
    """A notebook runs its cells in a loop of events, in which no other can be begun."""

    async def cell() -> folder.StaticSite:
        return mn.site(run, tmp_path / "site")

    assert (awaited(cell()).path / "index.html").exists()


def test_links_lead_to_files_and_nothing_is_from_elsewhere(site: folder.StaticSite) -> None:
    """Of every page and every card; scripts and styles are files of the folder."""
    pages = {str(file.relative_to(site.path)): file.read_text() for file in site.path.rglob("*.html")}
    pages |= {
        f"card-{number}": card
        for layer in range(3)
        for block in _blocks(site, f"cards/{layer}")
        for number, card in enumerate(block)
    }
    assert {"index.html", "neuron.html", "search.html", "layers/2.html", "study.html"} <= pages.keys()
    for name, text in pages.items():
        for target in re.findall(r'(?:href|src|action|data-layer)="([^"]*)"', text):
            if target.startswith(("#", "data:")):
                continue
            file = (site.path / name).parent / unquote(target.partition("?")[0].partition("#")[0])
            assert file.is_file(), (name, target)
        assert not re.search(r'(?:href|src|action)="(?:[a-z]+:)?//', text), name
        assert "<style" not in text and " style=" not in text and " onclick" not in text
    for file in (site.path / "static").iterdir():
        assert not re.search(r"https?://", file.read_text()), file


def test_tokens_lead_to_the_neurons_that_promote_them(run: mn.Run, site: folder.StaticSite) -> None:
    """In the order of the search, with as many in all."""
    ((names),) = _blocks(site, "tokens/names")
    rows = [row for block in _blocks(site, "tokens/promotes") for row in block]
    assert len(names) == len(rows) == run.manifest.model.vocabulary
    for text in (" capital", " Paris", "café"):
        for token in run.vocabulary.ids(text):
            hits = run.find(promotes=text, count=folder.NEURONS)
            assert names[token] == text and rows[token][0] == hits.total > 0
            columns = hits.rows.select("neuron", "sign", "usual", "rank").rows()
            assert [
                (name, "+" if sign > 0 else "-", usual, rank)
                for name, sign, usual, rank, _ in rows[token][1:]
            ] == columns


def test_what_is_there_is_not_written_over(run: mn.Run, site: folder.StaticSite, tmp_path: Path) -> None:
    """In one line, before any work."""
    (tmp_path / "file").write_text("mine")
    for taken in (site.path, tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="choose a new or an empty folder"):
            mn.site(run, taken)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_what_stops_leaves_no_folder(run: mn.Run, tmp_path: Path) -> None:
    """Neither under its name nor beside it."""

    def stop(step: Any) -> None:
        if step.stage == "cards of layer 1" and step.done > 8:
            raise KeyboardInterrupt

    (tmp_path / "site").mkdir()
    with pytest.raises(KeyboardInterrupt):
        mn.site(run, tmp_path / "site", report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["site"] and not list((tmp_path / "site").iterdir())


def test_the_command_says_how_large_it_is(run: mn.Run, tmp_path: Path) -> None:
    """In words or as JSON; the largest block is what one neuron takes."""
    said = CliRunner().invoke(app, ["site", str(run.path), "-o", str(tmp_path / "site"), "--json"])
    assert said.exit_code == 0, said.stderr
    sizes = json.loads(said.stdout)
    files = [file.stat().st_size for file in (tmp_path / "site").rglob("*") if file.is_file()]
    assert (sizes["files"], sizes["bytes"]) == (len(files), sum(files))
    assert 0 < sizes["largest"] < 200_000
    said = CliRunner().invoke(app, ["site", str(run.path), "-o", str(tmp_path / "again")])
    assert "files" in said.stderr and "serve --static" in said.stderr


def test_a_folder_without_a_site_is_not_served(tmp_path: Path) -> None:
    """The line says how to write one."""
    with pytest.raises(RunError, match="mnemoscope site"):
        mn.serve_folder(tmp_path)


@pytest.mark.slow  # processes are started
def test_several_workers_write_the_same(run: mn.Run, site: folder.StaticSite, tmp_path: Path) -> None:
    """Byte for byte."""
    two = mn.site(run, tmp_path / "site", workers=2)
    files = [file.relative_to(site.path) for file in site.path.rglob("*") if file.is_file()]
    assert two.largest == site.largest and two.files == len(files)
    for file in files:
        if file.parts[0] in ("cards", "tokens", "layers", "static"):
            assert (two.path / file).read_bytes() == (site.path / file).read_bytes(), file


class _Seen:
    """What a page of a browser asked for: how many requests and bytes; what went wrong or went elsewhere."""

    def __init__(self, page: Any, address: str) -> None:
        self.requests, self.bytes, self.wrong = 0, 0, list[str]()
        page.on("requestfinished", self._finished)
        page.on(
            "request",
            lambda request: (
                self.wrong.append(request.url) if not request.url.startswith((address, "data:")) else None
            ),
        )
        page.on("console", lambda line: self.wrong.append(line.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))

    def _finished(self, request: Any) -> None:
        if not request.url.startswith("data:"):
            self.requests += 1
            self.bytes += request.sizes()["responseBodySize"]


@contextmanager
def _serving(command: list[str], line: str) -> Iterator[str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        port = re.search(line, said)
        assert port, said
        yield f"http://127.0.0.1:{port[1]}/"
        process.terminate()


@pytest.mark.slow  # a browser is started
@pytest.mark.parametrize("ranges", [True, False])
def test_a_neuron_is_read_from_any_server(
    browser: Any, run: mn.Run, site: folder.StaticSite, ranges: bool
) -> None:
    """By its range; where there are none the page says why it is slower. Next, previous, its layer, search by token."""
    python, place = sys.executable, str(site.path)
    plain = [python, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", place]
    served = [python, "-m", "mnemoscope", "serve", "--static", place, "--port", "0"]
    command, line = (served, r":(\d+)/") if ranges else (plain, r"port (\d+)")
    with _serving(command, line) as address:
        page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
        seen = _Seen(page, address)
        page.goto(f"{address}neuron.html?q=L1N3")
        page.wait_for_selector(".mn-card")
        page.wait_for_load_state("networkidle")
        assert seen.requests <= 30 and (seen.bytes <= 200_000 or not ranges)
        told = page.locator(".told").text_content()
        assert bool(told) != ranges and (ranges or "sends whole files" in told)
        text = page.locator(".mn-card").inner_text()
        assert run.neuron("L1N3").positive.examples[0].active in text
        assert page.locator("[data-style]").count() == 0
        assert "tails" in page.get_by_role("button", name="excess kurtosis").first.get_attribute("title")
        for key, name in (("j", "L1N4"), ("k", "L1N3")):
            page.keyboard.press(key)
            page.wait_for_url(f"**q={name}")
            page.wait_for_selector(f"#{name}")
        page.locator(".around a").last.click()
        page.wait_for_url("**q=L1N4")
        page.wait_for_selector("#L1N4")
        page.keyboard.press("g")
        page.keyboard.press("l")
        page.wait_for_url("**/layers/1.html")
        page.keyboard.press("k")
        page.wait_for_url("**/layers/0.html")
        page.locator(".go input").fill(" capital")
        page.locator(".go input").press("Enter")
        page.wait_for_url("**/search.html?q=%20capital")
        page.wait_for_selector("tbody a.neuron")
        names = run.find(promotes=" capital", count=folder.NEURONS).rows["neuron"].to_list()
        assert page.locator("tbody a.neuron").all_text_contents() == names
        page.locator("tbody a.neuron").first.click()
        page.wait_for_selector(f"#{names[0]}")
        page.goto(f"{address}neuron.html?q=L9N9")
        page.wait_for_function("document.querySelector('.told').textContent.includes('layers 0 to 2')")
        for name in ("index.html", "study.html"):
            page.goto(f"{address}{name}")
            assert page.locator("h1").first.is_visible()
        assert not seen.wrong, seen.wrong
        page.context.close()
