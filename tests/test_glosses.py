"""Names of statistics say what they mean: on every page, once, under every way of asking."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from starlette.testclient import TestClient
from synthetic import make_run
from test_views import CARD

import mnemoscope as mn
from mnemoscope.atlas.app import create
from mnemoscope.atlas.library import Shelf
from mnemoscope.views import words
from mnemoscope.views.glosses import GLOSSES, every_gloss, gloss, glosses, mark, term, termed
from mnemoscope.views.page import fragment, page

HERE = "http://127.0.0.1:8321"


def asked(html: str) -> list[str]:
    """Which sentences the names on a page ask for."""
    return re.findall(r'popovertarget="([^"]*)"', html)


def said(html: str) -> list[str]:
    """Which sentences are there to be shown."""
    return re.findall(r'<div [^>]*id="([^"]*)" popover', html)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished run without a model."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "run").path)


@pytest.fixture(scope="module")
def client(run: mn.Run) -> TestClient:
    """A browser on this machine."""
    return TestClient(create([run]), base_url=HERE)


def test_every_statistic_has_a_sentence(run: mn.Run) -> None:
    """Those of a card, and those by which a layer is sorted, whatever they are called there."""
    facts = [fact.name for fact in (*words.facts(CARD), *words.details(CARD))]
    assert len(facts) > 10
    for name in (*facts, *Shelf("run", run).statistics, "coefficient", "layer median"):
        meaning = gloss(name)
        assert name == "tokens" or (meaning and meaning.endswith((".", ")."))), name
        assert meaning is None or len(meaning) < 190, name


def test_each_sentence_has_one_address() -> None:
    """No two names share one, and whoever shows all of them shows each once."""
    places = said(every_gloss())
    assert len(places) == len(set(places)) == len(GLOSSES)


@given(st.text())
def test_a_text_stays_the_text_that_it_was(text: str) -> None:
    """Nothing is said of what is no name; without the buttons everything is as it was, and none of it is markup."""
    for made in (termed(text), term(text)):
        bare = re.sub(r"</?(?:button|span)[^>]*>", "", made)
        assert bare == str(escape(text))


def test_a_sentence_names_each_thing_once() -> None:
    """The first time; a longer name is not taken for the shorter one in it, nor a part of a word for a name."""
    made = termed("excess kurtosis, kurtosis <b>, average precision and precision, recalled with F1")
    assert asked(made) == ["gloss-excess-kurtosis", "gloss-average-precision", "gloss-precision", "gloss-f1"]
    assert "kurtosis</button>,</span> kurtosis &lt;b&gt;" in made
    assert asked(termed("36 of 50 negative triggers (expected 3), a trigger")) == [
        "gloss-trigger",
        "gloss-expected",
    ]
    assert term("median") == "median" and not mark("median")
    assert asked(term("entropy of the value in nats (uniform: 10.8)")) == ["gloss-entropy-of-the-value"]
    assert 'aria-label="what excess kurtosis means"' in mark("kurtosis")
    assert said(glosses(f"{made}{made}")) == asked(made)


def test_a_card_says_what_its_numbers_are(run: mn.Run) -> None:
    """In a notebook and on a page: every name that asks is answered there, once."""
    first, second = (fragment(run[address]) for address in ("L1N3", "L1N4"))
    for html in (first, page(run["L1N3"])):
        names = {re.sub(r"^mn[0-9a-f]{8}-", "", place) for place in asked(html)}
        assert {"gloss-excess-kurtosis", "gloss-std", "gloss-layer-median"} <= names
        assert sorted(said(html)) == sorted(set(asked(html)))
    assert set(said(first)).isdisjoint(said(second)), "a notebook may show both"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", {"excess-kurtosis"}),
        ("/begin", {"trigger", "excess-kurtosis", "layer-median"}),
        ("/layers/1", {"excess-kurtosis", "std", "0-in"}),
        ("/neurons/L1N3", {"excess-kurtosis", "entropy-of-the-value"}),
        ("/search?q=%20capital&by=trigger", {"expected", "strongest"}),
    ],
)
def test_pages_answer_every_name(client: TestClient, path: str, names: set[str]) -> None:
    """Whatever asks on a page is answered on it; the menu is a sentence of nobody."""
    html = client.get(f"/runs/run{path}").text
    wanted = set(asked(html))
    assert {f"gloss-{name}" for name in names} <= wanted
    places = said(html)
    assert sorted(places) == sorted(wanted)


def test_columns_of_a_query_are_the_readers(client: TestClient) -> None:
    """Nobody knows what somebody else calls `max`."""
    html = client.get("/runs/run/sql?q=select+max(kurtosis)+as+max+from+neurons").text
    assert "<th" in html and not [place for place in asked(html) if place.startswith("gloss")]


def test_highlights_say_it_too(run: mn.Run) -> None:
    """In a notebook, where each reason is a sentence above its card."""
    html = run.highlights(4)._repr_html_()
    reasons = "".join(re.findall(r"<p>(?:(?!</p>).)*(?:triggers|largest write)(?:(?!</p>).)*</p>", html))
    assert re.search(r"gloss-(trigger|largest-write)", reasons)
    assert sorted(said(html)) == sorted(set(asked(html)))


def test_a_gallery_says_it_once(run: mn.Run, tmp_path: Path) -> None:
    """However many cards it has."""
    html: Any = run.gallery(tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert len(asked(html)) > 50 and sorted(said(html)) == sorted(set(asked(html)))
