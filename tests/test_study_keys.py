"""Patterns and token removal as findings: coverage bit by bit, shares that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_run

from mnemoscope.intervals import GROUPS
from mnemoscope.patterns import covered, labels
from mnemoscope.patterns.duplicates import near_duplicates
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.text import Text
from mnemoscope.run.writing import add_tables
from mnemoscope.studies.findings import keys
from mnemoscope.text.sampling import half, mixed

PATTERN = {
    "unit": "neuron", "polarity": 1, "tests": "main", "spec": "word:is", "name": "is", "family": "word",
    "complexity": 1, "rank": 0, "role": "best", "equivalents": [], "triggers": 8, "hits": 6, "base_rate": 0.1,
    "p": 1e-6, "p_family": 1e-4, "test_triggers": 4, "test_hits": 2, "test_base_rate": 0.1, "test_p": 1e-3,
    "token_rate": 0.0, "token_p": 1.0, "token_q": 1.0, "q": 0.01, "discovery_score": 0.5, "chosen": True,
}  # fmt: skip


def rows(name: str, *some: dict) -> pa.Table:
    """Rows of a table, what is not said filled with something harmless."""
    schema = SCHEMAS[name]
    blank = {
        field.name: None if field.nullable else [] if pa.types.is_list(field.type) else 0 for field in schema
    }
    texts = {field.name: "" for field in schema if pa.types.is_string(field.type) and not field.nullable}
    return pa.Table.from_pylist([blank | texts | row for row in some], schema=schema)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made by hand, with three confirmed patterns and one that was not."""
    made = make_run(tmp_path_factory.mktemp("runs") / "run", layers=2, neurons=6)
    found = rows(
        "patterns",
        PATTERN | {"layer": 0, "neuron": 3, "kind": "shallow", "test_where": 0b0011},
        PATTERN | {"layer": 0, "neuron": 3, "kind": "semantic", "test_where": 0b0110, "token_q": 0.01},
        PATTERN | {"layer": 0, "neuron": 4, "kind": "semantic", "test_where": 0b1111, "token_q": 0.5},
        PATTERN | {"layer": 1, "neuron": 3, "kind": "shallow", "test_where": 0b1111, "q": 0.2},
    )
    verdict = {"unit": "neuron", "polarity": 1, "tests": "main", "verdict": "iff"}
    tested = rows("pattern_tests", *(verdict | {"layer": 0, "neuron": one} for one in (3, 4)))
    return add_tables(made.path, {"patterns": [found], "pattern_tests": [tested]}, {"patterns": {"q": 0.05}})


def patterns(*some: tuple[str, float, int, int]) -> pl.DataFrame:
    """Confirmed patterns of one unit: kind, token_q, triggers, bits."""
    names = ["kind", "token_q", "test_triggers", "test_where"]
    frame = pl.DataFrame(some, names, orient="row").with_columns(pl.col("test_where").cast(pl.Int64))
    address = {"unit": "neuron", "layer": 0, "neuron": 3, "polarity": 1, "q": 0.01, "test_base_rate": 0.1}
    return frame.with_columns(**{name: pl.lit(value) for name, value in address.items()})


def test_cases_are_counted_trigger_by_trigger() -> None:
    """Bit i is the i-th trigger: shallow {0, 1}, semantic {1, 2} of four is one of each case."""
    some = covered.cases(patterns(("shallow", 1.0, 4, 0b0011), ("semantic", 0.01, 4, 0b0110)), 0.05)
    assert some.select(covered.CASES).rows() == [(1, 1, 1, 1)]
    assert some.select("patterns", "triggers").rows() == [(0, 4)]


def test_ordinary_prefixes_show_patterns_by_their_base_rates() -> None:
    """N1: of the patterns that count, each is there in a tenth of ordinary prefixes; another reading adds nothing."""
    some = covered.cases(
        patterns(
            ("shallow", 1.0, 10, 0b0000000111),
            ("shallow", 1.0, 10, 0b0000000111),  # the same triggers again
            ("shallow", 1.0, 10, 0b0000111000),
            ("semantic", 0.01, 10, 0b1111000000),
        ),
        0.05,
    )
    flat, deep = 1 - 0.9**2, 0.1
    expected = [flat * (1 - deep), flat * deep, (1 - flat) * deep, (1 - flat) * (1 - deep)]
    found = some.select(f"ordinary {case}" for case in covered.CASES).row(0)
    assert found == pytest.approx([10 * share for share in expected])
    assert some.select(covered.CASES).row(0) == (6, 0, 4, 0) and some["patterns"].item() == 3


@tries(50)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_pattern_counts_with_three_triggers_of_its_own(units: list[list[int]]) -> None:
    """Other readings of the same triggers are no further patterns; against a plain definition, one by one."""
    where = np.array([bits for unit in units for bits in unit], np.uint64)
    first = np.cumsum([0, *map(len, units)])[:-1]
    expected = []
    for unit in units:
        seen: set[int] = set()
        for bits in unit:
            shown = {bit for bit in range(8) if bits >> bit & 1}
            expected.append(len(shown - seen) >= 3)
            seen |= shown if expected[-1] else set()
    assert covered._distinct(where, first).tolist() == expected


def test_the_last_token_alone_is_shallow() -> None:
    """A semantic pattern that the last tokens explain counts as shallow; one that is not confirmed, as none."""
    some = patterns(("semantic", 0.5, 2, 0b01))
    assert covered.cases(some, 0.05).select(covered.CASES).rows() == [(1, 0, 0, 1)]
    assert covered.cases(some, 0.001).select(covered.CASES).rows() == [(0, 0, 0, 2)]


BITS = 10
RATES = st.sampled_from([0.001, 0.05, 0.06, 0.5, 1.0])


@tries(80)
@given(
    st.lists(
        st.tuples(st.sampled_from(["shallow", "semantic"]), RATES, RATES, st.integers(0, 2**BITS - 1)),
        min_size=1,
        max_size=6,
    )
)
def test_cases_against_a_slow_definition(drawn: list[tuple[str, float, float, int]]) -> None:
    """Trigger by trigger: only confirmed patterns explain one, by what they are beyond the last token."""
    some = patterns(*[(kind, token_q, BITS, bits) for kind, _, token_q, bits in drawn])
    some = some.with_columns(q=pl.Series([q for _, q, _, _ in drawn]))
    expected = dict.fromkeys(covered.CASES, 0)
    for bit in range(BITS):
        shown = [
            (kind == "semantic" and token_q <= 0.05)
            for kind, q, token_q, bits in drawn
            if q <= 0.05 and bits >> bit & 1
        ]
        case = 3 if not shown else 2 if all(shown) else 0 if not any(shown) else 1
        expected[covered.CASES[case]] += 1
    found = covered.cases(some, 0.05)
    assert found.select(covered.CASES).row(0, named=True) == expected
    seen: set[int] = set()
    counted = 0
    for _, q, _, bits in drawn:
        mine = {bit for bit in range(BITS) if bits >> bit & 1}
        if q <= 0.05 and len(mine - seen) >= covered.LEAST:
            counted, seen = counted + 1, seen | mine
    assert found["patterns"].item() == counted


def test_all_sixty_four_triggers_have_a_bit() -> None:
    """The sign bit of the column is the 64th trigger."""
    assert covered.cases(patterns(("shallow", 1.0, 64, -1)), 0.05).select(covered.CASES).rows() == [
        (64, 0, 0, 0)
    ]


def test_layers_add_up_and_the_unconfirmed_do_not_count(run: Run) -> None:
    """Cases of a layer add up to one; units without a confirmed pattern are not covered."""
    frame = {one.id: one for one in keys.findings(run)}["figure-2-covered"].frame
    sums = frame.group_by("units", "layer").agg(pl.col("share").sum())
    assert set(sums["units"]) == {"neurons", keys.ORDINARY}
    assert sums["share"].to_list() == pytest.approx([1] * 4)
    mine = frame.filter(pl.col("units") == "neurons")
    share = {(row["layer"], row["case"]): row["share"] for row in mine.iter_rows(named=True)}
    units = (
        run.table("triggers")
        .filter(pl.col("layer") == 0)
        .select("neuron", "polarity")
        .unique()
        .collect()
        .height
    )
    # Units without a candidate are taken to have four triggers, as those with one have.
    assert share[0, "shallow"] == pytest.approx((1 + 4) / (4 * units))
    assert share[0, "semantic"] == pytest.approx(1 / (4 * units))
    assert share[1, "not covered"] == 1


def test_triggers_of_the_test_half_have_a_group_of_documents(run: Run) -> None:
    """Each trigger of a unit in the test half is in one group, in the order of its bits: a loop over triggers."""
    masks, documents = covered.documents_of_triggers(run)
    owner = dict(run.table("contexts").select("context", "document").collect().iter_rows())
    copies = near_duplicates(Text.of(run))
    owner = {context: int(copies.of(np.array([document]))[0]) for context, document in owner.items()}
    rows = run.table("triggers").sort("layer", "neuron", "polarity", "rank").collect()
    seen: set[int] = set()
    for row in masks.iter_rows(named=True):
        own = rows.filter(layer=row["layer"], neuron=row["neuron"], polarity=row["polarity"])
        tested: list[int] = []
        for context in own["context"].to_list():
            document = owner[context]
            if half(np.array([document]))[0] and document not in tested:
                tested.append(document)
        seen |= set(tested)
        for bit, document in enumerate(tested[:64]):
            group = int(mixed(np.array([document]), 1)[0] % np.uint64(GROUPS))
            for number in range(GROUPS):
                assert bool(row[f"group_{number}"] >> bit & 1) == (number == group)
    assert documents == len(seen)


def test_what_is_left_without_documents_is_counted_again(run: Run) -> None:
    """Without a group, its triggers are neither covered nor there: as if their bits were not; confirmed stays so."""
    masks, _ = covered.documents_of_triggers(run)
    whole = covered.units_covered(run)
    some = whole.filter(unit="neuron", layer=0, neuron=3, polarity=1).row(0, named=True)
    mask = masks.filter(unit="neuron", layer=0, neuron=3, polarity=1).row(0, named=True)
    for number, left in enumerate(covered.without_documents(run, masks)):
        gone = mask[f"group_{number}"] & 0b1111
        bits = [bit for bit in range(4) if not gone >> bit & 1]
        row = left.filter(unit="neuron", layer=0, neuron=3, polarity=1).row(0, named=True)
        shallow, semantic = (
            {bit for bit in bits if 0b0011 >> bit & 1},
            {bit for bit in bits if 0b0110 >> bit & 1},
        )
        expected = [len(shallow - semantic), len(shallow & semantic), len(semantic - shallow)]
        assert [row[case] for case in covered.CASES[:3]] == expected
        assert row["triggers"] == len(bits)
    assert some["triggers"] == 4


def test_directions_as_neurons_have_no_more_patterns() -> None:
    """A7, A8: two kinds of units whose triggers are covered alike differ by nothing; and by what was added."""
    generator = np.random.default_rng(0)
    kinds, layers = ("neuron", keys.NULL), np.arange(3)

    def counted(more: float) -> keys.Covered:
        by_group = generator.poisson(200, (GROUPS, 2, 3, len(keys._COUNTED))).astype(float)
        triggers = by_group[..., keys._COUNTED.index("triggers")]
        for case in covered.CASES:
            share = generator.normal(0.25, 0.05, triggers.shape)
            share[:, 0] += more if case == "semantic" else 0.0
            by_group[..., keys._COUNTED.index(case)] = triggers * share
        whole = by_group.sum(0)
        return keys.Covered(kinds, layers, 300, np.concatenate([whole[None], whole - by_group]))

    for more in (0.0, 0.1):
        units = counted(more)
        figures = [units.figures(kind, *keys._DEEP, overall=True) for kind in kinds]
        excess = units.interval(figures[0] - figures[1]).at(0)
        assert abs(excess.value - more) <= 1.7 * (excess.high - excess.low) / 2
        assert (excess.low > 0) == (more > 0)


def test_patterns_per_key_count_confirmed_ones(run: Run) -> None:
    """One confirmed pattern with three triggers of its own in layer 0, none in layer 1."""
    frame = {one.id: one for one in keys.findings(run)}["patterns-per-key"].frame
    units = (
        run.table("triggers")
        .filter(pl.col("layer") == 0)
        .select("neuron", "polarity")
        .unique()
        .collect()
        .height
    )
    assert frame["patterns"].to_list() == pytest.approx([1 / units, 0])


def test_verdicts_are_shares_of_tested_units(run: Run) -> None:
    """Two neurons were tested, and both are `iff`."""
    frame = {one.id: one for one in keys.findings(run)}["two-way-verdicts"].frame
    assert frame.select("unit", "layer", "verdict", "units", "share").rows() == [
        ("neurons", 0, "iff", 2, 1.0)
    ]


def test_shares_are_those_of_the_patterns_command(run: Run) -> None:
    """The same triggers by the same rule as `mnemoscope patterns` counts them."""
    from mnemoscope.patterns.summary import shares_covered

    frame = {one.id: one for one in keys.findings(run)}["figure-2-covered"].frame
    other = shares_covered(run).filter(pl.col("unit") == "neuron").sort("layer")
    names = dict(zip(covered.CASES, ("shallow", "both", "semantic", "none"), strict=True))
    for case, name in names.items():
        mine = (
            frame.filter((pl.col("case") == case) & (pl.col("units") == "neurons"))
            .sort("layer")["share"]
            .to_list()
        )
        assert mine == pytest.approx(other[name].to_list(), abs=1e-12)


def test_token_removal_is_told(tmp_path: Path) -> None:
    """Rows of `removal` become Figure 3 and its null."""
    from mnemoscope.studies.findings import removal as tokens_removed

    made = make_run(tmp_path / "run", layers=2, neurons=6)
    some = [
        {"layer": layer, "neuron": 3, "polarity": 1, "kind": kind, "removed": removed, "document": document,
         "whole": 4.0 + document / 10, "without": {"first": 4.0, "last": 1.0, "random": 3.0}[removed]}
        for layer in range(2) for kind in ("trigger", "random") for removed in ("first", "last", "random")
        for document in range(6)
    ]  # fmt: skip
    run = add_tables(made.path, {"removal": [rows("removal", *some)]}, {})
    found = {one.id: one for one in tokens_removed.findings(run)}
    frame = found["figure-3-token-removal"].frame
    last = frame.filter(pl.col("token") == "without the last")["ratio"]
    assert last.to_list() == pytest.approx([(6 - 6 * 4.25) / (6 * 4.25)] * 2)
    assert found["token-removal-null"].frame["null"].null_count() == 0


@pytest.mark.parametrize(("value", "exceeds"), [(180.0, False), (189.0, False), (189.2, True), (195.0, True)])
def test_labels_exceed_the_95th_percentile_of_their_shuffles(value: float, exceeds: bool) -> None:
    """Of 200 shuffles 0 ... 199 the 95th percentile is 189.05; each pattern is compared with its own."""
    chance = np.stack([np.arange(200.0), np.arange(200.0) * 10], axis=1)
    assert labels.beyond(np.array([value, value]), chance) == int(exceeds)
