"""Triggers by where they are: what is answered from the index is what the table says, and only a whole one is used."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from synthetic import make_run

import mnemoscope as mn
from mnemoscope.atlas import index
from mnemoscope.errors import QueryError
from mnemoscope.neuron.card import usual_signs
from mnemoscope.run.places import spans
from mnemoscope.text import cache


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run that is read without an index."""
    return mn.open_run(make_run(tmp_path_factory.mktemp("runs") / "run", neurons=70).path)


@pytest.fixture(scope="module")
def indexed(plain: mn.Run) -> Iterator[mn.Run]:
    """The same, with one."""
    run = mn.open_run(plain.path)
    index.indexed(run)
    yield run
    cache.clear("places")


@pytest.fixture(scope="module")
def text(plain: mn.Run) -> str:
    """All of its text."""
    contexts = plain.table("contexts").collect()["tokens"].to_list()
    return "\n\n".join(plain.vocabulary.text(tokens) for tokens in contexts)


def _answer(run: mn.Run, **question: Any) -> Any:
    try:
        hits = run.find(**question)
    except QueryError as error:
        return str(error)
    return hits.question, hits.null, hits.total, hits.rows


def _same(one: Any, other: Any) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one[:3] == other[:3]
    assert_frame_equal(one[3], other[3])


@tries(60)
@given(st.data())
def test_texts_are_answered_as_without_an_index(plain: mn.Run, indexed: mn.Run, text: str, data: Any) -> None:
    """Whatever part of the text is looked for, in one layer or all: hits, chance, strongest, order."""
    start = data.draw(st.integers(0, len(text) - 1))
    wanted = text[start : start + data.draw(st.integers(1, 12))]
    question = {
        "trigger": wanted,
        "layer": data.draw(st.sampled_from([None, 0, 2])),
        "count": data.draw(st.integers(0, 99)),
    }
    _same(_answer(indexed, **question), _answer(plain, **question))


@pytest.mark.parametrize("layer", [None, 1])
def test_other_questions_are_answered_as_without_an_index(
    plain: mn.Run, indexed: mn.Run, layer: int | None
) -> None:
    """Tokens either way, and neurons alike."""
    for question in (
        {"promotes": " capital"},
        {"suppresses": " city"},
        {"like": "L1N3"},
        {"like": "L0N0"},
        {"trigger": "no such"},
    ):
        _same(_answer(indexed, **question, layer=layer), _answer(plain, **question, layer=layer))
    assert_frame_equal(
        *(usual_signs(run, layer).collect().sort("layer", "neuron") for run in (indexed, plain))
    )


def test_hits_are_counted_as_by_hand(plain: mn.Run, indexed: mn.Run) -> None:
    """A search by the definition: every trigger whose token overlaps an occurrence in the bytes of its context."""
    wanted = b"the c"
    raw = plain.vocabulary._bytes
    hits: dict[tuple[int, int, int], int] = {}
    contexts = dict(plain.table("contexts").select("context", "tokens").collect().iter_rows())
    for row in plain.table("triggers").collect().iter_rows(named=True):
        pieces = [raw[token] for token in contexts[row["context"]]]
        whole = b"".join(pieces)
        begins = len(b"".join(pieces[: row["position"]]))
        ends = begins + len(pieces[row["position"]])
        starts = [place for place in range(len(whole)) if whole.startswith(wanted, place)]
        if any(place < ends and place + len(wanted) > begins for place in starts):
            side = (row["layer"], row["neuron"], row["polarity"])
            hits[side] = hits.get(side, 0) + 1
    rows = indexed.find(trigger="the c", count=1000).rows
    counted = {}
    for name, sign, number in rows.select("neuron", "sign", "hits").iter_rows():
        counted[(*indexed.parse(name), 1 if sign == "+" else -1)] = number
    assert counted == hits and hits


def test_contexts_are_those_of_the_table(plain: mn.Run, indexed: mn.Run) -> None:
    """By id; one that is not there is refused in the same words."""
    ids = [0, 3, 1, 3]
    for one, other in zip(plain.contexts(ids).items(), indexed.contexts(ids).items(), strict=True):
        assert one[0] == other[0] and one[1][:2] == other[1][:2] and (one[1].tokens == other[1].tokens).all()
    for run in (plain, indexed):
        with pytest.raises(QueryError, match="reading context 99999"):
            run.contexts([0, 99_999])


@tries(60)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5))))
def test_spans_are_all_numbers_of_each(pairs: list[tuple[int, int]]) -> None:
    """One after another, empty ones too."""
    starts = np.array([start for start, _ in pairs], np.int64)
    sizes = np.array([size for _, size in pairs], np.int64)
    assert spans(starts, starts + sizes).tolist() == [start + i for start, size in pairs for i in range(size)]


def test_only_a_whole_index_is_used(plain: mn.Run, indexed: mn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lacks a file or a part of one is made again; what is whole is not."""
    folder = index._folder(plain)
    made: list[str] = []
    fill = index._fill
    monkeypatch.setattr(index, "_fill", lambda *given: made.append("made") or fill(*given))
    index.indexed(mn.open_run(plain.path))
    assert not made
    wholesome = {file.name: file.read_bytes() for file in folder.iterdir()}

    def torn(name: str, content: bytes | None) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        before = len(made)
        index.indexed(mn.open_run(plain.path))
        assert len(made) == before + 1
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == wholesome

    torn("byplace-sides.npy", None)
    torn("wholetext-text.npy", wholesome["wholetext-text.npy"][:-1])
    torn("about.json", None)
    torn("about.json", b"{")
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_an_index_of_another_run_is_not_used(tmp_path: Path) -> None:
    """A run that is built anew in its folder has an index of its own, and the earlier one goes."""
    make_run(tmp_path / "run", seed=1)
    index.indexed(mn.open_run(tmp_path / "run"))
    first = index._folder(mn.open_run(tmp_path / "run"))
    assert first.is_dir()
    make_run(tmp_path / "run", seed=2, overwrite=True)
    again = mn.open_run(tmp_path / "run")
    index.indexed(again)
    assert index._folder(again).is_dir() and not first.exists()
    kept = [entry for entry in cache.entries("places") if str(tmp_path) in entry.what]
    assert [entry.path for entry in kept] == [index._folder(again)]
    shutil.rmtree(index._folder(again))


def test_a_full_disk_costs_the_index_and_not_the_server(
    plain: mn.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its room is taken before anything is written to what is mapped, where a full disk would end the process."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    run = mn.open_run(plain.path)
    index.indexed(run)
    assert not list((tmp_path / "places").iterdir())
    _same(_answer(run, trigger="capital"), _answer(plain, trigger="capital"))


def test_an_index_is_made_where_nothing_can_be_kept(
    plain: mn.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In memory, with the same answers."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "file" / "below"))
    run = mn.open_run(plain.path)
    told: list[Any] = []
    index.indexed(run, told.append)
    assert told[-1].done == told[-1].total == 2 * 3
    _same(_answer(run, trigger="capital"), _answer(plain, trigger="capital"))
    assert json.loads((plain.path / "manifest.json").read_text())  # the run is as it was
