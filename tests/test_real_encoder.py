"""A real sentence encoder, from the package index: it closes, builds, shows and verifies."""

from __future__ import annotations

from itertools import islice

import polars as pl
import pytest
import torch
from transformers import AutoModel

from mnemoscope import build, explain, load_corpus, load_model
from mnemoscope.errors import ModelNotSupported
from mnemoscope.mine.verify import verify
from mnemoscope.model.model import Model
from mnemoscope.run.reading import Run
from mnemoscope.text import samples

pytestmark = [pytest.mark.sample, pytest.mark.slow]

DOCUMENTS = 120
CHECKED = 40


@pytest.fixture(scope="module")
def model() -> Model:
    """Six layers of 1,536 neurons, without a head."""
    return load_model("sample:minilm-l6", dtype="fp32")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the first documents of the sample text."""
    documents = list(islice(load_corpus("sample:wikipedia").documents, DOCUMENTS))
    return build(model, load_corpus(documents), tmp_path_factory.mktemp("encoder") / "run", top=20)


def test_it_closes_and_is_read_through_its_embedding(model: Model) -> None:
    """Its parts add up to its last states, and it says that it has no head."""
    assert model.self_check <= 1e-5
    assert model.cells.sizes == (1536,) * 6 and model.anatomy.bidirectional and model.anatomy.headless
    assert model.entry().readout == "input embedding" and not model.unused
    with pytest.raises(ModelNotSupported, match="it has no language-model head"):
        explain(model, "the capital of [MASK] is paris")


def test_stored_coefficients_are_those_of_transformers_own_class(run: Run, model: Model) -> None:
    """The input of the down projection, by a plain hook on the model as transformers loads it, each context alone."""
    plain = AutoModel.from_pretrained(samples.model_folder("minilm-l6"), dtype=torch.float32).eval()
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(plain.encoder.layer):
        block.output.dense.register_forward_pre_hook(
            lambda _, args, index=index: seen.__setitem__(index, args[0][0])
        )
    rows = run.table("triggers").filter(pl.col("rank") == 0).collect().sample(CHECKED, seed=0)
    for row in rows.iter_rows(named=True):
        tokens = run.contexts([row["context"]])[row["context"]].tokens.tolist()
        assert [tokens[0], tokens[-1]] == model.tokenizer("")["input_ids"]
        with torch.inference_mode():
            plain(input_ids=torch.tensor([tokens]))
        own = float(seen[row["layer"]][row["position"], row["neuron"]])
        assert own == pytest.approx(row["coefficient"], rel=1e-3, abs=1e-4)


def test_its_run_is_verified_and_shown(run: Run, model: Model) -> None:
    """Everything is found again; a card has text on both sides, and says how values are read."""
    assert verify(run, model).passed
    card = run.neuron(2, 700)
    assert all(example.whole for example in card.positive.examples)
    assert any(example.after for example in card.positive.examples)
    assert "read through the input embedding, as the model has no head" in " ".join(str(card).split())
    assert "→" not in str(card)


def test_it_is_fetched_once() -> None:
    """The folder in the cache is given again, and holds what a checkpoint needs."""
    folder = samples.model_folder("minilm-l6")
    assert folder == samples.model_folder("minilm-l6")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
