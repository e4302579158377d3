"""Patterns by the whole distribution: what triggers cannot certify is found, and chance is not."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from planted_patterns import fire, null, small_text, triggers
from scipy.stats import kstest

from mnemoscope.patterns import space
from mnemoscope.patterns.language import masks
from mnemoscope.patterns.pattern import parse
from mnemoscope.patterns.search import SearchResult, search
from mnemoscope.patterns.triggers import FOUND, Options, Units, halves
from mnemoscope.patterns.whole import SINGLES, Counted, Language, by_document, proposed, surprise
from mnemoscope.records import MAIN, WHOLE
from mnemoscope.run.text import Text
from mnemoscope.text.vocabulary import Vocabulary
from mnemoscope.trials import masked_text
from mnemoscope.trials.heldout import FURTHER, confirm, discovery_rate
from mnemoscope.trials.masked_text import MaskedText


def _documents(random: np.random.Generator, claims: int, correlated: float) -> tuple[np.ndarray, np.ndarray]:
    """Active tokens with a pattern and their expectation, [claim, document], where documents differ in both how much a
    unit is active and how much of the pattern they have, and the two have nothing to do with each other."""
    size = random.integers(50, 400, (claims, 200))
    rate = random.beta(2, 8, (claims, 200)) * correlated + 0.2 * (1 - correlated)
    active = random.binomial(size, random.beta(0.5, 8, (claims, 200)))
    return random.binomial(active, rate), active * 0.2


def test_chance_is_uniform() -> None:
    """Without any relation the p-value is uniform."""
    both, expected = _documents(np.random.default_rng(0), 1500, 0.0)
    assert kstest(by_document(both, expected), "uniform").pvalue > 0.01


@pytest.mark.parametrize("correlated", [0.5, 1.0])
def test_chance_passes_no_oftener(correlated: float) -> None:
    """However much documents differ, unrelated units pass no oftener than they may; the trap: they do if each token is
    a witness of its own."""
    both, expected = _documents(np.random.default_rng(1), 4000, correlated)
    for level in (0.05, 0.01):
        assert (by_document(both, expected) <= level).mean() <= 1.3 * level
    active = expected.sum(1) / 0.2
    z = (both.sum(1) - expected.sum(1)) / np.sqrt(active * 0.2 * 0.8)
    assert (z > 1.645).mean() > 0.1


def test_what_shows_nothing() -> None:
    """Nothing active, or a single document: no evidence."""
    nothing = np.zeros((1, 4), np.uint16)
    assert by_document(nothing, nothing.astype(np.float32)) == 1
    assert by_document(np.array([[50, 0, 0]]), np.array([[1.0, 0, 0]]))[0] > 0.2


def test_chance_falls_with_evidence() -> None:
    """More documents with an excess make a smaller p; a lack is none."""
    excess = np.tril(np.ones((30, 30)))
    p = by_document(3 * excess, excess)
    assert (np.diff(p) < 0).all()
    assert (by_document(excess, 3 * excess) > 0.5).all()


def _found(specs: list[tuple[str, str, float]]) -> SearchResult:
    return SearchResult(pl.DataFrame(schema=FOUND), pl.DataFrame(), {}, specs)


def test_language() -> None:
    """Common patterns first, then words; a word may be both."""
    language = Language.of(
        _found(
            [("year", "", 0.2), ("folded:[1]", "word:a", 0.1), ("word:b", "word:b", 0.01), ("date", "", 1e-4)]
        )
    )
    assert (language.specs, language.common) == (["year", "folded:[1]", "word:a", "word:b"], 2)
    assert Language.read(language.frame) == language


def test_proposed_by_hand() -> None:
    """The most surprising patterns, and unions of the words where a unit is most often active."""
    random = np.random.default_rng(2)
    specs = ["year", "date", "money", "percent", *(f"word:{letter}" for letter in "abcdefg")]
    expected = random.uniform(1, 20, (50, len(specs)))
    counted = Counted(random.poisson(expected * random.choice([1, 3], expected.shape)), expected, np.full(50, 400),
                      np.full(len(specs), 300))  # fmt: skip
    frame = proposed(counted, Language(specs, 4), np.arange(100, 150))
    assert (frame["unit"].unique().sort() == pl.Series(range(100, 150))).all()
    assert set(frame["tests"]) == {WHOLE}
    for row in range(50):
        mine = frame.filter(pl.col("unit") == 100 + row).sort("rank")
        z = surprise(counted.both[row], expected[row], np.full(len(specs), 400))
        assert mine["rank"].to_list() == list(range(len(mine)))
        singles = mine.filter((pl.col("complexity") == 1) & ~pl.col("spec").str.starts_with("word:"))
        assert singles["spec"].to_list() == [
            specs[place] for place in np.argsort(-z[:4], kind="stable")[:SINGLES]
        ]
        clear = [column for column in range(4, len(specs)) if z[column] >= 3]
        clear.sort(key=lambda column: -(counted.both[row] - expected[row])[column])
        unions = [
            {part.spec for part in parse(spec).arguments} if spec.startswith("any:") else {spec}
            for spec in mine["spec"]
            if spec.startswith(("any:", "word:"))
        ]
        assert sorted(unions, key=len) == [
            {specs[column] for column in clear[:size]} for size in range(1, min(len(clear), 4) + 1)
        ]
        for hit, base, spec in mine.select("hits", "base_rate", "spec").iter_rows():
            parts = (
                [specs.index(part.spec) for part in parse(spec).arguments]
                if spec[:4] == "any:"
                else [specs.index(spec)]
            )
            assert (hit, base) == pytest.approx(
                (counted.both[row, parts].sum(), expected[row, parts].sum() / 400)
            )


@pytest.fixture(scope="module")
def text() -> Text:
    return small_text(500)[0]


def _passed(text: Text, units: list[np.ndarray], language: Language) -> list[tuple[str, float]]:
    """The claim of each unit that is most surprising in the discovery half, and its p in the test half; all in dense
    numpy."""
    parts = [text.part(documents) for documents in halves(text.document)]
    out = []
    for values in units:
        (first, rows), (second, others) = parts
        active = values[rows] >= np.quantile(values[rows][first.counted], 0.98)
        early = MaskedText(first, masks(first, language.specs))
        strata = np.bincount(early.stratum[active & first.counted], minlength=early.strata)
        shown = early.columns.toarray()
        counted = Counted(
            shown[active & first.counted].sum(0)[None],
            (strata @ early.rates(np.arange(len(language.specs))))[None].astype(float),
            np.array([strata.sum()]),
            early.shown(np.arange(len(language.specs))).sum(1),
        )
        candidates = proposed(counted, language, np.zeros(1, int))["spec"]
        if not len(candidates):
            out.append(("", 1.0))
            continue
        spec = candidates[0]
        late = MaskedText(second, masks(second, [spec]))
        active = (values[others] >= np.quantile(values[others][second.counted], 0.98)) & second.counted
        chance = late.rates(np.array([0]))[late.stratum, 0]
        both, expected = (
            np.bincount(late.group[active], part[active], minlength=late.groups)[None]
            for part in (late.columns.toarray()[:, 0], chance)
        )
        out.append((spec, float(by_document(both, expected)[0])))
    return out


@pytest.mark.slow
def test_what_triggers_cannot_certify(text: Text) -> None:
    """A pattern that a fifth of the prefixes have, half of the time: the whole distribution finds it, triggers do not
    confirm it; units that know nothing pass neither."""
    random = np.random.default_rng(3)
    found = search(text, Units.of([np.arange(1)]), Options(tests=(MAIN,), draws=100))
    rates = [(spec, rate) for spec, _, rate in found.language if 0.2 < rate < 0.3 and "@" in spec]
    assert rates
    planted = [spec for spec, _ in rates[:: max(len(rates) // 6, 1)]][:6]
    units = [fire(text, masks(text, [spec]).toarray()[:, 0], 0.5, 0.5, random) for spec in planted]
    units += [null(text, kind, random) for kind in ("independent", "document", "position") for _ in range(5)]
    claims = _passed(text, units, Language.of(found))
    truth = masks(text, planted).toarray()
    like = _likes(text, pl.Series([spec for spec, _ in claims[:6]]), truth)
    right = [p < 1e-3 and share > 0.7 for (_, p), share in zip(claims, like, strict=False)]
    assert sum(right) >= 5, claims
    assert sum(p < 0.05 for _, p in claims[6:]) <= 3
    of_six = Units.of([triggers(text, values) for values in units[:6]])
    by_triggers = search(text, of_six, Options(tests=(MAIN,), draws=300)).candidates.filter(FURTHER)
    tested = confirm(text, of_six, by_triggers)
    rates = discovery_rate(tested["p_test"].to_numpy(), np.ones(len(tested), bool))
    right = [share > 0.7 for share in _likes(text, tested["spec"], truth[:, tested["unit"]])]
    assert tested.filter(pl.Series(rates <= 0.05) & pl.Series(right))["unit"].n_unique() <= 3


def _likes(text: Text, specs: pl.Series, truth: np.ndarray) -> list[float]:
    """The Jaccard index of each pattern with what was planted, bool[prefix, pattern]."""
    shown = masks(text, specs.to_list()).toarray()
    return [float((a & b).sum() / (a | b).sum()) for a, b in zip(shown.T, truth.T, strict=True)]


@pytest.mark.slow
def test_narrow_strata_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trap: units that follow the frequency of tokens within .12 nats, not among the commonest, seem to know words
    where a stratum is half an octave of frequency and 16 tokens; hardly any does where it is as narrow as they are."""
    random = np.random.default_rng(11)
    names = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("l", "n", "r", "s", "th")]
    weights = 1 / np.arange(2, 2 + len(names))
    tokens = random.choice(len(names), (500, 120), p=weights / weights.sum())
    text = Text.build([(d, d, row) for d, row in enumerate(tokens)], Vocabulary([f" {n}".encode() for n in names],
                      [False] * len(names)))  # fmt: skip
    language = Language([f"word:{name}" for name in names], 0)
    units = [null(text, "narrow", random) for _ in range(40)]
    narrow = np.mean([p < 0.01 for _, p in _passed(text, units, language)])
    monkeypatch.setattr(space, "NARROW", 0.35)
    monkeypatch.setattr(masked_text, "FEWER", 16)
    coarse = np.mean([p < 0.01 for _, p in _passed(text, units, language)])
    assert narrow <= 0.1 and coarse > 0.3, (narrow, coarse)


def test_a_common_word_is_proposed_once() -> None:
    """It stands in the language twice, as a common pattern and as a part of unions."""
    language = Language(["word:a", "year", "word:a", "word:b"], 2)
    both = np.array([[60, 5, 60, 30]])
    counted = Counted(both, both / 5, np.array([300]), np.full(4, 100))
    specs = proposed(counted, language, np.zeros(1, int))["spec"].to_list()
    assert sorted(specs) == ['any:["word:a","word:b"]', "word:a", "year"]


@pytest.mark.parametrize("specs", [[], ["year"], ["word:a"]])
def test_little_to_propose(specs: list[str]) -> None:
    """No common pattern, no word, nothing active: fewer candidates, or none."""
    counted = Counted(
        np.full((2, len(specs)), 9), np.ones((2, len(specs))), np.array([30, 0]), np.full(len(specs), 9)
    )
    frame = proposed(counted, Language(specs, specs.count("year")), np.array([4, 7]))
    assert frame.schema == FOUND
    assert frame.select("unit", "spec").rows() == [(4, spec) for spec in specs]
