"""The largest and the smallest contributions of many vectors, exactly, without evaluating all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemoscope.model.model import native_bf16
from mnemoscope.prediction.bases import ROWS, Bases, norms
from mnemoscope.prediction.bounds import Kind, Screen, Seen, kinds_of

STAGES = (96, 384, 4096)  # tokens evaluated before everything is
_FEW = 48  # vectors that cost less than asking once more whether they must be evaluated


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
    partly  what the bounds cost, in whole vocabularies
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
    kinds = kinds_of(final)
    groups = [group for league in leagues for group in league.groups]
    places = _Places.all_of(leagues)
    sizes = places.league.bincount(minlength=len(leagues))
    partly = torch.zeros(len(leagues))
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64).expand(
        len(places.league), len(kinds), 2
    )
    if bases.lens.softcap is None:
        for stage, cost in _stages(bases, len(kinds)):
            partly += places.league.bincount(minlength=len(leagues)) * cost
            ends = _intervals(stage, groups, places, kinds)
            still = _open(ends, places.league, leagues, contested)
            places, ends = places.keep(still), ends[still]
    values, known = _evaluated(bases, leagues, groups, places, ends, kinds)
    found, first = [], 0
    for number, league in enumerate(leagues):
        here = ((places.league == number) & known).nonzero()[:, 0]
        some = values[here]
        best = torch.stack([_extreme(some[:, column], league.k) for column in range(len(kinds))]).any(0)
        rows, size = here[best], int(sizes[number])
        group, index = places.group[rows] - first, places.index[rows]
        found.append(Found(group, index, some[best], len(here), size, float(partly[number])))
        first += len(league.groups)
    return found


def _stages(bases: Bases, measures: int) -> Iterator[tuple[Seen, float]]:
    """Bounds in the order in which they are asked, and what each costs a vector, in whole vocabularies.

    Where the processor multiplies bf16 natively, all tokens in bf16 cost less than the full evaluations they save, if
    one measure is asked for: each is screened apart.
    """
    vocabulary, device = bases.lens.unembedding.shape[0], bases.lens.unembedding.device.type
    screened = measures == 1 and device == "cpu" and native_bf16()
    for count in (0, *STAGES[:-1], *(() if screened else STAGES[-1:])):
        if 2 * count > vocabulary:
            return
        seen = Seen.of(bases, count)
        yield seen, count / vocabulary
    if screened:
        yield Screen.over(seen), 1.0


def _evaluated(
    bases: Bases,
    leagues: Sequence[League],
    groups: Sequence[Group],
    places: _Places,
    ends: Float[Tensor, "part measure bound"],
    kinds: Sequence[Kind],
) -> tuple[Float[Tensor, "part measure"], Bool[Tensor, " part"]]:
    """Exact values of all parts that can be among the extremes, the most promising first; and of which parts.

    Each round evaluates those whose bounds are among the k furthest out, and those without any, or all if that leaves
    few. What is then known moves the k-th place outwards, and what cannot reach it any more is never evaluated.
    """
    vectors, base = places.vectors(groups)
    ends, known = ends.clone(), torch.zeros(len(base), dtype=torch.bool)
    while bool((still := _open(ends, places.league, leagues, contested) & ~known).any()):
        first = still & (_open(ends, places.league, leagues, _leading) | ends.isinf().any((1, 2)))
        rows = (first if 0 < int(first.sum()) < int(still.sum()) - _FEW else still).nonzero()[:, 0]
        values = bases.measured(vectors[rows], [one.measure(base[rows]) for one in kinds])
        ends[rows], known[rows] = values[..., None], True
    return ends[..., 0], known


def certified(
    bases: Bases, groups: Sequence[Group], count: int, *, final: int | None = None, screen: bool = False
) -> Float[Tensor, "part measure bound"]:
    """The interval in which each measure of each part certainly lies, after ``count`` tokens were evaluated; nats.

    screen  whether the other tokens were, too, in bf16
    """
    places, seen = _Places.all_of([League(groups, 1)]), Seen.of(bases, count)
    return _intervals(Screen.over(seen) if screen else seen, groups, places, kinds_of(final))


def exhaustive(bases: Bases, group: Group, *, final: int | None = None) -> Float[Tensor, "part measure"]:
    """Every part of a group by the measures of `search` (A39, A47), in tiles; nats."""
    base = torch.full((group.size,), group.base)
    return bases.measured(group.vectors(None), [one.measure(base) for one in kinds_of(final)])


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
        size = 0
        for group, vectors in self.by_group(groups):
            if held and (len(vectors) >= ROWS or size >= ROWS):
                yield _joined(held)
                held, size = [], 0
            held.append((group, vectors))
            size += len(vectors)
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
    intervals: Float[Tensor, "part measure bound"],
    league: Int[Tensor, " part"],
    leagues: Sequence[League],
    rule: Callable[[Tensor, int], Tensor],
) -> Bool[Tensor, " part"]:
    """What a rule, asked of the intervals of each league and its k, keeps."""
    still = torch.ones(len(league), dtype=torch.bool)
    for number, one in enumerate(leagues):
        here = league == number
        still[here] = rule(intervals[here], one.k)
    return still


def contested(intervals: Float[Tensor, "part measure bound"], k: int) -> Bool[Tensor, " part"]:
    """What can be among the k largest or the k smallest by any measure, for all that the intervals say."""
    if len(intervals) <= k:
        return torch.ones(len(intervals), dtype=torch.bool)
    low, high = intervals.unbind(-1)
    largest = low.topk(k, dim=0).values[-1]
    smallest = high.topk(k, dim=0, largest=False).values[-1]
    return ((high >= largest) | (low <= smallest)).any(-1)


def _leading(intervals: Float[Tensor, "part measure bound"], k: int) -> Bool[Tensor, " part"]:
    """What would be among the k largest or the k smallest by any measure if all were as far out as they may be."""
    low, high = intervals.unbind(-1)
    chosen = torch.zeros(len(intervals), dtype=torch.bool)
    for ends, side in ((high, True), (low, False)):
        chosen[ends.topk(min(k, len(ends)), dim=0, largest=side).indices.flatten()] = True
    return chosen


def _intervals(
    seen: Seen, groups: Sequence[Group], places: _Places, kinds: Sequence[Kind]
) -> Float[Tensor, "part measure bound"]:
    """Certified bounds of every measure for all places."""
    chunks = places.chunks(groups)
    return torch.cat([seen.intervals(vectors, base, kinds) for vectors, base in chunks])


# -- What is known of the contribution of every part: certified intervals, exact where a part is among the extremes ---

# Tokens evaluated before everything is. All parts see the first: a search may begin with fewer, because nobody asks it
# for signs, and for those of other targets, too.
_STAGES = (384, 4096)


@dataclass(frozen=True, eq=False)
class Intervals:
    """In which each part's contribution certainly lies; nats, fp64; both ends are the value where it is exact.

    likely  the exact value, where it is known, and else an estimate inside of the interval: sums of it come within a
            few hundredths of the exact ones, where sums of middles are off by up to a half (docs/log.md, 2026-11-25)
    """

    low: Float[Tensor, " part"]
    high: Float[Tensor, " part"]
    likely: Float[Tensor, " part"]

    @property
    def signs(self) -> Int[Tensor, " part"]:
        """+1 helpful, -1 unhelpful (A47); 0 where the part is nothing, or the interval holds both signs."""
        return (self.low > 0).int() - (self.high < 0).int()

    def moved(self, by: Float[Tensor, " part"]) -> Intervals:
        """For another token whose logit each part moves by so much more than the target's.

        ``C(v) = delta_w - log sum_j p_j exp(delta_j)``, and only the first term knows the target.
        """
        return Intervals(self.low + by, self.high + by, self.likely + by)


class Survey:
    """Ready to survey parts that are added to residuals: tokens are chosen once for all of them.

    Every part is evaluated on the most probable tokens; those whose sign is open then, and those that may be among the
    k largest or smallest of their group, on more; the latter on all. So the extremes are exact, as `search` finds them.
    """

    def __init__(self, bases: Bases, k: int) -> None:
        size = bases.lens.unembedding.shape[0]
        self._bases, self._k = bases, k
        # Bounds hold for logits that are linear in a direction: a soft cap leaves nothing but evaluation.
        capped = bases.lens.softcap is not None
        self._stages = [] if capped else [Seen.of(bases, min(count, size // 2)) for count in _STAGES]

    def __call__(
        self, groups: Sequence[Group], quotients: Sequence[Float[Tensor, " part"]] | None = None
    ) -> list[Intervals]:
        """Of all parts of each group.

        quotients  `Geometry.quotient` of the directions of each group's parts, where it is known
        """
        known: Sequence[Tensor | None] = quotients or [None] * len(groups)
        ends = [self._bounded(group, one) for group, one in zip(groups, known, strict=True)]
        rows = [
            (contested(one[:, None, :2], self._k) & (one[:, 0] < one[:, 1])).nonzero()[:, 0] for one in ends
        ]
        # All groups together: few rows at a time would read the unembedding once for each group.
        vectors = torch.cat([group.vectors(some) for group, some in zip(groups, rows, strict=True)])
        base = torch.cat(
            [torch.full_like(some, group.base) for group, some in zip(groups, rows, strict=True)]
        )
        values = self._bases.contributions(vectors, base).split([len(some) for some in rows])
        for one, some, exact in zip(ends, rows, values, strict=True):
            one[some] = exact[:, None]
        return [Intervals(*one.unbind(-1)) for one in ends]

    def _bounded(self, group: Group, quotient: Tensor | None) -> Float[Tensor, "part 3"]:
        """Both ends and the estimate, from some of the tokens."""
        vectors = group.vectors(None)
        ends = torch.zeros(len(vectors), 3, dtype=torch.float64)
        ends[norms(vectors) > 0] = torch.tensor([-torch.inf, torch.inf, 0.0], dtype=torch.float64)
        for stage in self._stages:
            still = (contested(ends[:, None, :2], self._k) | (ends[:, 0] * ends[:, 1] < 0)).nonzero()[:, 0]
            if len(still):
                some = vectors if len(still) == len(vectors) else vectors[still]
                known = None if quotient is None else quotient[still]
                found = stage.surveyed(some, torch.full_like(still, group.base), known)
                low = torch.maximum(ends[still, 0], found[:, 0])
                high = torch.minimum(ends[still, 1], found[:, 1])
                likely = torch.minimum(torch.maximum(found[:, 2], low), high)
                ends[still] = torch.stack([low, high, likely], -1)
        return ends
