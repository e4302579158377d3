"""Writes whole files or none, and says beforehand whether a place can be written to.

    check_file("page.html", "writing the page")         # before the work; leaves nothing behind
    write("page.html", text, "writing the page")        # after it

What the file system refuses becomes one line of the error tree, the same whenever it is found out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from mnemoscope.errors import MnemoscopeError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 255  # bytes of a file name
ABOUT = "about.json"  # in each folder of what is kept in the cache folder: what it is, for people
_FILE_URL = re.compile(r"(?:file|local):/+(?:localhost/+)?", re.I)
_BLOCK = 4096  # bytes that are written to try a place: a full disk takes an empty file

File = str | os.PathLike[str]


@contextmanager
def refusals(
    doing: str,
    cure: str = "choose a file that can be written",
    full: str = "free some space and run the same command again",
    error: type[MnemoscopeError] = RunError,
) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    doing  what is being done to what: "writing the page x.html"
    cure   what to do about it; `full` when the disk is
    error  the kind to raise
    """
    try:
        yield
    except OSError as refused:
        reason = refused.strerror or " ".join(str(refused).split())
        if refused.errno == errno.ENOSPC:
            reason = "the disk is full"
        raise error(f"{doing}: {reason}; {full if refused.errno in _FULL else cure}") from refused
    except ValueError as refused:
        if "null" not in str(refused):
            raise
        raise error(f"{doing}: no name holds a null character; {cure}") from refused


@contextmanager
def replacing(file: File, doing: str, error: type[MnemoscopeError] = RunError) -> Iterator[Path]:
    """Gives a path to write to, which takes the file's name when the block ends without an error.

    At no moment is there half of the file, and a failed attempt leaves nothing. A link is followed, and what is no
    ordinary file (/dev/stdout) is written to as it is.
    """
    with refusals(f"{doing} {file}", error=error):
        target = _target(file)
        if _is_device(target):
            yield target
            return
        partial = _partial(target)
        try:
            yield partial
            sync(partial)
            partial.replace(target)
            sync(target.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write(file: File, content: str | bytes, doing: str, error: type[MnemoscopeError] = RunError) -> None:
    """Make a file hold `content` (text in UTF-8), or leave it as it was: see `replacing`."""
    with replacing(file, doing, error) as partial:
        partial.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def check_file(
    file: File, doing: str, error: type[MnemoscopeError] = RunError, *, reads: Iterable[File] = ()
) -> None:
    """Raise now what `replacing` would raise after the work: no such folder, a folder of that name, no right to
    write there, no space; or that it is one of the files which the same work `reads` and would be lost."""
    with refusals(f"{doing} {file}", error=error):
        target = _target(file)
        if _is_device(target):
            return
        _try(target.parent)
        for source in map(expanded, reads):
            if source.exists() and target.exists() and target.samefile(source):
                raise error(f"{doing} {file}: that file is read here and would be lost; choose another name")


def check_folder(folder: File, doing: str, error: type[MnemoscopeError] = RunError) -> None:
    """Raise now if nothing can be written in a folder or, where there is none yet, if it cannot be made."""
    with refusals(f"{doing} {folder}", "choose a folder that can be written to", error=error):
        _try(expanded(folder).absolute())


@contextmanager
def new_folder(folder: File, doing: str, error: type[MnemoscopeError] = RunError) -> Iterator[Path]:
    """Gives a folder to write into, which takes the name of one that is not there yet, or is empty, when the block ends
    without an error; those above it are made.

    At no moment has half of a folder the name, and a failed attempt leaves nothing.
    """
    check_new_folder(folder, doing, error)
    with refusals(f"{doing} {folder}", "choose a folder that can be written to", error=error):
        target = Path(os.path.realpath(expanded(folder)))
        partial = _partial(target)
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*"), reverse=True):
                sync(file)
            if target.exists():
                target.rmdir()  # it is empty, or this fails
            partial.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_new_folder(folder: File, doing: str, error: type[MnemoscopeError] = RunError) -> None:
    """Raise now what `new_folder` would raise after the work: there is something in the folder, it is a file, or none
    can be made there."""
    with refusals(f"{doing} {folder}", "choose a folder that can be written to", error=error):
        target = Path(os.path.realpath(expanded(folder)))
        if target.is_dir() and any(target.iterdir()):
            raise error(
                f"{doing} {folder}: the folder holds something, which would be lost; give a new or empty one"
            )
        _try(target)


def make_folder_of(file: File, doing: str, error: type[MnemoscopeError] = RunError) -> None:
    """Make the folder that a file is to lie in, and those above it: for what has a folder of its own (-o, --report)."""
    with refusals(f"{doing} {file}", "choose a folder that can be written to", error=error):
        expanded(file).parent.mkdir(parents=True, exist_ok=True)


def expanded(path: File) -> Path:
    """The path that is meant: with ~ as the home folder, or what a file:// URL names. A name like ~draft, of no user's
    home, is a name like any other."""
    if url := _FILE_URL.match(text := os.fspath(path)):
        return Path("/", unquote(text[url.end() :]))
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises RuntimeError then


def kind(path: Path, doing: str, error: type[MnemoscopeError] = RunError) -> str:
    """What is at a path: "folder", "file", "other" (a pipe, a device), or "" where there is nothing; an error where the
    system does not say (no right to look, a name that is too long)."""
    with refusals(f"{doing} {path}", "give a path that can be read", error=error):
        return "folder" if path.is_dir() else "file" if path.is_file() else "other" if path.exists() else ""


def read_text(path: File) -> str:
    """What a file of text in UTF-8 holds; OSError or ValueError if it cannot be read.

    What is no ordinary file is refused: a pipe is empty when it is read again, and holds up whoever reads it while
    nobody writes.
    """
    file = expanded(path)
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is no ordinary file", str(file))
    return file.read_text(encoding="utf-8")


def cache_folder() -> Path:
    """Where samples and converted models are kept; not created here."""
    if folder := os.environ.get("MNEMOSCOPE_CACHE"):
        return expanded(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "mnemoscope"
    if sys.platform == "win32" and (folder := os.environ.get("LOCALAPPDATA")):
        return Path(folder) / "mnemoscope"
    try:
        home = Path.home()
    except RuntimeError as error:  # a container's user of no name
        raise RunError(
            "looking for the cache folder: this user has no home folder; name a folder in MNEMOSCOPE_CACHE"
        ) from error
    return (home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache") / "mnemoscope"


def keep(file: Path, content: bytes) -> None:
    """Write a file that other processes may be writing, too: beside its place, under a name of its own, then rename."""
    scratch = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        scratch.write_bytes(content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def make_room(folder: Path, most: int) -> None:
    """Remove folders of what is kept, used longest ago first, until the others hold no more than so many bytes; what
    was used within the hour stays, and so does what says nothing of what it is, which is not ours."""
    used, total = dict[Path, float](), 0
    for kept in folder.glob("*/"):
        with suppress(OSError):
            if (kept / ABOUT).exists() and not kept.name.startswith("."):
                used[kept] = kept.stat().st_mtime
    for kept in sorted(used, key=lambda kept: -used[kept]):
        with suppress(OSError):
            total += sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
            if total > most and time.time() - used[kept] > 3600:  # not one that is being made
                shutil.rmtree(kept, ignore_errors=True)


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text of JSON lines that hold anything, by their numbers from 1. Only a line feed ends one: what
    else ends a line elsewhere (U+2028, U+0085) JSON may hold as it is."""
    yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def from_json(text: str) -> Any:
    """What a text of JSON says; ValueError for what is none, and for what is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(file: File) -> Path:
    """The file itself, where links lead; OSError if none can be made there."""
    target = Path(os.path.realpath(expanded(file)))
    if target.is_symlink():
        raise _os_error(errno.ELOOP)
    if target.is_dir():
        raise OSError(errno.EISDIR, "there is a folder of that name")
    if not target.parent.exists():
        raise OSError(errno.ENOENT, f"there is no folder {target.parent}")
    if not target.parent.is_dir():
        raise OSError(errno.ENOTDIR, f"{target.parent} is a file and not a folder")
    return target


def _is_device(target: Path) -> bool:
    return target.exists() and not target.is_file()


def _partial(target: Path) -> Path:
    """A hidden neighbour, whose name is short enough however long that of the file is."""
    name = f".{target.name}.partial"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.partial"
    return target.with_name(name)


def _try(folder: Path) -> None:
    if "\0" in os.fspath(folder):
        raise ValueError("embedded null byte")  # as what makes it says
    while not os.path.lexists(folder):
        if len(os.fsencode(folder.name)) > _LONGEST:
            raise _os_error(errno.ENAMETOOLONG)
        folder = folder.parent
    if not folder.is_dir():
        raise _os_error(errno.ENOTDIR)
    with tempfile.TemporaryFile(dir=folder) as scratch:
        scratch.write(bytes(_BLOCK))


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
