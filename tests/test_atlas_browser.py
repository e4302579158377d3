"""A served run in a browser: what a reader does, from the first page to a prediction; nothing leaves the machine."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from synthetic import make_run
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.atlas import live
from mnemoscope.records import Progress

pytestmark = pytest.mark.slow  # a browser is started, and each page is looked at four times

LOOKS = [(width, scheme) for width in (1400, 360) for scheme in ("light", "dark")]
PATHS = (
    "",
    "/layers/0",
    "/neurons/L1N3",
    "/search?q=a",
    "/sql?q=select+1+as+one",
    "/explain",
    "/text",
    "/steer",
    "/begin",
    "/examples/test",
    "/test",
    "/neurons/L99N1",
    "/study",
    "/study/distributions",
    "/compare",
    "/annotate",
    "/notes",
    "/layers",
    "/search?q=L1N3&by=like",
    "/graph",
    "/../../api",
)
BOTH_ENDS = LOOKS[::3]  # wide and light, narrow and dark
ANSWERS = (  # pages with an answer of the model, and what it shows
    ("/explain?prompt=The+capital+of&foil=+city&ablate=2", ".mn-explain"),
    ("/text?text=The+capital+of+France", ".mn-trace h4"),
    ("/text?context=0&neurons=L1N3", ".mn-trace ruby a"),
    ("/graph?prompt=The+capital+of&least=0.3", ".mn-graph"),
    ("/shade?neuron=L1N3&triggers=3", ".mn-text i"),
    ("/related?neuron=L1N3", ".answer table"),
    ("/test?neuron=L1N3&pattern=word:capital", ".answer :text('capital'), [data-failed]"),
)
WAIT = 60_000  # milliseconds for an answer of the model


class Server:
    """Runs served in a thread of this process, under addresses that begin with a secret if there is one."""

    def __init__(self, *runs: mn.Run, secret: str = "") -> None:
        import uvicorn

        from mnemoscope.atlas.app import create

        self.server = uvicorn.Server(
            uvicorn.Config(create(runs, secret=secret), port=0, log_level="error", ws="none")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            threading.Event().wait(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}{secret and '/'}{secret}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose text and titles are full of markup."""
    return mn.open_run(
        make_run(tmp_path_factory.mktemp("runs") / "hostile", layers=4, neurons=70, hostile=True).path
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose tiny model can be asked."""
    model = mn.load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "built", top=10)


@pytest.fixture(scope="module")
def address(hostile: mn.Run, built: mn.Run) -> Iterator[str]:
    """Where both are served."""
    server = Server(hostile, built)
    yield server.address
    server.close()


class Reader:
    """A page of a fresh browser; at the end it says what it asked for elsewhere, and what went wrong."""

    def __init__(self, browser: Any, address: str, width: int = 1400, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.address, self.wrong = address, []
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on(
            "console",
            lambda line: self.wrong.append(line.text) if line.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))

    def _asked(self, url: str) -> None:
        if not url.startswith((self.address, "data:")):
            self.wrong.append(f"asked for {url}")

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.wrong.append(text)

    def open(self, path: str) -> Any:
        self.page.goto(f"{self.address}{path}")
        return self.page

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.context.close()
        assert kind or not self.wrong, self.wrong


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    return files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
@pytest.mark.parametrize("path", PATHS)
def test_pages_can_be_read_by_everyone(
    browser: Any, address: str, axe: str, path: str, width: int, scheme: str
) -> None:
    """axe-core finds nothing; no page is wider than its window, and text that is markup stays text."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open(f"/runs/hostile{path}")
        reader.wrong = [line for line in reader.wrong if "404" not in line]  # of the page that is not there
        page.evaluate(axe)
        problems = page.evaluate(
            "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
        )
        assert problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("main b:has-text('season'), main script").count() == 0


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_answers_can_be_read_by_everyone(
    browser: Any, address: str, axe: str, width: int, scheme: str
) -> None:
    """What comes from the model is as readable as the pages it comes to, and no wider than the window."""
    for path, seen in ANSWERS:
        with Reader(browser, address, width, scheme) as reader:
            page = reader.open(f"/runs/built{path}")
            page.wait_for_selector(seen, timeout=WAIT)
            page.evaluate(axe)
            problems = page.evaluate(
                "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
            )
            assert problems == [], path
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.parametrize("scripts", [True, False])
def test_a_name_says_what_it_means(browser: Any, address: str, scripts: bool) -> None:
    """By the keyboard and by a finger, with scripts or without: beside the name, inside the window, until Escape."""
    context = browser.new_context(
        viewport={"width": 360, "height": 800}, java_script_enabled=scripts, has_touch=True
    )
    page = context.new_page()
    page.goto(f"{address}/runs/hostile/neurons/L1N3")
    name = page.get_by_role("button", name="excess kurtosis").first
    sentence = page.locator("#gloss-excess-kurtosis")
    assert "tails" in name.get_attribute("title") and not sentence.is_visible()
    for ask in (name.tap, lambda: (name.focus(), page.keyboard.press("Enter"))):
        ask()
        sentence.wait_for(state="visible")
        box, at = sentence.bounding_box(), name.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert min(abs(box["y"] - at["y"] - at["height"]), abs(at["y"] - box["y"] - box["height"])) < 12
        page.keyboard.press("Escape")
        sentence.wait_for(state="hidden")
    context.close()


@pytest.mark.parametrize("width", [360, 820, 821, 1400])
def test_the_bar_is_one_line(browser: Any, address: str, width: int) -> None:
    """Its links lie behind a button where there is no room for them, which needs no script."""
    context = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/runs/hostile")
    assert page.locator("nav.site").bounding_box()["height"] < 60
    link, more = page.get_by_role("link", name="SQL"), page.locator("nav .more")
    assert link.is_visible() != more.is_visible() and more.is_visible() == (width <= 820)
    if more.is_visible():
        more.click()
    link.click()
    page.wait_for_url("**/sql")
    context.close()


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_neuron_is_found_by_what_it_promotes(
    browser: Any, address: str, built: mn.Run, width: int, scheme: str
) -> None:
    """A token is typed into the box, the first neuron of the list is opened, and its card says the token."""
    token = built.neuron("L1N3").promoted[0].text.replace("·", " ")
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/built")
        page.keyboard.press("/")
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        page.wait_for_url("**/search?**")
        link = page.locator("#promotes a.neuron").first
        name = link.text_content()
        link.click()
        page.wait_for_url(f"**/neurons/{name}")
        assert name in page.locator("h1").first.text_content()
        assert page.locator(".mn-value .mn-token").first.is_visible()


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_keys_lead_through_neurons_and_layers(browser: Any, address: str, width: int, scheme: str) -> None:
    """j and k, g l, ?, and an address in the box."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/built/neurons/L1N3")
        page.keyboard.press("j")
        page.wait_for_url("**/neurons/L1N4")
        page.keyboard.press("k")
        page.wait_for_url("**/neurons/L1N3")
        page.keyboard.press("g")
        page.keyboard.press("l")
        page.wait_for_url("**/layers/1")
        page.keyboard.press("k")
        page.wait_for_url("**/layers/0")
        page.keyboard.press("?")
        assert page.locator("dialog.keys").is_visible()
        page.keyboard.press("Escape")
        page.locator("dialog.keys").wait_for(state="hidden")
        page.keyboard.press("/")
        page.keyboard.type("L0N2")
        page.keyboard.press("Enter")
        page.wait_for_url("**/neurons/L0N2")


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_layer_is_filtered_and_sorted(browser: Any, address: str, width: int, scheme: str) -> None:
    """By the form and by the heads of columns; the address holds all of it."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/hostile/layers/1")
        page.locator("input[name=where]").first.fill("max>0.5")
        page.locator("select[name=sort]").select_option("std")
        page.locator("main form button").click()
        page.wait_for_url("**where=max*")
        shown = page.locator("output").text_content()
        assert re.fullmatch(r"\d+ of 70", shown) and not shown.startswith("70 ")
        page.get_by_role("link", name="min").click()
        page.wait_for_url("**sort=min**")
        assert page.locator("output").text_content() == shown
        values = [
            float(text.replace(",", ""))
            for text in page.locator("tbody tr td:nth-child(2)").all_text_contents()
        ]
        assert values == sorted(values, reverse=True)


def test_a_part_of_the_picture_becomes_conditions(browser: Any, address: str) -> None:
    """Drawn with the mouse; the points that stay are those inside, and a point leads to its neuron."""
    with Reader(browser, address) as reader:
        page = reader.open("/runs/hostile/layers/1?x=std&y=mean")
        box = page.locator(".scatter .ground").bounding_box()
        inside = page.locator(".scatter circle").evaluate_all(
            "(all, box) => all.filter((one) => { const at = one.getBoundingClientRect();"
            "const x = at.x + at.width / 2 - box.x, y = at.y + at.height / 2 - box.y;"
            "return x > 3 && x < box.width * .6 && y > 3 && y < box.height * .7; }).map((one) => one.textContent)",
            box,
        )
        page.mouse.move(box["x"] + 3, box["y"] + 3)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=4)
        page.mouse.up()
        page.wait_for_url("**where=**")
        assert sorted(page.locator(".scatter circle").all_text_contents()) == sorted(inside)
        name, _, values = page.locator(".scatter circle").first.text_content().partition(": ")
        assert re.fullmatch(r"std [\d.,e-]+, mean [\d.,e−-]+", values)
        page.locator(".scatter a").first.click()
        page.wait_for_url(f"**/neurons/{name}")


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_prediction_is_explained_and_leads_to_neurons(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    """A foil is added; the address opens the same in another browser; bars have their widths from the script."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/built/explain")
        page.locator("textarea").fill("The capital of France is")
        page.locator("main form button").click()
        page.wait_for_selector(".mn-explain", timeout=WAIT)
        page.locator("input[name=foil]").last.fill(" city")
        page.locator("main form button").click()
        page.wait_for_url("**foil=+city**")
        page.wait_for_selector(".mn-explain", timeout=WAIT)
        assert page.locator("#against-1, section[id*=against]").count() == 1
        assert page.locator("[data-style]").count() == 0
        assert page.locator(".mn-explain [style*='--size']").count() > 0
        link, headline = page.url.removeprefix(address), page.locator(".headline").text_content()
        page.locator(".mn-explain a.neuron").first.click()
        page.wait_for_url("**/neurons/L*")
    with Reader(browser, address, width, scheme) as other:
        page = other.open(link)
        page.wait_for_selector(".mn-explain", timeout=WAIT)
        assert page.locator(".headline").text_content() == headline


def test_a_neuron_is_steered(browser: Any, address: str, axe: str) -> None:
    """From its page, with a number of one's own; three texts come, and the address opens the same, as wide as it is."""
    with Reader(browser, address) as reader:
        page = reader.open("/runs/built/neurons/L1N3")
        page.get_by_role("link", name="steer", exact=True).last.click()
        page.wait_for_url("**/steer?neuron=L1N3")
        page.locator("textarea").fill("The capital of France is")
        page.locator("input[name=value]").fill("50")
        page.locator("input[name=length]").fill("4")
        page.locator("main form button").click()
        page.wait_for_selector(".answer :text('drawn at random')", timeout=WAIT)
        assert "L1N3 changed" in page.locator(".answer").text_content()
        assert "value=50" in page.url
        link = page.url.removeprefix(address)
    for width, scheme in LOOKS:
        with Reader(browser, address, width, scheme) as reader:
            page = reader.open(link)
            page.wait_for_selector(".answer article", timeout=WAIT)
            wider = "(all) => all.filter((each) => each.clientWidth && each.scrollWidth > each.clientWidth + 1).length"
            assert page.locator(".answer *").evaluate_all(wider) == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate(axe)
            problems = (
                "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
            )
            assert page.evaluate(problems) == []


def test_a_page_is_kept_as_one_file(browser: Any, address: str, tmp_path: Path) -> None:
    """What is seen, its answer too, opens from the disk: with its look, without a script, and nothing is asked for."""
    for path, seen in (
        ("/neurons/L1N3", ".mn-list li"),
        ("/explain?prompt=The+capital", ".mn-explain svg"),
        ("/layers/1", ".scatter circle"),
    ):
        with Reader(browser, address) as reader:
            page = reader.open(f"/runs/built{path}")
            page.wait_for_selector(seen, timeout=WAIT)
            count, ink = (
                page.locator(seen).count(),
                page.locator("h1").first.evaluate("(h) => getComputedStyle(h).fontSize"),
            )
            with page.expect_download() as download:
                page.get_by_role("button", name="save").click()
            file = tmp_path / download.value.suggested_filename
            download.value.save_as(file)
        context = browser.new_context()
        kept, asked, wrong = context.new_page(), [], []
        kept.on("request", lambda request, asked=asked: asked.append(request.url))
        kept.on("console", lambda line, wrong=wrong: wrong.append(line.text))
        kept.goto(file.as_uri())
        assert kept.locator(seen).count() == count and kept.locator("script, form, nav").count() == 0
        assert kept.locator("h1").first.evaluate("(h) => getComputedStyle(h).fontSize") == ink
        assert (
            kept.locator("[href^='/'], [href^=http]").count() == 0 and asked == [file.as_uri()] and not wrong
        )
        assert path.partition("?")[0] in kept.locator("main").text_content()
        context.close()


def test_what_is_kept_does_not_tell_the_secret(browser: Any, built: mn.Run, tmp_path: Path) -> None:
    """A page that is saved where others can ask holds nothing of the word that lets them; nor does a request say from
    which page it came."""
    server = Server(built, secret="the-secret-word")
    try:
        for path in ("/neurons/L1N3", "/layers/1", "/search?q=a"):
            with Reader(browser, server.address) as reader:
                said: list[Any] = []
                reader.page.on(
                    "request", lambda request, said=said: said.append(request.headers.get("referer"))
                )
                page = reader.open(f"/runs/built{path}")
                with page.expect_download() as download:
                    page.get_by_role("button", name="save").click()
                download.value.save_as(tmp_path / "page.html")
                assert said and not any(said)
            text = (tmp_path / "page.html").read_text()
            assert "the-secret-word" not in text and f"/runs/built{path.partition('?')[0]}" in text
    finally:
        server.close()


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_tables_pictures_and_commands_are_taken(
    browser: Any, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    """By the mouse and by keys: a table as text or CSV, a picture as a file of its own in its colours, a command."""

    def taken(page: Any, name: str) -> Path:
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        return tmp_path / download.value.suggested_filename

    with Reader(browser, address, width, scheme) as reader:
        reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = reader.open("/runs/hostile/layers/1")
        page.locator(".scroll table td").first.hover()
        rows = page.locator(".scroll tbody tr").count()
        page.get_by_role("button", name="copy the table").click()
        lines = page.evaluate("navigator.clipboard.readText()").split("\n")
        assert len(lines) == rows + 1 and lines[0].startswith("neuron\tkurtosis")
        assert {line.count("\t") for line in lines} == {lines[0].count("\t")}
        table = taken(page, "the table as CSV").read_text()
        assert table.splitlines()[1].split(",")[0] == lines[1].split("\t")[0]
        page.locator(".scatter .ground").hover(position={"x": 3, "y": 3})
        drawn = taken(page, "the picture as SVG")
        assert "var(" not in drawn.read_text() and "href" not in drawn.read_text()
        alone = reader.context.new_page()
        alone.goto(drawn.as_uri())
        assert alone.locator("circle").count() == page.locator(".scatter circle").count()
        colour = "(all) => getComputedStyle(all[all.length - 1]).fill"
        shown = page.locator(".scatter circle").evaluate_all(colour)
        assert alone.locator("circle").evaluate_all(colour) == shown
        alone.close()
        page = reader.open("/runs/hostile/neurons/L1N3")
        page.locator("details summary").last.click()
        code = page.locator(".mn-card code").first
        code.hover()
        page.get_by_role("button", name="copy the text").click()
        assert page.evaluate("navigator.clipboard.readText()") == code.inner_text().strip()
        page = reader.open("/runs/hostile/layers/1")
        page.locator(".scroll").focus()
        page.keyboard.press(
            "Tab"
        )  # to the bar, which stands behind what it is about; then the table's own links
        for _ in range(400):
            if page.evaluate("document.activeElement.ariaLabel") == "copy the table":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("navigator.clipboard.readText()").startswith("neuron\t")
        page.keyboard.press("Escape")
        assert page.locator(".tools").is_hidden()
        reader.wrong = [line for line in reader.wrong if "file://" not in line]


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_prediction_is_worked_with(browser: Any, address: str, width: int, scheme: str) -> None:
    """Target and foil by a click on a likely token; its graph, a pin and a threshold; the address holds all of it."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/built/explain?prompt=The+capital+of")
        page.wait_for_selector(".mn-explain", timeout=WAIT)
        second = page.locator(".mn-chances .target").nth(1)
        label = second.inner_text()
        second.click()
        page.wait_for_url("**target=**")
        page.wait_for_selector(".mn-answer", timeout=WAIT)
        assert page.locator(".mn-answer bdi").inner_text() == label
        page.locator(".mn-chances .foil").first.click()
        page.wait_for_url("**foil=**")
        page.wait_for_selector("[id$=against-1]", timeout=WAIT)
        page.get_by_role("link", name="work with its graph").click()
        page.wait_for_selector(".mn-graph", timeout=WAIT)
        before = page.locator(".mn-graph path").count()
        name = page.locator(".mn-graph .neuron a.neuron").first.text_content()
        page.get_by_role("link", name=f"pin {name}").click()
        page.wait_for_url("**pin=**")
        page.wait_for_selector(".mn-graph .pinned", timeout=WAIT)
        page.locator("input[name=least]").fill("0.9")
        page.locator("main form button").click()
        page.wait_for_url("**least=0.9**")
        page.wait_for_selector(".mn-graph .pinned", timeout=WAIT)
        assert page.locator(".mn-graph path").count() < before
        assert page.locator(".mn-graph .pinned").first.text_content().strip().endswith("●")
        page.get_by_role("link", name="show all of").first.click()
        page.wait_for_url("**whole=**")
        page.wait_for_selector(".mn-graph .pinned", timeout=WAIT)
        link, nodes = page.url.removeprefix(address), page.locator(".mn-graph g").count()
        page.locator(f".mn-graph a.neuron[href$='/{name}']").click()
        page.wait_for_url(f"**/neurons/{name}")
        page.locator("#explained a").first.wait_for()
        assert "nats" in page.locator("#explained").text_content()
    with Reader(browser, address, width, scheme) as other:
        page = other.open(link)
        page.wait_for_selector(".mn-graph .pinned", timeout=WAIT)
        assert page.locator(".mn-graph g").count() == nodes


def test_a_trigger_leads_to_a_clicked_token(browser: Any, address: str) -> None:
    """From a card to its context with the neuron along it, and on to the most unusual neurons at one of its tokens."""
    with Reader(browser, address) as reader:
        page = reader.open("/runs/built/neurons/L1N3")
        page.locator("a.source").first.click()
        page.wait_for_url("**context=**")
        token = page.locator(".mn-trace ruby a").nth(9)
        token.wait_for(timeout=WAIT)
        token.click()
        page.wait_for_url("**#token-9")
        page.wait_for_selector("#token-9", timeout=WAIT)
        page.wait_for_function(
            "Math.abs(document.getElementById('token-9').getBoundingClientRect().top) < innerHeight"
        )
        page.locator(".answer a.neuron").first.click()
        page.wait_for_url("**/neurons/L*")


def test_a_connection_that_breaks_off_is_said(
    browser: Any, built: mn.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is not asked again behind the reader's back; the page says what happened."""
    begun, asked = threading.Semaphore(0), []

    def slow(self: Any, *_: Any, report: Any, **__: Any) -> None:
        asked.append(self)
        begun.release()
        for step in range(100_000):
            report(Progress("working", step, 100_000, "steps"))
            threading.Event().wait(0.01)

    monkeypatch.setattr(live.Desk, "_with_model", lambda self, run: run)
    monkeypatch.setattr(type(built), "explain", slow)
    server = Server(built)
    with Reader(browser, server.address) as reader:
        page = reader.open("/runs/built/explain?prompt=The")
        assert begun.acquire(timeout=20)
        page.locator(".told:text-matches('^working')").wait_for()
        server.server.force_exit = True
        server.close()
        page.locator("[data-failed]").wait_for()
        assert page.locator(".told").text_content() in (
            "the connection broke off", "asking the model: the question was stopped; ask it again",
        )  # fmt: skip
        page.wait_for_timeout(1500)
        assert len(asked) == 1
        reader.wrong = [line for line in reader.wrong if "ERR_" not in line]


def test_a_long_question_is_stopped(browser: Any, built: mn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its button and by leaving the page: the work ends, and the next question is answered."""
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def slow(self: Any, *_: Any, report: Any, **__: Any) -> None:
        begun.release()
        try:
            for step in range(100_000):
                report(Progress("working", step, 100_000, "steps"))
                threading.Event().wait(0.01)
        finally:
            ended.release()

    monkeypatch.setattr(live.Desk, "_with_model", lambda self, run: run)
    monkeypatch.setattr(type(built), "explain", slow)
    server = Server(built)
    try:
        with Reader(browser, server.address) as reader:
            page = reader.open("/runs/built/explain?prompt=The")
            assert begun.acquire(timeout=20)
            page.locator(".told:text-matches('^working')").wait_for()
            page.locator(".stop").click()
            assert ended.acquire(timeout=20)
            assert page.locator(".told").text_content() == "stopped"
            reader.open("/runs/built/explain?prompt=The+capital")
            assert begun.acquire(timeout=20)
            reader.open("/runs/built")
            assert ended.acquire(timeout=20)
    finally:
        server.close()


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_pattern_is_tested(browser: Any, address: str, width: int, scheme: str) -> None:
    """A claim about a neuron, or why it cannot be tested, comes to the same page."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/built/test?neuron=L1N3&pattern=word:capital")
        page.wait_for_selector(".answer :text('capital'), [data-failed]", timeout=WAIT)
        page = reader.open(f"/runs/built/test?neuron=L1N3&pattern={quote('regex:(')}")
        page.wait_for_selector("[data-failed]", timeout=WAIT)
        assert "does not compile" in page.locator(".told").text_content()


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_a_statement_is_answered(browser: Any, address: str, tmp_path: Path, width: int, scheme: str) -> None:
    """As a table, and as a file."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/hostile/sql")
        page.locator("textarea").fill(
            "select layer, count(*) as neurons from neurons group by layer order by layer"
        )
        page.locator("main form button").click()
        page.wait_for_selector("tbody")
        assert page.locator("tbody tr").all_text_contents() == [f"{layer}70" for layer in range(4)]
        with page.expect_download() as download:
            page.get_by_role("link", name="CSV").click()
        download.value.save_as(tmp_path / "answer.csv")
    assert (tmp_path / "answer.csv").read_text().splitlines()[:2] == ["layer,neurons", "0,70"]


@pytest.mark.parametrize(("width", "scheme"), BOTH_ENDS)
def test_two_runs_are_compared(browser: Any, address: str, width: int, scheme: str) -> None:
    """One is chosen from the list, and figures come with both names."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/hostile/compare")
        page.locator("select[name=only]").select_option("distributions")
        page.locator("main form button").click()
        page.wait_for_url("**other=built**")
        page.wait_for_selector(".answer article figure svg", timeout=WAIT)
        assert "built" in page.locator(".study").text_content()


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_neuron_that_is_named_shows_its_card(
    browser: Any, address: str, axe: str, width: int, scheme: str
) -> None:
    """Under the mouse and by the keyboard, until Escape or something else; not under a finger."""
    with Reader(browser, address, width, scheme) as reader:
        page = reader.open("/runs/hostile/layers/1")
        link, card = page.locator("tbody a.neuron").first, page.locator("#preview")
        link.hover()
        card.wait_for()
        assert link.text_content() in card.text_content()
        assert link.get_attribute("aria-describedby") == "preview"
        page.evaluate(axe)
        assert (
            page.evaluate(
                "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
            )
            == []
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#preview b:has-text('season'), #preview script").count() == 0
        box = card.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0
        card.hover()
        page.wait_for_timeout(400)
        assert card.is_visible()
        page.keyboard.press("Escape")
        card.wait_for(state="hidden")
        page.mouse.move(2, 2)
        page.keyboard.press("Tab")
        link.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+Tab")
        card.wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        card.wait_for(state="hidden")
    touched = browser.new_context(viewport={"width": width, "height": 900}, has_touch=True)
    page = touched.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/runs/hostile/layers/1")
    page.locator("tbody a.neuron").first.tap()
    page.wait_for_url("**/neurons/L*")
    touched.close()
    assert not [url for url in asked if url.endswith("/preview")]


def test_tokens_are_completed(browser: Any, address: str) -> None:
    """While they are typed."""
    with Reader(browser, address) as reader:
        page = reader.open("/runs/hostile")
        page.locator(".go input").press_sequentially(" c")
        page.wait_for_selector("#completions option", state="attached")
        values = page.locator("#completions option").evaluate_all("(all) => all.map((one) => one.value)")
        assert values and all(value.startswith(" c") for value in values)
