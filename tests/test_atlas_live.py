"""What pages ask a model: texts and contexts, predictions and their graphs, shades, relatives; links lead on."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES
from starlette.testclient import TestClient
from test_atlas import HERE, _events
from tiny import model_folder, texts, tokenizer

import mnemoscope as mn
from mnemoscope.atlas.app import create
from mnemoscope.atlas.worked import worked
from mnemoscope.errors import QueryError
from mnemoscope.exchange import graph
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.tracing.related import OTHERS
from mnemoscope.tracing.relatives import RELATIONS

PROMPT = " the capital of France is the city of"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mn.Run:
    """A run whose tiny model can be asked."""
    model = mn.load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")
    return mn.build(model, texts(60), tmp_path_factory.mktemp("runs") / "built", top=10)


@pytest.fixture(scope="module")
def client(run: mn.Run) -> Iterator[TestClient]:
    """A browser on this machine, and the same run under another name."""
    other = shutil.copytree(run.path, run.path.parent / "other")
    with TestClient(create([run, mn.open_run(other)]), base_url=HERE, follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="module")
def explanation(run: mn.Run) -> Explanation:
    """A prediction against a foil."""
    return run.explain(PROMPT, foils=" London")


def answer(client: TestClient, path: str) -> str:
    """What a page shows of the answer to its question."""
    place, _, query = path.partition("?")
    kind, shown = _events(client.get(f"/runs/built{place}/events?{query}").text)[-1]
    assert kind == "answer", shown
    return str(shown)


# -- contexts of the run, and tokens of a text ---------------------------------------------------------------------


def test_a_context_is_read_as_the_run_read_it(run: mn.Run) -> None:
    """At every trigger of a neuron its trace has the coefficient that the run keeps."""
    rows = run.rows("triggers", 1, 3)
    for context in rows["context"].unique().to_list()[:6]:
        (traced,) = run.trace(neuron="L1N3", context=context).neurons
        for row in rows.filter(pl.col("context") == context).iter_rows(named=True):
            reading = traced.readings[row["position"]]
            assert reading.trigger and reading.coefficient == pytest.approx(row["coefficient"], rel=1e-5)
    with pytest.raises(QueryError, match="context=0 is one of the run's own"):
        run.trace("a text", context=0)
    with pytest.raises(QueryError, match="999999"):
        run.trace(context=999_999)


def test_a_trigger_leads_to_its_context_and_on_to_each_token(client: TestClient, run: mn.Run) -> None:
    """From a card to the neuron along the whole context, and from each of its tokens to the most unusual there."""
    page = client.get("/runs/built/neurons/L1N3?triggers=4").text
    links = re.findall(r'<a class="source" href="([^"]*)"', page)
    card = run.neuron("L1N3", examples=4)
    examples = [*card.sides[0].examples, *card.sides[1].examples, *card.between]
    assert [html.unescape(link) for link in links] == [
        f"/runs/built/text?context={example.context}&neurons=L1N3" for example in examples
    ]
    shown = answer(client, html.unescape(links[0]).removeprefix("/runs/built"))
    tokens = re.findall(r'<a href="([^"]*)#token-(\d+)">', shown)
    (context,) = run.contexts([examples[0].context]).values()
    assert [int(number) for _, number in tokens] == list(range(len(context.tokens)))
    assert {address for address, _ in tokens} == {f"?context={examples[0].context}"}
    unusual = answer(client, f"/text{tokens[0][0]}")
    anchors, places = re.findall(r'href="#(token-\d+)"', unusual), re.findall(r'id="(token-\d+)"', unusual)
    assert len(anchors) > 3 and set(anchors) <= set(places) and len(set(places)) == len(places)
    asked = client.get("/runs/built/text?context=").text
    assert "data-live" not in asked and 'name="context"' in asked


# -- predictions ----------------------------------------------------------------------------------------------------


def test_likely_tokens_lead_to_their_own_explanations(client: TestClient, explanation: Explanation) -> None:
    """Each as a target by its link, and as a foil of what is explained by the one behind it."""
    query = f"prompt={quote(PROMPT)}&foil={quote(' London')}"
    shown = answer(client, f"/explain?{query}")
    targets, foils = (re.findall(rf'<a class="{name}" href="([^"]*)"', shown) for name in ("target", "foil"))
    pieces = explanation.predictions.select("token", "piece").rows()
    typed = [(token, piece) for token, piece in pieces if not piece.startswith("<unused")]
    assert len(targets) == len(typed) >= 3
    for link, (_token, piece) in zip(targets, typed, strict=True):
        given = parse_qs(html.unescape(link).removeprefix("?"))
        assert given["target"] == [piece] and given["prompt"] == [PROMPT]
        assert given.get("foil", []) == ([] if piece == " London" else [" London"])
    link = html.unescape(targets[1])
    found = client.get(f"/runs/built/explain.json{link}").json()
    assert found["target"]["token"] == typed[1][0]
    against = [parse_qs(html.unescape(link).removeprefix("?")) for link in foils]
    others = [piece for token, piece in typed if token != explanation.target.token and piece != " London"]
    assert [given["foil"] for given in against] == [[" London", piece] for piece in others]
    assert all("target" not in given for given in against), "the model's own choice stays"


def test_ablations_come_on_request(client: TestClient) -> None:
    """As many as are asked for; none else."""
    whole = client.get(f"/runs/built/explain.json?prompt={quote(PROMPT)}&ablate=2").json()
    assert len([row for row in whole["ablations"] if row["kind"] == "neuron"]) == 2
    assert not client.get(f"/runs/built/explain.json?prompt={quote(PROMPT)}").json()["ablations"]


def test_a_neuron_says_in_which_predictions_it_acts(client: TestClient, explanation: Explanation) -> None:
    """Of those that were taken apart last, with a link to each; of others nothing is said."""
    address = f"/explain?prompt={quote(PROMPT)}&foil={quote(' London')}"
    answer(client, address)
    layer, neuron, increase = explanation.neurons.select("layer", "neuron", "increase").row(0)
    part = client.get(f"/runs/built/neurons/L{layer}N{neuron}/explained").text
    assert "hidden" not in part and f"{increase:+.3g}"[:4] in part
    links = {html.unescape(link) for link in re.findall(r'href="([^"]*)"', part)}
    given = {link: parse_qs(urlsplit(link).query) for link in links}
    (link,) = (
        link for link, asked in given.items() if "target" not in asked and asked.get("foil") == [" London"]
    )
    assert given[link]["prompt"] == [PROMPT] and client.get(link).status_code == 200
    named = {*explanation.neurons.select("layer", "neuron").rows()}
    upstream = explanation.queries.filter(pl.col("kind") == "neuron").select("query_layer", "query_unit")
    silent = next(
        (layer, neuron) for layer in range(2) for neuron in range(40)
        if (layer, neuron) not in {*named, *upstream.rows()}
    )  # fmt: skip
    assert "hidden" in client.get(f"/runs/built/neurons/L{silent[0]}N{silent[1]}/explained").text
    assert (
        f'data-part="/runs/built/neurons/L{layer}N{neuron}/explained"'
        in client.get(f"/runs/built/neurons/L{layer}N{neuron}").text
    )
    assert "hidden" in client.get(f"/runs/other/neurons/L{layer}N{neuron}/explained").text


# -- the graph to work with -------------------------------------------------------------------------------------------


def test_what_a_graph_shows_and_leaves_out_is_all_of_it(explanation: Explanation) -> None:
    """Of every node that is shown: links that are drawn and links that are counted, by number and by sum."""
    drawn = graph.graph(explanation)
    kinds = {node["node_id"]: node["feature_type"] for node in drawn["nodes"]}
    counts = []
    for least in (0.0, 0.15, 0.6, 1.0):
        shown = worked(drawn, least)
        ids = {box.id for box in shown.boxes}
        assert {link.source for link in shown.links} | {link.target for link in shown.links} <= ids
        left = {each.id: each for each in shown.left_out}
        for end in ids:
            into = [link["weight"] for link in drawn["links"] if link["target"] == end]
            kept = [link.weight for link in shown.links if link.target == end]
            assert len(kept) + (left[end].count if end in left else 0) == len(into)
            assert all(abs(weight) >= least * max(map(abs, into)) for weight in kept)
            if end in left:
                rest = float(left[end].weight.split()[0].replace("−", "-"))
                scale = 1 if kinds[end] == "logit" else 100
                assert rest == pytest.approx(scale * (sum(into) - sum(kept)), rel=0.01, abs=1e-3)
        counts.append(len(shown.links))
        assert len({(box.x, box.y) for box in shown.boxes}) == len(shown.boxes), "no box hides another"
        assert all(0 <= box.x <= shown.wide and 0 <= box.y <= shown.tall for box in shown.boxes)
        places = {box.id: box.x for box in shown.boxes}
        assert all(places[link.source] < places[link.target] for link in shown.links)
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] > 0
    assert not worked(drawn, 0.0).left_out


def test_pinned_nodes_stay_and_nodes_are_opened(explanation: Explanation) -> None:
    """Whatever the threshold is."""
    drawn = graph.graph(explanation)
    bare = worked(drawn, 1.0)
    hidden = next(
        node["node_id"] for node in drawn["nodes"]
        if node["node_id"] not in {box.id for box in bare.boxes} and node["feature_type"].startswith("cross")
    )  # fmt: skip
    pinned = worked(drawn, 1.0, pinned=[hidden])
    assert [box.id for box in pinned.boxes if box.pinned] == [hidden]
    outward = {link["target"] for link in drawn["links"] if link["source"] == hidden}
    assert outward & {box.id for box in pinned.boxes} == {
        link.target for link in pinned.links if link.source == hidden
    }
    output = bare.left_out[0].id
    opened = worked(drawn, 1.0, opened=[output])
    into = [link for link in drawn["links"] if link["target"] == output]
    assert sum(link.target == output for link in opened.links) == len(into)
    assert next(each for each in opened.left_out if each.id == output).opened


def test_the_graph_is_worked_with_by_links(
    client: TestClient, explanation: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins and what is opened stand in the address; the prediction is taken apart once, whatever is clicked."""
    query = f"prompt={quote(PROMPT)}&foil={quote(' London')}"
    answer(client, f"/explain?{query}")
    monkeypatch.setattr(mn.Run, "explain", lambda *_, **__: pytest.fail("it was taken apart again"))
    shown = answer(client, f"/graph?{query}&least=0.5")
    assert shown.count("<rect") == len(worked(graph.graph(explanation), 0.5).boxes)
    pins = [html.unescape(link) for link in re.findall(r'class="pin" href="([^"]*)"', shown)]
    given = parse_qs(pins[0].removeprefix("?"))
    assert given["least"] == ["0.5"] and given["foil"] == [" London"] and len(given["pin"]) == 1
    after = answer(client, f"/graph{pins[0]}")
    assert (
        'class="cause pinned"' in after or 'class="neuron pinned"' in after or 'class="rest pinned"' in after
    )
    back = [html.unescape(link) for link in re.findall(r'class="pin" href="([^"]*)"', after)]
    assert any("pin" not in parse_qs(link) for link in back), "the mark lets go again"
    opens = re.findall(r'href="([^"]*whole=[^"]*)"', shown)
    assert answer(client, f"/graph{html.unescape(opens[0])}").count("<path") > shown.count("<path")
    data = client.get(f"/runs/built/graph.json?{query}&least=0.5").json()
    assert data == json.loads(json.dumps(worked(graph.graph(explanation), 0.5).to_dict()))
    page = client.get(f"/runs/built{pins[0].replace('?', '/graph?')}").text
    assert f'name="pin" value="{given["pin"][0]}"' in page
    assert 'href="/runs/built/neurons/L' in shown


# -- a neuron -----------------------------------------------------------------------------------------------------


def test_every_token_around_a_trigger_is_shaded(client: TestClient, run: mn.Run) -> None:
    """By the coefficient that a trace of the whole context has there; at the trigger by the run's own, to the bit."""
    card = run.shaded("L1N3", examples=3, window=(6, 4))
    plain = run.neuron("L1N3", examples=3, window=(6, 4))
    compared = 0
    for shaded, kept in ((card.positive, plain.positive), (card.negative, plain.negative)):
        for example, same in zip(shaded.examples, kept.examples, strict=True):
            assert example.around is not None and same.around is None
            assert (example.before, example.after, example.coefficient) == (
                same.before,
                same.after,
                same.coefficient,
            )
            (traced,) = run.trace(neuron="L1N3", context=example.context).neurons
            first = example.position - len(example.before)
            slow = [traced.readings[first + k].coefficient for k in range(len(example.around))]
            np.testing.assert_allclose(example.around, slow, atol=1e-5)
            assert example.around[len(example.before)] == example.coefficient
            compared += len(slow)
    assert compared > 30
    shown = answer(client, "/shade?neuron=L1N3&triggers=3")
    assert shown.count("<i class=") > 30 and " style=" not in shown
    assert "<i class=" not in client.get("/runs/built/neurons/L1N3").text


def test_relatives_are_the_nearest_by_their_weights(run: mn.Run) -> None:
    """Against a slow look at every pair; each list beside what others find."""
    found = run.related("L1N3", count=5)
    layers = run.model.anatomy.layers
    values = [layer.values().detach().double().numpy() for layer in layers]
    keys = [
        layer.keys().detach().double().numpy() * layer.ffn_norm.weight.double().numpy() for layer in layers
    ]

    def slow(own: np.ndarray, others: list[np.ndarray], allowed: list[int]) -> dict[str, float]:
        cosines = {
            f"L{layer}N{neuron}": float(row @ own / np.linalg.norm(row) / np.linalg.norm(own))
            for layer in allowed for neuron, row in enumerate(others[layer]) if (layer, neuron) != (1, 3)
        }  # fmt: skip
        return dict(sorted(cosines.items(), key=lambda pair: -abs(pair[1]))[:5])

    every = list(range(len(layers)))
    wanted = {
        "values": slow(values[1][3], values, every),
        "keys": slow(keys[1][3], keys, every),
        "upstream": slow(keys[1][3], values, [0]),
        "downstream": slow(values[1][3], keys, every[2:]),
    }
    for name in RELATIONS:
        if not wanted[name]:
            assert name not in found.lists
            continue
        rows = dict(found.lists[name].select("neuron", "cosine").iter_rows())
        assert list(rows) == list(wanted[name])
        np.testing.assert_allclose(list(rows.values()), list(wanted[name].values()), atol=1e-5)
        chance = found.chance[name]
        assert 0 < chance.random < 1 and 0 < chance.peers <= chance.high <= 1 and chance.others == OTHERS
    with pytest.raises(QueryError, match="count=0"):
        run.related("L1N3", count=0)


def test_a_copy_of_a_neuron_is_its_nearest_relative(tmp_path: Path) -> None:
    """Planted in the weights: the same value turned around, and a value that the key of a later neuron is."""
    hf = FAMILIES["llama"]()
    with torch.no_grad():
        first, last = hf.model.layers[0].mlp, hf.model.layers[-1].mlp
        first.down_proj.weight[:, 7] = -2 * first.down_proj.weight[:, 3]
        norm = hf.model.layers[-1].post_attention_layernorm.weight
        last.gate_proj.weight[5] = first.down_proj.weight[:, 3] / norm
    model = mn.load_model(hf, tokenizer=tokenizer(), dtype="fp32")
    run = mn.build(model, texts(20), tmp_path / "run", top=3)
    found = run.related("L0N3", model=model)
    assert found.lists["values"].row(0)[:2] == ("L0N7", pytest.approx(-1, abs=1e-5))
    downstream = found.lists["downstream"].row(0, named=True)
    assert downstream["neuron"] == f"L{run.manifest.model.layers - 1}N5"
    assert downstream["cosine"] == pytest.approx(1, abs=1e-5)
    assert found.chance["downstream"].high < 0.99
    assert "L0N7" in str(found) and "upstream" not in found.lists


def test_relatives_are_links(client: TestClient, run: mn.Run) -> None:
    """Each leads to its page, from the neuron's own."""
    page = client.get("/runs/built/neurons/L1N3").text
    assert 'href="/runs/built/related?neuron=L1N3"' in page and 'href="/runs/built/shade?neuron=L1N3"' in page
    shown = answer(client, "/related?neuron=L1N3&count=4")
    names = [name for rows in run.related("L1N3", count=4).lists.values() for name in rows["neuron"]]
    assert re.findall(r'<a class="neuron" href="/runs/built/neurons/(\w+)">', shown)[-len(names) :] == names
    assert client.get("/runs/built/related.json?neuron=L1N3&count=4").json() == json.loads(
        json.dumps(run.related("L1N3", count=4).to_dict())
    )


def test_a_neuron_is_shown_in_other_runs(client: TestClient, run: mn.Run) -> None:
    """Of the same shape: how much of its triggers they share; alone a run has none."""
    page = client.get("/runs/built/neurons/L1N3").text
    stored = run.rows("triggers", 1, 3).height
    assert 'href="/runs/other/neurons/L1N3"' in page and f"{stored} of {stored} triggers are the same" in page
    alone = TestClient(create([run]), base_url=HERE).get("/runs/built/neurons/L1N3").text
    assert 'id="twins"' not in alone


def test_a_neuron_says_how_to_get_it_elsewhere(client: TestClient, run: mn.Run) -> None:
    """By a command and in Python: both run as they stand, and show the same card."""
    import subprocess
    import sys

    page = client.get("/runs/built/neurons/L1N3").text
    command, code = (html.unescape(text) for text in re.findall(r"<code>([^<]*)</code>", page)[-2:])
    names: dict[str, Any] = {}
    exec(code.rpartition("; ")[0], names)
    assert eval(code.rpartition("; ")[2], names) == run["L1N3"]
    words = [sys.executable, "-m", *command.split()]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "L1N3" in shown and f"{run['L1N3'].statistics.max:.3g}"[:4] in shown
