"""What people write in the browser: sealed sheets, scores equal to the command's, notes; nothing is lost or leaked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from synthetic import make_run
from test_atlas import HERE

import mnemoscope as mn
from mnemoscope.annotation import answers, scores, sheet
from mnemoscope.annotation.kept import KeptSheets
from mnemoscope.annotation.local import LocalFile, beside
from mnemoscope.annotation.notes import Notes
from mnemoscope.atlas.app import create
from mnemoscope.errors import SheetError
from mnemoscope.run.writing import add_tables

GOOD = {"description": "ends", "indices": [1, 2, 3], "kind": "shallow"}
SAYS = '<img src=x onerror="alert(1)"> \u202e\x00 "&'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run with null directions, whose text is full of markup."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", documents=60, top=24, neurons=12)
    import polars as pl

    triggers = run.table("triggers").collect()
    null = triggers.select(pl.lit("random").alias("kind"), *triggers.columns)
    add_tables(run.path, {"null_triggers": [null.to_arrow()]}, {})
    return mn.open_run(run.path)


@pytest.fixture(scope="module")
def written(run: mn.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sheet that the command wrote."""
    return sheet.write(run, tmp_path_factory.mktemp("sheets") / "sheet.jsonl", neurons=12, seed=5).sheet


class Site:
    """A server of the run whose local file is in a folder of its own."""

    def __init__(self, run: mn.Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.client = TestClient(create([run], annotations=folder), base_url=HERE, follow_redirects=False)
        self.sheets = KeptSheets(LocalFile(beside(run.path, folder), sheet.fingerprint(run)), run)

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
        return self.client.post(f"/runs/run{path}", json=body, headers=headers)

    def done(self, path: str, **body: Any) -> Any:
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        return self.client.get(f"/runs/run{path}")

    def make(self) -> str:
        return str(self.done("/annotate/sheets.json", neurons=12, prefixes=8)["sheet"])

    def answer(
        self, name: str, annotator: str, item: int, patterns: Any, applies: Any, version: int = 0
    ) -> Any:
        return self.post(
            "/annotate/answers.json", sheet=name, annotator=annotator, item=item, patterns=patterns, applies=applies,
            version=version,
        )  # fmt: skip

    def finish(self, name: str, annotator: str, says: Callable[[int], tuple[Any, Any]]) -> None:
        of = self.get(f"/annotate.json?sheet={name}&annotator={annotator}&item=1").json()["of"]
        for item in range(1, of + 1):
            answer = self.answer(name, annotator, item, *says(item))
            assert answer.status_code == 200 and answer.json()["state"] == "finished", answer.text


@pytest.fixture
def site(run: mn.Run, tmp_path: Path) -> Site:
    """A server beside whose run nothing was written yet."""
    return Site(run, tmp_path)


FIELDS = {
    "sheet",
    "annotator",
    "number",
    "of",
    "annotate",
    "patterns",
    "applies",
    "version",
    "state",
    "problem",
}


def every_second(item: int) -> tuple[Any, Any]:
    """A pattern in every second item."""
    return ([GOOD], [1, 2]) if item % 2 else ([], None)


# -- the local file -----------------------------------------------------------------------------------------------


def test_reading_writes_nothing(site: Site) -> None:
    """Pages of a run about which nothing was written make no file."""
    for path in (
        "",
        "/annotate",
        "/annotate.json",
        "/notes",
        "/neurons/L1N3",
        "/neurons/L1N3/note.json",
        "/search?q=a",
    ):
        assert site.get(path).status_code == 200, path
    assert list(site.folder.iterdir()) == []


def test_the_file_lies_beside_the_run(run: mn.Run, tmp_path: Path) -> None:
    """Under its name, or in the folder that was given; the page says where, and the run stays as it was."""
    copy = mn.open_run(shutil.copytree(run.path, tmp_path / "copy"))
    before = {file: file.stat().st_mtime_ns for file in copy.path.rglob("*")}
    client = TestClient(create([copy]), base_url=HERE)
    assert (
        client.post("/runs/copy/neurons/L0N1/note.json", json={"note": "a", "version": 0}).status_code == 200
    )
    assert (tmp_path / "copy.annotations.sqlite").exists()
    assert str(tmp_path / "copy.annotations.sqlite") in client.get("/runs/copy/annotate").text
    assert {file: file.stat().st_mtime_ns for file in copy.path.rglob("*")} == before


def test_a_file_of_another_run_is_refused(site: Site, tmp_path: Path) -> None:
    """As are one of a newer version, another SQLite file and none at all; the pages of the run go on."""
    other = mn.open_run(make_run(tmp_path / "else" / "run", seed=1).path)
    notes = Notes(LocalFile(beside(other.path, site.folder), sheet.fingerprint(other)), other)
    notes.save(other.parse("L0N1"), "theirs", 0)
    file = site.sheets.file.path
    _refused(site, "about another run")
    with sqlite3.connect(file) as connection:
        connection.execute("pragma user_version=9")
    connection.close()
    _refused(site, "upgrade mnemoscope")
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("create table mine (a)")
    connection.close()
    _refused(site, "not a file of annotations")
    file.write_bytes(b"no database at all" * 100)
    _refused(site, "not a database")


def _refused(site: Site, words: str) -> None:
    for answer in (
        site.get("/annotate"), site.get("/notes.json"), site.post("/neurons/L1N3/note.json", note="mine", version=0),
        site.post("/annotate/sheets.json", neurons=12, prefixes=8),
    ):  # fmt: skip
        assert answer.status_code == 400 and words in answer.text, answer.text
    assert (
        site.get("/neurons/L1N3").status_code
        == site.get("").status_code
        == site.get("/search?q=a").status_code
        == 200
    )


def test_a_folder_that_cannot_be_written_is_said(run: mn.Run, tmp_path: Path) -> None:
    """In one line, where something is to be saved."""
    site = Site(run, tmp_path / "there" / "is" / "none")
    answer = site.post("/neurons/L1N3/note.json", note="a", version=0)
    assert answer.status_code == 400 and "--annotations" in answer.json()["problem"]
    assert "\n" not in answer.json()["problem"]


# -- sheets ---------------------------------------------------------------------------------------------------------


def test_each_annotator_has_an_own_order(site: Site) -> None:
    """Every item once, in orders that differ and that stay; nobody sees what another said."""
    name = site.make()
    orders = {}
    for annotator in ("anna", "ben"):
        items = [site.get(f"/annotate.json?annotator={annotator}&item={n}").json() for n in range(1, 18)]
        orders[annotator] = [tuple(item["annotate"].values()) for item in items]
        assert all(set(item) == FIELDS for item in items)
    assert orders["anna"] != orders["ben"] and sorted(orders["anna"]) == sorted(orders["ben"])
    assert site.answer(name, "anna", 3, [GOOD], [2]).status_code == 200
    assert site.get("/annotate.json?annotator=anna&item=3").json()["patterns"] == [GOOD]
    assert all(
        site.get(f"/annotate.json?annotator=ben&item={n}").json()["patterns"] is None for n in range(1, 18)
    )
    assert Site(site.run, site.folder).get("/annotate.json?annotator=anna&item=3").json()["patterns"] == [
        GOOD
    ]


def test_the_second_half_comes_after_the_first(site: Site) -> None:
    """Its texts are in no answer before the patterns are described."""
    name = site.make()
    first = site.get("/annotate.json?annotator=anna&item=1").json()
    assert "apply" not in first
    assert site.get("/annotate?annotator=anna&item=1&half=apply").status_code == 400
    assert site.answer(name, "anna", 1, [GOOD | {"indices": [1]}], None).json()["state"] == "open"
    assert site.get("/annotate.json?annotator=anna&item=1&half=apply").status_code == 400
    assert site.answer(name, "anna", 1, [GOOD], None, 1).json()["state"] == "described"
    second = site.get("/annotate.json?annotator=anna&item=1&half=apply").json()
    assert len(second["apply"]) == 16 and "annotate" not in second
    last = site.answer(name, "anna", 1, [GOOD], [], 2).json()
    assert last == {"version": 3, "state": "finished", "problem": "", "next": 2}


def test_what_is_typed_is_kept_before_it_is_whole(site: Site) -> None:
    """With what it lacks, in the words of the command; the export leaves such an item open."""
    name = site.make()
    typed = [{"description": "", "indices": [4], "kind": "semantic"}]
    answer = site.answer(name, "anna", 2, typed, None).json()
    assert answer["state"] == "open" and "no description" in answer["problem"]
    assert site.get("/annotate.json?annotator=anna&item=2").json()["patterns"] == typed
    header, *lines = _lines(site.get(f"/annotate/sheet?sheet={name}&annotator=anna").text)
    assert header["annotator"] == "anna" and all(line["patterns"] is None for line in lines)


def test_two_windows_do_not_overwrite_each_other(site: Site) -> None:
    """Who has not seen the latest answer is refused; the same answer sent again is no other one."""
    name = site.make()
    assert site.answer(name, "anna", 1, [GOOD], None).json()["version"] == 1
    assert site.answer(name, "anna", 1, [GOOD], None).json()["version"] == 1
    late = site.answer(name, "anna", 1, [], None)
    assert late.status_code == 400 and "reload" in late.json()["problem"]
    assert site.get("/annotate.json?annotator=anna&item=1").json()["patterns"] == [GOOD]
    assert site.answer(name, "anna", 1, [], None, 1).json()["version"] == 2


def test_writers_at_once_lose_nothing(site: Site) -> None:
    """Four annotators, each of them saving every item, by threads that do not wait for each other."""
    name = site.make()
    names = [f"person {number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: site.finish(name, each, every_second), names))
    (of,) = site.get("/annotate.json").json()["sheets"]
    assert {who["annotator"]: who["finished"] for who in of["annotators"]} == dict.fromkeys(names, 17)
    with ThreadPoolExecutor(6) as pool:
        versions = list(
            pool.map(
                lambda k: site.answer(name, "one", 1, [GOOD | {"description": str(k)}], None).status_code,
                range(6),
            )
        )
    assert sorted(versions) == [200] + [400] * 5


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    """Three of them write to one file that none of them has made yet."""
    code = (
        "import sys; from pathlib import Path; from mnemoscope.annotation.local import LocalFile\n"
        "file = LocalFile(Path(sys.argv[1]), 'run')\n"
        "for neuron in range(30):\n"
        "    with file.writing() as connection:\n"
        "        connection.execute('insert into notes values (?, ?, ?, 1, ?)', (sys.argv[2], neuron, 'a', ''))\n"
    )
    file = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with LocalFile(file, "run").reading() as connection:
        assert connection.execute("select count(*) from notes").fetchone()[0] == 90
        assert connection.execute("pragma journal_mode").fetchone()[0] == "wal"


def test_a_server_that_is_killed_loses_nothing_that_was_taken(run: mn.Run, tmp_path: Path) -> None:
    """SIGKILL between answers, and in the middle of them: what was answered with 200 is there."""
    process, address = _serve(run, tmp_path)
    saved: list[int] = []
    try:
        name = _send(address, "annotate/sheets.json", {"neurons": 12, "prefixes": 8})["sheet"]
        body = {"sheet": name, "annotator": "anna", "patterns": [], "applies": None, "version": 0}
        _send(address, "annotate/answers.json", body | {"item": 1})
        saved.append(1)
        timer = threading.Timer(0.05, process.kill)
        timer.start()
        for item in range(2, 18):
            _send(address, "annotate/answers.json", body | {"item": item})
            saved.append(item)
    except OSError:
        pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    kept = KeptSheets(LocalFile(beside(run.path, tmp_path), sheet.fingerprint(run)), run)
    for item in saved:
        found = kept.item(name, "anna", item)
        assert found is not None and found.patterns == []
    assert saved and kept.listed()[0].annotators[0].finished in (len(saved), len(saved) + 1)


def _serve(run: mn.Run, folder: Path) -> tuple[Any, str]:
    command = [
        sys.executable,
        "-m",
        "mnemoscope",
        "serve",
        str(run.path),
        "--port",
        "0",
        "--annotations",
        str(folder),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    return process, process.stderr.readline().split()[0]


def _send(address: str, path: str, body: Any) -> Any:
    request = Request(
        f"{address}runs/run/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urlopen(request) as answer:
        return json.load(answer)


# -- the seal -------------------------------------------------------------------------------------------------------


def _everything(site: Site, name: str) -> dict[str, Any]:
    """Every answer of the server that is about a sheet, by its address."""
    paths = ["/annotate", "/annotate.json", "/annotate/scores", "/annotate/scores.json", "", ".json", "/notes",
             f"/annotate/sheet?sheet={name}", f"/annotate/key?sheet={name}"]  # fmt: skip
    for annotator, items in (("anna", range(1, 18)), ("ben", (1, 2))):
        paths += [f"/annotate/sheet?sheet={name}&annotator={annotator}", f"/annotate?annotator={annotator}"]
        for item in items:
            for half in ("annotate", "apply"):
                at = f"?annotator={annotator}&item={item}&half={half}"
                paths += [f"/annotate{at}", f"/annotate.json{at}"]
    return {path: (answer.status_code, answer.text) for path in paths for answer in [site.get(path)]}


def test_no_answer_tells_which_items_are_null(site: Site) -> None:
    """All that the server says is the same to the byte when the key says the opposite of every item; and no word of the
    key is in it."""
    name = site.make()
    site.finish(name, "anna", every_second)
    site.answer(name, "ben", 1, [GOOD], [1])
    honest = _everything(site, name)
    text = "".join(text for _, text in honest.values())
    with sqlite3.connect(site.sheets.file.path) as connection:
        key = json.loads(connection.execute("select key from sheets").fetchone()[0])
        secrets = [key["salt"], key["run"], *(item["digest"] for item in key["items"].values())]
        assert not [word for word in secrets if word in text]
        assert not re.search(
            r"[\"']?(null|kind|seed|salt)[\"']?\s*:\s*\"?(true|neuron|random|direction|mixed)", text
        )
        for number, item in enumerate(key["items"].values()):
            null = item["kind"] != "neuron"
            item |= {"kind": "neuron" if null else ("random", "direction", "mixed")[number % 3]}
            item |= (
                {"layer": 0, "neuron": number, "polarity": 1}
                if null
                else {"layer": None, "neuron": None, "polarity": None}
            )
            for half in ("annotate", "apply"):
                for prefix in item[half]:
                    prefix |= {"source": not prefix["source"], "rank": 7, "context": 0}
        connection.execute("update sheets set key = ?", (json.dumps(key | {"seed": 1, "salt": "0" * 64}),))
    connection.close()
    assert _everything(Site(site.run, site.folder), name) == honest
    assert (
        honest[f"/annotate/key?sheet={name}"][0] == 400
        and "sealed" in honest[f"/annotate/key?sheet={name}"][1]
    )


def test_scores_come_when_the_seal_is_opened(site: Site) -> None:
    """They are those of `annotate score`; answers are closed from then on, and others are not scored with them."""
    name = site.make()
    site.finish(name, "anna", every_second)
    site.answer(name, "ben", 1, [GOOD], [1, 2])
    sealed = site.get("/annotate/scores.json").json()
    assert sealed["scores"] is None
    assert [(who["annotator"], who["finished"], who["unsealed"]) for who in sealed["annotators"]] == [
        ("anna", 17, None), ("ben", 1, None)
    ]  # fmt: skip
    assert site.done("/annotate/unseal.json", sheet=name, annotator="anna") == {"unfinished": 0}
    one = site.get("/annotate/scores.json").json()["scores"]
    assert [who["name"] for who in one["annotators"]] == ["anna"] and one["agreement"] == {}
    late = site.answer(name, "anna", 1, [], None, 1)
    assert late.status_code == 400 and "closed" in late.json()["problem"]
    assert site.answer(name, "ben", 2, [], None).status_code == 200
    assert site.done("/annotate/unseal.json", sheet=name, annotator="ben") == {"unfinished": 15}
    assert site.done("/annotate/unseal.json", sheet=name, annotator="ben") == {"unfinished": 15}
    page = site.get("/annotate/scores").text
    assert "with 15 items not finished" in page and "Krippendorff" in page and "false alarms" in page
    assert site.get("/annotate/scores.json").json()["scores"]["annotators"][1]["open"] == 15


def test_nobody_is_scored_without_an_answer(site: Site) -> None:
    """Nor is a name that never answered."""
    name = site.make()
    site.answer(name, "anna", 1, [GOOD | {"indices": []}], None)
    for annotator in ("anna", "nobody"):
        answer = site.post("/annotate/unseal.json", sheet=name, annotator=annotator)
        assert answer.status_code == 400 and "no item is answered" in answer.json()["problem"]


# -- files ----------------------------------------------------------------------------------------------------------


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_downloaded_is_scored_by_the_command_alike(site: Site, tmp_path: Path) -> None:
    """Two sheets and the key of a closed one: `annotate score` gives the very scores of the page."""
    name = site.make()
    site.finish(name, "anna", every_second)
    site.finish(name, "ben", lambda item: ([GOOD], [1, 3, 5]) if item % 3 else ([], None))
    site.done("/annotate/close.json", sheet=name)
    assert site.answer(name, "cleo", 1, [], None).status_code == 400
    files = []
    for annotator in ("anna", "ben"):
        file = tmp_path / f"{annotator}.jsonl"
        file.write_text(
            site.get(f"/annotate/sheet?sheet={name}&annotator={annotator}").text, encoding="utf-8"
        )
        files.append(file)
    answer = site.get(f"/annotate/key?sheet={name}")
    assert "run-" in answer.headers["content-disposition"]
    (tmp_path / _lines(files[0].read_text())[0]["key"]).write_text(answer.text, encoding="utf-8")
    scored = mn.score(files, run=site.run)
    page = site.get("/annotate/scores.json").json()["scores"]
    assert page == _plain(json.loads(json.dumps(scored.to_dict())))


def _plain(value: Any) -> Any:
    """Without numbers that are none."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if value != value else value


def _fill(path: Path, annotator: str) -> str:
    header, *lines = _lines(path.read_text(encoding="utf-8"))
    for number, line in enumerate(lines, 1):
        line["patterns"], line["applies"] = every_second(number)
    return sheet.spell([header | {"annotator": annotator}, *lines])


def test_a_sheet_of_the_command_is_taken(site: Site, written: Path, tmp_path: Path) -> None:
    """With its key the first time; its scores are those that the command gives of the file, and it comes back as it
    was."""
    filled = _fill(written, "anna")
    key = sheet.key_path(written).read_text(encoding="utf-8")
    unknown = site.post("/annotate/import.json", text=filled, file="sheet.jsonl")
    assert unknown.status_code == 400 and "its key is not known here" in unknown.json()["problem"]
    taken = site.done("/annotate/import.json", text=filled, file="sheet.jsonl", key=key)
    assert taken["annotator"] == "anna"
    again = site.post("/annotate/import.json", text=filled, file="sheet.jsonl")
    assert again.status_code == 400 and "has answers to this sheet already" in again.json()["problem"]
    second = _fill(written, "ben")
    assert site.done("/annotate/import.json", text=second, file="b.jsonl") == taken | {"annotator": "ben"}
    assert _lines(site.get(f"/annotate/sheet?sheet={taken['sheet']}&annotator=anna").text) == _lines(filled)
    site.done("/annotate/unseal.json", sheet=taken["sheet"], annotator="anna")
    (tmp_path / "anna.jsonl").write_text(filled, encoding="utf-8")
    wanted = scores.score(*answers.read([tmp_path / "anna.jsonl"], key=sheet.key_path(written)))
    found = site.get("/annotate/scores.json").json()["scores"]
    assert found == _plain(json.loads(json.dumps(wanted.to_dict())))


def test_an_empty_sheet_is_filled_in_here(site: Site, written: Path) -> None:
    """Uploaded with its key and nobody's answers, it is a sheet like those that were drawn here."""
    key = sheet.key_path(written).read_text(encoding="utf-8")
    taken = site.done("/annotate/import.json", text=written.read_text(encoding="utf-8"), key=key)
    assert taken["annotator"] == ""
    assert site.answer(taken["sheet"], "anna", 1, [GOOD], [1]).status_code == 200
    assert _lines(site.get(f"/annotate/sheet?sheet={taken['sheet']}").text) == _lines(written.read_text())


# -- what is refused ------------------------------------------------------------------------------------------------

WRITES = {
    "/annotate/sheets.json": {"neurons": 12, "prefixes": 8},
    "/annotate/answers.json": {
        "sheet": "s",
        "annotator": "a",
        "item": 1,
        "patterns": [],
        "applies": None,
        "version": 0,
    },
    "/annotate/import.json": {"text": "{}"},
    "/annotate/unseal.json": {"sheet": "s", "annotator": "a"},
    "/annotate/close.json": {"sheet": "s"},
    "/neurons/L1N3/note.json": {"note": "a", "version": 0},
}


@pytest.mark.parametrize("path", WRITES)
@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}])
def test_pages_of_other_sites_write_nothing(site: Site, path: str, headers: dict[str, str]) -> None:
    """403, and no file."""
    assert site.post(path, headers=headers, **WRITES[path]).status_code == 403
    assert list(site.folder.iterdir()) == []


def test_every_address_that_writes_is_tried() -> None:
    """The list above has all of them."""
    from fastapi.routing import APIRoute

    app = create([]).app
    posts = {route.path for route in app.routes if isinstance(route, APIRoute) and "POST" in route.methods}
    assert {path.replace("/runs/{run}", "").replace("{address}", "L1N3") for path in posts} == set(WRITES)


WRONG = [
    ("/annotate/sheets.json", {"neurons": 3}, 400, "take 8 or more"),
    ("/annotate/sheets.json", {"neurons": 300}, 400, "fewer than"),
    ("/annotate/sheets.json", {"neurons": 10**9}, 422, "neurons"),
    ("/annotate/sheets.json", {"neurons": "many"}, 422, "neurons"),
    ("/annotate/answers.json", {}, 422, "sheet: Field required"),
    ("/annotate/answers.json", WRITES["/annotate/answers.json"], 404, "there is none of that name"),
    ("/annotate/answers.json", {"item": 0}, 404, "items 1 to 17"),
    ("/annotate/answers.json", {"item": 10**30}, 404, "items 1 to 17"),
    ("/annotate/answers.json", {"annotator": "  "}, 400, "give a name"),
    ("/annotate/answers.json", {"annotator": "a\x00"}, 400, "give a name"),
    ("/annotate/answers.json", {"annotator": "a" * 61}, 400, "give a name"),
    ("/annotate/answers.json", {"annotator": "\ud800"}, 422, "annotator"),
    ("/annotate/answers.json", {"patterns": [GOOD | {"indices": [99]}]}, 400, "numbers from 1 to 8"),
    ("/annotate/answers.json", {"patterns": [GOOD | {"indices": [1, 1]}]}, 400, "different numbers"),
    ("/annotate/answers.json", {"patterns": [GOOD], "applies": [17]}, 400, "numbers from 1 to 16"),
    ("/annotate/answers.json", {"patterns": [GOOD | {"kind": "deep"}]}, 422, "shallow"),
    ("/annotate/answers.json", {"patterns": [GOOD | {"description": "a" * 1001}]}, 422, "1000"),
    ("/annotate/answers.json", {"patterns": [GOOD | {"description": "\ud800"}]}, 422, "description"),
    ("/annotate/answers.json", {"patterns": "yes"}, 422, "patterns"),
    ("/annotate/answers.json", {"version": 4}, 400, "reload"),
    ("/annotate/import.json", {"text": ""}, 400, "its first line is no header"),
    ("/annotate/import.json", {"text": "{oops"}, 400, "line 1: this is not JSON"),
    ("/annotate/import.json", {"text": "[" * 100_000}, 400, "line 1: this cannot be read"),
    ("/annotate/import.json", {"text": "1" * 10_000}, 400, "line 1: this cannot be read"),
    ("/annotate/import.json", {"text": '{"sheet": 1, "commitment": [1]}', "key": "{}"}, 400, "not the key of a sheet"),
    ("/annotate/import.json", {"text": "\ud800"}, 422, "text"),
    ("/annotate/unseal.json", {"sheet": "none", "annotator": "a"}, 404, "there is none of that name"),
    ("/annotate/close.json", {"sheet": "none"}, 404, "there is none of that name"),
    ("/neurons/L99N1/note.json", {"note": "a", "version": 0}, 404, "out of range"),
    ("/neurons/L1N3/note.json", {"note": "a" * 4001, "version": 0}, 422, "4000"),
    ("/neurons/L1N3/note.json", {"note": "a", "version": 3}, 400, "reload"),
    ("/neurons/L1N3/note.json", {"note": "a", "version": 0, "more": 1}, 422, "more"),
]  # fmt: skip


def test_wrong_input_is_said_in_a_line(site: Site) -> None:
    """Whatever is sent: 4xx, one line, and nothing is kept."""
    name = site.make()
    whole = {"sheet": name, "annotator": "anna", "item": 1, "patterns": [], "applies": None, "version": 0}
    for path, body, status, words in WRONG:
        sent = {**whole, **body} if path == "/annotate/answers.json" and body else body
        answer = site.client.post(
            f"/runs/run{path}", content=json.dumps(sent), headers={"content-type": "application/json"}
        )
        said = answer.json()["problem"]
        assert answer.status_code == status and words in said and "\n" not in said, (path, body, said)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]"):
        answer = site.client.post(
            "/runs/run/annotate/answers.json", content=content, headers={"content-type": "application/json"}
        )
        assert 400 <= answer.status_code < 500 and "\n" not in answer.json()["problem"], content
    assert site.get("/annotate.json").json()["sheets"][0]["annotators"] == []
    assert site.get("/notes.json").json() == []


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "\x00", "L1N3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def answering(run: mn.Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, str]:
    """A server with a sheet."""
    site = Site(run, tmp_path_factory.mktemp("answering"))
    return site, site.make()


@tries(75)
@given(st.data())
def test_whatever_is_sent_is_answered(answering: tuple[Site, str], data: st.DataObject) -> None:
    """Any JSON in the place of a body, or of a field of one: taken or refused in a line, never a failure."""
    site, name = answering
    path = data.draw(st.sampled_from(sorted(WRITES)))
    body: Any = {**WRITES[path], **({"sheet": name} if "sheet" in WRITES[path] else {})}
    field = data.draw(st.sampled_from([*body, "patterns", "more", ""]))
    body = body | {field: data.draw(ANYTHING)} if field else data.draw(ANYTHING)
    answer = site.client.post(
        f"/runs/run{path}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404, 422), answer.text
    assert answer.status_code == 200 or "\n" not in answer.json()["problem"]
    at = f"annotator={quote('a')}&sheet={name}"
    for page in (
        "/annotate",
        "/annotate/scores",
        f"/annotate?{at}&item=1",
        f"/annotate/sheet?{at}",
        "/notes",
    ):
        assert site.get(page).status_code == 200, page


def test_a_forged_sheet_is_refused(site: Site, written: Path) -> None:
    """Changed texts, lost items, another key, items that are none, a sheet of another run: a line, and nothing is
    kept."""
    key = json.loads(sheet.key_path(written).read_text(encoding="utf-8"))
    header, *lines = _lines(_fill(written, "anna"))
    names = [json.dumps(key | change) for change in ({}, {"seed": 1}, {"items": {}})]
    forged = [
        ([header, *lines[1:]], names[0], "is missing"),
        ([header, lines[0] | {"annotate": {"1": "\ud800"}}, *lines[1:]], names[0], "its texts are not"),
        ([header, lines[0] | {"annotate": [1]}, *lines[1:]], names[0], "its texts are not"),
        ([header, lines[0] | {"item": ["x"]}, *lines[1:]], names[0], "is missing"),
        ([header, lines[0] | {"patterns": [GOOD | {"description": "\ud800"}]}, *lines[1:]], names[0], "is no text"),
        ([header, *lines], names[1], "not the one that was sealed"),
        ([header, *lines], names[2], "not the one that was sealed"),
        ([header | {"annotator": {"a": 1} and "\ud800"}, *lines], names[0], "give a name"),
    ]  # fmt: skip
    for rows, key_text, words in forged:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        answer = site.post("/annotate/import.json", text=text, key=key_text, file="f.jsonl")
        assert answer.status_code == 400 and words in answer.json()["problem"], answer.text
    empty = answers.Key.model_validate(key | {"items": {}})
    text = json.dumps(header | {"commitment": empty.commitment})
    answer = site.post("/annotate/import.json", text=text, key=empty.model_dump_json())
    assert answer.status_code == 400 and "it has no items" in answer.json()["problem"]
    assert site.get("/annotate.json").json()["sheets"] == []


def test_a_sheet_of_another_run_is_refused(site: Site, written: Path) -> None:
    """By the key's own word, and it stays a 400: nothing is gone."""
    key = answers.Key.model_validate_json(sheet.key_path(written).read_text(encoding="utf-8"))
    other = key.model_copy(update={"run": "0" * 64})
    header, *lines = _lines(_fill(written, "anna"))
    text = sheet.spell([header | {"commitment": other.commitment}, *lines])
    answer = site.post("/annotate/import.json", text=text, key=other.model_dump_json())
    assert answer.status_code == 400 and "made from another run" in answer.json()["problem"]


def test_what_is_written_stays_text(site: Site) -> None:
    """Names, descriptions and notes full of markup."""
    name = site.make()
    bare = SAYS.replace("\x00", "").replace("\u202e", "")
    assert site.answer(name, bare, 1, [GOOD | {"description": SAYS}], [1]).status_code == 200
    site.done("/neurons/L1N3/note.json", note=SAYS, version=0)
    at = f"?annotator={quote(bare)}&item=1"
    for path in (
        "", "/notes", "/neurons/L1N3", "/annotate", f"/annotate{at}", f"/annotate{at}&half=apply",
        "/annotate/scores", "/search?q=onerror",
    ):  # fmt: skip
        page = site.get(path)
        assert page.status_code == 200 and "<img" not in page.text, path
    file = site.get(f"/annotate/sheet?sheet={name}&annotator={quote(bare)}")
    assert file.status_code == 200 and _lines(file.text)[0]["annotator"] == bare
    assert _lines(site.get("/notes/file").text)[0]["note"] == SAYS


# -- notes ----------------------------------------------------------------------------------------------------------


def test_notes_are_kept_found_and_exported(site: Site) -> None:
    """On the neuron's page, at home, by the search, as data and as a file; an empty one is none."""
    site.done("/neurons/L1N3/note.json", note="About Rivers", version=0)
    kept = site.done("/neurons/L2N5/note.json", note="about songs", version=0)
    assert kept["version"] == 1 and kept["neuron"] == "L2N5"
    assert site.get("/neurons/L1N3/note.json").json()["note"] == "About Rivers"
    assert "About Rivers" in site.get("/neurons/L1N3").text and "About Rivers" in site.get("").text
    found = site.get("/search.json?q=rivers").json()["note"]
    assert (found["total"], found["rows"][0]["neuron"]) == (1, "L1N3")
    assert "none has it" in site.get("/search.json?q=nothing&by=note").json()["note"]["problem"]
    listed = site.get("/notes.json").json()
    assert [note["neuron"] for note in listed] == ["L2N5", "L1N3"]
    assert _lines(site.get("/notes/file").text) == listed
    assert site.done("/neurons/L2N5/note.json", note="", version=1)["version"] == 2
    assert [note["neuron"] for note in site.get("/notes.json").json()] == ["L1N3"]
    assert site.post("/neurons/L2N5/note.json", note="late", version=1).status_code == 400


@tries(40)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_a_note(run: mn.Run, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """And comes back as it was."""
    file = LocalFile(tmp_path_factory.mktemp("notes") / "file", sheet.fingerprint(run))
    notes = Notes(file, run)
    assert notes.save(run.parse("L1N3"), text, 0).note == text
    assert Notes(file, run)[run.parse("L1N3")].note == text


def test_a_write_that_fails_leaves_nothing(run: mn.Run, tmp_path: Path) -> None:
    """A block that ends in an error takes all of its changes back."""
    file = LocalFile(tmp_path / "file", sheet.fingerprint(run))
    notes = Notes(file, run)
    notes.save(run.parse("L0N1"), "first", 0)
    with pytest.raises(ZeroDivisionError), file.writing() as connection:
        connection.execute("delete from notes")
        raise ZeroDivisionError
    assert notes[run.parse("L0N1")].note == "first"
    with pytest.raises(SheetError, match="reload"):
        notes.save(run.parse("L0N1"), "second", 0)
