"""An explanation in the terminal, as a page and as charts: the same facts, nothing hidden, nothing unescaped."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from synthetic import make_run
from synthetic_explanation import make
from test_views import HOSTILE, Page, assert_self_contained

from mnemoscope.errors import RunError
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.records import NeuronId
from mnemoscope.views.explanation import charts, page, terminal, wording
from mnemoscope.views.explanation.charts import _apart
from mnemoscope.views.explanation.graph import CAUSES, graph
from mnemoscope.views.explanation.lower import sheet
from mnemoscope.views.explanation.sheet import INCREASE, LEFT_OUT, Point, Step
from mnemoscope.views.terminal import plain

GOLDEN = Path(__file__).parent / "golden"
LONG = tuple(f" word{index}" for index in range(60))
CASES = {
    "capital": make(),
    "parallel": make(parallel=True, gated=False, biases=False, foils=(), ablations=0, queries=False),
    "arabic": make(
        ("عاصمة", " فرنسا", "", " هي"), target=" باريس", foils=(" لندن",), promotes=(" مدن",), ablations=0
    ),
    "long": make(LONG, layers=30, heads=2, foils=(), ablations=0),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Every case as a whole page, drawn once."""
    return {name: page.page(one) for name, one in CASES.items()}


@pytest.fixture(scope="module")
def with_run(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    """An explanation whose neurons are those of a synthetic run."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", layers=4, neurons=12)
    return make(layers=4, neurons=12, run=str(run.path))


# -- terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["capital", "parallel"])
def test_terminal_golden(name: str, width: int) -> None:
    """The text is the one kept in tests/golden (write it anew with MNEMOSCOPE_GOLDEN=write)."""
    file = GOLDEN / f"explanation-{name}-{width}.txt"
    found = plain(terminal.report(CASES[name]), width)
    if os.environ.get("MNEMOSCOPE_GOLDEN") == "write":
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 81, 133])
@pytest.mark.parametrize("name", CASES)
def test_terminal_fits(name: str, width: int) -> None:
    """No line is wider than the terminal, and no number is cut."""
    shown = plain(terminal.report(CASES[name]), width)
    assert max(map(cell_len, shown.splitlines())) <= width
    assert not re.search(r"[+-]\d*\.?\d*…", shown)


def test_no_colour_in_a_pipe() -> None:
    """Colour only where there is a terminal; without it the text is whole."""
    shown = []
    for terminal_there in (True, False):
        out = io.StringIO()
        Console(
            file=out, force_terminal=terminal_there, width=100, _environ={"TERM": "xterm-256color"}
        ).print(terminal.report(CASES["capital"]))
        shown.append(out.getvalue())
    assert "\x1b[" in shown[0]
    assert "\x1b" not in shown[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown[0]) == shown[1]


# -- nothing hidden -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 16, None])
@pytest.mark.parametrize("name", CASES)
def test_tables_close(name: str, rows: int | None) -> None:
    """Rows, biases and what is not shown add up to all layers, by either measure, however many rows there are."""
    lowered = sheet(CASES[name], rows=rows)
    ledgers = [lowered.heads, lowered.neurons]
    for one in lowered.against:
        ledgers += [one.heads, one.sources, one.neurons]
    for ledger in ledgers:
        total = ledger.closing[-1]
        for measure in (INCREASE, LEFT_OUT):
            parts = [part.values.get(measure) or 0.0 for part in ledger.rows[:-1]]
            assert math.fsum(parts) == pytest.approx(total.values[measure])
        assert [part.kind for part in ledger.closing][-2:] == ["rest", "total"]


@pytest.mark.parametrize("name", CASES)
def test_with_all_rows_the_remainder_is_the_explanations(name: str) -> None:
    """What the two tables do not show is `Explanation.remainder`, and that of `remainders`."""
    one, lowered = CASES[name], sheet(CASES[name])
    rest = [
        part for ledger in (lowered.heads, lowered.neurons) for part in ledger.closing if part.kind == "rest"
    ]
    assert sum(part.values[INCREASE] or 0.0 for part in rest) == pytest.approx(one.remainder)
    for part, name in zip(rest, ("attention", "ffn"), strict=True):
        kept = one.remainders.filter((pl.col("part") == name) & (pl.col("measure") == "leave_one_out"))
        assert part.values[LEFT_OUT] == pytest.approx(kept["remainder"][0])


@pytest.mark.parametrize("name", CASES)
def test_the_remainder_is_visible(name: str, pages: dict[str, str]) -> None:
    """Every table has its row of what is not shown, in the terminal and on the page."""
    tables = 2 + 3 * len(CASES[name].contrasts)
    shown = plain(terminal.report(CASES[name]), 100)
    assert len(re.findall(r"^not shown ", shown, re.M)) >= tables
    assert pages[name].count('<tr class="rest">') >= tables
    assert "<details" not in pages[name].split("not shown")[0]


@pytest.mark.parametrize("name", CASES)
def test_one_token_of_the_prompt_is_the_explained_one(name: str, pages: dict[str, str]) -> None:
    """Of a decoder it is the last that is shown."""
    assert [token.explained for token in sheet(CASES[name]).tokens][-1:] == [True]
    assert len(re.findall(r'class="\w+ explained"', pages[name])) == 1


@pytest.mark.parametrize("name", CASES)
def test_the_account_adds_up(name: str) -> None:
    """Each line begins where the one before ended, and the last is log p."""
    account = sheet(CASES[name]).account
    for before, after in pairwise(account[:-1]):
        assert after.start == before.stop
    assert account[-1].nats == pytest.approx(CASES[name].log_probability)
    assert account[-2].stop == pytest.approx(CASES[name].log_probability)


def test_the_graph_conserves() -> None:
    """What enters a neuron of the graph adds up to its increase, which is what leaves it."""
    lowered = sheet(CASES["capital"])
    drawn = graph(lowered)
    assert drawn is not None
    for one in lowered.switched:
        into = [edge.nats for edge in drawn.edges if edge.said.split(":")[0].endswith(f"→ {one.name}")]
        assert len(into) == CAUSES + 1
        assert sum(into) == pytest.approx(one.nats)


def test_causes_that_are_left_out_are_in_the_remainder() -> None:
    """Shortened to any length, the causes of a neuron add up to its coefficient and to its increase."""
    for one in sheet(CASES["capital"]).switched:
        for count in range(8):
            some = one.shortened(count)
            assert sum(cause.share for cause in some) == pytest.approx(one.coefficient)
            assert sum(cause.nats or 0.0 for cause in some) == pytest.approx(one.nats)


def test_many_tokens_share_the_last_column() -> None:
    """The grid of a long prompt keeps its sums: tokens without a column are added up in one, and it is said."""
    one = CASES["long"]
    grid = sheet(one).grid
    assert len(grid.words) == 40
    assert "21 together" in wording.grid_line(grid)
    for name, cells in zip(grid.heads, grid.cells, strict=True):
        layer, head = map(int, re.findall(r"\d+", name))
        kept = one.grid.filter((pl.col("layer") == layer) & (pl.col("head") == head))
        assert sum(cells) == pytest.approx(kept["leave_one_out"].sum())


def test_a_head_has_its_attention_behind_it(pages: dict[str, str]) -> None:
    """A cell for each weight that can be seen, in its row and column; the head's name leads there."""
    one = CASES["capital"]
    for pattern in sheet(one).attention:
        layer, head = map(int, re.findall(r"\d+", pattern.name))
        kept = one.attention.filter((pl.col("layer") == layer) & (pl.col("head") == head))
        cells = {
            (pattern.queries[a].position, pattern.sources[b].position): weight
            for a, b, weight in pattern.cells
        }
        assert cells == {(query, source): weight for _, _, query, source, weight in kept.iter_rows()}
        assert pattern.queries[pattern.explained].position == one.position
        assert f'id="attention-{pattern.name}"' in pages["capital"]
        assert wording.attention_line(pattern) in Page(pages["capital"]).text
    assert 'href="#attention-' in pages["capital"]
    assert pages["capital"].count("<rect") >= sum(len(each.cells) for each in sheet(one).attention)


def test_attention_of_a_long_prompt_is_cut_to_what_is_looked_at() -> None:
    """The last rows, up to the explained one, and the columns with most weight in them."""
    one = CASES["long"]
    far = [(0, 0, query, 3, 0.9) for query in range(60)] + [(0, 0, query, query, 0.1) for query in range(60)]
    attention = pl.DataFrame(far, ["layer", "head", "query", "source", "weight"], orient="row")
    (pattern,) = sheet(replace(one, attention=attention)).attention
    assert [word.position for word in pattern.queries] == list(range(28, 60))
    assert pattern.sources[0].position == 3 and pattern.strongest[0] == (pattern.sources[0], 0.9)
    masked = sheet(replace(one, attention=attention, position=10)).attention[0]
    assert masked.queries[masked.explained].position == 10 and len(masked.queries) == 32


def test_foils_along_the_stream_end_where_the_contrast_does() -> None:
    """log p of a foil is that of the target less the difference of their logits, at every point."""
    one = CASES["capital"]
    for point, row in zip(sheet(one).stream, one.stream.iter_rows(named=True), strict=True):
        gap = row["logit"] - row["logit_ London"]
        assert point.log_probability - point.foils[0] == pytest.approx(gap)


# -- the three views agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_three_views_agree(name: str, pages: dict[str, str]) -> None:
    """Every number of the page's tables is in the terminal, given as many rows; the dictionary has it whole."""
    one = CASES[name]
    lowered = sheet(one, rows=page.ROWS)
    shown = " ".join(plain(terminal.report(one, rows=page.ROWS), 250).split())
    read = Page(pages[name]).text
    facts = [lowered.target.word.label, wording.verdict(lowered), wording.shown_line(lowered), lowered.about]
    facts += [*lowered.notes, *lowered.method, lowered.command]
    ledgers = [lowered.heads, lowered.neurons]
    for each in lowered.against:
        facts += [wording.against_line(lowered, each), each.foil.name]
        ledgers += [each.heads, each.sources, each.neurons]
    for ledger in ledgers:
        for part in ledger.rows:
            facts += [
                part.name,
                *(wording.cell(name, part.values[name]) for name in ledger.columns if name in part.values),
            ]
    for fact in facts:
        assert " ".join(fact.split()) in shown, fact
        assert " ".join(fact.split()) in read, fact
    kept = one.to_dict()
    assert kept["remainder"] == one.remainder
    assert [row["neuron"] for row in kept["neurons"]] == one.neurons["neuron"].to_list()


def test_an_explanation_shows_itself(pages: dict[str, str]) -> None:
    """It prints as text, displays itself as HTML in a notebook, and has its charts."""
    one = CASES["parallel"]
    assert str(one) == plain(terminal.report(one))
    body = one._repr_html_().split('<div class="mn">')[1]  # the same whenever it is drawn
    assert re.sub(r"mn[0-9a-f]{8}-", "", body).rsplit("</div>", 1)[0].strip() in pages["parallel"]
    against = ["against ·London", "against ·Bo of ·Bordeaux"]
    assert list(CASES["capital"].plots) == ["stream", "layers", "heads", *against, "carried", "ablated"]


# -- pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_pages_are_whole(name: str, pages: dict[str, str]) -> None:
    """A page loads nothing, names no other place, needs no script, and is drawn the same every time."""
    found = assert_self_contained(pages[name])
    assert "script" not in found.tags
    assert found.tags.count("svg") >= 3
    assert "xmlns" not in pages[name]


def test_hostile_tokens_are_text() -> None:
    """Markup in prompt, target, foil and value tokens is shown as it is, on the page and in every figure."""
    hostile = make(
        (HOSTILE, "\u202e\n", ' role="x" 3.14159', " </text>"),
        target=" <b>x</b>",
        foils=(" <img/>", " <a href=https://evil.example>"),
        promotes=(HOSTILE, "{{ 7 * 7 }}", "https://evil.example"),
    )
    source = page.page(hostile)
    found = Page(source)
    assert {"script", "b", "img"}.isdisjoint(found.tags)
    assert not [key for key, _ in found.attributes if key == "src" or key.startswith("on")]
    assert all(re.fullmatch(r"#[\w-]+", link) for link in found.values("href"))
    for said in (HOSTILE, "<b>x</b>", "{{ 7 * 7 }}", "⟨U+202E⟩↵", 'role="x" 3.14159', "</text>"):
        assert said in found.text, said
    assert (
        found.text.count('·role="x" 3.141…') == 1
    )  # in the heat map, which cuts names; its numbers stay as they are


def test_prompts_run_their_own_way(pages: dict[str, str]) -> None:
    """An Arabic prompt is laid out from the right, and a token that is part of a character is explained."""
    assert '<div class="mn-question" dir="rtl">' in pages["arabic"]
    assert '<div class="mn-question" dir="ltr">' in pages["capital"]
    assert "∅ is a token that is part of a character" in Page(pages["arabic"]).text


def test_sign_is_never_colour_alone(pages: dict[str, str]) -> None:
    """Every bar stands beside its number with its sign, and edges against are dashed."""
    bars = re.findall(r'class="bar (positive|negative)" style="[^"]*">([^<]+)<', pages["capital"])
    assert len(bars) > 50
    assert all((sign == "negative") == value.startswith("-") for sign, value in bars if value != "0.000")
    assert ".mn-graph path.negative { stroke: var(--negative); stroke-dasharray" in pages["capital"]


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file can be made, one line says so."""
    monkeypatch.setattr(page, "page", lambda _: "")
    with pytest.raises(RunError, match="writing the page"):
        CASES["parallel"].save_page(tmp_path)


def test_what_follows_the_position_is_unread() -> None:
    """The rest of a prompt behind the explained position is shown apart, and said not to be read."""
    one = make(prompt="The capital of France is Paris, says the book")
    lowered = sheet(one)
    assert lowered.unread == " Paris, says the book"
    assert "after token 4" in lowered.notes[-1]
    assert "--position 4" in lowered.command
    assert sheet(make()).unread == ""


# -- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_part_has_an_address(name: str, pages: dict[str, str]) -> None:
    """Sections, figures, tokens, and every neuron and head of a table or of the graph: each can be linked to."""
    ids = set(Page(pages[name]).values("id"))
    lowered = sheet(CASES[name], rows=page.ROWS)
    ledgers = [
        lowered.heads,
        lowered.neurons,
        *(one for each in lowered.against for one in (each.heads, each.neurons)),
    ]
    assert {part.name for ledger in ledgers for part in ledger.parts} <= ids
    assert {f"token-{token.position}" for token in lowered.tokens} <= ids
    assert {"stream", "layers", "heads", "neurons", "figure-stream", "figure-heads", "method"} <= ids
    assert {f"switched-{one.name}" for one in lowered.switched} <= ids
    assert not lowered.switched or "figure-switched" in ids


def test_arrows_and_boxes_lead_somewhere(pages: dict[str, str]) -> None:
    """Each arrow of the graph is a link to what its neuron is made of, each neuron to its row."""
    drawn = graph(sheet(CASES["capital"]))
    assert drawn is not None
    picture = pages["capital"].split('<svg class="mn-graph"')[1].split("</svg>")[0]
    for edge in drawn.edges:
        assert re.search(rf'<a href="#{edge.leads}">\s*<path[^>]* d="{re.escape(edge.path)}"', picture), edge
    for box in drawn.boxes:
        assert box.role != "neuron" or re.search(rf'<a href="#{box.name}">\s*<g class="neuron">', picture)


@pytest.mark.slow
def test_explanations_in_one_notebook_keep_their_addresses_apart() -> None:
    """Two outputs with the same neurons do not share an id, and each links to itself."""
    both = [make(), make(target=" Lyon")]
    first, second = (Page(one._repr_html_()) for one in both)
    assert set(first.values("id")).isdisjoint(second.values("id"))
    for one in (first, second):
        assert {link[1:] for link in one.values("href")} <= set(one.values("id"))


# -- memories of a run --------------------------------------------------------------------------------------


def test_neurons_come_with_triggers_of_the_run(with_run: Explanation) -> None:
    """With a run the neurons that matter most have two triggers of the coefficient's sign, and their kurtosis."""
    lowered = sheet(with_run, rows=10)
    remembered = [part for part in lowered.neurons.parts if part.memory]
    assert len(remembered) == 10
    for part in remembered:
        memory, coefficient = part.memory, part.values["coefficient"] or 0.0
        assert memory is not None
        assert len(memory.triggers) <= 2
        assert all(one.coefficient * coefficient > 0 for one in memory.triggers)
    shown = plain(terminal.report(with_run), 100)
    assert shown.count("in the run: strongest") == 10


def test_a_run_that_is_gone_is_said(with_run: Explanation, tmp_path: Path) -> None:
    """An explanation outlives its run: triggers are left out, and a note says so."""
    lowered = sheet(replace(with_run, run=str(tmp_path / "gone")))
    assert all(part.memory is None for part in lowered.neurons.parts)
    assert lowered.notes[-1].startswith("triggers are left out: ")


# -- small parts --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 0), min_size=1, max_size=8), st.floats(0.1, 5))
def test_labels_do_not_touch(values: list[float], gap: float) -> None:
    """Labels at the ends of lines keep their order and their distance, and the topmost stays where it is."""
    places = _apart(values, gap)
    assert max(places) == max(values)
    ordered = sorted(places, reverse=True)
    assert all(a - b >= gap - 1e-9 for a, b in pairwise(ordered))


@given(st.floats(-50, 50))
def test_nats_say_their_sign(value: float) -> None:
    """An increase reads back to three decimals, with a sign unless it is shown as nothing."""
    shown = wording.nats(value)
    assert float(shown) == pytest.approx(value, abs=5.1e-4)
    assert (shown[0] in "+-") == (float(shown) != 0)


def test_neurons_are_addressed_as_everywhere() -> None:
    """The names in the tables are addresses that other commands take."""
    for part in sheet(CASES["capital"]).neurons.parts:
        assert str(NeuronId.parse(part.name)) == part.name


# -- without torch ------------------------------------------------------------------------------------------

_CHECK = """
import sys
sys.path.insert(0, {tests!r})
import mnemoscope.api
from synthetic_explanation import PIECES, make
from mnemoscope.views.terminal import plain
from mnemoscope.views.explanation import page, terminal
one = make(foils=(), ablations=0, queries=False)
str(one), one._repr_html_(), one.to_dict()
heavy = {{"torch", "transformers", "numba"}}
print(sorted(heavy & set(sys.modules)))
sys.modules["torch"] = sys  # a stand-in, to see that it would be noticed
print(sorted(heavy & set(sys.modules)))
"""


def test_showing_never_imports_torch() -> None:
    """Terminal, page and charts of an explanation leave torch alone; a stand-in for torch is noticed."""
    code = _CHECK.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['torch']"], done.stderr


@pytest.mark.parametrize("first", [0, 2])
def test_axes_count_layers_as_addresses_do(first: int) -> None:
    """Those of a decoder come behind the encoder's: the first bar stands over its own number."""
    rows = [Step(layer, part, 0.1) for layer in (first, first + 1) for part in ("attention", "FFN")]
    drawn = charts.steps(rows).to_dict()
    for panel in drawn["vconcat"]:
        x = panel["layer"][0]["encoding"]["x"]
        assert x["scale"]["domain"] == [first - 0.5, first + 1.5] and x["axis"]["values"] == [
            first,
            first + 1,
        ]
    points = [Point(f"P{at}", first + layer, "FFN", -1.0, 0, ()) for at, layer in enumerate((0, 0, 0, 1, 1))]
    axis = charts._stream_axis(points, labels=True).to_dict()
    assert axis["values"] == [0, 2] and axis["labelExpr"] == f"datum.value / 2 + {first}"
