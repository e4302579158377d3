"""Log-probabilities of one token at some residuals, and what vectors that are added there do to it, exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.model.lens import Lens

_ROWS_AT_ONCE = 4096  # of the unembedding
_TILE = 4096  # tokens at once in an exact evaluation: logits stay near the cache
NEVER = -1e30  # nats: probability 0, without infinities
ROWS = 1024  # vectors at once
_FEW = 64  # vectors at once where all logits are kept
_NEGLIGIBLE = 12.0  # nats below the largest of a sum of exponentials, where fp32 will do
_SMALL = 40.0  # |delta| up to which exp(delta) and p exp(delta) are safe in fp32
_NOTHING = -80.0  # nats below the largest of a sum of exponentials: 5e4 such terms are nothing in fp64
_GONE = -0.9  # a change of the sum of probabilities after which fp32 has lost a digit of what is left
SURE = 0.5  # a target that is more probable is left out of sums: its terms would cancel all that counts
ROUNDING = (
    4e-6  # what fp32 may be off: a product with the unembedding relative to both lengths, a sum to its terms
)
_LOGITS = 1e-6  # the same of the logits at a residual: four times what they are off in the sample model


@dataclass(frozen=True, eq=False)
class Geometry:
    """Lengths and spread of the rows U_j of an unembedding; each made when it is first asked for."""

    unembedding: Float[Tensor, "vocabulary width"]

    @cached_property
    def squares(self) -> Float[Tensor, " vocabulary"]:
        """|U_j|^2 of every token."""
        return torch.cat([rows.square().sum(-1) for rows in self.unembedding.split(_ROWS_AT_ONCE)])

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
        """The largest length that rounding takes from a row."""
        pairs = zip(self.unembedding.split(_ROWS_AT_ONCE), self.rounded.split(_ROWS_AT_ONCE), strict=True)
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
        total = torch.zeros(len(mean), len(mean), device=mean.device)
        for rows in self.unembedding.split(_ROWS_AT_ONCE):
            centred = rows.float() - mean.float()
            total += centred.T @ centred
        return total

    @cached_property
    def _softmaxes(self) -> dict[int, Geometry]:
        """Of the softmaxes of an adaptive one, as far as they were asked for."""
        return {}

    def softmax(self, number: int, table: Float[Tensor, "row width"]) -> Geometry:
        """The geometry of the rows of one softmax of an adaptive one, made once."""
        return self._softmaxes.setdefault(number, Geometry(table))

    def quotient(self, directions: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
        """d^T scatter d / |d|^2: the same for every multiple of a direction, and 0 for none at all."""
        size = directions.square().sum(-1)
        return ((directions @ self.scatter) * directions).sum(-1) / size.clamp_min(1e-30)


@dataclass(frozen=True, eq=False)
class ResidualBases:
    """Residuals to which vectors are added, read by a lens; one row each.

    target     the token whose log-probability is followed
    residuals  Float[Tensor, "base width"]
    scale      of the reference residual (frozen lens only)
    shared     the geometry of the unembedding, when it is at hand
    """

    lens: Lens
    target: int
    residuals: Float[Tensor, "base width"]
    scale: Float[Tensor, " 1"] | None
    shared: Geometry | None = None

    def following(self, target: int) -> ResidualBases:
        """The same residuals with another token followed; what was computed for this one serves it, too."""
        assert self._softmaxes is not None, "it is made first, so that both have the same"
        other = copy.copy(self)
        object.__setattr__(other, "target", target)  # nothing that is kept depends on it
        return other

    @cached_property
    def _softmaxes(self) -> dict[int, ResidualBases]:
        """The same residuals under softmaxes of an adaptive one, by number, as far as they were asked for."""
        return {}

    @property
    def softmaxes(self) -> list[ResidualBases]:
        """The same residuals under each softmax whose log-probabilities add up to the target's: itself, or those of an
        adaptive softmax."""
        if self.lens.bands is None:
            return [self]
        pairs = self.lens.bands.softmaxes(self.target)
        for number, row in pairs:
            if number not in self._softmaxes:
                lens = self.lens.softmax(number)
                shared = self.geometry.softmax(number, lens.table)
                self._softmaxes[number] = ResidualBases(lens, row, self.residuals, self.scale, shared)
        return [self._softmaxes[number].following(row) for number, row in pairs]

    @property
    def start(self) -> float:
        """log p(target) when every logit is 0."""
        return -sum(math.log(len(bases.lens.table)) for bases in self.softmaxes)

    def gradient(self, base: int, foil: int | None = None) -> Float[Tensor, " width"]:
        """By what log p(target), less log p(foil), grows with what the unembedding reads, at a base."""
        if self.lens.bands is None:
            rows = self.lens.unembedding
            other = self.mean[base] if foil is None else rows[foil]
            return (rows[self.target] - other) * self.lens.multiplier
        own = torch.stack([bases.gradient(base) for bases in self.softmaxes]).sum(0)
        return own if foil is None else own - self.following(foil).gradient(base)

    @cached_property
    def geometry(self) -> Geometry:
        """Lengths and spread of the rows of the unembedding."""
        return self.shared or Geometry(self.lens.unembedding)

    @cached_property
    def raw_logits(self) -> Float[Tensor, "base vocabulary"]:
        """Logits before a soft cap, all biases included."""
        return self.lens.raw_logits(self.residuals, self.scale)

    @cached_property
    def log_probabilities(self) -> Float[Tensor, "base vocabulary"]:
        """Log-probabilities under the lens, in nats; fp32, normalised in fp64."""
        logits = self.lens.cap(self.raw_logits)
        most = logits.amax(-1, keepdim=True)
        rest = (logits - most).exp().sum(-1, dtype=torch.float64, keepdim=True).log()
        return (logits - most) - rest.float()

    @cached_property
    def probabilities(self) -> Float[Tensor, "base vocabulary"]:
        """Probabilities under the lens."""
        return self.log_probabilities.exp()

    def elsewhere(self) -> Float[Tensor, " base"]:
        """1 - p of the target at each base, to the precision of the other probabilities and not of 1; fp64."""
        others = self.probabilities.index_fill(1, torch.tensor([self.target]), 0.0)
        return others.sum(-1, dtype=torch.float64)

    def rounding(
        self,
        size: Float[Tensor, " part"],
        base: Int[Tensor, " part"],
        increases: Float[Tensor, " part"],
    ) -> Float[Tensor, " part"]:
        """A bound on what fp32 may have done to increases of vectors, added to their bases; nats, fp64.

        size  |dv| of each, in logits: its direction's length times the lens's multiplier

        With p before and q after, C = log q_w - log p_w follows the logits that a vector moves by 1 - q_w for the
        target and by q_j for each other token, and the logits of its base by p_j - q_j. So it vanishes with 1 - p_w as
        C itself does, where the target is left out of sums (`SURE`). Under an adaptive softmax the bounds of its
        softmaxes add up.
        """
        if self.lens.bands is not None:
            # What each gains is not known apart; the bound is widest where a token loses everything.
            lost = torch.full_like(increases, -torch.inf)
            return torch.stack([bases.rounding(size, base, lost) for bases in self.softmaxes]).sum(0)
        reach, before = size.double() * self.geometry.longest, self.elsewhere()[base]
        # A soft cap is the difference of two capped logits, each as large as the cap.
        off = ROUNDING * (reach + (self.lens.softcap or 0.0) / 10)
        after = (before - (1 - before) * increases.expm1()).clamp(0, 1)
        carried = torch.where(before < 1 - SURE, after, 1.0)
        # sum_j |p_j - q_j|: no more than all that is elsewhere, and than the largest change of odds.
        passed = torch.minimum(before + after, before * (2 * reach).clamp_max(_SMALL).expm1())
        return 2 * off * carried + (ROUNDING + self._off[base]) * passed

    @cached_property
    def _off(self) -> Float[Tensor, " base"]:
        """What fp32 may be off in the logits of each base; fp64."""
        read = norms(self.lens.directions(self.residuals, self.scale)).double() * abs(self.lens.multiplier)
        return _LOGITS * read * self.geometry.longest

    @cached_property
    def mean(self) -> Float[Tensor, "base width"]:
        """The expected row of the unembedding, E_p[U]."""
        return self.probabilities @ self.lens.unembedding

    @cached_property
    def spread(self) -> Float[Tensor, " base"]:
        """E_p |U_j - E_p U|^2."""
        return (self.probabilities @ self.geometry.squares - self.mean.square().sum(-1)).clamp_min(0)

    def directions(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, "part width"]:
        """dv: the change, by each vector added to its base, of what the unembedding reads."""
        lens = self.lens
        if lens.name != "own" or lens.norm is None:
            return lens.directions(vectors, self.scale)
        if not len(vectors):  # of a layer without neurons
            return vectors.float()
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

    def increases(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, " part"]:
        """C of each vector added to its base, exactly: through the whole vocabulary, in tiles; fp64, nats."""
        return self.measured(vectors, [Measure(base, False)])[:, 0]

    def measured(
        self, vectors: Float[Tensor, "part width"], measures: Sequence[Measure]
    ) -> Float[Tensor, "part measure"]:
        """The values of several measures of the same vectors; under a linear lens their logits are made once."""
        if self.lens.bands is not None:
            return torch.stack([bases.measured(vectors, measures) for bases in self.softmaxes]).sum(0)
        out = torch.empty(len(vectors), len(measures), dtype=torch.float64)
        for rows in torch.arange(len(vectors)).split(ROWS):
            chosen = [measure.rows(rows) for measure in measures]
            if self.linear:
                out[rows] = self._exact(self.lens.directions(vectors[rows], self.scale), chosen)
                continue
            for column, measure in enumerate(chosen):
                moved = measure.sign * self.directions(measure.sign * vectors[rows], measure.base)
                out[rows, column] = self._exact(moved, [measure])[:, 0]
        return out

    @property
    def linear(self) -> bool:
        """Whether directions do not depend on the base: raw and frozen."""
        return self.lens.name != "own" or self.lens.norm is None

    def odds(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"], tokens: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "part chosen"]:
        """How much each (capped) logit of a few tokens moves when a vector is added to its base; fp64.

        Under an adaptive softmax how much each log-probability does, but for what is the same for all tokens.
        """
        if self.lens.bands is not None:
            moved = [self.following(token)._banded_odds(vectors, base) for token in tokens.tolist()]
            return torch.stack(moved, -1)
        rows = self.lens.unembedding[tokens]
        delta = (self.directions(vectors, base) @ rows.T * self.lens.multiplier).double()
        if self.lens.softcap is None:
            return delta
        before = self.raw_logits[:, tokens][base].double()
        return self.lens.cap(before + delta) - self.lens.cap(before)

    def _banded_odds(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, " part"]:
        """`odds` of the target: of its row in the first softmax, whose sum is left out, and all of its band's."""
        first, *rest = self.softmaxes
        moved = first.odds(vectors, base, torch.tensor([first.target]))[:, 0]
        return sum((bases.increases(vectors, base) for bases in rest), moved)

    def above_mean(
        self, vectors: Float[Tensor, "part width"], base: Int[Tensor, " part"]
    ) -> Float[Tensor, " part"]:
        """How much more each vector moves the target's logit than the mean token's, before a soft cap; fp64. Under an
        adaptive softmax, logits of its flat projection.

        It does not saturate as the log-probability does, and is a vector's own: additive under a linear lens.
        """
        row = self.lens.unembedding[self.target].double() - self.geometry.centre.double()
        return self.directions(vectors, base).double() @ row * self.lens.multiplier

    def _exact(self, moved: Tensor, measures: Sequence[Measure]) -> Tensor:
        """The values of directions by each measure: ``delta_w - log sum p exp(delta)``."""
        row = self.lens.unembedding[self.target].double()
        wanted = (moved.double() @ row * self.lens.multiplier)[:, None]
        target = slice(self.target, self.target + 1)
        delta_w = [self._capped(wanted * measure.sign, measure.base, target)[:, 0] for measure in measures]
        # Where the target has nearly all of the probability, all deltas are taken from its own, so that it has no term.
        beside = [
            torch.where(self.probabilities[measure.base, self.target] > SURE, delta, 0.0)
            for measure, delta in zip(measures, delta_w, strict=True)
        ]
        change, most = self._changes(moved, measures, beside)
        sums = change.clamp_min(_GONE).log1p() + torch.stack(beside, -1)
        # Where most of the probability went elsewhere, 1 + change has lost its digits.
        far = ((most > _SMALL) | ~(change >= _GONE)).any(-1).nonzero()[:, 0]
        if len(far):
            sums[far] = self._log_sums(moved[far], [measure.rows(far) for measure in measures])
        signs = torch.tensor([measure.sign for measure in measures], dtype=torch.float64)
        return signs * (torch.stack(delta_w, -1) - sums)

    def _changes(
        self, moved: Tensor, measures: Sequence[Measure], beside: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """sum_j p_j (exp(delta_j - beside) - 1), of use where no delta is large; and the largest of these.

        Where `beside` is not 0 it is the target's delta, whose term is 0 and not what rounding leaves of it.
        """
        total = torch.zeros(len(moved), len(measures), dtype=torch.float64)
        most = torch.zeros(len(moved), len(measures))
        shifted = [bool(shift.any()) for shift in beside]
        for tokens, plain in self._tiles(moved):
            own = self.target - tokens.start
            for column, measure in enumerate(measures):
                delta = self._capped(plain * measure.sign, measure.base, tokens)
                if shifted[column]:
                    delta -= beside[column][:, None].float()
                    if 0 <= own < delta.shape[1]:
                        delta[:, own].masked_fill_(beside[column] != 0, 0.0)
                most[:, column] = torch.maximum(most[:, column], delta.amax(-1))
                # Not einsum: its sums run through thousands of terms one by one, and lose two digits.
                products = delta.expm1_().mul_(self.probabilities[measure.base, tokens])
                total[:, column] += products.sum(-1)
        return total, most

    def _log_sums(self, moved: Tensor, measures: Sequence[Measure]) -> Tensor:
        """log sum_j p_j exp(delta_j) for any move; fp64.

        Deltas of hundreds lose digits in fp32: those of tokens that are not negligible are made again in fp64.
        """
        total = torch.empty(len(moved), len(measures), dtype=torch.float64)
        table, every = self.lens.unembedding, slice(None)
        for rows in torch.arange(len(moved)).split(_FEW):
            plain = moved[rows] @ table.T * self.lens.multiplier
            for column, measure in enumerate(measures):
                base = measure.base[rows]
                scores = self._capped(plain * measure.sign, base, every)
                for neighbours, row in runs(base):
                    scores[neighbours] += self.log_probabilities[row]
                heavy = (scores > scores.amax(-1, keepdim=True) - _NEGLIGIBLE).any(0).nonzero()[:, 0]
                delta = moved[rows].double() @ table[heavy].double().T * self.lens.multiplier
                exact = self._capped(delta * measure.sign, base, heavy)
                exact += self.log_probabilities[base[:, None], heavy]
                light = log_sums(scores.index_fill_(1, heavy, NEVER)).double()
                total[rows, column] = torch.logaddexp(exact.logsumexp(-1), light)
        return total

    def _tiles(self, moved: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """How much directions move the logits of some tokens after others, before a soft cap."""
        for start in range(0, self.lens.unembedding.shape[0], _TILE):
            tokens = slice(start, start + _TILE)
            plain = moved @ self.lens.unembedding[tokens].T
            yield tokens, plain if self.lens.multiplier == 1.0 else plain * self.lens.multiplier

    def _capped(self, delta: Tensor, base: Tensor, tokens: slice | Tensor) -> Tensor:
        """How much logits move under the soft cap, if there is one, when they would move by ``delta`` without."""
        if self.lens.softcap is None:
            return delta
        before = self.raw_logits[:, tokens][base].to(delta.dtype)
        return self.lens.cap(before + delta) - self.lens.cap(before)


@dataclass(frozen=True, eq=False)
class Measure:
    """A measure of vectors: C at a base, or the loss when it is taken from one.

    base    row of `ResidualBases` for each vector
    remove  ``log p(w | x) - log p(w | x - v)``, which is -C(-v), instead of C(v)
    """

    base: Int[Tensor, " part"]
    remove: bool

    def rows(self, index: Int[Tensor, " chosen"]) -> Measure:
        """The same measure for some of the vectors."""
        return Measure(self.base[index], self.remove)

    @property
    def sign(self) -> float:
        """-1 when vectors are removed."""
        return -1.0 if self.remove else 1.0


def log_sums(scores: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """log sum exp of each row, whose scores are overwritten.

    What is 80 nats below the largest counts as that: `exp` takes ten times as long where its result is denormal.
    """
    if not scores.shape[-1]:
        return scores.new_full(scores.shape[:1], -math.inf)
    most = scores.amax(-1, keepdim=True)
    return scores.sub_(most).clamp_(min=_NOTHING).exp_().sum(-1).log_() + most[:, 0]


def runs(base: Int[Tensor, " part"]) -> Iterator[tuple[slice, int]]:
    """Runs of neighbours that share a base, and the base of each."""
    start = 0
    for row, count in zip(
        *(column.tolist() for column in base.unique_consecutive(return_counts=True)), strict=True
    ):
        yield slice(start, start + count), row
        start += count


def norms(rows: Float[Tensor, "part width"]) -> Float[Tensor, " part"]:
    """The lengths of rows; torch's own norm takes five times as long on values, whose rows are columns in memory."""
    return rows.square().sum(-1).sqrt()
