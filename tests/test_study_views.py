"""Figures and the report: every kind draws, nothing is asked of a network, hostile text stays text."""

from __future__ import annotations

import re
import shlex
from html import unescape
from pathlib import Path

import polars as pl
import pytest
from synthetic import make_run
from test_views import Page

from mnemoscope.errors import RunError
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings.finding import KINDS, Figure, Finding, Section, bar, items
from mnemoscope.views import charts, figures, findings, report, words

FRAME = pl.DataFrame(
    {
        "layer": [0, 1, 2, 0, 1, 2],
        "end": [1, 2, 3, 1, 2, 3],
        "series": ["<b>one</b>"] * 3 + ["two"] * 3,
        "panel": ["left"] * 3 + ["right"] * 3,
        "value": [0.1, 0.5, None, 0.3, 0.2, 0.9],
        "low": [0.0, 0.4, None, 0.2, 0.1, 0.8],
        "high": [0.2, 0.6, None, 0.4, 0.3, 1.0],
    }
)
BAND = {"null": "low", "null_low": "low", "null_high": "high"}


def finding(kind: str, **more: str) -> Finding:
    figure = Figure(
        kind, "layer", "value", "layer", "share (%)", color="series", x2="end", share=True, **more
    )
    return Finding(
        f"some-{kind}", ("A21",), "A <script>title</script>", "It is so.", FRAME, figure, null="chance"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made by hand."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_with_its_axes(kind: str) -> None:
    """Each kind becomes a picture with its axis titles, with nulls left out, alone or in panels."""
    color = {"color": "value"} if kind == "heat" else {}
    whole = finding(kind)
    for extra in ({}, {"facet": "panel"}):
        assert whole.figure is not None
        one = Finding(
            **{**whole.__dict__, "figure": Figure(**{**whole.figure.__dict__, **extra, **color, **BAND})}
        )
        drawn = figures.chart(one)
        assert drawn is not None
        svg = charts.svg(drawn, "what it shows")
        assert (
            svg.startswith('<svg role="img" aria-label="what it shows"')
            and "layer" in svg
            and "share (%)" in svg
        )
        assert "NaN" not in svg and "<b>" not in svg


def test_what_is_left_is_grey() -> None:
    """The rest has no colour of its own, and the others keep theirs."""
    plain, grey = (charts.svg(figures.chart(finding("stack", **more)), "") for more in ({}, {"rest": "two"}))
    first, second, chance = "var(--blue)", "var(--orange)", "var(--chance)"
    assert first in plain and second in plain and chance not in plain
    assert first in grey and second not in grey and chance in grey


def test_a_finding_without_rows_or_figure_has_no_picture() -> None:
    """There is nothing to draw, and no error."""
    assert figures.chart(Finding("bare", ("A2",), "t", "s", FRAME)) is None
    empty = finding("line")
    assert figures.chart(Finding(**{**empty.__dict__, "frame": FRAME.clear()})) is None


def test_a_finding_names_columns_that_exist() -> None:
    """A figure of a column that the frame lacks is our own mistake, found at once."""
    with pytest.raises(AssertionError):
        finding("line", low="nothing")
    with pytest.raises(AssertionError):
        Finding("Bad Id", ("A21",), "t", "s", FRAME)
    with pytest.raises(AssertionError):
        Finding("bad-item", ("A81",), "t", "s", FRAME)


def test_the_report_holds_everything_and_needs_nothing(run: Run, tmp_path: Path) -> None:
    """Sections, sentences and tables on one page; figures and tables as files; no address, no script."""
    sections = [
        Section("s", "A section", (finding("line", low="low", high="high"), Finding("bare", ("A2",), "t", "s", FRAME))),
        Section("m", "Not there", (), "the run has no table x"),
    ]  # fmt: skip
    path = report.write(run, sections, tmp_path / "deep" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "&lt;script&gt;title" in page and "Not measured: the run has no table x" in page
    names = sorted(file.name for file in (tmp_path / "deep" / "report_files").iterdir())
    assert names == [
        "bare.csv", "bare.parquet", "some-line.csv", "some-line.parquet", "some-line.pdf", "some-line.svg",
    ]  # fmt: skip
    assert pl.read_parquet(tmp_path / "deep" / "report_files" / "bare.parquet").equals(FRAME)
    assert (tmp_path / "deep" / "report_files" / "some-line.pdf").read_bytes().startswith(b"%PDF")


def test_items_say_where_they_are_or_how_to_get_them(run: Run) -> None:
    """An item of this page leads to its figure; of the others the command for this run is there; no more."""
    page = report.render(run, [Section("s", "A section", (finding("line"),))], items=items())
    rows = dict(re.findall(r'<tr id="(A\d+)">(.*?)</tr>', page, re.S))
    assert list(rows) == [f"A{n}" for n in range(1, 81)]
    assert '<a href="#some-line">' in rows["A21"] and "not measured" not in rows["A21"]
    folder = shlex.quote(str(run.path))
    assert "not measured" in rows["A9"] and f"mnemoscope study -o {folder} --only removal" in rows["A9"]
    assert f"mnemoscope show {folder}" in rows["A4"] and "measured: it is the run" in rows["A4"]
    assert not re.search(r"test_\w+\.py|>done<|\bRUN\b|\bMODEL\b", page)


def test_a_measurement_that_lacks_says_its_command(run: Run) -> None:
    """What is missing is named with the folder of this run, ready to be typed."""
    section = Section("m", "Not there", (), "the run has no table x; add it with `mnemoscope patterns RUN`")
    page = report.render(run, [section])
    assert f"<code>mnemoscope patterns {shlex.quote(str(run.path))}</code>" in page


def test_every_part_of_a_report_has_an_address(run: Run) -> None:
    """Sections, findings, figures and items: each once, and every link inside the page leads to one."""
    sections = [Section("kinds", "Kinds", tuple(finding(kind) for kind in ("line", "bar")))]
    found = Page(report.render(run, sections, items=items()))
    ids, links = found.values("id"), [link[1:] for link in found.values("href") if link.startswith("#")]
    assert len(ids) == len(set(ids)) and set(links) <= set(ids)
    assert {"kinds", "some-line", "figure-some-line", "A21", "items"} <= set(ids) & {
        *links,
        "figure-some-line",
    }


def test_two_runs_are_both_named(run: Run, tmp_path: Path) -> None:
    """A comparison says of both which model and text they are, and where their data lie."""
    other = make_run(tmp_path / "other", layers=2)
    page = report.render(run, [], beside=[other], title="one and two")
    for one in (run, other):
        assert str(one.path) in page and words.model_line(one.manifest) in unescape(page)
    assert words.model_line(run.manifest) != words.model_line(other.manifest)
    assert str(other.path) not in report.render(run, [])


def test_a_report_that_cannot_be_written_is_said(run: Run, tmp_path: Path) -> None:
    """A file where a folder must be: one line, and nothing half-written."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="writing the report"):
        report.write(run, [], tmp_path / "file" / "report.html")


def test_the_terminal_says_every_sentence() -> None:
    """Titles, sentences and what is missing."""
    from rich.console import Console

    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(
            findings.findings(
                [Section("s", "A section", (finding("line"),)), Section("m", "M", (), "no table")]
            )
        )
    said = captured.get()
    assert "It is so." in said and "not measured: no table" in said and "A21" not in said


def test_bars_of_several_series_are_not_stacked() -> None:
    """Over numbers as over names they stand beside each other, each as high as its own value."""
    frame = pl.DataFrame({"x": [1, 1, 2, 2], "series": ["a", "b"] * 2, "value": [0.5, 0.25, -0.5, 0.75]})
    figure = bar(frame, "share", x="x", color="series")
    drawn = figures.chart(Finding("id", ("A2",), "title", "It is so.", frame, figure)).to_dict()
    bars = [layer for layer in drawn["layer"] if layer["mark"]["type"] == "bar"]
    assert all(layer["encoding"]["xOffset"]["field"] == "series" for layer in bars) and bars
