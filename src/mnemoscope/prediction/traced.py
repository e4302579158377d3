"""A traced prediction answers questions about its parts: residuals under a lens, and parts in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.lens import Lens
from mnemoscope.model.stream import Stream
from mnemoscope.model.unit_parts import base, last_layer, replaced
from mnemoscope.prediction.bases import Geometry, Measure, ResidualBases
from mnemoscope.prediction.search import Parts
from mnemoscope.text.vocabulary import Vocabulary

_KEPT = 256 << 20  # bytes of attention parts that are kept instead of made again


@dataclass(frozen=True, eq=False)
class TracedPrediction:
    """The prediction after the last token of a traced sequence, or, of an encoder, at its masked token (``at``).

    Rows of `bases`: the 2L+1 points of the stream, then no vector at all (`nothing`).
    """

    stream: Stream
    lens: Lens
    target: int
    foils: tuple[int, ...]
    words: Vocabulary
    shared: Geometry | None = None
    at: int | None = None

    @cached_property
    def position(self) -> int:
        """The position that is explained: the last one, or the masked one."""
        return len(self.stream.tokens) - 1 if self.at is None else self.at

    @property
    def sources(self) -> int:
        """How many tokens the position has read."""
        return self.stream.sources(self.position)

    @property
    def logits(self) -> Float[Tensor, " vocabulary"]:
        """The model's own, of this prediction."""
        return self.stream.logits[self.position]

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.stream.anatomy.n_layers

    @property
    def final(self) -> int:
        """The row of the final residual."""
        return 2 * self.layers

    @property
    def nothing(self) -> int:
        """The row of no vector: what the biases of the final norm, the unembedding and a head say alone."""
        return 2 * self.layers + 1

    @cached_property
    def points(self) -> Float[Tensor, "point width"]:
        """Lin0, Lres0, Lout0, ... (A30)."""
        return self.stream.points(self.position)

    @cached_property
    def updates(self) -> Float[Tensor, "update width"]:
        """The vectors that attention 0, FFN 0, attention 1, ... added (`steps`); where units stand for the stream,
        what it was there, and what was added since.
        """
        rows = torch.cat([self.points, self.stream.constant(self.position)[None]])
        before, after = torch.tensor([step[2:] for step in self.steps]).unbind(1)
        return rows[after] - rows[before]

    @cached_property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """What each row of `updates` is: layer, part (stream | attention | ffn), the row of `bases` that it is
        added to, and the one that it makes of that.
        """
        anatomy = self.stream.anatomy
        start, parts = replaced(anatomy), ("attention", "ffn")
        rest = range(max(start, 0), 2 * self.layers)
        steps = [(step // 2, parts[step % 2], step, step + 1) for step in rest]
        return steps if start < 0 else [(last_layer(anatomy), "stream", self.nothing, start), *steps]

    @cached_property
    def scale(self) -> Float[Tensor, " 1"]:
        """The frozen statistic of the final residual."""
        return self.lens.scale(self.points[-1])

    @cached_property
    def bases(self) -> ResidualBases:
        """The residuals that vectors are added to or taken from."""
        rows = torch.cat([self.points, self.stream.constant(self.position)[None]])
        return ResidualBases(self.lens, self.target, rows, self.scale, self.shared)

    def attention(self, layer: int) -> Float[Tensor, "head source width"]:
        """Every head x source of a layer; kept when all of them are small."""
        if layer in self._attention:
            return self._attention[layer]
        parts = self.stream.attention_parts(layer, self.position)
        if parts.numel() * 4 * self.layers <= _KEPT:
            self._attention[layer] = parts
        return parts

    @cached_property
    def _attention(self) -> dict[int, Tensor]:
        return {}

    def groups(self, kind: str) -> list[Parts]:
        """One group per layer of ``heads`` (x sources), ``whole_heads``, ``sources`` or ``neurons``."""
        anatomy = self.stream.anatomy
        sizes = {
            "heads": (anatomy.n_heads * self.sources,) * self.layers,
            "whole_heads": (anatomy.n_heads,) * self.layers,
            "sources": (self.sources,) * self.layers,
            "neurons": anatomy.sizes,
        }
        bases = [2 * layer for layer in range(self.layers)]
        if kind == "neurons":
            places = (base(anatomy, layer) for layer in range(self.layers))
            bases = [self.nothing if place is None else place for place in places]
        made = (_Made(self, kind, layer) for layer in range(self.layers))
        return [Parts(*group) for group in zip(sizes[kind], bases, made, strict=True)]

    def measured(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, "part measure"]:
        """Increase and leave-one-out of a few vectors, exactly."""
        final = torch.full_like(base, self.final)
        return self.bases.measured(vectors, [Measure(base, False), Measure(final, True)])

    def left(self, vectors: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
        """Leave-one-out alone, exactly."""
        final = torch.full((len(vectors),), self.final)
        return self.bases.measured(vectors, [Measure(final, True)])[:, 0]

    def logit(self, vectors: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
        """The logit that the lens reads for the target in the vectors alone, flat and before a soft cap."""
        row = self.lens.unembedding[self.target]
        read = self.lens.directions(vectors, self.scale) @ row
        if self.lens.name == "own" and self.lens.bias is not None:
            read = read + self.lens.bias[self.target]
        return (read * self.lens.multiplier).double()

    def odds(
        self,
        vectors: Float[Tensor, "part width"],
        base: Int[Tensor, " part"],
        foils: Sequence[int] | None = None,
    ) -> Float[Tensor, "part measure foil"]:
        """The change of log p(target) - log p(foil) by each vector: added to its base, and left out of the end.

        foils  some tokens instead of all foils of the prediction
        """
        tokens = torch.tensor([self.target, *(self.foils if foils is None else foils)])
        increase = self.bases.odds(vectors, base, tokens)
        linear = self.bases.linear and self.lens.additive
        final = torch.full_like(base, self.final)
        left_out = increase if linear else -self.bases.odds(-vectors, final, tokens)
        moved = torch.stack([increase, left_out], 1)
        return moved[..., :1] - moved[..., 1:]

    @cached_property
    def point_odds(self) -> Float[Tensor, "point foil"]:
        """log p(target) - log p(foil) at every point of the stream, and with no vector at all."""
        scores = self.bases.log_probabilities.double()
        return scores[:, self.target, None] - scores[:, list(self.foils)]

    def promoted(
        self, vectors: Float[Tensor, "part width"], count: int
    ) -> tuple[list[list[str]], list[list[str]]]:
        """The tokens that vectors raise most and lower most, under the own lens (as `values` of a run)."""
        lens = Lens.of(self.stream.anatomy, "own", "flat")
        up: list[list[str]] = []
        down: list[list[str]] = []
        for chunk in vectors.split(64):
            scores = lens.raw_logits(chunk)
            for side, largest in ((up, True), (down, False)):
                tokens = scores.topk(min(count, scores.shape[1]), largest=largest).indices
                side += [["".join(self.words.pieces([token])) for token in row] for row in tokens.tolist()]
        return up, down


@dataclass(frozen=True)
class _Made:
    """A maker of the vectors of one group."""

    prediction: TracedPrediction
    kind: str
    layer: int

    def __call__(self, index: Tensor | None) -> Tensor:
        prediction = self.prediction
        if self.kind == "neurons":
            return prediction.stream.neuron_parts(self.layer, prediction.position, index)
        parts = prediction.attention(self.layer)
        parts = {"heads": parts.flatten(0, 1), "whole_heads": parts, "sources": parts}[self.kind]
        if self.kind != "heads":
            parts = parts.sum(1 if self.kind == "whole_heads" else 0)
        return parts if index is None else parts[index]
