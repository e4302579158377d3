"""The blinded sheet: what it hides, what it refuses, and whether its scores are those of simulated annotators."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_run
from test_cli import call

from mnemoscope.annotation import answers, scores, sheet
from mnemoscope.annotation.draw import Matcher, null_items
from mnemoscope.annotation.key import Key, Prefix, SheetItem
from mnemoscope.errors import MnemoscopeError, RunMismatch, SheetError
from mnemoscope.intervals import Estimate
from mnemoscope.records import NeuronId
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.run.writing import add_tables
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.views import scores as score_views

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A synthetic run whose null directions are its own neurons, one layer up."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", documents=120, top=24, neurons=20)
    triggers = run.table("triggers").collect()
    null = triggers.select(pl.lit("random").alias("kind"), *triggers.columns)
    return add_tables(run.path, {"null_triggers": [null.to_arrow()]}, {})


@pytest.fixture(scope="module")
def made(run: Run) -> tuple[Lines, Key]:
    """A sheet of 12 neurons and 5 nulls."""
    return sheet.make(run, neurons=12, seed=5)


@pytest.fixture
def written(run: Run, tmp_path: Path) -> Path:
    """The same as a file."""
    return sheet.write(run, tmp_path / "sheet.jsonl", neurons=12, seed=5).sheet


def load(path: Path) -> Lines:
    """The lines of a sheet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(path: Path, lines: Lines) -> Path:
    """A sheet from its lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def fill(path: Path, answer: Callable[[str], tuple[Any, Any]]) -> Path:
    """Answer every item."""
    header, *lines = load(path)
    for line in lines:
        line["patterns"], line["applies"] = answer(line["item"])
    return save(path, [header, *lines])


def test_items_look_alike_and_tell_nothing(run: Run, made: tuple[Lines, Key]) -> None:
    """Same fields and sizes for neurons and nulls, and no address, rank, coefficient, seed or salt on the sheet."""
    (header, *lines), key = made
    assert Counter(item.kind for item in key.items.values()) == {
        "neuron": 12,
        "random": 2,
        "direction": 2,
        "mixed": 1,
    }
    assert {tuple(line) for line in lines} == {("item", "annotate", "patterns", "apply", "applies")}
    sizes = {(len(line["annotate"]), len(line["apply"])) for line in lines}
    assert sizes == {(header["prefixes"], 2 * header["prefixes"])}
    text = json.dumps([header, *lines])
    assert key.salt not in text
    assert not {"seed", "layer", "neuron", "rank", "kind"} & set(json.dumps(header).split('"'))
    order = [item.null for item in key.items.values()]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_every_prefix_is_where_the_key_says(run: Run, made: tuple[Lines, Key]) -> None:
    """The shown text ends with the token at the position that the key names, and is cut on the left alone."""
    (_, *lines), key = made
    text = Text.of(run)
    for line in lines:
        item = key.items[line["item"]]
        for part in ("annotate", "apply"):
            for shown, prefix in zip(line[part].values(), getattr(item, part), strict=True):
                row = int(text.rows(np.array(prefix.context), np.array(prefix.position)))
                assert shown == sheet.show(text, row)
                whole = run.vocabulary.visible(text.prefix(row, 10_000), edges=False)
                bare = shown.removeprefix("…").replace("⟦", "").replace("⟧", "")
                assert whole.endswith(bare) or "⟨" in bare


def test_neurons_bring_their_strongest_triggers_in_two_halves(run: Run, made: tuple[Lines, Key]) -> None:
    """Both halves together are the first triggers of the neuron, one of a document; the split is random."""
    _, key = made
    text, halves = Text.of(run), []
    for item in (one for one in key.items.values() if not one.null):
        rows = run.rows("triggers", item.layer, item.neuron).filter(polarity=item.polarity).sort("rank")
        documents = text.document[text.rows(rows["context"].to_numpy(), rows["position"].to_numpy())]
        first = rows.with_columns(document=pl.Series(documents)).unique(
            "document", keep="first", maintain_order=True
        )
        mine = [*item.annotate, *(prefix for prefix in item.apply if prefix.source)]
        assert sorted(prefix.rank for prefix in mine) == first["rank"].to_list()[: len(mine)]
        assert {(p.context, p.position, p.coefficient) for p in mine} <= set(
            rows.select("context", "position", "coefficient").iter_rows()
        )
        halves.append(np.mean([prefix.rank for prefix in item.annotate]))
    assert len(set(halves)) > 6


def test_no_document_twice_in_an_item(run: Run, made: tuple[Lines, Key]) -> None:
    """Annotated, held-out and distracting prefixes all come from different documents, though triggers do not."""
    document = dict(run.table("contexts").select("context", "document").collect().iter_rows())
    for item in made[1].items.values():
        mine = [document[prefix.context] for prefix in (*item.annotate, *item.apply)]
        assert len(set(mine)) == len(mine)
    some = next(one for one in made[1].items.values() if not one.null)
    raw = run.rows("triggers", some.layer, some.neuron).filter(polarity=some.polarity)["context"]
    assert len({document[context] for context in raw}) < len(raw)


@given(st.integers(8, 400))
def test_between_25_and_30_per_cent_are_null(neurons: int) -> None:
    """Whatever the number of neurons."""
    assert 0.25 <= null_items(neurons) / (neurons + null_items(neurons)) <= 0.30


def test_distractors_are_as_frequent_and_as_far_in() -> None:
    """The last token's frequency and the position lie in the same octave, wherever a document is left for it."""
    random = np.random.default_rng(0)
    contexts = [(i, i, (random.pareto(1.0, 40) * 2).astype(int).clip(0, 59)) for i in range(600)]
    text = Text.build(contexts, Vocabulary([bytes([65 + i]) for i in range(60)], [False] * 60))
    rows = random.choice(np.flatnonzero(text.counted & (text.document < 40)), 25, replace=False)
    found = np.array(list(Matcher(text, random).like(rows, rows)))
    often = np.bincount(text.tokens[text.counted])
    for measure in (often[text.tokens], text.position):
        octave = np.floor(np.log2(np.maximum(measure, 1)))
        assert (octave[rows] == octave[found]).mean() >= 0.9
    assert len(set(text.document[found])) == 25
    assert not set(text.document[found]) & set(text.document[rows])
    # Without the match, ordinary prefixes end otherwise.
    octave = np.floor(np.log2(np.maximum(often[text.tokens], 1)))
    plain = random.choice(np.flatnonzero(text.counted), 25)
    assert (octave[rows] == octave[plain]).mean() < 0.7


def test_the_same_seed_makes_the_same_sheet_under_another_seal(run: Run, made: tuple[Lines, Key]) -> None:
    """A seed fixes the items; the salt is new each time, so that the seed does not open the key."""
    (header, *lines), key = sheet.make(run, neurons=12, seed=5)
    assert lines == made[0][1:]
    assert key.items == made[1].items
    assert header["commitment"] != made[0][0]["commitment"]
    assert sheet.make(run, neurons=12, seed=6)[0][1:] != lines


def spoil_key(path: Path) -> None:
    """Turn a null into a neuron."""
    file = sheet.key_path(path)
    key = json.loads(file.read_text(encoding="utf-8"))
    name = next(name for name, item in key["items"].items() if item["kind"] != "neuron")
    key["items"][name] |= {"kind": "neuron", "layer": 0, "neuron": 1, "polarity": 1}
    file.write_text(json.dumps(key), encoding="utf-8")


def age_key(path: Path) -> None:
    """Let the key be of an older format."""
    file = sheet.key_path(path)
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "format": 0, "runs": []}))


def edit(change: Callable[[Lines], Any]) -> Callable[[Path], None]:
    """A change to the lines of a sheet."""

    def apply(path: Path) -> None:
        lines = load(path)
        change(lines)
        save(path, lines)

    return apply


GOOD = {"description": "ends", "indices": [1, 2, 3], "kind": "shallow"}
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tampered key": (spoil_key, "not the one that was sealed with this sheet, or was changed"),
    "no key": (lambda path: sheet.key_path(path).unlink(), "no such file"),
    "a key that is none": (lambda path: sheet.key_path(path).write_text("{}"), "it is not the key of a sheet"),
    "no sheet": (lambda path: path.unlink(), "no such file"),
    "not JSON": (lambda path: path.write_text("{oops"), "line 1: this is not JSON"),
    "another file": (lambda path: path.write_text('{"a": 1}\n'), "its first line is no header"),
    "an older sheet": (edit(lambda lines: lines[0].update(sheet=0)), "older version of mnemoscope (format 0; this"),
    "a newer sheet": (edit(lambda lines: lines[0].update(sheet=9)), "(format 9; this one reads 1); upgrade mnemoscope"),
    "no format": (edit(lambda lines: lines[0].pop("sheet")), "its first line is no header"),
    "an older key": (age_key, "(format 0; this one reads 1); write a new sheet with `mnemoscope annotate`"),
    "new commitment": (edit(lambda lines: lines[0].update(commitment="0" * 64)), "not the one that was sealed"),
    "changed text": (edit(lambda lines: lines[3]["annotate"].update({"1": "mine"})), "its texts are not those"),
    "lost item": (edit(lambda lines: lines.pop(4)), "item 04 is missing"),
    "doubled item": (edit(lambda lines: lines.append(lines[2])), "item 02 is there twice"),
    "nothing filled": (lambda path: None, "no item is answered"),
    "patterns": (edit(lambda lines: lines[1].update(patterns="yes")), "`patterns` is"),
    "a pattern": (edit(lambda lines: lines[1].update(patterns=["yes"])), "a pattern is"),
    "no description": (edit(lambda lines: lines[1].update(patterns=[GOOD | {"description": " "}])), "no description"),
    "kind": (edit(lambda lines: lines[1].update(patterns=[GOOD | {"kind": "deep"}])), "write one of shallow, semantic"),
    "two prefixes": (edit(lambda lines: lines[1].update(patterns=[GOOD | {"indices": [1, 2]}])), "a pattern needs 3"),
    "out of range": (edit(lambda lines: lines[1].update(patterns=[GOOD | {"indices": [1, 2, 99]}])), "numbers from 1"),
    "twice": (edit(lambda lines: lines[1].update(patterns=[GOOD | {"indices": [1, 2, 2]}])), "different numbers"),
    "applies": (edit(lambda lines: lines[1].update(patterns=[GOOD], applies=["a"])), "`applies` is"),
    "applies alone": (edit(lambda lines: lines[1].update(patterns=[], applies=[1])), "no pattern to apply"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(WRONG))
def test_what_is_refused(
    what: str, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tampered key, a changed text, a wrong answer: one clear line on stderr and exit code 2."""
    spoil, words = WRONG[what]
    spoil(written)
    code, out, err = call(monkeypatch, capsys, "annotate", "score", written)
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1, err
    assert words in err


@pytest.mark.slow
def test_a_sheet_of_another_run_is_refused(run: Run, written: Path, tmp_path: Path) -> None:
    """By the key of another sheet, and by the run itself."""
    fill(written, lambda _: ([], None))
    other = make_run(tmp_path / "other", documents=120, top=24, neurons=20, seed=1)
    theirs = sheet.write(other, tmp_path / "theirs.jsonl", neurons=12, seed=5)
    with pytest.raises(SheetError, match="not the one that was sealed with this sheet"):
        answers.read([written], key=theirs.key)
    with pytest.raises(RunMismatch, match="the sheet was made from another run"):
        answers.read([written], run=other)
    assert answers.read([written], run=run)[1][0].annotator == "sheet"


def test_what_no_sheet_can_be_made_of(run: Run, written: Path, tmp_path: Path) -> None:
    """Too few neurons or documents, and a sheet that is there already: said in one line."""
    with pytest.raises(SheetError, match="no room for hidden null items"):
        sheet.make(run, neurons=7)
    with pytest.raises(SheetError, match="fewer than neurons="):
        sheet.make(run, neurons=200)
    with pytest.raises(SheetError, match="take 5 or more"):
        sheet.make(run, prefixes=2)
    with pytest.raises(SheetError, match="is there already"):
        sheet.write(run, written)
    few = make_run(tmp_path / "few", documents=12, top=10)
    with pytest.raises(MnemoscopeError, match="more documents"):
        sheet.make(few, neurons=8)


def test_a_neuron_with_all_that_was_said_of_it(written: Path) -> None:
    """A28: prefixes in the order of the triggers, each with its patterns and their kind."""
    key, _ = answers.read([fill(written, lambda _: ([], None))])
    name, item = next((name, item) for name, item in key.items.items() if not item.null)
    deep = {"description": "about music", "indices": [3, 4, 5, 6], "kind": "semantic"}
    fill(written, lambda one: ([GOOD, deep], [1]) if one == name else ([], None))
    key, (filled,) = answers.read([written])
    rows = answers.annotated(key, filled, (item.layer, item.neuron))
    assert rows.height == len(item.annotate)
    assert rows["rank"].is_sorted()
    said = {prefix.rank: at for at, prefix in enumerate(item.annotate, 1)}
    for row in rows.iter_rows(named=True):
        at = said[row["rank"]]
        assert row["patterns"] == ["ends"] * (at in (1, 2, 3)) + ["about music"] * (at in (3, 4, 5, 6))
        assert row["kind"] == {1: "shallow", 2: "shallow", 3: "both"}.get(
            at, "semantic" if at < 7 else "none"
        )
        assert row["prefix"] == filled.answers[name].annotate[at - 1]
    other = next(
        one for one in range(8) if not any((i.layer, i.neuron) == (2, one) for i in key.items.values())
    )
    with pytest.raises(SheetError, match="it is not on the sheet"):
        answers.annotated(key, filled, (2, other))


def simulated(
    neurons: int, nulls: int, found: tuple[float, float], applied: tuple[float, float], seed: int = 0
) -> tuple[Key, answers.Filled]:
    """An annotator who finds a pattern in a share of neurons and of nulls, and applies it to shares of the prefixes."""
    random, size = np.random.default_rng(seed), 10
    prefix, other = (
        Prefix(context=0, position=1, rank=0, coefficient=1.0),
        Prefix(context=0, position=1, source=False),
    )
    parts: dict[str, Any] = {"annotate": (prefix,) * size, "apply": (prefix,) * size + (other,) * size}
    real, null_item = (SheetItem(kind=kind, digest="", **parts) for kind in ("neuron", "random"))
    items, said = {}, {}
    for number in range(neurons + nulls):
        null = number >= neurons
        items[str(number)] = null_item if null else real
        rates = np.repeat([applied[1]] * 2 if null else applied, size)
        patterns = (answers.SeenPattern("p", (0, 1, 2), "shallow"),) if random.random() < found[null] else ()
        applies = frozenset(np.flatnonzero(random.random(2 * size) < rates).tolist()) if patterns else None
        said[str(number)] = answers.SheetAnswer(patterns, applies, ("",) * size, ("",) * 2 * size)
    key = Key.model_construct(format=1, salt="", seed=0, model="m", corpus="c", run="", items=items)
    return key, answers.Filled(Path("a"), "a", said)


def test_scores_of_a_simulated_annotator() -> None:
    """Hit and false-alarm rates, d', corrected share, coverage: those that the annotator was made with."""
    key, filled = simulated(3000, 1200, (0.7, 0.2), (0.8, 0.1))
    found = scores.score(key, [filled], samples=50)
    (one,) = found.annotators
    z = stats.norm.ppf
    assert one.found.hit_rate.value == pytest.approx(0.7, abs=0.02)
    assert one.found.false_alarm_rate.value == pytest.approx(0.2, abs=0.03)
    assert one.found.d_prime.value == pytest.approx(z(0.7) - z(0.2), abs=0.12)
    assert one.found.corrected.value == pytest.approx((0.7 - 0.2) / (1 - 0.2), abs=0.04)
    assert one.applied.d_prime.value == pytest.approx(z(0.8) - z(0.1), abs=0.05)
    assert one.held.false_alarm_rate.value < 0.2 * scores.LEVEL + 0.01
    assert one.held.hit_rate.value == pytest.approx(0.7, abs=0.05)
    assert one.covered.value == pytest.approx(0.7 * 0.3, abs=0.01)
    assert one.patterns_in_nulls.value == pytest.approx(0.2, abs=0.03)
    assert one.false_alarms["random"][:2] == (1200, round(1200 * one.found.false_alarm_rate.value))
    assert found.agreement == {}


def test_who_guesses_has_no_sensitivity() -> None:
    """Patterns everywhere, nulls too: d' and the corrected share are about 0, and the intervals say so."""
    key, one = simulated(300, 120, (0.9, 0.9), (0.5, 0.5))
    (found,) = scores.score(key, [one]).annotators
    assert found.found.d_prime.low < 0 < found.found.d_prime.high
    assert found.applied.d_prime.low < 0 < found.applied.d_prime.high
    assert found.found.corrected.low == 0


@pytest.mark.slow
def test_the_intervals_hold_what_they_promise() -> None:
    """The 95 % interval of the hit rate covers the truth in about 95 of 100 repetitions."""
    covered = 0
    for seed in range(100):
        key, one = simulated(60, 24, (0.6, 0.2), (0.8, 0.1), seed)
        rate = scores.score(key, [one], samples=200, seed=seed).annotators[0].found.hit_rate
        covered += rate.low <= 0.6 <= rate.high
    assert 88 <= covered <= 100


def test_several_annotators_are_compared_on_the_same_units() -> None:
    """An annotator agrees with a copy, not with someone who guesses; what is left open does not count."""
    key, one = simulated(60, 24, (0.6, 0.4), (0.8, 0.1))
    _, other = simulated(60, 24, (0.5, 0.5), (0.4, 0.4), seed=1)
    twice = scores.score(key, [one, one], samples=50).agreement
    assert all(twice[name].cohen.value == 1 for name in ("found", "labels", "applied"))
    assert (twice["found"].units, twice["labels"].units, twice["applied"].units) == (84, 840, 1680)
    guess = scores.score(key, [one, other], samples=100).agreement["found"]
    assert guess.krippendorff.low < 0 < guess.krippendorff.high
    three = scores.score(key, [one, one, other], samples=10).agreement["found"]
    assert three.cohen.value is None
    assert three.annotators == 3
    silent = answers.SheetAnswer(None, None, ("",) * 10, ("",) * 20)
    half = answers.Filled(one.path, "b", one.answers | {str(i): silent for i in range(40)})
    found = scores.score(key, [one, half], samples=10)
    assert found.annotators[1].open == 40
    assert found.agreement["found"].units == 44


@given(st.integers(0, 20), st.integers(0, 20))
def test_holding_up_is_fishers_exact_test(hits: int, alarms: int) -> None:
    """One-sided, at .05, against scipy."""
    mine = (Prefix(context=0, position=1),) * 20 + (Prefix(context=0, position=1, source=False),) * 20
    item = SheetItem(kind="neuron", annotate=mine[:1], apply=mine, digest="")
    chosen = frozenset([*range(hits), *range(20, 20 + alarms)])
    answer = answers.SheetAnswer((answers.SeenPattern("p", (0, 1, 2), "shallow"),), chosen, ("",), ("",) * 40)
    p = stats.fisher_exact([[hits, 20 - hits], [alarms, 20 - alarms]], alternative="greater").pvalue
    assert scores.holds(answer, item) == (p <= 0.05)


def test_d_prime_and_its_correction() -> None:
    """20 of 25 hits and 10 of 25 false alarms: 1.095 without the correction (Stanislaw and Todorov 1999); with it,
    z(20.5 / 26) - z(10.5 / 26) (Hautus 1995), and finite where nothing or everything was hit."""
    many = 10**7
    scaled = scores.d_prime(*(np.array(float(n * many)) for n in (20, 25, 10, 25)))
    assert scaled == pytest.approx(1.095, abs=5e-4)
    counts = [np.array([float(n)]) for n in (20, 25, 10, 25)]
    assert scores.d_prime(*counts) == pytest.approx(stats.norm.ppf(20.5 / 26) - stats.norm.ppf(10.5 / 26))
    assert np.isfinite(scores.d_prime(*(np.array([float(n)]) for n in (25, 25, 0, 25))))
    everything, nothing = (40, 40, 15, 15), (0, 40, 0, 15)
    for extreme in (everything, nothing):  # a pattern in all items, or in none, is no sensitivity
        assert scores.d_prime(*(np.array([float(n)]) for n in extreme)) == pytest.approx(0)


@given(st.floats(0, 1), st.floats(0.55, 1), st.floats(0.55, 1))
def test_rogan_and_gladen_undo_what_a_test_does(
    prevalence: float, sensitivity: float, specificity: float
) -> None:
    """The apparent prevalence of a known test gives back the true one; a test that tells nothing gives none."""
    apparent = sensitivity * prevalence + (1 - specificity) * (1 - prevalence)
    found = scores.rogan_gladen(np.array(apparent), sensitivity, np.array(specificity))
    assert found == pytest.approx(prevalence, abs=1e-9)
    assert np.isnan(scores.rogan_gladen(np.array(0.5), 0.5, np.array(0.5)))


@pytest.mark.slow
def test_the_commands_from_end_to_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Write, fill, score two annotators, export a neuron."""
    first = tmp_path / "sheet.jsonl"
    words = ("--neurons", 12, "--seed", 5, "--out", first)
    code, out, err = call(monkeypatch, capsys, "annotate", run.path, *words)
    assert (code, out) == (0, ""), err
    assert "17 items" in err
    code, _, err = call(monkeypatch, capsys, "annotate", run.path, *words)
    assert (code, "is there already" in err) == (2, True)
    second = Path(shutil.copy(first, tmp_path / "ben.jsonl"))
    fill(first, lambda item: ([GOOD], [1, 2]) if int(item) % 2 else ([], None))
    fill(second, lambda item: ([GOOD], [2]) if int(item) % 3 else ([], None))
    code, out, err = call(monkeypatch, capsys, "annotate", "score", first, second, "--run", run.path)
    assert code == 0, err
    assert "12 neurons and 5 hidden null items" in out
    assert "Krippendorff" in out
    code, out, err = call(monkeypatch, capsys, "annotate", "score", first, "--json")
    assert (code, json.loads(out)["annotators"][0]["name"]) == (0, "sheet"), err
    key, (filled,) = answers.read([first])
    item = next(i for i in key.items.values() if not i.null)
    code, out, err = call(monkeypatch, capsys, "annotate", "export", first, NeuronId(item.layer, item.neuron))
    assert code == 0, err
    assert "as annotated by sheet" in out
    assert filled.answered


def test_scores_show_what_they_are(tmp_path: Path) -> None:
    """As a page, every figure with its interval, as the terminal has them; names stay text."""
    key, one = simulated(24, 12, (0.7, 0.2), (0.8, 0.1))
    _, other = simulated(24, 12, (0.5, 0.4), (0.6, 0.2), seed=1)
    two = scores.score(key, [replace(one, annotator="Anna <b>"), replace(other, annotator="ben")], samples=50)
    html = two.save(tmp_path / "scores.html").read_text(encoding="utf-8")
    assert "Anna &lt;b&gt;" in html and "Anna <b>" not in html
    for annotator in two.annotators:
        for judged in (annotator.found, annotator.held, annotator.applied):
            figures = (judged.hit_rate, judged.false_alarm_rate, judged.d_prime, judged.corrected)
            assert all(f"<td>{score_views.estimate(figure)}</td>" in html for figure in figures)
        assert f"<td>{score_views.estimate(annotator.patterns_in_nulls)}</td>" in html
    for agreed in two.agreement.values():
        assert f"<td>{score_views.estimate(agreed.krippendorff)}</td>" in html
    rows = score_views.drawn(two)
    assert [row.annotator for row in rows] == ["Anna <b>", "ben"] * 3
    assert all(row.hits.low <= row.hits.x <= row.hits.high for row in rows)
    assert rows[0].hits.x > rows[0].alarms.x and html.count("<circle") == 6
    alone = scores.score(key, [one], samples=10)._repr_html_()
    assert "agreement of" not in alone and '-gloss-hit-rate" popover' in alone


def test_a_figure_keeps_its_digits() -> None:
    """Only a nought that stands before the point is left out."""
    assert score_views.estimate(Estimate(10.5, -0.25, 20.04)) == "10.50 [-.25, 20.04]"
    assert score_views.estimate(Estimate(0.0, 0.0, 1.0)) == ".00 [.00, 1.00]"
    assert score_views.estimate(Estimate(None, None, None)) == "–"
