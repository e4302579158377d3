"""Colours: every picture follows the page, light and dark, and its file is right on white paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
from synthetic import make_run
from synthetic_explanation import make
from test_pages import KINDS, study_figures

from mnemoscope.neuron import overview
from mnemoscope.views import figures
from mnemoscope.views.charts import CHARTS, COLOURS, as_file, rendered, strips, svg
from mnemoscope.views.explanation import charts
from mnemoscope.views.explanation.lower import sheet

LEAST = 4.5  # contrast of text, WCAG 2.2 AA
TEXT = re.compile(r"<text[^>]*?fill=\"([^\"]*)\"")


def contrast(a: str, b: str) -> float:
    """Of two colours, as WCAG defines it."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every picture that pages draw, by name."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", layers=2)
    return dict(_pictures(run))


def _pictures(run: object) -> Iterator[tuple[str, str]]:
    for number, strip in enumerate(strips(overview.overview(run))):
        yield f"layer {number}", strip
    lowered = sheet(make())
    for name, chart in charts.drawn(lowered).items():
        yield name, svg(chart.to_dict(validate=False), charts.described(name, lowered))
    for one in study_figures():
        yield one.id, svg(figures.chart(one), one.title)


def test_text_of_every_picture_stands_out_in_both_schemes(pictures: dict[str, str]) -> None:
    """Labels, titles and legends are in colours of the theme that can be read on the page."""
    assert len(pictures) > 20
    for (name, picture), scheme in product(pictures.items(), (0, 1)):
        shades = {shade for shade in TEXT.findall(picture) if shade != "none"}
        assert shades, name
        for shade in shades:
            colour = CHARTS[re.fullmatch(r"var\(--([a-z]+)\)", shade)[1]][scheme]
            for ground in ("panel", "paper"):
                assert contrast(colour, COLOURS[ground][scheme]) >= LEAST, (name, shade, ground)


def test_every_picture_is_described(pictures: dict[str, str]) -> None:
    """A picture is an image with a name; nothing inside of it is read out piece by piece."""
    for name, picture in pictures.items():
        assert re.match(r'<svg role="img" aria-label="[^"]+"', picture), name
        assert picture.count("aria-") == 1, name


def test_a_colour_that_would_stay_is_refused() -> None:
    """A chart in a colour that the theme does not know is our own mistake, found when it is drawn."""
    import altair as alt

    chart = alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point(color="#123456").encode(x="x:Q")
    with pytest.raises(AssertionError, match="#123456 is no colour of the theme"):
        svg(chart.to_dict(validate=False), "a point")


@pytest.mark.slow
def test_files_are_for_white_paper() -> None:
    """A saved figure has no variables, and its text, titles of panels included, is dark on white."""
    panels = [one for one in study_figures() if one.id.endswith("panel")]
    assert len(panels) > len(KINDS)
    for one in panels:
        svg = as_file(rendered(figures.chart(one)), "svg").decode()
        assert "var(" not in svg
        shades = set(TEXT.findall(svg)) - {"none"}
        assert shades and all(contrast(shade, "#ffffff") >= LEAST for shade in shades), (one.id, shades)


def test_chart_colours_can_be_told_apart() -> None:
    """A colour of a chart stands for one variable, and series are seen on the page in both schemes."""
    assert len({light for light, _ in CHARTS.values()}) == len(CHARTS)
    for name, scheme in product(("blue", "orange", "teal", "violet"), (0, 1)):
        assert contrast(CHARTS[name][scheme], CHARTS["panel"][scheme]) >= 3
