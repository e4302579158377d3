"""Tested patterns on cards: what is read back, the sweep of what active means, and how it is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from synthetic import make_run

from mnemoscope.errors import QueryError
from mnemoscope.mine.kernel import BINS
from mnemoscope.mine.places import bin_of
from mnemoscope.neuron import find, twoway
from mnemoscope.neuron.card import card as card_of
from mnemoscope.neuron.claims import ORDER, Claim, Share
from mnemoscope.patterns.summary import SHARES, Summary
from mnemoscope.results import PatternReport
from mnemoscope.run.reading import Run
from mnemoscope.run.schemas import SCHEMAS
from mnemoscope.run.writing import add_tables
from mnemoscope.views import answers, claims, patterns
from mnemoscope.views.card import card as printed
from mnemoscope.views.page import page as page_of
from mnemoscope.views.terminal import plain

EDGE = 1.25


def _row(
    neuron: int, polarity: int, seed: int, **given: Any
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A row of `pattern_tests`, and the coefficients and presence behind it."""
    generator = np.random.default_rng(seed)
    shown = generator.random(4000) < 0.05
    m = polarity * (generator.normal(0, 0.3, 4000) + shown * generator.gamma(4, 0.6, 4000))
    active = polarity * m >= EDGE
    both = active & shown
    row = dict.fromkeys(SCHEMAS["pattern_tests"].names)
    shares = {"precision": both.sum() / active.sum(), "recall": both.sum() / shown.sum()}
    shares["f1"] = 2 * both.sum() / (active.sum() + shown.sum())
    for end, shift in (("", 0), ("_low", -0.03), ("_high", 0.03)):
        row |= {f"{name}{end}": value + shift for name, value in shares.items()}
    parts = {"present": shown, "absent": ~shown}
    counts = {name: np.bincount(bin_of(m[part]), minlength=BINS).tolist() for name, part in parts.items()}
    row |= {
        "layer": 1,
        "neuron": neuron,
        "unit": "neuron",
        "polarity": polarity,
        "tests": "main",
        "spec": "year",
    }
    row |= {
        "name": "a <year>",
        "family": "form",
        "kind": "shallow",
        "complexity": 1,
        "threshold": polarity * EDGE,
    }
    row |= {"tokens": 4000, "documents": 40, "active": int(active.sum()), "present": int(shown.sum())}
    row |= {"both": int(both.sum()), "iou": 0.5, "auprc": 0.8, "pearson": 0.7, "mutual_information": 0.1}
    row |= {"baseline_constant": 0.1, "baseline_random": 0.05, "baseline_token": 0.4, "baseline_other": 0.01}
    row |= {"specificity_rank": 0, "specificity_null": 0.02, "q": 0.001, "verdict": "active -> pattern"}
    quadrants = [int(active.sum()) - 5, 5, 0, 0]
    row |= {"quadrants_active": quadrants, "quadrants_both": [int(both.sum()) - 2, 2, 0, 0]}
    row |= {f"counts_{name}": part for name, part in counts.items()}
    return row | given, m, shown


def _calibration() -> list[dict[str, Any]]:
    levels = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0]
    rows = [
        {"layer": 1, "unit": kind, "measure": "f1 of main", "count": 128, "levels": levels, "values": values}
        for kind, values in (
            ("random", [0, 0, 0.05, 0.11, 0.15, 0.2, 0.24, 0.3]),
            ("rotated", [0, 0, 0, 0.02, 0.1, 0.1, 0.2, 0.2]),
        )
    ]
    write = {"layer": 1, "unit": "neuron", "measure": "write", "count": 10, "levels": [0.5, 0.9, 0.99, 0.999]}
    return [*rows, write | {"values": [0.01, 0.1, 0.5, 2.0]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A synthetic run with claims of three neurons of layer 1, one of them not believed."""
    run = make_run(tmp_path_factory.mktemp("claims") / "run")
    none = _row(5, 1, 2, verdict=twoway.NONE, q=0.5, name="about bands", spec="topic:3:band,album")[0]
    rows = [_row(3, 1, 0)[0], _row(3, 1, 0, tests="next", verdict=twoway.NONE)[0], _row(4, -1, 1)[0], none]
    tables = {
        "pattern_tests": [pa.Table.from_pylist(rows, SCHEMAS["pattern_tests"])],
        "calibration": [pa.Table.from_pylist(_calibration(), SCHEMAS["calibration"])],
    }
    return add_tables(run.path, tables, {"patterns": {"least": 0.5, "q": 0.05, "fdr": 0.1}})


def _claim(run: Run, neuron: int) -> Claim:
    return card_of(run, (1, neuron)).claims[0]


@pytest.mark.parametrize(("neuron", "polarity", "seed"), [(3, 1, 0), (4, -1, 1)])
def test_the_sweep_by_hand(run: Run, neuron: int, polarity: int, seed: int) -> None:
    """Each meaning of active, from the coefficients: tokens, precision, recall and verdict; both polarities."""
    _, m, shown = _row(neuron, polarity, seed)
    claim, norm = _claim(run, neuron), run.rows("neurons", 1, neuron)["value_norm"][0]
    score = m * polarity
    found = {one.name: one for one in claim.definitions}
    assert next(iter(found)) == "chosen"
    for name, one in found.items():
        if "gate" in name:
            continue
        active = np.abs(m) >= EDGE if "either" in name else score >= abs(one.threshold or 0)
        assert one.active == active.mean(), name
        assert one.precision == pytest.approx(shown[active].mean()), name
        assert one.recall == pytest.approx(active[shown].mean()), name
    assert found["top 1 % of tokens"].active <= 0.01 < found["top 10 % of tokens"].active <= 0.1
    assert found["above 0 (2⁻¹²)"].verdict == twoway.NONE  # half of all tokens are: F1 is below the null
    assert found["chosen"].verdict == "iff"  # by the figures alone
    write = next(one for name, one in found.items() if "|v|" in name)
    assert abs(write.threshold) >= 0.5 / norm > abs(write.threshold) / 1.25
    assert (
        found["chosen, gate > 0, up < 0"].active == 5 / 4000
        and found["chosen, gate > 0, up < 0"].precision == 0.4
    )


def test_down_the_range_by_hand(run: Run) -> None:
    """Bands are disjoint, hold all tokens, and their shares are those of the tokens between their edges."""
    _, m, shown = _row(3, 1, 0)
    bands = _claim(run, 3).bands
    assert sum(band.tokens for band in bands) == len(m)
    order = np.argsort(-m)
    start = 0
    for band in bands:
        mine = order[start : start + band.tokens]
        assert band.shown == pytest.approx(shown[mine].mean(), abs=1e-9)
        start += band.tokens
    assert bands[0].shown > 0.9 > bands[-1].shown


def test_the_curve_by_hand(run: Run) -> None:
    """Every point of the curve is what a threshold there gives."""
    _, m, shown = _row(3, 1, 0)
    for point in _claim(run, 3).curve:
        active = m >= point.threshold
        assert point.active == active.mean() and point.precision == pytest.approx(shown[active].mean())
        assert point.recall == pytest.approx(active[shown].mean())


def test_the_sentence(run: Run) -> None:
    """It reads as it should."""
    claim = _claim(run, 3)
    precision, recall, f1 = (claims.decimal(part.value) for part in (claim.precision, claim.recall, claim.f1))
    found = claims.sentence(claim)
    assert found.startswith(f"When positive: *a <year>* (precision {precision} [")
    assert (
        f"recall {recall} [" in found
        and f"F1 {f1} [" in found
        and "; random directions of this layer: median F1 .11, " in found
    )
    assert found.endswith(
        "99th percentile .20): precise. Precision is certainly at least a half, recall is not: it may know only a part "
        "of the pattern."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.934, ".93"),
        (0.0, "0"),
        (1.0, "1"),
        (0.9999, "> .99"),
        (0.0001, "< .01"),
        (-0.25, "-.25"),
        (None, "–"),
    ],
)
def test_decimals(value: float | None, text: str) -> None:
    """Two places, never all or nothing when it is neither."""
    assert claims.decimal(value) == text


def test_undefined_figures_are_said() -> None:
    """A share of nothing is undefined, and not zero."""
    assert claims.interval(Share(None, None, None)) == "undefined"


def test_terminal_page_and_dictionary_agree(run: Run) -> None:
    """All three hold the verdict, what it rests on and the sweep; the page escapes; a doubted claim is one line."""
    card = card_of(run, (1, 3))
    shown, page = " ".join(str(card).split()), page_of(card)
    claim = card.claims[0]
    for part in (
        claims.where_active(claim),
        claims.figures(claim),
        claims.baselines(claim),
        claims.bands(claim),
        "Precision, P(pattern | active), and recall, P(active | pattern), are the two sides of a claim.",
    ):
        assert part in shown and part in unescape(re.sub(r"</?(?:button|span)[^>]*>", "", page))
    assert "a <year>" in shown and "a <year>" not in page and "a &lt;year&gt;" in page
    for one in claim.definitions:
        assert one.name in unescape(page)
    assert page.count("<polyline") == 3  # of the claim that is believed, not of the other
    assert [claim.tests for claim in card.claims] == ["main", "next"]
    found = json.loads(json.dumps(card.to_dict()))["claims"][0]
    assert (
        found["precision"]["value"] == claim.precision.value and found["definitions"][0]["name"] == "chosen"
    )
    doubted = plain(printed(card_of(run, (1, 5))))
    row = claims.doubted(next(one for one in card_of(run, (1, 5)).claims if one.verdict == twoway.NONE))
    line = next(line for line in doubted.splitlines() if row[0] in line)
    assert all(cell in line for cell in row) and "other explanations" not in doubted
    assert claims.DOUBTED[0] in doubted and claims.DOUBTED[0] in page_of(card_of(run, (1, 5)))
    assert "none that its triggers share" in str(card_of(run, (1, 6)))


def test_narrow_terminal(run: Run) -> None:
    """Nothing is wider than the terminal, and nothing crashes at 60 columns."""
    for width in (60, 80, 120):
        lines = plain(printed(card_of(run, (1, 3))), width=width).splitlines()
        assert max(map(len, lines)) <= width


def test_found_by_pattern(run: Run) -> None:
    """Believed neurons first; the layer can be given; what no neuron has is refused."""
    found = find.pattern(run, "YEAR")
    assert sorted(found.rows["neuron"].to_list()) == ["L1N3", "L1N3", "L1N4"] and found.total == 3
    assert found.rows["f1"][0] > found.rows["f1"][1]
    assert found.rows["verdict"].to_list()[-1] == twoway.NONE
    assert find.pattern(run, "band", layer=1).rows["neuron"].to_list() == ["L1N5"]
    for text_, layer in (("band", 0), ("zebra", None), (" ", None)):
        with pytest.raises(QueryError, match="none has a pattern of that name"):
            find.pattern(run, text_, layer=layer)


def test_tested_neurons_clearest_first(run: Run) -> None:
    """Every claim with a verdict once, by the lower end of F1, beside how many the nulls have."""
    found = find.tested(run)
    rows = run.table("pattern_tests").filter(pl.col("verdict") != twoway.NONE).collect()
    assert found.total == rows.height == 2
    first = rows.sort("f1_low", descending=True).row(0, named=True)
    assert (
        found.rows["neuron"][0] == f"L{first['layer']}N{first['neuron']}"
        and found.rows["f1"][0] == first["f1"]
    )
    assert find.tested(run, layer=0).total == 0 and find.tested(run, layer=1).total == 2
    assert "neurons 2 of 4" in found.null and ORDER in found.question
    shown = plain(answers.found(found))
    assert "precision" in shown and "recall" in shown and "precise" in shown and "->" not in shown


def _report(summary: Summary) -> PatternReport:
    return PatternReport(summary, None, (), ())


def _summary(claims: int, *, path: str = "runs/demo", with_decoys: bool = False) -> Summary:
    """What a run amounts to, made by hand."""
    names = [f"the token “{'long ' * (place % 5)}{place}”" for place in range(claims)]
    ends = {f"{side}{end}": [value] * claims for side in ("precision", "recall", "f1")
            for end, value in (("", 0.91), ("_low", 0.83), ("_high", 0.97))}  # fmt: skip
    frame = pl.DataFrame(
        {"layer": list(range(claims)), "neuron": [1005] * claims, "polarity": [1, -1] * (claims // 2), "name": names,
         "verdict": [twoway.IFF] * claims, "about": ["the text so far"] * claims, **ends}
    )  # fmt: skip
    verdicts = pl.DataFrame(
        [("neuron", "main", twoway.IFF, 700), ("neuron", "main", twoway.NONE, 9_000), ("random", "main", twoway.IFF, 1),
         ("neuron", "next", twoway.NEITHER, 234), ("neuron", "next", twoway.NONE, 3)],
        ["unit", "tests", "verdict", "len"], orient="row",
    )  # fmt: skip
    expected = pl.DataFrame(
        [("main", "random", 700, 1, 0.13, 0.02, 0.7), ("main", "rotated", 700, 1, 0.1, 0.02, 0.6),
         ("next", "random", 234, 0, 0.0, 0.0, 0.4)],
        ["tests", "unit", "believed", "null", "share", "low", "high"], orient="row",
    )  # fmt: skip
    decoys = pl.DataFrame(
        [(tests, level, 1_000, 90, 0.09) for tests in ("main", "next") for level in (0.05, 0.1, 0.2) if with_decoys],
        {"tests": pl.String, "level": pl.Float64, "neurons": pl.Int64, "decoys": pl.Int64, "share": pl.Float64},
        orient="row",
    )  # fmt: skip
    excess = pl.DataFrame(
        [("main", "chimera", 0.5, 0.123, 0.08, 0.043, 0.031, 0.055)] if with_decoys else [],
        dict.fromkeys(("tests", "unit"), pl.String)
        | dict.fromkeys(("f1", "neurons", "decoys", "excess", "low", "high"), pl.Float64),
        orient="row",
    )  # fmt: skip
    beyond = pl.DataFrame(
        [(layer, unit, "main", "N1", 10, 1, 0.1, 0.0, 0.4) for layer in range(30) for unit in ("neuron", "random")],
        ["layer", "unit", "tests", "null", "units", "count", "share", "low", "high"], orient="row",
    )  # fmt: skip
    shares = pl.DataFrame(
        [(0, "neuron", 0.5, 0.1, 0.1, 0.3, 100)], ["layer", "unit", *SHARES, "triggers"], orient="row"
    )
    return Summary(beyond, verdicts, expected, decoys, excess, shares, frame, (), path)


@pytest.mark.parametrize("width", [80, 120])
def test_patterns_answer_first(width: int) -> None:
    """Totals beside the nulls' rates and the ten clearest stand in the first 25 lines; tables only when asked for."""
    lines = plain(patterns.summary(_report(_summary(10))), width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) <= 32
    top = " ".join(" ".join(lines[:25]).split())
    assert (
        "700 neurons and signs have a verdict; random directions would give 13 % [2, 70] as many, rotated "
        "axes 10 % [2, 60]" in top
    )
    assert all(f"L{layer}N1005" in top for layer in range(10))
    assert top.count(".91 [.83, .97] .91 [.83, .97] both ways") == 10
    assert "--layers" in " ".join(lines) and "find runs/demo --tested" in " ".join(lines)
    assert "beyond each null" not in " ".join(lines)
    whole = plain(patterns.summary(_report(_summary(10)), layers=True), width)
    assert "beyond each null" in whole and whole.startswith("\n".join(lines[:20]))


def test_decoys_answer_first_where_there_are_some() -> None:
    """What beats its decoys, by the rate of false discoveries, and the excess with its interval and what it is of."""
    lines = plain(patterns.summary(_report(_summary(10, with_decoys=True))), 100).splitlines()
    top = " ".join(" ".join(lines[:25]).split())
    assert (
        "beat their decoys, by the rate of false discoveries: 1,000 at 5.0 %, 1,000 at 10 %, 1,000 at 20 %"
        in top
    )
    assert (
        "12.30 % of them, 8.00 % of chimeras (the gate of one neuron, the up of another): +4.30 [3.10, 5.50]"
        in top
    )
    assert "would give" not in top


def test_a_claim_says_what_its_decoy_reaches(run: Run) -> None:
    """Beside the nulls, with how surely the neuron does more; nothing in a run without decoys."""
    claim = _claim(run, 3)
    assert "decoy" not in claims.evidence(claim)
    beaten = replace(claim, decoy_f1_low=0.123, decoy_q=0.034)
    reached = "its own decoy: F1 .12 at the lower end, "
    assert claims.evidence(beaten).endswith(f"{reached}beaten at a rate of false discoveries of 3.4 %)")
    assert claims.evidence(replace(beaten, decoy_q=1.0)).endswith(f"{reached}not surely less)")


def test_patterns_without_a_verdict() -> None:
    """Nothing found is said in a sentence."""
    none = replace(_summary(0), expected=_summary(0).expected.with_columns(believed=pl.lit(0)))
    assert plain(patterns.summary(_report(none))).startswith("no neuron has a verdict")


def test_a_run_without_patterns(tmp_path: Path) -> None:
    """No section where none were looked for, and a question says how to come by them."""
    bare = make_run(tmp_path / "bare")
    assert card_of(bare, (1, 3)).claims is None and "held-out" not in str(card_of(bare, (1, 3)))
    with pytest.raises(QueryError, match="mnemoscope patterns RUN"):
        find.pattern(bare, "year")
    with pytest.raises(QueryError, match="mnemoscope patterns RUN"):
        find.tested(bare)
    assert isinstance(bare.table("neurons"), pl.LazyFrame)
