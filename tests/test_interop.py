"""Exports read by the programs that they are for: `make interop` gets these, apart from the environment.

What they import to fetch or embed things, and do not need to read a file, is stood in for by empty modules.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from families import FAMILIES
from test_exchange import PROMPT, SIDES
from tiny import texts, tokenizer

import mnemoscope as mn
from mnemoscope.model.model import Model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NEURONS = ["L0N3", "L1N2", "L1N7"]
STOOD_IN = {  # module: what is imported of it
    "sentence_transformers": {"SentenceTransformer": object},
    "faiss": {},
    "blobfile": {},
    "boostedblob": {"ensure_session": lambda function: function},
}


def reader(name: str) -> Any:
    """A module of a reader; skipped where that is not installed."""
    for module, names in STOOD_IN.items():
        if module not in sys.modules:
            sys.modules[module] = ModuleType(module)
            vars(sys.modules[module]).update(names)
    return pytest.importorskip(
        name, reason="run `make interop`, which installs the programs that read exports"
    )


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama in fp32."""
    return mn.load_model(FAMILIES["llama"](), tokenizer=tokenizer(), dtype="fp32")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run of it."""
    return mn.build(model, texts(200, longest=60), tmp_path_factory.mktemp("runs") / "run", top=30)


def test_openais_reader_gets_the_runs_numbers(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Its own classes, with all four splits; the largest activation is the run's."""
    fast = reader("neuron_explainer.fast_dataclasses")
    classes = reader("neuron_explainer.activations.activations")
    folder = run.export(tmp_path / "out", "openai", neurons=NEURONS, model=model)
    for name, sign in SIDES.items():
        for address in map(run.parse, NEURONS):
            record = fast.loads((folder / name / f"{address.layer}/{address.neuron}.json").read_bytes())
            assert isinstance(record, classes.NeuronRecord)
            row = run.rows("neurons", *address).row(0, named=True)
            assert record.max_activation == (row["max"] if sign > 0 else -row["min"])
            assert (record.neuron_id.layer_index, record.neuron_id.neuron_index) == address
            params = classes.ActivationRecordSliceParams(n_examples_per_split=5)
            assert len(record.train_activation_records(params)) == 5
            assert len(record.valid_activation_records(params)) == 10
            assert json.loads(fast.dumps(record))["mean"] == sign * row["mean"]


def test_delphis_loader_gets_the_runs_numbers(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """Every neuron, its largest activation, and how often it is above 0."""
    latents, config = reader("delphi.latents"), reader("delphi.config")
    from transformers import AutoTokenizer

    folder = run.export(tmp_path / "out", "delphi", neurons=NEURONS, model=model)
    dataset = latents.LatentDataset(
        folder / "latents",
        config.SamplerConfig(n_examples_train=10, n_examples_test=10),
        config.ConstructorConfig(min_examples=1, n_non_activating=0),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    size, seen = dataset.tokens.numel(), set()
    for record in dataset:
        hook, neuron = record.latent.module_name, int(record.latent.latent_index)
        layer, sign = int(hook.split(".")[1]), -1 if hook.endswith("-negative") else 1
        row = run.rows("neurons", layer, neuron).row(0, named=True)
        highest = row["max"] if sign > 0 else -row["min"]
        assert float(record.max_activation) == pytest.approx(highest, rel=1e-3)
        if sign > 0:
            assert record.per_token_frequency == pytest.approx(
                row["positive_fraction"] * row["tokens"] / size
            )
        seen.add((layer, neuron, sign))
    assert seen == {(*run.parse(name), sign) for name in NEURONS for sign in SIDES.values()}
    assert dict(dataset.cache_config)["cache_ctx_len"] == dataset.tokens.shape[1]


def test_circuit_tracers_models_accept_a_graph_and_its_cards(
    run: mn.Run, model: Model, tmp_path: Path
) -> None:
    """As pydantic has them; nodes are named as its own are, but for the rests of layers."""
    graphs, features = (reader(f"circuit_tracer.frontend.{name}_models") for name in ("graph", "feature"))
    folder = run.export(
        tmp_path / "out", "graph", prompt=PROMPT, target=" Paris", foils=" London", model=model
    )
    (metadata,) = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    read = graphs.Model.model_validate_json((folder / f"{metadata['slug']}.json").read_text())
    cards = [features.Model.model_validate_json(file.read_text()) for file in (folder / "features").iterdir()]
    made = graphs.Node
    for node in read.nodes:
        if node.feature_type == "cross layer transcoder":
            layer, neuron, position = map(int, node.node_id.split("_"))
            own = made.feature_node(layer, position, neuron, activation=node.activation)
            assert node.feature in {card.index for card in cards}
        elif node.feature_type == "embedding":
            own = made.token_node(node.ctx_idx, int(node.node_id.split("_")[1]))
        elif node.feature_type == "logit":
            token = node.clerp.split('"')[1]
            own = made.logit_node(
                node.ctx_idx,
                node.feature,
                token,
                run.manifest.model.layers,
                node.is_target_logit,
                node.token_prob,
            )
        else:
            continue
        own = own.model_copy(update={"clerp": node.clerp})
        assert own == node
