"""A run of units that are not neurons: what is mined is what passes their point, through their keys and activation."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, MIXTURES
from scipy.stats import spearmanr
from starlette.testclient import TestClient
from test_patterns_job import BUDGET, PLANTED, planted_model
from tiny import model_folder, texts, tokenizer
from torch import Tensor
from typer.testing import CliRunner
from units import mirrored, random_units, saelens, tracer

import mnemoscope as mn
from mnemoscope import build, load_model
from mnemoscope.api import Run, open_run
from mnemoscope.atlas.app import create
from mnemoscope.cli import app
from mnemoscope.errors import ModelError, ModelNotSupported, QueryError, RunMismatch
from mnemoscope.model.model import Model
from mnemoscope.model.nulls import Nulls
from mnemoscope.model.unit_files import load_units

LAYER = 1
HOOKS = {
    "residual_in": "hook_resid_pre", "residual_mid": "hook_resid_mid", "residual_out": "hook_resid_post",
    "attention_output": "hook_attn_out", "ffn_output": "hook_mlp_out",
}  # fmt: skip


@cache
def width_of(family: str) -> int:
    return load_model(FAMILIES[family](), tokenizer=tokenizer()).anatomy.width


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of an autoencoder that rebuilds everything, of the residual behind layer 1 of a tiny llama."""
    folder = tmp_path_factory.mktemp("units")
    saelens(folder / "sae", mirrored(width_of("llama")), f"blocks.{LAYER}.hook_resid_post")
    model = load_model(model_folder(folder / "model"), dtype="fp32", units=f"sae:{folder / 'sae'}")
    build(model, texts(40), folder / "run", top=5)
    return open_run(folder / "run")


def contexts(run: Run) -> list[tuple[int, Tensor]]:
    rows = run.table("contexts").select("context", "tokens").collect()
    return [(number, torch.tensor([tokens])) for number, tokens in rows.iter_rows()]


def seen_at(hf: Any, point: str, tokens: Tensor) -> np.ndarray:
    """What passes a point of layer 1 of a llama, by hooks of our own."""
    block, kept = hf.model.layers[LAYER], {}
    modules = {
        "residual_in": (block, True), "residual_mid": (block.post_attention_layernorm, True),
        "residual_out": (block, False), "attention_output": (block.self_attn.o_proj, False),
        "ffn_input": (block.mlp, True), "ffn_output": (block.mlp.down_proj, False),
    }  # fmt: skip
    module, before = modules[point]

    def keep(_: Any, args: Any, *output: Any) -> None:
        value = args[0] if before else output[0]
        kept["x"] = (value[0] if isinstance(value, tuple) else value).detach()

    handle = module.register_forward_pre_hook(keep) if before else module.register_forward_hook(keep)
    with torch.no_grad():
        hf(tokens)
    handle.remove()
    return kept["x"][0].double().numpy()


@pytest.mark.parametrize("point", HOOKS)
def test_coefficients_are_those_of_what_passes_the_point(point: str, tmp_path: Path) -> None:
    """Means, extremes, triggers and the reconstruction of a run equal a slow pass, context by context."""
    hf = FAMILIES["llama"]().eval()
    width = width_of("llama")
    tensors = mirrored(width, 3)
    tensors |= {"b_enc": torch.randn(2 * width, generator=torch.Generator().manual_seed(1)) / 20}
    tensors |= {"b_dec": torch.randn(width, generator=torch.Generator().manual_seed(2)) / 20}
    saelens(tmp_path / "sae", tensors, f"blocks.{LAYER}.{HOOKS[point]}")
    model = load_model(hf, tokenizer=tokenizer(), units=f"sae:{tmp_path / 'sae'}")
    mined = build(model, texts(25), tmp_path / "run", top=3, nulls=())
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    every, seen, best = [], [], {}
    for number, tokens in contexts(open_run(mined.path)):
        x = seen_at(hf, point, tokens)[1:]
        m = np.maximum((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0)
        every.append(m)
        seen.append(x)
        best[number] = m.max(0, initial=0)
    m, x = np.concatenate(every), np.concatenate(seen)
    rows = mined.table("neurons").collect()
    assert rows["layer"].unique().to_list() == [LAYER] and rows.height == 2 * width
    np.testing.assert_allclose(rows["mean"], m.mean(0), atol=1e-5)
    np.testing.assert_allclose(rows["max"], m.max(0), atol=1e-5)
    np.testing.assert_allclose(rows["positive_fraction"], (m > 0).mean(0), atol=2e-3)
    for neuron in (0, width):
        stored = mined.rows("triggers", LAYER, neuron).sort("rank")["coefficient"].to_list()
        expected = sorted((float(values[neuron]) for values in best.values()), reverse=True)[: len(stored)]
        np.testing.assert_allclose(stored, expected, atol=1e-5)
    rebuilt = m @ t["W_dec"] + t["b_dec"]
    error, variance = np.square(x - rebuilt).sum(), np.square(x - x.mean(0)).sum()
    row = mined.table("units").collect().row(0, named=True)
    assert (row["reads"], row["writes"], row["tokens"]) == (point, point, len(x))
    assert row["explained_variance"] == pytest.approx(1 - error / variance, abs=1e-5)
    assert row["error_norm"] == pytest.approx(np.sqrt(error / np.square(x).sum()), abs=1e-5)
    assert row["active"] == pytest.approx((m > 0).sum(1).mean(), abs=0.05)


def test_an_exact_autoencoder_rebuilds_everything(run: Run) -> None:
    """A basis and its mirror image: all of the variance, and of each pair one is active."""
    row = run.table("units").collect().row(0, named=True)
    assert row["explained_variance"] > 1 - 1e-9 and row["error_norm"] < 1e-5
    assert row["active"] == pytest.approx(width_of("llama"), abs=1e-3)


def test_values_are_the_rows_of_the_decoder(run: Run) -> None:
    """What a unit promotes is its own row of the decoder, read through the head of the model."""
    parts = run.model.anatomy
    rows = mirrored(width_of("llama"))["W_dec"]
    assert torch.equal(parts.layers[LAYER].values(), rows)
    assert parts.final_norm is not None
    scores = parts.final_norm(rows) @ parts.unembedding().T
    for neuron in range(0, len(rows), 7):
        values = run.rows("values", LAYER, neuron).filter(pl.col("rank") == 0)
        assert values.filter(pl.col("polarity") == 1)["token"][0] == int(scores[neuron].argmax())
        assert values.filter(pl.col("polarity") == -1)["token"][0] == int(scores[neuron].argmin())


def test_a_run_of_units_verifies(run: Run) -> None:
    """Coefficients, null units, values and the reconstruction come out again."""
    result = run.verify()
    assert result.passed and result.identical
    assert "units" in {check.name for check in result.checks}


def test_a_card_says_what_the_unit_is(run: Run) -> None:
    """Terminal, page and JSON: from where, of which point, and how well those of its layer rebuild it."""
    card = run["L1N3"]
    assert card.unit is not None and card.unit.kind == "sae" and card.unit.reads == "residual_out"
    said = "(sparse autoencoder) of the residual stream after layer 1"
    assert said in " ".join(str(card).split()) and said in card._repr_html_()
    assert card.to_dict()["unit"]["explained"] == pytest.approx(1)
    assert run.highlights() and run.find(sort="max", count=3).rows.height == 3
    with pytest.raises(QueryError, match="no neurons in layer 0"):
        run["L0N3"]


def test_every_link_of_its_pages_leads_somewhere(run: Run, tmp_path: Path) -> None:
    """In a browser layers without units are not pictured, and no page leads to one; so it is in a gallery."""
    client = TestClient(create([run]), base_url="http://127.0.0.1:8321")
    start, seen = "/runs/run", set[str]()
    open_links = [start]
    while open_links:
        link = open_links.pop()
        if link in seen or "/go" in link or len(seen) > 60:
            continue
        seen.add(link)
        answer = client.get(link)
        assert answer.status_code == 200, link
        if "html" in answer.headers["content-type"]:
            found = re.findall(r'(?:href|data-part)="(/runs/run[^"#?]*)', answer.text)
            open_links += [each for each in found if "/neurons/" not in each or "N3" in each]
    layers = {link for link in seen if re.search(r"/layers/\d+$", link)}
    assert layers == {f"{start}/layers/{LAYER}"}
    assert "these are units of sae:" in client.get(f"{start}/study").text
    assert "standard deviations (layer median 0)" not in client.get(start).text
    run.gallery(tmp_path / "gallery.html")
    page = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert f"layer {LAYER}" in page and "layer 0" not in page


def test_what_asks_about_neurons_says_so(run: Run, tmp_path: Path) -> None:
    """The study and the removal of tokens are about neurons; nulls that units have none of are named."""
    for ask in (run.study, run.removal):
        with pytest.raises(QueryError, match="asks about neurons of feed-forward layers") as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelNotSupported, match="trained to read its own stream"):
        build(run.model, texts(3), tmp_path / "run", nulls=("shuffled",))
    refused = CliRunner().invoke(app, ["study", "x", "--corpus", "y", "-o", "z", "--units", "sae:x"])
    assert isinstance(refused.exception, QueryError) and "neurons" in str(refused.exception)


def test_two_runs_of_units_are_compared(run: Run, tmp_path: Path) -> None:
    """Triggers, figures, and with the weights each unit's cosines and the rank correlation of its coefficients on the
    same text, as a slow pass has them; a note says that they are units, and that their weights differ."""
    tensors = mirrored(width_of("llama"))
    generator = torch.Generator().manual_seed(4)
    for name in ("W_enc", "W_dec"):
        tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=generator)
    saelens(tmp_path / "tuned", tensors, f"blocks.{LAYER}.hook_resid_post")
    folder = run.path.parent
    tuned = load_model(folder / "model", dtype="fp32", units=f"sae:{tmp_path / 'tuned'}")
    build(tuned, texts(40), tmp_path / "run", top=5)
    other = open_run(tmp_path / "run")
    report = mn.compare(run, other, only="values,distributions", weights=True)
    found = {finding.id: finding for finding in report.findings}
    note = " ".join(found["trigger-stability"].notes)
    assert "units of sae:" in note and "where one was trained from the other" in note
    frame = found["neurons-changed-each"].frame.sort("neuron")
    assert frame["layer"].unique().to_list() == [LAYER] and frame["up"].is_null().all()
    one, two = (mirrored(width_of("llama"))["W_dec"], tensors["W_dec"])
    expected = torch.nn.functional.cosine_similarity(one, two, dim=1)
    np.testing.assert_allclose(frame["value"], expected, atol=1e-5)
    x = np.concatenate([seen_at(run.model.hf, "residual_out", tokens)[1:] for _, tokens in contexts(run)])
    sides = [
        np.maximum(x @ keys.double().numpy(), 0)
        for keys in (mirrored(width_of("llama"))["W_enc"], tensors["W_enc"])
    ]
    for neuron in range(0, len(one), 9):
        correlation = spearmanr(sides[0][:, neuron], sides[1][:, neuron]).statistic
        assert frame["coefficients"][neuron] == pytest.approx(correlation, abs=1e-3)
    same = mn.compare(run, run, only="values")
    overlap = next(finding for finding in same.findings if finding.id == "trigger-stability")
    assert overlap.frame.filter(pl.col("units") == "neurons")[
        "overlap"
    ].drop_nulls().to_list() == pytest.approx([1.0])
    assert "with other weights" not in " ".join(overlap.notes)


def test_runs_of_different_units_are_not_compared(run: Run, tmp_path: Path) -> None:
    """Neurons, and units of another layer, are no other state of these."""
    folder = run.path.parent
    neurons = build(load_model(folder / "model", dtype="fp32"), texts(10), tmp_path / "neurons", top=2)
    saelens(tmp_path / "sae", mirrored(width_of("llama")), "blocks.0.hook_resid_post")
    model = load_model(folder / "model", dtype="fp32", units=f"sae:{tmp_path / 'sae'}")
    below = build(model, texts(10), tmp_path / "below", top=2)
    for other in (neurons, below):
        report = mn.compare(run, other, only="values")
        assert "not of one kind, in the same layers and at the same points" in report.sections[0].missing


def test_a_run_and_its_units_belong_together(run: Run, tmp_path: Path) -> None:
    """The run loads its own units; without them, or with others, the model is not that of the run."""
    plain = load_model(run.model.hf, tokenizer=run.model.tokenizer)
    with pytest.raises(RunMismatch, match="neurons were given"):
        plain.check_built(run, "verifying")
    assert run.load_model(plain).units is not None
    saelens(tmp_path / "other", mirrored(width_of("llama"), 9), f"blocks.{LAYER}.hook_resid_post")
    other = load_model(plain, units=f"sae:{tmp_path / 'other'}")
    with pytest.raises(RunMismatch, match="or their weights are others"):
        other.check_built(run, "verifying")
    with pytest.raises(RunMismatch, match="units = "):
        build(plain, texts(40), run.path, top=5)


@pytest.mark.parametrize(
    ("family", "hook", "size", "reason"),
    [
        ("llama", "blocks.9.hook_resid_post", 0, "units of layer 9, and the model has layers 0 to"),
        ("llama", "blocks.1.hook_resid_post", 8, "8 wide, and the residual stream of the model is"),
        ("gpt_neox", "blocks.1.hook_resid_mid", 0, "attention and FFN of the model run in parallel"),
        ("mixtral", "blocks.1.hook_mlp_out", 0, "a mixture of experts writes there"),
    ],
)
def test_units_that_the_model_has_no_place_for(
    family: str, hook: str, size: int, reason: str, tmp_path: Path
) -> None:
    """The line says which point or width is missing."""
    hf = {**FAMILIES, **MIXTURES}[family]()
    width = size or hf.config.hidden_size
    saelens(tmp_path / "sae", mirrored(width), hook)
    with pytest.raises(ModelNotSupported, match=reason) as caught:
        load_model(hf, tokenizer=tokenizer(), units=f"sae:{tmp_path / 'sae'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["scale", "layer_norm", "random"])
def test_units_of_another_place_are_refused(fault: str, tmp_path: Path) -> None:
    """What explains less than the mean is named before anything is mined: another scale, norm or model."""
    width = width_of("llama")
    tensors = random_units(width, 2 * width) if fault == "random" else mirrored(width)
    if fault == "scale":
        tensors["W_dec"] = 4 * tensors["W_dec"]
    norm = "layer_norm" if fault == "layer_norm" else "none"
    tensors["b_dec"] += 3.0 if fault == "layer_norm" else 0.0
    saelens(tmp_path / "sae", tensors, "blocks.1.hook_resid_post", normalize_activations=norm,
            apply_b_dec_to_input=False)  # fmt: skip
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer(), units=f"sae:{tmp_path / 'sae'}")
    with pytest.raises(ModelError, match="less than the mean alone would") as caught:
        build(model, texts(20), tmp_path / "run")
    assert "\n" not in str(caught.value) and "the residual stream after layer 1" in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("k", [None, 5])
def test_random_units_are_what_their_definition_says(k: int | None, tmp_path: Path) -> None:
    """Random keys with the norms and biases of units, the threshold of the one they take after; under TopK they are
    active where they exceed the weakest active unit."""
    width = width_of("llama")
    tensors = random_units(width, 40) | {
        "threshold": torch.rand(40, generator=torch.Generator().manual_seed(5))
    }
    saelens(tmp_path / "sae", tensors, "blocks.1.hook_resid_post", *(("topk",) if k else ("jumprelu",)),
            **({"k": k} if k else {}))  # fmt: skip
    units = load_units(f"sae:{tmp_path / 'sae'}")
    if k:
        units = load_units(
            f"sae:{saelens(tmp_path / 'k', random_units(width, 40), 'blocks.1.hook_resid_post', 'topk', k=k)}"
        )
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer(), units=units)
    nulls = Nulls(model, ("random",), count=16)
    mined = _null_maxima(model, nulls, tmp_path / "run")
    assert mined.height == 16 and (mined["max"] >= 0).all()
    source = nulls._sources["random"]
    weight, bias = (source.__dict__[name][LAYER, 0].numpy() for name in ("_weight", "_bias"))
    norms = np.linalg.norm(weight, axis=1)
    own = model.anatomy.layers[LAYER].keys().norm(dim=1).numpy()
    assert all(np.isclose(own, norm, rtol=1e-5).any() for norm in norms)
    act = units.layers[LAYER].act
    maxima = np.zeros(16)
    for _, tokens in contexts(open_run(tmp_path / "run")):
        x = (
            seen_at(model.hf, "residual_out", tokens)[1:] - tensors["b_dec"].double().numpy()
            if not k
            else (
                seen_at(model.hf, "residual_out", tokens)[1:]
                - random_units(width, 40)["b_dec"].double().numpy()
            )
        )
        pre = x @ weight.T + bias
        if k:
            inner = (
                x @ units.layers[LAYER].keys.double().numpy().T
                + units.layers[LAYER].key_bias.double().numpy()
            )
            weakest = np.sort(inner, 1)[:, -k]
            kept = (pre > np.maximum(weakest, 0)[:, None]) * pre
        else:
            like = source.__dict__["_acts"][LAYER].threshold.numpy()
            assert act.threshold is not None and np.isin(like, act.threshold.numpy()).all()
            kept = (pre > like) * pre
        maxima = np.maximum(maxima, kept.max(0, initial=0))
    np.testing.assert_allclose(mined["max"], maxima, atol=1e-4)


@pytest.mark.parametrize("k", [None, 5])
def test_decoys_of_units_are_made_of_their_keys(k: int | None, tmp_path: Path) -> None:
    """One for each unit: two other keys, or sums of many, about the mean, with the threshold of the unit; under TopK
    they are active where they exceed the weakest active unit. The best of a run are those of a slow pass."""
    width, count = width_of("llama"), 12
    tensors = random_units(width, count)
    if not k:
        tensors |= {"threshold": torch.rand(count, generator=torch.Generator().manual_seed(5))}
    place = saelens(tmp_path / "sae", tensors, "blocks.1.hook_resid_post", "topk" if k else "jumprelu",
                    **({"k": k} if k else {}))  # fmt: skip
    units = load_units(f"sae:{place}")
    model = load_model(FAMILIES["llama"](), tokenizer=tokenizer(), units=units)
    nulls = Nulls(model, ("chimera", "covariance"))
    mined = _null_maxima(model, nulls, tmp_path / "run")
    held = units.layers[LAYER]
    keys, bias = held.keys.double().numpy(), held.key_bias.double().numpy()
    rows = np.concatenate([keys, bias[:, None]], 1)
    about = rows - rows.mean(0)
    for kind in ("chimera", "covariance"):
        source = nulls._sources[kind]
        mixed = source.__dict__["_mixed"]
        weight, offset = (mixed.__dict__[name][LAYER, 0].double().numpy() for name in ("_weight", "_bias"))
        made = np.concatenate([weight, offset[:, None]], 1) - rows.mean(0)
        if kind == "chimera":  # of the same two places further on, for every unit
            pairs = [(a, b) for a in range(1, count) for b in range(a + 1, count)]
            sums = [(np.roll(about, -a, 0) + np.roll(about, -b, 0)) / 2**0.5 for a, b in pairs]
            assert sum(np.allclose(made, total, atol=1e-5) for total in sums) == 1
        else:
            assert np.linalg.matrix_rank(np.concatenate([about, made]), tol=1e-4) == np.linalg.matrix_rank(
                about
            )
        maxima = np.zeros(count)
        for _, tokens in contexts(open_run(tmp_path / "run")):
            x = seen_at(model.hf, "residual_out", tokens)[1:] - tensors["b_dec"].double().numpy()
            pre, own = x @ weight.T + offset, x @ keys.T + bias
            least = np.zeros(count) if held.act.threshold is None else held.act.threshold.double().numpy()
            beaten = np.maximum(np.sort(own, 1)[:, -k], 0)[:, None] if k else least
            maxima = np.maximum(maxima, ((pre > beaten) * pre).max(0, initial=0))
        found = mined.filter(pl.col("kind") == kind).sort("neuron")
        assert found.height == count
        np.testing.assert_allclose(found["max"], maxima, atol=1e-4)


def _null_maxima(model: Model, nulls: Nulls, path: Path) -> pl.DataFrame:
    """The rows of null units of a run whose units may rebuild nothing, so that it is mined without a look at that."""
    from mnemoscope.mine import build as building

    before, building.check_units = building.check_units, lambda *_: None
    try:
        recipe, building.recipe = building.recipe, lambda *_: nulls.recipe
        build(model, texts(12), path, top=3, nulls=nulls.kinds)
    finally:
        building.check_units, building.recipe = before, recipe
    return open_run(path).table("null_neurons").collect()


@pytest.mark.parametrize("across", [False, True])
def test_transcoders_read_the_ffn_and_write_it(across: bool, tmp_path: Path) -> None:
    """Per layer and across layers: coefficients are of what the FFN reads, and all that write in a layer rebuild it."""
    hf, width, count = FAMILIES["llama"]().eval(), width_of("llama"), 24
    layers = hf.config.num_hidden_layers
    tracer(tmp_path / "t", layers, width, count, across=across)
    held = load_units(f"transcoder:{tmp_path / 't'}")
    model = load_model(hf, tokenizer=tokenizer(), units=held)
    from mnemoscope.mine import build as building

    before, building.check_units = building.check_units, lambda *_: None
    try:
        mined = build(model, texts(12), tmp_path / "run", top=3, nulls=("random", "rotated"))
    finally:
        building.check_units = before
    m, x = [], []
    for _, tokens in contexts(open_run(mined.path)):
        read = seen_at(hf, "ffn_input", tokens)[1:]
        units = held.layers[LAYER]
        m.append(np.maximum(read @ units.keys.double().numpy().T + units.key_bias.double().numpy(), 0))
        x.append(seen_at(hf, "ffn_output", tokens)[1:])
    rows = mined.table("neurons").filter(pl.col("layer") == LAYER).collect()
    np.testing.assert_allclose(rows["max"], np.concatenate(m).max(0), atol=1e-5)
    row = mined.table("units").filter(pl.col("layer") == LAYER).collect().row(0, named=True)
    assert (row["reads"], row["writes"]) == ("ffn_input", "ffn_output")
    if not across:
        units, seen = held.layers[LAYER], np.concatenate(x)
        rebuilt = np.concatenate(m) @ units.write[0].values.double().numpy() + units.bias.double().numpy()
        error = np.square(seen - rebuilt).sum() / np.square(seen - seen.mean(0)).sum()
        assert row["explained_variance"] == pytest.approx(1 - error, rel=1e-4)
    assert open_run(mined.path).verify(model=model).passed


def test_the_command_line_builds_and_shows_units(run: Run, tmp_path: Path) -> None:
    """`build --units`, `show` and `verify` as a user types them."""
    folder = run.path.parent
    (tmp_path / "text.txt").write_text("\n\n".join(texts(30)), encoding="utf-8")
    place = ["--units", f"sae:{folder / 'sae'}"]
    built = CliRunner().invoke(
        app,
        [
            "build",
            str(folder / "model"),
            *place,
            "--corpus",
            str(tmp_path / "text.txt"),
            "-o",
            str(tmp_path / "run"),
        ],
    )
    assert built.exit_code == 0, built.output
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run"), "L1N3", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)["unit"]["kind"] == "sae"
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "run")])
    assert verified.exit_code == 0, verified.output


@pytest.mark.slow
def test_workers_and_chunks_do_not_show(run: Run, tmp_path: Path) -> None:
    """Two workers give the very tables that one gives, reconstruction and null units included."""
    build(run.model, texts(40), tmp_path / "run", top=5, workers=2)
    again = open_run(tmp_path / "run").manifest.tables
    assert {name: entry.sha256 for name, entry in again.items()} == {
        name: entry.sha256 for name, entry in run.manifest.tables.items()
    }


def planted_in(model: Model, folder: Path) -> str:
    """An autoencoder of what enters layer 0, whose first units answer to one word each and whose others are a basis."""
    basis = mirrored(model.anatomy.width)
    words = [model.tokenizer(word)["input_ids"][0] for word in PLANTED.values()]
    keys = torch.eye(model.anatomy.width)[words]
    tensors = {
        "W_enc": torch.cat([keys, basis["W_enc"].T]).T,
        "W_dec": torch.cat([torch.zeros_like(keys), basis["W_dec"]]),
        "b_enc": torch.cat([torch.full((len(words),), -0.5), basis["b_enc"]]),
        "b_dec": basis["b_dec"],
    }
    return f"sae:{saelens(folder, tensors, 'blocks.0.hook_resid_pre')}"


@pytest.mark.slow
def test_patterns_of_planted_units_are_found(tmp_path: Path) -> None:
    """Units that answer to one word get it as their pattern, both ways; a test of one's own says so as well."""
    neurons = planted_model()
    model = load_model(neurons, units=planted_in(neurons, tmp_path / "sae"))
    build(model, texts(400, longest=60), tmp_path / "run", top=20)
    run = open_run(tmp_path / "run")
    run.patterns(model=model, budget=BUDGET)
    for unit, word in enumerate(PLANTED.values()):
        claims = run[f"L0N{unit}"].claims
        assert claims, f"no pattern was found for the unit of {word!r}"
        assert any(word.strip() in claim.name for claim in claims)
        tested = run.test(f"L0N{unit}", f"words:{word.strip()}", model=model)
        assert "active" in str(tested)
