"""What vectors do to the log-probability of one token, exactly, and the largest of them without evaluating all.

With x fixed, adding v moves the logits by ``delta`` and the log-probability of the target w by

    C(v) = log p(w | x + v) - log p(w | x) = delta_w - log sum_j p_j exp(delta_j),   p = p(. | x)

(Yu et al. 2023, Eq. 19; A38, A39). Under every lens ``delta = multiplier * U dv`` for a direction ``dv``: v after the
lens's norm (raw, frozen), or what v changes in the normalised x (own). Hence one set of bounds for the three lenses.
With S the tokens that were evaluated (none at first), T the rest, P_T its probability and mean_T, var_T over p on T,

    P_T exp(mean_T) <= sum_T p_j exp(delta_j) <= P_T exp(mean_T) (1 + var_T phi(R)),   phi(R) = (e^R - 1 - R) / R^2

by Jensen on the left and Bennett (R >= delta_j - mean_T for all j in T) on the right. ``mean_T`` is one dot product,
``var_T <= |dv|^2 sum_T p_j |U_j - mean|^2 / P_T`` and R follow from |dv|, so that the first interval costs a matrix
product with one vector per layer. `search` keeps what can still be among the k largest or k smallest, evaluates it on
more and more tokens in the order of p, and what is left on all of them.

A soft cap makes delta non-linear in v; then every vector is evaluated (`search` does so by itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemoscope.lens import Lens

STAGES = (256, 2048)  # tokens evaluated before everything is
_TILE = 4096  # tokens at once in an exact evaluation: logits stay near the cache
_ROWS = 1024  # vectors at once
_SMALL = 20.0  # below this |delta| exp(delta) is safe in fp32
_NOTHING = 1e-6  # probability that fp32 sums over a vocabulary cannot tell from none
_SLACK = 4e-6  # what fp32 may be off, relative to the size of delta: intervals are widened by it


@dataclass(frozen=True, eq=False)
class Bases:
    """Residuals to which vectors are added, read by a lens; one row each.

    target     the token whose log-probability is followed
    residuals  Float[Tensor, "base width"]
    scale      of the reference residual (frozen lens only)
    """

    lens: Lens
    target: int
    residuals: Float[Tensor, "base width"]
    scale: Float[Tensor, " 1"] | None

    @cached_property
    def raw_logits(self) -> Float[Tensor, "base vocabulary"]:
        """Logits before a soft cap, all biases included."""
        return raw_logits(self.lens, self.residuals, self.scale)

    @cached_property
    def log_probabilities(self) -> Float[Tensor, "base vocabulary"]:
        """Under the lens, in nats."""
        return self.lens.cap(self.raw_logits).log_softmax(-1)

    @cached_property
    def probabilities(self) -> Float[Tensor, "base vocabulary"]:
        """Under the lens."""
        return self.log_probabilities.exp()

    @cached_property
    def mean(self) -> Float[Tensor, "base width"]:
        """The expected row of the unembedding, E_p[U]."""
        return self.probabilities @ self.lens.unembedding

    @cached_property
    def row_squares(self) -> Float[Tensor, " vocabulary"]:
        """|U_j|^2 of every token."""
        return self.lens.unembedding.square().sum(-1)

    @cached_property
    def spread(self) -> Float[Tensor, " base"]:
        """E_p |U_j - E_p U|^2."""
        return (self.probabilities @ self.row_squares - self.mean.square().sum(-1)).clamp_min(0)

    @cached_property
    def longest(self) -> float:
        """max_j |U_j|."""
        return float(self.row_squares.max().sqrt())

    def directions(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, "part width"]:
        """dv: what each vector, added to its base, changes in what the unembedding reads."""
        lens = self.lens
        if lens.name != "own" or lens.norm is None:
            return lens.directions(vectors, self.scale)
        # n(x + v) - n(x) without cancellation: (r' - r) x + r' v with r' - r from the difference of the squares.
        norm, x, v = lens.norm, self.residuals[base].float(), vectors.float()
        if norm.kind == "layer":
            x, v = x - x.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        before = x.double().square().mean(-1, keepdim=True) + norm.eps
        more = ((2 * x + v).double() * v.double()).mean(-1, keepdim=True)
        old, new = before.rsqrt(), (before + more).clamp_min(norm.eps).rsqrt()
        change = -more * old.square() * new.square() / (old + new)
        moved = change.float() * x + new.float() * v
        return moved if norm.weight is None else moved * norm.weight.float()

    def contributions(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, " part"]:
        """C of each vector added to its base, exactly: through the whole vocabulary, in tiles; fp64, nats."""
        return self.measured(vectors, [Measure(base, False)])[:, 0]

    def measured(
        self, vectors: Float[Tensor, "part width"], measures: Sequence[Measure]
    ) -> Float[Tensor, "part measure"]:
        """Several measures of the same vectors; under a linear lens their logits are made once."""
        out = torch.empty(len(vectors), len(measures), dtype=torch.float64)
        for rows in torch.arange(len(vectors)).split(_ROWS):
            some = [Measure(one.base[rows], one.remove) for one in measures]
            if self.linear:
                out[rows] = self._exact(self.lens.directions(vectors[rows], self.scale), some)
                continue
            for column, one in enumerate(some):
                moved = one.sign * self.directions(one.sign * vectors[rows], one.base)
                out[rows, column] = self._exact(moved, [one])[:, 0]
        return out

    @property
    def linear(self) -> bool:
        """Whether directions do not depend on the base: raw and frozen."""
        return self.lens.name != "own" or self.lens.norm is None

    def odds(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"], tokens: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "part chosen"]:
        """How much each (capped) logit of a few tokens moves when a vector is added to its base; fp64."""
        rows = self.lens.unembedding[tokens]
        delta = (self.directions(vectors, base) @ rows.T * self.lens.multiplier).double()
        if self.lens.softcap is None:
            return delta
        before = self.raw_logits[:, tokens][base].double()
        return self.lens.cap(before + delta) - self.lens.cap(before)

    def _exact(self, moved: Tensor, measures: Sequence[Measure]) -> Tensor:
        """From directions: small moves by expm1 and log1p, large ones by a running log-sum-exp in fp64."""
        rows, size = len(moved), self.lens.unembedding.shape[0]
        large = moved.norm(dim=-1) * self.longest * abs(self.lens.multiplier) > _SMALL
        near = torch.zeros(rows, len(measures), dtype=torch.float64)
        far = torch.full((rows, len(measures)), -math.inf, dtype=torch.float64)
        for start in range(0, size, _TILE):
            tokens = slice(start, start + _TILE)
            plain = moved @ self.lens.unembedding[tokens].T * self.lens.multiplier
            for column, one in enumerate(measures):
                delta = self._capped(plain * one.sign, one.base, tokens)
                if large.any():
                    scores = delta[large].double() + self.log_probabilities[one.base[large], tokens]
                    far[large, column] = torch.logaddexp(far[large, column], scores.logsumexp(-1))
                    delta = delta.clamp(-_SMALL, _SMALL)
                weights = self.probabilities[one.base, tokens]
                near[:, column] += torch.einsum("pv,pv->p", delta.expm1_(), weights).double()
        row = self.lens.unembedding[self.target]
        wanted = (moved.double() @ row.double() * self.lens.multiplier)[:, None]
        sums = torch.where(large[:, None], far, near.log1p())
        for column, one in enumerate(measures):
            target = slice(self.target, self.target + 1)
            delta_w = self._capped(wanted * one.sign, one.base, target)[:, 0]
            sums[:, column] = one.sign * (delta_w - sums[:, column])
        return sums

    def _capped(self, delta: Tensor, base: Tensor, tokens: slice) -> Tensor:
        """What logits move under the soft cap, if there is one, when they would move by ``delta`` without."""
        if self.lens.softcap is None:
            return delta
        before = self.raw_logits[:, tokens][base].to(delta.dtype)
        return self.lens.cap(before + delta) - self.lens.cap(before)


@dataclass(frozen=True, eq=False)
class Measure:
    """What is asked of a vector: C at a base, or the loss when it is taken from one.

    base    row of `Bases` for each vector
    remove  ``log p(w | x) - log p(w | x - v)``, which is -C(-v), instead of C(v)
    """

    base: Int[Tensor, " part"]
    remove: bool

    @property
    def sign(self) -> float:
        """-1 when vectors are removed."""
        return -1.0 if self.remove else 1.0


def raw_logits(
    lens: Lens, residuals: Float[Tensor, "base width"], scale: Float[Tensor, " 1"] | None
) -> Float[Tensor, "base vocabulary"]:
    """Logits of residuals before a soft cap, with the biases of the final norm and the unembedding."""
    scores = lens.directions(residuals, scale) @ lens.unembedding.T
    if lens.name == "own":
        scores = scores if lens.bias is None else scores + lens.bias
        return scores * lens.multiplier
    return scores * lens.multiplier + lens.offset


@dataclass(frozen=True)
class Group:
    """Parts that are added to the same residual, made when they are needed.

    size     how many there are
    base     the row of `Bases` that they are added to
    vectors  all of them, or those with the given indices: Float[Tensor, "part width"]
    """

    size: int
    base: int
    vectors: Callable[[Int[Tensor, " part"] | None], Float[Tensor, "part width"]]


@dataclass(frozen=True)
class Found:
    """What a search found, sorted by group and index: everything among the k largest or smallest by any measure.

    group, index  where each is
    values  Float[Tensor, "found measure"], exact, nats: contribution, and leave_one_out if it was asked for
    full    how many vectors were taken through the whole vocabulary, of how many
    partly  what the other evaluations cost, in whole vocabularies
    """

    group: Int[Tensor, " found"]
    index: Int[Tensor, " found"]
    values: Float[Tensor, "found measure"]
    full: int
    of: int
    partly: float


def search(bases: Bases, groups: Sequence[Group], k: int, *, final: int | None = None) -> Found:
    """The k largest and the k smallest over all groups, exactly: equal to `exhaustive` and a sort.

    By contribution, and if the row ``final`` of the bases is given also by leave-one-out there. Ties at the k-th place
    are decided by (group, index).
    """
    kinds = [_Kind(None, False)] if final is None else [_Kind(None, False), _Kind(final, True)]
    sizes = [one.size for one in groups]
    places = _Places(
        torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes)),
        torch.cat([torch.arange(size) for size in sizes]),
    )
    partly, vocabulary = 0.0, bases.lens.unembedding.shape[0]
    if bases.lens.softcap is None:
        for count in (0, *STAGES):
            if 2 * count > vocabulary or len(places.group) <= 2 * k:
                break
            partly += len(places.group) * count / vocabulary
            places = places.keep(_open(_intervals(bases, groups, places, count, kinds), k))
    vectors, base = places.vectors(groups)
    values = bases.measured(vectors, [one.measure(base) for one in kinds])
    chosen = torch.stack([_extreme(values[:, column], k) for column in range(len(kinds))]).any(0)
    return Found(places.group[chosen], places.index[chosen], values[chosen], len(values), sum(sizes), partly)


def exhaustive(bases: Bases, group: Group, *, final: int | None = None) -> Float[Tensor, "part measure"]:
    """Every part of a group by the measures of `search` (A39, A47), in tiles; nats."""
    base = torch.full((group.size,), group.base)
    kinds = [_Kind(None, False)] if final is None else [_Kind(None, False), _Kind(final, True)]
    return bases.measured(group.vectors(None), [one.measure(base) for one in kinds])


def shared(contributions: Float[Tensor, " part"], total: float) -> Float[Tensor, " part"]:
    """The contribution of a sum shared among its parts (A41), helpful and unhelpful apart.

    The paper scales every C_i by C(sum) / sum C_i, which is unstable when contributions of both signs cancel. Here the
    side that is too large (the helpful when sum C_i > C(sum), else the unhelpful) is scaled down and the other kept,
    so that signs stay and shares add up to `total`; where a side would have to change its sign for that, the other
    side is scaled up. Zero contributions get nothing; with no contribution at all the total is shared equally.
    """
    up, down = contributions.clamp_min(0), contributions.clamp_max(0)
    if not bool(contributions.any()):
        return torch.full_like(contributions, total / max(len(contributions), 1))
    excess = float(contributions.sum()) - total
    shrink, keep = (up, down) if excess > 0 else (down, up)
    wanted = total - float(keep.sum())
    if float(shrink.sum()) != 0 and wanted / float(shrink.sum()) >= 0:
        return keep + shrink * (wanted / float(shrink.sum()))
    wanted = total - float(shrink.sum())
    if float(keep.sum()) != 0 and wanted / float(keep.sum()) >= 0:
        return shrink + keep * (wanted / float(keep.sum()))
    # Only one sign is there and the total has the other: the paper's rule is all that is left.
    return contributions * (total / float(contributions.sum()))


class _Kind(NamedTuple):
    """A measure before it is known of which vectors; a base of None is each group's own."""

    base: int | None
    remove: bool

    def measure(self, own: Tensor) -> Measure:
        return Measure(own if self.base is None else torch.full_like(own, self.base), self.remove)


@dataclass(frozen=True)
class _Places:
    """Parts that are still in the running, sorted by group."""

    group: Tensor
    index: Tensor

    def keep(self, mask: Bool[Tensor, " part"]) -> _Places:
        return _Places(self.group[mask], self.index[mask])

    def by_group(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor]]:
        """Each group with its vectors, in order."""
        for row, count in zip(*self.group.unique(return_counts=True), strict=True):
            group = groups[int(row)]
            all_of_it = int(count) == group.size
            yield group, group.vectors(None if all_of_it else self.index[self.group == row])

    def vectors(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """The vectors of all places, in order, and the bases they are added to."""
        base = torch.tensor([one.base for one in groups])[self.group]
        return torch.cat([vectors for _, vectors in self.by_group(groups)]), base


def _extreme(values: Float[Tensor, " part"], k: int) -> Bool[Tensor, " part"]:
    """The k largest and the k smallest; a tie goes to what comes first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[torch.argsort(-values, stable=True)[:k]] = True
    chosen[torch.argsort(values, stable=True)[:k]] = True
    return chosen


def _open(intervals: Float[Tensor, "part measure bound"], k: int) -> Bool[Tensor, " part"]:
    """What can still be among the k largest or the k smallest by any measure."""
    low, high = intervals.unbind(-1)
    largest, smallest = low.topk(k, dim=0).values[-1], high.topk(k, dim=0, largest=False).values[-1]
    return ((high >= largest) | (low <= smallest)).any(-1)


def _intervals(
    bases: Bases, groups: Sequence[Group], places: _Places, count: int, kinds: Sequence[_Kind]
) -> Float[Tensor, "part measure bound"]:
    """Certified bounds of every measure, with the ``count`` most probable tokens of each base evaluated."""
    seen: dict[int, _Seen] = {}
    found = []
    for group, vectors in places.by_group(groups):
        columns = []
        moved = bases.lens.directions(vectors, bases.scale) if bases.linear else None
        norms = None if moved is None else moved.norm(dim=-1)
        for kind in kinds:
            row = group.base if kind.base is None else kind.base
            base = torch.full((len(vectors),), row)
            if row not in seen:
                seen[row] = _Seen.of(bases, row, count)
            sign = -1.0 if kind.remove else 1.0
            if moved is None or norms is None:
                own = bases.directions(sign * vectors, base)
                low, high = seen[row].interval(own, own.norm(dim=-1), 1.0)
            else:
                low, high = seen[row].interval(moved, norms, sign)
            columns.append(torch.stack((low, high) if sign > 0 else (-high, -low), -1))
        found.append(torch.stack(columns, 1))
    return torch.cat(found)


@dataclass(frozen=True, eq=False)
class _Seen:
    """One base with some tokens evaluated: their rows and probabilities, and moments of U over the others."""

    bases: Bases
    rows: Float[Tensor, "chosen width"]
    p: Float[Tensor, " chosen"]  # fp64
    mass: float  # of the other tokens
    mean: Float[Tensor, " width"]
    spread: float  # sum over the others of p_j |U_j - E_p U|^2

    @classmethod
    def of(cls, bases: Bases, base: int, count: int) -> _Seen:
        """With the ``count`` most probable tokens evaluated."""
        mean, spread, every = bases.mean[base].double(), float(bases.spread[base]), bases.probabilities[base]
        tokens = every.topk(count, sorted=False).indices
        rows, p = bases.lens.unembedding[tokens], every[tokens].double()
        mass = max(1.0 - float(p.sum()), 0.0)
        away = bases.row_squares[tokens] - 2 * (rows @ bases.mean[base]) + mean.square().sum().float()
        left = max(spread - float(p @ away.double()), 0.0) + 2e-6 * spread  # fp32 sums over the vocabulary
        rest = (mean - (p.float() @ rows).double()) / mass if mass > _NOTHING else mean
        return cls(bases, rows, p, mass, rest.float(), left)

    def interval(
        self, moved: Float[Tensor, "part width"], norms: Float[Tensor, " part"], sign: float
    ) -> tuple[Float[Tensor, " part"], Float[Tensor, " part"]]:
        """Certified bounds of C for ``sign`` times each direction, whose norms are given; fp64."""
        lens, longest = self.bases.lens, self.bases.longest
        size = norms.double() * abs(lens.multiplier)
        both = torch.stack([lens.unembedding[self.bases.target], self.mean], 1)
        delta_w, expected = (moved @ both * (sign * lens.multiplier)).double().unbind(-1)
        inside = torch.zeros_like(size)
        if len(self.p):
            inside = (moved @ self.rows.T * (sign * lens.multiplier)).double().exp_() @ self.p
        slack = _SLACK * (1 + size * longest)
        if self.mass <= _NOTHING:
            tail_low, tail_high = torch.zeros_like(size), 2 * _NOTHING * (size * longest).exp()
        else:
            reach = size * (longest + float(self.mean.norm()))
            tail_low = self.mass * expected.exp()
            tail_high = tail_low * (1 + size.square() * (self.spread / self.mass) * _phi(reach))
        low = delta_w - (inside + tail_high).log() - slack
        return low.nan_to_num(nan=-math.inf), delta_w - (inside + tail_low).log() + slack


def _phi(reach: Tensor) -> Tensor:
    """(e^R - 1 - R) / R^2, by its series where that cancels."""
    series = 0.5 + reach / 6 + reach.square() / 24 + reach**3 / 100
    return torch.where(reach < 1e-2, series, (reach.expm1() - reach) / reach.clamp_min(1e-30).square())
