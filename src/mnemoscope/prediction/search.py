"""The search for the largest and the smallest contributions of many vectors: exact, without evaluating all.

It keeps what can still be among the k largest or k smallest and evaluates it on more and more tokens, the most probable
first (`bounds`), then, where bf16 is native, on all tokens in bf16. What is left is evaluated on all tokens. A survey
says more: an interval for every part, exact where it is among the extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemoscope.model.model import native_bf16
from mnemoscope.prediction.bases import ROWS, ResidualBases, norms
from mnemoscope.prediction.bounds import Bounds, MeasureKind, bounds_of, kinds_of

STAGES = (96, 384, 4096)  # tokens evaluated before everything is
_FEW = 48  # vectors that cost less than asking once more whether they must be evaluated
# Tokens evaluated before everything is. All parts see the first: a search may begin with fewer, because nobody asks it
# for signs, and for those of other targets, too.
_SURVEYED = (384, 4096)


@dataclass(frozen=True)
class Parts:
    """Parts that are added to the same residual, made when they are needed.

    size     how many there are
    base     the row of `ResidualBases` that they are added to
    vectors  all of them, or those with the given indices: Float[Tensor, "part width"]
    """

    size: int
    base: int
    vectors: Callable[[Int[Tensor, " part"] | None], Float[Tensor, "part width"]]


@dataclass(frozen=True)
class TopK:
    """A ranking of parts: the k largest and the k smallest of all its groups are wanted."""

    groups: Sequence[Parts]
    k: int


@dataclass(frozen=True)
class ExtremeParts:
    """The parts among the k largest or the k smallest by any measure, sorted by group and index.

    group, index  which part of which group each is
    values  Float[Tensor, "extreme measure"], exact, nats: increase, and leave_one_out if it was asked for
    full    how many vectors were taken through the whole vocabulary, of how many
    partly  what the bounds cost, in whole vocabularies
    """

    group: Int[Tensor, " extreme"]
    index: Int[Tensor, " extreme"]
    values: Float[Tensor, "extreme measure"]
    full: int
    of: int
    partly: float


def search(bases: ResidualBases, rankings: Sequence[TopK], *, final: int | None = None) -> list[ExtremeParts]:
    """The k largest and the k smallest of each ranking, exactly: equal to `exhaustive` and a sort.

    By increase, and if the row ``final`` of the bases is given also by leave-one-out there. Ties at the k-th place
    are decided by (group, index).
    """
    kinds = kinds_of(final)
    groups = [group for ranking in rankings for group in ranking.groups]
    contenders = _Contenders.all_of(rankings)
    sizes = contenders.ranking.bincount(minlength=len(rankings))
    partly = torch.zeros(len(rankings))
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64).expand(
        len(contenders.ranking), len(kinds), 2
    )
    if bases.lens.softcap is None:
        for vocabulary, cost in _stages(bases, len(kinds)):
            partly += contenders.ranking.bincount(minlength=len(rankings)) * cost
            ends = _intervals(vocabulary, groups, contenders, kinds)
            undecided = _open(ends, contenders.ranking, rankings, contested)
            contenders, ends = contenders.keep(undecided), ends[undecided]
    values, measured = _evaluated(bases, rankings, groups, contenders, ends, kinds)
    extremes, first = [], 0
    for number, ranking in enumerate(rankings):
        evaluated = ((contenders.ranking == number) & measured).nonzero()[:, 0]
        exact = values[evaluated]
        best = torch.stack([_extreme(exact[:, column], ranking.k) for column in range(len(kinds))]).any(0)
        rows, size = evaluated[best], int(sizes[number])
        group, index = contenders.group[rows] - first, contenders.index[rows]
        extremes.append(ExtremeParts(group, index, exact[best], len(evaluated), size, float(partly[number])))
        first += len(ranking.groups)
    return extremes


def _stages(bases: ResidualBases, measures: int) -> Iterator[tuple[Bounds, float]]:
    """Bounds in the order in which they are asked, and what each costs a vector, in whole vocabularies.

    Where the processor multiplies bf16 natively, all tokens in bf16 cost less than the full evaluations they save, if
    one measure is asked for: each is screened apart.
    """
    size, device = max(len(softmax.lens.table) for softmax in bases.softmaxes), bases.lens.table.device.type
    in_bf16 = measures == 1 and device == "cpu" and native_bf16()
    for count in (0, *STAGES[:-1], *(() if in_bf16 else STAGES[-1:])):
        if 2 * count > size:
            return
        yield bounds_of(bases, count), count / size
    if in_bf16:
        yield bounds_of(bases, count, in_bf16=True), 1.0


def _evaluated(
    bases: ResidualBases,
    rankings: Sequence[TopK],
    groups: Sequence[Parts],
    contenders: _Contenders,
    ends: Float[Tensor, "part measure bound"],
    kinds: Sequence[MeasureKind],
) -> tuple[Float[Tensor, "part measure"], Bool[Tensor, " part"]]:
    """Exact values of all parts that can be among the extremes, the most promising first; and which parts those are.

    Each round evaluates those whose bounds are among the k furthest out, and those without any, or all if that leaves
    few. What is then known moves the k-th place outwards, and what cannot reach it any more is never evaluated.
    """
    vectors, base = contenders.vectors(groups)
    ends, measured = ends.clone(), torch.zeros(len(base), dtype=torch.bool)
    while bool((undecided := _open(ends, contenders.ranking, rankings, contested) & ~measured).any()):
        leading = _open(ends, contenders.ranking, rankings, _leading) | ends.isinf().any((1, 2))
        first = undecided & leading
        rows = (first if 0 < int(first.sum()) < int(undecided.sum()) - _FEW else undecided).nonzero()[:, 0]
        values = bases.measured(vectors[rows], [kind.measure(base[rows]) for kind in kinds])
        ends[rows], measured[rows] = values[..., None], True
    return ends[..., 0], measured


def certified(
    bases: ResidualBases,
    groups: Sequence[Parts],
    count: int,
    *,
    final: int | None = None,
    screen: bool = False,
) -> Float[Tensor, "part measure bound"]:
    """The interval in which each measure of each part certainly lies, after ``count`` tokens were evaluated; nats.

    screen  whether the other tokens were, too, in bf16
    """
    contenders, bounds = _Contenders.all_of([TopK(groups, 1)]), bounds_of(bases, count, in_bf16=screen)
    return _intervals(bounds, groups, contenders, kinds_of(final))


def exhaustive(
    bases: ResidualBases, group: Parts, *, final: int | None = None
) -> Float[Tensor, "part measure"]:
    """Every part of a group by the measures of `search` (A39, A47), in tiles; nats."""
    base = torch.full((group.size,), group.base)
    return bases.measured(group.vectors(None), [kind.measure(base) for kind in kinds_of(final)])


@dataclass(frozen=True)
class _Contenders:
    """Parts that are still in the running, sorted by group; groups are counted through all rankings."""

    ranking: Tensor
    group: Tensor
    index: Tensor

    @classmethod
    def all_of(cls, rankings: Sequence[TopK]) -> _Contenders:
        sizes = [group.size for ranking in rankings for group in ranking.groups]
        owners = [number for number, ranking in enumerate(rankings) for _ in ranking.groups]
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        return cls(torch.tensor(owners)[group], group, torch.cat([torch.arange(size) for size in sizes]))

    def keep(self, mask: Bool[Tensor, " part"]) -> _Contenders:
        return _Contenders(self.ranking[mask], self.group[mask], self.index[mask])

    def by_group(self, groups: Sequence[Parts]) -> Iterator[tuple[Parts, Tensor]]:
        """Each group with its vectors, in order."""
        rows, counts = self.group.unique_consecutive(return_counts=True)
        for row, index in zip(rows.tolist(), self.index.split(counts.tolist()), strict=True):
            group = groups[row]
            yield group, group.vectors(None if len(index) == group.size else index)

    def chunks(self, groups: Sequence[Parts]) -> Iterator[tuple[Tensor, Tensor]]:
        """Vectors and the bases they are added to, in order: large groups alone, small ones together."""
        held: list[tuple[Parts, Tensor]] = []
        size = 0
        for group, vectors in self.by_group(groups):
            if held and (len(vectors) >= ROWS or size >= ROWS):
                yield _joined(held)
                held, size = [], 0
            held.append((group, vectors))
            size += len(vectors)
        if held:
            yield _joined(held)

    def vectors(self, groups: Sequence[Parts]) -> tuple[Tensor, Tensor]:
        """The vectors of all contenders, in order, and the bases they are added to."""
        return _joined(list(self.by_group(groups)))


def _joined(made: Sequence[tuple[Parts, Tensor]]) -> tuple[Tensor, Tensor]:
    base = [torch.full((len(vectors),), group.base) for group, vectors in made]
    vectors = [vectors for _, vectors in made]
    return (vectors[0] if len(vectors) == 1 else torch.cat(vectors)), torch.cat(base)


def _extreme(values: Float[Tensor, " part"], k: int) -> Bool[Tensor, " part"]:
    """The k largest and the k smallest; a tie goes to what comes first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[torch.argsort(-values, stable=True)[:k]] = True
    chosen[torch.argsort(values, stable=True)[:k]] = True
    return chosen


def _open(
    intervals: Float[Tensor, "part measure bound"],
    number: Int[Tensor, " part"],
    rankings: Sequence[TopK],
    rule: Callable[[Tensor, int], Tensor],
) -> Bool[Tensor, " part"]:
    """The parts that a rule keeps, asked with each ranking's intervals and k; `number` is each part's ranking."""
    kept = torch.ones(len(number), dtype=torch.bool)
    for index, ranking in enumerate(rankings):
        ranked = number == index
        kept[ranked] = rule(intervals[ranked], ranking.k)
    return kept


def contested(intervals: Float[Tensor, "part measure bound"], k: int) -> Bool[Tensor, " part"]:
    """The parts that can be among the k largest or the k smallest by any measure, for all that the intervals say."""
    if len(intervals) <= k:
        return torch.ones(len(intervals), dtype=torch.bool)
    low, high = intervals.unbind(-1)
    largest = low.topk(k, dim=0).values[-1]
    smallest = high.topk(k, dim=0, largest=False).values[-1]
    return ((high >= largest) | (low <= smallest)).any(-1)


def _leading(intervals: Float[Tensor, "part measure bound"], k: int) -> Bool[Tensor, " part"]:
    """The parts that would be among the extremes by any measure if all were as far out as they may be."""
    low, high = intervals.unbind(-1)
    chosen = torch.zeros(len(intervals), dtype=torch.bool)
    for ends, side in ((high, True), (low, False)):
        chosen[ends.topk(min(k, len(ends)), dim=0, largest=side).indices.flatten()] = True
    return chosen


def _intervals(
    vocabulary: Bounds,
    groups: Sequence[Parts],
    contenders: _Contenders,
    kinds: Sequence[MeasureKind],
) -> Float[Tensor, "part measure bound"]:
    """Certified bounds of every measure for all contenders."""
    chunks = contenders.chunks(groups)
    return torch.cat([vocabulary.intervals(vectors, base, kinds) for vectors, base in chunks])


# -- Intervals of the increase of every part -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Intervals:
    """Where each part's increase certainly lies; nats, fp64; what rounding may have done is inside.

    likely  the evaluated value, where there is one, and else an estimate inside of the interval: sums of it come within
            a few hundredths of the exact ones, where sums of middles are off by up to a half (docs/log.md, 2026-11-25)
    """

    low: Float[Tensor, " part"]
    high: Float[Tensor, " part"]
    likely: Float[Tensor, " part"]

    @property
    def signs(self) -> Int[Tensor, " part"]:
        """+1 helpful, -1 unhelpful (A47); 0 where the part is nothing, or the interval holds both signs."""
        return (self.low > 0).int() - (self.high < 0).int()

    def moved(self, by: Float[Tensor, " part"], doubt: Float[Tensor, " part"]) -> Intervals:
        """For another token whose logit each part moves by so much more than the target's, give or take `doubt`.

        ``C(v) = delta_w - log sum_j p_j exp(delta_j)``, and only the first term knows the target.
        """
        return Intervals(self.low + by - doubt, self.high + by + doubt, self.likely + by)


class IntervalSurvey:
    """A survey of parts that are added to residuals; its tokens are chosen once for all of them.

    Every part is evaluated on the most probable tokens; those whose sign is open then, and those that may be among the
    k largest or smallest of their group, on more; the latter on all. So the extremes are evaluated, as `search` finds
    them, and their intervals are as wide as fp32 may be off.
    """

    def __init__(self, bases: ResidualBases, k: int) -> None:
        self._bases, self._k = bases, k
        # Bounds hold for logits that are linear in a direction: a soft cap leaves nothing but evaluation.
        stages = _SURVEYED if bases.lens.softcap is None else ()
        self._stages = [bounds_of(bases, count) for count in stages]

    def __call__(
        self, groups: Sequence[Parts], quotients: Sequence[Float[Tensor, " part"]] | None = None
    ) -> list[Intervals]:
        """Intervals of all parts of each group.

        quotients  `Geometry.quotient` of the directions of each group's parts, where it is known
        """
        known_quotients: Sequence[Tensor | None] = quotients or [None] * len(groups)
        bounds = [
            self._bounded(group, quotient) for group, quotient in zip(groups, known_quotients, strict=True)
        ]
        rows = [
            (contested(ends[:, None, :2], self._k) & (ends[:, 0] < ends[:, 1])).nonzero()[:, 0]
            for ends in bounds
        ]
        # All groups together: few rows at a time would read the unembedding once for each group.
        pairs = list(zip(groups, rows, strict=True))
        vectors = torch.cat([group.vectors(index) for group, index in pairs])
        base = torch.cat([torch.full_like(index, group.base) for group, index in pairs])
        values = self._bases.increases(vectors, base)
        size = norms(self._bases.directions(vectors, base)) * abs(self._bases.lens.multiplier)
        doubt = self._bases.rounding(size, base, values)
        evaluated = torch.stack([values - doubt, values + doubt, values], -1)
        for ends, index, known in zip(
            bounds, rows, evaluated.split([len(index) for index in rows]), strict=True
        ):
            ends[index] = known
        return [Intervals(*ends.unbind(-1)) for ends in bounds]

    def _bounded(self, group: Parts, quotient: Tensor | None) -> Float[Tensor, "part 3"]:
        """Both ends and the estimate, from some of the tokens."""
        vectors = group.vectors(None)
        ends = torch.zeros(len(vectors), 3, dtype=torch.float64)
        ends[norms(vectors) > 0] = torch.tensor([-torch.inf, torch.inf, 0.0], dtype=torch.float64)
        for vocabulary in self._stages:
            rows = (contested(ends[:, None, :2], self._k) | (ends[:, 0] * ends[:, 1] < 0)).nonzero()[:, 0]
            if len(rows):
                chosen = vectors if len(rows) == len(vectors) else vectors[rows]
                known_quotient = None if quotient is None else quotient[rows]
                bounds = vocabulary.surveyed(chosen, torch.full_like(rows, group.base), known_quotient)
                low = torch.maximum(ends[rows, 0], bounds[:, 0])
                high = torch.minimum(ends[rows, 1], bounds[:, 1])
                likely = torch.minimum(torch.maximum(bounds[:, 2], low), high)
                ends[rows] = torch.stack([low, high, likely], -1)
        return ends
