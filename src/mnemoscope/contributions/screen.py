"""A stage between bounds and values: all tokens in bf16, certain up to what rounding can do."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mnemoscope.contributions.bases import NEVER, log_sums, runs
from mnemoscope.contributions.bounds import Parts, Seen

_TILE = 4096  # tokens at once
_OUTPUT = 2.0**-8  # relative: a result rounded to bf16 (2^-9), and as much again for sums in fp32


class Screen(Seen):
    """All bases; the tokens of `Seen` in fp32, the others in bf16, whose products cost a third of fp32's where native.

    Rounding moves the logit of a token by at most ``|dv| |U_j - U_j'| + |dv - dv'| |U_j'|`` and what the result loses,
    and ``log sum_T p_j exp(delta_j)`` by no more than the largest of these.
    """

    @classmethod
    def over(cls, seen: Seen) -> Screen:
        """The same tokens in fp32; how the others scatter is not asked any more."""
        return cls(**{field.name: getattr(seen, field.name) for field in fields(seen)} | {"scatter": None})

    @cached_property
    def _others(self) -> Float[Tensor, "base vocabulary"]:
        """Log-probabilities of the tokens that are not seen."""
        return self.bases.log_probabilities.index_fill(1, self.tokens, NEVER)

    def _bounds(self, parts: Parts, base: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        delta_w = sign * parts.target
        inside, rest = self._inside(parts, base, sign), self._rest(parts.moved, base, sign)
        doubt, slack = self._doubt(parts), self._slack(parts)
        return (
            delta_w - torch.logaddexp(inside, rest + doubt) - slack,
            delta_w - torch.logaddexp(inside, rest - doubt) + slack,
        )

    def _rest(self, moved: Tensor, base: Tensor, sign: float) -> Tensor:
        """log sum_T p_j exp(delta_j) for ``sign`` times the directions, rounded."""
        table, half = self.bases.geometry.rounded, moved.bfloat16()
        sums = []
        for start in range(0, len(table), _TILE):
            tokens = slice(start, start + _TILE)
            scores = (half @ table[tokens].T).float().mul_(sign)
            for rows, one in runs(base):
                scores[rows] += self._others[one, tokens]
            sums.append(log_sums(scores))
        return torch.stack(sums, -1).double().logsumexp(-1)

    def _doubt(self, parts: Parts) -> Tensor:
        """By how much rounding may move a logit."""
        geometry = self.bases.geometry
        lost = (parts.moved - parts.moved.bfloat16().float()).square().sum(-1).sqrt().double()
        longest = geometry.longest + geometry.rounding
        return parts.size * (geometry.rounding + _OUTPUT * longest) + lost * longest
