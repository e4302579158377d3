"""Vectors read in vocabulary space: logits, log-probabilities and ranks under a stated lens.

Three lenses (docs/methods.md, G3):

    raw     no final norm: the papers' model has none (Geva et al. 2021; Yu et al. 2023, Eq. 14)
    own     the final norm with the vector's own statistics: the usual logit lens
    frozen  the final norm with the statistics of a reference residual: additive over the parts of that residual

Raw and frozen are linear, so the logits of a sum are the sum of the logits; the biases of the final norm and of
the unembedding are then a part of their own (`Lens.offset`). Own includes both biases in every reading.
Logit soft-capping is applied last and is not additive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.arguments import LENSES
from mnemoscope.model.parts import Anatomy, Norm


@dataclass(frozen=True)
class Lens:
    """One way to read vectors of the residual stream as scores over the vocabulary; everything in fp32."""

    name: str  # one of LENSES
    norm: Norm | None
    unembedding: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None
    multiplier: float
    softcap: float | None

    @classmethod
    def of(cls, anatomy: Anatomy, name: str) -> Lens:
        """The lens of that name for a model."""
        if name not in LENSES:
            raise ValueError(f"reading a vector: {name!r} is no lens; take one of {', '.join(LENSES)}")
        bias = anatomy.unembedding_bias
        return cls(
            name,
            anatomy.final_norm,
            anatomy.unembedding().detach().float(),
            None if bias is None else bias.detach().float(),
            anatomy.logit_multiplier,
            anatomy.softcap,
        )

    def scale(self, reference: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """The statistic (1 / rms or 1 / standard deviation) that the frozen lens takes from a residual."""
        if self.norm is None:
            return torch.ones_like(reference[..., :1], dtype=torch.float32)
        return self.norm.scale(reference.float())

    def directions(
        self, vectors: Float[Tensor, "*batch width"], scale: Float[Tensor, "*batch 1"] | None = None
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
        """Scores of every token. Additive in the vectors under raw and frozen while there is no soft cap (A35)."""
        scores = self.directions(vectors, scale) @ self.unembedding.T
        if self.name == "own" and self.bias is not None:
            scores += self.bias
        if self.multiplier != 1.0:
            scores *= self.multiplier
        return scores if self.name != "own" else self.cap(scores)

    @property
    def offset(self) -> Float[Tensor, " vocabulary"]:
        """The logits of no vector: what the biases of the final norm and the unembedding add (raw: the latter)."""
        total = torch.zeros(self.unembedding.shape[0], device=self.unembedding.device)
        if self.name != "raw" and self.norm is not None and self.norm.bias is not None:
            total = total + self.unembedding @ self.norm.bias.float()
        if self.bias is not None:
            total = total + self.bias
        return total * self.multiplier

    def cap(self, scores: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
        """The model's soft cap; monotone, so ranks stay and probabilities move."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


def ranks(
    logits: Float[Tensor, "*batch vocabulary"], tokens: Int[Tensor, "*batch chosen"]
) -> Int[Tensor, "*batch chosen"]:
    """0-based rank of the chosen tokens: how many tokens score higher (ties share the better rank)."""
    chosen = logits.gather(-1, tokens)
    return (logits.unsqueeze(-2) > chosen.unsqueeze(-1)).sum(-1)
