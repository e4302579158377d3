"""A run in the browser: every page answers, its data are the run's own, and nothing from elsewhere is answered."""

from __future__ import annotations

import asyncio
import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import polars as pl
import pyarrow as pa
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from loops import awaited
from starlette.responses import Response
from starlette.testclient import TestClient
from synthetic import make_run
from tiny import model_folder, texts

import mnemoscope as mn
from mnemoscope.atlas import guard, live, lowered
from mnemoscope.atlas.app import create
from mnemoscope.atlas.library import PAGE, Library, Shelf
from mnemoscope.atlas.pages import _mirrored
from mnemoscope.atlas.processes import PageProcesses
from mnemoscope.atlas.scatter import HEIGHT, WIDTH, scatter
from mnemoscope.atlas.serving import LOOPBACK, _listening
from mnemoscope.atlas.site import STYLES, KeptPages
from mnemoscope.errors import QueryError
from mnemoscope.records import Progress
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.writing import add_tables
from mnemoscope.views.page import environment

HERE = "http://127.0.0.1:8321"
PAGES = (
    "", "/layers", "/begin", "/layers/0", "/layers/1?sort=max&order=up&where=kurtosis%3E0", "/neurons/L1N3",
    "/search", "/search?q=a", "/search?q=%20capital&by=trigger", "/sql", "/sql?q=select+1", "/explain", "/text",
    "/steer", "/test", "/study", "/study/glance", "/compare", "/annotate", "/notes", "/graph", "/shade", "/related",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A finished run without a model, whose text and titles hold HTML."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "a run", neurons=70).path)


@pytest.fixture(scope="module")
def client(run: mn.Run) -> TestClient:
    """A browser on this machine."""
    return TestClient(create([run]), base_url=HERE, follow_redirects=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose tiny model can be asked."""
    model = mn.load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")
    return mn.build(model, texts(40), tmp_path_factory.mktemp("runs") / "built", top=10)


# -- who may ask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:9", "localhost:8321", "LOCALHOST", "[::1]:8321", "[::1]"]
)
def test_names_of_this_machine_are_answered(client: TestClient, host: str) -> None:
    """Under any port."""
    assert client.get("/runs.json", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8321",
        "",
        "127.0.0.1:x",
        "::1",
        "localhost.",
        "127.0.0.1:80:80",
        "[::1]:x",
        "[::1].evil.example",
        "[::1",
        "0.0.0.0",
        "127.1",
        "127.0.0.2:8321",
        "localhost@evil.example",
        "evil.example#127.0.0.1",
        "localhost, evil.example",
        "127.0.0.1 ",
        "\t127.0.0.1:8321",
    ],
)
def test_other_names_are_not(client: TestClient, host: str) -> None:
    """A name that somebody points to this machine is refused whatever is asked, and however."""
    for path in ("/", "/static/atlas.js", "/api.json", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 400 and "answers to" in answer.text
    for method in ("HEAD", "OPTIONS", "POST", "PROPFIND"):
        assert client.request(method, "/runs.json", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("name", ["host", "sec-fetch-site", "origin"])
def test_a_header_that_comes_twice_is_none_that_is_known(client: TestClient, name: str) -> None:
    """Whichever of the two stands first: servers and browsers differ in which one they believe."""
    good, bad = {"host": ("127.0.0.1", "evil.example"), "sec-fetch-site": ("none", "cross-site")}.get(
        name, (HERE, "http://evil.example")
    )
    for pair in ((good, bad), (bad, good), (good, good)):
        headers = [(name, value) for value in pair] + ([] if name == "host" else [("host", "127.0.0.1:8321")])
        assert client.post("/runs.json", headers=headers).status_code == (400 if name == "host" else 403)


_LINK = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
_FRAME = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "same-origin", None])
@pytest.mark.parametrize(
    ("how", "opened"),
    [
        (_LINK, True),
        (_FRAME, False),
        ({"sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, False),
        ({"sec-fetch-mode": "cors", "sec-fetch-dest": "empty", "origin": "http://evil.example"}, False),
        ({"sec-fetch-mode": "no-cors", "sec-fetch-dest": "document"}, False),
        ({}, False),
    ],
)
def test_a_link_from_anywhere_opens_and_nothing_is_loaded_into_other_pages(
    run: mn.Run, client: TestClient, site: str | None, how: dict[str, str], opened: bool
) -> None:
    """What another site's page loads inside itself could not be read there, but would make the model work; a frame is
    for notebooks."""
    headers = how | ({} if site is None else {"sec-fetch-site": site})
    wanted = 200 if opened or site not in ("cross-site", "same-site") else 403
    for path in ("/runs.json", "/runs/a-run/explain"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == wanted
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert client.head("/runs.json", headers=headers).status_code == (405 if wanted == 200 else 403)
    assert client.options("/runs.json", headers=headers).status_code == (405 if wanted == 200 else 403)
    framed = TestClient(create([run], frames=guard.NOTEBOOKS), base_url=HERE)
    assert framed.get("/runs.json", headers=headers).status_code == (200 if how == _FRAME else wanted)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "same-origin"}, 405),
        ({"sec-fetch-site": "none"}, 405),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": HERE}, 403),
        ({"origin": HERE}, 405),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({}, 405),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "QUERY", "X"])
def test_only_pages_from_here_may_change_anything(
    client: TestClient, method: str, headers: dict[str, str], status: int
) -> None:
    """405 is the router's own: such a request passes the guard, and nothing here takes it."""
    assert client.request(method, "/runs.json", headers=headers).status_code == status


def test_sockets_from_elsewhere_are_closed() -> None:
    """A WebSocket is refused as a request that changes something is, before any application sees it."""
    seen, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    def asked(**headers: str) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "websocket", "path": "/", "headers": pairs}
        awaited(guard.Guard(app)(scope, receive, send))

    asked(host="127.0.0.1", origin="http://evil.example")
    asked(host="evil.example")
    assert not seen and [message["type"] for message in sent] == ["websocket.close"] * 2
    asked(host="127.0.0.1", origin="http://127.0.0.1")
    assert seen == ["websocket"]


def test_bodies_have_a_limit(client: TestClient) -> None:
    """Said or not said beforehand."""
    large = b"x" * (guard.MOST_BYTES + 1)
    assert client.post("/runs.json", content=large).status_code == 413

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"read"})

    reader = TestClient(guard.Guard(reads), base_url=HERE)
    assert reader.post("/", content=iter([large[:-1], b"y", b"z"])).status_code == 413
    assert reader.post("/", content=iter([b"x"])).text == "read"
    note = "/runs/a-run/neurons/L1N3/note.json"
    answer = client.post(note, content=iter([large]), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "longer than" in answer.text


def test_others_need_the_word(run: mn.Run) -> None:
    """Where others can ask, every address begins with a secret; links have it, and without it nothing is there."""
    outside = TestClient(create([run], secret="word"), base_url="http://192.0.2.7", follow_redirects=True)
    assert outside.get("/").status_code == outside.get("/runs.json").status_code == 404
    for wrong in (
        "/wordy/runs.json",
        "/wor/runs.json",
        "/WORD/runs.json",
        "//word/runs.json",
        "/w%C3%B6rd/",
        "/xword/",
    ):
        assert outside.get(wrong).status_code == 404, wrong
    assert outside.post("/runs.json").status_code == outside.options("/runs.json").status_code == 404
    page = outside.get("/word/")
    assert page.status_code == 200
    links = [part.split('"')[0] for part in page.text.split('href="')[1:]]
    assert all(link.startswith(("/word/", "#", "data:")) for link in links), links
    assert outside.get("/word/static/atlas.css").status_code == 200
    first, again = (
        outside.get("/word/runs/a-run/layers/1") for _ in range(2)
    )  # compressed, and kept meanwhile
    assert first.headers["content-encoding"] == "gzip" and again.text == first.text


@pytest.mark.parametrize(
    "path", ["/", "/runs/a-run", "/nothing", "/api.json", "/static/pages.css", "/runs/a-run/sql?q=no"]
)
def test_every_answer_says_what_it_may_do(client: TestClient, path: str) -> None:
    """No foreign script, style, picture, frame or form; refusals say so, too."""
    for headers in ({}, {"host": "evil.example"}):
        answer = client.get(path, headers=headers)
        assert {name: answer.headers[name] for name in guard.HEADERS} == guard.HEADERS
        assert "set-cookie" not in answer.headers and "access-control-allow-origin" not in answer.headers


@tries(60)
@given(st.text(), st.text())
def test_only_a_whole_name_is_a_name(before: str, after: str) -> None:
    """Nothing around a name of this machine passes for it."""
    name = guard._name(f"{before}127.0.0.1{after}")
    assert (name in guard.LOOPBACK) == (
        not before and (not after or (after[0] == ":" and after[1:].isascii() and after[1:].isdigit()))
    )


# -- pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_every_page_answers(client: TestClient, path: str) -> None:
    """As a page that needs nothing from elsewhere and has no style or script of its own in it."""
    answer = client.get(f"/runs/a-run{path}")
    assert answer.status_code == 200, answer.text
    assert "<style" not in answer.text and " style=" not in answer.text and " onclick" not in answer.text
    sources = [part.split('"')[0] for part in answer.text.split('src="')[1:]]
    assert sources in (["/static/atlas.js"], ["/static/atlas.js", "/static/writing.js"])


def test_a_preview_is_a_part_of_a_page(client: TestClient, run: mn.Run) -> None:
    """A small card to be put where a neuron is named: its tokens and triggers as text, without style of its own."""
    answer = client.get("/runs/a-run/neurons/L1N3/preview")
    card = run.neuron("L1N3")
    assert answer.status_code == 200 and "<html" not in answer.text and "<link" not in answer.text
    assert " style=" not in answer.text and " data-style=" in answer.text and "<b>season" not in answer.text
    assert answer.text.count("<li>") == 3 and "L1N3" in answer.text
    assert card.writes(card.sides[0].polarity)[0].text.strip("·") in answer.text
    assert client.get("/runs/a-run/neurons/L9N3/preview").status_code == 404


def test_the_beginning_leads_to_the_only_run(client: TestClient, run: mn.Run) -> None:
    """Several are listed, each under a name of its own."""
    assert client.get("/").headers["location"] == "/runs/a-run"
    two = TestClient(create([run, run]), base_url=HERE, follow_redirects=False)
    assert [one["name"] for one in two.get("/runs.json").json()] == ["a-run", "a-run-2"]
    assert "/runs/a-run-2" in two.get("/").text


def test_data_are_the_runs_own(client: TestClient, run: mn.Run) -> None:
    """Behind .json is what Python says of the same; what is no number there is null."""
    assert client.get("/runs/a-run/neurons/L1N3.json?triggers=7").json() == json.loads(
        json.dumps(run.neuron("L1N3", examples=7).to_dict(), default=str)
    )
    hits = client.get("/runs/a-run/search.json?q=%20capital").json()
    assert hits["trigger"] == run.find(trigger=" capital", count=12).to_dict()
    assert (
        "problem" in hits["promotes"] or hits["promotes"] == run.find(promotes=" capital", count=12).to_dict()
    )
    assert client.get("/runs/a-run/sql.json?q=select+1+as+one,+'nan'::double+as+two").json() == [
        {"one": 1, "two": None}
    ]
    file = client.get("/runs/a-run/sql/file?q=select+[1,2]+as+list,+3+as+three").text
    assert file == 'list,three\n"[1, 2]",3\n'


def _file_behind(client: TestClient, page: str, name: str) -> pl.DataFrame:
    """The table that a link of a page leads to, by the link's words."""
    (link,) = re.findall(rf'href="([^"]*)"[^>]*>{name}</a>', client.get(page).text)
    answer = client.get(link.replace("&amp;", "&") if link.startswith("/") else f"{page}{link}")
    assert answer.status_code == 200 and "attachment" in answer.headers["content-disposition"]
    return (pl.read_parquet if name == "Parquet" else pl.read_csv)(io.BytesIO(answer.content))


def test_tables_are_had_as_files(client: TestClient, run: mn.Run) -> None:
    """By the links of their pages: what SQL answers, the neurons of a layer that fit, all triggers of a neuron."""
    for name in ("CSV", "Parquet"):
        frame = _file_behind(client, "/runs/a-run/sql?q=select+1+as+one", name)
        assert frame.to_dicts() == [{"one": 1}]
        frame = _file_behind(client, "/runs/a-run/layers/1?sort=std&where=max%3E0.5", name)
        rows = run.table("neurons").filter((pl.col("layer") == 1) & (pl.col("max") > 0.5)).collect()
        wanted = rows.sort("std", "neuron", descending=[True, False])
        assert frame["neuron"].to_list() == wanted["neuron"].to_list()
    stored = run.rows("triggers", 1, 3)
    for name in ("triggers as CSV", "Parquet"):
        frame = _file_behind(client, "/runs/a-run/neurons/L1N3?triggers=2", name)
        for column in ("polarity", "rank", "context", "position"):
            assert frame[column].to_list() == stored[column].to_list()
        text = "".join(
            run.vocabulary.pieces(run.contexts([stored["context"][0]])[stored["context"][0]].tokens.tolist())
        )
        assert frame["token"][0] in run.vocabulary.visible(text, edges=False)


def test_a_layer_is_sorted_filtered_and_cut_into_pages(client: TestClient, run: mn.Run) -> None:
    """Every neuron that fits is on exactly one page, in order."""
    rows = run.table("neurons").filter((pl.col("layer") == 1) & (pl.col("max") > 0.5)).collect()
    wanted = rows.sort("std", "neuron", descending=[True, False])["neuron"].to_list()
    assert len(wanted) > PAGE
    found = []
    for page in range(3):
        address = f"/runs/a-run/layers/1.json?sort=std&where={quote('max > 0.5')}&page={page}"
        answer = client.get(address).json()
        assert (answer["fitting"], answer["all"]) == (len(wanted), 70)
        found += [row["neuron"] for row in answer["rows"]]
    assert found == wanted
    first = client.get("/runs/a-run/layers/1.json?sort=std").json()["rows"][0]
    card = run.neuron(first["id"])
    assert first["promotes"] == [token.text for token in card.writes(card.sides[0].polarity)[:4]]


def test_the_study_and_two_runs_are_what_python_says(run: mn.Run) -> None:
    """The findings of a measurement, and of two runs side by side."""
    two = TestClient(create([run, run]), base_url=HERE)
    found = two.get("/runs/a-run/study/distributions.json").json()
    wanted = json.loads(json.dumps(run.study(only="distributions").to_dict(), default=str))["findings"]
    assert [finding["id"] for finding in found[0]["findings"]] == [finding["id"] for finding in wanted]
    page = two.get("/runs/a-run/study/distributions").text
    assert "<svg" in page and all(finding["id"] in page for finding in wanted)
    shown = two.get("/runs/a-run/compare?other=a-run-2&only=distributions")
    assert shown.status_code == 200 and "data-live" in shown.text and "<svg" not in shown.text
    events = _events(two.get("/runs/a-run/compare/events?other=a-run-2&only=distributions").text)
    steps = [value["stage"] for kind, value in events if kind == "progress"]
    assert {"comparing", "drawing"} <= set(steps) and "loading the model" not in steps
    assert events[-1][0] == "answer" and "<svg" in events[-1][1] and " style=" not in events[-1][1]
    compared = two.get("/runs/a-run/compare.json?other=a-run-2&only=distributions").json()
    assert [section["name"] for section in compared] == ["stability", "distributions"]
    assert all(finding["id"] in events[-1][1] for section in compared for finding in section["findings"])


@tries(80)
@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2), max_size=30))
def test_points_keep_the_order_of_their_statistics(values: list[tuple[float, float]]) -> None:
    """On both axes, inside the picture; what is undefined is counted, not drawn."""
    rows = [{"neuron": number, "max": x, "std": y} for number, (x, y) in enumerate(values)]
    rows.append({"neuron": len(values), "max": None, "std": 1.0})
    drawn = scatter(
        pl.DataFrame(rows, schema={"neuron": pl.Int32, "max": pl.Float64, "std": pl.Float64}), "max", "std"
    )
    assert drawn.left == 1 and [point[2] for point in drawn.points] == list(range(len(values)))
    for k, sign in ((0, 1), (1, -1)):
        places = [sign * point[k] for point in drawn.points]
        order = sorted(range(len(values)), key=lambda number: values[number][k])
        assert all(places[a] <= places[b] for a, b in pairwise(order))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, *_ in drawn.points)
    for axis in (drawn.x, drawn.y):
        low, high = sorted((axis.start, axis.start + axis.length))
        assert all(low <= place <= high for place, _ in axis.ticks)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/runs/a-run/layers/0?x=beauty", 400, "unknown statistic"),
        ("/runs/a-run/study/nothing", 400, "choose among glance"),
        ("/runs/a-run/compare?other=nothing", 404, "it has a-run"),
        ("/runs/nothing", 404, "it has a-run"),
        ("/runs/a-run/neurons/L99N1", 404, "out of range"),
        ("/runs/a-run/neurons/nothing", 400, "L13N366"),
        ("/runs/a-run/layers/99", 404, "layers 0 to"),
        ("/runs/a-run/layers/x", 422, "layer"),
        ("/runs/a-run/layers/0?sort=beauty", 400, "kurtosis"),
        ("/runs/a-run/layers/0?where=kurtosis", 400, "kurtosis>50"),
        ("/runs/a-run/layers/0?where=beauty>1", 400, "unknown statistic"),
        ("/runs/a-run/layers/0?page=-1", 422, "page"),
        ("/runs/a-run/search?q=a&by=smell", 400, "promotes"),
        ("/runs/a-run/sql?q=delete+from+neurons", 400, "SELECT"),
        ("/runs/a-run/sql?q=select+*+from+read_csv('/etc/passwd')", 400, "running SQL"),
        ("/runs/a-run/explain/events", 400, "nothing was asked"),
        ("/runs/a-run/test?neuron=L1N3&pattern=file:/etc/passwd", 400, "reads no files"),
        ("/runs/a-run/search?q=" + "x" * 401, 422, "400"),
        ("/static/..%2f..%2fapp.py", 404, ""),
        ("/static/app.py", 404, "no file"),
        ("/nothing", 404, ""),
    ],
)
def test_what_cannot_be_answered_is_said(client: TestClient, path: str, status: int, words: str) -> None:
    """In a sentence on a page, and as JSON where data were asked for."""
    answer = client.get(path)
    assert answer.status_code == status and words in answer.text.replace("&gt;", ">").replace("&#39;", "'")
    place, _, query = path.partition("?")
    if place.startswith("/runs/") and not place.endswith("events"):
        data = client.get(f"{place}.json?{query}")
        assert data.status_code == status and words in data.json()["problem"]


def test_sql_is_cut_off(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many rows, and after so many seconds."""
    many = client.get("/runs/a-run/sql.json?q=select+*+from+range(100000)").json()
    assert len(many) == 500
    monkeypatch.setattr("mnemoscope.atlas.pages.SECONDS", 0.2)
    began = time.monotonic()
    slow = client.get(
        "/runs/a-run/sql.json?q=select+sum(a.range*b.range)+from+range(1000000)+a,+range(1000000)+b"
    )
    assert (
        slow.status_code == 400 and "longer than 0.2 seconds" in slow.text and time.monotonic() - began < 20
    )


def test_a_long_list_is_one_line_of_a_table(client: TestClient) -> None:
    """Its first parts and how many there are; the columns that can be asked for stand below the form."""
    page = client.get("/runs/a-run/sql?q=select+range(1000)+as+many,+[1,2]+as+few").text
    assert "[0, 1, 2, 3, … 1,000 in all]" in page and "[1, 2]" in page
    assert "<dt><code>neurons</code></dt><dd>layer, neuron, tokens" in page


@pytest.mark.parametrize(
    "query",
    [
        'select interval \'1 month\' as "a""b", 2 as c, 3 as c',
        "select date 'infinity', timestamp '-infinity', timestamptz '2020-01-01 00:00+00'",
        "select union_value(k := 1), '101'::bit, map {'a': interval '1 day'}",
        "select bytes from vocabulary",
        "select '\\x80'::blob, [1], {'a': null}, 1.5::decimal(9, 3), uuid()",
    ],
)
def test_sql_answers_whatever_a_column_is(query: str, client: TestClient) -> None:
    """As data, as a page, and as a file of either kind."""
    for path in ("sql.json?", "sql?", "sql/file?as=csv&", "sql/file?as=parquet&"):
        answer = client.get(f"/runs/a-run/{path}q={quote(query)}")
        assert answer.status_code == 200, (path, answer.text[:200])


def test_sql_answers_no_more_than_a_page_can_show(client: TestClient) -> None:
    """One row may be larger than any machine's memory."""
    answer = client.get("/runs/a-run/sql.json?q=select+repeat('x',+40000000)")
    assert answer.status_code == 400 and "the answer has 38 MB, and 32 are shown" in answer.text


def test_the_box_leads_where_it_should(client: TestClient) -> None:
    """An address to its neuron, anything else to the search, as it was typed."""
    assert client.get("/runs/a-run/go?q=L1N3+").headers["location"] == "/runs/a-run/neurons/L1N3"
    assert client.get("/runs/a-run/go?q=+capital").headers["location"] == "/runs/a-run/search?q=+capital"


def test_completions_are_tokens(client: TestClient, run: mn.Run) -> None:
    """Each begins as it was typed, and is a token that the search takes."""
    words = client.get("/runs/a-run/completions.json?q=%20c").json()
    assert words and all(word.startswith(" c") and run.vocabulary.find(word) for word in words)
    assert client.get("/runs/a-run/completions.json?q=").json() == []


def test_one_list_is_not_shown_twice(client: TestClient, run: mn.Run) -> None:
    """Where coefficients of either sign occur, what neurons suppress is what they promote at the other sign."""
    word = quote(run.vocabulary.pieces([40])[0])
    both = client.get(f"/runs/a-run/search?q={word}").text
    assert 'id="promotes"' in both and 'id="suppresses"' not in both
    assert 'id="suppresses"' in client.get(f"/runs/a-run/search?q={word}&by=suppresses").text
    hits = run.find(promotes=run.vocabulary.pieces([40])[0])
    assert hits.rows.height and not _mirrored(hits, hits) and not _mirrored(hits, None)


def test_a_run_that_is_deleted_is_said_to_be_gone(tmp_path: Path) -> None:
    """While it is served: the page says so, whatever was read of it before."""
    opened = mn.open_run(make_run(tmp_path / "gone").path)
    reader = TestClient(create([opened]), base_url=HERE)
    assert reader.get("/runs/gone/neurons/L0N0").status_code == 200
    shutil.rmtree(opened.path)
    for path in ("", "/layers/1", "/neurons/L0N1", "/search?q=a", "/sql?q=select+*+from+neurons"):
        answer = reader.get(f"/runs/gone{path}")
        assert answer.status_code in (200, 410), (path, answer.text)
    assert reader.get("/runs/gone/neurons/L0N1").status_code == 410


def test_openapi_lists_the_data(client: TestClient) -> None:
    """Every page with data is in the schema, and nothing else is."""
    schema = client.get("/api.json").json()
    assert {path for path in schema["paths"] if not path.endswith(".json")} == set()
    assert {
        "/runs.json",
        "/runs/{run}.json",
        "/runs/{run}/neurons/{address}.json",
        "/runs/{run}/explain.json",
    } <= set(schema["paths"])
    routes = client.app.app.routes  # type: ignore[attr-defined]
    answers = {(method, route.path) for route in routes for method in route.methods - {"HEAD"}}
    listed = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    assert listed == {pair for pair in answers if pair[1].endswith(".json") and pair[1] != "/api.json"}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            names = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert set(re.findall(r"{(\w+)}", path)) <= names and "request" not in names


def test_addresses_of_data_are_listed_for_people(client: TestClient, run: mn.Run) -> None:
    """On a page, with what each gives; where a secret is needed it stands in them."""
    page, schema = html.unescape(client.get("/api").text), client.get("/api.json").json()
    for path, methods in schema["paths"].items():
        assert f"<code>{path}</code>" in page
        assert all(operation["description"] in page for operation in methods.values())
    outside = TestClient(create([run], secret="word"), base_url="http://192.0.2.7")
    assert "<code>/word/runs.json</code>" in outside.get("/word/api").text
    assert outside.get("/word/api.json").json()["servers"] == [{"url": "/word"}]


def test_no_page_is_heavy_without_its_data(client: TestClient) -> None:
    """What every page loads, with a page that holds nothing: a third of a megabyte at most, and most are far below."""
    folder = Path(guard.__file__).parent / "static"
    shared = sum(len(client.get(f"/static/{file.name}").content) for file in folder.iterdir())
    shared += len(client.get("/static/pages.css").content)
    for path in ("/explain", "/text", "/graph", "/search", "/sql", "/annotate", "/notes", "/study"):
        assert shared + len(client.get(f"/runs/a-run{path}").content) < 300_000, path
    assert shared < 150_000


def test_tables_of_findings_are_had_whole(run: mn.Run) -> None:
    """By the links of the page, which shows their first rows."""
    client = TestClient(create([run, run]), base_url=HERE)
    report_of = {
        "/runs/a-run/study/distributions": run.measured("distributions"),
    }
    for page, report in report_of.items():
        text = client.get(page).text
        for section in report.sections:
            for finding in section.findings:
                for kind, read in (("csv", pl.read_csv), ("parquet", pl.read_parquet)):
                    (link,) = re.findall(rf'href="([^"]*finding={finding.id}&amp;as={kind})"', text)
                    frame = read(io.BytesIO(client.get(link.replace("&amp;", "&")).content))
                    assert frame.shape == finding.frame.shape and frame.columns == finding.frame.columns
    assert client.get("/runs/a-run/study/distributions/file?finding=none").status_code == 404


# -- values under the mouse ---------------------------------------------------------------------------------------


def test_every_column_of_a_distribution_says_how_many(client: TestClient, run: mn.Run) -> None:
    """In its own range; together they are all that was counted."""
    page = client.get("/runs/a-run/neurons/L1N3").text
    (chart,) = re.findall(r'<svg class="wide".*?</svg>', page, re.DOTALL)
    titles = re.findall(r"<title>(\S+) to (\S+): ([\d,]+)</title>", chart)
    assert len(titles) > 10
    total = sum(int(count.replace(",", "")) for *_, count in titles)
    assert total == pytest.approx(run["L1N3"].histogram.total, rel=0.03)
    ends = [tuple(float(end.replace("−", "-")) for end in pair[:2]) for pair in titles]
    assert all(low < high for low, high in ends) and ends == sorted(ends)


def test_marks_of_figures_say_their_values() -> None:
    """Bars, points and cells do, lines by points that are not seen; numbers are as short as they are elsewhere."""
    import altair as alt

    from mnemoscope.views.charts import INK, data, svg

    base = alt.Chart(data([{"layer": 0, "nats": 0.123456789}, {"layer": 1, "nats": -2.0}]))
    base = base.encode(x="layer:Q", y="nats:Q")
    bars = svg(base.mark_bar(color=INK), "bars")
    assert bars.count("<title>") == 2 and "<title>layer: 0; nats: 0.123</title>" in bars
    assert "<title>" not in svg(base.mark_line(color=INK), "a line")
    assert svg(base.mark_point(color=INK, filled=True, opacity=0), "points").count("<title>") == 2


def test_figures_of_a_study_and_of_layers_say_their_values(client: TestClient, run: mn.Run) -> None:
    """On every page that has some: no figure is without."""
    figures = re.findall(
        r"<figure.*?</figure>", client.get("/runs/a-run/study/distributions").text, re.DOTALL
    )
    assert figures and all("<title>" in figure for figure in figures)
    strips = re.findall(r"<svg.*?</svg>", client.get("/runs/a-run/layers").text, re.DOTALL)
    cells = [len(layer.cells) for layer in Library([run]).shelves["a-run"].overview.layers if layer.neurons]
    assert [
        len(re.findall(r"<title>\d[\d,]*: \S+ to \S+, \S+ to \S+</title>", strip)) for strip in strips
    ] == cells
    points = re.findall(
        r"<circle[^>]*><title>(\w+): max (\S+), kurtosis (\S+)</title>",
        client.get("/runs/a-run/layers/1").text,
    )
    assert len(points) > 60
    (known,) = (
        run.table("neurons").filter((pl.col("layer") == 1) & (pl.col("neuron") == 5)).collect().to_dicts()
    )
    assert [float(value.replace("−", "-")) for name, *pair in points if name == "L1N5" for value in pair] == [
        pytest.approx(known["max"], rel=0.01), pytest.approx(known["kurtosis"], rel=0.01)
    ]  # fmt: skip


# -- what results show, inside a page ---------------------------------------------------------------------------


def test_a_result_is_put_into_a_page_without_style(run: mn.Run) -> None:
    """Its rules go, its attributes of style are handed to the script, and its text stays text."""
    inside = lowered.inside(run["L1N3"], lambda address: f"/x/{address}")
    assert "<style" not in inside and " style=" not in inside and " data-style=" in inside
    assert "<b>season" not in inside


def test_headings_of_an_answer_stand_below_the_pages() -> None:
    """Whichever it begins with."""
    assert lowered.levelled("<h3>a</h3><h4 id=b>") == '<h3 aria-level="2">a</h3><h4 aria-level="3" id=b>'
    assert lowered.levelled("<h2>a</h2><h3>b</h3>") == "<h2>a</h2><h3>b</h3>"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("<td>L1N2</td>", '<td><a class="neuron" href="/L1N2">L1N2</a></td>'),
        (
            '<td class="a">L1E3N2 more</td>',
            '<td class="a"><a class="neuron" href="/L1E3N2">L1E3N2</a> more</td>',
        ),
        ('<td><a href="#L1N2">L1N2</a></td>', '<td><a class="neuron" href="/L1N2">L1N2</a></td>'),
        ("<td>L1N2x</td>", "<td>L1N2x</td>"),
        ("<p>of L1N2</p>", "<p>of L1N2</p>"),
    ],
)
def test_neurons_are_links(given: str, wanted: str) -> None:
    """Where an element begins with an address; a link to another place of the page becomes one to the neuron's."""
    assert lowered.linked(given, lambda address: f"/{address}") == wanted


# -- questions to the model -------------------------------------------------------------------------------------


def _events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events by the rules of their format."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def test_questions_are_answered_as_in_python(built: mn.Run) -> None:
    """By events, with progress first and the answer last, and as data."""
    with TestClient(create([built]), base_url=HERE) as client:
        _ask(client, built)


def _ask(client: TestClient, built: mn.Run) -> None:
    path = "/runs/built/explain"
    prompt = "prompt=The+capital+of+France&target=+is"
    page = client.get(f"{path}?{prompt}")
    assert page.status_code == 200 and "data-live" in page.text
    events = _events(client.get(f"{path}/events?{prompt}").text)
    assert [kind for kind, _ in events][-1] == "answer" and events[0][0] in ("progress", "waiting")
    assert "<style" not in events[-1][1] and "mn-explain" in events[-1][1]
    assert '<a class="neuron" href="/runs/built/neurons/L' in events[-1][1]
    wanted = built.explain("The capital of France", " is").to_dict()
    found = client.get(f"{path}.json?{prompt}").json()
    assert found["target"] == json.loads(json.dumps(wanted["target"]))
    graph = client.get(re.findall(r'href="([^"]*/explain/graph[^"]*)"', page.text)[0].replace("&amp;", "&"))
    assert "attachment" in graph.headers["content-disposition"]
    assert graph.json()["nodes"] and graph.json()["metadata"]["prompt"]
    traced = client.get("/runs/built/text.json?text=The+capital&neurons=L1N3").json()
    assert traced == json.loads(json.dumps(built.trace("The capital", "L1N3").to_dict(), default=str))
    failed = _events(client.get(f"{path}/events?prompt=The&target=no+such+token+at+all").text)
    assert failed[-1][0] == "failure" and "no such token" in failed[-1][1]
    assert client.get(f"{path}.json?prompt=The&target=no+such+token+at+all").status_code == 400


class _Slow:
    """A question that goes on until it is told to end, or stopped."""

    def __init__(self) -> None:
        self.begun, self.ended, self.free = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, run: Any, report: Any) -> Any:
        self.begun.set()
        try:
            while not self.free.wait(0.01):
                report(Progress("working", 1, 2, "steps"))
            return "done"
        finally:
            self.ended.set()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[live.Desk]:
    """A desk whose runs need no model."""
    monkeypatch.setattr(live.Desk, "_with_model", lambda self, run: run)
    desk = live.Desk()
    yield desk
    desk.close()


def test_who_goes_away_stops_the_work(desk: live.Desk, run: mn.Run) -> None:
    """And the next question is answered; one that is stopped while it waits is never begun."""
    slow, waits, last = _Slow(), _Slow(), _Slow()
    first = desk.ask(run, slow)
    assert slow.begun.wait(10)
    second = desk.ask(run, waits)
    third = desk.ask(run, last)
    assert second.events.get(timeout=5) == ("waiting", 1) and third.events.get(timeout=5) == ("waiting", 2)
    second.stop()
    first.stop()
    assert slow.ended.wait(10)
    assert third.events.get(timeout=5) == ("waiting", 1)  # the second one's turn has come, and the line moved
    last.free.set()
    assert live.answered(third) == "done"
    assert not waits.begun.is_set()


def test_too_many_questions_are_refused(desk: live.Desk, run: mn.Run) -> None:
    """The line of those that wait has an end, and is open again once some went."""
    slow = _Slow()
    desk.ask(run, slow)
    assert slow.begun.wait(10)
    waiting = [desk.ask(run, _Slow()) for _ in range(live.MOST_WAITING)]
    with pytest.raises(QueryError, match="wait already"):
        desk.ask(run, _Slow())
    for question in waiting:
        question.stop()
    last = _Slow()
    last.free.set()
    asked = desk.ask(run, last)  # at once, though the first one is still computed
    assert asked.events.get(timeout=5) == ("waiting", 1) and not slow.ended.is_set()
    with pytest.raises(QueryError, match="was stopped"):
        live.answered(waiting[0])
    slow.free.set()
    assert live.answered(asked) == "done"


def test_what_two_ask_at_once_is_computed_once(desk: live.Desk, run: mn.Run) -> None:
    """As from two tabs of one address: who comes second waits for the first one's answer, and gets it."""
    computed: list[int] = []

    def ask(number: int) -> live.LiveQuestion:
        return desk.ask(run, lambda run, report: computed.append(number) or number, "the same")

    slow = _Slow()
    desk.ask(run, slow)
    assert slow.begun.wait(10)
    both = [ask(1), ask(2)]
    slow.free.set()
    assert [live.answered(question) for question in both] == [1, 1] and computed == [1]


def test_another_model_is_loaded_for_other_weights(run: mn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run was built anew in its folder, the model of the old one is not asked."""
    loaded: list[str] = []

    def load(self: mn.Run, source: Any) -> str:
        loaded.append(self.manifest.model.weights_sha256)
        return "a model"

    monkeypatch.setattr(mn.Run, "load_model", load)
    desk, opened = live.Desk(), mn.open_run(run.path)

    def ask() -> Any:
        return live.answered(desk.ask(opened, lambda run, report: run._model))

    assert ask() == ask() == "a model" and len(loaded) == 1
    model = opened.manifest.model.model_copy(update={"weights_sha256": "1" * 64})
    opened.manifest = opened.manifest.model_copy(update={"model": model})
    assert ask() == "a model" and loaded[1:] == ["1" * 64]
    desk.close()


@pytest.mark.parametrize("path", ["/runs/a-run/explain.json", "/runs/a-run/explain/graph"])
def test_who_waits_for_data_and_goes_away_stops_the_work(
    run: mn.Run, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is closed while the answer is computed: the model is free for the next question."""
    slow = _Slow()
    monkeypatch.setattr(live.Desk, "_with_model", lambda self, run: run)
    monkeypatch.setattr(mn.Run, "explain", lambda self, *_, report, **__: slow(self, report))
    application, sent = create([run]), []

    async def ask() -> None:
        messages = iter([{"type": "http.request", "body": b""}])

        async def receive() -> Any:
            for message in messages:
                return message
            if not slow.begun.is_set():
                await asyncio.sleep(60)  # whoever looks whether there is something does not wait
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"prompt=a",
            "headers": [(b"host", b"127.0.0.1")], "http_version": "1.1", "scheme": "http", "root_path": "",
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"},
        }  # fmt: skip
        await asyncio.wait_for(application(scope, receive, send), 20)

    awaited(ask())
    assert slow.ended.wait(10)


def test_an_answer_is_kept(desk: live.Desk, run: mn.Run) -> None:
    """The same question is computed once; the oldest answers go, and one without a key is none."""
    computed = []

    def ask(key: Any) -> Any:
        return live.answered(desk.ask(run, lambda run, report: computed.append(key) or key, key))

    assert [ask(1), ask(1), ask(2), ask(1)] == [1, 1, 2, 1] and computed == [1, 2]
    assert [ask(key) for key in range(10, 10 + live.KEPT)] and [ask(1), ask(None), ask(None)] == [
        1,
        None,
        None,
    ]
    assert computed.count(1) == 2 and computed.count(None) == 2


def test_a_defect_ends_one_question(desk: live.Desk, run: mn.Run) -> None:
    """The desk goes on, and the asker is told."""

    def broken(run: Any, report: Any) -> Any:
        raise ZeroDivisionError("by nought")

    with pytest.raises(QueryError, match="ZeroDivisionError: by nought"):
        live.answered(desk.ask(run, broken))
    fine = _Slow()
    fine.free.set()
    assert live.answered(desk.ask(run, fine)) == "done"


def test_a_desk_that_closes_stops_its_work(desk: live.Desk, run: mn.Run) -> None:
    """What is being computed, and what waits."""
    slow, waits = _Slow(), _Slow()
    desk.ask(run, slow)
    assert slow.begun.wait(10)
    desk.ask(run, waits)
    desk.close()
    assert slow.ended.wait(10) and not waits.begun.is_set()


def test_who_waits_for_data_waits_no_longer_than_the_desk_is_open(desk: live.Desk, run: mn.Run) -> None:
    """The one that is computed and the one behind it: else Ctrl-C would wait for threads that nothing ends."""
    slow = _Slow()
    asked = [desk.ask(run, slow), desk.ask(run, _Slow())]
    assert slow.begun.wait(10)
    told: list[str] = []

    def wait(question: live.LiveQuestion) -> None:
        try:
            live.answered(question)
        except QueryError as error:
            told.append(str(error))

    waiting = [threading.Thread(target=wait, args=(question,), daemon=True) for question in asked]
    for thread in waiting:
        thread.start()
    desk.close()
    for thread in waiting:
        thread.join(10)
    assert len(told) == 2 and all("was stopped" in line for line in told)


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def served(run: mn.Run) -> Iterator[str]:
    """The address that the command prints."""
    command = [sys.executable, "-m", "mnemoscope", "serve", str(run.path), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stderr is not None
        yield process.stderr.readline().split()[0]
        process.terminate()


def test_the_command_serves(served: str) -> None:
    """At the address that it prints."""
    assert served.startswith("http://127.0.0.1:")
    with urlopen(f"{served}runs.json") as answer:
        assert json.load(answer)[0]["name"] == "a-run"


def test_reading_needs_no_torch(run: mn.Run) -> None:
    """Neither to begin nor to show any page."""
    code = (
        "import sys; import mnemoscope as mn; from mnemoscope.atlas.app import create\n"
        "from starlette.testclient import TestClient\n"
        f"client = TestClient(create([mn.open_run({str(run.path)!r})]), base_url={HERE!r})\n"
        f"assert all(client.get('/runs/a-run' + path).status_code == 200 for path in {PAGES!r})\n"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


_PACKAGES = """
import sys
from concurrent.futures import ThreadPoolExecutor
import mnemoscope as mn
from mnemoscope.atlas import packages
from mnemoscope.atlas.app import create
from starlette.testclient import TestClient

begun = []

class Watching:
    def find_spec(self, name, path=None, target=None):
        if name in ("altair", "narwhals", "pandas", "duckdb", "scipy", "vl_convert"):
            begun.append((name, packages._importing.locked()))

def status(path):
    return client.get("/runs/a-run" + path).status_code

client = TestClient(create([mn.open_run(RUN)]), base_url=HERE)
sys.meta_path.insert(0, Watching())
assert [status(path) for path in LIGHT] == [200] * len(LIGHT)
assert not begun, begun
with ThreadPoolExecutor(8) as readers:
    assert set(readers.map(status, HEAVY)) == {200}
assert {name for name, _ in begun} >= {"altair", "narwhals", "duckdb", "scipy"}
assert all(alone for _, alone in begun), begun
"""


def test_packages_are_imported_by_one_thread(run: mn.Run) -> None:
    """Before any other uses one; the pages that come first need none of them."""
    light = ("", "/begin", "/layers/0", "/neurons/L1N3", "/neurons/L1N3/preview", "/search?q=%20capital", "/explain",
             "/search?q=L1N3&by=like", "/completions.json?q=a", "/notes", "/annotate")  # fmt: skip
    heavy = ("/layers", "/sql?q=select+1", "/study/distributions", "/layers", "/study")
    given = f"RUN, HERE, LIGHT, HEAVY = {str(run.path)!r}, {HERE!r}, {light!r}, {heavy!r}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{given}\n{_PACKAGES}"], check=True)


def test_a_port_that_is_taken_is_said(run: mn.Run) -> None:
    """In one line, with exit code 2."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "mnemoscope", "serve", str(run.path), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "another port" in done.stderr and done.stderr.count("\n") == 1


def test_no_page_waits_for_an_acknowledgement() -> None:
    """What answers goes out at once, though it be two small pieces: asyncio sees to it where a socket allows that."""

    async def answered() -> int:
        undelayed = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            undelayed.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listening(LOOPBACK, 0) as listener:
            async with await asyncio.start_server(answer, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()
                writer.close()
        return int(undelayed[0])

    assert awaited(answered())


def test_names_of_runs_are_words_of_an_address(run: mn.Run, tmp_path: Path) -> None:
    """Whatever their folders are called."""
    folder = tmp_path / "a&b <c>"
    shutil.copytree(run.path, folder)
    (name,) = Library([mn.open_run(folder)]).shelves
    assert name == "a-b--c-"


def test_what_results_bring_along_is_styled() -> None:
    """A result's fragment is put into pages without its rules: the pages have them all."""
    templates = environment().loader
    assert templates is not None
    brought = {
        name
        for template in templates.list_templates()
        if template.endswith("fragment.html")
        for name in re.findall(r'include "(\w+\.css)"', templates.get_source(environment(), template)[0])
    }
    assert {"card.css", "printed.css"} <= brought <= {*STYLES, "reset.css"}, "a reset is for notebooks"


# -- in a notebook --------------------------------------------------------------------------------------------


def test_a_run_shows_itself_in_a_notebook(run: mn.Run) -> None:
    """A thread serves it, once; only pages of this machine may hold it, and it answers as any server does."""
    atlas = run.atlas("L1N3")
    assert run.atlas().server is atlas.server and f'src="{atlas.address}"' in atlas._repr_html_()
    with urlopen(f"{atlas.address}.json") as answer:
        assert json.load(answer)["id"] == "L1N3"
        policy = answer.headers["content-security-policy"]
    assert policy.endswith("frame-ancestors http://127.0.0.1:* http://localhost:* vscode-webview:")
    with pytest.raises(QueryError):
        run.atlas("L9N9")
    atlas.close()
    again = run.atlas()
    assert again.server is not atlas.server
    with urlopen(again.address) as answer:
        assert answer.status == 200
    again.close()


# -- several processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_processes_make_the_same_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are ready; one that is killed is done without, a run that is gone is said to be, and none is left."""
    opened = mn.open_run(make_run(tmp_path / "many").path)
    alone = TestClient(create([opened]), base_url=HERE)
    paths = (
        "/neurons/L1N3",
        "/layers/1?sort=std",
        "/search?q=%20capital&by=promotes",
        "/layers/9",
        "/neurons/x",
    )
    made: list[Any] = []
    made_by = PageProcesses.made
    monkeypatch.setattr(
        PageProcesses, "made", lambda self, *given: made.append(made_by(self, *given)) or made[-1]
    )
    with TestClient(create([opened], workers=2), base_url=HERE) as client:
        deadline = time.monotonic() + 120
        while not any(made) and time.monotonic() < deadline:
            client.get("/runs/many/neurons/L1N3")
            time.sleep(0.2)
        assert any(made)
        for _ in range(2):  # the second time some are kept
            for path in paths:
                answers = [each.get(f"/runs/many{path}") for each in (client, alone)]
                assert answers[0].status_code == answers[1].status_code
                assert answers[0].text == answers[1].text
        before = client.get("/runs/many/neurons/L1N4").text
        for child in _children():
            os.kill(child, 9)
        assert client.get("/runs/many/neurons/L1N4").text == before
        assert made[-1] is None
        shutil.rmtree(opened.path)
        assert client.get("/runs/many/layers/1?sort=std").status_code == 410
    deadline = time.monotonic() + 20
    while _children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _children()


def _children() -> list[int]:
    return [child.pid for child in active_children() if child.pid]


def test_a_run_that_changes_is_read_anew(tmp_path: Path) -> None:
    """Tables that a job adds or replaces, and a run that is built anew in its folder: never old rows, nor new ones
    where the old ones were."""
    folder = tmp_path / "served"
    opened = mn.open_run(make_run(folder).path)
    client = TestClient(create([opened]), base_url=HERE)

    def parameters() -> list[dict[str, Any]]:
        return client.get("/runs/served/sql.json?q=select+*+from+parameters").json()

    assert "problem" in parameters()
    for count in (7, 8):
        rows = {"layer": [0] * count, "part": ["ffn"] * count, "parameters": [count] * count}
        add_tables(folder, {"parameters": [pa.table(rows, schema=SCHEMAS["parameters"])]}, {})
        assert [row["parameters"] for row in parameters()] == [count] * count
    before = client.get("/runs/served/neurons/L1N3.json").json()
    other = make_run(folder, seed=1, overwrite=True)
    after = client.get("/runs/served/neurons/L1N3.json").json()
    assert after != before and after == json.loads(
        json.dumps(mn.open_run(other.path)["L1N3"].to_dict(), default=str)
    )


def test_a_page_is_kept_while_its_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once, and anew after the run's manifest changed; what does not fit goes."""
    opened = mn.open_run(make_run(tmp_path / "kept").path)
    client, made = TestClient(create([opened]), base_url=HERE), []
    whole = Shelf.layer
    monkeypatch.setattr(
        Shelf, "layer", lambda self, *given, **named: made.append(given) or whole(self, *given, **named)
    )
    for path in (
        "/layers/1",
        "/layers/1",
        "/layers/1?sort=max",
        "/layers/1?sort=max&where=max>0",
        "/layers/1",
    ):
        assert client.get(f"/runs/kept{path}").status_code == 200
    assert len(made) == 3
    (opened.path / "manifest.json").write_text((opened.path / "manifest.json").read_text() + "\n")
    assert client.get("/runs/kept/layers/1").status_code == 200 and len(made) == 4
    pages = KeptPages(most=10)
    assert [pages.once(key, lambda key=key: Response(key * 4)).body for key in "aba"] == [
        b"aaaa",
        b"bbbb",
        b"aaaa",
    ]
    pages.once("c", lambda: Response("cccc"))
    assert pages.once("b", lambda: Response("new")).body == b"new"
