"""Vectors read in vocabulary space: logits, log-probabilities and ranks under a stated lens.

Three lenses (docs/methods.md, G3):

    raw     no final norm: the papers' model has none (Geva et al. 2021; Yu et al. 2023, Eq. 14)
    own     the final norm with the vector's own statistics: the usual logit lens
    frozen  the final norm with the statistics of a reference residual: additive over the parts of that residual

Raw and frozen are linear, so the logits of a sum are the sum of the logits; the biases of the final norm and of
the unembedding are then a part of their own (`Lens.offset`). Own includes both biases in every reading.
Logit soft-capping is applied last and is not additive.

Under every lens the logits of v are ``cap(s(v) A v + c)``: A is the centred, weighted unembedding (`Lens.linear`),
s the statistic of the final norm (`Lens.scale`) and c what its biases add (`Lens.offset`). A is the costly half, and
``A (r + y) = A r + A y``, so that the sum of two vectors is read from the readings of each. The biases belong to
points of the stream (`Lens.point`) and not to parts of it (`Lens.part`), which are then additive; under own to both.

A model with an adaptive softmax has two projections. Under ``adaptive`` logits are the log-probabilities that its own
head gives: they are not additive, and which token is first depends on the length of a vector. Under ``flat`` every
token has its row, the projection of its band multiplied out, and one softmax is over all: ranks are a vector's own,
as in any other model, whose only projection is this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.arguments import LENSES, PROJECTIONS
from mnemoscope.model.adaptive import Bands
from mnemoscope.model.parts import Anatomy, Norm

_TOKENS = 512  # of the unembedding at once: a half faster than all in one product


@dataclass(frozen=True, eq=False)
class Lens:
    """One way to read vectors of the residual stream as scores over the vocabulary; everything in fp32."""

    name: str  # one of LENSES
    norm: Norm | None
    table: Float[Tensor, "row width"]  # of tokens, and under an adaptive softmax of its classes
    bias: Float[Tensor, " vocabulary"] | None
    multiplier: float
    softcap: float | None
    bands: Bands | None = None

    @classmethod
    def of(cls, anatomy: Anatomy, name: str, projection: str = "adaptive") -> Lens:
        """The lens of that name for a model; with no adaptive softmax both of `PROJECTIONS` are flat."""
        for given, accepted in ((name, LENSES), (projection, PROJECTIONS)):
            if given not in accepted:
                raise ValueError(f"reading a vector: {given!r} is no lens; take one of {', '.join(accepted)}")
        bias, table = anatomy.unembedding_bias, anatomy.unembedding().detach().float()
        bands = anatomy.bands if projection == "adaptive" else None
        return cls(
            name,
            anatomy.final_norm,
            table if bands else table[: anatomy.vocabulary],
            None if bias is None else bias.detach().float(),
            anatomy.logit_multiplier,
            anatomy.softcap,
            bands,
        )

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary width"]:
        """The row of every token."""
        return self.table if self.bands is None else self.table[: self.bands.vocabulary]

    @cached_property
    def flat(self) -> Lens:
        """The same lens with the flat projection; itself where it has no other."""
        return self if self.bands is None else replace(self, table=self.unembedding, bands=None)

    def softmax(self, number: int) -> Lens:
        """A lens of one softmax of the adaptive ones (`Bands.softmax`)."""
        assert self.bands is not None, "a flat projection has one softmax"
        rows = self.bands.softmax(number)
        if number:  # a view: the last band holds most of the vocabulary
            return replace(self, table=self.table[int(rows[0]) : int(rows[-1]) + 1], bands=None)
        return replace(self, table=self.table[rows.to(self.table.device)], bands=None)

    @property
    def additive(self) -> bool:
        """Whether a token's logit is a dot product: no soft cap and no adaptive softmax."""
        return self.softcap is None and self.bands is None

    def scale(
        self, reference: Float[Tensor, "*batch width"], vectors: Float[Tensor, "*batch width"] | None = None
    ) -> Float[Tensor, "*batch 1"]:
        """s(v), 1 / rms or 1 / standard deviation: of a reference residual, under own of the vectors if they are given;
        1 under raw."""
        if self.name == "raw" or self.norm is None:
            return torch.ones_like(reference[..., :1], dtype=torch.float32)
        return self.norm.scale((reference if self.name == "frozen" or vectors is None else vectors).float())

    def weighted(self, vectors: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """What is multiplied with the unembedding, but for its scale; additive."""
        if self.name == "raw" or self.norm is None:
            return vectors
        return self.norm.linear(vectors, vectors.new_ones(1))

    def linear(self, vectors: Float[Tensor, "vector width"]) -> Float[Tensor, "vector row"]:
        """A v, for every row of the table: additive."""
        vectors, table = self.weighted(vectors), self.table
        scores = vectors.new_empty(len(vectors), len(table))
        for start in range(0, len(table), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            torch.mm(vectors, table[tokens].T, out=scores[:, tokens])
        return scores if self.multiplier == 1.0 else scores.mul_(self.multiplier)

    def pieces(
        self, vectors: Float[Tensor, "vector width"]
    ) -> Iterator[tuple[int, Float[Tensor, "vector some_rows"]]]:
        """`linear` in pieces that stay in the cache, each with its first row of the table; good until the next one."""
        vectors = self.weighted(vectors) * self.multiplier
        for start in range(0, len(self.table), _TOKENS):
            yield start, vectors @ self.table[start : start + _TOKENS].T

    def point(
        self, linear: Float[Tensor, "vector row"], scale: Float[Tensor, "vector 1"]
    ) -> Float[Tensor, "vector vocabulary"]:
        """Logits of points of the stream, from A v."""
        scores = linear * scale
        return self.cap(scores.add_(self.offset) if self.biased else scores)

    def part(
        self, linear: Float[Tensor, "vector row"], scale: Float[Tensor, "vector 1"]
    ) -> Float[Tensor, "vector vocabulary"]:
        """Logits of parts of the stream, from A v."""
        return self.point(linear, scale) if self.name == "own" or self.bands else linear * scale

    def directions(
        self, vectors: Float[Tensor, "*batch width"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch width"]:
        """What is multiplied with the unembedding: the vectors after the lens's norm."""
        vectors = vectors.float()
        if self.name == "raw" or self.norm is None:
            return vectors
        if self.name == "own":
            return self.norm(vectors)
        if scale is None:
            raise ValueError("the frozen lens needs the scale of a reference residual; see Lens.scale")
        return self.norm.linear(vectors, scale)

    def logits(
        self, vectors: Float[Tensor, "*batch width"], scale: Float[Tensor, "*batch 1"] | None = None
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Scores of every token. Additive in the vectors under raw and frozen where the lens is `additive` (A35)."""
        return self.scores(self.directions(vectors, scale))

    def scores(
        self, directions: Float[Tensor, "*batch width"], tokens: slice = slice(None)
    ) -> Float[Tensor, "*batch some_tokens"]:
        """`logits` of what `directions` gives; without an adaptive softmax also of some tokens only."""
        scores = directions @ self.table[tokens].T
        if self.name == "own" and self.bias is not None:
            scores += self.bias[tokens]
        if self.multiplier != 1.0:
            scores *= self.multiplier
        return self.cap(scores) if self.name == "own" or self.bands else scores

    def raw_logits(
        self, residuals: Float[Tensor, "*batch width"], scale: Float[Tensor, "*#batch 1"] | None = None
    ) -> Float[Tensor, "*batch row"]:
        """Logits of points of the stream before `cap`, with the biases of the final norm and the unembedding."""
        scores = self.directions(residuals, scale) @ self.table.T
        if self.name == "own":
            scores = scores if self.bias is None else scores + self.bias
            return scores * self.multiplier
        return scores * self.multiplier + self.offset

    @cached_property
    def offset(self) -> Float[Tensor, " row"]:
        """The logits of no vector: what the biases of the final norm and the unembedding add (raw: the latter)."""
        total = torch.zeros(self.table.shape[0], device=self.table.device)
        if self.name != "raw" and self.norm is not None and self.norm.bias is not None:
            total = total + self.table @ self.norm.bias.float()
        if self.bias is not None:
            total = total + self.bias
        return total * self.multiplier

    @cached_property
    def biased(self) -> bool:
        """Whether the offset is anything."""
        return bool(self.offset.any())

    def cap(self, scores: Float[Tensor, "*batch row"]) -> Float[Tensor, "*batch vocabulary"]:
        """The model's soft cap, monotone, so that ranks stay and probabilities move; or its adaptive softmax."""
        if self.bands is not None:
            return self.bands.log_probabilities(scores)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
