"""What each layer makes of a prediction: residual, feed-forward output and their sum, read as tokens (A16-A27, A29).

One forward pass over prefixes cut where they are looked at; then, layer by layer, r, y and o = r + y go through the
whole vocabulary, and every memory is asked whether it alone would have said what the layer says.

Each prefix has a *partner*, an example of another document of its shard, whose feed-forward output, targets and
strongest memory stand in for its own: permuted among the same examples, they are as frequent as the true ones. As
another null, memories say the top tokens of values half the model away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.mine.values import value_vectors
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import shuffled_copy
from mnemoscope.records import Cells
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS, arrow_table
from mnemoscope.studies.measures.lenses import Points, points, value_tops
from mnemoscope.studies.measures.positions import SHARD, Examples, Sizes, Work, sample
from mnemoscope.studies.measures.reductions import first_largest, log_sums, moments, ranks

LENSES = ("own", "raw")
ACTIVE = (
    0.01,
    0.1,
    0.5,
)  # shares of the layer's largest |m||v| from which a memory may be called active (A16)
HEAVIEST = (10, 100)  # memories whose share of the sum of |m||v| is kept
HEAD = 5  # tokens that are the head of a distribution (A24, A25)

_CELLS = 1 << 23  # logits of one kind at once
_NEAR = 1 << 17  # and where they are read again and again, in the cache

_PROBABILITIES = ("p_output", "p_output_permuted", "p_final", "p_residual", "p_final_permuted")
_WRITTEN = ("ffn_rank_residual", "ffn_rank_memory", "ffn_rank_memory_permuted")

Columns = dict[str, Tensor]  # by name; one value for each example, unless a function says more


def measure(
    run: Run,
    model: Model,
    sizes: Sizes,
    work: Work,
    *,
    lenses: Sequence[str] = LENSES,
) -> Mapping[str, Iterable[pa.Table]]:
    """The tables `refinement` and `refinement_examples` (docs/format.md) of one position of each of some contexts.

    lenses  under which r, y, o and the values are read

    If the sizes say so, the same of a copy of the model whose matrices are shuffled, beside it.
    """
    examples = sample(run, sizes.positions, longest=sizes.longest, seed=sizes.seed)
    units = [_Unit.of("model", model, lenses, run, work)]
    if sizes.shuffled:
        units.append(_Unit.of("shuffled", shuffled_copy(model, sizes.seed), lenses, None, work))

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        blocks = _blocks(examples.documents[numbers], model.anatomy.vocabulary)
        shards = [unit.shard(examples, numbers, blocks) for unit in units]
        names = [unit.name for unit in units]
        return {
            "refinement": _rows([layers for layers, _ in shards], names, lenses, numbers, blocks),
            "refinement_examples": _examples([ends for _, ends in shards], names, examples, numbers, blocks),
        }

    with torch.inference_mode():
        return work.shards(examples, shard, "refinement")


@dataclass(frozen=True)
class _Block:
    """Examples of a shard that are read together; the partner of each is `shift` places further on, in a circle."""

    rows: np.ndarray  # i64[example], in the shard
    shift: int  # 0 for an example that is alone

    def partner(self, values: Tensor) -> Tensor:
        """The partners' values, of those of the block."""
        return values.roll(-self.shift, 0)


def _blocks(documents: np.ndarray, vocabulary: int) -> list[_Block]:
    """A shard in as few blocks as memory allows, partners of another document wherever there is one."""
    count = -(-len(documents) // max(2, min(SHARD, _CELLS // vocabulary)))
    blocks = []
    for first in range(count):
        rows = np.arange(first, len(documents), count)
        others = [
            int((documents[rows] != np.roll(documents[rows], -shift)).sum()) for shift in range(len(rows))
        ]
        middle = len(rows) // 2
        blocks.append(
            _Block(rows, max(range(len(rows)), key=lambda shift: (others[shift], -abs(shift - middle))))
        )
    return blocks


@dataclass(frozen=True, eq=False)
class _Unit:
    """A model and what is known of its memories: which token each says under each lens, and how long its value is."""

    name: str
    model: Model
    lenses: Sequence[Lens]
    tops: Sequence[Int[Tensor, "cell side"]]
    lengths: Float[Tensor, " cell"]
    own: Lens

    @classmethod
    def of(cls, name: str, model: Model, lenses: Sequence[str], run: Run | None, work: Work) -> _Unit:
        """Values are looked up in the run, if one is given, and else read."""
        read = [Lens.of(model.anatomy, lens) for lens in lenses]
        tops = [value_tops(run, model, lens.flat, work, f"tops-{name}") for lens in read]
        lengths = [value_vectors(layer).square().sum(-1).sqrt() for layer in model.anatomy.layers]
        return cls(name, model, read, tops, torch.cat(lengths), Lens.of(model.anatomy, "own"))

    def shard(
        self, examples: Examples, numbers: np.ndarray, blocks: Sequence[_Block]
    ) -> tuple[Columns, Columns]:
        """Columns [example layer lens], and those of the examples alone."""
        batches = [(members, points(self.model, batch)) for members, batch in examples.batches(numbers)]
        order = np.argsort(np.concatenate([members for members, _ in batches]), kind="stable")
        seen = Points.joined([looked_at for _, looked_at in batches], order)
        layers, ends = [], []
        for block in blocks:
            rows = torch.from_numpy(block.rows).to(seen.ffn.device)
            inside = Points(seen.residual[rows], seen.ffn[rows], seen.coefficients[rows])
            ends.append(self._end(inside))
            layers.append(self._block(inside, ends[-1]["prediction"], block))
        back = torch.from_numpy(np.argsort(np.concatenate([block.rows for block in blocks])))
        return _joined(layers, back), _joined(ends, back)

    def _end(self, seen: Points) -> Columns:
        """What the model itself says next, and how surely."""
        final = seen.output[:, -1]
        logits = self.own.point(self.own.linear(final), self.own.scale(final))
        best, prediction = logits.max(-1)
        return {"prediction": prediction, "p_prediction": (best - logits.logsumexp(-1)).exp()}

    def _block(self, seen: Points, prediction: Tensor, block: _Block) -> Columns:
        """Columns [example layer lens]."""
        layers, cells = [], self.model.cells
        for layer in range(self.model.anatomy.n_layers):
            here, elsewhere = cells.of(layer), _of_another_layer(cells, layer)
            memories = _Memories.of(seen.coefficients[:, here], self.lengths[here])
            r, y = seen.residual[:, layer], seen.ffn[:, layer]
            readings = []
            for lens, tops in zip(self.lenses, self.tops, strict=True):
                said, other = memories.say(tops[here]), memories.say(tops[elsewhere])
                read = _Read.of(lens, r, y, seen.output[:, -1], block)
                columns = read.columns(prediction, memories.heaviest(said))
                compared = read.flat(columns)
                readings.append(columns | memories.active | memories.agreement(said, other, compared, block))
            layers.append(
                {name: torch.stack([columns[name] for columns in readings], -1) for name in readings[0]}
            )
        return {name: torch.stack([columns[name] for columns in layers], 1) for name in layers[0]}


def _of_another_layer(cells: Cells, layer: int) -> Int[Tensor, " neuron"]:
    """For each neuron of a layer one of the layer half of all layers away, over and over where that has fewer."""
    others = cells.layers
    other = cells.of(others[(others.index(layer) + len(others) // 2) % len(others)])
    return other.start + torch.arange(cells.sizes[layer]) % (other.stop - other.start)


def _joined(parts: Sequence[Columns], order: Tensor) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu()[order] for name in parts[0]}


@dataclass(frozen=True, eq=False)
class _Read:
    """One layer of a block of examples, through the vocabulary: A r and A y, and by what they are scaled.

    `permuted` is the scale of r with the partner's y.
    """

    lens: Lens
    block: _Block
    of_r: Float[Tensor, "example row"]
    of_y: Float[Tensor, "example row"]
    residual: Float[Tensor, "example 1"]
    ffn: Float[Tensor, "example 1"]
    output: Float[Tensor, "example 1"]
    permuted: Float[Tensor, "example 1"]

    @classmethod
    def of(cls, lens: Lens, r: Tensor, y: Tensor, final: Tensor, block: _Block) -> _Read:
        """From vectors [example width]; `final` are the last outputs, for the frozen lens."""
        vectors = (r, y, r + y, r + block.partner(y))
        scales = (lens.scale(final, vector) for vector in vectors)
        return cls(lens, block, *lens.linear(torch.cat([r, y])).chunk(2), *scales)

    def columns(self, prediction: Int[Tensor, " example"], memory: Int[Tensor, " example"]) -> Columns:
        """Top tokens, probabilities, ranks (A21-A25); where y puts what the strongest memory says (A29)."""
        partner = self.block.partner
        asked = torch.stack([prediction, partner(prediction), memory, partner(memory)], -1)
        rows = torch.arange(len(asked), device=asked.device)
        step = max(1, _NEAR // self.of_r.shape[1])
        pairs = zip(rows.split(step), partner(rows).split(step), strict=True)
        parts = [self._tile(own, theirs, asked[own]) for own, theirs in pairs]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        mean, std = columns.pop("ffn_mean"), columns.pop("ffn_std").clamp_min(1e-30)
        columns["ffn_z_residual"] = (columns["ffn_z_residual"] - mean) / std
        columns["ffn_z_residual_permuted"] = (columns["ffn_z_residual_permuted"] - partner(mean)) / partner(
            std
        )
        residual, output = columns["residual"], columns["output"]
        others = {
            "": output, "_permuted": columns["permuted"], "_head": columns.pop("head"), "_unrelated": partner(output),
        }  # fmt: skip
        alike = {f"similarity{name}": self._similarity(residual, tokens) for name, tokens in others.items()}
        return columns | {"memory": memory} | alike

    def flat(self, columns: Columns) -> Columns:
        """The top tokens of y and of r + y by the projection by which values are read (B.4); these, if there is one."""
        if self.lens.bands is None:
            return columns
        size = self.lens.bands.vocabulary
        of_y, of_o = self.of_y[:, :size], self.of_r[:, :size] + self.of_y[:, :size]
        # Biases of a final norm are added to points, and under own to all that is read.
        flat = self.lens.flat
        return {
            "ffn": first_largest(flat.part(of_y, self.ffn)),
            "output": first_largest(flat.point(of_o, self.output)),
        }

    def _tile(
        self, rows: Int[Tensor, " row"], theirs: Int[Tensor, " row"], asked: Int[Tensor, "row token"]
    ) -> Columns:
        """`columns` of a few examples and their partners, whose logits stay in the cache; z not yet standardised."""
        lens, of_r, of_y, of_other = self.lens, self.of_r[rows], self.of_y[rows], self.of_y[theirs]
        before = lens.point(of_r, self.residual[rows])
        written = lens.part(of_y, self.ffn[rows])
        other = lens.part(of_other, self.ffn[theirs])
        after = lens.point(of_r + of_y, self.output[rows])
        permuted = first_largest(lens.point(of_r + of_other, self.permuted[rows]))
        residual, ffn, output = (first_largest(logits) for logits in (before, written, after))
        prediction, their_prediction, memory, their_memory = asked.unbind(-1)

        tokens = torch.stack([output, permuted, prediction, residual, their_prediction], -1)
        p = (before.gather(-1, tokens) - log_sums(before)[:, None].float()).exp().unbind(-1)
        in_before = ranks(before, tokens[:, :3]).unbind(-1)
        in_written = ranks(written, torch.stack([residual, memory, their_memory], -1)).unbind(-1)
        mean, std = moments(written)
        return {
            "residual": residual,
            "ffn": ffn,
            "output": output,
            "permuted": permuted,
            "head": _other_of_head(before, torch.stack([residual, output], -1), rows),
            **dict(zip(_PROBABILITIES, p, strict=True)),
            **dict(zip(("rank_output", "rank_output_permuted", "rank_final"), in_before, strict=True)),
            "output_rank_final": ranks(after, prediction[:, None])[:, 0],
            **dict(zip(_WRITTEN, in_written, strict=True)),
            "ffn_rank_residual_permuted": ranks(other, residual[:, None])[:, 0],
            "ffn_z_residual": _at(written, residual),
            "ffn_z_residual_permuted": _at(other, residual),
            "ffn_mean": mean.float(),
            "ffn_std": std.float(),
        }

    def _similarity(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Cosine of two tokens' rows of the unembedding."""
        rows = self.lens.unembedding
        return torch.cosine_similarity(rows[tokens], rows[others], dim=-1)


def _other_of_head(
    logits: Tensor, but: Int[Tensor, "row token"], rows: Int[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """One of the HEAD likeliest tokens that is not one of these, another for each row in turn."""
    head = logits.topk(min(HEAD + 1, logits.shape[-1]), dim=-1).indices
    taken = (head[:, :, None] == but[:, None, :]).any(-1)
    free = head.gather(-1, taken.int().argsort(dim=-1, stable=True))
    return free.gather(-1, (rows % (HEAD - 1))[:, None])[:, 0]


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class _Memories:
    """The memories of one layer: coefficients, and |m||v| as a share of the largest there (0 where none is active)."""

    coefficients: Float[Tensor, "example neuron"]
    share: Float[Tensor, "example neuron"]
    active: Columns  # how many there are, by several rules (A16)

    @classmethod
    def of(cls, coefficients: Tensor, lengths: Float[Tensor, " neuron"]) -> _Memories:
        """From coefficients and the lengths of what is written."""
        weight = coefficients.abs() * lengths
        share = weight / weight.amax(-1, keepdim=True).clamp_min(1e-30)
        total = share.sum(-1)
        counts = {"active": (coefficients > 0).sum(-1), "nonzero": (coefficients != 0).sum(-1)}
        for least in ACTIVE:
            counts[f"active_{round(100 * least)}"] = (share >= least).sum(-1)
        counts["participation"] = total.square() / share.square().sum(-1).clamp_min(1e-30)
        for most in HEAVIEST:
            heaviest = share.topk(min(most, share.shape[-1])).values.sum(-1)
            counts[f"mass_{most}"] = heaviest / total.clamp_min(1e-30)
        return cls(coefficients, share, counts)

    def say(self, tops: Int[Tensor, "neuron side"]) -> Int[Tensor, "example neuron"]:
        """The token that each says with the coefficient it has."""
        return torch.where(self.coefficients >= 0, tops[:, 0], tops[:, 1]).long()

    def heaviest(self, said: Int[Tensor, "example neuron"]) -> Int[Tensor, " example"]:
        """What the strongest says."""
        return _at(said, self.share.argmax(-1))

    def agreement(self, said: Tensor, other: Tensor, tops: Columns, block: _Block) -> Columns:
        """How many memories say what the layer says, and how strong the strongest of them is (A18).

        said, other  what memories say by their own values, and by those of another layer
        tops         what is compared with: columns `ffn` and `output`
        """
        ffn, theirs = tops["ffn"], block.partner(tops["ffn"])
        asked = {
            "": (said, ffn),
            "_output": (said, tops["output"]),
            "_permuted": (said, theirs),
            "_other": (other, ffn),
        }
        columns = {}
        for suffix, (words, target) in asked.items():
            same = words == target[:, None]
            active = same & (self.coefficients != 0)
            columns[f"agree{suffix}"] = active.sum(-1)
            columns[f"agree_positive{suffix}"] = (same & (self.coefficients > 0)).sum(-1)
            columns[f"agree_all{suffix}"] = same.sum(-1)
            columns[f"strongest{suffix}"] = (self.share * active).amax(-1)
        return columns


def _rows(
    units: Sequence[Columns],
    names: Sequence[str],
    lenses: Sequence[str],
    numbers: np.ndarray,
    blocks: Sequence[_Block],
) -> pa.Table:
    """Rows of `refinement`, from columns [example layer lens] of each unit."""
    columns = {name: torch.stack([unit[name] for unit in units], 2).numpy() for name in units[0]}
    example, layer, unit, lens = np.indices(next(iter(columns.values())).shape)
    alone = np.broadcast_to(_alone(numbers, blocks)[:, None, None, None], example.shape)
    columns |= {
        "example": numbers[example],
        "layer": np.asarray(layer),
        "unit": np.array(names)[unit],
        "lens": np.array(lenses)[lens],
    }
    return _table("refinement", columns, alone)


def _examples(
    units: Sequence[Columns],
    names: Sequence[str],
    examples: Examples,
    numbers: np.ndarray,
    blocks: Sequence[_Block],
) -> pa.Table:
    """Rows of `refinement_examples`."""
    partner = np.empty(len(numbers), np.int64)
    for block in blocks:
        partner[block.rows] = numbers[np.roll(block.rows, -block.shift)]
    columns = {name: torch.stack([unit[name] for unit in units], 1).numpy() for name in units[0]}
    example, unit = np.indices((len(numbers), len(units)))
    columns |= {
        "example": numbers[example],
        "unit": np.array(names)[unit],
        "document": examples.documents[numbers][example],
        "context": examples.contexts[numbers][example],
        "position": examples.positions[numbers][example],
        "next_token": examples.targets[numbers][example],
        "partner": partner[example],
    }
    alone = np.broadcast_to(_alone(numbers, blocks)[:, None], example.shape)
    return _table("refinement_examples", columns, alone)


def _table(name: str, columns: Mapping[str, np.ndarray], alone: np.ndarray) -> pa.Table:
    """The rows of a table; what may be null is null where an example is alone."""
    flat = {key: values.ravel() for key, values in columns.items()}
    of_partner = [field.name for field in SCHEMAS[name] if field.nullable]
    masked = {key: np.ma.array(flat[key], mask=alone.ravel()) for key in of_partner}
    return arrow_table(name, flat | masked)


def _alone(numbers: np.ndarray, blocks: Sequence[_Block]) -> np.ndarray:
    """bool[example]: it has no partner, and so no null."""
    alone = np.zeros(len(numbers), bool)
    for block in blocks:
        alone[block.rows] = block.shift == 0
    return alone
