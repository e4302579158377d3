"""What vectors do to the log-probability of one token, exactly, and the largest of them without evaluating all.

With x fixed, adding v moves the logits by ``delta`` and the log-probability of the target w by

    C(v) = log p(w | x + v) - log p(w | x) = delta_w - log sum_j p_j exp(delta_j),   p = p(. | x)

(Yu et al. 2023, Eq. 19; A38, A39). Under every lens ``delta = multiplier * U dv`` for a direction ``dv``: v after the
lens's norm (raw, frozen), or what v changes in the normalised x (own). Hence one set of bounds for the three lenses.
With S the tokens that were evaluated (none at first), T the rest, P_T its probability and mean_T, var_T over p on T,

    P_T exp(mean_T) <= sum_T p_j exp(delta_j) <= P_T exp(mean_T) (1 + var_T phi(R)),   phi(R) = (e^R - 1 - R) / R^2

by Jensen on the left and Bennett (R >= delta_j - mean_T for all j in T) on the right. ``mean_T`` is one dot product,
``var_T <= |dv|^2 sum_T p_j |U_j - mean|^2 / P_T`` and R follow from |dv|, so that the first interval costs a matrix
product with one vector per layer. `search` keeps what can still be among the k largest or k smallest and evaluates it
on more and more tokens, the most probable first; then ``var_T <= max_T p_j dv^T (scatter of U) dv / P_T`` holds as
well, and is tight where p is flat. What is left is evaluated on all tokens.

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
_SMALL = 40.0  # |delta| up to which exp(delta) and p exp(delta) are safe in fp32
_GONE = -0.9  # a change of the sum of probabilities after which fp32 has lost a digit of what is left
_NOTHING = 2e-6  # what sums over a vocabulary of probabilities in fp32 may be off
_SLACK = 4e-6  # what fp32 may be off, relative to the size of delta: intervals are widened by it


@dataclass(frozen=True, eq=False)
class Bases:
    """Residuals to which vectors are added, read by a lens; one row each.

    target     the token whose log-probability is followed
    residuals  Float[Tensor, "base width"]
    scale      of the reference residual (frozen lens only)
    scatter    `scatter` of the unembedding, when it is at hand
    """

    lens: Lens
    target: int
    residuals: Float[Tensor, "base width"]
    scale: Float[Tensor, " 1"] | None
    scatter: Float[Tensor, "width width"] | None = None

    @cached_property
    def raw_logits(self) -> Float[Tensor, "base vocabulary"]:
        """Logits before a soft cap, all biases included."""
        return raw_logits(self.lens, self.residuals, self.scale)

    @cached_property
    def log_probabilities(self) -> Float[Tensor, "base vocabulary"]:
        """Under the lens, in nats; fp32, normalised in fp64."""
        logits = self.lens.cap(self.raw_logits)
        most = logits.amax(-1, keepdim=True)
        rest = (logits - most).exp().sum(-1, dtype=torch.float64, keepdim=True).log()
        return (logits - most) - rest.float()

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
    def centre(self) -> Float[Tensor, " width"]:
        """The mean row of the unembedding."""
        return self.lens.unembedding.mean(0)

    @cached_property
    def off_centre(self) -> Float[Tensor, " vocabulary"]:
        """|U_j - mean U| of every token."""
        away = self.row_squares - 2 * (self.lens.unembedding @ self.centre) + self.centre.square().sum()
        return (away.clamp_min(0) + 1e-5 * self.row_squares).sqrt()

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
            return linear_directions(lens, vectors, self.scale)
        # n(x + v) - n(x) without cancellation: (r' - r) x + r' v with r' - r from the difference of the squares.
        norm, v = lens.norm, vectors.float()
        x = self.residuals[base[:1] if bool((base == base[0]).all()) else base].float()
        if norm.kind == "layer":
            x, v = x - x.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        before = x.double().square().mean(-1, keepdim=True) + norm.eps
        more = torch.add(v, x, alpha=2).mul_(v).sum(-1, keepdim=True, dtype=torch.float64) / v.shape[-1]
        old, new = before.rsqrt(), (before + more).clamp_min(norm.eps).rsqrt()
        change = -more * old.square() * new.square() / (old + new)
        moved = (v * new.float()).addcmul_(change.float(), x)
        return moved if norm.weight is None else moved.mul_(norm.weight.float())

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
            some = [one.rows(rows) for one in measures]
            if self.linear:
                out[rows] = self._exact(linear_directions(self.lens, vectors[rows], self.scale), some)
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
        """From directions: ``delta_w - log sum p exp(delta)`` by each measure."""
        wide = _norms(moved) * self.longest * abs(self.lens.multiplier) > _SMALL
        sums = torch.zeros(len(moved), len(measures), dtype=torch.float64)
        near = (~wide).nonzero()[:, 0]
        change = self._changes(moved[near], [one.rows(near) for one in measures])
        sums[near] = change.clamp_min(_GONE).log1p()
        # Where most of the probability went elsewhere, 1 + change has lost its digits.
        wide[near] = (change < _GONE).any(-1)
        far = wide.nonzero()[:, 0]
        sums[far] = self._log_sums(moved[far], [one.rows(far) for one in measures])
        row = self.lens.unembedding[self.target].double()
        wanted = (moved.double() @ row * self.lens.multiplier)[:, None]
        target = slice(self.target, self.target + 1)
        for column, one in enumerate(measures):
            delta_w = self._capped(wanted * one.sign, one.base, target)[:, 0]
            sums[:, column] = one.sign * (delta_w - sums[:, column])
        return sums

    def _changes(self, moved: Tensor, measures: Sequence[Measure]) -> Tensor:
        """sum_j p_j (exp(delta_j) - 1), for moves of which no delta is large."""
        total = torch.zeros(len(moved), len(measures), dtype=torch.float64)
        for tokens, plain in self._tiles(moved):
            for column, one in enumerate(measures):
                delta = self._capped(plain * one.sign, one.base, tokens)
                # Not einsum: its sums run through thousands of terms one by one, and lose two digits.
                products = delta.expm1_().mul_(self.probabilities[one.base, tokens])
                total[:, column] += products.sum(-1)
        return total

    def _log_sums(self, moved: Tensor, measures: Sequence[Measure]) -> Tensor:
        """log sum_j p_j exp(delta_j), in fp64, for any move."""
        total = torch.full((len(moved), len(measures)), -math.inf, dtype=torch.float64)
        for tokens, plain in self._tiles(moved) if len(moved) else ():
            for column, one in enumerate(measures):
                delta = self._capped(plain.double() * one.sign, one.base, tokens)
                scores = delta + self.log_probabilities[one.base, tokens]
                total[:, column] = torch.logaddexp(total[:, column], scores.logsumexp(-1))
        return total

    def _tiles(self, moved: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What the logits of some tokens after others move, before a soft cap."""
        for start in range(0, self.lens.unembedding.shape[0], _TILE):
            tokens = slice(start, start + _TILE)
            plain = moved @ self.lens.unembedding[tokens].T
            yield tokens, plain if self.lens.multiplier == 1.0 else plain * self.lens.multiplier

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

    def rows(self, index: Int[Tensor, " chosen"]) -> Measure:
        """The same for some of the vectors."""
        return Measure(self.base[index], self.remove)

    @property
    def sign(self) -> float:
        """-1 when vectors are removed."""
        return -1.0 if self.remove else 1.0


def linear_directions(
    lens: Lens, vectors: Float[Tensor, "row width"], scale: Float[Tensor, " 1"] | None
) -> Float[Tensor, "row width"]:
    """`Lens.directions` with one scale for all rows."""
    return lens.directions(vectors, None if scale is None else scale.expand(len(vectors), 1))


def scatter(unembedding: Float[Tensor, "vocabulary width"]) -> Float[Tensor, "width width"]:
    """sum_j (U_j - mean U)(U_j - mean U)^T: width x width numbers of the weights alone, worth keeping."""
    mean = unembedding.mean(0, dtype=torch.float64)
    total = torch.zeros(len(mean), len(mean))
    for rows in unembedding.split(_TILE):
        centred = rows.float() - mean.float()
        total += centred.T @ centred
    return total


def raw_logits(
    lens: Lens, residuals: Float[Tensor, "base width"], scale: Float[Tensor, " 1"] | None
) -> Float[Tensor, "base vocabulary"]:
    """Logits of residuals before a soft cap, with the biases of the final norm and the unembedding."""
    scores = linear_directions(lens, residuals, scale) @ lens.unembedding.T
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
class League:
    """Parts that are ranked together: the k largest and k smallest of all groups are wanted."""

    groups: Sequence[Group]
    k: int


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


def search(bases: Bases, leagues: Sequence[League], *, final: int | None = None) -> list[Found]:
    """The k largest and the k smallest of each league, exactly: equal to `exhaustive` and a sort.

    By contribution, and if the row ``final`` of the bases is given also by leave-one-out there. Ties at the k-th place
    are decided by (group, index).
    """
    kinds = _kinds(final)
    groups = [group for league in leagues for group in league.groups]
    places = _Places.all_of(leagues)
    sizes = places.league.bincount(minlength=len(leagues))
    partly, vocabulary = torch.zeros(len(leagues)), bases.lens.unembedding.shape[0]
    if bases.lens.softcap is None:
        for count in (0, *STAGES):
            if 2 * count > vocabulary:
                break
            partly += places.league.bincount(minlength=len(leagues)) * (count / vocabulary)
            seen = _Seen.of(bases, count)
            places = places.keep(_open(_intervals(seen, groups, places, kinds), places.league, leagues))
    vectors, base = places.vectors(groups)
    values = bases.measured(vectors, [one.measure(base) for one in kinds])
    found, first = [], 0
    for number, league in enumerate(leagues):
        here = (places.league == number).nonzero()[:, 0]
        some = values[here]
        best = torch.stack([_extreme(some[:, column], league.k) for column in range(len(kinds))]).any(0)
        rows, size = here[best], int(sizes[number])
        group, index = places.group[rows] - first, places.index[rows]
        found.append(Found(group, index, some[best], len(here), size, float(partly[number])))
        first += len(league.groups)
    return found


def exhaustive(bases: Bases, group: Group, *, final: int | None = None) -> Float[Tensor, "part measure"]:
    """Every part of a group by the measures of `search` (A39, A47), in tiles; nats."""
    base = torch.full((group.size,), group.base)
    return bases.measured(group.vectors(None), [one.measure(base) for one in _kinds(final)])


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


def _kinds(final: int | None) -> list[_Kind]:
    return [_Kind(None, False)] if final is None else [_Kind(None, False), _Kind(final, True)]


@dataclass(frozen=True)
class _Places:
    """Parts that are still in the running, sorted by group; groups are counted through all leagues."""

    league: Tensor
    group: Tensor
    index: Tensor

    @classmethod
    def all_of(cls, leagues: Sequence[League]) -> _Places:
        sizes = [group.size for league in leagues for group in league.groups]
        owners = [number for number, league in enumerate(leagues) for _ in league.groups]
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        return cls(torch.tensor(owners)[group], group, torch.cat([torch.arange(size) for size in sizes]))

    def keep(self, mask: Bool[Tensor, " part"]) -> _Places:
        return _Places(self.league[mask], self.group[mask], self.index[mask])

    def by_group(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor]]:
        """Each group with its vectors, in order."""
        rows, counts = self.group.unique_consecutive(return_counts=True)
        for row, index in zip(rows.tolist(), self.index.split(counts.tolist()), strict=True):
            group = groups[row]
            yield group, group.vectors(None if len(index) == group.size else index)

    def chunks(self, groups: Sequence[Group]) -> Iterator[tuple[Tensor, Tensor]]:
        """Vectors and the bases they are added to, in order: large groups alone, small ones together."""
        held: list[tuple[Group, Tensor]] = []
        for group, vectors in self.by_group(groups):
            if held and (len(vectors) >= _ROWS or sum(len(one) for _, one in held) >= _ROWS):
                yield _joined(held)
                held = []
            held.append((group, vectors))
        if held:
            yield _joined(held)

    def vectors(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """The vectors of all places, in order, and the bases they are added to."""
        return _joined(list(self.by_group(groups)))


def _joined(parts: Sequence[tuple[Group, Tensor]]) -> tuple[Tensor, Tensor]:
    base = [torch.full((len(vectors),), group.base) for group, vectors in parts]
    vectors = [vectors for _, vectors in parts]
    return (vectors[0] if len(vectors) == 1 else torch.cat(vectors)), torch.cat(base)


def _extreme(values: Float[Tensor, " part"], k: int) -> Bool[Tensor, " part"]:
    """The k largest and the k smallest; a tie goes to what comes first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[torch.argsort(-values, stable=True)[:k]] = True
    chosen[torch.argsort(values, stable=True)[:k]] = True
    return chosen


def _open(
    intervals: Float[Tensor, "part measure bound"], league: Int[Tensor, " part"], leagues: Sequence[League]
) -> Bool[Tensor, " part"]:
    """What can still be among the k largest or the k smallest of its league by any measure."""
    still = torch.ones(len(league), dtype=torch.bool)
    for number, one in enumerate(leagues):
        here = league == number
        if int(here.sum()) <= one.k:
            continue
        low, high = intervals[here].unbind(-1)
        largest = low.topk(one.k, dim=0).values[-1]
        smallest = high.topk(one.k, dim=0, largest=False).values[-1]
        still[here] = ((high >= largest) | (low <= smallest)).any(-1)
    return still


def _intervals(
    seen: _Seen, groups: Sequence[Group], places: _Places, kinds: Sequence[_Kind]
) -> Float[Tensor, "part measure bound"]:
    """Certified bounds of every measure for all places."""
    chunks = places.chunks(groups)
    return torch.cat([seen.intervals(vectors, base, kinds) for vectors, base in chunks])


class _Parts(NamedTuple):
    """Directions, and what their bounds are made of."""

    moved: Tensor
    size: Tensor  # their norms
    target: Tensor  # what they add to the target's logit
    centre: Tensor  # and to the mean logit
    seen: Tensor  # and to those of the tokens that are evaluated
    scattered: Tensor | None  # dv^T scatter dv


@dataclass(frozen=True, eq=False)
class _Seen:
    """All bases with some tokens evaluated: their rows and probabilities, and moments of U over the others."""

    bases: Bases
    rows: Float[Tensor, "chosen width"]
    log_p: Float[Tensor, "base chosen"]
    mass: Float[Tensor, " base"]  # of the other tokens; fp64
    mean: Float[Tensor, "base width"]  # of U over them
    spread: Float[Tensor, " base"]  # sum over them of p_j |U_j - E_p U|^2; fp64
    likeliest: Float[Tensor, " base"]  # of them, its probability; fp64
    radius: float  # max over them of |U_j - mean U|
    scatter: Float[Tensor, "width width"] | None

    @classmethod
    def of(cls, bases: Bases, count: int) -> _Seen:
        """With the ``count`` tokens evaluated that are most probable at any base, and those furthest from the rest."""
        probable = bases.probabilities.amax(0).topk(count, sorted=False).indices
        tokens = torch.cat([probable, bases.off_centre.topk(count // 4, sorted=False).indices]).unique()
        rows, p = bases.lens.unembedding[tokens], bases.probabilities[:, tokens]
        others = bases.probabilities.index_fill(1, tokens, 0.0)
        mass = others.sum(-1, dtype=torch.float64)
        away = bases.row_squares[tokens] - 2 * bases.mean @ rows.T + bases.mean.square().sum(-1, keepdim=True)
        spread = bases.spread.double()
        left = (spread - (p * away).sum(-1, dtype=torch.float64)).clamp_min(0)
        rest = (bases.mean - p @ rows).double() / mass.clamp_min(_NOTHING)[:, None]
        mean = torch.where(mass[:, None] > _NOTHING, rest, bases.mean.double()).float()
        radius = float(bases.off_centre.index_fill(0, tokens, 0.0).max())
        matrix = bases.scatter if bases.scatter is not None or count == 0 else scatter(bases.lens.unembedding)
        left += _NOTHING * bases.longest**2
        log_p, likeliest = bases.log_probabilities[:, tokens], others.amax(-1).double()
        return cls(bases, rows, log_p, mass, mean, left, likeliest, radius, matrix if count else None)

    def intervals(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"], kinds: Sequence[_Kind]
    ) -> Float[Tensor, "part measure bound"]:
        """Bounds by each measure, for vectors and the rows of their own bases."""
        lens = self.bases.lens
        columns, parts = [], None
        for kind in kinds:
            where, sign = kind.measure(base).base, -1.0 if kind.remove else 1.0
            if parts is None or not self.bases.linear:
                moved = self.bases.directions(sign * vectors, where)
                factor = lens.multiplier if self.bases.linear else sign * lens.multiplier
                parts = self._parts(moved if factor == 1.0 else moved * factor)
            low, high = self._bounds(parts, where, sign)
            columns.append(torch.stack((low, high) if sign > 0 else (-high, -low), -1))
        return torch.stack(columns, 1)

    def _parts(self, moved: Tensor) -> _Parts:
        """What bounds need to know of directions, whatever the base and the sign."""
        both = torch.stack([self.bases.lens.unembedding[self.bases.target], self.bases.centre], 1)
        target, centre = (moved @ both).double().unbind(-1)
        spread = None if self.scatter is None else ((moved @ self.scatter) * moved).sum(-1).double()
        return _Parts(moved, _norms(moved).double(), target, centre, moved @ self.rows.T, spread)

    def _bounds(self, parts: _Parts, base: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Of C for ``sign`` times the directions."""
        longest, mass, size = self.bases.longest, self.mass[base], parts.size
        delta_w, expected = sign * parts.target, sign * _paired(parts.moved, self.mean, base).double()
        inside = (self.log_p[base] + parts.seen * sign).logsumexp(-1).double()
        variance = size.square() * self.spread[base]
        if parts.scattered is not None:
            flat = (parts.scattered * 1.001 + 1e-6 * size.square()) * self.likeliest[base]
            variance = torch.minimum(variance, flat)
        nothing = mass <= _NOTHING
        away = (self.mean - self.bases.centre).norm(dim=-1)[base]
        doubt = _NOTHING * size * longest / mass.clamp_min(_NOTHING)  # of mean_T, a difference of fp32 sums
        reach = size * (self.radius + away) + doubt
        bennett = expected + doubt + (variance / mass.clamp_min(_NOTHING) * _phi(reach)).log1p()
        ceiling = sign * parts.centre + size * self.radius  # of delta over T
        above = mass.log() + torch.where(nothing, ceiling, torch.minimum(bennett, ceiling))
        below = torch.where(nothing, 0.0, mass).log() + expected - doubt
        slack = _SLACK * (1 + size * longest)
        return (
            delta_w - torch.logaddexp(inside, above) - slack,
            delta_w - torch.logaddexp(inside, below) + slack,
        )


def _paired(
    rows: Float[Tensor, "part axis"], table: Float[Tensor, "base axis"], base: Int[Tensor, " part"]
) -> Float[Tensor, " part"]:
    """The product of each row with its base's row of a table."""
    if bool((base == base[0]).all()):
        return rows @ table[base[0]]
    return torch.einsum("pa,pa->p", rows, table[base])


def _norms(rows: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
    """Their lengths; torch's own norm takes five times as long where rows are columns in memory, as values are."""
    return rows.square().sum(-1).sqrt()


def _phi(reach: Tensor) -> Tensor:
    """(e^R - 1 - R) / R^2, by its series where that cancels."""
    series = 0.5 + reach / 6 + reach.square() / 24 + reach**3 / 100
    return torch.where(reach < 1e-2, series, (reach.expm1() - reach) / reach.clamp_min(1e-30).square())
