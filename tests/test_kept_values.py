"""Values that are kept between runs of the same weights: the same bytes, or made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from families import FAMILIES
from tiny import model_folder, texts, tokenizer

import mnemoscope as mn
from mnemoscope.mine import kept_values, values
from mnemoscope.model.model import Model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama."""
    return mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())


def tables(model: Model) -> list[tuple[int, pa.Table, pa.Table]]:
    """All layers, through the cache."""
    return list(kept_values.layers(model, range(model.anatomy.n_layers)))


def refuse(*_: object) -> None:
    """Instead of reading a layer."""
    pytest.fail("a layer was read again")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_kept_and_fresh_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold, warm and without the cache the tables are equal, and warm none is read from the model."""
    model = mn.load_model(FAMILIES[family](), tokenizer=tokenizer())
    plain = list(values.layers(model, range(model.anatomy.n_layers)))
    cold = tables(model)
    monkeypatch.setattr(values, "read_layer", refuse)
    warm = tables(model)
    for (_, *one), (_, *two), (_, *three) in zip(plain, cold, warm, strict=True):
        assert one == two
        assert [table.to_pydict() for table in one] == [table.to_pydict() for table in three]


def test_runs_are_the_same_bit_for_bit(
    model: Model, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run built with values that are there has the files of one built without."""
    cold = mn.build(model, texts(8), tmp_path / "cold", top=3, nulls=())
    monkeypatch.setattr(values, "read_layer", refuse)
    warm = mn.build(model, texts(8), tmp_path / "warm", top=3, nulls=())
    assert {name: entry.sha256 for name, entry in cold.manifest.tables.items()} == {
        name: entry.sha256 for name, entry in warm.manifest.tables.items()
    }
    assert len(mn.cache.entries("values")) == 1
    assert all(entry.path.is_relative_to(cache) for entry in mn.cache.entries("values"))


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "gone", "parquet of another"])
def test_a_damaged_file_is_made_again(damage: str, model: Model) -> None:
    """Whatever happened to a file, the tables are right, and so is the file afterwards."""
    wanted = tables(model)
    (entry,) = mn.cache.entries("values")
    file = entry.path / "values-0001.parquet"
    whole = file.read_bytes()
    other = (entry.path / "values-0002.parquet").read_bytes()
    changed = {
        "cut": whole[:-20],
        "empty": b"",
        "changed": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "gone": None,
        "parquet of another": whole[:32] + other[32:],
    }[damage]
    file.unlink() if changed is None else file.write_bytes(changed)
    again = tables(model)
    assert [[table.to_pydict() for table in row[1:]] for row in again] == [
        [table.to_pydict() for table in row[1:]] for row in wanted
    ]
    assert file.read_bytes() == whole


@torch.no_grad()
def test_a_key_is_of_all_that_decides(folder: Path) -> None:
    """The last bit of a weight, the dtype and the configuration change it; names do not."""
    model = mn.load_model(folder, dtype="fp32")
    key = kept_values._key(model)
    assert kept_values._key(mn.load_model(str(folder), dtype="fp32")) == key
    assert kept_values._key(mn.load_model(folder, dtype="bf16")) != key
    weight = model.hf.get_parameter("model.layers.1.mlp.down_proj.weight")
    before = weight[0, 0].clone()
    weight[0, 0] = torch.nextafter(before, torch.tensor(9.0))
    assert kept_values._key(model) != key
    weight[0, 0] = before
    assert kept_values._key(model) == key
    eps = model.hf.config.rms_norm_eps
    model.hf.config.rms_norm_eps = 0.1
    assert kept_values._key(model) != key
    model.hf.config.rms_norm_eps = eps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_number_of_threads_changes_nothing(dtype: str, folder: Path) -> None:
    """It is no part of the key: tables are equal whatever it is."""
    model, before = mn.load_model(folder, dtype=dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([row[1:] for row in values.layers(model, range(3))])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


def test_where_nothing_can_be_kept_nothing_is_lost(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder that cannot be made is no reason not to build."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "file"))
    assert len(tables(model)) == model.anatomy.n_layers
    assert mn.cache.entries("values") == []


def test_several_may_write_at_once(model: Model) -> None:
    """Readers and writers of one entry at the same time all get the same tables, and leave only whole files."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tables(model), range(8)))
    assert all(
        [[table.to_pydict() for table in row[1:]] for row in one]
        == [[table.to_pydict() for table in row[1:]] for row in found[0]]
        for one in found
    )
    (entry,) = mn.cache.entries("values")
    names = {f"{name}-{layer:04d}.parquet" for name in kept_values.TABLES for layer in range(3)}
    assert {file.name for file in entry.path.iterdir()} == names | {"about.json"}


def test_the_oldest_make_room(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, what was used longest ago goes; entries say what they are."""
    tables(model)
    (old,) = mn.cache.entries("values")
    assert old.bytes == sum(file.stat().st_size for file in old.path.iterdir())
    assert "fp32" in old.what
    os.utime(old.path, (1, 1))
    monkeypatch.setattr(kept_values, "MOST_BYTES", old.bytes - 1)
    tables(mn.load_model(FAMILIES["gpt2"](), tokenizer=tokenizer()))
    assert not old.path.exists()
    assert len(mn.cache.entries("values")) == 1


def test_an_entry_in_use_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used within the hour is not removed, however large."""
    tables(model)
    (used,) = mn.cache.entries("values")
    monkeypatch.setattr(kept_values, "MOST_BYTES", 0)
    tables(mn.load_model(FAMILIES["gpt2"](), tokenizer=tokenizer()))
    assert used.path.exists()
