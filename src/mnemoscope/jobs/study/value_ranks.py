"""The rank of what follows a neuron's strongest trigger, in the whole vocabulary as its value orders it (A12, A13).

The value is read with the sign of the coefficient. A rank is how many tokens score higher. Beside the next token stand
the trigger's last token (A75) and two nulls: the next token of another neuron of the layer, and of the same neuron
number half of the layers away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from mnemoscope.anatomy import Layer
from mnemoscope.jobs.study import scores
from mnemoscope.jobs.study.positions import Sizes
from mnemoscope.jobs.values import LENS, written
from mnemoscope.lens import Lens
from mnemoscope.models import Model
from mnemoscope.records import Progress
from mnemoscope.store import SCHEMAS, Run

_TILE = 64  # values read at once
_ASKED = ("rank", "last_rank", "permuted_rank", "other_rank")


def measure(
    run: Run, model: Model, sizes: Sizes, folder: Path, report: Callable[[Progress], None]
) -> Mapping[str, Iterator[pa.Table]]:
    """The table `value_ranks`: a row for each neuron and polarity whose strongest trigger is followed by a token."""
    return {"value_ranks": _layers(run, model, sizes.seed, report)}


def _layers(run: Run, model: Model, seed: int, report: Callable[[Progress], None]) -> Iterator[pa.Table]:
    rows = _targets(run)
    generator = np.random.default_rng(seed)
    lens = Lens.of(model.anatomy, LENS)
    total = model.anatomy.n_layers
    for layer, part in enumerate(model.anatomy.layers):
        report(Progress("ranking values", layer, total, "layers"))
        mine = rows.filter(pl.col("layer") == layer)
        asked = _asked(rows, mine, total, generator)
        if mine.height:
            yield _read(lens, part, mine, asked)
    report(Progress("ranking values", total, total, "layers"))


def _targets(run: Run) -> pl.DataFrame:
    """layer, neuron, polarity, token, last_token of every strongest trigger that is followed by a token."""
    first = (
        run.table("triggers")
        .filter(pl.col("rank") == 0, pl.col("next_token").is_not_null())
        .select("layer", "neuron", "polarity", "context", "position", token="next_token")
        .collect()
    )
    if not run.manifest.model.gated:
        first = first.filter(pl.col("polarity") == 1)
    contexts = run.table("contexts").select("context", "tokens").collect()
    rows = first.join(contexts, on="context", how="left", maintain_order="left")
    return rows.with_columns(last_token=pl.col("tokens").list.get(pl.col("position"))).drop(
        "tokens", "context", "position"
    )


def _asked(rows: pl.DataFrame, mine: pl.DataFrame, layers: int, generator: np.random.Generator) -> np.ndarray:
    """i64[row, 4]: tokens whose ranks are wanted; -1 where there is none."""
    token = mine["token"].to_numpy().astype(np.int64)
    permuted = token.copy()
    side = mine["polarity"].to_numpy()
    for one in (1, -1):
        permuted[side == one] = generator.permutation(token[side == one])
    far = mine.select(
        pl.lit((int(mine["layer"][0]) + layers // 2) % layers if mine.height else 0, pl.Int16).alias("layer"),
        "neuron",
        "polarity",
    )
    other = far.join(rows, on=["layer", "neuron", "polarity"], how="left", maintain_order="left")["token"]
    columns = (token, mine["last_token"].to_numpy(), permuted, other.fill_null(-1).to_numpy())
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def _read(lens: Lens, part: Layer, mine: pl.DataFrame, asked: np.ndarray) -> pa.Table:
    values = written(part)
    neuron = torch.from_numpy(mine["neuron"].to_numpy().astype(np.int64))
    sign = torch.from_numpy(mine["polarity"].to_numpy().astype(np.float32))
    parts = []
    with torch.inference_mode():
        for index in torch.arange(mine.height).split(_TILE):
            vectors = values[neuron[index].to(values.device)] * sign[index, None].to(values.device)
            parts.append(_rank(lens, vectors, torch.from_numpy(asked[index.numpy()])))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    absent = asked < 0
    frame = mine.with_columns(**{name: pl.Series(column) for name, column in columns.items()})
    frame = frame.with_columns(
        pl.when(~pl.Series(absent[:, place])).then(pl.col(name)).alias(name)
        for place, name in enumerate(_ASKED)
    )
    schema = SCHEMAS["value_ranks"]
    return frame.select(schema.names).to_arrow().cast(schema)


def _rank(lens: Lens, vectors: Tensor, asked: Tensor) -> dict[str, np.ndarray]:
    """Ranks of the asked tokens, and what the value is surest of."""
    logits = lens.logits(vectors)
    tokens = asked.to(logits.device).clamp(min=0)
    place = scores.ranks(logits, tokens).int().cpu().numpy()
    mass, top = scores.log_sums(logits), scores.first_largest(logits)
    best, first = (logits.gather(1, token[:, None])[:, 0] for token in (top, tokens[:, 0]))
    return {
        **{name: place[:, column] for column, name in enumerate(_ASKED)},
        "probability": (first - mass).exp().float().cpu().numpy(),
        "top_token": top.int().cpu().numpy(),
        "top_probability": (best - mass).exp().float().cpu().numpy(),
    }
