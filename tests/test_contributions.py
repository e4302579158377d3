"""Contributions: the identities behind them, and a certified search that finds what brute force finds."""

from __future__ import annotations

import sys
from functools import cache, partial

import pytest
import torch
from effort import tries
from families import FAMILIES
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mnemoscope.model.lens import LENSES, Lens
from mnemoscope.model.reading import describe
from mnemoscope.prediction.bases import Geometry, ResidualBases
from mnemoscope.prediction.search import IntervalSurvey, Parts, TopK, certified, exhaustive, search

WIDTH, VOCABULARY = 12, 2200


def _lens(unembedding: Tensor, name: str = "raw") -> Lens:
    return Lens(name, None, unembedding, None, 1.0, None)


def _bases(unembedding: Tensor, residual: Tensor, target: int) -> ResidualBases:
    return ResidualBases(_lens(unembedding), target, residual[None], None)


@cache
def _family_lens(family: str, name: str) -> Lens:
    return Lens.of(describe(FAMILIES[family]()), name)


def test_a_uniform_vector_changes_nothing() -> None:
    """A vector with the same logit for every token leaves every probability as it was (A34)."""
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.cat([torch.randn(50, 5, generator=generator), torch.ones(50, 1)], 1)
    residual = torch.randn(6, generator=generator)
    uniform = torch.tensor([[0.0, 0, 0, 0, 0, 3.0], [0, 0, 0, 0, 0, -200.0]])
    for target in range(50):
        found = _bases(unembedding, residual, target).increases(uniform, torch.zeros(2, dtype=torch.long))
        assert found.abs().max() < 1e-6


def test_the_papers_example_of_two_vectors_with_one_rank() -> None:
    """bs [3, 3, 1, 1] gains more on token 0 from [5, 1, 1, 4] than from [5, 4, 1, 1], which rank it alike (A45)."""
    x = torch.tensor([3.0, 3, 1, 1])
    a, b = torch.tensor([5.0, 4, 1, 1]), torch.tensor([5.0, 1, 1, 4])
    found = _bases(torch.eye(4), x, 0).increases(torch.stack([a, b]), torch.zeros(2, dtype=torch.long))
    for value, v in zip(found, (a, b), strict=True):
        expected = (x + v).log_softmax(0)[0] - x.log_softmax(0)[0]
        assert float(value) == pytest.approx(float(expected), abs=1e-6)
    assert found[1] > found[0]
    assert found.tolist() == pytest.approx([0.503, 0.752], abs=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 40.0])
@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "phi", "cohere"])
def test_the_formula_is_the_difference_of_two_log_probabilities(family: str, lens: str, size: float) -> None:
    """C is log p(w | x + v) - log p(w | x) in fp64, for vectors of any size, under every lens and with a cap."""
    reading = _family_lens(family, lens)
    generator = torch.Generator().manual_seed(3)
    x, final = torch.randn(2, reading.unembedding.shape[1], generator=generator)
    v = size * torch.randn(7, len(x), generator=generator)
    scale = reading.scale(final)
    bases = ResidualBases(reading, 11, torch.stack([x, final]), scale)
    base = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    found = bases.increases(v, base)
    exact = partial(_log_p, reading, scale=scale.double())
    expected = exact(bases.residuals[base].double() + v) - exact(bases.residuals[base].double())
    assert torch.allclose(found, expected[:, 11], rtol=2e-6, atol=4e-6)


def _log_p(lens: Lens, x: Tensor, *, scale: Tensor) -> Tensor:
    """In fp64, written out."""
    norm, rows = lens.norm, lens.unembedding.double()
    if lens.name != "raw" and norm is not None:
        x = norm.linear(x, norm.scale(x) if lens.name == "own" else scale)
        x = x if norm.bias is None else x + norm.bias.double()
    logits = x @ rows.T + (0 if lens.bias is None else lens.bias.double())
    logits = logits * lens.multiplier
    return (logits if lens.softcap is None else lens.softcap * (logits / lens.softcap).tanh()).log_softmax(-1)


def _problem(seed: int, spread: float, length: float) -> tuple[ResidualBases, list[Parts]]:
    """A vocabulary, four residuals and three groups of vectors of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = torch.randn(VOCABULARY, WIDTH, generator=generator) + 0.5
    residuals = spread * torch.randn(4, WIDTH, generator=generator)
    groups = []
    for base in range(3):
        vectors = torch.randn(200, WIDTH, generator=generator)
        vectors *= length * torch.randn(200, 1, generator=generator).exp()
        groups.append(Parts(200, base, lambda index, v=vectors: v if index is None else v[index]))
    return ResidualBases(_lens(unembedding), 5, residuals, None), groups


@tries(16)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.floats(1e-3, 3.0), st.integers(1, 20), st.booleans())
def test_the_search_finds_what_brute_force_finds(
    seed: int, spread: float, length: float, k: int, screen: bool
) -> None:
    """The k largest and k smallest by both measures, with the same values, in fewer evaluations when it can."""
    bases, groups = _problem(seed, spread, length)
    final = None if screen else 3  # the screen is for one measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[search.__module__], "native_bf16", lambda: screen)
        (found,) = search(bases, [TopK(groups, k)], final=final)
    every = torch.cat([exhaustive(bases, group, final=final) for group in groups])
    place = (found.group * 200 + found.index).tolist()
    assert torch.allclose(found.values, every[place], atol=1e-6)
    for column in range(every.shape[1]):
        order = every[:, column].argsort()
        assert {*order[:k].tolist(), *order[-k:].tolist()} <= set(place)
    assert found.full <= found.of == 600


@tries(12)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.floats(1e-3, 10.0))
def test_the_bounds_hold(seed: int, spread: float, length: float) -> None:
    """Every interval of every stage holds the exact value."""
    bases, groups = _problem(seed, spread, length)
    every = torch.cat([exhaustive(bases, group, final=3) for group in groups])
    for count, screen in ((0, False), (64, False), (1024, False), (0, True), (64, True)):
        bounds = certified(bases, groups, count, final=3, screen=screen)
        assert bool((bounds[..., 0] <= every + 1e-9).all())
        assert bool((bounds[..., 1] >= every - 1e-9).all())


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "olmo"])
def test_families_agree_with_brute_force(family: str, lens: str) -> None:
    """Under every lens, with layer norms, multipliers and a soft cap, the search is exact."""
    reading = _family_lens(family, lens)
    generator = torch.Generator().manual_seed(1)
    width = reading.unembedding.shape[1]
    residuals = torch.randn(3, width, generator=generator)
    vectors = torch.randn(300, width, generator=generator) * torch.rand(300, 1, generator=generator) ** 3
    bases = ResidualBases(reading, 2, residuals, reading.scale(residuals[-1]), Geometry(reading.unembedding))
    groups = [Parts(300, base, lambda index: vectors if index is None else vectors[index]) for base in (0, 1)]
    (found,) = search(bases, [TopK(groups, 10)], final=2)
    every = torch.cat([exhaustive(bases, group, final=2) for group in groups])
    place = (found.group * 300 + found.index).tolist()
    assert torch.allclose(found.values, every[place], atol=1e-5)
    for column in range(2):
        order = every[:, column].argsort()
        assert {*order[:10].tolist(), *order[-10:].tolist()} <= set(place)


def _increases(bases: ResidualBases, vectors: Tensor) -> Tensor:
    """In fp64, without the target's own term: nothing cancels where it has nearly all of the probability."""
    rows, target = bases.lens.unembedding.double(), bases.target
    delta, p = vectors.double() @ rows.T, (bases.residuals[0].double() @ rows.T).softmax(-1)
    beside = (delta - delta[:, [target]]).expm1()
    beside[:, target] = 0
    return -(beside @ p).log1p()


@tries(24)
@given(st.integers(0, 10**6), st.floats(0, 34), st.floats(1e-4, 0.3))
@example(1, 22.0, 0.02)
@example(1, 30.0, 0.02)  # 1 - p = 1e-8: half of the signs were wrong, and certified
def test_no_certified_sign_is_wrong_however_sure_the_prediction_is(
    seed: int, sure: float, length: float
) -> None:
    """Intervals hold what fp64 finds, with p of the target up to 1 - 1e-9; few signs are open; estimates come close."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = torch.randn(3000, 24, generator=generator)
    towards = unembedding[5] / unembedding[5].square().sum()
    residual = 0.3 * torch.randn(24, generator=generator) + 1.3 * sure * towards
    vectors = (
        length * torch.randn(150, 24, generator=generator) * torch.randn(150, 1, generator=generator).exp()
    )
    bases = _bases(unembedding, residual, 5)
    group = Parts(150, 0, lambda index: vectors if index is None else vectors[index])
    (found,) = IntervalSurvey(bases, 4)([group])
    exact = _increases(bases, vectors)
    assert bool(((found.low <= exact) & (exact <= found.high)).all())
    assert bool((found.signs * exact >= 0).all())
    if length < 0.05:  # longer ones than neurons write cannot be told by a mean and a variance
        assert float((found.signs == 0).float().mean()) < 0.2
        assert float((found.likely - exact).abs().sum() / exact.abs().sum()) < 0.05
    every = exhaustive(bases, group)[:, 0]
    doubt = bases.rounding(vectors.norm(dim=1), torch.zeros(150, dtype=torch.long), every)
    assert bool(((every - exact).abs() <= doubt).all())
    assert float(doubt.sum() / exact.abs().sum()) < 0.02


def test_a_logit_above_the_mean_tokens_is_additive() -> None:
    """It is U_w v less the mean of U_j v, whatever the residual and however sure the prediction (A44)."""
    bases, groups = _problem(0, 3.0, 0.3)
    vectors = groups[0].vectors(None)
    logits = vectors @ bases.lens.unembedding.T
    base = torch.arange(200) % 4
    found = bases.above_mean(vectors, base)
    assert torch.allclose(found.float(), logits[:, 5] - logits.mean(1), atol=1e-4)
    total = bases.above_mean(vectors.sum(0, keepdim=True), base[:1])
    assert float(total) == pytest.approx(float(found.sum()), rel=1e-4)


def test_leagues_do_not_mix() -> None:
    """Parts that are ranked apart are found apart, whatever their sizes."""
    bases, groups = _problem(0, 1.0, 0.3)
    small, large = search(bases, [TopK(groups[:1], 3), TopK(groups[1:], 5)], final=3)
    (alone,) = search(bases, [TopK(groups[:1], 3)], final=3)
    assert torch.equal(small.index, alone.index)
    assert int(small.group.max()) == 0
    assert int(large.group.max()) <= 1
    assert (small.of, large.of) == (200, 400)


def test_a_screen_is_tight() -> None:
    """All tokens in bf16 leave little doubt: far less than bounds from a part of them."""
    bases, groups = _problem(0, 1.0, 0.3)
    wide, narrow = (certified(bases, groups, 64, screen=screen).diff(dim=-1) for screen in (False, True))
    assert float(narrow.median()) < float(wide.median()) / 5


def test_the_search_saves_evaluations() -> None:
    """With vectors of ordinary lengths it takes a small part of them through the whole vocabulary."""
    bases, groups = _problem(0, 1.0, 0.02)
    (found,) = search(bases, [TopK(groups, 5)], final=3)
    assert found.full < 100 < found.of
