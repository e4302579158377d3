"""The tuned lens: an affine map of each layer's residual, read through the model's own final norm and unembedding.

Belrose et al. 2023: a residual half way up need not be in the basis of the output, and the own lens then finds it
undecided. Here `x + W x + b` is read by the own lens, one W and b for each layer's residual before its feed-forward
layer (Lres); the last output needs none. They are fitted on the discovery half of the documents, and what they gain is
measured on prefixes of the test half.

A fit has two stages. The start is the better of the identity and of the ridge regression on the last output as the
final norm scales it. Adam then minimises the divergence of what is read from the model's own output, on a sample of the
vocabulary in each step (`_sampled`): all of it would take ten times as long. Whatever stage it is after which
the map reads some positions best that neither stage has seen is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemoscope.errors import QueryError
from mnemoscope.model.capture import residuals
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.records import Progress, padded
from mnemoscope.run.schemas import arrow_table
from mnemoscope.studies.measures.lenses import Points, points
from mnemoscope.studies.measures.positions import Examples, Sizes, Work, sample
from mnemoscope.studies.measures.reductions import ranks
from mnemoscope.text.plan import packed
from mnemoscope.text.sampling import half

if TYPE_CHECKING:
    from mnemoscope.run.reading import Run

LENSES = ("raw", "own", "tuned")
CONSTANT = "constant"  # the mean output over the fitted text, whatever the residual: in layer -1
POSITIONS = 12_000  # of the discovery half that a fit reads, three for each of `sizes.positions`
LEAST = 64  # positions, or nothing is fitted

_CHECKED = 128  # of the positions, at most an eighth: they only decide which map is kept
_BATCH = 128  # positions of a step
_PROBABLE, _DRAWN = 2048, 1024  # tokens of a step: the most probable ones, and some of the others
_RATES = (
    0.012,
    0.05,
)  # of Adam, in standardised coordinates: of W over the root of the width, and of b; they fall to 0
_RIDGE = 1e-2  # of the variance of a standardised coordinate
_READ = 1024  # tokens of a forward pass
_FITTED, _SHORTEST = 3, 2048  # positions of a fit for each of `sizes.positions`, and at least
_EXAMPLES = 16  # of `sizes.positions` for each prefix on which the gain is measured
_FEWEST = 48  # such prefixes, where the text has as many
_ROWS = 32  # readings of the vocabulary at once


@dataclass(frozen=True, eq=False)
class TunedLens:
    """An affine map for each layer's residual before its feed-forward layer, and the lens that reads what it gives."""

    own: Lens
    weight: Float[Tensor, "layer width width"]  # what is added: row i is of coordinate i of the result
    bias: Float[Tensor, "layer width"]

    @classmethod
    def identity(cls, model: Model) -> TunedLens:
        """Maps that change nothing: the own lens."""
        shape = (model.anatomy.n_layers, model.anatomy.width)
        zeros = torch.zeros(*shape, shape[1], device=model.device)
        return cls(Lens.of(model.anatomy, "own"), zeros, zeros[..., 0].clone())

    @classmethod
    def of(cls, run: Run, model: Model) -> TunedLens | None:
        """The lens of a run; None if it has none."""
        if "tuned_lens" not in run.manifest.tables:
            return None
        rows = run.table("tuned_lens").select("weight", "bias").collect()
        shape = (model.anatomy.n_layers, model.anatomy.width)
        weight = rows["weight"].explode().to_numpy().reshape(*shape, shape[1])
        bias = rows["bias"].to_numpy().reshape(shape)
        arrays = (torch.from_numpy(array.copy()).to(model.device) for array in (weight, bias))
        return cls(Lens.of(model.anatomy, "own"), *arrays)

    def moved(self, layer: int, residuals: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """x + W x + b."""
        residuals = residuals.float()
        return residuals + residuals @ self.weight[layer].T + self.bias[layer]

    def logits(self, layer: int, residuals: Float[Tensor, "row width"]) -> Float[Tensor, "row vocabulary"]:
        """What the residual of a layer will have become, as the model reads it at its end."""
        return self.own.logits(self.moved(layer, residuals))

    def stream(self, points: Float[Tensor, "point width"]) -> Float[Tensor, "reading vocabulary"]:
        """What a stream of 2L + 1 points says (A30): each layer's residual through its map, then the last output."""
        with torch.inference_mode():
            moved = [self.moved(layer, points[None, 2 * layer + 1]) for layer in range(len(self.bias))]
            return self.own.logits(torch.cat([*moved, points[-1:]]))

    def table(self) -> pa.Table:
        """The rows of `tuned_lens`."""
        layers, width = self.bias.shape
        columns = {
            "layer": np.repeat(np.arange(layers), width),
            "row": np.tile(np.arange(width), layers),
            "weight": self.weight.reshape(-1, width).cpu().numpy(),
            "bias": self.bias.reshape(-1).cpu().numpy(),
        }
        return arrow_table("tuned_lens", columns)


def measure(run: Run, model: Model, sizes: Sizes, work: Work) -> Mapping[str, Iterable[pa.Table]]:
    """The tables `tuned_lens` and `lens_readings` (docs/format.md)."""
    lens, constant = _fitted(run, model, sizes, work)
    count = max(_FEWEST, sizes.positions // _EXAMPLES)
    examples = sample(run, count, longest=sizes.longest, seed=sizes.seed)
    readings = Readings(lens, Lens.of(model.anatomy, "raw"), constant)

    def shard(numbers: np.ndarray) -> dict[str, pa.Table]:
        batches = [(members, points(model, batch)) for members, batch in examples.batches(numbers)]
        order = np.argsort(np.concatenate([members for members, _ in batches]), kind="stable")
        seen = Points.joined([looked_at for _, looked_at in batches], order)
        columns = readings.columns(seen.residual, seen.output[:, -1], examples.documents[numbers])
        return {"lens_readings": _rows(examples, numbers, columns)}

    with torch.inference_mode():
        tables = work.shards(examples, shard, "reading through lenses")
    return {"tuned_lens": [lens.table()], **tables}


def _fitted(
    run: Run, model: Model, sizes: Sizes, work: Work
) -> tuple[TunedLens, Float[Tensor, " vocabulary"]]:
    """The lens and the mean output, fitted or as kept."""

    @cache
    def text() -> FittedText:
        return FittedText.of(
            run,
            model,
            count=max(_SHORTEST, _FITTED * sizes.positions),
            longest=sizes.longest,
            seed=sizes.seed,
            report=work.report,
        )

    def maps() -> np.ndarray:
        lens = fit(TunedLens.identity(model), text(), seed=sizes.seed, report=work.report)
        return torch.cat([lens.weight, lens.bias[..., None]], -1).cpu().numpy()

    own = Lens.of(model.anatomy, "own")
    both = torch.from_numpy(work.kept("maps", maps)).to(model.device)
    constant = work.kept("constant", lambda: text().mean_output(own).cpu().numpy())
    lens = TunedLens(own, both[..., :-1].contiguous(), both[..., -1].contiguous())
    return lens, torch.from_numpy(constant).to(model.device)


# -- What a lens is fitted to ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FittedText:
    """Residuals before each feed-forward layer and the last outputs, at positions of the discovery half.

    In the model's dtype, as there are many; shuffled, so that neighbours come from different contexts.
    """

    residual: Float[Tensor, "layer row width"]
    final: Float[Tensor, "row width"]

    @classmethod
    def of(
        cls,
        run: Run,
        model: Model,
        *,
        count: int = POSITIONS,
        longest: int = 128,
        seed: int = 0,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> FittedText:
        """At most so many positions that count, of randomly chosen contexts cut to `longest` tokens.

        `QueryError` when there are fewer than `LEAST`.
        """
        generator = np.random.default_rng(seed)
        contexts = _contexts(run, count, longest, generator)
        total = sum(int(counted.sum()) for _, counted in contexts)
        if total < LEAST:
            raise QueryError(
                f"fitting a lens to {run.path}: its discovery half has {total} positions that count, of {LEAST} "
                "needed; build the run on more text"
            )
        residual: list[Tensor] = []
        final: list[Tensor] = []
        lengths = np.array([len(tokens) for tokens, _ in contexts], np.int64)
        done = 0
        for rows in packed(np.argsort(lengths, kind="stable"), lengths, _READ):
            report(Progress("reading residuals", done, total, "positions"))
            tokens, _ = padded([contexts[row][0] for row in rows])
            counted = np.zeros(tokens.shape, bool)
            for place, row in enumerate(rows):
                counted[place, : lengths[row]] = contexts[row][1]
            seen = residuals(model, torch.from_numpy(tokens.astype(np.int64)))
            chosen = torch.from_numpy(counted).to(model.device)
            residual.append(seen["Lres"][:, chosen])
            final.append(seen["Lout"][-1][chosen])
            done += int(counted.sum())
        order = torch.from_numpy(generator.permutation(total)[:count]).to(model.device)
        return cls(_mixed(residual, order, 1), _mixed(final, order, 0))

    def __len__(self) -> int:
        return len(self.final)

    def mean_output(self, own: Lens) -> Float[Tensor, " vocabulary"]:
        """The mean probability of each token."""
        total = torch.zeros(len(own.unembedding), dtype=torch.float64, device=self.final.device)
        for rows in self.final.split(_ROWS):
            total += own.logits(rows.float()).softmax(-1).sum(0)
        return (total / len(self)).float()


def _contexts(
    run: Run, count: int, longest: int, generator: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens, and which of them count, of contexts of the discovery half, until these are enough."""
    special = np.array(run.manifest.options.get("special", []), np.int64)
    rows = run.table("contexts").select("context", "document", "tokens").collect()
    rows = rows.filter(pl.Series(~half(rows["document"].to_numpy())))
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    for column in rows["tokens"].gather(generator.permutation(rows.height)):
        tokens = column.to_numpy()[:longest]
        counted = ~np.isin(tokens, special)
        counted[:1] = False
        if counted.any() and count > 0:
            chosen.append((tokens, counted))
            count -= int(counted.sum())
    return chosen


def _mixed(parts: list[Tensor], order: Tensor, axis: int) -> Tensor:
    """One tensor of those rows, which may be part of a gradient: what was made in inference mode may not."""
    joined = torch.cat(parts, axis)
    mixed = torch.empty(
        *(len(order) if place == axis else size for place, size in enumerate(joined.shape)),
        dtype=joined.dtype,
        device=joined.device,
    )
    return mixed.copy_(joined.index_select(axis, order))


# -- Fitting -----------------------------------------------------------------------------------------------------


def fit(
    lens: TunedLens,
    text: FittedText,
    *,
    steps: int | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] = lambda _: None,
) -> TunedLens:
    """The lens with maps that bring what it reads near the model's own output; with 0 steps the lens as it is.

    steps  of Adam, after the regression, by default as many as let it see every position once; the same batches and
           tokens for every layer
    """
    if steps == 0:
        return lens
    own = _differentiable(lens.own)
    checked = min(_CHECKED, len(text) // 8)
    used = len(text) - checked
    steps = max(1, used // _BATCH) if steps is None else steps
    final = text.final.float()
    with torch.no_grad():
        aim = final * own.scale(final)
        aim *= final.square().mean().sqrt() / aim.square().mean().sqrt()
        outputs = own.logits(final[used:]).log_softmax(-1)
    tasks = _tasks(own, final[:used], steps, seed)
    layers = text.residual.shape[0]
    maps = []
    for layer in range(layers):
        report(Progress("fitting a lens", layer, layers, "layers"))
        x = text.residual[layer].float()
        start = (lens.weight[layer], lens.bias[layer])
        maps.append(_fit_layer(own, start, x, aim[:used], outputs, tasks))
    report(Progress("fitting a lens", layers, layers, "layers"))
    weight, bias = (torch.stack(parts) for parts in zip(*maps, strict=True))
    return TunedLens(lens.own, weight, bias)


Map = tuple[Tensor, Tensor]  # W and b of x + W x + b


@dataclass(frozen=True, eq=False)
class _Task:
    """One step: some rows, and what the model says there about a sample of the vocabulary.

    rows     i64[row]
    tokens   i64[token]
    extra    f32[token]       log of how many tokens each stands for
    outputs  f32[row, token]  the model's probabilities of these tokens with those that they stand for
    """

    rows: Int[Tensor, " row"]
    tokens: Int[Tensor, " token"]
    extra: Float[Tensor, " token"]
    outputs: Float[Tensor, "row token"]


def _tasks(own: Lens, final: Float[Tensor, "row width"], steps: int, seed: int) -> list[_Task]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    tasks = []
    for _ in range(steps):
        if len(order) < min(_BATCH, len(final)):
            order = torch.cat([order, torch.randperm(len(final), generator=generator, device="cpu")])
        rows, order = order[:_BATCH], order[_BATCH:]
        rows = rows.to(final.device)
        with torch.no_grad():
            output = own.logits(final[rows]).softmax(-1)
            tokens, extra = _sampled(output.sum(0), generator)
            outputs = output[:, tokens] * extra.exp()
        tasks.append(_Task(rows, tokens, extra, outputs / outputs.sum(-1, keepdim=True)))
    return tasks


def _sampled(
    mass: Float[Tensor, " vocabulary"], generator: torch.Generator
) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
    """The most probable tokens, each for itself, and some of the others for all of them; the logs of these weights."""
    if len(mass) <= _PROBABLE + _DRAWN:
        return torch.arange(len(mass), device=mass.device), torch.zeros_like(mass)
    probable = mass.topk(_PROBABLE).indices
    others = torch.ones(len(mass), dtype=torch.bool, device=mass.device)
    others[probable] = False
    rest = others.nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest), generator=generator, device="cpu")[:_DRAWN].to(rest.device)]
    extra = torch.cat([mass.new_zeros(_PROBABLE), mass.new_full((_DRAWN,), math.log(len(rest) / _DRAWN))])
    return torch.cat([probable, drawn]), extra


def _differentiable(own: Lens) -> Lens:
    """The same lens, of copies that may be part of a gradient."""
    with torch.inference_mode(False):
        return replace(own, table=torch.empty(own.table.shape, device=own.table.device).copy_(own.table))


def _fit_layer(
    own: Lens,
    start: Map,
    x: Float[Tensor, "row width"],
    aim: Float[Tensor, "used width"],
    checked: Float[Tensor, "checked vocabulary"],
    tasks: list[_Task],
) -> Map:
    """The best of the start, the regression, and both after the steps, by what they read at the checked rows.

    x        residuals of the rows that are used, then of those that are checked
    aim      what is regressed on
    checked  log-probabilities of the model at the rows that are checked
    """
    used = len(aim)
    coordinates = _Coordinates.of(x[:used])
    maps = [start, coordinates.regressed(x[:used], aim)]
    apart = [_divergence(own, _apply(candidate, x[used:]), checked) for candidate in maps]
    best = int(np.argmin(apart))
    trained = _descended(own, maps[best], coordinates, x, float(aim.square().mean().sqrt()), tasks)
    better = _divergence(own, _apply(trained, x[used:]), checked) < apart[best]
    return trained if better else maps[best]


def _apply(one: Map, x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    return x + x @ one[0].T + one[1]


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """Residuals standardised, as a few of their coordinates are hundreds of times as large as the others."""

    mean: Float[Tensor, " width"]
    std: Float[Tensor, " width"]

    @classmethod
    def of(cls, x: Float[Tensor, "row width"]) -> _Coordinates:
        return cls(x.mean(0), x.std(0).clamp_min(1e-6))

    def __call__(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return (x - self.mean) / self.std

    def folded(self, weight: Float[Tensor, "width width"], bias: Float[Tensor, " width"]) -> Map:
        """W and b of what `standardised @ weight + bias` adds to nothing."""
        matrix = (weight / self.std[:, None]).T
        return matrix, bias - matrix @ self.mean

    def regressed(self, x: Float[Tensor, "row width"], aim: Float[Tensor, "row width"]) -> Map:
        """Ridge regression of the aim on the standardised residual, as a map."""
        z, middle = self(x).double(), aim.double().mean(0)
        eye = torch.eye(z.shape[1], dtype=torch.float64, device=z.device)
        weight = torch.linalg.solve(z.T @ z + _RIDGE * len(z) * eye, z.T @ (aim.double() - middle))
        matrix, bias = self.folded(weight.float(), middle.float())
        return matrix - torch.eye(len(matrix), device=matrix.device), bias


def _descended(
    own: Lens, start: Map, coordinates: _Coordinates, x: Tensor, size: float, tasks: list[_Task]
) -> Map:
    """The map after the steps of Adam on what standardised residuals add to it, in units of `size`."""
    width = x.shape[1]
    weight = torch.zeros(width, width, device=x.device, requires_grad=True)
    bias = torch.zeros(width, device=x.device, requires_grad=True)
    rates = (_RATES[0] / math.sqrt(width), _RATES[1])
    groups = [{"params": [weight], "lr": rates[0]}, {"params": [bias], "lr": rates[1]}]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
    for step, task in enumerate(tasks):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / len(tasks))
        rows = x[task.rows]
        with torch.enable_grad():
            moved = _apply(start, rows) + size * (coordinates(rows) @ weight + bias)
            scores = _scores(own, moved, task.tokens) + task.extra
            loss = (scores.logsumexp(-1) - (task.outputs * scores).sum(-1)).mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    matrix, shift = coordinates.folded(size * weight.detach(), size * bias.detach())
    return start[0] + matrix, start[1] + shift


def _scores(own: Lens, vectors: Tensor, tokens: Tensor) -> Float[Tensor, "row token"]:
    """Logits of these tokens under the own lens; an adaptive softmax has to be made whole for any."""
    if own.bands is not None:
        return own.logits(vectors)[:, tokens]
    scores = own.directions(vectors) @ own.unembedding[tokens].T
    if own.bias is not None:
        scores = scores + own.bias[tokens]
    return own.cap(scores * own.multiplier)


@torch.no_grad()
def _divergence(own: Lens, vectors: Tensor, outputs: Tensor) -> float:
    """Mean divergence in nats of what vectors read as from these log-probabilities."""
    parts = [
        divergences(output, own.logits(moved).log_softmax(-1))
        for moved, output in zip(vectors.split(_ROWS), outputs.split(_ROWS), strict=True)
    ]
    return float(torch.cat(parts).mean())


def divergences(
    output: Float[Tensor, "row vocabulary"], reading: Float[Tensor, "#row vocabulary"]
) -> Float[Tensor, " row"]:
    """KL(output || reading) in nats, of log-probabilities; fp64."""
    return (output.exp() * (output - reading)).sum(-1, dtype=torch.float64)


# -- What it gains -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Readings:
    """Every lens at every layer, compared with the model's own output and, as a null, with another example's."""

    tuned: TunedLens
    raw: Lens
    constant: Float[Tensor, " vocabulary"]

    def logits(self, name: str, layer: int, x: Float[Tensor, "row width"]) -> Tensor:
        """Scores over the vocabulary under a lens of `LENSES`."""
        if name == "tuned":
            return self.tuned.logits(layer, x)
        lens = self.raw if name == "raw" else self.tuned.own
        return lens.cap(lens.raw_logits(x))

    def columns(
        self,
        residual: Float[Tensor, "example layer width"],
        final: Float[Tensor, "example width"],
        documents: np.ndarray,
    ) -> list[dict[str, Any]]:
        """Columns of `lens_readings` without those that say which example: constant first, then layer by layer."""
        output = torch.cat([self.tuned.own.logits(rows).log_softmax(-1) for rows in final.split(_ROWS)])
        partner = torch.from_numpy(partners(documents)).to(output.device)
        constant = self.constant.clamp_min(1e-30).log().expand(len(output), -1)
        parts = [{"layer": -1, "lens": CONSTANT} | self._compared(constant, output, partner)]
        for layer in range(residual.shape[1]):
            for name in LENSES:
                read = [self.logits(name, layer, rows) for rows in residual[:, layer].split(_ROWS)]
                parts.append(
                    {"layer": layer, "lens": name} | self._compared(torch.cat(read), output, partner)
                )
        return parts

    def _compared(self, logits: Tensor, output: Tensor, partner: Tensor) -> dict[str, Any]:
        reading = logits.log_softmax(-1)
        said = output.argmax(-1)
        alone = (partner == torch.arange(len(partner), device=partner.device)).cpu().numpy()
        columns: dict[str, Any] = {}
        for prefix, of in (("", torch.arange(len(output), device=output.device)), ("null_", partner)):
            token = said[of][:, None]
            compared = {
                "divergence": divergences(output[of], reading),
                "rank": ranks(logits.contiguous(), token)[:, 0],
                "probability": reading.gather(-1, token)[:, 0].exp(),
            }
            for name, values in compared.items():
                array = values.cpu().numpy()
                columns[prefix + name] = np.ma.array(array, mask=alone) if prefix else array
        return columns


def partners(documents: np.ndarray) -> np.ndarray:
    """i64[example]: an example of another document for each, about half of them further on; itself if there is none."""
    count = len(documents)
    away = (np.arange(count)[:, None] + np.arange(count) + count // 2) % count
    other = documents[away] != documents[:, None]
    return np.where(other.any(1), away[np.arange(count), other.argmax(1)], np.arange(count))


def _rows(examples: Examples, numbers: np.ndarray, parts: list[dict[str, Any]]) -> pa.Table:
    which = {
        "example": numbers,
        "document": examples.documents[numbers],
        "context": examples.contexts[numbers],
        "position": examples.positions[numbers],
    }
    count = len(numbers)
    columns = {name: np.tile(values, len(parts)) for name, values in which.items()}
    for name in parts[0]:
        values = [
            np.full(count, columns_of[name]) if np.isscalar(columns_of[name]) else columns_of[name]
            for columns_of in parts
        ]
        columns[name] = np.ma.concatenate(values) if name.startswith("null_") else np.concatenate(values)
    order = np.argsort(columns["example"], kind="stable")
    return arrow_table("lens_readings", {name: values[order] for name, values in columns.items()})
