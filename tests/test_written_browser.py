"""Writing in a browser: a blinded sheet filled in by keys, by several people, through reloads; notes on neurons."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright
from synthetic import make_run
from test_atlas_browser import LOOKS, Reader, Server, axe

import mnemoscope as mn

__all__ = ["axe"]
pytestmark = pytest.mark.slow  # a browser is started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose text and titles are full of markup."""
    folder = tmp_path_factory.mktemp("runs") / "written"
    return mn.open_run(make_run(folder, documents=120, top=24, neurons=40).path)


@pytest.fixture
def address(run: mn.Run, tmp_path: Path) -> Iterator[str]:
    """Where it is served, with nothing written about it."""
    server = Server(mn.open_run(shutil.copytree(run.path, tmp_path / "written")))
    yield server.address
    server.close()


def begin(reader: Reader, annotator: str) -> Any:
    """Type a name, and come to the first item."""
    page = reader.open("/runs/written/annotate")
    page.locator("input[name=annotator]").fill(annotator)
    page.keyboard.press("Enter")
    page.wait_for_selector("form.sheet input:focus")
    return page


def make(reader: Reader) -> None:
    """Draw a small sheet."""
    page = reader.open("/runs/written/annotate")
    page.locator("input[name=neurons]").fill("12")
    page.locator("input[name=prefixes]").fill("8")
    page.get_by_role("button", name="draw one").click()
    page.wait_for_selector(".kept")


def saved(page: Any, form: str = ".patterns") -> None:
    """Wait until the page says so."""
    page.locator(f"{form} output:text-is('saved')").wait_for()


def describe(page: Any, words: str, marks: int = 3) -> None:
    """A pattern by keys: its words, and its first texts."""
    page.keyboard.press("a")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    for _ in range(marks):
        page.keyboard.press("Space")
        page.keyboard.press("ArrowDown")
    saved(page)


def number(page: Any) -> int:
    """Of the item that is shown."""
    return int(re.findall(r"\d+", page.locator("h1").text_content())[0])


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_three_items_by_keys_and_their_score(
    browser: Any, address: str, axe: str, width: int, scheme: str
) -> None:
    """Nothing but keys from the name to the score; each page can be read by everyone."""

    def check(page: Any) -> None:
        page.evaluate(axe)
        problems = page.evaluate(
            "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
        )
        assert problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    with Reader(browser, address, width, scheme) as reader:
        check(reader.open("/runs/written/annotate"))
        make(reader)
        check(reader.page)
        page = begin(reader, "Anna <b>K.</b>")
        for item in (1, 2):
            assert number(page) == item
            describe(page, "the same end")
            page.keyboard.press("t")
            check(page)
            page.keyboard.press("Enter")
            page.wait_for_url("**half=apply")
            page.wait_for_selector("form.sheet input:focus")
            assert page.locator(".patterns li").text_content() == "the same end semantic"
            assert page.locator(".prefixes li").count() == 16
            page.keyboard.press("Space")
            check(page)
            page.keyboard.press("Enter")
            page.wait_for_url(f"**item={item + 1}")
            page.wait_for_selector("form.sheet input:focus")
        page.keyboard.press("0")
        page.wait_for_url("**item=4")
        page.keyboard.press("?")
        assert "nothing in common" in page.locator("dialog.keys").text_content()
        check(page)
        page.keyboard.press("Escape")
        page = reader.open("/runs/written/annotate/scores")
        assert "3 of 17 finished" in page.locator("main").text_content()
        assert page.locator(".mn-scores").count() == 0
        page.keyboard.press("Tab")
        page.locator("main input[type=checkbox]").focus()
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(".mn-scores")
        assert "with 14 items not finished" in page.locator("main").text_content()
        assert "hidden null items" in page.locator(".mn-scores").text_content()
        check(page)
        page = reader.open("/runs/written/annotate?annotator=Anna+%3Cb%3EK.%3C/b%3E&item=1")
        assert page.locator("form.sheet input").first.is_disabled()
        check(page)


def test_two_people_at_once(browser: Any, address: str) -> None:
    """Each sees items in an own order and own answers only."""
    with Reader(browser, address) as first, Reader(browser, address) as second:
        make(first)
        anna, ben = begin(first, "anna"), begin(second, "ben")

        def read(page: Any, name: str) -> list[str]:
            texts = []
            for item in (3, 2, 1):  # one may be the same by chance
                page.goto(f"{address}/runs/written/annotate?annotator={name}&item={item}")
                texts.append(page.locator(".prefixes").text_content())
            return texts

        assert read(anna, "anna") != read(ben, "ben")
        describe(anna, "rivers")
        describe(ben, "songs", 2)
        anna.reload()
        ben.reload()
        assert anna.locator(".description").input_value() == "rivers"
        assert ben.locator(".description").input_value() == "songs"
        assert ben.locator(".prefixes input:checked").count() == 2
        ben.keyboard.press("Enter")
        ben.wait_for_selector("output[data-wrong]")
        assert "a pattern needs 3" in ben.locator(".patterns output").text_content()
        overview = first.open("/runs/written/annotate").locator("table").text_content()
        assert "anna" in overview and "ben" in overview


def test_leaving_in_the_middle_loses_nothing(browser: Any, address: str) -> None:
    """By another item's key, by the way back, and by a reload right after a letter was typed."""
    with Reader(browser, address) as reader:
        make(reader)
        page = begin(reader, "anna")
        describe(page, "rivers")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        page.keyboard.press("j")
        page.wait_for_url("**item=2")
        page.keyboard.press("k")
        page.wait_for_url("**item=1")
        playwright.expect(page.locator(".prefixes input:checked")).to_have_count(4)
        page.locator(".description").fill("rivers and lakes")
        page.reload()
        playwright.expect(page.locator(".description")).to_have_value("rivers and lakes")
        page.locator(".description").fill("lakes")
        page.go_back()
        page.wait_for_url("**item=2")
        page.go_forward()
        page.wait_for_url("**item=1")
        playwright.expect(page.locator(".description")).to_have_value("lakes")
        page.keyboard.press("x")
        saved(page)
        page.reload()
        assert page.locator(".description").count() == page.locator(".prefixes input:checked").count() == 0


def test_a_window_that_is_behind_is_told(browser: Any, address: str) -> None:
    """What another window has saved is not overwritten."""
    with Reader(browser, address) as first, Reader(browser, address) as second:
        make(first)
        page = begin(first, "anna")
        late = begin(second, "anna")
        describe(page, "rivers")
        late.keyboard.press("Space")
        late.wait_for_selector("output[data-wrong]")
        assert "reload" in late.locator(".patterns output").text_content()
        second.wrong = [
            line for line in second.wrong if "400" not in line
        ]  # which the browser says of its own
        late.reload()
        assert late.locator(".description").input_value() == "rivers"


def test_answers_wait_for_a_server_that_is_away(browser: Any, run: mn.Run, tmp_path: Path) -> None:
    """The page says so, and saves when it is back."""
    opened = mn.open_run(shutil.copytree(run.path, tmp_path / "written"))
    server = Server(opened)
    with Reader(browser, server.address) as reader:
        make(reader)
        page = begin(reader, "anna")
        reader.context.set_offline(True)
        page.keyboard.press("Space")
        page.wait_for_selector("output[data-wrong]")
        assert "trying again" in page.locator(".patterns output").text_content()
        reader.context.set_offline(False)
        saved(page)
        reader.wrong = [line for line in reader.wrong if "ERR_INTERNET_DISCONNECTED" not in line]
        page.reload()
        assert page.locator(".prefixes input:checked").count() == 1
    server.close()


def test_a_link_opens_the_same_item(browser: Any, address: str) -> None:
    """In a fresh browser, in the half and with the answers that it had."""
    with Reader(browser, address) as reader:
        make(reader)
        page = begin(reader, "anna")
        describe(page, "rivers")
        page.keyboard.press("Enter")
        page.wait_for_url("**half=apply")
        page.wait_for_selector("form.sheet input:focus")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        saved(page)
        link, seen = page.url.removeprefix(address), page.locator(".prefixes").text_content()
    with Reader(browser, address) as other:
        page = other.open(link)
        assert page.locator(".prefixes").text_content() == seen
        assert page.locator(".prefixes input").nth(1).is_checked()
        assert page.locator(".prefixes input:checked").count() == 1


def test_sheets_go_out_and_come_in(browser: Any, address: str, tmp_path: Path) -> None:
    """A download is taken by another server, and the command's own sheet with its key by this one."""
    with Reader(browser, address) as reader:
        make(reader)
        page = begin(reader, "anna")
        page.keyboard.press("0")
        page.wait_for_url("**item=*")
        page = reader.open("/runs/written/annotate")
        with page.expect_download() as download:
            page.get_by_role("link", name="with these answers").click()
        download.value.save_as(tmp_path / "anna.jsonl")
        text = (tmp_path / "anna.jsonl").read_text(encoding="utf-8")
        (tmp_path / "ben.jsonl").write_text(
            text.replace('"annotator": "anna"', '"annotator": "ben"'), encoding="utf-8"
        )
        page.locator("input[type=file]").first.set_input_files(tmp_path / "ben.jsonl")
        page.get_by_role("button", name="take it").click()
        page.wait_for_selector("td:has-text('ben')")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "ben.jsonl")
        page.get_by_role("button", name="take it").click()
        page.wait_for_selector("output[data-wrong]")
        assert "has answers to this sheet already" in page.locator("output[data-wrong]").text_content()
        reader.wrong = [line for line in reader.wrong if "400" not in line]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_note_is_kept(browser: Any, address: str, axe: str, width: int, scheme: str) -> None:
    """By its key, while it is typed; at home, in the search, and after a reload."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/written/neurons/L1N3")
        page.keyboard.press("n")
        page.keyboard.type("About <i>rivers</i>")
        saved(page, ".note")
        page.keyboard.press("Escape")
        page.reload()
        assert page.locator(".note textarea").input_value() == "About <i>rivers</i>"
        for path in ("", "/notes", "/search?q=rivers", "/neurons/L1N3"):
            page = reader.open(f"/runs/written{path}")
            page.evaluate(axe)
            assert page.evaluate("async () => (await axe.run()).violations.map((v) => v.id)") == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("main i").count() == 0
        page = reader.open("/runs/written")
        page.locator("#notes a.neuron").click()
        page.wait_for_url("**/neurons/L1N3")
