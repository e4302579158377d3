"""What only the unembedding decides of every bound: worth keeping as long as its weights stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

_TILE = 4096  # rows at once


@dataclass(frozen=True, eq=False)
class Geometry:
    """Lengths and spread of the rows U_j of an unembedding; each made when it is first asked for."""

    unembedding: Float[Tensor, "vocabulary width"]

    @cached_property
    def squares(self) -> Float[Tensor, " vocabulary"]:
        """|U_j|^2 of every token."""
        return torch.cat([rows.square().sum(-1) for rows in self.unembedding.split(_TILE)])

    @cached_property
    def longest(self) -> float:
        """max_j |U_j|."""
        return float(self.squares.max().sqrt())

    @cached_property
    def rounded(self) -> Float[Tensor, "vocabulary width"]:
        """The rows in bf16."""
        return self.unembedding.bfloat16()

    @cached_property
    def rounding(self) -> float:
        """max_j of what that loses of a row, its length."""
        pairs = zip(self.unembedding.split(_TILE), self.rounded.split(_TILE), strict=True)
        return max(float((rows - half.float()).square().sum(-1).max().sqrt()) for rows, half in pairs)

    @cached_property
    def centre(self) -> Float[Tensor, " width"]:
        """The mean row."""
        return self.unembedding.mean(0)

    @cached_property
    def off_centre(self) -> Float[Tensor, " vocabulary"]:
        """|U_j - mean U| of every token, rounded up."""
        away = self.squares - 2 * (self.unembedding @ self.centre) + self.centre.square().sum()
        return (away.clamp_min(0) + 1e-5 * self.squares).sqrt()

    @cached_property
    def scatter(self) -> Float[Tensor, "width width"]:
        """sum_j (U_j - mean U)(U_j - mean U)^T."""
        mean = self.unembedding.mean(0, dtype=torch.float64)
        total = torch.zeros(len(mean), len(mean))
        for rows in self.unembedding.split(_TILE):
            centred = rows.float() - mean.float()
            total += centred.T @ centred
        return total

    def quotient(self, directions: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
        """d^T scatter d / |d|^2: the same for every multiple of a direction, and 0 for none at all."""
        size = directions.square().sum(-1)
        return ((directions @ self.scatter) * directions).sum(-1) / size.clamp_min(1e-30)
