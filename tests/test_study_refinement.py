"""Refinement and composition: the measurement against fp64 by hand, its laws, and the analyses on planted tables."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from effort import tries
from families import FAMILIES, VARIANTS
from hypothesis import given
from hypothesis import strategies as st
from tiny import texts, tokenizer
from transformers import PreTrainedModel

import mnemoscope as mn
from mnemoscope.model.capture import residuals
from mnemoscope.model.lens import Lens
from mnemoscope.model.model import Model
from mnemoscope.model.parts import Norm
from mnemoscope.model.reading import describe
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.catalogue import choose
from mnemoscope.studies.findings import composition, refinement
from mnemoscope.studies.findings.composition import STOP_WORDS, kind
from mnemoscope.studies.findings.finding import Finding
from mnemoscope.studies.measures import positions
from mnemoscope.studies.measures.lenses import Points, points, read_tops, value_tops
from mnemoscope.studies.measures.positions import Examples, Sizes, Work
from mnemoscope.studies.measures.questions import Streams
from mnemoscope.studies.measures.refinement import _blocks, _Unit, measure
from mnemoscope.views.figures import chart

BUILDERS = FAMILIES | VARIANTS
NAMES = ("llama", "opt", "opt_no_final_norm", "gptj", "falcon", "olmo2", "gemma2", "granite", "cohere")
ALL = ("own", "raw", "frozen")
QUICK = ("llama", "opt_no_final_norm", "gemma2")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def wrapped(name: str) -> Model:
    """A tiny model without a tokenizer."""
    hf = BUILDERS[name]()
    return Model(hf, None, describe(hf), "tiny")


def examples(count: int = 7, seed: int = 0) -> Examples:
    """Random prefixes of different lengths, two of one document."""
    generator = np.random.default_rng(seed)
    prefixes = tuple(
        generator.integers(3, 80, generator.integers(2, 12)).astype(np.int32) for _ in range(count)
    )
    numbers = np.arange(count)
    ends = np.array([len(prefix) - 1 for prefix in prefixes], np.int32)
    return Examples(numbers, np.maximum(numbers - 1, 0), ends, np.zeros(count, np.int32), prefixes)


class Slow:
    """One prefix at a time in fp64, by hooks and formulas that share nothing with the measurement."""

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = copy.deepcopy(hf).double()
        self.parts = describe(self.hf)
        self.unembedding = self.parts.unembedding().double().numpy()
        bias = self.parts.unembedding_bias
        self.bias = np.zeros(len(self.unembedding)) if bias is None else bias.double().numpy()

    def points(self, prefix: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """r, o and m of every layer: what enters a block, attention, and what leaves it."""
        kept: list[dict[str, np.ndarray]] = [{} for _ in self.parts.layers]
        handles: list[Any] = []

        def keep(index: int, name: str) -> Callable[..., None]:
            def hook(_: Any, inputs: Any, output: Any = None) -> None:
                value = inputs if output is None else output
                value = value[0] if isinstance(value, tuple) else value
                kept[index][name] = value.detach().reshape(-1, value.shape[-1])[-1].double().clone().numpy()

            return hook

        for index, layer in enumerate(self.parts.layers):

            def enter(_: Any, inputs: Any, keywords: Any, index: int = index) -> None:
                keep(index, "in")(None, inputs or (keywords["hidden_states"],))

            handles += [
                layer.module.register_forward_pre_hook(enter, with_kwargs=True),
                layer.module.register_forward_hook(keep(index, "out")),
                layer.attention_out.register_forward_hook(keep(index, "attention")),
                layer.down.register_forward_pre_hook(keep(index, "m")),
            ]
        with torch.no_grad():
            self.hf(input_ids=torch.from_numpy(prefix.astype(np.int64))[None])
        for handle in handles:
            handle.remove()
        found = []
        for layer, seen in zip(self.parts.layers, kept, strict=True):
            update = seen["attention"]
            if layer.post_attention_norm is not None:
                update = normed(layer.post_attention_norm, update, update)
            found.append((seen["in"] + layer.attention_multiplier * update, seen["out"], seen["m"]))
        return found

    def read(self, lens: str, vector: np.ndarray, final: np.ndarray, *, part: bool) -> np.ndarray:
        """Logits of a point of the stream, or of a part of it."""
        norm, bias = self.parts.final_norm, self.bias
        if lens != "raw" and norm is not None:
            vector = normed(norm, vector, vector if lens == "own" else final, bias=lens == "own" or not part)
        if part and lens != "own":
            bias = np.zeros_like(bias)
        scores = (self.unembedding @ vector + bias) * self.parts.logit_multiplier
        cap = self.parts.softcap
        # A cap comes last and keeps the order; parts under an additive lens are read before it.
        return scores if cap is None or (part and lens != "own") else cap * np.tanh(scores / cap)

    def says(self, lens: str, layer: int, m: np.ndarray, final: np.ndarray) -> np.ndarray:
        """What each memory of a layer says with the sign of its coefficient."""
        part = self.parts.layers[layer]
        values = part.values().double().numpy()
        if part.post_ffn_norm is not None:
            values = values * part.post_ffn_norm.weight.double().numpy()
        sign = np.where(m >= 0, 1, -1)[:, None]
        return np.array([self.read(lens, v, final, part=True).argmax() for v in sign * values])


def normed(norm: Norm, vector: np.ndarray, of: np.ndarray, *, bias: bool = True) -> np.ndarray:
    """A norm with the statistic of some vector."""
    if norm.kind == "layer":
        vector, of = vector - vector.mean(), of - of.mean()
    out = vector / np.sqrt((of**2).mean() + norm.eps)
    if norm.weight is not None:
        out = out * norm.weight.double().numpy()
    return out if norm.bias is None or not bias else out + norm.bias.double().numpy()


def rank(logits: np.ndarray, token: int) -> int:
    return int((logits > logits[token]).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def slow_row(slow: Slow, lens: str, layer: int, mine: Any, theirs: Any, place: int) -> dict[str, float]:
    """Every column of one row, from the points of an example (at a place of its block) and of its partner."""
    (r, o, m), (their_r, their_o, their_m) = mine[layer], theirs[layer]
    final, their_final = mine[-1][1], theirs[-1][1]
    say = slow.read("own", final, final, part=False).argmax()
    their_say = slow.read("own", their_final, their_final, part=False).argmax()
    of_r = slow.read(lens, r, final, part=False)
    of_y = slow.read(lens, o - r, final, part=True)
    of_o = slow.read(lens, o, final, part=False)
    of_n = slow.read(lens, r + their_o - their_r, final, part=False)
    their_y = slow.read(lens, their_o - their_r, their_final, part=True)
    their_top = slow.read(lens, their_o, their_final, part=False).argmax()
    p, top, new, null = softmax(of_r), of_r.argmax(), of_o.argmax(), of_n.argmax()
    rows = slow.unembedding / np.linalg.norm(slow.unembedding, axis=1, keepdims=True)
    part = slow.parts.layers[layer]
    values = part.values().double().numpy()
    if part.post_ffn_norm is not None:
        values = values * part.post_ffn_norm.weight.double().numpy()
    weight, their_weight = (np.abs(c) * np.linalg.norm(values, axis=1) for c in (m, their_m))
    share, heavy = weight / weight.max(), np.sort(weight)[::-1]
    words = slow.says(lens, layer, m, final)
    there = (layer + len(slow.parts.layers) // 2) % len(slow.parts.layers)
    memory, their_memory = (
        words[weight.argmax()],
        slow.says(lens, layer, their_m, final)[their_weight.argmax()],
    )
    head = [token for token in np.argsort(-of_r)[:6] if token not in (top, new)]
    row = {
        "residual": top,
        "ffn": of_y.argmax(),
        "output": new,
        "permuted": null,
        "p_residual": p[top],
        "p_output": p[new],
        "p_output_permuted": p[null],
        "p_final": p[say],
        "p_final_permuted": p[their_say],
        "rank_output": rank(of_r, new),
        "rank_output_permuted": rank(of_r, null),
        "rank_final": rank(of_r, say),
        "output_rank_final": rank(of_o, say),
        "ffn_rank_residual": rank(of_y, top),
        "ffn_rank_residual_permuted": rank(their_y, top),
        "ffn_z_residual": (of_y[top] - of_y.mean()) / of_y.std(),
        "ffn_z_residual_permuted": (their_y[top] - their_y.mean()) / their_y.std(),
        "similarity": rows[top] @ rows[new],
        "similarity_permuted": rows[top] @ rows[null],
        "similarity_head": rows[top] @ rows[head[place % 4]],
        "similarity_unrelated": rows[top] @ rows[their_top],
        "memory": memory,
        "ffn_rank_memory": rank(of_y, memory),
        "ffn_rank_memory_permuted": rank(of_y, their_memory),
        "active": (m > 0).sum(),
        "nonzero": (m != 0).sum(),
        "active_1": (share >= 0.01).sum(),
        "active_10": (share >= 0.1).sum(),
        "active_50": (share >= 0.5).sum(),
        "participation": weight.sum() ** 2 / (weight**2).sum(),
        "mass_10": heavy[:10].sum() / heavy.sum(),
        "mass_100": heavy[:100].sum() / heavy.sum(),
    }
    for suffix, (said, target) in {
        "": (words, of_y.argmax()),
        "_output": (words, new),
        "_permuted": (words, their_y.argmax()),
        "_other": (slow.says(lens, there, m, final), of_y.argmax()),
    }.items():
        same = said == target
        row[f"agree{suffix}"] = (same & (m != 0)).sum()
        row[f"agree_positive{suffix}"] = (same & (m > 0)).sum()
        row[f"agree_all{suffix}"] = same.sum()
        row[f"strongest{suffix}"] = max((share * (same & (m != 0))).max(), 0.0)
    return row


@pytest.mark.parametrize("name", SOME)
def test_every_column_equals_its_definition_in_fp64(name: str, tmp_path: Path) -> None:
    """Tokens, ranks, counts, probabilities and shares of every lens are those of one prefix alone, computed by hand."""
    model, some = wrapped(name), examples(4)
    blocks = _blocks(some.documents, 80)
    columns, ends = _Unit.of("model", model, ALL, None, Work(tmp_path)).shard(
        some, np.arange(len(some)), blocks
    )
    partner = np.roll(np.arange(len(some)), -blocks[0].shift)
    slow = Slow(model.hf)
    seen = [slow.points(prefix) for prefix in some.prefixes]
    for example, mine in enumerate(seen):
        final = mine[-1][1]
        p = softmax(slow.read("own", final, final, part=False))
        assert int(ends["prediction"][example]) == p.argmax()
        assert float(ends["p_prediction"][example]) == pytest.approx(p.max(), rel=1e-3)
        for layer in range(model.anatomy.n_layers):
            for at, lens in enumerate(ALL):
                expected = slow_row(slow, lens, layer, mine, seen[partner[example]], example)
                found = {column: float(values[example, layer, at]) for column, values in columns.items()}
                # In fp32 the tail of a GELU is 0 a little earlier.
                for count in ("nonzero", "active"):
                    assert 0 <= expected.pop(count) - found.pop(count) <= 3
                assert found == pytest.approx(expected, rel=2e-3, abs=2e-5), (example, layer, lens)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)],
)
def test_the_points_are_those_of_the_stream(name: str) -> None:
    """o = r + y is what leaves the block and r what attention left, for every family (A20); y = sum m v + b (A17)."""
    model, some = wrapped(name), examples(3)
    for numbers, batch in some.batches(np.arange(3)):
        seen = points(model, batch)
        stream = residuals(model, torch.from_numpy(batch.tokens.astype(np.int64)))
        rows, ends = torch.arange(len(numbers)), torch.from_numpy(batch.lengths.astype(np.int64)) - 1
        for mine, point in ((seen.residual, "Lres"), (seen.output, "Lout")):
            theirs = stream[point][:, rows, ends].transpose(0, 1)
            assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()))
        for index, part in enumerate(model.anatomy.layers):
            summed = seen.coefficients[:, model.cells.of(index)] @ part.values()
            bias = part.down_bias()
            summed = summed if bias is None else summed + bias
            if part.post_ffn_norm is not None:
                summed = part.post_ffn_norm(summed)
            written = summed * part.ffn_multiplier
            assert torch.allclose(written, seen.ffn[:, index], atol=1e-4 * float(written.abs().max()))


def test_weights_in_half_precision_are_read_in_fp32() -> None:
    """A prefix gives the same alone, in a batch, and in a copy of the model in fp32; the weights stay as they are."""
    half, some = FAMILIES["llama"]().to(torch.bfloat16), examples(6)
    wide = copy.deepcopy(half).float()
    models = [Model(hf, None, describe(hf), "tiny") for hf in (half, wide)]
    numbers = np.arange(len(some))
    both = [
        Points.joined([points(model, batch) for _, batch in some.batches(numbers)], numbers)
        for model in models
    ]
    order = np.argsort(np.concatenate([rows for rows, _ in some.batches(numbers)]))
    alone = Points.joined(
        [
            points(models[0], batch)
            for number in numbers
            for _, batch in some.batches(numbers[number : number + 1])
        ],
        numbers,
    )
    for name in ("residual", "ffn", "coefficients"):
        batched, exact, single = (getattr(seen, name) for seen in (both[0], both[1], alone))
        assert torch.allclose(batched, exact, atol=1e-5) and torch.allclose(batched[order], single, atol=1e-5)
    prefix = some.prefixes[0]
    streams = [Streams(model)[tuple(prefix.tolist())] for model in models]
    assert torch.allclose(*streams, atol=1e-5)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_under_an_additive_lens_agreement_is_never_overruled(name: str, tmp_path: Path) -> None:
    """Where r and y say the same, o says it too under raw and frozen; without biases under own as well (A23)."""
    some = examples(40, seed=1)
    unit = _Unit.of("model", wrapped(name), ALL, None, Work(tmp_path))
    columns, _ = unit.shard(some, np.arange(40), _blocks(some.documents, 80))
    same = columns["residual"] == columns["ffn"]
    assert same[..., 1:].any()
    violated = same & (columns["output"] != columns["residual"])
    assert not violated[..., 1:].any()
    if not unit.own.biased:
        assert not violated.any()
    if name == "opt_no_final_norm":
        for values in columns.values():
            assert torch.equal(values[..., 0], values[..., 1])
            assert torch.equal(values[..., 0], values[..., 2])


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_reads_the_same_from_its_linear_half(name: str) -> None:
    """Logits from the linear half are those of the lens; the model's own for the last output under own."""
    model, generator = wrapped(name), torch.Generator().manual_seed(0)
    vectors, final = torch.randn(2, 5, model.anatomy.width, generator=generator)
    for lens in ALL:
        reading = Lens.of(model.anatomy, lens)
        scale = reading.scale(final, vectors)
        logits = reading.part(reading.linear(vectors), scale)
        expected = reading.logits(vectors, scale if lens == "frozen" else None)
        assert torch.allclose(logits, expected, atol=1e-4)
        if lens != "own":
            expected = reading.cap(expected + reading.offset)
        assert torch.allclose(reading.point(reading.linear(vectors), scale), expected, atol=1e-4)


@tries(60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.sampled_from([80, 1 << 21, 1 << 30]))
def test_partners_are_permuted_and_of_another_document_where_possible(
    documents: list[int], vocabulary: int
) -> None:
    """Everyone has one partner and is one's; it is another example unless there is only one in the block."""
    blocks = _blocks(np.array(documents), vocabulary)
    assert sorted(np.concatenate([block.rows for block in blocks])) == list(range(len(documents)))
    for block in blocks:
        mine = torch.from_numpy(block.rows)
        partner = block.partner(mine)
        assert sorted(partner.tolist()) == sorted(mine.tolist())
        assert bool((partner != mine).all()) == (len(mine) > 1)
        if (counts := np.bincount(np.array(documents)[block.rows])).max() == 1 and len(counts) > 1:
            assert len(mine) == 1 or (np.array(documents)[partner] != np.array(documents)[mine]).all()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A tiny gated model and a run of it."""
    model = mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer())
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "run", top=5), model


def tables(run: Run, model: Model, folder: Path) -> dict[str, pl.DataFrame]:
    """What the measurement adds to a run, in shards of eight."""
    folder.mkdir(exist_ok=True)
    found = measure(run, model, Sizes(positions=20, shuffled=True), Work(folder))
    return {
        name: pl.concat([pl.DataFrame(pl.from_arrow(part)) for part in parts])
        for name, parts in found.items()
    }


@pytest.mark.slow
def test_an_interrupted_measurement_ends_in_the_same_tables(
    case: tuple[Run, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between shards and begun again, it measures what is left and gives the very same rows."""
    run, model = case
    monkeypatch.setattr(positions, "SHARD", 8)
    whole = tables(run, model, tmp_path / "whole")
    shards: list[int] = []
    original = _Unit.shard

    def failing(self: _Unit, *arguments: Any) -> Any:
        shards.append(1)
        if len(shards) == 4:  # two units a shard: in the middle of the second
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(_Unit, "shard", failing)
    with pytest.raises(KeyboardInterrupt):
        tables(run, model, tmp_path / "stopped")
    again = tables(run, model, tmp_path / "stopped")
    assert len(shards) == 4 + 4
    assert all(again[name].equals(rows) for name, rows in whole.items())


def test_the_tables_go_into_a_run(case: tuple[Run, Model], measured: Run) -> None:
    """They are rows of the schema, one for each example, layer, unit and lens, and the run is whole with them."""
    run, model = case
    with_tables = measured
    assert with_tables.check() == []
    rows = with_tables.table("refinement").collect()
    ends = with_tables.table("refinement_examples").collect()
    assert rows.columns == SCHEMAS["refinement"].names
    assert rows.height == 20 * 3 * 2 * 2
    assert rows.select("example", "layer", "unit", "lens").n_unique() == rows.height
    assert rows.null_count().sum_horizontal().item() == 0
    for row in ends.filter(unit="model").iter_rows(named=True):
        stored = run.contexts([row["context"]])[row["context"]]
        assert stored.document == row["document"]
        assert stored.tokens[row["position"] + 1] == row["next_token"]
        with torch.no_grad():
            prefix = torch.from_numpy(stored.tokens[: row["position"] + 1].astype(np.int64))
            assert int(model.hf(prefix[None]).logits[0, -1].argmax()) == row["prediction"]
    last = rows.filter(layer=2, lens="own").join(ends, on=["example", "unit"])
    assert (last["output"] == last["prediction"]).all()
    assert (last["output_rank_final"] == 0).all()
    document = dict(ends.select("example", "document").iter_rows())
    assert all(
        document[partner] != document[example]
        for example, partner in ends.select("example", "partner").iter_rows()
    )


@pytest.mark.parametrize("lens", ALL)
def test_what_values_say_is_read_once_and_kept(case: tuple[Run, Model], tmp_path: Path, lens: str) -> None:
    """From the table `values`, from the weights, or from the folder of the work: the same tokens."""
    run, model = case
    reading = Lens.of(model.anatomy, lens)
    read = read_tops(model, reading)
    for source in (run, None):
        for _ in range(2):
            assert torch.equal(value_tops(source, model, reading, Work(tmp_path), "tops"), read)


@pytest.fixture(scope="module")
def measured(case: tuple[Run, Model], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the tables, of a model and its shuffled copy under two lenses."""
    run, model = case
    copied = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(run.path, copied)
    found = measure(run, model, Sizes(positions=20, shuffled=True), Work(tmp_path_factory.mktemp("work")))
    return add_tables(copied, found, {})


def by_case(row: dict[str, Any]) -> str:
    """The paper's cases, one example at a time."""
    r, y, o = row["residual"], row["ffn"], row["output"]
    if r == y == o:
        return "agreement"
    if r == y:
        return "violation"
    return "residual" if o == r else "ffn" if o == y else "composition"


def rows_of(run: Run, lens: str, layer: int, unit: str = "model") -> list[dict[str, Any]]:
    """Rows of the tables with everything known of the example, as plain dicts."""
    rows = run.table("refinement").filter(pl.col("lens") == lens, pl.col("layer") == layer)
    joined = rows.join(run.table("refinement_examples"), on=["example", "unit"]).filter(
        pl.col("unit") == unit
    )
    return joined.collect().sort("example").to_dicts()


def found(run: Run, analysis: Any) -> dict[str, Finding]:
    """Findings by id, each of which can be drawn and said."""
    findings = {one.id: one for one in analysis.findings(run)}
    for one in findings.values():
        assert one.frame.height > 0
        assert "nan" not in one.says, one.says
        json.dumps(one.to_dict())
        assert one.figure is None or chart(one) is not None
    return findings


@pytest.mark.slow
def test_figures_of_refinement_equal_their_definitions(measured: Run) -> None:
    """Figures 9, 10 and 11, changes, vetoes and the last layer, counted row by row (A21-A25)."""
    findings = found(measured, refinement)
    for layer in range(3):
        for lens in ("own", "raw"):
            rows = rows_of(measured, lens, layer)
            agree = np.mean([row["residual"] == row["prediction"] for row in rows])
            null = np.mean([row["residual"] == rows[row["partner"]]["prediction"] for row in rows])
            figure = findings["figure-9-residual-is-prediction"].frame
            line = figure.row(
                by_predicate=(pl.col("layer") == layer) & (pl.col("series") == f"{lens} lens"), named=True
            )
            assert (line["value"], line["null"]) == pytest.approx((agree, null))
            assert line["low"] <= agree <= line["high"]
            figure = findings["figure-10-probability-of-prediction"].frame
            line = figure.row(
                by_predicate=(pl.col("layer") == layer) & (pl.col("lens") == f"{lens} lens"), named=True
            )
            values = sorted(row["p_final"] for row in rows)
            assert values[9] <= line["median"] <= values[10]
            counts = Counter(by_case(row) for row in rows)
            figure = findings["figure-11-cases"].frame.filter(panel=f"{lens} lens", layer=layer)
            assert figure["value"].sum() == pytest.approx(1)
            assert dict(figure.select("case", "value").iter_rows()) == pytest.approx(
                {name: counts[name] / len(rows) for name in refinement.CASES}
            )
    rows = rows_of(measured, "own", 2)
    pairs = {row["example"] for row in rows if by_case(row) == "composition"}
    assert set(findings["last-layer-changes"].frame["example"]) == pairs
    bins = findings["veto-ranks"].frame.group_by("token").agg(pl.col("value").sum())
    assert bins["value"].to_list() == pytest.approx([1, 1])
    assert all(
        set(one.frame.columns) >= {"null"}
        for name, one in findings.items()
        if one.null and name != "figure-11-cases"
    )


def test_figures_of_composition_equal_their_definitions(measured: Run) -> None:
    """Figures 7 and 8, the sweep, cases of agreement, the strongest memory: counted row by row (A16-A19, A29)."""
    findings = found(measured, composition)
    neurons, words = measured.manifest.model.neurons, measured.vocabulary
    everything = [row for layer in range(3) for row in rows_of(measured, "own", layer)]
    for layer in range(3):
        rows = rows_of(measured, "own", layer)
        shuffled = rows_of(measured, "own", layer, "shuffled")
        figure = findings["figure-7-active-memories"].frame.filter(layer=layer)
        for rule, column in composition.RULES.items():
            line = figure.filter(rule=rule).row(0, named=True)
            assert line["value"] == pytest.approx(np.mean([row[column] for row in rows]) / neurons)
            assert line["null"] == pytest.approx(np.mean([row[column] for row in shuffled]) / neurons)
        figure = findings["figure-8-zero-agreement"].frame.filter(layer=layer)
        for target, suffix in zip(
            figure["target"].unique(maintain_order=True), ("", "_output", "_other"), strict=True
        ):
            lines = {line["active"]: line for line in figure.filter(target=target).to_dicts()}
            assert set(lines) == {
                "m other than 0",
                "m > 0",
                "at least 10 % of the largest",
            }  # all are other than 0
            for rule, silent in {
                "m other than 0": lambda row, of: row[f"agree{of}"] == 0,
                "m > 0": lambda row, of: row[f"agree_positive{of}"] == 0,
                "at least 10 % of the largest": lambda row, of: row[f"strongest{of}"] < 0.1,
            }.items():
                assert lines[rule]["value"] == pytest.approx(np.mean([silent(row, suffix) for row in rows]))
                null = np.mean([silent(row, "_permuted") for row in rows])
                assert lines[rule]["null"] == (None if suffix else pytest.approx(null))
    cases = findings["cases-of-agreement"].frame
    agreeing = [row for row in everything if row["agree"] > 0]
    stop = np.mean([words.pieces([row["ffn"]])[0].strip().lower() in STOP_WORDS for row in agreeing])
    short = np.mean([row["position"] + 1 < 5 for row in agreeing])
    lines = cases.filter(cases="any memory agrees")
    assert lines["n"].to_list() == [len(agreeing)] * 3
    assert (lines["value"][0], lines["value"][2]) == pytest.approx((stop, short))
    sweep = findings["zero-agreement-by-strength"].frame
    for least, value in sweep.select("threshold", "value").iter_rows():
        assert value == pytest.approx(np.mean([row["strongest"] < least for row in everything]), abs=1e-6)
    heard = findings["suppressed-memories"].frame.filter(word="first", layer=1)
    assert heard["value"][0] == pytest.approx(
        np.mean([row["ffn_rank_memory"] == 0 for row in rows_of(measured, "own", 1)])
    )


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=20))
def test_every_example_is_exactly_one_case(tokens: list[tuple[int, int, int]]) -> None:
    """Whatever three tokens are first, the case is the one that the paper's words give (A23)."""
    r, y, o = (np.array(column, float) for column in zip(*tokens, strict=True))
    expected = [by_case({"residual": a, "ffn": b, "output": c}) for a, b, c in tokens]
    assert [refinement.CASES[case] for case in refinement.cases(r, y, o)] == expected


def test_the_sheet_of_changes_hides_which_pairs_are_real(measured: Run) -> None:
    """Half of the items show another example's token, and only the key says which."""
    listed = refinement.changes(measured, lens="raw")
    assert listed.height >= 4
    sheet, key = ([json.loads(line) for line in part.splitlines()] for part in refinement.sheet(listed))
    assert len(sheet) == len(key) == listed.height
    assert sum(item["null"] for item in key) == listed.height // 2
    by_example = {row["example"]: row for row in listed.to_dicts()}
    for shown, truth in zip(sheet, key, strict=True):
        assert set(shown) == {"id", "text", "before", "after", "judgement"}
        row = by_example[truth["example"]]
        assert shown["after"] == row["other" if truth["null"] else "after"]
        assert (shown["text"], shown["before"]) == (row["text"], row["before"])
    assert refinement.sheet(listed) == refinement.sheet(listed)
    assert refinement.changes(measured, count=2, lens="raw").height == 2


def test_stop_words_are_lower_case_words() -> None:
    """The pinned list holds about 130 to 170 words; case and the space before a token do not matter (A27)."""
    assert 130 <= len(STOP_WORDS) <= 170
    assert all(word.isalpha() and word == word.casefold() for word in STOP_WORDS)
    texts = (" The", "of", " river", " (", "1990", "\n")
    assert [kind(text) for text in texts] == [
        "stop word",
        "stop word",
        "other",
        "punctuation",
        "other",
        "punctuation",
    ]


def test_who_asks_for_composition_gets_its_tables_measured() -> None:
    """Composition is answered from the tables of refinement, which is chosen with it; nothing else is."""
    assert [one.name for one in choose("composition")] == ["composition", "refinement"]
    assert [one.name for one in choose("distributions")] == ["distributions"]
