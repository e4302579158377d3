"""Neuronpedia's import folder, a source for each layer and sign, and the same as bodies for its upload.

Its importer takes the columns of a table from the first line: every line of a file has the same keys, those below.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from mnemoscope.exchange.sides import NeuronSide, Sides
from mnemoscope.exchange.written import hook, slug, spelled, visible, write_json, write_lines
from mnemoscope.neuron.twoway import NONE
from mnemoscope.records import Manifest
from mnemoscope.run.reading import Run

BATCH = 128  # neurons of a file, and of an upload
SETS = {1: "mnemoscope", -1: "mnemoscope-neg"}  # of sources
CREATOR = "mnemoscope"  # to be replaced by who imports: it must be a user there
TOKENS = 20  # raised or lowered, of an upload
TEXT = 512  # characters of an explanation in an upload

README = """
`v1/MODEL/SOURCE/`: what Neuronpedia's importer reads, for each layer a source `LAYER-mnemoscope` of the neurons as they
are, and a source `LAYER-mnemoscope-neg` of the same with their signs turned (activations are -m), as its dashboards
show what is large. `uploads/SOURCE-N.json` are bodies for `POST /api/feature/upload-batch`, 128 neurons each.

- `features`: `maxActApprox` is the largest coefficient of that side over the run's text, `frac_nonzero` the share of
  tokens with one above 0 (of the negative side those not above 0, without what is in the histogram's bin around 0),
  `freq_hist_data_bar_*` the histogram, into which one context in eight is counted, at the middles of its bins;
  `pos_str` and `neg_str` are the tokens whose logits the value raises and lowers most, by the lens `{lens}`. What a run
  does not hold is empty: vectors, neighbours, correlations, the histogram of logits.
- `activations`: a line for each trigger, strongest first, with the tokens around it. A token without a text of its own
  (part of a character) shows its bytes.
- `explanations`: patterns with a verdict, where the run has any; `typeName` and `explanationModelName` are null.

`creatorId` and `authorId` are `{creator}`: put a user of the instance there. The importer reads from the S3 bucket that
an instance is set up with; there is no import by a click.

```python
import gzip, json

[line] = open("{example}/source.jsonl")
features = [json.loads(line) for line in gzip.open("{example}/features/batch-0.jsonl.gz")]
```
"""


def write(folder: Path, sides: Sides) -> str:
    """Write sides, which come in order of layer and sign; returns what the README says of them."""
    run, about, example = sides.run, sides.run.manifest, ""
    for (layer, polarity), inside in groupby(sides, lambda side: (side.id.layer, side.polarity)):
        source = f"{layer}-{SETS[polarity]}"
        place = folder / "v1" / _model(about) / source
        example = place.relative_to(folder).as_posix()
        for name, record in _about(about, source, polarity).items():
            write_lines(place / f"{name}.jsonl", [record])
        for number, batch in enumerate(_batches(inside)):
            for name, rows in records(run, source, batch).items():
                if rows:
                    write_lines(place / name / f"batch-{number}.jsonl.gz", rows)
            write_json(folder / "uploads" / f"{source}-{number}.json", upload(run, source, batch))
    lens = run.manifest.options.get("values_lens", "own")
    return README.format(example=example, creator=CREATOR, lens=lens)


def _batches(sides: Iterator[NeuronSide]) -> Iterator[list[NeuronSide]]:
    while batch := list(islice(sides, BATCH)):
        yield batch


def _model(about: Manifest) -> str:
    return slug(about.model.id).lower()


def _about(about: Manifest, source: str, polarity: int) -> dict[str, dict[str, Any]]:
    """The four files of one line: names, and what the source is."""
    model, created, name = about.model, about.created, SETS[polarity]
    signs = "as they are" if polarity > 0 else "with their signs turned"
    description = f"Neurons of feed-forward layers, {signs}, over {about.corpus.id}"[:128]
    shared = {"creatorId": CREATOR, "createdAt": created, "visibility": "PUBLIC"}
    release = slug(f"mnemoscope-{model.id}").lower()
    return {
        "model": shared | {
            "id": _model(about), "instruct": False, "displayNameShort": model.id, "displayName": model.id,
            "tlensId": None, "dimension": model.width, "defaultSourceSetName": None, "defaultSourceId": None,
            "inferenceEnabled": False, "layers": model.layers, "neuronsPerLayer": max(model.sizes), "owner": "",
            "updatedAt": created, "website": None,
        },
        "release": shared | {
            "name": release, "description": f"Neurons of {model.id} by mnemoscope {about.mnemoscope}",
            "creatorName": CREATOR, "isNewUi": False, "featured": False, "descriptionShort": None, "urls": [],
            "creatorEmail": None, "creatorNameShort": CREATOR, "defaultSourceSetName": name,
            "defaultSourceId": source, "defaultUmapSourceIds": [],
        },
        "sourceset": shared | {
            "modelId": _model(about), "name": name, "hasDashboards": True, "description": description,
            "type": "neurons", "creatorName": CREATOR, "urls": [], "creatorEmail": None, "releaseName": release,
            "defaultOfModelId": None, "defaultRange": 1, "defaultShowBreaks": True, "showDfa": False,
            "showCorrelated": False, "showHeadAttribution": False, "showUmap": False,
        },
        "source": shared | {
            "id": source, "modelId": _model(about), "setName": name, "hasDashboards": True,
            "inferenceEnabled": False, "inferenceHosts": [], "saelensConfig": None, "saelensRelease": None,
            "saelensSaeId": None, "hfRepoId": None, "hfFolderId": None, "defaultOfModelId": None, "hasUmap": False,
            "hasUmapLogSparsity": False, "hasUmapClusters": False, "num_prompts": about.corpus.contexts,
            "num_tokens_in_prompt": None, "dataset": about.corpus.id, "notes": description,
        },
    }  # fmt: skip


def records(run: Run, source: str, sides: list[NeuronSide]) -> dict[str, list[dict[str, Any]]]:
    """Lines of features, activations and explanations of sides of one source."""
    about = run.manifest
    prefix = f"{about.model.weights_sha256[:8]}{about.corpus.sha256[:8]}-{source}"
    lines: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
    for side in sides:
        index = str(side.id.neuron)
        shared = {
            "modelId": _model(about), "layer": source, "index": index, "createdAt": about.created
        }  # fmt: skip
        lines["features"].append(shared | _feature(run, side))
        lines["activations"] += [
            shared | {"id": f"{prefix}-{index}-{rank}"} | _activation(run, side, rank)
            for rank in range(len(side.top))
        ]
        lines["explanations"] += [
            shared | {
                "id": f"{prefix}-{index}-{number}", "description": text, "authorId": CREATOR, "embedding": None,
                "triggeredById": None, "typeName": None, "explanationModelName": None, "notes": note,
            }
            for number, (text, note) in enumerate(explanations(side))
        ]  # fmt: skip
    return lines


def explanations(side: NeuronSide) -> list[tuple[str, str]]:
    """The patterns of this side that have a verdict, and the verdict."""
    return [
        (claim.name, f"{claim.verdict}; F1 {claim.f1.value:.2f} on held-out text")
        for claim in side.card.claims or ()
        if claim.polarity == side.polarity and claim.verdict != NONE and claim.f1.value is not None
    ]


def _feature(run: Run, side: NeuronSide) -> dict[str, Any]:
    bars = side.histogram
    raised, lowered = side.writes(), side.writes(raised=False)
    empty = (
            "vector", "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices", "neuron_alignment_values",
            "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
            "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
            "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    )  # fmt: skip
    return {name: [] for name in empty} | {
        "creatorId": CREATOR,
        "maxActApprox": side.maximum,
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": 10,
        "hookName": hook(side.id.layer),
        "neg_str": spelled(run.vocabulary, [token for token, _ in lowered]),
        "neg_values": [logit for _, logit in lowered],
        "pos_str": spelled(run.vocabulary, [token for token, _ in raised]),
        "pos_values": [logit for _, logit in raised],
        "frac_nonzero": side.active,
        "freq_hist_data_bar_heights": [count for _, count in bars],
        "freq_hist_data_bar_values": [middle for middle, _ in bars],
        "sourceSetName": SETS[side.polarity],
    }


def _activation(run: Run, side: NeuronSide, rank: int) -> dict[str, Any]:
    passage = side.top[rank]
    largest = max(passage.values)
    unknown = ("dfaTargetIndex", "dfaMaxValue", "logitContributions", "binMin", "binMax", "binContains")
    return dict.fromkeys((*unknown, "qualifyingTokenIndex", "zIndices", "zValues")) | {
        "tokens": visible(run.vocabulary, passage),
        "maxValue": largest,
        "maxValueTokenIndex": passage.values.index(largest),
        "minValue": min(passage.values),
        "values": list(passage.values),
        "creatorId": CREATOR,
        "dataSource": run.manifest.corpus.id,
        "dataIndex": str(passage.context),
        "dfaValues": [],
        "lossValues": [],
    }


def upload(run: Run, source: str, sides: list[NeuronSide]) -> dict[str, Any]:
    """The body of an upload of at most `BATCH` sides."""

    def logits(side: NeuronSide, raised: bool) -> list[dict[str, Any]]:
        tokens = side.writes(raised)[:TOKENS]
        texts = spelled(run.vocabulary, [token for token, _ in tokens])
        return [{"token": text, "value": logit} for text, (_, logit) in zip(texts, tokens, strict=True)]

    features = [
        {
            "index": side.id.neuron,
            "density": side.active,
            "topLogits": logits(side, True),
            "bottomLogits": logits(side, False),
            "explanations": [{"text": text[:TEXT]} for text, _ in explanations(side)],
            "activations": [
                {"tokens": visible(run.vocabulary, passage), "values": list(passage.values)}
                for passage in side.top
            ],
        }
        for side in sides
    ]
    return {"modelId": _model(run.manifest), "source": source, "features": features}
