"""The card in the terminal and on pages: the same facts, nothing unescaped, nothing from outside."""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from synthetic import make_run

from mnemoscope.errors import RunError
from mnemoscope.model.table import Outcome
from mnemoscope.neuron import find, striking
from mnemoscope.neuron.card import Example, Histogram, KeyToken, NeuronCard, Side, Statistics, ValueToken
from mnemoscope.neuron.card import card as card_of
from mnemoscope.records import NeuronId
from mnemoscope.run.reading import Run
from mnemoscope.views import answers, gallery, words
from mnemoscope.views.card import card as printed
from mnemoscope.views.page import fragment
from mnemoscope.views.page import page as page_of
from mnemoscope.views.terminal import plain

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = '<script>alert("x")</script>'


def example(coefficient: float, before: str, active: str, after: str, **changes: object) -> Example:
    """An example whose tokens are words with the space before them."""
    words = re.findall(r"\s*\S+", after)
    given = Example(
        coefficient=coefficient,
        context=3,
        position=len(before.split()),
        document=1,
        offset=0,
        title="Geography of Australia",
        before=tuple(re.findall(r"\s*\S+", before)),
        active=active,
        after=tuple(words),
        next_token=words[0].replace(" ", "·") if words else None,
        left_out=(0, 0),
        gate=-1,
        up=1,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


STATISTICS = Statistics(
    tokens=248_668,
    mean=-0.0312,
    std=0.61,
    skewness=-2.4,
    kurtosis=48.1,
    min=-21.4,
    max=6.1,
    positive_fraction=0.41,
    value_norm=1.31,
    key_norm=0.92,
    up_norm=0.88,
    value_max_probability=0.041,
    value_entropy=8.31,
)
CARD = NeuronCard(
    layer=24,
    neuron=1005,
    model="SmolLM2-135M",
    layers=30,
    neurons=1536,
    vocabulary=49_152,
    gated=True,
    activation="silu",
    lens="own",
    corpus="sample:wikipedia",
    state=None,
    statistics=STATISTICS,
    layer_median=replace(STATISTICS, kurtosis=3.1, min=-4.2, max=4.0, skewness=0.02, positive_fraction=0.47),
    histogram=Histogram(
        (2, 9, 40, 300, 9_000, 120_000, 90_000, 2_000, 30, 5), (-24, -16, -8, -4, -1, -0.1, 0, 0.5, 2, 4, 8)
    ),
    promoted=(ValueToken(7, "noqa", 9.1, 0.041), ValueToken(8, HOSTILE, 8.2, 0.02)),
    suppressed=(ValueToken(9, "·capitals", -11.5, 1e-9), ValueToken(10, "·עיר", -11.0, 2e-9)),
    key_positive=(KeyToken(11, "·capital", 0.41),),
    key_negative=(KeyToken(12, "首都", -0.52),),
    positive=Side(
        1, 50, 3.9, (50, 0, 0, 0), (example(6.1, "def check(", "self", "): # noqa", next_token=None),)
    ),
    negative=Side(
        -1,
        50,
        -16.2,
        (0, 38, 12, 0),
        (
            example(
                -21.4,
                "The country is a federation of six states on a continent of its own, and Canberra is the",
                " capital",
                " of Australia, chosen in 1908.",
                left_out=(40, 12),
            ),
            example(-20.9, "מרכז המדינה הוא", " עיר", " הבירה ירושלים", title="ירושלים"),
            example(-19.0, "日本 の", "首都", " は 東京", title="東京"),
            example(-16.2, f"A page with {HOSTILE} in it names the", " <b>capital</b>", " &amp;"),
        ),
    ),
    between=(example(-8.0, "It is a large", " town", " by the river"), example(0.1, "Six", " cows", "")),
    command="mnemoscope show runs/smollm2 L24N1005",
)
_NOTHING = Side(1, 0, None, None, ())
DEAD = replace(
    CARD,
    neuron=0,
    state="dead",
    statistics=replace(
        STATISTICS, mean=0, std=0, skewness=None, kurtosis=None, min=0, max=0, positive_fraction=0
    ),
    histogram=Histogram((248_668,), (-1e-4, 1e-4)),
    positive=_NOTHING,
    negative=replace(_NOTHING, polarity=-1),
    between=(),
)
ONE_SIDED = replace(
    CARD,
    gated=False,
    activation="relu",
    statistics=replace(STATISTICS, min=0.0, up_norm=None),
    histogram=Histogram((120_000, 2_000, 30, 5), (-1e-4, 1e-4, 2, 4, 8)),
    positive=replace(CARD.positive, quadrants=None),
    negative=replace(_NOTHING, polarity=-1),
)
CARDS = {"two-sided": CARD, "dead": DEAD, "one-sided": ONE_SIDED}
PICK = striking.Pick(NeuronId(24, 1005), "peaked", 48.1, 3.1)


class Page(HTMLParser):
    """A page's elements, ids, links and text; fails on a tag that is not closed or not open."""

    VOID = frozenset({"meta", "input", "br", "line", "path", "rect", "use", "hr", "wbr"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, with runs of whitespace as one space."""
        return re.sub(r"\s+", " ", "".join(self.said))

    def values(self, name: str) -> list[str]:
        """All values of one attribute."""
        return [value or "" for key, value in self.attributes if key == name]


def assert_self_contained(source: str) -> Page:
    """No address of another place, nothing that loads, no handler in an attribute, every id once."""
    page = Page(source)
    assert not re.search(r"(?i)https?:|//\w|url\(|@import|<link|<iframe|<img|<object|javascript:", source)
    assert page.values("src") == []
    assert all(link.startswith("#") for link in page.values("href"))
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href")} <= set(ids)
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A gated run of 3 layers of 12 neurons."""
    return make_run(tmp_path_factory.mktemp("runs") / "gated", layers=3, neurons=12)


# -- wording ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (-21.43, "-21.4"),
        (0.001234, "0.0012"),
        (48.06, "48.1"),
        (12_345.6, "12,346"),
        (999.6, "1000"),
        (2e-5, "2.0e-5"),
        (3.2e7, "3.2e7"),
    ],
)
def test_number_is_short_and_plain(value: float | None, shown: str) -> None:
    """Numbers have about three digits, thousands are grouped, and what is undefined is a dash."""
    assert words.number(value) == shown


@given(st.floats(-1e12, 1e12).filter(lambda value: abs(value) > 1e-12))
def test_number_reads_back(value: float) -> None:
    """A shown number is the value to within 6 % (two digits at the worst), sign and all."""
    assert float(words.number(value, sign=True).replace(",", "")) == pytest.approx(value, rel=0.06)


@given(st.floats(0, 1))
def test_share_never_rounds_to_all_or_nothing(value: float) -> None:
    """0 % and 100 % are said only of exactly none and all."""
    assert (words.share(value) == "0 %") == (value == 0)
    assert (words.share(value) == "100 %") == (value == 1)


@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=30),
    st.floats(-50, 50),
    st.floats(-50, 50),
    st.integers(8, 200),
)
def test_columns_keep_every_count(counts: list[int], a: float, b: float, most: int) -> None:
    """Redrawing a histogram loses nothing, has an edge at zero, covers the range, and fits."""
    low, high = sorted((a, b))
    if high - low < 1e-3:
        high = low + 1e-3
    width = (high - low) / len(counts)
    edges = [low + width * i for i in range(len(counts))] + [high]
    card = replace(
        CARD,
        statistics=replace(STATISTICS, min=low, max=high),
        histogram=Histogram(tuple(counts), tuple(edges)),
    )
    columns = words.columns(card, most)
    assert columns is not None
    assert sum(columns.counts) == pytest.approx(sum(counts), rel=1e-6)
    assert len(columns.counts) <= most
    assert columns.left / columns.width == pytest.approx(round(columns.left / columns.width))
    assert columns.left <= low + 1e-6
    assert columns.left + columns.width * len(columns.counts) >= high - 1e-6
    assert all(0 <= height <= 1 for height in columns.heights)


def test_open_bins_end_at_the_extremes() -> None:
    """The first and last bin reach to infinity; they are drawn to the least and the greatest coefficient."""
    infinite = (-math.inf, *CARD.histogram.edges[1:-1], math.inf)
    columns = words.columns(replace(CARD, histogram=Histogram(CARD.histogram.counts, infinite)), 60)
    assert columns is not None
    assert sum(columns.counts) == pytest.approx(CARD.histogram.total)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [("שלום", True), ("2 مرحبا", True), ("Paris", False), ("東京", False), ("12 !", False)],
)
def test_direction_is_that_of_the_first_letter(sample: str, expected: bool) -> None:
    """Digits and punctuation do not decide which way a text runs."""
    assert words.is_right_to_left(sample) is expected


def test_every_reason_has_its_null(run: Run) -> None:
    """Each number that a neuron was chosen for stands beside a layer median or an expected count."""
    for pick in striking.Striking(run).handful(6):
        said = words.reason(pick)
        assert pick.criterion == "chance" or "layer median" in said or "expected" in said


# -- terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", CARDS)
def test_terminal_golden(name: str, width: int) -> None:
    """The card as text is the one kept in tests/golden (write it anew with MNEMOSCOPE_GOLDEN=write)."""
    file = GOLDEN / f"{name}-{width}.txt"
    found = plain(printed(CARDS[name], pick=PICK if name == "two-sided" else None), width)
    if os.environ.get("MNEMOSCOPE_GOLDEN") == "write":
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 81, 100, 133, 200])
def test_terminal_fits(width: int, run: Run) -> None:
    """No line is wider than the terminal, and a wide one is used."""
    for card in (*CARDS.values(), card_of(run, (1, 5)), card_of(run, (0, 2))):
        lines = plain(printed(card), width).splitlines()
        assert max(map(cell_len, lines)) <= width
        assert max(map(cell_len, lines)) > min(width, 100) - 25


@pytest.mark.parametrize("width", range(50, 84))
def test_a_title_stands_apart_from_what_is_beside_it(width: int) -> None:
    """However narrow the terminal, the title of a side is whole and does not run into the signs of gate and up."""
    titled = words.side_title(CARD.negative, len(CARD.negative.examples))
    (head,) = (line for line in plain(printed(CARD), width).splitlines() if line.startswith(titled))
    assert not head.removeprefix(titled)[:1].strip()


def test_terminal_shows_twelve_tokens_before() -> None:
    """On a narrow terminal too, twelve tokens stand before the active one, which is bracketed."""
    shown = " ".join(plain(printed(CARD), 60).split())
    assert "…six states on a continent of its own, and Canberra is the [capital] → ·of" in shown


def test_colour_only_where_it_is_wanted() -> None:
    """The active token is styled in colour and bracketed without: with NO_COLOR, or in a pipe."""
    colour = _printed({}, terminal=True)
    assert "\x1b[" in colour
    assert "[capital]" not in colour
    pipe, plain = _printed({}, terminal=False), _printed({"NO_COLOR": "1"}, terminal=True)
    assert "\x1b" not in pipe
    assert "[capital]" in pipe
    assert "[capital]" in re.sub(r"\x1b\[[0-9;]*m", "", plain)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38;|48;)", plain)


def _printed(environment: dict[str, str], *, terminal: bool) -> str:
    out = io.StringIO()
    settings = {"TERM": "xterm-256color", **environment}
    Console(file=out, force_terminal=terminal, width=100, _environ=settings, legacy_windows=False).print(
        printed(CARD)
    )
    return out.getvalue()


def test_search_results_say_question_null_and_rows(run: Run) -> None:
    """A search in the terminal shows what was asked, what to compare with, and the neurons found."""
    found = find.trigger(run, " capital of")
    shown = plain(answers.found(found), 100)
    assert found.rows["neuron"][0] in shown
    assert "expected: as many random positions" in shown
    assert max(map(cell_len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("differing", "largest", "verdict"),
    [(0, 0.0, "identical"), (0, 1e-7, "no difference"), (3, 0.2, "differences found")],
)
def test_verification_says_its_verdict_first(differing: int, largest: float, verdict: str) -> None:
    """A verification begins with the verdict and lists how much was compared and how much differs."""
    check = SimpleNamespace(
        name="triggers", compared=12_345, differing=differing, largest=largest, note="shard 3"
    )
    result = SimpleNamespace(checks=(check,), passed=not differing, identical=not differing and not largest)
    shown = plain(answers.verification(result)).splitlines()
    assert shown[0] == f"verification: {verdict}"
    assert shown[2].split()[:3] == ["triggers", "12,345", str(differing)]


def test_run_heading_and_lists(run: Run) -> None:
    """The heading names model and corpus; families and facts of a model are printed whole."""
    shown = plain(answers.heading(run))
    assert "synthetic · 3 layers of 12 neurons" in shown
    assert "tokens counted" in shown
    outcomes = [Outcome("gpt2", "causal", 1e-7, None), Outcome("rwkv", "causal", None, "it has no FFN")]
    listed = plain(answers.families(outcomes))
    assert "1 of 2" in listed and "gpt2" in listed.split() and "rwkv: it has no FFN" in listed
    facts = plain(answers.anatomy({"self_check": 1e-7, "gated": True, "revision": None}))
    assert facts.split() == ["self", "check", "1.0e-7", "gated", "yes", "revision", "–"]


def test_card_shows_itself() -> None:
    """A card prints as text and displays itself as HTML in a notebook."""
    assert "L24N1005" in str(CARD)
    assert CARD._repr_html_() == fragment(CARD)


# -- pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("lower", [fragment, page_of])
def test_pages_are_whole_and_escaped(name: str, lower: object) -> None:
    """A card's HTML is well-formed, loads nothing, and shows hostile tokens as text."""
    source = lower(CARDS[name])  # type: ignore[operator]
    page = assert_self_contained(source)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert HOSTILE in page.text


@pytest.mark.parametrize("name", CARDS)
def test_three_views_agree(name: str) -> None:
    """Every fact of the card is in the terminal, on the page and in the dictionary."""
    card = CARDS[name]
    shown = " ".join(plain(printed(card, 50), 400).split())
    page = Page(page_of(card)).text
    assert card.to_dict()["statistics"]["kurtosis"] == card.statistics.kurtosis
    facts = [str(card.id), card.model, *(fact.value for fact in words.facts(card) + words.details(card))]
    facts += [token.text for token in (*card.promoted, *card.suppressed, *card.key_positive)]
    for each in (*card.positive.examples, *card.negative.examples, *card.between):
        facts += [words.number(each.coefficient, sign=True), words.active(each)[1], words.source(each)]
    facts += [note for note in (words.state_note(card), words.threshold_note(card)) if note]
    for fact in facts:
        assert fact in shown, fact
        assert fact in page, fact


def test_right_to_left_rows_run_right_to_left() -> None:
    """A Hebrew example is laid out from the right in its own box; the others are not."""
    source = page_of(CARD)
    assert source.count('<div class="mn-text" dir="rtl">') == 1
    assert "מרכז המדינה הוא" in source
    assert "首都" in source


def test_sign_is_never_colour_alone() -> None:
    """Every coefficient shows its sign, and active tokens are boxed whatever their colour."""
    sizes = re.findall(r'class="size (negative|positive)">([^<]+)<', page_of(CARD))
    assert len(sizes) == 7
    assert all((sign == "negative") == value.startswith("-") for sign, value in sizes)
    assert all(value[0] in "+-" for _, value in sizes)


def test_spaces_of_tokens_are_visible() -> None:
    """The space that a value token begins with is shown as a dot."""
    assert '<span class="mn-space">·</span>capitals' in page_of(CARD)


def test_gallery_is_one_whole_page(run: Run, tmp_path: Path) -> None:
    """The gallery loads nothing, links only to itself, holds every layer, and names and counts the dead."""
    steps: list[object] = []
    file = gallery.write(run, tmp_path / "new" / "gallery.html", neurons_per_layer=6, progress=steps.append)
    source = file.read_text(encoding="utf-8")
    page = assert_self_contained(source)
    assert page.tags.count("script") == 1
    assert "xmlns" not in source
    for layer in range(3):
        assert f"L{layer}" in page.values("id")
        assert f"L{layer}N0" in page.values("id")
    assert page.text.count("dead: its coefficient was 0 on every one of") == 3
    assert "1 dead" in page.text
    assert page.tags.count("article") >= 18
    assert len(steps) == 4


def test_value_tokens_are_scored_at_the_sign_that_they_are_read_with() -> None:
    """What a negative coefficient writes has a positive logit there, and no probability of the other sign."""
    for card in (CARD, ONE_SIDED):
        sign, source = card.sides[0].polarity, page_of(card)
        titles = re.findall(r'class="mn-token" dir="auto" title="([^"]*)"', source)
        tokens = [token for _, row in words.readings(card) for token in row]
        assert len(titles) == len(tokens) == 4
        for token, title in zip(tokens, titles, strict=True):
            found = re.fullmatch(
                r"logit ([+-][\d.]+) at coefficient ([+-]1)(?:, probability ([\d.e-]+))?", title
            )
            assert found, title
            assert float(found[1]) == pytest.approx(sign * token.logit) and int(found[2]) == sign
            assert (found[3] is None) == (sign < 0)
            assert found[3] is None or float(found[3]) == pytest.approx(token.probability, rel=0.05)


def test_gallery_says_what_it_is_and_how_to_get_the_rest(run: Run) -> None:
    """So many chosen of so many, with commands for this run; every card is folded under a line with its reason."""
    page = Page(gallery.render(run, neurons_per_layer=2))
    shown = page.tags.count("article")
    assert f"{shown} chosen of 36 neurons" in page.text
    folder = shlex.quote(str(run.path))
    assert (
        f"mnemoscope show {folder} L1N3" in page.text and f"mnemoscope find {folder} --promotes" in page.text
    )
    assert page.values("data-run") == [folder]
    assert len(page.values("data-neuron")) == shown and "open" not in dict(page.attributes)


@pytest.mark.slow
def test_gallery_is_repeatable(run: Run) -> None:
    """The same run gives the same page, byte for byte."""
    assert gallery.render(run, neurons_per_layer=2) == gallery.render(run, neurons_per_layer=2)


def test_gallery_that_cannot_be_written_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """Where no file can be made, one line says so and no part of a page is left."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="writing the gallery"):
        gallery.write(run, tmp_path / "taken", neurons_per_layer=1)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_gallery_of_a_dead_model(tmp_path: Path) -> None:
    """A run whose neurons are all dead has a gallery too."""
    source = gallery.render(make_run(tmp_path / "run", layers=2, neurons=1))
    assert_self_contained(source)
    assert source.count("dead: its coefficient was 0 on every one of") == 2


# -- without torch ------------------------------------------------------------------------------------------

_CHECK = """
import sys
from mnemoscope import open_run
from mnemoscope.neuron import find
from mnemoscope.neuron.card import card as card_of
from mnemoscope.views import answers, card as drawn, gallery, page
from mnemoscope.views.terminal import plain
run = open_run(sys.argv[1])
card = card_of(run, (1, 5))
plain(drawn.card(card)), page.page(card), gallery.render(run, neurons_per_layer=1)
plain(answers.found(find.sort(run, "kurtosis")))
heavy = {"torch", "transformers", "numba"}
print(sorted(heavy & set(sys.modules)))
sys.modules["torch"] = sys  # a stand-in, to see that it would be noticed
print(sorted(heavy & set(sys.modules)))
"""


def test_reading_never_imports_torch(run: Run) -> None:
    """Opening a run, drawing a neuron, searching and a gallery leave torch alone; a stand-in for it is noticed."""
    done = subprocess.run([sys.executable, "-c", _CHECK, str(run.path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['torch']"], done.stderr


@pytest.mark.parametrize("layer", [None, 1])
def test_neurons_with_the_same_triggers_are_counted_one_by_one(layer: int | None, tmp_path: Path) -> None:
    """Common positions of each list with each of the neuron's two; expected is their mean over all lists of others."""
    run = make_run(tmp_path / "run", layers=3, neurons=12)
    lists: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
    for row in run.table("triggers").collect().iter_rows(named=True):
        unit = (row["layer"], row["neuron"], row["polarity"])
        lists.setdefault(unit, set()).add((row["context"], row["position"]))
    others = {
        unit: places for unit, places in lists.items() if unit[:2] != (1, 3) and layer in (None, unit[0])
    }
    wanted, expected = {}, {}
    for sign in (1, -1):
        own = lists.get((1, 3, sign), set())
        common = {unit: len(own & places) for unit, places in others.items()}
        expected["+" if sign > 0 else "-"] = sum(common.values()) / len(others)
        for unit, count in common.items():
            if count:
                wanted[f"L{unit[0]}N{unit[1]}", "+" if unit[2] > 0 else "-", "+" if sign > 0 else "-"] = count
    hits = find.like(run, "L1N3", layer=layer, count=find.ALL)
    rows = {(row["neuron"], row["sign"], row["as"]): row["common"] for row in hits.rows.iter_rows(named=True)}
    assert wanted and rows == wanted and hits.total == len(wanted)
    assert hits.rows["common"].is_sorted(descending=True)
    for sign, value in hits.rows.select("as", "expected").unique().iter_rows():
        assert value == pytest.approx(expected[sign])
    assert find.like(run, "L1N3", layer=layer, count=2).rows.equals(hits.rows.head(2))
    assert "built without null units" in hits.null
