"""Whatever number of a run is changed and signed anew, `verify` sees it: every column of every table is tried."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from families import MIXTURES
from tiny import model_folder, texts, tokenizer

from mnemoscope import build, load_model
from mnemoscope.mine import verify as verifying
from mnemoscope.mine.verify import verify
from mnemoscope.model.model import Model
from mnemoscope.results import Check
from mnemoscope.run.reading import Run, open_run
from mnemoscope.run.schemas import SCHEMAS

# Known by its hash alone, for the model has no part in it.
BY_HASH = {("documents", "title"), ("documents", "metadata"), ("contexts", "start")}
# Of a run of several shards: what only all of them together could tell.
BY_ALL_SHARDS = {("experts", "router_weight")}
OF_PLACES = {"triggers", "null_triggers", "samples", "shards", "experts", "trigger_weights"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {
        "dense": load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32"),
        "mixture": load_model(MIXTURES["qwen2_moe"](), tokenizer=tokenizer()),
    }


@pytest.fixture(scope="module")
def runs(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """Of each model a run of one shard, and one of several."""
    place, made = tmp_path_factory.mktemp("runs"), {}
    for name, model in models.items():
        for shards, size in (("one", 32_768), ("many", 300)):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("mnemoscope.text.plan.SHARD_TOKENS", size)
                made[name, shards] = build(model, texts(60), place / f"{name}-{shards}", top=4)
    return made


def changed(frame: pl.DataFrame, column: str, row: int) -> pl.DataFrame:
    """The frame with another value in one place."""
    value: Any = frame[column][row]
    kind = frame.schema[column]
    if isinstance(value, pl.Series):
        items = value.to_list()
        value = [items[0] + 1, *items[1:]]
    elif kind.is_float():
        value = 1.0 if value is None else value * 1.5 + 0.25
    elif kind == pl.Boolean:
        value = not value
    elif kind == pl.String:
        value = f"{value}x"
    elif kind == pl.Binary:
        value = value + b"x"
    else:
        value = 1 if value is None else value + 1
    values = frame[column].to_list()
    values[row] = value
    return frame.with_columns(pl.Series(column, values, kind))


def signed(run: Run, folder: Path, table: str, frame: pl.DataFrame) -> Run:
    """The run with another table, which its manifest names as its own."""
    file = folder / f"{table}.parquet"
    groups = pq.read_metadata(run.file(table))
    sizes = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    rows = frame.to_arrow().cast(SCHEMAS[table])
    with pq.ParquetWriter(file, SCHEMAS[table]) as writer:
        start = 0
        for size in sizes or [len(rows)]:
            writer.write_table(rows.slice(start, size), row_group_size=max(size, 1))
            start += size
    manifest = json.loads((folder / "manifest.json").read_text())
    raw = file.read_bytes()
    manifest["tables"][table] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_run(folder)


def row_of(run: Run, table: str, column: str, shard: int) -> int:
    """A row in which the column holds something, of a shard where the table is of places in the text."""
    contexts = run.table("contexts").with_row_index("at").collect()
    first = sum(pq.read_metadata(run.file("contexts")).row_group(number).num_rows for number in range(shard))
    size = pq.read_metadata(run.file("contexts")).row_group(shard).num_rows
    frame = run.table("triggers" if table == "trigger_weights" else table).collect().with_row_index("at")
    if "shard" in frame.columns:
        frame = frame.filter(pl.col("shard") == shard)
    if "context" in frame.columns:
        frame = frame.filter(pl.col("context").is_in(contexts["context"][first : first + size].implode()))
    held = frame if column not in frame.columns else frame.filter(pl.col(column).is_not_null())
    rows = (held if held.height else frame)["at"]
    return int(rows[len(rows) // 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shards"),
    [("mixture", "one"), ("mixture", "many"), ("dense", "many")],
)
def test_whatever_is_changed_is_seen(
    kind: str,
    shards: str,
    models: dict[str, Model],
    runs: dict[tuple[str, str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One value of each column; of several shards in those tables that are not looked at in the same way as of one."""
    run, model = runs[kind, shards], models[kind]
    result = verify(run, model, sample=10_000)
    assert result.passed, result.checks
    mined = verifying._mine(run, model, result.shard, lambda _: None)
    read = list(verifying.values.layers(model, model.cells.layers))
    monkeypatch.setattr(verifying, "_mine", lambda *_: mined)
    monkeypatch.setattr(verifying.values, "layers", lambda *_: iter(read))
    monkeypatch.setattr(verifying, "_files", lambda *_: Check("sha256", 0, 0, 0.0))
    monkeypatch.setattr(verifying, "tuple", lambda checks: (next((each for each in checks if each.differing), None),),
                        raising=False)  # fmt: skip
    unseen = set()
    for table in run.manifest.tables if shards == "one" else OF_PLACES & run.manifest.tables.keys():
        frame = run.table(table).collect()
        # Null units are compared by the code that compares neurons.
        for column in frame.columns[-2:] if table.startswith("null_") else frame.columns:
            folder = tmp_path / f"{table}-{column}"
            shutil.copytree(run.path, folder, copy_function=os.link)
            (folder / f"{table}.parquet").unlink()
            shutil.copy(run.path / "manifest.json", folder / "copy") and (folder / "copy").replace(
                folder / "manifest.json"
            )
            forged = signed(
                run, folder, table, changed(frame, column, row_of(run, table, column, result.shard))
            )
            if verify(forged, model, sample=10_000).checks == (None,):
                unseen.add((table, column))
    assert unseen <= BY_HASH | (BY_ALL_SHARDS if shards == "many" else set()), unseen


def test_rows_that_are_lost_are_seen(
    models: dict[str, Model], runs: dict[tuple[str, str], Run], tmp_path: Path
) -> None:
    """The last row of each table, which leaves no gap."""
    run, model = runs["dense", "one"], models["dense"]
    for table in ("neurons", "triggers", "samples", "values", "vocabulary", "histograms"):
        folder = Path(shutil.copytree(run.path, tmp_path / table))
        frame = run.table(table).collect()
        file = folder / f"{table}.parquet"
        frame.head(-1).to_arrow()
        pq.write_table(frame.head(-1).to_arrow().cast(SCHEMAS[table]), file)
        manifest = json.loads((folder / "manifest.json").read_text())
        raw = file.read_bytes()
        manifest["tables"][table] = {
            "rows": frame.height - 1,
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert not verify(open_run(folder), model, sample=10_000).passed, table
