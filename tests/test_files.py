"""Whole files or none, and a word beforehand where nothing can be written."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope import files
from mnemoscope.errors import CorpusError, PatternError, RunError
from mnemoscope.patterns.pattern import parse
from mnemoscope.prediction.prompts import read_prompts

# Names that shells, globs, SQL, URLs and terminals read otherwise, and the longest that there may be.
NAMES = [
    "plain", "with space", "naïve é 日本語", "run[v1]", "run[1]", "what?", "star*", "a{b,c}", "per%cent", "hash#1",
    "quote's", 'double"quote', "dollar$HOME", "back\\slash", "-dash", "semi;colon", "~tilde", "new\nline", "x" * 255,
    "é" * 127, "trailing ", "amp&<b>", os.fsdecode(b"caf\xe9"),
]  # fmt: skip


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(RunError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_written_and_checked(name: str, tmp_path: Path) -> None:
    """Whatever a file or a folder is called, it is made under that very name, and nothing beside it."""
    files.check_file(tmp_path / name, "writing")
    files.check_folder(tmp_path / name, "writing")
    assert not list(tmp_path.iterdir())
    files.write(tmp_path / name, "text", "writing")
    assert [os.fspath(path) for path in tmp_path.iterdir()] == [f"{tmp_path}/{name}"]


@given(st.binary(), st.binary(), st.booleans())
def test_a_file_is_replaced_whole_or_stays(before: bytes, after: bytes, fails: bool) -> None:
    """What was there stays until all of the new content is, and a failed attempt leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_bytes(before)
        with suppress(KeyboardInterrupt), files.replacing(file, "writing") as partial:
            partial.write_bytes(after)
            assert file.read_bytes() == before
            if fails:
                raise KeyboardInterrupt
        assert file.read_bytes() == (before if fails else after)
        assert list(Path(folder).iterdir()) == [file]


def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    """The file that a link leads to is what is written."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write(tmp_path / "link", "text", "writing")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_device_is_written_to_and_never_replaced() -> None:
    """/dev/null swallows what it is given and stays a device; /dev/full says that it is full."""
    files.write("/dev/null", "text", "writing")
    assert Path("/dev/null").is_char_device()
    assert "writing /dev/full: the disk is full" in refused(files.write, "/dev/full", "text", "writing")
    assert Path("/dev/full").is_char_device()


WRONG: dict[str, tuple[str, str]] = {
    "a folder": ("folder", "there is a folder of that name"),
    "no name": ("", "there is a folder of that name"),
    "no folder": ("none/x.html", "there is no folder"),
    "below a file": ("file/x.html", "is a file and not a folder"),
    "too long": ("x" * 256, "File name too long"),
    "a loop": ("loop", "Too many levels of symbolic links"),
    "no real file system": ("/proc/x.html", "No such file or directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_checking_and_writing_refuse_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the file and the cure; the check says before the work what writing would say after it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    name, words = WRONG[case]
    found = refused(files.check_file, name, "writing the page")
    assert found == refused(files.write, name, "text", "writing the page")
    assert found.startswith(f"writing the page {name}: ") and words in found
    assert found.endswith("; choose a file that can be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]


@pytest.mark.parametrize("name", ["./in.jsonl", "link", "hard"])
def test_what_is_read_is_not_written_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name: another file, and one that is not there yet, may be written."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("{}")
    Path("link").symlink_to("in.jsonl")
    Path("hard").hardlink_to("in.jsonl")
    Path("other").write_text("")
    found = refused(lambda: files.check_file(name, "writing the table", reads=["missing", "in.jsonl"]))
    assert found == f"writing the table {name}: that file is read here and would be lost; choose another name"
    for fine in ("other", "new"):
        files.check_file(fine, "writing the table", reads=["missing", "in.jsonl"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Permission denied; choose"),
        (errno.EROFS, "Read-only file system; choose"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "free some space"),
    ],
)
def test_what_the_system_refuses_is_said_beforehand(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No right, a read-only disk and a full one are found out by trying, for files and for folders not yet there."""

    def no(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", no)
    assert words in refused(files.check_file, tmp_path / "x.html", "writing")
    assert words in refused(files.check_folder, tmp_path / "a" / "b", "writing")


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/x/y", "a/" + "x" * 256])
def test_what_cannot_be_a_folder_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name or above it, a place without files, a name too long."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert refused(files.check_folder, name, "writing the run").endswith(
        "; choose a folder that can be written to"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_are_made_where_that_is_wanted(tmp_path: Path) -> None:
    """What has a folder of its own gets one; a file in place of it is refused."""
    files.make_folder_of(tmp_path / "a" / "b" / "x.parquet", "writing the table")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    assert "choose a folder" in refused(files.make_folder_of, tmp_path / "file" / "x" / "y", "writing")


def test_the_kind_of_error_is_the_callers(tmp_path: Path) -> None:
    """A writer of something else raises its own kind."""
    with pytest.raises(CorpusError, match="spooling"):
        files.write(tmp_path, "", "spooling", CorpusError)


# -- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_written_whole(name: str, tmp_path: Path) -> None:
    """It has its name only once the block has ended, and nothing stays beside it."""
    target = tmp_path / name
    for _ in range(2):  # where there is none, and where there is an empty one
        with files.new_folder(target, "exporting to") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text("text")
            assert not (target / "inner").exists()
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
        assert (target / "inner" / "file").read_text() == "text"
        (target / "inner" / "file").unlink()
        (target / "inner").rmdir()


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    """Nor does what a killed attempt left behind; an empty folder that was there stays."""
    target, left = tmp_path / "out", tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").write_text("old")
    target.mkdir()
    with pytest.raises(KeyboardInterrupt), files.new_folder(target, "exporting to") as folder:
        assert not (folder / "half").exists()
        (folder / "file").write_text("text")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(target.iterdir())


def test_a_folder_that_holds_something_is_never_replaced(tmp_path: Path) -> None:
    """Not even when something was put there meanwhile."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    said = refused(files.check_new_folder, tmp_path / "out", "exporting to")
    assert said.endswith("the folder holds something, which would be lost; give a new or empty one")
    late = tmp_path / "late"
    with pytest.raises(RunError, match="not empty"), files.new_folder(late, "exporting to") as folder:
        (folder / "file").write_text("new")
        late.mkdir()
        (late / "file").write_text("kept")
    assert (late / "file").read_text() == "kept" and not list(tmp_path.glob(".*"))
    (tmp_path / "plain").write_text("kept")
    assert "Not a directory" in refused(files.check_new_folder, tmp_path / "plain", "exporting to")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b"])
def test_a_line_of_json_ends_with_a_line_feed_alone(mark: str, tmp_path: Path) -> None:
    """Other programs write what ends a line elsewhere as it is."""
    rows = [{"prompt": f"before{mark}after"}, {"prompt": "another"}]
    text = "".join(json.dumps(row, ensure_ascii=mark == "\x0b") + "\r\n\n" for row in rows)
    assert [json.loads(line) for _, line in files.json_lines(text)] == rows
    (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [row.prompt for row in read_prompts(tmp_path / "prompts.jsonl")] == [row["prompt"] for row in rows]


def test_json_that_is_nested_too_deeply_is_a_wrong_value() -> None:
    """As other faults in it are."""
    with pytest.raises(ValueError, match="nested too deeply"):
        files.from_json("[" * 100_000)
    with pytest.raises(PatternError):
        parse(f"tokens:{'[' * 100_000}")


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no name."""
    for name in ("HOME", "XDG_CACHE_HOME", "MNEMOSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(RunError, match="no home folder; name a folder in MNEMOSCOPE_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("MNEMOSCOPE_CACHE", "/somewhere")
    assert files.cache_folder() == Path("/somewhere")
