"""What the pass of the two-way test counts, against plain numpy over all coefficients at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from mnemoscope.errors import RunCorrupt, RunError
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import bin_of
from mnemoscope.records import Cells, ContextBatch
from mnemoscope.run.text import Text
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.trials import counts
from mnemoscope.trials.claims import Claims, ClaimsToTest
from mnemoscope.trials.counts import (
    MIDDLE,
    NEURON,
    SIDE,
    CandidateCounts,
    CountingState,
    ThresholdCounts,
)
from mnemoscope.trials.masked_text import MaskedText

LAYERS, UNITS, COLUMNS = 2, 150, 9
CELLS = Cells((UNITS,) * LAYERS)
PLACES = {(layer, 0): layer for layer in range(LAYERS)}


class World(NamedTuple):
    masked: MaskedText
    masks: np.ndarray  # bool[row column], counted rows only
    group: np.ndarray
    m: np.ndarray  # f32[layer row unit]
    gate: np.ndarray
    up: np.ndarray
    batches: list[tuple[ContextBatch, np.ndarray, np.ndarray, np.ndarray]]
    claims: Claims


def _world(seed: int = 0) -> World:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 12, 23)
    vocabulary = Vocabulary([b"<s>", *(b" %c" % letter for letter in b"abcdefgh")], [True, *[False] * 8])
    contexts = [(i, i // 2, generator.integers(0, 9, length)) for i, length in enumerate(lengths)]
    text = Text.build(contexts, vocabulary)
    masks = generator.random((len(text), COLUMNS)) < generator.uniform(0.02, 0.5, COLUMNS)
    masked = MaskedText(text, csc_array(masks))
    shape = (LAYERS, len(text), UNITS)
    m = (generator.normal(0, 1, shape) * 2.0 ** generator.integers(-14, 3, shape)).astype(np.float32)
    gate, up = generator.choice([-1.0, 0.0, 1.0], (2, *shape)).astype(np.float32)
    batches = []
    for chosen in np.array_split(generator.permutation(len(lengths)), 4):
        longest = lengths[chosen].max()
        rows = np.minimum(text.starts[chosen][:, None] + np.arange(longest), len(text) - 1)
        inside = np.arange(longest) < lengths[chosen][:, None]
        tokens = np.where(inside, text.tokens[rows], 0).astype(np.int32)
        counted = inside & text.counted[rows]
        batch = ContextBatch(chosen, tokens, lengths[chosen].astype(np.int32), counted)
        batches.append((batch, *(part[:, rows] for part in (m, gate, up))))
    layer = np.repeat(np.arange(LAYERS), 200)
    claims = Claims(
        layer,
        np.concatenate([np.sort(generator.integers(0, UNITS, 200)) for _ in range(LAYERS)]),
        generator.choice([-1, 1], len(layer)),
        generator.integers(0, COLUMNS, len(layer)),
    )
    kept = text.counted
    return World(
        masked, masks[kept], masked.group[kept], m[:, kept], gate[:, kept], up[:, kept], batches, claims
    )


def _feed(state: CountingState, world: World, batches: slice = slice(None)) -> None:
    for batch, *parts in world.batches[batches]:
        for layer in range(LAYERS):
            m, gate, up = (torch.from_numpy(part[layer]) for part in parts)
            state.update(layer, m, batch, gate, up, m)


def _scores(world: World, claim: int) -> np.ndarray:
    claims = world.claims
    bins = bin_of(world.m[claims.place[claim], :, claims.unit[claim]])
    return bins if claims.polarity[claim] > 0 else BINS - 1 - bins


def test_threshold_counts() -> None:
    """Histograms where patterns are, of the units, and in how many documents each score is reached."""
    world = _world()
    counted = ThresholdCounts(CELLS, world.masked.groups, world.claims)
    _feed(CountingState(world.masked, None, {NEURON: counted}, PLACES), world)
    every = slice(0, len(world.claims))
    sides, documents = counted.sides(every), counted.documents(every)
    for claim in range(len(world.claims)):
        scores = np.maximum(_scores(world, claim) - MIDDLE, 0)
        shown = world.masks[:, world.claims.column[claim]]
        np.testing.assert_array_equal(counted.counts[claim], np.bincount(scores[shown], minlength=SIDE))
        np.testing.assert_array_equal(sides[claim], np.bincount(scores, minlength=SIDE))
        reached = [len(np.unique(world.group[scores >= place])) for place in range(SIDE)]
        np.testing.assert_array_equal(documents[claim], reached)


def _second(world: World) -> tuple[counts.TestCounts, ClaimsToTest, tuple[np.ndarray, ...]]:
    generator = np.random.default_rng(1)
    claims = world.claims

    compared = [generator.permutation(COLUMNS)[: generator.integers(0, 3)] for _ in range(len(claims))]
    chosen = ClaimsToTest(
        claims,
        generator.integers(MIDDLE + 1, MIDDLE + 40, len(claims)),
        np.concatenate([[0], np.cumsum([len(part) for part in compared])]),
        np.concatenate(compared),
        generator.integers(-1, COLUMNS, len(claims)),
    )
    patterns = tuple(np.unique(claims.column[claims.of(layer)]) for layer in range(LAYERS))
    expecting = np.flatnonzero(generator.random(len(claims)) < 0.3)
    return counts.TestCounts(CELLS, world.masked, chosen, patterns, expecting), chosen, patterns


def _strata(world: World) -> np.ndarray:
    """i64[row]: of the counted rows."""
    return world.masked.stratum[world.masked._text.counted]


def test_candidate_counts() -> None:
    """Every unit and column, active at its largest scores of either sign."""
    world, generator = _world(), np.random.default_rng(2)
    threshold = generator.choice([MIDDLE + 1, MIDDLE + 20, MIDDLE + 30, BINS], (2, LAYERS, UNITS))
    counted = CandidateCounts(CELLS, world.masked, COLUMNS, threshold.reshape(2, -1))
    _feed(CountingState(world.masked, None, {NEURON: counted}, PLACES), world)
    bins, strata = bin_of(world.m).astype(int), _strata(world)
    assert world.masked.strata > 1
    for side, scores in enumerate((bins, BINS - 1 - bins)):
        active = scores >= threshold[side][:, None]
        np.testing.assert_array_equal(
            counted.both[side].reshape(LAYERS, UNITS, -1),
            np.einsum("lru,rc->luc", active, world.masks.astype(int)),
        )
        spread = strata[:, None] == np.arange(world.masked.strata)
        np.testing.assert_array_equal(
            counted.by_stratum[side].reshape(LAYERS, UNITS, -1),
            np.einsum("lru,rs->lus", active, spread.astype(int)),
        )


def test_expected() -> None:
    """Where a claim is active, the share of its pattern in the stratum, by group."""
    world = _world()
    counted, chosen, _ = _second(world)
    _feed(CountingState(world.masked, None, {NEURON: counted}, PLACES), world)
    strata, claims = _strata(world), chosen.claims
    rates = world.masked.rates(np.arange(COLUMNS))
    for stratum in range(world.masked.strata):
        np.testing.assert_allclose(rates[stratum], world.masks[strata == stratum].mean(0), rtol=1e-6)
    assert len(counted.expecting) > 20
    for row, claim in enumerate(counted.expecting):
        active = _scores(world, claim) >= chosen.threshold[claim]
        chance = rates[strata[active], claims.column[claim]]
        slow = np.bincount(world.group[active], chance, minlength=world.masked.groups)
        np.testing.assert_allclose(counted.expected[row], slow, rtol=1e-4, atol=1e-5)


def test_test_counts() -> None:
    """Everything that is counted of a chosen claim and of the units is what numpy counts."""
    world = _world()
    counted, chosen, patterns = _second(world)
    _feed(CountingState(world.masked, None, {NEURON: counted}, PLACES), world)
    world = world._replace(claims=chosen.claims)
    claims, groups = chosen.claims, world.masked.groups
    quadrant = 2 * (world.gate <= 0) + (world.up <= 0)
    np.testing.assert_allclose(
        counted.total.reshape(LAYERS, UNITS), world.m.sum(1, dtype=np.float64), rtol=1e-12
    )
    np.testing.assert_allclose(
        counted.squares.reshape(LAYERS, UNITS), (world.m.astype(np.float64) ** 2).sum(1), rtol=1e-12
    )
    for claim in range(len(claims)):
        layer, unit, column = claims.place[claim], claims.unit[claim], claims.column[claim]
        bins, shown = bin_of(world.m[layer, :, unit]), world.masks[:, column]
        active = _scores(world, claim) >= chosen.threshold[claim]
        np.testing.assert_array_equal(
            counted.totals[CELLS.cell(layer, unit)], np.bincount(bins, minlength=BINS)
        )
        np.testing.assert_array_equal(counted.counts[claim], np.bincount(bins[shown], minlength=BINS))
        assert counted.among[claim] == pytest.approx(
            world.m[layer, shown, unit].sum(dtype=np.float64), rel=1e-9
        )
        for active_rows, where in (
            (counted.both[claim], active & shown),
            (counted.active[claim], active),
        ):
            np.testing.assert_array_equal(active_rows, np.bincount(world.group[where], minlength=groups))
        kinds = quadrant[layer, :, unit]
        np.testing.assert_array_equal(
            counted.quadrants_both[claim], np.bincount(kinds[active & shown], minlength=4)
        )
        np.testing.assert_array_equal(
            counted.quadrants_active[claim], np.bincount(kinds[active], minlength=4)
        )
        table = world.masks[:, chosen.columns[chosen.starts[claim] : chosen.starts[claim + 1]]]
        assert (counted.table[claim], counted.table_both[claim]) == (
            table.sum(),
            (table & active[:, None]).sum(),
        )
        other = world.masks[:, chosen.other[claim]] & (chosen.other[claim] >= 0)
        assert (counted.other[claim], counted.other_both[claim]) == (other.sum(), (other & active).sum())
    for layer in range(LAYERS):
        columns, sums = counted.patterns(layer)
        np.testing.assert_array_equal(columns, patterns[layer])
        slow = world.masks[:, columns].T.astype(np.float64) @ world.m[layer].astype(np.float64)
        np.testing.assert_allclose(sums, slow, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        world.masked.shown(np.arange(COLUMNS)),
        [np.bincount(world.group[world.masks[:, column]], minlength=groups) for column in range(COLUMNS)],
    )


def test_saved_and_restored(tmp_path: Path) -> None:
    """Going on from a file gives the same bits; a shard is not counted twice; a damaged file is refused."""
    world = _world()
    whole, halfway, resumed = (
        CountingState(world.masked, None, {NEURON: _second(world)[0]}, PLACES) for _ in range(3)
    )
    _feed(whole, world)
    _feed(halfway, world, slice(0, 2))
    halfway.finish_shard(0)
    with pytest.raises(RunError, match="shard 0 was counted before"):
        halfway.finish_shard(0)
    halfway.save(tmp_path / "state.npz")
    _feed(resumed.restore(tmp_path / "state.npz"), world, slice(2, None))
    assert resumed.shards == {0}
    for name in counts.TestCounts.FIELDS:
        np.testing.assert_array_equal(
            getattr(resumed.parts[NEURON], name), getattr(whole.parts[NEURON], name)
        )
    (tmp_path / "state.npz").write_bytes(b"nothing")
    with pytest.raises(RunCorrupt, match=r"state\.npz"):
        resumed.restore(tmp_path / "state.npz")


def test_many_documents_share_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit documents are put together, whole."""
    monkeypatch.setattr("mnemoscope.trials.masked_text.GROUPS", 4)
    masked = _world().masked
    assert (masked.groups, masked.documents) == (4, 12)
    found = {(document, group) for document, group in zip(masked._text.document, masked.group, strict=True)}
    assert len(found) == 12
