"""Null units of experts: of the expert's own neurons, over the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import slow_but_for
from test_experts import MIXTURES, NULLS, _batch, _build, _model, _swept
from torch import Tensor

from mnemoscope import build, load_corpus
from mnemoscope.errors import ModelNotSupported
from mnemoscope.model.capture import Capture, LayerRows
from mnemoscope.model.check import examine
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import EACH, LayerSignals, Nulls
from mnemoscope.model.parts import Layer
from mnemoscope.records import ContextBatch

# A shared expert behind a gate; biases, a clamp, interleaved rows; plain experts in a projection of the stream.
KINDS = ["qwen2_moe", "gpt_oss", "nemotron_h"]
every = pytest.mark.parametrize("name", slow_but_for(KINDS, {"qwen2_moe"}))


def _loaded(name: str) -> Model:
    from every_family import tiny

    hf = MIXTURES[name]() if name in MIXTURES else tiny(name)
    return Model(hf, None, examine(hf)[0], name)


def _seen(model: Model, units: Nulls) -> Iterator[tuple[LayerRows, dict[str, LayerRows]]]:
    """Rows of the experts of each layer, and by kind those of the null units."""
    kept: list[tuple[LayerRows, dict[str, LayerRows]]] = []

    def keep(rows: LayerRows, batch: ContextBatch) -> None:
        kept.append((rows, units.rows(rows, batch)))

    with Capture(model) as capture:
        capture.sweep(_batch(), lambda *_: None, keep)
    yield from kept


def _keys(layer: Layer, group: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and biases of the first projections of one expert, in the space that it reads."""
    rows = list(layer.rows(of_stream=False))[group]
    pairs = [(rows.keys, rows.key_bias), (rows.ups, rows.up_bias)]
    return [
        (keys.float(), torch.zeros(len(keys)) if bias is None else bias.float())
        for keys, bias in pairs
        if keys is not None
    ]


@every
def test_null_units_are_made_of_their_experts_own_neurons(name: str) -> None:
    """Random keys are as long as some of the expert's, rotations are of its coefficients, chimeras pair its own gates
    and ups, and directions with its covariance are sums of its keys; each computed from what the expert read."""
    model = _loaded(name)
    units = Nulls(model, NULLS, count=10)
    sources, tried = units._sources, 0
    for rows, by_kind in _seen(model, units):
        layer = model.anatomy.layers[rows.layer]
        for piece, null_pieces in zip(
            rows.each(), zip(*(by_kind[kind].each() for kind in NULLS), strict=True), strict=True
        ):
            random, rotated, chimera, _ = null_pieces
            place, keys = (piece.layer, piece.group), _keys(layer, piece.group)
            neurons = layer.groups[piece.group]
            size = min(max(EACH, -(-10 // len(layer.groups))), neurons)
            assert [p.coefficients.shape[1] for p in null_pieces] == [size, size, neurons, neurons]
            for null_piece in null_pieces:
                assert null_piece.weight == 1.0
                assert rows.rows is None or torch.equal(null_piece.rows, piece.rows)
            drawn = sources["random"]._weight[place].split(size)  # type: ignore[attr-defined]
            biases = sources["random"]._bias[place].split(size)  # type: ignore[attr-defined]
            real = torch.cat([torch.stack([k.norm(dim=1), b], 1) for k, b in keys], 1)
            made = torch.cat(
                [torch.stack([k.norm(dim=1), b], 1) for k, b in zip(drawn, biases, strict=True)], 1
            )
            assert (made[:, None] - real).abs().amax(-1).min(1).values.max() < 1e-4
            x = piece.inputs
            first = [x @ k.T + b for k, b in zip(drawn, biases, strict=True)]
            gate, up = first[0], first[1] if len(first) == 2 else None
            expected = layer.activated(piece.group, gate, up)
            torch.testing.assert_close(random.coefficients, expected, rtol=1e-4, atol=1e-5)
            axes = sources["rotated"]._weight[place]  # type: ignore[attr-defined]
            torch.testing.assert_close(axes @ axes.T, torch.eye(size), rtol=0, atol=1e-5)
            torch.testing.assert_close(
                rotated.coefficients, piece.coefficients @ axes.T, rtol=1e-4, atol=1e-5
            )
            assert rotated.up is None
            if piece.up is not None:
                (shift, *_) = sources["chimera"]._shifts[place]  # type: ignore[attr-defined]
                other = piece.up[:, (torch.arange(neurons) + int(shift)) % neurons]
                expected = layer.activated(piece.group, piece.gate, other)
                torch.testing.assert_close(chimera.coefficients, expected, rtol=1e-4, atol=1e-5)
            mixed = sources["covariance"]._mixed._weight[place].split(neurons)  # type: ignore[attr-defined]
            for made_keys, (real_keys, _) in zip(mixed, keys, strict=True):
                span = torch.linalg.svd(real_keys, full_matrices=False)
                inside = span.Vh[(span.S / span.S[0]) > 1e-5]
                torch.testing.assert_close(made_keys @ inside.T @ inside, made_keys, rtol=1e-3, atol=1e-4)
            tried += 1
    assert tried > 4


@every
def test_null_tables_of_a_mixture_equal_the_slow_definition(name: str, tmp_path: Path) -> None:
    """Moments, ranges and triggers of null units over the tokens routed to their expert, and to no other."""
    if name not in MIXTURES:
        pytest.skip("its tiny model is not written to a folder")
    model = _model(name, tmp_path / "model")
    run = _build(model, tmp_path / "run", count=20)
    units = Nulls.of(model, run.manifest.options["nulls"])
    values: dict[tuple[str, int, int], list[tuple[float, int, int]]] = {}
    computed: dict[int, dict[str, tuple[int, Tensor]]] = {}
    for piece, place, context, position, _ in _swept(model, run):
        if id(piece) not in computed:
            signals = LayerSignals(piece.inputs, piece.coefficients, piece.gate, piece.up, piece.group)
            columns = units.columns(piece.layer, _batch(), signals)
            computed = {
                id(piece): {
                    kind: (units.first(kind, piece.layer, piece.group), found.coefficients)
                    for kind, found in columns.items()
                }
            }
        for kind, (first, coefficients) in computed[id(piece)].items():
            for unit, value in enumerate(coefficients[place].tolist()):
                values.setdefault((kind, piece.layer, first + unit), []).append((value, context, position))
    moments = run.table("null_neurons").collect()
    assert len(moments) == sum(sum(units.sizes[kind]) for kind in NULLS)
    best = run.table("null_triggers").filter((pl.col("rank") == 0) & (pl.col("polarity") == 1)).collect()
    first_of = {(row["kind"], row["layer"], row["neuron"]): row for row in best.iter_rows(named=True)}
    for row in moments.iter_rows(named=True):
        address = (row["kind"], row["layer"], row["neuron"])
        held = values.get(address, [])
        assert row["tokens"] == len(held)
        if not held:
            assert address not in first_of
            continue
        numbers = np.array([value for value, _, _ in held])
        assert row["mean"] == pytest.approx(numbers.mean(), rel=1e-4, abs=1e-6)
        assert row["std"] == pytest.approx(numbers.std(), rel=1e-4, abs=1e-6)
        assert (row["min"], row["max"]) == pytest.approx((numbers.min(), numbers.max()), rel=1e-4, abs=1e-6)
        if numbers.max() > 1e-6:
            top = first_of[address]
            assert top["coefficient"] == pytest.approx(numbers.max(), rel=1e-4)
            places = {
                (context, position) for value, context, position in held if value > numbers.max() - 1e-5
            }
            assert (top["context"], top["position"]) in places


def test_a_shuffled_copy_of_a_mixture_is_refused(tmp_path: Path) -> None:
    """Its router sends other tokens to each expert; the message says so in one line, and nothing is written."""
    model = _model("mixtral", tmp_path / "model")
    with pytest.raises(ModelNotSupported, match=r"mixture of experts.*'shuffled'") as caught:
        build(model, load_corpus(["the city of Paris"]), tmp_path / "run", nulls=("random", "shuffled"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists()
