"""Patterns of all neurons of a mixture: the text of an expert's units is what is routed to it, in every stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from families import dense_between_experts
from planted_patterns import fire, null, small_text, triggers, words
from scipy.stats import kstest
from test_tested_mixtures import EXPERT, GIVEN, LOUD, PLANTED, WIDTH, _address, _mixture
from tiny import texts, tokenizer

from mnemoscope import build, load_model, open_run
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import bin_of
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import LayerSignals, Nulls
from mnemoscope.neuron import twoway
from mnemoscope.neuron.card import card as card_of
from mnemoscope.neuron.twoway import NULL_LEVEL
from mnemoscope.patterns import summary as analysis
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.search import search
from mnemoscope.patterns.space import strata
from mnemoscope.patterns.triggers import Options, OwnTexts, Units, halves, one_each
from mnemoscope.records import NEURON, ContextBatch
from mnemoscope.results import PatternReport
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.plan import batches
from mnemoscope.text.sampling import half
from mnemoscope.trials import job
from mnemoscope.trials.heldout import beyond_last_token, confirm
from mnemoscope.trials.job import MIXTURE, WORK, Settings, patterns
from mnemoscope.views.claims import sentence, specificity, where_active
from mnemoscope.views.patterns import summary as printed
from mnemoscope.views.terminal import plain

BUDGET = 100_000  # all of the text of these runs
QUICK = Options(tests=("main",), draws=300)
Seats = dict[tuple[str, int, int], tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def fewer_draws() -> Iterator[None]:
    """A null of fewer drawn sets, which is what takes the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Options", partial(Options, draws=200))
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """Four experts, of which one gets six words only; two of its neurons answer to one of them each."""
    model = _mixture()
    run = build(model, texts(160), tmp_path_factory.mktemp("planted") / "run", top=24)
    return patterns(run, model, Settings(budget=BUDGET)), model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model]:
    """A dense layer between two of four experts and a shared one."""
    model = load_model(dense_between_experts(), tokenizer=tokenizer())
    run = build(model, texts(90), tmp_path_factory.mktemp("mixed") / "run", top=24)
    return patterns(run, model, Settings(budget=BUDGET)), model


def _tests(run: Run) -> pl.DataFrame:
    return run.table("pattern_tests").collect()


# -- What is planted, and what is not ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_word_is_found_among_the_tokens_of_its_expert(planted: tuple[Run, Model]) -> None:
    """Its neuron means the word both ways, and what is read out names the expert and what its figures are over."""
    run, _ = planted
    counted = Text.of(run).counted.sum()
    for neuron, word in PLANTED.items():
        claim = card_of(run, _address(neuron)).claims[0]
        assert word.casefold() in claim.name.casefold(), claim.name
        assert (claim.verdict, claim.polarity, claim.specificity_rank) == ("iff", 1, 0)
        assert claim.tokens < counted / 4 and (claim.neurons, claim.among) == (WIDTH, "expert")
        assert "random directions of this layer: median F1" in sentence(claim)
        assert "held-out tokens routed to its expert" in where_active(claim)
        assert "no neuron of the expert" in str(specificity(claim))
    found = analysis.summary(run)
    answer = " ".join(plain(printed(PatternReport(found, None, (), ())), 200).split())
    assert MIXTURE in answer and f"L0E{EXPERT}N3" in answer
    assert {f"L0E{EXPERT}N{neuron}" for neuron in PLANTED} <= {str(address) for address in found.clearest}


@pytest.mark.slow
def test_what_the_router_decides_is_no_claim_about_a_neuron(planted: tuple[Run, Model]) -> None:
    """A neuron that is active wherever its expert runs is not found to answer to the words that the router gives it."""
    run, _ = planted
    mine = run.rows("pattern_tests", *_address(LOUD)).filter(unit=NEURON, polarity=1)
    assert (mine["verdict"] == twoway.NONE).all(), mine.select("spec", "verdict", "f1_low", "q")
    words_of_expert = {word.casefold() for word in GIVEN}
    believed = _tests(run).filter((pl.col("layer") == 0) & (pl.col("unit") == NEURON) & (pl.col("q") <= 0.05))
    here = believed.filter(pl.col("neuron").is_between(EXPERT * WIDTH, (EXPERT + 1) * WIDTH - 1))
    assert not [spec for spec in here["spec"] if words_of_expert <= set(spec.partition(":")[2].split(","))]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["planted", "mixed"])
def test_few_nulls_get_a_verdict(which: str, request: pytest.FixtureRequest) -> None:
    """Of random directions and rotations of experts, at most one in twenty has a pattern above the null."""
    run, _ = request.getfixturevalue(which)
    rows = _tests(run).filter(pl.col("unit") != NEURON)
    units = run.table("calibration").filter(pl.col("measure") == "f1 of main").collect()
    total = units.filter(pl.col("unit") != NEURON)["count"].sum()
    assert total > 100
    believed = rows.filter((pl.col("verdict") != twoway.NONE) & (pl.col("tests") == "main"))
    assert believed.height <= 0.05 * total


# -- Against loops over all tokens ---------------------------------------------------------------------------------


class _Slow(NamedTuple):
    """What every unit of a place was at every token that it ran on: prefix i64[row], and by kind f32[row unit]."""

    prefix: np.ndarray
    values: dict[str, np.ndarray]


def _slow(run: Run, model: Model) -> dict[tuple[int, int], _Slow]:
    """By layer and group, from one sweep over the run, token by token."""
    text, nulls = Text.of(run), Nulls.of(model, run.manifest.options["nulls"])
    rows: dict[tuple[int, int], list[int]] = {}
    values: dict[tuple[int, int], dict[str, list[np.ndarray]]] = {}

    def note(layer: int, signals: LayerSignals, batch: ContextBatch, where: list[int]) -> None:
        columns = nulls.columns(layer, batch, signals)
        by_kind = {NEURON: signals.coefficients} | {kind: each.coefficients for kind, each in columns.items()}
        flat = {kind: each.reshape(-1, each.shape[-1]).numpy() for kind, each in by_kind.items()}
        for place, row in enumerate(where):
            context, position = divmod(row, batch.tokens.shape[1])
            if batch.counted[context, position]:
                found = text.rows(batch.contexts[context], np.array(position))
                rows.setdefault((layer, signals.group), []).append(int(found))
                for kind, of_kind in flat.items():
                    kept = values.setdefault((layer, signals.group), {}).setdefault(kind, [])
                    kept.append(of_kind[place].copy())

    def dense(layer, m, batch, gate, up, inputs):
        note(layer, LayerSignals(inputs, m, gate, up), batch, list(range(batch.tokens.size)))

    def routed(given: LayerRows, batch: ContextBatch) -> None:
        for piece in given.each():
            where = range(batch.tokens.size) if piece.rows is None else piece.rows.tolist()
            signals = LayerSignals(piece.inputs, piece.coefficients, piece.gate, piece.up, piece.group)
            note(piece.layer, signals, batch, list(where))

    shards = run.table("shards").select(pl.col("shard").max()).collect().item() + 1
    with Capture(model) as capture:
        for shard in range(shards):
            for batch in batches(run.file("contexts"), shard, run.manifest.options["special"]):
                capture.sweep(batch, dense, routed)
    return {
        place: _Slow(np.array(rows[place]), {kind: np.stack(each) for kind, each in values[place].items()})
        for place in rows
    }


@pytest.fixture(scope="module")
def slow(mixed: tuple[Run, Model]) -> dict[tuple[int, int], _Slow]:
    return _slow(*mixed)


@pytest.fixture(scope="module")
def seats(mixed: tuple[Run, Model]) -> Seats:
    """By kind, layer and number there the group of a unit, and its number in the group."""
    run, model = mixed
    nulls = Nulls.of(model, run.manifest.options["nulls"])
    found: Seats = {}
    for kind in (NEURON, *nulls.kinds):
        for layer, sizes in enumerate(model.anatomy.groups):
            own = [
                size if kind == NEURON else nulls.units[kind][layer, group]
                for group, size in enumerate(sizes)
            ]
            places = [(group, unit) for group, size in enumerate(own) for unit in range(size)]
            found |= {(kind, layer, number): place for number, place in enumerate(places)}
    return found


@pytest.mark.slow
def test_rows_are_what_a_loop_counts(
    mixed: tuple[Run, Model], slow: dict[tuple[int, int], _Slow], seats: Seats
) -> None:
    """A row of `pattern_tests` of any unit in any place is the test, made again token by token over its own tokens."""
    run, _ = mixed
    text = Text.of(run)
    late = half(text.document)
    kinds: set[tuple[str, bool, bool]] = set()
    rows = _tests(run)
    sampled = pl.concat([rows.filter(layer=layer).sample(40, seed=layer) for layer in range(3)])
    for row in sampled.iter_rows(named=True):
        group, unit = seats[row["unit"], row["layer"], row["neuron"]]
        place = slow[row["layer"], group]
        test = late[place.prefix]
        prefix, m = place.prefix[test], place.values[row["unit"]][test, unit]
        shown = masks(text, [row["spec"]]).toarray()[prefix, 0]
        active = m >= row["threshold"] if row["polarity"] > 0 else m <= row["threshold"]
        assert (row["tokens"], row["present"]) == (len(m), shown.sum())
        assert row["documents"] == len(np.unique(text.document[prefix]))
        # Another batch gives other last bits, and a bin may begin between the two.
        assert (
            abs(int(active.sum()) - row["active"]) <= 1
            and abs(int((active & shown).sum()) - row["both"]) <= 1
        )
        assert np.abs(np.bincount(bin_of(m[shown]), minlength=BINS) - row["counts_present"]).sum() <= 4
        assert np.abs(np.bincount(bin_of(m[~shown]), minlength=BINS) - row["counts_absent"]).sum() <= 4
        if 0 < shown.sum() < len(shown):
            assert row["pearson"] == pytest.approx(np.corrcoef(m, shown)[0, 1], abs=1e-4)
        if row["specificity_rank"] is not None and row["unit"] == NEURON:
            every = np.corrcoef(place.values[NEURON][test].T, shown)[-1, :-1] * row["polarity"]
            assert abs((every > every[unit]).sum() - row["specificity_rank"]) <= 1
        kinds.add((row["unit"], group < 4, row["layer"] == 1))
    assert {(NEURON, True, False), (NEURON, False, False), (NEURON, True, True)} <= kinds, kinds
    assert ("random", True, False) in kinds


@pytest.mark.slow
def test_chance_is_taken_over_the_tokens_of_the_expert(
    mixed: tuple[Run, Model], slow: dict[tuple[int, int], _Slow], seats: Seats
) -> None:
    """The base rate of a candidate, in either half: the mean over the triggers of the share of their stratum, in which
    there is nothing but what was routed to the expert."""
    run, _ = mixed
    text = Text.of(run)
    held = run.table("triggers").sort("layer", "neuron", "polarity", "rank").collect()
    candidates = (
        run.table("patterns").filter((pl.col("unit") == NEURON) & (pl.col("tests") == "main")).collect()
    )
    single = candidates.filter(~pl.col("spec").str.contains(r"^(all|any):"))
    asked = 0
    for row in pl.concat([single.filter(layer=layer).sample(12, seed=layer) for layer in range(3)]).iter_rows(
        named=True
    ):
        group, _ = seats[NEURON, row["layer"], row["neuron"]]
        counted = np.zeros(len(text), bool)
        counted[slow[row["layer"], group].prefix] = True
        mine = held.filter(layer=row["layer"], neuron=row["neuron"], polarity=row["polarity"])
        where = text.rows(mine["context"].to_numpy(), mine["position"].to_numpy())
        for documents, name in zip(
            halves(text.document[text.counted]), ("base_rate", "test_base_rate"), strict=True
        ):
            part, rows = text.part(documents)
            back = np.full(len(text), -1)
            back[rows] = np.arange(len(rows))
            slots = one_each(part, Units.of([where]), back[where])[0]
            if row["role"] == "meaning" and name == "base_rate":
                continue  # of what earlier patterns leave
            own = np.flatnonzero(counted[rows])
            stratum = np.full(len(part), -1)
            stratum[own], _ = strata(part, own, True)
            mask = masks(part, [row["spec"]]).toarray()[:, 0]
            rates = [mask[stratum == stratum[slot]].mean() for slot in slots[slots >= 0]]
            assert row[name] == pytest.approx(np.mean(rates), abs=1e-6), (row["spec"], name)
            asked += 1
    assert asked > 40


@pytest.mark.slow
def test_the_bar_is_that_of_the_layer_or_of_the_expert(mixed: tuple[Run, Model], seats: Seats) -> None:
    """A claim stands by the lower end of its F1 above pseudo-neurons of the other parity: a high quantile of those of
    the layer, and of those of its own expert. With the first alone others would stand somewhere."""
    run, model = mixed
    nulls = Nulls.of(model, run.manifest.options["nulls"])
    rows = _tests(run).with_columns(pl.col("f1", "f1_low").fill_null(0))
    own_higher = 0
    for layer, tests in rows.select("layer", "tests").unique().iter_rows():
        of_family = rows.filter(layer=layer, tests=tests)
        sizes = {kind: sum(nulls.units[kind][layer, group] for group in range(len(model.anatomy.groups[layer])))
                 for kind in nulls.kinds}  # fmt: skip
        f1 = {kind: np.zeros((size, 2)) for kind, size in sizes.items()}
        for row in of_family.filter(pl.col("unit") != NEURON).iter_rows(named=True):
            f1[row["unit"]][row["neuron"], int(row["polarity"] < 0)] = row["f1"]
        bars: dict[tuple[int, int], tuple[float, float]] = {}
        for group, parity in itertools.product(range(len(model.anatomy.groups[layer])), (0, 1)):
            of_layer, of_group = [0.0], [0.0]
            for kind, figures in f1.items():
                numbers = np.arange(len(figures))
                here = np.array([seats[kind, layer, number][0] == group for number in numbers.tolist()])
                other = numbers % 2 != parity
                of_layer.append(np.quantile(figures[other], NULL_LEVEL))
                of_group += [np.quantile(figures[other & here], NULL_LEVEL)] if (other & here).any() else []
            bars[group, parity] = max(of_layer), max(of_group)
        for row in of_family.iter_rows(named=True):
            of_layer, of_group = bars[seats[row["unit"], layer, row["neuron"]][0], row["neuron"] % 2]
            own_higher += of_group > of_layer
            believed = row["f1_low"] > max(of_layer, of_group) and row["q"] <= 0.05
            assert believed == (row["verdict"] != twoway.NONE), row
    assert own_higher > 0


# -- Going on, and the same whatever the number of threads ----------------------------------------------------------


class _Stopped(BaseException):
    pass


@pytest.mark.slow
def test_interrupted_it_goes_on(
    mixed: tuple[Run, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it reads what is routed where, and while it counts, it gives the same tables, with two threads."""
    run, model = mixed
    built = build(model, texts(90), tmp_path / "run", top=24)
    seen: set[str] = set()

    stages = {"routing: what is routed where", "second look: what is routed where", "second look"}

    def stop(step):
        if step.done and step.stage in stages - seen:
            seen.add(step.stage)
            raise _Stopped

    monkeypatch.setattr("mnemoscope.mine.loop.CHECKPOINT_SECONDS", 0.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            with pytest.raises(_Stopped):
                patterns(open_run(built.path), model, Settings(budget=BUDGET), report=stop)
        again = patterns(open_run(built.path), model, Settings(budget=BUDGET), report=stop)
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 3 and not (again.path / WORK).exists()
    for name in ("patterns", "pattern_tests", "calibration"):
        assert again.manifest.tables[name] == run.manifest.tables[name]


# -- Own texts, without a model -------------------------------------------------------------------------------------


def _bits(*texts_of_experts: np.ndarray) -> np.ndarray:
    return np.stack([np.packbits(mask) for mask in texts_of_experts])


def test_an_expert_that_is_given_everything_is_a_dense_layer() -> None:
    """Search, held-out triggers and what is beyond the last token are the same, to the last bit."""
    text, _ = small_text(120)
    random = np.random.default_rng(3)
    mask = masks(text, ["suffix:tion"]).toarray()[:, 0]
    rows = [triggers(text, null(text, "independent", random)) for _ in range(10)]
    units = Units.of([*rows, triggers(text, fire(text, mask, 0.9, 0.9, random))])
    everything = OwnTexts(
        np.ones(len(units), np.int64), _bits(np.ones(len(text), bool)), np.ones(len(text), bool)
    )
    whole, own = search(text, units, QUICK), search(text, units, QUICK, own=everything)
    assert whole.candidates.equals(own.candidates) and whole.candidates.height > 10
    assert whole.calibration.drop("patterns", "classes").equals(own.calibration.drop("patterns", "classes"))
    claims = whole.candidates
    assert confirm(text, units, claims, QUICK).equals(confirm(text, units, claims, QUICK, everything))
    beyond = [beyond_last_token(text, units, claims, QUICK, texts) for texts in (None, everything)]
    assert beyond[0].equals(beyond[1])


@pytest.fixture(scope="module")
def narrow() -> tuple[Text, Units, OwnTexts, np.ndarray]:
    """Units of an expert that is given half of the words by a coin of their own, and of one that is given a few: each
    is noise, but for the last, which answers to one of the words that its expert is given."""
    text, _ = small_text(400)
    random = np.random.default_rng(4)
    ends = text.words.folded
    few = np.isin(np.array(ends, object)[text.words.word], words()[180:200])
    many = (text.tokens % 2 == 0) & text.counted
    few &= text.counted
    rows, number = [], []
    for index, mask in enumerate((few, many), start=1):
        for _ in range(80):
            values = null(text, "independent", random)
            rows.append(triggers(text, np.where(mask, values, -np.inf).astype(np.float32)))
            number.append(index)
    word = masks(text, [f"word:{words()[190]}"]).toarray()[:, 0]
    values = fire(text, word, 0.9, 0.9, random)
    rows.append(triggers(text, np.where(few, values, -np.inf).astype(np.float32)))
    number.append(1)
    return text, Units.of(rows), OwnTexts(np.array(number), _bits(few, many)), np.array(number)


@pytest.mark.slow
def test_noise_of_an_expert_has_no_pattern(narrow: tuple[Text, Units, OwnTexts, np.ndarray]) -> None:
    """Among what is routed to it, the family-wise p-value of its noise is uniform, and a word that is planted is found.
    Over all of the text, the words of an expert would be a pattern of many of its units."""
    text, units, own, number = narrow
    noise = np.arange(len(units) - 1)

    def best(found):
        first = found.candidates.filter((pl.col("tests") == "main") & (pl.col("rank") == 0))
        p = np.ones(len(units))
        p[first["unit"].to_numpy()] = first["p_family"].to_numpy()
        return first, p

    first, p = best(search(text, units, QUICK, own=own))
    for expert in (1, 2):
        here = p[noise[number[noise] == expert]]
        assert kstest(here, "uniform").pvalue > 0.01, expert
        assert (here < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(here))
    planted = first.filter(unit=len(units) - 1)
    assert words()[190] in planted["spec"][0] and planted["p_family"][0] < 0.01
    confirmed = confirm(text, units, first, QUICK, own)
    of_noise = confirmed.filter(pl.col("unit") < len(units) - 1)["p_test"].to_numpy()
    assert (of_noise < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(of_noise))
    _, without = best(search(text, units, QUICK))
    assert (without[noise[number[noise] == 1]] < 0.05).mean() > 0.2
