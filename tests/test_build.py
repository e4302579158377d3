"""The whole job: a run equals its slow definition, resumes from anything, and says no clearly."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from families import FAMILIES, slow_but_for
from tiny import model_folder, texts, tokenizer

from mnemoscope import build, load_corpus, load_model, open_run
from mnemoscope.errors import ActivationError, ModelError, QueryError, RunError, RunMismatch
from mnemoscope.mine import build as building
from mnemoscope.mine import values
from mnemoscope.mine.verify import verify
from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.run import writing
from mnemoscope.run.reading import Run
from mnemoscope.text.plan import batches

TOP = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """The same, loaded."""
    return load_model(folder, dtype="fp32")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run over sixty short documents."""
    return build(model, texts(60), tmp_path_factory.mktemp("runs") / "tiny", top=TOP)


def hashes(run: Run) -> dict[str, str]:
    """The sha256 of every table."""
    return {name: entry.sha256 for name, entry in run.manifest.tables.items()}


def coefficients(model: Model, run: Run) -> list[tuple[int, int, np.ndarray]]:
    """(context, position, [layer, neuron]) of every counted position, with plain hooks and no batching."""
    kept: list[tuple[int, int, np.ndarray]] = []
    for row in run.table("contexts").collect().iter_rows(named=True):
        found: list[torch.Tensor] = []
        hooks = [
            layer.down.register_forward_pre_hook(lambda _, inputs, kept=found: kept.append(inputs[0][0]))
            for layer in model.anatomy.layers
        ]
        with torch.no_grad():
            model.hf(torch.tensor([row["tokens"]]))
        for hook in hooks:
            hook.remove()
        stack = torch.stack(found).numpy()
        special = set(run.manifest.options["special"])
        for position in range(1, len(row["tokens"])):
            if row["tokens"][position] not in special:
                kept.append((row["context"], position, stack[:, position]))
    return kept


def test_a_run_equals_a_full_sort_with_plain_hooks(model: Model, run: Run) -> None:
    """Triggers, moments, ranges and counts of every neuron equal the slow definition."""
    rows = coefficients(model, run)
    contexts = np.array([row[0] for row in rows])
    positions = np.array([row[1] for row in rows])
    values = np.stack([row[2] for row in rows]).astype(np.float64)
    neurons = run.table("neurons").collect()
    for layer in range(model.anatomy.n_layers):
        for neuron in range(0, model.anatomy.sizes[0], 5):
            column = values[:, layer, neuron]
            stored = neurons.filter((pl.col("layer") == layer) & (pl.col("neuron") == neuron)).row(
                0, named=True
            )
            assert stored["tokens"] == len(rows) == run.manifest.corpus.counted
            centred = column - column.mean()
            expected = {
                "mean": column.mean(),
                "std": column.std(),
                "skewness": (centred**3).mean() / column.std() ** 3,
                "kurtosis": (centred**4).mean() / column.std() ** 4 - 3,
                "min": column.min(),
                "max": column.max(),
                "positive_fraction": (column > 0).mean(),
            }
            for name, value in expected.items():
                assert stored[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (layer, neuron, name)
            for polarity in (1, -1):
                table = (
                    run.rows("triggers", layer, neuron).filter(pl.col("polarity") == polarity).sort("rank")
                )
                best = sorted_triggers(column, contexts, positions, polarity)
                assert table["coefficient"].to_list() == pytest.approx([c for c, _, _ in best], rel=1e-4)
                swapped = [
                    (ours, theirs)
                    for ours, theirs in zip(
                        zip(table["context"], table["position"], strict=True),
                        [b[1:] for b in best],
                        strict=True,
                    )
                    if ours != theirs
                ]
                assert not swapped or near_ties(column, best), (layer, neuron, polarity, swapped)


def sorted_triggers(
    column: np.ndarray, contexts: np.ndarray, positions: np.ndarray, polarity: int
) -> list[tuple[float, int, int]]:
    """Every context's extreme, all sorted, the first TOP: by definition."""
    best: dict[int, tuple[float, int, int]] = {}
    for value, context, position in zip(column, contexts, positions, strict=True):
        entry = (-polarity * value, int(context), int(position))
        if entry[0] < 0 and (context not in best or entry < best[context]):
            best[context] = entry
    return [
        (-polarity * value, context, position) for value, context, position in sorted(best.values())[:TOP]
    ]


def near_ties(column: np.ndarray, best: list[tuple[float, int, int]]) -> bool:
    """Whether two of the kept coefficients are equal to within 1e-5."""
    kept = np.array([value for value, _, _ in best])
    return bool((np.abs(np.diff(kept)) <= 1e-5 * np.abs(kept[1:])).any())


def test_histograms_count_what_the_definition_counts(model: Model, run: Run) -> None:
    """Over the contexts that the hash selects, bin by bin, on the very coefficients of the batches."""
    from mnemoscope.mine.places import bin_of, selected
    from mnemoscope.model.capture import Capture

    counts = np.zeros((model.anatomy.n_layers, model.anatomy.sizes[0], 193), np.int64)
    shards = run.table("shards").select(pl.col("shard").max()).collect().item() + 1
    with Capture(model) as capture:
        for shard in range(shards):
            for batch in batches(run.file("contexts"), shard, run.manifest.options["special"]):
                chosen = batch.counted & selected(batch.contexts)[:, None]

                def count(layer: int, m: torch.Tensor, *_: object, chosen: np.ndarray = chosen) -> None:
                    bins = bin_of(m[torch.from_numpy(chosen)].numpy())
                    for neuron in range(bins.shape[1]):
                        counts[layer, neuron] += np.bincount(bins[:, neuron], minlength=193)

                capture.sweep(batch, count)
    stored = np.array(run.table("histograms").collect()["counts"].to_list()).reshape(counts.shape)
    assert (stored == counts).all()
    assert counts.sum() > 0


def test_verify_finds_nothing_in_a_sound_run(model: Model, run: Run) -> None:
    """Every check passes; what it finds in others: test_verify.py."""
    result = verify(run, model, sample=30)
    assert result.passed, result.checks


def test_verify_refuses_another_model(run: Run) -> None:
    """The weights must be those that the run was built from."""

    other = load_model(FAMILIES["gpt2"](), tokenizer=tokenizer())
    with pytest.raises(RunMismatch, match="built from"):
        verify(run, other)
    with pytest.raises(QueryError, match="sample=0 is too small"):
        verify(run, other, sample=0)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_is_the_same_bit_for_bit_whatever_the_workers(
    model: Model, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or two processes, several shards: the tables have the same sha256."""
    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 200)
    reference = build(model, texts(60), tmp_path / "one", top=TOP)
    assert reference.table("shards").select("shard").collect().n_unique() > 3
    other = build(model, texts(60), tmp_path / "other", top=TOP, workers=workers)
    assert hashes(other) == hashes(reference)


@pytest.mark.parametrize("kept", [False, True], ids=["read", "kept"])
def test_a_build_says_how_long_all_of_it_takes(
    kept: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it mines, with values and tables, by the time that a layer's values took; where these are kept from
    another run they take none. Each layer is read once."""
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_LONG", 0.0)
    monkeypatch.setattr(building, "_TRIED", 2)
    if kept:
        build(model, texts(60), tmp_path / "first", top=TOP)
    read, layer = list[int](), values.read_layer

    def slow(model: Model, number: int, *rest: object) -> object:
        read.append(number)
        time.sleep(0.2)
        return layer(model, number, *rest)

    monkeypatch.setattr(values, "read_layer", slow)
    steps: list[Progress] = []
    build(model, texts(60), tmp_path / "run", top=TOP, report=steps.append)
    after = {
        stage: {step.after for step in steps if step.stage == stage}
        for stage in {step.stage for step in steps}
    }
    (mining,), (reading,) = after["mining"], after["reading values"]
    layers = model.anatomy.n_layers
    assert read == ([] if kept else list(range(layers)))
    assert [step.done for step in steps if step.stage == "reading first values"] == [1, 2], (
        "nothing is silent"
    )
    assert 0 < reading < 0.1 and after["writing tables"] == {0.0}
    assert mining - reading == pytest.approx(0 if kept else 0.2 * (layers - 2), abs=0.15)


def test_building_again_opens_what_is_there(model: Model, run: Run) -> None:
    """The same model, text and options: nothing is done twice."""
    before = (run.path / "manifest.json").stat().st_mtime_ns
    again = build(model, texts(60), run.path, top=TOP)
    assert hashes(again) == hashes(run)
    assert (run.path / "manifest.json").stat().st_mtime_ns == before


def test_nobody_meddles_with_a_commit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that begins while another is committing is refused, or opens the run; nothing is left behind."""
    path, said, sync = tmp_path / "run", list[str](), writing.sync

    def meddle(file: Path) -> None:
        sync(file)
        if file == path:  # between two steps of the commit
            try:
                said.append(repr(build(model, texts(10), path, top=TOP)))
            except RunError as error:
                said.append(str(error))

    monkeypatch.setattr(writing, "sync", meddle)
    run = build(model, texts(10), path, top=TOP)
    assert len(said) == 3
    assert all("another process is building" in text for text in said[:-1])
    assert said[-1] == repr(run)
    assert not run.check()
    assert not {".lock", ".work"} & {file.name for file in path.iterdir()}


def test_a_folder_with_another_run_is_refused_and_left_alone(model: Model, run: Run) -> None:
    """Another corpus, or other options: one line that names what differs, and an intact run."""
    with pytest.raises(RunMismatch, match="source"):
        build(model, texts(60, seed=1), run.path, top=TOP)
    with pytest.raises(RunMismatch, match=r"top = 7.*top = 9"):
        build(model, texts(60), run.path, top=9)
    assert not run.check()


def test_an_unfinished_run_of_another_corpus_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun with one corpus is not gone on with another."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mnemoscope.mine.build.Build._write", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            build(model, texts(60), path, top=TOP)
    with pytest.raises(RunError, match=r"unfinished|not finished"):
        open_run(path)
    with pytest.raises(RunMismatch, match="source"):
        build(model, texts(60, seed=1), path, top=TOP)
    assert build(model, texts(60), path, top=TOP).manifest.corpus.documents == 60


def test_what_an_older_version_began_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says which format it has and what to do; nothing there is touched."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mnemoscope.mine.build.Build._write", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            build(model, texts(60), path, top=TOP)
    file = path / ".work" / "identity.json"
    begun = json.loads(file.read_text())
    assert begun.pop("schema_version") == 2
    file.write_text(json.dumps(begun))
    with pytest.raises(
        RunError, match=r"resuming the build in .*older.*\(format 1; this one reads 2\); build it again"
    ):
        build(model, texts(60), path, top=TOP)
    assert json.loads(file.read_text()) == begun


def test_nan_activations_are_named(folder: Path, tmp_path: Path) -> None:
    """A neuron that overflows in fp16, and not in the fp32 of the self-check: its address; no run appears."""
    hf = load_model(folder, dtype="fp16").hf
    with torch.no_grad():
        for part in ("gate_proj", "up_proj"):
            getattr(hf.model.layers[1].mlp, part).weight[3, :] *= 3e3
    broken = load_model(hf, tokenizer=tokenizer())
    with pytest.raises(ActivationError, match=r"L1N3 .*position \d+"):
        build(broken, texts(10), tmp_path / "run", top=TOP)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_long_document_is_cut_into_windows_and_none_of_it_is_lost(model: Model, tmp_path: Path) -> None:
    """The tokens of the windows are the tokens of the document."""
    text = texts(1, longest=1000)[0] + " " + texts(1, seed=5, longest=1000)[0]
    run = build(model, [text], tmp_path / "run", top=TOP)
    contexts = run.table("contexts").collect()
    assert contexts.height > 1
    assert contexts["tokens"].list.len().max() <= model.anatomy.context_length
    joined = [token for tokens in contexts["tokens"].to_list() for token in tokens]
    assert joined == model.tokenizer(text)["input_ids"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(model: Model, tmp_path: Path) -> None:
    """One line that names the folder."""
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="can be written"):
        build(model, texts(5), tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_refused(model: Model, tmp_path: Path) -> None:
    """A path that cannot become a folder is one clear line."""
    (tmp_path / "run").write_text("occupied")
    with pytest.raises(RunError):
        build(model, texts(5), tmp_path / "run")


@pytest.mark.parametrize("family", slow_but_for(sorted(FAMILIES), ("gpt2", "llama", "gemma2", "falcon")))
def test_every_family_builds_and_verifies(family: str, tmp_path: Path) -> None:
    """From end to end on a tiny random model: nothing differs."""
    from tiny import tokenizer

    model = load_model(FAMILIES[family](), tokenizer=tokenizer())
    run = build(model, texts(12), tmp_path / "run", top=3)
    assert verify(run, model, sample=10).passed
    card = run.neuron(1, 5)
    assert "L1N5" in str(card)


def test_load_errors_leave_no_folder(tmp_path: Path) -> None:
    """A model that cannot be loaded costs nothing."""
    with pytest.raises(ModelError):
        build("./no/model", load_corpus(["a text of words"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
