"""Many prompts explained, as one table: a row for each prompt and part (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from mnemoscope import files
from mnemoscope.errors import QueryError
from mnemoscope.model.model import Model
from mnemoscope.prediction.explain import explain
from mnemoscope.prediction.explanation import Contrast, Explanation, foil_names
from mnemoscope.prediction.prompts import WRITING, check_table, read_prompts
from mnemoscope.records import Progress

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

SCHEMA = pa.schema(
    [
        ("prompt", pa.int32()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("target", pa.string()),
        ("foil", pa.string()),
        ("frame", pa.string()),
        ("part", pa.string()),
        ("layer", pa.int16()),
        ("unit", pa.int32()),
        ("source", pa.int32()),
        ("source_token", pa.string()),
        ("query_layer", pa.int16()),
        ("query_unit", pa.int32()),
        *(
            (name, pa.float64())
            for name in (
                "weight", "coefficient", "increase", "leave_one_out", "logit", "chain", "share", "inner", "score",
                "effect", "log_probability", "probability",
            )
        ),
        ("rank", pa.int64()),
    ]
)  # fmt: skip
_WriteTable = Callable[[pa.Table], None]
_ROWS = 50_000  # of a row group, or more
_FRAMES = ("stream", "layers", "others", "heads", "whole_heads", "sources", "neurons", "queries", "ablations")
_CONTRASTED = ("layers", "others", "heads", "sources", "neurons")
_NAMES = {"point": "part", "kind": "part", "head": "unit", "neuron": "unit"}


def explain_many(
    model: Model,
    prompts: str | Path | Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    lens: str = "frozen",
    projection: str = "adaptive",
    top: int = 20,
    run: Run | None = None,
    ablate: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Path:
    """Explain every prompt of a jsonl file (or of an iterable of records) and write one table.

    The name of the table says what it is: .parquet, .csv or .jsonl.

    A record has `prompt` and, if wanted, `target`, `foils` (one or a list), `label`, `position`, `target_id` and
    `foil_ids` for tokens by their ids, and for an encoder-decoder `decoder_prompt`. Everything is read before anything
    is explained, and the table appears when it is whole. QueryError with the number of the line for a record that is
    none, or a question without an answer; RunError if the table cannot be written.
    """
    name = str(prompts) if isinstance(prompts, str | Path) else "prompts"
    records = read_prompts(prompts)
    check_table(path, prompts)
    say, path = report or (lambda _: None), files.expanded(path)

    def explained() -> Iterator[pl.DataFrame]:
        for index, record in enumerate(records):
            say(Progress("explaining", index, len(records), "prompts"))
            try:
                explanation = explain(
                    model, record.prompt, record.target, record.foils, position=record.position,
                    target_id=record.target_id, foil_ids=record.foil_ids, lens=lens,
                    decoder_prompt=record.decoder_prompt, projection=projection, top=top, run=run, ablate=ablate,
                )  # fmt: skip
            except QueryError as error:
                raise QueryError(f"{name}, line {record.line}: {error}") from error
            yield rows(explanation, index, record.label)
        say(Progress("explaining", len(records), len(records), "prompts"))

    about = {"mnemoscope": version("mnemoscope"), "model": model.id, "weights_sha256": model.weights_sha256}
    projected = {"projection": projection} if model.anatomy.bands else {}
    _write(explained(), path, about | {"lens": lens, "top": str(top), "dtype": model.dtype} | projected)
    return path


def rows(explanation: Explanation, index: int, label: str | None = None) -> pl.DataFrame:
    """One explanation in the columns of `SCHEMA`, without its order: every frame, and the contrasts by foil."""
    end = explanation.stream.row(-1, named=True)
    whole = {name: end[name] for name in ("log_probability", "probability", "rank")}
    frames = [
        _row("total", increase=explanation.total, **whole),
        _row("remainder", increase=explanation.remainder),
    ]
    frames += [_columns(name, getattr(explanation, name)) for name in _FRAMES]
    for contrast, name in zip(explanation.contrasts, foil_names(explanation.foils), strict=True):
        frames += [frame.with_columns(foil=pl.lit(name)) for frame in _contrast(contrast)]
    table = pl.concat([frame for frame in frames if frame.height], how="diagonal_relaxed")
    question = {
        "prompt": index,
        "label": label,
        "text": explanation.prompt,
        "target": explanation.target.piece,
    }
    return table.with_columns(**{name: pl.lit(value) for name, value in question.items()})


def _contrast(contrast: Contrast) -> list[pl.DataFrame]:
    whole = {"increase": contrast.total - contrast.start, "probability": contrast.probability}
    frames = [_row("total", **whole), _row("remainder", increase=contrast.remainder)]
    return frames + [_columns(name, getattr(contrast, name)) for name in _CONTRASTED]


def _row(frame: str, **values: Any) -> pl.DataFrame:
    return pl.DataFrame([{"frame": frame, **values}])


def _columns(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A frame under the names of the table; columns that the table does not have are left out."""
    named = frame.rename({old: new for old, new in _NAMES.items() if old in frame.columns})
    return named.select(
        pl.lit(name).alias("frame"), *(column for column in named.columns if column in SCHEMA.names)
    )


def _write(tables: Iterable[pl.DataFrame], path: Path, about: Mapping[str, str]) -> None:
    """All tables into one file that appears when it is whole."""
    schema = SCHEMA.with_metadata(dict(about))
    opened = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _parquet)
    with files.replacing(path, WRITING) as partial, opened(partial, schema) as write:
        for group in _groups(tables):
            write(_arrow(group, schema))


@contextmanager
def _parquet(file: Path, schema: pa.Schema) -> Iterator[_WriteTable]:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield writer.write_table


@contextmanager
def _csv(file: Path, schema: pa.Schema) -> Iterator[_WriteTable]:
    with csv.CSVWriter(file, schema) as writer:
        yield writer.write_table


@contextmanager
def _jsonl(file: Path, schema: pa.Schema) -> Iterator[_WriteTable]:
    with file.open("wb") as stream:
        yield lambda table: pl.DataFrame(pl.from_arrow(table)).write_ndjson(stream)


def _groups(tables: Iterable[pl.DataFrame]) -> Iterator[Sequence[pl.DataFrame]]:
    waiting: list[pl.DataFrame] = []
    for table in tables:
        waiting.append(table)
        if sum(held.height for held in waiting) >= _ROWS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _arrow(tables: Sequence[pl.DataFrame], schema: pa.Schema) -> pa.Table:
    table = pl.concat(tables, how="diagonal_relaxed")
    missing = [pl.lit(None).alias(name) for name in schema.names if name not in table.columns]
    return table.with_columns(missing).select(schema.names).to_arrow().cast(schema)
