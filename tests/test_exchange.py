"""What is exported is what the run and the model say, in the fields that each format has."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from every_family import tiny as every_tiny
from families import FAMILIES, MIXTURES
from safetensors.numpy import load_file
from tiny import texts, tokenizer
from typer.testing import CliRunner

import mnemoscope as mn
from mnemoscope.cli import app
from mnemoscope.errors import MnemoscopeError, QueryError, RunError, RunMismatch
from mnemoscope.exchange import export, graph, neuronpedia, openai
from mnemoscope.exchange.sides import AFTER, BEFORE, NeuronSide, Passage, Sides
from mnemoscope.model.model import Model
from mnemoscope.neuron import twoway
from mnemoscope.neuron.card import Histogram
from mnemoscope.neuron.claims import Share
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.records import UnitsEntry

NEURONS = ["L0N3", "L1N7", "L1N2"]
PROMPT = " the capital of France is the city of"
SIDES = {"positive": 1, "negative": -1}


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama in fp32."""
    return mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer(), dtype="fp32")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run of it, over texts of which some are longer than a window."""
    longer = [f"{text} </s> {text}" for text in texts(80, seed=1, longest=90)]
    return mn.build(model, [*texts(60), *longer], tmp_path_factory.mktemp("runs") / "run", top=25)


@pytest.fixture(scope="module")
def explanation(model: Model, run: mn.Run) -> Explanation:
    """A prediction against two foils."""
    return mn.explain(model, PROMPT, " Paris", [" London", " king"], run=run)


def exported(run: mn.Run, model: Model, to: str, folder: Path, **options: Any) -> Path:
    """A folder with an export of `NEURONS`."""
    named = {} if "prompt" in options or "layers" in options else {"neurons": NEURONS}
    return run.export(folder / to, to, model=model, **named | options)


def hooked(model: Model, tokens: np.ndarray) -> np.ndarray:
    """f32[layer token neuron]: the inputs of the down projections in a plain forward pass."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
        for layer in model.anatomy.layers
    ]
    with torch.inference_mode():
        model.hf(input_ids=torch.from_numpy(tokens.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return torch.stack([part.reshape(len(tokens), -1) for part in seen]).float().numpy()


def triggers(run: mn.Run, layer: int, neuron: int, sign: int) -> pl.DataFrame:
    return run.rows("triggers", layer, neuron).filter(pl.col("polarity") == sign).sort("rank")


def window(run: mn.Run, tokens: np.ndarray, position: int) -> tuple[int, int]:
    """The definition: grow from the trigger while tokens are counted."""
    never = {0, *np.flatnonzero(np.isin(tokens, run.manifest.options["special"])).tolist()}
    first = stop = position
    while first - 1 not in never and first > position - BEFORE:
        first -= 1
    while stop + 1 < len(tokens) and stop + 1 not in never and stop < position + AFTER:
        stop += 1
    return first, stop + 1


# -- OpenAI's records -------------------------------------------------------------------------------------------


def test_records_hold_the_coefficients_of_the_model(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Of the whole window, sign turned on the negative side; at the trigger the run's own, to the bit."""
    folder, compared = exported(run, model, "openai", tmp_path), 0
    for name, sign in SIDES.items():
        for address in map(run.parse, NEURONS):
            record = json.loads((folder / name / f"{address.layer}/{address.neuron}.json").read_text())
            assert record["neuron_id"] == {
                "dataclass_name": "NeuronId", "layer_index": address.layer, "neuron_index": address.neuron
            }  # fmt: skip
            rows = triggers(run, *address, sign)
            top = record["most_positive_activation_records"]
            assert len(top) == rows.height >= 20
            for each, row in zip(top, rows.iter_rows(named=True), strict=True):
                tokens = run.contexts([row["context"]])[row["context"]].tokens
                first, stop = window(run, tokens, row["position"])
                slow = sign * hooked(model, tokens)[address.layer, first:stop, address.neuron]
                assert each["tokens"] == run.vocabulary.pieces(tokens[first:stop].tolist())
                np.testing.assert_allclose(each["activations"], slow, atol=1e-5)
                assert each["activations"][row["position"] - first] == sign * row["coefficient"]
                assert max(each["activations"]) == sign * row["coefficient"]
                compared += stop - first
            assert len(record["random_sample"]) == openai.RANDOM
    assert compared > 1_000


def test_zero_with_its_sign_turned_is_zero(run: mn.Run) -> None:
    """As after a ReLU; no -0.0 is written."""

    def silent(tokens: Any, requests: Any) -> list[np.ndarray]:
        return [np.zeros(request.stop - request.first, np.float32) for request in requests]

    (side,) = Sides(run, [(run.parse("L0N3"), -1)], silent)
    values = [value for passage in side.top for value in passage.values]
    assert values.count(0.0) > 100 and not np.signbit([value for value in values if value == 0]).any()


def test_records_hold_the_moments_of_the_run(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """The negative side's are those of -m."""
    folder = exported(run, model, "openai", tmp_path)
    row = run.rows("neurons", 1, 7).row(0, named=True)
    for name, sign in SIDES.items():
        record = json.loads((folder / name / "1" / "7.json").read_text())
        assert record["mean"] == sign * row["mean"] and record["skewness"] == sign * row["skewness"]
        assert record["kurtosis"] == row["kurtosis"] and record["variance"] == row["std"] ** 2


def test_random_passages_are_of_all_kinds(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """They are not the triggers, others for each record, and the same when they are drawn again."""
    one, two = (exported(run, model, "openai", tmp_path / name) for name in "ab")
    files = sorted(path.relative_to(one) for path in one.rglob("*.json"))
    assert len(files) == 2 * len(NEURONS)
    drawn = []
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
        record = json.loads((one / file).read_text())
        drawn.append(["".join(each["tokens"]) for each in record["random_sample"]])
        highest = [max(each["activations"]) for each in record["random_sample"]]
        weakest = max(record["most_positive_activation_records"][-1]["activations"])
        assert sum(high < weakest for high in highest) > len(highest) / 4
    assert len({tuple(each) for each in drawn}) == len(drawn)


def test_a_readme_says_what_was_written(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """The code in it names a file that is there, and the difference to the run's numbers is told."""
    for to in ("openai", "neuronpedia", "circuitsvis"):
        folder = exported(run, model, to, tmp_path)
        text = (folder / "README.md").read_text()
        named = text.split('open("')[1].split('"')[0]
        assert (folder / named).exists()
        assert "gave the same within" in text and run.manifest.corpus.id in text


# -- Neuronpedia's ---------------------------------------------------------------------------------------------

_EMPTY_LISTS = """
topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
correlated_features_pearson correlated_features_l1 logits_hist_data_bar_heights logits_hist_data_bar_values
decoder_weights_dist vector
"""
FIELDS = {  # of the dataclasses that its own exporter writes
    "model": "id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName "
    "defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website",
    "release": "name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail "
    "creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt",
    "sourceset": "modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail "
    "releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap "
    "createdAt",
    "source": "id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig saelensRelease "
    "saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters "
    "num_prompts num_tokens_in_prompt dataset notes createdAt",
    "features": "modelId layer index creatorId createdAt maxActApprox hasVector vectorLabel vectorDefaultSteerStrength "
    "hookName neg_str neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    f"sourceSetName {_EMPTY_LISTS}",
    "activations": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource "
    "dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains "
    "qualifyingTokenIndex zIndices zValues",
    "explanations": "id modelId layer index description authorId embedding triggeredById typeName explanationModelName "
    "notes createdAt",
}


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of lines, zipped or not."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def test_every_line_has_the_fields_of_its_table(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """The importer takes the columns from the first line: all have the same, in the same order."""
    folder = exported(run, model, "neuronpedia", tmp_path)
    sources = sorted((folder / "v1").glob("*/*"))
    assert [path.name for path in sources] == [
        "0-mnemoscope",
        "0-mnemoscope-neg",
        "1-mnemoscope",
        "1-mnemoscope-neg",
    ]
    for source in sources:
        for table, fields in FIELDS.items():
            files = [*source.glob(f"{table}.jsonl"), *source.glob(f"{table}/*.jsonl.gz")]
            assert files or table == "explanations"
            for record in (record for file in files for record in lines(file)):
                assert set(record) == set(fields.split()), table
                assert list(record) == list(lines(files[0])[0])
        assert lines(source / "source.jsonl")[0]["id"] == source.name


def test_activations_are_keyed_once_and_agree_with_themselves(
    run: mn.Run, model: Model, tmp_path: Path
) -> None:
    """And with the run: the largest of a neuron is its maximum, and its neighbours are not empty."""
    folder = exported(run, model, "neuronpedia", tmp_path)
    features, activations = (
        [record for file in sorted(folder.glob(f"v1/*/*/{name}/*.gz")) for record in lines(file)]
        for name in ("features", "activations")
    )
    keys = [(each["modelId"], each["layer"], each["index"]) for each in features]
    assert len(set(keys)) == len(keys) == 2 * len(NEURONS)
    assert max(Counter(each["id"] for each in activations).values()) == 1
    for each in activations:
        assert len(each["tokens"]) == len(each["values"]) and all(each["tokens"])
        assert each["values"][each["maxValueTokenIndex"]] == each["maxValue"] == max(each["values"])
        assert each["minValue"] == min(each["values"])
    for key, feature in zip(keys, features, strict=True):
        layer, name = feature["layer"].split("-", 1)
        sign = -1 if name == "mnemoscope-neg" else 1
        row = run.rows("neurons", int(layer), int(feature["index"])).row(0, named=True)
        own = [
            each["maxValue"] for each in activations if (each["modelId"], each["layer"], each["index"]) == key
        ]
        assert feature["maxActApprox"] == max(own) == (row["max"] if sign > 0 else -row["min"])
        assert feature["hookName"] == f"blocks.{layer}.mlp.hook_post"
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        assert feature["neg_values"] == sorted(feature["neg_values"])
        assert feature["pos_values"][0] > 0 > feature["neg_values"][0]
        assert isinstance(feature["index"], str)
        share = row["positive_fraction"]
        assert feature["frac_nonzero"] == pytest.approx(share if sign > 0 else 1 - share, abs=0.01)
        counts = run.rows("histograms", int(layer), int(feature["index"]))["counts"][0].to_list()
        half = counts[97:] if sign > 0 else counts[:96]
        assert sum(feature["freq_hist_data_bar_heights"]) == sum(half)
        assert feature["freq_hist_data_bar_values"] == sorted(feature["freq_hist_data_bar_values"])
        assert min(feature["freq_hist_data_bar_values"]) > 0
        assert max(feature["freq_hist_data_bar_values"]) <= feature["maxActApprox"]


def test_the_tokens_that_the_negative_side_raises_are_those_that_the_value_lowers(
    run: mn.Run, model: Model, tmp_path: Path
) -> None:
    """With their logits turned."""
    folder = exported(run, model, "neuronpedia", tmp_path)
    one, other = (
        lines(next(folder.glob(f"v1/*/0-{name}/features/*.gz")))[0]
        for name in ("mnemoscope", "mnemoscope-neg")
    )
    assert one["pos_str"] == other["neg_str"] and one["neg_str"] == other["pos_str"]
    assert one["pos_values"] == [-value for value in other["neg_values"]]
    lowest = run.rows("values", 0, 3).filter(pl.col("polarity") == -1).sort("rank")
    assert other["pos_values"] == [-value for value in lowest["logit"]]


def test_a_side_that_is_never_below_zero_is_not_active_there(run: mn.Run) -> None:
    """After a ReLU most coefficients are 0, which are neither above nor below."""
    card = run.neuron("L0N3", examples=0)
    edges = (-(2.0**-12), 2.0**-12, 1.0)
    zeros = replace(card, histogram=Histogram((90, 10), edges), statistics=replace(card.statistics, min=0.0))
    zeros = replace(zeros, statistics=replace(zeros.statistics, positive_fraction=0.1))
    assert NeuronSide(zeros, -1, ()).active == 0 and NeuronSide(zeros, 1, ()).active == 0.1
    both = replace(zeros, histogram=Histogram((30, 60, 10), (-1.0, *edges)))
    both = replace(both, statistics=replace(both.statistics, min=-1.0))
    assert NeuronSide(both, -1, ()).active == pytest.approx(0.9 * 30 / 90)


def test_patterns_with_a_verdict_become_explanations(run: mn.Run) -> None:
    """Those of the side alone, with the fields of their table, and in the upload."""

    def claim(name: str, polarity: int, verdict: str) -> Any:
        return SimpleNamespace(name=name, polarity=polarity, verdict=verdict, f1=Share(0.5, 0.4, 0.6))

    claims = (claim("year", 1, "both ways"), claim("month", -1, "both ways"), claim("city", 1, twoway.NONE))
    card = replace(run.neuron("L0N3", examples=0), claims=claims)
    passage = Passage(0, 1, (5, 6), ("a", "b"), (0.5, 1.0), 1)
    side = NeuronSide(card, 1, (passage,))
    (record,) = neuronpedia.records(run, "0-mnemoscope", [side])["explanations"]
    assert set(record) == set(FIELDS["explanations"].split())
    assert record["description"] == "year" and record["notes"] == "both ways; F1 0.50 on held-out text"
    (feature,) = neuronpedia.upload(run, "0-mnemoscope", [side])["features"]
    assert feature["explanations"] == [{"text": "year"}]


def test_uploads_keep_to_the_limits(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Of the fields that its interface refuses."""
    folder = exported(run, model, "neuronpedia", tmp_path)
    bodies = [json.loads(file.read_text()) for file in sorted(folder.glob("uploads/*.json"))]
    assert len(bodies) == 4
    for body in bodies:
        assert set(body) == {"modelId", "source", "features"} and body["modelId"] == body["modelId"].lower()
        indices = [feature["index"] for feature in body["features"]]
        assert len(set(indices)) == len(indices) <= neuronpedia.BATCH
        for feature in body["features"]:
            assert 0 <= feature["density"] <= 1 and len(feature["topLogits"]) <= 20
            assert len(feature["bottomLogits"]) <= 20 and feature["activations"]
            for each in feature["activations"]:
                assert 1 <= len(each["tokens"]) == len(each["values"]) <= 1024 and all(each["tokens"])


# -- CircuitsVis' ----------------------------------------------------------------------------------------------


def test_pictures_get_texts_by_layer_neuron_and_sample(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Rectangular in layers and neurons, with a label for each; the numbers are the records' own."""
    folder = exported(run, model, "circuitsvis", tmp_path)
    records = exported(run, model, "openai", tmp_path)
    for name in SIDES:
        arguments = json.loads((folder / name / "1.json").read_text())
        assert arguments["zeroth_dimension_labels"] == ["1"]
        assert arguments["first_dimension_labels"] == ["2", "7"]
        assert len(arguments["tokens"]) == len(arguments["activations"]) == 1
        for neuron, tokens, values in zip(
            ("2", "7"), arguments["tokens"][0], arguments["activations"][0], strict=True
        ):
            record = json.loads((records / name / "1" / f"{neuron}.json").read_text())
            top = record["most_positive_activation_records"]
            assert tokens == [each["tokens"] for each in top]
            flat = np.concatenate([each["activations"] for each in top])
            np.testing.assert_allclose(np.concatenate(values), flat, atol=1e-5)  # read in other batches


# -- Delphi's --------------------------------------------------------------------------------------------------


def dense(module: Path) -> tuple[np.ndarray, np.ndarray]:
    """i64[row position] tokens and f32[row position neuron] of a module."""
    (file,) = module.glob("*.safetensors")
    data = load_file(file)
    first, last = map(int, file.stem.split("_"))
    values = np.zeros((*data["tokens"].shape, last - first + 1), np.float32)
    row, position, neuron = data["locations"].astype(np.int64).T
    values[row, position, neuron] = data["activations"]
    return data["tokens"], values


def test_a_cache_holds_every_coefficient_above_zero(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Maxima and counts are the run's; a context that is read alone gives the same; others' columns are empty."""
    folder = exported(run, model, "delphi", tmp_path)
    contexts = run.table("contexts").collect()["tokens"].to_list()
    flat = np.concatenate(contexts)
    for name, sign in {"": 1, "-negative": -1}.items():
        for layer, chosen in {0: [3], 1: [2, 7]}.items():
            module = folder / "latents" / f"blocks.{layer}.mlp.hook_post{name}"
            tokens, values = dense(module)
            assert tokens.ravel()[: len(flat)].tolist() == flat.tolist()
            assert tokens.dtype == np.int64 and tokens.shape[1] == 256
            assert np.flatnonzero(values.any((0, 1))).tolist() == chosen
            for neuron in chosen:
                row = run.rows("neurons", layer, neuron).row(0, named=True)
                highest = row["max"] if sign > 0 else -row["min"]
                assert values[..., neuron].max() == pytest.approx(highest, rel=1e-3)
                if sign > 0:
                    count = round(row["positive_fraction"] * row["tokens"])
                    (file,) = module.glob("*.safetensors")
                    assert (load_file(file)["locations"][:, 2] == neuron).sum() == count
            start = len(contexts[0])
            slow = sign * hooked(model, np.array(contexts[1]))[layer][:, chosen]
            counted = ~np.isin(contexts[1], run.manifest.options["special"])
            counted[0] = False
            read = values.reshape(-1, values.shape[-1])[start : start + len(contexts[1])][:, chosen]
            np.testing.assert_allclose(
                read, np.where(counted[:, None], slow, 0).clip(0), rtol=2e-3, atol=1e-6
            )


def test_a_limit_takes_whole_contexts(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """As many as fit, and at least one."""
    lengths = [len(tokens) for tokens in run.table("contexts").collect()["tokens"].to_list()]
    for limit, count in ((sum(lengths[:3]) + 1, 3), (1, 1)):
        folder = exported(run, model, "delphi", tmp_path / str(limit), limit=limit)
        assert f"{count} contexts, {sum(lengths[:count])} tokens" in (folder / "README.md").read_text()


# -- graphs ----------------------------------------------------------------------------------------------------

NODE = {
    "node_id": str,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
    "feature": int,
}
METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
KINDS = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check_graph(drawn: dict[str, Any]) -> None:
    """The format's table: fields and types, names that say what nodes are, links between nodes that are there."""
    assert {"metadata", "qParams", "nodes", "links"} == set(drawn)
    for record, fields in ((drawn["metadata"], METADATA), *((node, NODE) for node in drawn["nodes"])):
        for name, kind in fields.items():
            assert type(record[name]) is kind, (name, record)
    assert "node_threshold" not in drawn["metadata"] and "pruning_settings" not in drawn["metadata"]
    names = [node["node_id"] for node in drawn["nodes"]]
    assert len(set(names)) == len(names)
    for node in drawn["nodes"]:
        assert node["feature_type"] in KINDS and 0 <= node["ctx_idx"] < len(
            drawn["metadata"]["prompt_tokens"]
        )
        if node["feature_type"] == "logit":
            assert node["clerp"].startswith('Output "') and node["clerp"].count('"') == 2
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(
                node["token_prob"], abs=5e-4
            )
    ends = [(link["source"], link["target"]) for link in drawn["links"]]
    assert len(set(ends)) == len(ends) and {name for pair in ends for name in pair} <= set(names)
    assert all(type(link["weight"]) is float and link["weight"] for link in drawn["links"])
    assert drawn["qParams"]["clickedId"] in names


def weights(drawn: dict[str, Any], target: str) -> dict[str, float]:
    return {link["source"]: link["weight"] for link in drawn["links"] if link["target"] == target}


def test_a_graph_has_the_fields_of_its_format(explanation: Explanation) -> None:
    """And is JSON without NaN."""
    drawn = graph.graph(explanation)
    check_graph(json.loads(json.dumps(drawn, allow_nan=False)))


def test_a_graph_with_a_lost_node_is_caught(explanation: Explanation) -> None:
    """The checker can fail."""
    drawn = graph.graph(explanation)
    drawn["nodes"] = [node for node in drawn["nodes"] if node["feature_type"] != "mlp reconstruction error"]
    with pytest.raises(AssertionError):
        check_graph(drawn)


def test_links_are_the_explanations_own_numbers(explanation: Explanation) -> None:
    """Nats of the target and of each foil, and shares of a neuron's coefficient."""
    drawn, position = graph.graph(explanation), explanation.position
    ends = {node["feature"]: node["node_id"] for node in drawn["nodes"] if node["feature_type"] == "logit"}
    target = weights(drawn, ends[explanation.target.token])
    neurons = list(explanation.neurons.select("layer", "neuron", "leave_one_out").iter_rows())
    for layer, neuron, left in neurons:
        assert target.get(f"{layer}_{neuron}_{position}", 0.0) == left
    for row in explanation.layers.filter(pl.col("part") == "ffn").iter_rows(named=True):
        inside = sum(left for layer, _, left in neurons if layer == row["layer"])
        rest = target[f"err_{row['layer']}_{position}"]
        assert rest == pytest.approx(row["leave_one_out"] - inside)
    contrast = explanation.contrasts[0]
    foil = weights(drawn, ends[contrast.foil.token])
    apart = {
        row[:2]: row[2] for row in contrast.neurons.select("layer", "neuron", "leave_one_out").iter_rows()
    }
    both = [(layer, neuron, left) for layer, neuron, left in neurons if (layer, neuron) in apart]
    assert both
    for layer, neuron, left in both:
        assert foil[f"{layer}_{neuron}_{position}"] == pytest.approx(left - apart[layer, neuron], abs=1e-12)
    asked = explanation.queries.select("layer", "neuron").unique().rows()
    for layer, neuron in asked:
        rows = explanation.queries.filter((pl.col("layer") == layer) & (pl.col("neuron") == neuron))
        named = rows.filter(~pl.col("kind").is_in(["remainder", "key bias"]))["share"].sum()
        coefficient = rows["share"].sum()
        shares = weights(drawn, f"{layer}_{neuron}_{position}")
        assert sum(shares.values()) == pytest.approx(named / coefficient)
    assert asked


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "bert", "gpt2", "falcon"])
def test_predictions_of_other_kinds_of_models_become_graphs(family: str) -> None:
    """A mixture, whose neurons are named with their experts, an encoder, parallel blocks."""
    if family == "bert":
        words = tokenizer()
        words.add_special_tokens({"mask_token": "<mask>"})
        model = mn.load_model(every_tiny("bert", "masked"), tokenizer=words)
    else:
        model = mn.load_model({**FAMILIES, **MIXTURES}[family](), tokenizer=tokenizer())
    prompt = " the capital of <mask> is the city" if family == "bert" else PROMPT
    explanation = mn.explain(model, prompt, foils=" London")
    drawn = graph.graph(explanation)
    check_graph(drawn)
    names = [node["clerp"].split()[0] for node in drawn["nodes"] if node["feature_type"].startswith("cross")]
    assert names and all(("E" in name) == (family == "mixtral") for name in names)
    assert len(drawn["nodes"]) > len(explanation.neurons) + explanation.tokens.height


def test_an_encoder_decoder_has_no_place_in_a_graph(explanation: Explanation) -> None:
    """It has two rows of tokens."""
    with pytest.raises(QueryError, match="an encoder-decoder has two"):
        graph.graph(replace(explanation, encoded=3))


def test_the_number_of_a_neuron_can_be_undone() -> None:
    """Cantor's pairs: each number once, as the viewer has it."""
    pairs = {graph.cantor(layer, neuron): (layer, neuron) for layer in range(40) for neuron in range(60)}
    assert len(pairs) == 40 * 60
    for number, pair in pairs.items():
        total = int((np.sqrt(8 * number + 1) - 1) / 2)
        neuron = number - total * (total + 1) // 2
        assert (total - neuron, neuron) == pair


def test_a_folder_for_the_viewer_has_a_card_of_each_neuron(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Of the side that it was on, with the fields that the viewer reads."""
    folder = exported(run, model, "graph", tmp_path, prompt=PROMPT, target=" Paris", foils=[" London"])
    (metadata,) = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    drawn = json.loads((folder / f"{metadata['slug']}.json").read_text())
    check_graph(drawn)
    assert metadata == drawn["metadata"] and metadata["scan"] == "./data/features"
    cards = {int(file.stem): json.loads(file.read_text()) for file in (folder / "features").iterdir()}
    nodes = [node for node in drawn["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert cards.keys() == {node["feature"] for node in nodes}
    for node in nodes:
        card = cards[node["feature"]]
        layer, neuron, _ = map(int, node["node_id"].split("_"))
        slow = hooked(model, np.array(model.tokenizer(PROMPT)["input_ids"]))[layer, -1, neuron]
        assert node["activation"] == pytest.approx(slow, abs=1e-5)
        sign = -1 if node["activation"] < 0 else 1
        row = run.rows("neurons", layer, neuron).row(0, named=True)
        assert card["index"] == node["feature"]
        assert card["act_max"] == (row["max"] if sign > 0 else -row["min"])
        for example in card["examples_quantiles"][0]["examples"]:
            values = example["tokens_acts_list"]
            assert len(values) == len(example["tokens"]) and all(example["tokens"])
            assert values[example["train_token_ind"]] == max(values)


# -- which neurons ---------------------------------------------------------------------------------------------


def test_layers_neurons_or_the_highlights(run: mn.Run, tmp_path: Path) -> None:
    """Both together are a union; without either the neurons that `show` begins with."""

    def neurons(**options: Any) -> set[tuple[int, int]]:
        return {tuple(neuron) for neuron in export.order(run, "openai", tmp_path / "out", **options).neurons}

    whole = {(1, neuron) for neuron in range(40)}
    assert neurons(layers=[1]) == whole
    assert neurons(layers=[1], neurons=[run.parse("L0N3"), run.parse("L1N3")]) == whole | {(0, 3)}
    assert neurons() == {tuple(card.id) for card in run.highlights().cards}


def test_neurons_are_read_together_or_apart(
    run: mn.Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In how many passes makes no difference but the last bits."""
    one = exported(run, model, "circuitsvis", tmp_path / "one")
    monkeypatch.setattr("mnemoscope.exchange.sides.TOGETHER", 2)
    two = exported(run, model, "circuitsvis", tmp_path / "two")
    for file in one.glob("*/*.json"):
        left, right = (json.loads((folder / file.relative_to(one)).read_text()) for folder in (one, two))
        for texts_of, others in zip(left["activations"][0], right["activations"][0], strict=True):
            np.testing.assert_allclose(np.concatenate(texts_of), np.concatenate(others), atol=1e-5)
        assert left | {"activations": None} == right | {"activations": None}


# -- what cannot be exported -----------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said_in_one_line(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Before a model is loaded, and with what to do."""
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"to": "neuropedia"}, r"to='neuropedia' is not a format; give one of neuronpedia, openai"),
        ({"neurons": ["L9N1"]}, "out of range"),
        ({"neurons": ["first"]}, "not an address"),
        ({"layers": [7]}, "out of range"),
        ({"to": "graph"}, "give the text before it, prompt="),
        ({"to": "graph", "prompt": ""}, "the prompt is empty"),
        ({"to": "graph", "prompt": "a", "layers": [0]}, "name none"),
        ({"prompt": "a"}, "prompt= is for to='graph'"),
        ({"limit": 3}, "limit=3 is for delphi"),
        ({"to": "delphi", "limit": 0}, "limit=0 is too small"),
    ]
    for options, said in wrong:
        with pytest.raises(QueryError, match=said) as caught:
            run.export(tmp_path / "out", **{"to": "openai", "model": "nowhere"} | options)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def silenced(monkeypatch: pytest.MonkeyPatch, sign: int | None) -> None:
    """No neuron of any run has a trigger any more, or none of a sign."""
    rows = mn.Run.rows

    def without(self: mn.Run, name: str, layer: int, neuron: int) -> pl.DataFrame:
        kept = rows(self, name, layer, neuron)
        gone = pl.lit(True) if sign is None else pl.col("polarity") == sign
        return kept.filter(~gone) if name == "triggers" else kept

    monkeypatch.setattr(mn.Run, "rows", without)


def test_neurons_without_triggers(
    run: mn.Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all are, that is said; a side that has none is left out, but from a graph, where its card is empty."""
    silenced(monkeypatch, -1)
    assert not (exported(run, model, "openai", tmp_path) / "negative").exists()
    folder = exported(run, model, "graph", tmp_path, prompt=PROMPT, target=" Paris")
    cards = [json.loads(file.read_text()) for file in (folder / "features").iterdir()]
    counts = {len(card["examples_quantiles"][0]["examples"]) for card in cards}
    assert counts == {0, graph.TRIGGERS}
    silenced(monkeypatch, None)
    with pytest.raises(QueryError, match="none of these neurons has a trigger; give others"):
        run.export(tmp_path / "out", "openai", neurons=NEURONS, model="nowhere")


def test_a_folder_that_holds_something_is_left_alone(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """One that is empty is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, said in (
        ("full", "holds something, which would be lost"),
        ("file", "Not a directory"),
        ("file/in", "Not a"),
    ):
        with pytest.raises(RunError, match=said):
            run.export(tmp_path / name, "openai", neurons=NEURONS, model=model)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert run.export(tmp_path / "empty", "openai", neurons=NEURONS[0], model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "empty" / "README.md").exists()


def test_an_export_that_fails_leaves_nothing(
    run: mn.Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it when it is stopped, and what was there before is there."""
    whole = openai.record

    def stopped(side: Any) -> Any:
        if side.polarity < 0:
            raise KeyboardInterrupt
        return whole(side)

    monkeypatch.setattr(openai, "record", stopped)
    with pytest.raises(KeyboardInterrupt):
        exported(run, model, "openai", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_kinds_are_refused(run: mn.Run, tmp_path: Path) -> None:
    """Mixtures, encoders, encoder-decoders, and units that are not neurons: whatever the format."""
    units = UnitsEntry(id="sae:here", kind="sae", sha256="")
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("is a mixture of experts, and these formats", {"experts": [(4, 10)] * 3}),
        ("is an encoder, and these formats", {"bidirectional": True}),
        ("is an encoder-decoder, and these formats", {"encoder_layers": 1}),
        ("its units are sae:here", {"units": units}),
    ]
    for said, facts in kinds:
        entry = run.manifest.model.model_copy(update=facts)
        other = mn.Run(run.path, run.manifest.model_copy(update={"model": entry}))
        for to in ("openai", "graph"):
            with pytest.raises(QueryError, match=said) as caught:
                other.export(tmp_path / "out", to, model="nowhere")
            assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(run: mn.Run, tmp_path: Path) -> None:
    """Its weights would give other numbers around the run's triggers."""
    torch.manual_seed(5)
    other = mn.load_model(FAMILIES["llama"](seed=5), tokenizer=tokenizer(), dtype="fp32")
    with pytest.raises(RunMismatch, match=r"exporting .*was built from"):
        exported(run, other, "openai", tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- the commands ----------------------------------------------------------------------------------------------


def test_commands_write_what_python_does(
    run: mn.Run, model: Model, explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, and the graph of an explanation; an error is one line, and the exit code 2."""
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    call = CliRunner().invoke(
        app,
        ["export", str(run.path), "--to", "openai", "--neurons", ",".join(NEURONS), "-o", str(tmp_path / "out"),
         "--model", str(tmp_path / "model")],
        catch_exceptions=False,
    )  # fmt: skip
    assert call.exit_code == 0 and "README.md says what is in it" in call.output
    other = exported(run, model, "openai", tmp_path)
    names = sorted(path.relative_to(other) for path in other.rglob("*.json"))
    assert names == sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.json"))
    assert all((other / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    file = tmp_path / "graph.json"
    call = CliRunner().invoke(
        app,
        ["explain", str(tmp_path / "model"), PROMPT, "--target", " Paris", "--dtype", "fp32", "--graph", str(file)],
        catch_exceptions=False,
    )  # fmt: skip
    assert call.exit_code == 0 and "wrote" in call.output
    check_graph(json.loads(file.read_text()))
    for option in ("graph", "html"):
        many = ["explain", "nowhere", "--prompts", "p.jsonl", "-o", "t.parquet", f"--{option}", str(file)]
        with pytest.raises(QueryError, match=f"{option}= is of one prediction") as caught:
            CliRunner().invoke(app, many, catch_exceptions=False)
        assert f"--{option} is of one prediction" in caught.value.on_command_line()
    with pytest.raises(MnemoscopeError, match="there is a folder of that name"):
        CliRunner().invoke(
            app, ["explain", "nowhere", PROMPT, "--graph", str(tmp_path)], catch_exceptions=False
        )
