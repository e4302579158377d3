"""The rank of what follows a neuron's strongest trigger, in the whole vocabulary as its value orders it (A12, A13).

The value is read with the sign of the coefficient. A rank is how many tokens score higher. Beside the next token stand
the trigger's last token (A75) and two nulls: the next token of another neuron of the layer (of a mixture, of the
expert), and of the same neuron number half of the layers away.

A value's logits are sorted once and looked at in a few places (*marks*): ranks near both ends, then further and further
apart. The logit of any token falls between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.mine.device import elsewhere
from mnemoscope.mine.reading import share_out
from mnemoscope.mine.values import LENS, PROJECTION, value_vectors
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Layer
from mnemoscope.records import Progress
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures import reductions
from mnemoscope.studies.measures.positions import Sizes, Work

_TILE = 128  # values read at once
_ASKED = ("rank", "last_rank", "permuted_rank", "other_rank")


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, Iterator[pa.Table]]:
    """The table `value_ranks`: a row for each neuron and polarity whose strongest trigger is followed by a token."""
    return {"value_ranks": _layers(run, model, sizes.seed, work.report)}


def _layers(run: Run, model: Model, seed: int, report: Callable[[Progress], None]) -> Iterator[pa.Table]:
    rows = _targets(run)
    generator = np.random.default_rng(seed)
    lens = Lens.of(model.anatomy, LENS, PROJECTION)
    total = model.anatomy.n_layers
    for number, layer in enumerate(model.anatomy.layers):
        report(Progress("ranking values", number, total, "layers"))
        triggers, cells = rows.filter(pl.col("layer") == number), run.manifest.model.cells
        among = cells.among(cells.cell(number, triggers["neuron"]))
        asked = _asked(rows, triggers, total, generator, among)
        if triggers.height:
            yield _read(lens, layer, triggers, asked)
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


def _asked(
    rows: pl.DataFrame,
    triggers: pl.DataFrame,
    layers: int,
    generator: np.random.Generator,
    among: np.ndarray,
) -> np.ndarray:
    """i64[row, 4]: tokens whose ranks are wanted; -1 where there is none.

    among  i64[row]: the same number of neurons that run on the same tokens
    """
    token = triggers["token"].to_numpy().astype(np.int64)
    permuted = token.copy()
    side = triggers["polarity"].to_numpy()
    for polarity in (1, -1):
        for number in np.unique(among):
            members = (side == polarity) & (among == number)
            permuted[members] = generator.permutation(token[members])
    far = triggers.select(
        pl.lit((int(triggers["layer"][0]) + layers // 2) % layers if triggers.height else 0, pl.Int16).alias(
            "layer"
        ),
        "neuron",
        "polarity",
    )
    other = far.join(rows, on=["layer", "neuron", "polarity"], how="left", maintain_order="left")["token"]
    columns = (token, triggers["last_token"].to_numpy(), permuted, other.fill_null(-1).to_numpy())
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def _read(lens: Lens, layer: Layer, triggers: pl.DataFrame, asked: np.ndarray) -> pa.Table:
    values = value_vectors(layer)
    neuron, sign = (triggers[name].to_numpy().astype(np.int64) for name in ("neuron", "polarity"))
    neurons = np.unique(neuron)
    tiles, rows = [], []
    with torch.inference_mode():
        for chosen in np.split(neurons, range(_TILE, len(neurons), _TILE)):
            vectors = values[torch.from_numpy(chosen).to(values.device)]
            for polarity, logits in _written(lens, vectors):
                wanted = np.flatnonzero(np.isin(neuron, chosen) & (sign == polarity))
                row = torch.from_numpy(np.searchsorted(chosen, neuron[wanted])).to(logits.device)
                tiles.append(_rank(logits[row], torch.from_numpy(asked[wanted])))
                rows.append(wanted)
    order = np.argsort(np.concatenate(rows))
    columns = {name: np.concatenate([tile[name] for tile in tiles])[order] for name in tiles[0]}
    for place, name in enumerate(_ASKED):
        columns[name] = np.ma.array(columns[name], mask=asked[:, place] < 0)
    return arrow_table("value_ranks", triggers.to_dict() | columns)


def _written(lens: Lens, vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What values write at a coefficient of either sign, over the vocabulary.

    Without biases it is the same upside down, and is read once.
    """
    logits = lens.logits(vectors)
    yield 1, logits
    yield -1, lens.logits(-vectors) if lens.biased else logits.neg_()


def _rank(logits: Tensor, asked: Tensor) -> dict[str, np.ndarray]:
    """Ranks of the asked tokens, and what the value is surest of."""
    tokens = asked.to(logits.device).clamp(min=0)
    place = reductions.ranks(logits, tokens).int().cpu().numpy()
    mass, top = reductions.log_sums(logits), reductions.first_largest(logits)
    best, first = (logits.gather(1, token[:, None])[:, 0] for token in (top, tokens[:, 0]))
    return {
        **{name: place[:, column] for column, name in enumerate(_ASKED)},
        "probability": (first - mass).exp().float().cpu().numpy(),
        "top_token": top.int().cpu().numpy(),
        "top_probability": (best - mass).exp().float().cpu().numpy(),
    }


# -- Where a token stands in every value of a layer, without reading the layer's values again for each token (A44) ---

EVERY = 64  # ranks from either end that are all marked
_STEP = 1.1  # of ranks beyond: they are known to within a tenth
_NOTHING = 1e-6  # by how much the same logit may differ between two sums in fp32, relative to the largest


def marked(vocabulary: int) -> np.ndarray:
    """i64[mark], ascending: ranks that are marked, as many from below as from above."""
    if vocabulary <= EVERY:
        return np.arange(vocabulary)
    near = [*range(EVERY)]
    while near[-1] * _STEP < vocabulary / 2:
        near.append(int(np.ceil(near[-1] * _STEP)))
    near.append(vocabulary // 2)
    return np.unique([*near, *(vocabulary - 1 - rank for rank in near)])


@dataclass(frozen=True, eq=False)
class ValueRanks:
    """The values of one layer, each of unit length under the lens and without its biases.

    marks  logits at the ranks `marked`, descending
    """

    lens: Lens
    marks: Float[Tensor, "neuron mark"]
    ranks: Int[Tensor, " mark"]

    @classmethod
    def of(cls, lens: Lens, layer: Layer, work: Work, name: str) -> ValueRanks:
        """Read once and kept under the name."""
        places = marked(lens.unembedding.shape[0])
        marks = work.kept(name, lambda: _sorted(lens, layer, places))
        device = lens.unembedding.device
        return cls(lens, *(torch.from_numpy(each).to(device) for each in (marks, places)))

    def rank(
        self, vectors: Float[Tensor, "neuron width"], negative: Tensor, token: int
    ) -> Float[Tensor, " neuron"]:
        """How many tokens score higher than this one under what each neuron writes; between marks, about so many.

        vectors   what every neuron of the layer writes; nothing gives no rank (infinity)
        negative  bool[neuron]: with a coefficient below 0, that is its value upside down
        """
        unit = _unit(self.lens, vectors)
        score = unit @ self.lens.unembedding[token]
        marks = torch.where(negative[:, None], -self.marks.flip(-1), self.marks)
        slack = _NOTHING * self.marks.abs().amax(-1)
        above = (marks > (score + slack)[:, None]).sum(-1).clamp(max=len(self.ranks) - 1)
        right, left = self.ranks[above].float(), self.ranks[(above - 1).clamp_min(0)].float()
        high, low = (marks.gather(-1, place[:, None])[:, 0] for place in ((above - 1).clamp_min(0), above))
        share = ((high - score) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        between = torch.where(right - left <= 1, right, left + share * (right - left))
        return torch.where(unit.abs().amax(-1) > 0, between, torch.inf)


def _sorted(lens: Lens, layer: Layer, places: np.ndarray) -> np.ndarray:
    """f32[neuron, mark]"""
    marks = []
    for tile in _unit(lens, value_vectors(layer)).split(_TILE):
        product = tile @ lens.unembedding.T
        at = product.shape[1] - 1 - places
        if elsewhere(product):
            marks.append(product.sort().values[:, torch.from_numpy(at).to(product.device)].cpu().numpy())
            continue
        scores = product.numpy()
        share_out(lambda row: scores[row].sort(), range(len(scores)))  # noqa: B023
        marks.append(scores[:, at])
    return np.concatenate(marks)


def _unit(lens: Lens, vectors: Tensor) -> Tensor:
    """As the unembedding reads them, up to the lens's scale: ranks need no more."""
    vectors = lens.weighted(vectors)
    sign = -1.0 if lens.multiplier < 0 else 1.0
    return vectors * (sign / vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30))
