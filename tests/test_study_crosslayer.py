"""What switches neurons on: every column against loops in fp64, the paper's own numbers, figures of planted tables."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_sentence import PREFIX, Slow, wrapped

from mnemoscope.model.stream import trace
from mnemoscope.studies.findings.crosslayer import chance_union, part, union_share
from mnemoscope.studies.measures import crosslayer
from mnemoscope.studies.measures.crosslayer import Columns, RankedNeurons, middle_layer

NAMES = ("llama", "opt_no_final_norm", "gpt2", "gptj", "olmo2", "gemma2", "granite")
QUICK = ("llama", "opt_no_final_norm")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
TOP, ASKED, FIRST = 3, 4, 9  # smaller than in the study, so that something is left out


class Loops:
    """The definitions, written out; increases are planted."""

    def __init__(self, name: str) -> None:
        self.slow = Slow(name, "frozen")
        self.layers = len(self.slow.stream.layers)
        generator = np.random.default_rng(0)
        sizes = [len(self.slow.coefficients(layer)) for layer in range(self.layers)]
        self.c = [generator.standard_normal(size) ** 3 for size in sizes]
        for layer, c in enumerate(self.c):
            # Shares are divided by coefficients: those near 0 give fractions that fp32 cannot hold.
            c[np.abs(self.slow.coefficients(layer)) < 0.02] = 0
        self.helpful = [np.argsort(-c, kind="stable")[:TOP] for c in self.c]
        self.unhelpful = [np.argsort(c, kind="stable")[:TOP] for c in self.c]
        self.strength = [
            np.linalg.norm(self.slow.written(layer), axis=1).astype(np.float32)
            for layer in range(self.layers)
        ]
        points = self.slow.points
        self.vectors = np.concatenate([points[:1], np.diff(points, axis=0)])[:-1]

    def seen(self, layer: int) -> range:
        """Vectors that a layer's neurons read."""
        return range(2 * layer + (1 if self.slow.parts.parallel else 2))

    def top(self, layer: int) -> list[int]:
        return [*self.helpful[layer], *self.unhelpful[layer]]

    def score(self, vector: np.ndarray, layer: int, chosen: np.ndarray, *, signed: bool) -> float:
        """Eq. 25 over some neurons of a layer."""
        share = self.slow.share(layer, vector)
        weight = self.c[layer] if signed else np.abs(self.c[layer])
        return float(sum(share[one] * weight[one] for one in chosen))

    def matched(self, layer: int, chosen: np.ndarray, others: set[int]) -> list[dict[int, float]]:
        """For each chosen neuron the next stronger and the next weaker of others, and how much each counts."""
        strength = self.strength[layer].astype(float)
        pairs = []
        for one in chosen.tolist():
            left = sorted(others - {one}, key=lambda two: (strength[two], two))
            above = [two for two in left if (strength[two], two) > (strength[one], one)]
            below = [two for two in left if (strength[two], two) < (strength[one], one)]
            if not above or not below:
                pairs.append({one: 1.0})
                continue
            stronger, weaker = above[0], below[-1]
            share = (strength[one] - strength[weaker]) / (strength[stronger] - strength[weaker])
            pairs.append({stronger: share, weaker: 1 - share})
        return pairs

    def active(self, layer: int) -> set[int]:
        return set(np.flatnonzero(self.strength[layer] > 0).tolist())

    def totals(self) -> list[np.ndarray]:
        """total(a) = C(a) + sum over chosen b above of share(a, b) total(b), without C(a) itself."""
        earned = [np.zeros(len(c)) for c in self.c]
        total: dict[tuple[int, int], float] = {}
        for layer in reversed(range(self.layers)):
            for neuron, vector in enumerate(self.slow.written(layer)):
                for upper in range(layer + 1, self.layers):
                    share, m = self.slow.share(upper, vector), self.slow.coefficients(upper)
                    for one in self.top(upper):
                        # `share` has the sign of m, so the fraction is share / |m|.
                        earned[layer][neuron] += share[one] / abs(m[one]) * total[upper, one]
            for one in self.top(layer):
                total[layer, one] = self.c[layer][one] + earned[layer][one]
        return earned


@cache
def loops(name: str) -> Loops:
    return Loops(name)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries and first neurons than a tiny model has."""
    monkeypatch.setattr(crosslayer, "ASKED", ASKED)
    monkeypatch.setattr(crosslayer, "FIRST", FIRST)


def fast(name: str) -> tuple[Columns, Columns, list[Columns]]:
    """The measurement with the same planted increases."""
    model, planted = wrapped(name), loops(name)
    ranked = [
        RankedNeurons(
            torch.from_numpy(c),
            # As if those with a small increase were open.
            torch.from_numpy(np.sign(c) * (np.abs(c) > 0.1)).int(),
            torch.from_numpy(up),
            torch.from_numpy(down),
            torch.from_numpy(strength),
        )
        for c, up, down, strength in zip(
            planted.c, planted.helpful, planted.unhelpful, planted.strength, strict=True
        )
    ]
    with torch.inference_mode():
        stream = trace(model.hf, model.anatomy, torch.from_numpy(PREFIX.astype(np.int64))[None])
        return crosslayer.crosslayer(stream, len(PREFIX) - 1, ranked, np.random.default_rng(0))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("small")
def test_query_scores_equal_their_definitions(name: str) -> None:
    """Eq. 24 and 25 over all and over the top of one layer, and Eq. 25 over all upper layers (A49, A58-A60)."""
    (queries, _, _), planted = fast(name), loops(name)
    layer = middle_layer(planted.layers)
    assert layer == 2
    for query, vector in enumerate(planted.vectors):
        expected: dict[str, float] = {}
        share, c = planted.slow.share(layer, vector), planted.c[layer]
        for side, every, top in (
            ("helpful", np.flatnonzero(c > 0), planted.helpful[layer]),
            ("unhelpful", np.flatnonzero(c < 0), planted.unhelpful[layer]),
        ):
            expected[side] = share[every].sum()
            expected[f"{side}_top"] = share[top].sum()
            expected[f"{side}_weighted"] = planted.score(vector, layer, every, signed=False)
            expected[f"{side}_top_weighted"] = planted.score(vector, layer, top, signed=False)
            expected[f"{side}_certain"] = share[every][np.abs(c[every]) > 0.1].sum()
            unlisted = planted.active(layer) - set(planted.top(layer))
            for suffix, chosen, others in (("", every, planted.active(layer)), ("_top", top, unlisted)):
                pairs = planted.matched(layer, chosen, others)
                even = [sum(share[two] * counts for two, counts in pair.items()) for pair in pairs]
                expected[f"{side}{suffix}_matched"] = sum(even)
                expected[f"{side}{suffix}_weighted_matched"] = float(np.abs(c[chosen]) @ even)
            upper = [above for above in range(planted.layers) if query in planted.seen(above)]
            chosen = planted.helpful if side == "helpful" else planted.unhelpful
            found = sum(planted.score(vector, above, chosen[above], signed=False) for above in upper)
            assert queries[f"upper_{side}"][query] == pytest.approx(found, rel=2e-3, abs=2e-4)
            matched = 0.0
            for above in upper:
                shares, left = (
                    planted.slow.share(above, vector),
                    planted.active(above) - set(planted.top(above)),
                )
                for one, pair in zip(chosen[above], planted.matched(above, chosen[above], left), strict=True):
                    alike = sum(shares[two] * counts for two, counts in pair.items())
                    matched += abs(planted.c[above][one]) * alike
            assert queries[f"upper_{side}_matched"][query] == pytest.approx(matched, rel=2e-3, abs=2e-4)
        expected["any"] = share.sum()
        for column, value in expected.items():
            if query in planted.seen(layer):
                assert queries[column][query] == pytest.approx(value, rel=2e-3, abs=2e-4), column
            else:
                assert np.isnan(queries[column][query])


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("small")
def test_neurons_as_queries_equal_their_definitions(name: str) -> None:
    """Who is asked from above (A61), called from below (A62), and first in value, query and chain (A63, A64)."""
    (_, layers, neurons), planted = fast(name), loops(name)
    slow, count = planted.slow, planted.layers
    query, asked, called = [], [], []
    for layer in range(count):
        written = slow.written(layer)
        scores = np.array(
            [
                [
                    planted.score(vector, upper, np.array(planted.top(upper)), signed=True)
                    for vector in written
                ]
                for upper in range(layer + 1, count)
            ]
        ).reshape(-1, len(written))
        query.append(scores.sum(0))
        asked.append({int(one) for row in scores for one in np.argsort(-np.abs(row))[:ASKED]})
        union: set[int] = set()
        for lower in range(layer):
            moved = np.abs(slow.share(layer, planted.vectors[2 + 2 * lower]) * planted.c[layer])
            union |= {int(one) for one in np.argsort(-moved)[:5]}
        called.append(union)
    chained = planted.totals()
    first = [_first(scores) for scores in (planted.c, query, chained, planted.strength)]
    for layer in range(count):
        up, down = set(planted.helpful[layer].tolist()), set(planted.unhelpful[layer].tolist())
        values, queries, chains, writes = ({one for at, one in found if at == layer} for found in first)
        unlisted = planted.active(layer) - up - down
        listed = {"helpful": planted.helpful[layer], "unhelpful": planted.unhelpful[layer]}
        pairs = {side: planted.matched(layer, chosen, unlisted) for side, chosen in listed.items()}
        strong = planted.matched(layer, np.array(sorted(queries), int), planted.active(layer))
        expected = {
            "layer": layer,
            "helpful": TOP,
            "unhelpful": TOP,
            "asked": len(asked[layer]),
            "helpful_asked": len(asked[layer] & up),
            "unhelpful_asked": len(asked[layer] & down),
            "called": len(called[layer]),
            "called_top": len(called[layer] & (up | down)),
            "values_first": len(values),
            "queries_first": len(queries),
            "chains_first": len(chains),
            "both_first": len(queries & chains),
            "helpful_first": len(queries & up),
            "unhelpful_first": len(queries & down),
            "writes_first": len(writes),
        }
        shares = {"both_matched": _counted(strong, chains)}
        for side, both in pairs.items():
            expected[f"{side}_matched"] = sum(len(pair) == 2 for pair in both)
            shares[f"{side}_matched_asked"] = _counted(both, asked[layer])
            shares[f"{side}_matched_first"] = _counted(both, queries)
        assert {column: float(layers[column][layer]) for column in shares} == pytest.approx(shares, abs=1e-4)
        assert layers["called_dealt"][layer] <= 5 * layer
        assert layers["called_top_matched"][layer] <= layers["called_matched"][layer] <= 5 * layer
        assert {column: int(layers[column][layer]) for column in expected} == expected
        for column, scores in (
            ("value", planted.c),
            ("query", query),
            ("chain", chained),
            ("write", planted.strength),
        ):
            total = sum(np.abs(one).sum() for one in scores)
            assert layers[f"{column}_mass"][layer] == pytest.approx(
                np.abs(scores[layer]).sum() / total, rel=1e-3
            )
        top = planted.top(layer)
        assert neurons[layer]["asked"].tolist() == [one in asked[layer] for one in top]
        scale = max(np.abs(one).max() for one in chained)
        assert neurons[layer]["query"] == pytest.approx(query[layer][top], rel=2e-3, abs=1e-3)
        assert neurons[layer]["chain"] == pytest.approx(chained[layer][top], rel=2e-3, abs=1e-3 * scale)
    assert sum(layers["values_first"]) == sum(layers["queries_first"]) == FIRST
    for kind in ("value", "query", "chain", "write"):
        assert layers[f"{kind}_mass"].sum() == pytest.approx(1)


def _counted(pairs: list[dict[int, float]], among: set[int]) -> float:
    return float(sum(counts for pair in pairs for one, counts in pair.items() if one in among))


def _first(scores: list[np.ndarray]) -> list[tuple[int, int]]:
    flat = [(-abs(value), layer, one) for layer, row in enumerate(scores) for one, value in enumerate(row)]
    return [(layer, one) for size, layer, one in sorted(flat)[:FIRST] if size]


def _ranked(strength: np.ndarray, increase: np.ndarray) -> RankedNeurons:
    up, down = (np.argsort(sign * increase, kind="stable")[:TOP] for sign in (-1, 1))
    parts = (increase, np.sign(increase).astype(np.int32), up, down, strength)
    return RankedNeurons(*(torch.from_numpy(part) for part in parts))


@given(
    st.lists(st.floats(0, 3, width=32), min_size=1, max_size=12), st.integers(0, 2**12), st.integers(0, 2**12)
)
def test_neurons_are_matched_with_the_nearest_in_strength(
    strengths: list[float], some: int, others: int
) -> None:
    """Both together write as much; they are the nearest of those allowed; without both it is compared with itself."""
    strength = np.array(strengths, np.float32)
    chosen = np.array([place for place in range(len(strength)) if some >> place & 1], int)
    among = np.array([bool(others >> place & 1) for place in range(len(strength))])
    ranked = _ranked(strength, np.ones(len(strength)))
    both, shares = ranked.matched(torch.from_numpy(chosen), torch.from_numpy(among))
    assert shares.sum(-1).numpy() == pytest.approx(1)
    for one, pair, share in zip(chosen.tolist(), both.tolist(), shares.numpy(), strict=True):
        left = np.delete(strength, one)[np.delete(among, one)]
        if pair == [one, one]:
            assert (left > strength[one]).sum() == 0 or (left < strength[one]).sum() == 0
            continue
        assert one not in pair
        assert among[pair].all()
        stronger, weaker = strength[pair]
        assert weaker <= strength[one] <= stronger
        assert not ((left > weaker) & (left < stronger) & (left != strength[one])).any()
        assert float(strength[pair] @ share) == pytest.approx(strength[one], rel=1e-5, abs=1e-6)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_inner_products_are_dealt_among_neighbours_in_strength(neurons: int, size: int, seed: int) -> None:
    """Each row keeps its products within each group of neighbours, and inactive neurons keep their own (A62)."""
    generator = np.random.default_rng(seed)
    strength = np.maximum(generator.standard_normal(neurons), 0).astype(np.float32)
    rows = generator.standard_normal((3, neurons)).astype(np.float32)
    found = crosslayer.dealt(torch.from_numpy(rows), torch.from_numpy(strength), size, generator).numpy()
    order = np.argsort(-strength, kind="stable")[: (strength > 0).sum()]
    for start in range(0, len(order), size):
        group = order[start : start + size]
        assert np.array_equal(np.sort(found[:, group]), np.sort(rows[:, group]))
    assert np.array_equal(found[:, strength == 0], rows[:, strength == 0])


def test_table_4_is_its_formula() -> None:
    """|union| / (5 l) gives every entry that the paper prints, to the digit that it keeps (A62)."""
    union = np.array([5, 8, 9, 12, 12, 14, 12, 14, 17, 16, 18, 21, 14, 16, 22])
    printed = [100, 80, 60, 60, 48, 46, 34, 35, 38, 32, 33, 35, 21, 23, 29]
    found = 100 * union_share(union, np.arange(1, 16))
    assert np.all(np.abs(found - printed) < 1)
    assert np.isnan(union_share(np.array([0]), np.array([0]))).all()


def test_the_chance_of_a_union_is_that_of_draws() -> None:
    """Five of n for each of l layers: the expected size of the union, as counted over draws."""
    generator = np.random.default_rng(0)
    for layer, neurons in ((1, 30), (4, 30), (12, 100)):
        sizes = [
            len(set(np.concatenate([generator.permutation(neurons)[:5] for _ in range(layer)])))
            for _ in range(600)
        ]
        expected = float(chance_union(np.array(layer), neurons))
        assert np.mean(sizes) / (5 * layer) == pytest.approx(expected, abs=0.02)


def test_the_drawn_layer_is_the_papers() -> None:
    """Layer 13 of 16, as far up in another model, and never beyond the last."""
    assert [middle_layer(layers) for layers in (16, 30, 3, 1)] == [13, 24, 2, 0]
    assert [part(query) for query in range(5)] == ["Lin0", "ATTN0", "FFN0", "ATTN1", "FFN1"]
