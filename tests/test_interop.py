"""Exports read by the programs that they are for: `make interop` gets these, apart from the environment.

What they import to fetch or embed things, and do not need to read a file, is stood in for by empty modules.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
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
    "importlib_metadata": {"version": importlib.metadata.version},
    "blobfile": {},
    "boostedblob": {"ensure_session": lambda function: function},
}

SCRIPTS = Path(__file__).parents[1] / "build" / "viewer"
LIBRARIES = "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/"
ASKED = {  # what the viewer asks the network for, and where it is in a package
    f"{LIBRARIES}d3.js": ("d3-7.9.2", "dist/d3.min.js"),
    "https://unpkg.com/dagre@0.8.5/dist/dagre.min.js": ("dagre-0.8.5", "dist/dagre.min.js"),
    "https://unpkg.com/pako@2.1.0/dist/pako.min.js": ("pako-2.1.0", "dist/pako.min.js"),
}
# d3-jetpack from its package takes d3 by its modules, one of which is no longer in d3; the build that the viewer's
# authors serve also draws axes by a method.
JETPACK = """
(() => {
  const module = {}, nest = {}, exports = {}, require = (name) => (name === "d3-collection" ? nest : d3);
  ((exports) => { COLLECTION })(nest);
  JETPACK
  Object.assign(d3, exports, {
    conventions(given) {
      const c = exports.conventions(given);
      c.drawAxis = (svg) => exports.drawAxis({ ...c, svg: svg || c.svg });
      return c;
    },
  });
})();
"""


def reader(name: str) -> Any:
    """A module of a reader; skipped where that is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip("run `make interop`, which installs the programs that read exports")
    for module, names in STOOD_IN.items():
        if module not in sys.modules:
            sys.modules[module] = ModuleType(module)
            vars(sys.modules[module]).update(names)
    return importlib.import_module(name)


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


def test_circuitsvis_takes_the_arguments(run: mn.Run, model: Model, tmp_path: Path) -> None:
    """As they are, and its page holds the texts."""
    samples, tokens = (reader(f"circuitsvis.{name}") for name in ("topk_samples", "tokens"))
    folder = run.export(tmp_path / "out", "circuitsvis", neurons=NEURONS, model=model)
    for name in SIDES:
        arguments = json.loads((folder / name / "1.json").read_text())
        assert json.dumps(arguments["activations"]) in str(samples.topk_samples(**arguments))
        text = arguments["tokens"][0][0][0], arguments["activations"][0][0][0]
        assert json.dumps(text[1]) in str(tokens.colored_tokens(*text))


@pytest.fixture
def viewer(run: mn.Run, model: Model, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder with a graph, and where the viewer's own handler serves it, to this machine alone."""
    server = reader("circuit_tracer.frontend.local_server")
    folder = run.export(tmp_path / "out", "graph", prompt=PROMPT, target=" Paris", model=model)
    handler = functools.partial(
        server.CircuitGraphHandler, frontend_dir=str(server.DEFAULT_FRONTEND_DIR), data_dir=str(folder)
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}", folder
        served.shutdown()
        thread.join(10)


def script(url: str) -> str:
    """A script that the viewer fetches from elsewhere; empty where it can do without."""
    if url == f"{LIBRARIES}jetpack_2024-07-20.js":
        collection = packed("d3-collection-1.0.7", "dist/d3-collection.js")
        jetpack = packed("d3-jetpack-2.3.0", "build/d3-jetpack.cjs")
        return JETPACK.replace("COLLECTION", f"{collection}\n").replace("  JETPACK", jetpack)
    return packed(*ASKED[url]) if url in ASKED else ""


def packed(package: str, file: str) -> str:
    """A file in a package."""
    with tarfile.open(SCRIPTS / f"{package}.tgz") as archive:
        content = archive.extractfile(f"package/{file}")
        assert content is not None
        return content.read().decode()


@pytest.mark.skipif(not SCRIPTS.exists(), reason="run `make interop`, which gets the scripts of the viewer")
def test_the_viewer_draws_a_graph_and_shows_a_neuron(viewer: tuple[str, Path], browser: Any) -> None:
    """Every node is drawn; a click on a neuron brings its card, with its triggers and what it raises."""
    address, folder = viewer
    (metadata,) = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    drawn = json.loads((folder / f"{metadata['slug']}.json").read_text())
    links = [link for link in drawn["links"] if link["target"] == drawn["qParams"]["clickedId"]]
    strongest = max(links, key=lambda link: (link["source"][0] not in "Ee", abs(link["weight"])))
    (node,) = (node for node in drawn["nodes"] if node["node_id"] == strongest["source"])
    card = json.loads((folder / "features" / f"{node['feature']}.json").read_text())
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.route(
        lambda url: not url.startswith(address),
        lambda route: route.fulfill(body=script(route.request.url), content_type="text/javascript"),
    )
    page.goto(f"{address}/index.html")
    page.wait_for_selector(".link-graph text.node", state="attached", timeout=20_000)
    assert page.locator(".link-graph text.node").count() == len(drawn["nodes"])
    page.get_by_text(node["clerp"]).first.click()
    examples = card["examples_quantiles"][0]["examples"]
    page.wait_for_selector(".feature-detail .text-wrapper", state="attached", timeout=20_000)
    assert page.locator(".feature-detail .text-wrapper").count() == len(examples)
    shown = page.locator(".feature-detail .text-wrapper").first.text_content()
    assert shown == "".join(examples[0]["tokens"])
    assert card["top_logits"][0].strip() in page.locator(".feature-example-logits").text_content()
    assert f"Act: {node['activation']:.2f}" in page.locator(".feature-detail").text_content()
    assert wrong == []
    page.close()
