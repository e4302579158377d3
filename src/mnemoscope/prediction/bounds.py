"""Certified bounds of contributions from a part of the vocabulary (partial evaluations).

With S the tokens that were evaluated (none at first), T the rest, P_T its probability and mean_T, var_T over p on T,

    P_T exp(mean_T) <= sum_T p_j exp(delta_j) <= P_T exp(mean_T) (1 + var_T phi(R)),   phi(R) = (e^R - 1 - R) / R^2

by Jensen on the left and Bennett (R >= delta_j - mean_T for all j in T) on the right. ``mean_T`` is one dot product,
``var_T <= |dv|^2 sum_T p_j |U_j - mean|^2 / P_T`` and R follow from |dv|, so that the first interval costs a matrix
product with one vector per layer. When many tokens are evaluated, ``var_T <= max_T p_j dv^T (scatter of U) dv / P_T``
holds as well, and is tight where p is flat. `Bf16Vocabulary` takes T in bf16, certain up to rounding.

Where the target w has most of the probability, C is nearly 0 and both of its terms are not. There

    C = -log(1 + sum_{j != w} p_j (exp(delta_j - delta_w) - 1)),

bounded in the same way, has no term of w, and rounding is as small as 1 - p_w (`ResidualBases.rounding`).

A soft cap makes delta non-linear in v; then there are no bounds, and every vector is evaluated. Under an adaptive
softmax C is a sum over two softmaxes at most, and so are its bounds (`SummedBounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.prediction.bases import NEVER, ROUNDING, SURE, Measure, ResidualBases, log_sums, norms, runs

_NOTHING = 2e-6  # what sums over a vocabulary of probabilities in fp32 may be off
_SOME = 256  # tokens that cost about as much as how the others scatter, which is not asked with fewer
_LARGEST = 80.0  # nats: what exp still holds in fp32


class MeasureKind(NamedTuple):
    """A measure for any vectors; a base of None is each group's own."""

    base: int | None
    remove: bool

    def measure(self, group_base: Tensor) -> Measure:
        base = group_base if self.base is None else torch.full_like(group_base, self.base)
        return Measure(base, self.remove)


def kinds_of(final: int | None) -> list[MeasureKind]:
    increase = MeasureKind(None, False)
    return [increase] if final is None else [increase, MeasureKind(final, True)]


class _BoundTerms(NamedTuple):
    """Directions, and the terms that their bounds are made of."""

    moved: Tensor
    size: Tensor  # their norms
    target: Tensor  # what they add to the target's logit
    centre: Tensor  # and to the mean logit
    evaluated: Tensor  # and to the logits of the tokens that are evaluated
    scattered: Tensor | None  # dv^T scatter dv


class _Rest(NamedTuple):
    """Probabilities at one base where the target has most: the target's is left out of them."""

    evaluated: Tensor  # of the tokens that are evaluated
    mass: float  # of those that are not
    mean: Tensor  # of U over these
    spread: float  # sum over them of p_j |U_j - mean|^2, over their mass
    away: float  # |mean - mean U|


@dataclass(frozen=True, eq=False)
class PartialVocabulary:
    """Some tokens of the vocabulary, evaluated at all bases: rows and probabilities; of the others, moments of U."""

    bases: ResidualBases
    tokens: Int[Tensor, " chosen"]
    rows: Float[Tensor, "chosen width"]
    log_p: Float[Tensor, "base chosen"]
    mass: Float[Tensor, " base"]  # of the other tokens; fp64
    mean: Float[Tensor, "base width"]  # of U over them
    spread: Float[Tensor, " base"]  # sum over them of p_j |U_j - E_p U|^2; fp64
    likeliest: Float[Tensor, " base"]  # of them, its probability; fp64
    radius: float  # max over them of |U_j - mean U|
    scatter: Float[Tensor, "width width"] | None

    @classmethod
    def of(cls, bases: ResidualBases, count: int) -> PartialVocabulary:
        """The ``count`` tokens that are most probable at any base, and those furthest from the rest."""
        probable = bases.probabilities.amax(0).topk(count, sorted=False).indices
        tokens = torch.cat(
            [probable, bases.geometry.off_centre.topk(count // 4, sorted=False).indices]
        ).unique()
        rows, p = bases.lens.unembedding[tokens], bases.probabilities[:, tokens]
        others = bases.probabilities.index_fill(1, tokens, 0.0)
        mass = others.sum(-1, dtype=torch.float64)
        away = (
            bases.geometry.squares[tokens]
            - 2 * bases.mean @ rows.T
            + bases.mean.square().sum(-1, keepdim=True)
        )
        spread = bases.spread.double()
        left = (spread - (p * away).sum(-1, dtype=torch.float64)).clamp_min(0)
        rest = (bases.mean - p @ rows).double() / mass.clamp_min(_NOTHING)[:, None]
        mean = torch.where(mass[:, None] > _NOTHING, rest, bases.mean.double()).float()
        radius = float(bases.geometry.off_centre.index_fill(0, tokens, 0.0).max())
        left += _NOTHING * bases.geometry.longest**2
        log_p, likeliest = bases.log_probabilities[:, tokens], others.amax(-1).double()
        scatter = bases.geometry.scatter if count >= _SOME else None
        return cls(bases, tokens, rows, log_p, mass, mean, left, likeliest, radius, scatter)

    def intervals(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"], kinds: Sequence[MeasureKind]
    ) -> Float[Tensor, "part measure bound"]:
        """Bounds by each measure, for vectors and the rows of their own bases."""
        lens = self.bases.lens
        columns, terms = [], None
        for kind in kinds:
            rows, sign = kind.measure(base).base, -1.0 if kind.remove else 1.0
            if terms is None or not self.bases.linear:
                moved = self.bases.directions(sign * vectors, rows)
                factor = lens.multiplier if self.bases.linear else sign * lens.multiplier
                terms = self._terms(moved if factor == 1.0 else moved * factor)
            low, high = self._bounds(terms, rows, sign)
            columns.append(torch.stack((low, high) if sign > 0 else (-high, -low), -1))
        return torch.stack(columns, 1)

    def surveyed(
        self,
        vectors: Float[Tensor, "part width"],
        base: Int[Tensor, " part"],
        quotient: Float[Tensor, " part"] | None = None,
    ) -> Float[Tensor, "part 3"]:
        """Bounds of the increase, and an estimate between them.

        quotient  `Geometry.quotient` of the vectors' directions, where it is known

        The estimate takes delta over T for normal, with the mean that it has and a variance as if the rows of T
        scattered like those of all tokens, ``spread / P_T * dv^T scatter dv / tr scatter``.
        """
        moved = self.bases.directions(vectors, base) * self.bases.lens.multiplier
        quotients = self.bases.geometry.quotient(moved) if quotient is None else quotient
        terms, total = self._terms(moved, quotients), float(self.bases.geometry.scatter.trace())
        scattered = terms.size.square() * quotients / total
        row = int(base[0])
        if row in self._beside and bool((base == row).all()):
            return self._beside_target(terms, row, scattered)
        low, high = self._bounds(terms, base, 1.0)
        variance = self.spread[base] / self.mass[base].clamp_min(_NOTHING) * scattered
        rest = self.mass[base].log() + _paired(moved, self.mean, base).double() + variance / 2
        likely = terms.target - torch.logaddexp(self._inside(terms, base, 1.0), rest)
        return torch.stack([low, high, torch.minimum(torch.maximum(likely, low), high)], -1)

    def _terms(self, moved: Tensor, quotient: Tensor | None = None) -> _BoundTerms:
        """What bounds need to know of directions, whatever the base and the sign."""
        rows = torch.stack([self.bases.lens.unembedding[self.bases.target], self.bases.geometry.centre], 1)
        target, centre = (moved @ rows).double().unbind(-1)
        size, spread = norms(moved).double(), None
        if quotient is not None:
            spread = size.square() * quotient
        elif self.scatter is not None:
            spread = ((moved @ self.scatter) * moved).sum(-1).double()
        return _BoundTerms(moved, size, target, centre, moved @ self.rows.T, spread)

    def _bounds(self, terms: _BoundTerms, base: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Bounds of C for ``sign`` times the directions."""
        longest, mass, size = self.bases.geometry.longest, self.mass[base], terms.size
        delta_w, expected = sign * terms.target, sign * _paired(terms.moved, self.mean, base).double()
        inside = self._inside(terms, base, sign)
        variance = size.square() * self.spread[base]
        if terms.scattered is not None:
            flat = (terms.scattered * 1.001 + 1e-6 * size.square()) * self.likeliest[base]
            variance = torch.minimum(variance, flat)
        nothing = mass <= _NOTHING
        away = (self.mean - self.bases.geometry.centre).norm(dim=-1)[base]
        doubt = _NOTHING * size * longest / mass.clamp_min(_NOTHING)  # of mean_T, a difference of fp32 sums
        reach = size * (self.radius + away) + doubt
        bennett = expected + doubt + (variance / mass.clamp_min(_NOTHING) * _phi(reach)).log1p()
        ceiling = sign * terms.centre + size * self.radius  # of delta over T
        above = mass.log() + torch.where(nothing, ceiling, torch.minimum(bennett, ceiling))
        below = torch.where(nothing, 0.0, mass).log() + expected - doubt
        slack = self._slack(terms)
        return (
            delta_w - torch.logaddexp(inside, above) - slack,
            delta_w - torch.logaddexp(inside, below) + slack,
        )

    @cached_property
    def _beside(self) -> dict[int, _Rest]:
        """What is left beside the target and the evaluated tokens, at bases where the target has most."""
        own = (self.tokens == self.bases.target).nonzero()[:, 0]
        rows = (self.bases.elsewhere() < 1 - SURE).nonzero()[:, 0]
        if not len(own) or not len(rows):
            return {}
        geometry, p = self.bases.geometry, self.bases.probabilities[rows]
        evaluated = p[:, self.tokens].index_fill_(1, own, 0.0)
        others = p.index_fill(1, self.tokens, 0.0)
        mass = others.sum(-1, dtype=torch.float64)
        # Of the others alone: of a difference of sums little would be left.
        size = mass.clamp_min(1e-300)[:, None]
        mean = (others @ geometry.unembedding).double() / size
        squares = (others @ geometry.squares).double() / size[:, 0]
        spread = (squares - mean.square().sum(-1)).clamp_min(0) + ROUNDING * squares
        away = (mean - geometry.centre).square().sum(-1).sqrt()
        rests = zip(evaluated, mass.tolist(), mean.float(), spread.tolist(), away.tolist(), strict=True)
        return {row: _Rest(*rest) for row, rest in zip(rows.tolist(), rests, strict=True)}

    def _beside_target(self, terms: _BoundTerms, row: int, scattered: Tensor) -> Float[Tensor, "part 3"]:
        """Bounds of C and an estimate, by what vectors do to all tokens but the target."""
        rest, size = self._beside[row], terms.size
        gap = terms.evaluated - terms.target[:, None].float()
        beyond = gap.amax(-1) > _LARGEST
        inside = (gap.clamp_max_(_LARGEST).expm1_() @ rest.evaluated).double()
        expected = (terms.moved @ rest.mean).double() - terms.target
        reach = size * (self.radius + rest.away)
        variance = size.square() * rest.spread
        if terms.scattered is not None:
            flat = terms.scattered * 1.001 + 1e-6 * size.square()
            variance = torch.minimum(variance, flat * self.likeliest[row] / max(rest.mass, 1e-300))
        bennett = expected + (variance * _phi(reach)).log1p()
        ceiling = terms.centre - terms.target + size * self.radius
        changes = torch.stack(
            [torch.minimum(bennett, ceiling), expected, expected + rest.spread * scattered / 2]
        )
        low, high, likely = -(inside + rest.mass * changes.clamp_max(_LARGEST).expm1()).log1p()
        low = torch.where(beyond | (changes[0] > _LARGEST), -torch.inf, low)
        base = torch.full((len(size),), row)
        doubt = self.bases.rounding(size, base, low)
        low, high = low - doubt, high + doubt
        return torch.stack([low, high, torch.minimum(torch.maximum(likely, low), high)], -1)

    def _inside(self, terms: _BoundTerms, base: Tensor, sign: float) -> Tensor:
        """log of the sum of p_j exp(delta_j) over the tokens that are evaluated."""
        scores = terms.evaluated * sign
        for rows, row in runs(base):
            scores[rows] += self.log_p[row]
        return log_sums(scores).double()

    def _slack(self, terms: _BoundTerms) -> Tensor:
        """By how much fp32 may be off."""
        return ROUNDING * (1 + terms.size * self.bases.geometry.longest)


@dataclass(frozen=True, eq=False)
class SummedBounds:
    """Bounds under an adaptive softmax: those under each of its softmaxes, added up."""

    vocabularies: Sequence[PartialVocabulary]

    def intervals(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"], kinds: Sequence[MeasureKind]
    ) -> Float[Tensor, "part measure bound"]:
        """As `PartialVocabulary.intervals`."""
        bounds = [vocabulary.intervals(vectors, base, kinds) for vocabulary in self.vocabularies]
        return torch.stack(bounds).sum(0)

    def surveyed(
        self,
        vectors: Float[Tensor, "part width"],
        base: Int[Tensor, " part"],
        quotient: Float[Tensor, " part"] | None = None,
    ) -> Float[Tensor, "part 3"]:
        """As `PartialVocabulary.surveyed`; the quotient is not that of any one softmax."""
        return torch.stack([vocabulary.surveyed(vectors, base) for vocabulary in self.vocabularies]).sum(0)


Bounds = PartialVocabulary | SummedBounds


def bounds_of(bases: ResidualBases, count: int, *, in_bf16: bool = False) -> Bounds:
    """Bounds from so many tokens of each softmax, or from half of it; the others taken in bf16 if asked."""
    vocabularies = [
        PartialVocabulary.of(softmax, min(count, len(softmax.lens.table) // 2)) for softmax in bases.softmaxes
    ]
    if in_bf16:
        vocabularies = [Bf16Vocabulary.over(vocabulary) for vocabulary in vocabularies]
    return vocabularies[0] if len(vocabularies) == 1 else SummedBounds(vocabularies)


def _paired(
    rows: Float[Tensor, "part axis"], table: Float[Tensor, "base axis"], base: Int[Tensor, " part"]
) -> Float[Tensor, " part"]:
    """The product of each row with its base's row of a table."""
    if bool((base == base[0]).all()):
        return rows @ table[base[0]]
    return torch.einsum("pa,pa->p", rows, table[base])


def _phi(reach: Tensor) -> Tensor:
    """(e^R - 1 - R) / R^2, by its series where that cancels."""
    series = 0.5 + reach / 6 + reach.square() / 24 + reach**3 / 100
    return torch.where(reach < 1e-2, series, (reach.expm1() - reach) / reach.clamp_min(1e-30).square())


# -- A stage between bounds and values: all tokens in bf16, certain up to what rounding can do -----------------

_TILE = 4096  # tokens at once
_OUTPUT = 2.0**-8  # relative: a result rounded to bf16 (2^-9), and as much again for sums in fp32


class Bf16Vocabulary(PartialVocabulary):
    """The tokens of a `PartialVocabulary` in fp32, the others in bf16, whose products cost a third where native.

    Rounding moves the logit of a token by at most ``|dv| |U_j - U_j'| + |dv - dv'| |U_j'|`` and what the result loses,
    and ``log sum_T p_j exp(delta_j)`` by no more than the largest of these.
    """

    @classmethod
    def over(cls, exact: PartialVocabulary) -> Bf16Vocabulary:
        """The same tokens in fp32; how the others scatter is not asked any more."""
        return cls(**{field.name: getattr(exact, field.name) for field in fields(exact)} | {"scatter": None})

    @cached_property
    def _others(self) -> Float[Tensor, "base vocabulary"]:
        """Log-probabilities of the tokens that are not evaluated in fp32."""
        return self.bases.log_probabilities.index_fill(1, self.tokens, NEVER)

    def _bounds(self, terms: _BoundTerms, base: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        delta_w = sign * terms.target
        inside, rest = self._inside(terms, base, sign), self._rest(terms.moved, base, sign)
        doubt, slack = self._doubt(terms), self._slack(terms)
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
            for rows, row in runs(base):
                scores[rows] += self._others[row, tokens]
            sums.append(log_sums(scores))
        return torch.stack(sums, -1).double().logsumexp(-1)

    def _doubt(self, terms: _BoundTerms) -> Tensor:
        """By how much rounding may move a logit."""
        geometry = self.bases.geometry
        lost = (terms.moved - terms.moved.bfloat16().float()).square().sum(-1).sqrt().double()
        longest = geometry.longest + geometry.rounding
        return terms.size * (geometry.rounding + _OUTPUT * longest) + lost * longest
