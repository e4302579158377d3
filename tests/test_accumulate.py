"""The laws of the accumulators, each against a naive definition in numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from effort import tries
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.errors import ActivationError, RunCorrupt, RunError, RunMismatch
from mnemoscope.mine.places import (
    HISTOGRAM_EDGES,
    HISTOGRAM_EVERY,
    CountedPlaces,
    address_of,
    bin_of,
    coarse_bin_of,
    selected,
    unmix,
)
from mnemoscope.mine.scan import scan
from mnemoscope.mine.statistics import NeuronStatistics, load_state, save_state
from mnemoscope.records import ContextBatch
from mnemoscope.text.sampling import splitmix64

EXACT = ["histograms", "triggers", "samples"]
EVERY = 2  # so that small corpora have selected contexts


@dataclass
class Context:
    """One context: its true tokens, and the coefficients, gates and ups at each of them."""

    id: int
    tokens: np.ndarray
    counted: np.ndarray
    coefficients: np.ndarray  # f32[layer token neuron], as are gates and ups
    gates: np.ndarray
    ups: np.ndarray


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "heavy tails": lambda r, s: r.standard_normal(s) ** 3,
    "many ties": lambda r, s: r.choice([-1.0, -0.5, 0.0, 0.5, 1.0], s),
    "dead after a ReLU": lambda r, s: np.where(r.random(s) < 0.02, r.random(s), 0.0),
    "all zero, of both signs": lambda r, s: r.choice([0.0, -0.0], s),
    "all negative": lambda r, s: -r.random(s) - 0.01,
    "constant": lambda r, s: np.full(s, 0.37),
    "extreme sizes": lambda r, s: r.choice([-1.0, 1.0], s) * 2.0 ** r.integers(-40, 40, s),
}


def corpus(
    seed: int, contexts: int, layers: int = 2, neurons: int = 5, longest: int = 11, kind: str = "heavy tails"
) -> list[Context]:
    """Random contexts of all lengths from 1; a tenth of the tokens are special. Values are exact in bf16."""
    r = np.random.default_rng(seed)
    found = []
    for id in range(contexts):
        length = int(r.integers(1, longest + 1))
        counted = r.random(length) < 0.9
        counted[0] = False
        parts = [KINDS[kind](r, (layers, length, neurons)), *r.integers(-1, 2, (2, layers, length, neurons))]
        exact = [torch.from_numpy(np.asarray(part, np.float32)).bfloat16().float().numpy() for part in parts]
        found.append(Context(id, r.integers(0, 1000, length).astype(np.int32), counted, *exact))
    return found


def batch_of(contexts: Sequence[Context]) -> ContextBatch:
    """Right-padded."""
    lengths = np.array([len(c.tokens) for c in contexts], np.int32)
    tokens = np.zeros((len(contexts), lengths.max()), np.int32)
    counted = np.zeros(tokens.shape, bool)
    for row, c in enumerate(contexts):
        tokens[row, : len(c.tokens)], counted[row, : len(c.tokens)] = c.tokens, c.counted
    return ContextBatch(np.array([c.id for c in contexts]), tokens, lengths, counted)


def tensors(contexts: Sequence[Context], layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Coefficients, gates, ups of one layer; NaN wherever nothing counts, so that reading there would show."""
    batch = batch_of(contexts)
    found = []
    for name in ("coefficients", "gates", "ups"):
        padded = np.full((*batch.tokens.shape, contexts[0].gates.shape[2]), np.nan, np.float32)
        for row, c in enumerate(contexts):
            padded[row, : len(c.tokens)][c.counted] = getattr(c, name)[layer][c.counted]
        found.append(torch.from_numpy(padded).to(dtype))
    return found


def feed(
    statistics: NeuronStatistics, contexts: Sequence[Context], size: int, dtype: torch.dtype = torch.float32
) -> None:
    """All layers of the contexts, in batches of `size`."""
    for chunk in _chunks(contexts, size):
        batch = batch_of(chunk)
        for layer in range(len(statistics.cells.sizes)):
            coefficients, gates, ups = tensors(chunk, layer, dtype)
            statistics.update(layer, coefficients, batch, gates, ups)


def _chunks(contexts: Sequence[Context], size: int) -> Iterator[Sequence[Context]]:
    for start in range(0, len(contexts), size):
        yield contexts[start : start + size]


def fresh(contexts: Sequence[Context], top: int = 4) -> NeuronStatistics:
    """An empty state of the shape of these contexts."""
    layers, _, neurons = contexts[0].coefficients.shape
    return NeuronStatistics((neurons,) * layers, top, EVERY)


def mined(contexts: Sequence[Context], size: int = 3, top: int = 4, shard: int = 0) -> NeuronStatistics:
    """A state that has seen these contexts as one shard."""
    statistics = fresh(contexts, top)
    feed(statistics, contexts, size)
    statistics.finish_shard(shard)
    return statistics


def tables_of(statistics: NeuronStatistics) -> dict[str, pa.Table]:
    """All rows of all five tables."""
    layers = [statistics.results(layer) for layer in range(len(statistics.cells.sizes))]
    tables = {name: pa.concat_tables([tables[name] for tables in layers]) for name in layers[0]}
    return {**tables, "shards": statistics.shard_rows()}


def counted(contexts: Sequence[Context], layer: int, neuron: int) -> list[tuple[float, Context, int]]:
    """(coefficient, context, position) of everything that counts: the naive view."""
    return [
        (float(c.coefficients[layer, position, neuron]), c, int(position))
        for c in contexts
        for position in np.flatnonzero(c.counted)
    ]


def next_token(c: Context, position: int) -> int | None:
    """The token after it, if there is one."""
    return int(c.tokens[position + 1]) if position + 1 < len(c.tokens) else None


corpora = st.builds(
    corpus,
    seed=st.integers(0, 10_000),
    contexts=st.integers(1, 24),
    neurons=st.sampled_from([1, 3, 17]),
    kind=st.sampled_from(sorted(KINDS)),
)
few = tries(25)


# -- each against its definition --------------------------------------------------------------------------------


@few
@given(corpora, st.integers(1, 6))
def test_triggers_are_the_first_k_of_a_full_sort(contexts: list[Context], k: int) -> None:
    """One per context and polarity, ties to the lower context and the earlier position, no fillers."""
    expected = []
    layers, _, neurons = contexts[0].coefficients.shape
    for layer, neuron, polarity in itertools.product(range(layers), range(neurons), (1, -1)):
        seen: set[int] = set()
        rank = 0
        # The sort is by |coefficient| down, context up, position up.
        for m, c, position in sorted(
            counted(contexts, layer, neuron), key=lambda t: (-polarity * t[0], t[1].id, t[2])
        ):
            if polarity * m <= 0 or c.id in seen or rank == k:
                continue
            seen.add(c.id)
            signs = (int(c.gates[layer, position, neuron]), int(c.ups[layer, position, neuron]))
            expected.append(
                (layer, neuron, polarity, rank, m, c.id, position, next_token(c, position), *signs)
            )
            rank += 1
    table = tables_of(mined(contexts, top=k))["triggers"]
    assert list(zip(*table.to_pydict().values(), strict=True)) == expected


@few
@given(corpora)
def test_histograms_count_the_selected_contexts(contexts: list[Context]) -> None:
    """Each selected, counted coefficient in its bin, and no other."""
    table = tables_of(mined(contexts))["histograms"]
    chosen = [c for c in contexts if selected(np.array([c.id]), EVERY)[0]]
    for row in table.to_pylist():
        values = np.array([m for m, _, _ in counted(chosen, row["layer"], row["neuron"])])
        expected = np.bincount(bin_of(values), minlength=193) if len(values) else np.zeros(193, int)
        assert row["counts"] == expected.tolist()


@few
@given(corpora)
def test_samples_are_places_of_their_bin(contexts: list[Context]) -> None:
    """Every part of the range that has a selected coefficient has one sample, and it is truly there."""
    chosen = [c for c in contexts if selected(np.array([c.id]), EVERY)[0]]
    rows = tables_of(mined(contexts))["samples"].to_pylist()
    found = {(row["layer"], row["neuron"], row["bin"]) for row in rows}
    layers, _, neurons = contexts[0].coefficients.shape
    expected = {
        (layer, neuron, int(coarse_bin_of(np.array(m))))
        for layer, neuron in itertools.product(range(layers), range(neurons))
        for m, _, _ in counted(chosen, layer, neuron)
    }
    assert found == expected
    assert len(rows) == len(found)
    for row in rows:
        c = contexts[row["context"]]
        assert selected(np.array([c.id]), EVERY)[0]
        assert c.counted[row["position"]]
        assert c.coefficients[row["layer"], row["position"], row["neuron"]] == row["coefficient"]
        assert row["bin"] == coarse_bin_of(np.array(row["coefficient"]))
        assert row["next_token"] == next_token(c, row["position"])


@few
@given(corpora)
def test_moments_are_those_of_a_two_pass_computation(contexts: list[Context]) -> None:
    """Mean and std to 1e-5 relative, skewness and kurtosis to 1e-3; null for constants, NaN without tokens."""
    for row in tables_of(mined(contexts))["neurons"].to_pylist():
        x = np.array([m for m, _, _ in counted(contexts, row["layer"], row["neuron"])])
        assert row["tokens"] == len(x)
        if len(x):
            check_moments(row, x)
        else:
            assert np.isnan([row[name] for name in ("mean", "std", "min", "max", "positive_fraction")]).all()


def check_moments(row: dict[str, float | None], x: np.ndarray) -> None:
    """The moment columns of a neuron against its coefficients."""
    assert (row["min"], row["max"]) == (x.min(), x.max())
    assert row["positive_fraction"] == pytest.approx((x > 0).mean(), rel=1e-12)
    d = x - x.mean()
    assert row["mean"] == pytest.approx(x.mean(), rel=1e-5, abs=1e-9 * np.abs(x).max())
    if x.min() == x.max():
        assert (row["std"], row["skewness"], row["kurtosis"]) == (0.0, None, None)
        return
    variance = (d**2).mean()
    assert row["std"] == pytest.approx(variance**0.5, rel=1e-5)
    assert row["skewness"] == pytest.approx((d**3).mean() / variance**1.5, rel=1e-3, abs=1e-6)
    assert row["kurtosis"] == pytest.approx((d**4).mean() / variance**2 - 3, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("outlier", [False, True])
def test_a_mean_far_from_zero_costs_no_precision(ratio: float, outlier: bool) -> None:
    """Mean 100 and 10,000 times the spread, with a first coefficient that is typical or far out."""
    r = np.random.default_rng(0)
    contexts = corpus(0, 64, layers=1, neurons=3, longest=40)
    for c in contexts:
        c.coefficients = np.float32(ratio + r.standard_normal(c.coefficients.shape))
    if outlier:
        first = next(c for c in contexts if c.counted.any())
        first.coefficients[0, np.flatnonzero(first.counted)[0]] = ratio + 60
    statistics = fresh(contexts)
    for shard, chunk in enumerate(_chunks(contexts, 10)):
        feed(statistics, chunk, 4)
        statistics.finish_shard(shard)
    for row in tables_of(statistics)["neurons"].to_pylist():
        check_moments(row, np.array([m for m, _, _ in counted(contexts, 0, row["neuron"])]))


@few
@given(corpora, st.integers(1, 5))
def test_shard_rows_are_raw_power_sums_of_each_shard(contexts: list[Context], size: int) -> None:
    """Contexts, counted tokens, and sums over all neurons of the layer."""
    statistics = fresh(contexts)
    chunks = list(_chunks(contexts, size))
    for shard, chunk in enumerate(chunks):
        feed(statistics, chunk, 2)
        statistics.finish_shard(shard)
    rows = statistics.shard_rows().to_pylist()
    assert [(row["shard"], row["layer"]) for row in rows] == list(
        itertools.product(range(len(chunks)), range(len(statistics.cells.sizes)))
    )
    for row in rows:
        chunk = chunks[row["shard"]]
        x = np.concatenate([c.coefficients[row["layer"]][c.counted].ravel() for c in chunk]).astype(
            np.float64
        )
        assert row["contexts"] == len(chunk)
        assert row["tokens"] == sum(int(c.counted.sum()) for c in chunk)
        for power, name in enumerate(("sum", "sum_squares", "sum_cubes", "sum_fourths"), 1):
            assert row[name] == pytest.approx(
                (x**power).sum(), rel=1e-9, abs=1e-9 * (np.abs(x) ** power).sum()
            )


# -- laws over all accumulators ---------------------------------------------------------------------------------


def equal(one: dict[str, pa.Table], other: dict[str, pa.Table], names: Sequence[str] = ()) -> None:
    """Bit for bit; NaN is NaN."""
    for name in names or one:
        for column in one[name].column_names:
            a, b = one[name][column].combine_chunks(), other[name][column].combine_chunks()
            assert len(a) == len(b), (name, column)
            if pa.types.is_floating(a.type):
                a, b = a.to_numpy(zero_copy_only=False), b.to_numpy(zero_copy_only=False)
                assert a.tobytes() == b.tobytes(), (name, column)
            else:
                assert a.equals(b), (name, column)


@few
@given(corpora, st.integers(1, 24), st.integers(1, 24), st.randoms(use_true_random=False))
def test_any_chunking_gives_the_same(contexts: list[Context], size: int, shard_size: int, random) -> None:  # type: ignore[no-untyped-def]
    """Batches of any size in any order, shards of any size: all but the moments' last bits."""
    expected = tables_of(mined(contexts, 3))
    shuffled = random.sample(contexts, len(contexts))
    statistics = fresh(contexts)
    for shard, chunk in enumerate(_chunks(shuffled, shard_size)):
        feed(statistics, chunk, size)
        statistics.finish_shard(shard)
    found = tables_of(statistics)
    equal(expected, found, EXACT)
    for name in ("tokens", "min", "max", "positive_fraction"):
        assert np.array_equal(expected["neurons"][name], found["neurons"][name], equal_nan=True), name
    for name in ("mean", "std"):
        scale = np.abs(np.nan_to_num(expected["neurons"]["max"])) + np.abs(
            np.nan_to_num(expected["neurons"]["min"])
        )
        difference = np.nan_to_num(np.subtract(expected["neurons"][name], found["neurons"][name]))
        assert (np.abs(difference) <= 1e-9 * scale).all(), name


@few
@given(corpora, st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_shards_merge_to_the_same_bits_whoever_did_them(  # type: ignore[no-untyped-def]
    contexts: list[Context], shard_size: int, workers: int, random
) -> None:
    """Any assignment of shards to workers, any order, any order of merging: every bit of every table."""
    shards = list(enumerate(_chunks(contexts, shard_size)))
    alone = fresh(contexts)
    for shard, chunk in shards:
        feed(alone, chunk, 3)
        alone.finish_shard(shard)
    states = [fresh(contexts) for _ in range(workers)]
    for shard, chunk in random.sample(shards, len(shards)):
        mine = random.choice(states)
        feed(mine, chunk, 3)
        mine.finish_shard(shard)
    random.shuffle(states)
    while len(states) > 1:
        states[0].merge(states.pop(random.randrange(1, len(states))))
    assert states[0].shards == alone.shards == frozenset(range(len(shards)))
    equal(tables_of(alone), tables_of(states[0]))


@few
@given(contexts=corpora, cut=st.integers(0, 24))
def test_saving_and_loading_in_the_middle_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, contexts: list[Context], cut: int
) -> None:
    """Interrupted after any shard and continued from the file: every bit of every table, and of the file."""
    file = tmp_path_factory.mktemp("state") / "state.npz"
    whole, statistics = fresh(contexts), fresh(contexts)
    for shard, chunk in enumerate(_chunks(contexts, 2)):
        if shard == cut:
            save_state(file, statistics.state())
            statistics = load_state(file, NeuronStatistics.of)
        for state in (whole, statistics):
            feed(state, chunk, 2)
            state.finish_shard(shard)
    equal(tables_of(whole), tables_of(statistics))
    assert whole.shards == statistics.shards


@few
@given(corpora)
def test_bf16_is_read_as_it_is(contexts: list[Context]) -> None:
    """The same numbers in bf16 and in fp32 give every bit the same."""
    expected = tables_of(mined(contexts))
    half = fresh(contexts)
    feed(half, contexts, 3, torch.bfloat16)
    half.finish_shard(0)
    equal(expected, tables_of(half))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    """One thread or several: every bit of every table."""
    contexts = corpus(1, 60, layers=1, neurons=300, longest=30)
    alone = tables_of(mined(contexts, 20))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shared = tables_of(mined(contexts, 20))
    finally:
        torch.set_num_threads(before)
    equal(alone, shared)


def test_layers_without_a_gate_have_no_signs() -> None:
    """Both sign columns are null."""
    contexts = corpus(0, 10, layers=1)
    statistics = fresh(contexts)
    statistics.update(0, tensors(contexts, 0, torch.float32)[0], batch_of(contexts))
    statistics.finish_shard(0)
    table = tables_of(statistics)["triggers"]
    assert table.num_rows > 0
    assert table["gate_sign"].null_count == table["up_sign"].null_count == table.num_rows


def test_fp16_is_read_through_fp32() -> None:
    """Another float dtype gives what its fp32 copy gives."""
    contexts = corpus(0, 10, kind="many ties")
    half = fresh(contexts)
    feed(half, contexts, 3, torch.float16)
    half.finish_shard(0)
    equal(tables_of(mined(contexts)), tables_of(half))


# -- bins, selection and draws ----------------------------------------------------------------------------------


def test_bins_are_half_open_towards_zero() -> None:
    """An edge belongs to the bin that lies further from zero; 193 bins between 194 ascending edges."""
    assert len(HISTOGRAM_EDGES) == 194
    assert (np.diff(HISTOGRAM_EDGES) > 0).all()
    inner = HISTOGRAM_EDGES[1:-1]
    for index, edge in enumerate(inner, 1):
        inside, outside = np.nextafter(edge, 0), np.nextafter(edge, np.sign(edge) * np.inf)
        beyond, before = (index, index - 1) if edge > 0 else (index - 1, index)
        assert bin_of(np.array([edge, outside, inside])).tolist() == [beyond, beyond, before]
    assert bin_of(np.array([-1e30, 0.0, -0.0, 1e-30, 1e30])).tolist() == [0, 96, 96, 96, 192]
    assert inner[96:104].tolist() == [2**-12 * x for x in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5)]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_number_lies_between_the_edges_of_its_bin(x: float) -> None:
    """For all fp32 numbers; and a coarse bin is two octaves of histogram bins."""
    index = int(bin_of(np.array([x]))[0])
    low, high = HISTOGRAM_EDGES[index : index + 2]
    assert low <= x <= high
    coarse = int(coarse_bin_of(np.array([x]))[0])
    assert coarse == (index // 8 if index < 96 else 12 if index == 96 else (index + 7) // 8)


def test_selection_takes_one_context_of_every_few() -> None:
    """Exactly one of each group of consecutive ids, at each place equally often, whatever the batch."""
    ids = np.arange(8_000)
    chosen = selected(ids)
    assert chosen.reshape(-1, HISTOGRAM_EVERY).sum(1).tolist() == [1] * 1_000
    places = np.bincount(ids[chosen] % HISTOGRAM_EVERY)
    assert ((places - 125) ** 2 / 125).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001
    assert np.array_equal(selected(ids[::-7]), chosen[::-7])


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**21 - 1))
def test_a_hash_tells_context_and_position(x: int, context: int, position: int) -> None:
    """The mixing function can be undone."""
    assert int(unmix(splitmix64(np.array([x], np.uint64)))[0]) == x
    found = address_of(splitmix64(np.array([context << 21 | position], np.uint64)))
    assert (int(found[0][0]), int(found[1][0])) == (context, position)


@pytest.mark.parametrize("seed", range(3))
def test_samples_are_drawn_uniformly(seed: int) -> None:
    """Over many neurons with the same coefficients, each position of a bin is drawn equally often."""
    r = np.random.default_rng(seed)
    neurons, length = 6_000, 21
    c = Context(
        int(r.integers(2**31)), np.zeros(length, np.int32), np.arange(length) > 0, *np.zeros((3, 1, 1, 1))
    )
    batch = batch_of([c])
    x = torch.full((1, length, neurons), 1.5)
    statistics = NeuronStatistics((neurons,), 1, every=1)
    statistics.update(0, x, batch)
    statistics.finish_shard(0)
    table = statistics.results(0)["samples"]
    assert table.num_rows == neurons
    positions = np.bincount(table["position"], minlength=length)[1:]
    assert positions.sum() == neurons
    expected = neurons / (length - 1)
    assert (
        (positions - expected) ** 2 / expected
    ).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_activation_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    """Layer, neuron, context id and position; also when it is the very first that counts."""
    contexts = corpus(3, 6)
    for row, position in ((4, 2), (1, 1)):
        contexts[row].id = 70 + row
        contexts[row].counted[:] = False
        contexts[row].counted[position:] = True
        contexts[row].coefficients[0, position, 3] = value
    with pytest.raises(ActivationError, match=r"L0N3 is -?(nan|inf) at position 1 of context 71;"):
        scan(0, tensors(contexts, 0, dtype)[0], batch_of(contexts))


def test_the_same_shard_twice_is_refused() -> None:
    """Merging or finishing it again; the state is as it was."""
    contexts = corpus(0, 8)
    one, other = mined(contexts, shard=4), mined(contexts, shard=4)
    before = tables_of(one)
    with pytest.raises(RunError, match="shard 4"):
        one.merge(other)
    equal(before, tables_of(one))
    other.moments._contexts[:] = 1
    with pytest.raises(RunError, match="shard 4"):
        other.finish_shard(4)


def test_states_of_different_options_do_not_merge() -> None:
    """Another number of triggers is named."""
    contexts = corpus(0, 4)
    with pytest.raises(RunMismatch, match=r"top = 4.*top = 5"):
        mined(contexts).merge(mined(contexts, top=5, shard=1))


def test_an_unfinished_shard_is_neither_saved_nor_merged_nor_read(tmp_path: Path) -> None:
    """Its sums are not in the tree yet."""
    contexts = corpus(0, 4)
    statistics = fresh(contexts)
    feed(statistics, contexts, 2)
    for forbidden in (
        lambda: save_state(tmp_path / "state.npz", statistics.state()),
        lambda: statistics.merge(fresh(contexts)),
        lambda: tables_of(statistics),
    ):
        with pytest.raises(AssertionError, match="finish the shard"):
            forbidden()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    """Cut short anywhere, or with a byte turned, or not a state at all."""
    file = tmp_path / "state.npz"
    save_state(file, mined(corpus(0, 8)).state())
    whole = file.read_bytes()
    middle = len(whole) // 2
    turned = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:10], whole[:middle], whole[:-1], turned, b"text"):
        file.write_bytes(damaged)
        with pytest.raises(RunCorrupt, match="loading the state"):
            load_state(file, NeuronStatistics.of)
    np.savez(file, options=np.array([1, 2, 3, 4, 5]))
    with pytest.raises(RunCorrupt, match="loading the state"):
        load_state(file, NeuronStatistics.of)


def test_a_state_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: one clear error, the old file whole, nothing half-written."""
    file = tmp_path / "state.npz"
    statistics = mined(corpus(0, 8))
    save_state(file, statistics.state())
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError, match="the disk is full"):
        save_state(file, statistics.state())
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_position_0_must_not_count() -> None:
    """A batch that says otherwise is a mistake of ours."""
    batch = batch_of(corpus(0, 3))
    batch.counted[0, 0] = True
    with pytest.raises(AssertionError, match="position 0"):
        CountedPlaces.of(batch, 1)


def test_contexts_are_those_that_were_given() -> None:
    """Ids of this state's own updates."""
    contexts = corpus(0, 7)
    assert mined(contexts).contexts == frozenset(range(7))
