"""What values and keys say of the vocabulary, read piece by piece, against whole rows sorted in the open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from effort import tries
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

import mnemoscope as mn
from mnemoscope.mine import values
from mnemoscope.mine.values import Ends, _in_pieces, _in_rows, ends
from mnemoscope.model.lens import Lens

PATHS = {"in pieces": _in_pieces, "in rows": _in_rows}

KINDS = {
    "normal": lambda r, s: 3 * r.standard_normal(s),
    "many ties": lambda r, s: r.choice([-1.0, -0.5, 0.0, 0.5], s),
    "zeros of both signs": lambda r, s: r.choice([0.0, -0.0], s),
    "far apart": lambda r, s: r.choice([-1.0, 1.0], s) * 2.0 ** r.integers(-20, 12, s),
    "rising": lambda r, s: np.arange(s[1]) + r.random(s),  # every piece has a new largest
    "falling": lambda r, s: -np.arange(s[1]) + r.random(s),
}


def plain(scores: np.ndarray, k: int) -> Ends:
    """The definition: a stable sort from either end, and a softmax in fp64."""
    order = [np.argsort(sign * scores, axis=1, kind="stable")[:, :k] for sign in (-1, 1)]
    columns = np.stack(order, 1)
    wide = scores.astype(np.float64)
    top = wide.max(1, keepdims=True)
    mass = np.exp(wide - top).sum(1)
    entropies = np.log(mass) - (np.exp(wide - top) * (wide - top)).sum(1) / mass
    kept = np.take_along_axis(scores[:, None], columns, 2)
    return Ends(columns.astype(np.int32), kept, top[:, 0] + np.log(mass), entropies)


def read(path: str, scores: np.ndarray, k: int) -> Ends:
    """All rows of a matrix, by one of the two paths."""
    table = torch.from_numpy(scores)
    rows, columns = scores.shape
    return PATHS[path](lambda some, tokens: table[some, tokens], range(rows), columns, min(k, columns), True)


@pytest.mark.parametrize("path", PATHS)
@tries(25)
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 3, 70, 300]),
    columns=st.sampled_from([1, 5, 63, 64, 65, 1024, 1025, 2500]),
    k=st.sampled_from([1, 2, 10, 50]),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_rows_are_read_as_they_are_defined(
    path: str, seed: int, rows: int, columns: int, k: int, kind: str
) -> None:
    """The same columns in the same order, ties and all; sums to a part in a billion, or as fp32 has them."""
    scores = KINDS[kind](np.random.default_rng(seed), (rows, columns)).astype(np.float32)
    found, expected = read(path, scores, k), plain(scores, k)
    assert np.array_equal(found.columns, expected.columns)
    assert np.array_equal(found.scores, expected.scores)
    slack, more = (1e-9, 1e-9) if path == "in pieces" else (3e-7, 1e-5)  # fp64, or fp32
    np.testing.assert_allclose(found.normalisers, expected.normalisers, rtol=slack, atol=slack)
    np.testing.assert_allclose(found.entropies, expected.entropies, rtol=more, atol=more / 5)


def test_bf16_is_read_as_it_is() -> None:
    """The same numbers as in fp32, without a copy."""
    scores = torch.from_numpy(
        np.random.default_rng(0).standard_normal((9, 700)).astype(np.float32)
    ).bfloat16()
    half, whole = (
        ends(lambda some, tokens, x=x: x[some, tokens], (9, 700), 7, x.device, softmax=True)
        for x in (scores, scores.float())
    )
    for one, other in zip(half, whole, strict=True):
        assert np.array_equal(one, other)


def test_what_is_no_number_shows() -> None:
    """In the sums: there is no place for it in the order."""
    scores = np.zeros((2, 200), np.float32)
    scores[1, 150] = np.nan
    found = read("in pieces", scores, 3)
    assert np.isfinite(found.entropies).tolist() == np.isfinite(found.normalisers).tolist() == [True, False]


def test_more_rows_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows follow each other, none twice; and no rows are none."""
    scores = np.random.default_rng(0).standard_normal((50, 130)).astype(np.float32)
    table = torch.from_numpy(scores)
    for name, size in (("_TOGETHER", 20), ("_TILE", 7), ("_TOKENS", 50), ("_ROWS", 3)):
        monkeypatch.setattr(values, name, size)
    for rows in (50, 0):
        found = ends(lambda some, tokens: table[some, tokens], (rows, 130), 5, table.device, softmax=True)
        expected = plain(scores[:rows], 5)
        assert np.array_equal(found.columns, expected.columns)
        np.testing.assert_allclose(found.entropies, expected.entropies, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_layer_is_read_as_its_lens_and_its_projections_say(family: str) -> None:
    """Values by whole logits, soft cap and biases included; keys by what the layer itself makes of bare embeddings."""
    model = mn.load_model(FAMILIES[family](), tokenizer=tokenizer())
    (layer, rows, columns), *_ = values.layers(model, [1])
    block, lens = model.anatomy.layers[layer], Lens.of(model.anatomy, "own", "flat")
    with torch.inference_mode():
        expected = plain(lens.logits(values.value_vectors(block)).numpy(), values.VALUE_TOKENS)
        bare = block.bare(values.bare_tokens(model, model.anatomy))
        gate, up = (
            None if w is None else bare @ w.T + (0 if b is None else b)
            for w, b in ((block.keys(), block.key_bias()), (block.ups(), block.up_bias()))
        )
        keys = plain(block.coefficients(torch.arange(gate.shape[1]), gate, up).T.numpy(), values.KEY_TOKENS)
    kept = expected.columns.shape
    np.testing.assert_allclose(rows["logit"].to_numpy().reshape(kept), expected.scores, rtol=1e-5, atol=1e-6)
    chances = np.exp(expected.scores - expected.normalisers[:, None, None])
    np.testing.assert_allclose(rows["probability"].to_numpy().reshape(kept), chances, rtol=1e-5)
    np.testing.assert_allclose(columns["value_entropy"], expected.entropies, rtol=1e-5, atol=1e-6)
    for side, name in enumerate(("key_coefficients", "key_coefficients_negative")):
        found = np.array(columns[name].to_pylist())
        np.testing.assert_allclose(found, keys.scores[:, side], rtol=1e-4, atol=1e-6)
