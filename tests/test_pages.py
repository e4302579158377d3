"""Pages and fragments in a real browser: what can be read in every scheme, host and width.

Without a browser these are skipped, except in CI, which installs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Group
from rich.text import Text
from synthetic import make_run
from synthetic_explanation import make
from test_patterns_job import BUDGET, PLANTED, planted_model
from test_study_views import BAND, FRAME, finding
from test_views import CARD
from tiny import texts

from mnemoscope import build
from mnemoscope.neuron import find
from mnemoscope.patterns import summary as patterns
from mnemoscope.patterns.triggers import Options
from mnemoscope.records import NeuronId
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings.finding import KINDS, Figure, Finding, Section, items
from mnemoscope.tracing.traced import NeuronReading, NeuronTrace, Trace, TracedToken
from mnemoscope.trials import job
from mnemoscope.views import answers, card, gallery, page, report, trace
from mnemoscope.views.explanation import page as explanations
from mnemoscope.views.explanation.terminal import ATTENTION, FFN
from mnemoscope.views.terminal import BLUE, ORANGE

pytestmark = pytest.mark.slow  # a browser is started, and each page is drawn several times

HERE = Path(__file__).parent
LEAST = 4.5  # contrast of text, WCAG 2.2 AA
WIDTHS = (1400, 900, 420)
PAGES = ("card", "explanation", "gallery", "study", "trace", "printed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind, on disk."""
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "run", layers=4, neurons=12)
    files = {name: folder / f"{name}.html" for name in PAGES}
    files["card"].write_text(page.page(CARD), encoding="utf-8")
    explained = make(layers=4, neurons=12, run=str(run.path))
    files["explanation"].write_text(explanations.page(explained), encoding="utf-8")
    gallery.write(run, files["gallery"])
    sections = [
        Section("kinds", "Every kind of figure", tuple(study_figures())),
        Section("gone", "Not there", (), "no table"),
    ]
    report.write(run, sections, files["study"], items=items())
    files["trace"].write_text(trace.page(traced()), encoding="utf-8")
    files["printed"].write_text(page.printed_page(terminal_text(run)), encoding="utf-8")
    return files


def study_figures() -> Iterator[Finding]:
    """Each kind with bands and intervals, alone and in panels; heat maps of one sign and of two."""
    signed = FRAME.with_columns(signed=pl.col("value") - 0.3)
    for kind in KINDS:
        for facet in (None, "panel"):
            for colour in ("value", "signed") if kind == "heat" else ("series",):
                drawn = Figure(**{**finding(kind).figure.__dict__, **BAND, "color": colour, "facet": facet})
                yield Finding(
                    f"{kind}-{colour}-{facet or 'whole'}", ("A21",), f"A {kind}", "It is so.", signed, drawn
                )


def traced() -> Trace:
    """One neuron along a text, as a run would say it."""
    words = ("The", " capital", " of", " France", " is", " Paris")
    tokens = tuple(TracedToken(at, at, word, at > 0) for at, word in enumerate(words))
    neuron, sizes = NeuronId(24, 1005), (0.1, -21.4, 0.0, -3.0, 6.1, 0.2)
    readings = tuple(
        NeuronReading(
            neuron, at, value, 0.001, 4.0, value / 2, at == 1, abs(value), 1, -1 if value < 0 else 1
        )
        for at, value in enumerate(sizes)
    )
    followed = NeuronTrace(neuron, ("·noqa",), ("·capitals", "·cities"), readings, CARD)
    return Trace("synthetic", "runs/a", "text", "".join(words), tokens, (followed,), (), {}, 0.001, 1000, 360)


def terminal_text(run: Run) -> Group:
    """A search, a card and every style of the terminal's views."""
    colours = (BLUE, ORANGE, ATTENTION, FFN)
    samples = [
        Text(f"in the style {style} it can be read", style=style)
        for style in (*colours, "dim", "bold", f"bold reverse {ORANGE}")
    ]
    return Group(answers.found(find.promotes(run, " Paris")), card.card(CARD), *samples)


def opened(
    browser: Any, address: str, width: int = 1400, scheme: str = "light", media: str = "screen"
) -> Any:
    """A page as wide as that and as high as it is, all that is folded unfolded; nothing of it asks the network."""
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown.route("http*://**", lambda route: route.abort())
    shown.goto(address)
    shown.emulate_media(media=media, color_scheme=scheme)
    shown.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    height = shown.evaluate("document.documentElement.scrollHeight")
    shown.set_viewport_size({"width": width, "height": min(height, 12_000)})
    return shown


def audit(shown: Any, within: str = ".mn") -> dict[str, Any]:
    """How many texts were seen, and those that are too weak."""
    return shown.evaluate((HERE / "contrast.js").read_text(), [LEAST, within])


# -- both schemes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_can_be_read(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    """Text of pages and in pictures stands out from what is behind it, light and dark."""
    found = audit(opened(browser, pages[name].as_uri(), scheme=scheme))
    assert found["texts"] > 60 and (found["pictures"] > 3 or name in ("trace", "printed"))
    assert found["weak"] == []


def test_the_audit_sees_what_cannot_be_read(browser: Any) -> None:
    """Grey on grey, black on a dark shape of a picture, and text that is too pale are found."""
    shown = browser.new_page()
    shown.set_content(
        "<p style='color:#888;background:#777'>grey</p><p>good</p><p style='opacity:.3'>pale</p>"
        "<svg width=90 height=40><rect width=90 height=40 fill='#222'/><text x=5 y=25>black</text></svg>"
    )
    found = audit(shown, "body")
    assert found["texts"] == 4 and found["pictures"] == 1
    assert [one.split(" | ")[0] for one in found["weak"]] == ["grey", "pale", "black"]


# -- in notebooks -------------------------------------------------------------------------------------------

# name: nbconvert's template and theme, or classes of VS Code's body and its background; and whether it is dark
HOSTS = {
    "lab light": (("lab", "light"), False),
    "lab dark": (("lab", "dark"), True),
    "classic": (("classic", "light"), False),
    "vscode light": (("vscode-light", "#ffffff"), False),
    "vscode dark": (("vscode-dark", "#1e1e1e"), True),
    "vscode high contrast": (("vscode-high-contrast", "#000000"), True),
}


def _hosted(host: str, fragments: list[str]) -> str:
    """A notebook whose outputs are these, as its front end draws it."""
    (kind, look), dark = HOSTS[host]
    if kind.startswith("vscode"):
        style = (HERE / "notebook_vscode.css").read_text()
        ink = "#cccccc" if dark else "#3b3b3b"
        cells = "".join(
            f"<div class=output_container><div class=output>{one}</div></div>" for one in fragments
        )
        return (
            f"<!doctype html><html><head><meta charset=utf-8><style>{style}</style></head><body class='{kind}' "
            f"data-vscode-theme-kind='{kind}' style='background:{look};color:{ink}'>{cells}</body></html>"
        )
    import nbformat
    from nbconvert import HTMLExporter

    outputs = [
        nbformat.v4.new_output("display_data", {"text/html": one, "text/plain": "card"}) for one in fragments
    ]
    cell = nbformat.v4.new_code_cell("run.neuron(24, 1005)", outputs=outputs, execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python"}})
    return str(HTMLExporter(template_name=kind, theme=look).from_notebook_node(notebook)[0])


@pytest.fixture(scope="module")
def fragments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a card, an explanation, a trace and the results of a search give a notebook to show."""
    run = make_run(tmp_path_factory.mktemp("fragments") / "run", layers=2)
    explained = explanations.fragment(make(foils=(" London",)))
    return [
        page.fragment(CARD),
        explained,
        trace.fragment(traced()),
        page.printed_fragment(terminal_text(run)),
    ]


LOOK = (HERE / "look.js").read_text()


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        pytest.param(
            host, scheme, marks=() if scheme == "light" and host.endswith(" dark") else pytest.mark.slow
        )
        for host in HOSTS
        for scheme in ("light", "dark")
    ],
)
def test_a_notebook_leaves_the_card_as_it_is(
    browser: Any, fragments: list[str], tmp_path: Path, host: str, scheme: str
) -> None:
    """Rules for tables, lists and code of a front end do not reach in, and its theme decides over the system's."""
    file = tmp_path / "notebook.html"
    file.write_text(_hosted(host, fragments), encoding="utf-8")
    shown = opened(browser, file.as_uri(), scheme=scheme)
    found, clear = shown.evaluate(LOOK), "rgba(0, 0, 0, 0)"
    dark = HOSTS[host][1]
    assert all((panel < 0.3) == dark and (panel > 0.9) != dark for panel in found["panels"]), found["panels"]
    assert found["rows"] == [clear] and found["code"] == [clear]
    assert found["numbers"] == ["right"] and found["names"] == ["left"]
    assert found["terms"] == ["grid", "none", "400"]
    assert found["sizes"] == ["13.5px", "1px"]
    seen = audit(shown)
    assert seen["texts"] > 150 and seen["weak"] == []


def test_a_host_without_a_theme_follows_the_system(
    browser: Any, fragments: list[str], tmp_path: Path
) -> None:
    """Where nothing says light or dark, the reader's own setting counts."""
    file = tmp_path / "site.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{fragments[0]}", encoding="utf-8")
    panels = [
        opened(browser, file.as_uri(), scheme=one).evaluate(LOOK)["panels"][0] for one in ("light", "dark")
    ]
    assert panels[0] > 0.9 and panels[1] < 0.3


# -- widths and paper ---------------------------------------------------------------------------------------

LAYOUT = (HERE / "layout.js").read_text()
PAPER = 718  # pixels of A4 between its margins


@pytest.mark.parametrize(
    "width", [pytest.param(width, marks=pytest.mark.slow if width == 900 else ()) for width in WIDTHS]
)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_without_a_sign(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    """What is wider than the page scrolls in its own place with a shadow at the edge; no text lies on another."""
    found = opened(browser, pages[name].as_uri(), width).evaluate(LAYOUT)
    assert found["wide"] <= 0
    assert found["cut"] == [] and found["left"] == [] and found["over"] == []
    assert found["small"] == [] and found["beyond"] == []


def test_the_layout_check_sees_what_is_wrong(browser: Any) -> None:
    """A box that hides its end, a text over another, a label outside of its picture, a page that is too wide."""
    shown = browser.new_page(viewport={"width": 500, "height": 400})
    shown.set_content(
        "<div style='width:90px;overflow:auto;white-space:nowrap'>this is far too long for its box</div><p>one</p>"
        "<p style='margin-top:-36px'>two</p><svg width=40 height=40><text x=30 y=20>label</text></svg>"
        "<div style='width:700px'>wide</div><svg width=600 viewBox='0 0 1600 40'><text y=20>far too small</text></svg>"
    )
    found = shown.evaluate(LAYOUT)
    assert found["wide"] > 100 and found["over"] == ["two / one"]
    assert len(found["cut"]) == 1 and len(found["left"]) == 1
    assert len(found["small"]) == len(found["beyond"]) == 1


@pytest.mark.parametrize("name", ["gallery", "study"])
def test_a_heading_of_any_length_leaves_the_page_as_wide(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    """The mark of its address, which is only there when it is pointed at, reaches out at no end of a line."""
    shown = opened(browser, pages[name].as_uri(), 420)
    widths = shown.evaluate(
        """() => {
          const links = [...document.querySelectorAll("h2 > a.mn-address, h3 > a.mn-address")], found = [];
          for (let letters = 1; letters <= 60; letters += 1) {
            for (const link of links) link.textContent = "n".repeat(letters);
            if (links[0].getClientRects().length > 1 || links[0].offsetWidth > 400) break;
            found.push(document.documentElement.scrollWidth);
          }
          return found;
        }"""
    )
    assert len(widths) > 15 and set(widths) == {420}


def test_a_word_keeps_the_number_above_it(browser: Any, pages: dict[str, Path]) -> None:
    """Wherever lines end, a token and its coefficient are on one, the number with its sign; and the line does end."""
    shown = browser.new_page()
    shown.goto(pages["trace"].as_uri())
    for width in range(200, 420, 12):
        shown.set_viewport_size({"width": width, "height": 900})
        parted = shown.evaluate(
            """() => [...document.querySelectorAll("ruby")].filter((ruby) => {
              const [word, number] = [ruby.firstChild, ruby.querySelector("rt").firstChild].map((text) => {
                const range = document.createRange();
                range.selectNodeContents(text);
                return [...range.getClientRects()];
              });
              const middle = (number[0].left + number[0].right) / 2;
              return word.length > 1 || number.length > 1 || middle < word[0].left - 2 || middle > word[0].right + 2;
            }).map((ruby) => ruby.textContent)"""
        )
        assert parted == []
        assert (
            shown.evaluate("(([a]) => a.scrollWidth - a.clientWidth)(document.querySelectorAll('.text'))")
            <= 0
        )


def test_on_paper_a_trigger_is_running_text(browser: Any, pages: dict[str, Path]) -> None:
    """What is before the active token ends where the token begins, on its line or the one above."""
    shown = opened(browser, pages["card"].as_uri(), 300, media="print")
    places = shown.evaluate(
        """() => [...document.querySelectorAll(".mn-text[dir=ltr]")].map((text) => {
          const before = [...text.querySelector(".before bdi").getClientRects()];
          const mark = text.querySelector("mark").getClientRects()[0];
          const last = before.at(-1);
          return last && [before.length, mark.bottom - last.bottom, mark.left - last.right];
        }).filter(Boolean)"""
    )
    assert len(places) > 2 and max(lines for lines, _, _ in places) > 1
    for _, down, right in places:
        assert (abs(down) < 8 and 0 <= right < 12) or 8 < down < 40


def test_rows_keep_their_rules_and_chips_their_distance(browser: Any, pages: dict[str, Path]) -> None:
    """A cell that stays in view has borders of its own, or they are not painted; chips of any script do not touch."""
    for name in ("gallery", "explanation"):
        shown = opened(browser, pages[name].as_uri())
        styles = shown.evaluate(
            """() => [...document.querySelectorAll("td")].filter((cell) => getComputedStyle(cell).position === "sticky")
              .map((cell) => getComputedStyle(cell).borderCollapse)"""
        )
        assert len(styles) > 3 and set(styles) == {"separate"}
        gaps = shown.evaluate(
            """() => [...document.querySelectorAll(".mn-token + .mn-token")].map((chip) => {
              const [one, two] = [chip.previousElementSibling, chip].map((other) => other.getBoundingClientRect());
              return one.top === two.top && one.width && two.width ? two.left - one.right : 99;
            })"""
        )
        assert len(gaps) > 10 and min(gaps) > 2


def test_a_legend_shows_the_series_symbol(browser: Any, pages: dict[str, Path]) -> None:
    """Filled as in the picture, and without the dashes of the line around it."""
    shown = opened(browser, pages["study"].as_uri())
    widths = shown.evaluate(
        "[...document.querySelectorAll('.role-legend-symbol path')].map((one) => getComputedStyle(one).strokeWidth)"
    )
    assert len(widths) > 3 and {float(width.removesuffix("px")) for width in widths} == {0.0}


@pytest.mark.parametrize("name", PAGES)
def test_pages_print_whole(browser: Any, pages: dict[str, Path], name: str) -> None:
    """On paper nothing scrolls or overlaps, folded details are there, and it is dark on white whatever the scheme."""
    shown = opened(browser, pages[name].as_uri(), PAPER, "dark", "print")
    found = shown.evaluate(LAYOUT)
    assert found["wide"] <= PAPER // 4  # what a browser shrinks to fit
    assert found["cut"] == [] and found["over"] == [] and found["beyond"] == []
    assert audit(shown)["weak"] == []
    shown.evaluate("for (const one of document.querySelectorAll('details:not(.fold)')) one.open = false")
    hidden = "one => getComputedStyle(one, '::details-content').contentVisibility"
    states = shown.evaluate(f"[...document.querySelectorAll('details:not(.fold)')].map({hidden})")
    assert set(states) <= {"visible"} and (states or name in ("trace", "printed"))


# -- the gallery, used --------------------------------------------------------------------------------------


@pytest.fixture
def found_gallery(browser: Any, pages: dict[str, Path]) -> Any:
    """The gallery, folded, with a way to type into its filter: rows, cards and hint that are then seen."""
    shown = browser.new_page()
    shown.goto(pages["gallery"].as_uri())

    def type_in(typed: str) -> tuple[list[str], list[str], str]:
        shown.fill("#filter", typed)
        rows = shown.locator("#neurons tbody tr:visible td:first-child").all_inner_texts()
        return (
            rows,
            [one.get_attribute("data-neuron") for one in shown.locator(".fold:visible").all()],
            shown.inner_text("#hint"),
        )

    return shown, type_in


def test_the_filter_hides_cards_too(found_gallery: Any) -> None:
    """Rows and cards that are left are the same, by any text of a card or by an address; nothing typed shows all."""
    shown, type_in = found_gallery
    every, cards, hint = type_in("")
    assert sorted(every) == sorted(cards) and len(every) > 10 and hint == ""
    rows, cards, hint = type_in("drawn at random")
    assert sorted(rows) == sorted(cards) and 0 < len(rows) < len(every)
    assert "mnemoscope find" in hint
    for address in ("L1N0", "l1n0", "1.0", "1/0"):
        assert type_in(address)[:2] == (["L1N0"], ["L1N0"])
    assert shown.locator(".layer:visible").count() == 1


def test_what_the_page_lacks_is_told_how_to_get(found_gallery: Any, pages: dict[str, Path]) -> None:
    """No hit is no dead end: the command for that neuron or text, or which neurons there are."""
    shown, type_in = found_gallery
    every, run = type_in("")[0], pages["gallery"].parent / "run"
    absent = next(f"L2N{neuron}" for neuron in range(12) if f"L2N{neuron}" not in every)
    rows, cards, hint = type_in(absent)
    assert rows == cards == [] and f"mnemoscope show {run} {absent}" in hint
    assert "layers 0 to 3 and neurons 0 to 11" in type_in("L9N1")[2]
    rows, cards, hint = type_in("it's nowhere")
    assert rows == cards == [] and f"mnemoscope find {run} --promotes 'it'\"'\"'s nowhere'" in hint
    assert shown.inner_text("#shown") == f"0 of {len(every)}"


def test_an_address_opens_its_card(found_gallery: Any) -> None:
    """A link to a neuron unfolds its card, also one that the filter has hidden; the page is short until then."""
    shown, type_in = found_gallery
    assert shown.evaluate("document.documentElement.scrollHeight") < 6000
    assert shown.locator(".mn-card:visible").count() == 0
    shown.click("#neurons tbody a >> text='L1N0'")
    assert shown.locator("#L1N0").is_visible()
    type_in("L2N0")
    shown.evaluate("location.hash = '#L3N0'")
    shown.wait_for_selector("#L3N0", state="visible")
    assert shown.input_value("#filter") == ""


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with planted neurons that `patterns` was run on."""
    model = planted_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Options", partial(Options, draws=300))  # a null of fewer drawn sets
        run = build(model, texts(160), tmp_path_factory.mktemp("tested") / "run", top=24)
        yield job.patterns(run, model, job.Settings(budget=BUDGET))


def test_tested_patterns_are_a_column_and_a_filter(browser: Any, tested: Run, tmp_path: Path) -> None:
    """A neuron with a verdict says its pattern in its row, on its line and by a button, the clearest first."""
    shown = browser.new_page()
    shown.goto(gallery.write(tested, tmp_path / "tested.html").as_uri())
    names = shown.locator("#neurons thead th").all_inner_texts()
    assert "tested pattern" in names
    shown.click(".filter button[value=tested]")
    rows = shown.locator("#neurons tbody tr:visible")
    said = {
        row.locator("td").nth(0).inner_text(): row.locator("td")
        .nth(names.index("tested pattern"))
        .inner_text()
        for row in rows.all()
    }
    for neuron, word in PLANTED.items():
        assert word.strip() in said[f"L0N{neuron}"] and said[f"L0N{neuron}"].endswith(
            "both ways (precise and complete)"
        )
        chip = shown.locator(f".fold[data-neuron=L0N{neuron}] > summary .mn-tested")
        assert chip.inner_text().startswith("tested: ") and word.strip() in chip.inner_text()
    clearest = [
        str(NeuronId(*pair)) for pair in patterns.clearest(tested, 12).select("layer", "neuron").iter_rows()
    ]
    assert list(said) == list(dict.fromkeys(clearest))
    assert all(said.values())
    shown.click("#neurons thead th >> text='tested pattern'")
    shown.click(".filter button[value='']")
    assert rows.count() > len(said)


def test_without_tests_nothing_is_said_of_them(found_gallery: Any) -> None:
    """No column, no button and no chip where `patterns` was not run."""
    shown, _ = found_gallery
    assert "tested pattern" not in shown.locator("#neurons thead th").all_inner_texts()
    assert shown.locator("#neurons thead th").count() > 5 and shown.locator(".filter button").count() > 3
    assert shown.locator(".filter button[value=tested], .mn-tested, td.tested").count() == 0
