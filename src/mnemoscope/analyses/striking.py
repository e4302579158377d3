"""Choose a few neurons to look at first, each for a stated reason, and one for no reason at all.

The criteria, over the statistics and the stored triggers of a run:

    next    the value says what comes next: the share of triggers followed by a token that the value writes at
            that sign, minus the share expected of next tokens shuffled within the layer (A11's baseline)
    token   it answers to one token: the share of triggers with the commonest active token, minus that
            token's share of the corpus
    peaked  excess kurtosis (one lone outlier is enough for a large one: see the distribution)
    sides   two-sided: standard deviations between zero and the extreme of its *weaker* side
    quiet   least largest write, |coefficient| x norm of the value; zero is a dead neuron
    chance  drawn evenly from the layer with a stored seed, to show what is usual

`next` and `token` compare each sign of a neuron separately, ask for at least `LEAST` stored triggers, and
keep the better sign. They are reasons to look, not evidence: the best of thousands look better than they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.store import Run

CRITERIA = ("next", "token", "peaked", "sides", "quiet", "chance")
LEAST = 10
SEED = 0
_BY_NEURON = ["layer", "neuron"]
_BY_SIDE = ["layer", "neuron", "polarity"]


@dataclass(frozen=True)
class Pick:
    """A neuron and the reason it was chosen.

    value     what was compared: for `next` and `token` a share of `stored` triggers of sign `polarity`
    usual     its null: the expected share, or the median over the layer; None for `chance`
    token     the text of the commonest active token, for `token`
    """

    id: NeuronId
    criterion: str
    value: float
    usual: float | None
    polarity: int | None = None
    stored: int | None = None
    token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The pick as JSON-ready values."""
        return {**asdict(self), "id": str(self.id)}


class Striking:
    """The scores of all neurons of a run, computed once; the methods choose from them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        triggers = run.table("triggers").select(*_BY_SIDE, "context", "position", "next_token").collect()
        scores = _statistics(run)
        for name, frame in (("next", _next(run, triggers)), ("token", _token(run, triggers))):
            better = frame.sort(name, "polarity", descending=True).unique(
                _BY_NEURON, keep="first", maintain_order=True
            )
            renamed = better.rename({"polarity": f"{name}_polarity", "stored": f"{name}_stored"})
            scores = scores.join(renamed, on=_BY_NEURON, how="left")
        self._scores = scores.sort(_BY_NEURON)

    def handful(self, n: int = 6) -> tuple[Pick, ...]:
        """The best of the whole run by each criterion in turn, from as many different layers as can be."""
        return tuple(self._choose(self._scores, n, spread=True))

    def layer(self, layer: int, n: int = 6) -> tuple[Pick, ...]:
        """The best of one layer by each criterion in turn."""
        return tuple(self._choose(self._scores.filter(pl.col("layer") == layer), n, spread=False))

    def best(self, criterion: str, n: int) -> tuple[Pick, ...]:
        """The first `n` of the whole run by one criterion."""
        rows = _ordered(self._scores, criterion).head(n)
        return tuple(self._pick(row, criterion) for row in rows.iter_rows(named=True))

    def _choose(self, scores: pl.DataFrame, n: int, *, spread: bool) -> Iterator[Pick]:
        """Take the best that was not taken, by one criterion after another, in n turns."""
        taken: set[tuple[int, int]] = set()
        layers: set[int] = set()
        orders = {name: _ordered(scores, name) for name in CRITERIA}
        for turn in range(n):
            criterion = CRITERIA[turn % len(CRITERIA)]
            free = [
                row
                for row in orders[criterion].head(n + len(layers) * 50 + 1).iter_rows(named=True)
                if (row["layer"], row["neuron"]) not in taken
            ]
            if not free:
                continue
            row = next((row for row in free if spread and row["layer"] not in layers), free[0])
            taken.add((row["layer"], row["neuron"]))
            layers.add(row["layer"])
            yield self._pick(row, criterion)

    def _pick(self, row: dict[str, Any], criterion: str) -> Pick:
        sided = criterion in ("next", "token")
        return Pick(
            id=NeuronId(row["layer"], row["neuron"]),
            criterion=criterion,
            value=row[f"{criterion}_share" if sided else criterion],
            usual=None if criterion == "chance" else row[f"{criterion}_usual"],
            polarity=row[f"{criterion}_polarity"] if sided else None,
            stored=row[f"{criterion}_stored"] if sided else None,
            token=self._run.vocabulary.label(row["active"]) if criterion == "token" else None,
        )


def _ordered(scores: pl.DataFrame, criterion: str) -> pl.DataFrame:
    down = criterion not in ("quiet", "chance")
    return scores.filter(pl.col(criterion).is_not_null()).sort(
        criterion, *_BY_NEURON, descending=[down, False, False]
    )


def _statistics(run: Run) -> pl.DataFrame:
    low, high, std = pl.col("min").cast(pl.Float64), pl.col("max").cast(pl.Float64), pl.col("std")
    frame = run.table("neurons").select(
        *_BY_NEURON,
        pl.col("kurtosis").alias("peaked"),
        pl.when(std > 0).then(pl.min_horizontal(-low, high).clip(0) / std).alias("sides"),
        (pl.max_horizontal(-low, high) * pl.col("value_norm")).alias("quiet"),
    )
    usual = [
        pl.col(name).median().over("layer").alias(f"{name}_usual") for name in ("peaked", "sides", "quiet")
    ]
    scores = frame.with_columns(usual).sort(_BY_NEURON).collect()
    chance = np.random.default_rng(SEED).random(scores.height)
    return scores.with_columns(pl.Series("chance", chance))


def _next(run: Run, triggers: pl.DataFrame) -> pl.DataFrame:
    """Per neuron and sign: `next_share` of triggers followed by a token that is written, and the expected."""
    written = run.table("values").select(*_BY_SIDE, "token").collect()
    frequency = (
        triggers.group_by("layer", "next_token")
        .len()
        .with_columns((pl.col("len") / pl.col("len").sum().over("layer")).alias("frequency"))
    )
    expected = (
        written.join(frequency, left_on=["layer", "token"], right_on=["layer", "next_token"])
        .group_by(_BY_SIDE)
        .agg(pl.col("frequency").sum().alias("next_usual"))
    )
    hits = triggers.join(
        written, left_on=[*_BY_SIDE, "next_token"], right_on=[*_BY_SIDE, "token"], how="semi"
    )
    return (
        _stored(triggers)
        .join(hits.group_by(_BY_SIDE).len("hits"), on=_BY_SIDE, how="left")
        .join(expected, on=_BY_SIDE, how="left")
        .with_columns(
            (pl.col("hits").fill_null(0) / pl.col("stored")).alias("next_share"),
            pl.col("next_usual").fill_null(0.0),
        )
        .with_columns((pl.col("next_share") - pl.col("next_usual")).alias("next"))
        .drop("hits")
    )


def _token(run: Run, triggers: pl.DataFrame) -> pl.DataFrame:
    """Per neuron and sign: the commonest `active` token, its `token_share` of triggers, and of the corpus."""
    contexts = run.table("contexts").select("context", "tokens").collect()
    flat = contexts["tokens"].explode().to_numpy()
    sizes = contexts["tokens"].list.len().to_numpy().astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    row = np.searchsorted(contexts["context"].to_numpy(), triggers["context"].to_numpy())
    active = flat[starts[row] + triggers["position"].to_numpy()]
    share = np.bincount(flat, minlength=run.manifest.model.vocabulary) / len(flat)
    common = (
        triggers.select(*_BY_SIDE, pl.Series("active", active))
        .group_by(*_BY_SIDE, "active")
        .len("hits")
        .sort("hits", "active", descending=[True, False])
        .unique(_BY_SIDE, keep="first", maintain_order=True)
    )
    usual = pl.Series("token_usual", share[common["active"].to_numpy()])
    return (
        _stored(triggers)
        .join(common.with_columns(usual), on=_BY_SIDE)
        .with_columns((pl.col("hits") / pl.col("stored")).alias("token_share"))
        .with_columns((pl.col("token_share") - pl.col("token_usual")).alias("token"))
        .drop("hits")
    )


def _stored(triggers: pl.DataFrame) -> pl.DataFrame:
    return triggers.group_by(_BY_SIDE).len("stored").filter(pl.col("stored") >= LEAST)


def choose(run: Run, n: int = 6) -> tuple[Pick, ...]:
    """A handful of neurons of a run: `Striking.handful`."""
    return Striking(run).handful(n)
