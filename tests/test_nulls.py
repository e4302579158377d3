"""Null units: drawn as they should be, computed as defined, and mined under the laws of neurons."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from effort import tries
from families import FAMILIES, VARIANTS, slow_but_for
from hypothesis import given
from hypothesis import strategies as st
from test_capture import padded, wrapped
from tiny import model_folder, texts, tokenizer
from torch import Tensor

from mnemoscope import build, load_model
from mnemoscope.errors import ActivationError, QueryError, RunCorrupt, RunError, RunMismatch
from mnemoscope.mine.statistics import RunStatistics
from mnemoscope.mine.verify import verify
from mnemoscope.model import nulls
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import KINDS, LayerSignals, NullColumns, Nulls, shuffled_copy
from mnemoscope.records import ContextBatch
from mnemoscope.run.reading import open_run

NULL_TABLES = ["null_neurons", "null_histograms", "null_triggers", "null_samples"]
MODELS = FAMILIES | {name: VARIANTS[name] for name in ("llama_biases", "falcon_new", "opt_no_bias")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Llama."""
    return load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")


def seen(model: Model, units: Nulls, batch: ContextBatch) -> list[dict[str, tuple[Tensor, ...]]]:
    """By layer: copies of inputs and coefficients, and of what each kind makes of them."""
    kept: list[dict[str, tuple[Tensor, ...]]] = []

    def receive(
        layer: int, m: Tensor, batch: ContextBatch, gate: Tensor | None, up: Tensor | None, inputs: Tensor
    ) -> None:
        assert layer == len(kept)
        found = units.columns(layer, batch, LayerSignals(inputs, m, gate, up))
        kept.append(
            {"model": (inputs.clone(), m.clone())}
            | {kind: tuple(x.clone() for x in columns if x is not None) for kind, columns in found.items()}
        )

    with Capture(model) as capture:
        capture.sweep(batch, receive)
    return kept


def keys(model: Model, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and biases of the first projections of a layer, the gate's first."""
    part = model.anatomy.layers[layer]
    found = [(part.keys(), part.key_bias()), (part.ups(), part.up_bias())]
    return [
        (rows, torch.zeros(len(rows)) if bias is None else bias) for rows, bias in found if rows is not None
    ]


# -- what they are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but_for(sorted(MODELS)))
def test_every_family_hands_out_what_its_keys_read(name: str) -> None:
    """From the captured inputs and the weights follow the captured coefficients (1e-5)."""
    model = wrapped(MODELS[name]())
    for layer, found in enumerate(seen(model, Nulls(model, ()), padded([7, 4, 6]))):
        inputs, coefficients = found["model"]
        products = [inputs @ rows.T + bias for rows, bias in keys(model, layer)]
        expected = model.anatomy.layers[layer].act(products[0].clone())
        if len(products) == 2:
            expected = expected * products[1]
        torch.testing.assert_close(coefficients, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_biases", "gpt2", "opt_no_bias", "phi3"])
def test_random_keys_are_as_long_as_real_ones_and_carry_their_biases(name: str) -> None:
    """Each pair of norms, with its biases, is that of one neuron of the layer; coefficients are as defined."""
    model = wrapped(MODELS[name]())
    units = Nulls(model, ["random"], count=12)
    source = units._sources["random"]
    assert isinstance(source, nulls._Random)
    for layer, found in enumerate(seen(model, units, padded([5, 9]))):
        parts = keys(model, layer)
        rows, biases = source._weight[layer, 0].split(12), source._bias[layer, 0].split(12)
        real = torch.cat([torch.stack([k.norm(dim=1), b], 1) for k, b in parts], 1)
        mine = torch.cat([torch.stack([k.norm(dim=1), b], 1) for k, b in zip(rows, biases, strict=True)], 1)
        nearest = (mine[:, None] - real).abs().amax(-1).min(1)
        assert nearest.values.max() < 1e-5
        assert len(nearest.indices.unique()) == 12, "the same neuron twice"
        products = [found["model"][0] @ k.T + b for k, b in zip(rows, biases, strict=True)]
        expected = model.anatomy.layers[layer].act(products[0].clone()) * (
            products[1] if len(products) == 2 else 1.0
        )
        torch.testing.assert_close(found["random"][0], expected, rtol=1e-5, atol=1e-5)
        for pre_activation, product in zip(found["random"][1:], products, strict=False):
            torch.testing.assert_close(pre_activation, product, rtol=1e-5, atol=1e-5)
        assert len(found["random"]) == (3 if model.anatomy.gated else 1)


def test_random_directions_are_isotropic() -> None:
    """Over many, the mean is zero and the covariance the identity over the width, within sampling error."""
    model = wrapped(FAMILIES["llama"]())
    drawn = [Nulls(model, ["random"], 40, seed)._sources["random"] for seed in range(40)]
    rows = torch.cat([source._weight[layer, 0] for source in drawn for layer in range(3)])  # type: ignore[attr-defined]
    rows = rows / rows.norm(dim=1, keepdim=True)
    n, width = rows.shape
    assert n == 40 * 3 * 80
    covariance = rows.T @ rows / n * width
    assert rows.mean(0).abs().max() * (n * width) ** 0.5 < 4.5
    assert (covariance - torch.eye(width)).abs().max() < 5 * (2 / n) ** 0.5


def test_rotated_columns_are_orthonormal_and_keep_all_that_there_is() -> None:
    """NullColumns are orthonormal; as many as there are neurons make a rotation, which keeps every length."""
    model = wrapped(FAMILIES["gpt2"]())
    for found in seen(model, Nulls(model, ["rotated"], model.anatomy.sizes[0]), padded([8, 3])):
        torch.testing.assert_close(
            found["rotated"][0].norm(dim=-1), found["model"][1].norm(dim=-1), rtol=1e-5, atol=1e-5
        )
        assert len(found["rotated"]) == 1, "a rotated column has no keys of its own"
    few = Nulls(model, ["rotated"], 9)
    weight = few._sources["rotated"]._weight  # type: ignore[attr-defined]
    for layer, found in enumerate(seen(model, few, padded([8, 3]))):
        torch.testing.assert_close(weight[layer, 0] @ weight[layer, 0].T, torch.eye(9), rtol=0, atol=1e-6)
        expected = found["model"][1] @ weight[layer, 0].T
        torch.testing.assert_close(found["rotated"][0], expected, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 99), count=st.integers(1, 6), extra=st.integers(0, 3))
def test_orthonormal_rows_span_what_was_given(seed: int, count: int, extra: int) -> None:
    """Gram and Schmidt: an orthonormal basis whose first k rows span the first k given, each on its own side."""
    given_rows = np.random.default_rng(seed).standard_normal((count, count + extra))
    rows = nulls._orthonormal(given_rows)
    assert np.allclose(rows @ rows.T, np.eye(count), atol=1e-12)
    upper = given_rows @ rows.T
    assert np.allclose(np.triu(upper, 1), 0, atol=1e-9)
    assert (np.diag(upper) > 0).all()


def test_rotations_are_uniform() -> None:
    """Every entry of a column has mean 0 and variance 1/n, the columns of no layer or seed being alike."""
    columns = np.stack(
        [nulls._orthonormal(nulls._generator(s, "rotated", 0).standard_normal((3, 8))) for s in range(2000)]
    )
    assert abs(columns.mean(0)).max() < 4.5 / np.sqrt(2000 * 8)
    assert abs((columns**2).mean(0) * 8 - 1).max() < 0.15


@pytest.mark.parametrize("name", ["gpt2", "llama_biases", "phi3", "cohere"])
def test_a_shuffled_copy_keeps_entries_norms_biases_and_embeddings(name: str) -> None:
    """Each matrix of each block has the same entries elsewhere; nothing else differs, nor does the model itself."""
    model = wrapped(MODELS[name]())
    before = {key: value.clone() for key, value in model.hf.state_dict().items()}
    copied = shuffled_copy(model, seed=3)
    after = copied.hf.state_dict()
    blocks = {id(p) for layer in model.anatomy.layers for p in layer.module.parameters() if p.ndim == 2}
    moved = [key for key, p in model.hf.named_parameters() if id(p) in blocks]
    assert len(moved) >= 4 * model.anatomy.n_layers
    for key, value in model.hf.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(value.flatten().sort().values, after[key].flatten().sort().values)
        assert torch.equal(value, after[key]) == (key not in moved), key
    assert copied.anatomy.layers[0].down is not model.anatomy.layers[0].down
    assert copied.anatomy.layers[0].down in list(copied.hf.modules())


def test_shuffled_units_are_neurons_of_the_shuffled_copy(model: Model) -> None:
    """What is handed out beside a batch is what the copy computes on it for the drawn neurons."""
    batch = padded([6, 9, 4])
    units = Nulls(model, ["shuffled"], 5, seed=2)
    copied = shuffled_copy(model, 2)
    chosen = units._sources["shuffled"]._chosen  # type: ignore[attr-defined]
    expected = seen(copied, Nulls(copied, ()), batch)
    for again in (batch, batch, ContextBatch(batch.contexts, batch.tokens, batch.lengths, batch.counted)):
        for layer, found in enumerate(seen(model, units, again)):  # each time anew
            columns = NullColumns(*found["shuffled"])
            assert torch.equal(columns.coefficients, expected[layer]["model"][1][..., chosen[layer]])
            assert columns.gate is not None and columns.up is not None
            torch.testing.assert_close(
                model.anatomy.layers[layer].act(columns.gate) * columns.up,
                columns.coefficients,
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.parametrize("name", ["llama_biases", "phi3", "falcon_new", "gpt2", "opt_no_bias"])
def test_decoys_are_as_defined(name: str) -> None:
    """A chimera has a neuron's own gate with another's up, in a plain layer the mean of two other keys; a direction of
    kind covariance is a signed sum of many keys. Told one by one, from the weights."""
    model = wrapped(MODELS[name]())
    units, neurons = Nulls(model, nulls.DECOYS), model.anatomy.sizes[0]
    for layer, found in enumerate(seen(model, units, padded([5, 9]))):
        for kind in nulls.DECOYS:
            source = units._sources[kind]
            if kind == "chimera" and model.anatomy.gated:
                (shift, *_) = source._shifts[layer, 0]  # type: ignore[attr-defined]
                (gates, a), (ups, b) = keys(model, layer)
                rows = [
                    (gates[i], a[i], ups[(i + shift) % neurons], b[(i + shift) % neurons])
                    for i in range(neurons)
                ]
            else:
                drawn = nulls._generator(0, kind, layer)
                shifts = nulls._shifts(drawn, neurons, 2 if kind == "chimera" else nulls._SUMMED)
                signs = np.ones((len(shifts), neurons))
                if kind == "covariance":
                    signs = drawn.choice([-1.0, 1.0], signs.shape)
                assert 0 not in shifts % neurons and len(set(shifts.tolist())) == len(shifts)
                rows = []
                for i in range(neurons):
                    row = []
                    for weight, bias in keys(model, layer):
                        whole = torch.cat([weight, bias[:, None]], 1).double()
                        mean = whole.mean(0)
                        terms = [
                            s * (whole[(i + shift) % neurons] - mean)
                            for shift, s in zip(shifts, signs[:, i], strict=True)
                        ]
                        mixed = mean + sum(terms) / len(shifts) ** 0.5
                        row += [mixed[:-1].float(), mixed[-1].float()]
                    rows.append(tuple(row))
            inputs = found["model"][0]
            for i, parts in enumerate(rows):
                expected = model.anatomy.layers[layer].act(inputs @ parts[0] + parts[1])
                if len(parts) == 4:
                    expected = expected * (inputs @ parts[2] + parts[3])
                torch.testing.assert_close(found[kind][0][..., i], expected, rtol=2e-4, atol=2e-5)
            assert len(found[kind]) == (3 if model.anatomy.gated else 1)


@given(seed=st.integers(0, 999), neurons=st.integers(2, 30), width=st.integers(1, 5))
def test_mixed_keys_keep_the_mean_and_the_covariance(seed: int, neurons: int, width: int) -> None:
    """Over all draws of signs, and over all shifts, a mixture has the mean and the covariance of the keys: exactly,
    because each term of every pair of signs meets the other."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((neurons, width)) @ generator.standard_normal((width, width)) + 3
    shifts = nulls._shifts(generator, neurons, 4)
    count = len(shifts)
    every = np.array(np.meshgrid(*[[-1.0, 1.0]] * count)).reshape(count, -1).T  # all signs
    drawn = np.concatenate(
        [nulls._mixed(rows, shifts, np.repeat(signs[:, None], neurons, 1)) for signs in every]
    )
    assert np.allclose(drawn.mean(0), rows.mean(0))
    about, original = drawn - drawn.mean(0), rows - rows.mean(0)
    assert np.allclose(about.T @ about / len(drawn), original.T @ original / neurons)


def test_the_same_recipe_makes_the_same_units_and_another_seed_others(model: Model) -> None:
    """Of each kind, whatever kinds are beside it and in whatever order they are named."""
    batch = padded([6, 5])

    def made(kinds: list[str], seed: int = 0) -> list[dict[str, tuple[Tensor, ...]]]:
        return seen(model, Nulls(model, kinds, 6, seed), batch)

    together = made(list(KINDS))
    for kind in KINDS:
        alone, other = made([kind]), made([kind], seed=1)
        for layer in range(model.anatomy.n_layers):
            assert torch.equal(together[layer][kind][0], alone[layer][kind][0])
            assert not torch.equal(alone[layer][kind][0], other[layer][kind][0])
    assert Nulls(model, ["rotated", "random"]).recipe == Nulls(model).recipe
    again = Nulls.of(model, Nulls(model, KINDS, 6, 4).recipe)
    assert again.recipe == {"kinds": list(KINDS), "count": 6, "seed": 4}
    assert Nulls.of(model, None).kinds == ()


def test_of_one_place_there_are_the_same_units_and_no_others(model: Model) -> None:
    """A question about one layer makes the null units of that layer alone."""
    batch = padded([6, 5])
    every, here = (Nulls(model, KINDS, 6, at=at) for at in (None, (1, 0)))
    assert here.sizes == {
        kind: (0, sizes[1], *(0,) * (len(sizes) - 2)) for kind, sizes in every.sizes.items()
    }
    kept: dict[bool, dict[str, Tensor]] = {}

    def receive(layer: int, m: Tensor, batch: ContextBatch, gate: Tensor, up: Tensor, inputs: Tensor) -> None:
        for units in (every, here) if layer == 1 else ():
            found = units.columns(layer, batch, LayerSignals(inputs, m, gate, up))
            kept[units is here] = {kind: columns.coefficients.clone() for kind, columns in found.items()}

    with Capture(model) as capture:
        capture.sweep(batch, receive)
    for kind in KINDS:
        assert torch.equal(kept[True][kind], kept[False][kind])


def test_no_more_units_than_neurons(model: Model) -> None:
    """A small layer has as many null units as neurons."""
    assert (
        set(Nulls(model, KINDS).sizes.values()) == {model.anatomy.sizes} == {(40,) * model.anatomy.n_layers}
    )
    assert {kind: set(sizes) for kind, sizes in Nulls(model, KINDS, 7).sizes.items()} == {
        "random": {7}, "rotated": {7}, "shuffled": {7}, "chimera": {40}, "covariance": {40}
    }  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("width", [1, 511, 512, 513, 1536])
def test_products_by_blocks_equal_whole_ones(rows: int, width: int) -> None:
    """To rounding, for every remainder."""
    generator = torch.Generator().manual_seed(width)
    x, keys = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, 7))
    torch.testing.assert_close(nulls._product(x, keys), x @ keys.T)


@pytest.mark.parametrize("width", [576, 1536, 4096])
def test_the_number_of_threads_does_not_show(width: int) -> None:
    """A product of many inputs with few keys has the same bits with one thread as with two."""
    x, rows = torch.randn(300, width), torch.randn(64, width)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(nulls._product(x, rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# -- how they are mined --------------------------------------------------------------------------------------


def mined(model: Model, units: Nulls, batches: list[ContextBatch], shards: list[int]) -> RunStatistics:
    """A state that was given one batch for each of these shards."""
    state = RunStatistics.of(model, units, 4)
    with Capture(model) as capture:
        for shard in shards:
            capture.sweep(batches[shard], state.update)
            state.finish_shard(shard)
    return state


def rows_of(state: RunStatistics) -> list[dict[str, list[dict[str, object]]]]:
    """All tables of all layers, as plain rows."""
    return [
        {name: table.to_pylist() for name, table in state.tables(layer).items()}
        for layer in state.neurons.cells.layers
    ]


@pytest.mark.slow
@tries(8)
@given(data=st.data())
def test_any_split_and_order_gives_the_same_rows(data: st.DataObject) -> None:
    """Shards shared out over states that are saved, loaded and merged in any order, equal one pass."""
    model = wrapped(FAMILIES["llama"]())
    units = Nulls(model, KINDS, 5)
    batches = [
        ContextBatch(b.contexts + 10 * shard, b.tokens, b.lengths, b.counted)
        for shard, b in enumerate(padded([3 + shard, 6], seed=shard) for shard in range(5))
    ]
    whole = rows_of(mined(model, units, batches, list(range(5))))
    order = data.draw(st.permutations(range(5)))
    cut = data.draw(st.integers(1, 4))
    parts = [mined(model, units, batches, some) for some in (order[:cut], order[cut:])]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        parts[0].save(Path(folder) / "state.npz")
        parts[0] = RunStatistics.load(units, Path(folder) / "state.npz")
    first, second = parts if data.draw(st.booleans()) else parts[::-1]
    first.merge(second)
    assert first.shards == frozenset(range(5))
    assert rows_of(first) == whole


def test_states_of_other_nulls_do_not_mix(model: Model, tmp_path: Path) -> None:
    """Merging is refused before anything has changed; a state without the nulls asked for is damaged."""
    batches = [padded([5]), padded([6])]
    one = mined(model, Nulls(model, ["random"], 5), batches, [0])
    other = mined(model, Nulls(model, ["random"], 5, seed=1), batches, [1])
    with pytest.raises(RunMismatch, match="nulls are"):
        one.merge(other)
    assert one.shards == {0}
    with pytest.raises(RunError, match="shard 0"):
        one.merge(mined(model, Nulls(model, ["random"], 5), batches, [0]))
    one.save(tmp_path / "state.npz")
    with pytest.raises(RunCorrupt):
        RunStatistics.load(Nulls(model), tmp_path / "state.npz")


def test_a_null_that_is_not_finite_is_said_to_be_one(model: Model) -> None:
    """The message names the kind, so that nobody looks for a fault in a neuron."""

    class Broken:
        def columns(self, layer: int, batch: ContextBatch, signals: LayerSignals) -> NullColumns:
            return NullColumns(torch.full((*signals.coefficients.shape[:2], 40), float("inf")))

    units = Nulls(model, ["rotated"])
    units._sources["rotated"] = Broken()
    with (
        pytest.raises(ActivationError, match=r"null units of kind rotated, .*L0N0"),
        Capture(model) as capture,
    ):
        capture.sweep(padded([4]), RunStatistics.of(model, units, 3).update)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_null_tables_equal_the_definition(family: str, tmp_path: Path) -> None:
    """Moments and triggers of every null unit of a run, from all coefficients at once, context by context."""
    model = load_model(FAMILIES[family](), tokenizer=tokenizer())
    run = build(model, texts(25), tmp_path / "run", top=5, nulls=KINDS)
    units = Nulls.of(model, run.manifest.options["nulls"])
    special = set(run.manifest.options["special"])
    columns: dict[tuple[str, int], list[np.ndarray]] = {}
    places: list[tuple[int, int]] = []
    for row in run.table("contexts").collect().iter_rows(named=True):
        tokens = np.array([row["tokens"]], np.int32)
        counted = np.array([[p > 0 and t not in special for p, t in enumerate(row["tokens"])]])
        batch = ContextBatch(
            np.array([row["context"]]), tokens, np.array([tokens.shape[1]], np.int32), counted
        )
        places += [(row["context"], int(position)) for position in np.flatnonzero(counted[0])]
        for layer, found in enumerate(seen(model, units, batch)):
            for kind in KINDS:
                columns.setdefault((kind, layer), []).append(found[kind][0][0].numpy()[counted[0]])
    where = np.array(places)
    assert set(run.table("null_neurons").collect()["kind"]) == set(KINDS)
    for (kind, layer), parts in columns.items():
        values = np.concatenate(parts).astype(np.float64)
        here = (pl.col("kind") == kind) & (pl.col("layer") == layer)
        moments = run.table("null_neurons").filter(here).collect()
        assert moments["neuron"].to_list() == list(range(units.sizes[kind][layer]))
        assert set(moments["tokens"]) == {len(values)}
        for name, expected in {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
        }.items():
            np.testing.assert_allclose(moments[name].to_numpy(), expected, rtol=1e-4, atol=1e-5)
        triggers = run.table("null_triggers").filter(here & (pl.col("rank") == 0)).collect()
        for unit in range(0, units.sizes[kind][layer], 7):
            for polarity in (1, -1):
                best = (polarity * values[:, unit]).argmax()
                if polarity * values[best, unit] <= 1e-6:
                    continue
                first = triggers.filter((pl.col("neuron") == unit) & (pl.col("polarity") == polarity)).row(
                    0, named=True
                )
                assert first["coefficient"] == pytest.approx(values[best, unit], rel=1e-4)
                # Near ties may be told apart otherwise in a batch; the place must hold the value all the same.
                row = (where == (first["context"], first["position"])).all(1).argmax()
                assert values[row, unit] == pytest.approx(first["coefficient"], rel=1e-4)
                keyless = kind == "rotated" or not model.anatomy.gated
                assert (first["gate_sign"] is None) == keyless
    counts = run.table("null_histograms").select(pl.col("counts").list.sum()).collect()["counts"]
    assert counts.n_unique() == 1 and counts[0] > 0
    again = verify(run, model, sample=5)
    assert again.passed
    exact = [check for check in again.checks if "null units" in check.name]
    assert len(exact) >= 2 and exact[0].compared > 1000
    assert all(check.largest < 1e-5 for check in exact)


def test_a_unit_is_looked_up_like_a_neuron(model: Model, tmp_path: Path) -> None:
    """By layer and neuron, the rows of all kinds; what is in a table is what the manifest says is there."""
    run = build(model, texts(20), tmp_path / "run", top=3)
    assert run.manifest.options["nulls"] == {"kinds": ["random", "rotated"], "count": 40, "seed": 0}
    for table in NULL_TABLES:
        rows = run.rows(table, 1, 7)
        expected = run.table(table).filter((pl.col("layer") == 1) & (pl.col("neuron") == 7)).collect()
        assert rows.equals(expected)
        assert rows["kind"].unique().sort().to_list() == ["random", "rotated"]


def test_a_run_without_nulls_is_whole(model: Model, tmp_path: Path) -> None:
    """No tables, every other table the same bit for bit, and a question about them says what to do."""
    plain, full = (
        build(model, texts(20), tmp_path / "plain", nulls=()),
        build(model, texts(20), tmp_path / "f"),
    )
    assert not set(NULL_TABLES) & set(plain.manifest.tables)
    assert set(full.manifest.tables) - set(plain.manifest.tables) == set(NULL_TABLES)
    for name, entry in plain.manifest.tables.items():
        assert entry == full.manifest.tables[name]
    with pytest.raises(QueryError, match="--nulls random,rotated"):
        plain.table("null_triggers")
    assert verify(plain, model, sample=5).passed


def test_other_nulls_are_another_run(model: Model, tmp_path: Path) -> None:
    """A finished run and an unfinished one are refused when the kinds differ, and left as they were."""
    make = partial(build, model, texts(20))
    make(tmp_path / "run", nulls=["random"])
    with pytest.raises(
        RunMismatch, match=r"nulls.kinds = random, and nulls.kinds = random, rotated was given"
    ):
        make(tmp_path / "run")
    with pytest.raises(RunMismatch, match=r"nulls = none"):
        make(tmp_path / "run", nulls=())
    assert open_run(tmp_path / "run").check() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mnemoscope.mine.build.Build._write", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "begun", nulls=["rotated"])
    with pytest.raises(RunMismatch, match="nulls"):
        make(tmp_path / "begun", nulls=["random"])
    assert "null_triggers" in make(tmp_path / "begun", nulls=["rotated"]).manifest.tables


def test_an_unknown_kind_is_one_line_and_costs_nothing(model: Model, tmp_path: Path) -> None:
    """It says which was given and which there are, and no folder appears."""
    with pytest.raises(
        RunError, match=r"'radnom' in nulls=.* is not a kind of them; give some of random, rotated, shuffled"
    ):
        build(model, texts(5), tmp_path / "run", nulls=["random", "radnom"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nulls_are_the_same_whatever_the_workers(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds, one and two processes, several shards: the tables have the same sha256."""
    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 200)
    runs = [
        build(model, texts(40), tmp_path / str(workers), top=5, nulls=KINDS, workers=workers)
        for workers in (1, 2)
    ]
    one, two = ({name: entry.sha256 for name, entry in run.manifest.tables.items()} for run in runs)
    assert one == two
    assert set(NULL_TABLES) <= set(one)
