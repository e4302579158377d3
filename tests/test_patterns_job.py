"""Patterns of a whole run: planted neurons get their patterns, the tables add up, and nothing is lost on the way."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, tiny
from tiny import WORDS, texts, tokenizer

from mnemoscope import build, load_model, open_run
from mnemoscope.cli import main
from mnemoscope.errors import PatternError, QueryError, RunMismatch
from mnemoscope.mine.places import bin_of
from mnemoscope.model.capture import Capture
from mnemoscope.model.model import Model
from mnemoscope.neuron import find, twoway
from mnemoscope.neuron.card import card as card_of
from mnemoscope.patterns import sanity
from mnemoscope.patterns import summary as analysis
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.pattern import predicate
from mnemoscope.patterns.triggers import Options
from mnemoscope.records import NeuronId
from mnemoscope.results import PatternReport
from mnemoscope.run.reading import Run
from mnemoscope.run.text import Text
from mnemoscope.text.plan import batches
from mnemoscope.text.sampling import half
from mnemoscope.trials import hypothesis, job
from mnemoscope.trials.job import WORK, Settings, patterns
from mnemoscope.views.claims import sentence
from mnemoscope.views.page import page as page_of
from mnemoscope.views.patterns import summary as printed
from mnemoscope.views.terminal import plain

PLANTED = {3: " river", 4: " war", 5: " Paris"}  # neuron of layer 0 -> the word that switches it on
BUDGET = 3000
SIZE = 80


def planted_model(planted: Mapping[int, str] = PLANTED, neurons: int = 24) -> Model:
    """A few neurons of the first layer answer to one word each; all others, and all directions, to words and noise.

    Half of the residual stream is one-hot for the word, the other half a loud random mixture of the words before
    it, which attention writes. Only the planted neurons read nothing but the first half: without the mixture any
    direction would answer to some word purely, and none would stand out.
    """
    generator = torch.Generator().manual_seed(0)
    hf = tiny(
        "llama", vocab_size=SIZE, hidden_size=2 * SIZE, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=SIZE, intermediate_size=neurons, max_position_embeddings=64,
    )  # fmt: skip
    words = tokenizer()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else _random(parameter, generator))
        hf.model.embed_tokens.weight.copy_(torch.eye(SIZE, 2 * SIZE))
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[:SIZE] = 0
            layer.self_attn.o_proj.weight[SIZE:] *= 8
            layer.mlp.down_proj.weight.zero_()
        mlp = hf.model.layers[0].mlp
        for neuron, word in planted.items():
            for keys in (mlp.gate_proj, mlp.up_proj):
                keys.weight[neuron] = 0.5 * torch.eye(2 * SIZE)[words(word)["input_ids"][0]]
    return load_model(hf, tokenizer=words)


def _random(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5


@pytest.fixture(scope="module")
def model() -> Model:
    return planted_model()


@pytest.fixture(scope="module", autouse=True)
def fewer_draws() -> Iterator[None]:
    """A null of fewer drawn sets, which is what takes the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Options", partial(Options, draws=300))
        yield


@pytest.fixture(scope="module")
def bare(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(model, texts(160), tmp_path_factory.mktemp("patterns") / "run", top=24)


@pytest.fixture(scope="module")
def run(model: Model, bare: Run) -> Run:
    path = bare.path.with_name("found")
    shutil.copytree(bare.path, path)
    return patterns(open_run(path), model, Settings(budget=BUDGET))


def _tests(run: Run) -> pl.DataFrame:
    return run.table("pattern_tests").collect()


def test_planted_words_are_found(run: Run) -> None:
    """Each planted neuron means its word and nothing else: iff."""
    for neuron, word in PLANTED.items():
        mine = run.rows("pattern_tests", 0, neuron).filter(unit="neuron", polarity=1, tests="main")
        row = mine.row(0, named=True)
        assert word.strip().casefold() in row["name"].casefold(), row["name"]
        assert row["verdict"] == "iff", row
        assert row["specificity_rank"] == 0 and row["baseline_token"] > 0.9
        assert row["precision_low"] <= row["precision"] <= row["precision_high"]


def test_few_nulls_get_a_verdict(run: Run) -> None:
    """Of random directions and rotations, at most one in twenty has a pattern above the null."""
    rows = _tests(run).filter(pl.col("unit") != "neuron")
    units = run.table("calibration").filter(pl.col("measure") == "f1 of main").collect()
    total = units.filter(pl.col("unit") != "neuron")["count"].sum()
    assert total > 100
    assert rows.filter(pl.col("verdict") != "no pattern above the null").height <= 0.05 * total


def _copied(run: Run, path: Path) -> Path:
    shutil.copytree(run.path, path)
    return path


def test_figures_fall_when_labels_are_wrong(run: Run) -> None:
    """The sanity checks of every figure that may stand alone, on the claims of a whole run; the report says so."""
    known = analysis.summary(run)
    headline = known.sanity.filter(pl.col("figure").is_in(sanity.HEADLINE))
    assert headline.height == 6 and (headline["claims"] > 3).all()
    assert (headline["fell"] == headline["claims"]).all(), headline
    answer = " ".join(plain(printed(PatternReport(known, None, (), ()), layers=True), 100).split())
    assert "half of the labels removed" in answer and "it falls: F1 in" in answer


@pytest.mark.slow
def test_near_duplicates_are_one_document(model: Model, tmp_path: Path) -> None:
    """The job and a claim of one's own say how many documents count as another; the manifest keeps it."""
    own = texts(60)
    copies = [f"{text} river king" for text in own if len(text.split()) > 25]
    built = build(model, own + copies, tmp_path / "run", top=12)
    notes: list[str] = []
    found = patterns(built, model, Settings(budget=600), report=lambda step: notes.append(step.note))
    said = {"documents": len(copies), "groups": len(copies)}
    assert len(copies) > 10 and found.manifest.options["patterns"]["near_duplicates"] == said
    assert (
        sum(f"{len(copies)} of {60 + len(copies)} documents are nearly copies" in note for note in notes) == 1
    )
    known = analysis.summary(found)
    assert "documents are nearly copies" in known.notes[0]
    report = PatternReport(known, None, (), ())
    answer = " ".join(plain(printed(report, layers=True), 100).split())
    assert f"{len(copies)} of {60 + len(copies)} documents are nearly copies" in answer
    few = patterns(open_run(_copied(found, tmp_path / "few")), model, Settings(budget=60))
    assert any(
        "no pattern can be confirmed; give a larger budget" in note for note in analysis.summary(few).notes
    )
    asked: list[str] = []
    hypothesis.test(
        found, model, (0, 3), "word:river", budget=600, report=lambda step: asked.append(step.note)
    )
    assert sum("documents are nearly copies" in note for note in asked) == 1


def test_a_verdict_needs_more_than_a_lucky_token(run: Run) -> None:
    """A claim stands by the lower end of its F1, above pseudo-neurons of the other parity than its own. With the figure
    alone others would stand, on a few tokens."""
    rows = _tests(run).with_columns(
        pl.col("f1", "f1_low", "precision_low", "recall_low").fill_null(0), parity=pl.col("neuron") % 2
    )
    sizes = {"random": 24, "rotated": 24}
    level = {}
    for layer, tests in rows.select("layer", "tests").unique().iter_rows():
        for parity in (0, 1):
            bars = []
            for kind, size in sizes.items():
                of_kind = rows.filter(layer=layer, tests=tests, unit=kind, parity=1 - parity)["f1"].to_numpy()
                bars.append(np.quantile(np.append(of_kind, np.zeros(size - len(of_kind))), twoway.NULL_LEVEL))
            level[layer, tests, parity] = max(bars)
    bar = np.array([level[key] for key in rows.select("layer", "tests", "parity").iter_rows()])
    believed = (rows["verdict"] != "no pattern above the null").to_numpy()
    assert (((rows["f1_low"].to_numpy() > bar) & (rows["q"] <= 0.05).to_numpy()) == believed).all()
    doubted = ~believed & (rows["f1"].to_numpy() > bar) & (rows["q"] <= 0.05).to_numpy()
    assert doubted.any()
    assert rows["decoy_q"].null_count() == rows.height, "a run without decoys has none of theirs"


def _coefficients(run: Run, model: Model, documents: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """f32[layer row neuron] of the counted positions of some documents, in order; f64[layer row] spare."""
    contexts = run.table("contexts").collect()
    keep = contexts.filter(pl.col("document").is_in(documents))["context"].to_list()
    text = Text.of(run, keep)
    out = np.zeros((model.anatomy.n_layers, len(text), model.anatomy.sizes[0]), np.float32)
    special = run.manifest.options["special"]
    with Capture(model) as capture:
        for shard in range(run.table("shards").collect()["shard"].max() + 1):
            for batch in batches(run.file("contexts"), shard, special):

                def take(layer, m, batch, *_):
                    for place, context in enumerate(batch.contexts):
                        if int(context) in keep:
                            length = int(batch.lengths[place])
                            rows = text.rows(np.full(length, context), np.arange(length))
                            out[layer, rows] = m[place, :length].numpy()

                capture.sweep(batch, take)
    return out, text


def test_rows_are_what_numpy_counts(run: Run, model: Model) -> None:
    """A row of `pattern_tests` is the test, made again from all coefficients of documents of the test half."""
    rows = _tests(run).filter(pl.col("unit") == "neuron")
    documents = set(run.table("documents").collect()["document"].to_list())
    test = {d for d in documents if half(np.array([d]))[0]}
    assert rows["documents"][0] <= len(test)
    if rows["documents"][0] < len(test):
        pytest.fail("the budget is meant to hold the whole test half")
    m, text = _coefficients(run, model, test)
    for row in rows.sample(25, seed=0).iter_rows(named=True):
        mine = m[row["layer"], :, row["neuron"]][text.counted]
        shown = masks(text, [row["spec"]]).toarray()[text.counted, 0]
        active = mine >= row["threshold"] if row["polarity"] > 0 else mine <= row["threshold"]
        # Another batch gives other last bits, and a bin may begin between the two.
        assert abs(int(active.sum()) - row["active"]) <= 2
        assert abs(int((active & shown).sum()) - row["both"]) <= 2
        assert int(shown.sum()) == row["present"] and len(mine) == row["tokens"]
        assert sum(row["counts_present"]) == row["present"]
        assert np.abs(np.bincount(bin_of(mine[shown]), minlength=193) - row["counts_present"]).sum() <= 4
        if shown.any() and mine.std() > 0:
            assert row["pearson"] == pytest.approx(np.corrcoef(mine, shown)[0, 1], abs=1e-4)
        assert sum(row["quadrants_active"]) == row["active"]


def test_tables_agree(run: Run) -> None:
    """Each tested claim is a chosen candidate, found on triggers of one half and confirmed on those of the other."""
    address = ["layer", "neuron", "unit", "polarity", "tests"]
    candidates = run.table("patterns").collect()
    chosen = candidates.filter("chosen").select(*address, "spec")
    assert chosen.sort(address).equals(_tests(run).select(*address, "spec").sort(address))
    assert (candidates["test_hits"] <= candidates["test_triggers"]).all()
    by_triggers = candidates.filter(pl.col("tests") != "whole")
    bits = by_triggers["test_where"].to_numpy().view(np.uint64)
    assert (np.bitwise_count(bits) == by_triggers["test_hits"].to_numpy()).all()
    assert run.check() == [] and not (run.path / WORK).exists()
    assert run.manifest.options["patterns"]["budget"] == BUDGET
    assert run.manifest.options["patterns"]["near_duplicates"] == {"documents": 0, "groups": 0}


class _Stopped(BaseException):
    pass


@pytest.mark.slow
def test_interrupted_at_every_stage(
    bare: Run, run: Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in each stage in turn, it goes on, makes nothing twice, and gives the same bits."""
    path = Path(shutil.copytree(bare.path, tmp_path / "run"))
    searched = []
    original = job.search
    monkeypatch.setattr(job, "search", lambda *a: searched.append(1) or original(*a))
    seen: set[str] = set()

    def stop(step):
        if (
            step.stage in ("first look", "second look", "two-way test")
            and step.stage not in seen
            and step.done
        ):
            seen.add(step.stage)
            raise _Stopped

    for _ in range(3):
        with pytest.raises(_Stopped):
            patterns(open_run(path), model, Settings(budget=BUDGET), report=stop)
        assert open_run(path).check() == []
    again = patterns(open_run(path), model, Settings(budget=BUDGET), report=stop)
    assert len(searched) == 1 and len(seen) == 3
    for name in ("patterns", "pattern_tests", "calibration"):
        assert again.manifest.tables[name] == run.manifest.tables[name]


@pytest.mark.slow
def test_what_lies_there_from_other_settings_is_left(bare: Run, model: Model, tmp_path: Path) -> None:
    """Begun with another seed, it starts over."""
    path = Path(shutil.copytree(bare.path, tmp_path / "run"))
    (path / WORK).mkdir()
    (path / WORK / "identity.json").write_text(json.dumps({"settings": "others"}))
    (path / WORK / "candidates.parquet").write_bytes(b"not a table")
    found = patterns(open_run(path), model, Settings(budget=500))
    assert found.manifest.options["patterns"]["budget"] == 500


def test_what_is_known_is_not_sought_again(
    run: Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same settings nothing is done; a table that is lost is made again."""
    settings = Settings(budget=BUDGET)
    monkeypatch.setattr(job, "_Job", None)
    assert patterns(run, model, settings) is run and job.known(run, settings)
    assert not job.known(run, Settings(budget=BUDGET, seed=1))
    tables = {name: one for name, one in run.manifest.tables.items() if name != "calibration"}
    monkeypatch.setattr(run, "manifest", run.manifest.model_copy(update={"tables": tables}))
    assert not job.known(run, settings)


def test_refused(bare: Run, model: Model, tmp_path: Path) -> None:
    """Another model, no budget and too few documents are refused in a line, and the run stays as it was."""
    with pytest.raises(RunMismatch, match="weights"):
        patterns(bare, load_model(FAMILIES["llama"](), tokenizer=tokenizer()))
    with pytest.raises(PatternError, match="budget=0 is too small"):
        patterns(bare, model, Settings(budget=0))
    small = build(model, texts(6), tmp_path / "small", top=4)
    with pytest.raises(PatternError, match="each needs at least"):
        patterns(small, model)
    assert open_run(tmp_path / "small").check() == []
    assert WORDS


def test_the_card_says_it(run: Run) -> None:
    """Terminal, page and dictionary hold the verdict of a planted neuron, its intervals, curve and nulls."""
    card = card_of(run, (0, 3))
    claim = card.claims[0]
    shown, page = " ".join(str(card).split()), page_of(card)
    said = sentence(claim)
    assert re.search(r"When positive: \*.*river.*\* \(precision \S+ \[\S+, \S+\], recall .*, F1 ", said)
    assert "random directions of this layer: median F1" in said
    assert "): both ways (precise and complete). Precision and recall are both" in said
    for text in (shown, unescape(page)):
        assert "river" in text and "random directions of this layer: median F1" in text
        assert "1/2 of largest" in text and "gate > 0, up > 0" in text
    assert page.count("<polyline") >= 3
    assert json.loads(json.dumps(card.to_dict()))["claims"][0]["precision"]["low"] <= 1
    assert claim.definitions[0].f1 == pytest.approx(claim.f1.value)
    assert max(point.f1 for point in claim.curve) >= claim.f1.value - 1e-9
    assert claim.bands[0].shown >= claim.bands[-1].shown
    assert sum(band.tokens for band in claim.bands) == claim.tokens


def test_a_run_without_patterns_says_nothing_of_them(bare: Run) -> None:
    """No section where none were looked for, and a search says how to come by them."""
    card = card_of(bare, (0, 3))
    assert card.claims is None and "held-out" not in str(card)
    with pytest.raises(QueryError, match="mnemoscope patterns RUN"):
        find.pattern(bare, "river")


def test_the_run_in_a_page(run: Run) -> None:
    """Shares lie within their intervals, planted neurons are among the clearest, explained shares add up to one."""
    found = analysis.summary(run)
    assert {NeuronId(0, neuron) for neuron in PLANTED} <= set(found.clearest)
    assert not {NeuronId(0, neuron) for neuron in PLANTED} & set(found.silent)
    beyond = found.beyond
    assert beyond.filter(
        (pl.col("share") < pl.col("low") - 1e-9) | (pl.col("share") > pl.col("high") + 1e-9)
    ).is_empty()
    assert {"N1", "N2", "N3 random", "N3 rotated", "verdict"} == set(beyond["null"])
    shares = found.triggers.select(analysis.SHARES)
    np.testing.assert_allclose(shares.sum_horizontal(), 1, atol=1e-9)
    assert (shares.to_numpy() >= -1e-9).all()
    sides = {
        unit: some["sides"].sum()
        for (unit,), some in analysis._units(run).group_by("unit", maintain_order=True)
    }
    told = _tests(run).filter((pl.col("verdict") != twoway.NONE) & (pl.col("tests") == "main"))
    believed = told.filter(unit="neuron").height
    for row in found.expected.filter(tests="main").iter_rows(named=True):
        null = told.filter(unit=row["unit"]).height
        expected = null / sides[row["unit"]] / (believed / sides["neuron"])
        assert (row["believed"], row["null"]) == (believed, null) and row["share"] == pytest.approx(expected)
    cards = [card_of(run, address) for address in found.clearest]
    text = plain(printed(PatternReport(found, None, tuple(cards), ())), width=120)
    assert "neurons with a pattern beyond each null" not in text and "river" in text
    assert "neurons with a pattern beyond each null" in plain(
        printed(PatternReport(found, None, (), ()), layers=True), width=120
    )
    assert (
        f"the text so far: {believed} neurons and signs have a verdict; random directions would give" in text
    )
    json.dumps(found.to_dict())


def test_explained_triggers_by_hand(run: Run) -> None:
    """A8: the triggers of one layer, marked one by one."""
    rate = run.manifest.options["patterns"]["q"]
    rows = run.table("patterns").filter((pl.col("layer") == 0) & (pl.col("unit") == "neuron")).collect()
    rows = rows.filter(pl.col("tests") == "main")
    counts = dict.fromkeys(analysis.SHARES, 0)
    for _, unit in rows.group_by("neuron", "polarity"):
        for trigger in range(unit["test_triggers"][0]):
            met = unit.filter(
                (pl.col("q") <= rate) & pl.Series([(bits >> trigger) & 1 == 1 for bits in unit["test_where"]])
            )
            deep = ((met["kind"] == "semantic") & (met["token_q"] <= rate)).sum()
            flat = met.height - deep
            counts["both" if deep and flat else "semantic" if deep else "shallow" if flat else "none"] += 1
    found = analysis.summary(run).triggers.filter((pl.col("layer") == 0) & (pl.col("unit") == "neuron"))
    total = found["triggers"][0]
    for name in ("shallow", "both", "semantic"):
        assert found[name][0] * total == pytest.approx(counts[name], abs=1)


def test_found_by_a_word(run: Run) -> None:
    """A word of its pattern finds the neuron, once; a word of none is refused."""
    found = find.pattern(run, "RIVER")
    assert found.rows["neuron"][0] == "L0N3" and found.rows["verdict"][0] == "iff"
    with pytest.raises(QueryError, match="none has a pattern of that name"):
        find.pattern(run, "zebra")
    mine = _tests(run).filter(unit="neuron").select("layer", "neuron", "polarity", "name")
    twice = mine.filter(mine.is_duplicated())
    assert twice.height > 0
    for name in twice["name"].unique():
        rows = find.pattern(run, name, count=1000).rows
        assert rows.select("neuron", "sign", "pattern").is_duplicated().sum() == 0


@pytest.mark.slow
def test_my_own_claim(run: Run, bare: Run, model: Model) -> None:
    """The planted word is iff, its polarity is found out, a part of it is a part, another word is nothing."""
    claim = hypothesis.test(bare, model, (0, 3), "word:river", budget=BUDGET)
    assert (claim.verdict, claim.polarity) == ("iff", 1) and claim.specificity_rank == 0
    stored = card_of(run, (0, 3)).claims[0]
    assert (claim.active, claim.present, claim.both) == (stored.active, stored.present, stored.both)
    assert {null.kind for null in claim.nulls} == {"random", "rotated"}
    more = hypothesis.test(bare, model, (0, 3), "words:river,war,king,queen", budget=BUDGET)
    assert more.verdict in ("active -> pattern", "no pattern above the null") and more.precision.value == 1
    assert (
        hypothesis.test(bare, model, (0, 3), "word:war", budget=BUDGET).verdict == "no pattern above the null"
    )
    asked = predicate(lambda text: text.endswith(" river"), "ends with river")
    assert hypothesis.test(bare, model, (0, 3), asked, budget=BUDGET).f1.value == claim.f1.value


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("regex:(", "regex"),
        ("word:zebra", "holds at none of"),
        ("regex:.", "holds at all of"),
        ("nonsense", "no such pattern"),
    ],
)
def test_claims_that_cannot_be_tested(bare: Run, model: Model, pattern: str, words: str) -> None:
    """One line that says what is wrong with the pattern."""
    with pytest.raises(PatternError, match=words) as caught:
        hypothesis.test(bare, model, (0, 3), pattern, budget=BUDGET)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_commands(
    bare: Run,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """patterns, show, find and test, as a user would type them; what is wrong is one line and exit code 2."""
    folder, path = tmp_path / "model", shutil.copytree(bare.path, tmp_path / "run")
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return int(caught.value.code or 0), out.out, out.err

    reading = ("--model", folder, "--budget", BUDGET)
    code, out, _ = call("patterns", path, *reading, "--json")
    assert code == 0 and "L0N3" in json.loads(out)["clearest"]
    code, out, _ = call("test", path, "L0N3", "--pattern", "word:river", *reading, "--json")
    assert code == 0 and json.loads(out)["verdict"] == "iff"
    code, out, _ = call("test", path, "L0N3", "--pattern", "word:river", *reading)
    assert code == 0 and "Precision and recall are both certainly at least a half." in " ".join(out.split())
    assert "held-out text" in call("show", path, "L0N3")[1]
    assert "L0N3" in call("find", path, "--pattern", "river")[1]
    for pattern in ("regex:(", "word:zebra", "nonsense"):
        code, _, error = call("test", path, "L0N3", "--pattern", pattern, *reading)
        assert code == 2 and [line for line in error.splitlines() if "mnemoscope: " in line], error
    assert call("test", path, "L0N3", "--pattern", "year", "--sign", "up", *reading)[0] == 2
