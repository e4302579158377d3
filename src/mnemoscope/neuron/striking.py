"""Choose a few neurons to look at first, each for a stated reason, and one for no reason at all.

The criteria, over the statistics and the stored triggers of a run:

    next    the value says what comes next: the share of triggers followed by a token that the value writes at
            that sign, minus the share expected of next tokens shuffled within the layer (A11's baseline); at
            least `DIFFERENT` such tokens must occur; of an encoder the token at the trigger
    token   it answers to one token: the share of triggers with the commonest active token, minus that
            token's share of the corpus
    peaked  excess kurtosis, of the neurons that count as peaked (`neuron.striking`)
    sides   two-sided: standard deviations from zero to the `LEAST`-th strongest trigger of the *weaker* side
    quiet   least largest write, |coefficient| x norm of the value; zero is a dead neuron
    chance  drawn evenly from the layer with a stored seed, to show what is usual

`next` and `token` compare each sign of a neuron separately, ask for at least `LEAST` stored triggers, and
keep the better sign. They are reasons to look, not evidence: the best of thousands look better than they are.

One token far out among n gives a kurtosis of about n, which is no shape. So a neuron counts as peaked if at least
`LEAST` of its triggers of one sign, each of another context, lie further than `FAR` standard deviations from its mean.
Every place that ranks neurons by how peaked they are asks here, and prints `RULE` or a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from mnemoscope.neuron.claims import ADDRESS, within
from mnemoscope.records import NeuronId

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LEAST = 10
FAR = 5.0
RULE = (
    f"most peaked: the largest excess kurtosis among neurons with {LEAST} triggers of one sign further than {FAR:g} "
    "standard deviations from their mean (a single outlier makes a large kurtosis too)"
)


def peaked(run: Run, layer: int | None = None) -> pl.DataFrame:
    """layer, neuron, kurtosis of the neurons that count as peaked, in one layer or in all; most peaked first.

    A run that keeps fewer triggers than `LEAST` is asked for all that it keeps.
    """
    least = min(LEAST, int(run.manifest.options.get("top", LEAST)))
    neurons, triggers = within(run, "neurons", layer), within(run, "triggers", layer)
    weakest = triggers.filter(pl.col("rank") == least - 1).select(*ADDRESS, "coefficient", "polarity")
    distance = (pl.col("coefficient").cast(pl.Float64) - pl.col("mean")) * pl.col("polarity")
    return (
        neurons.select(*ADDRESS, "mean", "std", "kurtosis")
        .join(weakest, on=ADDRESS, how="inner")
        .filter(pl.col("kurtosis").is_not_null() & (distance > FAR * pl.col("std")))
        .select(*ADDRESS, "kurtosis")
        .unique(ADDRESS)
        .sort("kurtosis", *ADDRESS, descending=[True, False, False])
        .collect()
    )


CRITERIA = ("next", "token", "peaked", "sides", "quiet", "chance")
DIFFERENT = 3
SEED = 0
_ENOUGH = 300  # candidates by each criterion, to choose different layers among


@dataclass(frozen=True)
class Pick:
    """A neuron and the reason it was chosen.

    value     what was compared: for `next` and `token` a share of `stored` triggers of sign `polarity`
    usual     its null: the expected share, or the median over the layer; None for `chance`
    token     the text of the commonest active token, for `token`
    stands    for `next` of an encoder, which predicts the token at the trigger and not the one that follows
    """

    id: NeuronId
    criterion: str
    value: float
    usual: float | None
    polarity: int | None = None
    stored: int | None = None
    token: str | None = None
    stands: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The pick as JSON-ready values."""
        return {**asdict(self), "id": str(self.id)}


class Striking:
    """The scores of all neurons of a run, computed once; the methods choose from them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        scores = _statistics(run)
        for name, frame in _by_triggers(run).items():
            # an even side is the positive one: of two that are alike, take it
            better = frame.with_columns(pl.col("side") // 2).rename({"side": "cell"})
            better = better.with_columns(
                pl.Series(f"{name}_polarity", 1 - 2 * (frame["side"].to_numpy() % 2))
            )
            better = better.sort(name, f"{name}_polarity", descending=True).unique("cell", keep="first")
            scores = scores.join(better.rename({"stored": f"{name}_stored"}), on="cell", how="left")
        self._scores = scores.sort("cell")

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
        """Take the best that was not taken, by one criterion after another, until there are n or none is left."""
        rows = {
            name: list(_ordered(scores, name).head(_ENOUGH + n).iter_rows(named=True)) for name in CRITERIA
        }
        taken: set[int] = set()
        layers: set[int] = set()
        for turn in range(n * len(CRITERIA)):
            criterion = CRITERIA[turn % len(CRITERIA)]
            free = [row for row in rows[criterion] if row["cell"] not in taken]
            if not free or len(taken) == n:
                continue
            row = next((row for row in free if spread and row["layer"] not in layers), free[0])
            taken.add(row["cell"])
            layers.add(row["layer"])
            yield self._pick(row, criterion)

    def _pick(self, row: dict[str, Any], criterion: str) -> Pick:
        sided = criterion in ("next", "token")
        return Pick(
            id=self._run.manifest.model.cells.id(row["layer"], row["neuron"]),
            criterion=criterion,
            value=row[f"{criterion}_share" if sided else criterion],
            usual=None if criterion == "chance" else row[f"{criterion}_usual"],
            polarity=row[f"{criterion}_polarity"] if sided else None,
            stored=row[f"{criterion}_stored"] if sided else None,
            token=self._run.vocabulary.label(row["active"]) if criterion == "token" else None,
            stands=criterion == "next" and self._run.manifest.model.in_encoder(row["layer"]),
        )


def _ordered(scores: pl.DataFrame, criterion: str) -> pl.DataFrame:
    down = criterion not in ("quiet", "chance")
    return scores.filter(pl.col(criterion).is_not_null()).sort(criterion, "cell", descending=[down, False])


def _sides(run: Run, name: str, layer: int, *columns: str) -> pl.DataFrame:
    """Columns of a layer of a table, and `side`: one number for (layer, neuron, polarity), twice the `cell`."""
    return within(run, name, layer).select(run.manifest.model.cells.side(), *columns).collect()


def _by_triggers(run: Run) -> dict[str, pl.DataFrame]:
    """The scores of `_next` and `_token`, a layer at a time: memory does not grow with the run."""
    text, scores = _Tokens.of(run), dict[str, list[pl.DataFrame]](next=[], token=[])
    for layer in run.manifest.model.cells.layers:
        triggers = _sides(run, "triggers", layer, "context", "position", "next_token")
        scores["next"].append(_next(run, layer, triggers, text))
        scores["token"].append(_token(triggers, text))
    return {name: pl.concat(frames) for name, frames in scores.items()}


def _statistics(run: Run) -> pl.DataFrame:
    """One row per neuron with `cell`, `peaked`, `sides`, `quiet`, `chance` and their layer medians."""
    tenth = (
        run.table("triggers")
        .filter(pl.col("rank") == LEAST - 1)
        .select(run.manifest.model.cells.side() // 2, pl.col("coefficient").abs())
        .collect()
    )
    weaker = tenth.group_by(cell="side").agg((pl.col("coefficient").min() * (pl.len() == 2)).alias("near"))
    frame = run.table("neurons").with_columns(run.manifest.model.cells.column()).collect()
    reach = pl.max_horizontal(-pl.col("min"), pl.col("max"))
    scores = (
        frame.join(weaker, on="cell", how="left")
        .sort("cell")
        .select(
            "cell",
            *ADDRESS,
            pl.col("kurtosis").alias("peaked"),
            pl.when(pl.col("std") > 0).then(pl.col("near") / pl.col("std")).alias("sides"),
            (reach * pl.col("value_norm")).cast(pl.Float64).alias("quiet"),
        )
    )
    medians = [
        pl.col(name).median().over("layer").alias(f"{name}_usual") for name in ("peaked", "sides", "quiet")
    ]
    chance = pl.Series("chance", np.random.default_rng(SEED).random(scores.height))
    shaped = peaked(run).select(*ADDRESS, peaked="kurtosis")
    two_sided = pl.when(pl.col("sides") > 0).then(pl.col("sides"))  # of units that are never negative none is
    scores = scores.with_columns(*medians, chance).with_columns(sides=two_sided)
    return scores.drop("peaked").join(shaped, on=ADDRESS, how="left").sort("cell")


def _next(run: Run, layer: int, triggers: pl.DataFrame, text: _Tokens) -> pl.DataFrame:
    """Per side of a layer: `next_share` of triggers followed by a token that is written, and what is expected.

    In an encoder: of triggers at such a token.
    """
    model = run.manifest.model
    written = _sides(run, "values", layer, "token")
    if model.bidirectional or layer < model.encoder_layers:
        followed = triggers.select("side", token=pl.Series(text.at(triggers), dtype=pl.Int32))
    else:
        followed = triggers.filter(pl.col("next_token").is_not_null()).select("side", token="next_token")
    frequency = followed.group_by("token").len()
    frequency = frequency.with_columns(frequency=pl.col("len") / pl.col("len").sum())
    expected = (
        written.join(frequency, on="token")
        .group_by("side")
        .agg(pl.col("frequency").sum().alias("next_usual"))
    )
    key = (pl.col("side") * model.vocabulary + pl.col("token")).alias("key")
    hits = (
        followed.with_columns(key)
        .join(written.select(key), on="key", how="semi")
        .group_by("side")
        .agg(pl.len().alias("hits"), pl.col("token").n_unique().alias("different"))
        .filter(pl.col("different") >= DIFFERENT)
    )
    return (
        _stored(triggers)
        .join(hits, on="side")
        .join(expected, on="side")
        .with_columns(next_share=pl.col("hits") / pl.col("stored"))
        .with_columns(next=pl.col("next_share") - pl.col("next_usual"))
        .drop("hits", "different")
    )


def _token(triggers: pl.DataFrame, text: _Tokens) -> pl.DataFrame:
    """Per side: the commonest `active` token, its `token_share` of triggers, and of the corpus."""
    side, common, hits = _commonest(triggers["side"].to_numpy(), text.at(triggers), len(text.share))
    commonest = pl.DataFrame(
        {"side": side, "active": common, "hits": hits, "token_usual": text.share[common]}
    )
    return (
        _stored(triggers)
        .join(commonest, on="side")
        .with_columns(token_share=pl.col("hits") / pl.col("stored"))
        .with_columns(token=pl.col("token_share") - pl.col("token_usual"))
        .drop("hits")
    )


class _Tokens(NamedTuple):
    """The tokens of a run: of all contexts, i64[token]; where each context begins, and its id; f64[vocabulary], how
    often each is."""

    tokens: np.ndarray
    first: np.ndarray
    contexts: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, run: Run) -> _Tokens:
        contexts = run.table("contexts").select("context", "tokens").collect()
        tokens = contexts["tokens"].explode(empty_as_null=False).to_numpy().astype(np.int64)
        sizes = contexts["tokens"].list.len().to_numpy().astype(np.int64)
        share = np.bincount(tokens, minlength=run.manifest.model.vocabulary) / len(tokens)
        return cls(tokens, np.cumsum(sizes) - sizes, contexts["context"].to_numpy(), share)

    def at(self, triggers: pl.DataFrame) -> np.ndarray:
        """i64[trigger]: the token at each."""
        row = np.searchsorted(self.contexts, triggers["context"].to_numpy())
        return self.tokens[self.first[row] + triggers["position"].to_numpy()]


def _commonest(side: np.ndarray, token: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each side once, ascending, with its commonest token (of several the last) and how often it occurs."""
    key = np.sort(side * size + token)
    first = np.flatnonzero(np.diff(key, prepend=-1))
    count = np.diff(first, append=len(key))
    sides, start = np.unique(key[first] // size, return_index=True)
    if len(sides) == 0:
        return sides, sides, sides
    best = np.maximum.reduceat(count * size + key[first] % size, start)
    return sides, best % size, best // size


def _stored(triggers: pl.DataFrame) -> pl.DataFrame:
    return triggers.group_by("side").len("stored").filter(pl.col("stored") >= LEAST)
