"""The headline of an explanation against the frames it is made from: every name and number, its sign and its unit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
from effort import tries
from hypothesis import given
from hypothesis import strategies as st
from synthetic_explanation import make

from mnemoscope import explain, load_model
from mnemoscope.prediction import headline
from mnemoscope.prediction.explanation import Contrast, Explanation
from mnemoscope.views.explanation import page, terminal
from mnemoscope.views.terminal import plain

_LAYERS = re.compile(
    r"(attention in layers?|the feed-forward layers?) (\d+)(?: to (\d+))? \(([+-]\d+\.\d\d)\)"
)
_HEADS = re.compile(r"L(\d+)H(\d+) reading “(.*?)” \(([+-]\d+\.\d\d)\)")
_NEURON = re.compile(r"L(\d+)N(\d+) (helps|hurts) most among neurons \(([+-]\d+\.\d\d)\)")


def check(one: Explanation) -> None:
    """Everything that the sentence says is in the frames."""
    said = one.headline
    record: Explanation | Contrast = one.contrasts[0] if one.contrasts else one
    measure = "increase" if one.contrasts else "leave_one_out"
    sign = _opening(one, said)
    numbers = re.findall(r"\([+-]\d+\.\d\d\)", said)
    found = 0
    for kind, first, last, nats in _LAYERS.findall(said):
        part = "attention" if kind.startswith("attention") else "ffn"
        rows = record.layers.filter(
            (pl.col("part") == part) & pl.col("layer").is_between(int(first), int(last or first))
        )["increase"]
        assert len(rows) == int(last or first) - int(first) + 1 <= headline.RUN
        assert float(nats) == pytest.approx(rows.sum(), abs=0.0051)
        assert ((rows * sign) > 0).all()
        found += 1
    for layer, head, source, nats in _HEADS.findall(said):
        rows = record.heads.filter((pl.col("layer") == int(layer)) & (pl.col("head") == int(head)))
        rows = rows.filter((pl.col("source_token") == source) | (source == "∅") | ("⟨" in source))
        assert any(abs(float(nats) - value) < 0.0051 and value * sign > 0 for value in rows[measure])
        assert max(record.heads[measure] * sign) == pytest.approx(float(nats) * sign, abs=0.0051)
        found += 1
    for layer, neuron, verb, nats in _NEURON.findall(said):
        rows = record.neurons.filter((pl.col("layer") == int(layer)) & (pl.col("neuron") == int(neuron)))
        assert float(nats) == pytest.approx(rows[measure][0], abs=0.0051)
        assert max(record.neurons[measure] * sign) == pytest.approx(float(nats) * sign, abs=0.0051)
        assert (verb == "helps") == (sign > 0) == (float(nats) > 0)
        found += 1
    assert found == len(numbers)  # no number stands without a name that was looked up
    increase = float((record.layers["increase"] * sign).clip(lower_bound=0).sum())
    assert ("no layer moves it" in said) == (increase < headline.SHOWN)
    if "spread over many" in said:
        assert said.count("largest single part") == 1 and "mostly through" not in said
    elif increase >= headline.SHOWN:
        assert "mostly through" in said


def _opening(one: Explanation, said: str) -> int:
    """The first clause: tokens, probabilities, who is ahead and by how much; returns the sign that it is about."""
    assert said.startswith(headline.token(one.target.piece))
    chance = float(one.stream["probability"][-1])
    assert f"({headline.probability(chance)}" in said
    if one.contrasts:
        contrast = one.contrasts[0]
        words = "ahead of" if contrast.total >= 0 else "behind"
        foil = f"{headline.token(contrast.foil.piece)} ({headline.probability(contrast.probability)})"
        assert f"is {words} {foil} by {abs(contrast.total):.2f} nats" in said
        return 1 if contrast.total >= 0 else -1
    wins = one.predictions["token"][0] == one.target.token
    assert wins == ("wins" in said)
    assert wins or f"rank {one.stream['rank'][-1]:,}" in said
    assert wins or f"the model's choice is {headline.token(one.predictions['piece'][0])}" in said
    if one.total < 0:
        assert f"{'take' if wins else 'loses'} {-one.total:.2f} nats" in said
    return 1 if one.total >= 0 else -1


def _drawn(seed: int, scale: float, shift: float, sparse: float, **options: object) -> Explanation:
    """An explanation with other numbers: of some size, with a drift, most of them zero if sparse."""
    one = make(**options)  # type: ignore[arg-type]
    random = np.random.default_rng(seed)

    def values(count: int) -> pl.Series:
        drawn = random.normal(shift, 1, count) * scale * (random.random(count) >= sparse)
        return pl.Series(drawn)

    def changed(rows: pl.DataFrame) -> pl.DataFrame:
        names = [name for name in ("increase", "leave_one_out") if name in rows.columns]
        return rows.with_columns(**{name: values(rows.height) for name in names})

    def with_frames(record: object) -> dict[str, pl.DataFrame]:
        return {name: changed(getattr(record, name)) for name in ("layers", "heads", "neurons")}

    frames = with_frames(one)
    log_p = -5 + np.concatenate([[0], np.cumsum(frames["layers"]["increase"].to_numpy())])
    log_p -= max(log_p.max() + 0.01, 0)
    stream = one.stream.with_columns(log_probability=pl.Series(log_p), probability=pl.Series(np.exp(log_p)))
    contrasts = tuple(
        replace(each, **some, total=each.start + float(some["layers"]["increase"].sum()))
        for each in one.contrasts
        for some in [with_frames(each)]
    )
    return replace(one, stream=stream, contrasts=contrasts, **frames)


@tries(60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.001, 0.1, 1.0, 4.0]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
    sparse=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    layers=st.sampled_from([1, 2, 4, 30]),
    foils=st.sampled_from([(), (" London",), (" London", " Bordeaux")]),
    target=st.sampled_from([" Paris", " ", "\n", "", "“x”", " باريس"]),
)
def test_a_headline_says_what_the_frames_hold(
    seed: int, scale: float, shift: float, sparse: float, layers: int, foils: tuple[str, ...], target: str
) -> None:
    """Whatever the numbers, each name and number of the sentence is found in the frames with its sign."""
    check(_drawn(seed, scale, shift, sparse, layers=layers, foils=foils, target=target))


def _flat(one: Explanation) -> Explanation:
    """A model that is dead: no part changes anything."""
    frames = {
        name: getattr(one, name).with_columns(increase=pl.lit(0.0), leave_one_out=pl.lit(0.0))
        for name in ("layers", "heads", "neurons")
    }
    return replace(one, stream=one.stream.with_columns(log_probability=pl.lit(-2.0)), **frames)


CASES = {
    "wins": (make(foils=()), "wins, mostly through"),
    "no choice": (
        replace(make(foils=()), target=replace(make().target, token=999)),
        "the model's choice is “ Paris”, 0.74) gains",
    ),
    "negative total": (_drawn(1, 1.0, -1.0, 0.0, foils=()), "hurts most among neurons"),
    "even": (
        replace(
            make(foils=(), layers=30),
            heads=make(foils=(), layers=30).heads.with_columns(leave_one_out=pl.lit(0.1)),
        ),
        "spread over many: the largest single part is",
    ),
    "ahead": (make(), "is ahead of “ London”"),
    "behind": (_drawn(2, 1.0, -2.0, 0.0), "is behind “ London”"),
    "parallel": (make(parallel=True, gated=False, biases=False, foils=()), "wins"),
    "dead": (_flat(make(foils=())), "no layer moves it."),
    "no heads or neurons": (
        replace(make(foils=()), heads=make().heads.head(0), neurons=make().neurons.head(0)),
        "wins, mostly through",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    """Each kind of answer has its sentence."""
    one, words = CASES[name]
    assert words in one.headline
    check(one)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_headline_of_a_model(family: str, tmp_path: Path) -> None:
    """From real frames, sequential and parallel, with a foil ahead, a foil behind, and without."""
    model = load_model(tiny.model_folder(tmp_path, family), dtype="fp32")
    for target, foils in ((None, []), (" king", []), (" king", [" queen"]), (" queen", [" king"])):
        check(explain(model, "the capital of the", target, foils))


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_headline_is_on_every_view(width: int) -> None:
    """Terminal, page and JSON have the same sentence, with the unit beside it."""
    for one in (make(), make(foils=())):
        lines = " ".join(plain(terminal.report(one), width).split())
        assert " ".join(one.headline.split()) in lines
        assert "In nats" in lines and "In nats" in re.sub(r"<[^>]+>", "", page.page(one))
        assert one.headline.replace("'", "&#39;") in page.page(one)
        assert json.loads(json.dumps(one.to_dict(), default=str))["headline"] == one.headline
