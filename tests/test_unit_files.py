"""Units are read from the files of other tools: their latents are those of a slow definition, whatever the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from units import mirrored, random_units, saelens, tracer

from mnemoscope.errors import ModelError
from mnemoscope.model.unit_files import load_units
from mnemoscope.model.units import LayerUnits

WIDTH, COUNT, K = 12, 30, 4
X = np.random.default_rng(7).standard_normal((9, WIDTH)) * 2 + 0.3
TENSORS = random_units(WIDTH, COUNT)
EXTRA = {
    name: torch.randn(COUNT, generator=torch.Generator().manual_seed(seed)) / 2
    for seed, name in enumerate(("threshold", "b_gate", "b_mag", "r_mag"))
}


def latents(units: LayerUnits, x: np.ndarray = X) -> np.ndarray:
    """What is mined: coefficients of all units."""
    return units.act(units.pre(units.read(torch.from_numpy(x).float()))).numpy()


def rebuilt(units: LayerUnits, x: np.ndarray = X) -> np.ndarray:
    """What all units of a layer, its bias and its skip say is written there."""
    read = torch.from_numpy(x).float()
    reading = units.read(read)
    coefficients = units.act(units.pre(reading))
    amounts = coefficients if reading.scale is None else coefficients * reading.scale
    return (amounts @ units.write[0].values + units.fixed(read, reading)).numpy()


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def largest(strength: np.ndarray, k: int) -> np.ndarray:
    """Which of each row are among its k largest, by counting those that are larger."""
    return (strength[:, None, :] > strength[:, :, None]).sum(-1) < k


def doubles(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def standard(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    return relu(z @ t["W_enc"] + t["b_enc"])


def jumprelu(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    h = z @ t["W_enc"] + t["b_enc"]
    return relu(h) * (h > t["threshold"])


def gated(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    open_ = z @ t["W_enc"] + t["b_gate"] > 0
    return open_ * relu(z @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"])


def topk(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    h = z @ t["W_enc"] + t["b_enc"]
    return largest(h, K) * relu(h)


def abstopk(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    h = z @ t["W_enc"] + t["b_enc"]
    return largest(np.abs(h), K) * h


def rescaled(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    h = (z @ t["W_enc"] + t["b_enc"]) * np.linalg.norm(t["W_dec"], axis=-1)
    return largest(h, K) * relu(h)


CASES: dict[str, tuple[str, Callable[..., np.ndarray], tuple[str, ...], dict[str, Any]]] = {
    "standard": ("standard", standard, (), {}),
    "jumprelu": ("jumprelu", jumprelu, ("threshold",), {}),
    "batchtopk": ("batchtopk", jumprelu, ("threshold",), {"k": K}),
    "gated": ("gated", gated, ("b_gate", "b_mag", "r_mag"), {}),
    "topk": ("topk", topk, (), {"k": K}),
    "abstopk": ("abstopk", abstopk, (), {"k": K}),
    "rescaled": ("topk", rescaled, (), {"k": K, "rescale_acts_by_decoder_norm": True}),
    "unsubtracted": ("standard", standard, (), {"apply_b_dec_to_input": False}),
    "layer_norm": ("jumprelu", jumprelu, ("threshold",), {"normalize_activations": "layer_norm"}),
    "constant_norm": ("standard", standard, (), {"normalize_activations": "constant_norm_rescale"}),
    "transcoder": ("transcoder", standard, (), {"hook_name_out": "blocks.2.hook_mlp_out"}),
    "skip": (
        "jumprelu_skip_transcoder",
        jumprelu,
        ("threshold",),
        {"hook_name_out": "blocks.2.hook_mlp_out"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_of_saelens_are_its_definition(case: str, tmp_path: Path) -> None:
    """Every architecture, with every way to normalise what is read, gives the latents and the output of B.6."""
    architecture, define, extra, config = CASES[case]
    tensors = TENSORS | {name: EXTRA[name] for name in extra}
    transcoder = "transcoder" in architecture
    if "skip" in architecture:
        tensors |= {"W_skip": torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(3))}
    if architecture == "gated":
        del tensors["b_enc"]
    hook = "blocks.2.ln2.hook_normalized" if transcoder else "blocks.2.hook_resid_post"
    saelens(tmp_path / "sae", tensors, hook, architecture, **config)
    held = load_units(f"{'transcoder' if transcoder else 'sae'}:{tmp_path / 'sae'}")
    assert list(held.layers) == [2]
    units, t = held.layers[2], doubles(tensors)
    assert (units.reads, units.writes) == (
        ("ffn_norm", "ffn_output") if transcoder else ("residual_out", "residual_out")
    )

    z, scale, shift = X, np.ones((len(X), 1)), np.zeros((len(X), 1))
    if config.get("normalize_activations") == "layer_norm":
        shift, scale = X.mean(-1, keepdims=True), X.std(-1, ddof=1, keepdims=True)
        z = (X - shift) / (scale + 1e-5)
    elif config.get("normalize_activations"):
        scale = np.linalg.norm(X, axis=-1, keepdims=True) / np.sqrt(WIDTH)
        z = X / scale
    if not transcoder and config.get("apply_b_dec_to_input", True):
        z = z - t["b_dec"]
    expected = define(t, z)
    assert (expected != 0).any() and (expected == 0).any()
    np.testing.assert_allclose(latents(units), expected, atol=1e-5, rtol=1e-5)
    lengths = np.linalg.norm(t["W_dec"], axis=-1) if config.get("rescale_acts_by_decoder_norm") else 1.0
    output = (expected / lengths) @ t["W_dec"] + t["b_dec"]
    output = output * scale + shift
    output += X @ t["W_skip"].T if "W_skip" in t else 0.0
    np.testing.assert_allclose(rebuilt(units), output, atol=2e-5, rtol=1e-5)


def test_a_configuration_of_before_saelens_6_is_read(tmp_path: Path) -> None:
    """Flat, with the names of then: the hook, and TopK as an activation function."""
    folder = saelens(tmp_path / "old", TENSORS, "")
    old = {
        "hook_point": "blocks.4.hook_resid_pre", "hook_point_layer": 4, "d_in": WIDTH, "d_sae": COUNT,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old), encoding="utf-8")
    units = load_units(f"sae:{folder}").layers[4]
    assert units.reads == "residual_in"
    t = doubles(TENSORS)
    np.testing.assert_allclose(latents(units), topk(t, X - t["b_dec"]), atol=1e-5, rtol=1e-5)
    scaling = torch.rand(COUNT, generator=torch.Generator().manual_seed(8)) + 0.5
    save_file(TENSORS | {"scaling_factor": scaling}, folder / "sae_weights.safetensors")
    scaled = load_units(f"sae:{folder}").layers[4]
    assert torch.equal(scaled.write[0].values, TENSORS["W_dec"] * scaling[:, None])


def test_gemma_scope_is_read_by_its_folder(tmp_path: Path) -> None:
    """Layer and point are in the names of folders; nothing is subtracted from what is read."""
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_30" / "average_l0_4"
    folder.mkdir(parents=True)
    tensors = TENSORS | {"threshold": EXTRA["threshold"]}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    t = doubles(tensors)
    for place in (folder, folder / "params.npz", tmp_path / "gemma-scope-2b-pt-res"):
        units = load_units(f"sae:{place}").layers[3]
        assert (units.reads, units.writes) == ("residual_out", "residual_out")
        np.testing.assert_allclose(latents(units), jumprelu(t, X), atol=1e-5, rtol=1e-5)
    plain = tmp_path / "params.npz"
    (folder / "params.npz").rename(plain)
    with pytest.raises(ModelError, match="does not say what it was trained on"):
        load_units(f"sae:{plain}")
    assert load_units(f"sae:{plain}@5.ffn_output").layers[5].writes == "ffn_output"


def test_gemma_scope_2_is_read_with_its_skip(tmp_path: Path) -> None:
    """Names are small, and the skip is stored the way it is multiplied."""
    skip = torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(3))
    tensors = {name.lower(): tensor for name, tensor in TENSORS.items()}
    tensors |= {"threshold": EXTRA["threshold"], "affine_skip_connection": skip}
    folder = tmp_path / "transcoder_all" / "layer_1_width_30_l0_small_affine"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    (folder / "config.json").write_text(
        json.dumps({
            "architecture": "jump_relu",
            "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
        })
    )  # fmt: skip
    units = load_units(f"transcoder:{folder}").layers[1]
    assert (units.reads, units.writes) == ("ffn_input", "ffn_output")
    t = doubles(TENSORS | {"threshold": EXTRA["threshold"]})
    expected = jumprelu(t, X)
    np.testing.assert_allclose(latents(units), expected, atol=1e-5, rtol=1e-5)
    output = expected @ t["W_dec"] + t["b_dec"] + X @ skip.double().numpy()
    np.testing.assert_allclose(rebuilt(units), output, atol=2e-5, rtol=1e-5)


def test_sparsify_is_read_by_its_hook(tmp_path: Path) -> None:
    """The folder is called after the hook; the decoder has a row for each unit."""
    folder = tmp_path / "layers.6"
    folder.mkdir()
    stored = {
        "encoder.weight": TENSORS["W_enc"].T.contiguous(), "encoder.bias": TENSORS["b_enc"],
        "W_dec": TENSORS["W_dec"], "b_dec": TENSORS["b_dec"],
    }  # fmt: skip
    save_file(stored, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "d_in": WIDTH, "num_latents": COUNT}))
    units = load_units(f"sae:{folder}").layers[6]
    t = doubles(TENSORS)
    np.testing.assert_allclose(latents(units), topk(t, X - t["b_dec"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "threshold", "topk"])
def test_transcoders_of_circuit_tracer_are_read(kind: str, tmp_path: Path) -> None:
    """Layer by layer; its JumpReLU and its TopK keep what is negative."""
    folder = tracer(tmp_path / "plt", 3, WIDTH, COUNT, across=False, **({"k": K} if kind == "topk" else {}))
    from safetensors.torch import load_file

    for layer in range(3):
        file = folder / f"layer_{layer}.safetensors"
        tensors = load_file(file)
        if kind == "threshold":
            tensors["activation_function.threshold"] = EXTRA["threshold"] - 0.2
        tensors["W_skip"] = torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(layer))
        save_file(tensors, file)
    for layer, units in load_units(f"transcoder:{folder}").layers.items():
        assert (units.reads, units.writes) == ("ffn_input", "ffn_output")
        t = doubles(load_file(folder / f"layer_{layer}.safetensors"))
        h = X @ t["W_enc"].T + t["b_enc"]
        expected = {
            "relu": relu(h),
            "topk": h * largest(h, K),
            "threshold": h * (h > t.get("activation_function.threshold", np.zeros(COUNT))),
        }[kind]
        np.testing.assert_allclose(latents(units), expected, atol=1e-5, rtol=1e-5)
        output = expected @ t["W_dec"] + t["b_dec"] + X @ t["W_skip"].T
        np.testing.assert_allclose(rebuilt(units), output, atol=2e-5, rtol=1e-5)


def test_cross_layer_transcoders_write_above(tmp_path: Path) -> None:
    """The units of a layer have values for it and for each layer above."""
    folder = tracer(tmp_path / "clt", 3, WIDTH, COUNT, across=True, feature_input_hook="hook_resid_mid")
    from safetensors.torch import load_file

    for layer, units in load_units(f"transcoder:{folder}").layers.items():
        assert units.reads == "residual_mid"
        stored = doubles(load_file(folder / f"W_enc_{layer}.safetensors"))
        expected = relu(X @ stored[f"W_enc_{layer}"].T + stored[f"b_enc_{layer}"])
        np.testing.assert_allclose(latents(units), expected, atol=1e-5, rtol=1e-5)
        values = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        assert [write.layer for write in units.write] == list(range(layer, 3))
        for step, write in enumerate(units.write):
            assert torch.equal(write.values, values[:, step])


def test_directions_have_names_and_values(tmp_path: Path) -> None:
    """A coefficient is the product with a key; without values a direction writes what it reads."""
    keys = torch.randn((2, WIDTH), generator=torch.Generator().manual_seed(1))
    file = tmp_path / "probes.safetensors"
    save_file(
        {"4.residual_out.keys": keys}, file, metadata={"4.residual_out.names": json.dumps(["truth", "tense"])}
    )
    held = load_units(f"directions:{file}")
    units = held.layers[4]
    np.testing.assert_allclose(latents(units), X @ keys.double().numpy().T, atol=1e-5)
    assert torch.equal(units.values(), keys) and held.entry().names == {"4": ["truth", "tense"]}


def test_layers_of_a_folder_are_read_together(tmp_path: Path) -> None:
    """Two layers are one set of units; two sets of one layer are refused."""
    saelens(tmp_path / "all" / "a", TENSORS, "blocks.1.hook_resid_post")
    saelens(tmp_path / "all" / "b", TENSORS, "blocks.3.hook_resid_post")
    assert sorted(load_units(f"sae:{tmp_path / 'all'}").layers) == [1, 3]
    saelens(tmp_path / "all" / "c", TENSORS, "blocks.3.hook_resid_post")
    with pytest.raises(ModelError, match="more than one set of units for layer 3"):
        load_units(f"sae:{tmp_path / 'all'}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hook": "blocks.1.attn.hook_z"}, "trained on blocks.1.attn.hook_z, which is not read"),
        ({"architecture": "temporal"}, "its architecture 'temporal' is not read"),
        ({"architecture": "batchtopk"}, "has no threshold"),
        ({"normalize_activations": "covariance_whitening"}, "fold it in"),
        ({"reshape_activations": "hook_z"}, "before they are mixed"),
    ],
)
def test_what_is_not_read_is_one_line(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """The line says what was given and what is accepted."""
    hook = change.pop("hook", "blocks.1.hook_resid_post")
    saelens(tmp_path / "sae", TENSORS, hook, change.pop("architecture", "standard"), **change)
    with pytest.raises(ModelError, match=reason) as caught:
        load_units(f"sae:{tmp_path / 'sae'}")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_files_that_are_not_whole_are_one_line(tmp_path: Path) -> None:
    """A tensor that is missing, a file that is cut, a pickle and a place with nothing."""
    folder = saelens(tmp_path / "sae", mirrored(WIDTH), "blocks.1.hook_resid_post")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"sae_weights\.safetensors cannot be read"):
        load_units(f"sae:{folder}")
    save_file({"W_dec": TENSORS["W_dec"], "b_dec": TENSORS["b_dec"]}, weights)
    with pytest.raises(ModelError, match="it has no tensor 'W_enc'"):
        load_units(f"sae:{folder}")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "ae.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"ae.pt is a pickle, which could run code and is not read"):
        load_units(f"sae:{tmp_path / 'pickled'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no weights that are known"):
        load_units(f"sae:{tmp_path / 'empty'}")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_units("sae:somebody/something/layer_3")
    with pytest.raises(ModelError, match="names none"):
        load_units("neurons:x")
