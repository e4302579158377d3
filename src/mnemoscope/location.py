"""Files and folders behind a URL of fsspec (s3://, gs://, hf://, memory:// ...), named as paths are.

    place("runs/demo")                        # a path, as it always was
    place("s3://bucket/runs/demo")            # a Location
    place("s3://bucket/runs/demo") / "manifest.json"

What fails is tried again a few times; what fails for good becomes one line (`RemoteError`). What is read of a file
whose sha256 is known is kept in the cache folder, so that it is fetched once; under that hash, and under where it came
from and which version of it that was: of parts nobody can tell whether they are of the file that the hash is of.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from mnemoscope import files
from mnemoscope.errors import RemoteError, RunError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

T = TypeVar("T")

TRIES = 6
WAIT = 0.1  # seconds before the second try, and twice as many before each one after
PATIENCE = 20.0  # seconds after which nothing is tried again: libraries have tries of their own
PIECE = 16 << 20  # bytes of a file that is read whole which are asked for at once
MOST_BYTES = 4 << 30  # that are kept of files; those that were used longest ago make room

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.I)  # of two letters: C:/ is a disk
_LOCAL = re.compile(r"(file|local):", re.I)
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
          NotImplementedError, ImportError, TypeError, ValueError)  # fmt: skip
_WEB = ("http", "https")  # of servers that are only read, and need not list what they have
_INSTALLED_BY = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
}  # others say it themselves
_VERSION = (
    "ETag",
    "etag",
    "LastModified",
    "Last-Modified",
    "updated",
    "mtime",
    "created",
    "md5Hash",
    "blob_id",
)
_MOST_LOOKED = 64  # parts
_CRC = 4  # bytes
_END = 64 << 10  # bytes of a file that Parquet's readers read first


@dataclass(frozen=True)
class Location:
    """A file or a folder behind a URL.

    url      without a slash at its end
    sha256   of a file whose content is known; then what is read of it is kept
    size     of such a file, in bytes
    version  what changes when it does, as far as the file system says
    """

    url: str
    sha256: str = ""
    size: int = 0
    version: str = ""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of it."""
        return PurePosixPath(self.url).name

    @property
    def parent(self) -> Location:
        """The folder that it is in."""
        return Location(self.url.rpartition("/")[0])

    def resolve(self) -> Location:
        """Itself: it is whole already."""
        return self

    @property
    def inside(self) -> dict[str, Location]:
        """Each file in the folder by name, with its size and version, as it was when first asked; none if there is no
        folder."""

        def listed(system: Any, path: str) -> dict[str, Location]:
            system.invalidate_cache()
            try:
                entries = system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            names = {PurePosixPath(each["name"]).name: each for each in entries if each["type"] == "file"}
            return {name: _found(self / name, entry) for name, entry in names.items()}

        # No cached_property: before Python 3.12 threads that look at other places would wait for this one.
        if "inside" not in self.__dict__:
            self.__dict__["inside"] = self._ask("listing", listed)
        held: dict[str, Location] = self.__dict__["inside"]
        return held

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server, which is only read, and need not list what it has."""
        return self._scheme in _WEB

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    def held(self, name: str) -> Location | None:
        """A file in the folder, with its size and version, as of `inside`; a web server is asked for each."""
        if not self.is_web:
            return self.inside.get(name)
        if name not in self._known:
            self._known[name] = self._asked(name)
        return self._known[name]

    @cached_property
    def _known(self) -> dict[str, Location | None]:
        return {}

    def _asked(self, name: str) -> Location | None:
        def found(system: Any, path: str) -> Location | None:
            try:
                return _found(self / name, system.info(f"{path}/{name}"))
            except FileNotFoundError:
                return None

        return self._ask("looking for files at", found)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder, by name."""
        return {name: file.size for name, file in self.inside.items()}

    def below(self) -> list[Location]:
        """A file, all files below a folder, or those that a pattern fits, by their names: with sizes and versions."""

        def listed(system: Any, path: str) -> list[Location]:
            system.invalidate_cache()
            if self.is_web or system.isfile(path):
                entries = {path: system.info(path)}
            elif any(mark in path for mark in "*?[") and not system.isdir(path):
                entries = system.glob(path, detail=True)
            else:
                entries = system.find(path, detail=True)
            return [
                _found(_location(system.unstrip_protocol(name)), entry)
                for name, entry in sorted(entries.items())
                if entry["type"] == "file"
            ]

        return self._ask("looking for files at", listed)

    def read_bytes(self) -> bytes:
        """All of a file."""
        return self._ask("reading", lambda system, path: bytes(system.cat_file(path)))

    def check_written(self, doing: str) -> None:
        """RemoteError for what is only read."""
        if self.is_web:
            raise RemoteError(
                f"{doing} {self.url}: web servers are only read; give a bucket (s3://, gs://), hf://, or a folder"
            )

    def write_bytes(self, content: bytes) -> None:
        """Make a file hold this."""
        self.check_written("writing")

        def written(system: Any, path: str) -> None:
            try:
                system.pipe_file(path, content)
            except FileNotFoundError:  # folders have to be made, which `put_file` does, and makes no bucket
                with tempfile.NamedTemporaryFile() as file:
                    file.write(content)
                    file.flush()
                    system.put_file(file.name, path)

        self._ask("writing", written)

    def upload(self, file: Path, told: Callable[[int], None] = lambda _: None) -> None:
        """Make it hold what a file of this machine does; `told` is called with how many bytes have arrived."""
        self.check_written("uploading")

        self._ask("uploading", lambda system, path: system.put_file(str(file), path, callback=_telling(told)))

    def unlink(self) -> None:
        """Remove a file, if it is there."""

        def removed(system: Any, path: str) -> None:
            with suppress(FileNotFoundError):
                system.rm_file(path)

        self._ask("removing", removed)

    def fetch(self, target: Path | None = None, told: Callable[[int], None] = lambda _: None) -> str:
        """Read all of a file that was listed, to a file of this machine if one is given; returns its sha256.

        `told` is called with how many bytes have come.
        """
        if self.is_web and target is not None:  # which may send nothing but whole files
            self._ask(
                "reading", lambda system, path: system.get_file(path, str(target), callback=_telling(told))
            )
            return files.sha256(target)
        digest = hashlib.sha256()
        with open(target or os.devnull, "wb") as file:  # noqa: PTH123 - or nothing
            if self.size < 0:
                content = self.read_bytes()
                digest.update(content)
                file.write(content)
            for start in range(0, self.size, PIECE):
                piece = self._range(start, min(start + PIECE, self.size))
                digest.update(piece)
                file.write(piece)
                told(start + len(piece))
        return digest.hexdigest()

    def open(self) -> IO[bytes]:
        """A file whose content is known, to read from any place: each part is fetched when it is first read."""
        assert self.sha256, self.url
        with suppress(OSError):
            os.utime(self._kept)  # used now
        return cast("IO[bytes]", _Parts(self))

    def _range(self, start: int, stop: int) -> bytes:
        def cut(system: Any, path: str) -> bytes:
            content = bytes(system.cat_file(path, start=start, end=stop))
            if len(content) == self.size:  # of a web server that sends nothing but whole files
                content = content[start:stop]
            if len(content) != stop - start:
                raise OSError(f"{len(content)} bytes came in place of {stop - start}")
            return content

        return self._ask("reading", cut) if start < stop else b""

    def part(self, start: int, stop: int) -> bytes:
        """Bytes of a file whose content is known, from the cache folder where they are there, else to it.

        Its end, which says where everything is, is fetched once, however much of it is asked for.
        """
        end = max(0, self.size - _END)
        if stop <= end:
            return self._part(start, stop)
        before = self._part(start, end) if start < end else b""
        return before + self._part(end, self.size)[max(0, start - end) : stop - end]

    def _part(self, start: int, stop: int) -> bytes:
        file = self._kept / f"{start}-{stop}"
        with suppress(OSError):
            around, first = (file, start) if file.exists() else self._around(start, stop)
            kept = around.read_bytes()
            if zlib.crc32(kept[_CRC:]) == int.from_bytes(kept[:_CRC], "little"):
                return kept[_CRC + start - first : _CRC + stop - first]
        content = self._range(start, stop)
        with suppress(OSError):  # where nothing can be kept, it is fetched again
            if not self._kept.exists():
                files.make_room(self._kept.parent, MOST_BYTES)
                self._kept.mkdir(parents=True)
                files.keep(self._kept / files.ABOUT, json.dumps({"url": self.url}).encode())
            files.keep(file, zlib.crc32(content).to_bytes(_CRC, "little") + content)
        return content

    def _around(self, start: int, stop: int) -> tuple[Path, int]:
        """A part that holds this one, and where it begins; of a file of which so much was read that looking would take
        longer, none."""
        names = [file.name for file in self._kept.iterdir()]
        for name in names if len(names) <= _MOST_LOOKED else ():
            first, _, last = name.partition("-")
            if last.isdecimal() and int(first) <= start and stop <= int(last):
                return self._kept / name, int(first)
        raise FileNotFoundError(self._kept)

    @cached_property
    def _kept(self) -> Path:
        """Where parts of it are kept, each named by where it begins and ends."""
        facts = "\n".join((self.sha256, self.url, self.version))
        return files.cache_folder() / "parts" / hashlib.sha256(facts.encode()).hexdigest()[:40]

    def _ask(self, doing: str, call: Callable[[Any, str], T]) -> T:
        """What a call of the file system gives, which is asked again when it fails."""
        wait, begun = WAIT, time.monotonic()
        for left in reversed(range(TRIES)):
            try:
                import fsspec

                return call(*fsspec.core.url_to_fs(self.url))
            except Exception as error:  # the libraries raise dozens of kinds, and none that they promise
                if isinstance(error, _FINAL) or not left or time.monotonic() - begun > PATIENCE:
                    raise self._refusal(doing, error) from error
                time.sleep(wait)
                wait *= 2
        raise AssertionError(TRIES)

    def _refusal(self, doing: str, error: Exception) -> RemoteError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, ImportError):
            extra = "'mnemoscope[remote]'"
            package = extra if error.name == "fsspec" else _INSTALLED_BY.get(self._scheme, extra)
            return RemoteError(
                f"{doing} {self.url}: a package that reads such URLs is missing ({reason}); pip install {package}"
            )
        if isinstance(error, FileNotFoundError):
            reason = f"there is nothing of that name ({reason})"
        return RemoteError(
            f"{doing} {self.url}: {reason}; check the address, your rights there, and the network"
        )


def _telling(told: Callable[[int], None]) -> Any:
    """What a file system calls with how many bytes have gone."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"told": lambda size, value, **_: told(value)})


def _found(file: Location, entry: dict[str, Any]) -> Location:
    """A file with what a listing says of it; -1 for a size that nobody knows."""
    size = -1 if entry["size"] is None else entry["size"]
    return replace(file, size=size, version=" ".join(str(entry[fact]) for fact in _VERSION if fact in entry))


Place: TypeAlias = Path | Location


def is_url(text: str) -> bool:
    """Whether a text has the form of a URL, of whatever kind."""
    return _URL.fullmatch(text) is not None


def place(name: str | os.PathLike[str] | Location) -> Place:
    """What a path or a URL names: a `Path` on this machine (`files.expanded`), or a new `Location`.

    A URL that was made a path has lost a slash (s3:/bucket/run), and is taken for what it was.
    """
    if isinstance(name, Location):
        return replace(name)  # which knows nothing of what is there
    text = name.as_posix() if isinstance(name, Path) else os.fspath(name)
    return files.expanded(name) if _LOCAL.match(text) or not is_url(text) else _location(text)


def _location(url: str) -> Location:
    scheme, rest = _URL.fullmatch(url).groups()  # type: ignore[union-attr]
    return Location(f"{scheme.lower()}://{rest.rstrip('/')}")


def local(folder: Place, doing: str) -> Path:
    """A folder of this machine, in which files are changed; RunError for what is behind a URL."""
    if isinstance(folder, Location):
        raise RunError(
            f"{doing} {folder}: what is behind a URL is only read; `mnemoscope pull` it, do this to the folder, and "
            "`mnemoscope push` that"
        )
    return folder


def stamp(file: Place) -> tuple[int, ...]:
    """What changes when a file does; OSError if a file of this machine is gone."""
    if isinstance(file, Location):
        return ()  # its content is known by its hash
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def parquet(file: Place, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A Parquet file, opened; behind a URL what is asked for at once is fetched in few parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(file, Location):
        return pq.ParquetFile(pa.PythonFile(file.open(), "r"), metadata=metadata, pre_buffer=True)
    return pq.ParquetFile(file, metadata=metadata)


class _Parts(io.RawIOBase):
    """A file whose content is known, read from any place."""

    def __init__(self, location: Location) -> None:
        self._location, self._at = location, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._location.size}[whence]
        self._at = begin + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes; all that are left if it is not said how many."""
        left = max(0, self._location.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        content = self._location.part(self._at, self._at + size) if size else b""
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        """The next bytes, into a buffer."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
