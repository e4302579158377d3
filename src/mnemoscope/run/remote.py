"""Runs behind a URL: uploaded so that at every moment there is a whole run or none, and brought back.

    push("runs/llama", "s3://bucket/runs/llama")
    pull("s3://bucket/runs/llama", "copy")

A table is uploaded under a name that says what it holds (`reading.uploaded`), so that nothing of a run that is there is
touched; the manifest comes last, in one write, and then what the new one does not name is removed. An upload that was
interrupted goes on where it was. There is one at a time (`alone`): another would remove tables that this one counts on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mnemoscope import files, location
from mnemoscope.errors import RemoteError, RunCorrupt, RunError
from mnemoscope.location import Location, Place, local, place
from mnemoscope.records import Manifest, Progress
from mnemoscope.run.reading import Run, is_run, open_run, read_manifest, stored_name, uploaded
from mnemoscope.run.schemas import MANIFEST, SCHEMAS
from mnemoscope.run.writing import RunWriter, is_finished

Report = Callable[[Progress], None]

_MARK = ".uploading-"  # and who does: a file that is there as long as an upload


def push(
    run: str | Path, url: str | Location, *, overwrite: bool = False, report: Report | None = None
) -> Run:
    """Upload a finished run, and open it there. Another run of the same model and text is replaced: it is this one with
    more or fewer tables.

    overwrite  replace whatever run is there

    `RunError` if another one is there, or is being uploaded there; `RemoteError` if it cannot be uploaded, and then
    what was there is there still.
    """
    source = open_run(local(place(run), "uploading the run"))
    target = _remote(url, "uploading a run to")
    target.check_written("uploading a run to")
    with alone(target):
        if not overwrite and (before := _another(source.manifest, target)) is not None:
            raise RunError(
                f"uploading the run {source.path}: {target} holds another one, of {before.model.id} on "
                f"{before.corpus.id}; give another address, or replace it with {{overwrite}}",
                overwrite=True,
            )
        upload(source.folder, target, report)
        return open_run(str(target))


def pull(url: str | Location, folder: str | Path, *, report: Report | None = None) -> Run:
    """Bring a run behind a URL to a folder of this machine, compared with its manifest by sha256; returns it opened.

    What was brought before is not fetched again. `RunError` if the folder holds something else, `RunCorrupt` if a table
    is not what was uploaded, `RemoteError` if it cannot be read.
    """
    source = open_run(_remote(url, "bringing a run from"))
    target, say = local(place(folder), "bringing a run to"), report or (lambda _: None)
    if is_finished(target) and read_manifest(target / MANIFEST) == source.manifest:
        return open_run(target)
    entries, done = source.manifest.tables, 0
    total = sum(entry.bytes for entry in entries.values())
    with RunWriter(target) as writer:

        def tell(bytes_more: int) -> None:
            say(Progress("downloading", done + bytes_more, total, "bytes"))

        for name, entry in entries.items():
            tell(0)
            if not writer.holds(name, entry):
                file, partial = source.file(name), writer.work / f"{name}.partial"
                assert isinstance(file, Location)
                with files.refusals(f"bringing the run {source.path} to {target}"):
                    if file.fetch(partial, tell) != entry.sha256:
                        raise RunCorrupt(
                            f"bringing the run {source.path}: table {name} is not what its manifest says (sha256 "
                            "differs); upload it again"
                        )
                writer.adopt(name, partial)
            done += entry.bytes
        tell(0)
        return writer.commit(source.manifest.model_dump(exclude={"tables"}))


def _remote(url: str | Path | Location, doing: str) -> Location:
    target = place(url)
    if isinstance(target, Location):
        return target
    raise RunError(f"{doing} {url}: it is no URL; give one such as s3://bucket/runs/llama")


def work_folder(path: Place) -> Path:
    """The folder in which a run is made: its own; for one behind a URL, a folder of the cache until it is uploaded."""
    if isinstance(path, Path):
        return path
    folder = files.cache_folder() / "work" / hashlib.sha256(str(path).encode()).hexdigest()[:40]
    with files.refusals(f"making the run {path} in {folder}", "see to it that it can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        files.keep(folder / files.ABOUT, json.dumps({"url": str(path)}).encode())
    return folder / "run"


def publish(folder: Path, path: Place, report: Report | None = None) -> None:
    """Upload the run that was made in a `work_folder`, which goes then; nothing where that is its own. To be called
    where no other process does (`alone`).

    RunError if another run has come there meanwhile, from another machine: then both are kept.
    """
    if isinstance(path, Location):
        if (before := _another(read_manifest(folder / MANIFEST), path)) is not None:
            raise RunError(
                f"uploading the run {folder}: meanwhile {path} has come to hold another one, of {before.model.id} on "
                f"{before.corpus.id}; `mnemoscope push` the folder to another address"
            )
        upload(folder, path, report)
        shutil.rmtree(folder.parent, ignore_errors=True)


@contextmanager
def alone(path: Place) -> Iterator[None]:
    """Be the only one that uploads to a URL while the block lasts; nothing for a folder, in which builds lock a file.

    Others are refused (`RunError`): those of this machine by a lock, which the system releases however a process ends,
    those of other machines by a file there. It is written before anybody looks for those of others, so that of two that
    come at once one sees the other's at least. What a process of this machine left that was killed is its own.
    """
    if isinstance(path, Path):
        yield
        return
    with _locked(path) as name:
        mark = path / f"{_MARK}{name}"
        try:
            mark.write_bytes(datetime.now(UTC).isoformat(timespec="seconds").encode())
            _wait_for_others(path, mark)
            yield
        except BaseException:
            with suppress(RemoteError):  # what went wrong before is what is told
                mark.unlink()
            raise
        mark.unlink()


@contextmanager
def _locked(path: Location) -> Iterator[str]:
    """Hold the lock of a URL on this machine; gives the name that whoever holds it has there. Where nothing can be
    locked, a name that nobody else has."""
    folder = files.cache_folder() / "uploads"
    lock = FileLock(folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:40]}.lock")
    name = hashlib.sha256(
        f"{socket.gethostname()}\n{uuid.getnode()}\n{folder.resolve()}".encode()
    ).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"uploading a run to {path}: another process of this machine is doing so; wait for it, and give the same "
            "command again"
        ) from None
    except OSError:
        name = uuid.uuid4().hex
    try:
        yield name[:16]
    finally:
        lock.release()


def _wait_for_others(path: Location, mark: Location) -> None:
    """`RunError` if another machine is uploading. Of those that came at once, the first by name waits until the others
    have seen each other: so one of them goes on."""
    wait = location.WAIT
    for left in reversed(range(location.TRIES)):
        held = Location(str(path)).sizes
        others = sorted(name for name in held if name.startswith(_MARK) and name != mark.name)
        if not others:
            return
        if not left or others[0] < mark.name:
            now = "is doing so"
            with suppress(RemoteError):  # it has just ended
                now = f"has been doing so since {(path / others[0]).read_bytes().decode()}"
            raise RunError(
                f"uploading a run to {path}: another machine {now}; wait for it, and give the same command again; if "
                f"it was killed, remove {path / others[0]}"
            )
        time.sleep(wait)
        wait *= 2


def upload(folder: Path, target: Location, report: Report | None = None) -> None:
    """Make a URL hold the finished run of a folder; until the last moment what was there is there still."""
    say = report or (lambda _: None)
    manifest = read_manifest(folder / MANIFEST)
    tables, done = _called(manifest), 0
    total, held = sum(tables.values()), Location(str(target)).sizes

    def tell(bytes_more: int) -> None:
        say(Progress("uploading", done + bytes_more, total, "bytes"))

    for name, called in zip(manifest.tables, tables, strict=True):
        tell(0)
        if held.get(called) != tables[called]:
            (target / called).upload(folder / f"{name}.parquet", tell)
        done += tables[called]
    tell(0)
    held = Location(str(target)).sizes
    if short := [called for called, size in tables.items() if held.get(called) != size]:
        raise RemoteError(
            f"uploading the run {folder}: {target / short[0]} has not arrived whole; give the same command again"
        )
    (target / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    plain = (
        {f"{name}.parquet" for name in SCHEMAS} if MANIFEST in held else set()
    )  # of a run that was copied there
    for called in held:
        if called not in tables and (stored_name(called) or called in plain):
            (target / called).unlink()


def _another(manifest: Manifest, target: Location) -> Manifest | None:
    """That of a run behind a URL which this one must not take the place of, if there is one."""
    now = Location(str(target))  # which is asked again
    before = read_manifest(now / MANIFEST) if is_run(now) else None
    return None if before is None or _facts(before) == _facts(manifest) else before


def _facts(manifest: Manifest) -> tuple[str, str]:
    """What must be alike in runs of which one may take the other's place."""
    return manifest.model.weights_sha256, manifest.corpus.sha256


def _called(manifest: Manifest) -> dict[str, int]:
    """Bytes of every table, by its name behind a URL."""
    return {uploaded(name, entry): entry.bytes for name, entry in manifest.tables.items()}
