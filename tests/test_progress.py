"""Progress in a log: lines now and then, a last one when a stage is finished."""

from __future__ import annotations

import pytest

from mnemoscope.cli.shared import Lines, progress_bars
from mnemoscope.records import Progress


def test_lines_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """How long it takes is said after ten seconds in which something was done, and every minute from then on; what a
    resumed run had done before is no speed; a finished stage is said once, and may come again."""
    clock = [0.0]
    lines = Lines(now=lambda: clock[0])
    steps = (
        (0, 1_000),
        (9, 1_100),
        (11, 1_000),
        (20, 1_100),
        (61, 1_200),
        (80, 1_200),
        (4_000, 9_000),
        (4_001, 9_000),
    )
    for now, done in steps:
        clock[0] = now
        lines(Progress("mining", done, 9_000, "tokens"))
    assert capsys.readouterr().err.splitlines() == [
        "mining: 1,100 of 9,000 tokens, 0:00:20, about 0:26:20 left",
        "mining: 1,200 of 9,000 tokens, 0:01:20, about 0:52:00 left",
        "mining: 9,000 of 9,000 tokens, 1:06:40",
    ]
    lines(Progress("mining", 0, 5, "tokens"))
    clock[0] += 2
    lines(Progress("mining", 5, 5, "tokens"))
    assert capsys.readouterr().err == "mining: 5 of 5 tokens, 0:00:02\n"


def test_what_follows_a_stage_is_told_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is known how long later stages take, when all is done."""
    clock = [0.0]
    lines = Lines(now=lambda: clock[0])
    for now, done in ((0, 0), (20, 100), (80, 500)):
        clock[0] = now
        lines(Progress("mining", done, 1_000, "tokens", after=60.0))
    assert capsys.readouterr().err.splitlines() == [
        "mining: 100 of 1,000 tokens, 0:00:20, about 0:03:00 left, 0:04:00 until all is done",
        "mining: 500 of 1,000 tokens, 0:01:20, about 0:01:20 left, 0:02:20 until all is done",
    ]


def test_a_total_that_is_not_known_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """How much is done is said, and no end is promised; with the total the stage is finished."""
    clock = [0.0]
    lines = Lines(now=lambda: clock[0])
    for now, total in ((0, 0), (70, 0), (80, 500)):
        clock[0] = now
        lines(Progress("planning", 500, total, "tokens"))
    said = ["planning: 500 tokens, 0:01:10", "planning: 500 of 500 tokens, 0:01:20"]
    assert capsys.readouterr().err.splitlines() == said


def test_a_file_gets_lines_and_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Under pytest stderr is no terminal."""
    with progress_bars() as report:
        report(Progress("drawing", 3, 3, "figures"))
    assert capsys.readouterr().err == "drawing: 3 of 3 figures, 0:00:00\n"


def test_a_note_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """What a job has to say is said as it is, at once, and moves no stage."""
    lines = Lines(now=lambda: 0.0)
    lines(Progress("planning", 5, 5, "tokens", "231 contexts were left out"))
    lines(Progress("planning", 5, 5, "tokens"))
    assert capsys.readouterr().err.splitlines() == [
        "231 contexts were left out",
        "planning: 5 of 5 tokens, 0:00:00",
    ]
