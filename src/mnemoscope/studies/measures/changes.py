"""What changed in each neuron from a run's model to the next one's: its vectors, and what it does on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mnemoscope.errors import QueryError
from mnemoscope.model.capture import Capture
from mnemoscope.model.load import load_built
from mnemoscope.model.model import Model
from mnemoscope.records import ContextBatch, Progress
from mnemoscope.run.reading import Run
from mnemoscope.studies.findings.stability import comparable
from mnemoscope.text.plan import batches

POSITIONS = 1000  # of the first run's text, at most, on which coefficients are compared


def changes(
    runs: Sequence[Run],
    *,
    positions: int = POSITIONS,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> list[pl.DataFrame]:
    """A frame for each step from a run to the next, with a row for each neuron.

    layer, neuron
    key, up, value  cosines of its vectors before and after; `up` is null in a plain FFN
    coefficients    rank correlation (Spearman, ties shared) of its coefficients on the same positions; null where one
                    of both never changes
    *_null          the same with another neuron of its layer after the step

    The models are loaded, two at a time. `QueryError` unless neurons, widths and tokens correspond; `RunMismatch` when
    a model is no longer the run's.
    """
    for pair in pairwise(runs):
        comparable(*pair)
    say = report or (lambda _: None)
    frames: list[pl.DataFrame] = []
    before: tuple[Model, list[np.ndarray]] | None = None
    for done, run in enumerate(runs):
        say(Progress("reading models", done, len(runs), "runs"))
        model = load_built(run)
        model.check_built(run, "comparing the weights of")
        after = model, _coefficients(model, runs[0], positions)
        if before is not None:
            frames.append(_step(before, after, np.random.default_rng(seed)))
        before = after
    say(Progress("reading models", len(runs), len(runs), "runs"))
    return frames


def _coefficients(model: Model, run: Run, positions: int) -> list[np.ndarray]:
    """f32[position, neuron] of each layer, on positions of the first shard of a run's text that count."""
    kept: dict[int, list[np.ndarray]] = {layer: [] for layer in model.cells.layers}

    def left(layer: int) -> int:
        return positions - sum(map(len, kept[layer]))

    def keep(layer: int, coefficients: Tensor, batch: ContextBatch, *_: object) -> None:
        rows = coefficients[torch.from_numpy(batch.counted).to(coefficients.device)][: left(layer)]
        kept[layer].append(rows.float().cpu().numpy())

    paired = run.manifest.model.encoder_layers > 0
    with Capture(model) as capture:
        for batch in batches(run.file("contexts"), 0, run.manifest.options["special"], paired=paired):
            capture.sweep(batch, keep)
            if not any(map(left, kept)):
                break
    return [np.concatenate(kept[layer]) for layer in model.cells.layers]


def _step(
    before: tuple[Model, list[np.ndarray]],
    after: tuple[Model, list[np.ndarray]],
    generator: np.random.Generator,
) -> pl.DataFrame:
    models = before[0], after[0]
    if models[0].anatomy.width != models[1].anatomy.width:
        raise QueryError(
            f"comparing the weights of {models[0].id} and {models[1].id}: their residual streams are "
            f"{models[0].anatomy.width} and {models[1].anatomy.width} wide; give checkpoints of one model"
        )
    frames = []
    for place, layer in enumerate(models[0].cells.layers):
        count = models[0].cells.sizes[layer]
        circle, other = generator.permutation(count), np.empty(count, np.int64)
        other[circle] = np.roll(circle, 1)  # nobody is their own, unless alone
        columns: dict[str, object] = {"layer": np.full(count, layer, np.int16), "neuron": np.arange(count)}
        for name, values in _cosines(models, layer):
            columns[name] = None if values is None else values(np.arange(count))
            columns[f"{name}_null"] = None if values is None else values(other)
        ranks = [_ranks(side[1][place]) for side in (before, after)]
        columns["coefficients"] = _correlation(*ranks)
        columns["coefficients_null"] = _correlation(ranks[0], ranks[1][:, other])
        frames.append(pl.DataFrame(columns, schema_overrides={"up": pl.Float64, "up_null": pl.Float64}))
    numbers = pl.selectors.float()
    return pl.concat(frames).with_columns(numbers.fill_nan(None))


def _cosines(
    models: tuple[Model, Model], layer: int
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray] | None]]:
    """For each kind of vector the cosines of all neurons with those of given ones in the other model; None without."""
    blocks = [model.anatomy.layers[layer] for model in models]
    for name, pair in (
        ("key", [block.keys() for block in blocks]),
        ("up", [block.ups() for block in blocks]),
        ("value", [block.values() for block in blocks]),
    ):
        if any(rows is None for rows in pair):
            yield name, None
            continue
        units = [_units(rows) for rows in pair if rows is not None]
        yield name, lambda index, units=units: (units[0] * units[1][index]).sum(1)  # type: ignore[misc]


def _units(rows: Tensor) -> np.ndarray:
    vectors = rows.detach().cpu().double().numpy()
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in each column, equal values sharing theirs, less their mean; of length 1, NaN where nothing differs."""
    ranks = pl.from_numpy(np.ascontiguousarray(values)).select(pl.all().rank("average")).to_numpy()
    ranks = ranks - ranks.mean(0)
    length = np.linalg.norm(ranks, axis=0)
    return ranks / np.where(length > 0, length, np.nan)


def _correlation(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return (one * two).sum(0)
